"""What an implementation of attention sees of a cache: encoded blocks and the positions they hold."""

import dataclasses
import typing

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Float, Int32

from kvattn._typing import Array, Encoded
from kvattn.cache.layout import Layout
from kvattn.cache.pages import Pages
from kvattn.codecs import Codec


@typing.no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class View:
    """A table of slots to attend over. It does not say which policy, cache class or mesh is behind it.

    Attributes:
        keys: encoded keys, named arrays [blocks, B, K, R, F] or [blocks, B, K, F, R] (`Layout`), or pages (`Pages`).
        values: encoded values, likewise; none where they are the first numbers of the keys (`values_in_keys`).
        positions: the position of the token in each slot, -1 if empty.
        counts: all slots from this number on are empty.
        layout: the blocks, in which the positions lie.
        codec: how to read them.
        key_head_dim: H.
        value_head_dim: Hv.
        page_table: whose pages hold the slots, of each head where they have tables of their own (`Pages`); None: the
            arrays lie in blocks.
        page_size: slots per page.
        in_order: whether slot s holds the token of position s, for all s below `counts`.
        seen: tokens of each row so far, where slot s holds the last position below that is s modulo C: of rings. None:
            `positions` alone tell.
        fresh: the call's own tokens as they came, for derivatives: their slots, keys and values. None: what is read
            has derivatives itself.
        platform: that the cache was made for, where that was said.
    """

    keys: Encoded
    values: Encoded
    positions: Int32[Array, "blocks B K1 R"]
    counts: Int32[Array, "B *K"]
    layout: Layout = dataclasses.field(metadata={"static": True})
    codec: Codec = dataclasses.field(metadata={"static": True})
    key_head_dim: int = dataclasses.field(metadata={"static": True})
    value_head_dim: int = dataclasses.field(metadata={"static": True})
    page_table: Int32[Array, "B *K columns"] | None = None
    page_size: int = dataclasses.field(default=0, metadata={"static": True})
    in_order: bool = dataclasses.field(default=False, metadata={"static": True})
    seen: Int32[Array, " B"] | None = None
    fresh: tuple[Int32[Array, "B *K T"], Float[Array, "B T K H"], Float[Array, "B T K Hv"] | None] | None = None
    platform: str | None = dataclasses.field(default=None, metadata={"static": True})

    @property
    def store(self) -> "Layout | Pages":
        """Where the arrays have their slots."""
        if self.page_table is None:
            return self.layout
        by_token = self.codec.rows is None
        return Pages(self.layout, self.page_size, self.page_table, self.keys["data"].shape[1], by_token)

    def share(self, part: Int32[Array, ""], parts: int) -> "View":
        """This view where its arrays are share `part` of `parts` of all slots: on one device of several."""
        positions, counts = self.store.positions_in_share(self.positions, part, parts)
        layout = self.layout if self.page_table is not None else self.layout.share(parts)
        return dataclasses.replace(
            self,
            positions=positions,
            counts=self.counts if counts is None else counts,
            layout=layout,
            in_order=False,
            seen=None,
        )

    def in_blocks_of(self, slots: int) -> "View":
        """This view of pages, of which about so many slots make up a block; whole pages, and no fewer than they did."""
        layout = self.layout
        pages = min(slots // self.page_size, -(-layout.num_slots // self.page_size))
        if pages * self.page_size <= layout.rows:
            return self
        wide = dataclasses.replace(layout, rows=pages * self.page_size)
        positions = wide.to_blocks(layout.from_blocks(self.positions[..., None], False), False, fill=-1)[..., 0]
        return dataclasses.replace(self, layout=wide, positions=positions)

    @property
    def values_in_keys(self) -> bool:
        """Whether a token's value is the first numbers of its key, and is stored with it."""
        return not self.values

    @property
    def on_host(self) -> bool:
        """Whether the arrays lie in the host's memory; single blocks and dense tokens are on the device always."""
        return self.layout.on_host

    @property
    def num_kv_heads(self) -> int:
        """K."""
        return next(iter(self.keys.values())).shape[2 if self.page_table is None else 0]

    def key_block(self, i: Int32[Array, ""]) -> Encoded:
        """The keys of block i, for `Codec.scores`."""
        return self.codec.block(self.keys, self.store, "keys", i, self.counts)

    def value_block(self, i: Int32[Array, ""], keys: Encoded | None = None) -> Encoded:
        """The values of block i, for `Codec.mix`; features from Hv on mean nothing.

        Args:
            i: the block.
            keys: its keys, where they are here already.
        """
        if self.values_in_keys:
            return self.codec.as_values(self.key_block(i) if keys is None else keys, self.store.transposed_keys)
        return self.codec.block(self.values, self.store, "values", i, self.counts)

    def block(self, i: Int32[Array, ""]) -> tuple[Encoded, Encoded]:
        """The keys and the values of block i. Nothing is read twice."""
        keys = self.key_block(i)
        return keys, self.value_block(i, keys)

    def dense(self, dtype: DTypeLike) -> tuple[Float[Array, "B K C H"], Float[Array, "B K C Hv"]]:
        """Decoded keys and values, slot by slot."""
        codec, store, size = self.codec, self.store, self.value_head_dim
        keys = codec.dense(self.keys, store, "keys", self.key_head_dim, self.counts, dtype)
        if self.values_in_keys:
            return keys, keys[..., :size]
        return keys, codec.dense(self.values, store, "values", size, self.counts, dtype)


def block_positions(layout: Layout, positions: Int32[Array, "B *K C"]) -> Int32[Array, "blocks B K1 R"]:
    """The positions of slots, block by block as a view has them."""
    if positions.ndim == 2:
        positions = positions[:, None]
    return layout.to_blocks(positions[..., None], False, fill=-1)[..., 0]


def token_view(
    codec: Codec,
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K Hv"] | None,
    positions: Int32[Array, "B S"],
    layout: Layout,
    value_head_dim: int,
) -> View:
    """A view of tokens that are in no cache: those of a chunk.

    Args:
        codec: how they are stored for the occasion.
        key: the keys.
        value: the values; None: they are the first numbers of the keys.
        positions: -1 for pads.
        layout: with `num_slots` S.
        value_head_dim: Hv.
    """
    keys = codec.lay_out(layout, "keys", key.swapaxes(1, 2))
    values = {} if value is None else codec.lay_out(layout, "values", value.swapaxes(1, 2))
    view = View(
        keys=keys,
        values=values,
        positions=block_positions(layout, positions),
        counts=jnp.sum(positions >= 0, axis=1, dtype=jnp.int32),
        layout=layout,
        codec=codec,
        key_head_dim=key.shape[-1],
        value_head_dim=value_head_dim,
    )
    slots = jnp.where(positions >= 0, jnp.arange(positions.shape[1], dtype=jnp.int32)[None], -1)
    return dataclasses.replace(view, fresh=(slots, key, value)) if codec.rounds else view
