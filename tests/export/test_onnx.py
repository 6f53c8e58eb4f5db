"""A student or a whole mixture as one ONNX graph: the numbers of the model it was made of."""

import json
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec

import numpy as np
import pandas as pd
import pytest
import torch

from chronomoe import ChronoMoEPipeline
from chronomoe.errors import InputError
from chronomoe.models.bands import Bands
from chronomoe.models.mixture.features import LAGS, direct_spectra, fourier_spectra, series_features
from chronomoe.models.scaling import loc_and_scale, loc_and_scale_without_branch
from chronomoe.models.sparse.config import MoEConfig
from chronomoe.models.sparse.upcycling import upcycle
from chronomoe.models.student import StudentConfig, create_student_model
from chronomoe.predict.files import Forecaster
from chronomoe.stages.evaluation import evaluate_checkpoints
from chronomoe.stages.export import export_checkpoint
from chronomoe.stages.processes import place_model
from chronomoe.training.familiarity import add_teacher
from moe_models import router_windows, take_sides
from sample_series import sample_domain, series_to_frame

pytest.importorskip("onnxruntime", reason="needs the extra onnx")
pytest.importorskip("onnxscript", reason="needs the extra onnx")
onnx = pytest.importorskip("onnx", reason="needs the extra onnx")
from chronomoe.export.engines import ENGINES  # noqa: E402
from chronomoe.export.folder import export_model  # noqa: E402  # which imports the extra

TOLERANCE = 2e-5
"""Of a difference, relative to the spread of a row's forecast."""


def export(folder, out, *options):
    """Call the command in a process of its own: torch cannot trace what the suite's shape checks wrap."""
    command = [sys.executable, "-m", "chronomoe", "export", str(folder), "--out", str(out), *options]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def made(make_teacher, tmp_path_factory):
    """Export a mixture of experts of two shapes, whose router takes sides; return its pipeline and the folder."""
    from chronomoe.models.chronos2 import use_exact_group_attention
    from chronomoe.models.mixture.mixture import MixtureConfig, build_mixture
    from chronomoe.models.mixture.router import RouterConfig, RoutingConfig

    sizes = {"a": {"num_layers": 1}, "b": {"num_layers": 2, "d_ff": 64}, "generalist": {"num_layers": 1}}
    experts = {
        name: use_exact_group_attention(make_teacher(seed=seed, **size))
        for seed, (name, size) in enumerate(sizes.items())
    }
    config = MixtureConfig(router=RouterConfig(use_patch_embedding=True), routing=RoutingConfig(top_k=2, threshold=0.7))
    mixture = take_sides(build_mixture(experts, config).eval())
    root = tmp_path_factory.mktemp("onnx")
    pipeline = ChronoMoEPipeline(mixture)
    pipeline.save_pretrained(root / "mixture")
    done = export(root / "mixture", root / "graph")
    assert done.returncode == 0, done.stderr
    return pipeline, root / "graph"


@pytest.fixture(scope="module", params=["onnx", "openvino"])
def exported(made, request):
    """Return the pipelines of the mixture and of its graph in a runtime, and the folder."""
    pytest.importorskip(
        {"onnx": "onnxruntime"}.get(request.param, request.param), reason=f"needs the extra {request.param}"
    )
    pipeline, folder = made
    return pipeline, ChronoMoEPipeline.from_pretrained(folder, backend=request.param), folder


def branches(graph, condition):
    """Yield the branches of every ``If`` on a condition, at any depth."""
    for node in graph.node:
        for attribute in node.attribute if node.op_type == "If" else ():
            yield from [attribute.g] if node.input[0] == condition else branches(attribute.g, condition)


def assert_same(graph, model, inputs):
    with torch.no_grad():
        expected = model(**inputs).quantile_preds
    found = graph(**inputs).quantile_preds
    assert found.shape == expected.shape
    gap = (found - expected).abs() / (expected.std(dim=(1, 2), keepdim=True) + 1e-3 * expected.abs() + 1e-6)
    assert gap.max() < TOLERANCE


@pytest.mark.parametrize(("rows", "length", "patches"), [(1, 1, 1), (1, 128, 4), (7, 100, 2), (6, 300, 3)])
def test_batches_of_any_size_context_and_horizon(exported, make_context, rows, length, patches):
    pipeline, loaded, _ = exported
    assert_same(loaded.model, pipeline.model, {"context": make_context(rows, length), "num_output_patches": patches})


def test_gaps_groups_and_known_covariates(exported, batch, gappy):
    pipeline, loaded, _ = exported
    batch.pop("future_target")
    assert_same(loaded.model, pipeline.model, batch)
    assert_same(loaded.model, pipeline.model, {"context": gappy, "num_output_patches": 2})


def test_the_same_experts_count_the_same(exported, make_context):
    pipeline, loaded, _ = exported
    series = list(make_context(12, 90))
    expected, found = pipeline.routing(series), loaded.routing(series)
    assert [list(one) for one in found] == [list(one) for one in expected]
    for one, other in zip(found, expected, strict=True):
        assert list(one.values()) == pytest.approx(list(other.values()), abs=1e-5)
    assert len({name for one in found for name in one}) > 1, "the router takes sides"


def test_a_compressed_mixture_is_exported(make_teacher, make_context, tmp_path):
    from chronomoe.models.chronos2 import use_exact_group_attention
    from chronomoe.models.mixture.compression import compress
    from chronomoe.models.mixture.mixture import build_mixture

    alike = {name: use_exact_group_attention(make_teacher(seed=seed, num_layers=1)) for seed, name in enumerate("ab")}
    small = compress(take_sides(build_mixture(alike).eval()), rank=3)
    ChronoMoEPipeline(small).save_pretrained(tmp_path / "small")
    done = export(tmp_path / "small", tmp_path / "graph")
    assert done.returncode == 0, done.stderr
    loaded = ChronoMoEPipeline.from_pretrained(tmp_path / "graph")
    assert_same(loaded.model, small, {"context": make_context(8, 100), "num_output_patches": 2})


def test_a_teacher_forecasts_unfamiliar_series_in_the_graph_too(make_teacher, make_context, tmp_path):
    from chronomoe.models.chronos2 import use_exact_group_attention
    from chronomoe.models.mixture.mixture import build_mixture

    small, large = (use_exact_group_attention(make_teacher(seed=layers, num_layers=layers)) for layers in (1, 2))
    mixture = take_sides(build_mixture({"a": small, "b": small}).eval())
    windows = [router_windows(mixture, make_context(200, seed=seed)) for seed in (0, 1)]
    add_teacher(mixture, large, *windows, familiar=0.7)
    pipeline = ChronoMoEPipeline(mixture)
    pipeline.save_pretrained(tmp_path / "mixture")
    done = export(tmp_path / "mixture", tmp_path / "graph")
    assert done.returncode == 0, done.stderr
    loaded = ChronoMoEPipeline.from_pretrained(tmp_path / "graph")
    rows = make_context(24, 100, seed=2)
    assert_same(loaded.model, mixture, {"context": rows, "num_output_patches": 2})
    names = {name for one in loaded.routing(list(rows)) for name in one}
    assert "teacher" in names
    assert names & {"a", "b"}
    groups = torch.arange(24) // 3
    assert_same(loaded.model, mixture, {"context": rows, "group_ids": groups, "num_output_patches": 2})


@pytest.mark.parametrize("cross_learning", [False, True])
@pytest.mark.filterwarnings("ignore:We recommend keeping prediction length")
def test_long_horizons_are_unrolled_alike(exported, make_context, cross_learning):
    pipeline, loaded, _ = exported
    series = [row[index * 7 :] for index, row in enumerate(make_context(4, 100))]
    options = {"prediction_length": 150, "cross_learning": cross_learning}
    for found, expected in zip(loaded.predict(series, **options), pipeline.predict(series, **options), strict=True):
        assert (found - expected).abs().max() < 10 * TOLERANCE * expected.std()


def test_frames_are_forecast_alike(exported):
    pipeline, loaded, _ = exported
    frame = series_to_frame(sample_domain(count=3, length=90).series)
    expected, found = (one.predict_df(frame, prediction_length=20) for one in (pipeline, loaded))
    numbers = expected.select_dtypes("number").columns
    assert found.drop(columns=numbers).equals(expected.drop(columns=numbers))
    assert np.allclose(found[numbers], expected[numbers], rtol=1e-4, atol=1e-4)


def test_files_are_forecast_with_a_graph(exported, tmp_path):
    pipeline, _, folder = exported
    frame = series_to_frame(sample_domain(count=3, length=90).series)
    frame.to_parquet(tmp_path / "past.parquet")
    Forecaster(folder, horizon=20).write(tmp_path / "past.parquet", tmp_path / "out.parquet")
    expected = pipeline.predict_df(frame, prediction_length=20)
    assert np.allclose(
        pd.read_parquet(tmp_path / "out.parquet").predictions, expected.predictions, rtol=1e-4, atol=1e-4
    )
    with pytest.raises(InputError, match="settled by its export"):
        Forecaster(folder, horizon=20, dtype="bfloat16").write(tmp_path / "past.parquet", tmp_path / "out.parquet")


def test_a_graph_is_scored_beside_the_checkpoint_it_was_made_of(exported):
    folder = exported[2]
    records = evaluate_checkpoints(
        [str(folder.parent / "mixture"), str(folder)], [sample_domain(count=3, length=300)],
        horizon=16, context_length=96, limit=4,
    )  # fmt: skip
    found = {(one["model"], one["metric"]): one["value"] for one in records if one["domain"] == "overall"}
    assert found[str(folder), "WQL"] == pytest.approx(found[str(folder.parent / "mixture"), "WQL"], rel=1e-4)


def test_a_graph_stays_on_the_cpu_beside_a_gpu_nobody_asked_it_to_use(exported, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    series_to_frame(sample_domain(count=3, length=90).series).to_parquet(tmp_path / "past.parquet")
    Forecaster(exported[2], horizon=20).write(tmp_path / "past.parquet", tmp_path / "out.parquet")
    assert len(pd.read_parquet(tmp_path / "out.parquet")) == 60
    assert place_model(exported[1].model) == torch.device("cpu")
    with pytest.raises(InputError, match="an exported model runs on the CPU, got device 'cuda:0'"):
        Forecaster(exported[2], horizon=20, device="cuda").write(tmp_path / "past.parquet", tmp_path / "cuda.parquet")


def test_a_server_leaves_a_graph_on_the_cpu_too(exported, monkeypatch):
    pytest.importorskip("fastapi", reason="needs the extra serve")
    from chronomoe.serving.server import make_app

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    plan = {"models": {"fast": str(exported[2])}, "config": {}, "threads": None, "device": "auto", "dtype": "float32"}
    assert list(make_app(plan).state.service.models.models) == ["fast"]


def test_forecasts_at_once_are_those_one_after_the_other(exported, make_context):
    graph = exported[1].model
    contexts = [make_context(rows, 30 + 17 * rows) for rows in (1, 3, 2, 5)] * 4
    expected = [graph(one).quantile_preds for one in contexts]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda one: graph(one).quantile_preds, contexts))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("backend", "module"), [("onnx", "onnxruntime"), ("openvino", "openvino")])
def test_one_runtime_needs_no_other(made, monkeypatch, backend, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(InputError, match=rf"needs {module}, .*run: pip install 'chronomoe\[{backend}\]'"):
        ChronoMoEPipeline.from_pretrained(made[1], backend=backend)
    other = {"onnx": "openvino", "openvino": "onnx"}[backend]
    if find_spec({"onnx": "onnxruntime"}.get(other, other)):
        ChronoMoEPipeline.from_pretrained(made[1], backend=other)


def test_an_export_says_what_runs_it(made, tmp_path, monkeypatch):
    shutil.copytree(made[1], tmp_path / "graph")
    config = json.loads((tmp_path / "graph" / "config.json").read_text())
    assert config["backend"] == "onnx"
    opened = []
    engine = lambda path, threads: opened.append(path.parent.name)  # noqa: E731
    monkeypatch.setitem(ENGINES, "openvino", engine)
    for backend, loaded in (("openvino", 1), ("onnx", 1)):
        (tmp_path / "graph" / "config.json").write_text(json.dumps(config | {"backend": backend}))
        ChronoMoEPipeline.from_pretrained(tmp_path / "graph")
        assert len(opened) == loaded
    (tmp_path / "graph" / "config.json").write_text(json.dumps(config | {"backend": "tflite"}))
    with pytest.raises(InputError, match="its backend must be one of onnx, openvino, got 'tflite'"):
        ChronoMoEPipeline.from_pretrained(tmp_path / "graph")
    with pytest.raises(InputError, match="backend must be one of onnx, openvino, got 'tflite'"):
        export_model(made[0].model, tmp_path / "other", backend="tflite")


@pytest.mark.parametrize(("backend", "module"), [("onnx", "onnxruntime"), ("openvino", "openvino")])
def test_a_graph_that_a_runtime_cannot_read_is_refused(made, tmp_path, backend, module):
    pytest.importorskip(module, reason=f"needs the extra {backend}")
    shutil.copytree(made[1], tmp_path / "graph")
    (tmp_path / "graph" / "model.onnx").write_bytes(b"no graph")
    with pytest.raises(InputError, match="cannot load"):
        ChronoMoEPipeline.from_pretrained(tmp_path / "graph", backend=backend)


def test_weights_beyond_two_gigabytes_lie_beside_the_graph(made, make_context, tmp_path, monkeypatch):
    pipeline, folder = made
    loaded = ChronoMoEPipeline.from_pretrained(folder)
    whole, check = onnx.load(folder / "model.onnx"), onnx.checker.check_model

    def check_files_only(model, *args, **kwargs):  # as onnx does with a graph of that size
        assert not isinstance(model, onnx.ModelProto)
        check(model, *args, **kwargs)

    monkeypatch.setattr("chronomoe.export.folder.LARGEST_FILE", 1000)
    monkeypatch.setattr("chronomoe.export.folder.build_graph", lambda model: whole)
    monkeypatch.setattr("onnx.checker.check_model", check_files_only)
    export_model(pipeline.model, tmp_path / "large")
    assert (tmp_path / "large" / "model.onnx.data").stat().st_size > (tmp_path / "large" / "model.onnx").stat().st_size
    context = make_context(3, 90)
    large = ChronoMoEPipeline.from_pretrained(tmp_path / "large").model
    assert torch.equal(large(context).quantile_preds, loaded.model(context).quantile_preds)


def test_every_expert_stands_in_a_branch(exported):
    graph = onnx.load(exported[2] / "model.onnx").graph
    branches = [node for node in graph.node if node.op_type == "If"]
    assert len(branches) == 3
    outside = {node.op_type for node in graph.node if node.name.startswith("expert") and node.op_type != "If"}
    assert "MatMul" not in outside, "an expert that no row chose is not entered"


@pytest.mark.parametrize("method", ["fit", "embed", "set_routing", "save_pretrained"])
def test_what_a_graph_cannot_do_is_refused(exported, make_context, tmp_path, method):
    loaded = exported[1]
    series = [make_context(1, 60)[0]]
    call = {
        "fit": lambda: loaded.fit(series, prediction_length=16, num_steps=1, output_dir=tmp_path),
        "embed": lambda: loaded.embed(series),
        "set_routing": lambda: loaded.set_routing(top_k=1),
        "save_pretrained": lambda: loaded.save_pretrained(tmp_path / "again"),
    }[method]
    with pytest.raises(InputError, match="exported|mixture"):
        call()


def test_pieces_share_weights_but_not_the_ranges_of_their_activations():
    from chronomoe.export.graph import _Graph

    whole, forms = _Graph(), []
    for kind, scale in (("grouped", 1.0), ("alone", 2.0)):
        values = {"mul_1_scale": np.float32(scale), "blocks.0.feed_in_quantized": np.ones((2, 2), dtype=np.float32)}
        initializers = [onnx.numpy_helper.from_array(np.asarray(value), name) for name, value in values.items()]
        node = onnx.helper.make_node("Mul", list(values), ["y"])
        piece = onnx.helper.make_model(onnx.helper.make_graph([node], kind, [], [], initializers))
        forms.append(_Graph())
        forms[-1].insert(piece, f"expert0/{kind}/", shared="expert0/", y=f"expert0/{kind}/y")
    whole.branch("together", "expert0/y", *forms)
    found = {name: onnx.numpy_helper.to_array(value) for name, value in whole.constants.items()}
    assert sorted(float(value) for name, value in found.items() if name.endswith("_scale")) == [1.0, 2.0]
    assert [name for name in found if name.endswith("_quantized")] == ["expert0/blocks.0.feed_in_quantized"]


def test_a_checkpoint_is_not_replaced_by_its_own_export(make_teacher, tmp_path):
    ChronoMoEPipeline(create_student_model(make_teacher(), "small")).save_pretrained(tmp_path / "student")
    with pytest.raises(InputError, match="not empty; choose a new one"):
        export_checkpoint(tmp_path / "student", tmp_path / "student")
    assert (tmp_path / "student" / "model.safetensors").exists()


def test_an_export_without_its_configuration_is_refused(tmp_path):
    (tmp_path / "model.onnx").touch()
    with pytest.raises(InputError, match="it has no config.json; make one"):
        ChronoMoEPipeline.from_pretrained(tmp_path)


def test_int8_changes_little_and_depends_on_no_other_row(make_teacher, make_context, tmp_path):
    student = create_student_model(make_teacher(), StudentConfig(num_layers=2)).eval()
    ChronoMoEPipeline(student).save_pretrained(tmp_path / "student")
    frame = series_to_frame(sample_domain(count=4, length=400).series)
    frame.to_parquet(tmp_path / "data.parquet")
    options = ["--int8", "--data", str(tmp_path / "data.parquet"), "--horizon", "16", "--context-length", "96"]
    done = export(tmp_path / "student", tmp_path / "int8", *options)
    assert done.returncode == 0, done.stderr
    loaded = ChronoMoEPipeline.from_pretrained(tmp_path / "int8", backend="onnx")
    context = torch.from_numpy(np.stack([row[:96] for _, row in frame.groupby("item_id")["target"]])).float()
    with torch.no_grad():
        exact = student(context).quantile_preds
    rough = loaded.model(context).quantile_preds
    assert 0 < (rough - exact).abs().mean() < 0.05 * exact.std()
    alone = torch.cat([loaded.model(row[None]).quantile_preds for row in context])
    assert torch.allclose(rough, alone, rtol=1e-4, atol=1e-5)
    together = {"context": context, "group_ids": torch.tensor([0, 0, 1, 1])}
    with torch.no_grad():
        exact = student(**together).quantile_preds
    assert 0 < (loaded.model(**together).quantile_preds - exact).abs().mean() < 0.05 * exact.std()
    forms = list(branches(onnx.load(tmp_path / "int8" / "model.onnx").graph, "together"))
    assert len(forms) == 2
    for form, products_of_a_layer in zip(forms, (4 + 1 + 2, 4 + 4 + 2), strict=True):  # alone, grouped
        narrow = {node.output[0] for node in form.node if node.op_type == "DequantizeLinear"}
        products = [set(node.input) for node in form.node if node.op_type == "MatMul"]
        in_int8 = sum(operands <= narrow for operands in products)
        assert in_int8 == 2 * products_of_a_layer


def test_sparse_models_wrong_options_and_other_folders_are_refused(make_teacher, tmp_path):
    sparse = upcycle(
        create_student_model(make_teacher(), StudentConfig(num_layers=1)), MoEConfig(num_experts=2, top_k=1)
    )
    ChronoMoEPipeline(sparse).save_pretrained(tmp_path / "sparse")
    done = export(tmp_path / "sparse", tmp_path / "graph")
    assert done.returncode == 2
    assert "only students and mixtures" in done.stderr
    assert not (tmp_path / "graph").exists()
    assert "--int8 needs --data" in export(tmp_path / "sparse", tmp_path / "graph", "--int8").stderr
    with pytest.raises(InputError, match="no exported model"):
        ChronoMoEPipeline.from_pretrained(tmp_path / "sparse", backend="onnx")
    with pytest.raises(InputError, match="backend must be"):
        ChronoMoEPipeline.from_pretrained(tmp_path / "sparse", backend="tflite")


def test_spectra_summed_directly_are_those_of_the_fourier_transform(gappy):
    mask = gappy.isfinite().float()
    z = torch.where(mask > 0, gappy, 0.0)
    z = z / z.abs().amax().clamp(min=1)
    lags = torch.tensor([lag if lag < z.shape[1] else 0 for lag in LAGS])
    for ours, theirs in zip(
        *(f(z, mask, lags=lags, length=128) for f in (direct_spectra, fourier_spectra)), strict=True
    ):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4)
    features = [series_features(gappy, max_length=128, spectra=one) for one in (direct_spectra, fourier_spectra)]
    assert torch.allclose(*features, atol=1e-5)


def test_location_and_scale_without_a_branch(gappy, make_teacher):
    norm = make_teacher().instance_norm
    rows = torch.cat([gappy, gappy[:2] * 1e30, gappy[:2] * 1e-30, torch.zeros(1, gappy.shape[1])])
    for ours, theirs in zip(loc_and_scale_without_branch(rows, norm), loc_and_scale(rows, norm), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-5)


def test_recalibrated_bands_go_with_the_graph(exported, make_context, tmp_path):
    pipeline, _, _ = exported
    generator = torch.Generator().manual_seed(0)
    bands = Bands(3 * torch.rand(3, 9, 20, generator=generator), torch.tensor([9, 9, 9]))
    pipeline.model.bands = bands
    try:
        pipeline.save_pretrained(tmp_path / "calibrated")
        assert export(tmp_path / "calibrated", tmp_path / "graph").returncode == 0
        graph = ChronoMoEPipeline.from_pretrained(tmp_path / "graph")
        torch.testing.assert_close(graph.model.bands, bands)
        series = list(make_context())
        expected, found = (torch.cat(one.predict(series, prediction_length=24)) for one in (pipeline, graph))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    finally:
        del pipeline.model.bands
