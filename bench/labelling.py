"""What do the exact forward pass and stored soft targets save in distillation?

Labelling: a full-size teacher labels windows with upstream's code in float32, and with ours in each type. An epoch: a
student trains on a batch whose soft targets come from the store, or from the live teacher with upstream's code.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from answer import answer, exact, full_size, in_turns, medians, ratio

from chronomoe.data.domains import load_domain
from chronomoe.data.soft_targets import SoftTargetStore
from chronomoe.data.windows import TrainingWindows, WindowConfig, collate, model_inputs
from chronomoe.models.chronos2 import use_exact_group_attention
from chronomoe.models.precision import has_bfloat16_units
from chronomoe.models.student import StudentConfig, create_student_model
from chronomoe.training.losses import soft_loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--context-length", type=int, default=512)
    parser.add_argument("--layers", type=int, default=12, help="of the teacher; 12 is the full size")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    windows = TrainingWindows(
        [load_domain("demo:electricity")],
        WindowConfig(context_length=options.context_length, horizon=96, min_context_length=options.context_length),
        size=options.windows,
        seed=0,
    )
    upstream = full_size(num_layers=options.layers)
    ours = exact(upstream)
    batch = collate([windows[index] for index in range(options.windows)], patch_size=16)
    student = use_exact_group_attention(create_student_model(upstream, StudentConfig.preset("slim", upstream)))
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-5, fused=True)

    def label_upstream() -> torch.Tensor:
        with torch.no_grad():
            return upstream(**model_inputs(batch)).quantile_preds

    with tempfile.TemporaryDirectory() as scratch:
        count = 0

        def label(dtype: torch.dtype) -> SoftTargetStore:
            nonlocal count
            count += 1
            folder = Path(scratch) / f"{count}"
            return SoftTargetStore.build(folder, ours, windows, batch_size=options.windows, compute_dtype=dtype)

        store = label(torch.float32)

        def step(soft: torch.Tensor) -> None:
            optimizer.zero_grad()
            normalized = student(**model_inputs(batch)).normalized_preds[..., : soft.shape[-1]]
            soft_loss(normalized, soft).mean().backward()
            optimizer.step()

        def live() -> None:
            label_upstream()  # in place of what it says, so that both train alike
            step(store(batch))

        sides = {
            "labelling upstream float32": label_upstream,
            "labelling ours float32": lambda: label(torch.float32),
            "epoch live upstream": live,
            "epoch from the store": lambda: step(store(batch)),
        }
        if has_bfloat16_units(ours.device):
            sides["labelling ours bf16"] = lambda: label(torch.bfloat16)
        seconds = in_turns(sides, repeats=options.repeats)
    reach = {
        "epoch from the store against a live upstream teacher": ratio(
            seconds, over="epoch live upstream", under="epoch from the store"
        )
    }
    for name in sides:
        if name.startswith("labelling ours"):
            reach[f"labelling against upstream float32, {name.split()[-1]}"] = ratio(
                seconds, over="labelling upstream float32", under=name
            )
    answer("labelling and epochs of distillation", reach=reach, windows=options.windows, milliseconds=medians(seconds))


if __name__ == "__main__":
    main()
