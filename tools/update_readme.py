"""Write measured figures into both READMEs and docs/figures.md; called by ``make figures``.

    python tools/update_readme.py EVIDENCE [--date 2026-11-26] [--commit 7a80e29] [--processor NAME]

EVIDENCE: the folder in which ``tools/evidence.py`` left its results. They were made here, today and by the latest
commit unless told otherwise.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import pages
from evidence_tables import span, spread, table

ACCURACY = "<!-- accuracy: written by `make figures` -->", "<!-- end of accuracy -->"
DEFAULT = "0.98"
"""Share of validation windows that counts as familiar unless a recipe says otherwise."""
RIVALS = {
    "own single": "each domain's **own single**",
    "own expert": "each domain's own expert, looked up by name",
    "generalist-full": "**a generalist** of the same size and all of the training",
    "generalist-wide": "a generalist of twice the layers",
    "average single": "a single picked blindly",
    "simple average of experts": "the average of all experts",
    "teacher": "the teacher",
}
"""What the mixture is compared with, in the order of the table."""
GUARDED = {
    "teacher": "the teacher, where it [forecasts what is unfamiliar](docs/tasks/unseen.md)",
    "average single": "a single picked blindly, likewise",
}
"""The same for a mixture that has the teacher for what is unfamiliar."""
RIVALS |= {f"guarded/{rival}": says for rival, says in GUARDED.items()}


def accuracy(found: dict[str, Any]) -> list[str]:
    """Return one table of ratios: at home over seeds, on domains nobody has seen, on public sets."""
    columns = {"demo domains": _of_seeds(found["demo"]["claims"])}
    if "held_out" in found:
        columns["demo domains left out in turn"] = {
            rival: span(of["all"]) for rival, of in found["held_out"]["claims"].items()
        } | _guarded(found, "left_out")
    if "never_seen" in found:
        columns[f"{len(found['never_seen']['files'])} public files nobody trained on"] = {
            rival: span(one) for rival, one in found["never_seen"]["claims"].items()
        } | _guarded(found, "public")
    if "real" in found:
        claims = found["real"]["claims"]
        columns["one mixture for 12 public sets"] = {
            rival: span(one) for rival, metric, *one in claims if metric == "WQL"
        }
    rows = [
        [says, *(of.get(rival, "-") for of in columns.values())]
        for rival, says in RIVALS.items()
        if any(rival in of for of in columns.values())
    ]
    return table(["WQL of the mixture against", *columns], rows)


def _guarded(found: dict[str, Any], part: str) -> dict[str, str]:
    tested = found.get("unfamiliar", {}).get(part, {}).get(DEFAULT)
    return {} if tested is None else {f"guarded/{rival}": span(tested["claims"][rival]) for rival in GUARDED}


def _of_seeds(claims: dict[str, Any]) -> dict[str, str]:
    return {rival: spread([one[0] for one in by_metric["WQL"].values()]) for rival, by_metric in claims.items()}


def main() -> None:
    """Replace what stands between the marks of the pages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("evidence", type=Path, help="folder of results")
    parser.add_argument("--date", help="when they were made")
    parser.add_argument("--commit", help="of the code that made them")
    parser.add_argument("--processor", default=pages.processor(), help="on which they were made")
    options = parser.parse_args()
    found = {path.stem: json.loads(path.read_text()) for path in options.evidence.glob("*.json")}
    machine = found["demo"].get("machine", {})
    place = f"{options.processor}, {machine.get('threads', '?')} of {machine.get('cores', '?')} cores"
    source = pages.source("make figures DATA=...", place, on=options.date, code=options.commit)
    pages.put_everywhere(accuracy(found), ACCURACY, source=source)


if __name__ == "__main__":
    main()
