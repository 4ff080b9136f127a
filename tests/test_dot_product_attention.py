"""dot_product_attention against `jax.nn` and against a float64 NumPy oracle, gradients included.

The oracle shares nothing with either: it asks, query by query, which keys may be seen. JAX's own
tests compare `implementation=None` with "xla", which is one code path; these cannot pass that way.
"""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvattn.attend.full import dot_product as full
from kvattn.attend.full import dot_product_attention
from kvattn.errors import ConfigError, DTypeError, KVAttnError, RangeError, ShapeError, UnsupportedError
from kvattn.positions import alibi_slopes

B, T, S, N, K, H = 2, 7, 9, 4, 2, 8


def normal(shape, seed=0, dtype=np.float32):
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(dtype)


# The oracle ---------------------------------------------------------------------------------------


def oracle(
    query,
    key,
    value,
    bias=None,
    mask=None,
    *,
    is_causal=False,
    scale=None,
    query_seq_lengths=None,
    key_value_seq_lengths=None,
    local_window_size=None,
    softcap=None,
    sinks=None,
    alibi_slopes=None,
    cotangent=None,
    fault=None,
):
    """Output, logsumexp and, for a cotangent, gradients in float64. `fault` plants a mistake."""
    q, k, v = (np.asarray(a, np.float64) for a in (query, key, value))
    batch, num_queries, num_heads, head_dim = q.shape
    num_keys, group = k.shape[1], num_heads // k.shape[2]
    scale = 1 / math.sqrt(head_dim) if scale is None else scale
    scale = 1 / head_dim if fault == "scale" else scale
    extras = not (softcap is None and sinks is None and alibi_slopes is None)
    if isinstance(local_window_size, int):
        local_window_size = (local_window_size, local_window_size)
    shape = (batch, num_heads, num_queries, num_keys)
    bias = None if bias is None else np.broadcast_to(np.asarray(bias, np.float64), shape)
    mask = None if mask is None else np.broadcast_to(mask, shape)

    def sees(b, n, t, s):
        yes = mask is None or mask[b, n, t, s]
        if is_causal:
            yes &= s <= t + (num_keys - num_queries if fault == "bottom_right" else 0)
        if local_window_size is not None:
            left, right = local_window_size
            left, right = {"window_counts_itself": (left - 1, right), "no_right": (left, 0)}.get(fault, (left, right))
            yes &= t - left <= s <= t + right
        if query_seq_lengths is not None:
            yes &= t < query_seq_lengths[b]
        if key_value_seq_lengths is not None and fault != "no_padding":
            yes &= s < key_value_seq_lengths[b]
        return yes

    out, lse = np.zeros(q.shape), np.full((batch, num_queries, num_heads), -np.inf)
    grads = {name: np.zeros(np.shape(a)) for name, a in (("query", q), ("key", k), ("value", v))}
    grads |= {"bias": np.zeros(shape), "sinks": np.zeros(num_heads), "alibi_slopes": np.zeros(num_heads)}
    for b, n, t in itertools.product(range(batch), range(num_heads), range(num_queries)):
        kv = n % k.shape[2] if fault == "interleaved_groups" else n // group
        seen = [s for s in range(num_keys) if sees(b, n, t, s)]
        masked_row = not seen and not extras
        if masked_row:
            seen = list(range(num_keys))  # jax.nn: an even average
        rows, distance = k[b, seen, kv], np.array(seen) - t
        raw = rows @ q[b, t, n] * scale
        scores = raw.copy()
        if softcap is not None and fault != "no_softcap":
            scores = softcap * np.tanh(raw / softcap)
        if bias is not None:
            scores = scores + bias[b, n, t, seen]
        if softcap is not None and fault == "softcap_after_bias":
            scores = softcap * np.tanh((raw + (0 if bias is None else bias[b, n, t, seen])) / softcap)
        if alibi_slopes is not None:
            scores = scores + alibi_slopes[n] * (-distance if fault == "alibi_sign" else distance)
        if masked_row:
            scores = np.zeros(len(seen))
        sink = -np.inf if sinks is None or fault == "no_sinks" else float(sinks[n])
        top = max(scores.max(initial=-np.inf), sink)
        if top == -np.inf:
            continue
        total = np.exp(scores - top).sum() + np.exp(sink - top)
        weights = np.exp(scores - top) / total
        lse[b, t, n] = top + np.log(total)
        if query_seq_lengths is not None and t >= query_seq_lengths[b]:
            continue
        out[b, t, n] = weights @ v[b, seen, kv]
        if cotangent is None:
            continue
        g = np.asarray(cotangent, np.float64)[b, t, n]
        grads["value"][b, seen, kv] += weights[:, None] * g
        towards = v[b, seen, kv] @ g
        d_scores = weights * (towards - weights @ towards)
        grads["sinks"][n] -= np.exp(sink - top) / total * (weights @ towards)
        if masked_row:
            continue
        grads["bias"][b, n, t, seen] += d_scores
        grads["alibi_slopes"][n] += d_scores @ distance
        d_raw = d_scores * (1 - np.tanh(raw / softcap) ** 2 if softcap is not None else 1) * scale
        grads["query"][b, t, n] += d_raw @ rows
        grads["key"][b, seen, kv] += d_raw[:, None] * q[b, t, n]
    return out, lse, grads


# Every combination of masks and extras, on every path ---------------------------------------------

PATHS = ("xla", "reference", "blocks")


@pytest.fixture(params=PATHS)
def path(request, monkeypatch):
    """How it is computed: jax.nn or one piece, the reference, or blocks of queries (here: of 8)."""
    if request.param == "blocks":
        monkeypatch.setattr(full, "_MAX_SCORES", 0)
        monkeypatch.setattr(full, "_BLOCK_SCORES", 1)
    return "reference" if request.param == "reference" else "xla"


def settings(*modes, shape=(B, T, S, N)):
    """The keyword arguments for a list of modes."""
    batch, t, s, n = shape
    known = {
        "plain": {},
        "causal": {"is_causal": True},
        "padding": {
            "query_seq_lengths": np.linspace(1, t - 1, batch).astype(np.int32),
            "key_value_seq_lengths": np.linspace(s - 1, 2, batch).astype(np.int32),
        },
        "kv_padding": {"key_value_seq_lengths": np.linspace(s - 1, 2, batch).astype(np.int32)},
        "custom": {"mask": np.random.default_rng(3).random((batch, 1, t, s)) < 0.6},
        "head_mask": {"mask": np.random.default_rng(4).random((1, n, 1, s)) < 0.7},
        "bias": {"bias": normal((1, n, t, s), 5)},
        "row_bias": {"bias": normal((batch, 1, 1, s), 6)},
        "window": {"local_window_size": (3, 2)},
        "int_window": {"local_window_size": 1},
        "self_window": {"local_window_size": (0, 0)},
        "scale": {"scale": 0.7},
        "softcap": {"softcap": 1.5},
        "sinks": {"sinks": normal((n,), 7)},
        "alibi": {"alibi_slopes": np.asarray(alibi_slopes(n))},
    }
    return functools.reduce(lambda a, m: a | known[m], modes, {})


COMBINATIONS = [
    ("plain",),
    ("bias",),
    ("row_bias", "head_mask"),
    ("custom", "padding"),
    ("causal", "padding"),
    ("bias", "causal", "scale"),
    ("causal", "window"),
    ("window", "kv_padding"),
    ("int_window",),
    ("self_window", "sinks"),
    ("custom", "causal", "window", "padding", "bias"),
    ("softcap", "bias"),
    ("softcap", "causal", "window"),
    ("sinks", "custom"),
    ("alibi", "causal", "kv_padding"),
    ("softcap", "sinks", "alibi", "custom", "causal", "window", "padding", "bias", "scale"),
]


def check(call, args, kwargs, atol=2e-5):
    """Forward, logsumexp and every gradient of one call against the oracle."""
    cotangent = normal(args[0].shape, 9)
    traced = {n: v for n, v in kwargs.items() if n in ("bias", "sinks", "alibi_slopes")}
    static = {n: v for n, v in kwargs.items() if n not in traced}

    @jax.jit
    def both(q, k, v, traced):
        def fn(*args):
            return call(*args[:3], **args[3], **static, return_residual=True)

        out, back, lse = jax.vjp(fn, q, k, v, traced, has_aux=True)
        return out, lse, back(jnp.asarray(cotangent))

    want, want_lse, want_grads = oracle(*args, **kwargs, cotangent=cotangent)
    out, lse, (*first, rest) = both(*args, traced)
    for name, got in dict(zip(("query", "key", "value"), first, strict=True), **rest).items():
        wanted = want_grads[name]
        if name == "bias":
            axes = tuple(i for i, n in enumerate(kwargs["bias"].shape) if n == 1)
            wanted = wanted.sum(axes, keepdims=True)
        np.testing.assert_allclose(got, wanted, atol=5 * atol, rtol=1e-4, err_msg=f"gradient of {name}")
    np.testing.assert_allclose(out, want, atol=atol)
    seen = ~(lse < -1e30)  # jax.nn gives rows without keys a huge negative number, the rest -inf
    np.testing.assert_allclose(lse[seen], want_lse[seen], atol=atol)


@pytest.mark.parametrize(
    ("path", "modes"),
    # Blocks do everything. The reference is the same code at another precision, and plain calls on "xla" are
    # jax.nn's program (see below): a few of their combinations will do.
    [
        pytest.param(p, m, id=f"{p}-{'+'.join(m)}")
        for p, chosen in zip(PATHS, (COMBINATIONS[5::3], COMBINATIONS[3::4], COMBINATIONS), strict=True)
        for m in chosen
    ],
    indirect=["path"],
)
def test_against_the_oracle(path, modes):
    kwargs = settings(*modes, shape=(B, 11, S, N))
    args = (normal((B, 11, N, H), 0), normal((B, S, K, H), 1), normal((B, S, K, H), 2))
    check(functools.partial(dot_product_attention, implementation=path), args, kwargs)


@pytest.mark.parametrize(
    ("t", "s", "modes"),
    [
        (20, 40, ("int_window",)),
        (40, 20, ("int_window", "sinks")),
        (33, 33, ("window", "causal", "softcap", "custom", "bias")),
        (33, 33, ("window", "alibi", "row_bias", "head_mask", "padding")),
    ],
)
def test_a_narrow_window_reads_few_keys(t, s, modes, monkeypatch):
    """Blocks slice the keys they can see: at both ends, with a bias, with more keys or queries."""
    monkeypatch.setattr(full, "_MAX_SCORES", 0)
    monkeypatch.setattr(full, "_BLOCK_SCORES", 1)
    args = (normal((1, t, 2, H), 0), normal((1, s, 1, H), 1), normal((1, s, 1, H), 2))
    kwargs = settings(*modes, shape=(1, t, s, 2))
    assert "dynamic_slice" in str(jax.make_jaxpr(lambda q, k, v: dot_product_attention(q, k, v, **kwargs))(*args))
    check(dot_product_attention, args, kwargs)


@pytest.mark.parametrize(
    ("fault", "modes"),
    [
        ("scale", ("plain",)),
        ("bottom_right", ("causal",)),
        ("window_counts_itself", ("window",)),
        ("no_right", ("window",)),
        ("no_padding", ("kv_padding",)),
        ("interleaved_groups", ("plain",)),
        ("no_softcap", ("softcap",)),
        ("softcap_after_bias", ("softcap", "bias")),
        ("no_sinks", ("sinks",)),
        ("alibi_sign", ("alibi",)),
    ],
)
def test_the_oracle_sees_faults(fault, modes):
    """Each mistake moves the result by more than 100 times what the tests above allow."""
    args = (normal((B, T, N, H), 0), normal((B, S, K, H), 1), normal((B, S, K, H), 2))
    right, _, _ = oracle(*args, **settings(*modes))
    wrong, _, _ = oracle(*args, **settings(*modes), fault=fault)
    assert abs(right - wrong).max() > 100 * 2e-5
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(dot_product_attention(*args, **settings(*modes)), wrong, atol=2e-5)


# The mirror ---------------------------------------------------------------------------------------


def jax_nn(*args, **kwargs):
    """`jax.nn` itself, which mixes dtypes where strict settings refuse."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        return jax.nn.dot_product_attention(*args, **kwargs)


@functools.cache
def low_precision_case(dtype, group):
    """Inputs, and output and gradients by the oracle and by jax.nn (of the same numbers in float32)."""
    shapes = [(2, 16, 4, 32), (2, 24, 4 // group, 32), (2, 24, 4 // group, 32), (2, 16, 4, 32)]
    q, k, v, g = (jnp.asarray(normal(s, i), dtype) for i, s in enumerate(shapes))
    want, _, grads = oracle(q, k, v, cotangent=g)
    wide = [a.astype(jnp.float32) for a in (q, k, v, g)]
    out, theirs = jax.jit(lambda q, k, v, g: (lambda o, b: (o, b(g)))(*jax.vjp(jax_nn, q, k, v)))(*wide)
    return (q, k, v, g), (want, grads["query"], grads["key"], grads["value"]), (out, *theirs)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize(
    ("group", "use_vmap", "impl", "promotion"),
    [
        *((g, vmap, "xla", "standard") for g in (1, 2, 4) for vmap in (False, True)),
        (2, False, "xla", "strict"),
        (4, True, "reference", "strict"),
    ],
)
def test_low_precision_groups_and_vmap(dtype, group, use_vmap, impl, promotion):
    """JAX's own grid (tests/nn_test.py), gradients included, also where jax.nn itself fails (strict promotion)."""
    (*args, g), want, theirs = low_precision_case(dtype, group)
    call = functools.partial(dot_product_attention, implementation=impl)
    call = jax.vmap(call) if use_vmap else call
    with jax.numpy_dtype_promotion(promotion):
        out, grads = jax.jit(lambda q, k, v, g: (lambda o, b: (o, b(g)))(*jax.vjp(call, q, k, v)))(*args, g)
    eps = float(jnp.finfo(dtype).eps)
    for a, truth, b in zip((out, *grads), want, theirs, strict=True):
        assert a.dtype == dtype
        for other in (truth, b):
            # Inputs are exact here; weights, their gradients and the result are each rounded once.
            assert abs(np.asarray(a, np.float64) - np.asarray(other, np.float64)).max() <= 2 * eps * abs(truth).max()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("modes", [m for m in COMBINATIONS if not {"softcap", "sinks", "alibi"} & set(m)], ids="+".join)
def test_plain_calls_are_jax_nns_program(modes, dtype):
    kwargs = settings(*modes)
    args = [jnp.asarray(normal(s, i), dtype) for i, s in enumerate([(B, T, N, H), (B, S, K, H), (B, S, K, H)])]

    def program(attention):
        return jax.jit(lambda q, k, v: attention(q, k, v, **kwargs, return_residual=True)).lower(*args).as_text()

    with jax.numpy_dtype_promotion("standard"):
        assert program(dot_product_attention) == program(jax_nn)


def test_it_may_take_the_name_of_jax_nns_function(monkeypatch):
    x = jnp.asarray(normal((1, 3, 2, 4)))
    both = jax.value_and_grad(lambda x: jnp.sum(jax.nn.dot_product_attention(x, x, x, is_causal=True) ** 2))
    value, gradient = both(x)
    monkeypatch.setattr(jax.nn, "dot_product_attention", dot_product_attention)
    for call in (both, jax.jit(lambda x: both(x))):
        ours, its_gradient = call(x)
        np.testing.assert_allclose(ours, value, rtol=1e-6)
        np.testing.assert_allclose(its_gradient, gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("impl", ["xla", "reference"])
def test_rows_without_keys(impl):
    """Plain: jax.nn's average of all values. With an extra: 0 and -inf, or the sink."""
    q, k, v = normal((1, 3, 2, H), 0), normal((1, 4, 2, H), 1), normal((1, 4, 2, H), 2)
    mask = np.array([[True] * 4, [False] * 4, [True, False, False, False]])
    call = functools.partial(dot_product_attention, q, k, v, implementation=impl, return_residual=True)
    out, _ = call(mask=mask)
    np.testing.assert_allclose(out[0, 1], v[0].mean(0), atol=1e-6)
    for hidden in ({"mask": mask}, {"bias": np.where(mask, 0, -np.inf).astype(np.float32)}):
        out, lse = call(**hidden, softcap=5.0)
        np.testing.assert_array_equal(out[0, 1], 0)
        np.testing.assert_array_equal(lse[0, 1], -np.inf)
        np.testing.assert_allclose(out[0, 2], v[0, 0], atol=1e-6)
        out, lse = call(**hidden, sinks=np.array([0.5, -2.0], np.float32))
        np.testing.assert_array_equal(out[0, 1], 0)
        np.testing.assert_allclose(lse[0, 1], [0.5, -2.0], atol=1e-6)
        summed = functools.partial(dot_product_attention, **hidden, softcap=5.0, implementation=impl)
        grads = jax.jit(jax.grad(lambda *a, f=summed: f(*a).sum(), argnums=(0, 1, 2)))(q, k, v)
        assert all(np.isfinite(g).all() for g in grads)


@pytest.mark.parametrize("extra", [{"softcap": 20.0}, {"sinks": np.zeros(2, np.float32)}], ids=["softcap", "sinks"])
def test_padding_is_never_read(extra, path):
    q, k, v = normal((2, 12, 2, H), 0), normal((2, 5, 2, H), 1), normal((2, 5, 2, H), 2)
    lengths = np.array([3, 0], np.int32)
    k[0, 3:] = k[1] = v[0, 3:] = v[1] = np.nan

    def call(k, v):
        fn = functools.partial(dot_product_attention, key_value_seq_lengths=lengths, implementation=path, **extra)
        out, back = jax.vjp(fn, q, k, v)
        return out, back(jnp.ones_like(out))

    call = jax.jit(call)
    jax.tree.map(np.testing.assert_array_equal, call(k, v), call(np.nan_to_num(k), np.nan_to_num(v)))
    assert np.isfinite(call(k, v)[0]).all() and (call(k, v)[0][1] == 0).all()


def test_extremes(path):
    call = functools.partial(dot_product_attention, implementation=path)
    ones = np.ones((1, 8, 1, 4), np.float32)
    v = normal((1, 8, 1, 4), 1)
    np.testing.assert_array_equal(call(ones, ones[:, :1] * -131072, v[:, :1]), np.repeat(v[:, :1], 8, 1))  # one key
    np.testing.assert_allclose(call(ones, ones, v), np.repeat(v.mean(1, keepdims=True), 8, 1), atol=1e-6)
    np.testing.assert_allclose(call(ones, v, v, scale=0.0), np.repeat(v.mean(1, keepdims=True), 8, 1), atol=1e-6)
    far = np.where(np.arange(8) == 5, 1e4, 0).astype(np.float32)[None, :, None, None] * ones
    np.testing.assert_array_equal(call(ones, far, v), np.repeat(v[:, 5:6], 8, 1))
    mixed = np.where(np.arange(8) % 2, 0.7e38, -0.7e38).astype(np.float32)[None, :, None, None] * ones
    assert np.isfinite(call(ones, mixed, v, softcap=1.0)).all() and np.isfinite(call(ones, mixed, v)).all()
    # Scores far beyond the cap: weights e^1 and e^-1 to one another.
    want = (math.e * v[0, 1::2].sum(0) + v[0, ::2].sum(0) / math.e) / (4 * math.e + 4 / math.e)
    np.testing.assert_allclose(call(ones, far * 0 + np.sign(mixed) * 1e4, v, softcap=1.0)[0, 0], want, atol=1e-6)
    # float16 whose scores exceed float16.
    half = np.full((1, 8, 1, 128), 100.0, np.float16)
    out, lse = jax.jit(functools.partial(call, scale=1.0, return_residual=True))(half, half, half)
    np.testing.assert_array_equal(out, half)
    assert lse.dtype == np.float16


def test_scores_below_the_value_that_masks_in_jax_nn(path):
    """-0.7 of the largest float32: beside an extra, keys that may be attended to count however low their scores are."""
    array = lambda *numbers: np.asarray(numbers, np.float32).reshape(1, -1, 1, 1)
    call = {"is_causal": True, "scale": 1.0, "implementation": path}
    for extra in ({"alibi_slopes": np.zeros(1, np.float32)}, {"sinks": np.asarray([-np.inf], np.float32)}):
        out, lse = dot_product_attention(array(-3e38), array(1, 1), array(7, 5), **call, **extra, return_residual=True)
        assert out.item() == 7 and lse.item() == np.float32(-3e38)
        grad = jax.grad(lambda v, e=extra: dot_product_attention(array(-3e38), array(1, 1), v, **call, **e).sum())
        assert np.asarray(grad(array(7, 5))).ravel().tolist() == [1, 0]


@pytest.mark.parametrize("head_dim", [1, 24, 59, 111, 256])
def test_odd_head_dims(head_dim):
    args = [normal((1, 3, 2, head_dim), i) for i in range(3)]
    np.testing.assert_allclose(dot_product_attention(*args, softcap=9.0), oracle(*args, softcap=9.0)[0], atol=2e-5)


@pytest.mark.parametrize("extra", [{}, {"softcap": 2.0}], ids=["plain", "softcap"])
@pytest.mark.parametrize(("b", "t", "s"), [(0, 3, 3), (2, 0, 3), (2, 3, 0)])
def test_empty_arrays(b, t, s, extra, path):
    q, kv = np.ones((b, t, N, H), np.float32), np.ones((b, s, K, H), np.float32)
    out, lse = dot_product_attention(q, kv, kv, **extra, implementation=path, return_residual=True)
    np.testing.assert_array_equal(out, np.zeros((b, t, N, H)))
    np.testing.assert_array_equal(lse, np.full((b, t, N), -np.inf))


def test_without_batch_axis_and_from_numpy():
    q, k, v = normal((T, N, H), 0), normal((S, K, H), 1), normal((S, K, H), 2)
    for array in (q, k, v):
        array.setflags(write=False)
    kwargs = {"mask": np.tril(np.ones((T, S), bool)), "bias": normal((N, T, S), 3), "softcap": 3.0}
    out, lse = dot_product_attention(q, k, v, **kwargs, return_residual=True)
    want, want_lse, _ = oracle(q[None], k[None], v[None], **kwargs)
    np.testing.assert_allclose(out, want[0], atol=2e-5)
    np.testing.assert_allclose(lse, want_lse[0], atol=2e-5)
    strided = np.asfortranarray(q), np.repeat(k, 2, 0)[::2], v[::-1][::-1]
    np.testing.assert_array_equal(dot_product_attention(*strided, **kwargs), out)
    batched = jax.vmap(lambda q, k, v: dot_product_attention(q, k, v, **kwargs))(q[None], k[None], v[None])
    np.testing.assert_allclose(batched[0], out, atol=1e-6)


def test_float64():
    with jax.enable_x64(True):
        args = [normal(s, i, np.float64) for i, s in enumerate([(1, T, N, H), (1, S, K, H), (1, S, K, H)])]
        for kwargs in ({"implementation": "reference"}, {"softcap": 3.0}):
            out = dot_product_attention(*args, is_causal=True, **kwargs)
            kwargs.pop("implementation", None)
            assert out.dtype == np.float64
            np.testing.assert_allclose(out, oracle(*args, is_causal=True, **kwargs)[0], atol=1e-14)
    assert dot_product_attention(*args).dtype == jnp.float32  # as JAX: float64 needs x64


def test_alibi_is_a_bias_and_sinks_are_a_key_with_no_value(path):
    """Both extras said in terms of plain calls to jax.nn."""
    q, k, v = normal((B, T, N, H), 0), normal((B, S, N, H), 1), normal((B, S, N, H), 2)
    slopes = np.asarray(alibi_slopes(N))
    bias = slopes[:, None, None] * (np.arange(S)[None, :] - np.arange(T)[:, None]).astype(np.float32)
    call = functools.partial(dot_product_attention, implementation=path)
    np.testing.assert_allclose(call(q, k, v, alibi_slopes=slopes), jax_nn(q, k, v, bias), atol=2e-6)
    sinks = normal((N,), 3)
    extended = np.concatenate([np.zeros((N, T, S), np.float32), np.broadcast_to(sinks[:, None, None], (N, T, 1))], -1)
    zero = np.zeros((B, 1, N, H), np.float32)
    want = jax_nn(q, np.concatenate([k, zero], 1), np.concatenate([v, zero], 1), extended)
    np.testing.assert_allclose(call(q, k, v, sinks=sinks), want, atol=2e-6)


def test_the_residual_has_no_gradient(path):
    args = [normal(s, i) for i, s in enumerate([(1, T, N, H), (1, S, K, H), (1, S, K, H)])]
    call = functools.partial(dot_product_attention, softcap=4.0, implementation=path, return_residual=True)
    np.testing.assert_array_equal(jax.jit(jax.grad(lambda q: call(q, *args[1:])[1].sum()))(args[0]), 0)


# Long sequences -----------------------------------------------------------------------------------


@pytest.mark.parametrize("extra", [{}, {"softcap": 30.0}], ids=["plain", "softcap"])
def test_a_long_prompt_needs_no_array_of_all_scores(extra):
    """Compiled, not run: temporary memory of 32k tokens, forward and with gradients, against T * S floats."""
    length, heads = 32_768, 8
    q = jax.ShapeDtypeStruct((1, length, heads, 64), jnp.bfloat16)
    kv = jax.ShapeDtypeStruct((1, length, 2, 64), jnp.bfloat16)
    call = functools.partial(dot_product_attention, is_causal=True, **extra)
    gradient = jax.grad(lambda q, k, v: call(q, k, v).astype(jnp.float32).sum(), argnums=(0, 1, 2))
    all_scores = 4 * heads * length * length
    for fn in (call, gradient):
        temporary = jax.jit(fn).lower(q, kv, kv).compile().memory_analysis().temp_size_in_bytes
        assert temporary < all_scores / 32


def test_compiles_once_and_has_no_hidden_state():
    traces = []

    @jax.jit
    def step(q, k, v, lengths):
        traces.append(1)
        return dot_product_attention(q, k, v, key_value_seq_lengths=lengths, softcap=9.0)

    q, k, v = normal((2, 1, N, H), 0), normal((2, S, K, H), 1), normal((2, S, K, H), 2)
    for n in range(5):
        step(q, k, v, jnp.array([n, 5], jnp.int32))
    assert len(traces) == 1


# Implementations and bad input --------------------------------------------------------------------


def good():
    return {"query": normal((B, T, N, H), 0), "key": normal((B, S, K, H), 1), "value": normal((B, S, K, H), 2)}


def test_implementations_by_name():
    assert jax.default_backend() != "gpu"
    want = dot_product_attention(**good())
    np.testing.assert_array_equal(dot_product_attention(**good(), implementation=("cudnn", "mosaic_gpu", "xla")), want)
    np.testing.assert_allclose(dot_product_attention(**good(), implementation="reference"), want, atol=1e-6)
    for name, reason in {"cudnn": "GPU", "mosaic_gpu": "decode kernel", "mosaic_tpu": "decode kernel"}.items():
        with pytest.raises(UnsupportedError, match=reason):
            dot_product_attention(**good(), implementation=name)
    with pytest.raises(UnsupportedError, match="softcap"):
        dot_product_attention(**good(), implementation="cudnn", softcap=1.0)
    with pytest.raises(UnsupportedError, match=r"cudnn: .*mosaic_tpu: "):
        dot_product_attention(**good(), implementation=["cudnn", "mosaic_tpu"])


# (error, words in the message, changed arguments); what jax.nn also refuses is a ValueError there.
BAD = [
    (ConfigError, "'reference', 'xla', 'cudnn'", {"implementation": "flash"}),
    (ConfigError, "empty", {"implementation": ()}),
    (ShapeError, r"\(2, 9, 3, 8\)", {"key": normal((B, S, 3, H)), "value": normal((B, S, 3, H))}),
    (ShapeError, "value", {"value": normal((B, S, 1, H))}),
    (ShapeError, "value", {"value": normal((B, S + 1, K, H))}),
    (ShapeError, "value", {"value": normal((B, S, K, H + 1))}),
    (ShapeError, "B and H", {"query": normal((B + 1, T, N, H))}),
    (ShapeError, "B and H", {"query": normal((B, T, N, H + 1))}),
    (ShapeError, "must all be", {"query": normal((T, N, H))}),
    (ShapeError, "must all be", {n: normal((T, H)) for n in ("query", "key", "value")}),
    (ShapeError, "bias", {"bias": normal((B, N, T, S + 1))}),
    (ShapeError, "bias", {"bias": normal((1, B, N, T, S))}),
    (ShapeError, "mask", {"mask": np.ones((B, 3, T, S), bool)}),
    (ShapeError, "key_value_seq_lengths", {"key_value_seq_lengths": np.ones(3, np.int32)}),
    (ShapeError, "sinks", {"sinks": np.ones(K, np.float32)}),
    (ShapeError, "alibi_slopes", {"alibi_slopes": np.ones((1, N), np.float32)}),
    (DTypeError, "query.*int32", {"query": np.ones((B, T, N, H), np.int32)}),
    (DTypeError, "query.*bool", {"query": np.ones((B, T, N, H), bool)}),
    (DTypeError, "query.*complex", {"query": np.ones((B, T, N, H), np.complex64)}),
    (DTypeError, "query", {"query": "words"}),
    (DTypeError, "key.*bfloat16", {"key": jnp.ones((B, S, K, H), jnp.bfloat16)}),
    (DTypeError, "mask.*int32", {"mask": np.ones((T, S), np.int32)}),
    (DTypeError, "mask.*float32", {"mask": np.ones((T, S), np.float32)}),
    (DTypeError, "bias.*bool", {"bias": np.ones((T, S), bool)}),
    (DTypeError, "query_seq_lengths.*float32", {"query_seq_lengths": np.ones(B, np.float32)}),
    (DTypeError, "is_causal", {"is_causal": 1}),
    (DTypeError, "softcap", {"softcap": True}),
    (DTypeError, "local_window_size", {"local_window_size": True}),
    (DTypeError, "local_window_size", {"local_window_size": (1.5, 0)}),
    (ConfigError, "local_window_size", {"local_window_size": (1, 2, 3)}),
    (RangeError, "local_window_size", {"local_window_size": (-1, 0)}),
    (RangeError, "scale", {"scale": math.nan}),
    (RangeError, "scale", {"scale": jnp.inf}),
    (RangeError, "scale", {"scale": 1e39}),
    (ShapeError, "scale", {"scale": np.ones(H, np.float32)}),
    (DTypeError, "scale", {"scale": "a"}),
    *[(RangeError, "softcap", {"softcap": c}) for c in (0, 0.0, -1.0, math.nan, math.inf, 1e39)],
    (ShapeError, "softcap", {"softcap": [3.0]}),
    *[(RangeError, "sinks", {"sinks": [x, 0, 0, 0]}) for x in (math.nan, math.inf)],
    *[(RangeError, "alibi_slopes", {"alibi_slopes": [0, x, 0, 0]}) for x in (math.nan, math.inf, -math.inf)],
    (RangeError, "query_seq_lengths", {"query_seq_lengths": np.array([-1, 3], np.int32)}),
    (RangeError, r"\[0, 9\], got 10", {"key_value_seq_lengths": np.array([3, S + 1], np.int32)}),
    (RangeError, r"\+inf", {"bias": np.full((T, S), np.inf, np.float32)}),
]


@pytest.mark.wrong_types
@pytest.mark.parametrize(("error", "words", "changed"), BAD, ids=[f"{w[:12]}-{i}" for i, (_, w, _) in enumerate(BAD)])
def test_bad_input(error, words, changed):
    with pytest.raises(error, match=words) as raised:
        dot_product_attention(**good() | changed)
    assert isinstance(raised.value, KVAttnError)
    try:
        jax_nn(**good() | changed)
    except ValueError:
        assert isinstance(raised.value, ValueError)
    except Exception:  # jax.nn fails in some other way
        pass


def test_a_constant_bias_may_be_looked_at_inside_jit():
    """An array of JAX that the traced function closes over, not an argument of it."""
    args, bias = good(), normal((N, T, S), 3)
    call = lambda bias: jax.jit(lambda query: dot_product_attention(**args | {"query": query}, bias=bias))(
        args["query"]
    )
    np.testing.assert_array_equal(call(jnp.asarray(bias)), call(bias))
    with pytest.raises(RangeError, match=r"\+inf"):
        call(jnp.full((T, S), jnp.inf))


@pytest.mark.wrong_types
def test_traced_settings_are_named():
    args = good()
    for name, words in (("softcap", "softcap"), ("is_causal", "is_causal"), ("local_window_size", "local_window_size")):
        with pytest.raises(ConfigError, match=words):
            jax.jit(lambda x, name=name: dot_product_attention(**args, **{name: x}))(1)
    with pytest.raises(ShapeError, match="scale"):
        jax.jit(lambda scale: dot_product_attention(**args, scale=scale))(np.ones(H, np.float32))
    key = jax.random.key(0)
    with pytest.raises(DTypeError, match="query"):
        dot_product_attention(key, args["key"], args["value"])
    # A traced scale is fine, and so is its gradient.
    assert np.isfinite(jax.jit(jax.grad(lambda s: dot_product_attention(**args, scale=s, softcap=3.0).sum()))(0.3))
