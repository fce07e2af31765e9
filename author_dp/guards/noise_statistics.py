"""Statistics of values that are independent N(0, 1) if the mechanism is correct, with their p-values.

Each statistic takes one vector of values a step, and keeps sums only; `NoiseCorrelations` also keeps the last few vectors.

Example:

    >>> shape = NoiseShape()
    >>> shape.add(values)  # in each step
    >>> shape.p_values()
    {'shape': 0.42}
"""

from collections import defaultdict, deque
from typing import Optional, Protocol

import numpy as np
from scipy import stats
from scipy.special import ndtri

MAX_LAG = 8  # each step is compared with this many steps before it, and with the first step
BIN_EDGES = ndtri(np.arange(1, 32) / 32)  # of 32 bins with equal probability
MAX_DUPLICATES = 200  # repeated float32 values in one probe; about one occurs by chance


class ZStatistic:
    """Running sum of values that are N(0, 1) given the past if the mechanism is correct."""

    def __init__(self) -> None:
        self.count, self.total, self.largest = 0, 0.0, 0.0

    def add(self, value: float) -> None:
        self.count, self.total, self.largest = self.count + 1, self.total + value, max(self.largest, abs(value))

    def p_value(self) -> float:
        """Return a bound for the sum and the largest value together."""
        return 2 * min(normal_p_value(self.total / self.count**0.5), self.count * normal_p_value(self.largest))


def normal_p_value(z: float) -> float:
    """Return the two-sided p-value of a standard normal."""
    return 2 * float(stats.norm.sf(abs(z)))


class NoiseStatistic(Protocol):
    """Statistic of all values so far, and its p-values by name."""

    def add(self, values: np.ndarray) -> None: ...

    def p_values(self) -> dict[str, float]: ...


class NoiseMoments:
    """Sum, and sum of squares: normal, and chi-squared with `count` degrees of freedom."""

    def __init__(self) -> None:
        self.count, self.total, self.squares = 0, 0.0, 0.0

    def add(self, values: np.ndarray) -> None:
        self.count, self.total = self.count + len(values), self.total + float(values.sum())
        self.squares += float(values @ values)

    def p_values(self) -> dict[str, float]:
        tails = stats.chi2.sf(self.squares, self.count), stats.chi2.cdf(self.squares, self.count)
        return {"scale": 2 * float(min(tails)), "mean": normal_p_value(self.total / self.count**0.5)}


class NoiseShape:
    """Numbers of values in bins of equal probability: binomial, each."""

    def __init__(self) -> None:
        self._counts = np.zeros(len(BIN_EDGES) + 1, np.int64)

    def add(self, values: np.ndarray) -> None:
        self._counts += np.bincount(np.searchsorted(BIN_EDGES, values), minlength=len(self._counts))

    def p_values(self) -> dict[str, float]:
        bins = len(self._counts)
        null = stats.binom(int(self._counts.sum()), 1 / bins)
        tails = np.minimum(null.sf(self._counts - 1), null.cdf(self._counts))
        return {"shape": min(1.0, 2 * bins * float(tails.min()))}


class NoiseTails:
    """Largest absolute value."""

    def __init__(self) -> None:
        self.count, self.largest = 0, 0.0

    def add(self, values: np.ndarray) -> None:
        self.count, self.largest = self.count + len(values), max(self.largest, float(np.abs(values).max()))

    def p_values(self) -> dict[str, float]:
        return {"tails": self.count * normal_p_value(self.largest)}


class NoiseDuplicates:
    """Largest number of repeated values in one probe: many if the noise is on a coarse grid."""

    def __init__(self) -> None:
        self.largest = 0

    def add(self, values: np.ndarray) -> None:
        self.largest = max(self.largest, len(values) - len(np.unique(values)))

    def p_values(self) -> dict[str, float]:
        return {"repeated values": 0.0 if self.largest > MAX_DUPLICATES else 1.0}


class NoiseCorrelations:
    """Correlations within a step, between steps, and with earlier runs: a `ZStatistic` each.

    Args:
        earlier_runs: first probes of earlier runs.
    Attributes:
        first: values of the first step; None before it.
    """

    def __init__(self, earlier_runs: list[np.ndarray]):
        self.first: Optional[np.ndarray] = None
        self._earlier_runs = earlier_runs
        self._recent: deque[np.ndarray] = deque(maxlen=MAX_LAG)
        self._z: dict[str, ZStatistic] = defaultdict(ZStatistic)

    def add(self, values: np.ndarray) -> None:
        half = len(values) // 2
        self._correlate("coordinates", values[:half], values[half:])
        self._correlate("neighboring coordinates", values[::2], values[1::2])
        for lag, earlier in enumerate(reversed(self._recent), 1):
            self._correlate(f"steps, lag {lag}", earlier, values)
        for number, earlier in enumerate(self._earlier_runs, 1):
            self._correlate(f"this and earlier run {number}", earlier, values)
        if self.first is None:
            self.first = values
        elif self._recent[0] is not self.first:  # or a lag has it
            self._correlate("the first and later steps", self.first, values)
        self._recent.append(values)

    def _correlate(self, name: str, given: np.ndarray, values: np.ndarray) -> None:
        """Add the product of two vectors; with `given` fixed, it is N(0, |given|^2)."""
        norm = float(np.linalg.norm(given))
        if norm > 0 and len(given) == len(values):
            self._z[name].add(float(given @ values) / norm)

    def p_values(self) -> dict[str, float]:
        return {f"correlation between {name}": z.p_value() for name, z in self._z.items()}
