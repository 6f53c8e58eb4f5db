import pytest
import torch

from chronomoe.errors import InputError
from chronomoe.models.mixture.features import NUM_FEATURES
from chronomoe.models.mixture.router import RouterConfig, RoutingConfig, TimeSeriesRouter, choose, pool_groups

NUM_EXPERTS = 5
TOP_K = [1, 2, NUM_EXPERTS]


@pytest.fixture
def score():
    return 2 * torch.randn(40, NUM_EXPERTS, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def features():
    return torch.randn(12, NUM_FEATURES, generator=torch.Generator().manual_seed(1))


def weights(routing):
    """Spread the gates over the experts: ``(batch, expert)``."""
    return torch.zeros_like(routing.prob).scatter_add(1, routing.expert, routing.gate)


@pytest.mark.parametrize("top_k", TOP_K)
@pytest.mark.parametrize("more", [{}, {"threshold": 0.7}, {"fallback": "equal", "fallback_below": 0.5}])
def test_gates_sum_to_one_over_experts_that_differ(score, top_k, more):
    routing = choose(score, RoutingConfig(top_k=top_k, **more))
    assert routing.expert.shape == routing.gate.shape == (len(score), top_k)
    torch.testing.assert_close(routing.gate.sum(dim=1), torch.ones(len(score)))
    assert (routing.gate >= 0).all()
    assert all(len(set(row)) == top_k for row in routing.expert.tolist())


@pytest.mark.parametrize("top_k", TOP_K)
def test_the_most_probable_experts_are_chosen_best_first(score, top_k):
    routing = choose(score, RoutingConfig(top_k=top_k, threshold=None))
    for row in range(len(score)):
        best = sorted(range(NUM_EXPERTS), key=lambda expert, row=row: -score[row, expert])[:top_k]
        assert routing.expert[row].tolist() == best
        part = routing.prob[row, best]
        torch.testing.assert_close(routing.gate[row], part / part.sum())


def test_all_experts_have_their_probability_as_gate(score):
    torch.testing.assert_close(
        weights(choose(score, RoutingConfig(top_k=NUM_EXPERTS, threshold=None))), score.softmax(dim=1)
    )


def test_one_expert_has_all_the_weight(score):
    assert torch.equal(choose(score, RoutingConfig(top_k=1)).gate, torch.ones(len(score), 1))


@pytest.mark.parametrize("threshold", [0.05, 0.5, 0.9, 1.0])
def test_dynamic_k_takes_the_fewest_experts_that_reach_the_threshold(score, threshold):
    routing = choose(score, RoutingConfig(top_k=NUM_EXPERTS, threshold=threshold))
    for row in range(len(score)):
        used = int((routing.gate[row] > 0).sum())
        ranked = score[row].softmax(dim=0).sort(descending=True).values
        assert used == NUM_EXPERTS or ranked[:used].sum() >= threshold
        assert used == 1 or ranked[: used - 1].sum() < threshold


def test_dynamic_k_takes_no_more_than_top_k(score):
    routing = choose(score, RoutingConfig(top_k=2, threshold=0.99))
    assert routing.expert.shape[1] == 2
    assert (routing.gate > 0).sum(dim=1).float().mean() > 1.5


def test_dynamic_k_by_hand():
    prob = torch.tensor([[0.5, 0.3, 0.15, 0.05], [0.02, 0.9, 0.05, 0.03]])
    gate = choose(prob.log(), RoutingConfig(top_k=4, threshold=0.75)).gate
    torch.testing.assert_close(gate, torch.tensor([[0.625, 0.375, 0, 0], [1, 0, 0, 0]]))


def test_temperature_divides_scores_and_keeps_the_choice(score):
    cold, warm = (choose(score, RoutingConfig(temperature=temperature)) for temperature in (1.0, 4.0))
    assert torch.equal(cold.expert, warm.expert)
    torch.testing.assert_close(warm.prob, (score / 4).softmax(dim=1))
    assert (warm.gate[:, 0] < cold.gate[:, 0]).all()
    assert torch.equal(warm.score, score)


def test_gumbel_noise_is_drawn_in_training_only(score):
    config = RoutingConfig(gumbel=True)
    quiet = choose(score, RoutingConfig())
    assert all(torch.equal(*pair) for pair in zip(choose(score, config), quiet, strict=True))
    noisy = choose(score, config, training=True, generator=torch.Generator().manual_seed(0))
    assert not torch.equal(noisy.expert, quiet.expert)
    assert torch.equal(choose(score, RoutingConfig(), training=True).expert, quiet.expert)


def test_gumbel_noise_follows_its_generator(score):
    one, same, other = (
        choose(score, RoutingConfig(gumbel=True), training=True, generator=torch.Generator().manual_seed(seed)).prob
        for seed in (0, 0, 1)
    )
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_gumbel_noise_draws_experts_by_their_probability():
    score = torch.tensor([0.6, 0.3, 0.1]).log().expand(20000, -1)
    config = RoutingConfig(top_k=1, gumbel=True)
    drawn = choose(score, config, training=True, generator=torch.Generator().manual_seed(0)).expert
    torch.testing.assert_close(drawn.flatten().bincount() / 20000, torch.tensor([0.6, 0.3, 0.1]), rtol=0, atol=0.02)


def test_temperature_divides_gumbel_noise_too():
    """Drawn experts follow the probabilities at temperature 1, whatever the temperature of the gates."""
    score = torch.tensor([0.6, 0.3, 0.1]).log().expand(20000, -1)
    config = RoutingConfig(top_k=1, gumbel=True, temperature=5.0)
    drawn = choose(score, config, training=True, generator=torch.Generator().manual_seed(0))
    share = drawn.expert.flatten().bincount() / 20000
    torch.testing.assert_close(share, torch.tensor([0.6, 0.3, 0.1]), rtol=0, atol=0.02)


@pytest.mark.parametrize("top_k", TOP_K)
@pytest.mark.parametrize("threshold", [None, 0.9])
def test_a_bias_may_pick_experts_whose_probability_underflows(top_k, threshold):
    score = torch.tensor([[500.0, 0.0, -1.0, -2.0, -3.0]])
    bias = torch.tensor([-1000.0, 0.0, 0.0, 0.0, 0.0])
    routing = choose(score, RoutingConfig(top_k=top_k, threshold=threshold), bias=bias)
    assert routing.prob[0, 1] == 0
    assert routing.expert[0, 0] == 1
    torch.testing.assert_close(routing.gate.sum(dim=1), torch.ones(1))


@pytest.mark.parametrize("top_k", TOP_K)
def test_an_unsure_router_weighs_its_choices_equally(score, top_k):
    sure = choose(score, RoutingConfig(top_k=top_k))
    routing = choose(score, RoutingConfig(top_k=top_k, fallback="equal", fallback_below=0.5))
    unsure = routing.prob.amax(dim=1) < 0.5
    assert 0 < unsure.sum() < len(score)
    assert torch.equal(routing.expert, sure.expert)
    assert torch.equal(routing.gate[~unsure], sure.gate[~unsure])
    torch.testing.assert_close(routing.gate[unsure], torch.full((int(unsure.sum()), top_k), 1 / top_k))


@pytest.mark.parametrize("top_k", TOP_K)
@pytest.mark.parametrize("generalist", range(NUM_EXPERTS))
def test_an_unsure_router_takes_the_generalist_alone_whether_chosen_or_not(score, top_k, generalist):
    sure = choose(score, RoutingConfig(top_k=top_k))
    config = RoutingConfig(top_k=top_k, fallback="generalist", fallback_below=0.5)
    routing = choose(score, config, generalist=generalist)
    unsure = routing.prob.amax(dim=1) < 0.5
    assert 0 < unsure.sum() < len(score)
    assert (weights(routing)[unsure, generalist] == 1).all()
    assert (routing.expert[unsure, 0] == generalist).all()
    assert torch.equal(weights(routing)[~unsure], weights(sure)[~unsure])
    assert all(len(set(row)) == top_k for row in routing.expert.tolist())


def test_a_bias_changes_the_choice_and_not_the_gates(score):
    bias = torch.tensor([0.0, 0.0, 0.0, 0.0, 100.0])
    plain, biased = (choose(score, RoutingConfig(threshold=None), bias=one) for one in (None, bias))
    assert (biased.expert[:, 0] == 4).all()
    assert not torch.equal(plain.expert, biased.expert)
    assert torch.equal(plain.prob, biased.prob)
    prob = score.softmax(dim=1).gather(1, biased.expert)
    torch.testing.assert_close(biased.gate, prob / prob.sum(dim=1, keepdim=True))


def test_half_precision_scores_are_compared_in_float32(score):
    routing = choose(score.to(torch.bfloat16), RoutingConfig())
    assert routing.prob.dtype == routing.gate.dtype == torch.float32


def test_the_router_ignores_the_rest_of_the_batch(features):
    router = TimeSeriesRouter(NUM_EXPERTS, RouterConfig()).eval()
    torch.testing.assert_close(router(features)[3:4], router(features[3:4]))


def test_the_router_standardises_on_its_training_features(features):
    router = TimeSeriesRouter(NUM_EXPERTS, RouterConfig(hidden_sizes=())).eval()
    router.standardize_on(100 + 7 * features)
    standard = (features - features.mean(dim=0)) / features.std(dim=0, correction=0)
    torch.testing.assert_close(router(100 + 7 * features), router.network(standard), rtol=1e-3, atol=1e-3)


def test_standardising_on_one_window_stays_finite(features):
    router = TimeSeriesRouter(NUM_EXPERTS, RouterConfig()).eval()
    router.standardize_on(features[:1])
    assert router(features).isfinite().all()


def test_dropout_acts_in_training_only(features):
    router = TimeSeriesRouter(NUM_EXPERTS, RouterConfig(dropout=0.5))
    assert not torch.equal(router(features), router(features))
    assert torch.equal(router.eval()(features), router(features))


def test_a_group_s_score_is_the_mean_of_its_observed_rows(score):
    group = torch.tensor([0, 1, 0, 2, 2])
    pooled = pool_groups(score[:5], group=group, observed=torch.tensor([1, 1, 0, 0, 0]).bool())
    expected = torch.stack([score[0], score[1], (score[3] + score[4]) / 2])
    torch.testing.assert_close(pooled, expected, rtol=1e-4, atol=1e-4)


def test_hidden_sizes_may_come_as_a_list(unchecked):
    assert RouterConfig(hidden_sizes=[8, 4]) == RouterConfig(hidden_sizes=(8, 4))


@pytest.mark.parametrize("top_k", [NUM_EXPERTS + 1, 99])
def test_an_impossible_top_k_is_refused_with_the_accepted_range(score, top_k):
    with pytest.raises(InputError, match=f"top_k must be from 1 to 5, the number of experts, got {top_k}"):
        choose(score, RoutingConfig(top_k=top_k))


def test_a_generalist_fallback_without_a_generalist_is_refused(score):
    with pytest.raises(InputError, match="needs a mixture with a generalist among its experts"):
        choose(score, RoutingConfig(fallback="generalist"))


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"top_k": 0}, "top_k must be at least 1, got 0"),
        ({"temperature": 0.0}, "temperature must be above 0, got 0.0"),
        ({"temperature": float("nan")}, "temperature .*, got nan"),
        ({"threshold": 1.5}, "threshold must be at most 1, got 1.5"),
        ({"fallback": "best"}, "fallback must be 'none', 'equal' or 'generalist', got 'best'"),
        ({"fallback_below": 2.0}, "fallback_below must be at most 1, got 2.0"),
    ],
)
def test_impossible_routings_are_refused(unchecked, values, text):
    with pytest.raises(InputError, match=text):
        RoutingConfig(**values)


def test_an_impossible_network_is_refused(unchecked):
    with pytest.raises(InputError, match=r"hidden_sizes\[1\] must be at least 1, got 0"):
        RouterConfig(hidden_sizes=(64, 0))
    with pytest.raises(InputError, match="dropout must be below 1, got 1.0"):
        RouterConfig(dropout=1.0)
