"""accountant: compared with Google's dp-accounting and Microsoft's prv-accountant, which share no code with it."""

import math
import tracemalloc

import dp_accounting
import mpmath
import numpy as np
import pytest
from dp_accounting import pld
from dp_accounting.pld.privacy_loss_distribution import from_gaussian_mechanism
from mutation import catches
from opacus.accountants.analysis.prv import PoissonSubsampledGaussianPRV, compute_safe_domain_size
from prv_accountant import PoissonSubsampledGaussianMechanism, PRVAccountant

from author_dp.accounting.accountant import EpsilonAccountant, compute_epsilon, find_noise_multiplier
from author_dp.accounting.events import MechanismEvent
from author_dp.accounting.gaussian import gaussian_delta
from author_dp.accounting.pld import LossDistribution
from author_dp.accounting.rdp import ORDERS, rdp_of_step
from author_dp.errors import UserError

N = 304_279
README_RUN = {"sample_rate": 1024 / N, "steps": 894}


def exact_epsilon(events, delta, interval=1e-3):
    """Return epsilon by dp-accounting's privacy loss distribution: both directions, pessimistic rounding."""
    accountant = pld.PLDAccountant(
        neighboring_relation=dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE, value_discretization_interval=interval
    )
    for sigma, rate, steps in events:
        event = dp_accounting.GaussianDpEvent(sigma)
        accountant.compose(event if rate == 1 else dp_accounting.PoissonSampledDpEvent(rate, event), steps)
    return accountant.get_epsilon(delta)


def exact_noise(rate, steps, epsilon, delta):
    low, high = 0.2, 12.8
    while high / low > 1 + 3e-4:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if exact_epsilon([(middle, rate, steps)], delta, epsilon * 5e-4) <= epsilon else (middle, high)
    return high


@pytest.mark.integration
def test_find_noise_multiplier_readme_run_is_close_and_never_above():
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


@pytest.mark.integration
@pytest.mark.parametrize(
    ("rate", "steps", "epsilon", "delta"),
    [(0.01, 1_000, 1.0, 1e-5), (0.05, 117, 8.0, 5e-5), (0.001, 300, 0.5, 1e-6), (0.3, 20, 3.0, 1e-4), (1.0, 10, 2.0, 1e-5)],
)
def test_find_noise_multiplier_is_within_half_a_percent_of_exact(rate, steps, epsilon, delta):
    sigma = find_noise_multiplier(rate, steps, epsilon, delta)
    assert compute_epsilon(sigma, rate, steps, delta) <= epsilon
    assert exact_epsilon([(sigma, rate, steps)], delta, epsilon * 1e-4) <= epsilon
    assert 1 - 1e-3 < sigma / exact_noise(rate, steps, epsilon, delta) < 1 + 5e-3


@pytest.mark.integration
def test_compute_epsilon_is_a_close_upper_bound():
    generator = np.random.default_rng(0)
    for _ in range(15):
        rate, steps = 10 ** generator.uniform(-3.5, -0.3), int(10 ** generator.uniform(0, 3))
        sigma, delta = generator.uniform(0.5, 5), 10 ** generator.uniform(-7, -4)
        ours, exact = compute_epsilon(sigma, rate, steps, delta), exact_epsilon([(sigma, rate, steps)], delta, 1e-4)
        assert exact * 0.999 - 1e-3 <= ours <= exact * 1.01 + 2e-3, (sigma, rate, steps, delta, ours, exact)


@pytest.mark.integration
@catches("the lower bound for epsilon", "accounting.accountant.EpsilonAccountant._compose_on_grid", "_, _, upper =",
    "upper, _, _ =")  # fmt: skip
def test_prv_epsilon_includes_the_grid_error(monkeypatch):
    events = [MechanismEvent(0.8, 0.02, 500)]
    accountant = EpsilonAccountant(events, 1e-5)
    monkeypatch.setattr(EpsilonAccountant, "MAX_CELLS", 2**11)
    epsilon = accountant._compose_on_grid(events, 0.02)
    exact = exact_epsilon(events, 1e-5, 1e-4)
    assert accountant.epsilon_error > 0.02 * exact
    assert exact + 0.5 * accountant.epsilon_error <= epsilon <= exact + 3 * accountant.epsilon_error


@catches("Renyi divergences as if everybody else were drawn", "accounting.rdp.rdp_of_step",
    " + (order - i) * math.log1p(-sample_rate)", " + order * math.log1p(-sample_rate)", sigma=0.4715, rate=1024 / N)  # fmt: skip
@catches("rounding forgotten in Renyi divergences", "accounting.rdp.rdp_of_step", " + 16 * ULP * largest", "",
    sigma=20.0, rate=0.0001)  # fmt: skip
@pytest.mark.parametrize(("sigma", "rate"), [(0.3, 0.5), (0.4715, 1024 / N), (1.0, 0.999), (20.0, 1e-4), (0.05, 1e-7)])
def test_rdp_of_step_is_rounded_up_and_close(sigma, rate):
    found = dict(zip(ORDERS.tolist(), rdp_of_step(sigma, rate).tolist()))
    with mpmath.workdps(60):
        q, variance = mpmath.mpf(rate), mpmath.mpf(sigma) ** 2
        for order in (2, 3, 17, 63, 512):
            terms = (
                mpmath.binomial(order, i) * (1 - q) ** (order - i) * q**i * mpmath.exp((i * i - i) / (2 * variance))
                for i in range(order + 1)
            )
            exact = mpmath.log(mpmath.fsum(terms)) / (order - 1)
            assert exact <= found[order] <= exact * (1 + mpmath.mpf(1e-10)) + mpmath.mpf(1e-12)


@pytest.mark.integration
@catches("a grid that ends too early", "accounting.accountant.EpsilonAccountant._largest_loss", "self.delta_error / 4",
    "self.delta")  # fmt: skip
def test_prv_grid_reaches_as_far_as_opacus():
    for sigma, rate, steps, delta in [(0.4715, 1024 / N, 894, 1 / N), (1.0, 0.01, 1_000, 1e-5), (0.6, 0.1, 100, 1e-8)]:
        events = [MechanismEvent(sigma, rate, steps)]
        accountant = EpsilonAccountant(events, delta)
        theirs = compute_safe_domain_size([PoissonSubsampledGaussianPRV(rate, sigma)], [steps], 0.01, accountant.delta_error)
        ours = accountant._largest_loss(events, 0.01)
        assert theirs * (1 - 1e-9) <= ours <= 1.5 * theirs  # integer orders are a little coarser


# --- never below the truth ------------------------------------------------------------------------------


def settings(number: int, seed: int) -> list[tuple[float, float, int, float]]:
    """Return random noise multipliers (0.3 to 20), sample rates (1e-4 to 1, every third is 1), steps (1 to 20,000), deltas."""
    generator = np.random.default_rng(seed)
    low, high = np.log([0.3, 1e-4, 1, 1e-15]), np.log([20, 1, 20_000, 1e-3])
    values = np.exp(generator.uniform(low, high, size=(number, 4))).tolist()
    return [(sigma, 1.0 if i % 3 == 0 else q, max(1, int(n)), delta) for i, (sigma, q, n, delta) in enumerate(values)]


def gaussian_delta_in_high_precision(mu, epsilon):
    """Return delta of a Gaussian mechanism in 200 digits (Balle and Wang 2018, Theorem 8)."""
    with mpmath.workdps(200):
        mu, epsilon = mpmath.mpf(mu), mpmath.mpf(epsilon)
        return mpmath.ncdf(mu / 2 - epsilon / mu) - mpmath.exp(epsilon) * mpmath.ncdf(-mu / 2 - epsilon / mu)


def check_at_rate_one(sigma, steps, delta):
    epsilon, mu = EpsilonAccountant([MechanismEvent(sigma, 1.0, steps)], delta).epsilon, mpmath.sqrt(steps) / mpmath.mpf(sigma)
    assert gaussian_delta_in_high_precision(mu, epsilon) <= delta  # epsilon is enough,
    assert epsilon == 0 or gaussian_delta_in_high_precision(mu, epsilon * (1 - 1e-5)) > delta  # and no more than that


def check_below_rate_one(sigma, rate, steps, delta):
    """Compare with dp-accounting, losses rounded down and, by connected dots, up; below 1e-12 its own rounding shows."""
    events = [MechanismEvent(sigma, rate, steps)]
    accountant = EpsilonAccountant(events, delta)
    epsilon, bound = accountant.epsilon, LossDistribution(events, delta).epsilon()
    assert bound <= epsilon * (1 + 1e-9)
    if delta < 1e-12:
        assert accountant.accountant == "pld"  # compared with closed forms in test_pld.py
        return
    options = {"sampling_prob": rate, "value_discretization_interval": max(1e-3 * epsilon / steps**0.5, epsilon / 3e4, 2e-6)}
    down = from_gaussian_mechanism(sigma, pessimistic_estimate=False, use_connect_dots=False, **options)
    up = from_gaussian_mechanism(sigma, pessimistic_estimate=True, use_connect_dots=True, **options)
    try:
        lower, upper = (distribution.self_compose(steps).get_epsilon_for_delta(delta) for distribution in (down, up))
    except OverflowError:  # of theirs, at losses of many hundreds
        assert epsilon > 300
        return
    slack = 1e-9 if epsilon > 0.01 else 1e-5  # where their grid is coarse
    close = 0.997 if epsilon < 1_000 else 0.99
    assert max(lower, close * upper - slack) <= bound <= epsilon <= 1.005 * upper + slack, (lower, bound, epsilon, upper)


@pytest.mark.integration
@pytest.mark.parametrize("seed", range(5))
def test_epsilon_is_never_below_the_truth_at_any_delta(seed):
    for sigma, rate, steps, delta in settings(10 if seed else 4, seed):
        if rate == 1:
            check_at_rate_one(sigma, steps, delta)
        else:
            check_below_rate_one(sigma, rate, steps, delta)


@catches("the closed form without its second term's care", "accounting.gaussian.gaussian_delta", "ratio - ratio_further",
    "ratio - 2 * ratio_further")  # fmt: skip
def test_gaussian_epsilon_is_exact_at_any_delta():
    assert 7.8687 <= EpsilonAccountant([MechanismEvent(10.0, 1.0, 100)], 1e-14).epsilon < 7.8688
    for mu in (1e-6, 1e-3, 1.0, 30.0, 1e3):
        for delta in (0.999, 0.5, 1e-3, 1e-15, 1e-100):
            check_at_rate_one(1 / mu, 1, delta)


def test_gaussian_delta_is_rounded_up_or_down():
    for mu, epsilon in ((1e-6, 0.0), (1e-3, 1e-3), (0.1, 0.5), (1.0, 0.0), (1.0, 8.0), (5.0, 20.0), (30.0, 700.0)):
        exact = gaussian_delta_in_high_precision(mu, epsilon)
        assert gaussian_delta(mu, epsilon, upper=False) <= exact <= gaussian_delta(mu, epsilon)
        assert gaussian_delta(mu, epsilon, upper=False) > exact * (1 - 1e-7)


@pytest.mark.parametrize(
    ("setting", "accountant"),
    [((0.4719, 1024 / N, 894, 1 / N), "prv"), ((10.0, 1.0, 100, 1e-14), "gaussian"), ((1.0, 0.01, 1_000, 1e-14), "pld"),
     ((0.3, 0.5, 20_000, 1e-6), "pld"), ((20.0, 1e-3, 10, 1e-6), "pld")],
)  # fmt: skip
def test_accountant_is_named(setting, accountant):
    *event, delta = setting
    assert EpsilonAccountant([MechanismEvent(*event)], delta).accountant == accountant


@pytest.mark.integration
@catches("steps of equal mechanisms forgotten", "accounting.events.merge_events", "totals.get((sigma, rate), 0) + steps",
    "steps")  # fmt: skip
def test_epsilon_composes_unequal_mechanisms():
    events = [MechanismEvent(0.8, 0.01, 300), MechanismEvent(1.1, 0.02, 200), MechanismEvent(0.8, 0.01, 50)]
    ours = EpsilonAccountant(events, 1e-5).epsilon
    exact = exact_epsilon([(0.8, 0.01, 350), (1.1, 0.02, 200)], 1e-5, 1e-4)
    assert exact * 0.999 <= ours <= exact * 1.01


@pytest.mark.integration
def test_epsilon_grows_with_steps():
    epsilons = [EpsilonAccountant([MechanismEvent(0.6, 0.02, steps)], 1e-5).epsilon for steps in (0, 1, 10, 100, 499, 500)]
    assert epsilons[0] == 0 and epsilons == sorted(epsilons)
    for steps, epsilon in zip((10, 100, 500), (epsilons[2], epsilons[3], epsilons[5])):
        exact = exact_epsilon([(0.6, 0.02, steps)], 1e-5, 1e-4)
        assert exact * 0.999 <= epsilon <= exact * 1.02


@pytest.mark.parametrize("arguments", [(0.01, 0.01, 10), (0.3, 1.0, 20_000), (0.05, 1.0, 1), (2.0, 0.5, 20_000)])
def test_compute_epsilon_bounds_huge_values_on_a_small_grid(arguments):
    """It used to take gigabytes, and minutes."""
    tracemalloc.start()
    assert 200 < compute_epsilon(*arguments, 1e-5) < math.inf
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200 * 2**20, peak


@catches("no noise under an epsilon that holds without", "accounting.accountant.EpsilonAccountant.__init__",
    "if any(event.noise_multiplier == 0", "if prob_ever_sampled(events) > delta and any(event.noise_multiplier == 0")  # fmt: skip
def test_compute_epsilon_edge_cases():
    assert compute_epsilon(0.0, 0.1, 5, 1e-5) == math.inf
    assert compute_epsilon(0.0, 0.1, 0, 1e-5) == 0.0
    assert compute_epsilon(0.0, 1e-9, 10, 1e-5) == math.inf  # though delta exceeds the chance to be in: it claims nothing
    assert compute_epsilon(1.0, 0.0, 5, 1e-5) == 0.0
    assert compute_epsilon(20.0, 1e-4, 1, 1e-5) < 1e-3
    assert compute_epsilon(0.3, 1e-7, 9, 1e-6) == 0.0 < compute_epsilon(0.3, 1e-7, 11, 1e-6)  # a chance of 9e-7, 1.1e-6 to be in
    assert 10 < compute_epsilon(0.5, 0.5, 100, 1e-12) < 1_000
    assert abs(compute_epsilon(1.0, 1.0, 10, 1e-5) / exact_epsilon([(1.0, 1.0, 10)], 1e-5) - 1) < 0.01
    for wrong in [
        (-1, 0.1, 5, 1e-5),
        (1, 1.1, 5, 1e-5),
        (1, 0.1, -1, 1e-5),
        (1, 0.1, 5, 0),
        (1, 0.1, 5, 1),
        (math.nan, 0.1, 5, 0.1),
        (math.inf, 0.1, 5, 0.1),
        (1e300, 0.1, 5, 0.1),
        (1, 0.1, 5, 5e-324),
    ]:
        with pytest.raises(UserError):
            compute_epsilon(*wrong)
    for wrong in [(0.1, 0, 8, 1e-5), (0.1, 5, 0, 1e-5), (0.1, 5, math.inf, 1e-5), (0.1, 5, 8, 0), (2.0, 5, 8, 1e-5)]:
        with pytest.raises(UserError):
            find_noise_multiplier(*wrong)


def test_find_noise_multiplier_large_target_needs_little_noise():
    sigma = find_noise_multiplier(0.01, 10, 5_000.0, 1e-5)
    assert 0 < sigma < 0.1 and compute_epsilon(sigma, 0.01, 10, 1e-5) <= 5_000


@pytest.mark.integration
def test_find_noise_multiplier_refuses_target_that_holds_without_noise():
    """If an author is sampled at all with probability below delta, any epsilon holds without noise."""
    for sample_rate, steps in ((1e-12, 100), (1e-8, 100), (1e-7, 100)):
        with pytest.raises(UserError, match="--target_delta 1e-05"):
            find_noise_multiplier(sample_rate, steps, 8.0, 1e-5)
    assert find_noise_multiplier(1e-6, 100, 8.0, 1e-5) > 0.1
