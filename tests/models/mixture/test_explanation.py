import pytest
import torch

from chronomoe.models.mixture.explanation import explain, feature_groups
from chronomoe.models.mixture.features import NUM_FEATURES, series_features


def test_every_input_of_the_router_is_named_once():
    for size in (NUM_FEATURES, NUM_FEATURES + 48):
        places = [place for _, span in feature_groups(length=512, size=size) for place in range(span.start, span.stop)]
        assert places == list(range(size))


def test_seasons_are_named_by_the_periods_that_they_hold():
    wave = torch.sin(2 * torch.pi * torch.arange(512) / 24)[None]
    features = series_features(wave)[0]
    named = {name: features[span].sum().item() for name, span in feature_groups(length=512, size=len(features))}
    strongest = max((name for name in named if name.startswith("seasons")), key=named.get)
    shortest, longest = (float(word) for word in strongest.split() if word[0].isdigit())
    assert shortest * 0.9 <= 24 <= longest * 1.1


@pytest.mark.parametrize("router", [{}, {"use_patch_embedding": True}])
def test_reasons_sum_to_what_the_series_adds_to_the_difference_of_scores(make_mixture, context, router):
    mixture = make_mixture(router=router)
    features = mixture.router_inputs(context)
    mixture.router.standardize_on(features)
    for row in context:
        inputs = mixture.router_inputs(row[None])
        score = mixture.router(inputs)[0]
        usual = mixture.router(mixture.router.mean[None])[0]
        first, second = score.topk(2).indices.tolist()
        expected = (score[first] - score[second]) - (usual[first] - usual[second])
        found = sum(value for _, value in explain(mixture, row[None], most=1000))
        assert found == pytest.approx(expected.item(), rel=0.05, abs=0.05)


def test_the_strongest_reasons_come_first(make_mixture, context):
    sizes = [abs(value) for _, value in explain(make_mixture(), context[:1], most=7)]
    assert len(sizes) == 7
    assert sizes == sorted(sizes, reverse=True)


def test_rows_without_a_value_say_nothing(make_mixture, context):
    mixture = make_mixture()
    empty = torch.full_like(context[:1], torch.nan)
    assert explain(mixture, torch.cat([context[:1], empty])) == explain(mixture, context[:1])
    assert len(explain(mixture, empty)) == 5
