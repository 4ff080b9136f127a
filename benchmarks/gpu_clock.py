"""How long a decode step takes on a GPU: the microseconds of each of its kernels, and the span of a step.

Copies of the cache are taken in turn, together more than four times the L2 of the GPU, so every step reads memory.
"""

import contextlib
import itertools
import re
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import gpu_peers
import jax
import jax.numpy as jnp
from gpu_peers import NotThere, Program

from kvattn.attend import Request

L2_BYTES = 60e6
COLD = 4
"""How many times the L2 the copies of a cache exceed."""
GROUP = 8
"""Steps in one compiled program, for the span."""
COPY_BYTES = 512 << 20
"""Of an array that is copied."""
DERIVED = re.compile(r"Steps|XLA |Framework|Source|Launch|TensorFlow")
"""Lines of a trace that repeat what the lines of the streams say."""


def copies_of(request: Request, size: int) -> list[Request]:
    """As many as the L2 cannot hold; a whole number of groups."""
    count = max(2, -(-int(COLD * L2_BYTES) // size))
    count = -(-count // GROUP) * GROUP if count > GROUP else count
    duplicate = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree))
    return [request, *(jax.block_until_ready(duplicate(request)) for _ in range(count - 1))]


def timed(program: Program) -> dict[str, Any]:
    """The span of a step and its kernels. `us` is the sum of the kernels where a profiler sees them, else the span."""
    if program.torch:
        times, how = torch_span(program)
    else:
        times, how = jax_span(program), "one compiled program"
    row: dict[str, Any] = {
        "span_us": round(statistics.median(times), 2), "span_min_us": round(min(times), 2), "span_clock": how,
    }  # fmt: skip
    kernels, row["clock"], reasons = kernels_of(program)
    if kernels:
        row |= {"kernels": kernels, "kernels_us": round(sum(kernels.values()), 2)}
    else:
        row |= {"clock": how, "no_kernels": reasons}
    row["us"] = row.get("kernels_us", row["span_us"])
    return row


# Spans ----------------------------------------------------------------------------------------------------------------


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


# Kernels --------------------------------------------------------------------------------------------------------------


class Rotation:
    """A program as profilers want it: called without arguments, each time on the next copy."""

    def __init__(self, program: Program):
        self.program, self.turn = program, itertools.cycle(program.copies)

    def __call__(self):
        """One step."""
        out = self.program.run(next(self.turn))
        return Synchronised() if self.program.torch else out

    def trace(self, *_, **__):
        """Only for the looks of it: Mosaic's profiler asks for a compiled function."""
        raise NotImplementedError

    lower = trace


class Synchronised:
    """What PyTorch returned: to wait for it is to wait for the device."""

    def block_until_ready(self) -> None:
        """Waits."""
        gpu_peers.module("torch").cuda.synchronize()


def kernels_of(program: Program, least: int = 20) -> tuple[dict[str, float], str, str]:
    """Microseconds per step of each kernel by name, by which profiler, and why not by others."""
    count, reasons = max(least, len(program.copies)), []
    for name, profile in (("jax.profiler", traced), ("Mosaic's CUPTI", by_cupti)):
        try:
            if found := per_step(profile(Rotation(program), count), count):
                return found, name, "; ".join(reasons)
            reasons.append(f"{name} saw no kernel")
        except Exception as error:  # the next one, or the span
            reasons.append(f"{name}: {type(error).__name__}: {error}".splitlines()[0])
    return {}, "", "; ".join(reasons)


def traced(step: Rotation, count: int) -> list[tuple[str, float]]:
    """(name, microseconds) of every kernel of `count` steps in a trace of JAX's profiler."""
    options = jax.profiler.ProfileOptions()
    options.host_tracer_level = options.python_tracer_level = 0
    jax.block_until_ready(step())
    with tempfile.TemporaryDirectory() as folder:
        jax.profiler.start_trace(folder, profiler_options=options)
        try:
            outs = [step() for _ in range(count)]
            for out in outs:
                out.block_until_ready()
        finally:
            jax.profiler.stop_trace()
        files = list(Path(folder).rglob("*.xplane.pb"))
        return [x for file in files for x in in_trace(jax.profiler.ProfileData.from_file(str(file)))]


def in_trace(data: Any) -> list[tuple[str, float]]:
    """(name, microseconds) of every event on the streams of a trace's GPUs."""
    found = []
    for plane in data.planes:
        if not plane.name.startswith("/device:GPU"):
            continue
        lines = list(plane.lines)
        streams = [line for line in lines if line.name.startswith("Stream")]
        for line in streams or [line for line in lines if not DERIVED.match(line.name)]:
            found += [(event.name, event.duration_ns / 1e3) for event in line.events]
    return found


def by_cupti(step: Rotation, count: int) -> list[tuple[str, float]]:
    """The same by Mosaic's profiler, which takes steps only that run the same kernels in the same order."""
    from jax.experimental.mosaic.gpu import profiler

    _, steps = profiler.measure(step, aggregate=False, iterations=count)()
    return [(name, 1e3 * milliseconds) for one in steps or () for name, milliseconds in one]


def per_step(events: list[tuple[str, float]], count: int) -> dict[str, float]:
    """Microseconds of a step by name: the median of a kernel's times, as often as it runs in a step."""
    times: dict[str, list[float]] = {}
    for name, microseconds in events:
        times.setdefault(name, []).append(microseconds)
    found = {name: statistics.median(each) * len(each) / count for name, each in times.items()}
    return {name: round(us, 3) for name, us in sorted(found.items(), key=lambda item: -item[1])}


# The device -----------------------------------------------------------------------------------------------------------


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
    return {"tb_per_s": round(max(ways.values()), 3), "ways": {n: round(x, 3) for n, x in ways.items()}}


def gpu_state() -> str:
    """Driver, clocks and heat, as nvidia-smi says."""
    fields = "name,driver_version,clocks.sm,clocks.max.sm,clocks.mem,temperature.gpu,power.draw"
    try:
        command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        return str(error)
