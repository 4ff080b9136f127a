"""How many instruction bundles a TPU kernel issues for a tile of the cache, from the final schedule, without a TPU.

`libtpu` writes the schedule of what it compiles to text if told so before it loads; so each target gets a process of
its own (``python benchmarks/tpu_bundles.py v5e`` prints JSON; `kernels_aot.py` starts it and prints a table). A bundle
takes a cycle at least, so a kernel that issues fewer bundles for a tile than the copy of the tile takes cycles is bound
by memory; stalls are not counted.
"""

import dataclasses
import itertools
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from typing import Any

TARGETS = {"v5e": (819e9, 1.5e9), "v6e": (1640e9, 1.75e9)}
"""Bytes and cycles per second. The clock follows from the published peak: 4 units of 128^2 (256^2) products a cycle."""
BOUND_BY_MEMORY = (
    "GQA 32/8",
    "GQA 32/8, pages of 64",
    "GQA 32/8, pages of 16",
    "GQA 32/8, Int8",
    "GQA 32/8, pages of 64, Int8",
    "GQA 32/8, Float8",
    "MHA 32/32",
    "heads of 64",
    "heads of 64, pages of 16",
    "heads of 80",
)
"""Cases that must need fewer bundles than their copy takes cycles."""
OURS = (*BOUND_BY_MEMORY, "GQA 32/8, Int4(64)", "MQA 71/1")
JAXS = {"JAX's paged_attention, pages of 16": 16, "JAX's paged_attention, pages of 64": 64}
JAX_TOKENS = 512


class UnreadableError(Exception):
    """A schedule that does not look as expected."""


def well(target: str, results: dict[str, dict[str, float]]) -> dict[str, bool]:
    """Of each case of ours, whether it needs no more per byte than JAX's kernel does, nor than the copy takes."""
    bandwidth, clock = TARGETS[target]
    density = lambda name: results[name]["bundles"] / results[name]["bytes"]
    most = min(clock / bandwidth, *(density(name) for name in JAXS))
    return {name: name not in BOUND_BY_MEMORY or density(name) <= most for name in OURS}


@dataclasses.dataclass(frozen=True)
class Bundle:
    """One line of a schedule.

    Attributes:
        at: its number.
        opens_loop: whether a loop starts here.
        depth: loops around it.
        text: its instructions.
    """

    at: int
    opens_loop: bool
    depth: int
    text: str


@dataclasses.dataclass(frozen=True)
class Skip:
    """A branch forward over bundles.

    Attributes:
        at: where the branch is.
        to: where it goes.
        size: bundles left out when it is taken.
        condition: the comparison it hangs on.
        products: matrix products left out.
        copies: copies from device memory left out.
    """

    at: int
    to: int
    size: int
    condition: str
    products: int
    copies: int


def read(text: str) -> list[Bundle]:
    """The bundles of a `final_bundles.txt`."""
    bundles: list[Bundle] = []
    for line in text.splitlines():
        found = re.match(r"\s*(0x[0-9a-f]+|\d+)\s*([A-Z]{2})?\s*:\s?(>*)\s*(.*)$", line)
        if found and found[4].startswith("{}") and bundles:
            # Empty ones do not tell their depth.
            bundles.append(Bundle(int(found[1], 0), False, bundles[-1].depth, found[4]))
        elif found:
            bundles.append(Bundle(int(found[1], 0), found[2] == "LB", len(found[3]), found[4]))
        elif bundles:
            bundles[-1] = dataclasses.replace(bundles[-1], text=f"{bundles[-1].text} {line}")
    if not bundles or [b.at for b in bundles] != list(range(len(bundles))):
        raise UnreadableError("the bundles are not numbered from 0")
    return bundles


def loop(bundles: list[Bundle], start: int) -> list[Bundle]:
    """The bundles of the loop that opens at `start`."""
    depth = bundles[start].depth
    stop = next((b.at for b in bundles[start:] if b.depth < depth), len(bundles))
    return bundles[start:stop]


def skips(bundles: list[Bundle], inside: list[Bundle]) -> list[Skip]:
    """The branches forward of a loop's own level, in order."""
    regions: dict[str, int] = {}
    for bundle in bundles:
        for number in re.findall(r"Start(?:/End empty)? region (\d+)", bundle.text):
            regions.setdefault(number, bundle.at)
    found = []
    for bundle in inside:
        branch = re.search(r"sbr\.rel \(!?%(\w+)\) target = \$region(\d+)", bundle.text)
        to = regions.get(branch[2], -1) if branch else -1
        if not branch or to <= bundle.at or bundle.depth != inside[0].depth:
            continue
        # The bundles right behind a branch are issued anyhow; a region ends with them.
        slot = next((i for i in range(bundle.at, to) if "End region" in bundles[i].text), bundle.at)
        condition = [re.search(rf"%{branch[1]} = ([^;}}]*)", b.text) for b in bundles[: bundle.at + 1]]
        left_out = bundles[slot + 1 : to]
        found.append(
            Skip(
                bundle.at,
                to,
                len(left_out),
                next((c[1] for c in reversed(condition) if c), ""),
                _count(left_out, "vmatmul"),
                _count(left_out, "dma.hbm_to_vmem"),
            )
        )
    return found


def _count(bundles: list[Bundle], name: str) -> int:
    return sum(bundle.text.count(name) for bundle in bundles)


def ours(text: str) -> int:
    """Bundles of a turn of our kernel's loop for a tile, neither first nor last of its row, that is whole as the next.

    What such a turn passes over, in order: what the first turn fetches for itself; of the fetching of the next tile the
    loop over parts of one that is not whole; the start of a row; the same loop where it waits; attention with empty
    slots; the end of a row.
    """
    bundles = read(text)
    body = loop(bundles, next(b.at for b in bundles if b.opens_loop))
    whole, masked = _attention(skips(bundles, body))
    around = [s for s in skips(bundles, body) if not s.at <= whole.at < s.to]
    inside = lambda s, outer: outer.at < s.at and s.to <= outer.to
    top = [s for s in around if not any(inside(s, outer) for outer in around)]
    before, after = [s for s in top if s.to <= whole.at], [s for s in top if s.at >= masked.to]
    fetching = [s for s in before if s.copies]
    if len(fetching) not in (0, 2) or before[: len(fetching)] != fetching or len(before) > 4 or len(after) != 1:
        raise UnreadableError("other branches than the kernel has")
    # Without branches where there is only one part: what is not to be done is issued all the same.
    passed = [fetching[0], [s for s in around if inside(s, fetching[1])][-1]] if fetching else []
    passed += [*before[len(fetching) :], masked, *after]
    return len(body) - sum(s.size for s in passed)


def _attention(found: list[Skip]) -> tuple[Skip, Skip]:
    """The branches past attention if `whole` is not 1, and if it is not 0."""
    for whole, masked in itertools.pairwise(found):
        if (
            re.match(r"scmp\.ne\.s32\.totalorder %\w+, 1\b", whole.condition)
            and re.match(r"scmp\.ne\.s32\.totalorder %\w+, 0\b", masked.condition)
            and whole.products > 0 < masked.products
            and whole.to <= masked.at
        ):
            return whole, masked
    raise UnreadableError("no branches over a whole tile and a masked one")


def jaxs(text: str) -> int:
    """Bundles of a turn of the innermost loop of JAX's kernel; of its two places that fetch a block the shorter one."""
    bundles = read(text)
    bodies = [loop(bundles, b.at) for b in bundles if b.opens_loop]
    bodies = [body for body in bodies if _count(body, "vmatmul")]
    if not bodies:
        raise UnreadableError("no loop with matrix products")
    body = min(bodies, key=len)
    fetches = [s.size for s in skips(bundles, body) if s.copies and not s.products]
    if len(fetches) != 2:
        raise UnreadableError(f"{len(fetches)} places that fetch a block where there are two")
    return len(body) - max(fetches)


def measured(target: str) -> dict[str, dict[str, float]]:
    """Bundles and bytes of a tile by case, from a process of its own.

    Raises:
        UnreadableError: the process failed, or a schedule could not be read.
    """
    done = subprocess.run([sys.executable, __file__, target], capture_output=True, text=True, check=False)
    if done.returncode:
        raise UnreadableError(done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "no word")
    return json.loads(done.stdout.splitlines()[-1])


def _jaxs_program(device: Any, page_size: int) -> None:
    """Compiles JAX's kernel for the shape of "GQA 32/8"."""
    import aot_cases
    import jax
    import jax.numpy as jnp
    from jax.experimental.pallas.ops.tpu.paged_attention import paged_attention

    case = dataclasses.replace(aot_cases.CASES["GQA 32/8"], page_size=page_size)
    query, _, cache = aot_cases.arguments(device, case)

    def call(query, keys, values, lengths, table):
        pages = JAX_TOKENS // page_size
        return paged_attention(query, keys, values, lengths, table, pages_per_compute_block=pages)

    query = jax.ShapeDtypeStruct((case.batch, case.heads, case.size), jnp.bfloat16, sharding=query.sharding)
    with jax.sharding.use_abstract_mesh(query.sharding.mesh.abstract_mesh):
        jax.jit(call).lower(query, cache.keys["data"], cache.values["data"], cache.lengths, cache.page_table).compile()


def main(target: str, folder: pathlib.Path) -> dict[str, dict[str, float]]:
    """Compiles every case and reads its schedule."""
    import aot_cases

    device = aot_cases.first_device(target)
    results = {}

    def last(name: str) -> str:
        (path,) = folder.glob(f"*-{name}*-final_bundles.txt")
        text = path.read_text()
        for old in folder.iterdir():
            old.unlink()
        return text

    for name in OURS:
        case = aot_cases.CASES[name]
        _, size, _ = aot_cases.attend(device, case)
        tile = size / case.batch / case.slots * aot_cases.tile_rows(device, case)
        results[name] = {"bundles": ours(last("kvattn_tpu_decode")), "bytes": tile}
    for name, page_size in JAXS.items():
        _jaxs_program(device, page_size)
        results[name] = {"bundles": jaxs(last("paged_attention")), "bytes": JAX_TOKENS * 128 * 2 * 2}
    return results


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        os.environ["LIBTPU_INIT_ARGS"] = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
        # The process that started this one may hold the library.
        os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
        print(json.dumps(main(sys.argv[1], pathlib.Path(folder))))
