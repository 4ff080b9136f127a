"""`kvattn.testing` finds what is wrong, under the name it has, and nothing else; and what is right passes."""

import dataclasses

import numpy as np
import plain_cache
import pytest
from faulty_caches import FAULTS, Compiled, Masked, Silent
from plain_cache import Cuts, PlainCache, Ring

from kvattn import errors
from kvattn.testing import Claims, Plan, Trial, attention_weights, check_cache, inaccuracy
from kvattn.testing.checks import CHECKS

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
