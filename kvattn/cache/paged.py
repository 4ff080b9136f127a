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

from kvattn import _checks, _target
from kvattn._trees import portable, tell_flax
from kvattn._typing import Array, Encoded
from kvattn.cache import status as bits
from kvattn.cache.axes import along
from kvattn.cache.base import Cache, Page, known_rows, shown_size, storage_dtype, values_apart
from kvattn.cache.layout import Layout
from kvattn.cache.pages import Pages, block_layout, num_numbers, slots_of
from kvattn.cache.placed import beside, placed, shardings_of, where_it_lay
from kvattn.cache.shared import Level, Levels, cleared, fitting, levels_of
from kvattn.cache.writes import refuse_shared
from kvattn.codecs import Codec, Plain
from kvattn.codecs.base import Role
from kvattn.errors import ConfigError, RangeError, ShapeError, UnsupportedError
from kvattn.masks import Mask
from kvattn.policies import NOWHERE, Context, Full, Policy
from kvattn.policies.base import taken


@typing.no_type_check
@portable
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class PagedKVCache(Cache):
    """Keys and values of B sequences in pages of one pool.

    The policy says which slot a token gets, as in a `kvattn.KVCache`, and slot s of a sequence is row s % page_size of
    page ``page_table[b, s // page_size]``. So rings use their pages again, and a budget of tokens takes no more pages
    than it fills. Where key/value heads keep different numbers of tokens (`kvattn.FastGen`) each has a table of its
    own, ``page_table[b, k, s // page_size]``, and pages that one head has let go of can go to another
    (`kvattn.cache.pages`).

    Under a policy whose slots are in order (`kvattn.Full`) sequences may share pages (prefixes), as long as nobody
    writes to a shared page: copy it first (outside jit a step that would is refused).

    Donate it to a jitted step as `kvattn.KVCache`; a new table is not a new program.

    Make one with `PagedKVCache.create`, then give it tables with `with_tables`.

    Attributes:
        keys: encoded keys, pools [K, P, R, F] or [K, P, F, R] (`kvattn.cache.pages`).
        values: encoded values, likewise; none where they are in the keys (`values_in_keys`).
        page_table: entries of slots without a token mean nothing.
        lengths: tokens seen.
        state: what the policy remembers.
        status: sticky bits of `kvattn.cache.status`.
        policy: which tokens are kept.
        codec: how tokens are stored.
        page_size: R.
        key_head_dim: H.
        value_head_dim: Hv, head dim of the values.
        dtype: what the tokens were before they were encoded.
        shared: which rows read which pages together. None: each row by itself.
        platform: what it was made for, as it was said. None: for where it was made.
    """

    keys: Encoded
    values: Encoded
    page_table: Int32[Array, "B *K columns"]
    lengths: Int32[Array, " B"]
    state: PyTree
    status: Int32[Array, " B"]
    policy: Policy = dataclasses.field(metadata={"static": True})
    codec: Codec = dataclasses.field(metadata={"static": True})
    page_size: int = dataclasses.field(metadata={"static": True})
    key_head_dim: int = dataclasses.field(metadata={"static": True})
    value_head_dim: int = dataclasses.field(metadata={"static": True})
    dtype: np.dtype = dataclasses.field(metadata={"static": True})
    shared: Levels | None = None
    platform: str | None = dataclasses.field(default=None, metadata={"static": True})

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
        policy: Policy | None = None,
        codec: Codec | None = None,
        dtype: DTypeLike = jnp.bfloat16,
        value_head_dim: int | None = None,
        values_in_keys: bool = False,
        platform: str | None = None,
    ) -> "PagedKVCache":
        """An empty pool, and tables that name no page.

        Args:
            num_pages: P, pages of the pool, for the tokens of all heads.
            page_size: R, tokens per page.
            num_kv_heads: K.
            head_dim: H.
            batch_size: B, sequences in a step.
            max_pages: W, most pages that a sequence (or, with tables of their own, one of its heads) holds at once. A
                ring of C slots needs ceil(C / R); of more only that many are used.
            policy: which tokens are kept. None: `Full()`.
            codec: how tokens are stored. None: as they are, in `dtype`. A codec whose tokens share a scale (KIVI) needs
                pages as long as its residual.
            dtype: float32, bfloat16, float16 (float64 under x64): what is stored without a codec.
            value_head_dim: head dim of the values. None: H.
            values_in_keys: a token's value is the first `value_head_dim` numbers of its key and is stored once, as
                latent attention has it; steps then take ``value=None``.
            platform: what the cache is made for, wherever it is made: "cpu", "cuda", "rocm" or "tpu", as `jax.export`
                names them. It is kept, and steps choose their kernels when they are lowered. None: for where it is made
                (the current mesh, `jax.default_device`, the default backend).

        Raises:
            ConfigError: a size below its minimum, something that is no policy or codec, pages of another size than the
                codec needs, fewer than the policy's budget needs, values in keys that are shorter, an unknown platform.
            DTypeError: a size that is no int, a dtype that is not floating.
            RangeError: more pages than int32 counts.
            UnsupportedError: a policy and a codec that do not go together; a codec that stores keys and values
                differently, with `values_in_keys`.
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
        policy = Full() if policy is None else policy
        if not isinstance(policy, Policy):
            raise ConfigError(f"policy must be a policy such as kvattn.Full(), got {policy!r}.")
        if codec is not None and not isinstance(codec, Codec):
            raise ConfigError(f"codec must be a codec or None, got {codec!r}.")
        dtype = storage_dtype(dtype)
        codec = Plain(dtype) if codec is None else codec
        if codec.rows is not None and codec.rows != page_size:
            raise ConfigError(
                f"{codec} encodes {codec.rows} tokens together, a page holds {page_size}: give both the same size."
            )
        reason = codec.refuses(policy.in_order)
        if reason is not None:
            raise UnsupportedError(f"{codec} does not work with {policy}: {reason}")
        apart = values_apart(codec, head_dim, value_head_dim, values_in_keys)
        num_slots = slots_of(policy, page_size, max_pages)
        heads = (num_kv_heads,) if policy.is_uneven else ()
        table = jnp.full((batch_size, *heads, max_pages), -1, jnp.int32)
        if num_numbers(table, num_kv_heads, num_pages) > _checks.INT32_MAX:
            raise RangeError(
                f"num_pages must be at most {_checks.INT32_MAX // (1 + num_kv_heads)}, so that int32 counts the strips "
                f"of {num_kv_heads} heads, got {num_pages}."
            )
        layout, by_token = block_layout(page_size, max_pages, codec, num_slots), codec.rows is None
        store = Pages(layout, page_size, table, num_pages, by_token)
        with _target.aimed_at(_target.checked("platform", platform)):
            keys = codec.empty(store, "keys", batch_size, num_kv_heads, head_dim, dtype)
            values = codec.empty(store, "values", batch_size, num_kv_heads, value_head_dim, dtype) if apart else {}
        return cls(
            keys=keys,
            values=values,
            page_table=table,
            lengths=jnp.zeros((batch_size,), jnp.int32),
            state=policy.init(batch_size, num_kv_heads, num_slots),
            status=jnp.zeros((batch_size,), jnp.int32),
            policy=policy,
            codec=codec,
            page_size=page_size,
            key_head_dim=head_dim,
            value_head_dim=value_head_dim,
            dtype=dtype,
            platform=platform,
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
        """W, most pages of a sequence, or of one of its heads."""
        return self.page_table.shape[-1]

    @property
    def num_slots(self) -> int:
        """C, slots of a sequence."""
        return slots_of(self.policy, self.page_size, self.max_pages)

    @property
    def axes(self) -> "PagedKVCache":
        """As `Cache.axes`, with the table's."""
        heads = "heads " if self.policy.is_uneven else ""
        spans: dict[str, Any] = {"members": "spans members", "begin": "spans", "end": "spans"}
        shared = None if self.shared is None else tuple(Level(**spans) for _ in self.shared)
        return dataclasses.replace(super().axes, page_table=f"rows {heads}columns", shared=shared)

    @property
    def layout(self) -> Layout:
        """Slots and blocks of one sequence."""
        return block_layout(self.page_size, self.max_pages, self.codec, self.num_slots)

    @property
    def store(self) -> Pages:
        """Where the arrays have their slots."""
        return Pages(self.layout, self.page_size, self.page_table, self.num_pages, self.codec.rows is None)

    @property
    def live(self) -> Bool[Array, "B *K columns"]:
        """Which entries of the table name pages that hold a kept token. The pages of the others are free to go.

        But those that the next tokens go to: they take the first free slots. Of heads with a table each this is told
        head by head, most useful after `compact`.
        """
        return self._columns(self.positions >= 0)

    def _columns(self, slots: Bool[Array, "B *K C"]) -> Bool[Array, "B *K columns"]:
        """The entries of the table to which any of these slots belongs."""
        if slots.ndim > self.page_table.ndim:
            slots = jnp.any(slots, axis=1)
        room = self.max_pages * self.page_size - slots.shape[-1]
        slots = jnp.pad(slots, [(0, 0)] * (slots.ndim - 1) + [(0, room)])
        slots = jnp.broadcast_to(
            slots if slots.ndim == self.page_table.ndim else slots[:, None],
            (*self.page_table.shape[:-1], slots.shape[-1]),
        )
        return jnp.any(slots.reshape(*slots.shape[:-1], self.max_pages, self.page_size), axis=-1)

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
        self,
        page_table: ArrayLike | Sequence[Any],
        lengths: ArrayLike | Sequence[int],
        shared: Sequence[Any] | None = None,
    ) -> "PagedKVCache":
        """The same pool under other tables: what the host decided.

        Args:
            page_table: int [B, W], W <= max_pages: the pages of each sequence, in order. Where heads keep different
                numbers of tokens int [B, K, W] (`kvattn.cache.pages`); there [B, W] gives each head its strip of these
                pages. Entries of slots without a token mean nothing, but those that the next tokens will go to must be
                there when they come.
            lengths: int [B]: tokens seen of each sequence, of which those that the policy keeps lie in those pages.
            shared: which rows read which pages together: levels (members int [spans, members], begin int [spans], end
                int [spans]) as `kvattn.serving.shared_prefixes` finds them, or `kvattn.cache.Level`. It holds until
                tables are given again; None: each row reads by itself.

        Raises:
            ShapeError: another shape.
            DTypeError: not integers.
            RangeError: a negative length, more tokens than the table has room for, a page that is not in the pool.
                Under jit: status bits, and 0 tokens for such a row. `shared` that contradicts the tables. Under jit:
                status bits for the rows that do, which read by themselves.
            UnsupportedError: a row that would hold other tokens than it did, neither as many nor none, where a policy
                remembers its tokens (those that go by attention do) or a codec keeps the last ones outside pages
                (KIVI). Under jit: likewise. `shared` for a cache that is not one that `shares_prefixes`.
        """
        self = self.usable()
        table = jnp.asarray(_checks.int32("page_table", page_table))
        shape = self.page_table.shape
        if table.ndim == 2 and len(shape) == 3 and table.shape[0] == shape[0]:
            table = jnp.broadcast_to(table[:, None], (*shape[:2], table.shape[1]))
        if table.ndim != len(shape) or table.shape[:-1] != shape[:-1] or table.shape[-1] > shape[-1]:
            axes = "[B, K, W]" if len(shape) == 3 else "[B, W]"
            expected = ", ".join(map(str, shape[:-1]))
            raise ShapeError(f"page_table must be {axes} = ({expected}, at most {shape[-1]}), got {table.shape}.")
        width = table.shape[-1]
        table = jnp.pad(table, [(0, 0)] * (table.ndim - 1) + [(0, shape[-1] - width)], constant_values=-1)
        lengths = _checks.counts("lengths", lengths, self.batch_size, 0, None)
        remembers = self.codec.rows is not None or bool(jax.tree.leaves(self.state))
        other = (lengths != 0) & (lengths != self.lengths) & remembers
        bad_count = self._beyond(lengths, width) & ~other
        if _checks.is_concrete(other) and np.any(other):
            rows = np.nonzero(np.asarray(other))[0].tolist()
            who, what = (self.policy, "remembers what lies in the slots of a row")
            if not jax.tree.leaves(self.state):
                who, what = self.codec, "keeps the last tokens of a row outside pages"
            raise UnsupportedError(
                f"{who} {what}, so rows {rows} cannot take over the tokens of others: start them at 0, or copy a row "
                "with cache.select."
            )
        status = bits.mark(bits.mark(self.status, bad_count, bits.BAD_COUNT), other, bits.LOST)
        lengths = jnp.where(bad_count | other, 0, lengths)
        state = self.forgotten(lengths == 0, self.state)
        # A copy: caches of several layers may be given one table, and each is to be donated.
        table = where_it_lay(self.page_table, jnp.array(table, copy=True))
        cache = dataclasses.replace(self, page_table=table, lengths=lengths, state=state, status=status, shared=None)
        step = Context(lengths, jnp.zeros_like(lengths), 0, self.num_slots)
        cache = cache if shared is None else cache._sharing(shared, step)
        return cache.vouched(step, self.policy.mask())[0]

    def _sharing(self, shared: Sequence[Any], step: Context) -> "PagedKVCache":
        """The cache whose rows read these spans together."""
        if not self.shares_prefixes:
            raise UnsupportedError(
                f"rows do not share pages under {self.policy} with {self.codec}, which need slots in order, a rule of "
                "distances alone, and tokens encoded one by one: leave shared out."
            )
        needed = self._columns(self.policy.needed(self.state, step))
        levels, bad = fitting(levels_of(shared), self.page_table, needed, self.lengths // self.page_size)
        # Copies, as of the table.
        levels = jax.tree.map(lambda x: beside(self.page_table, jnp.array(x, copy=True)), levels)
        return dataclasses.replace(self, shared=levels, status=bits.mark(self.status, bad, bits.BAD_SPAN))

    def _beyond(self, lengths: Int32[Array, " B"], width: int) -> Bool[Array, " B"]:
        """Rows that cannot have so many tokens in `width` columns; an error if they can be seen."""
        room, nobody = width * self.page_size, jnp.zeros_like(lengths)
        most = Context(nobody, jnp.maximum(lengths, 0), 0, self.num_slots)
        fits = self.policy.fits(self.forgotten(jnp.ones_like(lengths, bool), self.state), most)
        used = nobody if jax.tree.leaves(self.state) else jnp.minimum(lengths, self.num_slots)
        bad = (lengths < 0) | ~fits | (used > room)
        if _checks.is_concrete(bad) and np.any(bad):
            longest = int(np.max(np.asarray(lengths)))
            raise RangeError(
                f"lengths must lie in [0, {room}], got {np.asarray(lengths).tolist()}: {longest} tokens need "
                f"{-(-longest // self.page_size)} columns of page_table, which has {width}."
            )
        return bad

    def vouched(self, step: Context, mask: Mask, *, writes: bool = True) -> tuple["PagedKVCache", Bool[Array, " B"]]:
        """Every page that holds a token or will take one must exist, and be no other's; see `Cache.vouched`."""
        numbers = num_numbers(self.page_table, self.num_kv_heads, self.num_pages)
        unknown = self.pages_outside(step, 0, numbers)
        bad = jnp.any(unknown, axis=tuple(range(1, unknown.ndim)))
        if _checks.is_concrete(bad) and np.any(bad):
            entry = tuple(np.argwhere(np.asarray(unknown))[0].tolist())
            head = f", head {entry[1]}" if len(entry) == 3 else ""
            raise RangeError(
                f"page_table names page {int(self.page_table[entry])} for the tokens from "
                f"{entry[-1] * self.page_size} on of row {entry[0]}{head}; the pool has pages 0 to {numbers - 1}."
            )
        if writes and _checks.is_concrete(self.page_table, step.lengths, step.num_new, *jax.tree.leaves(self.state)):
            self._refuse_shared_writes(step, mask)
        status = bits.mark(self.status, bad, bits.BAD_PAGE)
        return dataclasses.replace(self, status=status), bad

    def pages_outside(self, step: Context, first: Page, end: Page) -> Bool[Array, "B *K columns"]:
        """Entries that the tokens kept and new ones need, not in [first, end)."""
        needed = self._columns(self.policy.needed(self.state, step))
        return needed & ((self.page_table < first) | (self.page_table >= end))

    def _refuse_shared_writes(self, step: Context, mask: Mask) -> None:
        """Raises for a page that new tokens would go to and another entry holds."""
        if not np.any(step.num_new):
            return
        policy, next_one = self.policy, step.lengths.reshape(-1, *(1,) * (self.positions.ndim - 1))
        slots = policy.needed(self.state, step)
        if not (policy.needs_mass and step.num_tokens > 1):  # else any slot may be given to another token
            slots = taken(policy.place(self.state, step), self.num_slots)
        comes = (step.num_new > 0).reshape(-1, *(1,) * (slots.ndim - 1))
        seen = mask.between(self.positions, next_one, next_one)
        pages = np.asarray(self.page_table)
        if pages.ndim == 3:
            heads = self.num_pages * np.arange(self.num_kv_heads)[None, :, None]
            pages = np.where(pages < self.num_pages, self.num_pages + heads + pages, pages)
        written, seen = (np.asarray(self._columns(x)) for x in (slots & comes, seen))
        refuse_shared(pages, written, seen, self.page_size)

    def compact(self) -> "PagedKVCache":
        """Moves the tokens of heads that keep different numbers to their first slots, so that they fill whole pages.

        Then a head that keeps n tokens has them in its first ceil(n / page_size) pages, which is what `live` says, and
        the pages behind can go back; the next token wants the page of slot n. Nothing that is computed depends on it.
        Other policies leave no gaps, so there is nothing to move.
        """
        self = self.usable()
        return placed(_compacted, shardings_of(self), self) if self.policy.is_uneven else self

    def copy_pages(self, sources: ArrayLike | Sequence[int], targets: ArrayLike | Sequence[int]) -> "PagedKVCache":
        """Copies whole pages, scales included, before somebody writes to a shared one.

        Args:
            sources: int [M], pages; negative: nothing is copied. Where heads have tables of their own a number below
                `num_pages` is a page with the strips of all heads, others are one head's.
            targets: int [M], where to; distinct, and of the same kind.

        Raises:
            ShapeError, DTypeError: other than two vectors of integers of one length.
            RangeError: a page that is not in the pool; a target given twice. Under jit: not copied; one of its copies.
        """
        self = self.usable()
        sources, targets = (jnp.asarray(_checks.int32(*x)) for x in (("sources", sources), ("targets", targets)))
        if sources.ndim != 1 or sources.shape != targets.shape:
            raise ShapeError(
                f"sources and targets must be vectors of one length, got {sources.shape}, {targets.shape}."
            )
        skipped = sources < 0
        numbers = num_numbers(self.page_table, self.num_kv_heads, self.num_pages)
        bad = ~skipped & ((sources >= numbers) | (targets < 0) | (targets >= numbers))
        bad |= ~skipped & ((sources < self.num_pages) != (targets < self.num_pages))
        if _checks.is_concrete(bad) and np.any(bad):
            raise RangeError(
                f"pages must lie in [0, {numbers}), got copies {np.asarray(sources)[bad].tolist()} to "
                f"{np.asarray(targets)[bad].tolist()}."
            )
        if _checks.is_concrete(skipped, targets):
            pages, times = np.unique(np.asarray(targets)[~np.asarray(skipped)], return_counts=True)
            if np.any(times > 1):
                raise RangeError(
                    f"targets must be distinct, got {pages[times > 1].tolist()} more than once: which copy would stay "
                    "is not defined."
                )
        into = jnp.where(skipped | bad, numbers, targets)
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
        sizes = {"page_size": self.page_size, "head_dim": self.key_head_dim}
        return {**sizes, "policy": self.policy, "codec": self.codec}

    def _array_sizes(self) -> dict[str, object]:
        pool = self.keys["data"]
        sizes = {"num_pages": shown_size(pool, -3), "num_kv_heads": shown_size(pool, -4)}
        return {**sizes, "max_pages": shown_size(self.page_table, -1)}


def _selected(cache: PagedKVCache, rows: Int32[Array, " rows"], known: Bool[Array, " rows"]) -> PagedKVCache:
    """`select` of known rows; where `known` is False, an empty row."""
    cache = along("rows", lambda x, axis: jnp.take(x, rows, axis=axis, mode="clip"), cache, cache.axes)
    return cache.replace(
        page_table=jnp.where(known.reshape(-1, *(1,) * (cache.page_table.ndim - 1)), cache.page_table, -1),
        lengths=jnp.where(known, cache.lengths, 0),
        state=cache.forgotten(~known, cache.state),
        status=jnp.where(known, cache.status, bits.BAD_COUNT),
        shared=cleared(cache.shared),
    )


def _copied(cache: PagedKVCache, sources: Int32[Array, " M"], targets: Int32[Array, " M"]) -> PagedKVCache:
    """`copy_pages`; a target past the numbers of pages is dropped."""
    if cache.page_table.ndim == 3:
        return cache.replace(
            keys={n: cache.store.copied(x, sources, targets) for n, x in cache.keys.items()},
            values={n: cache.store.copied(x, sources, targets) for n, x in cache.values.items()},
        )

    def copy(pool: Shaped[Array, "*pool"], axis: int) -> Shaped[Array, "*pool"]:
        into = (slice(None),) * axis + (targets,)
        return pool.at[into].set(jnp.take(pool, sources, axis=axis, mode="clip"), mode="drop")

    return along("pages", copy, cache, cache.axes)


def _compacted(cache: PagedKVCache) -> PagedKVCache:
    """`compact`, of a policy whose heads keep different numbers of tokens."""
    there = cache.positions >= 0
    slot = jnp.arange(cache.num_slots, dtype=jnp.int32)[None, None]
    order = jnp.argsort(~there, axis=-1, stable=True).astype(jnp.int32)
    moves = (slot < jnp.sum(there, axis=-1, keepdims=True)) & (order != slot)
    slots = jnp.where(moves, slot, NOWHERE)

    def moved(role: Role, arrays: Encoded) -> Encoded:
        lie = {name: cache.codec.transposed(cache.store, role, name) for name in arrays}
        tokens = {name: cache.store.from_blocks(x, lie[name]) for name, x in arrays.items()}
        tokens = {name: jnp.take_along_axis(x, order[..., None], axis=2) for name, x in tokens.items()}
        return {name: cache.store.write(x, slots, tokens[name], lie[name]) for name, x in arrays.items()}

    return cache.replace(
        keys=moved("keys", cache.keys),
        values=moved("values", cache.values),
        state=cache.policy.moved(cache.state, order),
    )


def _dense(cache: PagedKVCache) -> tuple[Float[Array, "B K C H"], Float[Array, "B K C Hv"]]:
    """`dense`, wherever the arrays lie."""
    return cache.view().dense(cache.dtype)
