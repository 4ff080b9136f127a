"""What grows queries with their position, and what gates the output: against NumPy, in every form of a layer."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType
from oracles import TokenLists

import kvattn
from kvattn import errors
from kvattn.layers.linen import MultiHeadDotProductAttention
from kvattn.models.parameters import parameters_of

B, T, D, N, K, H = 2, 9, 16, 4, 2, 8
TEMPERATURE = kvattn.Temperature(floor=3, scale=2.0)


def numbers(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_the_factor():
    assert kvattn.Temperature() == kvattn.Temperature(8192, 0.1)
    got = kvattn.Temperature(4, 0.5)(jnp.array([0, 2, 3, 6, 7, 99]))
    np.testing.assert_allclose(got, [1 + 0.5 * math.log(1 + n) for n in (0, 0, 1, 1, 2, 25)], rtol=1e-6)
    wide = TEMPERATURE.warmed(jnp.ones((1, 2, 1, 2), jnp.bfloat16), jnp.array([[4, 5]]))
    assert wide.dtype == jnp.bfloat16 and wide[0, 1, 0, 0] == jnp.asarray(1 + 2 * math.log(3), jnp.bfloat16)


@pytest.mark.parametrize("padding", ["right", "left"])
def test_a_step(padding):
    """Positions are true ones: ragged rows, pads on either side, a window, and sinks that are seen from elsewhere."""
    cache = kvattn.KVCache.create(B, K, H, policy=kvattn.SlidingWindow(4), dtype=jnp.float32)
    step = jax.jit(functools.partial(kvattn.cached_attention, temperature=TEMPERATURE, padding=padding))
    oracle = TokenLists(B, keeps=4, temperature=(3, 2.0))
    for length, counts in ((5, (5, 2)), (1, (1, 1)), (5, (3, 5)), (1, (0, 1))):
        new = [numbers(B, length, heads, H, seed=length + heads) for heads in (N, K, K)]
        out, cache = step(*new, cache, num_new=np.array(counts))
        np.testing.assert_allclose(out, oracle.append(*new, counts, padding)[0], atol=1e-5)
    again, _ = step(new[0], None, None, cache, num_new=np.array(counts))  # of another layer: the same tokens
    np.testing.assert_allclose(again, out, atol=1e-5)


def test_sinks_that_are_seen_from_elsewhere():
    """The temperature is that of the true position, whatever place in the cache a query is seen at."""
    q, k, v = (numbers(1, T, heads, H, seed=heads) for heads in (N, K, K))
    grown = q * np.asarray(TEMPERATURE(jnp.arange(T)))[None, :, None, None]
    outs = []
    for query, temperature in ((q, TEMPERATURE), (grown, None)):
        step = jax.jit(functools.partial(kvattn.cached_attention, temperature=temperature, rope=kvattn.RoPE(H)))
        cache = kvattn.KVCache.create(1, K, H, policy=kvattn.StreamingLLM(1, 3), dtype=jnp.float32)
        out, cache = step(query[:, :6], k[:, :6], v[:, :6], cache)
        last, _ = step(query[:, 6:7], k[:, 6:7], v[:, 6:7], cache)
        outs.append((out, last))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), *outs)


def arrays(made):
    return {name: np.asarray(x) for name, x in parameters_of(made).items()}


def layer(**settings):
    return kvattn.layers.MultiHeadAttention(
        N, D, num_kv_heads=K, head_dim=H, rngs=nnx.Rngs(0), bias_init=nnx.initializers.normal(), **settings
    )


@pytest.mark.parametrize("gate", ["elementwise", "headwise"])
def test_layers(gate):
    """Whole sequences, caches, and Flax's own cache agree with NumPy; and so does Linen's twin."""
    settings = {"temperature": TEMPERATURE, "output_gate": gate}
    made, x = layer(**settings), numbers(B, T, D)
    w = arrays(made)
    q, k, v = (np.einsum("btd,dnh->btnh", x, w[f"{n}.kernel"]) + w[f"{n}.bias"] for n in ("query", "key", "value"))
    heads, _ = TokenLists(B, temperature=(3, 2.0)).append(q, k, v)
    assert w["gate.kernel"].shape == ((D, N, H) if gate == "elementwise" else (D, N))
    open_ = (1 / (1 + np.exp(-(np.tensordot(x, w["gate.kernel"], 1) + w["gate.bias"])))).reshape(B, T, N, -1)
    heads = heads * open_
    want = np.einsum("btnh,nhd->btd", heads, w["out.kernel"]) + w["out.bias"]
    np.testing.assert_allclose(made(x, is_causal=True), want, atol=1e-4)
    cache, outs, step = made.make_cache(B, T), [], nnx.jit(lambda made, x, cache: made(x, cache=cache))
    for piece in np.split(x, [5, 6], axis=1):
        out, cache = step(made, piece, cache)
        outs.append(out)
    np.testing.assert_allclose(np.concatenate(outs, axis=1), want, atol=1e-4)
    made.init_cache((B, T, D))
    outs = [made(piece, decode=True) for piece in np.split(x, [5, 6], axis=1)]
    np.testing.assert_allclose(np.concatenate(outs, axis=1), want, atol=1e-4)
    moved = made(x[:, :2], is_causal=True, input_positions=np.array([4, 5]))
    grown = q[:, :2] * np.asarray(TEMPERATURE(jnp.array([4, 5])))[None, :, None, None]
    heads = TokenLists(B).append(grown, k[:, :2], v[:, :2])[0] * open_[:, :2]
    np.testing.assert_allclose(moved, np.einsum("btnh,nhd->btd", heads, w["out.kernel"]) + w["out.bias"], atol=1e-4)

    twin = MultiHeadDotProductAttention(N, num_kv_heads=K, head_dim=H, **settings)
    names = ("query", "key", "value", "out", "gate")
    params = {"params": {n: {"kernel": w[f"{n}.kernel"], "bias": w[f"{n}.bias"]} for n in names}}
    shapes = jax.eval_shape(lambda: twin.init(jax.random.key(0), x))
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(lambda s: s.shape, shapes)
    np.testing.assert_allclose(twin.apply(params, x, is_causal=True), want, atol=1e-4)
    cache, outs = twin.make_cache(B, T), []
    for piece in np.split(x, [6], axis=1):
        out, cache = twin.apply(params, piece, cache=cache)
        outs.append(out)
    np.testing.assert_allclose(np.concatenate(outs, axis=1), want, atol=1e-4)


@pytest.mark.parametrize("gate", ["elementwise", "headwise"])
@pytest.mark.parametrize("kind", ["Explicit", "Auto"])
def test_on_a_mesh(gate, kind):
    """The gate is split by heads, with and without a cache; nothing changes."""
    mesh = jax.make_mesh((2,), ("model",), axis_types=(getattr(AxisType, kind),), devices=jax.devices()[:2])
    settings = {"output_gate": gate, "relative_buckets": kvattn.RelativeBuckets(8, 5), "temperature": TEMPERATURE}
    one, x = layer(**settings), jnp.asarray(numbers(B, 4, D))
    many = layer(**settings, mesh=mesh, by="heads")
    assert many.gate.kernel.sharding.spec[1] == "model" == many.relative_bias.sharding.spec[1]
    np.testing.assert_allclose(many(x, is_causal=True), one(x, is_causal=True), atol=1e-5)
    apply, weights = kvattn.layers.stateless(many)
    out, _ = jax.jit(apply)(weights, x, cache=many.make_cache(B, 8))
    np.testing.assert_allclose(out, one(x, is_causal=True), atol=1e-5)


def test_norms_without_a_scale():
    """Queries and keys of length √H, and no parameter; Linen likewise."""
    options = {"qk_norm": "rms", "qk_norm_heads": "unscaled", "qk_norm_epsilon": 1e-2}
    made, x = layer(**options), numbers(B, T, D)
    w = arrays(made)
    assert not [name for name in w if "_ln" in name]
    q, k, v = (np.einsum("btd,dnh->btnh", x, w[f"{n}.kernel"]) + w[f"{n}.bias"] for n in ("query", "key", "value"))
    q, k = (y / np.sqrt((y**2).mean(-1, keepdims=True) + 1e-2) for y in (q, k))
    heads, _ = TokenLists(B).append(q, k, v)
    want = np.einsum("btnh,nhd->btd", heads, w["out.kernel"]) + w["out.bias"]
    np.testing.assert_allclose(made(x, is_causal=True), want, atol=1e-4)
    twin = MultiHeadDotProductAttention(N, num_kv_heads=K, head_dim=H, **options)
    params = {n: {"kernel": w[f"{n}.kernel"], "bias": w[f"{n}.bias"]} for n in ("query", "key", "value", "out")}
    np.testing.assert_allclose(twin.apply({"params": params}, x, is_causal=True), want, atol=1e-4)


@pytest.mark.wrong_types
def test_refusals():
    static = kvattn.KVCache.from_encoder(jnp.ones((1, 3, K, H)), jnp.ones((1, 3, K, H)))
    with pytest.raises(errors.ConfigError, match="temperature"):
        kvattn.cached_attention(jnp.ones((1, 1, N, H)), None, None, static, temperature=TEMPERATURE)
    with pytest.raises(errors.DTypeError, match="Temperature"):
        kvattn.cached_attention(jnp.ones((1, 1, N, H)), None, None, static, temperature=2.0)
    with pytest.raises(errors.ConfigError, match="temperature"):
        layer(temperature=TEMPERATURE).make_cross_cache(jnp.ones((1, 3, D)))
    with pytest.raises(errors.ConfigError, match="elementwise"):
        layer(output_gate="all")
    with pytest.raises(errors.DTypeError, match="Temperature"):
        layer(temperature=0.1)
    with pytest.raises(errors.RangeError, match="at least 1"):
        kvattn.Temperature(0.5)
    with pytest.raises(errors.RangeError, match="scale"):
        kvattn.Temperature(scale=-1)
