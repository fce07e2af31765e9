"""Reference clipping engine: Opacus stores per-sample gradients, which are summed per author and clipped.

Guarantees: each author's gradient enters the sum with norm at most C over all trainable parameters together.

The engine is simple and takes any layer that Opacus knows. Its memory and time grow with authors x parameters, which `ghost.py`
avoids.

Example:

    >>> engine = GradSampleClipping(model, clip_norm=1.0)
    >>> norms = engine.backward(author_losses(engine.module, batch), batch["author"])

References:
    [1] Yousefpour et al. 2021, Opacus: User-Friendly Differential Privacy Library in PyTorch, arXiv 2109.12298
"""

import inspect
import warnings
from typing import Any, Optional

import torch
from opacus.grad_sample import GradSampleModule, register_grad_sampler
from torch import nn
from transformers.pytorch_utils import Conv1D

from author_dp.clipping.author_groups import AuthorIndex
from author_dp.clipping.norms import squared_norms
from author_dp.clipping.positions import separate_positions
from author_dp.errors import UserError


@register_grad_sampler(Conv1D)
def conv1d_grad_sample(
    layer: Conv1D, activations: list[torch.Tensor], backprops: torch.Tensor
) -> dict[nn.Parameter, torch.Tensor]:
    """Return per-sample gradients of Hugging Face's Conv1D, a linear layer with weight (inputs, outputs)."""
    grad_samples = {}
    if layer.weight.requires_grad:
        grad_samples[layer.weight] = torch.einsum("n...i,n...j->nij", activations[0].to(backprops.dtype), backprops)
    if layer.bias.requires_grad:
        grad_samples[layer.bias] = torch.einsum("n...j->nj", backprops)
    return grad_samples


class GradSampleClipping:
    """Clip per-author gradients that Opacus' GradSampleModule stores.

    Guarantees: each call adds to every `parameter.summed_grad` a sum over authors in which each author has L2 norm at most
    `clip_norm` over all trainable parameters together. Tied parameters count once, as the sum of their uses. An author whose
    gradient is not finite contributes zero. `norms` and the summed gradients are not private.

    Args:
        model: its trainable parameters are clipped.
        clip_norm: C.
    Raises:
        UserError: if a trainable parameter has no per-sample gradient; nothing is ever trained unclipped.
    """

    def __init__(self, model: nn.Module, clip_norm: float):
        self.clip_norm = clip_norm
        self.parameters: dict[str, Any] = {name: p for name, p in model.named_parameters() if p.requires_grad}
        for name, layer in model.named_modules():
            if isinstance(layer, nn.Embedding) and layer.weight.requires_grad and takes_more_than_ids(layer):
                raise UserError(f"--clipping grad_sample: it cannot follow the trainable {name}. Use --clipping ghost.")
        self._hooks = separate_positions(model)
        try:
            self.module = GradSampleModule(model, loss_reduction="sum", strict=True)
        except NotImplementedError as error:
            raise UserError(f"--clipping grad_sample: {str(error)[:200]}. Use --clipping ghost, or --enable_lora.") from error

    def backward(self, losses: torch.Tensor, author: torch.Tensor, samples_each: Optional[int] = None) -> torch.Tensor:
        """Backpropagate one microbatch, clip, and add to `summed_grad`.

        Args:
            losses: (authors,), attached to the graph of `self.module`.
            author: int64 (samples,), ascending, the author of each sample.
            samples_each: as for `AuthorIndex`.
        Returns:
            norms before clipping, (authors,); inf or nan for an author who contributes nothing.
        """
        with warnings.catch_warnings():
            # The inputs of embeddings, and of adapters behind frozen layers, need no gradient; the hooks do fire.
            warnings.filterwarnings("ignore", message="Full backward hook is firing")
            losses.sum().backward()
        authors, gradients = AuthorIndex(author, len(losses), samples_each), {}
        for name, parameter in self.parameters.items():
            if parameter.grad is not None:  # else the loss does not use it
                gradients[parameter] = authors.sum(self._per_sample(name, parameter, len(author)))
            parameter.grad = parameter.grad_sample = None
        norms = torch.stack([squared_norms(g).sqrt() for g in gradients.values()], 1).norm(dim=1)
        factors = (self.clip_norm / norms).clamp(max=1.0)  # min(1, C / ||g_a||), (authors,)
        finite = norms.isfinite()
        if not finite.all():  # leave out the other authors: zero times nan would be nan
            factors, gradients = factors[finite], {p: gradient[finite] for p, gradient in gradients.items()}
        for parameter, gradient in gradients.items():
            parameter.summed_grad.add_(torch.einsum("a,a...->...", factors, gradient))
        return norms

    def _per_sample(self, name: str, parameter: Any, samples: int) -> torch.Tensor:
        """Return Opacus' per-sample gradients, (samples, ...)."""
        per_sample = parameter.grad_sample
        if not isinstance(per_sample, torch.Tensor) or len(per_sample) != samples:
            raise UserError(
                f"--clipping grad_sample: the trainable parameter {name} has no per-author gradient (its layer hides its "
                "samples). Use --clipping ghost, or --enable_lora."
            )
        return per_sample

    def close(self) -> None:
        """Remove the hooks from the model."""
        self.module.to_standard_module()
        for hook in self._hooks:
            hook.remove()


def takes_more_than_ids(layer: nn.Embedding) -> bool:
    """Return whether an embedding takes inputs beside ids, like OPT's positions: Opacus' hooks raise an error there."""
    return len(inspect.signature(layer.forward).parameters) > 1
