"""Caches with one fault each, and the check that must find it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from plain_cache import Cuts, PlainCache, Ring

from kvattn.testing import Claims

FAULTS = {}
"""By class: the one check that fails."""


def found_by(name):
    def note(cls):
        FAULTS[cls] = name
        return jax.tree_util.register_dataclass(cls) if dataclasses.is_dataclass(cls) else cls

    return note


@found_by("runs")
class OutputsInFloat64(PlainCache):
    def append(self, *args, **pads):
        return super().append(*args, **pads).astype(np.float64)


@found_by("runs")
class NoFirstStep(PlainCache):
    def room(self, lengths):
        raise IndexError("nothing to attend to")


@found_by("tokens before")
class NotItself(PlainCache):
    def visible(self, query, key):
        return super().visible(query, key) and (key < query or query == 0)


@found_by("tokens before")
class NotTheFirst(PlainCache):
    def visible(self, query, key):
        return super().visible(query, key) and (key > 0 or query == 0)


class Masked(PlainCache):
    """A window over a slot for every token."""

    claims = Claims(window=5)


class Longer(PlainCache):
    """A window that is wrong by so many tokens."""

    claims = Claims(window=5)
    by = 1

    def visible(self, query, key):
        return query - (self.claims.window + self.by) < key <= query and key >= 0


@found_by("window")
class OneTooMany(Longer):
    by = 1


@found_by("window")
class OneTooFew(Longer):
    by = -1


@found_by("window")
class NoWindow(Longer):
    by = 1000


@found_by("window")
class RingTooSmall(Ring):
    """One slot fewer would do: the newest token needs none until it has been seen."""

    def slot(self, position):
        c = self.claims
        return position if position < c.sinks else c.sinks + (position - c.sinks) % (c.window - 2)


@found_by("sinks")
class SinksLeave(Ring):
    def visible(self, query, key):
        return super().visible(query, key) and (key > query - self.claims.window)


@found_by("sinks")
class OneSinkTooFew(Ring):
    def visible(self, query, key):
        return super().visible(query, key) and (key != 1 or key > query - self.claims.window)


@found_by("chunk cuts")
class CutsOneLate(Cuts):
    def visible(self, query, key):
        size = self.claims.chunk_size
        return 0 <= key <= query and max(key - 1, 0) // size == max(query - 1, 0) // size


@found_by("chunk cuts")
class SlidesInsteadOfCuts(Cuts):
    def visible(self, query, key):
        return query - self.claims.chunk_size < key <= query and key >= 0


@found_by("grouping")
class Interleaved(PlainCache):
    def head(self, n, group):
        return n % 2


@found_by("grouping")
class KeysOfOtherHeads(PlainCache):
    def key_head(self, n, group):
        return 1 - n // group


@found_by("positions")
class PlaceInTheRing(Ring):
    def place(self, position):
        return self.slot(position)


@found_by("positions")
class NeverBeyondTheWindow(Ring):
    def place(self, position):
        return min(position, self.claims.window + self.claims.sinks - 1)


@found_by("positions")
class NotTurned(Ring):
    def place(self, position):
        return 0


@found_by("token count")
class CountsWhatIsKept(Ring):
    def append(self, *args, **pads):
        out = super().append(*args, **pads)
        self.told = np.minimum(self.lengths, self.num_slots())
        return out


@found_by("values")
class ScaledTwice(PlainCache):
    def scale(self, head_dim):
        return 1 / head_dim


@found_by("values")
class SoftmaxInHalf(PlainCache):
    def softmax(self, scores):
        return super().softmax(scores.astype(np.float16)).astype(np.float32)


@found_by("prompt")
class PromptSeesAhead(PlainCache):
    def append(self, query, *args, **pads):
        self.ahead = query.shape[1] - 1 if self.lengths.max() == 0 else 0
        return super().append(query, *args, **pads)

    def visible(self, query, key):
        return (
            super().visible(query - (query >= self.ahead) + self.ahead, key)
            if self.ahead
            else (super().visible(query, key))
        )


@found_by("chunks")
class OverwritesBeforeItReads(Ring):
    """What a chunk will overwrite is gone before its first queries read it."""

    def append(self, query, *args, **pads):
        self.coming = query.shape[1]
        return super().append(query, *args, **pads)

    def context(self, b):
        positions, keys, values = super().context(b)
        gone = np.zeros(len(positions), bool)
        if self.coming > 1 and self.lengths[b]:
            first = int(self.lengths[b])
            gone[[self.slot(p) for p in range(first, first + self.coming)]] = True
        return np.where(gone, -1, positions), keys, values


@found_by("chunks")
class ChunksStartAnew(PlainCache):
    """A chunk attends to itself only."""

    def append(self, query, *args, **pads):
        self.alone = query.shape[1] > 1
        return super().append(query, *args, **pads)

    def context(self, b):
        positions, keys, values = super().context(b)
        return (np.full_like(positions, -1) if self.alone else positions), keys, values


@found_by("chunks")
class OneChunkLongOnly(PlainCache):
    """Takes several tokens while it is empty only, and says so."""

    def room(self, lengths):
        super().room(lengths)
        if (self.lengths > 0).any() and (lengths - self.lengths > 1).any():
            raise NotImplementedError("a prompt after a prompt")


@found_by("padding on the right")
class RightPadsAreTokens(PlainCache):
    def real(self, length, counts, padding):
        return super().real(length, counts, padding) | (padding == "right")

    def advance(self, counts):
        return self.positions.max(1) + 1 - self.lengths


@found_by("padding on the left")
class LeftPadsAreRightPads(PlainCache):
    def real(self, length, counts, padding):
        return super().real(length, counts, "right")


@found_by("ragged rows")
class RowsAdvanceTogether(PlainCache):
    claims = Claims(padding=("right",), ragged=True, rope_theta=10000.0)

    def advance(self, counts):
        return np.where(self.lengths > 0, counts.max(), counts)


@found_by("rows without tokens")
class MeanOfNothing(PlainCache):
    def nothing(self, size):
        return np.full(size, np.nan)


@found_by("neighbours")
class OneScaleForAll(PlainCache):
    """The largest number of the batch takes part, as it does in a quantiser with one scale."""

    def append(self, query, key, value, **pads):
        size = np.abs(np.nan_to_num(value)).max()
        return super().append(query, key, (value * size) / size, **pads)


@found_by("neighbours")
class NaNOfNeighbours(PlainCache):
    claims = Claims()

    def append(self, query, key, value, **pads):
        return super().append(query, key, value, **pads) + np.float32(0) * value.sum()


@found_by("NaN in unused memory")
class ZeroTimesUnused(PlainCache):
    def mix(self, weights, values, seen):
        used = seen | (np.arange(len(seen)) < self.keys.shape[1])
        return weights[used] @ values[used]


@found_by("NaN in tokens that left")
class ZeroTimesUnseen(Masked):
    def append(self, *args, **pads):
        self.used = int(self.lengths.max())
        return super().append(*args, **pads)

    def mix(self, weights, values, seen):
        slots = self.keys.shape[1]
        written = np.arange(len(values)) < self.used
        written[slots:] = seen[slots:]
        return weights[written] @ values[written]


@found_by("NaN in pads")
class ZeroTimesPads(PlainCache):
    def mix(self, weights, values, seen):
        slots = self.keys.shape[1]
        return weights[seen] @ values[seen] + weights[slots:] @ values[slots:] * 0


@found_by("capacity")
class OneSlotTooFew(PlainCache):
    def room(self, lengths):
        super().room(lengths + 1)


class Silent(PlainCache):
    def room(self, lengths):
        pass


@found_by("overflow")
class WritesOverTheLast(Silent):
    def slot(self, position):
        return min(position, self.capacity - 1)


@found_by("overflow")
class WritesOverTheFirst(Silent):
    def slot(self, position):
        return position % self.capacity


@found_by("overflow")
class DropsSilently(Silent):
    def write(self, b, position, key, value):
        if position < self.capacity:
            super().write(b, position, key, value)


@found_by("overflow")
class WritesAPart(PlainCache):
    """Reports what does not fit, but writes what does."""

    claims = Claims(overflow="reports")

    def room(self, lengths):
        self.full = lengths > self.capacity

    def write(self, b, position, key, value):
        if position < self.capacity:
            super().write(b, position, key, value)

    def advance(self, counts):
        return np.minimum(counts, self.capacity - self.lengths)


@found_by("budget")
class OneOverBudget(PlainCache):
    claims = Claims(budget=5, overflow="never")

    def visible(self, query, key):
        return 0 <= key <= query and (key > query - 5 or key == 0)


# Compiled ------------------------------------------------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Compiled:
    """A cache of JAX arrays [B, C, K, H], right as it stands."""

    keys: jax.Array
    values: jax.Array
    length: jax.Array
    count: int = dataclasses.field(default=0, metadata={"static": True})

    claims = Claims(jit=True, overflow="reports", prompts=False, chunks=False, capacity=12)

    @classmethod
    def make(cls, batch_size, capacity, num_kv_heads, head_dim, dtype):
        shape = batch_size, capacity, num_kv_heads, head_dim
        return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.zeros((), jnp.int32))

    def written(self, x, new):
        return jax.lax.dynamic_update_slice_in_dim(x, new, self.length, 1)

    def after(self, keys, values):
        return dataclasses.replace(self, keys=keys, values=values, length=self.length + 1)

    def append(self, query, key, value):
        after = self.after(self.written(self.keys, key), self.written(self.values, value))
        group = query.shape[2] // key.shape[2]
        keys, values = (jnp.repeat(x, group, axis=2) for x in (after.keys, after.values))
        seen = jnp.arange(keys.shape[1]) <= self.length
        scores = jnp.einsum("btnh,bsnh->bnts", query, keys) / jnp.sqrt(query.shape[-1]).astype(query.dtype)
        weights = jax.nn.softmax(jnp.where(seen[None, None, None], scores, -jnp.inf), axis=-1)
        return jnp.einsum("bnts,bsnh->btnh", weights, jnp.where(seen[None, :, None, None], values, 0)), after


@found_by("in place")
class Shifts(Compiled):
    """The newest is always the last: all others move."""

    def written(self, x, new):
        return jnp.concatenate([x[:, 1:], new], axis=1)

    def append(self, query, key, value):
        after = self.after(self.written(self.keys, key), self.written(self.values, value))
        size = self.keys.shape[1]
        group = query.shape[2] // key.shape[2]
        keys, values = (jnp.repeat(x, group, axis=2) for x in (after.keys, after.values))
        seen = jnp.arange(size) >= size - 1 - self.length
        scores = jnp.einsum("btnh,bsnh->bnts", query, keys) / jnp.sqrt(query.shape[-1]).astype(query.dtype)
        weights = jax.nn.softmax(jnp.where(seen[None, None, None], scores, -jnp.inf), axis=-1)
        return jnp.einsum("bnts,bsnh->btnh", weights, values), after


@found_by("one program")
class CountsInPython(Compiled):
    """The length is part of the program."""

    def after(self, keys, values):
        return dataclasses.replace(super().after(keys, values), count=self.count + 1)
