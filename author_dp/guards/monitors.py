"""What a run checks of its own mechanism while it trains: its draws, its noise and, by canaries, all of it.

Guarantees: each check runs at every log line, before each checkpoint and at the end; those of frozen weights and of the ledger's
file, at checkpoints and at the end only. A failure ends the run on all processes.

Example:

    >>> checks = RunChecks(plan, canaries=None, norms=NormStatistics(1.0, device))
    >>> checks.start(make_sampler, budget, device, secure_noise=False)
    >>> checks.taken(batch_size, number), checks.released(pad), checks.test()  # step by step
"""

from collections.abc import Callable
from typing import Any, Optional

import numpy as np
import torch
from torch import nn

from author_dp.accounting.budget import Budget
from author_dp.accounting.plan import PrivacyPlan
from author_dp.clipping.norm_stats import NormStatistics
from author_dp.distributed import gather
from author_dp.errors import MechanismError
from author_dp.guards.agreement import RankMonitor, find_mismatches
from author_dp.guards.gradient_canaries import GradientCanaries
from author_dp.guards.noise_inversion import NoiseDecorrelator
from author_dp.guards.noise_monitor import NoiseMonitor, check_unseeded, make_noise_monitor
from author_dp.guards.precision import PrecisionMonitor
from author_dp.guards.sampling_monitor import (
    CyclicSamplingMonitor,
    SamplingMonitor,
    check_unseeded_groups,
    check_unseeded_sampling,
)
from author_dp.mechanism.fsdp import local_shard
from author_dp.mechanism.optimizer import PROBE_SIZE
from author_dp.mechanism.sampling import PoissonAuthorSampler
from author_dp.mechanism.secret_generators import sample_generators
from author_dp.models.quantization import quant_scales


class RunMonitors:
    """The checks of one training after the other.

    Args:
        canaries: whose law is checked too, if any.
        norms: counts the authors that are clipped.
    Attributes:
        draws, noise: of the last training; `noise` is None where there is none.
    Raises:
        UserError: for canaries in a run without noise.
    """

    def __init__(self, plan: PrivacyPlan, canaries: Optional[GradientCanaries], norms: NormStatistics):
        self.plan, self.canaries, self.norms = plan, canaries, norms
        self.number = 0 if canaries is None else int(canaries.included.sum())
        self.draws: Optional[SamplingMonitor | CyclicSamplingMonitor] = None
        self.noise: Optional[NoiseMonitor] = None
        self._ranks: Optional[RankMonitor] = None
        self._updates: Optional[UpdateMonitor] = None
        self._fixed: Optional[FrozenWeightsMonitor] = None
        self._precision: Optional[PrecisionMonitor] = None
        self._asked: list[Any] = []  # each with `test`
        self._undo = NoiseDecorrelator(np.ones(1))
        if canaries is not None:
            canaries.start(plan)

    def start(
        self, sampler: Callable[[], PoissonAuthorSampler], budget: Budget, device: torch.device, secure_noise: bool
    ) -> None:
        """Begin a training. Collective.

        Args:
            sampler: makes one as the run does.
            budget: of the run; its ledger's folder keeps the first noise.
            device, secure_noise: as `selfcheck.noise_check`.
        Raises:
            MechanismError: where draws, noise or random numbers inside the model follow a seed.
        """
        self.stop()
        if self.plan.disable_dp:
            return
        bands, rate = self.plan.noise_bands, self.plan.event(0).sample_rate
        check_unseeded_sampling(lambda: without_groups(sampler()), self.plan.num_authors, rate)
        if bands > 1:
            check_unseeded_groups(lambda: groups_of(sampler()), bands)
        check_unseeded(lambda: sample_generators([device], PROBE_SIZE), "random numbers inside the model follow")
        self.noise = make_noise_monitor(self.plan, budget.ledger.path.parent, device, secure_noise)
        self._undo = NoiseDecorrelator(self.plan.coefficients())
        law = None if self.canaries is None else self.canaries.start(self.plan)
        self._updates, self._precision = UpdateMonitor(budget), PrecisionMonitor(device)
        self._asked = [check for check in (self._precision, self._updates, self.noise, law) if check is not None]

    def watch(self, sampler: PoissonAuthorSampler) -> None:
        """Check the draws that `sampler` makes from here on, those of the training."""
        if self.plan.disable_dp:
            return
        rate = self.plan.event(0).sample_rate
        if self.plan.noise_bands == 1:
            self.draws = SamplingMonitor(self.plan.num_authors, self.number, rate)
        else:
            self.draws = CyclicSamplingMonitor(groups_of(sampler), self.plan.noise_bands, self.number, rate)
            if self.canaries is not None:
                self.canaries.align(self.plan.coefficients(), groups_of(sampler))
        sampler.on_draw = self.draws.drawn
        self._ranks, self.norms.authors = RankMonitor(sampler), 0
        self._asked.append(self.draws)

    def hold(self, model: nn.Module) -> None:
        """Remember the weights that are not trained."""
        if not self.plan.disable_dp:
            self._fixed = FrozenWeightsMonitor(model)

    def taken(self, batch_size: int, number: int) -> None:
        """Take how many real authors are in the draw of a step, and the draw's number."""
        if self.draws is not None and self._ranks is not None and self._precision is not None:
            self.draws.taken(batch_size)
            self._ranks.step(number, batch_size)
            self._precision.look()

    def released(self, pad: torch.Tensor) -> None:
        """Take what a step released where there is no parameter, flat."""
        row = self._undo(pad)
        if self.noise is not None:
            self.noise.add(row[:PROBE_SIZE])
        if self.canaries is not None:
            self.canaries.add(row[PROBE_SIZE:])

    def count_updates(self, optimizer: torch.optim.Optimizer) -> None:
        """Count the updates that an optimizer makes from here on; a step within a step is part of it."""
        inside = 0

        def begins(*_) -> None:
            nonlocal inside
            inside += 1

        def ends(*_) -> None:
            nonlocal inside
            inside -= 1
            if not inside and self._updates is not None:
                self._updates.updates += 1

        optimizer.register_step_pre_hook(begins)
        optimizer.register_step_post_hook(ends)

    def test(self, whole: bool = False) -> None:
        """Raise MechanismError on all processes where draws, clips or noise of one are not as promised. Collective.

        Args:
            whole: look at the weights that are not trained, and at the ledger's file, too.
        """
        if self.plan.disable_dp:
            return
        asked = [check.test for check in self._asked]
        if whole:
            asked += [check.test_full for check in (self._updates, self._fixed) if check is not None]
        found = [str(error) for test in asked if (error := catch_error(test)) is not None]
        every = gather((found, None if self._ranks is None else self._ranks.record(self.norms.authors)))
        differ = [] if self._ranks is None else find_mismatches([record for _, record in every])
        if found := [*differ, *(words for one, _ in every for words in one)]:
            raise MechanismError(found[0])

    def stop(self) -> None:
        """Ask nothing more."""
        self._asked, self._ranks, self._updates, self._precision, self._fixed = [], None, None, None, None


class UpdateMonitor:
    """Compare the updates of the weights with the steps in the ledger.

    Attributes:
        updates: in this training.
    """

    def __init__(self, budget: Budget):
        self.budget, self.updates = budget, 0

    def test(self) -> None:
        """Raise MechanismError where there were more updates than steps, or fewer."""
        if self.updates != self.budget.steps:
            raise MechanismError(f"the weights were updated {self.updates} times in {self.budget.steps} steps of the ledger")

    def test_full(self) -> None:
        """Raise MechanismError where the ledger on the disk lacks steps; on the first process only."""
        if (missing := self.budget.missing_steps()) != 0:
            raise MechanismError(f"{self.budget.ledger.path} lacks {missing} steps that were taken")


class FrozenWeightsMonitor:
    """The weights that are not trained, and what else a checkpoint holds: noise or gradients must not reach them."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.sums = self._sums()

    def _sums(self) -> dict[str, list[int]]:
        """Return a sum of the bits of each tensor; of one in shares, of this process' share."""
        saved = self.model.state_dict(keep_vars=True).keys()
        tensors = {name: [p, *quant_scales(p)] for name, p in self.model.named_parameters() if not p.requires_grad}
        tensors |= {name: [buffer] for name, buffer in self.model.named_buffers() if name in saved}
        return {name: [sum_of_bits(local_shard(tensor)) for tensor in found] for name, found in tensors.items()}

    def test_full(self) -> None:
        """Raise MechanismError where one has changed."""
        now = self._sums()
        if changed := [name for name, sums in self.sums.items() if now.get(name, sums) != sums]:
            raise MechanismError(f"{changed[0]} has changed, which is not trained ({len(changed)} in all)")


def sum_of_bits(tensor: torch.Tensor) -> int:
    """Return the sum of a tensor's memory, read as whole numbers: of 8 bytes where it can, which is fastest."""
    flat = tensor.detach().contiguous().view(-1)
    fits = flat.nbytes % 8 == 0 and flat.storage_offset() * flat.element_size() % 8 == 0
    kinds = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return int(flat.view(kinds[8 if fits else flat.element_size()]).sum(dtype=torch.int64))


def catch_error(test: Callable[[], None]) -> Optional[MechanismError]:
    try:
        test()
    except MechanismError as error:
        return error
    return None


def without_groups(sampler: PoissonAuthorSampler) -> Callable[[], np.ndarray]:
    """Return what draws authors as one group: groups of their own would hide that two samplers draw alike."""
    sampler.members = None
    return sampler.draw_authors


def groups_of(sampler: PoissonAuthorSampler) -> np.ndarray:
    """Return the group of each author, where there are several groups."""
    assert sampler.groups is not None
    return sampler.groups
