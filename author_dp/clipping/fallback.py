"""Clip parameters that no layer rule follows, with one backward pass for each author.

The ordinary gradient of one author's loss is exact, whatever the layer does. In a microbatch of one author it costs nothing more.
With several authors, it costs a backward pass for each of them.
"""

from collections.abc import Collection, Container, Iterable
from typing import Any

import torch
from torch import nn

from author_dp.clipping.norms import squared_norms
from author_dp.errors import UserError


class PerAuthorFallback:
    """The parameters that need the per-author fallback.

    Args:
        names: {parameter: name} of all trainable parameters.
        params: those that no rule follows.
    Attributes:
        params: the parameters found so far.
        is_frozen: whether the set is final; a further parameter is then an error.
    """

    def __init__(self, names: dict[Any, str], params: set[Any]):
        self._names, self.params, self.is_frozen = names, params, False

    def freeze(self, params: set[Any]) -> None:
        """Add the parameters that another engine found on this model, and from now on no others."""
        self.params, self.is_frozen = self.params | params, True

    def covers(self, params: Iterable[Any]) -> bool:
        return self.params.issuperset(params)

    def add(self, layer: nn.Module, params: Collection[Any]) -> None:
        """Add a layer's trained parameters.

        Raises:
            UserError: if the set is frozen.
        """
        if self.is_frozen:
            raise UserError(
                f"--clipping ghost: a {type(layer).__name__} is called otherwise than in the check at the start. Use --clipping "
                "grad_sample, or --enable_lora."
            )
        self.params.update(params)

    def single_author_params(self, num_authors: int) -> list[Any]:
        """Return the parameters whose ordinary gradient is the per-author gradient: with one author in the microbatch."""
        return [p for p in self._names if p in self.params] if self.is_frozen and num_authors == 1 else []

    def find(self, losses: torch.Tensor, captured: Container[Any], shape: tuple[int, int]) -> set[Any]:
        """Return the parameters to clip author by author; until frozen, add those whose gradient bypassed the hooks.

        Args:
            losses: (authors,), their graph retained.
            captured: the parameters with captured gradients.
            shape: samples and tokens of the captured calls.
        """
        if self.is_frozen:
            return self.params
        samples, tokens = shape
        if samples == tokens > 1:  # a table of positions could be mistaken for samples: trust no hook
            return set(self._names)
        missing = [p for p in self._names if p not in captured and p not in self.params]
        if missing:
            gradients = torch.autograd.grad(losses.sum(), missing, retain_graph=True, allow_unused=True)
            self.params |= {parameter for parameter, gradient in zip(missing, gradients) if gradient is not None}
        return self.params

    def add_clipped(self, params: set[Any], losses: torch.Tensor, norms: torch.Tensor, clip_norm: float) -> torch.Tensor:
        """Add these parameters' clipped gradients to `summed_grad`, by one backward pass for each author.

        Infinite activations of one author reach the others here, as zero times infinity. DPTrainer therefore gives such models
        one author at a time (`ModelCheck.max_authors`), and so must other callers.

        Args:
            norms: (authors,), over the other parameters.
        Returns:
            norms over all parameters, (authors,).
        """
        norms, ordered = norms.clone(), [p for p in self._names if p in params]
        for i in range(len(losses)):
            found = torch.autograd.grad(losses[i], ordered, retain_graph=True, allow_unused=True)
            gradients = {p: gradient.float() for p, gradient in zip(ordered, found) if gradient is not None}
            norms[i] = torch.stack([norms[i], *(squared_norms(g[None])[0].sqrt() for g in gradients.values())]).norm()
            norms[i] = norms[i].where(norms[i].isfinite(), torch.inf)
            if norms[i].isfinite():
                for parameter, gradient in gradients.items():
                    parameter.summed_grad.add_(gradient * (clip_norm / norms[i]).clamp(max=1.0))
        return norms
