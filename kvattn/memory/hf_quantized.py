"""What the quantization_config of a config.json says of the bytes of the weights."""

import math
from collections.abc import Mapping

from kvattn.errors import ConfigError, KVAttnError
from kvattn.families import fp8
from kvattn.families.family import Family
from kvattn.families.fields import Fields
from kvattn.families.settings import Value
from kvattn.memory.dtypes import BITS


def quantized(settings: object) -> tuple[str | None, str]:
    """What the quantised weights of a checkpoint are stored in.

    Args:
        settings: the quantization_config, or None.

    Returns:
        a name of `kvattn.memory.dtypes.BITS`, or None where the weights are not quantised or it is not understood how;
        and in the latter case a note, else "".

    Raises:
        ConfigError: no object.
    """
    if settings is None:
        return None, ""
    if not isinstance(settings, Mapping):
        raise ConfigError(f"quantization_config must be an object, got {settings!r}.")
    method = settings.get("quant_method")
    found = _dtype(method, settings)
    if found in BITS:
        return found, ""
    said = f"of method {method!r}" if method else repr(dict(settings))
    return None, f"quantization_config {said} is not understood: weights are planned unquantised"


def in_blocks(config: Mapping[str, Value], family: Family) -> tuple[int, int] | None:
    """Of weights in FP8 with a scale for every block: how many numbers they are, and the bytes of their scales.

    Args:
        config: the settings.
        family: which can be loaded, so that its tensors are known.

    Returns:
        None where weights are stored in another way, or the tensors are not known.
    """
    quantization = config.get("quantization_config")
    if not isinstance(quantization, Mapping) or quantization.get("quant_method") != "fp8" or family.blueprint is None:
        return None
    settings = {name: value for name, value in config.items() if name != "quantization_config"}
    try:
        blueprint = family.blueprint(Fields(settings, "config.json", family))
        rules = fp8.blockwise(blueprint, quantization, "config.json").rules
    except (KVAttnError, TypeError, ValueError, AttributeError, ArithmeticError):
        return None  # the loader says why
    numbers = scales = 0
    for rule in rules:
        if isinstance(rule, fp8.BlockScaled):
            numbers += sum(math.prod(rule.sources[name]) for name in rule.scaled)
            scales += sum(math.prod(rule.sources[name + fp8.SCALES]) for name in rule.scaled)
    return numbers, 4 * scales


def _dtype(method: object, settings: Mapping[str, object]) -> str | None:
    if method == "mxfp4":
        return "mxfp4"
    if method in ("fp8", "fbgemm_fp8"):
        return "float8_e4m3fn"
    if method == "compressed-tensors":
        return _of_groups(settings.get("config_groups"))
    if method in ("bitsandbytes", None) and (settings.get("load_in_4bit") or settings.get("_load_in_4bit")):
        return "int4"
    if method in ("bitsandbytes", None) and (settings.get("load_in_8bit") or settings.get("_load_in_8bit")):
        return "int8"
    if method in ("gptq", "awq", None):
        return f"int{settings.get('bits', settings.get('w_bit'))}"
    return None


def _of_groups(groups: object) -> str | None:
    """The type that all groups of weights share; None where there is none."""
    if not isinstance(groups, Mapping):
        return None
    found = set()
    for group in groups.values():
        weights = group.get("weights") if isinstance(group, Mapping) else None
        if not isinstance(weights, Mapping):
            return None
        kind, bits = weights.get("type"), weights.get("num_bits")
        found.add({("int", bits): f"int{bits}", ("float", 8): "float8_e4m3fn"}.get((kind, bits)))
    return found.pop() if len(found) == 1 else None
