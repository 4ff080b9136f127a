"""What an implementation of attention sees of a cache: encoded blocks and the positions they hold."""

import dataclasses
import typing

import jax
import jax.numpy as jnp

from kvattn._typing import Array, Encoded
from kvattn.cache.layout import Layout
from kvattn.codecs import Codec


@typing.no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class View:
    """A table of slots to attend over. It does not say which policy, cache class or mesh is behind it.

    Attributes:
        keys: encoded keys, named arrays [blocks, B, K, R, F] or [blocks, B, K, F, R] (`Layout`).
        values: encoded values, likewise.
        positions: int32 [blocks, B, 1 or K, R]: the position of the token in each slot, -1 if empty.
        counts: int32 [B] or [B, K]: all slots from this number on are empty.
        layout: how the blocks lie.
        codec: how to read them.
        key_head_dim: H.
        value_head_dim: Hv.
    """

    keys: Encoded
    values: Encoded
    positions: Array
    counts: Array
    layout: Layout = dataclasses.field(metadata={"static": True})
    codec: Codec = dataclasses.field(metadata={"static": True})
    key_head_dim: int = dataclasses.field(metadata={"static": True})
    value_head_dim: int = dataclasses.field(metadata={"static": True})

    @property
    def num_kv_heads(self) -> int:
        """K."""
        return next(iter(self.keys.values())).shape[2]


def key_transposed(layout: Layout, codec: Codec, name: str) -> bool:
    """Whether the array `name` of the encoded keys lies with tokens along the last axis."""
    return layout.transposed_keys or name in codec.token_minor


def value_transposed(codec: Codec, name: str) -> bool:
    """Whether the array `name` of the encoded values lies with tokens along the last axis."""
    return name in codec.token_minor


def block_positions(layout: Layout, positions: Array) -> Array:
    """int32 [B, C] or [B, K, C] to the view's [blocks, B, 1 or K, R]."""
    if positions.ndim == 2:
        positions = positions[:, None]
    return layout.to_blocks(positions[..., None], False, fill=-1)[..., 0]


def token_view(codec: Codec, key: Array, value: Array, positions: Array, layout: Layout) -> View:
    """A view of tokens that are in no cache: those of a chunk.

    Args:
        codec: how they are stored for the occasion.
        key: [B, S, K, H].
        value: [B, S, K, Hv].
        positions: int32 [B, S], -1 for pads.
        layout: with `num_slots` S.
    """
    keys = {
        name: layout.to_blocks(x, key_transposed(layout, codec, name))
        for name, x in codec.encode(key.swapaxes(1, 2)).items()
    }
    values = {
        name: layout.to_blocks(x, value_transposed(codec, name))
        for name, x in codec.encode(value.swapaxes(1, 2)).items()
    }
    counts = jnp.sum(positions >= 0, axis=1, dtype=jnp.int32)
    where = block_positions(layout, positions)
    return View(keys, values, where, counts, layout, codec, key.shape[-1], value.shape[-1])
