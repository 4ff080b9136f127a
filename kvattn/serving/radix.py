"""Which pages hold which text: a tree of token prefixes, without JAX.

RadixAttention's tree (Zheng et al., arXiv:2312.07104) over whole pages. Tokens are compared, never hashes, so a hit is
the text that was asked for. The tree counts no references: whoever inserts holds the pages (`BlockPool.hold`), whoever
evicts releases them.
"""

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence

import numpy as np
from jaxtyping import Integer

from kvattn.errors import BlockStateError, ConfigError, RangeError, ShapeError
from kvattn.serving import checks
from kvattn.serving.matches import Leaving, Match, Page
from kvattn.serving.nodes import Node, Oldest, below, common_pages

Tokens = Iterable[int] | Integer[np.ndarray, " S"]
"""Of a text, one after the other."""

NO_PAGE = -1


class RadixTree:
    """Finds the pages of the longest stored prefix of a text.

    Args:
        page_size: tokens per page.
        windows: one per group of layers that has page tables of its own: how many tokens its queries see, the own one
            included; None: all. A hit then is a prefix after which every group has the pages that the next query sees:
            those of a window only its last window - 1 tokens, so they may be gone before that.

    Raises:
        ConfigError, RangeError, DTypeError: a page size or window below 1, no group, no ints.

    >>> tree = RadixTree(page_size=2)
    >>> tree.insert([1, 2, 3, 4, 5], pages=[7, 8, 9])  # page 9 is not full: it is not kept
    0
    >>> hit = tree.match([1, 2, 3, 4, 5, 6])
    >>> hit.length, hit.pages
    (4, [7, 8])
    >>> tree.match_prompt([1, 2, 3, 4]).length  # one token is always computed: its logits are wanted
    2
    """

    def __init__(self, page_size: int, *, windows: Sequence[int | None] = (None,)):
        self.page_size = checks.integer("page_size", page_size, 1, ConfigError)
        self.windows = tuple(None if w is None else checks.integer("windows", w, 1) for w in windows)
        if not self.windows:
            raise ConfigError("windows must name one group of layers or more, got none.")
        self._page_bytes = self.page_size * checks.TOKEN_BYTES
        self._roots: dict[Hashable, Node] = {}
        self._tick = 0
        self._owned: list[set[int]] = [set() for _ in self.windows]
        self._locked = [0] * len(self.windows)
        self._leaves = Oldest(lambda node: not node.children and not node.locks)
        self._windowed = [
            None if window is None else Oldest(lambda node, g=g: not node.locks and node.count(g) > 0)
            for g, window in enumerate(self.windows)
        ]

    def __repr__(self) -> str:
        return f"RadixTree({self.num_pages} pages of {self.page_size}, {self.num_evictable} evictable)"

    # What it holds.

    @property
    def num_pages(self) -> int:
        """Pages in the tree, of the first group."""
        return self.count()

    @property
    def num_evictable(self) -> int:
        """Pages that `evict` could free now: those that no locked match needs; of the first group."""
        return self.evictable()

    def count(self, group: int = 0) -> int:
        """Pages in the tree, of a group."""
        return len(self._owned[self._group(group)])

    def evictable(self, group: int = 0) -> int:
        """Pages of a group that `evict` could free now."""
        return len(self._owned[self._group(group)]) - self._locked[group]

    # Finding.

    def match(self, tokens: Tokens, namespace: Hashable = "") -> Match:
        """The longest prefix that is stored, the whole text included; it counts as used now.

        Args:
            tokens: ids, or an array [S] of them.
            namespace: what keys and values depend on besides the tokens (tenant, adapter, salt, model): a string, or a
                tuple of strings. Nothing is ever found across namespaces.

        Raises:
            DTypeError: tokens that are no ints, a namespace that is no string.
            RangeError: a token that int32 does not hold.
        """
        text = self._text(tokens)
        root = self._roots.get(checks.namespace(namespace))
        path = [] if root is None else list(self._walk(root, text))
        good = self._good(path)
        last, pages = self._cut(path, good), []
        if last is not None:
            self._touch(last)
            pages = self._pages(last)
        return Match(self, last or self._nowhere(), good * self.page_size, pages)

    def peek(self, tokens: Tokens, namespace: Hashable = "") -> int:
        """The length of what `match` would find; nothing counts as used."""
        text, root = self._text(tokens), self._roots.get(checks.namespace(namespace))
        return 0 if root is None else self._good(list(self._walk(root, text))) * self.page_size

    def match_prompt(self, tokens: Sequence[int], namespace: Hashable = "") -> Match:
        """What a prompt may use: as `match`, but never all of it, since its last token's logits are wanted."""
        return self.match(tokens[:-1], namespace)

    # Storing.

    def insert(self, tokens: Tokens, pages: Sequence[Page], namespace: Hashable = "") -> int:
        """Stores the pages of a text; what is stored already keeps its pages.

        Args:
            tokens: ids, or an array [S] of them. Those after the last whole page are passed over.
            pages: that hold them, in order; one for an unfinished last page may be among them.
            namespace: see `match`.

        Returns:
            Tokens that were there already. The pages after them are the tree's now: hold them. Those before are the
            caller's as they were. (`adopt` says the same page by page.)

        Raises:
            DTypeError, RangeError: see `match`; a page that is no int, or negative.
            ShapeError: another number of pages than the tokens fill.
            BlockStateError: a page twice, or one that the tree holds for other tokens.
        """
        return self._store(tokens, pages, namespace)[0]

    def adopt(self, tokens: Tokens, pages: Sequence[Page], namespace: Hashable = "") -> list[Page]:
        """As `insert`, but gives the pages that are the tree's now: ``pool.hold(tree.adopt(tokens, pages))``.

        With several groups these are tuples with -1 where a group's page was not taken. A page of a window that had
        been evicted is taken again.
        """
        return self._store(tokens, pages, namespace)[1]

    # Keeping and letting go.

    def lock(self, match: Match) -> None:
        """Keeps the pages of a match from being evicted until `unlock`. A match may be locked several times.

        Raises:
            BlockStateError: pages of it have been evicted since it was found; a match of another tree.
        """
        node = self._own(match)
        if not node.alive or node.end * self.page_size != match.length or self._lacks(node, match.pages):
            raise BlockStateError(f"pages of {match!r} were evicted after it was found: match again.")
        match._locks += 1
        for each in node.up():
            each.locks += 1
            if each.locks == 1:
                self._count_locked(each, 1)

    def unlock(self, match: Match) -> None:
        """Takes one `lock` back.

        Raises:
            BlockStateError: it is not locked; a match of another tree.
        """
        node = self._own(match)
        if not match._locks:
            raise BlockStateError(f"{match!r} is not locked: every unlock needs a lock before it.")
        match._locks -= 1
        for each in node.up():
            each.locks -= 1
            if each.locks == 0:
                self._count_locked(each, -1)
                self._queue(each)
        self._prune(node)

    def evict(self, num_pages: int, *, group: int = 0, told: Callable[[Leaving], object] | None = None) -> list[Page]:
        """Frees the pages used longest ago, the ends of texts first; none that is locked.

        Args:
            num_pages: how many, of `group`.
            group: whose pages are wanted. From one with a window pages go wherever they are, and the text stays: it is
                found again where the window's pages are. From others go the ends of texts, in all groups.
            told: called with every end of a text before it goes, while its pages still hold it.

        Returns:
            The pages that left the tree, `num_pages` or as many as there are: release them. With several groups they
            are tuples, with -1 where nothing left.

        Raises:
            RangeError, DTypeError: a negative number, no such group, no int.
        """
        wanted = checks.integer("num_pages", num_pages, 0)
        queue = self._windowed[self._group(group)]
        freed: list[Page] = []
        while wanted > 0:
            node = (queue or self._leaves).pop()
            if node is None:
                break
            if queue is None:
                if told is not None:
                    told(self._leaving(node, wanted))
                gone = self._cut_end(node, wanted)
                wanted -= len(gone)
            else:
                gone = self._cut_window(node, group, wanted)
                wanted -= len(gone)
                self._prune(node)
            freed += gone
        return freed

    # Proof.

    def check(self) -> None:
        """Counts everything anew.

        Raises:
            BlockStateError: nodes, pages and locks contradict each other. That is a fault of kvattn.
        """
        owned: list[set[int]] = [set() for _ in self.windows]
        locked = [0] * len(self.windows)
        for namespace, root in self._roots.items():
            if root.edge or root.start or root.num_pages or not root.children or root.locks:
                raise BlockStateError(f"the root of namespace {namespace!r} is not one.")
            for key, node in below(root):
                self._check(key, node)
                for group, column in enumerate(node.columns):
                    pages = [page for page in column if page != NO_PAGE]
                    if len(set(pages)) != len(pages) or owned[group] & set(pages):
                        raise BlockStateError(f"pages {pages} of group {group} are in the tree twice.")
                    owned[group] |= set(pages)
                    locked[group] += len(pages) * (node.locks > 0)
        if owned != self._owned or locked != self._locked:
            raise BlockStateError(
                f"the tree counts {[len(s) for s in self._owned]} pages, {self._locked} of them locked; it has "
                f"{[len(s) for s in owned]}, {locked} of them locked."
            )

    def _check(self, key: bytes, node: Node) -> None:
        pages, size = node.num_pages, self._page_bytes
        above = node.parent
        if above is None or not node.alive or node.start != above.end or key != node.edge[:size]:
            raise BlockStateError(f"a node after {node.start} pages does not hang where it should.")
        if not pages or len(node.edge) != pages * size or any(len(column) != pages for column in node.columns):
            raise BlockStateError(f"an edge of {len(node.edge)} bytes has {[len(c) for c in node.columns]} pages.")
        if any(min(c) < 0 for c, w in zip(node.columns, self.windows, strict=True) if w is None):
            raise BlockStateError(f"a group without a window lacks pages: {node.columns}.")
        if node.locks < sum(child.locks for child in node.children.values()):
            raise BlockStateError(f"a node is locked {node.locks} times, fewer than those below it.")
        if not node.children:
            is_lost = not node.locks and node not in self._leaves
            if is_lost or max(column[-1] for column in node.columns) < 0:
                raise BlockStateError(f"a leaf after {node.start} pages cannot be evicted, or ends with nothing.")

    # Below.

    def _text(self, tokens: Tokens) -> bytes:
        """The whole pages of a text."""
        text = checks.tokens("tokens", tokens)
        return text[: len(text) // self._page_bytes * self._page_bytes]

    def _group(self, group: int) -> int:
        if checks.integer("group", group, 0) >= len(self.windows):
            raise RangeError(f"group must lie in [0, {len(self.windows)}), got {group}.")
        return group

    def _nowhere(self) -> Node:
        """Where a match of nothing ends."""
        return Node(b"", [[] for _ in self.windows], 0, None, "")

    def _own(self, match: Match) -> Node:
        if match._tree is not self:
            raise BlockStateError(f"{match!r} was found in another tree.")
        return match._node

    def _walk(self, root: Node, text: bytes) -> Iterator[tuple[Node, int]]:
        """The nodes along a text, each with how many pages of its edge are the text's."""
        node, at, size = root, 0, self._page_bytes
        while (child := node.children.get(text[at : at + size])) is not None:
            if not text.startswith(child.edge, at):
                yield child, common_pages(child.edge, text[at : at + len(child.edge)], size)
                return
            yield child, child.num_pages
            node, at = child, at + len(child.edge)

    def _good(self, path: list[tuple[Node, int]]) -> int:
        """After how many pages of a path every group has what the next query sees."""
        if self.windows == (None,):
            return path[-1][0].start + path[-1][1] if path else 0
        needs = [None if w is None else -(-(w - 1) // self.page_size) for w in self.windows]
        good, at, runs = 0, 0, [0] * len(needs)
        for node, matched in path:
            for i in range(matched):
                at += 1
                for g, column in enumerate(node.columns):
                    runs[g] = runs[g] + 1 if column[i] != NO_PAGE else 0
                if all(run >= (at if need is None else min(need, at)) for run, need in zip(runs, needs, strict=True)):
                    good = at
        return good

    def _cut(self, path: list[tuple[Node, int]], pages: int) -> Node | None:
        """The node of a path that ends after so many pages; one that ends later is split. None: the root."""
        for node, _ in path:
            if node.start < pages <= node.end:
                return self._split(node, pages - node.start)
        return None

    def _split(self, node: Node, pages: int) -> Node:
        """The node that ends after so many pages of an edge."""
        if pages == node.num_pages:
            return node
        upper = node.split(pages, self._page_bytes)
        self._queue(upper)
        return upper

    def _touch(self, node: Node) -> None:
        """A node and all above it are used now."""
        self._tick += 1
        for each in node.up():
            each.tick = self._tick

    def _queue(self, node: Node) -> None:
        for queue in (self._leaves, *self._windowed):
            if queue is not None:
                queue.push(node)

    def _count_locked(self, node: Node, sign: int) -> None:
        for group in range(len(self.windows)):
            self._locked[group] += sign * node.count(group)

    def _pages(self, node: Node) -> list[Page]:
        """The pages from the root to the end of a node; of windows those that the next query sees."""
        path = list(node.up())[::-1]
        columns = [[page for each in path for page in each.columns[g]] for g in range(len(self.windows))]
        for window, column in zip(self.windows, columns, strict=True):
            if window is not None:
                unseen = max(len(column) * self.page_size - (window - 1), 0) // self.page_size
                column[:unseen] = [NO_PAGE] * unseen
        return self._rows(columns)

    def _lacks(self, node: Node, pages: list[Page]) -> bool:
        """Whether pages of windows that a match had have been evicted; without windows texts lose their ends only."""
        return any(window is not None for window in self.windows) and self._pages(node) != pages

    def _rows(self, columns: list[list[int]]) -> list[Page]:
        """One entry per page of tokens, from a list per group."""
        return [*columns[0]] if len(columns) == 1 else [*zip(*columns, strict=True)]

    def _columns(self, count: int, pages: Sequence[Page]) -> list[list[int]]:
        """A list per group, from `count` entries or one more."""
        given = list(pages)
        if len(given) not in (count, count + 1):
            raise ShapeError(
                f"pages must be {count}, one for every {self.page_size} tokens (or one more, for an unfinished page), "
                f"got {len(given)}."
            )
        rows = [row if isinstance(row, tuple) else (row,) for row in given[:count]]
        if any(len(row) != len(self.windows) for row in rows):
            raise ShapeError(f"pages must be of {len(self.windows)} groups, one each, got {given[:count]}.")
        columns = []
        for group, window in enumerate(self.windows):
            column = [checks.integer("page", row[group], 0 if window is None else NO_PAGE) for row in rows]
            real = [page for page in column if page != NO_PAGE]
            if len(set(real)) != len(real):
                raise BlockStateError(f"pages names a page twice: {column}.")
            columns.append(column)
        return columns

    def _store(self, tokens: Tokens, pages: Sequence[Page], namespace: Hashable) -> tuple[int, list[Page]]:
        text = self._text(tokens)
        columns = self._columns(len(text) // self._page_bytes, pages)
        namespace = checks.namespace(namespace)
        root = self._roots.get(namespace)
        path = [] if root is None else list(self._walk(root, text))
        there = sum(matched for _, matched in path)
        taken = self._takes(path, there, columns)
        end = max((i + 1 for column in taken for i, page in enumerate(column) if page != NO_PAGE), default=0)
        # Everything is known to fit: from here on nothing can raise.
        last = self._cut(path, there)
        if last is not None:
            self._revive(last, taken)
        for group, column in enumerate(taken):
            self._owned[group].update(page for page in column if page != NO_PAGE)
        if end > there:
            if root is None:
                root = self._roots[namespace] = Node(b"", [[] for _ in self.windows], 0, None, namespace)
            size, above = self._page_bytes, last or root
            last = Node(text[there * size : end * size], [c[there:end] for c in columns], there, above, namespace)
            above.children[text[there * size : (there + 1) * size]] = last
        if last is not None:
            self._touch(last)
            for node in last.up():
                self._queue(node)
        rows = self._rows(taken)
        return there * self.page_size, [row for row in rows if row != NO_PAGE and row != (NO_PAGE,) * len(columns)]

    def _takes(self, path: list[tuple[Node, int]], there: int, columns: list[list[int]]) -> list[list[int]]:
        """Of the pages given, those that the tree has not for these tokens.

        Raises:
            BlockStateError: one of them is in the tree for others.
        """
        taken = []
        for group, column in enumerate(columns):
            has = [page for node, matched in path for page in node.columns[group][:matched]]
            new = [NO_PAGE if had != NO_PAGE else page for had, page in zip(has, column, strict=False)] + column[there:]
            for page in new:
                if page in self._owned[group]:
                    raise BlockStateError(f"page {page} of group {group} is in the tree already, for other tokens.")
            taken.append(new)
        return taken

    def _revive(self, last: Node, taken: list[list[int]]) -> None:
        """Puts pages where a window's have been evicted, up to the end of a node."""
        for node in last.up():
            for group, column in enumerate(node.columns):
                for i, page in enumerate(taken[group][node.start : node.end]):
                    if page != NO_PAGE:
                        column[i] = page
                        self._locked[group] += node.locks > 0

    def _cut_end(self, leaf: Node, count: int) -> list[Page]:
        """Takes so many pages from the end of a leaf, or all of it."""
        kept = max(leaf.num_pages - count, 0)
        gone = [column[kept:] for column in leaf.columns]
        self._disown(gone)
        if kept:
            leaf.edge = leaf.edge[: kept * self._page_bytes]
            leaf.columns = [column[:kept] for column in leaf.columns]
            self._queue(leaf)
        else:
            self._remove(leaf)
        return self._rows([column[::-1] for column in gone])

    def _leaving(self, leaf: Node, count: int) -> Leaving:
        """What `_cut_end` would take."""
        first = max(leaf.num_pages - count, 0)
        text = b"".join(node.edge for node in [*leaf.up()][::-1])
        return Leaving(leaf.namespace, text, self._rows([column[first:] for column in leaf.columns]))

    def leaves(self) -> Iterator[Leaving]:
        """Every text that is stored, with the pages of its last edge only: all edges, each once."""
        for root in self._roots.values():
            for _, node in below(root):
                yield self._leaving(node, node.num_pages)

    def _cut_window(self, node: Node, group: int, count: int) -> list[Page]:
        """Takes so many pages of one group from the start of an edge: what follows it needs its end."""
        gone = []
        for i, page in enumerate(node.columns[group]):
            if page != NO_PAGE and len(gone) < count:
                gone.append(page)
                node.columns[group][i] = NO_PAGE
        self._disown([gone if g == group else [] for g in range(len(self.windows))])
        self._queue(node)
        return self._rows([gone if g == group else [NO_PAGE] * len(gone) for g in range(len(self.windows))])

    def _prune(self, node: Node) -> None:
        """Cuts off the end of a text that has pages in no group, as texts may where all groups have windows."""
        if None in self.windows:
            return
        while node.alive and node.parent is not None and not node.children and not node.locks:
            end = max((i + 1 for column in node.columns for i, page in enumerate(column) if page != NO_PAGE), default=0)
            if end == node.num_pages:
                return
            above = node.parent
            self._cut_end(node, node.num_pages - end)
            node = above

    def _disown(self, columns: list[list[int]]) -> None:
        for owned, column in zip(self._owned, columns, strict=True):
            owned.difference_update(column)

    def _remove(self, leaf: Node) -> None:
        above = leaf.parent
        assert above is not None
        leaf.alive = False
        del above.children[leaf.edge[: self._page_bytes]]
        if above.parent is not None:
            self._queue(above)
        elif not above.children:
            del self._roots[above.namespace]
