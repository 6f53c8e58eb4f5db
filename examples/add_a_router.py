"""Put a router of your own into a mixture: here a linear one over the same features."""

from chronos.chronos2 import Chronos2Model
from torch import Tensor, nn

from chronomoe import MixtureConfig, StudentConfig, build_mixture, create_student_model
from chronomoe.models.features import NUM_FEATURES
from chronomoe.models.router import RouterConfig, TimeSeriesRouter
from chronomoe.pipeline import load_teacher


class LinearRouter(TimeSeriesRouter):
    """Scores experts by a linear map: fewer parameters to overfit with."""

    def __init__(self, num_experts: int) -> None:
        super().__init__(num_experts, RouterConfig(hidden_sizes=()))
        self.network = nn.Sequential(nn.Linear(NUM_FEATURES, num_experts))

    def forward(self, features: Tensor) -> Tensor:
        """Score the experts of each row."""
        return super().forward(features.clamp(-3, 3))


def main() -> None:
    teacher: Chronos2Model = load_teacher("tiny")
    experts = {name: create_student_model(teacher, StudentConfig(num_layers=1)) for name in ("load", "sales")}
    mixture = build_mixture(experts, MixtureConfig())
    mixture.router = LinearRouter(len(experts))  # chronomoe.training.routing.train_router trains it like any other
    print(f"{sum(parameter.numel() for parameter in mixture.router.parameters())} parameters in the router")


if __name__ == "__main__":
    main()
