"""The decoding loop: the rows of a batch on the device, and the two programs that take them on.

`kvattn.generate` is a batch whose rows are never replaced. All there is to know of a row lies in `Rows`, which the
programs return, and in `Settings`, which they are given: trees of arrays with one entry per row, to be gathered and
replaced row by row (`select`, `replaced`). One program serves whatever mixture of settings.
"""

import collections
import dataclasses
import functools
import typing
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float32, Int, Int32, UInt32

from kvattn._typing import Array
from kvattn.models import prompts as given
from kvattn.models.decoder import Caches, Decoder
from kvattn.models.programs import ProgramsOf, Weights
from kvattn.models.sampling import HostOrDevice, Sampler, choose, log_probability

AHEAD = 2
"""Steps handed to the device before the host looks at the tokens of one: it reads while the device works. What comes
out does not depend on it; when all rows have ended, so many steps were in vain."""

NOTHING, UNSOUND = -1, -2
"""In place of a token: there is none, since the row had ended before; its logits were no distribution."""

_WORD = 32
"""Tokens per word of a set of tokens."""


@typing.no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Settings:
    """How rows go on and when they end; they stay as they are while a row lives.

    Attributes:
        sampler: how tokens are chosen.
        stop: uint32 [B, ceil(V / 32)], the tokens that end a row, as bits: token t is bit t % 32 of word t // 32.
        limit: int32 [B], how many new tokens a row gets at most: it ends with the last of them.
    """

    sampler: Sampler
    stop: HostOrDevice
    limit: HostOrDevice

    @classmethod
    def alike(cls, batch_size: int, sampler: Sampler, stop: Bool[np.ndarray, " V"], limit: int) -> "Settings":
        """Of B rows that differ in nothing but the stream they draw from."""
        words = np.tile(as_bits(stop), (batch_size, 1))
        return cls(sampler.repeated(batch_size), words, np.full((batch_size,), limit, np.int32))


@typing.no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """Where the rows of a batch are.

    Attributes:
        new: int32 [B], the token that came last, which the next step appends; `NOTHING` or `UNSOUND`.
        logprob: float32 [B], its log-probability.
        running: bool [B], rows that go on.
        num_drawn: int32 [B], how many tokens came.
    """

    new: HostOrDevice
    logprob: HostOrDevice
    running: HostOrDevice
    num_drawn: HostOrDevice

    @classmethod
    def ended(cls, batch_size: int) -> "Rows":
        """B rows that wait for a prompt."""
        zeros = np.zeros((batch_size,), np.int32)
        return cls(zeros + np.int32(NOTHING), zeros.astype(np.float32), zeros.astype(bool), zeros)


def select[T](tree: T, rows: Int[HostOrDevice, " M"]) -> T:
    """Some rows of `Rows` or `Settings`, in this order: left out, moved, or repeated (forks and beams)."""
    return jax.tree.map(lambda x: x[rows], tree)


def replaced[T](tree: T, where: Bool[HostOrDevice, " B"], by: T) -> T:
    """`Rows` or `Settings` with some rows taken from another of the same size."""
    pick = lambda x, y: jnp.where(jnp.reshape(where, where.shape + (1,) * (x.ndim - 1)), y, x)
    return jax.tree.map(pick, tree, by)


def as_bits(tokens: Bool[np.ndarray, " V"]) -> UInt32[np.ndarray, " W"]:
    """A set of tokens as bits, as in `Settings.stop`."""
    words = np.pad(tokens, (0, -len(tokens) % _WORD)).reshape(-1, _WORD)
    return np.sum(words << np.arange(_WORD, dtype=np.uint32), axis=1, dtype=np.uint32)


def _holds(sets: UInt32[Array, "B W"], token: Int32[Array, " B"]) -> Bool[Array, " B"]:
    """Whether each row's token is in the row's set."""
    words = jnp.take_along_axis(sets, token[:, None] // _WORD, axis=1)[:, 0]
    return ((words >> (token % _WORD).astype(jnp.uint32)) & 1) == 1


def chosen(
    settings: Settings,
    logits: Float32[Array, "B V"],
    rows: Rows,
    came: Bool[Array, " B"],
    forced: Int32[Array, " B"],
) -> Rows:
    """Where rows are once those that `came` so far have their next token, chosen by its logits or `forced` (>= 0)."""
    token, sound = choose(settings.sampler, logits, jnp.asarray(rows.num_drawn))
    token = jnp.where(forced >= 0, forced, token)
    num_drawn = rows.num_drawn + came.astype(jnp.int32)
    goes_on = sound & ~_holds(jnp.asarray(settings.stop), token) & (num_drawn < settings.limit)
    return Rows(
        jnp.where(came, jnp.where(sound, token, UNSOUND), rows.new),
        jnp.where(came, log_probability(logits, token), rows.logprob),
        jnp.where(came, goes_on, rows.running),
        num_drawn,
    )


class Chunk(NamedTuple):
    """A part of the prompts of a batch.

    Attributes:
        tokens: of every row.
        num_new: how many of them are real, the first ones; 0 where a row has none.
        ends: rows whose prompt ends with it.
    """

    tokens: Int32[HostOrDevice, "B T"]
    num_new: Int32[HostOrDevice, " B"]
    ends: Bool[HostOrDevice, " B"]


class Programs(NamedTuple):
    """The compiled programs of a model, to which its weights go as a flat list. Both take the caches over.

    Attributes:
        append: takes a chunk of the prompts.
        step: takes the tokens that were chosen last.
    """

    append: Callable[..., tuple[Rows, Caches]]
    step: Callable[..., tuple[Rows, Caches]]


def _compiled(model_of: Callable[[Weights], Decoder]) -> Programs:
    """Programs that compile once per shapes, whatever the settings."""

    def advance(weights, chunk, cache, rows, settings, forced):
        """Appends a chunk [B, T] and chooses the next token of rows that have any in it and end; others stay."""
        model, (tokens, num_new, ends) = model_of(weights), chunk
        last = jnp.maximum(num_new - 1, 0)
        logits, cache = model(tokens, cache, num_new, logits_at=last[:, None])
        rows = chosen(settings, logits[:, 0], rows, ends & (num_new > 0), forced)
        return jax.tree.map(model.split.whole, rows), cache

    @functools.partial(jax.jit, donate_argnames="cache")
    def append(weights, chunk, cache, rows, settings, forced):
        """Appends a chunk [B, T] of prompts; rows whose prompt ends with it get their first token."""
        return advance(weights, chunk, cache, rows, settings, forced)

    @functools.partial(jax.jit, donate_argnames="cache")
    def step(weights, cache, rows, settings, forced):
        """Appends the tokens [B] that came last, of the rows that are running."""
        chunk = Chunk(jnp.maximum(rows.new, 0)[:, None], rows.running.astype(jnp.int32), rows.running)
        rows = dataclasses.replace(rows, new=jnp.full_like(rows.new, NOTHING))
        return advance(weights, chunk, cache, rows, settings, forced)

    return Programs(append, step)


PROGRAMS = ProgramsOf(_compiled)


class Decoding:
    """A batch on the device: weights, caches, settings and where its rows are.

    Args:
        model: the decoder.
        cache: its caches, which every call takes over.
        settings: of every row.
    """

    def __init__(self, model: Decoder, cache: Caches, settings: Settings):
        self.weights, self.programs = PROGRAMS.of(model)
        self.model = model
        self.cache = cache
        batch = cache[0].batch_size
        # Placed where the steps leave them: the next call is the same program.
        self.place = model.split.place
        self.settings, self.rows = self.place(settings), self.place(Rows.ended(batch))
        self._free = self.place(np.full((batch,), NOTHING, np.int32))

    def append(self, chunk: Chunk, forced: Int32[np.ndarray, " B"] | None = None) -> None:
        """Appends a chunk of prompts. Rows whose prompt ends with it get their next token, and run.

        Args:
            chunk: of every row.
            forced: the next tokens, for rows where they are not to be chosen; negative: chosen.
        """
        self.rows, self.cache = self.programs.append(
            self.weights, chunk, self.cache, self.rows, self.settings, self._forced(forced)
        )

    def step(self, forced: Int32[np.ndarray, " B"] | None = None) -> None:
        """Appends the last token of every running row and chooses the next, but for those that are `forced`."""
        self.rows, self.cache = self.programs.step(
            self.weights, self.cache, self.rows, self.settings, self._forced(forced)
        )

    def append_prompts(
        self,
        prompts: Sequence[Sequence[int] | Int[np.ndarray, " _"]],
        prefill_chunk: int | None,
        forced: Int32[np.ndarray, " B"] | None = None,
    ) -> None:
        """Appends a prompt to every row, so many tokens at a time, and chooses the first new tokens."""
        lengths = np.array([len(prompt) for prompt in prompts], np.int32)
        chunk = given.chunk_size(self.model, self.cache, int(lengths.max()), prefill_chunk)
        num_chunks = -(-int(lengths.max()) // chunk)
        tokens = given.padded(prompts, num_chunks * chunk)
        for start in range(0, num_chunks * chunk, chunk):
            num_new = np.clip(lengths - start, 0, chunk).astype(np.int32)
            self.append(Chunk(tokens[:, start : start + chunk], num_new, lengths <= start + chunk), forced)

    def steps(self, count: int) -> Iterator[Rows]:
        """What each of `count` steps brings, on the host; the first of them, the prompts brought."""
        in_flight: collections.deque[Rows] = collections.deque()
        for number in range(count):
            if number > 0:
                self.step()
            jax.copy_to_host_async((self.rows.new, self.rows.logprob))
            in_flight.append(self.rows)
            if len(in_flight) > AHEAD:
                yield _on_host(in_flight.popleft())
        while in_flight:
            yield _on_host(in_flight.popleft())

    def append_last(self, tokens: Int32[np.ndarray, " B"]) -> None:
        """Appends the last token of every row, which no step has: one more step, whose choice is of no use."""
        rows = Rows.ended(len(tokens))
        self.rows = self.place(dataclasses.replace(rows, new=tokens, running=np.ones(len(tokens), bool)))
        self.step()

    def check(self) -> None:
        """Raises what the steps could only record."""
        for layer in self.cache:
            layer.check()

    def _forced(self, tokens: Int32[np.ndarray, " B"] | None) -> Int32[Array, " B"]:
        return self._free if tokens is None else self.place(tokens)


def _on_host(rows: Rows) -> Rows:
    """Tokens and log-probabilities of a step as NumPy arrays; the rest of it stays on the device."""
    return dataclasses.replace(rows, new=np.asarray(rows.new), logprob=np.asarray(rows.logprob))
