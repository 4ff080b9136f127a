"""Bytes of a cache, without making one.

A contiguous cache of one layer holds, for B sequences of C slots,

    B * (K * (C' * token + rest) + state(C) + 8)

where C' is C rounded up to whole rows of its layout, `token` the bytes of one token's key and value of one head with
its scales, `rest` what a codec keeps besides (KIVI: the last tokens as they are), `state` what the policy remembers
(positions and scores of every slot), and 8 the length and the status of a sequence. A paged cache holds

    K * P * R * token + B * (K * rest + 4 * W + 8)

for P pages of R tokens and tables of W pages. Policies and codecs are asked for their part, so a new one needs nothing
here; nothing is allocated and no device is touched.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from kvattn import _checks
from kvattn.cache.base import nbytes_of, storage_dtype
from kvattn.cache.layout import Layout
from kvattn.codecs import Codec, Plain
from kvattn.errors import ConfigError, UnsupportedError
from kvattn.memory.dtypes import name_of, num_bytes
from kvattn.memory.specs import ModelSpec
from kvattn.policies import Full, Policy, SlidingWindow

ROW_BYTES = 8
"""Length and status of a sequence, int32 each."""


def bytes_per_token(num_layers: int, num_kv_heads: int, head_dim: int, dtype: Any = "bfloat16") -> int:
    """Bytes of one token's keys and values in all layers: 2 * layers * K * H numbers.

    Args:
        num_layers: layers that keep keys and values (`ModelSpec.num_cache_layers`).
        num_kv_heads: K.
        head_dim: H.
        dtype: what a number is stored in, by name ("bfloat16", "int4", ...) or as a dtype. No scales; with those of a
            codec see `kvattn.memory.cache_bytes`.

    Returns:
        whole bytes, rounded up.

    Raises:
        ConfigError: a count below 1, an unknown dtype.
        DTypeError: a count that is no int, something that is no dtype.

    Example:
        >>> from kvattn.memory import bytes_per_token
        >>> bytes_per_token(32, 32, 128)  # Llama-2-7B: half a MiB
        524288
    """
    _checks.integer("num_layers", num_layers, 1)
    _checks.integer("num_kv_heads", num_kv_heads, 1)
    _checks.integer("head_dim", head_dim, 1)
    return num_bytes(2 * num_layers * num_kv_heads * head_dim, dtype)


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
def storage(codec: Codec, head_dim: int, dtype: Any) -> Storage:
    """Asks a codec what it stores, from the shapes of its empty stores of one and of two blocks.

    Args:
        codec: which.
        head_dim: H, of keys and values.
        dtype: what the tokens are before they are encoded.
    """
    rows = codec.rows or 1
    token = jnp.dtype(dtype)

    def stored(blocks: int) -> int:
        layout = Layout(blocks * rows, rows, False)
        stores = [jax.eval_shape(lambda r=r: codec.empty(layout, r, 1, 1, head_dim, token)) for r in ("keys", "values")]
        return sum(nbytes_of(x) for x in jax.tree.leaves(stores))

    one, two = stored(1), stored(2)
    key = 0
    if codec.rows is None:
        encoded = jax.eval_shape(codec.encode, jax.ShapeDtypeStruct((head_dim,), token))
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
    """

    policy: Policy
    codec: Codec
    num_kv_heads: int
    head_dim: int
    dtype: Any
    backend: str
    window: int | None = None

    @property
    def storage(self) -> Storage:
        """Of one head."""
        return storage(self.codec, self.head_dim, self.dtype)

    @property
    def token_bytes(self) -> float:
        """A token's keys and values, scales and what the policy remembers of its slot included."""
        return self.part_bytes(1)

    def part_bytes(self, parts: int) -> float:
        """Bytes of a token where its slots are divided into `parts`, in one of them, on average."""
        return self.num_kv_heads * self.storage.token / parts + state_bytes(self.policy, self.num_kv_heads)[0]

    def num_slots(self, length: int) -> int:
        """C, for sequences of up to `length` tokens."""
        try:
            return self.policy.num_slots(length)
        except ConfigError:
            return self.policy.num_slots(None)  # a budget larger than the sequences: it is set aside all the same

    def row_bytes(self, length: int, parts: int = 1) -> int:
        """Bytes of one sequence of up to `length` tokens, its slots divided into `parts` of which this is one.

        Only keys and values are divided: what the policy remembers of every slot each part has whole.
        """
        slots, store = self.num_slots(length), self.storage
        per_slot, besides = state_bytes(self.policy, self.num_kv_heads)
        layout = self._layout(slots, parts)
        heads = self.num_kv_heads * (layout.num_blocks * layout.rows // parts // store.rows * store.block + store.rest)
        return heads + slots * per_slot + besides + ROW_BYTES

    def paged_row_bytes(self, pages: int, page_size: int, max_pages: int, parts: int = 1) -> int:
        """Bytes of one sequence that has `pages` pages, with its part of the table."""
        pages = -(-pages // parts)
        return self.num_kv_heads * (pages * self.page_bytes(page_size) + self.storage.rest) + 4 * max_pages + ROW_BYTES

    def page_bytes(self, page_size: int) -> int:
        """Bytes of a page of one head."""
        if self.codec.rows not in (None, page_size):
            raise ConfigError(
                f"{self.codec} encodes {self.storage.rows} tokens together, a page holds {page_size}: give both the "
                "same size."
            )
        return page_size // self.storage.rows * self.storage.block

    def read_bytes(self, length: int, parts: int = 1) -> float:
        """Bytes a decode step reads of one sequence that has `length` tokens: those it keeps and may see, once."""
        kept = min(length, self.num_slots(max(length, 1)), self.window or length) / parts
        store = self.storage
        raw = min(kept, store.rows) if store.rest else 0  # KIVI: the last ones are read as they are
        share = raw / store.rows
        return self.num_kv_heads * ((kept - raw) * store.token + share * store.rest)

    def _layout(self, slots: int, parts: int) -> Layout:
        """Blocks of so many slots that divide into `parts`."""
        if (rows := self.codec.rows) is not None:  # tokens that are encoded together do not lie apart
            return Layout(slots, -(-slots // (rows * parts)) * rows * parts, False)
        layout = Layout.best(slots, self.storage.key, self.backend, self.head_dim)
        return layout if parts == 1 else layout.divided(parts, self.head_dim, self.backend)


def layers(
    model: ModelSpec,
    *,
    policy: Policy | None = None,
    codec: Codec | None = None,
    dtype: Any = "bfloat16",
    backend: str = "gpu",
    num_kv_heads: int | None = None,
    only: range | None = None,
    reading: bool = False,
) -> dict[Layer, int]:
    """The kinds of caches of a model, and how many there are of each.

    Args:
        model: which.
        policy: of all layers. None: everything, in layers with a window that.
        codec: of all layers. None: as they are, in `dtype`.
        dtype: what tokens are before they are encoded: float32, bfloat16, float16.
        backend: whose layout.
        num_kv_heads: K on one device, where heads are divided. None: the model's.
        only: of these layers: those they have, and those of other layers that they share. None: of all.
        reading: count a cache once for every layer that attends to it, with that layer's window; False: once.

    Raises:
        ConfigError: something that is no policy or codec, an unknown dtype or backend.
        DTypeError: a dtype that caches do not have.
        UnsupportedError: a policy and a codec that do not go together.
    """
    if policy is not None and not isinstance(policy, Policy):
        raise ConfigError(f"policy must be a policy such as kvattn.Full(), got {policy!r}.")
    if codec is not None and not isinstance(codec, Codec):
        raise ConfigError(f"codec must be a codec such as kvattn.Int8(), or None, got {codec!r}.")
    _checks.one_of("backend", backend, ("cpu", "gpu", "tpu"))
    dtype = storage_dtype(name_of("dtype", dtype))
    codec = Plain(dtype) if codec is None else codec
    found: dict[Layer, int] = {}
    sources, windows = model.layer_sources, model.layer_windows
    attending = {i: sources[i] for i in only or range(model.num_layers)}
    if not reading:
        attending = {source: source for source in attending.values() if source is not None}
    for reader, source in attending.items():
        if source is None:
            continue
        kept = policy or (Full() if (window := windows[source]) is None else SlidingWindow(window))
        if (reason := codec.refuses(kept.in_order)) is not None:
            raise UnsupportedError(f"{codec} does not work with {kept}: {reason}")
        layer = Layer(kept, codec, num_kv_heads or model.num_kv_heads, model.head_dim, dtype, backend, windows[reader])
        found[layer] = found.get(layer, 0) + 1
    return found


def cache_bytes(
    model: ModelSpec,
    batch_size: int,
    length: int,
    *,
    policy: Policy | None = None,
    codec: Codec | None = None,
    dtype: Any = "bfloat16",
    backend: str = "gpu",
    page_size: int | None = None,
    num_pages: int | None = None,
) -> int:
    """Bytes of the caches of all layers: the sum of their arrays, to the byte.

    Args:
        model: which.
        batch_size: B.
        length: most tokens of a sequence (the capacity).
        policy: which tokens are kept. None: all, in layers with a window those within it.
        codec: in how many bits. None: as they are, in `dtype`.
        dtype: what tokens are before they are encoded.
        backend: whose layout: rows are rounded up to a few more than the length.
        page_size: R, of a paged cache. None: contiguous.
        num_pages: P, pages of each layer's pool. None: as many as B sequences of that length need.

    Raises:
        ConfigError, DTypeError, RangeError, UnsupportedError: as `kvattn.KVCache.create`.

    Example:
        >>> import kvattn
        >>> model = kvattn.memory.MODELS["llama-2-7b"]
        >>> kvattn.memory.cache_bytes(model, 1, 4096) / 4096 / 2**20  # MiB per token
        0.5000000596046448
    """
    _checks.integer("batch_size", batch_size, 0)
    _checks.integer("length", length, 1)
    kinds = layers(model, policy=policy, codec=codec, dtype=dtype, backend=backend)
    if page_size is None:
        if num_pages is not None:
            raise ConfigError("num_pages without page_size: a contiguous cache has no pages.")
        return sum(count * batch_size * layer.row_bytes(length) for layer, count in kinds.items())
    max_pages = pages_for(length, page_size)
    num_pages = batch_size * max_pages if num_pages is None else _checks.integer("num_pages", num_pages, 1)
    return sum(
        count
        * (
            layer.num_kv_heads * num_pages * layer.page_bytes(page_size)
            + batch_size * layer.paged_row_bytes(0, page_size, max_pages)
        )
        for layer, count in paged(kinds).items()
    )


def pages_for(length: int, page_size: int) -> int:
    """Pages that so many tokens take."""
    return -(-length // _checks.integer("page_size", page_size, 1))


def paged(kinds: dict[Layer, int]) -> dict[Layer, int]:
    """The same layers in pages, which keep every token, in layers with a window too: these read fewer.

    Raises:
        UnsupportedError: another policy.
    """
    found: dict[Layer, int] = {}
    for layer, count in kinds.items():
        if not isinstance(layer.policy, Full | SlidingWindow):
            raise UnsupportedError(f"pages keep every token: page_size does not go with {layer.policy}.")
        if isinstance(layer.policy, SlidingWindow):
            layer = dataclasses.replace(layer, window=min(layer.policy.window, layer.window or layer.policy.window))
        layer = dataclasses.replace(layer, policy=Full())
        found[layer] = found.get(layer, 0) + count
    return found
