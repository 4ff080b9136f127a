"""The policies that are known by name."""

from collections.abc import Callable, Sequence

from kvattn._registry import Entry, Registry
from kvattn.policies.base import Policy

POLICIES = Registry("policy", Policy)


def register[P: Policy](
    kind: type[P],
    name: str,
    *,
    aliases: Sequence[str] = (),
    levers: Callable[[int], Sequence[tuple[str, P]]] = lambda length: (),
    examples: Sequence[P] = (),
) -> None:
    """Makes a policy known by a name: to the command line, the planner's levers and the test suites.

    Caches and layers take any `Policy`, registered or not. The package's own are registered in the same way.

    Args:
        kind: a subclass of `kvattn.policies.Policy`, a frozen dataclass.
        name: ``--policy name:a,b``; capitals, - and _ do not count.
        aliases: other names.
        levers: a function of the sequences' length: policies worth a look there, each with a label for
            `kvattn.memory.levers`.
        examples: instances that keep a few tokens, so that the suites see them evict.

    Raises:
        ConfigError: no policy, a name that is taken or cannot be given, examples of another class.

    Example:
        >>> import dataclasses
        >>> import kvattn
        >>> @dataclasses.dataclass(frozen=True)
        ... class Everything(kvattn.Full):
        ...     pass
        >>> kvattn.policies.register(Everything, "everything", examples=[Everything()])
        >>> kvattn.policies.registered()[-1].name
        'everything'
    """
    POLICIES.add(Entry(kind, name, tuple(aliases), levers, tuple(examples)))


def registered() -> tuple[Entry[Policy], ...]:
    """All that are known by name, the package's own first."""
    return POLICIES.entries
