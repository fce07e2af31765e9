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
import math

import numpy as np
from scipy.optimize import minimize
from scipy.signal import lfilter

from author_dp.accounting.accountant import MechanismEvent, cyclic_event, find_noise_multiplier, rdp_epsilon

BAND_CHOICES = [2**i for i in range(7)]  # of `auto`: 1 to 64
HORIZON = 2_048  # steps for which coefficients are optimized: beyond it they hardly change
NEGLIGIBLE_GAIN = (
    1.05  # `auto` takes the fewest bands whose error is at most so many times the least: each costs memory and step noise
)

# --- the matrix -------------------------------------------------------------------------------------------


@functools.cache
def toeplitz_coefficients(bands: int, steps: int) -> np.ndarray:
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


def prefix_sum_rmse(coefficients: np.ndarray, steps: int) -> float:
    """Return the root mean square, over t, of the noise in the sum of the first t updates, in units of sigma C.

    Without bands it is sqrt((steps + 1) / 2).
    """
    m = lfilter([1.0], coefficients, np.ones(steps))
    return math.sqrt(np.arange(steps, 0, -1) @ m**2 / steps)


def step_noise_std(coefficients: np.ndarray, steps: int) -> float:
    """Return the standard deviation of the noise of the last step, in units of sigma C: the diagonal of C^-1 C^-T."""
    impulse = np.zeros(steps)
    impulse[0] = 1.0
    return float(np.linalg.norm(lfilter([1.0], coefficients, impulse)))


def choose_bands(sample_rate: float, steps: int, target_epsilon: float, delta: float, most: int) -> int:
    """Return the number of bands, of CHOICES and up to `most`, of (nearly) the least error of prefix sums at that epsilon.

    Noise multipliers for the comparison are those of the cheap accountant; the chosen one's is calibrated exactly later.
    """
    errors = {}
    for bands in BAND_CHOICES:
        if bands == 1 or (bands <= min(most, steps) and bands * sample_rate <= 1):
            sigma = rdp_noise_multiplier(cyclic_event(1.0, sample_rate, steps, bands), target_epsilon, delta)
            errors[bands] = sigma * prefix_sum_rmse(toeplitz_coefficients(bands, steps), steps)
    return min(bands for bands, error in errors.items() if error <= NEGLIGIBLE_GAIN * min(errors.values()))


def rdp_noise_multiplier(spending: MechanismEvent, target_epsilon: float, delta: float) -> float:
    """Return the noise multiplier for a target by Renyi differential privacy, to 1 %."""
    low, high = 1e-2, 1e4
    while high / low > 1.01:
        middle = math.sqrt(low * high)
        spent = rdp_epsilon([spending._replace(noise_multiplier=middle)], delta)
        low, high = (middle, high) if spent > target_epsilon else (low, middle)
    return high


def error_ratio(noise_multiplier: float, sample_rate: float, steps: int, bands: int, epsilon: float, delta: float) -> float:
    """Return the error of prefix sums over that of independent noise at the same epsilon."""
    plain = find_noise_multiplier(sample_rate, steps, epsilon, delta) * prefix_sum_rmse(np.ones(1), steps)
    return noise_multiplier * prefix_sum_rmse(toeplitz_coefficients(bands, steps), steps) / plain


# --- the groups -------------------------------------------------------------------------------------------


# --- the noise --------------------------------------------------------------------------------------------
