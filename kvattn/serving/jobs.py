"""What a scheduler moves: jobs, which are let in together, and their sequences, which have a row each."""

import dataclasses
from collections.abc import Hashable

import numpy as np
from jaxtyping import Int32

from kvattn.serving.prefixes import Copies
from kvattn.serving.request import Request
from kvattn.serving.texts import Text


@dataclasses.dataclass(eq=False, slots=True)
class Prefill:
    """Tokens that one sequence has to be read before it goes on.

    Attributes:
        job: whose.
        text: which has the pages.
        followers: texts that fork from it when it is read.
        tokens: all of them.
        start: those that lay in pages already.
        done: those that have been handed to the device, the ones before `start` included.
    """

    job: "Job"
    text: Text
    followers: list[Text]
    tokens: Int32[np.ndarray, " S"]
    start: int = 0
    done: int = 0


@dataclasses.dataclass(eq=False, slots=True)
class Job:
    """Sequences that are let in, and preempted, together.

    Attributes:
        owner: the request.
        number: when it arrived.
        prompt: its tokens.
        limit: most new tokens of each sequence.
        sequences: samples that share the prompt, until it is read; then one. Or the beams that live.
        width: rows that it needs.
        namespace: whose prefixes it may find.
        priority: larger ones first.
        is_beam: whether its sequences grow by a search.
        passed: how often one that came later was let in before it.
        prefills: what is to be read before it grows.
        rows: those it has.
        was_in: whether it was let in before.
    """

    owner: Request
    number: int
    prompt: Int32[np.ndarray, " S"]
    limit: int
    sequences: list[Text]
    width: int
    namespace: Hashable = ""
    priority: int = 0
    is_beam: bool = False
    passed: int = 0
    prefills: list[Prefill] = dataclasses.field(default_factory=list)
    rows: list[int] = dataclasses.field(default_factory=list)
    was_in: bool = False

    @property
    def rank(self) -> tuple[int, int, int]:
        """Who goes before whom."""
        return -self.priority, self.number, self.sequences[0].index

    def alone(self, sequence: Text) -> "Job":
        """A job for one of its samples, which leaves this one: it was let in, and goes on by itself."""
        return dataclasses.replace(self, sequences=[sequence], width=1, passed=0, prefills=[], rows=[], was_in=True)

    def text(self, sequence: Text) -> Int32[np.ndarray, " S"]:
        """The prompt and a sequence's new tokens."""
        return np.concatenate([self.prompt, np.array(sequence.new, np.int32)])


@dataclasses.dataclass(frozen=True, slots=True)
class Piece:
    """A part of a prefill.

    Attributes:
        prefill: of what.
        start: its first token.
        stop: after its last.
    """

    prefill: Prefill
    start: int
    stop: int

    @property
    def is_last(self) -> bool:
        """Whether nothing is left to be read after it."""
        return self.stop == len(self.prefill.tokens)


@dataclasses.dataclass(frozen=True, slots=True)
class Admission:
    """A job that was let in.

    Attributes:
        job: which.
        sequences: that came in with it.
        start: tokens of its prompt that lay in pages already.
    """

    job: Job
    sequences: tuple[Text, ...]
    start: int


@dataclasses.dataclass(slots=True)
class Tick:
    """What the device does next, in this order.

    Attributes:
        copies: pages that are copied first, of every group.
        steps: sequences that append their last token and choose the next.
        beams: jobs whose beams append their last tokens.
        pieces: parts of prompts that are read, with as many tokens as fit into one shape.
        forks: pages that are copied when they are read, of every group.
        admitted: jobs that were let in.
        is_short: whether somebody had to leave, so that nobody was let in.
    """

    copies: list[Copies] = dataclasses.field(default_factory=list)
    steps: list[tuple[Job, Text]] = dataclasses.field(default_factory=list)
    beams: list[Job] = dataclasses.field(default_factory=list)
    pieces: list[Piece] = dataclasses.field(default_factory=list)
    forks: list[Copies] = dataclasses.field(default_factory=list)
    admitted: list[Admission] = dataclasses.field(default_factory=list)
    is_short: bool = False

    def __bool__(self) -> bool:
        return bool(self.steps or self.beams or self.pieces)
