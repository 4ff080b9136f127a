"""The text the byte model learns from: the documentation that every CPython carries.

The language reference (`pydoc_data.topics`) and, for training only, the docstrings of the standard library.
"""

import ast
import pathlib
import sysconfig
from collections.abc import Sequence
from pydoc_data.topics import topics

import numpy as np

START = 0
"""The byte before every text, in training as in use: no text holds it. It is what attention sinks into."""

HELD_OUT = ("booleans", "calls", "comparisons", "global", "shifting")
"""Topics for validation, about 5 %. The demos take their prompts from them."""


def split() -> tuple[np.ndarray, np.ndarray]:
    """Training and validation text, uint8, without START.

    Many topics are excerpts of others ("if" of "compound"). So a paragraph counts once, where it is first met
    (validation, then the training topics from the longest to the shortest), and topics of which less than half
    is left are dropped. No paragraph is in both texts.
    """
    seen: set[str] = set()

    def fresh(name: str) -> str:
        paragraphs = topics[name].split("\n\n")
        new = [p for p in paragraphs if p.strip() not in seen]
        seen.update(p.strip() for p in paragraphs)
        text = "\n\n".join(new)
        return text if len(text) > len(topics[name]) / 2 else ""

    valid = [fresh(name) for name in HELD_OUT]
    others = sorted(set(topics) - set(HELD_OUT), key=lambda name: (-len(topics[name]), name))
    train = [fresh(name) for name in others]
    train += [text for text in docstrings() if text not in seen]
    return _join(train), _join(valid)


def windows(text: np.ndarray, starts: Sequence[int] | np.ndarray, length: int) -> np.ndarray:
    """int32 [B, 1 + length]: pieces of the text, START before each."""
    pieces = text[np.asarray(starts)[:, None] + np.arange(length)[None]]
    return np.pad(pieces, ((0, 0), (1, 0)), constant_values=START).astype(np.int32)


def docstrings() -> list[str]:
    """Those of the standard library's modules, classes and functions, in the order of its files; once each."""
    root = pathlib.Path(sysconfig.get_path("stdlib"))
    skipped = {"site-packages", "test", "tests", "idlelib", "lib2to3", "pydoc_data", "encodings", "turtledemo"}
    texts: dict[str, None] = {}
    for path in sorted(root.rglob("*.py")):
        if skipped.isdisjoint(path.relative_to(root).parts):
            try:
                nodes = list(ast.walk(ast.parse(path.read_text())))
            except (SyntaxError, UnicodeDecodeError):
                continue
            documented = (n for n in nodes if isinstance(n, ast.Module | ast.ClassDef | ast.FunctionDef))
            texts.update(dict.fromkeys(text for n in documented if (text := ast.get_docstring(n))))
    return list(texts)


def _join(texts: list[str]) -> np.ndarray:
    text = "\n\n\n".join(text.strip("\n") for text in texts if text) + "\n"
    return np.frombuffer(text.replace("\0", "").encode(), np.uint8)
