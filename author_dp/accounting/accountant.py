"""What is spent: the epsilon of steps, and the noise for a target.

Promise: every epsilon is an upper bound for add-or-remove-one adjacency and Poisson sampling, computed from public
parameters alone, at any delta: floating point errs on the safe side. Whose bound it is, `PrivacyLoss.accountant` says:

- gaussian: every author is in every step (q = 1). That is one Gaussian mechanism, whose epsilon has a closed form [3];
- prv: the PRV accountant [1], where its rounding is far below delta, as it usually is;
- pld: a privacy loss distribution of our own (pld.py), where it is not, and where epsilon is below 0.03 or beyond 1,000;
- rdp: Renyi differential privacy [2], should the others fail.

Example:

    >>> sigma = find_noise_multiplier(sample_rate=0.01, steps=1000, target_epsilon=8.0, target_delta=1e-5)
    >>> compute_epsilon(sigma, sample_rate=0.01, steps=1000, delta=1e-5) <= 8.0
    True

References:
    [1] Gopi, Lee and Wutschitz 2021, Numerical Composition of Differential Privacy, arXiv 2106.02848 (the PRV accountant)
    [2] Mironov, Talwar and Zhang 2019, Renyi DP of the Sampled Gaussian Mechanism, arXiv 1908.10530 (the cheap bound)
    [3] Balle and Wang 2018, Improving the Gaussian Mechanism for Differential Privacy, arXiv 1805.06530 (Theorem 8)
"""

import decimal
import functools
import math
import warnings
from collections.abc import Sequence
from decimal import Decimal
from typing import NamedTuple, Optional

import numpy as np
from opacus.accountants.analysis.prv import (
    Domain,
    PoissonSubsampledGaussianPRV,
    TruncatedPrivacyRandomVariable,
    compose_heterogeneous,
    discretize,
)
from opacus.accountants.analysis.rdp import get_privacy_spent
from scipy.special import erfcx, gammaln, logsumexp
from transformers.utils import logging

from author_dp.accounting.pld import ULP, LossDistribution
from author_dp.errors import UserError

logger = logging.get_logger(f"transformers.{__name__}")

MAX_PRV_EPSILON = 1_000.0  # from here on the grid of [1] would take minutes and GBs
GRID_ERROR_SHARE = 1e-2  # of delta: where rounding may be more than that, [1] is not asked
FINEST_GRID = 1e-4  # error in epsilon that the grid of [1] is made for
COARSE_GRID = 3e-3  # of epsilon: nor is it where its grid is coarser than that
FOUR_DIGITS = decimal.Context(prec=4, rounding=decimal.ROUND_CEILING)
ORDERS = np.array([*range(2, 64), 96, 128, 192, 256, 384, 512, 768, 1024])  # of Renyi divergences


class MechanismEvent(NamedTuple):
    """A number of steps of the Poisson-subsampled Gaussian mechanism."""

    noise_multiplier: float
    sample_rate: float
    steps: int


def cyclic_sample_rate(sample_rate: float, bands: int) -> float:
    """Return b q, the probability with which an author is in the draws of the own group; above 1 it is refused.

    Raises:
        UserError: for more bands than that.
    """
    if bands * sample_rate > 1 + 1e-9:
        raise UserError(
            f"--noise_bands {bands}: times the sample rate {sample_rate:.4g} it must be at most 1; lower it to at most "
            f"{math.floor(1 / sample_rate * (1 + 1e-9))}"
        )
    return bands * sample_rate if bands * sample_rate < 1 - 1e-9 else 1.0


def cyclic_event(noise_multiplier: float, sample_rate: float, steps: int, bands: int) -> MechanismEvent:
    """Return what steps with `bands` groups in turn spend (bands.py): every author's group has at most ceil(steps / bands)."""
    return MechanismEvent(noise_multiplier, cyclic_sample_rate(sample_rate, bands), -(-steps // bands))


def merge_events(spendings: Sequence[MechanismEvent]) -> list[MechanismEvent]:
    """Add up the steps of equal mechanisms, and sort these: the order of composition does not matter."""
    steps: dict[tuple[float, float], int] = {}
    for sigma, rate, count in spendings:
        steps[sigma, rate] = steps.get((sigma, rate), 0) + count
    return sorted(MechanismEvent(*mechanism, count) for mechanism, count in steps.items() if count > 0)


def rdp_epsilon(spendings: Sequence[MechanismEvent], delta: float) -> float:
    """Cheap upper bound by Renyi differential privacy at integer orders, which have a closed form [2]."""
    if any(spending.noise_multiplier == 0 for spending in spendings):
        return math.inf
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")  # that the best order is the smallest or largest one: it is a bound all the same
        divergences = np.sum([steps * known_rdp_of_step(sigma, rate) for sigma, rate, steps in spendings], axis=0)
        epsilon, _ = get_privacy_spent(orders=ORDERS, rdp=divergences, delta=delta)
    return math.inf if math.isnan(epsilon) else max(0.0, float(epsilon))


def rdp_of_step(noise_multiplier: float, sample_rate: float) -> np.ndarray:
    """Return the Renyi divergence of one step at each of ORDERS, rounded up.

    At order a it is log(A) / (a - 1), A = sum_i binomial(a, i) (1 - q)^(a - i) q^i exp((i^2 - i) / (2 sigma^2)), the mean of a
    power of the likelihood ratio ([2], section 3.3). All orders at once: the search for sigma asks for hundreds.
    """
    if sample_rate == 1:
        return ORDERS / (2 * noise_multiplier**2) * (1 + 4 * ULP)
    order, i = ORDERS[:, None].astype(float), np.arange(ORDERS[-1] + 1.0)  # (orders, 1), (terms,)
    with np.errstate(all="ignore"):  # beyond the order there is no term
        binomial = gammaln(order + 1) - gammaln(i + 1) - gammaln(order - i + 1)
        exponent = binomial + (order - i) * math.log1p(-sample_rate) + i * math.log(sample_rate)
        exponent += (i * i - i) / (2 * noise_multiplier**2)
        log_mean = logsumexp(np.where(i <= order, exponent, -math.inf), axis=1)
    largest = 3 * gammaln(ORDERS + 1) - ORDERS * math.log(sample_rate) + ORDERS**2 / (2 * noise_multiplier**2) + ORDERS
    return np.maximum(0, log_mean + 16 * ULP * largest) / (ORDERS - 1)  # the parts of an exponent, each rounded


known_rdp_of_step = functools.lru_cache(maxsize=256)(rdp_of_step)


# --- every author in every step: one Gaussian mechanism -------------------------------------------------


def gaussian_mu(spendings: Sequence[MechanismEvent]) -> float:
    """Return mu of steps at q = 1: together they are one Gaussian mechanism of sensitivity mu and noise 1; rounded up."""
    return math.sqrt(math.fsum(steps / sigma**2 for sigma, _, steps in spendings)) * (1 + 8 * ULP)


def gaussian_delta(mu: float, epsilon: float) -> float:
    """Return delta of a Gaussian mechanism at `epsilon` ([3], Theorem 8), rounded up.

    Phi(-x) - e^epsilon Phi(-x - mu) for x = epsilon / mu - mu / 2. The density at x is e^epsilon times that at x + mu, so with
    Mills' ratio R(x) = Phi(-x) / density(x) this is density(x) (R(x) - R(x + mu)): nothing tiny is a difference of large numbers.
    """
    x = epsilon / mu - mu / 2
    if x < -8:
        return 1.0  # but for 1e-15
    ratio, further = math.sqrt(math.pi / 2) * erfcx(np.array([x, x + mu]) / math.sqrt(2))
    error = 32 * ULP * ratio * (1 + x * x + epsilon)  # of both ratios, of x and of the density
    return min(1.0, float((ratio - further + error) * math.exp(-x * x / 2) / math.sqrt(2 * math.pi)))


def gaussian_epsilon(mu: float, delta: float) -> float:
    """Return the smallest epsilon of a Gaussian mechanism at `delta`, rounded up."""
    low, high = 0.0, mu * mu / 2 + mu * math.sqrt(2 * math.log(1 / delta))
    if gaussian_delta(mu, low) <= delta:
        return 0.0
    while high - low > 1e-12 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if gaussian_delta(mu, middle) <= delta else (middle, high)
    return high


# --- Poisson sampling -----------------------------------------------------------------------------------


class EpsilonAccountant:
    """Upper bound on the epsilon of composed steps, on a grid that follows from these steps and delta alone.

    By numerical composition of privacy loss variables [1] where that holds. Opacus' default error of 0.01 in epsilon would cost
    1 % of noise at epsilon 1, so here the error is 0.2 % of epsilon, of which a coarse grid tells the size.

    Args:
        spendings: mechanisms with their numbers of steps.
        delta: the delta at which epsilon is asked for.
    Attributes:
        epsilon: the bound, not rounded; inf without noise.
        accountant: whose bound `epsilon` is, as in the module's docstring; without noise there is none, and it says prv.
    """

    MAX_CELLS = 2**19  # of the grid: about 0.3 seconds; where that is too coarse, pld.py takes less time

    def __init__(self, spendings: Sequence[MechanismEvent], delta: float):
        self.delta = delta
        self.delta_error = delta / 1000
        self.epsilon, self.accountant = 0.0, "prv"
        spendings = merge_events(spendings)
        if not spendings or prob_ever_sampled(spendings) <= delta:
            return  # epsilon is 0 whatever the noise
        if any(spending.noise_multiplier == 0 for spending in spendings):
            self.epsilon = math.inf
        elif all(spending.sample_rate == 1 for spending in spendings):
            self.epsilon, self.accountant = gaussian_epsilon(gaussian_mu(spendings), delta), "gaussian"
        else:
            bound = rdp_epsilon(spendings, delta)
            found = self._prv_epsilon(spendings, bound)
            self.epsilon = min(bound, self._pld_epsilon(spendings) if found is None else found)

    def _prv_epsilon(self, spendings: list[MechanismEvent], bound: float) -> Optional[float]:
        """Return epsilon by [1]; None where its bound does not hold at this delta, or is not close."""
        if not FINEST_GRID / COARSE_GRID <= bound <= MAX_PRV_EPSILON or min_fft_error(spendings) > GRID_ERROR_SHARE * self.delta:
            return None
        try:
            epsilon = self._on_grid(spendings, max(FINEST_GRID, 2e-2 * bound))
            finer = max(FINEST_GRID, 2e-3 * epsilon)
            if finer < 0.9 * self.epsilon_error and self.cells < 0.9 * self.MAX_CELLS:
                epsilon = self._on_grid(spendings, finer)
        except (RuntimeError, ValueError) as error:
            logger.info(f"The PRV accountant cannot handle these parameters ({error}).")
            return None
        exact = self.epsilon_error <= COARSE_GRID * epsilon and self.rounding <= GRID_ERROR_SHARE * self.delta
        return epsilon if exact and math.isfinite(epsilon) else None

    def _pld_epsilon(self, spendings: list[MechanismEvent]) -> float:
        self.accountant = "pld"
        try:
            return LossDistribution(spendings, self.delta).epsilon()
        except (ArithmeticError, ValueError, MemoryError) as error:
            self.accountant = "rdp"
            logger.warning(f"No privacy loss distribution could be made ({error}); epsilon is the RDP bound.")
            return math.inf

    def _on_grid(self, spendings: list[MechanismEvent], epsilon_error: float) -> float:
        """Return epsilon on a grid made for that error, or for the smallest that MAX_CELLS allow.

        Opacus' PRVAccountant, taken apart so that its grid is chosen here ([1], Algorithm 1 and Remark 5.6).
        """
        steps = [spending.steps for spending in spendings]
        variables = [PoissonSubsampledGaussianPRV(s.sample_rate, s.noise_multiplier) for s in spendings]
        with warnings.catch_warnings(), np.errstate(all="ignore"):  # log(0) at q = 1 is handled by their np.where
            warnings.simplefilter("ignore")
            cells_per_error = math.sqrt(sum(steps) * math.log(12 / self.delta_error) / 2)
            epsilon_error = min(0.1, epsilon_error)
            bound = self._largest_loss(spendings, epsilon_error)
            epsilon_error = max(epsilon_error, 2 * bound * cells_per_error / self.MAX_CELLS)
            domain = Domain.create_aligned(-bound, bound, epsilon_error / cells_per_error)
            truncated = [TruncatedPrivacyRandomVariable(variable, domain.t_min, domain.t_max) for variable in variables]
            discrete = [discretize(variable, domain) for variable in truncated]
            self.epsilon_error, self.cells = epsilon_error, domain.size
            # What rounding in the FFTs may take from delta (Higham 2002, section 24.1, and every cell the worst).
            norm = sum(count * float(np.linalg.norm(variable.pmf)) for count, variable in zip(steps, discrete))
            self.rounding = 5 * ULP * math.log2(self.cells) * math.sqrt(self.cells) * norm
            composed = compose_heterogeneous(discrete, steps)
            _, _, upper = composed.compute_epsilon(self.delta, self.delta_error + self.rounding, epsilon_error)
        return max(0.0, float(upper))

    def _largest_loss(self, spendings: list[MechanismEvent], epsilon_error: float) -> float:
        """Return how far the grid must reach for what lies beyond to be a small part of `delta_error` ([1], Remark 5.6).

        As Opacus' compute_safe_domain_size, which bounds tails by 151 orders, most of them slow, where these 70 do.
        """
        total = sum(spending.steps for spending in spendings)
        small = self.delta_error / (8 * total)
        of_one = [rdp_epsilon([spending._replace(steps=1)], small) for spending in spendings]
        return max(rdp_epsilon(spendings, self.delta_error / 4), *of_one, epsilon_error) + 3


def prob_ever_sampled(spendings: Sequence[MechanismEvent]) -> float:
    """Return the probability that an author is in any of the steps, rounded up: delta is no more than that at any epsilon."""
    if any(spending.sample_rate == 1 for spending in spendings):
        return 1.0
    return -math.expm1(math.fsum(steps * math.log1p(-rate) for _, rate, steps in spendings)) * (1 + 8 * ULP)


def min_fft_error(spendings: list[MechanismEvent]) -> float:
    """Return what rounding in the FFTs of [1] takes at least, on any grid of at least 2,048 cells, without making one."""
    return 5 * ULP * 11 * sum(spending.steps for spending in spendings)


# --- the one number ---------------------------------------------------------------------------------------


def epsilon_of(spendings: Sequence[MechanismEvent], delta: float) -> float:
    """Return the epsilon of composed steps, rounded up: the only number that is calibrated for, stopped at, and shown.

    It follows from the mechanisms, their steps and delta alone: not from a plan, the order of runs, or how often it is asked.
    """
    return _account(tuple(merge_events(spendings)), delta)[0]


def accountant_of(spendings: Sequence[MechanismEvent], delta: float) -> str:
    """Return the name of the accountant behind `epsilon_of`, as in the module's docstring."""
    return _account(tuple(merge_events(spendings)), delta)[1]


@functools.lru_cache(maxsize=1024)
def _account(spendings: tuple[MechanismEvent, ...], delta: float) -> tuple[float, str]:
    loss = EpsilonAccountant(spendings, delta)
    return round_up(loss.epsilon), loss.accountant


def round_up(*epsilons: float) -> float:
    """Return the sum of epsilons, rounded up to four significant digits, as many as the Trainer prints of a number."""
    return float(FOUR_DIGITS.create_decimal(sum(Decimal(repr(float(epsilon))) for epsilon in epsilons)))


def compute_epsilon(noise_multiplier: float, sample_rate: float, steps: int, delta: float) -> float:
    """Return an upper bound on the epsilon of `steps` steps at add-or-remove-one adjacency, rounded up to four digits.

    Args:
        noise_multiplier: sigma, noise standard deviation over clip norm; 0 gives inf.
        sample_rate: q, probability that an author is in a step's batch; 1 is the Gaussian mechanism.
        steps: number of noisy steps released.
        delta: the delta of (epsilon, delta).
    Returns:
        The upper bound of the accountant that holds there, see the module's docstring.
    Raises:
        UserError (a ValueError): for an argument out of range.
    """
    if not noise_multiplier >= 0 or not 0 <= sample_rate <= 1 or steps < 0 or not 0 < delta < 1:
        raise UserError(
            f"no epsilon for noise_multiplier {noise_multiplier}, sample_rate {sample_rate}, steps {steps}, delta {delta}"
        )
    return 0.0 if sample_rate == 0 else epsilon_of([MechanismEvent(noise_multiplier, sample_rate, steps)], delta)


def find_noise_multiplier(sample_rate: float, steps: int, target_epsilon: float, target_delta: float) -> float:
    """Return the smallest noise multiplier, to 0.01 % of epsilon, whose `compute_epsilon` is at most the target.

    Args:
        sample_rate: q, probability that an author is in a step's batch.
        steps: number of noisy steps.
        target_epsilon, target_delta: the promise; epsilon never exceeds it.
    Raises:
        UserError (a ValueError): for an argument out of range, or a target that no noise reaches.
    """
    if not 0 < target_epsilon < math.inf or steps < 1 or not 0 < sample_rate <= 1 or not 0 < target_delta < 1:
        raise UserError(
            f"no noise for target_epsilon {target_epsilon}, target_delta {target_delta}, sample_rate {sample_rate}, {steps} steps"
        )

    if (sampled := prob_ever_sampled([MechanismEvent(0.0, sample_rate, steps)])) <= target_delta:
        raise UserError(
            f"--target_delta {target_delta} is at least the probability {sampled:.2g} that an author is sampled in any step, so "
            "that any epsilon would hold without noise: lower it, or raise --sample_rate or --max_steps"
        )

    def excess(sigma: float) -> float:
        """log(epsilon / target): negative where the promise is kept; nearly linear in log sigma."""
        epsilon = compute_epsilon(sigma, sample_rate, steps, target_delta)
        return math.log(max(epsilon, 1e-12) / target_epsilon) if epsilon < math.inf else math.inf

    # Bracket: `high` keeps the promise, `low` breaks it. The cheap bound tells where to begin.
    high = 0.1
    while high < 1e3 and rdp_epsilon([MechanismEvent(high, sample_rate, steps)], target_delta) > target_epsilon:
        high *= 1.1
    while (at_high := excess(high)) > 0:
        high *= 2
        if high > 1e6:
            raise UserError(f"--target_epsilon {target_epsilon} at delta {target_delta} is out of reach: raise it")
    low = high / 1.2
    while (at_low := excess(low)) <= 0 and low > 1e-3:
        high, at_high, low = low, at_low, low / 1.2
    # Regula falsi on the logarithms, aimed just below the target and kept off the ends.
    while at_high < -1e-4 and high / low > 1 + 1e-5:
        weight = (at_low + 5e-5) / (at_low - at_high) if math.isfinite(at_low) else 0.5
        middle = math.exp(math.log(low) + min(0.95, max(0.05, weight)) * math.log(high / low))
        at_middle = excess(middle)
        if at_middle <= 0:
            high, at_high = middle, at_middle
        else:
            low, at_low = middle, at_middle
    return high


def format_epsilon(epsilon: float) -> str:
    """Return epsilon as people read it: all digits that `with_margin` leaves, at least two of them decimals."""
    whole, _, decimals = f"{Decimal(repr(round_up(epsilon))):,f}".partition(".")
    return f"{whole}.{decimals:0<2}"


def format_guarantee(epsilon: Optional[float], delta: float) -> str:
    """One phrase for people; epsilon is rounded up."""
    if epsilon is None or math.isinf(epsilon):
        return "no privacy guarantee (epsilon is infinite)"
    return f"epsilon {format_epsilon(epsilon)} at delta {delta:.2g} (author level, add or remove one)"
