"""The page that ``tools/evidence.py`` writes: Markdown tables of what was measured."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import geometric_mean, mean, stdev
from typing import Any

import yaml

PUBLISHED = Path(__file__).with_name("published.yaml")
TITLES = {
    "demo": "The demo, over seeds",
    "held_out": "Domains nobody has seen: each demo domain left out in turn",
    "never_seen": "Domains nobody has seen: the demo's mixture on public files",
    "unfamiliar": "Domains nobody has seen, with the teacher for what is unfamiliar",
    "budgets": "More training",
    "ablation": "What each part is worth",
    "routes": "Routes 2 and 3",
    "classical": "Classical models",
    "real": "One mixture for twelve public sets",
    "long_horizon": "The long-horizon protocol",
}
COMMAND = {"full": "make evidence DATA=...", "small": "make evidence SIZE=small DATA=..."}

Found = Mapping[str, Any]


def page(found: Found, *, size: str, parts: Sequence[str]) -> str:
    """Return the page; parts that are missing are named as such."""
    lines = [
        "# Results",
        "",
        f"Written by `{COMMAND[size]}` from what `tools/evidence.yaml` says"
        + ("." if size == "full" else "; **at a size at which the figures mean nothing**."),
        "Errors are WQL relative to seasonal naive, geometric means over domains; ratios are of errors on the same",
        "test windows, below 1 where the mixture is better, with 95 % intervals (bootstrap over series and windows).",
        "[The README](../README.md) says what each row is, [LOG.md](../LOG.md) what was tried.",
    ]
    for name in parts:
        lines += ["", f"## {TITLES[name]}", ""]
        if name in found:
            code = f", with the code of `{found[name]['commit']}`" if found[name].get("commit") else ""
            lines += [*SECTIONS[name](found[name]), "", f"Took {found[name]['seconds'] / 60:.0f} minutes{code}."]
        else:
            lines.append("Not measured here: it needs the public files (`DATA=`), or was not asked for.")
    machine = next((one["machine"] for one in found.values() if "machine" in one), None)
    if machine is not None:
        lines += [
            "",
            f"Times are wall-clock ones of {machine['threads']} threads on a machine of {machine['cores']} cores, with "
            f"whatever else it had to do; torch {machine['torch']}, chronos-forecasting {machine['chronos']}.",
        ]
    return "\n".join(lines) + "\n"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Return a Markdown table."""
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]


def span(ratio: Sequence[Any]) -> str:
    """Return a ratio with its interval."""
    return f"{ratio[0]:.3f} ({ratio[1]:.3f} to {ratio[2]:.3f})"


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Return a mean and the standard deviation between seeds."""
    middle = f"{mean(values):.{digits}f}"
    return middle if len(values) < 2 else f"{middle} ± {stdev(values):.{digits}f}"


def demo(found: Found) -> list[str]:
    """Ratios and errors of several seeds."""
    claims, errors, experts = found["claims"], found["errors"], found["experts"]
    seeds = list(next(iter(next(iter(claims.values())).values())))
    ratios = []
    for rival, by_metric in claims.items():
        wql, mae = ([by_metric[name][seed] for seed in seeds] for name in ("WQL", "MAE"))
        cells = [spread([one[0] for one in wql]), ", ".join(span(one) for one in wql), spread([one[0] for one in mae])]
        ratios.append([f"mixture against {rival}", *cells, wql[0][3] or "-"])
    rows = []
    for model, of in sorted(errors.items(), key=lambda item: mean(item[1]["WQL"].values())):
        cost = [spread([one[0] for one in experts[model].values()], 2)] if model in experts else ["-"]
        rows.append([model, *cost, *(spread(list(of[name].values())) for name in ("WQL", "MAE", "MASE"))])
    covered = ", ".join(
        f"{domain} {mean(of.values()):.0%}" for domain, of in found["coverage"].items() if domain != "overall"
    )
    return [
        f"`chronomoe run demo` with seeds {', '.join(seeds)}: mean ± standard deviation between seeds.",
        "",
        *table(["ratio", "WQL", "WQL of each seed", "MAE", "aimed for"], ratios),
        "",
        *table(["model", "experts a series", "WQL", "MAE", "MASE"], rows),
        "",
        f"Coverage of the mixture's 80 % interval: {covered}. Recommended, from validation alone: "
        f"{', '.join(found['deploy'].values())}.",
    ]


def held_out(found: Found) -> list[str]:
    """Ratios on each domain that was left out."""
    domains = list(next(iter(found["claims"].values())))
    return [
        "Experts, router and baselines are made without the domain, then forecast it. WQL of the mixture against:",
        "",
        *table(
            ["", *domains], ([rival, *(span(of[name]) for name in domains)] for rival, of in found["claims"].items())
        ),
        "",
        "*all*: geometric mean, with a normal interval from those of the domains.",
    ]


def never_seen(found: Found) -> list[str]:
    """Ratios and errors on files that no model was trained on."""
    models = list(next(iter(found["files"].values())))
    rows = [[name, *(f"{of[model]:.3f}" for model in models)] for name, of in found["files"].items()]
    whole = [f"{geometric_mean(of[model] for of in found['files'].values()):.3f}" for model in models]
    return [
        *table(["WQL of the mixture against", "ratio"], ([rival, span(one)] for rival, one in found["claims"].items())),
        "",
        *table(["file", *models], [*rows, ["geometric mean", *whole]]),
    ]


def unfamiliar(found: Found) -> list[str]:
    """Ratios of mixtures with a teacher on series nobody has seen, by what counts as familiar."""
    parts = {"left_out": "each demo domain left out in turn", "public": "the demo's mixture on public files"}
    lines = [
        "`unfamiliar: {forecast_by: teacher}`: the teacher forecasts what is further from all that the router learned",
        "from than a share of its validation windows, *familiar*, is. WQL of that mixture against:",
    ]
    for part, title in parts.items():
        if part not in found:
            continue
        rivals = list(next(iter(found[part].values()))["claims"])
        rows = [
            [
                share,
                *(span(one["claims"][rival]) for rival in rivals),
                span(one["at_home"]),
                f"{one['unseen']:.0%}",
                f"{one['familiar']:.1%}",
            ]
            for share, one in found[part].items()
        ]
        names = ["the mixture without" if rival == "mixture" else rival for rival in rivals]
        head = ["familiar", *names, "without, on its own domains", "unseen to the teacher", "own to the teacher"]
        lines += ["", f"*{title}*:", "", *table(head, rows)]
    return lines


def budgets(found: Found) -> list[str]:
    """Errors by training steps."""
    rows = [
        [steps, f"{one['mixture']:.3f}", f"{one['generalist-full']:.3f}", span(one["claim"])]
        for steps, one in found["steps"].items()
    ]
    return table(["steps in all", "mixture", "generalist of the same budget", "ratio"], rows)


def ablation(found: Found) -> list[str]:
    """What changes do to the validation error."""
    rows = [
        [
            name,
            spread([one["ratio"] for one in of], 4),
            ", ".join(f"{one['ratio']:.3f}" for one in of),
            spread([one["experts"] for one in of], 2),
        ]
        for name, of in found["rows"].items()
    ]
    return [
        "One thing changed at a time, validation windows only: WQL over that of the demo as it is, with the same seed;",
        "mean ± standard deviation between seeds. In every row the router's early stopping saw some of the windows.",
        "",
        *table(["change", "WQL", "each seed", "experts a series"], rows),
    ]


def routes(found: Found) -> list[str]:
    """Errors of the three routes, and what routes 2 and 3 gain over dense students."""
    rows = [
        [name, f"{size / 1e6:.2f}M", f"{flops / 1e6:.0f}M", f"{wql:.3f}", f"{mae:.3f}"]
        for name, (size, flops, wql, mae) in found["rows"].items()
    ]
    ratios = [
        [f"{name} against {rival}", span(one)]
        for name, rival, *one in found["claims"]
        if name != "mixture" and rival.startswith("generalist")
    ]
    return [
        "All on the same budget of training operations: *upcycled* (route 2) is a dense student with MoE layers,",
        "*expanded* (route 3) grew MoE layers on a finished student, *generalist-base*.",
        "",
        *table(["model", "active parameters", "operations", "WQL", "MAE"], rows),
        "",
        *table(["ratio", "WQL, test windows"], ratios),
    ]


def classical(found: Found) -> list[str]:
    """Errors of models that are fitted to each context alone."""
    rows = [
        [name, *(f"{of[metric]:.3f}" for metric in ("WQL", "MAE", "MASE")), f"{of['milliseconds']:.0f} ms"]
        for name, of in found["rows"].items()
    ]
    return [
        f"Demo domains, {found['windows']} test windows each; models of statsforecast, fitted to each context alone.",
        "",
        *table(["model", "WQL", "MAE", "MASE", "time of a window"], rows),
    ]


def real(found: Found) -> list[str]:
    """Ratios and errors of the mixture for all public files."""
    rows = [[f"mixture against {rival}", metric, span(one), one[3] or "-"] for rival, metric, *one in found["claims"]]
    errors = found["errors"]
    models = sorted(errors, key=lambda model: errors[model]["overall"]["WQL"])
    cost = found["experts"]
    return [
        *table(["ratio", "metric", "test windows", "aimed for"], rows),
        "",
        *table(
            ["model", "experts a series", "WQL", "MAE", "MASE"],
            (
                [
                    model,
                    f"{cost[model][0]:.2f}" if model in cost else "-",
                    *(f"{errors[model]['overall'][metric]:.3f}" for metric in ("WQL", "MAE", "MASE")),
                ]
                for model in models
            ),
        ),
        "",
        f"Recommended, from validation alone: {found['deploy']}.",
    ]


def long_horizon(found: Found) -> list[str]:
    """MSE and MAE beside published ones."""
    published = yaml.safe_load(PUBLISHED.read_text())
    settings = found["settings"]
    models = list(next(iter(found["scores"].values())))
    rows = []
    for name, scores in found["scores"].items():
        for place, horizon in enumerate(settings["horizons"]):
            own = [f"{scores[model][place]['mse']:.3f} / {scores[model][place]['mae']:.3f}" for model in models]
            rows.append([name, str(horizon), *own, *(cell(one, name, horizon) for one in published.values())])
    strides = ", ".join(f"{name} {stride}" for name, stride in settings["stride"].items())
    return [
        f"MSE / MAE of the median, series z-scored by their train rows, contexts of {settings['context_length']}; a",
        f"test window every so many rows: {strides}. ETT: 12, 4 and 4 months; weather: 70, 10 and 20 %. Mixture,",
        "generalist and teacher are ours; the first two learned the train rows of these and seven other sets, at a",
        "horizon of 96. The others were never trained on these sets; their figures were published, for a stride of 1:",
        "",
        *(f"- **{name}**: {one['what']} ({one['source']})" for name, one in published.items()),
        "",
        *table(["set", "horizon", *models, *published], rows),
    ]


def cell(published: Found, name: str, horizon: int) -> str:
    """Return a published MSE, with MAE where there is one."""
    figures = published["figures"].get(name, {}).get(horizon)
    return "-" if figures is None else " / ".join(f"{figure:.3f}" for figure in figures)


SECTIONS = {
    "demo": demo,
    "held_out": held_out,
    "never_seen": never_seen,
    "unfamiliar": unfamiliar,
    "budgets": budgets,
    "ablation": ablation,
    "routes": routes,
    "classical": classical,
    "real": real,
    "long_horizon": long_horizon,
}
