"""Log-probabilities against full forward passes, those of decoding against scoring, and the loop that both stand on."""

import dataclasses
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import small_models
from faulty_modules import planted
from flax import nnx

import kvattn
from kvattn.errors import CapacityError, ConfigError, DTypeError, KVAttnError, RangeError, ShapeError
from kvattn.layers import stateless
from kvattn.models import Decoder, DecoderConfig, generate, loop, score
from kvattn.models.sampling import Sampler

module = sys.modules[score.__module__]

V = 61
TINY = DecoderConfig(vocab_size=V, model_dim=24, num_layers=1, num_heads=6, num_kv_heads=2, head_dim=8, mlp_dim=40)
PROMPTS = [[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17], [18], [19, 20, 21, 22, 23]]
NEW, CAPACITY = 10, 64
DRAWN = dict(temperature=1.3, top_k=20, top_p=0.9, seed=7)


def decoder(config=TINY):
    return small_models.decoder(config, 0.05)


@pytest.fixture(scope="module")
def model():
    return decoder()


@pytest.fixture(scope="module")
def expected(model):
    """The oracle: of each token after the first, by one full pass without a cache and a softmax in float64."""
    apply, weights = stateless(model)
    full = jax.jit(apply)

    def of(tokens):
        padded = jnp.asarray([[*tokens, *[0] * (32 - len(tokens))]], jnp.int32)
        logits = np.asarray(full(weights, padded)[0][0], np.float64)[: len(tokens) - 1]
        return scipy.special.log_softmax(logits, axis=-1)[np.arange(len(tokens) - 1), tokens[1:]]

    return of


@pytest.fixture(scope="module")
def drawn(model):
    """What was generated, and the whole sequences."""
    new, logprobs = generate(model, PROMPTS, NEW, capacity=CAPACITY, return_logprobs=True, **DRAWN)
    return new, logprobs, joined(PROMPTS, new)


def joined(prompts, new):
    return [[*prompt, *tokens] for prompt, tokens in zip(prompts, new, strict=True)]


# Values -------------------------------------------------------------------------------------------


def check_scores(score, model, sequences, expected):
    """Whatever the batch, the chunks, and how many logits there may be at once."""
    for options in ({}, dict(prefill_chunk=7), dict(capacity=CAPACITY)):
        scored = score(model, sequences, **options)
        for tokens, got in zip(sequences, scored, strict=True):
            assert got.dtype == np.float32 and got.shape == (len(tokens) - 1,)
            np.testing.assert_allclose(got, expected(tokens), atol=1e-5)


def test_scores_are_those_of_full_passes(model, expected, drawn):
    check_scores(score, model, drawn[2], expected)
    (alone,) = score(model, [np.array(drawn[2][2], np.uint8)])
    np.testing.assert_allclose(alone, expected(drawn[2][2]), atol=1e-5)
    assert kvattn.score is score


def test_capacity_for_the_tokens_alone(model, expected):
    """No pad takes a slot, whether the last chunk is not full or a row has none of it."""
    sequences = [[1, 2, 3, 4, 5, 6], [7, 8, 9]]
    for tokens, got in zip(sequences, score(model, sequences, capacity=5, prefill_chunk=2), strict=True):
        np.testing.assert_allclose(got, expected(tokens), atol=1e-5)


def test_few_logits_at_once(model, expected, drawn, monkeypatch):
    """Slices of 5 tokens, the last of them not full."""
    monkeypatch.setattr(module, "_LOGITS", 3 * V * 5 + 1)
    monkeypatch.setattr(module, "PROGRAMS", module.ProgramsOf(module._compiled))
    for tokens, got in zip(drawn[2], score(model, drawn[2]), strict=True):
        np.testing.assert_allclose(got, expected(tokens), atol=1e-5)


def test_little_to_score(model):
    assert score(model, []) == []
    assert [x.shape for x in score(model, [[1], [2]])] == [(0,), (0,)]
    one, two = score(model, [[1], [2, 3]])
    assert one.shape == (0,) and two.shape == (1,)
    one, two = score(model, [[1], [2]], prompt_lengths=[1, 1], capacity=8)
    assert one.shape == two.shape == (0,)


def check_decoding(generate, score, model, **options):
    """What decoding says of its tokens is what scoring says."""
    common = {name: options[name] for name in ("codec", "policy", "prefill_chunk") if name in options}
    new, logprobs = generate(model, PROMPTS, NEW, return_logprobs=True, **options)
    for tokens, numbers in zip(new, logprobs, strict=True):
        assert numbers.dtype == np.float32 and numbers.shape == (len(tokens),)
    scored = score(model, joined(PROMPTS, new), **common)
    for prompt, numbers, got in zip(PROMPTS, logprobs, scored, strict=True):
        np.testing.assert_allclose(got[len(prompt) - 1 :], numbers, atol=1e-5)


@pytest.mark.parametrize("options", [{}, DRAWN, dict(prefill_chunk=7)], ids=str)
def test_decoding_and_scoring_agree(model, options):
    check_decoding(generate, score, model, **options)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        dict(codec=kvattn.Int8()),
        dict(policy=kvattn.SlidingWindow(5)),
        dict(policy=kvattn.StreamingLLM(2, 5), prefill_chunk=7),
        dict(policy=kvattn.StreamingLLM(2, 5), codec=kvattn.Int4(8)),
        dict(policy=kvattn.H2O(31, 32)),
        dict(codec=kvattn.Float8()),
        dict(prefill_chunk=1),
    ],
    ids=str,
)
def test_decoding_and_scoring_agree_with_policies_and_codecs(model, options):
    check_decoding(generate, score, model, **options)


def test_log_probabilities_are_the_models_own(model, expected, drawn):
    """Not those of the temperature and filters that a token was drawn by; and the tokens are as without."""
    new, logprobs, sequences = drawn
    assert new == generate(model, PROMPTS, NEW, capacity=CAPACITY, **DRAWN)
    for prompt, tokens, numbers in zip(PROMPTS, sequences, logprobs, strict=True):
        np.testing.assert_allclose(numbers, expected(tokens)[len(prompt) - 1 :], atol=1e-5)
    tokens, numbers, cache = generate(
        model, PROMPTS, NEW, capacity=CAPACITY, return_logprobs=True, return_cache=True, stop_tokens=new[0][2], **DRAWN
    )
    ends = [row.index(new[0][2]) + 1 if new[0][2] in row else NEW for row in new]
    assert tokens == [row[:end] for row, end in zip(new, ends, strict=True)]
    assert [x.tolist() for x in numbers] == [x[:end].tolist() for x, end in zip(logprobs, ends, strict=True)]
    assert cache[0].lengths.tolist() == [len(p) + end for p, end in zip(PROMPTS, ends, strict=True)]
    assert [x.shape for x in generate(model, PROMPTS, 0, return_logprobs=True)[1]] == [(0,)] * 3


# In every bit -------------------------------------------------------------------------------------

EXACT = {
    "greedy": {},
    "drawn in chunks": dict(DRAWN, prefill_chunk=7),
    "int8 in a window": dict(policy=kvattn.SlidingWindow(5), codec=kvattn.Int8()),
    "heavy hitters": dict(policy=kvattn.H2O(3, 4), prefill_chunk=7),
    "kivi": dict(codec=kvattn.KIVI(group_size=8, residual=8)),
    "token by token": dict(prefill_chunk=1),
}
QUICK = ("greedy", "drawn in chunks")


def check_bits(score, model, options, stops=()):
    """Numbers of decoding, repeated."""
    common = {name: options[name] for name in ("codec", "policy", "prefill_chunk") if name in options}
    new, logprobs = generate(model, PROMPTS, NEW, capacity=CAPACITY, stop_tokens=stops, return_logprobs=True, **options)
    lengths = [len(prompt) for prompt in PROMPTS]
    before = [program._cache_size() for program in loop.PROGRAMS[model][1]]
    scored = score(model, joined(PROMPTS, new), capacity=CAPACITY, prompt_lengths=lengths, **common)
    for length, numbers, got in zip(lengths, logprobs, scored, strict=True):
        assert got[length - 1 :].tobytes() == numbers.tobytes()
    assert [program._cache_size() for program in loop.PROGRAMS[model][1]] == before  # no program of its own
    plain = score(model, PROMPTS, capacity=CAPACITY, **common)
    for length, got, own in zip(lengths, scored, plain, strict=True):
        np.testing.assert_allclose(got[: length - 1], own, atol=1e-5)
    return new


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in QUICK else [pytest.mark.slow]) for n in EXACT], ids=str
)
def test_scores_that_repeat_decoding_in_every_bit(model, name):
    new = check_bits(score, model, EXACT[name])
    if name == "drawn in chunks":  # rows that end at different steps, one of them at once
        check_bits(score, model, EXACT[name], stops=(new[0][3], new[2][0]))


@pytest.mark.slow
def test_bits_in_half_precision_and_on_a_mesh():
    wide = DecoderConfig(vocab_size=V, model_dim=32, num_layers=2, num_heads=4, num_kv_heads=2, mlp_dim=64)
    mesh = jax.make_mesh((2,), ("model",), devices=jax.devices()[:2])
    for options in (dict(dtype=jnp.bfloat16), dict(mesh=mesh)):
        check_bits(score, Decoder(wide, rngs=nnx.Rngs(0), **options), {})
    check_decoding(generate, score, Decoder(wide, mesh=mesh, rngs=nnx.Rngs(0)))


# Refusals -----------------------------------------------------------------------------------------


@pytest.mark.wrong_types
@pytest.mark.parametrize(
    ("arguments", "error", "part"),
    [
        (dict(sequences=[[]]), ShapeError, "sequence 0"),
        (dict(sequences=b"bytes"), ShapeError, "list"),
        (dict(sequences=3), DTypeError, "int"),
        (dict(sequences=[[1.5]]), DTypeError, "sequence 0"),
        (dict(sequences=[[1], [V]]), RangeError, "sequence 1"),
        (dict(capacity=1), CapacityError, "slots are missing"),
        (dict(prefill_chunk=0), RangeError, "prefill_chunk"),
        (dict(prompt_lengths=[1]), ConfigError, "capacity"),
        (dict(prompt_lengths=[1, 1], capacity=8), ShapeError, "2 prompt_lengths for 1"),
        (dict(prompt_lengths=[0], capacity=8), RangeError, "prompt length"),
        (dict(prompt_lengths=[4], capacity=8), RangeError, "cannot have 4"),
        (dict(prompt_lengths=[True], capacity=8), DTypeError, "bool"),
        (dict(prompt_lengths=1, capacity=8), DTypeError, "prompt_lengths"),
    ],
    ids=str,
)
def test_scoring_refuses(model, arguments, error, part):
    with pytest.raises(error) as caught:
        score(model, **{"sequences": [[1, 2, 3]], **arguments})
    assert isinstance(caught.value, KVAttnError) and part in str(caught.value)


@pytest.mark.wrong_types
def test_learned_positions_and_other_flags(model):
    learned = decoder(dataclasses.replace(TINY, positions="learned", max_positions=8))
    assert score(learned, [range(9)])[0].shape == (8,)  # the last token needs no position
    with pytest.raises(RangeError, match="8 learned positions"):
        score(learned, [range(10)])
    with pytest.raises(DTypeError, match="return_logprobs"):
        generate(model, [[1]], 1, return_logprobs=1)


def test_unsound_logits_have_no_score(model):
    broken = nnx.clone(model)
    broken.embed.embedding[...] = broken.embed.embedding[...].at[5].set(jnp.nan)
    for options in ({}, dict(prompt_lengths=[1, 1], capacity=8)):
        with pytest.raises(RangeError, match=r"rows \[0, 1\].*NaN"):
            score(broken, [[1, 2], [3, 4, 6]], **options)


# The loop -----------------------------------------------------------------------------------------

MIXED = [dict(temperature=0), dict(temperature=1.3, top_p=0.7, seed=3), dict(temperature=0.8, top_k=5, seed=2**32 - 1)]
LIMITS = [NEW, 3, 6]


def settings_of(rows, stops=()):
    """`Settings` of rows that each have a sampler, a limit and stop tokens of their own."""
    every = []
    for options, limit, stop in rows:
        sampler = Sampler.create(V, **{"top_k": None, "top_p": None, "seed": 0, **options})
        every.append(loop.Settings.alike(1, sampler, np.isin(np.arange(V), stop), limit))
    return jax.tree.map(lambda *x: np.concatenate(x), *every)


def alone(model, prompt, options, limit, stop=()):
    """One row by itself."""
    return generate(model, [prompt], limit, capacity=CAPACITY, stop_tokens=stop, **options)[0]


def taken(tokens, came):
    """Adds the tokens of a step to those of their rows."""
    for row, token in enumerate(np.asarray(came.new).tolist()):
        if token >= 0:
            tokens[row].append(token)


def check_mixture(loop, model):
    """Every row goes by its own settings, and gets the tokens it gets alone."""
    stop = alone(model, PROMPTS[0], MIXED[0], NEW)[4]
    rows = list(zip(MIXED, LIMITS, [[stop], [], [stop]], strict=True))
    decoding = loop.Decoding(model, model.make_cache(3, CAPACITY), settings_of(rows))
    decoding.append_prompts(PROMPTS, None)
    tokens = [[], [], []]
    for came in decoding.steps(NEW):
        taken(tokens, came)
    wanted = [alone(model, prompt, *row) for prompt, row in zip(PROMPTS, rows, strict=True)]
    assert tokens == wanted
    assert not np.any(decoding.rows.running)
    assert np.asarray(decoding.rows.num_drawn).tolist() == [len(row) for row in wanted]
    assert decoding.cache[0].lengths.tolist() == [len(p) + len(t) - 1 for p, t in zip(PROMPTS, wanted, strict=True)]


def test_rows_of_one_batch_go_by_their_own_settings(model):
    check_mixture(loop, model)
    before = [program._cache_size() for program in loop.PROGRAMS[model][1]]
    generate(model, PROMPTS, NEW, capacity=CAPACITY, **DRAWN)
    assert [program._cache_size() for program in loop.PROGRAMS[model][1]] == before  # one program for any mixture


def test_a_row_is_replaced_while_the_others_go_on(model):
    """Row 1 ends and takes another prompt, in two chunks with steps of the others between them."""
    rows = list(zip(MIXED, LIMITS, [[], [], []], strict=True))
    decoding = loop.Decoding(model, model.make_cache(3, CAPACITY), settings_of(rows))
    decoding.append_prompts(PROMPTS, 16)
    tokens, none = [[], [], []], np.zeros(3, np.int32)
    taken(tokens, decoding.rows)
    for _ in range(LIMITS[1]):
        decoding.step()
        taken(tokens, decoding.rows)
    before, prompt = tokens[1], [31, 32, 33, 34, 35]
    assert before == alone(model, PROMPTS[1], *rows[1]) and not decoding.rows.running[1]

    where = np.arange(3) == 1
    later = [rows[0], (dict(temperature=2.0, top_k=30, seed=11), 5, []), rows[2]]
    decoding.rows = loop.replaced(decoding.rows, where, loop.Rows.ended(3))
    decoding.settings = loop.replaced(decoding.settings, where, settings_of(later))
    decoding.cache = tuple(layer.trim(jnp.where(where, layer.lengths, 0)) for layer in decoding.cache)
    tokens[1] = []
    for part, ends in ((prompt[:3], False), (prompt[3:], True)):
        chunk = np.zeros((3, 16), np.int32)
        chunk[1, : len(part)] = part
        num_new = np.where(where, len(part), none).astype(np.int32)
        decoding.append(loop.Chunk(chunk, num_new, where & ends))
        assert bool(decoding.rows.running[1]) is ends
        if ends:
            tokens[1].append(int(decoding.rows.new[1]))
        else:
            decoding.step()
            taken(tokens, decoding.rows)
    for _ in range(NEW):
        decoding.step()
        taken(tokens, decoding.rows)
    assert tokens[0] == alone(model, PROMPTS[0], *rows[0]) and tokens[2] == alone(model, PROMPTS[2], *rows[2])
    assert tokens[1] == alone(model, prompt, *later[1])
    decoding.check()


def test_rows_are_left_out_moved_and_repeated():
    """In the order asked for: whatever is known of row i is what was known of row ``index[i]``."""
    settings = settings_of(list(zip(MIXED, LIMITS, [[1], [2], [3]], strict=True)))
    new, num_drawn = np.array([[5, 6, 7], [1, 2, 3]], np.int32)
    rows = loop.Rows(new, np.array([0.5, 0.6, 0.7], np.float32), np.array([True, False, True]), num_drawn)
    for index in ([2, 0, 1], [1, 1, 2], [2, 0]):
        got = loop.select((rows, settings), jnp.asarray(index, jnp.int32))
        for x, y in zip(jax.tree.leaves(got), jax.tree.leaves((rows, settings)), strict=True):
            np.testing.assert_array_equal(x, [y[i] for i in index])


def test_rows_are_gathered(model):
    """Row 2 three times: the same tokens, where nothing is drawn; with streams of their own, others."""
    rows = [(dict(temperature=0), NEW, [])] * 3
    decoding = loop.Decoding(model, model.make_cache(3, CAPACITY), settings_of(rows))
    decoding.append_prompts(PROMPTS, None)
    decoding.step()
    index = np.array([2, 2, 2])
    decoding.rows, decoding.settings = loop.select((decoding.rows, decoding.settings), index)
    decoding.cache = tuple(layer.select(index) for layer in decoding.cache)
    decoding.step()
    first = np.asarray(decoding.rows.new)
    assert first.tolist() == [alone(model, PROMPTS[2], {}, NEW)[2]] * 3
    sampler = Sampler.create(V, temperature=5.0, top_k=None, top_p=None, seed=1).repeated(3)
    decoding.settings = dataclasses.replace(decoding.settings, sampler=sampler)
    came = []
    for _ in range(5):
        decoding.step()
        came.append(np.asarray(decoding.rows.new).tolist())
    assert len({tuple(row) for row in zip(*came, strict=True)}) == 3


def test_stop_sets_hold_what_was_put_in():
    rng = np.random.default_rng(0)
    for size in (1, 31, 32, 33, 100):
        sets = rng.random((4, size)) < 0.3
        words = np.stack([loop.as_bits(row) for row in sets])
        assert words.dtype == np.uint32 and words.shape == (4, -(-size // 32))
        for token in range(size):
            got = loop._holds(jnp.asarray(words), jnp.full(4, token, jnp.int32))
            assert got.tolist() == sets[:, token].tolist()


# What it costs ------------------------------------------------------------------------------------


def temporary_bytes(vocab_size, run, length=4096):
    """Of a program for a prompt of 4,096 tokens, compiled for shapes alone."""
    config = DecoderConfig(vocab_size=vocab_size, model_dim=16, num_layers=1, num_heads=2, num_kv_heads=1, mlp_dim=16)
    model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    shape = lambda *shape, dtype=jnp.int32: jax.ShapeDtypeStruct(shape, dtype)
    cache = jax.eval_shape(lambda: model.make_cache(1, length))
    sampler = Sampler.create(vocab_size, temperature=0, top_k=None, top_p=None, seed=0)
    settings = loop.Settings.alike(1, sampler, np.zeros(vocab_size, bool), 1)
    tokens, one = shape(1, length), shape(1)
    if run == "prompt":
        weights, programs = loop.PROGRAMS.of(model)
        chunk = loop.Chunk(tokens, one, shape(1, dtype=bool))
        lowered = programs.append.lower(weights, chunk, cache, loop.Rows.ended(1), settings, one)
    elif run == "score":
        weights, append = module.PROGRAMS.of(model)
        lowered = append.lower(weights, tokens, tokens, one, cache)
    else:
        apply, weights = stateless(model)
        lowered = jax.jit(apply).lower(weights, tokens, cache, one)
    analysis = lowered.compile().memory_analysis()
    return analysis.temp_size_in_bytes + analysis.output_size_in_bytes - analysis.alias_size_in_bytes


def test_memory_of_a_prompts_logits():
    """At a vocabulary of 128,000, with all activations. All logits of a prompt, which it took before, are 2 GB."""
    assert temporary_bytes(128_000, "all") > 2e9
    assert temporary_bytes(128_000, "prompt") < 10e6
    assert temporary_bytes(128_000, "score") < 10e6 + 2 * 4 * module._LOGITS


# Planted faults -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("decoding.step(forced[:, number])", "decoding.step()"),
        (
            "decoding.append_prompts(heads, prefill_chunk, forced[:, 0])",
            "decoding.append_prompts(heads, prefill_chunk)",
        ),
        ("_repeated(model, rows, prompts, make_cache(), prefill_chunk)", "_scored(model, rows, make_cache(), 3)"),
    ],
)
def test_planted_faults_in_repeating(model, right, wrong):
    with pytest.raises(AssertionError):
        check_bits(planted(module, right, wrong).score, model, EXACT["drawn in chunks"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("num_drawn < settings.limit", "num_drawn <= settings.limit"),
        ("choose(settings.sampler, logits, rows.num_drawn)", "choose(settings.sampler, logits, rows.num_drawn * 0)"),
        ("jnp.where(forced >= 0, forced, token)", "jnp.where(forced >= -1, forced, token)"),
    ],
)
def test_planted_faults_in_the_loop(model, right, wrong):
    with pytest.raises(AssertionError):
        check_mixture(planted(loop, right, wrong), model)
