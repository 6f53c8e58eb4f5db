"""A result that the README states stands on the page of figures, with what made it."""

import re
from pathlib import Path

import pytest

from command_lines import FENCE

ROOT = Path(__file__).parents[2]
README, README_ZH, PAGE = (ROOT / name for name in ("README.md", "README.zh-CN.md", "docs/figures.md"))
NO_RESULTS = {
    *("3.11", "3.13"),  # versions of Python
    *("120", "95", "1", "80"),  # parameters of Chronos-2 in millions, confidence, a ratio of 1, a band
}
BLOCKS = {
    "accuracy": ("<!-- accuracy: written by `make figures` -->", "<!-- end of accuracy -->"),
    "speed": ("<!-- speed: written by `make bench` -->", "<!-- end of speed -->"),
}


def numbers(text):
    """Find the numbers in sentences and tables, those that belong to a name left out."""
    text = re.sub(r"`[^`]*`|\]\([^)]*\)|<!--.*?-->", "", FENCE.sub("", text), flags=re.DOTALL)
    return set(re.findall(r"(?<![A-Za-z\d.-])\d+(?:\.\d+)?(?:e-?\d+)?", text))


def block(page, marks):
    """Return the lines that a command writes."""
    (inside,) = re.findall(f"{re.escape(marks[0])}\n(.*?)\n?{re.escape(marks[1])}", page.read_text(), re.DOTALL)
    return inside.splitlines()


def test_every_number_of_the_readme_is_on_the_page_of_figures():
    unknown = numbers(README.read_text()) - numbers(PAGE.read_text()) - NO_RESULTS
    assert unknown == set(), "put it on docs/figures.md with the command that makes it"


@pytest.mark.parametrize("marks", BLOCKS.values(), ids=BLOCKS)
def test_the_page_says_what_made_the_tables_of_the_readme(marks):
    source, empty, *lines = block(PAGE, marks)
    assert re.fullmatch(r"`make \w+.*` · .+ · \d{4}-\d\d-\d\d · commit \w{7,}", source)
    assert (empty, lines) == ("", [line.replace("](docs/", "](") for line in block(README, marks)])


def test_the_chinese_readme_has_the_same_table_of_accuracy(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    from chinese import chinese

    assert block(README_ZH, BLOCKS["accuracy"]) == chinese(block(README, BLOCKS["accuracy"]))


def test_what_is_said_in_sentences_is_said_on_the_page_with_its_source():
    rows = re.findall(r"^\| (.+) \|$", PAGE.read_text().split("## In sentences")[1], re.MULTILINE)[2:]
    assert rows
    for row in rows:
        *_, command, processor, date, commit = row.split(" | ")
        assert "`" in command
        assert processor
        assert re.fullmatch(r"\d{4}-\d\d-\d\d", date)
        assert re.fullmatch(r"[\da-f]{7,}", commit)
