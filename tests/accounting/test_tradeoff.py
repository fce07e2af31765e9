"""tradeoff: compared with dp-accounting's delta at each epsilon, and with closed forms."""

import numpy as np
import pytest
from conftest import make_trainer, read_report
from dp_accounting.pld.privacy_loss_distribution import from_gaussian_mechanism
from scipy.special import ndtr, ndtri

from author_dp.accounting.accountant import epsilon_of
from author_dp.accounting.events import MechanismEvent
from author_dp.accounting.tradeoff import FALSE_POSITIVE_RATES, PrivacyProfile, attack_bounds, bounds_of_guarantee, gdp_mu_at
from author_dp.outputs.guarantee import guarantee_attack_rows, guarantee_in_words
from author_dp.outputs.model_card import model_card
from author_dp.outputs.report import write_report

SETTINGS = [(0.65, 256 / 19_589, 154, 5e-5), (1.0, 0.01, 1_000, 1e-5), (2.0, 0.1, 500, 1e-6), (5.0, 0.9, 100, 1e-5)]


def dp_accounting_distribution(sigma, rate, steps, pessimistic=True):
    options = {"sampling_prob": rate, "value_discretization_interval": 1e-4, "use_connect_dots": pessimistic}
    return from_gaussian_mechanism(sigma, pessimistic_estimate=pessimistic, **options).self_compose(steps)


@pytest.mark.integration
@pytest.mark.parametrize(("sigma", "rate", "steps", "delta"), SETTINGS)
def test_true_positive_rates_agree_with_dp_accounting(sigma, rate, steps, delta):
    bounds = attack_bounds([MechanismEvent(sigma, rate, steps)], delta)
    epsilons = np.linspace(0, 12, 4_001)
    deltas = dp_accounting_distribution(sigma, rate, steps).get_delta_for_epsilon(epsilons)
    for false_rate, true_rate in bounds["tpr_at_fpr"].items():
        expected = np.min(np.exp(epsilons) * float(false_rate) + deltas)
        assert expected * (1 - 1e-3) <= true_rate <= expected * (1 + 2e-3), (false_rate, true_rate, expected)


@pytest.mark.integration
@pytest.mark.parametrize(("sigma", "rate", "steps", "delta"), SETTINGS)
def test_mu_is_the_smallest_that_bounds_every_delta(sigma, rate, steps, delta):
    mu, epsilons = PrivacyProfile([MechanismEvent(sigma, rate, steps)], delta).mu(), np.linspace(0, 12, 2_001)
    deltas = np.array(dp_accounting_distribution(sigma, rate, steps).get_delta_for_epsilon(epsilons))
    above = deltas >= delta * 1.01
    needed = gdp_mu_at(epsilons[above], deltas[above]).max()
    assert needed * (1 - 1e-3) <= mu <= needed * (1 + 1e-2)


@pytest.mark.integration
def test_gdp_mu_at_recovers_mu_of_gaussian():
    for mu in (0.01, 1.0, 5.0):
        deltas = from_gaussian_mechanism(1 / mu, value_discretization_interval=1e-4).get_delta_for_epsilon(
            [0.0, 0.5 * mu, 2 * mu]
        )
        assert gdp_mu_at(np.array([0.0, 0.5 * mu, 2 * mu]), np.array(deltas)) == pytest.approx(mu, rel=1e-3)


def test_attack_bounds_are_exact_at_rate_one_and_omit_a_loose_mu():
    bounds = attack_bounds([MechanismEvent(2.0, 1.0, 4), MechanismEvent(1.0, 1.0, 3)], 1e-5)
    assert bounds["mu_gdp"] == pytest.approx(2.0) and list(bounds["tpr_at_fpr"]) == [f"{rate:g}" for rate in FALSE_POSITIVE_RATES]
    assert list(bounds["tpr_at_fpr"].values()) == pytest.approx([ndtr(2 + ndtri(rate)) for rate in FALSE_POSITIVE_RATES])
    assert attack_bounds([MechanismEvent(0.65, 0.013, 154)], 5e-5)["mu_gdp"] is None
    nearly = attack_bounds([MechanismEvent(2.0, 1 - 1e-9, 4)], 1e-5)  # the same, by the distribution
    assert nearly["mu_gdp"] == pytest.approx(1.0, rel=2e-3) and nearly["tpr_at_fpr"]["0.01"] == pytest.approx(
        ndtr(1 + ndtri(0.01)), rel=2e-3
    )


def test_attack_bounds_without_noise_or_steps_are_none():
    assert attack_bounds([MechanismEvent(0.0, 0.1, 3)], 1e-5) == attack_bounds([], 1e-5) == {"mu_gdp": None, "tpr_at_fpr": None}


def test_report_and_card_show_attack_bounds(tmp_path):
    trainer = make_trainer(tmp_path, per_device_train_batch_size=6)  # of six authors: q = 1
    trainer.train()
    trainer.save_model()
    report = read_report(tmp_path)
    assert report["mu_gdp"] == pytest.approx(1.0) and report["tpr_at_fpr"]["0.01"] == pytest.approx(ndtr(1 + ndtri(0.01)))
    assert guarantee_attack_rows(report)[0][1].startswith("mu 1.001") or guarantee_attack_rows(report)[0][1].startswith(
        "mu 1.000"
    )
    assert "| Membership inference | TPR at most 9.3 % at 1 % FPR, at most 1.9 % at 0.1 % FPR (" in model_card(report)
    assert "finds at most 9.3 % of those who were" in guarantee_in_words(report)
    write_report(tmp_path)
    assert "at most 1.9 % at 0.1 % FPR" in (tmp_path / "report.html").read_text()


@pytest.mark.integration
@pytest.mark.parametrize(
    ("event", "delta"),
    [(MechanismEvent(1e-4, 0.2, 20), 1e-5), (MechanismEvent(1e-3, 0.01, 1_000), 1e-5), (MechanismEvent(1e6, 0.9, 10**6), 0.1)],
)
def test_extreme_noise_has_the_bounds_that_epsilon_gives(event, delta):
    bounds = attack_bounds([event], delta)
    assert bounds["tpr_at_fpr"] == bounds_of_guarantee(epsilon_of([event], delta), delta)["tpr_at_fpr"]
