"""Ledgers of several hosts against a plain model that looks for everything, and a device on which contents lie."""

import copy
import itertools
import os
import pickle
import random
import subprocess
import sys

import numpy as np
import pytest
from bad_input_table import Table, run

from kvattn import errors
from kvattn.serving import Agreement, Ledger, digests

FULL_RUN = pytest.mark.slow


# A plain model --------------------------------------------------------------------------------------------------------


class Block:
    """A block by its identity, the host on which it lies and whose it is."""

    __slots__ = "host", "number", "seq"

    def __init__(self, host, seq):
        self.host, self.seq, self.number = host, seq, None


class PlainLedger:
    """What `Ledger` should do. Nothing is counted: what is free or lent is looked for. `restore` undoes what failed."""

    def __init__(self, num_hosts, size, keeps):
        self.hosts, self.size, self.keeps = list(range(num_hosts)), size, keeps
        self.homes, self.tables, self.loans = {}, {}, []

    def blocks(self):
        return [block for table in self.tables.values() for block in table]

    def lies(self):
        return [block.host for table in self.tables.values() for block in table]

    def free(self, host):
        return self.size - self.lies().count(host)

    def place(self, home):
        """Where one block more for a sequence of that home lies."""
        if self.free(home):
            return home
        most, host = max((self.free(host), -host) for host in self.hosts)
        if most <= self.keeps:
            raise errors.OutOfBlocksError
        return -host

    def state(self):
        tables = {seq: list(table) for seq, table in self.tables.items()}
        return list(self.hosts), dict(self.homes), tables, list(self.loans), {b: b.host for b in self.blocks()}

    def restore(self, hosts, homes, tables, loans, where):
        self.hosts, self.homes, self.tables, self.loans = hosts, homes, tables, loans
        for block, host in where.items():
            block.host = host

    def allocate(self, seq, count, home):
        self.homes[seq], self.tables[seq] = home, []
        self.append(seq, count)

    def append(self, seq, count):
        for _ in range(count):
            block = Block(self.place(self.homes[seq]), seq)
            self.tables[seq].append(block)
            if block.host != self.homes[seq]:
                self.loans.append(block)

    def release(self, seq):
        self.loans = [block for block in self.loans if block not in self.tables[seq]]
        del self.homes[seq], self.tables[seq]

    def repay(self, limit):
        moved = []
        while len(moved) < limit:
            able = [block for block in self.loans if self.free(self.homes[block.seq])]
            if not able:
                break
            able[0].host = self.homes[able[0].seq]
            self.loans.remove(able[0])
            moved.append(able[0])
        return moved

    def remove(self, host):
        """The blocks that moved."""
        moved = []
        self.hosts.remove(host)
        for seq, table in self.tables.items():
            if self.homes[seq] == host:
                self.homes[seq] = max(self.hosts, key=lambda each: (self.free(each), -each))
                self.loans = [block for block in self.loans if block not in table]
                self.loans += [block for block in table if block.host not in (self.homes[seq], host)]
            for block in table:
                if block.host == host:
                    if block in self.loans:
                        self.loans.remove(block)
                    block.host = self.place(self.homes[seq])
                    if block.host != self.homes[seq]:
                        self.loans.append(block)
                    moved.append(block)
        return moved

    def pairs(self):
        found = {}
        for block in self.loans:
            pair = block.host, self.homes[block.seq]
            found[pair] = found.get(pair, 0) + 1
        return dict(sorted(found.items()))


class Machine:
    """A ledger, its model, and a device: contents are written where tables say, moved, and read from there."""

    def __init__(self, num_hosts, size, watermark):
        self.ledger = Ledger(num_hosts, size, watermark=watermark)
        self.calls = []
        self.plain = PlainLedger(num_hosts, size, int(watermark * size))
        self.device = {}

    def both(self, plain, real):
        """The same call to the model and the ledger; one that raises changes neither."""
        digest, before = self.ledger.digest(), self.plain.state()
        try:
            expected = plain(self.plain)
        except errors.OutOfBlocksError:
            self.plain.restore(*before)
            with pytest.raises(errors.OutOfBlocksError):
                real(self.ledger)
            assert self.ledger.digest() == digest  # and the rest is looked at by `check`
            return None, None
        given = real(self.ledger)
        assert self.ledger.digest() != digest
        self.calls.append(real)
        return expected, given

    def grown(self, seq):
        """Writes what belongs into new blocks."""
        if seq in self.plain.tables:
            for block, number in zip(self.plain.tables[seq], self.ledger.table(seq), strict=True):
                if block.number is None:
                    block.number = number
                    self.device[number] = block

    def moved(self, expected, given):
        """Copies contents in the order given, and compares whose they were."""
        if expected is None:
            return
        assert [source for source, _ in given] == [block.number for block in expected]
        for block, (source, target) in zip(expected, given, strict=True):
            self.device[target], block.number = self.device[source], target

    def check(self):
        plain, ledger = self.plain, self.ledger
        assert ledger.hosts == sorted(plain.hosts) and ledger.sequences == list(plain.tables)
        for seq, table in plain.tables.items():
            numbers = ledger.table(seq)
            assert [number // plain.size for number in numbers] == [block.host for block in table]
            assert [self.device[number] for number in numbers] == table and ledger.home(seq) == plain.homes[seq]
        lies = plain.lies()
        free = {host: plain.size - lies.count(host) for host in plain.hosts}
        lent = sum([max(each - plain.keeps, 0) for each in free.values()])
        for home, each in free.items():
            assert ledger.free_blocks(home) == each >= 0
            assert ledger.room(home) == each + lent - max(each - plain.keeps, 0)
        assert ledger.loans == plain.pairs()
        ledger.check()


NAMES = ["a", 0, "", None, ("t", 1), b"a", "b", -7]


def one_operation(machine, rng):
    """Draws an operation, right or wrong, and does it."""
    plain = machine.plain
    known, unknown = list(plain.tables), [name for name in NAMES if name not in plain.tables]
    what = rng.choices(
        ["allocate", "append", "free", "repay", "add", "remove", "wrong"], [20, 40, 15, 20, 1, 1, 8]
    )[0]  # fmt: skip
    if what == "allocate" and unknown:
        seq, home, count = (
            rng.choice(unknown),
            rng.choice(plain.hosts),
            rng.choice([0, 1, 2, plain.size, plain.size + 3]),
        )
        machine.both(lambda p: p.allocate(seq, count, home), lambda l: l.allocate(seq, count, home=home))
        machine.grown(seq)
    elif what == "append" and known:
        seq, count = rng.choice(known), rng.choice([0, 1, 1, 1, 2, 3])
        machine.both(lambda p: p.append(seq, count), lambda l: l.append(seq, count))
        machine.grown(seq)
    elif what == "free" and known:
        seq = rng.choice(known)
        machine.both(lambda p: p.release(seq), lambda l: l.free(seq))
    elif what == "repay":
        limit = rng.choice([0, 1, 2, 5, 99])
        machine.moved(*machine.both(lambda p: p.repay(limit), lambda l: l.repay(limit)))
    elif what == "add" and len(plain.hosts) < 5:
        host = next(number for number in itertools.count() if number not in plain.hosts)
        machine.both(lambda p: p.hosts.append(host), lambda l: l.add_host())
    elif what == "remove" and len(plain.hosts) > 1:
        host = rng.choice(plain.hosts)
        machine.moved(*machine.both(lambda p: p.remove(host), lambda l: l.remove_host(host)))
    elif what == "wrong":
        refused(machine, rng, known, unknown)


def refused(machine, rng, known, unknown):
    """A call that raises what it should, and changes nothing."""
    ledger, nobody = machine.ledger, max(machine.plain.hosts) + 1
    calls = [(errors.RangeError, lambda: ledger.remove_host(nobody)), (errors.RangeError, lambda: ledger.repay(-1))]
    if unknown:
        calls += [
            (errors.UnknownSequenceError, lambda: ledger.free(unknown[0])),
            (errors.UnknownSequenceError, lambda: ledger.append(unknown[0], 0)),
            (errors.RangeError, lambda: ledger.allocate(unknown[0], 1, home=nobody)),
            (errors.OutOfBlocksError, lambda: ledger.allocate(unknown[0], ledger.room(home) + 1, home=home)),
        ]
        home = rng.choice(machine.plain.hosts)
    if known:
        seq = rng.choice(known)
        calls += [
            (errors.DuplicateSequenceError, lambda: ledger.allocate(seq, 0, home=machine.plain.hosts[0])),
            (errors.OutOfBlocksError, lambda: ledger.append(seq, ledger.room(ledger.home(seq)) + 1)),
        ]
    error, call = rng.choice(calls)
    before, state = ledger.digest(), pickle.dumps(ledger)
    with pytest.raises(error):
        call()
    assert (ledger.digest(), pickle.dumps(ledger)) == (before, state)


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("count", [12_500, pytest.param(250_000, marks=FULL_RUN)])
@pytest.mark.parametrize(("num_hosts", "size", "watermark"), [(3, 6, 0.2), (2, 4, 0.0), (4, 5, 0.45), (1, 7, 0.3)])
def test_random_operations(num_hosts, size, watermark, count):
    """After each: blocks lie where the model's do, loans and room are its own, contents are read from the tables."""
    rng = random.Random(f"{num_hosts} {size} {watermark} {count}")
    machine = Machine(num_hosts, size, watermark)
    for _ in range(count):
        one_operation(machine, rng)
        machine.check()
    again = Ledger(num_hosts, size, watermark=watermark)  # told only what did not raise
    for call in machine.calls:
        call(again)
    assert again.digest() == machine.ledger.digest()
    for seq in list(machine.plain.tables):
        machine.ledger.free(seq)
    machine.ledger.check()
    assert machine.ledger.num_free == size * machine.ledger.num_hosts and machine.ledger.loans == {}


# What fits ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("watermark", [0.0, 0.05, 0.25, 0.9])
def test_a_trace_fits_exactly_if_its_sum_does(watermark):
    """Sequences come until one does not fit: the sum alone says which, whatever their homes."""
    for seed in range(40):
        rng = random.Random(seed)
        num_hosts, size = rng.randint(1, 5), rng.randint(1, 30)
        ledger, keeps = Ledger(num_hosts, size, watermark=watermark), int(watermark * size)
        for seq in itertools.count():
            home, count = rng.randrange(num_hosts), rng.randint(1, 2 * size)
            free = [ledger.free_blocks(host) for host in range(num_hosts)]
            fits = count <= free[home] + sum(max(f - keeps, 0) for h, f in enumerate(free) if h != home)
            if not watermark:
                assert fits == (sum(len(ledger.table(s)) for s in range(seq)) + count <= num_hosts * size)
            if not fits:
                with pytest.raises(errors.OutOfBlocksError):
                    ledger.allocate(seq, count, home=home)
                break
            ledger.allocate(seq, count, home=home)
            ledger.check()


def test_a_sequence_takes_all_hosts_but_what_they_keep():
    ledger = Ledger(4, 100, watermark=0.05)
    ledger.allocate("long", 100 + 3 * 95, home=2)
    assert ledger.loans == {(0, 2): 95, (1, 2): 95, (3, 2): 95} and ledger.room(2) == 0 and ledger.room(0) == 5
    ledger.allocate("own", 5, home=0)
    with pytest.raises(errors.OutOfBlocksError, match="0 there and 0 that others lend"):
        ledger.append("long")


def test_who_has_most_lends():
    ledger = Ledger(3, 4, watermark=0)
    ledger.allocate("a", 4, home=0)
    ledger.allocate("b", 1, home=1)
    ledger.append("a", 3)  # 2 has four free, then 1 and 2 have three: the lower number, then 2
    assert [block // 4 for block in ledger.table("a")] == [0, 0, 0, 0, 2, 1, 2]


def test_moves_apply_in_order():
    """Two hosts that owe each other: what one gives back is where the other's comes home to."""
    ledger = Ledger(2, 2, watermark=0)
    ledger.allocate("x", 1, home=0)
    ledger.allocate("y", 1, home=1)
    ledger.allocate("a", 2, home=0)
    ledger.free("x")
    ledger.allocate("b", 1, home=1)
    assert (ledger.table("a"), ledger.table("b"), ledger.loans) == ([1, 3], [0], {(0, 1): 1, (1, 0): 1})
    assert ledger.repay(9) == []  # neither has a block free at home
    ledger.free("y")
    assert ledger.repay(0) == []
    again = copy.deepcopy(ledger)
    assert again.repay(9) == [(0, 2), (3, 0)] and again.loans == {}
    assert ledger.repay(1) + ledger.repay(1) + ledger.repay(1) == [(0, 2), (3, 0)]
    assert (ledger.table("a"), ledger.table("b")) == (again.table("a"), again.table("b")) == ([1, 0], [2])


def test_the_oldest_loan_is_repaid_first():
    ledger = Ledger(3, 2, watermark=0)
    ledger.allocate("x", 2, home=0)
    ledger.allocate("new", 1, home=0)
    ledger.allocate("newer", 1, home=0)
    ledger.append("new")
    assert [ledger.table(seq) for seq in ("new", "newer")] == [[2, 3], [4]]
    ledger.free("x")
    assert ledger.repay(9) == [(2, 0), (4, 1)] and ledger.loans == {(1, 0): 1}


def test_a_host_comes_back_under_its_number():
    ledger = Ledger(3, 4, watermark=0)
    ledger.allocate("a", 6, home=1)
    moves = ledger.remove_host(1)
    assert [source for source, _ in moves] == [4, 5, 6, 7] and ledger.hosts == [0, 2]
    assert ledger.home("a") == 0 and ledger.loans == {(2, 0): 2}
    ledger.check()
    assert ledger.add_host() == 1 and ledger.add_host() == 3 and ledger.num_free == 16 - 6


def test_a_host_that_cannot_be_emptied_stays():
    ledger = Ledger(2, 4, watermark=0.5)
    ledger.allocate("a", 3, home=0)
    ledger.allocate("b", 2, home=1)
    state = pickle.dumps(ledger)
    with pytest.raises(errors.OutOfBlocksError, match="host 1 cannot leave"):
        ledger.remove_host(1)
    assert pickle.dumps(ledger) == state
    ledger.free("a")
    assert len(ledger.remove_host(1)) == 2
    with pytest.raises(errors.ConfigError, match="only one"):
        ledger.remove_host(0)


# Digests --------------------------------------------------------------------------------------------------------------


def known_operations(ledger):
    """A few of each kind."""
    ledger.allocate("ü", 7, home=0)
    ledger.allocate(("t", -1, None), 2, home=1)
    ledger.append("ü")
    ledger.allocate(b"c", 2, home=2)
    ledger.free(("t", -1, None))
    ledger.append(b"c")
    ledger.free("ü")
    assert ledger.repay(3) and ledger.add_host() == 3
    ledger.allocate(1, 5, home=1)
    ledger.append(b"c", 0)
    assert len(ledger.remove_host(1)) == 4 and ledger.loans
    return ledger.digest().hex()


KNOWN = "d68b6a13e8ed26182d29864ffd30c6a2bb5a1635c8304cb44f78cb8b8afd078d"


def test_the_digest_is_known():
    """In every version: of the same calls it is this."""
    assert known_operations(Ledger(3, 4, watermark=0.25)) == KNOWN


def test_the_digest_is_that_of_another_process():
    code = (
        "import test_serving_ledger as t; from kvattn.serving import Ledger; "
        "print(t.known_operations(Ledger(3, 4, watermark=0.25)))"
    )
    tests = os.path.dirname(__file__)
    environment = os.environ | {"PYTHONHASHSEED": "1", "PYTHONPATH": os.pathsep.join([tests, os.path.dirname(tests)])}
    assert subprocess.check_output([sys.executable, "-c", code], env=environment, text=True).strip() == KNOWN


def test_each_call_is_another_digest():
    makes = [lambda: Ledger(3, 4), lambda: Ledger(2, 4), lambda: Ledger(3, 5), lambda: Ledger(3, 4, watermark=0.5)]
    calls = [
        lambda l: l.allocate("a", 1, home=0),
        lambda l: l.allocate("a", 2, home=0),
        lambda l: l.allocate("a", 1, home=1),
        lambda l: l.allocate("b", 1, home=0),
        lambda l: l.allocate(b"a", 1, home=0),
        lambda l: l.allocate(("a",), 1, home=0),
        lambda l: l.allocate(("a", ()), 1, home=0),
        lambda l: l.repay(1),
        lambda l: l.repay(2),
        lambda l: l.add_host(),
    ]
    found = [make().digest() for make in makes]
    for call in calls:
        ledger = Ledger(3, 4)
        call(ledger)
        found.append(ledger.digest())
    assert len(set(found)) == len(makes) + len(calls) and {len(digest) for digest in found} == {32}


def test_asking_is_no_part_of_it():
    ledger = Ledger(2, 4)
    ledger.allocate("a", 5, home=0)
    before = ledger.digest()
    assert ledger.table("a") and ledger.room(0) and ledger.loans and ledger.sequences and "a" in ledger
    assert ledger.free_blocks(1) and ledger.num_free and ledger.home("a") == 0 and repr(ledger)
    ledger.check()
    with pytest.raises(errors.OutOfBlocksError):
        ledger.append("a", 9)
    assert ledger.digest() == before


def test_no_two_values_are_written_alike():
    values = [None, 0, 1, -1, 16, "", "0", "i0;", "n", b"", b"0", b"n", (), (None,), (0,), ((),), ((), ()), (0, 1),
              ("0",), ("a", "b"), ("ab",), ("a", "b", ""), ("a", ("b",)), "\ud800", 10**6000, -(10**6000)]  # fmt: skip
    written = [digests.written(value) for value in values]
    assert len(set(written)) == len(values)
    assert not any(a != b and b.startswith(a) for a in written for b in written)


@pytest.mark.wrong_types
def test_names_that_are_equal_are_one():
    class Name(str):
        __eq__ = lambda self, other: False
        __hash__ = str.__hash__

    one, other = Ledger(2, 4), Ledger(2, 4)
    one.allocate(1, 1, home=0)
    other.allocate(True, 1, home=False + 0)
    assert 1 in other and np.int64(1) in other and one.digest() == other.digest()
    one.append(1)
    other.append(np.int64(1))
    assert one.digest() == other.digest()
    one.allocate(Name("x"), 1, home=0)
    other.allocate("x", 1, home=0)
    assert one.table("x") == one.table(Name("x")) and one.digest() == other.digest()


# Proof ----------------------------------------------------------------------------------------------------------------


def lending(ledger):
    return ledger._lending


BROKEN = {
    "a block in two tables": lambda l: l._accounts["b"].table.append(l._accounts["a"].table[0]),
    "a block twice in one table": lambda l: l._accounts["a"].table.append(l._accounts["a"].table[0]),
    "a block that is lost": lambda l: (
        lending(l).free[0].append(l._accounts["b"].table.pop()) or lending(l).free[0].clear()
    ),
    "a block that is free and in a table": lambda l: lending(l).free[1].append(l._accounts["a"].table[0]),
    "a block twice free": lambda l: lending(l).free[1].append(lending(l).free[1][0]),
    "a block that is free elsewhere": lambda l: lending(l).free[0].append(lending(l).free[1].pop()),
    "a block beyond all hosts": lambda l: lending(l).free[1].append(8),
    "a loan that is forgotten": lambda l: lending(l).settle(next(iter(lending(l).owed[0]))),
    "a loan that is none": lambda l: lending(l).owed[0].update({0: 99}),
    "a loan of another": lambda l: lending(l).owed[1].update(lending(l).owed[0]),
    "loans in another order": lambda l: lending(l).owed[0].move_to_end(next(iter(lending(l).owed[0]))),
    "a borrower that is another": lambda l: l._borrowers.update({b: l._accounts["b"] for b in l._borrowers}),
    "a home that is another": lambda l: setattr(l._accounts["a"], "home", 1),
    "a host without loans": lambda l: lending(l).owed.pop(1),
}


@pytest.mark.parametrize("what", BROKEN)
def test_check_finds(what):
    ledger = Ledger(2, 4, watermark=0)
    ledger.allocate("a", 6, home=0)
    ledger.allocate("b", 1, home=1)
    ledger.check()
    BROKEN[what](ledger)
    with pytest.raises(errors.BlockStateError):
        ledger.check()


def test_repr_and_counts():
    ledger = Ledger(2, 4)
    ledger.allocate("a", 6, home=0)
    assert repr(ledger) == "Ledger(hosts [0, 1] of 4 blocks, 2 free, 2 lent, 1 sequences)"
    assert "a" in ledger and "b" not in ledger and (ledger.num_hosts, ledger.num_free, ledger.watermark) == (2, 2, 0.05)


# Bad input ------------------------------------------------------------------------------------------------------------

TABLE = Table()
bad, defined = TABLE.bad, TABLE.defined
CONFIG, TYPE, RANGE, OUT = errors.ConfigError, errors.DTypeError, errors.RangeError, errors.OutOfBlocksError


def ledger_of(num_hosts=2, blocks_per_host=4, watermark=0.25, **sequences):
    """A ledger that has these sequences, {name: (home, blocks)}."""
    made = Ledger(num_hosts, blocks_per_host, watermark=watermark)
    for name, (home, count) in sequences.items():
        made.allocate(name, count, home=home)
    return made


bad(146, "no hosts", CONFIG, "num_hosts must be >= 1, got 0")(lambda: Ledger(0, 4))
bad(146, "hosts of no blocks", CONFIG, "blocks_per_host must be >= 1, got 0")(lambda: Ledger(2, 0))
bad(146, "half a host", TYPE, "num_hosts", "2.0")(lambda: Ledger(2.0, 4))
bad(146, "True blocks", TYPE, "blocks_per_host", "True")(lambda: Ledger(2, True))
for wrong in (1.0, -0.1, float("nan"), float("inf"), "0.1", None, True):
    bad(146, f"a watermark of {wrong!r}", CONFIG, "[0, 1)", repr(wrong))(
        lambda wrong=wrong: Ledger(2, 4, watermark=wrong)
    )
bad(147, "a prompt of more", OUT, "8 blocks for sequence 'a' at home on host 1", "7 can be had, 4 there", "keeps 1")(
    lambda: ledger_of().allocate("a", 8, home=1)
)
bad(147, "one block more", OUT, "1 block for sequence 'a'", "0 can be had")(lambda: ledger_of(a=(0, 7)).append("a"))
bad(148, "a home that is not there", RANGE, "home", "[0, 1]", "got 2")(lambda: ledger_of().allocate("a", 1, home=2))
bad(148, "a negative home", RANGE, "home must be >= 0, got -1")(lambda: ledger_of().allocate("a", 1, home=-1))
bad(148, "a home that is no int", TYPE, "home", "'0'")(lambda: ledger_of().allocate("a", 1, home="0"))
bad(148, "no home", TYPE, "home", "None")(lambda: ledger_of().allocate("a", 1, home=None))
bad(148, "a host that is not there leaves", RANGE, "host", "got 2")(lambda: ledger_of().remove_host(2))
bad(148, "a host that is not there is asked for", RANGE, "host", "got 5")(lambda: ledger_of().free_blocks(5))
bad(148, "the room of a host that is not there", RANGE, "home", "got 5")(lambda: ledger_of().room(5))
bad(148, "the last host leaves", CONFIG, "host 0 is the only one")(lambda: ledger_of(1).remove_host(0))
for name in ("append", "free", "table", "home"):
    bad(149, f"an unknown sequence in {name}", errors.UnknownSequenceError, "'b'")(
        lambda name=name: getattr(ledger_of(a=(0, 1)), name)("b")
    )
bad(149, "a second prompt", errors.DuplicateSequenceError, "'a'", "append")(
    lambda: ledger_of(a=(0, 1)).allocate("a", 0, home=1)
)
bad(150, "a negative number of blocks", RANGE, "num_blocks must be >= 0, got -1")(
    lambda: ledger_of().allocate("a", -1, home=0)
)
bad(150, "a float of blocks", TYPE, "num_blocks", "1.0")(lambda: ledger_of(a=(0, 1)).append("a", 1.0))
bad(150, "a bool of blocks", TYPE, "num_blocks", "True")(lambda: ledger_of(a=(0, 1)).append("a", True))
bad(150, "a negative limit", RANGE, "limit must be >= 0, got -1")(lambda: ledger_of().repay(-1))
bad(150, "a limit that is no int", TYPE, "limit", "None")(lambda: ledger_of().repay(None))
for wrong in (1.0, ["a"], {"a"}, object, frozenset("a"), ("a", 1.5), ("a", ["b"])):
    for name, call in {
        "allocate": lambda l, seq: l.allocate(seq, 1, home=0), "append": lambda l, seq: l.append(seq),
        "free": lambda l, seq: l.free(seq), "in": lambda l, seq: seq in l,
    }.items():  # fmt: skip
        bad(151, f"{wrong!r} as the name in {name}", TYPE, "seq must be an int, a string, bytes, None or a tuple")(
            lambda call=call, wrong=wrong: call(ledger_of(), wrong)
        )
bad(152, "a host leaves", OUT, "host 1 cannot leave", "'b'")(lambda: ledger_of(a=(0, 3), b=(1, 3)).remove_host(1))
bad(153, "no steps", CONFIG, "every must be >= 1, got 0")(lambda: Agreement(lambda mine: [mine], every=0))
bad(153, "a digest of text", TYPE, "digest must be bytes", "'a'")(lambda: Agreement(lambda mine: [mine]).step("a"))
bad(153, "a short digest", RANGE, "32 bytes, got 3")(lambda: Agreement(lambda mine: [mine]).step(b"abc"))


@defined(149, "a sequence twice, and no blocks at all")
def _():
    made = ledger_of(a=(0, 3), b=(1, 0))
    made.free("a")
    with pytest.raises(errors.UnknownSequenceError):
        made.free("a")
    made.check()
    assert made.num_free == 8 and made.table("b") == []


@pytest.mark.parametrize("row", TABLE.parameters())
def test_rows(row):
    run(row)


def test_numbers():
    assert TABLE.numbers() == set(range(146, 154))


# Agreement ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("every", [1, 3, 7, 64])
def test_the_first_step_at_which_processes_differ(every):
    """Ledgers of three processes, one of which is told something else at step 20, by chance the same length later."""
    for differs in (0, 1, 19, 20, 62, 63):
        ledgers = [Ledger(2, 200) for _ in range(3)]
        trails = [[], [], []]
        for step in range(64):
            for process, ledger in enumerate(ledgers):
                other = process == 1 and step == differs
                ledger.allocate(step, 2 if other else 1, home=step % 2)
                trails[process].append(ledger.digest())
        parts = [[b"".join(t[i : i + every]) for i in range(0, 64, every)] for t in trails]
        for process in range(3):
            answers = iter(zip(*parts, strict=True))
            agreement = Agreement(lambda mine, answers=answers: next(answers), every=every)
            with pytest.raises(errors.DivergedError, match=f"since step {differs}: 0, 2 and 1 are not") as caught:
                for digest in trails[process]:
                    agreement.step(digest)
                agreement.compare()
            assert caught.value.step == differs and caught.value.processes == [[0, 2], [1]]
            again = pickle.loads(pickle.dumps(caught.value))
            assert str(again) == str(caught.value) and again.step == differs


def test_a_process_that_did_fewer_steps_differs():
    agreement = Agreement(lambda mine: [mine, mine[:-32]], every=5)
    for i in range(3):
        agreement.step(bytes([i]) * 32)
    with pytest.raises(errors.DivergedError, match="since step 2"):
        agreement.compare()


@pytest.mark.parametrize("byte", [0, 1, 31])
def test_every_byte_of_a_digest_counts(byte):
    other = bytes(i == byte for i in range(32))
    agreement = Agreement(lambda mine: [mine, mine[:-32] + other], every=2)
    agreement.step(bytes(32))
    with pytest.raises(errors.DivergedError, match="since step 1"):
        agreement.step(bytes(32))


def test_equal_processes_go_on():
    exchanged = []
    agreement = Agreement(lambda mine: exchanged.append(mine) or [mine] * 4, every=4)
    for i in range(10):
        agreement.step(bytes([i]) * 32)
    assert agreement.num_compared == 8 and [len(each) for each in exchanged] == [128, 128]
    agreement.compare()
    assert agreement.num_compared == 10 and len(exchanged[-1]) == 64
