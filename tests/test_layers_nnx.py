"""The NNX layers: Flax's parameters and numbers, caches that agree with full sequences, edges that are defined."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import kvattn
from kvattn import errors
from kvattn.layers import (
    GroupedQueryAttention,
    MultiHeadAttention,
    MultiQueryAttention,
    SlidingWindowAttention,
    stateless,
)

B, L, D = 2, 7, 16


def inputs(*shape, seed=0, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape or (B, L, D), dtype)


def close(got, want, tolerance=2e-5):
    np.testing.assert_allclose(
        np.asarray(got, np.float64), np.asarray(want, np.float64), rtol=tolerance, atol=tolerance
    )


def randomised(layer, seed=1):
    """Parameters that start at zero or one would hide a mistake in their use."""
    params = nnx.state(layer, nnx.Param)
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    new = [x + jax.random.normal(k, x.shape, x.dtype) * 0.3 for x, k in zip(leaves, keys, strict=True)]
    nnx.update(layer, jax.tree.unflatten(tree, new))
    return layer


EVERYTHING = {"head_dim": 8, "num_kv_heads": 2, "rope": kvattn.RoPE(8), "window": 3, "softcap": 2.0, "sinks": True}
KINDS = {
    "mha": (MultiHeadAttention, {}),
    "gqa_rope": (GroupedQueryAttention, {"num_kv_heads": 2, "rope": kvattn.RoPE(4)}),
    "mqa_alibi_rms": (MultiQueryAttention, {"alibi": True, "qk_norm": "rms"}),
    "window": (SlidingWindowAttention, {"window": 3}),
    "everything": (GroupedQueryAttention, {**EVERYTHING, "qk_norm": "layer", "scale": 0.7}),
    "value_dim": (MultiHeadAttention, {"num_kv_heads": 2, "value_head_dim": 6}),
}


@functools.cache
def make(kind):
    cls, options = KINDS[kind]
    return randomised(cls(num_heads=4, in_features=D, rngs=nnx.Rngs(0), **options))


# As Flax.


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_kv_heads": 2, "normalize_qk": True, "in_kv_features": 8},
        {"qkv_features": 8, "out_features": 6, "use_bias": False, "dropout_rate": 0.4},
        {"dtype": jnp.bfloat16, "kernel_init": nnx.initializers.normal(), "out_bias_init": nnx.initializers.normal()},
    ],
)
def test_equal_seeds_give_flax_parameters_and_outputs(options):
    ours, flax = (cls(4, D, rngs=nnx.Rngs(3), **options) for cls in (MultiHeadAttention, nnx.MultiHeadAttention))
    jax.tree.map(np.testing.assert_array_equal, nnx.state(ours, nnx.Param), nnx.state(flax, nnx.Param))
    assert nnx.to_pure_dict(nnx.state(ours)).keys() == nnx.to_pure_dict(nnx.state(flax)).keys()
    args = [inputs(dtype=options.get("dtype", jnp.float32))]
    if "in_kv_features" in options:
        args.append(inputs(B, L, 8, seed=1))
    for _ in range(2):  # dropout draws anew at each call
        got = ours(*args, decode=False, deterministic=False, is_causal=True)
        with jax.numpy_dtype_promotion("standard"):  # which jax.nn needs for bfloat16
            want = flax(*args, decode=False, deterministic=False, is_causal=True)
        assert got.dtype == want.dtype
        close(got, want, 2e-2 if got.dtype == jnp.bfloat16 else 2e-5)


def test_a_flax_checkpoint_loads_unchanged_with_its_cache():
    flax = nnx.MultiHeadAttention(4, D, num_kv_heads=2, decode=True, rngs=nnx.Rngs(5))
    flax.init_cache((B, L, D))
    x = inputs()
    for t in range(3):
        flax(x[:, t : t + 1])
    ours = MultiHeadAttention(4, D, num_kv_heads=2, decode=True, rngs=nnx.Rngs(9))
    ours.init_cache((B, L, D))
    nnx.update(ours, nnx.state(flax))
    close(ours(x[:, 3:4]), flax(x[:, 3:4]))
    assert isinstance(ours, nnx.MultiHeadAttention)


def test_the_constructor_is_flax_constructor_plus_keywords():
    import inspect

    theirs = inspect.signature(nnx.MultiHeadAttention.__init__).parameters
    ours = inspect.signature(MultiHeadAttention.__init__).parameters
    assert list(ours)[: len(theirs)] == list(theirs)
    assert all(ours[name].kind == theirs[name].kind for name in theirs)
    assert all(p.kind == p.KEYWORD_ONLY for name, p in ours.items() if name not in theirs)
    call = inspect.signature(nnx.MultiHeadAttention.__call__).parameters
    assert list(inspect.signature(MultiHeadAttention.__call__).parameters)[: len(call)] == list(call)


def test_sowing_weights_changes_no_bit():
    x = inputs(dtype=jnp.bfloat16)
    layer = MultiHeadAttention(4, D, num_kv_heads=2, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    plain = layer(x, is_causal=True)
    sown, found = nnx.capture(layer, nnx.Intermediate)(x, is_causal=True, sow_weights=True)
    np.testing.assert_array_equal(plain, sown)
    weights = found["attention_weights"][0]
    assert weights.shape == (B, 4, L, L)
    close(jnp.sum(weights.astype(jnp.float32), -1), jnp.ones((B, 4, L)), 2e-2)
    assert not np.triu(np.asarray(weights, np.float32), 1).any()


def test_a_mask_works_with_any_number_of_batch_axes():
    layer, x = make("gqa_rope"), inputs(2, 3, L, D)
    mask = jax.random.bernoulli(jax.random.key(4), 0.6, (2, 1, 1, L, L)) | jnp.eye(L, dtype=bool)[None, None, None]
    got = layer(x, mask=mask)
    want = jnp.stack([layer(x[i], mask=mask[i]) for i in range(2)])
    close(got, want)
    close(layer(x[0], mask=jnp.tril(jnp.ones((L, L), bool))), layer(x[0], is_causal=True))
    with pytest.raises(errors.ShapeError, match="do not broadcast"):
        layer(x, mask=jnp.ones((5, 1, 1, L, L), bool))


def test_precision_reaches_the_products():
    layer = MultiHeadAttention(4, D, precision=jax.lax.Precision.HIGHEST, rngs=nnx.Rngs(0))
    jaxpr = str(jax.make_jaxpr(lambda m, x: m(x))(layer, inputs()))
    assert jaxpr.count("HIGHEST") >= 2 * 6


def test_foreign_attention_functions_get_what_they_take():
    seen = {}

    def foreign(query, key, value, **options):
        seen.update(options)
        return query

    layer = MultiHeadAttention(4, D, attention_fn=foreign, window=2, softcap=3.0, rngs=nnx.Rngs(0))
    layer(inputs(), is_causal=True)
    assert seen["softcap"] == 3.0 and "window" not in seen
    np.testing.assert_array_equal(seen["mask"][0, 0], np.tri(L) * (1 - np.tri(L, k=-2)))
    with pytest.raises(errors.ConfigError, match="attention_fn has no argument 'softcap'"):
        MultiHeadAttention(4, D, attention_fn=lambda q, k, v, mask: q, softcap=3.0, rngs=nnx.Rngs(0))
    with pytest.raises(errors.ConfigError, match="attention_fn cannot be combined with cache"):
        layer(inputs(), cache=layer.make_cache(B, 8))


def test_the_attention_function_of_kvattn_is_the_layers_own():
    options = {"num_kv_heads": 2, "softcap": 2.0, "window": 3}
    named, default = (
        MultiHeadAttention(4, D, **options, **more, rngs=nnx.Rngs(0))
        for more in ({"attention_fn": kvattn.dot_product_attention}, {})
    )
    np.testing.assert_array_equal(named(inputs()), default(inputs()))
    got, want = (layer(inputs(), cache=layer.make_cache(B))[0] for layer in (named, default))
    np.testing.assert_array_equal(got, want)


# Positions, windows and the rest mean the same in every way of calling.


@jax.jit
def causal(layer, x):
    return layer(x, is_causal=True)


@jax.jit
def with_cache(layer, x, cache):
    return layer(x, cache=cache)


@nnx.jit
def decode(layer, x):
    return layer(x, decode=True)


@pytest.mark.parametrize("kind", KINDS)
def test_full_decode_and_cache_agree(kind):
    layer, x = make(kind), inputs()
    full = causal(layer, x)
    cuts = ((0, 3), (3, 4), (4, 7))
    cache, outs = layer.make_cache(B, capacity=L), []
    for start, stop in cuts:
        y, cache = with_cache(layer, x[:, start:stop], cache)
        outs.append(y)
    close(jnp.concatenate(outs, axis=1), full)
    np.testing.assert_array_equal(cache.check().lengths, [L] * B)

    layer = nnx.clone(layer)
    layer.init_cache(x.shape)
    close(jnp.concatenate([decode(layer, x[:, a:b]) for a, b in cuts], axis=1), full)


@pytest.mark.parametrize("padding", ["right", "left"])
def test_ragged_rows_are_the_rows_alone(padding):
    layer, x = make("everything"), inputs()
    num_new = jnp.asarray([4, 7], jnp.int32)
    padded = jnp.full_like(x, jnp.nan)
    for row, n in enumerate([4, 7]):
        place = slice(0, n) if padding == "right" else slice(L - n, L)
        padded = padded.at[row, place].set(x[row, :n])
    y, cache = layer(padded, cache=layer.make_cache(B), num_new=num_new, padding=padding)
    for row, n in enumerate([4, 7]):
        place = slice(0, n) if padding == "right" else slice(L - n, L)
        close(y[row, place], layer(x[row : row + 1, :n])[0])
    np.testing.assert_array_equal(cache.lengths, [4, 7])


def test_rope_takes_positions_of_either_shape():
    layer, x = make("gqa_rope"), inputs()
    shifted = layer(x, is_causal=True, input_positions=jnp.arange(L, dtype=jnp.int32) + 100)
    close(shifted, layer(x, is_causal=True), 1e-4)  # only differences matter
    positions = jnp.stack([jnp.arange(L), jnp.arange(L) * 2]).astype(jnp.int32)
    both = layer(x, is_causal=True, input_positions=positions)
    close(both[1], layer(x[1:], is_causal=True, input_positions=positions[1])[0])
    assert np.abs(np.asarray(both[1] - layer(x, is_causal=True)[1])).max() > 1e-3
    with pytest.raises(errors.ShapeError, match="input_positions"):
        layer(x, input_positions=jnp.arange(L + 1))


def test_a_window_beyond_the_length_is_causal_and_a_window_of_one_sees_itself():
    x = inputs()
    options = {"num_heads": 4, "in_features": D}
    causal = MultiHeadAttention(**options, rngs=nnx.Rngs(0))(x, is_causal=True)
    close(SlidingWindowAttention(**options, window=99, rngs=nnx.Rngs(0))(x), causal)
    alone = SlidingWindowAttention(**options, window=1, rngs=nnx.Rngs(0))
    close(alone(x), alone.out(alone.value(x)))


def test_window_layers_keep_a_window_only():
    layer = make("window")
    assert layer.make_cache(B).num_slots == 3
    assert layer.make_cache(B, capacity=9, policy=kvattn.Full()).num_slots == 9
    assert make("mha").make_cache(B, 5, dtype=jnp.bfloat16).dtype == jnp.bfloat16


def test_cross_attention_is_cached_once():
    encoder, x = inputs(B, 5, 12, seed=2), inputs()
    layer = randomised(MultiHeadAttention(4, D, num_kv_heads=2, in_kv_features=12, sinks=True, rngs=nnx.Rngs(0)))
    cache = layer.make_cross_cache(encoder)
    step = jax.jit(lambda m, x, cache: m(x, cache=cache))
    y, cache = step(layer, x, cache)
    close(y, layer(x, encoder))
    y, cache = step(layer, x[:, 3:4], cache)
    close(y, layer(x, encoder)[:, 3:4])
    # Only the query is projected: no product with the encoder's 12 features is left.
    jaxpr = jax.make_jaxpr(lambda m, x, cache: m(x, cache=cache))(layer, x, cache)
    products = [e for e in jaxpr.eqns if e.primitive.name == "dot_general"]
    assert all(12 not in v.aval.shape for e in products for v in e.invars)
    lengths = jnp.asarray([2, 5], jnp.int32)
    y, _ = layer(x, cache=layer.make_cross_cache(encoder.at[0, 2:].set(jnp.nan), lengths))
    close(y[0], layer(x[:1], encoder[:1, :2])[0])
    with pytest.raises(errors.ConfigError, match="static"):
        layer(x, encoder, cache=cache)
    with pytest.raises(errors.ConfigError, match="cannot have rope"):
        make("gqa_rope").make_cross_cache(inputs())


# What Flax 0.12.12 gets wrong, and this does not.


def test_tokens_that_do_not_fit_are_refused_whole():
    x = inputs(B, 6, D)
    flax = nnx.MultiHeadAttention(4, D, decode=True, rngs=nnx.Rngs(0))
    flax.init_cache((B, 4, D))
    for t in range(6):
        theirs = flax(x[:, t : t + 1])
    assert np.isfinite(theirs).all() and flax.cache_index[...] == 6  # Flax overwrote its last slot twice

    layer = MultiHeadAttention(4, D, decode=True, bias_init=nnx.initializers.ones, rngs=nnx.Rngs(0))
    layer.init_cache((B, 4, D))
    layer(x[:, :3])
    kept = np.asarray(layer.cached_key[...])
    with pytest.raises(errors.CapacityError, match="Nothing was written"):
        layer(x[:, 3:5])
    with pytest.raises(errors.CapacityError):
        layer(inputs(B, 5, D))  # longer than the whole cache
    np.testing.assert_array_equal(layer.cached_key[...], kept)
    assert layer.cache_index[...] == 3
    layer.check_cache()
    close(layer(x[:, 3:4]), layer(x[:, :4], decode=False, is_causal=True)[:, 3:])


def test_under_jit_tokens_that_do_not_fit_are_dropped_and_recorded():
    x = inputs(B, 6, D)
    layer = MultiHeadAttention(4, D, decode=True, bias_init=nnx.initializers.ones, rngs=nnx.Rngs(0))
    layer.init_cache((B, 4, D))
    step = nnx.jit(lambda m, x: m(x))
    step(layer, x[:, :3])
    kept = np.asarray(layer.cached_key[...])
    y = step(layer, x[:, 3:5])
    assert not np.asarray(y).any()
    np.testing.assert_array_equal(layer.cached_key[...], kept)
    with pytest.raises(errors.CapacityError, match="4 slots and was offered 5"):
        layer.check_cache()
    # It stays so: a token that would fit is not taken behind the gap.
    assert not np.asarray(step(layer, x[:, 5:6])).any()

    cache = layer.make_cache(B, 4)
    take = jax.jit(lambda m, x, cache: m(x, cache=cache, deterministic=True))
    _, cache = take(layer, x[:, :3], cache)
    y, cache = take(layer, x[:, 3:5], cache)
    with pytest.raises(errors.CapacityError):
        cache.check()
    with pytest.raises(errors.CapacityError):
        layer(x[:, :5], cache=layer.make_cache(B, 4))


@pytest.mark.parametrize("layer_dtype, cache_dtype", [(jnp.bfloat16, jnp.float32), (None, jnp.bfloat16)])
def test_the_cache_has_the_layers_dtype_and_casts_on_write(layer_dtype, cache_dtype):
    layer = MultiHeadAttention(4, D, dtype=layer_dtype, decode=True, rngs=nnx.Rngs(0))
    x = inputs(dtype=layer_dtype or jnp.float32)
    layer.init_cache(x.shape)
    assert layer.cached_key.dtype == (layer_dtype or jnp.float32)
    layer.init_cache(x.shape, dtype=cache_dtype)
    y = layer(x)
    assert layer.cached_key.dtype == cache_dtype and y.dtype == x.dtype
    close(y, layer(x, decode=False, is_causal=True), 3e-2)
    flax = nnx.MultiHeadAttention(4, D, dtype=layer_dtype, decode=True, rngs=nnx.Rngs(0))
    flax.init_cache(x.shape, dtype=cache_dtype)
    with pytest.raises(TypeError):
        flax(x[:, :1])


def test_view_creates_the_cache():
    layer = MultiHeadAttention(4, D, rngs=nnx.Rngs(0))
    view = nnx.view(layer, decode=True, batch_size=B, max_length=L)
    x = inputs()
    close(view(x), layer(x, is_causal=True))
    assert layer.cached_key is None and view.cached_key.shape == (B, L, 4, 4)
    assert nnx.view(view, decode=False).decode is False
    with pytest.raises(TypeError, match="'max_length' must be provided"):
        nnx.view(layer, decode=True, batch_size=B)
    with pytest.raises(ValueError, match="Autoregressive cache not initialized"):
        nnx.view(layer, decode=True)(x)


def test_flax_rope_as_attention_fn_is_right_in_decode():
    fn = functools.partial(nnx.dot_product_attention_with_rope, rope=nnx.RoPE(theta=500.0))
    ours, flax = (cls(4, D, attention_fn=fn, rngs=nnx.Rngs(0)) for cls in (MultiHeadAttention, nnx.MultiHeadAttention))
    x = inputs()
    full = flax(x, is_causal=True, decode=False)
    close(ours(x, is_causal=True), full)
    outs = []
    for layer in (ours, flax):
        layer.init_cache(x.shape)
        outs.append(jnp.concatenate([layer(x[:, t : t + 1], decode=True) for t in range(L)], axis=1))
    close(outs[0], full)
    assert np.abs(np.asarray(outs[1] - full)).max() > 1e-2  # Flax turns the cached keys again at each step
    close(ours(x, is_causal=True, input_positions=jnp.arange(L) + 3), full, 1e-4)
    y, _ = ours(x, cache=ours.make_cache(B, L))
    close(y, full)


def test_an_encoder_in_decode_is_attended_whole_and_not_appended():
    layer, x, encoder = make("mha"), inputs(), inputs(B, 5, D, seed=2)
    layer = nnx.clone(layer)
    layer.init_cache(x.shape)
    close(layer(x[:, :1], encoder, decode=True), layer(x[:, :1], encoder))
    assert layer.cache_index[...] == 0
    with pytest.raises(errors.ConfigError, match="may be new tokens or those of an encoder"):
        layer(x, x + 1, decode=True)
    layer(x[:, :1], x[:, 1:2], decode=True)  # one token with its own key, as in Flax
    assert layer.cache_index[...] == 1


def test_masks_of_lower_rank_and_more_batch_axes_work_in_decode():
    layer, x = nnx.clone(make("mha")), inputs(2, 3, L, D)
    layer.init_cache(x.shape)
    hidden = jnp.arange(L) != 1
    y = jnp.concatenate([layer(x[..., t : t + 1, :], decode=True, mask=hidden) for t in range(L)], axis=-2)
    want = layer(x, mask=jnp.tril(jnp.ones((L, L), bool)) & hidden[None])
    close(y[..., 2:, :], want[..., 2:, :])
    with pytest.raises(errors.ShapeError, match="in decode a mask covers"):
        layer.init_cache(x.shape)
        layer(x[..., :1, :], decode=True, mask=jnp.ones((1, 1, 1, 1, 3), bool))


# Meshes.


def mesh_of(axis_type):
    return jax.make_mesh((2, 4), ("data", "model"), axis_types=(axis_type,) * 2)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize("num_kv_heads", [4, 1])
def test_layers_run_split_over_a_mesh(axis_type, num_kv_heads):
    options = {"num_heads": 4, "in_features": D, "num_kv_heads": num_kv_heads, "rope": kvattn.RoPE(4)}
    want = MultiHeadAttention(**options, rngs=nnx.Rngs(0))(inputs(), is_causal=True)
    heads = {"out_sharding": P(None, "model", None)}
    with jax.set_mesh(mesh_of(axis_type)):
        layer = MultiHeadAttention(
            **options,
            rngs=nnx.Rngs(0),
            kernel_metadata=heads,
            bias_metadata={"out_sharding": P("model", None)},
            out_kernel_metadata={"out_sharding": P("model", None, None)},
            out_bias_metadata={"out_sharding": P(None)},
            kv_metadata=None if num_kv_heads == 4 else {"out_sharding": P(None, None, None)},
            kv_bias_metadata=None if num_kv_heads == 4 else {"out_sharding": P(None, None)},
            cache_sharding=P("data", None, "model" if num_kv_heads == 4 else None, None),
        )
        x = jax.device_put(inputs(), jax.NamedSharding(mesh_of(axis_type), P("data", None, None)))
        close(jax.jit(lambda m, x: m(x, is_causal=True))(layer, x), want)
        layer.init_cache(x.shape)
        split = layer.cached_key[...].sharding
        assert split.shard_shape((B, L, num_kv_heads, 4)) == (B // 2, L, 1, 4)
        assert layer.cached_key.get_metadata("out_sharding") == layer.cache_sharding
        step = nnx.jit(lambda m, x: m(x, decode=True))
        outs = [step(layer, x[:, :3]), *(step(layer, x[:, t : t + 1]) for t in range(3, L))]
        close(jnp.concatenate([np.asarray(y) for y in outs], axis=1), want)
        assert layer.cached_key[...].sharding.is_equivalent_to(split, 4)
        cache = layer.make_cache(B, L)
        step = jax.jit(lambda m, x, cache: m(x, cache=cache))
        a, cache = step(layer, x[:, :3], cache)
        b, cache = step(layer, x[:, 3:4], cache)
        close(np.concatenate([np.asarray(a), np.asarray(b)], axis=1), want[:, :4])


def test_the_cache_follows_the_key_kernel_unless_told():
    with jax.set_mesh(mesh_of(AxisType.Explicit)):
        heads = {"out_sharding": P(None, "model", None)}
        layer = MultiHeadAttention(4, D, use_bias=False, kernel_metadata=heads,
                                   out_kernel_metadata={"out_sharding": P("model")}, rngs=nnx.Rngs(0))  # fmt: skip
        layer.init_cache((B, L, D))
        assert jax.typeof(layer.cached_key[...]).sharding.spec == P(None, None, "model", None)
        flax = nnx.MultiHeadAttention(4, D, use_bias=False, kernel_metadata=heads, decode=True,
                                      out_kernel_metadata={"out_sharding": P("model")}, rngs=nnx.Rngs(0))  # fmt: skip
        flax.init_cache((B, L, D))
        with pytest.raises(Exception, match="sharding"):
            flax(inputs()[:, :1], out_sharding=P())
        layer(inputs()[:, :1], decode=True)
    with pytest.raises(errors.ShardingError, match="names the axes of no mesh"):
        MultiHeadAttention(4, D, cache_sharding=P("model"), rngs=nnx.Rngs(0)).init_cache((B, L, D))


# As pytrees and functions.


def test_layers_are_pytrees_under_every_transformation():
    layer, x = make("everything"), inputs()
    want = layer(x)
    close(jax.jit(lambda m, x: m(x))(layer, x), want)
    close(nnx.jit(lambda m, x: m(x))(layer, x), want)
    graphdef, state = nnx.split(layer)
    close(nnx.merge(graphdef, state)(x), want)
    hash(graphdef)
    assert jax.eval_shape(lambda m, x: m(x), layer, x).shape == x.shape
    assert jax.eval_shape(lambda: MultiHeadAttention(**KINDS["everything"][1] | {"num_heads": 4, "in_features": D},
                                                     rngs=nnx.Rngs(0))).out.kernel.shape == (4, 8, D)  # fmt: skip
    stacked = jax.tree.map(lambda *a: jnp.stack(a), layer, randomised(nnx.clone(layer), seed=7))
    both = jax.vmap(lambda m, x: m(x), in_axes=(0, None))(stacked, x)
    close(both[0], want)
    loss, grads = nnx.value_and_grad(lambda m: jnp.mean(m(x) ** 2))(layer)
    assert np.isfinite(loss) and all(np.abs(g).max() > 0 for name, g in nnx.to_flat_state(grads) if "bias" not in name)


def test_stateless_hands_over_flat_arrays_and_traces_once():
    layers = nnx.List([make("gqa_rope"), make("everything")])

    class Model(nnx.Module):
        def __init__(self):
            self.layers = layers

        def __call__(self, x, caches):
            new = []
            for layer, cache in zip(self.layers, caches, strict=True):
                y, cache = layer(x, cache=cache)
                x, new = x + y, [*new, cache]
            return x, new

    model, x = Model(), inputs()
    apply, weights = stateless(model)
    assert isinstance(weights, list) and all(isinstance(w, jax.Array) for w in weights)
    assert len(weights) == len(jax.tree.leaves(nnx.state(model)))
    traces = []

    @functools.partial(jax.jit, donate_argnums=2)
    def step(weights, x, caches):
        traces.append(1)
        return apply(weights, x, caches)

    caches = [layer.make_cache(B, L) for layer in layers]
    boundary = len(jax.tree.leaves((weights, x, caches)))
    assert boundary == len(weights) + 1 + len(jax.tree.leaves(caches))
    outs = []
    for t in range(L):
        y, caches = step(weights, x[:, t : t + 1], caches)
        outs.append(y)
    assert len(traces) == 1
    close(jnp.concatenate(outs, 1), model(x, [layer.make_cache(B, L) for layer in layers])[0])


def test_stateless_refuses_to_lose_an_update():
    layer = MultiHeadAttention(4, D, decode=True, rngs=nnx.Rngs(0))
    layer.init_cache((B, L, D))
    apply, weights = stateless(layer)
    with pytest.raises(errors.ConfigError, match="would lose"):
        jax.jit(apply)(weights, inputs()[:, :1])
    dropping = MultiHeadAttention(4, D, dropout_rate=0.5, deterministic=False, rngs=nnx.Rngs(0))
    apply, weights = stateless(dropping)
    with pytest.raises(errors.ConfigError, match="would lose"):
        apply(weights, inputs())
    close(apply(weights, inputs(), deterministic=True), dropping(inputs(), deterministic=True))


def test_clipped_projections_and_a_bias_of_the_output_alone():
    """The same as a layer with wide open projections whose results were clipped by hand."""
    options = {"num_kv_heads": 2, "head_dim": 4, "rngs": nnx.Rngs(0)}
    layer = randomised(MultiHeadAttention(4, D, **options, use_bias=False, use_out_bias=True, qkv_clip=0.4))
    assert layer.query.bias is layer.value.bias is None and layer.out.bias[...].shape == (D,)
    assert MultiHeadAttention(4, D, **options, use_out_bias=False).out.bias is None
    x = inputs()
    raw = [np.asarray(getattr(layer, name)(x)) for name in ("query", "key", "value")]
    assert all((np.abs(y) > 0.4).any() for y in raw)
    q, k, v = (jnp.asarray(np.clip(y, -0.4, 0.4)) for y in raw)
    want = layer.out(kvattn.dot_product_attention(q, k, v, is_causal=True))
    close(layer(x, is_causal=True), want)
    close(layer(x, cache=layer.make_cache(B, L))[0], want)


def test_grouped_heads_are_repeated_heads():
    gqa = make("gqa_rope")
    mha = MultiHeadAttention(4, D, rope=kvattn.RoPE(4), rngs=nnx.Rngs(0))
    state = nnx.state(gqa, nnx.Param)
    for name in ("key", "value"):
        state[name]["kernel"] = jax.tree.map(lambda a: jnp.repeat(a, 2, axis=1), state[name]["kernel"])
        state[name]["bias"] = jax.tree.map(lambda a: jnp.repeat(a, 2, axis=0), state[name]["bias"])
    nnx.update(mha, state)
    close(gqa(inputs(), is_causal=True), mha(inputs(), is_causal=True))


def test_dropout_of_grouped_heads_keeps_the_mean():
    layer = MultiHeadAttention(4, D, num_kv_heads=2, dropout_rate=0.5, broadcast_dropout=False, rngs=nnx.Rngs(0))
    x = jnp.broadcast_to(inputs(1, 1, D), (1, 64, D))
    y = layer(jnp.repeat(x, 64, 0), deterministic=False)
    close(jnp.mean(y, axis=(0, 1)), layer(x, deterministic=True)[0, 0], 0.1)


# Settings that cannot work.


@pytest.mark.wrong_types
@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"num_kv_heads": 3}, errors.ConfigError, r"num_heads \(4\) must be divisible by num_kv_heads \(3\)"),
        ({"num_kv_heads": 0}, errors.ConfigError, "num_kv_heads must be >= 1"),
        ({"qkv_features": 18}, errors.ConfigError, r"Memory dimension \(18\) must be divisible"),
        ({"head_dim": 0}, errors.ConfigError, "head_dim must be >= 1"),
        ({"head_dim": 3.5}, errors.DTypeError, "head_dim must be an int"),
        ({"head_dim": 4, "qkv_features": 12}, errors.ConfigError, r"num_heads \* head_dim"),
        ({"window": 0}, errors.RangeError, "window must be >= 1"),
        ({"window": True}, errors.DTypeError, "window must be an int"),
        ({"softcap": 0.0}, errors.RangeError, "softcap"),
        ({"qkv_clip": 0.0}, errors.RangeError, "qkv_clip must be finite and > 0"),
        ({"qkv_clip": "8"}, errors.DTypeError, "qkv_clip must be a number"),
        ({"scale": float("nan")}, errors.RangeError, "scale must be finite"),
        ({"dropout_rate": 1.0}, errors.RangeError, r"dropout_rate must be in the range \[0, 1\)"),
        ({"qk_norm": "batch"}, errors.ConfigError, "'layer', 'rms'"),
        ({"qk_norm": "rms", "normalize_qk": True}, errors.ConfigError, "normalize_qk"),
        ({"alibi": [1.0, 2.0]}, errors.ShapeError, "one slope per query head"),
        ({"rope": kvattn.RoPE(8)}, errors.ConfigError, "head_dim 8, but the heads of this layer have 4"),
        ({"rope": 10000.0}, errors.DTypeError, "kvattn.RoPE"),
    ],
)
def test_settings_that_cannot_work(options, error, message):
    with pytest.raises(error, match=message):
        MultiHeadAttention(4, D, rngs=nnx.Rngs(0), **options)


@pytest.mark.wrong_types
def test_calls_that_cannot_work():
    layer, x = make("mha"), inputs()
    cache = layer.make_cache(B, L)
    for call, error, message in (
        (lambda: layer(x, None, x), errors.ConfigError, "`inputs_k` cannot be None"),
        (
            lambda: layer(inputs(B, L, 5)),
            errors.ShapeError,
            "Incompatible input dimension, got 5 but module expects 16",
        ),
        (lambda: layer(x, inputs(3, L, D)), errors.ShapeError, "batch dims must match"),
        (lambda: layer("tokens"), errors.DTypeError, "inputs_q must be an array"),
        (lambda: layer(jax.random.key(0)), errors.DTypeError, "inputs_q must be an array"),
        (lambda: layer(x, cache=cache, mask=jnp.ones((L, L), bool)), errors.ConfigError, "mask cannot be combined"),
        (lambda: layer(x, cache=cache, decode=True), errors.ConfigError, "decode cannot be combined"),
        (lambda: layer(x[None], cache=cache), errors.ShapeError, r"must be \[B, T, D\]"),
        (lambda: layer(x[:1], cache=cache), errors.ShapeError, "rows"),
        (lambda: layer(x, num_new=jnp.asarray([1, 2])), errors.ConfigError, "belong to cache="),
        (lambda: layer.make_cache(B), errors.ConfigError, "capacity"),
        (lambda: GroupedQueryAttention(4, D, rngs=nnx.Rngs(0)), errors.ConfigError, "needs num_kv_heads"),
        (lambda: MultiQueryAttention(4, D, num_kv_heads=2, rngs=nnx.Rngs(0)), errors.ConfigError, "one key/value head"),
    ):
        with pytest.raises(error, match=message):
            call()
    with pytest.raises(TypeError, match="window"):
        SlidingWindowAttention(4, D, rngs=nnx.Rngs(0))
    dropping = MultiHeadAttention(4, D, dropout_rate=0.5, keep_rngs=False, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="No `deterministic` argument"):
        dropping(x)
    with pytest.raises(ValueError, match="'rngs' must be provided"):
        dropping(x, deterministic=False)
    with pytest.raises(errors.ConfigError, match="dropout cannot be combined with cache"):
        dropping(x, cache=dropping.make_cache(B, L), deterministic=False)


def test_numpy_and_empty_inputs():
    layer = make("mha")
    x = np.asarray(inputs())[:, ::2]
    x.flags.writeable = False
    close(layer(x), layer(jnp.asarray(x)))
    assert layer(jnp.ones((0, L, D))).shape == (0, L, D)
    assert layer(jnp.ones((B, 0, D))).shape == (B, 0, D)
    y, cache = layer(jnp.ones((B, 0, D)), cache=layer.make_cache(B, L))
    assert y.shape == (B, 0, D) and not np.asarray(cache.lengths).any()


def test_positions_mean_the_same_in_flax_cache():
    """RoPE, ALiBi and a window, three tokens at a time: as over the full sequence."""
    options = {"rope": kvattn.RoPE(4), "alibi": True, "window": 4, "num_kv_heads": 2}
    layer, x = randomised(GroupedQueryAttention(4, D, **options, rngs=nnx.Rngs(0))), inputs(B, 6, D)
    full = causal(layer, x)
    assert (
        np.abs(full - causal(randomised(GroupedQueryAttention(4, D, num_kv_heads=2, rngs=nnx.Rngs(0))), x)).max() > 0.1
    )
    layer.init_cache(x.shape)
    close(jnp.concatenate([decode(layer, x[:, t : t + 3]) for t in (0, 3)], axis=1), full)
