"""Bound epsilon cheaply, by Renyi divergences.

Guarantees: every divergence and epsilon is an upper bound, rounding included.

Reference: Mironov, Talwar and Zhang 2019, Renyi DP of the Sampled Gaussian Mechanism, arXiv 1908.10530
"""

import functools
import math
import warnings
from collections.abc import Sequence

import numpy as np
from opacus.accountants.analysis.rdp import get_privacy_spent
from scipy.special import gammaln, logsumexp

from author_dp.accounting.events import ULP, MechanismEvent

ORDERS = np.array([*range(2, 64), 96, 128, 192, 256, 384, 512, 768, 1024])  # of Renyi divergences


def rdp_epsilon(events: Sequence[MechanismEvent], delta: float) -> float:
    """Return a cheap upper bound on epsilon, by Renyi divergences at integer orders, which have a closed form."""
    if any(event.noise_multiplier == 0 for event in events):
        return math.inf
    with np.errstate(all="ignore"):
        return epsilon_of_rdp(np.sum([steps * cached_rdp_of_step(sigma, rate) for sigma, rate, steps in events], axis=0), delta)


def epsilon_of_rdp(divergences: np.ndarray, delta: float, orders: np.ndarray = ORDERS) -> float:
    """Return an upper bound on epsilon from Renyi divergences at `orders`, both (orders,)."""
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")  # the best order is the smallest or largest one: still a bound
        epsilon, _ = get_privacy_spent(orders=orders, rdp=divergences, delta=delta)
    return math.inf if math.isnan(epsilon) else max(0.0, float(epsilon))


def rdp_of_step(noise_multiplier: float, sample_rate: float) -> np.ndarray:
    """Return the Renyi divergence of one step at each of ORDERS, rounded up, (orders,).

    At order a it is log(A) / (a - 1), A = sum_i binomial(a, i) (1 - q)^(a - i) q^i exp((i^2 - i) / (2 sigma^2)), the mean of a
    power of the likelihood ratio (section 3.3). All orders are computed at once: a search for sigma asks for hundreds.
    """
    if sample_rate == 1:
        return ORDERS / (2 * noise_multiplier**2) * (1 + 4 * ULP)
    order, i = ORDERS[:, None].astype(float), np.arange(ORDERS[-1] + 1.0)  # (orders, 1), (terms,)
    with np.errstate(all="ignore"):  # there are no terms i > order
        binomial = gammaln(order + 1) - gammaln(i + 1) - gammaln(order - i + 1)
        exponent = binomial + (order - i) * math.log1p(-sample_rate) + i * math.log(sample_rate)
        exponent += (i * i - i) / (2 * noise_multiplier**2)
        log_mean = logsumexp(np.where(i <= order, exponent, -math.inf), axis=1)
    largest = 3 * gammaln(ORDERS + 1) - ORDERS * math.log(sample_rate) + ORDERS**2 / (2 * noise_multiplier**2) + ORDERS
    return np.maximum(0, log_mean + 16 * ULP * largest) / (ORDERS - 1)  # each term of an exponent is rounded


cached_rdp_of_step = functools.lru_cache(maxsize=256)(rdp_of_step)
