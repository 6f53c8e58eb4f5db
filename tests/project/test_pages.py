"""The code of every page runs, in the order of the page, small: its Python, its recipes and its commands.

What is not run is read only: ``test_docs`` checks that ``chronomoe`` accepts it.
"""

import re
import shlex
import shutil
from pathlib import Path

import pytest
import yaml

from workshop import call, small

sybil = pytest.importorskip("sybil", reason="sybil is not installed: pip install -e '.[dev]'")
markdown = pytest.importorskip("sybil.parsers.markdown")

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    str(path.relative_to(ROOT))
    for path in (ROOT / "README.md", *ROOT.glob("docs/**/*.md"))
    if not path.name.endswith(".zh.md")  # a translation, whose code is compared with that of the page
)
NOT_RUN = {
    "pip ": "changes the environment",
    "make ": "changes the environment",
    "torchrun ": "several processes have tests of their own",
    "chronomoe serve ": "answers until it is stopped; tests/serving starts it",
    "python examples/ray_serve.py ": "likewise; tests/serving/test_ray_serve.py starts it",
    "docker ": "there is none",
    "ray ": "changes the machine",
    "RAY_ADDRESS=": "needs other machines",
    "chronomoe predict runs/demo/recommended parts --engine ray ": "tests/test_on_ray.py has a cluster",
    "chronomoe distil tiny demo:traffic --out students/traffic --horizon 48 --engine ray": "likewise",
    "accelerate ": "several processes have tests of their own",
    "chronomoe --": "an option of the whole command line, which has tests of its own",
    "chronomoe pretrain ": "draws a corpus and trains for hours",
    "chronomoe distil teacher ": "needs the teacher of the line above, which is not made",
    "chronomoe evaluate teacher ": "likewise, and the network",
    "chronomoe run chronos-2 ": "needs the network and takes hours",
    "chronomoe export runs/demo/moe --out exported --int8": "takes 17 s, and the line without int8 does too",
}
"""What console lines start with that are not run, and why."""
RUNS = "index.md"
"""Page whose runs are made: one takes 6 s. Those of other pages are planned, which reads their recipes and series."""
SMALLER = {
    r"\b(steps|num_steps)=\d+": r"\1=1",
    r"\bbatch_size=\d+": "batch_size=2",
    r"\bnum_windows=\d+": "num_windows=8",
    r"\bfit_router\(mixture, frame\)": "fit_router(mixture, frame, num_windows=8)",
    r"(?m)^(\$ chronomoe (?:distil|expand) .*)": r"\1 --steps 1 --batch-size 2",
    r"(?m)^(\$ chronomoe expand .*)": r"\1 --probe-steps 1",
    r"(?m)^(\$ chronomoe compose .*)": r"\1 --windows 8",
    r"(?m)^(\$ chronomoe evaluate .*)": r"\1 --limit 2",
    r"(\$ chronomoe recalibrate)": r"\1 --limit 100",
    r"(\$ chronomoe grow)": r"\1 --steps 1 --batch-size 2 --windows 8",
}
"""Sizes that take minutes become such that take a second."""


def run_commands(example):
    for line in example.parsed.replace("\\\n", " ").splitlines():
        assert line.startswith("$ "), f"a line of a console block starts with $, got {line!r}"
        if line[2:].startswith(tuple(NOT_RUN)):
            continue
        _, *words = shlex.split(line[2:], comments=True)
        if words[0] == "run" and Path(example.path).name != RUNS:
            words = ["plan", words[1]]
        elif "--out" in words and (out := Path(words[words.index("--out") + 1])).is_dir():
            shutil.rmtree(out)  # made for the other pages
        assert call(words) == 0, f"line {example.line}: {line}"


def keep_recipe(example):
    name = re.match(r"# (\S+\.yaml)\n", example.parsed)
    values = yaml.safe_load(example.parsed)
    if name and "domains" in values:
        Path(name[1]).write_text(yaml.safe_dump(small(values)))


SYBIL = sybil.Sybil(
    [
        markdown.PythonCodeBlockParser(),
        markdown.CodeBlockParser("console", run_commands),
        markdown.CodeBlockParser("yaml", keep_recipe),
    ]
)


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.filterwarnings("default")
def test_the_code_of_a_page_runs(page, names, tmp_path):
    text = (ROOT / page).read_text()
    for large, little in SMALLER.items():
        text = re.sub(large, little, text)
    copy = tmp_path / Path(page).name
    copy.write_text(text)
    document = SYBIL.parse(copy)
    document.namespace |= names
    for example in document.examples():
        example.evaluate()
