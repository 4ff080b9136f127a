"""Chunks of positions: layers in every form, meshes, pages, and what is refused.

That a step under `Chunked` and with `chunk=` attends to what it should is among the cases of `suites.POLICIES`.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType
from oracles import TokenLists

import kvattn
from kvattn import errors, sharding
from kvattn.masks import Mask
from kvattn.policies import OrderedWindow

B, T, D, N, K, H, SIZE = 2, 13, 16, 4, 2, 8, 4


@functools.cache
def x():
    return np.random.default_rng(0).normal(size=(B, T, D)).astype(np.float32)


def layer(**settings):
    settings = {"chunk": SIZE, "rope": kvattn.RoPE(H), **settings}
    return kvattn.layers.GroupedQueryAttention(
        num_heads=N, num_kv_heads=K, head_dim=H, in_features=D, rngs=nnx.Rngs(0), **settings
    )


def test_the_rule():
    """Written out; and it says which blocks hold nothing that a query sees."""
    allowed = Mask(chunk=3, window=2).allowed(jnp.arange(7)[None], jnp.arange(7)[None, None])[0, 0].astype(int)
    assert allowed.tolist() == [
        [1, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0],
        [0, 1, 1, 0, 0, 0, 0],
        [0, 0, 0, 1, 0, 0, 0],
        [0, 0, 0, 1, 1, 0, 0],
        [0, 0, 0, 0, 1, 1, 0],
        [0, 0, 0, 0, 0, 0, 1],
    ]
    kv = jnp.arange(9, dtype=jnp.int32)[None, None]
    reachable = Mask(chunk=3).reachable(jnp.array([[4, 5, 6, -1]]), kv)[0, 0].tolist()
    assert reachable == [False] * 3 + [True] * 4 + [False] * 2


@pytest.mark.parametrize("padding", ["right", "left"])
def test_a_layer_over_sequences_and_caches(padding):
    """A whole sequence is what an explicit mask says; pieces of any length give the same, ragged rows too."""
    apply, weights = kvattn.layers.stateless(layer())
    full = jax.jit(apply)(weights, x())
    t = np.arange(T)
    seen = (t[None] <= t[:, None]) & (t[None] // SIZE == t[:, None] // SIZE)
    plain, _ = kvattn.layers.stateless(layer(chunk=None))
    np.testing.assert_allclose(full, jax.jit(plain)(weights, x(), mask=seen), atol=1e-5)
    step = jax.jit(lambda w, x, c, n: apply(w, x, cache=c, num_new=n, padding=padding))
    caches = [layer().make_cache(B, dtype=jnp.float32), layer(policy=kvattn.Full()).make_cache(B, T, dtype=jnp.float32)]
    caches.append(layer().make_paged_cache(8, 4, batch_size=B, max_length=T, dtype=jnp.float32))
    assert [cache.policy for cache in caches] == [kvattn.Chunked(SIZE), kvattn.Full(), OrderedWindow(SIZE)]
    assert caches[0].num_slots == SIZE
    caches[2] = caches[2].with_tables([[0, 5, 2, 7], [6, 1, 4, 3]], [0, 0])
    for cache in caches:
        outs, at = [[] for _ in range(B)], np.zeros((B,), int)
        for counts in ((5, 2), (1, 1), (5, 5), (0, 5), (1, 0), (1, 0)):
            length = 5 if max(counts) > 1 else 1
            new = np.zeros((B, length, D), np.float32)
            place = [slice(0, n) if padding == "right" else slice(length - n, length) for n in counts]
            for b, n in enumerate(counts):
                new[b, place[b]] = x()[b, at[b] : at[b] + n]
            out, cache = step(weights, new, cache, np.array(counts, np.int32))
            for b in range(B):
                outs[b] += [*np.asarray(out)[b, place[b]]]
            at += counts
        cache.check()
        assert at.tolist() == [T, T]
        np.testing.assert_allclose(np.stack([np.stack(each) for each in outs]), full, atol=1e-5)


def test_flax_decoding_and_foreign_functions():
    """Flax's own cache inside a layer, and an attention function that knows no chunks."""
    made = layer()
    full = made(x(), is_causal=True)
    made.init_cache((B, T, D))
    outs = [made(x()[:, t : t + 1], decode=True) for t in range(T)]
    np.testing.assert_allclose(np.concatenate(outs, axis=1), full, atol=1e-5)
    seen = []

    def spy(query, key, value, mask=None, **_):
        seen.append(np.asarray(mask))
        return query

    layer(attention_fn=spy)(x())
    assert seen[0][0, 0, 6].astype(int).tolist() == [0, 0, 0, 0, 1, 1, 1, 0, 0, 0, 0, 0, 0]


def test_linen():
    """The twin, from the same parameters; a foreign function too."""
    settings = dict(num_heads=N, num_kv_heads=K, head_dim=H, chunk=SIZE, rope=kvattn.RoPE(H))
    twin = kvattn.layers.linen.MultiHeadDotProductAttention(**settings)
    params = twin.init(jax.random.key(0), x())
    without = kvattn.layers.linen.MultiHeadDotProductAttention(**{**settings, "chunk": None})
    t = np.arange(T)
    seen = (t[None] <= t[:, None]) & (t[None] // SIZE == t[:, None] // SIZE)
    full = twin.apply(params, x())
    np.testing.assert_allclose(full, without.apply(params, x(), mask=seen), atol=1e-5)
    cache = kvattn.KVCache.create(B, K, H, policy=kvattn.Chunked(SIZE), dtype=jnp.float32)
    outs = []
    for piece in np.split(x(), [6, 7, 8], axis=1):
        out, cache = twin.apply(params, piece, cache=cache)
        outs.append(out)
    np.testing.assert_allclose(np.concatenate(outs, axis=1), full, atol=1e-5)
    foreign = kvattn.layers.linen.MultiHeadDotProductAttention(
        num_heads=N, chunk=SIZE, attention_fn=lambda *args, **kwargs: nn.dot_product_attention(*args, **kwargs)
    )
    own = kvattn.layers.linen.MultiHeadDotProductAttention(num_heads=N, chunk=SIZE)
    params = own.init(jax.random.key(0), x())
    np.testing.assert_allclose(foreign.apply(params, x()), own.apply(params, x()), atol=1e-5)


@pytest.mark.parametrize(("by", "kind"), [("sequence", "Explicit"), ("heads", "Auto"), ("batch", "Explicit")])
def test_meshes(by, kind):
    mesh = jax.make_mesh((2,), ("model",), axis_types=(getattr(AxisType, kind),), devices=jax.devices()[:2])
    cache = kvattn.KVCache.create(B, K, H, policy=kvattn.Chunked(SIZE), dtype=jnp.float32)
    cache = sharding.shard_cache(cache, mesh, by=by)
    step = jax.jit(functools.partial(sharding.cached_attention, mesh=mesh, by=by))
    rng, oracle = np.random.default_rng(1), TokenLists(B, chunk=SIZE)
    for length in (5, 1, 1):
        q, k, v = (rng.normal(size=(B, length, heads, H)).astype(np.float32) for heads in (N, K, K))
        out, cache = step(q, k, v, cache)
        np.testing.assert_allclose(out, oracle.append(q, k, v)[0], atol=1e-5)


def test_trimmed_as_if_nothing_had_come():
    """Within the last chunk, of four, or to nothing; the tokens before it are gone."""
    cache = kvattn.KVCache.create(1, K, H, policy=kvattn.Chunked(SIZE), dtype=jnp.float32)
    rng, oracle = np.random.default_rng(2), TokenLists(1, chunk=SIZE)
    q, k, v = (rng.normal(size=(1, 10, heads, H)).astype(np.float32) for heads in (N, K, K))
    _, cache = kvattn.cached_attention(q, k, v, cache)
    for left in (8, 7, 4, 3):
        with pytest.raises(errors.UnsupportedError):
            cache.trim(10 - left)
    for left in (9, 0):
        short = cache.trim(10 - left)
        assert np.asarray(short.kept).tolist() == [left % SIZE]
        oracle.rows = [[]]
        oracle.append(q[:, :left], k[:, :left], v[:, :left])
        new = [rng.normal(size=(1, 1, heads, H)).astype(np.float32) for heads in (N, K, K)]
        out, _ = kvattn.cached_attention(*new, short)
        np.testing.assert_allclose(out, oracle.append(*new)[0], atol=1e-5)


def test_refused():
    new = [jnp.ones((1, 1, heads, 16), jnp.bfloat16) for heads in (4, 2, 2)]
    make = lambda policy, **more: kvattn.KVCache.create(1, 2, 16, policy=policy, **more)
    call = functools.partial(kvattn.cached_attention, *new)
    with pytest.raises(errors.RangeError, match="size"):
        kvattn.Chunked(0)
    with pytest.raises(errors.RangeError, match="chunk"):
        call(make(kvattn.Full(), capacity=8), chunk=0)
    with pytest.raises(errors.UnsupportedError, match="Chunked of the same size"):
        call(make(kvattn.Chunked(4)), chunk=3)
    call(make(kvattn.Chunked(4)), chunk=4)
    for policy in (kvattn.StreamingLLM(1, 3), kvattn.H2O(2, 2, positions_in="cache")):
        with pytest.raises(errors.UnsupportedError, match="chunk"):
            call(make(policy), chunk=4)
    call(make(kvattn.StreamingLLM(1, 3, positions_in="original")), chunk=4)
    static = kvattn.KVCache.from_encoder(*(jnp.ones((1, 3, 2, 16), jnp.bfloat16) for _ in range(2)))
    with pytest.raises(errors.ConfigError, match="chunk"):
        kvattn.cached_attention(new[0], None, None, static, chunk=4)
    with pytest.raises(errors.ConfigError, match="causal"):
        Mask(causal=False, chunk=4)
    with kvattn.pallas.interpret():
        for name in ("mosaic_gpu", "mosaic_tpu"):
            with pytest.raises(errors.UnsupportedError, match="chunks"):
                call(make(kvattn.Chunked(16), layout=kvattn.cache.Layout(16, 16, False)), implementation=name)
    with pytest.raises(errors.RangeError, match="chunk"):
        layer(chunk=0)
