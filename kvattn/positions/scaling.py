"""The long-context scalings of RoPE: a HuggingFace rope dict, and the frequencies it makes.

Frequencies are made once, on the host, as exact fractions.
"""

import dataclasses
import decimal
import functools
import math
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

from kvattn import _checks
from kvattn.errors import ConfigError, DTypeError

TWO_PI = 2 * Fraction("3.14159265358979323846264338327950288419716939937510582097494")

# What each kind needs, and what else it reads. A field that a kind does not read is refused: an
# ignored field is a model that runs with the wrong phases.
_REQUIRED: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "longrope": ("short_factor", "long_factor", "original_max_position_embeddings"),
    "proportional": (),
}
ROPE_TYPES = tuple(_REQUIRED)
"""The kinds that there are."""
_OPTIONAL: dict[str, tuple[str, ...]] = {
    "yarn": ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    "longrope": ("attention_factor", "factor"),
    "proportional": ("factor", "partial_rotary_factor"),
}
# Present in checkpoints of every kind, without meaning for some.
_COMMON = ("original_max_position_embeddings", "max_position_embeddings", "finetuned")


@dataclasses.dataclass(frozen=True)
class Spectrum:
    """All that decides how fast each pair turns.

    Attributes:
        theta: base of the frequencies.
        num_pairs: pairs of a head that turn.
        scaling: the fields that `read_scaling` left, with ``rope_type`` among them; None: none.
    """

    theta: float
    num_pairs: int
    scaling: tuple[tuple[str, Any], ...] | None

    @property
    def fields(self) -> dict[str, Any]:
        """Of the scaling, by name."""
        return dict(self.scaling or ())

    @property
    def kind(self) -> str:
        """Of the scaling."""
        return self.fields.get("rope_type", "default")

    @property
    def long(self) -> "Spectrum":
        """Of ``longrope``: the one of rows beyond the original length."""
        fields = self.fields | {"short_factor": self.fields["long_factor"]}
        return dataclasses.replace(self, scaling=tuple(fields.items()))


def read_scaling(scaling: object) -> tuple[str, dict[str, Any]]:
    """The kind of a rope dict and its fields, all checked, without what has no meaning for it."""
    if scaling is None:
        return "default", {}
    if not isinstance(scaling, Mapping | tuple):
        raise DTypeError(f"scaling must be a HuggingFace rope dict, got {type(scaling).__name__}.")
    fields = {name: value for name, value in dict(scaling).items() if value is not None}
    kinds = {fields.pop(name) for name in ("rope_type", "type") if name in fields} or {"default"}
    kind = kinds.pop()
    if kinds:
        raise ConfigError(f"scaling names two kinds of RoPE, {kind!r} as one and {kinds.pop()!r} as the other.")
    if kind not in _REQUIRED:
        raise ConfigError(
            f"unknown rope_type {kind!r} in scaling; the known ones are {', '.join(map(repr, _REQUIRED))}."
        )

    # transformers reads these from the config around the dict; a dict that carries them is complete.
    length = fields.get("max_position_embeddings")
    if kind == "dynamic" and length is not None:
        fields.setdefault("original_max_position_embeddings", length)
    if kind in ("yarn", "longrope") and length is not None and "original_max_position_embeddings" in fields:
        fields.setdefault("factor", length / fields["original_max_position_embeddings"])
    for name in _REQUIRED[kind]:
        if name not in fields:
            raise ConfigError(f"scaling of type {kind!r} needs the field {name!r}, got {sorted(fields)}.")
    read = {*_REQUIRED[kind], *_OPTIONAL.get(kind, ())}
    unknown = sorted(set(fields) - read - {*_COMMON, "rope_theta", "partial_rotary_factor"})
    if unknown:
        raise ConfigError(f"scaling of type {kind!r} does not read the field {unknown[0]!r}; it reads {sorted(read)}.")

    out: dict[str, Any] = {name: fields[name] for name in ("rope_theta", "partial_rotary_factor") if name in fields}
    for name in sorted(read & set(fields)):
        value = fields[name]
        if name == "truncate":
            if not isinstance(value, bool):
                raise DTypeError(f"scaling['truncate'] must be a bool, got {value!r}.")
            out[name] = value
        elif name in ("mscale", "mscale_all_dim", "beta_fast", "beta_slow") and value == 0:
            continue  # zero means "not given", as in transformers
        elif name in ("short_factor", "long_factor"):
            if not isinstance(value, list | tuple):
                raise DTypeError(f"scaling['{name}'] must list a number for each pair that turns, got {value!r}.")
            out[name] = tuple(_checks.positive(f"scaling['{name}']", x) for x in value)
        else:
            out[name] = _checks.positive(f"scaling['{name}']", value)
    if kind == "llama3" and not out["low_freq_factor"] < out["high_freq_factor"]:
        raise ConfigError(
            f"scaling['low_freq_factor'] ({out['low_freq_factor']}) must be below "
            f"scaling['high_freq_factor'] ({out['high_freq_factor']})."
        )
    if kind == "longrope" and not {"attention_factor", "factor"} & out.keys():
        raise ConfigError(
            "scaling of type 'longrope' needs attention_factor, or what it follows from: factor, or "
            "max_position_embeddings."
        )
    return kind, out


@functools.lru_cache(maxsize=256)
def frequencies(spectrum: Spectrum) -> tuple[Fraction, ...]:
    """Radians per token of each pair to 50 digits: float64's 16 are 2e-6 rad short at position 2^31."""
    with decimal.localcontext(prec=60):
        theta = decimal.Decimal(spectrum.theta)
        plain = tuple(Fraction(theta ** (decimal.Decimal(-i) / spectrum.num_pairs)) for i in range(spectrum.num_pairs))
    return _SCALED[spectrum.kind](plain, spectrum)


def _unscaled(plain: tuple[Fraction, ...], spectrum: Spectrum) -> tuple[Fraction, ...]:
    return plain


def _linear(plain: tuple[Fraction, ...], spectrum: Spectrum) -> tuple[Fraction, ...]:
    return tuple(f / Fraction(spectrum.fields["factor"]) for f in plain)


def _yarn(plain: tuple[Fraction, ...], spectrum: Spectrum) -> tuple[Fraction, ...]:
    """Pairs that turn often within the original length stay, those that turn rarely are interpolated."""
    fields, dim = spectrum.fields, 2 * spectrum.num_pairs
    length = fields["original_max_position_embeddings"]

    def pair_turning(times: float) -> float:
        """The (fractional) pair that turns this many times within the original length."""
        return dim * math.log(length / (times * 2 * math.pi)) / (2 * math.log(spectrum.theta))

    low, high = pair_turning(fields.get("beta_fast", 32.0)), pair_turning(fields.get("beta_slow", 1.0))
    if fields.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    high = high + 0.001 if low == high else high
    out = []
    for i, f in enumerate(plain):
        interpolated = Fraction(min(max((i - low) / (high - low), 0.0), 1.0))
        out.append(interpolated * f / Fraction(fields["factor"]) + (1 - interpolated) * f)
    return tuple(out)


def yarn_attention_factor(fields: dict[str, Any]) -> float:
    """What yarn multiplies cosines and sines by."""

    def magnitude(weight: float) -> float:
        return 1.0 if fields["factor"] <= 1 else 0.1 * weight * math.log(fields["factor"]) + 1.0

    if "attention_factor" in fields:
        return fields["attention_factor"]
    if "mscale" in fields and "mscale_all_dim" in fields:
        return magnitude(fields["mscale"]) / magnitude(fields["mscale_all_dim"])
    return magnitude(1.0)


def _llama3(plain: tuple[Fraction, ...], spectrum: Spectrum) -> tuple[Fraction, ...]:
    """Short waves stay, long ones are divided by the factor, those between blend."""
    factor, low, high, length = (Fraction(spectrum.fields[name]) for name in _REQUIRED["llama3"])
    out = []
    for f in plain:
        turns = length * f / TWO_PI
        kept = min(max((turns - low) / (high - low), Fraction(0)), Fraction(1))
        out.append((1 - kept) * f / factor + kept * f)
    return tuple(out)


def _longrope(plain: tuple[Fraction, ...], spectrum: Spectrum) -> tuple[Fraction, ...]:
    """Each pair has a divisor of its own, searched for when the model was made (https://arxiv.org/abs/2402.13753)."""
    return tuple(f / Fraction(x) for f, x in zip(plain, spectrum.fields["short_factor"], strict=True))


def _proportional(plain: tuple[Fraction, ...], spectrum: Spectrum) -> tuple[Fraction, ...]:
    """The first pairs turn as if all did, and the others do not (Gemma 4)."""
    fields, size = spectrum.fields, 2 * spectrum.num_pairs
    turning = int(fields.get("partial_rotary_factor", 1.0) * size // 2)
    divisor = Fraction(fields.get("factor", 1.0))
    return tuple(f / divisor if i < turning else Fraction(0) for i, f in enumerate(plain))


def longrope_attention_factor(fields: dict[str, Any]) -> float:
    """What longrope multiplies cosines and sines by, whatever the length."""
    if "attention_factor" in fields:
        return fields["attention_factor"]
    factor, length = fields["factor"], fields["original_max_position_embeddings"]
    return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(length))


_SCALED: dict[str, Callable[[tuple[Fraction, ...], Spectrum], tuple[Fraction, ...]]] = {
    "default": _unscaled,
    "linear": _linear,
    "dynamic": _unscaled,  # its factor depends on the call: see `dynamic_ratio`
    "yarn": _yarn,
    "llama3": _llama3,
    "proportional": _proportional,
    "longrope": _longrope,  # up to the original length; beyond it those of `Spectrum.long`
}


def dynamic_ratio(fields: dict[str, Any], length: Any) -> Any:
    """NTK's stretch of the base, before its exponent; 1 at the original length."""
    original = fields["original_max_position_embeddings"]
    return 1.0 + fields["factor"] * ((length - original) / original)
