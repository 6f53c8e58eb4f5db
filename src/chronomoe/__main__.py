"""``python -m chronomoe``: the command line."""

from chronomoe.cli.app import main

main()
