"""Measure what the project claims, from runs of its recipes, and write docs/results.md; called by ``make evidence``.

    python tools/evidence.py [--size full|small] [--data FOLDER] [--out FOLDER] [--part NAME ...] [--write FILE]

``tools/evidence.yaml`` says what is run. Every run and every part is a stage: the same command continues after a kill
and skips what is there. Without ``--data`` (a folder of the public files that the YAML names) the parts that need it
are left out. Parts that are neither run nor found in ``--out`` are named as missing in the results.
"""

import argparse
import importlib.util
import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import evidence_tables
import numpy as np
import pages
import yaml
from ablation import ablate, link
from unfamiliar import with_teacher

from chronomoe.data.domains import load_domain
from chronomoe.evaluation.comparison import MIXTURE, Candidate, compare_models
from chronomoe.evaluation.external import classical, compare_forecasters, own_forecaster
from chronomoe.evaluation.long_horizon import long_horizon
from chronomoe.evaluation.metrics import bootstrap_relative, relative
from chronomoe.evaluation.tasks import make_task
from chronomoe.inputs import load
from chronomoe.models.configuration import parse
from chronomoe.pipeline import ChronoMoEPipeline, load_teacher
from chronomoe.recipe import RunConfig, dump, load_recipe
from chronomoe.run import run
from chronomoe.stages.workspace import Workspace

SETTINGS = Path(__file__).with_name("evidence.yaml")
PLACE = "{data}"
"""Stands for the folder of public files in the settings."""
UNSEEN_RIVALS = ("average single", "average expert", "generalist-full", "generalist-wide", "teacher")
DRAWS = 1000

Settings = Mapping[str, Any]


def merged(base: Settings, changes: Settings) -> dict[str, Any]:
    """Return settings with changes, key by key at every depth."""
    return dict(base) | {
        key: merged(base[key], value) if isinstance(value, Mapping) and isinstance(base.get(key), Mapping) else value
        for key, value in changes.items()
    }


def placed(value: Any, folder: Path | None) -> Any:
    """Put the folder of public files where the settings name it."""
    if isinstance(value, Mapping):
        return {key: placed(inner, folder) for key, inner in value.items()}
    if isinstance(value, list):
        return [placed(inner, folder) for inner in value]
    return value.replace(PLACE, str(folder)) if isinstance(value, str) else value


class Evidence:
    """The settings of one size, and the folder in which runs and parts are kept."""

    def __init__(self, settings: Settings, data: Path | None, out: Path) -> None:
        self.settings, self.data, self.out = placed(settings, data), data, out
        self.work = Workspace(out / "parts")
        recipe = yaml.safe_load(dump(load_recipe(settings["recipe"])))
        self.recipe = merged(recipe, self.settings["changes"])

    def config(self, *changes: Settings) -> RunConfig:
        """Return the recipe with changes."""
        values = self.recipe
        for change in changes:
            values = merged(values, change)
        config: RunConfig = parse(values, RunConfig, source=str(SETTINGS))
        return config

    def finished(self, name: str, *changes: Settings) -> Path:
        """Return the folder of a run, made unless it is there."""
        folder = self.out / "runs" / name
        run(self.config(*changes), folder)
        return folder

    def demos(self) -> dict[int, Path]:
        """Return the run of each seed."""
        return {seed: self.finished(f"demo-{seed}", {"seed": seed}) for seed in self.settings["seeds"]}

    def without(self) -> dict[str, Path]:
        """Return a run for each domain that leaves it out."""
        found = {}
        for left_out in self.recipe["domains"]:
            name = load_domain(left_out["data"]).name
            others = [domain for domain in self.recipe["domains"] if domain != left_out]
            changes = {"domains": others, "held_out": [left_out]}
            found[name] = self.finished(f"without-{name}", self.settings["held_out"], changes)
        return found

    def budgets(self) -> dict[int, Path]:
        """Return runs of other budgets, and of the recipe's own."""
        changes = self.settings["budgets"]["changes"]
        found = {
            steps: self.finished(f"budget-{steps}", changes, {"budget": {"steps": steps}})
            for steps in self.settings["budgets"]["steps"]
        }
        found[self.recipe["budget"]["steps"]] = self.finished("demo-0", {"seed": 0})
        return dict(sorted(found.items()))

    def part(self, name: str, inputs: Any, make: Callable[[], Any]) -> Any:
        """Return what a part measured, as JSON, from its stage."""
        made = self.work.stage(name, inputs, lambda folder, _: write(folder / "found.json", make()))
        return json.loads((made / "found.json").read_text())


def write(path: Path, value: Any) -> None:
    """Write a value as JSON."""
    path.write_text(json.dumps(value, indent=1))


def read(run_folder: Path, name: str) -> Any:
    """Read a result of a run."""
    text = (run_folder / name).read_text()
    return [json.loads(line) for line in text.splitlines()] if name.endswith("l") else json.loads(text)


def demo(evidence: Evidence) -> Any:
    """Claims and errors of each seed."""
    found: dict[str, Any] = {"claims": {}, "errors": {}, "experts": {}, "coverage": {}, "deploy": {}}
    for seed, folder in evidence.demos().items():
        for claim in read(folder, "intervals.json"):
            ends = [claim["ratio"], claim["low"], claim["high"], claim["target"]]
            found["claims"].setdefault(claim["against"], {}).setdefault(claim["metric"], {})[seed] = ends
        for record in read(folder, "evaluation.jsonl"):
            if record["domain"] == "overall" and record["kind"] not in ("single", "expert"):
                found["errors"].setdefault(record["model"], {}).setdefault(record["metric"], {})[seed] = record["value"]
            elif record["model"] == MIXTURE and record["metric"] == "coverage80":
                found["coverage"].setdefault(record["domain"], {})[seed] = record["value"]
        for cost in read(folder, "efficiency.json"):
            found["experts"].setdefault(cost["model"], {})[seed] = [cost["experts"], cost["flops"]]
        found["deploy"][seed] = read(folder, "recommendation.json")["model"]
    return found | timed(evidence.demos().values())


def held_out(evidence: Evidence) -> Any:
    """Claims on each domain by the models that never saw it, and on all of them together."""
    runs = evidence.without()
    claims: dict[str, dict[str, list[float]]] = {}
    for name, folder in runs.items():
        for claim in read(folder, "intervals.json"):
            if claim["unseen"] and claim["metric"] == "WQL":
                claims.setdefault(claim["against"], {})[name] = [claim["ratio"], claim["low"], claim["high"]]
    return {"claims": {rival: by | {"all": together(list(by.values()))} for rival, by in claims.items()}} | timed(
        runs.values()
    )


def together(ratios: list[list[float]]) -> list[float]:
    """Put ratios of independent windows together: geometric mean, and a normal interval from theirs."""
    logs = np.log(ratios)
    spread = np.sqrt((((logs[:, 2] - logs[:, 1]) / (2 * 1.96)) ** 2).sum()) / len(ratios)
    mean = logs[:, 0].mean()
    return [float(math.exp(mean + shift * spread)) for shift in (0, -1.96, 1.96)]


def never_seen(evidence: Evidence) -> Any:
    """Score the demo's models on public files that none of them was trained on."""
    folder, limit = evidence.demos()[0], evidence.settings["never_seen"]["limit"]
    windows = evidence.config().windows
    files = sorted(evidence.data.glob("*.parquet")) if evidence.data else []

    def make() -> Any:
        candidates = {MIXTURE: Candidate(model=loaded(folder / "moe"), kind="mixture")}
        candidates["teacher"] = Candidate(model=load_teacher(evidence.config().teacher), kind="teacher")
        for stage in sorted((folder / "stages" / "students").iterdir()):
            kind, _, domain = stage.name.partition("-")
            if kind in ("single", "expert", "generalist"):
                name = f"{kind}/{domain}" if kind in ("single", "expert") else stage.name
                kind = "expert" if stage.name == "generalist" else kind
                model = loaded(stage / "model")
                candidates[name] = Candidate(model=model, kind=kind, domain=domain if kind != "generalist" else None)
        tasks = {path.stem: make_task(load_domain(path), windows, limit=limit) for path in files}
        levels = list(candidates["teacher"].model.chronos_config.quantiles)
        rows = compare_models(candidates, tasks, levels=levels).rows
        own, naive = rows[MIXTURE].test, rows["seasonal naive"].test
        return {
            "claims": {
                rival: list(bootstrap_relative(own, rows[rival].test, "WQL", draws=DRAWS, seed=0))
                for rival in UNSEEN_RIVALS
                if rival in rows
            },
            "files": {
                name: {
                    rival: relative({name: rows[rival].test[name]}, {name: naive[name]}, "WQL")
                    for rival in (MIXTURE, *UNSEEN_RIVALS)
                    if rival in rows
                }
                for name in tasks
            },
        }

    inputs = {"run": read(folder / "stages" / "evaluation", "stage.json")["key"], "limit": limit}
    return evidence.part("never-seen", inputs | {"files": [path.name for path in files]}, make) | seconds(
        evidence, "never-seen"
    )


def loaded(folder: Path) -> Any:
    """Load the model of a checkpoint."""
    return ChronoMoEPipeline.from_pretrained(folder).model


def unfamiliar(evidence: Evidence) -> Any:
    """Give finished mixtures a teacher for unfamiliar series: on domains left out, and on the public files."""
    settings, config = evidence.settings["unfamiliar"], evidence.config()
    runs, teacher = evidence.without(), load_teacher(config.teacher)
    domains = {domain.name: domain for domain in map(load, config.domains)}
    limit = config.evaluation.windows_per_domain
    tasks = {name: make_task(domain, config.windows, limit=limit) for name, domain in domains.items()}
    files = sorted(evidence.data.glob("*.parquet")) if evidence.data else []

    def make() -> Any:
        by_domain = {}
        for name, folder in runs.items():
            home = {other: task for other, task in tasks.items() if other != name}
            by_domain[name] = with_teacher(folder, teacher, {name: tasks[name]}, home, familiar=settings["familiar"])
        found: dict[str, Any] = {
            "left_out": {str(share): _averaged(by_domain, str(share)) for share in settings["familiar"]}
        }
        if files:
            few = evidence.settings["never_seen"]["limit"]
            public = {path.stem: make_task(load_domain(path), config.windows, limit=few) for path in files}
            tested = with_teacher(evidence.demos()[0], teacher, public, tasks, familiar=settings["familiar"])
            found["public"] = {share: one._asdict() for share, one in tested.items()}
        return found

    inputs = {
        "runs": {name: read(folder / "stages" / "router", "stage.json")["key"] for name, folder in runs.items()},
        "settings": settings,
        "files": [path.name for path in files],
    }
    return evidence.part("unfamiliar", inputs, make) | seconds(evidence, "unfamiliar")


def _averaged(by_domain: Mapping[str, Mapping[str, Any]], share: str) -> dict[str, Any]:
    """Put the results of domains left out in turn together."""
    tested = [of[share] for of in by_domain.values()]
    return {
        "claims": {rival: together([one.claims[rival] for one in tested]) for rival in tested[0].claims},
        "unseen": float(np.mean([one.unseen for one in tested])),
        "familiar": float(np.mean([one.familiar for one in tested])),
        "at_home": together([one.at_home for one in tested]),
    }


def real(evidence: Evidence) -> Any:
    """Compare one mixture for all public files with what its user would have otherwise."""
    folder = evidence.finished("real", evidence.settings["real"])
    claims = {
        (claim["against"], claim["metric"]): [claim["ratio"], claim["low"], claim["high"], claim["target"]]
        for claim in read(folder, "intervals.json")
    }
    records = read(folder, "evaluation.jsonl")
    errors: dict[str, dict[str, dict[str, float]]] = {}
    for record in records:
        if record["kind"] not in ("single", "expert"):
            errors.setdefault(record["model"], {}).setdefault(record["domain"], {})[record["metric"]] = record["value"]
    return {
        "claims": [[*key, *value] for key, value in claims.items()],
        "errors": errors,
        "experts": {cost["model"]: [cost["experts"], cost["flops"]] for cost in read(folder, "efficiency.json")},
        "deploy": read(folder, "recommendation.json")["model"],
    } | timed([folder])


def horizons(evidence: Evidence) -> Any:
    """Score that mixture, and the teacher, by the long-horizon protocol."""
    folder, settings = evidence.finished("real", evidence.settings["real"]), evidence.settings["long_horizon"]

    def make() -> Any:
        config = evidence.config(evidence.settings["real"])
        students = folder / "stages" / "students"
        models = {MIXTURE: loaded(folder / "moe"), "teacher": load_teacher(config.teacher)}
        models["generalist-full"] = loaded(students / "generalist-full" / "model")
        domains = {domain.name: domain for domain in map(load, config.domains)}
        return {
            name: {
                model_name: [
                    score._asdict()
                    for score in long_horizon(
                        model,
                        domains[name],
                        horizons=settings["horizons"],
                        context_length=settings["context_length"],
                        stride=stride,
                    )
                ]
                for model_name, model in models.items()
            }
            for name, stride in settings["stride"].items()
        }

    inputs = {"run": read(folder / "stages" / "evaluation", "stage.json")["key"], "settings": settings}
    found = evidence.part("long-horizon", inputs, make)
    return {"scores": found, "settings": settings} | seconds(evidence, "long-horizon")


def budgets(evidence: Evidence) -> Any:
    """Errors by training budget."""
    runs, found = evidence.budgets(), {}
    for steps, folder in runs.items():
        errors = {
            record["model"]: record["value"]
            for record in read(folder, "evaluation.jsonl")
            if record["domain"] == "overall" and record["metric"] == "WQL"
        }
        (claim,) = (
            claim
            for claim in read(folder, "intervals.json")
            if (claim["against"], claim["metric"], claim["unseen"]) == ("generalist-full", "WQL", False)
        )
        found[steps] = {
            **{name: errors[name] for name in (MIXTURE, "generalist-full")},
            "claim": [claim["ratio"], claim["low"], claim["high"]],
        }
    return {"steps": found} | timed(runs.values())


def classical_models(evidence: Evidence) -> Any:
    """Score classical models, fitted to each context alone, beside the mixture on a sample of the demo's windows."""
    folder, settings = evidence.demos()[0], evidence.settings["classical"]
    config = evidence.config()

    def make() -> Any:
        forecasters = {name: classical(name) for name in settings["models"]}
        forecasters |= {MIXTURE: own_forecaster(loaded(folder / "moe"))}
        tasks = {
            domain.name: make_task(domain, config.windows, limit=settings["windows"])
            for domain in map(load, config.domains)
        }
        levels = loaded(folder / "moe").chronos_config.quantiles
        comparison, took = compare_forecasters(forecasters, tasks, levels=levels)
        naive = comparison.rows["seasonal naive"].test
        return {
            name: {metric: relative(comparison.rows[name].test, naive, metric) for metric in ("WQL", "MAE", "MASE")}
            | {"milliseconds": 1000 * took[name]}
            for name in forecasters
        }

    inputs = {"run": read(folder / "stages" / "evaluation", "stage.json")["key"], "settings": settings}
    found = {"rows": evidence.part("classical", inputs, make), "windows": settings["windows"]}
    return found | seconds(evidence, "classical")


def routes(evidence: Evidence) -> Any:
    """Compare the three routes on one budget; what the demo has made is taken over."""
    folder = evidence.out / "runs" / "routes"
    if not folder.exists():
        link(evidence.demos()[0], folder)
    evidence.finished("routes", evidence.settings["routes"])
    errors = {
        (record["model"], record["metric"]): record["value"]
        for record in read(folder, "evaluation.jsonl")
        if record["domain"] == "overall"
    }
    costs = {cost["model"]: cost for cost in read(folder, "efficiency.json")}
    claims = [
        [claim["model"], claim["against"], claim["ratio"], claim["low"], claim["high"]]
        for claim in read(folder, "intervals.json")
        if claim["metric"] == "WQL" and not claim["unseen"]
    ]
    rows = {
        name: [costs[name]["active_parameters"], costs[name]["flops"], errors[name, "WQL"], errors[name, "MAE"]]
        for name in ("mixture", "upcycled", "expanded", "generalist-base", "generalist-full", "generalist-wide")
        if name in costs
    }
    return {"rows": rows, "claims": claims} | timed([folder])


def ablation(evidence: Evidence) -> Any:
    """What each part of a mixture is worth on validation windows."""
    runs, settings = evidence.demos(), evidence.settings["ablation"]

    def make() -> Any:
        found: dict[str, list[Any]] = {}
        for seed, folder in runs.items():
            again = settings["experts"] if seed in settings["experts_seeds"] else {}
            rows = {"as it is": {}} | settings["routers"] | again
            configs = {name: evidence.config({"seed": seed}, changes) for name, changes in rows.items()}
            for name, result in ablate(configs, folder, evidence.out / "ablation" / str(seed)).items():
                found.setdefault(name, []).append(result)
        return found

    inputs = {
        "settings": settings,
        "runs": [read(folder / "stages" / "router", "stage.json") for folder in runs.values()],
    }
    return {"rows": evidence.part("ablation", inputs, make)} | seconds(evidence, "ablation")


def timed(runs: Iterable[Path]) -> dict[str, Any]:
    """Return the time that the stages of runs took, whenever that was, and the machine."""
    facts = [read(folder, "run.json") for folder in runs]
    return {"seconds": sum(sum(one["seconds"].values()) for one in facts), "machine": facts[-1]["machine"]}


def seconds(evidence: Evidence, stage: str) -> dict[str, float]:
    """Return the time that a part took besides its runs."""
    return {"seconds": evidence.work.seconds[stage]}


PARTS: dict[str, tuple[Callable[[Evidence], Any], bool]] = {
    "demo": (demo, False),
    "held_out": (held_out, False),
    "never_seen": (never_seen, True),
    "unfamiliar": (unfamiliar, False),
    "budgets": (budgets, False),
    "ablation": (ablation, False),
    "routes": (routes, False),
    "classical": (classical_models, False),
    "real": (real, True),
    "long_horizon": (horizons, True),
}
"""What is measured, in this order, and whether it needs the public files."""


def main() -> None:
    """Run the parts that are asked for and write the results of all that are there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = yaml.safe_load(SETTINGS.read_text())
    parser.add_argument("--size", choices=sizes, default="full", help="full takes hours, small shows that it works")
    parser.add_argument("--data", type=Path, help="folder of the public files that tools/evidence.yaml names")
    parser.add_argument("--out", type=Path, default=Path("runs/evidence"), help="for runs and results")
    parser.add_argument("--part", choices=PARTS, action="append", help="only these; all by default")
    parser.add_argument("--write", type=Path, default=Path("docs/results.md"), help="the page to write")
    options = parser.parse_args()
    if options.data is not None and not options.data.is_dir():
        parser.error(f"--data must be a folder, {options.data} is none")
    options.out.mkdir(parents=True, exist_ok=True)
    evidence = Evidence(sizes[options.size], options.data and options.data.resolve(), options.out)
    for name, (measure, needs_data) in PARTS.items():
        if options.part and name not in options.part:
            continue
        if needs_data and options.data is None:
            print(f"{name}: left out, it needs --data")
            continue
        if name == "classical" and importlib.util.find_spec("statsforecast") is None:
            print("classical: left out, it needs the extra 'baselines'")
            continue
        write(options.out / f"{name}.json", measure(evidence) | {"commit": pages.commit(marked=True)})
    found = {
        name: json.loads((options.out / f"{name}.json").read_text())
        for name in PARTS
        if (options.out / f"{name}.json").exists()
    }
    options.write.parent.mkdir(parents=True, exist_ok=True)
    options.write.write_text(evidence_tables.page(found, size=options.size, parts=list(PARTS)))
    print(f"wrote {options.write}")


if __name__ == "__main__":
    main()
