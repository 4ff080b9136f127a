"""What a layer keeps of the tokens it has seen."""

from typing import Literal

Kind = Literal["full", "window", "chunk", "none"]

FULL: Kind = "full"
"""All of them."""
WINDOW: Kind = "window"
"""Those of its window."""
CHUNK: Kind = "chunk"
"""Those of the chunk it is in."""
NONE: Kind = "none"
"""No keys and values at all."""


def every(period: int, num_layers: int, rest: Kind, *, at: int = -1) -> list[Kind]:
    """One layer in `period` keeps everything, the one whose number is `at` modulo it; the others keep `rest`."""
    return [FULL if i % period == at % period else rest for i in range(num_layers)]
