"""`plan`: what fits on a device, how fast a decode step can be at best, and where the cache outweighs the weights."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

from jax.typing import DTypeLike

from kvattn import _checks
from kvattn.codecs import Codec
from kvattn.errors import ConfigError
from kvattn.families.settings import Value
from kvattn.memory.caches import Kinds, total
from kvattn.memory.devices import DEVICES
from kvattn.memory.dtypes import name_of
from kvattn.memory.formula import ROW_BYTES
from kvattn.memory.holding import Holding
from kvattn.memory.models import MODELS
from kvattn.memory.scenario import Scenario
from kvattn.memory.specs import DeviceSpec, ModelSpec
from kvattn.policies import Policy

ESTIMATED = "the parameters of {} are an estimate, without norms and biases: give num_params if they are known"
CACHE_ESTIMATED = "the cache of {} is an estimate: plan it with a ModelSpec if you know its layers"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
    """What the weights and caches of a scenario take."""

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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Time:
    """How long a step and the prefill of a scenario take at least."""

    step_seconds: float
    tokens_per_second: float
    prefill_flops: int | None
    prefill_attention_flops: int | None
    prefill_seconds: float | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan(Time, Memory, Scenario):
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
        prefill_chunk: tokens of a prompt that come at a time, in pages.
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

    crossover_length: int | None
    notes: tuple[str, ...]

    def changed(self, **changes: Any) -> "Plan":
        """The plan with other arguments of `plan`."""
        return plan(**{field.name: getattr(self, field.name) for field in dataclasses.fields(Scenario)} | changes)

    def to_json(self) -> dict[str, Value]:
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
    weight_dtype: DTypeLike | None = None,
    num_devices: int = 1,
    by: str = "auto",
    memory_fraction: float = 1.0,
    dtype: DTypeLike = "bfloat16",
    pipeline_stages: int = 1,
    reserved_bytes: int = 0,
    page_size: int | None = None,
    mean_length: int | None = None,
    prefill_chunk: int = 1,
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
        page_size: tokens of a page, for pages of shared pools instead of contiguous caches. Each group of layers has as
            many as its sequences hold at once (`kvattn.cache.pages_at_once`): rings and budgets use theirs again, and
            without a policy layers with a window give back those that it has left.
        mean_length: tokens a sequence has on average, at most `length`: what pages are needed for, and what a step
            reads. Contiguous caches are as long as the longest in any case. None: `length`.
        prefill_chunk: in pages, most tokens of a prompt that come at a time, as `kvattn.serving.Engine` has it. A layer
            with a window gives pages back once those are there, so it holds more; 1: what decoding takes.

    Raises:
        UnknownNameError: a model or device that the tables do not have.
        ConfigError, DTypeError, RangeError: settings that cannot be.
        UnsupportedError: a policy, a codec and a way to divide the cache that do not go together.

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
    if weight_dtype is None:
        weight_dtype = model.weight_dtype or "bfloat16"
    asked = Scenario(
        model=model,
        device=device,
        batch_size=batch_size,
        length=length,
        mean_length=mean_length,
        policy=policy,
        codec=codec,
        dtype=name_of("dtype", dtype),
        weight_dtype=name_of("weight_dtype", weight_dtype),
        num_devices=num_devices,
        pipeline_stages=pipeline_stages,
        by=by,
        memory_fraction=memory_fraction,
        reserved_bytes=reserved_bytes,
        page_size=page_size,
        prefill_chunk=prefill_chunk,
    )
    holding = Holding.of(asked)
    memory, time = _memory(holding), _time(holding)
    outweighed = lambda tokens: (asked.batch_size or 1) * holding.row_bytes(tokens) < memory.weight_bytes
    return Plan(
        **vars(asked),
        **vars(memory),
        **vars(time),
        crossover_length=_crossover(outweighed),
        notes=holding.placement.notes + holding.notes + about(asked.model),
    )


def _memory(holding: Holding) -> Memory:
    asked, placement = holding.scenario, holding.placement
    weight_bytes = asked.model.weight_bytes(asked.weight_dtype)
    device_weight_bytes = math.ceil(placement.of_weights(weight_bytes))
    left = asked.device.memory_bytes - asked.reserved_bytes - device_weight_bytes
    free = max(min(int(asked.memory_fraction * asked.device.memory_bytes), left), 0)
    cache_bytes = device_cache_bytes = max_batch = unused = None
    if asked.length is not None:
        cache_bytes = (asked.batch_size or 1) * holding.row_bytes(asked.length, asked.mean_length)
        of_rows = functools.partial(holding.device_bytes, length=asked.length, held=asked.mean_length)
        device_cache_bytes = of_rows(placement.num_rows)
        most = _largest(lambda rows: of_rows(rows) <= free, free // ROW_BYTES + 1)  # a row takes that at least
        assert most is not None
        max_batch = most * placement.groups
        unused = _unused(holding.whole, asked.length, asked.mean_length or asked.length)
    return Memory(
        weight_bytes=weight_bytes,
        device_weight_bytes=device_weight_bytes,
        bytes_per_token=math.ceil(total(holding.whole, lambda layer: layer.token_bytes)),
        free_bytes=free,
        cache_bytes=cache_bytes,
        device_cache_bytes=device_cache_bytes,
        fits=left >= 0 and (device_cache_bytes or 0) <= free,
        max_tokens=int(free / holding.device_token_bytes()) * placement.groups,
        max_batch=max_batch,
        max_length=_largest(lambda tokens: holding.device_bytes(placement.num_rows, tokens) <= free),
        unused_share=unused,
    )


def _time(holding: Holding) -> Time:
    asked, placement = holding.scenario, holding.placement
    batch = asked.batch_size or 1
    weights = placement.of_weights(asked.model.touched_bytes(batch, asked.weight_dtype))
    caches = placement.num_rows * holding.device_read_bytes(asked.mean_length or asked.length or 0)
    step = asked.pipeline_stages * (weights + caches) / asked.device.bandwidth
    flops = attention = prefill = None
    if asked.length is not None:
        flops = 2 * asked.model.active_params * batch * asked.length
        attention = batch * _attention_flops(asked.model, asked.length)
        if asked.device.flops is not None:
            prefill = (flops + attention) / (asked.num_devices * asked.pipeline_stages * asked.device.flops)
    return Time(
        step_seconds=step,
        tokens_per_second=batch / step,
        prefill_flops=flops,
        prefill_attention_flops=attention,
        prefill_seconds=prefill,
    )


def about(model: ModelSpec) -> tuple[str, ...]:
    """What is not exact about a model, whatever the plan."""
    cache = (CACHE_ESTIMATED.format(model.name),) if model.cache_is_estimate else ()
    params = (ESTIMATED.format(model.name),) if model.is_estimate else ()
    return cache + params + model.notes


def _largest(fits: Callable[[int], bool], bound: int = _checks.INT32_MAX) -> int | None:
    """The largest count up to a bound that fits, 0 if none does; None if all do."""
    if fits(bound):
        return None
    low, high = 0, bound
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _crossover(lighter: Callable[[int], bool]) -> int | None:
    """The first length at which it is no longer lighter; None if it always is."""
    last = _largest(lighter)
    return None if last is None else last + 1


def _attention_flops(model: ModelSpec, length: int) -> int:
    """Of all layers, over one sequence that is read at once: 2 N (H + Hv) per pair of tokens."""
    layers = zip(model.layer_windows, model.layer_sources, model.heads, strict=True)
    value_size = model.value_dim if model.layer_heads is None else 0
    numbers = ((size + (value_size or size)) * _seen(length, window) for window, source, (_, size) in layers
               if source is not None)  # fmt: skip
    return 2 * model.num_heads * sum(numbers)


def _seen(length: int, window: int | None) -> int:
    """Pairs of a query and a key it sees: the sum of min(t, window) for t = 1 ... length."""
    w = length if window is None else min(window, length)
    return w * (w + 1) // 2 + (length - w) * w


def _unused(kinds: Kinds, length: int, held: int) -> float:
    """Share of the slots set aside that hold no token."""
    used = total(kinds, lambda layer: layer.kept(held))
    return 1 - used / total(kinds, lambda layer: layer.num_slots(length, held))
