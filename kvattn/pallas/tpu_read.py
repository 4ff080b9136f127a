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
import numpy as np
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike
from jaxtyping import Shaped

from kvattn._typing import Array
from kvattn.codecs import Codec, Format
from kvattn.codecs.grouped import num_groups
from kvattn.pallas import tpu_bits
from kvattn.pallas.interpreter import interpreted

LANES, SUBLANES = 128, 8
GROUPS = (1, 2, 4, 8)
"""Of `Int4` per token and head; scales of other numbers of groups XLA lays otherwise than kernels read them."""


def tokens_last(features: int) -> bool:
    """Whether XLA lays [tokens, features] with the tokens along the lanes."""
    return features % LANES != 0


def refuses(codec: Codec, head_dim: int, data: Shaped[Array, "..."], tokens: int) -> str | None:
    """Why an array of `tokens` neighbouring tokens cannot be read where it lies; None: it can."""
    features, form = data.shape[-1], codec.format
    if form is not None and form.is_grouped:
        if head_dim % 64 or not tokens_last(features):
            return f"it reads {codec} for heads of an odd multiple of 64 or of 128, not of {head_dim}"
        if num_groups(head_dim, form.group_size) not in GROUPS:
            return f"it reads Int4 in 1, 2, 4 or 8 groups per head, not {codec} for heads of {head_dim}"
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


def row_groups(form: Format, head_dim: int) -> int:
    """How many rows a query takes: one for each group of channels that share a scale."""
    return num_groups(head_dim, form.group_size) if form.is_grouped else 1


def spread(query: Array, form: Format, native: tpu_bits.Native, beside: int = 1) -> Array:
    """Rows [..., M, H] as `Store.scores` wants them: of groups [..., G M, H], each group's channels in rows alone.

    Where tokens lie side by side, [..., 2 M, 2 H]: rows for those on the left, and rows for those on the right.
    """
    if beside > 1:
        zeros = jnp.zeros_like(query)
        sides = [jnp.concatenate(pair, axis=-1) for pair in ((query, zeros), (zeros, query))]
        return jnp.concatenate(sides, axis=-2)
    if not form.is_grouped:
        return query
    query, groups = _turned(query, native), _turned(np.arange(query.shape[-1]), native) // form.group_size
    alone = [jnp.where(groups == g, query, jnp.zeros_like(query)) for g in range(groups.max() + 1)]
    return jnp.concatenate(alone, axis=-2)


def restored(out: Array, form: Format, native: tpu_bits.Native, beside: int = 1) -> Array:
    """What `Store.mix` gives, [..., G M, H], as [..., M, H] with its channels in order; or [..., 2 H] of both sides."""
    if beside > 1:
        return out.reshape(*out.shape[:-1], beside, -1).sum(axis=-2)
    if not form.is_grouped:
        return out
    features = out.shape[-1]
    groups = _turned(np.arange(features), native) // form.group_size
    parts = out.reshape(*out.shape[:-2], groups.max() + 1, -1, features)
    # Rows of a group are good for its own channels.
    alone = sum(jnp.where(groups == g, parts[..., g, :, :], 0) for g in range(parts.shape[-3]))
    return _turned(jnp.asarray(alone), native, back=True)


def _turned(x: Any, native: tpu_bits.Native, back: bool = False) -> Any:
    """Channels [..., H] in the order in which codes of four bits unpack; or `back` from it."""
    half = x.shape[-1] // 2
    if native.int4:  # of each byte one half, then the other
        cut = (half, 2) if back else (2, half)
    else:  # one half of all bytes, first of even ones, then of odd ones; then the other half
        cut = (2, 2, half // 2) if back else (2, half // 2, 2)
    return x.reshape(*x.shape[:-1], *cut).swapaxes(-1, -2).reshape(x.shape)


@typing.no_type_check
@dataclasses.dataclass(frozen=True)
class Store:
    """Keys or values inside the kernel.

    Attributes:
        parts: of each array, what was fetched of it part by part: [K, ...] each.
        format: how they are stored.
        last: whether the data lies with its tokens last.
        wide: dtype of the products' operands.
        native: what the device has instructions for.
        places: where scales of several pages come in one row [1, K, 128]: which of them is that of each part (`ready`).
            Empty: each comes alone.
        page_size: slots per part then.
        pages_beside: how many there are in a row.
        beside: how many tokens lie side by side. Then the slots of a tile come side by side too: those on the left of
            all its pages first.
    """

    parts: dict[str, list[Any]]
    format: Format
    last: bool
    wide: DTypeLike
    native: tpu_bits.Native
    places: tuple[Any, ...] = ()
    page_size: int = 0
    pages_beside: int = 1
    beside: int = 1

    def ready(self) -> "Store":
        """The same with the scales of all parts of all heads in order, once they have come."""
        if not self.places:
            return self
        width = LANES // self.pages_beside
        turned = [
            pltpu.roll(part[0], (self.pages_beside - at) % self.pages_beside * width, 1)[:, : self.page_size]
            for part, at in zip(self.parts["scale"], self.places, strict=True)
        ]
        scales = _beside(self._in_order(turned), axis=1)
        return dataclasses.replace(self, parts={**self.parts, "scale": [scales[:, None]]}, places=())

    def scores(self, query: Array, k: int, scale: float, filled: Array | None) -> Array:
        """float32 [M, R]: scale * query [M, H] (`spread`) times the keys of head k; `filled` as in `mix`."""
        if self.format.is_grouped:
            return self._grouped_scores(query, k, scale)
        keys = self._data(k)
        if self.beside > 1:
            # A product with the token on one side has that on the other in it, times 0, which does not undo NaN.
            keys = self._cleared(keys, filled)
        scores = self._product(query, keys.astype(self.wide), along_tokens=False)
        if self.beside > 1:
            scores = _beside(_halves(scores, 0), axis=1)
        scale = scale * self._unit
        return scores * (self._row("scale", k) * scale if "scale" in self.parts else scale)

    def mix(self, probs: Array, k: int, filled: Array | None) -> Array:
        """float32 [M, H]: probs float32 [M, R] times the values of head k.

        Args:
            probs: 0 where nothing is to be read.
            k: the head.
            filled: bool [1, R], the slots that hold something; None: all do.
        """
        if self.format.is_grouped:
            return self._grouped_mix(probs, k, filled)
        if "scale" in self.parts:
            factor = self._row("scale", k)
            probs = probs * (factor if filled is None else jnp.where(filled, factor, 0.0))
        # What lies in an unused slot may be NaN, and a probability of 0 does not undo it.
        probs, values = probs.astype(self.wide), self._cleared(self._data(k), filled).astype(self.wide)
        if self.beside == 1:
            return self._product(probs, values, along_tokens=True) * self._unit
        left, right = _halves(self._product(_beside(_halves(probs, 1), axis=0), values, along_tokens=True), 0)
        return jnp.where(self._is_left(left.shape), left, right) * self._unit

    def _cleared(self, tile: Array, filled: Array | None) -> Array:
        """A tile [...] as `_data` gives it with 0 in slots that hold nothing, which bool [1, R] tells; None: all do."""
        if filled is None or not (self.format.is_plain or self._is_float8):
            return tile  # no code is read as NaN
        if self.beside > 1:
            left, right = (_upright(half) for half in _halves(filled, 1))
            filled = jnp.where(self._is_left(tile.shape), left, right) > 0
        elif not self.last:
            filled = _upright(filled) > 0
        return jnp.where(filled, tile.astype(jnp.float32), 0.0)

    def _is_left(self, shape: tuple[int, ...]) -> Array:
        """bool [..., 2 H]: which columns are of the tokens on the left."""
        return jax.lax.broadcasted_iota(jnp.int32, shape, len(shape) - 1) < shape[-1] // 2

    def _data(self, k: int) -> Array:
        """[R, H] or [H, R], in `_unit`."""
        tile = _beside([part[k] for part in self.parts["data"]], axis=1 if self.last else 0)
        if self.format.dtype != jnp.float8_e4m3fn:
            return tile
        # The bits of a cache that was made for a CPU have another type.
        return jax.lax.bitcast_convert_type(tile, jnp.float8_e4m3fn) if self._is_float8 else tpu_bits.float8(tile)

    @property
    def _is_float8(self) -> bool:
        """Whether `_data` is float8_e4m3fn, which knows NaN: that the device reads, or is too short for words."""
        rows = sum(part.shape[1] for part in self.parts["data"])
        return self.format.dtype == jnp.float8_e4m3fn and (self.native.float8 or rows % 4 > 0)

    @property
    def _unit(self) -> int:
        """What products with `_data` are to be multiplied by."""
        return tpu_bits.FLOAT8_UNIT if self.format.dtype == jnp.float8_e4m3fn and not self._is_float8 else 1

    def _row(self, name: str, k: int) -> Array:
        """[1 or groups, R] of an array whose tokens always lie last."""
        parts = self.parts[name]
        if len(parts) == 1:
            return parts[0][k]
        return _beside(self._in_order([part[k] for part in parts]), axis=1)

    def _in_order(self, rows: list[Array]) -> list[Array]:
        """Numbers of the slots of pages [..., R] in the order in which a tile has them."""
        if self.beside == 1:
            return rows
        left, right = zip(*(_halves(row, 1) for row in rows), strict=True)
        return [*left, *right]

    def _product(self, rows: Array, tile: Array, *, along_tokens: bool) -> Array:
        """float32 [M, R] of rows [M, H], or `along_tokens` [M, H] of rows [M, R], with a tile as `_data` gives it."""
        axis = 1 if along_tokens == self.last else 0
        if interpreted("tpu"):
            # XLA on CPUs would fuse the widening of codes into the product, and add up less exactly then.
            tile = jax.lax.optimization_barrier(tile)
        precision = jax.lax.Precision.HIGHEST if self.wide == jnp.float32 else None
        return jax.lax.dot_general(
            rows, tile, (((1,), (axis,)), ((), ())), precision=precision, preferred_element_type=jnp.float32
        )

    # Four bits.

    def _codes(self, k: int) -> Array:
        """[H, R] with `_offset` added, in the order of `_turned`."""
        words = _beside([pltpu.bitcast(part[k], jnp.uint32) for part in self.parts["data"]], axis=1)
        if self.native.int4:
            return tpu_bits.signed(words).astype(self.wide)
        codes = [tpu_bits.nibbles(words, plane, odd) for plane in (0, 1) for odd in (0, 1)]
        codes = _beside(codes, axis=0).astype(self.wide)
        return codes - (tpu_bits.OFFSET - self._offset) if self._offset != tpu_bits.OFFSET else codes

    @property
    def _offset(self) -> int:
        """What is too much in the codes that are multiplied. In float32 they lie around 0, which is most exact."""
        return tpu_bits.OFFSET if self.wide == jnp.bfloat16 and not self.native.int4 else -tpu_bits.CENTRE

    def _pair(self, k: int) -> tuple[Array, Array]:
        """float32 [G, R] scale and minimum of each group."""
        return tpu_bits.pair(self._row("scale", k), self._row("minimum", k))

    def _grouped_scores(self, query: Array, k: int, scale: float) -> Array:
        """float32 [G M, R]: scale * (query . codes) + minimum * sum(query), added up; the same for every group.

        The query [G M, H] is `spread`.
        """
        step, low = self._pair(k)
        groups, rows = step.shape[0], query.shape[0]
        sums = jnp.sum(query.astype(jnp.float32), axis=1, keepdims=True)
        total = self._product(query, self._codes(k), along_tokens=False) * _by_group(step * scale, rows)
        total = total + sums * _by_group((low - self._offset * step) * scale, rows)
        shift = rows // groups
        while shift < rows:
            total, shift = total + pltpu.roll(total, shift, 0), 2 * shift
        return total

    def _grouped_mix(self, probs: Array, k: int, filled: Array | None) -> Array:
        """float32 [G M, H], good for a group's channels in its rows: (probs * scale) . codes + probs . minimum."""
        step, low = self._pair(k)
        if filled is not None:
            step, low = (jnp.where(filled, x, 0.0) for x in (step, low))
        weights = (probs * _by_group(step, probs.shape[0])).astype(self.wide)
        if self._offset > 0:
            # Larger than the codes: it comes off the weights as they were rounded.
            mean = probs * _by_group(low, probs.shape[0]) - self._offset * weights.astype(jnp.float32)
        else:
            mean = probs * _by_group(low - self._offset * step, probs.shape[0])
        products = self._product(weights, self._codes(k), along_tokens=True)
        return products + jnp.sum(mean, axis=1, keepdims=True)


def _by_group(x: Array, rows: int) -> Array:
    """[G M, R], `rows` of them, of numbers [G, R] of the groups."""
    groups, tokens = x.shape
    return _beside([jnp.broadcast_to(x[g : g + 1], (rows // groups, tokens)) for g in range(groups)], axis=0)


def _halves(x: Array, axis: int) -> list[Array]:
    """A matrix [...] cut in two along `axis`."""
    size = x.shape[axis] // 2
    return [jax.lax.slice_in_dim(x, n * size, (n + 1) * size, axis=axis) for n in range(2)]


def _upright(filled: Array) -> Array:
    """int32 [R, 1] of bool [1, R]."""
    return jnp.broadcast_to(jnp.where(filled, 1, 0), (SUBLANES, filled.shape[1])).T[:, :1]


def _beside(arrays: list[Array], axis: int) -> Array:
    """Matrices [...] joined along `axis`."""
    return arrays[0] if len(arrays) == 1 else jnp.concatenate(arrays, axis=axis)
