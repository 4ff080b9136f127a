"""What the planner knows of a model and of a device, and tables of them that are kind to typing errors."""

import dataclasses
import difflib
import re
from collections.abc import Iterator, Mapping
from typing import TypeVar

from kvattn import _checks
from kvattn.errors import ConfigError, DTypeError, RangeError, UnknownNameError
from kvattn.families.values import MAX_LAYERS
from kvattn.memory.dtypes import BITS, name_of, num_bytes

Window = int | None | tuple[int | None, ...]
KVSource = tuple[int | None, ...] | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """The sizes of a decoder that memory depends on.

    Attributes:
        name: what it is called.
        num_layers: layers, those without a cache included.
        num_heads: N, query heads.
        num_kv_heads: K, key/value heads.
        head_dim: H.
        num_params: parameters, tied ones once.
        value_head_dim: Hv, the size of a value head; None: H.
        values_in_keys: whether a value is the first numbers of its key, stored once, as in latent attention (MLA):
            there K is 1, H what is cached of a token in all, and `value_head_dim` the latent part of it.
        window: tokens a query sees, its own included: None for all of them, one int for all layers, or one entry per
            layer (`layer_windows`). A layer with a window keeps a cache of that size.
        kv_source: for each layer, the number of the layer whose keys and values it attends to: its own number, that of
            an earlier layer that it shares a cache with, or None where it has no keys and values (linear attention,
            Mamba, convolutions, an MLP alone). None: every layer has its own. What such layers keep instead, a state
            of constant size, is not counted.
        layer_heads: K and H of each layer, where they are not `num_kv_heads` and `head_dim` in all of them (Gemma 4).
            Such a model has values as long as its keys.
        model_dim: D; None where it is not known (then the planner does not say what fewer heads save in weights).
        max_length: tokens it was trained for, or None.
        num_active_params: parameters one token is multiplied with; None: all.
        num_experts: experts of a layer; None for a dense model.
        experts_per_token: how many of them a token goes to.
        num_expert_weights: numbers in the matrices of all experts of all layers, which is what mxfp4 holds for; None
            where that is not known (then mxfp4 holds for all parameters).
        weight_dtype: what the checkpoint's weights are quantised to, such as "int4"; None: they are not.
        num_quantized_params: parameters that `weight_dtype` holds for, the others having 16 bits; None: all.
        num_scale_bytes: bytes of the scales that the checkpoint has for them besides, where they are known.
        source: where the numbers are from.
        is_estimate: whether the parameters are estimated, not counted.
        cache_is_estimate: whether the cache is, because the architecture is not known here.
        notes: what every plan with it should say.

    Raises:
        ConfigError, DTypeError, RangeError: sizes that cannot be.

    Example:
        >>> from kvattn.memory import ModelSpec
        >>> spec = ModelSpec(name="mine", num_layers=4, num_heads=8, num_kv_heads=2, head_dim=64, num_params=10**7)
        >>> spec.layer_windows
        (None, None, None, None)

        One layer in four keeps keys and values, the others a state:

        >>> hybrid = ModelSpec(name="hybrid", num_layers=4, num_heads=8, num_kv_heads=2, head_dim=64, num_params=10**7,
        ...     kv_source=(None, None, None, 3))
        >>> hybrid.num_cache_layers
        1
    """

    name: str
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_params: int
    value_head_dim: int | None = None
    values_in_keys: bool = False
    window: Window = None
    kv_source: KVSource = None
    layer_heads: tuple[tuple[int, int], ...] | None = None
    model_dim: int | None = None
    max_length: int | None = None
    num_active_params: int | None = None
    num_experts: int | None = None
    experts_per_token: int | None = None
    num_expert_weights: int | None = None
    weight_dtype: str | None = None
    num_quantized_params: int | None = None
    num_scale_bytes: int = 0
    source: str = ""
    is_estimate: bool = False
    cache_is_estimate: bool = False
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _checks.head_counts(self.num_heads, self.num_kv_heads)
        for field in ("num_layers", "head_dim"):
            _checks.integer(field, getattr(self, field), 1)
        if self.value_head_dim is not None:
            _checks.integer("value_head_dim", self.value_head_dim, 1)
        if _checks.flag("values_in_keys", self.values_in_keys) and self.value_dim > self.head_dim:
            raise ConfigError(
                f"values_in_keys: value_head_dim ({self.value_dim}) must be at most head_dim ({self.head_dim})."
            )
        if self.num_layers > MAX_LAYERS:
            raise RangeError(f"num_layers must be at most {MAX_LAYERS}, got {self.num_layers}.")
        _checks.integer("num_params", self.num_params, 0)
        for field in ("model_dim", "max_length", "num_active_params", "num_experts", "experts_per_token"):
            if getattr(self, field) is not None:
                _checks.integer(field, getattr(self, field), 1)
        for field in ("window", "kv_source", "layer_heads", "notes"):
            if isinstance(getattr(self, field), list):
                object.__setattr__(self, field, tuple(getattr(self, field)))
        if len(self.layer_windows) != self.num_layers:
            raise ConfigError(f"window has {len(self.layer_windows)} entries for {self.num_layers} layers.")
        for window in set(self.layer_windows):
            _checks.window(window)
        self._check_heads()
        self._check_sources()
        self._check_weights()
        if (self.num_experts is None) != (self.experts_per_token is None):
            raise ConfigError("num_experts and experts_per_token go together: give both or none.")
        if self.num_experts is not None and self.experts_per_token is not None:
            if self.experts_per_token > self.num_experts:
                raise ConfigError(f"{self.experts_per_token} experts per token, but only {self.num_experts} experts.")
            if self.num_active_params is None:
                raise ConfigError("a model with experts needs num_active_params.")
        if self.num_active_params is not None and self.num_active_params > self.num_params:
            raise ConfigError(f"num_active_params ({self.num_active_params}) exceeds num_params ({self.num_params}).")

    def _check_heads(self) -> None:
        """That `layer_heads` are sizes of heads, one pair for each layer."""
        if self.layer_heads is None:
            return
        pairs = [pair for pair in self.layer_heads if isinstance(pair, tuple | list) and len(pair) == 2]
        if len(pairs) != self.num_layers or len(self.layer_heads) != self.num_layers:
            raise ConfigError(
                f"layer_heads must hold a pair of K and H for each of {self.num_layers} layers, got "
                f"{self.layer_heads!r}."
            )
        for kv_heads, size in pairs:
            _checks.head_counts(self.num_heads, kv_heads)
            _checks.integer("head_dim", size, 1)
        if self.value_head_dim is not None or self.values_in_keys:
            raise ConfigError("layer_heads are of layers whose values are as long as keys: leave value_head_dim out.")
        object.__setattr__(self, "layer_heads", tuple((int(kv), int(size)) for kv, size in pairs))

    def _check_sources(self) -> None:
        """That `kv_source` names layers that are there and have what is asked of them."""
        sources, windows = self.layer_sources, self.layer_windows
        if len(sources) != self.num_layers:
            raise ConfigError(f"kv_source has {len(sources)} entries for {self.num_layers} layers.")
        for layer, source in enumerate(sources):
            if source is None:
                continue
            if _checks.integer("kv_source", source, 0) > layer or sources[source] != source:
                raise ConfigError(
                    f"kv_source of layer {layer} is {source}: it must be {layer} itself, or an earlier layer that has "
                    "keys and values of its own, or None."
                )
            kept, seen = windows[source], windows[layer]
            if kept is not None and (seen is None or seen > kept):
                raise ConfigError(
                    f"layer {layer} sees {seen or 'all'} tokens of layer {source}, which keeps {kept} of them."
                )
        if not self.num_cache_layers:
            raise ConfigError(f"no layer of {self.name} keeps keys and values: there is no cache to plan.")

    def _check_weights(self) -> None:
        """That no more parameters are stored in another way than there are."""
        for field in ("num_expert_weights", "num_quantized_params"):
            value = getattr(self, field)
            if value is not None and _checks.integer(field, value, 0) > self.num_params:
                raise ConfigError(f"{field} ({value}) exceeds num_params ({self.num_params}).")
        if _checks.integer("num_scale_bytes", self.num_scale_bytes, 0) and self.weight_dtype is None:
            raise ConfigError("num_scale_bytes without weight_dtype: what are they the scales of?")
        if self.weight_dtype is not None:
            object.__setattr__(self, "weight_dtype", name_of("weight_dtype", self.weight_dtype))
        elif self.num_quantized_params is not None:
            raise ConfigError("num_quantized_params without weight_dtype: what are they stored in?")

    @property
    def value_dim(self) -> int:
        """Hv."""
        return self.value_head_dim or self.head_dim

    @property
    def heads(self) -> tuple[tuple[int, int], ...]:
        """K and H of each layer."""
        return ((self.num_kv_heads, self.head_dim),) * self.num_layers if self.layer_heads is None else self.layer_heads

    @property
    def layer_sources(self) -> tuple[int | None, ...]:
        """`kv_source`, one entry per layer."""
        return tuple(range(self.num_layers)) if self.kv_source is None else self.kv_source

    @property
    def cache_layers(self) -> tuple[int, ...]:
        """The numbers of the layers that keep keys and values of their own."""
        return tuple(sorted({source for source in self.layer_sources if source is not None}))

    @property
    def num_cache_layers(self) -> int:
        """How many these are."""
        return len(self.cache_layers)

    def params_in(self, dtype: str) -> int:
        """Parameters that are stored in a type of weights where the others have 16 bits.

        Of the checkpoint's own `weight_dtype`, those that it holds for; of mxfp4, the experts; of any other, all.
        """
        stored = None
        if dtype == self.weight_dtype:
            stored = self.num_quantized_params
        elif dtype == "mxfp4":
            stored = self.num_expert_weights
        return self.num_params if stored is None else stored

    def weight_bytes(self, dtype: str) -> int:
        """Bytes of all parameters: of `params_in` this type with the checkpoint's scales, of the others in bfloat16."""
        stored = self.params_in(dtype)
        scales = self.num_scale_bytes if dtype == self.weight_dtype else 0
        return num_bytes(stored, dtype) + num_bytes(self.num_params - stored, "bfloat16") + scales

    @property
    def layer_windows(self) -> tuple[int | None, ...]:
        """The window of each layer."""
        return self.window if isinstance(self.window, tuple) else (self.window,) * self.num_layers

    @property
    def active_params(self) -> int:
        """Parameters one token is multiplied with."""
        return self.num_params if self.num_active_params is None else self.num_active_params

    def touched_params(self, num_tokens: int) -> float:
        """Parameters that a step of so many tokens reads, on average, if every expert is as likely as the next.

        All of a dense model. With E experts of which a token takes k, a share 1 - (1 - k/E)^n of them for n tokens.
        """
        if self.num_experts is None or self.experts_per_token is None:
            return self.active_params
        share = self.experts_per_token / self.num_experts
        if share == 1:
            return self.num_params
        of_experts = (self.num_params - self.active_params) / (1 - share)
        return self.num_params - of_experts * (1 - share) ** num_tokens

    def touched_bytes(self, num_tokens: int, dtype: str) -> float:
        """Bytes of `touched_params`, stored as `weight_bytes` counts them: all but those of the experts that idle."""
        idle = self.num_params - self.touched_params(num_tokens)
        stored = 1.0
        if idle and self.num_experts and self.experts_per_token and dtype == "mxfp4" and self.num_expert_weights:
            of_experts = (self.num_params - self.active_params) / (1 - self.experts_per_token / self.num_experts)
            stored = self.num_expert_weights / of_experts  # their biases have 16 bits
        scales = self.num_scale_bytes / max(self.params_in(dtype), 1) if dtype == self.weight_dtype else 0
        return self.weight_bytes(dtype) - idle * ((stored * float(BITS[dtype]) + (1 - stored) * 16) / 8 + scales)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeviceSpec:
    """An accelerator: how much fits, and how fast it can be read.

    Attributes:
        name: what it is called.
        memory_bytes: bytes of its memory.
        bandwidth: bytes per second read from it, at best.
        flops: floating-point operations per second in bfloat16 (float16 where there is none), dense, at best; or None.
        backend: "gpu", "tpu" or "cpu": caches are laid out differently (`kvattn.cache.layout`).
        source: where the numbers are from.

    Raises:
        ConfigError, DTypeError, RangeError: sizes that cannot be.
    """

    name: str
    memory_bytes: int
    bandwidth: float
    flops: float | None = None
    backend: str = "gpu"
    source: str = ""

    def __post_init__(self) -> None:
        _checks.integer("memory_bytes", self.memory_bytes, 1)
        _checks.positive("bandwidth", self.bandwidth, RangeError)
        if self.flops is not None:
            _checks.positive("flops", self.flops, RangeError)
        _checks.one_of("backend", self.backend, ("cpu", "gpu", "tpu"))


Spec = TypeVar("Spec", ModelSpec, DeviceSpec)


class Table(Mapping[str, Spec]):
    """Specs by name. Case, underscores, an organisation before a slash and the suffix -hf do not matter.

    Raises:
        UnknownNameError: (on look-up) a name that is not there; the closest ones are named first.
    """

    def __init__(self, kind: str, specs: list[Spec], aliases: Mapping[str, str]):
        self._kind = kind
        self._specs = {spec.name: spec for spec in specs}
        self._aliases = dict(aliases)

    def __getitem__(self, name: str) -> Spec:
        if not isinstance(name, str):
            raise DTypeError(f"a {self._kind} is known by its name, got {name!r}.")
        plain = _plain(name)
        plain = self._aliases.get(plain, plain)
        if plain not in self._specs:
            known = list(self._specs)
            close = difflib.get_close_matches(plain, known, n=6, cutoff=0.5)
            rest = [other for other in known if other not in close]
            raise UnknownNameError(f"unknown {self._kind} {name!r}; the known ones are {', '.join([*close, *rest])}.")
        return self._specs[plain]

    def __iter__(self) -> Iterator[str]:
        return iter(self._specs)

    def __len__(self) -> int:
        return len(self._specs)

    def __repr__(self) -> str:
        return f"<{len(self)} {self._kind}s: {', '.join(self)}>"


def _plain(name: str) -> str:
    name = name.strip().lower().replace("_", "-").replace(" ", "-").rsplit("/", 1)[-1]
    return re.sub(r"-(hf|base)$", "", name)
