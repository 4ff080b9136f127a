"""Models over meshes: every scheme, Explicit and Auto, gives what one device gives."""

import functools
import importlib
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType

import kvattn
from kvattn.layers import GroupedQueryAttention, MultiQueryAttention, linen, stateless
from kvattn.models import Decoder, DecoderConfig, from_pretrained
from kvattn.models.parameters import parameters_of
from kvattn.sharding import collectives

GOLDEN = pathlib.Path(__file__).parent / "golden" / "hf"
KINDS = {"Auto": AxisType.Auto, "Explicit": AxisType.Explicit}
LLAMA = DecoderConfig(vocab_size=48, model_dim=32, num_layers=2, num_heads=16, num_kv_heads=8, head_dim=8, mlp_dim=64)
FALCON = DecoderConfig(
    vocab_size=48, model_dim=32, num_layers=2, num_heads=71, num_kv_heads=1, head_dim=8, mlp_dim=64, norm="layer",
    norm_bias=True, parallel=True, shared_norm=True, activation="gelu", gated=False,
)  # fmt: skip
CONFIGS = {"Llama": LLAMA, "Falcon": FALCON}
SCHEMES = [("Llama", "heads"), ("Llama", "batch"), ("Llama", "sequence"), ("Falcon", "batch"), ("Falcon", "sequence")]
B, CHUNK, STEPS = 8, 5, 4
FAST = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def mesh_of(kind, shape=(1, 8)):
    return jax.make_mesh(shape, ("data", "model"), axis_types=(KINDS[kind],) * 2)


def tokens(seed=0):
    return np.random.default_rng(seed).integers(0, 48, (B, CHUNK + STEPS), np.int32)


def through(model, policy=None):
    """Logits of a ragged chunk and of single tokens, through jitted steps that donate the caches."""
    apply, weights = stateless(model)
    step = jax.jit(apply, donate_argnames="cache", compiler_options=FAST)
    cache, given = model.make_cache(B, 16, policy=policy), tokens()
    lengths = jnp.asarray([5, 2, 5, 4, 1, 5, 3, 5], jnp.int32)
    logits, cache = step(weights, jnp.asarray(given[:, :CHUNK]), cache, lengths)
    real = np.arange(CHUNK)[None, :, None] < np.asarray(lengths)[:, None, None]
    out = [np.where(real, logits, 0)]
    for t in range(CHUNK, CHUNK + STEPS):
        before = jax.tree.leaves([layer.keys for layer in cache])
        logits, cache = step(weights, jnp.asarray(given[:, t : t + 1]), cache)
        assert all(x.is_deleted() for x in before)
        out.append(np.asarray(logits))
    for layer in cache:
        assert layer.check().lengths.tolist() == (np.asarray(lengths) + STEPS).tolist()
    return np.concatenate(out, axis=1), cache


@functools.cache
def alone(name, policy=None):
    return through(Decoder(CONFIGS[name], rngs=nnx.Rngs(0)), policy)[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("name", "by"), SCHEMES, ids=str)
def test_models_are_as_on_one_device(name, by, kind):
    """One argument, `mesh`; the mesh need not be the current one."""
    model = Decoder(CONFIGS[name], mesh=mesh_of(kind), by=by, rngs=nnx.Rngs(0))
    got, cache = through(model)
    np.testing.assert_allclose(got, alone(name), atol=1e-5 * alone(name).std() * 10)
    for layer in cache:
        whole = sum(x.nbytes for x in layer.keys.values())
        assert {shard.data.nbytes for shard in layer.keys["data"].addressable_shards} == {whole // 8}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("policy", [kvattn.SlidingWindow(4), kvattn.StreamingLLM(2, 4), kvattn.H2O(3, 3)], ids=str)
@pytest.mark.parametrize(("name", "by"), SCHEMES, ids=str)
def test_policies(name, by, policy, kind):
    got, _ = through(Decoder(CONFIGS[name], mesh=mesh_of(kind), by=by, rngs=nnx.Rngs(0)), policy)
    np.testing.assert_allclose(got, alone(name, policy), atol=1e-4 * alone(name, policy).std())


@pytest.mark.parametrize("kind", KINDS)
def test_rows_and_heads_at_once(kind):
    mesh = mesh_of(kind, (2, 4))
    got, cache = through(Decoder(LLAMA, mesh=mesh, rngs=nnx.Rngs(0)))
    np.testing.assert_allclose(got, alone("Llama"), atol=1e-4 * alone("Llama").std())
    keys = cache[0].keys["data"]
    assert keys.addressable_shards[0].data.nbytes * 8 == keys.nbytes


def test_parameters_lie_where_they_are_used():
    """By heads; one key/value head on every device; of 71 query heads each device has a feature of each."""
    for name, query, key in (
        ("Llama", (None, "model", None), (None, "model", None)),
        ("Falcon", (None, None, "model"), (None, None, None)),
    ):
        model = Decoder(CONFIGS[name], mesh=mesh_of("Explicit"), rngs=nnx.Rngs(0))
        specs = {name: tuple(x.sharding.spec) for name, x in parameters_of(model).items()}
        assert specs["layers.0.attention.query.kernel"] == query
        assert specs["layers.0.attention.key.kernel"] == key
        assert specs["layers.0.attention.out.kernel"] == (*query[1:], None)
        assert specs["layers.0.mlp.up.kernel"] == (None, "model") and specs["layers.0.mlp.down.kernel"] == (
            "model",
            None,
        )


@pytest.mark.parametrize("kind", KINDS)
def test_gradients(kind):
    """Of the mean logit, with respect to every parameter, without a cache."""

    def gradients(model):
        graph, state = nnx.split(model)
        loss = lambda s: jnp.mean(jnp.sin(nnx.merge(graph, s)(jnp.asarray(tokens()))[0]))
        return nnx.to_flat_state(jax.jit(jax.grad(loss), compiler_options=FAST)(state))

    for name, config in CONFIGS.items():
        want = dict(gradients(Decoder(config, rngs=nnx.Rngs(0))))
        for path, x in gradients(Decoder(config, mesh=mesh_of(kind), rngs=nnx.Rngs(0))):
            a, b = np.asarray(x.get_value()), np.asarray(want[path].get_value())
            np.testing.assert_allclose(a, b, atol=1e-5 * max(np.abs(b).max(), 1e-3), err_msg=f"{name} {path}")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["gpt_oss", "falcon7b"])
def test_checkpoints_on_a_mesh(name, kind):
    """Prompts of different lengths, greedy, as transformers continues them."""
    golden = np.load(GOLDEN / name / "golden.npz")
    model = from_pretrained(GOLDEN / name, mesh=mesh_of(kind, (2, 2)))
    prompts = [golden["prompts"][row, :length].tolist() for row, length in enumerate(golden["lengths"])]
    new = kvattn.generate(model, [*prompts, prompts[0]], 4)
    assert new[:3] == golden["greedy"][:, :4].tolist() and new[3] == new[0]


# What is exchanged --------------------------------------------------------------------------------


def counted(layer, mesh, by):
    """The collectives of a compiled decode step of a layer, from its input to its output: {kind: [bytes]}."""
    apply, weights = stateless(layer)
    x = jax.device_put(jnp.ones((8, 1, 32)), jax.NamedSharding(mesh, jax.P()))
    compiled = jax.jit(apply, donate_argnames="cache").lower(weights, x, cache=layer.make_cache(8, 64)).compile()
    return collectives(compiled)


@pytest.mark.parametrize("kind", KINDS)
def test_collectives_of_a_layer(kind):
    """By heads one all-reduce, after the output projection; one key/value head by batch two all-to-alls more."""
    mesh = mesh_of(kind)
    settings = {"head_dim": 8, "use_bias": False, "mesh": mesh, "rope": kvattn.RoPE(8), "rngs": nnx.Rngs(0)}
    found = [
        c.kind for c in counted(GroupedQueryAttention(16, 32, num_kv_heads=8, by="heads", **settings), mesh, "heads")
    ]
    assert found == ["all-reduce"]
    layer = GroupedQueryAttention(16, 32, num_kv_heads=8, by="batch", **settings)
    assert sorted(c.kind for c in counted(layer, mesh, "batch")) == ["all-reduce", *["all-to-all"] * 4]
    for heads in (16, 71):
        found = [c.kind for c in counted(MultiQueryAttention(heads, 32, by="batch", **settings), mesh, "batch")]
        assert sorted(found) == ["all-reduce", "all-to-all", "all-to-all"], heads


# Linen --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["heads", "batch", "sequence"])
def test_linen_twins(by):
    mesh, x = mesh_of("Auto"), jax.random.normal(jax.random.key(0), (B, 6, 32))
    plain = linen.GroupedQueryAttention(16, num_kv_heads=8, qkv_features=128)
    split = plain.clone(mesh=mesh, by=by)
    variables = plain.init(jax.random.key(1), x)
    want, _ = plain.apply(variables, x, cache=plain.make_cache(B, 8))
    cache = split.make_cache(B, 8)
    got, cache = jax.jit(lambda v, x, cache: split.apply(v, x, cache=cache))(variables, x, cache)
    np.testing.assert_allclose(got, want, atol=1e-5)
    assert cache.keys["data"].addressable_shards[0].data.nbytes * 8 == cache.keys["data"].nbytes


def input_gradient(apply, weights, cache):
    """Of a loss with respect to the inputs of a layer, on no current mesh."""

    def loss(x, weights):
        y = apply(weights, x) if cache is None else apply(weights, x, cache=cache)[0]
        return jnp.sum(jnp.sin(y))

    x = jax.random.normal(jax.random.key(0), (B, 3, 32))
    return np.asarray(jax.jit(jax.grad(loss), compiler_options=FAST)(x, weights))


@pytest.mark.parametrize(("heads", "num_kv_heads", "cached"), [(16, 8, True), (9, 1, False)])
def test_gradients_of_a_layers_inputs(heads, num_kv_heads, cached):
    """The mesh need not be the current one. Nine heads are split within."""
    make = lambda mesh: GroupedQueryAttention(
        heads, 32, num_kv_heads=num_kv_heads, head_dim=8, rope=kvattn.RoPE(8), mesh=mesh, rngs=nnx.Rngs(0)
    )
    got, want = (
        input_gradient(*stateless(layer), layer.make_cache(B, 4) if cached else None)
        for layer in (make(mesh_of("Explicit")), make(None))
    )
    np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize("cached", [False, True])
def test_gradients_of_a_linen_layers_inputs(cached):
    mesh = mesh_of("Explicit")
    plain = linen.MultiHeadAttention(8, qkv_features=64, use_bias=False)
    split = plain.clone(mesh=mesh, by="heads")
    variables = plain.init(jax.random.key(1), jnp.ones((B, 3, 32)))
    by_heads = lambda path, _: jax.NamedSharding(
        mesh, jax.P("model") if "out" in jax.tree_util.keystr(path) else jax.P(None, "model")
    )
    there = jax.device_put(variables, jax.tree_util.tree_map_with_path(by_heads, variables))
    want = input_gradient(plain.apply, variables, plain.make_cache(B, 4) if cached else None)
    got = input_gradient(split.apply, there, split.make_cache(B, 4) if cached else None)
    np.testing.assert_allclose(got, want, atol=1e-5)


# Errors -------------------------------------------------------------------------------------------


@pytest.mark.wrong_types
def test_what_cannot_be_is_said():
    mesh = mesh_of("Auto")
    with pytest.raises(kvattn.errors.ShardingError, match='by="batch"'):
        MultiQueryAttention(16, 32, mesh=mesh, by="heads", rngs=nnx.Rngs(0)).make_cache(8, 16)
    with pytest.raises(kvattn.errors.ShardingError, match="no axis 'heads'"):
        Decoder(LLAMA, mesh=mesh, axis="heads", rngs=nnx.Rngs(0))
    with pytest.raises(kvattn.errors.ConfigError, match="'pipeline'"):
        Decoder(LLAMA, mesh=mesh, by="pipeline", rngs=nnx.Rngs(0))
    with pytest.raises(kvattn.errors.ShardingError, match="mesh must be"):
        Decoder(LLAMA, mesh=("data", "model"), rngs=nnx.Rngs(0))
    with pytest.raises(kvattn.errors.ShardingError, match="rows do not divide"):
        Decoder(LLAMA, mesh=mesh, by="batch", rngs=nnx.Rngs(0)).make_cache(3, 16)


@pytest.mark.parametrize("kind", KINDS)
def test_generation_is_two_programs(kind):
    """One for every chunk of the prompts, one for every step after them, on a mesh too."""
    model = Decoder(LLAMA, mesh=mesh_of(kind, (2, 4)), rngs=nnx.Rngs(0))
    prompts = tokens()[:, :7].tolist()
    chunked = kvattn.generate(model, prompts, 4, prefill_chunk=3)
    _, programs = importlib.import_module("kvattn.models.loop").PROGRAMS[model]
    assert [program._cache_size() for program in programs] == [1, 1]
    assert chunked == kvattn.generate(Decoder(LLAMA, rngs=nnx.Rngs(0)), prompts, 4)
