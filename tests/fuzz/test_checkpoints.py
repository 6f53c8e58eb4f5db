import json
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from chronomoe.models.sparse.config import MoEConfig
from chronomoe.models.sparse.upcycling import upcycle
from chronomoe.pipeline import ChronoMoEPipeline

JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 300),
    st.floats(),
    st.text(max_size=5),
    st.lists(st.integers(), max_size=2),
)


@pytest.fixture(scope="module")
def checkpoints(mixture_pipeline, make_teacher, tmp_path_factory):
    """Folders of a dense model, a mixture and an upcycled model."""
    root = tmp_path_factory.mktemp("checkpoints")
    dense = ChronoMoEPipeline(make_teacher(num_layers=1))
    sparse = ChronoMoEPipeline(upcycle(make_teacher(num_layers=1), MoEConfig(num_experts=2, top_k=1)))
    for name, pipeline in {"dense": dense, "mixture": mixture_pipeline, "sparse": sparse}.items():
        pipeline.save_pretrained(root / name)
    return root


def places(value, before=()):
    """List the paths to all values inside a JSON value."""
    found = [before] if before else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        found += places(inner, (*before, key))
    return found


def forecast(folder):
    pipeline = ChronoMoEPipeline.from_pretrained(folder)
    quantiles, _ = pipeline.predict_quantiles([np.sin(np.arange(40.0, dtype=np.float32))], prediction_length=4)
    assert torch.isfinite(quantiles[0]).all()
    assert (quantiles[0].diff(dim=-1) >= 0).all()


@given(name=st.sampled_from(["dense", "mixture", "sparse"]), data=st.data())
def test_a_changed_configuration_loads_or_is_refused(checkpoints, refused_in_one_line, tmp_path, name, data):
    folder = shutil.copytree(checkpoints / name, tmp_path / "changed", dirs_exist_ok=True)
    values = json.loads((checkpoints / name / "config.json").read_text())
    *path, last = data.draw(st.sampled_from(places(values)))
    inner = values
    for key in path:
        inner = inner[key]
    if data.draw(st.booleans()):
        del inner[last]
    else:
        inner[last] = data.draw(JUNK)
    (folder / "config.json").write_text(json.dumps(values))
    with refused_in_one_line():
        forecast(folder)


@given(name=st.sampled_from(["dense", "mixture", "sparse"]), file=st.sampled_from([0, 1]), data=st.data())
def test_a_file_cut_short_or_with_a_spoilt_head_is_refused(
    checkpoints, refused_in_one_line, tmp_path, name, file, data
):
    folder = shutil.copytree(checkpoints / name, tmp_path / "changed", dirs_exist_ok=True)
    path = folder / ("config.json", "model.safetensors")[file]
    whole = bytearray(path.read_bytes())
    if data.draw(st.booleans()):
        whole = whole[: data.draw(st.integers(0, len(whole) - 1))]
    else:
        whole[data.draw(st.integers(0, min(len(whole), 400) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(whole)
    with refused_in_one_line():
        forecast(folder)
