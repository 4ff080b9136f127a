"""Every argument of every layer, config, policy and codec: what it must not be, and the error that names it.

The tables are complete: an argument without a row fails.
"""

import dataclasses
import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import PartitionSpec

import kvattn
from kvattn import codecs, errors, layers, policies
from kvattn.layers import linen
from kvattn.models import DecoderConfig

SIZE = [(v, errors.DTypeError) for v in ("16", 3.5, True, [16], np.float32(4), {})] + [
    (v, errors.ConfigError) for v in (0, -3, np.int64(0))
]
LAYER_SIZE = [*SIZE, (10**30, errors.RangeError)]
NEEDED_SIZE = [*SIZE, (None, errors.DTypeError)]
FLAG = [(v, errors.DTypeError) for v in ("no", 2, 0.5, [True], np.array([True]))]
NEEDED_FLAG = [*FLAG, (None, errors.DTypeError)]
FUNCTION = [(v, errors.DTypeError) for v in ("zeros", 0, {}, np.zeros(3))]
NEEDED_FUNCTION = [*FUNCTION, (None, errors.DTypeError)]
DTYPE = [(v, errors.DTypeError) for v in ("float33", jnp.int32, bool, 32, np.zeros(3), np.float32(1), jnp.ones(()), "")]
METADATA = [(v, errors.DTypeError) for v in ("x", 3, PartitionSpec("x"), [("out_sharding", None)])]
NEEDED_METADATA = [*METADATA, (None, errors.DTypeError)]
NUMBER = [(v, errors.DTypeError) for v in ("0.1", 1j, {}, jnp.float32)]
POSITIVE = [*NUMBER, *((v, errors.RangeError) for v in (0.0, -1, np.nan, np.inf, 10**400))]
WINDOW = [(v, errors.DTypeError) for v in ("4", 4.0, True)] + [(v, errors.RangeError) for v in (0, -1)]
CHOICE = [(v, errors.ConfigError) for v in ("nonsense", 3, ["layer"], np.array(["layer", "rms"]))]

ARGUMENTS = {
    "num_heads": NEEDED_SIZE,
    "in_features": [*LAYER_SIZE, (None, errors.DTypeError)],
    "qkv_features": LAYER_SIZE,
    "out_features": [*(row for row in SIZE if row[0] != [16]), ((4, 0), errors.ConfigError), ((), errors.ConfigError)],
    **dict.fromkeys(("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), NEEDED_SIZE),
    "q_lora_rank": LAYER_SIZE,
    "num_kv_heads": SIZE,
    "in_kv_features": LAYER_SIZE,
    "head_dim": LAYER_SIZE,
    "value_head_dim": LAYER_SIZE,
    "dtype": [*DTYPE, (jnp.float8_e4m3fn, errors.DTypeError)],
    "param_dtype": DTYPE,
    "broadcast_dropout": NEEDED_FLAG,
    "dropout_rate": [*NUMBER, (None, errors.DTypeError), *((v, errors.RangeError) for v in (-0.1, 1, 1.5, np.nan))],
    "deterministic": FLAG,
    "precision": [(v, errors.ConfigError) for v in ("HIGHEST!", 3, ("highest", "x"), {})],
    "kernel_init": NEEDED_FUNCTION,
    "out_kernel_init": FUNCTION,
    "bias_init": NEEDED_FUNCTION,
    "out_bias_init": FUNCTION,
    "kv_kernel_init": FUNCTION,
    "up_kernel_init": FUNCTION,
    "kv_bias_init": FUNCTION,
    "use_bias": NEEDED_FLAG,
    "use_out_bias": FLAG,
    "attention_fn": NEEDED_FUNCTION,
    "decode": FLAG,
    "normalize_qk": NEEDED_FLAG,
    "force_fp32_for_softmax": NEEDED_FLAG,
    "qkv_promote_dtype": NEEDED_FUNCTION,
    "out_promote_dtype": NEEDED_FUNCTION,
    "ln_promote_dtype": NEEDED_FUNCTION,
    "qkv_dot_general": FUNCTION,
    "out_dot_general": FUNCTION,
    "qkv_dot_general_cls": FUNCTION,
    "out_dot_general_cls": FUNCTION,
    "qk_attn_weights_einsum_cls": FUNCTION,
    "attn_weights_value_einsum_cls": FUNCTION,
    "rngs": [(v, errors.DTypeError) for v in (0, None, "0", nnx.Rngs(dropout=0))],
    "keep_rngs": NEEDED_FLAG,
    "kernel_metadata": NEEDED_METADATA,
    "out_kernel_metadata": METADATA,
    "bias_metadata": NEEDED_METADATA,
    "out_bias_metadata": METADATA,
    "query_ln_scale_metadata": NEEDED_METADATA,
    "key_ln_scale_metadata": NEEDED_METADATA,
    "kv_metadata": METADATA,
    "kv_bias_metadata": METADATA,
    "window": WINDOW,
    "chunk": WINDOW,
    "rope": [("rope", errors.DTypeError), (3, errors.DTypeError), (kvattn.RoPE(6), errors.ConfigError)],
    "alibi": [
        ("yes", errors.DTypeError),
        ((1.0, 2.0), errors.ShapeError),
        ((1.0, np.inf, 1.0, 1.0), errors.RangeError),
    ],
    "scale": [*NUMBER[:1], (np.inf, errors.RangeError), ([0.1], errors.ShapeError)],
    "softcap": [*NUMBER[:1], *((v, errors.RangeError) for v in (0, -1.0, np.nan))],
    **dict.fromkeys(("sinks", "shares_kv", "values_from_keys", "value_norm"), NEEDED_FLAG),
    "qk_norm": CHOICE,
    "output_gate": CHOICE,
    **{key: [(v, errors.DTypeError) for v in (32, "t5", True)] for key in ("relative_buckets", "temperature")},
    "qk_norm_heads": [*CHOICE, (None, errors.ConfigError)],
    "qk_norm_epsilon": [("1e-6", errors.DTypeError), (None, errors.DTypeError), (-1e-6, errors.RangeError)],
    "norm_epsilon": [("1e-6", errors.DTypeError), (None, errors.DTypeError), (-1e-6, errors.RangeError)],
    "qkv_clip": POSITIVE,
    "cache_sharding": [("model", errors.DTypeError), (3, errors.DTypeError)],
    "policy": [(v, errors.ConfigError) for v in ("full", kvattn.Full, 3)],
    "codec": [(v, errors.ConfigError) for v in ("int8", kvattn.Int8, 8)],
    "implementation": [(v, errors.ConfigError) for v in ("magic", 3, ("xla", "magic"), ())],
    "mesh": [(v, errors.ShardingError) for v in ("model", 3)],
    "by": [*CHOICE, (None, errors.ConfigError)],
    "axis": [(v, errors.DTypeError) for v in (0, None)],
}
"""argument: (value, error)"""

LATENT = {"kv_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 4}
KINDS = {
    layers.MultiHeadAttention: {},
    layers.GroupedQueryAttention: {"num_kv_heads": 2},
    layers.MultiQueryAttention: {},
    layers.SlidingWindowAttention: {"window": 3},
    linen.MultiHeadDotProductAttention: {},
    linen.MultiHeadAttention: {},
    linen.SelfAttention: {},
    linen.GroupedQueryAttention: {"num_kv_heads": 2},
    linen.MultiQueryAttention: {},
    linen.SlidingWindowAttention: {"window": 3},
    layers.MultiHeadLatentAttention: LATENT,
    linen.MultiHeadLatentAttention: LATENT,
}


def arguments_of(kind):
    """What the constructor of a layer takes, that of its base class included."""
    if issubclass(kind, nn.Module):
        return {field.name for field in dataclasses.fields(kind) if field.init} - {"parent", "name"}
    base = kind if kind is layers.MultiHeadLatentAttention else layers.MultiHeadAttention
    return set(inspect.signature(base.__init__).parameters) - {"self"}


def make(kind, **changes):
    needed = {"num_heads": 4, "head_dim": 4}
    if issubclass(kind, nnx.Module):
        needed |= {"in_features": 16, "rngs": nnx.Rngs(0)}
    if "qkv_features" in changes or KINDS[kind] is LATENT:
        needed.pop("head_dim")
    return kind(**needed | KINDS[kind] | changes)


def refused(call, error, name, value):
    with pytest.raises(errors.KVAttnError) as caught:
        call()
    message = str(caught.value)
    assert isinstance(caught.value, error), (name, value, caught.value)
    assert name in message, (name, value, message)
    return message


@pytest.mark.wrong_types
@pytest.mark.parametrize("name", ARGUMENTS)
def test_a_bad_argument_of_a_layer_is_named(name):
    for kind in (kind for kind in KINDS if name in arguments_of(kind)):
        for value, error in ARGUMENTS[name]:
            refused(lambda kind=kind, value=value: make(kind, **{name: value}), error, name, value)


def test_every_argument_of_a_layer_has_bad_values():
    for kind in KINDS:
        assert arguments_of(kind) <= set(ARGUMENTS), arguments_of(kind) - set(ARGUMENTS)
    assert len(arguments_of(linen.SelfAttention)) > 40


@pytest.mark.wrong_types
def test_messages_say_what_was_given_and_which_argument_is_wrong():
    message = refused(lambda: make(layers.MultiHeadAttention, in_features="16"), errors.DTypeError, "in_features", "16")
    assert "'16'" in message
    make_without_head_dim = functools.partial(layers.MultiHeadAttention, 4, rngs=nnx.Rngs(0))
    message = refused(lambda: make_without_head_dim(in_features=0), errors.ConfigError, "in_features", 0)
    assert "value_head_dim" not in message
    message = refused(lambda: make(layers.MultiHeadAttention, dtype="float33"), errors.DTypeError, "dtype", "float33")
    assert "'float33'" in message
    assert "jnp.float32" in message


@pytest.mark.wrong_types
def test_traced_settings_are_refused():
    for name in ("num_heads", "dropout_rate", "use_bias", "softcap", "window"):
        for kind in (layers.MultiHeadAttention, linen.MultiHeadDotProductAttention):

            def build(value, kind=kind, name=name):
                make(kind, **{name: value})
                return value

            refused(lambda build=build: jax.make_jaxpr(build)(jnp.float32(1)), errors.ConfigError, name, "traced")


GOOD = [
    {"num_heads": np.int64(2), "in_features": np.int32(8)},
    {"qkv_features": np.int64(4), "out_features": np.int16(3)},
    {"out_features": (2, 3)},
    {"dtype": "float32", "param_dtype": "bfloat16"},
    {"dtype": jnp.bfloat16, "param_dtype": np.dtype("float16")},
    {"dtype": float, "param_dtype": None},
    {"dropout_rate": 0, "deterministic": 1},
    {"dropout_rate": np.float32(0.5), "deterministic": np.True_},
    {"dropout_rate": False},
    {"use_bias": 0, "normalize_qk": np.True_, "broadcast_dropout": False},
    {"use_bias": False, "bias_init": None},
    {"precision": "highest"},
    {"precision": jax.lax.Precision.HIGH},
    {"precision": ("high", "highest")},
    {"precision": jax.lax.DotAlgorithmPreset.F32_F32_F32},
]
"""What Flax takes."""


@pytest.mark.wrong_types
@pytest.mark.parametrize("settings", GOOD, ids=lambda s: ",".join(s))
def test_what_flax_takes_means_the_same(settings):
    x = jnp.ones((1, 3, 8))
    given = {"num_heads": 2, "in_features": 8, "decode": False} | settings
    ours = layers.MultiHeadAttention(**given, rngs=nnx.Rngs(0))
    flax = nnx.MultiHeadAttention(**given, rngs=nnx.Rngs(0))
    theirs, mine = nnx.state(flax, nnx.Param), nnx.state(ours, nnx.Param)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), mine) == jax.tree.map(lambda a: (a.shape, a.dtype), theirs)
    with jax.numpy_dtype_promotion("standard"):  # Flax needs it
        out, expected = (jax.eval_shape(lambda x, m=m: m(x), x) for m in (ours, flax))
    assert (out.shape, out.dtype) == (expected.shape, expected.dtype)

    given.pop("in_features")
    modules = (m(**given) for m in (linen.MultiHeadDotProductAttention, nn.MultiHeadDotProductAttention))
    (out, mine), (expected, theirs) = (jax.eval_shape(m.init_with_output, jax.random.key(0), x) for m in modules)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), mine) == jax.tree.map(lambda a: (a.shape, a.dtype), theirs)
    assert (out.shape, out.dtype) == (expected.shape, expected.dtype)


@pytest.mark.wrong_types
def test_linen_layers_are_checked_wherever_they_are_made():
    """In setup, in a compact call, as a clone, bound."""

    class InSetup(nn.Module):
        rate: float

        def setup(self):
            self.attention = linen.MultiHeadDotProductAttention(num_heads=2, dropout_rate=self.rate, deterministic=True)

        def __call__(self, x):
            return self.attention(x)

    x = jnp.ones((1, 3, 8))
    variables = InSetup(0.5).init(jax.random.key(0), x)
    assert InSetup(0.5).bind(variables).attention(x).shape == x.shape
    refused(lambda: InSetup("0.5").init(jax.random.key(0), x), errors.DTypeError, "dropout_rate", "0.5")
    layer = linen.MultiHeadDotProductAttention(num_heads=2)
    assert layer.clone(num_heads=4).num_heads == 4
    refused(lambda: layer.clone(num_heads=-4), errors.ConfigError, "num_heads", -4)


def test_settings_are_attributes_that_can_be_assigned():
    """As those of Flax's layer; the frozen object that holds them is a new one then."""
    x = jnp.ones((1, 4, 16)) * jnp.arange(4.0)[None, :, None]
    layer, other = (make(layers.MultiHeadAttention, window=window) for window in (None, 2))
    before = layer.settings
    names = [field.name for field in dataclasses.fields(before) if hasattr(layer, field.name)]
    assert len(names) >= 25
    assert [getattr(layer, name) for name in names] == [getattr(before, name) for name in names]
    assert np.abs(layer(x, is_causal=True) - other(x)).max() > 1e-3
    layer.window = 2
    assert before.window is None
    assert layer.settings == other.settings
    np.testing.assert_array_equal(layer(x), other(x))
    with pytest.raises(dataclasses.FrozenInstanceError):
        layer.settings.window = 3


CACHE_ARGUMENTS = {
    "batch_size": [(v, errors.DTypeError) for v in ("2", 2.0, None, True)] + [(-1, errors.ConfigError)],
    "capacity": [(v, errors.DTypeError) for v in ("8", 8.5, True)] + [(v, errors.ConfigError) for v in (0, None)],
    "policy": [("full", errors.ConfigError)],
    "codec": [("int8", errors.ConfigError)],
    "dtype": [(v, errors.DTypeError) for v in ("float33", jnp.int32, jnp.float8_e4m3fn)],
}


@pytest.mark.wrong_types
@pytest.mark.parametrize("on_mesh", [False, True])
def test_a_bad_argument_of_make_cache_is_named(on_mesh):
    more = {"mesh": jax.make_mesh((2,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))} if on_mesh else {}
    made = [make(kind, **more) for kind in (layers.MultiHeadAttention, linen.MultiHeadDotProductAttention)]
    for layer in made:
        for name, rows in CACHE_ARGUMENTS.items():
            for value, error in rows:
                given = {"batch_size": 2, "capacity": 8} | {name: value}
                refused(lambda layer=layer, given=given: layer.make_cache(**given), error, name, value)
    unknown = linen.MultiHeadDotProductAttention(num_heads=4)
    refused(lambda: unknown.make_cache(2, 8, in_features="16"), errors.DTypeError, "in_features", "16")


@pytest.mark.wrong_types
def test_a_bad_argument_of_init_cache_is_named():
    layer = make(layers.MultiHeadAttention)
    for value, error in (
        (16, errors.DTypeError), ("abc", errors.DTypeError), ((16,), errors.ShapeError),
        ((1, 4.0, 16), errors.DTypeError), ((1, -4, 16), errors.ConfigError),
    ):  # fmt: skip
        refused(lambda value=value: layer.init_cache(value), error, "input_shape", value)
    refused(lambda: layer.init_cache((1, 4, 16), "float33"), errors.DTypeError, "dtype", "float33")
    refused(lambda: layer.set_view(decode=True, batch_size="2", max_length=4), errors.DTypeError, "batch_size", "2")
    refused(lambda: layer.set_view(decode=True, batch_size=2, max_length=4.5), errors.DTypeError, "max_length", 4.5)


# DecoderConfig --------------------------------------------------------------------------------------------------------

NEEDED_POSITIVE = [*POSITIVE, (None, errors.DTypeError)]
STRICT_FLAG = [(v, errors.DTypeError) for v in ("no", 1, None)]
EACH_SIZE = [
    *(row for row in SIZE if row[0] != [16]),
    *((v, errors.ConfigError) for v in ([2], (2, 0))),
    ((2, "2"), errors.DTypeError),
]
COUNT = [(v, errors.DTypeError) for v in ("1", 1.5, None, True)] + [(-1, errors.ConfigError)]
FIELDS = {
    **dict.fromkeys(("vocab_size", "model_dim", "num_layers", "num_heads"), NEEDED_SIZE),
    **dict.fromkeys(("embedding_dim", "expert_dim", "shared_expert_dim", "rotary_dim", "per_layer_dim"), SIZE),
    **dict.fromkeys(("num_kv_heads", "head_dim"), EACH_SIZE),
    "mlp_dim": [*EACH_SIZE, (None, errors.DTypeError)],
    "kv_source": [
        *((v, errors.DTypeError) for v in (3, "01", (0, "1"), (0, True))),
        *((v, errors.ConfigError) for v in ((0,), (0, 2), (0, -1), (1, 1))),
    ],
    "values_from_keys": [*((v, errors.DTypeError) for v in ("no", None, 2)), ((True,), errors.ConfigError)],
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), SIZE),
    **dict.fromkeys(("expert_groups", "groups_per_token", "group_best"), NEEDED_SIZE),
    **dict.fromkeys(("rope_theta", "expert_alpha", "expert_limit", "expert_scale"), NEEDED_POSITIVE),
    **dict.fromkeys(("local_rope_theta", "qkv_clip", "embedding_scale", "residual_scale", "logit_scale"), POSITIVE),
    **{
        key: [*((v, errors.DTypeError) for v in ("11", True, (1, 0))), ((True,), errors.ConfigError)]
        for key in ("rope_layers", "expert_layers", "qk_norm_layers")
    },
    "rope_scaling": [(3, errors.KVAttnError), ({"rope_type": "nonsense"}, errors.ConfigError)],
    **{
        key: [*WINDOW, ([4], errors.ConfigError), ((4, "4"), errors.DTypeError), ((4, 0), errors.RangeError)]
        for key in ("windows", "chunks")
    },
    "temperature": [
        *((v, errors.DTypeError) for v in (4, "12", (4,), (4, "1"))),
        *((v, errors.KVAttnError) for v in ((0, 1), (4, -1))),
    ],
    "output_gate": CHOICE,
    **{
        key: [*NUMBER, (None, errors.DTypeError), *((v, errors.RangeError) for v in (-1e-6, np.inf, np.nan))]
        for key in ("norm_epsilon", "latent_norm_epsilon")
    },
    **{key: [NUMBER[0], *((v, errors.RangeError) for v in (0, -1.0, np.nan))] for key in ("softcap", "logit_softcap")},
    **{key: [*CHOICE, (None, errors.ConfigError)] for key in ("positions", "norm", "norm_position", "activation")},
    **{key: [*CHOICE, (None, errors.ConfigError)] for key in ("qk_norm_heads", "expert_kind")},
    **{key: [*CHOICE, (None, errors.ConfigError)] for key in ("expert_scores", "expert_shares", "expert_weighs")},
    "max_positions": SIZE,
    "alibi_slopes": [
        ("12", errors.DTypeError),
        (1.0, errors.DTypeError),
        ((1.0,), errors.ConfigError),
        ((1.0, "2"), errors.DTypeError),
        ((1.0, np.nan), errors.RangeError),
    ],
    "attention_scale": [("1", errors.DTypeError), ((1.0,), errors.ConfigError), ((1.0, np.inf), errors.RangeError)],
    **dict.fromkeys(("num_experts", "experts_per_token"), COUNT),
    **dict.fromkeys(
        (
            "final_norm",
            "gated",
            "mlp_bias",
            "norm_bias",
            "out_bias",
            "parallel",
            "qk_norm",
            "qkv_bias",
            "residual_after_norm",
            "rope_interleaved",
            "shared_expert_gate",
            "embedding_norm",
            "expert_bias",
            "router_float32",
            "shared_norm",
            "sinks",
            "tie_embeddings",
            "value_norm",
            "layer_scale",
            "experts_beside",
            "router_scales",
        ),
        STRICT_FLAG,
    ),
}


def config(**changes):
    sizes = {"vocab_size": 16, "model_dim": 16, "num_layers": 2, "num_heads": 2, "mlp_dim": 8}
    return DecoderConfig(**sizes | changes)


@pytest.mark.wrong_types
@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(DecoderConfig)])
def test_a_bad_setting_of_a_decoder_is_named(field):
    positions = {"max_positions": "learned", "alibi_slopes": "alibi"}.get(field)
    for value, error in FIELDS[field]:
        changes = ({} if positions is None else {"positions": positions}) | {field: value}
        refused(lambda changes=changes: config(**changes), error, field, value)


@pytest.mark.wrong_types
def test_numbers_of_numpy_make_the_same_decoder():
    import json

    plain = config(windows=(3, None), attention_scale=0.5, rope_theta=1e4, alibi_slopes=None)
    numpy = config(
        vocab_size=np.int64(16), num_heads=np.int32(2), windows=[np.int64(3), None], attention_scale=np.float64(0.5),
        rope_theta=np.float32(1e4),
    )  # fmt: skip
    assert numpy == plain
    assert hash(numpy) == hash(plain)
    assert json.loads(json.dumps(numpy.to_json()))["windows"] == [3, None]


# Policies and codecs --------------------------------------------------------------------------------------------------

KEPT = [(v, errors.DTypeError) for v in ("4", 4.0, True, None)] + [(-1, errors.KVAttnError)]
SHARE = [(v, errors.DTypeError) for v in ("0.3", True, None)] + [(v, errors.RangeError) for v in (-0.1, 1.1, np.nan)]
TOKENS = [(v, errors.DTypeError) for v in (3, "ab", (1.5,), (True,), (np.True_,), None)]
ORDER = [(v, errors.ConfigError) for v in ("nonsense", None, 3, np.array(["cache", "original"]))]
PARTS = {
    policies.Full: {},
    policies.SlidingWindow: {"window": [*KEPT, (0, errors.RangeError)]},
    policies.Chunked: {"size": [*KEPT, (0, errors.RangeError)]},
    policies.StreamingLLM: {"num_sinks": KEPT, "window": [*KEPT, (0, errors.RangeError)], "positions_in": ORDER},
    policies.H2O: {"num_heavy": KEPT, "num_recent": KEPT, "positions_in": ORDER},
    policies.Scissorhands: {
        "budget": [*KEPT, (0, errors.RangeError)],
        "num_recent": KEPT,
        "history": [*KEPT, (0, errors.RangeError)],
        "drop": [*KEPT[:3], (0, errors.RangeError), (9, errors.RangeError)],
        "positions_in": ORDER,
    },
    policies.FastGen: {
        "recovery": [*SHARE, (0.0, errors.RangeError)],
        "special_tokens": TOKENS,
        "punctuation_tokens": TOKENS,
        "frequent": SHARE,
        "local": SHARE,
    },
    codecs.Plain: {"dtype": [*DTYPE, *((v, errors.DTypeError) for v in (None, jnp.complex64, jnp.float8_e4m3fn))]},
    codecs.Int8: {},
    codecs.Float8: {},
    codecs.Int4: {"group_size": NEEDED_SIZE},
    codecs.KIVI: {
        "bits": [*NEEDED_SIZE, (3, errors.ConfigError)],
        "group_size": NEEDED_SIZE,
        "residual": [*NEEDED_SIZE, (33, errors.ConfigError)],
    },
}
EXAMPLES = [entry.examples[0] for entry in (*policies.registered(), *codecs.registered())]
ANY_NUMBER = [(v, errors.DTypeError) for v in ("4", True)]


def bad_settings(kind):
    """Those of the table; of a class that is not in it, what is no number where a number belongs."""
    numbers = {f.name: ANY_NUMBER if f.type in (int, float) else [] for f in dataclasses.fields(kind)}
    return PARTS.get(kind, numbers)


@pytest.mark.wrong_types
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: type(example).__name__)
def test_a_bad_setting_of_a_policy_or_codec_is_named(example):
    bad = bad_settings(type(example))
    assert {field.name for field in dataclasses.fields(example)} == set(bad)
    for name, rows in bad.items():
        for value, error in rows:
            refused(lambda name=name, value=value: dataclasses.replace(example, **{name: value}), error, name, value)


def test_every_policy_and_codec_is_in_the_table():
    assert {*policies.ALL, *codecs.ALL} <= set(PARTS)


def test_a_plain_codec_takes_names_of_dtypes():
    assert codecs.Plain("bfloat16") == codecs.Plain(jnp.bfloat16) == codecs.Plain()
    assert hash(codecs.Plain("bfloat16")) == hash(codecs.Plain(jnp.bfloat16))


def test_a_clip_beyond_int32_is_a_number():
    x = jnp.ones((1, 2, 8))
    clipped, plain = (
        layers.MultiHeadAttention(2, 8, decode=False, qkv_clip=limit, rngs=nnx.Rngs(0)) for limit in (10**30, None)
    )
    np.testing.assert_array_equal(clipped(x), plain(x))
