"""Runs Flax's own attention tests with kvattn's layers in place of Flax's.

    python tests/peers/run_flax_tests.py            all of them; prints what passed

The tests come from the source distribution of the Flax that is installed. It is fetched once, into
`.cache/` of this repository, and is no part of it. KVATTN_FLAX_SOURCE names an unpacked one instead.
"""

import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

PEERS = Path(__file__).resolve().parent
REPOSITORY = PEERS.parent.parent
CACHE = REPOSITORY / ".cache" / "flax-source"

ATTENTION = (
    "tests/nnx/nn/attention_test.py",
    "tests/linen/linen_attention_test.py",
    "tests/core/design/core_attention_test.py",
)
ELSEWHERE = (
    "tests/nnx/spmd_test.py::TestSPMD::test_out_sharding_mha",
    "tests/nnx/nn/linear_test.py",
    "tests/linen/linen_test.py",
    "tests/linen/linen_combinators_test.py",
)
"""Tests of other things that use attention layers on the way; `ELSEWHERE_FILTER` picks them."""
ELSEWHERE_FILTER = (
    "test_out_sharding_mha or MultiHeadAttention or TestLayersSameGraph or TestLayersParamsMetadata "
    "or test_spectral_norm_train or test_weight_norm_train "
    "or test_tuple_output or test_dict_output"
)


class SourceUnavailableError(Exception):
    """Flax's source distribution could not be fetched."""


def flax_source() -> Path:
    """The folder of Flax's source, of the version that is installed."""
    if "KVATTN_FLAX_SOURCE" in os.environ:
        return Path(os.environ["KVATTN_FLAX_SOURCE"])
    version = importlib.metadata.version("flax")
    folder = CACHE / f"flax-{version}"
    if (folder / ATTENTION[0]).exists():
        return folder
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
        archive = download(version, Path(scratch))
        with tarfile.open(archive) as file:
            file.extractall(scratch, filter="data")
        # One rename, so that two runs at once cannot see half a folder.
        try:
            os.replace(Path(scratch) / f"flax-{version}", folder)
        except OSError:
            if not (folder / ATTENTION[0]).exists():
                raise
    return folder


def download(version: str, target: Path) -> Path:
    """Fetches the source distribution with pip, whichever way pip is there."""
    pips = []
    if importlib.util.find_spec("pip"):
        pips.append([sys.executable, "-m", "pip"])
    if shutil.which("uv"):
        pips.append(["uv", "tool", "run", "pip"])
    reason = "neither pip nor uv is installed"
    for pip in pips:
        command = [
            *pip,
            "download",
            "--quiet",
            "--no-deps",
            "--no-binary",
            "flax",
            "--dest",
            target,
            f"flax=={version}",
        ]
        try:
            result = subprocess.run(command, capture_output=True, text=True, timeout=240)
        except subprocess.TimeoutExpired:
            reason = f"{' '.join(pip)} download took longer than 240 s"
            continue
        found = sorted(target.glob("flax-*.tar.gz"))
        if result.returncode == 0 and found:
            return found[0]
        reason = (result.stderr.strip().splitlines() or ["no message"])[-1]
    raise SourceUnavailableError(f"cannot fetch the source of flax {version}: {reason}")


def run(source: Path, tests: tuple[str, ...], keywords: str | None = None, timeout: float = 900) -> dict:
    """Runs some of Flax's test files in a process of its own.

    Args:
        source: Flax's source.
        tests: files, or node ids, below it.
        keywords: pytest's ``-k``.
        timeout: seconds.

    Returns:
        ``exit_status``, ``passed``, ``failed`` and ``skipped`` (node ids), ``counts`` (how often kvattn's classes
        were made and its attention ran), ``output``.
    """
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.json"
        env = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "JAX_", "XLA_"))}
        env |= {
            "FLAX_TESTS_REPORT": str(report),
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": os.pathsep.join([str(PEERS), str(REPOSITORY)]),
            "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        }
        command = [sys.executable, "-m", "pytest", "-q", "-p", "flax_substitution", "-p", "no:cacheprovider"]
        command += ["--rootdir", str(source), "-c", str(source / "pyproject.toml"), "--import-mode=importlib"]
        command += [str(source / test) for test in tests] + (["-k", keywords] if keywords else [])
        # Not from within the source: its own flax must not shadow the one that is installed.
        result = subprocess.run(command, cwd=scratch, env=env, capture_output=True, text=True, timeout=timeout)
        if not report.exists():
            raise RuntimeError(f"Flax's tests did not start:\n{result.stdout}\n{result.stderr}")
        found = {"passed": [], "failed": [], "skipped": [], **json.loads(report.read_text())}
        return {**found, "output": result.stdout[-20000:]}


def main() -> int:
    source = flax_source()
    status = 0
    for name, tests, keywords in (("attention", ATTENTION, None), ("elsewhere", ELSEWHERE, ELSEWHERE_FILTER)):
        found = run(source, tests, keywords)
        numbers = ", ".join(f"{len(found[outcome])} {outcome}" for outcome in ("passed", "failed", "skipped"))
        print(f"{name}: {numbers}; kvattn: {found['counts']}")
        if found["exit_status"]:
            status = 1
            print(found["output"])
    return status


if __name__ == "__main__":
    sys.exit(main())
