"""A decoding cache in plain NumPy, made of small parts: right as it stands, and each part can be made wrong.

Slots, positions and masks, as real caches have them. `kvattn.testing` is shown to find what is wrong with subclasses.
"""

import numpy as np

from kvattn.testing import Claims


class PlainCache:
    """Keys and values [B, S, K, H] in slots, with the position that each holds, -1 where it is empty.

    `ring`: as many slots as are seen, used again. Otherwise one for each token.
    """

    claims = Claims(padding=("right", "left"), ragged=True, empty_rows=True)
    ring = False

    def __init__(self, batch_size, capacity, num_kv_heads, head_dim, dtype):
        self.capacity = capacity
        slots = self.num_slots()
        self.keys, self.values = np.zeros((2, batch_size, slots, num_kv_heads, head_dim), dtype)
        self.positions = np.full((batch_size, slots), -1)
        self.lengths = np.zeros(batch_size, int)

    # The parts -------------------------------------------------------------------------------------------------------

    def num_slots(self):
        c = self.claims
        return c.window + c.sinks if self.ring else self.capacity if c.overflow != "never" else 99

    def slot(self, position):
        if not self.ring or position < self.claims.sinks:
            return position
        return self.claims.sinks + (position - self.claims.sinks) % self.claims.window

    def visible(self, query, key):
        """Whether a query sees a key, by their positions."""
        c = self.claims
        seen = c.window is None or key > query - c.window or key < c.sinks
        if c.chunk_size is not None:
            seen = seen and key // c.chunk_size == query // c.chunk_size
        return 0 <= key <= query and seen

    def head(self, n, group):
        return n // group

    def key_head(self, n, group):
        return self.head(n, group)

    def scale(self, head_dim):
        return 1 / np.sqrt(head_dim)

    def place(self, position):
        """Where RoPE turns a token to."""
        return position

    def softmax(self, scores):
        weights = np.exp(scores - scores.max())
        return weights / weights.sum()

    def mix(self, weights, values, seen):
        return weights[seen] @ values[seen]

    def nothing(self, size):
        return np.zeros(size)

    def room(self, lengths):
        if (lengths > self.capacity).any() and self.claims.overflow != "never":
            raise ValueError("full")

    def advance(self, counts):
        return counts

    def real(self, length, counts, padding):
        t = np.arange(length)[None]
        return t < counts[:, None] if padding == "right" else t >= length - counts[:, None]

    def context(self, b):
        """What a chunk attends to besides itself: positions, keys, values."""
        return self.positions[b], self.keys[b], self.values[b]

    # The step --------------------------------------------------------------------------------------------------------

    def turned(self, x, position):
        theta = self.claims.rope_theta
        if theta is None:
            return x
        half = x.shape[-1] // 2
        phase = (self.place(position) * theta ** (-np.arange(half) / half)).astype(np.float32)
        a, b = x[..., :half], x[..., half:]
        return np.concatenate([a * np.cos(phase) - b * np.sin(phase), b * np.cos(phase) + a * np.sin(phase)], -1)

    def append(self, query, key, value, num_new=None, padding="right"):
        rows, length, heads, size = query.shape
        counts = np.full(rows, length) if num_new is None else np.asarray(num_new)
        self.room(self.lengths + counts)
        out = np.zeros(query.shape, np.float32)
        real = self.real(length, counts, padding)
        for b in range(rows):
            new = self.lengths[b] + np.cumsum(real[b]) - 1
            keys = np.stack([self.turned(k, p) for k, p in zip(key[b], new, strict=True)])
            places = np.where(real[b], new, -1)
            old = self.context(b)
            positions = np.concatenate([old[0], places])
            every = np.concatenate([old[1], keys]), np.concatenate([old[2], value[b]])
            for t in range(length):
                if not real[b, t]:
                    out[b, t] = self.nothing(size)
                    continue
                p = int(new[t])
                q = self.turned(query[b, t], p)
                seen = np.array([self.visible(p, int(j)) and j >= 0 for j in positions])
                for n in range(heads):
                    group = heads // key.shape[2]
                    scores = np.full(len(seen), -np.inf, np.float32)
                    scores[seen] = every[0][seen, self.key_head(n, group)] @ q[n] * self.scale(size)
                    out[b, t, n] = self.mix(self.softmax(scores), every[1][:, self.head(n, group)], seen)
            for t in np.nonzero(real[b])[0]:
                self.write(b, int(new[t]), keys[t], value[b, t])
        self.lengths = self.lengths + self.advance(counts)
        return out

    def write(self, b, position, key, value):
        slot = self.slot(position)
        self.keys[b, slot], self.values[b, slot], self.positions[b, slot] = key, value, position


class Ring(PlainCache):
    """A ring of a window, with sinks before it, and RoPE by true positions."""

    claims = Claims(
        window=5, sinks=2, rope_theta=10000.0, overflow="never", padding=("right", "left"), ragged=True, empty_rows=True
    )
    ring = True


class Cuts(PlainCache):
    """Chunks of positions."""

    claims = Claims(chunk_size=5, overflow="never")


def step(cache, query, key, value, **pads):
    """The step of all of them."""
    return cache.append(query, key, value, **pads), cache


def fill(cache, number):
    """Their unused memory."""
    cache.keys[:], cache.values[:] = number, number
    return cache


def lengths(cache):
    """How many tokens each row has seen."""
    return cache.lengths
