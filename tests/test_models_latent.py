"""Decoders with latent attention: against the decoder of `decoder_oracle.py`, and in all that decoders are used for."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_models
from decoder_oracle import logits_of
from flax import nnx

import kvattn
from kvattn import errors
from kvattn.layers import MultiHeadLatentAttention, stateless
from kvattn.models import Decoder, DecoderConfig, convert_to_gqa, generate, load, save, score
from kvattn.serving import Engine

V = 61
SIZES = dict(vocab_size=V, model_dim=24, num_layers=2, num_heads=4, mlp_dim=40, norm_epsilon=1e-3)
LATENT = dict(kv_lora_rank=12, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=8, latent_norm_epsilon=1e-2)
LITE = DecoderConfig(**SIZES, **LATENT)
LARGE = dataclasses.replace(
    LITE, q_lora_rank=10, rope_interleaved=True, attention_scale=0.4, softcap=4.0, windows=(None, 5), qkv_bias=True,
    out_bias=True,
)  # fmt: skip
CACHED = LITE.kv_lora_rank + LITE.qk_rope_head_dim
FAST = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
LENGTHS = (13, 6)
ROWS = [[5, 17, 3, 8, 9, 2, 44, 60, 31, 7, 7, 21, 19], [11, 2, 50, 33, 12, 6]]


@functools.cache
def model_of(config=LITE):
    model = small_models.decoder(config, 0.3)
    apply, weights = stateless(model)
    return model, functools.partial(jax.jit(apply, donate_argnames="cache", compiler_options=FAST), weights)


def through(call, cache, size):
    """Logits of the ragged rows, `size` tokens of each at a time."""
    out = []
    for start in range(0, max(LENGTHS), size):
        chunk, count = np.zeros((2, size), np.int32), []
        for row, tokens in zip(chunk, ROWS, strict=True):
            given = tokens[start : start + size]
            row[: len(given)] = given
            count.append(len(given))
        logits, cache = call(jnp.asarray(chunk), cache, jnp.asarray(count, jnp.int32))
        out.append(np.asarray(logits))
    for layer in cache:
        assert layer.check().lengths.tolist() == list(LENGTHS)
    return np.concatenate(out, axis=1)


def assert_logits(logits, model, policy=None, codec=None, tolerance=1e-4):
    for row, tokens in enumerate(ROWS):
        expected, _ = logits_of(model, tokens, policy, codec)
        np.testing.assert_allclose(logits[row, : len(tokens)], expected, atol=tolerance * expected.std())


@pytest.mark.slow
def test_whole_rows():
    """Keys and values of every head, materialised."""
    for config in (LITE, LARGE):
        model, call = model_of(config)
        padded = np.zeros((2, max(LENGTHS)), np.int32)
        for row, tokens in zip(padded, ROWS, strict=True):
            row[: len(tokens)] = tokens
        logits, none = call(jnp.asarray(padded))
        assert none is None
        assert_logits(np.asarray(logits), model)


@pytest.mark.parametrize("config", [pytest.param(LITE, marks=pytest.mark.slow), LARGE], ids=["lite", "large"])
def test_chunks(config):
    """Absorbed."""
    model, call = model_of(config)
    assert isinstance(model.layers[0].attention, MultiHeadLatentAttention)
    assert (model.layers[0].attention.kv_down.bias is not None) == config.qkv_bias
    assert_logits(through(call, model.make_cache(2, 16), 7), model)


OPTIONS = {
    "window": dict(policy=kvattn.SlidingWindow(6)),
    "StreamingLLM": dict(policy=kvattn.StreamingLLM(2, 4)),
    "H2O": dict(policy=kvattn.H2O(4, 3)),
    "Int8": dict(codec=kvattn.Int8()),
    "Full": {},
}


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) for name in OPTIONS])
def test_token_by_token(name):
    options = OPTIONS[name]
    config = dataclasses.replace(LARGE, windows=6 if name == "window" else None)
    model, call = model_of(config)
    logits = through(call, model.make_cache(2, 16, **options), 1)
    oracle = {} if name == "window" else options
    assert_logits(logits, model, **oracle, tolerance=0.02 if "codec" in options else 1e-4)
    if name != "Full":
        with pytest.raises(AssertionError):
            assert_logits(logits, model_of(dataclasses.replace(config, windows=None))[0])


@pytest.mark.slow
@pytest.mark.parametrize("codec", [kvattn.Float8(), kvattn.Int4(4)], ids=str)
@pytest.mark.parametrize("policy", [kvattn.Scissorhands(8), kvattn.FastGen(), kvattn.Chunked(4), None], ids=str)
def test_every_option_runs(policy, codec):
    """Half the bits leave what comes out close; a policy that lets go is compared with itself as it is."""
    model, call = model_of()
    tokens = jnp.asarray([ROWS[0]], jnp.int32)
    found = [np.asarray(call(tokens, model.make_cache(1, 16, policy=policy, codec=c))[0]) for c in (None, codec)]
    assert 0 < np.sqrt(np.mean((found[0] - found[1]) ** 2)) < 0.3 * found[0].std()


def test_bytes_and_refusals():
    """One key of C + R numbers a token, nothing else but a row's length and status."""
    model, _ = model_of()
    cache = model.make_cache(2, 16)
    assert [layer.nbytes for layer in cache] == [2 * (16 * CACHED * 4 + 8)] * 2
    paged = model.make_paged_cache(5, 4, batch_size=2, max_length=16)
    assert [layer.nbytes for layer in paged] == [5 * 4 * CACHED * 4 + 2 * (4 * 4 + 8)] * 2
    with pytest.raises(errors.UnsupportedError, match="KIVI"):
        model.make_cache(1, 16, codec=kvattn.KIVI(2, 4, 16))
    for given in (model, nnx.state(model), nnx.to_pure_dict(nnx.state(model))):
        with pytest.raises(errors.UnsupportedError, match=r"layers\.0\.attention.*latent attention \(MLA\)"):
            convert_to_gqa(given, 1)
    with pytest.raises(errors.UnsupportedError, match="attention_fn"):
        Decoder(LITE, attention_fn=nnx.dot_product_attention, rngs=nnx.Rngs(0))


CONFIG_ERRORS = {
    "half of it": ({"v_head_dim": None}, errors.ConfigError, "v_head_dim is missing"),
    "a latent of queries alone": (
        {**dict.fromkeys(("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")), "q_lora_rank": 4},
        errors.ConfigError, "kv_lora_rank and qk_nope_head_dim",
    ),
    "heads": ({"num_kv_heads": 4}, errors.ConfigError, "leave num_kv_heads out"),
    "size": ({"head_dim": 10}, errors.ConfigError, "= 16 numbers"),
    "odd": ({"qk_rope_head_dim": 3}, errors.ConfigError, "even"),
    "norm": ({"qk_norm": True, "sinks": True}, errors.ConfigError, "qk_norm, sinks"),
    "biases": ({"out_bias": True}, errors.ConfigError, "or none"),
    "alibi": ({"positions": "alibi"}, errors.ConfigError, "positions='rope'"),
    "float": ({"kv_lora_rank": 8.0}, errors.DTypeError, "kv_lora_rank"),
    "nothing": ({"q_lora_rank": 0}, errors.ConfigError, "q_lora_rank must be >= 1"),
    "epsilon": ({"latent_norm_epsilon": -1.0}, errors.RangeError, "latent_norm_epsilon"),
}  # fmt: skip


@pytest.mark.wrong_types
@pytest.mark.parametrize("name", CONFIG_ERRORS)
def test_settings_are_checked_together(name):
    changes, error, words = CONFIG_ERRORS[name]
    with pytest.raises(error, match=words):
        DecoderConfig(**{**SIZES, **LATENT, **changes})


def test_saved_and_loaded(tmp_path):
    model, call = model_of(LARGE)
    again = load(save(model, tmp_path / "model.safetensors"))
    assert again.config == LARGE
    tokens = jnp.asarray(ROWS[:1], jnp.int32)
    apply, weights = stateless(again)
    np.testing.assert_array_equal(jax.jit(apply, compiler_options=FAST)(weights, tokens)[0], call(tokens)[0])


@pytest.mark.slow
def test_a_bias_that_chooses_stays_float32(tmp_path):
    """In a model of bfloat16 too, saved and loaded; unless it is stored in fewer bits, which works too."""
    experts = {"num_experts": 4, "experts_per_token": 2, "expert_kind": "gated", "expert_dim": 8, "expert_bias": True}
    config = dataclasses.replace(LITE, num_layers=1, **experts, router_float32=True)
    model = Decoder(config, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    bias = lambda model: model.layers[0].mlp.score_bias[...]
    model.layers[0].mlp.score_bias[...] = jnp.asarray([0.0, 1.0, 1.0001, 0.5])
    path = save(model, tmp_path / "model.safetensors")
    for again in (load(path), load(path, dtype=jnp.bfloat16)):
        np.testing.assert_array_equal(bias(again), bias(model))
        assert again.layers[0].mlp.up.dtype == again.embed.embedding.dtype == jnp.bfloat16
    less = load(save(model, tmp_path / "less.safetensors", dtype=jnp.bfloat16))
    assert bias(less).dtype == jnp.bfloat16
    logits, _ = jax.jit(lambda tokens: less(tokens), compiler_options=FAST)(jnp.asarray(ROWS[:1]))
    assert np.isfinite(logits).all()


def test_a_decode_step_works_in_place():
    """All of the caches are aliased; what is needed besides is a few blocks, however long they are."""
    sizes = {"num_layers": 1, "model_dim": 16, "num_heads": 2, "mlp_dim": 16, "kv_lora_rank": 60}
    config = DecoderConfig(**{**SIZES, **LATENT, **sizes})
    graph, state = nnx.split(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))))
    cache = jax.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)).make_cache(1, 1 << 16))
    step = jax.jit(lambda state, tokens, cache: nnx.merge(graph, state)(tokens, cache), donate_argnums=2)
    memory = step.lower(state, jax.ShapeDtypeStruct((1, 1), jnp.int32), cache).compile(FAST).memory_analysis()
    own = sum(layer.nbytes for layer in cache)
    assert own == (1 << 16) * 64 * 4 + 8
    assert memory.alias_size_in_bytes >= own and memory.temp_size_in_bytes < 0.05 * own


@pytest.mark.slow
def test_generated_scored_and_served():
    """The engine's tokens and log-probabilities are those of `generate` alone, and those of `score`."""
    model, _ = model_of(LARGE)
    prompts = [ROWS[0], ROWS[1], [*ROWS[0][:10], 4]]
    expected = [generate(model, [p], 9, capacity=32, prefill_chunk=8, return_logprobs=True) for p in prompts]
    engine = Engine(model, num_pages=40, page_size=4, max_batch=2, max_length=32, prefill_chunk=8)
    requests = [engine.submit(prompt, 9) for prompt in prompts]
    done = engine.run()
    for prompt, request, (tokens, logprobs) in zip(prompts, requests, expected, strict=True):
        assert done[request] == tokens
        np.testing.assert_allclose(request.logprobs[0], logprobs[0], atol=2e-5)
        (scored,) = score(model, [[*prompt, *tokens[0]]])
        np.testing.assert_allclose(scored[-9:], logprobs[0], atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("by", ["batch", "sequence"])
@pytest.mark.parametrize("kind", [jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit])
def test_on_a_mesh(by, kind):
    """Parameters by heads, the cache by rows or slots."""
    mesh = jax.make_mesh((1, 2), ("data", "model"), axis_types=(kind, kind))
    model, split = (Decoder(LARGE, rngs=nnx.Rngs(0), **on) for on in ({}, {"mesh": mesh, "by": by}))
    kernel = split.layers[0].attention.query_up.kernel[...]
    assert {shard.data.shape for shard in kernel.addressable_shards} == {(10, 2, 10)}
    cache = split.make_cache(2, 16)
    shards = {shard.data.nbytes for shard in cache[0].keys["data"].addressable_shards}
    assert shards == {cache[0].keys["data"].nbytes // 2}
    found = []
    for each in (model, split):
        apply, weights = stateless(each)
        step = functools.partial(jax.jit(apply, donate_argnames="cache", compiler_options=FAST), weights)
        found.append(through(step, each.make_cache(2, 16), 4))
    np.testing.assert_allclose(*found, atol=1e-4 * found[0].std())
