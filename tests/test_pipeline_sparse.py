"""Models with MoE layers in the pipeline: forecasts, embeddings, fine-tuning, and loading by every door."""

import datasets
import fev
import numpy as np
import pandas as pd
import pytest
import torch
from chronos import BaseChronosPipeline, Chronos2Pipeline

from chronomoe import (
    ChronoMoEPipeline,
    Chronos2MoEModel,
    InputError,
    MoEConfig,
    MoEEnhancedChronos2,
    MoEInsertionConfig,
    StudentConfig,
    create_student_model,
    load_model,
    load_teacher,
    upcycle,
)
from moe_models import train_by_chance

LEVELS = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]
PATCH, ONE_PASS = 16, 32
FORECASTING = {"quantiles": LEVELS, "context_length": 64, "max_output_patches": 2}
KINDS = ["univariate", "ragged", "multivariate", "covariates"]
VARIATES = {"univariate": 1, "ragged": 1, "multivariate": 3, "covariates": 1}


@pytest.fixture
def dense(make_teacher):
    return make_teacher(num_layers=2, forecasting=FORECASTING)


@pytest.fixture
def upcycled(dense):
    return train_by_chance(upcycle(dense, MoEConfig(num_experts=4, top_k=2)))


@pytest.fixture
def enhanced(dense):
    return train_by_chance(MoEEnhancedChronos2(dense, MoEInsertionConfig(after=(1, 0))))


@pytest.fixture(params=["upcycled", "enhanced"])
def model(request):
    return request.getfixturevalue(request.param)


@pytest.fixture
def pipeline(model):
    return ChronoMoEPipeline(model)


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
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("horizon", [20, 3 * ONE_PASS])
@pytest.mark.filterwarnings("ignore:We recommend keeping prediction length")
def test_every_kind_of_input_is_forecast_whatever_else_is_in_the_batch(pipeline, series, kind, horizon):
    inputs = inputs_of(kind, series, horizon)
    together = pipeline.predict(inputs, prediction_length=horizon)
    alone = pipeline.predict(inputs, prediction_length=horizon, batch_size=1)
    assert [tuple(one.shape) for one in together] == [(VARIATES[kind], len(LEVELS), horizon)] * 4
    for one, other in zip(together, alone, strict=True):
        assert_close(one, other)


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_that_was_only_upcycled_forecasts_as_the_dense_one_does(dense, series, kind):
    inputs = inputs_of(kind, series, 20)
    expected = [one.sort(dim=1).values for one in Chronos2Pipeline(dense).predict(inputs, prediction_length=20)]
    if kind == "ragged":
        expected[-1].fill_(series[-1, 0, -1])  # one value, so constant
    for model in (upcycle(dense, MoEConfig()), MoEEnhancedChronos2(dense, MoEInsertionConfig(after=(0,)))):
        actual = ChronoMoEPipeline(model).predict(inputs, prediction_length=20)
        for one, other in zip(actual, expected, strict=True):
            assert_close(one, other)


def test_other_variates_and_covariates_change_the_forecast(pipeline, series):
    inputs = with_covariates(series, 20)
    other = [{**entry, "future_covariates": {"known": 9 - entry["future_covariates"]["known"]}} for entry in inputs]
    assert (forecast(pipeline, inputs) - forecast(pipeline, other)).abs().max() > 0.01
    alone = forecast(pipeline, series[:, :1])
    assert (forecast(pipeline, series)[:, :1] - alone).abs().max() > 0.01
    shared = torch.stack(pipeline.predict(series[:, :1], prediction_length=20, cross_learning=True))
    assert (shared - alone).abs().max() > 0.01


def test_predict_df_gives_the_numbers_of_predict(pipeline, series):
    time = pd.date_range("2024-01-01", periods=100, freq="h")
    past = pd.concat(
        pd.DataFrame({"item_id": f"item {index}", "timestamp": time[:80], "target": one[0], "known": one[1]})
        for index, one in enumerate(series.numpy())
    )
    known = np.linspace(0, 1, 20, dtype=np.float32)
    future = pd.concat(
        pd.DataFrame({"item_id": f"item {index}", "timestamp": time[80:], "known": known}) for index in range(4)
    )
    table = pipeline.predict_df(past, future_df=future, prediction_length=20)
    inputs = [
        {"target": one[:1], "past_covariates": {"known": one[1]}, "future_covariates": {"known": known}}
        for one in series.numpy()
    ]
    median = forecast(pipeline, inputs)[:, 0, LEVELS.index(0.5)].flatten()
    np.testing.assert_allclose(table["predictions"], median, rtol=1e-3, atol=1e-3)


def test_predict_fev_is_scored_by_fev(pipeline, series, tmp_path):
    time = pd.date_range("2024-01-01", periods=80, freq="h").tolist()
    rows = [
        {"id": f"item {index}", "timestamp": time} | dict(zip(("a", "b", "known"), one.tolist(), strict=True))
        for index, one in enumerate(series)
    ]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "data.parquet")
    task = fev.Task(
        dataset_path=str(tmp_path / "data.parquet"),
        target=["a", "b"],
        known_dynamic_columns=["known"],
        horizon=8,
        num_windows=2,
        eval_metric="SQL",
        quantile_levels=LEVELS,
    )
    predictions, _ = pipeline.predict_fev(task)
    assert np.isfinite(task.evaluation_summary(predictions, model_name="ours")["test_error"])


@pytest.mark.parametrize("kind", ["univariate", "multivariate"])
def test_embed_gives_one_token_a_patch_and_two_more(pipeline, series, kind):
    tokens, _ = pipeline.embed(inputs_of(kind, series, 0))
    assert [tuple(one.shape) for one in tokens] == [(VARIATES[kind], 64 // PATCH + 2, 48)] * 4
    alone = pipeline.embed(inputs_of(kind, series, 0)[:1])[0][0]
    assert_close(tokens[0], alone)


def test_every_loader_gives_the_same_numbers_after_saving(pipeline, model, series, tmp_path):
    pipeline.save_pretrained(tmp_path / "saved")
    expected = forecast(pipeline, series)
    for loader in (ChronoMoEPipeline, BaseChronosPipeline, Chronos2Pipeline):
        loaded = loader.from_pretrained(tmp_path / "saved")
        assert type(loaded.model) is type(model)
        assert type(loaded) is ChronoMoEPipeline
        assert_close(forecast(loaded, series), expected)


def test_the_stock_pipeline_saves_a_model_that_loads_again(model, series, tmp_path):
    stock = Chronos2Pipeline(model)
    stock.save_pretrained(tmp_path / "saved")
    expected = forecast(stock, series).sort(dim=2).values
    assert_close(forecast(BaseChronosPipeline.from_pretrained(tmp_path / "saved"), series), expected)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_forecasts_nearly_the_same(pipeline, series, tmp_path, dtype):
    pipeline.save_pretrained(tmp_path / "saved")
    narrow = ChronoMoEPipeline.from_pretrained(tmp_path / "saved", dtype=dtype)
    wide, actual = forecast(pipeline, series[:, :1]), forecast(narrow, series[:, :1])
    spread = series[:, :1].std(dim=-1)[:, None]
    assert ((actual - wide).abs() / spread).median() < 0.1


def test_fit_moves_experts_and_routers_of_a_copy_and_saves_it(pipeline, model, series, tmp_path):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    options = {"num_steps": 2, "batch_size": 12, "output_dir": tmp_path, "learning_rate": 1e-2, "disable_tqdm": True}
    tuned = pipeline.fit(series, prediction_length=8, validation_inputs=series, **options)
    after = tuned.model.state_dict()
    for layer in tuned.model.moe_layers.values():
        found = {id(value) for value in layer.parameters()}
        names = [name for name, value in tuned.model.named_parameters() if id(value) in found]
        assert all(not torch.equal(after[name], before[name]) for name in names)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    loaded = BaseChronosPipeline.from_pretrained(tmp_path / "finetuned-ckpt")
    assert_close(forecast(loaded, series, 8), forecast(tuned, series, 8))


def test_fit_leaves_the_base_of_inserted_layers_bit_identical(enhanced, series, tmp_path):
    options = {"num_steps": 2, "batch_size": 12, "output_dir": tmp_path, "learning_rate": 1e-2, "disable_tqdm": True}
    tuned = ChronoMoEPipeline(enhanced).fit(series, prediction_length=8, weight_decay=0.1, **options).model
    assert isinstance(tuned, MoEEnhancedChronos2)
    assert tuned.base_hash() == enhanced.base_hash()
    assert load_model(tmp_path / "finetuned-ckpt").base_hash() == enhanced.base_hash()


def test_fit_lowers_the_error(dense, tmp_path):
    waves = [torch.sin(torch.arange(200.0) / 3 + phase) for phase in range(6)]
    pasts, futures = [wave[:180] for wave in waves], [wave[180:196] for wave in waves]
    inserted = MoEInsertionConfig(after=(0, 1), layer=MoEConfig(num_experts=4, top_k=2, expert_width=96))
    for model in (upcycle(dense, MoEConfig(noise=0.1)), MoEEnhancedChronos2(dense, inserted)):
        options = {"num_steps": 40, "batch_size": 16, "learning_rate": 5e-3, "disable_tqdm": True}
        pipeline = ChronoMoEPipeline(model)
        before, after = (
            Chronos2Pipeline(each.model).predict_quantiles(pasts, prediction_length=16)[
                1
            ]  # sorting helps untrained ones
            for each in (pipeline, pipeline.fit(pasts, 16, output_dir=tmp_path, **options))
        )
        error = [
            sum((one[0] - future).abs().mean() for one, future in zip(median, futures, strict=True))
            for median in (before, after)
        ]
        assert error[1] < 0.7 * error[0]


def test_fit_extends_context_and_horizon_where_asked(pipeline, make_context, tmp_path):
    series = make_context(4, 300)[:, None]
    options = {"num_steps": 1, "batch_size": 4, "output_dir": tmp_path, "disable_tqdm": True}
    pipeline.fit(series, prediction_length=2 * ONE_PASS, context_length=256, **options)
    tuned = ChronoMoEPipeline.from_pretrained(tmp_path / "finetuned-ckpt")
    assert tuned.model_context_length == 256
    assert tuned.model_prediction_length == 2 * ONE_PASS
    assert forecast(tuned, series, 2 * ONE_PASS).isfinite().all()
    assert pipeline.model_context_length == 64


def test_the_model_card_tells_layers_and_active_parameters(upcycled, enhanced, tmp_path):
    for model, facts in (
        (upcycled, ["| in encoder block |", "| 0 | 4 | 2 | 96 | 0 |", "| 1 | 4 | 2 | 96 | 0 |"]),
        (enhanced, ["| after encoder block |", "| 0 | 4 | 1 | 24 | 0 |", f"SHA-256 is `{enhanced.base_hash()}`"]),
    ):
        ChronoMoEPipeline(model).save_pretrained(tmp_path / "saved")
        card = (tmp_path / "saved" / "README.md").read_text()
        for fact in (*facts, "- mixture-of-experts", f"for one token | {model.active_parameters():,} |"):
            assert fact in card
        assert "loads it too, after `import chronomoe`." in card


def test_a_teacher_may_have_moe_layers_but_no_student_is_cut_from_it(upcycled, tmp_path):
    ChronoMoEPipeline(upcycled).save_pretrained(tmp_path / "saved")
    teacher = load_teacher(tmp_path / "saved")
    assert type(teacher) is Chronos2MoEModel
    with pytest.raises(InputError, match="cutting a student needs a dense Chronos-2 model, got a Chronos2MoEModel"):
        create_student_model(teacher, StudentConfig(num_layers=1))


def test_routing_by_series_is_for_mixtures(pipeline, series):
    with pytest.raises(InputError, match="routing needs a mixture of distilled experts, this pipeline holds a "):
        pipeline.routing(series)
