"""How long does a router take to learn from cached forecasts of frozen experts?

As many windows, experts, quantiles and steps as the demo has, of random forecasts, so that no teacher is needed.
"""

import argparse

import torch
from answer import answer, clock
from chronos.chronos2 import Chronos2Model
from chronos.chronos2.config import Chronos2CoreConfig

from chronomoe.models.mixture.features import NUM_FEATURES
from chronomoe.models.mixture.mixture import MixtureConfig, build_mixture
from chronomoe.pretraining.teacher import QUANTILE_LEVELS
from chronomoe.training.routing import ExpertForecasts, RouterTrainingConfig, train_router

VALIDATION, EXPERTS, HORIZON = 640, 6, 48


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--windows", type=int, default=4096)
    parser.add_argument("--epochs", type=int, default=RouterTrainingConfig().epochs)
    options = parser.parse_args()
    generator = torch.Generator().manual_seed(0)

    def forecasts(rows: int) -> ExpertForecasts:
        return ExpertForecasts(
            features=torch.randn(rows, NUM_FEATURES, generator=generator),
            member=torch.arange(rows),
            observed=torch.ones(rows, dtype=torch.bool),
            group=torch.arange(rows),
            quantiles=torch.randn(rows, EXPERTS, len(QUANTILE_LEVELS), HORIZON, generator=generator).half(),
            target=torch.randn(rows, HORIZON, generator=generator),
            domain=torch.arange(rows) % EXPERTS,
        )

    core = Chronos2CoreConfig(
        d_model=32,
        d_kv=16,
        d_ff=32,
        num_layers=1,
        num_heads=2,
        chronos_config={
            "context_length": 64,
            "input_patch_size": 16,
            "input_patch_stride": 16,
            "output_patch_size": 16,
            "max_output_patches": HORIZON // 16,
            "quantiles": list(QUANTILE_LEVELS),
            "use_reg_token": True,
            "use_arcsinh": True,
        },
    )
    mixture = build_mixture({f"expert-{index}": Chronos2Model(core) for index in range(EXPERTS)}, MixtureConfig())
    train, validation = forecasts(options.windows), forecasts(VALIDATION)
    config = RouterTrainingConfig(epochs=options.epochs, patience=options.epochs)
    begin = clock()
    curve = train_router(mixture, train, validation, config)
    seconds = clock() - begin
    answer(
        "router training from cached forecasts",
        seconds=round(seconds, 1),
        epochs=len(curve["step"]),
        windows=options.windows,
        experts=EXPERTS,
    )


if __name__ == "__main__":
    main()
