"""The fields of a config.json by a family's own names: aliases, defaults, and what null means."""

import abc
from collections.abc import Mapping

from kvattn.errors import ConfigError
from kvattn.families.family import Family, Value

_WINDOWS = frozenset({"sliding_window", "attention_chunk_size"})
"""Null means no window, whatever the default is."""


class Settings(abc.ABC):
    """What both readers share: `Fields`, which refuses what it does not know, and `Sizes`, which plans what it can.

    Args:
        settings: what the file holds.
        where: what messages begin with, such as "config.json: ".
        family: whose names, defaults and meaning of null count.

    Raises:
        ConfigError: two names of a field with different values.
    """

    def __init__(self, settings: Mapping[str, Value], where: str, family: Family):
        self.family = family
        self._where = where
        self._given = dict(settings)
        self._asked: set[str] = set()
        for name, others in family.aliases.items():
            given = {n: self._given.pop(n) for n in (name, *others) if n in self._given}
            values = [(n, value) for n, value in given.items() if value is not None]
            for other, value in values[1:]:
                if value != values[0][1]:
                    raise ConfigError(f"{where}{values[0][0]} is {values[0][1]!r} but {other} is {value!r}: keep one.")
            if given:
                self._given[name] = values[0][1] if values else None

    def get(self, name: str) -> Value:
        """A field; None where it is null, its default where the file leaves it out.

        Raises:
            ConfigError: null where that has no meaning.
        """
        self.passed(name)
        default = self.family.defaults.get(name)
        value = self._given.get(name, default)
        if value is None and default is not None and name not in self.family.nullable | _WINDOWS:
            raise ConfigError(f"{self._where}{name} is null: give it a value, or leave it out for {default!r}.")
        return value

    def passed(self, *names: str) -> None:
        """These fields are known to say nothing more."""
        self._asked.update(names)

    @abc.abstractmethod
    def size(self, name: str, null: int | None = None, least: int = 1) -> int:
        """A field that is a whole number >= `least`; `null` is what null means."""

    @abc.abstractmethod
    def flag(self, name: str) -> bool:
        """A field that is true or false; null counts as false."""
