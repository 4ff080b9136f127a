"""Reading a config.json of HuggingFace: every field is honoured, known to change nothing, or refused by name."""

import math
from collections.abc import Collection, Mapping
from typing import Any

from kvattn._checks import INT32_MAX
from kvattn.errors import ConfigError, UnsupportedError
from kvattn.memory.hf_harmless import is_harmless
from kvattn.models.config import MAX_LAYERS
from kvattn.positions.scaling import ROPE_TYPES

MAX_HEADS = 10_000
"""More heads than any model has: a number that is no mistake of the file lies below."""

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
}


class Fields:
    """The fields of one config.json, which must all have been asked for in the end.

    Args:
        fields: what the file holds.
        source: the file, for messages.
        ignore: names of fields that the caller takes responsibility for.
        defaults: what fields are that the file does not have, by name: of every field that is asked for.
        nullable: those that may be null though their default is not.
        aliases: more names that fields have, by their name.
    """

    def __init__(
        self,
        fields: Mapping[str, Any],
        source: str,
        ignore: Collection[str] = (),
        *,
        defaults: Mapping[str, Any],
        nullable: Collection[str] = (),
        aliases: Mapping[str, tuple[str, ...]] | None = None,
    ):
        self.source = source
        self._fields = dict(fields)
        self._defaults, self._nullable, self._aliases = defaults, nullable, aliases or {}
        self._left = {name for name, value in fields.items() if name not in ignore and not is_harmless(name, value)}

    def passed(self, *names: str) -> None:
        """These fields are known to change nothing."""
        self._left -= set(names)

    def get(self, name: str) -> Any:
        """A field, by whichever of its names; None where it is null, its default where it is not there.

        Raises:
            ConfigError: two of the names with different values, or null where that has no meaning.
        """
        names = (name, *self._aliases.get(name, ()))
        self.passed(*names)
        given = {n: self._fields[n] for n in names if n in self._fields}
        values = {n: value for n, value in given.items() if value is not None}
        if values:
            (first, value), *rest = values.items()
            for other, another in rest:
                if another != value:
                    raise ConfigError(f"{self.source}: {first} is {value!r} but {other} is {another!r}: keep one.")
            return value
        default = self._defaults[name]
        if given and default is not None and name not in self._nullable:
            raise ConfigError(f"{self.source}: {name} is null: give it a value, or leave it out for {default!r}.")
        return None if given else default

    def size(self, name: str, *, null: int | None = None, least: int = 1, most: int = INT32_MAX) -> int:
        """The same for a whole number in [least, most]; `null` is what null means.

        Raises:
            ConfigError: it is something else.
        """
        value = self.get(name)
        value = null if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ConfigError(f"{self.source}: {name} must be a whole number >= {least}, got {value!r}.")
        if value > most:
            raise ConfigError(f"{self.source}: {name} must be at most {most}, got {value}.")
        return value

    def layers(self, name: str) -> int:
        """How many layers there are."""
        return self.size(name, most=MAX_LAYERS)

    def heads(self, features: int, name: str) -> int:
        """How many heads `features` are split into, evenly.

        Raises:
            ConfigError: they do not divide.
        """
        heads = self.size(name, most=MAX_HEADS)
        if features % heads:
            raise ConfigError(f"{self.source}: the hidden size ({features}) is no multiple of {name} ({heads}).")
        return heads

    def number(self, name: str) -> Any:
        """A number, or None where it is null.

        Raises:
            ConfigError: it is something else.
        """
        value = self.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise ConfigError(f"{self.source}: {name} must be a number, got {value!r}.")
        return value

    def positive(self, name: str) -> Any:
        """The same for one above 0.

        Raises:
            ConfigError: it is not.
        """
        value = self.number(name)
        if value is not None and not 0 < value < math.inf:
            raise ConfigError(f"{self.source}: {name} must be finite and > 0, got {value!r}.")
        return value

    def flag(self, name: str) -> bool:
        """A bool; null counts as false.

        Raises:
            ConfigError: it is something else.
        """
        value = self.get(name)
        if value is not None and not isinstance(value, bool):
            raise ConfigError(f"{self.source}: {name} must be true or false, got {value!r}.")
        return bool(value)

    def only(self, name: str, *values: Any, why: str = "") -> None:
        """Checks a field that is supported with these values only; null is fine where it may be.

        Raises:
            UnsupportedError: another value.
        """
        value = self.get(name)
        if value is not None and not any(value == known and type(value) is type(known) for known in values):
            known = " or ".join(map(repr, values)) or "null"
            raise UnsupportedError(
                f"{self.source}: {name} is {value!r}, supported is {known}{': ' + why if why else ''}."
            )

    def activation(self, name: str) -> str:
        """The activation function, by the name that `DecoderConfig` has for it.

        Raises:
            UnsupportedError: an unknown one.
        """
        value = self.get(name)
        if not isinstance(value, str) or value not in ACTIVATIONS:
            raise UnsupportedError(
                f"{self.source}: {name} is {value!r}; the known ones are {', '.join(map(repr, ACTIVATIONS))}."
            )
        return ACTIVATIONS[value]

    def rope(self) -> dict[str, Any]:
        """`rope_theta` and `rope_scaling` for `DecoderConfig`, from either form that transformers has written."""
        older, newer = self.mapping("rope_scaling"), self.mapping("rope_parameters")
        newer = self._defaults["rope_parameters"] if newer is None else newer
        return self.scaled(older or newer or {}, self.get("rope_theta"), self.get("original_max_position_embeddings"))

    def mapping(self, name: str) -> Mapping[str, Any] | None:
        """An object, or None where it is null.

        Raises:
            ConfigError: it is something else.
        """
        value = self.get(name)
        if value is not None and not isinstance(value, Mapping):
            raise ConfigError(f"{self.source}: {name} must be an object, got {value!r}.")
        return value

    def scaled(self, scaling: Mapping[str, Any], theta: Any, original: Any) -> dict[str, Any]:
        """The same from one rope dict, filled with what transformers takes from around it.

        Args:
            scaling: the dict.
            theta: the base of the frequencies, where the dict has none.
            original: the length that the model was first made for, where it is not the dict's.
        """
        most, scaling = self.size("max_position_embeddings"), dict(scaling)
        self.only("partial_rotary_factor", 1.0, 1)
        turned = scaling.pop("partial_rotary_factor", None)
        if turned not in (None, 1.0):
            raise UnsupportedError(f"{self.source}: partial_rotary_factor is {turned!r}, supported is 1.0.")
        theta = scaling.pop("rope_theta", theta)
        if isinstance(theta, bool) or not isinstance(theta, int | float):
            raise ConfigError(f"{self.source}: rope_theta must be a number, got {theta!r}.")
        kinds, length = (scaling.get("rope_type"), scaling.get("type")), "original_max_position_embeddings"
        kind = kinds[1] if kinds[0] is None else kinds[0]
        if isinstance(kind, str) and kind not in ROPE_TYPES:
            raise UnsupportedError(
                f"{self.source}: rope_type is {kind!r}; the known ones are {', '.join(map(repr, ROPE_TYPES))}."
            )
        if kind == "dynamic":
            scaling[length] = most  # whatever the dict says
        elif kind in ("llama3", "yarn"):
            if original is not None:
                scaling[length] = original
            given = scaling.setdefault(length, most)
            if kind == "yarn" and "factor" in scaling and scaling["factor"] is None:
                if isinstance(given, bool) or not isinstance(given, int | float) or not given > 0:
                    raise ConfigError(f"{self.source}: {length} must be a number > 0, got {given!r}.")
                scaling["factor"] = most / given
        return {
            "rope_theta": theta,
            "rope_scaling": None if kind in (None, "default") and len(scaling) <= 1 else scaling,
        }

    def windows(self, num_layers: int, window: Any, default: Any) -> tuple[int | None, ...] | None:
        """The window of each layer, from ``layer_types`` or, where that is not given, from `default` (bool per layer).

        Raises:
            ConfigError: too few or too many entries, or a windowed layer without a size.
            UnsupportedError: a kind of attention that is not known.
        """
        kinds = self.get("layer_types")
        if kinds is None:
            local = list(default)
        elif not isinstance(kinds, list):
            raise ConfigError(f"{self.source}: layer_types must be a list, got {kinds!r}.")
        else:
            known = {"sliding_attention": True, "full_attention": False}
            for kind in kinds:
                if not isinstance(kind, str) or kind not in known:
                    raise UnsupportedError(f"{self.source}: layer_types holds {kind!r}; known are {', '.join(known)}.")
            local = [known[kind] for kind in kinds]
        if len(local) != num_layers:
            raise ConfigError(f"{self.source}: layer_types has {len(local)} entries for {num_layers} layers.")
        if any(local) and window is None:
            raise ConfigError(f"{self.source}: there are layers with a window, but sliding_window is null.")
        if any(local):
            self.size("sliding_window")
        return tuple(window if here else None for here in local) if any(local) else None

    def finish(self) -> None:
        """Checks that nothing was left out.

        Raises:
            UnsupportedError: fields with a value that nothing here reads.
        """
        if unread := {name: self._fields[name] for name in sorted(self._left)}:
            raise UnsupportedError(
                f"{self.source} has fields that are not known for model_type {self._fields.get('model_type')!r} and "
                f"may change what the model computes: {unread}. If they do not, name them in ignore=, such as "
                f"from_pretrained(path, ignore={tuple(unread)!r})."
            )
