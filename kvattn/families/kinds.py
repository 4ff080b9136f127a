"""What a layer keeps of the tokens it has seen."""

from collections.abc import Sequence
from typing import Literal

from kvattn.errors import ConfigError

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


def shared_from(kinds: Sequence[object], sharing: int) -> list[int]:
    """The layer whose keys and values each layer attends to, where the last ones keep none.

    Args:
        kinds: of each layer: what shares must be equal.
        sharing: how many of the last layers attend to those of the last earlier layer of their kind.

    Raises:
        ConfigError: there is no earlier layer of that kind.
    """
    first, sources = max(len(kinds) - sharing, 0), list(range(len(kinds)))
    last = {kind: layer for layer, kind in enumerate(kinds[:first])}
    for layer in range(first, len(kinds)):
        if kinds[layer] not in last:
            raise ConfigError(f"num_kv_shared_layers is {sharing}: layer {layer} has no earlier layer to share with.")
        sources[layer] = last[kinds[layer]]
    return sources
