"""How the command prints: 80 columns in a pipe, no colours there, errors in one line."""

import contextlib
import functools
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence

import typer
from rich.console import Console, Group, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from kvattn.errors import KVAttnError

WIDTH = 80
"""Columns of a pipe, and the fewest of a terminal's that tables are made for."""


def console() -> Console:
    """Standard output as it is now."""
    terminal = sys.stdout.isatty()
    width = min(shutil.get_terminal_size((WIDTH, 24)).columns, 110) if terminal else WIDTH
    return Console(highlight=False, width=width, soft_wrap=False)


def waiting(what: str) -> contextlib.AbstractContextManager[object]:
    """A context that says on a terminal's standard error what takes so long."""
    if not sys.stderr.isatty():
        return contextlib.nullcontext()
    return Console(stderr=True).status(what)


@contextlib.contextmanager
def progress(what: str) -> Iterator[Callable[[int, int], object] | None]:
    """A function of what is done and of all, which moves a bar on a terminal's standard error; None without one."""
    if not sys.stderr.isatty():
        yield None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def display(*parts: RenderableType) -> None:
    """Prints renderables one below the other; in a pipe without the spaces that fill lines up."""
    out = console()
    if out.is_terminal:
        out.print(Group(*parts))
        return
    with out.capture() as captured:
        out.print(Group(*parts))
    typer.echo("\n".join(line.rstrip() for line in captured.get().splitlines()))


def columns(names: Sequence[str], left: Iterable[int] = (0,), title: str | None = None) -> Table:
    """A table without lines; columns are right-aligned but those in `left`. Nothing is cut off: long cells wrap."""
    table = Table(box=None, padding=(0, 2, 0, 0), title=title, title_justify="left", title_style="bold", pad_edge=False)
    for i, name in enumerate(names):
        justify = "left" if i in left else "right"
        table.add_column(name, justify=justify, overflow="fold", header_style="bold", no_wrap=i == 0)
    return table


def pairs(rows: Iterable[tuple[str, str]]) -> Table:
    """Names and what belongs to them."""
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def size(count: float) -> str:
    """Bytes with three digits or four."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            value = count / scale
            digits = ",.0f" if value >= 1000 else ".4g" if value >= 10 else ".3g"
            return f"{value:{digits}} {unit}"
    return f"{count:.0f} B"


def milliseconds(seconds: float) -> str:
    """Milliseconds, with as many decimals as mean something."""
    value = 1e3 * seconds
    return f"{value:.3f}" if value < 1 else f"{value:.2f}" if value < 10 else f"{value:,.1f}"


def duration(seconds: float) -> str:
    """With its unit."""
    return f"{seconds:,.1f} s" if seconds >= 10 else f"{milliseconds(seconds)} ms"


def reports_errors[**P](command: Callable[P, None]) -> Callable[P, None]:
    """Errors that are the user's to mend become one line on standard error, and the exit status 2."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except (KVAttnError, OSError) as error:
            if isinstance(error, BrokenPipeError):
                raise
            message = " ".join(str(error).split())
            typer.echo(f"kvattn: {message}", err=True)
            raise typer.Exit(2) from error

    return run
