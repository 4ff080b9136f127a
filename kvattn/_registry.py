"""Tables of what can be named: the package's own and a user's are entered in the same way."""

import dataclasses
import re
from collections.abc import Callable, Sequence

from kvattn.errors import ConfigError


class Table[T]:
    """Objects by their names: the ways to attend, the ways to split a cache.

    Args:
        what: what they are, with an article, for messages.
        argument: which argument names them.
        also: further values of that argument, for messages, each as it is written.
    """

    def __init__(self, what: str, argument: str, also: Sequence[str]):
        self._what, self._argument, self._also = what, argument, tuple(also)
        self._known: dict[str, T] = {}

    def add(self, name: str, one: T) -> None:
        """Makes it known.

        Raises:
            ConfigError: a name that is no identifier, or is taken.
        """
        if not isinstance(name, str) or not name.isidentifier():
            raise ConfigError(f"the name of {self._what} must be an identifier, got {name!r}.")
        if name in self._known or repr(name) in self._also:
            raise ConfigError(f"there is {self._what} {name!r} already: give yours another name.")
        self._known[name] = one

    def remove(self, name: str) -> None:
        """Forgets it.

        Raises:
            ConfigError: an unknown name.
        """
        self.named(name)
        del self._known[name]

    def named(self, name: str) -> T:
        """The one of a name.

        Raises:
            ConfigError: an unknown name.
        """
        if not isinstance(name, str) or name not in self._known:
            known = ", ".join((*map(repr, self._known), *self._also))
            raise ConfigError(f"unknown {self._argument} {name!r}; the known ones are {known}.")
        return self._known[name]

    def all(self) -> dict[str, T]:
        """All of them by name, in the order they came."""
        return dict(self._known)


@dataclasses.dataclass(frozen=True)
class Entry[T]:
    """A policy or codec that is known by name.

    Attributes:
        kind: its class.
        name: on the command line.
        aliases: other names.
        levers: what the planner tries for sequences of a length, each with a label.
        examples: small instances for the test suites.
    """

    kind: type[T]
    name: str
    aliases: tuple[str, ...]
    levers: Callable[[int], Sequence[tuple[str, T]]]
    examples: tuple[T, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """Its name, then the aliases."""
        return (self.name, *self.aliases)


class Registry[T]:
    """The policies, or the codecs, that are known by name.

    Args:
        what: what they are, for messages.
        base: the class they derive from.
    """

    def __init__(self, what: str, base: type[T]):
        self._what, self._base = what, base
        self._entries: list[Entry[T]] = []

    def register(
        self,
        kind: type[T],
        name: str,
        *,
        aliases: Sequence[str] = (),
        levers: Callable[[int], Sequence[tuple[str, T]]] = lambda length: (),
        examples: Sequence[T] = (),
    ) -> None:
        """Makes a policy or codec known by a name: to the command line, the planner's levers and the test suites.

        Caches and layers take any, registered or not. The package's own are registered in the same way.

        Args:
            kind: a subclass of `kvattn.policies.Policy` or `kvattn.codecs.Codec`, a frozen dataclass.
            name: ``--policy name:a,b``; capitals, - and _ do not count.
            aliases: other names.
            levers: a function of the sequences' length: instances worth a look there, each with a label for
                `kvattn.memory.levers`.
            examples: small instances for the test suites: policies that keep a few tokens, so that they are seen to
                evict; codecs for head dims of 8 and 16.

        Raises:
            ConfigError: no policy or codec, a name that cannot be given, a name or class that is there already,
                examples of another class.

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
        what, entry = self._what, Entry(kind, name, tuple(aliases), levers, tuple(examples))
        if isinstance(aliases, str):
            raise ConfigError(f"aliases is a list of names, got {aliases!r}.")
        if not (isinstance(kind, type) and issubclass(kind, self._base)):
            base = f"{self._base.__module__.rpartition('.')[0]}.{self._base.__name__}"
            raise ConfigError(f"a {what} is a subclass of {base}, got {kind!r}.")
        for word in entry.names:
            if not isinstance(word, str) or not re.fullmatch(r"[A-Za-z][\w-]*", word):
                raise ConfigError(f"a {what}'s name has letters, digits, - and _, a letter first, got {word!r}.")
        for known in self._entries:
            if known.kind is kind:
                raise ConfigError(f"{kind.__name__} is registered already, as {known.name!r}.")
            taken = {*map(_spelled, known.names)} & {*map(_spelled, entry.names)}
            if taken:
                raise ConfigError(f"the {what} name {min(taken)!r} is taken by {known.kind.__name__}: choose another.")
        others = [example for example in entry.examples if not isinstance(example, kind)]
        if others:
            raise ConfigError(f"examples of {kind.__name__} are instances of it, got {others[0]!r}.")
        self._entries.append(entry)

    def registered(self) -> tuple[Entry[T], ...]:
        """All that are known by name, in the order they came: the package's own first."""
        return tuple(self._entries)

    def find(self, name: str) -> Entry[T] | None:
        """The entry of a name, however it is spelled; None if there is none."""
        return next((e for e in self._entries if _spelled(name) in map(_spelled, e.names)), None)


def _spelled(name: str) -> str:
    """A name as names are compared."""
    return name.lower().replace("-", "").replace("_", "")
