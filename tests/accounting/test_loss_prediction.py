"""The prediction: its noise is that of the mechanism, and its gain moves as the mechanism says."""

import math

import numpy as np
import pytest
from mutation import catches

from author_dp.accounting.banded_mf import toeplitz_coefficients
from author_dp.accounting.loss_prediction import (
    PredictionSetting,
    predicted_gain,
    predicted_noise,
    predicted_share,
    prediction_interval,
)

SETTING = PredictionSetting(0.8, 64, 20, 4, 3e-3, 400_000, 400_000, is_lora=False)


@catches("a step's noise is not divided by the batch", "accounting.loss_prediction.predicted_noise", " / setting.batch", "")
@catches("the sums' noise is that of a step", "accounting.loss_prediction.predicted_noise", "scale * of_sums", "scale * of_step")
@pytest.mark.parametrize("bands", [1, 4])
def test_noise_is_that_of_the_mechanism(bands):
    setting = SETTING._replace(bands=bands)
    c = toeplitz_coefficients(bands, setting.steps)
    inverse = np.linalg.inv(sum(value * np.eye(setting.steps, k=-i) for i, value in enumerate(c)))  # row t: noise of step t
    scale = setting.noise_multiplier * math.sqrt(setting.trained) / setting.batch
    assert predicted_noise(setting)[0] == pytest.approx(scale * np.linalg.norm(inverse[-1]), rel=1e-9)
    sums = np.linalg.norm(np.cumsum(inverse, axis=0), axis=1)
    assert predicted_noise(setting)[1] == pytest.approx(scale * np.sqrt((sums**2).mean()), rel=1e-9)


@pytest.mark.parametrize("rate", [1e-4, 1e-3, 1e-2, 1e-1])
@pytest.mark.parametrize("bands", [1, 4])
def test_noise_and_small_batches_cost_gain(rate, bands):
    setting = SETTING._replace(learning_rate=rate, bands=bands)
    gains = [predicted_gain(setting._replace(noise_multiplier=noise)) for noise in (0.0, 0.3, 1.0, 3.0, 30.0)]
    assert gains == sorted(gains, reverse=True) and 0 < gains[-1] < gains[0] < 1
    gains = [predicted_gain(setting._replace(batch=batch)) for batch in (16, 64, 256, 1024)]
    assert gains == sorted(gains)


def test_a_rate_can_be_too_large():
    gains = [predicted_gain(SETTING._replace(learning_rate=rate)) for rate in (1e-5, 1e-3, 1.0)]
    assert gains[0] < gains[1] > gains[2]


def test_shares_and_intervals_stay_between_0_and_1():
    for share in (-0.3, 0.0, 0.5, 1.2):
        middle, low, high = prediction_interval(share, is_lora=False)
        assert 0 <= low <= middle <= high <= 1 and prediction_interval(share, is_lora=True)[1] <= low
    shares = [predicted_share(SETTING._replace(noise_multiplier=noise))[0] for noise in (0.1, 1.0, 10.0)]
    assert 1 >= shares[0] > shares[1] > shares[2] > 0


def test_a_larger_model_of_the_same_noise_keeps_less():
    shares = [predicted_share(SETTING._replace(parameters=size, trained=size))[0] for size in (400_000, 4_000_000, 40_000_000)]
    assert shares == sorted(shares, reverse=True)
