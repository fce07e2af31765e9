"""Balls-in-bins sampling under noise bands: the worst case of an author's privacy loss, and proposals to sample it.

Each author has one secret slot of n, uniform and independent of all else, and takes part in the steps t with t mod n = slot: once
in each epoch of n steps, floor(T / n) or ceil(T / n) times in T steps ([1], [2]). n is public, and q = 1 / n.

Guarantees: the mean of `TiltedMixture.weigh` and of `MeanShift.weigh` over their draws is at least delta(epsilon) of T steps, for
an author removed and for one added, and no draw is above exp(log_range). `slot_certificates.py` makes an upper bound of this.

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

A training that resumes draws new slots. Its steps are a second segment: their x_j are in rows of their own, and slots of both are
independent. All of the above then holds for pairs of slots, one of each segment, and the likelihood ratios multiply.

The range. Let a_j = <x_j, y> / sigma^2 - |x_j|^2 / (2 sigma^2), so that R is the mean of exp(a_j). `TiltedMixture` and
`MeanShift` bound weight times loss for every y, by Jensen's inequality: nothing is truncated. One tilted slot (p = 1) is the
proposal of JAX-Privacy's importance sampling. Pairs and triples of slots have a range near delta where one slot has not.

References:
    [1] Chua et al. 2024, Balls-and-Bins Sampling for DP-SGD, arXiv 2412.16802
    [2] Choquette-Choo et al. 2024, Near Exact Privacy Amplification for Matrix Mechanisms, arXiv 2410.06266
    [3] Kahane 1985, Sur le chaos multiplicatif, Ann. Sci. Math. Quebec 9, 105-150
    [4] Rhodes and Vargas 2014, Gaussian multiplicative chaos and applications: a review, arXiv 1305.6221
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.sparse import csr_array

SCALES = np.geomspace(1, 16, 40)


def balls_in_bins_sums(coefficients: np.ndarray, slots: int, steps: int) -> np.ndarray:
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


class SlotSegment(NamedTuple):
    """The steps of one training, whose authors have slots of its own."""

    coefficients: np.ndarray  # c_0, ..., c_{b-1}
    slots: int  # n
    steps: int  # T
    noise_multiplier: float


class BallsInBinsMixture:
    """The worst case of one segment, in units of sigma, by the inner products S_j = <x_j, y>: all that the loss depends on.

    Attributes:
        gram: <x_i, x_j>, (slots, slots).
        factor: a triangular F with F^T F = gram, from x itself: S = F^T z differs from x y by what rounding moves x.
    """

    def __init__(self, segment: SlotSegment):
        sums = balls_in_bins_sums(segment.coefficients, segment.slots, segment.steps) / segment.noise_multiplier
        self.slots, self.gram = segment.slots, sums @ sums.T
        self.half_squares = np.diag(self.gram) / 2
        self.overlaps = csr_array(self.gram)  # the few pairs whose rows overlap
        self.factor = np.linalg.qr(sums.T, mode="r")

    def draw(self, size: int, generator: np.random.Generator) -> np.ndarray:
        """Return S - |x|^2 / 2 for an author that is not there, (size, slots)."""
        return generator.standard_normal((size, len(self.factor))) @ self.factor - self.half_squares


class WorstCaseMixture:
    """The worst cases of all segments together. Slots of different segments are independent, so their losses add up.

    a has the slots of all segments side by side, (draws, all slots).
    """

    def __init__(self, segments: Sequence[SlotSegment]):
        self.mixtures = [BallsInBinsMixture(segment) for segment in segments]
        self._ends = np.cumsum([mixture.slots for mixture in self.mixtures])[:-1]

    def draw(self, size: int, generator: np.random.Generator) -> np.ndarray:
        """Return draws of a for an author that is not there, (size, all slots)."""
        return np.concatenate([mixture.draw(size, generator) for mixture in self.mixtures], axis=1)

    def parts(self, a: np.ndarray) -> list[np.ndarray]:
        """Return the columns of each segment, (draws, slots)."""
        return np.split(a, self._ends, axis=1)

    def log_ratio(self, a: np.ndarray, scale: float = 1.0) -> np.ndarray:
        """Return the sum over segments of log mean_j exp(s a_j), (draws,); at s = 1 it is log R."""
        return np.sum([log_mean_exp(part if scale == 1 else scale * part) for part in self.parts(a)], axis=0)


class BallsInBinsTuples:
    """Tuples of p slots of one segment, with chances proportional to their term in the mean of A_s^p without the author."""

    def __init__(self, mixture: BallsInBinsMixture, copies: int, scale: float):
        self.mixture, self.copies, self.scale = mixture, copies, scale
        with np.errstate(over="ignore"):
            self.weights = np.exp(scale * (scale - 1) * mixture.half_squares)  # the factor of each slot

    def _terms(self) -> np.ndarray:
        """Return the terms of the first slot, (slots,), or of the first two, (slots, slots), summed over a third."""
        if self.copies == 1:
            return self.weights
        self.pairs = np.exp(self.scale**2 * self.mixture.gram)  # the factor of each pair
        thirds = (self.pairs * self.weights) @ self.pairs if self.copies == 3 else 1.0
        return self.pairs * np.outer(self.weights, self.weights) * thirds

    def log_mean(self) -> float:
        """Return the logarithm of the mean of A_s^p without the author; inf where it overflows.

        It is that of the sum of `_terms`; most pairs have factor 1. With W the sum of w, S = pairs - 1 and p = 3, the sum of
        w_i w_j w_k (1 + S_ij) (1 + S_ik) (1 + S_jk) is W^3 + 3 W w S w + 3 sum_j w_j (S w)_j^2 + w (S * (S diag(w) S)) w.
        """
        w, s = self.weights, self.mixture.overlaps.copy()
        with np.errstate(all="ignore"):
            s.data = np.expm1(self.scale**2 * s.data)
            total, by_slot = w.sum(), s @ w
            terms = total**self.copies
            if self.copies == 2:
                terms += w @ by_slot
            elif self.copies == 3:
                terms += 3 * total * (w @ by_slot) + 3 * (w @ by_slot**2) + w @ (s * (s @ (s * w[:, None]))) @ w
            mean = terms / self.mixture.slots**self.copies
            return float(np.log(mean)) if np.isfinite(mean) else math.inf

    def prepare(self) -> None:
        """Prepare to draw."""
        self._cumulative = np.cumsum(self._terms())

    def add_shift(self, a: np.ndarray, generator: np.random.Generator) -> None:
        """Draw a tuple for each row of a, (draws, slots), and shift y by s times the sum of its x_j, in place."""
        last, size = self.mixture.slots - 1, len(a)
        flat = np.searchsorted(self._cumulative, generator.random(size) * self._cumulative[-1], side="right")
        flat = np.minimum(flat, len(self._cumulative) - 1)
        drawn = [flat] if self.copies == 1 else list(divmod(flat, self.mixture.slots))
        if self.copies == 3:
            chances = np.cumsum(self.pairs[drawn[0]] * self.pairs[drawn[1]] * self.weights, axis=1)
            drawn.append(np.minimum((chances < generator.random((size, 1)) * chances[:, -1:]).sum(axis=1), last))
        for slots in drawn:
            a += self.scale * self.mixture.gram[slots]


class TiltedMixture:
    """Proposal for an author removed: the density without the author, times A_s^p / Z, A_s the mean of exp(s a_j), p 1, 2 or 3.

    It is a mixture of normals over p slots: the shift is s times the sum of their x_j. Z is the mean of A_s^p without the author.
    With several segments, A_s and Z are products over them. For s >= 1, A_s >= R^s by Jensen's inequality. So weight times loss,
    Z R / A_s^p (1 - e^epsilon / R)_+, is at most Z R^(1 - p s) (1 - e^epsilon / R)_+, which is at most
    Z exp((1 - p s) epsilon + `log_peak`(p s)).

    Attributes:
        log_range: logarithm of that bound, the least over p and s; at p = s = 1, plain sampling, it is 0.
    """

    def __init__(self, worst: WorstCaseMixture, epsilon: float):
        self.worst, self.epsilon, self.log_range = worst, epsilon, math.inf
        for copies in (1, 2, 3):
            before = math.inf
            for scale in SCALES.tolist():
                tuples = [BallsInBinsTuples(mixture, copies, scale) for mixture in worst.mixtures]
                log_mean = sum(each.log_mean() for each in tuples)
                log_range = log_mean + (1 - copies * scale) * epsilon + log_peak(copies * scale)
                if log_range > before:  # convex in s
                    break
                before = log_range
                if log_range < self.log_range:
                    self.copies, self.scale, self.log_mean, self.log_range = copies, scale, log_mean, log_range
                    self._tuples = tuples
        for each in self._tuples:
            each.prepare()

    def draw(self, size: int, generator: np.random.Generator) -> np.ndarray:
        """Return independent draws of a, (size, all slots)."""
        a = self.worst.draw(size, generator)
        for each, part in zip(self._tuples, self.worst.parts(a)):  # views
            each.add_shift(part, generator)
        return a

    def weigh(self, a: np.ndarray) -> np.ndarray:
        """Return weight times loss of draws of a, (draws, all slots) -> (draws,); its mean is delta(epsilon)."""
        values, loss = np.zeros(len(a)), self.worst.log_ratio(a)
        above = loss > self.epsilon
        loss = loss[above]
        log_tilt = self.copies * (loss if self.scale == 1 else self.worst.log_ratio(a[above], self.scale))
        values[above] = -np.expm1(self.epsilon - loss) * np.exp(loss + self.log_mean - log_tilt)
        return values


class MeanShift:
    """Proposal for an author added: y is shifted by -g times the mean m of all x_j.

    The weight is exp(g <m, y> + g^2 |m|^2 / 2). With k the mean of |x_j|^2 / 2, <m, y> is the mean of a_j plus k, which is at
    most log R + k by Jensen's inequality; with several segments, each of these is a sum over them. So weight times loss, which is
    (1 - e^epsilon R)_+, is at most exp(g (k - epsilon) + g^2 |m|^2 / 2 + `log_peak`(g + 1)).

    Attributes:
        log_range: logarithm of that bound, the least over g; at g = 0, plain sampling, it is 0.
    """

    def __init__(self, worst: WorstCaseMixture, epsilon: float):
        self.worst, self.epsilon = worst, epsilon
        self.square = sum(float(mixture.gram.mean()) for mixture in worst.mixtures)
        self.half = sum(float(mixture.half_squares.mean()) for mixture in worst.mixtures)
        shifts = np.append(0.0, np.geomspace(1e-2, 1e3, 200))
        ranges = [g * (self.half - epsilon) + g * g * self.square / 2 + log_peak(g + 1) for g in shifts.tolist()]
        self.shift, self.log_range = shifts[np.argmin(ranges)], min(ranges)

    def draw(self, size: int, generator: np.random.Generator) -> np.ndarray:
        """Return independent draws of a, (size, all slots)."""
        mean = np.concatenate([mixture.gram.mean(axis=0) for mixture in self.worst.mixtures])
        return self.worst.draw(size, generator) - self.shift * mean

    def weigh(self, a: np.ndarray) -> np.ndarray:
        """Return weight times loss of draws of a, (draws, all slots) -> (draws,); its mean is delta(epsilon)."""
        loss = -self.worst.log_ratio(a)
        inner = np.sum([part.mean(axis=1) for part in self.worst.parts(a)], axis=0) + self.half
        log_weight = self.shift * inner + self.shift**2 * self.square / 2
        return -np.expm1(np.minimum(0.0, self.epsilon - loss)) * np.exp(np.where(loss > self.epsilon, log_weight, 0.0))
