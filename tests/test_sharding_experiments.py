"""The example about the costs of sharding: a small run, its parts, and the page that quotes the committed run."""

import argparse
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from kvattn.memory import MODELS

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "examples" / "sharding_experiments.py"
RESULTS = ROOT / "benchmarks" / "results" / "sharding_experiments.json"
SMALL = ("--heads", 16, "--head-dim", 16, "--model-dim", 32, "--steps", 2, "--dtype", "float32")
LAYER = {"all-reduce": 1}
"""What every scheme has: the sum after the output projection."""


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("sharding_experiments", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look for it
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def run(*words):
    return subprocess.run(
        [sys.executable, SCRIPT, *map(str, words)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "error::DeprecationWarning:__main__"},
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=280,
    )


def figures(tmp_path, *words):
    """The saved figures of a small run: {(by, batch, length): row}."""
    out = tmp_path / "costs.json"
    done = run(*SMALL, "--out", out, *words)
    assert done.returncode == 0, done.stderr
    assert "100%" in done.stderr and "1,333" in done.stdout and "share" in done.stdout
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    report = json.loads(out.read_text())
    return {(row["by"], row["batch"], row["length"]): row for row in report["rows"]}, report, done


def counts(found):
    return {c["kind"]: c["count"] for c in found["collectives"]}


def test_one_key_value_head(tmp_path):
    """Impossible by heads; by batch two all-to-alls of the queries and outputs; every device has its part."""
    rows, report, done = figures(tmp_path, "--kv-heads", 1, "--batches", 8, "--lengths", 64, "--topology", "")
    assert rows["heads", 8, 64]["reason"].startswith("One key/value head (MQA)") and "cpu" not in rows["heads", 8, 64]
    assert "(MQA)" in done.stdout and report["topology"] is None
    found = rows["batch", 8, 64]
    assert found["chosen"] and not rows["sequence", 8, 64]["chosen"]
    assert counts(found["cpu"]) == LAYER | {"all-to-all": 2}
    by_kind = {c["kind"]: c["bytes"] for c in found["cpu"]["collectives"]}
    assert by_kind == {"all-to-all": 2 * 8 * 16 * 16 * 4 // 8, "all-reduce": 8 * 32 * 4}
    for by, per_row in (("batch", 1), ("sequence", 8)):  # two int32 of a row beside its tokens
        assert rows[by, 8, 64]["cpu"]["bytes_per_device"] == 64 * 2 * 16 * 4 + per_row * 8
    for by in ("batch", "sequence"):
        cpu = rows[by, 8, 64]["cpu"]
        assert cpu["cache_bytes"] == cpu["bytes_per_device"] and cpu["timed_length"] == 64 and cpu["seconds"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("axes", ["explicit", "auto"])
def test_two_axes_and_long_sequences(tmp_path, axes):
    """Rows over "data" besides; a cache of 8 MiB is timed at an eighth of its length, the rest is of the whole."""
    mesh = ("--mesh", "2,4", "--axes", axes)
    words = ("--kv-heads", 4, "--batches", 1, 8, "--lengths", 2048, "--limit", 1, "--topology", "", *mesh)
    rows, report, done = figures(tmp_path, *words)
    assert report["mesh"] == {"data": 2, "model": 4, "axes": axes}
    assert all("data axis of 2" in rows[by, 1, 2048]["reason"] for by in ("heads", "batch", "sequence"))
    assert counts(rows["heads", 8, 2048]["cpu"]) == LAYER
    for by in ("heads", "batch", "sequence"):
        cpu = rows[by, 8, 2048]["cpu"]
        tokens = 8 * 2048 * 4 * 2 * 16 * 4 // 8
        assert tokens < cpu["bytes_per_device"] == cpu["cache_bytes"] < tokens + 100
        assert cpu["timed_length"] == 256
    assert "256 (1/8)" in done.stdout


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu, which compiles for TPUs")
def test_compiled_for_tpus(tmp_path):
    words = ("--kv-heads", 8, "--batches", 8, "--lengths", 512, "--dtype", "bfloat16", "--head-dim", 128)
    rows, report, done = figures(tmp_path, *words)
    assert report["topology"] == "v5e:2x4" and "compiled for TPU v5e:2x4" in done.stdout
    for by, kinds in (("heads", {}), ("batch", {"all-to-all": 4}), ("sequence", {"all-gather": 3, "all-reduce": 3})):
        tpu = rows[by, 8, 512]["tpu"]
        assert counts(tpu) == LAYER | kinds, by
        assert tpu["cache_bytes"] >= tpu["bytes_per_device"] >= 8 * 512 * 8 * 2 * 128 * 2 // 8
        assert tpu["temp_bytes"] < tpu["bytes_per_device"] and tpu["flops"] > 0 and tpu["bytes_accessed"] > 0


def test_contexts_of_pope_et_al(example):
    """Worked out by hand: 30 % of 32 GiB over 118 layers of keys and values, bfloat16, on each of 64 devices."""
    free = 0.3 * 32 * 2**30
    of_device = {"multihead, by heads": 128, "multiquery, by heads": 256, "multiquery, by batch": 256 / 64}
    rows = example.longest_contexts()
    assert [row["context"] for row in rows] == [1333, 333, 666, 167, 42654, 10663]
    for row in rows:
        size = 118 * 2 * 2 * of_device[row["name"]]
        assert row["bytes_per_token_and_device"] == size
        assert abs(row["context"] - free / size / row["batch"]) <= 0.5
        assert abs(row["context"] / row["paper"] - 1) < 0.02


def test_what_cannot_be_says_why(example):
    mesh = jax.make_mesh((2, 4), ("data", "model"))
    shape = example.Shape("layer", 28, 2, 16, 64)
    reasons = {by: example.why_not(shape, by, 12, mesh) for by in ("heads", "batch", "sequence")}
    assert reasons["heads"] is None and reasons["sequence"] is None
    assert "6 rows do not divide over 4 devices" in reasons["batch"]
    assert "26 query heads" in example.why_not(example.Shape("layer", 26, 2, 16, 64), "heads", 12, mesh)
    assert "data axis of 2" in example.why_not(shape, "sequence", 5, mesh)


def test_length_that_is_timed(example):
    shape = example.Shape("layer", 8, 2, 16, 64)
    token = 2 * 2 * 16 * 4
    for limit, expected in ((3 * 1000 * token, 1000), (3 * 999 * token, 500), (1, 1)):
        assert example.timed_length(shape, 3, 1000, 4, limit) == expected


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--mesh", "8"], "two sizes"),
        (["--kv-heads", "2"], "belong to --heads"),
        (["--heads", "4", "--model", "falcon-7b"], "either"),
        (["--lengths", "0"], "at least 1"),
    ],
)
def test_arguments(example, monkeypatch, capsys, words, message):
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *words])
    with pytest.raises(SystemExit):
        example.arguments()
    assert message in capsys.readouterr().err


def test_a_mesh_of_other_devices(example):
    settings = argparse.Namespace(mesh=(2, 2), axes="auto")
    with pytest.raises(SystemExit, match="is 4 devices, v5e:2x4 has 8"):
        example.mesh_of(jax.devices(), settings, "v5e:2x4 has")


# The committed run ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def committed():
    return json.loads(RESULTS.read_text())


def test_committed_figures_follow_from_shapes(example, committed):
    """Bytes by hand; nothing that is exchanged grows with the length."""
    layers = {name: MODELS[name] for name in example.PRESETS}
    sent = {}
    for row in committed["rows"]:
        model, batch, length = layers[row["model"]], row["batch"], row["length"]
        if row["reason"] is not None:
            assert (row["by"], batch) in {("heads", 1), ("heads", 8), ("heads", 64), ("batch", 1)}
            continue
        heads = max(model.num_kv_heads, 8) if row["by"] == "heads" else model.num_kv_heads
        tokens = batch * length * heads * 2 * model.head_dim * 2 // 8
        for name in ("cpu", "tpu"):
            found = row[name]
            assert tokens < found["bytes_per_device"] <= tokens + 8 * batch
            assert found["bytes_per_device"] <= found["cache_bytes"] < 1.01 * tokens + 4096
            assert counts(found)["all-reduce"] >= 1
            key = row["model"], row["by"], batch, name
            sent.setdefault(key, set()).add(example.exchanged_bytes(found["collectives"]))
    assert len(sent) == 2 * (3 + 2 + 3 + 3 + 2 + 3 + 2 + 3) and all(len(sizes) == 1 for sizes in sent.values())


def test_the_page_quotes_the_committed_run(example, committed):
    """Every row of the tables of docs/sharding.md, made from the figures again."""
    page = (ROOT / "docs" / "sharding.md").read_text()
    section = re.search(r"^## What each scheme costs, measured\n(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL)[1]
    quoted = [line for line in section.splitlines() if re.match(r"\|.*\d", line)]
    rows = page_rows(example, committed)
    assert quoted == rows, "the rows should be:\n" + "\n".join(rows)
    # What the text says besides.
    found = [row for row in committed["rows"] if row["reason"] is None]
    assert all(row["cpu"]["cache_bytes"] == row["cpu"]["bytes_per_device"] for row in found)
    assert f"is {max(row['tpu']['temp_bytes'] for row in found) / 2**20:g} MiB at most" in section
    assert f"medians of {committed['steps']} steps" in section and committed["machine"]["cores"] == 2
    seconds = {(row["model"], row["batch"], row["length"], row["by"]): row["cpu"]["seconds"] for row in found}
    cases = [key for key in seconds if key[3] == "batch"]
    assert len(cases) == 18 and all(seconds[key] < seconds[*key[:3], "sequence"] for key in cases)


def page_rows(example, report):
    """Rows of the page: batches of 8 and 64 at the middle length, then the longest contexts."""
    length = sorted({row["length"] for row in report["rows"]})[1]
    lines = []
    for row in report["rows"]:
        if row["batch"] not in (8, 64) or row["length"] != length:
            continue
        head = f"| {row['model']} | {row['batch']} | {row['by']} |"
        if row["reason"] is not None:
            lines.append(f"{head} cannot be | | | |")
            continue
        cpu, tpu = row["cpu"], row["tpu"]
        timed = "" if cpu["timed_length"] == length else f" (at {cpu['timed_length']})"
        sent = example.exchanged_bytes(tpu["collectives"])
        cells = example.readable(cpu["bytes_per_device"]), example.exchanged(tpu["collectives"]), example.readable(sent)
        lines.append(f"{head} {' | '.join(cells)} | {1e3 * cpu['seconds']:.1f}{timed} |")
    for row in report["longest_contexts"]:
        cells = row["name"], row["batch"], row["bytes_per_token_and_device"], row["context"], row["paper"]
        lines.append(f"| {' | '.join(f'{x:,}' if isinstance(x, int) else x for x in cells)} |")
    return lines
