"""What a layer keeps of the tokens it has seen."""

from typing import Literal

Kind = Literal["full", "window", "chunk", "none"]

FULL: Kind = "full"
"""All tokens."""
WINDOW: Kind = "window"
"""The tokens of its window."""
CHUNK: Kind = "chunk"
"""The tokens of the current chunk."""
NONE: Kind = "none"
"""None: it has no keys and values."""


def every(period: int, num_layers: int, rest: Kind, *, at: int = -1) -> list[Kind]:
    """Layers with number `at` modulo `period` keep everything, the others `rest`."""
    return [FULL if i % period == at % period else rest for i in range(num_layers)]
