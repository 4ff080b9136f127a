"""Positions: rotary embeddings (RoPE) with their long-context scalings, and ALiBi's slopes.

Notation as everywhere: B batch, T tokens, N heads, H head dim. A position is an int32: how many
tokens of the sequence came before. Nothing here knows about caches, masks or layers.

Phases are exact to about 1e-7 rad at every int32 position. `position * frequency` in float32 is
wrong by 0.06 rad at position 10^6 and by whole turns at 2^31; so frequencies are kept as fixed-point
turns per token, the product is taken in wrapping integers, which drops the whole turns without
rounding, and only what is left, at most an eighth of a turn, becomes a float.
"""

import dataclasses
import decimal
import functools
import math
import numbers
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from kvattn.errors import ConfigError, DTypeError, RangeError, ShapeError

__all__ = ["PHASE_ERROR", "RoPE", "alibi_slopes"]

PHASE_ERROR = 2.0**-22
"""Declared bound on |cos - exact cos| and |sin - exact sin| in float32, for every int32 position."""

_TWO_PI = 2 * Fraction("3.14159265358979323846264338327950288419716939937510582097494")
_INT32_MAX = 2**31 - 1

# What each kind needs, and what else it reads. A field that a kind does not read is refused: an
# ignored field is a model that runs with the wrong phases.
_REQUIRED: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
_OPTIONAL: dict[str, tuple[str, ...]] = {
    "yarn": ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
}
# Present in checkpoints of every kind, without meaning for some.
_COMMON = ("original_max_position_embeddings", "max_position_embeddings", "finetuned")


@dataclasses.dataclass(frozen=True)
class RoPE:
    r"""Rotary position embedding: pair i of a head turns by ``position * inv_freq[i]`` radians.

    .. math:: (a_i, b_i) \mapsto (a_i \cos\phi_i - b_i \sin\phi_i,\; b_i \cos\phi_i + a_i \sin\phi_i),
              \quad \phi_i = p\,\theta^{-2i/H}

    Frozen and hashable: a static argument of `jax.jit` and a plain attribute of a module. It holds no
    arrays. (RoFormer, https://arxiv.org/abs/2104.09864; pairs and scalings as in HuggingFace.)

    Args:
        head_dim: H, the size of a head.
        theta: base of the frequencies.
        scaling: the HuggingFace rope dict (``rope_scaling`` or ``rope_parameters`` of a config.json).
            ``rope_type`` (or ``type``) is one of

            - ``default``: no scaling.
            - ``linear``: frequencies divided by ``factor``.
            - ``dynamic``: NTK. Needs ``factor`` and ``original_max_position_embeddings`` (or
              ``max_position_embeddings``, which is what transformers reads from the config). See below.
            - ``yarn``: ``factor``, ``original_max_position_embeddings``; may have ``attention_factor``,
              ``beta_fast``, ``beta_slow``, ``mscale``, ``mscale_all_dim``, ``truncate``
              (https://arxiv.org/abs/2309.00071). Without ``factor`` it is ``max_position_embeddings``
              over ``original_max_position_embeddings``.
            - ``llama3``: ``factor``, ``low_freq_factor``, ``high_freq_factor``,
              ``original_max_position_embeddings``.

            ``rope_theta`` and ``partial_rotary_factor`` in the dict set `theta` and `rotary_dim`.
        rotary_dim: how many leading entries of a head turn (even); the others pass through. None: all.
        interleaved: False pairs entry i with i + rotary_dim // 2 (HuggingFace's ``rotate_half``);
            True pairs 2i with 2i + 1 (GPT-J, and Meta's own Llama weights).
        max_positions: if given, positions must be below it. (There is no table: without it any
            int32 position is fine.)

    The ``dynamic`` kind depends on a length. Each row of a call uses the largest position it is given,
    plus one; up to ``original_max_position_embeddings`` nothing is scaled. For a whole prompt this is
    what transformers does. But keys rotated in an earlier, shorter call keep their earlier frequencies
    (in transformers too), so what comes out depends on how a prompt is cut into calls, and padding
    tokens count. `for_length` removes this: it fixes the length once, and with it the frequencies.
    Its phases inside a call are float32-accurate only relative to the phase (within 1e-6 of it, for
    stretches up to 10^5); `for_length` is as exact as the other kinds.

    Raises:
        ConfigError: a size that cannot work, an unknown kind, a field that is missing or unknown.
        DTypeError: a float or bool where an int belongs.

    Example:
        >>> rope = RoPE(64, theta=500000.0)
        >>> x = jnp.ones((1, 3, 2, 64))
        >>> rope(x, jnp.arange(3)).shape
        (1, 3, 2, 64)
    """

    head_dim: int
    _: dataclasses.KW_ONLY
    theta: float = 10000.0
    scaling: Mapping[str, Any] | tuple[tuple[str, Any], ...] | None = None
    rotary_dim: int | None = None
    interleaved: bool = False
    max_positions: int | None = None

    def __post_init__(self) -> None:
        head_dim = _integer("head_dim", self.head_dim, 1)
        theta = _number("theta", self.theta)
        kind, fields = _read_scaling(self.scaling)

        # Newer checkpoints keep these two inside the dict.
        theta_in_dict = fields.pop("rope_theta", None)
        if theta_in_dict is not None:
            theta_in_dict = _number("scaling['rope_theta']", theta_in_dict)
            if theta not in (10000.0, theta_in_dict):
                raise ConfigError(f"theta is {theta} but scaling['rope_theta'] is {theta_in_dict}: give one of them.")
            theta = theta_in_dict
        if theta < 1:
            raise ConfigError(f"theta must be >= 1, got {theta}.")
        rotary_dim = self.rotary_dim
        fraction = fields.pop("partial_rotary_factor", None)
        if fraction is not None:
            from_dict = int(head_dim * _number("scaling['partial_rotary_factor']", fraction))
            if rotary_dim not in (None, from_dict):
                raise ConfigError(
                    f"rotary_dim is {rotary_dim} but scaling['partial_rotary_factor'] ({fraction}) means {from_dict}."
                )
            rotary_dim = from_dict
        rotary_dim = head_dim if rotary_dim is None else _integer("rotary_dim", rotary_dim, 2)
        if rotary_dim % 2 or not 2 <= rotary_dim <= head_dim:
            raise ConfigError(
                f"RoPE turns pairs: rotary_dim must be even and between 2 and head_dim ({head_dim}), got {rotary_dim}."
            )
        if kind == "dynamic" and rotary_dim == 2:
            raise ConfigError("dynamic scaling needs rotary_dim > 2: its exponent is rotary_dim / (rotary_dim - 2).")
        if kind == "yarn" and theta == 1:
            raise ConfigError("yarn scaling needs theta > 1, got 1.")
        if not isinstance(self.interleaved, bool):
            raise DTypeError(f"interleaved must be a bool, got {self.interleaved!r}.")
        if self.max_positions is not None:
            object.__setattr__(self, "max_positions", _integer("max_positions", self.max_positions, 1))

        scaling = None if kind == "default" else (("rope_type", kind), *sorted(fields.items()))
        for name, value in (("head_dim", head_dim), ("theta", theta), ("rotary_dim", rotary_dim), ("scaling", scaling)):
            object.__setattr__(self, name, value)

    @property
    def num_pairs(self) -> int:
        """How many pairs of a head turn: rotary_dim // 2."""
        return (self.rotary_dim or self.head_dim) // 2

    @property
    def inv_freq(self) -> np.ndarray:
        """Radians per token of each pair, float64[rotary_dim // 2] (of ``dynamic``: at the original length)."""
        return np.array([float(f) for f in _frequencies(self)])

    @property
    def attention_factor(self) -> float:
        """What cos and sin are multiplied by: 1, except for ``yarn``."""
        fields = dict(self.scaling or ())
        return _yarn_attention_factor(fields) if fields.get("rope_type") == "yarn" else 1.0

    def for_length(self, length: int) -> "RoPE":
        """This embedding with ``dynamic`` scaling fixed at a sequence length; the other kinds as they are.

        Args:
            length: tokens, usually the capacity of the cache that the keys go to.
        """
        length = _integer("length", length, 1)
        fields = dict(self.scaling or ())
        if fields.get("rope_type") != "dynamic":
            return self
        ratio = max(float(_dynamic_ratio(fields, length)), 1.0)
        theta = self.theta * ratio ** (self.num_pairs / (self.num_pairs - 1))
        return dataclasses.replace(self, theta=theta, scaling=None)

    def cos_sin(self, positions: Any, dtype: Any = jnp.float32) -> tuple[jax.Array, jax.Array]:
        """Cosine and sine of every pair's phase, times `attention_factor`.

        Args:
            positions: int[..., T]. Traced negative positions turn backwards; concrete ones are refused.
            dtype: float32, or float64 where JAX has it enabled.

        Returns:
            Two arrays ``[..., T, rotary_dim // 2]``.

        Raises:
            DTypeError: positions are not integers.
            RangeError: a position that can be looked at is negative, no int32, or not below `max_positions`.
        """
        return _cos_sin(self, _checked_positions(positions, self.max_positions), jnp.dtype(dtype))

    def __call__(self, x: Any, positions: Any) -> jax.Array:
        """Turns queries or keys to their positions.

        Args:
            x: float[B, T, N, H], or float[T, N, H].
            positions: int[B, T] or int[T].

        Returns:
            An array like `x`, of its dtype. Computed in float32 (float64 if `x` is).

        Raises:
            ShapeError: shapes that do not fit each other or `head_dim`.
            DTypeError, RangeError: as `cos_sin`; DTypeError also if `x` is not floating.
        """
        if not jnp.issubdtype(x.dtype if hasattr(x, "dtype") else np.asarray(x).dtype, jnp.floating):
            raise DTypeError(f"x must have a real floating dtype, got {getattr(x, 'dtype', type(x).__name__)}.")
        x = jnp.asarray(x)
        if x.ndim < 3 or x.shape[-1] != self.head_dim:
            raise ShapeError(f"x must be [B, T, N, {self.head_dim}] or [T, N, {self.head_dim}], got {x.shape}.")
        shape = np.shape(positions)
        tokens = x.shape[:-2]
        if shape not in (tokens, tokens[-1:], (1,) * (len(tokens) - 1) + tokens[-1:]):
            raise ShapeError(
                f"positions must have shape {tokens} or {tokens[-1:]} for x of shape {x.shape}, got {shape}."
            )

        return _turned(self, x, _checked_positions(positions, self.max_positions))


def alibi_slopes(num_heads: int) -> jax.Array:
    """ALiBi's slope of each head, float32[N].

    For N a power of two, head n has ``2 ** (-8 * (n + 1) / N)``. Otherwise the slopes of the power of
    two below N are followed by every second slope of the power above (as in the paper's code and BLOOM).

    The score of a query and a key gets ``slope * (key_position - query_position)``: 0 for the token
    itself, ever more negative for the past. (https://arxiv.org/abs/2108.12409.)

    Args:
        num_heads: N, the number of query heads.

    Raises:
        ConfigError: N < 1.
        DTypeError: N is no int.

    Example:
        >>> alibi_slopes(4).tolist()
        [0.25, 0.0625, 0.015625, 0.00390625]
    """
    num_heads = _integer("num_heads", num_heads, 1)
    power = 1 << (num_heads.bit_length() - 1)

    def of_power(n: int) -> list[float]:
        return [2.0 ** (-8.0 * (i + 1) / n) for i in range(n)]

    slopes = of_power(power) + of_power(2 * power)[0::2][: num_heads - power]
    return jnp.asarray(np.array(slopes, np.float32))


# Settings -----------------------------------------------------------------------------------------


def _integer(name: str, value: Any, minimum: int) -> int:
    if isinstance(value, Tracer):
        raise ConfigError(f"{name} must be a Python int, known when the program is traced; got a traced value.")
    if isinstance(value, bool | np.bool_) or not isinstance(value, numbers.Integral):
        raise DTypeError(f"{name} must be an int, got {value!r} of type {type(value).__name__}.")
    if value < minimum:
        raise ConfigError(f"{name} must be >= {minimum}, got {value}.")
    return int(value)


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool | np.bool_) or not isinstance(value, numbers.Real):
        raise DTypeError(f"{name} must be a number, got {value!r} of type {type(value).__name__}.")
    number = float(value)
    if not (math.isfinite(number) and number > 0):
        raise ConfigError(f"{name} must be finite and > 0, got {value}.")
    return number


def _read_scaling(scaling: Any) -> tuple[str, dict[str, Any]]:
    """The kind of a rope dict and its fields, all checked, without what has no meaning for it."""
    if scaling is None:
        return "default", {}
    if not isinstance(scaling, Mapping | tuple):
        raise DTypeError(f"scaling must be a HuggingFace rope dict, got {type(scaling).__name__}.")
    fields = {name: value for name, value in dict(scaling).items() if value is not None}
    kinds = {fields.pop(name) for name in ("rope_type", "type") if name in fields} or {"default"}
    kind = kinds.pop()
    if kinds:
        raise ConfigError(f"scaling names two kinds of RoPE, {kind!r} as one and {kinds.pop()!r} as the other.")
    if kind not in _REQUIRED:
        raise ConfigError(
            f"unknown rope_type {kind!r} in scaling; the known ones are {', '.join(map(repr, _REQUIRED))}."
        )

    # transformers reads these from the config around the dict; a dict that carries them is complete.
    length = fields.get("max_position_embeddings")
    if kind == "dynamic" and length is not None:
        fields.setdefault("original_max_position_embeddings", length)
    if kind == "yarn" and length is not None and "original_max_position_embeddings" in fields:
        fields.setdefault("factor", length / fields["original_max_position_embeddings"])
    for name in _REQUIRED[kind]:
        if name not in fields:
            raise ConfigError(f"scaling of type {kind!r} needs the field {name!r}, got {sorted(fields)}.")
    read = {*_REQUIRED[kind], *_OPTIONAL.get(kind, ())}
    unknown = sorted(set(fields) - read - {*_COMMON, "rope_theta", "partial_rotary_factor"})
    if unknown:
        raise ConfigError(f"scaling of type {kind!r} does not read the field {unknown[0]!r}; it reads {sorted(read)}.")

    out: dict[str, Any] = {name: fields[name] for name in ("rope_theta", "partial_rotary_factor") if name in fields}
    for name in sorted(read & set(fields)):
        value = fields[name]
        if name == "truncate":
            if not isinstance(value, bool):
                raise DTypeError(f"scaling['truncate'] must be a bool, got {value!r}.")
            out[name] = value
        elif name in ("mscale", "mscale_all_dim", "beta_fast", "beta_slow") and value == 0:
            continue  # zero means "not given", as in transformers
        else:
            out[name] = _number(f"scaling['{name}']", value)
    if kind == "llama3" and not out["low_freq_factor"] < out["high_freq_factor"]:
        raise ConfigError(
            f"scaling['low_freq_factor'] ({out['low_freq_factor']}) must be below "
            f"scaling['high_freq_factor'] ({out['high_freq_factor']})."
        )
    return kind, out


# Frequencies, once per RoPE, on the host ----------------------------------------------------------


@functools.lru_cache(maxsize=256)
def _frequencies(rope: RoPE) -> tuple[Fraction, ...]:
    """Radians per token of each pair to 50 digits: float64's 16 are 2e-6 rad short at position 2^31."""
    with decimal.localcontext(prec=60):
        theta = decimal.Decimal(rope.theta)
        plain = tuple(Fraction(theta ** (decimal.Decimal(-i) / rope.num_pairs)) for i in range(rope.num_pairs))
    fields = dict(rope.scaling or ())
    return _SCALED[fields.get("rope_type", "default")](plain, fields, rope)


def _unscaled(plain: tuple[Fraction, ...], fields: dict[str, Any], rope: RoPE) -> tuple[Fraction, ...]:
    return plain


def _linear(plain: tuple[Fraction, ...], fields: dict[str, Any], rope: RoPE) -> tuple[Fraction, ...]:
    return tuple(f / Fraction(fields["factor"]) for f in plain)


def _yarn(plain: tuple[Fraction, ...], fields: dict[str, Any], rope: RoPE) -> tuple[Fraction, ...]:
    """Pairs that turn often within the original length stay, those that turn rarely are interpolated."""
    dim = 2 * rope.num_pairs
    length = fields["original_max_position_embeddings"]

    def pair_turning(times: float) -> float:
        """The (fractional) pair that turns this many times within the original length."""
        return dim * math.log(length / (times * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = pair_turning(fields.get("beta_fast", 32.0)), pair_turning(fields.get("beta_slow", 1.0))
    if fields.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    high = high + 0.001 if low == high else high
    out = []
    for i, f in enumerate(plain):
        interpolated = Fraction(min(max((i - low) / (high - low), 0.0), 1.0))
        out.append(interpolated * f / Fraction(fields["factor"]) + (1 - interpolated) * f)
    return tuple(out)


def _yarn_attention_factor(fields: dict[str, Any]) -> float:
    def magnitude(weight: float) -> float:
        return 1.0 if fields["factor"] <= 1 else 0.1 * weight * math.log(fields["factor"]) + 1.0

    if "attention_factor" in fields:
        return fields["attention_factor"]
    if "mscale" in fields and "mscale_all_dim" in fields:
        return magnitude(fields["mscale"]) / magnitude(fields["mscale_all_dim"])
    return magnitude(1.0)


def _llama3(plain: tuple[Fraction, ...], fields: dict[str, Any], rope: RoPE) -> tuple[Fraction, ...]:
    """Short waves stay, long ones are divided by the factor, those between blend."""
    factor, low, high, length = (Fraction(fields[name]) for name in _REQUIRED["llama3"])
    out = []
    for f in plain:
        turns = length * f / _TWO_PI
        kept = min(max((turns - low) / (high - low), Fraction(0)), Fraction(1))
        out.append((1 - kept) * f / factor + kept * f)
    return tuple(out)


_SCALED: dict[str, Callable[[tuple[Fraction, ...], dict[str, Any], RoPE], tuple[Fraction, ...]]] = {
    "default": _unscaled,
    "linear": _linear,
    "dynamic": _unscaled,  # its factor depends on the call: see _dynamic_shrink
    "yarn": _yarn,
    "llama3": _llama3,
}


@functools.lru_cache(maxsize=256)
def _words(rope: RoPE) -> np.ndarray:
    """Turns per token modulo 1 as 96-bit fixed point: uint32[3, rotary_dim // 2], highest word first."""
    fixed = [round(f / _TWO_PI * 2**96) for f in _frequencies(rope)]
    return np.array([[(v >> shift) & 0xFFFFFFFF for v in fixed] for shift in (64, 32, 0)], np.uint32)


# Phases, on the device ----------------------------------------------------------------------------


def _checked_positions(positions: Any, max_positions: int | None) -> jax.Array:
    if isinstance(positions, Tracer):
        if not jnp.issubdtype(positions.dtype, jnp.integer):
            raise DTypeError(f"positions must be integers, got {positions.dtype}.")
        return positions.astype(jnp.int32)
    # NumPy, because JAX would wrap what does not fit into int32 before it could be seen.
    values = np.asarray(positions)
    if values.dtype == object and all(isinstance(v, int) for v in values.ravel()):
        raise RangeError(f"positions must be int32, got {max(map(abs, values.ravel()))}.")
    if values.size == 0 and not isinstance(positions, np.ndarray | jax.Array):
        values = values.astype(np.int32)
    if not np.issubdtype(values.dtype, np.integer):
        raise DTypeError(f"positions must be integers, got {values.dtype}.")
    if values.size:
        low, high = int(values.min()), int(values.max())
        if low < 0:
            raise RangeError(f"positions must be >= 0, got {low}.")
        if high > _INT32_MAX:
            raise RangeError(f"positions must be int32 (at most {_INT32_MAX}), got {high}.")
        if max_positions is not None and high >= max_positions:
            raise RangeError(f"positions must be below max_positions ({max_positions}), got {high}.")
    return jnp.asarray(values.astype(np.int32))


# jit: outside of one, a rotation would be forty small programs instead of one.
@functools.partial(jax.jit, static_argnums=(0, 2))
def _cos_sin(rope: RoPE, positions: jax.Array, dtype: np.dtype) -> tuple[jax.Array, jax.Array]:
    cos, sin = (_cos_sin64 if dtype == jnp.float64 else _cos_sin32)(rope, positions)
    factor = rope.attention_factor
    return (cos, sin) if factor == 1.0 else (cos * factor, sin * factor)


@functools.partial(jax.jit, static_argnums=0)
def _turned(rope: RoPE, x: jax.Array, positions: jax.Array) -> jax.Array:
    compute = jnp.dtype(jnp.float64 if x.dtype == jnp.float64 else jnp.float32)
    # Over heads, and over rows where positions have none: [.., T, 1, pairs].
    shape = (1,) * (x.ndim - 2 - positions.ndim) + positions.shape + (1, rope.num_pairs)
    cos, sin = (a.reshape(shape) for a in _cos_sin(rope, positions, compute))

    size = 2 * rope.num_pairs
    turning = x[..., :size].astype(compute)
    if rope.interleaved:
        a, b = turning[..., 0::2], turning[..., 1::2]
        turned = jnp.stack([a * cos - b * sin, b * cos + a * sin], axis=-1).reshape(turning.shape)
    else:
        a, b = jnp.split(turning, 2, axis=-1)
        turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
    turned = turned.astype(x.dtype)
    return turned if size == rope.head_dim else jnp.concatenate([turned, x[..., size:]], axis=-1)


def _magnitude(positions: jax.Array) -> jax.Array:
    """|positions| as uint32 with an axis for the pairs; right for -2^31 too."""
    unsigned = positions.astype(jnp.uint32)
    return jnp.where(positions < 0, jnp.uint32(0) - unsigned, unsigned)[..., None]


def _constant(row: np.ndarray, ndim: int) -> jax.Array:
    return jnp.asarray(row.reshape((1,) * (ndim - 1) + row.shape))


def _multiply_high(a: jax.Array, b: jax.Array) -> jax.Array:
    """The upper 32 bits of the 64-bit product of two uint32 (there is no uint64 without x64)."""
    low_mask, half = jnp.uint32(0xFFFF), jnp.uint32(16)
    a0, a1, b0, b1 = a & low_mask, a >> half, b & low_mask, b >> half
    middle = a1 * b0 + ((a0 * b0) >> half)
    other = a0 * b1 + (middle & low_mask)
    return a1 * b1 + (middle >> half) + (other >> half)


def _dynamic_ratio(fields: dict[str, Any], length: Any) -> Any:
    """NTK's stretch of the base, before its exponent; 1 at the original length."""
    original = fields["original_max_position_embeddings"]
    return 1.0 + fields["factor"] * ((length - original) / original)


def _dynamic_shrink(rope: RoPE, positions: jax.Array, dtype: Any) -> jax.Array:
    """What each row's frequencies are multiplied by: float[..., 1, rotary_dim // 2], at most 1.

    The base theta * r ** (d / (d - 2)) makes frequency i theta ** (-2i / d) times r ** (-2i / (d - 2)).
    """
    length = jnp.max(positions, axis=-1, keepdims=True, initial=0).astype(dtype) + 1
    ratio = jnp.maximum(_dynamic_ratio(dict(rope.scaling or ()), length), 1.0)[..., None]
    exponents = np.arange(rope.num_pairs) / (rope.num_pairs - 1)
    return jnp.exp(jnp.log(ratio) * -_constant(exponents.astype(dtype), ratio.ndim))


def _is_dynamic(rope: RoPE) -> bool:
    return dict(rope.scaling or ()).get("rope_type") == "dynamic"


def _cos_sin32(rope: RoPE, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    count = _magnitude(positions)
    high, low = (_constant(row, count.ndim) for row in _words(rope)[:2])
    if _is_dynamic(rope):
        shrink = _dynamic_shrink(rope, positions, jnp.float32)
        # 64-bit frequency times 32-bit fraction; a shrink of exactly 1 has no such fraction.
        fraction = jnp.minimum(shrink * 2.0**32, 2.0**32 - 256).astype(jnp.uint32)
        carried = high * fraction
        shrunk_low = carried + _multiply_high(low, fraction)
        shrunk_high = _multiply_high(high, fraction) + (shrunk_low < carried).astype(jnp.uint32)
        whole = shrink >= 1
        high, low = jnp.where(whole, high, shrunk_high), jnp.where(whole, low, shrunk_low)
    # Wrapping drops whole turns: what stays is the fraction of a turn, in units of 2^-32.
    turns = count * high + _multiply_high(count, low)
    quadrant = (turns + jnp.uint32(1 << 29)) >> jnp.uint32(30)
    rest = jax.lax.bitcast_convert_type(turns - (quadrant << jnp.uint32(30)), jnp.int32)
    return _from_quadrant(quadrant, rest.astype(jnp.float32) * (2 * math.pi / 2**32), positions)


def _cos_sin64(rope: RoPE, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The same with 64-bit turns, for float64 activations (only reached where x64 is enabled)."""
    count = _magnitude(positions).astype(jnp.uint64)
    if _is_dynamic(rope):
        frequency = _constant(rope.inv_freq, count.ndim) * _dynamic_shrink(rope, positions, jnp.float64)
        phase = positions[..., None].astype(jnp.float64) * frequency
        return jnp.cos(phase), jnp.sin(phase)
    high, middle, low = (_constant(row.astype(np.uint64), count.ndim) for row in _words(rope))
    turns = ((count * high) << jnp.uint64(32)) + count * middle + ((count * low) >> jnp.uint64(32))
    quadrant = (turns + jnp.uint64(1 << 61)) >> jnp.uint64(62)
    rest = jax.lax.bitcast_convert_type(turns - (quadrant << jnp.uint64(62)), jnp.int64)
    return _from_quadrant(quadrant, rest.astype(jnp.float64) * (2 * math.pi / 2**64), positions)


def _from_quadrant(quadrant: jax.Array, angle: jax.Array, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine of ``quadrant * pi / 2 + angle``, the sine negated for negative positions."""
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    odd = (quadrant & 1) == 1
    cos, sin = jnp.where(odd, sin, cos), jnp.where(odd, cos, sin)
    cos = jnp.where((quadrant == 1) | (quadrant == 2), -cos, cos)
    return cos, jnp.where((quadrant >= 2) ^ (positions < 0)[..., None], -sin, sin)
