"""What the codecs share that keep one scale per token and key/value head."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Float32, Shaped

from kvattn import _target
from kvattn._typing import Array, Encoded
from kvattn.codecs.base import accumulator

SMALLEST = np.finfo(np.float32).tiny
"""The least scale. Smaller ones would be subnormal, which many devices take for 0."""


def scale_for(x: Float[Array, "*shape H"], top: float) -> Float32[Array, "*shape 1"]:
    """max|x| / top over the last axis. Never 0; NaN where x is not finite."""
    size = jnp.abs(x.astype(jnp.float32))
    # NaN is infinite here: on CPUs XLA's largest number may pass over it.
    size = jnp.where(size <= np.finfo(np.float32).max, size, np.float32(np.inf))
    return scale_of(jnp.max(size, axis=-1, keepdims=True), top)


def scale_of(largest: Float32[Array, "*shape"], top: float) -> Float32[Array, "*shape"]:
    """The scale where the largest number is this one; in kernels too."""
    # top * scale must not overflow where max|x| is the largest float32.
    highest = np.float32(np.finfo(np.float32).max / top * (1 - 1e-6))
    scale = jnp.clip(largest * np.float32(1 / top), SMALLEST, highest)
    return jnp.where(largest <= np.finfo(np.float32).max, scale, np.float32(np.nan))


def reciprocal(scale: Float32[Array, "*shape"]) -> Float32[Array, "*shape"]:
    """What numbers are multiplied by to be divided by their scale.

    Compilers make this of such a division, some of them; written out, codes have the same bits everywhere. Scales are
    neither too small nor too large for it. In kernels too.
    """
    return np.float32(1) / scale


def factors(spec: str, rows: Float[Array, "..."], codes: Shaped[Array, "..."]) -> Float[Array, "..."]:
    """An einsum of float rows with codes, which every float dtype holds exactly; float32 or wider.

    The codes are widened one block at a time: to the dtype of the rows, on CPUs to float32 at least.
    """
    acc = accumulator(rows.dtype)
    wide = acc if _target.platform() == "cpu" else rows.dtype
    return jnp.einsum(spec, rows.astype(wide), codes.astype(wide), preferred_element_type=acc)


def mix_scaled(
    probs: Float[Array, "B K M R"], values: Encoded, filled: Bool[Array, "B #K R"]
) -> Float[Array, "B K M H"]:
    """(probs * scale) . data, with nothing of what lies in slots that are not filled."""
    scale = jnp.where(filled[:, :, None], values["scale"], 0)
    data = values["data"]
    if jnp.issubdtype(data.dtype, jnp.floating):
        data = jnp.where(filled[..., None], data, 0)
    return factors("bkmr,bkrh->bkmh", probs * scale.astype(probs.dtype), data)
