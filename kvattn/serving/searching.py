"""Beam searches on an engine: the device says how texts may go on, the host which do, and moves their pages."""

import dataclasses
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool

from kvattn.cache import status as bits
from kvattn.errors import KVAttnError, RangeError
from kvattn.serving import beams
from kvattn.serving.device import Device
from kvattn.serving.jobs import Job
from kvattn.serving.scheduler import Scheduler
from kvattn.serving.sinking import Sinking
from kvattn.serving.tables import Tables
from kvattn.serving.texts import Text


class Outcome(NamedTuple):
    """What came of a tick of a search.

    Attributes:
        new_tokens: how many texts were made longer.
        error: why it cannot go on.
        is_over: whether it has ended.
    """

    new_tokens: int
    error: KVAttnError | None = None
    is_over: bool = False


def search_on(
    job: Job,
    width: int,
    stop: Bool[np.ndarray, " V"],
    held: tuple[list[int], Tables],
    device: Device,
    scheduler: Scheduler,
    sinking: Sinking | None,
) -> Outcome:
    """One token more for every beam of a job that has room for it.

    Args:
        job: the search.
        width: beams.
        stop: tokens that end a text.
        held: rows that somebody has, and the tables of all rows.
        device: where they are.
        scheduler: whose the job is.
        sinking: what reads pages that have to leave.
    """
    request = job.owner
    assert request.beams is not None
    ended = [beam for beam in request.beams if beam.parent is None]
    live = [beam for beam in request.beams if beam.parent is not None]
    last = {s.row: int(s.new[-1] if s.new else job.prompt[-1]) for s in job.sequences}
    found = device.grow(held[1], held[0], last, width)
    rows = [sequence.row for sequence in job.sequences]
    if found.status[rows].any() or np.isnan(found.logprobs[rows]).any():
        return Outcome(0, reason_for(int(np.bitwise_or.reduce(found.status[rows])), len(live[0].tokens)))
    going, over = beams.grown(live, ended, found.tokens[rows], found.logprobs[rows], width, stop)
    count = len(going) + len(over) - len(ended)
    if going and len(going[0].tokens) < job.limit:
        _move(job, going, device, scheduler, sinking)
    else:
        over, going = [*over, *going], []
    kept = [dataclasses.replace(beam, parent=0) for beam in going]
    done = [dataclasses.replace(beam, parent=None) for beam in over]
    request.beams = sorted([*kept, *done], key=lambda beam: -beam.score)
    return Outcome(max(count, 0), is_over=not kept)


def _move(job: Job, going: list[beams.Beam], device: Device, scheduler: Scheduler, sinking: Sinking | None) -> None:
    """Gives each beam the pages of the one that it goes on from."""
    parents = list(job.sequences)
    children: dict[int, list[beams.Beam]] = {}
    for beam in going:
        assert beam.parent is not None
        children.setdefault(beam.parent, []).append(beam)
    for i, parent in enumerate(parents):
        if i not in children:
            scheduler.finish(job, parent, keep=False)
    copies, source = [], {}
    of_beam: dict[tuple[int, ...], Text] = {}
    for i, (first, *others) in children.items():
        for beam in others:
            child = Text(0, new=list(beam.tokens), logprobs=list(beam.logprobs))
            copies += filter(None, [scheduler.fork(job, parents[i], child)])
            source[child.row] = parents[i].row
            of_beam[beam.tokens] = child
        parents[i].new, parents[i].logprobs = list(first.tokens), list(first.logprobs)
        of_beam[first.tokens] = parents[i]
    job.sequences[:] = [of_beam[beam.tokens] for beam in going]
    if sinking is not None:
        sinking.read()
    if source:
        device.move(source)
    device.copy(copies)


def reason_for(status: int, count: int) -> KVAttnError:
    """Why a row cannot go on.

    Args:
        status: what its caches recorded.
        count: new tokens that it has.
    """
    try:
        bits.raise_for(np.array([status], np.int32))
    except KVAttnError as error:
        return error
    return RangeError(
        f"the logits are NaN or infinite after {count} new tokens: a weight is not finite, or something overflowed. "
        "Look at the checkpoint, or compute in a wider dtype."
    )
