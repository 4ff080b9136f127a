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

# pyright: reportUnsupportedDunderAll=false
__all__ = ["gpu_paged_attention", "gqa", "mqa", "tpu_paged_attention"]  # noqa: F822


def __getattr__(name: str) -> Any:
    # They choose among all implementations, as `cached_attention` does, so they live with it.
    if name in __all__:
        return getattr(importlib.import_module("kvattn.attend.compat"), name)
    raise AttributeError(f"module 'kvattn.pallas.compat' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
