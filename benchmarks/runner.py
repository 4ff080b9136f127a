"""Runs tasks in processes of their own, within a budget of time, and keeps what they report as they report it.

A suite is a module with ``stages(options)``, ``warm(options)``, ``run(name, parts, report, options)`` and
``summary(records)``. What hangs is ended when its time is up, what dies takes nothing with it, and of a task in
several parts (one peer each, say) those that are left go on in a fresh process. Every record is one line of JSON,
flushed to the disk before anything else happens, so a run that is killed has lost nothing that was finished.

Processes are started ahead, so that their imports cost no time on the device. They end with the process that started
them, however that ends (Linux). As a program this file is such a process: it takes its task from standard input.
"""

import contextlib
import ctypes
import dataclasses
import importlib
import itertools
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
START_SECONDS = 90
"""For a process to import what it needs and to find its device."""
QUIET_SECONDS = 30
"""For all processes that a quiet stage takes to start; then it begins with those that did."""
MOST_SPARE = min(16, os.cpu_count() or 1)
"""Processes that are ready and wait, at most."""
LAST_WORDS = 1500
"""Characters kept of what a process said before it failed."""
BAD = ("wrong", "raised", "died", "hung")
"""What else than "ok", "not there" (a peer that is not installed) and "not run" may become of a part."""


class UnfitError(Exception):
    """Nothing of a suite can run here; the message says why."""


@dataclasses.dataclass(frozen=True)
class Task:
    """One process.

    Args:
        name: unique.
        seconds: what it should take, without the start of its process.
        limit: seconds after which a part of it is ended.
        parts: what it reports one by one; one nameless part if there are none.
        needs: names of tasks that must not have hung or died: then this one would too.
    """

    name: str
    seconds: float
    limit: float
    parts: tuple[str, ...] = ("",)
    needs: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Stage:
    """Tasks that run one after the other, or several at a time.

    Args:
        name: of the stage.
        tasks: in their order.
        lanes: how many at a time.
        quiet: whether no process may start meanwhile: times are measured.
    """

    name: str
    tasks: tuple[Task, ...]
    lanes: int = 1
    quiet: bool = False

    @property
    def seconds(self) -> float:
        """What it should take."""
        return sum(task.seconds for task in self.tasks) / self.lanes


# The file -------------------------------------------------------------------------------------------------------------


class Records:
    """A file of JSON lines that only grows; a line is on the disk when `add` returns."""

    def __init__(self, path: Path):
        self.path, self.lines = path, []
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def add(self, record: dict[str, Any]) -> None:
        """Appends one record."""
        self.lines.append(record)
        data = (json.dumps(record) + "\n").encode()
        while data:
            data = data[os.write(self._file, data) :]
        os.fsync(self._file)


def read(path: Path) -> list[dict[str, Any]]:
    """The records of a file. A last line without an end was being written when the writer was killed: left out."""
    complete = path.read_text().rpartition("\n")[0]
    return [json.loads(line) for line in complete.splitlines()]


def finished(records: Iterable[dict[str, Any]]) -> set[tuple[str, str]]:
    """(task, part) of all that needs no second run."""
    return {(r["task"], r["part"]) for r in records if r.get("status") in ("ok", "wrong", "not there")}


# The process that asks ------------------------------------------------------------------------------------------------


class Worker:
    """A process that becomes warm, then takes one task."""

    def __init__(self, suite: str, options: dict[str, Any], environment: dict[str, str]):
        self.reader, writer = os.pipe()
        os.set_blocking(self.reader, False)
        self.output = tempfile.TemporaryFile()  # noqa: SIM115
        command = [sys.executable, str(HERE / "runner.py"), suite, str(writer), str(os.getpid()), json.dumps(options)]
        # A group of its own: whatever it starts ends with it.
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=self.output, stderr=subprocess.STDOUT, pass_fds=(writer,),
            process_group=0, env=os.environ | {"PYTHONUNBUFFERED": "1"} | environment,
        )  # fmt: skip
        os.close(writer)
        self.device: dict[str, Any] | None = None
        self.deadline = time.monotonic() + START_SECONDS
        self.stage, self.task, self.left, self.words = "", None, [], ""
        self.part, self.begun, self.leaving, self.since, self._rest = "", False, False, 0.0, b""

    def give(self, stage: str, task: Task, parts: list[str], last: float) -> None:
        """Hands it a task, to be done before `last` on the clock."""
        self.stage, self.task, self.left, self.last = stage, task, list(parts), last
        self.begin(parts[0])
        self.begun = len(task.parts) == 1
        assert self.process.stdin is not None
        # One that has died meanwhile is found dead when it is heard next.
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write((json.dumps({"task": task.name, "parts": parts}) + "\n").encode())
            self.process.stdin.flush()

    def begin(self, part: str) -> None:
        """A part begins now."""
        assert self.task is not None
        self.part, self.begun, self.since = part, True, time.monotonic()
        self.deadline = min(self.since + self.task.limit, self.last)

    @property
    def late(self) -> bool:
        """Whether its time is up."""
        return time.monotonic() >= self.deadline and (self.task is not None or self.device is None)

    def events(self) -> tuple[list[dict[str, Any]], bool]:
        """What it reported since, and whether it can report no more."""
        found, ended = b"", False
        with contextlib.suppress(BlockingIOError):
            while not ended:
                chunk = os.read(self.reader, 1 << 16)
                found, ended = found + chunk, not chunk
        *lines, self._rest = (self._rest + found).split(b"\n")
        return [json.loads(line) for line in lines], ended

    def kill(self) -> None:
        """Ends it with all it started, without waiting for it."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def end(self) -> int | None:
        """Ends it with all it started; its status, None if it does not end. `words` is the end of its output."""
        self.kill()
        os.close(self.reader)
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        status = None
        # One that is stuck in a driver may take its time; nobody waits for it.
        with contextlib.suppress(subprocess.TimeoutExpired):
            status = self.process.wait(timeout=5)
        self.output.seek(max(0, self.output.seek(0, os.SEEK_END) - (1 << 16)))
        self.words = self.output.read().decode(errors="replace").strip()
        self.output.close()
        return status


class Run:
    """Stages of a suite, until they or the minutes are over.

    Args:
        suite: name of the module.
        options: for the suite, as JSON has them.
        out: folder for ``results.jsonl`` and ``log.txt``.
        minutes: for everything.
        environment: of the processes, on top of this one's.
        done: (task, part) that are left out.
        tell: gets a line for every record, when it is on the disk.
    """

    def __init__(
        self, suite: str, options: dict[str, Any], out: Path, minutes: float, *, environment: dict[str, str],
        done: Iterable[tuple[str, str]] = (), tell: Callable[[str], None] = print,
    ):  # fmt: skip
        self.suite, self.options, self.environment, self.done, self.tell = suite, options, environment, set(done), tell
        self.started = time.monotonic()
        # What is left is for ending processes and for a table.
        self.deadline = self.started + 60 * minutes - min(5, 6 * minutes)
        out.mkdir(parents=True, exist_ok=True)
        self.records, self.log = Records(out / "results.jsonl"), (out / "log.txt").open("a")
        self.workers: list[Worker] = []
        self.status: dict[str, str] = {}
        self.failed_starts = 0
        self.selector = selectors.DefaultSelector()

    def all(self, stages: list[Stage]) -> None:
        """Runs them.

        Raises:
            UnfitError: a process said that nothing can run here, or three in a row did not start.
        """
        try:
            for n, stage in enumerate(stages):
                quiet = itertools.takewhile(lambda later: later.quiet, stages[n + 1 :])
                loud = [later.lanes for later in stages[n + 1 : n + 2] if not later.quiet]
                self._stage(stage, sum(loud) + sum(len(later.tasks) for later in quiet))
        finally:
            for worker in self.workers:
                worker.kill()
            for worker in list(self.workers):
                self._drop(worker, "ended")
            self.log.close()

    def _stage(self, stage: Stage, later: int) -> None:
        """One stage; `later` processes are to be ready for what follows: a quiet stage starts none."""
        waiting: deque[tuple[Task, list[str]]] = deque()
        for task in stage.tasks:
            parts = [part for part in task.parts if (task.name, part) not in self.done]
            if parts:
                waiting.append((task, parts))
        if stage.quiet:
            self._fill(min(len(waiting) + later, MOST_SPARE))
            patience = min(time.monotonic() + QUIET_SECONDS, self.deadline)
            while any(w.device is None for w in self.workers) and time.monotonic() < patience:
                self._listen(waiting)
        while waiting or self._busy():
            self._hand_out(stage, waiting)
            if stage.quiet:
                wanted = 0 if self._busy() else min(len(waiting), 1)
            else:
                wanted = min(len(waiting), stage.lanes + 1) if waiting else min(later, MOST_SPARE)
            self._fill(wanted)
            if waiting or self._busy():
                self._listen(waiting)

    def _busy(self) -> list[Worker]:
        return [worker for worker in self.workers if worker.task is not None]

    def _fill(self, count: int) -> None:
        """Starts processes, until so many are idle or will be."""
        for _ in range(len(self.workers) - len(self._busy()), count):
            worker = Worker(self.suite, self.options, self.environment)
            self.workers.append(worker)
            self.selector.register(worker.reader, selectors.EVENT_READ, worker)

    def _drop(self, worker: Worker, how: str) -> int | None:
        """Ends a process and keeps what it said."""
        self.workers.remove(worker)
        self.selector.unregister(worker.reader)
        status = worker.end()
        if worker.words:
            name = f"{worker.task.name} {worker.part}".strip() if worker.task else "idle"
            self.log.write(f"=== {name}: {how}\n{worker.words}\n")
            self.log.flush()
        return status

    def _hand_out(self, stage: Stage, waiting: deque[tuple[Task, list[str]]]) -> None:
        """Gives tasks to idle processes, and records those that are not to be started."""
        while waiting and len(self._busy()) < stage.lanes:
            task, parts = waiting[0]
            reason, idle = self._reason(task), next((w for w in self.workers if w.device and w.task is None), None)
            if reason is None and idle is None:
                return
            waiting.popleft()
            if reason is not None:
                for part in parts:
                    self._record(stage.name, task, part, "not run", reason=reason)
            else:
                self.records.add({"start": task.name, "pid": idle.process.pid, "at": self._at()})
                idle.give(stage.name, task, parts, self.deadline)

    def _reason(self, task: Task) -> str | None:
        """Why a task is not to be started."""
        for need in task.needs:
            if (status := self.status.get(need)) in ("hung", "died", "not run"):
                return f"{need!r} came out as {status!r}"
        left = self.deadline - time.monotonic()
        return f"{max(left, 0):.0f} s are left, it takes about {task.seconds:.0f} s" if left < task.seconds else None

    def _listen(self, waiting: deque[tuple[Task, list[str]]]) -> None:
        """Waits until a process reports, ends or is late; what it leaves undone waits again."""
        deadlines = [w.deadline for w in self.workers if w.task is not None or w.device is None]
        pause = min([self.deadline, *deadlines]) - time.monotonic()
        readable = {key.data for key, _ in self.selector.select(min(max(pause, 0.01), 1))}
        for worker in list(self.workers):
            events, ended = worker.events() if worker in readable else ([], False)
            if worker.task is None:
                self._hear_idle(worker, events, ended)
            elif (undone := self._hear_busy(worker, events, ended)) and worker.task is not None:
                waiting.appendleft((worker.task, undone))

    def _hear_idle(self, worker: Worker, events: list[dict[str, Any]], ended: bool) -> None:
        """A process that is or becomes warm."""
        for event in events:
            if "unfit" in event:
                raise UnfitError(event["unfit"])
            if not any("device" in line for line in self.records.lines):
                self.records.add({"device": event["ready"], "at": self._at()})
            worker.device, self.failed_starts = event["ready"], 0
        if ended or worker.late:
            self._drop(worker, "did not start")
            self.failed_starts += 1
            if self.failed_starts == 3:
                raise UnfitError(f"three processes in a row did not start; the last one said:\n{worker.words[-800:]}")

    def _hear_busy(self, worker: Worker, events: list[dict[str, Any]], ended: bool) -> list[str]:
        """Records what a process reported, or that it ended without; the parts that another one is to do."""
        task = worker.task
        assert task is not None
        for event in events:
            if "begin" in event:
                worker.begin(event["begin"])
                continue
            worker.leaving = event.pop("leaving", False)
            if event["part"] not in worker.left:
                continue  # an error after a result: the result counts
            worker.left.remove(event["part"])
            self._record(worker.stage, task, seconds=round(time.monotonic() - worker.since, 2), **event)
        if not worker.left or (worker.leaving and ended):
            self._drop(worker, "done")
            return worker.left
        if not ended and not worker.late:
            return []
        took = time.monotonic() - worker.since
        status = self._drop(worker, "died" if ended else "hung")
        if ended:
            how = "died"
            reason = f"by {signal.Signals(-status).name}" if status and status < 0 else f"with status {status}"
        elif time.monotonic() >= self.deadline:
            how, reason = "not run", f"the minutes were over after {took:.1f} s"
        else:
            how, reason = "hung", f"no result after {took:.1f} s"
        # Before anything has begun all parts have the same trouble; between two parts none is to blame.
        for part in [part for part in worker.left if part == worker.part or not worker.begun]:
            worker.left.remove(part)
            more = {"reason": reason, "said": worker.words[-LAST_WORDS:]}
            self._record(worker.stage, task, part, how, seconds=round(took, 2), **more)
        return worker.left

    def _record(self, stage: str, task: Task, part: str, status: str, **more: Any) -> None:
        self.records.add({"task": task.name, "part": part, "stage": stage, "status": status, "at": self._at(), **more})
        # Of a task in parts the first that is not well counts.
        if self.status.get(task.name, "ok") == "ok":
            self.status[task.name] = status
        reason = f": {more['reason']}" if "reason" in more else ""
        self.tell(f"{self._at():6.1f} s  {status:9s} {task.name}{', ' if part else ''}{part}{reason}")

    def _at(self) -> float:
        return round(time.monotonic() - self.started, 2)


# The process that is asked --------------------------------------------------------------------------------------------


class Report:
    """How a task reports, part by part."""

    def __init__(self, descriptor: int):
        self._descriptor, self.part = descriptor, ""

    def send(self, event: dict[str, Any]) -> None:
        """One event, at once."""
        data = (json.dumps(event) + "\n").encode()
        while data:
            data = data[os.write(self._descriptor, data) :]

    def begin(self, part: str) -> None:
        """A part begins: what follows belongs to it, and its time counts from now."""
        self.part = part
        self.send({"begin": part})

    def end(self, status: str, **figures: Any) -> None:
        """The part has ended."""
        self.send({"part": self.part, "status": status, **figures})


def die_with(parent: int) -> None:
    """Asks the kernel to end this process when its parent ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        os._exit(1)


def work(suite_name: str, descriptor: int, parent: int, options: dict[str, Any]) -> int:
    """Warms up, takes a task, reports."""
    die_with(parent)
    os.set_inheritable(descriptor, False)  # the other end is to notice when this process ends
    report = Report(descriptor)
    suite = importlib.import_module(suite_name)
    try:
        report.send({"ready": suite.warm(options)})
    except UnfitError as error:
        report.send({"unfit": str(error)})
        return 1
    line = sys.stdin.readline()
    if not line:
        return 0
    asked = json.loads(line)
    report.part = asked["parts"][0]
    try:
        suite.run(asked["task"], asked["parts"], report, options)
    except Exception as error:  # whatever it is, it is the result of this part; others go on elsewhere
        traceback.print_exc()
        first = f"{type(error).__name__}: {error}".strip().splitlines()[0]
        # The device may be in no state to go on with.
        report.end("raised", reason=first[:300], said=traceback.format_exc()[-LAST_WORDS:], leaving=True)
    return 0


if __name__ == "__main__":
    sys.path[:0] = [str(HERE.parent), str(HERE)]
    # The suite imports this file as `runner`; classes must not exist twice.
    sys.modules["runner"] = sys.modules["__main__"]
    sys.exit(work(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), json.loads(sys.argv[4])))
