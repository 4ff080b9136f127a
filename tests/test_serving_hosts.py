"""An engine over several hosts: pages lent and moved home, one schedule in all processes, and how they end together.

Most of it runs on a device that holds text (`engine_models`), with threads as processes. `hosts_worker.py` is a real
process: its tokens are those of one with one large pool.
"""

import contextlib
import dataclasses
import itertools
import json
import os
import pathlib
import random
import socket
import sys
import threading
import time
import types

import engine_models
import hosts_worker
import jax
import numpy as np
import pytest
from engine_models import TextDevice, continued
from flax import nnx
from jax.sharding import AxisType, Mesh
from sharding_cases import tpu_devices

from kvattn import errors
from kvattn.models import Decoder, DecoderConfig, loop
from kvattn.models.sampling import Sampler
from kvattn.serving import BlockPool, Engine, GroupedPool, Hosts, HostTier, arrivals, contents, coordinator, together
from kvattn.serving.device import PROGRAMS
from kvattn.serving.hosted import HostedPool
from kvattn.serving.peers import Peers
from kvattn.serving.tables import nobodys
from kvattn.sharding import cache_sharding, collectives

ROOT = pathlib.Path(__file__).resolve().parent.parent
TINY = dict(vocab_size=engine_models.V, model_dim=4, num_layers=1, num_heads=4, num_kv_heads=1, head_dim=2, mlp_dim=4)


# Pools ----------------------------------------------------------------------------------------------------------------


def hosted(num_hosts=3, per_host=4, block_size=2):
    return HostedPool(num_hosts * per_host, block_size, num_hosts=num_hosts, watermark=0)


def test_a_pool_of_hosts_is_a_pool():
    """Random operations: what fits, lengths and copies are a `BlockPool`'s; contents follow tables."""
    rng = random.Random(0)
    plain, pool = BlockPool(12, 2, watermark=0), hosted()
    device, written, holds, names, moved = {}, {}, [], 0, 0

    def write(seq, start):
        for at in range(start, pool.length(seq)):
            device[pool.table(seq)[at // 2], at % 2] = written[seq, at] = rng.random()

    for _ in range(4000):
        known = plain.sequences
        what = rng.choice(
            ["allocate", "append", "append", "fork", "free", "forget", "repay", "repay", "hold", "release", "release"]
        )
        seq = rng.choice(known) if known else None
        try:
            if what == "allocate":
                names, count = names + 1, rng.randint(0, 9)
                pool.allocate(names, count)
                plain.allocate(names, count)
                write(names, 0)
            elif what == "repay":
                limit = rng.choice([0, 1, 9])
                moves = pool.repay(limit)
                assert len(moves) <= limit
                for source, target in moves:
                    assert source // 4 != target // 4
                    for at in range(2):
                        device[target, at] = device.get((source, at))
                moved += len(moves)
            elif what == "hold" and known:
                holds.append([[b for b in each.table(seq) if b >= 0] for each in (pool, plain)])
                for each, blocks in zip((pool, plain), holds[-1], strict=True):
                    each.hold(blocks)
            elif what == "release" and holds:
                for each, blocks in zip((pool, plain), holds.pop(rng.randrange(len(holds))), strict=True):
                    each.release(blocks)
            elif known and what == "append":
                length, count = pool.length(seq), rng.choice([1, 1, 2, 5])
                copies = pool.append(seq, count)
                assert len(plain.append(seq, count)) == len(copies)
                for source, target in copies:
                    for at in range(2):
                        device[target, at] = device.get((source, at))
                write(seq, length)
            elif known and what == "fork":
                names += 1
                pool.fork(seq, names)
                plain.fork(seq, names)
                written |= {(names, at): value for (s, at), value in list(written.items()) if s == seq}
                assert pool.home(names) == pool.home(seq)
            elif known and what == "free":
                pool.free(seq)
                plain.free(seq)
                written = {key: value for key, value in written.items() if key[0] != seq}
            elif known and what == "forget":
                count = rng.randint(0, pool.length(seq))
                pool.forget(seq, count)
                plain.forget(seq, count)
        except errors.OutOfBlocksError:
            before = pool.digest()
            with pytest.raises(errors.OutOfBlocksError):
                plain.allocate(names, count) if what == "allocate" else plain.append(seq, count)
            assert pool.digest() == before
        pool.check()
        assert pool.num_free == plain.num_free == sum(pool.free_by_host)
        for seq in plain.sequences:
            table = pool.table(seq)
            assert pool.length(seq) == plain.length(seq)
            assert [b < 0 for b in table] == [b < 0 for b in plain.table(seq)]
            for at in range(pool.length(seq)):
                if table[at // 2] >= 0:
                    assert device[table[at // 2], at % 2] == written[seq, at]
    assert moved > 20


def test_home_first_then_who_has_most():
    pool = hosted()
    pool.allocate("a", 12)  # 4 blocks of host 0, then of 1 and 2 in turn
    assert [block // 4 for block in pool.table("a")] == [0, 0, 0, 0, 1, 2] and pool.home("a") == 0
    pool.allocate("b", 2)
    assert pool.home("b") == 1 and pool.free_by_host == [0, 2, 3] and pool.loans == {(1, 0): 1, (2, 0): 1}
    pool.append("a", 10)
    assert pool.num_free == 0
    with pytest.raises(errors.OutOfBlocksError):
        pool.append("b", 2)


def test_shared_blocks_stay_where_they_are():
    pool = hosted(num_hosts=2, per_host=2)
    pool.allocate("x", 4)
    pool.allocate("y", 2)
    pool.append("x", 2)
    assert pool.loans == {(1, 0): 1}
    lent = pool.table("x")[2]
    pool.hold([lent])
    pool.fork("x", "z")
    pool.free("x")
    pool.allocate("w", 0)
    assert pool.repay(9) == []
    pool.release([lent])
    pool.forget("z", 4)
    assert pool.repay(9) == [(lent, 1)] and pool.loans == {}
    pool.check()


def test_the_digest_of_a_pool_is_of_its_blocks():
    """The same calls on pools whose free blocks are others."""
    one, other = hosted(), hosted()
    other._lending.free[0].reverse()
    for pool in (one, other):
        pool.allocate("a", 2)
    assert one.digest() != other.digest()


BROKEN = {
    "a loan that is none": lambda pool: pool._lending.owe(0, pool.table("a")[0]),
    "a home that is lost": lambda pool: pool._homes.pop("a"),
    "a free block of another host": lambda pool: pool._lending.free[0].append(pool._lending.free[1].pop()),
    "an owner that is another": lambda pool: pool._lending.debtors.update({pool.table("a")[4]: 2}),
}


@pytest.mark.parametrize("what", BROKEN)
def test_check_finds(what):
    pool = hosted()
    pool.allocate("a", 10)
    pool.check()
    BROKEN[what](pool)
    with pytest.raises(errors.BlockStateError):
        pool.check()


def test_blocks_that_do_not_divide():
    with pytest.raises(errors.ConfigError, match="7 blocks do not divide over 2 hosts"):
        HostedPool(7, 2, num_hosts=2)


# Engines of one process -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def text_model():
    """A model over four hosts that nobody computes."""
    mesh = jax.make_mesh((4,), ("host",), devices=jax.devices()[:4])
    return Decoder(DecoderConfig(**TINY), mesh=mesh, by="sequence", axis="host", rngs=nnx.Rngs(0))


PROMPTS = [[*range(10)], [*range(8), 40], [18], [*range(10), 41, 42, 43], [*range(20, 37)]]


@pytest.mark.parametrize("prefix_cache", [True, False])
def test_texts_longer_than_any_hosts_pool(monkeypatch, text_model, prefix_cache):
    """Four pages each, 31 tokens at most: eight pages. Pages move home, and every text is its own."""
    settings = dict(num_pages=4, max_batch=3, max_length=80, prefix_cache=prefix_cache)
    engine = engine_models.text_engine(monkeypatch, text_model, hosts=Hosts("host", repay=2), **settings)
    requests = [engine.submit(prompt, 14) for prompt in PROMPTS * 3]
    repay, moves, lent = GroupedPool.repay, [], 0
    monkeypatch.setattr(GroupedPool, "repay", lambda pool, limit: moves.append(repay(pool, limit)) or moves[-1])
    while engine.step():
        engine_models.check(engine)
        lent = max(lent, sum(engine.loans()[0].values()))
    done = engine.run()
    assert [done[request][0] for request in requests] == [continued(prompt, 14) for prompt in PROMPTS * 3]
    assert lent >= 3 and any(each for (each,) in moves) and max(len(each) for (each,) in moves) <= 2
    with pytest.raises(errors.OutOfBlocksError):
        engine.submit([*range(45)], 20)


def test_beams_samples_and_windows(monkeypatch):
    mesh = jax.make_mesh((2,), ("host",), devices=jax.devices()[:2])
    config = DecoderConfig(**{**TINY, "num_layers": 2, "windows": (None, 6)})
    model = Decoder(config, mesh=mesh, by="sequence", axis="host", rngs=nnx.Rngs(0))
    engine = engine_models.text_engine(monkeypatch, model, num_pages=(16, 12), hosts="host")
    plain = engine_models.model(num_layers=2, windows=(None, 6))
    alone = engine_models.text_engine(monkeypatch, plain, num_pages=(80, 80))
    ask = lambda e: [
        e.submit(PROMPTS[4], 9, beam_width=3), e.submit([3], 30),
        e.submit(PROMPTS[3], 9, num_samples=3, temperature=1.0),
    ]  # fmt: skip
    requests, expected = ask(engine), ask(alone)
    while engine.step():
        engine_models.check(engine)
    alone.run()
    assert [each.tokens for each in requests] == [each.tokens for each in expected]


@pytest.mark.wrong_types
def test_what_hosts_are_refused(text_model):
    give = dict(num_pages=4, page_size=4, max_length=16)
    alone = engine_models.model()
    with pytest.raises(errors.ConfigError, match="one device"):
        Engine(alone, hosts="host", **give)
    with pytest.raises(errors.ConfigError, match="mesh axes"):
        Engine(text_model, hosts="model", **give)
    mesh = jax.make_mesh((2,), ("host",), devices=jax.devices()[:2])
    other = Decoder(DecoderConfig(**TINY), mesh=mesh, by="replicated", axis="host", rngs=nnx.Rngs(0))
    with pytest.raises(errors.ConfigError, match='by="sequence"'):
        Engine(other, hosts="host", **give)
    for wrong in (dict(axis=3), dict(compare_every=1.0)):
        with pytest.raises(errors.DTypeError):
            Hosts(**{"axis": "host", **wrong})
    for wrong in (
        dict(timeout=0),
        dict(timeout=float("nan")),
        dict(timeout="1"),
        dict(compare_every=0),
        dict(repay=-1),
    ):
        with pytest.raises(errors.ConfigError):
            Hosts(**{"axis": "host", **wrong})


# Threads as processes -------------------------------------------------------------------------------------------------


class Memory:
    """A store of this process."""

    def __init__(self):
        self.held, self.changed, self.is_gone = {}, threading.Condition(), False

    def put(self, name, value):
        with self.changed:
            self._reach()
            self.held[name] = value
            self.changed.notify_all()

    def get(self, name, seconds):
        with self.changed:
            self.changed.wait_for(lambda: self.is_gone or name in self.held, seconds)
            self._reach()
            return self.held.get(name)

    def drop(self, name):
        with self.changed:
            self._reach()
            self.held.pop(name, None)

    def _reach(self):
        if self.is_gone:
            raise ConnectionError("nobody answers")


def all_of(count, do, timeout=2.0):
    """What each of so many threads returned, or raised."""
    store, found = Memory(), [None] * count

    def run(number):
        try:
            found[number] = do(Peers(store, number, count, timeout, "test"), store)
        except BaseException as error:
            found[number] = error

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    return found


def test_all_hear_all():
    def do(peers, store):
        peers.meet({"version": "1", "model": "a"})
        heard = []
        for step in range(50):
            heard.append(peers.tell(step, b"%d" % step if peers.number == 0 else b"?"))
            if step % 7 == 6:
                assert peers.exchange(bytes([peers.number, step])) == [bytes([n, step]) for n in range(3)]
        return heard, len(store.held)

    for heard, held in all_of(3, do):
        assert heard == [b"%d" % step for step in range(50)] and held < 16


def test_other_facts():
    found = all_of(3, lambda peers, _: peers.meet({"version": "12"[peers.number == 2], "model": "a"}))
    assert {type(each) for each in found} == {errors.HostMismatchError}
    assert all("process 2 began with another version than process 0: 2, not 1" in str(each) for each in found)


@pytest.mark.parametrize("victim", [0, 1, 2])
def test_one_that_does_not_come(victim):
    """All others say so within the time, and say it again when they are asked."""

    def do(peers, _):
        peers.exchange(b"")
        if peers.number == victim:
            return None
        began = time.monotonic()
        with pytest.raises(errors.HostLostError) as caught:
            for step in range(100):
                peers.tell(step, b"")
                peers.exchange(b"")
        with pytest.raises(errors.HostLostError):
            peers.tell(0, b"")
        return str(caught.value), time.monotonic() - began

    found = all_of(3, do, timeout=0.6)
    for number in {0, 1, 2} - {victim}:
        said, seconds = found[number]
        assert f"process {victim} did not come within 0.6 s" in said and seconds < 10


def test_a_device_that_never_answers():
    def do(peers, _):
        peers.exchange(b"")
        if peers.number == 2:
            return None
        peers.tell(4, b"")
        with pytest.raises(errors.HostLostError) as caught:
            peers.wait(4, lambda: False)
        return str(caught.value)

    found = all_of(3, do, timeout=0.7)
    assert all(
        "step 4 did not end within 0.7 s" in each and "process 2 did not come to it" in each for each in found[:2]
    )


def test_a_fault_of_one_ends_all():
    def do(peers, _):
        peers.exchange(b"")
        if peers.number == 1:
            return peers.failed(ValueError("what happened"))
        with pytest.raises(errors.HostLostError) as caught:
            peers.wait(0, lambda: False) if peers.number == 0 else peers.tell(0, b"")
        return caught.value

    found = all_of(3, do, timeout=30)
    assert all("process 1 could not go on" in str(error) and "what happened" in str(error) for error in found)


def test_a_store_that_is_gone():
    def do(peers, store):
        peers.exchange(b"")
        both.wait()
        store.is_gone = True
        for call in (lambda: peers.tell(0, b""), lambda: peers.exchange(b"")):
            with pytest.raises(errors.HostLostError, match="process 0, by which"):
                call()

    both = threading.Barrier(2)
    assert set(all_of(2, do)) == {None}


def engines(monkeypatch, model, program, count=3, timeout=10.0, tiers=None, **settings):
    """A program in every one of so many processes; what each returned, or raised.

    `tiers` are of each process.
    """
    monkeypatch.setattr(engine_models.engine, "Device", TextDevice)
    monkeypatch.setattr(together.Together, "wait", lambda self, arrays: None)
    here = threading.local()
    monkeypatch.setattr(together, "peers_of", lambda mesh, timeout: here.peers)
    settings = {"num_pages": 3, "page_size": 4, "max_length": 64, "max_batch": 3, "prefill_chunk": 16, **settings}

    def do(peers, _):
        here.peers = peers
        own = {} if tiers is None else {"tiers": tiers[peers.number]}
        return program(Engine(model, hosts=Hosts("host", compare_every=4), **settings, **own), peers.number)

    return all_of(count, do, timeout)


def test_all_processes_do_the_same(monkeypatch, text_model):
    """Requests of process 0, some of them cancelled while tokens come: the same tokens in the same ticks everywhere."""

    def program(engine, number):
        if number == 0:
            requests = [engine.submit(prompt, 12, namespace=("a", "b")) for prompt in PROMPTS]
            requests.append(engine.submit(PROMPTS[0], 5, num_samples=2, temperature=1.0, priority=2))
            requests.append(engine.submit([5], 9, stop_tokens=iter([11, 3]), on_token=lambda s, t: seen.append(t)))
            engine.submit([7], 30, priority=5, on_token=lambda s, t: requests[1].cancel())
            engine.submit([7], 0)
            early = engine.submit([9], 9)
            early.cancel()
            assert early.state == "waiting"  # until all are told
        else:
            with pytest.raises(errors.UnsupportedError, match="process 0"):
                engine.submit([1], 1)
        ticks = 0
        while engine.step():
            ticks += 1
            engine_models.check(engine)
            if number == 0 and ticks == 9:
                engine.submit(PROMPTS[2], 3)
            if number and ticks == 3:
                for request in engine._jobs:
                    with pytest.raises(errors.UnsupportedError, match="process 0"):
                        request.cancel()
        done = engine.run()
        assert number or early.state == "cancelled"
        stats = engine.stats()
        return list(done.values()), ticks, stats.preemptions, stats.evictions, stats.cached_prompt_tokens

    seen = []
    found = engines(monkeypatch, text_model, program)
    assert found[0] == found[1] == found[2]
    tokens = found[0][0]
    expected = [continued(prompt, 12) for i, prompt in enumerate(PROMPTS) if i != 1]
    assert all([each] in tokens for each in expected) and [continued([5], 9, stop=(11, 3))] in tokens
    assert [continued(PROMPTS[2], 3)] in tokens and [continued(PROMPTS[0], 5, s) for s in (0, 1)] in tokens
    assert [continued(PROMPTS[1], 12)] not in tokens


def test_a_process_that_does_something_else(monkeypatch, text_model):
    """The step is named, everywhere, and none goes on."""

    def program(engine, number):
        if number == 0:
            engine.submit(PROMPTS[0], 30)
        for step in range(99):
            if (number, step) == (1, 5):
                engine._scheduler.pool.pool.pools[0]._hosted.digest = bytes(32)
            try:
                engine.step()
            except errors.DivergedError as error:
                with pytest.raises(errors.DivergedError):
                    engine.step()
                return error.step, error.processes
        return None

    assert engines(monkeypatch, text_model, program) == [(5, [[0, 2], [1]])] * 3


def test_a_callback_that_raises_ends_its_request_only(monkeypatch, text_model):
    class Enough(Exception):
        pass

    def enough(sample, token):
        raise Enough

    def program(engine, number):
        if number == 0:
            bad, _ = engine.submit(PROMPTS[0], 9, on_token=enough), engine.submit(PROMPTS[2], 9)
        raised, more = 0, True
        while more:
            try:
                more = engine.step()
            except Enough:
                raised += 1
        engine_models.check(engine)
        return list(engine.run().values()), raised, number == 0 and bad.state

    found = engines(monkeypatch, text_model, program)
    assert [tokens for tokens, _, _ in found] == [[[continued(PROMPTS[2], 9)]]] * 3
    assert [raised > 0 for _, raised, _ in found] == [True, False, False] and found[0][2] == "cancelled"


def test_an_error_in_one_is_an_error_in_all(monkeypatch, text_model):
    def program(engine, number):
        if number == 0:
            request = engine.submit(PROMPTS[0], 30)
        if number == 2:
            engine._device.fails = lambda what: (_ for _ in ()).throw(ValueError(what)) if what == "step" else None
        with pytest.raises(errors.HostLostError) as caught:
            for _ in range(99):
                engine.step()
        with pytest.raises(errors.HostLostError):
            engine.step()
        return str(caught.value), number == 0 and request.state

    found = engines(monkeypatch, text_model, program, timeout=3.0)
    assert all("process 2 could not go on" in said for said, _ in found) and found[0][1] == "failed"


def one_by_one(prompts):
    """A program that asks for one prompt after the other."""

    def program(engine, number):
        done = []
        for prompt in prompts:
            if number == 0:
                engine.submit(prompt, 4)
            while engine.step():
                engine_models.check(engine)
            done += engine.run().values()
        stats = engine.stats()
        return done, stats.cached_prompt_tokens, stats.ticks, engine._device.restored

    return program


LONG = [[i, *range(11), i] for i in range(6)]


@pytest.mark.parametrize("lacking", ["nothing", "a record", "a record at first", "all records", "the newest"])
def test_tiers_of_processes_give_what_all_have(monkeypatch, text_model, lacking):
    """Nine pages in all, three of each text: a text comes back from below. Every process has tiers of its own."""
    tiers = [[HostTier(10**6)] for _ in range(3)]
    prompts = [*LONG, LONG[0], LONG[1]]
    settings = dict(num_pages=3, tiers=tiers, max_batch=2)
    if lacking == "all records":
        tiers[1] = [HostTier(1)]
    if lacking.startswith("a record"):
        put, refused = tiers[1][0].put, []

        def refuse(record):
            wanted = record.name.tokens == (3, 4, 5, 6) and not (refused and lacking.endswith("at first"))
            return refused.append(record) or [] if wanted else put(record)

        tiers[1][0].put = refuse
    if lacking == "a record at first":  # it is stored when the text leaves the next time
        prompts += [*LONG[2:], LONG[0]]
    if lacking == "the newest":  # found by its name, and then it is not there
        get, lost = tiers[2][0].get, []
        tiers[2][0].get = lambda name: None if not name.parent and lost.append(name) is None else get(name)
    found = engines(monkeypatch, text_model, one_by_one(prompts), **settings)
    assert found[0] == found[1] == found[2]
    done, cached, _, restored = found[0]
    assert done == [[continued(prompt, 4)] for prompt in prompts]
    pages = {"nothing": 6, "a record": 2, "a record at first": 19, "all records": 0, "the newest": 0}[lacking]
    assert (cached, restored) == (4 * pages, pages)


def test_tiers_of_processes_with_windows(monkeypatch):
    """One lacks what a window saw of a text's first page, one has lost its third page: no start is good for both."""
    mesh = jax.make_mesh((2,), ("host",), devices=jax.devices()[:2])
    config = DecoderConfig(**{**TINY, "num_layers": 2, "windows": (None, 6)})
    model = Decoder(config, mesh=mesh, by="sequence", axis="host", rngs=nnx.Rngs(0))
    settings = dict(num_pages=(6, 6), max_batch=2, max_length=32)
    ask = lambda tiers: engines(monkeypatch, model, one_by_one([*LONG, LONG[0]]), tiers=tiers, **settings)
    assert [restored > 0 for *_, restored in ask([[HostTier(10**6)] for _ in range(3)])] == [True] * 3
    tiers = [[HostTier(10**6)] for _ in range(3)]
    first, third = (LONG[0][i : i + 4] for i in (0, 8))
    put, get, cut = tiers[1][0].put, tiers[2][0].get, []

    def no_window(record):
        if list(record.name.tokens) == first and record.has(1):
            cut.append(record)
            record = dataclasses.replace(record, arrays={n: x for n, x in record.arrays.items() if n[0] == "0"})
        return put(record)

    def no_third(name):
        is_third = list(name.tokens) == third and name.parent
        return cut.append(name) if is_third else get(name)

    tiers[1][0].put, tiers[2][0].get = no_window, no_third
    found = ask(tiers)
    assert found[0] == found[1] == found[2] and len(cut) >= 2
    done, _, _, restored = found[0]
    assert done == [[continued(prompt, 4)] for prompt in [*LONG, LONG[0]]] and not restored


@pytest.mark.parametrize("kind", [AxisType.Explicit, AxisType.Auto])
def test_what_pages_of_hosts_hold(kind):
    """Whole on every device; what comes back lies where the pages lie. Negative pages: nothing is put back."""
    mesh = jax.make_mesh((2,), ("host",), axis_types=(kind,), devices=jax.devices()[:2])
    rng = np.random.default_rng(0)
    caches = hosts_worker.decoder(mesh).make_paged_cache(6, 4, batch_size=1, max_length=24)
    lies = [x.sharding for x in jax.tree.leaves(caches)]
    draw = lambda x: jax.device_put(rng.normal(size=x.shape).astype(np.float32), x.sharding)
    drawn = tuple(c.replace(keys=jax.tree.map(draw, c.keys), values=jax.tree.map(draw, c.values)) for c in caches)
    pages = (np.array([4, 0, 3], np.int32),)
    found = jax.jit(contents.taken, static_argnums=2)(drawn, pages, mesh)
    assert found.keys() == contents.specs(caches).keys() and all(x.is_fully_replicated for x in found.values())
    back = jax.jit(contents.put_back)(caches, (np.array([1, -1, 3], np.int32),), found)
    for name, (axes, shape, _, _) in contents.specs(caches).items():
        (axis,) = (i for i, word in enumerate(drawn[0].axes.keys["data"].split()) if word == "pages")
        role = name.split(".")[1]
        pool, other = (np.moveaxis(np.asarray(getattr(c[0], role)["data"]), axis, 0) for c in (drawn, back))
        np.testing.assert_array_equal(np.asarray(found[name])[:, 0], pool[[4, 0, 3]])
        np.testing.assert_array_equal(other[[1, 3]], pool[[4, 3]])
        assert not other[[0, 2, 4, 5]].any() and len(axes.split()) == len(shape) == pool.ndim
    if kind == AxisType.Explicit:
        assert [x.sharding for x in jax.tree.leaves(back)] == lies


@pytest.mark.slow
@pytest.mark.parametrize("kind", [AxisType.Explicit, AxisType.Auto])
def test_pages_of_hosts_come_back_from_below(kind):
    mesh = jax.make_mesh((2,), ("host",), axis_types=(kind,), devices=jax.devices()[:2])
    prompts = [[i] * 13 for i in range(4)] + [[0] * 13]
    ask = lambda engine: [engine.submit(prompt, 3).tokens for prompt in prompts if engine.run() is not None]
    model = hosts_worker.decoder(mesh)
    settings = hosts_worker.SETTINGS | dict(max_batch=1, prefill_chunk=16)
    engine = Engine(model, num_pages=4, hosts="host", tiers=[HostTier(10**6)], **settings)
    alone = Engine(hosts_worker.decoder(), num_pages=64, **settings)
    found, expected = ask(engine), ask(alone)
    engine.run(), alone.run()
    assert found == expected and engine.stats().tier_prompt_tokens == (12,)


# What is exchanged ----------------------------------------------------------------------------------------------------


def exchanged(mesh, length):
    """What a step and a copy of pages exchange, with texts of at most `length` tokens; compiled from shapes alone."""
    where = dict(mesh=mesh, by="sequence", axis="host")
    model = nnx.eval_shape(lambda: Decoder(DecoderConfig(**hosts_worker.SIZES), rngs=nnx.Rngs(0), **where))
    weights, programs = PROGRAMS.of(model)
    placed = lambda x, spec: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.NamedSharding(mesh, spec))
    whole = lambda tree: jax.tree.map(lambda x: placed(np.asarray(x), jax.P(*[None] * np.ndim(x))), tree)
    settings = dict(batch_size=2, max_length=length)
    cache = jax.eval_shape(lambda: model.make_paged_cache(length, 4, **settings))
    cache = tuple(
        jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            layer,
            cache_sharding(layer, mesh, by="sequence", axis="host"),
        )
        for layer in cache
    )
    sampler = Sampler.create(model.config.vocab_size, temperature=0, top_k=None, top_p=None, seed=0)
    stop = np.zeros((model.config.vocab_size,), bool)
    rows = whole(loop.Rows.ended(2)), whole(loop.Settings.alike(2, sampler, stop, 0))
    mask, free = whole(np.ones((2,), bool)), whole(np.full((2,), loop.NOTHING, np.int32))
    tables, pairs = whole(nobodys(2, [cache[0].max_pages])), (whole(np.full((2, 2), -1, np.int32)),)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        lowered = programs.step.lower(weights, cache, *rows, tables, mask, mask, free, None)
        return [collectives(each.compile()) for each in (lowered, programs.copy.lower(cache, pairs))]


@pytest.mark.slow
@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_what_is_exchanged_does_not_grow_with_the_text(platform):
    """Of a step and of pages that are copied: the same collectives, of the same bytes, for four times the length."""
    if platform == "tpu":
        pytest.importorskip("libtpu", reason="compiling for TPUs that are not there needs libtpu (the aot group)")
        mesh = Mesh(np.array(tpu_devices("v5e:2x4")), ("host",), axis_types=(AxisType.Explicit,))
    else:
        mesh = jax.make_mesh((8,), ("host",))
    found = [exchanged(mesh, length) for length in (64, 256)]
    assert found[0] == found[1] and all(found[0])
    page = 2 * 4 * 2 * 8 * 4  # keys and values, tokens, heads, features, bytes
    assert sum(each.nbytes for each in found[0][1]) <= 2 * 2 * page


# What it is worth -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_lending_serves_more(monkeypatch, seed):
    """Of long and short texts, at least 1.3 times as many without preemption as the same hosts without it."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import many_hosts

    requests = many_hosts.trace(seed)
    served, used = many_hosts.replayed(requests, lend=True)
    alone, used_alone = many_hosts.replayed(requests, lend=False)
    assert len(requests) >= served >= 1.3 * alone > 0
    assert max(used) > 0.9 > max(used_alone) and sum(used) / len(used) > sum(used_alone) / len(used_alone)


# Messages -------------------------------------------------------------------------------------------------------------


def test_messages():
    assert arrivals.packed([], []) == b"" and arrivals.unpacked(b"") == ([], [])
    one = arrivals.Arrival([1, 2], 3, 1, None, 0.5, None, 0.9, 7, [4], ("a", "b"), -1)
    assert arrivals.unpacked(arrivals.packed([one, one._replace(namespace="x")], [3, 1])) == (
        [one, one._replace(namespace="x")], [3, 1]
    )  # fmt: skip


# Processes ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Starts processes and returns the JSON lines of each, with their outcomes."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import processes

    path = os.pathsep.join(map(str, [ROOT, ROOT / "tests", ROOT / "examples"]))
    monkeypatch.setenv("PYTHONPATH", path)

    def start(what, count, timeout, *more, apart=False):
        """`apart`: the coordinator is a process of its own."""
        command = [sys.executable, str(ROOT / "tests" / "hosts_worker.py")]
        for _ in range(3):
            with (
                processes.coordinator(count, hosts_worker.HEARTBEAT)
                if apart
                else contextlib.nullcontext() as coordinator
            ):
                coordinator = coordinator or f"=127.0.0.1:{processes.free_port()}"
                commands = {
                    i: [*command, coordinator, *map(str, (i, count, what, timeout, *more))] for i in range(count)
                }
                ended = processes.run(commands, tmp_path, grace=timeout + 20)
            if processes.PORT_TAKEN not in ended[0].written:
                break
        lines = [[line for line in each.written.splitlines() if line.startswith("{")] for each in ended]
        return [[json.loads(line) for line in each] for each in lines], [each.handle.returncode for each in ended]

    return start


def expected_tokens():
    """Of one process with one large pool."""
    engine = Engine(hosts_worker.decoder(), num_pages=64, **hosts_worker.SETTINGS)
    for prompt in hosts_worker.PROMPTS:
        engine.submit(prompt, hosts_worker.NEW, stop_tokens=[60])
    engine.submit(hosts_worker.PROMPTS[0], hosts_worker.NEW, num_samples=2, temperature=1.0, seed=3)
    return sorted(engine.run().values())


@pytest.mark.timeout(900)
@pytest.mark.parametrize("count, apart", [(2, True), pytest.param(4, False, marks=pytest.mark.slow)])
def test_tokens_are_those_of_one_large_pool(run, count, apart):
    """In every process. Four pages each: the longest text has six."""
    said, codes = run("tokens", count, 300, apart=apart)  # compiling counts
    assert codes == [0] * count
    assert all(each[-1]["tokens"] == said[0][-1]["tokens"] and each[-1]["loans"] for each in said)
    assert sorted(said[0][-1]["tokens"]) == expected_tokens()
    assert [each[-1]["refused"] for each in said[1:]] == ["UnsupportedError"] * (count - 1)


@pytest.mark.timeout(900)
@pytest.mark.slow
@pytest.mark.parametrize("what", ["other setting", "other model", "late"])
def test_processes_that_begin_differently(run, what):
    said, codes = run(what, 2, 15)
    others = said if what != "late" else said[:1]
    assert {each[-1]["error"] for each in others} == {"HostLostError" if what == "late" else "HostMismatchError"}
    assert all(each[-1]["seconds"] < 40 for each in others) and 0 not in codes


@pytest.mark.timeout(900)
@pytest.mark.slow
@pytest.mark.parametrize(
    "what", ["dies", "stops", "raises", "does something else", "the first dies", "the first stops"]
)
def test_processes_end_together(run, what):
    """Each with a typed error, within the time; none hangs, and none gives tokens after it."""
    said, codes = run(what, 3, 90, apart=what.startswith("the first"))  # compiling counts
    gone = {0 if what.startswith("the first") else 1} if what.endswith(("dies", "stops")) else {}
    others = [each for number, each in enumerate(said) if number not in gone]
    kind = "DivergedError" if what == "does something else" else "HostLostError"
    assert {each[-1]["error"] for each in others} <= {
        kind,
        *(["RuntimeError"] if what == "raises" else []),
    } and 0 not in codes
    assert all(each[-1]["seconds"] < 120 for each in others)


@pytest.mark.timeout(900)
@pytest.mark.slow
def test_what_was_stored_is_found_by_those_that_are_left(run, tmp_path):
    """One of three dies; two that are started anew read from their disks what the three had stored."""
    said, codes = run("dies", 3, 90, str(tmp_path))
    assert {said[i][-1]["error"] for i in (0, 2)} == {"HostLostError"} and 0 not in codes
    said, codes = run("tokens again", 2, 300, str(tmp_path))
    assert codes == [0, 0] and said[0] == said[1]
    engine = Engine(hosts_worker.decoder(), num_pages=64, **hosts_worker.SETTINGS)
    for prompt in hosts_worker.PROMPTS:
        engine.submit(prompt, hosts_worker.NEW, stop_tokens=[60])
    assert sorted(said[0][-1]["tokens"]) == sorted(engine.run().values())
    assert said[0][-1]["from_tiers"][0] >= 8  # the two pages that three prompts share


def test_a_coordinator_that_cannot_start(monkeypatch, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        for given, said in (
            ([address, "--processes", "2"], f"cannot listen at {address}"),
            (["127.0.0.1", "--processes", "2"], "address must be host:port, got '127.0.0.1'"),
            (["127.0.0.1:1234", "--processes", "0"], "--processes must be >= 1, got 0"),
        ):
            monkeypatch.setattr(sys, "argv", ["coordinator", *given])
            with pytest.raises(SystemExit):
                coordinator.main()
            assert said in capsys.readouterr().err


# Ray ------------------------------------------------------------------------------------------------------------------


class Cluster:
    """Stands in for Ray: actors are objects of this process, on nodes that a test names."""

    class RayActorError(Exception):
        pass

    def __init__(self, nodes, lost=()):
        self.nodes, self.lost, self.here, self.started = nodes, lost, None, {}
        self.exceptions = types.SimpleNamespace(RayActorError=self.RayActorError)
        self.util = types.SimpleNamespace(get_node_ip_address=lambda: self.here)

    def init(self, **options):
        self.started = options

    def shutdown(self):
        pass

    def get(self, results):
        if not isinstance(results, list):
            return results()
        return [result() for result in results]

    def remote(self, **options):
        left = list(enumerate(self.nodes))
        started = lambda actor: types.SimpleNamespace(remote=self._on(actor, left))
        return lambda actor: types.SimpleNamespace(options=lambda **more: started(actor))

    def _on(self, actor, left):
        def start():
            number, node = left.pop(0)

            def method(name):
                def call(*args):
                    def result():
                        if name == "run" and number in self.lost:
                            raise self.RayActorError("the node is gone")
                        self.here = node
                        return getattr(actor(), name)(*args)

                    return result

                return types.SimpleNamespace(remote=call)

            return types.SimpleNamespace(address=method("address"), run=method("run"))

        return start


@pytest.mark.parametrize("nodes", [["10.0.0.1"] * 2, ["10.0.0.1", "10.0.0.2"]], ids=["one node", "two nodes"])
@pytest.mark.parametrize("lost", [(), (1,)], ids=["", "one is lost"])
def test_ray_starts_the_same_program(monkeypatch, tmp_path, capsys, nodes, lost):
    """On every node, with a coordinator that all of them reach."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import many_hosts_ray

    cluster, commands = Cluster(nodes, lost), []
    report = {
        "processes": 2, "hosts": 2, "pages": 4, "longest": 9, "of_one_host": 8, "tokens_per_second": 1.0,
        "preemptions": 0, "most_lent": 3, "loans": [0, 3], "same_tokens": True,
    }  # fmt: skip

    def run(command):
        commands.append(command)
        if command[command.index("--process-id") + 1] == "0":
            pathlib.Path(command[command.index("--out") + 1]).write_text(json.dumps([report]))
        return types.SimpleNamespace(returncode=0)

    monkeypatch.setitem(sys.modules, "ray", cluster)
    monkeypatch.setattr(many_hosts_ray.subprocess, "run", run)
    out = tmp_path / "out.json"
    given = ["--address", "auto", "--processes", "2", "--checkpoint", str(tmp_path), "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["many_hosts_ray.py", *given, "--pages", "4"])
    assert many_hosts_ray.main() == (1 if lost else 0)
    assert cluster.started["address"] == "auto"
    pairs = [dict(itertools.pairwise(command)) for command in commands]
    assert [each["--process-id"] for each in pairs] == ["0", "1"][: 2 - len(lost)]
    assert {each["--pages"] for each in pairs} == {"4"} and {each["--processes"] for each in pairs} == {"2"}
    assert {each["--checkpoint"] for each in pairs} == {str(tmp_path)}
    (coordinator,) = {each["--coordinator"].rsplit(":")[0] for each in pairs}
    assert coordinator == ("127.0.0.1" if nodes[0] == nodes[1] else "10.0.0.1")
    assert all(pathlib.Path(command[1]) == ROOT / "examples" / "many_hosts.py" for command in commands)
    if not lost:
        assert json.loads(out.read_text()) == [report] and "same tokens as one large pool" in capsys.readouterr().out


def test_without_ray(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import many_hosts_ray

    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setattr(sys, "argv", ["many_hosts_ray.py"])
    with pytest.raises(SystemExit, match=r"pip install .kvattn\[ray\]"):
        many_hosts_ray.main()
