"""Noise that is correlated over steps: later steps take back part of the noise of earlier ones (banded matrix factorization).

Promise: T steps with b bands are, for every author, at most ceil(T / b) steps of the Poisson-subsampled Gaussian mechanism at
sampling rate b q, noise multiplier sigma (accounting.cyclic_spending); b = 1 is the plain mechanism.

How: authors are dealt to b groups; step t draws from group t mod b alone, each author with probability b q, so that an author is
in expectation drawn as often as without groups. The noise of step t is w_t = (z_t - sum_{i=1}^{b-1} c_i w_{t-i}) / c_0 with
independent z_t ~ N(0, sigma^2 C^2 I): w = C^-1 z for the lower-triangular Toeplitz matrix C whose columns hold c_0, ..., c_{b-1}.

Theorem ([1], Theorem 4; add or remove one author): it holds as

1. C is lower triangular, so whoever sees the outputs x_t + w_t up to some step can compute, and be computed from, the rows of
   C x + z up to that step: gradients may depend on all outputs before (adaptivity, [2], Theorem 2.1);
2. C has b bands and an author takes part at most once in b steps, as groups take turns and none is drawn twice in b steps: the
   columns of its steps do not overlap. So its steps are released one after the other, each in rows of its own: the draw, with
   probability b q, then the clipped gradient times a column of C;
3. the norm of a column is at most 1: what a draw adds has norm at most C, the clip norm, as without bands;
4. in an author's group are floor(T / b) or ceil(T / b) steps. A run that ends early has released fewer rows;
5. the groups depend on nobody else: who is added or removed moves no other author, and b q is a constant, never an expected
   batch over the size of a group.

Hence: a draw that was made and thrown away must not be followed by the next group's, or an author would come back early: draws
are numbered, and `AuthorDPOptimizer` refuses one of another step. A run that is resumed draws new groups and begins a new
mechanism, without the noise of the old one, which is never saved: it would take away what protects. Both compose.

References:
    [1] Choquette-Choo et al. 2023, (Amplified) Banded Matrix Factorization, arXiv 2306.08153
    [2] Denisov et al. 2022, Improved DP for SGD via Optimal Private Linear Operators on Adaptive Streams, arXiv 2202.08312
    [3] Fichtenberger, Henzinger and Upadhyay 2022, Constant Matters, arXiv 2202.11205 (square-root coefficients)
    [4] McKenna 2024, Scaling up the Banded Matrix Factorization Mechanism, arXiv 2405.15913 (optimal Toeplitz coefficients)
"""

import functools
import hashlib
import math
from collections import deque
from typing import Optional

import numpy as np
import torch
from scipy.optimize import minimize
from scipy.signal import lfilter

from author_dp.accounting.accountant import Spending, cyclic_spending, find_noise_multiplier, rdp_epsilon
from author_dp.mechanism.noise import NoiseSource

CHOICES = [2**i for i in range(7)]  # of `auto`: 1 to 64
HORIZON = 2_048  # steps for which coefficients are optimized: beyond it they hardly change
NEARLY = 1.05  # `auto` takes the fewest bands whose error is at most so many times the least: each costs memory and step noise

# --- the matrix -------------------------------------------------------------------------------------------


@functools.cache
def band_coefficients(bands: int, steps: int) -> np.ndarray:
    """Return c_0, ..., c_{b-1}, float64 (bands,), of norm 1, for the least `sum_error` over that many steps ([4], section 4).

    Found by L-BFGS from the square-root coefficients of [3], those of (1 - x)^(-1/2). They depend on both arguments alone.
    """
    start = np.cumprod([1.0, *((2 * i - 1) / (2 * i) for i in range(1, bands))])
    if bands == 1:
        return start
    horizon = min(steps, HORIZON)
    found = minimize(log_error, start[1:], args=(horizon,), jac=True, method="L-BFGS-B", options={"maxiter": 200})
    best = min((start[1:], found.x), key=lambda rest: log_error(rest, horizon)[0])
    coefficients = np.concatenate([[1.0], best])
    coefficients /= np.linalg.norm(coefficients) * (1 + 1e-12)  # at most 1, however rounded
    coefficients.flags.writeable = False
    return coefficients


def log_error(rest: np.ndarray, steps: int) -> tuple[float, np.ndarray]:
    """Return 2 log of `sum_error` for coefficients (1, *rest), before they are scaled, and its gradient, (bands - 1,).

    As power series, with m(x) = 1 / ((1 - x) c(x)), the noise of the t-th sum is sum_j m_j z_{t-j}; dm / dc_i = -x^i m(x) / c(x).
    """
    c = np.concatenate([[1.0], rest])
    with np.errstate(all="ignore"):
        m = lfilter([1.0], c, np.ones(steps))
        slope = lfilter([1.0], c, m)
        weighted = m * np.arange(steps, 0, -1)
        square = weighted @ m
    if not np.isfinite(square):  # C^-1 grows without bound
        return 1e3, np.zeros(len(rest))
    gradient = np.array([-2 * weighted[i:] @ slope[: steps - i] for i in range(1, len(c))]) / square
    return float(np.log(square) + np.log(c @ c)), gradient + 2 * rest / (c @ c)


def sum_error(coefficients: np.ndarray, steps: int) -> float:
    """Return the root mean square, over t, of the noise in the sum of the first t updates, in units of sigma C.

    Without bands it is sqrt((steps + 1) / 2).
    """
    m = lfilter([1.0], coefficients, np.ones(steps))
    return math.sqrt(np.arange(steps, 0, -1) @ m**2 / steps)


def step_scale(coefficients: np.ndarray, steps: int) -> float:
    """Return the standard deviation of the noise of the last step, in units of sigma C: the diagonal of C^-1 C^-T."""
    impulse = np.zeros(steps)
    impulse[0] = 1.0
    return float(np.linalg.norm(lfilter([1.0], coefficients, impulse)))


def choose_bands(sample_rate: float, steps: int, target_epsilon: float, delta: float, most: int) -> int:
    """Return the number of bands, of CHOICES and up to `most`, of (nearly) the least error of prefix sums at that epsilon.

    Noise multipliers for the comparison are those of the cheap accountant; the chosen one's is calibrated exactly later.
    """
    errors = {}
    for bands in CHOICES:
        if bands == 1 or (bands <= min(most, steps) and bands * sample_rate <= 1):
            sigma = rough_noise_multiplier(cyclic_spending(1.0, sample_rate, steps, bands), target_epsilon, delta)
            errors[bands] = sigma * sum_error(band_coefficients(bands, steps), steps)
    return min(bands for bands, error in errors.items() if error <= NEARLY * min(errors.values()))


def rough_noise_multiplier(spending: Spending, target_epsilon: float, delta: float) -> float:
    """Return the noise multiplier for a target by Renyi differential privacy, to 1 %."""
    low, high = 1e-2, 1e4
    while high / low > 1.01:
        middle = math.sqrt(low * high)
        spent = rdp_epsilon([spending._replace(noise_multiplier=middle)], delta)
        low, high = (middle, high) if spent > target_epsilon else (low, middle)
    return high


def gain(noise_multiplier: float, sample_rate: float, steps: int, bands: int, epsilon: float, delta: float) -> float:
    """Return the error of prefix sums over that of independent noise at the same epsilon."""
    plain = find_noise_multiplier(sample_rate, steps, epsilon, delta) * sum_error(np.ones(1), steps)
    return noise_multiplier * sum_error(band_coefficients(bands, steps), steps) / plain


# --- the groups -------------------------------------------------------------------------------------------


def deal(hashes: np.ndarray, bands: int, key: bytes) -> np.ndarray:
    """Return the group of each author, int64 (authors,), each of `bands` as likely; it follows from the author and the key alone.

    Args:
        hashes: uint64 (authors,), of each author's value (`data_utils.author_hashes`).
        key: secret bits, the same on all processes, new for each training.
    """
    if bands == 1:
        return np.zeros(len(hashes), np.int64)
    digests = (hashlib.blake2b(int(one).to_bytes(8, "big"), key=key, digest_size=8).digest() for one in hashes)
    return (np.frombuffer(b"".join(digests), dtype=">u8") % np.uint64(bands)).astype(np.int64)


def with_canaries(hashes: Optional[np.ndarray], canaries: int) -> Optional[np.ndarray]:
    """Return the hashes with those of so many further authors, who have no value: their places from the end."""
    return None if hashes is None else np.concatenate([hashes, np.arange(canaries, dtype=np.uint64)])


# --- the noise --------------------------------------------------------------------------------------------


class BandedNoise:
    """The noise of one training in one process' slice of the sums; it holds the last b - 1 of it, secret, in memory only.

    Args:
        coefficients: (bands,), two or more.
        size: of the slice.
        device: where the sums are.
    """

    def __init__(self, coefficients: np.ndarray, size: int, device: torch.device):
        self.coefficients = coefficients
        self.first, *self.rest = coefficients.tolist()
        self.past = torch.zeros(len(self.rest), size, device=device)
        self.steps = 0

    def add_(self, total: torch.Tensor, source: NoiseSource, std: float) -> torch.Tensor:
        """Add the noise of the next step to `total`, float32 (size,), in place; std is sigma C."""
        places = [(self.steps - lag) % len(self.past) for lag in range(1, len(self.past) + 1)]  # of w_{t-1}, w_{t-2}, ...
        for total_part, past in zip(total.split(source.elements), self.past.split(source.elements, dim=1)):
            noise = source.add_(torch.zeros_like(total_part), std)
            for place, coefficient in zip(places, self.rest):
                noise.sub_(past[place], alpha=coefficient)
            noise.div_(self.first)
            past[self.steps % len(past)] = noise  # in the place of the oldest one
            total_part.add_(noise)
        self.steps += 1
        return total

    @property
    def variance(self) -> float:
        """Variance of the last step's noise, in units of (sigma C)^2."""
        return step_scale(self.coefficients, self.steps) ** 2


class Undo:
    """Turn what is released, step by step, x_t + w_t, into rows of C x + z, where the noise is independent over steps."""

    def __init__(self, coefficients: np.ndarray):
        self.coefficients = coefficients.tolist()
        self._past: deque[torch.Tensor] = deque(maxlen=len(self.coefficients))

    def __call__(self, released: torch.Tensor) -> torch.Tensor:
        self._past.appendleft(released.detach().clone())
        return torch.stack([c * past for c, past in zip(self.coefficients, self._past)]).sum(0)


class MatchedFilter:
    """Turn rows of C x + z into one number for each time that an author's group is drawn: x + N(0, sigma^2), independent.

    The draw of step t shows in rows t, ..., t + b - 1, c_i times each; their products with c_i are summed. Blocks of a group do
    not overlap.

    Args:
        coefficients: (bands,).
        groups: (coordinates,), when the author of each coordinate is drawn: at step t for t mod bands.
    """

    def __init__(self, coefficients: np.ndarray, groups: np.ndarray):
        self.coefficients, self.bands = torch.from_numpy(coefficients / np.linalg.norm(coefficients)), len(coefficients)
        self.groups = torch.from_numpy(groups)
        self._rows: deque[torch.Tensor] = deque(maxlen=2 * self.bands - 1)
        self._steps = 0

    def __call__(self, row: torch.Tensor) -> Optional[torch.Tensor]:
        """Take a row, (coordinates,); return the next number of each coordinate once in `bands` steps, None otherwise."""
        self._rows.append(row)
        self._steps += 1
        if len(self._rows) < 2 * self.bands - 1 or (self._steps + 1) % self.bands:
            return None
        rows = torch.stack(list(self._rows))  # the first of them is of group 0
        groups, coefficients = self.groups.to(row.device), self.coefficients.to(rows)
        windows = torch.stack([coefficients @ rows[g : g + self.bands] for g in range(self.bands)])  # (bands, coordinates)
        return windows.gather(0, groups[None])[0]
