"""By heads (Megatron-LM, arXiv:1909.08053): each device has some key/value heads and all their query heads.

Nothing is exchanged. Fewer key/value heads than devices are stored several times: `arrange` repeats each n / K times,
so that device d holds head d // (n / K), the one that its query heads read. (Policies that go by attention exchange it
then, one float32 per slot, between the copies of a head.)
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike
from jaxtyping import PyTree, Shaped

from kvattn._typing import Array
from kvattn.attend.part import Part
from kvattn.attend.step import Step
from kvattn.cache import Cache
from kvattn.cache.axes import along
from kvattn.errors import ShardingError
from kvattn.sharding.choose import against_heads
from kvattn.sharding.pages import check_pool, with_own_pages
from kvattn.sharding.scheme import DeviceStep, Scheme, TokenSpecs
from kvattn.sharding.split import Split, specs_of


@dataclasses.dataclass(frozen=True)
class Heads(Scheme):
    """By heads."""

    name: ClassVar[str] = "heads"

    def check(self, split: Split, cache: Cache, num_heads: int | None) -> None:
        """Heads and rows must divide."""
        self._check_counts(split, cache, num_heads)
        if cache.num_kv_heads < split.size:
            raise ShardingError(
                f"{cache.num_kv_heads} key/value heads do not divide over {split.size} devices as they are: "
                f'kvattn.sharding.shard_cache(cache, mesh, by="heads") stores each {split.size // cache.num_kv_heads} '
                "times."
            )

    def _check_counts(self, split: Split, cache: Cache, num_heads: int | None) -> None:
        """Heads must divide once they are copied."""
        reason = against_heads(num_heads, cache.num_kv_heads, split.size)
        if reason is not None:
            raise ShardingError(
                f'by="heads" over mesh axis {split.axis!r}: {reason} Use by="batch", which splits the rows, or '
                'by="sequence", which splits the slots'
                + (' (by="replicated" is the whole cache on every device).' if cache.num_kv_heads == 1 else ".")
            )
        split.check_rows(cache.batch_size, split.num_data, "make the batch a multiple.")
        check_pool(cache, split.num_data, split.data)

    def arrange[C: Cache](self, split: Split, cache: C) -> C:
        """As many key/value heads as devices, if there are fewer."""
        self._check_counts(split, cache, None)
        copies = split.size // cache.num_kv_heads
        return cache if copies <= 1 else repeated(cache, copies)

    def cache_specs[C: Cache](self, split: Split, cache: C) -> C:
        """Heads over the axis."""
        return specs_of(cache, rows=split.data, heads=split.axis, pages=split.data)

    def token_specs(self, split: Split) -> TokenSpecs:
        """All by heads."""
        tokens = P(split.data, None, split.axis, None)
        return TokenSpecs(tokens, tokens, P(split.data), P(split.axis))

    def is_checked(self, cache: Cache) -> bool:
        """They need not agree: NaN in one head marks the rows of its device only (`kvattn.cache.status`)."""
        return False

    def copies(self, split: Split, cache: Cache, num_kv_heads: int) -> int:
        """Those that `arrange` made."""
        heads = cache.num_kv_heads
        if heads != split.size or not 0 < num_kv_heads < heads or heads % num_kv_heads:
            return 1
        return heads // num_kv_heads

    def with_copies(self, x: Shaped[ArrayLike, "B T _ H"] | None, copies: int) -> Shaped[ArrayLike, "B T _ H"] | None:
        """Each head as often as the cache has it."""
        return x if x is None or copies == 1 else jnp.repeat(x, copies, axis=2)

    def local(self, split: Split, step: Step, num_heads: int, copies: int) -> DeviceStep:
        """Each device's part of everything fits together."""
        step = step.over(SomeOfGroup(split.axis, split.size, copies)) if copies > 1 else step
        return with_own_pages(step, split.data)


def repeated[C: Cache](cache: C, copies: int) -> C:
    """The cache with every key/value head `copies` times, neighbours."""
    return along("heads", lambda x, axis: jnp.repeat(x, copies, axis=axis), cache, cache.axes)


def without_copies[C: Cache](cache: C, copies: int) -> C:
    """The cache with the first of every `copies` key/value heads."""

    def first(x: Shaped[Array, "..."], axis: int) -> Shaped[Array, "..."]:
        return jax.lax.slice_in_dim(x, 0, x.shape[axis], stride=copies, axis=axis)

    return along("heads", first, cache, cache.axes)


@dataclasses.dataclass(frozen=True)
class SomeOfGroup(Part):
    """All the slots, but some of the query heads that read them: `copies` neighbours along `axis` have a group.

    Policies that go by attention must decide alike wherever a key/value head is: they see the mean over the group, and
    only this is exchanged.
    """

    axis: str
    size: int
    copies: int

    def of_group(self, tree: PyTree) -> PyTree:
        """One float32 per slot and key/value head is averaged over the copies."""
        groups = [list(range(i, i + self.copies)) for i in range(0, self.size, self.copies)]
        return jax.tree.map(lambda x: jax.lax.psum(x, self.axis, axis_index_groups=groups) / self.copies, tree)
