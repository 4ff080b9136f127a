"""Bytes of one layer's cache, without making one.

A contiguous cache of one layer holds, for B sequences of C slots,

    B * (K * (C' * token + rest) + state(C) + 8)

where C' is C rounded up to whole rows of its layout, `token` the bytes of one token's key and value of one head with
its scales (of its key alone, where the value is a part of it), `rest` what a codec keeps besides (KIVI: the last tokens
as they are), `state` what the policy remembers (positions and scores of every slot), and 8 the length and the status of
a sequence. A paged cache holds

    K * P * R * token + B * (K * rest + 4 * W + state(C) + 8)

for P pages of R tokens and tables of W pages; 4 * K * W where heads have tables of their own. Pages are taken as a
sequence grows (`kvattn.cache.pages_at_once`). Policies and codecs are asked for their part, so a new one needs nothing
here; nothing is allocated and no device is touched.
"""

import dataclasses
import functools

import jax
import numpy as np

from kvattn._paging import pages_for
from kvattn.cache.base import nbytes_of
from kvattn.cache.groups import most_slots, pages_at_once
from kvattn.cache.layout import Layout
from kvattn.cache.pages import slots_of
from kvattn.codecs import Codec
from kvattn.policies import Policy

ROW_BYTES = 8
"""Length and status of a sequence, int32 each."""


@dataclasses.dataclass(frozen=True)
class Storage:
    """What one key/value head of one layer needs, under a codec.

    Attributes:
        block: bytes of `rows` slots, keys and values with their scales.
        rows: slots that are encoded together; 1 where each token stands alone.
        rest: bytes besides the slots, per sequence (KIVI's residual).
        key: bytes of one token's key; 0 where tokens do not stand alone.
    """

    block: int
    rows: int
    rest: int
    key: int

    @property
    def token(self) -> float:
        """Bytes of one token's key and value, scales included."""
        return self.block / self.rows


@functools.lru_cache(maxsize=256)
def storage(
    codec: Codec, head_dim: int, dtype: np.dtype, value_head_dim: int | None = None, values_in_keys: bool = False
) -> Storage:
    """Asks a codec what it stores, from the shapes of its empty stores of one and of two blocks.

    Args:
        codec: which.
        head_dim: H.
        dtype: what the tokens are before they are encoded.
        value_head_dim: head dim of the values. None: H.
        values_in_keys: whether values are stored with their keys, and nowhere else.
    """
    rows, sizes = codec.rows or 1, {"keys": head_dim, "values": value_head_dim or head_dim}
    if values_in_keys:
        del sizes["values"]

    def stored(blocks: int) -> int:
        layout = Layout(blocks * rows, rows, False)
        stores = [jax.eval_shape(lambda r=r, n=n: codec.empty(layout, r, 1, 1, n, dtype)) for r, n in sizes.items()]
        return sum(nbytes_of(x) for x in jax.tree.leaves(stores))

    one, two = stored(1), stored(2)
    key = 0
    if codec.rows is None:
        encoded = jax.eval_shape(codec.encode, jax.ShapeDtypeStruct((head_dim,), dtype))
        key = sum(nbytes_of(x) for x in encoded.values())
    return Storage(two - one, rows, 2 * one - two, key)


@functools.lru_cache(maxsize=256)
def state_bytes(policy: Policy, num_kv_heads: int) -> tuple[int, int]:
    """Asks a policy what it remembers of one sequence: bytes per slot, and bytes besides."""

    def remembered(num_slots: int) -> int:
        state = jax.eval_shape(lambda: policy.init(1, num_kv_heads, num_slots))
        return sum(nbytes_of(x) for x in jax.tree.leaves(state))

    one, two = remembered(1), remembered(2)
    return two - one, 2 * one - two


@dataclasses.dataclass(frozen=True)
class Layer:
    """One layer's cache, per sequence.

    Attributes:
        policy: which tokens are kept.
        codec: in how many bits.
        num_kv_heads: K.
        head_dim: H.
        dtype: of the tokens.
        backend: whose layout: "cpu", "gpu" or "tpu".
        window: the model's, of this layer: what a step reads of the tokens kept; None: all of them.
        page_size: R, where it lies in pages; 0: contiguous.
        chunk: tokens that come at a time: a window gives its pages back once they are there.
        value_head_dim: head dim of the values; None: H.
        values_in_keys: whether values are stored with their keys, and nowhere else.
    """

    policy: Policy
    codec: Codec
    num_kv_heads: int
    head_dim: int
    dtype: np.dtype
    backend: str
    window: int | None = None
    page_size: int = 0
    chunk: int = 1
    value_head_dim: int | None = None
    values_in_keys: bool = False

    @property
    def storage(self) -> Storage:
        """Of one head."""
        return storage(self.codec, self.head_dim, self.dtype, self.value_head_dim, self.values_in_keys)

    @property
    def token_bytes(self) -> float:
        """A token's keys and values, scales and what the policy remembers of its slot included."""
        return self.part_bytes(1)

    def part_bytes(self, parts: int) -> float:
        """Bytes of a token where its slots are divided into `parts`, in one of them, on average."""
        return self.num_kv_heads * self.storage.token / parts + state_bytes(self.policy, self.num_kv_heads)[0]

    def num_pages(self, length: int) -> int:
        """The most pages that a sequence holds at once while it grows to `length` tokens."""
        return pages_at_once(self.policy, self.page_size, length, self.chunk)

    def num_slots(self, length: int, held: int | None = None) -> int:
        """Slots set aside for a sequence of up to `length` tokens: C, or in pages those of the ones it holds.

        Args:
            length: most tokens it may have.
            held: tokens that it has; they matter in pages only. None: `length`.
        """
        if self.page_size:
            return self.num_pages(length if held is None else held) * self.page_size
        return most_slots(self.policy, length)

    def kept(self, length: int) -> int:
        """Tokens that the policy keeps of so many."""
        kept = min(length, most_slots(self.policy, max(length, 1)))
        window = self.policy.mask().window if self.policy.in_order else None  # else its slots are as few
        return kept if window is None else min(kept, window)

    def nbytes(self, rows: int, length: int, held: int | None = None, parts: int = 1) -> int:
        """Bytes of some sequences, their slots divided into `parts` of which this is one.

        Only keys and values are divided: what the policy remembers of every slot each part has whole, and the tables of
        pages too. Pages are divided all together, the slots of contiguous caches row by row.

        Args:
            rows: sequences.
            length: most tokens that one may have.
            held: tokens that each has; they matter in pages only. None: `length`.
            parts: devices that share the slots.
        """
        slots = self.num_slots(length, held)
        if self.page_size:
            pages = -(-rows * (slots // self.page_size) // parts)
            return self.pool_bytes(pages) + rows * self.table_bytes(length)
        store = self.storage
        layout = self._layout(slots, parts)
        heads = self.num_kv_heads * (layout.num_blocks * layout.rows // parts // store.rows * store.block + store.rest)
        return rows * (heads + self._state_bytes(slots) + ROW_BYTES)

    def pool_bytes(self, num_pages: int) -> int:
        """Bytes of so many pages of all heads."""
        return self.num_kv_heads * num_pages * (self.page_size // self.storage.rows) * self.storage.block

    def table_bytes(self, length: int) -> int:
        """Bytes of a sequence of up to `length` tokens besides its pages.

        Their numbers, of each head where heads have tables of their own; what the policy remembers of every slot that
        the table has room for; what a codec keeps.
        """
        columns = pages_for(most_slots(self.policy, length), self.page_size)
        tables = self.num_kv_heads if self.policy.is_uneven else 1
        state = self._state_bytes(slots_of(self.policy, self.page_size, columns))
        return 4 * tables * columns + state + self.num_kv_heads * self.storage.rest + ROW_BYTES

    def read_bytes(self, length: int, parts: int = 1) -> float:
        """Bytes a decode step reads of one sequence that has `length` tokens: those it keeps and may see, once."""
        kept = min(self.kept(length), self.window or length) / parts
        store = self.storage
        raw = min(kept, store.rows) if store.rest else 0  # KIVI: the last ones are read as they are
        share = raw / store.rows
        return self.num_kv_heads * ((kept - raw) * store.token + share * store.rest)

    def _state_bytes(self, slots: int) -> int:
        """Bytes that the policy remembers of a sequence of so many slots."""
        per_slot, besides = state_bytes(self.policy, self.num_kv_heads)
        return slots * per_slot + besides

    def _layout(self, slots: int, parts: int) -> Layout:
        """Blocks of so many slots that divide into `parts`, which those of a codec's own size do not."""
        if (rows := self.codec.rows) is not None:
            return Layout(slots, -(-slots // rows) * rows, False)
        layout = Layout.best(slots, self.storage.key, self.backend, self.head_dim, self.values_in_keys)
        return layout if parts == 1 else layout.divided(parts, self.head_dim, self.backend)
