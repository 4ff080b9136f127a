"""Which implementation attends: the choice, and the fall back."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int32

from kvattn import _manual
from kvattn._typing import Array
from kvattn.attend import reference, xla
from kvattn.attend.derivative import Attend, differentiable
from kvattn.attend.registry import Implementation as Record
from kvattn.attend.registry import Result, made_for, named, register
from kvattn.attend.request import Request
from kvattn.cache.pages import Store
from kvattn.codecs.blocks import Blocks
from kvattn.errors import ConfigError, UnsupportedError

Implementation = str | Sequence[str] | None
"""What `implementation=` takes: a name, several to try in order, or None for the best that works."""

register(Record("reference", lambda: reference, is_complete=True, reads_host=True, reads_values_in_keys=True))
register(Record("xla", lambda: xla, is_complete=True, reads_host=True, reads_values_in_keys=True))


def candidates(implementation: Implementation) -> tuple[str, ...]:
    """The names to try, in order; None means the best that works, which always ends at "xla"."""
    if implementation is None:
        return (*made_for(), "xla")
    several = isinstance(implementation, Sequence) and not isinstance(implementation, str)
    names: tuple[Any, ...] = tuple(implementation) if several else (implementation,)
    if not names:
        raise ConfigError("implementation is an empty sequence: name one, or pass None for the best that works.")
    return tuple(named(name).name for name in names)


def unsupported(name: str) -> str | None:
    """Why an implementation cannot run in this process; None: it can."""
    return named(name).blocked()


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
        if reason is None and request.view.on_host and not named(name).reads_host:
            reason = "it reads the device's memory, and these keys and values lie in the host's; \"xla\" brings them"
        if reason is None and request.view.values_in_keys and not named(name).reads_values_in_keys:
            reason = 'it reads values of their own, and these are the first numbers of their keys; "xla" reads them'
        if reason is None:
            reason = named(name).load().unsupported(request)
        if reason is None:
            return name, tuple(reasons)
        reasons.append(f"{name!r}: {reason}")
    raise UnsupportedError(f"{'; '.join(reasons)}. implementation=None takes what works here.")


def attend(request: Request, implementation: Implementation = None) -> Result:
    """Attends with the first implementation that can.

    Args:
        request: queries, what they read, and by which rule.
        implementation: as in `choose`, which raises what is wrong.

    Returns:
        out, lse and mass (`Request`).
    """
    record = named(choose(request, implementation)[0])
    attend = record.load().attend
    return attend(request) if record.is_complete else differentiable(_by_position(attend))(request)


def _by_position(attend: Attend) -> Attend:
    """A kernel whose queries get nothing from values that they may not attend to, NaN included.

    Its weight for such a value is 0, and 0 * NaN is NaN: where that may have happened it takes the queries one by one.
    """

    def call(request: Request) -> Result:
        out, lse, mass = attend(request)
        length = request.query.shape[1]
        if length == 1:
            return out, lse, mass

        def one(t: Int32[Array, ""], out: Float[Array, "B T N Hv"]) -> Float[Array, "B T N Hv"]:
            at = lambda x: jax.lax.dynamic_slice_in_dim(x, t, 1, 1)
            alone = dataclasses.replace(
                request, query=at(request.query), positions=at(request.positions), want_mass=False
            )
            old = at(out)
            return jax.lax.dynamic_update_slice_in_dim(out, jnp.where(jnp.isfinite(old), old, attend(alone)[0]), t, 1)

        rounds = jnp.where(jnp.all(jnp.isfinite(out)), 0, length).astype(jnp.int32)
        return _manual.fori_loop(jnp.int32(0), rounds, one, out), lse, mass

    return call


def writer(store: Store, implementation: Implementation = None) -> Blocks:
    """What writes one token into the arrays of a cache: `store` itself, or a kernel that takes its place.

    Args:
        store: the cache's.
        implementation: as in `choose`; the first one decides.
    """
    record = named(candidates(implementation)[0])
    if record.writer is None or record.blocked() is not None or store.on_host:
        return store
    return record.writer()(store)
