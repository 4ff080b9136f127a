"""An engine under full load for ten minutes: every page comes back, memory stays where it was, tokens stay right.

`KVATTN_SOAK_SECONDS` says for how long (600). What is asked is random, by a fixed seed; only how much of it is asked
goes by the clock.
"""

import dataclasses
import gc
import os
import random
import time

import pytest
import small_models

from kvattn import errors
from kvattn.models import DecoderConfig, generate
from kvattn.serving import DiskTier, Engine, HostTier

SECONDS = float(os.environ.get("KVATTN_SOAK_SECONDS", "600"))
ROUNDS = 6
"""Times that the engine is left to finish everything, and what it holds is counted."""
V, LENGTH, CHUNK = 61, 48, 16
STATES = {"finished", "cancelled"}

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2 * SECONDS + 1200)]


@dataclasses.dataclass
class Load:
    """Requests without end: many begin alike, some come again, some are cancelled."""

    rng: random.Random
    heads: list[list[int]]
    asked: list = dataclasses.field(default_factory=list)
    """Requests with their options that are to be compared with `generate`."""
    states: dict[str, int] = dataclasses.field(default_factory=dict)
    beams: int = 0

    def submit(self, engine):
        """One more; None where it does not fit into the engine."""
        rng = self.rng
        head = rng.choice(self.heads)[: rng.randrange(1, 30)]
        prompt = [*head, *(rng.randrange(V) for _ in range(rng.randrange(1, 6)))]
        new = rng.randrange(1, LENGTH - len(prompt))
        options = dict(namespace=rng.choice(["", "", "a"]), priority=rng.choice([0, 0, 0, 2]))
        if rng.random() < 0.1:
            self.beams += 1
            return engine.submit(prompt, min(new, 6), beam_width=2, **options)
        stop = [rng.randrange(V)] if rng.random() < 0.3 else None
        drawn = dict(stop_tokens=stop)
        if rng.random() < 0.6:
            drawn |= dict(temperature=1.1, top_k=rng.choice([None, 9]), seed=rng.randrange(5))
        samples = rng.choice([1, 1, 1, 2, 5])
        request = engine.submit(prompt, new, num_samples=samples, **drawn, **options)
        if samples <= 2 and rng.random() < 0.05:
            self.asked.append((request, [prompt] * samples, new, drawn))
        return request

    def compare(self, model):
        """Holds some of what came to what comes alone; how many of them."""
        asked, self.asked = [each for each in self.asked if each[0].state == "finished"], []
        for request, prompts, new, drawn in asked[:12]:
            assert request.tokens == generate(model, prompts, new, capacity=LENGTH, prefill_chunk=CHUNK, **drawn)
        return min(len(asked), 12)

    def run(self, engine, seconds):
        """Keeps so many waiting that every row always has somebody, then lets all come to their end."""
        began, alive, tick = time.monotonic(), [], 0
        while time.monotonic() - began < seconds:
            while sum(request.state == "waiting" for request in alive) < 8:
                alive.append(self.submit(engine))
            if self.rng.random() < 0.01:
                self.rng.choice(alive).cancel()
            engine.step()
            tick += 1
            if tick % 50 == 0:
                engine._scheduler.check()
            alive = self.over(alive)
        while engine.step():
            alive = self.over(alive)
        assert not self.over(alive)
        engine.run()

    def over(self, requests):
        """Those that are not over; counts the others."""
        for request in requests:
            if request.is_over:
                assert request.state in STATES, (request, request.error)
                self.states[request.state] = self.states.get(request.state, 0) + 1
        return [request for request in requests if not request.is_over]


def held(engine):
    """Whatever an engine keeps of requests: nothing of it may be left when all have ended."""
    scheduler, pool = engine._scheduler, engine._scheduler.pool
    return {
        "jobs": engine._jobs,
        "choices": engine._choices,
        "ended": engine._ended,
        "on their way": engine._in_flight,
        "guesses": engine._guesses._lookups if engine._guesses is not None else (),
        "waiting": scheduler.waiting,
        "running": scheduler.running,
        "known": scheduler._known,
        "sequences": pool._spaces,
        "matches": pool._matches,
        "promises": pool._promises,
        "restored": pool._restored,
        "sinking": engine._sinking._under_way,
        "gone": engine._sinking.below._gone,
    }


def resident():
    """Bytes of this process in memory."""
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("speculate", [0, 3])
def test_full_load(tmp_path, speculate):
    config = DecoderConfig(
        vocab_size=V, model_dim=24, num_layers=1, num_heads=6, num_kv_heads=2, head_dim=8, mlp_dim=40
    )
    model = small_models.decoder(config, 0.3)
    rng = random.Random(speculate)
    load = Load(rng, [[rng.randrange(V) for _ in range(30)] for _ in range(12)])
    compared, objects, bytes_resident = 0, [], []
    with DiskTier(tmp_path, 200_000) as disk:
        settings = dict(num_pages=40, page_size=4, max_batch=6, max_length=LENGTH, prefill_chunk=CHUNK)
        engine = Engine(model, tiers=(HostTier(40_000), disk), speculate=speculate, **settings)
        with pytest.raises(errors.CapacityError):
            engine.submit([1] * LENGTH, 1)
        for _ in range(ROUNDS):
            load.run(engine, SECONDS / 2 / ROUNDS)
            assert not any(held(engine).values()), held(engine)
            engine._scheduler.check()
            pool = engine._scheduler.pool
            assert pool.num_sequences == 0 and pool.cached_pages == 40 - pool.pool.pools[0].num_free
            compared += load.compare(model)
            gc.collect()
            objects.append(len(gc.get_objects()))
            bytes_resident.append(resident())
        stats = engine.stats()
        pool.forget_prefixes()
        assert pool.pool.pools[0].num_free == 40
    # By the third round every program is compiled and every tier is full.
    assert objects[-1] < 1.05 * objects[2] + 2000, objects
    assert bytes_resident[-1] < bytes_resident[2] + 30e6, bytes_resident
    assert load.states["finished"] > 4 * load.states["cancelled"] > 0 and load.beams
    assert stats.failed == 0 and stats.preemptions > 10 and stats.evictions > 100
    assert all(tokens > 0 for tokens in stats.tier_prompt_tokens)
    assert compared >= 5
