"""Epsilon from a privacy loss distribution of our own: a bound that holds at any delta, as small as it may be.

Promise: `LossDistribution.delta` and `.epsilon` are upper bounds, for both directions of add-or-remove-one (the smaller one of
the two is not assumed), with every error of discretization, truncation and floating point on the safe side.

How: the loss L = log P(o) / Q(o) of one step lies on a grid, each cell's P and Q masses split between its two ends so that both
are kept: that dominates the mechanism ("connect the dots" [1, Theorem 3.1]), and costs epsilon the square of a cell only. Steps
are composed by FFT. An FFT's rounding is the same everywhere, near 1e-16 of the largest value, and drowns a small delta; so the
masses are tilted before, times exp(lambda x), with lambda such that the composed distribution peaks where epsilon is (the
saddle point [2]): the rounding is then relative to delta itself.

Example:

    >>> LossDistribution([(10.0, 0.9, 100)], delta=1e-14).epsilon([(10.0, 0.9, 100)])

References:
    [1] Doroshenko et al. 2022, Connect the Dots: Tighter Discrete Approximations of Privacy Loss Distributions, arXiv 2207.04380
    [2] Alghamdi et al. 2023, The Saddle-Point Method in Differential Privacy, arXiv 2208.09595 (the tilt)
    [3] Zhu, Dong and Wang 2022, Optimal Accounting of DP via Characteristic Function, arXiv 2106.08567 (both directions)
    [4] Higham 2002, Accuracy and Stability of Numerical Algorithms, section 24.1 (rounding of an FFT)
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import fft
from scipy.special import log_ndtr, logsumexp, ndtri_exp

ULP = 2.0**-52
TOLERANCE = 3e-4  # of epsilon: what the grid may cost
NEGLIGIBLE = 1e-9  # of delta: the losses that are too large for the grid, which count as certain ruin
OUTSIDE = 1e-12  # of the tilted distribution: what may lie outside of the FFT's window; it is added to delta
MAX_CELLS = 2**22  # of a grid; beyond it is coarser, which is still a bound
TILTS = np.geomspace(1e-5, 1e9, 300)

Steps = tuple[float, float, int]  # noise multiplier, sample rate, steps: accounting.Spending


class DiscretePLD(NamedTuple):
    """A step's losses on a grid: `mass[i]` at (`first` + i) x cell, and `infinite` where there is no bound."""

    first: int
    mass: np.ndarray
    infinite: float

    def log_moment(self, cell: float, tilt: float) -> float:
        """log E exp(tilt x L), of the finite losses."""
        with np.errstate(divide="ignore"):
            return float(logsumexp(np.log(self.mass) + tilt * cell * (self.first + np.arange(len(self.mass)))))


def normal_mass(low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the log of the standard normal's mass between `low` and `high`, and a bound on its relative error."""
    mirrored = low + high > 0  # the tail that is the smaller one: no cancellation against 1
    low, high = np.where(mirrored, -high, low), np.where(mirrored, -low, high)
    log_high = log_ndtr(high)
    share = -np.expm1(log_ndtr(low) - log_high)
    return log_high + np.log(share), 16 * ULP * (1 + np.abs(log_high)) / share


def gaussian_loss(x: np.ndarray, rate: float) -> np.ndarray:
    """Return the loss g without sampling at which the loss with sampling, log(1 - q + q exp(g)), is x; -inf below its range."""
    if rate == 1:
        return x
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        far = x - math.log(rate) + np.log1p(-(1 - rate) * np.exp(-x))
        near = np.log1p(np.maximum(np.expm1(x) / rate, -1.0))
    return np.where(x > 1, far, near)


def discretize_loss(sigma: float, rate: float, cell: float, tail: float) -> tuple[DiscretePLD, DiscretePLD]:
    """Return the losses of one step when the author is removed, (P, Q) = ((1 - q) N0 + q N1, N0), and when one is added, (Q, P).

    Args:
        sigma, rate: noise multiplier and sample rate of the step.
        cell: width of a cell of the grid.
        tail: standard deviations of either normal that the grid reaches.
    """
    ends = tail * np.array([-1, 1]) / sigma + np.array([-0.5, 0.5]) / sigma**2  # of g
    with np.errstate(divide="ignore"):
        ends = np.logaddexp(np.log1p(-rate), math.log(rate) + ends)
    first, last = math.floor(ends[0] / cell) - 1, math.ceil(ends[1] / cell) + 1
    g = gaussian_loss(cell * np.arange(first, last + 1), rate)
    first += max(0, int(np.isneginf(g).sum()) - 1)  # one point below the range is enough
    x, g = cell * np.arange(first, last + 1), g[first - last - 1 :]
    under, shifted = sigma * g + 0.5 / sigma, sigma * g - 0.5 / sigma  # the outcome in standard units of N0 and of N1
    with np.errstate(all="ignore"):
        (log_mass, error), (log_mass_1, error_1) = (normal_mass(v[:-1], v[1:]) for v in (under, shifted))
        mass, mass_1 = np.exp(log_mass), np.exp(log_mass_1)
        p = (1 - rate) * mass * (1 + error) + rate * mass_1 * (1 + error_1)
        # P - exp(x) Q of a cell, x its lower end, is q (m1 - exp(g) m0); where g is -inf, q m1 + (1 - q - exp(x)) m0.
        gap = rate * mass_1 * np.maximum(0.0, -np.expm1(np.minimum(0.0, g[:-1] + log_mass - log_mass_1)))
        slack = rate * mass_1 * (error + error_1)
        bottom = np.isneginf(g[:-1])
        gap = np.where(bottom, rate * mass_1 - (np.expm1(x[:-1]) + rate) * mass, np.nan_to_num(gap))
        slack = np.where(bottom, (error + error_1 + 8 * ULP) * gap, np.nan_to_num(slack, posinf=1.0)) + 1e-300
    # Kept: P and Q = P exp(-x). Rounding makes both ends heavier, which is safe in either direction.
    width = -math.expm1(-cell)
    upper = np.clip((gap + slack) / width, 0, p)
    lower = np.clip(p - (gap - slack) / width, 0, p)
    at = np.zeros(len(x))
    at[:-1] += lower
    at[1:] += upper
    at_added = np.maximum(at * np.exp(-np.maximum(x, -100)), 1e-300)  # where q < 1, x > log(1 - q) > -40
    # Beyond the ends: to the end above, or to infinity where there is none.
    below, below_1, above, above_1 = np.exp(log_ndtr(np.array([under[0], shifted[0], -under[-1], -shifted[-1]])))
    at[0] += (1 - rate) * below + rate * below_1
    at_added[-1] += above
    removed = DiscretePLD(first, at, 1.001 * ((1 - rate) * above + rate * above_1))
    return removed, removed if rate == 1 else DiscretePLD(-last, at_added[::-1], 1.001 * below)


class ApproxPLD:
    """A rough picture of composed losses, by which tilt, grid and window are chosen; nothing that is promised rests on it."""

    POINTS = 2_001

    def __init__(self, spendings: Sequence[Steps], tail: float, added: bool):
        self.parts = []
        for sigma, rate, steps in spendings:
            z = np.linspace(-tail, tail + 1 / sigma, self.POINTS)
            log_density = -z * z / 2
            with np.errstate(divide="ignore"):
                loss = np.logaddexp(np.log1p(-rate), math.log(rate) + z / sigma - 0.5 / sigma**2)
            weight = log_density if added else log_density + loss
            self.parts.append((steps, -loss if added else loss, weight - logsumexp(weight)))

    def log_moments(self, tilts: np.ndarray) -> np.ndarray:
        """log E exp(tilt x L) for each tilt, (tilts,)."""
        return sum(steps * logsumexp(weight + tilts[:, None] * loss, axis=1) for steps, loss, weight in self.parts)

    @functools.cached_property
    def at_tilts(self) -> np.ndarray:
        return self.log_moments(TILTS)

    def deviation(self, tilt: float) -> float:
        """Standard deviation of the tilted distribution."""
        variance = 0.0
        for steps, loss, weight in self.parts:
            tilted = np.exp(weight + tilt * loss - logsumexp(weight + tilt * loss))
            variance += steps * float(tilted @ (loss - tilted @ loss) ** 2)
        return math.sqrt(variance)

    def best_tilt(self, delta: float) -> tuple[float, float]:
        """Return the tilt whose Chernoff bound on epsilon at `delta` is the smallest, and that epsilon."""
        bounds = (self.at_tilts + np.log([max_hockey_stick(tilt) for tilt in TILTS]) - math.log(delta)) / TILTS
        best = int(np.nanargmin(bounds))
        return float(TILTS[best]), float(bounds[best])

    def reach(self, tilt: float, sign: int) -> tuple[float, float]:
        """Return a loss beyond which `OUTSIDE` of the tilted distribution lies, in this direction, and the tilt that shows it."""
        shifts = np.geomspace(0.05, 50, 60) / max(self.deviation(tilt), 1e-12)
        moments = self.log_moments(tilt + sign * np.append(0.0, shifts))
        bounds = (moments[1:] - moments[0] - math.log(OUTSIDE)) / shifts
        best = int(np.nanargmin(bounds))
        return sign * float(bounds[best]), float(shifts[best])


def max_hockey_stick(tilt: float) -> float:
    """max over u > 0 of exp(-tilt u) (1 - exp(-u))."""
    return math.exp(-tilt * math.log1p(1 / tilt)) / (1 + tilt)


class LossDistribution:
    """Upper bounds on epsilon and delta of composed steps, by a distribution of losses on a grid.

    The grid is made once, for `planned`; any smaller numbers of steps then cost two FFTs a mechanism and direction.

    Args:
        planned: mechanisms, each with the largest number of steps that will be asked about.
        delta: for which the grid is made.
    """

    def __init__(self, planned: Sequence[Steps], delta: float):
        steps = sum(count for *_, count in planned)
        self.tail = float(-ndtri_exp(math.log(delta * NEGLIGIBLE / steps)))
        # Made for the direction in which an author is removed, which has the larger epsilon unless both have the same one.
        self._sketches: dict[Any, ApproxPLD] = {}
        sketch = self.sketch(planned, added=False)
        tilt, epsilon = sketch.best_tilt(delta)
        # E exp(tilt x L) grows by tilt (tilt + 1) cell^2 / 8 a step at most, epsilon by that over the tilt.
        cell = math.sqrt(8 * TOLERANCE * max(epsilon, 1e-9) / (steps * (tilt + 1)))
        width = sketch.reach(tilt, 1)[0] - sketch.reach(tilt, -1)[0]
        finest = max(width / MAX_CELLS, *((2 * self.tail / s + s**-2) / MAX_CELLS for s, *_ in planned))
        # Where epsilon is near 0 the tilt tells little, so that is tried: half the cell leaves a quarter of the error.
        coarse = self._with_cell(max(cell, finest), planned, delta)
        while self.cell > finest:
            fine = self._with_cell(max(self.cell / 2, finest), planned, delta)
            if not coarse - fine > TOLERANCE * fine:
                break
            coarse = fine

    def _with_cell(self, cell: float, planned: Sequence[Steps], delta: float) -> float:
        self.cell = cell
        self.grids = {(sigma, rate): discretize_loss(sigma, rate, cell, self.tail) for sigma, rate, _ in planned}
        return self.epsilon(planned, delta)

    def sketch(self, spendings: Sequence[Steps], added: bool) -> ApproxPLD:
        """Return the sketch of these steps; the last ones are kept, for whoever asks about several deltas."""
        key = tuple(spendings), added
        if key not in self._sketches:
            if len(self._sketches) > 3:  # two directions, of what is planned and of what is spent
                self._sketches.clear()
            self._sketches[key] = ApproxPLD(spendings, self.tail, added)
        return self._sketches[key]

    def epsilon(self, spendings: Sequence[Steps], delta: float) -> float:
        """Return an upper bound on epsilon at `delta`; inf where the losses beyond the grid are more than that."""
        removed = max(0.0, ComposedPLD(self, spendings, delta, added=False).epsilon(delta))
        # An author who is added makes no outcome rarer than by 1 - q a step.
        most = sum(steps * (-math.log1p(-rate) if rate < 1 else math.inf) for _, rate, steps in spendings) * (1 + 1e-9)
        if most <= removed:
            return removed
        return max(removed, min(most, ComposedPLD(self, spendings, delta, added=True).epsilon(delta)))


class ComposedPLD:
    """The losses of composed steps in one direction, tilted so that epsilon at about `delta` comes out exactly.

    Attributes:
        losses: of the window, ascending, (cells,).
        mass: tilted, (cells,): times exp(log_moment - tilt x loss) it is the distribution.
        error: what is added to delta, times exp(log_moment - tilt x epsilon): the tilted mass that wrapped around, and rounding.
        infinite: what is added to delta as it is.
    """

    def __init__(self, grids: LossDistribution, spendings: Sequence[Steps], delta: float, added: bool):
        self.cell = cell = grids.cell
        sketch = grids.sketch(spendings, added)
        parts = [(grids.grids[sigma, rate][added], steps) for sigma, rate, steps in spendings]
        self.tilt = min(sketch.best_tilt(delta)[0], 30 / cell)  # where losses have a maximum, it may be any
        wrapped = self._place(sketch, parts)
        while wrapped > 1e-6 and self.tilt > TILTS[0]:  # the grid is too coarse to look like the sketch at this tilt
            self.tilt /= 2
            wrapped = self._place(sketch, parts)
        cells = len(self.losses)
        self.mass, rounding = self._compose(parts, round(self.losses[0] / cell), cells)
        steepness = np.minimum(700, np.array([self.tilt, self.tilt + 1]) * cell)
        between = float(-np.diff(1 / np.expm1(steepness))[0])  # the sum over cells of exp(-tilt u) (1 - exp(-u))
        self.error = wrapped * max_hockey_stick(self.tilt) + rounding * (between + max_hockey_stick(self.tilt))
        self.infinite = sum(steps * part.infinite for part, steps in parts)
        largest = max(abs(part.first) + len(part.mass) for part, _ in parts) * cell
        steps = sum(count for _, count in parts)
        self.log_moment += steps * 64 * ULP * (1 + self.tilt * largest)  # rounding of the moments
        self.shift = steps * 16 * ULP * (1 + largest)  # and of the grid: of epsilon
        self._sum_up()

    def _place(self, sketch: ApproxPLD, parts: list[tuple[DiscretePLD, int]]) -> float:
        """Choose the window; return Chernoff's bound on what is above it and wraps to its bottom, of the masses composed."""
        (low, _), (high, shift) = sketch.reach(self.tilt, -1), sketch.reach(self.tilt, 1)
        start = math.floor(low / self.cell) - 1
        cells = fft.next_fast_len(max(64, math.ceil(high / self.cell) + 2 - start), real=True)
        self.losses = self.cell * (start + np.arange(cells))
        self.log_moment, beyond = (
            sum(steps * part.log_moment(self.cell, tilt) for part, steps in parts) for tilt in (self.tilt, self.tilt + shift)
        )
        return math.exp(min(0.0, beyond - self.log_moment - shift * self.losses[-1]))

    def _compose(self, parts: list[tuple[DiscretePLD, int]], start: int, cells: int) -> tuple[np.ndarray, float]:
        """Return the tilted mass of each cell of the window, and a bound on its rounding error [4]."""
        spectrum, norm, steps = np.ones(cells // 2 + 1, dtype=complex), 0.0, 0
        smallest = np.ones(cells // 2 + 1)  # |spectrum| with one step of each mechanism less
        offset = 0
        for part, count in parts:
            log_moment = part.log_moment(self.cell, self.tilt)
            x = self.cell * (part.first + np.arange(len(part.mass)))
            with np.errstate(divide="ignore"):
                tilted = np.exp(np.log(part.mass) + self.tilt * x - log_moment)
            folded = np.zeros(cells * -(-len(tilted) // cells))
            folded[: len(tilted)] = tilted
            folded = folded.reshape(-1, cells).sum(0)
            step = fft.rfft(folded)
            spectrum *= step**count
            smallest *= np.abs(step) ** (count - 1)
            norm, steps, offset = norm + count * float(np.linalg.norm(folded)), steps + count, offset + count * part.first
        mass = np.roll(fft.irfft(spectrum, cells), (offset - start) % cells)
        typical = math.sqrt(float(np.mean(smallest**2)))  # of both halves of the spectrum, but for a factor of sqrt(2)
        rounding = 32 * ULP * math.log2(cells) * (norm + steps) * typical
        return np.maximum(mass, 0), rounding

    def _sum_up(self) -> None:
        """Sum up from above what makes delta: E [1 - exp(epsilon - L)] over L > epsilon, u = loss - centre."""
        self.centre = float(self.mass @ self.losses / self.mass.sum())
        within = self.losses - self.centre > -600 / (1 + self.tilt)  # below, delta is 1 for any purpose
        self.losses, self.mass = self.losses[within], self.mass[within]
        self.u = self.losses - self.centre
        ones = self.mass * np.exp(-self.tilt * self.u)
        self.ones, self.shares = (np.append(np.cumsum(w[:0:-1])[::-1], 0) for w in (ones, ones * np.exp(-self.u)))
        self.slack = 4 * len(ones) * ULP * self.ones + self.error * np.exp(-self.tilt * self.u)
        self.log_scale = self.log_moment - self.tilt * self.centre

    def epsilon(self, delta: float) -> float:
        """Return an upper bound on epsilon at `delta`; inf where the losses beyond the grid are more than that."""
        if delta <= self.infinite:
            return math.inf
        goal = math.exp(min(700.0, math.log(delta - self.infinite) - self.log_scale))
        above = np.flatnonzero(self.ones - np.exp(np.minimum(self.u, 700)) * self.shares + self.slack > goal)
        if not len(above):
            return max(0.0, float(self.losses[0]))
        last = above[-1]
        if last == len(self.u) - 1 or not self.shares[last] > 0:
            return math.inf if last == len(self.u) - 1 else float(self.losses[last + 1])
        wanted = (self.ones[last] + self.slack[last] - goal) / self.shares[last]
        found = self.centre + math.log(wanted) if wanted > 0 else self.losses[last]
        return float(np.clip(found, self.losses[last], self.losses[last + 1])) + self.shift

    def deltas(self, epsilons: np.ndarray) -> np.ndarray:
        """Return upper bounds on delta at each of `epsilons`; 1 below the window."""
        epsilons = epsilons - self.shift
        place = np.searchsorted(self.losses, epsilons, side="right") - 1
        with np.errstate(over="ignore", invalid="ignore"):
            above = np.exp(np.minimum(epsilons - self.centre, 700)) * self.shares[place]
            value = math.exp(min(700.0, self.log_scale)) * (self.ones[place] - above + self.slack[place]) + self.infinite
        return np.where((place < 0) | ~(value < 1), 1.0, value)
