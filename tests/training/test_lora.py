"""LoRA through ``Chronos2Pipeline.fit``'s own argument, on every kind of checkpoint."""

import importlib.util
import json
import shutil

import pytest
import torch
from chronos import BaseChronosPipeline, Chronos2Pipeline
from safetensors.torch import load_file

from chronomoe import (
    ChronoMoEPipeline,
    InputError,
    MoEConfig,
    MoEEnhancedChronos2,
    MoEInsertionConfig,
    load_model,
    upcycle,
)
from chronomoe.models.balancing import LossFreeBias
from chronomoe.models.bands import Bands
from chronomoe.models.chronos2 import ExactChronos2Model
from chronomoe.models.sparse.upcycling import SparseChronos2Model
from moe_models import train_by_chance

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="LoRA needs peft, an optional dependency"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),  # peft asks transformers for it
]
KINDS = ("dense", "mixture", "upcycled", "expanded")
ADAPTED = {"self_attention.q", "self_attention.k", "self_attention.v", "self_attention.o", "output_layer"}


@pytest.fixture
def dense(make_teacher):
    return make_teacher(num_layers=2)


@pytest.fixture
def mixture(make_mixture):
    return make_mixture(routing={"top_k": 4}, balance={"bias_rate": 0.01})  # all experts, so that all of them learn


@pytest.fixture
def upcycled(dense):
    return train_by_chance(upcycle(dense, MoEConfig(num_experts=4, top_k=2, bias_rate=0.01)))


@pytest.fixture
def expanded(dense):
    return train_by_chance(MoEEnhancedChronos2(dense, MoEInsertionConfig(after=(1, 0))))


@pytest.fixture(params=KINDS)
def model(request):
    return request.getfixturevalue(request.param)


@pytest.fixture
def series(make_context):
    """Three variates of each of four series."""
    return make_context(12, 80).view(4, 3, 80)


@pytest.fixture
def fit(series):
    def run(pipeline, out, **options):
        options = {"num_steps": 2, "batch_size": 12, "learning_rate": 1e-2, "disable_tqdm": True} | options
        return pipeline.fit(series, 8, finetune_mode="lora", output_dir=out, **options)

    return run


def stored(model, folder):
    """Save a model and load it: its configuration names the folder then."""
    ChronoMoEPipeline(model).save_pretrained(folder)
    return ChronoMoEPipeline.from_pretrained(folder)


def forecast(pipeline, inputs):
    return torch.stack(pipeline.predict(inputs, prediction_length=20))


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_adapters_change_attention_head_and_the_router_of_a_mixture_in_a_copy(model, series, fit, tmp_path):
    before = weights(model)
    after = weights(fit(ChronoMoEPipeline(model), tmp_path).model)
    assert set(after) == set(before)
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert {part for part in ADAPTED if any(f"{part}." in name for name in changed)} == ADAPTED
    rest = {name for name in changed if not any(f"{part}." in name for part in ADAPTED)}
    assert all(name.startswith("router.") for name in rest)
    assert bool(rest) == any(name.startswith("router.") for name in before)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_what_is_saved_are_adapters_that_every_loader_merges(model, series, fit, tmp_path):
    pipeline = stored(model, tmp_path / "base")
    tuned = fit(pipeline, tmp_path / "out")
    folder, expected = tmp_path / "out" / "finetuned-ckpt", forecast(tuned, series)
    assert (expected - forecast(pipeline, series)).abs().max() > 0.01
    assert not list((tmp_path / "out").glob("*-base"))
    assert not (folder / "model.safetensors").exists()
    names = load_file(folder / "adapter_model.safetensors")
    assert all("lora_" in name or "router" in name for name in names)
    for loader in (ChronoMoEPipeline, Chronos2Pipeline, BaseChronosPipeline):
        loaded = loader.from_pretrained(folder)
        stock = type(pipeline.model) is ExactChronos2Model and loader is not ChronoMoEPipeline
        assert type(loaded) is (Chronos2Pipeline if stock else ChronoMoEPipeline)
        found, own = loaded.model.state_dict(), tuned.model.state_dict()
        assert all(torch.equal(found[name], value) for name, value in own.items())
        if not isinstance(loaded.model, SparseChronos2Model):  # where rounding may send a token to another expert
            assert_close(forecast(loaded, series).sort(dim=2).values, expected)


def test_peft_loads_the_adapters_again(model, series, fit, tmp_path):
    from peft import AutoPeftModel, PeftModel

    tuned = fit(stored(model, tmp_path / "base"), tmp_path / "out")
    folder = tmp_path / "out" / "finetuned-ckpt"
    for adapted in (
        PeftModel.from_pretrained(load_model(tmp_path / "base"), folder),
        AutoPeftModel.from_pretrained(folder, import_allowlist=["chronos", "chronomoe"]),
    ):
        assert_close(forecast(ChronoMoEPipeline(adapted.merge_and_unload()), series), forecast(tuned, series))


def test_merging_on_request_writes_one_whole_checkpoint(model, series, fit, tmp_path):
    tuned = fit(stored(model, tmp_path / "base"), tmp_path / "out")
    loaded = ChronoMoEPipeline.from_pretrained(tmp_path / "out" / "finetuned-ckpt")
    for name, pipeline in (("tuned", tuned), ("loaded", loaded)):
        pipeline.save_pretrained(tmp_path / name)
        assert type(load_model(tmp_path / name)).__name__ == type(tuned.model).__name__
        assert_close(forecast(ChronoMoEPipeline.from_pretrained(tmp_path / name), series), forecast(tuned, series))


def test_a_base_that_no_checkpoint_holds_is_saved_beside_its_adapters_and_may_move_with_them(
    model, series, fit, tmp_path
):
    expected = forecast(fit(ChronoMoEPipeline(model), tmp_path / "out"), series)
    assert (tmp_path / "out" / "finetuned-ckpt-base" / "model.safetensors").is_file()
    shutil.move(tmp_path / "out", tmp_path / "moved")
    assert_close(forecast(ChronoMoEPipeline.from_pretrained(tmp_path / "moved" / "finetuned-ckpt"), series), expected)


def test_a_base_that_changed_since_it_was_loaded_is_saved(mixture, series, fit, tmp_path):
    pipeline = stored(mixture, tmp_path / "base")
    pipeline.set_routing(top_k=1)
    tuned = fit(pipeline, tmp_path / "out")
    loaded = ChronoMoEPipeline.from_pretrained(tmp_path / "out" / "finetuned-ckpt")
    assert loaded.model.top_k == 1
    assert_close(forecast(loaded, series), forecast(tuned, series))
    again = fit(tuned, tmp_path / "again")
    loaded = ChronoMoEPipeline.from_pretrained(tmp_path / "again" / "finetuned-ckpt")
    assert_close(forecast(loaded, series), forecast(again, series))


def test_longer_contexts_and_horizons_are_kept(model, fit, make_context, tmp_path):
    pipeline = stored(model, tmp_path / "base")
    options = {"num_steps": 1, "batch_size": 4, "output_dir": tmp_path / "out", "disable_tqdm": True}
    pipeline.fit(make_context(4, 300)[:, None], 100, context_length=256, finetune_mode="lora", **options)
    loaded = ChronoMoEPipeline.from_pretrained(tmp_path / "out" / "finetuned-ckpt")
    assert (loaded.model_context_length, loaded.model_prediction_length) == (256, 112)


def test_validation_keeps_the_best_adapters(mixture, series, fit, tmp_path):
    steps = {"num_steps": 4, "eval_steps": 2, "save_steps": 2, "learning_rate": 1e-3}
    tuned = fit(ChronoMoEPipeline(mixture), tmp_path, validation_inputs=series, **steps)
    loaded = ChronoMoEPipeline.from_pretrained(tmp_path / "finetuned-ckpt")
    assert_close(forecast(loaded, series), forecast(tuned, series))


def test_loss_free_biases_stay_and_keep_their_rate(upcycled, fit, tmp_path):
    tuned = fit(ChronoMoEPipeline(upcycled), tmp_path)
    biases = [module for module in tuned.model.modules() if isinstance(module, LossFreeBias)]
    assert [bias.rate for bias in biases] == [0.01, 0.01]
    assert not any(bias.bias.any() for bias in biases)


def test_the_base_of_inserted_layers_stays_on_disk_and_is_another_one_when_merged(expanded, fit, tmp_path):
    pipeline, base = stored(expanded, tmp_path / "base"), expanded.base_hash()
    tuned = fit(pipeline, tmp_path / "out")
    assert load_model(tmp_path / "base").base_hash() == base
    assert tuned.model.config.base_sha256 == tuned.model.base_hash() != base


def test_own_settings_are_those_of_peft(mixture, fit, tmp_path):
    from peft import LoraConfig

    config = LoraConfig(r=2, target_modules=["mlp.wi"])
    fit(ChronoMoEPipeline(mixture), tmp_path, lora_config=config)
    names = load_file(tmp_path / "finetuned-ckpt" / "adapter_model.safetensors")
    assert all("mlp.wi.lora_" in name or "router" in name for name in names)
    assert config.modules_to_save is None


def test_adapters_of_single_tensors_are_refused(upcycled, fit, tmp_path):
    with pytest.raises(InputError, match=r"linear layers alone, got target_parameters=\['layer.2.wi'\]"):
        fit(ChronoMoEPipeline(upcycled), tmp_path, lora_config={"r": 2, "target_parameters": ["layer.2.wi"]})


def damage(folder, **values):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def test_adapters_without_their_base_are_refused(dense, make_teacher, fit, tmp_path):
    fit(stored(dense, tmp_path / "base"), tmp_path)
    folder = tmp_path / "finetuned-ckpt"
    damage(folder, base_model_name_or_path=None)
    with pytest.raises(InputError, match="name no base; set base_model_name_or_path"):
        ChronoMoEPipeline.from_pretrained(folder)
    ChronoMoEPipeline(make_teacher(num_layers=2, d_model=32, num_heads=2)).save_pretrained(tmp_path / "other")
    damage(folder, base_model_name_or_path=str(tmp_path / "other"))
    with pytest.raises(InputError, match="are not for '.*other': .* size mismatch"):
        ChronoMoEPipeline.from_pretrained(folder)
    damage(folder, base_model_name_or_path=str(tmp_path / "gone"))
    with pytest.raises(InputError, match="no checkpoint at '.*gone'"):
        ChronoMoEPipeline.from_pretrained(folder)
    (folder / "adapter_config.json").write_text("[]")
    with pytest.raises(InputError, match=r"adapter_config\.json is not a JSON object"):
        ChronoMoEPipeline.from_pretrained(folder)


def test_adapters_of_a_checkpoint_that_was_recalibrated_since_are_refused(dense, make_frame, tmp_path):
    ChronoMoEPipeline(dense).save_pretrained(tmp_path / "base")
    options = {"prediction_length": 16, "finetune_mode": "lora", "num_steps": 1, "batch_size": 2}
    series = [make_frame(1, 200).target.to_numpy()]
    ChronoMoEPipeline.from_pretrained(tmp_path / "base").fit(series, output_dir=tmp_path, **options)
    base = load_model(tmp_path / "base")
    base.bands = Bands(torch.ones(1, 9, 16), torch.tensor([9]))
    ChronoMoEPipeline(base).save_pretrained(tmp_path / "base")
    with pytest.raises(InputError, match=r"whose bands were recalibrated without them; delete its bands.safetensors"):
        load_model(tmp_path / "finetuned-ckpt")
