"""A checkpoint is data: whatever its files hold, it loads or is refused in one line, and nothing in it is run."""

import contextlib
import copy
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from chronomoe import (
    ChronoMoEPipeline,
    InputError,
    MixtureConfig,
    MoEConfig,
    MoEEnhancedChronos2,
    MoEInsertionConfig,
    build_mixture,
    load_model,
    upcycle,
)
from conftest import FORECASTING

KINDS = ["plain", "mixture", "upcycled", "enhanced"]
JUNK = [None, -1, 0, 1.5, 1 << 23, 1 << 70, float("nan"), "text", [], {}, [None], True]


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def saved(kind, make_teacher, tmp_path):
    dense = make_teacher(num_layers=1, d_model=16, d_kv=8, num_heads=2, d_ff=16)
    model = {
        "plain": lambda: dense,
        "mixture": lambda: build_mixture({"one": dense, "generalist": dense}, MixtureConfig()),
        "upcycled": lambda: upcycle(dense, MoEConfig(num_experts=2, top_k=1)),
        "enhanced": lambda: MoEEnhancedChronos2(dense, MoEInsertionConfig(after=(0,))),
    }[kind]()
    ChronoMoEPipeline(model).save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def write_config(folder, values):
    (folder / "config.json").write_text(json.dumps(values))


def places(values, path=()):
    """Walk over all values of a nested JSON document; of lists, over the first entry."""
    pairs = values.items() if isinstance(values, dict) else list(enumerate(values))[:1]
    for key, value in pairs:
        yield (*path, key)
        if isinstance(value, dict | list):
            yield from places(value, (*path, key))


def with_value(values, path, value):
    changed = copy.deepcopy(values)
    inside = changed
    for key in path[:-1]:
        inside = inside[key]
    inside[path[-1]] = value
    return changed


def test_whatever_one_value_of_the_configuration_is_the_checkpoint_loads_or_is_refused(saved, unchecked):
    values = config_of(saved)
    generator = torch.Generator().manual_seed(0)
    for path in places(values):
        place = int(torch.randint(len(JUNK), (), generator=generator))
        for junk in (JUNK[place], JUNK[place - 5]):
            write_config(saved, with_value(values, path, junk))
            with contextlib.suppress(InputError):
                load_model(saved)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("d_ff", 1 << 23, "a width of 8388608, .* cannot hold that; save the model again"),
        ("num_layers", 1 << 23, "asks for 8388608 layers"),
        ("num_heads", "2", "num_heads must be a valid integer, got '2'"),
        ("dropout_rate", 2.0, "dropout_rate must be below 1, got 2.0"),
        ("rope_theta", 1e-300, "rope_theta must be at least 1, got 1e-300"),
        ("layer_norm_epsilon", 1e-300, "layer_norm_epsilon must be at least 1e-30, got 1e-300"),
        (
            "chronos_config",
            FORECASTING | {"quantiles": [0.5, 0.1, 0.9]},
            r"quantiles must ascend, got \[0.5, 0.1, 0.9\]",
        ),
        ("attn_implementation", "someone/kernels", "attn_implementation must be 'eager' or 'sdpa'"),
        ("chronos_config", {"quantiles": []}, "chronos_config"),
        ("chronos_config", FORECASTING | {"time_encoding_scale": None}, "time_encoding_scale .* got None"),
        ("chronomoe_format", 2, "saved by a newer ChronoMoE: its format is 2, this version reads up to 1; pip install"),
    ],
)
@pytest.mark.parametrize("kind", ["plain"], indirect=True)
def test_a_value_out_of_range_is_refused_before_memory_is_taken(saved, key, value, message):
    write_config(saved, config_of(saved) | {key: value})
    with pytest.raises(InputError, match=message):
        load_model(saved)


@pytest.mark.parametrize("kind", ["mixture"], indirect=True)
def test_a_mixture_as_version_0_1_0_saved_it_loads(saved):
    values = config_of(saved)
    values.pop("chronomoe_format")
    values["moe"] = {
        "balance": {"bias_rate": 0.0, "kind": "l2", "weight": 0.0, "z_weight": 0.0},
        "router": {"dropout": 0.2, "hidden_sizes": [64], "use_patch_embedding": False},
        "routing": {
            "fallback": "none",
            "fallback_below": 0.0,
            "gumbel": False,
            "temperature": 1.0,
            "threshold": None,
            "top_k": 2,
        },
    }
    write_config(saved, values)
    mixture = load_model(saved)
    assert (mixture.top_k, mixture.moe.routing.threshold) == (2, None)
    assert ChronoMoEPipeline(mixture).predict(torch.rand(2, 1, 50), prediction_length=8)[0].isfinite().all()


def test_ours_carry_a_format_number_and_older_ones_without_it_load(saved, kind):
    values = config_of(saved)
    if kind == "plain":
        assert "chronomoe_format" not in values
    else:
        assert values.pop("chronomoe_format") == 1
        write_config(saved, values)
        load_model(saved)


@pytest.mark.parametrize("kind", ["plain", "mixture"], indirect=True)
@pytest.mark.parametrize("left", [0, 7, 0.5, 0.999])
def test_weights_that_are_cut_short_are_refused(saved, left):
    file = saved / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: left if isinstance(left, int) else int(left * len(content))])
    with pytest.raises(InputError, match="cannot load "):
        load_model(saved)


@pytest.mark.parametrize("kind", ["plain"], indirect=True)
def test_weights_of_another_kind_than_safetensors_are_refused(saved):
    torch.save(load_file(saved / "model.safetensors"), saved / "pytorch_model.bin")
    (saved / "model.safetensors").unlink()
    with pytest.raises(InputError, match="no model.safetensors, which is the only form loaded"):
        load_model(saved)


@pytest.mark.parametrize("kind", ["plain"], indirect=True)
def test_code_of_a_checkpoint_is_never_run(saved):
    (saved / "evil.py").write_text("raise SystemExit")
    write_config(saved, config_of(saved) | {"auto_map": {"AutoModel": "evil.Model", "AutoConfig": "evil.Config"}})
    load_model(saved)
    with pytest.raises(InputError, match="no code from a checkpoint is run; leave out trust_remote_code"):
        ChronoMoEPipeline.from_pretrained(saved, trust_remote_code=True)


@pytest.mark.parametrize("kind", ["plain"], indirect=True)
@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_link_that_leaves_the_folder_is_refused_but_not_those_of_the_hub_cache(saved, tmp_path, name):
    outside = tmp_path / "outside"
    (saved / name).rename(outside)
    (saved / name).symlink_to(outside)
    with pytest.raises(InputError, match=f"{name} .*link.*outside"):
        load_model(saved)
    (tmp_path / "hub" / "blobs").mkdir(parents=True)
    outside.rename(tmp_path / "hub" / "blobs" / "abc")
    (saved / name).unlink()
    (saved / name).symlink_to("../../blobs/abc")
    (tmp_path / "hub" / "snapshots").mkdir()
    load_model(shutil.move(saved, tmp_path / "hub" / "snapshots" / "rev"))


@pytest.fixture
def sharded(saved):
    weights = load_file(saved / "model.safetensors")
    (saved / "model.safetensors").unlink()
    names = sorted(weights)
    shards = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for shard, members in shards.items():
        save_file({name: weights[name] for name in members}, saved / shard, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: shard for shard, members in shards.items() for name in members}}
    (saved / "model.safetensors.index.json").write_text(json.dumps(index))
    return saved


@pytest.mark.parametrize("kind", ["plain"], indirect=True)
def test_shards_load_and_an_index_that_leaves_the_folder_or_names_what_is_not_there_is_refused(sharded):
    load_model(sharded)
    file = sharded / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    for change, message in (
        (
            {"shared.weight": "../outside.safetensors"},
            "names '../outside.safetensors', which is not a safetensors file beside",
        ),
        ({"shared.weight": "/etc/passwd"}, "names '/etc/passwd'"),
        ({"shared.weight": "model-3.safetensors"}, "lacks model-3.safetensors; download all of it"),
    ):
        file.write_text(json.dumps(index | {"weight_map": index["weight_map"] | change}))
        with pytest.raises(InputError, match=message):
            load_model(sharded)
    file.write_text("[1]")
    with pytest.raises(InputError, match="the index of the weights in .* is damaged"):
        load_model(sharded)
