"""What a mixture's configuration holds about its experts, and what they must have in common."""

import copy
from collections.abc import Sequence
from typing import Any

from chronos.chronos2.config import Chronos2CoreConfig

from chronomoe.errors import InputError


def check_same_task(cores: Sequence[Chronos2CoreConfig], names: Sequence[str]) -> None:
    """Refuse experts that cannot be averaged: other quantile levels, patch size, horizon or context."""
    if not cores:
        raise InputError("a mixture needs at least one expert, got none")
    if len(names) != len(cores) or len(set(names)) != len(names):
        raise InputError(f"every expert needs a name of its own: {len(cores)} experts, names {list(names)}")
    keys = ("quantiles", "input_patch_size", "output_patch_size", "max_output_patches", "context_length", "use_arcsinh")
    first = cores[0].chronos_config
    for name, core in zip(names[1:], cores[1:], strict=True):
        for key in keys:
            if core.chronos_config.get(key) != first.get(key):
                raise InputError(
                    f"experts must share {key}: {names[0]!r} has {first.get(key)}, {name!r} has "
                    f"{core.chronos_config.get(key)}; distil them from one teacher"
                )


def core_fields(config: Chronos2CoreConfig) -> dict[str, Any]:
    """Return what a mixture's configuration holds about one expert."""
    fields = ("d_model", "d_kv", "d_ff", "num_layers", "num_heads", "dropout_rate", "layer_norm_epsilon")
    more = ("initializer_factor", "feed_forward_proj", "rope_theta", "chronos_config")
    known = {"provenance": copy.deepcopy(config.provenance)} if getattr(config, "provenance", None) else {}
    return {name: copy.deepcopy(getattr(config, name)) for name in (*fields, *more)} | known
