"""Bytes of a model's caches, without making one: those of its layers together."""

from collections.abc import Callable

from jax.typing import DTypeLike

from kvattn import _checks
from kvattn.cache.base import storage_dtype, values_apart
from kvattn.codecs import Codec, Plain
from kvattn.errors import ConfigError, RangeError, UnsupportedError
from kvattn.memory.dtypes import name_of, num_bytes
from kvattn.memory.formula import Layer
from kvattn.memory.specs import ModelSpec
from kvattn.policies import Full, OrderedWindow, Policy, SlidingWindow

Kinds = dict[Layer, int]
"""The kinds of layers of a model, and how many there are of each."""


def bytes_per_token(
    num_layers: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: DTypeLike = "bfloat16",
    *,
    value_head_dim: int | None = None,
    values_in_keys: bool = False,
) -> int:
    """Bytes of one token's keys and values in all layers: 2 * layers * K * H numbers, if values are as long as keys.

    Args:
        num_layers: layers that keep keys and values (`ModelSpec.num_cache_layers`).
        num_kv_heads: K.
        head_dim: H.
        dtype: what a number is stored in, by name ("bfloat16", "int4", ...) or as a dtype. No scales; with those of a
            codec see `kvattn.memory.cache_bytes`.
        value_head_dim: head dim of the values. None: H.
        values_in_keys: whether values are the first numbers of their keys, and are not stored again.

    Returns:
        whole bytes, rounded up.

    Raises:
        ConfigError: a count below 1, an unknown dtype.
        DTypeError: a count that is no int, something that is no dtype.

    Example:
        >>> from kvattn.memory import bytes_per_token
        >>> bytes_per_token(32, 32, 128)  # Llama-2-7B: half a MiB
        524288
        >>> bytes_per_token(1, 1, 576, value_head_dim=512, values_in_keys=True)  # latent attention of DeepSeek-V3
        1152
    """
    _checks.integer("num_layers", num_layers, 1)
    _checks.integer("num_kv_heads", num_kv_heads, 1)
    _checks.integer("head_dim", head_dim, 1)
    value_head_dim = head_dim if value_head_dim is None else _checks.integer("value_head_dim", value_head_dim, 1)
    stored = head_dim + (0 if _checks.flag("values_in_keys", values_in_keys) else value_head_dim)
    return num_bytes(num_layers * num_kv_heads * stored, dtype)


def total[Number: (int, float)](kinds: Kinds, of: Callable[[Layer], Number]) -> Number:
    """The sum over all layers."""
    return sum(count * of(layer) for layer, count in kinds.items())


def layers(
    model: ModelSpec,
    *,
    policy: Policy | None = None,
    codec: Codec | None = None,
    dtype: DTypeLike = "bfloat16",
    backend: str = "gpu",
    head_parts: int = 1,
    only: range | None = None,
    reading: bool = False,
    page_size: int | None = None,
    prefill_chunk: int = 1,
) -> Kinds:
    """The kinds of caches of a model, and how many there are of each.

    Args:
        model: which.
        policy: of all layers. None: everything; in layers with a window what it sees, in a ring, or in pages in order
            (`kvattn.policies.OrderedWindow`), so that they can be given back.
        codec: of all layers. None: as they are, in `dtype`.
        dtype: what tokens are before they are encoded: float32, bfloat16, float16.
        backend: whose layout.
        head_parts: devices that heads are divided over, of which this is the fullest.
        only: of these layers: those they have, and those of other layers that they share. None: of all.
        reading: count a cache once for every layer that attends to it, with that layer's window; False: once.
        page_size: R, of paged caches. None: contiguous.
        prefill_chunk: most tokens that come to a sequence at a time.

    Raises:
        ConfigError: something that is no policy or codec, an unknown dtype or backend, pages without tokens, a chunk
            without pages.
        DTypeError: a dtype that caches do not have.
        UnsupportedError: a policy and a codec that do not go together; a codec that stores keys and values differently,
            of a model that has values in keys.
    """
    if policy is not None and not isinstance(policy, Policy):
        raise ConfigError(f"policy must be a policy such as kvattn.Full(), got {policy!r}.")
    if codec is not None and not isinstance(codec, Codec):
        raise ConfigError(f"codec must be a codec such as kvattn.Int8(), or None, got {codec!r}.")
    _checks.one_of("backend", backend, ("cpu", "gpu", "tpu"))
    if page_size is not None:
        _checks.integer("page_size", page_size, 1)
    if _checks.integer("prefill_chunk", prefill_chunk, 1) > 1 and page_size is None:
        raise ConfigError("prefill_chunk without page_size: a contiguous cache is as large whatever comes at a time.")
    stored = storage_dtype(name_of("dtype", dtype))
    codec = Plain(stored) if codec is None else codec
    found: Kinds = {}
    sources, windows = model.layer_sources, model.layer_windows
    if page_size is not None and codec.rows not in (None, page_size):
        raise ConfigError(
            f"{codec} encodes {codec.rows} tokens together, a page holds {page_size}: give both the same size."
        )
    window_kept = SlidingWindow if page_size is None else OrderedWindow
    attending = {i: sources[i] for i in only or range(model.num_layers)}
    if not reading:
        attending = {source: source for source in attending.values() if source is not None}
    for reader, source in attending.items():
        if source is None:
            continue
        kept = policy or (Full() if (window := windows[source]) is None else window_kept(window))
        if (reason := codec.refuses(kept.in_order)) is not None:
            raise UnsupportedError(f"{codec} does not work with {kept}: {reason}")
        kv_heads, size = model.heads[source]
        value_size = size if model.layer_heads is not None else model.value_dim
        values_apart(codec, size, value_size, model.values_in_keys)
        layer = Layer(
            policy=kept,
            codec=codec,
            num_kv_heads=-(-kv_heads // head_parts),
            head_dim=size,
            dtype=stored,
            backend=backend,
            window=windows[reader],
            page_size=page_size or 0,
            chunk=prefill_chunk,
            value_head_dim=value_size,
            values_in_keys=model.values_in_keys,
        )
        found[layer] = found.get(layer, 0) + 1
    return found


def cache_bytes(
    model: ModelSpec,
    batch_size: int,
    length: int,
    *,
    policy: Policy | None = None,
    codec: Codec | None = None,
    dtype: DTypeLike = "bfloat16",
    backend: str = "gpu",
    page_size: int | None = None,
    num_pages: int | None = None,
    prefill_chunk: int = 1,
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
        num_pages: P, pages of each layer's pool. None: as many as B sequences of that length hold at once under the
            layer's policy (`kvattn.cache.pages_at_once`), fewer in layers with a window than in others.
        prefill_chunk: in pages, most tokens of a prompt that come at a time, as `kvattn.serving.Engine` has it.

    Raises:
        ConfigError, DTypeError, RangeError, UnsupportedError: as `kvattn.KVCache.create` and
            `kvattn.PagedKVCache.create`.

    Example:
        >>> import kvattn
        >>> model = kvattn.memory.MODELS["llama-2-7b"]
        >>> kvattn.memory.cache_bytes(model, 1, 4096) / 4096 / 2**20  # MiB per token
        0.5000000596046448
        >>> gpt_oss = kvattn.memory.MODELS["gpt-oss-20b"]  # every other layer has a window of 128 tokens
        >>> for policy in (kvattn.Full(), None):  # MiB, where all layers keep all, or windows give pages back
        ...     kvattn.memory.cache_bytes(gpt_oss, 1, 4096, policy=policy, page_size=128) >> 20
        192
        102
    """
    _checks.integer("batch_size", batch_size, 0)
    _checks.integer("length", length, 1)
    in_pages = {"page_size": page_size, "prefill_chunk": prefill_chunk}
    kinds = layers(model, policy=policy, codec=codec, dtype=dtype, backend=backend, **in_pages)
    if page_size is None:
        if num_pages is not None:
            raise ConfigError("num_pages without page_size: a contiguous cache has no pages.")
        return total(kinds, lambda layer: layer.nbytes(batch_size, length))
    if num_pages is not None:
        _checks.integer("num_pages", num_pages, 1)
    for layer in kinds:
        _check_pages(layer, batch_size * layer.num_pages(length) if num_pages is None else num_pages)
    if num_pages is None:
        return total(kinds, lambda layer: layer.nbytes(batch_size, length))
    return total(kinds, lambda layer: layer.pool_bytes(num_pages) + batch_size * layer.table_bytes(length))


def _check_pages(layer: Layer, num_pages: int) -> None:
    """That tables can name so many pages, as `kvattn.PagedKVCache.create` checks it."""
    strips = layer.num_kv_heads if layer.policy.is_uneven else 0
    if num_pages * (1 + strips) > _checks.INT32_MAX:
        raise RangeError(
            f"num_pages must be at most {_checks.INT32_MAX // (1 + strips)}, so that int32 counts "
            f"{'the strips of pages' if strips else 'them'}, got {num_pages}."
        )
