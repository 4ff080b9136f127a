"""Trees of arrays that leave the process: what `jax.export` and `flax.serialization` need to know of our classes.

A program that `jax.export` writes names the trees it takes and returns, settings included; Flax writes the arrays. Both
ask for it class by class. What is read is checked: settings are data, never code.
"""

import dataclasses
import importlib
import json
import sys
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Shaped

from kvattn.errors import CacheVersionError, ConfigError

_NODES: list[type] = []


def portable[T: type](node: T) -> T:
    """Lets a dataclass of arrays, registered with ``jax.tree_util.register_dataclass``, be written and read.

    Its static fields are settings: None, bools, numbers, strings, dtypes, tuples, and frozen dataclasses of those.
    """
    jax.export.register_pytree_node_serialization(
        node,
        serialized_name=f"kvattn.{node.__name__}" if _is_ours(node) else _name(node),
        serialize_auxdata=lambda settings: json.dumps(_plain(settings)).encode(),
        deserialize_auxdata=read,
    )
    _NODES.append(node)
    return node


class Tree:
    """Base of dataclasses of arrays, made with ``eq=False``.

    Two are equal if their settings are and they hold the same array objects; no number is looked at. What a tree holds
    instead of arrays, shardings for example, is compared by value.
    """

    def __eq__(self, other: object) -> bool:
        if type(self) is not type(other):
            return NotImplemented
        (mine, structure), (theirs, other_structure) = jax.tree.flatten(self), jax.tree.flatten(other)
        return structure == other_structure and all(map(_same, mine, theirs))

    def __hash__(self) -> int:
        return hash((type(self), jax.tree.structure(self)))


def _same(a: object, b: object) -> bool:
    """Whether two leaves are the same array, or equal otherwise."""
    arrays = any(isinstance(x, jax.Array | np.ndarray) for x in (a, b))
    return a is b or (not arrays and bool(a == b))


def read(text: str | bytes) -> Any:
    """Settings that were written as text.

    Raises:
        CacheVersionError: of a class that is not there, or that has other fields.
    """
    return _read(json.loads(text))


def tell_flax() -> None:
    """Registers all `portable` classes with `flax.serialization`, if the program has loaded that; never loads it."""
    flax: Any = sys.modules.get("flax.serialization")
    if flax is None:
        return
    for node in _NODES:
        if not flax.is_serializable(node):
            flax.register_serialization_state(node, _state_dict, _from_state_dict)


def _state_dict(tree: Any) -> dict[str, Any]:
    """The arrays by name, and the settings as text."""
    flax: Any = sys.modules["flax.serialization"]
    arrays = {name: flax.to_state_dict(getattr(tree, name)) for name in array_fields(tree)}
    return {**arrays, "settings": _settings(tree)}


def _from_state_dict(target: Any, state: dict[str, Any]) -> Any:
    """The target with the arrays of a state dict, which must be of its kind."""
    flax: Any = sys.modules["flax.serialization"]
    kind = type(target).__name__
    missing = sorted({*array_fields(target), "settings"} - set(state))
    if missing:
        raise CacheVersionError(f"what was stored is no {kind}, or another version's: it has no {', '.join(missing)}.")
    here, there = (dict(read(text)) for text in (_settings(target), state["settings"]))
    other = [n for n in sorted({*here, *there}) if here.get(n) != there.get(n)]
    if other:
        listed = ", ".join(f"{n} {there.get(n)} where the target has {here.get(n)}" for n in other)
        raise CacheVersionError(f"the stored {kind} has {listed}. Make the target as the stored one was made.")
    new = {n: flax.from_state_dict(getattr(target, n), state[n], name=n) for n in array_fields(target)}
    for name, value in new.items():
        here, there = (jax.tree.map(_shape, tree) for tree in (getattr(target, name), value))
        if repr(here) != repr(there):  # dataclasses of arrays are compared by identity
            raise CacheVersionError(
                f"{name} of the stored {kind} is {there}, the target's is {here}: make the target with the sizes of "
                "the stored one."
            )
    return dataclasses.replace(target, **new)


def array_fields(tree: Any) -> list[str]:
    """The fields of a dataclass that hold arrays; the others are settings."""
    return [f.name for f in dataclasses.fields(tree) if not f.metadata.get("static")]


def _settings(tree: Any) -> str:
    arrays = array_fields(tree)
    named = ((f.name, getattr(tree, f.name)) for f in dataclasses.fields(tree) if f.name not in arrays)
    return json.dumps(_plain(tuple(named)))


def _shape(x: Shaped[ArrayLike, "..."]) -> tuple[tuple[int, ...], str]:
    return np.shape(x), str(jnp.result_type(x))


def _is_ours(kind: type) -> bool:
    return kind.__module__.split(".")[0] == "kvattn"


def _name(kind: type) -> str:
    return f"{kind.__module__}:{kind.__qualname__}"


def _plain(value: Any) -> Any:
    """A setting in JSON."""
    value = value.item() if isinstance(value, np.bool_ | np.number) else value  # else taken for its dtype
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, tuple | list):
        return {"tuple": [_plain(x) for x in value]}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"kind": _name(type(value)), "fields": fields}
    if isinstance(value, np.dtype | type):
        found = jnp.dtype(value)
        if found != np.dtype(object):  # what NumPy takes any other class for
            return {"dtype": found.name}
    raise ConfigError(
        f"the setting {value!r} of type {type(value).__name__} cannot be written: settings of policies and codecs are "
        "None, bools, numbers, strings, dtypes, tuples, and frozen dataclasses of those."
    )


def _read(value: Any) -> Any:
    """The setting that `_plain` wrote."""
    if not isinstance(value, dict):
        return value
    if "tuple" in value:
        return tuple(_read(x) for x in value["tuple"])
    if "dtype" in value:
        return jnp.dtype(value["dtype"])
    try:
        return _kind(value["kind"])(**{name: _read(x) for name, x in value["fields"].items()})
    except (KeyError, TypeError) as error:
        raise CacheVersionError(f"a stored program has settings that this version does not know: {value}.") from error


def _kind(name: str) -> type:
    """A class of settings by its name: one of ours, or of a module that the program has loaded."""
    module, _, path = name.partition(":")
    if module.split(".")[0] == "kvattn" and module not in sys.modules:
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise CacheVersionError(f"{name} is not known to this version of kvattn.") from error
    kind: Any = sys.modules.get(module)
    if kind is None:
        raise CacheVersionError(f"{name} is not loaded: import {module} before what was stored with it.")
    for part in path.split("."):
        kind = getattr(kind, part, None)
    if not (isinstance(kind, type) and dataclasses.is_dataclass(kind)):
        raise CacheVersionError(f"{name} is no class of settings in this version.")
    return kind
