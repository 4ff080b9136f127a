"""``kvattn replay``: how large a pool of pages must be, from a trace of requests."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from kvattn.cli import parse, show
from kvattn.errors import ConfigError
from kvattn.memory import MODELS, bytes_per_token
from kvattn.serving.replay import Replay, knee, replay
from kvattn.serving.trace import TraceRequest, read_trace

CURVE_POINTS = 24
"""Sizes of a plot's line."""


@show.reports_errors
def replay_trace(
    trace: Annotated[Path, typer.Argument(metavar="TRACE", help="JSON lines in Mooncake's format.")],
    more: Annotated[list[str] | None, typer.Argument(metavar="[N]...", help="More sizes for --blocks.")] = None,
    blocks: Annotated[
        list[str] | None, parse.option("N ...", "Blocks of the pool; several sizes may follow. Default: by halves.")
    ] = None,
    block_size: Annotated[str, parse.option("INT", "Tokens that one hash id of the trace stands for.")] = "512",
    model: Annotated[str | None, parse.option("NAME", "Bytes, too: a model of `kvattn memory`, in bfloat16.")] = None,
    plot: Annotated[Path | None, parse.option("FILE", "Draw the hit rate against the pool, and its knee.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The numbers as JSON.")] = False,
) -> None:
    """Replay a trace on prefix caches of several sizes: which share of the prompts' tokens each gives back."""
    size = parse.required("block-size", block_size)
    if more and not blocks:
        raise ConfigError(f"{more[0]!r} is one argument too many: sizes follow --blocks.")
    sizes = sorted({parse.required("blocks", word) for word in [*(blocks or []), *(more or [])]})
    per_token = None if model is None else _bytes_per_token(model)
    if plot is not None:
        from kvattn.cli.figure import writable
        from kvattn.cli.replay_plot import draw

        writable(plot)
    with show.progress(f"reading {trace.name}") as progress:
        requests = read_trace(trace, progress=progress)
    if not requests:
        raise ConfigError(f"{trace} holds no requests.")
    ideal = replay(requests, block_size=size)
    sizes = sizes or halves(ideal.peak_blocks)
    results = _replayed(requests, sizes, size)
    # From the sizes that were asked for, and with a plot from those of its line.
    curve = _replayed(requests, steps(sizes, ideal.peak_blocks), size) if plot is not None else results
    bend = knee([x.num_blocks or 0 for x in curve], [x.hit_rate for x in curve]) if len(curve) > 2 else None
    if plot is not None:
        draw(curve, results, ideal, bend, plot, name=trace.stem, bytes_per_token=per_token)
    if as_json:
        typer.echo(json.dumps(_json(results, ideal, bend, per_token), indent=1))
        return
    show.display(*_screen(trace, requests, results, ideal, bend, per_token))
    if plot is not None:
        typer.echo(f"drawn: {plot}")


def halves(distinct: int) -> list[int]:
    """Pool sizes by halves, ending with one that holds everything."""
    return sorted({max(distinct >> shift, 1) for shift in range(8)})


def steps(sizes: Sequence[int], distinct: int) -> list[int]:
    """Pool sizes by equal factors, over all that is of interest, and those that were asked for."""
    first, last = min([*sizes, max(distinct // 512, 1)]), max([*sizes, distinct])
    factor = (last / first) ** (1 / (CURVE_POINTS - 1))
    return sorted({*sizes, *(round(first * factor**i) for i in range(CURVE_POINTS))})


def _replayed(requests: Sequence[TraceRequest], sizes: Sequence[int], block_size: int) -> list[Replay]:
    results = []
    for size in sizes:
        with show.progress(f"{size:,} blocks") as progress:
            results.append(replay(requests, num_blocks=size, block_size=block_size, progress=progress))
    return results


def _bytes_per_token(name: str) -> int:
    spec = MODELS[name]
    return sum(bytes_per_token(1, *spec.heads[layer]) for layer in spec.cache_layers)


def _screen(
    trace: Path,
    requests: Sequence[TraceRequest],
    results: Sequence[Replay],
    ideal: Replay,
    bend: int | None,
    per_token: int | None,
) -> list[Any]:
    table = show.columns(["blocks", "tokens", *(["bytes"] if per_token else []), "hit rate", "of ideal", "evicted", ""])
    for x in results:
        tokens = (x.num_blocks or 0) * x.block_size
        table.add_row(
            f"{x.num_blocks:,}",
            f"{tokens:,}",
            *([show.size(tokens * per_token)] if per_token else []),
            f"{100 * x.hit_rate:.2f} %",
            f"{x.hit_rate / x.ideal_hit_rate:.0%}" if x.ideal_hit_rate else "",
            f"{x.evicted:,}",
            "<- knee" if x.num_blocks == bend else "",
        )
    answers = sum(request.output_length for request in requests)
    what = (
        f"{trace.name}: {len(requests):,} requests, {ideal.prompt_tokens:,} prompt tokens in blocks of "
        f"{ideal.block_size}, {answers:,} tokens of answers"
    )
    legend = (
        f"hit rate: share of prompt tokens that need not be computed; at most {100 * ideal.hit_rate:.2f} %, with the "
        f"{ideal.peak_blocks:,} blocks that hold everything. Prompts only, least recently used leaves first."
    )
    lines = [what, "", table, "", legend]
    if bend is not None:
        lines.append(f"knee: beyond {bend:,} blocks, more of them bring less than they do on average.")
    return lines


def _json(results: Sequence[Replay], ideal: Replay, bend: int | None, per_token: int | None) -> dict[str, Any]:
    return {
        "num_requests": ideal.num_requests,
        "prompt_tokens": ideal.prompt_tokens,
        "block_size": ideal.block_size,
        "bytes_per_token": per_token,
        "distinct_blocks": ideal.peak_blocks,
        "ideal_hit_rate": ideal.hit_rate,
        "knee": bend,
        "sizes": [dataclasses.asdict(x) | {"hit_rate": x.hit_rate} for x in results],
    }
