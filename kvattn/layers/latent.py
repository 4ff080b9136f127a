"""Multi-head latent attention (MLA; DeepSeek-V2, arXiv:2405.04434) in its two forms. Nothing here makes parameters.

Of each token a latent c of C numbers is kept, and R rotary numbers k that all heads share. Head n has the key
``[c @ key_up[n], k]`` and the value ``c @ value_up[n]``.

Over full sequences these are *materialised*: attention of N heads, of P + R and Hv numbers. Decoding is *absorbed*:
since ``q . (c @ key_up[n])`` is ``(q @ key_up[n].T) . c``, the query goes through the key's projection and the output
through the value's, and what is attended to is one key ``[c, k]`` whose first C numbers are the value: MQA with K = 1,
whose cache stores C + R numbers a token. The two are the same function of the same parameters, up to rounding.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax.nnx.nn import dtypes
from jax.typing import ArrayLike
from jaxtyping import Float

from kvattn import _checks
from kvattn._typing import Array
from kvattn.cache import Cache
from kvattn.errors import ConfigError, DTypeError
from kvattn.layers import arguments, placement
from kvattn.layers.rotary import rotate
from kvattn.layers.settings import AttentionSettings
from kvattn.positions import RoPE

# What `AttentionSettings` asks for and this attention does not have.
_WITHOUT: Mapping[str, Any] = {
    **dict.fromkeys(("qkv_features", "use_out_bias", "chunk", "qk_norm", "qkv_clip", "cache_sharding", "bias_init")),
    **dict.fromkeys(("relative_buckets", "temperature", "output_gate")),
    **dict.fromkeys(("normalize_qk", "alibi"), False),
    **dict.fromkeys(("shares_kv", "values_from_keys", "value_norm"), False),
    "qk_norm_heads": "shared",
    "qk_norm_epsilon": 0.0,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class LatentSizes:
    """What a token becomes. Hashable.

    Attributes:
        latent: C, the latent that keys and values are made from (`kv_lora_rank`).
        query_latent: Q, the latent that queries are made from (`q_lora_rank`); None: they come from the features.
        plain: P, numbers of a query or key without positions (`qk_nope_head_dim`).
        rotary: R, those with positions, which the keys of all heads share (`qk_rope_head_dim`).
        value: Hv, of a value head (`v_head_dim`).
    """

    latent: int
    query_latent: int | None
    plain: int
    rotary: int
    value: int

    @classmethod
    def checked(cls, given: Mapping[str, Any]) -> "LatentSizes":
        """Those that the arguments of a layer mean, by name.

        Raises:
            DTypeError, ConfigError, RangeError: naming the argument.
        """
        names = ("kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
        arguments.check_each({name: given[name] for name in names})
        rank = given["q_lora_rank"]
        return cls(
            latent=int(given["kv_lora_rank"]),
            query_latent=None if rank is None else int(rank),
            plain=int(given["qk_nope_head_dim"]),
            rotary=int(given["qk_rope_head_dim"]),
            value=int(given["v_head_dim"]),
        )

    @property
    def query(self) -> int:
        """P + R: a query, or a key that is materialised."""
        return self.plain + self.rotary

    @property
    def cached(self) -> int:
        """C + R: what a cache stores of a token."""
        return self.latent + self.rotary


def checked(given: Mapping[str, Any], sizes: LatentSizes) -> AttentionSettings:
    """The settings of a layer: those of the attention that decoding does, one key/value head of C + R numbers.

    Args:
        given: the arguments of an NNX layer, or the fields of a Linen layer, by name.
        sizes: what they say of sizes.

    Raises:
        DTypeError, ConfigError, RangeError, ShardingError: naming the argument.
    """
    rope, scale = given["rope"], given["scale"]
    if rope is not None and not isinstance(rope, RoPE):
        raise DTypeError(f"rope must be a kvattn.RoPE, got {rope!r} of type {type(rope).__name__}.")
    if rope is not None and rope.head_dim != sizes.rotary:
        raise ConfigError(
            f"rope was made for head_dim {rope.head_dim}, but what turns of a key has qk_rope_head_dim {sizes.rotary}: "
            f"give kvattn.RoPE({sizes.rotary})."
        )
    _checks.flag("use_bias", given["use_bias"])
    absorbed = {
        "use_bias": False,  # they are in projections that are the same in both forms
        "num_kv_heads": 1,
        "head_dim": sizes.cached,
        "value_head_dim": sizes.latent,
        "rope": None if rope is None else rope.behind(sizes.latent),
        "scale": 1 / math.sqrt(sizes.query) if scale is None else scale,
    }
    settings = AttentionSettings.checked({**_WITHOUT, **given, **absorbed})
    return dataclasses.replace(settings, values_in_keys=True)


def materialised(settings: AttentionSettings, sizes: LatentSizes) -> AttentionSettings:
    """The settings of the same layer over full sequences: N heads, whose keys and values are there."""
    return dataclasses.replace(
        settings,
        num_kv_heads=settings.num_heads,
        qkv_features=settings.num_heads * sizes.query,
        head_dim=sizes.query,
        value_head_dim=sizes.value,
        rope=_rope(settings, sizes, sizes.plain),
        values_in_keys=False,
    )


def _rope(settings: AttentionSettings, sizes: LatentSizes, before: int) -> RoPE | None:
    """The embedding for vectors whose rotary numbers lie behind `before` others."""
    rope = settings.rope
    if rope is None:
        return None
    begin = rope.rotary_begin - sizes.latent + before
    return dataclasses.replace(rope, head_dim=before + sizes.rotary, rotary_begin=begin)


def normed(norm: Callable[..., Array], x: Float[Array, "*B T C"]) -> Float[Array, "*B T C"]:
    """A latent through Flax's norm, which promotes bfloat16 as it goes, whatever `jax_numpy_dtype_promotion` says."""
    with jax.numpy_dtype_promotion("standard"):
        return norm(x)


def to_heads(
    settings: AttentionSettings,
    sizes: LatentSizes,
    query: Float[Array, "*B T N _"],
    plain: Float[Array, "*B T N P"],
    shared: Float[Array, "*B T R"],
    positions: ArrayLike | None,
) -> tuple[Float[Array, "*B T N _"], Float[Array, "*B T N _"]]:
    """Queries and keys of a full sequence, rotated.

    Args:
        settings: of the layer.
        sizes: likewise.
        query: before rotation.
        plain: the keys of the heads, made from latents.
        shared: what all of them share, before rotation.
        positions: int [..., T] or [T]; None: 0, 1, 2, ...
    """
    query = rotate(_rope(settings, sizes, sizes.plain), query, positions)
    shared = rotate(_rope(settings, sizes, 0), shared[..., None, :], positions)
    shared = placement.like(jnp.broadcast_to(shared, (*plain.shape[:-1], sizes.rotary)), plain)
    return query, jnp.concatenate([plain, shared.astype(plain.dtype)], axis=-1)


def absorbed(
    settings: AttentionSettings,
    sizes: LatentSizes,
    query: Float[Array, "B T N _"],
    latent: Float[Array, "B T C"],
    shared: Float[Array, "B T R"],
    key_up: Float[Array, "C N P"],
) -> tuple[Float[Array, "B T N _"], Float[Array, "B T 1 _"]]:
    """Queries and the one key of new tokens, C + R numbers each; rotation is the cache's business.

    Args:
        settings: of the layer.
        sizes: likewise.
        query: of N heads.
        latent: normed.
        shared: what the keys of all heads share.
        key_up: the kernel that materialises keys.
    """
    query = placement.heads_as(query, key_up)
    plain = _product(settings, "btnp,cnp->btnc", query[..., : sizes.plain], key_up)
    query = jnp.concatenate([plain, query[..., sizes.plain :].astype(plain.dtype)], axis=-1)
    return query, jnp.concatenate([latent, shared.astype(latent.dtype)], axis=-1)[:, :, None]


def to_values(
    settings: AttentionSettings, out: Float[Array, "B T N C"], value_up: Float[Array, "C N Hv"]
) -> Float[Array, "B T N Hv"]:
    """Mixtures of values, from mixtures of latents."""
    return _product(settings, "btnc,cnv->btnv", placement.heads_as(out, value_up), value_up)


def _product(
    settings: AttentionSettings, spec: str, x: Float[Array, "B T N _"], kernel: Float[Array, "C N _"]
) -> Float[Array, "B T N _"]:
    x, kernel = dtypes.promote_dtype((x, kernel), dtype=settings.dtype)
    return jnp.einsum(spec, x, kernel, precision=settings.precision)


def check_cache(cache: Cache) -> None:
    """Checks that a cache stores latents.

    Raises:
        ConfigError: it is an encoder's, or has values of its own.
    """
    if cache.is_static or not cache.values_in_keys:
        what = "is static, it holds the keys and values of an encoder" if cache.is_static else "has values of its own"
        raise ConfigError(
            f"latent attention keeps one key per token whose first numbers are its value; this cache {what}: make one "
            "with the layer's make_cache or make_paged_cache, or with values_in_keys=True."
        )
