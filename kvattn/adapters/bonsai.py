"""Models whose cache is a Flax module that they change as they go, as Bonsai's: kvattn's caches in an `nnx.Cache`.

Bonsai's models are called ``model(tokens, cache=cache, segment_ids=segment_ids)`` with a `LayerCache` for each layer,
an NNX module. Here is one that holds any cache of kvattn (`LayerCache`), and an attention layer that puts its
projections, norms and rotation around it (`Attention`, and `convert`, which changes a model's layers into it). Read
in jax-ml/bonsai at 3628425 (``bonsai/models/qwen3/modeling.py``).
"""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike
from jaxtyping import Float, Int

from kvattn._typing import Array
from kvattn.attend.api import Implementation
from kvattn.cache import Cache, KVCache
from kvattn.codecs import Codec
from kvattn.errors import ConfigError
from kvattn.policies import Full, Policy
from kvattn.positions import RoPE
from kvattn.sharding import explicit


class LayerCache(nnx.Module):
    """Any cache of kvattn in an `nnx.Cache`: `attend` appends to it, and remembers.

    What is changed in a module under `jax.jit` is lost: use `nnx.jit`, or return the module, as Bonsai's `forward`
    does.

    Args:
        cache: a `KVCache` or `PagedKVCache`.

    Example:
        >>> import jax.numpy as jnp, kvattn
        >>> from kvattn.adapters.bonsai import LayerCache
        >>> cache = LayerCache(kvattn.KVCache.create(1, 2, 8, capacity=16, dtype=jnp.float32))
        >>> q, k = jnp.ones((1, 3, 4, 8)), jnp.ones((1, 3, 2, 8))
        >>> cache.attend(q, k, k, segment_ids=jnp.array([[0, 1, 1]])).shape  # a pad, and two tokens
        (1, 3, 4, 8)
        >>> cache.lengths.tolist()
        [2]
    """

    def __init__(self, cache: Cache) -> None:
        self.cache = nnx.Cache(cache)

    @property
    def lengths(self) -> Int[Array, " B"]:
        """int32[B], tokens seen."""
        return self.cache.get_value().lengths

    def check(self) -> None:
        """Raises what a compiled step could only record.

        Raises:
            CapacityError: tokens were offered that did not fit. They were dropped, the cache holds those before them.
        """
        self.cache.get_value().check()

    def attend(
        self,
        query: Float[ArrayLike, "B T N H"],
        key: Float[ArrayLike, "B T K H"],
        value: Float[ArrayLike, "B T K Hv"],
        segment_ids: Int[ArrayLike, "B T"] | None = None,
        **rules: Any,
    ) -> Float[Array, "B T N Hv"]:
        """Appends and attends.

        Args:
            query: [B, T, N, H].
            key: [B, T, K, H], not rotated where `rope` is given.
            value: [B, T, K, Hv].
            segment_ids: int [B, T], 0 for pads: those before a row's first token, or behind its last. None: no pads.
            rules: `rope`, `window`, `scale`, `softcap` and the others of `kvattn.cached_attention`.

        Returns:
            [B, T, N, Hv], zeros for pads.
        """
        num_new, pads = None, None
        if segment_ids is not None:
            real = jnp.asarray(segment_ids) != 0
            num_new = jnp.sum(real, axis=1, dtype=jnp.int32)
            pads = jnp.where(num_new > 0, jnp.argmax(real, axis=1).astype(jnp.int32), 0)
            query, key, value = (_shifted(jnp.asarray(x), pads) for x in (query, key, value))
        out, cache = explicit.cached_attention(query, key, value, self.cache.get_value(), num_new=num_new, **rules)
        self.cache.set_value(cache)
        return out if pads is None else _shifted(out, -pads)


def _shifted(x: Float[Array, "B T N H"], by: Int[Array, " B"]) -> Float[Array, "B T N H"]:
    """Every row turned to the left by so many tokens: pads on the left come to lie on the right."""
    t = (jnp.arange(x.shape[1])[None] + by[:, None]) % x.shape[1]
    return jnp.take_along_axis(x, t[:, :, None, None], axis=1)


class Attention(nnx.Module):
    """A layer of Bonsai's over a `LayerCache`: the projections and norms it has, and kvattn's attention.

    Args:
        layer: an attention layer with `q_proj`, `k_proj`, `v_proj` and `o_proj`, with norms `q_norm` and `k_norm` or
            without, as those of Bonsai's Qwen 3 and Gemma 3.
        rope: rotates queries and keys.
        window: attend to the last `window` tokens only.
        implementation: as in `kvattn.cached_attention`.

    Raises:
        ConfigError: the layer has no such projections.
    """

    def __init__(
        self,
        layer: Any,
        rope: RoPE | None = None,
        *,
        window: int | None = None,
        implementation: Implementation = None,
    ) -> None:
        missing = [name for name in ("q_proj", "k_proj", "v_proj", "o_proj") if not hasattr(layer, name)]
        if missing:
            raise ConfigError(
                f"expected a layer with q_proj, k_proj, v_proj and o_proj, got {layer} without {missing}."
            )
        self.q_proj, self.k_proj, self.v_proj = layer.q_proj, layer.k_proj, layer.v_proj
        self.o_proj = layer.o_proj
        self.q_norm, self.k_norm = (nnx.data(getattr(layer, name, None)) for name in ("q_norm", "k_norm"))
        self.scale = nnx.static(float(layer.scale) if hasattr(layer, "scale") else None)
        self.rope, self.window = nnx.static(rope), nnx.static(window)
        self.implementation = nnx.static(implementation)

    def __call__(
        self, x: Float[Array, "B T D"], cache: LayerCache, segment_ids: Int[ArrayLike, "B T"] | None = None
    ) -> Float[Array, "B T D"]:
        """Appends the tokens x [B, T, D] to the cache and attends: see `LayerCache.attend`."""
        query, key, value = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        query = query if self.q_norm is None else self.q_norm(query)
        key = key if self.k_norm is None else self.k_norm(key)
        rules = {"rope": self.rope, "window": self.window, "scale": self.scale, "implementation": self.implementation}
        return self.o_proj(cache.attend(query, key, value, segment_ids, **rules))


def convert(model: Any, rope: RoPE | None = None, *, implementation: Implementation = None) -> Any:
    """A model of Bonsai's with `Attention` in place of the attention of each of its ``layers``. It is changed in place.

    Args:
        model: with a list ``layers``, each with an attention layer ``attn``.
        rope: rotates queries and keys.
        implementation: as in `kvattn.cached_attention`.
    """
    for block in model.layers:
        block.attn = Attention(block.attn, rope, implementation=implementation)
    return model


def init_cache(
    num_layers: int,
    batch_size: int,
    num_kv_heads: int,
    head_dim: int,
    *,
    capacity: int | None = None,
    policy: Policy | None = None,
    codec: Codec | None = None,
    dtype: Any = jnp.bfloat16,
) -> list[LayerCache]:
    """An empty cache for each layer, what Bonsai's `init_cache` makes. Arguments are those of `KVCache.create`."""
    policy = Full() if policy is None else policy
    options = {"capacity": capacity, "policy": policy, "codec": codec, "dtype": dtype}
    return [LayerCache(KVCache.create(batch_size, num_kv_heads, head_dim, **options)) for _ in range(num_layers)]
