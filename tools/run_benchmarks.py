"""Run the benchmarks and write docs/speed.md's figures from their JSON lines; called by ``make bench``.

    python tools/run_benchmarks.py [NAME ...] [--lines docs/speed.jsonl] [--page docs/speed.md] [--no-run]

Lines of benchmarks that do not run stay what they are. Times mean something on cores that do nothing else.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import cost_model

START, END = "<!-- figures: written by `make bench` -->", "<!-- end of figures -->"
BENCH = Path(__file__).parents[1] / "bench"
SHARED = "answer"
AIMS = {
    "mixture against upstream float32, batch 256": "18 / 50",
    "mixture against upstream at its best, batch 256": "18 / 25",
    "mixture against upstream float32, batch 1": "12 / 12",
    "exact forward pass of the whole model, batch 64": "1.2 / 4.5",
    "100 groups of 10, exact against upstream": "2 / 6",
    "K = 1 mixture against its student, batch 256": "1.05",
    "K = 1 mixture against its student, batch 1": "1.15",
    "router's share of a K = 1 forecast, batch 256": "0.03",
    "share of the matrix-product peak, batch 256": "0.70 / 0.55",
    "epoch from the store against a live upstream teacher": "8",
    "labelling against upstream float32": "1.2 / 4.5",
    "predict of 10,000 series of 200 steps (D): time beyond the model's": "0.3",
    "predict's peak memory at 40,000 series against 4,000, beyond one's": "1.2",
    "chronomoe --help against import torch": "0.8",
}
"""What was to be reached, float32 / bf16 where they differ."""
TYPES = ("float32", "bf16")


def run(names: Iterable[str], lines: Path) -> None:
    """Run benchmarks one after the other and put each line in place of the one before."""
    for name in names:
        begin = time.perf_counter()
        command = [sys.executable, str(BENCH / f"{name}.py")]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        print(f"{name}: {time.perf_counter() - begin:.0f} s", file=sys.stderr)
        found = read(lines) | {name: json.loads(done.stdout.splitlines()[-1])}
        lines.write_text("".join(json.dumps({"benchmark": key} | value) + "\n" for key, value in found.items()))


def read(lines: Path) -> dict[str, dict[str, Any]]:
    """Return the answers of a file of lines by benchmark."""
    text = lines.read_text() if lines.exists() else ""
    answers = [json.loads(line) for line in text.splitlines()]
    return {answer.pop("benchmark"): answer for answer in answers}


def table(answers: dict[str, dict[str, Any]]) -> list[str]:
    """Return the table of all measures, those of both types in one row."""
    measured: dict[str, dict[str, float]] = {}
    for answer in answers.values():
        for measure, value in answer.get("reach", {}).items():
            name, _, kind = measure.rpartition(", ")
            name, kind = (name, kind) if kind in TYPES else (measure, TYPES[0])
            measured.setdefault(name, {})[kind] = value
    order = [*(name for name in AIMS if name in measured), *(name for name in measured if name not in AIMS)]
    lines = ["| measure | float32 | bf16 | aimed for |", "| --- | --- | --- | --- |"]
    for name in order:
        cells = " | ".join(f"{measured[name][kind]:.4g}" if kind in measured[name] else "-" for kind in TYPES)
        lines.append(f"| {name} | {cells} | {AIMS.get(name, '-')} |")
    return lines


def figures(answers: dict[str, dict[str, Any]]) -> str:
    """Return the Markdown between the two marks: where it was measured, and the table."""
    places = {
        f"{answer['machine']['processor']} ({', '.join(answer['machine']['flags']) or 'no vector units known'}), "
        f"{answer['threads']} of {answer['machine']['cores']} cores, torch {answer['versions']['torch']}, "
        f"{'wall clock' if answer['clock'] == 'wall' else 'processor time'}"
        for answer in answers.values()
        if "machine" in answer
    }
    said = [f"Measured on {place}; one run." for place in sorted(places)]
    cost = ["", *cost_model.page(answers["cost"])] if "cost" in answers else []
    return "\n".join([START, *said, "", *table(answers), *cost, END])


def main() -> None:
    """Run, write, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="benchmarks to run; all by default")
    parser.add_argument("--lines", type=Path, default=Path("docs/speed.jsonl"))
    parser.add_argument("--page", type=Path, default=Path("docs/speed.md"))
    parser.add_argument("--no-run", action="store_true", help="only write the page")
    options = parser.parse_args()
    if not options.no_run:
        run(options.names or sorted({path.stem for path in BENCH.glob("*.py")} - {SHARED}), options.lines)
    answers = read(options.lines)
    text = options.page.read_text()
    before, rest = text.split(START)
    options.page.write_text(before + figures(answers) + rest.split(END)[1])
    print("\n".join(table(answers)))


if __name__ == "__main__":
    main()
