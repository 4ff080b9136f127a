"""Bad input and edge cases of pools of blocks and of prefixes; rows are numbered as in bad_inputs.txt."""

import itertools
import random

import pytest
from bad_input_table import Table, run

from kvattn import errors
from kvattn.serving import BlockPool, GroupedPool, LayerGroup, RadixTree, checks


class Text(bytes):
    """Bytes whose parts all have one hash."""

    __hash__ = lambda self: 0
    __eq__ = bytes.__eq__

    def __getitem__(self, key):
        return Text(bytes.__getitem__(self, key))


TABLE = Table()
bad, defined = TABLE.bad, TABLE.defined


def pool(num_blocks=4, block_size=4, **sequences):
    """A pool that has these sequences."""
    made = BlockPool(num_blocks, block_size)
    for name, length in sequences.items():
        made.allocate(name, length)
    return made


def tree(*texts, page_size=2):
    """A tree that has these texts, with pages from 0 on."""
    made, numbers = RadixTree(page_size), itertools.count()
    for text in texts:
        made.insert(text, [next(numbers) for _ in range(len(text) // page_size)])
    return made


def unchanged(made, error, call):
    """The call raises, and everything one can ask for is as before."""
    ask = lambda: (
        [(seq, made.table(seq), made.length(seq)) for seq in made.sequences],
        [made.ref_count(block) for block in range(made.num_blocks)],
        made.usage(),
    )
    before = ask()
    with pytest.raises(error):
        call(made)
    made.check()
    assert ask() == before


# Pools of blocks ------------------------------------------------------------------------------------------------------

OUT, STATE, RANGE = errors.OutOfBlocksError, errors.BlockStateError, errors.RangeError
bad(81, "a prompt of more", OUT, "17 tokens", "need 5 blocks", "4 of 4 are free")(lambda: pool().allocate("a", 17))
bad(81, "a step of more", OUT, "9 more tokens", "need 3 blocks", "1 of 4")(lambda: pool(a=12).append("a", 9))
bad(82, "an unknown sequence", errors.UnknownSequenceError, "'b'")(lambda: pool(a=3).free("b"))
bad(82, "the block that is none is released", STATE, "-1")(lambda: pool(a=3).release([-1]))
bad(82, "the block that is none is held", STATE, "-1")(lambda: pool(a=3).hold([-1]))
bad(82, "the block that is none is a prefix", STATE, "-1")(lambda: pool(a=3).allocate("b", 9, prefix=[-1]))
bad(82, "a block that is not in the pool", RANGE, "[0, 4)", "got 4")(lambda: pool(a=3).hold([4]))
bad(82, "a negative number that is no block", RANGE, ">= -1", "-2")(lambda: pool(a=3).hold([-2]))
bad(82, "a block that is free", STATE, "block 3 is free")(lambda: pool(a=3).hold([3]))
bad(82, "a block of a sequence is released", STATE, "block 0", "held 0 times")(lambda: pool(a=3).release([0]))


@defined(82, "a sequence twice")
def _():
    made = pool(a=3)
    made.free("a")
    unchanged(made, errors.UnknownSequenceError, lambda p: p.free("a"))
    assert made.num_free == 4


@defined(83, "the same block twice in one release")
def _():
    made = pool(a=8)
    made.hold([0, 1])
    unchanged(made, STATE, lambda p: p.release([1, 0, 0]))
    made.hold([0])
    made.release([0, 0, 1])
    assert made.ref_count(0) == 1


bad(84, "a fork of an unknown sequence", errors.UnknownSequenceError, "'b'")(lambda: pool(a=3).fork("b", "c"))
bad(84, "a fork to a known one", errors.DuplicateSequenceError, "'b'")(lambda: pool(a=3, b=3).fork("a", "b"))
bad(84, "a fork to itself", errors.DuplicateSequenceError, "'a'")(lambda: pool(a=3).fork("a", "a"))
bad(84, "a second prompt", errors.DuplicateSequenceError, "'a'", "append")(lambda: pool(a=3).allocate("a", 1))


@defined(85, "one token more for a fork whose last block is partly full")
def _():
    made = pool(a=6)
    made.fork("a", "b")
    assert made.append("b") == [(1, 2)]
    assert (made.table("a"), made.table("b")) == ([0, 1], [0, 2]) and made.length("a") == 6
    assert made.append("a") == []  # nobody else has its last block by now
    assert made.append("b", 0) == []


@defined(86, "a copy on write without a free block")
def _():
    made = pool(a=6, b=8)
    made.fork("a", "c")
    unchanged(made, OUT, lambda p: p.append("c"))
    made.free("a")
    assert made.append("c") == []


@defined(87, "64 forks that end in any order")
def _():
    made = pool(num_blocks=200, a=6)
    names = [f"b{i}" for i in range(63)]
    for name in names:
        made.fork("a", name)
    for name in random.Random(1).sample(names, 63):
        made.append(name, 5)
    for name in random.Random(2).sample(["a", *names], 64):
        made.free(name)
        made.check()
    assert made.num_free == 200


@defined(88, "a sequence that ends while its blocks are read")
def _():
    made = pool(a=16)
    made.hold([2, 3])
    made.free("a")
    made.allocate("b", 8)
    assert set(made.table("b")) == {0, 1}
    unchanged(made, OUT, lambda p: p.append("b"))
    made.release([3])
    made.append("b")
    assert made.table("b")[2] == 3


bad(89, "a pool of no blocks", errors.ConfigError, "num_blocks must be >= 1, got 0")(lambda: BlockPool(0, 4))
bad(89, "blocks of no tokens", errors.ConfigError, "block_size must be >= 1, got 0")(lambda: BlockPool(4, 0))
bad(89, "pages of no tokens", errors.ConfigError, "page_size must be >= 1, got -1")(lambda: RadixTree(-1))
bad(89, "half a block", errors.DTypeError, "num_blocks", "4.0")(lambda: BlockPool(4.0, 4))
bad(89, "True blocks", errors.DTypeError, "num_blocks", "True")(lambda: BlockPool(True, 4))
bad(89, "a watermark of all blocks", errors.ConfigError, "[0, 1)", "1.0")(lambda: BlockPool(4, 4, watermark=1.0))
bad(89, "a watermark that is no number", errors.ConfigError, "'1'")(lambda: BlockPool(4, 4, watermark="1"))
bad(89, "a negative number of tokens", RANGE, "num_tokens must be >= 0, got -1")(lambda: pool().allocate("a", -1))
bad(89, "a float of tokens", errors.DTypeError, "num_tokens", "1.0")(lambda: pool(a=1).append("a", 1.0))
bad(89, "more forgotten than there is", RANGE, "<= 3", "got 4")(lambda: pool(a=3).forget("a", 4))
bad(89, "half a block forgotten", RANGE, "multiple", "got 3")(lambda: pool().allocate("a", 9, forgotten=3))
bad(89, "a prefix longer than the prompt", RANGE, "8 tokens", "num_tokens is 7")(
    lambda: pool(a=8).allocate("b", 7, prefix=[0, 1])
)
bad(89, "a prefix that is not full", STATE, "block 1", "3 of 4")(lambda: pool(a=7).allocate("b", 9, prefix=[0, 1]))
bad(89, "a prefix that is free", STATE, "block 2", "is free")(lambda: pool(a=7).allocate("b", 9, prefix=[0, 2]))
bad(89, "a prefix with a block twice", STATE, "twice", "[0, 0]")(lambda: pool(a=4).allocate("b", 9, prefix=[0, 0]))
bad(89, "groups of no layers", errors.ConfigError, "groups")(lambda: GroupedPool([], 4))
bad(89, "a window of no tokens", RANGE, "window must be >= 1, got 0")(lambda: LayerGroup(4, window=0))


@defined(89, "a pool of one block")
def _():
    made = pool(num_blocks=1, a=4)
    unchanged(made, OUT, lambda p: p.append("a"))
    made.free("a")
    made.allocate("b", 0)
    assert made.can_allocate(4) == "now" and made.can_allocate(5) == "never"
    made.append("b", 4)
    assert made.table("b") == [0]


for name in ("allocate", "append", "free", "table", "length", "forget"):
    more = {"allocate": (1,), "forget": (1,)}.get(name, ())
    bad(90, f"a list as the name in {name}", errors.DTypeError, "hashable", "['a']")(
        lambda name=name, more=more: getattr(pool(), name)(["a"], *more)
    )
bad(90, "a list as the name of a child", errors.DTypeError, "hashable")(lambda: pool(a=1).fork("a", []))
bad(90, "a list is looked for", errors.DTypeError, "hashable")(lambda: [] in pool())


@defined(90, "None, 0 and the empty string are three sequences")
def _():
    made = BlockPool(8, 4)
    for i, seq in enumerate([None, 0, "", (), "0"]):
        made.allocate(seq, i + 1)
    assert [made.length(seq) for seq in [None, 0, "", (), "0"]] == [1, 2, 3, 4, 5]


@defined(91, "a block that leaves a window and comes back to the same sequence")
def _():
    made = pool(num_blocks=2, a=8)
    made.forget("a", 4)
    made.append("a", 4)
    assert made.table("a") == [-1, 1, 0] and [made.ref_count(b) for b in (0, 1)] == [1, 1]
    made.forget("a", 4)
    made.fork("a", "b")
    assert made.table("b") == [-1, 1, 0]
    made.free("a")
    made.free("b")
    made.check()
    assert made.num_free == 2


@defined(92, "an exception within a call")
def _():
    class Name(str):
        left = 0

        def __hash__(self):
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt
            return str.__hash__(self)

    for call in (lambda p, name: p.allocate(name, 8, prefix=[0]), lambda p, name: p.fork("a", name)):
        for left in (1, 2):  # the first look-up, and the table that is written
            name = Name("b")
            name.left = left
            unchanged(pool(a=4), KeyboardInterrupt, lambda p, call=call, name=name: call(p, name))


# Prefixes -------------------------------------------------------------------------------------------------------------


@defined(93, "no tokens")
def _():
    made = tree([1, 2])
    assert made.insert([], []) == 0 and made.adopt([], []) == [] and made.insert([1], []) == 0
    hit = made.match([])
    assert (hit.length, hit.pages, made.match_prompt([]).length, made.num_pages) == (0, [], 0, 1)
    made.lock(hit)
    made.unlock(hit)
    made.check()


@defined(94, "texts longer than what is stored, and texts that part within an edge and within a page")
def _():
    made = tree([1, 2, 3, 4, 5, 6])
    lengths = {(1, 2, 3, 4, 5, 6, 7, 8): 6, (1, 2, 9, 9, 5, 6): 2, (1, 2, 3, 9): 2, (1, 9): 0, (1,): 0}
    assert {text: made.match(text).length for text in lengths} == lengths


@defined(95, "tokens that only look alike")
def _():
    made = tree([-1, -1], [-2, -2], [0, 0], [1, 1], [256, 256])
    assert [made.match([t, t]).pages for t in (-1, -2, 0, 1, 256, 2, -256)] == [[0], [1], [2], [3], [4], [], []]


for wrong in (True, False, 1.0, None, "1"):
    bad(95, f"{wrong!r} among tokens", errors.DTypeError, "tokens", repr(wrong), "at 1")(
        lambda wrong=wrong: tree([1, 1]).match([1, wrong])
    )
bad(95, "a text", errors.DTypeError, "tokens", "'a'")(lambda: tree([1, 1]).match("ab"))
bad(95, "no sequence", errors.DTypeError, "tokens", "3")(lambda: tree([1, 1]).match(3))
bad(95, "a token beyond int32", RANGE, "tokens must fit in int32", "2147483648")(lambda: tree().match([1, 2**31]))
bad(95, "a token below int32", RANGE, "-2147483649")(lambda: tree().insert([-(2**31) - 1, 0], [0]))


@defined(95, "arrays of floats, bools and rows")
def _():
    import numpy as np

    for wrong in (np.ones(2), np.ones(2, bool), np.ones((1, 2), int), np.array(["a"])):
        with pytest.raises(errors.DTypeError, match="vector of integers"):
            tree([1, 1]).match(wrong)
    with pytest.raises(errors.RangeError, match="int32"):
        tree([1, 1]).match(np.array([2**31]))


@defined(96, "texts whose hashes collide")
def _():
    """No hash decides: 10,000 texts of a page each are all told apart, and so are those of one hash."""
    made = RadixTree(2)
    texts = list(itertools.product(range(100), range(100)))
    for page, text in enumerate(texts):
        made.insert(text, [page])
    assert all(made.match(text).pages == [page] for page, text in enumerate(texts))
    assert made.match([100, 0]).length == 0

    plain = checks.tokens
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checks, "tokens", lambda name, values: Text(plain(name, values)))
        made = RadixTree(2)
        for page, text in enumerate(texts[:200]):
            made.insert(text, [page])
        assert all(made.match(text).pages == [page] for page, text in enumerate(texts[:200]))


@defined(97, "the same tokens in another namespace")
def _():
    made = RadixTree(2)
    names = ["", "tenant", ("tenant", "adapter"), ("tenant", "bfloat16"), ("tenant", "adapter", "rope"), ()]
    for page, name in enumerate(names):
        assert made.match([1, 2], name).length == 0
        assert made.insert([1, 2], [page], name) == 0
    assert [made.match([1, 2], name).pages for name in names] == [[page] for page in range(len(names))]


@defined(98, "namespaces that are the same once they are joined")
def _():
    made = RadixTree(2)
    made.insert([1, 2], [0], ("a", "b"))
    for name in (("ab", ""), ("", "ab"), "ab", ("ab",), ("a", "b", ""), "('a', 'b')"):
        assert made.match([1, 2], name).length == 0
    assert made.match([1, 2], ("a", "b")).length == 2


for wrong in (None, 7, ("a", 7), b"a", ["a"]):
    bad(97, f"{wrong!r} as a namespace", errors.DTypeError, "namespace", repr(wrong))(
        lambda wrong=wrong: tree([1, 1]).match([1, 1], wrong)
    )


@defined(99, "a prompt that is stored whole")
def _():
    made = tree([1, 2, 3, 4])
    assert made.match([1, 2, 3, 4]).length == 4
    assert made.match_prompt([1, 2, 3, 4]).length == 2
    assert made.match_prompt([1, 2, 3, 4, 5]).length == 4
    one = tree([1, 2, 3], page_size=1)
    assert [one.match_prompt([1, 2, 3][:length]).length for length in (0, 1, 2, 3)] == [0, 0, 1, 2]


@defined(100, "an eviction where all is locked")
def _():
    made = tree([1, 2, 3, 4])
    hit = made.match([1, 2, 3, 4])
    made.lock(hit)
    assert made.evict(5) == [] and made.num_evictable == 0 and made.num_pages == 2
    made.unlock(hit)
    assert made.evict(0) == [] and made.evict(5) == [1, 0]


bad(100, "a negative number to evict", RANGE, "num_pages must be >= 0, got -1")(lambda: tree([1, 2]).evict(-1))
bad(100, "a group that is not there", RANGE, "group", "got 1")(lambda: tree([1, 2]).evict(1, group=1))


@defined(101, "an unlock too many")
def _():
    made = tree([1, 2, 3, 4])
    hit, other = made.match([1, 2]), made.match([1, 2, 3, 4])
    made.lock(other)
    with pytest.raises(errors.BlockStateError, match="not locked"):
        made.unlock(hit)
    made.unlock(other)
    with pytest.raises(errors.BlockStateError, match="not locked"):
        made.unlock(other)
    made.check()
    assert made.num_evictable == 2


bad(101, "a match of another tree is unlocked", STATE, "another tree")(
    lambda: tree().unlock(tree([1, 2]).match([1, 2]))
)
bad(101, "a match of another tree is locked", STATE, "another tree")(lambda: tree().lock(tree([1, 2]).match([1, 2])))


@defined(102, "the same text twice, with other pages")
def _():
    """The first pages stay; the others are the caller's, who frees them once."""
    blocks, made = BlockPool(8, 2), RadixTree(2)
    for seq in "ab":  # two equal prompts that were computed beside each other
        blocks.allocate(seq, 4)
        blocks.hold(made.adopt([1, 2, 3, 4], blocks.table(seq)))
    assert made.match([1, 2, 3, 4]).pages == blocks.table("a")
    blocks.free("a")
    blocks.free("b")
    blocks.check()
    assert blocks.num_free == 6 and made.num_pages == 2


bad(102, "a page of other tokens", STATE, "page 0", "for other tokens")(lambda: tree([1, 2]).insert([3, 4], [0]))
bad(102, "a page twice", STATE, "twice")(lambda: tree().insert([1, 2, 3, 4], [5, 5]))
bad(102, "a page too few", errors.ShapeError, "pages must be 2", "got 1")(lambda: tree().insert([1, 2, 3, 4], [5]))
bad(102, "two pages too many", errors.ShapeError, "pages must be 1", "got 3")(lambda: tree().insert([1, 2], [5, 6, 7]))
bad(102, "a negative page", RANGE, "page must be >= 0, got -1")(lambda: tree().insert([1, 2], [-1]))
bad(102, "a page that is no int", errors.DTypeError, "page", "'5'")(lambda: tree().insert([1, 2], ["5"]))


@defined(103, "a text that was evicted and comes back, a page that holds another text by now")
def _():
    made = tree([1, 2, 3, 4])
    made.insert([1, 2, 5, 6], [0, 2])
    assert made.num_pages == 3
    old = made.match([1, 2, 3, 4])
    made.match([1, 2, 5, 6])
    assert made.evict(1) == [1]
    made.insert([7, 8], [1])
    assert made.match([1, 2, 3, 4]).pages == [0] and made.match([7, 8]).pages == [1]
    with pytest.raises(errors.BlockStateError, match="match again"):
        made.lock(old)
    made.insert([1, 2, 3, 4], [0, 9])
    assert made.match([1, 2, 3, 4]).pages == [0, 9]
    made.check()


@pytest.mark.parametrize("row", TABLE.parameters(wrong_types=["arrays of floats, bools and rows"]))
def test_rows(row):
    run(row)


def test_numbers():
    assert TABLE.numbers() == set(range(81, 104))
