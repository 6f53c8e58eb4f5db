"""The README.md of a checkpoint."""

from collections.abc import Mapping

from transformers import PreTrainedModel

from chronomoe.models.mixture.mixture import DistilledMoE
from chronomoe.models.provenance import provenance, teachers
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


CHRONOS = "[Chronos-2](https://arxiv.org/abs/2510.15821)"
TAKES = "It takes univariate and multivariate series with past and known covariates"
SENDS = "A router sends each token to a few of a layer's experts."


HOW_TO_LOAD = """
## Forecast

```python
from chronomoe import ChronoMoEPipeline

pipeline = ChronoMoEPipeline.from_pretrained("{name}")
forecast = pipeline.predict_df(frame, prediction_length=24)  # columns item_id, timestamp, target
```

`Chronos2Pipeline` of `chronos-forecasting` loads it too{when}

## Limits

It is best on series like those that it learned from: compare before you use it on others. It forecasts from numbers
alone and knows nothing of events that no covariate tells. Bands are right on average, not for each series. The weights
are under Apache-2.0; the series that they were learned from stay under their owners' terms.
"""


def model_card(model: PreTrainedModel, *, name: str, sections: Mapping[str, str] | None = None) -> str:
    """Say what a checkpoint is and how to load it.

    Args:
        model: a ``Chronos2Model`` or one of ours.
        name: the title, and the folder in the example.
        sections: further headings with their Markdown, such as data, training or results.
    """
    config, details = model.chronos_config, []
    horizon = config.max_output_patches * config.output_patch_size
    rows = {"parameters": f"{sum(parameter.numel() for parameter in model.parameters()):,}"}
    if isinstance(model, DistilledMoE):
        rows["active parameters, for one series"] = f"{model.active_parameters():,}"
        rows["experts, of which a series uses at most `top_k`"] = f"{len(model.experts)}, {model.top_k}"
        details = _experts(model)
    if isinstance(model, SparseChronos2Model):
        rows["active parameters, for one token"] = f"{model.active_parameters():,}"
        details = _layers(model)
    rows |= {
        "quantile levels": ", ".join(f"{level:g}" for level in config.quantiles),
        "longest context": f"{config.context_length} steps",
        "horizon in one pass": f"{horizon} steps; longer ones are unrolled",
        **_provenance(model),
    }
    bands = getattr(model, "bands", None)
    if bands is not None:
        rows["bands"] = (
            f"recalibrated for {bands.factor.shape[-1]} steps (https://arxiv.org/abs/1905.03222); stock "
            "`Chronos2Pipeline` forecasts the bands from before"
        )
    plain = not isinstance(model, DistilledMoE | SparseChronos2Model)
    return "\n".join(
        [
            HEADER.format(tags="" if plain else "- mixture-of-experts\n"),
            f"# {name}\n\n{_what_it_is(model)}\n\n| | |\n| --- | --- |",
            *(f"| {heading} | {value} |" for heading, value in rows.items()),
            *details,
            HOW_TO_LOAD.format(name=name, when="." if plain else ", after `import chronomoe`."),
            *(f"## {heading}\n\n{text.strip()}\n" for heading, text in (sections or {}).items()),
        ]
    )


def _what_it_is(model: PreTrainedModel) -> str:
    if isinstance(model, DistilledMoE):
        return (
            "A mixture of experts for time series forecasting, made with ChronoMoE. Each expert is a whole model "
            f"distilled from a {CHRONOS} teacher; a router reads the series, picks experts, and their quantile "
            f"forecasts are averaged with its weights. {TAKES}, as Chronos-2 does."
        )
    if isinstance(model, MoEEnhancedChronos2):
        return (
            f"A forecasting model of the {CHRONOS} architecture that has grown by mixture-of-experts layers after "
            f"some of its encoder blocks, made with ChronoMoE. {SENDS} All other weights are those of the model it "
            f"grew from; their SHA-256 is `{model.base_hash()}`. {TAKES}, as Chronos-2 does."
        )
    if isinstance(model, SparseChronos2Model):
        return (
            f"A forecasting model of the {CHRONOS} architecture with mixture-of-experts layers in place of "
            f"feed-forward blocks, made with ChronoMoE. {SENDS} {TAKES}, as Chronos-2 does."
        )
    return f"A forecasting model of the {CHRONOS} architecture, made with ChronoMoE. {TAKES}."


def _provenance(model: PreTrainedModel) -> dict[str, str]:
    """Return rows for the teacher, and for the data, where they are known of the model or of its experts."""
    parts = (model, *getattr(model, "experts", ()))
    data = {name: value for part in parts for name, value in provenance(part.config).data.items()}
    rows = {
        "distilled from the teacher of fingerprint": ", ".join(f"`{teacher}`" for teacher in sorted(teachers(model))),
        "learned from, with fingerprints": ", ".join(f"{name} `{value}`" for name, value in data.items()),
    }
    return {heading: text for heading, text in rows.items() if text}


def _experts(model: DistilledMoE) -> list[str]:
    rows = ["\n## Experts\n\n| expert | layers | d_model | parameters |\n| --- | --- | --- | --- |"]
    for name, expert in zip(model.config.expert_names, model.members(), strict=True):
        size = sum(parameter.numel() for parameter in expert.parameters())
        rows.append(f"| {name} | {expert.config.num_layers} | {expert.config.d_model} | {size:,} |")
    return rows


def _layers(model: SparseChronos2Model) -> list[str]:
    where = "after encoder block" if isinstance(model, MoEEnhancedChronos2) else "in encoder block"
    rows = [
        f"\n## MoE layers\n\n| {where} | experts | experts per token | hidden units of one | shared |\n"
        "| --- | --- | --- | --- | --- |"
    ]
    for block, layer in zip(model.moe_blocks, model.moe_layers.values(), strict=True):
        config = layer.config
        rows.append(f"| {block} | {config.num_experts} | {config.top_k} | {layer.width} | {config.shared_width} |")
    return rows
