"""The Linen layers: Flax's parameters and numbers, the same additions as the NNX layers, defined edges."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import kvattn
import kvattn.layers
from kvattn import errors
from kvattn.layers.linen import (
    GroupedQueryAttention,
    MultiHeadAttention,
    MultiHeadDotProductAttention,
    MultiQueryAttention,
    SelfAttention,
    SlidingWindowAttention,
)

B, L, D = 2, 7, 16


def inputs(*shape, seed=0, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape or (B, L, D), dtype)


def close(got, want, tolerance=2e-5):
    np.testing.assert_allclose(
        np.asarray(got, np.float64), np.asarray(want, np.float64), rtol=tolerance, atol=tolerance
    )


def parameters(layer, x, seed=0):
    """Parameters of `layer`, all of them random, and no cache."""
    params = layer.clone(decode=False).init(jax.random.key(seed), x)["params"]
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    new = [a + jax.random.normal(k, a.shape, a.dtype) * 0.3 for a, k in zip(leaves, keys, strict=True)]
    return {"params": jax.tree.unflatten(tree, new)}


KINDS = {
    "mha": (MultiHeadDotProductAttention, {}),
    "gqa_rope_norm": (GroupedQueryAttention, {"num_kv_heads": 2, "rope": kvattn.RoPE(4), "normalize_qk": True}),
    "window_value_dim": (SlidingWindowAttention, {"window": 3, "value_head_dim": 6}),
    "everything": (
        MultiQueryAttention,
        {"head_dim": 8, "alibi": True, "window": 4, "softcap": 2.0, "sinks": True, "qk_norm": "rms", "scale": 0.7},
    ),
    "clipped": (GroupedQueryAttention, {"num_kv_heads": 2, "qkv_clip": 0.2, "use_out_bias": False}),
}


# As Flax.


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"qkv_features": 8, "out_features": 6, "normalize_qk": True, "use_bias": False},
        {"dtype": jnp.bfloat16, "dropout_rate": 0.3, "force_fp32_for_softmax": True},
    ],
)
def test_equal_seeds_give_flax_parameters_and_outputs(options):
    ours, flax = (module(4, **options) for module in (MultiHeadDotProductAttention, nn.MultiHeadDotProductAttention))
    x, encoder, rngs = inputs(), inputs(B, 5, 12, seed=1), {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    outs = []
    with jax.numpy_dtype_promotion("standard"):
        for layer in (ours, flax):
            out, variables = layer.init_with_output(rngs, x, encoder, deterministic=False)
            outs.append((out, variables))
    jax.tree.map(np.testing.assert_array_equal, outs[0][1], outs[1][1])
    close(outs[0][0], outs[1][0], 3e-2 if options.get("dtype") else 2e-5)


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
@pytest.mark.parametrize("forced", [False, True])
def test_a_forced_float32_softmax_gives_what_flax_gives(dtype, forced):
    """Its dtype too, with a cache and without."""
    options = {"dtype": dtype, "param_dtype": jnp.bfloat16, "force_fp32_for_softmax": forced}
    ours, flax = (module(4, **options) for module in (MultiHeadDotProductAttention, nn.MultiHeadDotProductAttention))
    x = inputs().astype(jnp.bfloat16)
    with jax.numpy_dtype_promotion("standard"):
        want, variables = flax.init_with_output(jax.random.key(0), x)
        got = ours.apply(variables, x)
        cached, _ = ours.apply(
            variables, x, cache=ours.make_cache(B, x.shape[1], dtype=x.dtype, in_features=x.shape[-1])
        )
    assert got.dtype == cached.dtype == want.dtype == (jnp.float32 if forced and dtype is None else jnp.bfloat16)
    close(got.astype(jnp.float32), want.astype(jnp.float32), 3e-2)


def test_a_flax_checkpoint_goes_on_with_its_cache():
    ours, flax = (module(4, decode=True) for module in (MultiHeadDotProductAttention, nn.MultiHeadDotProductAttention))
    x = inputs()
    variables = flax.init(jax.random.key(0), x)
    for t in range(3):
        _, cache = flax.apply(variables, x[:, t : t + 1], mutable=["cache"])
        variables |= cache
    want, theirs = flax.apply(variables, x[:, 3:4], mutable=["cache"])
    got, mine = ours.apply(variables, x[:, 3:4], mutable=["cache"])
    close(got, want)
    jax.tree.map(close, mine, theirs)
    assert isinstance(ours, nn.MultiHeadDotProductAttention)


def test_names_and_fields_are_flax():
    import dataclasses

    theirs = [f.name for f in dataclasses.fields(nn.MultiHeadDotProductAttention) if f.name not in ("parent", "name")]
    ours = [f.name for f in dataclasses.fields(MultiHeadDotProductAttention)]
    assert ours[: len(theirs)] == theirs

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            with pytest.warns(DeprecationWarning, match="SelfAttention"):
                x = SelfAttention(4, num_kv_heads=2)(x, None, True)
            return MultiHeadAttention(4)(MultiHeadDotProductAttention(4)(x))

    params = Model().init(jax.random.key(0), inputs())["params"]
    assert set(params) == {"SelfAttention_0", "MultiHeadAttention_0", "MultiHeadDotProductAttention_0"}
    assert params["SelfAttention_0"]["key"]["kernel"].shape == (D, 2, 4)


def test_sowing_weights_changes_no_bit():
    layer, x = MultiHeadDotProductAttention(4, dtype=jnp.bfloat16, num_kv_heads=2), inputs()
    variables = parameters(layer, x)
    plain = layer.apply(variables, x, is_causal=True)
    sown, found = layer.apply(variables, x, is_causal=True, sow_weights=True, mutable=["intermediates"])
    np.testing.assert_array_equal(plain, sown)
    weights = found["intermediates"]["attention_weights"][0]
    assert weights.shape == (B, 4, L, L) and weights.dtype == jnp.bfloat16


def test_einsum_overrides_are_used():
    calls = []

    def einsum(*args):
        calls.append(args[0])
        return jnp.einsum(*args)

    options = {"qk_attn_weights_einsum_cls": lambda: einsum, "attn_weights_value_einsum_cls": lambda: einsum}
    layer, x = MultiHeadDotProductAttention(4, num_kv_heads=2, **options), inputs()
    variables = parameters(layer, x)
    calls.clear()
    close(layer.apply(variables, x), MultiHeadDotProductAttention(4, num_kv_heads=2).apply(variables, x))
    assert calls == ["...qhd,...khd->...hqk", "...hqk,...khd->...qhd"]
    for wrong in ({"precision": jax.lax.Precision.HIGH}, {"attn_weights_value_einsum_cls": None}):
        with pytest.raises(ValueError, match=r"exclusive|together"):
            layer.clone(**wrong).apply(variables, x)


def test_foreign_attention_functions_get_what_they_take():
    def with_mask(query, key, value, mask):
        return jnp.where(mask[..., :1, 0, 0][..., None, None], query, 0)

    def with_any(query, key, value, **options):
        assert {"mask", "dropout_rate", "deterministic", "softcap"} <= set(options)
        return query

    x = inputs()
    MultiHeadDotProductAttention(4, attention_fn=with_mask, window=2).init(jax.random.key(0), x)
    MultiHeadDotProductAttention(4, attention_fn=with_any, softcap=2.0).init(jax.random.key(0), x)
    with pytest.raises(errors.ConfigError, match="no argument 'softcap'"):
        MultiHeadDotProductAttention(4, attention_fn=with_mask, softcap=2.0).init(jax.random.key(0), x, is_causal=True)


def test_the_attention_function_of_kvattn_is_the_layers_own():
    default = MultiHeadDotProductAttention(4, softcap=2.0)
    named = default.clone(attention_fn=kvattn.dot_product_attention)
    variables = parameters(default, inputs())
    np.testing.assert_array_equal(named.apply(variables, inputs()), default.apply(variables, inputs()))
    got, want = (
        layer.apply(variables, inputs(), cache=layer.make_cache(B, L, in_features=D))[0] for layer in (named, default)
    )
    np.testing.assert_array_equal(got, want)


# One meaning, however called.


@pytest.mark.parametrize("kind", KINDS)
def test_full_decode_cache_and_nnx_agree(kind):
    cls, options = KINDS[kind]
    layer, x = cls(num_heads=4, **options), inputs()
    variables = parameters(layer, x)
    full = jax.jit(lambda v, x: layer.apply(v, x, is_causal=True))(variables, x)
    cuts = ((0, 3), (3, 4), (4, 7))

    step = jax.jit(lambda v, x, cache: layer.apply(v, x, cache=cache))
    cache, outs = layer.make_cache(B, capacity=L, in_features=D), []
    for start, stop in cuts:
        y, cache = step(variables, x[:, start:stop], cache)
        outs.append(y)
    close(jnp.concatenate(outs, axis=1), full)
    np.testing.assert_array_equal(cache.lengths, [L] * B)

    decoding = layer.clone(decode=True)
    state = {"cache": decoding.init(jax.random.key(0), x)["cache"]}
    assert state["cache"]["cache_index"] == 0
    step = jax.jit(lambda v, x: decoding.apply(v, x, mutable=["cache"]))
    outs = []
    for start, stop in cuts:
        y, state = step(variables | state, x[:, start:stop])
        outs.append(y)
    close(jnp.concatenate(outs, axis=1), full)

    twin = getattr(
        kvattn.layers, {"MultiHeadDotProductAttention": "MultiHeadAttention"}.get(cls.__name__, cls.__name__)
    )
    twin = twin(4, D, rngs=nnx.Rngs(0), **options)
    nnx.update(twin, jax.tree.map(lambda a: a, variables["params"]))
    close(twin(x, is_causal=True), full)


def test_cross_attention_is_cached_once():
    layer, x, encoder = MultiHeadDotProductAttention(4, num_kv_heads=2), inputs(), inputs(B, 5, 12, seed=1)
    variables = layer.init(jax.random.key(0), x, encoder)
    cache = layer.apply(variables, encoder, method="make_cross_cache")
    y, cache = layer.apply(variables, x[:, :2], cache=cache)
    close(y, layer.apply(variables, x[:, :2], encoder))
    with pytest.raises(errors.ConfigError, match="static"):
        layer.apply(variables, x, encoder, cache=cache)
    with pytest.raises(errors.ConfigError, match="cannot have window"):
        layer.clone(window=2).apply(variables, encoder, method="make_cross_cache")


# What Flax 0.12.12 gets wrong, and this does not.


def test_tokens_that_do_not_fit_are_refused():
    layer, x = MultiHeadDotProductAttention(4, decode=True, bias_init=nn.initializers.ones), inputs()
    variables = layer.init(jax.random.key(0), x[:, :4])
    _, state = layer.apply(variables, x[:, :3], mutable=["cache"])
    full = variables | state
    with pytest.raises(errors.CapacityError, match="4 slots and was offered 3 tokens: 2 more do not fit"):
        layer.apply(full, x[:, 3:5], mutable=["cache"])
    y, after = jax.jit(lambda v, x: layer.apply(v, x, mutable=["cache"]))(full, x[:, 3:5])
    assert not np.asarray(y).any() and after["cache"]["cache_index"] == 5
    np.testing.assert_array_equal(after["cache"]["cached_key"], state["cache"]["cached_key"])
    with pytest.raises(errors.CapacityError):
        layer.apply(variables | after, x[:, 5:6], mutable=["cache"])


def test_an_encoder_in_decode_is_attended_whole_and_not_appended():
    x, encoder = inputs(), inputs(B, 5, D, seed=1)
    flax, ours = (module(4, decode=True) for module in (nn.MultiHeadDotProductAttention, MultiHeadDotProductAttention))
    variables = ours.init(jax.random.key(0), x, encoder)
    want = ours.clone(decode=False).apply(variables, x[:, :1], encoder)
    got, state = ours.apply(variables, x[:, :1], encoder, mutable=["cache"])
    close(got, want)
    assert state["cache"]["cache_index"] == 0
    theirs, state = flax.apply(variables, x[:, :1], encoder, mutable=["cache"])
    assert state["cache"]["cache_index"] == 1 and np.abs(np.asarray(theirs - want)).max() > 1e-2


def test_grouped_heads_exist_in_linen():
    with pytest.raises(TypeError, match="num_kv_heads"):
        nn.MultiHeadDotProductAttention(4, num_kv_heads=2)
    params = GroupedQueryAttention(4, num_kv_heads=2).init(jax.random.key(0), inputs())["params"]
    assert params["key"]["kernel"].shape == (D, 2, 4)


# Meshes.


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_layers_run_split_over_a_mesh(axis_type):
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(axis_type,) * 2)
    layer, x = MultiHeadDotProductAttention(4, num_kv_heads=1, rope=kvattn.RoPE(4)), inputs()
    variables = parameters(layer, x)
    want = layer.apply(variables, x, is_causal=True)
    specs = jax.tree.map(lambda _: P(), variables)
    specs["params"]["query"] = {"kernel": P(None, "model"), "bias": P("model")}
    specs["params"]["out"]["kernel"] = P("model")
    with jax.set_mesh(mesh):
        variables = jax.tree.map(lambda a, s: jax.device_put(a, jax.NamedSharding(mesh, s)), variables, specs)
        x = jax.device_put(x, jax.NamedSharding(mesh, P("data")))
        close(jax.jit(lambda v, x: layer.apply(v, x, is_causal=True))(variables, x), want)
        step = jax.jit(lambda v, x, cache: layer.apply(v, x, cache=cache))
        y, _ = step(variables, x[:, :4], layer.make_cache(B, L, in_features=D))
        close(y, want[:, :4])
        decoding = layer.clone(decode=True)
        state = {"cache": jax.jit(decoding.init)(jax.random.key(0), x)["cache"]}
        step = jax.jit(lambda v, x: decoding.apply(v, x, mutable=["cache"]))
        y, state = step(variables | state, x[:, :4])
        close(y, want[:, :4])


def test_the_cache_declares_how_it_is_split():
    names = ("data", None, "model", None)
    layer = MultiHeadDotProductAttention(
        4,
        decode=True,
        num_kv_heads=2,
        cache_sharding=names,
        kernel_init=nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model", None)),
        kv_kernel_init=nn.with_partitioning(nn.initializers.lecun_normal(), (None, None, None)),
    )
    variables = layer.init(jax.random.key(0), inputs())
    specs = nn.get_partition_spec(variables)
    assert specs["cache"]["cached_key"] == P(*names) and specs["params"]["key"]["kernel"] == P(None, None, None)
    y, state = layer.apply(variables, inputs()[:, :2], mutable=["cache"])
    assert nn.get_partition_spec(state)["cache"]["cached_value"] == P(*names)
    close(y, layer.clone(decode=False).apply(variables, inputs()[:, :2], is_causal=True))


# Settings and calls that cannot work.


@pytest.mark.wrong_types
@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda: MultiHeadAttention(4, num_kv_heads=3), errors.ConfigError, "must be divisible by num_kv_heads"),
        (lambda: MultiHeadAttention(4, window=0), errors.RangeError, "window must be >= 1"),
        (lambda: MultiHeadAttention(4, softcap=-1.0), errors.RangeError, "softcap"),
        (lambda: MultiHeadAttention(4, dropout_rate=1.5), errors.RangeError, "dropout_rate"),
        (lambda: MultiHeadAttention(4, head_dim=4, qkv_features=8), errors.ConfigError, "head_dim"),
        (lambda: GroupedQueryAttention(4), errors.ConfigError, "needs num_kv_heads"),
        (lambda: MultiQueryAttention(4, num_kv_heads=2), errors.ConfigError, "one key/value head"),
        (lambda: SlidingWindowAttention(4), errors.ConfigError, "needs a window"),
        (lambda: MultiHeadAttention(4).make_cache(B, 8), errors.ConfigError, "pass in_features"),
        (lambda: MultiHeadAttention(3).init(jax.random.key(0), inputs()), errors.ConfigError, "Memory dimension"),
        (lambda: MultiHeadAttention(4).init(jax.random.key(0), inputs(), inputs(3, L, D)), errors.ShapeError, "batch"),
        (
            lambda: MultiHeadAttention(4).init(jax.random.key(0), inputs(), num_new=jnp.ones(B, int)),
            errors.ConfigError,
            "belong to cache=",
        ),
    ],
)
def test_what_cannot_work(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_positions_mean_the_same_in_flax_cache():
    """RoPE, ALiBi and a window, three tokens at a time: as over the full sequence."""
    options = {"rope": kvattn.RoPE(4), "alibi": True, "window": 4, "num_kv_heads": 2}
    layer, x = GroupedQueryAttention(4, **options), inputs(B, 6, D)
    variables = parameters(layer, x)
    full = jax.jit(lambda v, x: layer.apply(v, x, is_causal=True))(variables, x)
    decoding = layer.clone(decode=True)
    state = {"cache": decoding.init(jax.random.key(0), x)["cache"]}
    step = jax.jit(lambda v, x: decoding.apply(v, x, mutable=["cache"]))
    outs = []
    for t in (0, 3):
        y, state = step(variables | state, x[:, t : t + 3])
        outs.append(y)
    close(jnp.concatenate(outs, axis=1), full)
