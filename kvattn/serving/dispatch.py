"""Hands the work of a tick to the device, as the arrays that its programs take."""

from collections.abc import Sequence
from typing import NamedTuple

import jax

from kvattn.serving.device import Came, Device
from kvattn.serving.jobs import Job, Tick
from kvattn.serving.pieces import pieces_of
from kvattn.serving.reads import SharedReads
from kvattn.serving.scheduler import Scheduler
from kvattn.serving.tables import RowTables, Tables, nobodys, padded
from kvattn.serving.texts import Text


class Read(NamedTuple):
    """Tokens on their way: of which job and text each is, the how many-th, and in which row."""

    came: Came
    of: list[tuple[Job, Text, int, int]]


class Dispatcher:
    """Calls the programs of a device for the texts of a scheduler.

    Args:
        device: what computes.
        scheduler: whose pool has the pages of all texts.
        num_rows: rows of the batch.
        shapes: rows and tokens of the pieces of prompts that have programs (`kvattn.serving.sizes`).
        shared: what rows read together.
        most_guessed: tokens that a step verifies beside its own; 0: none.
        rereads: whether a text that is read anew is as if it had come token by token; else its tokens are forced again.
    """

    def __init__(
        self,
        device: Device,
        scheduler: Scheduler,
        *,
        num_rows: int,
        shapes: Sequence[tuple[int, int]],
        shared: SharedReads,
        most_guessed: int,
        rereads: bool,
    ):
        self._device, self._scheduler = device, scheduler
        self._num_rows, self._shapes = num_rows, shapes
        self._shared, self._most_guessed, self._rereads = shared, most_guessed, rereads
        self._tables = RowTables(scheduler.pool, num_rows, device.widths)

    def held(self) -> tuple[list[int], Tables]:
        """The rows that texts have, and the tables of all rows."""
        texts = [s for job in self._scheduler.running for s in (job.sequences if job.is_beam else job.sequences[:1])]
        return [text.row for text in texts], self._tables.of(texts)

    def step(self, steps: list[tuple[Job, Text]]) -> Read:
        """Takes texts on by a token, or by what is guessed of them."""
        rows, tables = self.held()
        goes = [text.row for _, text in steps]
        guesses = {text.row: text.guess for _, text in steps if text.guess} if self._most_guessed else {}
        if guesses:
            self._shared.forget()
            came = self._device.verify(tables, rows, goes, guesses, self._most_guessed)
        else:
            again = () if self._rereads else steps
            forced = {text.row: text.new[text.num_drawn - 1] for _, text in again if text.num_drawn - 1 < len(text.new)}
            came = self._device.step(tables, rows, goes, forced, self._shared.of(steps, tables))
        return Read(came, [(job, text, text.num_drawn - 1, text.row) for job, text in steps])

    def read(self, tick: Tick) -> Read:
        """Reads the pieces of prompts of a tick."""
        tables = self._scheduler.pool.tables([piece.prefill.text for piece in tick.pieces], self._device.widths)
        longest = max(piece.stop - piece.start for piece in tick.pieces)
        most, width = next(shape for shape in self._shapes if shape[1] >= longest)
        shape = (1 if len(tick.pieces) == 1 else most), width
        came = self._device.read(padded(tables, shape[0]), pieces_of(tick.pieces, shape, self._num_rows))
        jobs = {text: job for job in self._scheduler.running for text in job.sequences}
        of = []
        for piece in tick.pieces:
            if piece.is_last and not piece.prefill.job.is_beam:
                for text in (piece.prefill.text, *piece.prefill.followers):
                    if text in jobs:
                        of.append((jobs[text], text, text.num_drawn - 1, text.row))
        return Read(came, of)

    def move_home(self, moves: tuple[list[tuple[int, int]], ...]) -> None:
        """Copies pages that come home to their host (`HostedPool.repay`), those of each group of layers."""
        if any(moves):
            self._shared.forget()
            self._device.copy([moves])

    def warm_up(self, beam_widths: Sequence[int]) -> None:
        """Calls every program once, with nothing to do, and waits for it."""
        device, widths = self._device, self._device.widths
        for most, width in self._shapes:
            for rows in sorted({1, most}):
                device.read(nobodys(rows, widths), pieces_of([], (rows, width), self._num_rows))
        tables = nobodys(self._num_rows, widths)
        device.step(tables, [], [], {})
        if any(shared := self._shared.nothing()):
            device.step(tables, [], [], {}, shared)
        if self._most_guessed:
            device.verify(tables, [], [], {}, self._most_guessed)
        for width in beam_widths:
            device.grow(tables, [], {}, width)
        device.copy([tuple([(0, 0)] for _ in device.groups)])
        device.move({})
        jax.block_until_ready(device.cache)
