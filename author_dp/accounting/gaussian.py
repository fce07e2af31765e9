"""Epsilon and delta of the Gaussian mechanism: steps with every author in each (q = 1) are one such mechanism together.

Reference: Balle and Wang 2018, Improving the Gaussian Mechanism for Differential Privacy, arXiv 1805.06530 (Theorem 8)
"""

import math
from collections.abc import Sequence

import numpy as np
from scipy.special import erfcx, log_ndtr

from author_dp.accounting.events import ULP, MechanismEvent


def gaussian_mu(events: Sequence[MechanismEvent]) -> float:
    """Return mu of steps at q = 1, rounded up: together they are one Gaussian mechanism of sensitivity mu and noise 1."""
    return math.sqrt(math.fsum(steps / sigma**2 for sigma, _, steps in events)) * (1 + 8 * ULP)


def gaussian_delta(mu: float | np.ndarray, epsilon: float | np.ndarray, upper: bool = True) -> np.ndarray:
    """Return delta of Gaussian mechanisms at each epsilon (Theorem 8), rounded up, or down if not `upper`.

    Phi(-x) - e^epsilon Phi(-x - mu) for x = epsilon / mu - mu / 2. The density at x is e^epsilon times that at x + mu, so with
    Mills' ratio R(x) = Phi(-x) / density(x) this is density(x) (R(x) - R(x + mu)): no tiny difference of large numbers.
    """
    x = epsilon / mu - mu / 2
    with np.errstate(all="ignore"):
        ratio, ratio_further = (math.sqrt(math.pi / 2) * erfcx(z / math.sqrt(2)) for z in (x, x + mu))
        error = 32 * ULP * ratio * (1 + x * x + epsilon)  # of both ratios, of x and of the density
        delta = (ratio - ratio_further + (error if upper else -error)) * np.exp(-x * x / 2) / math.sqrt(2 * math.pi)
    return np.where(x < -8, 1.0, np.minimum(1.0, delta))  # there it is 1, but for 1e-14


def gaussian_epsilon(mu: float, delta: float) -> float:
    """Return the smallest epsilon of a Gaussian mechanism at `delta`, rounded up."""
    low, high = 0.0, mu * mu / 2 + mu * math.sqrt(2 * math.log(1 / delta))
    if gaussian_delta(mu, low) <= delta:
        return 0.0
    while high - low > 1e-12 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if gaussian_delta(mu, middle) <= delta else (middle, high)
    return high


def normal_mass(low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the log of the standard normal's mass between `low` and `high`, and a bound on its relative error."""
    mirrored = low + high > 0  # the smaller tail: no cancellation against 1
    low, high = np.where(mirrored, -high, low), np.where(mirrored, -low, high)
    log_high = log_ndtr(high)
    share = -np.expm1(log_ndtr(low) - log_high)
    return log_high + np.log(share), 16 * ULP * (1 + np.abs(log_high)) / share


def gaussian_loss(loss: np.ndarray, rate: float) -> np.ndarray:
    """Return the loss g without sampling that gives `loss` = log(1 - q + q exp(g)) with it; -inf below its range."""
    if rate == 1:
        return loss
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        far = loss - math.log(rate) + np.log1p(-(1 - rate) * np.exp(-loss))
        near = np.log1p(np.maximum(np.expm1(loss) / rate, -1.0))
    return np.where(loss > 1, far, near)
