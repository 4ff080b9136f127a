"""Where the slots of a paged cache lie: in pages of a pool that all sequences share.

Every stored array is ``[K, P, R, F]``, or ``[K, P, F, R]`` where tokens are wanted along the last axis (scales): the R
tokens of a page of one key/value head lie together, so a page is one contiguous copy for a kernel, and scales, with F =
1, are ``[K, P, R]``. Slot s of a sequence is row s % R of the page that its table names at s // R.

On TPUs, whose registers have 128 columns, tokens of 64 features lie two by two: ``[K, P, R / 2, 128]`` has the first
half of a page's tokens in its first columns and the other half beside it.

A page has a strip for each head. A table [B, W] is that of all heads: head k finds its tokens in its own strip of each
page. Heads that keep different numbers of tokens have a table each, [B, K, W]. There a number p below P still is the
head's own strip of page p; the numbers from P on, P + k P + p, are the strip of page p that is head k's, for whatever
head: so what one head has given back another can take.
"""

import dataclasses
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Bool, Int32, Shaped

from kvattn import _target
from kvattn._typing import Array
from kvattn.cache.layout import Layout
from kvattn.codecs import Codec
from kvattn.errors import ConfigError
from kvattn.policies import Policy

BLOCK_SLOTS = 128
"""Slots that `"xla"` gathers at once: whole pages, as many as fit."""


LANES, SUBLANES = 128, 8
"""Columns and rows of a TPU's register. Whole 128s of tokens of 64 features fill registers the other way round."""

if TYPE_CHECKING:
    Table = Int32[Array, "B *K columns"]
else:  # placements are worked out from shapes too
    Table = Int32[Array | jax.ShapeDtypeStruct, "B *K columns"]


@dataclasses.dataclass(frozen=True, eq=False)
class Pages:
    """A pool and the table into it; to codecs what `Layout` is. Made on the spot: it holds arrays.

    Attributes:
        layout: slots and blocks of one sequence, a block being one page or several.
        page_size: R, slots per page.
        table: the pages of each sequence, or of each of its heads. Entries outside the pool are read as some page or
            other (whoever reads masks what lies in slots without a token) and never written.
        num_pages: P.
        by_token: whether what arrays hold of a page are numbers of its tokens, one after the other.
    """

    layout: Layout
    page_size: int
    table: Table
    num_pages: int
    by_token: bool = True

    transposed_keys = False
    on_host = False

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

    @property
    def columns(self) -> int:
        """Entries of the table for a sequence, or for one of its heads."""
        return self.table.shape[-1]

    @property
    def is_by_head(self) -> bool:
        """Whether each head has a table of its own."""
        return self.table.ndim == 3

    def zeros(
        self, batch_size: int, num_kv_heads: int, features: int, dtype: DTypeLike, transposed: bool
    ) -> Shaped[Array, "K P _ _"]:
        """An empty pool."""
        beside = 1 if transposed or not self.by_token else tokens_beside(self.page_size, features)
        tail = (features, self.page_size) if transposed else (self.page_size // beside, features * beside)
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
        pages = jnp.take(self.table, jnp.minimum(column, self.columns - 1), axis=-1)
        return self._gather(pool, self._strip(pool, pages) if self.is_by_head else pages, transposed)

    def put(
        self, pool: Shaped[Array, "K P _ _"], index: Int32[Array, "B M"], new: Shaped[Array, "B K M _ _"]
    ) -> Shaped[Array, "K P _ _"]:
        """Replaces whole pages: those that `index` names by their column, in a table of all heads."""
        pages = self._page(pool, index, index < self.columns)
        return pool.at[:, pages].set(new.swapaxes(0, 1).astype(pool.dtype), mode="drop")

    def from_blocks(self, pool: Shaped[Array, "*pool _ _"], transposed: bool) -> Shaped[Array, "B K C F"]:
        """The slots of every sequence in order; of blocks of the layout too."""
        if pool.ndim == 5:
            return self.layout.from_blocks(pool, transposed)
        x = self._gather(pool, self._strip(pool, self.table) if self.is_by_head else self.table, transposed)
        return (x.swapaxes(2, 3) if transposed else x)[:, :, : self.num_slots]

    def write(
        self,
        pool: Shaped[Array, "K P _ _"],
        slots: Int32[Array, "B *K T"],
        x: Shaped[Array, "B K T F"],
        transposed: bool,
    ) -> Shaped[Array, "K P _ _"]:
        """Writes tokens into the slots of their sequences; negative: not written."""
        by_head = self.is_by_head or slots.ndim == 3
        if by_head and slots.ndim == 2:
            slots = slots[:, None]
        pages = self._page(pool, slots // self.page_size, (slots >= 0) & (slots < self.num_slots))
        row = slots % self.page_size
        where_in = lambda row: (slice(None), row) if transposed else (row,)
        beside = 1 if transposed else self._beside(pool)
        if beside > 1:
            row, half = row % pool.shape[-2], row // pool.shape[-2]
            features = jnp.arange(x.shape[-1], dtype=jnp.int32).reshape(*(1,) * row.ndim, -1)
            feature = half[..., None] * x.shape[-1] + features
            pages, where_in = pages[..., None], lambda row: (row[..., None], feature)
        if by_head:
            strips = _strips(pool)
            where = self._strip(pool, pages[..., 0])[..., None] if beside > 1 else self._strip(pool, pages)
            row = jnp.broadcast_to(row, where.shape[:3])
            index = (where, *where_in(row))
            return strips.at[index].set(x.astype(pool.dtype), mode="drop").reshape(pool.shape)
        if beside > 1:
            return pool.at[:, pages, *where_in(row)].set(x.swapaxes(0, 1).astype(pool.dtype), mode="drop")
        if transposed:
            new = x.transpose(0, 2, 1, 3)  # the indices are split by a slice, so their axes come first
            return pool.at[:, pages, :, row].set(new.astype(pool.dtype), mode="drop")
        return pool.at[:, pages, row].set(x.swapaxes(0, 1).astype(pool.dtype), mode="drop")

    def copied(
        self, pool: Shaped[Array, "K P _ _"], sources: Int32[Array, " M"], targets: Int32[Array, " M"]
    ) -> Shaped[Array, "K P _ _"]:
        """The pool with pages, or strips, copied, by their numbers in tables of heads; targets past all are dropped."""
        heads, count = pool.shape[:2]
        head, sources, targets = jnp.arange(heads, dtype=jnp.int32)[:, None], sources[None], targets[None]
        whole = targets < count  # all its strips; else one, which stands for itself in the first line
        strip = lambda x: jnp.where(whole, head * count + x, x - count)
        into = jnp.where(whole | (head == 0), strip(targets), heads * count)
        strips = _strips(pool)
        return (
            strips.at[into].set(jnp.take(strips, strip(sources), axis=0, mode="clip"), mode="drop").reshape(pool.shape)
        )

    def _page(
        self, pool: Shaped[Array, "K P _ _"], column: Int32[Array, "B *K M"], wanted: Bool[Array, "B *K M"]
    ) -> Int32[Array, "B *K M"]:
        """The numbers of columns; one past all there are, to be dropped, where they are not wanted."""
        table = self.table[:, None] if self.table.ndim < column.ndim else self.table
        page = jnp.take_along_axis(table, jnp.clip(column, 0, self.columns - 1), axis=-1)
        return jnp.where(wanted & (page >= 0), page, num_numbers(self.table, *pool.shape[:2]))

    def _strip(self, pool: Shaped[Array, "K P _ _"], pages: Int32[Array, "B #K n"]) -> Int32[Array, "B K n"]:
        """Which of the K P strips of a pool a head's page numbers mean; one past them where they mean none."""
        heads, count = pool.shape[:2]
        own = pages + count * jnp.arange(heads, dtype=jnp.int32)[None, :, None]
        strip = jnp.where(pages < count, own, pages - count)
        return jnp.where((pages >= 0) & (pages < num_numbers(self.table, heads, count)), strip, heads * count)

    # One share of the slots: a device's pages, from 0 to P - 1; the table has -1 for those that lie elsewhere.

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

    def slots_in_share(
        self, slots: Int32[Array, "B *K T"], part: Int32[Array, ""], parts: int
    ) -> Int32[Array, "B *K T"]:
        """The same numbers: what is in pages elsewhere is neither read nor written."""
        del part, parts
        return slots

    def positions_in_share(
        self, positions: Int32[Array, "blocks B K1 R"], part: Int32[Array, ""], parts: int
    ) -> tuple[Int32[Array, "blocks B K1 R"], None]:
        """Those of the layout, -1 where a page lies elsewhere; counts stay."""
        del part, parts
        here = jnp.repeat((self.table >= 0) & (self.table < self.num_pages), self.page_size, axis=-1)
        here = here[..., : self.num_slots] if self.is_by_head else here[:, None, : self.num_slots]
        here = self.layout.to_blocks(here[..., None], False)[..., 0]
        return jnp.where(here, positions, -1), None

    def _gather(
        self, pool: Shaped[Array, "K P _ _"], pages: Int32[Array, "B *K n"], transposed: bool
    ) -> Shaped[Array, "B K _ _"]:
        """[B, K, n R, F] (transposed: [B, K, F, n R]) of n pages of each row, or n strips of pages of each head."""
        if pages.ndim == 3:
            x = jnp.take(_strips(pool), pages, axis=0, mode="clip")
        else:
            x = jnp.take(pool, pages, axis=1, mode="clip").swapaxes(0, 1)
        batch, heads, count, *tail = x.shape  # [B, K, n, R, F] or [B, K, n, F, R]
        if transposed:
            return x.swapaxes(2, 3).reshape(batch, heads, tail[0], count * tail[1])
        beside = self._beside(pool)
        if beside > 1:
            x = x.reshape(batch, heads, count, tail[0], beside, tail[1] // beside).swapaxes(3, 4)
        return x.reshape(batch, heads, count * beside * tail[0], tail[1] // beside)

    def _beside(self, pool: Shaped[Array, "K P _ _"]) -> int:
        """How many tokens of a page lie side by side, in an array whose tokens are not along the last axis."""
        return self.page_size // pool.shape[-2] if self.by_token else 1


def block_layout(page_size: int, max_pages: int, codec: Codec | None = None, num_slots: int | None = None) -> Layout:
    """Blocks of whole pages; of one where the codec asks for its size. None: all slots of the pages are used."""
    num_slots = max_pages * page_size if num_slots is None else num_slots
    alone = codec is not None and codec.rows is not None
    pages = 1 if alone else max(1, min(BLOCK_SLOTS // page_size, -(-num_slots // page_size)))
    return Layout(num_slots, pages * page_size, False)


def tokens_beside(page_size: int, features: int) -> int:
    """How many tokens of a page lie side by side, on the platform that programs are made for here."""
    fills = features == LANES // 2 and page_size % LANES and page_size % (2 * SUBLANES) == 0
    return 2 if fills and _target.platform() == "tpu" else 1


def slots_of(policy: Policy, page_size: int, max_pages: int) -> int:
    """The slots of a sequence: those of so many pages, or fewer where the policy wants no more."""
    room = max_pages * page_size
    try:
        return policy.num_slots(room)
    except ConfigError as error:
        wanted = policy.num_slots(None)
        raise ConfigError(
            f"{policy} holds {wanted} tokens of a sequence at once, {max_pages} pages of {page_size} have room for "
            f"{room}: give max_pages={-(-wanted // page_size)}, or make the budget smaller."
        ) from error


def num_numbers(table: Int32[Array, "B *K columns"], num_kv_heads: int, num_pages: int) -> int:
    """How many numbers a table may hold: P for the pages, and K P more for their strips where heads have their own."""
    return num_pages * (1 + num_kv_heads) if table.ndim == 3 else num_pages


def _strips(pool: Shaped[Array, "K P _ _"]) -> Shaped[Array, "strips _ _"]:
    """A pool as its pages' strips, head after head."""
    return pool.reshape(-1, *pool.shape[2:])


Store = Layout | Pages
"""Where the arrays of a cache have their slots."""
