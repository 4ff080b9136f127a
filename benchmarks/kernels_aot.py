"""Compiles the kernels for real TPUs and GPUs on a machine without any, and prints what each program needs.

    make kernels-aot
    python benchmarks/kernels_aot.py --targets v5e v6e tpu7x h200

TPUs: first two programs of each case: the kernel over a cache that is an argument, and the step of
`kvattn.cached_attention`, which writes a token into a donated cache. Columns: vector memory of the kernel, temporary
memory, cache-sized copies, serial loops, and of a donated cache what is not updated in place. Then the instructions of
a tile (`tpu_bundles.py`). Ends with status 1 if a program does not compile, needs temporary memory of the cache's size,
copies it or loops, if a schedule cannot be read, or if a kernel that should be bound by memory is not. Needs `libtpu`.

A third program is the step of `"xla"` over a cache in the host's memory (`memory_kind="pinned_host"`): the host has the
cache, in place, and the device a few blocks.

GPUs (`gpu_programs.py`): registers of both kernels, spills, shared memory, programs per multiprocessor x tiles in
flight, instructions of a tile (`gpu_slots.py`) beside the clocks of its copy, kernels launched, and the same of the
step; what is refused says why. The first program is attention alone, with positions and counts as arguments. Status 1
for a spill too, for programs that do not fit a multiprocessor together, for a loop that is long beside its copy, and
for attention or a step that starts more kernels than it should.
"""

import argparse
import json
import pathlib
import subprocess
import sys

import aot_cases
import jax
import tpu_bundles
from rich.console import Console
from rich.table import Table

from kvattn.cache.base import nbytes_of

GPUS = ("a100", "l4", "h200", "b200")
MOST_SLOTS = {"GQA 32/8": 0.6}
MOST_ON_HOPPER = {
    "GQA 32/8": 0.2,
    "GQA 32/8, pages of 16": 0.2,
    "GQA 32/8, Int8": 0.6,
    "GQA 32/8, Float8": 0.6,
    "GQA 32/8, Int4(64)": 0.9,
    "MQA 71/1 of 64": 0.9,
}
"""Instructions of a tile as a share of the clocks of its copy: below 1 memory can bound it."""


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
    columns = ("case", "cache MiB", "registers", "merge", "spills", "shared KiB", "in flight", "slots", "copy")
    columns += ("temporary KiB", "copies", "launches", "step: KiB", "copies", "moved KiB", "launches")
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
        # Programs that share a multiprocessor have 65536 registers together, each of 128 threads a multiple of 8.
        room = -(-kernels["decode"][0] // 8) * 8 * 128 * result["blocks"] <= 65536
        fine = spills == 0 and room and result["copies"] == "0" and temporary <= result["bytes"] / 4
        slots, clocks = result["slots"], result["clocks"]
        limits = MOST_ON_HOPPER if target == "h200" else MOST_SLOTS
        fine &= name not in limits or slots <= limits[name] * clocks
        fine &= result["most"] is None or result["launches"] <= result["most"]
        step = result.get("step", {})
        fine &= not step or (step["copies"] == "0" and step["moved"] <= 0 and step["launches"] <= step["most"])
        well &= fine
        # A merge of the same shape is compiled once.
        registers = (str(kernels["decode"][0]), str(kernels["merge"][0]) if "merge" in kernels else "")
        flight = f"{result['blocks']} x {result['stages']}"
        figures = (str(spills), f"{result['shared'] / 2**10:.0f}", flight, str(slots), f"{clocks:,.0f}")
        figures += (result["temporary"], result["copies"], str(result["launches"]))
        if step:
            figures += (step["temporary"], step["copies"], f"{max(step['moved'], 0) / 2**10:.0f}")
            figures += (str(step["launches"]),)
        table.add_row(name if fine else f"{name} (!)", f"{result['bytes'] / 2**20:.0f}", *registers, *figures)
    well &= child.wait() == 0 and (table.row_count > 0 or bool(refused))
    if table.row_count:
        console.print(table)
    for reason, names in refused.items():
        console.print(f"{target}: {len(names)} cases refused: {reason}")
    return well


def print_tpu(console: Console, target: str) -> int:
    """Prints what the programs of every case need on a TPU, and returns how many are not well."""
    device, failures = aot_cases.first_device(target), 0
    table = Table(title=f"{target}, jax {jax.__version__}", title_justify="left")
    columns = ("case", "cache MiB", "VMEM KiB", "temporary KiB", "copies")
    columns += ("loops", "step: temporary KiB", "copies", "not in place KiB", "loops")
    for name in columns:
        table.add_column(name, justify="left" if name == "case" else "right")
    for name, case in aot_cases.CASES.items():
        try:
            program, size, vmem = aot_cases.attend(device, case)
            row = [f"{size / 2**20:.0f}", f"{vmem / 2**10:.0f}", *aot_cases.needs(program, case)]
            row.append(str(aot_cases.loops(program.as_text())))
            well = row[3] == row[4] == "0" and program.memory_analysis().temp_size_in_bytes <= size / 4
            if case.new == 1 and not case.mass:
                program = aot_cases.append(device, case)
                moved = size - program.memory_analysis().alias_size_in_bytes
                row += [*aot_cases.needs(program, case), f"{max(moved, 0) / 2**10:.0f}"]
                row.append(str(aot_cases.loops(program.as_text())))
                well &= (
                    row[6] == row[8] == "0" and program.memory_analysis().temp_size_in_bytes <= size / 3 and moved <= 0
                )
        except Exception as error:  # whatever the compiler says is the answer
            well, row = False, ["", "", "", f"failed: {str(error).splitlines()[0][:60]}"]
        failures += not well
        table.add_row(name if well else f"{name} (!)", *row)
    console.print(table)
    return failures


def print_host(console: Console, target: str) -> int:
    """Prints what steps over caches in the host's memory need of a TPU, and returns how many are not well.

    Well: the host has the cache, updated in place, and what the device needs is a few blocks, whatever the capacity.
    """
    device, failures = aot_cases.first_device(target), 0
    table = Table(title=f"{target}: keys and values on the host", title_justify="left")
    for name in ("case", "cache MiB", "block MiB", "host MiB", "not in place KiB", "device: temporary MiB"):
        table.add_column(name, justify="left" if name == "case" else "right")
    for name, case in aot_cases.ON_HOST.items():
        try:
            cache = aot_cases.arguments(device, case)[2]
            needed = aot_cases.append(device, case, "xla").memory_analysis()
            stored = sum(nbytes_of(x) for x in jax.tree.leaves((cache.keys, cache.values)))
            block, moved = stored / cache.layout.num_blocks, stored - needed.host_alias_size_in_bytes
            numbers = case.batch * case.kv_heads * cache.layout.rows * case.size
            read = max(block, 2 * 2 * numbers)  # codes are widened, block by block
            temporary, scores = needed.temp_size_in_bytes, 4 * case.batch * case.heads * case.new * cache.layout.rows
            well = moved <= 0 and needed.host_argument_size_in_bytes >= stored and needed.host_temp_size_in_bytes == 0
            well &= temporary <= 3 * read + 3 * scores
            figures = (stored, block, needed.host_argument_size_in_bytes)
            row = [f"{size / 2**20:.0f}" for size in figures] + [f"{max(moved, 0) / 2**10:.0f}"]
            row.append(f"{temporary / 2**20:.1f}")
        except Exception as error:  # whatever the compiler says is the answer
            well, row = False, ["", "", "", "", f"failed: {str(error).splitlines()[0][:60]}"]
        failures += not well
        table.add_row(name if well else f"{name} (!)", *row)
    console.print(table)
    return failures


def main() -> int:
    """Compiles all, prints, says whether all is well."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    targets = (*aot_cases.TOPOLOGIES, *GPUS)
    parser.add_argument("--targets", nargs="+", default=targets, choices=targets)
    args = parser.parse_args()
    console, failures = Console(highlight=False, width=170), 0
    for target in (t for t in args.targets if t in aot_cases.TOPOLOGIES):
        failures += print_tpu(console, target)
        failures += print_host(console, target)
    for target in (t for t in args.targets if t in tpu_bundles.TARGETS):
        failures += not print_bundles(console, target)
    for target in (t for t in args.targets if t in GPUS):
        failures += not print_gpu(console, target)
    console.print("all well" if not failures else f"{failures} failed")
    return failures > 0


if __name__ == "__main__":
    sys.exit(main())
