import gc
import json
import os
import shutil
import weakref

import numpy as np
import pytest
import torch

from chronomoe.data.domains import load_domain
from chronomoe.data.soft_targets import LiveTeacher, SoftTargetStore, revision
from chronomoe.data.windows import TrainingWindows, WindowConfig, collate
from chronomoe.errors import InputError
from chronomoe.models.chronos2 import use_exact_group_attention
from chronomoe.pipeline import load_model
from chronomoe.training.validation import row_losses
from sample_series import sample_domain

CONFIG = WindowConfig(context_length=64, horizon=20, min_context_length=32)
PATCH = 16


@pytest.fixture
def exact(make_teacher):
    return use_exact_group_attention(make_teacher())


def sample_windows(*, seed=0, known=("k",)):
    """Univariate windows alternate with multivariate ones that have covariates."""
    domains = [sample_domain("wave"), sample_domain("spikes", variates=2, past_only=("p",), known=known)]
    return TrainingWindows(domains, CONFIG, size=12, seed=seed)


@pytest.fixture
def windows():
    return sample_windows()


def batch_of(windows, *numbers):
    return collate([windows[number] for number in numbers], patch_size=PATCH)


def test_the_live_teacher_forecasts_as_the_model_does(exact, windows):
    batch = batch_of(windows, 0, 1, 2)
    with torch.no_grad():  # as a teacher forecasts: a gradient needs the weights as they are, not folded
        output = exact(
            batch["context"],
            group_ids=batch["group_ids"],
            future_covariates=batch["future_covariates"],
            num_output_patches=2,
        )
    assert torch.equal(LiveTeacher(exact)(batch), output.normalized_preds[..., :20])


@pytest.mark.parametrize("numbers", [(0, 1, 2, 3), (7, 2, 11), (5,)])
def test_a_store_agrees_with_the_live_teacher_in_any_order(exact, windows, tmp_path, numbers):
    store = SoftTargetStore.build(tmp_path / "store", exact, windows, batch_size=5)
    batch = batch_of(windows, *numbers)
    torch.testing.assert_close(store(batch), LiveTeacher(exact)(batch), rtol=2**-8, atol=1e-5)


def test_known_covariates_change_what_is_stored(exact, tmp_path):
    known, unknown = (
        SoftTargetStore.build(tmp_path / str(len(names)), exact, sample_windows(known=names))(
            batch_of(sample_windows(known=names), 1)
        )
        for names in (("k",), ())
    )
    assert known.shape[0] == unknown.shape[0] + 1
    assert (known[:2] - unknown[:2]).abs().max() > 0.01


@pytest.mark.parametrize("stopped_at", [3, 9])
def test_an_interrupted_build_continues_and_equals_an_uninterrupted_one(exact, windows, tmp_path, stopped_at):
    def stop(done, total):
        assert total == 12
        if done == stopped_at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        SoftTargetStore.build(tmp_path / "cut", exact, windows, batch_size=3, progress=stop)
    assert not (tmp_path / "cut").exists()
    steps = []
    build = {"batch_size": 3, "progress": lambda done, total: steps.append(done)}
    cut = SoftTargetStore.build(tmp_path / "cut", exact, windows, **build)
    assert steps == list(range(stopped_at + 3, 13, 3))
    whole = SoftTargetStore.build(tmp_path / "whole", exact, windows, batch_size=3)
    for name in ("first", "digests", "values"):
        np.testing.assert_array_equal(getattr(cut, name), getattr(whole, name))
    assert not (tmp_path / "cut.partial").exists()


@pytest.mark.parametrize("name", ["started.json", "quantiles", "rows", "digests"])
@pytest.mark.parametrize("left", [0, 5, 20])
def test_a_kill_in_the_middle_of_a_write_costs_what_was_cut_short_alone(exact, windows, tmp_path, name, left):
    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        SoftTargetStore.build(tmp_path / "cut", exact, windows, batch_size=3, progress=stop)
    os.truncate(tmp_path / "cut.partial" / name, left)
    cut = SoftTargetStore.build(tmp_path / "cut", exact, windows, batch_size=3)
    whole = SoftTargetStore.build(tmp_path / "whole", exact, windows, batch_size=3)
    for part in ("first", "digests", "values"):
        np.testing.assert_array_equal(getattr(cut, part), getattr(whole, part))


def test_an_interrupted_build_of_another_teacher_starts_again(exact, make_teacher, windows, tmp_path):
    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        SoftTargetStore.build(tmp_path / "cut", exact, windows, batch_size=3, progress=stop)
    other = use_exact_group_attention(make_teacher(seed=1))
    cut = SoftTargetStore.build(tmp_path / "cut", other, windows, batch_size=3)
    batch = batch_of(windows, 0)
    torch.testing.assert_close(cut(batch), LiveTeacher(other)(batch), rtol=2**-8, atol=1e-5)


def test_a_finished_store_is_reused_without_asking_the_teacher(exact, windows, tmp_path):
    SoftTargetStore.build(tmp_path / "store", exact, windows)
    asked = []
    SoftTargetStore.build(tmp_path / "store", exact, windows, progress=lambda done, total: asked.append(done))
    assert asked == []


def test_another_teacher_or_other_windows_are_refused(exact, make_teacher, windows, tmp_path):
    SoftTargetStore.build(tmp_path / "store", exact, windows)
    message = "holds soft targets of another teacher or of other windows: {} is .*, not .*; delete it"
    other = use_exact_group_attention(make_teacher(seed=1))
    with pytest.raises(InputError, match=message.format("teacher")):
        SoftTargetStore.build(tmp_path / "store", other, windows)
    with pytest.raises(InputError, match=message.format("first_digest")):
        SoftTargetStore.build(tmp_path / "store", exact, sample_windows(seed=1))
    with pytest.raises(InputError, match=message.format("data")):
        SoftTargetStore.build(tmp_path / "store", exact, sample_windows(known=()))


@pytest.mark.parametrize("name", ["store.json", "quantiles", "rows", "digests", "checksums"])
@pytest.mark.parametrize("left", [0, 1, 0.5])
def test_a_store_whose_files_were_cut_short_is_refused(exact, windows, tmp_path, name, left):
    file = SoftTargetStore.build(tmp_path / "store", exact, windows).folder / name
    os.truncate(file, left if isinstance(left, int) else int(left * file.stat().st_size) // 8 * 8)
    with pytest.raises(InputError, match="the soft-target store .* is damaged: .*; delete it and build it again"):
        SoftTargetStore(tmp_path / "store")


@pytest.mark.parametrize(("found", "remedy"), [(2, "pip install -U"), (None, "delete it and build it again")])
def test_a_store_of_another_format_is_refused_with_what_to_do(exact, windows, tmp_path, found, remedy):
    manifest = SoftTargetStore.build(tmp_path / "store", exact, windows).folder / "store.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"format": found}))
    with pytest.raises(InputError, match=f"is of format {found}, this version reads 1; {remedy}"):
        SoftTargetStore(tmp_path / "store")


def test_bits_that_changed_on_disk_are_not_learned_from(exact, windows, tmp_path):
    store = SoftTargetStore.build(tmp_path / "store", exact, windows)
    sound, hurt = batch_of(windows, 0, 1), batch_of(windows, 1, 2)
    expected = store(sound)
    at = 2 * int(store.first[2]) * store.meta["levels"] * store.meta["horizon"]
    with (store.folder / "quantiles").open("r+b") as file:
        file.seek(at)
        (byte,) = file.read(1)
        file.seek(at)
        file.write(bytes([byte ^ 1]))
    again = SoftTargetStore(store.folder)
    assert torch.equal(again(sound), expected)
    with pytest.raises(InputError, match="damaged: the soft targets of window 2 are not what was written; delete it"):
        again(hurt)
    (store.folder / "checksums").unlink()  # as a store of an earlier version
    assert SoftTargetStore(store.folder)(hurt).isfinite().all()


def test_a_batch_of_other_windows_is_refused(exact, windows, tmp_path):
    store = SoftTargetStore.build(tmp_path / "store", exact, windows)
    message = r"was computed from other windows \(series, cutoffs, covariates or grouping differ\); build it again"
    beyond = windows[0]._replace(index=12)
    others = [batch_of(sample_windows(seed=1), 2), batch_of(sample_windows(known=()), 0, 1)]
    for batch in (*others, collate([beyond], patch_size=PATCH)):
        with pytest.raises(InputError, match=message):
            store(batch)


def test_a_folder_without_a_store_is_refused(tmp_path):
    with pytest.raises(InputError, match="holds no soft-target store; make one with SoftTargetStore.build"):
        SoftTargetStore(tmp_path)


def test_a_store_needs_no_teacher_in_memory(make_teacher, windows, tmp_path):
    teacher = use_exact_group_attention(make_teacher())
    gone = weakref.ref(teacher)
    store = SoftTargetStore.build(tmp_path / "store", teacher, windows)
    del teacher
    gc.collect()
    assert gone() is None
    assert store(batch_of(windows, 0, 1)).isfinite().all()
    assert isinstance(store.values, np.memmap)


def test_a_store_can_be_moved(exact, windows, tmp_path):
    batch = batch_of(windows, 3)
    expected = SoftTargetStore.build(tmp_path / "store", exact, windows)(batch)
    shutil.move(tmp_path / "store", tmp_path / "moved")
    assert torch.equal(SoftTargetStore(tmp_path / "moved")(batch), expected)


def test_the_revision_tells_weights_and_the_key_tells_types(exact, make_teacher, windows, tmp_path):
    assert revision(exact) == revision(make_teacher())
    assert revision(exact) != revision(make_teacher(seed=1))
    SoftTargetStore.build(tmp_path / "store", exact, windows)
    assert json.loads((tmp_path / "store" / "store.json").read_text())["dtype"] == "torch.float32"


def test_a_store_belongs_to_the_type_that_it_was_computed_in(exact, windows, tmp_path):
    narrow = SoftTargetStore.build(tmp_path / "narrow", exact, windows, compute_dtype=torch.bfloat16)
    wide = SoftTargetStore.build(tmp_path / "wide", exact, windows)
    assert (narrow.values != wide.values).any()
    batch = batch_of(windows, 0, 1, 2)
    torch.testing.assert_close(narrow(batch), wide(batch), rtol=0.05, atol=0.05)
    for name, asked in (("narrow", torch.float32), ("wide", torch.bfloat16)):
        with pytest.raises(InputError, match=r"compute_dtype is 'torch\..*', not '.*'; delete it"):
            SoftTargetStore.build(tmp_path / name, exact, windows, compute_dtype=asked)


def test_an_interrupted_build_never_goes_on_in_another_type(exact, windows, tmp_path):
    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        SoftTargetStore.build(tmp_path / "cut", exact, windows, batch_size=3, progress=stop)
    options = {"batch_size": 3, "compute_dtype": torch.bfloat16}
    cut = SoftTargetStore.build(tmp_path / "cut", exact, windows, **options)
    whole = SoftTargetStore.build(tmp_path / "whole", exact, windows, **options)
    np.testing.assert_array_equal(cut.values, whole.values)


def test_a_store_that_does_not_say_its_type_is_one_of_float32(exact, windows, tmp_path):
    manifest = SoftTargetStore.build(tmp_path / "store", exact, windows).folder / "store.json"
    meta = json.loads(manifest.read_text())
    del meta["compute_dtype"]
    manifest.write_text(json.dumps(meta))
    SoftTargetStore.build(tmp_path / "store", exact, windows)
    with pytest.raises(InputError, match="compute_dtype is 'torch.float32', not 'torch.bfloat16'"):
        SoftTargetStore.build(tmp_path / "store", exact, windows, compute_dtype=torch.bfloat16)


def test_soft_targets_in_bfloat16_have_the_error_of_those_in_float32_on_real_series(tmp_path):
    domains = [load_domain(f"demo:{name}") for name in ("electricity", "pedestrians", "traffic", "weather", "web")]
    teacher = load_model("tiny")
    shape = WindowConfig(context_length=360, horizon=48)
    windows = TrainingWindows(domains, shape, size=250, seed=0)
    batch = collate([windows[number] for number in range(250)], patch_size=teacher.chronos_config.output_patch_size)
    target, _ = teacher.instance_norm(batch["future_target"], teacher.instance_norm(batch["context"])[1])
    levels = torch.tensor(teacher.chronos_config.quantiles)
    losses = []
    for dtype in (torch.float32, torch.bfloat16):
        store = SoftTargetStore.build(tmp_path / str(dtype), teacher, windows, compute_dtype=dtype)
        losses.append(row_losses(store(batch), target, levels=levels).nanmean().item())
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
