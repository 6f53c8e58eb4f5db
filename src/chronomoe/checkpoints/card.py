"""The README.md of a checkpoint."""

from collections.abc import Mapping

from transformers import PreTrainedModel

from chronomoe.models.mixture.mixture import DistilledMoE
from chronomoe.models.sparse.insertion import MoEEnhancedChronos2
from chronomoe.models.sparse.upcycling import SparseChronos2Model

HEADER = """---
library_name: chronomoe
pipeline_tag: time-series-forecasting
license: apache-2.0
tags:
- time-series
- forecasting
- chronos-2
- distillation
{tags}---
"""


def model_card(model: PreTrainedModel, *, name: str, sections: Mapping[str, str] | None = None) -> str:
    """Say what a checkpoint is and how to load it.

    Args:
        model: a ``Chronos2Model`` or one of ours.
        name: the title, and the folder in the example.
        sections: further headings with their Markdown, such as data, training or results.
    """
    config = model.chronos_config
    total = sum(parameter.numel() for parameter in model.parameters())
    plain = not isinstance(model, DistilledMoE | SparseChronos2Model)
    parts = [
        HEADER.format(tags="" if plain else "- mixture-of-experts\n"),
        f"# {name}\n",
        _what_it_is(model),
        "\n| | |\n| --- | --- |",
        f"| parameters | {total:,} |",
    ]
    if isinstance(model, DistilledMoE):
        parts.append(f"| active parameters, for one series | {model.active_parameters():,} |")
        parts.append(f"| experts, of which a series uses at most `top_k` | {len(model.experts)}, {model.top_k} |")
    if isinstance(model, SparseChronos2Model):
        parts.append(f"| active parameters, for one token | {model.active_parameters():,} |")
    horizon = config.max_output_patches * config.output_patch_size
    parts += [
        f"| quantile levels | {', '.join(f'{level:g}' for level in config.quantiles)} |",
        f"| longest context | {config.context_length} steps |",
        f"| horizon in one pass | {horizon} steps; longer ones are unrolled |",
    ]
    if isinstance(model, DistilledMoE):
        parts.append(_experts(model))
    if isinstance(model, SparseChronos2Model):
        parts.append(_layers(model))
    parts.append(_how_to_load(name, plain=plain))
    parts += [f"## {heading}\n\n{text.strip()}\n" for heading, text in (sections or {}).items()]
    return "\n".join(parts)


def _what_it_is(model: PreTrainedModel) -> str:
    if isinstance(model, DistilledMoE):
        return (
            "A mixture of experts for time series forecasting, made with ChronoMoE. Each expert is a whole model "
            "distilled from a [Chronos-2](https://arxiv.org/abs/2510.15821) teacher; a router reads the series, picks "
            "experts, and their quantile forecasts are averaged with its weights. It takes univariate and multivariate "
            "series with past and known covariates, as Chronos-2 does."
        )
    if isinstance(model, MoEEnhancedChronos2):
        return (
            "A forecasting model of the [Chronos-2](https://arxiv.org/abs/2510.15821) architecture that has grown by "
            "mixture-of-experts layers after some of its encoder blocks, made with ChronoMoE. A router sends each "
            "token to a few of a layer's experts. All other weights are those of the model it has grown from; their "
            f"SHA-256 is `{model.base_hash()}`. It takes univariate and multivariate series with past and known "
            "covariates, as Chronos-2 does."
        )
    if isinstance(model, SparseChronos2Model):
        return (
            "A forecasting model of the [Chronos-2](https://arxiv.org/abs/2510.15821) architecture with "
            "mixture-of-experts layers in place of feed-forward blocks, made with ChronoMoE. A router sends each "
            "token to a few of a layer's experts. It takes univariate and multivariate series with past and known "
            "covariates, as Chronos-2 does."
        )
    return (
        "A forecasting model of the [Chronos-2](https://arxiv.org/abs/2510.15821) architecture, made with ChronoMoE. "
        "It takes univariate and multivariate series with past and known covariates."
    )


def _experts(model: DistilledMoE) -> str:
    rows = ["\n## Experts\n\n| expert | layers | d_model | parameters |\n| --- | --- | --- | --- |"]
    for name, expert in zip(model.config.expert_names, model.experts, strict=True):
        size = sum(parameter.numel() for parameter in expert.parameters())
        rows.append(f"| {name} | {expert.config.num_layers} | {expert.config.d_model} | {size:,} |")
    return "\n".join(rows)


def _layers(model: SparseChronos2Model) -> str:
    where = "after encoder block" if isinstance(model, MoEEnhancedChronos2) else "in encoder block"
    rows = [
        f"\n## MoE layers\n\n| {where} | experts | of which a token uses | hidden units of one | shared |\n"
        "| --- | --- | --- | --- | --- |"
    ]
    for block, layer in zip(model.moe_blocks, model.moe_layers.values(), strict=True):
        config = layer.config
        rows.append(f"| {block} | {config.num_experts} | {config.top_k} | {layer.width} | {config.shared_width} |")
    return "\n".join(rows)


def _how_to_load(name: str, *, plain: bool) -> str:
    also = "`Chronos2Pipeline` of `chronos-forecasting` loads it too" + (
        "." if plain else ", after `import chronomoe`."
    )
    return (
        "\n## Forecast\n\n```python\nfrom chronomoe import ChronoMoEPipeline\n\n"
        f'pipeline = ChronoMoEPipeline.from_pretrained("{name}")\n'
        "forecast = pipeline.predict_df(frame, prediction_length=24)  # columns item_id, timestamp, target\n```\n\n"
        f"{also}\n"
    )
