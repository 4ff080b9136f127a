"""Shapes, steps and the comparison with one device that the tests of `kvattn.sharding` share."""

import contextlib
import functools
import itertools
import os
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import variants
from jax.experimental import topologies
from jax.sharding import AxisType

import kvattn
from kvattn import sharding

B, N, H, LENGTH = 8, 16, 8, 6
MHA, GQA, MQA = 16, 2, 1
KINDS = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}
CAPACITY = 72
POLICIES = {
    entry.name: {"policy": policy, "capacity": variants.capacity_of(policy, CAPACITY)}
    for entry in kvattn.policies.registered()
    for policy in entry.examples[:1]
}
CODECS = {
    entry.name: {"codec": codec, "capacity": CAPACITY}
    for entry in kvattn.codecs.registered()[1:]
    for codec in entry.examples[:1]
}
SETTINGS = {
    **POLICIES,
    **CODECS,
    "full in blocks": {"capacity": 20, "layout": kvattn.cache.Layout(20, 8, True)},
    "h2o in blocks": {"policy": kvattn.H2O(12, 5), "layout": kvattn.cache.Layout(18, 8, True)},
}
"""Arguments of `KVCache.create` by name."""
SCHEMES = ((MHA, "heads"), (GQA, "heads"), *itertools.product((MHA, GQA, MQA), ("batch", "sequence")))
ROPE = kvattn.RoPE(H)
RAGGED = np.array([6, 0, 3, 6, 1, 5, 6, 4], np.int32)


@functools.cache
def mesh_of(kind, shape=(8,)):
    names = ("model",) if len(shape) == 1 else ("data", "model")
    return jax.make_mesh(shape, names, axis_types=(KINDS[kind],) * len(shape))


@functools.cache
def tokens(seed, length, num_kv_heads, num_heads=N):
    rng = np.random.default_rng(seed)
    size = lambda heads: (B, length, heads, H)
    return tuple(rng.normal(size=size(h)).astype(np.float32) for h in (num_heads, num_kv_heads, num_kv_heads))


def make(num_kv_heads, **settings):
    return kvattn.KVCache.create(B, num_kv_heads, H, dtype=jnp.float32, **settings)


def calls(num_kv_heads, num_steps, num_heads=N):
    """A prompt, a chunk of another number of tokens for every row, single tokens."""
    yield tokens(1, LENGTH, num_kv_heads, num_heads), np.full(B, LENGTH, np.int32)
    yield tokens(2, LENGTH, num_kv_heads, num_heads), RAGGED
    for i in range(num_steps):
        yield tokens(3 + i, 1, num_kv_heads, num_heads), np.ones(B, np.int32)


def walk(step, cache, num_kv_heads, num_steps, num_heads=N):
    outs = []
    for new, num_new in calls(num_kv_heads, num_steps, num_heads):
        out, cache = step(*new, cache, num_new)
        outs.append(np.asarray(out))
    return outs, cache.check()


@functools.cache
def one_device(name, num_kv_heads, num_steps, num_heads=N):
    step = jax.jit(lambda q, k, v, cache, num_new: kvattn.cached_attention(q, k, v, cache, num_new=num_new, rope=ROPE))
    return walk(step, make(num_kv_heads, **SETTINGS[name]), num_kv_heads, num_steps, num_heads)


def sharded_step(mesh, by, **settings):
    settings = {"rope": ROPE, **settings}
    return kvattn.jit(
        lambda q, k, v, cache, num_new: sharding.cached_attention(
            q, k, v, cache, num_new=num_new, mesh=mesh, by=by, **settings
        )
    )


def check_equal(name, num_kv_heads, by, kind, num_steps, shape=(8,), num_heads=N):
    """Outputs to 1e-5, and the same tokens kept, over a prompt, a ragged chunk and single tokens."""
    mesh = mesh_of(kind, shape)
    expected, after = one_device(name, num_kv_heads, num_steps, num_heads)
    cache = sharding.shard_cache(make(num_kv_heads, **SETTINGS[name]), mesh, by=by)
    # Explicit meshes are those of a context, Auto ones arguments alone.
    with jax.set_mesh(mesh) if kind == "explicit" else contextlib.nullcontext():
        outs, cache = walk(sharded_step(mesh, by), cache, num_kv_heads, num_steps, num_heads)
    for i, (a, b) in enumerate(zip(expected, outs, strict=True)):
        assert np.abs(a - b).max() <= 1e-5, f"call {i}: off by {np.abs(a - b).max()}"
    positions = np.asarray(cache.positions)
    if positions.ndim == 3:  # copies of a head keep the same tokens
        positions = positions.reshape(B, num_kv_heads, -1, positions.shape[-1])
        assert (positions == positions[:, :, :1]).all(), "copies of a head keep different tokens"
        positions = positions[:, :, 0]
    assert (positions == np.asarray(after.positions)).all()
    assert (np.asarray(cache.lengths) == np.asarray(after.lengths)).all()


def kinds(program):
    return sorted(c.kind for c in sharding.collectives(program))


@functools.cache
def tpu_devices(topology):
    """Devices of a TPU that is not there, for which libtpu compiles."""
    environment = {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-8",
        "TPU_STDERR_LOG_LEVEL": "3",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # it only compiles: other processes may, too
    }
    with mock.patch.dict(os.environ, environment):
        return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
