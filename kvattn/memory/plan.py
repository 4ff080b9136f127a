"""`plan`: what fits on a device, how fast a decode step can be at best, and where the cache outweighs the weights."""

import dataclasses
import math
import numbers
from collections.abc import Callable
from typing import Any

from kvattn import _checks
from kvattn.codecs import Codec
from kvattn.errors import ConfigError, DTypeError, RangeError
from kvattn.memory import formula
from kvattn.memory.devices import DEVICES
from kvattn.memory.dtypes import name_of
from kvattn.memory.models import MODELS
from kvattn.memory.placement import place
from kvattn.memory.specs import DeviceSpec, ModelSpec
from kvattn.policies import Policy

ESTIMATED = "the parameters of {} are an estimate, without norms and biases: give num_params if they are known"
CACHE_ESTIMATED = "the cache of {} is an estimate: plan it with a ModelSpec if you know its layers"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What `plan` found.

    Whole numbers of bytes are bytes; "per device" is the fullest one; GB are 10^9 where they are printed.

    Attributes:
        model: which.
        device: on what.
        batch_size: B as given.
        length: tokens of the longest sequence, as given.
        mean_length: tokens a sequence has on average, as given.
        policy: which tokens are kept; None: all, in layers with a window those within it.
        codec: in how many bits; None: as they are.
        dtype: what tokens are before they are encoded.
        weight_dtype: what the weights are stored in.
        num_devices: devices that share every layer.
        pipeline_stages: stages of layers besides; num_devices * pipeline_stages devices in all.
        by: how the cache is divided: "heads", "batch", "sequence".
        memory_fraction: share of a device's memory that caches may take at most.
        reserved_bytes: per device, for neither weights nor caches.
        page_size: tokens of a page; None: contiguous.
        weight_bytes: all weights.
        device_weight_bytes: per device.
        bytes_per_token: what one more token takes in all layers that keep keys and values, one copy, scales and policy
            state included.
        free_bytes: per device, for caches.
        cache_bytes: one copy of the caches of `batch_size` (1 if None) sequences of `length` tokens; None without one.
        device_cache_bytes: of them, per device, copies included.
        fits: whether weights and these caches fit; without a length, whether the weights do.
        max_tokens: tokens that fit on all devices together, however they are spread over sequences (for a window:
            tokens kept). free_bytes over bytes per token: nothing is lost to rows or pages that are not full.
        max_batch: most sequences of `length` tokens; None without a length.
        max_length: most tokens of each of `batch_size` (1 if None) sequences; None: no bound, the cache does not grow.
        unused_share: share of the slots set aside that `mean_length` (or `length`) leaves empty; None without a length.
        step_seconds: the floor of a decode step: bytes of weights and kept tokens over bandwidth, at `length` (none:
            an empty cache) and `batch_size` (1 if None). Exchange between devices and arithmetic cost more.
        tokens_per_second: `batch_size` over it.
        prefill_flops: floating-point operations of reading the prompts: 2 per parameter and token; None without a
            length.
        prefill_attention_flops: those of attention besides, quadratic in the length where there is no window.
        prefill_seconds: both over the devices' peak: the floor of the prefill. None where that is not known.
        crossover_length: length from which on the caches of `batch_size` (1 if None) sequences weigh as much as the
            weights; None: never.
        notes: what one should know besides.
    """

    model: ModelSpec
    device: DeviceSpec
    batch_size: int | None
    length: int | None
    mean_length: int | None
    policy: Policy | None
    codec: Codec | None
    dtype: str
    weight_dtype: str
    num_devices: int
    pipeline_stages: int
    by: str
    memory_fraction: float
    reserved_bytes: int
    page_size: int | None
    weight_bytes: int
    device_weight_bytes: int
    bytes_per_token: int
    free_bytes: int
    cache_bytes: int | None
    device_cache_bytes: int | None
    fits: bool
    max_tokens: int
    max_batch: int | None
    max_length: int | None
    unused_share: float | None
    step_seconds: float
    tokens_per_second: float
    prefill_flops: int | None
    prefill_attention_flops: int | None
    prefill_seconds: float | None
    crossover_length: int | None
    notes: tuple[str, ...]

    def changed(self, **changes: Any) -> "Plan":
        """The plan with other arguments of `plan`."""
        names = (
            "batch_size length mean_length policy codec dtype weight_dtype num_devices pipeline_stages by "
            "memory_fraction reserved_bytes page_size"
        )
        settings: dict[str, Any] = {name: getattr(self, name) for name in names.split()}
        settings |= changes
        return plan(settings.pop("model", self.model), settings.pop("device", self.device), **settings)

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON has it; policies and codecs as they print."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        fields |= {"model": dataclasses.asdict(self.model), "device": dataclasses.asdict(self.device)}
        fields |= {name: None if fields[name] is None else repr(fields[name]) for name in ("policy", "codec")}
        return fields | {"notes": list(self.notes)}


def plan(
    model: str | ModelSpec,
    device: str | DeviceSpec,
    *,
    batch_size: int | None = None,
    length: int | None = None,
    policy: Policy | None = None,
    codec: Codec | None = None,
    weight_dtype: Any = None,
    num_devices: int = 1,
    by: str = "auto",
    memory_fraction: float = 1.0,
    dtype: Any = "bfloat16",
    pipeline_stages: int = 1,
    reserved_bytes: int = 0,
    page_size: int | None = None,
    mean_length: int | None = None,
) -> Plan:
    """What fits, and how fast a decode step can be at best.

    Args:
        model: a name of `kvattn.memory.MODELS`, or a spec (`kvattn.memory.from_config` reads one).
        device: a name of `kvattn.memory.DEVICES`, or a spec.
        batch_size: B, sequences at a time. None: answers that need one are for 1.
        length: tokens of the longest sequence: prompt and what is generated. None: answers that need one are None.
        policy: which tokens are kept. None: all, in layers with a window those within it.
        codec: in how many bits. None: as they are, in `dtype`.
        weight_dtype: what the weights are stored in, by name: "float32", "bfloat16", "int8", "int4", "mxfp4", ... None:
            what the model's config.json says its checkpoint is quantised to; bfloat16 where it is not.
        num_devices: devices that share every layer (tensor parallel).
        by: how the cache is divided over them: "heads", "batch", "sequence", or "auto" (`kvattn.sharding.choose`).
        memory_fraction: share of each device's memory that caches may take at most. What weights and `reserved_bytes`
            leave bounds them in any case.
        dtype: what tokens are before they are encoded: float32, bfloat16, float16.
        pipeline_stages: stages of layers, each on `num_devices` devices of its own.
        reserved_bytes: per device: activations, the runtime, others. (A decode step's activations are small; those of a
            long prompt are not.)
        page_size: tokens of a page, for pages of a shared pool instead of contiguous caches.
        mean_length: tokens a sequence has on average, at most `length`: what pages are needed for, and what a step
            reads. Contiguous caches are as long as the longest in any case. None: `length`.

    Raises:
        UnknownNameError: a model or device that the tables do not have.
        ConfigError, DTypeError, RangeError: settings that cannot be.
        UnsupportedError: a policy, a codec and pages that do not go together.

    Example:
        >>> import kvattn
        >>> p = kvattn.memory.plan("llama-2-7b", "a10")
        >>> p.max_tokens, round(1000 * p.step_seconds, 1)  # what fits beside the weights; ms, with an empty cache
        (20071, 22.5)
        >>> kvattn.memory.plan("llama-2-7b", "a10", length=2048, codec=kvattn.Int8()).max_batch
        19
    """
    model = MODELS[model] if isinstance(model, str) else model
    device = DEVICES[device] if isinstance(device, str) else device
    if not isinstance(model, ModelSpec) or not isinstance(device, DeviceSpec):
        raise ConfigError(f"model and device must be names or specs, got {model!r} and {device!r}.")
    for name, value in (("batch_size", batch_size), ("length", length), ("mean_length", mean_length)):
        if value is not None and _checks.integer(name, value, 1, RangeError) > _checks.INT32_MAX:
            raise RangeError(f"{name} must fit in int32, got {value}.")
    if mean_length is not None and (length is None or mean_length > length):
        raise RangeError(f"mean_length ({mean_length}) must be at most length, got length {length}.")
    _checks.integer("reserved_bytes", reserved_bytes, 0, RangeError)
    memory_fraction = fraction("memory_fraction", memory_fraction)
    weight_dtype = model.weight_dtype or "bfloat16" if weight_dtype is None else weight_dtype
    weight_dtype, dtype = name_of("weight_dtype", weight_dtype), name_of("dtype", dtype)
    if page_size is not None:
        _checks.integer("page_size", page_size, 1)

    placement = place(model, batch_size, num_devices, pipeline_stages, by)
    options = {"policy": policy, "codec": codec, "dtype": dtype, "backend": device.backend}

    def kinds_of(**more: Any) -> dict[formula.Layer, int]:
        kinds = formula.layers(model, **options, **more)
        return kinds if page_size is None else formula.paged(kinds)

    whole = kinds_of()
    stages, readers = [], []
    for layers in placement.stage_layers(model):
        part = {"num_kv_heads": placement.kv_heads(model), "only": layers}
        stages.append(kinds_of(**part))
        readers.append(kinds_of(**part, reading=True))

    def row(kinds: dict[formula.Layer, int], tokens: int, held: int | None = None, parts: int = 1) -> int:
        """Bytes of a sequence of up to `tokens` tokens, of which it has `held` (pages only)."""
        if page_size is None:
            return sum(n * layer.row_bytes(tokens, parts) for layer, n in kinds.items())
        pages, most = (formula.pages_for(t, page_size) for t in (held or tokens, tokens))
        return sum(n * layer.paged_row_bytes(pages, page_size, most, parts) for layer, n in kinds.items())

    def device_row(tokens: int, held: int | None = None) -> int:
        return max(row(kinds, tokens, held, placement.parts) for kinds in stages)

    # Memory.
    weight_bytes = model.weight_bytes(weight_dtype)
    of_stage = -(-model.num_layers // pipeline_stages) / model.num_layers
    device_weight_bytes = math.ceil(weight_bytes * of_stage / num_devices)
    left = device.memory_bytes - reserved_bytes - device_weight_bytes
    free_bytes = max(min(int(memory_fraction * device.memory_bytes), left), 0)
    rows = placement.rows(batch_size or 1)
    per_token = max(sum(n * layer.part_bytes(placement.parts) for layer, n in kinds.items()) for kinds in stages)
    cache_bytes = device_cache_bytes = max_batch = unused = None
    if length is not None:
        cache_bytes = (batch_size or 1) * row(whole, length, mean_length)
        device_cache_bytes = rows * device_row(length, mean_length)
        max_batch = free_bytes // device_row(length, mean_length) * placement.groups
        unused = _unused(whole, length, mean_length or length, page_size)
    fits = left >= 0 and (device_cache_bytes or 0) <= free_bytes

    # Time.
    present = mean_length or length or 0
    read = max(sum(n * layer.read_bytes(present, placement.parts) for layer, n in kinds.items()) for kinds in readers)
    touched = model.touched_bytes(batch_size or 1, weight_dtype) * of_stage / num_devices
    step = pipeline_stages * (touched + rows * read) / device.bandwidth
    flops = attention = prefill = None
    if length is not None:
        tokens = (batch_size or 1) * length
        flops = 2 * model.active_params * tokens
        attention = (batch_size or 1) * sum(
            4 * model.num_heads * model.head_dim * _seen(length, window)
            for window, source in zip(model.layer_windows, model.layer_sources, strict=True)
            if source is not None
        )
        if device.flops is not None:
            prefill = (flops + attention) / (num_devices * pipeline_stages * device.flops)

    return Plan(
        model=model,
        device=device,
        batch_size=batch_size,
        length=length,
        mean_length=mean_length,
        policy=policy,
        codec=codec,
        dtype=dtype,
        weight_dtype=weight_dtype,
        num_devices=num_devices,
        pipeline_stages=pipeline_stages,
        by=placement.by,
        memory_fraction=memory_fraction,
        reserved_bytes=reserved_bytes,
        page_size=page_size,
        weight_bytes=weight_bytes,
        device_weight_bytes=device_weight_bytes,
        bytes_per_token=math.ceil(sum(n * layer.token_bytes for layer, n in whole.items())),
        free_bytes=free_bytes,
        cache_bytes=cache_bytes,
        device_cache_bytes=device_cache_bytes,
        fits=fits,
        max_tokens=int(free_bytes / per_token) * placement.groups,
        max_batch=max_batch,
        max_length=_longest(lambda tokens: rows * device_row(tokens) <= free_bytes),
        unused_share=unused,
        step_seconds=step,
        tokens_per_second=(batch_size or 1) / step,
        prefill_flops=flops,
        prefill_attention_flops=attention,
        prefill_seconds=prefill,
        crossover_length=_crossover(lambda tokens: (batch_size or 1) * row(whole, tokens) < weight_bytes),
        notes=placement.notes + about(model),
    )


def about(model: ModelSpec) -> tuple[str, ...]:
    """What is not exact about a model, whatever the plan."""
    cache = (CACHE_ESTIMATED.format(model.name),) if model.cache_is_estimate else ()
    params = (ESTIMATED.format(model.name),) if model.is_estimate else ()
    return cache + params + model.notes


def fraction(name: str, value: Any) -> float:
    """Checks a share, above 0 and at most 1."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise DTypeError(f"{name} must be a number, got {value!r}.")
    if not 0 < float(value) <= 1:
        raise RangeError(f"{name} must lie in (0, 1], got {value}.")
    return float(value)


def _longest(fits: Callable[[int], bool]) -> int | None:
    """The largest length that fits, 0 if none does; None if all do."""
    if fits(_checks.INT32_MAX):
        return None
    low, high = 0, _checks.INT32_MAX
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _crossover(lighter: Callable[[int], bool]) -> int | None:
    """The first length at which it is no longer lighter; None if it always is."""
    last = _longest(lighter)
    return None if last is None else last + 1


def _seen(length: int, window: int | None) -> int:
    """Pairs of a query and a key it sees: the sum of min(t, window) for t = 1 ... length."""
    w = length if window is None else min(window, length)
    return w * (w + 1) // 2 + (length - w) * w


def _unused(kinds: dict[formula.Layer, int], length: int, held: int, page_size: int | None) -> float:
    """Share of the slots set aside that hold no token."""
    slots = used = 0
    for layer, count in kinds.items():
        most = layer.num_slots(length) if page_size is None else formula.pages_for(held, page_size) * page_size
        slots += count * most
        used += count * min(held, most)
    return 1 - used / slots
