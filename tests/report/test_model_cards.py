"""The cards of a run's checkpoints say what the hub asks for, and what the run found."""

import shutil

import pytest
import yaml
from huggingface_hub import ModelCard

from chronomoe.report.page import write_report


@pytest.fixture
def folder(finished_run, tmp_path):
    return shutil.copytree(finished_run, tmp_path / "run")


@pytest.mark.parametrize("name", ["moe", "recommended"])
def test_a_card_has_results_of_each_domain_cost_and_data(folder, name):
    card = ModelCard.load(folder / name / "README.md")
    assert {result.dataset_name for result in card.data.eval_results} == {"power", "sales"}
    assert {result.metric_type for result in card.data.eval_results} == {"wql", "mase", "mae"}
    assert (card.data.license, card.data.library_name) == ("apache-2.0", "chronomoe")
    for heading in ("Forecast", "Limits", "Results", "Cost", "Data"):
        assert card.text.count(f"## {heading}\n") == 1
    assert "\n| seasonal naive | 1.000 | 1.000 | 1.000 |\n" in card.text


def test_a_teacher_and_series_of_the_hub_are_named_as_the_hub_does(folder):
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config |= {"teacher": "amazon/chronos-2", "domains": [{"data": "hub:autogluon/chronos_datasets/monash_traffic"}]}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    write_report(folder)
    facts = ModelCard.load(folder / "moe" / "README.md").data
    assert (facts.base_model, facts.datasets) == ("amazon/chronos-2", ["autogluon/chronos_datasets"])


def test_a_report_written_again_leaves_the_cards_as_they_were(folder):
    before = [(folder / name / "README.md").read_text() for name in ("moe", "recommended")]
    write_report(folder)
    assert [(folder / name / "README.md").read_text() for name in ("moe", "recommended")] == before
