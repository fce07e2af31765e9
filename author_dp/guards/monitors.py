"""Monitors of a run's own mechanism while it trains: sampling, noise, weights, precision, processes and canaries.

Guarantees: each monitor tests at every log line, before each checkpoint and at the end; those of frozen weights and of the
ledger's file at checkpoints and at the end only. A failure ends the run on all processes.

Example:

    >>> monitors = RunMonitors(plan, canaries=None, norms=NormStatistics(1.0, device))
    >>> monitors.start(make_sampler, budget, device, secure_noise=False)
    >>> monitors.on_step(batch_size, index), monitors.on_release(probe)  # in each step
    >>> monitors.test()  # at log lines
"""

from collections.abc import Callable, Collection
from typing import Any, Optional

import numpy as np
import torch
from torch import nn

from author_dp.accounting.budget import Budget
from author_dp.accounting.plan import PrivacyPlan
from author_dp.clipping.norm_stats import NormStatistics
from author_dp.distributed import gather, rank_and_world_size
from author_dp.errors import MechanismError, UserError
from author_dp.guards.canary_monitor import CanaryMonitor
from author_dp.guards.gradient_canaries import GradientCanaries
from author_dp.guards.noise_inversion import NoiseDecorrelator
from author_dp.guards.noise_monitor import NoiseMonitor, make_noise_monitor, sample_noise
from author_dp.guards.precision import PrecisionMonitor
from author_dp.guards.process_agreement import AgreementMonitor, find_process_mismatches
from author_dp.guards.sampling_monitor import CyclicSamplingMonitor, SamplingMonitor
from author_dp.guards.seed_checks import check_unseeded, check_unseeded_groups, check_unseeded_sampling
from author_dp.guards.slot_monitors import SlotCanaryMonitor, SlotMonitor
from author_dp.mechanism.fsdp import local_shard
from author_dp.mechanism.optimizer import PROBE_SIZE
from author_dp.mechanism.sampling import PoissonAuthorSampler, sampler_groups, without_groups
from author_dp.mechanism.secret_generators import sample_generators
from author_dp.models.quantization import quant_scales


class RunMonitors:
    """The monitors of a run, new for each of its trainings.

    Args:
        canaries: gradient canaries, whose releases are tested too; None: none.
        norms: counts the authors that are clipped.
    Attributes:
        num_canaries: number of included canaries.
        sampling, noise: monitors of the last training; None before it, and `noise` without noise.
    Raises:
        UserError: for canaries in a run without noise.
    """

    _monitors: list[Any]  # each with `test`
    _ranks: Optional[AgreementMonitor]
    _updates: Optional["UpdateMonitor"]
    _precision: Optional[PrecisionMonitor]
    _frozen: Optional["FrozenWeightsMonitor"]

    def __init__(self, plan: PrivacyPlan, canaries: Optional[GradientCanaries], norms: NormStatistics):
        self.plan, self.canaries, self.norms = plan, canaries, norms
        self.num_canaries = 0 if canaries is None else int(canaries.included.sum())
        self.sampling: Optional[SamplingMonitor | CyclicSamplingMonitor | SlotMonitor] = None
        self.noise: Optional[NoiseMonitor] = None
        self._canary_monitor: Optional[CanaryMonitor | SlotCanaryMonitor] = None if canaries is None else canaries.start(plan)
        self._decorrelate = NoiseDecorrelator(np.ones(1))
        self.stop()

    def start(
        self, sampler: Callable[[], PoissonAuthorSampler], budget: Budget, device: torch.device, secure_noise: bool
    ) -> None:
        """Start the monitors of a training. Collective.

        Args:
            sampler: makes a sampler as the run does.
            budget: of the run; its ledger's directory keeps the first probe.
            device, secure_noise: as for the run's `GaussianNoise`.
        Raises:
            MechanismError: on all processes, if sampling, noise or random numbers inside the model of one follow a seed.
        """
        self.stop()
        if self.plan.disable_dp:
            return
        if not self.plan.slots:  # which draw nothing but groups
            rate = self.plan.event(0).sample_rate
            self.record_failure(check_unseeded_sampling, lambda: without_groups(sampler()), self.plan.num_authors, rate)
        if (groups := self.plan.slots or self.plan.noise_bands) > 1:
            self.record_failure(check_unseeded_groups, lambda: sampler_groups(sampler()), groups)
        self.record_failure(check_unseeded, lambda: sample_generators([device], PROBE_SIZE), "randomness inside the model")
        if self.plan.noise_multiplier:
            self.record_failure(check_unseeded, lambda: sample_noise(device, secure_noise), "noise")
        self.test()
        self.noise = make_noise_monitor(self.plan, budget.ledger.path.parent)
        self._decorrelate = NoiseDecorrelator(self.plan.coefficients())
        self._canary_monitor = None if self.canaries is None else self.canaries.start(self.plan)
        self._updates, self._precision = UpdateMonitor(budget), PrecisionMonitor(device)
        monitors = (self._precision, self._updates, self.noise, self._canary_monitor)
        self._monitors = [monitor for monitor in monitors if monitor is not None]

    def stop(self) -> None:
        """Test nothing from here on."""
        self._monitors, self._ranks, self._updates, self._precision, self._frozen = [], None, None, None, None
        self._failures: list[str] = []  # of this process, until the next test
        self._raised: Optional[MechanismError] = None

    def watch_sampler(self, sampler: PoissonAuthorSampler) -> None:
        """Monitor the batches of `sampler` from here on: the training's."""
        if self.plan.disable_dp:
            return
        bands, rate = self.plan.noise_bands, self.plan.event(0).sample_rate
        if self.plan.slots:
            slots = sampler_groups(sampler)
            self.sampling = SlotMonitor(slots, self.plan.slots, self.num_canaries)
            if isinstance(self._canary_monitor, SlotCanaryMonitor):
                self._canary_monitor.set_slots(slots)
        elif bands == 1:
            self.sampling = SamplingMonitor(self.plan.num_authors, self.num_canaries, rate)
        else:
            self.sampling = CyclicSamplingMonitor(sampler_groups(sampler), bands, self.num_canaries, rate)
            if isinstance(self._canary_monitor, CanaryMonitor):
                self._canary_monitor.set_groups(self.plan.coefficients(), sampler_groups(sampler))
        sampler.on_batch = self.sampling.on_sample
        self._ranks, self.norms.authors = AgreementMonitor(sampler), 0
        self._monitors.append(self.sampling)

    def watch_frozen_weights(self, model: nn.Module) -> None:
        """Monitor the weights that are not trained, as they are now."""
        if not self.plan.disable_dp:
            self._frozen = FrozenWeightsMonitor(model)

    def count_updates(self, optimizer: torch.optim.Optimizer) -> None:
        """Count the updates of an optimizer from here on; a nested step is part of the outer one."""
        depth = 0

        def before_step(*_) -> None:
            nonlocal depth
            depth += 1

        def after_step(*_) -> None:
            nonlocal depth
            depth -= 1
            if not depth and self._updates is not None:
                self._updates.updates += 1

        optimizer.register_step_pre_hook(before_step)
        optimizer.register_step_post_hook(after_step)

    def on_step(self, batch_size: int, index: int) -> None:
        """Add a step, with its number of authors without canaries, and its batch's index."""
        if self.sampling is not None and self._ranks is not None and self._precision is not None:
            self.sampling.on_step(batch_size)
            self._ranks.on_step(index, batch_size)
            self._precision.record_settings()

    def on_release(self, probe: torch.Tensor) -> None:
        """Add what a step released in the probe and behind it for the canaries, flat."""
        row = self._decorrelate(probe)
        if self.noise is not None:
            self.noise.add(row[:PROBE_SIZE])
        if self._canary_monitor is not None:
            self._canary_monitor.add(row[PROBE_SIZE:])

    def record_failure(self, check: Callable[..., None], *args: Any) -> None:
        """Call a check. If it fails on one of several processes, the next `test` raises on all, so that the main one voids."""
        try:
            check(*args)
        except MechanismError as error:
            if rank_and_world_size()[1] == 1:
                raise
            self._failures.append(str(error))

    def test(self, full: bool = False) -> None:
        """Raise MechanismError on all processes if a monitor, or another check, of one fails. Collective.

        Args:
            full: test the frozen weights and the ledger's file, too.
        """
        if self.plan.disable_dp:
            return
        tests = [monitor.test for monitor in self._monitors]
        if full:
            tests += [monitor.test_full for monitor in (self._updates, self._frozen) if monitor is not None]
        failures, user_errors = list(self._failures), list[str]()
        for test in tests:
            try:
                test()
            except MechanismError as error:
                failures.append(str(error))
            except UserError as error:  # of a ledger that was edited, for example; it must not hide the others
                user_errors.append(str(error))
        gathered = gather((failures, user_errors, None if self._ranks is None else self._ranks.record(self.norms.authors)))
        mismatches = [] if self._ranks is None else find_process_mismatches([record for _, _, record in gathered])
        if found := [*mismatches, *(failure for of_process, _, _ in gathered for failure in of_process)]:
            self._raised = MechanismError(found[0])
            raise self._raised
        if unusable := [error for _, of_process, _ in gathered for error in of_process]:
            raise UserError(unusable[0])

    def find_failure(self) -> Optional[MechanismError]:
        """Return a failure that this process can tell, where the training ends by another error; None if there is none.

        Not collective. Monitors that count are left out: the error may have come between two of their counts.
        """
        if self._updates is None or not self._updates.budget.steps or self._raised is not None:  # nothing was released
            return self._raised
        for monitor in (self._precision, self.noise):
            try:
                if monitor is not None:
                    monitor.test()
            except MechanismError as error:
                return error
        return MechanismError(self._failures[0]) if self._failures else None


class UpdateMonitor:
    """Compare the updates of the weights with the steps in the ledger.

    Attributes:
        updates: number of updates in this training.
    """

    def __init__(self, budget: Budget):
        self.budget, self.updates = budget, 0

    def test(self) -> None:
        """Raise MechanismError if there were more or fewer updates than recorded steps."""
        if self.updates != self.budget.steps:
            raise MechanismError(f"weights were updated {self.updates} times, but the ledger has {self.budget.steps} steps")

    def test_full(self) -> None:
        """Raise MechanismError if the ledger's file lacks steps; on the main process only."""
        if (missing := self.budget.missing_steps()) != 0:
            raise MechanismError(f"{self.budget.ledger.path} lacks {missing} steps of this run")


class FrozenWeightsMonitor:
    """Compare the weights and saved buffers that are not trained with their first values.

    Neither noise nor gradients may reach them: a checkpoint holds them too.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.checksums = self._checksums()

    def _checksums(self) -> dict[str, list[int]]:
        """Return a checksum of each tensor; of a sharded one, of this process' shard."""
        saved = self.model.state_dict(keep_vars=True).keys()
        tensors = {name: [p, *quant_scales(p)] for name, p in self.model.named_parameters() if not p.requires_grad}
        tensors |= {name: [buffer] for name, buffer in self.model.named_buffers() if name in saved}
        return {name: [checksum(local_shard(tensor)) for tensor in parts] for name, parts in tensors.items()}

    def test_full(self) -> None:
        """Raise MechanismError if a tensor has changed."""
        now = self._checksums()
        if changed := [name for name, checksums in self.checksums.items() if now.get(name, checksums) != checksums]:
            raise MechanismError(f"{changed[0]} is not trained, but has changed ({len(changed)} tensors in all)")


def sum_trained_weights(model: nn.Module, names: Optional[Collection[str]] = None) -> dict[str, int]:
    """Return a checksum of each trained parameter, or of those with these names; of a sharded one, of this process' shard."""
    chosen = [(name, one) for name, one in model.named_parameters() if (one.requires_grad if names is None else name in names)]
    return {name: checksum(local_shard(one)) for name, one in chosen}


def checksum(tensor: torch.Tensor) -> int:
    """Return the sum of a tensor's memory as integers: of 8 bytes if it can be viewed so, which is fastest."""
    flat = tensor.detach().contiguous().view(-1)
    aligned = flat.nbytes % 8 == 0 and flat.storage_offset() * flat.element_size() % 8 == 0
    dtypes = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return int(flat.view(dtypes[8 if aligned else flat.element_size()]).sum(dtype=torch.int64))
