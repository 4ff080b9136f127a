"""`MultiHeadLatentAttention`: DeepSeek's MLA as an NNX layer."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.linear import default_kernel_init
from flax.typing import PrecisionLike
from jax.sharding import AbstractMesh, Mesh
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Float

from kvattn._typing import AnyArray, Array
from kvattn.cache import Cache
from kvattn.codecs import Codec
from kvattn.errors import ConfigError
from kvattn.layers import attention_fn as attention
from kvattn.layers import caching, latent, placement, projections
from kvattn.layers.attention_fn import dot_product_attention
from kvattn.layers.makes_caches import MakesCaches
from kvattn.layers.projections import Sharding
from kvattn.policies import Policy
from kvattn.positions import RoPE

Initializer = Callable[..., Array]


class MultiHeadLatentAttention(MakesCaches, nnx.Module):
    """Multi-head latent attention (MLA; DeepSeek-V2, arXiv:2405.04434): a cache of C + R numbers a token for N heads.

    Keys and values of all heads are made from one latent of C numbers per token, which is what is cached, with R rotary
    numbers that the keys of all heads share. A full sequence is attended with keys and values materialised, a cache
    with their projections absorbed into queries and outputs (`kvattn.layers.latent`). The parameters are the same:

    - ``query/kernel [D, N, P + R]``, or with `q_lora_rank` ``query_down/kernel [D, Q]``, ``query_norm/scale [Q]`` and
      ``query_up/kernel [Q, N, P + R]``,
    - ``kv_down/kernel [D, C + R]`` (the latent, then what keys share) and ``kv_norm/scale [C]``,
    - ``key_up/kernel [C, N, P]``, ``value_up/kernel [C, N, Hv]`` and ``out/kernel [N, Hv, D]``.

    The norms are RMS norms. With `use_bias` ``query_down``, ``kv_down`` and ``out`` have biases, the others never.

    Args:
        num_heads: N.
        in_features: D.
        kv_lora_rank: C, the latent of keys and values.
        qk_nope_head_dim: P, numbers of a query or key head without positions; they come first.
        qk_rope_head_dim: R, those that turn.
        v_head_dim: Hv, the size of a value head.
        q_lora_rank: Q, the latent of queries. None: queries come from the features.
        rope: a `kvattn.RoPE` for heads of R. None: nothing turns. Checkpoints of DeepSeek-V2 and V3 need
            ``interleaved=True``.
        out_features: D of the output; `in_features` if None.
        use_bias: the projections to latents and the output's have biases.
        dtype: of the computation; that of inputs and parameters if None.
        param_dtype: of the parameters.
        precision: of the matrix products.
        kernel_init: of the kernels.
        out_kernel_init: of the output's; `kernel_init` if None.
        norm_epsilon: of the norms of latents.
        dropout_rate: of the attention weights, over full sequences.
        broadcast_dropout: one dropout mask for all batch rows and heads.
        deterministic: no dropout.
        window: a query sees the last `window` tokens, its own included. Implies causality.
        scale: multiplies the scores; 1/√(P + R) if None. (YaRN checkpoints of DeepSeek have a larger one.)
        softcap: caps the scores by ``softcap * tanh(score / softcap)``.
        policy: which tokens `make_cache` keeps by default.
        codec: in how many bits `make_cache` keeps them by default: one that stores keys and values alike.
        implementation: who reads the cache, as in `kvattn.cached_attention`.
        mesh: devices to split the layer over: ``query`` (``query_up``), ``key_up``, ``value_up`` and ``out`` by heads,
            if they divide; the rest, and caches by `by`, as in `kvattn.sharding`.
        by: how caches are split: "batch", "sequence", "replicated", or "auto". (There is one key/value head.)
        axis: the mesh axis for all of this.
        rngs: where parameters are drawn from, and dropout.
        keep_rngs: whether the layer keeps a stream for dropout.

    Attributes:
        settings: all of the above that is no parameter, as the attention over latents has it: one key/value head of
            C + R numbers. Each is an attribute too (``layer.window``), which can be assigned.
        sizes: C, Q, P, R and Hv.

    Raises:
        ConfigError: a rope for heads of another size than R; sizes below 1.
        ShardingError: a mesh without the axis.
        RangeError: a window, scale, soft cap, epsilon or dropout rate outside its range.
        DTypeError: a setting of the wrong type.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> import kvattn
        >>> layer = kvattn.layers.MultiHeadLatentAttention(
        ...     num_heads=8, in_features=64, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16,
        ...     rope=kvattn.RoPE(8), rngs=nnx.Rngs(0))
        >>> cache = layer.make_cache(2, capacity=16)
        >>> y, cache = layer(jnp.ones((2, 5, 64)), cache=cache)
        >>> cache.nbytes - 2 * 8  # bytes of 2 * 16 tokens, 32 + 8 numbers in float32 each, beside lengths and status
        5120
    """

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        *,
        kv_lora_rank: int,
        qk_nope_head_dim: int,
        qk_rope_head_dim: int,
        v_head_dim: int,
        q_lora_rank: int | None = None,
        rope: RoPE | None = None,
        out_features: int | Sequence[int] | None = None,
        use_bias: bool = False,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        precision: PrecisionLike = None,
        kernel_init: Initializer = default_kernel_init,
        out_kernel_init: Initializer | None = None,
        norm_epsilon: float = 1e-6,
        dropout_rate: float = 0.0,
        broadcast_dropout: bool = True,
        deterministic: bool | None = None,
        window: int | None = None,
        scale: float | None = None,
        softcap: float | None = None,
        policy: Policy | None = None,
        codec: Codec | None = None,
        implementation: str | Sequence[str] | None = None,
        mesh: Mesh | AbstractMesh | None = None,
        by: str = "auto",
        axis: str = "model",
        rngs: nnx.Rngs,
        keep_rngs: bool = True,
    ):
        given = dict(locals())
        self.sizes = sizes = latent.LatentSizes.checked(given)
        self.settings = settings = latent.checked(given, sizes)
        self.in_features = in_features
        self.out_features = in_features if out_features is None else out_features
        self.deterministic = deterministic

        by_head = placement.latent_metadata(mesh, axis, settings.num_heads)
        common = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        linear = functools.partial(nnx.LinearGeneral, use_bias=bool(use_bias), precision=precision, **common)
        project = functools.partial(linear, kernel_init=kernel_init)
        to_heads = functools.partial(project, use_bias=False, kernel_metadata=by_head.up)
        norm = functools.partial(nnx.RMSNorm, epsilon=norm_epsilon, **common)

        query = (settings.num_heads, sizes.query)
        if sizes.query_latent is None:
            self.query = to_heads(in_features, query)
        else:
            self.query_down = project(in_features, sizes.query_latent)
            self.query_norm = norm(sizes.query_latent)
            self.query_up = to_heads(sizes.query_latent, query)
        self.kv_down = project(in_features, sizes.cached)
        self.kv_norm = norm(sizes.latent)
        self.key_up = to_heads(sizes.latent, (settings.num_heads, sizes.plain))
        self.value_up = to_heads(sizes.latent, (settings.num_heads, sizes.value))
        self.out = linear(
            (settings.num_heads, sizes.value),
            self.out_features,
            axis=(-2, -1),
            kernel_init=out_kernel_init or kernel_init,
            kernel_metadata=by_head.out,
        )
        self.rngs = rngs.dropout.fork() if keep_rngs and settings.dropout_rate > 0 else None
        if mesh is not None:
            placement.put(self, mesh)

    def __call__(
        self,
        inputs: AnyArray,
        *,
        mask: ArrayLike | None = None,
        deterministic: bool | None = None,
        rngs: nnx.Rngs | nnx.RngStream | None = None,
        sow_weights: bool = False,
        is_causal: bool = False,
        out_sharding: Sharding = None,
        input_positions: ArrayLike | None = None,
        cache: Cache | None = None,
        num_new: ArrayLike | Sequence[int] | None = None,
        padding: str = "right",
        token_ids: ArrayLike | None = None,
        append: bool = True,
    ) -> Any:
        """Attends `inputs` to themselves, or to what a cache holds and to themselves.

        Args:
            inputs: [..., T, D], any number of batch axes; [B, T, D] with `cache`.
            mask: as in `kvattn.layers.MultiHeadAttention`.
            deterministic: no dropout. The call's value wins over the constructor's.
            rngs: where dropout draws from, instead of the layer's own stream.
            sow_weights: keep the weights [..., N, T, S] as `nnx.Intermediate` "attention_weights".
            is_causal: query t sees the keys 0 to t. With a cache this holds anyway.
            out_sharding: how the output is split over an Explicit mesh; worked out if None.
            input_positions: int [..., T] or [T]: the positions `rope` uses, instead of the tokens' own.
            cache: from `make_cache` or `make_paged_cache`; the new tokens are added to it.
            num_new: int32 [B], how many of the T tokens of each row are real; with `cache` only.
            padding: on which side the others lie, "right" or "left".
            token_ids: int32 [B, T], for policies that look at tokens.
            append: False: the cache is that of another layer after its step; nothing is added, and the queries are
                those of the tokens that came last, as in `kvattn.cached_attention`.

        Returns:
            [..., T, out_features]; with `cache` also the new cache.

        Raises:
            ShapeError: inputs that do not fit the layer or the cache.
            ConfigError: arguments that contradict each other; a cache that has values of its own.
            CapacityError: tokens that do not fit into the cache. Inside `jax.jit` they are dropped, their rows are
                zeros, and ``cache.check()`` raises.
        """
        settings, sizes = self.settings, self.sizes
        deterministic = self.deterministic if deterministic is None else deterministic
        x, *_ = projections.checked_inputs(inputs, None, None, self.in_features, self.in_features)
        own = caching.projects(settings, cache=cache, append=append, kv=None, inputs_k=None, decode=False)
        if cache is not None:
            latent.check_cache(cache)
            dropout = settings.dropout_rate > 0 and deterministic is False
            caching.check_call(
                settings, cache, x,
                mask=mask, input_positions=input_positions, sow_weights=sow_weights, dropout=dropout,
            )  # fmt: skip
            query, key = latent.absorbed(
                settings, sizes, self._queries(x), *self._latents(x), key_up=self.key_up.kernel[...]
            )
            out, cache = caching.cached_attention(
                settings, query, key if own else None, None, cache,
                sinks=None, num_new=num_new, padding=padding, token_ids=token_ids,
            )  # fmt: skip
            out = latent.to_values(settings, out, self.value_up.kernel[...])
            return projections.from_heads(self.out, out, out_sharding), cache

        if num_new is not None or token_ids is not None:
            raise ConfigError("num_new and token_ids belong to cache=; without a cache use mask for padding.")
        down, shared = self._latents(x)
        plain, value = (projections.projected(up, down) for up in (self.key_up, self.value_up))
        query, key = latent.to_heads(settings, sizes, self._queries(x), plain, shared, input_positions)
        out = attention.call(
            dot_product_attention, latent.materialised(settings, sizes), query, key, value,
            mask=mask, is_causal=is_causal, sinks=None,
            dropout_rng=attention.dropout_key(settings, deterministic, self.rngs if rngs is None else rngs),
            module=self if sow_weights else None,
        )  # fmt: skip
        return projections.from_heads(self.out, out, out_sharding)

    # Parts of a call.

    def _queries(self, inputs: Float[Array, "*B T D"]) -> Float[Array, "*B T N _"]:
        if self.sizes.query_latent is None:
            return projections.projected(self.query, inputs)
        down = projections.projected(self.query_down, inputs)
        return projections.projected(self.query_up, latent.normed(self.query_norm, down))

    def _latents(self, inputs: Float[Array, "*B T D"]) -> tuple[Float[Array, "*B T C"], Float[Array, "*B T R"]]:
        """The latents, normed, and what the keys of all heads share."""
        down = projections.projected(self.kv_down, inputs)
        size = self.sizes.latent
        return latent.normed(self.kv_norm, down[..., :size]), down[..., size:]
