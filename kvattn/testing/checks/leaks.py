"""What must not matter: unused memory, pads, tokens that left, other rows. NaN there changes no bit."""

from collections.abc import Callable

import numpy as np

from kvattn.testing.checks.base import Check
from kvattn.testing.checks.padding import ragged_prompt
from kvattn.testing.checks.pieces import CHUNK
from kvattn.testing.report import Call, Failure
from kvattn.testing.trial import Plan, Session, Trial

Change = Callable[[int, Call], None]
"""Changes the arrays of a call in place."""


def _plan(trial: Trial) -> Plan:
    """A sequence with a prompt, where prompts are taken."""
    c = trial.claims
    return Plan.of([CHUNK] + [1] * (c.length - CHUNK) if c.prompts else [1] * c.length)


def _outputs(
    trial: Trial, plan: Plan, change: Change | None = None, fill: float | None = None
) -> tuple[list[np.ndarray], Session]:
    """Outputs [B, T, N, H] of every step."""
    session = trial.session(fill)
    calls = plan.calls([trial.tokens(length, 300 + i) for i, (length, _) in enumerate(plan.pieces)])
    for i, call in enumerate(calls):
        if change is not None:
            change(i, call)
    return [session(call) for call in calls], session


def _same(clean: np.ndarray, dirty: np.ndarray, what: str, session: Session, call: int) -> None:
    """Two outputs [...] that should be equal bit by bit."""
    if clean.tobytes() == dirty.tobytes():
        return
    wide = dirty.astype(np.float64)
    seen = "NaN" if np.isnan(wide).any() else f"a difference of {np.abs(wide - clean.astype(np.float64)).max():.3g}"
    raise Failure(f"the same bits of step {call} with {what}", seen, session.calls[: call + 1], session.sizes)


def _unused(trial: Trial) -> None:
    """An empty cache may hold anything."""
    for plan in dict.fromkeys((Plan.of([1] * trial.claims.length), _plan(trial))):
        clean, _ = _outputs(trial, plan, fill=0.0)
        dirty, session = _outputs(trial, plan, fill=float("nan"))
        for i, (a, b) in enumerate(zip(clean, dirty, strict=True)):
            _same(a, b, "NaN in unused memory", session, i)


def _departed(trial: Trial) -> None:
    """A token that is out of every later query's reach leaves nothing behind."""
    c = trial.claims
    plan, gone = Plan.of([1] * c.length), c.sinks + 1

    def spoil(i: int, call: Call) -> None:
        if i == gone:
            call.key[:], call.value[:] = np.nan, np.nan

    clean, _ = _outputs(trial, plan)
    dirty, session = _outputs(trial, plan, spoil)
    for p, (a, b) in enumerate(zip(clean, dirty, strict=True)):
        if p > gone and gone not in c.sees(p):
            _same(a, b, f"NaN in the token at position {gone}, which it does not see", session, p)


def _pads(trial: Trial) -> None:
    """What a pad holds reaches no real token."""
    for side in trial.claims.padding:
        plan = ragged_prompt(trial, side)
        real = [p >= 0 for p in plan.positions(trial.claims.batch_size)]

        def spoil(i: int, call: Call, value: float) -> None:
            for x in (call.query, call.key, call.value):
                x[~call.real] = value

        clean, _ = _outputs(trial, plan, lambda i, call: spoil(i, call, 0.0))
        dirty, session = _outputs(trial, plan, lambda i, call: spoil(i, call, float("nan")))
        for i, (a, b) in enumerate(zip(clean, dirty, strict=True)):
            _same(a[real[i]], b[real[i]], f"NaN in pads on the {side}", session, i)


def _neighbours(trial: Trial) -> None:
    """Other rows of the batch change no bit of a row."""
    plan = _plan(trial)
    clean, _ = _outputs(trial, plan)
    for value, what in ((50.0, "other tokens in the other rows"), (float("nan"), "NaN in the other rows")):

        def change(i: int, call: Call, value: float = value) -> None:
            for x in (call.query, call.key, call.value):
                x[1:] = x[1:] * x.dtype.type(value)

        dirty, session = _outputs(trial, plan, change)
        for i, (a, b) in enumerate(zip(clean, dirty, strict=True)):
            _same(a[:1], b[:1], what, session, i)


LEAKS = (
    Check(
        "neighbours",
        _neighbours,
        lambda trial: "" if trial.claims.batch_size > 1 else "one row",
        needs=("values",),
    ),
    Check(
        "NaN in unused memory",
        _unused,
        lambda trial: "" if trial.fill is not None else "no way to write there: fill=",
        needs=("values",),
    ),
    Check(
        "NaN in tokens that left",
        _departed,
        lambda trial: (
            "nothing leaves by position"
            if not trial.claims.reach or trial.claims.budget is not None
            else "stored in fewer bits, which NaN may not have"
            if trial.claims.tolerance is not None
            else ""
        ),
        needs=("values",),
    ),
    Check(
        "NaN in pads",
        _pads,
        lambda trial: "" if trial.claims.padding else "no padding",
        needs=("padding on the right", "padding on the left"),
    ),
)
