"""A prompt in one step, and chunks of any length after it: the outputs are those of token by token."""

from collections.abc import Iterator

from kvattn.testing.checks.base import Check, compare, look
from kvattn.testing.trial import Plan, Trial

CHUNK = 7
"""Tokens of a prompt and of a long chunk."""
MOST_PHASES = 6
"""At how many places of a ring a chunk begins."""


def _prompt(trial: Trial) -> None:
    """A prompt, and the tokens after it one by one."""
    plan = Plan.of([CHUNK] + [1] * (trial.claims.length - CHUNK))
    look(trial, plan)
    compare(trial, plan)


def _ways(trial: Trial) -> Iterator[list[int]]:
    """Ways to cut a sequence: a chunk longer than the ring, then a short one, at every place where it may begin."""
    c = trial.claims
    most = c.capacity if c.overflow != "never" else 10**6
    phases = min(c.reach, MOST_PHASES) if c.reach else 1
    for phase in range(phases):
        way = [1] * (c.reach + phase) + [CHUNK, 3, 1] if c.reach else [CHUNK, 3, 1, CHUNK, 3, 1]
        while sum(way) > most and len(way) > 2:
            way.pop(0)
        yield way


def _chunks(trial: Trial) -> None:
    """Chunks where the cache holds tokens already."""
    for i, way in enumerate(_ways(trial)):
        plan = Plan.of(way)
        if i % 2 == 0:
            look(trial, plan)
        compare(trial, plan, seed=2 + i)


PIECES = (
    Check(
        "prompt",
        _prompt,
        lambda trial: "" if trial.claims.prompts else "one token at a time",
        needs=("values",),
    ),
    Check(
        "chunks",
        _chunks,
        lambda trial: "" if trial.claims.chunks else "several tokens only while it is empty",
        needs=("prompt",),
    ),
)
