"""How much of a trace's prompts a pool of a given size would give back: no model, no arrays.

The rule: requests come one after the other; a block is a hit if it and all before it are held; its tokens then need not
be computed. The block used longest ago leaves first, and of one prompt the last block, so what is held is always a set
of prefixes: as with `RadixTree`, which gives the same numbers.
"""

import dataclasses
import itertools
from collections import OrderedDict
from collections.abc import Callable, Sequence

from kvattn.errors import ConfigError
from kvattn.serving import checks
from kvattn.serving.trace import TraceRequest


@dataclasses.dataclass(frozen=True)
class Replay:
    """What came of a trace.

    Attributes:
        num_blocks: blocks of the pool; None: as many as were wanted.
        block_size: tokens per block.
        num_requests: requests of the trace.
        prompt_tokens: tokens of all prompts.
        hit_tokens: those that were held.
        ideal_tokens: those that a pool without end would have held.
        evicted: blocks that had to leave.
        peak_blocks: the most blocks that were held at once.
    """

    num_blocks: int | None
    block_size: int
    num_requests: int
    prompt_tokens: int
    hit_tokens: int
    ideal_tokens: int
    evicted: int
    peak_blocks: int

    @property
    def hit_rate(self) -> float:
        """Share of all prompt tokens that were held."""
        return self.hit_tokens / self.prompt_tokens if self.prompt_tokens else 0.0

    @property
    def ideal_hit_rate(self) -> float:
        """Share of all prompt tokens that a pool without end would have held."""
        return self.ideal_tokens / self.prompt_tokens if self.prompt_tokens else 0.0


def replay(
    requests: Sequence[TraceRequest],
    *,
    num_blocks: int | None = None,
    block_size: int = 512,
    progress: Callable[[int, int], object] | None = None,
) -> Replay:
    """Replays a trace, in its order, on a prefix cache of so many blocks.

    A request larger than the pool passes through it: its last blocks stay.

    Args:
        requests: see `read_trace`.
        num_blocks: blocks of the pool. None: as many as are wanted.
        block_size: tokens that one of `hash_ids` stands for.
        progress: called with the requests done and all, now and then.

    Raises:
        ConfigError: no block, no token in one; prompts with another number of ids than their blocks.
        DTypeError: no ints.
    """
    size = checks.integer("block_size", block_size, 1, ConfigError)
    room = None if num_blocks is None else checks.integer("num_blocks", num_blocks, 1, ConfigError)
    _fits(requests, size)
    held: OrderedDict[int, None] = OrderedDict()  # the block used longest ago first
    seen: set[int] = set()
    hits = ideal = evicted = peak = 0
    for number, request in enumerate(requests, 1):
        ids = request.hash_ids
        hits += min(_known(ids, held) * size, request.input_length)
        ideal += min(_known(ids, seen) * size, request.input_length)
        seen.update(ids)
        before, new = len(held), sum(i not in held for i in ids)
        if room is not None and len(ids) > room:
            held.clear()
            ids = ids[-room:]
        for i in reversed(ids):
            held[i] = None
            held.move_to_end(i)  # the first block is used last, and so leaves last
        while room is not None and len(held) > room:
            held.popitem(last=False)
        evicted += before + new - len(held)
        peak = max(peak, len(held))
        if progress is not None and not number % 1000:
            progress(number, len(requests))
    if progress is not None:
        progress(len(requests), len(requests))
    tokens = sum(request.input_length for request in requests)
    return Replay(
        num_blocks=room,
        block_size=size,
        num_requests=len(requests),
        prompt_tokens=tokens,
        hit_tokens=hits,
        ideal_tokens=ideal,
        evicted=evicted,
        peak_blocks=peak,
    )


def knee(sizes: Sequence[int], rates: Sequence[float]) -> int:
    """Where more blocks begin to bring less: the size whose rate lies highest above the line between the ends.

    Args:
        sizes: of pools, ascending.
        rates: the hit rate at each.

    Raises:
        ConfigError: fewer than two sizes, not ascending, or another number of rates.
    """
    if len(sizes) != len(rates) or len(sizes) < 2 or any(a >= b for a, b in itertools.pairwise(sizes)):
        raise ConfigError(f"a knee needs two or more ascending sizes and a rate for each, got {sizes}, {rates}.")
    slope = (rates[-1] - rates[0]) / (sizes[-1] - sizes[0])
    return max(zip(sizes, rates, strict=True), key=lambda point: point[1] - slope * point[0])[0]


def _known(ids: Sequence[int], held: "OrderedDict[int, None] | set[int]") -> int:
    """How many blocks from the first on are held."""
    count = 0
    for i in ids:
        if i not in held:
            break
        count += 1
    return count


def _fits(requests: Sequence[TraceRequest], size: int) -> None:
    for number, request in enumerate(requests):
        blocks = -(-request.input_length // size)
        if len(request.hash_ids) != blocks:
            raise ConfigError(
                f"request {number} has {request.input_length} tokens, {blocks} blocks of {size}, and "
                f"{len(request.hash_ids)} hash_ids: give the block_size of the trace."
            )
