"""The kernels of this package, as `kvattn.attend` knows them: a record each, and nothing loaded."""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType

from kvattn.attend import registry
from kvattn.attend.at_once import Appender
from kvattn.attend.registry import Implementation, Kernel, Tuning
from kvattn.attend.request import Request
from kvattn.pallas import tuning
from kvattn.pallas.interpreter import forced, interpreted, is_ahead_of_time


def _gpu_decode() -> Kernel:
    from kvattn.pallas import gpu_decode

    return gpu_decode


def _gpu_hides(request: Request) -> bool:
    from kvattn.pallas import gpu_decode

    return gpu_decode.hides(request)


def _gpu_append() -> Appender:
    from kvattn.pallas import gpu_append

    return gpu_append


def _tpu_decode() -> Kernel:
    from kvattn.pallas import tpu_decode

    return tpu_decode


def _tpu_append() -> Callable[[Any], Any]:
    from kvattn.pallas import tpu_append

    return tpu_append.InPlace


def _blocked(platform: str) -> str | None:
    """Why a kernel made for a platform is not to be had here, on whatever device; None: it is."""
    if (mode := forced()) not in (None, platform):
        return (
            f"JAX's interpreter of {mode!r} kernels is forced upon all of them, and this one is made for {platform!r}"
        )
    if axes := _shared_axes():
        return f"compilers do not divide kernels over mesh axes ({axes}); call it inside jax.shard_map over them"
    return None


def _is_bound(platform: str) -> bool:
    """Whether what a kernel traces can be lowered for its platform only."""
    return not (interpreted(platform) or is_ahead_of_time())


def _shared_axes() -> str:
    """Axes of the current mesh that are not `jax.shard_map`'s and over which arrays may be split."""
    mesh = jax.sharding.get_abstract_mesh()
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return ", ".join(n for n, kind in kinds if kind != AxisType.Manual and mesh.shape[n] > 1)


registry.register(
    Implementation(
        "mosaic_gpu",
        _gpu_decode,
        platform="cuda",
        blocked=functools.partial(_blocked, "cuda"),
        is_bound=functools.partial(_is_bound, "cuda"),
        hides=_gpu_hides,
        appender=_gpu_append,
        tuning=Tuning(tuning.GpuConfig, tuning.CANDIDATES["mosaic_gpu"]),
    )
)
registry.register(
    Implementation(
        "mosaic_tpu",
        _tpu_decode,
        platform="tpu",
        blocked=functools.partial(_blocked, "tpu"),
        is_bound=functools.partial(_is_bound, "tpu"),
        writer=_tpu_append,  # XLA would copy the cache around a single token
        tuning=Tuning(tuning.TpuConfig, tuning.CANDIDATES["mosaic_tpu"]),
    )
)
