"""`KVCache`: a contiguous cache of fixed size, as a pytree.

It says what is stored and where. Which tokens stay is the policy's business, in how many bits the
codec's, who reads it `kvattn.attend`'s.
"""

import dataclasses
import typing
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Bool, Float, Int32, PyTree

from kvattn import _checks, _target
from kvattn._trees import portable, tell_flax
from kvattn._typing import Array, Encoded
from kvattn.cache import status as bits
from kvattn.cache.axes import along
from kvattn.cache.base import Cache, known_rows, nbytes_of, shown_size, storage_dtype, values_apart
from kvattn.cache.host import MEMORY_KIND, HostLayout, check_platform
from kvattn.cache.layout import Layout
from kvattn.cache.placed import placed, shardings_of
from kvattn.codecs import Codec, Plain
from kvattn.errors import ConfigError, ShapeError, UnsupportedError
from kvattn.policies import Full, Policy
from kvattn.policies.base import NOWHERE


@typing.no_type_check
@portable
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class KVCache(Cache):
    """Keys and values of B sequences in C slots each.

    A cache is a value: every operation returns a new one. Donate the old one to a jitted step
    (``jax.jit(step, donate_argnames="cache")``) and it is updated in place.

    Make one with `KVCache.create`, `KVCache.from_encoder`, or a layer's ``make_cache``.

    Attributes:
        keys: encoded keys in blocks (`kvattn.cache.layout`).
        values: encoded values in blocks; none where they are in the keys (`values_in_keys`).
        lengths: tokens seen.
        state: what the policy remembers.
        status: sticky bits of `kvattn.cache.status`.
        policy: which tokens are kept.
        codec: how they are stored.
        layout: where the slots lie.
        key_head_dim: H.
        value_head_dim: Hv, head dim of the values.
        dtype: what the tokens were before they were encoded.
        is_static: True for the keys and values of an encoder: nothing is appended, every query sees all.
        platform: what it was made for, as it was said. None: for where it was made.
    """

    keys: Encoded
    values: Encoded
    lengths: Int32[Array, " B"]
    state: PyTree
    status: Int32[Array, " B"]
    policy: Policy = dataclasses.field(metadata={"static": True})
    codec: Codec = dataclasses.field(metadata={"static": True})
    layout: Layout = dataclasses.field(metadata={"static": True})
    key_head_dim: int = dataclasses.field(metadata={"static": True})
    value_head_dim: int = dataclasses.field(metadata={"static": True})
    dtype: np.dtype = dataclasses.field(metadata={"static": True})
    is_static: bool = dataclasses.field(default=False, metadata={"static": True})
    platform: str | None = dataclasses.field(default=None, metadata={"static": True})

    page_table = None
    page_size = 0
    shared = None

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
        dtype: DTypeLike = jnp.bfloat16,
        value_head_dim: int | None = None,
        values_in_keys: bool = False,
        layout: Layout | None = None,
        memory_kind: str | None = None,
        platform: str | None = None,
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
            values_in_keys: a token's value is the first `value_head_dim` numbers of its key and is stored once, as
                latent attention has it; steps then take ``value=None``.
            layout: where the slots lie. None: what is best on the platform that the cache is made for.
            memory_kind: "pinned_host": keys and values lie in the host's memory, and blocks of them come to the device
                while the attention to the block before is computed (`kvattn.cache.host`), so that a cache may be larger
                than the device. None or "device": in the device's.
            platform: what the cache is made for, wherever it is made: "cpu", "cuda", "rocm" or "tpu", as `jax.export`
                names them. It is kept, and steps choose their kernels when they are lowered. None: for where it is made
                (the current mesh, `jax.default_device`, the default backend).

        Raises:
            ConfigError: a size below its minimum, a missing capacity, something that is no policy or codec, an unknown
                kind of memory or platform, a layout of another kind, values in keys that are shorter.
            DTypeError: a size that is no int, a dtype that is not floating.
            UnsupportedError: a policy and a codec that do not go together; a codec that stores keys and values
                differently, with `values_in_keys`; a device whose host has no such memory.
        """
        tell_flax()
        _checks.integer("batch_size", batch_size, 0)
        _checks.integer("num_kv_heads", num_kv_heads, 1)
        _checks.integer("head_dim", head_dim, 1)
        value_head_dim = head_dim if value_head_dim is None else _checks.integer("value_head_dim", value_head_dim, 1)
        policy = Full() if policy is None else policy
        if not isinstance(policy, Policy):
            raise ConfigError(f"policy must be a policy such as kvattn.Full(), got {policy!r}.")
        if codec is not None and not isinstance(codec, Codec):
            raise ConfigError(f"codec must be a codec or None, got {codec!r}.")
        dtype = storage_dtype(dtype)
        codec = Plain(dtype) if codec is None else codec
        num_slots = policy.num_slots(capacity)

        reason = codec.refuses(policy.in_order)
        if reason is not None:
            raise UnsupportedError(f"{codec} does not work with {policy}: {reason}")
        apart = values_apart(codec, head_dim, value_head_dim, values_in_keys)
        with _target.aimed_at(_target.checked("platform", platform)):
            layout = _layout(layout, memory_kind, codec, num_slots, head_dim, dtype, not apart)
            keys = codec.empty(layout, "keys", batch_size, num_kv_heads, head_dim, dtype)
            values = codec.empty(layout, "values", batch_size, num_kv_heads, value_head_dim, dtype) if apart else {}
        return cls(
            keys=keys,
            values=values,
            lengths=jnp.zeros((batch_size,), jnp.int32),
            state=policy.init(batch_size, num_kv_heads, num_slots),
            status=jnp.zeros((batch_size,), jnp.int32),
            policy=policy,
            codec=codec,
            layout=layout,
            key_head_dim=head_dim,
            value_head_dim=value_head_dim,
            dtype=dtype,
            platform=platform,
        )

    @classmethod
    def from_encoder(
        cls,
        key: Float[ArrayLike, "B S K H"],
        value: Float[ArrayLike, "B S K Hv"],
        lengths: ArrayLike | Sequence[int] | None = None,
        *,
        codec: Codec | None = None,
        dtype: DTypeLike | None = None,
        memory_kind: str | None = None,
        platform: str | None = None,
    ) -> "KVCache":
        """A static cache for cross-attention: the encoder's keys and values, written once.

        Args:
            key: the keys.
            value: the values.
            lengths: int32 [B], real tokens per row (right padded). None: S.
            codec: how they are stored. None: as they are.
            dtype: None: the dtype of `key`.
            memory_kind: as in `create`.
            platform: likewise.

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
            memory_kind=memory_kind,
            platform=platform,
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
    def num_kv_heads(self) -> int:
        """K."""
        return next(iter(self.keys.values())).shape[2]

    @property
    def num_slots(self) -> int:
        """C."""
        return self.layout.num_slots

    @property
    def store(self) -> Layout:
        """Where the arrays have their slots."""
        return self.layout

    @property
    def memory_kind(self) -> str:
        """The memory that keys and values lie in, as JAX names it: "device" or "pinned_host"."""
        return MEMORY_KIND if self.layout.on_host else "device"

    # What one does with it.

    def select(self, rows: ArrayLike | Sequence[int]) -> "KVCache":
        """The cache of the given rows: reorders, repeats or drops sequences (beams, finished requests).

        Args:
            rows: int [B'], each in [0, B).

        Raises:
            RangeError: a row number out of range. Under jit: an empty row with its status bit set.
        """
        cache = self.usable()
        return placed(_selected, shardings_of(cache), cache, *known_rows(rows, cache.batch_size))

    def _sizes(self) -> dict[str, object]:
        return {"head_dim": self.key_head_dim, "num_slots": self.num_slots, "policy": self.policy, "codec": self.codec}

    def _array_sizes(self) -> dict[str, object]:
        leaf = next(iter(self.keys.values()))
        return {"batch_size": shown_size(leaf, -4), "num_kv_heads": shown_size(leaf, -3)}


def _selected(cache: KVCache, rows: Int32[Array, " rows"], known: Bool[Array, " rows"]) -> KVCache:
    """`select` of known rows; where `known` is False, an empty row."""
    cache = along("rows", lambda x, axis: jnp.take(x, rows, axis=axis, mode="clip"), cache, cache.axes)
    return cache.replace(
        lengths=jnp.where(known, cache.lengths, 0),
        state=cache.forgotten(~known, cache.state),
        status=jnp.where(known, cache.status, bits.BAD_COUNT),
    )


def _layout(
    layout: Layout | None,
    memory_kind: str | None,
    codec: Codec,
    num_slots: int,
    head_dim: int,
    dtype: DTypeLike,
    values_in_keys: bool,
) -> Layout:
    """The given layout or the best one of a kind of memory, with the rows the codec needs."""
    if memory_kind is not None:
        _checks.one_of("memory_kind", memory_kind, ("device", MEMORY_KIND))
    on_host = memory_kind == MEMORY_KIND if layout is None or memory_kind is not None else layout.on_host
    if layout is not None and layout.on_host != on_host:
        raise ConfigError(
            f"memory_kind {memory_kind!r} does not fit {layout!r}: give a kvattn.cache.HostLayout for "
            f"{MEMORY_KIND!r}, a kvattn.cache.Layout for 'device', or leave one of the two out."
        )
    if on_host:
        check_platform()
    if layout is None:
        token_bytes = (
            0
            if codec.rows
            else sum(
                nbytes_of(x) for x in jax.eval_shape(codec.encode, jax.ShapeDtypeStruct((head_dim,), dtype)).values()
            )
        )
        kind = HostLayout if on_host else Layout
        layout = kind.best(num_slots, token_bytes, head_dim=head_dim, values_in_keys=values_in_keys)
    return dataclasses.replace(layout, num_slots=num_slots, rows=codec.rows or layout.rows)
