"""The commands that read a recipe of a run: ``run`` and ``plan``."""

import shlex
import sys
from dataclasses import replace
from typing import Annotated, Any

import typer

from chronomoe.cli import options as opt
from chronomoe.cli.tables import print_plan, print_summary

Recipe = Annotated[str, typer.Argument(help="Name of a recipe, such as demo, or a YAML file with the same fields.")]
Teacher = Annotated[str | None, typer.Option(help="Teacher to use instead of the recipe's. " + opt.MODEL_HELP)]
Steps = Annotated[int | None, typer.Option(help="Training steps instead of the recipe's.")]
Device = Annotated[str | None, typer.Option(help="Device instead of the recipe's: " + opt.DEVICE_HELP)]


def run(recipe: Recipe, out: opt.Out, teacher: Teacher = None, steps: Steps = None, device: Device = None) -> None:
    """Distil experts, train the router, evaluate, and write a report.

    Writes report.html, report.md, evaluation.jsonl, config.yaml, the checkpoint
    moe/ and recommended/, the one to deploy. After an interruption the same
    command continues and skips finished stages. A recipe of your own has the
    fields of config.yaml; what it leaves out keeps its default.

    Example: chronomoe run demo --out runs/demo

    Common errors: an unknown recipe or key (the message lists those that
    exist), series too short for context and horizon, and an output folder that
    holds something else.
    """
    from chronomoe.checkpoints.writing import check_parent
    from chronomoe.run import run as run_recipe

    check_parent(out)
    config = _read(recipe, teacher, steps, device)
    report = run_recipe(config, out, command=shlex.join(["chronomoe", *sys.argv[1:]]))
    print_summary(out)
    print(f"report: {report}")


def plan(recipe: Recipe, teacher: Teacher = None, steps: Steps = None, device: Device = None) -> None:
    """Say what a run would train, and about how much time, memory and disk.

    Reads the series and the teacher, and times a training step and a forecast
    of each size of model here, which takes seconds. Writes nothing.

    Example: chronomoe plan demo

    Common errors: an unknown recipe or key (the message lists those that
    exist), and series too short for context and horizon.
    """
    from chronomoe.inputs import Inputs
    from chronomoe.plan import plan as plan_recipe

    given = Inputs(_read(recipe, teacher, steps, device), None)
    given.check_routes()
    print_plan(plan_recipe(given))


def _read(recipe: str, teacher: str | None, steps: int | None, device: str | None) -> Any:
    from chronomoe.recipe import load_recipe

    config = load_recipe(recipe)
    given = {name: value for name, value in (("teacher", teacher), ("device", device)) if value is not None}
    budget = config.budget if steps is None else replace(config.budget, steps=steps)
    return replace(config, budget=budget, **given)
