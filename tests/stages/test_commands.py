import json
import resource
import signal

import pandas as pd
import pytest
import torch
from chronos import Chronos2Pipeline
from chronos.chronos2 import Chronos2Model
from rich.console import Console

from chronomoe import ChronoMoEPipeline, DistilledMoE, InputError, RoutingConfig, StudentConfig
from chronomoe.data.domains import load_domain
from chronomoe.data.windows import WindowConfig
from chronomoe.models.precision import has_bfloat16_units
from chronomoe.models.sparse.config import MoEConfig
from chronomoe.models.sparse.insertion import MoEEnhancedChronos2
from chronomoe.models.sparse.upcycling import Chronos2MoEModel
from chronomoe.stages.evaluation import evaluate_checkpoints
from chronomoe.stages.mixture import compose_mixture
from chronomoe.stages.sparse import expand_checkpoint, upcycle_checkpoint
from chronomoe.stages.students import distil_domain
from chronomoe.training.arguments import DistilConfig
from chronomoe.training.growing import ExpansionConfig
from chronomoe.training.routing import RouterTrainingConfig

WINDOWS = WindowConfig(context_length=64, horizon=16)
QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def domains(series_files):
    return {
        "power": load_domain(series_files["power"]),
        "sales": load_domain(series_files["sales"], known_covariates=["promo"]),
    }


def distil(teacher, domain, out, **changes):
    options = {"windows": WINDOWS, "student": StudentConfig(num_layers=1), "console": QUIET}
    training = DistilConfig(steps=3, batch_size=4, checkpoint_steps=2)
    return distil_domain(str(teacher), domain, out, **options | {"training": training} | changes)


@pytest.fixture(scope="module")
def students(teacher_folder, domains, tmp_path_factory):
    root = tmp_path_factory.mktemp("students")
    return {name: distil(teacher_folder, domain, root / name) for name, domain in domains.items()}


def compose(experts, domains, out, **changes):
    options = {"windows": WINDOWS, "routing": RoutingConfig(top_k=2), "router": RouterTrainingConfig(epochs=1)}
    named = {name: str(path) for name, path in experts.items()}
    return compose_mixture(named, domains, out, console=QUIET, router_windows=8, **options | changes)


@pytest.fixture(scope="module")
def moe(students, domains, tmp_path_factory):
    return compose(students, list(domains.values()), tmp_path_factory.mktemp("moe") / "moe")


def test_a_distilled_student_loads_in_the_stock_pipeline_and_nothing_else_is_left(students):
    folder = students["power"]
    assert type(Chronos2Pipeline.from_pretrained(folder).model) is Chronos2Model
    assert {path.name for path in folder.parent.iterdir()} == {"power", "sales"}
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors", "README.md"}


def test_distilling_again_gives_the_same_bits(students, teacher_folder, domains, tmp_path):
    again = distil(teacher_folder, domains["power"], tmp_path / "again")
    assert (again / "model.safetensors").read_bytes() == (students["power"] / "model.safetensors").read_bytes()


def test_a_student_is_distilled_in_the_type_that_is_asked_for(teacher_folder, domains, tmp_path):
    bits = {}
    for precision in ("float32", "bfloat16", "auto"):
        made = distil(teacher_folder, domains["power"], tmp_path / precision, precision=precision)
        bits[precision] = (made / "model.safetensors").read_bytes()
    assert bits["float32"] != bits["bfloat16"]
    assert bits["auto"] == bits["bfloat16" if has_bfloat16_units(torch.device("cpu")) else "float32"]


def test_distilling_continues_after_an_interruption(students, teacher_folder, domains, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def killed(*args, **kwargs):
        raise Killed

    monkeypatch.setattr(ChronoMoEPipeline, "save_pretrained", killed)
    with pytest.raises(Killed):
        distil(teacher_folder, domains["power"], tmp_path / "s")
    monkeypatch.undo()
    assert list((tmp_path / "s.work" / "stages" / "students" / "student.partial" / "checkpoints").glob("checkpoint-*"))
    again = distil(teacher_folder, domains["power"], tmp_path / "s")
    assert (again / "model.safetensors").read_bytes() == (students["power"] / "model.safetensors").read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


def test_a_composed_mixture_holds_the_students_by_name(moe, students):
    model = ChronoMoEPipeline.from_pretrained(moe).model
    assert isinstance(model, DistilledMoE)
    assert model.config.expert_names == ["power", "sales"]
    saved = ChronoMoEPipeline.from_pretrained(students["sales"]).model.state_dict()
    assert all(torch.equal(value, saved[name]) for name, value in model.experts[1].state_dict().items())


def test_composing_can_keep_the_best_experts_only(students, domains, tmp_path):
    folder = compose(
        students | {"twin": students["power"]},
        list(domains.values()),
        tmp_path / "moe",
        routing=RoutingConfig(top_k=1),
        select=2,
    )
    assert len(ChronoMoEPipeline.from_pretrained(folder).model.experts) == 2


def test_composing_on_a_full_disk_is_refused_and_can_be_continued(students, domains, tmp_path):
    """A limit on file sizes stands for a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 14, limits[1]))
    try:
        with pytest.raises(InputError, match="could not be written, the disk .* is full"):
            compose(students, [domains["power"]], tmp_path / "moe")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert not (tmp_path / "moe").exists()
    compose(students, [domains["power"]], tmp_path / "moe")
    assert [path.name for path in tmp_path.iterdir()] == ["moe"]


@pytest.mark.parametrize("select", [1, 3])
def test_keeping_an_impossible_number_of_experts_is_refused(students, domains, tmp_path, select):
    with pytest.raises(InputError, match=rf"select must be from top_k \(2\) to 2, the number of experts, got {select}"):
        compose(students, [domains["power"]], tmp_path / "moe", select=select)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quantiles": [0.1, 0.5, 0.9]}, "quantiles"),
        ({"input_patch_size": 8, "input_patch_stride": 8, "output_patch_size": 8}, "patch"),
        ({"max_output_patches": 2}, "max_output_patches|horizon"),
    ],
)
def test_experts_made_for_other_tasks_are_refused(students, make_teacher, domains, tmp_path, change, message):
    ChronoMoEPipeline(make_teacher(num_layers=1, forecasting=change)).save_pretrained(tmp_path / "odd")
    with pytest.raises(InputError, match=message):
        compose(students | {"odd": tmp_path / "odd"}, [domains["power"]], tmp_path / "moe")
    assert not (tmp_path / "moe").exists()


def test_windows_longer_than_the_model_takes_are_refused(teacher_folder, students, domains, tmp_path):
    long = WindowConfig(context_length=64, horizon=65)
    with pytest.raises(InputError, match="horizons of at most 64 steps, got 65"):
        distil(teacher_folder, domains["power"], tmp_path / "s", windows=long)
    with pytest.raises(InputError, match="horizons of at most 64 steps, got 65"):
        compose(students, [domains["power"]], tmp_path / "moe", windows=long)
    assert list(tmp_path.iterdir()) == []


def upcycled(teacher, out, **changes):
    config = MoEConfig(**{"num_experts": 4, "top_k": 2} | changes)
    return upcycle_checkpoint(str(teacher), out, config), out


def test_an_upcycled_checkpoint_is_no_expert_of_a_mixture(teacher_folder, students, domains, tmp_path):
    odd = upcycled(teacher_folder, tmp_path / "odd")[1]
    with pytest.raises(InputError, match="expert 'odd' needs a dense Chronos-2 model, got a Chronos2MoEModel"):
        compose(students | {"odd": odd}, [domains["power"]], tmp_path / "moe")
    assert [path.name for path in tmp_path.iterdir()] == ["odd"]


def test_an_upcycled_checkpoint_forecasts_as_the_dense_one(teacher_folder, make_frame, tmp_path):
    model, folder = upcycled(teacher_folder, tmp_path / "moe")
    assert model.active_parameters() < model.num_parameters()
    loaded, dense = (ChronoMoEPipeline.from_pretrained(path) for path in (folder, teacher_folder))
    assert isinstance(loaded.model, Chronos2MoEModel)
    frames = [pipeline.predict_df(make_frame(2, 100), prediction_length=40) for pipeline in (loaded, dense)]
    pd.testing.assert_frame_equal(*frames, rtol=1e-4)


def test_upcycling_again_gives_the_same_bits_and_another_seed_does_not(teacher_folder, tmp_path):
    seeds = {"a": 0, "b": 0, "c": 1}
    bits = [
        (upcycled(teacher_folder, tmp_path / name, seed=seed)[1] / "model.safetensors").read_bytes()
        for name, seed in seeds.items()
    ]
    assert bits[0] == bits[1] != bits[2]


def expanded(model, domains, out, **changes):
    given = {name: changes.pop(name) for name in ("teacher",) if name in changes}
    training = DistilConfig(steps=4, batch_size=4, checkpoint_steps=2, learning_rate=1e-2)
    config = ExpansionConfig(
        **{"layer": MoEConfig(num_experts=2, top_k=1), "probe_steps": 2, "max_layers": 1, "training": training}
        | changes
    )
    return expand_checkpoint(str(model), domains, out, windows=WINDOWS, config=config, console=QUIET, **given)


@pytest.fixture(scope="module")
def grown(teacher_folder, domains, tmp_path_factory):
    out = tmp_path_factory.mktemp("grown") / "grown"
    return expanded(teacher_folder, list(domains.values()), out), out


def test_a_grown_checkpoint_tells_how_it_grew_and_nothing_else_is_left(grown, teacher_folder):
    path, folder = grown
    assert [path.name for path in folder.parent.iterdir()] == ["grown"]
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors", "README.md"}
    model = ChronoMoEPipeline.from_pretrained(folder).model
    assert isinstance(model, MoEEnhancedChronos2)
    base = ChronoMoEPipeline.from_pretrained(teacher_folder).model
    kept = dict(model.base_parameters())
    assert all(torch.equal(value, kept[name]) for name, value in base.named_parameters())
    row = f"| 0 | {path[0]['after']} | {path[0]['before']:.4f} | {path[0]['validation']:.4f} | yes |"
    assert row in (folder / "README.md").read_text()


def test_expanding_continues_after_an_interruption(grown, teacher_folder, domains, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def killed(*args, **kwargs):
        raise Killed

    monkeypatch.setattr(ChronoMoEPipeline, "save_pretrained", killed)
    with pytest.raises(Killed):
        expanded(teacher_folder, list(domains.values()), tmp_path / "s")
    monkeypatch.undo()
    assert (tmp_path / "s.work" / "stages" / "expansion.partial" / "layers" / "layer-0" / "layer.json").is_file()
    assert expanded(teacher_folder, list(domains.values()), tmp_path / "s") == grown[0]
    assert (tmp_path / "s" / "model.safetensors").read_bytes() == (grown[1] / "model.safetensors").read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


def test_a_student_that_no_layer_helps_is_saved_as_it_was(teacher_folder, domains, tmp_path):
    path = expanded(teacher_folder, [domains["power"]], tmp_path / "s", min_gain=0.99, candidates=(0,))
    assert [entry["kept"] for entry in path] == [False]
    saved, base = (ChronoMoEPipeline.from_pretrained(name).model for name in (tmp_path / "s", teacher_folder))
    assert type(saved) is type(base)
    assert all(torch.equal(value, saved.state_dict()[name]) for name, value in base.state_dict().items())
    assert "| no |" in (tmp_path / "s" / "README.md").read_text()


def test_new_layers_follow_a_teacher_of_the_same_quantile_levels(teacher_folder, make_teacher, domains, tmp_path):
    path = expanded(teacher_folder, [domains["power"]], tmp_path / "s", candidates=(1,), teacher=str(teacher_folder))
    assert max(path[0]["curve"]["soft_loss"]) > 0
    ChronoMoEPipeline(make_teacher(forecasting={"quantiles": [0.1, 0.5, 0.9]})).save_pretrained(tmp_path / "odd")
    with pytest.raises(InputError, match="must forecast the same quantile levels, got 3 and 9"):
        expanded(teacher_folder, [domains["power"]], tmp_path / "t", teacher=str(tmp_path / "odd"))
    assert not (tmp_path / "t.work").exists()


def test_checkpoints_are_compared_with_seasonal_naive(moe, students, domains):
    models = [str(moe), str(students["power"])]
    records = evaluate_checkpoints(models, list(domains.values()), horizon=8, context_length=64, limit=3)
    assert {record["model"]: record["kind"] for record in records} == {
        "seasonal naive": "naive",
        str(moe): "mixture",
        str(students["power"]): "student",
    }
    assert {record["domain"] for record in records} == {"power", "sales", "overall"}
    json.dumps(records, allow_nan=False)


def test_data_sets_of_the_same_name_are_refused(students, domains):
    twice = [domains["power"], domains["power"]]
    with pytest.raises(InputError, match="every data set needs a name of its own"):
        evaluate_checkpoints([str(students["power"])], twice, horizon=8, context_length=64, limit=3)


def test_models_of_other_quantile_levels_are_not_compared(students, make_teacher, domains, tmp_path):
    ChronoMoEPipeline(make_teacher(forecasting={"quantiles": [0.1, 0.5, 0.9]})).save_pretrained(tmp_path / "odd")
    models = [str(students["power"]), str(tmp_path / "odd")]
    with pytest.raises(InputError, match="must have the same quantile levels, got .* 9, .* 3"):
        evaluate_checkpoints(models, [domains["power"]], horizon=8, context_length=64, limit=3)
