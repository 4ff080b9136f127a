"""Tunix's sampler over kvattn's models and caches.

``tunix.generate.sampler.Sampler`` asks of a model that it makes a cache (``init_cache``) and that ``model(tokens,
positions, cache, attention_mask)`` gives logits and the cache. `SamplerModel` is that, around a
`kvattn.models.Decoder`. Read in google-tunix 0.1.7 (``tunix/generate/sampler.py``).
"""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Float, Int, Shaped

from kvattn._typing import Array
from kvattn.cache import Cache
from kvattn.codecs import Codec
from kvattn.errors import ShapeError
from kvattn.models.decoder import Decoder
from kvattn.policies import Policy


class SamplerModel(nnx.Module):
    """A `kvattn.models.Decoder` as Tunix's sampler calls it: greedy and top-p sampling, logits, log-probabilities.

    Prompts are padded on the left, as the sampler does. Which tokens are real is read off the diagonal of its mask, and
    positions are those of the cache: rows may be of any length, and pads take no room. The cache's size is that of
    `CacheConfig`; a policy that bounds it needs less.

    Args:
        model: the decoder.
        policy: which tokens are kept; None: all, or what the model's layers say.
        codec: in how many bits; None: as they are.
        dtype: of what is stored without a codec. None: what the sampler says, which is that of the model.

    Example:
        >>> import jax.numpy as jnp, kvattn
        >>> from flax import nnx
        >>> from kvattn.adapters import tunix
        >>> config = kvattn.models.DecoderConfig(
        ...     vocab_size=50, model_dim=16, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8, mlp_dim=16)
        >>> model = tunix.SamplerModel(kvattn.models.Decoder(config, rngs=nnx.Rngs(0)), codec=kvattn.Int8())
        >>> cache = model.init_cache(2, 16, jnp.float32)
        >>> tokens = jnp.array([[0, 7, 8], [1, 2, 3]])  # 0 is a pad
        >>> causal = jnp.tril(jnp.ones((3, 16), bool))
        >>> mask = causal & jnp.pad(tokens != 0, ((0, 0), (0, 13)))[:, None]
        >>> logits, cache = model(tokens, None, cache, mask)
        >>> logits.shape, cache[0].lengths.tolist()
        ((2, 3, 50), [2, 3])
    """

    def __init__(
        self,
        model: Decoder,
        *,
        policy: Policy | None = None,
        codec: Codec | None = None,
        dtype: DTypeLike | None = None,
    ) -> None:
        self.model = model
        self.policy, self.codec, self.storage = nnx.static(policy), nnx.static(codec), nnx.static(dtype)

    @property
    def num_embed(self) -> int:
        """Size of the vocabulary, which Tunix makes room for when it returns logits."""
        return self.model.config.vocab_size

    def init_cache(self, batch_size: int, cache_size: int, dtype: DTypeLike) -> tuple[Cache, ...]:
        """An empty cache for each layer, with room for `cache_size` tokens."""
        dtype = dtype if self.storage is None else self.storage
        return tuple(self.model.make_cache(batch_size, cache_size, policy=self.policy, codec=self.codec, dtype=dtype))

    def __call__(
        self,
        tokens: Int[ArrayLike, "B T"],
        positions: Any,
        cache: tuple[Cache, ...],
        attention_mask: Shaped[ArrayLike, "B T S"],
        decode_only_last_token: bool = False,
    ) -> tuple[Float[Array, "B T V"], tuple[Cache, ...]]:
        """Logits [B, T, V] and the caches.

        Args:
            tokens: int32 [B, T], padded on the left.
            positions: int32 [B, T], not read: the cache knows how many tokens each row has.
            cache: from `init_cache`, or the last call.
            attention_mask: bool [B, T, S]: token t of a prompt is real where it attends to itself. A single token
                always is.
            decode_only_last_token: logits [B, 1, V] of the last token alone.

        Raises:
            ShapeError: a mask that does not fit the tokens.
            CapacityError: more tokens than the cache holds. (Under jit see `kvattn.KVCache.check`.)
        """
        tokens = jnp.asarray(tokens)
        batch, length = tokens.shape
        num_new = None
        if length > 1:
            mask = jnp.asarray(attention_mask)
            if mask.ndim != 3 or mask.shape[:2] != (batch, length) or mask.shape[2] < length:
                raise ShapeError(f"expected an attention_mask [{batch}, {length}, {length} or more], got {mask.shape}.")
            num_new = jnp.sum(jnp.diagonal(mask, axis1=1, axis2=2), axis=1, dtype=jnp.int32)
        last = jnp.full((batch, 1), length - 1, jnp.int32) if decode_only_last_token else None
        logits, caches = self.model(tokens, cache, num_new, padding="left", logits_at=last)
        assert caches is not None
        return logits, tuple(caches)
