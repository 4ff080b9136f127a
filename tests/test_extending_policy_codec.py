"""A policy and a codec from one file outside the package: they work wherever the package's own do, no edit elsewhere.

The file is what `docs/extending.md` shows.
"""

import dataclasses
import importlib
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import attend_token
from test_docs import ROOT, blocks

import kvattn
from kvattn import errors, memory
from kvattn.cli import parse
from kvattn.codecs.registry import CODECS
from kvattn.policies.registry import POLICIES

SHOWN = "docs/extending.md"
B, N, K, H = 2, 4, 2, 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the file."""
    shown = [code for _, code in blocks((ROOT / SHOWN).read_text())]
    code = [next(code for code in shown if word in code) for word in ("policies.register(", "codecs.register(")]
    path = tmp_path_factory.mktemp("own") / "own_parts.py"
    path.write_text("\n\n".join(code))
    return path.parent


@pytest.fixture(scope="module")
def own(folder):
    """The file, imported; forgotten at the end."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        for table in (POLICIES, CODECS):
            patch.setattr(table, "_entries", list(table.registered()))
        yield importlib.import_module("own_parts")
        del sys.modules["own_parts"]


def tokens(length):
    rng = np.random.default_rng(0)
    return [rng.normal(size=(B, length, heads, H)).astype(np.float32) for heads in (N, K, K)]


def test_the_step(own):
    """Against float64 attention over the even tokens and the last one, a token at a time and in chunks."""
    query, key, value = tokens(17)
    step = jax.jit(kvattn.cached_attention)
    for codec, atol in ((None, 1e-5), (own.Companded(), 0.05)):
        cache = kvattn.KVCache.create(B, K, H, capacity=17, policy=own.EverySecond(), codec=codec, dtype=jnp.float32)
        start = 0
        for length in (6, 1, 1, 1, 3, 1, 1, 2, 1):
            new = [jnp.asarray(x[:, start : start + length]) for x in (query, key, value)]
            out, cache = step(*new, cache)
            old = [p for p in range(start) if p % 2 == 0 or (p == start - 1 and length > 1)]
            for b, t in np.ndindex(B, length):
                seen = [*old, *range(start, start + t + 1)]
                expected, _ = attend_token(query[b, start + t], [key[b, j] for j in seen], [value[b, j] for j in seen])
                np.testing.assert_allclose(out[b, t], expected, atol=atol)
            start += length
            kept = {p for p in range(start) if p % 2 == 0} | {start - 1}
            assert [{*row} - {-1} for row in cache.positions.tolist()] == [kept] * B
    with pytest.raises(errors.CapacityError):
        kvattn.cached_attention(*(jnp.asarray(x[:, :2]) for x in (query, key, value)), cache)
    with pytest.raises(errors.UnsupportedError, match=r"KIVI.*EverySecond.*share their scales"):
        kvattn.KVCache.create(B, K, H, capacity=17, policy=own.EverySecond(), codec=kvattn.KIVI())


def test_the_command_line(own):
    assert parse.policy("every-second") == parse.policy("EverySecond()") == own.EverySecond()
    assert parse.codec("companded") == (own.Companded(), None)
    with pytest.raises(errors.UnknownNameError, match="fastgen, every-second"):
        parse.policy("every-third")
    with pytest.raises(errors.UnknownNameError, match=r"float32, int8.*kivi, companded"):
        parse.codec("int5")


def test_the_planner(own):
    full = memory.plan("llama-2-7b", "h100", length=4096, batch_size=2)
    plans = [full.changed(policy=own.EverySecond()), full.changed(codec=own.Companded())]
    for p in plans:
        assert 0.48 < p.device_cache_bytes / full.device_cache_bytes < 0.54
    found = {lever.name: lever for lever in memory.levers(full)}
    for p, name, outputs in zip(plans, ("EverySecond()", "Companded()"), ("fewer tokens", "rounded"), strict=True):
        assert (found[name].plan, found[name].outputs) == (p, outputs)


@pytest.mark.slow
def test_the_command(own, folder):
    code = "import own_parts, kvattn.cli; kvattn.cli.main()"
    words = [
        "memory",
        "--model",
        "gpt2",
        "--length",
        "1024",
        "--policy",
        "every-second",
        "--codec",
        "companded",
        "--json",
    ]
    done = subprocess.run([sys.executable, "-c", code, *words], cwd=folder, env=with_path(ROOT), capture_output=True)
    assert done.returncode == 0, done.stderr
    size = memory.cache_bytes(memory.MODELS["gpt2"], 1, 1024, policy=own.EverySecond(), codec=own.Companded())
    assert [row["cache_bytes"] for row in json.loads(done.stdout)["lengths"]] == [size]


def with_path(*folders):
    """The environment of a process that finds modules there too."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join([*map(str, folders), os.environ.get("PYTHONPATH", "")])}


def in_the_suites(folder, *words):
    """What pytest prints where the file is a plugin, and nothing else was changed."""
    command = [sys.executable, "-m", "pytest", "-p", "own_parts", "-p", "no:cacheprovider", "-q", *words]
    done = subprocess.run(command, cwd=ROOT, env=with_path(folder), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


SUITES = {
    "codecs": "Companded",
    "combinations": "EverySecond-Companded",
    "gpu_kernels": "EverySecond",
    "layers_settings": "EverySecond",
    "meanings": "EverySecond",
    "policies": "EverySecond",
    "shard_map": "EverySecond-Companded",
    "sharding": "every-second",
    "tpu_kernels": "EverySecond",
    "trees": "EverySecond",
}


@pytest.mark.slow
def test_every_suite_has_them(folder):
    files = [f"tests/test_{name}.py" for name in SUITES]
    found = in_the_suites(folder, "--collect-only", "-k", "EverySecond or Companded or every-second", *files)
    for name, word in SUITES.items():
        lines = [line for line in found.splitlines() if f"test_{name}.py" in line]
        assert any(word in line for line in lines), (name, lines)


@pytest.mark.slow
def test_suites_run_over_them(folder):
    tests = (
        "tests/test_meanings.py::test_every_variant_has_a_line",
        "tests/test_meanings.py::test_policy_suite[EverySecond-xla]",
        "tests/test_meanings.py::test_codec_suite[Companded]",
        "tests/test_codecs.py::test_any_magnitude_stays_finite_and_within_the_bound[0.3-Companded]",
        "tests/test_codecs.py::test_values_that_are_not_finite[nan-Companded]",
        "tests/test_combinations.py::test_layers_are_the_functional_step[EverySecond-Companded-GQA]",
        "tests/test_policies.py::test_output_is_attention_over_the_kept_tokens[GQA-EverySecond]",
    )
    assert f"{len(tests)} passed" in in_the_suites(folder, *tests)


@dataclasses.dataclass(frozen=True)
class Another(kvattn.Full):
    pass


WRONG = [
    ({"name": "h2o"}, "the policy name 'h2o' is taken by H2O"),
    ({"name": "Sliding-Window"}, "'slidingwindow' is taken by SlidingWindow"),
    ({"name": "another", "aliases": ["full"]}, "'full' is taken by Full"),
    ({"name": "another", "aliases": "other"}, "aliases is a list of names, got 'other'"),
    ({"name": "2nd"}, "a letter first, got '2nd'"),
    ({"name": None}, "a letter first, got None"),
    ({"kind": kvattn.H2O, "name": "another"}, "H2O is registered already, as 'h2o'"),
    ({"kind": kvattn.Int8, "name": "another"}, "a policy is a subclass of kvattn.policies.Policy, got <class"),
    ({"kind": Another(), "name": "another"}, r"a subclass of kvattn.policies.Policy, got Another\(\)"),
    ({"name": "another", "examples": [kvattn.Full()]}, r"examples of Another are instances of it, got Full\(\)"),
]


@pytest.mark.wrong_types
@pytest.mark.parametrize(("settings", "text"), WRONG, ids=[text for _, text in WRONG])
def test_what_cannot_be_registered(settings, text):
    before = kvattn.policies.registered()
    with pytest.raises(errors.ConfigError, match=text):
        kvattn.policies.register(**{"kind": Another, **settings})
    assert kvattn.policies.registered() == before


def test_policies_are_no_codecs():
    with pytest.raises(errors.ConfigError, match=r"a codec is a subclass of kvattn.codecs.Codec, got <class"):
        kvattn.codecs.register(Another, "another")
    with pytest.raises(errors.ConfigError, match="the codec name 'fp8' is taken by Float8"):
        kvattn.codecs.register(type("Own", (kvattn.Int8,), {}), "fp8")
