"""Models with MoE layers that look trained: routers take sides, and experts differ."""

import torch

from chronomoe.training.routing import ExpertForecasts


def train_by_chance(model, seed=0):
    """Draw routers and experts of all MoE layers anew, in place."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in model.moe_layers.values():
            layer.router.copy_(torch.randn(layer.router.shape, generator=generator))
            for weight in (layer.wi, layer.wo):
                noise = torch.randn(weight.shape, generator=generator) / weight.shape[-1] ** 0.5
                weight.copy_(weight + noise)
    return model


def take_sides(mixture, seed=0):
    """Draw the router of a mixture so that it tells rows apart, in place."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in mixture.router.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5)
        mixture.router.network[-1].weight.mul_(6)
    return mixture


def router_windows(mixture, context, *, domains=3):
    """Return what a router learns from, of rows that take turns to be of some domains; forecasts are left blank."""
    rows = torch.arange(len(context))
    return ExpertForecasts(
        features=mixture.router_inputs(context),
        member=rows,
        observed=context.isfinite().any(dim=1),
        group=rows,
        quantiles=torch.zeros(len(rows), len(mixture.experts), 9, 16).half(),
        target=torch.zeros(len(rows), 16),
        domain=rows % domains,
    )
