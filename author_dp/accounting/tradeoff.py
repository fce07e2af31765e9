"""Bound what any attacker can achieve: true-positive rates at low false-positive rates, and mu of Gaussian DP.

Guarantees: `PrivacyProfile.true_positive_rate` bounds every attacker who decides whether an author was in the data. At a
false-positive rate (authors wrongly said to be in) no attacker has a larger true-positive rate (authors in the data who are
found). The bound follows from delta at every epsilon, which says more than epsilon at one delta. `mu` summarizes it in one number
where that is tight.

Example:

    >>> attack_bounds([MechanismEvent(0.9, 0.013, 154)], delta=5e-5)
    {'mu_gdp': None, 'tpr_at_fpr': {'0.01': 0.021..., '0.001': 0.0029...}}

References:
    [1] Dong, Roth and Su 2022, Gaussian Differential Privacy, arXiv 1905.02383 (trade-off functions; Propositions 2.5 and 2.13)
    [2] Gomez et al. 2025, Gaussian DP for Reporting Differential Privacy Guarantees in Machine Learning, arXiv 2503.10945 (where
        one mu says it all; here its true-positive rate must be within 0.01 of the known bound)
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.special import ndtr, ndtri

from author_dp.accounting.accountant import MAX_PRV_EPSILON, epsilon_of
from author_dp.accounting.events import MechanismEvent, merge_events
from author_dp.accounting.gaussian import gaussian_delta, gaussian_mu
from author_dp.accounting.pld import LossDistribution

FALSE_POSITIVE_RATES = (0.01, 0.001)  # at which true-positive rates are reported
TIGHT_WITHIN = 0.01  # of the true-positive rate: mu is not reported where its bound is looser
POINTS = 10_000  # epsilons at which each composed distribution is evaluated


class PrivacyProfile:
    """delta as a function of epsilon, for each direction of add-or-remove-one.

    Args:
        events: mechanisms with noise, at least one.
        delta: smallest delta at which the curve is exact.
    Attributes:
        curves: for an author removed and one added: epsilons, ascending, and deltas, both (points,).
    """

    def __init__(self, events: Sequence[MechanismEvent], delta: float):
        self.delta = delta
        distribution = LossDistribution(merge_events(events), delta)
        self.curves: list[tuple[np.ndarray, np.ndarray]] = []
        for added in (False, True):
            # Each is a bound everywhere, and exact near its own delta.
            composed = [distribution.compose(exact_at, added) for exact_at in (0.5, 0.1, 1e-2, 1e-4, delta)]
            epsilons = np.unique(np.concatenate([np.linspace(pld.losses[0], pld.losses[-1], POINTS) for pld in composed]))
            self.curves.append((epsilons, np.min([pld.deltas(epsilons) for pld in composed], axis=0)))

    def true_positive_rate(self, false_positive_rate: float) -> float:
        """Return the largest one of any attacker: P(S) <= e^epsilon Q(S) + delta(epsilon) for every epsilon ([1], Prop. 2.5)."""
        with np.errstate(over="ignore"):
            bounds = [np.min(np.exp(epsilons) * false_positive_rate + deltas) for epsilons, deltas in self.curves]
        return float(min(1.0, max(bounds)))

    def mu(self) -> float:
        """Return the smallest mu whose Gaussian mechanism has at least these deltas, wherever they are above `delta`."""
        largest = 0.0
        for epsilons, deltas in self.curves:
            # Between two points delta is at most that of the first, and a Gaussian's at least that of the second.
            relevant = (deltas[:-1] >= self.delta) & (epsilons[1:] >= 0)
            if relevant.any():
                largest = max(largest, float(gdp_mu_at(epsilons[1:][relevant], deltas[:-1][relevant]).max()))
        return largest


def gdp_mu_at(epsilons: np.ndarray, deltas: np.ndarray) -> np.ndarray:
    """Return the mu of the Gaussian mechanism with that delta at each epsilon, rounded up; inf above 100."""
    low, high = np.zeros_like(deltas), np.full_like(deltas, 100.0)
    for _ in range(60):
        middle = (low + high) / 2
        is_enough = gaussian_delta(middle, epsilons, upper=False) >= deltas
        low, high = np.where(is_enough, low, middle), np.where(is_enough, middle, high)
    return np.where(high >= 100, np.inf, high)


def attack_bounds(events: Sequence[MechanismEvent], delta: float) -> dict[str, Any]:
    """Return the entries of privacy.json about attackers: mu_gdp and tpr_at_fpr.

    Args:
        events: all steps; both entries are None without steps, or where a step had no noise.
        delta: of the guarantee; mu holds for epsilons whose delta is at least that.
    """
    return dict(_attack_bounds(tuple(merge_events(events)), delta))


@functools.lru_cache(maxsize=256)
def _attack_bounds(events: tuple[MechanismEvent, ...], delta: float) -> dict[str, Any]:
    if not events or any(event.noise_multiplier == 0 for event in events):
        return {"mu_gdp": None, "tpr_at_fpr": None}
    if all(event.sample_rate == 1 for event in events):
        mu = gaussian_mu(events)
        return {"mu_gdp": mu, "tpr_at_fpr": {f"{rate:g}": gdp_true_positive_rate(mu, rate) for rate in FALSE_POSITIVE_RATES}}
    if (epsilon := epsilon_of(events, delta)) > MAX_PRV_EPSILON:  # it excludes no attack, and its profile would take minutes
        return bounds_of_guarantee(epsilon, delta)
    try:
        profile = PrivacyProfile(events, delta)
        mu = profile.mu()
    except (ArithmeticError, ValueError, MemoryError):  # of grids for extreme noise: then the guarantee alone is a bound
        return bounds_of_guarantee(epsilon, delta)
    rates = np.geomspace(max(delta, 1e-6), 0.5, 100)
    looseness = max(gdp_true_positive_rate(mu, rate) - profile.true_positive_rate(rate) for rate in rates)
    return {
        "mu_gdp": mu if math.isfinite(mu) and looseness <= TIGHT_WITHIN else None,
        "tpr_at_fpr": {f"{rate:g}": profile.true_positive_rate(rate) for rate in FALSE_POSITIVE_RATES},
    }


def bounds_of_guarantee(epsilon: float, delta: float) -> dict[str, Any]:
    """Return the entries of `attack_bounds` where only (epsilon, delta) is known, no mechanism."""
    rates = {
        rate: min(math.exp(min(epsilon, 700)) * rate + delta, 1 - math.exp(-epsilon) * (1 - rate - delta), 1.0)
        for rate in FALSE_POSITIVE_RATES
    }
    return {"mu_gdp": None, "tpr_at_fpr": {f"{rate:g}": bound for rate, bound in rates.items()}}


def certified_attack_bounds(epsilon: float, delta: float, events: Sequence[MechanismEvent]) -> dict[str, Any]:
    """Return the entries of `attack_bounds` where (epsilon, delta) is certified, and `events` cost at least as much."""
    known = [bounds_of_guarantee(epsilon, delta), attack_bounds(events, delta)]
    rates = [bounds["tpr_at_fpr"] for bounds in known if bounds["tpr_at_fpr"]]
    return {"mu_gdp": None, "tpr_at_fpr": {name: min(bound[name] for bound in rates) for name in rates[0]}}


def gdp_true_positive_rate(mu: float, false_positive_rate: float) -> float:
    """Return the largest true-positive rate against a Gaussian mechanism: Phi(mu + Phi^-1(rate))."""
    return float(ndtr(mu + ndtri(false_positive_rate)))
