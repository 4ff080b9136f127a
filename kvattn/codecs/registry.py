"""The codecs that are known by name."""

from collections.abc import Callable, Sequence

from kvattn._registry import Entry, Registry
from kvattn.codecs.base import Codec

CODECS = Registry("codec", Codec)


def register[C: Codec](
    kind: type[C],
    name: str,
    *,
    aliases: Sequence[str] = (),
    levers: Callable[[int], Sequence[tuple[str, C]]] = lambda length: (),
    examples: Sequence[C] = (),
) -> None:
    """Makes a codec known by a name: to the command line, the planner's levers and the test suites.

    Caches and layers take any `Codec`, registered or not. The package's own are registered in the same way.

    Args:
        kind: a subclass of `kvattn.codecs.Codec`, a frozen dataclass.
        name: ``--codec name:a,b``; capitals, - and _ do not count.
        aliases: other names.
        levers: a function of the sequences' length: codecs worth a look there, each with a label for
            `kvattn.memory.levers`.
        examples: instances for head dims of 8 and 16, which the suites use.

    Raises:
        ConfigError: no codec, a name that is taken or cannot be given, examples of another class.
    """
    CODECS.add(Entry(kind, name, tuple(aliases), levers, tuple(examples)))


def registered() -> tuple[Entry[Codec], ...]:
    """All that are known by name, the package's own first."""
    return CODECS.entries
