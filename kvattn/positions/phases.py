"""Cosines and sines of phases, exact to about 1e-7 rad at every int32 position.

`position * frequency` in float32 is wrong by 0.06 rad at position 10^6 and by whole turns at 2^31; so frequencies are
kept as fixed-point turns per token, the product is taken in wrapping integers, which drops the whole turns without
rounding, and only what is left, at most an eighth of a turn, becomes a float.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Float, Int32, Shaped, UInt, UInt32

from kvattn.positions.scaling import TWO_PI, Spectrum, dynamic_ratio, frequencies

PHASE_ERROR = 2.0**-22
"""Declared bound on |cos - exact cos| and |sin - exact sin| in float32, for every int32 position."""

BY_LENGTH = ("dynamic", "longrope")
"""The scalings whose frequencies depend on how long a row is."""

CosSin = tuple[Float[jax.Array, "*tokens pairs"], Float[jax.Array, "*tokens pairs"]]


def cos_sin(
    spectrum: Spectrum,
    positions: Int32[jax.Array, "*tokens"],
    dtype: np.dtype,
    lengths: Int32[jax.Array, "*rows 1"] | None = None,
) -> CosSin:
    """Cosine and sine of every pair's phase.

    Args:
        spectrum: frequencies.
        positions: of each row's tokens.
        dtype: float32 or float64.
        lengths: by which frequencies that depend on a length go. None: the row's largest position, plus one.
    """
    if lengths is None and spectrum.kind in BY_LENGTH:
        lengths = jnp.max(positions, axis=-1, keepdims=True, initial=0) + 1
    return (_cos_sin64 if dtype == jnp.float64 else _cos_sin32)(spectrum, positions, lengths)


@functools.lru_cache(maxsize=256)
def _words(spectrum: Spectrum) -> UInt32[np.ndarray, "3 pairs"]:
    """Turns per token modulo 1 as 96-bit fixed point, highest word first."""
    fixed = [round(f / TWO_PI * 2**96) for f in frequencies(spectrum)]
    return np.array([[(v >> shift) & 0xFFFFFFFF for v in fixed] for shift in (64, 32, 0)], np.uint32)


def _magnitude(positions: Int32[jax.Array, "*tokens"]) -> UInt32[jax.Array, "*tokens 1"]:
    """|positions| with an axis for the pairs; right for -2^31 too."""
    unsigned = positions.astype(jnp.uint32)
    return jnp.where(positions < 0, jnp.uint32(0) - unsigned, unsigned)[..., None]


def _constant(row: Shaped[np.ndarray, " pairs"], ndim: int) -> Shaped[jax.Array, "*ones pairs"]:
    return jnp.asarray(row.reshape((1,) * (ndim - 1) + row.shape))


def _multiply_high(a: UInt32[jax.Array, "*#shape"], b: UInt32[jax.Array, "*#shape"]) -> UInt32[jax.Array, "..."]:
    """The upper 32 bits of the 64-bit product of two uint32 (there is no uint64 without x64)."""
    low_mask, half = jnp.uint32(0xFFFF), jnp.uint32(16)
    a0, a1, b0, b1 = a & low_mask, a >> half, b & low_mask, b >> half
    middle = a1 * b0 + ((a0 * b0) >> half)
    other = a0 * b1 + (middle & low_mask)
    return a1 * b1 + (middle >> half) + (other >> half)


def _turns(
    spectrum: Spectrum, ndim: int, lengths: Int32[jax.Array, "*rows 1"] | None, dtype: DTypeLike
) -> tuple[UInt[jax.Array, "..."], ...]:
    """The words of `_words` for the pairs of every row, which differ from row to row where the scaling is longrope."""
    short = [_constant(row.astype(dtype), ndim) for row in _words(spectrum)]
    if spectrum.kind != "longrope":
        return tuple(short)
    assert lengths is not None
    is_long = (lengths > math.floor(spectrum.fields["original_max_position_embeddings"]))[..., None]
    long = (_constant(row.astype(dtype), ndim) for row in _words(spectrum.long))
    return tuple(jnp.where(is_long, b, a) for a, b in zip(short, long, strict=True))


def _dynamic_shrink(
    spectrum: Spectrum, lengths: Int32[jax.Array, "*rows 1"], dtype: DTypeLike
) -> Float[jax.Array, "*rows 1 pairs"]:
    """What each row's frequencies are multiplied by, at most 1.

    The base theta * r ** (d / (d - 2)) makes frequency i theta ** (-2i / d) times r ** (-2i / (d - 2)).
    """
    ratio = jnp.maximum(dynamic_ratio(spectrum.fields, lengths.astype(dtype)), 1.0)[..., None]
    exponents = np.arange(spectrum.num_pairs) / (spectrum.num_pairs - 1)
    return jnp.exp(jnp.log(ratio) * -_constant(exponents.astype(dtype), ratio.ndim))


def _cos_sin32(
    spectrum: Spectrum, positions: Int32[jax.Array, "*tokens"], lengths: Int32[jax.Array, "*rows 1"] | None
) -> CosSin:
    count = _magnitude(positions)
    high, low, _ = _turns(spectrum, count.ndim, lengths, jnp.uint32)
    if spectrum.kind == "dynamic":
        assert lengths is not None
        shrink = _dynamic_shrink(spectrum, lengths, jnp.float32)
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


def _cos_sin64(
    spectrum: Spectrum, positions: Int32[jax.Array, "*tokens"], lengths: Int32[jax.Array, "*rows 1"] | None
) -> CosSin:
    """The same with 64-bit turns, for float64 activations (only reached where x64 is enabled)."""
    count = _magnitude(positions).astype(jnp.uint64)
    if spectrum.kind == "dynamic":
        assert lengths is not None
        frequency = _constant(np.array([float(f) for f in frequencies(spectrum)]), count.ndim) * _dynamic_shrink(
            spectrum, lengths, jnp.float64
        )
        phase = positions[..., None].astype(jnp.float64) * frequency
        return jnp.cos(phase), jnp.sin(phase)
    high, middle, low = _turns(spectrum, count.ndim, lengths, jnp.uint64)
    turns = ((count * high) << jnp.uint64(32)) + count * middle + ((count * low) >> jnp.uint64(32))
    quadrant = (turns + jnp.uint64(1 << 61)) >> jnp.uint64(62)
    rest = jax.lax.bitcast_convert_type(turns - (quadrant << jnp.uint64(62)), jnp.int64)
    return _from_quadrant(quadrant, rest.astype(jnp.float64) * (2 * math.pi / 2**64), positions)


def _from_quadrant(
    quadrant: UInt[jax.Array, "*tokens pairs"],
    angle: Float[jax.Array, "*tokens pairs"],
    positions: Int32[jax.Array, "*tokens"],
) -> CosSin:
    """Cosine and sine of ``quadrant * pi / 2 + angle``, the sine negated for negative positions."""
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    odd = (quadrant & 1) == 1
    cos, sin = jnp.where(odd, sin, cos), jnp.where(odd, cos, sin)
    cos = jnp.where((quadrant == 1) | (quadrant == 2), -cos, cos)
    return cos, jnp.where((quadrant >= 2) ^ (positions < 0)[..., None], -sin, sin)
