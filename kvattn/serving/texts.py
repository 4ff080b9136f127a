"""One text that an engine makes longer."""

import dataclasses

NO_ROW = -1


@dataclasses.dataclass(eq=False, slots=True)
class Text:
    """One text that grows: a sample, or a beam.

    Attributes:
        index: which of its request's.
        row: of the batch, or `NO_ROW`.
        new: its new tokens, as far as they are known.
        logprobs: of them.
        num_drawn: new tokens whose choice is in the device's hands since it was let in, the known ones included.
        guess: tokens that may come next, to be verified with the next step.
    """

    index: int
    row: int = NO_ROW
    new: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)
    num_drawn: int = 0
    guess: list[int] = dataclasses.field(default_factory=list)
