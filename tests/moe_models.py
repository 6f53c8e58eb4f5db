"""Models with MoE layers that look trained: routers take sides, and experts differ."""

import torch


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
