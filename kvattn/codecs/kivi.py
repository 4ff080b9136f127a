"""`KIVI`: 2 or 4 bits, keys per channel, values per token, the last ones as they are (Liu et al., arXiv:2402.02750)."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Float32, Int32, Shaped

from kvattn import _checks, _manual
from kvattn._typing import Array, Encoded, Rows
from kvattn.codecs import grouped
from kvattn.codecs.base import Codec, Role, accumulator, not_finite
from kvattn.codecs.blocks import Blocks
from kvattn.codecs.plain import Plain, product
from kvattn.codecs.registry import register
from kvattn.codecs.scaled import factors
from kvattn.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class KIVI(Codec):
    """Keys in groups of `group_size` tokens of one channel, values in groups of `group_size` channels of one token.

    Of n tokens, n % residual keys and up to `residual` values are kept as they came. When that many keys are together
    all of them are encoded together; each new value pushes the oldest of its ring into the encoded ones. A number is
    minimum + scale * code, off by scale/2 at most. bits + 32/group_size bits per number (3 for 2 bits and groups of
    32), besides the residual.

    The step that fills the residual already reads it encoded; the paper's code reads it once more as it was. New tokens
    of one chunk see each other as they are, as in the paper, so outputs (the cache never) depend on the chunking.

    It needs a policy under which slot s holds the token of position s for ever (`Full`): a group of keys shares its
    scales, so single slots cannot be given to other tokens.

    Derivatives pass straight through to the keys and values of the call, and to the last `residual` of earlier calls,
    which are there as they came, whether they are read as codes by now or not. Older ones are constants.

    Args:
        bits: 2, 4 or 8.
        group_size: tokens (keys) or channels (values) that share a scale and a minimum.
        residual: R, tokens kept as they are; a multiple of group_size.

    Raises:
        ConfigError: other bits, a residual that groups do not divide.
    """

    bits: int = 2
    group_size: int = 32
    residual: int = 128

    token_minor: ClassVar[tuple[str, ...]] = ()

    stores_alike: ClassVar[bool] = False
    """Keys share scales along tokens, values along channels."""

    def __post_init__(self):
        if _checks.integer("bits", self.bits, 1) not in (2, 4, 8):
            raise ConfigError(f"bits must be 2, 4 or 8, got {self.bits}.")
        _checks.integer("group_size", self.group_size, 1)
        _checks.integer("residual", self.residual, 1)
        if self.residual % self.group_size:
            raise ConfigError(
                f"residual ({self.residual}) must be a multiple of group_size ({self.group_size}): it is encoded in "
                "whole groups."
            )

    @property
    def rows(self) -> int:
        """Blocks are as long as the residual: one is encoded at a time, and row p % R is position p's in both."""
        return self.residual

    def refuses(self, in_order: bool) -> str | None:
        """Policies that reuse single slots."""
        if in_order:
            return None
        return (
            f"{self.group_size} neighbouring keys share their scales, so the slot of one token cannot go to another. "
            "Use kvattn.Full(), or a codec of single tokens such as kvattn.Int4()."
        )

    def can_trim(self, lengths: Int32[Array, " B"], num_tokens: Int32[Array, " B"]) -> Rows:
        """While nothing was encoded: what left the residual is not known as it was."""
        return (num_tokens == 0) | (lengths < self.residual)

    def for_chunk(self, dtype: DTypeLike) -> Codec:
        """As they come."""
        return Plain(jnp.dtype(dtype))

    def unfit(self, x: Float[Array, "*shape H"], dtype: DTypeLike) -> Bool[Array, "*shape"]:
        """Tokens that are not finite, in the residual either."""
        return not_finite(x.astype(dtype))

    def refusal(self, dtype: DTypeLike) -> str:
        """They are not finite, or too large for the residual."""
        largest = f"{float(jnp.finfo(dtype).max):.6g}, the largest number of its residual's {jnp.dtype(dtype)}"
        return f"that are NaN, infinite, or beyond {largest}, which {self} cannot store"

    def as_they_came(
        self, store: Encoded, counts: Int32[Array, " B"]
    ) -> tuple[tuple[Int32[Array, "B M"], Float[Array, "B K M H"]], ...]:
        """The residual: row r holds the last token whose position is r modulo R."""
        last = counts[:, None] - 1
        row = jnp.arange(self.residual, dtype=jnp.int32)[None]
        return ((jnp.where(row <= last, last - (last - row) % self.residual, -1), store["residual"][0]),)

    # The store: codes, and the residual [1, B, K, R, H], where position p lies in row p % R.

    def axes(self, layout: Blocks, role: Role, name: str) -> str:
        """The residual is of rows, whatever holds the slots; scales and minima are of groups."""
        if name == "residual":
            return "one rows heads recent features"
        if name == "data":
            return super().axes(layout, role, name)
        return layout.axes("features groups" if role == "keys" else "groups slots")

    def empty(
        self, layout: Blocks, role: Role, batch_size: int, num_kv_heads: int, head_dim: int, dtype: DTypeLike
    ) -> Encoded:
        """Codes [blocks, B, K, R, F] (keys [.., F, R] where those lie transposed), scales, minima and residual."""
        block = jax.eval_shape(
            lambda x: self._encode_block(x, layout, role), jax.ShapeDtypeStruct((self.residual, head_dim), dtype)
        )
        store = {name: layout.empty(batch_size, num_kv_heads, x.shape, x.dtype) for name, x in block.items()}
        return {**store, "residual": jnp.zeros((1, batch_size, num_kv_heads, self.residual, head_dim), dtype)}

    def write(
        self, store: Encoded, layout: Blocks, role: Role, slots: Int32[Array, "B T"], x: Float[Array, "B K T H"]
    ) -> Encoded:
        """Appends tokens; `slots` are their positions, neighbours from the first one on, then negative ones."""
        count = jnp.sum(slots >= 0, axis=1, dtype=jnp.int32)
        start = jnp.maximum(slots[:, 0], 0)
        append = self._append_keys if role == "keys" else self._append_values
        old = store["residual"][0]
        encoded = append({n: e for n, e in store.items() if n != "residual"}, layout, old, x, start, count)
        t = jnp.arange(x.shape[2], dtype=jnp.int32)[None]
        stays = (slots >= 0) & (t >= count[:, None] - self.residual)
        rows = jnp.where(stays, slots % self.residual, -1)
        return {**encoded, "residual": _write_ring(store["residual"], rows, x)}

    def _append_keys(
        self,
        store: Encoded,
        layout: Blocks,
        old: Float[Array, "B K R H"],
        x: Float[Array, "B K T H"],
        start: Int32[Array, " B"],
        count: Int32[Array, " B"],
    ) -> Encoded:
        """Encodes the blocks that become whole."""
        size, length = self.residual, x.shape[2]
        most = (size - 1 + length) // size
        if most == 0:
            return store
        first, end = start // size, (start + count) // size
        # [B, most * R]: positions of the blocks from the one that `start` lies in.
        position = first[:, None] * size + jnp.arange(most * size, dtype=jnp.int32)[None]
        from_old = position < start[:, None]
        new = jnp.take_along_axis(x, _column(position - start[:, None], length), axis=2)
        whole = jnp.where(from_old[:, None, :, None], _column_of(old, position % size), new.astype(old.dtype))
        blocks = whole.reshape(*whole.shape[:2], most, size, whole.shape[3])
        index = first[:, None] + jnp.arange(most, dtype=jnp.int32)[None]
        index = jnp.where(index < end[:, None], index, layout.num_blocks)  # past the end: dropped
        encode = lambda: self._encode_block(blocks, layout, "keys")
        if most == 1:
            shapes = jax.eval_shape(encode)
            nothing = lambda: jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
            encoded = _manual.cond(jnp.any(end > first), encode, nothing)
        else:
            encoded = encode()
        return {n: layout.put(e, index, encoded[n]) for n, e in store.items()}

    def _append_values(
        self,
        store: Encoded,
        layout: Blocks,
        old: Float[Array, "B K R H"],
        x: Float[Array, "B K T H"],
        start: Int32[Array, " B"],
        count: Int32[Array, " B"],
    ) -> Encoded:
        """Encodes the values that the new ones push out of the ring."""
        size, length = self.residual, x.shape[2]
        t = jnp.arange(length, dtype=jnp.int32)[None]
        leaving = start[:, None] - size + t
        slots = jnp.where((t < count[:, None]) & (leaving >= 0), leaving, -1)
        near = min(length, size)
        values = _column_of(old, (start[:, None] + t[:, :near]) % size)
        values = jnp.concatenate([values, x[:, :, : length - near].astype(old.dtype)], axis=2)
        encoded = self._encode_block(values, layout, "values")
        return {
            "data": layout.write(store["data"], slots, encoded["data"], False),
            "scale": layout.write(store["scale"], slots, encoded["scale"].swapaxes(-1, -2), True),
            "minimum": layout.write(store["minimum"], slots, encoded["minimum"].swapaxes(-1, -2), True),
        }

    def block(
        self, store: Encoded, layout: Blocks, role: Role, i: Int32[Array, ""], counts: Int32[Array, " B"]
    ) -> Mapping[str, Shaped[Array, "B ..."]]:
        """The arrays of block i; `exact` bool [B, R]: the tokens to be read from the residual."""
        transposed = {"data": role == "keys" and layout.transposed_keys, "scale": True, "minimum": True}
        encoded = {n: layout.take(x, i, transposed[n]) for n, x in store.items() if n != "residual"}
        counts = counts[:, None]
        position = i * self.residual + jnp.arange(self.residual, dtype=jnp.int32)[None]
        first = counts // self.residual * self.residual if role == "keys" else counts - self.residual
        exact = (position >= first) & (position < counts)
        return {**encoded, "residual": store["residual"][0], "exact": exact}

    def dense(
        self, store: Encoded, layout: Blocks, role: Role, head_dim: int, counts: Int32[Array, " B"], dtype: DTypeLike
    ) -> Float[Array, "B K C H"]:
        """Block after block."""

        def one(i: Int32[Array, ""]) -> Float[Array, "B K R H"]:
            block = self.block(store, layout, role, i, counts)
            wide = accumulator(dtype)
            coded = self._decode_block(block, layout, role, head_dim).astype(wide)
            return jnp.where(block["exact"][:, None, :, None], block["residual"].astype(wide), coded).astype(dtype)

        return layout.from_blocks(jax.lax.map(one, jnp.arange(layout.num_blocks, dtype=jnp.int32)), False)

    # One block.

    def _encode_block(
        self, x: Float[Array, "*shape R H"], layout: Blocks, role: Role
    ) -> dict[str, Shaped[Array, "*shape _ _"]]:
        """A block of tokens (values: any number of tokens)."""
        if role == "values":
            codes, scale, minimum = grouped.quantise(x, self.bits, self.group_size)
            return {
                "data": grouped.pack(codes, self.bits),
                "scale": scale.swapaxes(-1, -2),
                "minimum": minimum.swapaxes(-1, -2),
            }
        codes, scale, minimum = grouped.quantise(x.swapaxes(-1, -2), self.bits, self.group_size)
        data = grouped.pack(codes.swapaxes(-1, -2), self.bits)
        return {
            "data": data.swapaxes(-1, -2) if layout.transposed_keys else data,
            "scale": scale,
            "minimum": minimum,
        }

    def _decode_block(self, block: Encoded, layout: Blocks, role: Role, head_dim: int) -> Float32[Array, "... R H"]:
        """The inverse of `_encode_block`."""
        scale, minimum = block["scale"], block["minimum"]
        if role == "values":
            codes = grouped.unpack(block["data"], self.bits)[..., :head_dim]
            return grouped.dequantise(codes, scale.swapaxes(-1, -2), minimum.swapaxes(-1, -2), self.group_size)
        data = block["data"].swapaxes(-1, -2) if layout.transposed_keys else block["data"]
        codes = grouped.unpack(data, self.bits)[..., :head_dim].swapaxes(-1, -2)
        return grouped.dequantise(codes, scale, minimum, self.group_size).swapaxes(-1, -2)

    def scores(self, query: Float[Array, "B K M H"], keys: Encoded, transposed: bool) -> Float[Array, "B K M R"]:
        """The keys of a block are widened channel by channel where they are used: scales differ along both axes."""
        exact = keys["exact"][:, None, None, :]
        coded = self._coded_scores(query, keys, transposed)
        # Whole blocks are exact or not, row by row; most blocks are exact in none.
        read = lambda: product("bkmh,bkrh->bkmr", query, keys["residual"]).astype(coded.dtype)
        raw = _manual.cond(jnp.any(keys["exact"]), read, lambda: jnp.zeros_like(coded))
        return jnp.where(exact, raw, coded)

    def _coded_scores(self, query: Float[Array, "B K M H"], keys: Encoded, transposed: bool) -> Float[Array, "B K M R"]:
        head_dim, rows = query.shape[-1], self.residual
        step, low = grouped.pair_once(keys["scale"], keys["minimum"])  # [B, K, H, R / group_size]
        data = keys["data"] if transposed else keys["data"].swapaxes(-1, -2)
        width = data.shape[-2]
        total: Any = 0
        for p in range(8 // self.bits):
            first, end = p * width, min((p + 1) * width, head_dim)
            if first >= end:
                break
            codes = grouped.plane(data[..., : end - first, :], self.bits, p).astype(step.dtype)
            codes = codes.reshape(*codes.shape[:-1], rows // self.group_size, self.group_size)
            part = codes * step[..., first:end, :, None]
            part = part.reshape(*part.shape[:-2], rows)
            total = total + factors("bkmh,bkhr->bkmr", query[..., first:end], part)
        acc = total.dtype
        lows = jnp.einsum("bkmh,bkhg->bkmg", query.astype(acc), low.astype(acc))
        return total + jnp.repeat(lows, self.group_size, axis=-1)

    def mix(
        self, probs: Float[Array, "B K M R"], values: Encoded, filled: Bool[Array, "B #K R"]
    ) -> Float[Array, "B K M F"]:
        """Per group: (probs * scale) . codes + probs . minimum, and the residual as it is."""
        exact = values["exact"][:, None]
        coded = filled & ~exact
        scale, minimum = (jnp.where(coded[:, :, None], values[n], jnp.uint16(0)) for n in ("scale", "minimum"))
        mixed = grouped.mix(probs, values["data"], scale, minimum, self.bits, self.group_size)

        def read() -> Float[Array, "B K M F"]:
            residual = jnp.where((filled & exact)[..., None], values["residual"], 0)
            raw = product("bkmr,bkrh->bkmh", probs, residual).astype(mixed.dtype)
            return jnp.pad(raw, [(0, 0)] * 3 + [(0, mixed.shape[-1] - raw.shape[-1])])

        return mixed + _manual.cond(jnp.any(values["exact"]), read, lambda: jnp.zeros_like(mixed))


def _write_ring(
    ring: Float[Array, "1 B K R H"], rows: Int32[Array, "B T"], x: Float[Array, "B K T H"]
) -> Float[Array, "1 B K R H"]:
    """The ring with tokens in these rows, those not negative."""
    row = jnp.arange(rows.shape[0], dtype=jnp.int32)[:, None]
    rows = jnp.where(rows < 0, ring.shape[3], rows)  # past the end: dropped
    return ring.at[0, row, :, rows].set(x.swapaxes(1, 2).astype(ring.dtype), mode="drop")


def _column(index: Int32[Array, "B S"], length: int) -> Int32[Array, "B 1 S 1"]:
    """An index into the third axis of [B, K, length, H], clipped."""
    return jnp.clip(index, 0, length - 1)[:, None, :, None]


def _column_of(x: Float[Array, "B K R H"], index: Int32[Array, "B S"]) -> Float[Array, "B K S H"]:
    """x at `index` of its third axis."""
    return jnp.take_along_axis(x, index[:, None, :, None], axis=2)


register(
    KIVI,
    "kivi",
    levers=lambda length: [("KIVI(4)", KIVI(4)), ("KIVI(2)", KIVI(2))],
    examples=[KIVI(bits=2, group_size=4, residual=8)],
)
