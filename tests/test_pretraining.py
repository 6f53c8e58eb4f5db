import dataclasses

import pytest
import torch
from chronos import BaseChronosPipeline, Chronos2Pipeline
from chronos.chronos2 import Chronos2Model
from transformers import TrainerCallback

from chronomoe.data.synthetic import CorpusConfig, MixConfig, PretrainingWindows, draw_corpus
from chronomoe.data.windows import collate, model_inputs
from chronomoe.errors import InputError
from chronomoe.training.pretraining import QUANTILE_LEVELS, PretrainConfig, TeacherConfig, new_teacher, pretrain

CONFIG = PretrainConfig(
    teacher=TeacherConfig(d_model=32, d_kv=16, num_heads=2, d_ff=32, num_layers=1),
    corpus=CorpusConfig(seasonalities=(12,), series_per_generator=1, slow_series_per_generator=0, length=80),
    mix=MixConfig(context_length=48, min_context_length=16, horizon=16, group_share=0.3),
    steps=20,
    batch_size=8,
    learning_rate=1e-2,
    warmup_steps=2,
    decay_steps=10,
    save_steps=8,
)


class Stopper(TrainerCallback):
    """Stops a training as Ctrl-C does, before one of its steps."""

    def __init__(self, step):
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


def loss(model):
    series = draw_corpus(dataclasses.replace(CONFIG.corpus, seed=9))
    windows = PretrainingWindows(series, CONFIG.mix, size=64, batch_size=64, seed=9)
    batch = collate(list(windows), patch_size=16)
    with torch.no_grad():
        return model(**model_inputs(batch), future_target=batch["future_target"]).loss.item()


def test_the_loss_falls(finished):
    assert loss(finished[1].float()) < 0.9 * loss(new_teacher(CONFIG))


def test_the_checkpoint_loads_in_stock_pipelines_with_the_numbers_of_the_model(finished):
    out, model = finished
    context = torch.randn(3, 40, generator=torch.Generator().manual_seed(0))
    for kind in (BaseChronosPipeline, Chronos2Pipeline):
        pipeline = kind.from_pretrained(out, dtype=torch.float32)
        assert type(pipeline) is Chronos2Pipeline
        assert type(pipeline.model) is Chronos2Model
        assert pipeline.quantiles == list(QUANTILE_LEVELS)
        forecast = torch.cat(pipeline.predict(context[:, None], prediction_length=16))
        with torch.no_grad():
            torch.testing.assert_close(forecast, model.float()(context).quantile_preds, rtol=1e-4, atol=1e-4)


def test_weights_are_stored_in_half_precision_and_buffers_are_not_rounded(finished):
    out, model = finished
    stored = Chronos2Model.from_pretrained(out, dtype=torch.bfloat16)
    assert stored.dtype == torch.bfloat16
    fresh = dict(new_teacher(CONFIG).named_buffers())
    assert fresh
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, fresh[name]), name


def test_a_run_leaves_its_configuration_and_tensorboard_files(finished):
    out, _ = finished
    assert {path.name for path in out.iterdir()} >= {"pretrain.json", "corpus", "checkpoints", "logs", "config.json"}
    assert any(path.name.startswith("events.out.tfevents") for path in (out / "logs").iterdir())


@pytest.mark.parametrize("stopped_at", [5, 17])
def test_a_killed_run_ends_with_the_weights_of_one_left_alone(finished, tmp_path, stopped_at):
    with pytest.raises(KeyboardInterrupt):
        pretrain(CONFIG, tmp_path, callbacks=[Stopper(stopped_at)])
    assert not (tmp_path / "model.safetensors").exists()
    watch = Stopper(-1)
    pretrain(CONFIG, tmp_path, callbacks=[watch])
    assert watch.begun == list(range(stopped_at // 8 * 8, 20))
    assert (tmp_path / "model.safetensors").read_bytes() == (finished[0] / "model.safetensors").read_bytes()


def test_a_finished_run_called_again_changes_nothing(finished):
    out, _ = finished
    before = (out / "model.safetensors").read_bytes()
    watch = Stopper(-1)
    pretrain(CONFIG, out, callbacks=[watch])
    assert (out / "model.safetensors").read_bytes() == before
    assert all(step >= 16 for step in watch.begun)


def test_a_folder_of_another_configuration_is_refused(finished):
    with pytest.raises(InputError, match="holds a pretraining run of another configuration; choose another folder"):
        pretrain(dataclasses.replace(CONFIG, seed=1), finished[0])


def test_a_new_teacher_depends_on_the_seed_alone():
    first, second, other = (new_teacher(dataclasses.replace(CONFIG, seed=seed)).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert any(not torch.equal(value, other[name]) for name, value in first.items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps and batch_size must be at least 1, got 0 and 8"),
        ({"mix": MixConfig(context_length=72, horizon=16)}, "multiples of the patch size 16, got 72 and 16"),
        ({"mix": MixConfig(context_length=64, horizon=32)}, r"a context and a horizon, 64 \+ 32 steps, got 80"),
    ],
)
def test_impossible_runs_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(CONFIG, **options)
