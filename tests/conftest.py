"""Strict numerics for every test, on eight CPU devices.

Nothing here imports kvattn. The platform and the device count are set before JAX initialises.

    KVATTN_TEST_PLATFORM=cuda pytest -m gpu        run the accelerator tests on the accelerator
    pytest --shapes                                check every shape annotation of kvattn at run time
"""

import os

PLATFORM = os.environ.get("KVATTN_TEST_PLATFORM", "cpu")
os.environ["JAX_PLATFORMS"] = PLATFORM

import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402

NUM_CPU_DEVICES = 8

jax.config.update("jax_platforms", PLATFORM)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
if PLATFORM == "cpu":
    jax.config.update("jax_num_cpu_devices", NUM_CPU_DEVICES)

hypothesis.settings.register_profile(
    "kvattn", derandomize=True, deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("kvattn")


def pytest_addoption(parser):
    parser.addoption("--shapes", action="store_true", help="check kvattn's shape annotations at run time (jaxtyping)")


def pytest_configure(config):
    if config.getoption("--shapes"):
        import jaxtyping

        jaxtyping.install_import_hook("kvattn", "beartype.beartype")


def pytest_collection_modifyitems(config, items):
    """Skip what needs hardware that is not there; never by accident, always with the reason."""
    for item in items:
        for marker, platform in (("gpu", "cuda"), ("tpu", "tpu")):
            if item.get_closest_marker(marker) and platform != PLATFORM:
                item.add_marker(pytest.mark.skip(reason=f"needs KVATTN_TEST_PLATFORM={platform}, got {PLATFORM}"))


def pytest_sessionstart(session):
    """A test that silently ran on another platform or device count proves nothing."""
    if PLATFORM == "cpu":
        devices = jax.devices()
        if len(devices) != NUM_CPU_DEVICES or devices[0].platform != "cpu":
            raise pytest.UsageError(f"expected {NUM_CPU_DEVICES} CPU devices, got {devices}")
