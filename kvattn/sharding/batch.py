"""By batch (Pope et al., arXiv:2211.05102): each device has all the heads of some rows.

What decoding with one key/value head, or few, needs: the cache is read once, by n devices together. Projections stay
split by heads, so one all-to-all brings the queries to their rows and another brings the outputs back. The new keys and
values of a single head are on every device already; each takes its rows.
"""

import dataclasses
from typing import ClassVar

import jax
from jax.sharding import PartitionSpec as P

from kvattn.attend.step import Step, Stepped
from kvattn.attend.tokens import NewTokens, PerHead
from kvattn.cache import Cache
from kvattn.sharding.filled import real_heads
from kvattn.sharding.pages import check_pool, with_own_pages
from kvattn.sharding.scheme import DeviceStep, Scheme, TokenSpecs
from kvattn.sharding.split import Split, specs_of


@dataclasses.dataclass(frozen=True)
class Batch(Scheme):
    """By batch."""

    name: ClassVar[str] = "batch"

    def check(self, split: Split, cache: Cache, num_heads: int | None) -> None:
        """Rows must divide."""
        split.check_rows(
            cache.batch_size,
            self.row_parts(split),
            'make the batch a multiple (empty rows cost little), or use by="sequence", which splits the slots.',
        )
        check_pool(cache, self.row_parts(split), split.rows)

    def cache_specs[C: Cache](self, split: Split, cache: C) -> C:
        """Rows, and with them pages, over both axes."""
        return specs_of(cache, rows=split.rows, pages=split.rows)

    def token_specs(self, split: Split) -> TokenSpecs:
        """Queries by heads, the rest by rows."""
        return TokenSpecs(P(split.data, None, split.axis, None), P(split.rows), P(split.rows), P())

    def row_parts(self, split: Split) -> int:
        """All devices."""
        return split.num_data * split.size

    def for_heads(self, split: Split, cache: Cache, num_heads: int) -> Scheme:
        """Heads that do not divide (71 over 8) are split within, if their sizes do."""
        sizes = (cache.key_head_dim, cache.value_head_dim)
        within = num_heads % split.size > 0 and not any(size % split.size for size in sizes)
        return BatchWithinHeads() if within else self

    def local(self, split: Split, step: Step, num_heads: int, copies: int) -> DeviceStep:
        """Exchange some heads of all rows for all heads of its rows, attend, and back."""
        return self._exchanged(split, step, num_heads, axis=2)

    def _exchanged(self, split: Split, step: Step, num_heads: int, axis: int) -> DeviceStep:
        """The step on all of its rows' queries [B, T, N, H], which come split along `axis`."""
        own = real_heads(with_own_pages(step, split.rows), num_heads)

        def call(new: NewTokens, per_head: PerHead, cache: Cache) -> Stepped:
            query = jax.lax.all_to_all(new.query, split.axis, split_axis=0, concat_axis=axis, tiled=True)
            out, cache = own(dataclasses.replace(new, query=query), per_head, cache)
            return jax.lax.all_to_all(out, split.axis, split_axis=axis, concat_axis=0, tiled=True), cache

        return call


@dataclasses.dataclass(frozen=True)
class BatchWithinHeads(Batch):
    """By batch, where each device has some features of every query head, because the heads do not divide."""

    fills_heads: ClassVar[bool] = False

    def token_specs(self, split: Split) -> TokenSpecs:
        """Queries by features."""
        return dataclasses.replace(super().token_specs(split), query=P(split.data, None, None, split.axis))

    def local(self, split: Split, step: Step, num_heads: int, copies: int) -> DeviceStep:
        """Exchange some features of all rows for all features of its rows, attend, and back."""
        return self._exchanged(split, step, num_heads, axis=3)
