"""Steps inside a user's own `jax.shard_map`, with its types checked (``check_vma=True``, the default).

Most of it is a matter of types, so tracing shows it: values are those of the same code outside.
"""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import suites
import variants
from jax.experimental import pallas as pl
from jax.sharding import AxisType, PartitionSpec
from kernel_cases import filled, request_for
from oracles import assert_same_bits
from variants import POLICIES, capacity_of, go_together

import kvattn
import kvattn.pallas
from kvattn import _manual
from kvattn.attend import api

P = PartitionSpec
B, N, K, H = 4, 4, 2, 8

CODECS = {"plain": None, **variants.CODECS}


def mesh(size=2, kind=AxisType.Auto):
    return jax.make_mesh((size,), ("b",), axis_types=(kind,))


def mapped(f, size=2, **options):
    return jax.shard_map(f, mesh=mesh(size), in_specs=P("b"), out_specs=P("b"), **options)


def made(policy, codec, batch, capacity=24):
    """An empty cache; made inside the map it is a constant, which differs over no axis."""
    settings = {"capacity": capacity_of(policy, capacity), "policy": policy, "codec": codec}
    return kvattn.KVCache.create(batch, K, H, **settings, dtype=jnp.float32)


def made_paged(codec, batch):
    cache = kvattn.PagedKVCache.create(
        4 * batch, 8, K, H, batch_size=batch, max_pages=4, codec=codec, dtype=jnp.float32
    )
    return cache.with_tables(np.arange(4 * batch).reshape(batch, 4), [0] * batch)


def tokens(*lengths, batch=B, seed=0):
    rng = np.random.default_rng(seed)
    draw = lambda t, n: jnp.asarray(rng.normal(size=(batch, t, n, H)), jnp.float32)
    return [(draw(t, N), draw(t, K), draw(t, K)) for t in lengths]


def run(make, news, **settings):
    """Outputs, tokens seen and bits of the rows in a map."""
    cache, outs = make(news[0][0].shape[0]), []
    for query, key, value in news:
        out, cache = kvattn.cached_attention(query, key, value, cache, rope=kvattn.RoPE(H), **settings)
        outs.append(out)
    return outs, cache.lengths, cache.status


def check_types(make, *lengths, **settings):
    jax.eval_shape(mapped(lambda news: run(make, news, **settings)), tokens(*lengths))


@pytest.mark.parametrize(
    "call", [lambda f: jax.jit(mapped(f)), pytest.param(mapped, marks=pytest.mark.slow)], ids=["jit", "eager"]
)
def test_the_smallest_example(call):
    def step(query):
        cache = kvattn.KVCache.create(1, 1, 4, capacity=4, dtype=jnp.float32)
        return kvattn.cached_attention(query, query, query, cache)[0]

    np.testing.assert_array_equal(call(step)(jnp.ones((2, 1, 1, 4))), np.ones((2, 1, 1, 4)))


QUICK = [
    ("Full", "KIVI", "xla"),
    ("H2O-cache", "Int4", "reference"),
    ("Scissorhands", "Float8", "xla"),
    ("FastGen", "Int8", "reference"),
]


def combinations():
    for policy, codec, implementation in itertools.product(POLICIES, CODECS, ("xla", "reference")):
        if not go_together(POLICIES[policy], CODECS[codec]):
            continue
        marks = () if (policy, codec, implementation) in QUICK else pytest.mark.slow
        yield pytest.param(policy, codec, implementation, marks=marks)


@pytest.mark.parametrize(("policy", "codec", "implementation"), list(combinations()))
def test_every_policy_and_codec(policy, codec, implementation):
    make = lambda batch: made(POLICIES[policy], CODECS[codec], batch)
    check_types(make, 4, 1, implementation=implementation, sinks=jnp.zeros(N))


@pytest.mark.parametrize("codec", [pytest.param(c, marks=() if c == "Int8" else pytest.mark.slow) for c in CODECS])
@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_pages(codec, implementation):
    check_types(lambda batch: made_paged(CODECS[codec], batch), 4, 1, implementation=implementation)


@pytest.mark.parametrize("implementation", ["mosaic_gpu", "mosaic_tpu"])
@pytest.mark.parametrize("length", [1, 4])
@pytest.mark.parametrize("paged", [False, True])
def test_kernels(implementation, length, paged):
    """Traced only: JAX's TPU interpreter has no types of mesh axes inside."""

    def step(query):
        cache = filled([3, 64, 9], 128, 1, 128, dtype=jnp.bfloat16, page_size=64 if paged else 0)
        request = request_for(cache, 2, length, dtype=jnp.bfloat16)
        out, lse, _ = api.attend(dataclasses.replace(request, query=query), implementation)
        if length == 1:
            key = jnp.ones((3, 1, 1, 128), jnp.bfloat16)
            kvattn.cached_attention(query, key, key, cache, implementation=implementation)
        return out, lse

    with kvattn.pallas.interpret():
        jax.eval_shape(mapped(step), jnp.ones((6, length, 2, 128), jnp.bfloat16))


def test_decode_attention_has_the_same_values():
    (query, *_), *_ = tokens(1)
    rng = np.random.default_rng(1)
    keys, values = (jnp.asarray(rng.normal(size=(B, K, 16, H)), jnp.float32) for _ in range(2))
    lengths = jnp.asarray([0, 3, 16, 9], jnp.int32)
    call = lambda *args: kvattn.pallas.decode_attention(*args, return_lse=True)
    args = (query[:, 0], keys, values, lengths)
    for inside, outside in zip(jax.jit(mapped(call))(*args), jax.jit(call)(*args), strict=True):
        assert_same_bits(inside, outside, "decode_attention inside and outside")


@pytest.mark.parametrize("codec", ["Int8", pytest.param("KIVI", marks=pytest.mark.slow)])
def test_gradients(codec):
    def total(news):
        return sum(jnp.sum(out**2) for out in run(lambda batch: made(kvattn.Full(), CODECS[codec], batch), news)[0])

    jax.eval_shape(mapped(jax.grad(total)), tokens(4, 1))


def test_gradients_where_devices_share_some_arguments():
    """Queries and keys are the same everywhere, values are not: so are outputs, but not the sums of the softmax."""
    (query, key, value), *_ = tokens(2, batch=2)

    def total(query, key, value):
        out, _ = kvattn.cached_attention(query, key, value, made(kvattn.Full(), kvattn.Int8(), 2))
        return jnp.sum(out**2)

    grads = jax.grad(total, argnums=(0, 1))
    other = lambda query, key, value: grads(query, key, value * jax.lax.axis_index("b").astype(value.dtype))
    call = jax.shard_map(other, mesh=mesh(), in_specs=P(), out_specs=P())
    jax.eval_shape(call, query, key, value)


def test_either_branch_may_be_the_same_on_all_devices():
    """The other one is each device's own, and so is the result."""
    x = jnp.arange(1.0, 5.0)
    own, constant = lambda x: 2 * x, lambda x: jnp.ones(x.shape)
    for yes, no, expected in ((own, constant, 2 * x), (constant, own, jnp.ones(4))):
        call = mapped(lambda x, yes=yes, no=no: _manual.cond(jnp.bool_(True), yes, no, x))
        np.testing.assert_array_equal(jax.jit(call)(x), expected)


@pytest.mark.parametrize("specs", [(P("b"), P()), (P(), P("b")), (P("b"), P("b")), (P(), P())], ids=str)
def test_a_kernel_returns_what_differs_as_what_it_reads(specs):
    """Over the axes of any of its arrays: JAX takes its word for it, so too few would be believed."""
    types = []

    def kernel(x, y, out):
        out[...] = x[...] + y[...]

    def call(x, y):
        out = _manual.result(x.shape, x.dtype, {"x": x, "more": [y]})
        types.append(jax.typeof(pl.pallas_call(kernel, out_shape=out)(x, y)).manual_axis_type.varying)
        return x, y

    shapes = [jax.ShapeDtypeStruct((4 if spec == P("b") else 2, 8), jnp.float32) for spec in specs]
    jax.eval_shape(jax.shard_map(call, mesh=mesh(), in_specs=specs, out_specs=specs), *shapes)
    assert types == [{"b"} if P("b") in specs else set()]


def test_what_no_device_has_alone_stays_so():
    """Outputs of what is the same on all devices of an axis are the same, by their types."""
    grid = jax.make_mesh((2, 2), ("b", "other"), axis_types=(AxisType.Auto,) * 2)
    make = lambda batch: made_paged(None, batch)
    call = jax.shard_map(lambda news: run(make, news), mesh=grid, in_specs=P("b"), out_specs=P("b"))
    jax.eval_shape(call, tokens(4, 1))


def test_a_loop_that_starts_from_constants_is_seen(monkeypatch):
    """The tests above can fail: with JAX's own loop the types do not fit."""
    monkeypatch.setattr(_manual, "fori_loop", jax.lax.fori_loop)
    with pytest.raises(TypeError, match="manual axis types"):
        check_types(lambda batch: made(kvattn.Full(), None, batch), 1, implementation="xla")


class MappedSteps(suites.Steps):
    """The steps of the shared suites, each device with some of the rows."""

    def __call__(self, query, key, value, cache, num_new=None, **settings):
        if num_new is None:
            num_new = np.full(query.shape[0], query.shape[1])
        name = ("mapped", query.shape, tuple(sorted(settings.items())), jax.tree.structure(cache))
        if name not in self._made:

            def step(query, key, value, cache, num_new):
                return kvattn.cached_attention(query, key, value, cache, num_new=num_new, **settings)

            specs = kvattn.sharding.specs_of(cache, rows="b")
            rows = P("b")
            self._made[name] = jax.jit(
                jax.shard_map(step, mesh=mesh(), in_specs=(rows, rows, rows, specs, rows), out_specs=(rows, specs))
            )
        return self._made[name](query, key, value, cache, jnp.asarray(num_new, jnp.int32))


@pytest.mark.slow
@pytest.mark.parametrize("case", suites.POLICIES, ids=lambda case: case.id)
def test_the_shared_suite(case):
    steps = MappedSteps()
    if case.by_position and case.true_distances:
        suites.check_oracle(case, "xla", steps)
    suites.check_neighbours(case, "xla", steps)
