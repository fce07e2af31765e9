"""Ghost clipping with book-keeping: per-author clipping at nearly the speed and memory of ordinary training.

Promise: the same clipped sums as `grad_sample.GradSampleClipping`, to rounding, from one forward and one backward, without ever
storing the per-author gradient of a large layer. A tap behind each trained layer hands its inputs and output gradients to the
layer's rule (rules.py); what the rule returns knows its norms and its clipped sum (contributions.py). Autograd is asked for the
gradients of the layers' outputs only, which spares it the ordinary weight gradients.

Example:

    >>> engine = GhostClipping(model, clip_norm=1.0)
    >>> norms = engine.backward(author_losses(engine.module, batch), batch["author"])

References:
    [1] Li et al. 2022, Large Language Models Can Be Strong Differentially Private Learners, arXiv 2110.05679 (ghost norm)
    [2] Bu et al. 2023, Differentially Private Optimization on Large Model at Small Cost, arXiv 2210.00038 (book-keeping)
"""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from author_dp.clipping.contributions import Authors, Contribution, merge, total_squared_norms, without
from author_dp.clipping.rules import embedding, linear, rule_of
from author_dp.errors import UserError

FLAT_BLOCKS = ("OPTDecoderLayer",)  # join samples and tokens, sample by sample, into one dimension for some of their layers


class Tap(torch.autograd.Function):
    """Change nothing; in the backward pass, hand a layer's inputs and output gradient to the engine.

    The inputs are saved as autograd saves its own, so gradient checkpointing drops and recomputes them as it does those.
    """

    @staticmethod
    def forward(
        ctx, output: torch.Tensor, inputs: torch.Tensor, anchor: torch.Tensor, layer: nn.Module, collect: Callable
    ) -> torch.Tensor:
        ctx.save_for_backward(inputs)
        ctx.layer, ctx.collect = layer, collect
        return output.view_as(output)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple:
        ctx.collect(ctx.layer, *ctx.saved_tensors, gradient)
        return gradient, None, None, None, None


class GhostClipping:
    """Clip per-author gradients without storing them.

    Guarantee: each call adds to every `parameter.summed_grad` a sum over authors in which each author has L2 norm
    at most `clip_norm`, to rounding, over all trainable parameters together; tied embeddings count once, as the sum
    of their uses. An author whose gradient is not finite contributes zero. `norms` and the sums are not private.

    Args:
        model: its trainable parameters are clipped.
        clip_norm: C.
    Raises:
        UserError: for a trainable parameter without a rule; nothing is ever trained unclipped.
    """

    def __init__(self, model: nn.Module, clip_norm: float):
        self.module, self.clip_norm = model, clip_norm
        self.parameters: dict[Any, str] = {p: name for name, p in model.named_parameters() if p.requires_grad}
        owners = defaultdict(list)
        for name, layer in model.named_modules():
            for parameter in layer.parameters(recurse=False):
                if parameter.requires_grad:
                    owners[parameter].append((name, layer))
        for uses in owners.values():
            for name, layer in uses:
                if rule_of(layer) is None:
                    raise cannot_clip(f"{name} ({type(layer).__name__})")
            if len(uses) > 1 and {rule_of(layer) for _, layer in uses} != {embedding, linear}:
                raise cannot_clip(f"{name} ({type(layer).__name__})")
        self.tied = {parameter for parameter, uses in owners.items() if len(uses) > 1}
        # Every tap has this leaf as an input: what autograd must visit to reach it are the taps, and no weight.
        self._anchor = torch.zeros((), requires_grad=True, device=next(iter(self.parameters)).device)
        self._contributions: dict[nn.Parameter, list[Contribution]] = defaultdict(list)
        self._flat = {layer for block in model.modules() if type(block).__name__ in FLAT_BLOCKS for layer in block.modules()}
        self._rules: dict[nn.Module, Any] = {layer: rule_of(layer) for uses in owners.values() for _, layer in uses}
        self._hooks = [layer.register_forward_hook(self._tap) for layer in self._rules]

    def _tap(self, layer: nn.Module, inputs: tuple, output: torch.Tensor) -> torch.Tensor:
        if not torch.is_grad_enabled() or not output.requires_grad:
            return output
        if isinstance(layer, nn.Embedding):
            lookup: Any = output.grad_fn
            if lookup.name() != "EmbeddingBackward0":
                raise cannot_clip(f"layer {type(layer).__name__}, which does more than look up")
            used = lookup._saved_indices  # what was really looked up: OPT computes its positions inside the layer
        else:
            used = inputs[0].detach()
            if isinstance(layer, nn.Linear | Conv1D):
                used = used.to(output.dtype)  # as autocast does inside the layer
        return Tap.apply(output, used, self._anchor, layer, self._collect)

    def backward(self, losses: torch.Tensor, author: torch.Tensor) -> torch.Tensor:
        """Backpropagate one microbatch, clip, and add to `summed_grad`.

        Args:
            losses: (authors,), attached to the graph of `self.module`.
            author: int64 (samples,), ascending, the author of each sample.
        Returns:
            norms before clipping, (authors,); inf for an author who contributes nothing.
        """
        self._contributions.clear()
        authors = self._authors = Authors(author, len(losses))
        torch.autograd.grad(losses.sum(), self._anchor, allow_unused=True)
        contributions = {p: merge(self._contributions.pop(p, []), authors) for p in self.parameters}
        for parameter, parts in contributions.items():
            if not parts:
                raise cannot_clip(f"parameter {self.parameters[parameter]}, of which the loss shows no use")
        squares = torch.stack([total_squared_norms(parts, authors) for parts in contributions.values()]).sum(0)
        # Rounding may leave a small norm below zero; overflow must not pass for one.
        norms = squares.clamp(min=0).where(squares.isfinite(), torch.inf).sqrt()
        factors = (self.clip_norm / norms).clamp(max=1.0)  # min(1, C / ||g_a||), (authors,)
        finite = norms.isfinite()
        if not finite.all():  # their factor is zero, but zero times nan would be nan: leave these authors out
            contributions = {p: [without(part, ~finite, author) for part in parts] for p, parts in contributions.items()}
        for parameter in self.parameters:  # let go of each tensor once it is used
            for part in contributions.pop(parameter):
                part.add_clipped(parameter.summed_grad, factors, authors)
        return norms

    def _collect(self, layer: Any, inputs: torch.Tensor, gradients: torch.Tensor) -> None:
        """Apply the layer's rule to one call of it; called by its tap in the backward pass."""
        samples, rows = len(self._authors.author), []
        for tensor in (inputs, gradients):
            if layer in self._flat and tensor.dim() == 2:
                tensor = tensor.unflatten(0, (samples, -1))
            if len(tensor) != samples:
                raise cannot_clip(f"layer {type(layer).__name__}, which hides its samples")
            rows.append(tensor.flatten(1, -2) if tensor.dim() > 3 else tensor)  # (samples, tokens, features)
        parts = self._rules[layer](layer, *rows, self._authors, layer.weight not in self.tied)
        for parameter, part in parts.items():
            if parameter.requires_grad:
                self._contributions[parameter].append(part)

    def close(self) -> None:
        """Take the hooks off the model."""
        for hook in self._hooks:
            hook.remove()


def cannot_clip(what: str) -> UserError:
    return UserError(f"--clipping ghost has no rule for the trainable {what}: use --clipping grad_sample, or --enable_lora")
