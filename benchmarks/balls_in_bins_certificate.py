"""Certify epsilon of balls-in-bins sampling under noise bands: importance sampling, with an upper confidence bound on delta.

Each author has one secret slot of n, uniform and independent of all else, and takes part in the steps t with t mod n = slot: once
in each epoch of n steps, floor(T / n) or ceil(T / n) times in T steps ([1], [2]). n is public, and q = 1 / n.

Guarantees: with a failure probability of at most delta / 100, which is part of delta, T steps are (epsilon, delta)-DP for
add-or-remove-one adjacency. The failure probability is over the draws of the certificate alone, never over data.

The worst case. Outputs up to a step determine the rows of C x + z up to that step, and the reverse, as in `banded_mf`. Let x_j be
the sum of the columns j, j + n, j + 2n, ... of C, in units of the clip norm. Then no author's delta is larger, at any epsilon and
in either direction, than between the mixture of N(x_j, sigma^2 I) over all slots j and N(0, sigma^2 I), in T dimensions. This is
the pair of [2]. That adaptive gradients in any direction are no worse follows from Kahane's inequality ([3]; [4], Theorem 2.1):

    For centered Gaussian vectors X and Y with E X_i X_j <= E Y_i Y_j for all i and j, weights p_i >= 0 and a convex f of at most
    polynomial growth, E f(sum_i p_i exp(X_i - E X_i^2 / 2)) <= E f(sum_i p_i exp(Y_i - E Y_i^2 / 2)).

Its conditions hold:

1. Fix the slots, samples and random bits of all other authors, and the samples and bits of this one. All are independent of this
   author's slot, and delta of a mixture is at most the mixture of deltas. No slot depends on who else is there.
2. Without the author, row t is N(0, sigma^2 I), less what others add, which earlier rows determine. With the author in slot j,
   its mean is v_tj, the sum of C_ts g_s over the author's steps s <= t, as C is lower triangular. Each g_s depends on rows before
   s alone, and has norm at most 1. As C has no negative entry, |v_tj| is at most the sum of C_ts, which is (x_j)_t.
3. Let R be the likelihood ratio: the mean over j of the product over t of exp(<y_t, v_tj> / sigma^2 - |v_tj|^2 / (2 sigma^2)).
   Then delta(epsilon) is the mean, over independent rows y_t, of a convex function of R that grows linearly: (R - e^epsilon)_+
   for an author removed, (1 - e^epsilon R)_+ for one added.
4. Given the rows before t, that mean is at most the one with (x_j)_s w_s in the place of <y_s, v_sj> for all s >= t, with
   independent w_s from N(0, sigma^2). By induction from the last row: later rows are scalars already, independent of row t. What
   earlier rows give are the weights p_j >= 0. Covariances grow: <v_ti, v_tj> <= |v_ti| |v_tj| <= (x_i)_t (x_j)_t. At t = 0 all
   rows are replaced, and delta is that of the pair above.

The range. Let a_j = <x_j, y> / sigma^2 - |x_j|^2 / (2 sigma^2), so that R is the mean of exp(a_j). `TiltedMixture` and
`MeanShift` bound weight times loss for every y, by Jensen's inequality: nothing is truncated. One tilted slot (p = 1) is the
proposal of JAX-Privacy's importance sampling. Pairs and triples of slots have a range near delta where one slot has not.

References:
    [1] Chua et al. 2024, Balls-and-Bins Sampling for DP-SGD, arXiv 2412.16802
    [2] Choquette-Choo et al. 2024, Near Exact Privacy Amplification for Matrix Mechanisms, arXiv 2410.06266
    [3] Kahane 1985, Sur le chaos multiplicatif, Ann. Sci. Math. Quebec 9, 105-150
    [4] Rhodes and Vargas 2014, Gaussian multiplicative chaos and applications: a review, arXiv 1305.6221
    [5] Maurer and Pontil 2009, Empirical Bernstein Bounds and Sample Variance Penalization, arXiv 0907.3740 (Theorem 4)
"""

import math
import secrets
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

FAILURE_SHARE = 1e-2  # of delta: the failure probability of a certificate, all attempts together
MORE_NOISE = 1.01  # after an attempt that failed
MAX_ATTEMPTS = 20
NEGLIGIBLE = 1e-3  # of delta: a range below it is a bound by itself, and nothing is drawn
ROUNDING = 1e-6  # of delta: float64 rounding, far above that of sums of at most MAX_DRAWS values
SLACK = 0.03  # of delta: what the confidence bound may add, if MAX_DRAWS allow
CALIBRATION_DRAWS, MIN_DRAWS, MAX_DRAWS = 2**16, 2**14, 2**22
CHUNK = 2**11  # draws at once
SCALES = np.geomspace(1, 16, 40)


def slot_sums(coefficients: np.ndarray, slots: int, steps: int) -> np.ndarray:
    """Return x_j of each slot j: the sum of C's columns j, j + n, j + 2n, ..., (slots, steps).

    Args:
        coefficients: c_0, ..., c_{b-1} of the lower-triangular Toeplitz matrix C.
        slots, steps: n and T.
    Raises:
        ValueError: for a negative coefficient, for which the worst case is another one, or more bands than slots.
    """
    if not (np.isfinite(coefficients).all() and (coefficients >= 0).all()):
        raise ValueError("a coefficient is negative: gradients that cancel are not the worst case")
    if not 1 <= len(coefficients) <= slots:
        raise ValueError(f"{len(coefficients)} bands are more than the {slots} steps of an epoch")
    sums = np.zeros((slots, steps))
    for step in range(steps):
        rows = min(len(coefficients), steps - step)
        sums[step % slots, step : step + rows] += coefficients[:rows]
    return sums


def log_peak(order: float) -> float:
    """Return the logarithm of the maximum over u >= 1 of u^(1 - order) (1 - 1 / u)."""
    return (order - 1) * math.log1p(-1 / order) - math.log(order) if order > 1 else 0.0


def log_mean_exp(a: np.ndarray) -> np.ndarray:
    """Return the logarithm of the mean of exp(a) over the last axis."""
    largest = a.max(axis=-1, keepdims=True)
    return largest[..., 0] + np.log(np.exp(a - largest).mean(axis=-1))


class WorstCase:
    """The mixture over slots, in units of sigma, by the inner products S_j = <x_j, y> alone: all that the loss depends on.

    Attributes:
        gram: <x_i, x_j>, (slots, slots).
        factor: a triangular F with F^T F = gram, from x itself: S = F^T z differs from x y by what rounding moves x.
    """

    def __init__(self, coefficients: np.ndarray, slots: int, steps: int, noise_multiplier: float):
        sums = slot_sums(coefficients, slots, steps) / noise_multiplier
        self.slots, self.gram = slots, sums @ sums.T
        self.half_squares = np.diag(self.gram) / 2
        self.factor = np.linalg.qr(sums.T, mode="r")

    def draw(self, size: int, generator: np.random.Generator) -> np.ndarray:
        """Return S - |x|^2 / 2 for an author that is not there, (size, slots)."""
        return generator.standard_normal((size, len(self.factor))) @ self.factor - self.half_squares


class TiltedMixture:
    """Proposal for an author removed: the density without the author, times A_s^p / Z, A_s the mean of exp(s a_j), p 1, 2 or 3.

    It is a mixture of normals over p slots: the shift is s times the sum of their x_j. Z is the mean of A_s^p without the author.
    For s >= 1, A_s >= R^s by Jensen's inequality. So weight times loss, Z R / A_s^p (1 - e^epsilon / R)_+, is at most
    Z R^(1 - p s) (1 - e^epsilon / R)_+, which is at most Z exp((1 - p s) epsilon + `log_peak`(p s)).

    Attributes:
        log_range: logarithm of that bound, the least over p and s; at p = s = 1, plain sampling, it is 0.
    """

    def __init__(self, worst: WorstCase, epsilon: float):
        self.worst, self.epsilon, self.log_range = worst, epsilon, math.inf
        for copies in (1, 2, 3):
            before = math.inf
            for scale in SCALES.tolist():
                log_mean = self._log_mean(copies, scale)
                log_range = log_mean + (1 - copies * scale) * epsilon + log_peak(copies * scale)
                if log_range > before:  # convex in s
                    break
                before = log_range
                if log_range < self.log_range:
                    self.copies, self.scale, self.log_mean, self.log_range = copies, scale, log_mean, log_range
        self._prepare()

    def _log_mean(self, copies: int, scale: float) -> float:
        """Return log Z; inf where it overflows."""
        weights, pairs = self._factors(scale)
        with np.errstate(all="ignore"):
            if copies == 1:
                mean = weights.mean()
            elif copies == 2:
                mean = weights @ pairs @ weights / len(weights) ** 2
            else:
                mean = (self._thirds(weights, pairs) * pairs * np.outer(weights, weights)).sum() / len(weights) ** 3
            return float(np.log(mean)) if np.isfinite(mean) else math.inf

    def _factors(self, scale: float) -> tuple[np.ndarray, np.ndarray]:
        """Return the factors of a tuple of slots: exp(s (s - 1) |x_j|^2 / 2) of each, exp(s^2 <x_i, x_j>) of each pair."""
        with np.errstate(over="ignore"):
            return np.exp(scale * (scale - 1) * self.worst.half_squares), np.exp(scale**2 * self.worst.gram)

    @staticmethod
    def _thirds(weights: np.ndarray, pairs: np.ndarray) -> np.ndarray:
        """Return the sum of a third slot's factors for each pair of slots, (slots, slots)."""
        return (pairs * weights) @ pairs

    def _prepare(self) -> None:
        """Prepare the distribution of the first slot, or of the first two."""
        weights, self.pairs = self._factors(self.scale)
        self.weights = weights
        first = weights if self.copies == 1 else self.pairs * np.outer(weights, weights)
        self.first = np.cumsum(first * self._thirds(weights, self.pairs) if self.copies == 3 else first)

    def _draw_slots(self, size: int, generator: np.random.Generator) -> list[np.ndarray]:
        """Draw p slots of each draw."""
        flat = np.searchsorted(self.first, generator.random(size) * self.first[-1], side="right")
        drawn = list(divmod(np.minimum(flat, len(self.first) - 1), self.worst.slots))[2 - min(self.copies, 2) :]
        if self.copies == 3:
            chances = np.cumsum(self.pairs[drawn[0]] * self.pairs[drawn[1]] * self.weights, axis=1)
            place = (chances < generator.random((size, 1)) * chances[:, -1:]).sum(axis=1)
            drawn.append(np.minimum(place, self.worst.slots - 1))
        return drawn

    def draw(self, size: int, generator: np.random.Generator) -> np.ndarray:
        """Return independent draws of a, (size, slots)."""
        slots = self._draw_slots(size, generator)
        a = self.worst.draw(size, generator)
        for drawn in slots:
            a += self.scale * self.worst.gram[drawn]
        return a

    def weigh(self, a: np.ndarray) -> np.ndarray:
        """Return weight times loss of draws of a, (draws, slots) -> (draws,); its mean is delta(epsilon)."""
        values, loss = np.zeros(len(a)), log_mean_exp(a)
        above = loss > self.epsilon
        loss = loss[above]
        log_tilt = self.copies * (loss if self.scale == 1 else log_mean_exp(self.scale * a[above]))
        values[above] = -np.expm1(self.epsilon - loss) * np.exp(loss + self.log_mean - log_tilt)
        return values


class MeanShift:
    """Proposal for an author added: y is shifted by -g times the mean m of all x_j.

    The weight is exp(g <m, y> + g^2 |m|^2 / 2). With k the mean of |x_j|^2 / 2, <m, y> is the mean of a_j plus k, which is at
    most log R + k by Jensen's inequality. So weight times loss, which is (1 - e^epsilon R)_+, is at most
    exp(g (k - epsilon) + g^2 |m|^2 / 2 + `log_peak`(g + 1)).

    Attributes:
        log_range: logarithm of that bound, the least over g; at g = 0, plain sampling, it is 0.
    """

    def __init__(self, worst: WorstCase, epsilon: float):
        self.worst, self.epsilon = worst, epsilon
        self.square, half = worst.gram.mean(), worst.half_squares.mean()
        shifts = np.append(0.0, np.geomspace(1e-2, 1e3, 200))
        ranges = [g * (half - epsilon) + g * g * self.square / 2 + log_peak(g + 1) for g in shifts.tolist()]
        self.shift, self.log_range = shifts[np.argmin(ranges)], min(ranges)

    def draw(self, size: int, generator: np.random.Generator) -> np.ndarray:
        """Return independent draws of a, (size, slots)."""
        return self.worst.draw(size, generator) - self.shift * self.worst.gram.mean(axis=0)

    def weigh(self, a: np.ndarray) -> np.ndarray:
        """Return weight times loss of draws of a, (draws, slots) -> (draws,); its mean is delta(epsilon)."""
        loss = -log_mean_exp(a)
        inner = a.mean(axis=1) + self.worst.half_squares.mean()
        log_weight = self.shift * inner + self.shift**2 * self.square / 2
        return -np.expm1(np.minimum(0.0, self.epsilon - loss)) * np.exp(np.where(loss > self.epsilon, log_weight, 0.0))


DIRECTIONS: dict[str, type[TiltedMixture] | type[MeanShift]] = {"removed": TiltedMixture, "added": MeanShift}


class Estimate(NamedTuple):
    """What draws say of delta(epsilon) in one direction."""

    draws: int
    mean: float
    variance: float  # of one draw, unbiased
    log_range: float  # every draw is in [0, exp(log_range)]

    @property
    def standard_error(self) -> float:
        return math.sqrt(self.variance / max(1, self.draws))

    def deviation(self, failure_probability: float, draws: int) -> float:
        """Return how far the mean of so many draws may be from delta, on one side, by the empirical Bernstein bound [5]."""
        log_term = math.log(2 / failure_probability)
        return math.sqrt(2 * self.variance * log_term / draws) + 7 * math.exp(self.log_range) * log_term / (3 * (draws - 1))

    def upper_bound(self, failure_probability: float) -> float:
        """Return an upper bound on delta(epsilon) that fails with at most that probability: the range, or the draws' bound."""
        largest = math.exp(self.log_range)
        if not self.draws:
            return largest
        return min(largest, (self.mean + self.deviation(failure_probability, self.draws)) * (1 + ROUNDING))


def chunks(draws: int) -> Iterator[int]:
    """Yield sizes of at most CHUNK that add up to `draws`."""
    yield from [CHUNK] * (draws // CHUNK)
    if draws % CHUNK:
        yield draws % CHUNK


def estimate(proposal: TiltedMixture | MeanShift, draws: int, generator: np.random.Generator) -> Estimate:
    """Estimate delta(epsilon) in the proposal's direction.

    Raises:
        ArithmeticError: if a draw is outside of the range that is proven for it.
    """
    total = squares = 0.0
    largest = math.exp(proposal.log_range)
    for size in chunks(draws):
        values = proposal.weigh(proposal.draw(size, generator))
        if not (values.min() >= 0 and values.max() <= largest * (1 + 1e-9)):
            raise ArithmeticError(f"weight times loss is {values.max():.6g}, above its bound {largest:.6g}")
        total, squares = total + float(values.sum()), squares + float(values @ values)
    mean = total / draws
    return Estimate(draws, mean, max(0.0, squares - draws * mean**2) / (draws - 1), proposal.log_range)


class Attempt(NamedTuple):
    """One certificate: sampled with its own key once the noise was fixed."""

    noise_multiplier: float
    key: int  # of Philox: with it, anybody can repeat the draws
    failure_probability: float  # of both directions together
    bounds: dict[str, float]  # on delta(epsilon), by direction
    passed: bool


class Plan(NamedTuple):
    """What is certified: C's coefficients, n, T, and the target."""

    coefficients: np.ndarray
    slots: int
    steps: int
    epsilon: float
    delta: float

    def estimates(self, noise_multiplier: float, draws: int, key: int) -> dict[str, Estimate]:
        """Estimate delta(epsilon) in both directions. Nothing is drawn where the range alone is negligible."""
        worst = WorstCase(self.coefficients, self.slots, self.steps, noise_multiplier)
        generator, found = np.random.Generator(np.random.Philox(key=key)), {}
        for direction, make in DIRECTIONS.items():
            proposal = make(worst, self.epsilon)
            negligible = proposal.log_range <= math.log(NEGLIGIBLE * self.delta)
            found[direction] = Estimate(0, 0.0, 0.0, proposal.log_range) if negligible else estimate(proposal, draws, generator)
        return found


def attempt(plan: Plan, noise_multiplier: float, number: int, draws: int) -> Attempt:
    """Try to certify a noise multiplier with fresh draws. Attempt i is wrong with probability FAILURE_SHARE delta / 2^i at most.

    So a noise multiplier with a larger delta passes, in any attempt, with probability FAILURE_SHARE delta at most. That is added
    to delta, as nothing is promised then.

    Args:
        number: i, from 1.
        draws: of each direction.
    """
    failure_probability = FAILURE_SHARE * plan.delta / 2**number
    key = secrets.randbits(128)
    found = plan.estimates(noise_multiplier, draws, key)
    bounds = {direction: each.upper_bound(failure_probability / len(found)) for direction, each in found.items()}
    passed = max(bounds.values()) + FAILURE_SHARE * plan.delta <= plan.delta
    return Attempt(noise_multiplier, key, failure_probability, bounds, passed)


def certify(plan: Plan, noise_multiplier: float, draws: int) -> list[Attempt]:
    """Return the attempts to certify a noise multiplier, the last of which passed: each with more noise than the one before.

    Raises:
        ArithmeticError: if MAX_ATTEMPTS fail.
    """
    attempts: list[Attempt] = []
    while len(attempts) < MAX_ATTEMPTS:
        attempts.append(attempt(plan, noise_multiplier * MORE_NOISE ** len(attempts), len(attempts) + 1, draws))
        if attempts[-1].passed:
            return attempts
    raise ArithmeticError(
        f"no certificate in {MAX_ATTEMPTS} attempts, up to noise multiplier {attempts[-1].noise_multiplier:.4f}"
    )


def enough_draws(plan: Plan, found: Iterable[Estimate]) -> int:
    """Return how many draws keep the confidence bound of the first attempt within SLACK of delta, from MIN_DRAWS to MAX_DRAWS."""
    draws = MIN_DRAWS
    while draws < MAX_DRAWS and any(
        each.draws and each.deviation(FAILURE_SHARE * plan.delta / 4, draws) > SLACK * plan.delta for each in found
    ):
        draws *= 2
    return draws


def calibrate(plan: Plan, start: float) -> tuple[float, int]:
    """Return a noise multiplier that `certify` will probably pass, and the number of draws for it.

    No guarantee rests on them, nor on the draws made here: the same CALIBRATION_DRAWS for each noise multiplier.

    Args:
        start: a first guess of the noise multiplier.
    """
    key = secrets.randbits(128)

    def log_excess(noise_multiplier: float) -> tuple[float, int]:
        """Return log(what a certificate will probably bound / what it may be), nearly linear in log sigma, and its draws."""
        found = plan.estimates(noise_multiplier, CALIBRATION_DRAWS, key).values()
        draws, bounds = enough_draws(plan, found), []
        for each in found:
            margin = 2 * each.standard_error * math.sqrt(1 + each.draws / draws)  # of both estimates
            bound = each.mean + margin + each.deviation(FAILURE_SHARE * plan.delta / 4, draws) if each.draws else math.inf
            bounds.append(min(bound, math.exp(each.log_range)))
        return math.log(max(bounds) / ((1 - FAILURE_SHARE) * plan.delta)), draws

    high, (at_high, draws) = start, log_excess(start)
    while at_high > 0:
        high *= 1.1
        at_high, draws = log_excess(high)
    low, (at_low, needed) = high / 1.1, log_excess(high / 1.1)
    while at_low <= 0:
        high, at_high, draws, low = low, at_low, needed, low / 1.1
        at_low, needed = log_excess(low)
    while at_high < -5e-3 and high / low > 1.0005:
        weight = min(0.9, max(0.1, (at_low + 2e-3) / (at_low - at_high)))
        middle = low * (high / low) ** weight
        at_middle, needed = log_excess(middle)
        if at_middle <= 0:
            high, at_high, draws = middle, at_middle, needed
        else:
            low, at_low = middle, at_middle
    return high, draws
