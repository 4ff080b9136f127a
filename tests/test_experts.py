"""Experts one token at a time in NumPy, and what of them a compiled step reads."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoder_oracle import routed
from flax import nnx

from kvattn import errors
from kvattn.models import Decoder, DecoderConfig, experts
from kvattn.models.experts import Experts
from kvattn.models.parameters import parameters_of
from kvattn.models.placement import Split

D, F, E, CHOSEN = 8, 6, 5, 2
FAST = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
KINDS = {
    "gpt_oss": {"expert_kind": "gpt_oss", "expert_limit": 0.7},
    "mixtral": {"expert_kind": "gated"},
    "qwen": {"expert_kind": "gated", "expert_shares": "all", "shared_expert_dim": 7, "shared_expert_gate": True},
    "shared": {"expert_kind": "gated", "shared_expert_dim": 7, "activation": "gelu_tanh"},
    "deepseek v2": {
        "expert_kind": "gated", "expert_shares": "all", "expert_scale": 1.7, "shared_expert_dim": 7,
        "num_experts": 12, "experts_per_token": 3, "expert_groups": 4, "groups_per_token": 2, "router_float32": True,
    },
    "deepseek v3": {
        "expert_kind": "gated", "expert_scores": "sigmoid", "expert_scale": 2.5, "expert_bias": True,
        "num_experts": 12, "experts_per_token": 4, "expert_groups": 3, "groups_per_token": 2, "group_best": 2,
    },
    "sigmoid": {
        "expert_kind": "gated", "expert_scores": "sigmoid", "expert_shares": "all", "expert_bias": True,
        "num_experts": 4, "experts_per_token": 3,
    },
    "two of a softmax": {
        "expert_kind": "gated", "num_experts": 8, "experts_per_token": 2, "expert_groups": 2, "group_best": 2,
    },
}  # fmt: skip


def layer_of(kind, seed=0, **sizes):
    sizes = {"model_dim": D, "mlp_dim": F, "num_experts": E, "experts_per_token": CHOSEN} | sizes | KINDS[kind]
    config = DecoderConfig(vocab_size=8, num_layers=1, num_heads=2, **sizes)
    layer = Experts(config, Split(), dtype=None, param_dtype=jnp.float32, rngs=nnx.Rngs(seed))
    draw = np.random.default_rng(seed)
    state = nnx.state(layer, nnx.Param)
    drawn = jax.tree.map(lambda x: jnp.asarray(draw.normal(size=x.shape, scale=0.7), x.dtype), state)
    nnx.update(layer, drawn)
    return layer, config


def apply(layer, x):
    """Compiled: one by one its operations would take longer."""
    graph, state = nnx.split(layer)
    call = jax.jit(lambda state, x: nnx.merge(graph, state)(x), compiler_options=FAST)
    return np.asarray(call(state, jnp.asarray(x)))


def silu(x):
    return x / (1 + np.exp(-x))


def expected(layer, config, x):
    """One token at a time, one expert at a time, in float64."""
    w = {name: np.asarray(p, np.float64) for name, p in parameters_of(layer).items()}
    act = silu if config.activation == "silu" else lambda y: y * (1 + np.tanh(0.7978845608 * (y + 0.044715 * y**3))) / 2
    out = np.zeros(x.shape)
    for at in np.ndindex(x.shape[:-1]):
        token = np.asarray(x[at], np.float64)
        scores = token @ w["router.kernel"] + w.get("router.bias", 0)
        best, shares = routed(config, scores, w.get("score_bias", 0))
        for share, e in zip(shares, best, strict=True):
            gate, up = token @ w["gate"][e], token @ w["up"][e]
            if config.expert_kind == "gpt_oss":
                limit = config.expert_limit
                gate = np.minimum(gate + w["gate_bias"][e], limit)
                up = np.clip(up + w["up_bias"][e], -limit, limit)
                hidden = (up + 1) * gate / (1 + np.exp(-config.expert_alpha * gate))
            else:
                hidden = act(gate) * up
            out[at] += share * (hidden @ w["down"][e] + (w["down_bias"][e] if "down_bias" in w else 0))
        if config.shared_expert_dim:
            y = (act(token @ w["shared.gate.kernel"]) * (token @ w["shared.up.kernel"])) @ w["shared.down.kernel"]
            gate = 1 / (1 + np.exp(-token @ w["shared_gate.kernel"])) if config.shared_expert_gate else 1
            out[at] += gate * y
    return out


def numbers(*shape, seed=1):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("kind", KINDS)
def test_experts_one_by_one(kind, monkeypatch):
    """Blocks of three tokens, several of an expert, the last of them short; and all tokens in one block."""
    layer, config = layer_of(kind)
    x = numbers(2, 11, D)
    for rows in (3, 128):
        monkeypatch.setattr(experts, "BLOCK_ROWS", rows)
        np.testing.assert_allclose(apply(layer, x), expected(layer, config, x), atol=2e-5)
    assert apply(layer, np.zeros((0, 3, D), np.float32)).shape == (0, 3, D)


@pytest.mark.parametrize("rows", [1, 2, 128])
def test_tokens_that_agree(rows, monkeypatch):
    """All tokens to the same experts, which then have several blocks and the others none."""
    monkeypatch.setattr(experts, "BLOCK_ROWS", rows)
    layer, config = layer_of("gpt_oss")
    layer.router.bias[...] = layer.router.bias[...] + jnp.asarray([0.0, 0.0, 50.0, 0.0, 60.0])
    x = numbers(1, 7, D)
    np.testing.assert_allclose(apply(layer, x), expected(layer, config, x), atol=2e-5)


def test_what_nobody_chose_is_not_read():
    """NaN in it reaches no token; and a row of NaN reaches no other."""
    layer, _ = layer_of("gpt_oss")
    layer.router.bias[...] = jnp.asarray([0.0, -90.0, 0.0, 0.0, -90.0])
    x = numbers(3, 4, D)
    want = apply(layer, x)
    for p in (layer.gate, layer.up, layer.down, layer.down_bias):
        p[...] = p[...].at[jnp.asarray([1, 4])].set(jnp.nan)
    np.testing.assert_array_equal(apply(layer, x), want)
    x[1] = np.nan
    np.testing.assert_array_equal(apply(layer, x)[[0, 2]], want[[0, 2]])


GROUPS = {
    "no divisor": ({"expert_groups": 5}, "expert_groups .5. must divide num_experts"),
    "too many groups": ({"expert_groups": 4, "groups_per_token": 5}, "at most expert_groups"),
    "a group's best": ({"expert_groups": 4, "groups_per_token": 2, "group_best": 4}, "at most the 3 experts"),
    "too few experts": ({"expert_groups": 4, "groups_per_token": 1}, "at most the 3 experts of the 1 groups"),
    "without experts": ({"num_experts": 0, "experts_per_token": 0, "expert_groups": 2}, "must divide num_experts"),
}


@pytest.mark.parametrize("name", GROUPS)
def test_groups_are_checked(name):
    changes, words = GROUPS[name]
    sizes = {"num_experts": 12, "experts_per_token": 4, "expert_kind": "gated"} | changes
    with pytest.raises(errors.ConfigError, match=words):
        DecoderConfig(vocab_size=8, model_dim=8, mlp_dim=6, num_layers=1, num_heads=2, **sizes)


def test_a_router_in_float32():
    """Scores that bfloat16 could not tell apart decide: the last experts are better by a ten-thousandth each."""
    _, config = layer_of("deepseek v3")
    wide = dataclasses.replace(config, router_float32=True)
    x, found = jnp.ones((1, 1, D), jnp.bfloat16), []
    for each in (wide, config):
        layer = Experts(each, Split(), dtype=jnp.bfloat16, param_dtype=jnp.float32, rngs=nnx.Rngs(0))
        kernel = np.zeros((D, 12), np.float32)
        kernel[0] = 1 + np.arange(12) * 1e-4
        layer.router.kernel[...] = jnp.asarray(kernel)
        scores = layer.router(x.astype(jnp.float32) if each.router_float32 else x)[0]
        found.append(sorted(layer._chosen(scores, layer.score_bias[...])[1][0].tolist()))
        assert apply(layer, x).dtype == jnp.bfloat16
    assert found[0] == [8, 9, 10, 11] != found[1]


def test_gradients_are_those_of_a_sum_over_all_experts():
    layer, _ = layer_of("mixtral")
    graph, state = nnx.split(layer)
    x = jnp.asarray(numbers(1, 6, D))

    def over_all(layer, x):
        scores, chosen = jax.lax.top_k(layer.router(x), CHOSEN)
        shares = jnp.sum(jax.nn.one_hot(chosen, E) * jax.nn.softmax(scores)[..., None], axis=-2)
        each = lambda name, y, spec: jnp.einsum(spec, y, getattr(layer, name)[...])
        hidden = jax.nn.silu(each("gate", x, "btd,edf->btef")) * each("up", x, "btd,edf->btef")
        return jnp.einsum("btef,efd,bte->btd", hidden, layer.down[...], shares)

    loss = lambda apply: lambda state, x: jnp.sum(jnp.sin(apply(nnx.merge(graph, state), x)))
    got = jax.jit(jax.grad(loss(lambda layer, x: layer(x)), argnums=(0, 1)))(state, x)
    want = jax.jit(jax.grad(loss(over_all), argnums=(0, 1)))(state, x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got, want)


# What is read --------------------------------------------------------------------------------------------------------

MIXTRAL = {
    "model_dim": 128, "mlp_dim": 448, "num_experts": 8, "experts_per_token": 2, "expert_kind": "gated",
    "num_kv_heads": 2,
}  # fmt: skip
"""A thirty-second of its sizes."""
DEEPSEEK = MIXTRAL | {
    "expert_scores": "sigmoid", "expert_bias": True, "expert_groups": 4, "groups_per_token": 2, "group_best": 2,
    "shared_expert_dim": 64, "router_float32": True, "kv_lora_rank": 32, "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8, "v_head_dim": 16, "num_kv_heads": None,
}  # fmt: skip
"""As many experts of the same sizes, in groups, and one more that every token reads."""


@pytest.mark.parametrize(
    ("like", "rows", "read"), [(MIXTRAL, 1, 2), (MIXTRAL, 3, 6), (MIXTRAL, 16, 8), (DEEPSEEK, 1, 2)],
    ids=["mixtral-1", "mixtral-3", "mixtral-16", "deepseek-1"],
)  # fmt: skip
def test_a_decode_step_reads_the_chosen_experts(like, rows, read):
    """From the compiled program: products with one expert's kernel, as often as experts may be chosen, at most all."""
    config = DecoderConfig(vocab_size=32, num_layers=1, num_heads=4, **like)
    model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    graph, state = nnx.split(model)
    cache = jax.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)).make_cache(rows, 16))
    tokens = jax.ShapeDtypeStruct((rows, 1), jnp.int32)
    step = jax.jit(lambda state, cache, tokens: nnx.merge(graph, state)(tokens, cache), donate_argnums=1)
    compiled = step.lower(state, cache, tokens).compile()
    text = compiled.as_text()
    # Kernels of all experts are looked at by slices only; nothing computes with one as a whole.
    whole = re.compile(r"f32\[8,(128,448|448,128)\]")
    moves = ("parameter(", "get-tuple-element(", "tuple(", "while(", "dynamic-slice(", "bitcast(", "fusion(", "call(")
    lines = [line for line in text.splitlines() if "= " in line and whole.search(line)]
    assert lines and all(any(move in line for move in moves) for line in lines), lines
    loops = [line for line in text.splitlines() if " while(" in line and whole.search(line)]
    (loop,) = loops
    assert re.search(rf'known_trip_count":\{{"n":"{read}"', loop), loop
    products = [line for line in text.splitlines() if re.search(r" dot\(|custom-call|__onednn|convolution\(", line)]
    assert products and not any(whole.search(line) for line in products)
    # The analysis counts the body of a loop once: a slice that is read and written, and the product that reads it.
    each = 3 * 128 * 448 * 4
    read_once = compiled.cost_analysis()["bytes accessed"]
    assert 1.4 * read_once < 8 * each
