"""Kernels without their device: run in JAX's interpreters, or compiled for a device that is not here."""

import contextlib
import contextvars
from collections.abc import Iterator

_INTERPRETED: contextvars.ContextVar[bool] = contextvars.ContextVar("interpreted", default=False)
_AHEAD: contextvars.ContextVar[bool] = contextvars.ContextVar("ahead", default=False)


@contextlib.contextmanager
def interpret() -> Iterator[None]:
    """Inside, kernels run on a CPU in JAX's interpreters: slowly, with memory that was not written holding NaN.

    For looking at and testing kernels without their device. What is compiled inside stays interpreted outside, and the
    other way round: use another `jax.jit` for each.

    Warpgroups of GPU kernels wait for each other in threads of XLA: on few cores, start Python with NPROC=8 in the
    environment.
    """
    token = _INTERPRETED.set(True)
    try:
        yield
    finally:
        _INTERPRETED.reset(token)


def interpreted() -> bool:
    """Whether `interpret` is in force."""
    return _INTERPRETED.get()


@contextlib.contextmanager
def ahead_of_time() -> Iterator[None]:
    """Inside, kernels are taken that are made for another backend than the default one.

    For lowering and compiling programs for devices that are not here. Such a program cannot run here.
    """
    token = _AHEAD.set(True)
    try:
        yield
    finally:
        _AHEAD.reset(token)


def is_ahead_of_time() -> bool:
    """Whether `ahead_of_time` is in force."""
    return _AHEAD.get()
