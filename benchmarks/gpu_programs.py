"""Compiles the GPU kernels for a GPU that is not there and prints what each program needs, as JSON.

    python benchmarks/gpu_programs.py h200

`kernels_aot.py` runs it, once per target: what the assembler says of registers goes to the standard output of the
process. Needs the CUDA plugin of this version of JAX and NVIDIA's assembler, which `make kernels-aot` installs.
"""

import json
import os
import re
import sys
import tempfile
from collections.abc import Callable
from typing import Any

os.environ |= {"JAX_PLATFORMS": "cpu", "MOSAIC_GPU_DUMP_PTXAS": "1", "MOSAIC_GPU_DUMP_SASS": "1"}

import aot_cases
import gpu_slots
import jax
import jax.numpy as jnp
from aot_cases import Case
from jax.experimental import topologies

import kvattn
from kvattn.attend import api
from kvattn.masks import Mask
from kvattn.pallas import gpu_decode, gpu_spec, gpu_ways

SHEET = """gpu_device_info {{ threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
shared_memory_per_core: {core} threads_per_core_limit: {threads} core_count: {cores} fpus_per_core: 128
block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: {bandwidth}
l2_cache_size: {l2} clock_rate_ghz: {clock} device_memory_size: {memory} shared_memory_per_block_optin: {block}
cuda_compute_capability {{ major: {major} minor: {minor} }} registers_per_core_limit: 65536
registers_per_block_limit: 65536 }}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 }} device_description_str: "{name}" """
TARGETS: dict[str, dict[str, Any]] = {
    "a100": {
        "name": "NVIDIA A100-SXM4-80GB",
        "major": 8,
        "minor": 0,
        "block": 166_912,
        "core": 167_936,
        "threads": 2048,
        "cores": 108,
        "bandwidth": 2_039_000_000_000,
        "l2": 41_943_040,
        "clock": 1.41,
        "memory": 80_000_000_000,
    },
    "l4": {
        "name": "NVIDIA L4",
        "major": 8,
        "minor": 9,
        "block": 101_376,
        "core": 102_400,
        "threads": 1536,
        "cores": 58,
        "bandwidth": 300_000_000_000,
        "l2": 50_331_648,
        "clock": 2.04,
        "memory": 24_000_000_000,
    },
    "h200": {
        "name": "NVIDIA H200",
        "major": 9,
        "minor": 0,
        "block": 232_448,
        "core": 233_472,
        "threads": 2048,
        "cores": 132,
        "bandwidth": 4_800_000_000_000,
        "l2": 52_428_800,
        "clock": 1.98,
        "memory": 141_000_000_000,
    },
    "b200": {
        "name": "NVIDIA B200",
        "major": 10,
        "minor": 0,
        "block": 232_448,
        "core": 233_472,
        "threads": 2048,
        "cores": 148,
        "bandwidth": 8_000_000_000_000,
        "l2": 132_644_864,
        "clock": 1.97,
        "memory": 180_000_000_000,
    },
}
"""What the compiler asks about a device."""

F32 = jnp.float32
MOST_LAUNCHES, MORE_TO_APPEND, BY_XLA = 2, 1, 22
"""Of attention: itself and the merge. Of a step: the append besides; and all, where XLA appends (before Hopper)."""
MORE_TOKENS = 2
"""Of several tokens: their positions and queries are laid out. Not counted where XLA asks some of them once more."""
RING = kvattn.SlidingWindow(1024)
CASES = {
    "GQA 32/8": Case(),
    "GQA 32/8, pages of 16": Case(page_size=16),
    "GQA 32/8, pages of 64": Case(page_size=64),
    "GQA 32/8, pages of 256": Case(page_size=256),
    "GQA 32/8, Int8": Case(codec=kvattn.Int8()),
    "GQA 32/8, Int8, pages of 32": Case(codec=kvattn.Int8(), page_size=32),
    "GQA 32/8, Float8": Case(codec=kvattn.Float8()),
    "GQA 32/8, Int4(64)": Case(codec=kvattn.Int4(64)),
    "GQA 32/8, Int4(64), pages of 64": Case(codec=kvattn.Int4(64), page_size=64),
    "GQA 32/8, Int4(32)": Case(codec=kvattn.Int4(32)),
    "GQA 32/8, float16": Case(dtype=jnp.float16),
    "GQA 32/8, float32 queries": Case(query=F32),
    "GQA 32/8, float32 queries, Int8": Case(query=F32, codec=kvattn.Int8()),
    "GQA 32/8, float32 queries, Float8": Case(query=F32, codec=kvattn.Float8()),
    "GQA 32/8, float32 queries, Int4(64)": Case(query=F32, codec=kvattn.Int4(64)),
    "GQA 32/8, float32 queries, 3 tokens": Case(query=F32, new=3),
    "GQA 32/8, float32 queries, float16": Case(query=F32, dtype=jnp.float16),
    "GQA 32/8, Int8, 4 tokens": Case(codec=kvattn.Int8(), new=4),
    "GQA 32/8, 4 tokens, window, sinks": Case(new=4, mask=Mask(window=1000, num_sinks=4)),
    "GQA 32/8, 8 tokens": Case(new=8),
    "GQA 32/8, 4 tokens": Case(new=4),
    "GQA 32/8, softcap": Case(softcap=50.0),
    "GQA 32/8, mass": Case(mass=True),
    "GQA 32/8, one row of 1024": Case(batch=1, slots=1024),
    "GQA 32/8, one row of 1024, Int8": Case(batch=1, slots=1024, codec=kvattn.Int8()),
    "GQA 32/8, 32 rows": Case(batch=32),
    "GQA 32/8, 32 rows, pages of 16": Case(batch=32, page_size=16),
    "GQA 32/8, a ring of 1024": Case(slots=1024, policy=RING),
    "GQA 32/8, a ring of 1024, Int8": Case(slots=1024, policy=RING, codec=kvattn.Int8()),
    "GQA 32/8, a ring of 1024, pages of 64": Case(slots=1024, policy=RING, page_size=64),
    "GQA 32/8, one row, a ring of 1024": Case(batch=1, slots=1024, policy=RING),
    "GQA 32/8, one row of 1024, pages of 16": Case(batch=1, slots=1024, page_size=16),
    "MHA 32/32": Case(kv_heads=32),
    "MQA 71/1 of 64": Case(heads=71, kv_heads=1, size=64),
    "MQA 71/1 of 128": Case(heads=71, kv_heads=1),
    "heads of 64": Case(size=64),
    "heads of 80": Case(size=80),
    "heads of 80, Int8": Case(size=80, codec=kvattn.Int8()),
    "heads of 80, pages of 16": Case(size=80, page_size=16),
    "heads of 96": Case(size=96),
    "heads of 96, Int4(16)": Case(size=96, codec=kvattn.Int4(16)),
    "heads of 112": Case(size=112),
    "heads of 256": Case(size=256),
    "heads of 256, Int8": Case(size=256, codec=kvattn.Int8()),
    "1000 slots": Case(slots=1000),
    "pool of 2^31 numbers and more": Case(page_size=64, slots=65536, batch=33),
}


def caught(work: Callable[[], Any]) -> tuple[Any, str]:
    """What `work` returns, and what it, or a library it calls, writes to the standard outputs."""
    sys.stdout.flush()
    sys.stderr.flush()
    with tempfile.TemporaryFile() as file:
        saved = [os.dup(n) for n in (1, 2)]
        try:
            for n in (1, 2):
                os.dup2(file.fileno(), n)
            result = work()
        finally:
            for n, old in zip((1, 2), saved, strict=True):
                os.dup2(old, n)
                os.close(old)
        file.seek(0)
        return result, file.read().decode(errors="replace")


def program(device: Any, case: Case) -> dict[str, Any]:
    """Registers, spills, shared and temporary memory, cache-sized copies, instructions of the programs of a case."""
    request, cache = aot_cases.request(device, case, gpu_decode.unsupported)
    sizes = {}

    def attend(request):
        spec = gpu_decode._spec(request, gpu_decode.config_for(request))
        sizes.update(stages=spec.config.stages, blocks=spec.config.blocks_per_sm, shared=gpu_spec.shared_bytes(spec))
        sizes.update(states=4 * spec.programs * spec.padded * spec.cols)
        sizes.update(tile=spec.config.tile * sum(x.features * x.dtype.itemsize for x in spec.streams))
        keys, values = spec.config.tile * spec.key_features, spec.padded * spec.config.tile
        sizes.update(usual=(keys + values) / (keys + values + spec.looks * values))
        sizes.update(counted=spec.in_order and spec.hides)
        return api.attend(request, "mosaic_gpu")

    def compile_it():
        with aot_cases.aimed_at(device):
            return jax.jit(attend).lower(request).compile()

    def compile_step():
        return aot_cases.append(device, case, "mosaic_gpu")

    compiled, said = caught(compile_it)
    kernels = {}
    for entry in re.split(r"Compiling entry function '", said)[1:]:
        name = "decode" if entry.startswith("kvattn_gpu_decode") else "merge"
        registers = re.search(r"Used (\d+) registers", entry)
        spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", entry)
        if registers is None or spills is None:
            raise RuntimeError("the assembler did not say how many registers there are")
        kernels[name] = (int(registers[1]), int(spills[1]) + int(spills[2]))
    if "decode" not in kernels:
        raise RuntimeError("the assembler said nothing of the kernel")
    temporary, copies = aot_cases.needs(compiled, case)
    found = {"bytes": cache.nbytes, "kernels": kernels, "temporary": temporary, "copies": copies, **sizes}
    listed = said.split("Function properties for kvattn_gpu_decode", 1)[1].split("Function properties for")[0]
    found["slots"] = gpu_slots.slots_of_a_tile(listed, found.pop("usual"))
    found["launches"] = aot_cases.launches(compiled.as_text())
    with aot_cases.aimed_at(device):
        by_threads = gpu_ways.by_threads()
    # Without the copy engine XLA cuts off what the merge pads.
    most = MOST_LAUNCHES + (by_threads and case.size % 64 > 0) + (MORE_TOKENS if case.new > 1 else 0)
    found["most"] = most if found.pop("counted") else None
    if case.new == 1 and not case.mass and case.query is None:
        step, _ = caught(compile_step)
        temporary, copies = aot_cases.needs(step, case)
        moved = cache.nbytes - step.memory_analysis().alias_size_in_bytes
        launches = aot_cases.launches(step.as_text())
        found["step"] = {"temporary": temporary, "copies": copies, "moved": moved, "launches": launches}
        found["step"]["most"] = BY_XLA if by_threads else most + MORE_TO_APPEND
    return found


def main() -> None:
    """Prints one line of JSON per case."""
    target = TARGETS[sys.argv[1]]
    per_clock = target["bandwidth"] / target["cores"] / target["clock"] / 1e9
    topology = topologies.get_topology_desc(
        platform="cuda", topology_name=sys.argv[1], target_config=SHEET.format(**target), topology="1x1x1"
    )
    for name, case in CASES.items():
        try:
            result = program(topology.devices[0], case)
            result["clocks"] = result["tile"] / per_clock
        except kvattn.errors.UnsupportedError as error:
            result = {"refused": str(error)}
        except Exception as error:  # whatever the compiler says is the answer
            result = {"failed": (str(error).strip() or repr(error)).splitlines()[0]}
        print(json.dumps({"case": name, **result}), flush=True)


if __name__ == "__main__":
    main()
