"""Runs the processes of one job on this machine, and sees to it that none outlives it.

Only the standard library. A process is ended by its id and waited for, whatever happens here; and it ends by itself
when this one is gone (`end_with_launcher`), also if that was killed.
"""

import contextlib
import dataclasses
import os
import queue
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

PORT_TAKEN = "Address already in use"
ATTEMPTS = 3
"""Ports that are tried before a job is given up."""
# What jax.distributed and the collectives write when a peer is gone, the most telling first.
_REASONS = (
    (r"Task (\d+) heartbeat timeout", "no heartbeat of process {} any more"),
    (r"stopped sending heartbeats\)?:\s*(\d+)", "no heartbeat of process {} any more"),
    (r"PollForError", "the coordinator (process 0) is gone"),
    (r"Gloo .* failed", "a peer broke off a collective"),
)


@dataclasses.dataclass
class Process:
    """One of them.

    Attributes:
        number: its process id in the job.
        handle: what the operating system has.
        log: the file that its standard error goes to.
    """

    number: int
    handle: subprocess.Popen
    log: Path

    def __str__(self) -> str:
        return f"process {self.number} (pid {self.handle.pid})"

    @property
    def outcome(self) -> str:
        """How it ended."""
        code = self.handle.returncode
        return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"

    @property
    def written(self) -> str:
        """What it wrote to standard error."""
        return self.log.read_text(errors="replace")

    @property
    def lost(self) -> str | None:
        """Which peer it lost; None: none that it knew of."""
        for pattern, reason in _REASONS:
            found = re.search(pattern, self.written)
            if found:
                return reason.format(*found.groups())
        return None


def run(commands: Mapping[int, Sequence[str]], logs: Path, grace: float) -> list[Process]:
    """Runs commands until all have ended; says on standard error what became of those that fail.

    Args:
        commands: by process id.
        logs: a folder for what they write to standard error.
        grace: seconds that the others have to end by themselves once one has failed. Then they are killed.

    Returns:
        the processes. All are gone.
    """
    processes: list[Process] = []
    ended: queue.SimpleQueue[Process] = queue.SimpleQueue()

    def watch(process: Process) -> None:
        process.handle.wait()
        ended.put(process)

    first, deadline = 0.0, None
    try:
        for number, command in commands.items():
            log = logs / f"process-{number}.log"
            with log.open("wb") as file:
                # Nothing is written to its standard input: the pipe ends when this process does.
                handle = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=file)
            processes.append(Process(number, handle, log))
            threading.Thread(target=watch, args=(processes[-1],), daemon=True).start()
        for _ in processes:
            process = ended.get(timeout=None if deadline is None else max(deadline - time.monotonic(), 0))
            if process.handle.returncode == 0:
                continue
            later = ""
            if deadline is None:
                first = time.monotonic()
                deadline = first + grace
            else:
                later = f" {time.monotonic() - first:.1f} s later"
            report(process, later)
    except queue.Empty:
        for process in processes:
            if process.handle.poll() is None:
                say(f"{process} did not end within {grace:.0f} s of the first failure: killed")
    finally:
        for process in processes:
            process.handle.kill()  # does nothing to one that has ended, whose id may be another's by now
        for process in processes:
            process.handle.wait()
            if process.handle.stdin is not None:
                process.handle.stdin.close()
    return processes


def report(process: Process, later: str) -> None:
    """One line on a process that failed; the end of what it wrote where that is its own fault."""
    if process.lost is not None:
        say(f"{process} {process.outcome}{later}: {process.lost}")
    else:
        say(f"{process} {process.outcome}{later}")
        sys.stderr.writelines(f"    {line}\n" for line in process.written.splitlines()[-20:])


def say(text: str) -> None:
    """To standard error, at once."""
    print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def coordinator(count: int, heartbeat: int = 100) -> Iterator[str]:
    """Runs JAX's coordinator in a process of its own, beside `count` others that may all end; the address of it.

    `heartbeat`: what the processes give `jax.distributed.initialize` as `heartbeat_timeout_seconds`.
    """
    for attempt in range(ATTEMPTS):
        address = f"127.0.0.1:{free_port()}"
        command = [sys.executable, "-m", "kvattn.serving.coordinator", address, "--until-eof"]
        command += ["--processes", str(count), "--heartbeat-timeout", str(heartbeat)]
        last = attempt == ATTEMPTS - 1
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=None if last else subprocess.DEVNULL
        ) as handle:
            assert handle.stdout is not None
            try:
                if handle.stdout.readline():
                    yield address
                    return
            finally:
                handle.kill()
    raise RuntimeError("the coordinator did not start")


def free_port() -> int:
    """A port of the loopback interface that nobody has just now; somebody else may take it (`PORT_TAKEN`)."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def end_with_launcher() -> None:
    """In a process that `run` started: ends it as soon as the launcher is gone."""

    def wait() -> None:
        os.read(0, 1)  # not sys.stdin, whose lock would be held at the end
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
