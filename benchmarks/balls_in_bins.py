"""Does balls-in-bins sampling need less noise than cyclic Poisson sampling, and does its certificate hold? No network, no GPU.

python benchmarks/balls_in_bins.py judges           # the estimates against exact values, in both directions
python benchmarks/balls_in_bins.py certificate      # the original example's run: noise multiplier, keys, bounds and seconds
python benchmarks/balls_in_bins.py compare          # the error of summed updates, against cyclic Poisson sampling
"""

import argparse
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from common import main, option, print_head, print_row, table, timed
from scipy.special import ndtr

from author_dp.accounting.accountant import find_noise_multiplier
from author_dp.accounting.banded_mf import BAND_CHOICES, prefix_sum_rmse, toeplitz_coefficients
from author_dp.accounting.events import cyclic_event
from author_dp.accounting.gaussian import gaussian_delta
from author_dp.accounting.slot_certificates import FAILURE_SHARE, CertificateClaim, make_certificate

# --- judges ---------------------------------------------------------------------------------------------------

Exact = Callable[[float, float, bool], float]  # noise multiplier, epsilon, whether the author is added -> delta


class Judge(NamedTuple):
    """A case whose delta is known otherwise."""

    coefficients: np.ndarray
    slots: int
    steps: int
    epsilon: float
    exact: Exact

    def claim_at(self, delta: float) -> tuple[CertificateClaim, float]:
        """Return the claim, and the noise multiplier whose larger delta is `delta`."""
        low, high = 0.05, 50.0
        for _ in range(30):
            middle = math.sqrt(low * high)
            above = max(self.exact(middle, self.epsilon, added) for added in (False, True)) > delta
            low, high = (middle, high) if above else (low, middle)
        return CertificateClaim(self.coefficients, self.slots, self.steps, self.epsilon, delta), high


def call(mean: np.ndarray, strike: np.ndarray, deviation: float) -> np.ndarray:
    """Return E (X - strike)_+ of a lognormal X with that mean, and that standard deviation of its logarithm (Black-Scholes)."""
    positive = np.maximum(strike, 1e-300)
    d = (np.log(mean) - np.log(positive)) / deviation + deviation / 2
    return np.where(strike <= 0, mean - strike, mean * ndtr(d) - positive * ndtr(d - deviation))


def two_steps_delta(coefficients: np.ndarray, sigma: float, epsilon: float, added: bool) -> float:
    """Return delta of two slots and two steps: given the second outcome, the first has a closed form; one integral is left."""
    first, second = np.append(coefficients, 0.0)[:2] / sigma  # x_0 is (c_0, c_1), x_1 is (0, c_0)
    z = np.linspace(-40, 40, 20_001)
    density = np.exp(-z * z / 2) / math.sqrt(2 * math.pi)
    other, mean = np.exp(first * z - first**2 / 2) / 2, np.exp(second * z - second**2 / 2) / 2
    if added:  # e^epsilon (K - X)_+ is a call minus the forward
        strike = math.exp(-epsilon) - other
        inner = math.exp(epsilon) * (call(mean, strike, first) - mean + strike) * (strike > 0)
    else:
        inner = call(mean, math.exp(epsilon) - other, first)
    return float(np.sum(density * inner) * (z[1] - z[0]))


def poisson_delta(slots: int, sigma: float, epsilon: float, added: bool) -> float:
    """Return delta of a single step, which is one of Poisson sampling with q = 1 / n: 1 - q + q X with a lognormal X."""
    rate = 1 / slots
    strike = (math.expm1(-epsilon if added else epsilon) + rate) / rate
    above = rate * float(call(np.array(1.0), np.array(strike), 1 / sigma))
    return math.exp(epsilon) * max(0.0, above - rate + rate * strike) * (strike > 0) if added else above


ONE, BANDS = np.ones(1), np.array([0.8, 0.6])
JUDGES = {
    "n = 1, T = 4: one Gaussian": Judge(ONE, 1, 4, 8.0, lambda s, epsilon, _: float(gaussian_delta(2 / s, epsilon))),
    "n = 2, T = 2, b = 1: an integral": Judge(ONE, 2, 2, 2.0, lambda *case: two_steps_delta(ONE, *case)),
    "n = 2, T = 2, b = 2: an integral": Judge(BANDS, 2, 2, 2.0, lambda *case: two_steps_delta(BANDS, *case)),
    "n = 2, T = 2, b = 2, epsilon 0.2": Judge(BANDS, 2, 2, 0.2, lambda *case: two_steps_delta(BANDS, *case)),
    "n = 3, T = 1: a step of Poisson": Judge(ONE, 3, 1, 0.2, lambda *case: poisson_delta(3, *case)),
    "n = 77, T = 1, b = 8: a step of Poisson": Judge(
        np.full(8, 0.3), 77, 1, 2.0, lambda s, *case: poisson_delta(77, s / 0.3, *case)
    ),
}


@table(option("--draws", type=int, default=2**20))
def judges(args: argparse.Namespace) -> None:
    """Estimates of delta against exact values, in both directions, at the deltas of the demo and of the original example.

    The interval is two-sided, by the same bound as in a certificate; it fails with a probability of 1e-6.
    """
    print_head("judge", "author", "noise multiplier", "exact delta", "estimate", "standard errors apart", "interval", "inside")
    for delta in (1 / 19_600, 1 / 304_279):
        for name, judge in JUDGES.items():
            claim, sigma = judge.claim_at(delta)
            claim = claim._replace(delta=1e-30)  # nothing is negligible
            for direction, found in claim.estimates(sigma, args.draws, key=1).items():
                exact = judge.exact(sigma, judge.epsilon, direction == "added")
                # Where the range is below that delta, nothing is drawn, and the interval is the range.
                deviation = found.deviation(1e-6, found.draws) if found.draws else math.exp(found.log_range)
                apart = (found.mean - exact) / found.standard_error if found.variance else 0.0
                inside = "yes" if abs(found.mean - exact) <= deviation else "NO"
                cells = (f"{exact:.4g}", f"{found.mean:.4g}", f"{apart:.1f}", f"{found.mean:.4g} ± {deviation:.2g}", inside)
                print_row(name, direction, f"{sigma:.4f}", *cells)


# --- certificates ---------------------------------------------------------------------------------------------


def whole_slots(authors: int, batch: int) -> int:
    """Return n, the whole number of steps of an epoch, from public numbers: N / B rounded up.

    The expected batch is N / n, at most B. That constant is the divisor of the sums.
    """
    return -(-authors // batch)


@table(
    option("--authors", type=int, default=304_279),
    option("--batch", type=int, default=1_024),
    option("--steps", type=int, default=894),
    option("--epsilon", type=float, default=8.0),
    option("--bands", type=int, nargs="+", default=[8, 16, 32, 64]),
)
def certificate(args: argparse.Namespace) -> None:
    """Certificates of a run for several numbers of bands: the original example's run by default, delta 1 / N.

    A key repeats the draws of its attempt. Bounds are on delta(epsilon), in units of delta; with the failure probability, a
    hundredth of delta, they are at most 1.
    """
    slots, delta = whole_slots(args.authors, args.batch), 1 / args.authors
    print(f"n = {slots}, T = {args.steps}, epsilon {args.epsilon:g}, delta {delta:.4g}, failures {FAILURE_SHARE * delta:.2g}\n")
    print_head("b", "attempt", "noise multiplier", "fails with", "author removed", "author added", "draws", "key", "seconds")
    for bands in args.bands:
        claim = CertificateClaim(toeplitz_coefficients(bands, args.steps), slots, args.steps, args.epsilon, delta)
        seconds, made = timed(lambda claim=claim: make_certificate(claim, []))
        for number, attempt in enumerate(made["attempts"], 1):
            bounds = (f"{bound / delta:.3g}" for bound in attempt["bounds"].values())
            cells = (f"{attempt['noise_multiplier']:.4f}", f"{attempt['failure_probability']:.2g}", *bounds)
            print_row(bands, number, *cells, f"{made['draws']:,}", attempt["key"], f"{seconds:.1f}")


# --- the comparison -------------------------------------------------------------------------------------------

RUNS = {  # expected batch, authors, steps
    "the demo, 2 epochs": (256, 19_600, 154),
    "10,000 authors, 3 epochs": (256, 10_000, 120),
    "the original example, 3 epochs": (1_024, 304_279, 894),
}
COMPARED = (8, 16, 32)


def cyclic_noise(rate: float, steps: int, bands: int, epsilon: float, delta: float) -> float:
    """Return the noise multiplier of cyclic Poisson sampling at that epsilon."""
    event = cyclic_event(0, rate, steps, bands)
    return find_noise_multiplier(event.sample_rate, event.steps, epsilon, delta)


@table(
    option("--runs", type=int, nargs="+", default=[0, 1], choices=range(len(RUNS)), help="places of the runs in RUNS"),
    option("--epsilon", type=float, nargs="+", default=[8.0, 2.0, 1.0]),
)
def compare(args: argparse.Namespace) -> None:
    """The error of prefix sums over that of independent noise at one epsilon, as `accounting_and_data.py noise_bands` prints it.

    Balls-in-bins sampling has certified noise, and its error is counted at its own expected batch N / n, which is at most B. The
    last two columns are the least errors: of cyclic Poisson sampling over 1 to 32 bands, of balls-in-bins over those printed.
    """
    heads = ("run", "epsilon", "b", "noise multiplier, cyclic", "balls-in-bins", "error, cyclic", "balls-in-bins", "lower by")
    print_head(*heads, "attempts", "draws", "seconds", "least, cyclic", "least, balls-in-bins")
    for name, (batch, authors, steps) in [list(RUNS.items())[place] for place in args.runs]:
        slots, rate, delta = whole_slots(authors, batch), batch / authors, 1 / authors
        for epsilon in args.epsilon:
            independent = find_noise_multiplier(rate, steps, epsilon, delta) * prefix_sum_rmse(np.ones(1), steps)
            cyclic, bins, rows = {}, {}, []
            for bands in [bands for bands in BAND_CHOICES if bands <= max(COMPARED)]:
                coefficients = toeplitz_coefficients(bands, steps)
                factor = prefix_sum_rmse(coefficients, steps) / independent
                sigma = cyclic_noise(rate, steps, bands, epsilon, delta)
                cyclic[bands] = sigma * factor
                if bands not in COMPARED:
                    continue
                claim = CertificateClaim(coefficients, slots, steps, epsilon, delta)
                seconds, made = timed(lambda claim=claim: make_certificate(claim, []))
                mine = made["noise_multiplier"]
                bins[bands] = mine * factor * slots * rate
                errors = (f"{cyclic[bands]:.3f}", f"{bins[bands]:.3f}", f"{1 - bins[bands] / cyclic[bands]:.0%}")
                noise = (f"{sigma:.3f}", f"{mine:.3f}")
                rows.append(
                    (name, f"{epsilon:g}", bands, *noise, *errors, len(made["attempts"]), f"{made['draws']:,}", f"{seconds:.0f}")
                )
            least = [f"{min(errors.values()):.3f} at {min(errors, key=errors.get)}" for errors in (cyclic, bins)]
            for row in rows:
                print_row(*row, *least)


if __name__ == "__main__":
    main(__doc__, judges, certificate, compare)
