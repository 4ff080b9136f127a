"""One decode step on a Hopper GPU: kvattn's kernel beside every peer that is installed.

    python benchmarks/decode_gpu.py                          all cases, all peers
    python benchmarks/decode_gpu.py --cases bf16 --peers none
    python benchmarks/decode_gpu.py --tune table.json        measures sizes, for kvattn.pallas.tuning.use
    python benchmarks/decode_gpu.py --dry-run                every case in miniature, values only; needs no GPU

Values come first: against attention in float32 over a few whole rows, with NaN in all unused memory. Then times: the
kernels of a step, summed up by CUPTI, and the span of a step with the gaps between kernels (JAX: steps in one compiled
program; PyTorch: CUDA events around a CUDA graph). Copies of the cache are taken in turn, together more than four times
the L2 of the GPU, so every step reads memory. TB/s counts the keys and values of valid tokens only; per cent are of the
fastest copy measured in the same run, bytes read and written.

Writes ``decode_gpu.json``, after every case, and ``decode_gpu.png`` into benchmarks/results. Ends with status 1 if a
value is off; a peer whose values are off is not compared.
"""

import argparse
import contextlib
import dataclasses
import datetime
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch needs memory too
if "--dry-run" in sys.argv:
    os.environ.setdefault("NPROC", "8")  # the interpreter of GPU kernels needs threads, more than there may be cores

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import kvattn
import kvattn.pallas
from kvattn.cache import Layout
from kvattn.masks import Mask
from kvattn.pallas import gpu_decode, tuning
from kvattn.request import Request

sys.path.insert(0, str(Path(__file__).parent))
import gpu_peers
from gpu_peers import NotThere, Problem, Program, einsum_attention, rows_of

RESULTS = Path(__file__).parent / "results"
L2_BYTES = 60e6
COLD = 4
"""How many times the L2 the copies of a cache exceed."""
GROUP = 8
"""Steps in one compiled program, for the span."""
COPY_BYTES = 512 << 20
"""Of an array that is copied."""
LIMIT, PEER_LIMIT = 1e-2, 5e-2
"""Largest error of a head's output, of its norm: 16-bit operands give 1e-3 to 1e-2. Some peers round more often."""


# Cases ----------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Goal:
    """What a figure should reach.

    Args:
        kind: "copy" (at least per cent of a copy), "us" (at most), "span" (at most, gaps between kernels included),
            "faster" (at least so many times than another case), "within" (at most so many times another's time).
        value: the number.
        other: name of the other case.
    """

    kind: str
    value: float
    other: str = ""

    def __str__(self):
        return {
            "copy": f">= {self.value:g} % of copy",
            "us": f"<= {self.value:g} us",
            "span": f"<= {self.value:g} us in a compiled program",
            "faster": f">= {self.value:g}x faster than {self.other}",
            "within": f"<= {self.value:g}x {self.other}",
        }[self.kind]

    def measured(self, name: str, report: dict) -> tuple[float, bool] | None:
        """The figure, and whether it is reached; None: not measured."""
        us = {n: row["us"] for n, row in report["cases"].items() if row.get("us")}
        if name not in us or (self.other and self.other not in us):
            return None
        if self.kind == "copy":
            value = report["cases"][name]["percent_of_copy"]
        elif self.kind == "us":
            value = us[name]
        elif self.kind == "span":
            value = report["cases"][name]["span_us"]
        else:
            value = us[self.other] / us[name] if self.kind == "faster" else us[name] / us[self.other]
        return value, (value >= self.value if self.kind in ("copy", "faster") else value <= self.value)


@dataclasses.dataclass(frozen=True)
class Case:
    """A decode step: B rows of S slots, N query and K key/value heads of H.

    `valid` tokens are in each row (None: S), or `"zipf"`: row r has a share of B * `mean` proportional to 1/r.
    """

    name: str
    batch: int
    slots: int
    heads: int = 32
    kv_heads: int = 8
    size: int = 128
    codec: Any = None
    page_size: int = 0
    valid: int | str | None = None
    mean: int = 4096
    new: int = 1
    window: int | None = None
    goals: tuple[Goal, ...] = ()

    def lengths(self) -> np.ndarray:
        """int64 [B]."""
        if self.valid != "zipf":
            return np.full(self.batch, self.slots if self.valid is None else self.valid)
        share = 1 / np.arange(1, self.batch + 1)
        lengths = np.maximum(self.batch * self.mean * share / share.sum(), 1).astype(int)
        lengths[-1] += self.batch * self.mean - lengths.sum()
        return np.random.default_rng(0).permutation(np.minimum(lengths, self.slots))

    def small(self) -> "Case":
        """For looking at values in an interpreter."""
        part = lambda x: x if x is None else max(x * 256 // self.slots, 40)
        valid = self.valid if isinstance(self.valid, str) else part(self.valid)
        kv_heads = min(self.kv_heads, 2)
        heads = self.heads // self.kv_heads * kv_heads
        sizes = {"batch": min(self.batch, 2), "slots": 256, "mean": 120, "heads": heads, "kv_heads": kv_heads}
        return dataclasses.replace(self, **sizes, valid=valid, window=part(self.window))


BASE = "bf16 32x4096"
CASES = [
    Case(BASE, 32, 4096, goals=(Goal("copy", 92), Goal("us", 138))),
    Case("bf16 8x32768", 8, 32768, goals=(Goal("copy", 93),)),
    Case("bf16 1x32768", 1, 32768, goals=(Goal("us", 44),)),
    Case("bf16 64/8 1x8192, pages of 32", 1, 8192, heads=64, page_size=32, goals=(Goal("us", 18),)),
    Case("bf16 1x1024", 1, 1024, goals=(Goal("us", 9.5), Goal("span", 9.5))),
    Case("bf16 32/4 1x1024", 1, 1024, kv_heads=4, goals=(Goal("us", 9.5), Goal("span", 9.5))),
    Case("bf16 32/4 1x262144", 1, 262144, kv_heads=4),
    Case("fp8 32/4 1x262144", 1, 262144, kv_heads=4, codec=kvattn.Float8(),
         goals=(Goal("within", 0.6, "bf16 32/4 1x262144"), Goal("copy", 70))),
    Case("fp8 32x4096", 32, 4096, codec=kvattn.Float8(), goals=(Goal("faster", 1.6, BASE),)),
    Case("int8 32x4096", 32, 4096, codec=kvattn.Int8(), goals=(Goal("faster", 1.6, BASE), Goal("us", 85))),
    Case("int4 32x4096", 32, 4096, codec=kvattn.Int4(64), goals=(Goal("faster", 2.2, BASE), Goal("us", 60))),
    Case("bf16 32x4096, pages of 16", 32, 4096, page_size=16, goals=(Goal("within", 1.05, BASE),)),
    Case("bf16 32x4096, pages of 64", 32, 4096, page_size=64, goals=(Goal("within", 1.02, BASE),)),
    Case("int8 32x4096, pages of 64", 32, 4096, codec=kvattn.Int8(), page_size=64,
         goals=(Goal("within", 1.02, "int8 32x4096"),)),
    Case("bf16 32xZipf", 32, 32768, valid="zipf", goals=(Goal("within", 1.10, BASE),)),
    Case("bf16 32xZipf, pages of 64", 32, 32768, valid="zipf", page_size=64,
         goals=(Goal("within", 1.10, "bf16 32x4096, pages of 64"),)),
    Case("bf16 32x2048", 32, 2048),
    Case("bf16 32x2048 of 16384", 32, 16384, valid=2048, goals=(Goal("within", 1.05, "bf16 32x2048"),)),
    Case("bf16 32/32 8x4096, pages of 16", 8, 4096, kv_heads=32, page_size=16,
         goals=(Goal("copy", 85), Goal("us", 147))),
    Case("bf16 71/1 of 64, 32x4096", 32, 4096, heads=71, kv_heads=1, size=64, goals=(Goal("us", 18),)),
    Case("bf16 71/1 of 64, 1x512", 1, 512, heads=71, kv_heads=1, size=64),
    Case("bf16 8x4096", 8, 4096),
    Case("bf16 8x131072, window 4096", 8, 131072, window=4096, goals=(Goal("within", 1.05, "bf16 8x4096"),)),
    Case("bf16 32x4096, 4 new tokens", 32, 4096, new=4, goals=(Goal("within", 1.05, BASE),)),
]  # fmt: skip
"""Section by section of what decoding is measured by: bandwidth, latency, codes, pages, ragged rows, head counts."""
AGAINST = {
    "FlashInfer": 1.0, "FA3": 1.0, "jax.nn xla": 3.0, "jax.nn cudnn": 1.0, "JAX Triton": 1.0,
}  # fmt: skip
"""Times faster than each peer, at every case it takes; all whose names begin so."""


_write = jax.jit(lambda cache, *new: cache.write(*new), donate_argnums=0)


def empty_cache(case: Case) -> Any:
    """A cache for a case, with tables if it has pages, that holds nothing."""
    sizes: dict[str, Any] = {"codec": case.codec, "dtype": jnp.bfloat16}
    if not case.page_size:
        layout = Layout(case.slots, case.slots, False)
        return kvattn.KVCache.create(
            case.batch, case.kv_heads, case.size, capacity=case.slots, layout=layout, **sizes
        )  # fmt: skip
    counts, columns = -(-case.lengths() // case.page_size), case.slots // case.page_size
    cache = kvattn.PagedKVCache.create(
        int(counts.sum()), case.page_size, case.kv_heads, case.size, batch_size=case.batch, max_pages=columns, **sizes
    )
    table, pages = np.zeros((case.batch, columns), np.int32), np.random.default_rng(1).permutation(counts.sum())
    for row, mine in zip(table, np.split(pages, np.cumsum(counts)[:-1]), strict=True):
        row[: len(mine)] = mine
    return cache.with_tables(table, [0] * case.batch)


def worst(x: jax.Array) -> jax.Array:
    """Poison: NaN, or the largest integer."""
    return jnp.full_like(x, jnp.nan if jnp.issubdtype(x.dtype, jnp.floating) else jnp.iinfo(x.dtype).max)


def filled_cache(case: Case, poison: bool, seed: int = 0) -> Any:
    """A cache full of random tokens; `worst` where there is none, if there is to be poison."""
    cache, lengths = empty_cache(case), jnp.asarray(case.lengths(), jnp.int32)
    if poison:
        cache = cache.replace(keys=jax.tree.map(worst, cache.keys), values=jax.tree.map(worst, cache.values))
    step = min(case.slots, 4096)
    for start, key in zip(
        range(0, case.slots, step), jax.random.split(jax.random.key(seed), -(-case.slots // step)), strict=True
    ):
        slots = start + jnp.arange(step, dtype=jnp.int32)[None]
        slots = jnp.where(slots < lengths[:, None], slots, -1)
        shape = (case.batch, step, case.kv_heads, case.size)
        cache = _write(cache, slots, *(jax.random.normal(k, shape, jnp.bfloat16) for k in jax.random.split(key)))
    return cache.replace(lengths=lengths)


def request_of(case: Case, cache: Any) -> Request:
    """The last `new` tokens of every row ask, in bfloat16."""
    query = jax.random.normal(jax.random.key(7), (case.batch, case.new, case.heads, case.size), jnp.bfloat16)
    positions = cache.lengths[:, None] - case.new + jnp.arange(case.new, dtype=jnp.int32)[None]
    return Request(query, positions, cache.view(), None, mask=Mask(window=case.window), scale=case.size**-0.5)


def valid_bytes(case: Case, request: Request) -> int:
    """Bytes of keys and values that a step has to read."""
    arrays = [*request.view.keys.values(), *request.view.values.values()]
    slots = case.page_size * arrays[0].shape[1] if case.page_size else case.batch * case.slots
    tokens = np.minimum(case.lengths(), (case.window or case.slots) + case.new - 1).sum()
    return int(sum(x.nbytes for x in arrays) * tokens / slots)


# Values ---------------------------------------------------------------------------------------------------------------


def some_rows(case: Case) -> np.ndarray:
    """The first and last, the shortest and the longest: as many as 2 GB of float32 hold, one at least."""
    lengths = case.lengths()
    rows = list(dict.fromkeys([int(lengths.argmax()), int(lengths.argmin()), 0, case.batch - 1]))
    most = int(2e9 / (8 * case.slots * case.kv_heads * case.size))
    return np.array(rows[: max(most, 1)])


def exact(case: Case, request: Request) -> np.ndarray:
    """Attention in float32 for `some_rows`."""
    attention = jax.jit(lambda r: einsum_attention(r, jnp.float32, jax.lax.Precision.HIGHEST))
    return np.asarray(attention(rows_of(request, some_rows(case))))


def error_of(case: Case, out: np.ndarray, expected: np.ndarray) -> float:
    """The largest error of a head, of its norm; infinite if anything is not finite."""
    out = out.reshape(case.batch, case.new, case.heads, -1)
    if not np.isfinite(out).all():
        return float("inf")
    norm = np.linalg.norm(expected, axis=-1)
    return float((np.linalg.norm(out[some_rows(case)] - expected, axis=-1) / np.maximum(norm, 1e-30)).max())


# Times ----------------------------------------------------------------------------------------------------------------


class Rotation:
    """A program as the profiler wants it: called without arguments, each time on the next copy."""

    def __init__(self, program: Program):
        self.program, self.turn = program, itertools.cycle(program.copies)

    def __call__(self):
        """One step."""
        out = self.program.run(next(self.turn))
        return Synchronised() if self.program.torch else out

    def trace(self, *_, **__):
        """Only for the looks of it."""
        raise NotImplementedError

    lower = trace


class Synchronised:
    """What PyTorch returned: to wait for it is to wait for the device."""

    def block_until_ready(self) -> None:
        """Waits."""
        torch = gpu_peers.module("torch")
        torch.cuda.synchronize()


def kernel_times(program: Program, least: int = 20) -> list[float]:
    """Microseconds of all kernels of a step, step by step, by CUPTI."""
    from jax.experimental.mosaic.gpu import profiler

    count = max(least, len(program.copies))
    _, steps = profiler.measure(Rotation(program), aggregate=False, iterations=count)()
    if not steps:
        raise RuntimeError("CUPTI saw no kernel")
    return [1e3 * sum(milliseconds for _, milliseconds in step) for step in steps]


def jax_span(program: Program, repeats: int = 7) -> list[float]:
    """Microseconds per step of a compiled program of several, queued."""
    size = min(GROUP, len(program.copies))
    groups = [program.copies[i : i + size] for i in range(0, len(program.copies) - size + 1, size)]

    @jax.jit
    def steps(copies):
        outs: list[jax.Array] = []
        for copy in copies:
            if outs:
                # One after the other: queries and positions wait for the step before.
                leaves, tree = jax.tree.flatten(copy)
                small = [i for i, x in enumerate(leaves) if x.size <= min(outs[-1].size, 1 << 22)]
                tied, _ = jax.lax.optimization_barrier(([leaves[i] for i in small], outs[-1]))
                for i, x in zip(small, tied, strict=True):
                    leaves[i] = x
                copy = jax.tree.unflatten(tree, leaves)
            outs.append(program.run(copy))
        return outs

    times = []
    rounds = max(1, 32 // (size * len(groups)))
    for i in range(repeats + 1):
        start = time.perf_counter()
        outs = [steps(group) for _ in range(rounds) for group in groups]
        jax.block_until_ready(outs)
        if i:
            times.append(1e6 * (time.perf_counter() - start) / (rounds * len(groups) * size))
    return times


def torch_span(program: Program, repeats: int = 7) -> tuple[list[float], str]:
    """Microseconds per step by CUDA events around a graph of one step per copy; without a graph if that fails."""
    torch = gpu_peers.module("torch")

    def all_copies():
        for copy in program.copies:
            program.run(copy)

    all_copies()
    torch.cuda.synchronize()
    run, how = all_copies, "events around calls"
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            all_copies()
        run, how = graph.replay, "events around a graph"
    except Exception:  # whatever cannot be captured is called
        torch.cuda.synchronize()
    times, rounds = [], max(1, 32 // len(program.copies))
    for i in range(repeats + 1):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(rounds):
            run()
        stop.record()
        torch.cuda.synchronize()
        if i:
            times.append(1e3 * start.elapsed_time(stop) / (rounds * len(program.copies)))
    return times, how


def timed(program: Program) -> dict[str, Any]:
    """Both clocks; `us` is that of the kernels where CUPTI works."""
    if program.torch:
        times, how = torch_span(program)
    else:
        times, how = jax_span(program), "one compiled program"
    row: dict[str, Any] = {
        "span_us": round(statistics.median(times), 2), "span_min_us": round(min(times), 2), "span_clock": how,
    }  # fmt: skip
    try:
        times = kernel_times(program)
        row |= {"kernels_us": round(statistics.median(times), 2), "kernels_min_us": round(min(times), 2)}
    except Exception as error:  # the span is there anyway
        row["no_cupti"] = f"{type(error).__name__}: {error}".splitlines()[0]
    row["us"] = row.get("kernels_us", row["span_us"])
    row["min_us"] = row.get("kernels_min_us", row["span_min_us"])
    row["clock"] = "CUPTI" if "kernels_us" in row else how
    return row


def ratio(ours: dict, theirs: dict) -> float:
    """How many times faster ours is, by the same clock."""
    clock = "kernels_us" if "kernels_us" in ours and "kernels_us" in theirs else "span_us"
    return round(theirs[clock] / ours[clock], 3)


def copies_of(request: Request, size: int) -> list[Request]:
    """As many as the L2 cannot hold; a whole number of groups."""
    count = max(2, -(-int(COLD * L2_BYTES) // size))
    count = -(-count // GROUP) * GROUP if count > GROUP else count
    duplicate = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree))
    return [request, *(jax.block_until_ready(duplicate(request)) for _ in range(count - 1))]


def copy_bandwidth() -> dict[str, Any]:
    """TB/s of copying, bytes read and written: the best way found."""
    count, ways = COPY_BYTES, {}
    copies = [jnp.full((count // 4,), i, jnp.int32) for i in range(2)]
    row = timed(Program(jax.jit(lambda x: x + 1), copies))
    ways["XLA, x + 1"] = 2e-6 * count / row["us"]
    with contextlib.suppress(NotThere):
        torch = gpu_peers.module("torch")
        if torch.cuda.is_available():
            pairs = [(torch.zeros(count // 4, device="cuda"), torch.ones(count // 4, device="cuda")) for _ in range(2)]
            times, _ = torch_span(Program(lambda pair: pair[0].copy_(pair[1]), pairs, torch=True))
            ways["PyTorch, copy_"] = 2e-6 * count / statistics.median(times)
            del pairs
            torch.cuda.empty_cache()
    return {"tb_per_s": round(max(ways.values()), 3), "ways": {n: round(x, 3) for n, x in ways.items()}}


def gpu_state() -> str:
    """Driver, clocks and heat, as nvidia-smi says."""
    fields = "driver_version,clocks.sm,clocks.max.sm,clocks.mem,temperature.gpu,power.draw"
    try:
        command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        return str(error)


# A run ----------------------------------------------------------------------------------------------------------------


def run_case(case: Case, peers: list[str], copy: float, args: argparse.Namespace, tell: Callable) -> dict:
    """Values, then times, of one case."""
    on_device = not args.dry_run
    tell(f"{case.name}: filling")
    if bool((case.lengths() != case.slots).any()):
        poisoned = request_of(case, filled_cache(case, poison=True))
        # The kernel gets the poison; the expected values are of the same tokens.
        out = np.asarray(jax.jit(lambda r: gpu_decode.attend(r)[0])(poisoned))
        row: dict[str, Any] = {"error_beside_nan": error_of(case, out, exact(case, poisoned))}
        del poisoned
    else:
        row = {}
    cache = filled_cache(case, poison=False)
    request = request_of(case, cache)
    del cache
    if (reason := gpu_decode.unsupported(request)) is not None:
        return {"failed": reason}
    expected, size = exact(case, request), valid_bytes(case, request)
    tell(f"{case.name}: kvattn")
    requests = copies_of(request, size) if on_device else [request]
    ours = Program(jax.jit(lambda r: gpu_decode.attend(r)[0]), requests, note="pages" if case.page_size else "")
    row |= {"error": error_of(case, ours.values(), expected), "valid_bytes": size, "copies": len(requests)}
    row["right"] = max(row["error"], row.get("error_beside_nan", 0)) <= LIMIT
    row["config"] = dataclasses.asdict(gpu_decode.config_for(request)) if on_device else {}
    if not row["right"]:
        return row
    if on_device:
        row |= timed(ours)
        row |= {"tb_per_s": round(size / row["us"] / 1e6, 3), "gpu": gpu_state()}
        row["percent_of_copy"] = round(100 * row["tb_per_s"] / copy, 1)
    row["peers"] = {}
    problem = Problem(requests, case.lengths(), args.fa3, on_device)
    for name in peers:
        tell(f"{case.name}: {name}")
        with gpu_peers.freed(problem):
            row["peers"][name] = run_peer(case, name, problem, expected, row)
    return row


def run_peer(case: Case, name: str, problem: Problem, expected: np.ndarray, ours: dict) -> dict:
    """One peer: not there, wrong, or timed."""
    try:
        program = gpu_peers.PEERS[name](problem)
        result: dict[str, Any] = {"note": program.note, "error": error_of(case, program.values(), expected)}
        if result["error"] > PEER_LIMIT:
            return result | {"not_run": f"its values are off by {result['error']:.1e}"}
        if problem.on_device:
            result |= timed(program)
            result |= {"times_slower": ratio(ours, result)}
        return result
    except NotThere as error:
        return {"not_run": str(error)}
    except Exception as error:  # a peer that fails is a result
        return {"not_run": f"{type(error).__name__}: {error}".splitlines()[0][:160]}


def measure(args: argparse.Namespace, cases: list[Case], console: Console) -> dict:
    """All cases; the report grows on disk as they are done."""
    peers = gpu_peers.names(args.peers)
    device = jax.local_devices()[0]
    report: dict[str, Any] = {
        "device": device.device_kind, "gpu": gpu_state(), "platform": str(device.client.platform_version),
        "versions": {"jax": jax.__version__, "kvattn": kvattn.__version__, **peer_versions()},
        "date": datetime.date.today().isoformat(), "dry_run": args.dry_run, "cases": {},
    }  # fmt: skip
    if not args.dry_run:
        report["copy"] = copy_bandwidth()
    copy = report.get("copy", {}).get("tb_per_s", float("nan"))
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("", total=len(cases))
        for case in cases:
            tell = lambda text, task=task: progress.update(task, description=text)
            row: dict[str, Any]
            try:
                row = run_case(case, peers, copy, args, tell)
            except Exception as error:  # the other cases are still worth running
                row = {"failed": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
            row["shape"] = shape_of(case)
            report["cases"][case.name] = row
            progress.advance(task)
            progress.console.print(one_line(case.name, row), soft_wrap=True)
            save(report, args)
    return report


def shape_of(case: Case) -> dict[str, Any]:
    """The fields of a case, for the report."""
    fields = {f.name: getattr(case, f.name) for f in dataclasses.fields(case) if f.name not in ("name", "goals")}
    return {n: str(v) if n == "codec" else v for n, v in fields.items() if v is not None}


def peer_versions() -> dict[str, str]:
    """Of what is installed."""
    found = {}
    for name in ("jaxlib", "torch", "triton", "flashinfer", "flash_attn_interface"):
        with contextlib.suppress(NotThere):
            found[name] = str(getattr(gpu_peers.module(name), "__version__", "?"))
    return found


def one_line(name: str, row: dict) -> str:
    """A case as it is done."""
    if "failed" in row:
        return f"FAILED {name}: {row['failed']}"
    word = "right" if row["right"] else "WRONG"
    errors = f"error {row['error']:.1e}" + (
        f", beside NaN {row['error_beside_nan']:.1e}" if "error_beside_nan" in row else ""
    )
    times = f", {row['us']} us, {row['tb_per_s']} TB/s, {row['percent_of_copy']} %" if "us" in row else ""
    peers = row.get("peers", {})
    ran = [f"{n} {p['times_slower']}x" if "times_slower" in p else n for n, p in peers.items() if "not_run" not in p]
    off = [f"{n} ({p['not_run']})" for n, p in peers.items() if "not_run" in p and "values are off" in p["not_run"]]
    return f"{word} {name}: {errors}{times}; {', '.join(ran + off) or 'no peer'}"


def save(report: dict, args: argparse.Namespace) -> None:
    """The report so far."""
    if args.no_save:
        return
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "decode_gpu.json").write_text(json.dumps(report, indent=1) + "\n")


# What is shown --------------------------------------------------------------------------------------------------------


def show(report: dict, cases: list[Case], console: Console) -> None:
    """A table of kvattn, one of the peers, the goals, and why a peer is not there."""
    if not report["dry_run"]:
        copy = report["copy"]
        console.print(f"{report['device']}, {report['gpu']}; a copy: {copy['tb_per_s']} TB/s {copy['ways']}")
        table = Table(box=None, title="kvattn", title_justify="left")
        for column in ("case", "us", "min", "span", "TB/s", "% of copy", "error", "clock"):
            table.add_column(column, justify="left" if column in ("case", "clock") else "right")
        for name, row in report["cases"].items():
            if "us" in row:
                figures = (row[n] for n in ("us", "min_us", "span_us", "tb_per_s", "percent_of_copy"))
                table.add_row(name, *map(str, figures), f"{row['error']:.1e}", row["clock"])
        console.print(table)
        ran = [
            p for p in gpu_peers.PEERS if any("us" in r.get("peers", {}).get(p, {}) for r in report["cases"].values())
        ]
        if ran:
            table = Table(box=None, title="peers: us, and how many times slower than kvattn", title_justify="left")
            for column in ("case", *ran):
                table.add_column(column, justify="left" if column == "case" else "right")
            for name, row in report["cases"].items():
                cells = [row.get("peers", {}).get(p, {}) for p in ran]
                table.add_row(name, *(f"{c['us']} ({c['times_slower']:.2f}x)" if "us" in c else "-" for c in cells))
            console.print(table)
        show_goals(report, cases, console)
    reasons: dict[tuple[str, str], list[str]] = {}
    for name, row in report["cases"].items():
        for peer, result in row.get("peers", {}).items():
            if "not_run" in result:
                reasons.setdefault((peer, result["not_run"]), []).append(name)
    for (peer, reason), names in reasons.items():
        console.print(
            f"not run: {peer}: {reason} ({'all' if len(names) == len(report['cases']) else len(names)} cases)"
        )


def show_goals(report: dict, cases: list[Case], console: Console) -> None:
    """Each goal, its figure, and whether it is reached."""
    report["goals"] = []
    table = Table(box=None, title="goals", title_justify="left")
    for column in ("case", "goal", "figure", ""):
        table.add_column(column, justify="right" if column == "figure" else "left")

    def add(name: str, goal: str, found: tuple[float, bool] | None) -> None:
        figure, word = ("", "not measured") if found is None else (
            f"{found[0]:.2f}", "reached" if found[1] else "missed")  # fmt: skip
        table.add_row(name, goal, figure, word)
        report["goals"].append({"case": name, "goal": goal, "figure": figure, "result": word})

    for case in cases:
        for goal in case.goals:
            add(case.name, str(goal), goal.measured(case.name, report))
    for start, least in AGAINST.items():
        found = [
            (peer["times_slower"], f"{case} ({name})")
            for case, row in report["cases"].items()
            for name, peer in row.get("peers", {}).items()
            if name.startswith(start) and "times_slower" in peer
        ]
        worst_case = min(found, default=None)
        goal = f">= {least:g}x faster than {start}"
        if worst_case is None:
            add("all", goal, None)
        else:
            add(f"all; least in {worst_case[1]}", goal, (worst_case[0], worst_case[0] >= least))
    console.print(table)


def picture(report: dict, path: Path) -> None:
    """Bars of per cent of a copy, and of times against the fastest peer."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = {name: row for name, row in report["cases"].items() if "us" in row}
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 0.32 * len(rows) + 1.6), sharey=True)
    names = list(rows)[::-1]
    bars = left.barh(names, [rows[n]["percent_of_copy"] for n in names], color="#3182bd")
    left.bar_label(bars, [f" {rows[n]['us']:.1f} us" for n in names], fontsize=8)
    left.set_xlabel("keys and values read, % of a copy in the same run")
    left.set_xlim(0, 120)
    left.axvline(100, color="#999999", linewidth=0.8)
    best = {}
    for name in names:
        found = {p: r["times_slower"] for p, r in rows[name].get("peers", {}).items()
                 if "times_slower" in r and not p.startswith("kvattn")}  # fmt: skip
        if found:
            best[name] = min(found.items(), key=lambda item: item[1])
    bars = right.barh(names, [best[n][1] if n in best else 0 for n in names], color="#e6550d")
    right.bar_label(bars, [f" {best[n][1]:.2f}x {best[n][0]}" if n in best else "" for n in names], fontsize=8)
    right.axvline(1, color="#999999", linewidth=0.8)
    right.set_xlabel("times faster than the fastest peer that ran")
    right.margins(x=0.4)
    figure.suptitle(f"One decode step, {report['device']}, {report['date']}, cold L2")
    figure.tight_layout()
    figure.savefig(path, dpi=130)


# Sizes ----------------------------------------------------------------------------------------------------------------


def tune(args: argparse.Namespace, cases: list[Case], console: Console) -> None:
    """The fastest sizes for each kind of case, measured on its first one; saved as they are found."""
    chosen: dict[str, Case] = {}
    for case in cases:
        chosen.setdefault(of_shapes(gpu_decode.key, case), case)
    table: dict[str, tuning.GpuConfig] = {}
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("", total=len(chosen) * len(tuning.CANDIDATES))
        for done, (key, case) in enumerate(chosen.items(), start=1):
            progress.update(task, description=case.name)
            cache = filled_cache(case, poison=False)
            query = request_of(case, cache).query
            found, seconds = tuning.tune(
                query, cache, mask=Mask(window=case.window), progress=lambda *_: progress.advance(task)
            )
            progress.update(task, completed=done * len(tuning.CANDIDATES))
            table |= found
            best = min(seconds.values())
            progress.console.print(f"{case.name} [{key}]: {found[key]}, {1e6 * best:.1f} us", markup=False)
            for config, each in sorted(seconds.items(), key=lambda item: item[1]):
                progress.console.print(f"    {config}: {1e6 * each:.1f} us", markup=False)
            tuning.save(args.tune, table)
    tuning.use(table)
    console.print(f"saved {args.tune}: {len(table)} keys")


def empty_cache_traced(case: Case) -> Any:
    """`empty_cache` under tracing: tables of any pages."""
    if not case.page_size:
        return empty_cache(case)
    columns = case.slots // case.page_size
    return kvattn.PagedKVCache.create(
        int((-(-case.lengths() // case.page_size)).sum()), case.page_size, case.kv_heads, case.size,
        batch_size=case.batch, max_pages=columns, codec=case.codec, dtype=jnp.bfloat16,
    )  # fmt: skip


def of_shapes(question: Callable[[Request], Any], case: Case) -> Any:
    """The answer to what does not depend on numbers, without memory for them."""
    answers = []
    jax.eval_shape(lambda: answers.append(question(request_of(case, empty_cache_traced(case)))))
    return answers[0]


def refused(cases: list[Case]) -> dict[str, str]:
    """Cases that the kernel would not take at their full sizes, by shapes alone."""
    found = {}
    for case in cases:
        reason = of_shapes(gpu_decode.unsupported, case)
        if reason is not None:
            found[case.name] = reason
    return found


def main() -> int:
    """Runs, prints, saves; 1 if a value is off."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=[""], help="words; cases whose names contain one of them")
    parser.add_argument("--peers", nargs="+", default=[""], help='beginnings of names, or "none"')
    parser.add_argument("--fa3", help="file of vLLM's FA3 extension, where flash_attn_interface is not installed")
    parser.add_argument("--table", type=Path, help="sizes to use, as --tune saves them")
    parser.add_argument("--tune", type=Path, metavar="FILE", help="measures sizes and saves them")
    parser.add_argument("--dry-run", action="store_true", help="values only, in miniature, in an interpreter")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--no-save", action="store_true")
    parser.add_argument("--list", action="store_true", help="prints cases and peers")
    args = parser.parse_args()
    console = Console(highlight=False, width=None if Console().is_terminal else 200)
    cases = [case for case in CASES if any(word.lower() in case.name.lower() for word in args.cases)]
    if args.list:
        for line in (*(case.name for case in cases), *gpu_peers.names(args.peers)):
            console.print(line)
        return 0
    if args.table:
        tuning.use(args.table)
    if args.dry_run:
        args.no_save = True
        with kvattn.pallas.interpret():
            for name, reason in (no := refused(cases)).items():
                console.print(f"REFUSED at full size: {name}: {reason}")
            report = measure(args, [case.small() for case in cases], console)
            show(report, cases, console)
            return finish(report, console) or bool(no)
    if jax.default_backend() != "gpu":
        console.print(f"times need a GPU, the default backend here is {jax.default_backend()!r}; --dry-run does not")
        return 2
    if args.tune:
        tune(args, cases, console)
        return 0
    report = measure(args, cases, console)
    show(report, cases, console)
    save(report, args)
    if not args.no_save and any("us" in row for row in report["cases"].values()):
        picture(report, args.out / "decode_gpu.png")
    return finish(report, console)


def finish(report: dict, console: Console) -> int:
    """Counts what is wrong."""
    bad = [name for name, row in report["cases"].items() if not row.get("right")]
    console.print(f"{len(report['cases'])} cases, {len(bad)} wrong or failed{': ' if bad else ''}{'; '.join(bad)}")
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
