"""Experts as low-rank changes of one model."""

import copy

import pytest
import torch

from chronomoe import ChronoMoEPipeline, InputError, load_model
from chronomoe.models.chronos2 import use_exact_group_attention
from chronomoe.models.mixture.compression import compress, with_one_more, with_whole_experts

RANK = 4


def near(model, seed, *, rank=2, size=0.3):
    """Return a copy whose matrices are changed by some of low rank, and whose vectors by noise."""
    changed, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in changed.parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if weight.ndim == 2:
                left, values, right = torch.linalg.svd(noise, full_matrices=False)
                noise = (left[:, :rank] * values[:rank]) @ right[:rank] / weight.shape[1] ** 0.5
            weight.add_(size * noise)
    return changed


@pytest.fixture
def members(make_teacher):
    generalist = use_exact_group_attention(make_teacher(num_layers=2))
    return {"a": near(generalist, 1), "generalist": generalist, "b": near(generalist, 2)}


@pytest.fixture
def mixture(make_mixture, members):
    return make_mixture(members=members, routing={"top_k": 2})


def assert_same(one, other, *, context, **tolerance):
    with torch.no_grad():
        first, second = (model(context, num_output_patches=2) for model in (one, other))
    torch.testing.assert_close(first.normalized_preds, second.normalized_preds, **tolerance)


def test_changes_of_that_rank_are_kept_within_what_int8_holds(mixture, context):
    compressed = compress(mixture, rank=RANK)
    for whole, kept in zip(mixture.experts, compressed.experts, strict=True):
        assert_same(whole, kept, context=context, rtol=0, atol=0.03)
    assert_same(mixture, compressed, context=context, rtol=0, atol=0.03)


def test_the_common_model_is_the_generalist_to_the_bit_or_the_mean(mixture, members, make_mixture):
    kept = compress(mixture, rank=1).experts[1].state_dict()
    assert all(torch.equal(value, kept[key]) for key, value in members["generalist"].state_dict().items())
    pair = {"a": members["a"], "b": members["b"]}
    base = compress(make_mixture(members=pair), rank=1).experts.base
    for key, value in base.named_parameters():
        torch.testing.assert_close(value, (pair["a"].state_dict()[key] + pair["b"].state_dict()[key]) / 2)


def test_a_change_of_higher_rank_is_cut_to_its_largest_values(mixture):
    made = {rank: compress(mixture, rank=rank).experts[0].state_dict() for rank in (1, 2, 4)}
    whole = mixture.experts[0].state_dict()
    key = "encoder.block.0.layer.2.mlp.wi.weight"
    gaps = [(weights[key] - whole[key]).norm().item() for weights in made.values()]
    assert gaps[0] > 10 * gaps[1]
    assert gaps[2] == pytest.approx(gaps[1], rel=0.5)


def test_a_compressed_mixture_is_saved_and_loaded(mixture, make_context, tmp_path):
    pipeline = ChronoMoEPipeline(compress(mixture, rank=RANK))
    pipeline.save_pretrained(tmp_path / "small")
    loaded = ChronoMoEPipeline.from_pretrained(tmp_path / "small")
    series = list(make_context())
    expected, found = (torch.cat(one.predict(series, prediction_length=40)) for one in (pipeline, loaded))
    assert torch.equal(found, expected)
    assert loaded.model.experts.base.encoder.block[0].layer[0].self_attention.q.weight.dtype == torch.float32


def test_many_experts_take_little_memory(members, make_mixture):
    many = {f"e{index}": near(members["generalist"], index) for index in range(32)}
    whole = make_mixture(members=many)
    small = compress(whole, rank=1)

    def size(model):
        return sum(value.nbytes for value in model.experts.state_dict().values())

    assert size(small) < 0.15 * size(whole)


def test_whole_experts_come_back(mixture, context):
    compressed = compress(mixture, rank=RANK)
    whole = with_whole_experts(compressed)
    assert whole.config.low_rank is None
    assert_same(whole, compressed, context=context, rtol=0, atol=0)
    assert with_whole_experts(whole) is whole


def test_another_expert_leaves_the_others_to_the_bit(mixture, members, context):
    compressed = compress(mixture, rank=RANK)
    new = near(members["generalist"], 9)
    grown = with_one_more(compressed, "c", new)
    assert grown.config.expert_names == ["a", "generalist", "b", "c"]
    for index in range(3):
        one, other = (model.experts[index].state_dict() for model in (compressed, grown))
        assert all(torch.equal(value, other[key]) for key, value in one.items())
    assert_same(new, grown.experts[3], context=context, rtol=0, atol=0.03)


def test_an_expert_that_was_made_is_kept_until_another_is(mixture):
    experts = compress(mixture, rank=1).experts
    first = experts[0]
    assert experts[0] is first
    assert experts[1] is not first
    assert experts[0] is not first
    experts.keep = 2
    both = experts[1], experts[2]
    assert (experts[1], experts[2]) == both
    assert experts[-1].config.d_model == first.config.d_model
    with pytest.raises(IndexError):
        experts[3]


def test_what_cannot_be_compressed_or_tuned_is_refused(mixture, make_mixture):
    with pytest.raises(InputError, match="rank of an expert must be at least 1, got 0"):
        compress(mixture, rank=0)
    with pytest.raises(InputError, match="'power' and 'traffic' differ; distil experts of one size"):
        compress(make_mixture(), rank=1)
    with pytest.raises(InputError, match="low-rank experts only forecast; fine-tune the mixture that was compressed"):
        ChronoMoEPipeline(compress(mixture, rank=1)).fit([torch.arange(200.0)], prediction_length=4)


def test_the_commands_compress_and_grow(chronomoe, refused, mixture, teacher_folder, make_frame, tmp_path):
    ChronoMoEPipeline(mixture).save_pretrained(tmp_path / "moe")
    status, out, _ = chronomoe("compress", tmp_path / "moe", "--rank", 3, "--out", tmp_path / "small")
    assert status == 0
    assert out.startswith(f"saved {tmp_path / 'small'}: 3 experts of rank 3, ")
    assert "only a mixture is compressed" in refused("compress", teacher_folder, "--out", tmp_path / "no")
    for name in ("old", "new"):
        make_frame(3, 300).to_csv(tmp_path / f"{name}.csv", index=False)
    shape = ["--horizon", 16, "--context-length", 64, "--steps", 2, "--batch-size", 4, "--windows", 16, "--freq", "h"]
    words = [tmp_path / "new.csv", "--name", "new", "--data", tmp_path / "old.csv", *shape, "--out", tmp_path / "grown"]
    status, _, err = chronomoe("grow", tmp_path / "small", *words)
    assert (status, "✓ grown" in err) == (0, True)
    before, after = load_model(tmp_path / "small"), load_model(tmp_path / "grown")
    assert (after.config.low_rank, after.config.expert_names) == (3, ["a", "generalist", "b", "new"])
    kept = before.experts.state_dict()
    assert all(
        torch.equal(value, after.experts.state_dict()[key][: len(value)] if "base" not in key else value)
        for key, value in kept.items()
    )
