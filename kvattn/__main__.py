"""``python -m kvattn``: the command."""

from kvattn.cli import main

main()
