"""Which implementations of attention there are, by name.

This floor attends in plain JAX and names nobody above it. Kernels are handed down: `kvattn.pallas` registers its own
when `import kvattn` loads it, and so may any other package. What a record holds is small; the kernel itself is loaded
when it is first asked whether it can attend.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Float

from kvattn import _target
from kvattn._registry import Table
from kvattn._typing import Array
from kvattn.attend.at_once import Appender
from kvattn.attend.request import Request
from kvattn.errors import ConfigError

Result = tuple[Float[Array, "B T N Hv"], Float[Array, "B T N"], Float[Array, "B K S"] | None]
"""out and lse in float32 or wider, and mass or None: see `Request`."""


@runtime_checkable
class Kernel(Protocol):
    """What attends: a module, or any object with these two functions."""

    @property
    def unsupported(self) -> Callable[[Request], str | None]:
        """Why it cannot take a request, to follow "it"; None: it can. Only shapes and settings may be looked at."""
        ...

    @property
    def attend(self) -> Callable[[Request], Result]:
        """Attention; see `Request`."""
        ...


@dataclasses.dataclass(frozen=True)
class Tuning[T]:
    """What `kvattn.pallas.tuning` may tune of a kernel.

    The kernel then also has ``key(request)``, the name of a call in tables of sizes, and ``fits(request, sizes)``, and
    its ``attend`` takes sizes as a second argument.

    Attributes:
        kind: the dataclass of the sizes.
        candidates: what tuning tries.
    """

    kind: type[T]
    candidates: Sequence[T]


@dataclasses.dataclass(frozen=True)
class Implementation:
    """One way to attend.

    Attributes:
        name: what `implementation=` calls it.
        load: hands over what attends. Called when it is first wanted, so that `import kvattn` loads no kernel.
        platform: what it is made for, as `jax.export` names it ("cuda", "tpu"; "gpu": "cuda" and "rocm"): there
            ``implementation=None`` tries it before "xla". None: anything, but only when asked for by name.
        blocked: why it cannot run in this process at all, to follow "it"; returns None where it can.
        is_bound: whether what it traces can be lowered for its platform only. Then it is refused elsewhere: at once
            where that is known, and else when the program is lowered.
        is_complete: whether it has derivatives of its own, and gives nothing of NaN values to queries that may not
            attend to them. Where it has not, both are added: derivatives are those of "reference".
        hides: of one that is not complete, whether queries of a request get nothing of such values all the same. Where
            they may, and something is not finite, the queries are taken one by one.
        reads_host: whether it reads keys and values that lie in the host's memory (`View.on_host`): through the view's
            blocks, never the arrays themselves.
        reads_values_in_keys: whether it reads values that are the first numbers of their keys (`View.values_in_keys`).
        writer: hands over what writes single tokens by a kernel: called with a cache's store, it returns one that takes
            its place. None: XLA writes.
        appender: hands over what appends single tokens by one kernel, with all that changes besides: a
            `kvattn.attend.at_once.Appender`. None: there is none.
        tuning: what can be tuned of it. None: nothing.
    """

    name: str
    load: Callable[[], Kernel]
    platform: str | None = None
    blocked: Callable[[], str | None] = lambda: None
    is_bound: Callable[[], bool] = lambda: False
    is_complete: bool = False
    hides: Callable[[Request], bool] = lambda request: False
    reads_host: bool = False
    reads_values_in_keys: bool = False
    writer: Callable[[], Callable[[Any], Any]] | None = None
    appender: Callable[[], Appender] | None = None
    tuning: Tuning | None = None


_TABLE = Table[Implementation](
    "an implementation", "implementation", ("None for the best that works", "or a sequence of names to try in order")
)


def register(implementation: Implementation) -> None:
    """Makes an implementation known, so that `implementation=` can name it everywhere.

    Args:
        implementation: its record.

    Raises:
        ConfigError: something that is no record, or a name that is taken.

    Example:
        >>> import types
        >>> from kvattn import attend
        >>> def attend_like_xla(request):
        ...     return attend.attend(request, "xla")
        >>> mine = types.SimpleNamespace(unsupported=lambda request: None, attend=attend_like_xla)
        >>> attend.register(attend.Implementation("mine", lambda: mine))
        >>> attend.names()[-1]
        'mine'
        >>> attend.unregister("mine")
    """
    if not isinstance(implementation, Implementation):
        raise ConfigError(f"implementation must be a kvattn.attend.Implementation, got {implementation!r}.")
    _TABLE.add(implementation.name, implementation)


def unregister(name: str) -> None:
    """Forgets an implementation; programs that are compiled keep it.

    Raises:
        ConfigError: an unknown name.
    """
    _TABLE.remove(name)


def names() -> tuple[str, ...]:
    """The names `implementation` may take, in the order in which they were registered."""
    return tuple(_TABLE.all())


def named(name: str) -> Implementation:
    """The implementation of a name.

    Raises:
        ConfigError: an unknown name.
    """
    return _TABLE.named(name)


def made_for(platform: str | None = None) -> tuple[str, ...]:
    """The implementations made for a platform; None: for the one that programs are made for here."""
    platform = platform or _target.platform()
    return tuple(name for name, one in _TABLE.all().items() if is_made_for(one, platform))


def is_made_for(implementation: Implementation, platform: str) -> bool:
    """Whether an implementation is made for a platform."""
    return implementation.platform in (platform, _target.family(platform))
