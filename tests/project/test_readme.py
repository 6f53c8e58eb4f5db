import re
from pathlib import Path

from command_lines import blocks, command_lines

README = (Path(__file__).parents[2] / "README.md").read_text()


def test_the_readme_shows_command_lines():
    assert len(command_lines(README)) >= 3


def test_the_readme_starts_with_the_two_commands():
    assert re.findall(r"make \w+", blocks(README, "console")[0])[:2] == ["make demo", "make test"]
