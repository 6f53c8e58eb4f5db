import sys

import pytest
import torch
from chronos import BaseChronosPipeline, Chronos2Pipeline
from chronos.chronos2 import Chronos2Model

from chronomoe import ChronoMoEPipeline, InputError, MoEEnhancedChronos2
from chronomoe.models.chronos2 import ExactChronos2Model

ONE_PASS = 64


@pytest.fixture
def plain(make_teacher):
    return make_teacher(num_layers=2)


@pytest.fixture
def mixture(make_mixture):
    return make_mixture(routing={"top_k": 4})  # all experts, so that all of them learn


@pytest.fixture
def series(make_context):
    """Three variates of each of four series."""
    return make_context(12, 80).view(4, 3, 80)


def forecast(pipeline, inputs, horizon=20):
    return torch.stack(pipeline.predict(inputs, prediction_length=horizon))


def assert_close(actual, expected):
    """Equal but for the order of sums: other kernels run for memory-mapped weights."""
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("validated", [False, True])
def test_fit_moves_experts_and_router_of_a_copy_and_saves_it(mixture, series, tmp_path, validated):
    before = {name: value.clone() for name, value in mixture.state_dict().items()}
    pipeline = ChronoMoEPipeline(mixture)
    tuned = pipeline.fit(
        series,
        prediction_length=8,
        validation_inputs=series if validated else None,
        learning_rate=1e-3,
        num_steps=2,
        batch_size=12,
        output_dir=tmp_path / "fit",
        remove_printer_callback=True,
        disable_tqdm=True,
    )
    assert isinstance(tuned, ChronoMoEPipeline)
    after = tuned.model.state_dict()
    for part in ("experts.0.", "experts.1.", "experts.2.", "experts.3.", "router."):
        assert any(not torch.equal(after[name], before[name]) for name in before if name.startswith(part))
    assert all(torch.equal(value, before[name]) for name, value in mixture.state_dict().items())
    loaded = BaseChronosPipeline.from_pretrained(tmp_path / "fit" / "finetuned-ckpt")
    expected = forecast(tuned, series, 8)
    assert_close(forecast(loaded, series, 8), expected)


def test_fit_lowers_the_loss_of_a_mixture(mixture, make_context, tmp_path):
    time = torch.arange(200.0)
    waves = [torch.sin(time / 3 + phase) for phase in range(6)]
    pipeline = ChronoMoEPipeline(mixture)
    options = {"num_steps": 40, "batch_size": 16, "learning_rate": 2e-3, "output_dir": tmp_path, "disable_tqdm": True}
    tuned = pipeline.fit([wave[:180] for wave in waves], 16, **options)

    def error(model):
        _, median = model.predict_quantiles([wave[:180] for wave in waves], prediction_length=16)
        return sum((one[0] - wave[180:196]).abs().mean() for one, wave in zip(median, waves, strict=True))

    assert error(tuned) < 0.7 * error(pipeline)


def test_fit_extends_context_and_horizon_where_asked(mixture, make_context, tmp_path):
    series = make_context(4, 300)[:, None]
    options = {"num_steps": 1, "batch_size": 4, "output_dir": tmp_path, "disable_tqdm": True}
    ChronoMoEPipeline(mixture).fit(series, prediction_length=2 * ONE_PASS, context_length=256, **options)
    tuned = ChronoMoEPipeline.from_pretrained(tmp_path / "finetuned-ckpt")
    assert tuned.model_context_length == 256
    assert tuned.model_prediction_length == 2 * ONE_PASS
    assert forecast(tuned, series, 2 * ONE_PASS).isfinite().all()
    assert mixture.chronos_config.context_length == 128


def test_fit_of_a_plain_model_returns_our_pipeline_and_a_stock_checkpoint(plain, series, tmp_path):
    options = {"num_steps": 1, "batch_size": 12, "output_dir": tmp_path, "disable_tqdm": True}
    tuned = ChronoMoEPipeline(plain).fit(series, prediction_length=8, **options)
    assert type(tuned) is ChronoMoEPipeline
    assert type(tuned.model) is ExactChronos2Model
    assert (tmp_path / "finetuned-ckpt" / "README.md").is_file()
    assert type(Chronos2Pipeline.from_pretrained(tmp_path / "finetuned-ckpt").model) is Chronos2Model


def test_lora_without_peft_says_what_to_install(mixture, series, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(InputError, match=r"needs peft, which is not installed; run: pip install 'chronomoe\[lora\]'"):
        ChronoMoEPipeline(mixture).fit(series, prediction_length=8, finetune_mode="lora", output_dir=tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"finetune_mode": "half"}, "finetune_mode must be 'full' or 'lora', got 'half'"),
        ({"lora_config": {"r": 2}}, "lora_config needs finetune_mode='lora'"),
    ],
)
def test_fit_refuses_modes_that_do_not_exist(mixture, series, tmp_path, unchecked, options, message):
    with pytest.raises(InputError, match=message):
        ChronoMoEPipeline(mixture).fit(series, prediction_length=8, output_dir=tmp_path, **options)


def test_inserted_layers_leave_the_identity_at_the_default_rate(plain, series, tmp_path):
    grown = ChronoMoEPipeline(MoEEnhancedChronos2(plain))

    def moved(**options):
        tuned = grown.fit(series, 8, num_steps=5, batch_size=12, output_dir=tmp_path, disable_tqdm=True, **options)
        return (forecast(tuned, series) - forecast(grown, series)).abs().max()

    assert moved() > 20 * moved(learning_rate=1e-6)  # upstream's: too little for weights that start at zero
