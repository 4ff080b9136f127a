"""`PagedKVCache`: the device side of PagedAttention (Kwon et al., arXiv:2309.06180), as a pytree.

Pages of a pool, and per sequence a table of the pages that hold its tokens. Which page is free, shared or copied is
decided on the host; here tokens are appended to the pages that a table names, and read through it.
"""

import dataclasses
import typing
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Bool, Float, Int32, PyTree, Shaped

from kvattn import _checks
from kvattn._trees import portable, tell_flax
from kvattn._typing import Array, Encoded
from kvattn.cache import status as bits
from kvattn.cache.axes import along
from kvattn.cache.base import Cache, Page, known_rows, shown_size, storage_dtype
from kvattn.cache.layout import Layout
from kvattn.cache.pages import Pages
from kvattn.cache.placed import placed, shardings_of
from kvattn.codecs import Codec, Plain
from kvattn.errors import BlockStateError, ConfigError, DTypeError, RangeError, ShapeError, UnsupportedError
from kvattn.policies import Full

BLOCK_SLOTS = 128
"""Slots that `"xla"` gathers at once: whole pages, as many as fit."""


@typing.no_type_check
@portable
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class PagedKVCache(Cache):
    """Keys and values of B sequences in pages of one pool.

    Token p of a sequence lies in row p % page_size of page ``page_table[b, p // page_size]``. Sequences may share pages
    (prefixes), as long as nobody appends to a shared page: copy it first (outside jit a step that would is refused).
    All tokens are kept; attend to fewer with ``window=`` of the step, and let the pages go on the host.

    Donate it to a jitted step as `kvattn.KVCache`; a new table is not a new program.

    Make one with `PagedKVCache.create`, then give it tables with `with_tables`.

    Attributes:
        keys: encoded keys, pools [K, P, R, F] or [K, P, F, R] (`kvattn.cache.pages`).
        values: encoded values, likewise.
        page_table: entries past a sequence's tokens mean nothing.
        lengths: tokens seen.
        state: nothing: all tokens are kept.
        status: sticky bits of `kvattn.cache.status`.
        codec: how tokens are stored.
        page_size: R.
        key_head_dim: H.
        value_head_dim: head dim of the values.
        dtype: what the tokens were before they were encoded.
    """

    keys: Encoded
    values: Encoded
    page_table: Int32[Array, "B columns"]
    lengths: Int32[Array, " B"]
    state: PyTree
    status: Int32[Array, " B"]
    codec: Codec = dataclasses.field(metadata={"static": True})
    page_size: int = dataclasses.field(metadata={"static": True})
    key_head_dim: int = dataclasses.field(metadata={"static": True})
    value_head_dim: int = dataclasses.field(metadata={"static": True})
    dtype: np.dtype = dataclasses.field(metadata={"static": True})

    policy = Full()
    is_static = False
    _advice = "Give it more columns with max_pages."

    @classmethod
    def create(
        cls,
        num_pages: int,
        page_size: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        batch_size: int,
        max_pages: int,
        codec: Codec | None = None,
        dtype: DTypeLike = jnp.bfloat16,
        value_head_dim: int | None = None,
    ) -> "PagedKVCache":
        """An empty pool, and tables that name no page.

        Args:
            num_pages: P, pages of the pool.
            page_size: R, tokens per page.
            num_kv_heads: K.
            head_dim: H.
            batch_size: B, sequences in a step.
            max_pages: most pages of a sequence.
            codec: how tokens are stored. None: as they are, in `dtype`. A codec whose tokens share a scale (KIVI) needs
                pages as long as its residual.
            dtype: float32, bfloat16, float16 (float64 under x64): what is stored without a codec.
            value_head_dim: head dim of the values. None: H.

        Raises:
            ConfigError: a size below its minimum, something that is no codec, pages of another size than it needs.
            DTypeError: a size that is no int, a dtype that is not floating.
            RangeError: more pages than int32 counts.
        """
        tell_flax()
        if _checks.integer("num_pages", num_pages, 1) > _checks.INT32_MAX:
            raise RangeError(f"num_pages must fit in int32, which tables hold, got {num_pages}.")
        _checks.integer("page_size", page_size, 1)
        _checks.integer("num_kv_heads", num_kv_heads, 1)
        _checks.integer("head_dim", head_dim, 1)
        _checks.integer("batch_size", batch_size, 0)
        _checks.integer("max_pages", max_pages, 1)
        value_head_dim = head_dim if value_head_dim is None else _checks.integer("value_head_dim", value_head_dim, 1)
        if codec is not None and not isinstance(codec, Codec):
            raise ConfigError(f"codec must be a codec or None, got {codec!r}.")
        dtype = storage_dtype(dtype)
        codec = Plain(dtype) if codec is None else codec
        if codec.rows is not None and codec.rows != page_size:
            raise ConfigError(
                f"{codec} encodes {codec.rows} tokens together, a page holds {page_size}: give both the same size."
            )
        table = jnp.full((batch_size, max_pages), -1, jnp.int32)
        store = Pages(block_layout(page_size, max_pages, codec), page_size, table, num_pages)
        return cls(
            keys=codec.empty(store, "keys", batch_size, num_kv_heads, head_dim, dtype),
            values=codec.empty(store, "values", batch_size, num_kv_heads, value_head_dim, dtype),
            page_table=table,
            lengths=jnp.zeros((batch_size,), jnp.int32),
            state=(),
            status=jnp.zeros((batch_size,), jnp.int32),
            codec=codec,
            page_size=page_size,
            key_head_dim=head_dim,
            value_head_dim=value_head_dim,
            dtype=dtype,
        )

    # What it holds.

    @property
    def num_kv_heads(self) -> int:
        """K."""
        return next(iter(self.keys.values())).shape[0]

    @property
    def num_pages(self) -> int:
        """P, pages of the pool."""
        return self.keys["data"].shape[1]

    @property
    def max_pages(self) -> int:
        """Most pages of a sequence."""
        return self.page_table.shape[1]

    @property
    def num_slots(self) -> int:
        """Most tokens of a sequence."""
        return self.max_pages * self.page_size

    @property
    def axes(self) -> "PagedKVCache":
        """As `Cache.axes`, with the table's."""
        return dataclasses.replace(super().axes, page_table="rows columns")

    @property
    def layout(self) -> Layout:
        """Slots and blocks of one sequence."""
        return block_layout(self.page_size, self.max_pages, self.codec)

    @property
    def store(self) -> Pages:
        """Where the arrays have their slots."""
        return Pages(self.layout, self.page_size, self.page_table, self.num_pages)

    def dense(self) -> tuple[Float[Array, "B K C H"], Float[Array, "B K C Hv"]]:
        """As `Cache.dense`; on a mesh, rows and heads are split as the tables and the pool are."""
        cache = self.usable()
        rows, pool = shardings_of((cache.page_table, cache.keys["data"]))
        where = None
        if rows is not None and pool is not None:
            first = [sharding.spec[0] if len(sharding.spec) else None for sharding in (rows, pool)]
            where = jax.NamedSharding(rows.mesh, jax.P(*first))
        return placed(_dense, (where, where), cache)

    # What one does with it.

    def with_tables(
        self, page_table: ArrayLike | Sequence[Sequence[int]], lengths: ArrayLike | Sequence[int]
    ) -> "PagedKVCache":
        """The same pool under other tables: what the host decided.

        Args:
            page_table: int [B, W], W <= max_pages: the pages of each sequence, in order. Entries past its tokens mean
                nothing, but those that the next tokens will go to must be there when they come.
            lengths: int [B]: tokens that lie in those pages already.

        Raises:
            ShapeError: another shape.
            DTypeError: not integers.
            RangeError: a negative length, more tokens than the table has room for, a page that is not in the pool.
                Under jit: status bits, and 0 tokens for such a row.
            UnsupportedError: tokens that share scales (KIVI) and a row that would hold others than it did: its last
                ones are not in pages.
        """
        self = self.usable()
        table = _integers("page_table", page_table)
        if table.ndim != 2 or table.shape[0] != self.batch_size or table.shape[1] > self.max_pages:
            raise ShapeError(
                f"page_table must be [B, W] = ({self.batch_size}, at most {self.max_pages}), got {table.shape}."
            )
        width = table.shape[1]
        table = jnp.pad(table, ((0, 0), (0, self.max_pages - width)), constant_values=-1)
        lengths = _checks.counts("lengths", lengths, self.batch_size, 0, None)
        room = width * self.page_size
        bad_count = (lengths < 0) | (lengths > room)
        if _checks.is_concrete(bad_count) and np.any(bad_count):
            most = int(np.max(np.asarray(lengths)))
            raise RangeError(
                f"lengths must lie in [0, {room}], got {np.asarray(lengths).tolist()}: {most} tokens need "
                f"{-(-most // self.page_size)} columns of page_table, which has {width}."
            )
        lost = jnp.zeros_like(bad_count)
        if self.codec.rows is not None:
            lost = (lengths != 0) & (lengths != self.lengths)
            if _checks.is_concrete(lost) and np.any(lost):
                raise UnsupportedError(
                    f"{self.codec} keeps the last tokens of a row outside pages, so rows "
                    f"{np.nonzero(np.asarray(lost))[0].tolist()} cannot take over the tokens of others: start them at "
                    "0, or use a codec of single tokens."
                )
        status = bits.mark(bits.mark(self.status, bad_count, bits.BAD_COUNT), lost, bits.LOST)
        cache = dataclasses.replace(
            self, page_table=table, lengths=jnp.where(bad_count | lost, 0, lengths), status=status
        )
        return cache.vouched(jnp.zeros_like(lengths))[0]

    def vouched(
        self, num_new: Int32[Array, " B"], window: int | None = None
    ) -> tuple["PagedKVCache", Int32[Array, " B"]]:
        """Every page that holds a token or will take one must exist, and be no other's; see `Cache.vouched`."""
        unknown = self.pages_outside(num_new, 0, self.num_pages)
        bad = jnp.any(unknown, axis=1)
        if _checks.is_concrete(bad) and np.any(bad):
            row, column = np.argwhere(np.asarray(unknown))[0].tolist()
            raise RangeError(
                f"page_table names page {int(self.page_table[row, column])} for the tokens from "
                f"{column * self.page_size} on of row {row}; the pool has pages 0 to {self.num_pages - 1}."
            )
        if _checks.is_concrete(self.page_table, self.lengths, num_new):
            self._refuse_shared_writes(np.asarray(num_new), window)
        status = bits.mark(self.status, bad, bits.BAD_PAGE)
        return dataclasses.replace(self, status=status), jnp.where(bad, 0, num_new)

    def pages_outside(self, num_new: Int32[Array, " B"], first: Page, end: Page) -> Bool[Array, "B columns"]:
        """Entries that the tokens seen and new ones need, not in [first, end)."""
        used = -(-jnp.minimum(self.lengths + num_new, self.num_slots) // self.page_size)
        wanted = jnp.arange(self.max_pages, dtype=jnp.int32)[None] < used[:, None]
        return wanted & ((self.page_table < first) | (self.page_table >= end))

    def _refuse_shared_writes(self, num_new: Int32[np.ndarray, " B"], window: int | None) -> None:
        """Raises for a page that two columns of new tokens would go to, or that other columns read."""
        table, lengths = np.asarray(self.page_table), np.asarray(self.lengths, np.int64)[:, None]
        start = np.arange(self.max_pages, dtype=np.int64)[None] * self.page_size
        first = 0 if window is None else lengths - window + 1  # what the next query sees
        written = (start < lengths + num_new[:, None]) & (start + self.page_size > lengths) & (num_new[:, None] > 0)
        seen = (start < lengths) & (start + self.page_size > first)
        writer: dict[int, tuple[int, int]] = {}
        for row, column in np.argwhere(written).tolist():
            page = int(table[row, column])
            other, before = writer.setdefault(page, (row, column))
            if other != row:
                raise RangeError(
                    f"rows {other} and {row} would both write to page {page}: copy it for one of them first "
                    "(copy_pages)."
                )
            if before != column:
                raise RangeError(
                    f"row {row} names page {page} in columns {before} and {column} and would write to both: give each "
                    "a page of its own."
                )
        for row, column in np.argwhere(seen & ~written & np.isin(table, list(writer))).tolist():
            page = int(table[row, column])
            raise BlockStateError(
                f"row {writer[page][0]} would write to page {page}, where row {row} reads its tokens from "
                f"{column * self.page_size} on. Nothing was written. Copy the page first (copy_pages), and name the "
                f"copy in the table of row {writer[page][0]}."
            )

    def copy_pages(self, sources: ArrayLike | Sequence[int], targets: ArrayLike | Sequence[int]) -> "PagedKVCache":
        """Copies whole pages, scales included, before somebody writes to a shared one.

        Args:
            sources: int [M], pages; negative: nothing is copied.
            targets: int [M], where to; distinct.

        Raises:
            ShapeError, DTypeError: other than two vectors of integers of one length.
            RangeError: a page that is not in the pool; a target given twice. Under jit: not copied; one of its copies.
        """
        self = self.usable()
        sources, targets = _integers("sources", sources), _integers("targets", targets)
        if sources.ndim != 1 or sources.shape != targets.shape:
            raise ShapeError(
                f"sources and targets must be vectors of one length, got {sources.shape}, {targets.shape}."
            )
        skipped = sources < 0
        bad = ~skipped & ((sources >= self.num_pages) | (targets < 0) | (targets >= self.num_pages))
        if _checks.is_concrete(bad) and np.any(bad):
            raise RangeError(
                f"pages must lie in [0, {self.num_pages}), got copies {np.asarray(sources)[bad].tolist()} to "
                f"{np.asarray(targets)[bad].tolist()}."
            )
        if _checks.is_concrete(skipped, targets):
            pages, times = np.unique(np.asarray(targets)[~np.asarray(skipped)], return_counts=True)
            if np.any(times > 1):
                raise RangeError(
                    f"targets must be distinct, got {pages[times > 1].tolist()} more than once: which copy would stay "
                    "is not defined."
                )
        into = jnp.where(skipped | bad, self.num_pages, targets)
        return placed(_copied, shardings_of(self), self, sources, into)

    def select(self, rows: ArrayLike | Sequence[int]) -> "PagedKVCache":
        """The given rows, over the same pool: reorders, repeats or drops sequences.

        Repeated rows share their pages: copy the one that each will append to (`copy_pages`) and give them tables.

        Args:
            rows: int [B'], each in [0, B).

        Raises:
            RangeError: a row number out of range. Under jit: an empty row with its status bit set.
        """
        cache = self.usable()
        return placed(_selected, shardings_of(cache), cache, *known_rows(rows, cache.batch_size))

    def _sizes(self) -> dict[str, object]:
        return {"page_size": self.page_size, "head_dim": self.key_head_dim, "codec": self.codec}

    def _array_sizes(self) -> dict[str, object]:
        pool = self.keys["data"]
        sizes = {"num_pages": shown_size(pool, -3), "num_kv_heads": shown_size(pool, -4)}
        return {**sizes, "max_pages": shown_size(self.page_table, -1)}


def _selected(cache: PagedKVCache, rows: Int32[Array, " rows"], known: Bool[Array, " rows"]) -> PagedKVCache:
    """`select` of known rows; where `known` is False, an empty row."""
    cache = along("rows", lambda x, axis: jnp.take(x, rows, axis=axis, mode="clip"), cache, cache.axes)
    return cache.replace(
        page_table=jnp.where(known[:, None], cache.page_table, -1),
        lengths=jnp.where(known, cache.lengths, 0),
        status=jnp.where(known, cache.status, bits.BAD_COUNT),
    )


def _copied(cache: PagedKVCache, sources: Int32[Array, " M"], targets: Int32[Array, " M"]) -> PagedKVCache:
    """`copy_pages`; a target past the pool is dropped."""

    def copy(pool: Shaped[Array, "*pool"], axis: int) -> Shaped[Array, "*pool"]:
        into = (slice(None),) * axis + (targets,)
        return pool.at[into].set(jnp.take(pool, sources, axis=axis, mode="clip"), mode="drop")

    return along("pages", copy, cache, cache.axes)


def _dense(cache: PagedKVCache) -> tuple[Float[Array, "B K C H"], Float[Array, "B K C Hv"]]:
    """`dense`, wherever the arrays lie."""
    return cache.view().dense(cache.dtype)


def block_layout(page_size: int, max_pages: int, codec: Codec | None = None) -> Layout:
    """Blocks of whole pages; of one where the codec asks for its size."""
    alone = codec is not None and codec.rows is not None
    pages = 1 if alone else max(1, min(BLOCK_SLOTS // page_size, max_pages))
    return Layout(max_pages * page_size, pages * page_size, False)


def _integers(name: str, x: Any) -> Int32[Array, "..."]:
    """Any array of integers as int32."""
    x = x if hasattr(x, "dtype") else np.asarray(x)
    if x.size == 0:
        x = x.astype(np.int32)
    if not jnp.issubdtype(x.dtype, jnp.integer):
        raise DTypeError(f"{name} must hold integers, got {x.dtype}.")
    if x.size and _checks.is_concrete(x) and int(np.max(np.abs(np.asarray(x, np.float64)))) > _checks.INT32_MAX:
        raise RangeError(f"{name} must fit in int32, got {int(np.asarray(x).min())} to {int(np.asarray(x).max())}.")
    return jnp.asarray(x.astype(np.int32))
