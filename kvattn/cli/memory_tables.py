"""What ``kvattn memory`` prints of models, devices, plans and levers."""

from typing import Any

from rich.console import RenderableType
from rich.table import Table

from kvattn.cli import show
from kvattn.memory import DEVICES, MODELS, Lever, ModelSpec, Plan, bytes_per_token, cache_bytes


def everything() -> list[RenderableType]:
    """Every model with its bytes per token, every device."""
    models = show.columns(["model", "layers", "heads", "on", "of", "window", "params", "cache/token"])
    for m in MODELS.values():
        per_token = bytes_of_token(m)
        each = [sorted({str(pair[i]) for pair in m.heads}, key=int) for i in (0, 1)]
        heads = (str(m.num_heads), *(", ".join(of) for of in each))
        params = f"{m.num_params / 1e9:.3g} B" if m.num_params < 1e12 else f"{m.num_params / 1e12:.3g} T"
        models.add_row(m.name, str(m.num_layers), *heads, windows(m), params, f"{per_token / 1024:,.0f} KiB")
    devices = show.columns(["device", "memory", "GB/s", "TFLOP/s", "source"], left=(0, 4))
    for d in DEVICES.values():
        flops = "" if d.flops is None else f"{d.flops / 1e12:,.4g}"
        devices.add_row(d.name, show.size(d.memory_bytes), f"{d.bandwidth / 1e9:,.0f}", flops, d.source)
    hint = "heads on key/value heads of a dimension; cache of a token in bfloat16, all layers."
    return [models, hint, "", devices, "", "What fits, how fast: kvattn memory --model NAME --device NAME"]


def bytes_of_token(spec: ModelSpec) -> int:
    """Bytes of a token in all layers of a model, in bfloat16."""
    values = {"value_head_dim": spec.value_head_dim, "values_in_keys": spec.values_in_keys}
    return sum(bytes_per_token(1, *spec.heads[layer], **values) for layer in spec.cache_layers)


def windows(spec: ModelSpec) -> str:
    """Its window; "4096, half" and the like where some layers have one."""
    own = [spec.layer_windows[i] for i in spec.cache_layers]
    sizes = {w for w in own if w is not None}
    if not sizes:
        return ""
    having = sum(w is not None for w in own)
    text = ", ".join(map(str, sorted(sizes)))
    return text if having == len(own) else f"{text} in {having}"


def sizes(p: Plan) -> list[RenderableType]:
    """Model, weights, bytes per token: what no device is needed for."""
    m = p.model
    shapes = dict.fromkeys(m.heads)
    heads = " or ".join(f"{kv_heads} key/value head{'s' * (kv_heads > 1)} of {size}" for kv_heads, size in shapes)
    heads = f"{m.num_heads} query heads on {heads}"
    heads += f", whose first {m.value_dim} numbers are its value" * m.values_in_keys
    per_token = p.bytes_per_token
    binary = f"{per_token / 2**20:.3f} MiB" if per_token >= 2**20 / 10 else f"{per_token / 2**10:.4g} KiB"
    how = [p.dtype if p.codec is None else str(p.codec)]
    how += [] if p.policy is None else [str(p.policy)]
    how += [] if p.page_size is None else [f"pages of {p.page_size}"]
    how += [] if p.prefill_chunk == 1 else [f"prompts {p.prefill_chunk} tokens at a time"]
    about = "about " * m.cache_is_estimate
    params = f"{'about ' * m.is_estimate}{m.num_params:,} parameters in {p.weight_dtype}"
    if (stored := m.params_in(p.weight_dtype)) < m.num_params:
        params += f" ({stored:,} of them, the others in bfloat16)"
    own = m.num_cache_layers
    layers = "all layers" if own == m.num_layers else f"the {own} of {m.num_layers} layers that keep keys and values"
    rows = [
        ("model", f"{m.name}: {m.num_layers} layers, {heads}"),
        ("weights", f"{show.size(p.weight_bytes)}: {params}"),
        ("cache", f"{about}{per_token:,} bytes per token in {layers} ({binary}): {', '.join(how)}"),
    ]
    if seen := windows(m):
        rows.insert(1, ("window", f"{seen} of {m.num_cache_layers} layers" if " in " in seen else seen))
    if m.num_experts is not None:
        active = f"{m.experts_per_token} of {m.num_experts} experts per token: {m.active_params / 1e9:.3g} B parameters"
        rows.insert(-1, ("active", active))
    return [show.pairs(rows)]


def summary(p: Plan) -> list[RenderableType]:
    """`sizes`, and what a device makes of it."""
    d, many = p.device, p.num_devices * p.pipeline_stages
    flops = "" if d.flops is None else f", {d.flops / 1e12:,.4g} TFLOP/s"
    rows = [("device", f"{d.name}: {show.size(d.memory_bytes)}, {d.bandwidth / 1e9:,.0f} GB/s{flops}")]
    if many > 1:
        stages = "" if p.pipeline_stages == 1 else f", {p.pipeline_stages} stages of layers"
        divided = f"cache by {p.by}" if p.num_devices > 1 else "each holding layers of its own"
        held = show.size(p.device_weight_bytes)
        rows.append(("devices", f"{many}, {divided}{stages}; weights on each: {held}"))
    if p.free_bytes == 0:
        least = p.device_weight_bytes + p.reserved_bytes - d.memory_bytes
        rows.append(("room", f"none: the weights exceed the memory by {show.size(least)}"))
    else:
        each = " on each device" if many > 1 else ""
        rows.append(("room", f"{show.size(p.free_bytes)} for caches{each}: {p.max_tokens:,} tokens"))
    if p.max_length != 0:
        n = p.batch_size or 1
        most = "any length" if p.max_length is None else f"up to {p.max_length:,} tokens"
        rows.append(("longest", f"{n} sequence{'s' * (n > 1)} of {most}{'' if n == 1 else ' each'}"))
    n = p.batch_size or 1
    if p.crossover_length is not None:
        what = "one sequence" if n == 1 else f"{n} sequences"
        rows.append(("balance", f"the cache of {what} outweighs the weights from {p.crossover_length:,} tokens on"))
    else:
        rows.append(("balance", "the cache never outweighs the weights: it stops growing"))
    return [*sizes(p), show.pairs(rows)]


def by_length(plans: list[Plan], with_device: bool) -> Table:
    """One row per length."""
    batch = plans[0].batch_size or 1
    if not with_device:
        table = show.columns(["tokens", "cache of one", f"of {batch}" if batch > 1 else "of 32"], left=())
        for p in plans:
            one = one_sequence(p)
            table.add_row(f"{p.length:,}", show.size(one), show.size((batch if batch > 1 else 32) * one))
        return table
    names = ["tokens", "cache", "ms/step", "tokens/s", "prefill", "most fit", "ms/step", "tokens/s"]
    table = show.columns(names, left=())
    table.title = f"Batch of {batch}, then the largest that fits (times are floors)"
    for p in plans:
        fits = p.max_batch and p.max_batch >= batch
        times = (show.milliseconds(p.step_seconds), f"{p.tokens_per_second:,.0f}") if fits else ("", "")
        prefill = "" if p.prefill_seconds is None or not fits else show.duration(p.prefill_seconds)
        full = p.changed(batch_size=p.max_batch) if p.max_batch else None
        most = ("", "") if full is None else (show.milliseconds(full.step_seconds), f"{full.tokens_per_second:,.0f}")
        cache = "" if p.cache_bytes is None else show.size(p.cache_bytes)
        table.add_row(f"{p.length:,}", cache, *times, prefill, f"{p.max_batch:,}", *most)
    return table


def by_lever(p: Plan, pulled: list[Lever]) -> Table:
    """One row per lever, best first."""
    table = show.columns(["one change", "cache", "most fit", "gain", "ms/step", "outputs"], left=(0, 5))
    batch = p.batch_size or 1
    table.title = f"At {p.length:,} tokens, best first; ms/step at a batch of {batch}"
    for lever in pulled:
        most = lever.plan.max_batch
        if p.free_bytes == 0 and not most:
            continue  # nothing fits with it either
        gain = "" if lever.gain == float("inf") else f"{lever.gain:,.1f}x"
        step = show.milliseconds(lever.plan.step_seconds)
        table.add_row(lever.name, f"{100 * lever.cache_ratio:.0f} %", f"{most:,}", gain, step, lever.outputs)
    return table


def notes(p: Plan, with_device: bool = True) -> list[str]:
    """What one should know besides."""
    found = [f"Note: {note}." for note in p.notes]
    if with_device and p.length and p.model.max_length and p.length > p.model.max_length:
        found.append(f"Note: {p.model.name} was trained for {p.model.max_length:,} tokens.")
    if with_device and p.free_bytes == 0:
        found.append("Note: nothing fits; more devices or fewer bits of weights make room.")
    return ["", *found] if found else []


def one_sequence(p: Plan) -> int:
    """Bytes of the caches of one sequence, on one device, wherever they lie."""
    assert p.length is not None
    names = ("policy", "codec", "dtype", "page_size", "prefill_chunk")
    options: dict[str, Any] = {name: getattr(p, name) for name in names}
    return cache_bytes(p.model, 1, p.length, backend=p.device.backend, **options)
