"""The tree of prefixes against a dictionary of all prefixes that is searched from end to end."""

import random

import hypothesis
import hypothesis.stateful as stateful
import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest
from serving_models import TreeMachine

from kvattn import errors
from kvattn.serving import RadixTree

FULL_RUN = pytest.mark.slow
NAMESPACES = ["", "x", ("x", ""), ("", "x")]
TREES = [(1, (None,)), (2, (None,)), (2, (None, 4)), (3, (None, 1, 7)), (2, (3,)), (1, (5, 2))]

# Random operations ----------------------------------------------------------------------------------------------------


def a_text(rng, size):
    """Few tokens and short texts, so that prefixes meet."""
    return [rng.randint(0, 1) for _ in range(rng.randint(0, 6 * size + size - 1))]


def one_operation(machine, rng):
    """Draws an operation, right or wrong, and does it."""
    plain, size = machine.plain, machine.plain.page_size
    what = rng.choice(["match", "prompt", "insert", "insert", "lock", "unlock", "evict", "wrong"])
    text, namespace = a_text(rng, size), rng.choice(NAMESPACES[: rng.choice([1, 1, 4])])
    if what == "match":
        machine.match(text, namespace)
    elif what == "prompt":
        machine.match_prompt(text, namespace)
    elif what == "insert" and len(plain.entries) < 40:
        gone = rng.random() * 0.8
        rows = machine.new_rows(len(text) // size, lambda: rng.random() < gone)
        machine.insert(text, rows, namespace, adopt=rng.random() < 0.5 or len(plain.windows) > 1)
    elif what == "lock" and len(machine.locked) < 4:
        machine.lock(text, namespace)
    elif what == "unlock" and machine.locked:
        machine.unlock(rng.randrange(len(machine.locked)))
    elif what == "evict":
        machine.evict(rng.choice([0, 1, 2, 3, 5, 50]), rng.randrange(len(plain.windows)))
    elif what == "wrong":
        machine.refused(*wrong_call(machine, rng, text, namespace))


def wrong_call(machine, rng, text, namespace):
    """An error, and a call that raises it."""
    plain, size = machine.plain, machine.plain.page_size
    calls = [
        (errors.DTypeError, lambda t: t.match([*text, True], namespace)),
        (errors.DTypeError, lambda t: t.match(text, 7)),
        (errors.RangeError, lambda t: t.match([*text, 2**31], namespace)),
        (errors.RangeError, lambda t: t.evict(-1)),
        (errors.RangeError, lambda t: t.evict(1, group=len(plain.windows))),
        (errors.ShapeError, lambda t: t.insert([0] * size * 3, machine.given(machine.new_rows(2)), namespace)),
    ]
    pages = plain.pages(0)
    if pages:
        other, twice = machine.new_rows(1), machine.new_rows(2)
        taken = [(rng.choice(pages), *other[0][1:])]
        twice = [twice[0], (twice[0][0], *twice[1][1:])]
        calls += [
            (errors.BlockStateError, lambda t: t.insert([9] * size, machine.given(taken), namespace)),
            (errors.BlockStateError, lambda t: t.insert([9] * size * 2, machine.given(twice), namespace)),
        ]
    calls.append((errors.BlockStateError, lambda t: t.unlock(RadixTree(size).match([]))))
    return rng.choice(calls)


@pytest.mark.parametrize("count", [5000, pytest.param(90_000, marks=FULL_RUN)])
@pytest.mark.parametrize(("page_size", "windows"), TREES)
def test_random_operations(page_size, windows, count):
    """After each, what is found, evicted, locked and counted is the model's."""
    rng = random.Random(f"{page_size} {windows} {count}")
    machine = TreeMachine(page_size, windows)
    for _ in range(count):
        one_operation(machine, rng)
        machine.check()
        machine.match(a_text(rng, page_size))
    while machine.locked:
        machine.unlock(0)
    for group, window in enumerate(windows):
        machine.evict(10**6, group)
        assert machine.tree.count(group) == 0 or window is not None
    machine.check()


class TreeRules(stateful.RuleBasedStateMachine):
    """The same, drawn by hypothesis, which shrinks what fails."""

    sizes = (2, (None,))

    def __init__(self):
        super().__init__()
        self.machine = TreeMachine(*self.sizes)

    texts = st.lists(st.integers(0, 1), max_size=9)
    namespaces = st.sampled_from(NAMESPACES)

    @stateful.rule(text=texts, namespace=namespaces)
    def match(self, text, namespace):
        self.machine.match(text, namespace)
        self.machine.match_prompt(text, namespace)

    @stateful.rule(text=texts, namespace=namespaces, gone=st.integers(0, 2**8 - 1))
    def insert(self, text, namespace, gone):
        bits = iter(f"{gone:0999b}"[::-1])
        rows = self.machine.new_rows(len(text) // self.sizes[0], lambda: next(bits) == "1")
        self.machine.insert(text, rows, namespace)

    @stateful.rule(text=texts, namespace=namespaces)
    def lock(self, text, namespace):
        self.machine.lock(text, namespace)

    @stateful.precondition(lambda self: self.machine.locked)
    @stateful.rule(data=st.data())
    def unlock(self, data):
        self.machine.unlock(data.draw(st.integers(0, len(self.machine.locked) - 1)))

    @stateful.rule(count=st.integers(0, 9), group=st.integers(0, 1))
    def evict(self, count, group):
        self.machine.evict(count, group % len(self.sizes[1]))

    @stateful.rule(text=texts, namespace=namespaces, seed=st.integers(0, 99))
    def wrong(self, text, namespace, seed):
        self.machine.refused(*wrong_call(self.machine, random.Random(seed), text, namespace))

    @stateful.invariant()
    def holds(self):
        self.machine.check()


class WindowedTreeRules(TreeRules):
    sizes = (1, (None, 3))


@pytest.mark.parametrize("examples", [50, pytest.param(500, marks=FULL_RUN)])
@pytest.mark.parametrize("rules", [TreeRules, WindowedTreeRules])
def test_rules(rules, examples):
    """Fifty steps each."""
    steps = hypothesis.settings(max_examples=examples, stateful_step_count=50)
    stateful.run_state_machine_as_test(rules, settings=steps)


# Texts ----------------------------------------------------------------------------------------------------------------


def stored(text, page_size=2, **settings):
    tree = RadixTree(page_size, **settings)
    tree.insert(text, list(range(len(text) // page_size)))
    return tree


@pytest.mark.parametrize(
    ("text", "length"),
    [
        ([], 0),
        ([1, 2, 3, 4, 5, 6], 6),
        ([1, 2, 3, 4, 5, 6, 7, 8, 9], 6),
        ([1, 2, 3], 2),  # within a page
        ([1, 2, 3, 4], 4),  # within an edge
        ([1, 2, 3, 9], 2),  # parts within a page
        ([1, 2, 9, 9, 5, 6], 2),  # parts within an edge
        ([2, 1], 0),
    ],
)
def test_the_longest_prefix_of_whole_pages(text, length):
    found = stored([1, 2, 3, 4, 5, 6]).match(text)
    assert (found.length, found.pages) == (length, list(range(length // 2)))


def test_a_prompt_is_never_found_whole():
    """The logits of its last token are wanted, so that one is computed: its page too."""
    for page_size in (1, 2, 3):
        tree = stored(list(range(12)), page_size)
        for length in range(13):
            hit = tree.match_prompt(list(range(length)))
            assert hit.length == max(length - 1, 0) // page_size * page_size
            assert tree.match(list(range(length))).length == length // page_size * page_size


@pytest.mark.wrong_types  # integers of NumPy and of JAX, which count as well
@pytest.mark.parametrize("make", [list, tuple, iter, np.array, jnp.array, lambda x: np.array(x, np.uint8), bytes])
def test_tokens_of_any_kind(make):
    tree = stored([1, 2, 3, 4])
    assert tree.match(make([1, 2, 3, 4])).length == 4
    assert tree.match([np.int64(1), 2]).length == 2


def test_extreme_tokens_are_told_apart():
    tokens = [-(2**31), -2, -1, 0, 1, 2**31 - 1, 256, 65536, 2**24]
    tree = RadixTree(1)
    for page, token in enumerate(tokens):
        assert tree.insert([token], [page]) == 0
    assert [tree.match([token]).pages for token in tokens] == [[page] for page in range(len(tokens))]


@pytest.mark.parametrize("lookups", [10_000, pytest.param(100_000, marks=FULL_RUN)])
def test_nothing_is_found_across_namespaces(lookups):
    """And within one there are hits."""
    rng = random.Random(0)
    tree, owner = RadixTree(1), {}
    names = [(a, b) for a in ("", "a", "ab", "b") for b in ("", "a", "ab", "b")] + ["", "a", "ab", "abb"]
    for page in range(0, 4000, 4):
        namespace = rng.choice(names)
        text = [rng.randint(0, 2) for _ in range(4)]
        pages = tree.adopt(text, range(page, page + 4), namespace)
        owner.update(dict.fromkeys(pages, namespace))
    hits = 0
    for _ in range(lookups // 4):
        text = [rng.randint(0, 2) for _ in range(5)]
        for namespace in rng.sample(names, 4):
            pages = tree.match(text, namespace).pages
            hits += len(pages)
            assert all(owner[page] == namespace for page in pages)
    assert hits > lookups / 10


def test_equal_prompts_keep_the_first_pages():
    tree = RadixTree(2)
    assert tree.insert([1, 2, 3, 4], [0, 1]) == 0
    assert tree.insert([1, 2, 3, 4, 5, 6], [7, 8, 9]) == 4
    assert tree.match([1, 2, 3, 4, 5, 6]).pages == [0, 1, 9]
    assert tree.adopt([1, 2, 3, 4, 5, 6, 7], [0, 1, 9, 3]) == []  # the same again, with an unfinished page
    assert tree.num_pages == 3


def test_a_page_of_evicted_tokens_may_hold_others():
    tree = stored([1, 2, 3, 4])
    assert tree.evict(9) == [1, 0]
    assert tree.num_pages == 0 and tree.match([1, 2, 3, 4]).length == 0
    tree.insert([5, 6, 7, 8], [1, 0])
    assert tree.match([1, 2, 3, 4]).length == 0
    assert tree.match([5, 6, 7, 8]).pages == [1, 0]


# Keeping and letting go -----------------------------------------------------------------------------------------------


def test_the_ends_of_texts_used_longest_ago_leave_first():
    tree = RadixTree(1)
    tree.insert([1, 2, 3], [0, 1, 2])
    tree.insert([1, 2, 4], [0, 1, 3])
    tree.insert([9], [4])
    tree.match([1, 2, 3])
    assert tree.evict(1) == [3]
    assert tree.evict(3) == [4, 2, 1]
    assert tree.evict(3) == [0]
    assert tree.evict(3) == []


def test_a_part_of_an_edge_that_is_used_stays():
    """Only as many pages leave as are wanted, the end of the edge first; and what was read is younger than the rest."""
    tree = stored(list(range(12)))
    tree.insert([50, 51], [50])
    tree.match([0, 1, 2, 3])
    assert tree.evict(2) == [5, 4]
    assert tree.evict(2) == [3, 2]
    assert tree.evict(1) == [50]
    assert tree.match(list(range(12))).pages == [0, 1]


def test_what_is_locked_stays():
    tree = stored([1, 2, 3, 4, 5, 6])
    hit = tree.match([1, 2, 3, 4])
    tree.lock(hit)
    assert (tree.num_pages, tree.num_evictable) == (3, 1)
    assert tree.evict(9) == [2] and tree.evict(9) == []
    tree.insert([1, 2, 3, 4, 7, 8], [0, 1, 9])
    tree.lock(hit)
    tree.unlock(hit)
    assert tree.evict(9) == [9]
    tree.unlock(hit)
    assert tree.num_evictable == 2 and tree.evict(9) == [1, 0]


def test_a_locked_match_survives_splits_above_and_below():
    tree = stored(list(range(16)))
    hit = tree.match(list(range(12)))
    tree.lock(hit)
    tree.match([0, 1, 2, 3])
    tree.insert([0, 1, 2, 3, 4, 5, 99, 98], [0, 1, 2, 90])
    assert tree.num_evictable == 2 + 1
    tree.check()
    tree.unlock(hit)
    assert tree.num_evictable == tree.num_pages == 9


def test_a_match_whose_pages_were_evicted_cannot_be_locked():
    """It would name pages that are others' by now."""
    for again in (False, True):
        tree = stored([1, 2, 3, 4])
        hit = tree.match([1, 2, 3, 4])
        tree.evict(1)
        if again:
            tree.insert([1, 2, 3, 4], [0, 8])
        with pytest.raises(errors.BlockStateError, match="match again"):
            tree.lock(hit)
        assert tree.num_evictable == tree.num_pages


def test_nothing_piles_up():
    """Nodes that are gone leave nothing behind, whatever is never evicted from."""
    tree = RadixTree(1, windows=(None, 4))
    for i in range(5_000):
        tree.insert([i % 7, i], [(2 * i, 2 * i), (2 * i + 1, 2 * i + 1)])
        tree.evict(max(tree.num_pages - 20, 0))
    assert tree.num_pages == 20
    assert max(len(queue._heap) for queue in (tree._leaves, tree._windowed[1])) < 200
    tree.evict(20)
    assert not tree._roots and tree.count(1) == 0


# Windows --------------------------------------------------------------------------------------------------------------


def test_a_hit_is_good_where_every_group_has_its_window():
    """Pages of 2; a window of 4 needs the 3 tokens before the next, so two pages."""
    tree = RadixTree(2, windows=(None, 4))
    tree.insert(list(range(8)), [(0, -1), (1, -1), (2, 12), (3, 13)])
    assert tree.match(list(range(8))).pages == [(0, -1), (1, -1), (2, 12), (3, 13)]
    assert tree.match(list(range(6))).length == 0  # the page before 12 is gone
    tree.insert(list(range(4)), [(0, 10), (1, 11)])
    assert tree.match(list(range(6))).pages == [(0, -1), (1, 11), (2, 12)]
    assert tree.match(list(range(2))).pages == [(0, 10)]  # shorter than the window


def test_a_tombstone_that_comes_back_frees_nothing_it_had():
    """A window's page is evicted, and another takes its place: what was in the tree stays whose it was."""
    tree = RadixTree(1, windows=(None, 2))
    tree.insert([1, 2, 3], [(0, 0), (1, 1), (2, 2)])
    assert tree.evict(2, group=1) == [(-1, 0), (-1, 1)]
    assert tree.match([1, 2]).length == 0 and tree.match([1, 2, 3]).length == 3
    assert tree.adopt([1, 2, 3], [(7, 0), (8, 9), (9, 8)]) == [(-1, 0), (-1, 9)]
    assert tree.match([1, 2]).pages == [(0, -1), (1, 9)]
    assert tree.evict(9) == [(2, 2), (1, 9), (0, 0)]


def test_pages_of_a_locked_window_stay():
    tree = RadixTree(1, windows=(None, 3))
    tree.insert([1, 2, 3, 4], [(i, i) for i in range(4)])
    hit = tree.match([1, 2, 3])
    tree.lock(hit)
    assert (tree.evictable(0), tree.evictable(1)) == (1, 1)
    assert tree.evict(9, group=1) == [(-1, 3)]
    tree.unlock(hit)
    tree.evict(1, group=1)
    tree.check()
    with pytest.raises(errors.BlockStateError):
        other = tree.match([1, 2, 3])
        tree.evict(1, group=1)
        tree.lock(other)


def test_a_text_without_pages_is_forgotten():
    """Where all groups have windows nothing else would take it out."""
    tree = RadixTree(1, windows=(3, 2))
    tree.insert([1, 2, 3], [(0, -1), (1, 1), (2, 2)])
    tree.evict(9, group=1)
    assert tree.match([1, 2, 3]).length == 0 and tree.count(0) == 3
    tree.evict(9, group=0)
    assert not tree._roots


# The count of the tree itself -----------------------------------------------------------------------------------------


def first(tree):
    (root,) = tree._roots.values()
    (node,) = root.children.values()
    return node


BROKEN = {
    "a page twice": lambda tree: first(tree).columns[0].__setitem__(0, 1),
    "a page that is lost": lambda tree: tree._owned[0].remove(0),
    "an edge without pages": lambda tree: first(tree).columns.__setitem__(0, []),
    "a key that is not its edge's": lambda tree: setattr(first(tree), "edge", bytes(24)),
    "a node that is gone": lambda tree: setattr(first(tree), "alive", False),
    "a start elsewhere": lambda tree: setattr(first(tree), "start", 1),
    "a lock that is not counted": lambda tree: setattr(first(tree), "locks", 1),
    "a leaf that cannot be evicted": lambda tree: tree._leaves._members.clear(),
    "a root that is locked": lambda tree: setattr(first(tree).parent, "locks", 1),
    "a page that is none": lambda tree: first(tree).columns[0].__setitem__(0, -1),
}


@pytest.mark.parametrize("what", BROKEN)
def test_check_finds(what):
    tree = stored([1, 2, 3, 4, 5, 6])
    tree.check()
    BROKEN[what](tree)
    with pytest.raises(errors.BlockStateError):
        tree.check()


def test_repr():
    tree = stored([1, 2, 3, 4])
    assert repr(tree) == "RadixTree(2 pages of 2, 2 evictable)"
    assert repr(tree.match([1, 2])) == "Match(length=2, pages=[0])"
