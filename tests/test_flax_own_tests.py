"""Flax's own attention tests, with kvattn's layers in place of Flax's: all pass, and kvattn's code ran in them."""

import importlib.util
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "peers" / "run_flax_tests.py"

# Passing tests in Flax 0.12.12. A newer Flax may have more of them, never fewer.
NUM_ATTENTION_TESTS = 151
NUM_TESTS_ELSEWHERE = 43


def load():
    spec = importlib.util.spec_from_file_location("run_flax_tests", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def flax_tests():
    return load()


@pytest.fixture(scope="module")
def source(flax_tests):
    try:
        return flax_tests.flax_source()
    except flax_tests.SourceUnavailableError as error:
        pytest.skip(str(error))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_attention_tests_of_flax_pass(flax_tests, source):
    found = flax_tests.run(source, flax_tests.ATTENTION)
    assert not found["failed"] and not found["skipped"] and found["exit_status"] == 0, found["output"]
    assert len(found["passed"]) >= NUM_ATTENTION_TESTS
    assert found["counts"]["nnx_layers"] > 100 and found["counts"]["linen_layers"] > 200
    assert found["counts"]["attended"] > 300


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_tests_of_flax_that_use_attention_on_the_way_pass(flax_tests, source):
    found = flax_tests.run(source, flax_tests.ELSEWHERE, flax_tests.ELSEWHERE_FILTER)
    assert not found["failed"] and not found["skipped"] and found["exit_status"] == 0, found["output"]
    assert len(found["passed"]) >= NUM_TESTS_ELSEWHERE
    assert any("test_out_sharding_mha" in name for name in found["passed"])
    assert found["counts"]["nnx_layers"] >= 4 and found["counts"]["linen_layers"] >= 10


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_planted_fault_is_found(flax_tests, source, monkeypatch, tmp_path):
    """The control: with a layer that ignores what it is given, Flax's tests fail."""
    broken = (flax_tests.PEERS / "flax_substitution.py").read_text() + (
        "\n\nimport jax.numpy as jnp\n"
        "kvattn.attend.full.attend = lambda query, key, value, **rules: (jnp.zeros_like(query), None)\n"
    )
    (tmp_path / "flax_substitution.py").write_text(broken)
    monkeypatch.setattr(flax_tests, "PEERS", tmp_path)
    found = flax_tests.run(source, flax_tests.ATTENTION[:1], "test_multihead_sow_attention_weights or test_with_mha")
    assert found["failed"]
