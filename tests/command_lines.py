"""Command lines that pages show, and reading them as the shell and ``chronomoe`` would, without running anything."""

import re
import shlex

import typer

from chronomoe.cli.app import app

COMMANDS = typer.main.get_command(app)
FENCE = re.compile(r"^```(\w+)[^\n]*\n(.*?)^```", flags=re.DOTALL | re.MULTILINE)


def blocks(page, *languages):
    """Return the fenced blocks of some languages."""
    return [body for language, body in FENCE.findall(page) if language in languages]


def command_lines(page):
    """List the ``chronomoe`` command lines, continued lines joined, prompts taken off; those inside sentences too."""
    joined = "\n".join(blocks(page, "console", "bash", "sh", "shell")).replace("\\\n", " ")
    found = [re.sub(r"^\$\s*", "", line.strip()) for line in joined.splitlines()]
    inline = re.findall(r"`(?:torchrun [^`]* -m )?(chronomoe [a-z]+ [^`]*)`", FENCE.sub("", page))
    return [line for line in (*found, *inline) if line.startswith("chronomoe ") and "COMMAND" not in line]


def parse(line):
    """Read a command line with its arguments and options; refuse what ``chronomoe`` would refuse."""
    _, *words = shlex.split(line, comments=True)
    context = COMMANDS.make_context("chronomoe", list(words), resilient_parsing=True)
    if words[0].startswith("-"):
        return
    name, command, rest = COMMANDS.resolve_command(context, words)
    if "--help" not in rest:
        assert command.make_context(name, list(rest), parent=context).params
