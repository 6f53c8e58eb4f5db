import copy

import pytest
import torch

from chronomoe.models.chronos2 import use_exact_group_attention
from chronomoe.models.folded import computing_in
from chronomoe.models.scaling import loc_and_scale

TOLERANCE = {"rtol": 1e-4, "atol": 2e-5}  # float32, in the normalised space
GROUPS = {
    "alone": None,
    "mixed": torch.tensor([7, 2, 7, 0, 2, 5]),
    "pairs": torch.tensor([0, 1, 2, 0, 1, 2]),
    "one": torch.zeros(6, dtype=torch.long),
}


@pytest.fixture
def exact(teacher):
    return use_exact_group_attention(teacher)


def plain(model, *args, **inputs):
    """Forecast from the weights as they are: inference folds them, what may need a gradient does not."""
    with torch.enable_grad():
        return model(*args, **inputs).normalized_preds.detach()


def folded(model, *args, **inputs):
    with torch.no_grad():
        return model(*args, **inputs).normalized_preds


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("sizes", [{}, {"num_heads": 1}, {"num_layers": 1}])
def test_folded_weights_give_the_same_numbers(make_teacher, context, gappy, groups, sizes):
    exact = use_exact_group_attention(make_teacher(**sizes))
    for rows in (context, gappy):
        inputs = {"group_ids": GROUPS[groups], "num_output_patches": 2}
        torch.testing.assert_close(folded(exact, rows, **inputs), plain(exact, rows, **inputs), **TOLERANCE)
    assert exact._folds.kept


def test_weights_are_folded_once_and_again_when_they_change(exact, context):
    before = folded(exact, context)
    kept = exact._folds.kept[torch.float32].blocks
    folded(exact, context[:2])
    assert exact._folds.kept[torch.float32].blocks is kept
    with torch.no_grad():
        exact.encoder.block[1].layer[2].layer_norm.weight.mul_(1.5)
    changed = folded(exact, context)
    assert (changed - before).abs().max() > 0.01
    torch.testing.assert_close(changed, plain(exact, context), **TOLERANCE)


def test_a_copy_folds_its_own_weights(exact, context):
    folded(exact, context)
    copied = copy.deepcopy(exact)
    assert not copied._folds.kept
    assert torch.equal(folded(copied, context), folded(exact, context))


def test_another_layer_in_place_of_a_projection_is_not_folded(exact, context):
    class Doubled(torch.nn.Linear):
        def forward(self, states):
            return 2 * super().forward(states)

    projection = exact.encoder.block[0].layer[0].self_attention.v
    projection.__class__ = Doubled
    assert torch.equal(folded(exact, context), plain(exact, context))


@pytest.mark.parametrize("groups", GROUPS)
def test_products_in_bfloat16_stay_near_float32(exact, gappy, groups):
    inputs = {"group_ids": GROUPS[groups], "num_output_patches": 2}
    expected = folded(exact, gappy, **inputs)
    with computing_in(torch.bfloat16):
        output = folded(exact, gappy, **inputs)
    assert output.dtype == torch.float32
    assert exact.dtype == torch.float32  # the parameters stay what they are
    assert 0 < (output - expected).abs().max() < 0.05 * expected.abs().max()


@pytest.mark.parametrize("unit", [1e-35, 1e-25, 1e20, 1e30, 1e36])
def test_forecasts_follow_units_to_the_limits_of_float32(exact, gappy, unit):
    expected = folded(exact, gappy, num_output_patches=2)
    torch.testing.assert_close(folded(exact, gappy * unit, num_output_patches=2), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("level", [0.0, 1e3, -3e6])
def test_mean_and_deviation_are_upstream_s_bit_for_bit_where_float32_holds_the_squares(exact, gappy, level):
    """Scaled by the rounding of its level, a row shows every difference."""
    rows = torch.cat([gappy + level, torch.full((1, gappy.shape[1]), 0.1)])
    expected = exact.instance_norm(rows)[1]
    assert all(torch.equal(*pair) for pair in zip(loc_and_scale(rows, exact.instance_norm), expected, strict=True))


def test_a_lone_row_s_attention_weight_is_dropped_by_head_as_upstream_does(exact, context):
    """Heads of a token are left out or doubled at a rate of one half."""
    exact.encoder.block[0].layer[1].self_attention.dropout = 0.5
    layer = exact.encoder.block[0].layer[1].train()
    layer.dropout.p = 0.0
    attention, seen = layer.self_attention, []
    attention.o.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    torch.manual_seed(0)
    exact(context, num_output_patches=2)
    exact.eval()
    with torch.enable_grad():
        exact(context, num_output_patches=2)
    dropped, whole = (states.unflatten(-1, (attention.n_heads, -1)) for states in seen)
    ratio = (dropped / whole).detach()
    by_head = ratio.mean(dim=-1)
    torch.testing.assert_close(ratio, by_head[..., None].expand(ratio.shape), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(by_head, (by_head > 1).float() * 2, rtol=1e-3, atol=1e-3)
    assert 0.4 < (by_head > 1).float().mean() < 0.6
