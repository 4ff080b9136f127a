"""Derivatives through codecs: those of attention over what was read, handed on to what was written."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

import kvattn
import kvattn.sharding

B, N, K, H = 1, 4, 2, 8
RESIDUAL = 4
CODECS = {
    "int8": kvattn.Int8(),
    "float8": kvattn.Float8(),
    "int4": kvattn.Int4(4),
    "kivi": kvattn.KIVI(2, 2, RESIDUAL),
}


def tokens(length, seed=0):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=(B, length, n, H)), jnp.float32) for n in (N, K, K)]


def made(codec, capacity=8, **settings):
    return kvattn.KVCache.create(B, K, H, capacity=capacity, codec=codec, dtype=jnp.float32, **settings)


def attention(query, keys, values, first):
    """Plain causal attention of [B, T, N, H] at positions `first` and following over [B, S, K, H]."""
    keys, values = (jnp.repeat(x, N // K, axis=2) for x in (keys, values))
    scores = jnp.einsum("btnh,bsnh->bnts", query, keys) / np.float32(np.sqrt(H))
    t, s = first + np.arange(query.shape[1])[:, None], np.arange(keys.shape[1])[None]
    return jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(jnp.where((s <= t)[None, None], scores, -jnp.inf)), values)


def decoded(cache, length):
    """What is read of the first tokens, [B, length, K, H] twice."""
    return [x.swapaxes(1, 2)[:, :length] for x in cache.dense()]


def check_close(got, expected, what):
    for g, e, name in zip(got, expected, ("query", "key", "value"), strict=True):
        np.testing.assert_allclose(g, e, rtol=2e-4, atol=2e-5, err_msg=f"{what}: derivative of {name}")
        assert np.abs(np.asarray(e)).max() > 1e-3, f"{what}: derivative of {name} is there"


def weight(out):
    """A loss that no symmetry makes 0."""
    return jnp.sum(out * jnp.sin(jnp.arange(out.size, dtype=out.dtype)).reshape(out.shape))


@pytest.mark.parametrize("implementation", ["xla", "reference"])
@pytest.mark.parametrize("codec", CODECS)
def test_the_call_of_one_token(codec, implementation):
    """Of a token that is added to others; those are constants."""
    _, cache = jax.jit(kvattn.cached_attention)(*tokens(5), made(CODECS[codec]))
    new = tokens(1, seed=1)

    def loss(query, key, value):
        return weight(kvattn.cached_attention(query, key, value, cache, implementation=implementation)[0])

    keys, values = decoded(kvattn.cached_attention(*new, cache)[1], 6)

    def formula(query, key, value):
        return weight(attention(query, keys.at[:, 5:].set(key), values.at[:, 5:].set(value), 5))

    expected = jax.grad(formula, argnums=(0, 1, 2))(new[0], keys[:, 5:], values[:, 5:])
    check_close(jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(*new), expected, codec)


@pytest.mark.parametrize("codec", CODECS)
def test_the_call_of_several_tokens(codec):
    """New tokens see each other as they are stored (KIVI's as they came): all of them have derivatives."""
    new = tokens(5)
    loss = lambda *new: weight(kvattn.cached_attention(*new, made(CODECS[codec]))[0])
    keys, values = new[1:] if codec == "kivi" else decoded(kvattn.cached_attention(*new, made(CODECS[codec]))[1], 5)
    expected = jax.grad(lambda *new: weight(attention(*new, 0)), argnums=(0, 1, 2))(new[0], keys, values)
    check_close(jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(*new), expected, codec)


def test_kivi_on_both_sides_of_its_flush():
    """Token by token, over the flush and past it: what the residual holds has derivatives, older ones none."""
    count = RESIDUAL + 3
    new = tokens(count)

    @jax.jit
    @functools.partial(jax.jacrev, argnums=(1, 2), has_aux=True)
    def losses(query, key, value):
        cache, found, read = made(CODECS["kivi"]), [], []
        for t in range(count):
            one = (x[:, t : t + 1] for x in (query, key, value))
            out, cache = kvattn.cached_attention(*one, cache)
            found.append(weight(out))
            read.append(cache.dense())
        return jnp.stack(found), read

    got, read = losses(*new)
    for t in range(count):
        keys, values = (x.swapaxes(1, 2)[:, : t + 1] for x in read[t])
        formula = lambda keys, values, t=t: weight(attention(new[0][:, t : t + 1], keys, values, t))
        for g, e, name in zip(got, jax.grad(formula, argnums=(0, 1))(keys, values), ("key", "value"), strict=True):
            known = np.arange(t + 1) > t - RESIDUAL
            expected = np.where(known[None, :, None, None], e, 0)
            np.testing.assert_allclose(
                g[t][:, : t + 1], expected, rtol=2e-4, atol=2e-5, err_msg=f"{name}, {t + 1} tokens"
            )


@pytest.mark.parametrize("codec", CODECS)
def test_differences_wider_than_a_step(codec):
    """Over many steps of the codes the function goes as its derivative says."""
    query, key, value = tokens(5, seed=2)
    call = jax.jit(lambda key, value: weight(kvattn.cached_attention(query, key, value, made(CODECS[codec]))[0]))
    grads = jax.jit(jax.grad(call, argnums=(0, 1)))
    rng, width = np.random.default_rng(3), 0.25
    for argument in (0, 1):
        wide, slope = 0.0, 0.0
        for _ in range(8):
            direction = jnp.asarray(rng.normal(size=key.shape), jnp.float32)
            at = lambda h, direction=direction, argument=argument: [
                x + h * direction if i == argument else x for i, x in enumerate((key, value))
            ]
            difference = float(call(*at(width)) - call(*at(-width))) / (2 * width)
            along = [float(jnp.sum(grads(*at(h))[argument] * direction)) for h in (-width, 0.0, width)]
            mean = (along[0] + 4 * along[1] + along[2]) / 6  # Simpson's rule
            wide, slope = wide + abs(difference - mean), slope + abs(mean)
        # None, or one of the wrong sign, would be off by 100 % and more.
        assert wide < 0.25 * slope, f"{codec}: off by {wide / slope:.0%} of the slope"


def test_pages():
    cache = kvattn.PagedKVCache.create(6, 2, K, H, batch_size=B, max_pages=4, codec=kvattn.Int8(), dtype=jnp.float32)
    cache = cache.with_tables([[5, 1, 3, 0]], [0])
    _, cache = jax.jit(kvattn.cached_attention)(*tokens(5), cache)
    _, contiguous = jax.jit(kvattn.cached_attention)(*tokens(5), made(kvattn.Int8()))
    losses = [lambda *new, c=c: weight(kvattn.cached_attention(*new, c)[0]) for c in (cache, contiguous)]
    got, expected = (jax.jit(jax.grad(f, argnums=(0, 1, 2)))(*tokens(1, seed=1)) for f in losses)
    check_close(got, expected, "pages")


def test_by_sequence_every_device_has_its_share():
    mesh = jax.make_mesh((2,), ("model",), axis_types=(AxisType.Auto,))
    _, cache = jax.jit(kvattn.cached_attention)(*tokens(5), made(kvattn.Int8()))
    shared = kvattn.sharding.shard_cache(cache, mesh, by="sequence")

    def alone(*new):
        return weight(kvattn.cached_attention(*new, cache)[0])

    def together(*new):
        return weight(kvattn.sharding.cached_attention(*new, shared, mesh=mesh, by="sequence")[0])

    new = tokens(1, seed=1)
    got, expected = (jax.jit(jax.grad(f, argnums=(0, 1, 2)))(*new) for f in (together, alone))
    check_close(got, expected, "by sequence")


def test_scales_that_a_caller_gives_keep_their_derivatives():
    """There they are arguments of their own, not made from keys."""
    rng = np.random.default_rng(0)
    q = jnp.asarray(rng.normal(size=(B, N, H)), jnp.float32)
    k, v = (jnp.asarray(rng.integers(-127, 127, size=(B, K, 4, H)), jnp.int8) for _ in range(2))
    scales = jnp.full((B, K, 4), 0.01)
    read = lambda x, s: (x.astype(jnp.float32) * s[..., None]).swapaxes(1, 2)
    call = lambda k_scales, v_scales: weight(
        kvattn.pallas.decode_attention(q, k, v, jnp.asarray([4]), k_scales=k_scales, v_scales=v_scales)
    )
    formula = lambda k_scales, v_scales: weight(attention(q[:, None], read(k, k_scales), read(v, v_scales), 3)[:, 0])
    for got, expected in zip(*(jax.grad(f, argnums=(0, 1))(scales, scales) for f in (call, formula)), strict=True):
        np.testing.assert_allclose(got, expected, rtol=2e-4, atol=2e-5)
