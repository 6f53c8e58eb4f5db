"""Keep a mixture's experts as low-rank changes of one model, and add an expert for a new domain.

python examples/grow_a_mixture.py runs/demo/moe grown
"""

import sys
from pathlib import Path

from chronomoe import DistilConfig
from chronomoe.data.domains import load_domain
from chronomoe.data.windows import WindowConfig
from chronomoe.stages.adding import compress_checkpoint, grow_mixture
from chronomoe.training.routing import RouterTrainingConfig


def main(
    model: str,
    out: str,
    *,
    new: str = "demo:web",
    old: str = "demo:traffic",
    context_length: int = 432,
    steps: int = 128,
) -> None:
    folder = Path(out)
    small = compress_checkpoint(model, folder / "compressed", rank=16)
    print("experts before:", ", ".join(small.config.expert_names))
    grown = grow_mixture(
        folder / "compressed",
        load_domain(new),
        [load_domain(old)],
        folder / "grown",
        name="new",
        windows=WindowConfig(context_length=context_length, horizon=48),
        training=DistilConfig(steps=steps),
        router=RouterTrainingConfig(),
    )
    print("grown:", grown)


if __name__ == "__main__":
    main(*sys.argv[1:])
