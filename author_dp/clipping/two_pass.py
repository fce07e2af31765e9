"""Ghost clipping in two passes, for layers that are run again anyway: the memory of a checkpointed ordinary step.

Promise: the same norms and clipped sums as ghost.py, to rounding, without keeping what each layer adds until the norms are known.
One forward is gone back through twice. The first pass takes of each layer the squared norm of each author's gradient and lets go
of the tensors at once; the second goes the same way and adds each layer's clipped sum, for the factors are known by then:

    sum_a c_a G_a = sum_a c_a sum_t g_t a_t^T,    c_a = min(1, C / ||g_a||)

which is the gradient of sum_a c_a L_a. It is not asked of autograd by that loss: under autocast the sum over authors would be
rounded to bfloat16, and a g_t into which c_a was multiplied before would be rounded otherwise than the one whose norm was taken:
nothing could be told of what one author changes. And an author's infinite activations would reach the others' sum, as zero times
infinity. Here both passes see the same g_t.

Both passes must be of the same function: dropout is replayed, as torch's non-reentrant checkpointing does it. What is not (a mask
from a generator of the model's own) would make the norms those of other gradients: the second pass looks at some numbers of each
layer's tensors again, and a run ends where they differ.

What is small, biases and LoRA's factors, is kept as in ghost.py; where that is all, there is no second pass. Of a matrix that is
embedding and head at once, the first pass keeps the rows of the head's gradient that were looked up, (tokens, features), for the
product of the two. Whatever else is used more than once is kept whole, as ghost.py does.

Example:

    >>> model.activation_checkpointing_enable()
    >>> engine = TwoPassClipping(model, clip_norm=1.0)
    >>> norms = engine.backward(author_losses(engine.module, batch), batch["author"])

References:
    [1] Li et al. 2022, Large Language Models Can Be Strong Differentially Private Learners, arXiv 2110.05679, section 4
    [2] Chen et al. 2016, Training Deep Nets with Sublinear Memory Cost, arXiv 1604.06174 (checkpointing)
"""

import functools
from typing import Any, NamedTuple

import torch
from torch import nn

from author_dp.clipping.author_groups import AuthorIndex
from author_dp.clipping.ghost import GhostClipping, add_clipped, total_norms
from author_dp.clipping.grad_factors import (
    MATERIALIZE_ELEMENTS,
    EmbeddingGrad,
    GradFactors,
    MaterializedGrad,
    OuterProduct,
    SquaredNorm,
    looked_up_rows,
    merge_factors,
    tied_squared_norm,
    total_squared_norms,
)
from author_dp.errors import UserError

KEPT_ELEMENTS = 1 / 20  # of the weights' memory may be taken by small contributions that spare a second pass
MISMATCH_TOLERANCE = (
    0.02  # relative difference of what a layer saw in both passes: beyond rounding, far below that of other dropout masks
)


class TwoPassClipping(GhostClipping):
    """Clip per-author gradients without storing them, nor what they are made of.

    Guarantee: that of `GhostClipping`. The model must compute the same in each backward pass as in its forward: non-reentrant
    checkpointing that restores the random generators.

    Args:
        model: as of `GhostClipping`; its layers checkpointed, or two passes take time and save little.
        clip_norm: C.
    """

    def __init__(self, model: nn.Module, clip_norm: float):
        super().__init__(model, clip_norm)
        self.may_keep = int(KEPT_ELEMENTS * sum(p.numel() * p.element_size() for p in model.parameters()))  # bytes
        self._whole: set[Any] = set()  # parameters whose contributions can only be judged together
        self._squares: dict[Any, torch.Tensor] = {}  # the squared norms of each other parameter's gradients, (authors,)
        self._rows: dict[
            Any, tuple[EmbeddingGrad, SquaredNorm]
        ] = {}  # of a head's gradient, those that are looked up, and its square
        self._kept = 0  # bytes of contributions
        self._adding: SumPass | None = None  # in the second pass
        self._seen: list[tuple[Any, list[torch.Tensor]]] = []  # some numbers of each layer's tensors, as the first pass met them
        self._same: list[torch.Tensor] = []  # whether the second pass met the same, each ()

    def _clip(self, losses: torch.Tensor, author: torch.Tensor) -> torch.Tensor:
        """As in ghost.py, going back twice where that is needed.

        Raises:
            UserError: where the second pass went through other numbers than the first.
        """
        authors = AuthorIndex(author, len(losses))
        known = self._single_author_params(authors)
        self._norm_pass(losses, authors, known)
        apart = self._find_fallback(losses, self._squares.keys() | self._contributions.keys())
        of_taps = [p for p in self.parameters if known or p not in apart]
        kept = {p: merge_factors(self._contributions[p], authors) for p in of_taps if p in self._contributions}
        squares = {p: self._squares[p] for p in of_taps if p in self._squares}
        together = [total_squared_norms(parts, authors) for p, parts in kept.items() if p not in squares]
        norms = total_norms([*squares.values(), *together], losses)
        if apart and not known:
            norms = self._clip_fallback(losses, norms, [p for p in self.parameters if p in apart])
        factors = (self.clip_norm / norms).clamp(max=1.0)  # min(1, C / ||g_a||), (authors,)
        non_finite = None if norms.isfinite().all() else ~norms.isfinite()
        self._contributions.clear()
        self._add(losses, authors, known, SumPass(squares.keys() - kept.keys(), factors, non_finite))
        for parameter in list(kept):
            for part in kept.pop(parameter):
                add_clipped(part, parameter.summed_grad, factors, non_finite, authors)
        return norms

    def _norm_pass(self, losses: torch.Tensor, authors: AuthorIndex, known: list[Any]) -> None:
        """Go through the first pass, and once more where a parameter turned out to be used in another way than it was taken."""
        whole: set[Any] | None = None
        while whole != self._whole:
            whole = set(self._whole)
            self._contributions.clear()
            self._squares, self._rows, self._seen, self._kept = {}, {}, [], 0
            self._backward(losses, authors, known, retain_graph=True)
        self._rows.clear()

    def _add(self, losses: torch.Tensor, authors: AuthorIndex, known: list[Any], adding: "SumPass") -> None:
        """Go through the second pass, if anything is to be added by it, and free the graph."""
        if not adding.to:
            return
        self._adding, self._same = adding, []
        try:
            self._backward(losses, authors, known, retain_graph=False)
        finally:
            self._adding = None
        if len(self._same) < len(self._seen) or not torch.stack(self._same).all():
            raise UserError(
                "--activation_checkpointing: the layers computed something else when they ran again (random numbers that are not "
                "replayed?), so that norms are not those of what is summed; leave it out"
            )

    def _backward(self, losses: torch.Tensor, authors: AuthorIndex, known: list[Any], retain_graph: bool) -> list[Any]:
        """As in ghost.py, but take the gradients of `known` as they come, and let go of them."""
        hooks = [parameter.register_hook(functools.partial(self._store_ordinary, parameter)) for parameter in known]
        try:
            return super()._backward(losses, authors, known, retain_graph)
        finally:
            for hook in hooks:
                hook.remove()

    def _store_ordinary(self, parameter: Any, gradient: torch.Tensor) -> torch.Tensor:
        """Take the ordinary gradient of a parameter, which is the one author's; return a stand-in that takes no memory."""
        if gradient.dim() > 1:  # a vector's may be nothing but rounding (biases of keys)
            self._check_replay(parameter, (gradient,))
        self._store(parameter, MaterializedGrad(gradient.float()[None]), self._given)
        return gradient.new_zeros(()).expand_as(gradient)

    def _collect(
        self, layer: Any, given: torch.Tensor, inputs: tuple, gradient: torch.Tensor, behind: tuple | None = None
    ) -> None:
        if self._authors is None:
            return
        self._check_replay(layer, (*inputs, gradient))
        if self._adding is None or self._trained[layer] & self._adding.to:
            super()._collect(layer, given, inputs, gradient, behind)

    def _check_replay(self, what: Any, tensors: tuple) -> None:
        """Note one feature of each token at a layer; in the second pass, whether it is what the first one saw."""
        place = len(self._seen if self._adding is None else self._same)
        numbers = [fingerprint(tensor, 31 * place) for tensor in tensors]
        if self._adding is None:
            self._seen.append((what, numbers))
            return
        before, expected = self._seen[place] if place < len(self._seen) else (None, [])
        same = before is what and [fingerprints_match(*pair) for pair in zip(expected, numbers)]
        self._same.append(torch.stack(same).all() if same else torch.zeros((), dtype=torch.bool, device=numbers[0].device))

    def _most_explicit(self, weight: Any) -> int:
        """What is formed is kept: the second pass scales tokens, whose rounding a norm of what was formed knows nothing of."""
        if self._adding is not None or weight in self.tied:
            return 0
        return min(MATERIALIZE_ELEMENTS, (self.may_keep - self._kept) // 4)  # of 4 bytes

    def _store(self, parameter: Any, part: GradFactors, given: torch.Tensor) -> None:
        """Use what a layer adds to a parameter's gradient, and keep it only where it is small or cannot be judged alone."""
        assert self._authors is not None
        if self._adding is not None:
            if parameter in self._adding.to:
                add_clipped(part, parameter.summed_grad, self._adding.factors, self._adding.non_finite, self._authors)
        elif parameter in self._whole:
            self._contributions[parameter].append(part)
        elif parameter in self._squares:
            self._handle_tied(parameter, part)
        else:
            if isinstance(part, OuterProduct) and parameter in self.tied and given.shape == part.left.shape[:2]:
                squared = part.squared(self._authors)
                ids = given.clamp(0, part.left.shape[-1] - 1)
                gathered = (self._authors.gather(tensor) for tensor in (ids, *part))
                self._rows[parameter] = EmbeddingGrad(given, looked_up_rows(*gathered)), squared
            else:
                squared = part.squared(self._authors)
            self._squares[parameter] = squared.with_margin()
            if isinstance(part, MaterializedGrad):
                size = part.gradients.numel() * part.gradients.element_size()
                if self._kept + size <= self.may_keep:
                    self._contributions[parameter].append(part)
                    self._kept += size

    def _handle_tied(self, parameter: Any, part: GradFactors) -> None:
        """Add a parameter's further contribution to the squared norms, or find that all of them must be kept."""
        of_head = self._rows.pop(parameter, None)
        if of_head is None or not isinstance(part, EmbeddingGrad) or not torch.equal(of_head[0].ids, part.ids):
            self._whole.add(parameter)
            return
        assert self._authors is not None
        rows, squared = of_head
        both = rows.gradients.mul_(self._authors.gather(part.gradients)).sum((1, 2))  # <G_embedding, G_head>
        self._squares[parameter] = tied_squared_norm(part.squared(self._authors), squared, 2 * both)


class SumPass(NamedTuple):
    """What the second pass is to do."""

    to: set[Any]  # parameters
    factors: torch.Tensor  # (authors,)
    non_finite: torch.Tensor | None  # bool (authors,), whose gradients are not finite; None where there is none


def fingerprint(tensor: torch.Tensor, at: int) -> torch.Tensor:
    """Return a copy of one feature, the one at `at` if there are as many, of each token."""
    return tensor.detach().select(-1, at % tensor.shape[-1]).to(torch.float32, copy=True).flatten()


def fingerprints_match(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Whether two passes saw the same, as a bool () that nobody has to wait for; what is not finite is left out anyway."""
    finite = first.isfinite()
    difference = torch.where(finite, second - first, 0.0).norm()
    return difference <= MISMATCH_TOLERANCE * first.where(finite, 0.0).norm()
