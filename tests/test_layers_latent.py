"""`MultiHeadLatentAttention`: materialised and absorbed, NNX and Linen, against the paper's formula in float64."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import latent_oracle as oracle
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType
from oracles import assert_accurate

import kvattn
from kvattn import errors
from kvattn.layers import MultiHeadLatentAttention, linen

B, T, D, N = 3, 7, 12, 4
SIZES = {"kv_lora_rank": 10, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 5}
KINDS = {
    "plain": {"rope": kvattn.RoPE(4)},
    "query latent, pairs": {"q_lora_rank": 8, "rope": kvattn.RoPE(4, interleaved=True), "scale": 0.2},
    "biases": {"q_lora_rank": 8, "rope": kvattn.RoPE(4), "use_bias": True},
}
DEEPSEEK = {"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}


def build(kind="plain", **settings):
    return MultiHeadLatentAttention(N, D, **SIZES, **{**KINDS.get(kind, {}), **settings}, rngs=nnx.Rngs(0))


@functools.cache
def made(kind="plain"):
    """A layer whose norms do something."""
    layer = build(kind)
    for i, name in enumerate(n for n in ("query_norm", "kv_norm") if hasattr(layer, n)):
        scale = getattr(layer, name).scale
        scale[...] = jnp.asarray(np.random.default_rng(i).uniform(0.5, 2, scale.shape), jnp.float32)
    for i, name in enumerate(n for n in ("query_down", "kv_down", "out") if kind == "biases"):
        bias = getattr(layer, name).bias
        bias[...] = jnp.asarray(np.random.default_rng(9 + i).normal(size=bias.shape), jnp.float32)
    return layer


def tree_of(layer):
    """Its parameters as nested dicts of arrays."""
    return nnx.to_pure_dict(nnx.state(layer, nnx.Param))


def inputs(length=T, batch=B, seed=0):
    return np.random.default_rng(seed).normal(size=(batch, length, D)).astype(np.float32)


@functools.cache
def truth(kind="plain"):
    """The outputs of `inputs()` by the formula."""
    settings = KINDS[kind]
    rule = oracle.Latent(tree_of(made(kind)), 4, settings["rope"].interleaved, settings.get("scale"))
    return np.stack([rule(row) for row in inputs()])


def close(found, expected, tolerance=1e-5):
    np.testing.assert_allclose(np.asarray(found), expected, rtol=tolerance, atol=tolerance)


def jitted(layer):
    """Its call, compiled."""
    apply, weights = kvattn.layers.stateless(layer)
    return functools.partial(kvattn.jit(apply, static_argnames=("padding", "is_causal")), weights)


@functools.cache
def step_of(kind="plain"):
    """A compiled step that tests share."""
    return jitted(made(kind))


# The same function ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_full_sequences(kind):
    layer = made(kind)
    close(jax.jit(lambda x: layer(x, is_causal=True))(inputs()), truth(kind))


@pytest.mark.parametrize("kind", KINDS)
def test_a_cache_gives_the_same(kind):
    """In chunks and token by token; a cache of the latent and what is shared, and nothing else."""
    step, x = step_of(kind), inputs()
    cache = made(kind).make_cache(B, capacity=8)
    assert cache.nbytes == B * (8 * (10 + 4) * 4 + 8)
    poison = lambda x: jnp.full_like(x, jnp.nan)
    cache = cache.replace(keys=jax.tree.map(poison, cache.keys))
    outs = []
    for begin, end in ((0, 3), (3, 4), (4, 5), (5, 6), (6, 7)):
        out, cache = step(x[:, begin:end], cache=cache)
        outs.append(np.asarray(out))
    close(np.concatenate(outs, 1), truth(kind))
    assert cache.check().lengths.tolist() == [T] * B


@pytest.mark.parametrize("padding", ["right", "left"])
def test_ragged_rows(padding):
    x, expected = inputs(), truth()
    counts = np.array([[3, 1, 0], [3, 2, 3], [1, 3, 3]])
    cache, lengths = made().make_cache(B, capacity=8), np.zeros(B, int)
    for num_new in counts:
        new = np.full((B, 3, D), np.nan, np.float32)
        where = [slice(0, n) if padding == "right" else slice(3 - n, 3) for n in num_new]
        for b in range(B):
            new[b, where[b]] = x[b, lengths[b] : lengths[b] + num_new[b]]
        out, cache = step_of()(new, cache=cache, num_new=jnp.asarray(num_new, jnp.int32), padding=padding)
        for b in range(B):
            close(out[b, where[b]], expected[b, lengths[b] : lengths[b] + num_new[b]])
        lengths += num_new
    assert cache.lengths.tolist() == lengths.tolist() == [7, 6, 6]


def test_a_window():
    """Full sequences mask what a ring has let go of."""
    layer = build(window=3)
    nnx.update(layer, nnx.state(made(), nnx.Param))
    cache = layer.make_cache(B)
    assert cache.num_slots == 3 and cache.values_in_keys
    x = inputs()
    step = jitted(layer)
    full = step(x)
    assert np.abs(full - truth())[:, -1].max() > 1e-3
    out, cache = step(x[:, :3], cache=cache)
    rest, cache = step(x[:, 3:6], cache=cache)
    close(np.concatenate([out, rest], 1), np.asarray(full)[:, :6])


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_in_the_cache_the_rotary_part_alone_moves(implementation):
    """StreamingLLM counts places in the cache: the rotary numbers are turned to them, latents as they are."""
    layer = build(policy=kvattn.StreamingLLM(1, 2), implementation=implementation)
    x, tree = inputs(), tree_of(layer)
    rule = oracle.Latent(tree, 4)
    step, cache, outs = jitted(layer), layer.make_cache(B), []
    for t in range(T):
        out, cache = step(x[:, t : t + 1], cache=cache)
        outs.append(np.asarray(out)[:, 0])
    # What is kept is a shorter text: tokens 0, T - 2 and T - 1, with places 0, 1 and 2.
    kept = np.stack([rule(row[[0, T - 2, T - 1]])[-1] for row in x])
    close(outs[-1], kept)


def test_gradients():
    """Of parameters and inputs: those of the full sequence, through a prompt and a token after it."""
    layer, x = made("query latent, pairs"), jnp.asarray(inputs(4))
    graph, params = nnx.split(layer)
    weight = jnp.asarray(np.random.default_rng(3).normal(size=x.shape), jnp.float32)

    def full(params, x):
        return jnp.sum(nnx.merge(graph, params)(x, is_causal=True) * weight)

    def cached(params, x):
        layer = nnx.merge(graph, params)
        out, _ = layer(x, cache=layer.make_cache(B, capacity=4))
        return jnp.sum(out * weight)

    found, expected = (jax.jit(jax.grad(f, (0, 1)))(params, x) for f in (cached, full))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-4, atol=2e-5)
        assert np.abs(np.asarray(b)).max() > 1e-3


def test_bfloat16():
    """Absorbed it is as close to the truth as materialised, by the rule of accuracy."""
    layer = build(dtype=jnp.bfloat16)
    nnx.update(layer, nnx.state(made(), nnx.Param))
    x, step = inputs(), jitted(layer)
    full = step(x, is_causal=True)
    out, cache = step(x, cache=layer.make_cache(B, capacity=8))
    assert out.dtype == full.dtype == cache.dtype == jnp.bfloat16
    assert_accurate(out, truth(), full)
    assert np.abs(np.asarray(full, np.float64) - truth()).max() < 0.05


@pytest.mark.parametrize("codec", [kvattn.Int8(), kvattn.Float8(), kvattn.Int4(7)], ids=str)
def test_codecs(codec):
    """What is decoded is near what came; pages say the same as blocks, bit for bit of the codes."""
    x = inputs()
    near = {kvattn.Int8: 0.02, kvattn.Float8: 0.1, kvattn.Int4: 0.3}[type(codec)]
    pool = made().make_paged_cache(2 * B, 4, batch_size=B, max_length=8, codec=codec)
    pool = pool.with_tables(np.random.default_rng(1).permutation(2 * B).reshape(B, 2), [0] * B)
    found = []
    for cache in (made().make_cache(B, capacity=8, codec=codec), pool):
        _, cache = step_of()(x[:, :6], cache=cache)
        out, cache = step_of()(x[:, 6:], cache=cache)
        assert 1e-6 < np.abs(np.asarray(out)[:, 0] - truth()[:, -1]).max() < near
        found.append(np.asarray(out))
    close(found[0], found[1], 2e-6)


# Linen ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_linen_twin(kind):
    """The same tree, the same outputs; also where the first call brings a cache."""
    layer, tree, x = linen.MultiHeadLatentAttention(num_heads=N, **SIZES, **KINDS[kind]), tree_of(made(kind)), inputs()
    shapes = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
    drawn = jax.eval_shape(layer.init, jax.random.key(0), x)
    assert shapes(drawn["params"]) == shapes(tree)
    cached = jax.eval_shape(lambda x: layer.init(jax.random.key(0), x, cache=layer.make_cache(B, capacity=8)), x)
    assert shapes(cached["params"]) == shapes(tree)
    apply = jax.jit(layer.apply, static_argnames="is_causal")
    close(apply({"params": tree}, x, is_causal=True), truth(kind))
    cache = layer.make_cache(B, capacity=8)
    outs = []
    for t in range(0, 6, 3):
        out, cache = apply({"params": tree}, x[:, t : t + 3], cache=cache)
        outs.append(np.asarray(out))
    close(np.concatenate(outs, 1), truth(kind)[:, :6])


def test_dropout_and_weights():
    """As in the other layers: over full sequences, and the weights are those of the tokens a query sees."""
    x = inputs()
    layer = build(dropout_rate=0.5, deterministic=False)
    nnx.update(layer, nnx.state(made(), nnx.Param))
    assert np.abs(layer(x, is_causal=True) - truth()).max() > 0.01
    layer.deterministic = True
    out, found = nnx.capture(layer, nnx.Intermediate)(x, is_causal=True, sow_weights=True)
    close(out, truth())
    weights = found["attention_weights"][0]
    assert weights.shape == (B, N, T, T)
    np.testing.assert_allclose(np.asarray(weights).sum(-1), 1, rtol=1e-5)
    twin = linen.MultiHeadLatentAttention(num_heads=N, **SIZES, **KINDS["plain"], dropout_rate=0.5, deterministic=False)
    params = {"params": tree_of(made())}
    rngs = {"dropout": jax.random.key(0)}
    assert np.abs(twin.apply(params, x, is_causal=True, rngs=rngs) - truth()).max() > 0.01
    twin = twin.clone(deterministic=True)
    out, kept = twin.apply(params, x, is_causal=True, sow_weights=True, mutable="intermediates")
    close(out, truth())
    close(kept["intermediates"]["attention_weights"][0], np.asarray(weights), 1e-6)


# Placement and bytes --------------------------------------------------------------------------------------------------


@functools.cache
def mesh_of(kind):
    return jax.make_mesh((4,), ("model",), axis_types=(getattr(AxisType, kind),))


@functools.cache
def on_one_device():
    """What a layer gives of five tokens and one more, and of the five as a full sequence."""
    x = np.random.default_rng(0).normal(size=(4, 5, D)).astype(np.float32)
    one = build("query latent, pairs")
    apply, weights = kvattn.layers.stateless(one)
    call = jax.jit(apply, static_argnames="is_causal")
    expected, alone = call(weights, x, cache=one.make_cache(4, capacity=8))
    after, _ = call(weights, x[:, :1], cache=alone)
    return x, np.asarray(call(weights, x, is_causal=True)), np.concatenate([expected, after], 1)


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
@pytest.mark.parametrize("by", ["batch", "sequence"])
def test_on_a_mesh(by, kind):
    """Heads are split, the cache as it is said; full sequences, a prompt and a token."""
    mesh = mesh_of(kind)
    layer = build("query latent, pairs", mesh=mesh, by=by)
    for name in ("query_up", "key_up", "value_up"):
        assert getattr(layer, name).kernel[...].sharding.spec[1] == "model"
    x, full, expected = on_one_device()
    with jax.set_mesh(mesh) if kind == "Explicit" else contextlib.nullcontext():
        apply, weights = kvattn.layers.stateless(layer)
        call = jax.jit(apply, static_argnames="is_causal")
        close(call(weights, x, is_causal=True), full)
        cache = layer.make_cache(4, capacity=8)
        out, cache = call(weights, x, cache=cache)
        more, cache = call(weights, x[:, :1], cache=cache)
    close(np.concatenate([out, more], 1), expected)
    held = cache.keys["data"]
    assert held.addressable_shards[0].data.size <= held.size // 4
    with pytest.raises(errors.ShardingError, match="One key/value head"):
        build(mesh=mesh, by="heads").make_cache(4, capacity=8)


def test_split_by_hand():
    """Kernels over one axis of an Explicit mesh and rows over another, without `mesh`; gradients too."""
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    x, full, expected = on_one_device()
    put = lambda x, *axes: jax.device_put(x, jax.NamedSharding(mesh, jax.P(*axes)))
    layer = build("query latent, pairs")
    for path, leaf in nnx.to_flat_state(nnx.state(layer, nnx.Param)):
        heads = {"query_up": (None, "model"), "key_up": (None, "model"), "value_up": (None, "model"), "out": ("model",)}
        leaf.set_value(put(leaf.get_value(), *heads.get(path[0], ())))
    apply, weights = kvattn.layers.stateless(layer)
    with jax.set_mesh(mesh):
        call = jax.jit(apply, static_argnames="is_causal")
        close(call(weights, put(x, "data"), is_causal=True), full)
        out, cache = call(weights, put(x, "data"), cache=layer.make_cache(4, capacity=8))
        more, cache = call(weights, put(x[:, :1], "data"), cache=cache)
        loss = lambda weights, x: jnp.sum(apply(weights, x, is_causal=True) ** 2)
        gradients = jax.jit(jax.grad(loss))(weights, put(x, "data"))
    close(np.concatenate([out, more], 1), expected)
    assert all(np.isfinite(np.asarray(x)).all() for x in gradients)


@pytest.mark.parametrize("by", ["batch", "sequence"])
def test_heads_that_do_not_divide(by):
    """Three over two devices: projections lie whole on each, and the cache is split all the same."""
    mesh = jax.make_mesh((2,), ("model",), axis_types=(AxisType.Explicit,))
    x = inputs(5, 4)
    make = lambda **on: MultiHeadLatentAttention(3, D, **SIZES, rope=kvattn.RoPE(4), rngs=nnx.Rngs(0), **on)
    expected = make()(x, is_causal=True)
    layer = make(mesh=mesh, by=by)
    apply, weights = kvattn.layers.stateless(layer)
    with jax.set_mesh(mesh):
        out, _ = jax.jit(apply)(weights, x, cache=layer.make_cache(4, capacity=8))
    close(out, np.asarray(expected))


def test_bytes_of_deepseek():
    """576 numbers a token and layer, whatever the heads: 1,152 bytes, 50 times less than 128 heads' keys and values."""
    layer = linen.MultiHeadLatentAttention(
        num_heads=128, q_lora_rank=1536, rope=kvattn.RoPE(64, interleaved=True), dtype=jnp.bfloat16, **DEEPSEEK
    )
    for codec, token in ((None, 1152), (kvattn.Int8(), 576 + 4)):
        cache = jax.eval_shape(lambda codec=codec: layer.make_cache(2, capacity=256, codec=codec))
        assert cache.nbytes == 2 * (256 * token + 8)
    pool = jax.eval_shape(lambda: layer.make_paged_cache(32, batch_size=2, max_length=256))
    assert pool.nbytes == 32 * 16 * 1152 + 2 * (16 * 4 + 8)
    params = jax.eval_shape(layer.init, jax.random.key(0), jnp.ones((1, 1, 7168), jnp.bfloat16))["params"]
    assert sum(x.size for x in jax.tree.leaves(params)) == 187_107_328  # of a layer of DeepSeek-V3


# What is refused ------------------------------------------------------------------------------------------------------


def ordinary():
    return kvattn.KVCache.create(B, 1, 14, capacity=8, value_head_dim=10, dtype=jnp.float32)


REFUSED = {
    "rope of other heads": (errors.ConfigError, r"qk_rope_head_dim 4: give kvattn.RoPE\(4\)",
                            lambda: build(rope=kvattn.RoPE(14))),
    "an ordinary cache": (errors.ConfigError, "has values of its own: make one with the layer's make_cache",
                          lambda: made()(inputs(1), cache=ordinary())),
    "an encoder's": (errors.ConfigError, "is static.*make_cache", lambda: made()(inputs(1), cache=(
        kvattn.KVCache.from_encoder(np.ones((B, 2, 1, 14), np.float32), np.ones((B, 2, 1, 10), np.float32))))),
    "another latent": (errors.ShapeError, "head dim 14.*24", lambda: made()(inputs(1), cache=(
        kvattn.KVCache.create(B, 1, 24, capacity=8, value_head_dim=20, values_in_keys=True)))),
    "kivi": (errors.UnsupportedError, "KIVI.*differently",
             lambda: made().make_cache(B, capacity=8, codec=kvattn.KIVI(2, 2, 4))),
    "a mask beside a cache": (errors.ConfigError, "mask cannot be combined with cache=", lambda: made()(
        inputs(1), cache=made().make_cache(B, capacity=8), mask=np.ones((1, 1), bool))),
    "num_new without a cache": (errors.ConfigError, "belong to cache=", lambda: made()(inputs(), num_new=[1, 2, 3])),
    "features": (errors.ShapeError, "expects 12", lambda: made()(np.ones((B, T, 9), np.float32))),
    "batch axes": (errors.ShapeError, r"must be \[B, T, D\]", lambda: made()(
        inputs()[None], cache=made().make_cache(B, capacity=8))),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    error, words, call = REFUSED[name]
    with pytest.raises(error, match=words):
        call()
