"""Cached attention written a second time: plain NumPy in float64, tokens in Python lists, one query at a time.

Nothing here imports kvattn. Slots, blocks, rings and masks do not exist here: a sequence is the list
of its tokens, a token's position is its index in that list, and a query attends to the tokens whose
index a pure-Python rule names. Notation: B batch, T new tokens, N query heads, K key/value heads,
G = N // K, H head dim, Hv value head dim.
"""

import numpy as np


def seen_from(position, window=None, num_sinks=0, chunk=None):
    """The positions a query at `position` attends to: the last `window` with itself, and the first `num_sinks`.

    Of these those of its own chunk of positions.
    """
    if chunk is not None:
        return {p for p in seen_from(position, window, num_sinks) if p // chunk == position // chunk}
    first = 0 if window is None else max(0, position - window + 1)
    return set(range(first, position + 1)) | set(range(min(num_sinks, position + 1)))


def kept_after(num_tokens, window=None, num_sinks=0, chunk=None):
    """The positions a policy still holds after `num_tokens` tokens."""
    return set() if num_tokens == 0 else seen_from(num_tokens - 1, window, num_sinks, chunk)


def narrower(*windows):
    """The smallest of the windows that are given."""
    given = [w for w in windows if w is not None]
    return min(given) if given else None


def rotated(x, position, theta=10000.0):
    """RoPE of x [..., H] in float64: entry i turns with entry i + H/2 by position * theta^(-2i/H)."""
    half = x.shape[-1] // 2
    phase = position * theta ** (-np.arange(half) / half)
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * np.cos(phase) - b * np.sin(phase), b * np.cos(phase) + a * np.sin(phase)], axis=-1)


def attend_token(
    query,
    keys,
    values,
    *,
    distances=None,
    scale=None,
    softcap=None,
    sinks=None,
    alibi_slopes=None,
    relative_bias=None,
    dtype=np.float64,
):
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
    keys = np.stack([np.asarray(k) for k in keys]).astype(dtype).astype(wide)
    values = np.stack([np.asarray(v) for v in values]).astype(dtype).astype(wide)
    group = num_heads // keys.shape[1]
    for n in range(num_heads):
        k = n // group
        scores = _sum(keys[:, k] * query[n], 1) * wide(1 / np.sqrt(head_dim) if scale is None else scale)
        if softcap is not None:
            scores = wide(softcap) * np.tanh(scores / wide(softcap))
        if alibi_slopes is not None:
            scores = scores + wide(alibi_slopes[n]) * np.asarray(distances, wide)
        if relative_bias is not None:
            far = len(relative_bias[n]) - 1
            scores = scores + np.array([wide(relative_bias[n][min(-d, far)]) for d in distances])
        top = scores.max() if sinks is None else max(scores.max(), wide(sinks[n]))
        weights = np.exp(scores - top)
        total = weights.sum() + (0 if sinks is None else np.exp(wide(sinks[n]) - top))
        probs = (weights / total).astype(dtype).astype(wide)
        out[n] = _sum(probs[:, None] * values[:, k], 0).astype(dtype).astype(np.float64)
        lse[n] = top + np.log(total)
    return out, lse


def _sum(terms, axis):
    """A sum in float64; of float32 terms a plain loop in float32, which is what a product may do."""
    return terms.sum(axis) if terms.dtype == np.float64 else np.cumsum(terms, axis, dtype=np.float32).take(-1, axis)


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
        temperature: floor and scale: queries are multiplied by 1 + scale * ln(1 + (position + 1) // floor).
        dtype: see `attend_token`.
        rules: scale, softcap, sinks, alibi_slopes, relative_bias.
    """

    def __init__(
        self,
        batch_size,
        *,
        keeps=None,
        num_sinks=0,
        cuts=None,
        window=None,
        chunk=None,
        limit=None,
        rope_theta=None,
        temperature=None,
        dtype=np.float64,
        **rules,
    ):
        self.rows = [[] for _ in range(batch_size)]
        self.overflowed = [False] * batch_size
        self.keeps, self.num_sinks = keeps, num_sinks
        self.window, self.cuts, self.chunk = narrower(keeps, window), cuts, cuts or chunk
        self.limit = limit
        self.rope_theta = rope_theta
        self.temperature = temperature
        self.dtype = dtype
        self.rules = rules

    def lengths(self):
        return [len(row) for row in self.rows]

    def kept(self, row):
        """Positions the policy holds for one row."""
        return kept_after(len(self.rows[row]), self.keeps, self.num_sinks, self.cuts)

    def append(self, query, key, value, num_new=None, padding="right"):
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
        num_new = [length] * batch if num_new is None else [int(n) for n in num_new]
        out = np.zeros((batch, length, heads, value.shape[3]))
        lse = np.full((batch, length, heads), -np.inf)
        for b in range(batch):
            row = self.rows[b]
            if self.limit is not None and len(row) + num_new[b] > self.limit:
                self.overflowed[b] = True
                continue
            first = 0 if padding == "right" else length - num_new[b]
            for t in range(first, first + num_new[b]):
                p = len(row)
                row.append((self._turn(key[b, t], p), np.array(value[b, t])))
                seen = sorted(seen_from(p, self.window, self.num_sinks, self.chunk))
                out[b, t], lse[b, t] = attend_token(
                    self._warm(self._turn(query[b, t], p), p),
                    [row[j][0] for j in seen],
                    [row[j][1] for j in seen],
                    distances=[j - p for j in seen],
                    dtype=self.dtype,
                    **self.rules,
                )
        return out, lse

    def _turn(self, x, position):
        x = np.array(x)
        return x if self.rope_theta is None else rotated(x.astype(np.float64), position, self.rope_theta)

    def _warm(self, x, position):
        if self.temperature is None:
            return x
        floor, scale = self.temperature
        return x * (1 + scale * np.log(1 + (position + 1) // floor))

    def trim(self, num_tokens):
        for row, n in zip(self.rows, num_tokens, strict=True):
            del row[len(row) - n :]

    def select(self, rows):
        self.rows = [list(self.rows[r]) for r in rows]
        self.overflowed = [self.overflowed[r] for r in rows]

    def reset(self, rows):
        for b, forget in enumerate(rows):
            if forget:
                self.rows[b], self.overflowed[b] = [], False


def cross(query, key, value, lengths=None, num_new=None, padding="right", dtype=np.float64, **rules):
    """Static cross-attention: every real query attends to every real token of the encoder."""
    query, key, value = np.asarray(query), np.asarray(key), np.asarray(value)
    batch, length, heads = query.shape[:3]
    lengths = [key.shape[1]] * batch if lengths is None else lengths
    num_new = [length] * batch if num_new is None else num_new
    out = np.zeros((batch, length, heads, value.shape[3]))
    lse = np.full((batch, length, heads), -np.inf)
    for b in range(batch):
        first = 0 if padding == "right" else length - num_new[b]
        for t in range(first, first + num_new[b]):
            if lengths[b]:
                out[b, t], lse[b, t] = attend_token(
                    query[b, t], list(key[b, : lengths[b]]), list(value[b, : lengths[b]]), dtype=dtype, **rules
                )
    return out, lse


def assert_accurate(out, ref64, lowp_ref, mean=1.5):
    """The accuracy rule: no fixed tolerance, the error of an honest low-precision computation is the measure.

    ``max|out - ref64| <= 2 max|lowp - ref64| + 2 max|(ref + 0.3 - 0.3) - ref|``, with ref in the dtype of `out`: the
    second term is what rounding alone does. The mean of the error likewise, with `mean` in place of 2.
    """
    out = np.asarray(out)
    wide, lowp_ref = out.astype(np.float64), np.asarray(lowp_ref, np.float64)
    assert wide.shape == ref64.shape, f"shape {wide.shape}, expected {ref64.shape}"
    assert np.isfinite(wide).all(), "the output is not finite"
    ref = ref64.astype(out.dtype)
    # Scalars of bfloat16 stay bfloat16 only if the constant is one too.
    shift = np.asarray(0.3, out.dtype)
    floor = np.abs(((ref + shift) - shift).astype(np.float64) - ref.astype(np.float64))
    error, low = np.abs(wide - ref64), np.abs(lowp_ref - ref64)
    if not error.size:
        return
    bound = 2 * low.max() + 2 * floor.max()
    assert error.max() <= bound, f"max error {error.max():.3g} > {bound:.3g}"
    bound = mean * low.mean() + 2 * floor.mean()
    assert error.mean() <= bound, f"mean error {error.mean():.3g} > {bound:.3g}"


def assert_lse(lse, ref64, rtol=1e-5):
    """float32 logsumexp: equal to 1e-5, and -inf exactly where the truth is."""
    lse = np.asarray(lse, np.float64)
    empty = np.isneginf(ref64)
    assert (np.isneginf(lse) == empty).all(), "lse is -inf in other places than where nothing is attended to"
    error = np.abs(lse[~empty] - ref64[~empty]) / np.maximum(np.abs(ref64[~empty]), 1)
    assert not error.size or error.max() <= rtol, f"lse is off by {error.max():.3g}, relatively"


def assert_same_bits(a, b, what="arrays"):
    """Equal bit by bit, NaN and the sign of zero included."""
    a, b = np.asarray(a), np.asarray(b)
    assert a.dtype == b.dtype and a.shape == b.shape, f"{what}: {a.dtype}{a.shape} and {b.dtype}{b.shape}"
    assert a.tobytes() == b.tobytes(), f"{what} differ in {int((a != b).sum())} of {a.size} numbers"
