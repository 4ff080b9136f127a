"""KerasHub's backbones over kvattn's caches, by the hook that they have for paged attention.

Under `vllm_context_scope` of ``keras_hub.src.vllm.context`` the attention layers of Gemma, Gemma 3, Llama, Mistral,
Qwen and Qwen 3, and `CachedMultiHeadAttention`, project, rotate, and hand queries, keys and values to one function with
the cache of their layer. `paged_attention` makes such a function, of any cache: every policy, codec, and pages. Read in
keras-hub 0.32.0 (``keras_hub/src/vllm/attention.py``), where it is not yet public. Needs Keras on its JAX backend.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Float, Int

from kvattn import _checks
from kvattn._typing import Array
from kvattn.attend.api import Implementation
from kvattn.cache import Cache
from kvattn.errors import ConfigError, MissingLibraryError, ShapeError
from kvattn.sharding import explicit

Hook = Callable[..., tuple[Cache, Array]]
"""What KerasHub calls: ``(cache, query, key, value, scale, head_size, num_heads, num_kv_heads, ...)``."""


def paged_attention(
    num_new: ArrayLike | None = None, *, padding: str = "right", implementation: Implementation = None
) -> Hook:
    """The function that KerasHub's attention layers call while they serve.

    Args:
        num_new: int32[B], how many tokens of each row are real. None: all.
        padding: on which side of them the others lie, "right" or "left".
        implementation: as in `kvattn.cached_attention`.

    Returns:
        A function of the cache of a layer; queries [B * T, N * H], keys and values [B * T, K * H], a row's tokens
        beside each other; and the layer's scale, head size, head counts, sliding window and soft cap. It gives the new
        cache and the output [B * T, N * H].

    Example:
        >>> import jax.numpy as jnp, kvattn
        >>> from kvattn.adapters import keras_hub
        >>> cache = kvattn.KVCache.create(2, 1, 8, capacity=16, dtype=jnp.float32)
        >>> hook = keras_hub.paged_attention()
        >>> cache, out = hook(cache, jnp.ones((6, 16)), jnp.ones((6, 8)), jnp.ones((6, 8)), 0.35, 8, 2, 1)
        >>> out.shape, cache.lengths.tolist()
        ((6, 16), [3, 3])
    """
    _checks.one_of("padding", padding, ("right", "left"))

    def attend(
        cache: Cache | None,
        query: Float[ArrayLike, "tokens NH"],
        key: Float[ArrayLike, "tokens KH"],
        value: Float[ArrayLike, "tokens KH"],
        scale: float,
        head_size: int,
        num_heads: int,
        num_kv_heads: int,
        sliding_window: int | None = None,
        soft_cap: float | None = None,
    ) -> tuple[Cache, Float[Array, "tokens NH"]]:
        if cache is None:
            raise ConfigError("this layer was given no cache: give vllm_context_scope kv_caches, one for each layer.")
        tokens, batch = jnp.shape(query)[0], cache.batch_size
        if tokens % batch:
            raise ShapeError(
                f"expected the tokens of {batch} rows, as many of each, got {tokens} tokens: "
                "pad the rows to one length and give num_new."
            )

        def rows(x: ArrayLike, heads: int) -> Array:
            """[B, T, heads, H] of [B * T, heads * H]."""
            return jnp.reshape(jnp.asarray(x), (batch, -1, heads, head_size))

        out, cache = explicit.cached_attention(
            rows(query, num_heads),
            rows(key, num_kv_heads),
            rows(value, num_kv_heads),
            cache,
            num_new=num_new,
            padding=padding,
            scale=float(scale),
            window=sliding_window,
            softcap=soft_cap,
            implementation=implementation,
        )
        return cache, out.reshape(tokens, num_heads * head_size)

    return attend


def positions(
    cache: Cache, length: int, num_new: ArrayLike | None = None, padding: str = "right"
) -> Int[Array, " tokens"]:
    """The positions int32[B * T] of the next T tokens of each row, by which KerasHub's layers rotate.

    Pads have those that they would have if they were real (on the right), or 0 (on the left).
    """
    t = jnp.arange(length, dtype=jnp.int32)[None]
    if padding == "left" and num_new is not None:
        t = t - (length - jnp.asarray(num_new, jnp.int32)[:, None])
    return jnp.maximum(cache.lengths[:, None] + t, 0).reshape(-1)


def forward(
    backbone: Callable[..., Any],
    tokens: Int[ArrayLike, "B T"],
    caches: Sequence[Cache],
    num_new: ArrayLike | None = None,
    *,
    padding: str = "right",
    implementation: Implementation = None,
) -> tuple[Float[Array, "B T D"], list[Cache]]:
    """One step of a KerasHub backbone over a cache for each of its layers: a prompt, a chunk of one, or one token.

    Args:
        backbone: of a family that has the hook, such as `keras_hub.models.LlamaBackbone`.
        tokens: int32 [B, T].
        caches: one per layer, in their order.
        num_new: int32[B], how many of the T tokens are real. None: all.
        padding: on which side of them the others lie.
        implementation: as in `kvattn.cached_attention`.

    Returns:
        Hidden states [B, T, D] (``backbone.token_embedding(hidden, reverse=True)`` makes logits of them), and the
        caches. Donate those that were given.

    Raises:
        MissingLibraryError: keras-hub is not installed, or has no such hook.
        ConfigError: another number of caches than layers that attend.
        CapacityError, ShapeError: as in `kvattn.cached_attention`.
    """
    try:
        from keras_hub.src.vllm import context as hub  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise MissingLibraryError(
            "kvattn.adapters.keras_hub.forward needs keras-hub 0.32 or later: pip install keras-hub"
        ) from error
    tokens = jnp.asarray(tokens)
    batch, length = tokens.shape
    flat = tokens.reshape(-1, 1)  # as it serves: a sequence for each token
    scope = hub.vllm_context_scope(
        paged_attention_func=paged_attention(num_new, padding=padding, implementation=implementation),
        positions=positions(caches[0], length, num_new, padding),
        kv_caches=caches,
    )
    with scope:
        hidden = backbone({"token_ids": flat, "padding_mask": jnp.ones_like(flat)}, training=False)
        context = hub.get_vllm_context()
        if context.layer_index != len(caches):
            raise ConfigError(f"{context.layer_index} layers attended, got {len(caches)} caches: one each is expected.")
        caches = list(context.updated_kv_caches)
    return hidden.reshape(batch, length, -1), caches
