"""A pytest plugin that puts kvattn's layers where Flax's tests look for Flax's, and reports what happened.

Loaded by `run_flax_tests.py` with ``-p flax_substitution``, before any test module is imported. The report
goes to the file that FLAX_TESTS_REPORT names.
"""

import collections
import functools
import json
import os

import flax.linen
import flax.linen.attention
import flax.nnx
import flax.nnx.nn.attention

import kvattn.layers
import kvattn.layers.linen

COUNTS = collections.Counter()
OUTCOMES = collections.defaultdict(list)
LINEN_CLASSES = ("MultiHeadDotProductAttention", "MultiHeadAttention", "SelfAttention")


def counted(owner, attribute, label):
    """Counts the calls of a function of kvattn, and leaves everything else about it as it is."""
    function = getattr(owner, attribute)

    @functools.wraps(function)
    def counting(*args, **kwargs):
        COUNTS[label] += 1
        return function(*args, **kwargs)

    setattr(owner, attribute, counting)


def substitute():
    for module in (flax.nnx, flax.nnx.nn.attention):
        for name in ("MultiHeadAttention", "dot_product_attention"):
            assert hasattr(module, name), f"{module.__name__} has no {name} any more"
            setattr(module, name, getattr(kvattn.layers, name))
    for module in (flax.linen, flax.linen.attention):
        for name in LINEN_CLASSES:
            assert hasattr(module, name), f"{module.__name__} has no {name} any more"
            setattr(module, name, getattr(kvattn.layers.linen, name))


counted(kvattn.layers.MultiHeadAttention, "__init__", "nnx_layers")
counted(kvattn.layers.linen.MultiHeadDotProductAttention, "__post_init__", "linen_layers")
counted(kvattn.attend.full, "attend", "attended")
substitute()


def pytest_runtest_logreport(report):
    if report.when == "call" or report.outcome != "passed":
        OUTCOMES[report.outcome].append(report.nodeid)


def pytest_sessionfinish(session, exitstatus):
    del session
    report = {"exit_status": int(exitstatus), "counts": dict(COUNTS), **OUTCOMES}
    with open(os.environ["FLAX_TESTS_REPORT"], "w") as file:
        json.dump(report, file)
