"""Right values first, then figures, on a GPU that is there for a few minutes only.

    python benchmarks/on_device.py --minutes 9 --out "$OUT"
    python benchmarks/on_device.py --values --minutes 4      values of the kernels, no times
    python benchmarks/on_device.py --plan                    what would run, in which order, in how many minutes
    python benchmarks/on_device.py --dry-run                 everything in miniature on a CPU, values only
    python benchmarks/on_device.py --build                   lowers every program for a GPU, on a CPU
    python benchmarks/on_device.py --show DIR                the table of an earlier run, and a picture

Needs Python 3.12, jax, numpy and jaxtyping, and the repository around it; nothing has to be installed of it.
Peers that are not installed are named as such. Every task is a process with a timeout of its own (`runner.py`), every
result is in ``results.jsonl`` as soon as it is there. ``log.txt`` has what the processes said, ``table.txt`` the table
that is printed last, ``sizes.json`` the fastest sizes for `kvattn.pallas.tuning.use`.

Ends with status 1 if a value is wrong or a process did not do its task, 2 if nothing can run here.
"""

import argparse
import contextlib
import datetime
import importlib
import re
import signal
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import gpu_cases
import gpu_report
import runner
from runner import Stage

RESULTS = Path(__file__).resolve().parent / "results"


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9, help="for everything (9)")
    parser.add_argument("--out", type=Path, help="folder for the files; benchmarks/results/on_device-... if not given")
    parser.add_argument("--values", action="store_true", help="values of the kernels only")
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="tasks whose names contain one of them")
    parser.add_argument("--all", action="store_true", help="times the rarer cases too")
    parser.add_argument("--peers", nargs="+", default=list(gpu_cases.PEERS), help='beginnings of names, or "none"')
    parser.add_argument("--wheels", type=Path, metavar="DIR", help="wheels of peers, and the extension of FA3 (.so)")
    parser.add_argument("--table", type=Path, help="sizes to use, as sizes.json has them")
    parser.add_argument("--done", type=Path, metavar="FILE", help="results.jsonl of before: what it has is left out")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--plan", action="store_true", help="prints what would run")
    mode.add_argument("--dry-run", dest="mode", action="store_const", const="interpret", default="device")
    mode.add_argument("--build", dest="mode", action="store_const", const="lower")
    mode.add_argument("--show", type=Path, metavar="DIR", help="prints the table of a run and draws a picture")
    parser.add_argument("--suite", default="gpu_suite", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    args.peers = [] if args.peers == ["none"] else args.peers
    for word in args.peers:
        if not any(name.lower().startswith(word.lower()) for name in gpu_cases.ALL_PEERS):
            parser.error(f"no peer begins with {word!r}; there are {', '.join(gpu_cases.ALL_PEERS)}, or none")
    if args.wheels and not [*args.wheels.glob("*.whl"), *args.wheels.glob("*fa3*.so")]:
        parser.error(f"{args.wheels} holds neither wheels (*.whl) nor the extension of FA3 (*fa3*.so)")
    return args


def chosen(stages: list[Stage], args: argparse.Namespace) -> list[Stage]:
    """Stages with the tasks that are asked for; ends the program if there is none."""
    found = []
    for stage in stages:
        words = [word.lower() for word in args.only]
        tasks = [t for t in stage.tasks if not words or any(word in t.name.lower() for word in words)]
        if tasks and (not args.values or stage.name in ("first", "values")):
            found.append(Stage(stage.name, tuple(tasks), stage.lanes, stage.quiet))
    if not found:
        sys.exit(f"no task has {' or '.join(map(repr, args.only))} in its name; --plan lists them")
    return found


def plan(stages: list[Stage]) -> str:
    """What would run, in which order, with seconds, limits and the minutes in all."""
    lines, total = [], 0.0
    for stage in stages:
        lanes = f", {stage.lanes} at a time" if stage.lanes > 1 else ""
        lines.append(f"{stage.name}: {len(stage.tasks)} tasks{lanes}, {stage.seconds / 60:.1f} minutes")
        for task in stage.tasks:
            parts = f", {len(task.parts)} parts" if len(task.parts) > 1 else ""
            lines.append(
                f"    {task.name}{parts}: {task.seconds:.0f} s, at most {task.limit:.0f} s{' each' if parts else ''}"
            )
        total += stage.seconds
    return "\n".join([*lines, f"{total / 60:.1f} minutes in all"])


def unpacked(folder: Path, target: str) -> tuple[str | None, str | None]:
    """Wheels laid out as they would be installed.

    Args:
        folder: with files ``*.whl``, and maybe ``*fa3*.so``.
        target: where to put them.

    Returns:
        the folder for `sys.path`, None if there was no wheel; the extension of FA3, None if there was none.
    """
    wheels = sorted(folder.glob("*.whl"))
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(target)
    fa3 = next(iter([*sorted(folder.glob("*fa3*.so")), *sorted(Path(target).rglob("*fa3*.so"))]), None)
    return target if wheels else None, str(fa3.resolve()) if fa3 else None


def default_out() -> Path:
    """A folder named for the device and the day."""
    name = "cpu"
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        asked = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
        name = re.sub(r"[^a-z0-9]+", "_", asked.stdout.splitlines()[0].lower()).strip("_")
    return RESULTS / f"on_device-{name}-{datetime.date.today().isoformat()}"


def tell(line: str) -> None:
    """Prints, as long as somebody reads; the files have it all."""
    with contextlib.suppress(BrokenPipeError):
        print(line, flush=True)


def show(out: Path) -> int:
    """The table of a run, and its picture where matplotlib is installed."""
    records = runner.read(out / "results.jsonl")
    print(gpu_report.summary(records))
    with contextlib.suppress(ImportError):
        gpu_report.picture(records, out / "picture.png")
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Runs what is asked for."""
    args = parsed(arguments)
    if args.show:
        return show(args.show)
    peers = [p for p in gpu_cases.ALL_PEERS if any(p.lower().startswith(word.lower()) for word in args.peers)]
    options: dict[str, Any] = {"mode": args.mode, "peers": peers, "all": args.all}
    if args.table:
        options["table"] = str(args.table.resolve())
    suite = importlib.import_module(args.suite)
    stages = chosen(suite.stages(options), args)
    if args.plan:
        print(plan(stages))
        return 0
    # An end from outside takes the way of an error: processes are ended, the table is written.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    out = args.out or default_out()
    with tempfile.TemporaryDirectory() as target:
        if args.wheels:
            options["packages"], options["fa3"] = unpacked(args.wheels, target)
        done = runner.finished(runner.read(args.done)) if args.done else set()
        run = runner.Run(
            args.suite, options, out, args.minutes, environment=suite.environment(options), done=done, tell=tell
        )
        run.records.add({"run": {"date": datetime.datetime.now().isoformat(timespec="seconds"), **options}})
        try:
            run.all(stages)
        except runner.UnfitError as error:
            tell(str(error))
            return 2
        finally:
            earlier = runner.read(args.done) if args.done else []
            suite.save([*earlier, *run.records.lines], out)
    tell("")
    tell(suite.summary([*earlier, *run.records.lines]))
    tell(f"files: {out}")
    return int(any(record.get("status") in runner.BAD for record in run.records.lines))


if __name__ == "__main__":
    sys.exit(main())
