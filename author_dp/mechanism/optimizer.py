"""Add noise to the clipped sums of a step, and update the weights: the step of DP-SGD, without any Trainer.

Guarantees: under add-or-remove-one-author adjacency, the weights after each step are a function of the weights before it, of
public numbers, and of (sum of clipped per-author gradients + N(0, sigma^2 C^2 I)) / B over a Poisson sample of the authors [1, 2,
3]. One author moves the sum by at most the clip norm C. This is the mechanism that `accounting` accounts for.

Not protected: rounding is that of float32 (docs/threat-model.md), and noise is not hardened against attacks on its low-order bits
unless `secure_noise` is set (noise.py).

A step in the order of its modules:

1. `sampling`: every author enters the batch independently with probability q = B / N (Poisson sampling), with up to k samples,
   chosen anew each time and without replacement; with b noise bands, groups take turns, and an author enters the batches of its
   group with probability b q;
2. `losses`: author a's loss is the mean cross-entropy over a's target tokens;
3. `clipping`: g_a, the gradient of that loss, is clipped to norm C over all trainable parameters together, and summed over the
   authors into this module's gradient buffer (by `GhostClipping`, or by `GradSampleClipping`, the plain reference);
4. this module: the step is recorded in the ledger, then one draw of N(0, sigma^2 C^2 I) is added, the sum is divided by the
   constant B, and the wrapped optimizer takes it as its gradient.

References:
    [1] Abadi et al. 2016, Deep Learning with Differential Privacy, arXiv 1607.00133, Algorithm 1 (the mechanism)
    [2] McMahan et al. 2018, Learning Differentially Private Recurrent Language Models, arXiv 1710.06963 (users)
    [3] Charles et al. 2024, Fine-Tuning LLMs with User-Level Differential Privacy, arXiv 2407.07737 (user-level sampling)
"""

import math
from collections.abc import Callable
from typing import Any, Optional

import numpy as np
import torch
from opacus.optimizers import DPOptimizer

from author_dp.distributed import all_reduce_sum, rank_and_world_size
from author_dp.mechanism.adam_bc import AdamBC
from author_dp.mechanism.noise import BandMFNoise, GaussianNoise

PROBE_SIZE = 4_096  # coordinates to which no author contributes: what is released there is noise alone


class GradBuffer:
    """Hold the clipped sums of all parameters in one flat tensor, so that noise and processes each take one pass.

    Layout: the parameters one after another, then the probe, then the canaries' table. The probe's PROBE_SIZE coordinates belong
    to no parameter, so what is released there is noise alone, by which a run checks itself (guards/noise_monitor.py). Clipping
    engines add to `parameter.summed_grad`, a view of the parameter's place, float32 and of its shape.

    Here every process has all coordinates, with the clipped sums of its authors and a share of the noise, until both are summed
    over the processes. ShardedGradBuffer (fsdp.py) has each coordinate on one process.

    Not protected: before noise is added, `sums` is private; so is what one process holds before `reduce_released`.

    Args:
        parameters: the trainable ones.
        canaries: with `table.weight`, which is clipped and noised behind the probe, and never updated
            (guards/gradient_canaries.py); None without canaries.
    Attributes:
        sums: float32 (coordinates,), what this process adds noise to.
        probe: (PROBE_SIZE + canaries,), what was released there; valid after `reduce_released`.
        noise_shares: number of processes whose independent noise adds up in each coordinate.
        noise_slice: the view of `sums` to which this process adds all of the noise where noise has bands. The slices of all
            processes cover each coordinate once.
    """

    def __init__(self, parameters: list[Any], canaries: Any = None):
        rank, world_size = rank_and_world_size()
        tables = [] if canaries is None else [canaries.table.weight]
        sizes = [*(parameter.numel() for parameter in parameters), PROBE_SIZE + sum(table.numel() for table in tables)]
        self.sums = torch.zeros(sum(sizes), device=parameters[0].device)
        *views, self.probe = self.sums.split(sizes)
        for parameter, view in zip(parameters, views):
            parameter.summed_grad = view.view_as(parameter)
        for table in tables:
            table.summed_grad = self.probe[PROBE_SIZE:].view_as(table)
        self.noise_shares = world_size
        self.noise_slice = self.sums.tensor_split(world_size)[rank]

    def reduce_sums(self) -> None:
        """Sum over the processes before noise is added: nothing here, as each process adds its share first."""

    def reduce_released(self) -> None:
        """Sum the noisy shares of all processes, in place. Collective."""
        all_reduce_sum(self.sums)

    def zero_(self) -> None:
        """Forget the sums."""
        self.sums.zero_()


class AuthorDPOptimizer(DPOptimizer):
    """Opacus' DPOptimizer for gradients that a clipping engine has already clipped and summed over authors.

    Guarantee: what reaches the wrapped optimizer is (sum of clipped gradients + N(0, sigma^2 C^2 I)) / B, the sum taken over the
    batch of all processes and the noise drawn once per step, whatever the number of processes and microbatches. Adding or
    removing one author moves that sum by at most C before noise. A sum is used once. The step of an empty batch is noise. After
    `start_training`, noise is correlated over steps (accounting/banded_mf.py).

    Args:
        optimizer: the wrapped torch optimizer.
        noise_multiplier: sigma.
        clip_norm: C.
        expected_batch_size: B, in authors.
        before_release: called at the start of every step, to record it in the ledger; an exception prevents the step.
        after_release: called with the released probe, flat, before the update; an exception prevents the update.
        canaries: as GradBuffer's.
        secure_noise: harden the noise (`GaussianNoise`).
    Attributes:
        grad_buffer: where clipping engines leave the clipped sums.
        band_noise: the noise of a training with bands; None otherwise.
        next_batch: index of the batch whose turn it is, where authors take turns; None otherwise.
        batch_index: `AuthorBatch.batch_index` of the batch whose clipped gradients are in the buffer; set by the caller.
    """

    buffer_class: type[GradBuffer] = GradBuffer

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        noise_multiplier: float,
        clip_norm: float,
        expected_batch_size: int,
        before_release: Callable[[], None],
        after_release: Optional[Callable[[torch.Tensor], None]] = None,
        canaries: Any = None,
        secure_noise: bool = False,
    ):
        super().__init__(
            optimizer, noise_multiplier=noise_multiplier, max_grad_norm=clip_norm, expected_batch_size=expected_batch_size
        )
        self.before_release, self.after_release = before_release, after_release
        self.noise = GaussianNoise(self.params[0].device, secure_noise)
        self.band_noise: Optional[BandMFNoise] = None
        self.next_batch: Optional[int] = None
        self.batch_index: Optional[int] = None
        self.grad_buffer = self.buffer_class(self.params, canaries)
        self._used = False

    def start_training(self, coefficients: np.ndarray, in_turn: bool = False) -> None:
        """Start a training whose noise has these band coefficients, (bands,), and no noise of earlier steps.

        Args:
            in_turn: whether authors take turns also without bands (balls-in-bins sampling), so that no batch may be left out.
        Raises:
            ValueError: for coefficients of norm above 1, by which an author would add more than is accounted for.
        """
        if not np.linalg.norm(coefficients) <= 1:
            raise ValueError(f"band coefficients {coefficients} must have norm 1")
        noise_slice = self.grad_buffer.noise_slice
        banded = len(coefficients) > 1 and self.noise_multiplier > 0
        self.band_noise = BandMFNoise(coefficients, len(noise_slice), noise_slice.device) if banded else None
        self.next_batch = 0 if banded or in_turn else None

    def pre_step(self, closure: Optional[Callable] = None) -> bool:
        """Release the noisy mean of this step's clipped gradients. Overrides Opacus', which would clip here.

        1. Record the step in the ledger, before anything is released.
        2. Add noise to the sums of clipped gradients, and divide by the constant B.
        3. Sum over the processes: none can proceed before all have done 1.
        4. Check what was released in the probe.
        5. Set the gradients of the wrapped optimizer, which updates the parameters next.

        The buffer keeps what was released until `zero_grad`; without it there is no further step.
        """
        self.check_batch()
        self.before_release()
        self._used = True
        self.grad_buffer.reduce_sums()
        self.add_noise_and_divide()
        self.grad_buffer.reduce_released()
        self.next_batch = None if self.next_batch is None else self.next_batch + 1
        if self.after_release is not None:
            self.after_release(self.grad_buffer.probe)
        self.set_gradients()
        return True

    def check_batch(self) -> None:
        """Raise RuntimeError where the buffer was used already, or holds another batch than the one whose turn it is."""
        if self._used:
            raise RuntimeError("the summed gradients were used in the last step: call zero_grad before the next step")
        if self.next_batch is not None and self.batch_index != self.next_batch:
            raise RuntimeError(
                f"step {self.next_batch} needs the batch of that index, not {self.batch_index}, as authors take turns: after a "
                "discarded batch, authors would return too early. Start a new training"
            )

    def add_noise_and_divide(self) -> None:
        """Add this process' noise to the buffer and divide by B, chunk by chunk, each while it is in the cache.

        Guarantee: without bands, once the processes are summed, the noise of each coordinate has variance (sigma C / B)^2: each
        of `noise_shares` processes adds an independent share of variance (sigma C)^2 / noise_shares. With bands, one process adds
        all of a coordinate's noise, and the others none.
        """
        std = self.noise_multiplier * self.max_grad_norm
        if self.band_noise is not None:
            self.band_noise.add_(self.grad_buffer.noise_slice, self.noise, std)
            std = 0.0
        std /= math.sqrt(self.grad_buffer.noise_shares)
        for chunk in self.grad_buffer.sums.split(self.noise.chunk_size):
            if std > 0:
                self.noise.add_(chunk, std)
            chunk.div_(self.expected_batch_size)

    def set_gradients(self) -> None:
        """Give the wrapped optimizer the released gradients, and AdamBC their noise variance."""
        if isinstance(self.original_optimizer, AdamBC):
            self.original_optimizer.noise_variance = self.noise_variance()
        for parameter in self.params:
            parameter.grad = parameter.summed_grad

    def noise_variance(self) -> float:
        """Return the noise variance of each coordinate that the last step released."""
        scale = 1.0 if self.band_noise is None else self.band_noise.variance
        return scale * (self.noise_multiplier * self.max_grad_norm / self.expected_batch_size) ** 2

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the last step's gradients. Overrides Opacus', which would take the views of the buffer away."""
        self.original_optimizer.zero_grad(set_to_none)
        self.grad_buffer.zero_()
        self._used, self.batch_index = False, None
