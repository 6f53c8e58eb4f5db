"""The one validation loss, by which students, routers and mixtures are compared and training stops."""

import functools

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedModel

from chronomoe.data.windows import JoinedWindows, Window, collate, model_inputs, to_device
from chronomoe.errors import InputError
from chronomoe.training.losses import quantile_loss


def row_losses(
    quantiles: Float[Tensor, "row quantile horizon"],
    target: Float[Tensor, "row horizon"],
    *,
    levels: Float[Tensor, " quantile"],
) -> Float[Tensor, " row"]:
    """Mean quantile loss of each row over its observed steps, in normalised space; NaN where it has none."""
    observed = target.isfinite()
    loss = quantile_loss(quantiles, torch.where(observed, target, 0.0), levels=levels)
    return torch.where(observed, loss, 0.0).sum(dim=1) / observed.sum(dim=1)


def domain_mean(losses: Float[Tensor, " row"], domain: Int[Tensor, " row"]) -> float:
    """Mean over rows, each domain counting alike."""
    return torch.stack([losses[domain == place].mean() for place in domain.unique()]).mean().item()


@torch.no_grad()
def validation_loss(model: PreTrainedModel, windows: Dataset[Window], *, batch_size: int) -> float:
    """Mean loss of all rows with a target, domains of ``JoinedWindows`` alike; NaN where a forecast is none.

    Only what happened counts, so that students of different teachers, weights and losses can be compared.

    Raises:
        InputError: every step to be forecast is missing.
    """
    model.eval()
    levels = torch.tensor(model.chronos_config.quantiles, device=model.device)
    gather = functools.partial(collate, patch_size=model.chronos_config.output_patch_size)
    losses, domains = [], []
    for loaded in DataLoader(windows, batch_size=batch_size, collate_fn=gather):
        batch = to_device(loaded, model.device)
        output = model(**model_inputs(batch))
        target, _ = model.instance_norm(batch["future_target"], output.loc_scale)
        quantiles = output.normalized_preds[..., : target.shape[1]].float()
        seen = target.isfinite().any(dim=1)
        losses.append(row_losses(quantiles, target, levels=levels)[seen].cpu())
        owner = windows.owner if isinstance(windows, JoinedWindows) else lambda index: 0
        of_window = torch.tensor([owner(index) for index in loaded["window"].tolist()])
        domains.append(of_window[loaded["group_ids"]][seen.cpu()])
    if not sum(map(len, losses)):
        raise InputError("no validation window has a target: every value to be forecast is missing; use other series")
    return domain_mean(torch.cat(losses), torch.cat(domains))
