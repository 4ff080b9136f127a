"""Where the slots of a paged cache lie: in pages of a pool that all sequences share.

Every stored array is ``[K, P, R, F]``, or ``[K, P, F, R]`` where tokens are wanted along the last axis (scales): the R
tokens of a page of one key/value head lie together, so a page is one contiguous copy for a kernel, and scales, with F =
1, are ``[K, P, R]``. Slot s of a sequence is row s % R of the page that its table names at s // R.
"""

import dataclasses

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Bool, Int32, Shaped

from kvattn._typing import Array
from kvattn.cache.layout import Layout


@dataclasses.dataclass(frozen=True, eq=False)
class Pages:
    """A pool and the table into it; to codecs what `Layout` is. Made on the spot: it holds arrays.

    Attributes:
        layout: slots and blocks of one sequence, a block being one page or several.
        page_size: R, slots per page.
        table: the pages of each sequence. Entries outside the pool are read as some page or other (whoever reads
            masks what lies beyond a sequence's length) and never written.
        num_pages: P.
    """

    layout: Layout
    page_size: int
    table: Int32[Array, "B columns"]
    num_pages: int

    transposed_keys = False

    @staticmethod
    def axes(page: str) -> str:
        """The names of the axes of an array whose pages have these (`kvattn.cache.axes`)."""
        return f"heads pages {page.replace('slots', 'offsets')}"

    @property
    def num_slots(self) -> int:
        """Slots of a sequence."""
        return self.layout.num_slots

    @property
    def rows(self) -> int:
        """Slots per block."""
        return self.layout.rows

    @property
    def num_blocks(self) -> int:
        """Blocks of a sequence."""
        return self.layout.num_blocks

    def zeros(
        self, batch_size: int, num_kv_heads: int, features: int, dtype: DTypeLike, transposed: bool
    ) -> Shaped[Array, "K P _ _"]:
        """An empty pool."""
        tail = (features, self.page_size) if transposed else (self.page_size, features)
        return self.empty(batch_size, num_kv_heads, tail, dtype)

    def empty(
        self, batch_size: int, num_kv_heads: int, block: tuple[int, ...], dtype: DTypeLike
    ) -> Shaped[Array, "K P _ _"]:
        """An empty pool whose pages have the shape `block`."""
        del batch_size
        return jnp.zeros((num_kv_heads, self.num_pages, *block), dtype)

    def take(self, pool: Shaped[Array, "K P _ _"], i: Int32[Array, ""], transposed: bool) -> Shaped[Array, "B K _ _"]:
        """Block i of every sequence."""
        count = self.rows // self.page_size
        column = i * count + jnp.arange(count, dtype=jnp.int32)
        pages = jnp.take(self.table, jnp.minimum(column, self.table.shape[1] - 1), axis=1)
        return self._gather(pool, pages, transposed)

    def put(
        self, pool: Shaped[Array, "K P _ _"], index: Int32[Array, "B M"], new: Shaped[Array, "B K M _ _"]
    ) -> Shaped[Array, "K P _ _"]:
        """Replaces whole pages: those that `index` names by their column."""
        pages = self._page(pool, index, index < self.table.shape[1])
        return pool.at[:, pages].set(new.swapaxes(0, 1).astype(pool.dtype), mode="drop")

    def from_blocks(self, pool: Shaped[Array, "*pool _ _"], transposed: bool) -> Shaped[Array, "B K C F"]:
        """The slots of every sequence in order; of blocks of the layout too."""
        if pool.ndim == 5:
            return self.layout.from_blocks(pool, transposed)
        x = self._gather(pool, self.table, transposed)
        return x.swapaxes(2, 3) if transposed else x

    def write(
        self, pool: Shaped[Array, "K P _ _"], slots: Int32[Array, "B T"], x: Shaped[Array, "B K T F"], transposed: bool
    ) -> Shaped[Array, "K P _ _"]:
        """Writes tokens into the slots of their sequences; negative: not written."""
        column = slots // self.page_size
        pages = self._page(pool, column, (slots >= 0) & (slots < self.num_slots))
        row = slots % self.page_size
        if transposed:
            new = x.transpose(0, 2, 1, 3)  # the indices are split by a slice, so their axes come first
            return pool.at[:, pages, :, row].set(new.astype(pool.dtype), mode="drop")
        return pool.at[:, pages, row].set(x.swapaxes(0, 1).astype(pool.dtype), mode="drop")

    def _page(
        self, pool: Shaped[Array, "K P _ _"], column: Int32[Array, "B M"], wanted: Bool[Array, "B M"]
    ) -> Int32[Array, "B M"]:
        """The pages of columns; one past the pool, to be dropped, where they are not wanted."""
        column = jnp.clip(column, 0, self.table.shape[1] - 1)
        page = jnp.take_along_axis(self.table, column, axis=1)
        return jnp.where(wanted & (page >= 0), page, pool.shape[1])

    # One share of the slots: a device's pages, from 0 to P - 1; the table names others by numbers outside the pool.

    def divided(self, parts: int, head_dim: int, backend: str | None = None) -> "Pages":
        """As it is: pages lie anywhere."""
        del parts, head_dim, backend
        return self

    def divides(self, parts: int) -> bool:
        """Always."""
        del parts
        return True

    def share(self, parts: int) -> "Pages":
        """As it is."""
        del parts
        return self

    def slots_in_share(self, slots: Int32[Array, "B T"], part: Int32[Array, ""], parts: int) -> Int32[Array, "B T"]:
        """The same numbers: what is in pages elsewhere is neither read nor written."""
        del part, parts
        return slots

    def positions_in_share(
        self, positions: Int32[Array, "blocks B K1 R"], part: Int32[Array, ""], parts: int
    ) -> tuple[Int32[Array, "blocks B K1 R"], None]:
        """Those of the layout, -1 where a page lies elsewhere; counts stay."""
        del part, parts
        here = jnp.repeat((self.table >= 0) & (self.table < self.num_pages), self.page_size, axis=1)
        here = self.layout.to_blocks(here[:, None, :, None], False)[..., 0]
        return jnp.where(here, positions, -1), None

    @staticmethod
    def _gather(
        pool: Shaped[Array, "K P _ _"], pages: Int32[Array, "B n"], transposed: bool
    ) -> Shaped[Array, "B K _ _"]:
        """[B, K, n R, F] (transposed: [B, K, F, n R]) of the n pages of each row."""
        x = jnp.take(pool, pages, axis=1, mode="clip")  # [K, B, n, R, F] or [K, B, n, F, R]
        heads, batch, count, *tail = x.shape
        if transposed:
            return x.transpose(1, 0, 3, 2, 4).reshape(batch, heads, tail[0], count * tail[1])
        return x.swapaxes(0, 1).reshape(batch, heads, count * tail[0], tail[1])


Store = Layout | Pages
"""Where the arrays of a cache have their slots."""
