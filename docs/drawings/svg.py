"""A picture: cells, words and lines as SVG, legible in light and dark."""

import inspect
import pathlib
import textwrap
from html import escape

import kvattn

MARGIN, CELL, LETTER = 12, 24, 6.1

STYLE = """
  text { font: 11px ui-sans-serif, system-ui, "Segoe UI", Helvetica, Arial, sans-serif; fill: #444c56 }
  .page { fill: #ffffff }
  .title { font-size: 13px; font-weight: 600; fill: #1f2328 }
  .head { font-weight: 600; fill: #1f2328 }
  .small { font-size: 10px }
  .foot { font-size: 9px; fill: #6a737d }
  .in { fill: #1f2328; font-variant-numeric: tabular-nums }
  .in-own { fill: #ffffff; font-weight: 600 }
  rect { stroke: #ffffff; stroke-width: 1.5 }
  .page, .bare { stroke: none }
  .empty { fill: none; stroke: #c4cad1; stroke-width: 1; stroke-dasharray: 2 2 }
  .kept { fill: #d6dce4 }
  .own { fill: #0b6bcb }
  .first { fill: #8fd0a5 }
  .heavy { fill: #f5b76c }
  .shared { fill: #cdb5f0 }
  .frame { fill: none; stroke: #444c56; stroke-width: 1.2 }
  .wire { stroke: #98a3b0; stroke-width: 1.2; fill: none }
  .leaves { stroke: #cf222e; stroke-width: 2; fill: none }
  .d0 { fill: #a9cdf5 } .d1 { fill: #f5c98b } .d2 { fill: #a5dcb7 } .d3 { fill: #d9b8ee }
  .d4 { fill: #f2b1b1 } .d5 { fill: #b4dfe3 } .d6 { fill: #dcd79a } .d7 { fill: #cfd4da }
  @media (prefers-color-scheme: dark) {
    text { fill: #b1bac4 }
    .title, .head, .in { fill: #f0f3f6 }
    .in-own { fill: #ffffff }
    .foot { fill: #8b949e }
    .page { fill: #14171c }
    rect { stroke: #14171c }
    .empty { stroke: #444c56 }
    .kept { fill: #3a424c }
    .own { fill: #2f81f7 }
    .first { fill: #23713c }
    .heavy { fill: #9a5a0a }
    .shared { fill: #6a44a8 }
    .frame { stroke: #b1bac4 }
    .wire { stroke: #68737f }
    .leaves { stroke: #ff7b72 }
    .d0 { fill: #1f4e86 } .d1 { fill: #835208 } .d2 { fill: #22633a } .d3 { fill: #60378a }
    .d4 { fill: #842f2f } .d5 { fill: #1f6067 } .d6 { fill: #65601a } .d7 { fill: #4c545d }
  }
"""


def source(thing: object) -> str:
    """The file of the package that a class or function is written in."""
    path = pathlib.Path(inspect.getsourcefile(inspect.unwrap(thing))).resolve()
    return str(path.relative_to(pathlib.Path(kvattn.__file__).resolve().parent.parent))


class Picture:
    """Collects shapes and grows with them.

    Args:
        title: what it shows; the first line.
        ran: classes and functions of the package that were run for it: their files are named below.
        by: the file that drew it.
    """

    def __init__(self, title: str, ran: list[object], by: str):
        self._title, self._ran, self._by = title, [source(thing) for thing in ran], pathlib.Path(by).name
        self._shapes: list[str] = []
        self.width, self.y = 360, MARGIN + 12
        self.text(MARGIN, self.y, title, "title")
        self.y += 18

    def text(self, x: float, y: float, words: str, kind: str = "", anchor: str = "start") -> None:
        """One line; `anchor` is start, middle or end."""
        start = x - {"start": 0, "middle": 0.5, "end": 1}[anchor] * LETTER * len(words)
        self.width = max(self.width, start + LETTER * len(words) * (1.2 if kind == "title" else 1))
        place = "" if anchor == "start" else f' text-anchor="{anchor}"'
        self._shapes.append(f'<text x="{_n(x)}" y="{_n(y)}" class="{kind}"{place}>{escape(words)}</text>')

    def line(self, words: str, kind: str = "", wide: int = 66) -> None:
        """A paragraph across the picture, below what is there."""
        for row in textwrap.wrap(words, wide):
            self.text(MARGIN, self.y, row, kind)
            self.y += 15

    def cell(self, x, y, label="", kind="kept", width=CELL, height=CELL - 4, inside="in", opacity=1.0):
        """A box with a few letters in its middle."""
        self.width = max(self.width, x + width)
        see = f' fill-opacity="{opacity:g}"' if opacity < 1 else ""
        self._shapes.append(
            f'<rect class="{kind}" x="{_n(x)}" y="{_n(y)}" width="{_n(width)}" height="{_n(height)}" rx="3"{see}/>'
        )
        if label != "":
            inside = "in-own" if kind == "own" and opacity == 1 else inside
            self.text(x + width / 2, y + height / 2 + 4, str(label), inside, "middle")

    def wire(self, *points, kind="wire"):
        """A line through points."""
        joined = " ".join(f"{_n(x)},{_n(y)}" for x, y in points)
        self._shapes.append(f'<polyline class="{kind}" points="{joined}"/>')

    def cross(self, x, y, width=CELL, height=CELL - 4):
        """Marks a cell whose token leaves."""
        for a, b in (
            ((x + 5, y + 4), (x + width - 5, y + height - 4)),
            ((x + 5, y + height - 4), (x + width - 5, y + 4)),
        ):
            self.wire(a, b, kind="leaves")

    def legend(self, *entries: tuple[str, str]) -> None:
        """Boxes and what they mean; "leaves" is a cross."""
        x = MARGIN
        for kind, words in entries:
            wide = 20 + LETTER * len(words) + 12
            if x > MARGIN and x + wide > 420:
                x, self.y = MARGIN, self.y + 18
            if kind == "leaves":
                self.cross(x - 2, self.y - 12, 18, 16)
            else:
                self.cell(x, self.y - 11, kind=kind, width=14, height=14)
            self.text(x + 19, self.y, words, "small")
            x += wide
        self.y += 20

    def svg(self) -> str:
        """The file."""
        self.y += 2
        for row in textwrap.wrap(
            f"Drawn by docs/drawings/{self._by}, which ran {', '.join(dict.fromkeys(self._ran))}", 78
        ):
            self.text(MARGIN, self.y, row, "foot")
            self.y += 12
        width, height = round(self.width + MARGIN), round(self.y)
        size = f'viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
        return "\n".join(
            [
                f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">',
                f"<title>{escape(self._title)}</title>",
                f"<style>{STYLE}</style>",
                f'<rect class="page" width="{width}" height="{height}"/>',
                *self._shapes,
                "</svg>",
                "",
            ]
        )


def _n(x: float) -> str:
    return f"{x:.1f}".removesuffix(".0")
