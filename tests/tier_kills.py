"""Processes that store records and are killed, and what they leave: run by test_serving_tiers_disk.py.

    python tests/tier_kills.py FOLDER calls 2          killed at every system call of a store, before and in it; 1: or
    python tests/tier_kills.py FOLDER random 15        killed at 15 random times
    python tests/tier_kills.py FOLDER race 4           4 processes store the same records, then end

This process has one thread, so that it can fork; the package is imported once for all. It prints what it has seen, and
ends with status 0 if nothing was wrong.
"""

import os
import pathlib
import signal
import sys
import time

sys.path[:0] = [str(pathlib.Path(__file__).resolve().parent), str(pathlib.Path(__file__).resolve().parent.parent)]

import tier_cases  # noqa: E402
from tier_cases import System, chance, half, record, right, same  # noqa: E402

from kvattn.serving import DiskTier, page_names  # noqa: E402

# Pages of a few bytes and of many, so that a kill meets writing as well as what surrounds it.
POOL = [record(page_names(tier_cases.sized_kind(size), "", [i] * tier_cases.PAGE)[0])
        for i, size in enumerate([100, 1000, 300_000, 50_000] * 3)]  # fmt: skip
ROOM = 1_000_000  # so that records are removed too


def forked(work):
    """Starts a process that does this and ends."""
    pid = os.fork()
    if pid:
        return pid
    try:
        work()
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", flush=True)
        os._exit(1)
    os._exit(0)


def ended(pid):
    """How a process ended: 0, or by which signal, as a negative number."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def store_forever(folder, seed):
    rng = chance(seed)
    with System(small_writes), DiskTier(folder, ROOM) as tier:
        while True:
            made = rng.choice(POOL)
            tier.remove(made.name.key)
            if rng.random() < 0.8:
                tier.put(made)
            if rng.random() < 0.2:
                tier.flush()


def small_writes(number, name, call):
    """Writes of 256 bytes, so that most of the time something is half written."""
    return call.func(call.args[0], call.args[1][:256]) if name == "write" else call()


def die_at(number, in_it):
    """Stores two records; dies at a system call: before it, or with half of it done."""

    def at(count, name, call):
        if count == number:
            if in_it:
                half(call)
            os.kill(os.getpid(), signal.SIGKILL)
        return call()

    return System(at)


def check(folder):
    """What a new tier finds is right, and nothing else lies about."""
    with DiskTier(folder, 10 * ROOM) as tier:
        left = {path.name for path in pathlib.Path(folder).iterdir()}
        found = [r for r in POOL if r.name.key in tier]
        assert left == {f"{r.name.key.hex()}.kv" for r in found}, left
        assert all(right(tier.read(r.name), r) for r in POOL)
        assert all(same(tier.get(r.name), r) for r in found)
        assert tier.counters.damaged == tier.counters.failed == tier.counters.refused == 0
        assert tier.nbytes == sum(path.stat().st_size for path in pathlib.Path(folder).iterdir())
    print(f"{len(found)} records", flush=True)


def calls(folder, times):
    """Kills at every system call in turn, until there is none left; before it or in it, or once each."""
    os.mkdir(folder)
    kills, number = 0, 0
    while True:
        for in_it in (False, True) if times == 2 else (number % 2 == 0,):
            target = pathlib.Path(folder) / f"{number}-{in_it}"

            def work(target=target, in_it=in_it, number=number):
                with die_at(number, in_it), DiskTier(target, ROOM) as tier:
                    tier.write(POOL[0])
                    tier.remove(POOL[0].name.key)
                    tier.write(POOL[1])

            status = ended(forked(work))
            if target.exists():
                assert ended(forked(lambda target=target: check(target))) == 0, (number, in_it)
            if status != -signal.SIGKILL:
                assert status == 0 and number > 15, (status, number)
                return kills
            kills += 1
        number += 1


def at_random(folder, count):
    """Kills at random times, one directory for all."""
    rng, unfinished = chance("kills", count), 0
    for i in range(count):
        pid = forked(lambda i=i: store_forever(folder, i))
        time.sleep(0.005 + rng.random() ** 2 * 0.1)
        os.kill(pid, signal.SIGKILL)
        assert ended(pid) == -signal.SIGKILL
        unfinished += any(pathlib.Path(folder).glob("tmp-*"))
        if pathlib.Path(folder).exists():
            assert ended(forked(lambda: check(folder))) == 0, i
    assert unfinished > count / 20, f"{unfinished} of {count} kills met a write"
    return count


def race(folder, count):
    """Several store and remove the same records at once; all that is left is right, and nothing is damaged."""

    def work(seed):
        rng = chance(seed)
        with DiskTier(folder, 10 * ROOM) as tier:
            for _ in range(50):
                made = rng.choice(POOL)
                tier.put(made)
                assert right(tier.get(made.name), made)
                if rng.random() < 0.1:
                    tier.remove(made.name.key)
                if rng.random() < 0.1:
                    tier.flush()
            tier.flush()
            found = [(r, tier.get(r.name)) for r in POOL]
            assert all(right(got, r) for r, got in found)
            assert tier.counters.damaged == tier.counters.refused == 0

    for status in [ended(pid) for pid in [forked(lambda seed=seed: work(seed)) for seed in range(count)]]:
        assert status == 0
    assert ended(forked(lambda: check(folder))) == 0
    return count


def main():
    folder, what, *count = sys.argv[1:]
    done = {"calls": calls, "random": at_random, "race": race}[what](folder, *map(int, count))
    print(f"done {done}")


if __name__ == "__main__":
    main()
