"""The engine on models: its tokens and log-probabilities are those of `kvattn.generate` alone."""

import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_models
from flax import nnx

import kvattn
from kvattn import errors
from kvattn.models import Decoder, DecoderConfig, generate, loop, score
from kvattn.serving import Engine, sizes
from kvattn.serving.device import PROGRAMS

V = 61
SIZES = dict(vocab_size=V, model_dim=24, num_layers=1, num_heads=6, num_kv_heads=2, head_dim=8, mlp_dim=40)
SHARED = [7, 3, 3, 50, 9, 12, 31, 4, 4, 17]
PROMPTS = [[*SHARED, 1, 2], [*SHARED, 5], [18], [*SHARED, 1, 2, 40, 41, 42, 43, 44, 45, 46], [19, 20, 21, 22, 23]]
NEW, CHUNK, LENGTH = 12, 16, 48
SMALL = dict(page_size=4, max_batch=3, max_length=LENGTH, prefill_chunk=CHUNK)


def decoder(**settings):
    return small_models.decoder(DecoderConfig(**{**SIZES, **settings}), 0.3)


@pytest.fixture(scope="module")
def model():
    return decoder()


@pytest.fixture(scope="module")
def alone(model):
    """What each prompt gives by itself: tokens and log-probabilities."""
    return reference(model)


def reference(model, **options):
    """One prompt after the other, in caches of their own."""
    options = dict(capacity=LENGTH, prefill_chunk=CHUNK, return_logprobs=True, **options)
    found = [generate(model, [prompt], NEW, **options) for prompt in PROMPTS]
    return [tokens[0] for tokens, _ in found], [logprobs[0] for _, logprobs in found]


def check(engine, expected, arrivals=(0, 1, 1, 3, 0), **options):
    """Every prompt, some of them later than others."""
    tokens, logprobs = expected
    requests = []
    for prompt, ticks in zip(PROMPTS, arrivals, strict=True):
        for _ in range(ticks):
            engine.step()
        requests.append(engine.submit(prompt, NEW, **options))
    done = engine.run()
    for request, new, numbers in zip(requests, tokens, logprobs, strict=True):
        assert done[request] == [new]
        np.testing.assert_allclose(request.logprobs[0], numbers, atol=2e-5)
    engine._scheduler.check()
    return engine.stats()


# What comes out -----------------------------------------------------------------------------------


@pytest.mark.parametrize("num_pages", [30, 10])
def test_tokens_are_those_of_each_alone(model, alone, num_pages):
    """With pages for everybody, and for hardly more than one."""
    stats = check(Engine(model, num_pages=num_pages, **SMALL), alone)
    assert stats.cached_prompt_tokens > 0
    assert (stats.preemptions > 0) == (num_pages == 10)
    assert 0 < stats.host_seconds < stats.new_tokens / stats.tokens_per_second
    again = Engine(model, num_pages=num_pages, schedule="fcfs", prefix_cache=False, **SMALL)
    assert check(again, alone, arrivals=(0, 0, 0, 0, 0)).cached_prompt_tokens == 0


def test_log_probabilities_are_those_of_score(model, alone):
    engine = Engine(model, num_pages=30, **SMALL)
    engine.submit(PROMPTS[0], 1)
    engine.run()
    hit = engine.submit(PROMPTS[3], NEW, temperature=1.0, seed=2)
    engine.run()
    assert engine.stats().cached_prompt_tokens > 0
    (scored,) = score(model, [[*PROMPTS[3], *hit.tokens[0]]])
    np.testing.assert_allclose(hit.logprobs[0], scored[len(PROMPTS[3]) - 1 :], atol=1e-5)


def test_samples_are_the_rows_of_generate(model):
    drawn = dict(temperature=1.3, top_k=20, top_p=0.9, seed=7)
    expected = generate(model, [PROMPTS[0]] * 3, NEW, capacity=LENGTH, **drawn)
    engine = Engine(model, num_pages=40, **SMALL)
    other = engine.submit(PROMPTS[2], NEW, temperature=0.7)
    some = engine.submit(PROMPTS[0], NEW, num_samples=3, **drawn)
    engine.run()
    assert some.tokens == expected
    assert other.tokens == generate(model, [PROMPTS[2]], NEW, capacity=LENGTH, temperature=0.7)
    assert len({*map(tuple, expected)}) == 3


def test_samples_that_stop_and_give_way(model):
    """In too few pages for all of them, and each to an end of its own: what one drew, it draws again, and no more."""
    drawn = dict(temperature=1.3, top_k=20, seed=7)
    longest = generate(model, [PROMPTS[3]] * 3, NEW, capacity=LENGTH, **drawn)
    for stop in (longest[0][3], longest[2][5]):
        expected = generate(model, [PROMPTS[3]] * 3, NEW, capacity=LENGTH, stop_tokens=stop, **drawn)
        engine = Engine(model, num_pages=10, **SMALL)
        some = engine.submit(PROMPTS[3], NEW, num_samples=3, stop_tokens=stop, **drawn)
        engine.run()
        assert some.tokens == expected and engine.stats().preemptions
        assert len(set(map(len, expected))) > 1


def test_guessed_tokens_are_those_of_each_alone(model, alone):
    engine = Engine(model, num_pages=30, speculate=3, **SMALL)
    engine.warm_up()
    repeated = [5, 6, 7, 8] * 4
    requests = [engine.submit(prompt, NEW) for prompt in (*PROMPTS, repeated)]
    engine.run()
    assert [request.tokens[0] for request in requests[:-1]] == alone[0]
    (scored,) = score(model, [[*repeated, *requests[-1].tokens[0]]])
    np.testing.assert_allclose(requests[-1].logprobs[0], scored[len(repeated) - 1 :], atol=1e-5)
    assert engine.stats().ticks < 2 * (NEW + 3)
    with pytest.raises(errors.UnsupportedError, match="speculate"):
        Engine(model, num_pages=30, speculate=3, policy=kvattn.H2O(5, 5), **SMALL)


def test_stop_tokens(model, alone):
    stop = alone[0][0][4]
    engine = Engine(model, num_pages=30, **SMALL)
    request = engine.submit(PROMPTS[0], NEW, stop_tokens=stop)
    engine.run()
    assert request.tokens == generate(model, [PROMPTS[0]], NEW, capacity=LENGTH, stop_tokens=stop)
    assert request.tokens[0][-1] == stop


def test_beams_are_a_search_over_the_logits(model):
    """By brute force: every continuation of what is kept, by one full pass each."""
    apply, weights = kvattn.layers.stateless(model)
    full = jax.jit(apply)
    width, count = 3, 5

    def logprobs_after(tokens):
        padded = jnp.asarray([[*tokens, *[0] * (LENGTH - len(tokens))]], jnp.int32)
        logits = np.asarray(full(weights, padded)[0][0, len(tokens) - 1], np.float64)
        return logits - np.log(np.sum(np.exp(logits - logits.max()))) - logits.max()

    kept = [((), 0.0)]
    for _ in range(count):
        candidates = []
        for tokens, score_so_far in kept:
            after = logprobs_after([*PROMPTS[3], *tokens])
            candidates += [((*tokens, t), score_so_far + after[t]) for t in range(V)]
        kept = sorted(candidates, key=lambda each: -each[1])[:width]
    engine = Engine(model, num_pages=40, **SMALL)
    request = engine.submit(PROMPTS[3], count, beam_width=width)
    engine.run()
    assert request.tokens == [list(tokens) for tokens, _ in kept]
    np.testing.assert_allclose([sum(x) for x in request.logprobs], [x for _, x in kept], atol=1e-4)
    engine._scheduler.check()


def test_layers_with_windows_give_pages_back():
    """A group of pages each; hits go as far as both groups have pages."""
    model = decoder(num_layers=2, windows=(None, 6))
    expected = reference(model)
    engine = Engine(model, num_pages=(40, 16), **SMALL)
    stats = check(engine, expected)
    assert stats.cached_prompt_tokens > 0
    assert len(engine._device.groups) == 2


def combinations():
    h2o, ring = kvattn.H2O(5, 5), kvattn.SlidingWindow(7)
    policies = {
        "full": None,
        "ring": ring,
        "streaming": kvattn.StreamingLLM(2, 6),
        "h2o": h2o,
        "scissorhands": kvattn.Scissorhands(12, 3, 8),
        "fastgen": kvattn.FastGen(0.5),
    }
    codecs = {"plain": None, "int8": kvattn.Int8(), "float8": kvattn.Float8(), "int4": kvattn.Int4(8)}
    kivi = kvattn.KIVI(2, 4, 4)
    quick = {("h2o", "plain")}
    for name, policy in policies.items():
        for codec_name, codec in (*codecs.items(), *([("kivi", kivi)] if policy is None else [])):
            if (name, codec_name) != ("full", "plain"):
                marks = () if (name, codec_name) in quick else pytest.mark.slow
                yield pytest.param(policy, codec, id=f"{name}-{codec_name}", marks=marks)


@pytest.mark.parametrize(("policy", "codec"), list(combinations()))
def test_every_policy_and_codec(model, policy, codec):
    """In a pool that is too small for all: those that go by attention are appended again token by token."""
    settings = dict(policy=policy, codec=codec)
    expected = reference(model, **settings)
    used_again = policy is not None and not isinstance(policy, kvattn.FastGen)
    engine = Engine(model, num_pages=7 if used_again else 10, **SMALL, **settings)
    stats = check(engine, expected, arrivals=(0, 0, 0, 0, 0))
    assert stats.preemptions > 0 or used_again
    samples = engine.submit(PROMPTS[0], 5, num_samples=2, temperature=1.0, seed=1)
    engine.run()
    drawn = dict(temperature=1.0, seed=1, capacity=LENGTH, prefill_chunk=CHUNK)
    assert samples.tokens == generate(model, [PROMPTS[0]] * 2, 5, **drawn, **settings)
    engine._scheduler.check()


@pytest.mark.slow
@pytest.mark.parametrize("page_size", [1, 8, 16])
@pytest.mark.parametrize("codec", [None, kvattn.Int8()], ids=str)
def test_every_page_size(model, page_size, codec):
    engine = Engine(model, num_pages=96 // page_size, codec=codec, **{**SMALL, "page_size": page_size})
    check(engine, reference(model, codec=codec))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["Explicit", "Auto"])
@pytest.mark.parametrize("by", ["heads", "sequence"])
def test_on_a_mesh(alone, model, by, kind):
    """Two devices: samples, forks and copies of pages too."""
    mesh = jax.make_mesh((1, 2), ("data", "model"), axis_types=(getattr(jax.sharding.AxisType, kind),) * 2)
    graph, state = nnx.split(Decoder(model.config, mesh=mesh, by=by, rngs=nnx.Rngs(0)))
    old, structure = jax.tree.flatten(state)
    new = [
        jax.device_put(np.asarray(x), y.sharding) for x, y in zip(jax.tree.leaves(nnx.state(model)), old, strict=True)
    ]
    split = nnx.merge(graph, jax.tree.unflatten(structure, new))
    engine = Engine(split, num_pages=30, **SMALL)
    check(engine, alone)
    samples = engine.submit(PROMPTS[0], 5, num_samples=2, temperature=1.0, seed=1)
    engine.run()
    assert samples.tokens == generate(model, [PROMPTS[0]] * 2, 5, temperature=1.0, seed=1, capacity=LENGTH)


def test_a_mesh_that_splits_rows_is_refused():
    mesh = jax.make_mesh(
        (1, 3), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2, devices=jax.devices()[:3]
    )
    split = Decoder(DecoderConfig(**SIZES), mesh=mesh, by="batch", rngs=nnx.Rngs(0))
    with pytest.raises(errors.UnsupportedError, match="rows"):
        Engine(split, num_pages=30, **SMALL)


# What it costs ------------------------------------------------------------------------------------


def test_nothing_compiles_after_the_warm_up(model):
    engine = Engine(model, num_pages=30, **SMALL)
    engine.warm_up()
    _, programs = PROGRAMS.of(model)
    compiled = lambda: [program._cache_size() for program in (programs.read, programs.step, programs.copy)]
    before = compiled()
    check(engine, reference(model))
    engine.submit(PROMPTS[0], 5, num_samples=3, temperature=0.5, top_p=0.5, stop_tokens=[3], priority=2)
    engine.run()
    assert compiled() == before


def test_the_pool_is_updated_in_place(model):
    engine = Engine(model, num_pages=30, **SMALL)
    engine.submit(PROMPTS[0], NEW)
    where = {
        x.unsafe_buffer_pointer()
        for x in jax.tree.leaves((engine._device.cache[0].keys, engine._device.cache[0].values))
    }
    engine.run()
    now = {
        x.unsafe_buffer_pointer()
        for x in jax.tree.leaves((engine._device.cache[0].keys, engine._device.cache[0].values))
    }
    assert where == now


def test_an_engine_that_is_gone_leaves_nothing(model):
    engine = Engine(model, num_pages=30, **SMALL)
    engine.submit(PROMPTS[2], 2)
    engine.run()
    gone = weakref.ref(engine._device)
    del engine
    gc.collect()
    assert gone() is None


def test_pages_by_what_is_left(model, monkeypatch):
    monkeypatch.setattr(sizes, "memory_left", lambda: 1e6)
    engine = Engine(model, num_pages="auto", **SMALL)
    taken = sum(x.nbytes for x in jax.tree.leaves((engine._device.cache[0].keys, engine._device.cache[0].values)))
    assert 0.75e6 < taken <= 0.8e6
    with pytest.raises(errors.ConfigError, match="num_pages"):
        Engine(model, num_pages="all", **SMALL)


# What goes wrong ----------------------------------------------------------------------------------


def test_learned_positions_end(model):
    short = decoder(positions="learned", max_positions=20)
    engine = Engine(short, num_pages=30, **SMALL)
    with pytest.raises(errors.RangeError, match="learned positions"):
        engine.submit(PROMPTS[0], 10)


@pytest.mark.wrong_types
def test_arguments(model):
    for options, error in (
        (dict(num_pages=0), errors.KVAttnError),
        (dict(prefill_chunk=0), errors.ConfigError),
        (dict(prefix_cache=1), errors.DTypeError),
        (dict(page_size=8, codec=kvattn.KIVI(2, 4, 4)), errors.ConfigError),
    ):
        with pytest.raises(error):
            Engine(model, **{"num_pages": 30, **SMALL, **options})
    with pytest.raises(errors.DTypeError, match="Decoder"):
        Engine(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), num_pages=30, **SMALL)
    assert loop.NOTHING < 0
