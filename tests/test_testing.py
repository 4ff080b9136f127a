"""`kvattn.testing` finds what is wrong, under the name it has, and nothing else; and what is right passes."""

import functools
import importlib
import json
import pathlib
import re
import sys

import jax
import numpy as np
import plain_cache
import pytest
from faulty_caches import FAULTS, Compiled, Masked, WritesOverTheLast
from plain_cache import Cuts, PlainCache, Ring

from kvattn import errors
from kvattn.testing import Claims, Plan, Trial, attention_weights, check_cache, inaccuracy
from kvattn.testing.checks import CHECKS

ROOT = pathlib.Path(__file__).resolve().parent.parent
READERS = {"fill": plain_cache.fill, "lengths": lambda cache: getattr(cache, "told", cache.lengths)}


def checked(cls, claims=None, **options):
    """The report of a class of the tables."""
    if issubclass(cls, Compiled):
        return check_cache(cls.make, cls.append, claims or cls.claims, **options)
    readers = READERS | ({"failed": lambda cache: cache.full} if cls.claims.overflow == "reports" else {})
    return check_cache(cls, plain_cache.step, claims or cls.claims, **readers, **options)


@pytest.mark.parametrize("cls", [PlainCache, Ring, Cuts, Masked, Compiled])
def test_what_is_right_passes(cls):
    report = checked(cls)
    assert report.ok and not report.failed, report
    assert report.raise_if_failed() is report


@pytest.mark.parametrize("cls", FAULTS)
def test_a_fault_is_found_by_its_check_and_no_other(cls):
    report = checked(cls)
    assert report.failed == [FAULTS[cls]], report
    assert not report.ok
    # It is still found where nothing else is tried.
    alone = checked(cls, only=[FAULTS[cls]])
    assert alone.failed == [FAULTS[cls]] == list(alone.as_dict())


def test_every_check_finds_a_fault():
    assert {check.name for check in CHECKS} == set(FAULTS.values())
    names = [check.name for check in CHECKS]
    assert all(names.index(need) < i for i, check in enumerate(CHECKS) for need in check.needs)


def test_a_report_says_what_was_seen_and_how_to_see_it_again():
    report = checked(WritesOverTheLast)
    finding = report["overflow"]
    assert finding.seen == (
        "no error, and the next query, at position 25, does not see {23}: written over, or never written"
    )
    assert str(report).startswith("FAILED       overflow\n  expected   an error: 1 more at 24 of 24 tokens\n  saw ")
    assert str(report).endswith("15 ok, 1 failed, 8 not offered, 0 not tried")
    with pytest.raises(AssertionError, match="does not do what is claimed\nFAILED       overflow"):
        report.raise_if_failed()
    outs = finding.replay(WritesOverTheLast, plain_cache.step)
    assert len(outs) == len(finding.calls) == 25 and str(finding.calls[-1]) == "T=1"
    with pytest.raises(ValueError, match="full"):
        finding.replay(PlainCache, plain_cache.step)
    with pytest.raises(errors.UnknownNameError, match=r"'overflows'.*'overflow'"):
        report["overflows"]
    with pytest.raises(errors.UnknownNameError, match=r"'overflows'.*'overflow'"):
        checked(PlainCache, only=["overflows"])


def test_what_rests_on_a_failure_is_not_tried_and_what_nobody_claims_is_not_offered():
    report = checked(next(cls for cls, name in FAULTS.items() if name == "tokens before"))
    status = report.as_dict()
    assert status["values"] == status["capacity"] == "not tried" and status["token count"] == "ok"
    assert report["capacity"].seen == "it rests on 'values'" and report["window"].seen == "no window"
    assert status["window"] == "not offered"


def test_sizes_are_claims_too():
    """Few numbers per value: what does not fit into one run of a probe takes several. Other heads, rows, dtypes."""
    sizes = {"num_heads": 3, "num_kv_heads": 3, "head_dim": 16, "batch_size": 2, "capacity": 20}
    assert checked(PlainCache, Claims(**{**vars(PlainCache.claims), **sizes})).ok
    one_row = checked(PlainCache, Claims(**{**vars(PlainCache.claims), "batch_size": 1}))
    assert one_row.ok and one_row["neighbours"].seen == "one row"
    wrong = next(cls for cls, name in FAULTS.items() if name == "window")
    assert checked(wrong, Claims(window=5, head_dim=16)).failed == ["window"]


def test_weights_are_those_that_queries_give():
    trial = Trial(PlainCache, plain_cache.step, PlainCache.claims)
    plan = Plan(((3, (3, 1, 2)), (1, None)), "left")
    tokens = [trial.tokens(length, i) for i, (length, _) in enumerate(plan.pieces)]
    (prompt, last), _ = attention_weights(trial, plan, tokens)
    assert prompt.shape == (3, 3, 4, 2, 4) and last.shape == (3, 1, 4, 2, 4)
    q, k = tokens[1][0][1, 0, 2], [tokens[0][1][1, 2, 1], tokens[1][1][1, 0, 1]]  # row 1, head 2: two tokens
    scores = np.array([q @ x for x in k]) / 8
    assert np.allclose(last[1, 0, 2, 1, :2], np.exp(scores) / np.exp(scores).sum(), atol=1e-5)
    assert not last[1, 0, 2, 0].any() and not last[1, 0, 2, 1, 2:].any()


@pytest.mark.parametrize(
    ("claims", "error", "words"),
    [
        ({"padding": "left"}, errors.ConfigError, "tuple"),
        ({"padding": ("top",)}, errors.ConfigError, "tuple"),
        ({"overflow": "clamps"}, errors.ConfigError, "raises, reports, never"),
        ({"positions": "slots"}, errors.ConfigError, "true, cache"),
        ({"ragged": True}, errors.ConfigError, "on which side"),
        ({"empty_rows": True}, errors.ConfigError, "on which side"),
        ({"prompts": False}, errors.ConfigError, "chunks=True"),
        ({"budget": 5, "window": 5}, errors.ConfigError, "budget="),
        ({"num_heads": 5}, errors.ConfigError, "num_kv_heads"),
        ({"window": 20}, errors.RangeError, "at least 26"),
        ({"window": 1}, errors.RangeError, "window must be 2"),
        ({"batch_size": 0}, errors.RangeError, "batch_size"),
    ],
)
def test_claims_that_cannot_be(claims, error, words):
    with pytest.raises(error, match=words):
        Claims(**claims)


def test_the_accuracy_rule():
    truth = np.random.default_rng(0).normal(size=1000)
    honest = truth.astype(np.float32) + np.float32(1e-6) * np.random.default_rng(1).normal(size=1000).astype(np.float32)
    assert inaccuracy(honest, truth, honest) is None
    assert "max error" in inaccuracy(honest * np.float32(1 + 1e-4), truth, honest)
    assert "mean error" in inaccuracy(honest + np.float32(2e-6), truth, honest)
    assert "not finite" in inaccuracy(honest * np.float32(np.nan), truth, honest)
    assert "shape" in inaccuracy(honest[:5], truth, honest)


# The table of docs/testing.md -----------------------------------------------------------------------------------------


@functools.cache
def example():
    sys.path.insert(0, str(ROOT / "examples"))
    try:
        return importlib.import_module("check_your_cache")
    finally:
        sys.path.pop(0)


@functools.cache
def committed():
    return {row["cache"]: row for row in json.loads(example().RESULTS.read_text())["caches"]}


def test_the_page_has_the_table_that_was_run():
    page = example().PAGE.read_text()
    assert example().with_table(page, list(committed().values())) == page
    assert list(committed()) == list(example().cases())
    assert all(not row["failed"] for name, row in committed().items() if name.startswith("kvattn"))


QUICK = ("HF-like dynamic", "HF-like static", "HF-like sliding", "HF-like static sliding", "rolled too soon")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in example().cases()]
)
def test_the_table_is_current(name):
    """But for how many bytes a program takes, which is the compiler's."""
    plain = lambda row: json.loads(re.sub(r"[\d,.]{6,}", "some", json.dumps(row)))
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # as users run it
        row = example().checked(name, example().cases()[name])
    assert plain(row) == plain(committed()[name])
