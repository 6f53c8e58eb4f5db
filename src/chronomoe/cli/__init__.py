"""The command line."""

from chronomoe.cli.app import main

__all__ = ["main"]
