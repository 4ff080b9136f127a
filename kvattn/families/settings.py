"""Reading the fields of a config.json: aliases, defaults, and what null means."""

import abc
import dataclasses
from collections.abc import Mapping
from typing import Any

from kvattn.errors import ConfigError

Value = Any
"""Anything JSON can hold. Whoever reads it checks it."""

_WINDOWS = frozenset({"sliding_window", "attention_chunk_size"})
"""Null means no window, whatever the default is."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Format:
    """The fields that a config.json of one ``model_type`` may have, as `kvattn.families.Family` explains them."""

    model_type: str
    defaults: Mapping[str, Value] = dataclasses.field(default_factory=dict)
    aliases: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    nullable: frozenset[str] = frozenset()


class Settings(abc.ABC):
    """What the two readers share: `Fields` refuses what it does not know, `Sizes` makes the best of it.

    Args:
        settings: what the file holds.
        where: what error messages start with, such as "config.json: ".
        format: which names, defaults and nulls the file may have.

    Raises:
        ConfigError: a field that has different values under two of its names.
    """

    def __init__(self, settings: Mapping[str, Value], where: str, format: Format):
        self.format = format
        self._where = where
        self._given = dict(settings)
        self._asked: set[str] = set()
        for name, others in format.aliases.items():
            given = {n: self._given.pop(n) for n in (name, *others) if n in self._given}
            values = [(n, value) for n, value in given.items() if value is not None]
            for other, value in values[1:]:
                if value != values[0][1]:
                    raise ConfigError(f"{where}{values[0][0]} is {values[0][1]!r} but {other} is {value!r}: keep one.")
            if given:
                self._given[name] = values[0][1] if values else None

    def get(self, name: str) -> Value:
        """A field. None if it is null, its default if the file leaves it out.

        Raises:
            ConfigError: it is null, which means nothing there.
        """
        self.passed(name)
        default = self.format.defaults.get(name)
        value = self._given.get(name, default)
        if value is None and default is not None and name not in self.format.nullable | _WINDOWS:
            raise ConfigError(f"{self._where}{name} is null: give it a value, or leave it out for {default!r}.")
        return value

    def passed(self, *names: str) -> None:
        """Marks fields as read: they say nothing that matters."""
        self._asked.update(names)

    @abc.abstractmethod
    def size(self, name: str, null: int | None = None, least: int = 1) -> int:
        """A whole number >= `least`; `null` if the field is null."""

    @abc.abstractmethod
    def flag(self, name: str) -> bool:
        """A boolean field; null counts as false."""
