"""The text the byte model learns from: the documentation that every CPython carries (`pydoc_data.topics`)."""

from pydoc_data.topics import topics

import numpy as np

HELD_OUT = ("booleans", "calls", "comparisons", "global", "shifting")
"""Topics for validation, about 5 %. The demos take their prompts from them."""


def split() -> tuple[np.ndarray, np.ndarray]:
    """Training and validation text, uint8.

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
    return _join(train), _join(valid)


def _join(texts: list[str]) -> np.ndarray:
    text = "\n\n\n".join(text.strip("\n") for text in texts if text) + "\n"
    return np.frombuffer(text.encode(), np.uint8)
