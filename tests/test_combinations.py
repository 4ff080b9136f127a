"""Policy x codec x {MHA, GQA, MQA} x {NNX, Linen, functional}: all three say the same, or the pair is refused by name.

What is right for a policy or a codec by itself is in test_policies.py and test_codecs.py, and there the functional step
is attention over the decoded cache; here the layers' `policy=` and `codec=` are held against it.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import variants
from flax import nnx
from variants import capacity_of, go_together, name, with_tokens

import kvattn
from kvattn.layers import GroupedQueryAttention, linen

B, D, N, H, CHUNK, STEPS = 2, 16, 4, 8, 9, 4
LENGTH = CHUNK + STEPS
KV_HEADS = {"MHA": 4, "GQA": 2, "MQA": 1}
POLICIES = tuple(map(with_tokens, variants.POLICIES.values()))
CODECS = (None, *variants.CODECS.values())
KIVI = variants.CODECS["KIVI"]


def combinations():
    """Every pair with every head count; of the quick ones each pair once, head counts in turn."""
    for i, policy in enumerate(POLICIES):
        for j, codec in enumerate(CODECS):
            for k, heads in enumerate(KV_HEADS):
                if go_together(policy, codec):
                    quick = (i + j) % 3 == k and (i + j) % 2 == 0
                    marks = () if quick else pytest.mark.slow
                    yield pytest.param(policy, codec, heads, id=f"{name(policy)}-{name(codec)}-{heads}", marks=marks)


def by_hand(layer, x, cache, ids):
    """The step without a layer: projections, `cached_attention`, output projection."""
    q, k, v = (jnp.einsum("btd,dnh->btnh", x, getattr(layer, n).kernel[...]) for n in ("query", "key", "value"))
    out, cache = kvattn.cached_attention(q, k, v, cache, rope=layer.rope, token_ids=ids)
    return jnp.einsum("btnh,nhd->btd", out, layer.out.kernel[...]), cache


@pytest.mark.parametrize(("policy", "codec", "heads"), list(combinations()))
def test_layers_are_the_functional_step(policy, codec, heads):
    capacity = capacity_of(policy, LENGTH)
    settings = {"num_kv_heads": KV_HEADS[heads], "head_dim": H, "rope": kvattn.RoPE(H), "use_bias": False}
    settings |= {"policy": policy, "codec": codec}
    layer = GroupedQueryAttention(N, D, **settings, rngs=nnx.Rngs(0))
    twin = linen.GroupedQueryAttention(N, **settings)
    names = ("query", "key", "value", "out")
    params = {"params": {n: {"kernel": getattr(layer, n).kernel[...]} for n in names}}
    bound = functools.partial(twin.apply, params)
    steps = (
        lambda x, cache, ids: layer(x, cache=cache, token_ids=ids),
        lambda x, cache, ids: bound(x, cache=cache, token_ids=ids),
        functools.partial(by_hand, layer),
    )
    caches = (
        layer.make_cache(B, capacity),
        twin.make_cache(B, capacity),
        kvattn.KVCache.create(B, KV_HEADS[heads], H, capacity=capacity, policy=policy, codec=codec, dtype=jnp.float32),
    )

    @jax.jit
    def run(x, caches, ids):
        outs, after = [], []
        for step, cache in zip(steps, caches, strict=True):
            first, cache = step(x[:, :CHUNK], cache, ids[:, :CHUNK])

            def one(cache, new, step=step):
                y, cache = step(new[0][:, None], cache, new[1][:, None])
                return cache, y[:, 0]

            cache, rest = jax.lax.scan(one, cache, (x[:, CHUNK:].swapaxes(0, 1), ids[:, CHUNK:].T))
            outs.append(jnp.concatenate([first, rest.swapaxes(0, 1)], axis=1))
            after.append(cache)
        return outs, after

    x = jax.random.normal(jax.random.key(1), (B, LENGTH, D))
    ids = jax.random.randint(jax.random.key(2), (B, LENGTH), 0, 6)
    (nnx_out, linen_out, expected), after = run(x, caches, ids)
    np.testing.assert_allclose(nnx_out, expected, atol=1e-5)
    np.testing.assert_allclose(linen_out, expected, atol=1e-5)
    for cache in after:
        assert (type(cache.codec), cache.policy) == (type(after[2].codec), policy)
        assert cache.check().lengths.tolist() == [LENGTH] * B
        np.testing.assert_array_equal(cache.positions, after[2].positions)
        assert cache.nbytes == after[2].nbytes


@pytest.mark.parametrize("policy", [p for p in POLICIES if not go_together(p, KIVI)], ids=name)
def test_pairs_that_cannot_be(policy):
    """Refused where the cache is made, with both names and the reason."""
    why = rf"KIVI.*{type(policy).__name__}.*share their scales"
    layer = GroupedQueryAttention(N, D, num_kv_heads=N, head_dim=H, policy=policy, codec=KIVI, rngs=nnx.Rngs(0))
    twin = linen.GroupedQueryAttention(N, num_kv_heads=N, head_dim=H, policy=policy, codec=KIVI)
    for make in (lambda: layer.make_cache(B, 16), lambda: twin.make_cache(B, 16)):
        with pytest.raises(kvattn.errors.UnsupportedError, match=why):
            make()
