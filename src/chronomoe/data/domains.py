"""Domains: series that belong together, their main period, and where they are cut into train, validation and test."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import datasets

from chronomoe.data.benchmarks import BENCHMARKS, read_benchmark
from chronomoe.data.checks import listed, one_line
from chronomoe.data.files import only_split, read_series, suffix_of
from chronomoe.data.frequency import default_seasonality
from chronomoe.data.intake import dataset_to_series
from chronomoe.data.series import TARGET, Series
from chronomoe.data.split import Split, Stops
from chronomoe.data.table import layout_of
from chronomoe.errors import InputError, nearest

__all__ = ["BENCHMARKS", "Domain", "Split", "Stops", "demo_domains", "load_domain"]

DEMO, HUB = "demo:", "hub:"
OVERALL = "overall"
"""What tables and records call all domains together."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Domain:
    """Series that belong together."""

    name: str
    """Shown in tables and reports."""
    series: Sequence[Series]
    """All with the same step, variates and covariates."""
    seasonality: int
    """Steps of the main period, for MASE and the seasonal naive forecast."""
    cutoffs: Split = field(default_factory=Split)
    """Where the series are split."""
    description: str = ""
    """One line on what the series are."""

    def __post_init__(self) -> None:
        if self.name == OVERALL:
            raise InputError(f"a domain cannot be named {OVERALL!r}, which is what tables call all of them; rename it")
        if self.seasonality < 1:
            raise InputError(f"seasonality must be at least 1 step, got {self.seasonality} for domain {self.name!r}")
        if len(self.series) == 0:
            raise InputError(f"a domain needs at least one series, domain {self.name!r} has none")
        layout_of(self.series, name=self.name)

    @property
    def freq(self) -> str:
        """Pandas alias of one step."""
        return self.series[0].freq

    def split(self, series: Series) -> Stops:
        """Return the rows at which train, validation and test end in one of the series.

        Targets of a part lie within its rows; the context of a validation or test window may reach back before them.
        """
        return self.cutoffs.of(len(series))


def demo_domains() -> list[str]:
    """Return the names of the domains that ship with the package."""
    return list(_demo_entries())


def load_domain(
    spec: str | os.PathLike[str] | datasets.Dataset,
    *,
    name: str | None = None,
    folder: str | os.PathLike[str] | None = None,
    target: str | Sequence[str] = TARGET,
    known_covariates: Sequence[str] = (),
    freq: str | None = None,
    seasonality: int | None = None,
    split: Split | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> Domain:
    """Load a domain by name, path or hub id.

    Args:
        spec: ``demo:<name>`` for one that ships with the package; a name in ``BENCHMARKS``; a file or folder that
            ``read_series`` reads; ``hub:<owner>/<repo>[/<config>]``, such as
            ``hub:autogluon/chronos_datasets/monash_traffic``, or ``hub:<folder>[/<config>]`` in the hub's layout; or a
            `datasets.Dataset` as fev has them.
        name: What to call it; by default what ``spec`` calls it.
        folder: Where the files of a benchmark lie, at any depth: ``<name>.csv``, or else ``<name>.parquet``.
        target: Column to forecast, or several for multivariate series.
        known_covariates: Columns whose future is known at forecast time.
        freq: Pandas alias of one step; by default what is known about the domain, or inferred.
        seasonality: Steps of the main period; by default what is known, or ``default_seasonality`` of the step.
        split: Where to cut; by default what is known, or 70, 10 and 20 % of each series.
        cache_dir: As in ``read_series``; for the hub, the cache of `datasets`.

    Raises:
        InputError: there is no such domain, or its data break a rule of ``read_series``.

    Examples:
        >>> domain = load_domain("demo:traffic")
        >>> domain.name, domain.series[0].freq, domain.seasonality
        ('traffic', '15min', 96)
    """
    known: dict[str, Any] = {}
    columns: dict[str, Any] = {"target": target, "known_covariates": known_covariates, "freq": freq}
    series: Sequence[Series]
    if isinstance(spec, datasets.Dataset):
        found, series = "dataset", dataset_to_series(spec, **columns)
    elif str(spec).startswith(DEMO):
        found, entries = str(spec).removeprefix(DEMO), _demo_entries()
        if found not in entries:
            raise InputError(f"Unknown demo domain {found!r}. Available: {listed(entries)}.{nearest(found, entries)}")
        known = entries[found]
        columns["freq"] = freq or known["freq"]
        with resources.as_file(_demo_folder() / known["file"]) as path:
            series = read_series(path, **columns)
    elif str(spec).startswith(HUB):
        found, dataset = _load_hub(str(spec).removeprefix(HUB), cache_dir)
        series = dataset_to_series(dataset, **columns)
    elif str(spec) in BENCHMARKS and (folder is not None or not Path(spec).exists()):
        if folder is None:
            raise InputError(f"{spec} does not ship with the package; pass folder=, where {spec}.csv lies")
        found = str(spec)
        known = BENCHMARKS[found]._asdict()
        series = read_benchmark(found, folder, **columns)
    else:
        path = Path(spec)
        if not path.exists() and len(path.parts) == 1 and not suffix_of(path):
            raise _unknown(str(spec))
        found = path.name.removesuffix(suffix_of(path))
        series = read_series(path, cache_dir=cache_dir, **columns)
    if seasonality is None:
        seasonality = known.get("seasonality") or default_seasonality(series[0].freq)
    return Domain(
        name=name or found,
        series=series,
        seasonality=seasonality,
        cutoffs=split or known.get("split") or Split(),
        description=known.get("description", ""),
    )


def _demo_folder() -> Traversable:
    return resources.files("chronomoe") / "assets" / "demo"


def _demo_entries() -> dict[str, dict[str, Any]]:
    """Return what ``domains.json`` says of each domain: ``file``, ``freq``, ``seasonality``, ``description``."""
    index = _demo_folder() / "domains.json"
    if not index.is_file():
        raise InputError(f"the demo series are not installed, {index} is missing; reinstall chronomoe, or pass a file")
    entries: dict[str, dict[str, Any]] = json.loads(index.read_text(encoding="utf-8"))
    return entries


def _load_hub(place: str, cache_dir: str | os.PathLike[str] | None) -> tuple[str, datasets.Dataset]:
    """Return the short name and the data of ``<owner>/<repo>[/<config>]`` or of a folder like that."""
    parts = place.strip("/").split("/")
    if place and Path(place).is_dir():
        repo, config = place, None
    elif Path(place).parent.is_dir() and len(Path(place).parts) > 1:
        repo, config = str(Path(place).parent), Path(place).name
    elif len(parts) in (2, 3) and all(parts):
        repo, config = "/".join(parts[:2]), parts[2] if len(parts) == 3 else None
    else:
        raise InputError(f"a hub id must be hub:<owner>/<repo> or hub:<owner>/<repo>/<config>, got {HUB + place!r}")
    try:
        found = datasets.load_dataset(repo, config, cache_dir=None if cache_dir is None else str(cache_dir))
    except (OSError, ValueError, datasets.exceptions.DatasetGenerationError) as error:
        raise InputError(
            f"{HUB + place!r} cannot be loaded: {one_line(error)}; "
            "check the id and its config, and that the hub can be reached"
        ) from None
    return config or Path(repo).name, only_split(found, HUB + place)


def _unknown(spec: str) -> InputError:
    try:
        demos = [DEMO + name for name in _demo_entries()]
    except InputError:  # installed without them
        demos = []
    names = [*demos, *BENCHMARKS]
    same = next((name for name in names if name.lower() in (spec.lower(), DEMO + spec.lower())), None)
    hint = f" Did you mean {same!r}?" if same else nearest(spec, names) or nearest(DEMO + spec, demos)
    return InputError(
        f"Unknown domain {spec!r}. Available: {', '.join(names)}, {HUB}<owner>/<repo>[/<config>] or a path.{hint}"
    )
