"""Plants the faults one by one in a copy of the package and runs the tests nearest to each.

The quick tests first; where they see nothing, the slow ones of the same list. A test that fails, a crash and a test
that does not end kill a fault. Results are kept in .cache/mutants: a run that was interrupted goes on where it was.
They count until the fault changes, or the function it is planted in, or what was run: the quick test that saw it, and
where none did all test files named with it.

    python -m mutants                      all
    python -m mutants --sample 30          30 of them, others every day (--seed 2026-01-31: those of that day)
    python -m mutants pallas/ kivi         those with one of these words in file, function or text
    python -m mutants --quick              without the slow tests
"""

import argparse
import concurrent.futures
import datetime
import functools
import hashlib
import json
import os
import pathlib
import queue
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time

from tqdm import tqdm

from mutants import ROOT, Fault, functions, planted
from mutants.faults import FAULTS

STATE = (ROOT / ".cache").resolve() / "mutants"
COPIED = ("kvattn", "tests", "examples", "benchmarks", "docs")
STAGES = {"quick": ["-m", "not slow"], "slow": ["-m", "slow"]}
SECONDS = {"quick": 300, "slow": 900}
"""How long the tests of a fault may take before it counts as killed."""
PYTEST = ["-m", "pytest", "-q", "-x", "--no-header", "--tb=no", "-rfE", "-p", "no:cacheprovider"]
ALIVE = ("survived", "not quick")
PASSED, FAILED, INTERRUPTED, NO_TESTS = 0, 1, 2, 5


@functools.cache
def text_of(path: pathlib.Path, function: str = "") -> str:
    """The source of a function of a file, or of the whole file; "": it is not there."""
    source = path.read_text() if path.exists() else ""
    return "".join("".join(source.splitlines(keepends=True)[a:b]) for a, b in functions(source).get(function, []))


def key(fault: Fault, result: dict[str, str]) -> str:
    """What a result depends on."""
    file, _, test = result["test"].partition("::") if result["stage"] == "quick" else ("", "", "")
    run = {(file, test.split("[")[0])} if test else {(name.split("::")[0], "") for name in fault.tests}
    texts = [str(fault), text_of(ROOT / "kvattn" / fault.file, fault.function), *(() if test else fault.tests)]
    texts += [text_of(ROOT / name, function) for name, function in sorted(run)]
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:24]


class Copy:
    """A copy of the project whose package is changed."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        self.process: subprocess.Popen | None = None
        self.is_stopped = False
        for name in COPIED:
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        for path in ROOT.iterdir():
            if path.is_file():
                shutil.copy2(path, folder / path.name)
        if (ROOT / ".cache" / "jax").exists():
            # Compiled programs: what is added stays here.
            shutil.copytree(ROOT / ".cache" / "jax", folder / ".cache" / "jax", copy_function=_linked)
        where = self.run(["-c", "import kvattn; print(kvattn.__file__)"], 120)[1].strip()
        if where != str(folder / "kvattn" / "__init__.py"):
            raise RuntimeError(f"the copy in {folder} imports the package from {where}.")

    def run(self, arguments: list[str], seconds: float) -> tuple[int | None, str]:
        """Exit status and output of Python; None: it did not end in time."""
        if self.is_stopped:
            raise InterruptedError("stopped")
        process = self.process = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
            env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"PYTHONDONTWRITEBYTECODE": "1"},
            start_new_session=True,  # so that what tests start is ended with them
        )
        try:
            output, _ = process.communicate(timeout=seconds)
            if self.is_stopped:
                raise InterruptedError("stopped")
            return process.returncode, output
        except subprocess.TimeoutExpired:
            return None, ""
        finally:
            self._end(process)

    def stop(self) -> None:
        """Ends what runs, from another thread; nothing follows from it."""
        self.is_stopped = True
        if self.process is not None:
            self._end(self.process)

    @staticmethod
    def _end(process: subprocess.Popen) -> None:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def judge(self, fault: Fault, stages: list[str]) -> dict[str, str]:
        """Plants a fault, runs its tests, takes it out again. What saw it: a stage, and the test."""
        path = self.folder / "kvattn" / fault.file
        source = path.read_text()
        path.write_text(planted(source, fault))
        try:
            for stage in stages:
                status, output = self.run([*PYTEST, *STAGES[stage], *fault.tests], SECONDS[stage])
                if status is None:
                    return {"stage": stage, "test": "(did not end)"}
                if status in (PASSED, NO_TESTS):
                    continue
                if status in (FAILED, INTERRUPTED) or status < 0 or status > 128:
                    seen = re.search(
                        r"^(?:FAILED|ERROR) (\S+?\.py(?:::\w+(?:\[.*?\])?)?)(?= - |$)", output, re.MULTILINE
                    )
                    return {"stage": stage, "test": seen[1] if seen else f"(ended with {status})"}
                raise RuntimeError(f"pytest ended with {status} for {fault}:\n{output[-2000:]}")
            return {"stage": "survived" if stages == list(STAGES) else "not quick", "test": ""}
        finally:
            path.write_text(source)

    def control(self, tests: list[str], stage: str) -> str:
        """What is said of a test that fails without any fault; "": none does."""
        status, output = self.run([*PYTEST, *STAGES[stage], *tests], 3600)
        return "" if status in (PASSED, NO_TESTS) else output[-2000:] or f"ended with {status}"


def _linked(source: str, target: str) -> str:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
    return target


class Results:
    """What is known, a line each."""

    def __init__(self, path: pathlib.Path):
        self.path, self.known, self.lock = path, {}, threading.Lock()
        if path.exists():
            for line in path.read_text().splitlines():
                self._keep(json.loads(line))

    def _keep(self, result: dict[str, str]) -> None:
        self.known.setdefault(result["fault"], []).append(result)

    def of(self, fault: Fault) -> dict[str, str]:
        """What is known of a fault, the last result that counts; its stage is "" if there is none."""
        found = (r for r in reversed(self.known.get(str(fault), [])) if r["key"] == key(fault, r))
        return next(found, {"stage": "", "test": ""})

    def stage(self, fault: Fault) -> str:
        """Of what is known: "quick", "slow", "survived", "not quick"; "": nothing."""
        return self.of(fault)["stage"]

    def add(self, fault: Fault, result: dict[str, str]) -> None:
        result = {"key": key(fault, result), "fault": str(fault), **result}
        with self.lock:
            self._keep(result)
            with self.path.open("a") as file:
                file.write(json.dumps(result) + "\n")


def chosen(words: list[str], sample: int | None, seed: str) -> list[Fault]:
    """The faults to be planted."""
    faults = [f for f in FAULTS if not words or any(w.lower() in str(f).lower() for w in words)]
    return random.Random(seed).sample(faults, min(sample, len(faults))) if sample is not None else faults


def judge_all(faults: list[Fault], results: Results, workers: int, stages: list[str]) -> None:
    """Fills in what is not known yet; of what quick tests are known not to see, what slow ones do."""
    unknown = ("",) if stages == ["quick"] else ("", "not quick")
    todo = [fault for fault in faults if results.stage(fault) in unknown]
    if not todo:
        return
    with tempfile.TemporaryDirectory(dir=STATE, ignore_cleanup_errors=True) as folder:
        free = queue.SimpleQueue()
        copies = [Copy(pathlib.Path(folder) / str(i)) for i in range(min(workers, len(todo)))]
        for copy in copies:
            free.put(copy)

        def one(fault: Fault) -> None:
            copy = free.get()
            try:
                start = time.monotonic()
                result = copy.judge(fault, stages)
                results.add(fault, {**result, "seconds": round(time.monotonic() - start, 1)})
            finally:
                free.put(copy)

        with concurrent.futures.ThreadPoolExecutor(workers) as pool:
            jobs = [pool.submit(one, fault) for fault in todo]
            try:
                with tqdm(total=len(todo), unit="fault") as bar:
                    for job in concurrent.futures.as_completed(jobs):
                        job.result()
                        bar.update()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                for copy in copies:
                    copy.stop()
                raise


def check_controls(faults: list[Fault], results: Results) -> None:
    """The tests that killed something must pass without it, or the result says nothing."""
    killers: dict[str, set[str]] = {"quick": set(), "slow": set()}
    for fault in faults:
        result = results.of(fault)
        if result["stage"] in killers and not result["test"].startswith("("):
            killers[result["stage"]].add(result["test"])
    with tempfile.TemporaryDirectory(dir=STATE, ignore_cleanup_errors=True) as folder:
        copy = Copy(pathlib.Path(folder) / "control")
        for stage, tests in killers.items():
            if tests and (failure := copy.control(sorted(tests), stage)):
                raise SystemExit(f"These tests fail without any fault, so what they killed does not count:\n{failure}")


def report(faults: list[Fault], results: Results) -> bool:
    """Prints what was killed and what survived; whether all is as it must be."""
    stages = {fault: results.of(fault) for fault in faults}
    for fault, result in stages.items():
        print(f"{result['stage']:>9}  {fault}\n          {result['test'] or fault.equivalent}")
    real = [fault for fault in faults if not fault.equivalent]
    count = lambda *names: sum(stages[f]["stage"] in names for f in real)
    alive = [fault for fault in real if stages[fault]["stage"] in ALIVE]
    dead = [fault for fault in faults if fault.equivalent and stages[fault]["stage"] not in ALIVE]
    share = lambda n: f"{n} of {len(real)} ({100 * n / max(len(real), 1):.1f} %)"
    print(f"\nkilled by quick tests: {share(count('quick'))}; by all: {share(count('quick', 'slow'))}")
    print(f"without consequence: {len(faults) - len(real)}; survived: {len(alive)}")
    for fault in alive:
        print(f"no test sees: {fault}")
    for fault in dead:
        print(f"said to be without consequence, and is not: {fault}")
    return not alive and not dead


def main() -> int:
    """Runs what the command line asks for."""
    parser = argparse.ArgumentParser(prog="mutants", description=__doc__.splitlines()[0])
    parser.add_argument("words", nargs="*", help="only faults with one of these words in file, function or text")
    parser.add_argument("--sample", type=int, help="so many of them, chosen by the seed")
    parser.add_argument("--seed", default=datetime.date.today().isoformat(), help="default: the date")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="leave the slow tests out")
    parser.add_argument("--no-control", action="store_true", help="do not run the tests without faults")
    options = parser.parse_args()
    faults = chosen(options.words, options.sample, options.seed)
    print(f"{len(faults)} of {len(FAULTS)} faults" + (f", seed {options.seed}" if options.sample is not None else ""))
    STATE.mkdir(parents=True, exist_ok=True)
    results = Results(STATE / "results.jsonl")
    try:
        judge_all(faults, results, options.workers, ["quick"] if options.quick else list(STAGES))
        if not options.no_control:
            check_controls(faults, results)
    except KeyboardInterrupt:
        print(f"interrupted; what is known is in {results.path}")
        return 130
    return 0 if report(faults, results) else 1


if __name__ == "__main__":
    sys.exit(main())
