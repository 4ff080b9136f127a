"""A kernel and a way to split caches that come from outside the package: one object each, and one call."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import suites
from flax import nnx
from jax.sharding import PartitionSpec as P
from oracles import assert_same_bits
from sharding_cases import GQA, MHA, calls, make, mesh_of, tokens

import kvattn
from kvattn import attend, errors, sharding

# A kernel: any object that says what it cannot take, and attends ---------------------------------


def refuses(request):
    if request.softcap is not None or request.alibi_slopes is not None or request.key_rope is not None:
        return "it has no soft cap, no ALiBi and no rotation"
    return None


def one_einsum(request):
    """Decodes the whole cache and attends in float32: slow, and about as short as a kernel can be."""
    view, query = request.view, request.query.astype(jnp.float32)
    group = query.shape[2] // view.num_kv_heads
    keys, values = (jnp.repeat(x, group, axis=1) for x in view.dense(jnp.float32))
    at = view.layout.from_blocks(view.positions[..., None], False)[..., 0]
    allowed = jnp.repeat(request.mask.allowed(request.positions, at), view.num_kv_heads // at.shape[1], axis=1)
    allowed = jnp.repeat(allowed, group, axis=1)
    scores = jnp.where(allowed, jnp.einsum("btnh,bnsh->bnts", query, keys) * request.scale, -jnp.inf)
    lse = jax.nn.logsumexp(scores, axis=-1)
    probs = jnp.exp(scores - jnp.where(jnp.isneginf(lse), 0, lse)[..., None])
    seen = jnp.any(allowed, axis=2)[..., None]
    out = jnp.einsum("bnts,bnsh->btnh", probs, jnp.where(seen, values, 0))
    mass = None
    if request.want_mass:
        mass = jnp.mean(probs.sum(2).reshape(query.shape[0], view.num_kv_heads, group, -1), axis=2)
    return out, lse.swapaxes(1, 2), mass


TOY = types.SimpleNamespace(unsupported=refuses, attend=one_einsum)


@pytest.fixture
def toy_kernel():
    attend.register(attend.Implementation("toy", lambda: TOY))
    yield "toy"
    attend.unregister("toy")


@pytest.mark.parametrize("case", suites.by_id(suites.POLICIES, "full", "ring5"), ids=lambda case: case.id)
def test_a_kernel_attends_wherever_implementations_are_named(case, toy_kernel):
    steps = suites.Steps()
    assert suites.check_attendance(case, toy_kernel, steps) > 0


def test_a_kernel_is_asked_refused_and_differentiated(toy_kernel):
    query, key, value = (jnp.asarray(x) for x in suites.tokens(3, 1))
    cache = suites.make_cache(suites.by_id(suites.POLICIES, "full")[0])
    step = lambda query, implementation: kvattn.cached_attention(
        query, key, value, cache, implementation=implementation
    )[0]
    np.testing.assert_allclose(step(query, toy_kernel), step(query, "xla"), atol=1e-6)
    with pytest.raises(errors.UnsupportedError, match="'toy': it has no soft cap"):
        kvattn.cached_attention(query, key, value, cache, softcap=2.0, implementation=toy_kernel)
    ours, theirs = (jax.grad(lambda q, name=name: step(q, name).sum())(query) for name in (toy_kernel, "reference"))
    np.testing.assert_allclose(ours, theirs, atol=1e-6)
    layer = kvattn.layers.MultiHeadAttention(2, 8, implementation=toy_kernel, rngs=nnx.Rngs(0))
    out, _ = layer(jnp.ones((1, 1, 8)), cache=layer.make_cache(1, 4))
    assert out.shape == (1, 1, 8)


def test_a_kernel_made_for_this_platform_is_tried_first():
    calls_of = []

    def counted(request):
        calls_of.append(request.query.shape)
        return one_einsum(request)

    kernel = types.SimpleNamespace(unsupported=refuses, attend=counted)
    attend.register(attend.Implementation("toy", lambda: kernel, platform=jax.default_backend()))
    try:
        cache = kvattn.KVCache.create(1, 1, 4, capacity=4, dtype=jnp.float32)
        kvattn.cached_attention(*(jnp.ones((1, 1, 1, 4)),) * 3, cache)
    finally:
        attend.unregister("toy")
    assert calls_of == [(1, 1, 1, 4)]


@pytest.mark.wrong_types
def test_records_that_are_refused(toy_kernel):
    for record, text in (
        (TOY, "must be a kvattn.attend.Implementation"),
        (attend.Implementation("xla", lambda: TOY), "'xla' already"),
        (attend.Implementation(toy_kernel, lambda: TOY), "'toy' already"),
        (attend.Implementation("my kernel", lambda: TOY), "must be an identifier"),
    ):
        with pytest.raises(errors.ConfigError, match=text):
            attend.register(record)
    with pytest.raises(errors.ConfigError, match="unknown implementation 'none'"):
        attend.unregister("none")


# A way to split caches: a subclass of `Scheme` ---------------------------------------------------


@dataclasses.dataclass(frozen=True)
class ByRows(sharding.Scheme):
    """Every device has some rows, queries included: data parallelism over the model's axis."""

    name = "rows"
    fills_heads = False

    def check(self, split, cache, num_heads):
        split.check_rows(cache.batch_size, self.row_parts(split), "make the batch a multiple.")

    def cache_specs(self, split, cache):
        return sharding.specs_of(cache, rows=split.rows, pages=split.rows)

    def token_specs(self, split):
        rows = P(split.rows)
        return sharding.TokenSpecs(rows, rows, rows, P())

    def row_parts(self, split):
        return split.num_data * split.size

    def local(self, split, step, num_heads, copies):
        return step


@pytest.fixture
def toy_scheme():
    sharding.register(ByRows())
    yield "rows"
    sharding.unregister("rows")


@pytest.mark.parametrize(("kind", "name"), [("auto", "full"), ("explicit", "h2o")])
def test_a_scheme_splits_caches_wherever_schemes_are_named(kind, name, toy_scheme):
    mesh, settings = mesh_of(kind), {"full": {"capacity": 72}, "h2o": {"policy": kvattn.H2O(6, 4)}}[name]
    whole = make(GQA, **settings)
    cache = sharding.shard_cache(whole, mesh, by=toy_scheme)
    assert cache.lengths.sharding.spec == P("model")
    assert sharding.bytes_per_device(whole, mesh, by=toy_scheme) == whole.nbytes // 8
    for new, num_new in list(calls(GQA, 2)):
        expected, whole = kvattn.cached_attention(*new, whole, num_new=num_new)
        out, cache = sharding.cached_attention(*new, cache, mesh=mesh, num_new=num_new)  # "auto": as it lies
        np.testing.assert_allclose(np.asarray(out), np.asarray(expected), atol=2e-6)
    assert cache.lengths.sharding.spec == P("model")
    assert_same_bits(np.asarray(cache.lengths), np.asarray(whole.lengths), "lengths")


@pytest.mark.wrong_types
def test_schemes_that_are_refused(toy_scheme):
    for scheme, text in ((ByRows, "an instance"), (ByRows(), "'rows' already"), (sharding.Split, "an instance")):
        with pytest.raises(errors.ConfigError, match=text):
            sharding.register(scheme)
    with pytest.raises(errors.ShardingError, match="3 rows do not divide over 8 devices"):
        sharding.shard_cache(make(MHA, capacity=4).select([0, 1, 2]), mesh_of("auto"), by=toy_scheme)
    with pytest.raises(errors.ConfigError, match=r"the known ones are .*'rows'"):
        sharding.cached_attention(*tokens(1, 1, MHA), make(MHA, capacity=4), mesh=mesh_of("auto"), by="columns")
