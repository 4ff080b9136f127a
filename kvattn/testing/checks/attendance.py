"""Token by token: which tokens a query sees, of which heads, and at which positions."""

import numpy as np

from kvattn.testing.checks.base import Check, judge
from kvattn.testing.oracles import rotated
from kvattn.testing.probes import attention_weights, quiet, spans
from kvattn.testing.report import Call, Failure
from kvattn.testing.trial import Plan, Session, Trial


def _runs(trial: Trial) -> None:
    """One step: its output has the shape and dtype of the query, and is finite."""
    session = trial.session()
    out = session(Call(*trial.tokens(1)))
    if not np.isfinite(out.astype(np.float64)).all():
        raise session.failure("finite numbers", "NaN or infinity")


def _one_by_one(trial: Trial) -> tuple[Plan, list[np.ndarray], Session]:
    """A sequence token by token, and the weights [B, T, N, K, L] of each step."""
    plan = Plan.of([1] * trial.claims.length)
    return plan, *trial.remember("one by one", lambda: attention_weights(trial, plan, quiet(trial, plan)))


def _everything(trial: Trial) -> None:
    """While nothing is out of reach, a query sees all before it and itself."""
    reach = trial.claims.reach
    judge(trial, *_one_by_one(trial), lambda p: range(trial.claims.length) if not reach or p < reach_of(trial) else ())


def reach_of(trial: Trial) -> int:
    """The first position at which something is out of reach, or would be if a window were one token short."""
    c = trial.claims
    return min(x for x in (c.window, c.chunk_size, c.budget) if x is not None) - 1


def _window(trial: Trial) -> None:
    """From then on, the last tokens of the window, no more and no fewer."""
    c = trial.claims
    judge(trial, *_one_by_one(trial), lambda p: range(c.sinks, c.length) if p >= reach_of(trial) else ())


def _sinks(trial: Trial) -> None:
    """And the first tokens of the sequence."""
    judge(trial, *_one_by_one(trial), lambda p: range(trial.claims.sinks))


def _from_the_first_cut(trial: Trial) -> None:
    """Of its own chunk of positions, or within the budget."""
    judge(trial, *_one_by_one(trial), lambda p: range(trial.claims.length) if p >= reach_of(trial) else ())


def _grouping(trial: Trial) -> None:
    """Query head n reads key/value head n // G: neighbours share."""
    c = trial.claims
    _, weights, session = _one_by_one(trial)
    last = weights[-1][0, 0]
    for n in range(c.num_heads):
        heads = set(np.nonzero((last[n] > 0.25 / c.length).any(-1))[0].tolist())
        if heads != {n // c.group}:
            read = f"values of heads {spans(heads)}"
            raise Failure(f"query head {n} to read values of head {n // c.group}", read, session.calls, session.sizes)
    # Keys: token k has a key that matches in head k, and in no other.
    new = [trial.tokens(1, i) for i in range(c.num_kv_heads + 1)]
    slowest = c.head_dim // 2 - 1  # of RoPE's pairs: it hardly turns
    for i, (query, key, _) in enumerate(new):
        key[:] = 0
        query[:] = 0
        query[..., slowest] = 8 * np.sqrt(c.head_dim)
        key[:, :, i : i + 1, slowest] = 1
    found, session = attention_weights(trial, Plan.of([1] * len(new)), new)
    for n in range(c.num_heads):
        best = int(found[-1][0, 0, n].sum(0).argmax())
        if best != n // c.group:
            expected = f"query head {n} to read keys of head {n // c.group}"
            raise Failure(expected, f"keys of head {best}", session.calls, session.sizes)


def _positions(trial: Trial) -> None:
    """Scores go by the distance that RoPE's positions give, while a ring turns too.

    All queries and keys are alike, so that the logarithms of the weights are those scores, times a scale.
    """
    c = trial.claims
    plan = Plan.of([1] * c.length)
    new = [trial.tokens(1, i) for i in range(c.length)]
    for query, key, _ in new:
        query[:], key[:] = 1, 1
    weights, session = attention_weights(trial, plan, new)
    one = np.ones(c.head_dim)
    theta = c.rope_theta if c.rope_theta is not None else 1.0
    slack = 0.02 if c.tolerance is None and c.numpy_dtype.itemsize >= 4 else 0.1
    for p, weight in enumerate(weights):
        seen = sorted(np.nonzero(weight[0, 0, 0, 0] > 0)[0].tolist())
        places = [j - p for j in seen] if c.positions == "true" else list(range(1 - len(seen), 1))
        scores = np.array([rotated(one, d, theta) @ one for d in places]) / np.sqrt(c.head_dim)
        if len(seen) < 3:
            continue
        logs = np.log(weight[0, 0, 0, 0, seen])
        if c.softcap is not None:
            scores = c.softcap * np.tanh(scores * (1 if c.scale is None else c.scale) / c.softcap)
        slope, offset = np.polyfit(scores, logs, 1)
        error = np.abs(slope * scores + offset - logs).max()
        if slope <= 0 or error > slack * max(np.ptp(logs), 1e-3):
            raise Failure(
                f"tokens {spans(seen)} at distances {spans([-d for d in places])} from the query at position {p}",
                f"scores that other distances give, off by {error:.2g}",
                session.calls[: p + 1],
                session.sizes,
            )


def _count(trial: Trial) -> None:
    """`lengths` says how many tokens were seen, also when a ring holds fewer."""
    assert trial.lengths is not None
    session = trial.session()
    for i in range(trial.claims.length):
        session(Call(*trial.tokens(1, i)))
        seen = np.asarray(trial.lengths(session.cache)).tolist()
        seen = seen if isinstance(seen, list) else [seen] * trial.claims.batch_size
        if seen != [i + 1] * trial.claims.batch_size:
            raise session.failure(f"{i + 1} tokens seen in every row", f"{seen}")


ATTENDANCE = (
    Check("runs", _runs),
    Check("tokens before", _everything, needs=("runs",)),
    Check(
        "window",
        _window,
        lambda trial: "" if trial.claims.window else "no window",
        needs=("tokens before",),
    ),
    Check("sinks", _sinks, lambda trial: "" if trial.claims.sinks else "no sinks", needs=("tokens before",)),
    Check(
        "chunk cuts",
        _from_the_first_cut,
        lambda trial: "" if trial.claims.chunk_size else "no chunk_size",
        needs=("tokens before", "window"),
    ),
    Check(
        "budget",
        _from_the_first_cut,
        lambda trial: "" if trial.claims.budget else "no budget",
        needs=("tokens before",),
    ),
    Check(
        "grouping",
        _grouping,
        lambda trial: "" if trial.claims.num_kv_heads > 1 else "one key/value head",
        needs=("tokens before",),
    ),
    Check(
        "positions",
        _positions,
        lambda trial: "" if trial.claims.rope_theta is not None else "the step does not rotate: no rope_theta",
        needs=("tokens before", "window", "sinks", "chunk cuts", "budget"),
    ),
    Check(
        "token count",
        _count,
        lambda trial: "" if trial.lengths is not None else "no way to read it: lengths=",
        needs=("runs",),
    ),
)
