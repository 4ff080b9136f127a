"""The checks, in the order they are made: each rests on those it needs, so that one fault is one failure."""

from kvattn.testing.checks.attendance import ATTENDANCE
from kvattn.testing.checks.base import Check as Check
from kvattn.testing.checks.bounds import BOUNDS
from kvattn.testing.checks.leaks import LEAKS
from kvattn.testing.checks.padding import PADDING
from kvattn.testing.checks.pieces import PIECES
from kvattn.testing.checks.programs import PROGRAMS
from kvattn.testing.checks.values import VALUES

CHECKS: tuple[Check, ...] = (*ATTENDANCE, *VALUES, *PIECES, *PADDING, *LEAKS, *BOUNDS, *PROGRAMS)
"""All of them. A check comes after those that it needs."""

__all__ = ["CHECKS", "Check"]
