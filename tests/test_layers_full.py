"""Attention over full sequences: the fused and the explicit way of computing mean the same."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import kvattn
from kvattn import errors
from kvattn.attend import full
from kvattn.layers import MultiHeadAttention, dot_product_attention

B, T, S, N, K, H = 2, 5, 6, 4, 2, 8
EINSUMS = (jnp.einsum, jnp.einsum)


def arrays(dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = (B, T, N, H), (B, S, K, H), (B, S, K, H)
    return [jax.random.normal(k, shape, dtype) for k, shape in zip(keys, shapes, strict=True)]


def close(got, want, tolerance=1e-5):
    np.testing.assert_allclose(
        np.asarray(got, np.float64), np.asarray(want, np.float64), rtol=tolerance, atol=tolerance
    )


RULES = {
    "plain": {},
    "causal": {"is_causal": True, "scale": 0.3},
    "window": {"window": 2},
    "mask per head": {"mask": np.random.default_rng(0).random((B, N, T, S)) > 0.4},
    "bias": {"bias": np.random.default_rng(1).normal(size=(1, N, 1, S)).astype(np.float32), "is_causal": True},
    "softcap": {"softcap": 1.5, "window": 3},
    "sinks": {"sinks": jnp.arange(N, dtype=jnp.float32) - 1, "is_causal": True},
    "alibi": {"alibi_slopes": kvattn.alibi_slopes(N), "is_causal": True},
    "a row without keys": {"mask": np.arange(T)[:, None] * np.ones((1, S)) > 0},
    "a row without keys, capped": {"mask": np.arange(T)[:, None] * np.ones((1, S)) > 0, "softcap": 2.0},
}


@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
def test_fused_and_explicit_attention_agree(rules):
    query, key, value = arrays()
    fused, _ = full.attend(query, key, value, **rules)
    explicit, weights = full.attend(query, key, value, einsums=EINSUMS, return_weights=True, **rules)
    close(explicit, fused)
    close(jnp.einsum("bnts,bsnh->btnh", weights, jnp.repeat(value, N // K, axis=2)), fused)
    _, beside = full.attend(query, key, value, return_weights=True, **rules)
    close(beside, weights)


def test_dropout_masks_are_flax_masks():
    query, key, value = arrays()
    for broadcast in (True, False):
        options = {"dropout_rng": jax.random.key(3), "dropout_rate": 0.5, "broadcast_dropout": broadcast}
        close(
            dot_product_attention(query, key, value, **options), nnx.dot_product_attention(query, key, value, **options)
        )


def test_half_precision_is_computed_in_float32():
    query, key, value = arrays(jnp.float16)
    want, _ = full.attend(*(x.astype(jnp.float32) for x in (query * 100, key * 100, value)))
    got, _ = full.attend(query * 100, key * 100, value)
    assert got.dtype == jnp.float16 and np.isfinite(got).all()
    close(got, want, 5e-3)
    sown, weights = full.attend(query * 100, key * 100, value, return_weights=True)
    np.testing.assert_array_equal(sown, got)
    assert weights.dtype == jnp.float32 and np.isfinite(weights).all()


@pytest.mark.parametrize(
    "shapes, message",
    [
        (((2, 5, 4, 8), (5, 4, 8), (5, 4, 8)), "same rank"),
        (((2, 5, 4, 8), (3, 5, 4, 8), (3, 5, 4, 8)), "batch dims must match"),
        (((2, 5, 4, 8), (2, 5, 4, 8), (2, 6, 4, 8)), "lengths must match"),
        (((2, 5, 4, 8), (2, 5, 4, 7), (2, 5, 4, 8)), "depths must match"),
        (((2, 5, 4, 8), (2, 5, 4, 8), (2, 5, 2, 8)), "heads must match"),
        (((2, 5, 5, 8), (2, 5, 2, 8), (2, 5, 2, 8)), "must be a multiple"),
    ],
)
def test_shapes_that_do_not_fit(shapes, message):
    with pytest.raises(errors.ShapeError, match=message):
        dot_product_attention(*(jnp.ones(shape) for shape in shapes))


@pytest.mark.parametrize(
    "options", [{"sinks": True, "window": 3}, {"alibi": True, "value_head_dim": 6}, {"softcap": 2.0}]
)
def test_heads_that_do_not_divide_over_an_explicit_mesh(options):
    """Two key/value heads, eight query heads on four devices: Flax has no placement for it."""
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    options = {"num_heads": 8, "in_features": 16, "num_kv_heads": 2, "head_dim": 4, **options}
    x = jax.random.normal(jax.random.key(0), (2, 7, 16))
    alone = MultiHeadAttention(**options, rngs=nnx.Rngs(0))
    want = alone(x, is_causal=True)
    with jax.set_mesh(mesh):
        layer = MultiHeadAttention(
            **options,
            rngs=nnx.Rngs(0),
            kernel_metadata={"out_sharding": P(None, "model", None)},
            bias_metadata={"out_sharding": P("model", None)},
            out_kernel_metadata={"out_sharding": P("model", None, None)},
            out_bias_metadata={"out_sharding": P(None)},
            kv_metadata={"out_sharding": P(None, None, None)},
            kv_bias_metadata={"out_sharding": P(None, None)},
        )
        x = jax.device_put(x, jax.NamedSharding(mesh, P("data")))
        got = jax.jit(lambda m, x: m(x, is_causal=True))(layer, x)
        close(got, want)
        assert jax.typeof(got).sharding.spec == P("data", None, None)
        sown, _ = nnx.capture(layer, nnx.Intermediate)(x, is_causal=True, sow_weights=True)
        close(sown, want)
        layer.init_cache(x.shape)
        step = nnx.jit(lambda m, x: m(x, decode=True))
        close(np.concatenate([step(layer, x[:, :4]), step(layer, x[:, 4:])], axis=1), want)
