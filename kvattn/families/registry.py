"""The table of families by name: `FAMILIES`, and `register`, which adds to it."""

from collections.abc import Mapping

from kvattn.errors import ConfigError, DTypeError
from kvattn.families.family import Family
from kvattn.families.settings import Value

FAMILIES: dict[str, Family] = {}
"""All known families by model_type."""


def register(*families: Family) -> None:
    """Adds families: `from_pretrained` then loads those that have a `blueprint`, and the planner knows all of them.

    The families of this package are registered the same way (`kvattn.families.hf`).

    Args:
        families: the new ones. ``dataclasses.replace(FAMILIES["llama"], model_type="mine", ...)`` is one.

    Raises:
        ConfigError: the name is taken.
        DTypeError: not a `Family`, or one without a name.

    Example:
        >>> import dataclasses
        >>> from kvattn.families import FAMILIES, register
        >>> register(dataclasses.replace(FAMILIES["llama"], model_type="yours", aliases={"hidden_size": ("width",)}))
        >>> FAMILIES["yours"].defaults["rms_norm_eps"]
        1e-06
        >>> del FAMILIES["yours"]
    """
    names: set[str] = set()
    for family in families:
        if not isinstance(family, Family):
            raise DTypeError(f"a family must be a kvattn.models.Family, got {family!r}.")
        if not isinstance(family.model_type, str) or not family.model_type:
            raise DTypeError(f"a family's model_type must be a text, got {family.model_type!r}.")
        for name in (family.model_type, *family.formerly):
            if name in names or find(name) is not None:
                raise ConfigError(f"model_type {name!r} is taken by another family: choose another name.")
            names.add(name)
    FAMILIES.update({family.model_type: family for family in families})


def find(model_type: str) -> tuple[Family, Mapping[str, Value]] | None:
    """The family with this name, and the fields that the name implies if it is an older one. None: unknown."""
    if model_type in FAMILIES:
        return FAMILIES[model_type], {}
    return next(((x, x.formerly[model_type]) for x in FAMILIES.values() if model_type in x.formerly), None)
