"""Compiles the TPU kernel for real TPUs on a machine without any, and prints what each program needs.

    make kernels-aot
    python benchmarks/kernels_aot.py --targets v5e v6e tpu7x

Columns: bytes of the cache, temporary bytes of the compiled program, cache-sized copies in its text. Ends with status 1
if a program does not compile, needs temporary memory of the cache's size, or copies it. Needs `libtpu`.
"""

import argparse
import dataclasses
import os
import re
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from rich.console import Console
from rich.table import Table

import kvattn
from kvattn.cache import Layout
from kvattn.masks import Mask
from kvattn.pallas import tpu_decode
from kvattn.request import Request

CAUSAL = Mask()
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
    "GQA 32/8, pages of 64, Int8": Case(page_size=64, codec=kvattn.Int8()),
    "GQA 32/8, float32": Case(dtype=jnp.float32),
    "GQA 32/8, 4 tokens, window, sinks": Case(new=4, mask=Mask(window=1000, num_sinks=4)),
    "GQA 32/8, mass": Case(mass=True),
    "GQA 64/8": Case(heads=64),
    "MHA 32/32": Case(kv_heads=32),
    "MQA 71/1": Case(heads=71, kv_heads=1),
    "heads of 256": Case(size=256),
    "1000 slots": Case(slots=1000),
}


def compiled(device: Any, case: Case) -> tuple[Any, int]:
    """The compiled program and the bytes of its cache."""
    batch, heads, kv_heads, size, slots = case.batch, case.heads, case.kv_heads, case.size, case.slots
    codec, page_size, new = case.codec, case.page_size, case.new
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

    def step(query, cache):
        positions = cache.lengths[:, None] - new + jnp.arange(new, dtype=jnp.int32)[None]
        request = Request(query, positions, cache.view(), None, mask=case.mask, scale=size**-0.5, want_mass=case.mass)
        reason = tpu_decode.unsupported(request)
        if reason is not None:
            raise kvattn.errors.UnsupportedError(reason)
        return tpu_decode.attend(request)

    cache = jax.tree.map(on_device, jax.eval_shape(make))
    query = jax.ShapeDtypeStruct((batch, new, heads, size), case.dtype, sharding=sharding)
    with jax.sharding.use_abstract_mesh(sharding.mesh.abstract_mesh):
        return jax.jit(step).lower(query, cache).compile(), cache.nbytes


def large_copies(text: str, count: int) -> int:
    """Copies, transposes, converts and gathers of at least `count` numbers in the text of a program."""
    found = re.findall(r"= \w+\[([\d,]*)\]\S* (?:copy|transpose|convert|gather)\(", text)
    return sum(int(np.prod([int(n) for n in shape.split(",") if n] or [1])) >= count for shape in found)


def main() -> int:
    """Compiles all, prints, says whether all is well."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", default=list(TOPOLOGIES), choices=list(TOPOLOGIES))
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost"}
    os.environ |= {"TPU_ACCELERATOR_TYPE": "v5litepod-4", "TPU_STDERR_LOG_LEVEL": "3"}
    console, failures = Console(highlight=False, width=110), 0
    for target in args.targets:
        device = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[target]).devices[0]
        table = Table(title=f"{target}, jax {jax.__version__}", title_justify="left")
        for name in ("case", "cache MiB", "temporary KiB", "copies"):
            table.add_column(name, justify="left" if name == "case" else "right")
        for name, case in CASES.items():
            try:
                program, size = compiled(device, case)
            except Exception as error:  # whatever the compiler says is the answer
                failures += 1
                table.add_row(name, "", "", f"failed: {str(error).splitlines()[0][:60]}")
                continue
            temporary = program.memory_analysis().temp_size_in_bytes
            numbers = case.batch * case.kv_heads * case.slots * case.size
            copies = large_copies(program.as_text(), numbers // 2)
            failures += copies > 0 or temporary > size / 4
            table.add_row(name, f"{size / 2**20:.0f}", f"{temporary / 2**10:.0f}", str(copies))
        console.print(table)
    console.print("all well" if not failures else f"{failures} failed")
    return failures > 0


if __name__ == "__main__":
    sys.exit(main())
