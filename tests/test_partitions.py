"""A folder of parts in, a folder of forecasts out; tests/test_on_ray.py does the same on a cluster."""

import json
import shutil
import sys

import numpy as np
import pandas as pd
import pytest

from chronomoe import ChronoMoEPipeline
from chronomoe.errors import InputError
from chronomoe.predict import parts
from chronomoe.predict.files import Forecaster
from chronomoe.predict.parts import DONE, UNFINISHED, predict_parts

HORIZON = 5
PARTS = ("part-0", "part-1", "part-2")


@pytest.fixture
def folder(make_frame, tmp_path):
    """Three parts of two series each."""
    found = tmp_path / "past"
    found.mkdir()
    for number, name in enumerate(PARTS):
        frame = make_frame(2, 60 + 10 * number, seed=number)
        frame.assign(item_id=f"{number}-" + frame.item_id).to_parquet(found / f"{name}.parquet", index=False)
    return found


@pytest.fixture
def forecaster(teacher_folder):
    return Forecaster(str(teacher_folder), horizon=HORIZON)


@pytest.fixture
def asked(monkeypatch):
    """Counts the series that models are asked about."""
    counts, plain = [], ChronoMoEPipeline.predict_quantiles

    def counted(self, inputs, *args, **options):
        counts.append(len(inputs))
        return plain(self, inputs, *args, **options)

    monkeypatch.setattr(ChronoMoEPipeline, "predict_quantiles", counted)
    return counts


def contents(out):
    return {path.name: path.read_bytes() for path in out.iterdir() if not path.name.startswith((".", "_"))}


def test_every_part_becomes_what_it_becomes_as_a_file(forecaster, folder, tmp_path):
    rows = predict_parts(forecaster, folder, tmp_path / "out")
    assert rows == HORIZON * 2 * len(PARTS)
    for name in PARTS:
        forecaster.write(folder / f"{name}.parquet", tmp_path / "alone" / f"{name}.parquet")
    assert contents(tmp_path / "out") == contents(tmp_path / "alone")
    assert (tmp_path / "out" / DONE).exists()
    assert not (tmp_path / "out" / UNFINISHED).exists()


def test_what_was_written_is_read_as_one_table(forecaster, folder, tmp_path):
    predict_parts(forecaster, folder, tmp_path / "out")
    assert len(pd.read_parquet(tmp_path / "out")) == HORIZON * 2 * len(PARTS)


def test_a_killed_call_goes_on_with_the_parts_that_are_missing(forecaster, folder, tmp_path, asked):
    predict_parts(forecaster, folder, tmp_path / "want")
    out = tmp_path / "out"
    shutil.copytree(tmp_path / "want", out)
    (out / DONE).unlink()
    (out / "part-1.parquet").unlink()
    (out / "part-2.parquet").write_bytes((out / "part-2.parquet").read_bytes()[:-9])  # cut by a loss of power
    (out / UNFINISHED / "part-1.host.1.x").mkdir(parents=True)
    asked.clear()
    predict_parts(forecaster, folder, out)
    assert sum(asked) == 4
    assert contents(out) == contents(tmp_path / "want")


def test_a_part_that_has_changed_is_made_again_alone(forecaster, folder, tmp_path, asked):
    predict_parts(forecaster, folder, tmp_path / "out")
    before = contents(tmp_path / "out")
    frame = pd.read_parquet(folder / "part-1.parquet")
    frame.assign(target=frame.target * 2 + 1).to_parquet(folder / "part-1.parquet")
    asked.clear()
    predict_parts(forecaster, folder, tmp_path / "out")
    assert sum(asked) == 2
    assert [name for name, found in contents(tmp_path / "out").items() if found != before[name]] == ["part-1.parquet"]


def test_another_model_or_other_options_do_not_mix_in(forecaster, make_teacher, folder, tmp_path):
    predict_parts(forecaster, folder, tmp_path / "out")
    before = contents(tmp_path / "out")
    with pytest.raises(InputError, match="with other options: horizon is 5, not 6; delete it, or choose a new folder"):
        predict_parts(Forecaster(forecaster.model, horizon=6), folder, tmp_path / "out")
    ChronoMoEPipeline(make_teacher(seed=5, num_layers=1)).save_pretrained(tmp_path / "other")
    with pytest.raises(InputError, match="of another model or with other options: model is '"):
        predict_parts(Forecaster(str(tmp_path / "other"), horizon=HORIZON), folder, tmp_path / "out")
    assert contents(tmp_path / "out") == before


def test_another_routing_of_the_same_weights_does_not_mix_in(make_mixture, folder, tmp_path):
    for top_k in (1, 2):
        ChronoMoEPipeline(make_mixture(routing={"top_k": top_k})).save_pretrained(tmp_path / str(top_k))
    predict_parts(Forecaster(str(tmp_path / "1"), horizon=HORIZON), folder, tmp_path / "out")
    with pytest.raises(InputError, match="of another model or with other options: config is '"):
        predict_parts(Forecaster(str(tmp_path / "2"), horizon=HORIZON), folder, tmp_path / "out")


def test_a_worker_that_loads_another_model_is_refused(forecaster, folder, tmp_path):
    task = parts._Part(forecaster, {}, forecaster.facts | {"model": "0"}, tmp_path)
    with pytest.raises(InputError, match="every worker must load the same model, .* has other weights"):
        task.prepare()


def test_parts_cut_by_time_are_refused_by_the_name_of_a_series(forecaster, make_frame, tmp_path):
    frame = make_frame(2, 120)
    (tmp_path / "past").mkdir()
    for number, part in enumerate(np.array_split(np.arange(120), 3)):
        frame[frame.groupby("item_id").cumcount().isin(part)].to_parquet(tmp_path / "past" / f"{number}.parquet")
    with pytest.raises(InputError, match="must lie in one part, those of item 's0' lie in '0', '1'; write the parts"):
        predict_parts(forecaster, tmp_path / "past", tmp_path / "out")
    assert not (tmp_path / "out" / DONE).exists()


def test_ids_that_share_a_hash_are_not_taken_for_one(forecaster, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "_hashes", lambda made: [np.zeros(2, np.uint64)])
    assert predict_parts(forecaster, folder, tmp_path / "out")


def test_a_mistake_in_a_part_names_it_and_keeps_the_others(forecaster, folder, tmp_path):
    pd.read_parquet(folder / "part-1.parquet").drop(columns="target").to_parquet(folder / "part-1.parquet")
    with pytest.raises(InputError, match="part 'part-1': missing column 'target'"):
        predict_parts(forecaster, folder, tmp_path / "out")
    assert list(contents(tmp_path / "out")) == ["part-0.parquet"]


def test_a_part_without_rows_is_passed_over(forecaster, folder, tmp_path):
    pd.read_parquet(folder / "part-1.parquet")[:0].to_parquet(folder / "part-1.parquet")
    assert predict_parts(forecaster, folder, tmp_path / "out") == HORIZON * 2 * 2
    assert set(contents(tmp_path / "out")) == {"part-0.parquet", "part-2.parquet"}
    assert (tmp_path / "out" / DONE).exists()


def test_the_future_of_a_part_lies_in_a_file_of_its_name(teacher_folder, make_frame, tmp_path):
    for name in ("past", "future", "parts"):
        (tmp_path / name).mkdir()
    for number in range(2):
        frame = make_frame(1, 65, covariate="promo", seed=number).assign(item_id=f"i{number}")
        frame[:60].to_parquet(tmp_path / "past" / f"{number}.parquet")
        frame[60:].drop(columns="target").to_parquet(tmp_path / "future" / f"{number}.parquet")
    futures = Forecaster(str(teacher_folder), horizon=HORIZON, future=tmp_path / "future")
    predict_parts(futures, tmp_path / "past", tmp_path / "out")
    alone = Forecaster(str(teacher_folder), horizon=HORIZON, future=tmp_path / "future" / "1.parquet")
    alone.write(tmp_path / "past" / "1.parquet", tmp_path / "alone.parquet")
    assert (tmp_path / "out" / "1.parquet").read_bytes() == (tmp_path / "alone.parquet").read_bytes()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"engine": "spark"}, "engine must be one of local, ray, got 'spark'"),
        ({"workers": 2}, "workers are those of the engine ray, got 2 of 'local'; pass engine ray"),
        ({"engine": "ray", "workers": 0}, "workers must be at least 1, got 0"),
    ],
)
def test_an_impossible_engine_is_refused(forecaster, folder, tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        predict_parts(forecaster, folder, tmp_path / "out", **options)


def test_a_missing_ray_is_refused_with_the_command_that_installs_it(forecaster, folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError, match=r"needs ray, which is not installed; run: pip install 'chronomoe\[ray\]'"):
        predict_parts(forecaster, folder, tmp_path / "out", engine="ray")


def test_a_folder_that_cannot_be_the_result_is_refused(forecaster, folder, tmp_path):
    with pytest.raises(InputError, match="is also read"):
        predict_parts(forecaster, folder, folder)
    with pytest.raises(InputError, match="are written to a folder, got the file '.*out.parquet'"):
        predict_parts(forecaster, folder, tmp_path / "out.parquet")
    with pytest.raises(InputError, match="parts lie in a folder, got the file"):
        predict_parts(forecaster, folder / "part-0.parquet", tmp_path / "out")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").touch()
    with pytest.raises(InputError, match="holds something else"):
        predict_parts(forecaster, folder, tmp_path / "out")


def test_forecasts_of_parts_that_are_gone_are_refused(forecaster, folder, tmp_path):
    predict_parts(forecaster, folder, tmp_path / "out")
    (folder / "part-2.parquet").unlink()
    with pytest.raises(InputError, match="holds forecasts of parts that .* has not: 'part-2.parquet'; delete them"):
        predict_parts(forecaster, folder, tmp_path / "out")


def test_the_command_takes_a_folder(forecaster, folder, tmp_path, chronomoe):
    status, out, _ = chronomoe("predict", forecaster.model, folder, "--horizon", HORIZON, "--out", tmp_path / "out")
    assert status == 0
    assert f"{HORIZON * 2 * len(PARTS)} rows" in out
    assert json.loads((tmp_path / "out" / parts.MANIFEST).read_text())["horizon"] == HORIZON
