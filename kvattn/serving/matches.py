"""What is found in a tree of prefixes, and what leaves it."""

from collections.abc import Hashable
from typing import NamedTuple

from kvattn.serving.nodes import Node

Page = int | tuple[int, ...]
"""What a tree stores for `page_size` tokens: a page, or with several groups of layers one per group."""


class Leaving(NamedTuple):
    """A text whose last pages are meant.

    Attributes:
        namespace: whose it is.
        text: its tokens, int32 as bytes.
        pages: the last ones, in order.
    """

    namespace: Hashable
    text: bytes
    pages: list[Page]


class Match:
    """What a tree has of a text.

    Attributes:
        length: tokens, whole pages.
        pages: the pages that hold them, in order. With several groups tuples of one page per group, -1 where a group
            with a window needs none.
    """

    __slots__ = ("_locks", "_node", "_tree", "length", "pages")

    def __init__(self, tree: object, node: Node, length: int, pages: list[Page]):
        self._tree = tree
        self._node = node
        self._locks = 0
        self.length = length
        self.pages = pages

    def __repr__(self) -> str:
        return f"Match(length={self.length}, pages={self.pages})"
