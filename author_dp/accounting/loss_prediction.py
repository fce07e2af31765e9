"""Predict what share of the gain without privacy a run keeps, from public numbers: noise, batch, steps, learning rate, sizes.

The formula has a few constants, fitted to this project's sweeps of a small model over four corpora, in the manner of scaling laws
for DP training [1]. Sweeps, fit, and its test, in which each corpus is predicted by the others, are in benchmarks/planner.py.

Adam moves each weight by about the learning rate in each step, in the direction of the gradient as far as it is larger than the
noise. Two lengths follow, in units of a learning rate that suits the model: `travel`, along the gradient in all steps, and
`wander`, by the noise that is left in the sum of the updates. The gain grows with travel and with the number of steps, and falls
with wander and with the ratio of wander to travel.

Not covered: text and vocabulary. How much a corpus can gain at all is not predicted, only the share of it.

Reference:
    [1] McKenna et al. 2025, Scaling Laws for Differentially Private Language Models, arXiv 2501.18914
"""

import functools
import math
from typing import NamedTuple

from author_dp.accounting.banded_mf import banded_step_noise_std, prefix_sum_rmse, toeplitz_coefficients


class PredictionSetting(NamedTuple):
    """A run, as far as the prediction depends on it.

    Attributes:
        noise_multiplier: 0 without privacy.
        batch: expected batch, in authors.
        parameters, trained: numbers of all and of trained parameters.
    """

    noise_multiplier: float
    batch: int
    steps: int
    bands: int
    learning_rate: float
    parameters: int
    trained: int
    is_lora: bool


class PredictionConstants(NamedTuple):
    """What `predicted_gain` is fitted by. The lengths are those at which, alone, they cost half of the gain."""

    signal: float  # norm of the mean clipped gradient, in clip norms
    correction: float  # share of the noise variance that AdamBC leaves in the divisor
    travel: float
    travel_power: float
    wander: float
    wander_power: float
    steps: float
    ratio: float  # wander / travel
    ratio_power: float


# `python benchmarks/planner.py fit` prints them: 2026-11-30, torch 2.13.0, transformers 5.23.0.
CONSTANTS = PredictionConstants(0.913, 0.134, 0.178, 1.21, 61.1, 1.86, 0.609, 23.3, 2.72)

MEASURED_PARAMETERS, MEASURED_RATE = 413_664, 1e-2
LORA_RATE = 3.0  # how much larger rates suit LoRA
INTERVAL, HALF_WIDTH = 0.8, 0.18  # of shares: the coverage on left-out corpora, and the distance to either side
BELOW_LORA = 0.55  # the distance below for LoRA, whose shares were predicted 0.19 to 0.52 too high
RATES = (1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2)


def predicted_noise(setting: PredictionSetting) -> tuple[float, float]:
    """Return norms of the noise over all trained parameters, in clip norms.

    Returns:
        that of a step, and the root mean square of those in the sums of the first t updates.
    """
    scale = setting.noise_multiplier * math.sqrt(setting.trained) / setting.batch
    of_step, of_sums = predicted_band_errors(setting.bands, setting.steps)
    return scale * of_step, scale * of_sums


@functools.lru_cache(maxsize=1_024)
def predicted_band_errors(bands: int, steps: int) -> tuple[float, float]:
    """Return the noise of a step, and of the sums of updates, in noise multipliers."""
    coefficients = toeplitz_coefficients(bands, steps)
    return banded_step_noise_std(coefficients, steps), prefix_sum_rmse(coefficients, steps)


def predicted_gain(setting: PredictionSetting, constants: PredictionConstants = CONSTANTS) -> float:
    """Return the predicted gain, of the largest that the model can make on a corpus: 0 to 1, the smaller the more noise."""
    c, rate = constants, setting.learning_rate / predicted_rate_unit(setting)
    left = c.correction if setting.bands > 1 else 1.0  # of the noise variance, in Adam's divisor
    step_noise, sum_noise = predicted_noise(setting)
    divisor = math.hypot(c.signal, math.sqrt(left) * step_noise)
    travel = rate * setting.steps * c.signal / divisor
    wander = rate * sum_noise / divisor
    lost = (c.travel / travel) ** c.travel_power + c.steps / setting.steps
    lost += (wander / c.wander) ** c.wander_power + (wander / travel / c.ratio) ** c.ratio_power
    return 1 / (1 + lost)


def predicted_rate_unit(setting: PredictionSetting) -> float:
    """Return a learning rate that suits the model: the measured one over the root of the sizes' ratio.

    That was not fitted. It agrees with what SmolLM2 was trained with (docs/planning.md), and is an assumption elsewhere.
    """
    return MEASURED_RATE * (LORA_RATE if setting.is_lora else 1) * math.sqrt(MEASURED_PARAMETERS / setting.parameters)


def predicted_share(setting: PredictionSetting) -> tuple[float, float, float]:
    """Return the predicted share of the gain without privacy in as many steps of as many authors, and its interval's ends.

    Without privacy, the learning rate is the best of RATES. First ask
    `run_planning.find_planning_limits` whether there is ground for it.
    """
    free = (setting._replace(noise_multiplier=0.0, bands=1, learning_rate=rate) for rate in RATES)
    return prediction_interval(predicted_gain(setting) / max(map(predicted_gain, free)), setting.is_lora)


def prediction_interval(share: float, is_lora: bool) -> tuple[float, float, float]:
    """Return a predicted share with the ends of its interval, all in 0 to 1."""
    ends = (share, share - (BELOW_LORA if is_lora else HALF_WIDTH), share + HALF_WIDTH)
    middle, low, high = (min(1.0, max(0.0, value)) for value in ends)
    return middle, low, high
