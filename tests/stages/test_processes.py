import pytest

from chronomoe.errors import InputError
from chronomoe.stages.processes import first_process, meet, tell


def test_a_process_alone_waits_for_nobody(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    tell("anything")
    meet("anywhere")
    assert first_process()


def test_a_launch_that_sets_half_of_its_variables_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(
        InputError, match="2 processes were launched together, but .*MASTER_ADDR.*; start them with torchrun"
    ):
        tell("anything")
