"""Who is let in, whose prompt is read, who grows and who has to leave: from one tick to the next, without JAX.

Continuous batching (Orca, OSDI '22) with prompts read in chunks (Sarathi, arXiv:2403.02310), in first-come order or by
the longest prefix that is there (RadixAttention, arXiv:2312.07104). What is decided depends on what was submitted and
on the tokens that came, never on time: hosts that are told the same decide alike.
"""

import bisect
from collections.abc import Sequence

import numpy as np

from kvattn.errors import BlockStateError, ConfigError, OutOfBlocksError
from kvattn.serving.jobs import Admission, Job, Piece, Prefill, Tick
from kvattn.serving.prefixes import Copies, PrefixPool, Tokens
from kvattn.serving.texts import NO_ROW, Text

SCHEDULES = "longest-prefix", "fcfs"

PATIENCE = 64
"""How often others are let in before a job that came earlier; then it is its turn."""

_LOOKED_AT = 128
"""Waiting jobs whose prefixes are looked up."""


class Scheduler:
    """Jobs that wait, jobs that run, and the rows and pages that they have.

    Args:
        pool: of pages.
        num_rows: of the batch.
        schedule: "longest-prefix" or "fcfs".
        chunk: a prompt is read up to the next multiple of so many tokens at a time.
        shapes: how many tokens of how many prompts can be read at once: (rows, tokens), by tokens.
        rereads: whether a preempted sequence may be read like a prompt, new tokens and all. If not, what a policy keeps
            depends on how tokens came: they are appended again one by one.
        guesses: whether steps take `Text.guess` along.

    Attributes:
        waiting: jobs, in the order in which they came.
        running: jobs that have rows, those that go before others first.
        preemptions: how often a job had to leave.
    """

    def __init__(
        self,
        pool: PrefixPool,
        num_rows: int,
        *,
        schedule: str = "longest-prefix",
        chunk: int = 256,
        shapes: Sequence[tuple[int, int]] = ((1, 256),),
        rereads: bool = True,
        guesses: bool = False,
    ):
        if schedule not in SCHEDULES:
            raise ConfigError(f"schedule must be one of {', '.join(map(repr, SCHEDULES))}, got {schedule!r}.")
        self.pool = pool
        self.num_rows = num_rows
        self.waiting: list[Job] = []
        self.running: list[Job] = []
        self.preemptions = 0
        self._schedule = schedule
        self._chunk = chunk
        self._shapes = sorted(shapes, key=lambda shape: (shape[1], shape[0]))
        self._rereads = rereads
        self._guesses = guesses
        self._free_rows = list(reversed(range(num_rows)))
        self._known: dict[Job, tuple[int, int]] = {}

    # What happens to jobs.

    def submit(self, job: Job) -> None:
        """Lets a job wait; one that was preempted where it was before."""
        bisect.insort(self.waiting, job, key=lambda each: (each.number, each.sequences[0].index))

    def next(self) -> Tick:
        """Decides what comes next. What it says has to be done."""
        tick = Tick()
        self._grow(tick)
        if not tick.is_short:
            self._admit(tick)
        self._read(tick)
        return tick

    def finish(self, job: Job, sequence: Text, *, keep: bool = True) -> None:
        """Ends a sequence: its row and its pages come back, and what others may find stays.

        Args:
            job: whose.
            sequence: which.
            keep: whether its pages hold what they should.
        """
        self._leave(job, sequence, keep, is_over=True)
        job.sequences.remove(sequence)
        if not job.sequences:
            self._remove(job)

    def withdraw(self, job: Job, *, keep: bool = True) -> None:
        """Ends a job, wherever it is."""
        if job in self.waiting:
            self.waiting.remove(job)
            self._forget(job)
            return
        for sequence in list(job.sequences):
            self._leave(job, sequence, keep)
        self._remove(job)

    def fork(self, job: Job, parent: Text, child: Text) -> Copies:
        """A second beam with the same past, in a row of its job that nobody has; others leave if it needs their pages.

        Returns:
            The pages to copy first.
        """
        while (copies := self.pool.fork(parent, child)) is None:
            others = [each for each in self.running if each is not job]
            if not others:
                raise OutOfBlocksError(f"{job.width} beams of {len(job.prompt) + job.limit} tokens do not fit.")
            self._preempt(others[-1])
        taken = {sequence.row for sequence in job.sequences}
        child.row = next(row for row in job.rows if row not in taken)
        job.sequences.append(child)
        return copies

    def clear(self) -> None:
        """Ends everything, and forgets all prefixes."""
        for job in [*self.running, *self.waiting]:
            self.withdraw(job, keep=False)
        self.pool.forget_prefixes()

    def check(self) -> None:
        """Counts everything anew; see `kvattn.serving.BlockPool.check`."""
        self.pool.check()
        rows = sorted(self._free_rows + [row for job in self.running for row in job.rows])
        if rows != list(range(self.num_rows)):
            raise BlockStateError(f"of {self.num_rows} rows {rows} are free or taken.")

    # Growing.

    def _grow(self, tick: Tick) -> None:
        """Takes pages for the next token of everybody who goes on."""
        for job in list(self.running):
            if not job.rows or job.prefills:  # preempted just now, or its prompt is still being read
                continue
            if not job.is_beam:
                sequence = job.sequences[0]
                if sequence.num_drawn < job.limit and (copies := self._grown(job, sequence, tick)) is not None:
                    sequence.num_drawn += 1
                    tick.steps.append((job, sequence))
                    if copies:
                        tick.copies.append(copies)
                continue
            several = []
            for sequence in job.sequences:
                if (copies := self._grown(job, sequence, tick)) is None:
                    break
                several.append(copies)
            else:
                tick.copies += filter(None, several)
                tick.beams.append(job)

    def _grown(self, job: Job, sequence: Text, tick: Tick) -> Copies | None:
        """The pages to copy before a sequence's next token, if any; None: its job had to leave."""
        while (copies := self._room(job, sequence)) is None:
            sequence.guess = []
            last = self.running[-1]
            if len(self.running) > 1:
                self._preempt(last)
                tick.is_short = True
                if last is job:
                    return None
            elif self.pool.cached_pages:
                self.pool.forget_prefixes()
            else:
                raise OutOfBlocksError(
                    f"a sequence of {len(job.prompt)} tokens and {job.limit} new ones does not fit into the pool."
                )
        return copies

    def _room(self, job: Job, sequence: Text) -> Copies | None:
        """Room for the next token, and for those that are guessed; what wrong guesses took is still there."""
        if not self._guesses or job.is_beam:
            return self.pool.grow(sequence)
        appended = len(job.prompt) + sequence.num_drawn - 1
        more = max(appended + 1 + len(sequence.guess) - self.pool.length(sequence), 0)
        return self.pool.grow(sequence, more, seen=appended)

    def _preempt(self, job: Job) -> None:
        """Sends a job back to those that wait."""
        for sequence in job.sequences:
            self._leave(job, sequence, keep=True)
        self._remove(job)
        self.preemptions += 1
        self.submit(job)

    def _leave(self, job: Job, sequence: Text, keep: bool, is_over: bool = False) -> None:
        """Takes a sequence's pages back; where it is over, its last token was never appended."""
        if sequence in self.pool:
            if keep:
                self.pool.keep(sequence, self._appended(job, sequence, is_over))
            self.pool.close(sequence)
        if sequence.row != NO_ROW and not job.is_beam:
            job.rows.remove(sequence.row)
            self._free_rows.append(sequence.row)
        sequence.row = NO_ROW

    def _remove(self, job: Job) -> None:
        """Takes a job out of those that run."""
        self.running.remove(job)
        self._free_rows += reversed(job.rows)
        job.rows, job.prefills = [], []

    def _appended(self, job: Job, sequence: Text, is_over: bool) -> Tokens:
        """A sequence's tokens that lie in its pages, as far as they are known."""
        for prefill in job.prefills:
            if prefill.text is sequence:  # what has been read of them
                return prefill.tokens[: prefill.done]
        if job.is_beam or is_over:
            return job.text(sequence)[:-1]
        return job.text(sequence)[: len(job.prompt) + min(len(sequence.new), sequence.num_drawn - 1)]

    # Letting in.

    def _admit(self, tick: Tick) -> None:
        """Lets in who is next, as long as there are rows and pages."""
        while self.waiting and self._free_rows:
            job = self._first()
            if job is None or not self._let_in(job):
                return
            self.waiting.remove(job)
            self._run(job)
            self._forget(job)
            for other in self.waiting:
                if other.number >= job.number:
                    break
                other.passed += 1
            tick.admitted.append(Admission(job, tuple(job.sequences), job.prefills[0].start))

    def _first(self) -> Job | None:
        """Who is next; None: all do better to wait."""
        by_rank = sorted(self.waiting, key=lambda job: (job.passed < PATIENCE, *job.rank))
        if self._schedule == "fcfs" or by_rank[0].passed >= PATIENCE:
            return by_rank[0]
        first: tuple[tuple[int, int], Job] | None = None
        for job in by_rank[:_LOOKED_AT]:
            known = self._known_of(job)
            key = -job.priority, -known
            if (first is None or key < first[0]) and not self._comes_soon(job, known):
                first = key, job
        return None if first is None else first[1]

    def _known_of(self, job: Job) -> int:
        """How many of a job's tokens lie in pages."""
        stamp, known = self._known.get(job, (-1, 0))
        if stamp != self.pool.stamp:
            known = self.pool.known(self._to_read(job, job.sequences[0]), job.namespace)
            self._known[job] = self.pool.stamp, known
        return known

    def _run(self, job: Job) -> None:
        """Puts a job where it belongs among those that run."""
        bisect.insort(self.running, job, key=lambda each: each.rank)

    def _forget(self, job: Job) -> None:
        """Drops what was looked up for a job."""
        self._known.pop(job, None)

    def _comes_soon(self, job: Job, known: int) -> bool:
        """Whether more of a job's tokens are being read for another one, so that it will find them."""
        if self.pool.tree is None:
            return False
        tokens = self._to_read(job, job.sequences[0])
        more = known + self.pool.pool.block_size
        if more >= len(tokens):
            return False
        return any(
            prefill.start < more <= len(prefill.tokens) and np.array_equal(prefill.tokens[:more], tokens[:more])
            for other in self.running
            if other.namespace == job.namespace
            for prefill in other.prefills
        )

    def _to_read(self, job: Job, sequence: Text) -> Tokens:
        """What has to be read of a sequence that is let in."""
        if job.is_beam:
            return job.text(sequence)[:-1]
        return job.text(sequence) if sequence.new and self._rereads else job.prompt

    def _let_in(self, job: Job) -> bool:
        """Gives a job rows and pages; if there are too few, nothing has changed."""
        if len(self._free_rows) < job.width:
            return False
        pool, alone = self.pool, not self.running
        # Samples fork from the first when the prompt is read; beams that were preempted are read one by one.
        leaders = job.sequences if job.is_beam else job.sequences[:1]
        followers = [] if job.is_beam else job.sequences[1:]
        prefills = []
        for sequence in leaders:
            tokens = self._to_read(job, sequence)
            start = pool.open(sequence, tokens, job.namespace, alone=alone)
            if start is None:
                for prefill in prefills:
                    pool.close(prefill.text)
                return False
            prefills.append(Prefill(job, sequence, followers, tokens, start, start))
        job.rows = [self._free_rows.pop() for _ in range(job.width)]
        for sequence, row in zip(job.sequences, job.rows, strict=False):
            sequence.row = row
        job.prefills = prefills
        return True

    # Reading prompts.

    def _read(self, tick: Tick) -> None:
        """Takes the next pieces of prompts, as many as fit into one shape."""
        waiting = [prefill for job in self.running for prefill in job.prefills]
        shape = None
        for prefill in waiting:
            start = prefill.done
            stop = min(start // self._chunk * self._chunk + self._chunk, len(prefill.tokens))
            if shape is None:
                width = next(tokens for _, tokens in self._shapes if tokens >= stop - start)
                shape = max(rows for rows, tokens in self._shapes if tokens == width), width
            if stop - start <= shape[1]:
                tick.pieces.append(Piece(prefill, start, stop))
            if len(tick.pieces) == shape[0]:
                break
        if shape is not None and len(tick.pieces) <= shape[0] // 4:
            del tick.pieces[1:]  # a call for one row takes less than the shape for many
        for piece in tick.pieces:
            prefill = piece.prefill
            self.pool.reach(prefill.text, piece.stop)
            prefill.done = piece.stop
            if piece.is_last:
                self._finish_reading(prefill, tick)

    def _finish_reading(self, prefill: Prefill, tick: Tick) -> None:
        """A prompt that is read: its pages are there for others, and its samples part."""
        job = prefill.job
        self.pool.keep(prefill.text, prefill.tokens)
        job.prefills.remove(prefill)
        if job.is_beam:
            return
        prefill.text.num_drawn = len(prefill.tokens) - len(job.prompt) + 1
        for sequence in prefill.followers:
            copies = self.pool.fork(prefill.text, sequence)
            sample = job.alone(sequence)
            job.sequences.remove(sequence)
            job.rows.remove(sequence.row)
            if copies is None:  # no room for a copy of its pages: it is read by itself
                self._free_rows.append(sequence.row)
                sequence.row = NO_ROW
                self.submit(sample)
                continue
            sequence.num_drawn = 1
            sample.rows = [sequence.row]
            self._run(sample)
            if copies:
                tick.forks.append(copies)
        job.width = 1
