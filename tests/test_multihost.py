"""Several processes: each reads its parts of a checkpoint, all get one device's tokens, none outlives the others.

The processes are those of `examples/multihost_decode.py`, on this machine. Nothing here sleeps: lines of output and the
ends of processes are waited for, with deadlines, and every process is ended by its id.
"""

import argparse
import collections
import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import queue
import re
import select
import signal
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

import kvattn
from kvattn.families import rules
from kvattn.models import describe, from_pretrained
from kvattn.models.parameters import parameters_of
from kvattn.models.pretrained import _Names
from kvattn.models.tensors import in_folder

ROOT = pathlib.Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden" / "hf"
FOLDERS = sorted(path.name for path in GOLDEN.iterdir() if path.is_dir())
SPLIT = re.compile(r"(q_proj|o_proj|gate_proj|up_proj|down_proj)\.weight")
"""Of a Llama with fewer key/value heads than devices."""


# Parts of a checkpoint ----------------------------------------------------------------------------


@functools.cache
def whole(name):
    """The parameters of one device, which other tests hold against transformers."""
    return parameters_of(from_pretrained(GOLDEN / name, dtype=np.float32))


def parts_of(shape, parts):
    """Every axis that divides, and the index of each of its parts."""
    for axis, size in enumerate(shape):
        if size % parts == 0:
            for start in range(0, size, size // parts):
                yield (
                    axis,
                    (
                        *(slice(None),) * axis,
                        slice(start, start + size // parts),
                        *(slice(None),) * (len(shape) - axis - 1),
                    ),
                )


def parts_read(name, parts):
    """Compares the parts of every parameter with slices of it.

    Returns:
        {parameter: {axis: bytes read for all parts}}, {parameter: bytes read for all of it}.
    """
    read, found, total = [], {}, {}
    tensors, blueprint = in_folder(GOLDEN / name, lambda _, nbytes: read.append(nbytes)), describe(GOLDEN / name)
    names = _Names(blueprint, tensors)  # those of files may begin with more than those of the rules

    def assert_part(rule, parameter, index):
        read.clear()
        made = rule.read(lambda source, where: tensors.read(names(source), where), index)[parameter]
        np.testing.assert_array_equal(made.astype(np.float32), whole(name)[parameter][index])
        return sum(read)

    for rule in blueprint.rules:
        for parameter, layout in rule.makes.items():
            total[parameter] = assert_part(rule, parameter, (slice(None),) * len(layout.shape))
            found[parameter] = collections.Counter()
            for axis, index in parts_of(layout.shape, parts):
                found[parameter][axis] += assert_part(rule, parameter, index)
    tensors.close()
    return found, total


@pytest.mark.parametrize("name", FOLDERS)
def test_a_part_is_a_slice_of_the_whole(name):
    found, _ = parts_read(name, 2)
    assert any(found.values())


def test_parts_read_no_more_than_the_whole():
    """By heads and by the hidden size each number is read once; features of every head cost all that lies between."""
    for name in ("llama2", "bloom", "gpt2", "falcon40b", "mpt"):
        found, total = parts_read(name, 2)
        for parameter, axes in found.items():
            heads = {"query": 1, "key": 1, "value": 1, "out": 0, "up": 1, "gate": 1, "down": 0}
            kind, what = parameter.split(".")[-2:]
            if what == "kernel" and kind in heads and heads[kind] in axes:
                assert axes[heads[kind]] == total[parameter], parameter


def test_alternating_outputs_are_read_once():
    """gpt-oss stores gate and up in one tensor: a device needs both of a range."""
    found, total = parts_read("gpt_oss", 2)
    tensor = load_file(GOLDEN / "gpt_oss" / "model.safetensors")["model.layers.0.mlp.experts.gate_up_proj"]
    assert found["layers.0.mlp.gate"][2] == total["layers.0.mlp.gate"] == tensor.nbytes


@pytest.mark.parametrize("parts", [2, 4])
def test_parts_of_packed_experts(tmp_path, parts):
    """Blocks of 32 numbers share a scale; parts need not begin with one."""
    config = json.loads((GOLDEN / "gpt_oss" / "config.json").read_text())
    config |= {"intermediate_size": 96, "quantization_config": {"quant_method": "mxfp4"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    packed = [rule for rule in describe(tmp_path).rules if rule.packed > 1]
    assert len(packed) == 2 * config["num_hidden_layers"]
    for rule in packed[:2]:
        rng = np.random.default_rng(0)
        stored = {source: rng.integers(100, 140, shape, np.uint8) for source, shape in rule.sources.items()}
        read = lambda source, where, stored=stored: stored[source][np.ix_(*where)]
        for parameter, layout in rule.makes.items():
            expected = rule.read(read, (slice(None),) * 3)[parameter]
            assert expected.shape == layout.shape and len(np.unique(expected)) > 100
            for _, index in parts_of(layout.shape, parts):
                np.testing.assert_array_equal(rule.read(read, index)[parameter], expected[index])


WITHIN = rules.Layout.within
FAULTS = {
    "entries": lambda self, index: WITHIN(dataclasses.replace(self, entries={}), index),
    "the part": lambda self, index: WITHIN(self, (slice(None),) * len(index)),
    "the axes": lambda self, index: WITHIN(dataclasses.replace(self, axes=self.axes[::-1]), index),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_in_parts_are_found(fault, monkeypatch):
    whole("bloom")
    monkeypatch.setattr(rules.Layout, "within", FAULTS[fault])
    with pytest.raises((AssertionError, ValueError, IndexError)):
        parts_read("bloom", 2)


@pytest.mark.parametrize("name", ["llama2", "gpt_oss"])
def test_a_mesh_reads_the_file_once(name):
    """Also where several devices hold the same, as rows are split over the other axis."""
    read, mesh = collections.Counter(), jax.make_mesh((2, 2), ("data", "model"))
    from_pretrained(GOLDEN / name, mesh=mesh, on_read=lambda source, nbytes: read.update({source: nbytes}))
    assert read == {source: x.nbytes for source, x in load_file(GOLDEN / name / "model.safetensors").items()}


def test_what_a_callback_raises_ends_the_loading():
    class Enough(ValueError):
        pass

    def stop(name, nbytes):
        raise Enough

    with pytest.raises(Enough):
        from_pretrained(GOLDEN / "llama3", on_read=stop)


# Processes ----------------------------------------------------------------------------------------


@pytest.fixture
def example(monkeypatch):
    """The modules of examples/."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import multihost_decode
    import processes

    return argparse.Namespace(processes=processes, decode=multihost_decode)


def python(code):
    return [sys.executable, "-c", code]


def is_gone(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


HANGS = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); signal.pause()"


def test_none_outlives_a_failure(example, tmp_path, capfd):
    """The others have their grace; one that ignores signals is killed."""
    commands = {0: python(HANGS), 1: python("import sys; sys.exit('no such file')"), 2: python("pass")}
    ended = example.processes.run(commands, tmp_path, grace=0.2)
    assert [process.handle.returncode for process in ended] == [-signal.SIGKILL, 1, 0]
    assert all(is_gone(process.handle.pid) for process in ended)
    said = capfd.readouterr().err
    assert f"{ended[1]} ended with status 1\n    no such file\n" in said
    assert f"{ended[0]} did not end within 0 s of the first failure: killed" in said
    assert f"{ended[2]}" not in said


def test_none_outlives_an_interruption(example, tmp_path):
    def interrupt(process, later):
        started.append(process.handle.pid)
        raise KeyboardInterrupt

    started = []
    example.processes.report, usual = interrupt, example.processes.report
    try:
        with pytest.raises(KeyboardInterrupt):
            example.processes.run(
                {0: python(HANGS), 1: python("import os; print(os.getppid()); 1 / 0")}, tmp_path, grace=60
            )
    finally:
        example.processes.report = usual
    children = pathlib.Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children")
    assert is_gone(started[0])
    if children.is_file():
        commands = [pathlib.Path(f"/proc/{pid}/cmdline").read_text() for pid in children.read_text().split()]
        assert not any("signal.pause" in command for command in commands)


def test_a_process_ends_with_its_launcher(example, tmp_path):
    """Also if that is killed, which nothing in it can answer."""
    code = (
        f"import sys, pathlib; sys.path.insert(0, {str(ROOT / 'examples')!r}); import processes\n"
        f"processes.run({{0: [sys.executable, '-c', {WAITS!r}]}}, pathlib.Path({str(tmp_path)!r}), grace=60)"
    )
    with subprocess.Popen(python(code), stdout=subprocess.PIPE, text=True, env=ENVIRONMENT) as launcher:
        try:
            pid = int(launcher.stdout.readline())
            end = os.pidfd_open(pid)
            launcher.kill()
            assert ended_within(end, 30)
            os.close(end)
        finally:
            launcher.kill()


WAITS = "import os, processes, signal; processes.end_with_launcher(); print(os.getpid(), flush=True); signal.pause()"


def test_another_port(example, monkeypatch, capfd):
    """Somebody took the port between the moment it was found free and that of its use."""
    tried = []

    def commands(args, more):
        tried.append(more)
        return {0: python("import sys; sys.exit('Error in bind: Address already in use')" if len(tried) < 3 else "")}

    monkeypatch.setattr(example.decode, "commands", commands)
    args = argparse.Namespace(checkpoint=GOLDEN / "llama3", coordinator=None, heartbeat=1)
    usual = signal.getsignal(signal.SIGTERM)
    try:
        assert example.decode.launch(args) == 0 and len(tried) == 3
        tried[:] = []
        args.coordinator = "10.0.0.1:1234"  # the port is not ours to choose
        assert example.decode.launch(args) == 1 and len(tried) == 1
    finally:
        signal.signal(signal.SIGTERM, usual)


# The job ------------------------------------------------------------------------------------------

ENVIRONMENT = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'examples'}"}


def ended_within(pidfd, seconds):
    """Whether a process ended in that time."""
    return bool(select.select([pidfd], [], [], seconds)[0])


ROUND = re.compile(r"process (\d+) \(pid (\d+)\): round (\d+)")


class Job:
    """The example, running: its lines as they come, and its processes, none of which is left in the end."""

    def __init__(self, *arguments):
        command = [sys.executable, ROOT / "examples" / "multihost_decode.py", *map(str, arguments)]
        self.launcher = subprocess.Popen(
            command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8"
        )
        self.pids, self.ends, self.lines, self.said = {}, {}, [], ""
        self._lines = queue.SimpleQueue()
        self._readers = [threading.Thread(target=read, daemon=True) for read in (self._read_lines, self._read_errors)]

    def __enter__(self):
        for reader in self._readers:
            reader.start()
        return self

    def __exit__(self, *_):
        self.launcher.kill()
        self.launcher.wait()
        for pid in self.pids.values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for reader in self._readers:
            reader.join()
        self.launcher.stdout.close()
        self.launcher.stderr.close()
        for end in self.ends.values():
            os.close(end)

    def _read_lines(self):
        for line in self.launcher.stdout:
            self._lines.put(line)
        self._lines.put(None)

    def _read_errors(self):
        self.said = self.launcher.stderr.read()

    def until(self, number, round_, seconds=200):
        """Waits until process `number` begins a round."""
        deadline = time.monotonic() + seconds
        while True:
            line = self._lines.get(timeout=max(deadline - time.monotonic(), 0))
            assert line is not None, self.finish()
            self.lines.append(line)
            found = ROUND.match(line)
            if found:
                who, pid, began = map(int, found.groups())
                if who not in self.pids:
                    self.pids[who], self.ends[who] = pid, os.pidfd_open(pid)
                if who == number and began >= round_:
                    return

    def finish(self, seconds=200):
        """Its exit status and what it said on standard error."""
        status = self.launcher.wait(seconds)
        for reader in self._readers:
            reader.join(seconds)
        return status, self.said


def golden(name, rows, steps):
    """Prompts of different lengths, and the tokens that transformers continues them by."""
    with np.load(GOLDEN / name / "golden.npz") as given:
        prompts = [given["prompts"][row, :length].tolist() for row, length in enumerate(given["lengths"])]
        greedy = given["greedy"][:, :steps].tolist()
    return [prompts[row % 3] for row in range(rows)], [greedy[row % 3] for row in range(rows)]


def run(tmp_path, name, num_processes, num_devices, rows, steps, *more):
    """The report of a run."""
    prompts, expected = golden(name, rows, steps)
    out = tmp_path / "report.json"
    settings = {
        "--processes": num_processes, "--devices": num_devices, "--checkpoint": GOLDEN / name, "--out": out,
        "--prompts": json.dumps(prompts), "--max-new-tokens": steps, "--rounds": 1, "--heartbeat": 60,
    }  # fmt: skip
    with Job(*[word for pair in settings.items() for word in pair], *more) as job:
        status, said = job.finish(400)
        assert status == 0, said
    report = json.loads(out.read_text())
    assert report["processes"] == num_processes and report["devices"] == num_processes * num_devices
    assert report["tokens"] == expected
    return report


def test_two_processes(tmp_path):
    """Two key/value heads, four devices: caches by batch; queries and MLP by heads, half of which a process reads."""
    report = run(tmp_path, "llama3", 2, 2, 4, 4, "--no-check")
    assert report["by"] == "batch" and report["mesh"] == {"data": 1, "model": 4}
    stored = load_file(GOLDEN / "llama3" / "model.safetensors")
    share = sum(x.nbytes // (2 if SPLIT.search(name) else 1) for name, x in stored.items())
    assert report["bytes_read"] == [share, share] and share < sum(x.nbytes for x in stored.values())


SCHEMES = {
    "heads": ("llama2", "2x4", "Explicit"),
    "batch": ("falcon7b", "1x8", "Auto"),
    "sequence": ("llama3", "1x8", "Explicit"),
}


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("by", SCHEMES)
@pytest.mark.parametrize(("num_processes", "num_devices"), [(1, 8), (2, 4), (4, 2)])
def test_one_devices_numbers(tmp_path, by, num_processes, num_devices):
    name, mesh, axes = SCHEMES[by]
    report = run(tmp_path, name, num_processes, num_devices, 8, 8, "--mesh", mesh, "--axes", axes, "--by", by)
    assert report["by"] == by
    assert report["same_tokens"] and report["logits_difference"] < 1e-5
    if by == "heads" and num_processes == 4:  # two of the four parts of each kernel
        stored = load_file(GOLDEN / name / "model.safetensors")
        split = re.compile(r"_proj\.weight")
        share = sum(x.nbytes // (2 if split.search(source) else 1) for source, x in stored.items())
        assert report["bytes_read"] == [share] * 4


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("victim", [0, 1], ids=["coordinator", "peer"])
def test_a_killed_peer_ends_all(victim):
    """Within the heartbeat and ten seconds, each with a message; by themselves."""
    heartbeat = 5
    settings = ("--processes", 3, "--devices", 1, "--mesh", "3x1", "--checkpoint", GOLDEN / "llama3")
    settings = (*settings, "--prompts", json.dumps(golden("llama3", 3, 1)[0]), "--rounds", 100000, "--no-check")
    with Job(*settings, "--heartbeat", heartbeat) as job:
        for number in range(3):
            job.until(number, 2)
        os.kill(job.pids[victim], signal.SIGKILL)
        deadline = time.monotonic() + heartbeat + 10
        for end in job.ends.values():
            assert ended_within(end, max(deadline - time.monotonic(), 0))
        status, said = job.finish(30)
    assert status == 1
    assert f"process {victim} (pid {job.pids[victim]}) was ended by SIGKILL" in said
    for number in {0, 1, 2} - {victim}:
        line = next(line for line in said.splitlines() if line.startswith(f"process {number} "))
        # The coordinator knows who is silent. It may be gone before the others have heard of it.
        known = f"no heartbeat of process {victim}" in line
        assert known or (number != 0 and "the coordinator (process 0) is gone" in line), said
    assert "killed" not in said
    assert all(is_gone(pid) for pid in job.pids.values())


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_killed_launcher_ends_all():
    settings = ("--processes", 2, "--devices", 1, "--checkpoint", GOLDEN / "llama3", "--rounds", 100000, "--no-check")
    with Job(*settings, "--heartbeat", 60) as job:
        for number in range(2):
            job.until(number, 2)
        job.launcher.kill()
        assert all(ended_within(end, 30) for end in job.ends.values())


# Sampling, and what goes wrong in all of them -----------------------------------------------------

PROGRAM = """
import sys, json, processes, jax, numpy as np, kvattn
port, number, folder, prompts = sys.argv[1], int(sys.argv[2]), sys.argv[3], json.loads(sys.argv[4])
processes.end_with_launcher()
jax.config.update("jax_num_cpu_devices", 2)
jax.distributed.initialize(f"127.0.0.1:{port}", 2, number, coordinator_bind_address=f"127.0.0.1:{port}")
model = kvattn.models.from_pretrained(folder, mesh=jax.make_mesh((2, 2), ("data", "model")))
said = {"tokens": kvattn.generate(model, prompts, 6, temperature=0.9, top_k=20, seed=7, stop_tokens=3)}
try:
    kvattn.generate(model, prompts, 6, capacity=8)
except kvattn.errors.CapacityError as error:
    said["too long"] = str(error)
step = jax.jit(lambda cache: model(np.zeros((4, 3), np.int32), cache)[1])
caches = step(step(model.make_cache(4, 4)))
assert not caches[0].status.is_fully_addressable and not caches[0].status.is_fully_replicated
try:
    caches[0].check()
except kvattn.errors.CapacityError as error:
    said["overflow"] = str(error)
print(json.dumps(said), file=sys.stderr)
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_sampling_and_errors(example, tmp_path, monkeypatch):
    """Rows lie on different processes; every one of them gets all tokens, and the same error."""
    prompts = golden("llama3", 4, 1)[0]
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    command = [*python(PROGRAM), str(example.processes.free_port())]
    more = [str(GOLDEN / "llama3"), json.dumps(prompts)]
    ended = example.processes.run({i: [*command, str(i), *more] for i in range(2)}, tmp_path, grace=60)
    assert [process.handle.returncode for process in ended] == [0, 0], [process.written for process in ended]
    first, second = (json.loads(process.written.splitlines()[-1]) for process in ended)
    assert first == second
    alone = from_pretrained(GOLDEN / "llama3")
    assert first["tokens"] == kvattn.generate(alone, prompts, 6, temperature=0.9, top_k=20, seed=7, stop_tokens=3)
    assert "rows [0, 1, 2, 3] of a cache of 8 slots hold [0, 0, 0, 0] tokens" in first["too long"]
    assert "rows [0, 1, 2, 3]" in first["overflow"]
