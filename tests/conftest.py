"""Strict numerics for every test, on eight CPU devices.

Nothing here imports kvattn. The platform and the device count are set before JAX initialises.

    KVATTN_TEST_PLATFORM=cuda pytest -m gpu    run the accelerator tests on the accelerator
    KVATTN_TEST_CACHE=0 pytest                 compile everything anew
    KVATTN_TEST_OPTIMIZE=1 pytest              compile as users' programs are
    pytest --shapes=1                          check every shape annotation of kvattn at run time
    pytest --shapes=16                         in one test of sixteen, always the same ones
"""

import hashlib
import os
import pathlib
import platform
import zlib

PLATFORM = os.environ.get("KVATTN_TEST_PLATFORM", "cpu")
os.environ["JAX_PLATFORMS"] = PLATFORM


def _cpu() -> str:
    """Compiled programs are for one kind of CPU."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
    return hashlib.sha256(flags.encode()).hexdigest()[:12]


# Most of the time of these tests is compiling. JAX keeps compiled programs on disk, by program, version and options;
# an entry that cannot be read (another worker is writing it) is a warning, ignored in pyproject.toml, and compiled
# again. By environment, so that the processes tests start do the same.
if PLATFORM == "cpu" and os.environ.get("KVATTN_TEST_CACHE", "1") != "0":
    _folder = pathlib.Path(__file__).resolve().parent.parent / ".cache" / "jax" / _cpu()
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_folder))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

# Half of what is left goes into LLVM's passes over programs that run for a moment. Without them the same HLO runs, so
# aliases, copies and collectives are what they are; numbers are rounded in other places, as on another CPU. test-full
# compiles as users do.
if PLATFORM == "cpu" and os.environ.get("KVATTN_TEST_OPTIMIZE", "0") == "0":
    os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402

NUM_CPU_DEVICES = 8
COLLECTED = pytest.StashKey[frozenset[str]]()
"""The node ids of the tests of this run, the slow ones too; not there where single tests were asked for."""

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
    parser.addoption(
        "--shapes",
        type=int,
        default=0,
        metavar="N",
        help="check kvattn's shape annotations at run time (jaxtyping), in one test of N: it makes them twice as slow",
    )


def pytest_configure(config):
    if config.getoption("--shapes"):
        import jaxtyping

        jaxtyping.install_import_hook("kvattn", "shapes.typechecker")


@pytest.hookimpl(tryfirst=True)  # before `-m` chooses
def pytest_collection_modifyitems(config, items):
    """Mark what slow.txt names; skip what needs hardware that is not there, always with the reason."""
    lines = (pathlib.Path(__file__).parent / "slow.txt").read_text().splitlines()
    slow = {line for line in lines if not line.startswith("#")}
    if not any("::" in str(argument) for argument in config.args):  # whole files
        config.stash[COLLECTED] = frozenset(item.nodeid for item in items)
    for item in items:
        if item.nodeid in slow:
            item.add_marker(pytest.mark.slow)
        for marker, wanted in (("gpu", "cuda"), ("tpu", "tpu")):
            if item.get_closest_marker(marker) and wanted != PLATFORM:
                item.add_marker(pytest.mark.skip(reason=f"needs KVATTN_TEST_PLATFORM={wanted}, got {PLATFORM}"))


def pytest_sessionstart(session):
    """A test that silently ran on another platform or device count proves nothing."""
    if PLATFORM == "cpu":
        devices = jax.devices()
        if len(devices) != NUM_CPU_DEVICES or devices[0].platform != "cpu":
            raise pytest.UsageError(f"expected {NUM_CPU_DEVICES} CPU devices, got {devices}")


@pytest.fixture
def collected(request):
    """The node ids of the tests in the files of this run, those too that are left out of it."""
    return request.config.stash.get(COLLECTED, frozenset())


@pytest.fixture(autouse=True)
def _shapes(request):
    """`--shapes` does not look at tests that give what annotations exclude: there kvattn's own errors are tried."""
    every = request.config.getoption("--shapes")
    if not every:
        yield
        return
    import jaxtyping

    chosen = zlib.crc32(request.node.nodeid.encode()) % every == 0
    is_checked = chosen and not request.node.get_closest_marker("wrong_types")
    jaxtyping.config.update("jaxtyping_disable", not is_checked)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="module", autouse=True)
def _drop_compiled_programs():
    """Each compiled program takes memory maps, and a process has 65530: none outlives its module."""
    yield
    jax.clear_caches()
