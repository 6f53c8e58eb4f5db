"""Recipes: all that a run does, as one frozen configuration, named or in a YAML file."""

import json
import typing
from dataclasses import asdict, field
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field

from chronomoe.data.windows import WindowConfig
from chronomoe.errors import InputError, nearest
from chronomoe.evaluation.external import Classical
from chronomoe.models.balancing import AUX_WEIGHT
from chronomoe.models.configuration import Seed, configuration, parse
from chronomoe.models.mixture.config import MixtureConfig
from chronomoe.models.mixture.familiarity import UnfamiliarConfig
from chronomoe.models.precision import Precision
from chronomoe.models.sparse.config import MoEConfig
from chronomoe.models.student import StudentConfig
from chronomoe.training.losses import LossConfig
from chronomoe.training.routing import RouterTrainingConfig

Route = Literal["mixture", "upcycle", "expand"]
"""Routes 1, 2 and 3: a mixture of distilled experts, a student with MoE layers, a student that grows by MoE layers."""
Baseline = Literal["single", "generalist-full", "generalist-wide"]
"""What is trained only to be compared with: each domain's own student, a generalist of the same and of more compute."""


@configuration
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
                "a domain's name becomes a folder name: it must not be empty, contain a slash or start with a dot, "
                f"got {self.name!r}"
            )


@configuration
class BudgetConfig:
    """How much training a mixture gets; every model it is compared with gets the same or its share of it."""

    steps: int = Field(2000, ge=1)
    """Student steps in all, for the generalist and the experts together."""
    generalist_share: float = Field(0.5, ge=0, lt=1)
    """Share of the steps spent on the generalist that the experts branch from."""
    allocation: Literal["even", "validation"] = "validation"
    """How experts share their steps: alike, or half alike and half where the validation loss still falls."""
    batch_size: int = Field(64, ge=1)
    """Windows of a step."""
    windows: int = Field(16384, ge=1)
    """Training windows that soft targets are computed for; steps go through them as often as it takes."""
    learning_rate: float = Field(1e-3, gt=0)
    """Peak for the generalist and for students straight from the teacher."""
    expert_learning_rate: float = Field(1e-3, gt=0)
    """Peak for experts branched from the generalist."""
    teacher_steps: int = Field(0, ge=0)
    """Steps in which the teacher learns the domains before students follow it; they are not counted in ``steps``."""
    teacher_learning_rate: float = Field(1e-4, gt=0)
    """Peak for a teacher that learns the domains."""
    generalist_schedule: Literal["cosine", "constant"] = "constant"
    """Learning rate of the generalist that experts branch from: its decay to zero is better spent on the experts."""


@configuration
class JointConfig:
    """Joint fine-tuning of router and experts, after the router."""

    steps: int = Field(0, ge=0)
    """Optimiser steps; 0 leaves it out."""
    learning_rate: float = Field(2e-4, gt=0)
    """Of the router."""
    expert_learning_rate: float = Field(2e-5, gt=0)
    """Of the experts."""


@configuration
class ExpertsConfig:
    """Which experts there are."""

    branch: bool = True
    """Start them from the generalist; else straight from the teacher."""
    clusters: int | None = Field(None, ge=1)
    """Group series by this many clusters of teacher embeddings instead of by domain."""
    generalist_member: bool = True
    """Let the generalist be one of the experts."""
    select: int | None = Field(None, ge=1)
    """Keep this many, chosen greedily by validation loss; all by default."""
    own_share: float = Field(1.0, gt=0, le=1)
    """Share of an expert's training windows from its own domain; the rest from all domains."""


@configuration
class UpcyclingConfig:
    """Route 2: a student with MoE layers, on the mixture's budget of operations and with its active compute."""

    layers: MoEConfig = field(default_factory=lambda: MoEConfig(num_experts=8, top_k=2, granularity=2, noise=0.1))
    """The student's MoE layers; ``noise`` or ``reinit`` tell copies of a dense block apart."""
    dense_share: float = Field(0.5, ge=0, lt=1)
    """Share of the budget spent on the dense student that is upcycled."""
    teacher_share: float = Field(0.0, ge=0, lt=1)
    """Share of the budget in which the teacher, upcycled too, learns the domains before the student follows it."""
    teacher_layers: MoEConfig = field(default_factory=lambda: MoEConfig(num_experts=4, top_k=2, noise=0.1))
    """The teacher's MoE layers."""
    learning_rate: float = Field(1e-3, gt=0)
    """Peak once there are MoE layers."""
    aux_weight: float = Field(AUX_WEIGHT, ge=0)
    """Of the auxiliary losses."""

    def __post_init__(self) -> None:
        if self.dense_share + self.teacher_share >= 1:
            raise InputError(
                "dense_share and teacher_share must leave some of the budget to the MoE student, got "
                f"{self.dense_share} and {self.teacher_share}"
            )


@configuration
class ExpandingConfig:
    """Route 3: a finished student that grows by MoE layers, on the mixture's budget of operations."""

    layers: MoEConfig = field(default_factory=lambda: MoEConfig(num_experts=4, top_k=1))
    """Each inserted layer; experts have a quarter of a feed-forward block's hidden units unless told otherwise."""
    base_share: float = Field(0.7, gt=0, lt=1)
    """Share of the budget spent on the student that grows."""
    max_layers: int = Field(2, ge=1)
    """At most this many layers are added; they share the rest of the budget."""
    probe_steps: int = Field(20, ge=1)
    """Training steps at each candidate place before one is chosen."""
    min_gain: float = Field(0.0, ge=0, lt=1)
    """Share of the validation loss that a layer must take away to stay."""
    learning_rate: float = Field(1e-3, gt=0)
    """Peak for inserted layers."""
    aux_weight: float = Field(AUX_WEIGHT, ge=0)
    """Of the auxiliary losses."""


@configuration
class EvaluationConfig:
    """What is measured at the end."""

    windows_per_domain: int = Field(400, ge=1)
    """Test windows of each domain, at most."""
    bootstrap_draws: int = Field(1000, ge=1)
    """For confidence intervals."""
    top_k: tuple[Annotated[int, Field(ge=1)], ...] = (1, 2, 3)
    """Fixed numbers of experts with which the mixture is scored too."""
    latency_repeats: int = Field(20, ge=1)
    """Timed forecasts of each model."""
    classical: tuple[Classical, ...] = ()
    """Models of statsforecast to compare with, fitted to each window; they need the extra ``baselines``."""
    classical_windows: int = Field(50, ge=1)
    """Windows of each domain that they are compared on, at most: a fit takes seconds."""


@configuration
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
    router_windows: int = Field(4096, ge=1)
    """Windows that the router learns from."""
    router_part: Literal["train", "validation"] = "train"
    """Part of the series they come from; recommendations, made on the validation part, then favour the mixture."""
    router: RouterTrainingConfig = field(default_factory=RouterTrainingConfig)
    """How the router is trained."""
    joint: JointConfig = field(default_factory=JointConfig)
    """Joint fine-tuning."""
    unfamiliar: UnfamiliarConfig = field(default_factory=UnfamiliarConfig)
    """Series unlike all of the domains'."""
    routes: tuple[Route, ...] = ("mixture",)
    """Which models are made; the first one's checkpoint is the run's, in ``moe/``."""
    baselines: tuple[Baseline, ...] = typing.get_args(Baseline)
    """Which are trained beside them; they take three quarters of the training of a mixture with all of them."""
    upcycling: UpcyclingConfig = field(default_factory=UpcyclingConfig)
    """Route 2."""
    expanding: ExpandingConfig = field(default_factory=ExpandingConfig)
    """Route 3."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """What is measured."""
    seed: Seed = 0
    """Of everything that is random."""
    device: str = "auto"
    """Where everything is computed: cpu, cuda, cuda:N, mps, or auto, a CUDA GPU where torch finds one, else the CPU."""
    label_dtype: Precision = "auto"
    """What the teacher computes soft targets in: float32, bfloat16, or auto, bfloat16 where the processor has units for
    it."""
    label_engine: Literal["local", "ray"] = "local"
    """Where the teacher computes them: in this process, or in the workers of a Ray cluster, one a core."""
    train_dtype: Precision = "auto"
    """What trainings compute forward and backward passes in, likewise; see ``DistilConfig.bf16``."""

    def __post_init__(self) -> None:
        if not self.domains:
            raise InputError("a run needs at least one domain, got none")
        if not self.routes or len(set(self.routes)) < len(self.routes):
            raise InputError(
                f"routes must name each of {', '.join(typing.get_args(Route))} at most once, and at least one of them, "
                f"got {list(self.routes)}"
            )


RECIPES = resources.files("chronomoe") / "assets" / "recipes"
TEACHERS = "-teacher"
"""How the names of recipes for ``chronomoe pretrain`` end."""


def recipe_names(kind: type[Any] = RunConfig) -> list[str]:
    """Return the recipes that ship with the package: those of runs, or of another kind of configuration."""
    names = sorted(entry.name.removesuffix(".yaml") for entry in RECIPES.iterdir() if entry.name.endswith(".yaml"))
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
    known, own = recipe_names(kind), Path(name).suffix in (".yaml", ".yml")
    if own and not Path(name).is_file():
        raise InputError(f"there is no recipe file {name}; write one, or use a name: {', '.join(known)}")
    if not own and name not in known:
        raise InputError(
            f"Unknown recipe {name!r}. Available: {', '.join(known)}, or a .yaml file.{nearest(name, known)}"
        )
    file = Path(name) if own else RECIPES / f"{name}.yaml"
    try:
        values = yaml.load(file.read_bytes(), Loader=_OnceOnly)
    except yaml.YAMLError as error:
        raise InputError(f"{name} is not a YAML file: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise InputError(f"{name} must hold keys and values, got {type(values).__name__}")
    return parse(values, kind, source=name)


def dump(config: Any) -> str:
    """Return a configuration as YAML that ``load_recipe`` reads back."""
    return yaml.safe_dump(json.loads(json.dumps(asdict(config))), sort_keys=False)
