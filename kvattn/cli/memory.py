"""``kvattn memory``: what fits, how fast a step can be, which lever helps most."""

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any

import typer

from kvattn.cli import memory_tables as tables
from kvattn.cli import parse, show
from kvattn.errors import ConfigError
from kvattn.families.settings import Value
from kvattn.memory import DEVICES, MODELS, Lever, ModelSpec, Plan, from_config, levers, plan
from kvattn.memory.levers import DEFAULT_LENGTH


@show.reports_errors
def memory(
    model: Annotated[str | None, parse.option("NAME", "A model's name; without one, all are listed.")] = None,
    config: Annotated[
        Path | None, parse.option("FILE", "A HuggingFace config.json, or the folder that has one.")
    ] = None,
    device: Annotated[str | None, parse.option("NAME", "A device's name, such as a10, h100, tpu-v5e.")] = None,
    batch: Annotated[str | None, parse.option("INT", "Sequences at a time.")] = None,
    length: Annotated[str | None, parse.option("INT", "Tokens of the longest sequence.")] = None,
    mean_length: Annotated[str | None, parse.option("INT", "Tokens on average.")] = None,
    policy: Annotated[
        str | None,
        parse.option("POLICY", "Which tokens are kept: full, window:4096, streaming:4,1020, h2o:512,512, ..."),
    ] = None,
    codec: Annotated[
        str | None, parse.option("CODEC", "In how many bits: bfloat16, float32, int8, float8, int4:64, kivi:2, ...")
    ] = None,
    weight_dtype: Annotated[
        str | None, parse.option("DTYPE", "Of the weights: bfloat16, int8, int4, mxfp4, ...; else as --config says.")
    ] = None,
    page_size: Annotated[str | None, parse.option("INT", "Tokens of a page of a shared pool.")] = None,
    prefill_chunk: Annotated[str, parse.option("INT", "In pages: tokens of a prompt read at a time.")] = "1",
    tensor_parallel: Annotated[
        str, typer.Option("--tensor-parallel", "--devices", metavar="INT", help="Devices that share every layer.")
    ] = "1",
    by: Annotated[str, parse.option("WAY", "How they divide the cache: auto, heads, batch, sequence.")] = "auto",
    pipeline_parallel: Annotated[str, parse.option("INT", "Stages of layers besides.")] = "1",
    reserve: Annotated[str, parse.option("BYTES", "Kept free on a device: 2GB, 512MiB.")] = "0",
    memory_fraction: Annotated[str, parse.option("SHARE", "Share of a device that caches may take at most.")] = "1",
    num_params: Annotated[str | None, parse.option("INT", "Parameters, where --config cannot be counted.")] = None,
    plot: Annotated[Path | None, parse.option("FILE", "Draw cache size against length, a line per lever.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Everything as JSON.")] = False,
) -> None:
    """How large is my cache, what fits, and which lever helps most?

    Without a model: every model and device there is. Without a device: sizes only.
    """
    spec = _model(model, config, parse.count("num-params", num_params))
    chosen, dtype = parse.codec(codec)
    settings: dict[str, Any] = {
        "batch_size": parse.count("batch", batch),
        "length": parse.count("length", length),
        "mean_length": parse.count("mean-length", mean_length),
        "policy": parse.policy(policy),
        "codec": chosen,
        "dtype": dtype or "bfloat16",
        "weight_dtype": weight_dtype,
        "page_size": parse.count("page-size", page_size),
        "prefill_chunk": parse.required("prefill-chunk", prefill_chunk),
        "num_devices": parse.required("tensor-parallel", tensor_parallel),
        "by": by,
        "pipeline_stages": parse.required("pipeline-parallel", pipeline_parallel),
        "reserved_bytes": parse.num_bytes("reserve", reserve),
        "memory_fraction": parse.number("memory-fraction", memory_fraction),
    }
    if spec is None:
        if as_json:
            typer.echo(json.dumps({"models": _models_json(), "devices": _devices_json()}, indent=1))
        else:
            show.display(*tables.everything())
        return
    if device is None:
        # Sizes do not depend on the device but for how rows are rounded; any will do.
        found = plan(spec, "h100", **settings)
    else:
        found = plan(spec, device, **settings)
    lengths = [found.length] if found.length else usual_lengths(found)
    plans = [found.changed(length=n) for n in lengths]
    pulled = levers(plans[-1]) if device is not None or plot is not None else []
    if plot is not None:
        from kvattn.cli.plot import draw

        draw(plans[-1], pulled, plot, with_limit=device is not None)
    if as_json:
        typer.echo(json.dumps(_json(found, plans, pulled, device is not None), indent=1))
        return
    parts = tables.sizes(found) if device is None else tables.summary(found)
    parts += ["", tables.by_length(plans, with_device=device is not None)]
    if device is not None:
        parts += ["", tables.by_lever(plans[-1], pulled)]
    parts += tables.notes(found, with_device=device is not None)
    show.display(*parts)
    if plot is not None:
        typer.echo(f"drawn: {plot}")


def _model(name: str | None, config: Path | None, num_params: int | None) -> ModelSpec | None:
    if name is not None and config is not None:
        raise ConfigError("give --model or --config, not both.")
    if num_params is not None and config is None:
        raise ConfigError("--num-params goes with --config.")
    if config is not None:
        return from_config(config, num_params=num_params)
    return None if name is None else MODELS[name]


def usual_lengths(p: Plan) -> list[int]:
    """Up to six lengths by powers of two, ending with what the model was trained for."""
    last = p.model.max_length or DEFAULT_LENGTH
    return [n for n in (last >> shift for shift in (5, 4, 3, 2, 1, 0)) if n >= 1]


_BY_LENGTH = (
    "length", "cache_bytes", "device_cache_bytes", "max_batch", "step_seconds", "tokens_per_second", "prefill_seconds",
)  # fmt: skip
"""What JSON says of a plan at every length."""


def _json(found: Plan, plans: list[Plan], pulled: list[Lever], with_device: bool) -> dict[str, Value]:
    if with_device:
        return {
            "plan": found.to_json(),
            "lengths": [{name: getattr(p, name) for name in _BY_LENGTH} for p in plans],
            "levers": [lever.to_json() for lever in pulled],
        }
    return {
        "model": found.to_json()["model"],
        "weight_bytes": found.weight_bytes,
        "bytes_per_token": found.bytes_per_token,
        "notes": list(found.notes),
        "lengths": [{"length": p.length, "cache_bytes": tables.one_sequence(p) * (p.batch_size or 1)} for p in plans],
    }


def _models_json() -> list[dict[str, Value]]:
    return [dataclasses.asdict(m) | {"bytes_per_token": tables.bytes_of_token(m)} for m in MODELS.values()]


def _devices_json() -> list[dict[str, Value]]:
    return [dataclasses.asdict(d) for d in DEVICES.values()]
