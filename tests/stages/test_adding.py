"""One more expert in a finished mixture."""

import pytest
import torch

from chronomoe import ChronoMoEPipeline, load_model
from chronomoe.models.bands import Bands


@pytest.fixture
def moe(make_mixture, experts, tmp_path):
    """Folder of a mixture of three experts whose routing is its own."""
    members = {name: experts[name] for name in ("power", "traffic", "retail")}
    mixture = make_mixture(members=members, routing={"top_k": 2, "temperature": 1.5})
    mixture.bands = Bands(torch.ones(3, 9, 16), torch.ones(3, dtype=torch.long))
    ChronoMoEPipeline(mixture).save_pretrained(tmp_path / "moe")
    return tmp_path / "moe"


@pytest.fixture
def files(make_frame, tmp_path):
    """An old domain, and one whose level and season are another's."""
    make_frame(3, 300).to_csv(tmp_path / "old.csv", index=False)
    make_frame(3, 300, season=7, seed=3).to_csv(tmp_path / "new.csv", index=False)
    return tmp_path / "old.csv", tmp_path / "new.csv"


SHAPE = ["--horizon", 16, "--context-length", 64, "--steps", 3, "--batch-size", 4, "--windows", 32, "--freq", "h"]


def test_an_expert_is_added_and_the_others_stay_to_the_bit(chronomoe, moe, files, tmp_path):
    old, new = files
    words = ["grow", moe, new, "--name", "new", "--data", old, *SHAPE, "--out"]
    status, out, err = chronomoe(*words, tmp_path / "grown")
    assert (status, out) == (0, f"saved {tmp_path / 'grown'}\n")
    assert "new branches from " in err
    before, after = load_model(moe), load_model(tmp_path / "grown")
    assert after.config.expert_names == ["power", "traffic", "retail", "new"]
    assert after.moe.routing == before.moe.routing
    assert after.bands is None
    for one, other in zip(before.experts, after.experts, strict=False):
        assert all(torch.equal(value, other.state_dict()[key]) for key, value in one.state_dict().items())
    start = err.split("new branches from ")[1].split()[0]
    first = before.experts[before.config.expert_names.index(start)].state_dict()
    assert any(not torch.equal(value, first[key]) for key, value in after.experts[-1].state_dict().items())
    assert not (tmp_path / "grown.work").exists()

    status, _, _ = chronomoe(*words, tmp_path / "again")
    assert status == 0
    again = load_model(tmp_path / "again").state_dict()
    assert all(torch.equal(value, again[key]) for key, value in after.state_dict().items())


def test_the_new_expert_learns_from_a_teacher_where_one_is_named(
    chronomoe, refused, moe, files, teacher_folder, tmp_path
):
    old, new = files
    words = [moe, new, "--name", "new", "--data", old, *SHAPE, "--teacher", teacher_folder, "--out", tmp_path / "grown"]
    status, _, err = chronomoe("grow", *words)
    assert status == 0
    assert "✓ soft-targets" in err

    more = [new, "--name", "new", "--data", old, *SHAPE, "--from-teacher", "--out", tmp_path / "cut"]
    assert "an expert is cut from the teacher that --teacher names" in refused("grow", moe, *more)
    status, _, err = chronomoe("grow", moe, *more, "--teacher", teacher_folder)
    assert (status, "new branches from the teacher" in err) == (0, True)
    assert load_model(tmp_path / "cut").experts[-1].config.num_layers == 1


def test_a_teacher_for_unfamiliar_series_stays_and_knows_the_new_domain(
    chronomoe, refused, experts, files, teacher_folder, tmp_path
):
    old, new = files
    for name in ("power", "traffic"):
        ChronoMoEPipeline(experts[name]).save_pretrained(tmp_path / name)
    shape = ["--horizon", 16, "--context-length", 64, "--windows", 32, "--freq", "h"]
    words = [tmp_path / "power", tmp_path / "traffic", "--data", old, *shape, "--teacher", teacher_folder]
    assert "familiar must be below 1" in refused("compose", *words, "--familiar", 1.5, "--out", tmp_path / "no")
    status, _, err = chronomoe("compose", *words, "--familiar", 0.7, "--out", tmp_path / "moe")
    assert (status, "✓ unfamiliar" in err) == (0, True)
    before = load_model(tmp_path / "moe")
    assert before.config.expert_names == ["power", "traffic", "teacher"]

    taken = ["grow", tmp_path / "moe", new, "--data", old, *SHAPE, "--out", tmp_path / "grown", "--name"]
    assert "the mixture has power, traffic, teacher" in refused(*taken, "teacher")
    status, _, _ = chronomoe(*taken, "new")
    assert status == 0
    after = load_model(tmp_path / "grown")
    assert after.config.expert_names == ["power", "traffic", "new", "teacher"]
    assert after.config.unfamiliar["familiar"] == 0.7
    weights = after.teacher.state_dict()
    assert all(torch.equal(value, weights[key]) for key, value in before.teacher.state_dict().items())
    assert len(after.familiarity.mean) == 2


def test_what_cannot_grow_is_refused(refused, moe, files, teacher_folder, tmp_path):
    old, new = files
    more = [*SHAPE, "--out", tmp_path / "grown"]
    assert "only a mixture is grown" in refused("grow", teacher_folder, new, "--name", "x", "--data", old, *more)
    taken = refused("grow", moe, new, "--name", "power", "--data", old, *more)
    assert "needs a name of its own, got 'power'; the mixture has power, traffic, retail" in taken
    same = refused("grow", moe, new, "--name", "x", "--data", new, *more)
    assert "each of a name of its own, got ['new', 'new']" in same
    assert "Missing option '--data'" in refused("grow", moe, new, "--name", "x", *more)
