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

import torch

from author_dp.drawcheck import DrawCheck, check_unseeded_draws
from author_dp.gradient_audit import GradientCanaries
from author_dp.mechanism import PAD, PoissonAuthorSampler
from author_dp.plan import PrivacyPlan
from author_dp.selfcheck import Check, NoiseCheck, noise_check


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
        self.draws: Optional[DrawCheck] = None
        self.noise: Optional[NoiseCheck] = None
        self._asked: list[Check] = []
        if canaries is not None:
            canaries.start(plan)

    def start(self, sampler: Callable[[], PoissonAuthorSampler], folder: Path, device: torch.device, secure_noise: bool) -> None:
        """Begin a training. Collective.

        Args:
            sampler: makes one as the run does.
            folder, device, secure_noise: as `selfcheck.noise_check`.
        Raises:
            MechanismError: where draws or noise follow a seed.
        """
        self.stop()
        if self.plan.disable_dp:
            return
        check_unseeded_draws(lambda: sampler().draw_authors, self.plan.num_authors, self.plan.sample_rate)
        self.draws = DrawCheck(self.plan.num_authors, self.number, self.plan.sample_rate)
        self.noise = noise_check(self.plan, folder, device, secure_noise)
        law = None if self.canaries is None else self.canaries.start(self.plan)
        self._asked = [check for check in (self.draws, self.noise, law) if check is not None]

    def taken(self, batch_size: int) -> None:
        """Take how many real authors are in the draw of a step."""
        if self.draws is not None:
            self.draws.taken(batch_size)

    def released(self, pad: torch.Tensor) -> None:
        """Take what a step released where there is no parameter, flat."""
        if self.noise is not None:
            self.noise.add(pad[:PAD])
        if self.canaries is not None:
            self.canaries.add(pad[PAD:])

    def test(self) -> None:
        """Raise MechanismError for draws, clips or noise that are not as promised."""
        for check in self._asked:
            check.test()

    def stop(self) -> None:
        """Ask nothing more."""
        self._asked = []
