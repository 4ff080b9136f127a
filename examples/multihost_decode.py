"""Decodes with a model that is split over the devices of several processes (jax.distributed).

python examples/multihost_decode.py --processes 2 --devices 4
    two processes of four CPU devices each on this machine, and a small random model

python examples/multihost_decode.py --checkpoint DIR --coordinator 10.0.0.1:1234 --processes 4 --process-id 0
    on each of four hosts, each with its own --process-id; the first is the coordinator

Each process reads the parts of the checkpoint that its devices hold. All run the same program, and all get the tokens.
When one is gone, the others end within the heartbeat timeout and say why.
"""

import argparse
import json
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path
from typing import TextIO

import jax
import numpy as np
import processes
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import AxisType
from rich.console import Console
from rich.table import Table
from safetensors.numpy import save_file

import kvattn
from kvattn.layers import stateless


def arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--processes", type=int, default=2, help="of the whole job")
    p.add_argument("--devices", type=int, help="CPU devices of each process; default: what the host has")
    p.add_argument("--coordinator", help="host:port of process 0; default: all processes run here")
    p.add_argument("--process-id", type=int, help="the one that runs here, with --coordinator")
    p.add_argument("--heartbeat", type=int, default=20, help="seconds of silence until a process counts as dead")
    p.add_argument("--checkpoint", type=Path, help="a HuggingFace folder; default: a small random Llama")
    p.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], help="default: as stored")
    p.add_argument("--mesh", help="data x model, such as 2x4; default: 1 x all devices")
    p.add_argument("--axes", default="Explicit", choices=["Explicit", "Auto"], help="kind of the mesh axes")
    p.add_argument("--by", default="auto", choices=["auto", "heads", "batch", "sequence", "replicated"])
    p.add_argument("--batch", type=int, default=8, help="random prompts")
    p.add_argument("--prompts", type=json.loads, help="instead: token ids, such as '[[1, 2, 3], [4, 5]]'")
    p.add_argument("--max-new-tokens", type=int, default=16)
    p.add_argument("--rounds", type=int, default=2, help="times the prompts are decoded; the last is timed")
    p.add_argument("--no-check", dest="check", action="store_false", help="do not compare with one device of process 0")
    p.add_argument("--out", type=Path, help="a JSON file for what is printed")
    p.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = p.parse_args()
    if (args.coordinator is None) != (args.process_id is None):
        p.error("--coordinator and --process-id go together")
    if args.coordinator is not None and args.checkpoint is None:
        p.error("hosts of their own need a --checkpoint that each can read")
    return args


# The launcher -------------------------------------------------------------------------------------


def launch(args: argparse.Namespace) -> int:
    """Starts the processes of this host and says what became of them. Nothing of them is left afterwards."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # an exception, so that they are ended
    with tempfile.TemporaryDirectory() as folder:
        more = []
        if args.checkpoint is None:
            more = ["--checkpoint", str(random_checkpoint(Path(folder) / "model"))]
        for _ in range(processes.ATTEMPTS):
            ended = processes.run(commands(args, more), Path(folder), grace=args.heartbeat + 10)
            if args.coordinator is not None or processes.PORT_TAKEN not in ended[0].written:
                break
            processes.say("another program took the port: once more")
    return int(any(process.handle.returncode != 0 for process in ended))


def commands(args: argparse.Namespace, more: list[str]) -> dict[int, list[str]]:
    """What to run here, by process id: this program with the arguments it was given and what they left open."""
    given = [sys.executable, __file__, *sys.argv[1:], *more, "--worker"]
    if args.coordinator is not None:
        return {args.process_id: given}
    coordinator = f"127.0.0.1:{processes.free_port()}"
    return {i: [*given, "--coordinator", coordinator, "--process-id", str(i)] for i in range(args.processes)}


def random_checkpoint(folder: Path) -> Path:
    """A Llama of 4 layers, in the form of HuggingFace."""
    folder.mkdir()
    config = {
        "model_type": "llama", "vocab_size": 512, "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4,
        "num_attention_heads": 16, "num_key_value_heads": 8, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    rng = np.random.default_rng(0)
    weights = {
        name: rng.normal(size=shape) / np.sqrt(shape[-1]) if len(shape) > 1 else np.ones(shape)
        for name, shape in kvattn.models.describe(folder).tensors.items()
    }
    save_file({name: x.astype(np.float32) for name, x in weights.items()}, folder / "model.safetensors")
    return folder


# The program of every process ---------------------------------------------------------------------


def work(args: argparse.Namespace) -> None:
    # Gloo, the collectives of CPU devices, talks on standard output.
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    processes.end_with_launcher()
    if args.devices is not None:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", args.devices)
    here = args.coordinator.startswith("127.0.0.1:")
    jax.distributed.initialize(
        args.coordinator,
        args.processes,
        args.process_id,
        coordinator_bind_address=args.coordinator if here else None,
        heartbeat_timeout_seconds=args.heartbeat,
        shutdown_timeout_seconds=3600,  # the others are done while process 0 compares
    )
    try:
        decode(args, out)
        jax.distributed.shutdown()
    except BaseException as error:
        traceback.print_exc()
        if "Gloo" in str(error):
            # A peer is gone. Which, the coordinator knows when the heartbeat is overdue, and ends this process.
            threading.Event().wait(args.heartbeat + 5)
        # At once: the usual way out waits for all processes.
        os._exit(1)


def decode(args: argparse.Namespace, out: TextIO) -> None:
    kind = getattr(AxisType, args.axes)
    shape = tuple(map(int, args.mesh.split("x"))) if args.mesh else (1, jax.device_count())
    mesh = jax.make_mesh(shape, ("data", "model"), axis_types=(kind, kind))

    read = []
    model = kvattn.models.from_pretrained(
        args.checkpoint, dtype=args.dtype, mesh=mesh, by=args.by, on_read=lambda _, nbytes: read.append(nbytes)
    )
    prompts = args.prompts or random_prompts(args.batch, model.config.vocab_size)

    for number in range(args.rounds):
        print(f"process {jax.process_index()} (pid {os.getpid()}): round {number + 1} of {args.rounds}", file=out)
        start = time.perf_counter()
        tokens = kvattn.generate(model, prompts, args.max_new_tokens)
        seconds = time.perf_counter() - start

    capacity = max(map(len, prompts)) + args.max_new_tokens
    logits = prompt_logits(model, prompts, capacity, jax.NamedSharding(mesh, jax.P())) if args.check else None
    caches = model.make_cache(len(prompts), capacity)
    # As int32: JAX has no int64 unless asked to.
    sizes = np.array([sum(read), per_device(nnx.state(model)), per_device(caches)], np.int64).view(np.int32)
    read_by, weights, cached = multihost_utils.process_allgather(sizes).view(np.int64).T.tolist()
    if jax.process_index() != 0:
        return

    config, (rows, split) = model.config, mesh.axis_sizes
    chosen = kvattn.sharding.choose(
        config.num_heads, config.num_kv_heads or config.num_heads, len(prompts) // rows, split
    )
    report = {
        "jax": jax.__version__,
        "processes": jax.process_count(),
        "devices": jax.device_count(),
        "mesh": dict(mesh.shape),
        "by": chosen if args.by == "auto" else args.by,
        "checkpoint_bytes": sum(file.stat().st_size for file in args.checkpoint.glob("*.safetensors")),
        "bytes_read": read_by,
        "weight_bytes_per_device": max(weights),
        "cache_bytes_per_device": max(cached),
        "tokens_per_second": sum(map(len, tokens)) / seconds,
        "tokens": tokens,
    }
    if args.check:
        alone = kvattn.models.from_pretrained(args.checkpoint, dtype=args.dtype)
        expected = prompt_logits(alone, prompts, capacity)
        report["same_tokens"] = kvattn.generate(alone, prompts, args.max_new_tokens) == tokens
        report["logits_difference"] = float(np.abs(logits - expected).max() / expected.std())
    if args.out:
        args.out.write_text(json.dumps(report, indent=1))
    show(report, out)
    if not report.get("same_tokens", True):
        raise SystemExit("the tokens are not those of one device")


def prompt_logits(model, prompts, capacity, sharding=None) -> np.ndarray:
    """[tokens, V]: the logits of all prompts, through the caches."""
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    padded = np.zeros((len(prompts), lengths.max()), np.int32)
    for row, prompt in enumerate(prompts):
        padded[row, : len(prompt)] = prompt
    apply, weights = stateless(model)
    step = jax.jit(lambda *given: apply(*given)[0], out_shardings=sharding)
    logits = step(weights, padded, model.make_cache(len(prompts), capacity), lengths)
    return np.asarray(logits)[np.arange(padded.shape[1]) < lengths[:, None]]


def random_prompts(batch: int, vocab_size: int) -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, vocab_size, rng.integers(8, 33)).tolist() for _ in range(batch)]


def per_device(tree) -> int:
    """The most bytes that a device of this process holds of some arrays."""
    held = dict.fromkeys(jax.local_devices(), 0)
    for x in jax.tree.leaves(tree):
        for shard in x.addressable_shards:
            held[shard.device] += shard.data.nbytes
    return max(held.values())


def show(report: dict, out: TextIO) -> None:
    size = lambda count: f"{count / 1e6:,.2f} MB"
    mesh = " x ".join(f"{name} {count}" for name, count in report["mesh"].items())
    rows = {
        "mesh": f"{mesh}: {report['processes']} processes, {report['devices']} devices",
        "caches": f"by {report['by']}",
        "a device holds": f"{size(report['weight_bytes_per_device'])} of weights, "
        f"{size(report['cache_bytes_per_device'])} of caches, at most",
        "a process read": f"{', '.join(map(size, report['bytes_read']))} of {size(report['checkpoint_bytes'])}",
        "speed": f"{report['tokens_per_second']:,.0f} tokens/s, prompts included",
    }
    if "same_tokens" in report:
        rows["one device alone"] = (
            f"{'the same' if report['same_tokens'] else 'OTHER'} tokens; logits of the prompts differ by "
            f"{report['logits_difference']:.1e} of their deviation at most"
        )
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for row in rows.items():
        table.add_row(*row)
    Console(file=out, highlight=False, width=120).print(table)


def main() -> int:
    args = arguments()
    if args.worker:
        work(args)
        return 0
    return launch(args)


if __name__ == "__main__":
    sys.exit(main())
