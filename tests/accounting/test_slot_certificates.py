"""accounting/slot_certificates.py: certificates hold with what is promised, for one training and for one that resumed."""

import json
import math

import numpy as np
import pytest
from mutation import catches
from numpy.testing import assert_allclose

from author_dp.accounting import slot_certificates
from author_dp.accounting.accountant import epsilon_of
from author_dp.accounting.balls_in_bins import SlotSegment, WorstCaseMixture, balls_in_bins_sums
from author_dp.accounting.banded_mf import prefix_sum_rmse, toeplitz_coefficients
from author_dp.accounting.events import slot_event
from author_dp.accounting.slot_certificates import CertificateAttempt, CertificateClaim, CertificateEstimate
from author_dp.errors import UserError

DELTA = 1e-5
BANDS = np.array([0.8, 0.5, 0.3])
CLAIM = CertificateClaim(BANDS, 5, 13, 1.0, DELTA)


# --- the bound and the attempts -------------------------------------------------------------------------------


def test_bound_is_that_of_the_paper():
    """Maurer and Pontil 2009, Theorem 4, for values in [0, 1], by hand; scaled by the range."""
    log_term = math.log(2 / 0.01)
    by_hand = 0.2 + math.sqrt(2 * 0.04 * log_term / 1_000) + 7 * log_term / (3 * 999)
    assert_allclose(CertificateEstimate(1_000, 0.2, 0.04, 0.0).upper_bound(0.01), by_hand, rtol=2e-6)
    assert_allclose(CertificateEstimate(1_000, 0.02, 0.0004, math.log(0.1)).upper_bound(0.01), by_hand / 10, rtol=2e-6)
    assert CertificateEstimate(1_000, 0.0, 0.0, 0.0).upper_bound(0.01) > 1 - 0.01 ** (1 / 1_000)  # what no value of 1 allows
    assert CertificateEstimate(0, 0.0, 0.0, math.log(0.1)).upper_bound(0.01) == pytest.approx(0.1)


@pytest.fixture
def bounds(monkeypatch):
    """Let estimates be certain; return what they are, by direction."""
    deltas = {"removed": 0.5 * DELTA, "added": 0.5 * DELTA}
    monkeypatch.setattr(
        CertificateClaim,
        "estimates",
        lambda *_: {name: CertificateEstimate(2**60, value, 0.0, math.log(2 * DELTA)) for name, value in deltas.items()},
    )
    return deltas


@catches(
    "the failure probability is not added",
    "accounting.slot_certificates.attempt_certificate",
    "+ FAILURE_SHARE * claim.delta <= claim.delta",
    "<= claim.delta",
)
@catches(
    "one direction only",
    "accounting.slot_certificates.attempt_certificate",
    "max(bounds.values())",
    'bounds["removed"]',
    direction="added",
)
@pytest.mark.parametrize("direction", ["removed", "added"])
def test_certificate_needs_both_directions_and_the_failure_probability(bounds, direction):
    assert slot_certificates.attempt_certificate(CLAIM, 1.0, 1, 2**14).passed
    bounds[direction] = 0.995 * DELTA
    assert not slot_certificates.attempt_certificate(CLAIM, 1.0, 1, 2**14).passed


@catches("every attempt has the same failure probability", "accounting.slot_certificates.attempt_certificate", " / 2**number", "")
@catches(
    "no more noise after a failure", "accounting.slot_certificates.certify_noise_multiplier", " * MORE_NOISE ** len(attempts)", ""
)
def test_attempts_share_the_failure_probability(bounds, monkeypatch):
    bounds["removed"] = 2 * DELTA
    attempts = []
    attempt = slot_certificates.attempt_certificate
    monkeypatch.setattr(slot_certificates, "attempt_certificate", lambda *args: attempts.append(attempt(*args)) or attempts[-1])
    with pytest.raises(ArithmeticError, match="no certificate in 20 attempts"):
        slot_certificates.certify_noise_multiplier(CLAIM, 1.0, 2**14)
    assert len(attempts) == 20 and all(a.noise_multiplier < b.noise_multiplier for a, b in zip(attempts, attempts[1:]))
    assert sum(each.failure_probability for each in attempts) <= DELTA / 100


@catches(
    "both directions fail with the probability of one", "accounting.slot_certificates.attempt_certificate", " / len(found)", ""
)
def test_directions_share_the_failure_probability(monkeypatch):
    asked = []
    monkeypatch.setattr(CertificateEstimate, "upper_bound", lambda self, probability: asked.append(probability) or 0.0)
    made = slot_certificates.attempt_certificate(CLAIM, 3.0, 1, 2**14)
    assert_allclose(sum(asked), made.failure_probability, rtol=1e-12)


@catches(
    "draws of the calibration are the certificate",
    "accounting.slot_certificates.attempt_certificate",
    "secrets.randbits(128)",
    "1",
)
def test_certificates_have_fresh_draws_that_their_key_repeats():
    first, second = (slot_certificates.attempt_certificate(CLAIM, 3.0, 1, 2**14) for _ in range(2))
    assert first.key != second.key and first.bounds["removed"] != second.bounds["removed"]
    repeated = CLAIM.estimates(3.0, 2**14, first.key)["removed"]
    assert repeated.upper_bound(first.failure_probability / 2) == first.bounds["removed"]


def test_calibrated_noise_passes_with_little_to_spare():
    claim = CertificateClaim(BANDS, 4, 9, 4.0, 1e-3)
    sigma, draws = slot_certificates.CertificateCalibration(claim).find(1.0, 5e-3)
    last = slot_certificates.certify_noise_multiplier(claim, sigma, draws)[-1]
    delta = claim.estimates(last.noise_multiplier, 2**17, key=5)["removed"].mean
    assert last.passed and 0.85 * claim.delta < delta < claim.delta * (1 - slot_certificates.FAILURE_SHARE)


# --- the certificate of a run ---------------------------------------------------------------------------------

LATER = CertificateClaim(
    BANDS, 4, 6, 2.0, 1e-3, (SlotSegment(BANDS[:2], 3, 5, 2.0),)
)  # two slots have no step of the second training


def joint_delta(claim: CertificateClaim, sigma: float, added: bool) -> tuple[float, float]:
    """Return delta and its standard error by plain sampling of all steps, with the mixture over pairs of slots."""
    generator, log_ratios = np.random.default_rng(0), 0.0
    for coefficients, slots, steps, noise in [*claim.earlier, (claim.coefficients, claim.slots, claim.steps, sigma)]:
        x = balls_in_bins_sums(coefficients, slots, steps) / noise
        y = generator.normal(size=(200_000, steps))
        log_ratios = log_ratios + np.log(np.exp(y @ x.T - (x**2).sum(axis=1) / 2).mean(axis=1))
    ratio, factor = np.exp(log_ratios), math.exp(claim.epsilon)
    values = np.maximum(0, 1 - factor * ratio if added else ratio - factor)
    return float(values.mean()), float(values.std() / math.sqrt(len(values)))


@catches(
    "losses of the steps before are left out", "accounting.slot_certificates.CertificateClaim.estimates", "*self.earlier, ", ""
)
@catches("the largest loss of all trainings", "accounting.balls_in_bins.WorstCaseMixture.log_ratio", "np.sum(", "np.max(")
def test_resumed_training_adds_its_loss(monkeypatch):
    claim = LATER._replace(epsilon=1.0)
    for direction, found in claim.estimates(1.3, 2**17, key=2).items():
        delta, error = joint_delta(claim, 1.3, direction == "added")
        assert abs(found.mean - delta) < 5 * math.hypot(error, found.standard_error)


@pytest.mark.parametrize("sigma", [0.8, 1.5])
def test_range_of_several_segments_holds_for_every_outcome(sigma):
    worst = WorstCaseMixture([*LATER.earlier, SlotSegment(LATER.coefficients, LATER.slots, LATER.steps, sigma)])
    generator = np.random.default_rng(0)
    a = generator.normal(size=(20_000, 7)) * np.geomspace(1e-3, 10, 20_000)[:, None] + np.linspace(-12, 12, 20_000)[:, None]
    for make in slot_certificates.DIRECTIONS.values():
        for epsilon in (0.5, 2.0):
            proposal = make(worst, epsilon)
            assert proposal.weigh(generator.permuted(a, axis=0)).max() <= math.exp(proposal.log_range) * (1 + 1e-9)


def header_of(claim: CertificateClaim, **changed) -> dict:
    certificate = slot_certificates.make_certificate(claim, [])
    return {"slots": claim.slots, "noise_multiplier": certificate["noise_multiplier"], "certificate": certificate, **changed}


@catches("a certificate of other noise", "accounting.slot_certificates.repeat_certificate",
    'last["noise_multiplier"] != header["noise_multiplier"]', "False")  # fmt: skip
@catches("draws of another key", "accounting.slot_certificates.repeat_certificate", 'int(last["key"], 16)', "None")
def test_certificate_is_repeated_by_its_key(monkeypatch):
    header = json.loads(json.dumps(header_of(CertificateClaim(BANDS, 4, 9, 4.0, 1e-3))))
    assert slot_certificates.repeat_certificate(header, [])
    last = header["certificate"]["attempts"][-1]
    made = slot_certificates.attempt_certificate(
        slot_certificates.claim_of_certificate(header, []), last["noise_multiplier"], 1, 2**14, int(last["key"], 16)
    )
    with monkeypatch.context() as patched:
        patched.setattr(slot_certificates, "attempt_certificate", lambda *args: seen.append(args) or made)
        seen: list = []
        slot_certificates.repeat_certificate(header, [])
    number = len(header["certificate"]["attempts"])  # the first one can fail by chance
    assert seen[0][2:] == (number, header["certificate"]["draws"], int(last["key"], 16)) and len(last["key"]) == 32
    assert not slot_certificates.repeat_certificate({**header, "noise_multiplier": 0.9 * header["noise_multiplier"]}, [])
    assert not slot_certificates.repeat_certificate(
        header, [SlotSegment(BANDS, 4, 9, header["noise_multiplier"])]
    )  # beside other steps
    for name, value in (("steps", 20), ("epsilon", 2.0), ("delta", 1e-4)):
        assert not slot_certificates.repeat_certificate({**header, "certificate": {**header["certificate"], name: value}}, [])


@catches("noise of the first attempt", "accounting.slot_certificates.make_certificate", '"noise_multiplier": attempts[-1]',
    '"noise_multiplier": attempts[0]')  # fmt: skip
def test_noise_is_that_of_the_attempt_that_passed(monkeypatch):
    attempts = [CertificateAttempt(sigma, 1, 1e-5, {}, passed) for sigma, passed in ((1.0, False), (1.01, True))]
    monkeypatch.setattr(slot_certificates, "certify_noise_multiplier", lambda *_: attempts)
    made = slot_certificates.make_certificate(CertificateClaim(BANDS, 4, 9, 4.0, 1e-3), [])
    assert made["noise_multiplier"] == 1.01 and [each["passed"] for each in made["attempts"]] == [False, True]


@pytest.mark.parametrize(
    ("claim", "words"),
    [
        (CertificateClaim(BANDS, 4, 9, 1e-3, 1e-30), "no noise can be certified .* --sampling poisson"),
        (CertificateClaim(BANDS, 4, 9, 5e6, 1e-3), "hardly any noise"),
    ],
)
def test_targets_that_cannot_be_certified_are_refused(claim, words):
    with pytest.raises(UserError, match=f"--target_epsilon .*{words}"):
        slot_certificates.make_certificate(claim, [])


@pytest.mark.integration
def test_noise_of_a_resumed_training_counts_the_steps_before():
    alone = slot_certificates.make_certificate(LATER._replace(earlier=()), [])
    after = slot_certificates.make_certificate(LATER, [("first", 5)])
    assert after["noise_multiplier"] > 1.05 * alone["noise_multiplier"] and after["earlier"] == [["first", 5]]
    delta, error = joint_delta(LATER, after["noise_multiplier"], added=False)
    assert delta < LATER.delta + 5 * error
    spent = LATER._replace(earlier=(SlotSegment(BANDS, 3, 9, 0.3),))
    with pytest.raises(UserError, match="--target_epsilon 2: no noise can be certified"):
        slot_certificates.make_certificate(spent, [("first", 9)])


@pytest.mark.integration
def test_auto_takes_the_bands_with_the_least_error():
    claim = CertificateClaim(np.ones(1), 40, 80, 8.0, DELTA)
    chosen, errors = slot_certificates.choose_slot_bands(claim, 64), {}
    for bands in (1, 4, chosen):
        with_bands = claim._replace(coefficients=toeplitz_coefficients(bands, 80))
        errors[bands] = slot_certificates.CertificateCalibration(with_bands).find(0.6, 0.05)[0] * prefix_sum_rmse(
            with_bands.coefficients, 80
        )
    assert 8 <= chosen <= 32 and errors[chosen] == min(errors.values()) < 0.7 * errors[1]
    assert (
        slot_certificates.choose_slot_bands(claim, 4) == 4
        and slot_certificates.choose_slot_bands(claim._replace(slots=3), 64) == 2
    )


@pytest.mark.integration
@catches(
    "the epsilon of the last training alone", "accounting.slot_certificates.certify_epsilon", "delta, tuple(earlier))", "delta)"
)
@catches(
    "calibration draws are the certificate of epsilon", "accounting.slot_certificates.certify_epsilon", ".passed:", " or True:"
)
def test_epsilon_of_several_trainings_is_certified(monkeypatch):
    segments = [*LATER.earlier, SlotSegment(BANDS, 4, 6, 1.5)]
    known = epsilon_of([slot_event(2.0, 3, 5), slot_event(1.5, 4, 6)], 1e-3)
    epsilon = slot_certificates.certify_epsilon(segments, 1e-3, known)
    delta, error = joint_delta(LATER._replace(epsilon=epsilon), 1.5, added=False)
    assert 0.9e-3 - 5 * error < delta < 1e-3 + 5 * error and epsilon < 0.9 * known
    assert slot_certificates.certify_epsilon(segments, 1e-3, 0.5 * epsilon) == 0.5 * epsilon
    monkeypatch.setattr(slot_certificates, "attempt_certificate", lambda *args: CertificateAttempt(1.5, 1, 1e-5, {}, False))
    assert slot_certificates.certify_epsilon(segments, 1e-3, known) == known


# --- the bound by events --------------------------------------------------------------------------------------


@catches("fewer columns than an author has", "accounting.events.slot_event", "-(-steps // slots)", "max(1, steps // slots)",
    steps=13)  # fmt: skip
@catches("the rate of one step", "accounting.events.slot_event", "min(1.0, steps / slots)", "1 / slots", steps=3)
@pytest.mark.parametrize("steps", [3, 5, 13])
def test_events_cost_at_least_as_much(steps):
    event = slot_event(1.2, 5, steps)
    assert event == (1.2, min(1.0, steps / 5), math.ceil(steps / 5))
    epsilon = epsilon_of([event], 1e-3)
    for found in CertificateClaim(BANDS, 5, steps, epsilon, 1e-3).estimates(1.2, 2**16, key=1).values():
        assert found.mean - 5 * found.standard_error <= 1e-3
