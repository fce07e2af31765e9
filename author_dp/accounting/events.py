"""What is accounted: steps of the Poisson-subsampled Gaussian mechanism, with and without noise bands, or a bound by them.

Example:

    >>> cyclic_event(noise_multiplier=0.72, sample_rate=0.02, steps=154, bands=8)
    MechanismEvent(noise_multiplier=0.72, sample_rate=0.16, steps=20)
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from author_dp.errors import UserError

ULP = 2.0**-52


class MechanismEvent(NamedTuple):
    """A number of steps of the Poisson-subsampled Gaussian mechanism."""

    noise_multiplier: float
    sample_rate: float
    steps: int


def cyclic_sample_rate(sample_rate: float, bands: int) -> float:
    """Return b q, the probability that an author is in a batch sampled from the author's group.

    Raises:
        UserError: if b q exceeds 1.
    """
    if bands * sample_rate > 1 + 1e-9:
        raise UserError(
            f"--noise_bands {bands}: the sample rate {sample_rate:.4g} times the bands exceeds 1. Lower the bands to at most "
            f"{math.floor(1 / sample_rate * (1 + 1e-9))}"
        )
    return bands * sample_rate if bands * sample_rate < 1 - 1e-9 else 1.0


def cyclic_event(noise_multiplier: float, sample_rate: float, steps: int, bands: int) -> MechanismEvent:
    """Return the event of steps with noise bands (banded_mf.py): each author's group has at most ceil(steps / bands) of them."""
    return MechanismEvent(noise_multiplier, cyclic_sample_rate(sample_rate, bands), -(-steps // bands))


def slot_event(noise_multiplier: float, slots: int, steps: int) -> MechanismEvent:
    """Return an event that costs at least as much as steps with balls-in-bins sampling (balls_in_bins.py), by far.

    With an epoch or more it is that of an attacker who knows the author's slot. There are at most ceil(steps / n) columns of
    norm 1 in rows that do not overlap. In a shorter run the author takes part at most once, with probability steps / n: it is
    that of an attacker who knows the step in which that would be, as delta of a mixture is at most the mixture of deltas.
    """
    return MechanismEvent(noise_multiplier, min(1.0, steps / slots), -(-steps // slots))


def merge_events(events: Sequence[MechanismEvent]) -> list[MechanismEvent]:
    """Add up the steps of equal mechanisms and sort them: the order of composition does not matter."""
    totals: dict[tuple[float, float], int] = {}
    for sigma, rate, steps in events:
        totals[sigma, rate] = totals.get((sigma, rate), 0) + steps
    return sorted(MechanismEvent(*mechanism, steps) for mechanism, steps in totals.items() if steps > 0)


def prob_ever_sampled(events: Sequence[MechanismEvent]) -> float:
    """Return the probability that an author is in any step, rounded up; at no epsilon does delta exceed it."""
    if any(event.sample_rate == 1 for event in events):
        return 1.0
    return -math.expm1(math.fsum(steps * math.log1p(-rate) for _, rate, steps in events)) * (1 + 8 * ULP)


def delta_promises_nothing(events: Sequence[MechanismEvent], delta: float) -> bool:
    """Return whether delta exceeds half the probability that an author is in any step.

    Publishing the texts of every sampled author is (0, delta)-private at that probability, and of half of them at half of it.
    """
    return 2 * delta > prob_ever_sampled(events) * (1 + 16 * ULP)


def check_delta(events: Sequence[MechanismEvent], delta: float) -> None:
    """Raise UserError for an empty promise. A smaller delta is the remedy: calibrated noise would fall to nothing."""
    if delta_promises_nothing(events, delta):
        sampled = prob_ever_sampled(events)
        raise UserError(
            f"--target_delta {delta:.4g}: an author is in any step with a probability of {sampled:.2g} only, so this delta would "
            f"allow publishing half of those authors or more, without noise. Lower it to {sampled / 100:.1g} or less (a "
            "hundredth of that probability), or raise --sample_rate or --max_steps"
        )
