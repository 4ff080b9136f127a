"""Counts instructions in what NVIDIA's disassembler writes of a kernel."""

import re

PRODUCT = re.compile(r"\bHG?MMA\.")


def issue_slots(text: str, kernel: str) -> int | None:
    """Instructions of the loop over tiles of a kernel, all of its branches: each warp issues that many at most.

    The innermost loop that holds all products. None: there is no such loop, or no such text.
    """
    names = [(m.start(), m[1]) for m in re.finditer(r"Function properties for (\w+)", text)]
    begin = next((at for at, name in names if name.startswith(kernel)), None)
    if begin is None:
        return None
    end = next((at for at, name in names if at > begin and not name.startswith(kernel)), len(text))
    instructions: list[str] = []
    labels: dict[str, int] = {}
    for line in text[begin:end].splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(instructions)
        elif found := re.match(r"\s*/\*[0-9a-f]+\*/\s+(.*?);", line):
            instructions.append(found[1])
    products = [i for i, x in enumerate(instructions) if PRODUCT.search(x)]
    if not products:
        return None
    lengths = []
    for i, x in enumerate(instructions):
        back = re.search(r"\bBRA\b.*`\((\.L_x_\d+)\)", x)
        if back and labels.get(back[1], i + 1) <= products[0] and i >= products[-1]:
            lengths.append(i - labels[back[1]] + 1)
    return min(lengths, default=None)
