"""`KVCache`: a contiguous cache of fixed size, as a pytree.

It says what is stored and where. Which tokens stay is the policy's business, in how many bits the
codec's, who reads it `kvattn.attend`'s.
"""

import dataclasses
import typing
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kvattn import _checks
from kvattn._typing import Array, Encoded
from kvattn.cache import status as bits
from kvattn.cache.layout import Layout
from kvattn.cache.view import View, block_positions
from kvattn.codecs import Codec, Plain
from kvattn.errors import CapacityError, ConfigError, DTypeError, RangeError, ShapeError, UnsupportedError
from kvattn.policies import Full, Policy
from kvattn.policies.base import NOWHERE


@typing.no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of B sequences in C slots each.

    A cache is a value: every operation returns a new one. Donate the old one to a jitted step
    (``jax.jit(step, donate_argnames="cache")``) and it is updated in place.

    Make one with `KVCache.create`, `KVCache.from_encoder`, or a layer's ``make_cache``.

    Attributes:
        keys: encoded keys in blocks (`kvattn.cache.layout`).
        values: encoded values in blocks.
        lengths: int32 [B], tokens seen.
        state: what the policy remembers.
        status: int32 [B], sticky bits of `kvattn.cache.status`.
        policy: which tokens are kept.
        codec: how they are stored.
        layout: where the slots lie.
        key_head_dim: H.
        value_head_dim: head dim of the values.
        dtype: what the tokens were before they were encoded.
        is_static: True for the keys and values of an encoder: nothing is appended, every query sees all.
    """

    keys: Encoded
    values: Encoded
    lengths: Array
    state: Any
    status: Array
    policy: Policy = dataclasses.field(metadata={"static": True})
    codec: Codec = dataclasses.field(metadata={"static": True})
    layout: Layout = dataclasses.field(metadata={"static": True})
    key_head_dim: int = dataclasses.field(metadata={"static": True})
    value_head_dim: int = dataclasses.field(metadata={"static": True})
    dtype: Any = dataclasses.field(metadata={"static": True})
    is_static: bool = dataclasses.field(default=False, metadata={"static": True})

    @classmethod
    def create(
        cls,
        batch_size: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        capacity: int | None = None,
        policy: Policy | None = None,
        codec: Codec | None = None,
        dtype: Any = jnp.bfloat16,
        value_head_dim: int | None = None,
        layout: Layout | None = None,
    ) -> "KVCache":
        """An empty cache.

        Args:
            batch_size: B, sequences; 0 is allowed.
            num_kv_heads: K.
            head_dim: H.
            capacity: most tokens a sequence may keep. Policies that bound it themselves need none.
            policy: which tokens are kept. None: `Full()`.
            codec: how they are stored. None: as they are, in `dtype`.
            dtype: float32, bfloat16, float16 (float64 under x64): what is stored without a codec.
            value_head_dim: head dim of the values. None: H.
            layout: where the slots lie. None: what measured best on the default backend.

        Raises:
            ConfigError: a size below its minimum, a missing capacity, something that is no policy or codec.
            DTypeError: a size that is no int, a dtype that is not floating.
            UnsupportedError: a policy and a codec that do not go together.
        """
        _checks.integer("batch_size", batch_size, 0)
        _checks.integer("num_kv_heads", num_kv_heads, 1)
        _checks.integer("head_dim", head_dim, 1)
        value_head_dim = head_dim if value_head_dim is None else _checks.integer("value_head_dim", value_head_dim, 1)
        policy = Full() if policy is None else policy
        if not isinstance(policy, Policy):
            raise ConfigError(f"policy must be a policy such as kvattn.Full(), got {policy!r}.")
        if codec is not None and not isinstance(codec, Codec):
            raise ConfigError(f"codec must be a codec or None, got {codec!r}.")
        dtype = _storage_dtype(dtype)
        codec = Plain(dtype) if codec is None else codec
        num_slots = policy.num_slots(capacity)

        reason = codec.refuses(_in_order(policy))
        if reason is not None:
            raise UnsupportedError(f"{codec} does not work with {policy}: {reason}")
        layout = _layout(layout, codec, num_slots, head_dim, dtype)
        return cls(
            keys=codec.empty(layout, "keys", batch_size, num_kv_heads, head_dim, dtype),
            values=codec.empty(layout, "values", batch_size, num_kv_heads, value_head_dim, dtype),
            lengths=jnp.zeros((batch_size,), jnp.int32),
            state=policy.init(batch_size, num_kv_heads, num_slots),
            status=jnp.zeros((batch_size,), jnp.int32),
            policy=policy,
            codec=codec,
            layout=layout,
            key_head_dim=head_dim,
            value_head_dim=value_head_dim,
            dtype=dtype,
        )

    @classmethod
    def from_encoder(
        cls, key: Array, value: Array, lengths: Any = None, *, codec: Codec | None = None, dtype: Any = None
    ) -> "KVCache":
        """A static cache for cross-attention: the encoder's keys and values, written once.

        Args:
            key: [B, S, K, H].
            value: [B, S, K, Hv].
            lengths: int32 [B], real tokens per row (right padded). None: S.
            codec: how they are stored. None: as they are.
            dtype: None: the dtype of `key`.

        Returns:
            a cache with ``is_static``; `kvattn.cached_attention` takes it with key and value None.

        Raises:
            ShapeError, DTypeError: keys and values that do not fit each other.
            RangeError: a length outside [0, S]. Under jit: an empty row with its status bit set.
        """
        key, value = _checks.floating("key", key), _checks.floating("value", value)
        if key.ndim != 4 or value.ndim != 4 or key.shape[:3] != value.shape[:3]:
            raise ShapeError(
                f"key and value must be [B, S, K, H] and [B, S, K, Hv], got {key.shape} and {value.shape}."
            )
        batch, length, heads, head_dim = key.shape
        empty = cls.create(
            batch,
            heads,
            head_dim,
            capacity=max(length, 1),
            codec=codec,
            dtype=key.dtype if dtype is None else dtype,
            value_head_dim=value.shape[3],
        )
        lengths = length if lengths is None else lengths
        lengths = _checks.counts("lengths", lengths, batch, 0, length)
        bad = (lengths < 0) | (lengths > length)
        lengths = jnp.where(bad, 0, lengths)
        t = jnp.arange(length, dtype=jnp.int32)[None]
        filled = empty.write(jnp.where(t < lengths[:, None], t, NOWHERE), key, value)
        status = bits.mark(filled.status, bad, bits.BAD_COUNT)
        return dataclasses.replace(filled, lengths=lengths, status=status, is_static=True)

    # What it holds.

    @property
    def batch_size(self) -> int:
        """B."""
        return self.lengths.shape[0]

    @property
    def num_kv_heads(self) -> int:
        """K."""
        return next(iter(self.keys.values())).shape[2]

    @property
    def num_slots(self) -> int:
        """C."""
        return self.layout.num_slots

    @property
    def positions(self) -> Array:
        """int32 [B, C], or [B, K, C] where heads keep different tokens: the position in each slot, -1 if empty."""
        return self.policy.positions(self.state, self.lengths, self.num_slots)

    @property
    def kept(self) -> Array:
        """int32 [B], or [B, K]: tokens kept."""
        return self.policy.kept(self.state, self.lengths, self.num_slots)

    @property
    def nbytes(self) -> int:
        """Bytes of all its arrays, as the device stores them (two 4-bit numbers to a byte)."""
        return sum(_nbytes(leaf) for leaf in jax.tree.leaves(self))

    def view(self) -> View:
        """The slots as an implementation of attention reads them."""
        counts = jnp.minimum(self.lengths, self.num_slots)
        positions = block_positions(self.layout, self.positions)
        return View(
            self.keys,
            self.values,
            positions,
            counts,
            self.layout,
            self.codec,
            self.key_head_dim,
            self.value_head_dim,
        )

    def dense(self) -> tuple[Array, Array]:
        """Decoded keys [B, K, C, H] and values [B, K, C, Hv], slot by slot. For looking at, not for decoding."""
        return self.view().dense(self.dtype)

    # What one does with it.

    def write(self, slots: Array, key: Array, value: Array) -> "KVCache":
        """Encodes tokens and stores them; lengths and state stay.

        Args:
            slots: int32 [B, T] or [B, K, T]; negative: not stored.
            key: [B, T, K, H].
            value: [B, T, K, Hv].

        Raises:
            RangeError: NaN or infinity that the codec cannot encode. Under jit: status bit; the token reads as NaN.
        """
        codec, layout = self.codec, self.layout
        key, value = key.swapaxes(1, 2), value.swapaxes(1, 2)
        return dataclasses.replace(
            self,
            keys=codec.write(self.keys, layout, "keys", slots, key),
            values=codec.write(self.values, layout, "values", slots, value),
            status=bits.mark(self.status, self._unfit(slots, key, value), bits.NONFINITE),
        )

    def _unfit(self, slots: Array, key: Array, value: Array) -> Array:
        """bool [B]: rows with tokens [B, K, T, H] that the codec cannot encode; an error if they can be seen."""
        unfit = [x for x in (self.codec.unfit(key), self.codec.unfit(value)) if x is not None]
        stored = (slots[:, None] if slots.ndim == 2 else slots) >= 0
        rows = jnp.zeros((key.shape[0],), bool)
        for x in unfit:
            rows |= jnp.any(x & stored, axis=(1, 2))
        if unfit and _checks.is_concrete(rows) and np.any(rows):
            raise RangeError(
                f"rows {np.nonzero(np.asarray(rows))[0].tolist()} have keys or values that are NaN or infinite, which "
                f"{self.codec} cannot encode. Nothing was written."
            )
        return rows

    def check(self) -> "KVCache":
        """Raises what a jitted step could only record; returns the cache if all is well.

        Raises:
            CapacityError: an append did not fit.
            RangeError: a count or row number was out of range, or a value that is not finite was to be encoded.
            UnsupportedError: a trim reached back too far.
            StaleCacheError: the cache was donated.
        """
        _checks.not_donated("this cache", self)
        bits.raise_for(self.status)
        return self

    def trim(self, num_tokens: Any) -> "KVCache":
        """Takes back the last tokens, as if they had never come (speculative decoding).

        Args:
            num_tokens: int, or int32 [B]; 0 <= num_tokens <= lengths.

        Raises:
            RangeError: outside that range. Under jit: status bit, row unchanged.
            UnsupportedError: the policy has let go of tokens that would be needed again. Under jit: likewise.
        """
        self._mutable("trim")
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
        return dataclasses.replace(self, lengths=self.lengths - num_tokens, state=state, status=status)

    def select(self, rows: Any) -> "KVCache":
        """The cache of the given rows: reorders, repeats or drops sequences (beams, finished requests).

        Args:
            rows: int [B'], each in [0, B).

        Raises:
            RangeError: a row number out of range. Under jit: an empty row with its status bit set.
        """
        _checks.not_donated("this cache", self)
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
            if values.size and (values.min() < 0 or values.max() >= self.batch_size):
                raise RangeError(f"rows must lie in [0, {self.batch_size}), got {values.tolist()}.")
        rows = jnp.asarray(rows, jnp.int32)
        known = (rows >= 0) & (rows < self.batch_size)
        rows = jnp.where(known, rows, 0)

        def take(axis: int):
            return lambda x: jnp.take(x, rows, axis=axis, mode="clip")

        return dataclasses.replace(
            self,
            keys=jax.tree.map(take(1), self.keys),
            values=jax.tree.map(take(1), self.values),
            lengths=jnp.where(known, take(0)(self.lengths), 0),
            state=jax.tree.map(take(0), self.state),
            status=jnp.where(known, take(0)(self.status), bits.BAD_COUNT),
        )

    def reset(self, rows: Any = None) -> "KVCache":
        """Forgets sequences, so that their rows can take new ones. `rows`: bool [B]; None: all."""
        self._mutable("reset")
        rows = jnp.ones((self.batch_size,), bool) if rows is None else jnp.asarray(rows)
        if rows.dtype != bool or rows.shape != (self.batch_size,):
            raise ShapeError(f"rows must be bool [{self.batch_size}], got {rows.dtype} {rows.shape}.")
        fresh = self.policy.init(self.batch_size, self.num_kv_heads, self.num_slots)

        def pick(new, old):
            return jnp.where(rows.reshape(rows.shape + (1,) * (old.ndim - 1)), new, old)

        return dataclasses.replace(
            self,
            lengths=jnp.where(rows, 0, self.lengths),
            state=jax.tree.map(pick, fresh, self.state),
            status=jnp.where(rows, 0, self.status),
        )

    def advance(self, num_new: Array, too_many: Array, bad_count: Array) -> "KVCache":
        """The cache with `num_new` more tokens seen per row, and refusals recorded."""
        status = bits.mark(bits.mark(self.status, too_many, bits.OVERFLOW), bad_count, bits.BAD_COUNT)
        return dataclasses.replace(self, lengths=self.lengths + num_new, status=status)

    def refuse_overflow(self, fits: Array, num_new: Array) -> None:
        """Raises `CapacityError` for rows that can be seen not to fit."""
        if _checks.is_concrete(fits) and not np.all(fits):
            rows = np.nonzero(~np.asarray(fits))[0]
            raise CapacityError(
                f"rows {rows.tolist()} of the cache hold {np.asarray(self.lengths)[rows].tolist()} tokens of "
                f"{self.num_slots}; {np.asarray(num_new)[rows].tolist()} more do not fit. "
                "Nothing was written. Create the cache with a larger capacity, or with a policy that lets tokens go."
            )

    def _mutable(self, verb: str) -> None:
        _checks.not_donated("this cache", self)
        if self.is_static:
            raise UnsupportedError(f"cannot {verb} a static cache: it holds the keys and values of an encoder.")

    def __repr__(self) -> str:
        leaf = next(iter(self.keys.values()))
        return (
            f"KVCache(batch_size={leaf.shape[1] if leaf.ndim == 5 else '?'}, num_kv_heads={leaf.shape[-3]}, "
            f"head_dim={self.key_head_dim}, num_slots={self.num_slots}, policy={self.policy}, codec={self.codec})"
        )


def _in_order(policy: Policy) -> bool:
    """Whether slot s holds the token of position s for ever: what `Policy` itself does."""
    kind = type(policy)
    return kind.place is Policy.place and kind.positions is Policy.positions and kind.absorb is Policy.absorb


def _layout(layout: Layout | None, codec: Codec, num_slots: int, head_dim: int, dtype: Any) -> Layout:
    """The given layout or the best one, with the rows the codec needs."""
    if layout is None:
        token_bytes = (
            0
            if codec.rows
            else sum(
                _nbytes(x) for x in jax.eval_shape(codec.encode, jax.ShapeDtypeStruct((head_dim,), dtype)).values()
            )
        )
        layout = Layout.best(num_slots, token_bytes)
    return dataclasses.replace(layout, num_slots=num_slots, rows=codec.rows or layout.rows)


def _storage_dtype(dtype: Any) -> Any:
    try:
        dtype = jax.dtypes.canonicalize_dtype(jnp.dtype(dtype))
    except TypeError as error:
        raise DTypeError(f"dtype must be a floating dtype, got {dtype!r}.") from error
    if not jnp.issubdtype(dtype, jnp.floating) or jnp.finfo(dtype).bits < 16:
        raise DTypeError(
            f"dtype must be float32, bfloat16, float16 or float64, got {dtype}: fewer bits are a codec's business."
        )
    return dtype


def _nbytes(leaf: Any) -> int:
    """Bytes of an array as devices store it; 4-bit types lie two to a byte."""
    number = jnp.issubdtype(leaf.dtype, jnp.integer)
    width = jnp.iinfo(leaf.dtype).bits if number else leaf.dtype.itemsize * 8
    return -(-int(np.prod(leaf.shape)) * width // 8)
