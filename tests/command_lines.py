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
    """List the ``chronomoe`` command lines, continued lines joined, prompts taken off."""
    joined = "\n".join(blocks(page, "console", "bash", "sh", "shell")).replace("\\\n", " ")
    found = [re.sub(r"^\$\s*", "", line.strip()) for line in joined.splitlines()]
    return [line for line in found if line.startswith("chronomoe ") and "COMMAND" not in line]


def mentions(page):
    """List the commands that sentences name, with some of their options or none."""
    return re.findall(r"`(?:torchrun [^`]*? -m )?(chronomoe [a-z]+[^`]*)`", FENCE.sub("", page))


def parse(line):
    """Read a command line with its arguments and options; refuse what ``chronomoe`` would refuse."""
    _, *words = shlex.split(line, comments=True)
    if words[0].startswith("-"):
        return
    context, name, command, rest = resolve(words)
    assert command.make_context(name, list(rest), parent=context).params


def unknown_options(line):
    """Resolve the command of a mention, and list the options that it does not have."""
    _, _, command, rest = resolve(shlex.split(line)[1:])
    known = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
    return [word for word in rest if word.startswith("--") and word not in known]


def resolve(words):
    """Find a command by its name."""
    context = COMMANDS.make_context("chronomoe", list(words), resilient_parsing=True)
    return (context, *COMMANDS.resolve_command(context, words))
