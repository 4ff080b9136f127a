"""The list of planted faults: each applies, names tests that are there, and is planted in a copy only."""

import dataclasses

import pytest
from mutants import ROOT, DoesNotApplyError, Fault, planted
from mutants.__main__ import chosen
from mutants.faults import FAULTS


def test_every_fault_applies_once():
    """To text that occurs once in its function, of which something else comes; a fault that does not is an error."""
    sources = {file: (ROOT / "kvattn" / file).read_text() for file in {fault.file for fault in FAULTS}}
    problems = []
    for fault in FAULTS:
        try:
            planted(sources[fault.file], fault)
        except DoesNotApplyError as error:
            problems.append(str(error))
    assert not problems, "\n".join(problems)
    assert len({str(fault) for fault in FAULTS}) == len(FAULTS) >= 200


def test_every_fault_names_tests_that_are_there():
    texts = {}
    for fault in FAULTS:
        assert fault.tests, fault
        for test in fault.tests:
            file, _, function = test.partition("::")
            text = texts.setdefault(file, (ROOT / file).read_text())
            assert not function or f"def {function.split('[')[0]}(" in text, test


def test_a_fault_that_does_not_apply_is_an_error():
    source = "def f(x):\n    return x + 1 + 1\n\n\nclass C:\n    def f(self):\n        return 2  # twice\n"
    fault = Fault("a.py", "C.f", "return 2", "return 3", ("tests/test_a.py",))
    assert planted(source, fault) == source.replace("return 2", "return 3")
    for changes, why in (
        ({"function": "C.g"}, "0 functions"),
        ({"function": "f"}, "occurs 0 times"),
        ({"function": "f", "old": "+ 1"}, "occurs 2 times"),
        ({"old": "# twice", "new": "# once"}, "the same"),
        ({"new": "return )"}, "no Python"),
    ):
        with pytest.raises(DoesNotApplyError, match=why):
            planted(source, dataclasses.replace(fault, **changes))


def test_samples_change_by_date():
    one, again, other = (chosen([], 30, seed) for seed in ("2026-01-31", "2026-01-31", "2026-02-01"))
    assert one == again != other
    assert len(set(one)) == 30
    assert {fault.file for fault in chosen(["KIVI"], None, "")} == {"codecs/kivi.py"}
