"""`convert_to_gqa`: against head-by-head pooling and attention in NumPy, on every kind of tree and module."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from flax.core import FrozenDict, freeze
from flax.traverse_util import flatten_dict
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import kvattn
import kvattn.models.convert
from kvattn.errors import ConfigError, DTypeError, ShapeError, UnsupportedError
from kvattn.layers import (
    GroupedQueryAttention,
    MultiHeadAttention,
    MultiQueryAttention,
    SlidingWindowAttention,
    linen,
    stateless,
)
from kvattn.models import Decoder, DecoderConfig, convert_to_gqa

N, D, E, H, V = 8, 12, 10, 4, 6
"""Query heads, features of queries and of keys, head dims of keys and values."""
COUNTS = [(8, 4), (8, 2), (8, 1), (4, 2), (4, 1), (2, 2)]


# The oracle: one head at a time, NumPy, float64. ----------------------------------------------------


def attention_params(count, seed=0, tied=None, in_features=E, value_dim=V):
    """Parameters of cross-attention with `count` key/value heads; the heads of `tied` equal blocks are the same."""
    rng = np.random.default_rng(seed)
    heads = np.arange(count) if tied is None else np.repeat(np.arange(tied), count // tied)
    key, value = rng.normal(size=(in_features, count, H)), rng.normal(size=(in_features, count, value_dim))
    key_bias, value_bias = rng.normal(size=(count, H)), rng.normal(size=(count, value_dim))
    return {
        "query": {"kernel": rng.normal(size=(D, N, H)), "bias": rng.normal(size=(N, H))},
        "key": {"kernel": key[:, heads], "bias": key_bias[heads]},
        "value": {"kernel": value[:, heads], "bias": value_bias[heads]},
        "out": {"kernel": rng.normal(size=(N, value_dim, D)), "bias": rng.normal(size=D)},
    }


def oracle_pool(params, num_kv_heads):
    """Every new head is the mean of the neighbours it replaces."""
    new = {name: dict(arrays) for name, arrays in params.items()}
    for name in ("key", "value"):
        kernel, bias = (np.asarray(params[name][kind], np.float64) for kind in ("kernel", "bias"))
        size = kernel.shape[1] // num_kv_heads
        heads = [range(j * size, (j + 1) * size) for j in range(num_kv_heads)]
        new[name]["kernel"] = np.stack([sum(kernel[:, i] for i in group) / size for group in heads], axis=1)
        new[name]["bias"] = np.stack([sum(bias[i] for i in group) / size for group in heads])
    return new


def oracle_attention(params, x, y):
    """Queries of x [T, D] attend to y [S, E]: [T, D]."""
    out = np.zeros((len(x), D)) + params["out"]["bias"]
    count = params["key"]["kernel"].shape[1]
    for n in range(N):
        k = n // (N // count)
        query = x @ params["query"]["kernel"][:, n] + params["query"]["bias"][n]
        key = y @ params["key"]["kernel"][:, k] + params["key"]["bias"][k]
        value = y @ params["value"]["kernel"][:, k] + params["value"]["bias"][k]
        scores = query @ key.T / np.sqrt(H)
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        out += weights / weights.sum(axis=1, keepdims=True) @ value @ params["out"]["kernel"][n]
    return out


def close(got, want, tolerance):
    chosen = {"rtol": tolerance, "atol": tolerance}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(np.asarray(a, np.float64), b, **chosen), got, want)


def check_outputs(count, num_kv_heads):
    """What tied heads compute does not change; what others compute does."""
    rng = np.random.default_rng(7)
    x, y = rng.normal(size=(5, D)), rng.normal(size=(9, E))
    tied, free = attention_params(count, tied=num_kv_heads), attention_params(count)
    close(oracle_attention(convert_to_gqa(tied, num_kv_heads), x, y), oracle_attention(tied, x, y), 1e-12)
    if count > num_kv_heads:
        changed = oracle_attention(convert_to_gqa(free, num_kv_heads), x, y) - oracle_attention(free, x, y)
        assert np.abs(changed).max() > 0.1


def check_pooling(count, num_kv_heads):
    given = attention_params(count, seed=3)
    got = convert_to_gqa(given, num_kv_heads)
    close(got, oracle_pool(given, num_kv_heads), 1e-14)
    assert got["query"]["kernel"] is given["query"]["kernel"]  # shared, not copied


@pytest.mark.parametrize(("count", "num_kv_heads"), COUNTS)
def test_tied_heads_compute_the_same(count, num_kv_heads):
    check_outputs(count, num_kv_heads)


@pytest.mark.parametrize(("count", "num_kv_heads"), COUNTS)
def test_heads_are_means_of_neighbours(count, num_kv_heads):
    check_pooling(count, num_kv_heads)


def strided(x, num_kv_heads):
    *lead, count, size = x.shape
    return x.reshape(*lead, count // num_kv_heads, num_kv_heads, size).mean(axis=-3)


def summed(x, num_kv_heads):
    *lead, count, size = x.shape
    return x.reshape(*lead, num_kv_heads, count // num_kv_heads, size).sum(axis=-2)


def every_nth(x, num_kv_heads):
    return x[..., :: x.shape[-2] // num_kv_heads, :]


def biases_by_stride(x, num_kv_heads):
    return (strided if x.ndim == 2 else pool)(x, num_kv_heads)


pool = kvattn.models.convert._pool


@pytest.mark.parametrize("fault", [strided, summed, biases_by_stride, every_nth], ids=lambda f: f.__name__)
def test_planted_faults_are_caught(fault, monkeypatch):
    monkeypatch.setattr(kvattn.models.convert, "_pool", fault)
    with pytest.raises(AssertionError):
        check_pooling(8, 2)
    if fault is not every_nth:  # of equal heads any one will do
        with pytest.raises(AssertionError):
            check_outputs(8, 2)


# Modules. -------------------------------------------------------------------------------------------


def randomised(module, seed=0, tied=None):
    """The module with random parameters, larger than Flax's; `tied`: so many different key/value heads per layer."""
    graph, state = nnx.split(module)
    rng = np.random.default_rng(seed)

    def drawn(path, x):
        names = [entry.key for entry in path if hasattr(entry, "key")]
        value = 0.4 * rng.normal(size=x.shape) + (1 if names[-1] == "scale" else 0)
        if tied and {"key", "value"} & set(names):
            first = np.arange(tied) * (x.shape[-2] // tied)
            value = value[..., np.repeat(first, x.shape[-2] // tied), :]
        return jnp.asarray(value, x.dtype)

    return nnx.merge(graph, jax.tree.map_with_path(drawn, state))


LAYERS = {
    "flax": lambda rngs: nnx.MultiHeadAttention(N, D, 32, decode=False, rngs=rngs),
    "flax, grouped": lambda rngs: nnx.MultiHeadAttention(N, D, 32, num_kv_heads=4, decode=False, rngs=rngs),
    "mha, rope": lambda rngs: MultiHeadAttention(N, D, head_dim=H, rope=kvattn.RoPE(H), rngs=rngs),
    "gqa, value dim, sinks": lambda rngs: GroupedQueryAttention(
        N, D, head_dim=H, num_kv_heads=4, value_head_dim=V, sinks=True, softcap=3.0, rngs=rngs
    ),
    "window, alibi, no bias": lambda rngs: SlidingWindowAttention(
        N, D, head_dim=H, num_kv_heads=N, window=3, alibi=True, use_bias=False, rngs=rngs
    ),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers(name):
    given = randomised(LAYERS[name](nnx.Rngs(0)), tied=2)
    before = jax.tree.map(np.asarray, nnx.state(given))
    layer = convert_to_gqa(given, 2)
    assert type(layer) is type(given) and layer.num_kv_heads == 2 and layer.key.kernel.shape[1] == 2
    x = jax.random.normal(jax.random.key(0), (2, 7, D))
    expected = given(x, is_causal=True)
    close(layer(x, is_causal=True), expected, 1e-5)
    if hasattr(layer, "make_cache"):
        y, cache = layer(x[:, :4], cache=layer.make_cache(2, 8))
        assert cache.num_kv_heads == 2
        close(jnp.concatenate([y, layer(x[:, 4:], cache=cache)[0]], axis=1), expected, 1e-5)
    else:
        layer.init_cache((2, 7, D))
        steps = [layer(x[:, i : i + 1], decode=True) for i in range(7)]
        close(jnp.concatenate(steps, axis=1), expected, 1e-5)
    # The given layer is as it was, and its count too.
    assert jax.tree.all(jax.tree.map(np.array_equal, before, nnx.state(given)))
    assert given.num_kv_heads > 2 and given.key.out_features[0] == given.num_kv_heads


def test_cross_attention():
    given = randomised(MultiHeadAttention(N, D, head_dim=H, in_kv_features=E, rngs=nnx.Rngs(0)))
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), nnx.to_pure_dict(nnx.state(given)))
    x, y = (jax.random.normal(jax.random.key(i), (1, 5, size)) for i, size in enumerate((D, E)))
    expected = oracle_attention(oracle_pool(params, 2), *(np.asarray(a[0], np.float64) for a in (x, y)))
    layer = convert_to_gqa(given, 2)
    close(layer(x, y)[0], expected, 1e-5)
    close(layer(x, cache=layer.make_cross_cache(y))[0][0], expected, 1e-5)


def test_a_multi_query_layer_has_nothing_left_to_average():
    given = randomised(MultiQueryAttention(N, D, head_dim=H, rngs=nnx.Rngs(0)))
    layer = convert_to_gqa(given, 1)
    assert layer is not given
    assert jax.tree.all(jax.tree.map(np.array_equal, nnx.state(layer), nnx.state(given)))


class Pair(nnx.Module):
    """Two layers: one module used twice, and one that shares a key kernel with it."""

    def __init__(self):
        self.first = MultiHeadAttention(N, D, head_dim=H, rngs=nnx.Rngs(0))
        self.again = self.first
        self.second = MultiHeadAttention(N, D, head_dim=H, rngs=nnx.Rngs(1))
        self.second.key.kernel = self.first.key.kernel


def test_what_layers_share_they_share_afterwards():
    pair = convert_to_gqa(Pair(), 2)
    assert pair.again is pair.first
    assert pair.second.key.kernel is pair.first.key.kernel
    assert pair.second.value.kernel is not pair.first.value.kernel
    assert pair.first.key.kernel.shape == pair.second.value.kernel.shape == (D, 2, H)


SMALL = DecoderConfig(vocab_size=31, model_dim=16, num_layers=2, num_heads=8, head_dim=4, mlp_dim=20)


def test_model():
    given = randomised(Decoder(SMALL, rngs=nnx.Rngs(0)), tied=2)
    model = convert_to_gqa(given, 2)
    assert model.config == dataclasses.replace(SMALL, num_kv_heads=2) and given.config == SMALL
    tokens = jax.random.randint(jax.random.key(0), (2, 9), 0, 31)
    caches = [x.make_cache(2, 16) for x in (given, model)]
    assert sum(x.nbytes for x in caches[0]) > 3.5 * sum(x.nbytes for x in caches[1])
    results = []
    for x, cache in zip((given, model), caches, strict=True):
        apply, weights = stateless(x)
        step = jax.jit(apply, donate_argnames="cache")
        results.append(step(weights, tokens, cache=cache)[0])
    close(results[1], results[0], 1e-5)


def test_in_one_step_or_in_two_and_as_a_tree():
    model = randomised(Decoder(SMALL, rngs=nnx.Rngs(0)))
    at_once = nnx.state(convert_to_gqa(model, 2))
    close(nnx.state(convert_to_gqa(convert_to_gqa(model, 4), 2)), at_once, 1e-6)
    as_tree = convert_to_gqa(nnx.state(model), 2)
    assert type(as_tree) is nnx.State
    assert jax.tree.all(jax.tree.map(np.array_equal, as_tree, at_once))
    jitted = jax.jit(convert_to_gqa, static_argnums=1)(nnx.state(model), 2)
    close(jitted, at_once, 1e-6)


def test_without_arrays():
    model = convert_to_gqa(nnx.eval_shape(lambda: Decoder(SMALL, rngs=nnx.Rngs(0))), 2)
    wanted = nnx.eval_shape(lambda: Decoder(model.config, rngs=nnx.Rngs(0)))
    assert nnx.split(model)[0] == nnx.split(wanted)[0]
    assert jax.tree.leaves(nnx.state(model)) == jax.tree.leaves(nnx.state(wanted))


# Trees. ---------------------------------------------------------------------------------------------


def nested(params):
    return {"encoder": {"layers_0": {"attention": params, "norm": {"scale": np.ones(3)}}, "head": np.ones((2, 2))}}


TREES = {
    "bare": (lambda p: p, lambda t: t),
    "nested": (nested, lambda t: t["encoder"]["layers_0"]["attention"]),
    "params": (lambda p: {"params": nested(p)}, lambda t: t["params"]["encoder"]["layers_0"]["attention"]),
    "frozen": (lambda p: freeze({"params": p}), lambda t: t["params"].unfreeze()),
    "lists": (lambda p: {"layers": [{"kernel": np.ones(2)}, p]}, lambda t: t["layers"][1]),
    "state": (lambda p: nnx.State({"a": {0: p}}), lambda t: nnx.to_pure_dict(t)["a"][0]),
    "tuples as keys": (flatten_dict, lambda t: {"key": {"kernel": t["key", "kernel"], "bias": t["key", "bias"]}}),
    "joined by /": (
        lambda p: flatten_dict({"l": p}, sep="/"),
        lambda t: {"value": {"kernel": t["l/value/kernel"], "bias": t["l/value/bias"]}},
    ),
    "joined by .": (
        lambda p: flatten_dict({"l": {"0": p}}, sep="."),
        lambda t: {"key": {"kernel": t["l.0.key.kernel"], "bias": t["l.0.key.bias"]}},
    ),
}


@pytest.mark.parametrize("name", TREES)
def test_trees(name):
    build, find = TREES[name]
    params = attention_params(8, seed=5)
    given = build(params)
    got = convert_to_gqa(given, 2)
    expected = oracle_pool(params, 2)
    assert type(got) is type(given) and jax.tree.structure(got) == jax.tree.structure(given)
    found = find(got)
    close(found, {key: expected[key] for key in found}, 1e-14)
    changed = sum(a is not b for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(given), strict=True))
    assert changed == 4  # kernels and biases of keys and values


def test_every_layer_of_a_tree_and_no_other_subtree():
    params = {f"layer_{i}": attention_params(count, seed=i) for i, count in enumerate((8, 4, 2))}
    params["memory"] = {"query": {"kernel": np.ones((3, 4))}, "key": {"kernel": np.ones((3, 4))}}
    got = convert_to_gqa(params, 2)
    for i in range(3):
        close(got[f"layer_{i}"], oracle_pool(params[f"layer_{i}"], 2), 1e-14)
    assert got["layer_2"]["key"]["kernel"] is params["layer_2"]["key"]["kernel"]
    assert got["memory"] == params["memory"]


def test_linen_layer():
    x = jax.random.normal(jax.random.key(0), (1, 6, D))
    given = linen.MultiHeadDotProductAttention(num_heads=N, head_dim=H, sinks=True)
    variables = given.init(jax.random.key(1), x)
    rng = np.random.default_rng(2)
    variables = jax.tree.map(lambda a: a + 0.3 * rng.normal(size=a.shape).astype(np.float32), variables)
    params = {
        name: jax.tree.map(lambda a: np.asarray(a, np.float64), dict(variables["params"][name]))
        for name in ("query", "key", "value", "out")
    }
    expected = nnx.State(oracle_pool(params, 2))
    got = convert_to_gqa(FrozenDict(variables), 2)
    assert isinstance(got, FrozenDict)
    for name in ("key", "value"):
        close(dict(got["params"][name]), nnx.to_pure_dict(expected)[name], 1e-6)
    layer = linen.GroupedQueryAttention(num_heads=N, head_dim=H, num_kv_heads=2, sinks=True)
    wanted = jax.eval_shape(layer.init, jax.random.key(0), x)
    assert jax.tree.map(jnp.shape, got.unfreeze()) == jax.tree.map(jnp.shape, wanted)
    assert layer.apply(got, x).shape == given.apply(variables, x).shape


class Blocks(nn.Module):
    """Three layers of attention, scanned over."""

    count: int = 8

    @nn.compact
    def __call__(self, x):
        def block(layer, x, _):
            return layer(x), None

        stack = nn.scan(block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        make = linen.GroupedQueryAttention(num_heads=N, head_dim=H, num_kv_heads=self.count)
        return stack(make, x, None)[0]


def test_stacked_layers():
    x = jax.random.normal(jax.random.key(0), (1, 4, D))
    variables = Blocks().init(jax.random.key(1), x)
    got = convert_to_gqa(variables, 2)
    wanted = jax.eval_shape(Blocks(2).init, jax.random.key(1), x)
    assert jax.tree.map(jnp.shape, got) == jax.tree.map(jnp.shape, wanted)
    (layers,), (converted,) = (tree["params"].values() for tree in (variables, got))
    for i in range(3):
        one = jax.tree.map(lambda a, i=i: np.asarray(a[i], np.float64), layers)
        close(jax.tree.map(lambda a, i=i: a[i], converted), oracle_pool(one, 2), 1e-6)
    # Stacked along the second axis, which is not told from heads by its place: refused, never averaged over.
    second = {
        name: {"kernel": np.stack([kernel["kernel"]] * 5, axis=1)} for name, kernel in attention_params(8).items()
    }
    with pytest.raises(ShapeError, match="all with the same axes in front"):
        convert_to_gqa(second, 2)


ARRAYS = [(kind, name) for kind in (np.asarray, jnp.asarray) for name in ("bfloat16", "float16", "float8_e4m3fn")]
ARRAYS += [(np.asarray, "float32"), (jnp.asarray, "float32"), (np.asarray, "float64")]


@pytest.mark.parametrize(("kind", "dtype"), ARRAYS, ids=lambda x: x if isinstance(x, str) else x.__module__)
def test_dtypes(kind, dtype):
    params = jax.tree.map(lambda x: kind(np.asarray(x, jnp.dtype(dtype))), attention_params(8))
    # In their own type, sums of eight such heads lose the small ones, and those of float16 and float8 overflow.
    big = float(jnp.finfo(dtype).max) / 2
    heads = np.asarray([big] + [big / 300] * 7)
    params["key"]["bias"] = kind(np.asarray(np.broadcast_to(heads[:, None], (8, H)), jnp.dtype(dtype)))
    got = convert_to_gqa(params, 1)
    wanted = oracle_pool(params, 1)
    for name in ("key", "value"):
        for part in ("kernel", "bias"):
            assert got[name][part].dtype == jnp.dtype(dtype) and isinstance(got[name][part], type(params[name][part]))
            scale = np.abs(wanted[name][part]).max()
            rounding = float(jnp.finfo(dtype).eps) + 2e-7 * (dtype == "float32")
            got_wide = np.asarray(got[name][part], np.float64)
            np.testing.assert_allclose(
                got_wide / scale, wanted[name][part] / scale, rtol=rounding / 2, atol=rounding / 8
            )


def test_shapes_instead_of_arrays():
    params = attention_params(8)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), {"params": params})
    expected = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), oracle_pool(params, 2))
    assert convert_to_gqa(shapes, 2) == {"params": expected}


def test_metadata_stays():
    names = (None, "model", None)
    with jax.set_mesh(jax.make_mesh((4,), ("model",), axis_types=(AxisType.Auto,))):
        given = MultiHeadAttention(N, D, head_dim=H, kv_metadata={"out_sharding": names}, rngs=nnx.Rngs(0))
        for count, held in ((4, 1), (2, 2)):
            layer, state = convert_to_gqa(given, count), convert_to_gqa(nnx.state(given), count)
            for kernel in (layer.key.kernel, state["key"]["kernel"]):
                assert type(kernel) is nnx.Param and kernel.get_metadata() == given.key.kernel.get_metadata()
                assert kernel.get_metadata()["out_sharding"] == names
                assert kernel.get_value().sharding.shard_shape((D, count, H)) == (D, held, H)
    params = jax.tree.map(jnp.asarray, attention_params(8))
    params["key"]["kernel"] = nn.Partitioned(params["key"]["kernel"], names)
    boxed = convert_to_gqa(params, 2)["key"]["kernel"]
    assert isinstance(boxed, nn.Partitioned) and boxed.names == names
    assert boxed.value.shape == (E, 2, H)


@pytest.mark.parametrize("kind", [AxisType.Explicit, AxisType.Auto], ids=lambda kind: kind.name)
@pytest.mark.parametrize("num_devices", [2, 4])
def test_heads_split_over_a_mesh(kind, num_devices):
    mesh = jax.make_mesh((num_devices,), ("model",), axis_types=(kind,))
    params = jax.tree.map(lambda x: np.asarray(x, np.float32), attention_params(8))
    heads = {"query": P(None, "model"), "key": P(None, "model"), "value": P(None, "model"), "out": P("model")}
    split = {
        name: {"kernel": jax.device_put(part["kernel"], NamedSharding(mesh, heads[name]))}
        for name, part in params.items()
    }
    expected = oracle_pool(params, 2)
    with jax.set_mesh(mesh):
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), split)
        for got in (convert_to_gqa(split, 2), jax.jit(convert_to_gqa, static_argnums=1)(split, 2)):
            for name in ("key", "value"):
                kernel = got[name]["kernel"]
                close(kernel, expected[name]["kernel"], 1e-6)
                # Two heads on two devices stay apart, on four each device has both.
                assert kernel.sharding.shard_shape(kernel.shape)[1] == (1 if num_devices == 2 else 2)
            assert got["query"]["kernel"].sharding.is_equivalent_to(split["query"]["kernel"].sharding, 3)
        planned = convert_to_gqa(shapes, 2)["key"]["kernel"]
        assert planned.sharding.shard_shape(planned.shape)[1] == (1 if num_devices == 2 else 2)


@pytest.mark.parametrize("kind", [AxisType.Explicit, AxisType.Auto], ids=lambda kind: kind.name)
@pytest.mark.parametrize("count", [4, 2])
def test_a_model_on_a_mesh_is_as_one_made_there(kind, count):
    """One head on each of four devices, or two on all: parameters, what they say of themselves, caches, results."""
    mesh = jax.make_mesh((4,), ("model",), axis_types=(kind,))
    given = Decoder(dataclasses.replace(SMALL, num_layers=1), mesh=mesh, rngs=nnx.Rngs(0))
    model = convert_to_gqa(given, count)
    wanted = Decoder(model.config, mesh=mesh, rngs=nnx.Rngs(0))
    for state in (nnx.state(model), convert_to_gqa(nnx.state(given), count)):
        for (path, got), new in zip(nnx.to_flat_state(state), nnx.to_flat_state(nnx.state(wanted)).leaves, strict=True):
            assert got.get_metadata() == new.get_metadata(), path
            assert got.get_value().sharding.is_equivalent_to(new.get_value().sharding, got.ndim), path
    whole = convert_to_gqa(Decoder(given.config, rngs=nnx.Rngs(0)), count)
    tokens = jax.random.randint(jax.random.key(0), (2, 5), 0, 31)
    apply, weights = stateless(model)
    logits, cache = jax.jit(apply, donate_argnames="cache")(weights, tokens, cache=model.make_cache(2, 8))
    close(logits, whole(tokens)[0], 1e-5)
    assert cache[0].num_kv_heads == count


# Refused. -------------------------------------------------------------------------------------------


def without(params, *names):
    return {name: part for name, part in params.items() if name not in names}


def changed(name, kind, change):
    params = attention_params(8)
    params[name][kind] = change(params[name][kind])
    return params


class Foreign(nnx.Module):
    """An attention layer of somebody else's."""

    def __init__(self):
        for name, part in attention_params(8).items():
            setattr(self, name, nnx.data({kind: nnx.Param(jnp.asarray(x)) for kind, x in part.items()}))


def with_flax_cache():
    layer = MultiHeadAttention(N, D, head_dim=H, rngs=nnx.Rngs(0))
    layer.init_cache((1, 4, D))
    return layer


REFUSED = {
    "no divisor": (lambda: attention_params(8), 3, ConfigError, "8 key/value heads, which cannot become 3.*divisor"),
    "more than there are": (lambda: attention_params(4), 8, ConfigError, "4 key/value heads.*merged, not split"),
    "one layer of many": (
        lambda: {"a": attention_params(8), "b": {"c": attention_params(2)}},
        4,
        ConfigError,
        "'b.c' has 2 key/value",
    ),
    "zero": (lambda: attention_params(8), 0, ConfigError, "num_kv_heads must be >= 1"),
    "float": (lambda: attention_params(8), 2.0, DTypeError, "num_kv_heads must be an int"),
    "bool": (lambda: attention_params(8), True, DTypeError, "num_kv_heads must be an int"),
    "None": (lambda: attention_params(8), None, DTypeError, "num_kv_heads must be an int"),
    "norms": (
        lambda: {"x": attention_params(8) | {"key_ln": {"scale": np.ones(H)}}},
        2,
        UnsupportedError,
        "'x' normalises",
    ),
    "norms of a layer": (
        lambda: MultiHeadAttention(N, D, head_dim=H, qk_norm="rms", rngs=nnx.Rngs(0)),
        2,
        UnsupportedError,
        "normalised mean",
    ),
    "no attention": (lambda: {"dense": {"kernel": np.ones((3, 4, 5))}}, 2, ConfigError, "no attention layer"),
    "no attention in a module": (lambda: nnx.Linear(2, 3, rngs=nnx.Rngs(0)), 2, ConfigError, "in this Linear"),
    "an incomplete one": (lambda: without(attention_params(8), "out"), 2, ConfigError, "no attention layer"),
    "nothing": (dict, 2, ConfigError, "no attention layer in this dict"),
    "an array": (lambda: np.ones((3, 8, 4)), 2, DTypeError, "got ndarray"),
    "a Linen module": (lambda: linen.MultiHeadAttention(num_heads=8), 2, DTypeError, "what init returns"),
    "flat kernels": (
        lambda: {name: {"kernel": np.ones((16, 16))} for name in ("query", "key", "value", "out")},
        2,
        ShapeError,
        r"key.kernel \(16, 16\)",
    ),
    "a wrong bias": (lambda: changed("key", "bias", lambda x: x[:4]), 2, ShapeError, r"key.bias \(4, 4\)"),
    "keys and values differ": (lambda: changed("value", "kernel", lambda x: x[:, :4]), 2, ShapeError, "value.kernel"),
    "other outputs": (lambda: changed("out", "kernel", lambda x: x[:4]), 2, ShapeError, "out.kernel"),
    "other head dims": (lambda: changed("query", "kernel", lambda x: x[..., :2]), 2, ShapeError, "query.kernel"),
    "other value dims": (lambda: changed("out", "kernel", lambda x: x[:, :2]), 2, ShapeError, "out.kernel"),
    "stacks of unlike heights": (
        lambda: {
            name: {"kernel": np.stack([part["kernel"]] * (2 if name == "key" else 3))}
            for name, part in attention_params(8).items()
        },
        2,
        ShapeError,
        r"key.kernel \(2, 10, 8, 4\)",
    ),
    "integers": (lambda: changed("key", "kernel", lambda x: x.astype(np.int8)), 2, DTypeError, "key.kernel.*int8"),
    "complex": (lambda: changed("value", "bias", lambda x: x + 0j), 2, DTypeError, "value.bias.*complex128"),
    "no arrays": (lambda: changed("value", "kernel", lambda x: "lost"), 2, DTypeError, "value.kernel.*got str"),
    "a scale beside the kernel": (
        lambda: changed("key", "bias", lambda x: x) | {"key": {**attention_params(8)["key"], "scale": np.ones(8)}},
        2,
        UnsupportedError,
        "key.scale",
    ),
    "a cache in a layer": (with_flax_cache, 2, ConfigError, "decode cache.*init_cache"),
    "a cache in a state": (lambda: nnx.state(with_flax_cache()), 2, ConfigError, "nnx.Param"),
    "a cache in a collection": (
        lambda: {"params": {"a": attention_params(8)}, "cache": {"a": {"cached_key": np.ones(3)}}},
        2,
        ConfigError,
        "'cache.a' holds Flax's decode cache",
    ),
    "an unknown class": (Foreign, 2, UnsupportedError, "no flax.nnx.MultiHeadAttention"),
}


@pytest.mark.wrong_types
@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    build, num_kv_heads, error, message = REFUSED[name]
    given = build()
    with pytest.raises(error, match=message):
        convert_to_gqa(given, num_kv_heads)


def test_a_refused_model_is_untouched():
    """Also by the layers before the one that is refused."""

    class Two(nnx.Module):
        def __init__(self):
            self.a = MultiHeadAttention(N, D, head_dim=H, rngs=nnx.Rngs(0))
            self.b = GroupedQueryAttention(N, D, head_dim=H, num_kv_heads=2, rngs=nnx.Rngs(0))

    two = Two()
    with pytest.raises(ConfigError, match="'b' has 2 key/value heads"):
        convert_to_gqa(two, 4)
    assert two.a.num_kv_heads == 8 and two.a.key.kernel.shape == (D, 8, H)


# Measured. ------------------------------------------------------------------------------------------

ROOT = Path(__file__).resolve().parent.parent
MEASURED = json.loads((ROOT / "benchmarks" / "results" / "uptrain_gqa.json").read_text())


def test_uptraining_gives_most_of_the_quality_back():
    """The order of the GQA paper, against multi-head attention that was trained as long, and against starting anew."""
    mha, *converted = MEASURED["rows"]
    assert MEASURED["uptraining_steps"] == 0.05 * MEASURED["settings"]["steps"]
    best = min(MEASURED["mha"], mha["uptrained"])
    assert [row["num_kv_heads"] for row in converted] == [4, 2, 1]
    for row in converted:
        assert row["converted"] > row["uptrained"] >= best
        assert row["recovered"] == pytest.approx(
            (row["converted"] - row["uptrained"]) / (row["converted"] - best), abs=1e-3
        )
        assert row["recovered"] > 0.5 and row["uptrained"] < row["scratch"]
        assert row["cache_bytes_per_token"] * mha["num_kv_heads"] == mha["cache_bytes_per_token"] * row["num_kv_heads"]


def test_the_page_says_what_was_measured():
    page = (ROOT / "docs" / "convert_to_gqa.md").read_text()
    best = min(MEASURED["mha"], MEASURED["rows"][0]["uptrained"])
    shares = []
    for row in MEASURED["rows"]:
        count = row["num_kv_heads"]
        name = {8: "MHA", 1: "MQA"}.get(count, f"GQA, {count} heads")
        line = f"| {name} | {row['cache_bytes_per_token']:,} | {row['step_ms']:.1f} |"
        if count == 8:
            line += f" | {row['uptrained']:.2f} | | |\n"
        else:
            line += f" {row['converted']:.2f} | {row['uptrained']:.2f} | {100 * row['recovered']:.0f} % |"
            line += f" {row['scratch']:.2f} |\n"
            shares.append((row["scratch"] - row["uptrained"]) / (row["scratch"] - best))
        assert line in page
        runs = (r for r in MEASURED["uptraining"] if (r["num_kv_heads"], r["start"]) == (count, "converted"))
        losses = (f"{run['curve'][-1]['valid']:.2f}" for run in runs)
        assert f"| {name} | {' | '.join(losses)} |\n" in page
    first, second, third = (f"{100 * share:.0f} %" for share in shares)
    assert f"{first}, {second} and {third}" in page
    assert f"to {MEASURED['mha']:.2f} bits per byte" in page and f"({MEASURED['parameters']:,} parameters" in page
    settings = MEASURED["settings"]
    for name, value in (("steps", 16000), ("layers", 3), ("heads", 8), ("head_dim", 16), ("context", 256)):
        assert settings[name] == value  # as the page says
    assert (settings["decode_batch"], settings["decode_length"], MEASURED["uptraining_steps"]) == (16, 1024, 800)
