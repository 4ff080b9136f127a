"""`check_cache`: everything that a cache claims, tried."""

from collections.abc import Callable, Collection
from typing import Any

from kvattn.errors import UnknownNameError
from kvattn.testing.checks import CHECKS, Check
from kvattn.testing.claims import Claims
from kvattn.testing.report import Failure, Finding, Make, Report, Step
from kvattn.testing.trial import Trial


def check_cache(
    make: Make,
    step: Step,
    claims: Claims | None = None,
    *,
    lengths: Callable[[Any], Any] | None = None,
    failed: Callable[[Any], Any] | None = None,
    fill: Callable[[Any, float], Any] | None = None,
    only: Collection[str] | None = None,
    seed: int = 0,
) -> Report:
    """Tries all that a decoding cache claims: what is seen, the numbers, pads, overflow, NaN, neighbours, memory.

    It looks at outputs alone, so the cache may be of any library and of any make: two functions describe it. What goes
    in are NumPy arrays, what comes out is read by `numpy.asarray`.

    Args:
        make: ``make(batch_size, capacity, num_kv_heads, head_dim, dtype)`` gives an empty cache: any object.
        step: ``step(cache, query, key, value)`` appends T tokens, attends, and gives ``(out, cache)``. Queries and the
            output are [B, T, N, H], keys and values [B, T, K, H]. The cache may be changed in place. If `claims` have
            `padding`, steps with pads are also given ``num_new`` (int32[B]: how many tokens of each row are real) and
            ``padding`` ("right" or "left": where the others lie).
        claims: what the cache promises. As a default: causal attention over all tokens, an error where one does
            not fit.
        lengths: reads int [B] out of a cache, how many tokens each row has seen, if it can be asked.
        failed: reads bool [B] out of a cache, in which rows a step did not fit, if it reports that.
        fill: ``fill(cache, number)`` gives an empty cache with that number in its memory for keys and values.
        only: names of checks to make, and nothing else, whatever they rest on.
        seed: of the random tokens.

    Returns:
        A `Report`: print it, or call its `raise_if_failed` in a test.

    Raises:
        UnknownNameError: `only` names a check that there is not.

    Example:
        >>> import numpy as np
        >>> from kvattn.testing import Claims, check_cache
        >>> def make(batch_size, capacity, num_kv_heads, head_dim, dtype):
        ...     return np.zeros((2, batch_size, 0, num_kv_heads, head_dim), dtype)
        >>> def step(cache, query, key, value):  # one token at a time, and forgets the last
        ...     keys, values = cache = np.concatenate([cache, [key, value]], axis=2)
        ...     group = query.shape[2] // key.shape[2]
        ...     keys, values = (x[:, -10:].repeat(group, axis=2) for x in (keys, values))
        ...     scores = np.einsum("btnh,bsnh->bnts", query, keys) / np.sqrt(query.shape[-1])
        ...     weights = np.exp(scores - scores.max(-1, keepdims=True))
        ...     weights /= weights.sum(-1, keepdims=True)
        ...     return np.einsum("bnts,bsnh->btnh", weights, values).astype(query.dtype), cache
        >>> report = check_cache(make, step, Claims(prompts=False, chunks=False, overflow="never"))
        >>> report.ok, report.failed
        (False, ['tokens before'])
        >>> print(report["tokens before"].seen)
        {1..10}
        >>> check_cache(make, step, Claims(window=10, prompts=False, chunks=False, overflow="never")).ok
        True
    """
    claims = Claims() if claims is None else claims
    known = [check.name for check in CHECKS]
    unknown = sorted(set(only or ()) - set(known))
    if unknown:
        raise UnknownNameError(f"no check is called {unknown[0]!r}. There are {', '.join(map(repr, known))}.")
    trial = Trial(make, step, claims, lengths, failed, fill, seed)
    findings: dict[str, Finding] = {}
    for check in CHECKS:
        if only is None or check.name in only:
            findings[check.name] = _tried(trial, check, findings)
    return Report(tuple(findings.values()))


def _tried(trial: Trial, check: Check, before: dict[str, Finding]) -> Finding:
    """What becomes of a check, given what became of those before it."""
    if why := check.missing(trial):
        return Finding(check.name, "not offered", seen=why)
    for name in check.needs:
        if name in before and before[name].status in ("failed", "not tried"):
            return Finding(check.name, "not tried", seen=f"it rests on {name!r}")
    try:
        check.run(trial)
    except Failure as failure:
        steps = len(failure.calls)
        again = f"check_cache(..., only=[{check.name!r}], seed={trial.seed}); .replay(make, step): {steps} steps"
        return Finding(
            check.name, "failed", failure.expected, failure.seen, again, failure.calls, failure.sizes or trial.sizes()
        )
    return Finding(check.name, "ok")
