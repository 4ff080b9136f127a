"""The end of a cache: all of the capacity can be used, and what is past it is refused, never written over."""

import numpy as np

from kvattn.testing.checks.base import Check, attended, look
from kvattn.testing.probes import attention_weights, quiet, spans
from kvattn.testing.report import Call, Failure
from kvattn.testing.trial import Plan, Session, Trial


def _capacity(trial: Trial) -> None:
    """As many tokens as it was made for."""
    look(trial, Plan.of([1] * trial.claims.capacity))


def _overflow(trial: Trial) -> None:
    """One token too many, and a chunk of which only a part fits."""
    c = trial.claims
    for have, more in ((c.capacity, 1), (c.capacity - 1, 3)):
        if more > 1 and not c.chunks:
            continue
        session = trial.session()
        for i in range(have):
            session(Call(*trial.tokens(1, i)))
        (_raises if c.overflow == "raises" else _reports)(trial, session, more, have)


def _raises(trial: Trial, session: Session, more: int, have: int) -> None:
    """Any exception will do; silence will not."""
    call = Call(*trial.tokens(more, 99))
    try:
        trial.run(session.cache, call, eager=True)
    except Exception:
        return
    session.calls.append(call)
    raise session.failure(
        f"an error: {more} more at {have} of {trial.claims.capacity} tokens", f"no error, and {_silence(trial, more)}"
    )


def _silence(trial: Trial, more: int) -> str:
    """What a cache does instead of raising: what the query after too many tokens sees."""
    c = trial.claims
    have = c.capacity if more == 1 else c.capacity - 1
    plan = Plan.of([1] * have + [more, 1])
    try:
        weights, session = attention_weights(trial, plan, quiet(trial, plan))
        last = have + more
        seen = attended(weights[-1][0, -1, 0], last, lambda: (session.calls, session.sizes), "the end")
    except Failure as failure:
        return f"then {failure.seen}"
    missing = sorted(c.sees(last) - seen)
    gone = f"does not see {spans(missing)}: written over, or never written" if missing else "sees all of them"
    return f"the next query, at position {last}, {gone}"


def _reports(trial: Trial, session: Session, more: int, have: int) -> None:
    """The step is dropped whole, `failed` says so, and what fits later still does."""
    c = trial.claims
    assert trial.failed is not None
    session(Call(*trial.tokens(more, 99)))
    told = np.broadcast_to(np.asarray(trial.failed(session.cache)), (c.batch_size,))
    if not told.all():
        raise session.failure("failed to say that the step was dropped in every row", f"{told.tolist()}")
    if more == 1:
        return
    # The one place that is left takes a token, as if nothing had been.
    out = session(Call(*(new := trial.tokens(1, 98)))).astype(np.float64)
    lists = c.oracle()
    for i in range(have):
        lists.append(*trial.tokens(1, i))
    error = np.abs(out - lists.append(*new)[0]).max()
    if not error <= (1e-2 if c.tolerance is None else c.tolerance):
        raise session.failure("a step that does not fit to be dropped whole", f"the next output is off by {error:.3g}")


def _endless(trial: Trial) -> str:
    return "a sequence may be of any length" if trial.claims.overflow == "never" else ""


def _unheard(trial: Trial) -> str:
    if trial.claims.overflow == "reports" and trial.failed is None:
        return "no way to read what it reports: failed="
    return _endless(trial)


BOUNDS = (
    Check("capacity", _capacity, _endless, needs=("values",)),
    Check("overflow", _overflow, _unheard, needs=("capacity",)),
)
