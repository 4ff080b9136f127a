"""The device side of an engine: the caches in pages, where the rows are, and the programs that take them on.

There are few shapes, so few programs: one for a step of all rows, one for each size of pieces of prompts, one that
copies pages. Nothing else is compiled, whatever is submitted.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float32, Int32, Shaped

from kvattn._typing import Array
from kvattn.cache import groups_of, with_tables
from kvattn.cache.rows import with_rows
from kvattn.models import loop
from kvattn.models.decoder import Decoder
from kvattn.models.programs import ProgramsOf, Weights
from kvattn.models.sampling import Sampler
from kvattn.serving import contents
from kvattn.serving.contents import Caches
from kvattn.serving.counts import NO_BLOCK
from kvattn.serving.pieces import Pieces
from kvattn.serving.prefixes import Copies
from kvattn.serving.reads import Shared
from kvattn.serving.tables import Tables

AT_ONCE = 8
"""Pages that are read from the device, or put back, by one call."""


class Came(NamedTuple):
    """What a call brings, on its way to the host.

    Attributes:
        new: int32 [B], tokens; several of each row, [B, G], where some were guessed.
        logprob: float32, theirs.
        status: int32 [B], what the caches recorded (`kvattn.cache.status`).
    """

    new: Any
    logprob: Any
    status: Any


class Candidates(NamedTuple):
    """The k best continuations of every row.

    Attributes:
        tokens: int32 [B, k].
        logprobs: float32 [B, k]; NaN where the logits were no distribution.
        status: as in `Came`.
    """

    tokens: Any
    logprobs: Any
    status: Any


class Programs(NamedTuple):
    """The compiled programs of a model over pages. All but `fetch` take the caches over."""

    read: Callable[..., tuple[loop.Rows, Came, Caches]]
    step: Callable[..., tuple[loop.Rows, Came, Caches]]
    verify: Callable[..., tuple[loop.Rows, Came, Caches]]
    grow: Callable[..., tuple[Candidates, Caches]]
    copy: Callable[..., Caches]
    move: Callable[..., Caches]
    fetch: Callable[..., dict[str, Array]]
    restore: Callable[..., Caches]


def _compiled(model_of: Callable[[Weights], Decoder]) -> Programs:
    def brought_by(model: Decoder, rows: loop.Rows, cache: Caches) -> tuple[loop.Rows, Came]:
        rows = jax.tree.map(model.split.whole, rows)
        return rows, Came(rows.new, rows.logprob, model.split.whole(_status(cache)))

    @functools.partial(jax.jit, donate_argnames="cache")
    def read(weights, cache, rows, settings, tables, pieces):
        """Appends pieces of prompts; rows that end with one choose their first token."""
        model = model_of(weights)
        part = tuple(layer.select(pieces.take) for layer in cache)
        part = tuple(x.replace(status=jnp.where(pieces.fresh, 0, x.status)) for x in part)
        part = with_tables(part, tables, pieces.lengths)
        last = jnp.maximum(pieces.num_new - 1, 0)[:, None]
        logits, part = _called(model, pieces.tokens, part, pieces.num_new, last)
        cache = with_rows(cache, part, pieces.source)
        logits = model.split.whole(logits[:, 0])[jnp.maximum(pieces.source, 0)]
        rows = dataclasses.replace(rows, num_drawn=jnp.where(pieces.ends, pieces.drawn, rows.num_drawn))
        rows = loop.chosen(settings, logits, rows, pieces.ends, pieces.forced)
        return *brought_by(model, rows, cache), cache

    @functools.partial(jax.jit, donate_argnames="cache")
    def step(weights, cache, rows, settings, tables, held, goes, forced, shared):
        """Appends the last token of every row that `goes` and is running, and chooses its next."""
        model = model_of(weights)
        runs = rows.running & goes
        logits, cache = _appended(model, _held(cache, tables, held, shared), rows.new, runs)
        before = dataclasses.replace(rows, new=jnp.full_like(rows.new, loop.NOTHING))
        cache = tuple(layer.replace(shared=None) for layer in cache)  # the other programs know of none
        return *brought_by(model, loop.chosen(settings, logits, before, runs, forced), cache), cache

    @functools.partial(jax.jit, donate_argnames="cache")
    def verify(weights, cache, rows, settings, tables, held, goes, guesses, counts):
        """As `step`, with tokens [B, G] that may come next, so many [B] of them.

        Each token is chosen as a step would choose it; the first that was guessed wrong is the last. What was appended
        behind it is taken back.
        """
        model = model_of(weights)
        runs = rows.running & goes
        num_new = jnp.where(runs, counts + 1, 0)
        tokens = jnp.concatenate([jnp.maximum(rows.new, 0)[:, None], guesses], axis=1)
        logits, cache = _called(model, tokens, _held(cache, tables, held), num_new)
        logits, free = model.split.whole(logits), jnp.full_like(rows.new, loop.NOTHING)
        came, used, found = runs, jnp.zeros_like(num_new), []
        for i in range(tokens.shape[1]):
            rows = loop.chosen(settings, logits[:, i], rows, came, free)
            found.append((jnp.where(came, rows.new, loop.NOTHING), rows.logprob))
            used += came.astype(jnp.int32)
            if i < guesses.shape[1]:
                came &= rows.running & (i < counts) & (rows.new == guesses[:, i])
        cache = tuple(layer.trim(num_new - used) for layer in cache)
        new, logprob = (jnp.stack(x, axis=1) for x in zip(*found, strict=True))
        rows, brought = brought_by(model, rows, cache)
        return rows, brought._replace(new=model.split.whole(new), logprob=model.split.whole(logprob)), cache

    @functools.partial(jax.jit, donate_argnames="cache", static_argnames="count")
    def grow(weights, cache, tables, held, given, count):
        """Appends given tokens [B] (negative: none); the best continuations."""
        model = model_of(weights)
        logits, cache = _appended(model, _held(cache, tables, held), given, given >= 0)
        logits = model.split.whole(logits)
        top, tokens = jax.lax.top_k(logits, count)
        best = top[:, :1]
        total = jnp.log(jnp.sum(jnp.exp(logits - best), axis=-1, keepdims=True))
        logprobs = jnp.where(jnp.isfinite(best), top - best - total, jnp.nan)
        return Candidates(tokens, logprobs, model.split.whole(_status(cache))), cache

    return Programs(read=read, step=step, verify=verify, grow=grow, **_of_pages(model_of))


def _of_pages(model_of: Callable[[Weights], Decoder]) -> dict[str, Callable[..., Any]]:
    """The programs that compute nothing."""

    @functools.partial(jax.jit, donate_argnames="cache")
    def copy(cache, pairs):
        """Copies pages, int32 [2, M] of every group; negative: none."""
        found = list(cache)
        for group, (sources, targets) in zip(groups_of(cache), pairs, strict=True):
            for i in group.layers:
                found[i] = cache[i].copy_pages(sources, targets)
        return tuple(found)

    @functools.partial(jax.jit, donate_argnames="cache")
    def move(cache, source):
        """Rows take over what others remember, as `with_rows`; pages stay where they are."""
        return with_rows(cache, cache, source)

    @jax.jit
    def fetch(weights, cache, pages):
        """What pages [M] of every group hold: [M, L, ...], L the layers of the group."""
        return contents.taken(cache, pages, model_of(weights).split.mesh)

    @functools.partial(jax.jit, donate_argnames="cache")
    def restore(cache, pages, arrays):
        """Puts back what `fetch` gave; negative pages: nothing."""
        return contents.put_back(cache, pages, arrays)

    return {"copy": copy, "move": move, "fetch": fetch, "restore": restore}


PROGRAMS = ProgramsOf(_compiled)


def _appended(
    model: Decoder, cache: Caches, tokens: Int32[Array, " B"], runs: Bool[Array, " B"]
) -> tuple[Float32[Array, "B V"], Caches]:
    """Logits after one token of the rows that run."""
    first = jnp.zeros((tokens.shape[0], 1), jnp.int32)
    logits, cache = _called(model, jnp.maximum(tokens, 0)[:, None], cache, runs.astype(jnp.int32), first)
    return logits[:, 0], cache


def _called(
    model: Decoder,
    tokens: Int32[Array, "B T"],
    cache: Caches,
    num_new: Int32[Array, " B"],
    logits_at: Int32[Array, "B M"] | None = None,
) -> tuple[Float32[Array, "B M V"], Caches]:
    """The model over pages."""
    logits, after = model(tokens, cache, num_new, logits_at=logits_at)
    return logits, cast(Caches, after)


def _held(
    cache: Caches, tables: tuple[Int32[Array, "B W"], ...], held: Bool[Array, " B"], shared: Shared | None = None
) -> Caches:
    """The caches under the host's tables; rows that nobody has are empty."""
    return with_tables(cache, tables, jnp.where(held, cache[0].lengths, 0), shared=shared)


def _status(cache: Caches) -> Int32[Array, " B"]:
    return functools.reduce(jnp.bitwise_or, [layer.status for layer in cache])


class Device:
    """Caches, rows and settings on the device.

    Args:
        model: the decoder.
        cache: its caches in pages, which every call takes over.

    Attributes:
        seconds: spent in calls of compiled programs, and in waiting for what they bring.
    """

    def __init__(self, model: Decoder, cache: Caches):
        self.model = model
        self.seconds = 0.0
        self.weights, programs = PROGRAMS.of(model)
        self.programs = Programs(*(cast(Any, self._timed(program)) for program in programs))
        self.groups = groups_of(cache)
        self.num_rows = cache[0].batch_size
        self.widths = [group.max_pages for group in self.groups]
        self._place = model.split.place
        greedy = Sampler.create(model.config.vocab_size, temperature=0, top_k=None, top_p=None, seed=0)
        self._settings = loop.Settings.alike(self.num_rows, greedy, np.zeros((model.config.vocab_size,), bool), 0)
        self.restart(cache)

    wait: Callable[[Sequence[Any]], object] = staticmethod(lambda arrays: None)
    """What is called before the host waits for arrays: several processes wait for each other with a limit."""

    def restart(self, cache: Caches) -> None:
        """Begins anew, with other caches."""
        self.cache = cache
        self.rows = self._place(loop.Rows.ended(self.num_rows))
        self._placed_settings: loop.Settings | None = None
        self._free = self._place(np.full((self.num_rows,), loop.NOTHING, np.int32))

    def set_row(self, row: int, sampler: Sampler, stop: Any, limit: int) -> None:
        """How a row goes on from now on.

        Args:
            row: which.
            sampler: of one sequence.
            stop: tokens that end it, as bits.
            limit: most new tokens.
        """
        for name in (field.name for field in dataclasses.fields(Sampler)):
            getattr(self._settings.sampler, name)[row] = getattr(sampler, name)
        self._settings.stop[row], self._settings.limit[row] = stop, limit
        self._placed_settings = None

    @property
    def settings(self) -> loop.Settings:
        """Of all rows."""
        placed = self._placed_settings
        if placed is None:
            # A copy: the arrays go on to change here while a program reads them.
            placed = self._placed_settings = self._place(jax.tree.map(np.array, self._settings))
        return placed

    # What it does.

    def copy(self, copies: Sequence[Copies]) -> None:
        """Copies pages before somebody writes to them."""
        columns = [[pair for each in copies for pair in each[g]] for g in range(len(self.groups))]
        for start in range(0, max(map(len, columns), default=0), self.num_rows):
            pairs = np.full((len(columns), 2, self.num_rows), NO_BLOCK, np.int32)
            for group, column in enumerate(columns):
                some = column[start : start + self.num_rows]
                if some:
                    pairs[group, :, : len(some)] = np.transpose(some)
            self.cache = self.programs.copy(self.cache, tuple(pairs))

    def step(
        self,
        tables: Tables,
        held: Sequence[int],
        goes: Sequence[int],
        forced: dict[int, int],
        shared: Shared | None = None,
    ) -> Came:
        """A step of the rows that go.

        Args:
            tables: of all rows.
            held: rows that somebody has.
            goes: those that go, where they are still running.
            forced: the next tokens of some.
            shared: which rows read which pages together; another program than without.
        """
        given = self._free
        if forced:
            tokens = np.full((self.num_rows,), loop.NOTHING, np.int32)
            tokens[list(forced)] = list(forced.values())
            given = self._place(tokens)
        return self._taken_on(self.programs.step, tables, self._mask(held), self._mask(goes), given, shared)

    def on_host[T](self, arrays: T) -> T:
        """A tree of arrays on the host; waits for them."""
        self._timed(self.wait)(jax.tree.leaves(arrays))
        return self._timed(jax.tree.map)(np.asarray, arrays)

    def verify(
        self, tables: Tables, held: Sequence[int], goes: Sequence[int], guesses: dict[int, list[int]], most: int
    ) -> Came:
        """A step of the rows that go, with at most so many tokens guessed of each."""
        tokens, counts = np.zeros((self.num_rows, most), np.int32), np.zeros((self.num_rows,), np.int32)
        for row, guess in guesses.items():
            tokens[row, : len(guess)], counts[row] = guess, len(guess)
        return self._taken_on(self.programs.verify, tables, self._mask(held), self._mask(goes), tokens, counts)

    def read(self, tables: Tables, pieces: Pieces) -> Came:
        """Reads pieces of prompts."""
        return self._taken_on(self.programs.read, tables, pieces)

    def grow(self, tables: Tables, held: Sequence[int], given: dict[int, int], count: int) -> Candidates:
        """The best continuations after some tokens, on the host."""
        tokens = np.full((self.num_rows,), loop.NOTHING, np.int32)
        tokens[list(given)] = list(given.values())
        found, self.cache = self.programs.grow(self.weights, self.cache, tables, self._mask(held), tokens, count)
        return self.on_host(found)

    def move(self, source: dict[int, int]) -> None:
        """Rows take over the past of others."""
        rows = np.full((self.num_rows,), -1, np.int32)
        rows[list(source)] = list(source.values())
        self.cache = self.programs.move(self.cache, rows)

    def arrays(self) -> dict[str, tuple[str, tuple[int, ...], str, int]]:
        """What a page holds, by name: axes in words, shape, dtype and group."""
        return contents.specs(self.cache)

    def fetch(self, pages: Sequence[Sequence[int]]) -> list[dict[str, Shaped[Array, "pages L *rest"]]]:
        """What pages hold, on its way to the host: `AT_ONCE` pages at a time, one list of as many for every group."""
        found = []
        for start in range(0, len(pages[0]), AT_ONCE):
            some = [_filled(column[start : start + AT_ONCE], 0) for column in pages]
            found.append(self.programs.fetch(self.weights, self.cache, tuple(some)))
            jax.copy_to_host_async(found[-1])
        return found

    def restore(
        self, pages: Sequence[Sequence[int]], held: Sequence[Mapping[str, Shaped[np.ndarray, "L *rest"]]]
    ) -> None:
        """Puts back what pages held.

        Args:
            pages: of every group; negative where nothing is put back.
            held: of every page, what `fetch` gave; arrays of a group may be missing.
        """
        specs = self.arrays()
        for start in range(0, len(held), AT_ONCE):
            some = held[start : start + AT_ONCE]
            columns = [list(column[start : start + AT_ONCE]) for column in pages]
            arrays = {}
            for name, (_, shape, dtype, group) in specs.items():
                arrays[name] = np.zeros((AT_ONCE, *shape), jnp.dtype(dtype))
                for i, page in enumerate(some):
                    if name in page:
                        arrays[name][i] = page[name]
                    else:
                        columns[group][i] = NO_BLOCK
            where = tuple(_filled(column, NO_BLOCK) for column in columns)
            self.cache = self.programs.restore(self.cache, where, arrays)

    def _taken_on(self, program: Callable[..., tuple[loop.Rows, Came, Caches]], *given: Any) -> Came:
        """Runs a program that takes rows and caches on; what it brings is on its way to the host."""
        self.rows, came, self.cache = program(self.weights, self.cache, self.rows, self.settings, *given)
        jax.copy_to_host_async(tuple(came))
        return came

    def _timed[**P, T](self, call: Callable[P, T]) -> Callable[P, T]:
        """A call whose time is counted."""

        def timed(*args: P.args, **kwargs: P.kwargs) -> T:
            began = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - began

        return timed

    def _mask(self, rows: Sequence[int]) -> Bool[np.ndarray, " B"]:
        mask = np.zeros((self.num_rows,), bool)
        mask[list(rows)] = True
        return mask


def _filled(pages: Sequence[int], fill: int) -> Int32[np.ndarray, " M"]:
    """`AT_ONCE` pages."""
    column = np.full((AT_ONCE,), fill, np.int32)
    column[: len(pages)] = np.where(np.asarray(pages) < 0, fill, pages)
    return column
