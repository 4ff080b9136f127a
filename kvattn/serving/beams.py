"""Beam search: of all continuations of the texts so far, the most probable go on.

A text is as probable as its tokens together. One that has come to a stop token goes on as it is, in competition with
the others; the search ends when all have, or at the limit.
"""

import dataclasses

import numpy as np
from jaxtyping import Bool, Float32, Int32


@dataclasses.dataclass(frozen=True)
class Beam:
    """A text of a search.

    Attributes:
        tokens: its new tokens.
        logprobs: theirs.
        score: their sum.
        parent: which of the texts before it goes on with it; None: it has ended.
    """

    tokens: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    score: float = 0.0
    parent: int | None = 0


def grown(
    live: list[Beam],
    ended: list[Beam],
    tokens: Int32[np.ndarray, "beams k"],
    logprobs: Float32[np.ndarray, "beams k"],
    width: int,
    stop: Bool[np.ndarray, " V"],
) -> tuple[list[Beam], list[Beam]]:
    """The `width` most probable texts one token later, best first: those that go on, and those that have ended.

    Ties go to texts that have ended, then to the better parent, then to the more probable token.

    Args:
        live: texts that go on, best first.
        ended: those that have come to a stop token.
        tokens: the best continuations of each, best first, at least `width`.
        logprobs: theirs.
        width: texts.
        stop: which tokens end a text.
    """
    candidates = [dataclasses.replace(beam, parent=None) for beam in ended]
    for parent, beam in enumerate(live):
        for token, logprob in zip(tokens[parent, :width].tolist(), logprobs[parent, :width].tolist(), strict=True):
            if logprob > -np.inf:
                score = beam.score + logprob
                candidates.append(Beam((*beam.tokens, token), (*beam.logprobs, logprob), score, parent))
    best = sorted(candidates, key=lambda beam: -beam.score)[:width]  # stable
    is_over = [beam.parent is None or bool(stop[beam.tokens[-1]]) for beam in best]
    going = [beam for beam, over in zip(best, is_over, strict=True) if not over]
    return going, [beam for beam, over in zip(best, is_over, strict=True) if over]
