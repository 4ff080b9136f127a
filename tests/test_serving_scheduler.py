"""Engines over pages of text: whatever comes, goes and gives way, every request gets the tokens it gets alone."""

import inspect
import itertools
import random
import types

import numpy as np
import pytest
from engine_models import POISON, UNSOUND, V, check, continued, model, next_token, repeating, scores_after, text_engine

from kvattn import errors
from kvattn.cache.status import OVERFLOW
from kvattn.serving import DiskTier, HostTier, LayerGroup, beams, sharing
from kvattn.serving.drafts import Guesses, Lookup
from kvattn.serving.prefixes import PrefixPool
from kvattn.serving.request import Request
from kvattn.serving.tables import RowTables, padded
from kvattn.serving.texts import Text

FULL_RUN = pytest.mark.slow


@pytest.fixture(scope="module")
def plain():
    return model()


@pytest.fixture(scope="module")
def windowed():
    """Every other layer sees 7 tokens."""
    return model(num_layers=2, windows=(None, 7))


def unshareable(engine):
    """As under policies that go by attention: pages cannot be shared, and tokens must come as they came."""
    engine._is_shareable = engine._rereads = False
    engine._begin()
    return engine


def at_rest(engine, prefixes=True):
    """Nothing is left of what ran."""
    scheduler = engine._scheduler
    check(engine)
    assert not scheduler.running and not scheduler.waiting and not engine._jobs and not engine._choices
    kept = scheduler.pool
    assert kept.num_sequences == 0 and not any(kept._promised) and not kept._matches
    kept.forget_prefixes()
    assert [pool.num_free for pool in kept.pool.pools] == [pool.num_blocks for pool in kept.pool.pools]


def prompts_of(rng, count, shared=3, longest=24):
    """Prompts of which many begin alike."""
    heads = [[rng.randrange(UNSOUND) for _ in range(rng.randrange(1, longest))] for _ in range(shared)]
    found = []
    for _ in range(count):
        head = rng.choice(heads)[: rng.randrange(1, longest)]
        found.append((head + [rng.randrange(UNSOUND) for _ in range(rng.randrange(0, 8))])[:longest])
    return found


# What comes out -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["longest-prefix", "fcfs"])
@pytest.mark.parametrize("num_pages", [40, 16])
@pytest.mark.parametrize("kind", ["plain", "windowed", "unshareable", "no prefixes"])
def test_everybody_gets_what_it_gets_alone(monkeypatch, request, kind, num_pages, schedule):
    rng = random.Random(num_pages)
    settings = dict(num_pages=num_pages, schedule=schedule, prefix_cache=kind != "no prefixes")
    built = request.getfixturevalue("windowed" if kind == "windowed" else "plain")
    engine = text_engine(monkeypatch, built, **settings)
    engine = unshareable(engine) if kind == "unshareable" else engine
    asked = {}
    for prompt in prompts_of(rng, 30):
        count, samples = rng.randrange(1, 24), rng.choice([1, 1, 1, 3, 6])
        stop = [rng.randrange(UNSOUND) for _ in range(rng.choice([0, 0, 4]))]
        temperature = rng.choice([0.0, 1.0])
        options = dict(num_samples=samples, stop_tokens=stop, temperature=temperature)
        asked[engine.submit(prompt, count, **options)] = [
            continued(prompt, count, k if temperature else 0, stop) for k in range(samples)
        ]
        for _ in range(rng.randrange(3)):
            engine.step()
            check(engine)
    assert engine.run() == asked
    assert all(each.state == "finished" for each in asked)
    stats = engine.stats()
    if num_pages == 16 and kind != "no prefixes":
        assert stats.preemptions > 0  # the case that is meant
    assert stats.new_tokens == sum(len(tokens) for each in asked.values() for tokens in each)
    at_rest(engine)


def test_samples_compute_their_prompt_once(monkeypatch, plain):
    engine = text_engine(monkeypatch, plain)
    prompt = list(range(21))
    done = engine.submit(prompt, 3, num_samples=4, temperature=1.0)
    engine.run()
    stats = engine.stats()
    assert stats.prompt_tokens == 4 * 21 and stats["cached_prompt_tokens"] == 3 * 21
    assert engine._device.read_tokens == 21
    assert done.tokens == [continued(prompt, 3, k) for k in range(4)]
    at_rest(engine)


def test_equal_prompts_wait_for_the_first(monkeypatch, plain):
    """Four equal prompts at once: three find what the first has computed."""
    for schedule, computed in (("longest-prefix", 22 + 3 * 2), ("fcfs", 4 * 22)):
        engine = text_engine(monkeypatch, plain, schedule=schedule, max_batch=4, prefill_chunk=32)
        requests = [engine.submit(range(22), 4) for _ in range(4)]
        engine.run()
        assert engine._device.read_tokens == computed
        assert all(each.tokens == [continued(range(22), 4)] for each in requests)


def test_rows_read_what_they_share_together(monkeypatch, plain):
    """As long as enough of them are there; who they are changes in the middle."""
    monkeypatch.setattr(
        inspect.unwrap(sharing.shared_prefixes), "__kwdefaults__", {"window": None, "shapes": None, "fewest": 8}
    )
    engine = text_engine(monkeypatch, plain, num_pages=60)
    head = list(range(20))
    asked = {}
    for i in range(7):
        asked[engine.submit([*head, i], 4 + 3 * i, stop_tokens=[i])] = [continued([*head, i], 4 + 3 * i, stop=[i])]
    assert engine.run() == asked
    assert engine._device.read_together > 10
    at_rest(engine)


def test_the_last_token_takes_no_step(monkeypatch, plain):
    engine = text_engine(monkeypatch, plain)
    engine.submit([1, 2, 3], 3)
    engine.run()
    assert engine._device.steps == 2  # the prompt brings the first token


def test_a_watermark_stays_free_for_those_that_grow():
    pool = PrefixPool([LayerGroup(num_blocks=200)], 4, chunk=16)
    tokens = np.arange(4 * 199, dtype=np.int32)
    assert pool.open("a", tokens, "") is None
    assert pool.open("a", tokens[:-4], "") == 0
    pool.close("a")
    assert pool.open("a", tokens, "", alone=True) == 0


def test_pages_of_a_window_are_promised_to_who_is_being_read():
    """Of nine pages the first prompt has four and takes up to seven at once; another may have two, not three."""
    pool = PrefixPool([LayerGroup(num_blocks=99), LayerGroup(num_blocks=9, window=7)], 4, chunk=16)
    tokens = np.arange(40, dtype=np.int32)
    assert pool.open("a", tokens, "") == 0
    assert pool.open("b", 100 + tokens[:12], "") is None
    assert pool.open("b", 100 + tokens[:8], "") == 0
    for end in (16, 32, 40):
        pool.reach("a", end)
        pool.check()
    pool.keep("a", tokens)
    pool.check()


def test_nobody_waits_for_another_tenants_prompt(monkeypatch, plain):
    """Both are read in the first tick: what the one reads the other will not find."""
    engine = text_engine(monkeypatch, plain, prefill_chunk=32)
    for namespace in ("a", "b"):
        engine.submit(range(22), 2, namespace=namespace)
    engine.step()
    assert engine._device.read_tokens == 44
    engine.run()
    at_rest(engine)


def test_what_was_said_is_found_by_the_next_turn(monkeypatch, plain):
    engine = text_engine(monkeypatch, plain)
    prompt = list(range(10))
    first = engine.submit(prompt, 7)
    engine.run()
    turn = [*prompt, *first.tokens[0], 3, 4]
    engine.submit(turn, 2)
    engine.run()
    # Of 16 tokens that lie in pages (the last one was never appended) four whole pages are found.
    assert engine.stats().cached_prompt_tokens == 16
    assert engine.submit(turn, 2, namespace="other") and engine.run()
    assert engine.stats().cached_prompt_tokens == 16


def test_a_request_is_passed_over_64_times_at_most(monkeypatch, plain):
    engine = text_engine(monkeypatch, plain, max_batch=1, num_pages=40)
    popular = list(range(8))
    engine.submit(popular, 1)
    engine.run()
    lonely = engine.submit([40] * 8, 1)
    order = []
    for i in range(100):
        engine.submit([*popular, i % UNSOUND, i // UNSOUND], 1, on_token=lambda *_, i=i: order.append(i))
    while lonely.state != "finished":
        engine.step()
    assert 60 <= len(order) <= 65
    engine.run()
    at_rest(engine)


def test_of_equal_prefixes_the_first_to_come_goes_first(monkeypatch, plain):
    engine = text_engine(monkeypatch, plain, max_batch=1)
    engine.submit(range(8), 1)
    engine.run()
    order = []
    for i in range(5):
        engine.submit([*range(8), 20 + i], 1, on_token=lambda *_, i=i: order.append(i))
    engine.run()
    assert order == list(range(5))


def test_larger_priorities_go_first_and_leave_last(monkeypatch, plain):
    engine = text_engine(monkeypatch, plain, max_batch=2, num_pages=12, prefix_cache=False)
    order = []
    note = lambda name: lambda sample, token: order.append(name) if name not in order else None
    low = engine.submit([1] * 20, 20, priority=-1, on_token=note("low"))
    high = engine.submit([2] * 20, 20, priority=5, on_token=note("high"))
    middle = engine.submit([3] * 4, 2, on_token=note("middle"))
    states = set()
    while engine.step():
        states.add((high.state, low.state))
    assert order[-1] == "low"
    assert not any(state[0] == "preempted" for state in states)
    assert middle.tokens == [continued([3] * 4, 2)]
    late = text_engine(monkeypatch, plain, max_batch=2, num_pages=12)
    low = late.submit([1] * 20, 20)
    for _ in range(4):
        late.step()
    high = late.submit([2] * 20, 20, priority=1)
    states = set()
    while late.step():
        states.add((high.state, low.state))
    assert ("running", "preempted") in states
    assert (low.tokens, high.tokens) == ([continued([1] * 20, 20)], [continued([2] * 20, 20)])


def test_the_longest_prefix_first_computes_every_page_once(monkeypatch, plain):
    """Theorem 3.1 of arXiv:2312.07104: a pool as small as the longest request reaches the optimum."""
    rng = random.Random(3)
    trunk = [[rng.randrange(UNSOUND) for _ in range(16)] for _ in range(8)]
    branch = {(a, b): [rng.randrange(UNSOUND) for _ in range(8)] for a in range(8) for b in range(2)}
    prompts = [
        [*trunk[a], *branch[a, b], *[rng.randrange(UNSOUND) for _ in range(4)], a]
        for _ in range(3) for a in range(8) for b in range(2)
    ]  # fmt: skip
    rng.shuffle(prompts)
    pages = {tuple(prompt[: end * 4]) for prompt in prompts for end in range(1, len(prompt[:-1]) // 4 + 1)}
    optimum = sum(len(prompt) for prompt in prompts) - 4 * len(pages) - len(prompts)
    reached = {}
    for schedule in ("longest-prefix", "fcfs"):
        engine = text_engine(monkeypatch, plain, schedule=schedule, num_pages=8, max_batch=1, max_length=30)
        for prompt in prompts:
            engine.submit(prompt, 1)
        engine.run()
        reached[schedule] = engine.stats().cached_prompt_tokens / optimum
    assert reached["longest-prefix"] == 1
    assert reached["fcfs"] < 0.15


def test_what_repeats_itself_goes_on():
    """However short it is; and what is new is not guessed at, nor what was not foreseen."""
    for period in range(1, 9):
        tokens = [i % period for i in range(40)]
        text = Lookup([50, 51, 52, *tokens])
        assert text.foresaw and text.guess(7) == [i % period for i in range(40, 47)]
        text.push(60)
        assert not text.foresaw and text.guess(7) == []
    assert Lookup([]).guess(3) == Lookup([1]).guess(3) == Lookup(range(30)).guess(3) == []
    assert Lookup([1, 2, 3, 9, 1, 2, 4, 1, 2]).guess(2) == [4, 1]  # the last time counts
    assert Lookup([1, 2, 3, 9, 0, 2, 4, 1, 2]).guess(2) == [3, 9]  # but more tokens count more


@pytest.mark.wrong_types
def test_no_more_is_guessed_than_is_wanted():
    """A step gives one token besides the guessed ones."""
    for drawn in range(7):
        text = Text(0, new=[1, 2] * 4, num_drawn=8 + drawn)
        job = types.SimpleNamespace(
            is_beam=False, prefills=[], sequences=[text], prompt=np.array([1, 2] * 3, np.int32), limit=15
        )
        Guesses(4).guess([job])
        assert text.guess == [1, 2, 1, 2][: max(15 - text.num_drawn - 1, 0)]


@pytest.mark.parametrize("kind", ["plain", "windowed"])
def test_guesses_change_nothing(monkeypatch, request, kind):
    """Texts that repeat themselves, in a small pool, with samples and stop tokens: the same tokens in fewer steps."""
    steps = {}
    for speculate in (0, 4, 7):
        rng = random.Random(5)
        engine = text_engine(monkeypatch, request.getfixturevalue(kind), num_pages=30, speculate=speculate)
        engine._device.next_token = repeating
        asked = {}
        for prompt in prompts_of(rng, 12):
            stop = [rng.randrange(UNSOUND)] if rng.random() < 0.3 else []
            expected = [continued(prompt, 30, k, stop, repeating) for k in range(2)]
            asked[engine.submit(prompt, 30, num_samples=2, temperature=1.0, stop_tokens=stop)] = expected
        assert engine.run() == asked
        steps[speculate] = engine._device.steps
        assert (engine._device.accepted > 50) == (speculate > 0)
        at_rest(engine)
    assert steps[7] < 0.6 * steps[0]
    with pytest.raises(errors.RangeError, match="speculate"):
        text_engine(monkeypatch, request.getfixturevalue(kind), speculate=8)


@pytest.mark.parametrize("windows", [(None,), (None, 6)])
def test_tables_of_rows_are_those_of_their_texts(windows):
    """Whatever comes, grows, parts and goes. What was given out once is not written to again."""
    rng = random.Random(2)
    pool = PrefixPool([LayerGroup(num_blocks=90, window=window) for window in windows], 2, chunk=8)
    kept, widths = RowTables(pool, 5, [12] * len(windows)), [12] * len(windows)
    free, texts, given = list(range(5)), [], []
    for _ in range(400):
        what = rng.choice(["come", "grow", "grow", "grow", "part", "go", "again", "nothing"])
        if (what == "come" and free) or (what == "again" and texts):
            if what == "again":  # preempted, and let in to the same row
                pool.close(text := texts.pop(rng.randrange(len(texts))))
            else:
                text = Text(0, row=free.pop(rng.randrange(len(free))))
            prompt = np.arange(rng.randrange(1, 9), dtype=np.int32)
            assert pool.open(text, prompt, "") is not None
            pool.reach(text, len(prompt))
            pool.keep(text, prompt)
            texts.append(text)
        elif what == "grow":
            for text in texts:
                if pool.length(text) < 24:
                    assert pool.grow(text) is not None
        elif what == "part" and free and texts:
            child = Text(0, row=free.pop())
            assert pool.fork(rng.choice(texts), child) is not None
            texts.append(child)
        elif what == "go" and texts:
            text = texts.pop(rng.randrange(len(texts)))
            pool.close(text)
            free.append(text.row)
        rng.shuffle(texts)
        given.append((now := kept.of(texts), [table.copy() for table in now]))
        expected = padded(pool.tables(texts, widths), 5)
        for table, right in zip(now, expected, strict=True):
            rows = [text.row for text in texts]
            np.testing.assert_array_equal(table[rows], right[: len(rows)])
            assert (np.delete(table, rows, axis=0) == -1).all()
    for tables, copies in given:
        for table, copy in zip(tables, copies, strict=True):
            np.testing.assert_array_equal(table, copy)
    assert len({id(tables) for tables, _ in given}) < 350  # as they were, where nothing has changed


# Tiers --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["plain", "windowed"])
def test_what_left_comes_back(monkeypatch, request, kind):
    """A pool for hardly one prompt, and room for all below it."""
    built, cached = request.getfixturevalue(kind), {}
    for tiers in ((), (HostTier(10**6),)):
        rng = random.Random(7)
        heads = [[rng.randrange(UNSOUND) for _ in range(24)] for _ in range(4)]
        engine = text_engine(monkeypatch, built, num_pages=12, tiers=tiers)
        for turn in range(12):
            prompt = [*heads[turn % 4], *[rng.randrange(UNSOUND) for _ in range(4)]]
            asked = engine.submit(prompt, 6)
            assert engine.run() == {asked: [continued(prompt, 6)]}
            check(engine)
        stats = engine.stats()
        cached[len(tiers)] = stats.cached_prompt_tokens
        assert stats.evictions > 0 and sum(stats.tier_prompt_tokens) == (stats.cached_prompt_tokens if tiers else 0)
        at_rest(engine)
    assert cached == {0: 0, 1: 8 * 24}


@pytest.mark.parametrize("kind", ["plain", "windowed"])
@pytest.mark.parametrize("chunk", [4, 16])
def test_who_comes_back_computes_less_than_a_page_again(monkeypatch, request, kind, chunk):
    """Nothing is shared, and much does not fit: with room below, each resumption costs the end of a last page."""
    computed = {}
    for tiers in ((), (HostTier(10**6),)):
        rng = random.Random(11)
        settings = dict(num_pages=14, max_batch=3, prefill_chunk=chunk, max_length=40, schedule="fcfs")
        engine = text_engine(monkeypatch, request.getfixturevalue(kind), tiers=tiers, **settings)
        prompts = [[i, *(rng.randrange(UNSOUND) for _ in range(rng.randrange(9, 20)))] for i in range(20)]
        asked = {engine.submit(each, 20): [continued(each, 20)] for each in prompts}
        assert engine.run() == asked
        preemptions = engine.stats().preemptions
        again = engine._device.read_tokens - sum(map(len, prompts))
        computed[bool(tiers)] = again
        if tiers:  # one of these tokens is its last one, which was not in a page before
            assert preemptions > 5 and again <= preemptions * engine.page_size
        at_rest(engine)
    assert computed[True] < computed[False]


def test_a_prompt_that_is_being_read_keeps_its_pages(monkeypatch, plain):
    """One that leaves after half of its prompt goes on there."""
    engine = text_engine(monkeypatch, plain, prefill_chunk=8)
    gone = engine.submit(range(40), 3)
    for _ in range(3):
        engine.step()
    gone.cancel()
    engine.step()
    assert engine._device.read_tokens == 24
    again = engine.submit(range(40), 3)
    assert engine.run() == {again: [continued(range(40), 3)]}
    assert engine._device.read_tokens == 40
    at_rest(engine)


def test_what_is_below_outlives_an_error_in_a_tick(monkeypatch, plain):
    """The device's pages are lost, and who runs with them; who waits goes on, with what the tiers have."""
    engine = text_engine(monkeypatch, plain, max_batch=1, tiers=(HostTier(10**6),))
    engine.submit(range(20), 2)
    engine.run()
    engine.save_prefixes()
    failed, waits = engine.submit(range(22), 9), engine.submit(range(24), 4)
    for _ in range(3):
        engine.step()
    engine._device.fails = lambda what: 1 / 0
    with pytest.raises(ZeroDivisionError):
        engine.step()
    engine._device.fails = None
    assert failed.state == "failed" and "ZeroDivisionError" in str(failed.error)
    assert failed.tokens[0] == continued(range(22), 9)[: len(failed.tokens[0])]
    assert engine._scheduler.pool.cached_pages == 0
    assert engine.run() == {waits: [continued(range(24), 4)]}
    assert engine.stats().tier_prompt_tokens == (20,)
    at_rest(engine)


def test_prefixes_outlive_an_engine(monkeypatch, plain, tmp_path):
    prompt = list(range(30))
    with DiskTier(tmp_path / "pages", 10**6) as disk:
        engine = text_engine(monkeypatch, plain, tiers=(HostTier(10**4), disk))
        engine.submit(prompt, 4)
        engine.run()
        engine.save_prefixes()
    with DiskTier(tmp_path / "pages", 10**6) as disk:
        engine = text_engine(monkeypatch, plain, tiers=(HostTier(10**4), disk))
        again, other = engine.submit([*prompt, 5], 4), engine.submit(prompt, 4, namespace="b")
        assert engine.run() == {again: [continued([*prompt, 5], 4)], other: [continued(prompt, 4)]}
        assert engine.stats().tier_prompt_tokens == (0, 28)
        assert engine.stats().tiers[1].hits == 7
        at_rest(engine)
    with DiskTier(tmp_path / "pages", 10**6) as disk:  # another model
        engine = text_engine(monkeypatch, model(rope_theta=5000.0), tiers=(disk,))
        engine.submit([*prompt, 5], 4)
        engine.run()
        assert engine.stats().tier_prompt_tokens == (0,)


# Beams --------------------------------------------------------------------------------------------------------------


def plain_beams(prompt, count, width, stop=()):
    """A search over all continuations of what is kept."""
    kept = [((), 0.0, False)]
    for _ in range(count):
        candidates = [each for each in kept if each[2]]
        for tokens, score, is_over in kept:
            if not is_over:
                logprobs = np.log(scores_after([*prompt, *tokens]))
                candidates += [((*tokens, t), score + float(logprobs[t]), t in stop) for t in range(V)]
        kept = sorted(candidates, key=lambda each: -each[1])[:width]
        if all(each[2] for each in kept):
            break
    return kept


@pytest.mark.parametrize("kind", ["plain", "windowed", "unshareable"])
@pytest.mark.parametrize("num_pages", [40, 18])
def test_beams(monkeypatch, request, kind, num_pages):
    """Among other requests, with stop tokens, and in so small a pool that some have to leave."""
    rng = random.Random(1)
    built = request.getfixturevalue("windowed" if kind == "windowed" else "plain")
    engine = text_engine(monkeypatch, built, num_pages=num_pages)
    engine = unshareable(engine) if kind == "unshareable" else engine
    asked, others = {}, {}
    for width, count in ((3, 6), (1, 4), (4, 5), (2, 9)):
        prompt = [rng.randrange(UNSOUND) for _ in range(rng.randrange(1, 12))]
        stop = [rng.randrange(UNSOUND) for _ in range(9)] if width % 2 else []
        asked[engine.submit(prompt, count, beam_width=width, stop_tokens=stop)] = plain_beams(
            prompt, count, width, stop
        )
        others[engine.submit(prompt, 9)] = [continued(prompt, 9)]
    done = engine.run()
    for each, expected in asked.items():
        assert each.tokens == [list(tokens) for tokens, *_ in expected]
        np.testing.assert_allclose([sum(x) for x in each.logprobs], [score for _, score, _ in expected], rtol=1e-5)
    assert {each: done[each] for each in others} == others
    at_rest(engine)


def test_one_beam_more_with_ended_ones():
    """An ended text competes, and wins ties."""
    live = [beams.Beam((1,), (-1.0,), -1.0, 0), beams.Beam((2,), (-2.0,), -2.0, 0)]
    ended = [beams.Beam((9,), (-1.5,), -1.5, None)]
    tokens, logprobs = np.array([[3, 4], [5, 6]], np.int32), np.array([[-0.5, -3], [-0.25, -0.75]], np.float32)
    going, over = beams.grown(live, ended, tokens, logprobs, 2, np.zeros((10,), bool))
    assert [beam.tokens for beam in going] == [(1, 3)] and [beam.tokens for beam in over] == [(9,)]
    assert going[0].parent == 0 and going[0].score == -1.5


# What goes wrong ----------------------------------------------------------------------------------------------------


@pytest.mark.wrong_types
def test_refused_at_submit(monkeypatch, plain, windowed):
    engine = text_engine(monkeypatch, plain, num_pages=8)
    for prompt, count, options, error in (
        (range(40), 25, {}, errors.CapacityError),  # max_length 64
        (range(30), 3, {}, errors.OutOfBlocksError),  # 8 pages of 4
        (range(12), 12, dict(beam_width=3), errors.OutOfBlocksError),
        ([], 3, {}, errors.ShapeError),
        ([V], 3, {}, errors.RangeError),
        ([1.5], 3, {}, errors.DTypeError),
        ([1], -1, {}, errors.RangeError),
        ([1], 2, dict(num_samples=0), errors.RangeError),
        ([1], 2, dict(beam_width=2, temperature=1.0), errors.ConfigError),
        ([1], 2, dict(beam_width=2, num_samples=2), errors.ConfigError),
        ([1], 2, dict(beam_width=5), errors.ConfigError),
        ([1], 2, dict(beam_width=2, on_token=print), errors.ConfigError),
        ([1], 2, dict(namespace=3), errors.DTypeError),
        ([1], 2, dict(priority="high"), errors.DTypeError),
        ([1], 2, dict(on_token=3), errors.DTypeError),
        ([1], 2, dict(top_k=3), errors.ConfigError),
    ):
        with pytest.raises(error):
            engine.submit(prompt, count, **options)
    with pytest.raises(errors.CapacityError, match="max_length is 64"):
        text_engine(monkeypatch, plain).submit(range(40), 25)
    assert not engine.step() and engine.run() == {}
    at_rest(engine)
    exactly = engine.submit(range(30), 2)  # fills the pool
    assert engine.run() == {exactly: [continued(range(30), 2)]}
    with pytest.raises(errors.ConfigError, match="schedule"):
        text_engine(monkeypatch, plain, schedule="random")
    with pytest.raises(errors.ConfigError, match="max_batch"):
        text_engine(monkeypatch, plain, max_batch=0)


def test_nothing_to_do(monkeypatch, plain):
    engine = text_engine(monkeypatch, plain)
    running = engine.submit([1], 5)
    engine.step()
    with pytest.raises(errors.ConfigError, match="before requests run"):
        engine.warm_up()
    assert engine.run() == {running: [continued([1], 5)]}
    assert engine.run() == {} and not engine.step()
    nothing = engine.submit([1, 2], 0)
    assert nothing.state == "finished" and nothing.tokens == [[]]
    assert engine.run() == {nothing: [[]]} and engine.run() == {}


def test_logits_that_are_no_numbers_fail_their_request_alone(monkeypatch, plain):
    engine = text_engine(monkeypatch, plain)
    bad, good = engine.submit([1, UNSOUND, 2], 4), engine.submit([1, 2], 4)
    assert engine.run() == {good: [continued([1, 2], 4)]}
    assert bad.state == "failed" and isinstance(bad.error, errors.RangeError) and bad.tokens == [[]]
    assert engine.stats().failed == 1
    with pytest.raises(errors.RangeError):
        list(bad.stream())
    at_rest(engine)


def test_what_was_not_written_is_no_prefix(monkeypatch, plain):
    """A step that is refused, for what its caches recorded, has written nothing: its page may not be found again."""
    engine = text_engine(monkeypatch, plain)
    step, prompt = engine._device.step, [1, 2, 3, 4, 5, 6]

    def refused(tables, *args):
        came, device = step(tables, *args), engine._device
        if device.lengths[0] == 8:  # the last token of its second page
            device.memory[0][tables[0][0][1], 3] = POISON
            came.status[0], device.running[0] = OVERFLOW, False
        return came

    engine._device.step = refused
    bad = engine.submit(prompt, 9)
    engine.run()
    assert bad.state == "failed" and bad.tokens == [continued(prompt, 9)[:2]]
    check(engine)
    at_rest(engine)


def test_cancelled(monkeypatch, plain):
    """Before it was let in, while its prompt is read, while it grows, twice, and after its end."""
    for when in range(8):
        engine = text_engine(monkeypatch, plain)
        other = engine.submit(range(9), 6)
        gone = engine.submit(range(40), 9, num_samples=2, temperature=1.0)
        for _ in range(when):
            engine.step()
        gone.cancel(), gone.cancel()
        assert engine.run() == {other: [continued(range(9), 6)]}
        assert gone.state == "cancelled"
        assert all(each == continued(range(40), 9, k)[: len(each)] for k, each in enumerate(gone.tokens))
        other.cancel()
        assert other.state == "finished"
        at_rest(engine)


def test_a_callback_that_raises(monkeypatch, plain):
    engine = text_engine(monkeypatch, plain)
    calls = []

    def call(sample, token):
        calls.append(token)
        if len(calls) == 3:
            raise KeyError("mine")

    bad = engine.submit(range(9), 9, on_token=call)
    good = engine.submit(range(9), 9)
    with pytest.raises(KeyError, match="mine"):
        engine.run()
    assert bad.state == "cancelled" and bad not in engine._jobs
    check(engine)
    assert engine.run() == {good: [continued(range(9), 9)]}
    assert calls == continued(range(9), 9)[:3]
    at_rest(engine)


def test_tokens_are_streamed(monkeypatch, plain):
    engine = text_engine(monkeypatch, plain)
    called = []
    one = engine.submit(range(9), 6, num_samples=2, temperature=1.0, on_token=lambda *x: called.append(x))
    streamed = list(one.stream())
    assert [[t for i, t in streamed if i == k] for k in range(2)] == one.tokens
    assert [[t for i, t in called if i == k] for k in range(2)] == one.tokens
    assert list(one.stream()) and "12" not in repr(one) and "6+6 of 6" in repr(one)
    with pytest.raises(errors.ConfigError):
        next(engine.submit([1], 2, beam_width=2).stream())


def test_a_device_that_fails_gives_everything_back(monkeypatch, plain):
    """An exception at every k-th thing the device does: those that were in fail, the others go on."""
    for k in range(1, 25):
        engine = text_engine(monkeypatch, plain, max_batch=2, num_pages=20)
        requests = {engine.submit(p, 8): continued(p, 8) for p in prompts_of(random.Random(k), 6)}
        counter = itertools.count(1)

        def fails(what, counter=counter, k=k):
            if next(counter) == k:
                raise RuntimeError(f"no {what}")

        engine._device.fails = fails
        with pytest.raises(RuntimeError, match="no "):
            engine.run()
        check(engine)
        engine.run()
        for request, expected in requests.items():
            assert request.state in ("finished", "failed")
            assert request.tokens == [expected] if request.state == "finished" else request.error is not None
        assert sum(request.state == "failed" for request in requests) in (1, 2)
        at_rest(engine)


def lives(monkeypatch, plain, windowed, seed, count):
    """Requests that come, are cancelled, stopped, preempted, forked and interrupted at random."""
    rng = random.Random(seed)
    kind = rng.choice(["plain", "windowed", "unshareable"])
    engine = text_engine(
        monkeypatch,
        windowed if kind == "windowed" else plain,
        num_pages=rng.choice([12, 16, 24, 40]),
        max_batch=rng.choice([1, 2, 4, 5]),
        prefill_chunk=rng.choice([4, 5, 16]),
        schedule=rng.choice(["fcfs", "longest-prefix"]),
        prefix_cache=rng.random() < 0.8,
        max_length=40,
        speculate=rng.choice([0, 0, 3]) if kind != "unshareable" else 0,
        tiers=rng.choice([(), (HostTier(3000),)]),
    )
    engine = unshareable(engine) if kind == "unshareable" else engine
    prompts = prompts_of(rng, count)
    asked: dict[Request, list] = {}

    def bad_callback(sample, token):
        if rng.random() < 0.1:
            raise ZeroDivisionError

    def step():
        try:
            return engine.step()
        except ZeroDivisionError:
            return True

    for i, prompt in enumerate(prompts):
        new = rng.randrange(1, 16)
        stop = [rng.randrange(UNSOUND) for _ in range(rng.choice([0, 3]))]
        options = dict(stop_tokens=stop, priority=rng.choice([0, 0, 1]), namespace=rng.choice(["", "a"]))
        try:
            if rng.random() < 0.1:
                width = rng.randrange(1, 3)
                request = engine.submit(prompt, new, beam_width=width, **options)
                asked[request] = None
            else:
                samples = rng.choice([1, 1, 1, 2, 4])
                callback = bad_callback if rng.random() < 0.1 else None
                request = engine.submit(prompt, new, num_samples=samples, temperature=1.0, on_token=callback, **options)
                asked[request] = [continued(prompt, new, k, stop) for k in range(samples)]
        except (errors.CapacityError, errors.ConfigError):
            continue
        for _ in range(rng.randrange(4)):
            step()
            if rng.random() < 0.1:
                rng.choice(list(asked)).cancel()
            check(engine)
        if i % 97 == 50:
            engine._device.fails = lambda what: 1 / 0
            step()
            engine._device.fails = None
    for _ in range(50 * count):
        if not step():
            break
    else:
        raise AssertionError("it does not end")
    for request, expected in asked.items():
        assert request.is_over
        if expected is not None:
            whole = request.state == "finished"
            pairs = zip(request.tokens, expected, strict=True)
            assert all(a == (b if whole else b[: len(a)]) for a, b in pairs), (request, expected)
    at_rest(engine)
    return engine.stats().preemptions


def test_lives(monkeypatch, plain, windowed):
    """1,000 requests; 20,000 in the full run."""
    assert sum(lives(monkeypatch, plain, windowed, seed, 100) for seed in range(10)) > 50


@FULL_RUN
@pytest.mark.parametrize("first", range(1000, 1100, 10))
def test_many_lives(monkeypatch, plain, windowed, first):
    for seed in range(first, first + 10):
        lives(monkeypatch, plain, windowed, seed, 200)


def test_the_oracle_sees_what_is_read():
    assert next_token([1, 2, 3]) != next_token([1, 2, 4]) or next_token([1, 2]) != next_token([2, 1])
