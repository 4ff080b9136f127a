"""A decoding step of rows that share a prefix: read once for all of them, and by each.

16 rows share 4,096 tokens and have 128 of their own. Both steps are taken in turns in one process, on the same pool,
after their outputs were compared. Bytes are what the formula says (B (P + S) without, P + B S with); reading P tokens
once is the floor of the step. Writes ``benchmarks/results/shared_prefix.json``.

    python benchmarks/shared_prefix.py [--repeats 15] [--no-save]
"""

import argparse
import datetime
import json
import os
import pathlib
import platform
import time

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

import kvattn
from kvattn.serving import shared_prefixes, sharing_shapes, tokens_read

B, N, H, P, S = 16, 32, 128, 4096, 128
CASES = [(dtype, heads, size) for heads in (8, 32) for dtype in (jnp.float32, jnp.bfloat16) for size in (16, 128)]
"""Dtype, key/value heads, page size."""
RESULTS = pathlib.Path(__file__).parent / "results" / "shared_prefix.json"


def batch_of(dtype, heads: int, size: int):
    """A pool of random tokens, tables and lengths of rows whose next token is the S-th of their own."""
    common, own = P // size, S // size
    pages = common + B * own
    cache = kvattn.PagedKVCache.create(pages, size, heads, H, batch_size=B, max_pages=common + own, dtype=dtype)
    fill = lambda x, seed: jax.random.normal(jax.random.key(seed), x.shape, jnp.float32).astype(x.dtype)
    cache = cache.replace(keys={"data": fill(cache.keys["data"], 0)}, values={"data": fill(cache.values["data"], 1)})
    table = np.concatenate([np.tile(np.arange(common), (B, 1)), np.arange(common, pages).reshape(B, own)], axis=1)
    return cache, table.astype(np.int32), np.full(B, P + S - 1, np.int32)


def measured(dtype, heads: int, size: int, repeats: int) -> dict:
    """Medians of both steps, their outputs' distance, bytes, and what the host takes to find what is shared."""
    cache, table, lengths = batch_of(dtype, heads, size)
    new = [jax.random.normal(jax.random.key(i), (B, 1, n, H)).astype(dtype) for i, n in enumerate((N, heads, heads))]
    start = time.perf_counter()
    shared = shared_prefixes(table, lengths, size)
    host = time.perf_counter() - start
    assert shared is not None, "nothing is worth sharing"

    @kvattn.jit
    def step(new, cache, table, lengths, shared):
        out, cache = kvattn.cached_attention(*new, cache.with_tables(table, lengths, shared))
        return out, cache.replace(shared=None)

    plans = {"without": None, "with": shared}
    outs, seconds = {}, {name: [] for name in plans}
    for i in tqdm(range(repeats + 1), desc=f"{jnp.dtype(dtype)}, pages of {size}", leave=False, disable=None):
        for name, plan in plans.items():
            start = time.perf_counter()
            outs[name], cache = jax.block_until_ready(step(new, cache, table, lengths, plan))
            if i:
                seconds[name].append(time.perf_counter() - start)
    cache.check()
    out, alone = (np.asarray(outs[name], np.float64) for name in ("with", "without"))
    off, scale = np.abs(out - alone).max(), np.abs(alone).max()
    assert off <= (2e-2 if dtype == jnp.bfloat16 else 1e-5) * scale, f"outputs differ by {off}"
    read = [tokens_read(lengths + 1, size, plan) for plan in (None, shared)]
    without, with_ = (1e3 * float(np.median(seconds[name])) for name in ("without", "with"))
    return {
        "dtype": jnp.dtype(dtype).name,
        "kv_heads": heads,
        "page_size": size,
        "without_ms": round(without, 2),
        "with_ms": round(with_, 2),
        "times_faster": round(without / with_, 2),
        "fewer_bytes": round(read[0] / read[1], 2),
        "products_gflop": round(4e-9 * B * N * H * (P + S), 2),
        "host_ms": round(1e3 * host, 3),
        "max_difference": float(off),
    }


def host_milliseconds(batch: int, columns: int, repeats: int) -> float:
    """The median of `shared_prefixes` for rows of two levels: all share half a table, fours of them three quarters."""
    table = np.arange(batch * columns, dtype=np.int32).reshape(batch, columns)
    table[:, : columns // 2] = table[0, : columns // 2]
    for first in range(0, batch, 4):
        table[first : first + 4, : 3 * columns // 4] = table[first, : 3 * columns // 4]
    lengths, times = np.full(batch, columns * 16 - 5), []
    for _ in range(repeats):
        start = time.perf_counter()
        shared_prefixes(table, lengths, 16)
        times.append(time.perf_counter() - start)
    return round(1e3 * float(np.median(times)), 3)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--repeats", type=int, default=15)
    p.add_argument("--no-save", action="store_true")
    args = p.parse_args()
    print(f"{B} rows, {P} tokens shared, {S} of each, {N} query heads of {H}, levels {sharing_shapes(B)}")
    print(f"{'dtype':>9} {'K':>3} {'page':>5} {'without':>10} {'with':>9} {'faster':>7} {'fewer bytes':>12}")
    rows = []
    for case in CASES:
        rows.append(row := measured(*case, args.repeats))
        print(
            f"{row['dtype']:>9} {row['kv_heads']:>3} {row['page_size']:>5} {row['without_ms']:>7.1f} ms"
            f" {row['with_ms']:>6.1f} ms {row['times_faster']:>6.2f}x {row['fewer_bytes']:>11.2f}x"
        )
    host = host_milliseconds(64, 256, 200)
    print(f"{host:.3f} ms to find what 64 rows of 256 columns share")
    if not args.no_save:
        report = {
            "machine": {"cpu": platform.machine(), "cores": os.cpu_count()},
            "versions": {"jax": jax.__version__, "kvattn": kvattn.__version__},
            "date": datetime.date.today().isoformat(),
            "shape": {"B": B, "N": N, "H": H, "P": P, "S": S},
            "steps": rows,
            "host_ms_of_64_rows_and_256_columns": host,
        }
        RESULTS.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
