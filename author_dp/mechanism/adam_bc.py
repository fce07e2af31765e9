"""Subtract the noise variance, which is public, from AdamW's second moment (DP-AdamBC).

Why: the square of a noisy gradient is, in expectation, the gradient's own square plus the noise variance Phi. Plain Adam divides
by the root of both. Under noise all coordinates then move alike, as in SGD, and the more slowly the more noise a step has. With
noise bands a step has two to five times the noise, most of which later steps take back. Dividing by that noise would give away
what the bands gain (docs/hyperparameters.md has the figures).

Guarantees: none is needed. This is post-processing of released gradients with public numbers.

Reference:
    Tang, Shpilevskiy and Lécuyer 2023, DP-AdamBC: Your DP-Adam Is Actually DP-SGD (Unless You Apply Bias Correction),
    arXiv 2312.14334, Algorithm 1. Their floor gamma' is a number to tune; here it is a fraction of Phi, so it follows the noise.
"""

from collections.abc import Callable
from typing import Any, Optional

import torch

from author_dp.errors import UserError

FLOOR = 0.1  # of the noise variance: below it, what is left of a second moment is mostly chance
SUPPORTED = ("adamw_torch", "adamw_torch_fused")  # names of --optim whose second moment can be corrected


class AdamBC(torch.optim.AdamW):
    """AdamW that divides by sqrt(max(v - Phi, FLOOR Phi)) + eps, by Algorithm 1 of DP-AdamBC.

    v and Phi are the means, by beta2, of squared gradients and of noise variances, divided by 1 - beta2^t. The state is AdamW's,
    with `noise_variance`, the mean of Phi before that division, so the noise may differ in each step. AdamW can continue from
    this state, and AdamBC from AdamW's.

    Args:
        optimizer: an AdamW that took no step yet, whose parameters and options are taken over.
    Attributes:
        noise_variance: Phi, of each coordinate of the gradients of the next step.
    """

    def __init__(self, optimizer: torch.optim.Optimizer):
        super().__init__(optimizer.param_groups)
        self.noise_variance = 0.0

    @torch.no_grad()
    def step(self, closure: Optional[Callable[[], Any]] = None) -> Any:
        """Update every parameter that has a gradient."""
        loss = None if closure is None else closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)
        return loss

    def _update(self, parameter: torch.Tensor, group: dict[str, Any]) -> None:
        """Update one parameter, in place."""
        state, (beta1, beta2), lr = self.state[parameter], group["betas"], group["lr"]
        if not state:
            state["step"] = torch.zeros(())
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        if "noise_variance" not in state:  # the state of plain AdamW, whose steps had this noise, too
            state["noise_variance"] = self.noise_variance * (1 - beta2 ** float(state["step"]))
        state["step"] += 1
        state["noise_variance"] += (1 - beta2) * (self.noise_variance - state["noise_variance"])
        mean, square = state["exp_avg"], state["exp_avg_sq"]
        mean.lerp_(parameter.grad, 1 - beta1)
        square.mul_(beta2).addcmul_(parameter.grad, parameter.grad, value=1 - beta2)
        steps, noise = float(state["step"]), state["noise_variance"]
        bias_correction = 1 - beta2**steps
        divisor = square.sub(noise).clamp_(min=FLOOR * noise).div_(bias_correction).sqrt_().add_(group["eps"])
        parameter.mul_(1 - lr * group["weight_decay"])
        parameter.addcdiv_(mean, divisor, value=-lr / (1 - beta1**steps))


def use_adam_bc(optim: str, requested: Optional[bool], num_bands: int, optimizer: Optional[torch.optim.Optimizer] = None) -> bool:
    """Return whether AdamBC corrects Adam's second moment: if asked for, or by default with noise bands.

    Args:
        optim, requested: --optim and --adam_noise_correction.
        optimizer: the one to correct, where it exists: it may have been given as an object.
    Raises:
        UserError: if asked for with an optimizer other than AdamW.
    """
    if optimizer is not None and not is_plain_adamw(optimizer):
        optim = type(optimizer).__name__
    if not requested:
        return requested is None and num_bands > 1 and optim in SUPPORTED
    if optim not in SUPPORTED:
        raise UserError(f"--adam_noise_correction: it needs AdamW, not --optim {optim}. Use --optim {SUPPORTED[0]}")
    return True


def is_plain_adamw(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether an optimizer is torch's AdamW, with no option that changes its step."""
    return type(optimizer) is torch.optim.AdamW and not any(
        group.get("amsgrad") or group.get("maximize") for group in optimizer.param_groups
    )
