"""Norms of queries and keys with a scale for every head: against NumPy, in both kinds of layers, on meshes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType

import kvattn
from kvattn.layers import MultiHeadAttention, linen
from kvattn.layers.norms import normalized
from kvattn.models.parameters import parameters_of

B, T, N, K, H, D = 2, 3, 4, 2, 6, 8
KINDS = [("rms", "own"), ("rms", "joint"), ("layer", "own"), ("layer", "joint")]


def numbers(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def of_heads(x, scale, kind, heads, epsilon):
    """[heads, H], one head after the other or all at once, in float64."""
    out = np.zeros(x.shape)
    for part in [slice(None)] if heads == "joint" else [slice(n, n + 1) for n in range(len(x))]:
        y = x[part].astype(np.float64)
        y = y - y.mean() if kind == "layer" else y
        out[part] = y / np.sqrt((y**2).mean() + epsilon) * scale[part]
    return out


@pytest.mark.parametrize(("kind", "heads"), KINDS)
def test_against_numpy(kind, heads):
    x, scale = numbers(B, T, N, H), numbers(N, H, seed=1)
    got = normalized(jnp.asarray(x), jnp.asarray(scale), kind=kind, joint=heads == "joint", epsilon=1e-2)
    want = np.stack([of_heads(y, scale, kind, heads, 1e-2) for y in x.reshape(-1, N, H)]).reshape(x.shape)
    np.testing.assert_allclose(got, want, atol=1e-5)
    assert normalized(jnp.ones((1, 2, 3), jnp.bfloat16), jnp.ones((2, 3)), kind=kind, joint=True, epsilon=0).dtype == (
        jnp.bfloat16
    )


def made(kind, heads, **options):
    layer = MultiHeadAttention(
        N, D, num_kv_heads=K, head_dim=H, qk_norm=kind, qk_norm_heads=heads, qk_norm_epsilon=1e-2, rope=kvattn.RoPE(H),
        use_bias=False, rngs=nnx.Rngs(0), **options,
    )  # fmt: skip
    state = nnx.state(layer, nnx.Param)
    draw = np.random.default_rng(2)
    nnx.update(layer, jax.tree.map(lambda x: x + jnp.asarray(draw.normal(size=x.shape, scale=0.5), x.dtype), state))
    return layer


@pytest.mark.parametrize(("kind", "heads"), KINDS[1:3])
def test_layers_of_both_kinds(kind, heads):
    """Queries and keys are normalised before they turn; Linen's twin has the same parameters and outputs."""
    layer, x = made(kind, heads), numbers(B, T, D, seed=3)
    w = parameters_of(layer)
    assert w["query_ln.scale"].shape == (N, H) and w["key_ln.scale"].shape == (K, H)
    out = np.asarray(layer(jnp.asarray(x), is_causal=True))
    turn = kvattn.RoPE(H)

    def project(name, heads_of):
        y = np.einsum("btd,dnh->btnh", x, np.asarray(w[f"{name}.kernel"]))
        scale = np.asarray(w[f"{name}_ln.scale"])
        y = np.stack([of_heads(z, scale, kind, heads, 1e-2) for z in y.reshape(-1, heads_of, H)]).reshape(y.shape)
        return np.asarray(turn(y.astype(np.float32), np.arange(T)))

    q, k = project("query", N), np.repeat(project("key", K), N // K, axis=2)
    v = np.repeat(np.einsum("btd,dnh->btnh", x, np.asarray(w["value.kernel"])), N // K, axis=2)
    scores = np.where(np.tri(T, dtype=bool), np.einsum("btnh,bsnh->bnts", q, k) / H**0.5, -np.inf)
    probs = np.exp(scores - scores.max(-1, keepdims=True))
    mixed = np.einsum("bnts,bsnh->btnh", probs / probs.sum(-1, keepdims=True), v)
    np.testing.assert_allclose(out, np.einsum("btnh,nhd->btd", mixed, np.asarray(w["out.kernel"])), atol=1e-4)

    twin = linen.MultiHeadAttention(
        N,
        num_kv_heads=K,
        head_dim=H,
        qk_norm=kind,
        qk_norm_heads=heads,
        qk_norm_epsilon=1e-2,
        rope=turn,
        use_bias=False,
    )
    params = {"params": nnx.to_pure_dict(nnx.state(layer, nnx.Param))}
    np.testing.assert_allclose(twin.apply(params, jnp.asarray(x), is_causal=True), out, atol=1e-5)
    shapes = jax.tree.map(jnp.shape, twin.init(jax.random.key(0), jnp.asarray(x)))
    assert shapes == jax.tree.map(jnp.shape, params)


@pytest.mark.parametrize("axes", [AxisType.Auto, AxisType.Explicit])
def test_on_a_mesh(axes):
    """Heads lie on several devices, and one norm goes over all of them."""
    mesh = jax.make_mesh((2,), ("model",), axis_types=(axes,))
    x, whole = jnp.asarray(numbers(B, T, D, seed=3)), made("rms", "joint")
    split = made("rms", "joint", mesh=mesh, by="heads")
    cache, other = whole.make_cache(B, 8), split.make_cache(B, 8)
    call = jax.jit(lambda layer, x, cache: layer(x, cache=cache))
    np.testing.assert_allclose(call(split, x, other)[0], call(whole, x, cache)[0], atol=1e-5)
