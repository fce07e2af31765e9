"""Account for noise correlated over steps, and choose its coefficients: banded matrix factorization (BandMF).

Later steps take back part of the noise of earlier ones.

Guarantees: for every author, T steps with b bands are at most ceil(T / b) steps of the Poisson-subsampled Gaussian mechanism with
sample rate b q and noise multiplier sigma (`events.cyclic_event`). b = 1 is the plain mechanism.

Method: authors are assigned to b groups. Step t samples from group t mod b alone, each author with probability b q, so that the
expected number of an author's samples is the same as without groups. The noise of step t is
w_t = (z_t - sum_{i=1}^{b-1} c_i w_{t-i}) / c_0, with independent z_t of standard deviation sigma times the clip norm:
w = C^-1 z for the lower-triangular Toeplitz matrix C whose columns hold c_0, ..., c_{b-1}.

The guarantee is Theorem 4 of [1], for add-or-remove-one adjacency. Its conditions hold:

1. C is lower triangular: the outputs x_t + w_t up to any step determine the rows of C x + z up to that step, and the reverse. So
   gradients may depend on all earlier outputs (adaptivity, [2], Theorem 2.1);
2. C has b bands, and an author participates at most once in b steps: groups take turns, and no author is sampled twice in b
   steps. So the columns of an author's steps do not overlap, and its steps are released one after the other in separate rows:
   the sampling with probability b q, then the clipped gradient times a column of C;
3. the norm of a column is at most 1: one participation adds at most the clip norm, as without bands;
4. an author's group has floor(T / b) or ceil(T / b) steps. A run that ends early has released fewer rows;
5. the groups do not depend on other authors: adding or removing one moves no other author. b q is a constant, never an expected
   batch over the size of a group.

Two consequences. A batch that is sampled and discarded must not be followed by the next group's batch, or an author would return
too early: batches are numbered, and `AuthorDPOptimizer` refuses one of another step. A resumed run assigns new groups and begins
a new mechanism, without the noise of the old one, which is never saved: it would remove the protection. Both mechanisms compose.

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

from author_dp.accounting.accountant import find_noise_multiplier
from author_dp.accounting.events import MechanismEvent, cyclic_event
from author_dp.accounting.rdp import rdp_epsilon

BAND_CHOICES = [2**i for i in range(7)]  # of --noise_bands auto: 1 to 64
HORIZON = 2_048  # steps for which coefficients are optimized: with more they hardly change
NEGLIGIBLE_GAIN = 1.05  # auto takes the fewest bands within this factor of the least error: bands cost memory and step noise


@functools.cache
def toeplitz_coefficients(bands: int, steps: int) -> np.ndarray:
    """Return c_0, ..., c_{b-1} of norm 1 with the least `prefix_sum_rmse` over the steps ([4], section 4).

    float64, (bands,). L-BFGS starts from the square-root coefficients of [3], those of (1 - x)^(-1/2). The result depends on the
    arguments alone.
    """
    start = np.cumprod([1.0, *((2 * i - 1) / (2 * i) for i in range(1, bands))])
    if bands == 1:
        return start
    horizon = min(steps, HORIZON)
    optimum = minimize(log_banded_error, start[1:], args=(horizon,), jac=True, method="L-BFGS-B", options={"maxiter": 200})
    best = min((start[1:], optimum.x), key=lambda rest: log_banded_error(rest, horizon)[0])
    coefficients = np.concatenate([[1.0], best])
    coefficients /= np.linalg.norm(coefficients) * (1 + 1e-12)  # at most 1, however rounded
    coefficients.flags.writeable = False
    return coefficients


def log_banded_error(rest: np.ndarray, steps: int) -> tuple[float, np.ndarray]:
    """Return 2 log(`prefix_sum_rmse` * sqrt(steps)) for (1, *rest) scaled to norm 1, and its gradient, (bands - 1,).

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
    """Return the root mean square, over t, of the noise in the sum of the first t updates.

    In units of sigma times the clip norm; without bands it is sqrt((steps + 1) / 2).
    """
    m = lfilter([1.0], coefficients, np.ones(steps))
    return math.sqrt(np.arange(steps, 0, -1) @ m**2 / steps)


def banded_step_noise_std(coefficients: np.ndarray, steps: int) -> float:
    """Return the standard deviation of the last step's noise, from the diagonal of C^-1 C^-T.

    In units of sigma times the clip norm.
    """
    impulse = np.zeros(steps)
    impulse[0] = 1.0
    return float(np.linalg.norm(lfilter([1.0], coefficients, impulse)))


def choose_bands(sample_rate: float, steps: int, target_epsilon: float, delta: float, max_bands: int) -> int:
    """Return the number of bands, of BAND_CHOICES up to `max_bands`, with nearly the least prefix-sum error at that epsilon.

    Noise multipliers are compared by the cheap accountant. That of the chosen number is calibrated exactly later.
    """
    errors = {}
    for bands in BAND_CHOICES:
        if bands == 1 or (bands <= min(max_bands, steps) and bands * sample_rate <= 1):
            sigma = banded_rdp_noise_multiplier(cyclic_event(1.0, sample_rate, steps, bands), target_epsilon, delta)
            errors[bands] = sigma * prefix_sum_rmse(toeplitz_coefficients(bands, steps), steps)
    return min(bands for bands, error in errors.items() if error <= NEGLIGIBLE_GAIN * min(errors.values()))


def banded_rdp_noise_multiplier(event: MechanismEvent, target_epsilon: float, delta: float) -> float:
    """Return the noise multiplier that reaches a target by Renyi differential privacy, to 1 %."""
    low, high = 1e-2, 1e4
    while high / low > 1.01:
        middle = math.sqrt(low * high)
        epsilon = rdp_epsilon([event._replace(noise_multiplier=middle)], delta)
        low, high = (middle, high) if epsilon > target_epsilon else (low, middle)
    return high


def banded_error_ratio(
    noise_multiplier: float, sample_rate: float, steps: int, bands: int, epsilon: float, delta: float
) -> float:
    """Return the prefix-sum error, relative to that of independent noise at the same epsilon."""
    independent = find_noise_multiplier(sample_rate, steps, epsilon, delta) * prefix_sum_rmse(np.ones(1), steps)
    return noise_multiplier * prefix_sum_rmse(toeplitz_coefficients(bands, steps), steps) / independent
