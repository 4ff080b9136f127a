"""Rows of different lengths: pads on either side, rows that advance on their own, rows with nothing at all."""

import functools

import numpy as np

from kvattn.testing.checks.base import Check, compare, look
from kvattn.testing.checks.pieces import CHUNK
from kvattn.testing.report import Failure
from kvattn.testing.trial import Plan, Trial


def ragged_prompt(trial: Trial, side: str, counts: tuple[int, ...] = (3, CHUNK, 1)) -> Plan:
    """A padded prompt, and tokens after it one by one."""
    c = trial.claims
    rows = tuple(counts[b % len(counts)] for b in range(c.batch_size))
    return Plan(((CHUNK, rows), *(((1, None),) * (c.length - CHUNK))), side)


def _padded(trial: Trial, side: str) -> None:
    """A prompt with pads: each row as if it were alone."""
    plan = ragged_prompt(trial, side)
    look(trial, plan)
    compare(trial, plan)


def _ragged(trial: Trial) -> None:
    """Steps in which rows take different numbers of tokens, or none."""
    c = trial.claims
    turn = lambda *counts: tuple(counts[b % len(counts)] for b in range(c.batch_size))
    pieces = [(CHUNK, turn(3, CHUNK, 1)), (1, turn(1, 0, 1)), (1, turn(0, 1, 1))]
    if c.chunks:
        pieces += [(CHUNK, turn(5, 0, 2)), (CHUNK, turn(1, 4, 6))]
    plan = Plan((*pieces, (1, turn(1, 1, 0)), (1, turn(1, 1, 1))), c.side)
    look(trial, plan)
    compare(trial, plan, seed=4)


def _nothing(trial: Trial) -> None:
    """What may attend to nothing is zero; a row that was empty begins like any other."""
    plan = ragged_prompt(trial, trial.claims.side, (0, CHUNK, 3))
    session = trial.session()
    call = plan.calls([trial.tokens(length, i) for i, (length, _) in enumerate(plan.pieces)])[0]
    out = session(call).astype(np.float64)[~call.real]
    if not (out == 0).all():
        seen = "NaN" if np.isnan(out).any() else f"numbers up to {np.abs(out).max():.3g}"
        raise Failure("zeros for pads and for rows without a token", seen, session.calls, session.sizes)
    look(trial, plan)
    compare(trial, plan, seed=5)


def _no_side(trial: Trial, side: str) -> str:
    return "" if side in trial.claims.padding else f"{side!r} is not in padding"


PADDING = (
    *(
        Check(
            f"padding on the {side}",
            functools.partial(_padded, side=side),
            functools.partial(_no_side, side=side),
            needs=("prompt",),
        )
        for side in ("right", "left")
    ),
    Check(
        "ragged rows",
        _ragged,
        lambda trial: "" if trial.claims.ragged else "rows advance together",
        needs=("padding on the right", "padding on the left", "chunks"),
    ),
    Check(
        "rows without tokens",
        _nothing,
        lambda trial: "" if trial.claims.empty_rows else "no empty_rows",
        needs=("padding on the right", "padding on the left"),
    ),
)
