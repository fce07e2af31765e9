"""Certify (epsilon, delta) of balls-in-bins sampling by importance sampling, with an upper confidence bound on delta.

Guarantees: with a failure probability of at most delta / 100, which is part of delta, the steps of a certificate are
(epsilon, delta)-DP for add-or-remove-one adjacency. The failure probability is over the draws of the certificate alone, never
over data. Fewer steps than planned are post-processing of all of them, so they have the same guarantee.

How: noise is calibrated on some draws, and certified on others, whose key comes from the operating system once the noise is
fixed. Attempt i may fail with probability delta / 100 / 2^i; after one that does not pass there is more noise. The ledger's
header holds the key of every attempt, so that anybody can repeat it (`repeat_certificate`).

Example:

    >>> claim = CertificateClaim(toeplitz_coefficients(16, 154), slots=77, steps=154, epsilon=8.0, delta=5.1e-5)
    >>> certificate = make_certificate(claim, earlier=[])
    >>> certificate["noise_multiplier"]
    0.575

References:
    [1] Maurer and Pontil 2009, Empirical Bernstein Bounds and Sample Variance Penalization, arXiv 0907.3740 (Theorem 4)
"""

import math
import secrets
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Optional

import numpy as np

from author_dp.accounting.accountant import LEAST_NOISE
from author_dp.accounting.balls_in_bins import MeanShift, SlotSegment, TiltedMixture, WorstCaseMixture
from author_dp.accounting.banded_mf import BAND_CHOICES, NEGLIGIBLE_GAIN, prefix_sum_rmse, toeplitz_coefficients
from author_dp.errors import UserError

FAILURE_SHARE = 1e-2  # of delta: the failure probability of a certificate, all attempts together
MORE_NOISE = 1.01  # after an attempt that failed
MAX_ATTEMPTS = 20
MAX_SLOTS = 2_048  # steps of an epoch: the time of a certificate grows with their square
MAX_CELLS = 2**29  # draws x slots of a certificate: about a minute in each direction
MAX_SIGMA = 1e4  # largest noise multiplier that is tried
NEGLIGIBLE = 1e-3  # of delta: a range below it is a bound by itself, and nothing is drawn
ROUNDING = 1e-6  # of delta: float64 rounding, far above that of sums of at most MAX_DRAWS values
SLACK = 0.03  # of delta: what the confidence bound may add, if MAX_DRAWS allow
ROUGH_DRAWS, CALIBRATION_DRAWS, MIN_DRAWS, MAX_DRAWS = 2**12, 2**16, 2**14, 2**22
CHUNK = 2**11  # draws at once
DIRECTIONS: dict[str, type[TiltedMixture] | type[MeanShift]] = {"removed": TiltedMixture, "added": MeanShift}


class CertificateEstimate(NamedTuple):
    """What draws say of delta(epsilon) in one direction."""

    draws: int
    mean: float
    variance: float  # of one draw, unbiased
    log_range: float  # every draw is in [0, exp(log_range)]

    @property
    def standard_error(self) -> float:
        return math.sqrt(self.variance / max(1, self.draws))

    def deviation(self, failure_probability: float, draws: int) -> float:
        """Return how far the mean of so many draws may be from delta, on one side, by the empirical Bernstein bound [1]."""
        log_term = math.log(2 / failure_probability)
        return math.sqrt(2 * self.variance * log_term / draws) + 7 * math.exp(self.log_range) * log_term / (3 * (draws - 1))

    def upper_bound(self, failure_probability: float) -> float:
        """Return an upper bound on delta(epsilon) that fails with at most that probability: the range, or the draws' bound."""
        largest = math.exp(self.log_range)
        if not self.draws:
            return largest
        return min(largest, (self.mean + self.deviation(failure_probability, self.draws)) * (1 + ROUNDING))


def estimate_certified_delta(
    proposal: TiltedMixture | MeanShift, draws: int, generator: np.random.Generator
) -> CertificateEstimate:
    """Estimate delta(epsilon) in the proposal's direction.

    Raises:
        ArithmeticError: if a draw is outside of the range that is proven for it.
    """
    total = squares = 0.0
    largest = math.exp(proposal.log_range)
    for size in (min(CHUNK, draws - start) for start in range(0, draws, CHUNK)):
        values = proposal.weigh(proposal.draw(size, generator))
        if not (values.min() >= 0 and values.max() <= largest * (1 + 1e-9)):
            raise ArithmeticError(f"weight times loss is {values.max():.6g}, above its bound {largest:.6g}")
        total, squares = total + float(values.sum()), squares + float(values @ values)
    mean = total / draws
    return CertificateEstimate(draws, mean, max(0.0, squares - draws * mean**2) / (draws - 1), proposal.log_range)


class CertificateAttempt(NamedTuple):
    """One certificate: sampled with its own key once the noise was fixed."""

    noise_multiplier: float
    key: int  # of Philox: with it, anybody can repeat the draws
    failure_probability: float  # of both directions together
    bounds: dict[str, float]  # on delta(epsilon), by direction
    passed: bool


class CertificateClaim(NamedTuple):
    """What is certified: target, C's coefficients, n and T, and the steps of earlier trainings, which count too."""

    coefficients: np.ndarray
    slots: int
    steps: int
    epsilon: float
    delta: float
    earlier: tuple[SlotSegment, ...] = ()

    @property
    def all_slots(self) -> int:
        """The number of slots of all segments."""
        return self.slots + sum(segment.slots for segment in self.earlier)

    def estimates(self, noise_multiplier: float, draws: int, key: int) -> dict[str, CertificateEstimate]:
        """Estimate delta(epsilon) in both directions. Nothing is drawn where the range alone is negligible."""
        worst = WorstCaseMixture([*self.earlier, SlotSegment(self.coefficients, self.slots, self.steps, noise_multiplier)])
        generator, found = np.random.Generator(np.random.Philox(key=key)), {}
        for direction, make in DIRECTIONS.items():
            proposal = make(worst, self.epsilon)
            negligible = proposal.log_range <= math.log(NEGLIGIBLE * self.delta)
            found[direction] = (
                CertificateEstimate(0, 0.0, 0.0, proposal.log_range)
                if negligible
                else estimate_certified_delta(proposal, draws, generator)
            )
        return found


def attempt_certificate(
    claim: CertificateClaim, noise_multiplier: float, number: int, draws: int, key: Optional[int] = None
) -> CertificateAttempt:
    """Try to certify a noise multiplier with fresh draws. Attempt i is wrong with probability FAILURE_SHARE delta / 2^i at most.

    So a noise multiplier with a larger delta passes, in any attempt, with probability FAILURE_SHARE delta at most. That is added
    to delta, as nothing is promised then.

    Args:
        number: i, from 1.
        draws: of each direction.
        key: of an attempt to repeat; by default a new one.
    """
    failure_probability = FAILURE_SHARE * claim.delta / 2**number
    key = secrets.randbits(128) if key is None else key
    found = claim.estimates(noise_multiplier, draws, key)
    bounds = {direction: each.upper_bound(failure_probability / len(found)) for direction, each in found.items()}
    passed = max(bounds.values()) + FAILURE_SHARE * claim.delta <= claim.delta
    return CertificateAttempt(noise_multiplier, key, failure_probability, bounds, passed)


def certify_noise_multiplier(claim: CertificateClaim, noise_multiplier: float, draws: int) -> list[CertificateAttempt]:
    """Return the attempts to certify a noise multiplier, the last of which passed: each with more noise than the one before.

    Raises:
        ArithmeticError: if MAX_ATTEMPTS fail.
    """
    attempts: list[CertificateAttempt] = []
    while len(attempts) < MAX_ATTEMPTS:
        attempts.append(attempt_certificate(claim, noise_multiplier * MORE_NOISE ** len(attempts), len(attempts) + 1, draws))
        if attempts[-1].passed:
            return attempts
    raise ArithmeticError(
        f"no certificate in {MAX_ATTEMPTS} attempts, up to noise multiplier {attempts[-1].noise_multiplier:.4f}"
    )


def certificate_draws(claim: CertificateClaim, found: Iterable[CertificateEstimate]) -> int:
    """Return how many draws keep the confidence bound of the first attempt within SLACK of delta, if that takes no minutes."""
    draws, most = MIN_DRAWS, min(MAX_DRAWS, MAX_CELLS // claim.all_slots)
    while draws < most and any(
        each.draws and each.deviation(FAILURE_SHARE * claim.delta / 4, draws) > SLACK * claim.delta for each in found
    ):
        draws *= 2
    return draws


class CertificateCalibration:
    """What a certificate will probably say of a noise multiplier. No guarantee rests on it, nor on its draws.

    Args:
        draws: of each noise multiplier, always the same ones.
    """

    def __init__(self, claim: CertificateClaim, draws: int = CALIBRATION_DRAWS):
        self.claim, self.key = claim, secrets.randbits(128)
        self.draws = max(ROUGH_DRAWS, min(draws, MAX_CELLS // claim.all_slots // 8))

    def log_excess(self, noise_multiplier: float, epsilon: Optional[float] = None) -> tuple[float, int]:
        """Return log(what a certificate will probably bound / what it may be), nearly linear in log sigma, and its draws.

        Args:
            epsilon: another one than the claim's.
        """
        claim = self.claim if epsilon is None else self.claim._replace(epsilon=epsilon)
        found = claim.estimates(noise_multiplier, self.draws, self.key).values()
        draws, bounds = certificate_draws(claim, found), []
        for each in found:
            margin = 2 * each.standard_error * math.sqrt(1 + each.draws / draws)  # of both estimates
            bound = each.mean + margin + each.deviation(FAILURE_SHARE * claim.delta / 4, draws) if each.draws else math.inf
            bounds.append(min(bound, math.exp(each.log_range)))
        return math.log(max(*bounds, 1e-300) / ((1 - FAILURE_SHARE) * claim.delta)), draws

    def find(self, start: float, tolerance: float) -> tuple[float, int]:
        """Return a noise multiplier that will probably pass, and the number of draws for its certificate.

        Args:
            start: a first guess of the noise multiplier.
            tolerance: of delta, relative.
        Raises:
            UserError: if no noise is enough, or hardly any is needed.
        """
        high, (at_high, draws), factor = start, self.log_excess(start), 1.1
        while at_high > 0:
            high, factor = high * factor, factor**1.3
            if high > MAX_SIGMA:
                raise self.no_noise_error()
            at_high, draws = self.log_excess(high)
        low = high / 1.1
        at_low, needed = self.log_excess(low)
        while at_low <= 0:
            if low < LEAST_NOISE:
                raise UserError(f"--target_epsilon {self.claim.epsilon:g}: it needs hardly any noise. Lower it, to about 8")
            high, at_high, draws, low = low, at_low, needed, low / 1.1
            at_low, needed = self.log_excess(low)
        while at_high < -tolerance and high / low > 1.0005:
            weight = min(0.9, max(0.1, (at_low + 0.4 * tolerance) / (at_low - at_high)))
            middle = low * (high / low) ** weight
            at_middle, needed = self.log_excess(middle)
            if at_middle <= 0:
                high, at_high, draws = middle, at_middle, needed
            else:
                low, at_low = middle, at_middle
        return high, draws

    def no_noise_error(self) -> UserError:
        target = f"--target_epsilon {self.claim.epsilon:g}: no noise can be certified for it at delta {self.claim.delta:.3g}"
        if self.claim.earlier:
            return UserError(f"{target}, with the steps that the ledger has. Raise it, or use the model of the newest checkpoint")
        return UserError(f"{target}. Raise --target_epsilon or --target_delta, or use --sampling poisson")


def guess_slot_noise_multiplier(claim: CertificateClaim) -> float:
    """Return a noise multiplier near that of one Gaussian step for each epoch (Dwork and Roth 2014, Theorem A.1)."""
    epochs = -(-claim.steps // claim.slots)
    return max(0.2, 0.4 * math.sqrt(2 * epochs * math.log(1.25 / claim.delta)) / claim.epsilon)


# --- the certificate of a run -----------------------------------------------------------------------------------


def make_certificate(claim: CertificateClaim, earlier: Sequence[tuple[str, int]]) -> dict[str, Any]:
    """Calibrate noise and certify it; return what the ledger's header holds.

    Args:
        earlier: name and steps of each run behind `claim.earlier`.
    Raises:
        UserError: if no noise is enough, or hardly any is needed.
        ArithmeticError: if no attempt passes.
    """
    sigma, draws = CertificateCalibration(claim).find(guess_slot_noise_multiplier(claim), 5e-3)
    attempts = certify_noise_multiplier(claim, sigma, draws)
    return {
        "epsilon": claim.epsilon,
        "delta": claim.delta,
        "steps": claim.steps,
        "earlier": [list(each) for each in earlier],
        "noise_multiplier": attempts[-1].noise_multiplier,
        "coefficients": claim.coefficients.tolist(),
        "failure_probability": FAILURE_SHARE * claim.delta,
        "draws": draws,
        "attempts": [{**each._asdict(), "key": f"{each.key:032x}"} for each in attempts],
        "numpy": np.__version__,  # whose random numbers the keys are for
    }


def claim_of_certificate(header: dict[str, Any], earlier: Sequence[SlotSegment]) -> CertificateClaim:
    """Return what the certificate in a ledger's header is of."""
    made = header["certificate"]
    return CertificateClaim(
        np.array(made["coefficients"]), header["slots"], made["steps"], made["epsilon"], made["delta"], tuple(earlier)
    )


def slot_segment_of(header: dict[str, Any], steps: int) -> SlotSegment:
    """Return the first `steps` steps of the run with that header."""
    return SlotSegment(np.array(header["certificate"]["coefficients"]), header["slots"], steps, header["noise_multiplier"])


def repeat_certificate(header: dict[str, Any], earlier: Sequence[SlotSegment]) -> bool:
    """Return whether the last attempt of a certificate passes with its own draws, repeated by their key.

    Args:
        header: of the run, from the ledger.
        earlier: the segments of the runs before it.
    """
    made, claim = header["certificate"], claim_of_certificate(header, earlier)
    last, number = made["attempts"][-1], len(made["attempts"])
    if last["noise_multiplier"] != header["noise_multiplier"]:
        return False
    return attempt_certificate(claim, last["noise_multiplier"], number, made["draws"], int(last["key"], 16)).passed


def certify_epsilon(segments: Sequence[SlotSegment], delta: float, largest: float) -> float:
    """Return an epsilon of all these segments together, certified by fresh draws.

    Args:
        segments: of one training or of several, whose noise is what it is.
        largest: an epsilon that is known to hold, returned where no smaller one passes.
    """
    *earlier, last = segments
    claim = CertificateClaim(last.coefficients, last.slots, last.steps, largest, delta, tuple(earlier))
    calibration, low, high = CertificateCalibration(claim), 0.0, largest
    _, draws = calibration.log_excess(last.noise_multiplier)
    while high - low > 2e-3 * high:
        middle = (low + high) / 2
        excess, needed = calibration.log_excess(last.noise_multiplier, middle)
        low, high, draws = (middle, high, draws) if excess > 0 else (low, middle, needed)
    for number in range(1, MAX_ATTEMPTS + 1):
        if high < largest and attempt_certificate(claim._replace(epsilon=high), last.noise_multiplier, number, draws).passed:
            return high
        high *= MORE_NOISE
    return largest


def choose_slot_bands(claim: CertificateClaim, max_bands: int) -> int:
    """Return the number of bands, of BAND_CHOICES up to `max_bands`, with nearly the least prefix-sum error at that epsilon.

    Args:
        claim: its coefficients are replaced.
    """
    errors, sigma = {}, guess_slot_noise_multiplier(claim)
    for bands in [bands for bands in BAND_CHOICES if bands == 1 or bands <= min(max_bands, claim.steps, claim.slots)]:
        errors[bands], sigma = rough_slot_error(claim, bands, sigma)
    return min(bands for bands, error in errors.items() if error <= NEGLIGIBLE_GAIN * min(errors.values()))


def rough_slot_error(claim: CertificateClaim, bands: int, start: float) -> tuple[float, float]:
    """Return about the prefix-sum error with so many bands, in units of the clip norm, and the noise multiplier: by few draws.

    Args:
        claim: its coefficients are replaced.
        start: a first guess of the noise multiplier.
    """
    coefficients = toeplitz_coefficients(bands, claim.steps)
    with_bands = claim._replace(coefficients=coefficients)
    sigma, _ = CertificateCalibration(with_bands, ROUGH_DRAWS).find(start, 0.1)
    return sigma * prefix_sum_rmse(coefficients, claim.steps), sigma
