"""Kernels without their device: run in JAX's interpreters, or compiled for a device that is not here."""

import contextlib
import contextvars
from collections.abc import Iterator

from jax._src import config  # the mode that `force_tpu_interpret_mode` sets has no public name

_INTERPRETED: contextvars.ContextVar[bool] = contextvars.ContextVar("interpreted", default=False)
_AHEAD: contextvars.ContextVar[bool] = contextvars.ContextVar("ahead", default=False)


@contextlib.contextmanager
def interpret() -> Iterator[None]:
    """Inside, kernels run on a CPU in JAX's interpreters: slowly, with memory that was not written holding NaN.

    For looking at and testing kernels without their device. What is compiled inside stays interpreted outside, and the
    other way round: use another `jax.jit` for each. JAX's `force_tpu_interpret_mode` and `force_gpu_interpret_mode`
    do the same for kernels of one platform, with their own settings.

    Warpgroups of GPU kernels wait for each other in threads of XLA: on few cores, start Python with NPROC=8 in the
    environment.
    """
    token = _INTERPRETED.set(True)
    try:
        yield
    finally:
        _INTERPRETED.reset(token)


def interpreted(platform: str | None = None) -> bool:
    """Whether kernels run in an interpreter: by `interpret`, or by a mode of JAX's own.

    Args:
        platform: "cuda" or "tpu", whose kernels; None: those of either.
    """
    mode = forced()
    return _INTERPRETED.get() if mode is None else platform in (None, mode)


def forced() -> str | None:
    """The platform whose interpreter JAX forces upon all kernels; None: it does not."""
    mode = config.pallas_tpu_interpret_mode_context_manager.value
    if mode is None:
        return None
    return "cuda" if "GPU" in type(mode).__name__ else "tpu"


@contextlib.contextmanager
def ahead_of_time() -> Iterator[None]:
    """Inside, kernels are taken wherever they are named, whatever the program is made for.

    For lowering and compiling for devices that are not here, where neither a mesh nor ``platform=`` of the cache says
    which they are. Such a program cannot run here.
    """
    token = _AHEAD.set(True)
    try:
        yield
    finally:
        _AHEAD.reset(token)


def is_ahead_of_time() -> bool:
    """Whether `ahead_of_time` is in force."""
    return _AHEAD.get()
