"""Run the benchmarks and write the figures of their JSON lines into all pages that show some; for ``make bench``.

    python tools/run_benchmarks.py [NAME ...] [--lines docs/speed.jsonl] [--no-run]

Lines of benchmarks that do not run stay what they are. Times mean something on cores that do nothing else.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterable
from datetime import date
from pathlib import Path
from typing import Any

import cost_model
import pages

MARKS = "<!-- figures: written by `make bench` -->", "<!-- end of figures -->"
SPEED = "<!-- speed: written by `make bench` -->", "<!-- end of speed -->"
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
    "epoch from the store against a live upstream teacher": "8 / 8",
    "labelling against upstream float32": "1.2 / 4.5",
    "predict of 10,000 series of 200 steps (D): time beyond the model's": "0.3",
    "predict's peak memory at 40,000 series against 4,000, beyond one's": "1.2",
    "chronomoe --help against import torch": "0.8",
    **{f"{name} in float32 against the checkpoint in float32, batch 1": "1.5" for name in ("ONNX", "OpenVINO")},
    **{f"{name} in int8 against its float32, batch 64": "1.5" for name in ("ONNX", "OpenVINO")},
    "gain of batching at 32 clients": "5",
    "p99 at 70 % load over the lone latency": "3",
    "accepted requests lost in 20 restarts": "0",
    "two workers of one core against one": "1.7",
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
        made = {"date": str(date.today()), "commit": pages.commit()}
        found = read(lines) | {name: json.loads(done.stdout.splitlines()[-1]) | made}
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


def place(answer: dict[str, Any]) -> str:
    """Say where an answer was measured."""
    machine = answer["machine"]
    return (
        f"{machine['processor']} ({', '.join(machine['flags']) or 'no vector units known'}), {answer['threads']} of "
        f"{machine['cores']} cores, torch {answer['versions']['torch']}, "
        f"{'wall clock' if answer['clock'] == 'wall' else 'processor time'}, one run"
    )


def figures(answers: dict[str, dict[str, Any]]) -> list[str]:
    """Return the lines of the page: where it was measured, the table, and the cost model."""
    places = sorted({place(answer) for answer in answers.values() if "machine" in answer})
    cost = ["", *cost_model.page(answers["cost"])] if "cost" in answers else []
    return [*(f"Measured on {one}." for one in places), "", *table(answers), *cost]


def summary(answer: dict[str, Any], router: dict[str, Any] | None) -> list[str]:
    """Return the lines of the README: times of upstream and of a mixture for each size of a batch."""
    sizes = {name: f"{count / 1e6:.1f}M" for name, count in answer["parameters"].items()}
    lines = [
        f"Milliseconds of a batch of forecasts, context {answer['context_length']}, horizon {answer['horizon']}: "
        f"upstream's code on a full-size Chronos-2 ({sizes['upstream']} parameters, random weights), and a mixture of "
        f"{answer['num_experts']} `{answer['preset']}` students of it ({sizes['student']} each) at its mean number of "
        f"experts. {place(answer)}; [more](docs/speed.md).",
        "",
        "| series | experts | upstream float32 | upstream bf16 | mixture float32 | mixture bf16 | times as fast |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    columns = [f"{name} {kind}" for name in ("upstream", "mixture") for kind in TYPES]
    for rows, times in answer["milliseconds"].items():
        cells = " | ".join(_digits(times[name]) if name in times else "-" for name in columns)
        gains = [times["upstream float32"] / times[name] for name in columns[2:] if name in times]
        gain = " / ".join(f"**{value:.1f}**" for value in gains)
        lines.append(f"| {rows} | {answer['mean_experts'][rows]} | {cells} | {gain} |")
    if router is not None:
        lines += [
            "",
            f"Router training on cached forecasts, {router['windows']} windows, {router['experts']} experts, "
            f"{router['epochs']} epochs: {router['seconds']:.0f} s.",
        ]
    return lines


def _digits(value: float) -> str:
    """Write a time with four digits, and whole milliseconds from a second on."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def main() -> None:
    """Run, write, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="benchmarks to run; all by default")
    parser.add_argument("--lines", type=Path, default=Path("docs/speed.jsonl"))
    parser.add_argument("--page", type=Path, default=Path("docs/speed.md"))
    parser.add_argument("--no-run", action="store_true", help="only write the pages")
    options = parser.parse_args()
    if not options.no_run:
        run(options.names or sorted({path.stem for path in BENCH.glob("*.py")} - {SHARED}), options.lines)
    answers = read(options.lines)
    pages.put(options.page, figures(answers), MARKS)
    if "throughput" in answers:
        answer = answers["throughput"]
        source = pages.source("make bench", place(answer), on=answer.get("date"), code=answer.get("commit"))
        pages.put_everywhere(summary(answer, answers.get("router")), SPEED, source=source)
    print("\n".join(table(answers)))


if __name__ == "__main__":
    main()
