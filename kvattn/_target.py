"""Which device a program is made for: the one place that answers it.

The machine that traces a program is not always the one that runs it. So layouts, kernels and whatever else differs from
device to device ask here and not `jax.default_backend`. In this order the answer comes from

1. what was named: ``platform=`` of a cache, or the mesh that a call was given (`aimed_at`);
2. the current mesh, abstract ones too: `jax.set_mesh`, `jax.sharding.use_abstract_mesh`, `jax.shard_map`;
3. `jax.default_device`;
4. the default backend.
"""

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
from jax.core import Tracer
from jax.sharding import AbstractMesh, Mesh
from jaxtyping import PyTree

from kvattn.errors import ConfigError

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
"""As `jax.export` and `jax.lax.platform_dependent` name them. "gpu", as devices have it, is the second or the third."""


@dataclasses.dataclass(frozen=True)
class Target:
    """A kind of device. What is not known is None.

    Attributes:
        platform: one of `PLATFORMS`, or what else JAX calls it.
        device_kind: as JAX names it, "NVIDIA H200" for example.
        num_cores: of a GPU, its multiprocessors.
        compute_capability: of a GPU, "9.0" for example.
    """

    platform: str
    device_kind: str | None = None
    num_cores: int | None = None
    compute_capability: str | None = None

    @classmethod
    def of_device(cls, device: Any) -> "Target":
        """That of a device, or of an abstract one."""
        kind = getattr(device, "device_kind", None)
        cores = getattr(device, "core_count", None) or getattr(device, "num_cores", None)
        capability = getattr(device, "compute_capability", None)
        platform = _canonical(getattr(device, "platform", None) or jax.default_backend(), kind)
        return cls(platform, kind, cores, None if capability is None else str(capability))


_NAMED: contextvars.ContextVar[Target | None] = contextvars.ContextVar("target", default=None)


def current() -> Target:
    """What programs are made for that are traced here and now."""
    return _NAMED.get() or ambient()


def platform() -> str:
    """Its platform."""
    return current().platform


def ambient() -> Target:
    """The same, whatever was named."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is None:
        device = jax.config.jax_default_device
    if isinstance(device, str):
        device = jax.local_devices(backend=device)[0]
    if device is not None:
        return Target.of_device(device)
    device = jax.local_devices()[0]
    return dataclasses.replace(
        Target.of_device(device), platform=_canonical(jax.default_backend(), getattr(device, "device_kind", None))
    )


@contextlib.contextmanager
def aimed_at(what: Target | str | Mesh | AbstractMesh | None) -> Iterator[None]:
    """Inside, programs are made for a target, a platform, or the devices of a mesh. None: nothing changes."""
    target = _named(what)
    if target is None:
        yield
        return
    token = _NAMED.set(target)
    try:
        yield
    finally:
        _NAMED.reset(token)


def checked(name: str, given: object) -> str | None:
    """A platform by its name, or None.

    Raises:
        ConfigError: another name.
    """
    if given is None or (isinstance(given, str) and given in PLATFORMS):
        return given
    raise ConfigError(
        f"{name} must be None or one of {', '.join(map(repr, PLATFORMS))}, as jax.export names them, got {given!r}."
    )


def family(platform: str) -> str:
    """The platform as `jax.default_backend` names it: "cuda" and "rocm" are both "gpu"."""
    return "gpu" if platform in ("cuda", "rocm") else platform


def of_arrays(tree: PyTree) -> Target | None:
    """What arrays say of where a call with them runs: their devices, or those of the mesh they are split over.

    None: they say nothing, as those of one device do inside `jax.jit`.
    """
    for x in jax.tree.leaves(tree):
        if isinstance(x, jax.Array) and not isinstance(x, Tracer):
            return Target.of_device(next(iter(x.devices())))
        device = jax.typeof(x).sharding.mesh.abstract_device if isinstance(x, Tracer) else None
        if device is not None:
            return _known_better(Target.of_device(device))
    return None


def _known_better(target: Target) -> Target:
    """The same kind of device as the current target or mesh knows it: abstract devices do not say what a GPU can do."""
    for here in (current(), ambient()):
        if (here.platform, here.device_kind) == (target.platform, target.device_kind):
            return here
    return target


def _named(what: Target | str | Mesh | AbstractMesh | None) -> Target | None:
    if isinstance(what, Target):
        return what
    if isinstance(what, str):
        known = (target for target in (current(), ambient()) if target.platform == what)
        return next(known, Target(what))
    if isinstance(what, Mesh):
        return Target.of_device(what.devices.flat[0]) if what.size else None
    if isinstance(what, AbstractMesh) and what.abstract_device is not None:
        return Target.of_device(what.abstract_device)
    return None


def _canonical(platform: str, kind: str | None) -> str:
    """A platform as `PLATFORMS` has it, of a device of this kind."""
    if platform != "gpu":
        return platform
    return "rocm" if (kind or "").lower().startswith(("amd", "gfx", "radeon", "instinct")) else "cuda"
