"""What a check is, and what several of them do."""

import dataclasses
from collections.abc import Callable, Collection

import numpy as np

from kvattn.testing.accuracy import inaccuracy
from kvattn.testing.oracles import attend_token, rotated
from kvattn.testing.probes import Tokens, attention_weights, quiet, spans
from kvattn.testing.report import Failure
from kvattn.testing.trial import Plan, Session, Trial

Universe = Callable[[int], Collection[int]]
"""Of a query at a position, the positions that a check looks at."""


@dataclasses.dataclass(frozen=True)
class Check:
    """One thing that a cache may promise.

    Attributes:
        name: of the check.
        run: tries it; raises `Failure` where it does not hold.
        missing: why it is not offered by a cache, "" if it is.
        needs: checks that it rests on. If one of them failed, or was not tried, this one is not.
    """

    name: str
    run: Callable[[Trial], None]
    missing: Callable[[Trial], str] = lambda trial: ""
    needs: tuple[str, ...] = ()


def look(trial: Trial, plan: Plan, judged: Universe | None = None) -> None:
    """Steps whose queries attend alike to all they see: judges which tokens that is.

    Args:
        trial: the cache under test.
        plan: how the sequence is cut into steps.
        judged: of a query at a position, the positions to look at; None: all.

    Raises:
        Failure: a query attends to others than it should.
    """
    weights, session = attention_weights(trial, plan, quiet(trial, plan))
    judge(trial, plan, weights, session, judged)


def judge(
    trial: Trial, plan: Plan, weights: list[np.ndarray], session: Session, judged: Universe | None = None
) -> None:
    """Judges weights [B, T, N, K, L] of each step: see `look`."""
    c = trial.claims
    for i, (position, weight) in enumerate(zip(plan.positions(c.batch_size), weights, strict=True)):
        for b, t in np.argwhere(position >= 0):
            p = int(position[b, t])
            universe = set(range(weight.shape[-1])) if judged is None else set(judged(p))
            for n in range(c.num_heads):
                where = f"row {b}, head {n}, position {p}"
                seen = attended(weight[b, t, n], p, failure=lambda i=i: _at(session, i), where=where)
                wrong = _verdict(trial, p, seen, universe, alone=position.shape[1] == 1)
                if wrong:
                    raise Failure(f"the query of {where} to see {wrong}", spans(seen), *_at(session, i))


def attended(
    weights: np.ndarray, position: int, failure: Callable[[], tuple], where: str, least: float | None = None
) -> set[int]:
    """The positions with a weight, whichever key/value head they are of.

    Args:
        weights: [K, L] of one query.
        position: its own; it sees position + 1 tokens at most.
        failure: calls and sizes of a failure.
        where: which query it is, in words.
        least: the smallest weight that counts; None: a quarter of what they get if all are seen alike.

    Raises:
        Failure: a weight is NaN.
    """
    if not np.isfinite(weights).all():
        raise Failure(f"finite numbers at {where}", "NaN or infinity", *failure())
    least = 0.25 / (position + 1) if least is None else least
    return set(np.nonzero((weights > least).any(0))[0].tolist())


def _verdict(trial: Trial, position: int, seen: set[int], universe: set[int], alone: bool) -> str:
    """What should have been seen, if it was not. A budget is for steps of one token: a chunk is seen besides."""
    c = trial.claims
    if not universe:
        return ""
    if c.budget is None or position < c.budget - 1:
        expected = c.sees(position)
        return "" if seen & universe == expected & universe else spans(expected)
    fits = position in seen and max(seen) <= position and (len(seen) <= c.budget or not alone)
    return "" if fits else f"at most {c.budget} tokens up to itself, itself among them"


def _at(session: Session, call: int) -> tuple:
    """The calls up to one of them, and the sizes of the cache."""
    return session.calls[: call + 1], session.sizes


def compare(trial: Trial, plan: Plan, seed: int = 1) -> None:
    """Random tokens against the oracle.

    Raises:
        Failure: an output is further from it than the claims allow.
    """
    c = trial.claims
    new = [trial.tokens(length, seed * 100 + i) for i, (length, _) in enumerate(plan.pieces)]
    session, outs, calls = trial.session(), [], plan.calls(new)
    for call in calls:
        outs.append(session(call))
    refs, lows = (_truth(trial, plan, new, exact) for exact in (True, False))
    real = [call.real for call in calls]
    out, ref, low = (np.concatenate([x[r] for x, r in zip(xs, real, strict=True)]) for xs in (outs, refs, lows))
    places = [(i, b, t) for i, r in enumerate(real) for b, t in np.argwhere(r)]
    error = np.abs(out.astype(np.float64) - ref)
    if c.tolerance is None:
        wrong = inaccuracy(out, ref, low)
    else:
        wrong = None if error.max() <= c.tolerance else f"max error {error.max():.3g} > {c.tolerance:.3g}"
        wrong = wrong if np.isfinite(error).all() else "the output is not finite"
    if wrong:
        worst = int(np.nan_to_num(error, nan=np.inf).reshape(len(places), -1).max(1).argmax())
        i, b, t = places[worst]
        raise Failure("the output of the oracle", f"{wrong}, at row {b}, token {t} of step {i}", *_at(session, i))


def _truth(trial: Trial, plan: Plan, tokens: Tokens, exact: bool) -> list[np.ndarray]:
    """Outputs [B, T, N, H] of the oracle, of each step."""
    c = trial.claims
    if c.budget is not None:
        return _chosen_by_the_cache(trial, plan, tokens, exact)
    lists = c.oracle(exact)
    return [lists.append(*new, counts, plan.padding)[0] for (_, counts), new in zip(plan.pieces, tokens, strict=True)]


def _chosen_by_the_cache(trial: Trial, plan: Plan, tokens: Tokens, exact: bool) -> list[np.ndarray]:
    """Outputs [B, T, N, H] over whichever tokens the cache sees, as its own outputs for the same queries say."""
    c = trial.claims
    weights, session = trial.remember((plan, "chosen"), lambda: attention_weights(trial, plan, tokens))
    positions, outs = plan.positions(c.batch_size), []
    width, wide = (np.float64, np.float64) if exact else (c.numpy_dtype, np.float32)

    def turned(x: np.ndarray, place: int) -> np.ndarray:
        """A query or key [H] at a place."""
        return x if c.rope_theta is None else rotated(x, place, c.rope_theta, wide)

    texts: list[dict[int, tuple[np.ndarray, np.ndarray]]] = [{} for _ in range(c.batch_size)]
    for i, (position, (query, key, value)) in enumerate(zip(positions, tokens, strict=True)):
        out = np.zeros(query.shape)
        for b, t in np.argwhere(position >= 0):
            texts[b][int(position[b, t])] = key[b, t], value[b, t]
        for b, t in np.argwhere(position >= 0):
            p = int(position[b, t])
            for n in range(c.num_heads):
                k, where = n // c.group, f"row {b}, head {n}, position {p}"
                seen = sorted(attended(weights[i][b, t, n], p, lambda i=i: _at(session, i), where, least=0.0))
                places = [j for j in seen] if c.positions == "true" else list(range(p - len(seen) + 1, p + 1))
                out[b, t, n], _ = attend_token(
                    turned(query[b, t, n], p)[None],
                    [turned(texts[b][j][0][k], place)[None] for j, place in zip(seen, places, strict=True)],
                    [texts[b][j][1][k][None] for j in seen],
                    scale=c.scale,
                    softcap=c.softcap,
                    dtype=width,
                )
        outs.append(out)
    return outs
