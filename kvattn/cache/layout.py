"""Where the slots of a contiguous cache lie in memory.

Every stored array has five axes, ``[blocks, B, K, R, F]``: slot s is row s % R of block s // R, and F
is what the codec stores per token and head. Arrays whose tokens are wanted along the last axis lie as
``[blocks, B, K, F, R]``: scales, and on CPUs the keys.

* CPU: blocks of 128 to 256 tokens, keys transposed inside the block. A decode step then walks over the blocks
  that hold tokens, so its cost follows the length and not the capacity, and both products read memory
  in order (B8 N32 K8 H128 S4096 float32 on two cores: 13 ms, against 125 ms for
  `jax.nn.dot_product_attention`).
* GPU, TPU: one block. ``[1, B, K, S, H]`` is the ``[B, K, S, H]`` that kernels stream, in eights of slots.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Int32, Shaped

from kvattn import _target
from kvattn._typing import Array

CPU_BLOCK_BYTES = 65536
"""Bytes of one head's block on CPUs: 128 rows of 128 float32, 256 of bfloat16. Smaller blocks pay for the loop, larger
ones fall out of the second-level cache (measured: performance falls on both sides)."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """The blocks of a cache.

    Attributes:
        num_slots: C, slots in use; the last block may have a few rows more.
        rows: R, slots per block.
        transposed_keys: whether keys lie with tokens along the last axis.
    """

    num_slots: int
    rows: int
    transposed_keys: bool

    on_host: ClassVar[bool] = False
    """Whether the arrays lie in the host's memory (`kvattn.cache.host`) and not in the device's."""

    @classmethod
    def best(
        cls,
        num_slots: int,
        token_bytes: int,
        backend: str | None = None,
        head_dim: int = 128,
        values_in_keys: bool = False,
    ) -> "Layout":
        """The layout for a backend.

        Args:
            num_slots: C.
            token_bytes: bytes of one token's key of one head.
            backend: the platform, "cpu", "cuda", "tpu" ("gpu" will do); None: the one that programs are made for here.
            head_dim: H. TPUs lay heads that are no multiple of 128 with tokens along the lanes, in whole 128s anyway.
            values_in_keys: whether keys are read as values too, so that they lie as values do (latent attention on two
                cores, B4 N16 H576 S2048 bfloat16: 6 ms, against 18 ms with keys transposed).
        """
        backend = backend or _target.platform()
        if backend != "cpu":
            unit = 128 if backend == "tpu" and head_dim % 128 else 8
            return cls(num_slots, -(-num_slots // unit) * unit, False)
        target = min(max(CPU_BLOCK_BYTES // max(token_bytes, 1), 128), 256)
        blocks = -(-num_slots // target)
        # Blocks of equal size, a multiple of 8 rows: a window of 1000 does not round up to 1024 + 128.
        rows = num_slots if blocks == 1 else -(-num_slots // blocks // 8) * 8
        return cls(num_slots, rows, not values_in_keys)

    def divided(self, parts: int, head_dim: int, backend: str | None = None) -> "Layout":
        """The same slots in blocks that divide over `parts` devices; what is added is never used.

        Each part is laid out as a cache of its own would be: for kernels in eights of slots, on TPUs in whole 128s
        where heads are laid so.

        Args:
            parts: devices.
            head_dim: H.
            backend: as in `best`. On CPUs a layout for kernels is taken for a TPU's.
        """
        unit = 1
        if not self.transposed_keys and self.rows % 8 == 0:
            lanes = _target.family(backend or _target.platform()) != "gpu" and head_dim % 128 and self.rows % 128 == 0
            unit = 128 if lanes else 8
        rows = -(-self.rows // (unit * parts)) * unit * parts
        return self if rows == self.rows else dataclasses.replace(self, rows=rows)

    def divides(self, parts: int) -> bool:
        """Whether every block is cut into `parts` shares of equal size."""
        return self.rows % parts == 0

    # One share of the slots: of every block of R slots, share d of n has the R / n from d R / n on.

    def share(self, parts: int) -> "Layout":
        """Where the slots of one of `parts` shares lie."""
        rows = self.rows // parts
        return dataclasses.replace(self, num_slots=self.num_blocks * rows, rows=rows)

    def slots_in_share(
        self, slots: Int32[Array, "B *K T"], part: Int32[Array, ""], parts: int
    ) -> Int32[Array, "B *K T"]:
        """The slots by their numbers in share `part`; -1 for those that are elsewhere."""
        rows, row = self.rows // parts, slots % self.rows
        mine = (slots >= 0) & (row // rows == part)
        return jnp.where(mine, slots // self.rows * rows + row % rows, -1)

    def positions_in_share(
        self, positions: Int32[Array, "blocks B K1 R"], part: Int32[Array, ""], parts: int
    ) -> tuple[Int32[Array, "blocks B K1 rows"], Int32[Array, " B"] | None]:
        """What share `part` holds, and from which slot on it is empty."""
        rows = self.rows // parts
        positions = jax.lax.dynamic_slice_in_dim(positions, part * rows, rows, axis=3)
        slot = jnp.arange(self.num_blocks * rows, dtype=jnp.int32).reshape(self.num_blocks, 1, 1, rows)
        return positions, jnp.max(jnp.where(positions >= 0, slot + 1, 0), axis=(0, 2, 3))

    @property
    def num_blocks(self) -> int:
        """Blocks, the last one possibly partly unused."""
        return -(-self.num_slots // self.rows)

    @staticmethod
    def axes(block: str) -> str:
        """The names of the axes of an array whose blocks have these (`kvattn.cache.axes`)."""
        return f"blocks rows heads {block}"

    def zeros(
        self, batch_size: int, num_kv_heads: int, features: int, dtype: DTypeLike, transposed: bool
    ) -> Shaped[Array, "blocks B K _ _"]:
        """An empty array."""
        tail = (features, self.rows) if transposed else (self.rows, features)
        return self.empty(batch_size, num_kv_heads, tail, dtype)

    def empty(
        self, batch_size: int, num_kv_heads: int, block: tuple[int, ...], dtype: DTypeLike
    ) -> Shaped[Array, "blocks B K _ _"]:
        """An empty array whose blocks have the shape `block`."""
        return jnp.zeros((self.num_blocks, batch_size, num_kv_heads, *block), dtype)

    def take(
        self, blocks: Shaped[Array, "blocks B K _ _"], i: Int32[Array, ""], transposed: bool
    ) -> Shaped[Array, "B K _ _"]:
        """Block i."""
        del transposed
        return jax.lax.dynamic_index_in_dim(blocks, i, 0, keepdims=False)

    def put(
        self, blocks: Shaped[Array, "blocks B K _ _"], index: Int32[Array, "B M"], new: Shaped[Array, "B K M _ _"]
    ) -> Shaped[Array, "blocks B K _ _"]:
        """Replaces whole blocks; those past the end are dropped."""
        row = jnp.arange(index.shape[0], dtype=jnp.int32)[:, None]
        return blocks.at[index, row].set(new.swapaxes(1, 2).astype(blocks.dtype), mode="drop")

    def to_blocks(
        self, x: Shaped[Array, "B K S F"], transposed: bool, fill: int = 0
    ) -> Shaped[Array, "blocks B K _ _"]:
        """Lays out S <= C tokens, padded with `fill`."""
        batch, heads, length, features = x.shape
        padding = self.num_blocks * self.rows - length
        x = jnp.pad(x, ((0, 0), (0, 0), (0, padding), (0, 0)), constant_values=fill)
        x = x.reshape(batch, heads, self.num_blocks, self.rows, features)
        return x.transpose(2, 0, 1, 4, 3) if transposed else x.transpose(2, 0, 1, 3, 4)

    def from_blocks(self, blocks: Shaped[Array, "blocks B K _ _"], transposed: bool) -> Shaped[Array, "B K C F"]:
        """The slots in order."""
        x = blocks.transpose(1, 2, 0, 4, 3) if transposed else blocks.transpose(1, 2, 0, 3, 4)
        batch, heads, _, _, features = x.shape
        return x.reshape(batch, heads, -1, features)[:, :, : self.num_slots]

    def write(
        self,
        blocks: Shaped[Array, "blocks B K _ _"],
        slots: Int32[Array, "B *K T"],
        x: Shaped[Array, "B K T F"],
        transposed: bool,
    ) -> Shaped[Array, "blocks B K _ _"]:
        """Writes tokens into slots; in place when the caller donates.

        Args:
            blocks: before.
            slots: negative: not written.
            x: the tokens.
            transposed: how `blocks` lies.
        """
        batch, heads = x.shape[:2]
        if slots.ndim == 2:
            slots = slots[:, None]
        per_head = slots.shape[1] > 1
        block, row = jnp.where(slots < 0, self.num_blocks, slots // self.rows), slots % self.rows
        b = jnp.arange(batch, dtype=jnp.int32)[:, None, None]
        # One update moves all the heads of a token where they share the slot. A block number past the end is
        # dropped by `mode`, never clamped.
        if per_head:
            k = jnp.arange(heads, dtype=jnp.int32)[None, :, None]
            index = (block, b, k, slice(None), row) if transposed else (block, b, k, row)
            return blocks.at[index].set(x.astype(blocks.dtype), mode="drop")
        block, row = block[:, 0], row[:, 0]
        b = b[:, 0]
        index = (block, b, slice(None), slice(None), row) if transposed else (block, b, slice(None), row)
        return blocks.at[index].set(x.swapaxes(1, 2).astype(blocks.dtype), mode="drop")
