"""`Decoder`: a decoder-only transformer, of any of the families that `DecoderConfig` describes.

Embedding, then blocks of grouped-query or latent attention and an MLP, each with its norms and a residual, then a
norm and the logits. The caches are explicit: one per layer that keeps keys and values goes in, and comes out.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh, Mesh
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Float, Int

from kvattn import _checks
from kvattn._typing import Array
from kvattn.attend.tokens import rotated_left
from kvattn.cache import Cache, PagedKVCache
from kvattn.codecs import Codec
from kvattn.errors import DTypeError, RangeError, ShapeError
from kvattn.families.config import DecoderConfig
from kvattn.layers import dot_product_attention as default_attention
from kvattn.layers import placement
from kvattn.layers.attention_fn import Attention
from kvattn.models.block import KV, Block
from kvattn.models.parts import Norm, OwnEmbeddings
from kvattn.models.placement import Split
from kvattn.policies import Policy

Caches = tuple[Cache, ...]


class Decoder(nnx.Module):
    """A decoder-only transformer.

    Args:
        config: its sizes and rules.
        dtype: the dtype to compute in; that of the parameters if None.
        param_dtype: the dtype of the parameters.
        attention_fn: what attends where no cache is given, as the argument of `flax.nnx.MultiHeadAttention`. Latent
            attention takes none.
        mesh: devices to split the model over: parameters by heads and by the MLP's hidden size (what does not divide,
            embeddings and norms lie on every device), the caches as `by` says.
        by: "heads", "batch", "sequence", "replicated", or "auto", as `kvattn.sharding.choose` says.
        axis: the mesh axis for all of this.
        rngs: where the initial parameters are drawn from.

    Raises:
        ShardingError: a mesh without the axis.
        UnsupportedError: an `attention_fn` for latent attention.

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
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        attention_fn: Attention = default_attention,
        mesh: Mesh | AbstractMesh | None = None,
        by: str = "auto",
        axis: str = "model",
        rngs: nnx.Rngs,
    ):
        split = Split(mesh, by, axis)
        options = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        whole = split.along((), None)
        table = {"embedding_init": nnx.initializers.normal(0.02), "embedding_metadata": whole, **options}
        width = config.embedding_dim or config.model_dim

        def linear(size_in: int, size_out: int, wanted: bool) -> Any:
            if not wanted:
                return nnx.data(None)
            return nnx.Linear(size_in, size_out, use_bias=False, kernel_metadata=whole, **options)

        def norm(wanted: bool) -> Any:
            return Norm(config, split, param_dtype=param_dtype) if wanted else nnx.data(None)

        self.config = config
        self.split = split
        self.embed = nnx.Embed(config.vocab_size, width, **table)
        self.positions = (
            nnx.Embed(config.max_positions or 1, config.model_dim, **table)
            if config.positions == "learned"
            else nnx.data(None)
        )
        self.embed_in = linear(width, config.model_dim, config.embedding_dim is not None)
        self.embed_norm = norm(config.embedding_norm)
        size = config.per_layer_dim
        self.own_embeddings = nnx.data(None) if size is None else OwnEmbeddings(config, split, size, **options)
        self.layers = nnx.List([Block(config, i, attention_fn, split, **options) for i in range(config.num_layers)])
        self.norm = norm(config.final_norm)
        self.embed_out = linear(config.model_dim, width, config.embedding_dim is not None)
        self.head = linear(width, config.vocab_size, not config.tie_embeddings)
        if mesh is not None:
            placement.put(self, mesh)

    def __call__(
        self,
        tokens: Int[ArrayLike, "B T"],
        cache: Sequence[Cache] | None = None,
        num_new: ArrayLike | None = None,
        *,
        padding: str = "right",
        logits_at: ArrayLike | None = None,
    ) -> tuple[Array, Caches | None]:
        """Logits of the next token after each of `tokens`.

        Args:
            tokens: int32 [B, T].
            cache: one per layer that keeps keys and values (`make_cache`), holding what came before; donate it. None:
                nothing came before and nothing is kept.
            num_new: int32 [B], how many of the T tokens are real. None: all. What comes out at the others means
                nothing. Without a cache and with pads on the right it tells "dynamic" and "longrope" RoPE how long a
                row is; else nothing depends on it there: a token never sees those after it.
            padding: on which side of the real tokens the others lie, "right" or "left". The caches are the same.
            logits_at: int32 [B, M], at which of the T tokens logits are wanted. None: at all of them, which takes
                4·B·T·V bytes. After a prompt only the last ones matter: ``num_new[:, None] - 1``.

        With "dynamic" and "longrope" RoPE what comes out depends on how a prompt is cut into calls, see `kvattn.RoPE`.

        Returns:
            logits float32 [B, T, V], or [B, M, V], and the caches (None without).

        Raises:
            ShapeError: tokens that are not [B, T], `logits_at` that is not [B, M], or a wrong number of caches.
            DTypeError: tokens or `logits_at` that are not integers.
            ConfigError: a `padding` that is neither.
            RangeError: a token id outside the vocabulary, an index outside [0, T), or more tokens than there are
                learned positions. (Under jit its logits are NaN.)
            CapacityError: more tokens than a cache holds. (Under jit see `kvattn.KVCache.check`.)
        """
        x, caches = self.hidden(tokens, cache, num_new, padding=padding)
        if logits_at is not None:
            x = _at(x, logits_at)
        return placement.like_rows(self.logits(x), jnp.asarray(tokens)), caches

    def hidden(
        self,
        tokens: Int[ArrayLike, "B T"],
        cache: Sequence[Cache] | None = None,
        num_new: ArrayLike | None = None,
        *,
        padding: str = "right",
    ) -> tuple[Float[Array, "B T D"], Caches | None]:
        """What the last layer makes of `tokens` [B, T], and the caches: all of a call but the `logits`.

        Arguments and errors are those of a call.
        """
        tokens = self._tokens(tokens)
        if cache is not None:
            self.check_number(cache)
        _checks.one_of("padding", padding, ("right", "left"))
        late = None
        if padding == "left" and num_new is not None:
            num_new = _checks.counts("num_new", num_new, tokens.shape[0], 0, tokens.shape[1])
            late = tokens.shape[1] - num_new
            tokens = rotated_left(tokens, placement.like_rows(late, tokens))
        x = self._embedded(tokens, None if cache is None else cache[0].lengths, num_new)
        x = self.split.rows(x, cache is not None)
        positions = None
        if cache is None and num_new is not None and self._depends_on_length:
            positions = self._own_positions(tokens.shape[1], num_new)
        embedded = None if self.own_embeddings is None else self.own_embeddings(tokens, x)
        x, caches = self._through(x, cache, num_new, tokens, positions, embedded)
        if late is not None:
            x = rotated_left(x, -placement.like_rows(late, x))
        return x, caches

    def _through(
        self,
        x: Array,
        cache: Sequence[Cache] | None,
        num_new: ArrayLike | None,
        tokens: Array,
        positions: Array | None,
        embedded: Array | None,
    ) -> tuple[Array, Caches | None]:
        """[B, T, D] through all layers, with the caches of those that keep keys and values.

        What others read: of a cache that holds after its owner's step what each new token sees, that cache. Else the
        tokens' keys and values, with the cache as it was before.
        """
        number = {layer: i for i, layer in enumerate(self.config.cache_layers)}
        after: dict[int, Cache | None] = {}
        keys_and_values: dict[int, KV | None] = {}
        for i, (layer, source) in enumerate(zip(self.layers, self.config.layer_sources, strict=True)):
            own = None if embedded is None else embedded[:, :, i]
            before = None if cache is None else cache[number[source]]
            if i == source:
                x, after[i], keys_and_values[i] = layer(x, before, num_new, tokens, positions, embedded=own)
                continue
            there, kv, new = after[source], keys_and_values[source], num_new
            if before is None or there is None:
                x, *_ = layer(x, None, new, tokens, positions, kv=kv, embedded=own)
                continue
            given = before
            if tokens.shape[1] == 1 or _keeps_a_chunk(before):
                # Tokens that were refused are not there.
                given, kv, new = there, None, there.lengths - before.lengths
            x, marked, _ = layer(x, given, new, tokens, positions, kv=kv, append=False, embedded=own)
            if marked is not None:
                after[source] = there.replace(status=there.status | marked.status)
        return x, None if cache is None else tuple(cache for cache in after.values() if cache is not None)

    def check_number(self, cache: Sequence[Cache]) -> None:
        """Checks that there is a cache for every layer that keeps keys and values.

        Raises:
            ShapeError: more, or fewer.
        """
        expected = len(self.config.cache_layers)
        if len(cache) != expected:
            raise ShapeError(
                f"the model has {len(self.layers)} layers{self._of_which} but was given {len(cache)} caches: one for "
                "each."
            )

    @property
    def _of_which(self) -> str:
        """For messages: which of the layers have caches, where not all do."""
        expected = len(self.config.cache_layers)
        return "" if expected == len(self.layers) else f", {expected} of which keep keys and values,"

    def make_cache(
        self,
        batch_size: int,
        capacity: int | None = None,
        *,
        policy: Policy | Sequence[Policy | None] | None = None,
        codec: Codec | Sequence[Codec | None] | None = None,
        dtype: DTypeLike | None = None,
        memory_kind: str | None = None,
        platform: str | None = None,
    ) -> Caches:
        """Empty caches, one per layer that keeps keys and values (`DecoderConfig.cache_layers`).

        Args:
            batch_size: B.
            capacity: most tokens a sequence may keep. Not needed where every layer has a window.
            policy: which tokens are kept. None: all of them, in layers with a window those within it. A list or tuple:
                one for each of these layers.
            codec: in how many bits. None: as they are. A list or tuple: one for each of these layers.
            dtype: what is stored without a codec. None: the dtype the model computes in.
            memory_kind: "pinned_host" for keys and values in the host's memory, as in `kvattn.KVCache.create`.
            platform: what the caches are made for, as in `kvattn.KVCache.create`. None: the model's mesh, or where they
                are made.

        Raises:
            ShapeError: a list with more or fewer entries than there are such layers.
        """
        choices = zip(self.owners, self._each("policy", policy), self._each("codec", codec), strict=True)
        options = {"dtype": dtype, "memory_kind": memory_kind, "platform": platform}
        return tuple(
            layer.attention.make_cache(batch_size, capacity, policy=policy, codec=codec, **options)
            for layer, policy, codec in choices
        )

    def make_paged_cache(
        self,
        num_pages: int | Sequence[int],
        page_size: int | None = None,
        *,
        batch_size: int,
        max_length: int,
        policy: Policy | Sequence[Policy | None] | None = None,
        codec: Codec | Sequence[Codec | None] | None = None,
        dtype: DTypeLike | None = None,
        platform: str | None = None,
    ) -> tuple[PagedKVCache, ...]:
        """Empty pools of pages, one per layer that keeps keys and values.

        Layers of equal window and shape share tables (`kvattn.cache.groups_of`), which the host decides and
        `kvattn.cache.with_tables` gives to all of them.

        Args:
            num_pages: P, pages of each layer's pool. A list or tuple: one for each layer, so that those with a window
                can have fewer (`kvattn.cache.pages_at_once`).
            page_size: R, tokens of a page. None: as many as the codec encodes together, else the smallest from 16 on
                that kernels take on the platform.
            batch_size: B, sequences of a step.
            max_length: most tokens of a sequence.
            policy: which tokens are kept. None: all of them; in layers with a window those within it, whose pages can
                be given back (`kvattn.policies.OrderedWindow`). A list or tuple: one for each layer.
            codec: in how many bits. None: as they are. A list or tuple: one for each layer.
            dtype: what is stored without a codec. None: the dtype the model computes in.
            platform: as in `make_cache`.

        Raises:
            ShapeError: a list with more or fewer entries than there are layers.
            Else as `kvattn.PagedKVCache.create`.
        """
        options = (self._each("num_pages", num_pages), self._each("policy", policy), self._each("codec", codec))
        sizes = {"batch_size": batch_size, "max_length": max_length, "dtype": dtype, "platform": platform}

        def make(size: int | None) -> tuple[PagedKVCache, ...]:
            return tuple(
                layer.attention.make_paged_cache(pages, size, policy=policy, codec=codec, **sizes)
                for layer, pages, policy, codec in zip(self.owners, *options, strict=True)
            )

        if page_size is None:
            free = [cache.page_size for cache in jax.eval_shape(lambda: make(None)) if cache.codec.rows is None]
            # Layers whose heads have other sizes may want larger pages; those that share tables need the same.
            page_size = max(free) if len(free) == len(self.owners) else None
        return make(page_size)

    @property
    def owners(self) -> tuple[Block, ...]:
        """The layers that keep keys and values, in the order of their caches."""
        return tuple(self.layers[i] for i in self.config.cache_layers)

    def _each(self, name: str, value: Any) -> tuple[Any, ...]:
        """One value per layer that keeps keys and values."""
        expected = len(self.config.cache_layers)
        if not isinstance(value, list | tuple):
            return (value,) * expected
        if len(value) != expected:
            raise ShapeError(
                f"{name} has {len(value)} entries for {len(self.layers)} layers{self._of_which.rstrip(',')}: one for "
                "each, or one."
            )
        return tuple(value)

    def _tokens(self, tokens: ArrayLike) -> Int[Array, "B T"]:
        """Tokens [B, T] as int32, checked."""
        tokens = jnp.asarray(tokens)
        if not jnp.issubdtype(tokens.dtype, jnp.integer):
            raise DTypeError(f"tokens must be integers, got {tokens.dtype}.")
        if tokens.ndim != 2:
            raise ShapeError(f"tokens must be [B, T], got shape {tokens.shape}.")
        if tokens.size and _checks.is_concrete(tokens):
            values = np.asarray(tokens)  # inside jit a closed-over array can be looked at, but not its minimum
            low, high = int(values.min()), int(values.max())
            if low < 0 or high >= self.config.vocab_size:
                raise RangeError(f"token ids must lie in [0, {self.config.vocab_size}), got {low} to {high}.")
        return tokens.astype(jnp.int32)

    def _embedded(self, tokens: Array, lengths: Array | None, num_new: ArrayLike | None) -> Array:
        """[B, T] tokens that follow `lengths` others -> [B, T, D]."""
        x = self.embed(tokens)
        if self.config.embedding_scale is not None:
            # Rounded to the dtype of the activations first, as the families that scale do.
            x = x * jnp.asarray(self.config.embedding_scale, x.dtype)
        if self.embed_in is not None:
            x = self.embed_in(x)
        if self.positions is not None:
            x = x + self.positions(self._positions(tokens.shape, lengths, num_new))
        return x if self.embed_norm is None else self.embed_norm(x)

    @property
    def _depends_on_length(self) -> bool:
        """Whether frequencies depend on a row's largest position."""
        return self.config.rope is not None and self.config.rope.depends_on_length

    def _own_positions(self, length: int, num_new: ArrayLike) -> Int[Array, "B T"]:
        """Of what follows nothing, where `num_new` [B] tokens are real; 0 for the others."""
        positions = jnp.arange(length, dtype=jnp.int32)[None]
        return jnp.where(positions < jnp.asarray(num_new, jnp.int32)[:, None], positions, 0)

    def _positions(self, shape: tuple[int, ...], lengths: Array | None, num_new: ArrayLike | None) -> Array:
        """int32 [B, T], or [1, T] where nothing came before; 0 for tokens that are not real."""
        positions = jnp.arange(shape[1], dtype=jnp.int32)[None]
        if lengths is not None:
            if num_new is not None:
                positions = jnp.where(
                    positions < jnp.asarray(num_new, jnp.int32)[:, None], positions, -lengths[:, None]
                )
            positions = lengths[:, None] + positions
        most = int(self.config.max_positions or 0)
        if _checks.is_concrete(positions) and positions.size and int(positions.max()) >= most:
            raise RangeError(
                f"the model has {most} learned positions, a token came at position {int(positions.max())}: give it "
                f"at most {most} tokens per sequence."
            )
        return positions

    def logits(self, x: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """float32, from what `hidden` returns."""
        if self.norm is not None:
            x = self.norm(x)
        if self.embed_out is not None:
            x = self.embed_out(x)
        head = self.embed.embedding[...].T if self.head is None else self.head.kernel[...]
        logits = jnp.einsum("btd,dv->btv", x, head.astype(x.dtype), preferred_element_type=jnp.float32)
        if self.config.logit_scale is not None:
            logits = logits * self.config.logit_scale
        cap = self.config.logit_softcap
        return logits if cap is None else jnp.tanh(logits / cap) * cap


def _keeps_a_chunk(cache: Cache) -> bool:
    """Whether a cache, once it has taken a chunk, gives its queries what they had while it came."""
    return cache.policy.in_order and cache.codec.for_chunk(cache.dtype) == cache.codec


def _at(x: Float[Array, "B T D"], index: ArrayLike) -> Float[Array, "B M D"]:
    """The tokens [B, M] of every row; NaN where there is no such token."""
    at, length = _checks.integers("logits_at", index), x.shape[1]
    if at.ndim != 2 or at.shape[0] != x.shape[0]:
        raise ShapeError(f"logits_at must be [{x.shape[0]}, M], got shape {at.shape}.")
    if at.size and _checks.is_concrete(at):
        low, high = int(np.min(np.asarray(at))), int(np.max(np.asarray(at)))
        if low < 0 or high >= length:
            raise RangeError(f"logits_at must lie in [0, {length}), got {low} to {high}.")
    at = placement.like_rows(jnp.where(at < 0, length, _checks.int32("logits_at", at)), x)
    return jnp.take_along_axis(x, at[:, :, None], axis=1, mode="fill")
