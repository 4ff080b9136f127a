"""`Decoder`: a decoder-only transformer, as Llama and its relatives have it.

Embedding, then blocks of grouped-query attention and a SwiGLU, each behind an RMS norm and a residual,
then a norm and the logits. The caches are explicit: one per layer goes in, one per layer comes out.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from kvattn import _checks
from kvattn._typing import Array
from kvattn.cache import Cache
from kvattn.errors import DTypeError, RangeError, ShapeError
from kvattn.layers import GroupedQueryAttention
from kvattn.layers import dot_product_attention as default_attention
from kvattn.models.config import DecoderConfig

Caches = tuple[Cache, ...]


class RMSNorm(nnx.Module):
    """``x / rms(x) * scale`` in float32, whatever goes in and comes out."""

    def __init__(self, config: DecoderConfig, *, param_dtype: Any = jnp.float32):
        self.epsilon = config.norm_epsilon
        self.scale = nnx.Param(jnp.ones((config.model_dim,), param_dtype))

    def __call__(self, x: Array) -> Array:
        """[B, T, D] -> [B, T, D]."""
        wide = x.astype(jnp.float32)
        factor = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.epsilon)
        return (wide * factor * self.scale[...].astype(jnp.float32)[None, None]).astype(x.dtype)


class MLP(nnx.Module):
    """SwiGLU: ``down(silu(gate(x)) * up(x))``."""

    def __init__(self, config: DecoderConfig, **options: Any):
        def linear(size_in: int, size_out: int) -> nnx.Linear:
            return nnx.Linear(size_in, size_out, use_bias=False, **options)

        self.gate = linear(config.model_dim, config.mlp_dim)
        self.up = linear(config.model_dim, config.mlp_dim)
        self.down = linear(config.mlp_dim, config.model_dim)

    def __call__(self, x: Array) -> Array:
        """[..., D] -> [..., D]."""
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


class Block(nnx.Module):
    """Attention and MLP, each behind its norm and added to what came in."""

    def __init__(self, config: DecoderConfig, window: int | None, attention_fn: Any, **options: Any):
        self.attention_norm = RMSNorm(config, param_dtype=options["param_dtype"])
        self.attention = GroupedQueryAttention(
            config.num_heads,
            config.model_dim,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            window=window,
            rope=config.rope,
            softcap=config.softcap,
            attention_fn=attention_fn,
            use_bias=False,
            **options,
        )
        self.mlp_norm = RMSNorm(config, param_dtype=options["param_dtype"])
        self.mlp = MLP(config, **options)

    def __call__(
        self, x: Array, cache: Cache | None, num_new: Array | None, tokens: Array
    ) -> tuple[Array, Cache | None]:
        """[B, T, D] and this layer's cache -> the same; `tokens` [B, T] are for policies that look at them."""
        y = self.attention_norm(x)
        if cache is None:
            y = self.attention(y, is_causal=True)
        else:
            y, cache = self.attention(y, cache=cache, num_new=num_new, token_ids=tokens)
        x = x + y
        return x + self.mlp(self.mlp_norm(x)), cache


class Decoder(nnx.Module):
    """A decoder-only transformer.

    Args:
        config: its sizes and rules.
        dtype: the dtype to compute in; that of the parameters if None.
        param_dtype: the dtype of the parameters.
        attention_fn: what attends where no cache is given, as the argument of `flax.nnx.MultiHeadAttention`.
        rngs: where the initial parameters are drawn from.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from kvattn.models import Decoder, DecoderConfig
        >>> config = DecoderConfig(vocab_size=256, model_dim=64, num_layers=2, num_heads=8, num_kv_heads=2, mlp_dim=96)
        >>> model = Decoder(config, rngs=nnx.Rngs(0))
        >>> logits, _ = model(jnp.ones((1, 10), jnp.int32))
        >>> logits.shape
        (1, 10, 256)
    """

    def __init__(
        self,
        config: DecoderConfig,
        *,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        attention_fn: Callable[..., Array] = default_attention,
        rngs: nnx.Rngs,
    ):
        options = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.config = config
        self.embed = nnx.Embed(
            config.vocab_size, config.model_dim, embedding_init=nnx.initializers.normal(0.02), **options
        )
        self.layers = nnx.List([Block(config, window, attention_fn, **options) for window in config.layer_windows])
        self.norm = RMSNorm(config, param_dtype=param_dtype)
        self.head = (
            nnx.data(None)
            if config.tie_embeddings
            else nnx.Linear(config.model_dim, config.vocab_size, use_bias=False, **options)
        )

    def __call__(
        self, tokens: Array, cache: Sequence[Cache] | None = None, num_new: Array | None = None
    ) -> tuple[Array, Caches | None]:
        """Logits of the next token after each of `tokens`.

        Args:
            tokens: int32 [B, T].
            cache: one per layer (`make_cache`), holding what came before; donate it. None: nothing came before
                and nothing is kept.
            num_new: int32 [B], how many of the T tokens are real, the others following them. None: all. What
                comes out at the others means nothing. Without a cache nothing depends on it: a token never sees
                those after it.

        Returns:
            logits float32 [B, T, V], and the caches (None without).

        Raises:
            ShapeError: tokens that are not [B, T], or a wrong number of caches.
            DTypeError: tokens that are not integers.
            RangeError: a token id outside the vocabulary. (Under jit its row's logits are NaN.)
            CapacityError: more tokens than a cache holds. (Under jit see `kvattn.KVCache.check`.)
        """
        tokens = self._tokens(tokens)
        if cache is not None and len(cache) != len(self.layers):
            raise ShapeError(
                f"the model has {len(self.layers)} layers but was given {len(cache)} caches: one for each."
            )
        x = self.embed(tokens)
        caches = []
        for i, layer in enumerate(self.layers):
            x, layer_cache = layer(x, None if cache is None else cache[i], num_new, tokens)
            caches.append(layer_cache)
        return self._logits(self.norm(x)), None if cache is None else tuple(caches)

    def make_cache(
        self, batch_size: int, capacity: int | None = None, *, policy: Any = None, codec: Any = None, dtype: Any = None
    ) -> Caches:
        """Empty caches, one per layer.

        Args:
            batch_size: B.
            capacity: most tokens a sequence may keep. Not needed where every layer has a window.
            policy: which tokens are kept. None: all of them, in layers with a window those within it.
            codec: in how many bits. None: as they are.
            dtype: what is stored without a codec. None: the dtype the model computes in.
        """
        return tuple(
            layer.attention.make_cache(batch_size, capacity, policy=policy, codec=codec, dtype=dtype)
            for layer in self.layers
        )

    def _tokens(self, tokens: Any) -> Array:
        tokens = jnp.asarray(tokens)
        if not jnp.issubdtype(tokens.dtype, jnp.integer):
            raise DTypeError(f"tokens must be integers, got {tokens.dtype}.")
        if tokens.ndim != 2:
            raise ShapeError(f"tokens must be [B, T], got shape {tokens.shape}.")
        if tokens.size and _checks.is_concrete(tokens):
            low, high = int(tokens.min()), int(tokens.max())
            if low < 0 or high >= self.config.vocab_size:
                raise RangeError(f"token ids must lie in [0, {self.config.vocab_size}), got {low} to {high}.")
        return tokens.astype(jnp.int32)

    def _logits(self, x: Array) -> Array:
        head = self.embed.embedding[...].T if self.head is None else self.head.kernel[...]
        logits = jnp.einsum("btd,dv->btv", x, head.astype(x.dtype), preferred_element_type=jnp.float32)
        cap = self.config.logit_softcap
        return logits if cap is None else jnp.tanh(logits / cap) * cap
