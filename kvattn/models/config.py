"""`DecoderConfig`: what a decoder is made of. Frozen, hashable, without arrays, and readable as JSON."""

import dataclasses
import math
import numbers
from collections.abc import Mapping
from typing import Any

from kvattn import _checks
from kvattn.errors import ConfigError, DTypeError, RangeError
from kvattn.positions import RoPE


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """The sizes and rules of a `kvattn.models.Decoder`.

    Args:
        vocab_size: V, token ids lie in [0, V).
        model_dim: D.
        num_layers: how many blocks of attention and MLP.
        num_heads: N.
        num_kv_heads: K; N if None.
        head_dim: H; D // N if None.
        mlp_dim: the hidden size of the SwiGLU.
        rope_theta: base of the rotary frequencies.
        rope_scaling: the HuggingFace rope dict, see `kvattn.RoPE`.
        windows: how many tokens a query sees, its own included: None for all of them, one int for all layers,
            or one entry per layer. A layer with a window keeps a cache of that size.
        norm_epsilon: of the RMS norms.
        tie_embeddings: the output projection is the transposed embedding.
        softcap: caps the attention scores.
        logit_softcap: caps the logits.

    Raises:
        ConfigError: sizes that cannot work together.
        DTypeError: a size that is no int.
        RangeError: a window, epsilon or cap outside its range.

    Example:
        >>> from kvattn.models import DecoderConfig
        >>> config = DecoderConfig(vocab_size=256, model_dim=64, num_layers=2, num_heads=8, num_kv_heads=2, mlp_dim=96)
        >>> config.head_dim, config.layer_windows
        (8, (None, None))
    """

    vocab_size: int
    model_dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int | None = None
    head_dim: int | None = None
    mlp_dim: int
    rope_theta: float = 10000.0
    rope_scaling: Mapping[str, Any] | tuple[tuple[str, Any], ...] | None = None
    windows: int | tuple[int | None, ...] | None = None
    norm_epsilon: float = 1e-6
    tie_embeddings: bool = True
    softcap: float | None = None
    logit_softcap: float | None = None

    def __post_init__(self) -> None:
        for name in ("vocab_size", "model_dim", "num_layers", "mlp_dim"):
            _checks.integer(name, getattr(self, name), 1)
        kv_heads = self.num_heads if self.num_kv_heads is None else self.num_kv_heads
        _checks.head_counts(self.num_heads, kv_heads)
        if self.head_dim is None and self.model_dim % self.num_heads:
            raise ConfigError(
                f"model_dim ({self.model_dim}) is no multiple of num_heads ({self.num_heads}): give head_dim."
            )
        head_dim = self.model_dim // self.num_heads if self.head_dim is None else self.head_dim
        _checks.integer("head_dim", head_dim, 1)
        if len(self.layer_windows) != self.num_layers:
            raise ConfigError(f"windows has {len(self.layer_windows)} entries for {self.num_layers} layers.")
        for window in self.layer_windows:
            _checks.window(window)
        if not isinstance(self.norm_epsilon, numbers.Real) or isinstance(self.norm_epsilon, bool):
            raise DTypeError(f"norm_epsilon must be a number, got {self.norm_epsilon!r}.")
        if not (math.isfinite(self.norm_epsilon) and self.norm_epsilon >= 0):
            raise RangeError(f"norm_epsilon must be finite and >= 0, got {self.norm_epsilon}.")
        if not isinstance(self.tie_embeddings, bool):
            raise DTypeError(f"tie_embeddings must be a bool, got {self.tie_embeddings!r}.")
        _checks.positive_softcap(self.softcap)
        _checks.positive_softcap(self.logit_softcap)

        settled: dict[str, Any] = {"num_kv_heads": kv_heads, "head_dim": head_dim}
        settled["windows"] = tuple(self.windows) if isinstance(self.windows, list) else self.windows
        for name, value in settled.items():
            object.__setattr__(self, name, value)
        # RoPE checks the frequencies and makes the scaling hashable.
        object.__setattr__(self, "rope_scaling", self.rope.scaling)

    @property
    def layer_windows(self) -> tuple[int | None, ...]:
        """The window of each layer."""
        windows = self.windows
        return tuple(windows) if isinstance(windows, tuple | list) else (windows,) * self.num_layers

    @property
    def rope(self) -> RoPE:
        """The rotary embedding of every layer."""
        return RoPE(int(self.head_dim or 0), theta=self.rope_theta, scaling=self.rope_scaling)

    def to_json(self) -> dict[str, Any]:
        """The settings as JSON has them."""
        fields = dataclasses.asdict(self)
        scaling = fields["rope_scaling"]
        return fields | {"rope_scaling": None if scaling is None else dict(scaling)}

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "DecoderConfig":
        """The inverse of `to_json`.

        Raises:
            ConfigError: fields that are unknown or missing, all named.
        """
        known = {field.name: field for field in dataclasses.fields(cls)}
        unknown = sorted(set(fields) - set(known))
        required = {name for name, field in known.items() if field.default is dataclasses.MISSING}
        missing = sorted(required - set(fields))
        if unknown or missing:
            raise ConfigError(f"the decoder's settings have unknown fields {unknown} and lack {missing}.")
        return cls(**fields)
