"""Make a finished pretraining run the teacher that ships as "tiny": checkpoint, and model card with its scores.

    python tools/ship_teacher.py RUN --data FOLDER [--out FOLDER]

RUN: folder of ``chronomoe pretrain``. FOLDER: wide Parquet files for tools/score_teacher.py, not in the project.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from chronomoe.pipeline import ChronoMoEPipeline, load_teacher
from chronomoe.pretraining.card import card_sections, read_config

TINY = Path(__file__).parents[1] / "src" / "chronomoe" / "assets" / "tiny"


def score(tool: str, *words: str) -> dict[str, Any]:
    """Run a scoring tool and return its one JSON line."""
    command = [sys.executable, str(Path(__file__).with_name(f"{tool}.py")), *words]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def results(series: dict[str, Any], covariates: dict[str, Any]) -> str:
    """Return the section of a card that says how good a teacher is."""
    whole = series["summary"]
    lines = [
        "Zero-shot, median forecast, context 512, horizon 96, at most 400 test windows of each data set, a horizon "
        "apart; WQL and MAE relative to a seasonal naive forecast (`tools/score_teacher.py` states the protocol).\n",
        "| data set | WQL | MAE | coverage of the 80 % interval |",
        "| --- | --- | --- | --- |",
    ]
    for name, row in series["files"].items():
        lines.append(f"| {name} | {row['WQL']:.3f} | {row['MAE']:.3f} | {row['coverage']:.2f} |")
    lines.append(
        f"| geometric mean (mean coverage) | {whole['WQL']:.3f} | {whole['MAE']:.3f} | {whole['coverage']:.2f} |"
    )
    gains = ", ".join(
        f"{name} {whole[f'{name} MSE']:.3f} / {whole[f'{name} MAE']:.3f}"
        for name in ("ETTh1", "ETTh2")
        if f"{name} MSE" in whole
    )
    lines += [
        f"\nMSE / MAE on values z-scored by the train rows, test windows every 24 hours: {gains}.\n",
        "Synthetic tasks that one known future covariate drives (`tools/score_covariates.py`): error with it, relative "
        f"to without: {covariates['ratio']['all']:.3f}.",
    ]
    return "\n".join(lines)


def main() -> None:
    """Score the run's teacher and write it where the package keeps its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a finished pretraining run")
    parser.add_argument("--data", type=Path, required=True, help="folder of wide Parquet files")
    parser.add_argument("--out", type=Path, default=TINY)
    options = parser.parse_args()
    model = load_teacher(options.run, dtype="auto")
    sections = card_sections(model, read_config(options.run), corpus=options.run / "corpus")
    series = score("score_teacher", str(options.run), "--data", str(options.data))
    sections["Results"] = results(series, score("score_covariates", str(options.run)))
    ChronoMoEPipeline(model).save_pretrained(options.out, sections=sections)
    print(json.dumps(series["summary"]))


if __name__ == "__main__":
    main()
