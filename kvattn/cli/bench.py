"""``kvattn bench`` and ``kvattn tune``: the decode step on this machine."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Annotated

import jax
import jax.numpy as jnp
import typer
from rich.table import Table

from kvattn import measure
from kvattn.cli import bench_engine, parse, show
from kvattn.errors import ConfigError, UnsupportedError
from kvattn.memory import MODELS

Model = Annotated[str | None, parse.option("NAME", "Take the heads of a model of `kvattn memory`.")]
Heads = Annotated[str | None, parse.option("INT", "Query heads (32).")]
KVHeads = Annotated[str | None, parse.option("INT", "Key/value heads (8).")]
HeadDim = Annotated[str | None, parse.option("INT", "Head dim (128).")]
Batch = Annotated[str, parse.option("INT", "Rows.")]
Context = Annotated[str, parse.option("INT", "Tokens in the cache.")]
Window = Annotated[str | None, parse.option("INT", "Keep and attend to the last tokens only.")]
DType = Annotated[str, parse.option("DTYPE", "Of queries and tokens: bfloat16, float16, float32.")]
CodecOption = Annotated[str | None, parse.option("CODEC", "Cache in int8, float8 or int4:64.")]


_OF_A_LAYER = ("model", "heads", "kv_heads", "head_dim", "context", "window", "implementation", "repeats")
_OF_AN_ENGINE = ("checkpoint", "conversations", "turns", "shared", "new", "pages", "page_size")


@show.reports_errors
def bench(
    ctx: typer.Context,
    model: Model = None,
    heads: Heads = None,
    kv_heads: KVHeads = None,
    head_dim: HeadDim = None,
    batch: Batch = "8",
    context: Context = "4096",
    window: Window = None,
    dtype: DType = "bfloat16",
    codec: CodecOption = None,
    implementation: Annotated[
        list[str] | None, parse.option("NAME", "Time this one; may be given several times. Default: the best.")
    ] = None,
    repeats: Annotated[str, parse.option("INT", "Timings; the median counts.")] = "15",
    engine: Annotated[
        bool, typer.Option("--engine", help="Measure an engine instead: conversations, with prefixes kept and without.")
    ] = False,
    checkpoint: Annotated[
        Path | None, parse.option("CHECKPOINT", "Of the engine: as for `kvattn generate`. Default: random weights.")
    ] = None,
    conversations: Annotated[str, parse.option("INT", "Of the engine, at a time.")] = "8",
    turns: Annotated[str, parse.option("INT", "Of each conversation.")] = "3",
    shared: Annotated[str, parse.option("INT", "Tokens that all conversations begin with.")] = "256",
    new: Annotated[str, parse.option("INT", "Tokens of an answer.")] = "24",
    pages: Annotated[str | None, parse.option("INT", "Of the engine's pool. Default: room for all.")] = None,
    page_size: Annotated[str | None, parse.option("INT", "Tokens per page (16, or what kernels take).")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The numbers as JSON.")] = False,
) -> None:
    """Time the decode step of one layer here: bandwidth, and per cent of a copy in the same run. Or a whole engine."""
    sources = {name: ctx.get_parameter_source(name) for name in ctx.params}
    given = {name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"}
    strange = [name for name in (_OF_A_LAYER if engine else _OF_AN_ENGINE) if name in given]
    if strange:
        raise ConfigError(f"--{strange[0].replace('_', '-')} {'does not go' if engine else 'goes'} with --engine.")
    if engine:
        chosen, plain = parse.codec(codec)
        _refuse_dtypes(codec, plain, dtype)
        chat = bench_engine.Chat(
            conversations=parse.required("conversations", conversations),
            turns=parse.required("turns", turns),
            shared=parse.required("shared", shared, 0),
            new=parse.required("new", new),
        )
        settings = bench_engine.Settings(
            num_pages=parse.count("pages", pages),
            page_size=parse.count("page-size", page_size),
            max_batch=parse.required("batch", batch),
            codec=chosen,
        )
        _bench_engine(checkpoint, dtype if "dtype" in given else None, chat, settings, as_json)
        return
    case = _case(_heads(model, heads, kv_heads, head_dim), batch, context, window, dtype, codec)
    times = parse.required("repeats", repeats)
    names: list[str | None] = list(implementation or [None])
    for name in names:
        if name is not None:
            measure.api.candidates(name)  # refuses unknown names before anything is timed
    with show.waiting("measuring ..."):
        results = list(measure.timings(case, names, times))
        copied = measure.copy_bandwidth(max(case.read_bytes, 2**28), times)
    kind = jax.devices()[0].device_kind
    if as_json:
        content = {
            "device": kind,
            "case": dataclasses.asdict(case) | {"dtype": str(case.dtype), "codec": case.codec and repr(case.codec)},
            "read_bytes": case.read_bytes,
            "copy_bandwidth": copied,
            "timings": [dataclasses.asdict(result) for result in results],
        }
        typer.echo(json.dumps(content, indent=1))
        return
    stored = case.codec or case.dtype
    what = (
        f"{kind}: batch {case.batch_size}, {case.num_heads} query heads, {case.num_kv_heads} key/value heads of "
        f"{case.head_dim}, {case.tokens_read} of {case.context} tokens, {stored}: {show.size(case.read_bytes)} of keys "
        "and values"
    )
    reasons = [f"not run: {result.reason}" for result in results if result.reason is not None]
    if names == [None]:
        _, _, fresh = case.inputs()
        reads = measure.reader(jax.eval_shape(fresh), case.num_heads, case.dtype)
        reasons.append(f"best: the cache is read by {reads}")
    legend = (
        f"µs/step: in a compiled loop of {measure.steps_per_call(case.read_bytes)}; µs alone: one step called from "
        f"Python. Medians of {times}. A copy reads and writes {copied / 1e9:,.1f} GB/s. error: the largest difference "
        'from implementation="reference".'
    )
    show.display(what, "", _table(results, copied), "", *reasons, legend)


@show.reports_errors
def tune(
    model: Model = None,
    heads: Heads = None,
    kv_heads: KVHeads = None,
    head_dim: HeadDim = None,
    batch: Batch = "8",
    context: Context = "4096",
    window: Window = None,
    dtype: DType = "bfloat16",
    codec: CodecOption = None,
    repeats: Annotated[str, parse.option("INT", "Calls per measurement.")] = "20",
    save: Annotated[Path | None, parse.option("FILE", "Write the table; kvattn.pallas.tuning.use reads it.")] = None,
) -> None:
    """Measure sizes of the decode kernel for one shape on this GPU or TPU."""
    from kvattn.pallas import tuning

    case = _case(_heads(model, heads, kv_heads, head_dim), batch, context, window, dtype, codec)
    count = parse.required("repeats", repeats)
    if save is not None and not (save.parent.is_dir() and os.access(save.parent, os.W_OK)):
        raise ConfigError(f"--save {save}: {save.parent} is no folder that can be written to.")
    query, _, fresh = case.inputs()
    cache = dataclasses.replace(fresh(), lengths=jnp.full((case.batch_size,), case.context, jnp.int32))
    with show.waiting("measuring ..."):
        table, seconds = tuning.tune(query, cache, mask=case.policy.mask(), repeats=count)
    shown = show.columns(["sizes", "µs", "GB/s"])
    for config, each in sorted(seconds.items(), key=lambda item: item[1]):
        shown.add_row(str(config), f"{each * 1e6:,.1f}", f"{case.read_bytes / each / 1e9:,.1f}")
    lines = [f"best for {key}: {config}" for key, config in table.items()]
    if save is not None:
        tuning.save(save, table)
        lines.append(f"written: {save}")
    show.display(shown, "", *lines)


def _table(results: list[measure.Timing], copied: float) -> Table:
    """One row per implementation that ran; per cent of so many bytes per second."""
    table = show.columns(["implementation", "µs/step", "µs alone", "GB/s", "% of copy", "error"])
    for result in results:
        if result.reason is None:
            table.add_row(
                result.implementation or "best",
                f"{result.seconds * 1e6:,.1f}",
                f"{result.seconds_alone * 1e6:,.1f}",
                f"{result.bandwidth / 1e9:,.1f}",
                f"{100 * result.bandwidth / copied:.0f}",
                f"{result.error:.1e}",
            )
    return table


def _heads(model: str | None, heads: str | None, kv_heads: str | None, head_dim: str | None) -> dict[str, int]:
    """Those of a model, and what is given otherwise."""
    texts = {"num_heads": ("heads", heads), "num_kv_heads": ("kv-heads", kv_heads), "head_dim": ("head-dim", head_dim)}
    given = {name: count for name, (word, text) in texts.items() if (count := parse.count(word, text)) is not None}
    if model is None:
        return given
    if (spec := MODELS[model]).values_in_keys:
        raise UnsupportedError(
            f"{spec.name} has latent attention, whose values lie in its keys; the bench measures caches with values of "
            f"their own: give --heads {spec.num_heads} --kv-heads 1 --head-dim {spec.head_dim} to read twice as much."
        )
    return {name: getattr(spec, name) for name in texts} | given


def _bench_engine(
    checkpoint: Path | None, dtype: str | None, chat: bench_engine.Chat, settings: bench_engine.Settings, as_json: bool
) -> None:
    """Runs the conversations with prefixes kept and without, and prints what came of it."""
    with show.waiting("reading ..."):
        model, name = bench_engine.opened(checkpoint, dtype)
    runs = []
    for keeps in (True, False):
        with show.progress("prefixes kept" if keeps else "without") as progress:
            runs.append(bench_engine.measured(model, chat, settings, keeps, progress))
    kind = jax.devices()[0].device_kind
    if as_json:
        content = {
            "device": kind,
            "model": name,
            "chat": dataclasses.asdict(chat),
            "settings": dataclasses.asdict(settings) | {"codec": settings.codec and repr(settings.codec)},
            "runs": [dataclasses.asdict(run) | {"hit_rate": run.hit_rate} for run in runs],
        }
        typer.echo(json.dumps(content, indent=1))
        return
    show.display(*bench_engine.screen(f"{kind}, {name}", chat, settings, runs))


def _refuse_dtypes(codec: str | None, plain: str | None, dtype: str) -> None:
    """Refuses a codec that is only a dtype, and dtypes that are not known."""
    if plain is not None and plain != dtype:
        raise ConfigError(f"--codec {codec} is no codec but a dtype: give it as --dtype {plain}.")
    if dtype not in parse.DTYPES:
        raise ConfigError(f"unknown --dtype {dtype!r}; the known ones are {', '.join(parse.DTYPES)}.")


def _case(
    heads: dict[str, int], batch: str, context: str, window: str | None, dtype: str, codec: str | None
) -> measure.Case:
    chosen, plain = parse.codec(codec)
    _refuse_dtypes(codec, plain, dtype)
    return measure.Case(
        **heads,
        batch_size=parse.required("batch", batch),
        context=parse.required("context", context, 2),
        window=parse.count("window", window),
        dtype=dtype,
        codec=chosen,
    )
