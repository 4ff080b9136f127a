"""Which implementation attends: the names, the choice, and the fall back."""

import dataclasses
import importlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType

from kvattn import _manual
from kvattn._typing import Array
from kvattn.attend.derivative import Attend, Result, differentiable
from kvattn.errors import ConfigError, UnsupportedError
from kvattn.pallas import interpreted
from kvattn.request import Request

NAMES = ("reference", "xla", "mosaic_gpu", "mosaic_tpu")
"""The names `implementation` may take."""

_NEEDS = {"mosaic_gpu": "gpu", "mosaic_tpu": "tpu"}
_MODULES = {
    "reference": "kvattn.attend.reference",
    "xla": "kvattn.attend.xla",
    "mosaic_gpu": "kvattn.pallas.gpu_decode",
    "mosaic_tpu": "kvattn.pallas.tpu_decode",
}
"""Loaded when first used."""
_WRITERS = {"mosaic_tpu": "kvattn.pallas.tpu_append"}
"""Where a kernel writes single tokens too, because XLA would copy the cache around one."""
_DIFFERENTIABLE = ("reference", "xla")

Implementation = str | Sequence[str] | None


def candidates(implementation: Implementation) -> tuple[str, ...]:
    """The names to try, in order; None means the best that works, which always ends at "xla"."""
    if implementation is None:
        return {"gpu": ("mosaic_gpu", "xla"), "tpu": ("mosaic_tpu", "xla")}.get(jax.default_backend(), ("xla",))
    names: tuple[Any, ...] = (implementation,)
    if isinstance(implementation, Sequence) and not isinstance(implementation, str):
        names = tuple(implementation)
    unknown = [name for name in names if name not in NAMES]
    if unknown or not names:
        raise ConfigError(
            f"unknown implementation {unknown[0] if unknown else names!r}; the known ones are "
            f"{', '.join(map(repr, NAMES))}, None for the best that works, or a sequence of names to try in order."
        )
    return names


def unsupported(name: str) -> str | None:
    """Why an implementation cannot run in this process; None: it can."""
    backend = jax.default_backend()
    if name in _NEEDS and backend != _NEEDS[name] and not interpreted():
        return f"it needs a {_NEEDS[name].upper()}, and the default backend here is {backend!r}"
    if name in _NEEDS and (axes := _shared_axes()):
        return f"compilers do not divide kernels over mesh axes ({axes}); call it inside jax.shard_map over them"
    return None


def _shared_axes() -> str:
    """Axes of the current mesh that are not `jax.shard_map`'s and over which arrays may be split."""
    mesh = jax.sharding.get_abstract_mesh()
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return ", ".join(n for n, kind in kinds if kind != AxisType.Manual and mesh.shape[n] > 1)


def choose(request: Request, implementation: Implementation = None) -> tuple[str, tuple[str, ...]]:
    """Which implementation attends.

    Args:
        request: what is asked; its numbers do not matter, so it may be traced (`jax.eval_shape`).
        implementation: a name, a sequence of names to try in order, or None for the best that works.

    Returns:
        the first that can, and of each before it why it cannot.

    Raises:
        ConfigError: an unknown name.
        UnsupportedError: none of the named ones can, each with its reason.
    """
    reasons = []
    for name in candidates(implementation):
        reason = unsupported(name)
        if reason is None:
            reason = importlib.import_module(_MODULES[name]).unsupported(request)
        if reason is None:
            return name, tuple(reasons)
        reasons.append(f"{name!r}: {reason}")
    raise UnsupportedError(f"{'; '.join(reasons)}. implementation=None takes what works here.")


def attend(request: Request, implementation: Implementation = None) -> tuple[Array, Array, Array | None]:
    """Attends with the first implementation that can.

    Args:
        request: queries, what they read, and by which rule.
        implementation: as in `choose`, which raises what is wrong.

    Returns:
        out [B, T, N, Hv] and lse [B, T, N] in float32 or wider, mass [B, K, S] or None (`Request`).
    """
    name, _ = choose(request, implementation)
    attend = importlib.import_module(_MODULES[name]).attend
    return attend(request) if name in _DIFFERENTIABLE else differentiable(_by_position(attend))(request)


def _by_position(attend: Attend) -> Attend:
    """A kernel whose queries get nothing from values that they may not attend to, NaN included.

    Its weight for such a value is 0, and 0 * NaN is NaN: where that may have happened it takes the queries one by one.
    """

    def call(request: Request) -> Result:
        out, lse, mass = attend(request)
        length = request.query.shape[1]
        if length == 1:
            return out, lse, mass

        def one(t: Array, out: Array) -> Array:
            at = lambda x: jax.lax.dynamic_slice_in_dim(x, t, 1, 1)
            alone = dataclasses.replace(
                request, query=at(request.query), positions=at(request.positions), want_mass=False
            )
            old = at(out)
            return jax.lax.dynamic_update_slice_in_dim(out, jnp.where(jnp.isfinite(old), old, attend(alone)[0]), t, 1)

        rounds = jnp.where(jnp.all(jnp.isfinite(out)), 0, length).astype(jnp.int32)
        return _manual.fori_loop(jnp.int32(0), rounds, one, out), lse, mass

    return call


def writer(store: Any, implementation: Implementation = None) -> Any:
    """What writes one token into the arrays of a cache: `store` itself, or a kernel that takes its place.

    Args:
        store: the cache's `Layout` or `Pages`.
        implementation: as in `choose`; the first one decides.
    """
    name = candidates(implementation)[0]
    if name not in _WRITERS or unsupported(name) is not None:
        return store
    return importlib.import_module(_WRITERS[name]).InPlace(store)
