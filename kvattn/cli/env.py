"""``kvattn env``: versions, devices, and which implementations work here."""

import importlib.metadata
import json
import os
import platform
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import typer

from kvattn import measure
from kvattn.attend import api, registry
from kvattn.cli import show
from kvattn.errors import KVAttnError
from kvattn.families.settings import Value

PACKAGES = (
    "kvattn", "jax", "jaxlib", "flax", "numpy", "jaxtyping", "safetensors", "tokenizers", "typer", "rich",
)  # fmt: skip
"""Whose versions are told."""

VARIABLES = ("JAX_PLATFORMS", "XLA_FLAGS", "LIBTPU_INIT_ARGS", "XLA_PYTHON_CLIENT_MEM_FRACTION", "JAX_ENABLE_X64")
"""Variables of the environment that change what happens."""


@show.reports_errors
def env(as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False) -> None:
    """Versions, devices, and which implementations work here, and why not the others. For bug reports."""
    found = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: version(name) for name in PACKAGES},
        "environment": {name: os.environ[name] for name in VARIABLES if name in os.environ},
        "backend": jax.default_backend(),
        "devices": [_device(d) for d in jax.devices()],
        "implementations": {name: works(name) for name in registry.names()},
    }
    if as_json:
        typer.echo(json.dumps(found, indent=1))
        return
    rows = [("python", found["python"]), ("platform", found["platform"])]
    rows += [(name, v or "not installed") for name, v in found["packages"].items()]
    rows += list(found["environment"].items())
    devices = show.columns(["device", "kind", "memory", "in use"], left=(0, 1))
    for d in found["devices"]:
        sizes = ("" if d[key] is None else show.size(d[key]) for key in ("memory_bytes", "used_bytes"))
        devices.add_row(f"{d['platform']}:{d['id']}", d["kind"], *sizes)
    table = show.columns(["implementation", "here"], left=(0, 1))
    for name, reason in found["implementations"].items():
        table.add_row(name, "works" if reason is None else f"no: {reason}")
    show.display(show.pairs(rows), "", devices, "", table)


def version(package: str) -> str | None:
    """Of an installed package; None: it is not."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        if package == "kvattn":  # run from a checkout
            from kvattn import __version__

            return __version__
        return None


def works(implementation: str) -> str | None:
    """Runs a small decode step and compares it with the reference.

    Returns:
        None, or why not, in one line.
    """
    if (reason := api.unsupported(implementation)) is not None:
        return reason
    case = measure.Case(num_heads=8, num_kv_heads=2, head_dim=128, batch_size=1, context=256, dtype=jnp.bfloat16)
    query, token, fresh = case.inputs()
    expected, _ = measure.step("reference")(query, *token, fresh())
    try:
        out, _ = measure.step(implementation)(query, *token, fresh())
        error = float(jnp.max(jnp.abs(out.astype(jnp.float32) - expected.astype(jnp.float32))))
    except KVAttnError as refused:
        return str(refused)
    except Exception as failed:  # what compilers and drivers raise has no common class
        return f"{type(failed).__name__}: {str(failed).strip().splitlines()[0] if str(failed).strip() else ''}"
    return None if error < 0.05 else f"its output is off by {error:.2g}"


def _device(device: Any) -> dict[str, Value]:
    try:
        stats = device.memory_stats() or {}
    except Exception:  # backends without a count raise in their own ways
        stats = {}
    return {
        "platform": device.platform,
        "id": device.id,
        "kind": device.device_kind,
        "memory_bytes": stats.get("bytes_limit"),
        "used_bytes": stats.get("bytes_in_use"),
    }
