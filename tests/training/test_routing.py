import pytest
import torch

from chronomoe.data.domains import Domain
from chronomoe.data.windows import EvaluationWindows, JoinedWindows, WindowConfig, collate, model_inputs
from chronomoe.errors import InputError
from chronomoe.models.mixture.router import pool_groups
from chronomoe.training.losses import quantile_loss
from chronomoe.training.routing import (
    RouterTrainingConfig,
    expert_losses,
    forecast_with_experts,
    mixture_quantile_loss,
    mixture_quantiles,
    train_router,
)
from conftest import EXPERTS
from sample_series import sample_domain

CONFIG = WindowConfig(context_length=64, horizon=20, min_context_length=32)
LEVELS = torch.linspace(0.1, 0.9, 9)


def joined(*domains, part="train"):
    """Return the windows of some domains and the domain of each."""
    windows = JoinedWindows([EvaluationWindows(domain, CONFIG, part=part) for domain in domains])
    return windows, [windows.owner(index) for index in range(len(windows))]


@pytest.fixture(scope="module")
def mixed():
    """Univariate windows, multivariate ones with covariates, and one never observed before its cutoff."""
    gaps = sample_domain("wave", count=2, length=100, variates=2)
    gaps.series[0].target[1, :64] = torch.nan
    gaps.series[1].target[1, 40:] = torch.nan
    return joined(sample_domain("wave"), sample_domain("spikes", variates=2, past_only=("p",), known=("k",)), gaps)


@pytest.fixture
def pair(make_mixture, experts):
    def build(**options):
        return make_mixture(members={name: experts[name] for name in ("power", "retail")}, **options)

    return build


@pytest.fixture
def perfect(pair):
    """Return cached forecasts of two domains with one perfect expert each, for training and for validation."""

    def build(mixture):
        parts = []
        for part in ("train", "test"):
            windows, owner = joined(sample_domain("wave", count=6), sample_domain("spikes", count=6), part=part)
            cached = forecast_with_experts(mixture, windows, domain_of=owner)
            gap = (cached.domain[:, None] != torch.arange(2)).float()[:, :, None, None]
            quantiles = cached.target[:, None, None].expand_as(cached.quantiles) + gap
            parts.append(cached._replace(quantiles=quantiles.half()))
        return parts

    return build


def choices(mixture, data):
    """Return the best expert of each group."""
    return pool_groups(mixture.router(data.features), group=data.member, observed=data.observed).argmax(dim=1)


@pytest.mark.parametrize("top_k", [1, 2, len(EXPERTS)])
@pytest.mark.parametrize("options", [{}, {"threshold": 0.7}, {"fallback": "generalist", "fallback_below": 0.5}])
def test_cached_forecasts_are_the_mixtures_own(make_mixture, mixed, top_k, options):
    mixture = make_mixture(routing={"top_k": top_k} | options)
    windows, owner = mixed
    cached = forecast_with_experts(mixture, windows, domain_of=owner, batch_size=7)
    batch = collate(list(windows), patch_size=16)
    with torch.no_grad():
        own = mixture(**model_inputs(batch)).normalized_preds[..., :20]
    kept = batch["future_target"].isfinite().any(dim=1)
    assert 0 < kept.sum() < len(kept)
    torch.testing.assert_close(mixture_quantiles(mixture, cached), own[kept], rtol=2e-3, atol=2e-3)


def test_the_cache_keeps_targets_domains_and_groups_of_rows_with_a_target(make_mixture, mixed):
    mixture = make_mixture()
    windows, owner = mixed
    cached = forecast_with_experts(mixture, windows, domain_of=owner, batch_size=5)
    kept = [index for index, window in enumerate(windows) for row in window.target if (row == row).any()]
    assert cached.domain.tolist() == [owner[index] for index in kept]
    assert cached.group.tolist() == [sorted(set(kept)).index(index) for index in kept]
    assert cached.quantiles.shape == (len(kept), len(EXPERTS), 9, 20)
    assert cached.quantiles.dtype == torch.float16
    assert len(cached.member) == sum(len(windows[index].context) for index in set(kept))


def test_windows_without_any_target_are_left_out_and_refused_alone(make_mixture):
    mixture = make_mixture()
    seen, empty = sample_domain("wave", count=2), sample_domain("wave", count=1, name="empty")
    windows, owner = joined(seen)
    expected = forecast_with_experts(mixture, windows, domain_of=owner)
    empty.series[0].target[:, 32:] = torch.nan
    both = Domain(name="both", series=[seen.series[0], *empty.series, seen.series[1]], seasonality=12)
    windows, owner = joined(both)
    cached = forecast_with_experts(mixture, windows, domain_of=owner, batch_size=3)
    assert torch.equal(cached.group, expected.group)
    torch.testing.assert_close(cached.quantiles, expected.quantiles, rtol=1e-2, atol=1e-2)
    windows, owner = joined(empty)
    with pytest.raises(InputError, match="no window has a target: every value to be forecast is missing"):
        forecast_with_experts(mixture, windows, domain_of=owner)


def test_expert_losses_are_mean_quantile_losses_over_observed_steps(make_mixture, mixed):
    mixture = make_mixture()
    cached = forecast_with_experts(mixture, mixed[0], domain_of=mixed[1])
    losses = expert_losses(cached, LEVELS)
    for row in (0, len(losses) - 1):
        seen = cached.target[row].isfinite()
        for index in range(len(EXPERTS)):
            quantiles, target = cached.quantiles[row, index].float()[None, :, seen], cached.target[row][None, seen]
            expected = quantile_loss(quantiles, target, levels=LEVELS).mean()
            torch.testing.assert_close(losses[row, index], expected)


LEARNING = {
    "both": {"target_weight": 1.0},
    "targets alone": {"target_weight": 1.0, "mixture_weight": 0.0},
    "forecasts alone": {"target_weight": 0.0},
    "chosen experts": {"mixture": "top_k"},
    "gumbel": {"routing": {"gumbel": True}},
}


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("way", LEARNING)
def test_a_router_learns_to_separate_two_domains(pair, perfect, top_k, way):
    options = dict(LEARNING[way])
    mixture = pair(routing={"top_k": top_k} | options.pop("routing", {}))
    train, validation = perfect(mixture)
    experts = {name: value.clone() for name, value in mixture.experts.state_dict().items()}
    untrained = mixture_quantile_loss(mixture, validation)
    curve = train_router(mixture, train, validation, RouterTrainingConfig(epochs=30, batch_size=16, **options))
    assert (choices(mixture, validation) == validation.domain).float().mean() > 0.95
    assert mixture_quantile_loss(mixture, validation) < 0.4 * untrained
    assert curve["loss"][-1] < curve["loss"][0]
    assert all(torch.equal(value, experts[name]) for name, value in mixture.experts.state_dict().items())
    assert not mixture.router.training


def test_a_router_started_from_centroids_knows_the_domains_before_it_learns(pair, perfect):
    for init, right in (("random", False), ("centroids", True)):
        mixture = pair(routing={"top_k": 1}, router={"hidden_sizes": (16,)})
        train, validation = perfect(mixture)
        config = RouterTrainingConfig(init=init, epochs=1, learning_rate=1e-12)
        train_router(mixture, train, validation, config)
        assert ((choices(mixture, validation) == validation.domain).float().mean() > 0.95) == right


def test_a_training_in_which_nothing_reaches_the_router_is_refused(pair, perfect):
    mixture = pair(routing={"top_k": 1})
    config = RouterTrainingConfig(mixture="top_k", target_weight=0.0)
    with pytest.raises(
        InputError, match="at top_k 1 the chosen expert's gate is always 1.* need a target_weight above 0"
    ):
        train_router(mixture, *perfect(mixture), config)
    train, _ = perfect(mixture)
    same = off_by(train, 0.0, 0.2)  # one expert is best on both domains
    with pytest.raises(InputError, match="domains on which different experts are best; set mixture to 'all'"):
        train_router(mixture, same, same, RouterTrainingConfig(mixture="top_k"))


def test_labels_that_name_one_expert_for_all_are_left_out(pair, perfect):
    states = []
    for weight in (0.0, 1.0):
        mixture = pair(routing={"top_k": 1})
        train, _ = perfect(mixture)
        data = off_by(train, 0.0, 0.2)
        train_router(mixture, data, data, RouterTrainingConfig(epochs=3, target_weight=weight))
        states.append(mixture.router.state_dict())
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_a_label_is_the_best_expert_of_a_domain_whatever_a_window_says(pair, perfect):
    mixture = pair(routing={"top_k": 1})
    train, validation = perfect(mixture)
    flipped = torch.arange(len(train.domain)) % 3 == 0  # a third of the windows liked the other domain's expert
    quantiles = torch.where(flipped[:, None, None, None], train.quantiles.flip(1), train.quantiles)
    config = RouterTrainingConfig(epochs=30, batch_size=16, target_weight=1.0, mixture_weight=0.0)
    train_router(mixture, train._replace(quantiles=quantiles), validation, config)
    assert (choices(mixture, validation) == validation.domain).float().mean() > 0.95


def test_the_same_seed_gives_the_same_router_and_leaves_the_global_generator_alone(pair, perfect):
    routers = []
    for seed in (3, 3, 4):
        mixture = pair(routing={"top_k": 2, "gumbel": True})
        train, validation = perfect(mixture)
        state = torch.random.get_rng_state()
        train_router(mixture, train, validation, RouterTrainingConfig(epochs=2, batch_size=16, seed=seed))
        assert torch.equal(state, torch.random.get_rng_state())
        routers.append(torch.cat([value.flatten() for value in mixture.router.state_dict().values()]))
    assert torch.equal(routers[0], routers[1])
    assert not torch.equal(routers[0], routers[2])


def off_by(data, *gaps):
    """Return cached forecasts in which each expert errs by its own gap everywhere."""
    gap = torch.tensor(gaps)[:, None, None].expand(data.quantiles.shape[1:])
    return data._replace(quantiles=(data.target[:, None, None] + gap).half())


def test_early_stopping_keeps_the_best_epoch_its_bias_too(pair, perfect):
    mixture = pair(balance={"bias_rate": 0.5}, routing={"top_k": 1})
    train, _ = perfect(mixture)
    data = off_by(train, 0.0, 0.2)  # the bias brings in the worse expert as the training goes on
    curve = train_router(mixture, data, data, RouterTrainingConfig(epochs=25, batch_size=16, patience=4))
    best = min(curve["eval_loss"])
    assert mixture_quantile_loss(mixture, data) == pytest.approx(best)
    assert len(curve["eval_loss"]) == curve["eval_loss"].index(best) + 1 + 4 < 25


def test_an_untrained_router_that_is_best_is_kept(pair, perfect):
    mixture = pair(routing={"top_k": 2})
    train, validation = perfect(mixture)
    train_router(mixture, train, validation, RouterTrainingConfig(epochs=30, batch_size=16))
    before = mixture_quantile_loss(mixture, validation)
    swapped = train._replace(quantiles=train.quantiles.flip(1))
    curve = train_router(mixture, swapped, validation, RouterTrainingConfig(epochs=9, patience=3))
    assert len(curve["eval_loss"]) == 3
    assert min(curve["eval_loss"]) > before == mixture_quantile_loss(mixture, validation)


@pytest.mark.parametrize("balance", [{"weight": 30.0}, {"weight": 30.0, "kind": "switch"}, {"bias_rate": 0.5}])
def test_balancing_raises_the_entropy_of_the_load(pair, perfect, balance):
    def entropy(balance):
        mixture = pair(routing={"top_k": 1}, balance=balance)
        with torch.no_grad():
            mixture.router.network[-1].bias[0] += 10  # at first, all windows go to the first expert
        train, _ = perfect(mixture)
        first, second = off_by(train, 0.0, 0.2), off_by(train, 0.2, 0.0)  # what is best in training is not later
        train_router(mixture, first, second, RouterTrainingConfig(epochs=20, patience=20))
        used = (mixture_quantiles(mixture, first) - first.target[:, None]).abs().mean(dim=(1, 2)) > 0.1
        share = torch.stack([used.float().mean(), 1 - used.float().mean()])
        return torch.special.entr(share).sum()

    assert entropy(balance) > entropy({}) + 0.1


def test_rows_of_a_group_share_their_routing(pair, mixed):
    mixture = pair(routing={"top_k": 1})
    cached = forecast_with_experts(mixture, mixed[0], domain_of=mixed[1])
    used = mixture_quantiles(mixture, cached)
    chosen = choices(mixture, cached)
    torch.testing.assert_close(used, cached.quantiles[torch.arange(len(used)), chosen[cached.group]].float())
    curve = train_router(mixture, cached, cached, RouterTrainingConfig(epochs=2, batch_size=4))
    assert torch.tensor(curve["loss"] + curve["eval_loss"]).isfinite().all()


def test_domains_count_alike_in_the_loss_of_a_mixture(pair, perfect):
    mixture = pair(routing={"top_k": 2})
    _, data = perfect(mixture)
    both = mixture_quantile_loss(mixture, data)
    again = [
        torch.cat([part, part[data.domain == 0]]) for part in (data.group, data.quantiles, data.target, data.domain)
    ]
    more = data._replace(**dict(zip(("group", "quantiles", "target", "domain"), again, strict=True)))
    assert mixture_quantile_loss(mixture, more) == pytest.approx(both)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"mixture": "some"}, "mixture must be 'all' or 'top_k', got 'some'"),
        ({"learning_rate": float("nan")}, "learning_rate must be a finite number, got nan"),
        ({"noise": -0.1}, "noise must be at least 0, got -0.1"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"target_weight": float("nan")}, "target_weight must be a finite number, got nan"),
        ({"target_weight": 0.0, "mixture_weight": 0.0}, "target_weight and mixture_weight must not both be 0"),
    ],
)
def test_impossible_trainings_of_a_router_are_refused(unchecked, options, message):
    with pytest.raises(InputError, match=message):
        RouterTrainingConfig(**options)
