"""Recipes: all that a run does, as one frozen configuration, named or in a YAML file."""

import dataclasses
import types
import typing
from dataclasses import asdict, dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import TypeAdapter, ValidationError

from chronomoe.data.windows import WindowConfig
from chronomoe.errors import InputError, nearest
from chronomoe.models.mixture.mixture import MixtureConfig
from chronomoe.models.sparse.config import MoEConfig
from chronomoe.models.student import StudentConfig
from chronomoe.training.losses import LossConfig
from chronomoe.training.routing import RouterTrainingConfig

Route = Literal["mixture", "upcycle", "expand"]
"""Routes 1, 2 and 3: a mixture of distilled experts, a student with MoE layers, a student that grows by MoE layers."""


@dataclass(frozen=True, kw_only=True)
class DomainConfig:
    """One domain of a run."""

    data: str
    """``demo:<name>``, a benchmark's name, a file or folder, or ``hub:<id>``."""
    name: str | None = None
    """What to call it; by default what ``data`` calls it."""
    folder: str | None = None
    """Where the files of a benchmark lie."""
    target: str | tuple[str, ...] = "target"
    """Column to forecast, or several for multivariate series."""
    known_covariates: tuple[str, ...] = ()
    """Columns whose future is known at forecast time."""
    freq: str | None = None
    """Pandas alias of one step; inferred by default."""
    seasonality: int | None = None
    """Steps of the main period; by default the usual one of the step."""
    cache_dir: str | None = None
    """Where Parquet files larger than memory become memory-mapped ones; by default ``CHRONOMOE_CACHE``, if set."""

    def __post_init__(self) -> None:
        if self.name is not None and (
            not self.name.strip() or {"/", "\\"} & set(self.name) or self.name.startswith(".")
        ):
            raise InputError(
                "the name of a domain becomes a folder's: it must not be empty, hold a slash or start with a dot, "
                f"got {self.name!r}"
            )


@dataclass(frozen=True, kw_only=True)
class BudgetConfig:
    """How much training a mixture gets; every model it is compared with gets the same or its share of it."""

    steps: int = 2000
    """Student steps in all, for the generalist and the experts together."""
    generalist_share: float = 0.5
    """Share of the steps spent on the generalist that the experts branch from."""
    allocation: Literal["even", "validation"] = "validation"
    """How experts share their steps: alike, or half alike and half where the validation loss still falls."""
    batch_size: int = 64
    """Windows of a step."""
    windows: int = 16384
    """Training windows that soft targets are computed for; steps go through them as often as it takes."""
    learning_rate: float = 1e-3
    """Peak for the generalist and for students straight from the teacher."""
    expert_learning_rate: float = 1e-3
    """Peak for experts branched from the generalist."""
    generalist_schedule: Literal["cosine", "constant"] = "constant"
    """Learning rate of the generalist that experts branch from: its decay to zero is better spent on the experts."""

    def __post_init__(self) -> None:
        if not 0 <= self.generalist_share < 1:
            raise InputError(f"generalist_share must be in [0, 1), got {self.generalist_share}")
        _at_least(self, 1, "steps", "batch_size", "windows")
        _positive(self, "learning_rate", "expert_learning_rate")


@dataclass(frozen=True, kw_only=True)
class JointConfig:
    """Joint fine-tuning of router and experts, after the router."""

    steps: int = 0
    """Optimiser steps; 0 leaves it out."""
    learning_rate: float = 2e-4
    """Of the router."""
    expert_learning_rate: float = 2e-5
    """Of the experts."""

    def __post_init__(self) -> None:
        _at_least(self, 0, "steps")
        _positive(self, "learning_rate", "expert_learning_rate")


@dataclass(frozen=True, kw_only=True)
class ExpertsConfig:
    """Which experts there are."""

    branch: bool = True
    """Start them from the generalist; else straight from the teacher."""
    clusters: int | None = None
    """Group series by this many clusters of teacher embeddings instead of by domain."""
    generalist_member: bool = True
    """Let the generalist be one of the experts."""
    select: int | None = None
    """Keep this many, chosen greedily by validation loss; all by default."""
    own_share: float = 1.0
    """Share of an expert's training windows from its own domain; the rest from all domains."""

    def __post_init__(self) -> None:
        if not 0 < self.own_share <= 1:
            raise InputError(f"own_share must be in (0, 1], got {self.own_share}")
        _at_least(self, 1, "clusters", "select")


@dataclass(frozen=True, kw_only=True)
class UpcyclingConfig:
    """Route 2: a student with MoE layers, on the mixture's budget of operations and with its active compute."""

    layers: MoEConfig = field(default_factory=lambda: MoEConfig(num_experts=8, top_k=2, granularity=2, noise=0.1))
    """The student's MoE layers; ``noise`` or ``reinit`` tell copies of a dense block apart."""
    dense_share: float = 0.5
    """Share of the budget spent on the dense student that is upcycled."""
    teacher_share: float = 0.0
    """Share of the budget in which the teacher, upcycled too, learns the domains before the student follows it."""
    teacher_layers: MoEConfig = field(default_factory=lambda: MoEConfig(num_experts=4, top_k=2, noise=0.1))
    """The teacher's MoE layers."""
    learning_rate: float = 1e-3
    """Peak once there are MoE layers."""
    aux_weight: float = 0.01
    """Of the auxiliary losses."""

    def __post_init__(self) -> None:
        for name in ("dense_share", "teacher_share"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        if self.dense_share + self.teacher_share >= 1:
            raise InputError(
                "dense_share and teacher_share must leave some of the budget to the MoE student, got "
                f"{self.dense_share} and {self.teacher_share}"
            )
        _positive(self, "learning_rate")


@dataclass(frozen=True, kw_only=True)
class ExpandingConfig:
    """Route 3: a finished student that grows by MoE layers, on the mixture's budget of operations."""

    layers: MoEConfig = field(default_factory=lambda: MoEConfig(num_experts=4, top_k=1))
    """Each inserted layer; experts have a quarter of a feed-forward block's hidden units unless told otherwise."""
    base_share: float = 0.7
    """Share of the budget spent on the student that grows."""
    max_layers: int = 2
    """Layers added at the most; they share the rest of the budget."""
    probe_steps: int = 20
    """Training steps at each candidate place before one is chosen."""
    min_gain: float = 0.0
    """Share of the validation loss that a layer must take away to stay."""
    learning_rate: float = 1e-3
    """Peak for inserted layers."""
    aux_weight: float = 0.01
    """Of the auxiliary losses."""

    def __post_init__(self) -> None:
        if not 0 < self.base_share < 1:
            raise InputError(f"base_share must be between 0 and 1, got {self.base_share}")
        _at_least(self, 1, "max_layers", "probe_steps")
        _positive(self, "learning_rate")


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """What is measured at the end."""

    windows_per_domain: int = 400
    """Test windows of each domain, at most."""
    bootstrap_draws: int = 1000
    """For confidence intervals."""
    top_k: tuple[int, ...] = (1, 2, 3)
    """Fixed numbers of experts with which the mixture is scored too."""
    latency_repeats: int = 20
    """Timed forecasts of each model."""

    def __post_init__(self) -> None:
        _at_least(self, 1, "windows_per_domain", "bootstrap_draws", "latency_repeats")
        if min(self.top_k, default=1) < 1:
            raise InputError(f"top_k of every evaluated mixture must be at least 1, got {self.top_k}")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A whole run of one or more routes."""

    domains: tuple[DomainConfig, ...]
    """At least one; experts are made for each."""
    held_out: tuple[DomainConfig, ...] = ()
    """Domains that nothing is trained or chosen on, to test how models do on series nobody has seen."""
    teacher: str = "tiny"
    """Hub id, folder or s3:// URL of a Chronos-2 checkpoint, or "tiny", which ships with the package."""
    windows: WindowConfig = field(default_factory=WindowConfig)
    """Context and horizon."""
    student: str | StudentConfig = "small"
    """A preset or a size."""
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    """How much training."""
    loss: LossConfig = field(default_factory=LossConfig)
    """What students are trained on."""
    experts: ExpertsConfig = field(default_factory=ExpertsConfig)
    """Which experts there are."""
    moe: MixtureConfig = field(default_factory=MixtureConfig)
    """Router, routing and balance."""
    router_windows: int = 4096
    """Windows that the router learns from."""
    router_part: Literal["train", "validation"] = "train"
    """Part of the series they come from; early stopping always looks at other windows of the validation part."""
    router: RouterTrainingConfig = field(default_factory=RouterTrainingConfig)
    """How the router is trained."""
    joint: JointConfig = field(default_factory=JointConfig)
    """Joint fine-tuning."""
    routes: tuple[Route, ...] = ("mixture",)
    """Which models are made; the first one's checkpoint is the run's, in ``moe/``."""
    upcycling: UpcyclingConfig = field(default_factory=UpcyclingConfig)
    """Route 2."""
    expanding: ExpandingConfig = field(default_factory=ExpandingConfig)
    """Route 3."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """What is measured."""
    seed: int = 0
    """Of everything that is random."""

    def __post_init__(self) -> None:
        if not self.domains:
            raise InputError("a run needs at least one domain, got none")
        if not self.routes or len(set(self.routes)) < len(self.routes):
            raise InputError(
                f"routes must name each of {', '.join(typing.get_args(Route))} at most once and at least one, "
                f"got {list(self.routes)}"
            )
        _at_least(self, 1, "router_windows")


def _at_least(config: Any, least: int, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None and value < least:
            raise InputError(f"{name} must be at least {least}, got {value}")


def _positive(config: Any, *names: str) -> None:
    for name in names:
        if not getattr(config, name) > 0:
            raise InputError(f"{name} must be positive, got {getattr(config, name)}")


TEACHERS = "-teacher"
"""How the names of recipes for ``chronomoe pretrain`` end."""


def recipe_names(kind: type[Any] = RunConfig) -> list[str]:
    """Return the recipes that ship with the package: those of runs, or of another kind of configuration."""
    folder = resources.files("chronomoe") / "assets" / "recipes"
    names = sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))
    return [name for name in names if name.endswith(TEACHERS) == (kind is not RunConfig)]


class _OnceOnly(yaml.SafeLoader):
    """Refuses a key that stands twice in one place, where YAML's loader lets the last one win."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Read keys and values."""
        keys = [self.construct_object(key, deep=deep) for key, _ in node.value]
        twice = next((key for place, key in enumerate(keys) if key in keys[:place]), None)
        if twice is not None:
            raise yaml.constructor.ConstructorError(None, None, f"the key {twice!r} stands twice", node.start_mark)
        found: dict[Any, Any] = super().construct_mapping(node, deep=deep)
        return found


def load_recipe(name: str, kind: type[Any] = RunConfig) -> Any:
    """Read a recipe by name or from a YAML file.

    Raises:
        InputError: there is no such recipe, the file is not YAML, or a key or value is not accepted.
    """
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise InputError(
                f"there is no recipe file {name}; write one, or use a name: {', '.join(recipe_names(kind))}"
            )
        text = path.read_bytes()
    elif name in recipe_names(kind):
        text = (resources.files("chronomoe") / "assets" / "recipes" / f"{name}.yaml").read_bytes()
    else:
        known = recipe_names(kind)
        raise InputError(
            f"Unknown recipe {name!r}. Available: {', '.join(known)}, or a .yaml file.{nearest(name, known)}"
        )
    try:
        values = yaml.load(text, Loader=_OnceOnly)
    except yaml.YAMLError as error:
        raise InputError(f"{name} is not a YAML file: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise InputError(f"{name} must hold keys and values, got {type(values).__name__}")
    return parse(values, kind, source=name)


def parse(values: dict[str, Any], kind: type[Any], *, source: str) -> Any:
    """Turn plain values into a configuration, refusing unknown keys at any depth."""
    _refuse_unknown(values, kind, source, "")
    try:
        return TypeAdapter(kind).validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "recipe"
        message = first["msg"].removeprefix("Value error, ")
        raise InputError(f"{source}: {place}: {message}") from None


def dump(config: Any) -> str:
    """Return a configuration as YAML that ``load_recipe`` reads back."""
    return yaml.safe_dump(_plain(asdict(config)), sort_keys=False)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return value


def _refuse_unknown(values: Any, kind: Any, source: str, place: str) -> None:
    if isinstance(kind, types.UnionType):
        kind = next((option for option in typing.get_args(kind) if dataclasses.is_dataclass(option)), None)
    if typing.get_origin(kind) is tuple and isinstance(values, list):
        for index, value in enumerate(values):
            _refuse_unknown(value, typing.get_args(kind)[0], source, f"{place}[{index}]")
    if not (dataclasses.is_dataclass(kind) and isinstance(values, dict)):
        return
    hints = typing.get_type_hints(kind)
    for key, value in values.items():
        if key not in hints:
            where = f"in {place}" if place else "at the top"
            raise InputError(
                f"{source}: unknown key {key!r} {where}. Available: {', '.join(hints)}.{nearest(str(key), hints)}"
            )
        _refuse_unknown(value, hints[key], source, f"{place}.{key}".lstrip("."))
