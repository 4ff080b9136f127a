"""What the engine is worth, as ratios in one run: prefixes, samples, guesses, and its own cost.

    python benchmarks/engine.py [--repeats 5] [--save benchmarks/results/engine.json]

The byte model of examples/weights, in float32. Every ratio is of medians of runs taken in turns.
"""

import argparse
import json
import platform
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

import kvattn
from kvattn.serving import Engine

WEIGHTS = Path(__file__).parent.parent / "examples" / "weights" / "bytes.safetensors"
PAGE = 16


def text(count, seed):
    """Bytes that no two prompts have in common."""
    return np.random.default_rng(seed).integers(32, 127, count).tolist()


def timed(engine, submit):
    """Seconds, new tokens and prompt tokens computed of some requests."""
    before, start = engine.stats(), time.perf_counter()
    requests = submit(engine)
    engine.run()
    seconds, after = time.perf_counter() - start, engine.stats()
    computed = (after.prompt_tokens - before.prompt_tokens) - (after.cached_prompt_tokens - before.cached_prompt_tokens)
    return seconds, after.new_tokens - before.new_tokens, computed, [request.tokens for request in requests]


def chat(model, repeats):
    """Eight conversations of four turns after one system prompt of 1,500 bytes, 24 new tokens a turn."""

    def conversations(engine):
        said = [text(1500, 0) for _ in range(8)]
        requests = []
        for turn in range(4):
            said = [[*tokens, *text(40, 100 * turn + i + 1)] for i, tokens in enumerate(said)]
            wave = [engine.submit(tokens, 24) for tokens in said]
            engine.run()
            said = [[*tokens, *request.tokens[0]] for tokens, request in zip(said, wave, strict=True)]
            requests += wave
        return requests

    settings = dict(num_pages=1200, page_size=PAGE, max_batch=8, max_length=1824)
    rates = {True: [], False: []}
    for _ in range(repeats):
        for shared in rates:
            engine = Engine(model, prefix_cache=shared, **settings)
            engine.warm_up()
            seconds, new, computed, tokens = timed(engine, conversations)
            rates[shared].append((new / seconds, computed, tokens))
    same = rates[True][0][2] == rates[False][0][2]
    with_prefixes, without = (statistics.median(rate for rate, _, _ in rates[key]) for key in (True, False))
    return {
        "tokens_per_second": with_prefixes,
        "without": without,
        "ratio": with_prefixes / without,
        "computed": rates[True][0][1],
        "computed_without": rates[False][0][1],
        "same_tokens": same,
    }


def beside_generate(model, repeats):
    """Eight prompts of 64 bytes, 128 new tokens each, nothing shared."""
    prompts = [text(64, i) for i in range(8)]
    engine = Engine(model, num_pages=200, page_size=128, max_batch=8, max_length=256, prefill_chunk=64)
    engine.warm_up()
    seconds = {"engine": [], "generate": []}
    for i in range(repeats + 1):
        start = time.perf_counter()
        expected = kvattn.generate(model, prompts, 128, capacity=256, prefill_chunk=64)
        seconds["generate"].append(time.perf_counter() - start)
        salted = f"run {i}"  # nothing is found of the run before
        taken, _, _, tokens = timed(engine, lambda e, s=salted: [e.submit(p, 128, namespace=s) for p in prompts])
        seconds["engine"].append(taken)
        assert [each[0] for each in tokens] == expected
    medians = {name: statistics.median(values[1:]) for name, values in seconds.items()}
    return {**medians, "ratio": medians["generate"] / medians["engine"]}


def samples(model):
    """Eight samples of one prompt of 500 bytes: how much of the prompts is computed."""
    engine = Engine(model, num_pages=400, page_size=PAGE, max_batch=8, max_length=560)
    engine.submit(text(500, 1), 16, num_samples=8, temperature=1.0)
    engine.run()
    stats = engine.stats()
    return {"saved": stats.cached_prompt_tokens / stats.prompt_tokens}


def guesses(model, repeats):
    """A text that says the same thing again and again: the model goes on with it."""
    prompt = list(b"The value of the expression is the value of the operand. " * 6)
    rates = {0: [], 4: [], 7: []}
    engines = {n: Engine(model, num_pages=100, page_size=PAGE, max_batch=1, max_length=720, speculate=n) for n in rates}
    tokens = {}
    for i in range(repeats + 1):
        for count, engine in engines.items():
            ask = lambda e, i=i: [e.submit(prompt, 256, namespace=str(i))]
            seconds, new, _, tokens[count] = timed(engine, ask)
            rates[count].append(new / seconds)
    medians = {count: statistics.median(values[1:]) for count, values in rates.items()}
    assert tokens[0] == tokens[4] == tokens[7]
    return {
        "tokens_per_second": medians[0],
        "with_4": medians[4],
        "with_7": medians[7],
        "ratio": max(medians[4], medians[7]) / medians[0],
    }


def host_time(model):
    """Of ticks of 64 rows: all but the call of the program and the wait for what it brings, in ms of this thread."""
    engine = Engine(model, num_pages=64 * 20, page_size=PAGE, max_batch=64, max_length=320, prefill_chunk=64)
    for i in range(64):
        engine.submit(text(16, i), 280)
    spent = [0.0]

    def counted(inner):
        def call(*args):
            start = time.thread_time()
            try:
                return inner(*args)
            finally:
                spent[0] += time.thread_time() - start

        return call

    device = engine._device
    device.step, device.on_host = counted(device.step), counted(device.on_host)
    for _ in range(100):
        engine.step()
    taken = []
    for _ in range(150):
        spent[0], start = 0.0, time.thread_time()
        engine.step()
        taken.append((time.thread_time() - start - spent[0]) * 1e3)
    return {"milliseconds": statistics.median(taken), "least": min(taken)}


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--repeats", type=int, default=5)
    p.add_argument("--save", type=Path)
    args = p.parse_args()
    model = kvattn.models.load(WEIGHTS, dtype=jnp.float32)
    parts = {
        "chat": lambda: chat(model, args.repeats),
        "beside generate": lambda: beside_generate(model, args.repeats),
        "samples": lambda: samples(model),
        "guesses": lambda: guesses(model, args.repeats),
        "host": lambda: host_time(model),
    }
    found = {name: part() for name, part in tqdm(parts.items(), unit="part")}
    for name, numbers in found.items():
        print(f"{name}: " + ", ".join(f"{key} {value:.4g}" for key, value in numbers.items()))
    if args.save is not None:
        where = {"jax": jax.__version__, "machine": f"{platform.machine()}, {jax.local_device_count()} CPU device"}
        args.save.write_text(json.dumps({**where, "repeats": args.repeats, **found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
