"""`AttentionSettings`: what NNX and Linen attention layers know about themselves, checked once and in one form."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Float

from kvattn import _checks, positions
from kvattn._typing import Array
from kvattn.codecs import Codec
from kvattn.errors import ConfigError, DTypeError, RangeError, ShapeError
from kvattn.layers import arguments
from kvattn.policies import Policy
from kvattn.positions import RelativeBuckets, RoPE, Temperature

CacheSharding = NamedSharding | PartitionSpec | tuple[Any, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionSettings:
    """The settings of an attention layer. Static: they hold no parameters.

    Each is described as an argument of `kvattn.layers.MultiHeadAttention`; what is None there has found its value here,
    but for what depends on the input. `values_in_keys` is not: it is true of latent attention, whose caches store no
    values (`kvattn.layers.latent`). `head_dim`, `qkv_features` and `value_head_dim` are None where they follow from
    inputs that are not known yet (Linen). `alibi_slopes` are N slopes or None.
    """

    num_heads: int
    num_kv_heads: int
    qkv_features: int | None
    head_dim: int | None
    value_head_dim: int | None
    dtype: DTypeLike | None
    param_dtype: DTypeLike | None
    precision: jax.lax.PrecisionLike
    use_bias: bool
    use_out_bias: bool
    dropout_rate: float
    broadcast_dropout: bool
    qk_norm: str | None
    qk_norm_heads: str
    qk_norm_epsilon: float
    qkv_clip: float | None
    window: int | None
    chunk: int | None
    rope: RoPE | None
    relative_buckets: RelativeBuckets | None
    temperature: Temperature | None
    output_gate: str | None
    alibi_slopes: tuple[float, ...] | None
    scale: float | Array | None
    softcap: float | None
    cache_sharding: CacheSharding | None
    policy: Policy | None
    codec: Codec | None
    implementation: str | tuple[str, ...] | None
    mesh: Mesh | AbstractMesh | None
    by: str
    axis: str
    values_in_keys: bool = False
    shares_kv: bool = False
    values_from_keys: bool = False
    value_norm: bool = False

    @classmethod
    def checked(cls, given: Mapping[str, Any], in_features: int | None = None) -> "AttentionSettings":
        """The settings that the arguments of an NNX layer, or the fields of a Linen layer, mean.

        Args:
            given: all of them, by name.
            in_features: D, from which H follows where neither `head_dim` nor `qkv_features` is given.

        Raises:
            DTypeError, ConfigError, RangeError, ShapeError, ShardingError: naming the argument.
        """
        arguments.check(given)
        num_heads = int(given["num_heads"])
        num_kv_heads = num_heads if given["num_kv_heads"] is None else int(given["num_kv_heads"])
        _checks.head_counts(num_heads, num_kv_heads)
        qkv_features, head_dim = _head_size(num_heads, given["qkv_features"], given["head_dim"], in_features)
        _check_rope(given["rope"], head_dim)
        _check_values(given, head_dim)
        clip, scale, use_bias, use_out_bias = (given[n] for n in ("qkv_clip", "scale", "use_bias", "use_out_bias"))
        return cls(
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            qkv_features=qkv_features,
            head_dim=head_dim,
            value_head_dim=head_dim if given["value_head_dim"] is None else int(given["value_head_dim"]),
            dtype=given["dtype"],
            param_dtype=given["param_dtype"],
            precision=_hashable(given["precision"]),
            use_bias=bool(use_bias),
            use_out_bias=bool(use_bias if use_out_bias is None else use_out_bias),
            dropout_rate=arguments.dropout_rate(given["dropout_rate"]),
            broadcast_dropout=bool(given["broadcast_dropout"]),
            qk_norm=_qk_norm(given["qk_norm"], given["normalize_qk"]),
            qk_norm_heads=given["qk_norm_heads"],
            qk_norm_epsilon=_checks.non_negative("qk_norm_epsilon", given["qk_norm_epsilon"]),
            qkv_clip=None if clip is None else float(clip),
            window=_checks.window(given["window"]),
            chunk=_checks.window(given["chunk"], "chunk"),
            rope=given["rope"],
            relative_buckets=given["relative_buckets"],
            temperature=given["temperature"],
            output_gate=given["output_gate"],
            alibi_slopes=_alibi_slopes(given["alibi"], num_heads),
            scale=scale if scale is None or isinstance(scale, Tracer) else float(scale),
            softcap=_checks.positive_softcap(given["softcap"]),
            cache_sharding=_hashable(given["cache_sharding"]),
            policy=given["policy"],
            codec=given["codec"],
            implementation=_hashable(given["implementation"]),
            mesh=given["mesh"],
            by=given["by"],
            axis=given["axis"],
            shares_kv=bool(given["shares_kv"]),
            values_from_keys=bool(given["values_from_keys"]),
            value_norm=bool(given["value_norm"]),
        )

    @property
    def head_dims(self) -> tuple[int, int]:
        """H, and the size of a value head.

        Raises:
            ConfigError: they are not known yet.
        """
        if self.head_dim is None:
            raise ConfigError("the size of a head follows from the inputs here: pass in_features, or set head_dim.")
        return self.head_dim, self.value_head_dim or self.head_dim

    @property
    def slopes(self) -> Float[Array, " N"] | None:
        """The ALiBi slopes as float32[N], or None."""
        return None if self.alibi_slopes is None else jnp.asarray(self.alibi_slopes, jnp.float32)

    @property
    def storage_dtype(self) -> DTypeLike:
        """What caches store without a codec."""
        return next((dtype for dtype in (self.dtype, self.param_dtype) if dtype is not None), jnp.float32)


class Setting[T]:
    """An attribute of a layer that lies in its `settings`; assigning it gives the layer new settings."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    @overload
    def __get__(self, layer: None, owner: type) -> "Setting[T]": ...
    @overload
    def __get__(self, layer: "HasSettings", owner: type) -> T: ...
    def __get__(self, layer: "HasSettings | None", owner: type) -> Any:
        return self if layer is None else getattr(layer.settings, self.name)

    def __set__(self, layer: "HasSettings", value: T) -> None:
        layer.settings = dataclasses.replace(layer.settings, **{self.name: value})


class HasSettings:
    """The settings as attributes of a layer, under their names."""

    settings: AttentionSettings

    num_heads = Setting[int]()
    num_kv_heads = Setting[int]()
    qkv_features = Setting[int]()
    head_dim = Setting[int]()
    value_head_dim = Setting[int]()
    dtype = Setting[DTypeLike | None]()
    param_dtype = Setting[DTypeLike | None]()
    precision = Setting[jax.lax.PrecisionLike]()
    use_bias = Setting[bool]()
    dropout_rate = Setting[float]()
    broadcast_dropout = Setting[bool]()
    qk_norm = Setting[str | None]()
    qk_norm_heads = Setting[str]()
    qkv_clip = Setting[float | None]()
    window = Setting[int | None]()
    chunk = Setting[int | None]()
    rope = Setting[RoPE | None]()
    relative_buckets = Setting[RelativeBuckets | None]()
    temperature = Setting[Temperature | None]()
    output_gate = Setting[str | None]()
    alibi_slopes = Setting[tuple[float, ...] | None]()
    scale = Setting[float | Array | None]()
    softcap = Setting[float | None]()
    cache_sharding = Setting[CacheSharding | None]()
    policy = Setting[Policy | None]()
    codec = Setting[Codec | None]()
    implementation = Setting[str | tuple[str, ...] | None]()
    shares_kv = Setting[bool]()
    values_from_keys = Setting[bool]()
    value_norm = Setting[bool]()
    mesh = Setting[Mesh | AbstractMesh | None]()
    by = Setting[str]()
    axis = Setting[str]()


# What follows from several arguments --------------------------------------------------------------


def _head_size(
    num_heads: int, features: int | None, size: int | None, in_features: int | None
) -> tuple[int | None, int | None]:
    """The width N * H of all query heads, and the size H of one; None where they follow from unknown inputs.

    Raises:
        ConfigError: the features do not divide into heads, or are not num_heads times `size`.
    """
    if features is not None:
        features = _checks.integer("qkv_features", features, 1)
    if size is not None:
        size = _checks.integer("head_dim", size, 1)
        if features not in (None, num_heads * size):
            raise ConfigError(
                f"qkv_features ({features}) must be num_heads * head_dim = {num_heads} * {size} = {num_heads * size}: "
                "give one of the two."
            )
        return num_heads * size, size
    if features is None:
        features = in_features
    if features is None:
        return None, None
    if features % num_heads:
        raise ConfigError(
            f"Memory dimension ({features}) must be divisible by 'num_heads' heads ({num_heads}). "
            "Give head_dim to choose the size of a head freely."
        )
    return int(features), int(features) // num_heads


def _hashable[T](value: T) -> T | tuple[Any, ...]:
    return tuple(value) if isinstance(value, list) else value


def _check_values(given: Mapping[str, Any], head_dim: int | None) -> None:
    """Checks what is said of values.

    Raises:
        ConfigError: values of another size than the keys that they are; a layer that projects none and says how.
    """
    size = given["value_head_dim"]
    if given["values_from_keys"] and size is not None and size != head_dim:
        raise ConfigError(f"values_from_keys=True: values are as long as keys ({head_dim}), got value_head_dim {size}.")
    for name in ("values_from_keys", "value_norm"):
        if given["shares_kv"] and given[name]:
            raise ConfigError(f"shares_kv=True: the layer projects no values, so leave {name} out.")


def _check_rope(rope: RoPE | None, size: int | None) -> None:
    """Checks that a rotary embedding fits heads of `size`."""
    made_for = getattr(rope, "head_dim", size)
    if rope is not None and size is not None and made_for != size:
        raise ConfigError(f"rope was made for head_dim {made_for}, but the heads of this layer have {size}.")


def _qk_norm(kind: str | None, normalize_qk: bool) -> str | None:
    """Which norm queries and keys pass: Flax's `normalize_qk` means "layer".

    Raises:
        ConfigError: an unknown kind, or `normalize_qk` with another kind than "layer".
    """
    if kind is None:
        return "layer" if normalize_qk else None
    _checks.one_of("qk_norm", kind, ("layer", "rms"))
    if normalize_qk and kind != "layer":
        raise ConfigError(f"normalize_qk=True means qk_norm='layer', but qk_norm is {kind!r}: leave normalize_qk out.")
    return kind


def _alibi_slopes(alibi: bool | Sequence[float] | None, num_heads: int) -> tuple[float, ...] | None:
    """The ALiBi slope of each query head as plain floats, or None.

    Raises:
        DTypeError: neither a bool nor numbers.
        ShapeError: not one slope per query head.
        RangeError: a slope that is not finite.
    """
    given: Any = alibi
    if alibi is None or (isinstance(alibi, bool | np.bool_) and not alibi):
        return None
    if isinstance(alibi, bool | np.bool_):
        with jax.ensure_compile_time_eval():  # numbers, also where the layer is made inside a trace
            given = positions.alibi_slopes(num_heads)
    try:
        slopes = np.asarray(given, dtype=np.float32)
    except (TypeError, ValueError) as error:
        raise DTypeError(f"alibi must be a bool or {num_heads} slopes, got {alibi!r}.") from error
    if slopes.shape != (num_heads,):
        raise ShapeError(f"alibi needs one slope per query head, shape ({num_heads},), got {slopes.shape}.")
    if not np.isfinite(slopes).all():
        raise RangeError(f"alibi slopes must be finite, got {slopes.tolist()}.")
    return tuple(slopes.tolist())
