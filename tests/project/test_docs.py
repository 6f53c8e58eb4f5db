"""Pages show recipes that are read, commands that exist, and links that lead somewhere; their code runs elsewhere."""

import re
from pathlib import Path

import pytest
import yaml

from chronomoe.models.configuration import parse as parse_configuration
from chronomoe.pretraining.config import PretrainConfig
from chronomoe.recipe import RunConfig
from command_lines import FENCE, blocks, command_lines, mentions, parse, unknown_options

ROOT = Path(__file__).parents[2]
PAGES = {
    str(path.relative_to(ROOT)): path.read_text() for path in (*ROOT.glob("README*.md"), *ROOT.glob("docs/**/*.md"))
}


def shown(*languages):
    return [(name, body) for name, page in PAGES.items() for body in blocks(page, *languages)]


def in_pages(find):
    return [(name, line) for name, page in PAGES.items() for line in find(page)]


@pytest.mark.parametrize(("page", "line"), in_pages(command_lines))
def test_a_command_line_of_a_page_is_accepted(page, line):
    parse(line)


@pytest.mark.parametrize(("page", "line"), in_pages(mentions))
def test_a_command_that_a_sentence_names_exists_with_its_options(page, line):
    assert unknown_options(line) == []


@pytest.mark.parametrize(("page", "text"), shown("yaml"))
def test_a_recipe_of_a_page_is_read(page, text):
    values = yaml.safe_load(text)
    teaches = "corpus" in values
    values = values if teaches else {"domains": [{"data": "demo:web"}]} | values
    assert parse_configuration(values, PretrainConfig if teaches else RunConfig, source=page)


@pytest.mark.parametrize("name", [name for name in PAGES if name.startswith("docs/tasks/")])
def test_a_task_starts_with_a_question_and_has_something_to_run(name):
    title, question = re.match(r"# (.+)\n\n\*\*(.+)\*\*\n", PAGES[name]).groups()
    assert title
    assert question.endswith("?")
    assert command_lines(PAGES[name])


@pytest.mark.parametrize("name", [name for name in PAGES if name.startswith("docs/")])
def test_links_of_a_page_lead_to_files(name):
    links = re.findall(r"\]\((?!https?:)([^)#\s]+)", FENCE.sub("", PAGES[name]))
    assert [link for link in links if not (ROOT / name).parent.joinpath(link).exists()] == []


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text()
    assert [name for name in PAGES if name.startswith("docs/") and name.removeprefix("docs/") not in navigation] == []


def test_what_a_promise_names_as_proof_exists():
    named = re.findall(r"`(tests/[\w/.]+)`", PAGES["docs/concepts/exact.md"])
    assert named
    assert [path for path in named if not (ROOT / path).exists()] == []
