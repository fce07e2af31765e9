"""tuning: the price of the best of K runs, against dp-accounting and against the exact law of the best."""

import math
from decimal import Decimal, localcontext
from itertools import islice

import mpmath
import numpy as np
import pytest
from conftest import within
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent, SelfComposedDpEvent
from dp_accounting.dp_event import RepeatAndSelectDpEvent
from dp_accounting.rdp import RdpAccountant
from mutation import catches
from scipy.special import ndtr

from author_dp.accounting.accountant import compute_epsilon, find_noise_multiplier
from author_dp.accounting.events import MechanismEvent
from author_dp.accounting.tuning import (
    SEARCH_ORDERS,
    RunCount,
    TuningRelease,
    calibrate_search,
    rdp_of_run_step,
    run_rdp,
    search_epsilon,
)
from author_dp.errors import UserError

ETAS = [0.0, 1.0, math.inf]
TINY = TuningRelease(1e-6)  # costs nothing beside a training


@catches("a geometric number of runs at the price of a logarithmic one", "accounting.tuning.search_rdp",
    "(1 + count.eta) * np.min", "np.min", eta=1.0)  # fmt: skip
@pytest.mark.parametrize("eta", ETAS)
def test_search_epsilon_agrees_with_dp_accounting(eta):
    for mean, sigma, rate, steps in [(2.0, 1.3, 0.02, 100), (6.0, 0.7, 0.02, 100), (20.0, 3.0, 1.0, 10)]:
        run = SelfComposedDpEvent(PoissonSampledDpEvent(rate, GaussianDpEvent(sigma)), steps)
        judge = RdpAccountant(SEARCH_ORDERS.tolist()).compose(RepeatAndSelectDpEvent(run, mean, eta)).get_epsilon(1e-5)
        ours = search_epsilon(run_rdp([MechanismEvent(sigma, rate, steps)], TINY), RunCount(mean, eta), 1e-5)
        assert judge * 0.999 <= ours <= judge * 1.002, (mean, ours, judge)  # the judge cuts its series early


def density_of_best(count: RunCount, below: np.ndarray, density: np.ndarray) -> np.ndarray:
    """Return the density of the best run's score: P(best <= x) is K's generating function at F(x)."""
    rest = 1 - (1 - count.gamma) * below if count.eta != math.inf else None
    derivative = {
        0.0: lambda: -(1 - count.gamma) / (rest * math.log(count.gamma)),
        1.0: lambda: count.gamma / rest**2,
        math.inf: lambda: count.expected * np.exp(count.expected * (below - 1)),
    }[count.eta]()
    return derivative * density


def exact_delta(count: RunCount, mu: float, epsilon: float) -> float:
    """Return delta of the best of K outcomes of a Gaussian mechanism, by its density; a larger outcome is better.

    Runs that are none, with Poisson, are as likely with as without an author.
    """
    x = np.linspace(-12 - abs(mu), 12 + abs(mu), 200_001)
    of_best = [
        density_of_best(count, ndtr(x - mean), np.exp(-((x - mean) ** 2) / 2) / math.sqrt(2 * math.pi)) for mean in (0.0, mu)
    ]
    assert abs(np.trapezoid(of_best[0], x) - (1 - math.exp(-count.expected) * (count.eta == math.inf))) < 1e-9
    return max(float(np.trapezoid(np.maximum(0, one - math.exp(epsilon) * other), x)) for one, other in (of_best, of_best[::-1]))


@catches("a search that costs what a run costs", "accounting.tuning.search_rdp",
    "result = rdp + times + math.log(mean) / (SEARCH_ORDERS - 1)", "result = rdp", eta=0.0)  # fmt: skip
@pytest.mark.parametrize("eta", ETAS)
def test_search_epsilon_is_never_below_the_exact_law_of_the_best(eta):
    """An author makes every score better (mu > 0) or worse (mu < 0)."""
    delta, single_is_too_small = 1e-4, 0
    for mean in (2.0, 6.0, 20.0):
        for mu in (-2.0, -0.5, 0.3, 1.0, 2.5):
            event = MechanismEvent(1 / abs(mu), 1.0, 1)
            epsilon = search_epsilon(run_rdp([event], TINY), RunCount(mean, eta), delta)
            assert exact_delta(RunCount(mean, eta), mu, epsilon) <= delta, (mean, mu)
            single_is_too_small += exact_delta(RunCount(mean, eta), mu, compute_epsilon(*event, delta)) > delta
    assert single_is_too_small >= 10  # the search does cost more than a run


def generating(count: RunCount, z: np.ndarray) -> np.ndarray:
    """Return the mean of z^K."""
    if count.eta == math.inf:
        return np.exp(count.expected * (z - 1))
    if count.eta == 1:
        return count.gamma * z / (1 - (1 - count.gamma) * z)
    return np.log1p(-(1 - count.gamma) * z) / math.log(count.gamma)


@pytest.mark.parametrize("eta", ETAS)
def test_search_epsilon_is_never_below_the_exact_law_where_the_score_is_all(eta):
    """A run that releases one bit of an author by randomized response: the best of K is one bit, too."""
    for mean, epsilon in [(2.0, 0.1), (6.0, 0.5), (20.0, 0.5), (6.0, 3.0)]:
        count = RunCount(mean, eta)
        worse = np.array([1, math.exp(epsilon)]) / (1 + math.exp(epsilon))  # without and with the author
        none = generating(count, np.zeros(2))
        low, high = generating(count, worse) - none, 1 - generating(count, worse)
        for delta in (1e-2, 1e-6):
            bound = math.exp(search_epsilon(run_rdp([], TuningRelease(epsilon)), count, delta))
            for a, b in ((0, 1), (1, 0)):
                assert sum(max(0, part[a] - bound * part[b]) for part in (none, low, high)) <= delta, (mean, epsilon)


@pytest.mark.parametrize("eta", ETAS)
@pytest.mark.parametrize("mean", [1.1, 6.0, 30.0])
def test_run_count_probabilities_are_the_law(eta, mean):
    count = RunCount(mean, eta)
    with localcontext(prec=80):
        probabilities = [float(p) for p in islice(count.probabilities(), 6_000)]
    assert math.isclose(math.fsum(probabilities), 1, rel_tol=1e-9)
    assert math.isclose(math.fsum(k * p for k, p in enumerate(probabilities)), mean, rel_tol=1e-9)
    expected = {
        0.0: lambda k: -((1 - count.gamma) ** k) / (k * math.log(count.gamma)) if k else 0,
        1.0: lambda k: count.gamma * (1 - count.gamma) ** (k - 1) if k else 0,
        math.inf: lambda k: math.exp(-mean + k * math.log(mean) - math.lgamma(k + 1)),
    }[eta]
    assert np.allclose(probabilities[:50], [expected(k) for k in range(50)], rtol=1e-9)
    assert math.fsum(probabilities[: count.quantile(Decimal("0.99"))]) <= 0.99 < 1


@catches("a fixed number of runs", "accounting.tuning.RunCount.draw",
    "return self.quantile(Decimal(secrets.randbits(192)) / 2**192)", "return round(self.expected)", eta=0.0)  # fmt: skip
@pytest.mark.parametrize("eta", ETAS)
def test_run_count_draw_follows_the_law(eta):
    count = RunCount(3.0, eta)
    with localcontext(prec=80):
        probabilities = [float(p) for p in islice(count.probabilities(), 6)]
    draws = [count.draw() for _ in range(2_000)]
    for k, probability in enumerate(probabilities):
        assert within(draws.count(k), 2_000 * probability, math.sqrt(2_000 * probability * (1 - probability)) + 1e-9)


@pytest.mark.parametrize(("sigma", "rate"), [(0.3, 0.01), (0.6, 0.02), (1.5, 0.3), (4.0, 0.9)])
def test_rdp_of_run_step_lies_between_the_integer_orders(sigma, rate):
    """(order - 1) times the divergence is convex in the order: at each order below the chord, and above the neighbors' lines."""
    log_mean = (SEARCH_ORDERS - 1) * rdp_of_run_step(sigma, rate)
    slopes = np.diff(log_mean) / np.diff(SEARCH_ORDERS)
    assert np.all(np.diff(slopes) >= -1e-7 * slopes[1:]) and np.all(slopes > 0)
    exact = float(mpmath_log_mean(sigma, rate, 2.75))
    assert exact <= log_mean[SEARCH_ORDERS == 2.75][0] <= exact * (1 + 1e-8) + 1e-11


def mpmath_log_mean(sigma, rate, order):
    """Return log E[(1 - q + q e^((2 x - 1) / (2 sigma^2)))^order] over x ~ N(0, sigma^2)."""

    def integrand(x):
        ratio = 1 - rate + rate * mpmath.exp((2 * x - 1) / (2 * sigma**2))
        return mpmath.npdf(x, 0, sigma) * ratio**order

    return mpmath.log(mpmath.quad(integrand, np.arange(-12 * sigma, order + 13 * sigma, sigma).tolist()))


def test_release_rdp_is_that_of_randomized_response():
    for epsilon in (0.01, 0.5, 3.0):
        p = math.exp(epsilon) / (1 + math.exp(epsilon))
        rdp = dict(zip(SEARCH_ORDERS.tolist(), TuningRelease(epsilon).rdp()))
        for order in (2, 3, 8):
            exact = math.log(p**order * (1 - p) ** (1 - order) + (1 - p) ** order * p ** (1 - order)) / (order - 1)
            assert exact * (1 - 1e-12) <= rdp[order] <= exact * (1 + 1e-9)
        assert np.all(TuningRelease(epsilon).rdp() <= epsilon * (1 + 1e-9))


@catches("scores that cost nothing", "accounting.tuning.run_rdp", "np.maximum(training, release.rdp())", "training")
def test_run_rdp_counts_the_score():
    events = [MechanismEvent(1.0, 0.02, 50), MechanismEvent(2.0, 1.0, 3)]
    training, score = run_rdp(events, TINY), TuningRelease(3.0).rdp()
    assert np.allclose(run_rdp(events, TuningRelease(3.0)), np.maximum(training, score))
    assert np.allclose(run_rdp(events, TuningRelease(3.0, both=True)), training + score)
    assert np.allclose(run_rdp([], TuningRelease(3.0, times=2)), 2 * score)


@catches("the noise of a single run", "accounting.tuning.calibrate_search",
    "run_epsilon = compute_epsilon(sigma, sample_rate, steps, delta)",
    "run_epsilon, noise_multiplier = target_epsilon, find_noise_multiplier(sample_rate, steps, target_epsilon, "
    "delta)\n    return SearchNoise(count, run_epsilon, noise_multiplier, run_rdp([], release), target_epsilon)",
    target=8.0)  # fmt: skip
@pytest.mark.parametrize("target", [1.0, 8.0])
def test_calibrate_search_ends_at_the_target(target):
    counts, rate, steps, delta, release = [RunCount(6.0, 0.0), RunCount(6.0, 1.0)], 0.05, 40, 1e-5, TuningRelease(0.1)
    noise = calibrate_search(counts, rate, steps, target, delta, release)
    assert 0.995 * target < noise.epsilon <= target
    assert noise.noise_multiplier == find_noise_multiplier(rate, steps, noise.run_epsilon, delta)  # as a run will
    assert noise.noise_multiplier > 1.1 * find_noise_multiplier(rate, steps, target, delta)
    used = run_rdp([MechanismEvent(noise.noise_multiplier, rate, steps)], release)
    assert np.all(used <= noise.rdp) and search_epsilon(used, noise.run_count, delta) <= target
    other = next(count for count in counts if count != noise.run_count)
    assert search_epsilon(used, other, delta) > search_epsilon(used, noise.run_count, delta)


def test_calibrate_search_refuses_what_no_noise_reaches():
    with pytest.raises(UserError, match="no noise reaches it"):
        calibrate_search([RunCount(6.0, 0.0)], 0.05, 40, 1.0, 1e-5, TuningRelease(2.0))
    with pytest.raises(UserError, match=r"--expected_runs 0\.5"):
        RunCount(0.5, 1.0)
