"""Whether kernels run in JAX's interpreters, which need no device."""

import contextlib
import contextvars
from collections.abc import Iterator

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
