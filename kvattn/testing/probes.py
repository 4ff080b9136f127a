"""Who attends to whom, read out of outputs alone.

Values are one-hot: what a query gives to a token of a key/value head comes out as one number of its own. Where there
are more of them than numbers in a value, the same steps are made several times.
"""

from collections.abc import Sequence

import numpy as np

from kvattn.testing.trial import Plan, Session, Trial

Tokens = Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]]


def attention_weights(trial: Trial, plan: Plan, tokens: Tokens) -> tuple[list[np.ndarray], Session]:
    """The weight that each query gives to each token of each key/value head.

    Args:
        trial: the cache under test.
        plan: how the sequence is cut into steps.
        tokens: queries [B, T, N, H], keys and values [B, T, K, H] of each step; the values are not used.

    Returns:
        float64 [B, T, N, K, L] of each step, L being the length of the longest row; and the last session.
    """
    c = trial.claims
    positions = plan.positions(c.batch_size)
    length = max(int(p.max()) for p in positions) + 1
    flat = c.num_kv_heads * length
    weights = [np.zeros((*p.shape, c.num_heads, flat)) for p in positions]
    session = None
    for first in range(0, flat, c.head_dim):
        session = trial.session()
        last = min(first + c.head_dim, flat)
        new = [(q, k, _one_hot(p, v, first, length)) for p, (q, k, v) in zip(positions, tokens, strict=True)]
        for out, call in zip(weights, plan.calls(new), strict=True):
            out[..., first:last] = session(call)[..., : last - first].astype(np.float64)
    assert session is not None
    return [w.reshape(*w.shape[:3], c.num_kv_heads, length) for w in weights], session


def _one_hot(positions: np.ndarray, value: np.ndarray, first: int, length: int) -> np.ndarray:
    """Values [B, T, K, H]: 1 at number k * length + position - first, for tokens where that is one of H."""
    found = np.zeros_like(value)
    for b, t in np.argwhere(positions >= 0):
        for k in range(value.shape[2]):
            place = k * length + int(positions[b, t]) - first
            if 0 <= place < value.shape[3]:
                found[b, t, k, place] = 1
    return found


def quiet(trial: Trial, plan: Plan, seed: int = 0) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Tokens whose queries [B, T, N, H] are zero, so that each attends alike to whatever it sees."""
    new = [trial.tokens(length, seed * 100 + i) for i, (length, _) in enumerate(plan.pieces)]
    return [(np.zeros_like(q), k, v) for q, k, v in new]


def spans(positions: set[int] | Sequence[int]) -> str:
    """Positions in words: ``{0, 3..7}``."""
    found: list[list[int]] = []
    for p in sorted(positions):
        if found and found[-1][1] == p - 1:
            found[-1][1] = p
        else:
            found.append([p, p])
    return "{" + ", ".join(str(a) if a == b else f"{a}, {b}" if b == a + 1 else f"{a}..{b}" for a, b in found) + "}"
