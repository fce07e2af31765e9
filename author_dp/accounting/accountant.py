"""Compute the epsilon that steps spend, and find the noise multiplier for a target epsilon.

Guarantees: every epsilon is an upper bound for add-or-remove-one adjacency and Poisson sampling, at any delta. It depends on
public parameters alone, and floating-point errors are on the safe side. `EpsilonAccountant.accountant` names the bound:

- gaussian: every author is in every step (q = 1). Together the steps are one Gaussian mechanism (gaussian.py);
- prv: the PRV accountant [1], wherever its rounding error is far below delta, as it usually is;
- pld: a privacy loss distribution (pld.py), where it is not, and where epsilon is below 0.03 or above 1,000;
- rdp: Renyi differential privacy (rdp.py), if the others fail.

Example:

    >>> sigma = find_noise_multiplier(sample_rate=0.01, steps=1000, target_epsilon=8.0, target_delta=1e-5)
    >>> compute_epsilon(sigma, sample_rate=0.01, steps=1000, delta=1e-5) <= 8.0
    True

Reference:
    [1] Gopi, Lee and Wutschitz 2021, Numerical Composition of Differential Privacy, arXiv 2106.02848 (the PRV accountant)
"""

import decimal
import functools
import math
import warnings
from collections.abc import Sequence
from decimal import Decimal
from typing import Optional

import numpy as np
from opacus.accountants.analysis.prv import (
    Domain,
    PoissonSubsampledGaussianPRV,
    TruncatedPrivacyRandomVariable,
    compose_heterogeneous,
    discretize,
)

from author_dp.accounting.events import ULP, MechanismEvent, check_delta, merge_events, prob_ever_sampled
from author_dp.accounting.gaussian import gaussian_epsilon, gaussian_mu
from author_dp.accounting.pld import LossDistribution
from author_dp.accounting.rdp import rdp_epsilon
from author_dp.errors import UserError
from author_dp.logs import get_logger

logger = get_logger(__name__)

MAX_PRV_EPSILON = 1_000.0  # above, the grid of the PRV accountant would take minutes and gigabytes
MAX_ERROR_SHARE = 1e-2  # of delta: the largest FFT rounding error with which the PRV accountant is used
FINEST_GRID = 1e-4  # smallest error in epsilon for which a PRV grid is made
COARSEST_GRID = 3e-3  # of epsilon: the largest grid error with which the PRV accountant is used
MIN_DELTA = 1e-100  # smaller ones underflow in the tails of a privacy loss distribution
MAX_NOISE = 1e9  # largest noise multiplier: beyond, squares lose what a step costs
LEAST_NOISE = 1e-3  # smallest calibrated noise multiplier: below, a target epsilon asks for hardly any noise
FOUR_DIGITS = decimal.Context(prec=4, rounding=decimal.ROUND_CEILING)


# --- Poisson sampling -------------------------------------------------------------------------------------


class EpsilonAccountant:
    """Upper bound on the epsilon of composed steps, on a grid that depends on these steps and delta alone.

    The grid error of the PRV accountant is 0.2 % of epsilon, estimated from a coarse grid first. Opacus' default of 0.01 in
    epsilon would cost 1 % of noise at epsilon 1.

    Args:
        events: mechanisms with their numbers of steps.
        delta: the delta at which epsilon is computed.
    Attributes:
        epsilon: the bound, not rounded; inf without noise.
        accountant: name of the bound, as in the module's docstring; prv where no bound is needed.
    """

    MAX_CELLS = 2**19  # of a PRV grid: about 0.3 seconds; where that is too coarse, pld.py takes less time

    def __init__(self, events: Sequence[MechanismEvent], delta: float):
        self.delta = delta
        self.delta_error = delta / 1000
        self.epsilon, self.accountant = 0.0, "prv"
        events = merge_events(events)
        if any(event.noise_multiplier == 0 for event in events):
            self.epsilon = math.inf
        elif not events or prob_ever_sampled(events) <= delta:
            return  # epsilon is 0 whatever the noise
        elif all(event.sample_rate == 1 for event in events):
            self.epsilon, self.accountant = gaussian_epsilon(gaussian_mu(events), delta), "gaussian"
        else:
            rdp_bound = rdp_epsilon(events, delta)
            prv_bound = self._prv_epsilon(events, rdp_bound)
            self.epsilon = min(rdp_bound, self._pld_epsilon(events) if prv_bound is None else prv_bound)

    def _prv_epsilon(self, events: list[MechanismEvent], rdp_bound: float) -> Optional[float]:
        """Return epsilon by [1]; None where its bound does not hold at this delta, or is not close."""
        if not FINEST_GRID / COARSEST_GRID <= rdp_bound <= MAX_PRV_EPSILON:
            return None
        if min_fft_error(events) > MAX_ERROR_SHARE * self.delta:
            return None
        try:
            epsilon = self._compose_on_grid(events, max(FINEST_GRID, 2e-2 * rdp_bound))
            finer = max(FINEST_GRID, 2e-3 * epsilon)
            if finer < 0.9 * self.epsilon_error and self.cells < 0.9 * self.MAX_CELLS:
                epsilon = self._compose_on_grid(events, finer)
        except (RuntimeError, ValueError) as error:
            logger.info(f"The PRV accountant failed for these parameters ({error}).")
            return None
        is_close = self.epsilon_error <= COARSEST_GRID * epsilon and self.fft_error <= MAX_ERROR_SHARE * self.delta
        return epsilon if is_close and math.isfinite(epsilon) else None

    def _pld_epsilon(self, events: list[MechanismEvent]) -> float:
        """Return epsilon by pld.py; inf, and the name rdp, where that fails."""
        self.accountant = "pld"
        try:
            return LossDistribution(events, self.delta).epsilon()
        except (ArithmeticError, ValueError, MemoryError) as error:
            self.accountant = "rdp"
            logger.warning(f"The privacy loss distribution failed ({error}). Epsilon is the RDP bound.")
            return math.inf

    def _compose_on_grid(self, events: list[MechanismEvent], epsilon_error: float) -> float:
        """Return epsilon by [1] on a grid for that error in epsilon, or for the smallest that MAX_CELLS allow.

        The steps of Opacus' PRVAccountant, with a grid of our choice ([1], Algorithm 1 and Remark 5.6).
        """
        steps = [event.steps for event in events]
        variables = [PoissonSubsampledGaussianPRV(event.sample_rate, event.noise_multiplier) for event in events]
        with warnings.catch_warnings(), np.errstate(all="ignore"):  # their np.where handles log(0) at q = 1
            warnings.simplefilter("ignore")
            cells_per_error = math.sqrt(sum(steps) * math.log(12 / self.delta_error) / 2)
            epsilon_error = min(0.1, epsilon_error)
            end = self._largest_loss(events, epsilon_error)
            epsilon_error = max(epsilon_error, 2 * end * cells_per_error / self.MAX_CELLS)
            domain = Domain.create_aligned(-end, end, epsilon_error / cells_per_error)
            truncated = [TruncatedPrivacyRandomVariable(variable, domain.t_min, domain.t_max) for variable in variables]
            discrete = [discretize(variable, domain) for variable in truncated]
            self.epsilon_error, self.cells = epsilon_error, domain.size
            # Largest effect of the FFTs' rounding on delta (Higham 2002, section 24.1, with every cell the worst).
            norm = sum(times * float(np.linalg.norm(variable.pmf)) for times, variable in zip(steps, discrete))
            self.fft_error = 5 * ULP * math.log2(self.cells) * math.sqrt(self.cells) * norm
            composed = compose_heterogeneous(discrete, steps)
            _, _, upper = composed.compute_epsilon(self.delta, self.delta_error + self.fft_error, epsilon_error)
        return max(0.0, float(upper))

    def _largest_loss(self, events: list[MechanismEvent], epsilon_error: float) -> float:
        """Return the end of the grid: the probability beyond it is a small part of `delta_error` ([1], Remark 5.6).

        As Opacus' compute_safe_domain_size, which bounds tails by 151 orders, most of them slow, where these 70 do.
        """
        step_delta = self.delta_error / (8 * sum(event.steps for event in events))
        of_steps = [rdp_epsilon([event._replace(steps=1)], step_delta) for event in events]
        return max(rdp_epsilon(events, self.delta_error / 4), *of_steps, epsilon_error) + 3


def min_fft_error(events: Sequence[MechanismEvent]) -> float:
    """Return a lower bound on `fft_error` for any grid of at least 2,048 cells, without making one."""
    return 5 * ULP * 11 * sum(event.steps for event in events)


# --- the one number ---------------------------------------------------------------------------------------


def epsilon_of(events: Sequence[MechanismEvent], delta: float) -> float:
    """Return the epsilon of composed steps, rounded up: the only number used to calibrate, to stop, and to report.

    It depends on the mechanisms, their steps and delta alone, not on a plan, the order of runs, or earlier calls.
    """
    return _account(tuple(merge_events(events)), delta)[0]


def accountant_of(events: Sequence[MechanismEvent], delta: float) -> str:
    """Return the name of the accountant behind `epsilon_of`, as in the module's docstring."""
    return _account(tuple(merge_events(events)), delta)[1]


@functools.lru_cache(maxsize=1024)
def _account(events: tuple[MechanismEvent, ...], delta: float) -> tuple[float, str]:
    loss = EpsilonAccountant(events, delta)
    return round_up(loss.epsilon), loss.accountant


def round_up(*epsilons: float) -> float:
    """Return the sum of epsilons, rounded up to four significant digits, as many as the Trainer prints of a number."""
    return float(FOUR_DIGITS.create_decimal(sum(Decimal(repr(float(epsilon))) for epsilon in epsilons)))


def round_down(epsilon: float) -> float:
    """Return an epsilon rounded down to four significant digits, which `round_up` then leaves as it is."""
    return float(decimal.Context(prec=4, rounding=decimal.ROUND_FLOOR).create_decimal(repr(float(epsilon))))


def compute_epsilon(noise_multiplier: float, sample_rate: float, steps: int, delta: float) -> float:
    """Return an upper bound on the epsilon of `steps` steps at add-or-remove-one adjacency, rounded up to four digits.

    Args:
        noise_multiplier: sigma, noise standard deviation over clip norm; 0 gives inf.
        sample_rate: q, probability that an author is in a step's batch; 1 is the Gaussian mechanism.
        steps, delta: the number of noisy steps released, and the delta of (epsilon, delta).
    Raises:
        UserError (a ValueError): if an argument is out of range.
    """
    if not 0 <= noise_multiplier <= MAX_NOISE or not 0 <= sample_rate <= 1 or steps < 0 or not MIN_DELTA <= delta < 1:
        raise UserError(
            f"compute_epsilon: noise_multiplier {noise_multiplier}, sample_rate {sample_rate}, steps {steps} or delta {delta} is "
            f"out of range. The noise multiplier must be in [0, {MAX_NOISE:g}], steps at least 0, the sample rate in [0, 1], "
            f"delta in [{MIN_DELTA:g}, 1)"
        )
    return 0.0 if sample_rate == 0 else epsilon_of([MechanismEvent(noise_multiplier, sample_rate, steps)], delta)


def find_noise_multiplier(sample_rate: float, steps: int, target_epsilon: float, target_delta: float) -> float:
    """Return the smallest noise multiplier, to 0.01 % of epsilon, whose `compute_epsilon` is at most the target.

    Args:
        sample_rate, steps: q, the probability that an author is in a step's batch, and the number of noisy steps.
        target_epsilon, target_delta: the target; epsilon never exceeds it.
    Raises:
        UserError (a ValueError): if an argument is out of range, no noise reaches the target, or hardly any is needed.
    """
    if not 0 < target_epsilon < math.inf or steps < 1 or not 0 < sample_rate <= 1 or not MIN_DELTA <= target_delta < 1:
        raise UserError(
            f"find_noise_multiplier: sample_rate {sample_rate}, steps {steps}, target_epsilon {target_epsilon} or target_delta "
            f"{target_delta} is out of range. The sample rate must be in (0, 1], steps at least 1, epsilon positive and finite, "
            f"delta in [{MIN_DELTA:g}, 1)"
        )
    check_delta([MechanismEvent(0.0, sample_rate, steps)], target_delta)

    def log_excess(sigma: float) -> float:
        """Return log(epsilon / target): at most 0 where the target is met; nearly linear in log sigma."""
        epsilon = compute_epsilon(sigma, sample_rate, steps, target_delta)
        return math.log(max(epsilon, 1e-12) / target_epsilon) if epsilon < math.inf else math.inf

    # Bracket: `high` meets the target, `low` does not. The search starts where the cheap bound meets it.
    high = 0.1
    while high < 1e3 and rdp_epsilon([MechanismEvent(high, sample_rate, steps)], target_delta) > target_epsilon:
        high *= 1.1
    while (at_high := log_excess(high)) > 0:
        high *= 2
        if high > 1e6:
            raise UserError(f"--target_epsilon {target_epsilon}: no noise reaches it at delta {target_delta}. Raise it")
    low = high / 1.2
    while (at_low := log_excess(low)) <= 0:
        if low < LEAST_NOISE:
            raise UserError(f"--target_epsilon {target_epsilon}: it needs hardly any noise. Lower it, to about 8")
        high, at_high, low = low, at_low, low / 1.2
    # Regula falsi on the logarithms, aimed just below the target and kept off the ends.
    while at_high < -1e-4 and high / low > 1 + 1e-5:
        weight = (at_low + 5e-5) / (at_low - at_high) if math.isfinite(at_low) else 0.5
        middle = math.exp(math.log(low) + min(0.95, max(0.05, weight)) * math.log(high / low))
        at_middle = log_excess(middle)
        if at_middle <= 0:
            high, at_high = middle, at_middle
        else:
            low, at_low = middle, at_middle
    return high


def format_guarantee(epsilon: Optional[float], delta: float) -> str:
    """Return the guarantee as one phrase; epsilon is rounded up."""
    if epsilon is None or math.isinf(epsilon):
        return "no privacy guarantee (epsilon is infinite)"
    return f"epsilon {format_epsilon(epsilon)} at delta {delta:.2g} (author level, add or remove one)"


def format_epsilon(epsilon: float) -> str:
    """Return epsilon for people: all digits that `round_up` leaves, with at least two decimals."""
    integer, _, decimals = f"{Decimal(repr(round_up(epsilon))):,f}".partition(".")
    return f"{integer}.{decimals:0<2}"
