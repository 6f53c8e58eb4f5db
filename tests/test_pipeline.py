"""Forecasts, embeddings, routing, and loading by every door."""

import warnings

import datasets
import fev
import numpy as np
import pandas as pd
import pytest
import torch
from chronos import BaseChronosPipeline, Chronos2Pipeline
from chronos.df_utils import validate_and_normalize_df

from chronomoe import (
    ChronoMoEPipeline,
    InputError,
    MixtureConfig,
    RoutingConfig,
    build_mixture,
    load_model,
)

LEVELS = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]
PATCH, ONE_PASS = 16, 32
FORECASTING = {"quantiles": LEVELS, "context_length": 64, "max_output_patches": 2}
NAMES = ["traffic", "weather", "generalist"]


@pytest.fixture
def plain(make_teacher):
    return make_teacher(num_layers=2, forecasting=FORECASTING)


@pytest.fixture
def mixture(make_teacher):
    experts = {name: make_teacher(seed, num_layers=1, forecasting=FORECASTING) for seed, name in enumerate(NAMES)}
    torch.manual_seed(0)
    mixture = build_mixture(experts, MixtureConfig(routing=RoutingConfig(threshold=None)))
    with torch.no_grad():  # make the untrained router take sides, so that series differ in their experts
        mixture.router.network[-1].weight.mul_(20)
    return mixture


@pytest.fixture(params=["plain", "mixture"])
def model(request):
    return request.getfixturevalue(request.param)


@pytest.fixture
def pipeline(model):
    return ChronoMoEPipeline(model)


@pytest.fixture
def saved(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.fixture
def series(make_context):
    """Three variates of each of four series."""
    return make_context(12, 80).view(4, 3, 80)


def with_covariates(series, horizon):
    """Past values of two covariates, future values of one of them."""
    future = np.linspace(0, 1, horizon, dtype=np.float32)
    return [
        {
            "target": one[:1].numpy(),
            "past_covariates": {"known": one[1].numpy(), "past": one[2].numpy()},
            "future_covariates": {"known": future},
        }
        for one in series
    ]


def inputs_of(kind, series, horizon):
    return {
        "univariate": [one[0] for one in series],
        "ragged": [one[0, start:] for start, one in zip((0, 7, 50, 79), series, strict=True)],
        "multivariate": series,
        "covariates": with_covariates(series, horizon),
    }[kind]


def forecast(pipeline, inputs, horizon=20):
    return torch.stack(pipeline.predict(inputs, prediction_length=horizon))


def assert_close(actual, expected):
    """Equal but for the order of sums: other kernels run for other batches and for memory-mapped weights."""
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


KINDS = ["univariate", "ragged", "multivariate", "covariates"]
VARIATES = {"univariate": 1, "ragged": 1, "multivariate": 3, "covariates": 1}


def frame_of(series, columns=("target", "known", "past"), horizon=0):
    """Return a long frame, and a second one with the future of "known"."""
    time = pd.date_range("2024-01-01", periods=series.shape[-1] + horizon, freq="h")
    past, future = time[: series.shape[-1]], time[series.shape[-1] :]
    rows = [
        pd.DataFrame({"item_id": f"item {index}", "timestamp": past} | dict(zip(columns, one.numpy(), strict=True)))
        for index, one in enumerate(series)
    ]
    known = [
        pd.DataFrame({"item_id": f"item {index}", "timestamp": future, "known": np.linspace(0, 1, horizon)})
        for index in range(len(series))
    ]
    return pd.concat(rows, ignore_index=True), pd.concat(known, ignore_index=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("horizon", [20, 3 * ONE_PASS])
@pytest.mark.parametrize("cross_learning", [False, True])
@pytest.mark.filterwarnings("ignore:We recommend keeping prediction length")
def test_a_plain_model_gives_the_stock_numbers_in_order(make_teacher, series, kind, horizon, cross_learning):
    inputs = inputs_of(kind, series, horizon)
    both = []
    for pipeline in (Chronos2Pipeline, ChronoMoEPipeline):
        model = make_teacher(num_layers=2, forecasting=FORECASTING)
        both.append(
            pipeline(model).predict(inputs, prediction_length=horizon, batch_size=5, cross_learning=cross_learning)
        )
    expected = [stock.sort(dim=1).values for stock in both[0]]
    if kind == "ragged" and not cross_learning:
        expected[-1].fill_(series[-1, 0, -1])  # one value, so constant
    for stock, ours in zip(expected, both[1], strict=True):
        assert_close(ours, stock)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("horizon", [20, 3 * ONE_PASS])
@pytest.mark.parametrize("cross_learning", [False, True])
@pytest.mark.filterwarnings("ignore:We recommend keeping prediction length")
def test_a_mixture_forecasts_every_kind_of_input(mixture, series, kind, horizon, cross_learning):
    pipeline = ChronoMoEPipeline(mixture)
    inputs = inputs_of(kind, series, horizon)
    forecast = pipeline.predict(inputs, prediction_length=horizon, cross_learning=cross_learning)
    assert [tuple(one.shape) for one in forecast] == [(VARIATES[kind], len(LEVELS), horizon)] * 4
    assert all(one.isfinite().all() for one in forecast)


@pytest.mark.filterwarnings("ignore:We recommend keeping prediction length")
@pytest.mark.parametrize("kind", KINDS)
def test_a_mixture_of_copies_forecasts_as_its_expert_does_even_unrolled(plain, series, kind):
    mixture = build_mixture({"one": plain, "other": plain}, MixtureConfig())
    inputs = inputs_of(kind, series, 3 * ONE_PASS)
    expected = ChronoMoEPipeline(plain).predict(inputs, prediction_length=3 * ONE_PASS)
    actual = ChronoMoEPipeline(mixture).predict(inputs, prediction_length=3 * ONE_PASS)
    for expert, mixed in zip(expected, actual, strict=True):
        assert_close(mixed, expert)


@pytest.mark.parametrize("kind", KINDS)
def test_a_forecast_does_not_depend_on_the_batch_size(pipeline, series, kind):
    inputs = inputs_of(kind, series, 20)
    alone = pipeline.predict(inputs, prediction_length=20, batch_size=1)
    together = pipeline.predict(inputs, prediction_length=20, batch_size=256)
    for one, other in zip(alone, together, strict=True):
        assert_close(one, other)


@pytest.mark.parametrize("kind", KINDS)
def test_in_cross_learning_a_series_learns_from_those_that_chose_its_expert(mixture, series, kind):
    pipeline, inputs = ChronoMoEPipeline(mixture), inputs_of(kind, series, 20)
    pipeline.set_routing(top_k=1)
    with torch.no_grad():  # series that differ little choose other experts all the same
        scores = mixture.router(mixture.router_inputs(series.flatten(end_dim=1)[:, -64:]))
        mixture.router.network[-1].bias.sub_(scores.mean(dim=0))
    chosen = [next(iter(gates)) for gates in pipeline.routing(inputs)]
    assert len(set(chosen)) > 1  # the comparison means something
    actual = pipeline.predict(inputs, prediction_length=20, cross_learning=True)
    for index, name in enumerate(NAMES):  # the slow reference: a stock pipeline for each expert
        members = [place for place, expert in enumerate(chosen) if expert == name]
        if members:
            expected = Chronos2Pipeline(mixture.experts[index]).predict(
                [inputs[place] for place in members], prediction_length=20, cross_learning=True
            )
            for place, one in zip(members, expected, strict=True):
                assert_close(actual[place], one.sort(dim=1).values)


@pytest.mark.filterwarnings("ignore:We recommend keeping prediction length")
def test_in_cross_learning_of_copies_the_expert_of_a_series_does_not_matter(plain, series):
    mixture = build_mixture({"one": plain, "other": plain}, MixtureConfig(routing=RoutingConfig(top_k=2)))
    options = {"prediction_length": 3 * ONE_PASS, "cross_learning": True}
    expected = ChronoMoEPipeline(plain).predict(series, **options)
    for one, other in zip(ChronoMoEPipeline(mixture).predict(series, **options), expected, strict=True):
        assert_close(one, other)


class Watched(ChronoMoEPipeline):
    """Notes how long the rows of each batch are."""

    lengths = ()

    def _predict_batch(self, context, *args, **options):
        self.lengths = (*self.lengths, context.shape[1])
        return super()._predict_batch(context, *args, **options)


def test_series_of_similar_length_share_a_batch_and_come_back_in_order(plain, make_context):
    rows = make_context(6, 60)
    inputs = [row[-length:] for row, length in zip(rows, (60, 5, 58, 7, 9, 55), strict=True)]
    pipeline = Watched(plain)
    actual = pipeline.predict(inputs, prediction_length=20, batch_size=3)
    assert pipeline.lengths == (9, 60)
    for values, one in zip(inputs, actual, strict=True):
        assert_close(one, pipeline.predict([values], prediction_length=20)[0])


def test_series_far_longer_than_the_rest_get_a_batch_of_their_own_and_change_no_forecast(mixture, make_context):
    """Ragged series and groups of several sizes, alone, as given and in another order."""
    rows, pairs = make_context(120, 128), make_context(8, 128, seed=1).view(4, 2, 128)
    inputs = [row[None, -5:] for row in rows[:118]] + [rows[118:119], rows[119:]] + [pair[:, -40:] for pair in pairs]
    inputs += [make_context(3, 128, seed=2)]
    pipeline = Watched(mixture)
    together = pipeline.predict(inputs, prediction_length=20)
    assert pipeline.lengths == (5, 64)
    assert_close(pipeline.predict(inputs[::-1], prediction_length=20, batch_size=4)[::-1], together)
    for values, one in list(zip(inputs, together, strict=True))[110:]:
        assert_close(pipeline.predict([values], prediction_length=20)[0], one)


def test_cross_learning_keeps_the_callers_batches(plain, make_context):
    inputs = [row[-length:] for row, length in zip(make_context(4, 60), (60, 5, 58, 7), strict=True)]
    pipeline = Watched(plain)
    pipeline.predict(inputs, prediction_length=20, batch_size=2, cross_learning=True)
    assert pipeline.lengths == (60, 58)


def test_known_covariates_change_the_forecast_of_a_mixture(mixture, series):
    pipeline = ChronoMoEPipeline(mixture)
    inputs = with_covariates(series, 20)
    other = [{**entry, "future_covariates": {"known": 9 - entry["future_covariates"]["known"]}} for entry in inputs]
    first, second = (pipeline.predict(each, prediction_length=20) for each in (inputs, other))
    assert not any(torch.allclose(one, two) for one, two in zip(first, second, strict=True))


def test_predict_quantiles_gives_the_levels_asked_for_in_their_order(pipeline, series):
    inputs = inputs_of("univariate", series, 20)
    quantiles, median = pipeline.predict_quantiles(inputs, prediction_length=20, quantile_levels=[0.9, 0.15, 0.5])
    raw = pipeline.predict(inputs, prediction_length=20)
    assert_close(quantiles[0][..., 0], raw[0][:, LEVELS.index(0.9)])
    assert_close(quantiles[0][..., 1], raw[0][:, :2].mean(dim=1))  # half way from 0.1 to 0.2
    assert_close(median[0], raw[0][:, LEVELS.index(0.5)])


def test_predict_df_gives_the_numbers_of_predict_with_covariates(pipeline, series):
    past, future = frame_of(series, horizon=20)
    table = pipeline.predict_df(past, future_df=future, prediction_length=20)
    expected = pipeline.predict(with_covariates(series, 20), prediction_length=20)
    assert list(table["item_id"].unique()) == [f"item {index}" for index in range(4)]
    assert table["timestamp"].iloc[0] == past["timestamp"].iloc[-1] + pd.Timedelta("1h")
    median = torch.stack([one[0, LEVELS.index(0.5)] for one in expected]).flatten().numpy()
    np.testing.assert_allclose(table["predictions"], median, rtol=1e-3, atol=1e-3)


def test_predict_df_forecasts_several_targets_together(pipeline, series):
    past, _ = frame_of(series, columns=("a", "b", "c"))
    table = pipeline.predict_df(past, target=["a", "b", "c"], prediction_length=20)
    expected = forecast(pipeline, series)
    assert len(table) == 4 * 3 * 20
    np.testing.assert_allclose(table["0.9"], expected[:, :, LEVELS.index(0.9)].flatten(), rtol=1e-3, atol=1e-3)


@pytest.fixture
def fev_task(series, tmp_path):
    time = pd.date_range("2024-01-01", periods=series.shape[-1], freq="h")
    rows = [
        {"id": f"item {index}", "timestamp": time.tolist()} | dict(zip(("a", "b", "known"), one.tolist(), strict=True))
        for index, one in enumerate(series)
    ]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "data.parquet")

    def make(**changes):
        settings = {"target": ["a", "b"], "known_dynamic_columns": ["known"], "horizon": 8, "num_windows": 2}
        return fev.Task(
            dataset_path=str(tmp_path / "data.parquet"),
            eval_metric="SQL",
            quantile_levels=LEVELS,
            **(settings | changes),
        )

    return make


@pytest.mark.parametrize("as_univariate", [False, True])
def test_predict_fev_is_scored_by_fev(pipeline, fev_task, as_univariate):
    task = fev_task()
    predictions, seconds = pipeline.predict_fev(task, as_univariate=as_univariate)
    summary = task.evaluation_summary(predictions, model_name="ours")
    assert len(predictions) == 2
    assert np.isfinite(summary["test_error"])
    assert seconds > 0


def test_predict_fev_can_fine_tune_a_mixture_first(mixture, fev_task, tmp_path):
    options = {"num_steps": 1, "output_dir": tmp_path / "tuned", "batch_size": 6, "disable_tqdm": True}
    task = fev_task(num_windows=1)
    predictions, _ = ChronoMoEPipeline(mixture).predict_fev(task, finetune_kwargs=options)
    assert np.isfinite(task.evaluation_summary(predictions, model_name="ours")["test_error"])


@pytest.mark.parametrize("kind", ["univariate", "multivariate"])
def test_embed_gives_one_token_a_patch_and_two_more(pipeline, series, kind):
    tokens, loc_scale = pipeline.embed(inputs_of(kind, series, 0))
    expected = (VARIATES[kind], 64 // PATCH + 2, 48)
    assert [tuple(one.shape) for one in tokens] == [expected] * 4
    assert len(loc_scale) == 4
    assert all(one.isfinite().all() for one in tokens)


def test_embed_gives_the_numbers_of_the_stock_pipeline_for_a_plain_model(make_teacher, series):
    stock, ours = (
        pipeline(make_teacher(num_layers=2, forecasting=FORECASTING)).embed(series)[0]
        for pipeline in (Chronos2Pipeline, ChronoMoEPipeline)
    )
    assert_close(torch.stack(ours), torch.stack(stock))


def test_a_pipeline_forecasts_without_dropout(mixture, series):
    pipeline = ChronoMoEPipeline(mixture.train())
    first, second = (forecast(pipeline, series) for _ in range(2))
    assert torch.equal(first, second)


def test_every_loader_gives_the_same_numbers_after_saving(pipeline, saved, series):
    expected = forecast(pipeline, series)
    for loader in (ChronoMoEPipeline, BaseChronosPipeline, Chronos2Pipeline):
        loaded = loader.from_pretrained(saved)
        assert_close(forecast(loaded, series).sort(dim=2).values, expected)  # stock leaves a plain model's as they come


@pytest.mark.parametrize("loader", [BaseChronosPipeline, Chronos2Pipeline])
def test_stock_entry_points_return_our_pipeline_for_a_mixture_and_it_fits(mixture, series, tmp_path, loader):
    ChronoMoEPipeline(mixture).save_pretrained(tmp_path / "moe")
    loaded = loader.from_pretrained(tmp_path / "moe", device_map="cpu")
    assert type(loaded) is ChronoMoEPipeline
    options = {"num_steps": 1, "batch_size": 6, "output_dir": tmp_path, "disable_tqdm": True}
    assert forecast(loaded.fit(series, prediction_length=8, **options), series, 8).isfinite().all()


@pytest.mark.parametrize("loader", [BaseChronosPipeline, Chronos2Pipeline])
def test_stock_entry_points_stay_stock_for_a_plain_model(plain, tmp_path, loader):
    ChronoMoEPipeline(plain).save_pretrained(tmp_path / "plain")
    assert type(loader.from_pretrained(tmp_path / "plain")) is Chronos2Pipeline


def test_subclasses_of_the_stock_pipeline_stay_what_they_are(mixture, tmp_path):
    class Mine(Chronos2Pipeline):
        pass

    ChronoMoEPipeline(mixture).save_pretrained(tmp_path / "moe")
    assert type(Mine.from_pretrained(tmp_path / "moe")) is Mine


def test_the_stock_entry_point_refuses_what_it_refused_before(tmp_path):
    with pytest.raises(ValueError, match="Unrecognized model"):
        Chronos2Pipeline.from_pretrained(tmp_path)


@pytest.mark.filterwarnings("ignore:We recommend keeping prediction length")
def test_forecasts_do_not_follow_the_default_dtype_of_the_program(pipeline, saved, series):
    expected, tokens = forecast(pipeline, series, 80), pipeline.embed(series)[0][0]
    torch.set_default_dtype(torch.float64)
    try:
        for each in (pipeline, ChronoMoEPipeline.from_pretrained(saved)):
            assert_close(forecast(each, series, 80), expected)
            assert_close(each.embed(series)[0][0], tokens)
    finally:
        torch.set_default_dtype(torch.float32)


def test_an_unknown_way_to_fit_is_refused(pipeline, series, tmp_path, unchecked):
    with pytest.raises(InputError, match="finetune_mode must be 'full' or 'lora', got 'qlora'"):
        pipeline.fit(series, prediction_length=8, finetune_mode="qlora", output_dir=tmp_path)


def test_the_stock_pipeline_saves_a_mixture_that_loads_again(mixture, series, tmp_path):
    Chronos2Pipeline(mixture.eval()).save_pretrained(tmp_path / "moe")
    loaded = BaseChronosPipeline.from_pretrained(tmp_path / "moe")
    expected = forecast(Chronos2Pipeline(mixture), series).sort(dim=2).values
    assert_close(forecast(loaded, series), expected)


def test_the_calls_that_autogluon_makes_work_on_a_mixture(mixture, series, tmp_path):
    ChronoMoEPipeline(mixture).save_pretrained(tmp_path / "moe")
    pipeline = BaseChronosPipeline.from_pretrained(str(tmp_path / "moe"), device_map="cpu", dtype="float32")
    assert pipeline.model.dtype == torch.float32
    quantiles, median = pipeline.predict_quantiles(
        inputs_of("covariates", series, 8), prediction_length=8, quantile_levels=[0.1, 0.5, 0.9], batch_size=2
    )
    assert quantiles[0].shape == (1, 8, 3)
    assert median[0].shape == (1, 8)
    past, future = frame_of(series, horizon=8)
    past, future = validate_and_normalize_df(df=past, future_df=future, target_columns=["target"], prediction_length=8)
    table = pipeline.predict_df(
        past, future_df=future, target="target", prediction_length=8, quantile_levels=[0.1, 0.9], validate_inputs=False
    )
    assert len(table) == 4 * 8


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch_size", [1, 256])
def test_routing_names_the_experts_of_each_series_and_their_gates(mixture, series, kind, batch_size):
    answer = ChronoMoEPipeline(mixture).routing(inputs_of(kind, series, 20), batch_size=batch_size)
    assert len(answer) == 4
    for gates in answer:
        assert len(gates) == mixture.top_k
        assert set(gates) <= set(NAMES)
        assert list(gates.values()) == sorted(gates.values(), reverse=True)
        assert sum(gates.values()) == pytest.approx(1)


def test_routing_is_what_the_forecast_uses(mixture, series):
    pipeline = ChronoMoEPipeline(mixture)
    output = mixture(series[:, 0, -64:])
    for row, gates in enumerate(pipeline.routing(series[:, :1])):
        assert list(gates) == [NAMES[index] for index in output.routing.expert[row]]
        assert list(gates.values()) == pytest.approx(output.routing.gate[row].tolist())


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_set_routing_changes_top_k_and_stays_after_saving(mixture, series, tmp_path, top_k):
    pipeline = ChronoMoEPipeline(mixture)
    pipeline.set_routing(top_k=top_k, temperature=3.0)
    assert all(len(gates) == top_k for gates in pipeline.routing(series))
    pipeline.save_pretrained(tmp_path / "moe")
    assert load_model(tmp_path / "moe").moe.routing == RoutingConfig(top_k=top_k, temperature=3.0, threshold=None)


def test_set_routing_turns_dynamic_k_on_and_off(mixture, series):
    pipeline = ChronoMoEPipeline(mixture)
    pipeline.set_routing(top_k=3, threshold=0.01)
    assert all(len(gates) == 1 for gates in pipeline.routing(series))
    pipeline.set_routing(temperature=2.0)
    assert mixture.moe.routing.threshold == 0.01
    pipeline.set_routing(threshold=None)
    assert all(len(gates) == 3 for gates in pipeline.routing(series))


def test_set_routing_sends_series_to_the_generalist_where_the_router_is_unsure(mixture, series):
    pipeline = ChronoMoEPipeline(mixture)
    pipeline.set_routing(fallback="generalist", fallback_below=1.0)
    assert pipeline.routing(series) == [{"generalist": 1.0}] * 4


def test_set_routing_refuses_more_experts_than_there_are(mixture):
    with pytest.raises(InputError, match="top_k must be from 1 to 3, the number of experts, got 4"):
        ChronoMoEPipeline(mixture).set_routing(top_k=4)


def test_set_routing_refuses_a_generalist_that_does_not_exist(plain):
    pipeline = ChronoMoEPipeline(build_mixture({"one": plain, "other": plain}, MixtureConfig()))
    with pytest.raises(InputError, match="needs an expert named 'generalist', got one, other; use 'equal'"):
        pipeline.set_routing(fallback="generalist", fallback_below=0.5)


def test_a_plain_model_has_no_routing(plain, series):
    pipeline = ChronoMoEPipeline(plain)
    with pytest.raises(
        InputError, match="routing needs a mixture of distilled experts, this pipeline holds a ExactChronos2Model"
    ):
        pipeline.routing(series)
    with pytest.raises(InputError, match="set_routing needs a mixture"):
        pipeline.set_routing(top_k=1)


@pytest.mark.parametrize("levels", [[0.1, 0.5, 0.9], [0.05, 0.5, 0.6, 0.95]])
@pytest.mark.parametrize("horizon", [32, 100])  # within one pass and beyond it
def test_a_model_of_other_levels_than_upstream_s_forecasts(make_teacher, context, levels, horizon):
    pipeline = ChronoMoEPipeline(make_teacher(forecasting={"quantiles": levels}))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # upstream advises against long horizons
        quantiles, _ = pipeline.predict_quantiles(context[:2, None], prediction_length=horizon, quantile_levels=levels)
    for quantile in quantiles:
        assert quantile.shape == (1, horizon, len(levels))
        assert quantile.isfinite().all()
        assert (quantile.diff(dim=-1) >= 0).all()
