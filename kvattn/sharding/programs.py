"""What a compiled program makes devices exchange."""

import dataclasses
import re
from typing import Any

KINDS = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter", "collective-broadcast")

_INSTRUCTION = re.compile(rf"= (?P<result>[^=\n]*?) (?P<kind>{'|'.join(KINDS)})(?P<start>-start)?\((?P<rest>.*)")
# One that a TPU does beside other work is written into each of the fusions it runs beside.
_CHAIN = re.compile(r'channel_id=(\d+).*chain_id="(\d+)"')
_SHAPE = re.compile(r"(pred|[a-z]+(\d+)\w*)\[([\d,]*)\]")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One exchange.

    Attributes:
        kind: one of `KINDS`.
        nbytes: of its result on one device; times as often as it is in a loop.
    """

    kind: str
    nbytes: int


def collectives(program: Any) -> list[Collective]:
    """The exchanges of a program, in the order of its text; one in a loop counts once.

    Args:
        program: what ``jax.jit(f).lower(...).compile()`` returns, or its ``as_text()``.
    """
    text = re.sub(r"/\*.*?\*/", "", program if isinstance(program, str) else program.as_text())
    found, chains = [], set()
    for match in _INSTRUCTION.finditer(text):
        if chain := _CHAIN.search(match["rest"]):
            if chain.groups() in chains:
                continue
            chains.add(chain.groups())
        sizes = [_nbytes(*shape) for shape in _SHAPE.findall(match["result"])]
        # The start of an asynchronous one lists what it was given, too; then come counters.
        begun = match["start"] and match["kind"] in ("all-gather", "collective-permute")
        found.append(Collective(match["kind"], sizes[1] if begun else sum(sizes)))
    return found


def _nbytes(name: str, bits: str, shape: str) -> int:
    count = 1
    for size in shape.split(","):
        count *= int(size) if size else 1
    return count * (8 if name == "pred" else int(bits)) // 8
