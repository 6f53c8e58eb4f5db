"""The tables that commands end with."""

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

WIDTH_OF_FILES = 120
"""Columns of a table that goes to no terminal."""


def print_summary(folder: Path) -> None:
    """Print the table of a run, without the rows of single experts, and what it recommends."""
    from chronomoe.report.page import recommendation
    from chronomoe.report.sections import SPECIALISTS

    records = [json.loads(line) for line in (folder / "evaluation.jsonl").read_text().splitlines()]
    print_records([record for record in records if record["kind"] not in SPECIALISTS])
    print(recommendation(folder) or "")


def print_plan(found: Any) -> None:
    """Print the stages of a plan, and what they take together."""
    table = Table(title="Planned stages")
    table.add_column("stage", overflow="fold")  # a name is never cut
    for heading in ("parameters", "steps", "forecasts", "time", "disk", "memory"):
        table.add_column(heading, justify="right", no_wrap=True)
    for stage in found.stages:
        counts = (f"{count:,}" if count else "" for count in (stage.parameters, stage.steps, stage.windows))
        sizes = (f"{size / 1e6:,.1f} MB" for size in (stage.disk, stage.memory))
        table.add_row(stage.stage, *counts, f"{stage.seconds:,.1f} s", *sizes)
    _show(table)
    print(found.words())


def print_records(records: list[dict[str, Any]]) -> None:
    """Print a table of the overall ratios, and of WQL by domain where the terminal is wide enough."""
    console = Console()
    domains = [name for name in dict.fromkeys(record["domain"] for record in records) if name != "overall"]
    whole, short = _records_table(records, domains), _records_table(records, [])
    needed = console.measure(whole, options=console.options.update(max_width=10 * console.width)).maximum
    console.print(whole if needed <= console.width else short)


def _records_table(records: list[dict[str, Any]], domains: list[str]) -> Table:
    by_domain = "; by domain: WQL itself" if domains else ""
    table = Table(title=f"Relative to seasonal naive, geometric mean over domains, lower is better{by_domain}")
    for heading in ("model", "WQL", "MAE", "MASE", *domains):
        table.add_column(heading, justify="left" if heading == "model" else "right", no_wrap=True)
    value = {(record["model"], record["domain"], record["metric"]): record["value"] for record in records}
    names = dict.fromkeys(record["model"] for record in records)
    for name in sorted(names, key=lambda name: value.get((name, "overall", "WQL"), float("inf"))):
        cells = [value.get((name, "overall", metric)) for metric in ("WQL", "MAE", "MASE")]
        cells += [value.get((name, domain, "WQL")) for domain in domains]
        table.add_row(name, *("" if cell is None else f"{cell:.4f}" for cell in cells))
    return table


def print_monitored(found: list[Any]) -> None:
    """Print the metrics and the verdict of each group of forecasts."""
    table = Table(title="Forecasts whose values have arrived: reference, then what is judged")
    for heading in ("group", "values", "WQL", "against last season", "80 % band covers", "verdict"):
        table.add_column(heading, justify="left" if heading in ("group", "verdict") else "right", no_wrap=True)
    for one in found:
        low, high = one.ratio_interval
        before, after = one.before, one.after
        table.add_row(
            one.group if one.column == "all" else f"{one.column} {one.group}",
            f"{one.values:,}",
            f"{before['WQL']:.4f} {after['WQL']:.4f}",
            f"{one.ratio:.3f} ({low:.3f} to {high:.3f})",
            f"{before['coverage80']:.1%} {after['coverage80']:.1%}",
            one.verdict,
        )
    _show(table)


def _show(table: Table) -> None:
    """Print a table, as wide as the terminal; where there is none, wide enough to be read in a file."""
    console = Console()
    (console if console.is_terminal else Console(width=WIDTH_OF_FILES)).print(table)
