import json
from io import StringIO

import torch
from rich.console import Console

from chronomoe.data.soft_targets import SoftTargetStore
from chronomoe.inputs import Inputs
from chronomoe.pipeline import load_teacher
from chronomoe.run import student
from chronomoe.stages.soft_targets import label
from chronomoe.stages.workspace import stage_key


def given(recipe, folder):
    return Inputs(recipe, folder, console=Console(file=StringIO()))


def budget(**changes):
    return {"steps": 60, "batch_size": 4, "windows": 24} | changes


def test_students_follow_a_teacher_that_has_learned_the_domains(make_recipe, teacher_folder, tmp_path):
    run = given(make_recipe(budget=budget(teacher_steps=4)), tmp_path / "run")
    teacher, guide = run.teacher.state_dict(), run.guide.state_dict()
    assert all(torch.equal(value, teacher[name]) for name, value in load_teacher(teacher_folder).state_dict().items())
    assert any(not torch.equal(value, teacher[name]) for name, value in guide.items())
    curve = json.loads((run.work.root / "stages" / "teacher" / "curve.json").read_text())
    assert curve["step"][-1] == 4
    store = label(run.work, "soft-targets", run.guide, run.material)
    made = student(run, "one", store, steps=1)
    assert (made / "model" / "model.safetensors").exists()


def test_the_stages_of_a_teacher_that_learns_longer_are_made_again(make_recipe, tmp_path):
    stages = []
    for steps in (0, 2, 3, 3):
        run = given(make_recipe(budget=budget(teacher_steps=steps)), tmp_path / "run")
        store = label(run.work, "soft-targets", run.guide, run.material)
        stages.append(stage_key(store))
    assert len(set(stages)) == 3
    assert stages[2] == stages[3]


def test_the_type_of_soft_targets_is_settled_by_the_machine_and_part_of_their_stage(make_recipe, tmp_path, monkeypatch):
    found = []
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    for wanted, units in (("auto", True), ("auto", True), ("auto", False), ("float32", True), ("bfloat16", False)):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda units=units: units)
        recipe = make_recipe(label_dtype=wanted)
        run = given(recipe, tmp_path / "run")
        store = label(run.work, "soft-targets", run.guide, run.material, precision=recipe.label_dtype)
        found.append((stage_key(store), SoftTargetStore(store / "store").meta["compute_dtype"]))
    narrow, repeated, wide, same, asked = found
    assert [dtype for _, dtype in found] == [f"torch.{name}" for name in ("bfloat16",) * 2 + ("float32",) * 2] + [
        "torch.bfloat16"
    ]
    assert narrow == repeated == asked != wide == same
