"""accounting.py, judged by Google's dp-accounting and Microsoft's prv-accountant, which share no code with it."""

import math
import time

import dp_accounting
import numpy as np
import pytest
from dp_accounting import pld
from prv_accountant import PoissonSubsampledGaussianMechanism, PRVAccountant

from author_dp.accounting import PrivacyLoss, Spending, compute_epsilon, find_noise_multiplier, make_plan
from author_dp.errors import UserError
from dp_utils import PrivacyArguments

N = 304_279
README_RUN = {"sample_rate": 1024 / N, "steps": 894}


def exact_epsilon(spendings, delta, interval=1e-3):
    """dp-accounting's privacy loss distributions, for add-or-remove-one: both directions, pessimistic rounding."""
    accountant = pld.PLDAccountant(
        neighboring_relation=dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE, value_discretization_interval=interval
    )
    for sigma, rate, steps in spendings:
        event = dp_accounting.GaussianDpEvent(sigma)
        accountant.compose(event if rate == 1 else dp_accounting.PoissonSampledDpEvent(rate, event), steps)
    return accountant.get_epsilon(delta)


def exact_noise(rate, steps, epsilon, delta):
    low, high = 0.2, 12.8
    while high / low > 1 + 3e-4:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if exact_epsilon([(middle, rate, steps)], delta, epsilon * 5e-4) <= epsilon else (middle, high)
    return high


def test_readme_run_is_within_a_fifth_of_a_percent_and_never_above():
    sigma = find_noise_multiplier(**README_RUN, target_epsilon=8.0, target_delta=1 / N)
    assert abs(sigma / 0.4715 - 1) < 2e-3
    assert compute_epsilon(sigma, **README_RUN, delta=1 / N) <= 8.0
    assert exact_epsilon([(sigma, *README_RUN.values())], 1 / N) <= 8.0
    judge = PRVAccountant(
        prvs=[PoissonSubsampledGaussianMechanism(sampling_probability=1024 / N, noise_multiplier=sigma)],
        max_self_compositions=[894], eps_error=0.02, delta_error=1e-9,
    )  # fmt: skip
    lower, _, upper = judge.compute_epsilon(delta=1 / N, num_self_compositions=[894])
    assert lower <= compute_epsilon(sigma, **README_RUN, delta=1 / N) and upper <= 8.02


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rate", "steps", "epsilon", "delta"),
    [(0.01, 1_000, 1.0, 1e-5), (0.05, 117, 8.0, 5e-5), (0.001, 300, 0.5, 1e-6), (0.3, 20, 3.0, 1e-4), (1.0, 10, 2.0, 1e-5)],
)
def test_calibration_is_within_half_a_percent_of_the_exact_noise(rate, steps, epsilon, delta):
    sigma = find_noise_multiplier(rate, steps, epsilon, delta)
    assert compute_epsilon(sigma, rate, steps, delta) <= epsilon
    assert exact_epsilon([(sigma, rate, steps)], delta, epsilon * 1e-4) <= epsilon
    assert 1 - 1e-3 < sigma / exact_noise(rate, steps, epsilon, delta) < 1 + 5e-3


@pytest.mark.slow
def test_epsilon_is_an_upper_bound_and_close():
    generator = np.random.default_rng(0)
    for _ in range(15):
        rate, steps = 10 ** generator.uniform(-3.5, -0.3), int(10 ** generator.uniform(0, 3))
        sigma, delta = generator.uniform(0.5, 5), 10 ** generator.uniform(-7, -4)
        ours, exact = compute_epsilon(sigma, rate, steps, delta), exact_epsilon([(sigma, rate, steps)], delta, 1e-4)
        assert exact * 0.999 - 1e-3 <= ours <= exact * 1.01 + 2e-3, (sigma, rate, steps, delta, ours, exact)


def test_the_error_of_a_coarse_grid_is_added_not_hidden(monkeypatch):
    monkeypatch.setattr(PrivacyLoss, "MAX_CELLS", 2**11)
    spending = [Spending(0.8, 0.02, 500)]
    loss = PrivacyLoss(spending, 1e-5)
    exact = exact_epsilon(spending, 1e-5, 1e-4)
    assert loss.epsilon_error > 0.02 * exact
    assert exact + 0.5 * loss.epsilon_error <= loss.epsilon(spending) <= exact + 3 * loss.epsilon_error


def test_different_mechanisms_compose():
    spendings = [Spending(0.8, 0.01, 300), Spending(1.1, 0.02, 200), Spending(0.8, 0.01, 50)]
    ours = PrivacyLoss(spendings, 1e-5).epsilon(spendings)
    exact = exact_epsilon([(0.8, 0.01, 350), (1.1, 0.02, 200)], 1e-5, 1e-4)
    assert exact * 0.999 <= ours <= exact * 1.01


def test_one_grid_serves_every_number_of_steps():
    loss = PrivacyLoss([Spending(0.6, 0.02, 500)], 1e-5)
    epsilons = [loss.epsilon([Spending(0.6, 0.02, steps)]) for steps in (0, 1, 10, 100, 499, 500)]
    assert epsilons[0] == 0 and epsilons == sorted(epsilons)
    for steps, epsilon in zip((10, 100, 500), (epsilons[2], epsilons[3], epsilons[5])):
        exact = exact_epsilon([(0.6, 0.02, steps)], 1e-5, 1e-4)
        assert exact * 0.999 <= epsilon <= exact * 1.02


@pytest.mark.parametrize("arguments", [(0.01, 0.01, 10), (0.3, 1.0, 20_000), (0.05, 1.0, 1), (2.0, 0.5, 20_000)])
def test_epsilon_beyond_use_is_bounded_at_once(arguments):
    start = time.monotonic()
    assert 200 < compute_epsilon(*arguments, 1e-5) < math.inf
    assert time.monotonic() - start < 30  # it used to be minutes, and gigabytes


def test_edges():
    assert compute_epsilon(0.0, 0.1, 5, 1e-5) == math.inf
    assert compute_epsilon(0.0, 0.1, 0, 1e-5) == 0.0
    assert compute_epsilon(1.0, 0.0, 5, 1e-5) == 0.0
    assert compute_epsilon(20.0, 1e-4, 1, 1e-5) < 1e-3
    assert 10 < compute_epsilon(0.5, 0.5, 100, 1e-12) < 1_000
    assert abs(compute_epsilon(1.0, 1.0, 10, 1e-5) / exact_epsilon([(1.0, 1.0, 10)], 1e-5) - 1) < 0.01
    for wrong in [
        (-1, 0.1, 5, 1e-5),
        (1, 1.1, 5, 1e-5),
        (1, 0.1, -1, 1e-5),
        (1, 0.1, 5, 0),
        (1, 0.1, 5, 1),
        (math.nan, 0.1, 5, 0.1),
    ]:
        with pytest.raises(UserError):
            compute_epsilon(*wrong)
    for wrong in [(0.1, 0, 8, 1e-5), (0.1, 5, 0, 1e-5), (0.1, 5, math.inf, 1e-5), (0.1, 5, 8, 0), (2.0, 5, 8, 1e-5)]:
        with pytest.raises(UserError):
            find_noise_multiplier(*wrong)


def test_a_large_target_needs_little_noise():
    sigma = find_noise_multiplier(0.01, 10, 5_000.0, 1e-5)
    assert 0 < sigma < 0.1 and compute_epsilon(sigma, 0.01, 10, 1e-5) <= 5_000


def test_advice_for_small_batches_and_few_steps_alone():
    class Args:
        per_device_train_batch_size, gradient_accumulation_steps, world_size, max_steps, num_train_epochs = 8, 1, 1, -1, 3

    privacy = PrivacyArguments(noise_multiplier=0.5, per_sample_max_grad_norm=1.0)
    assert "--gradient_accumulation_steps" in make_plan(privacy, Args, np.arange(1_001)).advice()
    Args.gradient_accumulation_steps = 32
    assert make_plan(privacy, Args, np.arange(10_001)).advice() is None
    advice = make_plan(privacy, Args, np.arange(201)).advice()  # all of 200 authors in each of three steps
    assert advice.startswith("3 steps") and "--num_train_epochs, to 60" in advice


def test_default_delta_steps_and_rate():
    class Args:
        per_device_train_batch_size, gradient_accumulation_steps, world_size, max_steps, num_train_epochs = 32, 2, 16, -1, 3

    privacy = PrivacyArguments(noise_multiplier=0.5, per_sample_max_grad_norm=1.0)
    plan = make_plan(privacy, Args, np.arange(304_280))
    assert plan.delta == 1 / 304_279 and plan.sample_rate == 1_024 / 304_279 and plan.steps == math.ceil(3 * 304_279 / 1_024)
    Args.max_steps = 7
    assert make_plan(privacy, Args, np.arange(304_280)).steps == 7
    assert make_plan(privacy, Args, np.arange(101)).sample_rate == 1.0
    with pytest.raises(UserError, match="one author"):
        make_plan(privacy, Args, np.array([0, 5]))
