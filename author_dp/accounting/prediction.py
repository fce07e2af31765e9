"""Predict what share of the gain without privacy a run keeps, from public numbers: noise, batch, steps, learning rate, sizes.

The formula has a few constants, fitted to this project's sweeps of a small model over four corpora, in the manner of scaling laws
for DP training [1]. benchmarks/planner.py has the sweeps, the fit, and its test: each corpus is predicted by the others.

Adam moves each weight by about the learning rate in each step, in the direction of the gradient as far as it is larger than the
noise. Three lengths follow, in units of a learning rate that suits the model: `travel`, along the gradient in all steps;
`wander`, by the noise that is left in the sum of the updates; and `size`, of a single update. The gain saturates with travel, and
falls with the other two.

Not covered: text and vocabulary. How much a corpus can gain at all is not predicted, only the share of it.

Reference:
    [1] McKenna et al. 2025, Scaling Laws for Differentially Private Language Models, arXiv 2501.18914
"""

import functools
import math
from typing import NamedTuple

from author_dp.accounting.banded_mf import prefix_sum_rmse, step_noise_std, toeplitz_coefficients

FITTED = {"date": "2026-11-30", "versions": {"torch": "2.13.0", "transformers": "5.23.0"}}


class Setting(NamedTuple):
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


class Constants(NamedTuple):
    """What `predicted_gain` is fitted by."""

    signal: float  # norm of the mean clipped gradient, in clip norms
    correction: float  # share of the noise variance that AdamBC leaves in the divisor
    half_travel: float  # at which half of the gain is made
    travel_power: float
    most_wander: float  # at which half of the gain is lost
    wander_power: float
    most_size: float  # of a step's update, at which half of the gain is lost


CONSTANTS = Constants(0.5, 0.2, 0.1, 1.0, 1.0, 2.0, 5.0)
SIZE_POWER = 2.0

MEASURED_PARAMETERS, MEASURED_RATE = 413_664, 1e-2
RATES = (1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2)


def step_noise(setting: Setting) -> float:
    """Return the norm of a step's noise over all trained parameters, in clip norms."""
    return setting.noise_multiplier * band_errors(setting.bands, setting.steps)[0] * math.sqrt(setting.trained) / setting.batch


def sum_noise(setting: Setting) -> float:
    """Return the root mean square norm of the noise in the sum of the first t updates, in clip norms."""
    return setting.noise_multiplier * band_errors(setting.bands, setting.steps)[1] * math.sqrt(setting.trained) / setting.batch


@functools.lru_cache(maxsize=1_024)
def band_errors(bands: int, steps: int) -> tuple[float, float]:
    """Return the noise of a step, and of the sums of updates, in noise multipliers."""
    coefficients = toeplitz_coefficients(bands, steps)
    return step_noise_std(coefficients, steps), prefix_sum_rmse(coefficients, steps)


def predicted_gain(setting: Setting, constants: Constants = CONSTANTS) -> float:
    """Return the predicted gain, of the largest that the model can make on a corpus: 0 to 1, the smaller the more noise."""
    c, noise, rate = constants, step_noise(setting), setting.learning_rate / rate_unit(setting)
    left = c.correction if setting.bands > 1 else 1.0  # of the noise variance, in Adam's divisor
    divisor = math.hypot(c.signal, math.sqrt(left) * noise)
    travel = rate * setting.steps * c.signal / divisor
    wander = rate * sum_noise(setting) / divisor
    size = rate * math.hypot(c.signal, noise) / divisor
    made = 1 / (1 + (c.half_travel / travel) ** c.travel_power)
    return made / (1 + (wander / c.most_wander) ** c.wander_power) / (1 + (size / c.most_size) ** SIZE_POWER)


def rate_unit(setting: Setting) -> float:
    """Return a learning rate that suits the model."""
    return MEASURED_RATE


INTERVAL, HALF_WIDTH = 0.8, 0.1  # of shares: the coverage on left-out corpora, and the distance to either side


def with_interval(share: float) -> tuple[float, float, float]:
    """Return a predicted share with the ends of its interval, all in 0 to 1."""
    low, middle, high = (min(1.0, max(0.0, value)) for value in (share - HALF_WIDTH, share, share + HALF_WIDTH))
    return middle, low, high
