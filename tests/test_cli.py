"""The command as a user calls it: what it prints, what it refuses, and with which status it ends."""

import dataclasses
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import engine_models
import jax.numpy as jnp
import pytest

typer_testing = pytest.importorskip("typer.testing", reason="typer is in the extra cli")

import kvattn  # noqa: E402
from kvattn import (  # noqa: E402
    errors,
    measure,
    memory,
)
from kvattn.cli import bench_engine, parse  # noqa: E402
from kvattn.cli.app import app  # noqa: E402
from kvattn.pallas import tuning  # noqa: E402
from kvattn.serving import engine  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
CHECKPOINT = ROOT / "tests" / "golden" / "hf" / "llama3"
BYTES = ROOT / "examples" / "weights" / "bytes.safetensors"


def call(*words, **options):
    return typer_testing.CliRunner().invoke(app, [str(word) for word in words], **options)


def printed(*words):
    done = call(*words)
    assert done.exit_code == 0, done.output
    return done.stdout


def flat(text):
    return " ".join(text.split())


# Memory ---------------------------------------------------------------------------------------------------------------


@pytest.mark.wrong_types
def test_memory_of_latents():
    """Counted once, where values are in keys; not divided by heads; not measured as if they had values of their own."""
    shown = flat(printed("memory", "--model", "deepseek-v3", "--device", "h200", "--devices", 16, "--by", "heads"))
    assert "128 query heads on 1 key/value head of 576, whose first 512 numbers are its value" in shown
    assert "70,272 bytes per token in all layers (68.62 KiB): bfloat16" in shown
    assert "by heads, 1 key/value head takes the room of 16 on 16 devices" in shown
    table = printed("memory")
    rows = {line.split()[0]: line.split()[-2] for line in table.splitlines() if " KiB" in line}
    assert (rows["deepseek-v3"], rows["minicpm3-4b"], rows["llama-2-7b"]) == ("69", "35", "512")
    assert "1.03 T" in table
    refused = call("bench", "--model", "deepseek-v3")
    assert refused.exit_code != 0 and "latent attention" in flat(refused.output)


SCREENS = [
    (),
    ("--model", "llama-2-7b"),
    ("--model", "llama-2-7b", "--device", "a10"),
    ("--model", "llama-2-70b", "--device", "h100", "--tensor-parallel", 8, "--by", "batch"),
    ("--model", "bloom-176b", "--device", "a10"),
    ("--model", "gpt-oss-120b", "--device", "tpu-7x", "--batch", 256, "--codec", "int8", "--length", 131072),
    ("--model", "palm-540b", "--device", "tpu-v4", "--devices", 64, "--by", "heads", "--memory-fraction", 0.3),
    ("--model", "gemma-3-27b", "--device", "h200", "--policy", "streaming:4,1020", "--pipeline-parallel", 2),
    ("--model", "gpt-oss-20b", "--device", "h100", "--page-size", 128, "--prefill-chunk", 256, "--length", 8192),
    ("--model", "gpt2", "--device", "t4", "--page-size", 16, "--policy", "h2o:100,99", "--length", 512),
    ("--config", CHECKPOINT, "--device", "t4", "--page-size", 16, "--length", 64, "--mean-length", 20),
]


@pytest.mark.parametrize("words", SCREENS, ids=lambda words: " ".join(map(str, words)) or "tables")
def test_a_screen(words):
    """80 columns, no colours, nothing cut off, no blanks at ends; but for the tables on one screen."""
    lines = printed("memory", *words).splitlines()
    assert max(map(len, lines)) <= 80
    text = "\n".join(lines)
    assert "\x1b" not in text and "…" not in text and "..." not in text
    assert not [line for line in lines if line != line.rstrip()]
    if words:
        assert len(lines) <= 44


def test_tables_name_everything():
    lines = [line.split() for line in printed("memory").splitlines()]
    first = [words[0] for words in lines if words]
    assert set(memory.MODELS) <= set(first) and set(memory.DEVICES) <= set(first)
    row = next(words for words in lines if words and words[0] == "falcon-40b")
    assert row == ["falcon-40b", "60", "128", "8", "64", "41.3", "B", "120", "KiB"]


def test_llama_on_an_a10():
    text = printed("memory", "--model", "llama-2-7b", "--device", "a10")
    for part in (
        "32 layers, 32 query heads on 32 key/value heads of 128",
        "13.48 GB: 6,738,415,616 parameters in bfloat16",
        "524,288 bytes per token in all layers (0.500 MiB)",
        "10.52 GB for caches: 20,071 tokens",
        "outweighs the weights from 25,705 tokens on",
        "best first",
    ):
        assert part in flat(text), part
    row = next(line.split() for line in text.splitlines() if line.startswith(" 4,096"))
    p = memory.plan("llama-2-7b", "a10", length=4096)
    assert row[:3] == ["4,096", "2.15", "GB"]
    assert float(row[3]) == pytest.approx(1e3 * p.step_seconds, abs=0.05)
    assert row[7] == str(p.max_batch)
    # Levers in the order of the library's, with its numbers.
    below = text[text.index("best first") :].splitlines()[2:]
    found = memory.levers(p)
    assert len(below) == len(found)
    for line, lever in zip(below, found, strict=True):
        assert line.startswith(lever.name)
        assert f" {lever.plan.max_batch:,} " in line and line.endswith(lever.outputs)


def test_the_page_shows_what_is_printed():
    page = (ROOT / "docs" / "cli.md").read_text()
    command = "$ kvattn memory --model llama-2-7b --device a10\n"
    shown = page[page.index(command) + len(command) :]
    assert shown[: shown.index("```")] == printed("memory", "--model", "llama-2-7b", "--device", "a10")
    options = re.findall(r"--[a-z][a-z-]+", printed("memory", "--help"))
    assert set(options) - {"--help"} <= set(re.findall(r"--[a-z][a-z-]+", page))


def test_json_is_the_plan():
    words = ("--model", "llama-3-8b", "--device", "h100", "--batch", 4, "--length", 8192, "--codec", "int4:32")
    found = json.loads(printed("memory", *words, "--json"))
    p = memory.plan("llama-3-8b", "h100", batch_size=4, length=8192, codec=kvattn.Int4(32))
    assert found["plan"] == json.loads(json.dumps(p.to_json()))
    assert found["levers"] == [lever.to_json() for lever in memory.levers(p)]
    assert found["lengths"][0]["max_batch"] == p.max_batch
    sizes = json.loads(printed("memory", "--model", "gpt2", "--json"))
    assert sizes["bytes_per_token"] == 36_864 and sizes["weight_bytes"] == 2 * 124_439_808
    everything = json.loads(printed("memory", "--json"))
    assert len(everything["models"]) == len(memory.MODELS) and len(everything["devices"]) == len(memory.DEVICES)


def test_every_option_reaches_the_plan():
    words = {
        "batch": 3, "length": 1_000, "mean-length": 100, "policy": "full", "codec": "float16", "weight-dtype": "int8",
        "page-size": 32, "prefill-chunk": 64, "tensor-parallel": 4, "by": "sequence", "pipeline-parallel": 2,
        "reserve": "1.5GB", "memory-fraction": 0.5,
    }  # fmt: skip
    options = [word for name, value in words.items() for word in (f"--{name}", value)]
    found = json.loads(printed("memory", "--model", "llama-2-7b", "--device", "a10", *options, "--json"))["plan"]
    p = memory.plan(
        "llama-2-7b", "a10", batch_size=3, length=1000, mean_length=100, policy=kvattn.Full(), dtype="float16",
        weight_dtype="int8", page_size=32, prefill_chunk=64, num_devices=4, by="sequence", pipeline_stages=2,
        reserved_bytes=1_500_000_000, memory_fraction=0.5,
    )  # fmt: skip
    assert found == json.loads(json.dumps(p.to_json()))


def test_a_config_file(tmp_path):
    settings = json.loads((CHECKPOINT / "config.json").read_text())
    expected = memory.from_config(settings)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(settings))
    for given in (file, tmp_path):
        found = json.loads(printed("memory", "--config", given, "--json"))
        assert found["model"]["num_params"] == expected.num_params
    file.write_text(json.dumps(settings | {"model_type": "brand_new"}))
    assert " about " in flat(printed("memory", "--config", file))
    assert "are an estimate" in flat(printed("memory", "--config", file, "--device", "t4"))
    assert "7,000 parameters" in flat(printed("memory", "--config", file, "--num-params", 7000))


def test_what_a_config_file_leaves_uncertain(tmp_path):
    file = tmp_path / "config.json"
    sizes = {"num_hidden_layers": 8, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 256}
    settings = {"model_type": "qwen3_next", "vocab_size": 1000, "head_dim": 64} | sizes
    file.write_text(json.dumps(settings | {"quantization_config": {"quant_method": "gptq", "bits": 4}}))
    for options in ([], ["--device", "t4"]):
        text = flat(printed("memory", "--config", file, *options))
        assert "1,024 bytes per token in the 2 of 8 layers that keep keys and values" in text
        assert "6 of 8 layers keep no keys and values" in text and "parameters in int4" in text
        assert "the others in bfloat16" in text
    assert "parameters in bfloat16" in flat(printed("memory", "--config", file, "--weight-dtype", "bfloat16"))
    file.write_text(json.dumps({"model_type": "brand_new", "vocab_size": 1000, "intermediate_size": 512} | sizes))
    text = flat(printed("memory", "--config", file))
    assert "about 4,096 bytes per token in all layers" in text and "the cache of " in text and "is an estimate" in text
    assert json.loads(printed("memory", "--config", file, "--json"))["model"]["cache_is_estimate"]


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_a_plot(tmp_path, ending):
    pytest.importorskip("matplotlib")
    out = tmp_path / f"growth.{ending}"
    text = printed("memory", "--model", "gpt2", "--device", "t4", "--plot", out)
    assert f"drawn: {out}" in text.replace("\n", "")
    data = out.read_bytes()
    assert data.startswith(b"\x89PNG") if ending == "png" else b"<svg" in data
    if ending == "png":
        assert len(data) > 20_000


def test_the_lines_of_a_plot(tmp_path, monkeypatch):
    """One for the plan and one for every lever that changes the cache, at the sizes that the planner says."""
    figure = pytest.importorskip("matplotlib.figure")
    from kvattn.cli.plot import draw

    seen = []
    save = figure.Figure.savefig
    monkeypatch.setattr(figure.Figure, "savefig", lambda self, *a, **k: (seen.append(self), save(self, *a, **k)))
    p = memory.plan("llama-2-7b", "a10", batch_size=2, length=1024)
    pulled = memory.levers(p)
    draw(p, pulled, tmp_path / "x.png")
    axes = seen[0].axes[0]
    labels = {line.get_label(): line for line in axes.lines}
    assert {f"{x.name} ({x.outputs})" for x in pulled if x.cache_ratio != 1} <= set(labels)
    for name, options in {"as it is": {}, "Int8() (rounded)": {"codec": kvattn.Int8()}}.items():
        for length, size in zip(*labels[name].get_data(), strict=True):
            q = p.changed(length=int(length), **options)
            assert size * 1e9 == pytest.approx(q.device_cache_bytes)
    limits = [line for line in axes.lines if set(line.get_ydata()) == {p.free_bytes / 1e9}]
    assert len(limits) == 1


REFUSED = [
    (("--model", "lama-2-7b"), "unknown model 'lama-2-7b'; the known ones are llama-2-7b, "),
    (("--model", "gpt2", "--device", "h10"), "unknown device 'h10'; the known ones are h100, "),
    (("--model", "gpt2", "--batch", -1), "--batch must be >= 1, got -1"),
    (("--model", "gpt2", "--batch", 0), "--batch must be >= 1, got 0"),
    (("--model", "gpt2", "--batch", "nan"), "--batch must be an int >= 1, got 'nan'"),
    (("--model", "gpt2", "--batch", "True"), "--batch must be an int"),
    (("--model", "gpt2", "--length", "1.5"), "--length must be an int"),
    (("--model", "gpt2", "--length", 2**31), "int32"),
    (("--model", "gpt2", "--weight-dtype", "int5"), "unknown weight_dtype 'int5'"),
    (("--model", "gpt2", "--codec", "int5"), "unknown codec 'int5'; the known ones are bfloat16, "),
    (("--model", "gpt2", "--codec", "kivi:3"), "bits must be 2, 4 or 8, got 3"),
    (("--model", "gpt2", "--policy", "window:0"), "window must be >= 1, got 0"),
    (("--model", "gpt2", "--policy", "window"), "missing a required argument: 'window'"),
    (("--model", "gpt2", "--policy", "h2o:1,x"), "'x' is no number"),
    (("--model", "gpt2", "--policy", "lru"), "unknown policy 'lru'; the known ones are full, "),
    (("--model", "gpt2", "--policy", "h2o:8,8", "--codec", "kivi"), "does not work with"),
    (("--model", "gpt2", "--tensor-parallel", 0), "--tensor-parallel must be >= 1"),
    (("--model", "gpt2", "--by", "rows"), "unknown by 'rows'"),
    (("--model", "gpt2", "--pipeline-parallel", 13), "pipeline_stages (13) exceeds the 12 layers"),
    (("--model", "gpt2", "--memory-fraction", "nan"), "--memory-fraction must be a finite number"),
    (("--model", "gpt2", "--memory-fraction", "2"), "memory_fraction must lie in (0, 1], got 2.0"),
    (("--model", "gpt2", "--reserve", "-1"), "--reserve must be bytes"),
    (("--model", "gpt2", "--reserve", "2 apples"), "--reserve must be bytes"),
    (("--model", "gpt2", "--page-size", 0), "--page-size must be >= 1"),
    (("--model", "gpt2", "--mean-length", 5), "mean_length"),
    (("--model", "gpt2", "--config", "x.json"), "not both"),
    (("--model", "gpt2", "--num-params", 5), "--num-params goes with --config"),
    (("--config", "nowhere/config.json"), "nowhere/config.json is not there"),
    (("--model", "gpt2", "--device", "t4", "--plot", "x.doc"), "the name must end in one of"),
    (("--model", "gpt2", "--device", "t4", "--plot", "no/such/folder/x.png"), "no/such/folder/x.png"),
]


@pytest.mark.parametrize(
    ("words", "part"), REFUSED, ids=lambda x: " ".join(map(str, x)) if isinstance(x, tuple) else ""
)
def test_refused_in_one_line(words, part):
    done = call("memory", *words)
    assert done.exit_code == 2
    assert done.stdout == ""
    assert done.stderr.startswith("kvattn: ") and done.stderr.count("\n") == 1
    assert part in done.stderr
    assert isinstance(done.exception, SystemExit)  # nothing that would print a traceback


def test_unknown_options_and_commands():
    for words in (("memory", "--modle", "gpt2"), ("mem",)):
        done = call(*words)
        assert done.exit_code == 2 and "No such" in done.stderr
    assert "memory" in printed("--help") and "bench" in printed("--help")


# Words ----------------------------------------------------------------------------------------------------------------


def test_policies_and_codecs_by_their_words():
    assert parse.policy(None) is None and parse.policy("full") == kvattn.Full()
    assert parse.policy("window:4096") == kvattn.SlidingWindow(4096) == parse.policy("SlidingWindow(window=4096)")
    assert parse.policy("streaming:4,1020") == kvattn.StreamingLLM(4, 1020)
    assert parse.policy("h2o:5,6,positions_in=cache") == kvattn.H2O(5, 6, positions_in="cache")
    assert parse.policy("fastgen:0.9") == kvattn.FastGen(0.9)
    assert parse.codec("int8") == (kvattn.Int8(), None) and parse.codec("BF16") == (None, "bfloat16")
    assert parse.codec("KIVI(2, group_size=16, residual=32)") == (kvattn.KIVI(2, 16, 32), None)
    # What the library prints can be given back.
    for made in (kvattn.SlidingWindow(7), kvattn.H2O(3, 4), kvattn.StreamingLLM(1, 2)):
        assert parse.policy(repr(made).replace("'", "")) == made
    plain, *codecs = kvattn.codecs.registered()
    assert plain.kind is kvattn.codecs.Plain and plain.names == parse.DTYPES
    for entry in (*kvattn.policies.registered(), *codecs):
        for name, example in itertools.product(entry.names, entry.examples):
            fields = [(f.name, getattr(example, f.name), f.default) for f in dataclasses.fields(example)]
            text = f"{name}:{','.join(f'{key}={value}' for key, value, default in fields if value != default)}"
            assert (parse.codec(text)[0] if entry in codecs else parse.policy(text)) == example
    assert {e.kind for e in kvattn.policies.registered()} >= set(kvattn.policies.ALL)
    assert {e.kind for e in (plain, *codecs)} >= set(kvattn.codecs.ALL)


def test_bytes_by_their_words():
    words = {"0": 0, "2GB": 2 * 10**9, "512MiB": 2**29, "1.5 kB": 1500, "7": 7, "1gib": 2**30, ".5TB": 5 * 10**11}
    for text, size in words.items():
        assert parse.num_bytes("reserve", text) == size
    assert parse.count("length", "131_072") == parse.count("length", "131,072") == 131_072


# Measuring ------------------------------------------------------------------------------------------------------------

TINY = ("--heads", 4, "--kv-heads", 2, "--head-dim", 16, "--batch", 2, "--context", 64, "--repeats", 1)


@pytest.fixture
def quick(monkeypatch):
    """What is measured beside the step does not matter here."""
    monkeypatch.setattr(measure, "copy_bandwidth", lambda count, repeats: 1e10)
    monkeypatch.setattr(measure, "steps_per_call", lambda read: 2)


@pytest.mark.parametrize("more", [(), ("--window", 16), ("--codec", "int8")], ids=str)
def test_bench(quick, more):
    words = ("--implementation", "xla", "--implementation", "mosaic_gpu", "--dtype", "float32")
    text = printed("bench", *TINY, *words, *more)
    assert max(map(len, text.splitlines())) <= 80
    row = next(line.split() for line in text.splitlines() if line.startswith("xla"))
    assert float(row[-1]) < 1e-3 and all(float(x.replace(",", "")) >= 0 for x in row[1:])
    assert f"{16 if '--window' in more else 64} of 64 tokens" in flat(text)
    assert "not run: 'mosaic_gpu': it needs a GPU" in flat(text)


def test_bench_as_json(quick):
    found = json.loads(printed("bench", *TINY, "--json"))
    assert found["read_bytes"] == 2 * 2 * 2 * 64 * 16 * 2
    assert found["case"]["num_kv_heads"] == 2 and found["timings"][0]["error"] < 0.05
    assert found["timings"][0]["seconds"] > 0


def test_bench_takes_heads_from_a_model():
    case = measure.Case(num_heads=71, num_kv_heads=1, head_dim=64, batch_size=3, context=10)
    from kvattn.cli.bench import _case, _heads

    options = {"batch": "3", "context": "10", "window": None, "dtype": "bfloat16", "codec": None}
    assert _case(_heads("falcon-7b", None, None, None), **options) == case
    assert _case(_heads("falcon-7b", None, None, "8"), **options).head_dim == 8


@pytest.mark.wrong_types
@pytest.mark.parametrize(
    ("words", "part"),
    [
        (("--implementation", "cuda"), "unknown implementation 'cuda'"),
        (("--heads", 5, "--kv-heads", 2), "must be divisible"),
        (("--codec", "kivi"), "take a codec of single tokens"),
        (("--codec", "float32"), "give it as --dtype float32"),
        (("--dtype", "int8"), "unknown --dtype 'int8'"),
        (("--context", 1), "--context must be >= 2"),
        (("--window", 0), "--window must be >= 1"),
        (("--model", "gtp2"), "unknown model 'gtp2'; the known ones are gpt2"),
    ],
)
def test_bench_refuses(words, part):
    done = call("bench", *words)
    assert done.exit_code == 2 and done.stderr.count("\n") == 1
    assert part in done.stderr


CHAT = ("bench", "--engine", "--checkpoint", CHECKPOINT, "--conversations", 3, "--turns", 2, "--shared", 32, "--new", 4)


def by_hand(kept, none):
    """Three conversations of two turns: two find what all share, and every next turn what was said before."""
    turns = [32 + 32, 32 + 32 + 4 + 32]
    assert kept.requests == none.requests == 6
    assert kept.prompt_tokens == none.prompt_tokens == 3 * sum(turns)
    assert none.cached_prompt_tokens == 0 and none.hit_rate == 0
    whole_pages = (turns[0] + 4 - 1) // 8 * 8  # the last token was never appended
    assert kept.cached_prompt_tokens == 2 * 32 + 3 * whole_pages
    assert (none.pages, kept.pages) == (2 * 13, 2 * 13 - 4)  # of two rows, of which one reads the other's first pages
    assert 0 < kept.waste < 0.2
    assert kept.evictions == kept.preemptions == 0 and 0 < kept.ticks < none.ticks
    assert all(run.host_seconds > 0 and run.tokens_per_second > 0 for run in (kept, none))


def test_what_an_engine_is_measured_by(monkeypatch):
    monkeypatch.setattr(engine, "Device", engine_models.TextDevice)
    model, chat = engine_models.model(vocab_size=49), bench_engine.Chat(3, 2, 32, 32, 4)
    told = []
    settings = bench_engine.Settings(num_pages=None, page_size=8, max_batch=2, codec=None)
    progress = lambda *given: told.append(given)
    by_hand(*(bench_engine.measured(model, chat, settings, keeps, progress) for keeps in (True, False)))
    assert told[-1] == (24, 24) and told[0] == (0, 24)


def test_bench_of_an_engine():
    found = json.loads(printed(*CHAT, "--batch", 2, "--page-size", 8, "--json"))
    assert found["chat"]["conversations"] == 3 and found["settings"]["max_batch"] == 2
    rates = [run.pop("hit_rate") for run in found["runs"]]
    runs = [bench_engine.Run(**run) for run in found["runs"]]
    assert rates == [run.hit_rate for run in runs]
    by_hand(*runs)


def test_the_screen_of_an_engine():
    text = printed(*CHAT, "--batch", 2, "--page-size", 8, "--pages", 14)
    assert max(map(len, text.splitlines())) <= 80
    rows = {line.split()[0]: line.split() for line in text.splitlines() if line.startswith(("kept", "none"))}
    assert int(rows["kept"][2]) < int(rows["none"][2]) == 3 * (64 + 100)
    assert int(rows["kept"][8]) > 0  # a pool in which not everything stays
    assert "3 conversations of 2 turns" in flat(text)


@pytest.mark.wrong_types
@pytest.mark.parametrize(
    ("words", "part"),
    [
        (("--engine", "--context", 64), "--context does not go with --engine"),
        (("--engine", "--kv-heads", 2), "--kv-heads does not go with --engine"),
        (("--turns", 2), "--turns goes with --engine"),
        (("--engine", "--turns", 0), "--turns must be >= 1"),
        (("--engine", "--codec", "float32"), "give it as --dtype float32"),
    ],
)
def test_bench_of_an_engine_refuses(words, part):
    done = call("bench", *words)
    assert done.exit_code == 2 and done.stderr.count("\n") == 1
    assert part in done.stderr


def test_tune(monkeypatch, tmp_path):
    """The command around `kvattn.pallas.tuning.tune`: sizes fastest first, and a table that can be used."""
    asked = []

    def tuned(query, cache, *, mask, repeats):
        asked.append((query.shape, cache.lengths.tolist(), mask.window, repeats))
        fast, slow = tuning.GpuConfig(128), tuning.GpuConfig(64)
        return {"mosaic_gpu key": fast}, {slow: 2e-3, fast: 1e-3}

    monkeypatch.setattr(tuning, "tune", tuned)
    out = tmp_path / "table.json"
    text = printed("tune", *TINY, "--window", 32, "--save", out)
    assert asked == [((2, 1, 4, 16), [64, 64], 32, 1)]
    assert flat(text).index("tile=128") < flat(text).index("tile=64")
    assert f"written: {out}" in text.replace("\n", "")
    assert json.loads(out.read_text())["sizes"] == {"mosaic_gpu key": dataclasses.asdict(tuning.GpuConfig(128))}


def test_tune_where_there_is_no_kernel(tmp_path):
    done = call("tune", *TINY)
    assert done.exit_code == 2 and "there is no kernel to tune on 'cpu'" in done.stderr
    done = call("tune", *TINY, "--save", tmp_path / "no" / "table.json")
    assert done.exit_code == 2 and "no folder that can be written to" in done.stderr


def test_env():
    text = printed("env")
    assert max(map(len, text.splitlines())) <= 80
    words = dict(line.split(None, 1) for line in text.splitlines() if len(line.split()) > 1)
    assert words["kvattn"] == kvattn.__version__ and words["xla"] == words["reference"] == "works"
    assert words["mosaic_gpu"].startswith("no: it needs a GPU")
    found = json.loads(printed("env", "--json"))
    assert found["backend"] == "cpu" and len(found["devices"]) == 8
    assert found["implementations"]["xla"] is None and "GPU" in found["implementations"]["mosaic_gpu"]


def test_env_tells_what_fails(monkeypatch):
    """An implementation that raises, or whose output is wrong, does not work here."""
    from kvattn.cli import env

    step = measure.step

    def planted(name, inner=1):
        if name == "xla":
            return lambda *a: (_ for _ in ()).throw(RuntimeError("no such instruction\nand more"))
        return step(name, inner)

    monkeypatch.setattr(measure, "step", planted)
    assert env.works("reference") is None
    assert env.works("xla") == "RuntimeError: no such instruction"

    def off(*args):
        out, cache = step("reference")(*args)
        return out + jnp.asarray(0.5, out.dtype), cache

    monkeypatch.setattr(measure, "step", lambda name, inner=1: off if name == "xla" else step(name, inner))
    assert env.works("xla").startswith("its output is off by 0.")


# Generating -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A golden checkpoint with a tokenizer of its own: a word for each of its 96 tokens."""
    tokenizers = pytest.importorskip("tokenizers")
    folder = tmp_path_factory.mktemp("checkpoint")
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_bytes((CHECKPOINT / name).read_bytes())
    model = tokenizers.models.WordLevel({f"w{i}": i for i in range(96)}, unk_token="w0")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def test_generate(checkpoint):
    done = call("generate", checkpoint, "--prompt", "w5 w17 w3", "--max-new-tokens", 6)
    assert done.exit_code == 0, done.output
    model = kvattn.models.from_pretrained(checkpoint)
    expected = kvattn.generate(model, [[5, 17, 3]], 6)[0]
    assert re.findall(r"w\d+", done.stdout) == ["w5", "w17", "w3", *(f"w{t}" for t in expected)]
    assert "6 tokens in" in done.stderr
    both = call("generate", checkpoint, "--prompt", "w5 w17 w3", "--prompt", "w1", "--max-new-tokens", 6)
    assert f"--- w5 w17 w3\n {' '.join(f'w{t}' for t in expected)}\n--- w1\n" in both.stdout
    piped = call("generate", checkpoint, "--prompt", "-", "--max-new-tokens", 6, input="w5 w17 w3")
    assert piped.stdout == done.stdout


@pytest.mark.parametrize("count", [1, 2])
def test_words_do_not_stick_to_the_prompt(checkpoint, tmp_path, monkeypatch, count):
    """Llama's decoder takes away a text's first space. Prompt and what follows are the text of all tokens."""
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"▁w{i}": i for i in range(96)}, unk_token="▁w0"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="always")
    d = tokenizers.decoders
    tokenizer.decoder = d.Sequence([d.Replace("▁", " "), d.ByteFallback(), d.Fuse(), d.Strip(" ", 1, 0)])
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((checkpoint / name).read_bytes())
    tokenizer.save(str(tmp_path / "tokenizer.json"))

    def answered(model, prompts, count, *, on_token=None, **options):
        for token in (7, 8, 9) if on_token else ():
            on_token(0, token)
        return [[7, 8, 9] for _ in prompts]

    monkeypatch.setattr(kvattn.models, "generate", answered)
    done = call("generate", tmp_path, *["--prompt", "w5 w17"] * count)
    assert tokenizer.decode([7, 8, 9]) == "w7 w8 w9" and done.exit_code == 0
    assert done.stdout == ("w5 w17 w7 w8 w9\n" if count == 1 else "--- w5 w17\n w7 w8 w9\n" * 2)


def test_generate_ignores_a_field(checkpoint, tmp_path):
    """What the error advises is there."""
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (tmp_path / name).write_bytes((checkpoint / name).read_bytes())
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(settings | {"residual_multiplier": 1.0, "other_multiplier": 1.0}))
    words = ("generate", tmp_path, "--prompt", "w5", "--max-new-tokens", 0)
    for some in ((), ("--ignore", "residual_multiplier")):
        done = call(*words, *some)
        assert done.exit_code == 2 and "other_multiplier" in done.stderr and "--ignore FIELD" in done.stderr
        assert ("residual_multiplier" in done.stderr) == (some == ())
    done = call(*words, "--ignore", "residual_multiplier", "--ignore", "other_multiplier")
    assert done.exit_code == 0 and done.stdout == "w5\n", done.output


def test_generate_ends_where_the_checkpoint_says(checkpoint):
    model = kvattn.models.from_pretrained(checkpoint)
    new = kvattn.generate(model, [[5, 17, 3]], 6)[0]
    (checkpoint / "generation_config.json").write_text(json.dumps({"eos_token_id": [95, new[2]]}))
    try:
        done = call("generate", checkpoint, "--prompt", "w5 w17 w3", "--max-new-tokens", 6)
        assert f"{new.index(new[2]) + 1} tokens in" in done.stderr
        done = call("generate", checkpoint, "--prompt", "w5 w17 w3", "--max-new-tokens", 6, "--ignore-end")
        assert "6 tokens in" in done.stderr
    finally:
        (checkpoint / "generation_config.json").unlink()


def test_generate_with_settings(checkpoint):
    model = kvattn.models.from_pretrained(checkpoint)
    options = {"temperature": 0.8, "top_k": 9, "top_p": 0.9, "seed": 3, "codec": kvattn.Int8()}
    expected = kvattn.generate(model, [[7, 5]], 5, **options)[0]
    words = ("--temperature", 0.8, "--top-k", 9, "--top-p", 0.9, "--seed", 3, "--codec", "int8", "--start-token", 7)
    done = call("generate", checkpoint, "--prompt", "w5", "--max-new-tokens", 5, *words)
    assert re.findall(r"w\d+", done.stdout)[1:] == [f"w{t}" for t in expected]


@pytest.mark.parametrize("kind", [None, "device", "pinned_host"])
def test_generate_from_the_hosts_memory(monkeypatch, kind):
    given = []
    monkeypatch.setattr(kvattn.models, "generate", lambda *args, **options: given.append(options) or [[7]])
    done = call("generate", BYTES, "--prompt", "x", *(() if kind is None else ("--cache-memory", kind)))
    assert done.exit_code == 0 and given[0].get("memory_kind") == kind


def test_generate_samples_and_searches(checkpoint):
    model = kvattn.models.from_pretrained(checkpoint)
    words = ("generate", checkpoint, "--prompt", "w5 w17 w3", "--max-new-tokens", 4, "--ignore-end")
    shown = lambda new: f"--- w5 w17 w3\n {' '.join(f'w{t}' for t in new)}\n"
    done = call(*words, "--samples", 2, "--temperature", 1, "--seed", 3)
    expected = kvattn.generate(model, [[5, 17, 3]] * 2, 4, temperature=1.0, seed=3)
    assert done.stdout == "".join(map(shown, expected)) and "8 tokens in" in done.stderr
    greedy = kvattn.generate(model, [[5, 17, 3]], 4)
    assert call(*words, "--beams", 1).stdout == shown(greedy[0])
    both = call(*words, "--beams", 2, "--samples", 2)
    assert both.exit_code == 2 and "it draws no samples" in both.stderr


def test_generate_with_a_model_of_bytes():
    done = call("generate", BYTES, "--prompt", "The expr", "--start-token", 0, "--max-new-tokens", 4)
    model = kvattn.models.load(BYTES)
    expected = bytes(kvattn.generate(model, [b"\0The expr"], 4)[0]).decode()
    assert done.stdout == f"The expr{expected}\n"


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (("nowhere", "--prompt", "x"), "nowhere is no folder"),
        ((CHECKPOINT / "config.json", "--prompt", "x"), f"give the folder it lies in, {CHECKPOINT}"),
        ((CHECKPOINT / "model.safetensors", "--prompt", "x"), f"{CHECKPOINT} is a checkpoint of transformers"),
        ((BYTES, "--prompt", "x", "--ignore", "x"), "--ignore goes with a HuggingFace folder"),
        ((CHECKPOINT, "--prompt", "x"), "tokenizer.json is not there"),
        ((BYTES, "--prompt", "x", "--temperature", "-1"), "temperature must be"),
        ((BYTES, "--prompt", "x", "--temperature", "nan"), "--temperature must be a finite number"),
        ((BYTES, "--prompt", "x", "--max-new-tokens", "-1"), "--max-new-tokens must be >= 0"),
        ((BYTES, "--prompt", "x", "--dtype", "int8"), "unknown --dtype"),
        ((BYTES, "--prompt", "x", "--start-token", "256"), "--start-token must lie in [0, 256), got 256"),
        ((BYTES, "--prompt", ""), "prompt 0"),
        ((BYTES, "--prompt", "x", "--cache-memory", "disk"), "unknown --cache-memory 'disk'"),
        ((BYTES, "--prompt", "x", "--beams", 2, "--cache-memory", "pinned_host"), "leave --cache-memory out"),
    ],
)
def test_generate_refuses(words, part):
    done = call("generate", *words)
    assert done.exit_code == 2, done.output
    last = done.stderr.splitlines()[-1]
    assert last.startswith("kvattn: ") and part in last
    assert done.stdout == ""


# The process ----------------------------------------------------------------------------------------------------------


def test_in_a_pipe():
    """As a user runs it: another process, a narrow and colourful terminal told of, a pipe in truth."""
    environment = {k: v for k, v in os.environ.items() if k not in ("FORCE_COLOR", "JAX_PLATFORMS")}
    environment |= {"TERM": "xterm-256color", "COLUMNS": "40", "COLORTERM": "truecolor"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    words = [sys.executable, "-m", "kvattn.cli", "memory", "--model", "llama-2-7b", "--device", "a10"]
    done = subprocess.run(words, capture_output=True, text=True, encoding="utf-8", timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout == printed("memory", "--model", "llama-2-7b", "--device", "a10")


def test_without_the_extra():
    """Without typer the command says what to install; the library does not miss it."""
    code = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "typer":
            raise ModuleNotFoundError("No module named 'typer'", name="typer")
sys.meta_path.insert(0, Missing())
import kvattn.memory, kvattn.cli
kvattn.cli.main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == "kvattn: the command needs typer: pip install 'kvattn[cli]'"


def test_errors_are_typed():
    with pytest.raises(errors.DTypeError):
        parse.count("batch", "nan")
    with pytest.raises(errors.RangeError):
        parse.count("batch", "-3")
    with pytest.raises(errors.UnknownNameError):
        parse.codec("int5")
