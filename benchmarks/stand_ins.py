"""A suite for machines without a GPU: tasks that go well and tasks that go wrong in every way a task can.

`on_device.py --suite stand_ins` runs it; `tests/test_benchmarks.py` looks at what becomes of each.
"""

import os
import signal
import time
from pathlib import Path
from typing import Any

from runner import Report, Stage, Task, UnfitError

TICK = 0.02
"""Seconds that work takes."""
LONG = 20
"""Seconds after which a task that goes well would be ended."""


def stages(options: dict[str, Any]) -> list[Stage]:
    """All of them."""
    del options
    peers = (
        "fast peer",
        "peer that dies",
        "peer that hangs",
        "peer that is not there",
        "peer that raises",
        "peer with an end",
        "slow peer",
    )
    good = lambda name, **more: Task(name, 2 * TICK, LONG, **more)
    return [
        Stage(
            "values",
            (good("right"), Task("hangs", TICK, 0.3), good("wrong"), good("dies"), good("raises"), good("right too")),
            lanes=2,
        ),
        Stage(
            "times",
            (
                good("timed", needs=("right",)),
                good("needs what hangs", needs=("hangs",)),
                Task("hangs before it begins", TICK, 0.2, parts=("a", "b")),
                good("timed too", needs=("wrong",)),
            ),
            quiet=True,
        ),
        Stage("peers", (Task("peers", 2 * TICK, 1, parts=peers),), quiet=True),
        Stage("never", (Task("takes an hour", 3600, 3600),)),
    ]


def environment(options: dict[str, Any]) -> dict[str, str]:
    """None."""
    del options
    return {}


def warm(options: dict[str, Any]) -> dict[str, Any]:
    """Nothing to do; with `options["unfit"]` nothing can run."""
    if options.get("unfit"):
        raise UnfitError("there is no device, and it is meant so")
    return {"kind": "stand-in"}


def run(name: str, parts: list[str], report: Report, options: dict[str, Any]) -> None:
    """Does what the name of a task or part says."""
    del options
    print(f"{name} says something")
    if name == "hangs before it begins":
        time.sleep(60)
    for part in parts:
        if part:
            report.begin(part)
        time.sleep(TICK)
        what = part or name
        if "hang" in what and "needs" not in what:
            time.sleep(60)
        if "dies" in what:
            print("a last word", flush=True)
            os.kill(os.getpid(), signal.SIGSEGV)
        if "raises" in what:
            raise ValueError("it is meant so")
        if "not there" in what:
            report.end("not there", reason="it is not installed")
        elif "wrong" in what:
            report.end("wrong", reason="error 1.0 > 0.1", error=1.0)
        else:
            report.end("ok", us=3.0)
        if "with an end" in what:  # it has reported, the next part has not begun
            os.kill(os.getpid(), signal.SIGKILL)


def summary(records: list[dict[str, Any]]) -> str:
    """How many came out how."""
    found = [r["status"] for r in records if "status" in r]
    return ", ".join(f"{found.count(status)} {status}" for status in sorted(set(found)))


def save(records: list[dict[str, Any]], out: Path) -> None:
    """The summary as a file."""
    (out / "table.txt").write_text(summary(records) + "\n")
