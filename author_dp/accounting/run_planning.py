"""Find settings that fit a run's authors, epsilon and time: a grid of batches, steps, noise bands and learning rates.

Everything follows from public numbers: no data are read, and nothing is spent. The grid ranks settings by approximate noise
multipliers. The settings that are shown get the one that a run with these options uses (`calibrate_planned_run`).

Example:

    >>> task = PlanningTask(10_000, 8.0, 1e-4, parameters=134_515_008, trained=2_442_240, is_lora=True, max_sampled=30_000)
    >>> best = planning_candidates(task)[0]
    >>> best.batch, best.steps, best.bands, best.learning_rate
    (32, 768, 64, 0.001)
"""

import functools
import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple, Optional

import numpy as np
from scipy.special import gammaln, logsumexp

from author_dp.accounting.accountant import find_noise_multiplier
from author_dp.accounting.banded_mf import BAND_CHOICES, banded_error_ratio
from author_dp.accounting.events import MechanismEvent, check_delta, cyclic_event
from author_dp.accounting.loss_prediction import (
    RATES,
    PredictionSetting,
    predicted_band_errors,
    predicted_gain,
    prediction_interval,
)
from author_dp.accounting.plan import PrivacyPlan

BATCHES = tuple(2**i for i in range(4, 13))  # 16 to 4,096
STEPS = tuple(steps for i in range(3, 12) for steps in (2**i, 2**i * 3 // 2))  # 8, 12, 16, 24, ... 3,072
NOISES, RENYI_ORDERS = np.geomspace(0.2, 200, 64), np.arange(2, 49)
RENYI_EXCESS = 1.13  # about how much larger noise multipliers by Renyi divergences are than calibrated ones
# Where the formula has ground: what was measured, and up to ten times as much of what scales (twenty times as many authors).
PARAMETERS, EPSILONS, AUTHORS = (40_000, 1_400_000_000), (1, 8), (100, 400_000)
MIN_SAMPLED, MAX_SAMPLED = 100, 50_000  # authors in all batches together
WORTH_SAYING = 0.03  # of a share: what a dry run does not mention is less


class PlanningTask(NamedTuple):
    """What is asked for.

    Attributes:
        parameters, trained: numbers of all and of trained parameters.
        max_sampled: how many authors all batches together may have: time over seconds per author; None: no limit is given.
    """

    num_authors: int
    epsilon: float
    delta: float
    parameters: int
    trained: int
    is_lora: bool
    max_sampled: Optional[float] = None

    @property
    def limit(self) -> float:
        """Return how many authors all batches together may have: nothing longer than MAX_SAMPLED is compared."""
        return MAX_SAMPLED if self.max_sampled is None else min(self.max_sampled, MAX_SAMPLED)


def planning_grid(task: PlanningTask) -> Iterator[PredictionSetting]:
    """Yield all settings that fit, with approximate noise multipliers.

    Time, epsilon and authors move single settings or add some: the more there is of each, the better the best one.
    """
    for batch in BATCHES:
        rate = batch / task.num_authors
        for bands in BAND_CHOICES:
            if rate * bands > 1:
                continue
            for steps in (steps for steps in STEPS if bands <= steps <= task.limit / batch):
                noise = planning_noise_multiplier(cyclic_event(1.0, rate, steps, bands), task.epsilon, task.delta)
                for learning_rate in RATES:
                    yield PredictionSetting(
                        noise, batch, steps, bands, learning_rate, task.parameters, task.trained, task.is_lora
                    )


def planning_noise_multiplier(event: MechanismEvent, epsilon: float, delta: float) -> float:
    """Return about the noise multiplier that a run is calibrated to: from Renyi divergences at few orders, in microseconds.

    It falls where epsilon or delta rise, and rises with the event's sample rate and steps.
    """
    orders, divergences = RENYI_ORDERS, planning_renyi_divergences(event.sample_rate)
    conversion = np.log1p(-1 / orders) - (math.log(delta) + np.log(orders)) / (orders - 1)
    epsilons = (event.steps * divergences + conversion).min(axis=1)  # (noises,), falling
    logs = np.interp(-math.log(epsilon), -np.log(np.maximum(epsilons, 1e-6)), np.log(NOISES))
    return math.exp(logs) / RENYI_EXCESS


@functools.lru_cache(maxsize=64)
def planning_renyi_divergences(sample_rate: float) -> np.ndarray:
    """Return the Renyi divergence of a step for each of NOISES and RENYI_ORDERS, (noises, orders); see `rdp_of_step`."""
    rate, order, j = min(sample_rate, 1 - 1e-12), RENYI_ORDERS[:, None], np.arange(RENYI_ORDERS[-1] + 1)
    with np.errstate(all="ignore"):
        log_terms = gammaln(order + 1) - gammaln(j + 1) - gammaln(order - j + 1)  # -inf beyond the order
        log_terms += j * math.log(rate) + (order - j) * math.log1p(-rate)
        log_terms = np.where(j <= order, log_terms, -np.inf)
    return logsumexp(log_terms + (j**2 - j) / (2 * NOISES[:, None, None] ** 2), axis=2) / (RENYI_ORDERS - 1)


def planning_candidates(task: PlanningTask) -> list[PredictionSetting]:
    """Return one setting of each batch size; [] where nothing fits.

    It is the one with the largest predicted gain, and the best batch size comes first. Without ground for a prediction, it is the
    one with the most steps, and of these with the least error of the summed updates, and the smallest batch comes first.
    """
    has_ground, best = not find_planning_limits(task), dict[int, tuple[tuple[float, ...], PredictionSetting]]()
    for setting in planning_grid(task):
        score = (predicted_gain(setting),) if has_ground else (setting.steps, -planning_sum_error(setting))
        if setting.batch not in best or score > best[setting.batch][0]:
            best[setting.batch] = score, setting
    found = sorted(best.values(), key=lambda one: one[0], reverse=True) if has_ground else best.values()
    return [setting for _, setting in found]


def planning_gain_without_privacy(task: PlanningTask) -> float:
    """Return the largest predicted gain without privacy, of all settings that fit the time."""
    return max(
        predicted_gain(PredictionSetting(0.0, batch, steps, 1, rate, task.parameters, task.trained, task.is_lora))
        for batch, steps, rate in itertools.product(BATCHES, STEPS, RATES)
        if batch <= task.num_authors and batch * steps <= task.limit
    )


def find_planning_limits(task: PlanningTask, sampled: Optional[float] = None) -> str:
    """Return why nothing can be predicted: what is far beyond all that was measured; empty if nothing is.

    Args:
        sampled: how many authors all batches of a certain run have; by default, of the longest run that is compared.
    """
    reasons = [
        f"{name} {value:,.12g}, where {low:,.12g} to {high:,.12g} is near what was measured"
        for name, value, (low, high) in (
            ("a model of", task.parameters, PARAMETERS), ("an epsilon of", task.epsilon, EPSILONS),
            ("authors:", task.num_authors, AUTHORS),
            ("authors in all batches:", sampled or task.limit, (MIN_SAMPLED, MAX_SAMPLED)),
        )
        if not low <= value <= high
    ]  # fmt: skip
    return "; ".join(reasons)


def calibrate_planned_run(task: PlanningTask, setting: PredictionSetting) -> float:
    """Return the noise multiplier of a run with this setting, as `plan.make_plan` computes it.

    Raises:
        UserError: for a delta that promises nothing.
    """
    event = cyclic_event(0.0, setting.batch / task.num_authors, setting.steps, setting.bands)
    check_delta([MechanismEvent(0.0, setting.batch / task.num_authors, setting.steps)], task.delta)
    return find_noise_multiplier(event.sample_rate, event.steps, task.epsilon, task.delta)


def planning_sum_error(setting: PredictionSetting) -> float:
    """Return the root mean square error of the summed updates of each coordinate, in clip norms."""
    return setting.noise_multiplier * predicted_band_errors(setting.bands, setting.steps)[1] / setting.batch


def planning_sum_error_ratio(task: PlanningTask, setting: PredictionSetting) -> float:
    """Return that error relative to that of independent noise at the same epsilon, as a run's log states it."""
    rate = setting.batch / task.num_authors
    return banded_error_ratio(setting.noise_multiplier, rate, setting.steps, setting.bands, task.epsilon, task.delta)


def format_planning_advice(plan: PrivacyPlan, learning_rate: float, parameters: int, trained: int, is_lora: bool) -> str:
    """Return what the planner predicts for a run, and its best setting for as many sampled authors.

    Args:
        plan: of a run with a target epsilon and AdamW.
        learning_rate, parameters, trained, is_lora: of the run, as in `PredictionSetting`.
    """
    batch, epsilon = max(1, round(plan.sample_rate * plan.num_authors)), plan.target_epsilon
    assert epsilon is not None
    task = PlanningTask(plan.num_authors, epsilon, plan.delta, parameters, trained, is_lora, batch * plan.steps)
    if reasons := find_planning_limits(task, batch * plan.steps):
        return f"Planner: it predicts nothing here ({reasons})."
    found, most = planning_candidates(task), planning_gain_without_privacy(task)
    asked = PredictionSetting(
        plan.noise_multiplier, batch, plan.steps, plan.noise_bands, learning_rate, parameters, trained, is_lora
    )
    shares = [predicted_gain(setting) / most for setting in (asked, *found[:1])]
    words = [
        f"{middle:.0%} ({low:.0%} to {high:.0%})"
        for middle, low, high in (prediction_interval(share, is_lora) for share in shares)
    ]
    advice = f"Planner: these settings are predicted to keep {words[0]} of the gain without privacy."
    if not found or shares[1] < shares[0] + WORTH_SAYING:
        return f"{advice} No setting with as many sampled authors is predicted to be much better."
    best = found[0]
    return (
        f"{advice} A batch of {best.batch} authors, --max_steps {best.steps} --noise_bands {best.bands} --learning_rate "
        f"{best.learning_rate:g} take as long, and are predicted to keep {words[1]}. python -m author_dp.plan shows the table."
    )
