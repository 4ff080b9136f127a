"""Caches as trees: of something else than arrays, from the host, in programs and files that outlive the process."""

import dataclasses
import pathlib
import pickle
import subprocess
import sys

import flax.serialization
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
import variants
from flax import nnx
from jax.sharding import AxisType
from oracles import assert_same_bits

import kvattn
import kvattn.layers
import kvattn.sharding
from kvattn import _trees, errors
from kvattn.layers import linen, stateless

B, N, K, H = 2, 4, 2, 8
POLICIES = [variants.with_tokens(policy) for policy in variants.POLICIES.values()]
CODECS = variants.CODECS.values()


def made(policy=None, codec=None, batch_size=B, **settings):
    policy = kvattn.Full() if policy is None else policy
    capacity = variants.capacity_of(policy, 8)
    settings = {"capacity": capacity, "dtype": jnp.float32, **settings}
    return kvattn.KVCache.create(batch_size, K, H, policy=policy, codec=codec, **settings)


def made_paged(codec=None):
    cache = kvattn.PagedKVCache.create(6, 4, K, H, batch_size=B, max_pages=3, codec=codec, dtype=jnp.float32)
    return cache.with_tables([[0, 1, 2], [3, 4, 5]], [0] * B)


def kinds():
    """A cache of every policy and codec, and pages."""
    caches = [made(policy) for policy in POLICIES] + [made(None, codec) for codec in CODECS]
    return [*caches, made_paged(), made_paged(kvattn.Int8())]


def name_of(cache):
    """A short name for the test of a cache."""
    return f"{type(cache.policy).__name__}-{type(cache.codec).__name__}-{'paged' if cache.page_size else ''}"


def tokens(length=1, seed=0):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=(B, length, n, H)), jnp.float32) for n in (N, K, K)]


def assert_same_caches(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert_same_bits(x, y, "arrays of two caches")


# What is shown and compared -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cache", kinds(), ids=name_of)
def test_any_tree_is_shown(cache):
    """As long as it has arrays its sizes, else what it holds."""
    assert f"head_dim={H}" in repr(cache) and "array" not in repr(cache).lower()
    for leaf in (0, "x", None, object(), np.float32(1), jax.P("b")):
        shown = repr(jax.tree.map(lambda _, leaf=leaf: leaf, cache))
        assert shown.startswith(type(cache).__name__) and f"head_dim={H}" in shown
        assert leaf is None or isinstance(leaf, np.generic) or repr(leaf) in shown
    assert "num_kv_heads=2" in repr(jax.eval_shape(lambda: cache)), "shapes are as good as arrays"
    assert repr(jax.tree.map(lambda x: jnp.stack([x, x]), cache)) == repr(cache), (
        "stacked: each of them is such a cache"
    )


def test_shardings_are_shown():
    mesh = jax.make_mesh((2,), ("model",), axis_types=(AxisType.Auto,))
    assert "NamedSharding" in repr(kvattn.sharding.cache_sharding(made(), mesh))


def test_a_module_that_holds_a_cache_is_shown():
    class Model(nnx.Module):
        def __init__(self):
            self.cache = nnx.data(made())
            self.kept = nnx.Cache(made())

    assert repr(Model()).count(f"head_dim={H}") == 2


@pytest.mark.parametrize("cache", kinds(), ids=name_of)
def test_caches_are_equal_if_they_hold_the_same_arrays(cache):
    other = jax.tree.map(jnp.copy, cache)
    assert cache == jax.tree.map(lambda x: x, cache) and cache != other and cache != 1 and len({cache, other}) == 2
    assert hash(cache) == hash(jax.tree.map(lambda x: x, cache))
    assert cache.state == () or (cache.state == cache.state and cache.state != other.state)
    ones, twos = (jax.tree.map(lambda _, n=n: n, cache) for n in (1, 2))
    assert ones == jax.tree.map(lambda _: 1, cache) and ones != twos, "other leaves go by value"
    assert cache.view() != cache.view()
    assert jax.jit(lambda a, b: jnp.asarray(a == b))(cache, other) == jnp.asarray(False)


def test_caches_of_other_settings_differ():
    leaf = lambda cache: jax.tree.map(lambda _: 0, cache)
    assert leaf(made(kvattn.SlidingWindow(4))) != leaf(made(kvattn.SlidingWindow(5)))
    assert leaf(made()) != leaf(made(dtype=jnp.bfloat16)) and leaf(made()) != leaf(made_paged())


@pytest.mark.parametrize(
    "verb",
    [lambda c: c.positions, lambda c: c.trim(0), lambda c: c.view(), lambda c: c.select([0]), lambda c: c.check()],
)
def test_a_tree_that_is_no_cache_says_so(verb):
    mesh = jax.make_mesh((2,), ("model",), axis_types=(AxisType.Auto,))
    with pytest.raises(errors.DTypeError, match="holds NamedSharding where a cache has arrays"):
        verb(kvattn.sharding.cache_sharding(made(), mesh))
    with pytest.raises(errors.DTypeError, match="holds int"):
        kvattn.cached_attention(*tokens(), jax.tree.map(lambda _: 0, made()))


# From the host --------------------------------------------------------------------------------------------------------


VERBS = {
    "step": lambda c: kvattn.cached_attention(*tokens(), c),
    "chunk": lambda c: kvattn.cached_attention(*tokens(3), c),
    "trim": lambda c: c.trim(0),
    "reset": lambda c: c.reset(jnp.asarray([True, False])),
    "select": lambda c: c.select([1, 0, 1]),
    "positions": lambda c: c.positions,
    "kept": lambda c: c.kept,
    "dense": lambda c: c.dense(),
    "check": lambda c: c.check(),
    "nbytes": lambda c: jnp.asarray(c.nbytes),
    "with_tables": lambda c: c.with_tables([[2, 1, 0], [3, 4, 5]], [0, 0]) if c.page_size else c,
    "copy_pages": lambda c: c.copy_pages([0], [2]) if c.page_size else c,
}


@pytest.mark.parametrize("cache", [made(kvattn.H2O(2, 2)), made_paged()], ids=name_of)
def test_a_cache_from_the_host_works_outside_jit(cache):
    _, cache = kvattn.jit(kvattn.cached_attention)(*tokens(2), cache)
    stored = pickle.loads(pickle.dumps(jax.device_get(cache)))
    assert all(isinstance(x, np.ndarray) for x in jax.tree.leaves(stored))
    for name, verb in VERBS.items():
        for x, y in zip(jax.tree.leaves(verb(stored)), jax.tree.leaves(verb(cache)), strict=True):
            assert_same_bits(x, y, name)


def test_a_cache_from_the_host_goes_to_a_mesh():
    mesh = jax.make_mesh((2,), ("model",), axis_types=(AxisType.Auto,))
    stored = jax.device_get(made())
    shared = kvattn.sharding.shard_cache(stored, mesh, by="heads")
    step = lambda cache: kvattn.sharding.cached_attention(*tokens(), cache, mesh=mesh, by="heads")
    assert_same_bits(step(stored)[0], step(shared)[0], "a step")


# Programs -------------------------------------------------------------------------------------------------------------


def nnx_step(cache):
    layer = kvattn.layers.GroupedQueryAttention(
        num_heads=N, in_features=16, num_kv_heads=K, head_dim=H, rngs=nnx.Rngs(0)
    )
    apply, weights = stateless(layer)
    return lambda weights, x, cache: apply(weights, x, cache=cache), (weights, jnp.ones((B, 1, 16)), cache)


def linen_step(cache):
    layer = linen.GroupedQueryAttention(num_heads=N, num_kv_heads=K, head_dim=H)
    x = jnp.ones((B, 1, 16))
    variables = layer.init(jax.random.key(0), x)
    return lambda variables, x, cache: layer.apply(variables, x, cache=cache), (variables, x, cache)


def functional_step(cache):
    return kvattn.cached_attention, (*tokens(), cache)


STEPS = {"nnx": nnx_step, "linen": linen_step, "functional": functional_step}
CACHES = {"plain": made, "paged": made_paged, "int8": lambda: made(None, kvattn.Int8())}
QUICK = [("nnx", "int8"), ("linen", "plain"), ("functional", "paged")]


@pytest.mark.parametrize(
    ("step", "cache"),
    [pytest.param(s, c, marks=() if (s, c) in QUICK else pytest.mark.slow) for s in STEPS for c in CACHES],
)
def test_a_step_survives_export(step, cache):
    step, args = STEPS[step](CACHES[cache]())
    step = jax.jit(step)
    stored = jax.export.export(step)(*args).serialize()
    (out, new), (expected, expected_new) = jax.export.deserialize(stored).call(*args), step(*args)
    assert_same_bits(out, expected, "out")
    assert_same_caches(new, expected_new)


def test_a_step_of_kvattn_jit_is_exported_as_jaxs():
    """With its donation."""
    args = functional_step(made())[1]
    exported = jax.export.export(kvattn.jit(kvattn.cached_attention))(*args)
    assert jax.export.deserialize(exported.serialize()).out_tree == exported.out_tree
    assert "jax.buffer_donor" in exported.mlir_module() or "tf.aliasing_output" in exported.mlir_module()


@pytest.mark.parametrize("cache", kinds(), ids=name_of)
def test_the_structure_of_every_cache_survives_export(cache):
    """Policies, codecs and what they remember come back as they were."""
    exported = jax.export.export(jax.jit(lambda cache: cache))(cache)
    assert jax.export.deserialize(exported.serialize()).in_tree == exported.in_tree


FRESH = """
import pathlib, sys
import jax, jax.export, jax.numpy as jnp, numpy as np
import kvattn
folder = pathlib.Path(sys.argv[1])
step = jax.export.deserialize(bytearray((folder / "step").read_bytes()))
arrays = np.load(folder / "in.npz")
cache = kvattn.KVCache.create(2, 2, 8, capacity=8, codec=kvattn.Int8(), dtype=jnp.float32)
out, cache = step.call(*(arrays[f"arr_{i}"] for i in range(3)), cache)
np.savez(folder / "out.npz", out, *jax.tree.leaves(cache))
assert "flax" not in sys.modules
"""


def test_a_step_runs_in_a_fresh_process(tmp_path):
    step, args = functional_step(CACHES["int8"]())
    (tmp_path / "step").write_bytes(jax.export.export(jax.jit(step))(*args).serialize())
    np.savez(tmp_path / "in.npz", *args[:3])
    root = pathlib.Path(__file__).parent.parent
    subprocess.run([sys.executable, "-c", FRESH, tmp_path], check=True, cwd=root)
    with np.load(tmp_path / "out.npz") as stored:
        got = [stored[name] for name in stored]
    for x, y in zip(got, jax.tree.leaves(jax.jit(step)(*args)), strict=True):
        assert_same_bits(x, y, "a step in another process")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"kind": "kvattn.codecs.int8:Int9", "fields": {}}', "no class of settings"),
        ('{"kind": "kvattn.nowhere:X", "fields": {}}', "not known to this version"),
        ('{"kind": "somebody.else:X", "fields": {}}', "import somebody.else"),
        ('{"kind": "kvattn.codecs.int4:Int4", "fields": {"size": 4}}', "settings that this version does not know"),
        ('{"kind": "os:system", "fields": {}}', "no class of settings"),
        ('{"kind": "kvattn.cache.base:storage_dtype", "fields": {"dtype": "float32"}}', "no class of settings"),
    ],
)
def test_settings_of_another_version_are_refused(text, words):
    with pytest.raises(errors.CacheVersionError, match=words):
        _trees.read(text)


@dataclasses.dataclass(frozen=True)
class Mine(kvattn.policies.Policy):
    """A user's policy, with some setting."""

    setting: object = None


@pytest.mark.parametrize("setting", [np.int32(3), np.float32(0.5), np.bool_(True)])
def test_numbers_of_numpy_are_settings(setting):
    """They have a dtype, and are none."""
    exported = jax.export.export(jax.jit(lambda cache: cache))(made(Mine(setting), capacity=8))
    (cache,), _ = jax.tree.unflatten(jax.export.deserialize(exported.serialize()).in_tree, range(4))
    assert cache.policy.setting == setting.item() and type(cache.policy.setting) is type(setting.item())


@pytest.mark.parametrize("setting", [{1}, {"a": 1}, b"x", object, np.ones(2), jnp.ones(())], ids=str)
def test_settings_that_are_no_data_are_refused(setting):
    with pytest.raises(errors.ConfigError, match="cannot be written: settings of policies and codecs are"):
        _trees._plain(Mine(setting))


# Files of Flax --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cache", kinds(), ids=name_of)
def test_flax_stores_a_cache(cache):
    filled = jax.tree.map(lambda x: jnp.arange(x.size).reshape(x.shape).astype(x.dtype), cache)
    stored = flax.serialization.to_bytes({"layer": filled})
    restored = flax.serialization.from_bytes({"layer": cache}, stored)["layer"]
    assert_same_caches(jax.tree.map(jnp.asarray, restored), filled)


@pytest.mark.parametrize(
    ("target", "words"),
    [
        (lambda: made(kvattn.SlidingWindow(8)), "policy Full.. where the target has SlidingWindow"),
        (lambda: made(None, kvattn.Int8()), "codec Plain"),
        (lambda: made(capacity=16), "num_slots=8"),
        (lambda: made(batch_size=3), "sizes of the stored one"),
        (made_paged, "it has no page_table"),
    ],
)
def test_flax_refuses_another_cache(target, words):
    stored = flax.serialization.to_bytes(made())
    with pytest.raises(errors.CacheVersionError, match=words):
        flax.serialization.from_bytes(target(), stored)


@pytest.mark.wrong_types
def test_flax_refuses_other_numbers_of_numpy():
    stored = flax.serialization.to_bytes(made(kvattn.H2O(np.int64(2), np.int64(3))))
    with pytest.raises(errors.CacheVersionError, match=r"policy H2O\(num_heavy=2, num_recent=3"):
        flax.serialization.from_bytes(made(kvattn.H2O(np.int64(3), np.int64(2))), stored)
