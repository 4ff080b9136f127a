"""Checkpoints of other libraries: every family against what transformers computes with the same files.

`golden/hf_generate.py` made the checkpoints and the numbers. The quick tests take the plain form of each family; what
else its flags can say, and the policies of the other families, are slow.
"""

import dataclasses
import functools
import pathlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoder_oracle import logits_of
from flax import nnx

import kvattn
from kvattn.families import rules
from kvattn.layers import stateless
from kvattn.models import FAMILIES, Decoder, DecoderConfig, from_pretrained

GOLDEN = pathlib.Path(__file__).parent / "golden" / "hf"
PLAIN = (
    "bloom", "falcon40b", "falcon7b", "gemma2", "gemma3", "gemma4", "gpt2", "gpt_bigcode", "gpt_oss", "llama2",
    "llama3", "mistral", "mpt", "opt", "qwen2", "qwen3",
)  # fmt: skip
VARIANTS = (
    "bloom_post", "falcon11b", "falcon_rw", "gemma3_scaled", "gpt2_scaled", "gpt_bigcode_mha", "llama_biases",
    "llama_yarn", "mistral_full", "mpt_clip", "opt350m", "qwen2_window",
)  # fmt: skip
LATER = (
    "cohere2", "deepseek_v2", "deepseek_v3", "gemma", "gemma3_images", "gemma4_images", "glm4", "gpt_neox", "granite",
    "llama4", "llama4_images", "minicpm3", "mistral3_images", "mixtral", "olmo2", "phi3", "qwen2_moe", "qwen3_moe",
    "smollm3", "stablelm", "starcoder2",
)  # fmt: skip
LATER_VARIANTS = (
    "cohere2_biases", "deepseek_v2_groups", "deepseek_v3_halves", "gemma4_experts", "gemma4_plain", "gemma_biases",
    "glm4_plain", "gpt_neox_serial", "granite_biases", "llama4_plain", "minicpm3_plain", "mixtral_window",
    "olmo2_biases", "phi3_short", "qwen2_moe_mixed", "qwen3_moe_mixed", "smollm3_window", "stablelm_parallel",
    "starcoder2_plain",
)  # fmt: skip
BY_LENGTH = ("phi3_long",)
"""Rows on both sides of the length at which frequencies change: whole prompts only, as transformers has them."""
ALL = (*PLAIN, *VARIANTS, *LATER, *LATER_VARIANTS)
FAST = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
"""Compiling takes longer than running here."""
TOLERANCE = 2e-4
B, T = 3, 23


@functools.cache
def family(name):
    """The model, its jitted call, and the golden numbers."""
    model = from_pretrained(GOLDEN / name)
    apply, weights = stateless(model)
    call = jax.jit(apply, donate_argnames="cache", compiler_options=FAST)
    with np.load(GOLDEN / name / "golden.npz") as golden:
        return model, functools.partial(call, weights), dict(golden)


def some(*quick, of=ALL):
    """Every family; all but the named are slow."""
    return [pytest.param(name, marks=() if name in quick else pytest.mark.slow) for name in of]


EVERY = some(*PLAIN, "deepseek_v3", "mixtral", "olmo2")


def real(golden):
    """bool [B, T]: the tokens that are no padding."""
    return np.arange(T)[None] < golden["lengths"][:, None]


def assert_logits(logits, golden, where=None):
    where = real(golden) if where is None else where
    spread = golden["logits"][real(golden)].std()
    error = np.abs(np.asarray(logits) - golden["logits"])[where].max()
    assert error <= TOLERANCE * spread, f"{error / spread:.2e} of the logits' deviation"


def test_every_golden_is_tested():
    folders = {path.name for path in GOLDEN.iterdir() if path.is_dir()}
    assert folders == {*ALL, *BY_LENGTH}


@pytest.mark.parametrize("name", some(*PLAIN, *VARIANTS, *LATER))
def test_whole_prompts(name):
    _, call, golden = family(name)
    logits, cache = call(jnp.asarray(golden["prompts"]))
    assert cache is None and logits.dtype == jnp.float32
    assert_logits(logits, golden)


def test_longrope_goes_by_the_length_of_each_row():
    """12 tokens are the most of a short row here: one row of the batch is, the others are long, pads or not."""
    model, call, golden = family("phi3_long")
    assert sorted(golden["lengths"] > 12) == [False, True, True]
    given = jnp.asarray(golden["prompts"]), None, jnp.asarray(golden["lengths"])
    assert_logits(call(*given)[0], golden)
    assert_logits(call(given[0], model.make_cache(B, T), given[2])[0], golden)
    with pytest.raises(AssertionError, match="deviation"):
        assert_logits(call(given[0])[0], golden)  # as if pads were tokens
    # A long row whose first tokens came alone keeps their frequencies; a short one is the same in any chunks.
    logits, _ = through(call, model.make_cache(B, T), golden, 8)
    short = real(golden) & (golden["lengths"] <= 12)[:, None]
    assert_logits(logits, golden, short)
    with pytest.raises(AssertionError, match="deviation"):
        assert_logits(logits, golden)


def through(call, cache, golden, size):
    """Logits [B, T, V] of the prompts, `size` tokens of every row at a time, and the caches then."""
    prompts, lengths, out = golden["prompts"], golden["lengths"], []
    for start in range(0, T, size):
        chunk = np.zeros((B, size), np.int32)
        given = prompts[:, start : start + size]
        chunk[:, : given.shape[1]] = given
        logits, cache = call(jnp.asarray(chunk), cache, jnp.asarray(np.clip(lengths - start, 0, size)))
        out.append(np.asarray(logits)[:, : given.shape[1]])
    for layer in cache:
        assert layer.check().lengths.tolist() == lengths.tolist()
    return np.concatenate(out, axis=1), cache


@pytest.mark.parametrize("name", EVERY)
def test_chunks_and_what_follows(name):
    """The ragged batch in chunks, then the most probable token of every row, step by step."""
    model, call, golden = family(name)
    lengths, steps = golden["lengths"], golden["greedy"].shape[1]
    logits, cache = through(call, model.make_cache(B, T + steps), golden, 8)
    assert_logits(logits, golden)
    last = np.take_along_axis(logits, lengths[:, None, None] - 1, axis=1)[:, 0]
    spread = golden["logits"][real(golden)].std()
    sure = np.ones(B, bool)  # the rows whose tokens so far are those of the golden run
    ones = jnp.ones((B,), jnp.int32)
    for step in range(steps):
        sure &= golden["margins"][:, step] > TOLERANCE * spread
        token = last.argmax(-1)
        np.testing.assert_array_equal(token[sure], golden["greedy"][sure, step])
        logits, cache = call(jnp.asarray(token, jnp.int32)[:, None], cache, ones)
        last = np.asarray(logits)[:, 0]
    assert sure.any()
    for layer in cache:
        assert layer.check().lengths.tolist() == (lengths + steps).tolist()


@pytest.mark.parametrize("name", some(*PLAIN))
def test_token_by_token(name):
    model, call, golden = family(name)
    logits, _ = through(call, model.make_cache(B, T + golden["greedy"].shape[1]), golden, 1)
    assert_logits(logits, golden)


@pytest.mark.parametrize("name", some("gemma2", "opt"))
def test_a_ragged_batch_at_once(name):
    model, call, golden = family(name)
    logits, _ = through(call, model.make_cache(B, T + golden["greedy"].shape[1]), golden, T)
    assert_logits(logits, golden)


def test_layers_keep_caches_of_their_own_size():
    slots = {name: [layer.num_slots for layer in family(name)[0].make_cache(B, T)] for name in ("gemma3", "gpt_oss")}
    assert slots == {"gemma3": [5, 5, T], "gpt_oss": [5, T]}
    assert [layer.num_slots for layer in family("mistral")[0].make_cache(B)] == [5, 5]  # needs no capacity


# Policies and codecs ------------------------------------------------------------------------------


def beside_chunks(model, policy):
    """A policy that goes with chunks, which go by true positions."""
    moves = isinstance(policy, kvattn.StreamingLLM) and any(model.config.layer_chunks)
    return dataclasses.replace(policy, positions_in="original") if moves else policy


@pytest.mark.parametrize("name", some("gemma2"))
@pytest.mark.parametrize("policy", [kvattn.StreamingLLM(4, T), kvattn.H2O(12, 12)], ids=["StreamingLLM", "H2O"])
def test_a_budget_that_holds_all_is_full(name, policy):
    model, call, golden = family(name)
    policy = beside_chunks(model, policy)
    for size in (1, T):
        logits, _ = through(call, model.make_cache(B, policy=policy), golden, size)
        assert_logits(logits, golden)


@pytest.mark.parametrize("name", [*some("bloom", "gemma2", "gemma4", "gpt_oss", "opt"), *some(of=BY_LENGTH)])
@pytest.mark.parametrize(
    ("policy", "codec"),
    [(None, None), (kvattn.StreamingLLM(2, 4), None), (kvattn.H2O(4, 4), None), (None, kvattn.Int8())],
    ids=["Full", "StreamingLLM", "H2O", "Int8"],
)
def test_small_budgets_are_lists_of_tokens(name, policy, codec):
    """Token by token against the decoder of `decoder_oracle.py`, which also is a second opinion of the whole model."""
    model, call, golden = family(name)
    policy = beside_chunks(model, policy)
    if codec is not None and any((*model.config.layer_windows, *model.config.layer_chunks)):
        policy = kvattn.Full()  # the oracle keeps what it does not look at
    capacity = T + golden["greedy"].shape[1] if policy is codec is None else T
    logits, cache = through(call, model.make_cache(B, capacity, policy=policy, codec=codec), golden, 1)
    spread = golden["logits"][real(golden)].std()
    for row, length in enumerate(golden["lengths"]):
        tokens = golden["prompts"][row, :length]
        expected, layers = logits_of(model, tokens, policy, codec)
        error = np.abs(logits[row, :length] - expected).max()
        if codec is not None:
            # A number next to the middle of two codes may become either.
            assert error <= 0.02 * spread
            assert np.abs(expected - golden["logits"][row, :length]).max() > 10 * TOLERANCE * spread
            continue
        assert error <= TOLERANCE * spread
        if policy is None:
            continue
        # Where every layer has a window, what a policy lets go may lie outside it anyway.
        assert (
            all(a or b for a, b in zip(model.config.layer_windows, model.config.layer_chunks, strict=True))
            or np.abs(expected - golden["logits"][row, :length]).max() > 10 * TOLERANCE * spread
            or length <= 9
        )
        owners = [layer for layer in layers if layer.owner is layer]
        for layer, oracle in zip(cache, owners, strict=True):
            held = np.atleast_2d(np.asarray(layer.positions)[row])
            for positions, kept in zip(
                np.broadcast_to(held, (len(oracle.tokens), held.shape[1])), oracle.tokens, strict=True
            ):
                assert sorted(positions[positions >= 0]) == kept


def test_each_layer_its_own():
    model, call, golden = family("llama3")
    policies, codecs = [kvattn.H2O(11, 11), None], (None, kvattn.Int8())
    cache = model.make_cache(B, T, policy=policies, codec=codecs)
    assert [type(layer.policy) for layer in cache] == [kvattn.H2O, kvattn.Full]
    assert isinstance(cache[1].codec, kvattn.Int8) and not isinstance(cache[0].codec, kvattn.Int8)
    logits, _ = call(jnp.asarray(golden["prompts"]), cache, jnp.asarray(golden["lengths"]))
    error = np.abs(np.asarray(logits) - golden["logits"])[real(golden)].max()
    assert error < 0.1 * golden["logits"][real(golden)].std()
    with pytest.raises(kvattn.errors.ShapeError, match="3 entries for 2 layers"):
        model.make_cache(B, T, policy=[None] * 3)


# The decoder itself -------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_parameter_matters():
    """A golden that some tensor does not move would not see it misread."""
    for name in (*ALL, *BY_LENGTH):
        model, _, golden = family(name)
        graph, state = nnx.split(model)
        tokens = jnp.asarray(golden["prompts"][:1])
        gradients = jax.jit(
            jax.grad(lambda s, graph=graph, tokens=tokens: jnp.sum(jnp.sin(nnx.merge(graph, s)(tokens)[0])))
        )(state)
        for path, x in jax.tree.leaves_with_path(gradients):
            where = f"{name} {jax.tree_util.keystr(path)}"
            # Keys move all scores of a query alike by their bias. What chooses experts moves nothing where it does not
            # weigh them: their bias, and the router of one expert for each token.
            unmoved = ("key" in where and "bias" in where) or "score_bias" in where
            unmoved |= "router" in where and model.config.experts_per_token == 1
            # What scales all that comes out of the last layer is taken out again by the norm behind it.
            unmoved |= f"['layers'][{model.config.num_layers - 1}]['scale']" in where
            assert unmoved or float(jnp.max(jnp.abs(x))) > 1e-5, where


def test_dynamic_frequencies_go_by_the_real_length():
    """Of a padded row too, with a cache and without: as of the row alone."""
    scaling = {"rope_type": "dynamic", "factor": 4.0, "original_max_position_embeddings": 6}
    config = DecoderConfig(
        vocab_size=50, num_layers=2, model_dim=32, num_heads=4, mlp_dim=32, rope_scaling=scaling, tie_embeddings=False
    )
    model = Decoder(config, rngs=nnx.Rngs(0))
    tokens = np.random.default_rng(0).integers(0, 50, (2, 24))
    tokens[0, 9:] = 0
    apply, weights = stateless(model)
    call = jax.jit(apply, compiler_options=FAST)
    alone = np.asarray(call(weights, jnp.asarray(tokens[:1, :9]))[0][0])
    lengths = jnp.asarray([9, 24])
    for cache in (None, model.make_cache(2, 24)):
        logits, _ = call(weights, jnp.asarray(tokens), cache, lengths)
        np.testing.assert_allclose(np.asarray(logits)[0, :9], alone, atol=1e-4 * alone.std())
    padded = np.asarray(call(weights, jnp.asarray(tokens))[0])[0, :9]
    assert np.abs(padded - alone).max() > 0.01 * alone.std()  # taken for 24 tokens


def test_learned_positions_end():
    model, call, _ = family("opt")
    tokens = jnp.ones((1, 65), jnp.int32)
    with pytest.raises(kvattn.errors.RangeError, match="64 learned positions"):
        model(tokens)
    assert np.isfinite(np.asarray(call(tokens[:, :64])[0])).all()
    _, cache = call(tokens[:, :64], model.make_cache(1, 80), jnp.asarray([63], jnp.int32))
    _, cache = call(tokens[:, :2], cache, jnp.asarray([1], jnp.int32))  # the second is no token
    with pytest.raises(kvattn.errors.RangeError, match="position 64"):
        model(tokens[:, :1], cache)
    logits, _ = call(tokens[:, :1], cache)
    assert np.isnan(np.asarray(logits)).all()


def test_palm_style():
    """No weights of PaLM are public: random ones against the oracle, through the cache."""
    config = DecoderConfig.palm(
        vocab_size=50, num_layers=2, model_dim=24, num_heads=71, head_dim=4, mlp_dim=32, norm_epsilon=1e-5
    )
    model = Decoder(config, rngs=nnx.Rngs(0))
    assert DecoderConfig.palm().head_dim == 256 and DecoderConfig.palm().num_kv_heads == 1
    tokens = np.random.default_rng(0).integers(0, 50, 7)
    expected, _ = logits_of(model, tokens)
    apply, weights = stateless(model)
    call = jax.jit(apply, compiler_options=FAST)
    for cache in (None, model.make_cache(1, 8)):
        logits, _ = call(weights, jnp.asarray(tokens)[None], cache)
        np.testing.assert_allclose(np.asarray(logits)[0], expected, atol=1e-4 * expected.std())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen2_moe", "olmo2", "gpt_oss", "deepseek_v3", "gemma4", "gemma4_experts"])
@pytest.mark.parametrize("axes", [jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit])
def test_on_a_mesh(name, axes):
    """Experts split within each, one norm over heads of several devices, rows over the other axis."""
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(axes, axes))
    model, _, golden = family(name)
    split = from_pretrained(GOLDEN / name, mesh=mesh)
    apply, weights = stateless(split)
    call = jax.jit(apply, compiler_options=FAST)
    rows = np.array([0, 1, 2, 0])
    prompts, lengths = jnp.asarray(golden["prompts"][rows]), jnp.asarray(golden["lengths"][rows])
    logits, cache = call(weights, prompts, split.make_cache(4, T + 1), lengths)
    assert_logits(np.asarray(logits)[:3], golden)
    token = jnp.asarray(golden["greedy"][rows, :1])
    other, weights_of_one = stateless(model)
    _, whole = jax.jit(other, compiler_options=FAST)(weights_of_one, prompts, model.make_cache(4, T + 1), lengths)
    want, _ = jax.jit(other, compiler_options=FAST)(weights_of_one, token, whole)
    got, _ = call(weights, token, cache)
    np.testing.assert_allclose(got, want, atol=TOLERANCE * golden["logits"][real(golden)].std())


@pytest.mark.parametrize("name", ["gemma3", "gemma4"])
def test_a_step_compiles_once_and_works_in_place(name):
    """Caches that other layers read, too."""
    model, _, golden = family(name)
    apply, weights = stateless(model)
    step = jax.jit(chex.assert_max_traces(apply, n=1), donate_argnames="cache", compiler_options=FAST)
    cache = model.make_cache(B, T)
    for t in range(T):
        given = jax.tree.leaves([(layer.keys, layer.values) for layer in cache])
        _, cache = step(weights, jnp.asarray(golden["prompts"][:, t : t + 1]), cache)
        assert all(x.is_deleted() for x in given)


# Planted faults -----------------------------------------------------------------------------------


def _config(**changes):
    """The family's rules as they are, with another configuration."""

    def plant(patch, kind):
        right = FAMILIES[kind]

        def changed(fields):
            blueprint = right.blueprint(fields)
            return dataclasses.replace(blueprint, config=dataclasses.replace(blueprint.config, **changes))

        patch.setitem(FAMILIES, kind, dataclasses.replace(right, blueprint=changed))

    return plant


def _rule(name, wrong):
    def plant(patch, kind):
        del kind
        patch.setattr(rules, name, wrong(getattr(rules, name)))

    return plant


def _out_transposed(linear):
    def wrong(theirs, ours, into, out, bias, transposed=True, **rest):
        return linear(theirs, ours, into, out, bias, transposed or ours.endswith(".out"), **rest)

    return wrong


FAULTS = {
    "scale of the embedding": ("gemma3", "gemma3_text", _config(embedding_scale=None)),
    "frequencies of layers with a window": ("gemma3", "gemma3_text", _config(local_rope_theta=None)),
    "a window off by one": ("mistral", "mistral", _config(windows=6)),
    "cap of the scores": ("gemma2", "gemma2", _config(softcap=None)),
    "scale of the scores": ("gemma2", "gemma2", _config(attention_scale=None)),
    "slopes": ("mpt_clip", "mpt", _config(alibi_slopes=tuple(2.0 ** -(i + 1) for i in range(6)))),
    "clipping": ("mpt_clip", "mpt", _config(qkv_clip=None)),
    "experts' limit": ("gpt_oss", "gpt_oss", _config(expert_limit=1.0)),
    "shares of all experts": ("qwen2_moe", "qwen2_moe", _config(expert_shares="chosen")),
    "pairs of latents' neighbours": ("deepseek_v3", "deepseek_v3", _config(rope_interleaved=False)),
    "scale of latents' scores": ("deepseek_v2", "deepseek_v2", _config(attention_scale=None)),
    "groups of experts": ("deepseek_v3", "deepseek_v3", _config(expert_groups=1, groups_per_token=1, group_best=1)),
    "the best of a group": ("deepseek_v3", "deepseek_v3", _config(group_best=1)),
    "weights of experts": ("deepseek_v3", "deepseek_v3", _config(expert_shares="all")),
    "chunks": ("llama4", "llama4_text", _config(chunks=None)),
    "temperature": ("llama4", "llama4_text", _config(temperature=None)),
    "layers with norms": ("llama4", "llama4_text", _config(qk_norm_layers=None)),
    "what experts are given": ("llama4", "llama4_text", _config(expert_weighs="output")),
    "epsilon of latents": ("minicpm3", "minicpm3", _config(latent_norm_epsilon=1e-2)),
    "pairs of neighbours": ("glm4", "glm4", _config(rope_interleaved=False)),
    "one norm over all heads": ("olmo2", "olmo2", _config(norm_epsilon=1e-2)),
    "whose keys and values": ("gemma4", "gemma4_text", _config(kv_source=(0, 1, 2, 0, 1))),
    "values without a norm": ("gemma4", "gemma4_text", _config(value_norm=False)),
    "residual": ("bloom_post", "bloom", _config(residual_after_norm=False)),
    "activation": ("bloom", "bloom", _config(activation="gelu")),
    "epsilon": ("opt", "opt", _config(norm_epsilon=1e-3)),
    "no groups": ("falcon40b", "falcon", _rule("fused", lambda f: lambda *a: f(*a[:3], False, a[4]))),
    "one not added": ("gemma2", "gemma2", _rule("norm", lambda f: lambda *a, **k: f(*a, **k | {"plus_one": False}))),
    "weights not transposed": ("gpt2", "gpt2", _rule("linear", _out_transposed)),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_found(fault, monkeypatch):
    name, kind, plant = FAULTS[fault]
    plant(monkeypatch, kind)
    model = from_pretrained(GOLDEN / name)
    apply, weights = stateless(model)
    golden = family(name)[2]
    logits, _ = jax.jit(apply, compiler_options=FAST)(weights, jnp.asarray(golden["prompts"]))
    with pytest.raises(AssertionError, match="deviation"):
        assert_logits(logits, golden)
