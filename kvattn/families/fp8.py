"""Weights in FP8 with a scale for every block, as DeepSeek-V3 ships them: floats are made of them as they are read."""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from jaxtyping import Float

from kvattn.errors import ConfigError, UnsupportedError
from kvattn.families.rules import FLOATS, Blueprint, Index, Indices, Numbers, Rule, Shape
from kvattn.families.settings import Value

SCALES = "_scale_inv"
"""What the scales of a weight are called, behind its own name."""
_ENDING = ".weight"
_WHOLE = ("embed.embedding", "head.kernel", "positions.embedding", ".router.kernel")
"""Parameters that are never in FP8, by the ends of their names."""
_ONLY: Mapping[str, tuple[Value, ...]] = {
    "fmt": ("e4m3",), "activation_scheme": ("dynamic",), "scale_fmt": ("ue8m0", "float"), "dequantize": (True, False),
}  # fmt: skip
"""What a quantization_config may say. How activations are rounded is not asked: here they are floats."""
_ELSE = ("quant_method", "weight_block_size", "modules_to_not_convert", "ignored_layers")

Read = Callable[[str, list[Indices]], Numbers]


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockScaled(Rule):
    """A rule whose weights are in FP8: each block of them is multiplied by its scale before anything else is done.

    Attributes:
        inner: the rule for floats.
        block: rows and columns of a weight that share a scale. Blocks at the ends may be smaller.
        scaled: the weights that are in FP8.
    """

    inner: Rule
    block: tuple[int, int]
    scaled: frozenset[str]

    def read(self, read: Read, index: Index) -> dict[str, Numbers]:
        """As the rule for floats does."""
        return self.inner.read(functools.partial(self._floats, read), index)

    def kinds(self, name: str) -> tuple[str, ...]:
        """The dtypes a tensor may have."""
        return ("F8_E4M3",) if name in self.scaled else FLOATS

    def _floats(self, read: Read, name: str, where: list[Indices]) -> Numbers:
        """The numbers of a weight at some rows and columns, ascending, as float32."""
        weight = read(name, where)
        if name not in self.scaled:
            return weight
        rows, columns = (along // size for along, size in zip(where, self.block, strict=True))
        kept = [np.unique(along) for along in (rows, columns)]
        return expanded(weight, read(f"{name}{SCALES}", kept), *map(np.searchsorted, kept, (rows, columns)))


def expanded(
    weight: Numbers, scales: Float[np.ndarray, "_ _"], rows: Indices, columns: Indices
) -> Float[np.ndarray, "_ _"]:
    """Numbers times their scales, a row of blocks at a time.

    Args:
        weight: in FP8.
        scales: of the blocks.
        rows: which of them each row of the weight has, ascending.
        columns: likewise.

    Returns:
        float32.
    """
    numbers, scales = weight.astype(np.float32), scales.astype(np.float32)
    ends = np.searchsorted(rows, np.arange(len(scales)), side="right")
    for scale, start, end in zip(scales, (0, *ends), ends, strict=False):
        numbers[start:end] *= scale[columns][None]
    return numbers


def blockwise(blueprint: Blueprint, settings: Value, where: str) -> Blueprint:
    """The blueprint of the same model whose weights are in FP8: those of projections, with scales beside them.

    Args:
        blueprint: of the model with floats.
        settings: the quantization_config, of method "fp8".
        where: what errors name.

    Raises:
        UnsupportedError: another format, or scales that are no numbers of blocks.
        ConfigError: sizes that are none.
    """
    block, kept = _checked(settings, where)
    rules = tuple(_scaled(rule, block, kept) for rule in blueprint.rules)
    return dataclasses.replace(blueprint, rules=rules)


def _scaled(rule: Rule, block: tuple[int, int], kept: re.Pattern[str] | None) -> Rule:
    if any(made.endswith(_WHOLE) for made in rule.makes):
        return rule
    found = {
        name: shape
        for name, shape in rule.sources.items()
        if name.endswith(_ENDING) and len(shape) == 2 and not (kept and kept.search(name.removesuffix(_ENDING)))
    }
    if not found:
        return rule
    scales: dict[str, Shape] = {
        f"{name}{SCALES}": tuple(-(-size // along) for size, along in zip(shape, block, strict=True))
        for name, shape in found.items()
    }
    return BlockScaled(
        {**rule.sources, **scales}, rule.makes, exact=rule.exact, inner=rule, block=block, scaled=frozenset(found)
    )


def _checked(settings: Value, where: str) -> tuple[tuple[int, int], re.Pattern[str] | None]:
    """The size of a block, and what names of modules with floats match."""
    for name, known in _ONLY.items():
        value = settings.get(name)
        if value is not None and value not in known:
            raise UnsupportedError(
                f"{where}: quantization_config.{name} is {value!r}, supported is {' or '.join(map(repr, known))}."
            )
    unknown = sorted(set(settings) - {*_ONLY, *_ELSE})
    if unknown:
        raise UnsupportedError(f"{where}: quantization_config has fields that are not known for fp8: {unknown}.")
    block = settings.get("weight_block_size")
    if block is None:
        raise UnsupportedError(
            f"{where}: quantization_config.weight_block_size is null: one scale for a whole weight is not supported."
        )
    if not _is_list(block) or len(block) != 2 or not all(type(size) is int and size > 0 for size in block):
        raise ConfigError(f"{where}: quantization_config.weight_block_size must be two sizes, got {block!r}.")
    names: list[str] = []
    for field in ("modules_to_not_convert", "ignored_layers"):
        listed = settings.get(field) or []
        if not _is_list(listed) or not all(isinstance(name, str) for name in listed):
            raise ConfigError(f"{where}: quantization_config.{field} must list names, got {listed!r}.")
        names += listed
    kept = re.compile("|".join(rf"(^|\.){re.escape(name)}(\.|$)" for name in names)) if names else None
    return (block[0], block[1]), kept


def _is_list(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)
