import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from chronos import BaseChronosPipeline, Chronos2Pipeline
from chronos.chronos2 import Chronos2Model
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import TrainerCallback

from chronomoe.data.domains import demo_domains
from chronomoe.errors import InputError
from chronomoe.pretraining.batches import MixConfig, Phase, PretrainingBatches
from chronomoe.pretraining.config import PretrainConfig, TeacherConfig
from chronomoe.pretraining.corpus import build_corpus
from chronomoe.pretraining.teacher import QUANTILE_LEVELS, new_teacher, pretrain
from chronomoe.pretraining.trainer import ValidationBatches
from pretrain_in_processes import CONFIG

SAVED = 8
"""Steps between two checkpoints of ``CONFIG``, which has 20."""


class Stopper(TrainerCallback):
    """Stops a training as Ctrl-C does, before one of its steps."""

    def __init__(self, step=-1):
        self.step, self.begun = step, []

    def on_step_begin(self, args, state, control, **kwargs):
        self.begun.append(state.global_step)
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Return a finished run and the model it returned."""
    out = tmp_path_factory.mktemp("run")
    return out, pretrain(CONFIG, out)


@pytest.fixture
def killed(tmp_path):
    """Kill a run of a configuration before a step."""

    def kill(config, step):
        with pytest.raises(KeyboardInterrupt):
            pretrain(config, tmp_path, callbacks=[Stopper(step)])
        assert not (tmp_path / "model.safetensors").exists()
        return tmp_path

    return kill


def stored(out):
    return (out / "model.safetensors").read_bytes()


def loss(model, corpus):
    batches = PretrainingBatches(corpus, CONFIG.mix, phases=CONFIG.phases, patch_size=16, seed=9)
    with torch.no_grad():
        return sum(model(**batches[index]).loss.item() for index in range(12))


def test_the_loss_falls(finished):
    out, model = finished
    corpus = build_corpus(out / "corpus", CONFIG.corpus)
    assert loss(model.float(), corpus) < 0.85 * loss(new_teacher(CONFIG), corpus)


@pytest.mark.parametrize("stopped_at", [5, 17])
def test_a_killed_run_ends_with_the_weights_of_one_left_alone(finished, killed, stopped_at):
    out, watch = killed(CONFIG, stopped_at), Stopper()
    pretrain(CONFIG, out, callbacks=[watch])
    assert watch.begun == list(range(stopped_at // SAVED * SAVED, 20))
    assert stored(out) == stored(finished[0])


def test_a_crash_while_saving_costs_the_steps_since_the_checkpoint_before(finished, killed):
    out = killed(CONFIG, 17)
    torn = out / "checkpoints" / "checkpoint-16" / "trainer_state.json"
    torn.write_text(torn.read_text()[:-30])
    (out / "pretrain.json.partial").write_text("{")
    (out / "corpus.partial").mkdir()
    watch = Stopper()
    pretrain(CONFIG, out, callbacks=[watch])
    assert watch.begun == list(range(8, 20))
    assert stored(out) == stored(finished[0])


def test_a_finished_run_called_again_changes_nothing(finished):
    out, _ = finished
    before = stored(out)
    watch = Stopper()
    pretrain(CONFIG, out, callbacks=[watch])
    assert stored(out) == before
    assert watch.begun == []


@pytest.mark.parametrize("changes", [{"steps": 26}, {"steps": 18, "decay_steps": 6}])
def test_a_run_can_go_on_longer_or_to_its_end_while_the_rate_is_constant(killed, tmp_path, changes):
    config = dataclasses.replace(CONFIG, **changes)
    out = killed(CONFIG, 9)
    watch = Stopper()
    pretrain(config, out, callbacks=[watch])
    assert watch.begun == list(range(8, config.steps))
    assert json.loads((out / "pretrain.json").read_text())["steps"] == config.steps
    pretrain(config, tmp_path / "alone")
    assert stored(out) == stored(tmp_path / "alone")


def test_a_run_is_not_continued_by_another_number_of_processes(killed):
    out = killed(CONFIG, 9)
    checkpoint = out / "checkpoints" / f"checkpoint-{SAVED}"
    for rank in range(2):  # as two processes save theirs
        (checkpoint / f"rng_state_{rank}.pth").write_bytes((checkpoint / "rng_state.pth").read_bytes())
    (checkpoint / "rng_state.pth").unlink()
    with pytest.raises(InputError, match="run of 2 processes, .* continue it with as many, got 1"):
        pretrain(CONFIG, out)
    assert checkpoint.exists()


class Rates(TrainerCallback):
    """Notes the learning rate of every step."""

    def __init__(self):
        self.seen = []

    def on_step_begin(self, args, state, control, lr_scheduler=None, **kwargs):
        self.seen.append(lr_scheduler.get_last_lr()[0])


def test_a_run_of_few_steps_is_the_start_of_the_whole_one(tmp_path):
    whole, few = Rates(), Rates()
    config = dataclasses.replace(CONFIG, steps=6, warmup_steps=4, decay_steps=2, validation=())
    pretrain(config, tmp_path / "whole", callbacks=[whole])
    pretrain(dataclasses.replace(config, steps=2), tmp_path / "few", callbacks=[few])
    assert few.seen == whole.seen[:2]
    assert whole.seen == sorted(whole.seen[:5]) + whole.seen[5:]
    assert whole.seen[5] < whole.seen[4] == config.learning_rate


@pytest.mark.parametrize(
    ("first", "then", "done", "same"),
    [
        ({}, {}, 20, True),
        ({}, {"steps": 30}, 10, True),
        ({}, {"steps": 30}, 11, False),  # the rate had begun to fall
        ({}, {"decay_steps": 4}, 10, True),
        ({}, {"decay_steps": 4}, 11, False),
        ({"steps": 30}, {}, 10, True),
        ({"steps": 30}, {}, 11, False),  # it should have begun to fall
        ({}, {"save_steps": 3, "workers": 2, "validation_steps": 7}, 15, True),
        ({}, {"learning_rate": 1e-3}, 0, False),
        ({}, {"seed": 1}, 0, False),
        ({}, {"batch_size": 4}, 8, False),
        ({}, {"growth": ()}, 0, True),
        ({}, {"growth": ()}, 2, False),
        ({}, {"growth": (Phase(steps=12, context_length=32, batch_size=8),)}, 6, True),
        ({}, {"growth": (Phase(steps=12, context_length=32, batch_size=8),)}, 7, False),
        ({"steps": 1}, {}, 1, True),  # no warm-up is shortened, and nothing decays before its end
    ],
)
def test_runs_that_begin_alike_are_told_from_others(first, then, done, same):
    one, other = (dataclasses.replace(CONFIG, **changes) for changes in (first, then))
    assert one.begins_like(other, steps=done) is same
    assert other.begins_like(one, steps=done) is same


@pytest.mark.parametrize("changes", [{"seed": 1}, {"steps": 30}])
def test_a_folder_of_another_run_is_refused_and_left_alone(finished, changes):
    before = {path: path.stat().st_mtime_ns for path in finished[0].rglob("*")}
    with pytest.raises(InputError, match="holds a pretraining run of another configuration; choose another folder"):
        pretrain(dataclasses.replace(CONFIG, **changes), finished[0])
    assert {path: path.stat().st_mtime_ns for path in finished[0].rglob("*")} == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"corpus": dataclasses.replace(CONFIG.corpus, real=("bank_cals",))}, "Did you mean 'bank_calls'"),
        ({"validation": ("demo:trafic",)}, "trafic"),
    ],
)
def test_a_run_refused_for_an_unknown_name_can_be_mended_in_the_same_folder(tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        pretrain(dataclasses.replace(CONFIG, **changes), tmp_path)
    with pytest.raises(KeyboardInterrupt):
        pretrain(CONFIG, tmp_path, callbacks=[Stopper(0)])


def test_the_checkpoint_loads_in_stock_pipelines_with_the_numbers_of_the_model(finished):
    out, model = finished
    context = torch.randn(3, 40, generator=torch.Generator().manual_seed(0))
    for kind in (BaseChronosPipeline, Chronos2Pipeline):
        pipeline = kind.from_pretrained(out, dtype=torch.float32)
        assert type(pipeline) is Chronos2Pipeline
        assert type(pipeline.model) is Chronos2Model
        forecast = torch.cat(pipeline.predict(context[:, None], prediction_length=16))
        with torch.no_grad():
            torch.testing.assert_close(forecast, model.float()(context).quantile_preds, rtol=1e-4, atol=1e-4)


def test_weights_are_stored_in_half_precision_and_buffers_are_not_rounded(finished):
    out, model = finished
    assert Chronos2Model.from_pretrained(out, dtype="auto").dtype == torch.bfloat16
    fresh = dict(new_teacher(CONFIG).named_buffers())
    assert fresh
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, fresh[name]), name


def test_the_teacher_has_the_size_levels_and_limits_it_is_given():
    size = TeacherConfig(d_model=40, d_kv=8, num_heads=3, d_ff=56, num_layers=2, patch_size=8, dropout_rate=0.1)
    mix = MixConfig(context_length=64, min_context_length=16, horizon=24)
    corpus = dataclasses.replace(CONFIG.corpus, length=88)
    model = new_teacher(dataclasses.replace(CONFIG, teacher=size, mix=mix, corpus=corpus))
    assert model.chronos_config.quantiles == list(QUANTILE_LEVELS)
    assert len(QUANTILE_LEVELS) == 21
    assert list(QUANTILE_LEVELS) == sorted(QUANTILE_LEVELS)
    assert (model.chronos_config.input_patch_size, model.chronos_config.output_patch_size) == (8, 8)
    assert (model.chronos_config.context_length, model.chronos_config.max_output_patches) == (64, 3)
    assert len(model.encoder.block) == 2
    attention = model.encoder.block[0].layer[0].self_attention
    assert attention.q.weight.shape == (3 * 8, 40)
    assert model.encoder.block[0].layer[2].mlp.wi.weight.shape == (56, 40)
    assert model.config.dropout_rate == 0.1
    with torch.no_grad():
        assert model(torch.randn(2, 64), num_output_patches=3).quantile_preds.shape == (2, 21, 24)


def test_a_new_teacher_depends_on_the_seed_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, second, other = (new_teacher(dataclasses.replace(CONFIG, seed=seed)).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert any(not torch.equal(value, other[name]) for name, value in first.items())
    assert torch.equal(torch.get_rng_state(), before)


def test_loss_rate_throughput_and_validation_are_in_the_tensorboard_files(tmp_path):
    config = dataclasses.replace(
        CONFIG, steps=100, decay_steps=40, save_steps=100, validation=("demo:weather",), validation_steps=50, growth=()
    )
    pretrain(config, tmp_path)
    log = EventAccumulator(str(tmp_path / "logs")).Reload()
    curves = {name: [(point.step, point.value) for point in log.Scalars(name)] for name in log.Tags()["scalars"]}
    for name in ("loss", "learning_rate", "windows_per_second", "tokens_per_second"):
        assert [step for step, _ in curves[f"train/{name}"]] == [50, 100], name
    assert curves["train/loss"][1][1] < curves["train/loss"][0][1]
    (_, constant), (_, decayed) = curves["train/learning_rate"]
    assert constant == pytest.approx(config.learning_rate)
    assert decayed < 0.2 * config.learning_rate
    assert all(value > 0 for _, value in curves["train/windows_per_second"])
    assert [step for step, _ in curves["eval/weather_loss"]] == [50, 100]
    assert curves["eval/weather_loss"][1][1] > 0


def test_the_demo_domains_are_watched_unless_others_are_named(tmp_path):
    watched = []

    class Witness(TrainerCallback):
        def on_evaluate(self, args, state, control, metrics, **kwargs):
            watched.extend(name for name in metrics if name.endswith("_loss"))

    config = dataclasses.replace(CONFIG, steps=1, validation=None, validation_steps=1)
    pretrain(config, tmp_path, callbacks=[Witness()])
    assert watched == [f"eval_{name}_loss" for name in demo_domains()]


def test_validation_windows_are_of_the_last_rows_and_split_into_ready_batches():
    batches = ValidationBatches("demo:weather", CONFIG, windows=10, rows=4)
    assert [len(batch["context"]) for batch in batches] == [4, 4, 2]
    assert len(batches) == 3
    assert all(batch["future_target"].shape[1] == 16 for batch in batches)
    with pytest.raises(IndexError):
        batches[3]


def test_two_processes_agree_on_the_weights_and_share_the_batches(tmp_path):
    script = Path(__file__).parents[1].joinpath("pretrain_in_processes.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", script, tmp_path]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    one, other = (torch.load(tmp_path / f"weights-{rank}.pt") for rank in range(2))
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    expected = PretrainingBatches(
        build_corpus(tmp_path / "corpus", CONFIG.corpus),
        CONFIG.mix,
        phases=CONFIG.phases,
        patch_size=16,
        seed=CONFIG.seed,
        processes=2,
    )
    for rank in range(2):
        for step, context in enumerate(torch.load(tmp_path / f"seen-{rank}.pt")):
            batch = expected[2 * step + rank]["context"]
            torch.testing.assert_close(context, batch, rtol=0, atol=0, equal_nan=True)
        assert step == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0, got 0.0"),
        ({"average_decay": 1.0}, "average_decay must be below 1, got 1.0"),
        ({"mix": MixConfig(context_length=72, horizon=16)}, "multiples of the patch size 16, got 72"),
        ({"mix": MixConfig(context_length=48, min_context_length=16, horizon=20)}, "patch size 16, got 20"),
        ({"mix": MixConfig(context_length=64, horizon=32)}, r"a context and a horizon, 64 \+ 32 steps, got 80"),
        (
            {"growth": (Phase(steps=2, context_length=64, batch_size=4),)},
            "contexts must not grow beyond the model's 48 steps, got 64",
        ),
    ],
)
def test_an_impossible_run_is_refused(unchecked, options, message):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(CONFIG, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"d_model": 0}, "d_model must be at least 1, got 0"),
        ({"num_layers": 0}, "num_layers must be at least 1, got 0"),
        ({"patch_size": 0}, "patch_size must be at least 1, got 0"),
        ({"d_kv": 7}, "d_kv must be a multiple of 2, got 7"),
        ({"dropout_rate": 1.0}, "dropout_rate must be below 1, got 1.0"),
    ],
)
def test_an_impossible_size_is_refused(options, message):
    with pytest.raises(InputError, match=message):
        TeacherConfig(**options)


def test_phases_end_with_the_longest_context_and_sum_to_the_steps():
    growth = tuple(Phase(steps=10, context_length=16 * count, batch_size=32) for count in (1, 2))
    long = PretrainConfig(mix=CONFIG.mix, growth=growth, steps=50, batch_size=4)
    assert [(phase.steps, phase.context_length, phase.batch_size) for phase in long.phases] == [
        (10, 16, 32),
        (10, 32, 32),
        (30, 48, 4),
    ]
    short = dataclasses.replace(long, steps=15)
    assert [(phase.steps, phase.context_length) for phase in short.phases] == [(10, 16), (5, 32)]
