"""The reference clipping engine: per-author gradients, stored by Opacus, clipped and summed.

Promise: each author's gradient enters the sum with norm at most C over all trainable parameters together. Simple, and good for
any layer that Opacus knows; memory and time grow with authors x parameters, which `ghost.py` avoids.

Example:

    >>> engine = GradSampleClipping(model, clip_norm=1.0)
    >>> norms = engine.backward(author_losses(engine.module, batch), batch["author"])

References:
    [1] Yousefpour et al. 2021, Opacus: User-Friendly Differential Privacy Library in PyTorch, arXiv 2109.12298
"""

import inspect
import warnings
from typing import Any

import torch
from opacus.grad_sample import GradSampleModule, register_grad_sampler
from torch import nn
from transformers.pytorch_utils import Conv1D

from author_dp.clipping.grad_factors import squared_norms
from author_dp.clipping.positions import separate_positions
from author_dp.errors import UserError


@register_grad_sampler(Conv1D)
def conv1d_grad_sample(
    layer: Conv1D, activations: list[torch.Tensor], backprops: torch.Tensor
) -> dict[nn.Parameter, torch.Tensor]:
    """Per-sample gradients of Hugging Face's Conv1D, a linear layer with weight (inputs, outputs)."""
    grad_samples = {}
    if layer.weight.requires_grad:
        grad_samples[layer.weight] = torch.einsum("n...i,n...j->nij", activations[0].to(backprops.dtype), backprops)
    if layer.bias.requires_grad:
        grad_samples[layer.bias] = torch.einsum("n...j->nj", backprops)
    return grad_samples


class GradSampleClipping:
    """Clip per-author gradients that Opacus' GradSampleModule stores: any layer, memory authors x parameters.

    Guarantee: each call adds to every `parameter.summed_grad` a sum over authors in which each author has L2 norm
    at most `clip_norm` over all trainable parameters together, tied ones counted once, as the sum of their uses.
    An author whose gradient is not finite contributes zero. `norms` and the summed gradients are not private.

    Args:
        model: its trainable parameters are clipped.
        clip_norm: C.
    Raises:
        UserError: where a trainable parameter has no per-sample gradient; nothing is ever trained unclipped.
    """

    def __init__(self, model: nn.Module, clip_norm: float):
        self.clip_norm = clip_norm
        self.parameters: dict[str, Any] = {name: p for name, p in model.named_parameters() if p.requires_grad}
        for name, layer in model.named_modules():
            if isinstance(layer, nn.Embedding) and layer.weight.requires_grad and takes_more_than_ids(layer):
                raise UserError(f"--clipping grad_sample cannot follow the trainable {name}: use --clipping ghost")
        self._hooks = separate_positions(model)
        try:
            self.module = GradSampleModule(model, loss_reduction="sum", strict=True)
        except NotImplementedError as error:
            raise UserError(f"--model_name: {str(error)[:200]}; use --clipping ghost, or --enable_lora") from error

    def backward(self, losses: torch.Tensor, author: torch.Tensor) -> torch.Tensor:
        """Backpropagate one microbatch, clip, and add to `summed_grad`.

        Args:
            losses: (authors,), attached to the graph of `self.module`.
            author: int64 (samples,), the author of each sample.
        Returns:
            norms before clipping, (authors,); inf or nan for an author who contributes nothing.
        """
        with warnings.catch_warnings():
            # The inputs of embeddings, and of adapters behind frozen layers, need no gradient; the hooks do fire.
            warnings.filterwarnings("ignore", message="Full backward hook is firing")
            losses.sum().backward()
        gradients = {}
        for name, parameter in self.parameters.items():
            if parameter.grad is not None:  # else the loss does not use it
                gradients[parameter] = self._per_author(name, parameter, author, len(losses))
            parameter.grad = parameter.grad_sample = None
        norms = torch.stack([squared_norms(g).sqrt() for g in gradients.values()], 1).norm(dim=1)
        factors = (self.clip_norm / norms).clamp(max=1.0)  # min(1, C / ||g_a||), (authors,)
        finite = norms.isfinite()
        if not finite.all():  # leave these authors out: zero times nan would be nan
            factors, gradients = factors[finite], {p: gradient[finite] for p, gradient in gradients.items()}
        for parameter, gradient in gradients.items():
            parameter.summed_grad.add_(torch.einsum("a,a...->...", factors, gradient))
        return norms

    def _per_author(self, name: str, parameter: Any, author: torch.Tensor, authors: int) -> torch.Tensor:
        """Sum per-sample gradients over each author's samples: (samples, ...) to float32 (authors, ...)."""
        per_sample = parameter.grad_sample
        if not isinstance(per_sample, torch.Tensor) or len(per_sample) != len(author):
            raise UserError(
                f"--model_name: the trainable parameter {name} has no per-author gradient (its layer hides its samples): "
                "use --clipping ghost, or --enable_lora"
            )
        per_sample = per_sample.float()
        if authors == len(author):
            return per_sample
        return per_sample.new_zeros(authors, *per_sample.shape[1:]).index_add_(0, author, per_sample)

    def close(self) -> None:
        """Take the hooks off the model."""
        self.module.to_standard_module()
        for hook in self._hooks:
            hook.remove()


def takes_more_than_ids(layer: nn.Embedding) -> bool:
    """Whether an embedding has inputs that are no tensors, like OPT's positions: Opacus' hooks end in an error there."""
    return len(inspect.signature(layer.forward).parameters) > 1
