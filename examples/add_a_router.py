"""Put a router of your own into a mixture: here a linear one that trusts no feature far from those it was trained on.

Where its weights are those of the mixture's ``RouterConfig``, as here, the mixture is saved and loaded like any other.
A checkpoint says nothing of the class, though: it loads with the plain router, and yours is put back by hand. A router
with other weights can be used but not loaded: a mixture saved with one is refused.
"""

import tempfile
from pathlib import Path

from torch import Tensor

from chronomoe import ChronoMoEPipeline, MixtureConfig, StudentConfig, build_mixture, create_student_model
from chronomoe.models.mixture.mixture import DistilledMoE
from chronomoe.models.mixture.router import RouterConfig, TimeSeriesRouter
from chronomoe.pipeline import load_model, load_teacher


class CautiousRouter(TimeSeriesRouter):
    """Reads no feature beyond two standard deviations of the training series; the plain router stops at five."""

    def forward(self, features: Tensor) -> Tensor:
        """Score the experts of each row."""
        reach = 2 * self.spread
        return super().forward(features.clamp(self.mean - reach, self.mean + reach))


def use_cautious_router(mixture: DistilledMoE) -> None:
    """Replace the router by a cautious one with its weights."""
    router = CautiousRouter(mixture.router.num_experts, mixture.moe.router)
    router.load_state_dict(mixture.router.state_dict())
    mixture.router = router.to(mixture.device).train(mixture.training)


def main(out: Path) -> None:
    teacher = load_teacher("tiny")
    experts = {name: create_student_model(teacher, StudentConfig(num_layers=1)) for name in ("load", "sales")}
    mixture = build_mixture(experts, MixtureConfig(router=RouterConfig(hidden_sizes=())))  # no hidden layer: linear
    use_cautious_router(mixture)  # chronomoe.training.routing.train_router trains it like any other
    print(f"{sum(parameter.numel() for parameter in mixture.router.parameters())} parameters in the router")

    ChronoMoEPipeline(mixture).save_pretrained(out)
    loaded = load_model(out)
    print(f"loaded with a {type(loaded.router).__name__}", end=", ")
    use_cautious_router(loaded)
    print(f"now it has a {type(loaded.router).__name__}")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(Path(folder) / "moe")
