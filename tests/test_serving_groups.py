"""Groups of layers: published figures from their own accounting, and requests that live and end on pools and tree."""

import random

import pytest

from kvattn import errors
from kvattn.serving import BlockPool, GroupedPool, LayerGroup, RadixTree

FULL_RUN = pytest.mark.slow
MIB = 2**20


def decoded(pool, length, prompt=1):
    """A sequence that has grown token by token."""
    pool.allocate("a", prompt)
    for _ in range(length - prompt):
        pool.append("a")
    pool.check()
    return pool


# Figures that others published ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("length", "one_table", "groups"), [(4096, 192, 102), (8192, 384, 198), (16384, 768, 390)])
def test_gpt_oss_20b(length, one_table, groups):
    """24 layers of 8 heads of 64 in bfloat16, every other one with a window of 128; pages of 128.

    A window that moves over pages of its own size needs two of them.
    """
    layer = 2 * 8 * 64 * 2
    full = LayerGroup(num_blocks=length // 128, bytes_per_token=12 * layer)
    window = LayerGroup(num_blocks=2, window=128, bytes_per_token=12 * layer)
    pool = decoded(GroupedPool([full, window], 128, watermark=0), length)
    assert pool.one_table_bytes(length) == pool.one_table_bytes(length - 1) == one_table * MIB
    assert pool.peak_bytes == groups * MIB
    assert pool.used_bytes <= pool.peak_bytes


@pytest.mark.parametrize(
    ("full", "windowed", "window", "length", "waste"),
    [
        (21, 21, 4096, 8192, 0.25),  # Gemma 2 9B: every other layer
        (9, 27, 32768, 131072, 0.5625),  # Ministral 8B: three of four layers
    ],
)
def test_waste_of_one_table_where_layers_have_windows(full, windowed, window, length, waste):
    groups = [
        LayerGroup(num_blocks=length // 128, bytes_per_token=full),
        LayerGroup(num_blocks=window // 128 + 1, window=window, bytes_per_token=windowed),
    ]
    pool = GroupedPool(groups, 128, watermark=0)
    pool.allocate("a", window)
    for _ in range((length - window) // 128):
        pool.append("a", 128)
    pool.check()
    pool.pools[1].forget("a", groups[1].unseen(length))
    assert 1 - pool.used_bytes / pool.one_table_bytes(length) == waste


def test_waste_of_one_table_where_layers_hold_other_tokens():
    """Llama 3.2 11B Vision on MMMU-pro: 32 layers see 43 tokens of text, 8 those of the image, 6193."""
    groups = [LayerGroup(num_blocks=43, bytes_per_token=32), LayerGroup(num_blocks=6193, bytes_per_token=8)]
    pool = GroupedPool(groups, 1, watermark=0)
    pool.allocate("a", (43, 6193))
    assert pool.length("a") == (43, 6193)
    assert round(1 - pool.used_bytes / pool.one_table_bytes(43 + 6193), 3) == 0.796
    with pytest.raises(errors.ShapeError, match="no pages in common"):
        pool.pages("a")


# The calls ------------------------------------------------------------------------------------------------------------


def small_pool(full=8, window=4):
    return GroupedPool([LayerGroup(full), LayerGroup(window, window=4)], 2, watermark=0)


def state(pool):
    tables = [[(seq, each.table(seq), each.length(seq)) for seq in each.sequences] for each in pool.pools]
    return tables, [[each.ref_count(b) for b in range(each.num_blocks)] for each in pool.pools], pool.usage()


def test_windows_give_blocks_back_and_reuse_them():
    pool = decoded(small_pool(), 16, prompt=3)
    full, window = pool.tables("a")
    assert full == list(range(8))
    assert window[:6] == [-1] * 6 and min(window[6:]) >= 0
    assert pool.usage()[1].peak_blocks == 3
    assert pool.pages("a") == list(zip(full, window, strict=True))
    assert pool.windows == (None, 4) and "a" in pool and pool.length("a") == 16


@pytest.mark.parametrize("count", [1, 2])
def test_what_a_window_leaves_behind_is_there_for_the_next_tokens(count):
    """Also where no other block is free."""
    pool = GroupedPool([LayerGroup(8), LayerGroup(2, window=3)], 2, watermark=0)
    pool.allocate("a", 4)
    while pool.length("a") + count <= 16:
        pool.append("a", count)
        pool.check()
    assert pool.length("a") == 16 and pool.usage()[1].peak_blocks == 2


def test_a_fork_is_one_in_every_group():
    pool = decoded(small_pool(), 7)
    pool.fork("a", "b")
    assert pool.tables("a") == pool.tables("b")
    copies = pool.append("b")
    assert [len(each) for each in copies] == [1, 1]
    for group, ((source, target),) in enumerate(copies):
        assert pool.pools[group].table("a")[-1] == source and pool.pools[group].table("b")[-1] == target
    pool.free("a")
    pool.free("b")
    pool.check()
    assert [each.num_free for each in pool.pools] == [8, 4]


def test_what_one_group_cannot_do_none_does():
    pool = small_pool(full=8, window=4)
    pool.allocate("a", 6)
    before = state(pool)
    for error, call in (
        (
            errors.OutOfBlocksError,
            lambda: pool.allocate("b", 4),
        ),  # one block is left to the windows, five to the others
        (errors.OutOfBlocksError, lambda: pool.append("a", 5)),
        (errors.BlockStateError, lambda: pool.hold([(0, 0), (1, 3)])),
        (errors.BlockStateError, lambda: pool.release([(-1, 0)])),
        (errors.DuplicateSequenceError, lambda: pool.fork("a", "a")),
        (errors.UnknownSequenceError, lambda: pool.free("b")),
        (errors.UnknownSequenceError, lambda: pool.append("b")),
        (errors.ShapeError, lambda: pool.allocate("b", (1, 1, 1))),
        (errors.ShapeError, lambda: pool.hold([0])),
    ):
        with pytest.raises(error):
            call()
        assert state(pool) == before
    pool.hold([(0, 0)])
    held = state(pool)
    with pytest.raises(errors.BlockStateError):
        pool.release([(0, 0), (-1, 1)])
    assert state(pool) == held


def test_admission_asks_every_group():
    pool = small_pool(full=8, window=4)
    assert (pool.can_allocate(8), pool.can_allocate(9)) == ("now", "never")
    pool.allocate("a", 4)
    assert pool.can_allocate(6) == "later"
    assert pool.can_allocate((6, 4)) == "now"
    assert GroupedPool([LayerGroup(4)], 2, watermark=0).can_allocate(8) == "now"


def test_a_hit_of_windows_takes_what_they_need():
    pool, tree = small_pool(), RadixTree(2, windows=(None, 4))
    pool.allocate("a", 6)
    pool.append("a", 2)
    pool.hold(tree.adopt(range(8), pool.pages("a")))
    pool.free("a")
    assert [each.num_free for each in pool.pools] == [4, 1]
    hit = tree.match_prompt(range(9))
    assert [row[1] for row in hit.pages] == [-1, -1, *(row[1] for row in hit.pages[2:])] and hit.length == 8
    pool.allocate("b", 9, prefix=hit.pages)
    assert pool.tables("b")[1][:2] == [-1, -1] and pool.tables("b")[0][:4] == [0, 1, 2, 3]
    pool.release(tree.evict(9))
    pool.free("b")
    pool.check()
    assert [each.num_free for each in pool.pools] == [8, 4]


@pytest.mark.parametrize(
    "call",
    [
        lambda: GroupedPool([], 2),
        lambda: LayerGroup(0),
        lambda: LayerGroup(1, bytes_per_token=-1),
        lambda: GroupedPool([LayerGroup(1)], 0),
    ],
)
def test_settings_that_cannot_work(call):
    with pytest.raises(errors.ConfigError):
        call()


def test_a_window_below_one():
    with pytest.raises(errors.RangeError, match="window must be >= 1"):
        LayerGroup(1, window=0)


def test_repr():
    assert repr(small_pool()).startswith("GroupedPool(BlockPool(8 blocks of 2, 8 free")


# Lives of requests ----------------------------------------------------------------------------------------------------


class Server:
    """Requests on a pool and a tree, as an engine would lead them, and the tokens as a device would hold them.

    A token is its text and place, so that a page of another text, or one that was given away, cannot look right.
    """

    def __init__(self, groups, block_size):
        self.pool = GroupedPool(groups, block_size, watermark=0)
        self.tree = RadixTree(block_size, windows=self.pool.windows)
        self.size = block_size
        self.device = [[[None] * block_size for _ in range(g.num_blocks)] for g in groups]
        self.running = {}  # of a request: its tokens, its hit
        self.hits = 0

    def make_room(self, enough):
        """Evicts until there is enough; False: there is nothing left to evict."""
        while not enough():
            for group in range(len(self.pool.pools)):
                pages = self.tree.evict(1, group=group)
                self.pool.release(pages)
            if not any(self.tree.evictable(group) for group in range(len(self.pool.pools))):
                return enough()
        return True

    def start(self, name, text):
        hit = self.tree.match_prompt(text)
        self.tree.lock(hit)
        if not self.make_room(lambda: self.pool.can_allocate(len(text), prefix=hit.pages) == "now"):
            self.tree.unlock(hit)
            assert self.pool.can_allocate(len(text)) != "now"
            return False
        self.pool.allocate(name, len(text), prefix=hit.pages)
        self.running[name] = (list(text), hit)
        self.hits += hit.length
        self.write(name, hit.length)
        self.keep(name)
        return True

    def keep(self, name):
        """Gives the tree what is finished."""
        text, _ = self.running[name]
        self.pool.hold(self.tree.adopt(text, self.pool.pages(name)))

    def grow(self, name, count):
        text, _ = self.running[name]
        try:
            copies = self.pool.append(name, count)
        except errors.OutOfBlocksError:
            return False
        for group, pairs in enumerate(copies):
            for source, target in pairs:
                self.device[group][target] = list(self.device[group][source])
        length = len(text)
        text += [(i + len(text)) % 2 for i in range(count)]
        self.write(name, length)
        return True

    def fork(self, name, child):
        text, hit = self.running[name]
        self.pool.fork(name, child)
        self.tree.lock(hit)
        self.running[child] = (list(text), hit)

    def end(self, name, keep):
        _, hit = self.running[name]
        if keep:
            self.keep(name)
        self.pool.free(name)
        self.tree.unlock(hit)
        del self.running[name]

    def write(self, name, start):
        text, _ = self.running[name]
        for group, table in enumerate(self.pool.tables(name)):
            for position in range(start, len(text)):
                assert self.pool.pools[group].ref_count(table[position // self.size]) == 1
                place = self.device[group][table[position // self.size]]
                place[position % self.size] = (tuple(text[: position + 1]), position)

    def check(self):
        self.pool.check()
        self.tree.check()
        for name, (text, _) in self.running.items():
            for group, table in enumerate(self.pool.tables(name)):
                first = self.pool.groups[group].unseen(len(text))
                for position in range(first, len(text)):
                    found = self.device[group][table[position // self.size]][position % self.size]
                    assert found == (tuple(text[: position + 1]), position)
        for group, pool in enumerate(self.pool.pools):
            named = {b for name in self.running for b in self.pool.tables(name)[group] if b >= 0}
            kept = self.tree._owned[group]
            assert pool.num_free + len(named | kept) == pool.num_blocks
            assert pool.usage().held_blocks == len(kept - named)
            assert self.tree.evictable(group) <= len(kept)


SERVERS = {
    "full": ([LayerGroup(12)], 2),
    "full and window": ([LayerGroup(12), LayerGroup(9, window=4)], 2),
    "windows": ([LayerGroup(10, window=3), LayerGroup(12, window=6)], 2),
    "pages of one token": ([LayerGroup(24), LayerGroup(20, window=5)], 1),
}


@pytest.mark.parametrize("count", [1500, pytest.param(20_000, marks=FULL_RUN)])
@pytest.mark.parametrize("kind", SERVERS)
def test_lives_of_requests(kind, count):
    """Admitted, grown, forked, preempted, cancelled: no page is lost, and each reads its own tokens or a real hit's."""
    rng = random.Random(kind)
    server = Server(*SERVERS[kind])
    numbers = iter(range(10**9))
    started = 0
    for _ in range(count):
        what = rng.choice(["start", "start", "grow", "grow", "grow", "fork", "end", "evict"])
        running = list(server.running)
        if what == "start" and len(running) < 4:
            started += server.start(next(numbers), [rng.randint(0, 1) for _ in range(rng.randint(1, 12))])
        elif what == "grow" and running:
            name = rng.choice(running)
            if not server.grow(name, rng.choice([1, 1, 2, 4])):
                server.end(rng.choice(running), keep=rng.random() < 0.5)  # preempted
        elif what == "fork" and running and len(running) < 4:
            server.fork(rng.choice(running), next(numbers))
        elif what == "end" and running:
            server.end(rng.choice(running), keep=rng.random() < 0.7)
        elif what == "evict":
            group = rng.randrange(len(server.pool.pools))
            server.pool.release(server.tree.evict(rng.randint(0, 3), group=group))
        server.check()
    for name in list(server.running):
        server.end(name, keep=True)
    for group in range(len(server.pool.pools)):
        server.pool.release(server.tree.evict(10**6, group=group))
    assert [pool.num_free for pool in server.pool.pools] == [pool.num_blocks for pool in server.pool.pools]
    assert not server.tree._roots and started > count / 20 and server.hits > started / 4


def test_evictable_pages_are_those_that_come_free():
    """Pages that a running request shares with the tree are not counted as free to be had, twice or at all."""
    pool, tree = BlockPool(8, 2), RadixTree(2)
    pool.allocate("a", 8)
    pool.hold(tree.adopt(range(8), pool.table("a")))
    hit = tree.match(range(8))
    tree.lock(hit)
    assert tree.num_evictable == 0 and pool.num_free == 4
    pool.allocate("b", 10, prefix=hit.pages)
    assert tree.num_evictable == 0
    pool.free("a")
    assert tree.num_evictable == 0 and pool.num_free == 3
    pool.free("b")
    tree.unlock(hit)
    assert tree.num_evictable == 4 == 8 - pool.num_free
    pool.release(tree.evict(4))
    assert pool.num_free == 8


def test_samples_of_one_prompt_share_what_they_can():
    """G samples compute the prompt once: (G - 1) / G of it is saved; its whole pages are stored once."""
    pool = BlockPool(64, 4)
    pool.allocate(0, 16)
    for sample in range(1, 8):
        pool.fork(0, sample)
    usage = pool.usage()
    assert usage.saved == 7 / 8 and usage.used_blocks == 4


def test_a_prompt_larger_than_the_pool_is_refused_before_anything_waits():
    pool = BlockPool(4, 2)
    pool.allocate("a", 2)
    assert pool.can_allocate(9) == "never"
    assert pool.can_allocate(8) == "later"
