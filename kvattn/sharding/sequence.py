"""By sequence (DistAttention of Infinite-LLM, arXiv:2401.02669): each device has some slots of every row.

Each attends to its own slots and to its share of the new tokens. The parts are merged by their maxima and sums, which
is exact: three reductions of one number, or one head, per query head and new token, whatever the cache's length. Shards
may hold different numbers of tokens, or none.

Which device a token goes to follows from its slot, and so from the policy: of every block of R slots, device d has the
R / n from d R / n on. Rings and sinks need nothing more. Policies that go by attention keep their (small) state on
every device and gather one float32 per slot and key/value head. Of a `PagedKVCache` each device has some pages of the
pool, and a sequence may have its pages anywhere.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Float, Int32, PyTree, Shaped

from kvattn._typing import Array, Encoded
from kvattn.attend import api
from kvattn.attend.part import Part
from kvattn.attend.step import Step, Stepped
from kvattn.attend.tokens import NewTokens, PerHead
from kvattn.cache import Cache, Layout, View
from kvattn.cache import status as bits
from kvattn.cache.host import to_host
from kvattn.cache.pages import Store
from kvattn.codecs.base import Role
from kvattn.errors import ShardingError, UnsupportedError
from kvattn.sharding import pages
from kvattn.sharding.choose import against_heads
from kvattn.sharding.filled import real_heads
from kvattn.sharding.scheme import DeviceStep, Scheme, TokenSpecs
from kvattn.sharding.split import Split, specs_of


@dataclasses.dataclass(frozen=True)
class Sequence(Scheme):
    """By sequence."""

    name: ClassVar[str] = "sequence"
    fills_heads: ClassVar[bool] = False

    def check(self, split: Split, cache: Cache, num_heads: int | None) -> None:
        """Rows and slots must divide, and tokens must not share scales."""
        if cache.codec.rows is not None:
            ways = [f'by="{name}"' for name in _others(split, cache, num_heads)]
            raise UnsupportedError(
                f"{cache.codec} keeps its last tokens outside the slots and encodes {cache.codec.rows} together, so "
                f"single slots cannot lie elsewhere: use {' or '.join(ways)}{', or ' if ways else ''}a codec of "
                "single tokens such as kvattn.Int4()."
            )
        split.check_rows(cache.batch_size, split.num_data, "make the batch a multiple.")
        pages.check_pool(cache, split.num_data * split.size, split.rows)
        if not cache.store.divides(split.size):
            raise ShardingError(
                f"blocks of {cache.store.rows} slots do not divide over {split.size} devices: "
                'kvattn.sharding.shard_cache(cache, mesh, by="sequence") makes them longer, '
                "kvattn.sharding.arrange(...) without placing them."
            )

    def arrange[C: Cache](self, split: Split, cache: C) -> C:
        """Blocks of slots that divide; what is added is never used."""
        old = cache.store
        new = old.divided(split.size, cache.key_head_dim)
        if new is old or cache.codec.rows is not None:
            return cache
        assert isinstance(old, Layout) and isinstance(new, Layout)  # pages divide as they are

        def moved(role: Role, arrays: Encoded) -> Encoded:
            lie = {name: cache.codec.transposed(old, role, name) for name in arrays}
            whole = {name: new.to_blocks(old.from_blocks(x, lie[name]), lie[name]) for name, x in arrays.items()}
            return {name: to_host(x) for name, x in whole.items()} if new.on_host else whole

        return cache.replace(keys=moved("keys", cache.keys), values=moved("values", cache.values), layout=new)

    def cache_specs[C: Cache](self, split: Split, cache: C) -> C:
        """Slots, or pages, over the axis."""
        return specs_of(cache, rows=split.data, slots=split.axis, pages=split.rows)

    def token_specs(self, split: Split) -> TokenSpecs:
        """All whole but for rows."""
        tokens = P(split.data)
        return TokenSpecs(tokens, tokens, tokens, P())

    def is_checked(self, cache: Cache) -> bool:
        """JAX takes gathered scores for different ones."""
        return not cache.policy.needs_mass

    def local(self, split: Split, step: Step, num_heads: int, copies: int) -> DeviceStep:
        """Attend to its slots, and merge."""
        shared = real_heads(step.over(Share(split.axis, split.size)), num_heads)

        def call(new: NewTokens, per_head: PerHead, cache: Cache) -> Stepped:
            if cache.page_table is None:
                return shared(new, per_head, cache)
            count = cache.num_pages * split.size  # of all the devices that have pages of these rows
            first = jnp.int32(0) if split.data is None else jax.lax.axis_index(split.data) * count
            here = first + jax.lax.axis_index(split.axis) * cache.num_pages
            return pages.on_pages(shared, new, per_head, cache, here, (first, first + count))

        return call


def _others(split: Split, cache: Cache, num_heads: int | None) -> list[str]:
    """The ways to split the cache that are left, if not by its slots."""
    found = [] if against_heads(num_heads, cache.num_kv_heads, split.size) else ["heads"]
    if cache.batch_size % (split.num_data * split.size) == 0:
        found.append("batch")
    return found or (["replicated"] if cache.num_kv_heads == 1 else [])


@dataclasses.dataclass(frozen=True)
class Share(Part):
    """The slots of one device of `size` along the mesh axis `axis`.

    Caches in here are whole but for the arrays of keys and values: lengths, policy state and numbers of slots are those
    of all the slots, and `Layout` is that of the whole blocks.
    """

    axis: str
    size: int

    is_share: ClassVar[bool] = True

    def write[C: Cache](
        self,
        cache: C,
        slots: Int32[Array, "B *K T"],
        key: Float[Array, "B T K H"],
        value: Float[Array, "B T K Hv"] | None,
        implementation: api.Implementation = "xla",
    ) -> C:
        """Stores the tokens whose slots are here."""
        here = self.slots(cache.store, slots)
        store = api.writer(cache.store.share(self.size), implementation, arrays=cache.keys, platform=cache.platform)
        written = cache.write(here, key, value, store)
        unfit = cache.unfit(slots, key.swapaxes(1, 2), None if value is None else value.swapaxes(1, 2))
        return written.replace(status=bits.mark(cache.status, unfit, bits.NONFINITE))

    def slots(self, store: Store, slots: Int32[Array, "B *K T"]) -> Int32[Array, "B *K T"]:
        """Those that are here, counted here."""
        return store.slots_in_share(slots, jax.lax.axis_index(self.axis), self.size)

    def view(self, cache: Cache, *, held: bool = False) -> View:
        """The slots that are here."""
        return super().view(cache, held=held).share(jax.lax.axis_index(self.axis), self.size)

    def of_chunk(
        self, key: Float[Array, "B T K H"], value: Float[Array, "B T K Hv"] | None, positions: Int32[Array, "B T"]
    ) -> tuple[Float[Array, "B S K H"], Float[Array, "B S K Hv"] | None, Int32[Array, "B S"]]:
        """A run of the new tokens; the last one may be short, or empty."""
        length = positions.shape[1]
        count = -(-length // self.size)

        def mine(x: Shaped[Array, "B T *rest"], fill: int = 0) -> Shaped[Array, "B S *rest"]:
            padding = [(0, 0)] * x.ndim
            padding[1] = (0, count * self.size - length)
            x = jnp.pad(x, padding, constant_values=fill)
            return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(self.axis) * count, count, axis=1)

        return mine(key), None if value is None else mine(value), mine(positions, -1)

    def joined(
        self, out: Float[Array, "B T N Hv"], lse: Float[Array, "B T N"]
    ) -> tuple[Float[Array, "B T N Hv"], Float[Array, "B T N"]]:
        """The merge: max of the maxima, sum of the sums, sum of the outputs."""
        # The maximum cancels out, so its derivative is not wanted.
        top = jax.lax.pmax(jax.lax.stop_gradient(lse), self.axis)
        top = jnp.where(jnp.isneginf(top), 0, top)
        weight = jnp.exp(lse - top)
        # A device that has nothing to attend to has weight 0, whatever its out holds.
        part = jnp.where(weight[..., None] == 0, 0, out * weight[..., None])
        total, out = jax.lax.psum((weight, part), self.axis)
        empty = total == 0
        safe = jnp.where(empty, 1, total)
        return out / safe[..., None], jnp.where(empty, -jnp.inf, jnp.log(safe) + top)

    def all_slots(self, cache: Cache, tree: PyTree) -> PyTree:
        """Gathers what was measured of each slot; of pages, which lie anywhere, one device has, the others have 0."""
        if cache.page_table is not None:
            return jax.tree.map(lambda x: jax.lax.psum(x, self.axis), tree)
        layout, count = cache.layout, cache.num_slots

        def gathered(x: Shaped[Array, "B K _ *rest"]) -> Shaped[Array, "B K C *rest"]:
            x = x.reshape(*x.shape[:2], layout.num_blocks, layout.rows // self.size, *x.shape[3:])
            x = jax.lax.all_gather(x, self.axis, axis=3, tiled=True)
            return x.reshape(*x.shape[:2], -1, *x.shape[4:])[:, :, :count]

        return jax.tree.map(gathered, tree)

    def all_new(self, tree: PyTree, length: int) -> PyTree:
        """Gathers what was measured of each new token."""
        return jax.tree.map(lambda x: jax.lax.all_gather(x, self.axis, axis=2, tiled=True)[:, :, :length], tree)
