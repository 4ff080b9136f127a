"""Cached attention written a second time: plain NumPy in float64, tokens in Python lists, one query at a time.

Nothing here imports the rest of kvattn, and the import contract keeps it so. Slots, blocks, rings and masks do not
exist here: a sequence is the list of its tokens, a token's position is its index in that list, and a query attends to
the tokens whose index a pure-Python rule names. Notation: B batch, T new tokens, N query heads, K key/value heads,
G = N // K, H head dim, Hv value head dim.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from kvattn._typing import AnyArray


def seen_from(
    position: int | np.integer, window: int | None = None, num_sinks: int = 0, chunk: int | None = None
) -> set[int]:
    """The positions a query at `position` attends to: the last `window` with itself, and the first `num_sinks`.

    Of these those of its own chunk of positions.
    """
    if chunk is not None:
        return {p for p in seen_from(position, window, num_sinks) if p // chunk == position // chunk}
    first = 0 if window is None else max(0, position - window + 1)
    return set(range(first, position + 1)) | set(range(min(num_sinks, position + 1)))


def kept_after(num_tokens: int, window: int | None = None, num_sinks: int = 0, chunk: int | None = None) -> set[int]:
    """The positions a policy still holds after `num_tokens` tokens."""
    return set() if num_tokens == 0 else seen_from(num_tokens - 1, window, num_sinks, chunk)


def narrower(*windows: int | None) -> int | None:
    """The smallest of the windows that are given."""
    given = [w for w in windows if w is not None]
    return min(given) if given else None


def rotated(x: np.ndarray, position: int, theta: float = 10000.0, dtype: type = np.float64) -> np.ndarray:
    """RoPE of x [..., H], in float64 unless said: entry i turns with entry i + H/2 by position * theta^(-2i/H)."""
    half = x.shape[-1] // 2
    x = x.astype(dtype)
    phase = dtype(position) * (theta ** (-np.arange(half) / half)).astype(dtype)
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * np.cos(phase) - b * np.sin(phase), b * np.cos(phase) + a * np.sin(phase)], axis=-1)


def attend_token(
    query: AnyArray,
    keys: Sequence[AnyArray],
    values: Sequence[AnyArray],
    *,
    distances: Sequence[int | np.integer] | np.ndarray | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Sequence[float] | AnyArray | None = None,
    alibi_slopes: Sequence[float] | AnyArray | None = None,
    relative_bias: AnyArray | None = None,
    dtype: DTypeLike = np.float64,
) -> tuple[np.ndarray, np.ndarray]:
    """One query against a list of tokens.

    Args:
        query: [N, H].
        keys: list of n arrays [K, H].
        values: list of n arrays [K, Hv].
        distances: n numbers, key position minus query position (for ALiBi and relative bias).
        scale: factor of the scores; None: 1/sqrt(H).
        softcap: cap of the scores.
        sinks: [N] logits that join the sum.
        alibi_slopes: [N].
        relative_bias: [N, distances]; the last is for all larger ones.
        dtype: float64 for the truth. A storage dtype for the honest low-precision computation that the accuracy rule
            compares with: inputs in that dtype, sums term by term and softmax in float32, probabilities and output
            rounded to it.

    Returns:
        out [N, Hv] and lse [N] in float64.
    """
    wide = np.float64 if dtype == np.float64 else np.float32
    query = np.asarray(query).astype(dtype).astype(wide)
    num_heads, head_dim = query.shape
    out = np.zeros((num_heads, np.shape(values[0])[-1] if len(values) else 0), np.float64)
    lse = np.full((num_heads,), -np.inf)
    if not len(keys):
        return out, lse
    all_keys = np.stack([np.asarray(k) for k in keys]).astype(dtype).astype(wide)
    all_values = np.stack([np.asarray(v) for v in values]).astype(dtype).astype(wide)
    group = num_heads // all_keys.shape[1]
    for n in range(num_heads):
        k = n // group
        scores = _sum(all_keys[:, k] * query[n], 1) * wide(1 / np.sqrt(head_dim) if scale is None else scale)
        if softcap is not None:
            scores = wide(softcap) * np.tanh(scores / wide(softcap))
        if alibi_slopes is not None:
            scores = scores + wide(alibi_slopes[n]) * np.asarray(distances, wide)
        if relative_bias is not None:
            far = len(relative_bias[n]) - 1
            scores = scores + np.array([wide(relative_bias[n][min(-d, far)]) for d in distances or ()])
        top = scores.max() if sinks is None else max(scores.max(), wide(sinks[n]))
        weights = np.exp(scores - top)
        total = weights.sum() + (0 if sinks is None else np.exp(wide(sinks[n]) - top))
        probs = (weights / total).astype(dtype).astype(wide)
        out[n] = _sum(probs[:, None] * all_values[:, k], 0).astype(dtype).astype(np.float64)
        lse[n] = top + np.log(total)
    return out, lse


def _sum(terms: np.ndarray, axis: int) -> np.ndarray:
    """A sum of terms [...] in float64; of float32 terms a plain loop in float32, which is what a product may do."""
    if terms.dtype == np.float64:
        return np.asarray(terms.sum(axis))
    return np.asarray(np.cumsum(terms, axis, dtype=np.float32).take(-1, axis))


class TokenLists:
    """B sequences as lists of tokens.

    Args:
        batch_size: B.
        keeps: last tokens the policy keeps and lets a query see, its own included; None for all.
        num_sinks: first tokens that it keeps and lets a query see besides.
        window: a further window of the call.
        cuts: the policy keeps, and lets a query see, its own chunk of so many positions only.
        chunk: a further such limit of the call.
        limit: most tokens a sequence may ever have; a chunk past it is dropped whole.
        rope_theta: rotate queries and keys at their positions.
        in_cache: at the place a token has among those that its query sees, not at its position.
        turns_in: the dtype to rotate in. The honest low-precision computation rotates in float32.
        temperature: floor and scale: queries are multiplied by 1 + scale * ln(1 + (position + 1) // floor).
        dtype: see `attend_token`.
        rules: scale, softcap, sinks, alibi_slopes, relative_bias.

    Example:
        >>> import numpy as np
        >>> lists = TokenLists(1, keeps=2)
        >>> key = np.zeros((1, 3, 1, 2))
        >>> value = np.array([1.0, 2.0, 4.0]).reshape(1, 3, 1, 1)
        >>> out, lse = lists.append(key, key, value)
        >>> out.ravel().tolist()  # the mean of the last two values
        [1.0, 1.5, 3.0]
    """

    def __init__(
        self,
        batch_size: int,
        *,
        keeps: int | None = None,
        num_sinks: int = 0,
        cuts: int | None = None,
        window: int | None = None,
        chunk: int | None = None,
        limit: int | None = None,
        rope_theta: float | None = None,
        in_cache: bool = False,
        turns_in: type = np.float64,
        temperature: tuple[float, float] | None = None,
        dtype: DTypeLike = np.float64,
        **rules: float | Sequence[float] | AnyArray | None,
    ) -> None:
        self.rows: list[list[tuple[np.ndarray, np.ndarray]]] = [[] for _ in range(batch_size)]
        self.overflowed = [False] * batch_size
        self.keeps, self.num_sinks = keeps, num_sinks
        self.window, self.cuts, self.chunk = narrower(keeps, window), cuts, cuts or chunk
        self.limit = limit
        self.rope_theta, self.in_cache, self.turns_in = rope_theta, in_cache, turns_in
        self.temperature = temperature
        self.dtype = dtype
        self.rules: Mapping[str, Any] = rules

    def lengths(self) -> list[int]:
        """Tokens of each row."""
        return [len(row) for row in self.rows]

    def kept(self, row: int) -> set[int]:
        """Positions the policy holds for one row."""
        return kept_after(len(self.rows[row]), self.keeps, self.num_sinks, self.cuts)

    def append(
        self,
        query: AnyArray,
        key: AnyArray,
        value: AnyArray,
        num_new: Iterable[int] | np.ndarray | None = None,
        padding: str = "right",
    ) -> tuple[np.ndarray, np.ndarray]:
        """Appends and attends.

        Args:
            query: [B, T, N, H].
            key: [B, T, K, H].
            value: [B, T, K, Hv].
            num_new: B counts, None: T each.
            padding: which side the other tokens lie on.

        Returns:
            out [B, T, N, Hv], lse [B, T, N]: 0 and -inf for pads and dropped chunks.
        """
        query, key, value = np.asarray(query), np.asarray(key), np.asarray(value)
        batch, length, heads = query.shape[:3]
        counts = [length] * batch if num_new is None else [int(n) for n in num_new]
        out = np.zeros((batch, length, heads, value.shape[3]))
        lse = np.full((batch, length, heads), -np.inf)
        for b in range(batch):
            row = self.rows[b]
            if self.limit is not None and len(row) + counts[b] > self.limit:
                self.overflowed[b] = True
                continue
            first = 0 if padding == "right" else length - counts[b]
            for t in range(first, first + counts[b]):
                p = len(row)
                row.append((self._turned(key[b, t], p), np.array(value[b, t])))
                seen = sorted(seen_from(p, self.window, self.num_sinks, self.chunk))
                out[b, t], lse[b, t] = attend_token(
                    self._warm(self._turned(query[b, t], p), p),
                    [self._among(row[j][0], rank - len(seen) + 1) for rank, j in enumerate(seen)],
                    [row[j][1] for j in seen],
                    distances=[j - p for j in seen],
                    dtype=self.dtype,
                    **self.rules,
                )
        return out, lse

    def _turned(self, x: AnyArray, position: int) -> np.ndarray:
        """A query or key [..., H] at its position."""
        x = np.array(x)
        return x if self.rope_theta is None or self.in_cache else self._rotated(x, position)

    def _among(self, key: np.ndarray, place: int) -> np.ndarray:
        """A key [K, H] at its place among those that a query sees, which is itself at 0."""
        return self._rotated(key, place) if self.in_cache and self.rope_theta is not None else key

    def _rotated(self, x: np.ndarray, position: int) -> np.ndarray:
        """RoPE of x [..., H]."""
        assert self.rope_theta is not None
        return rotated(x, position, self.rope_theta, self.turns_in)

    def _warm(self, x: np.ndarray, position: int) -> np.ndarray:
        """A query [..., H] with its temperature."""
        if self.temperature is None:
            return x
        floor, scale = self.temperature
        return x * (1 + scale * np.log(1 + (position + 1) // floor))

    def trim(self, num_tokens: Iterable[int] | np.ndarray) -> None:
        """Takes the last tokens of each row back."""
        for row, n in zip(self.rows, num_tokens, strict=True):
            del row[len(row) - n :]

    def select(self, rows: Iterable[int] | np.ndarray) -> None:
        """Reorders, repeats or drops rows."""
        rows = list(rows)
        self.rows = [list(self.rows[r]) for r in rows]
        self.overflowed = [self.overflowed[r] for r in rows]

    def reset(self, rows: Iterable[bool]) -> None:
        """Empties the rows that are True."""
        for b, forget in enumerate(rows):
            if forget:
                self.rows[b], self.overflowed[b] = [], False
