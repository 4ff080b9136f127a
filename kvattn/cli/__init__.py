"""The command ``kvattn``: plan, measure, tune, generate, replay a trace, and say what works here.

It needs the extra `cli` (typer, rich, matplotlib): ``pip install "kvattn[cli]"``.
"""

import sys


def main() -> None:
    """Runs the command; the entry point of the script ``kvattn``."""
    try:
        from kvattn.cli.app import app
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in ("typer", "rich", "click"):
            raise
        sys.stderr.write(f"kvattn: the command needs {error.name}: pip install 'kvattn[cli]'\n")
        raise SystemExit(2) from None
    if sys.argv[1:2] in (["memory"], ["replay"]):
        # Arithmetic: an accelerator would be started, and its memory taken, for nothing.
        import jax

        jax.config.update("jax_platforms", "cpu")
    app(prog_name="kvattn")
