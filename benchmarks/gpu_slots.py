"""Counts the instructions that a compiled GPU kernel issues for a tile, from the text of NVIDIA's disassembler.

A warpgroup has one warp on each of the four schedulers of a multiprocessor, so what a warp issues for a tile is what a
scheduler issues for it. To be compared with the clocks that the copy of the tile takes: below them a kernel can be
bound by memory.
"""

import re
from typing import NamedTuple

PRODUCTS = ("HGMMA", "HMMA", "QGMMA")
COPIES = ("UTMALDG", "LDGSTS")
LINE = re.compile(r"^\s*(?:/\*[0-9a-f]+\*/)?\s*(@!?U?P\w+)?\s*([A-Z][A-Z0-9_]*)((?:\.\w+)*)([^;]*);", re.MULTILINE)
LABEL = re.compile(r"^\s*\.?(L_x?_?\w+):", re.MULTILINE)


class UnreadableError(Exception):
    """A text in which the loop over tiles is not found."""


class Instruction(NamedTuple):
    """One line: what it does, whether only under a condition, and where it may go."""

    operation: str
    is_conditional: bool
    target: str | None


def parsed(text: str) -> tuple[list[Instruction], dict[str, int]]:
    """The instructions of a function, and at which of them its labels are."""
    found: list[tuple[int, Instruction | str]] = []
    for match in LINE.finditer(text):
        condition, operation, _, rest = match.groups()
        target = re.search(r"L_x?_?\w+", rest) if operation == "BRA" else None
        found.append((match.start(), Instruction(operation, condition is not None, target and target[0])))
    found += [(match.start(), match[1]) for match in LABEL.finditer(text)]
    instructions, labels = [], {}
    for _, item in sorted(found, key=lambda pair: pair[0]):
        if isinstance(item, str):
            labels[item] = len(instructions)
        else:
            instructions.append(item)
    return instructions, labels


def slots_of_a_tile(text: str, usual: float = 1.0) -> int:
    """Instructions on the way through the loop over tiles that takes all products and copies, and is short otherwise.

    Args:
        text: of the kernel's function.
        usual: the share of its products that every tile takes.

    Raises:
        UnreadableError: there is no such loop.
    """
    instructions, labels = parsed(text)
    loops = []
    for i, one in enumerate(instructions):
        start = labels.get(one.target or "", i + 1)
        if one.operation == "BRA" and start <= i and any(x.operation in PRODUCTS for x in instructions[start : i + 1]):
            loops.append((i - start, start, i))
    if not loops:
        raise UnreadableError("no loop with products in it")
    _, start, end = min(loops)
    # From the end backwards: of each place, by products to come, the best way: (copies less, instructions).
    best: dict[int, dict[int, tuple[int, int]]] = {}
    for i in range(end, start - 1, -1):
        one = instructions[i]
        product, copy = int(one.operation in PRODUCTS), int(one.operation in COPIES)
        after = [] if one.operation in ("EXIT", "RET") or i == end else [i + 1]
        if one.operation == "BRA" and one.target is not None and i != end:
            if not one.is_conditional:
                after = []
            after.append(labels.get(one.target, -1))
        # Ways back belong to loops inside, of which none is taken twice; ways out are no way through.
        ways = [best[j] for j in after if j in best and j > i]
        if i == end:
            ways = [{0: (0, 0)}]
        for way in ways:
            for done, (copies, length) in way.items():
                found = (copies - copy, length + 1)
                here = best.setdefault(i, {})
                here[done + product] = min(found, here.get(done + product, found))
    if start not in best:
        raise UnreadableError("no way through the loop with products in it")
    least = usual * max(best[start])
    return min(way for done, way in best[start].items() if done >= least - 0.5)[1]
