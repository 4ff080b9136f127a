"""Which implementation attends: the choice, and the fall back."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int32

from kvattn import _checks, _manual, _target
from kvattn._typing import Array, Encoded
from kvattn.attend import at_once, late, reference, xla
from kvattn.attend.at_once import Appended
from kvattn.attend.derivative import Attend, differentiable
from kvattn.attend.registry import Implementation as Record
from kvattn.attend.registry import Result, is_made_for, made_for, named, register
from kvattn.attend.request import Request
from kvattn.attend.tokens import NewTokens
from kvattn.cache import Cache
from kvattn.cache.pages import Store
from kvattn.codecs.blocks import Blocks
from kvattn.errors import ConfigError, UnsupportedError

Implementation = str | Sequence[str] | None
"""What `implementation=` takes: a name, several to try in order, or None for the best that works."""

register(Record("reference", lambda: reference, is_complete=True, reads_host=True, reads_values_in_keys=True))
register(Record("xla", lambda: xla, is_complete=True, reads_host=True, reads_values_in_keys=True))


def candidates(implementation: Implementation, *platforms: str) -> tuple[str, ...]:
    """The names to try, in order; None means the best that works, which always ends at "xla".

    Args:
        implementation: as in `choose`.
        platforms: those that the best is looked for on; none given: the one that programs are made for here.
    """
    if implementation is None:
        platforms = platforms or (_target.platform(),)
        return (*dict.fromkeys(name for platform in platforms for name in made_for(platform)), "xla")
    several = isinstance(implementation, Sequence) and not isinstance(implementation, str)
    names: tuple[Any, ...] = tuple(implementation) if several else (implementation,)
    if not names:
        raise ConfigError("implementation is an empty sequence: name one, or pass None for the best that works.")
    return tuple(named(name).name for name in names)


def unsupported(name: str) -> str | None:
    """Why an implementation cannot run where programs are made for here; None: it can."""
    record, platform = named(name), _target.platform()
    return record.blocked() or (None if _runs_on(record, platform) else _elsewhere(record, platform))


def _runs_on(record: Record, platform: str) -> bool:
    """Whether what an implementation traces can be lowered for a platform."""
    return is_made_for(record, platform) or not record.is_bound()


def _elsewhere(record: Record, platform: str) -> str:
    return f"it is made for {record.platform!r}, and this program is for {platform!r}"


@dataclasses.dataclass(frozen=True)
class _Found:
    """Which implementation attends.

    Attributes:
        late: where a program is lowered for one of these platforms, the one of this name,
        name: and elsewhere this one. None: there is none.
        reasons: of each that was passed over why it cannot.
    """

    late: dict[str, str]
    name: str | None
    reasons: tuple[str, ...]

    @property
    def refusal(self) -> str:
        """What is wrong where there is none."""
        return f"{'; '.join(self.reasons)}. implementation=None takes what works here."


def _find(request: Request, implementation: Implementation, *, may_wait: bool) -> _Found:
    """Looks for it. With `may_wait` what depends on the platform alone is left open until the program is lowered."""
    view = request.view
    target = _target.of_arrays(view.keys) or _target.ambient()
    here = target.platform
    platforms = (here,) if view.platform is None else (view.platform, here)
    late: dict[str, str] = {}
    reasons: list[str] = []
    for name in candidates(implementation, *platforms):
        record = named(name)
        with _target.aimed_at(target if _runs_on(record, here) else record.platform):
            reason = _refusal(request, record)
        if reason is None and not _runs_on(record, here):
            reason = _elsewhere(record, here)
            if may_wait:
                late.setdefault(str(record.platform), name)
        elif reason is None and may_wait and record.is_bound() and implementation is None and view.platform is not None:
            late.setdefault(str(record.platform), name)  # the program may be lowered for other platforms, too
            continue
        elif reason is None:
            return _Found(late, name, tuple(reasons))
        reasons.append(f"{name!r}: {reason}")
    return _Found(late, None, tuple(reasons))


def _refusal(request: Request, record: Record) -> str | None:
    """Why an implementation cannot take a request, on whatever platform."""
    if (reason := record.blocked()) is not None:
        return reason
    if request.view.on_host and not record.reads_host:
        return "it reads the device's memory, and these keys and values lie in the host's; \"xla\" brings them"
    if request.view.values_in_keys and not record.reads_values_in_keys:
        return 'it reads values of their own, and these are the first numbers of their keys; "xla" reads them'
    return record.load().unsupported(request)


def choose(request: Request, implementation: Implementation = None) -> tuple[str, tuple[str, ...]]:
    """Which implementation attends.

    Args:
        request: what is asked; its numbers do not matter, so it may be traced (`jax.eval_shape`).
        implementation: a name, a sequence of names to try in order, or None for the best that works.

    Returns:
        the first that can on the platform that the program is made for, and of each before it why it cannot.

    Raises:
        ConfigError: an unknown name.
        UnsupportedError: none of the named ones can, each with its reason.
    """
    found = _find(request, implementation, may_wait=False)
    if found.name is None:
        raise UnsupportedError(found.refusal)
    return found.name, found.reasons


def attend(request: Request, implementation: Implementation = None) -> Result:
    """Attends with the first implementation that can.

    A kernel is made for one platform. Inside `jax.jit` the platform may be known only when the program is lowered
    (`jax.export`): there a kernel that is named, or made for the platform that the cache was made for, is taken if it
    is the right one then, and otherwise the next one in the order.

    Args:
        request: queries, what they read, and by which rule.
        implementation: as in `choose`, which raises what is wrong.

    Returns:
        out, lse and mass (`Request`).
    """
    found = _find(request, implementation, may_wait=not _checks.is_concrete(*jax.tree.leaves(request)))
    if not found.late:
        if found.name is None:
            raise UnsupportedError(found.refusal)
        record = named(found.name)
        return record.load().attend(request) if record.is_complete else differentiable(_single(record))(request)
    request = dataclasses.replace(request, out_dtype=None)  # of all branches the same
    branches = {platform: _single(named(name)) for platform, name in found.late.items()}
    if found.name is None:
        default = late.refusing(found.refusal, next(iter(branches.values())))
    else:
        default = _single(named(found.name))
    return differentiable(functools.partial(late.by_platform, branches, default))(request)


def _single(record: Record) -> Attend:
    """How it attends, its derivatives aside."""
    attend = record.load().attend
    return attend if record.is_complete else _by_position(attend, record.hides)


def _by_position(attend: Attend, hides: Callable[[Request], bool]) -> Attend:
    """A kernel whose queries get nothing from values that they may not attend to, NaN included.

    Its weight for such a value is 0, and 0 * NaN is NaN: where that may have happened it takes the queries one by one,
    unless it `hides` such values itself.
    """

    def call(request: Request) -> Result:
        out, lse, mass = attend(request)
        length = request.query.shape[1]
        all_for_all = request.of_several and not request.mask.is_bounded
        if length == 1 or all_for_all or hides(request):
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


def appender(
    new: NewTokens, cache: Cache, implementation: Implementation = None
) -> Callable[[NewTokens, Cache], Appended] | None:
    """What appends one token to each row of a cache, and does all that goes with it; None: no kernel does.

    Args:
        new: the tokens.
        cache: which they come to.
        implementation: as in `choose`; the first one that is made for the platform decides.
    """
    if not at_once.takes(new, cache):
        return None
    here = (_target.of_arrays(cache.keys) or _target.ambient()).platform
    platforms = (here,) if cache.platform is None else (cache.platform, here)
    waits = not _checks.is_concrete(cache.keys)
    found, kernels = None, {}
    for record in map(named, candidates(implementation, *platforms)):
        kernel = None
        if record.appender is not None and record.blocked() is None:
            with _target.aimed_at(None if _runs_on(record, here) else record.platform):
                module = record.appender()
                kernel = None if module.unsupported(new, cache) else module.append
        named_late = record.is_bound() and implementation is None and cache.platform is not None
        if not waits or (_runs_on(record, here) and not named_late):
            found = kernel if _runs_on(record, here) else None
            break
        if kernel is not None:
            kernels.setdefault(str(record.platform), kernel)
    if kernels:
        found = functools.partial(late.by_platform, kernels, found or at_once.by_xla)
    return None if found is None else at_once.with_derivatives(found)


def writer(
    store: Store, implementation: Implementation = None, *, arrays: Encoded | None = None, platform: str | None = None
) -> Blocks:
    """What writes one token into the arrays of a cache: `store` itself, or a kernel that takes its place.

    Args:
        store: the cache's.
        implementation: as in `choose`; the first one that is made for the platform decides.
        arrays: of the cache.
        platform: that it was made for, if that was said.
    """
    here = (_target.of_arrays(arrays or {}) or _target.ambient()).platform
    platforms = (here,) if platform is None else (platform, here)
    waits = not _checks.is_concrete(arrays)
    kernels: dict[str, Blocks] = {}

    def written_late(elsewhere: Any) -> Any:
        return late.Writing(elsewhere, kernels) if kernels else elsewhere

    for record in map(named, candidates(implementation, *platforms)):
        kernel: Any = store
        if record.writer is not None and record.blocked() is None and not store.on_host:
            kernel = record.writer()(store)
        is_late = not _runs_on(record, here) or (record.is_bound() and implementation is None and platform is not None)
        if not is_late or not waits:
            return written_late(kernel if _runs_on(record, here) else store)
        if kernel is not store:
            kernels.setdefault(str(record.platform), kernel)
    return written_late(store)
