"""Write the figures of finished runs and of two benchmarks into README.md; called by ``make figures``.

    python tools/update_readme.py RUN [--routes RUN]

RUN: folders of the recipes ``demo`` and ``demo-routes``. Without the latter the table of the routes is left out.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

METRICS = ("WQL", "MAE", "MASE")
START, END = "<!-- figures: written by `make figures` -->", "<!-- end of figures -->"


def figures(run: Path, routes: Path | None, speed: dict[str, Any], router: dict[str, Any]) -> str:
    """Return the Markdown that stands between the two marks."""
    records = [json.loads(line) for line in (run / "evaluation.jsonl").read_text().splitlines()]
    facts = json.loads((run / "run.json").read_text())
    overall = {
        (record["model"], record["metric"]): record["value"] for record in records if record["domain"] == "overall"
    }
    kinds = {record["model"]: record["kind"] for record in records}
    rows = [(name, kind) for name, kind in kinds.items() if kind not in ("single", "expert", "naive")]
    machine, seconds = facts["machine"], sum(facts["seconds"].values())
    lines = [
        START,
        f"Demo domains, test windows, relative to seasonal naive (geometric mean over {_domains(records)} domains;",
        f"lower is better). {machine['cores']} cores, torch {machine['torch']}, {seconds / 60:.1f} minutes.",
        "",
        "| model | WQL | MAE | MASE |",
        "| --- | --- | --- | --- |",
    ]
    for name, _ in sorted(rows, key=lambda row: overall[row[0], "WQL"]):
        lines.append(_row(name, [overall[name, metric] for metric in METRICS]))
    lines += ["", *_claims(json.loads((run / "intervals.json").read_text()))]
    lines += [*([] if routes is None else ["", *_routes(routes)]), "", *_speed(speed), "", *_router(router), END]
    return "\n".join(lines)


def _claims(intervals: list[dict[str, Any]]) -> list[str]:
    """Return a row for each claim, with a ratio and its interval for each metric."""
    found = {
        (claim["claim"], claim["metric"]): f"{claim['ratio']:.3f} ({claim['low']:.3f} to {claim['high']:.3f})"
        for claim in intervals
    }
    metrics = list(dict.fromkeys(metric for _, metric in found))
    targets = {claim["claim"]: claim["target"] or "-" for claim in intervals}
    lines = [
        f"| ratio of errors (95 % interval) | {' | '.join(metrics)} | aimed for |",
        f"| --- {'| --- ' * len(metrics)}| --- |",
    ]
    for claim, target in targets.items():
        cells = " | ".join(found.get((claim, metric), "-") for metric in metrics)
        lines.append(f"| {claim} | {cells} | {target} |")
    return lines


def _routes(run: Path) -> list[str]:
    """Return the table of the three routes, what they gain on test windows, and how even their experts are used."""
    records = [json.loads(line) for line in (run / "evaluation.jsonl").read_text().splitlines()]
    overall = {
        (record["model"], record["metric"]): record["value"] for record in records if record["domain"] == "overall"
    }
    costs = {cost["model"]: cost for cost in json.loads((run / "efficiency.json").read_text())}
    claims = {
        (claim["model"], claim["against"]): claim
        for claim in json.loads((run / "intervals.json").read_text())
        if claim["metric"] == "WQL"
    }
    lines = [
        "The three routes on the same budget of training operations, beside the generalists; WQL and MAE relative to "
        "seasonal naive, ratios of WQL on test windows with 95 % intervals "
        "(`chronomoe run demo-routes --out runs/routes`):",
        "",
        "| model | experts | active parameters | operations | WQL | MAE | WQL against generalist-wide |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name in ("mixture", "upcycled", "expanded", "generalist-wide", "generalist-full"):
        cost, claim = costs[name], claims.get((name, "generalist-wide"))
        ratio = "-" if claim is None else f"{claim['ratio']:.3f} ({claim['low']:.3f} to {claim['high']:.3f})"
        size = f"{cost['experts']:.2f} | {cost['active_parameters'] / 1e6:.2f}M | {cost['flops'] / 1e6:.0f}M"
        errors = " | ".join(f"{overall[name, metric]:.3f}" for metric in METRICS[:2])
        lines.append(f"| {name} | {size} | {errors} | {ratio} |")
    base = claims["expanded", "generalist-base"]
    inside = json.loads((run / "moe.json").read_text())
    used = ", ".join(f"{name} {found['least_share']:.2f}" for name, found in inside.items())
    return [
        *lines,
        "",
        f"WQL of the expanded student against its own base: {base['ratio']:.3f} ({base['low']:.3f} to "
        f"{base['high']:.3f}). Least used expert of any layer, as a multiple of an even share (a dead one has "
        f"less than 0.25): {used}.",
    ]


def _speed(speed: dict[str, Any]) -> list[str]:
    ratio, latency, flops = speed["throughput_ratio"], speed["latency_ratio"], speed["flop_ratio"]
    whole = speed["parameters"]["upstream"]
    lines = [
        f"Speed against upstream's code on a full-size Chronos-2 ({whole / 1e6:.1f}M parameters, random weights): "
        f"K = {speed['top_k']} mixtures of {speed['num_experts']} preset students of it, context "
        f"{speed['context_length']}, horizon {speed['horizon']}, batch {speed['batch_size']}, {speed['threads']} "
        "threads, one run.",
        "",
        "| model | parameters of a student | throughput | latency at batch 1 | operations |",
        "| --- | --- | --- | --- | --- |",
    ]
    for preset, size in speed["student_parameters"].items():
        fewer = f"{size / 1e6:.1f}M, {1 - size / whole:.0%} fewer"
        lines.append(
            f"| mixture of `{preset}` students | {fewer} | **{ratio[preset]:.1f} times** | "
            f"{latency[preset]:.1f} times faster | {flops[preset]:.1f} times fewer |"
        )
    lines.append(
        f"| the teacher itself, our exact forward pass | - | {ratio['exact']:.2f} times | "
        f"{latency['exact']:.2f} times faster | {flops['exact']:.2f} times fewer |"
    )
    return lines


def _router(router: dict[str, Any]) -> list[str]:
    return [
        f"Router training on cached forecasts, {router['windows']} windows, {router['experts']} experts, "
        f"{router['epochs']} epochs: {router['seconds']:.0f} s."
    ]


def _row(name: str, values: list[float]) -> str:
    return f"| {name} | " + " | ".join(f"{value:.3f}" for value in values) + " |"


def _domains(records: list[dict[str, Any]]) -> int:
    return len({record["domain"] for record in records} - {"overall"})


def benchmark(name: str) -> dict[str, Any]:
    """Run a benchmark and return its one JSON line."""
    command = [sys.executable, f"bench/{name}.py"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def main() -> None:
    """Replace what stands between the marks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument("--routes", type=Path, help="folder of a finished run of all three routes")
    options = parser.parse_args()
    readme = Path("README.md")
    text = readme.read_text()
    before, rest = text.split(START)
    after = rest.split(END)[1]
    readme.write_text(
        before + figures(options.run, options.routes, benchmark("throughput"), benchmark("router")) + after
    )


if __name__ == "__main__":
    main()
