"""Compiled for eight TPUs that are not there: the same exchanges as on CPUs, caches in place, kernels inside."""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from sharding_cases import GQA, KINDS, MHA, MQA, N, kinds, tpu_devices

import kvattn
from kvattn import sharding

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu, which compiles for TPUs"),
]
SLOTS, SIZE, ROWS = 2048, 128, 16


@functools.cache
def mesh_of(topology, kind):
    return Mesh(np.array(tpu_devices(topology)), ("model",), axis_types=(KINDS[kind],))


def compiled(mesh, by, num_kv_heads, implementation, num_heads=N, real=None, **settings):
    """A decode step of bfloat16, and its cache's shapes."""
    layout = kvattn.cache.Layout(SLOTS, SLOTS, False)
    settings = {"capacity": SLOTS, "layout": layout, **settings}
    make = lambda: sharding.arrange(kvattn.KVCache.create(ROWS, num_kv_heads, SIZE, **settings), mesh, by=by)
    shapes = jax.eval_shape(make)
    where = sharding.cache_sharding(shapes, mesh, by=by)
    cache = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, where)

    def new(heads, spec):
        return jax.ShapeDtypeStruct((ROWS, 1, heads, SIZE), jnp.bfloat16, sharding=NamedSharding(mesh, spec))

    query = new(num_heads, P() if by == "sequence" else P(None, None, "model"))
    key = new(num_kv_heads, P(None, None, "model") if by == "heads" and num_kv_heads >= 8 else P())
    step = functools.partial(sharding.cached_attention, mesh=mesh, by=by, num_heads=real, implementation=implementation)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return jax.jit(step, donate_argnums=3).lower(query, key, key, cache).compile(), cache


CASES = (
    ("heads", MHA, {}, []),
    ("heads", GQA, {}, []),
    ("batch", MQA, {}, ["all-to-all"] * 2),
    ("batch", MQA, {"num_heads": 72, "real": 71}, ["all-to-all"] * 2),
    ("sequence", GQA, {}, ["all-reduce"] * 2),
)


@pytest.mark.parametrize("implementation", ["xla", "mosaic_tpu"])
@pytest.mark.parametrize(("topology", "kind"), [("v5e:2x4", "auto"), ("v6e:2x4", "explicit")])
@pytest.mark.parametrize(("by", "num_kv_heads", "settings", "expected"), CASES)
def test_compiled_for_tpus(topology, kind, by, num_kv_heads, settings, expected, implementation):
    mesh = mesh_of(topology, kind)
    program, cache = compiled(mesh, by, num_kv_heads, implementation, **settings)
    found = kinds(program)
    if by == "sequence":  # compilers may join reductions, or not
        assert set(found) == {"all-reduce"} and 2 <= len(found) <= 3
    else:
        assert found == expected
    own = sharding.bytes_per_device(cache, mesh, by=by)
    assert all(c.nbytes < 0.05 * own for c in sharding.collectives(program))
    memory = program.memory_analysis()
    assert memory.alias_size_in_bytes >= 0.99 * own, "the cache is not updated in place"
    assert ("tpu_custom_call" in program.as_text()) == (implementation == "mosaic_tpu")
