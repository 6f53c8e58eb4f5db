"""Chinese pages say what the English ones say: the same code, names, links, figures and headings."""

import re
from collections import Counter
from pathlib import Path

import pytest

from command_lines import FENCE

ROOT = Path(__file__).parents[2]
BOTH = {"README.md": "README.zh-CN.md", "docs/index.md": "docs/index.zh.md"}
UNITS = {"million": 10**6, "万": 10**4, "亿": 10**8}


def code(page):
    """Return the blocks without their comments, which are translated."""
    lines = [
        (language, re.sub(r"\s+#.*|^#.*", "", line))
        for language, body in FENCE.findall(page)
        for line in body.splitlines()
    ]
    return [line for line in lines if line[1]]


def spans(page):
    """Count what stands in back quotes inside sentences, less the sketch of a run, which is translated."""
    found = re.findall(r"`([^`]+)`", FENCE.sub("", page))
    return Counter(" ".join(span.split()) for span in found if " -> " not in span)


def links(page):
    """Count where links lead, a page in Chinese as the English one; the READMEs link to each other."""
    found = re.findall(r"\]\(([^)]+)\)", page)
    return Counter(link.replace(".zh.md", ".md") for link in found if not link.startswith("README"))


def figures(page):
    """Count the numbers in sentences and tables, those that belong to a name left out."""
    text = re.sub(r"`[^`]*`|\]\([^)]*\)|<!--.*?-->", "", FENCE.sub("", page), flags=re.DOTALL)
    found = re.findall(r"(?<![A-Za-z\d.-])(\d+(?:\.\d+)?(?:e-?\d+)?)(?:\s*(million|万|亿)|M)?", text)
    return Counter(f"{float(number) * UNITS.get(unit, 1):.10g}" for number, unit in found)


def headings(page):
    """List the levels of the headings in their order."""
    return [len(marks) for marks in re.findall(r"^(#+) ", FENCE.sub("", page), flags=re.MULTILINE)]


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("part", [code, spans, links, figures, headings])
def test_a_page_in_chinese_agrees(part, name):
    english, chinese = (part((ROOT / page).read_text()) for page in (name, BOTH[name]))
    assert chinese == english, f"bring {BOTH[name]} in step with {name}: {part.__doc__}"


def test_both_readmes_lead_to_each_other():
    assert "](README.zh-CN.md)" in (ROOT / "README.md").read_text()
    assert "](README.md)" in (ROOT / "README.zh-CN.md").read_text()
