"""A teacher that forecasts what is unlike all that the router learned from."""

import pytest
import torch

from chronomoe import ChronoMoEPipeline, InputError, load_model
from chronomoe.evaluation.baselines import equal_average
from chronomoe.models.chronos2 import use_exact_group_attention
from chronomoe.models.mixture.compression import compress, with_whole_experts
from chronomoe.models.mixture.explanation import UNFAMILIAR, explain
from chronomoe.models.mixture.familiarity import Familiarity
from chronomoe.training.familiarity import add_teacher
from moe_models import router_windows


@pytest.fixture
def odd(make_context):
    """Rows of saw teeth, of which no walk, season or count is like any."""
    return (torch.arange(100) % 5)[None] * torch.tensor([[1.0], [50.0], [0.1]])


@pytest.fixture
def guarded(make_mixture, make_teacher, make_context):
    """A mixture with a teacher, the same one without, and the teacher."""
    plain, mixture, teacher = make_mixture(), make_mixture(), use_exact_group_attention(make_teacher(seed=9))
    train, watched = (router_windows(mixture, make_context(300, seed=seed)) for seed in (0, 1))
    add_teacher(mixture, teacher, train, watched, familiar=0.9)
    return mixture, plain, teacher


def test_the_teacher_forecasts_what_is_unlike_all_and_experts_the_rest_to_the_bit(guarded, make_context, odd):
    mixture, plain, teacher = guarded
    usual = make_context(12, seed=0)
    batch = torch.cat([usual, odd])
    found, routing = mixture(batch, num_output_patches=2), mixture.route(batch)
    away = routing.expert[:, 0] == len(mixture.experts)
    assert away[len(usual) :].all()
    assert not away[: len(usual)].all()
    assert torch.equal(found.normalized_preds[away], teacher(batch[away], num_output_patches=2).normalized_preds)
    torch.testing.assert_close(
        found.quantile_preds[~away], plain(batch[~away], num_output_patches=2).quantile_preds, rtol=1e-5, atol=1e-5
    )
    assert routing.gates()[away].tolist() == [[0.0] * len(mixture.experts) + [1.0]] * int(away.sum())
    assert torch.equal(routing.prob[:, :-1], plain.route(batch).prob)


def test_as_many_windows_are_familiar_as_asked_for(guarded, make_context):
    mixture, _, _ = guarded
    watched = make_context(300, seed=1)
    away = mixture.route(watched).expert[:, 0] == len(mixture.experts)
    assert int(away.sum()) == 30


def test_the_distance_is_that_of_mahalanobis_to_the_nearest_domain():
    generator = torch.Generator().manual_seed(0)
    centres, spread = torch.tensor([[0.0, 0.0], [20.0, 0.0]]), torch.tensor([1.0, 3.0])
    domain = torch.arange(4000) % 2
    drawn = centres[domain] + spread * torch.randn(4000, 2, generator=generator)
    familiarity = Familiarity.of(drawn, domain)
    points = torch.tensor([[0.0, 0.0], [20.0, 0.0], [0.0, 9.0], [10.0, 0.0]])
    distance = familiarity(points)
    nearest = torch.tensor([0.0, 0.0, 9.0, 100.0])  # squared, in spreads
    scale = drawn.std(dim=0)
    expected = nearest + familiarity.offset.mean()
    torch.testing.assert_close(distance[:2], expected[:2], atol=0.1, rtol=0)
    gap = points[2:] - centres[0]
    variance = spread.square() + 0.03 * scale.square()  # the ridge is that of standardised features
    torch.testing.assert_close(
        distance[2:], (gap.square() / variance).sum(dim=1) + familiarity.offset.mean(), atol=1.0, rtol=0.1
    )


def test_a_domain_of_few_windows_has_a_distance_too():
    features = torch.randn(40, 75, generator=torch.Generator().manual_seed(0))
    familiarity = Familiarity.of(features, (torch.arange(40) >= 38).long())
    assert familiarity(features).isfinite().all()
    assert familiarity(features + 50).min() > familiarity(features).max()


def test_rows_of_a_group_are_forecast_together(guarded, make_context, odd):
    mixture, _, _ = guarded
    batch = torch.cat([odd, odd + 1, make_context(3)])
    groups = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 1])
    expert = mixture.route(batch, group_ids=groups).expert[:, 0]
    for group in range(3):
        assert len(expert[groups == group].unique()) == 1
    assert expert[0] == len(mixture.experts)


def test_all_series_are_familiar_in_training_and_in_plain_averages(guarded, odd):
    mixture, plain, _ = guarded
    assert equal_average(mixture).route(odd).prob.shape == (3, len(mixture.experts))
    assert mixture.route(odd).prob.shape == (3, len(mixture.experts) + 1)
    mixture.train()
    assert mixture.route(odd).prob.shape == (3, len(mixture.experts))
    output = mixture(odd, future_target=odd[:, :16], num_output_patches=1)
    output.loss.backward()
    assert all(parameter.grad is None for parameter in mixture.teacher.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saving_and_loading_keeps_who_forecasts(guarded, make_context, odd, tmp_path, dtype):
    mixture, _, _ = guarded
    ChronoMoEPipeline(mixture).save_pretrained(tmp_path / "moe")
    loaded = load_model(tmp_path / "moe", dtype=dtype)
    batch = torch.cat([make_context(40, seed=3), odd])
    assert loaded.config.expert_names == [*mixture.config.expert_names[:-1], "teacher"]
    assert torch.equal(loaded.route(batch).expert[:, 0] == 4, mixture.route(batch).expert[:, 0] == 4)
    assert loaded.familiarity.precision.dtype == torch.float32
    if dtype == torch.float32:
        assert torch.equal(loaded(batch).quantile_preds, mixture(batch).quantile_preds)


def test_the_pipeline_names_the_teacher_says_why_and_embeds_without_it(guarded, odd):
    mixture, plain, _ = guarded
    assert ChronoMoEPipeline(mixture).routing([odd[0].numpy()]) == [{"teacher": 1.0}]
    assert explain(mixture, odd[:1]) == [(UNFAMILIAR, 1.0)]
    (found,), (expected,) = (ChronoMoEPipeline(one).embed([odd[0].numpy()])[0] for one in (mixture, plain))
    assert torch.equal(found, expected), "experts embed"


def test_the_cost_of_a_series_is_at_most_that_of_experts_or_teacher(guarded):
    mixture, plain, teacher = guarded
    size = sum(parameter.numel() for parameter in teacher.parameters())
    assert mixture.active_parameters() == max(
        plain.active_parameters(), size + sum(parameter.numel() for parameter in plain.router.parameters())
    )


def test_a_compressed_mixture_keeps_its_teacher(make_mixture, make_teacher, make_context, odd):
    alike = {name: use_exact_group_attention(make_teacher(seed=seed, num_layers=1)) for seed, name in enumerate("abc")}
    mixture, teacher = make_mixture(members=alike), use_exact_group_attention(make_teacher(seed=9))
    add_teacher(mixture, teacher, *(router_windows(mixture, make_context(300, seed=seed)) for seed in (0, 1)))
    small = compress(mixture, rank=4)
    for other in (small, with_whole_experts(small)):
        assert torch.equal(other(odd).quantile_preds, mixture(odd).quantile_preds)


def test_what_cannot_be_added_is_refused(guarded, make_mixture, make_teacher, make_context):
    mixture, plain, teacher = guarded
    windows = router_windows(plain, make_context(30))
    with pytest.raises(InputError, match="has a teacher for unfamiliar series already: teacher"):
        add_teacher(mixture, teacher, windows, windows)
    with pytest.raises(InputError, match="every expert needs a name of its own"):
        add_teacher(plain, teacher, windows, windows, name="power")
    other = use_exact_group_attention(make_teacher(forecasting={"max_output_patches": 2}))
    with pytest.raises(InputError, match="experts must share max_output_patches"):
        add_teacher(plain, other, windows, windows)
    reader = make_mixture(router={"use_patch_embedding": True})
    with pytest.raises(InputError, match="set use_patch_embedding to false"):
        add_teacher(reader, teacher, windows, windows)
    assert plain.teacher is None
    assert reader.config.unfamiliar is None
