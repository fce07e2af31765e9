"""The planner's grid: the more authors, time or epsilon there is, the better its best setting; noise never helps."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mutation import catches

from author_dp.accounting.accountant import find_noise_multiplier
from author_dp.accounting.events import cyclic_event
from author_dp.accounting.loss_prediction import predicted_gain
from author_dp.accounting.run_planning import (
    PlanningTask,
    find_planning_limits,
    planning_candidates,
    planning_gain_without_privacy,
    planning_grid,
    planning_noise_multiplier,
)

TASK = PlanningTask(2_000, 4.0, 1e-4, 400_000, 400_000, is_lora=False, max_sampled=2_000)


def best(task: PlanningTask) -> float:
    return predicted_gain(planning_candidates(task)[0])


@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    authors=st.integers(200, 20_000), epsilon=st.floats(1, 7), sampled=st.floats(150, 2_000), factor=st.floats(1.01, 8),
    trained=st.sampled_from([40_000, 400_000]), own_delta=st.booleans(),
)  # fmt: skip
def test_more_time_authors_or_epsilon_never_predict_worse(authors, epsilon, sampled, factor, trained, own_delta):
    def task(authors=authors, epsilon=epsilon, sampled=sampled):
        return PlanningTask(authors, epsilon, 1 / authors if own_delta else 1e-5, 400_000, trained, trained < 400_000, sampled)

    found = best(task())
    assert best(task(sampled=sampled * factor)) >= found
    assert best(task(authors=int(authors * factor) + 1)) >= found
    assert best(task(epsilon=min(8.0, epsilon * factor))) >= found


def test_settings_fit_what_is_asked_for():
    found = list(planning_grid(TASK))
    assert {setting.batch for setting in found} == {16, 32, 64, 128}  # 256 would fit 7 times
    for setting in found:
        assert setting.batch * setting.steps <= 2_000 and setting.bands <= setting.steps
        assert setting.bands * setting.batch <= TASK.num_authors
    assert not list(planning_grid(TASK._replace(max_sampled=100)))


@catches("cheap noise grows with epsilon", "accounting.run_planning.planning_noise_multiplier", "/ RENYI_EXCESS", "* epsilon**2",
    rate=0.02, steps=64, bands=1)  # fmt: skip
@pytest.mark.parametrize(("rate", "steps", "bands"), [(0.02, 64, 1), (0.02, 64, 8), (0.1, 24, 1)])
def test_cheap_noise_is_near_the_calibrated_one(rate, steps, bands):
    event = cyclic_event(1.0, rate, steps, bands)
    exact = find_noise_multiplier(event.sample_rate, event.steps, 4.0, 1e-4)
    assert planning_noise_multiplier(event, 4.0, 1e-4) == pytest.approx(exact, rel=0.08)


def test_the_best_setting_has_the_largest_gain_of_the_grid():
    gains = [predicted_gain(setting) for setting in planning_grid(TASK)]
    found = [predicted_gain(setting) for setting in planning_candidates(TASK)]
    assert found == sorted(found, reverse=True) and found[0] == max(gains) <= planning_gain_without_privacy(TASK)


def test_without_ground_the_most_steps_and_the_least_error_come():
    task = TASK._replace(epsilon=100.0)
    assert "an epsilon of 100" in find_planning_limits(task) and not find_planning_limits(TASK)
    assert [setting.steps for setting in planning_candidates(task)] == [96, 48, 24, 12]
