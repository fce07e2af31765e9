"""What an attacker can do at best: the guarantee in words that do not need an epsilon.

Promise: `true_positive_rate` bounds, for every attacker who is to tell whether an author was in the data, how often an author who
was in is found, where one who was not is accused as often as the false-positive rate says. It comes from the whole distribution
of the privacy loss, which says more than epsilon at one delta. `mu` says the same as one number, where one number will do.

Example:

    >>> attack([Spending(0.9, 0.013, 154)], delta=5e-5)
    {'mu_gdp': None, 'tpr_at_fpr': {'0.01': 0.021..., '0.001': 0.0029...}}

References:
    [1] Dong, Roth and Su 2022, Gaussian Differential Privacy, arXiv 1905.02383 (trade-off functions; Propositions 2.5 and 2.13)
    [2] Gomez et al. 2025, Gaussian DP for Reporting Differential Privacy Guarantees in Machine Learning, arXiv 2503.10945 (where
        one mu tells all; we ask that it is nowhere more than 0.01 from what is known)
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.special import erfcx, ndtr, ndtri

from author_dp.accounting.accountant import MechanismEvent, gaussian_mu, merge_events
from author_dp.accounting.pld import LossDistribution

FALSE_POSITIVE_RATES = (0.01, 0.001)  # false-positive rates that are reported
TIGHT_AT = 0.01  # of the true-positive rate: mu is not told where it would promise that much less than is known
POINTS = 10_000  # of each view of a curve


class PrivacyProfile:
    """delta as a function of epsilon, for each direction of add-or-remove-one.

    Args:
        spendings: steps with noise, at least one.
        delta: down to which the curve is to be exact.
    Attributes:
        curves: for an author who is removed and one who is added: epsilons, ascending, and deltas, (points,).
    """

    def __init__(self, spendings: Sequence[MechanismEvent], delta: float):
        self.spendings, self.delta = merge_events(spendings), delta
        grids = LossDistribution(self.spendings, delta)
        self.curves: list[tuple[np.ndarray, np.ndarray]] = []
        for added in (False, True):
            views = [grids.compose(exact_at, added) for exact_at in (0.5, 0.1, 1e-2, 1e-4, delta)]
            epsilons = np.unique(np.concatenate([np.linspace(view.losses[0], view.losses[-1], POINTS) for view in views]))
            deltas = np.min([view.deltas(epsilons) for view in views], axis=0)
            self.curves.append((epsilons, deltas))

    def true_positive_rate(self, false_positive_rate: float) -> float:
        """Return the largest one of any attacker: P(S) <= e^epsilon Q(S) + delta(epsilon) for every epsilon ([1], Prop. 2.5)."""
        with np.errstate(over="ignore"):
            bounds = [np.min(np.exp(e) * false_positive_rate + d) for e, d in self.curves]
        return float(min(1.0, max(bounds)))

    def mu(self) -> float:
        """Return the smallest mu whose Gaussian mechanism has at least this delta, wherever delta is above the one given."""
        largest = 0.0
        for epsilons, deltas in self.curves:
            # Between two points delta is at most that of the first one, and a Gaussian's at least that of the second.
            within = (deltas[:-1] >= self.delta) & (epsilons[1:] >= 0)
            if within.any():
                largest = max(largest, float(gdp_mu_at(np.maximum(epsilons[1:][within], 0), deltas[:-1][within]).max()))
        return largest


def gdp_mu_at(epsilons: np.ndarray, deltas: np.ndarray) -> np.ndarray:
    """Return for each epsilon the mu of the Gaussian mechanism with that delta, by bisection, rounded up; inf beyond 100."""
    low, high = np.zeros_like(deltas), np.full_like(deltas, 100.0)
    for _ in range(60):
        middle = (low + high) / 2
        x = epsilons / middle - middle / 2  # as in accounting.gaussian_delta
        with np.errstate(over="ignore", invalid="ignore"):
            ratio = erfcx(x / math.sqrt(2)) - erfcx((x + middle) / math.sqrt(2))
            delta = np.where(x < -8, 1.0, ratio * np.exp(-x * x / 2) / 2)
        enough = delta >= deltas
        low, high = np.where(enough, low, middle), np.where(enough, middle, high)
    return np.where(high >= 100, np.inf, high)


def attack_bounds(spendings: Sequence[MechanismEvent], delta: float) -> dict[str, Any]:
    """Return what privacy.json holds about attackers.

    Args:
        spendings: all steps; what is told is null where there is none, or one of them had no noise.
        delta: of the guarantee; mu is told for epsilons whose delta is at least that.
    """
    return dict(_attack_bounds(tuple(merge_events(spendings)), delta))


@functools.lru_cache(maxsize=256)
def _attack_bounds(spendings: tuple[MechanismEvent, ...], delta: float) -> dict[str, Any]:
    if not spendings or any(spending.noise_multiplier == 0 for spending in spendings):
        return {"mu_gdp": None, "tpr_at_fpr": None}
    if all(spending.sample_rate == 1 for spending in spendings):
        mu = gaussian_mu(spendings)
        return {"mu_gdp": mu, "tpr_at_fpr": {f"{rate:g}": float(ndtr(mu + ndtri(rate))) for rate in FALSE_POSITIVE_RATES}}
    curve = PrivacyProfile(spendings, delta)
    mu = curve.mu()
    rates = np.geomspace(max(delta, 1e-6), 0.5, 100)
    loss = max(float(ndtr(mu + ndtri(rate))) - curve.true_positive_rate(rate) for rate in rates)
    return {
        "mu_gdp": mu if math.isfinite(mu) and loss <= TIGHT_AT else None,
        "tpr_at_fpr": {f"{rate:g}": curve.true_positive_rate(rate) for rate in FALSE_POSITIVE_RATES},
    }
