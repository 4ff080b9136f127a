"""Token by token: the numbers, against the oracle in float64."""

from kvattn.testing.checks.base import Check, compare
from kvattn.testing.trial import Plan, Trial

SEEN = ("tokens before", "window", "sinks", "chunk cuts", "budget", "grouping", "positions")


def _values(trial: Trial) -> None:
    """Outputs by the accuracy rule, or within what is claimed."""
    compare(trial, Plan.of([1] * trial.claims.length))


VALUES = (Check("values", _values, needs=SEEN),)
