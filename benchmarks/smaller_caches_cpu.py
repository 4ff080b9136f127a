"""One decode step on CPU with each codec and with each policy, beside the same step with neither.

Every figure is a ratio of two medians taken in turns in one process, after the values were checked against attention
over the decoded cache. Shape: B8 N32 K8 H128, 4096 slots, all filled (policies: a budget of 4095 and the slot of the
token that comes). Writes ``benchmarks/results/smaller_caches_cpu.json`` and a picture.

    python benchmarks/smaller_caches_cpu.py [--repeats 31] [--no-save]
"""

import argparse
import dataclasses
import datetime
import json
import os
import pathlib
import platform
import statistics
import sys
import time

import jax
import jax.numpy as jnp
import matplotlib

import kvattn

matplotlib.use("Agg")
import matplotlib.pyplot as plt

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from decode_cpu import RESULTS, B, Clock, H, K, N, S

from kvattn.policies.fastgen import FULL

CODECS = {
    "float32": (None, jnp.float32),
    "bfloat16": (None, jnp.bfloat16),
    "Int8": (kvattn.Int8(), jnp.float32),
    "Float8": (kvattn.Float8(), jnp.float32),
    "Int4": (kvattn.Int4(), jnp.float32),
    "KIVI-4": (kvattn.KIVI(bits=4), jnp.float32),
    "KIVI-2": (kvattn.KIVI(bits=2), jnp.float32),
}

POLICIES = {
    "SlidingWindow": kvattn.SlidingWindow(S),
    "StreamingLLM": kvattn.StreamingLLM(4, S - 4),
    "H2O": kvattn.H2O(S // 2, S // 2 - 1),
    "Scissorhands": kvattn.Scissorhands(S - 1),
    "Scissorhands, dropping": kvattn.Scissorhands(S - 1),
    "FastGen": kvattn.FastGen(1.0),
}
"""All hold S tokens while they attend (Scissorhands S - 1: with one more it drops half, once in S / 2 steps)."""


def tokens(length: int, heads: int, dtype, seed: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), (B, length, heads, H), jnp.float32).astype(dtype)


def filled(codec, dtype, policy, count: int) -> kvattn.KVCache:
    """A cache that holds `count` tokens."""
    write = jax.jit(lambda cache, slots, k, v: cache.write(slots, k, v), donate_argnums=0)
    needs = isinstance(policy, kvattn.Full | kvattn.FastGen)
    cache = kvattn.KVCache.create(B, K, H, capacity=S if needs else None, policy=policy, codec=codec, dtype=dtype)
    slots = jnp.broadcast_to(jnp.arange(count, dtype=jnp.int32)[None], (B, count))
    cache = write(cache, slots, tokens(count, K, dtype, 2), tokens(count, K, dtype, 3))
    if policy.per_head:
        held = jnp.arange(S, dtype=jnp.int32)
        held = jnp.broadcast_to(jnp.where(held < count, held, -1), (B, K, S))
        state = dataclasses.replace(cache.state, positions=held)
        if isinstance(policy, kvattn.FastGen):
            state = dataclasses.replace(state, choice=jnp.full((B, K), FULL), prompt=jnp.full((B,), count, jnp.int32))
        cache = dataclasses.replace(cache, state=state)
    return dataclasses.replace(cache, lengths=jnp.full((B,), count, jnp.int32))


class Decode:
    """The step on one cache, again and again."""

    def __init__(self, codec, dtype, policy=None, count: int = S - 1):
        policy, self.count = kvattn.Full() if policy is None else policy, count
        self.new = tokens(1, N, dtype, 4), tokens(1, K, dtype, 5), tokens(1, K, dtype, 6)
        self.cache = filled(codec, dtype, policy, count)
        self.step = kvattn.jit(lambda q, k, v, cache: kvattn.cached_attention(q, k, v, cache))
        self.compiled = self.step.lower(*self.new, self.cache).compile().memory_analysis()
        # What lets tokens go goes on; the others take the last one back.
        self.goes_on = isinstance(policy, kvattn.H2O | kvattn.SlidingWindow | kvattn.StreamingLLM)
        self.initial = jax.tree.map(jnp.copy, self.cache.state)

    def __call__(self) -> jax.Array:
        """The output of one step."""
        out, self.cache = self.step(*self.new, self.cache)
        return out

    def back(self) -> tuple:
        """As full as before, where nothing leaves."""
        if not self.goes_on:
            lengths = jnp.full((B,), self.count, jnp.int32)
            self.cache = dataclasses.replace(self.cache, lengths=lengths, state=jax.tree.map(jnp.copy, self.initial))
        return ()

    def error(self) -> float:
        """Against plain attention over the decoded cache; a token that left is still there in its bits."""
        out = self()
        full = dataclasses.replace(self.cache, lengths=jnp.full((B,), self.count + 1, jnp.int32))
        keys, values = (x.swapaxes(1, 2).astype(jnp.float32)[:, : self.count + 1] for x in full.dense())
        expected = jax.nn.dot_product_attention(self.new[0].astype(jnp.float32), keys, values)
        return float(jnp.max(jnp.abs(out.astype(jnp.float32) - expected)))


def main() -> None:
    """Runs, prints, saves."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=31)
    parser.add_argument("--no-save", action="store_true")
    args = parser.parse_args()
    codecs = measure({n: Decode(codec, dtype) for n, (codec, dtype) in CODECS.items()}, args.repeats, "codecs")
    cases = {"Full": kvattn.Full(), **POLICIES}
    counts = {"Scissorhands": S - 2}
    policies = {n: Decode(None, jnp.float32, p, counts.get(n, S - 1)) for n, p in cases.items()}
    policies = measure(policies, args.repeats, "policies")
    report = {
        "machine": {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "versions": {"jax": jax.__version__, "kvattn": kvattn.__version__},
        "date": datetime.date.today().isoformat(),
        "shape": {"B": B, "N": N, "K": K, "H": H, "S": S},
        "codecs": codecs,
        "policies": policies,
        "20000_steps": {str(policy): endless(policy) for policy in ENDLESS},
    }
    print(json.dumps(report, indent=2))
    if not args.no_save:
        RESULTS.mkdir(exist_ok=True)
        path = RESULTS / "smaller_caches_cpu.json"
        path.write_text(json.dumps(report, indent=2) + "\n")
        plot(report, path.with_suffix(".png"))


def measure(calls: dict[str, Decode], repeats: int, title: str) -> dict[str, dict]:
    """Checks the values, then times all in turns; ratios are to the first."""
    clock, errors = Clock(repeats, title), {}
    for name, call in calls.items():
        errors[name] = call.error()
        assert errors[name] < (1e-2 if call.cache.dtype == jnp.bfloat16 else 1e-4), (name, errors[name])
        clock.add(name, call, call.back)
    times = clock.run()
    first = next(iter(calls))
    return {
        name: {
            "step_ms": round(times[name] * 1e3, 3),
            f"over_{first}": round(times[name] / times[first], 3),
            "bits_per_number": round(call.cache.nbytes * 8 / (2 * B * K * S * H), 4),
            "cache_bytes": call.cache.nbytes,
            "temp_bytes": call.compiled.temp_size_in_bytes,
            "max_error": errors[name],
        }
        for name, call in calls.items()
    }


ENDLESS = (
    kvattn.SlidingWindow(256),
    kvattn.StreamingLLM(4, 252),
    kvattn.H2O(128, 128),
    kvattn.H2O(128, 128, positions_in="cache"),
    kvattn.Scissorhands(256),
)


def endless(policy) -> dict:
    """20,000 tokens one by one (B1 N8 K2 H64): time per step at the beginning and at the end, and bytes."""
    cache = kvattn.KVCache.create(1, 2, 64, policy=policy, dtype=jnp.float32)
    key = jax.random.key(0)

    @kvattn.jit
    def thousand(cache, first):
        def one(cache, i):
            x = jax.random.normal(jax.random.fold_in(key, i), (1, 1, 12, 64))
            out, cache = kvattn.cached_attention(x[:, :, :8], x[:, :, 8:10], x[:, :, 10:], cache, rope=kvattn.RoPE(64))
            return cache, jnp.sum(out)

        cache, outs = jax.lax.scan(one, cache, first + jnp.arange(1000))
        return jnp.sum(outs), cache

    thousand.lower(cache, jnp.int32(0)).compile()
    size, times = cache.nbytes, []
    for i in range(20):
        start = time.perf_counter()
        out, cache = thousand(cache, jnp.int32(1000 * i))
        assert bool(jnp.isfinite(out))
        times.append(time.perf_counter() - start)
    assert cache.check().nbytes == size and int(cache.lengths[0]) == 20_000
    first, last = statistics.median(times[2:8]), statistics.median(times[-6:])
    return {
        "first_ms": round(first, 4),
        "last_ms": round(last, 4),
        "last_over_first": round(last / first, 3),
        "cache_bytes": size,
    }


def plot(report: dict, path: pathlib.Path) -> None:
    """Two rows of bars."""
    figure, both = plt.subplots(1, 2, figsize=(10, 3.2), layout="constrained")
    for axes, part in zip(both, ("codecs", "policies"), strict=True):
        names = list(report[part])
        bars = axes.barh(names, [report[part][name]["step_ms"] for name in names])
        axes.bar_label(bars, fmt="%.1f", padding=2)
        axes.invert_yaxis()
        axes.set(xlabel="ms per decode step", title=part)
    figure.suptitle("B8 N32 K8 H128, 4096 tokens, 2 CPU cores", fontsize=10)
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    main()
