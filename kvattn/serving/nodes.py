"""The nodes of a radix tree of pages, and which of them was used longest ago."""

import heapq
import itertools
from collections.abc import Callable, Hashable, Iterator


class Node:
    """An edge of whole pages and what hangs below it.

    Attributes:
        edge: the tokens of the edge, int32 as bytes; none at a root only.
        columns: the page of every `page_size` tokens of the edge, one list per group of layers; -1: it has none.
        start: pages before the edge.
        parent: the node above; None: a root.
        children: nodes below by the first page of their edge.
        locks: how many locked matches go through the node.
        tick: when it was used last.
        alive: whether it is still in the tree.
    """

    __slots__ = ("alive", "children", "columns", "edge", "locks", "namespace", "parent", "start", "tick")

    def __init__(self, edge: bytes, columns: list[list[int]], start: int, parent: "Node | None", namespace: Hashable):
        self.edge = edge
        self.columns = columns
        self.start = start
        self.parent = parent
        self.namespace = namespace
        self.children: dict[bytes, Node] = {}
        self.locks = 0
        self.tick = 0
        self.alive = True

    @property
    def num_pages(self) -> int:
        """Pages of the edge, of each group."""
        return len(self.columns[0])

    @property
    def end(self) -> int:
        """Pages from the root to the end of the edge."""
        return self.start + len(self.columns[0])

    def up(self) -> Iterator["Node"]:
        """This node and those above it, without the root."""
        node = self
        while node.parent is not None:
            yield node
            node = node.parent

    def count(self, group: int) -> int:
        """Pages that a group has here."""
        return sum(page >= 0 for page in self.columns[group])

    def split(self, pages: int, size: int) -> "Node":
        """Cuts the edge after so many pages of `size` bytes; returns the upper part. This node ends where it did."""
        assert self.parent is not None
        upper = Node(
            self.edge[: pages * size], [c[:pages] for c in self.columns], self.start, self.parent, self.namespace
        )
        upper.locks = self.locks  # its tick comes with the use that it is cut for
        self.parent.children[self.edge[:size]] = upper
        self.edge = self.edge[pages * size :]
        self.columns = [column[pages:] for column in self.columns]
        self.start += pages
        self.parent = upper
        upper.children[self.edge[:size]] = self
        return upper


class Oldest:
    """Nodes of one kind, the one used longest ago first. What happened to a node since is seen when its turn comes.

    Args:
        wanted: whether a node is of the kind, now.
    """

    def __init__(self, wanted: Callable[[Node], bool]):
        self._wanted = wanted
        self._heap: list[tuple[int, int, Node]] = []
        self._members: set[Node] = set()
        self._number = itertools.count()
        self._room = 64

    def __contains__(self, node: Node) -> bool:
        return node in self._members

    def push(self, node: Node) -> None:
        """Says that a node may be of the kind from now on."""
        if node not in self._members and self._is_one(node):
            self._members.add(node)
            self._add(node)
            if len(self._heap) > self._room:  # nodes that are no longer there must not pile up
                self._members = {each for each in self._members if self._is_one(each)}
                self._heap = [entry for entry in self._heap if entry[2] in self._members]
                heapq.heapify(self._heap)
                self._room = 64 + 2 * len(self._heap)

    def pop(self) -> Node | None:
        """Takes out the one used longest ago; None: there is none."""
        while self._heap:
            tick, _, node = heapq.heappop(self._heap)
            if not self._is_one(node):
                self._members.discard(node)
            elif node.tick != tick:  # used since
                self._add(node)
            else:
                self._members.discard(node)
                return node
        return None

    def _is_one(self, node: Node) -> bool:
        return node.alive and node.parent is not None and self._wanted(node)

    def _add(self, node: Node) -> None:
        heapq.heappush(self._heap, (node.tick, next(self._number), node))


def common_pages(edge: bytes, text: bytes, size: int) -> int:
    """How many whole pages two texts share; the first is known to be the same."""
    low, high = 1, min(len(edge), len(text)) // size
    while low < high:
        middle = (low + high + 1) // 2
        if edge[: middle * size] == text[: middle * size]:
            low = middle
        else:
            high = middle - 1
    return low


def below(root: Node) -> Iterator[tuple[bytes, Node]]:
    """All nodes under a root, with the key each hangs by."""
    waiting = [root]
    while waiting:
        node = waiting.pop()
        for key, child in node.children.items():
            yield key, child
            waiting.append(child)
