"""``python -m kvattn.cli``."""

from kvattn.cli import main

main()
