"""What it costs to split a cache by heads, by batch or by sequence, as the batch and the sequences grow.

    python examples/sharding_experiments.py                         # about a quarter of an hour on two cores
    python examples/sharding_experiments.py --model llama-3-8b --batches 8 --lengths 4096 --mesh 2,4 --no-save
    python examples/sharding_experiments.py --heads 32 --kv-heads 2 --head-dim 64 --model-dim 2048

One decode step of one attention layer with its projections, per scheme, batch and length:

bytes per device   the cache's, by formula and as the compiled program has them; its temporary memory
collectives        what the compiled program exchanges: kind, how often, bytes of the results on one device
step time          median over eight CPU devices, caches donated, schemes in turns. The devices share the cores of this
                   machine, so times compare schemes only roughly.
TPU                the same program compiled for a topology with no TPU present, with the kernel a TPU takes: memory,
                   collectives, and XLA's own cost analysis, which does not see inside kernels. Needs `libtpu`.

A cache that is too large for the CPU is timed with a length divided by a power of two, which the table states; memory
and collectives are of the full one. Then the longest contexts of PaLM 540B on 64 TPUs (Pope et al., arXiv:2211.05102,
table 1) by `kvattn.memory.plan`. Writes benchmarks/results/sharding_experiments.json and .png.
"""

import argparse
import collections
import contextlib
import dataclasses
import datetime
import importlib.util
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

import kvattn
from kvattn import sharding
from kvattn.layers import GroupedQueryAttention, stateless
from kvattn.memory import MODELS, plan

NUM_DEVICES = 8
RESULTS = Path(__file__).parent.parent / "benchmarks" / "results" / "sharding_experiments.json"
PRESETS = ("llama-3-8b", "qwen3-30b-a3b", "falcon-7b")
"""Eight, four and one key/value heads: by heads, on eight devices, as they are, each twice, and not at all."""
SCHEMES = tuple(sharding.explain(num_heads=8, num_kv_heads=8, batch_size=8, axis_size=8).reasons)
"""The ways to split a cache that `sharding.choose` chooses from."""
LIBTPU = {
    "TPU_SKIP_MDS_QUERY": "1",  # this and two more: it should not look for TPUs of this machine
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_STDERR_LOG_LEVEL": "3",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # another process may compile, too: nobody opens a TPU
}
PUBLISHED = {
    "multihead, by heads": (48, 128, "heads", (1320, 330)),
    "multiquery, by heads": (1, 256, "heads", (660, 165)),
    "multiquery, by batch": (1, 256, "batch", (43_000, 10_700)),
}
"""K, H, scheme, and the longest contexts at batches of 128 and 512, of Pope et al., table 1."""


@dataclasses.dataclass(frozen=True)
class Shape:
    """One attention layer: N query and K key/value heads of H, D features."""

    name: str
    heads: int
    kv_heads: int
    head_dim: int
    model_dim: int


@dataclasses.dataclass(frozen=True)
class Target:
    """Devices to compile for.

    Attributes:
        name: "cpu" or "tpu".
        mesh: of "data" and "model".
        implementation: what attends there.
    """

    name: str
    mesh: Mesh
    implementation: Any

    @contextlib.contextmanager
    def compiling(self) -> Iterator[None]:
        """Kernels of another backend than the default one are refused at the call, where they could not run."""
        allowed = kvattn.pallas.ahead_of_time() if self.name == "tpu" else contextlib.nullcontext()
        with allowed, jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh):
            yield


def arguments() -> argparse.Namespace:
    def numbers(text: str) -> tuple[int, ...]:
        return tuple(int(part) for part in text.split(","))

    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument(
        "--model", nargs="+", help=f"one layer of each, names of kvattn.memory.MODELS ({', '.join(PRESETS)})"
    )
    p.add_argument("--heads", type=int, help="query heads of a layer of your own; --model is for others")
    p.add_argument("--kv-heads", type=int, help="its key/value heads (default: as many)")
    p.add_argument("--head-dim", type=int, default=128)
    p.add_argument("--model-dim", type=int, help="its features (default: heads x head-dim)")
    p.add_argument("--batches", type=int, nargs="+", default=[1, 8, 64])
    p.add_argument("--lengths", type=int, nargs="+", default=[1024, 8192, 65536], help="tokens in every row")
    p.add_argument("--mesh", type=numbers, default=(1, NUM_DEVICES), metavar="DATA,MODEL", help="sizes of its axes")
    p.add_argument("--axes", default="explicit", choices=["explicit", "auto"], help="kind of the mesh axes")
    p.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    p.add_argument("--steps", type=int, default=11, help="calls that are timed")
    p.add_argument("--limit", type=int, default=512, metavar="MIB", help="largest cache that is timed as it is")
    p.add_argument("--topology", default="v5e:2x4", help='TPUs to compile for, with as many devices; "" for none')
    p.add_argument("--out", type=Path, default=RESULTS, help="where the figures go, and a picture beside them")
    p.add_argument("--no-save", action="store_true")
    args = p.parse_args()
    if len(args.mesh) != 2 or min(args.mesh) < 1:
        p.error("--mesh is two sizes, such as 1,8 or 2,4")
    if args.heads is None and (args.kv_heads or args.model_dim):
        p.error("--kv-heads and --model-dim belong to --heads")
    if args.heads is not None and args.model:
        p.error("give either --model or --heads")
    if min(*args.batches, *args.lengths, args.steps, args.limit) < 1:
        p.error("batches, lengths, steps and the limit must be at least 1")
    return args


def shapes(args: argparse.Namespace) -> list[Shape]:
    if args.heads is not None:
        kv_heads, model_dim = args.kv_heads or args.heads, args.model_dim or args.heads * args.head_dim
        return [Shape("a layer", args.heads, kv_heads, args.head_dim, model_dim)]
    specs = [MODELS[name] for name in args.model or PRESETS]
    return [Shape(m.name, m.num_heads, m.num_kv_heads, m.head_dim, m.model_dim) for m in specs]


def mesh_of(devices: Any, args: argparse.Namespace, where: str) -> Mesh:
    count = args.mesh[0] * args.mesh[1]
    if len(devices) != count:
        raise SystemExit(
            f"--mesh {args.mesh[0]},{args.mesh[1]} is {count} devices, {where} {len(devices)}. "
            "Give as many as there are, or for TPUs another --topology."
        )
    kind = AxisType.Explicit if args.axes == "explicit" else AxisType.Auto
    return Mesh(np.array(devices).reshape(args.mesh), ("data", "model"), axis_types=(kind, kind))


def targets(args: argparse.Namespace, console: Console) -> list[Target]:
    """The CPU devices, and TPUs that need not be there."""
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        jax.config.update("jax_num_cpu_devices", args.mesh[0] * args.mesh[1])
    jax.config.update("jax_platforms", "cpu")
    found = [Target("cpu", mesh_of(jax.devices("cpu"), args, "here are"), "xla")]
    if args.topology and importlib.util.find_spec("libtpu") is None:
        console.print(f"TPU {args.topology}: skipped, libtpu is not installed (pip install libtpu)")
    elif args.topology:
        for name, value in LIBTPU.items():
            os.environ.setdefault(name, value)
        devices = topologies.get_topology_desc(platform="tpu", topology_name=args.topology).devices
        found.append(Target("tpu", mesh_of(devices, args, f"{args.topology} has"), ("mosaic_tpu", "xla")))
    return found


# One decode step ------------------------------------------------------------------------------------------------------


def why_not(shape: Shape, by: str, batch: int, mesh: Mesh) -> str | None:
    """Why a scheme cannot be; None: it can."""
    rows, left = divmod(batch, mesh.shape["data"])
    if left:
        return f"{batch} rows do not divide over the data axis of {mesh.shape['data']}."
    told = sharding.explain(shape.heads, shape.kv_heads, rows, mesh.shape["model"])
    return told.reasons[by] if told.bytes_per_device[by] is None else None


def empty_cache(shape: Shape, by: str, batch: int, length: int, target: Target, dtype: Any) -> kvattn.KVCache:
    """Shapes of a cache for `length` tokens, each with where it lies."""
    layout = kvattn.cache.Layout.best(length, shape.head_dim * dtype.itemsize, target.name, shape.head_dim)

    def make() -> kvattn.KVCache:
        settings = {"capacity": length, "dtype": dtype, "layout": layout}
        cache = kvattn.KVCache.create(batch, shape.kv_heads, shape.head_dim, **settings)
        return sharding.arrange(cache, target.mesh, by=by)

    cache = jax.eval_shape(make)
    where = sharding.cache_sharding(cache, target.mesh, by=by)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), cache, where)


def decode_step(shape: Shape, by: str, cache: kvattn.KVCache, target: Target, dtype: Any) -> tuple[Any, tuple]:
    """The compiled step of a layer, and the shapes of its weights and input. Nothing is allocated."""

    def make() -> GroupedQueryAttention:
        return GroupedQueryAttention(
            shape.heads,
            shape.model_dim,
            num_kv_heads=shape.kv_heads,
            head_dim=shape.head_dim,
            use_bias=False,
            rope=kvattn.RoPE(shape.head_dim),
            dtype=dtype,
            param_dtype=dtype,
            implementation=target.implementation,
            mesh=target.mesh,
            by=by,
            rngs=nnx.Rngs(0),
        )

    with target.compiling():
        apply, weights = stateless(nnx.eval_shape(make))
        on = lambda size, spec: jax.ShapeDtypeStruct(size, dtype, sharding=NamedSharding(target.mesh, spec))
        weights = [on(w.shape, w.sharding.spec) for w in weights]
        x = on((cache.batch_size, 1, shape.model_dim), P("data"))
        program = jax.jit(apply, donate_argnames="cache").lower(weights, x, cache=cache).compile()
    return program, (weights, x)


def figures(program: Any) -> dict[str, Any]:
    """What a compiled program says about itself, per device."""
    memory, cost = program.memory_analysis(), program.cost_analysis() or {}
    found: dict[str, list[int]] = collections.defaultdict(list)
    for exchange in sharding.collectives(program):
        found[exchange.kind].append(exchange.nbytes)
    seconds = cost.get("optimal_seconds", -1)
    return {
        "cache_bytes": memory.alias_size_in_bytes,  # what is donated and updated in place
        "argument_bytes": memory.argument_size_in_bytes,
        "temp_bytes": memory.temp_size_in_bytes,
        "collectives": [{"kind": kind, "count": len(n), "bytes": sum(n)} for kind, n in sorted(found.items())],
        "flops": cost.get("flops"),
        "bytes_accessed": cost.get("bytes accessed"),
        "optimal_seconds": seconds if seconds > 0 else None,  # negative: XLA cannot tell
    }


class Stepper:
    """A step with arrays to run it on: a cache that lacks one token."""

    def __init__(self, shape: Shape, cache: kvattn.KVCache, length: int, program: Any, given: tuple):
        def filled(x: Any) -> jax.Array:
            draw = lambda: jax.random.normal(jax.random.key(0), x.shape, x.dtype) / shape.model_dim**0.5
            return jax.jit(draw, out_shardings=x.sharding)()

        self.program, self.given = program, jax.tree.map(filled, given)
        where = jax.tree.map(lambda x: x.sharding, cache)
        zeros = lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), cache)
        empty = jax.jit(zeros, out_shardings=where)()
        self.before = jnp.full_like(empty.lengths, length - 1)
        self.cache = empty

    def __call__(self) -> float:
        """Seconds of a step; the token is taken back before the next."""
        cache = self.cache.replace(lengths=self.before + 0)
        jax.block_until_ready(cache)
        start = time.perf_counter()
        y, self.cache = self.program(*self.given, cache=cache)
        jax.block_until_ready((y, self.cache))
        return time.perf_counter() - start


def timed_length(shape: Shape, batch: int, length: int, itemsize: int, limit: int) -> int:
    """The length over the smallest power of two with which the cache takes at most `limit` bytes."""
    while length > 1 and 2 * batch * length * shape.kv_heads * shape.head_dim * itemsize > limit:
        length //= 2
    return length


def measure(shape: Shape, batch: int, length: int, found: list[Target], args: argparse.Namespace, bar: tqdm) -> list:
    """A row per scheme."""
    dtype, cpu = jnp.dtype(args.dtype), found[0]
    short = timed_length(shape, batch, length, dtype.itemsize, args.limit * 2**20)
    rows, steppers = [], {}
    for by in SCHEMES:
        row = {"model": shape.name, "by": by, "batch": batch, "length": length}
        rows.append(row)
        row["reason"] = why_not(shape, by, batch, cpu.mesh)
        if row["reason"] is not None:
            bar.update(len(found))
            continue
        for target in found:
            bar.set_description(f"{shape.name}, {batch} x {length} by {by}, {target.name}")
            cache = empty_cache(shape, by, batch, length, target, dtype)
            program, given = decode_step(shape, by, cache, target, dtype)
            own = sharding.bytes_per_device(cache, target.mesh, by=by)
            row[target.name] = {"bytes_per_device": own, **figures(program)}
            if target is cpu:
                if short != length:
                    cache = empty_cache(shape, by, batch, short, target, dtype)
                    program, given = decode_step(shape, by, cache, target, dtype)
                steppers[by] = Stepper(shape, cache, short, program, given)
            bar.update()
    bar.set_description(f"{shape.name}, {batch} x {short}, steps")
    times: dict[str, list[float]] = {by: [] for by in steppers}
    for i in range(args.steps + 2):
        for by, step in steppers.items():
            seconds = step()
            if i >= 2:
                times[by].append(seconds)
    for row in rows:
        if row["reason"] is None:
            row["cpu"] |= {"seconds": float(np.median(times[row["by"]])), "timed_length": short}
            steppers[row["by"]].cache.check()
    if not rows[0]["batch"] % cpu.mesh.shape["data"]:
        parts = rows[0]["batch"] // cpu.mesh.shape["data"], cpu.mesh.shape["model"]
        best = sharding.choose(shape.heads, shape.kv_heads, *parts)
        for row in rows:
            row["chosen"] = row["by"] == best
    return rows


def longest_contexts() -> list[dict[str, Any]]:
    """PaLM 540B on 64 TPU v4, 30 % of memory for caches, bfloat16: the paper's table, from the planner's formula."""
    rows = []
    for name, (kv_heads, head_dim, by, published) in PUBLISHED.items():
        model = dataclasses.replace(MODELS["palm-540b"], num_kv_heads=kv_heads, head_dim=head_dim)
        for batch, paper in zip((128, 512), published, strict=True):
            p = plan(model, "tpu-v4", batch_size=batch, num_devices=64, by=by, memory_fraction=0.3)
            # A device holds one head of all rows, or all heads of a 64th of the rows.
            share = p.bytes_per_token // (p.num_devices if by == "batch" else kv_heads)
            rows.append(
                {
                    "name": name,
                    "batch": batch,
                    "free_bytes": p.free_bytes,
                    "bytes_per_token": p.bytes_per_token,
                    "bytes_per_token_and_device": share,
                    "context": round(p.max_tokens / batch),
                    "paper": paper,
                }
            )
    return rows


# What comes out -------------------------------------------------------------------------------------------------------


def readable(size: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1000 or unit == "GiB":
            break
        size /= 1024
    return f"{size:.3g} {unit}"


def exchanged(found: list[dict]) -> str:
    return ", ".join(f"{c['count']} {c['kind']}" for c in found) or "none"


def exchanged_bytes(found: list[dict]) -> int:
    return sum(c["bytes"] for c in found)


def new_table(title: str, columns: dict[str, bool]) -> Table:
    """A table; columns by name, with whether they hold numbers."""
    table = Table(title=title, title_justify="left")
    for name, right in columns.items():
        table.add_column(name, justify="right" if right else "left")
    return table


def scheme_tables(report: dict) -> list[Table]:
    """A table per model for CPU devices and one for TPUs."""
    tables = []
    for name in dict.fromkeys(row["model"] for row in report["rows"]):
        rows = [row for row in report["rows"] if row["model"] == name]
        columns = {"batch": True, "length": True, "by (* chosen)": False, "cache/device": True, "compiled": True}
        columns |= {"temporary": True, "collectives": False, "their bytes": True, "step ms": True, "at length": True}
        cpu = new_table(f"{name}: one layer, CPU devices", columns)
        columns = {"batch": True, "length": True, "by": False, "cache/device": True, "compiled": True}
        columns |= {"temporary": True, "collectives": False, "their bytes": True, "Mflop": True, "accessed": True}
        columns |= {"optimal us": True}
        tpu = new_table(
            f"{name}: one layer, compiled for TPU {report['topology']} (kernels not in the last 3)", columns
        )
        for row in rows:
            star = "* " if row.get("chosen") else "  "
            head = (str(row["batch"]), f"{row['length']:,}")
            if row["reason"] is not None:
                reason = row["reason"].split(":")[0].rstrip(".")
                cpu.add_row(*head, star + row["by"], "", "", "", reason)
                tpu.add_row(*head, row["by"], "", "", "", reason)
                continue
            for table, key in ((cpu, "cpu"), (tpu, "tpu")):
                if (found := row.get(key)) is None:
                    continue
                sizes = [readable(found[k]) for k in ("bytes_per_device", "cache_bytes", "temp_bytes")]
                sent = exchanged(found["collectives"]), readable(exchanged_bytes(found["collectives"]))
                if key == "cpu":
                    factor = row["length"] / found["timed_length"]
                    note = "" if factor == 1 else f"{found['timed_length']:,} (1/{factor:g})"
                    table.add_row(*head, star + row["by"], *sizes, *sent, f"{1e3 * found['seconds']:.2f}", note)
                else:
                    best = found["optimal_seconds"]
                    cost = f"{found['flops'] / 1e6:,.0f}", readable(found["bytes_accessed"])
                    table.add_row(*head, row["by"], *sizes, *sent, *cost, "" if best is None else f"{1e6 * best:.1f}")
        tables += [cpu, tpu] if any("tpu" in row for row in rows) else [cpu]
    return tables


def context_table(rows: list[dict]) -> Table:
    columns = {"PaLM 540B, 64 TPU v4": False, "batch": True, "bytes/token": True, "of it on a device": True}
    columns |= {"free on a device": True, "longest context": True, "Pope et al.": True, "difference": True}
    table = new_table("Longest contexts: (free on a device / bytes of a token on a device) / batch", columns)
    for row in rows:
        sizes = f"{row['bytes_per_token']:,}", f"{row['bytes_per_token_and_device']:,}", readable(row["free_bytes"])
        found = f"{row['context']:,}", f"{row['paper']:,}", f"{row['context'] / row['paper'] - 1:+.1%}"
        table.add_row(row["name"], str(row["batch"]), *sizes, *found)
    return table


def plot(report: dict, path: Path) -> None:
    """Per model: bytes per device, bytes exchanged, time of a step."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.lines
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(row["model"] for row in report["rows"]))
    batches = list(dict.fromkeys(row["batch"] for row in report["rows"]))
    size = (13, 3.3 * len(names) + 0.5)
    figure, axes = plt.subplots(len(names), 3, figsize=size, layout="constrained", squeeze=False)
    dashes, line = ("-", "--", ":", "-."), matplotlib.lines.Line2D
    # Widths: lines that coincide show through each other.
    looks = {by: {"color": f"C{i}", "linewidth": (4, 2, 1)[i]} for i, by in enumerate(SCHEMES)}
    for name, (memory, sent, clock) in zip(names, axes, strict=True):
        for by in SCHEMES:
            rows = [r for r in report["rows"] if (r["model"], r["by"]) == (name, by) and r["reason"] is None]
            for i, batch in enumerate(batches):
                some = [r for r in rows if r["batch"] == batch]
                look = looks[by] | {"linestyle": dashes[i % 4], "marker": ".", "markersize": 5}
                memory.plot([r["length"] for r in some], [r["cpu"]["bytes_per_device"] / 2**20 for r in some], **look)
                some = [r for r in some if r["cpu"]["timed_length"] == r["length"]]
                clock.plot([r["length"] for r in some], [1e3 * r["cpu"]["seconds"] for r in some], **look)
            for key, marker in (("cpu", "o"), ("tpu", "x")):
                kib = {r["batch"]: exchanged_bytes(r[key]["collectives"]) / 2**10 for r in rows if key in r}
                sent.plot(kib.keys(), kib.values(), color=looks[by]["color"], marker=marker, markersize=5)
        memory.set(ylabel="MiB per device", xlabel="length", title=f"{name}: cache of a layer")
        sent.set(ylabel="KiB per step and device", xlabel="rows", title="exchanged, at any length")
        clock.set(ylabel="ms", xlabel="length", title=f"step on {report['devices']} CPU devices (not scaled down)")
        for part in (memory, sent, clock):
            if any(len(drawn.get_xdata()) for drawn in part.lines):
                part.set(xscale="log", yscale="log")
            else:
                part.text(0.5, 0.5, "none", ha="center", transform=part.transAxes)
    legend = [line([], [], label=f"by {by}", **look) for by, look in looks.items()]
    legend += [
        line([], [], color="k", linestyle=dashes[i % 4], label=f"{b} row{'s'[: b > 1]}") for i, b in enumerate(batches)
    ]
    legend += [
        line([], [], color="k", linestyle="", marker=m, label=f"compiled for {k}")
        for k, m in (("CPU", "o"), ("TPU", "x"))
    ]
    figure.legend(handles=legend, loc="outside lower center", ncols=len(legend), fontsize=8)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main() -> None:
    args, console = arguments(), Console(highlight=False, width=150)
    found, layers = targets(args, console), shapes(args)
    grid = [(shape, batch, length) for shape in layers for batch in args.batches for length in args.lengths]
    rows = []
    with tqdm(total=len(grid) * len(SCHEMES) * len(found), unit="program") as bar:
        for shape, batch, length in grid:
            rows += measure(shape, batch, length, found, args, bar)
    report = {
        "date": datetime.date.today().isoformat(),
        "versions": {"jax": jax.__version__, "kvattn": kvattn.__version__},
        "machine": {
            "cores": os.cpu_count(),
            "load": round(os.getloadavg()[2], 1),  # of the last 15 minutes: above the cores, others ran, too
            "note": "the CPU devices share the cores: times compare schemes roughly",
        },
        "devices": args.mesh[0] * args.mesh[1],
        "mesh": {"data": args.mesh[0], "model": args.mesh[1], "axes": args.axes},
        "dtype": args.dtype,
        "steps": args.steps,
        "topology": args.topology if len(found) > 1 else None,
        "layers": [dataclasses.asdict(shape) for shape in layers],
        "rows": rows,
        "longest_contexts": longest_contexts(),
    }
    for table in [*scheme_tables(report), context_table(report["longest_contexts"])]:
        console.print(table)
    console.print(
        f"The {report['devices']} CPU devices share {os.cpu_count()} cores: times compare schemes only roughly."
    )
    if not args.no_save:
        args.out.write_text(json.dumps(report, indent=1) + "\n")
        plot(report, args.out.with_suffix(".png"))
        console.print(f"saved: {args.out.name} and .png")


if __name__ == "__main__":
    main()
