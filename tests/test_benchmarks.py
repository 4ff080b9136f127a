"""The benchmark for a few minutes on a GPU, without a GPU: what is kept, values in miniature, what figures say."""

import json
import random
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvattn.pallas
from kvattn.attend import api
from kvattn.pallas import gpu_decode, tuning

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "benchmarks"))

import gpu_cases  # noqa: E402
import gpu_clock  # noqa: E402
import gpu_peers  # noqa: E402
import gpu_report  # noqa: E402
import gpu_suite  # noqa: E402
import gpu_work  # noqa: E402
import on_device  # noqa: E402
import runner  # noqa: E402

SCRIPT = ROOT / "benchmarks" / "on_device.py"
STAND_INS = {
    ("right", ""): "ok",
    ("hangs", ""): "hung",
    ("wrong", ""): "wrong",
    ("dies", ""): "died",
    ("raises", ""): "raised",
    ("right too", ""): "ok",
    ("timed", ""): "ok",
    ("needs what hangs", ""): "not run",
    ("hangs before it begins", "a"): "hung",
    ("hangs before it begins", "b"): "hung",
    ("timed too", ""): "ok",
    ("peers", "fast peer"): "ok",
    ("peers", "peer that dies"): "died",
    ("peers", "peer that hangs"): "hung",
    ("peers", "peer that is not there"): "not there",
    ("peers", "peer that raises"): "raised",
    ("peers", "peer with an end"): "ok",
    ("peers", "slow peer"): "ok",
    ("takes an hour", ""): "not run",
}


class Kept:
    """A report that keeps what it is told."""

    def __init__(self):
        self.part, self.ends = "", []

    def begin(self, part):
        self.part = part

    def end(self, status, **figures):
        self.ends.append((self.part, status, figures))


# Nothing is lost ------------------------------------------------------------------------------------------------------


def started(out, *arguments):
    return subprocess.Popen(
        [sys.executable, SCRIPT, "--suite", "stand_ins", "--out", out, *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT,
    )  # fmt: skip


def test_every_fault_is_reported_and_the_rest_is_measured(tmp_path):
    with started(tmp_path, "--minutes", 1) as process:
        said = process.communicate(timeout=60)[0]
    assert process.returncode == 1, said
    records = runner.read(tmp_path / "results.jsonl")
    found = {(r["task"], r["part"]): r for r in records if "status" in r}
    assert {name: r["status"] for name, r in found.items()} == STAND_INS
    assert sum("status" in r for r in records) == len(STAND_INS)
    assert found["dies", ""]["reason"] == "by SIGSEGV" and "a last word" in found["dies", ""]["said"]
    assert "ValueError: it is meant so" in found["raises", ""]["reason"] and found["wrong", ""]["error"] == 1.0
    assert "'hangs' came out as 'hung'" in found["needs what hangs", ""]["reason"]
    assert "it takes about 3600 s" in found["takes an hour", ""]["reason"]
    # Values before times, ours before peers.
    stages = [r["stage"] for r in records if "stage" in r]
    assert stages == sorted(stages, key=["values", "times", "peers", "never"].index)
    assert "7 ok" in said and "7 ok" in (tmp_path / "table.txt").read_text()
    assert "a last word" in (tmp_path / "log.txt").read_text()
    assert len(list(tmp_path.iterdir())) <= 8


def test_minutes_are_kept(tmp_path):
    """What hangs may not outlast them, whatever its own limit, and what does not fit is not begun."""
    with started(tmp_path, "--minutes", 0.05, "--only", "takes an hour", "right") as process:
        process.communicate(timeout=60)
    records = [r for r in runner.read(tmp_path / "results.jsonl") if "status" in r]
    assert {r["task"]: r["status"] for r in records}["takes an hour"] == "not run"
    assert records[-1]["at"] <= 3

    minutes, start = 0.06, time.monotonic()
    run = runner.Run("stand_ins", {}, tmp_path, minutes, environment={}, tell=lambda _: None)
    run.all([runner.Stage("values", (runner.Task("hangs", 0.01, 100),))])
    assert time.monotonic() - start <= 60 * minutes
    assert run.records.lines[-1]["status"] == "not run" and "minutes were over" in run.records.lines[-1]["reason"]


def alive(pid):
    """Whether a process runs; one that waits to be buried does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="processes end with their parent on Linux")
def test_killed_at_any_moment(tmp_path):
    """The file holds everything that was said to be finished, and nothing that was started runs on."""
    moments = random.Random(20261126)
    folders = [tmp_path / str(n) for n in range(3)]
    running = [started(folder, "--minutes", 1) for folder in folders]
    heard = []
    for process in running:
        first = process.stdout.readline()
        time.sleep(moments.uniform(0, 0.7))
        # The last one is asked to end, and has the time for its table.
        process.send_signal(signal.SIGTERM if process is running[-1] else signal.SIGKILL)
        heard.append(first + process.stdout.read())
        process.stdout.close()
        process.wait()
    assert [(folder / "table.txt").exists() for folder in folders] == [False, False, True]
    stopped = time.monotonic()
    pids = []
    for folder, said in zip(folders, heard, strict=True):
        records = runner.read(folder / "results.jsonl")
        kept = {r["task"] + (", " if r["part"] else "") + r["part"]: r["status"] for r in records if "status" in r}
        lines = [line.split(" s  ", 1)[1] for line in said.splitlines() if " s  " in line]
        assert lines
        for line in lines:
            status, name = line[:9].strip(), line[10:].split(":")[0]
            assert kept[name] == status
        pids += [r["pid"] for r in records if "pid" in r]
    while any(map(alive, pids)) and time.monotonic() < stopped + 5:
        time.sleep(0.05)
    assert pids and not any(map(alive, pids))


def test_a_line_that_was_not_written_to_its_end(tmp_path):
    records = runner.Records(tmp_path / "results.jsonl")
    records.add({"task": "a", "part": "", "status": "ok"})
    records.add({"task": "b", "part": "", "status": "hung"})
    with records.path.open("a") as file:
        file.write('{"task": "c", "par')
    assert [r["task"] for r in runner.read(records.path)] == ["a", "b"]
    assert runner.finished(runner.read(records.path)) == {("a", "")}


def test_what_is_done_is_left_out_and_what_cannot_run_says_so(tmp_path):
    stages = [runner.Stage("values", (runner.Task("right", 0.01, 20), runner.Task("right too", 0.01, 20)))]
    quiet = {"environment": {}, "tell": lambda _: None}
    run = runner.Run("stand_ins", {}, tmp_path, 1, done=[("right", "")], **quiet)
    run.all(stages)
    assert [r["task"] for r in run.records.lines if "status" in r] == ["right too"]
    with pytest.raises(runner.UnfitError, match="no device"):
        runner.Run("stand_ins", {"unfit": True}, tmp_path, 1, **quiet).all(stages)
    with pytest.raises(runner.UnfitError, match="three processes in a row did not start"):
        runner.Run("no_such_suite", {}, tmp_path, 1, **quiet).all(stages)


# The plan -------------------------------------------------------------------------------------------------------------


def options(mode="device", peers=gpu_cases.PEERS, more=False):
    return {"mode": mode, "peers": list(peers), "all": more}


def test_plan(capsys):
    assert on_device.main(["--plan"]) == 0
    said = capsys.readouterr().out
    total = float(said.splitlines()[-1].removesuffix(" minutes in all"))
    assert 5 < total <= 12
    stages = gpu_suite.stages(options())
    assert [stage.name for stage in stages] == ["first", "values", "times", "whole", "peers", "sizes"]
    names = [task.name for stage in stages for task in stage.tasks]
    assert len(set(names)) == len(names) and all(name in said for name in names)
    assert [stage.name for stage in stages if stage.quiet] == ["times", "whole", "peers", "sizes"]
    for stage in gpu_suite.stages(options(more=True)):
        for task in stage.tasks:
            assert set(task.needs) <= set(names[: names.index("copy")]), task
            assert stage.name in ("first", "values") or task.name == "copy" or len(task.needs) == 2, task
    assert on_device.main(["--plan", "--values", "--only", "Float8"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("    ")]
    assert len(lines) > 5 and all("values" in line and "Float8" in line for line in lines)


def test_kernels_of_whole_steps_are_told_apart():
    kernels = {"kvattn_gpu_append_x": 2.0, "kvattn_gpu_decode_x": 5.0, "kvattn_gpu_merge_x": 3.0, "loop_fusion": 1.5}
    row = {"task": "whole: a step", "part": "", "status": "ok", "kernels": kernels, "kernels_us": 11.5, "error": 2e-3}
    assert gpu_report.whole_table([row])[-1].split() == [
        "a",
        "step",
        "11.5",
        "2.0",
        "5.0",
        "3.0",
        "1.5",
        "(1)",
        "2e-03",
    ]
    assert gpu_report.whole_table([row | {"kernels": {}}]) == []


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--only", "no such task"], "no task has 'no such task' in its name"),
        (["--peers", "jax.nn", "Nobody"], "no peer begins with 'Nobody'"),
        (["--wheels", "docs"], "holds neither wheels"),
    ],
)
def test_what_means_nothing_is_refused(arguments, why, capsys):
    with pytest.raises(SystemExit) as end:
        on_device.main([*arguments, "--plan"])
    assert why in f"{end.value} {capsys.readouterr().err}"
    assert on_device.main(["--peers", "none", "--plan"]) == 0
    assert "peers" not in capsys.readouterr().out


def test_cases():
    names = [case.name for case in gpu_cases.CASES]
    assert len(set(names)) == len(names) and 10 <= sum(case.key for case in gpu_cases.CASES) < len(names)
    assert all(case.key for case in gpu_cases.CASES if case.peers or case.tuned)
    for case in gpu_cases.CASES:
        lengths = case.lengths()
        assert lengths.shape == (case.batch,) and (lengths > 0).all() and (lengths <= case.slots).all()
        assert all(goal.other in ("", *names) for goal in case.goals)
        if case.valid == "zipf":
            assert lengths.sum() == 32 * 4096 and lengths.max() > 7 * 4096
            assert case.small().lengths().sum() <= 2 * case.small().mean
    assert set(gpu_cases.ALL_PEERS) == set(gpu_peers.PEERS)
    # The kernel's own candidates.
    configs = {tuning.GpuConfig(*sizes) for sizes in gpu_cases.SIZES.values()}
    assert configs == set(tuning.CANDIDATES["mosaic_gpu"])
    values = [gpu_cases.FIRST, *gpu_cases.VALUES]
    assert len({case.name for case in values}) == len(values)
    assert set(gpu_cases.STORES) == set(gpu_work.CODECS) and set(gpu_cases.RULES) == set(gpu_work.RULES)
    assert set(gpu_cases.POLICIES) == set(gpu_work.kernel_cases.POLICIES)
    for field, every in (("store", gpu_cases.STORES), ("rule", gpu_cases.RULES), ("shape", gpu_cases.SHAPES)):
        assert {getattr(case, field) for case in values} == set(every)
    assert max(case.new for case in values) == 8


def test_full_sizes_are_taken():
    with kvattn.pallas.interpret():
        for case in gpu_cases.CASES:
            assert gpu_work.of_shapes(gpu_decode.unsupported, case) is None, case


def test_what_travels_is_small():
    """The working tree, as it is copied: tracked files and those that git does not ignore."""
    try:
        asked = subprocess.run(
            ["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"this is no git repository: {error}")
    files = [ROOT / name for name in asked.stdout.split("\0") if name]
    assert SCRIPT in files
    assert sum(file.stat().st_size for file in files if file.is_file() and not file.is_symlink()) < 64 << 20


def test_nothing_needs_to_be_installed(tmp_path):
    """The process that starts the others has no JAX, and those need jax, numpy and jaxtyping only."""
    code = f"""
import runpy, sys
absent = "flax matplotlib optax orbax pytest rich safetensors scipy tokenizers torch tqdm typer hypothesis".split()
sys.path = [p for p in sys.path if p != {str(ROOT)!r}]
sys.path.insert(0, {str(SCRIPT.parent)!r})
sys.modules |= dict.fromkeys([*absent, "jax", "kvattn"])
sys.argv = [{str(SCRIPT)!r}, "--plan"]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as end:
    assert not end.code
del sys.modules["jax"], sys.modules["kvattn"], sys.modules["scipy"]
sys.path.insert(0, {str(ROOT)!r})
import gpu_work
print(gpu_work.kvattn.__file__)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    *_, minutes, where = done.stdout.splitlines()
    assert minutes.endswith("minutes in all") and where.startswith(str(ROOT))


def test_wheels(tmp_path):
    """Peers come out of a folder of wheels, and FA3's extension is found there or in one of them."""
    wheels, target = tmp_path / "wheels", tmp_path / "target"
    wheels.mkdir()
    assert on_device.unpacked(wheels, str(target)) == (None, None)
    with zipfile.ZipFile(wheels / "flashinfer-0-py3-none-any.whl", "w") as archive:
        archive.writestr("flashinfer/__init__.py", "")
        archive.writestr("vllm/_vllm_fa3_C.abi3.so", "")
    packages, fa3 = on_device.unpacked(wheels, str(target))
    assert fa3 == str(target / "vllm" / "_vllm_fa3_C.abi3.so")
    assert gpu_suite.environment({"mode": "device", "packages": packages})["PYTHONPATH"].startswith(str(target))
    assert (Path(packages) / "flashinfer" / "__init__.py").exists()
    (wheels / "_vllm_fa3_C.abi3.so").write_text("")
    assert on_device.unpacked(wheels, str(target))[1] == str(wheels / "_vllm_fa3_C.abi3.so")


# Values ---------------------------------------------------------------------------------------------------------------


def test_dry_run_of_one(tmp_path):
    """A real case through a real process, its values looked at in the interpreter."""
    done = subprocess.run(
        [sys.executable, SCRIPT, "--dry-run", "--only", "one slot", "--minutes", "4", "--out", tmp_path],
        capture_output=True, text=True, timeout=280, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    (record,) = (r for r in runner.read(tmp_path / "results.jsonl") if "status" in r)
    assert record["status"] == "ok" and 0 <= record["error"] < 1e-2 and record["compile"]["first_call"] > 0
    assert "values: 1 of 1 right" in done.stdout


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_dry_run_of_all(tmp_path):
    command = [sys.executable, SCRIPT, "--dry-run", "--all", "--minutes", "110", "--out", tmp_path]
    peers = ["--peers", "kvattn xla", "jax.nn xla", "einsum", "JAX Triton", "FA3"]
    done = subprocess.run([*command, *peers], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "not run" not in done.stdout


NAMES = [
    task.name for stage in gpu_suite.stages(options("lower", more=True)) for task in stage.tasks
    if stage.name != "sizes"
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_program_is_built(name):
    """For a GPU, at full size, down to Mosaic's own code; the interpreter never gets there."""
    report = Kept()
    gpu_suite.run(name, [""], report, options("lower"))
    ((_, status, figures),) = report.ends
    assert status == "ok" and figures["kernels_lowered"] == 2


@pytest.mark.slow
def test_sizes_are_built():
    case, report = gpu_cases.CASES[0], Kept()
    parts = [name for name, sizes in gpu_cases.SIZES.items() if sizes in ((64, 2, 1), (128, 2, 1), (128, 6, 3))]
    gpu_work.sizes(case, parts, report, "lower")
    assert sorted(status for _, status, _ in report.ends) == ["not there", "ok", "ok"]


def test_wrong_values_are_seen():
    request = gpu_work.value_request(gpu_cases.ValueCase("bfloat16", "heads of 80", rule="mass"), jnp.zeros_like)
    out, lse, mass = (np.array(x) for x in api.attend(request, "xla"))
    figures = gpu_work.judged(request, out, lse, mass)
    assert figures["error"] <= figures["error_of_16_bits"]
    for index, change, why in (
        (0, lambda x: x * 1.05, "max error"),
        (0, lambda x: x + 1e-9 * (x == 0), "not 0"),
        (0, lambda x: x * np.nan, "not finite"),
        (1, lambda x: x + 0.01, "lse is off"),
        (2, lambda x: x * 1.01, "Not equal to tolerance"),
    ):
        result = [out, lse, mass]
        result[index] = change(result[index])
        with pytest.raises(gpu_work.Wrong, match=why):
            gpu_work.judged(request, *result)


def test_errors_at_full_size():
    case = gpu_cases.CASES[0].small()
    expected = np.ones((len(case.some_rows()), 1, case.heads, case.size), np.float32)
    out = np.ones((case.batch, 1, case.heads, case.size), np.float32)
    assert gpu_work.error_of(case, out, expected) == 0
    out[-1, 0, 3] *= 1.5
    assert gpu_work.error_of(case, out, expected) == pytest.approx(0.5)
    out[0, 0, 0, 0] = np.nan
    assert gpu_work.error_of(case, out, expected) == np.inf
    with pytest.raises(gpu_work.Wrong, match=r"beside NaN is off by 5\.0e-02"):
        gpu_work.near(0.05, what="the output beside NaN")


# Times ----------------------------------------------------------------------------------------------------------------


def small(name):
    case = next(case for case in gpu_cases.CASES if case.name == name)
    return gpu_cases.dataclasses.replace(case, batch=1, slots=64, heads=2, kv_heads=1, size=64)


@pytest.fixture
def by_xla(monkeypatch):
    """Everything that happens on a device, with what XLA computes here in place of the kernel."""
    monkeypatch.setattr(gpu_work.gpu_decode, "attend", lambda request, config=None: api.attend(request, "xla"))
    monkeypatch.setattr(gpu_clock, "COLD", 0)
    monkeypatch.setattr(gpu_clock, "COPY_BYTES", 1 << 20)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def test_times_and_peers(by_xla):
    row = gpu_work.times(small(gpu_cases.BASE), "device")
    assert row["us"] == row["span_us"] > 0 and "saw no kernel" in row["no_kernels"] and row["valid_bytes"] == 16384
    assert row["compile"]["first_call"] > row["compile"]["compile"] > 0
    report = Kept()
    gpu_work.peers(small(gpu_cases.BASE), ["jax.nn xla", "FA3"], report, "device", None)
    (name, status, figures), (_, other, reason) = report.ends
    assert (name, status, other) == ("jax.nn xla", "ok", "not there") and figures["span_us"] > 0 and reason["reason"]


ON_DEVICE = {
    "values: Float8, GQA, float32 queries": [""],
    "values: bfloat16, GQA, pages of 16, float32 queries, 3 tokens, slopes": [""],
    "values: step of H2O": [""],
    "values: arrays, lengths per head": [""],
    "copy": [""],
    "time: bf16 32xZipf": [""],
    "time: int4 32x4096": [""],
    "peers: bf16 32x4096, pages of 64": ["kvattn xla", "jax.nn xla", "einsum"],
    "sizes: bf16 32x4096": list(gpu_cases.SIZES)[:2],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ON_DEVICE)
def test_what_runs_on_a_device(name, by_xla, monkeypatch):
    """Every kind of task to its end, as on a GPU as far as layouts and dtypes go, the reference for the kernel."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(gpu_work.gpu_decode, "attend", lambda request, config=None: api.attend(request, "reference"))
    monkeypatch.setattr(gpu_work, "REPEATS", 2)
    sizes = {"batch": 2, "slots": 128, "heads": 2, "kv_heads": 1, "size": 64, "mean": 60}
    cases = {case.name: gpu_cases.dataclasses.replace(case, **sizes) for case in gpu_cases.CASES}
    monkeypatch.setattr(gpu_suite, "BY_NAME", cases)
    report = Kept()
    gpu_suite.run(name, ON_DEVICE[name], report, options())
    assert [(part, status) for part, status, _ in report.ends] == [(part, "ok") for part in ON_DEVICE[name]]
    json.dumps(report.ends)


def test_a_wrong_kernel_is_not_timed(by_xla, monkeypatch):
    right = api.attend
    monkeypatch.setattr(gpu_work.gpu_decode, "attend", lambda r, c=None: (right(r, "xla")[0] * 1.1, None, None))
    monkeypatch.setattr(gpu_clock, "timed", lambda _: pytest.fail("it was timed"))
    with pytest.raises(gpu_work.Wrong, match=r"the output is off by 1\.0e-01"):
        gpu_work.times(small(gpu_cases.BASE), "device")
    report = Kept()
    gpu_work.sizes(small(gpu_cases.BASE), [next(iter(gpu_cases.SIZES))], report, "device")
    assert report.ends[0][1] == "wrong" and "off by 1.0e-01" in report.ends[0][2]["reason"]


def test_kernels_in_a_trace():
    """Names and microseconds of what ran on the streams of a GPU; nothing else, and nothing twice."""
    event = "events {{ metadata_id: {} duration_ps: {} }}"
    line = f'lines {{{{ name: "{{}}" {event} {event} }}}}'
    names = ("kvattn_gpu_decode", "kvattn_gpu_merge", "fusion_1")
    names = "".join(f'event_metadata {{ key: {i} value {{ id: {i} name: "{n}" }} }}' for i, n in enumerate(names))
    derived, stream = line.format("XLA Ops", 0, 9, 1, 9), line.format("Stream #13(Compute)", 0, 4_000_000, 1, 1_000_000)
    text = f'planes {{ name: "/device:GPU:0" {names} {derived} {stream} {stream} }}'
    text += f'planes {{ name: "/host:CPU" {names} {line.format("Stream", 2, 10**9, 2, 10**9)} }}'
    events = gpu_clock.in_trace(jax.profiler.ProfileData.from_text_proto(text))
    assert events == [("kvattn_gpu_decode", 4.0), ("kvattn_gpu_merge", 1.0)] * 2
    assert gpu_clock.per_step(events, 2) == {"kvattn_gpu_decode": 4.0, "kvattn_gpu_merge": 1.0}
    without = f'planes {{ name: "/device:GPU:0" {names} {derived} {line.format("Compute", 0, 10**6, 2, 10**6)} }}'
    events = gpu_clock.in_trace(jax.profiler.ProfileData.from_text_proto(without))
    assert events == [("kvattn_gpu_decode", 1.0), ("fusion_1", 1.0)]
    # A kernel that runs twice in a step, one step of three disturbed.
    assert gpu_clock.per_step([("a", us) for us in (1, 1, 1, 1, 1, 50)], 3) == {"a": 2.0}


def test_the_second_profiler_is_asked_when_the_first_sees_nothing(monkeypatch):
    monkeypatch.setattr(gpu_clock, "by_cupti", lambda step, count: [("kernel", 2.0)] * count)
    program = gpu_peers.Program(lambda x: x + 1, [jnp.ones(2), jnp.ones(2)])
    kernels, clock, reasons = gpu_clock.kernels_of(program)
    assert (kernels, clock, reasons) == ({"kernel": 2.0}, "Mosaic's CUPTI", "jax.profiler saw no kernel")
    # It looks for a compiled function, and gets the next copy each time.
    rotation = gpu_clock.Rotation(gpu_peers.Program(lambda x: x, [1, 2, 3]))
    assert isinstance(rotation, jax.stages.Wrapped)
    assert [rotation() for _ in range(4)] == [1, 2, 3, 1]


# What figures say -----------------------------------------------------------------------------------------------------


def records():
    kernels = {"kvattn_gpu_decode": 120.0, "kvattn_gpu_merge": 10.0, "fusion_1": 3.0, "fusion_2": 2.0}
    ours = {"valid_bytes": 537_000_000, "error": 1e-3, "clock": "jax.profiler", "compile": {"first_call": 5.5}}
    found = [
        {"device": {"kind": "NVIDIA H200", "versions": {"jax": "0.11.2"}}},
        {"task": "values: bfloat16, GQA", "part": "", "status": "ok"},
        {"task": "values: Int8, GQA", "part": "", "status": "wrong", "reason": "max error 1 > 0.1"},
        {"task": "copy", "part": "", "status": "ok", "tb_per_s": 4.3},
        {"task": f"time: {gpu_cases.BASE}", "part": "", "status": "ok", "us": 135.0, "kernels_us": 135.0,
         "span_us": 140.0, "kernels": kernels, **ours},
        {"task": "time: int8 32x4096", "part": "", "status": "ok", "us": 90.0, "span_us": 90.0, **ours},
        {"task": f"peers: {gpu_cases.BASE}", "part": "FA3", "status": "ok", "us": 150.0, "span_us": 210.0},
        {"task": f"peers: {gpu_cases.BASE}", "part": "FlashInfer", "status": "not there", "reason": "no module"},
    ]  # fmt: skip
    for key, us, stages in (("a", 3.0, 2), ("a", 2.0, 4), ("b", 5.0, 6)):
        config = {"tile": 64, "stages": stages, "blocks_per_sm": 1}
        found.append({"task": "sizes: x", "part": f"{us}", "status": "ok", "us": us, "config": config,
                      "key": f"mosaic_gpu {key}"})  # fmt: skip
    return found


def test_report(tmp_path):
    found = records()
    row = gpu_report.rows_of(found)[gpu_cases.BASE]
    assert row["percent_of_copy"] == pytest.approx(100 * 537e6 / 135e-6 / 4.3e12)
    assert row["floor_us"] == pytest.approx(537e6 / 4.3e12 * 1e6)
    assert gpu_report.split(row["kernels"]) == (120.0, 10.0, 5.0, 2)
    # By spans, since the peer has no sum of kernels; and by kernels where both have them.
    assert gpu_report.peers_of(found)[gpu_cases.BASE]["FA3"]["times_slower"] == 1.5
    found[6]["kernels_us"] = 162.0
    assert gpu_report.peers_of(found)[gpu_cases.BASE]["FA3"]["times_slower"] == 1.2
    goals = {(where, goal): word for where, goal, _, word in gpu_report.goals(found)}
    assert goals[gpu_cases.BASE, ">= 92 % of copy"] == "reached" and goals[gpu_cases.BASE, "<= 138 us"] == "reached"
    assert goals["int8 32x4096", ">= 1.6x faster than bf16 32x4096"] == "missed"
    assert goals[f"least in {gpu_cases.BASE} (FA3)", ">= 1x faster than FA3"] == "reached"
    # A later record of the same replaces an earlier one.
    assert gpu_report.rows_of([*found, found[4] | {"us": 1.0}])[gpu_cases.BASE]["us"] == 1.0

    gpu_report.save(found, tmp_path)
    text = (tmp_path / "table.txt").read_text()
    for words in ("NVIDIA H200", "values: 1 of 2 right", "WRONG values: Int8, GQA: max error 1 > 0.1", "120.0",
                  "5.0 (2)", "1.20x", "missed", "not there (no module): FlashInfer", "4.3 TB/s"):  # fmt: skip
        assert words in text, words
    assert len(text) < 12_000
    saved = json.loads((tmp_path / "sizes.json").read_text())
    assert {key: sizes["stages"] for key, sizes in saved["sizes"].items()} == {"mosaic_gpu a": 4, "mosaic_gpu b": 6}
    tuning.use(tmp_path / "sizes.json")
    try:
        assert tuning.lookup("mosaic_gpu b", "none") == tuning.GpuConfig(64, 6, 1)
    finally:
        tuning.use(None)
    file = runner.Records(tmp_path / "results.jsonl")
    for record in found:
        file.add(record)
    assert on_device.main(["--show", str(tmp_path)]) == 0
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    assert gpu_report.summary([]) and not gpu_report.sizes_of([])
