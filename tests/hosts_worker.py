"""One process of an engine over several: what `test_serving_hosts.py` starts.

Arguments: address of the coordinator, which is process 0 if it begins with "=", number of this process, how many there
are, what to do, seconds to wait for others, and, if there are tiers, a folder for them. It writes JSON lines to
standard error: tokens, or the error that ended it.
"""

import json
import os
import signal
import sys
import time

import jax
import numpy as np
from flax import nnx

from kvattn.models import Decoder, DecoderConfig
from kvattn.serving import DiskTier, Engine, Hosts

SIZES = dict(vocab_size=61, model_dim=16, num_layers=1, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=16)
SHARED = [7, 3, 3, 50, 9, 12, 31, 4]
PROMPTS = [[*SHARED, 1, 2], [*SHARED, 5], [18], [*SHARED, 1, 2, 40, 41, 42, 43, 44, 45, 46]]
NEW = 8
SETTINGS = dict(page_size=4, max_batch=2, max_length=48, prefill_chunk=16)
PAGES = 4
HEARTBEAT = 300


def weights_of(shape, seed):
    """The same everywhere, however they lie."""
    return 0.3 * np.random.default_rng([seed, *shape]).normal(size=shape).astype(np.float32)


def decoder(mesh=None, seed=0):
    """The model, over an axis of hosts if there is a mesh."""
    where = {} if mesh is None else dict(mesh=mesh, by="sequence", axis="host")
    graph, state = nnx.split(nnx.eval_shape(lambda: Decoder(DecoderConfig(**SIZES), rngs=nnx.Rngs(0), **where)))
    leaves, structure = jax.tree.flatten(state)
    numbers = [weights_of(x.shape, seed) for x in leaves]
    if mesh is not None:
        numbers = [
            jax.make_array_from_callback(x.shape, jax.NamedSharding(mesh, x.sharding.spec), lambda index, n=n: n[index])
            for x, n in zip(leaves, numbers, strict=True)
        ]
    return nnx.merge(graph, jax.tree.unflatten(structure, [jax.numpy.asarray(x) for x in numbers]))


def say(**what):
    print(json.dumps(what), file=sys.stderr, flush=True)


def main():
    coordinator, number, count, what, timeout = (
        sys.argv[1],
        int(sys.argv[2]),
        int(sys.argv[3]),
        sys.argv[4],
        float(sys.argv[5]),
    )
    tiers = [DiskTier(os.path.join(folder, str(number)), 10**7) for folder in sys.argv[6:]]
    import processes  # of examples/

    processes.end_with_launcher()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 1)
    address = coordinator.removeprefix("=")
    bind = address if coordinator.startswith("=") else "127.0.0.1:0"
    jax.distributed.initialize(
        address, count, number, coordinator_bind_address=bind, heartbeat_timeout_seconds=HEARTBEAT
    )
    other = what.removeprefix("the first ") if number == (0 if what.startswith("the first ") else 1) else ""
    clock = {"since": time.monotonic()}
    try:
        mesh = jax.make_mesh((count,), ("host",))
        if other == "late":
            time.sleep(3600)
        model = decoder(mesh, seed=int(other == "other model"))
        settings = SETTINGS | ({"max_batch": 3} if other == "other setting" else {})
        if what == "tokens" and count == 2:
            settings |= {"max_batch": 1}  # fewer programs to compile
        hosts = Hosts("host", timeout=timeout, compare_every=2)
        engine = Engine(model, num_pages=PAGES, hosts=hosts, tiers=tiers, **settings)
        if what == "tokens":
            tokens(engine, number)
        elif what == "tokens again":
            again(engine, number)
        else:
            forever(engine, number, other, clock)
    except Exception as error:
        say(error=type(error).__name__, message=str(error), seconds=time.monotonic() - clock["since"])
        if number == 0 and coordinator.startswith("="):
            time.sleep(5)  # the store in which the others read why is here
        os._exit(1)
    jax.distributed.shutdown()


def tokens(engine, number):
    """All prompts, some samples, one that is cancelled; and what this process was lent."""
    if number == 0:
        for prompt in PROMPTS:
            engine.submit(prompt, NEW, stop_tokens=[60], namespace=("a", "b"))
        engine.submit(PROMPTS[0], NEW, num_samples=2, temperature=1.0, seed=3, priority=1)
        cancelled = engine.submit(PROMPTS[1], NEW)
    refused, seen = "", set()
    if number:
        try:
            engine.submit([1], 1)
        except Exception as error:
            refused = type(error).__name__
    while engine.step():
        if number == 0:
            cancelled.cancel()
        seen |= {pair for pool in engine.loans() for pair in pool}
        engine._scheduler.check()
    done = engine.run()
    say(tokens=list(done.values()), refused=refused, loans=sorted(seen), ticks=engine.stats().ticks)


def again(engine, number):
    """All prompts anew."""
    if number == 0:
        for prompt in PROMPTS:
            engine.submit(prompt, NEW, stop_tokens=[60])
    done = engine.run()
    say(tokens=list(done.values()), from_tiers=engine.stats().tier_prompt_tokens)
    for tier in engine._tiers.tiers:
        tier.close()


def forever(engine, number, other, clock):
    """Requests without end, until process 1 dies, stops, or does something of its own."""
    for step in range(10**9):
        if number == 0 and step % 3 == 0:
            engine.submit(PROMPTS[step % 4], NEW)
        if step == 6 and engine._tiers.tiers:
            engine.save_prefixes()
        if step == 6:
            say(pid=os.getpid())
            if other == "dies":
                os.kill(os.getpid(), signal.SIGKILL)
            if other == "stops":
                os.kill(os.getpid(), signal.SIGSTOP)
            if other == "does something else":
                engine._scheduler.pool.pool.pools[0]._hosted.digest = bytes(32)
            if other == "raises":
                raise RuntimeError("a fault of process 1")
        engine.step()
        clock["since"] = time.monotonic()


if __name__ == "__main__":
    main()
