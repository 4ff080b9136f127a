"""Plain models of the memory manager: lists, sets and dictionaries that are searched from end to end.

`PoolMachine` and `TreeMachine` do one operation on the real thing and on its model, and hold the two to each other
after each. Tests draw the operations, at random or with hypothesis.
"""

import collections
import pickle

import pytest

from kvattn import errors
from kvattn.serving import BlockPool, RadixTree

POISON = "poison"
"""What lies in a block that was free: no sequence may read it."""


class PlainBlock:
    """A block by its identity; which number it has is found out when it is first seen."""

    number = None


class PlainPool:
    """What `BlockPool` should do: references are counted by looking at everything."""

    def __init__(self, num_blocks, block_size):
        self.num_blocks, self.block_size = num_blocks, block_size
        self.blocks = {}  # of a sequence: its blocks, None where they are forgotten
        self.texts = {}  # of a sequence: its tokens
        self.held = []

    def refs(self, block):
        return sum(each is block for blocks in [*self.blocks.values(), self.held] for each in blocks)

    def used(self):
        return {each for blocks in [*self.blocks.values(), self.held] for each in blocks if each is not None}

    def free_blocks(self):
        return self.num_blocks - len(self.used())

    def fill(self, block):
        """Tokens in a block, from any sequence that has it; held ones remember."""
        for seq, blocks in self.blocks.items():
            if block in blocks:
                return min(len(self.texts[seq]) - blocks.index(block) * self.block_size, self.block_size)
        return block.fill

    def full(self):
        return [b for b in self.used() if self.fill(b) == self.block_size]

    def cost(self, seq, count):
        """Blocks that so many more tokens take, and whether the last one is copied."""
        blocks, length = self.blocks[seq], len(self.texts[seq])
        copied = bool(length % self.block_size and count and self.refs(blocks[-1]) > 1)
        return -(-(length + count) // self.block_size) - len(blocks) + copied, copied

    def allocate(self, seq, text, prefix, forgotten):
        need = -(-len(text) // self.block_size) - len(prefix) - forgotten
        if need > self.free_blocks():
            raise errors.OutOfBlocksError
        self.texts[seq] = list(text)
        self.blocks[seq] = [None] * forgotten + list(prefix) + [PlainBlock() for _ in range(need)]

    def append(self, seq, text):
        need, copied = self.cost(seq, len(text))
        if need > self.free_blocks():
            raise errors.OutOfBlocksError
        if copied:
            self.remember(self.blocks[seq][-1])
            self.blocks[seq][-1] = PlainBlock()
        self.texts[seq] += text
        missing = -(-len(self.texts[seq]) // self.block_size) - len(self.blocks[seq])
        self.blocks[seq] += [PlainBlock() for _ in range(missing)]

    def fork(self, parent, child):
        self.blocks[child], self.texts[child] = list(self.blocks[parent]), list(self.texts[parent])

    def remember(self, block):
        if block is not None:
            block.fill = self.fill(block)

    def free(self, seq):
        for block in self.blocks[seq]:
            self.remember(block)
        del self.blocks[seq], self.texts[seq]

    def forget(self, seq, count):
        for column in range(count // self.block_size):
            self.remember(self.blocks[seq][column])
            self.blocks[seq][column] = None


class PoolMachine:
    """A pool, its model, and a device: tokens are written where tables say, and read from there."""

    def __init__(self, num_blocks=10, block_size=3, watermark=0.0):
        self.pool = BlockPool(num_blocks, block_size, watermark=watermark)
        self.plain = PlainPool(num_blocks, block_size)
        self.device = [[POISON] * block_size for _ in range(num_blocks)]
        self.tokens = iter(range(10**9))

    def new_text(self, count):
        return [next(self.tokens) for _ in range(count)]

    def allocate(self, seq, count, prefix=(), forgotten=0):
        """`prefix`: plain blocks. What they hold is the beginning of the text, so it is read from the device."""
        shared = [token for block in prefix for token in self.device[block.number]]
        skipped = [None] * (forgotten * self.plain.block_size)
        text = skipped + shared + self.new_text(count - len(shared) - len(skipped))
        numbers = [block.number for block in prefix]
        self.both(
            lambda: self.plain.allocate(seq, text, prefix, forgotten),
            lambda: self.pool.allocate(seq, count, prefix=numbers, forgotten=forgotten * self.plain.block_size),
        )
        self.write(seq, len(skipped) + len(shared))

    def append(self, seq, count):
        length = len(self.plain.texts[seq])
        source = self.plain.blocks[seq][-1:]
        _, copied = self.plain.cost(seq, count)
        text = self.new_text(count)
        copies = self.both(lambda: self.plain.append(seq, text), lambda: self.pool.append(seq, count))
        if copies is not None:
            assert len(copies) == copied and [s for s, _ in copies] == [b.number for b in source if copied]
            for source_number, target in copies:
                self.device[target] = list(self.device[source_number])
            self.write(seq, length)

    def fork(self, parent, child):
        self.pool.fork(parent, child)
        self.plain.fork(parent, child)

    def free(self, seq):
        self.pool.free(seq)
        self.plain.free(seq)

    def forget(self, seq, count):
        gain = self.pool.forget_gain(seq, count)
        before = self.pool.num_free
        self.pool.forget(seq, count)
        assert self.pool.num_free == before + gain
        self.plain.forget(seq, count)

    def hold(self, blocks):
        for block in blocks:
            self.plain.remember(block)
        self.pool.hold([block.number for block in blocks])
        self.plain.held += blocks

    def release(self, blocks):
        self.pool.release([block.number for block in blocks])
        for block in blocks:
            self.plain.held.remove(block)

    def refused(self, error, call):
        """A call that must raise, and change nothing."""
        before = pickle.dumps(self.pool)
        with pytest.raises(error) as caught:
            call(self.pool)
        assert type(caught.value) is error
        assert pickle.dumps(self.pool) == before

    def both(self, plain, real):
        """The model's errors are the pool's."""
        try:
            plain()
        except errors.OutOfBlocksError:
            before = pickle.dumps(self.pool)
            with pytest.raises(errors.OutOfBlocksError):
                real()
            assert pickle.dumps(self.pool) == before
            return None
        return real()

    def write(self, seq, start):
        """Puts the tokens from `start` on into the blocks that the table names."""
        if seq in self.plain.texts:
            table, size = self.pool.table(seq), self.plain.block_size
            for position in range(start, len(self.plain.texts[seq])):
                self.device[table[position // size]][position % size] = self.plain.texts[seq][position]

    def check(self):
        """Everything that must hold, from the public side, and the pool's own count."""
        pool, plain, size = self.pool, self.plain, self.plain.block_size
        pool.check()
        assert pool.sequences == list(plain.texts)
        for seq, blocks in plain.blocks.items():
            table = pool.table(seq)
            assert pool.length(seq) == len(plain.texts[seq])
            assert len(table) == len(blocks) == -(-pool.length(seq) // size)
            for block, number in zip(blocks, table, strict=True):
                assert (number == -1) == (block is None)
                if block is not None:
                    block.number = number if block.number is None else block.number
                    assert block.number == number
            seen = [x for number in table if number >= 0 for x in self.device[number]]
            first = sum(block is None for block in blocks) * size
            assert seen[: len(plain.texts[seq]) - first] == plain.texts[seq][first:]
        counts = collections.Counter(b for blocks in [*plain.blocks.values(), plain.held] for b in blocks if b)
        refs = {block.number: count for block, count in counts.items()}
        assert len(refs) == len(counts) == pool.num_blocks - pool.num_free
        for number in range(pool.num_blocks):
            assert pool.ref_count(number) == refs.get(number, 0)
            if number not in refs:
                self.device[number] = [POISON] * size


class PlainTree:
    """What `RadixTree` should do: every prefix of whole pages is an entry, and everything is searched.

    Entries are [pages of the groups, tick], by namespace and tokens.
    """

    def __init__(self, page_size, windows):
        self.page_size, self.windows = page_size, windows
        self.entries = {}
        self.locks = collections.Counter()
        self.tick = 0

    def prefixes(self, namespace, text):
        ends = range(self.page_size, len(text) + 1, self.page_size)
        return [(namespace, tuple(text[:end])) for end in ends]

    def is_locked(self, key):
        namespace, text = key
        return any(ns == namespace and locked[: len(text)] == text for ns, locked in self.locks)

    def is_leaf(self, key):
        namespace, text = key
        return not any(ns == namespace and len(t) > len(text) and t[: len(text)] == text for ns, t in self.entries)

    def pages(self, group):
        return [entry[0][group] for entry in self.entries.values() if entry[0][group] >= 0]

    def evictable(self, group):
        return sum(e[0][group] >= 0 and not self.is_locked(key) for key, e in self.entries.items())

    def visible(self, group, length):
        """Pages, from the start, that no query after `length` tokens sees."""
        window = self.windows[group]
        return 0 if window is None else max(length - (window - 1), 0) // self.page_size

    def match(self, namespace, text):
        """Length and rows of pages."""
        stored = []
        for key in self.prefixes(namespace, text):
            if key not in self.entries:
                break
            stored.append(key)
        for count in range(len(stored), 0, -1):
            rows = [list(self.entries[key][0]) for key in stored[:count]]
            skipped = [self.visible(g, count * self.page_size) for g in range(len(self.windows))]
            if all(rows[i][g] >= 0 for g, skip in enumerate(skipped) for i in range(skip, count)):
                self.touch(stored[:count])
                for g, skip in enumerate(skipped):
                    for row in rows[:skip]:
                        row[g] = -1
                return count * self.page_size, [tuple(row) for row in rows]
        return 0, []

    def touch(self, keys):
        self.tick += 1
        for key in keys:
            self.entries[key][1] = self.tick

    def insert(self, namespace, text, rows):
        """Tokens that were there, and rows of what was taken."""
        keys = self.prefixes(namespace, text)
        there, taken = 0, []
        for key, row in zip(keys, rows, strict=False):
            if key in self.entries:
                there += self.page_size
                old = self.entries[key][0]
                row = tuple(-1 if had >= 0 else page for had, page in zip(old, row, strict=True))
                self.entries[key][0] = tuple(max(had, new) for had, new in zip(old, row, strict=True))
            else:
                self.entries[key] = [tuple(row), 0]
            taken.append(tuple(row))
        self.touch(keys)
        self.prune()
        return there, [row for row in taken if max(row) >= 0]

    def prune(self):
        """Ends of texts without pages of any group are no entries."""
        while empty := [
            key for key, e in self.entries.items() if max(e[0]) < 0 and self.is_leaf(key) and not self.is_locked(key)
        ]:
            for key in empty:
                del self.entries[key]

    def evict_one(self):
        """The end of a text that was used longest ago; None: all are locked."""
        ends = [key for key in self.entries if self.is_leaf(key) and not self.is_locked(key)]
        return self.entries.pop(min(ends, key=lambda key: self.entries[key][1]))[0] if ends else None


class TreeMachine:
    """A tree and its model."""

    def __init__(self, page_size=2, windows=(None,)):
        self.tree = RadixTree(page_size, windows=windows)
        self.plain = PlainTree(page_size, windows)
        self.numbers = iter(range(10**9))
        self.locked = []

    def rows(self, pages):
        return [page if isinstance(page, tuple) else (page,) for page in pages]

    def given(self, rows):
        return [row[0] for row in rows] if len(self.plain.windows) == 1 else rows

    def new_rows(self, count, missing=lambda: False):
        groups = self.plain.windows
        return [tuple(-1 if w and missing() else next(self.numbers) for w in groups) for _ in range(count)]

    def match(self, text, namespace=""):
        found = self.tree.match(text, namespace)
        length, rows = self.plain.match(namespace, text)
        assert (found.length, self.rows(found.pages)) == (length, rows)
        return found, (namespace, tuple(text[:length]))

    def match_prompt(self, text, namespace=""):
        found = self.tree.match_prompt(text, namespace)
        length, rows = self.plain.match(namespace, text[:-1])
        assert (found.length, self.rows(found.pages)) == (length, rows)
        assert not text or found.length < len(text)

    def insert(self, text, rows, namespace="", adopt=True):
        there, taken = self.plain.insert(namespace, text, rows)
        if adopt:
            assert self.rows(self.tree.adopt(text, self.given(rows), namespace)) == taken
        else:
            assert self.tree.insert(text, self.given(rows), namespace) == there

    def lock(self, text, namespace=""):
        found, key = self.match(text, namespace)
        self.tree.lock(found)
        self.plain.locks[key] += 1
        self.locked.append((found, key))

    def unlock(self, index):
        found, key = self.locked.pop(index)
        self.tree.unlock(found)
        self.plain.locks[key] -= 1
        self.plain.locks += collections.Counter()  # without those at 0
        self.plain.prune()

    def evict(self, count, group=0):
        plain, expected = self.plain, min(count, self.plain.evictable(group))
        if plain.windows[group] is None:
            rows = [row for _ in range(count) if (row := plain.evict_one()) is not None]
            assert self.rows(self.tree.evict(count, group=group)) == rows
            assert len(rows) == expected
            return rows
        rows = self.rows(self.tree.evict(count, group=group))
        gone = [row[group] for row in rows]
        assert len(gone) == expected and all(page < 0 for row in rows for g, page in enumerate(row) if g != group)
        ticks = {e[0][group]: (e[1], self.plain.is_locked(key)) for key, e in plain.entries.items()}
        assert not any(ticks[page][1] for page in gone)
        kept = [tick for page, (tick, locked) in ticks.items() if page >= 0 and not locked and page not in gone]
        assert max((ticks[page][0] for page in gone), default=0) <= min(kept, default=10**9)
        for entry in plain.entries.values():
            if entry[0][group] in gone:
                entry[0] = tuple(-1 if g == group else page for g, page in enumerate(entry[0]))
        plain.prune()
        return rows

    def refused(self, error, call):
        """A call that must raise, and change nothing."""
        before = self.state()
        with pytest.raises(error) as caught:
            call(self.tree)
        assert type(caught.value) is error
        assert self.state() == before

    def state(self):
        """Every node of the tree, and what it counts."""

        def below(node):
            children = {key: below(child) for key, child in node.children.items()}
            return (node.edge, node.columns, node.start, node.locks, node.tick, children)

        tree = self.tree
        return {ns: below(root) for ns, root in tree._roots.items()}, pickle.dumps((tree._owned, tree._locked))

    def check(self):
        tree, plain = self.tree, self.plain
        tree.check()
        for group in range(len(plain.windows)):
            assert tree.count(group) == len(plain.pages(group)) == len(set(plain.pages(group)))
            assert tree.evictable(group) == plain.evictable(group)
