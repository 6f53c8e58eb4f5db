"""``python -m chronomoe``: the command line."""

from chronomoe.cli import main

main()
