"""Windows, eviction and codecs on bad input and edge cases, one table as in test_bad_input.py.

Rows are numbered as in bad_inputs.txt: 61-69 are windows, rings and sinks, 105-111 policies that let
tokens go, 112-118 codecs of fewer bits. What each of them does on plain input is in test_policies.py, test_codecs.py.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import policy_oracles as oracles
import pytest
import suites
from bad_input_table import Table, create, run, step
from codec_cases import KIVI, TOKENWISE, bound, kivi_replay, over_decoded, step_of, there_and_back
from oracles import assert_same_bits, attend_token
from policy_cases import kept
from policy_cases import step as policy_step
from policy_cases import tokens as policy_tokens
from suites import CHUNK, POLICIES, STEPS, B, by_id, make_cache, tokens

import kvattn
from kvattn import errors
from kvattn.cache.status import NONFINITE
from kvattn.codecs import float8 as float8_file
from kvattn.codecs import grouped, scaled
from kvattn.policies import fastgen, scored

(RING,) = by_id(POLICIES, "ring5")
TABLE = Table()
bad, defined = TABLE.bad, TABLE.defined

PROMPT, BUDGET, LENGTH = 5, 7, 16
"""A prompt that fits, tokens one by one until it does not, and until every token of the prompt could have left."""
ROPE = kvattn.RoPE(8)
SPECIAL, PUNCTUATION = 1, 2
FASTGEN = kvattn.FastGen(0.8, (SPECIAL,), (PUNCTUATION,), frequent=0.4, local=0.4)
"""Of five tokens of a prompt two are frequent, and two local."""
F32 = 1e-5


def empty(policy):
    """A cache of two rows and two heads."""
    keeps_all = isinstance(policy, kvattn.Full | kvattn.FastGen)
    return create(capacity=LENGTH if keeps_all else None, policy=policy)


def feed(policy, cache, q, k, v, ids=None, rope=ROPE):
    """One jitted step, shared; the cache is donated."""
    more = {}
    if isinstance(policy, kvattn.FastGen) and (policy.special_tokens or policy.punctuation_tokens):
        more["token_ids"] = jnp.asarray(np.zeros(q.shape[:2]) if ids is None else ids, jnp.int32)
    return policy_step("xla", rope)(*(jnp.asarray(x, jnp.float32) for x in (q, k, v)), cache, **more)


def follow(policy, q, k, v, ids=None, *, prompt=PROMPT, rope=ROPE):
    """Feeds the prompt, then token by token.

    Returns:
        outputs; {t: [row][head] the tokens kept once token t came}, from the last of the prompt on; the cache.
    """
    cache, outs, sets, start = empty(policy), [], {}, 0
    for n in [prompt] + [1] * (q.shape[1] - prompt):
        now = slice(start, start + n)
        out, cache = feed(policy, cache, q[:, now], k[:, now], v[:, now], None if ids is None else ids[:, now], rope)
        outs.append(np.asarray(out))
        start += n
        sets[start - 1] = [kept(cache, row) for row in range(len(q))]
    return np.concatenate(outs, axis=1), sets, cache


# Windows, rings, sinks ------------------------------------------------------------------------------------------------


@defined(61, "rings after W - 1, W, W + 1, 2W - 1, 2W, 2W + 1, 10W tokens")
def _():
    window = 5
    cache, lists = make_cache(RING), RING.oracle()
    targets = np.asarray([window - 1, window, window + 1, 2 * window - 1, 2 * window, 2 * window + 1])
    stops = [targets, np.full(B, 10 * window)]
    for stop in stops:
        while any(n < s for n, s in zip(lists.lengths(), stop, strict=True)):
            count = np.clip(stop - np.asarray(lists.lengths()), 0, CHUNK)
            new = tokens(int(sum(lists.lengths())), CHUNK)
            _, cache = STEPS(*new, cache, count, implementation="xla")
            lists.append(*new, count)
        suites.check_counts(RING, cache, stop.tolist())
        suites.check_contents(RING, cache, lists)


defined(62, "a chunk longer than the window")(lambda: suites.check_oracle(RING, "xla"))
defined(63, "a chunk over the wrap point at every phase")(lambda: suites.check_ring_phases("xla"))


@defined(64, "trim by 0 is no change")
def _():
    _, cache = step()
    for a, b in zip(jax.tree.leaves(cache), jax.tree.leaves(cache.trim(0)), strict=True):
        assert_same_bits(a, b, "the cache")


def trimmed_ring(policy):
    """Two tokens that come and are taken back before a ring turns leave no trace, also once it has turned."""
    q, k, v = policy_tokens(11, batch=2, length=LENGTH)
    odd = policy_tokens(12, batch=2, length=LENGTH)
    outs, caches = [], []
    for extra in (0, 2):
        _, _, cache = follow(policy, *(x[:, :PROMPT] for x in (q, k, v)))
        for t in range(PROMPT, PROMPT + extra):
            _, cache = feed(policy, cache, *(x[:, t : t + 1] for x in odd))
        cache = cache.trim(extra)
        assert np.asarray(cache.lengths).tolist() == [PROMPT] * 2
        out = []
        for t in range(PROMPT, LENGTH):
            now, cache = feed(policy, cache, *(x[:, t : t + 1] for x in (q, k, v)))
            out.append(np.asarray(now))
        outs.append(np.concatenate(out, axis=1))
        caches.append(cache.check())
    assert_same_bits(*outs, "outputs")
    assert_same_bits(*(c.positions for c in caches), "positions")


for policy in (kvattn.SlidingWindow(7), kvattn.StreamingLLM(2, 5)):
    defined(64, f"{type(policy).__name__}: trim before the ring turns")(lambda policy=policy: trimmed_ring(policy))
bad(64, "trim by more than there is", errors.RangeError, "1", "0")(lambda: create().trim(1))
for policy in (kvattn.SlidingWindow(4), kvattn.StreamingLLM(1, 3)):
    bad(64, f"{type(policy).__name__}: trim of a ring that turned", errors.UnsupportedError, str(policy), "[0, 1]")(
        lambda policy=policy: dataclasses.replace(create(policy=policy), lengths=jnp.full((2,), 5, jnp.int32)).trim(1)
    )
bad(65, "trim by a negative number", errors.RangeError, "num_tokens", "-1")(lambda: create().trim(-1))
bad(65, "trim by one negative number", errors.RangeError, "num_tokens", "-7")(lambda: create().trim([0, -7]))


@defined(65, "trim by a negative number under jit: recorded")
def _():
    cache = jax.jit(lambda c, n: c.trim(n))(create(), np.asarray([0, -1], np.int32))
    assert np.asarray(cache.lengths).tolist() == [0, 0]
    with pytest.raises(errors.RangeError, match=r"rows \[1\]"):
        cache.check()


@defined(66, "0, 1 and 4 sinks, and fewer tokens than sinks")
def _():
    for num_sinks in (0, 1, 4):
        case = suites.PolicyCase(
            f"sinks{num_sinks}",
            lambda n=num_sinks: kvattn.policies.StreamingLLM(n, 3),
            None,
            keeps=3,
            num_sinks=num_sinks,
        )
        suites.check_attendance(case, "reference")


defined(67, "a ring that is no multiple of the block")(lambda: suites.check_attendance(RING, "xla", seed=9))
defined(68, "one by one equals all at once")(
    lambda: suites.check_chunking(kvattn.SlidingWindow(8), None, "xla", ways=[[97], [1] * 97])
)


@defined(69, "a fork of a ring that turned is independent")
def _():
    cache = make_cache(RING)
    for seed in (1, 2):
        _, cache = STEPS(*tokens(seed, CHUNK), cache, implementation="xla")
    fork = cache.select(np.arange(B))
    before = [np.asarray(x).copy() for x in fork.dense()]
    _, cache = STEPS(*tokens(3, CHUNK), cache, implementation="xla")
    for a, b in zip(before, fork.dense(), strict=True):
        assert_same_bits(a, b, "the fork")
    assert np.asarray(fork.lengths).tolist() == [14] * B and np.asarray(cache.lengths).tolist() == [21] * B


# Policies that let tokens go ------------------------------------------------------------------------------------------


def turned(oracle):
    """An oracle that knows no rotation, of queries and keys rotated at their true positions."""
    turn = lambda x: np.stack([oracles.rotate(token, t) for t, token in enumerate(x)])
    return lambda q, k, v, *more: oracle(turn(q), turn(k), v, *more)


# One setting each, and its brute force over one row (q, k, v[, ids]): the programs are shared by the rows below.
SMALL = {
    "SlidingWindow": (kvattn.SlidingWindow(BUDGET), lambda *x: oracles.streaming(*x, 0, BUDGET, in_cache=False)),
    "StreamingLLM": (kvattn.StreamingLLM(2, 5), lambda *x: oracles.streaming(*x, 2, 5)),
    "H2O": (kvattn.H2O(4, 3), turned(lambda *x: oracles.h2o(*x, PROMPT, 4, 3))),
    "Scissorhands": (
        kvattn.Scissorhands(BUDGET, 2, 9, 3),
        turned(lambda *x: oracles.scissorhands(*x, PROMPT, BUDGET, 2, 9, 3)),
    ),
    "FastGen": (
        FASTGEN,
        turned(lambda q, k, v, ids: oracles.fastgen(q, k, v, PROMPT, ids, 0.8, (SPECIAL,), (PUNCTUATION,), 0.4, 0.4)),
    ),
}
SCORED = ("H2O", "Scissorhands", "FastGen")
"""Those that go by attention."""


def random_tokens(seed):
    """Tokens for two rows; of their ids some are special, some punctuation."""
    ids = np.random.default_rng(seed).integers(0, 6, (2, LENGTH))
    return *policy_tokens(seed, batch=2, length=LENGTH), ids


def as_the_oracle_says(name, q, k, v, ids):
    """Outputs and kept sets against brute force: float64 attention over exactly the tokens kept. Returns the sets."""
    policy, oracle = SMALL[name]
    out, sets, cache = follow(policy, q, k, v, ids)
    for row in range(2):
        more = (ids[row],) if name == "FastGen" else ()
        expected, last, *_ = oracle(q[row], k[row], v[row], *more)
        assert sets[LENGTH - 1][row] == last, (name, row)
        np.testing.assert_allclose(out[row], expected, atol=F32)
    cache.check()
    return sets


def all_on_first():
    """Every query attends to token 0 alone: in float32 the others get exactly nothing, so they tie."""
    q, k, v = policy_tokens(3, batch=2, length=LENGTH)
    # Numbers 3 and 7 turn by a thousandth per position.
    q, k = 0 * q, 0 * k
    q[..., 3], k[:, 0, :, 3] = 30.0, 30.0
    return q, k, v


def is_full_attention(policy, length):
    """Equal to a cache that keeps everything, and nothing left. Returns the cache."""
    q, k, v = policy_tokens(1, batch=2, length=length)
    out, sets, cache = follow(policy, q, k, v)
    expected, _, _ = follow(kvattn.Full(), q, k, v)
    np.testing.assert_allclose(out, expected, atol=F32)
    assert all(head == set(range(t + 1)) for t, rows in sets.items() for row in rows for head in row)
    return cache


for policy, length in (*((p, BUDGET) for p, _ in list(SMALL.values())[:4]), (kvattn.FastGen(1.0), LENGTH)):
    defined(105, f"{type(policy).__name__}: as many tokens as the budget")(
        lambda policy=policy, length=length: is_full_attention(policy, length)
    )

for what, call, fragment in (
    ("SlidingWindow(0)", lambda: kvattn.SlidingWindow(0), "window"),
    ("SlidingWindow(-3)", lambda: kvattn.SlidingWindow(-3), "-3"),
    ("StreamingLLM(4, 0)", lambda: kvattn.StreamingLLM(4, 0), "window"),
    ("StreamingLLM(0, 0)", lambda: kvattn.StreamingLLM(0, 0), "window"),
    ("StreamingLLM(4, -3)", lambda: kvattn.StreamingLLM(4, -3), "-3"),
    ("H2O(0, 0)", lambda: kvattn.H2O(0, 0), "num_heavy + num_recent must be >= 1"),
    ("H2O(-3, 5)", lambda: kvattn.H2O(-3, 5), "num_heavy must be >= 0, got -3"),
    ("H2O(5, -3)", lambda: kvattn.H2O(5, -3), "num_recent must be >= 0, got -3"),
    ("Scissorhands(0)", lambda: kvattn.Scissorhands(0), "budget must be >= 1, got 0"),
    ("Scissorhands(-3)", lambda: kvattn.Scissorhands(-3), "budget must be >= 1, got -3"),
    ("Scissorhands drop=0", lambda: kvattn.Scissorhands(4, drop=0), "drop must be >= 1, got 0"),
    ("Scissorhands drops more than its budget", lambda: kvattn.Scissorhands(4, drop=5), "drop must be <= budget (4)"),
    ("Scissorhands num_recent=-1", lambda: kvattn.Scissorhands(4, -1), "num_recent"),
    ("FastGen(0.0)", lambda: kvattn.FastGen(0.0), "recovery"),
    ("FastGen(-0.1)", lambda: kvattn.FastGen(-0.1), "recovery"),
    ("FastGen(1.2)", lambda: kvattn.FastGen(1.2), "recovery"),
    ("FastGen(nan)", lambda: kvattn.FastGen(np.nan), "recovery"),
    ("FastGen frequent=-0.1", lambda: kvattn.FastGen(frequent=-0.1), "frequent"),
    ("FastGen local=nan", lambda: kvattn.FastGen(local=np.nan), "local"),
):
    bad(106, what, errors.RangeError, fragment)(call)
for policy in (kvattn.H2O(2, 2), kvattn.Scissorhands(4)):
    bad(106, f"{type(policy).__name__}: a capacity of its budget", errors.ConfigError, "5", "capacity 4")(
        lambda policy=policy: create(capacity=4, policy=policy)
    )
for policy in (kvattn.H2O(1, 0), kvattn.Scissorhands(1)):
    bad(106, f"{type(policy).__name__}: a budget of True", errors.DTypeError, "True")(
        lambda policy=policy: type(policy)(True, 1)
    )


def keeps_one(policy, oracle, prompt):
    """A budget of one token: one is kept after every step, the right one."""
    q, k, v = policy_tokens(4, batch=2, length=8)
    out, sets, _ = follow(policy, q, k, v, prompt=prompt, rope=None)
    for row in range(2):
        expected, last = oracle(q[row], k[row], v[row], prompt)
        assert sets[7][row] == last, row
        np.testing.assert_allclose(out[row], expected, atol=F32)
    assert all(len(head) == 1 for rows in sets.values() for row in rows for head in row)


BUDGETS_OF_ONE = (
    (kvattn.SlidingWindow(1), lambda q, k, v, _: oracles.streaming(q, k, v, 0, 1, rotated=False)),
    (kvattn.StreamingLLM(0, 1), lambda q, k, v, _: oracles.streaming(q, k, v, 0, 1, rotated=False)),
    (kvattn.H2O(1, 0), lambda *x: oracles.h2o(*x, 1, 0)),
    (kvattn.H2O(0, 1), lambda *x: oracles.h2o(*x, 0, 1)),
    (kvattn.Scissorhands(1), lambda *x: oracles.scissorhands(*x, 1, 10, 400, 1)),
)
for policy, oracle in BUDGETS_OF_ONE:
    for prompt in (1, 4):
        defined(106, f"{policy}, a prompt of {prompt}")(lambda p=policy, o=oracle, n=prompt: keeps_one(p, o, n))


@defined(107, "H2O: of equal scores the lowest position leaves")
def _():
    _, sets, _ = follow(SMALL["H2O"][0], *all_on_first())
    for t in range(BUDGET, LENGTH):
        assert sets[t] == [[{0, *range(t - BUDGET + 2, t + 1)}] * 2] * 2, t


@defined(107, "Scissorhands: of equal records the lowest position leaves")
def _():
    # Only the last query counts, and it finds all unimportant but token 0.
    _, sets, _ = follow(kvattn.Scissorhands(4, 0, 1, drop=2), *all_on_first(), prompt=1)
    for t in range(4, LENGTH):
        assert sets[t] == [[{0, *range(t - 1 - t % 2, t + 1)}] * 2] * 2, t


@defined(107, "FastGen: of equal scores the lowest position leaves")
def _():
    _, sets, cache = follow(FASTGEN, *all_on_first())
    assert (np.asarray(cache.state.choice) == fastgen.FREQUENT).all()
    for t in range(PROMPT - 1, LENGTH):
        assert sets[t] == [[{0, t}] * 2] * 2, t


def nan_eagerly(name, at, length):
    """The last of these tokens of row 1 has a NaN in its query (at=0) or key (at=1)."""
    new = [np.asarray(x, np.float32) for x in policy_tokens(5, batch=2, length=length)]
    new[at][1, -1, 0, 0] = np.nan
    ids = {"token_ids": np.zeros((2, length), np.int32)} if name == "FastGen" else {}
    kvattn.cached_attention(*new, empty(SMALL[name][0]), **ids)


for name in SCORED:
    for at, role in enumerate(("query", "key")):
        bad(107, f"{name}: NaN in a {role}", errors.RangeError, "rows [1]", "NaN", name)(
            lambda name=name, at=at: nan_eagerly(name, at, 1)
        )
bad(107, "H2O: NaN in a prompt", errors.RangeError, "rows [1]", "NaN", "H2O")(lambda: nan_eagerly("H2O", 0, PROMPT))


def nan_under_jit(name, at):
    """Token 7 of row 1, query heads 0 and 1 (key/value head 0), has a NaN in its query or key.

    All that it attends to gets NaN, the least there is: by scores these tokens leave first. The recent ones stay, and
    nobody else notices. Token 2 is heavy, and stays for ever otherwise.
    """
    policy, when = SMALL[name][0], 7
    q, k, v = policy_tokens(6, 0.3, batch=2, length=LENGTH)
    q[..., 3], k[:, 2, :, 3] = 4.0, 12.0
    ids = np.zeros((2, LENGTH), int)
    ids[:, 0] = SPECIAL
    clean, clean_sets, clean_cache = follow(policy, q, k, v, ids)
    assert all(2 in head for rows in clean_sets.values() for row in rows for head in row), "a heavy token left"
    (q, k)[at][1, when, slice(2) if at == 0 else 0, 0] = np.nan
    out, sets, cache = follow(policy, q, k, v, ids)
    assert np.asarray(clean_cache.status).tolist() == [0, 0]
    assert np.asarray(cache.status).tolist() == [0, NONFINITE]
    with pytest.raises(errors.RangeError, match=r"rows \[1\].*score"):
        cache.check()
    assert_same_bits(out[0], clean[0], "outputs of the other row")
    assert_same_bits(out[1, :, 2:], clean[1, :, 2:], "outputs of the other head")
    assert np.isnan(out[1, when, :2]).all() and np.isfinite(out[1, :when]).all()
    num_recent = {"H2O": 3, "Scissorhands": 2, "FastGen": 0}[name]
    for t, rows in sets.items():
        assert rows[0] == clean_sets[t][0] and rows[1][1] == clean_sets[t][1][1], t
        head, before = rows[1][0], clean_sets[t][1][0]
        if t < when:
            assert head == before
            continue
        # The special token, its score NaN, leaves its place among FastGen's frequent ones to another, and stays.
        more = 1 if name == "FastGen" and 0 in before else 0
        assert len(before) <= len(head) <= len(before) + more, "as many are kept"
        assert {*range(t - num_recent + 1, t + 1)} <= head, "a recent token left"
        if name == "H2O":
            # Those with NaN leave one by one, the lowest position first.
            assert t >= when + BUDGET or {*range(when + 1, t + 1)} <= head, t
            if t == when + BUDGET:
                assert head == {*range(when + 1, t + 1)}, "a score of NaN outlived a score"
        if name == "FastGen":
            assert 0 in head, "a special token left"
            assert t < when + 2 or not head & {*range(2, when + 1)}, "a score of NaN outlived a score"


for name in SCORED:
    for at, role in enumerate(("query", "key")):
        defined(107, f"{name}: NaN in a {role} under jit")(lambda name=name, at=at: nan_under_jit(name, at))


def nan_by_position(name):
    """These do not look at attention: the same tokens are kept, nothing is refused, and NaN leaves with its token."""
    policy, when = SMALL[name][0], 7
    q, k, v = policy_tokens(6, batch=2, length=LENGTH)
    clean, clean_sets, _ = follow(policy, q, k, v)
    k[1, when, 0, 0] = np.nan
    out, sets, cache = follow(policy, q, k, v)
    assert sets == clean_sets
    cache.check()
    window = getattr(policy, "window", BUDGET)
    sees = np.zeros(out.shape[:3], bool)
    sees[1, when : when + window, :2] = True
    assert np.isnan(out[sees]).all()
    assert_same_bits(out[~sees], clean[~sees], "outputs that do not see it")


for name in ("SlidingWindow", "StreamingLLM"):
    defined(107, f"{name}: NaN in a key")(lambda name=name: nan_by_position(name))


def scores_of_minus_infinity(name):
    """Token 2 gets scores below the least float32, in float64 too the weight 0: it is the lowest, and leaves first."""
    q, k, v, ids = random_tokens(8)
    ids[:] = 0
    q[..., 3], q[..., 7] = 20.0, 0.0
    k[:, 2, :, 3], k[:, 2, :, 7] = -3e38, 0.0
    sets = as_the_oracle_says(name, q, k, v, ids)
    for row, head in np.ndindex(2, 2):
        smaller = [held[row][head] for t, held in sets.items() if len(held[row][head]) <= t]
        assert smaller and all(2 not in held for held in smaller)


for name in SCORED:
    defined(107, f"{name}: scores of -inf")(lambda name=name: scores_of_minus_infinity(name))


@defined(108, "H2O at budget + 1: one token leaves, the one of the lowest sum")
def _():
    q, k, v, _ = random_tokens(9)
    policy = SMALL["H2O"][0]
    _, sets, _ = follow(policy, q, k, v)
    telling = 0
    for row in range(2):
        turn = lambda x, row=row: np.stack([oracles.rotate(token, t) for t, token in enumerate(x[row])])
        attend = oracles.Attention(turn(q), turn(k), v[row])
        for head in range(2):
            held, total = set(), np.zeros(LENGTH)
            for t in range(LENGTH):
                there = sorted(held | {t})
                now = attend(t, head, there)
                total[there] += now
                held = set(there)
                if len(there) > BUDGET:
                    old = [j for j in there if j <= t - policy.num_recent]
                    order = sorted(old, key=lambda j: total[j])
                    assert total[order[1]] - total[order[0]] > 1e-4, "too close to tell"
                    held.remove(order[0])
                    telling += min(old, key=lambda j: now[there.index(j)]) != order[0]
                if t in sets:
                    assert sets[t][row][head] == held, (t, row, head)
    assert telling > 5, "the last attention alone must tell another story"


@defined(109, "FastGen at a recovery of 1: everything")
def _():
    cache = is_full_attention(kvattn.FastGen(1.0), LENGTH)
    assert (np.asarray(cache.state.choice) == fastgen.FULL).all()


@defined(109, "FastGen at a recovery that nothing else reaches: everything")
def _():
    # Even attention: special, frequent and local tokens have 0.96 of it.
    q, k, v = policy_tokens(1, batch=2, length=LENGTH)
    ids = np.zeros((2, LENGTH), int)
    ids[:, 0] = SPECIAL
    _, _, cache = follow(FASTGEN, 0 * q, k, v, ids)
    assert (np.asarray(cache.state.choice) == fastgen.LOCAL).all() and np.asarray(cache.kept).max() < LENGTH
    out, sets, cache = follow(dataclasses.replace(FASTGEN, recovery=0.97), 0 * q, k, v, ids)
    assert (np.asarray(cache.state.choice) == fastgen.FULL).all()
    assert sets[LENGTH - 1] == [[set(range(LENGTH))] * 2] * 2
    mean = np.cumsum(v, axis=1) / np.arange(1, LENGTH + 1)[:, None, None]
    np.testing.assert_allclose(out, np.repeat(mean, 2, axis=2), atol=F32)


@defined(109, "FastGen after a prompt of one token: everything")
def _():
    q, k, v = policy_tokens(1, batch=2, length=4)
    _, sets, cache = follow(FASTGEN, q, k, v, prompt=1)
    assert (np.asarray(cache.state.choice) == fastgen.FULL).all()
    assert sets[3] == [[{0, 1, 2, 3}] * 2] * 2


def choices(special, punctuation, length=LENGTH):
    """What heads that attend to token 0, whose id is 1, choose and keep."""
    policy = dataclasses.replace(FASTGEN, special_tokens=special, punctuation_tokens=punctuation)
    ids = np.zeros((2, length), int)
    ids[:, 0] = 1
    out, sets, cache = follow(policy, *(x[:, :length] for x in all_on_first()), ids)
    (choice,) = set(np.asarray(cache.state.choice).ravel().tolist())
    return out, choice, sets


@defined(110, "FastGen: empty lists of ids skip their way")
def _():
    _, choice, sets = choices((1,), (2,))
    assert choice == fastgen.SPECIAL and sets[LENGTH - 1] == [[{0}] * 2] * 2
    _, choice, sets = choices((), (1,), PROMPT)
    assert choice == fastgen.PUNCTUATION and sets[PROMPT - 1] == [[{0}] * 2] * 2
    _, choice, sets = choices((), ())
    assert choice == fastgen.FREQUENT and sets[LENGTH - 1] == [[{0, LENGTH - 1}] * 2] * 2


@defined(110, "FastGen: unknown ids never match")
def _():
    out, choice, sets = choices((), ())
    other_out, other_choice, other_sets = choices((99, -7, 2**31 - 1), (12345,))
    assert choice == other_choice and sets == other_sets
    assert_same_bits(out, other_out, "outputs")


bad(110, "FastGen: ids of floats", errors.DTypeError, "special_tokens", "1.5")(
    lambda: kvattn.FastGen(special_tokens=(1, 1.5))
)
bad(110, "FastGen: ids of bools", errors.DTypeError, "punctuation_tokens", "True")(
    lambda: kvattn.FastGen(punctuation_tokens=(True,))
)
bad(110, "FastGen: ids to look for, none given", errors.ConfigError, "token_ids")(
    lambda: step(cache=create(policy=FASTGEN))
)
bad(110, "token_ids of floats", errors.DTypeError, "token_ids", "float32")(
    lambda: step(cache=create(policy=FASTGEN), token_ids=np.zeros((2, 1), np.float32))
)
bad(110, "token_ids beyond int32", errors.RangeError, "token_ids", "4294967297")(
    lambda: step(cache=create(policy=kvattn.FastGen(0.9, (1,))), token_ids=np.full((2, 1), 2**32 + 1))
)


@defined(110, "FastGen: ids beyond int32 never match")
def _():
    outs = [
        step(cache=create(policy=kvattn.FastGen(0.9, ids)), token_ids=np.ones((2, 1), np.int32))[0]
        for ids in ((7,), (7, 2**31, 2**40))
    ]
    assert_same_bits(*outs, "output")


bad(110, "token_ids of another shape", errors.ShapeError, "token_ids", "(2, 3)")(
    lambda: step(cache=create(policy=FASTGEN), token_ids=np.zeros((2, 3), np.int32))
)

for name in SMALL:
    places = "its own positions" if name == "StreamingLLM" else "true positions"
    defined(111, f"{name}: evict, then decode by {places}")(
        lambda name=name: as_the_oracle_says(name, *random_tokens(10))
    )


@defined(111, "StreamingLLM(positions_in='original'): evict, then decode by true positions")
def _():
    q, k, v = policy_tokens(10, batch=2, length=LENGTH)
    out, _, _ = follow(kvattn.StreamingLLM(2, 5, positions_in="original"), q, k, v)
    for row in range(2):
        np.testing.assert_allclose(
            out[row], oracles.streaming(q[row], k[row], v[row], 2, 5, in_cache=False)[0], atol=F32
        )


# Codecs ---------------------------------------------------------------------------------------------------------------

CODECS = (*TOKENWISE, KIVI)
SIZE, HELD = 13, 14
"""An odd head dim that no group divides; so many tokens that KIVI has eight keys and six values encoded."""
FLOAT32_MAX = float(np.finfo(np.float32).max)


def each_codec(number, what, codecs=CODECS):
    """Registers a function of a codec for each of them."""

    def register(call):
        for codec in codecs:
            defined(number, f"{type(codec).__name__}: {what}")(lambda codec=codec: call(codec))

    return register


def normal(seed=0, heads=2):
    return np.random.default_rng(seed).normal(size=(2, HELD, heads, SIZE)).astype(np.float32)


def stored(codec, key, value, query=None):
    """Appends all tokens but one, then that one. Returns its output [B, 1, N, H] and the cache."""
    query = np.zeros((2, HELD, 4, SIZE), np.float32) if query is None else query
    cache = create(head_dim=SIZE, capacity=16, codec=codec)
    for part in (slice(0, HELD - 1), slice(HELD - 1, HELD)):
        out, cache = step_of()(*(jnp.asarray(x[:, part]) for x in (query, key, value)), cache)
    return np.asarray(out, np.float64), cache


def decoded(cache):
    """Keys and values [B, T, K, H] as they are read, in float64."""
    return [np.asarray(x, np.float64)[:, :, :HELD].swapaxes(1, 2) for x in cache.dense()]


def allowed(codec, role, x):
    """The largest error that the codec's documentation allows for each number of the tokens [B, T, K, H] it holds."""
    if codec is not KIVI:
        return bound(codec, x)
    # KIVI's groups are those of Int4 but for the number of codes; what is not encoded is exact.
    in_groups = lambda y: bound(kvattn.Int4(KIVI.group_size), y) * 15 / (2**KIVI.bits - 1)
    coded_keys, coded_values = kivi_replay(x[0], x[0], codec)
    out = np.zeros(x.shape)
    if role == "keys":
        out[:, coded_keys] = np.moveaxis(in_groups(np.moveaxis(x[:, coded_keys], 1, -1)), -1, 1)
    else:
        out[:, coded_values] = in_groups(x[:, coded_values])
    return out


def within_bounds(codec, cache, key, value):
    """What lies in the cache is what was given, as near as the codec says."""
    for role, got, given in zip(("keys", "values"), decoded(cache), (key, value), strict=True):
        assert np.isfinite(got).all(), role
        error, most = np.abs(got - given), allowed(codec, role, given)
        assert (error <= most).all(), (
            f"{role}: error {error.max():.3g}, allowed {most.flat[np.argmax(error - most)]:.3g}"
        )


def scales(codec, store):
    """All scales of a store, as float32."""
    if "minimum" in store:
        return np.concatenate([np.ravel(x) for x in grouped.unpack_pair(store["scale"], store["minimum"])])
    return np.ravel(store["scale"])


@each_codec(112, "groups of zeros among others, and zeros alone")
def _(codec):
    key, value = normal(1), normal(2)
    if codec is KIVI:
        key[:, 4:8, :, 3], value[:, 2:5, :, 4:8] = 0, 0
        zero = [np.s_[:, 4:8, :, 3], np.s_[:, 2:5, :, 4:8]]
    else:
        # All of a token and head; for Int4 also a group of the token after it.
        zero = [np.s_[:, 3, 1], np.s_[:, 4, 0]]
        key[zero[0]], value[zero[1]] = 0, 0
        if isinstance(codec, kvattn.Int4):
            value[:, 5, :, 8:] = 0
    _, cache = stored(codec, key, value)
    for got, given, where in zip(decoded(cache), (key, value), zero, strict=True):
        assert (got[where] == 0).all() and (given[where] == 0).all()
        assert (got != 0).mean() > 0.7
    assert not isinstance(codec, kvattn.Int4) or (decoded(cache)[1][:, 5, :, 8:] == 0).all()
    within_bounds(codec, cache, key, value)
    out, cache = stored(codec, 0 * key, 0 * value, normal(3, 4))
    assert (out == 0).all() and not any(x.any() for x in decoded(cache))
    for store in (cache.keys, cache.values):
        assert np.isfinite(scales(codec, store)).all()
    cache.check()


@each_codec(113, "an outlier of 1e4")
def _(codec):
    key, value = normal(1), normal(2)
    key[:, 3, 1, 5], key[:, 6, 0, 2], value[:, 2, 0, 9], value[:, 5, 1, 12] = 1e4, -1e4, -1e4, 1e4
    out, cache = stored(codec, key, value)
    within_bounds(codec, cache, key, value)
    # Queries of zeros: the mean, no further off than its terms are.
    error = np.abs(out[:, 0] - np.repeat(value.mean(1, dtype=np.float64), 2, axis=1))
    assert (error <= np.repeat(allowed(codec, "values", value).mean(1), 2, axis=1) + 1e-3).all()


@each_codec(113, "the largest float32")
def _(codec):
    key, value = normal(1), normal(2)
    key[:, 3, 1, 5], key[:, 6, 0, 2] = FLOAT32_MAX, -FLOAT32_MAX
    value[:, 2, 0, 9], value[:, 4, 0, 1:12:2], value[:, 5, 1] = -FLOAT32_MAX, -FLOAT32_MAX, FLOAT32_MAX
    _, cache = stored(codec, key, value)
    within_bounds(codec, cache, key, value)
    cache.check()


@each_codec(113, "the largest of each dtype", TOKENWISE)
def _(codec):
    for dtype in (jnp.float16, jnp.bfloat16, jnp.float32):
        top = float(jnp.finfo(dtype).max)
        x = np.asarray([[top] * SIZE, [top, -top] * 6 + [0], [0] * 12 + [-top], [top, 1] * 6 + [-1]])
        x = np.asarray(jnp.asarray(x, dtype).astype(jnp.float32))
        back = np.asarray(codec.decode(codec.encode(jnp.asarray(x, dtype)), SIZE, jnp.float32), np.float64)
        assert np.isfinite(back).all() and (np.abs(back - x) <= bound(codec, x)).all()


for codec in CODECS:
    for role, value in (("key", np.nan), ("key", -np.inf), ("value", np.nan), ("value", np.inf)):

        def not_finite(codec=codec, role=role, value=value):
            x = np.ones((2, 1, 2, 8), np.float32)
            x[1, 0, 1, 5] = value
            step(**{role: x}, cache=create(capacity=8, codec=codec))

        kind = type(codec).__name__
        bad(114, f"{kind}: {value} in a {role}", errors.RangeError, "rows [1]", kind)(not_finite)


@each_codec(114, "NaN and infinity under jit: recorded, never 0")
def _(codec):
    query, key, value = normal(3, 4), normal(1), normal(2)
    clean, clean_cache = stored(codec, key, value, query)
    assert not np.asarray(clean_cache.status).any()
    # In the chunk, also where KIVI has encoded it, and alone.
    for role, t, number in (("key", 4, np.nan), ("value", 4, np.inf), ("value", HELD - 1, -np.inf)):
        new = {"key": key.copy(), "value": value.copy()}
        new[role][1, t, 1, 5] = number
        out, cache = stored(codec, new["key"], new["value"], query)
        assert np.asarray(cache.status).tolist() == [0, NONFINITE]
        with pytest.raises(errors.RangeError, match=r"rows \[1\]"):
            cache.check()
        got = decoded(cache)[role == "value"]
        assert not np.isfinite(got[1, t, 1, 5]), "it became a number"
        assert not np.isfinite(out[1, 0, 2:, 5]).any()
        assert_same_bits(out[0], clean[0], "outputs of the other row")
        assert_same_bits(out[1, :, :2], clean[1, :, :2], "outputs of the other head")


@defined(115, "Float8: the largest number of a token saturates at 448")
def _():
    assert np.isnan(np.float32(jnp.asarray(465.0, jnp.float32).astype(jnp.float8_e4m3fn))), "a cast alone does not"
    rng = np.random.default_rng(0)
    tops = np.concatenate([10 ** rng.uniform(-30, 38, 500), [65504.0, float(jnp.finfo(jnp.bfloat16).max), FLOAT32_MAX]])
    x = (rng.uniform(-1, 1, (len(tops), SIZE)) * tops[:, None]).astype(np.float32)
    x[:, 4] = np.where(np.arange(len(tops)) % 2, tops, -tops)
    codes = np.asarray(float8_file.widen(kvattn.Float8().encode(jnp.asarray(x))["data"]))
    assert (np.abs(codes).max(-1) == 448).all()
    assert (np.sign(codes[:, 4]) == np.sign(x[:, 4])).all() and (np.abs(codes[:, 4]) == 448).all()
    back = there_and_back(kvattn.Float8(), x)
    assert np.isfinite(back).all() and (np.abs(back - x) <= bound(kvattn.Float8(), x)).all()


def exact_tokens(codec, role, seed):
    """Tokens [B, T, K, H] that the codec holds exactly: whole numbers, the ends of their range in every group."""
    rng = np.random.default_rng(seed)
    shape = (2, HELD, 2, SIZE)
    if isinstance(codec, kvattn.Int8):
        x = rng.integers(-127, 128, shape)
        x[..., 0] = 127
    elif isinstance(codec, kvattn.Float8):
        x = rng.integers(-15, 16, shape) * 16
        x[..., 0] = 448
    else:
        top = 15 if isinstance(codec, kvattn.Int4) else 3
        x = rng.integers(0, top + 1, shape)
        # Groups of KIVI's keys lie along the tokens.
        x, along = (x.swapaxes(1, 3), HELD) if codec is KIVI and role == "keys" else (x, SIZE)
        for first in range(0, along, codec.group_size):
            x[..., first], x[..., min(first + codec.group_size, along) - 1] = 0, top
        x = x if along == SIZE else x.swapaxes(1, 3)
    return x.astype(np.float32)


@each_codec(116, "an odd head dim that groups do not divide, number by number")
def _(codec):
    key, value = exact_tokens(codec, "keys", 1), exact_tokens(codec, "values", 2)
    query = normal(3, 4) / np.abs(key).max() * 3
    out, cache = stored(codec, key, value, query)
    for got, given in zip(decoded(cache), (key, value), strict=True):
        np.testing.assert_array_equal(got, given)
    for b in range(2):
        for k in range(2):
            keys, values = ([x[b, t, k][None] for t in range(HELD)] for x in (key, value))
            expected, _ = attend_token(query[b, -1, 2 * k : 2 * k + 2], keys, values)
            np.testing.assert_allclose(out[b, 0, 2 * k : 2 * k + 2], expected, atol=1e-5 * np.abs(value).max())


@each_codec(116, "head dims 1 and 111", TOKENWISE)
def _(codec):
    for size, group in ((1, 8), (111, 64)):
        one = kvattn.Int4(group) if isinstance(codec, kvattn.Int4) else codec
        packed = one is not codec
        x = np.random.default_rng(size).normal(size=(3, size)).astype(np.float32)
        encoded = one.encode(jnp.asarray(x))
        assert encoded["data"].shape == (3, -(-size // 2) if packed else size)
        assert encoded["scale"].shape == (3, -(-size // group) if packed else 1)
        back = np.asarray(one.decode(encoded, size, jnp.float32), np.float64)
        assert (np.abs(back - x) <= bound(one, x)).all()


for what, call, error, fragment in (
    ("Int4 in groups of 0", lambda: kvattn.Int4(0), errors.ConfigError, "group_size must be >= 1, got 0"),
    ("Int4 in groups of -8", lambda: kvattn.Int4(-8), errors.ConfigError, "-8"),
    ("Int4 in groups of 2.5", lambda: kvattn.Int4(2.5), errors.DTypeError, "2.5"),
    ("KIVI of 3 bits", lambda: kvattn.KIVI(3), errors.ConfigError, "2, 4 or 8, got 3"),
    ("KIVI of True bits", lambda: kvattn.KIVI(True), errors.DTypeError, "True"),
    ("KIVI: groups that do not divide its residual", lambda: kvattn.KIVI(2, 32, 48), errors.ConfigError, "(48)"),
    ("KIVI of residual 0", lambda: kvattn.KIVI(2, 1, 0), errors.ConfigError, "residual must be >= 1, got 0"),
):
    bad(116, what, error, fragment)(call)


@each_codec(117, "large keys and small values, and the reverse")
def _(codec):
    for large, small in ((100.0, 0.01), (0.01, 100.0)):
        query, key, value = normal(3, 4) / large, normal(1) * large, normal(2) * small
        out, cache = stored(codec, key, value, query)
        within_bounds(codec, cache, key, value)
        np.testing.assert_allclose(out, over_decoded(query[:, -1:], cache), atol=1e-5 * small)


unscaled = jax.jit(functools.partial(kvattn.cached_attention, scale=0.0))


@each_codec(118, "scale=0 of the scores, a uniform average (scales of codecs are computed, never given)")
def _(codec):
    _, cache = stored(codec, normal(1), normal(2))
    out, cache = unscaled(*(jnp.asarray(normal(3 + i, h)[:, :1]) for i, h in enumerate((4, 2, 2))), cache)
    mean = np.asarray(cache.dense()[1], np.float64)[:, :, : HELD + 1].mean(2)
    np.testing.assert_allclose(np.asarray(out)[:, 0], np.repeat(mean, 2, axis=1), atol=1e-6)


@each_codec(118, "the scale of next to nothing is not 0, nor NaN", TOKENWISE)
def _(codec):
    with jax.enable_x64(True):
        for size in (1e-50, 1e-45, 1e-40, float(np.finfo(np.float32).tiny), 1e-30):
            # 1e-50 is 0 in float32.
            x = np.random.default_rng(0).uniform(0.5, 1, (3, SIZE)) * size
            encoded = codec.encode(jnp.asarray(x))
            scale = scales(codec, encoded)
            assert np.isfinite(scale).all() and (scale > 0 if "minimum" not in encoded else scale >= 0).all()
            back = np.asarray(codec.decode(encoded, SIZE, jnp.float64))
            assert np.isfinite(back).all() and (np.abs(back - x) <= bound(codec, x)).all()


for codec in CODECS:
    for scale in (np.nan, np.inf, 1e300):
        bad(118, f"{type(codec).__name__}: scale={scale} of the scores", errors.RangeError, "scale", str(scale))(
            lambda codec=codec, scale=scale: step(cache=create(codec=codec), scale=scale)
        )


SLOW = {"0, 1 and 4 sinks, and fewer tokens than sinks", *(f"{p}, a prompt of 4" for p, _ in BUDGETS_OF_ONE)}
SLOW |= {r.what for r in TABLE.rows if r.what.startswith(("Float8: scale=0", "KIVI: scale=0"))}


@pytest.mark.parametrize("row", TABLE.parameters(SLOW))
def test_smaller_caches(row):
    run(row)


def test_rows_covered():
    assert TABLE.numbers() == {*range(61, 70), *range(105, 119)}


def highest(scores, positions, candidates):
    """`scored.lowest`, but of equal scores the highest position."""
    worst = jnp.where(candidates, jnp.where(jnp.isnan(scores), -jnp.inf, scores), jnp.inf)
    tied = candidates & (worst == jnp.min(worst, axis=-1, keepdims=True))
    return tied & (positions == jnp.max(jnp.where(tied, positions, -1), axis=-1, keepdims=True))


def nan_stays(scores, positions, candidates, lowest=scored.lowest):
    """`scored.lowest`, but NaN is the highest score."""
    return lowest(jnp.where(jnp.isnan(scores), 1e9, scores), positions, candidates)


def stops(rope, x, positions, turn=kvattn.RoPE.__call__):
    """`RoPE`, but no position is above 9."""
    return turn(rope, x, jnp.minimum(positions, 9))


def swapped(cache, *positions, view=kvattn.KVCache.view):
    """`KVCache.view` with the scales of keys and values exchanged."""
    seen = view(cache, *positions)
    keys, values = ({**a, "scale": b["scale"]} for a, b in ((seen.keys, seen.values), (seen.values, seen.keys)))
    return dataclasses.replace(seen, keys=keys, values=values)


FAULTS = {
    "a tie by the highest position": (scored, "lowest", highest, "H2O: of equal scores the lowest position leaves"),
    "NaN as the highest score": (scored, "lowest", nan_stays, "H2O: NaN in a query under jit"),
    "positions that stop": (kvattn.RoPE, "__call__", stops, "SlidingWindow: evict, then decode by true positions"),
    "no least scale": (scaled, "SMALLEST", 0.0, "Int8: the scale of next to nothing is not 0, nor NaN"),
    "swapped scales": (kvattn.KVCache, "view", swapped, "Int8: large keys and small values, and the reverse"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults(fault, monkeypatch):
    """The row of each must notice it."""
    where, name, wrong, what = FAULTS[fault]
    row = TABLE.row(what)
    monkeypatch.setattr(where, name, wrong)
    # Nothing compiled before may be used, and nothing of this later.
    jax.clear_caches()
    try:
        with pytest.raises(AssertionError):
            run(row)
    finally:
        jax.clear_caches()
