"""Hit rate against the size of the pool, with its knee."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from kvattn.serving.replay import Replay


def draw(
    curve: Sequence[Replay],
    asked: Sequence[Replay],
    ideal: Replay,
    bend: int | None,
    path: Path,
    *,
    name: str,
    bytes_per_token: int | None = None,
) -> None:
    """Writes the figure; the format goes by the ending of the name.

    Args:
        curve: results of many sizes, ascending.
        asked: those of the table, marked on the line.
        ideal: the result of a pool without end.
        bend: the size at the knee; None: it has none.
        path: where to; see `kvattn.cli.figure.writable`.
        name: of the trace.
        bytes_per_token: of a model, for a second axis.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    axes.plot([x.num_blocks or 0 for x in curve], [100 * x.hit_rate for x in curve], color="tab:blue")
    axes.plot([x.num_blocks or 0 for x in asked], [100 * x.hit_rate for x in asked], "o", color="tab:blue")
    axes.axhline(100 * ideal.hit_rate, color="tab:red", linewidth=1)
    text = f"everything held: {100 * ideal.hit_rate:.2f} %"
    axes.annotate(text, (0.01, 100 * ideal.hit_rate), xycoords=("axes fraction", "data"), xytext=(0, -12),
                  textcoords="offset points", color="tab:red")  # fmt: skip
    if bend is not None:
        rate = next(100 * x.hit_rate for x in curve if x.num_blocks == bend)
        axes.plot([bend], [rate], "D", color="black", markersize=8)
        axes.annotate(f"knee: {bend:,} blocks, {rate:.1f} %", (bend, rate), xytext=(-10, 4), textcoords="offset points",
                      ha="right")  # fmt: skip
    axes.set_xscale("log")
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda blocks, _: f"{blocks:,.0f}"))
    axes.set_xlabel(f"blocks of {ideal.block_size} tokens")
    axes.set_ylabel("prompt tokens that are held, %")
    axes.set_title(f"{name}: hit rate against the size of the pool")
    axes.grid(alpha=0.3)
    if bytes_per_token is not None:
        scale = bytes_per_token * ideal.block_size / 1e9
        above = axes.secondary_xaxis("top", functions=(lambda x: np.multiply(x, scale), lambda x: np.divide(x, scale)))
        above.xaxis.set_major_formatter(FuncFormatter(lambda size, _: f"{size:g}"))
        above.set_xlabel("GB")
    figure.savefig(path, dpi=150)
