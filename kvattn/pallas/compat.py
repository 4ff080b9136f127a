"""The calls of JAX's deprecated decode kernels: change the import, keep the code.

===========================================================  ==========================================
``jax.experimental.pallas.ops.gpu.decode_attention.mqa``      `kvattn.pallas.compat.mqa`
``jax.experimental.pallas.ops.gpu.decode_attention.gqa``      `kvattn.pallas.compat.gqa`
``jax.experimental.pallas.ops.gpu.paged_attention``           `kvattn.pallas.compat.gpu_paged_attention`
``jax.experimental.pallas.ops.tpu.paged_attention``           `kvattn.pallas.compat.tpu_paged_attention`
===========================================================  ==========================================
"""

import importlib
from typing import Any

_NAMES = ("mqa", "gqa", "gpu_paged_attention", "tpu_paged_attention")


def __getattr__(name: str) -> Any:
    # They choose among all implementations, as `cached_attention` does, so they live with it.
    if name in _NAMES:
        return getattr(importlib.import_module("kvattn.attend.compat"), name)
    raise AttributeError(f"module 'kvattn.pallas.compat' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_NAMES])
