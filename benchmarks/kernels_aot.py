"""Compiles the kernels for real TPUs and GPUs on a machine without any, and prints what each program needs.

    make kernels-aot
    python benchmarks/kernels_aot.py --targets v5e v6e tpu7x h200

TPUs: first two programs of each case: the kernel over a cache that is an argument, and the step of
`kvattn.cached_attention`, which writes a token into a donated cache. Columns: vector memory of the kernel, temporary
memory, cache-sized copies, and of a donated cache what is not updated in place. Then the instructions of a tile
(`tpu_bundles.py`). Ends with status 1 if a program does not compile, needs temporary memory of the cache's size or
copies it, if a schedule cannot be read, or if a kernel that should be bound by memory is not. Needs `libtpu`.

GPUs (`gpu_programs.py`): registers of both kernels, spills, shared memory, programs per multiprocessor x tiles in
flight, and the same of the step; what is refused says why. Status 1 for a spill too, and for programs that do not
fit a multiprocessor together.
"""

import argparse
import dataclasses
import functools
import json
import os
import pathlib
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import tpu_bundles
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from rich.console import Console
from rich.table import Table

import kvattn
from kvattn.attend import api
from kvattn.attend.request import Request
from kvattn.cache import Layout
from kvattn.masks import Mask
from kvattn.pallas import tpu_decode

CAUSAL = Mask()
GPUS = ("h200", "b200")
TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}


@dataclasses.dataclass(frozen=True)
class Case:
    """A decode step: B rows, N and K heads of H, C slots."""

    heads: int = 32
    kv_heads: int = 8
    size: int = 128
    slots: int = 4096
    batch: int = 8
    dtype: Any = jnp.bfloat16
    query: Any = None  # dtype of the queries; None: that of the cache
    codec: Any = None
    page_size: int = 0
    new: int = 1
    mask: Mask = CAUSAL
    mass: bool = False


CASES = {
    "GQA 32/8": Case(),
    "GQA 32/8, Int8": Case(codec=kvattn.Int8()),
    "GQA 32/8, Float8": Case(codec=kvattn.Float8()),
    "GQA 32/8, pages of 16": Case(page_size=16),
    "GQA 32/8, pages of 64": Case(page_size=64),
    "GQA 32/8, pages of 64, Int8": Case(page_size=64, codec=kvattn.Int8()),
    "GQA 32/8, float32": Case(dtype=jnp.float32),
    "GQA 32/8, 4 tokens, window, sinks": Case(new=4, mask=Mask(window=1000, num_sinks=4)),
    "GQA 32/8, mass": Case(mass=True),
    "GQA 64/8": Case(heads=64),
    "MHA 32/32": Case(kv_heads=32),
    "MQA 71/1": Case(heads=71, kv_heads=1),
    "heads of 256": Case(size=256),
    "heads of 64": Case(size=64),
    "heads of 64, Int8": Case(size=64, codec=kvattn.Int8()),
    "heads of 64, pages of 128": Case(size=64, page_size=128),
    "heads of 80": Case(size=80),
    "heads of 80, Int8": Case(size=80, codec=kvattn.Int8()),
    "heads of 96": Case(size=96),
    "heads of 112, Float8": Case(size=112, codec=kvattn.Float8()),
    "MQA 71/1 of 64": Case(heads=71, kv_heads=1, size=64),
    "GQA 32/8, Int4(64)": Case(codec=kvattn.Int4(64)),
    "GQA 32/8, Int4(32)": Case(codec=kvattn.Int4(32)),
    "GQA 32/8, Int4(128), pages of 128": Case(codec=kvattn.Int4(128), page_size=128),
    "heads of 64, Int4(32)": Case(codec=kvattn.Int4(32), size=64),
    "heads of 192, Int4(96), float32": Case(codec=kvattn.Int4(96), size=192, dtype=jnp.float32),
    "1000 slots": Case(slots=1000),
    "pool of 2^31 numbers and more": Case(page_size=128, slots=65536, batch=33),
}


def first_device(target: str) -> Any:
    """A device to compile for; there need be none."""
    jax.config.update("jax_platforms", "cpu")
    os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost"}
    os.environ |= {"TPU_ACCELERATOR_TYPE": "v5litepod-4", "TPU_STDERR_LOG_LEVEL": "3"}
    return topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[target]).devices[0]


def arguments(device: Any, case: Case) -> tuple[Any, Any, Any]:
    """Shapes of query, new token and cache of a case, on a device."""
    batch, heads, kv_heads, size, slots = case.batch, case.heads, case.kv_heads, case.size, case.slots
    codec, page_size = case.codec, case.page_size
    sharding = NamedSharding(Mesh(np.array([device]), ("x",)), P())

    def make():
        if page_size:
            columns = slots // page_size
            return kvattn.PagedKVCache.create(
                batch * columns,
                page_size,
                kv_heads,
                size,
                batch_size=batch,
                max_pages=columns,
                codec=codec,
                dtype=case.dtype,
            )
        layout = Layout(slots, slots, False)
        return kvattn.KVCache.create(
            batch, kv_heads, size, capacity=slots, codec=codec, dtype=case.dtype, layout=layout
        )

    def on_device(x):
        # Eight-bit floats are bits in uint8 on CPUs only.
        narrow = isinstance(codec, kvattn.Float8) and x.dtype == jnp.uint8
        return jax.ShapeDtypeStruct(x.shape, jnp.float8_e4m3fn if narrow else x.dtype, sharding=sharding)

    cache = jax.tree.map(on_device, jax.eval_shape(make))
    query, new = (
        jax.ShapeDtypeStruct((batch, case.new, n, size), dtype, sharding=sharding)
        for n, dtype in ((heads, case.query or case.dtype), (kv_heads, case.dtype))
    )
    return query, new, cache


def asked(case: Case, query: Any, cache: Any, unsupported: Callable[[Request], str | None]) -> Request:
    """The call of a case: its last tokens ask. Raises what the kernel says against it."""
    positions = cache.lengths[:, None] - case.new + jnp.arange(case.new, dtype=jnp.int32)[None]
    scale = case.size**-0.5
    request = Request(query, positions, cache.view(), None, mask=case.mask, scale=scale, want_mass=case.mass)
    if (reason := unsupported(request)) is not None:
        raise kvattn.errors.UnsupportedError(reason)
    return request


def attend(device: Any, case: Case) -> tuple[Any, int, int]:
    """The compiled kernel over a cache that is an argument, the bytes of the cache and those of vector memory."""
    query, _, cache = arguments(device, case)
    vmem = []

    def step(query, cache):
        request = asked(case, query, cache, tpu_decode.unsupported)
        vmem.append(tpu_decode.vmem_bytes(request))
        return tpu_decode.attend(request)

    with jax.sharding.use_abstract_mesh(query.sharding.mesh.abstract_mesh):
        return jax.jit(step).lower(query, cache).compile(), cache.nbytes, vmem[0]


def tile_rows(device: Any, case: Case) -> int:
    """Slots of a tile of the kernel."""
    return tpu_decode.rows_of(jax.eval_shape(lambda cache: cache.view(), arguments(device, case)[2]))


def append(device: Any, case: Case, implementation: str = "mosaic_tpu") -> Any:
    """The compiled step of `kvattn.cached_attention`: a token is written into a donated cache, then attention."""
    query, new, cache = arguments(device, case)
    step = functools.partial(kvattn.cached_attention, implementation=implementation, window=case.mask.window)
    # The default backend here is the CPU.
    with mock.patch.object(api, "_NEEDS", {}), jax.sharding.use_abstract_mesh(query.sharding.mesh.abstract_mesh):
        return jax.jit(step, donate_argnums=3).lower(query, new, new, cache).compile()


def large_copies(text: str, count: int) -> int:
    """Copies, transposes, converts and gathers of at least `count` numbers in the text of a program."""
    found = re.findall(r"= \(?\w+\[([\d,]*)\][^=\n]* (?:copy|copy-start|transpose|convert|gather)\(", text)
    return sum(int(np.prod([int(n) for n in shape.split(",") if n] or [1])) >= count for shape in found)


def needs(program: Any, case: Case) -> list[str]:
    """KiB of temporary memory and cache-sized copies of a program."""
    numbers = case.batch * case.kv_heads * case.slots * case.size // (2 if isinstance(case.codec, kvattn.Int4) else 1)
    temporary = program.memory_analysis().temp_size_in_bytes
    return [f"{temporary / 2**10:.0f}", str(large_copies(program.as_text(), numbers // 2))]


def print_bundles(console: Console, target: str) -> bool:
    """Prints what `tpu_bundles` counts, and whether ours goes below JAX's and below the time of the copy."""
    try:
        results = tpu_bundles.measured(target)
    except tpu_bundles.UnreadableError as error:
        console.print(f"{target}: the schedules could not be read: {error}")
        return False
    bandwidth, clock = tpu_bundles.TARGETS[target]
    table = Table(title=f"{target}: bundles of a whole tile", title_justify="left")
    for name in ("case", "KiB of K and V", "bundles", "bundles per KiB", "cycles of the copy"):
        table.add_column(name, justify="left" if name == "case" else "right")
    well = tpu_bundles.well(target, results)
    for name, result in results.items():
        bundles, size = result["bundles"], result["bytes"]
        figures = (f"{size / 2**10:,.0f}", f"{bundles:,}", f"{bundles / size * 2**10:.2f}")
        table.add_row(name if well.get(name, True) else f"{name} (!)", *figures, f"{size / bandwidth * clock:,.0f}")
    console.print(table)
    return all(well.values())


def print_gpu(console: Console, target: str) -> bool:
    """Prints what `gpu_programs` finds, and whether nothing failed, spilled or copied the cache."""
    table = Table(title=f"{target}, jax {jax.__version__}", title_justify="left")
    columns = ("case", "cache MiB", "registers", "merge", "spills", "shared KiB", "in flight")
    columns += ("temporary KiB", "copies", "step: KiB", "copies", "moved KiB")
    for name in columns:
        table.add_column(name, justify="left" if name == "case" else "right")
    script = pathlib.Path(__file__).with_name("gpu_programs.py")
    child = subprocess.Popen([sys.executable, str(script), target], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    well, refused = True, {}
    for line in child.stdout:
        if not line.startswith("{"):
            continue
        result = json.loads(line)
        name = result["case"]
        if "refused" in result:
            refused[result["refused"]] = [*refused.get(result["refused"], []), name]
            continue
        if "failed" in result:
            well = False
            table.add_row(f"{name} (!)", "", f"failed: {result['failed'][:50]}")
            continue
        kernels = result["kernels"]
        spills = sum(spilled for _, spilled in kernels.values())
        # Every program has a state to leave behind, however small the cache is.
        temporary = float(result["temporary"]) * 2**10 - result["states"]
        # Programs that share a multiprocessor have 65536 registers together, each of 256 threads a multiple of 8.
        room = -(-kernels["decode"][0] // 8) * 8 * 256 * result["blocks"] <= 65536
        fine = spills == 0 and room and result["copies"] == "0" and temporary <= result["bytes"] / 4
        step = result.get("step", {})
        fine &= not step or (step["copies"] == "0" and step["moved"] <= 0)
        well &= fine
        # A merge of the same shape is compiled once.
        registers = (str(kernels["decode"][0]), str(kernels["merge"][0]) if "merge" in kernels else "")
        flight = f"{result['blocks']} x {result['stages']}"
        figures = (str(spills), f"{result['shared'] / 2**10:.0f}", flight, result["temporary"], result["copies"])
        if step:
            figures += (step["temporary"], step["copies"], f"{max(step['moved'], 0) / 2**10:.0f}")
        table.add_row(name if fine else f"{name} (!)", f"{result['bytes'] / 2**20:.0f}", *registers, *figures)
    well &= child.wait() == 0 and (table.row_count > 0 or bool(refused))
    if table.row_count:
        console.print(table)
    for reason, names in refused.items():
        console.print(f"{target}: {len(names)} cases refused: {reason}")
    return well


def main() -> int:
    """Compiles all, prints, says whether all is well."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", default=[*TOPOLOGIES, *GPUS], choices=[*TOPOLOGIES, *GPUS])
    args = parser.parse_args()
    console, failures = Console(highlight=False, width=150), 0
    for target in (t for t in args.targets if t in TOPOLOGIES):
        device = first_device(target)
        table = Table(title=f"{target}, jax {jax.__version__}", title_justify="left")
        columns = ("case", "cache MiB", "VMEM KiB", "temporary KiB", "copies")
        columns += ("step: temporary KiB", "copies", "not in place KiB")
        for name in columns:
            table.add_column(name, justify="left" if name == "case" else "right")
        for name, case in CASES.items():
            try:
                program, size, vmem = attend(device, case)
                row = [f"{size / 2**20:.0f}", f"{vmem / 2**10:.0f}", *needs(program, case)]
                well = row[3] == "0" and program.memory_analysis().temp_size_in_bytes <= size / 4
                if case.new == 1 and not case.mass:
                    program = append(device, case)
                    moved = size - program.memory_analysis().alias_size_in_bytes
                    row += [*needs(program, case), f"{max(moved, 0) / 2**10:.0f}"]
                    well &= row[5] == "0" and program.memory_analysis().temp_size_in_bytes <= size / 3 and moved <= 0
            except Exception as error:  # whatever the compiler says is the answer
                well, row = False, ["", "", "", f"failed: {str(error).splitlines()[0][:60]}"]
            failures += not well
            table.add_row(name if well else f"{name} (!)", *row)
        console.print(table)
    for target in (t for t in args.targets if t in tpu_bundles.TARGETS):
        failures += not print_bundles(console, target)
    for target in (t for t in args.targets if t in GPUS):
        failures += not print_gpu(console, target)
    console.print("all well" if not failures else f"{failures} failed")
    return failures > 0


if __name__ == "__main__":
    sys.exit(main())
