"""Account for a random number of runs of which only the best is released, and find the noise of such a search.

Guarantees: `search_epsilon` is an upper bound for the best of K runs, with its settings and its score. K is drawn from a
`RunCount`. It and the settings of each run, uniform on a fixed set, are independent of the data, and the runs are independent
given the data. A run's Renyi divergences are at most `rdp`, whatever its settings. A failed run is the worst of all. Nothing else
is released: K, the other runs and their scores stay secret.

The theorems hold for these laws of K ([1], Definition 1): the truncated negative binomial with eta 0, the logarithmic, and eta 1,
the geometric, with at least one run (Theorem 2); and Poisson, with which no run at all is possible (Theorem 6).

Example:

    >>> count = RunCount(expected=6.0, eta=0.0)
    >>> noise = calibrate_search([count], 0.02, steps=154, target_epsilon=8.0, delta=1e-5, release=TuningRelease(0.5))
    >>> noise.epsilon <= 8.0
    True

References:
    [1] Papernot and Steinke 2022, Hyperparameter Tuning with Renyi Differential Privacy, arXiv 2110.03620
    [2] Canonne, Kamath and Steinke 2020, The Discrete Gaussian for Differential Privacy, arXiv 2004.00010, Proposition 12
    [3] Bun and Steinke 2016, Concentrated Differential Privacy, arXiv 1605.02065, Proposition 3.3 and its proof
"""

import functools
import math
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal, localcontext
from typing import NamedTuple

import numpy as np
from scipy.special import logsumexp

from author_dp.accounting.accountant import compute_epsilon, find_noise_multiplier, round_up
from author_dp.accounting.events import ULP, MechanismEvent
from author_dp.accounting.rdp import ORDERS, epsilon_of_rdp, rdp_of_step
from author_dp.errors import UserError
from author_dp.validation import check_range

MARGIN = 1e-5  # of the noise: the same calibration on another machine may round otherwise
# Of Renyi divergences. The best ones of a search are small, where steps of 1 are coarse: they cost up to 8 % of epsilon.
SEARCH_ORDERS = np.union1d(ORDERS, np.arange(1.25, 10, 0.25))
MOST_RUNS = 10_000_000  # beyond it, every law here has a probability below 1e-400


# --- the number of runs ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RunCount:
    """The law of K, the number of runs.

    Attributes:
        expected: the mean of K.
        eta: 0 for the logarithmic law, 1 for the geometric, inf for Poisson.
    """

    expected: float
    eta: float

    def __post_init__(self):
        check_range("--expected_runs", self.expected, "[1.01, 1000]", "Often it is 2 to 20")

    @property
    def name(self) -> str:
        return {0.0: "logarithmic", 1.0: "geometric", math.inf: "poisson"}[self.eta]

    @functools.cached_property
    def gamma(self) -> float:
        """The parameter of the truncated negative binomial, with mean `expected`."""
        if self.eta == 1:
            return 1 / self.expected
        low, high = 1e-9, 40.0  # of x = -log(gamma), by which the mean of the logarithmic law is (e^x - 1) / x
        for _ in range(100):
            middle = (low + high) / 2
            low, high = (low, middle) if math.expm1(middle) / middle > self.expected else (middle, high)
        return math.exp(-high)

    def probabilities(self) -> Iterator[Decimal]:
        """Yield P(K = 0), P(K = 1), ... in the decimal context of the caller."""
        gamma, rate = Decimal(self.gamma) if self.eta != math.inf else Decimal(0), Decimal(self.expected)
        if self.eta == math.inf:
            yield (probability := (-rate).exp())
        else:
            yield Decimal(0)
            yield (probability := gamma if self.eta == 1 else -(1 - gamma) / gamma.ln())
        for k in range(1 if self.eta == math.inf else 2, MOST_RUNS):
            if self.eta == math.inf:
                probability *= rate / k
            else:
                probability *= (1 - gamma) if self.eta == 1 else (1 - gamma) * (k - 1) / k
            yield probability

    def quantile(self, share: Decimal) -> int:
        """Return the smallest k with P(K <= k) above `share`."""
        with localcontext(prec=80):
            total = Decimal(0)
            for k, probability in enumerate(self.probabilities()):
                total += probability
                if total > share:
                    return k
        return MOST_RUNS

    def draw(self) -> int:
        """Draw K with bits from the operating system; its law is exact to 1e-55."""
        with localcontext(prec=80):
            return self.quantile(Decimal(secrets.randbits(192)) / 2**192)


# --- Renyi divergences ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TuningRelease:
    """The evaluation loss that each run releases, its score.

    Attributes:
        epsilon: of a release, with delta 0.
        both: whether an author may be trained on and held out in one run, as with a validation file. Then the two costs add up.
            Otherwise the larger one counts.
        times: how often a run released it.
    """

    epsilon: float
    both: bool = False
    times: int = 1

    def rdp(self) -> np.ndarray:
        """Return the Renyi divergences at SEARCH_ORDERS; randomized response is the worst case of pure DP [3]."""
        moments = np.logaddexp(SEARCH_ORDERS * self.epsilon, (1 - SEARCH_ORDERS) * self.epsilon) - np.logaddexp(0, self.epsilon)
        return self.times * np.minimum(self.epsilon, moments / (SEARCH_ORDERS - 1)) * (1 + 64 * ULP * SEARCH_ORDERS)


@functools.lru_cache(maxsize=256)
def rdp_of_run_step(noise_multiplier: float, sample_rate: float) -> np.ndarray:
    """Return the Renyi divergences of one step at SEARCH_ORDERS, rounded up, (orders,).

    At orders that are no integers there is no closed form: the mean of the power of the likelihood ratio is an integral. Its
    integrand is positive and analytic, so that the trapezoid rule is exact to the rounding of floats.
    """
    if sample_rate == 1:
        return SEARCH_ORDERS / (2 * noise_multiplier**2) * (1 + 4 * ULP)
    result, is_integer = np.empty(len(SEARCH_ORDERS)), SEARCH_ORDERS % 1 == 0
    result[is_integer] = rdp_of_step(noise_multiplier, sample_rate)
    orders, sigma = SEARCH_ORDERS[~is_integer], noise_multiplier
    step = min(sigma, sigma**2) / 16
    x = np.arange(-12 * sigma, orders.max() + 12 * sigma + step, step)
    log_density = -x * x / (2 * sigma**2) - math.log(sigma * math.sqrt(2 * math.pi)) + math.log(step)
    log_ratio = np.logaddexp(math.log1p(-sample_rate), math.log(sample_rate) + (2 * x - 1) / (2 * sigma**2))
    log_mean = logsumexp(log_density + orders[:, None] * log_ratio, axis=1)
    result[~is_integer] = np.maximum(0, log_mean + 1e-9 * np.abs(log_mean) + 1e-12) / (orders - 1)
    return result


def run_rdp(events: Sequence[MechanismEvent], release: TuningRelease) -> np.ndarray:
    """Return the Renyi divergences of one run and its score, (orders,): a bound for every author."""
    with np.errstate(over="ignore"):
        training = np.sum([event.steps * rdp_of_run_step(*event[:2]) for event in events if event.steps], axis=0)
    return training + release.rdp() if release.both else np.maximum(training, release.rdp())


def search_rdp(rdp: np.ndarray, count: RunCount) -> np.ndarray:
    """Return the Renyi divergences of the best of K runs, (orders,): [1], Theorems 2 and 6.

    Args:
        rdp: of one run, with its score and settings, (orders,).
    """
    mean = count.expected * (1 + 1e-12)  # gamma is exact to less
    if count.eta == math.inf:
        hockey_stick = np.array([tuning_delta_of_rdp(rdp, math.log1p(1 / (order - 1))) for order in SEARCH_ORDERS])
        result = rdp + mean * hockey_stick + np.maximum(0, math.log(mean)) / (SEARCH_ORDERS - 1)
    else:
        times = (1 + count.eta) * np.min((1 - 1 / SEARCH_ORDERS) * rdp - math.log(count.gamma) / SEARCH_ORDERS)
        result = rdp + times + math.log(mean) / (SEARCH_ORDERS - 1)
    return result * (1 + 64 * ULP)


def tuning_delta_of_rdp(rdp: np.ndarray, epsilon: float) -> float:
    """Return delta at an epsilon from Renyi divergences at SEARCH_ORDERS ([2], Proposition 12)."""
    log_deltas = (SEARCH_ORDERS - 1) * (rdp - epsilon + np.log1p(-1 / SEARCH_ORDERS)) - np.log(SEARCH_ORDERS)
    return float(np.exp(np.minimum(0, np.min(log_deltas))) * (1 + 1e-12))


def search_epsilon(rdp: np.ndarray, count: RunCount, delta: float) -> float:
    """Return the epsilon of a search, rounded up.

    Args:
        rdp: of one run, from `run_rdp`.
        count: of the number of runs.
    """
    return round_up(epsilon_of_rdp(search_rdp(rdp, count), delta, SEARCH_ORDERS))


# --- calibration ---------------------------------------------------------------------------------------------


class SearchNoise(NamedTuple):
    """The noise of every run of a search.

    Attributes:
        run_count: the law of the number of runs that needs the least noise.
        run_epsilon: the --target_epsilon of each run, which stops it at its share.
        noise_multiplier: what a run makes of `run_epsilon`.
        rdp: a bound on the Renyi divergences of a run, (orders,).
        epsilon: of the search.
    """

    run_count: RunCount
    run_epsilon: float
    noise_multiplier: float
    rdp: np.ndarray
    epsilon: float


def calibrate_search(
    counts: Sequence[RunCount], sample_rate: float, steps: int, target_epsilon: float, delta: float, release: TuningRelease
) -> SearchNoise:
    """Return the least noise with which a search ends at `target_epsilon`, and the best of `counts` for it.

    Args:
        sample_rate, steps: of a run as they are accounted.
        release: of each run's score.
    Raises:
        UserError: if no noise reaches the target.
    """
    count, sigma = min(
        ((count, least_tuning_noise(count, sample_rate, steps, target_epsilon, delta, release)) for count in counts),
        key=lambda found: found[1],
    )
    if sigma == math.inf:
        raise UserError(
            f"--target_epsilon {target_epsilon:g}: no noise reaches it with --expected_runs {counts[0].expected:g} and "
            f"--release_eval_epsilon {release.epsilon:g}. Raise it, or lower one of these"
        )
    # A run finds its noise from its own target, to 0.01 %: lower the target until that noise is enough.
    run_epsilon = compute_epsilon(sigma, sample_rate, steps, delta)
    while True:
        noise_multiplier = find_noise_multiplier(sample_rate, steps, run_epsilon, delta)
        rdp = run_rdp([MechanismEvent(noise_multiplier * (1 - MARGIN), sample_rate, steps)], release)
        epsilon = search_epsilon(rdp, count, delta)
        if epsilon <= target_epsilon:
            return SearchNoise(count, run_epsilon, noise_multiplier, rdp, epsilon)
        run_epsilon = float(f"{run_epsilon * (1 - 2e-4):.6g}")


def least_tuning_noise(
    count: RunCount, sample_rate: float, steps: int, epsilon: float, delta: float, release: TuningRelease
) -> float:
    """Return the smallest noise multiplier of a search, to 0.01 %; inf if there is none."""

    def is_enough(sigma: float) -> bool:
        return search_epsilon(run_rdp([MechanismEvent(sigma, sample_rate, steps)], release), count, delta) <= epsilon

    low, high = 0.05, 1e4
    if not is_enough(high):
        return math.inf
    while high / low > 1 + 1e-4:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if is_enough(middle) else (middle, high)
    return high
