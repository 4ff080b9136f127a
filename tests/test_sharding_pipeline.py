"""By layers: stages hand their activations on; the results are those of one layer after the other."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from sharding_cases import KINDS, kinds

import kvattn
from kvattn import errors, sharding

L, M, ROWS, K, N, H = 8, 3, 2, 2, 4, 8
D = N * H
SETTINGS = {
    "full": {"capacity": 12},
    "h2o": {"policy": kvattn.H2O(3, 2)},
    "int8": {"capacity": 12, "codec": kvattn.Int8()},
    "long": {"capacity": 4096},
}


@functools.cache
def mesh_of(kind, stages=4):
    return jax.make_mesh((stages,), ("stage",), axis_types=(KINDS[kind],), devices=jax.devices()[:stages])


@functools.cache
def weights():
    rng = np.random.default_rng(0)
    size = {"q": (L, D, N, H), "k": (L, D, K, H), "v": (L, D, K, H), "out": (L, N, H, D)}
    return {name: (rng.normal(size=shape) / D**0.5).astype(np.float32) for name, shape in size.items()}


def layer(w, x, cache, num_new, attention=kvattn.cached_attention, whole=False):
    """Results of projections are whole where the types of arrays say where they lie."""
    heads, features = (P(*[None] * 4), P(*[None] * 3)) if whole else (None, None)
    q, k, v = (jnp.einsum("btd,dnh->btnh", x, w[name], out_sharding=heads) for name in "qkv")
    out, cache = attention(q, k, v, cache, num_new=num_new, rope=kvattn.RoPE(H))
    return x + jnp.tanh(jnp.einsum("btnh,nhd->btd", out, w["out"], out_sharding=features)), cache


def make(name):
    return lambda: kvattn.KVCache.create(ROWS, K, H, dtype=jnp.float32, **SETTINGS[name])


def calls():
    rng = np.random.default_rng(1)
    for length in (4, 1, 1):
        num_new = np.full((M, ROWS), length, np.int32)
        if length > 1:
            num_new[1, 0] = 2
        yield rng.normal(size=(M, ROWS, length, D)).astype(np.float32), num_new


@functools.cache
def one_after_the_other(name):
    """A loop over microbatches and layers."""
    step = jax.jit(layer)
    caches = [[make(name)() for _ in range(L)] for _ in range(M)]
    outs = []
    for inputs, num_new in calls():
        out = []
        for m in range(M):
            x = inputs[m]
            for i in range(L):
                x, caches[m][i] = step({n: w[i] for n, w in weights().items()}, x, caches[m][i], num_new[m])
            out.append(np.asarray(x))
        outs.append(np.stack(out))
    return outs


def placed(mesh, name):
    caches = sharding.layer_caches(make(name), L, M, mesh=mesh)
    return jax.device_put(weights(), NamedSharding(mesh, P("stage"))), caches


def pipelined(mesh):
    run = lambda w, x, caches, num_new: sharding.pipeline(layer, w, x, caches, mesh=mesh, extras=(num_new,))
    return kvattn.jit(run, donate="caches")


def test_equals_layers_in_a_row():
    check("full", "auto", 4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "kind", "stages"), [("h2o", "explicit", 4), ("int8", "auto", 8), ("full", "explicit", 1)]
)
def test_other_caches_and_numbers_of_stages(name, kind, stages):
    check(name, kind, stages)


def check(name, kind, stages):
    mesh = mesh_of(kind, stages)
    w, caches = placed(mesh, name)
    caches = run(name, pipelined(mesh), w, caches)
    for cache in jax.tree.leaves(caches):
        assert cache.sharding.shard_shape(cache.shape)[0] == L // stages, "a stage has its own layers' caches only"
    assert (np.asarray(caches.lengths) == [[6, 6], [4, 6], [6, 6]]).all()


def run(name, step, w, caches):
    """Compares every call with layers in a row; the caches in the end."""
    for (inputs, num_new), expected in zip(calls(), one_after_the_other(name), strict=True):
        out, caches = step(w, inputs, caches, num_new)
        np.testing.assert_allclose(np.asarray(out), expected, atol=1e-5)
    return caches


def test_stages_whose_devices_have_some_heads_each():
    """Nothing more is exchanged than the output projection's sums within a stage."""
    step, w, caches = check_split("full", "auto", (4, 2), "heads")
    inputs, num_new = list(calls())[1]
    program = step.lower(w, inputs, caches, num_new).compile()
    assert [c.kind for c in sharding.collectives(program)] == ["all-reduce", "collective-permute", "all-reduce"]
    assert program.memory_analysis().alias_size_in_bytes == sum(
        x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(caches)
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("name", "sizes", "by"),
    [
        ("full", (2, 4), "heads"),  # each key/value head twice
        ("h2o", (4, 2), "heads"),
        ("int8", (2, 2), "batch"),
        ("full", (2, 2), "sequence"),
        ("h2o", (4, 2), "sequence"),
    ],
)
def test_stages_that_are_split_otherwise(name, kind, sizes, by):
    check_split(name, kind, sizes, by)


def check_split(name, kind, sizes, by):
    """A stage's caches are split, and its projections by heads."""
    devices = jax.devices()[: sizes[0] * sizes[1]]
    mesh = jax.make_mesh(sizes, ("stage", "model"), axis_types=(KINDS[kind],) * 2, devices=devices)
    caches = sharding.layer_caches(make(name), L, M, mesh=mesh, by=by)
    own = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(caches))
    assert own == sharding.bytes_per_device(make(name)(), mesh, by=by) * L // sizes[0] * M
    specs = {"q": P("stage", None, "model"), "out": P("stage", "model")}
    w = {n: jax.device_put(x, NamedSharding(mesh, specs.get(n, P("stage")))) for n, x in weights().items()}
    attention = functools.partial(sharding.cached_attention, mesh=mesh, by=by)
    one = functools.partial(layer, attention=attention, whole=kind == "explicit")
    step = lambda w, x, caches, num_new: sharding.pipeline(one, w, x, caches, mesh=mesh, extras=(num_new,))
    step = kvattn.jit(step, donate="caches")
    return step, w, run(name, step, w, caches)


def test_the_program():
    """One hand-over, in a loop; the outputs to all at the end; caches stay where they are."""
    mesh = mesh_of("auto")
    w, caches = placed(mesh, "long")
    inputs, num_new = list(calls())[1]
    program = pipelined(mesh).lower(w, inputs, caches, num_new).compile()
    assert kinds(program) == ["all-reduce", "collective-permute"]
    assert max(c.nbytes for c in sharding.collectives(program)) == inputs.nbytes
    own = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(caches))
    memory = program.memory_analysis()
    assert memory.alias_size_in_bytes == own
    # What is worked on, one layer's cache of one microbatch, is taken out and put back.
    assert memory.temp_size_in_bytes < 3 * own / (L // 4 * M)


@pytest.mark.wrong_types
def test_refused():
    mesh, args = mesh_of("auto"), (weights(), jnp.zeros((M, ROWS, 1, D)), sharding.layer_caches(make("full"), L, M))
    call = functools.partial(sharding.pipeline, layer, extras=(jnp.ones((M, ROWS), jnp.int32),))
    with pytest.raises(errors.ShardingError, match="no axis 'stages'; it has 'stage'"):
        call(*args, mesh=mesh, axis="stages")
    with pytest.raises(errors.ShardingError, match="8 layers do not divide over 3 stages"):
        call(*args, mesh=mesh_of("auto", 3))
    with pytest.raises(errors.ShapeError, match=r"\[8, 3, \.\.\.\] for these weights and inputs, got \(8, 2\)"):
        call(*args[:2], sharding.layer_caches(make("full"), L, 2), mesh=mesh)
    with pytest.raises(errors.ShapeError, match="extras must be"):
        sharding.pipeline(layer, *args, mesh=mesh, extras=(jnp.ones((2, ROWS), jnp.int32),))
    with pytest.raises(errors.ShapeError, match="share their first 1 axes"):
        call({**weights(), "k": jnp.zeros((3, 1))}, *args[1:], mesh=mesh)
    with pytest.raises(errors.ConfigError, match="weights has no arrays"):
        call({}, *args[1:], mesh=mesh)
    with pytest.raises(errors.ConfigError, match="give mesh as well"):
        sharding.layer_caches(make("full"), L, M, by="heads")
    with pytest.raises(errors.ShardingError, match="6 layers do not divide over 4 stages"):
        sharding.layer_caches(make("full"), 6, M, mesh=mesh)
