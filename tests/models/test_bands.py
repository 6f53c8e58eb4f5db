"""Recalibrated bands: fitted by split-conformal calibration, kept with a checkpoint, applied by the pipeline."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file

from chronomoe import ChronoMoEPipeline, load_model
from chronomoe.checkpoints.bands import FILE
from chronomoe.data.windows import WindowConfig
from chronomoe.errors import InputError
from chronomoe.evaluation.tasks import forecast, make_task
from chronomoe.models.bands import WIDEST, Bands, fit_bands
from chronomoe.stages.bands import recalibrate_checkpoint
from sample_series import sample_domain

LEVELS = [0.1, 0.25, 0.5, 0.75, 0.9]
Z = np.array([-1.2816, -0.6745, 0.0, 0.6745, 1.2816])
"""Quantiles of the standard normal distribution at ``LEVELS``."""


def normal_forecasts(rows, horizon=3, *, spread=1.0, seed=0):
    """Draw values around forecasts of several units whose bands are ``spread`` times as wide as they should be."""
    rng = np.random.default_rng(seed)
    centre = 50 * rng.standard_normal((rows, 1, horizon))
    unit = rng.uniform(0.1, 10, (rows, 1, 1))
    target = centre[:, 0] + unit[:, 0] * rng.standard_normal((rows, horizon))
    return centre + spread * unit * Z[:, None], target


def fit(quantiles, target, *, expert=None, num_experts=1, levels=LEVELS):
    expert = np.zeros(len(target), dtype=np.int64) if expert is None else expert
    return fit_bands(quantiles, target, expert=expert, num_experts=num_experts, levels=levels)


def coverage(quantiles, target, bands, expert=None):
    expert = torch.zeros(len(target), dtype=torch.long) if expert is None else torch.from_numpy(expert)
    found = bands.apply(torch.from_numpy(quantiles).float(), expert=expert, median=2).numpy()
    return ((found[:, 0] <= target) & (target <= found[:, -1])).mean()


@pytest.mark.parametrize("spread", [0.3, 1.0, 3.0])
def test_bands_cover_what_they_say_on_new_windows(spread):
    bands = fit(*normal_forecasts(2000, spread=spread))
    new = normal_forecasts(4000, spread=spread, seed=1)
    assert coverage(*new, bands) == pytest.approx(0.8, abs=0.02)


def test_a_factor_is_the_conformal_quantile_of_the_scores():
    target = np.arange(1.0, 20.0)[:, None]  # 19 scores of a band that ends at 1 above a median of 0
    quantiles = np.tile(np.array([-1.0, 0.0, 1.0])[:, None], (19, 1, 1))
    bands = fit(quantiles, target, levels=[0.1, 0.5, 0.9])
    assert bands.factor[0, :, 0].tolist() == [16.0, 1.0, 16.0]  # ceil(20 * 0.8) = 16th smallest


def test_each_expert_has_its_own_factors():
    expert = np.repeat([0, 1], 500)
    parts = [normal_forecasts(500, spread=spread, seed=seed) for seed, spread in enumerate((0.5, 2.0))]
    quantiles, target = (np.concatenate(pair) for pair in zip(*parts, strict=True))
    bands = fit(quantiles, target, expert=expert, num_experts=3)
    outer = bands.factor[:, [0, -1]].mean(dim=(1, 2))
    assert outer[0].item() == pytest.approx(2.0, rel=0.15)
    assert outer[1].item() == pytest.approx(0.5, rel=0.15)
    torch.testing.assert_close(bands.factor[2], fit(quantiles, target).factor[0])  # no window: those of all
    assert bands.windows.tolist() == [500, 500, 0]


def test_missing_values_and_bands_without_width_count_nowhere():
    quantiles, target = normal_forecasts(200)
    expected = fit(quantiles, target)
    unseen = np.concatenate([target, np.full((50, 3), np.nan)])
    more = np.concatenate([quantiles, quantiles[:50]])
    torch.testing.assert_close(fit(more, unseen).factor, expected.factor)
    flat = np.concatenate([quantiles, np.zeros((50, 5, 3))])
    torch.testing.assert_close(fit(flat, np.concatenate([target, np.ones((50, 3))])).factor, expected.factor)


def test_too_few_windows_are_refused_with_the_number_needed():
    with pytest.raises(InputError, match=r"band of 80% needs at least 4 windows .*, got 3 windows"):
        fit(*normal_forecasts(3))


@pytest.mark.parametrize("kept", [[0, -1], [0, 2, 3]])
def test_levels_that_are_no_pairs_around_a_median_are_refused(kept):
    quantiles, target = normal_forecasts(20)
    with pytest.raises(
        InputError, match=r"around the median, between levels such as 0.1 and 0.9; the model has \[0.1, "
    ):
        fit(quantiles[:, kept], target, levels=[LEVELS[place] for place in kept])


def test_the_median_stays_and_later_steps_take_the_last_factors():
    bands = Bands(torch.tensor([[[2.0, 3.0], [1.0, 1.0], [0.5, 0.5]]]), torch.tensor([9]))
    quantiles = torch.tensor([-1.0, 1.0, 5.0])[None, :, None].expand(1, 3, 4)
    found = bands.apply(quantiles, expert=torch.zeros(1, dtype=torch.long), median=1)
    assert found[0].tolist() == [[-3.0, -5.0, -5.0, -5.0], [1.0] * 4, [3.0] * 4]


@pytest.fixture
def domains():
    return [sample_domain("wave", length=400), sample_domain("spikes", count=2, length=400)]


@pytest.fixture
def saved(make_mixture, tmp_path):
    """Folder of a mixture."""
    ChronoMoEPipeline(make_mixture(routing={"top_k": 2})).save_pretrained(tmp_path / "moe")
    return tmp_path / "moe"


WINDOWS = WindowConfig(context_length=96, horizon=16, min_context_length=16)


@pytest.fixture
def calibrated(saved, domains, tmp_path):
    bands = recalibrate_checkpoint(saved, domains, tmp_path / "calibrated", windows=WINDOWS, part="train")
    return tmp_path / "calibrated", bands


def test_a_calibrated_checkpoint_forecasts_with_its_bands(saved, calibrated, domains):
    folder, bands = calibrated
    task = make_task(domains[0], WINDOWS)
    before, after = (ChronoMoEPipeline.from_pretrained(path) for path in (saved, folder))
    routed = before.routing([window.context for window in task.windows])
    names = before.model.config.expert_names
    expert = torch.tensor([names.index(next(iter(gates))) for gates in routed])
    expected = bands.apply(torch.from_numpy(forecast(before, task)), expert=expert, median=4)
    np.testing.assert_allclose(forecast(after, task), expected, rtol=1e-5, atol=1e-5)
    assert not np.allclose(forecast(before, task), expected)


def test_a_mixture_covers_the_windows_that_it_was_calibrated_on(saved, calibrated, domains):
    task = make_task(domains[1], WINDOWS, part="train", stride=2)

    def outside(name):
        found = forecast(ChronoMoEPipeline.from_pretrained(name), task)
        return abs(((found[:, 0] <= task.target) & (task.target <= found[:, -1])).mean() - 0.8)

    assert outside(calibrated[0]) < min(0.08, outside(saved))


def test_cross_learning_gives_each_series_the_bands_of_its_own_expert(saved, calibrated, domains):
    folder, bands = calibrated
    contexts = [window.context for window in make_task(domains[0], WINDOWS).windows]
    before, after = (ChronoMoEPipeline.from_pretrained(path) for path in (saved, folder))
    options = {"prediction_length": 16, "cross_learning": True}
    names = before.model.config.expert_names
    expert = torch.tensor([names.index(next(iter(gates))) for gates in before.routing(contexts)])
    expected = bands.apply(torch.cat(before.predict(contexts, **options)), expert=expert, median=4)
    torch.testing.assert_close(torch.cat(after.predict(contexts, **options)), expected)


def test_a_constant_stays_constant(calibrated):
    (found,) = ChronoMoEPipeline.from_pretrained(calibrated[0]).predict([torch.full((60,), 7.0)], prediction_length=40)
    assert (found == 7).all()


def test_bands_are_saved_again_and_fitted_anew(calibrated, domains, tmp_path):
    folder, bands = calibrated
    ChronoMoEPipeline.from_pretrained(folder).save_pretrained(tmp_path / "copy")
    torch.testing.assert_close(load_model(tmp_path / "copy").bands, bands)
    again = recalibrate_checkpoint(folder, domains, tmp_path / "again", windows=WINDOWS, part="train")
    torch.testing.assert_close(again.factor, bands.factor)  # of the model's own forecasts, not of stretched ones


def test_a_plain_student_is_calibrated_too(teacher_folder, domains, tmp_path):
    bands = recalibrate_checkpoint(teacher_folder, domains, tmp_path / "out", windows=WINDOWS, part="train")
    assert bands.factor.shape == (1, 9, 16)
    torch.testing.assert_close(load_model(tmp_path / "out").bands.factor, bands.factor)


def test_fine_tuning_is_refused(calibrated):
    pipeline = ChronoMoEPipeline.from_pretrained(calibrated[0])
    with pytest.raises(
        InputError, match=r"recalibrated, which would not fit the new weights; fine-tune the checkpoint"
    ):
        pipeline.fit([np.arange(200.0)], prediction_length=4)


def change(folder, *, metadata=None, **tensors):
    """Write the bands of a checkpoint with changes."""
    path = folder / FILE
    with path.open("rb") as opened:
        size = int.from_bytes(opened.read(8), "little")
        facts = json.loads(opened.read(size))["__metadata__"]
    save_file(load_file(path) | tensors, path, metadata=facts | (metadata or {}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metadata": {"format": "2"}}, "their format is '2', this version reads '1'"),
        ({"metadata": {"levels": "[0.5]"}}, r"they are for the levels \[0.5\], the model has \[0.1, "),
        ({"metadata": {"experts": '["x"]'}}, r'they are for the experts \["x"\], the model has \["power"'),
        ({"factor": torch.ones(4, 9)}, r"factor must be of 4 experts, 9 levels and 1 to \d+ steps, got \[4, 9\]"),
        ({"factor": torch.ones(3, 9, 16)}, r"factor must be of 4 experts, 9 levels and 1 to \d+ steps"),
        ({"factor": torch.full((4, 9, 2), torch.nan)}, f"factors must be float32 from 0 to {WIDEST:g}"),
        ({"factor": torch.full((4, 9, 2), -1.0)}, f"factors must be float32 from 0 to {WIDEST:g}"),
        ({"factor": torch.ones(4, 9, 2, dtype=torch.float64)}, "factors must be float32"),
        ({"windows": torch.ones(2)}, r"they must hold factor, windows of 4 experts"),
        ({"more": torch.ones(2)}, r"they must hold factor, windows of 4 experts"),
    ],
)
def test_bands_that_do_not_fit_are_refused(calibrated, changes, message):
    change(calibrated[0], **changes)
    with pytest.raises(InputError, match=rf"the bands of .* are refused: {message}"):
        load_model(calibrated[0])


def test_bands_that_are_cut_short_are_refused(calibrated):
    path = calibrated[0] / FILE
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(InputError, match=r"the bands of .* are refused: .*recalibrate the checkpoint, or delete its"):
        load_model(calibrated[0])


def test_bands_of_another_mixture_are_refused(calibrated, experts, make_mixture, tmp_path):
    fewer = {name: experts[name] for name in list(experts)[:2]}
    ChronoMoEPipeline(make_mixture(members=fewer)).save_pretrained(tmp_path / "other")
    shutil.copy(calibrated[0] / FILE, tmp_path / "other")
    with pytest.raises(InputError, match="they are for the experts"):
        load_model(tmp_path / "other")


def test_an_interrupted_forecast_is_not_continued_with_other_bands(saved, calibrated, make_frame, tmp_path):
    from chronomoe.predict.files import Forecaster

    make_frame(2, 100).to_csv(tmp_path / "past.csv", index=False)
    outs = [tmp_path / "a.parquet", tmp_path / "b.parquet"]
    for name, out in zip((saved, calibrated[0]), outs, strict=True):
        Forecaster(str(name), horizon=4).write(tmp_path / "past.csv", out)
    found = [pd.read_parquet(out) for out in outs]
    np.testing.assert_allclose(found[0].predictions, found[1].predictions, rtol=1e-5)
    assert not np.allclose(found[0]["0.9"], found[1]["0.9"])


def test_the_command_writes_a_checkpoint(chronomoe, refused, saved, make_frame, tmp_path):
    make_frame(6, 400).to_csv(tmp_path / "power.csv", index=False)
    words = [saved, tmp_path / "power.csv", "--horizon", 8, "--context-length", 64, "--out"]
    assert "part must be train, validation or test, got 'x'" in refused(
        "recalibrate", *words, tmp_path / "n", "--part", "x"
    )
    status, out, _ = chronomoe("recalibrate", *words, tmp_path / "new")
    assert status == 0
    assert out.startswith(f"saved {tmp_path / 'new'}: bands of ")
    assert "recalibrated for 8 steps" in (tmp_path / "new" / "README.md").read_text()
    assert f"the output folder {tmp_path / 'new'} is not empty" in refused("recalibrate", *words, tmp_path / "new")
