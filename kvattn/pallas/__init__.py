"""Kernels for the memory-bound decode step, written in Pallas.

`kvattn.cached_attention` takes them by itself where they run. `decode_attention` and `paged_decode_attention` call them
on plain arrays.
"""

import contextlib
import contextvars
import importlib
from collections.abc import Iterator
from typing import Any

_INTERPRETED: contextvars.ContextVar[bool] = contextvars.ContextVar("interpreted", default=False)


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


# pyright: reportUnsupportedDunderAll=false
__all__ = ["compat", "decode_attention", "interpret", "paged_decode_attention", "tuning"]

_ON_FIRST_USE = ("decode_attention", "paged_decode_attention")
_MODULES = ("compat", "tuning")


def __getattr__(name: str) -> Any:
    # They choose among all implementations, as `cached_attention` does, so they live with it.
    if name in _ON_FIRST_USE:
        return getattr(importlib.import_module("kvattn.attend.on_arrays"), name)
    if name in _MODULES:
        return importlib.import_module(f"kvattn.pallas.{name}")
    raise AttributeError(f"module 'kvattn.pallas' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
