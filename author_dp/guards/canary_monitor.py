"""Check while a run trains that what it releases for gradient canaries has the distribution of the mechanism.

Guarantees: a correct mechanism releases C [sampled] / B + N(0, (sigma C / B)^2) for each included canary in each step, exactly,
and the noise alone for the others. A run with another distribution is stopped with `MechanismError`; a correct run with
probability below `FAMILY_WISE_ERROR / NUM_MONITORS`.

How: each value, divided by C / B, goes through its distribution function and becomes a standard normal, which is tested like the
noise (noise_monitor.py). In addition the scores of sampling rate and clip norm are tested over all values, and that of the rate
for each canary, by Chernoff's bound [1].

References:
    [1] Boucheron, Lugosi and Massart 2013, Concentration Inequalities, section 2.2
"""

from typing import Optional

import numpy as np
import torch
from scipy.special import expit, ndtr, ndtri

from author_dp.guards.noise_inversion import MatchedFilter
from author_dp.guards.noise_monitor import NoiseMonitor
from author_dp.guards.noise_statistics import NoiseDuplicates

MAX_SCORE = 8.0  # at which scores are clipped, so that all their moments exist
TILTS = np.geomspace(1e-3, 4.0, 40)  # at which Chernoff's bound is evaluated; the best one counts


class CanaryMonitor(NoiseMonitor):
    """Test x = [sampled] + sigma z for included canaries, and sigma z for the others, over all steps.

    Args:
        sigma: noise multiplier.
        sample_rate: q.
        included: bool (canaries,).
        scale: C / B, by which releases are divided.
    """

    def __init__(self, sigma: float, sample_rate: float, included: np.ndarray, scale: float = 1.0):
        super().__init__(std=scale)
        self.sigma, self.sample_rate, self.included = sigma, sample_rate, included
        # Of very many float32 numbers near 0 or 1 some are equal.
        self.statistics = [statistic for statistic in self.statistics if not isinstance(statistic, NoiseDuplicates)]
        self.scores = CanaryScores(sigma, sample_rate, int(included.sum()))
        self._log_likelihood_ratio = np.zeros(len(included))  # of included over excluded, for each canary
        self._filter: Optional[MatchedFilter] = None

    def set_groups(self, coefficients: np.ndarray, groups: np.ndarray) -> None:
        """Match the noise bands: each time that a canary's group is sampled gives one value.

        Args:
            coefficients: (bands,), of the noise.
            groups: (authors,), of all authors; the included canaries are the last ones.
        """
        of_canaries = np.zeros(len(self.included), np.int64)  # an excluded canary has the same noise in every group
        of_canaries[self.included] = groups[len(groups) - int(self.included.sum()) :]
        self._filter = MatchedFilter(coefficients, of_canaries)

    def add(self, probe: torch.Tensor) -> None:
        """Add a row of C x + z (noise_inversion.py) in the canaries' coordinates, (canaries,)."""
        values = probe if self._filter is None else self._filter(probe)
        if values is not None:
            super().add(values)

    def add_step(self, values: np.ndarray) -> None:
        """Add one step's x, (canaries,)."""
        log_ratio = (values - 0.5) / self.sigma**2  # of the densities, sampled over not sampled
        if self.sample_rate < 1:
            log_ratio = np.logaddexp(np.log1p(-self.sample_rate), np.log(self.sample_rate) + log_ratio)
        self._log_likelihood_ratio += log_ratio
        self.scores.add(values[self.included])
        normal = values / self.sigma
        normal[self.included] = canary_score_to_normal(values[self.included], self.sigma, self.sample_rate)
        super().add_step(normal)

    def log_likelihood_ratios(self) -> np.ndarray:
        """Return for each canary how much more likely its values are if it is included, (canaries,)."""
        self.flush()
        return self._log_likelihood_ratio

    def p_values(self) -> dict[str, float]:
        return super().p_values() | self.scores.p_values()

    def failure_message(self, failed: str) -> str:
        return f"gradient canaries fail a test: {failed} (after {self.steps} steps)"


def canary_score_to_normal(x: np.ndarray, sigma: float, rate: float) -> np.ndarray:
    """Map (1 - rate) N(0, sigma^2) + rate N(1, sigma^2) to N(0, 1), through the distribution function."""
    below = (1 - rate) * ndtr(x / sigma) + rate * ndtr((x - 1) / sigma)
    above = (1 - rate) * ndtr(-x / sigma) + rate * ndtr((1 - x) / sigma)
    return np.where(below < above, ndtri(below), -ndtri(above))


class CanaryScores:
    """Sums of the scores of sampling rate and clip norm.

    Args:
        sigma, sample_rate: as for `CanaryMonitor`.
        canaries: number of included canaries.
    """

    def __init__(self, sigma: float, sample_rate: float, canaries: int):
        self.sigma, self.sample_rate, self.steps = sigma, sample_rate, 0
        self.null = CanaryScoreDistribution(sigma, sample_rate)
        self._sums = np.zeros((2, canaries))  # of centered scores of rate and clip norm, for each included canary

    def add(self, x: np.ndarray) -> None:
        """Add one step's values of the included canaries, (canaries,)."""
        self.steps += 1
        self._sums += score_canaries(x, self.sigma, self.sample_rate) - self.null.mean[:, None]

    def p_values(self) -> dict[str, float]:
        of_rate, canaries = self._sums[0], self._sums.shape[1]
        extremes = (of_rate.max(initial=0.0), of_rate.min(initial=0.0))
        least = min(self.null.p_value(0, extreme, self.steps) for extreme in extremes)
        return {
            "sampling rate": self.null.p_value(0, of_rate.sum(), canaries * self.steps),
            "clip norm": self.null.p_value(1, self._sums[1].sum(), canaries * self.steps),
            "sampling rate of one canary": min(1.0, max(1, canaries) * least),  # without any canary, 1
        }


def score_canaries(x: np.ndarray, sigma: float, rate: float) -> np.ndarray:
    """Return the scores of rate and clip norm at their true values, (2, ...), clipped at `MAX_SCORE`.

    With L the ratio of the densities of sampled and not sampled, and w = q L / (1 - q + q L) the probability of having been
    sampled, they are derivatives of log(1 - q + q L). By q: w / q - (1 - w) / (1 - q), here times q. By the norm:
    w (x - 1) / sigma^2, here times sigma.
    """
    log_odds = (x - 0.5) / sigma**2 + (np.log(rate) - np.log1p(-rate) if rate < 1 else np.inf)
    sampled = expit(log_odds)
    of_rate = sampled - (expit(-log_odds) * rate / (1 - rate) if rate < 1 else 1.0)
    return np.clip(np.stack([of_rate, sampled * (x - 1) / sigma]), -MAX_SCORE, MAX_SCORE)


class CanaryScoreDistribution:
    """Distribution of both scores if the mechanism is correct, by quadrature.

    Attributes:
        mean, variance: (2,).
    """

    def __init__(self, sigma: float, rate: float):
        x = np.linspace(-12 * sigma, 1 + 12 * sigma, 40_001)
        normal = np.exp(-(np.stack([x, x - 1]) ** 2) / (2 * sigma**2)) / (sigma * np.sqrt(2 * np.pi))
        weights = (1 - rate) * normal[0] + rate * normal[1]
        weights /= weights.sum()
        scores = score_canaries(x, sigma, rate)
        self.mean = scores @ weights
        centered = scores - self.mean[:, None]
        self.variance = centered**2 @ weights
        # log E exp(t s) for positive and negative t, (2 scores, 2 signs, values of t)
        signs = np.array([1.0, -1.0])[:, None, None]
        self._cumulants = np.log(np.exp(signs * TILTS[:, None] * centered[:, None, None, :]) @ weights)

    def p_value(self, which: int, total: float, terms: int) -> float:
        """Bound the probability that a sum of independent centered scores is as far from 0 as `total`, by Chernoff [1].

        Args:
            which: 0 for the rate's scores, 1 for the clip norm's.
            terms: number of summands.
        """
        if self.variance[which] < 1e-12:  # the rate's, at rate 1
            return 1.0
        exponents = terms * self._cumulants[which, 0 if total > 0 else 1] - TILTS * abs(total)
        return min(1.0, 2 * float(np.exp(min(0.0, exponents.min()))))
