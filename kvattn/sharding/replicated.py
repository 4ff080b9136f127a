"""The whole cache on every device, the query heads split: what a prompt wants where there is one key/value head.

A chunk's queries are large and its cache is not. So Pope et al. (arXiv:2211.05102) attend to prompts by heads and
decode by batch; `kvattn.sharding.shard_cache(cache, mesh, by="batch")` is the switch between the two.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from kvattn.attend.step import Step, Stepped
from kvattn.attend.tokens import NewTokens, PerHead
from kvattn.cache import Cache
from kvattn.errors import ShardingError
from kvattn.sharding.heads import Heads
from kvattn.sharding.pages import check_pool
from kvattn.sharding.scheme import DeviceStep, Scheme, TokenSpecs
from kvattn.sharding.split import Split, specs_of


@dataclasses.dataclass(frozen=True)
class Replicated(Scheme):
    """The whole cache on every device."""

    name: ClassVar[str] = "replicated"
    is_split: ClassVar[bool] = False

    def check(self, split: Split, cache: Cache, num_heads: int | None) -> None:
        """One key/value head, and rows that divide."""
        if cache.num_kv_heads > 1:
            raise ShardingError(
                f'by="replicated" is for one key/value head, this cache has {cache.num_kv_heads}: use by="heads", '
                "which copies no more of them than the devices need."
            )
        if cache.policy.needs_mass and num_heads is not None and num_heads % split.size:
            raise ShardingError(
                f"{num_heads} query heads do not divide over {split.size} devices, and {cache.policy} goes by the mean "
                'of all: use by="batch", or as many query heads as divide.'
            )
        split.check_rows(cache.batch_size, split.num_data, "make the batch a multiple.")
        check_pool(cache, split.num_data, split.data)

    def cache_specs[C: Cache](self, split: Split, cache: C) -> C:
        """Rows over the data axis."""
        return specs_of(cache, rows=split.data, pages=split.data)

    def token_specs(self, split: Split) -> TokenSpecs:
        """Queries by heads, new keys and values whole."""
        return TokenSpecs(P(split.data, None, split.axis, None), P(split.data), P(split.data), P(split.axis))

    def is_checked(self, cache: Cache) -> bool:
        """As by heads: they need not agree."""
        return False

    def copies(self, split: Split, cache: Cache, num_kv_heads: int) -> int:
        """On all."""
        return split.size

    def local(self, split: Split, step: Step, num_heads: int, copies: int) -> DeviceStep:
        """Its query heads against the one key/value head; heads that fill up give 0."""
        own = Heads().local(split, step, num_heads, copies)

        def call(new: NewTokens, per_head: PerHead, cache: Cache) -> Stepped:
            out, cache = own(new, per_head, cache)
            here = out.shape[2]
            head = jax.lax.axis_index(split.axis) * here + jnp.arange(here, dtype=jnp.int32)
            return jnp.where((head < num_heads)[None, None, :, None], out, 0), cache

        return call
