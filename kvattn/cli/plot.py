"""Cache growth against length, with the device's limit and every lever as a line."""

from pathlib import Path
from typing import Any

from kvattn._checks import INT32_MAX
from kvattn.cli.figure import writable
from kvattn.memory import Lever, Plan
from kvattn.memory.levers import FEWER, OTHER, ROUNDED, SAME

_COLOURS = {SAME: "tab:green", ROUNDED: "tab:blue", FEWER: "tab:orange", OTHER: "tab:purple"}
_STYLES = ("-", "--", ":", "-.", (0, (5, 1)), (0, (1, 1)))


def draw(base: Plan, pulled: list[Lever], path: Path, *, with_limit: bool = True) -> None:
    """Writes the figure; the format goes by the ending of the name.

    Args:
        base: the plan, with a length.
        pulled: its levers.
        path: where to.
        with_limit: draw the room that the weights leave.

    Raises:
        ConfigError: an ending that is no format of a figure.
        MissingLibraryError: matplotlib is not installed.
    """
    writable(path)
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    assert base.length is not None
    batch = base.batch_size or 1
    top = min(16 * base.length, INT32_MAX)
    lengths = sorted({max(n * top >> shift, 1) for shift in range(2, 13) for n in (3, 4)})
    figure = Figure(figsize=(9.5, 6), layout="constrained")
    axes = figure.add_subplot()

    def line(p: Plan, label: str, **style: Any) -> None:
        sizes = [_held(p, n) / 1e9 for n in lengths]
        axes.plot(lengths, sizes, label=label, **style)

    line(base, "as it is", color="black", linewidth=2.5)
    used: dict[str, int] = {}
    for lever in pulled:
        if lever.cache_ratio == 1:
            continue  # lower weights raise the limit, not the line
        style = _STYLES[used.get(lever.outputs, 0) % len(_STYLES)]
        used[lever.outputs] = used.get(lever.outputs, 0) + 1
        line(lever.plan, f"{lever.name} ({lever.outputs})", color=_COLOURS[lever.outputs], linestyle=style)
    if with_limit:
        limit = base.free_bytes / 1e9
        axes.axhline(limit, color="tab:red", linewidth=1)
        text = f"{base.device.name}: {limit:.4g} GB beside the weights"
        axes.annotate(text, (lengths[0], limit), xytext=(2, 3), textcoords="offset points", color="tab:red")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda tokens, _: f"{tokens:,.0f}"))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda held, _: f"{held:g}"))
    axes.set_xlabel("tokens per sequence")
    axes.set_ylabel(f"GB of cache on a device, batch of {batch}")
    axes.set_title(f"{base.model.name}: cache growth, one lever at a time")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=150)


def _held(p: Plan, length: int) -> int:
    """Bytes on a device, at another length; what pages hold grows along."""
    assert p.length is not None
    mean = None if p.mean_length is None else max(p.mean_length * length // p.length, 1)
    size = p.changed(length=length, mean_length=mean).device_cache_bytes
    assert size is not None  # a plan with a length has it
    return size
