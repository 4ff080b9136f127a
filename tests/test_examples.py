"""The examples run, as a user runs them: another process, small settings."""

import csv
import functools
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import engine_models
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvattn.models import load
from kvattn.serving import engine

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"
WEIGHTS = EXAMPLES / "weights" / "bytes.safetensors"


def run(script, *arguments, timeout=240):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "error::DeprecationWarning:__main__"}
    return subprocess.run(
        [sys.executable, EXAMPLES / script, *map(str, arguments)],
        env=environment | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=timeout,
    )


def read_log(weights):
    return list(csv.DictReader(weights.with_suffix(".csv").read_text().splitlines()))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "small.safetensors"
    small = {"batch": 2, "context": 64, "layers": 1, "model-dim": 32, "heads": 4, "kv-heads": 2, "head-dim": 8}
    small |= {"mlp-dim": 32, "steps": 2, "eval-every": 1}
    done = run("train_bytes.py", "--out", path, *[word for name, x in small.items() for word in (f"--{name}", x)])
    assert done.returncode == 0, done.stderr
    return path, done


def test_training_writes_weights_log_and_plot(trained):
    path, done = trained
    assert "bits per byte" in done.stdout and "100%" in done.stderr
    assert load(path).config.num_kv_heads == 2
    rows = read_log(path)
    assert [row["step"] for row in rows] == ["1", "2"]
    # Untrained: about one of 256 bytes.
    assert all(6 < float(row[name]) < 9 for row in rows for name in ("train", "valid"))
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_serving_prefixes_counts_what_is_computed(monkeypatch):
    """The example's traffic on pages of text: every number it prints, by hand."""
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.setattr(engine, "Device", engine_models.TextDevice)
    serve_prefixes = importlib.import_module("serve_prefixes")
    encode = lambda text: [ord(letter) % 49 for letter in text]
    traffic = serve_prefixes.Traffic(encode, "s" * 32, [chr(97 + i) * 8 for i in range(24)], 4)
    settings = dict(num_pages=200, page_size=8, max_batch=8, max_length=96)
    waves = {"chat": traffic.chat, "few shots": traffic.few_shot, "samples": traffic.samples}
    runs = {}
    for shared in (True, False):
        for name, each in waves.items():
            served = engine.Engine(engine_models.model(), prefix_cache=shared, **settings)
            runs[name, shared] = serve_prefixes.serve(served, each, lambda: None)
    lengths = {"chat": [32 + 8 + turn * 12 for turn in range(4)] * 6, "few shots": [40] * 16, "samples": [40] * 8}
    for name, prompts in lengths.items():
        kept, none = runs[name, True], runs[name, False]
        assert kept.tokens == none.tokens
        assert none.computed == (40 if name == "samples" else sum(prompts))  # samples part when their prompt is read
        assert kept.hit_rate == pytest.approx(1 - kept.computed / sum(prompts))
    assert runs["few shots", True].computed == 40 + 15 * 8
    assert runs["samples", True].computed == 40
    found = [0 if turn == 0 else (32 + 8 + turn * 12 - 8 - 1) // 8 * 8 for turn in range(4)]
    assert runs["chat", True].computed == sum(lengths["chat"]) - 6 * sum(found) - 5 * 32
    assert 0 < runs["chat", True].waste < runs["chat", True].peak_pages
    assert all(held >= 0 for run in runs.values() for held, _ in run.pages)


@pytest.mark.slow
@pytest.mark.timeout(1000)
def test_serving_prefixes(trained, tmp_path):
    weights, _ = trained
    words = ("--weights", weights, "--max-new-tokens", 3, "--shared", 40, "--pages", 200)
    done = run("serve_prefixes.py", *words, "--plot", tmp_path / "pages.png", timeout=900)  # nearly all of it compiling
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("the same tokens on every engine") == 3
    assert (
        len([line for line in done.stdout.splitlines() if line.startswith(("chat ", "few shots ", "samples "))]) == 15
    )
    assert (tmp_path / "pages.png").read_bytes().startswith(b"\x89PNG")


def test_text(trained):
    path, _ = trained
    done = run(
        "decode_gqa.py", "--weights", path, "--max-new-tokens", 8, "--context", 64, "--prompt", "Comparisons are"
    )
    assert done.returncode == 0, done.stderr
    for part in (
        "Comparisons are",
        "tokens/s",
        "cache as MHA",
        "cache as GQA",
        "cache as MQA",
        "flax.nnx.MultiHeadAtt",
    ):
        assert part in done.stdout
    difference = next(line for line in done.stdout.splitlines() if line.startswith("cached - full"))
    assert float(difference.split()[3]) < 1e-4


@pytest.mark.slow
def test_study_of_smaller_caches(trained, tmp_path):
    """Nothing is learnt from two steps of training; but at a budget for all, and in 32 bits, everybody is as `Full`."""
    out = tmp_path / "study.json"
    small = {"context": 64, "windows": 1, "steps": 32, "stream": 2, "stream-budget": 64, "recoveries": 1, "out": out}
    words = [word for name, x in small.items() for word in (f"--{name}", x)]
    done = run("compress_cache.py", "--weights", trained[0], *words, "--budgets", 1.1, 0.25)
    assert done.returncode == 0, done.stderr
    assert "perplexity per byte, by storage" in done.stdout and "StreamingLLM" in done.stdout
    study = json.loads(out.read_text())
    full, *rows = study["budget"]
    assert {row["policy"] for row in rows} > {"SlidingWindow", "StreamingLLM", "H2O", "Scissorhands", "FastGen"}
    for row in rows:
        if row.get("budget") != 0.25:
            assert abs(row["perplexity"] - full["perplexity"]) < 2e-3, row
            assert row["kept"] == 1
        else:
            assert 0.1 < row["kept"] < 0.27
    assert study["bits"][0]["perplexity"] == full["perplexity"]
    assert study["bits"][0]["bits"] == 32
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_uptraining(tmp_path):
    """The tiny model learns little, but every figure is there, and each says the same as the others."""
    out = tmp_path / "uptrain.json"
    small = {"steps": 20, "kv-heads": 1, "uptrain-rates": 1, "batch": 2, "context": 32, "layers": 1, "model-dim": 32}
    small |= {"heads": 4, "head-dim": 8, "mlp-dim": 32, "decode-length": 32, "decode-batch": 2, "repeats": 3}
    done = run("uptrain_gqa.py", "--out", out, *[word for name, x in small.items() for word in (f"--{name}", x)])
    assert done.returncode == 0, done.stderr
    assert "converted" in done.stdout and "100%" in done.stderr
    report = json.loads(out.read_text())
    mha, mqa = report["rows"]
    assert (mha["num_kv_heads"], mqa["num_kv_heads"]) == (4, 1)
    assert mha["cache_bytes_per_token"] == 4 * mqa["cache_bytes_per_token"] == 2 * 4 * 8 * 4
    assert mha["converted"] == report["mha"] == report["pretraining"][-1]["valid"] < report["pretraining"][0]["valid"]
    assert mqa["converted"] > mha["converted"] and report["uptraining_steps"] == 1
    assert mqa["scratch"] > mqa["uptrained"] and mqa["uptrained"] != mqa["converted"]
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_sharing_prefixes(trained):
    """Tokens are those of caches of their own, every page comes back, and samples share the prompt's."""
    words = ("--shots", 60, "--max-new-tokens", 4, "--samples", 3, "--beams", 2, "--pages", 40)
    done = run("share_prefixes.py", "--weights", trained[0], *words)
    assert done.returncode == 0, done.stderr
    assert "generate alone: 4 of 4 prompts" in done.stdout and "pages that came back: 40 of 40" in done.stdout
    questions, samples, beams = ([int(x) for x in line.split()[-5:]] for line in done.stdout.splitlines()[1:4])
    assert questions[1] <= questions[0] / 2 and questions[2] < questions[3]
    assert samples[1] <= 16 and samples[4] == 2  # the last of three writes where it is
    assert beams[2:4] == [0, 0]
    done = run("share_prefixes.py", "--weights", trained[0], *words[:-1], 4)
    assert done.returncode != 0 and "pool is too small" in done.stderr


def test_text_of_a_checkpoint():
    """Token ids where there is no tokenizer; the golden run of transformers begins with the same ones."""
    folder = EXAMPLES.parent / "tests" / "golden" / "hf" / "falcon7b"
    golden = np.load(folder / "golden.npz")
    prompt = " ".join(map(str, golden["prompts"][1, : golden["lengths"][1]]))
    settings = ("--max-new-tokens", 4, "--temperature", 0)
    done = run("decode_gqa.py", "--checkpoint", folder, "--prompt", prompt, *settings)
    assert done.returncode == 0, done.stderr
    assert " ".join(map(str, golden["greedy"][1, :4])) in done.stdout and "1 key/value heads" in done.stdout
    done = run("decode_gqa.py", "--checkpoint", folder, "--prompt", "Once upon a time")
    assert done.returncode != 0 and "token ids" in done.stderr


@pytest.mark.slow
@pytest.mark.timeout(1000)
def test_the_demo():
    """The policies' letters are those of the text; prompts with a prefix in common compute it once."""
    done = run("demo.py", "--only", "sizes", "policy", "prefixes", timeout=900)
    assert done.returncode == 0, done.stderr
    sizes = next(line.split() for line in done.stdout.splitlines() if line.startswith("as it is"))
    assert sizes[3:6] == ["2.15", "GB", "4"]
    assert "Com········" in done.stdout.splitlines()  # the sinks are START and three letters
    words = next(line for line in done.stdout.splitlines() if "found in shared pages" in line)
    _, total, computed, found = (int(word.replace(",", "")) for word in words.split() if word[0].isdigit())
    assert computed + found == total and found == 3 * 256


def test_text_without_weights(tmp_path):
    done = run("decode_gqa.py", "--weights", tmp_path / "none.safetensors")
    assert done.returncode != 0 and "train_bytes.py" in done.stderr


@pytest.mark.parametrize("more", [[], ["--window", 16]], ids=["full", "window"])
def test_bare_step(more):
    done = run(
        *("decode_gqa.py", "--random", "--heads", 4, "--kv-heads", 2, "--head-dim", 16, "--batch", 2, "--context", 64),
        *("--dtype", "float32", "--repeats", 1, "--implementation", "xla", "mosaic_gpu", *more),
    )
    assert done.returncode == 0, done.stderr
    row = next(line.split() for line in done.stdout.splitlines() if line.strip().startswith("xla"))
    assert float(row[-1]) < 1e-5 and all(float(x.replace(",", "")) >= 0 for x in row[1:])
    assert "not run: 'mosaic_gpu'" in done.stdout
    assert f"{16 if more else 64} of 64 tokens" in done.stdout


def test_training_attention_is_attention(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    from train_bytes import causal_attention

    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (jax.random.normal(key, (2, 300, n, 8)) for key, n in zip(keys, (4, 2, 2), strict=True))
    # The example is not written for strict promotion; the arithmetic is the same.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        got = jax.jit(functools.partial(causal_attention, is_causal=True))(q, k, v)
    np.testing.assert_allclose(got, jax.nn.dot_product_attention(q, k, v, is_causal=True), atol=2e-5)


def test_the_committed_model():
    """Within its limits, and better than the frequencies of bytes: it has learnt something."""
    assert WEIGHTS.stat().st_size <= 4_000_000
    rows = read_log(WEIGHTS)
    assert min(float(row["valid"]) for row in rows) < 2.6
    assert json.loads(WEIGHTS.with_suffix(".json").read_text())["vocab_size"] == 256
    model = load(WEIGHTS, dtype=jnp.float32)

    def bits(text):
        text = jnp.asarray([list(text)], jnp.int32)
        logits, _ = model(text[:, :-1])
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits), text[:, 1:, None], axis=2)
        return float(-jnp.mean(picked[:, 1:]) / np.log(2))

    text = b"The expression is evaluated and the result is a tuple of the "
    # START, the byte 0, is before every text it knows: without it its heads have nowhere to rest.
    assert bits(b"\0" + text) < 2.6
    assert bits(text) > bits(b"\0" + text) + 0.5
