"""What the TPU kernel multiplies: one head of one tile of encoded keys or values, widened on its way.

An array of tokens and features lies with the features along the lanes ([R, F]) if they fill them, and with the tokens
along the lanes ([F, R]) otherwise: XLA lays it so, whatever the order of its axes, and a kernel that asks for the other
order would have all of the cache copied.
"""

import dataclasses
import typing
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from kvattn._typing import Array
from kvattn.codecs import Codec, Float8, Int4
from kvattn.codecs.float8 import widen
from kvattn.codecs.grouped import segments
from kvattn.codecs.int4 import BITS
from kvattn.pallas import tpu_bits

LANES, SUBLANES = 128, 8
RUN = 32
"""Channels of an `Int4` group come in runs of as many as four-bit numbers lie in one row of registers."""


def tokens_last(features: int) -> bool:
    """Whether XLA lays [tokens, features] with the tokens along the lanes."""
    return features % LANES != 0


def refuses(codec: Codec, head_dim: int, data: Array, tokens: int) -> str | None:
    """Why an array of `tokens` neighbouring tokens cannot be read where it lies; None: it can."""
    features = data.shape[-1]
    if isinstance(codec, Int4):
        if head_dim % (2 * RUN) or not tokens_last(features):
            return f"it reads {codec} for heads of an odd multiple of 64 or of 128, not of {head_dim}"
        if codec.group_size % RUN:
            return f"it reads Int4 in groups of a multiple of {RUN}, not of {codec.group_size}"
    if not tokens_last(features):
        return None
    if features % SUBLANES:
        return f"heads of {head_dim} fill neither rows nor columns of registers: all of the cache would be copied"
    if tokens % LANES:
        return (
            f"heads of {head_dim} lie with their tokens last on TPUs, where {tokens} of them (no multiple of {LANES}) "
            "leave gaps: all of the cache would be copied"
        )
    return None


def ordered(x: Array, codec: Codec) -> Array:
    """Features [..., H] in the order in which the kernel has them."""
    if not isinstance(codec, Int4):
        return x
    runs = segments(x.shape[-1], BITS, codec.group_size)
    return jnp.concatenate([x[..., first + odd : end : 2] for *_, first, end in runs for odd in (0, 1)], axis=-1)


def restored(x: Array, codec: Codec) -> Array:
    """The inverse of `ordered`."""
    if not isinstance(codec, Int4):
        return x
    runs = segments(x.shape[-1], BITS, codec.group_size)
    pair = lambda run: run.reshape(*x.shape[:-1], 2, -1).swapaxes(-1, -2).reshape(run.shape)
    return jnp.concatenate([pair(x[..., first:end]) for *_, first, end in runs], axis=-1)


@typing.no_type_check
@dataclasses.dataclass(frozen=True)
class Store:
    """Keys or values inside the kernel.

    Attributes:
        parts: the blocks of each array: one [1, 1, K, ...], or for pages some [K, 1, ...].
        codec: how they are stored.
        last: whether the data lies with its tokens last.
        head_dim: H.
        wide: dtype of the products' operands.
    """

    parts: dict[str, list[Any]]
    codec: Codec
    last: bool
    head_dim: int
    wide: Any

    def scores(self, query: Array, k: int, scale: float) -> Array:
        """float32 [M, R]: scale * query [M, H] times the keys of head k."""
        if isinstance(self.codec, Int4):
            return self._grouped_scores(self.codec, query, k, scale)
        scores = self._product(query, self._data(k).astype(self.wide), along_tokens=False)
        return scores * (self._row("scale", k) * scale if "scale" in self.parts else scale)

    def mix(self, probs: Array, k: int, filled: Array | None) -> Array:
        """float32 [M, H]: probs float32 [M, R] times the values of head k.

        Args:
            probs: 0 where nothing is to be read.
            k: the head.
            filled: bool [1, R], the slots that hold something; None: all do.
        """
        if isinstance(self.codec, Int4):
            return self._grouped_mix(self.codec, probs, k, filled)
        if "scale" in self.parts:
            factor = self._row("scale", k)
            probs = probs * (factor if filled is None else jnp.where(filled, factor, 0.0))
        values = self._data(k)
        # What lies in an unused slot may be NaN, and a probability of 0 does not undo it.
        if filled is not None and jnp.issubdtype(values.dtype, jnp.floating):
            if not self.last:
                filled = jnp.broadcast_to(jnp.where(filled, 1, 0), (SUBLANES, filled.shape[1])).T[:, :1] > 0
            values = jnp.where(filled, values.astype(jnp.float32), 0.0)
        return self._product(probs.astype(self.wide), values.astype(self.wide), along_tokens=True)

    def _data(self, k: int) -> Array:
        """[R, H] or [H, R]."""
        tile = _joined(self.parts["data"], k, axis=1 if self.last else 0)
        return widen(tile) if isinstance(self.codec, Float8) else tile

    def _row(self, name: str, k: int) -> Array:
        """[1 or groups, R] of an array whose tokens always lie last."""
        return _joined(self.parts[name], k, axis=1)

    def _product(self, rows: Array, tile: Array, *, along_tokens: bool) -> Array:
        axis = 1 if along_tokens == self.last else 0
        precision = jax.lax.Precision.HIGHEST if self.wide == jnp.float32 else None
        return jax.lax.dot_general(
            rows, tile, (((1,), (axis,)), ((), ())), precision=precision, preferred_element_type=jnp.float32
        )

    # Four bits.

    def _groups(self, codec: Int4, k: int) -> list[tuple[int, int, Array, Array, Array]]:
        """Of each group: its channels (first, end), their codes + offset [channels, R], scale and minimum [1, R]."""
        words = [self._words(part, k) for part in self.parts["data"]]
        step, low = tpu_bits.pair(self._row("scale", k), self._row("minimum", k))
        width, size = self.head_dim // 2, codec.group_size
        codes: dict[int, list[Array]] = {}
        for plane, group, first, end in segments(self.head_dim, BITS, size):
            at = slice((first - plane * width) // 4, (end - plane * width) // 4)
            run = _beside([w[at] for w in words], axis=1)
            codes.setdefault(group, []).extend(tpu_bits.nibbles(run, plane, odd) for odd in (0, 1))
        groups = []
        for g, runs in codes.items():
            bits = _beside(runs, axis=0).astype(self.wide)
            if self._offset == 0:
                bits = bits - tpu_bits.OFFSET
            groups.append((g * size, min((g + 1) * size, self.head_dim), bits, step[g : g + 1], low[g : g + 1]))
        return groups

    @property
    def _offset(self) -> int:
        """What is too much in the codes that are multiplied. float32 products must not lose digits to it."""
        return tpu_bits.OFFSET if self.wide == jnp.bfloat16 else 0

    @staticmethod
    def _words(part: Any, k: int) -> Array:
        """uint32 [F / 4, R] of bytes [F, R]: four neighbouring rows to a word, the first lowest."""
        return pltpu.bitcast(part[0, 0, k] if len(part.shape) == 5 else part[k, 0], jnp.uint32)

    def _grouped_scores(self, codec: Int4, query: Array, k: int, scale: float) -> Array:
        """Per group: scale * (query . codes) + minimum * sum(query)."""
        total: Any = 0
        for first, end, codes, step, low in self._groups(codec, k):
            rows = query[:, first:end]
            mean = jnp.sum(rows.astype(jnp.float32), axis=1, keepdims=True)
            product = self._product(rows, codes, along_tokens=False)
            total = total + product * (step * scale) + mean * ((low - self._offset * step) * scale)
        return total

    def _grouped_mix(self, codec: Int4, probs: Array, k: int, filled: Array | None) -> Array:
        """Per group: (probs * scale) . codes + probs . minimum."""
        parts = []
        for _, _, codes, step, low in self._groups(codec, k):
            if filled is not None:
                step, low = (jnp.where(filled, x, 0.0) for x in (step, low))
            weights = (probs * step).astype(self.wide)
            # The offset comes off the weights as they were rounded.
            mean = jnp.sum(probs * low - self._offset * weights.astype(jnp.float32), axis=1, keepdims=True)
            parts.append(self._product(weights, codes, along_tokens=True) + mean)
        return _beside(parts, axis=1)


def _joined(parts: list, k: int, axis: int) -> Array:
    """The tile of head k; pages one behind the other along `axis`."""
    return _beside([part[0, 0, k] if len(part.shape) == 5 else part[k, 0] for part in parts], axis)


def _beside(arrays: list[Array], axis: int) -> Array:
    return arrays[0] if len(arrays) == 1 else jnp.concatenate(arrays, axis=axis)
