"""What a run checks of its own mechanism while it trains: its draws, its noise and, by canaries, all of it.

Promise: each check sees every step, is asked at each log line, before each checkpoint and at the end, and its alarm ends the run.

Example:

    >>> checks = RunChecks(plan, canaries=None)
    >>> checks.start(make_sampler, folder, device, secure_noise=False)
    >>> checks.taken(batch_size), checks.released(pad), checks.test()  # step by step
"""

from collections.abc import Callable
from pathlib import Path
from typing import Optional

import numpy as np
import torch

from author_dp.bands import Undo
from author_dp.drawcheck import CyclicDrawCheck, DrawCheck, check_unseeded_draws, check_unseeded_groups
from author_dp.gradient_audit import GradientCanaries
from author_dp.mechanism import PAD, PoissonAuthorSampler
from author_dp.plan import PrivacyPlan
from author_dp.precision import PrecisionCheck
from author_dp.secret_generators import sample_each
from author_dp.selfcheck import Check, NoiseCheck, check_unseeded, noise_check


class RunChecks:
    """The checks of one training after the other.

    Args:
        canaries: whose law is checked too, if any.
    Attributes:
        draws, noise: of the last training; `noise` is None where there is none.
    Raises:
        UserError: for canaries in a run without noise.
    """

    def __init__(self, plan: PrivacyPlan, canaries: Optional[GradientCanaries]):
        self.plan, self.canaries = plan, canaries
        self.number = 0 if canaries is None else int(canaries.included.sum())
        self.draws: Optional[DrawCheck | CyclicDrawCheck] = None
        self.noise: Optional[NoiseCheck] = None
        self._asked: list[Check | PrecisionCheck] = []
        self._undo = Undo(np.ones(1))
        if canaries is not None:
            canaries.start(plan)

    def start(self, sampler: Callable[[], PoissonAuthorSampler], folder: Path, device: torch.device, secure_noise: bool) -> None:
        """Begin a training. Collective.

        Args:
            sampler: makes one as the run does.
            folder, device, secure_noise: as `selfcheck.noise_check`.
        Raises:
            MechanismError: where draws, noise or random numbers inside the model follow a seed.
        """
        self.stop()
        if self.plan.disable_dp:
            return
        bands, rate = self.plan.noise_bands, self.plan.spending(0).sample_rate
        check_unseeded_draws(lambda: from_all(sampler()), self.plan.num_authors, rate)
        if bands > 1:
            check_unseeded_groups(lambda: dealt(sampler()), bands)
        check_unseeded(lambda: sample_each([device], PAD), "random numbers inside the model follow")
        self.noise = noise_check(self.plan, folder, device, secure_noise)
        self._undo = Undo(self.plan.coefficients())
        law = None if self.canaries is None else self.canaries.start(self.plan)
        self._asked = [check for check in (PrecisionCheck(device), self.noise, law) if check is not None]

    def watch(self, sampler: PoissonAuthorSampler) -> None:
        """Check the draws that `sampler` makes from here on, those of the training."""
        if self.plan.disable_dp:
            return
        rate = self.plan.spending(0).sample_rate
        if self.plan.noise_bands == 1:
            self.draws = DrawCheck(self.plan.num_authors, self.number, rate)
        else:
            self.draws = CyclicDrawCheck(dealt(sampler), self.plan.noise_bands, self.number, rate)
            if self.canaries is not None:
                self.canaries.align(self.plan.coefficients(), dealt(sampler))
        sampler.on_draw = self.draws.drawn
        self._asked.append(self.draws)

    def taken(self, batch_size: int) -> None:
        """Take how many real authors are in the draw of a step."""
        if self.draws is not None:
            self.draws.taken(batch_size)

    def released(self, pad: torch.Tensor) -> None:
        """Take what a step released where there is no parameter, flat."""
        row = self._undo(pad)
        if self.noise is not None:
            self.noise.add(row[:PAD])
        if self.canaries is not None:
            self.canaries.add(row[PAD:])

    def test(self) -> None:
        """Raise MechanismError for draws, clips or noise that are not as promised."""
        for check in self._asked:
            check.test()

    def stop(self) -> None:
        """Ask nothing more."""
        self._asked = []


def from_all(sampler: PoissonAuthorSampler) -> Callable[[], np.ndarray]:
    """Return what draws authors as one group: groups of their own would hide that two samplers draw alike."""
    sampler.members = None
    return sampler.draw_authors


def dealt(sampler: PoissonAuthorSampler) -> np.ndarray:
    """Return the group of each author, where there are several groups."""
    assert sampler.groups is not None
    return sampler.groups
