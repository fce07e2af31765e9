"""The mechanism, without any Trainer: DP-SGD whose privacy unit is the author.

Promise: the weights after each step are a function of the weights before it, of public numbers, and of
(sum of clipped per-author gradients + N(0, sigma^2 C^2 I)) / B over a Poisson sample of the authors [1, 2, 3]. That is what
accounting.py accounts for.

A step, in the order of this file:

1. every author enters the batch independently with probability q = B / N (Poisson sampling), and up to k of
   the author's samples are drawn, fresh each time and without replacement (`PoissonAuthorSampler`); with b noise bands
   groups take turns, and an author enters the batches of the own group with probability b q (bands.py);
2. author a's loss is the mean cross-entropy over a's own target tokens (`author_losses`);
3. g_a, the gradient of that loss, is clipped to norm C over all trainable parameters together and summed over
   the authors (an engine of `clipping`: `GhostClipping`, or `GradSampleClipping`, the plain reference);
4. the step is written to the ledger, then one draw of N(0, sigma^2 C^2 I) is added, the sum is divided by the
   constant B, and the optimizer takes it as its gradient (`AuthorDPOptimizer`).

References:
    [1] Abadi et al. 2016, Deep Learning with Differential Privacy, arXiv 1607.00133 (the mechanism)
    [2] McMahan et al. 2018, Learning Differentially Private Recurrent Language Models, arXiv 1710.06963 (users)
    [3] Charles et al. 2024, Fine-Tuning LLMs with User-Level Differential Privacy, arXiv 2407.07737 (user-level sampling)
"""

import math
from collections.abc import Callable
from typing import Any, Optional

import numpy as np
import torch
import torch.distributed as dist
from opacus.optimizers import DPOptimizer

from author_dp.mechanism.adam_bc import AdamBC
from author_dp.mechanism.noise import BandMFNoise, GaussianNoise

PROBE_SIZE = 4_096  # coordinates behind the parameters to which nobody contributes: what is released there is noise alone


# --- step 1: which authors, which samples ---------------------------------------------------------------


# --- step 2: per-author loss ----------------------------------------------------------------------------


# --- step 3, the clipping, is in clipping/ --------------------------------------------------------------


# --- step 4: noise and update ---------------------------------------------------------------------------


class AuthorDPOptimizer(DPOptimizer):
    """Opacus' DPOptimizer for gradients that a clipping engine has already clipped and summed over authors.

    Guarantee: what reaches the wrapped optimizer is (sum of clipped gradients + N(0, sigma^2 C^2 I)) / B, the sum
    taken over the whole draw and the noise drawn once per step, whatever the number of processes and
    microbatches: each process adds an independent share of variance sigma^2 C^2 / world_size, then all are summed.
    A summed gradient is used once. The step of an empty draw is noise. With `begin`, noise is correlated over steps (bands.py),
    and each process adds all of it in its slice of the coordinates, the sums of the others coming without any.

    The engine adds to `parameter.summed_grad`, float32 and of the parameter's shape; these lie one after another in
    one buffer, `sums`, so that noise and processes each take one pass. Behind them, `PAD` coordinates belong to no parameter:
    there is nothing but noise, by which a run can check itself (selfcheck.py). A step is:
    1) `before_release` is called, which records the step in the ledger (on the first process)
    2) the noise share is added to this process' sum of clipped gradients, and it is divided by the constant B
    3) the processes' buffers are summed: none can go on before all have done 1)
    4) `after_release` is given what was released in the pad, and the wrapped optimizer updates the parameters
    5) `zero_grad` makes the sums zero; without it there is no further step

    Args:
        optimizer: the wrapped torch optimizer.
        noise_multiplier: sigma.
        clip_norm: C.
        expected_batch_size: B, in authors.
        before_release: called at the start of every step; an exception prevents the step.
        after_release: called with the released pad, flat, before the update; an exception prevents it.
        canaries: whose `table.weight` is clipped and noised behind the pad, and never updated (gradient_audit.py).
        secure_noise: harden the noise (`NoiseSource`).
    """

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
            optimizer,
            noise_multiplier=noise_multiplier,
            max_grad_norm=clip_norm,
            expected_batch_size=expected_batch_size,
        )
        self.before_release, self.after_release = before_release, after_release
        self.world_size = dist.get_world_size() if dist.is_initialized() else 1
        self.noise = GaussianNoise(self.params[0].device, secure_noise)
        self.bands: Optional[BandMFNoise] = None
        self.draw: Optional[int] = None  # whose clipped gradients are in the sums, where that matters: AuthorDraw.number
        self._used = False
        self.allocate_buffer(canaries)

    def allocate_buffer(self, canaries: Any) -> None:
        """Give every parameter its place in the sums."""
        behind = [] if canaries is None else [canaries.table.weight]
        sizes = [*(parameter.numel() for parameter in self.params), PROBE_SIZE + sum(c.numel() for c in behind)]
        self.grad_buffer = torch.zeros(sum(sizes), device=self.params[0].device)
        *views, self.pad = self.grad_buffer.split(sizes)
        for parameter, view in zip(self.params, views):
            parameter.summed_grad = view.view_as(parameter)
        for parameter in behind:
            parameter.summed_grad = self.pad[PROBE_SIZE:].view_as(parameter)

    def begin(self, coefficients: np.ndarray) -> None:
        """Begin a training: the noise of what follows is by these band coefficients, (bands,), with nothing before it.

        Raises:
            ValueError: for coefficients of norm above 1, by which an author would add more than is accounted for.
        """
        if not np.linalg.norm(coefficients) <= 1:
            raise ValueError(f"band coefficients {coefficients} must have norm 1")
        self._slice = self.noise_slice()
        several = len(coefficients) > 1 and self.noise_multiplier > 0
        self.bands = BandMFNoise(coefficients, len(self._slice), self.grad_buffer.device) if several else None

    def noise_slice(self) -> torch.Tensor:
        """Return the part of the sums to which this process adds the whole of the noise where noise has bands."""
        return self.grad_buffer.tensor_split(self.world_size)[dist.get_rank() if dist.is_initialized() else 0]

    def check_sums(self) -> None:
        """Raise RuntimeError where the sums are not those of the draw whose turn it is."""
        if self._used:
            raise RuntimeError("the summed gradients were used in the last step: call zero_grad before the next one")
        if self.bands is not None and self.draw != self.bands.steps:
            raise RuntimeError(
                f"step {self.bands.steps} with noise bands takes the draw of that number, not {self.draw}: after a draw that was "
                "thrown away, authors would come back too early"
            )

    def pre_step(self, closure: Optional[Callable] = None) -> bool:
        """Steps 1 to 3 of the class' list, and the check of the fourth. Overrides Opacus', which would clip here."""
        self.check_sums()
        self.before_release()
        self._used = True
        std = self.noise_multiplier * self.max_grad_norm / math.sqrt(self.world_size)
        if self.bands is not None:
            self.bands.add_(self._slice, self.noise, std * math.sqrt(self.world_size))
            std = 0.0
        for part in self.grad_buffer.split(self.noise.elements):  # while it is in the cache
            if std > 0:
                self.noise.add_(part, std)
            part.div_(self.expected_batch_size)
        if self.world_size > 1:
            dist.all_reduce(self.grad_buffer)
        if self.after_release is not None:
            self.after_release(self.pad)
        self.set_gradients()
        return True

    def set_gradients(self) -> None:
        """Give the wrapped optimizer what was released, and where it wants to know, how noisy that is."""
        if isinstance(self.original_optimizer, AdamBC):
            self.original_optimizer.noise_variance = self.noise_variance()
        for parameter in self.params:
            parameter.grad = parameter.summed_grad

    def noise_variance(self) -> float:
        """Return the variance of the noise in each coordinate of what the last step released."""
        scale = 1.0 if self.bands is None else self.bands.variance
        return scale * (self.noise_multiplier * self.max_grad_norm / self.expected_batch_size) ** 2

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the last step's gradients. Overrides Opacus', which would take the sums' places away."""
        self.original_optimizer.zero_grad(set_to_none)
        self.grad_buffer.zero_()
        self._used, self.draw = False, None
