"""accounting/balls_in_bins.py: estimates of delta against exact values, the range of draws, and what is refused."""

import math
import sys
from pathlib import Path

import numpy as np
import pytest
from mutation import catches
from numpy.testing import assert_allclose

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

from balls_in_bins import JUDGES

from author_dp.accounting import slot_certificates
from author_dp.accounting.accountant import compute_epsilon
from author_dp.accounting.balls_in_bins import (
    BallsInBinsTuples,
    MeanShift,
    SlotSegment,
    TiltedMixture,
    WorstCaseMixture,
    balls_in_bins_sums,
    log_mean_exp,
)
from author_dp.accounting.slot_certificates import CertificateClaim

DELTA = 1e-5
BANDS = np.array([0.8, 0.5, 0.3])
CLAIM = CertificateClaim(BANDS, 5, 13, 1.0, DELTA)  # two slots take part twice, three take part three times


def dense_sums(coefficients: np.ndarray, slots: int, steps: int) -> np.ndarray:
    """Return x_j from C itself, (slots, steps)."""
    c = sum(
        (np.diag(np.full(steps - i, value), -i) for i, value in enumerate(coefficients) if i < steps), np.zeros((steps, steps))
    )
    return np.array([c[:, slot::slots].sum(axis=1) for slot in range(slots)])


def plain_delta(epsilon: float, log_ratio: np.ndarray, added: bool) -> tuple[float, float]:
    """Return delta(epsilon) and its standard error, by outcomes without the author."""
    ratio = np.exp(log_ratio)
    values = np.maximum(0, 1 - math.exp(epsilon) * ratio if added else ratio - math.exp(epsilon))
    return float(values.mean()), float(values.std() / math.sqrt(len(values)))


# --- the estimates --------------------------------------------------------------------------------------------


@catches(
    "the weight is forgotten", "accounting.balls_in_bins.TiltedMixture.weigh", " * np.exp(loss + self.log_mean - log_tilt)", ""
)
@catches(
    "slots are drawn evenly",
    "accounting.balls_in_bins.BallsInBinsTuples.prepare",
    "np.cumsum(self._terms())",
    "np.cumsum(1 + 0 * self._terms())",
    name="n = 2, T = 2, b = 1: an integral",
)
@catches("the shift is not weighed", "accounting.balls_in_bins.MeanShift.weigh", "self.shift * inner + ", "")
@pytest.mark.parametrize("name", JUDGES)
def test_estimates_agree_with_exact_deltas(name):
    claim, sigma = JUDGES[name].claim_at(DELTA)
    try:
        estimates = claim._replace(delta=1e-30).estimates(sigma, 2**15, key=7)
    except ArithmeticError as error:  # estimates check their range
        pytest.fail(str(error))
    for direction, found in estimates.items():
        exact = JUDGES[name].exact(sigma, claim.epsilon, direction == "added")
        assert abs(found.mean - exact) <= max(5 * found.standard_error, 1e-9 * DELTA)
        assert found.standard_error < 0.05 * max(exact, DELTA)
        assert exact <= found.upper_bound(1e-6)


@catches(
    "the last steps are left out",
    "accounting.balls_in_bins.balls_in_bins_sums",
    "in range(steps):",
    "in range(steps - steps % slots):",
)
def test_estimates_agree_with_plain_sampling_of_all_steps():
    for epsilon in (0.5, 1.5):
        x = dense_sums(CLAIM.coefficients, CLAIM.slots, CLAIM.steps) / 1.5
        y = np.random.default_rng(0).normal(size=(100_000, CLAIM.steps))
        ratio = np.log(np.exp(y @ x.T - (x**2).sum(axis=1) / 2).mean(axis=1))
        for direction, found in CLAIM._replace(epsilon=epsilon).estimates(1.5, 2**16, key=3).items():
            delta, error = plain_delta(epsilon, ratio, direction == "added")
            assert abs(found.mean - delta) < 5 * math.hypot(error, found.standard_error)


def test_step_of_poisson_is_the_one_that_the_accountant_knows():
    claim, sigma = JUDGES["n = 77, T = 1, b = 8: a step of Poisson"].claim_at(DELTA)
    assert_allclose(compute_epsilon(sigma / 0.3, 1 / 77, 1, DELTA), claim.epsilon, rtol=5e-3)


@pytest.mark.parametrize(
    "coefficients, sample, loss",
    [
        ([1.0], [1.0, 0.0, 1.0, 0.0], 0.4337808304830272),
        ([1.0, 0.5], [1.0, 0.5, 1.0, 0.5], 0.9052974004451105),
        ([1.0, 0.5], [0.0, 1.0, 0.5, 1.0], 0.7802974004451104),
    ],
)
def test_losses_are_those_of_jax_privacy(coefficients, sample, loss):
    """The losses that its tests/experimental/monte_carlo/sample_generation_test.py expects, with 2 slots and 4 steps."""
    x = balls_in_bins_sums(np.array(coefficients), 2, 4)
    assert_allclose(log_mean_exp(x @ np.array(sample) - (x**2).sum(axis=1) / 2), loss, rtol=1e-12)


@pytest.mark.parametrize("added", [False, True])
def test_adaptive_gradients_in_any_direction_are_no_worse(added):
    """A gradient in two dimensions that turns, and shrinks, by the outcome before: Kahane's inequality."""
    generator, draws, coefficients, slots, steps = np.random.default_rng(0), 50_000, np.array([0.8, 0.6]), 2, 4
    y = generator.normal(size=(steps, draws, 2)) * 1.2
    gradients = [np.stack([np.ones(draws), np.zeros(draws)], axis=1)]
    for t in range(1, steps):
        angle = np.where(y[t - 1, :, 0] > 0, 0.3, 2.0) * t
        gradients.append(np.stack([np.cos(angle), np.sin(angle)], axis=1) * np.where(y[t - 1, :, 1] > 0, 1.0, 0.7)[:, None])
    log_ratios = []
    for slot in range(slots):
        total = np.zeros(draws)
        for t in range(slot, steps):
            v = coefficients[(t - slot) % slots] * gradients[t - (t - slot) % slots]
            total += ((y[t] * v).sum(axis=1) - (v**2).sum(axis=1) / 2) / 1.2**2
        log_ratios.append(total)
    delta, error = plain_delta(0.5, log_mean_exp(np.stack(log_ratios, axis=1)), added)
    worst = CertificateClaim(coefficients, slots, steps, 0.5, DELTA).estimates(1.2, 2**16, key=1)["added" if added else "removed"]
    assert 0.01 < delta < worst.mean - 5 * math.hypot(error, worst.standard_error)


# --- the range ------------------------------------------------------------------------------------------------


@catches(
    "the range is of a larger loss",
    "accounting.balls_in_bins.TiltedMixture.__init__",
    "(1 - copies * scale) * epsilon",
    "(1 - copies * scale) * 2 * epsilon",
)
@catches(
    "the range leaves out the mean shift",
    "accounting.balls_in_bins.MeanShift.__init__",
    "g * (self.half - epsilon)",
    "g * (0 - epsilon)",
)
@pytest.mark.parametrize("sigma", [0.6, 1.0, 2.0])
def test_range_holds_for_every_outcome(sigma):
    worst = WorstCaseMixture([SlotSegment(CLAIM.coefficients, CLAIM.slots, CLAIM.steps, sigma)])
    a = np.random.default_rng(0).normal(size=(20_000, CLAIM.slots)) * np.geomspace(1e-3, 10, 20_000)[:, None]
    level = np.linspace(-12, 12, 20_000)[:, None]
    for make in (TiltedMixture, MeanShift):
        for epsilon in (0.1, 1.0, 4.0):
            proposal = make(worst, epsilon)
            largest = math.exp(proposal.log_range)
            assert proposal.weigh(a + level).max() <= largest * (1 + 1e-9)
            if make is MeanShift or proposal.scale == 1:  # it is the least one: reached where all a_j are equal
                assert proposal.weigh(np.repeat(level, CLAIM.slots, axis=1)).max() > 0.99 * largest


@catches("overlaps of three slots left out", "accounting.balls_in_bins.BallsInBinsTuples.log_mean",
    " + w @ (s * (s @ (s * w[:, None]))) @ w", "", copies=3)  # fmt: skip
@catches("pairs counted once", "accounting.balls_in_bins.BallsInBinsTuples.log_mean", "terms += w @ by_slot", "pass", copies=2)
@pytest.mark.parametrize("copies", [1, 2, 3])
def test_sparse_mean_is_that_of_all_terms(copies):
    for slots, steps in ((5, 13), (9, 30), (8, 5)):
        (mixture,) = WorstCaseMixture([SlotSegment(BANDS, slots, steps, 0.9)]).mixtures
        for scale in (1.0, 2.5):
            tuples = BallsInBinsTuples(mixture, copies, scale)
            assert_allclose(tuples.log_mean(), math.log(tuples._terms().sum() / slots**copies), rtol=1e-12)


def test_draw_outside_of_its_range_is_an_error(monkeypatch):
    proposal = TiltedMixture(WorstCaseMixture([SlotSegment(CLAIM.coefficients, CLAIM.slots, CLAIM.steps, 1.0)]), 1.0)
    proposal.log_range -= 10
    with pytest.raises(ArithmeticError, match="above its bound"):
        slot_certificates.estimate_certified_delta(proposal, 1_000, np.random.default_rng(0))


# --- what is refused ------------------------------------------------------------------------------------------


@catches("a negative coefficient", "accounting.balls_in_bins.balls_in_bins_sums", " and (coefficients >= 0).all()", "")
@catches(
    "bands wider than an epoch",
    "accounting.balls_in_bins.balls_in_bins_sums",
    "<= slots:",
    ":",
    coefficients=[0.5, 0.5, 0.5],
    slots=2,
)
@pytest.mark.parametrize("coefficients, slots", [([0.9, -0.1], 4), ([0.9, math.nan], 4), ([0.5, 0.5, 0.5], 2)])
def test_worst_case_refuses_what_the_theorem_does_not_cover(coefficients, slots):
    with pytest.raises(ValueError, match=r"negative|bands"):
        balls_in_bins_sums(np.array(coefficients), slots, 8)


def test_slot_sums_are_sums_of_columns():
    for slots, steps in ((3, 3), (5, 13), (7, 4), (1, 5)):
        coefficients = BANDS[:slots]
        assert_allclose(balls_in_bins_sums(coefficients, slots, steps), dense_sums(coefficients, slots, steps))
