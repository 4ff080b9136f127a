"""RoPE and ALiBi against HuggingFace's numbers, 60-digit arithmetic, and faults planted on purpose."""

import dataclasses
import decimal
import functools
import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvattn
from kvattn.errors import ConfigError, DTypeError, RangeError, ShapeError
from kvattn.positions import PHASE_ERROR, RoPE, alibi_slopes

D = decimal.Decimal
GOLDEN = json.loads((pathlib.Path(__file__).parent / "golden" / "rope.json").read_text())["cases"]

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.02, 1.05, 1.1, 1.2, 1.3, 1.5, 2.0],
    "long_factor": [1.0, 1.3, 2.0, 3.0, 5.0, 8.0, 13.0, 21.0],
    "original_max_position_embeddings": 32,
    "factor": 4.0,
}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 32}


@functools.cache
def two_pi():
    """By Machin's formula: no constant shared with the code under test."""
    with decimal.localcontext(prec=80):

        def arctan_of_inverse(n):
            power = total = D(1) / n
            for k in range(3, 200, 2):
                power = -power / (n * n)
                total += power / k
            return total

        return 8 * (4 * arctan_of_inverse(5) - arctan_of_inverse(239))


def exact_cos_sin(positions, frequencies):
    """cos and sin of position * frequency, the phase taken modulo one turn with 60 digits."""
    with decimal.localcontext(prec=60):
        phases = np.array([[float(int(p) * f % two_pi()) for f in frequencies] for p in positions])
    return np.cos(phases), np.sin(phases)


def plain_frequencies(theta, dim):
    with decimal.localcontext(prec=60):
        return [D(theta) ** (D(-2 * i) / dim) for i in range(dim // 2)]


def rotated(x, positions, inv_freq, *, interleaved=False):
    """RoPE of x [T, N, H] in float64, one pair at a time."""
    out = np.array(x, np.float64)
    pairs = len(inv_freq)
    for t, p in enumerate(positions):
        for i, f in enumerate(inv_freq):
            a, b = (2 * i, 2 * i + 1) if interleaved else (i, i + pairs)
            c, s = math.cos(p * f), math.sin(p * f)
            out[t, :, a], out[t, :, b] = x[t, :, a] * c - x[t, :, b] * s, x[t, :, b] * c + x[t, :, a] * s
    return out


def heads(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


# Phases -------------------------------------------------------------------------------------------

FAR = [0, 1, 2, 8191, 131_072, 10**6, 2**24 - 1, 2**24 + 1, 123_456_789, 1_999_999_973, 2**31 - 1]


@pytest.mark.parametrize("theta", [10_000.0, 500_000.0, 1e7])
def test_phases_keep_the_declared_bound_at_every_position(theta):
    positions = FAR + np.random.default_rng(1).integers(0, 2**31 - 1, 20).tolist()
    cos, sin = jax.jit(RoPE(64, theta=theta).cos_sin)(jnp.asarray(positions))
    want_cos, want_sin = exact_cos_sin(positions, plain_frequencies(theta, 64))
    assert max(abs(cos - want_cos).max(), abs(sin - want_sin).max()) <= PHASE_ERROR

    # What the bound is there to catch: the product taken in float32, or with float32 frequencies.
    p32, f32 = np.float32(positions)[:, None], np.float32(RoPE(64, theta=theta).inv_freq)
    far = np.array(positions) >= 10**6
    assert abs(np.cos((p32 * f32).astype(np.float64)) - want_cos)[far].max() > 1000 * PHASE_ERROR
    rounded = np.cos(np.float64(positions)[:, None] * f32.astype(np.float64))
    assert abs(rounded - want_cos)[far].max() > 1000 * PHASE_ERROR


@pytest.mark.parametrize(
    "scaling", [{"rope_type": "linear", "factor": 3.0}, YARN, LLAMA3], ids=lambda s: s["rope_type"]
)
def test_scaled_phases_keep_the_bound_too(scaling):
    rope = RoPE(64, scaling=scaling)
    positions = [1, 10**6, 2**24 + 1]
    cos, sin = rope.cos_sin(positions)
    # inv_freq is float64: exact enough up to 2^24, where it is 2^24 * 2^-53 off.
    want_cos, want_sin = exact_cos_sin(positions, [D(f) for f in rope.inv_freq])
    assert max(abs(cos / rope.attention_factor - want_cos).max(), abs(sin / rope.attention_factor - want_sin).max()) < (
        1.01 * PHASE_ERROR
    )


def test_float64_is_exact_to_float64():
    with jax.enable_x64(True):
        cos, sin = jax.jit(lambda p: RoPE(32).cos_sin(p, jnp.float64))(jnp.asarray(FAR, jnp.int32))
        assert cos.dtype == jnp.float64
        want_cos, want_sin = exact_cos_sin(FAR, plain_frequencies(10_000.0, 32))
        assert max(abs(cos - want_cos).max(), abs(sin - want_sin).max()) < 1e-15
        x = heads((3, 2, 32)).astype(np.float64)
        assert RoPE(32)(x, np.arange(3)).dtype == jnp.float64
        long = RoPE(32, scaling=DYNAMIC)
        np.testing.assert_allclose(
            long(np.repeat(x[:1], 40, 0), np.arange(40)),
            long.for_length(40)(np.repeat(x[:1], 40, 0), np.arange(40)),
            atol=1e-12,
        )


def test_only_the_distance_counts_however_far():
    rope, q, k = RoPE(64), heads((1, 1, 64), 1), heads((1, 1, 64), 2)

    def score(query_position, key_position):
        return float(jnp.sum(rope(q, [query_position]) * rope(k, [key_position])))

    for base in (0, 1000, 10**6, 2**24 + 1, 2**31 - 101):
        assert abs(score(base + 100, base) - score(100, 0)) < 2e-5
    assert abs(score(101, 0) - score(100, 0)) > 1e-2  # one position off is seen


# HuggingFace --------------------------------------------------------------------------------------


def golden_rope(case, **changes):
    scaling = dict(case["scaling"])
    if scaling["rope_type"] in ("dynamic", "longrope"):
        scaling["max_position_embeddings"] = case["max_position_embeddings"]
    return RoPE(
        case["head_dim"], **{"theta": case["theta"], "scaling": {**scaling, **changes.pop("fields", {})}, **changes}
    )


def golden_last_token(case, rope):
    tokens = case["tokens"]
    x = np.sin(np.arange(2 * tokens * case["head_dim"], dtype=np.float32))
    x = x.reshape(1, 2, tokens, case["head_dim"]).swapaxes(1, 2)
    return np.asarray(rope(x, np.arange(tokens)))[0, -1].ravel()


@pytest.mark.parametrize("name", GOLDEN)
def test_matches_transformers(name):
    case = GOLDEN[name]
    rope = golden_rope(case)
    fixed = rope.for_length(case["tokens"])
    np.testing.assert_allclose(fixed.inv_freq, case["inv_freq"], rtol=1e-6)
    assert rope.attention_factor == pytest.approx(case["attention_factor"], rel=1e-12)
    # transformers computes phases in float32: position * 2^-24 of its own error.
    atol = 1e-6 + case["tokens"] * 2.0**-23
    np.testing.assert_allclose(golden_last_token(case, rope), case["last_token"], atol=atol)
    np.testing.assert_allclose(golden_last_token(case, fixed), case["last_token"], atol=atol)
    wrong = golden_last_token(case, golden_rope(case, interleaved=True))
    assert abs(wrong - case["last_token"]).max() > 100 * atol


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("linear", {"factor": 4.1}),
        ("dynamic_long", {"max_position_embeddings": 33}),
        ("yarn", {"original_max_position_embeddings": 8192}),
        ("yarn_all", {"beta_fast": 32.0}),
        ("yarn_all", {"beta_slow": 1.0}),
        ("yarn_all", {"truncate": True}),
        ("yarn_all", {"mscale": 1.0}),
        ("yarn_all", {"mscale_all_dim": 0.9}),
        ("yarn_attention_factor", {"attention_factor": None}),
        ("llama3", {"low_freq_factor": 1.1}),
        ("llama3", {"high_freq_factor": 3.9}),
        ("llama3_32", {"factor": 31.0}),
        ("llama3", {"original_max_position_embeddings": 8000}),
        ("longrope_short", {"short_factor": [1.0, 1.02, 1.05, 1.1, 1.2, 1.3, 1.5, 2.1]}),
        ("longrope_short", {"original_max_position_embeddings": 31}),
        ("longrope_short", {"max_position_embeddings": 129}),
        ("longrope_long", {"long_factor": [1.0, 1.3, 2.0, 3.0, 5.0, 8.0, 13.0, 20.0]}),
        ("longrope_long", {"original_max_position_embeddings": 33}),
        ("longrope_attention", {"attention_factor": None}),
        ("longrope_factor", {"factor": 4.1}),
    ],
)
def test_every_field_of_the_rope_dict_matters(name, fields):
    """Each field, slightly wrong, fails the comparison above."""
    case = GOLDEN[name]
    rope = golden_rope(case, fields=fields)
    same_frequencies = np.allclose(rope.for_length(case["tokens"]).inv_freq, case["inv_freq"], rtol=1e-6, atol=0)
    assert not (same_frequencies and rope.attention_factor == pytest.approx(case["attention_factor"], rel=1e-6))


def test_newer_checkpoints_keep_theta_and_fraction_in_the_dict():
    rope = RoPE(64, scaling={"rope_type": "default", "rope_theta": 5e5, "partial_rotary_factor": 0.5})
    assert rope == RoPE(64, theta=5e5, rotary_dim=32)
    assert RoPE(8, scaling={"type": "linear", "factor": 2}) == RoPE(8, scaling={"rope_type": "linear", "factor": 2.0})
    derived = {"rope_type": "yarn", "original_max_position_embeddings": 2048, "max_position_embeddings": 8192}
    assert RoPE(64, scaling=derived) == RoPE(64, scaling=YARN)


# Dynamic ------------------------------------------------------------------------------------------


def test_dynamic_takes_the_length_from_the_row():
    rope, x = RoPE(16, scaling=DYNAMIC), heads((2, 50, 1, 16))
    positions = np.stack([np.arange(50), np.minimum(np.arange(50), 20)])
    out = rope(x, positions)
    np.testing.assert_allclose(out[0], rope.for_length(50)(x[0], positions[0]), atol=5e-5)
    np.testing.assert_allclose(out[1], RoPE(16)(x[1], positions[1]), atol=1e-6)
    np.testing.assert_array_equal(out[1], rope(x, positions[[1, 1]])[1])  # whatever its neighbour is
    assert abs(out[0] - RoPE(16)(x[0], positions[0])).max() > 0.1


@pytest.mark.parametrize("interleaved", [False, True])
def test_longrope_takes_the_length_from_the_row(interleaved):
    """Or as it is told; either way up to the last token of the original length by the short divisors."""
    rope, x = RoPE(16, scaling=LONGROPE, interleaved=interleaved), heads((2, 40, 1, 16))
    positions = np.stack([np.arange(40), np.minimum(np.arange(40), 31)])
    long, short = rope.for_length(33), rope.for_length(32)
    assert abs(long.inv_freq - short.inv_freq).max() > 0.01 and rope.depends_on_length
    assert long.for_length(1) == long and RoPE(16).for_length(9) == RoPE(16) and not RoPE(16).depends_on_length
    want = np.stack([long(x[0], positions[0]), short(x[1], positions[1])])
    np.testing.assert_allclose(rope(x, positions), want, atol=1e-6)
    exact = (
        rotated(x[0].astype(np.float64), positions[0], long.inv_freq, interleaved=interleaved) * rope.attention_factor
    )
    np.testing.assert_allclose(want[0], exact, atol=1e-5)
    # Of a row that is told its length the other one makes no difference, nor what is turned with it.
    told = np.stack([short(x[0], positions[0]), long(x[1], positions[1])])
    np.testing.assert_allclose(rope(x, positions, np.array([32, 33])), told, atol=1e-6)
    np.testing.assert_allclose(rope(x[0], positions[0], 32), told[0], atol=1e-6)
    np.testing.assert_allclose(rope(x, positions[0], np.array([33, 33]))[0], want[0], atol=1e-6)
    with pytest.raises(ShapeError, match="lengths"):
        rope(x, positions, 33)
    with jax.enable_x64(True):
        wide = np.asarray(rope(x.astype(np.float64), positions))
    np.testing.assert_allclose(wide[0], exact, atol=1e-12)
    np.testing.assert_allclose(wide, want, atol=1e-5)


@pytest.mark.parametrize("scaling", [DYNAMIC, LONGROPE], ids=lambda s: s["rope_type"])
def test_keys_that_move_go_by_the_length_of_their_row(scaling):
    """Keys that are turned as they are read, block by block: all of a row by the frequencies of its queries."""
    rope = RoPE(16, scaling=scaling | {"original_max_position_embeddings": 12})
    lengths, tokens = np.array([18, 10]), 18
    q, k, v = heads((3, 2, tokens, 2, 16))
    policy, layout = kvattn.H2O(9, 9, positions_in="cache"), kvattn.cache.Layout(19, 8, True)
    cache = kvattn.KVCache.create(2, 2, 16, policy=policy, dtype=jnp.float32, layout=layout)
    step = jax.jit(
        lambda q, k, v, cache, n: kvattn.cached_attention(q, k, v, cache, num_new=n, rope=rope),
        compiler_options={"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True},
    )
    outs = []
    for t in range(tokens):
        new = (x[:, t : t + 1] for x in (q, k, v))
        out, cache = step(*new, cache, jnp.asarray(t < lengths, jnp.int32))
        outs.append(np.asarray(out)[:, 0])
    for row, length in enumerate(lengths):
        fixed, at = rope.for_length(int(length)), np.arange(length)
        query = np.asarray(fixed(q[row, [length - 1]], at[-1:]))[0]
        scores = np.einsum("nh,snh->sn", query, np.asarray(fixed(k[row, :length], at))) / 4
        probs = np.exp(scores - scores.max(0))
        want = np.einsum("sn,snh->nh", probs / probs.sum(0), v[row, :length])
        np.testing.assert_allclose(outs[length - 1][row], want, atol=2e-5)


@pytest.mark.parametrize("length", [100, 4096, 10**5, 10**6])
def test_dynamic_phases_are_float32_accurate_relative_to_the_phase(length):
    rope = RoPE(64, scaling=DYNAMIC)
    fixed = rope.for_length(length)
    got, want = rope.cos_sin([length - 1]), fixed.cos_sin([length - 1])
    error = np.abs(np.subtract(got, want)).max((0, 1))
    # Declared: the frequency is 1e-6 off, relatively. Kept as fixed point, its 64 bits lose no more.
    assert (error < 2 * PHASE_ERROR + (length - 1) * (1e-6 * fixed.inv_freq + 2.0**-32 * RoPE(64).inv_freq)).all()
    unscaled = RoPE(64).cos_sin([length - 1])
    assert np.abs(np.subtract(unscaled, want)).max() > 0.1


def test_a_fixed_length_makes_chunks_agree():
    rope, x = RoPE(16, scaling=DYNAMIC), heads((50, 1, 16))
    fixed = rope.for_length(50)

    def in_chunks(rope):
        return jnp.concatenate([rope(x[:30], np.arange(30)), rope(x[30:], np.arange(30, 50))])

    np.testing.assert_array_equal(in_chunks(fixed), fixed(x, np.arange(50)))
    assert abs(in_chunks(rope) - rope(x, np.arange(50))).max() > 0.1  # the reason for for_length
    assert RoPE(16, scaling=LLAMA3).for_length(50) == RoPE(16, scaling=LLAMA3)


# Layout, dtypes, transforms -----------------------------------------------------------------------


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(2, None), (8, None), (24, None), (8, 4), (59, 20), (7, 2)])
def test_pairs(head_dim, rotary_dim, interleaved):
    rope = RoPE(head_dim, rotary_dim=rotary_dim, interleaved=interleaved)
    x, positions = heads((3, 2, head_dim)), [0, 1, 77]
    out = rope(x, np.array(positions))
    np.testing.assert_allclose(out, rotated(x, positions, rope.inv_freq, interleaved=interleaved), atol=2e-6)
    if rotary_dim:
        np.testing.assert_array_equal(out[..., rotary_dim:], x[..., rotary_dim:])
    if rope.num_pairs > 1:
        assert abs(out - rotated(x, positions, rope.inv_freq, interleaved=not interleaved)).max() > 0.1
    assert abs(out - rotated(x, [1, 2, 78], rope.inv_freq, interleaved=interleaved)).max() > 0.1


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_output_keeps_the_dtype_and_is_rounded_once(dtype):
    x = jnp.asarray(heads((2, 3, 2, 16)), dtype)
    out = RoPE(16)(x, np.arange(3))
    assert out.dtype == dtype and out.shape == x.shape
    np.testing.assert_array_equal(out, RoPE(16)(x.astype(jnp.float32), np.arange(3)).astype(dtype))


def test_shapes_of_positions():
    rope, x = RoPE(8), heads((2, 3, 2, 8))
    want = rope(x, np.array([[4, 5, 6], [4, 5, 6]]))
    for positions in ([4, 5, 6], [[4, 5, 6]], np.array([4, 5, 6], np.int64), np.array([4, 5, 6], np.uint8)):
        np.testing.assert_array_equal(rope(x, positions), want)
    np.testing.assert_array_equal(jax.vmap(rope)(x, jnp.array([[4, 5, 6]] * 2)), want)
    np.testing.assert_array_equal(rope(x[0], jnp.arange(4, 7)), want[0])
    assert rope(x[:0], np.zeros((0, 3), np.int32)).shape == (0, 3, 2, 8)
    assert rope(x[:, :0], []).shape == (2, 0, 2, 8)


def test_static_argument_of_jit_and_plain_value():
    traces = []

    @functools.partial(jax.jit, static_argnums=0)
    def step(rope, x, positions):
        traces.append(1)
        return rope(x, positions)

    x = heads((1, 2, 8))
    for p in range(5):
        step(RoPE(8, scaling=dict(LLAMA3)), x, jnp.array([p]))
    assert len(traces) == 1
    rope = RoPE(8, scaling=LLAMA3)
    assert hash(rope) == hash(RoPE(8, scaling=dict(reversed(LLAMA3.items())))) and rope in {rope}
    assert dataclasses.replace(rope, interleaved=True).scaling == rope.scaling
    assert rope != RoPE(8) and RoPE(8, scaling={"rope_type": "default"}) == RoPE(8)


def test_traced_negative_positions_turn_back_and_gradients_are_the_inverse():
    rope, x = RoPE(16), jnp.asarray(heads((3, 2, 16)))
    positions = jnp.array([3, 2**24 + 1, 2**31 - 1])
    there = rope(x, positions)
    np.testing.assert_allclose(jax.jit(rope)(there, -positions), x, atol=1e-6)
    (gradient,) = jax.vjp(lambda a: rope(a, positions), x)[1](there)
    np.testing.assert_allclose(gradient, x, atol=1e-6)


# Bad input ----------------------------------------------------------------------------------------


@pytest.mark.wrong_types
@pytest.mark.parametrize(
    ("error", "words", "make"),
    [
        (ConfigError, "head_dim", lambda: RoPE(0)),
        (ConfigError, "head_dim", lambda: RoPE(-2)),
        (DTypeError, "head_dim", lambda: RoPE(3.5)),
        (DTypeError, "head_dim", lambda: RoPE(True)),
        (ConfigError, "even", lambda: RoPE(7)),
        (ConfigError, "rotary_dim", lambda: RoPE(8, rotary_dim=10)),
        (ConfigError, "rotary_dim", lambda: RoPE(8, rotary_dim=3)),
        (ConfigError, "theta", lambda: RoPE(8, theta=0.0)),
        (ConfigError, "theta", lambda: RoPE(8, theta=math.nan)),
        (DTypeError, "theta", lambda: RoPE(8, theta="big")),
        (DTypeError, "interleaved", lambda: RoPE(8, interleaved=1)),
        (ConfigError, "max_positions", lambda: RoPE(8, max_positions=0)),
        (DTypeError, "scaling", lambda: RoPE(8, scaling=2.0)),
        (ConfigError, "'llama3'", lambda: RoPE(8, scaling={"rope_type": "mrope"})),
        (ConfigError, "'long_factor'", lambda: RoPE(8, scaling={"rope_type": "longrope", "short_factor": [1.0] * 4})),
        (ConfigError, "the 4 pairs", lambda: RoPE(8, scaling=LONGROPE)),
        (DTypeError, "short_factor", lambda: RoPE(8, scaling=LONGROPE | {"short_factor": 2.0})),
        (ConfigError, "long_factor", lambda: RoPE(16, scaling=LONGROPE | {"long_factor": [0.0] * 8})),
        (ConfigError, "attention_factor", lambda: RoPE(16, scaling=LONGROPE | {"factor": None})),
        (ConfigError, "> 1", lambda: RoPE(16, scaling=LONGROPE | {"original_max_position_embeddings": 1})),
        (ConfigError, "two kinds", lambda: RoPE(8, scaling={"rope_type": "yarn", "type": "linear"})),
        (ConfigError, "'factor'", lambda: RoPE(8, scaling={"rope_type": "linear"})),
        (ConfigError, "factor", lambda: RoPE(8, scaling={"rope_type": "linear", "factor": 0.0})),
        (ConfigError, "factor", lambda: RoPE(8, scaling={"rope_type": "linear", "factor": math.inf})),
        (DTypeError, "factor", lambda: RoPE(8, scaling={"rope_type": "linear", "factor": "4"})),
        (ConfigError, "'original_max", lambda: RoPE(8, scaling={"rope_type": "dynamic", "factor": 2.0})),
        (ConfigError, "'original_max", lambda: RoPE(8, scaling={"rope_type": "yarn", "factor": 2.0})),
        (ConfigError, "'low_freq_factor'", lambda: RoPE(8, scaling={k: LLAMA3[k] for k in ("rope_type", "factor")})),
        (ConfigError, "low_freq_factor", lambda: RoPE(8, scaling={**LLAMA3, "low_freq_factor": 4.0})),
        (DTypeError, "truncate", lambda: RoPE(8, scaling={**YARN, "truncate": 1})),
        (ConfigError, "'mrope_section'", lambda: RoPE(8, scaling={"type": "default", "mrope_section": [1, 1]})),
        (ConfigError, "rope_theta", lambda: RoPE(8, theta=5.0, scaling={"type": "default", "rope_theta": 6.0})),
        (ConfigError, "rotary_dim > 2", lambda: RoPE(2, scaling=DYNAMIC)),
        (ConfigError, "length", lambda: RoPE(8, scaling=DYNAMIC).for_length(0)),
    ],
)
def test_bad_settings(error, words, make):
    with pytest.raises(error, match=words):
        make()


@pytest.mark.wrong_types
@pytest.mark.parametrize(
    ("error", "words", "positions"),
    [
        (DTypeError, "float32", np.arange(3, dtype=np.float32)),
        (DTypeError, "float", [0.0, 1.0, 2.0]),
        (DTypeError, "bool", np.ones(3, bool)),
        (RangeError, "-1", [0, -1, 2]),
        (RangeError, "-1", jnp.array([0, -1, 2])),
        (RangeError, "int32", np.array([0, 1, 2**31])),
        (RangeError, "int32", [0, 1, 2**70]),
        (RangeError, "max_positions", [0, 1, 100]),
        (ShapeError, "positions", [0, 1]),
        (ShapeError, "positions", 1),
        (ShapeError, "positions", [[0, 1, 2]] * 3),
        (ShapeError, "positions", [[[0, 1, 2]] * 2]),
    ],
)
def test_bad_positions(error, words, positions):
    with pytest.raises(error, match=words):
        RoPE(8, max_positions=100)(heads((2, 3, 1, 8)), positions)


@pytest.mark.wrong_types
def test_bad_x():
    rope = RoPE(8)
    with pytest.raises(DTypeError, match="int32"):
        rope(np.ones((3, 1, 8), np.int32), np.arange(3))
    with pytest.raises(DTypeError, match="floating"):
        rope("x", np.arange(3))
    for shape in ((3, 1, 6), (3, 8)):
        with pytest.raises(ShapeError, match="x must be"):
            rope(heads(shape), np.arange(3))
    with pytest.raises(DTypeError, match="float32"):
        jax.jit(rope)(heads((3, 1, 8)), np.arange(3, dtype=np.float32))
    assert rope(heads((3, 1, 8)), np.array([0, 1, 2**31 - 1])).shape == (3, 1, 8)  # the largest that fits


# ALiBi --------------------------------------------------------------------------------------------

# From transformers' BLOOM, whose own float32 powers are 5e-7 off.
BLOOM_TAILS = {
    1: [0.00390625],
    3: [0.0625, 0.00390625, 0.25],
    7: [0.00390625, 0.5, 0.125, 0.03125],
    8: [0.03125, 0.015625, 0.0078125, 0.00390625],
    12: [0.707106769, 0.353553385, 0.176776677, 0.0883883387],
    16: [0.0110485414, 0.00781249814, 0.00552427024, 0.00390624884],
    71: [0.738413036, 0.677127719, 0.620928884, 0.56939429],
    112: [0.0211602338, 0.0194040202, 0.0177935641, 0.0163167696],
}


@pytest.mark.parametrize("num_heads", BLOOM_TAILS)
def test_alibi_slopes_are_blooms(num_heads):
    slopes = alibi_slopes(num_heads)
    assert slopes.shape == (num_heads,) and slopes.dtype == jnp.float32
    np.testing.assert_allclose(slopes[-4:], BLOOM_TAILS[num_heads], rtol=1e-6)
    if num_heads & (num_heads - 1):  # the formula for powers of two would be wrong here
        naive = 2.0 ** (-8.0 * np.arange(1, num_heads + 1) / num_heads)
        assert abs(naive / slopes - 1).max() > 0.01


@pytest.mark.wrong_types
@pytest.mark.parametrize(("error", "num_heads"), [(ConfigError, 0), (DTypeError, 2.0), (DTypeError, True)])
def test_alibi_bad_head_count(error, num_heads):
    with pytest.raises(error, match="num_heads"):
        alibi_slopes(num_heads)
