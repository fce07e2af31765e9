"""Keep gradient factors from the backward pass until the norms are known, then add the clipped sums."""

import sys
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable
from typing import Any, Optional

import torch
from torch import nn

from author_dp.clipping.author_groups import AuthorClipFactors, AuthorIndex
from author_dp.clipping.grad_factors import (
    GradFactors,
    MaterializedGrad,
    add_clipped_grad_factors,
    grad_factors_norms,
    merge_factors,
)
from author_dp.clipping.norms import SquaredNorm, squared_norms, stack_squares

JOIN_ELEMENTS = 2**14  # of an author's gradient of one parameter that is joined with others


class FactorStore:
    """Keep the factors of all parameters until the norms are known: one backward pass.

    An engine calls, for each microbatch, `norm_pass`, `squared_norms` and `sum_pass`, in this order.

    Args:
        model: the engine's.
        tied: the parameters that several layers use.
    Attributes:
        factors: {parameter: factors} of the microbatch.
        squares: {parameter: squared norms, (authors,)} of those whose norms are known before the backward pass ends.
    """

    def __init__(self, model: nn.Module, tied: set[Any]):
        self.factors: dict[Any, list[GradFactors]] = defaultdict(list)
        self.squares: dict[Any, SquaredNorm] = {}
        self._joined: Optional[JoinedGrads] = None

    def norm_pass(self, run_backward: Callable[[bool], None], authors: AuthorIndex, retain_graph: bool) -> None:
        """Start a microbatch: run the backward pass, which calls `accepts` and `add`.

        Args:
            run_backward: takes whether to retain the graph.
        """
        self._authors = authors
        self.factors.clear()
        run_backward(retain_graph)

    def accepts(self, source: Any, params: Collection[Any], tensors: Iterable[torch.Tensor]) -> bool:
        """Return whether this pass needs the factors of a layer or a parameter.

        Args:
            source: the layer, or the parameter of an ordinary gradient.
            params: its trained parameters.
            tensors: the captured inputs and gradients.
        """
        return True

    def max_materialized(self, parameter: Any) -> int:
        """Return up to how many elements the per-author gradients of a matrix may be formed, if that is cheaper."""
        return sys.maxsize

    def add(self, parameter: Any, grad: GradFactors, input_ids: torch.Tensor) -> None:
        """Take the factors of one use of a parameter, in a forward pass of `input_ids`, (samples, tokens)."""
        self.factors[parameter].append(grad)

    def is_joined(self, grads: list[GradFactors]) -> bool:
        """Return whether a parameter's gradients are joined with those of other parameters."""
        return len(grads) == 1 and isinstance(grads[0], MaterializedGrad) and grads[0].gradients[0].numel() <= JOIN_ELEMENTS

    def squared_norms(self, params: list[Any]) -> list[SquaredNorm]:
        """Drop the other parameters, and return the squared norms of these, each (authors,)."""
        self.squares = {p: self.squares[p] for p in params if p in self.squares}
        merged = {p: merge_factors(self.factors[p], self._authors) for p in params if p in self.factors}
        self.factors.clear()
        self.factors.update(merged)
        small = [p for p, grads in merged.items() if p not in self.squares and self.is_joined(grads)]
        self._joined = JoinedGrads({p: self.factors.pop(p)[0] for p in small}) if small else None  # type: ignore[misc]
        unknown = [grads for p, grads in self.factors.items() if p not in self.squares]
        joined = [] if self._joined is None else [self._joined.squared()]
        return [*self.squares.values(), *joined, *(grad_factors_norms(grads, self._authors) for grads in unknown)]

    def sum_pass(self, run_backward: Callable[[bool], None], clip: AuthorClipFactors) -> None:
        """Add the clipped sums to each `summed_grad`."""
        if self._joined is not None:
            self._joined.add_clipped(clip)
            self._joined = None
        for parameter in list(self.factors):  # free each tensor once it is used
            for grad in self.factors.pop(parameter):
                add_clipped_grad_factors(grad, parameter.summed_grad, clip)


class JoinedGrads:
    """Per-author gradients of many small parameters in one tensor: norms and clipped sums of all take a few kernels.

    Args:
        grads: {parameter: its gradients}.
    """

    def __init__(self, grads: dict[Any, MaterializedGrad]):
        self.parameters = list(grads)
        flat = [grad.gradients.reshape(len(grad.gradients), -1) for grad in grads.values()]
        self.gradients = flat[0] if len(flat) == 1 else torch.cat(flat, 1)  # (authors, elements of all)

    def squared(self) -> SquaredNorm:
        return SquaredNorm(squared_norms(self.gradients))

    def add_clipped(self, clip: AuthorClipFactors) -> None:
        """Add the clipped sums to each `summed_grad`."""
        gradients = self.gradients
        if clip.non_finite is not None:  # the factor is zero, but zero times nan would be nan
            gradients = gradients.masked_fill(clip.non_finite[:, None], 0)
        sums = (clip.factors @ gradients).split([p.numel() for p in self.parameters])
        torch._foreach_add_([p.summed_grad.view(-1) for p in self.parameters], list(sums))


def total_norms(squares: list[SquaredNorm], losses: torch.Tensor) -> torch.Tensor:
    """Return the norms over all parameters, (authors,); inf where a norm is not a number.

    Args:
        squares: squared norms of each parameter, each (authors,).
        losses: (authors,).
    """
    none = SquaredNorm(losses.new_zeros(len(losses), dtype=torch.float32))
    every = stack_squares([none, *squares]).with_margin()  # (authors, parameters)
    # Rounding may leave a small square below zero, which must not reduce the others; overflow must not pass for a small norm.
    # The sum runs along rows: in a sum of columns, the vectorized order depends on the author's index.
    return every.clamp(min=0).where(every.isfinite(), torch.inf).sum(1).sqrt()
