"""What `chronomoe export` wrote is served like the checkpoint that it was made of."""

import re
import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("fastapi", reason="needs the extra serve")
pytest.importorskip("fastapi_offline", reason="needs the extra serve")
pytest.importorskip("onnxruntime", reason="needs the extra onnx")
pytest.importorskip("onnxscript", reason="needs the extra onnx")

from chronomoe import ChronoMoEPipeline
from chronomoe.models.chronos2 import use_exact_group_attention
from chronomoe.models.mixture.mixture import MixtureConfig, build_mixture
from chronomoe.models.mixture.router import RoutingConfig
from chronomoe.serving.app import create_app
from chronomoe.serving.config import ServingConfig
from http_server import one_series, quantiles_of, running
from moe_models import take_sides


@pytest.fixture(scope="module")
def exported(make_teacher, tmp_path_factory):
    """Export a mixture and a student; return their folders."""
    root = tmp_path_factory.mktemp("exported")
    experts = {
        name: use_exact_group_attention(make_teacher(seed=seed, num_layers=1)) for seed, name in enumerate(("a", "b"))
    }
    mixture = take_sides(build_mixture(experts, MixtureConfig(routing=RoutingConfig(threshold=0.7))).eval())
    for name, model in {"moe": mixture, "student": experts["a"]}.items():
        ChronoMoEPipeline(model).save_pretrained(root / name)
        # in a process of its own: torch cannot trace what the suite's shape checks wrap
        command = [sys.executable, "-m", "chronomoe", "export", str(root / name), "--out", str(root / f"{name}-graph")]
        subprocess.run(command, check=True, capture_output=True)
    return root


@pytest.mark.parametrize("backend", ["onnx", "openvino"])
def test_graphs_are_served_as_their_checkpoints_are(exported, make_context, backend):
    if backend == "openvino":
        pytest.importorskip("openvino", reason="needs the extra openvino")
    names = ("moe", "student")
    loaded = {name: ChronoMoEPipeline.from_pretrained(exported / f"{name}-graph", backend=backend) for name in names}
    with running(create_app(loaded, ServingConfig(parallel=2))) as asking:
        for name in loaded:
            pipeline = ChronoMoEPipeline.from_pretrained(exported / name)
            for values in make_context(4, 70).numpy():
                reply = asking.forecast(one_series(values.tolist(), model=name, horizon=20, explain=True))
                [expected], _ = pipeline.predict_quantiles([values], 20, [0.1, 0.5, 0.9])
                found = np.stack([np.array(one) for one in quantiles_of(reply).values()], axis=-1)
                assert np.abs(found - expected[0].numpy()).max() < 1e-4 * expected.std()
                content = reply.json["outputs"][0]["content"][0]
                assert ("experts" in content) == (name == "moe")
                assert "reasons" not in content
        text = asking.get("/metrics").body.decode()
    counts = re.findall(r'chronomoe_expert_rows_total{expert="\w",model="moe"} (\S+)', text)
    assert sum(map(float, counts)) >= 4
