"""What process 0 tells the others at every step: requests that came, and requests that were cancelled."""

import json
from collections.abc import Hashable, Iterable, Sequence
from typing import Any, NamedTuple


class Arrival(NamedTuple):
    """A request: the arguments of `Engine.submit`. Those that are sent have lists of tokens."""

    prompt: Sequence[int]
    max_new_tokens: int
    num_samples: int
    beam_width: int | None
    temperature: float
    top_k: int | None
    top_p: float | None
    seed: int
    stop_tokens: int | Iterable[int] | None
    namespace: Hashable
    priority: int


def packed(arrivals: list[Arrival], cancelled: list[int]) -> bytes:
    """What came since the last step: requests, and the numbers of those that were cancelled."""
    if not arrivals and not cancelled:  # nearly always
        return b""
    return json.dumps({"arrivals": arrivals, "cancelled": cancelled}).encode()


def unpacked(message: bytes) -> tuple[list[Arrival], list[int]]:
    """What `packed` took."""
    if not message:
        return [], []
    found: dict[str, Any] = json.loads(message)
    arrivals = [Arrival(*each) for each in found["arrivals"]]
    named = [
        a._replace(namespace=tuple(a.namespace) if isinstance(a.namespace, list) else a.namespace) for a in arrivals
    ]
    return named, found["cancelled"]
