import pytest

from chronomoe.stages.budget import allocate, late_gain


def test_the_gain_is_that_of_the_second_half():
    curve = {"eval_step": [2, 4, 6, 8, 10], "eval_loss": [9.0, 3.0, 2.0, 1.5, 1.0]}
    assert late_gain(curve) == pytest.approx(0.6931, abs=1e-4)  # log(2 / 1)


def test_a_loss_that_rises_gains_nothing():
    assert late_gain({"eval_step": [1, 2], "eval_loss": [1.0, 1.5]}) == 0


def test_steps_go_by_the_square_root_of_gains():
    assert allocate(300, {"a": 0.039, "b": 0.009}, trust=1.0) == {"a": 200, "b": 100}


def test_a_gain_counts_half_and_the_mean_gain_half():
    gains = {"a": 0.0, "b": 0.04}  # with the mean, 0.01 and 0.03
    assert allocate(1000, gains, floor=0.0) == {"a": 366, "b": 634}  # 1 to the root of 3
    assert allocate(10, gains, trust=0.0) == {"a": 5, "b": 5}


def test_every_expert_gets_a_step_and_equal_gains_equal_shares():
    assert allocate(3, {"a": 0.5, "b": 0.0, "c": 0.0})["b"] == 1
    assert allocate(12, dict.fromkeys("abc", 0.02)) == {"a": 4, "b": 4, "c": 4}
