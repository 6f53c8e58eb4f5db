"""The commands of routes 2 and 3: upcycle and expand."""

from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table

from chronomoe.cli.options import (
    DATA_HELP,
    MODEL_HELP,
    BatchSize,
    ContextLength,
    Device,
    Freq,
    Horizon,
    Known,
    LearningRate,
    Out,
    Seed,
    SoftWeight,
    Target,
    parse_blocks,
    read_domain,
    read_windows,
)

ROUTING = "Routing and balance"
Gating = Annotated[
    Literal["softmax_then_top_k", "top_k_then_softmax"],
    typer.Option(
        help="Gates from the softmax over all experts, or over the chosen ones alone.", rich_help_panel=ROUTING
    ),
]
Balance = Annotated[
    Literal["l2", "switch", "none"],
    typer.Option(help="Loss that keeps experts in use; l2 is weak while routers are unsure.", rich_help_panel=ROUTING),
]
ZWeight = Annotated[
    float,
    typer.Option(help="Of the z-loss, which keeps scores small, beside the balance loss.", rich_help_panel=ROUTING),
]
BiasRate = Annotated[
    float,
    typer.Option(help="Step of a bias that evens the load without a loss, such as 0.001.", rich_help_panel=ROUTING),
]


def upcycle(
    model: Annotated[str, typer.Argument(help=MODEL_HELP)],
    out: Out,
    num_experts: Annotated[int, typer.Option(help="Experts of each MoE layer.")] = 8,
    top_k: Annotated[int, typer.Option(help="Experts of a token.")] = 2,
    granularity: Annotated[
        int, typer.Option(help="Slices that a dense block is cut into; experts are whole copies of it at 1.")
    ] = 1,
    shared_width: Annotated[
        int, typer.Option(help="Hidden units of the dense block that every token uses; experts get the rest.")
    ] = 0,
    layers: Annotated[
        str | None, typer.Option(help="Encoder blocks that get an MoE layer, such as 0,2; all by default.")
    ] = None,
    noise: Annotated[
        float, typer.Option(help="Noise on copied experts, relative to the weights; 0 forecasts exactly as before.")
    ] = 0.0,
    reinit: Annotated[
        float, typer.Option(help="Share of a copied expert's hidden units that are drawn afresh, 0 to 1.")
    ] = 0.0,
    gating: Gating = "softmax_then_top_k",
    balance: Balance = "switch",
    z_weight: ZWeight = 0.001,
    bias_rate: BiasRate = 0.0,
    capacity_factor: Annotated[
        float | None,
        typer.Option(
            help="An expert takes at most this multiple of its even share; no limit by default.",
            rich_help_panel=ROUTING,
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of routers, noise and fresh units.")] = 0,
) -> None:
    """Turn the feed-forward blocks of a dense checkpoint into MoE layers (route 2).

    Until it is trained, the result forecasts what the dense model did, unless --noise, --reinit or
    --capacity-factor is given.
    Train it with ChronoMoEPipeline.fit, or as the student or the teacher of a distillation.

    Example: chronomoe upcycle tiny --out moe --num-experts 8 --top-k 2
    """
    from chronomoe.models.sparse.config import MoEConfig
    from chronomoe.stages.sparse import upcycle_checkpoint

    config = MoEConfig(
        num_experts=num_experts,
        top_k=top_k,
        granularity=granularity,
        shared_width=shared_width,
        layers=None if layers is None else parse_blocks(layers, "layers"),
        noise=noise,
        reinit=reinit,
        gating=gating,
        balance=balance,
        z_weight=z_weight,
        bias_rate=bias_rate,
        capacity_factor=capacity_factor,
        seed=seed,
    )
    made = upcycle_checkpoint(model, out, config)
    print(f"saved {out}: {made.num_parameters():,} parameters, {made.active_parameters():,} of them active for a token")


def expand(
    model: Annotated[str, typer.Argument(help="The finished student. " + MODEL_HELP)],
    data: Annotated[list[str], typer.Argument(help="Series that new layers learn from, one or more: " + DATA_HELP)],
    out: Out,
    horizon: Horizon = 48,
    context_length: ContextLength = 512,
    max_layers: Annotated[int, typer.Option(help="Most layers to add.")] = 2,
    steps: Annotated[int, typer.Option(help="Training steps of each layer.")] = 300,
    probe_steps: Annotated[int, typer.Option(help="Training steps at each candidate place before one is chosen.")] = 50,
    candidates: Annotated[
        str | None, typer.Option(help="Encoder blocks after which a layer may go, such as 0,2; all by default.")
    ] = None,
    num_experts: Annotated[int, typer.Option(help="Experts of each layer.")] = 4,
    top_k: Annotated[int, typer.Option(help="Experts of a token.")] = 1,
    expert_width: Annotated[
        int | None, typer.Option(help="Hidden units of an expert; a quarter of the dense block's by default.")
    ] = None,
    shared_width: Annotated[int, typer.Option(help="Hidden units of an expert that every token uses.")] = 0,
    gating: Gating = "softmax_then_top_k",
    balance: Balance = "switch",
    bias_rate: BiasRate = 0.0,
    aux_weight: Annotated[float, typer.Option(help="Of balance loss and z-loss.", rich_help_panel=ROUTING)] = 0.01,
    tune_earlier: Annotated[
        bool, typer.Option("--tune-earlier", help="Tune layers added before together with the new one.")
    ] = False,
    min_gain: Annotated[
        float, typer.Option(help="Share of the validation loss that a layer must take away to stay.")
    ] = 0.0,
    batch_size: BatchSize = 64,
    learning_rate: LearningRate = 1e-3,
    teacher: Annotated[str | None, typer.Option(help="Follow this teacher's forecasts as well. " + MODEL_HELP)] = None,
    soft_weight: SoftWeight = 0.5,
    target: Target = None,
    known_covariate: Known = None,
    freq: Freq = None,
    device: Device = "auto",
    seed: Seed = 0,
) -> None:
    """Add MoE layers to a finished student, one at a time, its own weights frozen (route 3).

    Each new layer is tried for a few steps after every encoder block, and tuned at the best place.
    It is kept if the validation loss falls; the first layer that does not help ends the search.
    Run the same command again to continue after an interruption.

    Example: chronomoe expand student demo:traffic demo:web --out grown --steps 300
    """
    from chronomoe.models.sparse.config import MoEConfig
    from chronomoe.stages.sparse import expand_checkpoint
    from chronomoe.training.distillation import DistilConfig
    from chronomoe.training.growing import ExpansionConfig
    from chronomoe.training.losses import LossConfig

    config = ExpansionConfig(
        layer=MoEConfig(
            num_experts=num_experts,
            top_k=top_k,
            expert_width=expert_width,
            shared_width=shared_width,
            gating=gating,
            balance=balance,
            bias_rate=bias_rate,
            seed=seed,
        ),
        max_layers=max_layers,
        candidates=None if candidates is None else parse_blocks(candidates, "candidates"),
        probe_steps=probe_steps,
        min_gain=min_gain,
        tune_earlier=tune_earlier,
        aux_weight=aux_weight,
        training=DistilConfig(
            steps=steps,
            batch_size=batch_size,
            learning_rate=learning_rate,
            loss=LossConfig(soft_weight=soft_weight),
            seed=seed,
        ),
    )
    path = expand_checkpoint(
        model,
        [read_domain(part, target, known_covariate, freq=freq) for part in data],
        out,
        windows=read_windows(context_length, horizon),
        config=config,
        teacher=teacher,
        device=device,
        console=Console(stderr=True),
    )
    _print_path(path)
    print(f"saved {out}")


def _print_path(path: list[dict[str, Any]]) -> None:
    """Print a table of the layers that were tried, with what probes found."""
    table = Table(title="Layers tried; validation loss, lower is better")
    for heading in ("layer", "probes (block: loss)", "after block", "without", "with", "kept"):
        table.add_column(heading, justify="left" if heading.startswith("probes") else "right")
    for entry in path:
        probes = ", ".join(f"{probe['after']}: {probe['validation']:.4f}" for probe in entry["probes"])
        losses = (f"{entry['before']:.4f}", f"{entry['validation']:.4f}")
        table.add_row(str(entry["layer"]), probes, str(entry["after"]), *losses, "yes" if entry["kept"] else "no")
    Console().print(table)
