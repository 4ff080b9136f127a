"""T5's relative bias: its buckets against the formula, the step against lists of tokens, layers in every form."""

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
from kvattn import errors, sharding
from kvattn.layers.linen import MultiHeadDotProductAttention
from kvattn.models.parameters import parameters_of

B, T, D, N, K, H = 2, 11, 16, 4, 2, 8
BUCKETS = kvattn.RelativeBuckets(num_buckets=8, max_distance=7)


def numbers(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize(("count", "most"), [(32, 128), (8, 20), (64, 1000)])
def test_buckets(count, most, bidirectional):
    """As in the paper's code, written out for one distance after the other, in exact arithmetic."""
    buckets = kvattn.RelativeBuckets(count, most, bidirectional)
    distances = np.arange(-2 * most, 2 * most + 1)
    got = np.asarray(buckets.of(jnp.asarray(distances, jnp.int32)))
    assert got.min() == 0 and got.max() == count - 1
    for distance, bucket in zip(distances, got, strict=True):
        each = count // 2 if bidirectional else count
        ahead = bidirectional and distance < 0
        d = abs(distance) if bidirectional else max(distance, 0)
        exact = each // 2
        want = d
        if d >= exact:
            share = math.log(d / exact) / math.log(most / exact) * (each - exact)
            nearest = round(share)
            share = nearest if abs(share - nearest) < 1e-9 else share  # a border that is met exactly
            want = min(exact + int(share), each - 1)
        assert bucket == want + (each if ahead else 0), distance


def test_tables():
    """One number for each distance, those that are larger share the last; between tokens by where they stand."""
    table = jnp.asarray(numbers(8, N))
    by_distance = np.asarray(BUCKETS.by_distance(table))
    assert by_distance.shape == (N, 8)
    between = np.asarray(BUCKETS.between(table, 3, 12))
    for n, t, s in np.ndindex(between.shape):
        assert between[n, t, s] == by_distance[n, min(max(t - s, 0), 7)]
    both = kvattn.RelativeBuckets(8, 20, bidirectional=True)
    assert (np.asarray(both.between(table, 2, 2))[:, [0, 1], [1, 0]] == np.asarray(table)[[5, 1]].T).all()


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_a_step(implementation):
    """Prompts, chunks and single tokens, ragged, with a window, a soft cap, sinks and ALiBi beside it."""
    rules = {"softcap": 3.0, "sinks": numbers(N, seed=1), "alibi_slopes": kvattn.alibi_slopes(N)}
    rules["relative_bias"] = numbers(N, 5, seed=2)
    cache = kvattn.KVCache.create(B, K, H, policy=kvattn.SlidingWindow(9), dtype=jnp.float32)
    step = jax.jit(functools.partial(kvattn.cached_attention, **rules, implementation=implementation))
    oracle = TokenLists(B, keeps=9, **rules)
    for length, counts in ((6, (6, 3)), (1, (1, 1)), (6, (2, 6)), (1, (0, 1))):
        new = [numbers(B, length, heads, H, seed=length + heads) for heads in (N, K, K)]
        out, cache = step(*new, cache, num_new=np.array(counts))
        np.testing.assert_allclose(out, oracle.append(*new, counts)[0], atol=1e-5)


def test_a_policy_that_scores_and_one_that_moves():
    """H2O's scores are those of biased attention; where tokens are seen from the cache, so is their distance."""
    q, k, v = (numbers(1, T, heads, H, seed=heads) for heads in (N, K, K))
    bias = 6 * numbers(N, 4, seed=9)
    cache = kvattn.KVCache.create(1, K, H, policy=kvattn.H2O(2, 2), dtype=jnp.float32)
    step = jax.jit(functools.partial(kvattn.cached_attention, relative_bias=bias))
    for t in range(T):
        _, cache = step(*(x[:, t : t + 1] for x in (q, k, v)), cache)
    plain = kvattn.KVCache.create(1, K, H, policy=kvattn.H2O(2, 2), dtype=jnp.float32)
    for t in range(T):
        _, plain = kvattn.cached_attention(*(x[:, t : t + 1] for x in (q, k, v)), plain)
    positions = _scored(q[0], k[0], bias)
    assert [sorted(x) for x in np.asarray(cache.positions[0]).tolist()] == positions
    assert np.sort(plain.positions[0]).tolist() != positions, "the bias would not be seen here"

    policy = kvattn.StreamingLLM(1, 3)
    cache = kvattn.KVCache.create(1, K, H, policy=policy, dtype=jnp.float32)
    for t in range(T):
        out, cache = step(*(x[:, t : t + 1] for x in (q, k, v)), cache)
    short = TokenLists(1, relative_bias=bias)
    last = [0, T - 3, T - 2, T - 1]
    want, _ = short.append(q[:, last], k[:, last], v[:, last])
    np.testing.assert_allclose(out[0, 0], want[0, -1], atol=1e-5)


def _scored(q, k, bias):
    """H2O with two heavy hitters and two recent tokens, by hand: what each key/value head keeps at the end."""
    group, found = N // K, []
    for head in range(K):
        kept, score = [], {}
        for t in range(len(q)):
            kept.append(t)
            score[t] = 0.0
            for n in range(head * group, (head + 1) * group):
                s = np.array([q[t, n] @ k[j, head] / H**0.5 + bias[n][min(t - j, 3)] for j in kept], np.float64)
                probs = np.exp(s - s.max())
                for j, p in zip(kept, probs / probs.sum(), strict=True):
                    score[j] += p
            if len(kept) > 4:
                kept.remove(min(kept[:-2], key=lambda j: score[j]))
        found.append(sorted([-1] * (5 - len(kept)) + kept)[-5:])
    return found


@pytest.mark.parametrize(("by", "kind"), [("sequence", "Explicit"), ("heads", "Auto"), ("batch", "Explicit")])
def test_meshes(by, kind):
    mesh = jax.make_mesh((2,), ("model",), axis_types=(getattr(AxisType, kind),), devices=jax.devices()[:2])
    cache = sharding.shard_cache(kvattn.KVCache.create(B, K, H, capacity=T, dtype=jnp.float32), mesh, by=by)
    bias = numbers(N, 4, seed=4)
    step = jax.jit(functools.partial(sharding.cached_attention, mesh=mesh, by=by, relative_bias=bias))
    oracle = TokenLists(B, relative_bias=bias)
    for length in (5, 1, 1):
        new = [numbers(B, length, heads, H, seed=length + heads) for heads in (N, K, K)]
        out, cache = step(*new, cache)
        np.testing.assert_allclose(out, oracle.append(*new)[0], atol=1e-5)


def layer(**settings):
    settings = {"num_kv_heads": K, "head_dim": H, "relative_buckets": BUCKETS, "scale": 1.0, **settings}
    made = kvattn.layers.MultiHeadAttention(N, D, rngs=nnx.Rngs(0), **settings)
    made.relative_bias[...] = jnp.asarray(numbers(8, N, seed=5))
    return made


def test_layers():
    """Whole sequences, caches, pages and Flax's own cache agree with NumPy; and so does Linen's twin."""
    made, x = layer(), numbers(B, T, D)
    w = {name: np.asarray(x) for name, x in parameters_of(made).items()}
    assert w["relative_bias"].shape == (8, N)
    q, k, v = (np.einsum("btd,dnh->btnh", x, w[f"{n}.kernel"]) for n in ("query", "key", "value"))
    bias = np.asarray(BUCKETS.by_distance(w["relative_bias"]))
    heads, _ = TokenLists(B, relative_bias=bias, scale=1.0).append(q, k, v)
    want = np.einsum("btnh,nhd->btd", heads, w["out.kernel"])
    np.testing.assert_allclose(made(x, is_causal=True), want, atol=1e-4)
    paged = made.make_paged_cache(6, 4, batch_size=B, max_length=T).with_tables([[0, 5, 2], [1, 4, 3]], [0, 0])
    step = nnx.jit(lambda made, x, cache: made(x, cache=cache))
    for cache in (made.make_cache(B, T), paged):
        outs = []
        for piece in np.split(x, [6, 7], axis=1):
            out, cache = step(made, piece, cache)
            outs.append(out)
        np.testing.assert_allclose(np.concatenate(outs, axis=1), want, atol=1e-4)
    made.init_cache((B, T, D))
    outs = [made(piece, decode=True) for piece in np.split(x, [6, 7], axis=1)]
    np.testing.assert_allclose(np.concatenate(outs, axis=1), want, atol=1e-4)

    twin = MultiHeadDotProductAttention(N, num_kv_heads=K, head_dim=H, relative_buckets=BUCKETS, scale=1.0, decode=True)
    params = {name: {"kernel": w[f"{name}.kernel"], "bias": w[f"{name}.bias"]} for name in ("query", "key", "value")}
    params |= {"out": {"kernel": w["out.kernel"], "bias": w["out.bias"]}, "relative_bias": w["relative_bias"]}
    again = MultiHeadDotProductAttention(N, num_kv_heads=K, head_dim=H, relative_buckets=BUCKETS, scale=1.0)
    np.testing.assert_allclose(again.apply({"params": params}, x, is_causal=True), want, atol=1e-4)
    out, _ = jax.jit(lambda x, cache: again.apply({"params": params}, x, cache=cache))(x, again.make_cache(B, T))
    np.testing.assert_allclose(out, want, atol=1e-4)
    state = {"params": params, "cache": twin.init(jax.random.key(0), x)["cache"]}
    for piece, end in ((x[:, :6], 6), (x[:, 6:7], 7)):
        out, changed = twin.apply(state, piece, mutable="cache")
        state |= changed
        np.testing.assert_allclose(out, want[:, end - piece.shape[1] : end], atol=1e-4)


def test_an_encoder_looks_both_ways():
    """Buckets for keys that come later, in a whole sequence without a mask; a foreign function is given a bias."""
    both = kvattn.RelativeBuckets(8, 7, bidirectional=True)
    made, x = layer(relative_buckets=both, num_kv_heads=N), numbers(1, 5, D)
    w = {name: np.asarray(x) for name, x in parameters_of(made).items()}
    q, k, v = (np.einsum("btd,dnh->btnh", x, w[f"{n}.kernel"])[0] for n in ("query", "key", "value"))
    table = np.asarray(w["relative_bias"])
    scores = np.einsum("tnh,snh->nts", q, k)
    for t, s in np.ndindex(5, 5):
        scores[:, t, s] += table[int(both.of(jnp.int32(t - s)))]
    probs = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    want = np.einsum("nts,snh,nhd->td", probs, v, w["out.kernel"])
    np.testing.assert_allclose(made(x)[0], want, atol=1e-4)
    seen = []

    def spy(query, key, value, bias=None, mask=None, **_):
        seen.append(bias)
        return query

    layer(relative_buckets=both, num_kv_heads=N, attention_fn=spy)(x)
    np.testing.assert_array_equal(seen[0][0], both.between(w["relative_bias"], 5, 5))


def test_its_gradient():
    """Through a cache, as over the whole sequence."""
    made, x = layer(), jnp.asarray(numbers(1, 4, D))
    apply, weights = kvattn.layers.stateless(made)
    full = jax.jit(jax.grad(lambda w: jnp.sum(jnp.square(apply(w, x, is_causal=True)))))(weights)
    cached = jax.jit(jax.grad(lambda w: jnp.sum(jnp.square(apply(w, x, cache=made.make_cache(1, 4))[0]))))(weights)
    assert any(g.shape == (8, N) and np.abs(g).max() > 1e-3 for g in full)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-3), full, cached)


@pytest.mark.wrong_types
def test_refusals():
    cache = kvattn.KVCache.create(1, K, H, capacity=4, dtype=jnp.float32)
    q, k = jnp.ones((1, 1, N, H)), jnp.ones((1, 1, K, H))
    step = functools.partial(kvattn.cached_attention, q, k, k, cache)
    for bias in (jnp.ones((N,)), jnp.ones((K, 4)), jnp.ones((N, 0))):
        with pytest.raises(errors.ShapeError, match=r"relative_bias must be \[N, distances"):
            step(relative_bias=bias)
    with pytest.raises(errors.RangeError, match="finite"):
        step(relative_bias=jnp.full((N, 2), jnp.inf))
    with pytest.raises(errors.UnsupportedError, match="no relative bias"), kvattn.pallas.interpret():
        step(relative_bias=jnp.ones((N, 2)), implementation="mosaic_tpu")
    static = kvattn.KVCache.from_encoder(jnp.ones((1, 3, K, H)), jnp.ones((1, 3, K, H)))
    with pytest.raises(errors.ConfigError, match="relative_bias"):
        kvattn.cached_attention(q, None, None, static, relative_bias=jnp.ones((N, 2)))
    with pytest.raises(errors.ConfigError, match="relative_buckets"):
        layer().make_cross_cache(jnp.ones((1, 3, D)))
    for bad, error in (((2, 9), errors.ConfigError), ((9, 9), errors.ConfigError), ((8, 4), errors.ConfigError)):
        with pytest.raises(error):
            kvattn.RelativeBuckets(*bad)
    with pytest.raises(errors.ConfigError, match="at least 8"):
        kvattn.RelativeBuckets(4, 9, bidirectional=True)
    with pytest.raises(errors.ShapeError, match="num_buckets"):
        BUCKETS.by_distance(jnp.ones((7, N)))
    with pytest.raises(errors.DTypeError, match="relative_buckets must be a"):
        kvattn.layers.MultiHeadAttention(N, D, relative_buckets=32, rngs=nnx.Rngs(0))
