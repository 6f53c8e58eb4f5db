"""What do the exact forward pass and stored soft targets save in distillation?

Labelling: a full-size teacher labels windows with upstream's code in float32, and with ours in each type, its weights
hashed once a store. An epoch: a student trains, in each type, on batches whose soft targets come from the store, or in
float32 on those of the live teacher with upstream's code.
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
    parser.add_argument("--windows", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--context-length", type=int, default=512)
    parser.add_argument("--layers", type=int, default=12, help="of the teacher; 12 is the full size")
    parser.add_argument("--repeats", type=int, default=2)
    options = parser.parse_args()
    windows = TrainingWindows(
        [load_domain("demo:electricity")],
        WindowConfig(context_length=options.context_length, horizon=96, min_context_length=options.context_length),
        size=options.windows,
        seed=0,
    )
    upstream = full_size(num_layers=options.layers)
    ours = exact(upstream)
    parts = torch.arange(options.windows).split(options.batch_size)
    batches = [collate([windows[index] for index in part.tolist()], patch_size=16) for part in parts]
    student = use_exact_group_attention(create_student_model(upstream, StudentConfig.preset("slim", upstream)))
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-5, fused=True)

    def label_upstream() -> None:
        with torch.no_grad():
            for batch in batches:
                upstream(**model_inputs(batch))

    with tempfile.TemporaryDirectory() as scratch:
        count = 0

        def label(dtype: torch.dtype) -> SoftTargetStore:
            nonlocal count
            count += 1
            folder = Path(scratch) / f"{count}"
            return SoftTargetStore.build(folder, ours, windows, batch_size=options.batch_size, compute_dtype=dtype)

        store = label(torch.float32)

        def epoch(*, bf16: bool = False) -> None:
            for batch in batches:
                soft = store(batch)
                optimizer.zero_grad()
                with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                    normalized = student(**model_inputs(batch)).normalized_preds[..., : soft.shape[-1]]
                soft_loss(normalized.float(), soft).mean().backward()
                optimizer.step()

        def live() -> None:
            label_upstream()  # in place of what it says, so that both train alike
            epoch()

        sides = {
            "labelling upstream float32": label_upstream,
            "labelling ours float32": lambda: label(torch.float32),
            "epoch live upstream": live,
            "epoch from the store float32": epoch,
        }
        if has_bfloat16_units(ours.device):
            sides["labelling ours bf16"] = lambda: label(torch.bfloat16)
            sides["epoch from the store bf16"] = lambda: epoch(bf16=True)
        seconds = in_turns(sides, repeats=options.repeats)
    reach = {}
    for name in sides:
        kind = name.split()[-1]
        if name.startswith("labelling ours"):
            measure = f"labelling against upstream float32, {kind}"
            reach[measure] = ratio(seconds, over="labelling upstream float32", under=name)
        elif name.startswith("epoch from"):
            measure = f"epoch from the store against a live upstream teacher, {kind}"
            reach[measure] = ratio(seconds, over="epoch live upstream", under=name)
    answer("labelling and epochs of distillation", reach=reach, windows=options.windows, milliseconds=medians(seconds))


if __name__ == "__main__":
    main()
