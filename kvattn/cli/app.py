"""The commands of ``kvattn``."""

import typer

from kvattn.cli.bench import bench, tune
from kvattn.cli.env import env
from kvattn.cli.generate import generate
from kvattn.cli.memory import memory
from kvattn.cli.replay import replay_trace

app = typer.Typer(
    help="A key/value cache that is small, fast and correct: plan it, measure it, use it.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.command(short_help="What fits, how fast, which lever helps most.")(memory)
app.command(short_help="Time the decode step on this machine.")(bench)
app.command(short_help="Measure sizes of the decode kernel here.")(tune)
app.command(short_help="Continue text with a checkpoint.")(generate)
app.command("replay", short_help="How large a pool of pages must be, from a trace.")(replay_trace)
app.command(short_help="Versions, devices, what works here.")(env)
