"""The commands of routes 2 and 3: upcycle and expand."""

from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table

from chronomoe.cli import options as opt

ROUTING = "Routing and balance"
Gating = Annotated[
    Literal["softmax_then_top_k", "top_k_then_softmax"],
    typer.Option(help="Softmax over all experts, or over the chosen ones alone.", rich_help_panel=ROUTING),
]
Balance = Annotated[
    Literal["l2", "switch", "none"],
    typer.Option(
        help="Loss that keeps all experts in use; l2 is weak while routers are unsure.", rich_help_panel=ROUTING
    ),
]
BiasRate = Annotated[
    float,
    typer.Option(help="Step of a bias that balances the load without a loss, such as 0.001.", rich_help_panel=ROUTING),
]


def upcycle(
    model: opt.Model,
    out: opt.Out,
    num_experts: Annotated[int, typer.Option(help="Experts in each MoE layer.")] = 8,
    top_k: Annotated[int, typer.Option(help="Experts per token.")] = 2,
    granularity: Annotated[
        int, typer.Option(help="Slices that a dense block is cut into; at 1, experts are whole copies of it.")
    ] = 1,
    shared_width: Annotated[
        int, typer.Option(help="Hidden units of the dense block that every token uses; experts get the rest.")
    ] = 0,
    layers: Annotated[
        str | None, typer.Option(help="Encoder blocks that get an MoE layer, such as 0,2; all by default.")
    ] = None,
    noise: Annotated[
        float, typer.Option(help="Noise on copied experts, relative to their weights; 0 keeps the forecasts.")
    ] = 0.0,
    reinit: Annotated[
        float, typer.Option(help="Share of each copied expert's hidden units to draw afresh, 0 to 1.")
    ] = 0.0,
    gating: Gating = "softmax_then_top_k",
    balance: Balance = "switch",
    z_weight: Annotated[
        float, typer.Option(help="Weight of the z-loss, which keeps scores small.", rich_help_panel=ROUTING)
    ] = 0.001,
    bias_rate: BiasRate = 0.0,
    capacity_factor: Annotated[
        float | None,
        typer.Option(
            help="Most tokens per expert, as a multiple of an even share; no limit by default.", rich_help_panel=ROUTING
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seeds routers, noise and fresh units.")] = 0,
) -> None:
    """Turn feed-forward blocks of a dense checkpoint into MoE layers (route 2).

    Writes a checkpoint that forecasts exactly as the dense model does, unless
    --noise, --reinit or --capacity-factor is given. Train it with
    ChronoMoEPipeline.fit, or as student or teacher of a distillation.

    Example: chronomoe upcycle tiny --out moe --num-experts 8 --top-k 2

    Common errors: widths that --num-experts, --granularity or --shared-width do
    not divide, and blocks in --layers that the model does not have.
    """
    from chronomoe.models.sparse.config import MoEConfig
    from chronomoe.stages.sparse import upcycle_checkpoint

    config = opt.pick(MoEConfig, locals() | {"layers": opt.parse_blocks(layers, "layers")})
    made = upcycle_checkpoint(model, out, config)
    print(f"saved {out}: {made.num_parameters():,} parameters, {made.active_parameters():,} of them active per token")


def expand(
    model: Annotated[str, typer.Argument(help="The finished student. " + opt.MODEL_HELP)],
    data: Annotated[list[str], typer.Argument(help="Series that new layers learn from, one or more: " + opt.DATA_HELP)],
    out: opt.Out,
    horizon: opt.Horizon = 48,
    context_length: opt.ContextLength = 512,
    max_layers: Annotated[int, typer.Option(help="Layers to add, at most.")] = 2,
    steps: Annotated[int, typer.Option(help="Training steps per layer.")] = 300,
    probe_steps: Annotated[int, typer.Option(help="Training steps at each candidate place before one is chosen.")] = 50,
    candidates: Annotated[
        str | None, typer.Option(help="Encoder blocks that a layer may follow, such as 0,2; all by default.")
    ] = None,
    num_experts: Annotated[int, typer.Option(help="Experts in each layer.")] = 4,
    top_k: Annotated[int, typer.Option(help="Experts per token.")] = 1,
    expert_width: Annotated[
        int | None, typer.Option(help="Hidden units of an expert; by default a quarter of the dense block's.")
    ] = None,
    shared_width: Annotated[int, typer.Option(help="Hidden units of an expert that every token uses.")] = 0,
    gating: Gating = "softmax_then_top_k",
    balance: Balance = "switch",
    bias_rate: BiasRate = 0.0,
    aux_weight: Annotated[
        float, typer.Option(help="Weight of balance loss and z-loss.", rich_help_panel=ROUTING)
    ] = 0.01,
    tune_earlier: Annotated[bool, typer.Option("--tune-earlier", help="Also tune the layers added before.")] = False,
    min_gain: Annotated[
        float, typer.Option(help="Share of the validation loss that a layer must remove to be kept.")
    ] = 0.0,
    batch_size: opt.BatchSize = 64,
    learning_rate: opt.LearningRate = 1e-3,
    teacher: Annotated[str | None, typer.Option(help="Also follow this teacher's forecasts. " + opt.MODEL_HELP)] = None,
    soft_weight: opt.SoftWeight = 0.5,
    target: opt.Target = None,
    known_covariate: opt.Known = None,
    freq: opt.Freq = None,
    device: opt.Device = "auto",
    seed: opt.Seed = 0,
) -> None:
    """Add MoE layers to a finished student, one at a time (route 3).

    The student's own weights stay frozen. Each layer is probed after every
    encoder block, tuned at the best place, and kept if the validation loss
    falls; the first that does not help ends the search. Writes the grown
    checkpoint. After an interruption the same command continues.

    Example: chronomoe expand student demo:traffic demo:web --out grown --steps 300

    Common errors: a student that has MoE layers already, blocks in --candidates
    that it does not have, and an output folder that is not empty.
    """
    from chronomoe.models.sparse.config import MoEConfig
    from chronomoe.stages.sparse import expand_checkpoint
    from chronomoe.training.arguments import DistilConfig
    from chronomoe.training.growing import ExpansionConfig
    from chronomoe.training.losses import LossConfig

    given = locals() | {"candidates": opt.parse_blocks(candidates, "candidates")}
    training = opt.pick(DistilConfig, given, loss=LossConfig(soft_weight=soft_weight))
    path = expand_checkpoint(
        model,
        [opt.read_domain(part, target, known_covariate, freq=freq) for part in data],
        out,
        windows=opt.read_windows(context_length, horizon),
        config=opt.pick(ExpansionConfig, given, layer=opt.pick(MoEConfig, given), training=training),
        teacher=teacher,
        device=device,
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
