"""Masks of any dtype, as Flax takes them, and masks to be added, which are never taken for their opposite."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from kvattn import errors, layers
from kvattn.layers import linen

B, T, N, D = 3, 4, 2, 8
X = jax.random.normal(jax.random.key(0), (B, T, D))
SEEN = np.asarray(jax.random.bernoulli(jax.random.key(1), 0.6, (B, 1, T, T))) | np.eye(T, dtype=bool)
ADDED = np.where(SEEN, 0.0, -1e9).astype(np.float32)
ONE_BAD = np.where(np.arange(B)[:, None, None, None] == 1, ADDED, SEEN)
"""Right for all rows of the batch but one."""


def foreign(query, key, value, bias=None, mask=None, **options):
    """A function of the user, which takes a mask and nothing of ours."""
    del bias, options
    return nnx.dot_product_attention(query, key, value, mask=mask, deterministic=True)


def foreign_linen(query, key, value, bias=None, mask=None, **_):
    return nn.dot_product_attention(query, key, value, bias, mask)


def nnx_call(**settings):
    """(x, mask) -> output, of a layer, of an NNX layer in decode, of a Linen layer ..., all with the same weights."""
    decode = settings.get("decode", False)
    layer = layers.MultiHeadAttention(N, D, **{"use_bias": False, **settings}, rngs=nnx.Rngs(0))

    def call(x, mask):
        module = nnx.clone(layer)
        if decode:
            module.init_cache(x.shape)
        return module(x, mask=mask)

    return call


def linen_call(**settings):
    layer = linen.MultiHeadDotProductAttention(N, **{"use_bias": False, **settings})
    variables = layer.init(jax.random.key(0), X)

    def call(x, mask):
        if settings.get("decode"):
            return layer.apply(variables, x, mask=mask, mutable=["cache"])[0]
        return layer.apply(variables, x, mask=mask)

    return call


def function(x, mask):
    heads = x.reshape(*x.shape[:-1], N, D // N)
    return layers.dot_product_attention(heads, heads, heads, mask=mask).reshape(x.shape)


CALLS = {
    "nnx": nnx_call(),
    "nnx decode": nnx_call(decode=True),
    "nnx window, foreign function": nnx_call(window=T, attention_fn=foreign),
    "nnx decode, foreign function": nnx_call(decode=True, attention_fn=foreign),
    "linen": linen_call(),
    "linen decode": linen_call(decode=True),
    "linen window, foreign function": linen_call(window=T, attention_fn=foreign_linen),
    "linen einsums": linen_call(
        qk_attn_weights_einsum_cls=lambda: jnp.einsum, attn_weights_value_einsum_cls=lambda: jnp.einsum
    ),
    "function": function,
}
JITTED = {name: jax.jit(call) for name, call in CALLS.items()}


@pytest.mark.parametrize("name", CALLS)
def test_a_mask_to_be_added_is_refused_or_nan(name):
    for bad in (ADDED, np.where(SEEN, 0.0, -np.inf), np.where(SEEN, 0, -1), ONE_BAD, jnp.asarray(ADDED)):
        with pytest.raises(errors.RangeError, match=r"mask says where attending is allowed.*pass mask=additive >= 0"):
            CALLS[name](X, bad)
    good = JITTED[name](X, SEEN.astype(np.float32))
    out = JITTED[name](X, ONE_BAD.astype(np.float32))
    assert np.isnan(out[1]).all()
    np.testing.assert_array_equal(np.delete(out, 1, 0), np.delete(good, 1, 0))
    assert not np.isnan(good).any()
    assert np.isnan(JITTED[name](X, ADDED)).all()


@pytest.mark.parametrize("name", CALLS)
def test_zeros_and_ones_of_any_dtype_are_bools(name):
    expected = CALLS[name](X, SEEN)
    np.testing.assert_array_equal(CALLS[name](X, SEEN.astype(np.int32)), expected)
    under_jit = JITTED[name](X, SEEN)
    np.testing.assert_allclose(under_jit, expected, atol=1e-6)
    np.testing.assert_array_equal(JITTED[name](X, SEEN.astype(np.float32)), under_jit)


def test_masks_of_flax_pass_under_jit():
    tokens = jnp.array([[1, 1, 1, 0]] * B)
    call = CALLS["nnx"]

    @jax.jit
    def masked(x, tokens):
        padding = nnx.make_attention_mask(jnp.ones_like(tokens, bool), tokens > 0)
        with jax.numpy_dtype_promotion("standard"):  # Flax needs it
            return call(x, nnx.combine_masks(nnx.make_causal_mask(tokens), padding))

    seen = np.tril(np.ones((T, T), bool)) & (np.arange(T) < 3)
    np.testing.assert_allclose(masked(X, tokens), call(X, seen), atol=1e-6)


@pytest.mark.parametrize("name", ["nnx", "linen"])
def test_a_spoiled_row_spoils_its_gradients_only(name):
    gradient = jax.jit(jax.grad(lambda x, mask: jnp.sum(CALLS[name](x, mask))))
    good, spoiled = gradient(X, SEEN.astype(np.float32)), gradient(X, ONE_BAD.astype(np.float32))
    np.testing.assert_allclose(gradient(X, SEEN), good, atol=1e-6)
    assert np.isnan(spoiled[1]).all()
    np.testing.assert_array_equal(np.delete(spoiled, 1, 0), np.delete(good, 1, 0))


def test_under_debug_nans_only_a_mask_to_be_added_is_an_error():
    call = CALLS["nnx"]
    nothing = SEEN.astype(np.float32) * 0  # rows that see nothing
    with jax.debug_nans(True):
        JITTED["nnx"](X, SEEN.astype(np.float32)).block_until_ready()
        JITTED["nnx"](X, nothing).block_until_ready()
        jax.vmap(call)(X[:, None], jnp.asarray(SEEN.astype(np.float32))[:, None])
        with pytest.raises((errors.RangeError, FloatingPointError)):
            JITTED["nnx"](X, ADDED)


@pytest.mark.parametrize("shape", [(T, T), (), (N, 1, T), (1, 1, 1, T)])
def test_masks_of_any_rank_are_judged(shape):
    assert np.isnan(JITTED["function"](X, jnp.full(shape, -1.0))).all()
    np.testing.assert_array_equal(JITTED["function"](X, jnp.ones(shape)), JITTED["function"](X, jnp.ones(shape, bool)))


def test_more_batch_axes_are_judged_each():
    x, mask = X.reshape(1, B, T, D), ONE_BAD.astype(np.float32)[None]
    out = JITTED["nnx"](x, mask)
    assert np.isnan(out).all(axis=(2, 3)).tolist() == [[False, True, False]]
    out = JITTED["nnx"](jnp.concatenate([x, x]), mask)
    assert np.isnan(out).all(axis=(2, 3)).tolist() == [[False, True, False]] * 2


@pytest.mark.wrong_types
@pytest.mark.parametrize("mask", ["no", np.ones((T, T), np.complex64), [["a"]], jax.random.key(0)])
def test_what_is_no_mask(mask):
    for name in ("nnx", "nnx decode", "linen", "linen decode", "function"):
        with pytest.raises(errors.DTypeError, match="mask must"):
            CALLS[name](X, mask)


@pytest.mark.parametrize("dropout_rate", [0.0, 0.5])
def test_a_mask_given_as_bias_is_refused(dropout_rate):
    heads = X.reshape(B, T, N, D // N)
    with pytest.raises(errors.DTypeError, match="pass them as mask"):
        layers.dot_product_attention(
            heads, heads, heads, bias=SEEN, dropout_rate=dropout_rate, dropout_rng=jax.random.key(0)
        )


def test_nan_is_no_answer():
    mask = np.where(SEEN, 1.0, np.nan)
    with pytest.raises(errors.RangeError, match="nan"):
        CALLS["nnx"](X, mask)
    assert (
        np.isnan(JITTED["nnx"](X, mask.astype(np.float32))).all(axis=(1, 2)).tolist() == (~SEEN).any((1, 2, 3)).tolist()
    )


@pytest.mark.parametrize("axis_type", [AxisType.Explicit, AxisType.Auto])
def test_masks_are_judged_split_over_a_mesh(axis_type):
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(axis_type,) * 2)
    x, mask = np.concatenate([X, X[:1]]), np.concatenate([ONE_BAD, ONE_BAD[:1]]).astype(np.float32)
    with jax.set_mesh(mesh):
        layer = layers.MultiHeadAttention(N, D, mesh=mesh, rngs=nnx.Rngs(0))
        apply, weights = layers.stateless(layer)
        step = jax.jit(lambda weights, x, mask: apply(weights, x, mask=mask))
        x = jax.device_put(x, NamedSharding(mesh, P("data")))
        for spec in (P("data"), P()):
            out = step(weights, x, jax.device_put(mask, NamedSharding(mesh, spec)))
            assert np.isnan(np.asarray(out)).all(axis=(1, 2)).tolist() == [False, True, False, False]
        out = step(weights, x, jax.device_put(mask[1, 0], NamedSharding(mesh, P())))
        assert np.isnan(np.asarray(out)).all()
