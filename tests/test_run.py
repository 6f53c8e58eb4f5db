import json
import shutil
import signal
import time
from io import StringIO

import numpy as np
import pytest
import torch
import yaml
from chronos import BaseChronosPipeline
from rich.console import Console

from chronomoe import ChronoMoEPipeline, DistilledMoE, load_model
from chronomoe.errors import InputError
from chronomoe.inputs import Inputs
from chronomoe.models.configuration import parse
from chronomoe.recipe import RunConfig, dump, load_recipe
from chronomoe.run import RESULTS, mixture, run, student, students
from chronomoe.stages.soft_targets import label

FEW = {"steps": 2, "batch_size": 2, "windows": 4}
KINDS = {"teacher", "single", "expert", "generalist", "average", "oracle", "naive", "mixture", "lookup", "chosen"}
EXPERTS = ["begun-power", "begun-sales", "expert-power", "expert-sales"]
STUDENTS = ["generalist", *EXPERTS, "single-power", "single-sales", "generalist-full"]
STAGES = [
    "soft-targets",
    *(f"students/{name}" for name in [*STUDENTS, "generalist-wide"]),
    "expert-forecasts",
    "router",
]


def records(folder):
    return [json.loads(line) for line in (folder / "evaluation.jsonl").read_text().splitlines()]


def weights(folder):
    return (folder / "moe" / "model.safetensors").read_bytes()


def test_a_run_ends_with_everything_promised(finished_run):
    promised = {"report.html", "report.md", "config.yaml", "moe", "recommended", "run.json", "stages", *RESULTS}
    assert promised <= {path.name for path in finished_run.iterdir()}
    assert "own single" in (finished_run / "report.md").read_text()
    assert not list(finished_run.rglob("*.partial"))


def test_a_run_says_what_its_soft_targets_were_computed_in(finished_run):
    store = json.loads((finished_run / "stages" / "soft-targets" / "store" / "store.json").read_text())
    facts = json.loads((finished_run / "run.json").read_text())
    assert store["compute_dtype"] == f"torch.{facts['label_dtype']}"


def test_records_hold_every_kind_in_every_domain_and_overall(finished_run):
    found = records(finished_run)
    assert {record["kind"] for record in found} == KINDS
    for kind in KINDS:
        assert {record["domain"] for record in found if record["kind"] == kind} == {"power", "sales", "overall"}
    assert all(set(record) == {"model", "kind", "domain", "horizon", "metric", "value"} for record in found)
    assert {record["horizon"] for record in found} == {16}
    assert {"WQL", "MASE", "SQL", "MAE", "MSE", "coverage80"} <= {record["metric"] for record in found}


def test_the_saved_configuration_repeats_the_run(finished_run, make_recipe):
    values = yaml.safe_load((finished_run / "config.yaml").read_text())
    assert parse(values, RunConfig, source="saved") == make_recipe()


def test_the_checkpoint_forecasts_through_the_stock_pipeline(finished_run):
    pipeline = BaseChronosPipeline.from_pretrained(finished_run / "moe")
    wave = np.sin(np.arange(90) / 4).astype(np.float32)
    quantiles, _ = pipeline.predict_quantiles([wave], prediction_length=20)
    assert isinstance(pipeline.model, DistilledMoE)
    assert quantiles[0].shape == (1, 20, 9)
    assert torch.isfinite(quantiles[0]).all()


def test_the_experts_are_the_branchedstudents_and_the_generalist(finished_run):
    model = ChronoMoEPipeline.from_pretrained(finished_run / "moe").model
    assert model.config.expert_names == ["generalist", "power", "sales"]
    saved = ChronoMoEPipeline.from_pretrained(finished_run / "stages/students/expert-sales/model").model.state_dict()
    for name, value in model.experts[2].state_dict().items():
        torch.testing.assert_close(value, saved[name])


def test_the_same_command_again_skips_every_stage(finished_run, make_recipe, tmp_path):
    folder = shutil.copytree(finished_run, tmp_path / finished_run.name)
    console = Console(file=StringIO())
    run(make_recipe(), folder, console=console)
    lines = console.file.getvalue().splitlines()
    assert sorted(lines) == sorted(f"✓ {name}: unchanged, skipped" for name in [*STAGES, "evaluation"])
    for name in ("evaluation.jsonl", "report.md", "config.yaml"):
        assert (folder / name).read_bytes() == (finished_run / name).read_bytes()


def soft_targets(given):
    return label(given.work, "soft-targets", given.teacher, given.material)


def make_mixture(given):
    """Make students and mixture; return both."""
    store = soft_targets(given)
    trained = students(given, store)
    return trained, mixture(given, store, trained)


def test_another_router_leaves_thestudents(finished_run, make_recipe, tmp_path):
    folder = shutil.copytree(finished_run, tmp_path / "run")
    console = Console(file=StringIO(), width=200)
    given = Inputs(make_recipe(router={"epochs": 3}), folder, console=console)
    make_mixture(given)
    remade = [line for line in console.file.getvalue().splitlines() if "skipped" not in line]
    assert [line.split(":")[0] for line in remade if line] == ["✓ router"]


def test_other_series_make_everything_again(finished_run, make_recipe, make_frame, tmp_path):
    make_frame(3, 400, seed=9).to_csv(tmp_path / "power.csv", index=False)
    domains = [{"data": str(tmp_path / "power.csv")}]
    before = Inputs(make_recipe(), tmp_path / "a").material.facts
    assert Inputs(make_recipe(domains=domains), tmp_path / "b").material.facts["data"][0] != before["data"][0]


KILLS = [
    "stages/soft-targets.partial/store.partial/started.json",
    "stages/students/generalist.partial/checkpoints",
    "stages/students/expert-power/stage.json",
    "stages/students/generalist-full.partial/checkpoints/checkpoint-50/model.safetensors",
    "stages/students/generalist-full/stage.json",
    "stages/expert-forecasts.partial/train.pt",
    "stages/evaluation.partial/evaluation.jsonl",
    "stages/evaluation/stage.json",
]


def test_a_run_killed_at_many_points_ends_as_one_left_alone(finished_run, make_recipe, processes, tmp_path):
    folder = tmp_path / "run"
    for place in KILLS:
        process = processes.Process(target=run, args=(make_recipe(), folder))
        process.start()
        while not (folder / place).exists() and process.is_alive():
            time.sleep(0.001)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL or place == KILLS[-1], place
    run(make_recipe(), folder, console=Console(file=StringIO()))
    assert (folder / "evaluation.jsonl").read_bytes() == (finished_run / "evaluation.jsonl").read_bytes()
    assert weights(folder) == weights(finished_run)
    for name in ("intervals.json", "routing.json", "forecasts.json"):
        assert (folder / name).read_bytes() == (finished_run / name).read_bytes()
    assert not list(folder.rglob("*.partial"))


def test_the_same_seed_gives_the_same_bits_and_another_does_not(make_recipe, tmp_path):
    weights = []
    for folder, seed in (("a", 0), ("b", 0), ("c", 1)):
        recipe = make_recipe(budget=FEW, seed=seed, student={"num_layers": 1, "init": "random"})
        given = Inputs(recipe, tmp_path / folder, console=Console(file=StringIO()))
        made = student(given, "generalist", soft_targets(given), steps=2)
        weights.append((made / "model" / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]
    assert weights[0] != weights[2]


@pytest.fixture(scope="module")
def clustered(make_recipe, tmp_path_factory):
    """Setup, students and mixture of a run whose experts are two of the generalist's and two clusters'."""
    recipe = make_recipe(budget=FEW, experts={"clusters": 2, "select": 2})
    given = Inputs(recipe, tmp_path_factory.mktemp("clusters") / "run", console=Console(file=StringIO()))
    trained, made = make_mixture(given)
    return given, trained, ChronoMoEPipeline.from_pretrained(made / "model").model


def test_clusters_stand_in_for_domains(clustered):
    given, trained, _ = clustered
    assert [name for name in trained if name.startswith("expert/")] == ["expert/cluster-0", "expert/cluster-1"]
    parts = [part for group in given.groups.values() for part in group]
    assert sum(len(part.series) for part in parts) == sum(len(domain.series) for domain in given.domains)


def test_greedy_selection_keeps_as_many_experts_as_asked_for(clustered):
    _, _, model = clustered
    assert len(model.experts) == 2
    assert set(model.config.expert_names) < {"generalist", "cluster-0", "cluster-1"}


@pytest.fixture(scope="module")
def joint_run(make_recipe, tmp_path_factory):
    """Folder of a run with one expert a series, straight from the teacher, and joint fine-tuning."""
    folder = tmp_path_factory.mktemp("joint") / "run"
    joint = {"steps": 1, "expert_learning_rate": 1e-3}
    recipe = make_recipe(budget=FEW, moe={"routing": {"top_k": 1}}, joint=joint, experts={"branch": False})
    assert run(recipe, folder, console=Console(file=StringIO())) == folder / "report.html"
    return folder


def test_one_expert_a_series_is_a_mixture_too(joint_run):
    names = {record["model"] for record in records(joint_run)}
    assert "mixture" in names
    assert "generalist-wide" not in names


def test_experts_straight_from_the_teacher_need_no_generalist(joint_run):
    assert ChronoMoEPipeline.from_pretrained(joint_run / "moe").model.config.expert_names == ["power", "sales"]
    assert not (joint_run / "stages" / "students" / "generalist").exists()


def test_joint_training_moves_the_experts_and_is_drawn(joint_run):
    before = ChronoMoEPipeline.from_pretrained(joint_run / "stages/router/model").model.state_dict()
    after = ChronoMoEPipeline.from_pretrained(joint_run / "moe").model.state_dict()
    assert any(not torch.equal(value, after[name]) for name, value in before.items() if name.startswith("experts."))
    assert "joint" in json.loads((joint_run / "curves.json").read_text())


def test_a_budget_too_small_for_a_generalist_has_experts_straight_from_the_teacher(make_recipe, tmp_path):
    recipe = make_recipe(budget=FEW | {"steps": 1})
    given = Inputs(recipe, tmp_path / "run", console=Console(file=StringIO()))
    _, made = make_mixture(given)
    model = ChronoMoEPipeline.from_pretrained(made / "model").model
    assert model.config.expert_names == ["power", "sales"]


def test_baselines_that_are_not_asked_for_are_not_trained(make_recipe, tmp_path):
    recipe = make_recipe(budget=FEW, baselines=["generalist-full"])
    run(recipe, tmp_path / "run", console=Console(file=StringIO()))
    trained = {path.name for path in (tmp_path / "run" / "stages" / "students").iterdir()}
    assert "generalist-full" in trained
    assert not {name for name in trained if name.startswith("single") or name == "generalist-wide"}
    models = {record["model"] for record in records(tmp_path / "run")}
    assert "mixture" in models
    assert not {"own single", "generalist-wide"} & models


def test_without_any_baseline_the_mixture_is_still_made_and_reported(make_recipe, tmp_path):
    run(make_recipe(budget=FEW, baselines=[]), tmp_path / "run", console=Console(file=StringIO()))
    candidates = json.loads((tmp_path / "run" / "recommendation.json").read_text())["candidates"]
    assert {one["kind"] for one in candidates} == {"mixture", "expert", "average"}


def test_own_share_mixes_other_windows_into_an_experts(make_recipe, tmp_path):
    given = Inputs(make_recipe(experts={"own_share": 0.75}), tmp_path / "run")
    owners = [given.material.windows.domain_of(row) for row in given.rows_of("sales")]
    assert (owners.count(1), owners.count(0)) == (12, 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"moe": {"routing": {"top_k": 4}}}, "top_k must be from 1 to 3, the number of experts, got 4"),
        ({"moe": {"routing": {"top_k": 3}}, "experts": {"branch": False}}, "top_k must be from 1 to 2"),
        ({"experts": {"select": 4}}, "select must be from top_k .1. to 3, the number of experts, got 4"),
        ({"moe": {"routing": {"fallback": "generalist"}}, "experts": {"branch": False}}, "needs the generalist among"),
        (
            {"windows": {"context_length": 256, "horizon": 16}},
            "context_length must be at most the model's 128, got 256",
        ),
        ({"windows": {"context_length": 64, "horizon": 65}}, "horizons of at most 64 steps, got 65"),
        ({"windows": {"context_length": 128, "horizon": 64}}, "no series of domain 'power' has a validation part"),
        ({"student": "huge"}, "Unknown student preset 'huge'"),
    ],
)
def test_what_cannot_be_run_is_refused_before_anything_is_written(make_recipe, tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        run(make_recipe(**changes), tmp_path / "run", console=Console(file=StringIO()))
    assert not (tmp_path / "run").exists()


def test_domains_of_the_same_name_are_refused(make_recipe, series_files, tmp_path):
    twice = [{"data": str(series_files["power"])}] * 2
    with pytest.raises(InputError, match="every domain needs a name of its own, got .'power', 'power'."):
        run(make_recipe(domains=twice), tmp_path / "run")


def test_a_domain_called_as_the_student_of_all_domains_is_refused(make_recipe, series_files, tmp_path):
    domains = [{"data": str(series_files["power"]), "name": "generalist"}, {"data": str(series_files["sales"])}]
    with pytest.raises(InputError, match="a domain cannot be called 'generalist'"):
        run(make_recipe(domains=domains), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_dumped_configuration_is_a_recipe(make_recipe, tmp_path):
    (tmp_path / "mine.yaml").write_text(dump(make_recipe()))
    assert load_recipe(str(tmp_path / "mine.yaml")) == make_recipe()


def test_held_out_domains_are_tested_on_and_trained_on_by_nothing(make_recipe, make_frame, tmp_path):
    make_frame(2, 300, seed=5).to_csv(tmp_path / "solar.csv", index=False)
    recipe = make_recipe(budget=FEW, held_out=[{"data": str(tmp_path / "solar.csv")}])
    folder = tmp_path / "run"
    run(recipe, folder, console=Console(file=StringIO()))
    unseen = [json.loads(line) for line in (folder / "held_out.jsonl").read_text().splitlines()]
    assert {record["domain"] for record in unseen} == {"solar", "overall"}
    models = {"mixture", "mixture K=1", "mixture, all experts", "average single", "average expert", "generalist-full"}
    assert models <= {record["model"] for record in unseen}
    costs = {cost["model"]: cost for cost in json.loads((folder / "efficiency.json").read_text())}
    assert costs["mixture K=1"]["unseen_experts"] == pytest.approx(1)
    assert 1 - 1e-6 <= costs["mixture"]["unseen_experts"] <= 2 + 1e-6
    assert "solar" not in {record["domain"] for record in records(folder)}
    claims = json.loads((folder / "intervals.json").read_text())
    assert "average single" in {claim["against"] for claim in claims if claim["unseen"]}
    assert "Nothing was trained or chosen on solar." in (folder / "report.md").read_text()


def test_the_teacher_forecasts_held_out_series_that_are_unlike_all(make_recipe, make_frame, tmp_path):
    frame = make_frame(2, 300, season=5, seed=5)
    frame["target"] = (frame["target"] - frame["target"].mean()).abs() ** 3
    frame.to_csv(tmp_path / "solar.csv", index=False)
    changes = {"budget": FEW, "held_out": [{"data": str(tmp_path / "solar.csv")}], "baselines": []}
    folder = tmp_path / "run"
    run(make_recipe(**changes), folder, console=Console(file=StringIO()))
    said = StringIO()
    guard = {"unfamiliar": {"forecast_by": "teacher", "familiar": 0.5}}
    run(make_recipe(**changes, **guard), folder, console=Console(file=said))
    assert "✓ router: unchanged, skipped" in said.getvalue()
    routing = json.loads((folder / "routing.json").read_text())
    assert routing["experts"][-1] == "teacher"
    assert len(routing["domains"]["power"]["share"]) == len(routing["experts"])
    mixture = load_model(folder / "moe")
    assert mixture.config.expert_names[-1] == "teacher"
    unseen = [json.loads(line) for line in (folder / "held_out.jsonl").read_text().splitlines()]
    errors = {record["model"]: record["value"] for record in unseen if record["metric"] == "WQL"}
    assert errors["mixture"] == pytest.approx(errors["teacher"], rel=1e-5)
    costs = {cost["model"]: cost for cost in json.loads((folder / "efficiency.json").read_text())}
    assert costs["simple average of experts"]["experts"] == pytest.approx(len(mixture.experts))


def test_what_keeps_the_teacher_from_unfamiliar_series_is_refused(make_recipe, series_files, tmp_path):
    guard = {"unfamiliar": {"forecast_by": "teacher"}}
    named = [{"data": str(series_files["power"]), "name": "teacher"}]
    with pytest.raises(InputError, match="no domain can be called 'teacher' where the teacher forecasts"):
        run(make_recipe(**guard, domains=named), tmp_path / "run", console=Console(file=StringIO()))
    reader = {"moe": {"router": {"use_patch_embedding": True}}}
    with pytest.raises(InputError, match="set use_patch_embedding to false"):
        run(make_recipe(**guard, **reader), tmp_path / "run", console=Console(file=StringIO()))
    assert not (tmp_path / "run").exists()


def test_a_held_out_domain_of_a_trained_name_is_refused(make_recipe, series_files, tmp_path):
    held_out = [{"data": str(series_files["power"])}]
    with pytest.raises(InputError, match="every domain needs a name of its own"):
        run(make_recipe(held_out=held_out), tmp_path / "run", console=Console(file=StringIO()))
