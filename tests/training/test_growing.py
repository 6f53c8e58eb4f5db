import json

import pytest
import torch

from chronomoe.data.soft_targets import LiveTeacher
from chronomoe.data.windows import (
    EvaluationWindows,
    JoinedWindows,
    TrainingWindows,
    WindowConfig,
)
from chronomoe.errors import InputError
from chronomoe.models.chronos2 import use_exact_group_attention
from chronomoe.models.sparse.config import MoEConfig
from chronomoe.models.sparse.insertion import MoEEnhancedChronos2
from chronomoe.models.student import StudentConfig, create_student_model
from chronomoe.pipeline import ChronoMoEPipeline
from chronomoe.training.arguments import DistilConfig
from chronomoe.training.growing import ExpansionConfig, expand
from chronomoe.training.validation import validation_loss
from sample_series import sample_domain

DOMAINS = [sample_domain("wave"), sample_domain("spikes", variates=2, known=("k",))]
WINDOWS = WindowConfig(context_length=48, horizon=16, min_context_length=32)
LAYER = MoEConfig(num_experts=4, top_k=1)
STEPS, PROBE = 12, 4
EACH = 2 * PROBE + STEPS


@pytest.fixture(scope="module")
def windows():
    return TrainingWindows(DOMAINS, WINDOWS, size=32, seed=0)


@pytest.fixture(scope="module")
def validation():
    return JoinedWindows([EvaluationWindows(domain, WINDOWS, part="validation", limit=6) for domain in DOMAINS])


@pytest.fixture(scope="module")
def base(make_teacher):
    """A student of two layers that is far from what it could be."""
    return create_student_model(use_exact_group_attention(make_teacher(num_layers=2)), StudentConfig()).eval()


@pytest.fixture(scope="module")
def grow(base, windows, validation):
    """Expand the base with training and weight decay so strong that it would show in what is not frozen."""

    def call(folder, *, model=base, data=windows, **changes):
        options = {key: changes.pop(key) for key in ("soft_targets", "progress") if key in changes}
        rate = changes.pop("learning_rate", 1e-2)
        training = DistilConfig(steps=STEPS, batch_size=8, checkpoint_steps=5, learning_rate=rate, weight_decay=0.5)
        config = ExpansionConfig(**{"layer": LAYER, "probe_steps": PROBE, "training": training} | changes)
        return expand(model, data, validation, config, folder, **options)

    return call


@pytest.fixture(scope="module")
def whole(grow, tmp_path_factory):
    """A finished expansion of two layers and its folder; not to be changed."""
    folder = tmp_path_factory.mktemp("expansion") / "whole"
    return grow(folder), folder


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same_bits(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_layers_that_help_stay(whole, base, validation):
    model, path = whole[0]
    assert isinstance(model, MoEEnhancedChronos2)
    assert [entry["kept"] for entry in path] == [True, True]
    assert model.insertion.after == tuple(entry["after"] for entry in path)
    assert path[0]["before"] == validation_loss(base, validation, batch_size=8)
    assert path[1]["before"] == path[0]["validation"] < path[0]["before"]
    assert path[1]["validation"] == validation_loss(model, validation, batch_size=8)


def test_the_base_keeps_its_bits(whole, base):
    model = whole[0].model
    kept = dict(model.base_parameters())
    assert kept.keys() == dict(base.named_parameters()).keys()
    assert all(torch.equal(value, kept[name]) for name, value in base.named_parameters())
    assert model.base_hash() == MoEEnhancedChronos2(base).base_hash()
    assert not any(value.requires_grad for value in kept.values())
    assert all(value.requires_grad for layer in model.moe_layers.values() for value in layer.parameters())


def test_the_best_probe_decides_the_place(whole):
    for entry in whole[0].path:
        assert [probe["after"] for probe in entry["probes"]] == [0, 1]
        assert entry["after"] == min(entry["probes"], key=lambda probe: probe["validation"])["after"]


def test_layers_can_follow_a_teacher_as_well(grow, make_teacher, tmp_path):
    teacher = LiveTeacher(use_exact_group_attention(make_teacher(seed=1, num_layers=2)))
    path = grow(tmp_path, soft_targets=teacher, max_layers=1, candidates=(0,)).path
    assert min(path[0]["curve"]["soft_loss"]) > 0


def test_a_single_candidate_needs_no_probe(grow, tmp_path):
    path = grow(tmp_path, candidates=(1,)).path
    assert [(entry["after"], entry["probes"]) for entry in path] == [(1, []), (1, [])]


def test_the_first_layer_that_gains_too_little_ends_the_search_and_is_left_out(grow, base, tmp_path):
    model, path = grow(tmp_path, min_gain=0.99, max_layers=3)
    assert [entry["kept"] for entry in path] == [False]
    assert model is base


@pytest.mark.parametrize("tune_earlier", [False, True])
def test_earlier_layers_move_only_when_asked_to(grow, tmp_path, tune_earlier):
    grow(tmp_path, tune_earlier=tune_earlier, candidates=(0,))
    first, second = (
        MoEEnhancedChronos2.from_pretrained(tmp_path / f"layer-{number}" / "model").moe_layers[0].state_dict()
        for number in (0, 1)
    )
    assert torch.equal(first["wo"], second["wo"]) != tune_earlier
    assert torch.equal(first["router"], second["router"]) != tune_earlier


@pytest.mark.parametrize("stopped_at", [PROBE + 2, 2 * PROBE + 7, EACH + 2 * PROBE + 1])
def test_a_killed_expansion_ends_as_one_left_alone(grow, whole, tmp_path, stopped_at):
    def stop(done, total):
        if done == stopped_at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        grow(tmp_path, progress=stop)
    steps = []
    again = grow(tmp_path, progress=lambda done, total: steps.append((done, total)))
    assert_same_bits(weights(whole[0].model), weights(again.model))
    assert again.path == whole[0].path
    assert stopped_at - 5 < steps[0][0] <= stopped_at  # checkpoints are 5 steps apart
    assert steps[-1] == (2 * EACH, 2 * EACH)


def test_a_finished_expansion_is_read_back(grow, whole):
    steps = []
    again = grow(whole[1], progress=lambda done, total: steps.append(done))
    assert steps == [2 * EACH]
    assert again.path == whole[0].path
    assert_same_bits(weights(again.model), weights(whole[0].model))


def test_the_path_holds_router_entropy_and_load_and_is_json(whole):
    path = whole[0].path
    for number, entry in enumerate(path):
        assert [len(part) for part in entry["curve"]["entropy"]] == [number + 1] * STEPS
        assert [len(part[number]) for part in entry["curve"]["load"]] == [LAYER.num_experts] * STEPS
    assert json.loads(json.dumps(path, allow_nan=False)) == path


def test_only_weights_of_kept_layers_and_the_record_are_left(whole):
    assert {path.name for path in whole[1].iterdir()} == {"expansion.json", "layer-0", "layer-1"}
    for number in (0, 1):
        assert {path.name for path in (whole[1] / f"layer-{number}").iterdir()} == {
            "layer.json",
            "model",
            "probe-0.json",
            "probe-1.json",
        }


def test_a_grown_student_keeps_its_numbers_in_a_checkpoint(whole, make_context, tmp_path):
    model = whole[0].model
    ChronoMoEPipeline(model).save_pretrained(tmp_path / "grown")
    loaded = ChronoMoEPipeline.from_pretrained(tmp_path / "grown").model
    with torch.no_grad():
        assert torch.equal(loaded(make_context()).quantile_preds, model(make_context()).quantile_preds)


def test_a_layer_that_diverged_is_left_out(grow, base, tmp_path):
    found = grow(tmp_path, learning_rate=1e30, max_layers=1)
    assert [entry["kept"] for entry in found.path] == [False]
    assert type(found.model) is type(base)


def test_a_folder_of_another_expansion_is_refused(grow, whole, make_teacher):
    other = use_exact_group_attention(make_teacher(seed=1, num_layers=2))
    fewer = TrainingWindows(DOMAINS, WINDOWS, size=31, seed=0)
    for changes in ({"max_layers": 3}, {"model": other}, {"data": fewer}):
        with pytest.raises(InputError, match="holds an expansion of another model, other windows or settings"):
            grow(whole[1], **changes)


def test_a_grown_model_is_not_grown_again(grow, base, tmp_path):
    with pytest.raises(InputError, match="an expansion needs a dense Chronos-2 model.*raise max_layers"):
        grow(tmp_path / "out", model=MoEEnhancedChronos2(base))
    assert not (tmp_path / "out").exists()


def test_places_that_are_not_there_are_refused(grow, tmp_path):
    with pytest.raises(InputError, match="candidates must be from 0 to 1, the model's encoder blocks, got 2"):
        grow(tmp_path / "out", candidates=(0, 2))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_layers": 0}, "max_layers must be at least 1, got 0"),
        ({"probe_steps": 0}, "probe_steps must be at least 1, got 0"),
        ({"min_gain": 1.0}, "min_gain must be below 1, got 1.0"),
        ({"candidates": (0, 0)}, r"candidates: each block must be named once, got \(0, 0\)"),
        ({"candidates": ()}, r"candidates must name at least 1, got \(\)"),
        ({"aux_weight": -0.1}, r"aux_weight must be at least 0, got -0\.1"),
        ({"layer": MoEConfig(noise=0.1)}, "noise changes copies of a dense block, and inserted layers have none"),
    ],
)
def test_impossible_expansions_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        ExpansionConfig(**options)
