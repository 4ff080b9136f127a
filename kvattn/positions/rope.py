"""RoPE: queries and keys turned to their positions."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import DTypeLike
from jaxtyping import Float, Float64, Int32

from kvattn import _checks
from kvattn.errors import ConfigError, DTypeError, RangeError, ShapeError
from kvattn.positions import phases
from kvattn.positions.phases import BY_LENGTH, CosSin
from kvattn.positions.scaling import (
    Spectrum,
    dynamic_ratio,
    frequencies,
    longrope_attention_factor,
    read_scaling,
    yarn_attention_factor,
)


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
            - ``longrope``: ``short_factor`` and ``long_factor``, a divisor for each pair,
              ``original_max_position_embeddings``, and ``attention_factor`` or what it follows from: ``factor``,
              which without it is as that of yarn (Phi-3, https://arxiv.org/abs/2402.13753). See below.
            - ``proportional``: of the pairs of a whole head, a share of ``partial_rotary_factor`` turns, the fastest;
              may have ``factor``, by which frequencies are divided (Gemma 4).

            ``rope_theta`` and (but for ``proportional``) ``partial_rotary_factor`` in the dict set `theta` and
            `rotary_dim`.
        rotary_dim: how many entries of a head turn (even), neighbours; the others pass through. None: all from
            `rotary_begin` on.
        rotary_begin: the first entry that turns. Latent attention (DeepSeek's MLA) has its rotary part behind a part
            without positions: ``RoPE(576, rotary_begin=512)``.
        interleaved: False pairs entry i of those that turn with i + rotary_dim // 2 (HuggingFace's
            ``rotate_half``); True pairs 2i with 2i + 1: neighbours, as GPT-J, Cohere, GLM, DeepSeek-V2 and V3 have
            them (and Meta's own Llama weights).
        max_positions: if given, positions must be below it. (There is no table: without it any
            int32 position is fine.)

    The kinds ``dynamic`` and ``longrope`` depend on a length. Each row of a call uses the largest position it is
    given, plus one; up to ``original_max_position_embeddings`` nothing is scaled, of longrope by the short divisors.
    For a whole prompt this is what transformers does. But keys rotated in an earlier, shorter call keep their
    earlier frequencies (in transformers too), so what comes out depends on how a prompt is cut into calls, and padding
    tokens count. `for_length` removes this: it fixes the length once, and with it the frequencies.
    The phases of ``dynamic`` inside a call are float32-accurate only relative to the phase (within 1e-6 of it,
    for stretches up to 10^5); `for_length` is as exact as the other kinds.

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
    rotary_begin: int = 0
    interleaved: bool = False
    max_positions: int | None = None

    def __post_init__(self) -> None:
        head_dim = _checks.integer("head_dim", self.head_dim, 1)
        theta = _checks.positive("theta", self.theta)
        kind, fields = read_scaling(self.scaling)

        # Newer checkpoints keep these two inside the dict.
        theta_in_dict = fields.pop("rope_theta", None)
        if theta_in_dict is not None:
            theta_in_dict = _checks.positive("scaling['rope_theta']", theta_in_dict)
            if theta not in (10000.0, theta_in_dict):
                raise ConfigError(f"theta is {theta} but scaling['rope_theta'] is {theta_in_dict}: give one of them.")
            theta = theta_in_dict
        if theta < 1:
            raise ConfigError(f"theta must be >= 1, got {theta}.")
        rotary_dim = self.rotary_dim
        fraction = None if kind == "proportional" else fields.pop("partial_rotary_factor", None)
        if fraction is not None:
            from_dict = int(head_dim * _checks.positive("scaling['partial_rotary_factor']", fraction))
            if rotary_dim not in (None, from_dict):
                raise ConfigError(
                    f"rotary_dim is {rotary_dim} but scaling['partial_rotary_factor'] ({fraction}) means {from_dict}."
                )
            rotary_dim = from_dict
        begin = _checks.integer("rotary_begin", self.rotary_begin, 0)
        rotary_dim = head_dim - begin if rotary_dim is None else _checks.integer("rotary_dim", rotary_dim, 2)
        if rotary_dim % 2 or not 2 <= rotary_dim <= head_dim - begin:
            room = f"head_dim ({head_dim})" if begin == 0 else f"head_dim - rotary_begin ({head_dim} - {begin})"
            raise ConfigError(f"RoPE turns pairs: rotary_dim must be even and between 2 and {room}, got {rotary_dim}.")
        if kind == "dynamic" and rotary_dim == 2:
            raise ConfigError("dynamic scaling needs rotary_dim > 2: its exponent is rotary_dim / (rotary_dim - 2).")
        if fields.get("partial_rotary_factor", 0) > 1:
            raise ConfigError(f"scaling['partial_rotary_factor'] must lie in (0, 1], got {dict(fields)}.")
        if kind == "yarn" and theta == 1:
            raise ConfigError("yarn scaling needs theta > 1, got 1.")
        for name in ("short_factor", "long_factor"):
            if name in fields and len(fields[name]) != rotary_dim // 2:
                raise ConfigError(
                    f"scaling['{name}'] must list a number for each of the {rotary_dim // 2} pairs that turn, got "
                    f"{len(fields[name])}."
                )
        if kind == "longrope" and fields["original_max_position_embeddings"] <= 1:
            raise ConfigError("longrope scaling needs original_max_position_embeddings > 1.")
        if not isinstance(self.interleaved, bool):
            raise DTypeError(f"interleaved must be a bool, got {self.interleaved!r}.")
        if self.max_positions is not None:
            object.__setattr__(self, "max_positions", _checks.integer("max_positions", self.max_positions, 1))

        scaling = None if kind == "default" else (("rope_type", kind), *sorted(fields.items()))
        sizes = {"head_dim": head_dim, "rotary_dim": rotary_dim, "rotary_begin": begin}
        for name, value in {**sizes, "theta": theta, "scaling": scaling}.items():
            object.__setattr__(self, name, value)

    @property
    def num_pairs(self) -> int:
        """How many pairs of a head turn: rotary_dim // 2."""
        return (self.rotary_dim or self.head_dim) // 2

    @property
    def _spectrum(self) -> Spectrum:
        scaling = None if self.scaling is None else tuple(dict(self.scaling).items())
        return Spectrum(self.theta, self.num_pairs, scaling)

    @property
    def inv_freq(self) -> Float64[np.ndarray, " pairs"]:
        """Radians per token of each pair (of ``dynamic`` and ``longrope``: at the original length)."""
        return np.array([float(f) for f in frequencies(self._spectrum)])

    @property
    def attention_factor(self) -> float:
        """What cos and sin are multiplied by: 1, except for ``yarn`` and ``longrope``."""
        spectrum = self._spectrum
        if spectrum.kind == "longrope":
            return longrope_attention_factor(spectrum.fields)
        return yarn_attention_factor(spectrum.fields) if spectrum.kind == "yarn" else 1.0

    @property
    def depends_on_length(self) -> bool:
        """Whether frequencies depend on how long a row is: those of ``dynamic`` and ``longrope``."""
        return self._spectrum.kind in BY_LENGTH

    def for_length(self, length: int) -> "RoPE":
        """This embedding with ``dynamic`` or ``longrope`` fixed at a sequence length; the other kinds as they are.

        Args:
            length: tokens, usually the capacity of the cache that the keys go to.
        """
        length = _checks.integer("length", length, 1)
        if not self.depends_on_length:
            return self
        if self._spectrum.kind == "longrope":
            fields = self._spectrum.fields
            chosen = "long_factor" if length > fields["original_max_position_embeddings"] else "short_factor"
            fixed = fields | {"short_factor": fields[chosen], "long_factor": fields[chosen]}
            return dataclasses.replace(self, scaling=fixed)
        ratio = max(float(dynamic_ratio(self._spectrum.fields, length)), 1.0)
        theta = self.theta * ratio ** (self.num_pairs / (self.num_pairs - 1))
        return dataclasses.replace(self, theta=theta, scaling=None)

    def behind(self, features: int) -> "RoPE":
        """This embedding for heads that have so many more entries in front, which do not turn.

        Args:
            features: how many.
        """
        features = _checks.integer("features", features, 0)
        return dataclasses.replace(self, head_dim=self.head_dim + features, rotary_begin=self.rotary_begin + features)

    def cos_sin(self, positions: Any, dtype: DTypeLike = jnp.float32) -> CosSin:
        """Cosine and sine of every pair's phase, times `attention_factor`.

        Args:
            positions: int[..., T]. Traced negative positions turn backwards; concrete ones are refused.
            dtype: float32, or float64 where JAX has it enabled.

        Raises:
            DTypeError: positions are not integers.
            RangeError: a position that can be looked at is negative, no int32, or not below `max_positions`.
        """
        return _cos_sin(self, _checked_positions(positions, self.max_positions), jnp.dtype(dtype))

    def __call__(self, x: Any, positions: Any, lengths: Any = None) -> Float[jax.Array, "*BT N H"]:
        """Turns queries or keys to their positions.

        Args:
            x: float[B, T, N, H], or float[T, N, H].
            positions: int[B, T] or int[T].
            lengths: int[B], or one int without B: the length of each row that ``dynamic`` and ``longrope`` go by. None:
                its largest position, plus one.

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

        if lengths is not None:
            lengths = jnp.asarray(lengths, jnp.int32)
            if lengths.shape != tokens[:-1]:
                raise ShapeError(
                    f"lengths must have shape {tokens[:-1]} for x of shape {x.shape}, got {lengths.shape}."
                )
        positions = _checked_positions(positions, self.max_positions)
        if lengths is None or not self.depends_on_length:
            return _turned(self, x, positions, None)
        return _turned(self, x, jnp.broadcast_to(positions, tokens), lengths[..., None])


def _checked_positions(positions: Any, max_positions: int | None) -> Int32[jax.Array, "*tokens"]:
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
        if high > _checks.INT32_MAX:
            raise RangeError(f"positions must be int32 (at most {_checks.INT32_MAX}), got {high}.")
        if max_positions is not None and high >= max_positions:
            raise RangeError(f"positions must be below max_positions ({max_positions}), got {high}.")
    return jnp.asarray(values.astype(np.int32))


# jit: outside of one, a rotation would be forty small programs instead of one.
@functools.partial(jax.jit, static_argnums=(0, 2))
def _cos_sin(
    rope: RoPE,
    positions: Int32[jax.Array, "*tokens"],
    dtype: np.dtype,
    lengths: Int32[jax.Array, "*rows 1"] | None = None,
) -> CosSin:
    cos, sin = phases.cos_sin(rope._spectrum, positions, dtype, lengths)
    factor = rope.attention_factor
    return (cos, sin) if factor == 1.0 else (cos * factor, sin * factor)


@functools.partial(jax.jit, static_argnums=0)
def _turned(
    rope: RoPE,
    x: Float[jax.Array, "*BT N H"],
    positions: Int32[jax.Array, "*tokens"],
    lengths: Int32[jax.Array, "*rows 1"] | None,
) -> Float[jax.Array, "*BT N H"]:
    compute = jnp.dtype(jnp.float64 if x.dtype == jnp.float64 else jnp.float32)
    # Over heads, and over rows where positions have none: [.., T, 1, pairs].
    shape = (1,) * (x.ndim - 2 - positions.ndim) + positions.shape + (1, rope.num_pairs)
    cos, sin = (a.reshape(shape) for a in _cos_sin(rope, positions, compute, lengths))

    begin, end = rope.rotary_begin, rope.rotary_begin + 2 * rope.num_pairs
    turning = x[..., begin:end].astype(compute)
    if rope.interleaved:
        a, b = turning[..., 0::2], turning[..., 1::2]
        turned = jnp.stack([a * cos - b * sin, b * cos + a * sin], axis=-1).reshape(turning.shape)
    else:
        a, b = jnp.split(turning, 2, axis=-1)
        turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
    turned = turned.astype(x.dtype)
    around = x[..., :begin], turned, x[..., end:]
    return turned if turned.shape == x.shape else jnp.concatenate([part for part in around if part.shape[-1]], axis=-1)
