"""Random sequences of operations on a cache against lists of tokens, checked after every operation."""

import dataclasses

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import suites
from oracles import assert_same_bits
from suites import CHUNK, POLICIES, STEPS, B, by_id, make_cache, real_tokens, tokens

from kvattn import errors
from kvattn.cache import KVCache

IMPLEMENTATION = "xla"
CASES = by_id(POLICIES, "full", "ring5", "ring6-window2", "ring-short")


class Verbs:
    """The compiled verbs; those of one run with a planted fault are not those of another."""

    def __init__(self):
        self.trim = jax.jit(lambda cache, n: cache.trim(n))
        self.select = jax.jit(lambda cache, rows: cache.select(rows))
        self.reset = jax.jit(lambda cache, rows: cache.reset(rows))


VERBS = Verbs()

OVERFLOW, BAD_COUNT, LOST = errors.CapacityError, errors.RangeError, errors.UnsupportedError
PER_ROW = {"min_size": B, "max_size": B}


def per_row(low, high):
    return st.lists(st.integers(low, high), **PER_ROW)


# Counts a step can take, and now and then one that it cannot.
counts = per_row(0, CHUNK) | per_row(-1, CHUNK + 1)
operations = st.one_of(
    st.tuples(st.just("append"), st.just(CHUNK), counts, st.sampled_from(["right", "left"])),
    st.tuples(st.just("append"), st.just(CHUNK), counts, st.just("right")),
    st.tuples(st.just("append"), st.just(1), per_row(0, 1) | per_row(-1, 2), st.just("right")),
    st.tuples(st.just("trim"), per_row(0, 2) | per_row(-1, 9)),
    st.tuples(st.just("select"), per_row(0, B - 1) | per_row(-1, B)),
    st.tuples(st.just("reset"), st.lists(st.booleans(), **PER_ROW)),
)
sequences = st.lists(operations, min_size=1, max_size=10)


class Model:
    """Lists of tokens, and for each row the errors that a jitted step can only record."""

    def __init__(self, case):
        self.case = case
        self.lists = case.oracle()
        self.recorded = [set() for _ in range(B)]

    def append(self, new, num_new, padding):
        length = new[0].shape[1]
        for b, n in enumerate(num_new):
            if not 0 <= n <= length:
                self.recorded[b].add(BAD_COUNT)
        num_new = [n if 0 <= n <= length else 0 for n in num_new]
        self.lists.overflowed = [False] * B
        out, _ = self.lists.append(*new, num_new, padding)
        for b, over in enumerate(self.lists.overflowed):
            if over:
                self.recorded[b].add(OVERFLOW)
        done = [0 if over else n for n, over in zip(num_new, self.lists.overflowed, strict=True)]
        return out, real_tokens(done, length, padding)

    def trim(self, amounts):
        done = []
        for b, n in enumerate(amounts):
            length = len(self.lists.rows[b])
            if not 0 <= n <= length:
                self.recorded[b].add(BAD_COUNT)
            elif not self.case.can_trim(length, n):
                self.recorded[b].add(LOST)
            else:
                done.append(n)
                continue
            done.append(0)
        self.lists.trim(done)

    def select(self, rows):
        known = [0 <= r < B for r in rows]
        taken = [r if ok else 0 for r, ok in zip(rows, known, strict=True)]
        self.recorded = [set(self.recorded[r]) if ok else {BAD_COUNT} for r, ok in zip(taken, known, strict=True)]
        self.lists.select(taken)
        self.lists.reset([not ok for ok in known])

    def reset(self, rows):
        self.lists.reset(rows)
        self.recorded = [set() if forget else kinds for forget, kinds in zip(rows, self.recorded, strict=True)]


def run(case, sequence, verbs=VERBS):
    """Runs a sequence of operations on both; returns how many were run."""
    cache, model = make_cache(case), Model(case)
    for i, (name, *arguments) in enumerate(sequence):
        if name == "append":
            length, num_new, padding = arguments
            new = tokens(i, length)
            out, cache = STEPS(*new, cache, num_new, implementation=IMPLEMENTATION, padding=padding, **case.limits)
            ref, real = model.append(new, num_new, padding)
            out = np.asarray(out)
            assert np.abs(out - ref).max() < 5e-6, f"operation {i}: outputs"
            assert_same_bits(out[~real], np.zeros_like(out[~real]), f"operation {i}: rows of pads and refusals")
        elif name == "trim":
            cache = verbs.trim(cache, np.asarray(arguments[0], np.int32))
            model.trim(arguments[0])
        elif name == "select":
            cache = verbs.select(cache, np.asarray(arguments[0], np.int32))
            model.select(arguments[0])
        else:
            cache = verbs.reset(cache, np.asarray(arguments[0]))
            model.reset(arguments[0])
        suites.check_counts(case, cache, model.lists.lengths())
        suites.check_contents(case, cache, model.lists)
        check_record(cache, model.recorded)
    return len(sequence)


def check_record(cache, recorded):
    """The rows with a status are those with a recorded error, and `check` raises one that was recorded."""
    assert (np.asarray(cache.status) != 0).tolist() == [bool(kinds) for kinds in recorded]
    kinds = set().union(*recorded)
    if not kinds:
        cache.check()
        return
    with pytest.raises(tuple(kinds)) as caught:
        cache.check()
    rows = [b for b, row in enumerate(recorded) if type(caught.value) in row]
    assert f"rows {rows}" in str(caught.value)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_random_operations(case):
    @hypothesis.settings(max_examples=40)
    @hypothesis.given(sequences)
    def check(sequence):
        run(case, sequence)

    check()


APPEND = ("append", CHUNK, [7, 6, 5, 4, 3, 0], "right")
FAULTS = {
    # Verb of KVCache, what it answers instead, and operations that show it.
    "trim of a ring that turned": (
        "trim",
        lambda trim, c, n: dataclasses.replace(c, lengths=c.lengths - n),
        "ring5",
        [APPEND, ("trim", [1] * B)],
    ),
    "trim not recorded": (
        "trim",
        lambda trim, c, n: dataclasses.replace(trim(c, n), status=c.status),
        "full",
        [APPEND, ("trim", [0, 9, 0, 0, 0, 0])],
    ),
    "select of unknown rows": (
        "select",
        lambda select, c, rows: select(c, jnp.clip(rows, 0, B - 1)),
        "full",
        [APPEND, ("select", [0, 1, 6, 3, 4, 5])],
    ),
    "select that leaves the values behind": (
        "select",
        lambda select, c, rows: dataclasses.replace(select(c, rows), values=c.values),
        "full",
        [APPEND, ("select", [1, 0, 2, 3, 4, 5])],
    ),
    "select that leaves the lengths behind": (
        "select",
        lambda select, c, rows: dataclasses.replace(select(c, rows), lengths=c.lengths),
        "full",
        [APPEND, ("select", [1, 0, 2, 3, 4, 5])],
    ),
    "reset that keeps the record": (
        "reset",
        lambda reset, c, rows: dataclasses.replace(reset(c, rows), status=c.status),
        "full",
        [("append", CHUNK, [8, 0, 0, 0, 0, 0], "right"), ("reset", [True] * B)],
    ),
    "reset of all rows": (
        "reset",
        lambda reset, c, rows: reset(c, jnp.ones_like(rows)),
        "full",
        [APPEND, ("reset", [True] + [False] * 5)],
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_planted_fault(name, monkeypatch):
    verb, fault, case, sequence = FAULTS[name]
    case = by_id(POLICIES, case)[0]
    run(case, sequence)
    original = getattr(KVCache, verb)
    monkeypatch.setattr(KVCache, verb, lambda cache, *args: fault(original, cache, *args))
    with pytest.raises(AssertionError):
        run(case, sequence, Verbs())


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_many_random_operations(case):
    @hypothesis.settings(max_examples=400)
    @hypothesis.given(st.lists(operations, min_size=1, max_size=25))
    def check(sequence):
        run(case, sequence)

    check()
