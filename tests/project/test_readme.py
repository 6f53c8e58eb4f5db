import re
import shlex
from pathlib import Path

import pytest
import typer

from chronomoe.cli.app import app

README = Path(__file__).parents[2] / "README.md"
COMMANDS = typer.main.get_command(app)


def blocks():
    return re.findall(r"```(?:console|bash|sh|shell)\n(.*?)```", README.read_text(), flags=re.DOTALL)


def lines():
    """List the ``chronomoe`` command lines, continued lines joined, prompts and comments taken off."""
    joined = "\n".join(blocks()).replace("\\\n", " ")
    found = [re.sub(r"^\$\s*", "", line.strip()) for line in joined.splitlines()]
    inline = re.findall(r"`(chronomoe [a-z]+ [^`]*)`", README.read_text())
    return [line for line in (*found, *inline) if line.startswith("chronomoe ") and "COMMAND" not in line]


@pytest.mark.parametrize("line", lines())
def test_a_command_line_of_the_readme_is_accepted(line):
    _, *words = shlex.split(line, comments=True)
    context = COMMANDS.make_context("chronomoe", words, resilient_parsing=True)
    if not words[0].startswith("-"):
        name, command, rest = COMMANDS.resolve_command(context, words)
        if "--help" not in rest:
            assert command.make_context(name, list(rest), parent=context).params


def test_the_readme_shows_command_lines():
    assert len(lines()) >= 3


def test_the_readme_starts_with_the_two_commands():
    assert re.findall(r"make \w+", blocks()[0])[:2] == ["make demo", "make test"]
