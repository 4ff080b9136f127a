"""One decode step on CPU with each codec, beside the same step with float32 and bfloat16 storage.

Every figure is a ratio of two medians taken in turns in one process, after the values were checked against attention
over the decoded cache. Shape: B8 N32 K8 H128, 4096 slots, all filled. Writes ``benchmarks/results/codecs_cpu.json``.

    python benchmarks/codecs_cpu.py [--repeats 31] [--no-save]
"""

import argparse
import dataclasses
import datetime
import json
import os
import pathlib
import platform
import sys

import jax
import jax.numpy as jnp

import kvattn

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from decode_cpu import RESULTS, B, Clock, H, K, N, S

CODECS = {
    "float32": (None, jnp.float32),
    "bfloat16": (None, jnp.bfloat16),
    "Int8": (kvattn.Int8(), jnp.float32),
    "Float8": (kvattn.Float8(), jnp.float32),
    "Int4": (kvattn.Int4(), jnp.float32),
    "KIVI-4": (kvattn.KIVI(bits=4), jnp.float32),
    "KIVI-2": (kvattn.KIVI(bits=2), jnp.float32),
}


def tokens(length: int, heads: int, dtype, seed: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), (B, length, heads, H), jnp.float32).astype(dtype)


def filled(codec, dtype) -> kvattn.KVCache:
    """A cache one token short of full."""
    write = jax.jit(lambda cache, slots, k, v: cache.write(slots, k, v), donate_argnums=0)
    cache = kvattn.KVCache.create(B, K, H, capacity=S, codec=codec, dtype=dtype)
    slots = jnp.broadcast_to(jnp.arange(S - 1, dtype=jnp.int32)[None], (B, S - 1))
    cache = write(cache, slots, tokens(S - 1, K, dtype, 2), tokens(S - 1, K, dtype, 3))
    return dataclasses.replace(cache, lengths=jnp.full((B,), S - 1, jnp.int32))


class Decode:
    """The step on one cache, again and again for the same token."""

    def __init__(self, codec, dtype):
        self.new = tokens(1, N, dtype, 4), tokens(1, K, dtype, 5), tokens(1, K, dtype, 6)
        self.cache = filled(codec, dtype)
        self.step = kvattn.jit(lambda q, k, v, cache: kvattn.cached_attention(q, k, v, cache))
        self.compiled = self.step.lower(*self.new, self.cache).compile().memory_analysis()

    def __call__(self) -> jax.Array:
        """The output of one step."""
        out, cache = self.step(*self.new, self.cache)
        self.cache = dataclasses.replace(cache, lengths=jnp.full((B,), S - 1, jnp.int32))
        return out

    def error(self) -> float:
        """Against plain attention over the decoded cache."""
        out = self()
        cache = dataclasses.replace(self.cache, lengths=jnp.full((B,), S, jnp.int32))
        keys, values = (x.swapaxes(1, 2).astype(jnp.float32) for x in cache.dense())
        expected = jax.nn.dot_product_attention(self.new[0].astype(jnp.float32), keys, values)
        return float(jnp.max(jnp.abs(out.astype(jnp.float32) - expected)))


def main() -> None:
    """Runs, prints, saves."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=31)
    parser.add_argument("--no-save", action="store_true")
    parser.add_argument("--only", nargs="*", help="names of codecs")
    args = parser.parse_args()
    clock, calls = Clock(args.repeats, "codecs"), {}
    errors = {}
    for name, (codec, dtype) in CODECS.items():
        if args.only and name not in args.only:
            continue
        calls[name] = Decode(codec, dtype)
        errors[name] = calls[name].error()
        assert errors[name] < (1e-2 if dtype == jnp.bfloat16 else 1e-4), (name, errors[name])
        clock.add(name, calls[name])
    times = clock.run()
    numbers = 2 * B * K * S * H
    rows = {
        name: {
            "step_ms": round(times[name] * 1e3, 3),
            "over_float32": round(times[name] / times["float32"], 3),
            "bits_per_number": round(call.cache.nbytes * 8 / numbers, 4),
            "cache_bytes": call.cache.nbytes,
            "temp_bytes": call.compiled.temp_size_in_bytes,
            "max_error": errors[name],
        }
        for name, call in calls.items()
    }
    report = {
        "machine": {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "versions": {"jax": jax.__version__, "kvattn": kvattn.__version__},
        "date": datetime.date.today().isoformat(),
        "shape": {"B": B, "N": N, "K": K, "H": H, "S": S},
        "step": rows,
    }
    print(json.dumps(report, indent=2))
    if not args.no_save:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "codecs_cpu.json").write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
