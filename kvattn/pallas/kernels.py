"""The kernels of this package, as `kvattn.attend` knows them: a record each, and nothing loaded."""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType

from kvattn.attend import registry
from kvattn.attend.registry import Implementation, Kernel, Tuning
from kvattn.pallas import tuning
from kvattn.pallas.interpreter import interpreted, is_ahead_of_time


def _gpu_decode() -> Kernel:
    from kvattn.pallas import gpu_decode

    return gpu_decode


def _tpu_decode() -> Kernel:
    from kvattn.pallas import tpu_decode

    return tpu_decode


def _tpu_append() -> Callable[[Any], Any]:
    from kvattn.pallas import tpu_append

    return tpu_append.InPlace


def _blocked(platform: str) -> str | None:
    """Why a kernel made for a platform cannot run in this process; None: it can."""
    backend = jax.default_backend()
    if backend != platform and not (interpreted() or is_ahead_of_time()):
        return f"it needs a {platform.upper()}, and the default backend here is {backend!r}"
    if axes := _shared_axes():
        return f"compilers do not divide kernels over mesh axes ({axes}); call it inside jax.shard_map over them"
    return None


def _shared_axes() -> str:
    """Axes of the current mesh that are not `jax.shard_map`'s and over which arrays may be split."""
    mesh = jax.sharding.get_abstract_mesh()
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return ", ".join(n for n, kind in kinds if kind != AxisType.Manual and mesh.shape[n] > 1)


registry.register(
    Implementation(
        "mosaic_gpu",
        _gpu_decode,
        platform="gpu",
        blocked=functools.partial(_blocked, "gpu"),
        tuning=Tuning(tuning.GpuConfig, tuning.CANDIDATES["mosaic_gpu"]),
    )
)
registry.register(
    Implementation(
        "mosaic_tpu",
        _tpu_decode,
        platform="tpu",
        blocked=functools.partial(_blocked, "tpu"),
        writer=_tpu_append,  # XLA would copy the cache around a single token
        tuning=Tuning(tuning.TpuConfig, tuning.CANDIDATES["mosaic_tpu"]),
    )
)
