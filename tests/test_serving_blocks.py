"""Block pools against a plain model that counts by looking, and a device on which tokens lie where tables say."""

import pickle
import random

import hypothesis
import hypothesis.stateful as stateful
import hypothesis.strategies as st
import numpy as np
import pytest
from serving_models import PoolMachine

from kvattn import errors
from kvattn.serving import BlockPool

# Random operations ----------------------------------------------------------------------------------------------------

SEQUENCES = ["a", 0, "", None, ("t", 1), "f"]


def one_operation(machine, rng):
    """Draws an operation, right or wrong, and does it."""
    plain, size = machine.plain, machine.plain.block_size
    known = list(plain.texts)
    unknown = [seq for seq in SEQUENCES if seq not in plain.texts]
    what = rng.choice(["allocate", "append", "append", "append", "fork", "free", "forget", "hold", "release", "wrong"])
    if what == "allocate" and unknown:
        full = plain.full()
        prefix = rng.sample(full, rng.randint(0, min(2, len(full)))) if rng.random() < 0.6 else []
        forgotten = rng.choice([0, 0, 0, 1, 2])
        count = (len(prefix) + forgotten) * size + rng.randint(0, 3 * size)
        machine.allocate(rng.choice(unknown), count, prefix, forgotten)
    elif what == "append" and known:
        machine.append(rng.choice(known), rng.choice([0, 1, 1, 1, 2, size, size + 1, 3 * size]))
    elif what == "fork" and known and unknown:
        machine.fork(rng.choice(known), rng.choice(unknown))
    elif what == "free" and known and rng.random() < 0.7:
        machine.free(rng.choice(known))
    elif what == "forget" and known:
        seq = rng.choice(known)
        machine.forget(seq, rng.randint(0, len(plain.texts[seq])))
    elif what == "hold" and len(plain.held) < 6:
        used = sorted(plain.used(), key=lambda block: block.number)
        machine.hold(rng.choices(used, k=rng.randint(0, 2)) if used else [])
    elif what == "release" and plain.held:
        machine.release(rng.sample(plain.held, rng.randint(0, len(plain.held))))
    elif what == "wrong":
        machine.refused(*wrong_call(machine, rng, known, unknown))


def wrong_call(machine, rng, known, unknown):
    """An error, and a call that raises it."""
    pool, plain, size = machine.pool, machine.plain, machine.plain.block_size
    free = [b for b in range(pool.num_blocks) if not pool.ref_count(b)]
    partial = [b.number for b in plain.used() if plain.fill(b) < size]
    full = [b.number for b in plain.full()]
    calls = [(errors.RangeError, lambda p: p.hold([*full, pool.num_blocks]))]
    if unknown:
        new = unknown[0]
        calls += [
            (errors.UnknownSequenceError, lambda p: p.free(new)),
            (errors.UnknownSequenceError, lambda p: p.append(new)),
            (errors.OutOfBlocksError, lambda p: p.allocate(new, size * (pool.num_free + 1))),
            (errors.RangeError, lambda p: p.allocate(new, -1)),
        ]
        if full:
            calls += [
                (errors.BlockStateError, lambda p: p.allocate(new, 9 * size, prefix=[full[0], full[0]])),
                (errors.RangeError, lambda p: p.allocate(new, size - 1, prefix=full[:1])),
            ]
        if free:
            calls += [(errors.BlockStateError, lambda p: p.allocate(new, size, prefix=free[:1]))]
        if partial:
            calls += [(errors.BlockStateError, lambda p: p.allocate(new, size, prefix=partial[:1]))]
    if known:
        old = rng.choice(known)
        calls += [
            (errors.DuplicateSequenceError, lambda p: p.allocate(old, 1)),
            (errors.DuplicateSequenceError, lambda p: p.fork(old, old)),
            (errors.RangeError, lambda p: p.forget(old, pool.length(old) + 1)),
            (errors.OutOfBlocksError, lambda p: p.append(old, size * (pool.num_free + 1))),
        ]
    if free:
        calls += [(errors.BlockStateError, lambda p: p.hold([*full, free[-1]]))]
    unheld = [b.number for b in plain.used() if b not in plain.held]
    if unheld:
        calls += [(errors.BlockStateError, lambda p: p.release([*{b.number for b in plain.held}, unheld[0]]))]
    return rng.choice(calls)


POOLS = [(10, 3), (6, 1), (16, 2), (5, 4)]
FULL_RUN = pytest.mark.slow


@pytest.mark.parametrize("count", [16_000, pytest.param(125_000, marks=FULL_RUN)])
@pytest.mark.parametrize(("num_blocks", "block_size"), POOLS)
def test_random_operations(num_blocks, block_size, count):
    """After each: references, free blocks, tables and lengths are the model's; each sequence reads its own tokens."""
    rng = random.Random(f"{num_blocks} {block_size} {count}")
    machine = PoolMachine(num_blocks, block_size)
    for _ in range(count):
        one_operation(machine, rng)
        machine.check()
    for seq in list(machine.plain.texts):
        machine.free(seq)
    machine.release(list(machine.plain.held))
    assert machine.pool.num_free == num_blocks


class PoolRules(stateful.RuleBasedStateMachine):
    """The same, drawn by hypothesis, which shrinks what fails."""

    sizes = (8, 2)

    def __init__(self):
        super().__init__()
        self.machine = PoolMachine(*self.sizes)

    def some(self, data, choices):
        return data.draw(st.sampled_from(choices))

    @property
    def known(self):
        return list(self.machine.plain.texts)

    @property
    def unknown(self):
        return [seq for seq in SEQUENCES if seq not in self.machine.plain.texts]

    @stateful.precondition(lambda self: self.unknown)
    @stateful.rule(data=st.data(), count=st.integers(0, 7), shared=st.integers(0, 2))
    def allocate(self, data, count, shared):
        full = sorted(self.machine.plain.full(), key=lambda block: block.number)[:shared]
        self.machine.allocate(self.some(data, self.unknown), self.sizes[1] * len(full) + count, full)

    @stateful.precondition(lambda self: self.known)
    @stateful.rule(data=st.data(), count=st.integers(0, 5))
    def append(self, data, count):
        self.machine.append(self.some(data, self.known), count)

    @stateful.precondition(lambda self: self.known and self.unknown)
    @stateful.rule(data=st.data())
    def fork(self, data):
        self.machine.fork(self.some(data, self.known), self.some(data, self.unknown))

    @stateful.precondition(lambda self: self.known)
    @stateful.rule(data=st.data())
    def free(self, data):
        self.machine.free(self.some(data, self.known))

    @stateful.precondition(lambda self: self.known)
    @stateful.rule(data=st.data(), share=st.floats(0, 1))
    def forget(self, data, share):
        seq = self.some(data, self.known)
        self.machine.forget(seq, int(share * len(self.machine.plain.texts[seq])))

    @stateful.precondition(lambda self: self.machine.plain.used())
    @stateful.rule(data=st.data())
    def hold(self, data):
        self.machine.hold([self.some(data, sorted(self.machine.plain.used(), key=lambda block: block.number))])

    @stateful.precondition(lambda self: self.machine.plain.held)
    @stateful.rule(data=st.data())
    def release(self, data):
        self.machine.release([self.some(data, self.machine.plain.held)])

    @stateful.rule(seed=st.integers(0, 99))
    def wrong(self, seed):
        self.machine.refused(*wrong_call(self.machine, random.Random(seed), self.known, self.unknown))

    @stateful.invariant()
    def holds(self):
        self.machine.check()


class SmallPoolRules(PoolRules):
    sizes = (5, 3)


@pytest.mark.parametrize("examples", [50, pytest.param(500, marks=FULL_RUN)])
@pytest.mark.parametrize("rules", [PoolRules, SmallPoolRules])
def test_rules(rules, examples):
    """Fifty steps each."""
    steps = hypothesis.settings(max_examples=examples, stateful_step_count=50)
    stateful.run_state_machine_as_test(rules, settings=steps)


# Known sequences of calls ---------------------------------------------------------------------------------------------


def trace_of_samples(prompt, samples, steps):
    """Blocks in use after the prompt and each step of so many samples with blocks of 4, and the copies made."""
    pool = BlockPool(64, 4)
    pool.allocate(0, prompt)
    live, copies = [pool.num_blocks - pool.num_free], 0
    for sample in range(1, samples):
        pool.fork(0, sample)
    for _ in range(steps):
        for sample in range(samples):
            copies += len(pool.append(sample))
            pool.check()
        live.append(pool.num_blocks - pool.num_free)
    return live, copies


def test_copy_on_write_of_samples():
    """The case of figure 8 of PagedAttention: a prompt of 7, two samples; one copy, the second writes in place."""
    assert trace_of_samples(7, 2, 5) == ([2, 3, 5, 5, 5, 5], 1)
    assert trace_of_samples(8, 3, 1) == ([2, 5], 0)  # the prompt's last block is full


def test_a_beam_step():
    """As figure 9: after a step two beams live on twice each, the others end; what only they held is free."""
    pool = BlockPool(16, 4)
    pool.allocate("root", 4)
    for beam in range(4):
        pool.fork("root", beam)
        pool.append(beam, 8)
    pool.free("root")
    assert pool.num_blocks - pool.num_free == 1 + 4 * 2
    for i, parent in enumerate([1, 1, 2, 2]):
        pool.fork(parent, f"new {i}")
    for beam in range(4):
        pool.free(beam)
    assert pool.num_blocks - pool.num_free == 1 + 2 * 2
    copies = [copy for i in range(4) for copy in pool.append(f"new {i}")]
    assert copies == []  # all blocks are full: four new ones, none copied
    assert pool.num_blocks - pool.num_free == 1 + 2 * 2 + 4
    assert pool.usage().table_entries == 4 * 4


def test_the_last_to_write_does_not_copy():
    pool = BlockPool(8, 4)
    pool.allocate("a", 5)
    for name in "bcd":
        pool.fork("a", name)
    tails = []
    for name in "abcd":
        copies = pool.append(name)
        assert len(copies) == (name != "d")
        tails.append(pool.table(name)[-1])
    assert len(set(tails)) == 4 and pool.ref_count(0) == 4


def test_samples_that_end_in_any_order_give_everything_back():
    for order in (range(64), reversed(range(64)), random.Random(0).sample(range(64), 64)):
        pool = BlockPool(256, 4)
        pool.allocate(0, 10)
        for beam in range(1, 64):
            pool.fork(0, beam)
        for beam in range(64):
            pool.append(beam, 3)
        for beam in order:
            pool.free(beam)
            pool.check()
        assert pool.num_free == 256


def test_what_is_held_is_not_used_again_before_it_is_released():
    """A copy to the host that reads a block while its sequence ends."""
    pool = BlockPool(2, 4)
    pool.allocate("a", 8)
    reading = pool.table("a")[:1]
    pool.hold(reading)
    pool.free("a")
    pool.allocate("b", 4)
    assert pool.table("b") != reading and pool.num_free == 0
    with pytest.raises(errors.OutOfBlocksError):
        pool.append("b")
    pool.release(reading)
    pool.append("b")
    assert pool.table("b")[-1:] == reading


def test_a_held_tail_is_copied_before_it_is_written():
    pool = BlockPool(4, 4)
    pool.allocate("a", 5)
    pool.hold(pool.table("a"))
    assert pool.append("a") == [(1, 2)]
    pool.release([0, 1])
    assert pool.num_free == 2


def test_forgotten_blocks_come_back_once():
    """A window moves over three blocks' tokens; the table keeps its columns."""
    pool = BlockPool(3, 4)
    pool.allocate("a", 4)
    for length in range(5, 40):
        pool.append("a")
        pool.forget("a", max(length - 4, 0))
        pool.forget("a", max(length - 6, 0))  # again, and fewer
        pool.check()
        table = pool.table("a")
        assert len(table) == -(-length // 4) and table[: max(length - 4, 0) // 4] == [-1] * (max(length - 4, 0) // 4)
        assert pool.length("a") == length
    pool.free("a")
    assert pool.num_free == 3


def test_tables_of_a_batch():
    pool = BlockPool(8, 2)
    pool.allocate("a", 5)
    pool.allocate("b", 2)
    pool.allocate("c", 0)
    np.testing.assert_array_equal(pool.page_table(["b", "a", "c"]), [[3, -1, -1], [0, 1, 2], [-1, -1, -1]])
    table = pool.page_table(["a", "a"], width=4)
    assert table.dtype == np.int32 and table.flags.writeable
    np.testing.assert_array_equal(table, [[0, 1, 2, -1]] * 2)
    assert pool.page_table([]).shape == (0, 1)
    with pytest.raises(errors.RangeError, match="width must be >= 3"):
        pool.page_table(["b", "a"], width=2)
    with pytest.raises(errors.UnknownSequenceError):
        pool.page_table(["a", "x"])


# Admission ------------------------------------------------------------------------------------------------------------


def test_admission_keeps_the_watermark_and_allocation_does_not():
    pool = BlockPool(10, 4, watermark=0.25)  # floor(2.5) = 2 stay free
    assert pool.can_allocate(32) == "now"
    assert pool.can_allocate(33) == "never"
    pool.allocate("a", 4)
    assert pool.can_allocate(28) == "now"
    assert pool.can_allocate(29) == "later"
    pool.allocate("b", 36)
    assert pool.num_free == 0
    assert pool.can_allocate(0) == "later"


def test_a_small_pool_admits_a_request_of_its_own_size():
    """floor(0.01 * 99) = 0."""
    assert BlockPool(99, 1).can_allocate(99) == "now"
    assert BlockPool(100, 1).can_allocate(100) == "never"


def test_a_prefix_needs_no_blocks_of_its_own():
    pool = BlockPool(4, 4, watermark=0)
    pool.allocate("a", 8)
    assert pool.can_allocate(16) == "later"
    assert pool.can_allocate(16, prefix=pool.table("a")) == "now"
    assert pool.can_allocate(20, prefix=pool.table("a")) == "never"
    assert pool.can_allocate(20, forgotten=4) == "later"


@pytest.mark.parametrize("num_blocks", [1, 7, 50, 100, 250])
@pytest.mark.parametrize("watermark", [0.0, 0.01, 0.05, 0.5])
def test_admission_is_the_formula(num_blocks, watermark):
    pool = BlockPool(num_blocks, 3, watermark=watermark)
    pool.allocate("a", 3 * (num_blocks // 3))
    keep = int(watermark * num_blocks)
    for tokens in range(3 * num_blocks + 4):
        need = -(-tokens // 3)
        expected = "now" if pool.num_free - need >= keep else "later" if num_blocks - need >= keep else "never"
        assert pool.can_allocate(tokens) == expected


def test_costs_are_what_calls_take():
    rng, machine = random.Random(3), PoolMachine(12, 3)
    for _ in range(120):
        one_operation(machine, rng)
        machine.check()
        for seq in machine.plain.texts:
            for count in (0, 1, 2, 4, 7):
                cost, pool = machine.pool.append_cost(seq, count), pickle.loads(pickle.dumps(machine.pool))
                if cost <= pool.num_free:
                    before = pool.num_free
                    pool.append(seq, count)
                    assert before - pool.num_free == cost
                else:
                    with pytest.raises(errors.OutOfBlocksError):
                        pool.append(seq, count)


# Waste ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("block_size", "mean"), [(16, 500), (16, 77), (128, 5000)])
def test_waste_is_the_formula(block_size, mean):
    """Of 20,000 exponential lengths, within 0.1 %.

    ((R - 1) / 2) / (L + (R - 1) / 2) takes the last block to be equally likely at every fill; where sequences are about
    as long as a few blocks, R / (1 - q^R) slots per sequence, q = 1 - 1 / L, is exact.
    """
    lengths = np.ceil(np.random.default_rng(0).exponential(mean, 20_000)).astype(int)
    pool = BlockPool(int(np.sum(-(-lengths // block_size))), block_size)
    for seq, length in enumerate(lengths.tolist()):
        pool.allocate(seq, length)
    usage, mean = pool.usage(), np.mean(lengths)
    assert usage.free_blocks == 0 and usage.tokens == lengths.sum()
    rest = (block_size - 1) / 2
    if mean > 10 * block_size:
        assert usage.waste == pytest.approx(rest / (mean + rest), abs=1e-3)
    slots = block_size / (1 - (1 - 1 / mean) ** block_size)
    assert usage.waste == pytest.approx(1 - mean / slots, abs=1e-3)


def test_usage():
    pool = BlockPool(10, 4)
    assert (pool.usage().waste, pool.usage().saved) == (0, 0)
    pool.allocate("a", 6)
    pool.fork("a", "b")
    pool.allocate("c", 4)
    pool.hold(pool.table("c"))
    pool.free("c")
    usage = pool.usage()
    assert (usage.num_blocks, usage.free_blocks, usage.used_blocks, usage.held_blocks) == (10, 7, 2, 1)
    assert (usage.tokens, usage.table_entries, usage.peak_blocks) == (6, 4, 3)
    assert usage.waste == 1 - 6 / 8 and usage.saved == 1 / 2
    pool.append("b", 20)
    assert pool.usage().peak_blocks == 9 == 10 - pool.num_free
    pool.free("b")
    pool.allocate("d", 1)
    assert pool.usage().peak_blocks == 9 > 10 - pool.num_free


# A call that fails changes nothing ------------------------------------------------------------------------------------


class Fragile:
    """A name whose hash, or comparison, raises when it is asked for the n-th time."""

    def __init__(self, name, left):
        self.name, self.left = name, left

    def __hash__(self):
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt
        return hash(self.name)

    def __eq__(self, other):
        return isinstance(other, Fragile) and self.name == other.name


CALLS = {
    "allocate": lambda pool, seq: pool.allocate(seq, 9, prefix=pool.table("a")[:1]),
    "append": lambda pool, seq: pool.append(seq, 9),
    "free": lambda pool, seq: pool.free(seq),
    "fork": lambda pool, seq: pool.fork("a", seq),
    "forget": lambda pool, seq: pool.forget(seq, 4),
}


@pytest.mark.parametrize("name", CALLS)
def test_an_interrupt_changes_nothing(name):
    """Wherever a name is looked up; until the call goes through."""
    for times in range(1, 20):
        pool = BlockPool(8, 4)
        pool.allocate("a", 5)
        known = Fragile("b", 0)
        if name not in ("allocate", "fork"):
            pool.fork("a", known)
        before = (pool.num_free, pool.table("a"), [pool.ref_count(b) for b in range(8)], len(pool.sequences))
        try:
            CALLS[name](pool, Fragile("b", times))
        except KeyboardInterrupt:
            assert before == (
                pool.num_free,
                pool.table("a"),
                [pool.ref_count(b) for b in range(8)],
                len(pool.sequences),
            )
            pool.check()
        else:
            assert times > 1
            return
    raise AssertionError("the call never went through")


BROKEN = {
    "a reference too many": lambda pool: pool._counts.refs.__setitem__(0, 5),
    "a block that is free twice": lambda pool: pool._counts.free.append(pool._counts.free[0]),
    "a used block that is free": lambda pool: pool._counts.free.append(0),
    "a free block that is lost": lambda pool: pool._counts.free.pop(),
    "a table that is too long": lambda pool: pool._sequences["a"].table.append(-1),
    "a block that is forgotten and named": lambda pool: setattr(pool._sequences["a"], "forgotten", 1),
    "a length beyond the table": lambda pool: setattr(pool._sequences["a"], "length", 99),
    "a tail that is said to be full": lambda pool: pool._counts.partial.clear(),
    "a full block that is said not to be": lambda pool: pool._counts.partial.__setitem__(0, 1),
    "a negative hold": lambda pool: (pool._counts.held.__setitem__(0, -1), pool._counts.refs.__setitem__(0, 1)),
}


@pytest.mark.parametrize("what", BROKEN)
def test_check_finds(what):
    pool = BlockPool(6, 4)
    pool.allocate("a", 6)
    pool.fork("a", "b")
    pool.check()
    BROKEN[what](pool)
    with pytest.raises(errors.BlockStateError):
        pool.check()


def test_repr_and_membership():
    pool = BlockPool(6, 4)
    pool.allocate("a", 6)
    assert repr(pool) == "BlockPool(6 blocks of 4, 4 free, 1 sequences)"
    assert "a" in pool and "b" not in pool
