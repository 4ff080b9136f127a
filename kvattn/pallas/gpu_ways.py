"""Which way a GPU decodes: by `wgmma` or by `mma`, tiles copied by an engine or by threads, and how much it holds."""

import jax

from kvattn import _target
from kvattn.errors import UnsupportedError
from kvattn.pallas.tuning import GpuConfig

CAPABILITIES = {
    "A100": "8.0",
    "A10": "8.6",
    "L40": "8.9",
    "L4": "8.9",
    "GeForce RTX 30": "8.6",
    "GeForce RTX 40": "8.9",
    "GeForce RTX 50": "12.0",
    "H100": "9.0",
    "H200": "9.0",
    "B200": "10.0",
    "B300": "10.3",
    "T4": "7.5",
    "V100": "7.0",
}
"""Of devices of which no more than the name is known, as those of abstract meshes. The first name that fits counts."""
LEAST, HOPPER, BEYOND = (8, 0), (9, 0), (11, 0)
SHARED_KIB = {(8, 0): 163, (8, 6): 99, (8, 7): 163, (8, 9): 99, HOPPER: 227, (10, 0): 227, (10, 3): 227}
"""Of one program, by compute capability (CUDA C++ Programming Guide, technical specifications)."""


def capability_of(target: _target.Target) -> str | None:
    """The compute capability of a GPU, or None where it is not known."""
    if target.platform != "cuda":
        return None
    if (said := _said(target)) is not None:
        return said
    kind = target.device_kind or ""
    return next((capability for name, capability in CAPABILITIES.items() if name in kind), None)


def _said(target: _target.Target) -> str | None:
    """What the GPU itself says, or one of its kind that is here; None: neither does."""
    if target.compute_capability is not None or target.device_kind is None:
        return target.compute_capability
    here = jax.local_devices()[0]
    return str(here.compute_capability) if here.device_kind == target.device_kind else None


def capability() -> tuple[int, int]:
    """That of the GPU that the program is made for; Hopper's where nobody says which."""
    major, minor = (capability_of(_target.current()) or "9.0").split(".")
    return int(major), int(minor)


def refusal() -> str | None:
    """Why the GPU that the program is made for cannot run it; None: it can."""
    target = _target.current()
    known = capability_of(target)
    if known is None or HOPPER <= capability() < BEYOND:
        return None
    if capability() >= BEYOND:
        return f"JAX's Mosaic GPU compiles nothing for compute capability {known} yet"
    if capability() < LEAST:
        return f"it needs a matrix unit for bfloat16 (compute capability 8.0 and later); this GPU has {known}"
    if _said(target) is None:
        return (
            f"JAX compiles for Hopper where the abstract device of a mesh does not say what it can do; give it the "
            f"attribute compute_capability = {known!r}"
        )
    return None


def shared_bytes() -> int:
    """Shared memory of a multiprocessor for programs; of those that are not in the table, the least."""
    return SHARED_KIB.get(capability(), min(SHARED_KIB.values())) << 10


def unit_of(config: GpuConfig) -> str:
    """The matrix unit.

    Raises:
        UnsupportedError: one was asked for that the GPU has not.
    """
    if config.unit == "wgmma" and capability() != HOPPER:
        known = ".".join(map(str, capability()))
        raise UnsupportedError(
            f"'mosaic_gpu': wgmma is Hopper's alone (compute capability 9.0), this GPU has {known}: take unit='mma'."
        )
    return config.unit or ("wgmma" if capability() == HOPPER else "mma")


def by_threads() -> bool:
    """Whether threads copy tiles: before Hopper nothing else does."""
    return capability() < HOPPER
