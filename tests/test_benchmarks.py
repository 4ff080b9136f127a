"""The benchmark of the GPU kernel, without a GPU: values in miniature, and what becomes of figures."""

import argparse
import dataclasses
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from rich.console import Console

import kvattn.pallas
from benchmarks import decode_gpu
from kvattn.attend import api
from kvattn.request import Request

ROOT = Path(__file__).resolve().parent.parent


def dry_run(*arguments):
    return subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "decode_gpu.py", "--dry-run", *arguments],
        env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=280,
    )


@pytest.mark.parametrize(
    "words",
    [
        pytest.param(["--cases", "1x1024", "--peers", "jax.nn xla"], id="two cases"),
        pytest.param([], marks=pytest.mark.slow, id="all"),
    ],
)
def test_dry_run(words):
    done = dry_run(*words)
    assert done.returncode == 0, done.stdout + done.stderr
    count = 2 if words else len(decode_gpu.CASES)
    assert f"{count} cases, 0 wrong or failed" in done.stdout
    assert done.stdout.count("right ") == count
    assert "values are off" not in done.stdout and "jax.nn xla" in done.stdout


def test_full_sizes_are_taken():
    with kvattn.pallas.interpret():
        assert decode_gpu.refused(decode_gpu.CASES) == {}


def test_cases():
    names = [case.name for case in decode_gpu.CASES]
    assert len(set(names)) == len(names)
    for case in decode_gpu.CASES:
        lengths = case.lengths()
        assert lengths.shape == (case.batch,) and (lengths > 0).all() and (lengths <= case.slots).all()
        assert all(goal.other in ("", *names) for goal in case.goals)
        if case.valid == "zipf":
            assert lengths.sum() == 32 * 4096 and lengths.max() > 7 * 4096
            assert case.small().lengths().sum() <= 2 * case.small().mean


def test_wrong_values_are_seen():
    case = decode_gpu.CASES[0].small()
    expected = np.ones((len(decode_gpu.some_rows(case)), 1, case.heads, case.size), np.float32)
    out = np.ones((case.batch, 1, case.heads, case.size), np.float32)
    assert decode_gpu.error_of(case, out, expected) == 0
    out[-1, 0, 3] *= 1.5
    assert decode_gpu.error_of(case, out, expected) == pytest.approx(0.5)
    out[0, 0, 0, 0] = np.nan
    assert decode_gpu.error_of(case, out, expected) == np.inf


def test_report(tmp_path, monkeypatch):
    """All that is done with figures, with those that XLA reaches here instead of the kernel."""
    monkeypatch.setattr(decode_gpu.gpu_decode, "attend", lambda request: api.attend(request, "xla"))
    monkeypatch.setattr(decode_gpu, "COLD", 0)
    monkeypatch.setattr(decode_gpu, "COPY_BYTES", 1 << 20)
    monkeypatch.setattr(decode_gpu.tuning, "lookup", lambda *_: None)
    base = decode_gpu.CASES[0]
    other = next(c for c in decode_gpu.CASES if c.name == "bf16 32x4096, pages of 64")
    cases = [dataclasses.replace(c, batch=1, slots=64, heads=2, kv_heads=1, size=64) for c in (base, other)]
    args = argparse.Namespace(peers=["jax.nn", "fa3"], dry_run=False, no_save=False, out=tmp_path, fa3=None)
    console = Console(width=200, record=True, file=io.StringIO())
    with kvattn.pallas.interpret(), jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        report = decode_gpu.measure(args, cases, console)
    decode_gpu.show(report, decode_gpu.CASES, console)
    assert decode_gpu.finish(report, console) == 0
    text = console.export_text()
    saved = json.loads((tmp_path / "decode_gpu.json").read_text())
    assert set(saved["cases"]) == {base.name, other.name}
    row = saved["cases"][base.name]
    assert row["us"] == row["span_us"] > 0 and row["no_cupti"] and row["peers"]["jax.nn xla"]["times_slower"] > 0
    assert "not_run" in row["peers"]["FA3"]
    goals = {(goal["case"], goal["goal"]): goal["result"] for goal in report["goals"]}
    assert goals[base.name, ">= 92 % of copy"] in ("reached", "missed")
    assert goals["int8 32x4096", "<= 85 us"] == "not measured"
    assert "peers: us" in text and "goals" in text and "TB/s" in text
    decode_gpu.picture(report, tmp_path / "decode_gpu.png")
    assert (tmp_path / "decode_gpu.png").read_bytes().startswith(b"\x89PNG")


def test_tune(tmp_path, monkeypatch):
    """Once per kind of case, and saved."""
    asked = []

    def measured(query, cache, *, mask, progress):
        asked.append(decode_gpu.gpu_decode.key(Request(query, query, cache.view(), None, mask=mask, scale=1.0)))
        config = decode_gpu.tuning.GpuConfig(stages=4)
        progress(config, 1e-4)
        return {asked[-1]: config}, {config: 1e-4}

    monkeypatch.setattr(decode_gpu.tuning, "tune", measured)
    cases = [c.small() for c in decode_gpu.CASES if c.name in ("bf16 32x4096", "bf16 8x4096", "int4 32x4096")]
    table = tmp_path / "table.json"
    with kvattn.pallas.interpret():
        try:
            decode_gpu.tune(argparse.Namespace(tune=table), cases, Console(file=io.StringIO()))
        finally:
            decode_gpu.tuning.use(None)
    assert len(asked) == 2 and set(json.loads(table.read_text())["sizes"]) == set(asked)


def test_times_are_compared_by_one_clock():
    assert decode_gpu.ratio({"kernels_us": 2, "span_us": 5}, {"span_us": 10}) == 2
    assert decode_gpu.ratio({"kernels_us": 2, "span_us": 5}, {"kernels_us": 3, "span_us": 10}) == 1.5


def test_the_profiler_takes_a_rotation():
    """It looks for a compiled function, which is not called with the arguments it was made for."""
    program = decode_gpu.Program(lambda x: x, [1, 2, 3])
    rotation = decode_gpu.Rotation(program)
    assert isinstance(rotation, jax.stages.Wrapped)
    assert [rotation() for _ in range(4)] == [1, 2, 3, 1]
