"""Draws docs/architecture.svg: the packages of kvattn, layer by layer, and what each imports.

    python docs/architecture.py            writes it
    python docs/architecture.py --check    fails if it is not what the code says

The order of the layers is that of the contract in pyproject.toml, the words are the first sentence of each package.
"""

import ast
import pathlib
import re
import sys
import textwrap
import tomllib
from html import escape

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import structure  # noqa: E402

TARGET = ROOT / "docs" / "architecture.svg"

MARGIN, ROW, LINE = 16, 24, 15
NAME_WIDTH, TEXT_WIDTH, STEP = 92, 372, 21
CHARACTERS = 62
"""Of a line of the description: 11 px letters are about 6 px wide."""

STYLE = """
  text { font: 11px ui-sans-serif, system-ui, "Segoe UI", Helvetica, Arial, sans-serif; fill: #444c56 }
  .name { font-weight: 600; font-size: 13px; fill: #1f2328 }
  .page { fill: #ffffff }
  .band { fill: #f3f5f8 }
  .wire { stroke: #98a3b0; stroke-width: 1.5 }
  .guide { stroke: #d5dae0; stroke-width: 1; stroke-dasharray: 1 3 }
  .own { fill: #1f2328 }
  .import { fill: #0b6bcb }
  .wrong { fill: #cf222e }
  @media (prefers-color-scheme: dark) {
    text { fill: #b1bac4 }
    .name, .own { fill: #f0f3f6 }
    .page { fill: #14171c }
    .band { fill: #1d2229 }
    .wire { stroke: #68737f }
    .guide { stroke: #3a424c }
    .import { fill: #5cb0ff }
    .wrong { fill: #ff7b72 }
  }
"""


def layers(known: set[str]) -> list[list[str]]:
    """The packages of every layer, from the top."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    order = next(contract["layers"] for contract in contracts if contract["type"] == "layers")
    found = [[name for name in re.findall(r"\w+", layer) if name in known] for layer in order]
    return [layer for layer in found if layer]


def summary(module: structure.Module) -> list[str]:
    """The first sentence of a package, in lines."""
    sentence = re.split(r"(?<=[.])\s", (ast.get_docstring(module.tree) or "").replace("\n", " "))[0]
    return textwrap.wrap(re.sub(r"`+", "", sentence).rstrip("."), CHARACTERS)


def drawing(folder: pathlib.Path = structure.ROOT) -> str:
    """The picture."""
    modules = structure.modules_of(folder)
    names = {module.name for module in modules}
    root = folder.name
    heads = {module.part.split(".")[1]: module for module in modules if module.name == module.part != root}
    imported = {
        (module.part.split(".")[1], name.split(".")[1])
        for module in modules
        if module.name != root
        for name, _ in structure.imports_of(module, names)
    }
    shapes, marks, at, y = [], [], {}, MARGIN
    order = layers(set(heads))
    column = {name: i for i, name in enumerate(name for layer in order for name in layer)}
    x = lambda name: MARGIN + NAME_WIDTH + TEXT_WIDTH + STEP * (column[name] + 1)
    width = MARGIN + x(max(column, key=column.__getitem__))
    for number, layer in enumerate(order):
        top = y
        for name in layer:
            lines = summary(heads[name])
            height = ROW + LINE * max(len(lines) - 1, 0)
            at[name] = y + height // 2
            first = at[name] + 4 - LINE * (len(lines) - 1) // 2
            marks.append(f'<text class="name" x="{MARGIN}" y="{at[name] + 4}">{escape(name)}</text>')
            marks += [
                f'<text x="{MARGIN + NAME_WIDTH}" y="{first + LINE * i}">{escape(line)}</text>'
                for i, line in enumerate(lines)
            ]
            y += height
        if number % 2 == 0:
            shapes.append(f'<rect class="band" x="0" y="{top}" width="{width}" height="{y - top}"/>')
    for name in column:
        uses = [theirs for mine, theirs in imported if mine == name and theirs != name]
        users = [mine for mine, theirs in imported if theirs == name and mine != name]
        left, right = x(min(column, key=column.__getitem__)) - STEP, max(map(x, [name, *uses]))
        shapes.append(f'<line class="guide" x1="{left}" y1="{at[name]}" x2="{right}" y2="{at[name]}"/>')
        ends = [at[user] for user in [name, *users]]
        if users:
            shapes.append(f'<line class="wire" x1="{x(name)}" y1="{min(ends)}" x2="{x(name)}" y2="{max(ends)}"/>')
        marks.append(f'<rect class="own" x="{x(name) - 5}" y="{at[name] - 5}" width="10" height="10" rx="2"/>')
        for user in sorted(users, key=column.__getitem__):
            # Within a layer either may be the lower one.
            wrong = at[user] > at[name] and not any({user, name} <= set(layer) for layer in order)
            title = f"<title>{escape(user)} imports {escape(name)}</title>"
            kind = "wrong" if wrong else "import"
            marks.append(f'<circle class="{kind}" cx="{x(name)}" cy="{at[user]}" r="4">{title}</circle>')
    height = y + ROW + MARGIN
    legend = "Each package is a square on a wire. A dot on the wire: the package of that row imports it."
    marks.append(f'<text x="{MARGIN}" y="{y + ROW}">{legend}</text>')
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
            ' role="img">',
            f"<title>The packages of {root} and what they import</title>",
            f"<style>{STYLE}</style>",
            f'<rect class="page" width="{width}" height="{height}"/>',
            *shapes,
            *marks,
            "</svg>",
            "",
        ]
    )


def main(arguments: list[str]) -> int:
    """Writes or checks."""
    if arguments not in ([], ["--check"]):
        raise SystemExit(__doc__)
    picture = drawing()
    if not arguments:
        TARGET.write_text(picture)
    elif not TARGET.exists() or TARGET.read_text() != picture:
        print("docs/architecture.svg is not what the code says: run python docs/architecture.py")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
