"""One engine over several processes that lend each other pages (jax.distributed).

python examples/many_hosts.py --processes 1 2 4
    as many processes of one CPU device on this machine, one after the other, and a small random model

python examples/many_hosts.py --checkpoint DIR --coordinator 10.0.0.1:1234 --processes 4 --process-id 0
    on each of four hosts, each with its own --process-id; the first is the coordinator, or with --coordinator-apart
    python -m kvattn.serving.coordinator 10.0.0.1:1234 --processes 4

Every process makes the same engine; process 0 has the requests, and all get the tokens. One of them is longer than the
pool of any host. When a process dies or is late, the others say so within --timeout and end.
"""

import argparse
import contextlib
import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections import deque
from pathlib import Path
from typing import TextIO

import jax
import numpy as np
import processes
from multihost_decode import random_checkpoint
from rich.console import Console
from rich.table import Table

import kvattn
from kvattn.serving import Engine, Hosts, Ledger

LINGER = 5.0
"""Seconds that process 0 stays after a failure if it keeps the store in which the others read why."""


def arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4], help="of a job; several: one job for each")
    p.add_argument("--devices", type=int, default=1, help="CPU devices of each process on this machine")
    p.add_argument("--coordinator", help="host:port of the coordinator; default: all processes run here")
    p.add_argument(
        "--coordinator-apart",
        action="store_true",
        help="it runs already (python -m kvattn.serving.coordinator): process 0 may die too",
    )
    p.add_argument("--process-id", type=int, help="the one that runs here, with --coordinator")
    p.add_argument("--timeout", type=float, default=60, help="seconds that a process waits for another")
    p.add_argument("--checkpoint", type=Path, help="a HuggingFace folder; default: a small random Llama")
    p.add_argument("--pages", type=int, default=24, help="of each host")
    p.add_argument("--page-size", type=int, default=8)
    p.add_argument("--batch", type=int, default=4, help="rows that are decoded at a time")
    p.add_argument("--requests", type=int, default=8, help="short ones, beside one as long as the pools allow")
    p.add_argument("--max-new-tokens", type=int, default=16)
    p.add_argument("--no-check", dest="check", action="store_false", help="do not compare with one large pool")
    p.add_argument("--out", type=Path, help="a JSON file for what is printed")
    p.add_argument("--plot", type=Path, help="a picture: loans over time, and what lending is worth")
    p.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = p.parse_args()
    if (args.coordinator is None) != (args.process_id is None):
        p.error("--coordinator and --process-id go together")
    if args.coordinator is not None and (args.checkpoint is None or len(args.processes) > 1):
        p.error("hosts of their own need a --checkpoint that each can read, and one number of --processes")
    return args


# The launcher -------------------------------------------------------------------------------------


def launch(args: argparse.Namespace) -> int:
    """Runs a job for each number of processes, and shows what came of them."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # an exception, so that they are ended
    reports = []
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = args.checkpoint or random_checkpoint(Path(folder) / "model")
        for count in args.processes:
            report = Path(folder) / f"{count}.json"
            more = ["--checkpoint", str(checkpoint), "--out", str(report), "--processes", str(count)]
            with contextlib.ExitStack() as stack:
                coordinator = None if args.coordinator else stack.enter_context(processes.coordinator(count))
                run = commands(args, count, more, coordinator)
                ended = processes.run(run, Path(folder), grace=args.timeout + 2 * LINGER)
            if any(process.handle.returncode != 0 for process in ended):
                return 1
            if report.exists():
                reports.append(json.loads(report.read_text()))
    if reports:
        if args.out:
            args.out.write_text(json.dumps(reports, indent=1))
        if args.plot:
            plot(reports, args.plot)
        show(reports, sys.stdout)
    return 0


def commands(args: argparse.Namespace, count: int, more: list[str], coordinator: str | None) -> dict[int, list[str]]:
    """What to run here, by process id: this program with the arguments it was given and what they left open."""
    given = [sys.executable, __file__, *sys.argv[1:], *more, "--worker"]
    if coordinator is None:
        return {args.process_id: given}
    given += ["--coordinator", coordinator, "--coordinator-apart"]
    return {i: [*given, "--process-id", str(i)] for i in range(count)}


# The program of every process ---------------------------------------------------------------------


def work(args: argparse.Namespace) -> None:
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # Gloo, the collectives of CPU devices, talks on standard output
    processes.end_with_launcher()
    here = args.coordinator.startswith("127.0.0.1:")
    if here:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", args.devices)
    (count,) = args.processes
    # Process 0 starts a coordinator whatever is asked for: where there is one, at any port, and nobody goes there.
    bind = "127.0.0.1:0" if args.coordinator_apart else args.coordinator if here else None
    jax.distributed.initialize(args.coordinator, count, args.process_id, coordinator_bind_address=bind)
    try:
        serve(args, out)
        jax.distributed.shutdown()
    except BaseException:
        traceback.print_exc()
        if args.process_id == 0 and not args.coordinator_apart:
            time.sleep(LINGER)
        os._exit(1)  # at once: the usual way out waits for all processes


def serve(args: argparse.Namespace, out: TextIO) -> None:
    mesh = jax.make_mesh((jax.device_count(),), ("host",))
    model = kvattn.models.from_pretrained(args.checkpoint, dtype=np.float32, mesh=mesh, by="sequence", axis="host")
    total = args.pages * jax.device_count() * args.page_size
    settings = dict(page_size=args.page_size, max_batch=args.batch, max_length=total, prefill_chunk=16)
    hosts = Hosts("host", timeout=args.timeout, compare_every=16)
    engine = Engine(model, num_pages=args.pages, hosts=hosts, **settings)
    engine.warm_up()

    asked = prompts(args, model.config.vocab_size, total)
    if jax.process_index() == 0:
        for prompt in asked:
            engine.submit(prompt, args.max_new_tokens)
    start, step, over_time = time.perf_counter(), 0, []
    while engine.step():
        step += 1
        print(f"process {jax.process_index()} (pid {os.getpid()}): step {step}", file=out)
        over_time.append(sum(sum(pool.values()) for pool in engine.loans()))
    done = engine.run()
    seconds = time.perf_counter() - start
    tokens = [new[0] for new in done.values()]
    stats = engine.stats()
    if jax.process_index() != 0:
        return
    report = {
        "processes": jax.process_count(),
        "hosts": jax.device_count(),
        "pages": args.pages,
        "longest": max(map(len, asked)) + args.max_new_tokens,
        "of_one_host": args.pages * args.page_size,
        "tokens_per_second": sum(map(len, tokens)) / seconds,
        "preemptions": stats.preemptions,
        "most_lent": max(over_time, default=0),
        "loans": over_time,
    }
    if args.check:
        alone = kvattn.models.from_pretrained(args.checkpoint, dtype=np.float32)
        large = Engine(alone, num_pages=args.pages * jax.device_count(), **settings)
        expected = [large.submit(prompt, args.max_new_tokens) for prompt in asked]
        large.run()
        report["same_tokens"] = sorted(request.tokens[0] for request in expected) == sorted(tokens)
    args.out.write_text(json.dumps(report))
    if not report.get("same_tokens", True):
        raise SystemExit("the tokens are not those of one large pool")


def prompts(args: argparse.Namespace, vocab_size: int, total: int) -> list[list[int]]:
    """One as long as the pools allow, and short ones."""
    rng = np.random.default_rng(0)
    longest = total - args.max_new_tokens
    lengths = [longest, *rng.integers(4, args.pages * args.page_size // 2, args.requests)]
    return [rng.integers(0, vocab_size, length).tolist() for length in lengths]


# What lending is worth ----------------------------------------------------------------------------


def trace(seed: int, hosts: int = 4, size: int = 64, gap: int = 14, count: int = 200) -> list[tuple[int, int, int]]:
    """Requests as (step at which it comes, host, pages in the end), half of them short, half up to 1.6 of a host's."""
    rng = random.Random(seed)
    pages = lambda: rng.randint(size * 5 // 8, size * 25 // 16) if rng.random() < 0.5 else rng.randint(5, 20)
    return [(i * gap, rng.randrange(hosts), pages()) for i in range(count)]


def replayed(requests: list[tuple[int, int, int]], hosts: int = 4, size: int = 64, *, lend: bool) -> tuple[int, list]:
    """How many requests get all their pages, one in each step, and which share of all pages is used over time.

    One that lacks a page has to leave. Without lending a host has a ledger of its own.
    """
    ledgers = [Ledger(hosts, size)] if lend else [Ledger(1, size) for _ in range(hosts)]
    waiting, running, served, used = deque(enumerate(requests)), {}, 0, []
    while waiting or running:
        while waiting and waiting[0][1][0] <= len(used):
            number, (_, home, pages) = waiting.popleft()
            running[number] = ledgers[0 if lend else home], pages
            running[number][0].allocate(number, 0, home=home if lend else 0)
        for number, (ledger, pages) in list(running.items()):
            if len(ledger.table(number)) < pages:
                try:
                    ledger.append(number)
                    continue
                except kvattn.errors.OutOfBlocksError:
                    pass
            else:
                served += 1
            ledger.free(number)
            del running[number]
        for ledger in ledgers:
            ledger.repay(4)
        used.append(1 - sum(ledger.num_free for ledger in ledgers) / (hosts * size))
    return served, used


def plot(reports: list[dict], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.5), layout="constrained")
    loans, pools = figure.subplots(1, 2)
    for report in reports:
        share = np.array(report["loans"]) / (report["pages"] * report["hosts"])
        loans.plot(100 * share, label=f"{report['hosts']} host{'s' if report['hosts'] > 1 else ''}")
    loans.set(xlabel="step", ylabel="pages lent, % of all", ylim=(0, 100), title="this run")
    requests = trace(seed=0)
    for lend, label in ((True, "with lending"), (False, "each host alone")):
        served, used = replayed(requests, lend=lend)
        pools.plot(100 * np.array(used), linewidth=0.8, label=f"{label}: {served} of {len(requests)} served")
    pools.set(xlabel="step", ylabel="pages used, % of all", ylim=(0, 130), title="long and short texts on 4 hosts")
    for axes in (loans, pools):
        axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def show(reports: list[dict], out: TextIO) -> None:
    table = Table(box=None, padding=(0, 2, 0, 0))
    for name in ["processes", "hosts", "longest text", "of one host", "tokens/s", "preempted", "most lent", ""]:
        table.add_column(name, justify="right")
    for r in reports:
        same = {True: "same tokens as one large pool", False: "OTHER TOKENS", None: ""}[r.get("same_tokens")]
        numbers = r["processes"], r["hosts"], r["longest"], r["of_one_host"], f"{r['tokens_per_second']:,.0f}"
        table.add_row(*map(str, (*numbers, r["preemptions"], r["most_lent"], same)))
    Console(file=out, highlight=False, width=140).print(table)


def main() -> int:
    args = arguments()
    if args.worker:
        work(args)
        return 0
    return launch(args)


if __name__ == "__main__":
    sys.exit(main())
