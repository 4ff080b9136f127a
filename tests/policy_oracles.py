"""List-of-tokens brute force for the policies that let tokens go, one sequence at a time, float64 NumPy.

Written from the papers' descriptions, not from the code: Python lists and dicts, no slots, no masks. Each function
takes q [T, N, H], k and v [T, K, H] (for q also `Drawn` attention) and the length of a prompt that is appended at once;
what follows comes token by token. Each returns the outputs [T, N, H] and, per key/value head, the set of positions kept
at the end.
"""

import numpy as np


def softmax(scores):
    """Plain softmax of a vector."""
    weights = np.exp(scores - scores.max())
    return weights / weights.sum()


def rotate(x, position, theta=10000.0):
    """RoPE, half-split, at one position."""
    half = x.shape[-1] // 2
    angle = position * theta ** (-np.arange(half) / half)
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], -1)


class Attention:
    """Attends one token over a list of positions and reports the mean attention of each head group."""

    def __init__(self, q, k, v, in_cache=False, slopes=None):
        self.q, self.k, self.v, self.in_cache, self.slopes = q, k, v, in_cache, slopes
        self.group = q.shape[1] // k.shape[1]
        self.out = np.zeros((*q.shape[:2], v.shape[-1]))

    def __call__(self, t, head, tokens):
        """Attention of the token t of the query heads of `head` over `tokens`, mean over those query heads."""
        mean = np.zeros(len(tokens))
        for n in range(head * self.group, (head + 1) * self.group):
            keys, query = self.k[tokens, head], self.q[t, n]
            distance = np.arange(len(tokens)) - (len(tokens) - 1)  # in the cache, where tokens lie in order
            if self.in_cache and self.slopes is None:
                keys = np.stack([rotate(key, place) for key, place in zip(keys, distance, strict=True)])
            bias = 0 if self.slopes is None else self.slopes[n] * distance
            probs = softmax(keys @ query / np.sqrt(self.q.shape[-1]) + bias)
            self.out[t, n] = probs @ self.v[tokens, head]
            mean += probs / self.group
        return mean


class Drawn:
    """Attention that is drawn, for policies alone: weights [K, T, T] of a query and a position, to be normalised."""

    out = None

    def __init__(self, weights):
        self.weights = weights

    def __len__(self):
        return self.weights.shape[1]

    def __call__(self, t, head, tokens):
        """What `Attention` returns."""
        chosen = self.weights[head, t, tokens]
        return chosen / chosen.sum()


def attention(q, k, v, *how):
    """(attention, number of key/value heads) of arrays, or drawn."""
    return (q, len(q.weights)) if isinstance(q, Drawn) else (Attention(q, k, v, *how), k.shape[1])


def streaming(q, k, v, num_sinks, window, *, in_cache=True, slopes=None, rotated=True, sees=None):
    """StreamingLLM, with keys cached before rotation and rotated by their rank in the cache.

    sees: a query attends to the last so many of the places it is given, its own included. None: to all.
    """
    length, heads, features = q.shape
    group = heads // k.shape[1]
    out = np.zeros((length, heads, v.shape[-1]))
    for t in range(length):
        tokens = [j for j in range(t + 1) if j < num_sinks or j > t - window]
        places = list(range(len(tokens))) if in_cache else tokens
        here, kept = places[-1], set(tokens)
        if sees is not None:
            near = [i for i, place in enumerate(places) if place > here - sees]
            tokens, places = [tokens[i] for i in near], [places[i] for i in near]
        for n in range(heads):
            keys, query = k[tokens, n // group], q[t, n]
            if rotated:
                keys = np.stack([rotate(key, place) for key, place in zip(keys, places, strict=True)])
                query = rotate(query, here)
            scores = keys @ query / np.sqrt(features)
            if slopes is not None:
                scores = scores + slopes[n] * (np.array(places) - here)
            out[t, n] = softmax(scores) @ v[tokens, n // group]
    return out, [kept] * k.shape[1]


def h2o(q, k, v, chunks, num_heavy, num_recent, in_cache=False, slopes=None):
    """H2O as in the authors' real-drop code, per key/value head.

    chunks: the length of the prompt, or of several chunks; each attends to what was kept and to itself.
    """
    chunks = [chunks] if isinstance(chunks, int) else list(chunks)
    chunks += [1] * (len(q) - sum(chunks))
    (attend, heads), kept = attention(q, k, v, in_cache, slopes), []
    for head in range(heads):
        tokens, score, start, t = [], {}, 0, -1
        for size in chunks:
            for t in range(start, start + size):
                tokens.append(t)
                score[t] = 0.0
                for j, p in zip(tokens, attend(t, head, list(tokens)), strict=True):
                    score[j] += p
            while len(tokens) > num_heavy + num_recent:
                old = [j for j in tokens if j <= t - num_recent]
                tokens.remove(min(old, key=lambda j: (score[j], j)))
            start += size
        kept.append(set(tokens))
    return attend.out, kept


def scissorhands(q, k, v, chunks, budget, num_recent, history, drop, in_cache=False):
    """Scissorhands, recorded variant, with a dict of the queries that found each token unimportant.

    chunks: the length of the prompt, or of several chunks; each attends to what was kept and to itself.
    """
    chunks = [chunks] if isinstance(chunks, int) else list(chunks)
    chunks += [1] * (len(q) - sum(chunks))
    (attend, heads), kept = attention(q, k, v, in_cache), []
    num_recent = min(num_recent, budget + 1 - drop)
    for head in range(heads):
        low = {}

        def look(t, tokens, head=head, low=low):
            for j, p in zip(tokens, attend(t, head, list(tokens)), strict=True):
                low.setdefault(j, set())
                if p < 1 / len(tokens):
                    low[j].add(t)

        def shrink(tokens, t, target, low=low):
            count = {j: sum(1 for i in low[j] if i > t - history) for j in tokens}
            leaving = sorted((j for j in tokens if j <= t - num_recent), key=lambda j: (-count[j], j))
            return [j for j in tokens if j not in leaving[: len(tokens) - target]]

        tokens, start, t = [], 0, -1
        for size in chunks:
            for t in range(start, start + size):
                tokens.append(t)
                look(t, tokens)
            if len(tokens) > budget:
                tokens = shrink(tokens, t, budget + 1 - drop)
            start += size
        kept.append(set(tokens))
    return attend.out, kept


def fastgen(q, k, v, prompt, ids, recovery, special, punctuation, frequent, local):
    """FastGen: brute force over the five ways for the prompt, then token by token. Also returns the choices."""
    (attend, heads), kept, choices = attention(q, k, v), [], []
    num_frequent, num_local = int(frequent * prompt + 1e-6), int(local * prompt + 1e-6)
    kind = lambda j: 2 if ids[j] in special else 1 if ids[j] in punctuation else 0
    for head in range(heads):
        probs = np.zeros((prompt, prompt))
        for t in range(prompt):
            probs[t, : t + 1] = attend(t, head, list(range(t + 1)))
        column = probs.sum(0)
        order = sorted(range(prompt), key=lambda j: (-column[j], -j))
        is_special = np.array([kind(j) == 2 for j in range(prompt)])
        is_marked = np.array([kind(j) >= 1 for j in range(prompt)])
        is_frequent = np.isin(range(prompt), order[:num_frequent])
        near = np.array([[j > i - num_local for j in range(prompt)] for i in range(prompt)])
        ways = [is_special[None], is_marked[None], (is_marked | is_frequent)[None], (is_marked | is_frequent) | near]
        share = [(probs * np.broadcast_to(way, probs.shape)).sum() / prompt for way in ways]
        good = [i for i, s in enumerate(share) if s >= recovery and (i or special)]
        choice = good[0] if good else 4
        choices.append(choice)
        stays = (*ways[:3], (is_marked | is_frequent | near[-1])[None], np.ones((1, prompt), bool))[choice][0]
        tokens = [j for j in range(prompt) if stays[j]]
        score = {j: column[j] for j in tokens}
        for t in range(prompt, len(q)):
            tokens.append(t)
            score[t] = 0.0
            for j, p in zip(tokens, attend(t, head, list(tokens)), strict=True):
                score[j] += p
            top = sorted(tokens, key=lambda j: (-score[j], -j))[:num_frequent]
            ways = [
                lambda j: kind(j) == 2,
                lambda j: kind(j) >= 1,
                lambda j, top=top: kind(j) >= 1 or j in top,
                lambda j, top=top, t=t: kind(j) >= 1 or j in top or j > t - num_local,
                lambda j: True,
            ]
            tokens = [j for j in tokens if ways[choice](j)]
        kept.append(set(tokens))
    return attend.out, kept, choices
