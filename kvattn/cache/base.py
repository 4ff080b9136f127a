"""What contiguous and paged caches have in common: everything that does not depend on where slots lie."""

import dataclasses
import warnings
from collections.abc import Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Bool, Float, Int32, PyTree, Shaped

from kvattn import _checks, _target
from kvattn._trees import Tree, array_fields
from kvattn._typing import Array, Encoded
from kvattn.cache import status as bits
from kvattn.cache.axes import axis_of
from kvattn.cache.host import to_device, to_host
from kvattn.cache.layout import Layout
from kvattn.cache.pages import Store
from kvattn.cache.shared import Levels
from kvattn.cache.view import View, block_positions
from kvattn.codecs import Codec
from kvattn.codecs.blocks import Blocks
from kvattn.errors import CapacityError, ConfigError, DTypeError, RangeError, ShapeError, UnsupportedError
from kvattn.masks import Mask
from kvattn.policies import Context, Policy

_WARNED: set[str] = set()
"""What `Cache.check` has warned of."""

Page = int | Int32[ArrayLike, "..."]
"""The number of a page; or one of each row, [B, 1] or [B, 1, 1]."""


class Cache(Tree):
    """Base of `kvattn.KVCache` and `kvattn.PagedKVCache`, which are dataclasses with these fields and more.

    Caches are equal if their settings are and they hold the same array objects; numbers are not looked at.
    """

    keys: Encoded
    values: Encoded
    lengths: Int32[Array, " B"]
    status: Int32[Array, " B"]
    policy: Policy
    codec: Codec
    state: PyTree
    key_head_dim: int
    value_head_dim: int
    dtype: DTypeLike
    is_static: bool
    layout: Layout
    page_table: Int32[Array, "B *K columns"] | None
    page_size: int
    shared: Levels | None
    platform: str | None

    def usable(self) -> Self:
        """This cache, with its arrays where it has them: one that came back from the host holds NumPy's.

        Raises:
            StaleCacheError: it was donated.
            DTypeError: a tree of something else than arrays, such as `kvattn.sharding.cache_sharding` returns.
        """
        self._refuse_other_trees()
        leaves, tree = jax.tree.flatten(self)
        if not self.layout.on_host:
            there = leaves if all(isinstance(x, jax.Array) for x in leaves) else [jnp.asarray(x) for x in leaves]
        else:
            are_slots = [axis_of("blocks", axes) is not None for axes in jax.tree.leaves(self.axes)]
            put = lambda x, on_host: to_host(x) if on_host else to_device(jnp.asarray(x))
            there = [put(x, on_host) for x, on_host in zip(leaves, are_slots, strict=True)]
        return self if all(a is b for a, b in zip(there, leaves, strict=True)) else jax.tree.unflatten(tree, there)

    def _refuse_other_trees(self) -> None:
        """Raises what `usable` does."""
        _checks.not_donated("this cache", self)
        for x in jax.tree.leaves(self):
            if not (isinstance(x, jax.Array | np.ndarray | np.generic) or hasattr(x, "__jax_array__")):
                raise DTypeError(
                    f"this {type(self).__name__} holds {type(x).__name__} where a cache has arrays: it describes a "
                    "cache and is none. Use the cache that it was made from."
                )

    def _sizes(self) -> dict[str, object]:
        """Settings that `repr` shows."""
        raise NotImplementedError

    def _array_sizes(self) -> dict[str, object]:
        """Sizes that `repr` reads from the arrays."""
        raise NotImplementedError

    def __repr__(self) -> str:
        """Sizes and settings; of a tree of something else than arrays, what it holds."""
        leaves = jax.tree.leaves(self)
        if leaves and all(hasattr(x, "shape") and hasattr(x, "dtype") for x in leaves):
            shown = {**self._array_sizes(), **self._sizes()}
        else:
            shown = {**self._sizes(), **{name: getattr(self, name) for name in array_fields(self)}}
        return f"{type(self).__name__}({', '.join(f'{name}={value}' for name, value in shown.items())})"

    def replace(self, **changes: Any) -> Self:
        """The same cache with other fields."""
        return dataclasses.replace(self, **changes)  # pyright: ignore[reportArgumentType]

    @property
    def batch_size(self) -> int:
        """B."""
        return self.lengths.shape[0]

    @property
    def num_kv_heads(self) -> int:
        """K."""
        raise NotImplementedError

    @property
    def values_in_keys(self) -> bool:
        """Whether a token's value is the first numbers of its key, and is stored with it."""
        return not self.values

    @property
    def num_slots(self) -> int:
        """C, slots of a sequence."""
        raise NotImplementedError

    @property
    def num_pages(self) -> int:
        """P, pages of its pool; 0: it has none."""
        return 0

    @property
    def shares_prefixes(self) -> bool:
        """Whether rows may share pages and read them together: what is in them must not depend on what came later."""
        mask = self.policy.mask()
        alone = self.policy.needs_mass or self.codec.rows is not None or bool(jax.tree.leaves(self.state))
        # Seen from behind a span every token has another number; distances stay.
        return self.page_table is not None and self.policy.in_order and not alone and mask == Mask(window=mask.window)

    @property
    def store(self) -> Store:
        """Where the arrays have their slots: a `Layout` or `Pages`."""
        raise NotImplementedError

    def view(self, positions: Int32[Array, "B *K C"] | None = None, *, held: bool = False) -> View:
        """The slots as an implementation of attention reads them.

        Args:
            positions: where the token of each slot is seen, -1 for empty slots. None: at its own position.
            held: those that hold what only an earlier token than the last one sees are not empty (`Policy.held`).
        """
        cache = self.usable()
        find = cache.policy.held if held else cache.policy.positions
        seen_at = find(cache.state, cache.lengths, cache.num_slots) if positions is None else positions
        return View(
            keys=cache.keys,
            values=cache.values,
            positions=block_positions(cache.layout, seen_at),
            counts=jnp.minimum(cache.lengths, cache.num_slots),
            layout=cache.layout,
            codec=cache.codec,
            key_head_dim=cache.key_head_dim,
            value_head_dim=cache.value_head_dim,
            page_table=cache.page_table,
            page_size=cache.page_size,
            in_order=positions is None and cache.policy.in_order,
            seen=cache.lengths if positions is None and cache.policy.turns and not held else None,
            platform=cache.platform,
        )

    @property
    def axes(self) -> Self:
        """The names of every array's axes: this cache's tree with strings (`kvattn.cache.axes`)."""
        store, codec, per_head = self.store, self.codec, self.policy.per_head
        changes: dict[str, Any] = {
            "keys": {name: codec.axes(store, "keys", name) for name in self.keys},
            "values": {name: codec.axes(store, "values", name) for name in self.values},
            "lengths": "rows",
            "status": "rows",
            "state": jax.tree.map(lambda x: "rows heads" if per_head and len(x.shape) > 1 else "rows", self.state),
        }
        return self.replace(**changes)

    @property
    def positions(self) -> Int32[Array, "B *K C"]:
        """The position in each slot, -1 if empty; head by head where these keep different tokens."""
        cache = self.usable()
        return cache.policy.positions(cache.state, cache.lengths, cache.num_slots)

    @property
    def kept(self) -> Int32[Array, "B *K"]:
        """Tokens kept."""
        cache = self.usable()
        return cache.policy.kept(cache.state, cache.lengths, cache.num_slots)

    @property
    def nbytes(self) -> int:
        """Bytes of all its arrays, as the device stores them (two 4-bit numbers to a byte)."""
        return sum(nbytes_of(leaf) for leaf in jax.tree.leaves(self))

    def dense(self) -> tuple[Float[Array, "B K C H"], Float[Array, "B K C Hv"]]:
        """Decoded keys and values, slot by slot. For looking at, not for decoding."""
        return self.view().dense(self.dtype)

    # What a step does with it.

    def write(
        self,
        slots: Int32[Array, "B *K T"],
        key: Float[Array, "B T K H"],
        value: Float[Array, "B T K Hv"] | None,
        store: Blocks | None = None,
    ) -> Self:
        """Encodes tokens and stores them; lengths and state stay.

        Args:
            slots: negative: not stored.
            key: the keys.
            value: the values; None where they are in the keys.
            store: writes the arrays. None: `self.store`.

        Raises:
            RangeError: numbers that cannot be stored: NaN or infinite where a codec encodes them, or too large for the
                dtype. Under jit: status bit; the token reads as NaN or infinite.
        """
        codec, store = self.codec, self.store if store is None else store
        key, value = key.swapaxes(1, 2), None if value is None else value.swapaxes(1, 2)
        with _target.aimed_at(self.platform):
            keys = codec.write(self.keys, store, "keys", slots, key)
            values = {} if value is None else codec.write(self.values, store, "values", slots, value)
        return self.replace(
            keys=keys,
            values=values,
            status=bits.mark(self.status, self.unfit(slots, key, value), bits.NONFINITE),
        )

    def unfit(
        self, slots: Int32[Array, "B *K T"], key: Float[Array, "B K T H"], value: Float[Array, "B K T Hv"] | None
    ) -> Bool[Array, " B"]:
        """Rows with tokens that cannot be stored; an error if they can be seen."""
        new = [key] if value is None else [key, value]
        unfit = [x for x in (self.codec.unfit(tokens, self.dtype) for tokens in new) if x is not None]
        stored = (slots[:, None] if slots.ndim == 2 else slots) >= 0
        rows = jnp.zeros((key.shape[0],), bool)
        for x in unfit:
            rows |= jnp.any(x & stored, axis=(1, 2))
        if unfit and _checks.is_concrete(rows) and np.any(rows):
            raise RangeError(
                f"rows {np.nonzero(np.asarray(rows))[0].tolist()} have keys or values "
                f"{self.codec.refusal(self.dtype)}. Nothing was written. Look for what made them so, or give the cache "
                "a dtype and codec that hold them."
            )
        return rows

    def vouched(self, step: Context, mask: Mask, *, writes: bool = True) -> tuple[Self, Bool[Array, " B"]]:
        """Checks where tokens lie and new ones would go. Returns the cache, and the rows where that is nowhere.

        Args:
            step: what is to be appended.
            mask: who may attend to whom.
            writes: whether it is; else its tokens are there already.

        Raises:
            RangeError: a page that does not exist. Under jit: status bit, and the row is told. A page that two rows
                would write to, or one row twice. Under jit nobody looks.
            BlockStateError: a page that one row would write to and another reads. Under jit nobody looks.
        """
        del mask, writes
        return self, jnp.zeros_like(step.num_new, bool)

    def advance(self, num_new: Int32[Array, " B"], too_many: Bool[Array, " B"], bad_count: Bool[Array, " B"]) -> Self:
        """The cache with `num_new` more tokens seen per row, and refusals recorded."""
        status = bits.mark(bits.mark(self.status, too_many, bits.OVERFLOW), bad_count, bits.BAD_COUNT)
        return self.replace(lengths=self.lengths + num_new, status=status)

    def pages_outside(self, step: Context, first: Page, end: Page) -> Bool[Array, "B *K columns"]:
        """Entries of the page table, outside [first, end), that old or new tokens need."""
        raise NotImplementedError

    def refuse_overflow(self, fits: Bool[Array, " B"], num_new: Int32[Array, " B"]) -> None:
        """Raises `CapacityError` for rows that can be seen not to fit."""
        if _checks.is_concrete(fits) and not np.all(fits):
            rows = np.nonzero(~_checks.on_host(fits))[0]
            raise CapacityError(
                f"rows {rows.tolist()} of the cache hold {_checks.on_host(self.lengths)[rows].tolist()} tokens of "
                f"{self.num_slots}; {_checks.on_host(num_new)[rows].tolist()} more do not fit. "
                f"Nothing was written. {self._advice}"
            )

    _advice = "Create the cache with a larger capacity, or with a policy that lets tokens go."

    # What a user does with it.

    def check(self) -> Self:
        """Raises what a jitted step could only record; returns the cache if all is well.

        In a program of several processes, all of them must call it. Warns once of a cache that lies on another platform
        than the one that it is laid out for, and says what that costs.

        Raises:
            CapacityError: an append did not fit.
            RangeError: a count or row number was out of range, or a value was not finite, or too large, for the cache.
            UnsupportedError: a trim reached back too far.
            StaleCacheError: the cache was donated.
            DTypeError: a tree of something else than arrays.
        """
        self._refuse_other_trees()
        bits.raise_for(self.status)
        if (cost := self._cost_of_moving()) is not None and cost not in _WARNED:
            _WARNED.add(cost)
            warnings.warn(cost, stacklevel=2)
        return self

    def _cost_of_moving(self) -> str | None:
        """What it costs that this cache lies on another platform than the one it was made for; None: it does not."""
        target = _target.of_arrays(self.keys) if _checks.is_concrete(self.keys) else None
        blocks = self.layout.num_blocks > 1 or self.layout.transposed_keys
        in_blocks = self.page_table is None and blocks and self.codec.rows is None and not self.layout.on_host
        made = self.platform or ("cpu" if in_blocks else None)
        if target is None or made is None or _target.family(made) == _target.family(target.platform):
            return None
        if in_blocks:
            cost = 'no kernel reads slots in blocks, so attention is by "xla"'
        elif target.platform == "cpu" and self.page_table is None:
            cost = "its slots lie in one block, so a step reads all of them, also those that hold nothing"
        else:
            cost = "kernels may want pages or numbers of slots of another size there"
        return (
            f"this {type(self).__name__} was made for {made!r} and lies on {target.platform!r}. It works, but {cost}. "
            f"Make one with platform={target.platform!r} and move the tokens over, where that counts."
        )

    def trim(self, num_tokens: ArrayLike | Sequence[int]) -> Self:
        """Takes back the last tokens, as if they had never come (speculative decoding).

        Args:
            num_tokens: int, or int32 [B]; 0 <= num_tokens <= lengths.

        Raises:
            RangeError: outside that range. Under jit: status bit, row unchanged.
            UnsupportedError: the policy has let go of tokens that would be needed again. Under jit: likewise.
        """
        self = self._mutable("trim")
        num_tokens = _checks.counts("num_tokens", num_tokens, self.batch_size, 0, None)
        in_range = (num_tokens >= 0) & (num_tokens <= self.lengths)
        there = self.policy.can_trim(self.state, self.lengths, num_tokens, self.num_slots)
        encoded = self.codec.can_trim(self.lengths, num_tokens)
        if _checks.is_concrete(in_range, there, encoded):
            if not np.all(in_range):
                raise RangeError(
                    f"cannot trim {np.asarray(num_tokens).tolist()} tokens of sequences of lengths "
                    f"{np.asarray(self.lengths).tolist()}."
                )
            if not np.all(there):
                raise UnsupportedError(
                    f"{self.policy} has let go of tokens that would be needed again: rows "
                    f"{np.nonzero(~np.asarray(there))[0].tolist()}. Trim before the cache is full, or use Full()."
                )
            if not np.all(encoded):
                raise UnsupportedError(
                    f"{self.codec} has encoded tokens for good that would be needed as they were: rows "
                    f"{np.nonzero(~np.asarray(encoded))[0].tolist()}. Trim less, or use another codec."
                )
        there = there & encoded
        status = bits.mark(self.status, ~in_range, bits.BAD_COUNT)
        status = bits.mark(status, in_range & ~there, bits.LOST)
        num_tokens = jnp.where(in_range & there, num_tokens, 0)
        state = self.policy.trim(self.state, self.lengths, num_tokens, self.num_slots)
        return self.replace(lengths=self.lengths - num_tokens, state=state, status=status)

    def reset(self, rows: ArrayLike | Sequence[bool] | None = None) -> Self:
        """Forgets sequences, so that their rows can take new ones. `rows`: bool [B]; None: all."""
        self = self._mutable("reset")
        rows = jnp.ones((self.batch_size,), bool) if rows is None else jnp.asarray(rows)
        if rows.dtype != bool or rows.shape != (self.batch_size,):
            raise ShapeError(f"rows must be bool [{self.batch_size}], got {rows.dtype} {rows.shape}.")
        return self.replace(
            lengths=jnp.where(rows, 0, self.lengths),
            state=self.forgotten(rows, self.state),
            status=jnp.where(rows, 0, self.status),
        )

    def forgotten(self, rows: Bool[Array, " B"], state: PyTree) -> PyTree:
        """The state with `rows` as new."""

        def pick(new: Shaped[Array, "B *rest"], old: Shaped[Array, "B *rest"]) -> Shaped[Array, "B *rest"]:
            return jnp.where(rows.reshape(rows.shape + (1,) * (old.ndim - 1)), new, old)

        fresh = self.policy.init(rows.shape[0], self.num_kv_heads, self.num_slots)
        return jax.tree.map(pick, fresh, state)

    def _mutable(self, verb: str) -> Self:
        if self.is_static:
            raise UnsupportedError(f"cannot {verb} a static cache: it holds the keys and values of an encoder.")
        return self.usable()


def values_apart(codec: Codec, head_dim: int, value_head_dim: int, values_in_keys: object) -> bool:
    """Whether a cache stores values of their own: with `values_in_keys`, checked here, they are read from its keys.

    Raises:
        DTypeError: `values_in_keys` is no bool.
        ConfigError: values that are longer than keys.
        UnsupportedError: a codec that stores the two differently.
    """
    _checks.flag("values_in_keys", values_in_keys)
    if values_in_keys and value_head_dim > head_dim:
        raise ConfigError(
            f"values_in_keys=True: values are the first numbers of their keys, so value_head_dim ({value_head_dim}) "
            f"must be at most head_dim ({head_dim})."
        )
    if values_in_keys and not codec.stores_alike:
        raise UnsupportedError(
            f"{codec} stores keys and values differently, so values cannot be read from keys (values_in_keys=True): "
            "use a codec that stores them alike, such as kvattn.Int8() or kvattn.Int4()."
        )
    return not values_in_keys


def shown_size(x: Any, axis: int) -> Any:
    """An axis from the end, for `repr`; "?" where there is none, as in a tree of one number per array."""
    return x.shape[axis] if len(x.shape) >= -axis else "?"


def known_rows(rows: Any, batch_size: int) -> tuple[Int32[Array, " rows"], Bool[Array, " rows"]]:
    """Checks row numbers for `select`: these, 0 for unknown ones, and which are known."""
    dtype = getattr(rows, "dtype", None)
    rows = rows if dtype is not None else np.asarray(rows)
    if rows.size == 0:
        rows = rows.astype(np.int32)
    if not jnp.issubdtype(rows.dtype, jnp.integer):
        raise DTypeError(f"rows must hold integers, got {rows.dtype}.")
    if rows.ndim != 1:
        raise ShapeError(f"rows must be a vector of row numbers, got shape {rows.shape}.")
    if _checks.is_concrete(rows):
        values = np.asarray(rows)
        if values.size and (values.min() < 0 or values.max() >= batch_size):
            raise RangeError(f"rows must lie in [0, {batch_size}), got {values.tolist()}.")
    rows = jnp.asarray(rows, jnp.int32)
    known = (rows >= 0) & (rows < batch_size)
    rows = jnp.where(known, rows, 0)
    return rows, known


def storage_dtype(dtype: object) -> np.dtype:
    """Checks what tokens are stored in without a codec."""
    return jax.dtypes.canonicalize_dtype(_checks.inexact("dtype", dtype, complex=False, bits=16))


def nbytes_of(leaf: Any) -> int:
    """Bytes of an array as devices store it; 4-bit types lie two to a byte."""
    number = jnp.issubdtype(leaf.dtype, jnp.integer)
    width = jnp.iinfo(leaf.dtype).bits if number else leaf.dtype.itemsize * 8
    return -(-int(np.prod(leaf.shape)) * width // 8)
