"""Reading a config.json to load it: every field is honoured, known to change nothing, or refused by name."""

import math
from collections.abc import Collection, Mapping, Sequence

from kvattn._checks import INT32_MAX
from kvattn.errors import ConfigError, UnknownNameError, UnsupportedError
from kvattn.families.harmless import is_harmless
from kvattn.families.kinds import CHUNK, FULL, WINDOW, Kind
from kvattn.families.settings import Format, Settings, Value
from kvattn.families.values import MAX_LAYERS
from kvattn.positions.scaling import ROPE_TYPES

MAX_HEADS = 10_000
"""More heads than any model has: a number that is no mistake of the file lies below."""
USUAL_ROPES = tuple(kind for kind in ROPE_TYPES if kind != "proportional")
"""Kinds of scaling that any family may have."""
_LIMITED: Mapping[Kind, str] = {WINDOW: "sliding_attention", CHUNK: "chunked_attention"}
"""What transformers calls such layers."""
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


class Fields(Settings):
    """The fields of one config.json, which must all have been asked for in the end.

    What reads one of them (`size`, `number`, `flag`, ...) raises `ConfigError` where it is something else.

    Args:
        settings: what the file holds.
        source: the file, for messages.
        format: which names, defaults and nulls the file may have. It needs a default for every field that is read.
        ignore: names of fields that the caller takes responsibility for.

    Raises:
        ConfigError: a field that has different values under two of its names.
    """

    def __init__(self, settings: Mapping[str, Value], source: str, format: Format, ignore: Collection[str] = ()):
        super().__init__(settings, f"{source}: ", format)
        self.source, self._ignored = source, ignore

    def get(self, name: str) -> Value:
        """As in `Settings`, but a field that the family does not have raises `UnknownNameError`."""
        if name not in self.format.defaults and name != "quantization_config":
            raise UnknownNameError(f"{self.source}: the family reads {name}, for which it must have a default.")
        return super().get(name)

    def size(self, name: str, null: int | None = None, least: int = 1, most: int = INT32_MAX) -> int:
        """A whole number in [least, most]; `null` is what null means."""
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

    def number(self, name: str) -> int | float:
        """A number."""
        value = self.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ConfigError(f"{self.source}: {name} must be a number, got {value!r}.")
        return value

    def number_or_none(self, name: str) -> int | float | None:
        """A number, or None where it is null."""
        return None if self.get(name) is None else self.number(name)

    def positive(self, name: str) -> int | float:
        """A number above 0."""
        value = self.number(name)
        if not 0 < value < math.inf:
            raise ConfigError(f"{self.source}: {name} must be finite and > 0, got {value!r}.")
        return value

    def flag(self, name: str) -> bool:
        """A bool; null counts as false."""
        value = self.get(name)
        if value is not None and not isinstance(value, bool):
            raise ConfigError(f"{self.source}: {name} must be true or false, got {value!r}.")
        return bool(value)

    def only(self, name: str, *values: Value, why: str = "") -> None:
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

    def rope(self, head_dim: int | None = None, renamed: Mapping[str, str] | None = None) -> dict[str, Value]:
        """Frequencies for `DecoderConfig`, from either form that transformers has written.

        Args:
            head_dim: H, in families that may turn a part of a head only; None: all of it turns.
            renamed: kinds that have another name in files of this family.
        """
        older, newer = self.mapping("rope_scaling"), self.mapping("rope_parameters")
        newer = self.format.defaults["rope_parameters"] if newer is None else newer
        scaling = dict(older or newer or {})
        for name in ("rope_type", "type"):
            if isinstance(kind := scaling.get(name), str):
                scaling[name] = (renamed or {}).get(kind, kind)
        original = self.get("original_max_position_embeddings")
        return self.scaled(scaling, self.get("rope_theta"), original, head_dim)

    def mapping(self, name: str) -> Mapping[str, Value] | None:
        """An object, or None where it is null."""
        value = self.get(name)
        if value is not None and not isinstance(value, Mapping):
            raise ConfigError(f"{self.source}: {name} must be an object, got {value!r}.")
        return value

    def scaled(
        self,
        scaling: Mapping[str, Value],
        theta: Value,
        original: Value,
        head_dim: int | None = None,
        known: Collection[str] = USUAL_ROPES,
    ) -> dict[str, Value]:
        """The same from one rope dict, filled with what transformers takes from around it.

        Args:
            scaling: the dict.
            theta: the base of the frequencies, where the dict has none.
            original: the length that the model was first made for, where it is not the dict's.
            head_dim: as in `rope`.
            known: the kinds that the family may have.
        """
        most, scaling = self.size("max_position_embeddings"), dict(scaling)
        part = self._turned(scaling.pop("partial_rotary_factor", None), head_dim)
        theta = scaling.pop("rope_theta", theta)
        if isinstance(theta, bool) or not isinstance(theta, int | float):
            raise ConfigError(f"{self.source}: rope_theta must be a number, got {theta!r}.")
        kinds, length = (scaling.get("rope_type"), scaling.get("type")), "original_max_position_embeddings"
        kind = kinds[1] if kinds[0] is None else kinds[0]
        if isinstance(kind, str) and kind not in known:
            raise UnsupportedError(
                f"{self.source}: rope_type is {kind!r}; the known ones are {', '.join(map(repr, known))}."
            )
        if kind == "dynamic":
            scaling[length] = most  # whatever the dict says
        elif kind in ("llama3", "yarn", "longrope"):
            if original is not None:
                scaling[length] = original
            given = scaling.setdefault(length, most)
            unsaid = "factor" in scaling if kind == "yarn" else scaling.get("attention_factor") is None
            if kind != "llama3" and unsaid and scaling.get("factor") is None:
                if isinstance(given, bool) or not isinstance(given, int | float) or not given > 0:
                    raise ConfigError(f"{self.source}: {length} must be a number > 0, got {given!r}.")
                scaling["factor"] = most / given
        return part | {
            "rope_theta": theta,
            "rope_scaling": None if kind in (None, "default") and len(scaling) <= 1 else scaling,
        }

    def _turned(self, fraction: Value, head_dim: int | None) -> dict[str, Value]:
        """How much of a head turns: what a rope dict says, else the field beside it.

        Raises:
            UnsupportedError: a part, in a family that turns all.
            ConfigError: no fraction.
        """
        if head_dim is None:
            self.only("partial_rotary_factor", 1.0, 1)
            if fraction not in (None, 1.0):
                raise UnsupportedError(f"{self.source}: partial_rotary_factor is {fraction!r}, supported is 1.0.")
            return {}
        fraction = self.get("partial_rotary_factor") if fraction is None else fraction
        fraction = 1.0 if fraction is None else fraction
        if isinstance(fraction, bool) or not isinstance(fraction, int | float) or not 0 < fraction <= 1:
            raise ConfigError(f"{self.source}: partial_rotary_factor must lie in (0, 1], got {fraction!r}.")
        turned = int(head_dim * fraction)
        return {"rotary_dim": None if turned == head_dim else turned}

    def windows(self, kinds: Sequence[Kind], used: bool = True) -> tuple[int | None, ...] | None:
        """The window of each layer, from ``layer_types`` or, where that is not given, from `kinds`.

        Args:
            kinds: `FULL` or `WINDOW`, one for each layer that there is.
            used: whether the family's flags say that there is a window.

        Raises:
            ConfigError: too few or too many entries, or a windowed layer without a size.
            UnsupportedError: a kind of attention that is not known.
        """
        return self.limits(kinds, WINDOW, "sliding_window", used)

    def limits(
        self, kinds: Sequence[Kind], limited: Kind, name: str, used: bool = True
    ) -> tuple[int | None, ...] | None:
        """The window or chunk of each layer, as `windows`.

        Args:
            kinds: `FULL` or `limited`, one for each layer that there is.
            limited: `WINDOW` or `CHUNK`.
            name: the field that says how large it is.
            used: whether the family's flags say that there is one.
        """
        size, listed = self.get(name), self.get("layer_types")
        if listed is not None and not isinstance(listed, list):
            raise ConfigError(f"{self.source}: layer_types must be a list, got {listed!r}.")
        if listed is not None:
            num_layers = len(kinds)
            known: dict[str, Kind] = {_LIMITED[limited]: limited, "full_attention": FULL}
            for kind in listed:
                if not isinstance(kind, str) or kind not in known:
                    raise UnsupportedError(f"{self.source}: layer_types holds {kind!r}; known are {', '.join(known)}.")
            kinds = [known[kind] for kind in listed]
            if len(kinds) != num_layers:
                raise ConfigError(f"{self.source}: layer_types has {len(kinds)} entries for {num_layers} layers.")
        if limited not in kinds:
            return None
        if size is None or not used:
            raise ConfigError(f"{self.source}: there are layers with a {limited}, but {name} is null.")
        size = self.size(name)
        return tuple(size if kind == limited else None for kind in kinds)

    def unsupported(self, name: str, value: Value, known: str) -> UnsupportedError:
        """The error to raise for a value that is not supported."""
        return UnsupportedError(f"{self.source}: {name} is {value!r}, supported is {known}.")

    def finish(self) -> None:
        """Checks that nothing was left out.

        Raises:
            UnsupportedError: fields with a value that nothing here reads.
        """
        known = self._asked.union(self._ignored)
        unread = {n: x for n, x in sorted(self._given.items()) if n not in known and not is_harmless(n, x)}
        if unread:
            raise UnsupportedError(
                f"{self.source} has fields that are not known for model_type {self._given.get('model_type')!r} and "
                f"may change what the model computes: {unread}. If they do not, name them in ignore=, such as "
                f"from_pretrained(path, ignore={tuple(unread)!r})."
            )
