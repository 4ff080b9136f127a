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
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from kvattn._typing import Array
from kvattn.attend import api
from kvattn.attend.explicit import specs_of
from kvattn.attend.step import Slots, Step
from kvattn.cache import Cache, KVCache, Layout, PagedKVCache, View
from kvattn.cache import status as bits
from kvattn.cache.view import block_positions
from kvattn.errors import ShardingError, UnsupportedError
from kvattn.sharding import filling, pages
from kvattn.sharding.choose import against_heads
from kvattn.sharding.place import Place


def check(place: Place, cache: Cache, num_heads: int | None) -> None:
    """Raises `ShardingError` where rows or slots do not divide, `UnsupportedError` for tokens that share scales."""
    if cache.codec.rows is not None:
        ways = [f'by="{name}"' for name in _others(place, cache, num_heads)]
        raise UnsupportedError(
            f"{cache.codec} keeps its last tokens outside the slots and encodes {cache.codec.rows} together, so single "
            f"slots cannot lie elsewhere: use {' or '.join(ways)}{', or ' if ways else ''}a codec of "
            "single tokens such as kvattn.Int4()."
        )
    place.check_rows(cache.batch_size, place.num_data, "make the batch a multiple.")
    pages.check_pool(cache, place.num_data * place.size, place.rows)
    if isinstance(cache, KVCache) and cache.layout.rows % place.size:
        raise ShardingError(
            f"blocks of {cache.layout.rows} slots do not divide over {place.size} devices: "
            'kvattn.sharding.shard_cache(cache, mesh, by="sequence") makes them longer, kvattn.sharding.arrange(...) '
            "without placing them."
        )


def _others(place: Place, cache: Cache, num_heads: int | None) -> list[str]:
    """The ways to split the cache that are left, if not by its slots."""
    found = [] if against_heads(num_heads, cache.num_kv_heads, place.size) else ["heads"]
    if cache.batch_size % (place.num_data * place.size) == 0:
        found.append("batch")
    return found or (["replicated"] if cache.num_kv_heads == 1 else [])


def arrange(place: Place, cache: Cache) -> Cache:
    """The cache with blocks of slots that divide; what is added is never used."""
    if not isinstance(cache, KVCache) or cache.codec.rows is not None:
        return cache
    old, new = cache.layout, cache.layout.divided(place.size, cache.key_head_dim)
    if new == old:
        return cache

    def moved(role: Any, store: Any) -> Any:
        lie = {name: cache.codec.transposed(old, role, name) for name in store}
        return {name: new.to_blocks(old.from_blocks(x, lie[name]), lie[name]) for name, x in store.items()}

    return dataclasses.replace(cache, keys=moved("keys", cache.keys), values=moved("values", cache.values), layout=new)


def cache_specs(place: Place, cache: Cache) -> Any:
    """The cache's tree of placements."""
    return specs_of(cache, place.data, None, slots=place.axis, pages=place.rows)


def token_specs(place: Place) -> tuple[Any, Any, Any, Any]:
    """The placements of queries and outputs, of keys and values, of one number per row, of one per query head."""
    tokens = P(place.data)
    return tokens, tokens, tokens, P()


def is_checked(cache: Cache) -> bool:
    """Whether JAX can check that devices agree on what they share; it takes gathered scores for different ones."""
    return not cache.policy.needs_mass


def local(place: Place, step: Step, num_heads: int, copies: int) -> Any:
    """What each device does: attend to its slots, and merge."""
    del copies
    shared = filling.real_heads(step.over(Share(place.axis, place.size)), num_heads)

    def call(query, key, value, cache: Cache, given, *rest) -> tuple[Array, Cache]:
        if not isinstance(cache, PagedKVCache):
            return shared(query, key, value, cache, given, *rest)
        count = cache.num_pages * place.size  # of all the devices that have pages of these rows
        first = 0 if place.data is None else jax.lax.axis_index(place.data) * count
        own, given = pages.vouched(cache, given, first, count)
        first = first + jax.lax.axis_index(place.axis) * cache.num_pages
        out, own = shared(query, key, value, own.replace(page_table=own.page_table - first), given, *rest)
        return out, own.replace(page_table=cache.page_table)

    return call


@dataclasses.dataclass(frozen=True)
class Share(Slots):
    """The slots of one device of `size` along the mesh axis `axis`.

    Caches in here are whole but for the arrays of keys and values: lengths, policy state and numbers of slots are those
    of all the slots, and `Layout` is that of the whole blocks.
    """

    axis: str
    size: int

    is_share: ClassVar[bool] = True

    def write(self, cache: Cache, slots: Array, key: Array, value: Array, implementation: Any = "xla") -> Cache:
        """Stores the tokens whose slots are here."""
        store, here = cache.store, self.of_store(cache.store, slots)
        if isinstance(store, Layout):
            store = self._layout(store)
        written = cache.write(here, key, value, api.writer(store, implementation))
        unfit = cache.unfit(slots, key.swapaxes(1, 2), value.swapaxes(1, 2))
        return written.replace(status=bits.mark(cache.status, unfit, bits.NONFINITE))

    def of_store(self, store: Any, slots: Array) -> Array:
        """Those that are here, counted here."""
        if not isinstance(store, Layout):
            return slots  # pages that are elsewhere have numbers outside this pool: neither read nor written
        rows, row = store.rows // self.size, slots % store.rows
        mine = (slots >= 0) & (row // rows == jax.lax.axis_index(self.axis))
        return jnp.where(mine, slots // store.rows * rows + row % rows, -1)

    def view(self, cache: Cache, places: Array | None) -> View:
        """The slots that are here."""
        positions = cache.positions if places is None else places
        if isinstance(cache, PagedKVCache):
            view = cache.view()
            here = (cache.page_table >= 0) & (cache.page_table < cache.num_pages)
            positions = jnp.where(jnp.repeat(here, cache.page_size, axis=1), positions, -1)
            return dataclasses.replace(view, positions=block_positions(view.layout, positions))
        assert isinstance(cache, KVCache)
        whole, layout = cache.layout, self._layout(cache.layout)
        positions = block_positions(whole, positions)  # [blocks, B, 1 or K, R]
        first = jax.lax.axis_index(self.axis) * layout.rows
        positions = jax.lax.dynamic_slice_in_dim(positions, first, layout.rows, axis=3)
        slot = jnp.arange(layout.num_slots, dtype=jnp.int32).reshape(whole.num_blocks, 1, 1, layout.rows)
        counts = jnp.max(jnp.where(positions >= 0, slot + 1, 0), axis=(0, 2, 3))
        return View(
            cache.keys,
            cache.values,
            positions,
            counts,
            layout,
            cache.codec,
            cache.key_head_dim,
            cache.value_head_dim,
        )

    def of_chunk(self, key: Array, value: Array, positions: Array) -> tuple[Array, Array, Array]:
        """A run of the new tokens; the last one may be short, or empty."""
        length = positions.shape[1]
        count = -(-length // self.size)

        def mine(x: Array, fill: int = 0) -> Array:
            padding = [(0, 0)] * x.ndim
            padding[1] = (0, count * self.size - length)
            x = jnp.pad(x, padding, constant_values=fill)
            return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(self.axis) * count, count, axis=1)

        return mine(key), mine(value), mine(positions, -1)

    def joined(self, out: Array, lse: Array) -> tuple[Array, Array]:
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

    def all_slots(self, cache: Cache, tree: Any) -> Any:
        """Gathers what was measured of each slot."""
        assert isinstance(cache, KVCache)
        layout, count = cache.layout, cache.num_slots

        def gathered(x: Array) -> Array:
            x = x.reshape(*x.shape[:2], layout.num_blocks, layout.rows // self.size, *x.shape[3:])
            x = jax.lax.all_gather(x, self.axis, axis=3, tiled=True)
            return x.reshape(*x.shape[:2], -1, *x.shape[4:])[:, :, :count]

        return jax.tree.map(gathered, tree)

    def all_new(self, tree: Any, length: int) -> Any:
        """Gathers what was measured of each new token."""
        return jax.tree.map(lambda x: jax.lax.all_gather(x, self.axis, axis=2, tiled=True)[:, :, :length], tree)

    def _layout(self, whole: Layout) -> Layout:
        rows = whole.rows // self.size
        return Layout(whole.num_blocks * rows, rows, whole.transposed_keys)
