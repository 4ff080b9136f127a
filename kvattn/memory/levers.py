"""Levers: what one change at a time would do to a plan, best first."""

import dataclasses
import math
from typing import Any

from kvattn import codecs, policies
from kvattn.errors import KVAttnError
from kvattn.families.settings import Value
from kvattn.memory.plan import Plan
from kvattn.memory.specs import ModelSpec

SAME, ROUNDED, FEWER, OTHER = "the same", "rounded", "fewer tokens", "retrained"
"""What becomes of a model's outputs: nothing; cache or weights are rounded; it attends to fewer tokens; it is
converted and has to be trained on."""

type _Change = tuple[str, str, dict[str, Any]]
"""A name, what becomes of the outputs, and the arguments of `plan` that change."""

DEFAULT_LENGTH = 4096
"""Tokens per sequence where neither the plan nor the model says."""

PAGE_SIZE = 16
"""Tokens of a page, unless the codec encodes more together."""

_OF_PLAN = (
    "bytes_per_token", "device_cache_bytes", "max_batch", "max_length", "step_seconds", "tokens_per_second",
)  # fmt: skip
"""What JSON says of the plan with it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lever:
    """One change, and the plan with it.

    Attributes:
        name: the change.
        outputs: "the same", "rounded", "fewer tokens" or "retrained".
        gain: sequences that fit with it over sequences that fit without; infinity where none did.
        cache_ratio: the caches' bytes on a device with it over those without.
        plan: everything else.
    """

    name: str
    outputs: str
    gain: float
    cache_ratio: float
    plan: Plan

    def to_json(self) -> dict[str, Value]:
        """As JSON has it (an infinite gain is null)."""
        own = {name: getattr(self, name) for name in ("name", "outputs", "gain", "cache_ratio")}
        own |= {"gain": self.gain if math.isfinite(self.gain) else None}
        return own | {name: getattr(self.plan, name) for name in _OF_PLAN}


def levers(of: Plan) -> list[Lever]:
    """What each lever alone would change, the one that makes room for most sequences first.

    Those that the plan has pulled already, or that do not go with it, are left out. Without a length, sequences are
    taken to be as long as the model was trained for (4096 if that is not known); pages, for sequences that are half
    full on average unless `mean_length` says otherwise.

    Args:
        of: the plan to start from.
    """
    length = of.length or of.model.max_length or DEFAULT_LENGTH
    base = of.changed(length=length)
    had = _room(base)
    found = []
    for name, outputs, change in _changes(base, length):
        try:
            changed = base.changed(**change)
        except KVAttnError:
            continue  # does not go with the policy, codec or pages of the plan
        if changed.mean_length != base.mean_length:  # what is assumed to count pages is not assumed of the step
            times = ("step_seconds", "tokens_per_second")
            changed = dataclasses.replace(changed, **{name: getattr(base, name) for name in times})
        room = _room(changed)
        ratio = _bytes(changed) / _bytes(base)
        if room <= had and ratio >= 1:
            continue
        found.append(
            Lever(
                name=name,
                outputs=outputs,
                gain=room / had if had else math.inf,
                cache_ratio=ratio,
                plan=changed,
            )
        )
    return sorted(found, key=lambda lever: (-_room(lever.plan), lever.plan.step_seconds))


def _bytes(p: Plan) -> int:
    assert p.device_cache_bytes is not None  # a plan with a length has it
    return p.device_cache_bytes


def _room(p: Plan) -> float:
    """Sequences that fit, fractions of one included, so that levers differ where none or one does."""
    return p.free_bytes / (_bytes(p) / (p.batch_size or 1))


def _changes(base: Plan, length: int) -> list[_Change]:
    """Every change that goes with the plan."""
    model, keeps_all = base.model, base.policy is None or base.policy.in_order
    changes: list[_Change] = []
    fewer = (k for k in (8, 1) if k < model.num_kv_heads and model.num_heads % k == 0 and model.layer_heads is None)
    for heads in dict.fromkeys(fewer):
        kind = "MQA, 1 key/value head" if heads == 1 else f"GQA, {heads} key/value heads"
        changes.append((kind, OTHER, {"model": with_kv_heads(model, heads)}))

    if keeps_all:
        for entry in policies.registered():
            changes += [(label, FEWER, {"policy": policy}) for label, policy in entry.levers(length)]
    if base.codec is None:
        for entry in codecs.registered():
            changes += [(label, ROUNDED, {"codec": codec}) for label, codec in entry.levers(length)]
    if base.weight_dtype in ("float32", "bfloat16", "float16"):
        changes += [(f"weights in {name}", ROUNDED, {"weight_dtype": name}) for name in ("int8", "int4")]
    if base.page_size is None:
        mean = base.mean_length or max(length // 2, 1)
        size = (base.codec and base.codec.rows) or PAGE_SIZE
        share = f"{100 * mean / length:.0f} % full"
        changes.append((f"pages of {size}, sequences {share}", SAME, {"page_size": size, "mean_length": mean}))
    for more in (2, 8):
        n = base.num_devices * more
        changes.append((f"{n} devices, by heads", SAME, {"num_devices": n, "by": "heads"}))
        if model.num_kv_heads % n:
            changes.append((f"{n} devices, by batch", SAME, {"num_devices": n, "by": "batch"}))
            changes.append((f"{n} devices, by sequence", SAME, {"num_devices": n, "by": "sequence"}))
    return changes


def with_kv_heads(model: ModelSpec, num_kv_heads: int) -> ModelSpec:
    """The model converted to fewer key/value heads (Ainslie et al., arXiv:2305.13245).

    Its key and value projections shrink too, where the spec knows D.
    """
    saved = 0
    if model.model_dim is not None:
        gone = model.num_kv_heads - num_kv_heads
        saved = model.num_cache_layers * model.model_dim * gone * (model.head_dim + model.value_dim)
    active, quantized = model.num_active_params, model.num_quantized_params
    return dataclasses.replace(
        model,
        num_kv_heads=num_kv_heads,
        num_params=model.num_params - saved,
        num_active_params=None if active is None else active - saved,
        num_quantized_params=None if quantized is None else min(quantized, model.num_params - saved),
    )
