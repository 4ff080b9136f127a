"""Tables of the policies and of the codecs: the package's own and a user's are entered in the same way."""

import dataclasses
import re
from collections.abc import Callable, Sequence

from kvattn.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Entry[T]:
    """A policy or codec that is known by name.

    Attributes:
        kind: its class.
        name: on the command line: ``--policy name:a,b``.
        aliases: other names.
        levers: what the planner tries for sequences of a length, each with a label.
        examples: small instances, of budgets below ten tokens or groups of a few numbers, for the test suites.
    """

    kind: type[T]
    name: str
    aliases: tuple[str, ...] = ()
    levers: Callable[[int], Sequence[tuple[str, T]]] = lambda length: ()
    examples: tuple[T, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """Its name, then the aliases."""
        return (self.name, *self.aliases)


class Registry[T]:
    """The entries of one kind of thing, in the order they came.

    Args:
        what: what they are, for messages.
        base: the class they derive from.
    """

    def __init__(self, what: str, base: type[T]):
        self._what, self._base = what, base
        self._entries: list[Entry[T]] = []

    @property
    def entries(self) -> tuple[Entry[T], ...]:
        """All of them."""
        return tuple(self._entries)

    def add(self, entry: Entry[T]) -> None:
        """Enters one.

        Raises:
            ConfigError: no class of this kind, a name that cannot be given on the command line, a name or class that is
                there already, examples of another class.
        """
        kind, what = entry.kind, self._what
        if not (isinstance(kind, type) and issubclass(kind, self._base)):
            base = f"{self._base.__module__.rpartition('.')[0]}.{self._base.__name__}"
            raise ConfigError(f"a {what} is a subclass of {base}, got {kind!r}.")
        for name in entry.names:
            if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z][\w-]*", name):
                raise ConfigError(f"a {what}'s name has letters, digits, - and _, a letter first, got {name!r}.")
        for known in self._entries:
            if known.kind is kind:
                raise ConfigError(f"{kind.__name__} is registered already, as {known.name!r}.")
            taken = {spelled(name) for name in known.names} & {spelled(name) for name in entry.names}
            if taken:
                raise ConfigError(f"the {what} name {min(taken)!r} is taken by {known.kind.__name__}: choose another.")
        others = [example for example in entry.examples if not isinstance(example, kind)]
        if others:
            raise ConfigError(f"examples of {kind.__name__} are instances of it, got {others[0]!r}.")
        self._entries.append(entry)

    def find(self, name: str) -> Entry[T] | None:
        """The entry of a name, however it is spelled; None if there is none."""
        return next((e for e in self._entries if spelled(name) in map(spelled, e.names)), None)


def spelled(name: str) -> str:
    """A name as names are compared: without capitals, - and _."""
    return name.lower().replace("-", "").replace("_", "")
