"""Ghost clipping in two backward passes, with the memory of an ordinary step that checkpoints its layers.

Guarantees: norms and clipped sums equal those of `ghost.py`, to rounding; factors are not kept until the norms are known.

One forward pass is followed by two backward passes. The first one computes each layer's squared norms per author and frees the
layer's tensors at once. The second one repeats it and adds each layer's clipped sum, as the factors c_a are known by then:

    sum_a c_a G_a = sum_a c_a sum_t g_t a_t^T,    c_a = min(1, C / ||g_a||)

This is the gradient of sum_a c_a L_a, but autograd is not asked for that one. Under autocast the sum over authors would be
rounded to bfloat16, and a g_t multiplied by c_a earlier would be rounded otherwise than the g_t whose norm was computed: nothing
would bound what one author changes. An author's infinite activations would also reach the sum of the others, as zero times
infinity. Here both passes see the same g_t.

Both passes must compute the same function. Dropout is replayed by torch's non-reentrant checkpointing. A mask from a generator of
the model's own is not: the norms would belong to other gradients. Therefore the second pass compares fingerprints of each layer's
tensors with the first one's, and a run ends where they differ.

Small per-author gradients, of biases and LoRA's factors, are kept as in `ghost.py`; where that is all, there is no second pass.
Of a matrix that is both embedding and head, the first pass keeps the rows of the head's gradient that the ids look up, (tokens,
features), for the inner product of the two uses. A parameter that is used more than once in another way keeps all its factors.

Example:

    >>> model.activation_checkpointing_enable()
    >>> engine = TwoPassClipping(model, clip_norm=1.0)
    >>> norms = engine.backward(author_losses(engine.module, batch), batch["author"])

References:
    [1] Li et al. 2022, Large Language Models Can Be Strong Differentially Private Learners, arXiv 2110.05679, section 4
    [2] Chen et al. 2016, Training Deep Nets with Sublinear Memory Cost, arXiv 1604.06174 (checkpointing)
"""

from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch
from torch import nn

from author_dp.clipping.author_groups import AuthorClipFactors, AuthorIndex
from author_dp.clipping.factor_store import FactorStore
from author_dp.clipping.ghost import GhostClipping
from author_dp.clipping.grad_factors import (
    EmbeddingGrad,
    GradFactors,
    MaterializedGrad,
    OuterProduct,
    add_clipped_grad_factors,
    grad_factor_lookup_rows,
    tied_grad_factors_norm,
)
from author_dp.clipping.norms import MATERIALIZE_ELEMENTS, SquaredNorm
from author_dp.errors import UserError

# Of the weights' memory, for small per-author gradients that spare a second pass: those of 128 authors for LoRA on GPT-2. Layers
# that are checkpointed need more than that while they run again.
MAX_KEPT_FRACTION = 1 / 4
# Relative difference between the passes' tensors: beyond rounding, far below that of another dropout mask.
MISMATCH_TOLERANCE = 0.02


class TwoPassStore(FactorStore):
    """Keep squared norms and small per-author gradients; add the other clipped sums in a second backward pass.

    Attributes:
        max_kept: bytes of small per-author gradients that may be kept.
        kept_params: parameters used more than once in a way that needs all their factors; found by the first microbatch.
    """

    def __init__(self, model: nn.Module, tied: set[Any]):
        super().__init__(model, tied)
        self.max_kept = int(MAX_KEPT_FRACTION * sum(p.numel() * p.element_size() for p in model.parameters()))
        self.kept_params: set[Any] = set()
        self._tied = tied
        self._head_rows: dict[Any, tuple[torch.Tensor, torch.Tensor, SquaredNorm]] = {}  # ids, rows, square of the whole head
        self._kept = 0  # bytes
        self._replay = TwoPassCheck()
        self._clip: AuthorClipFactors | None = None  # in the second pass
        self._to_sum: set[Any] = set()  # parameters of the second pass

    def norm_pass(self, run_backward: Callable[[bool], None], authors: AuthorIndex, retain_graph: bool) -> None:
        """Run the first pass, and once more where a parameter turned out to need all its factors."""
        known: set[Any] | None = None
        while known != self.kept_params:
            known = set(self.kept_params)
            self.squares, self._kept, self._replay = {}, 0, TwoPassCheck()
            self._head_rows.clear()
            super().norm_pass(run_backward, authors, retain_graph=True)
        self._head_rows.clear()

    def sum_pass(self, run_backward: Callable[[bool], None], clip: AuthorClipFactors) -> None:
        """Run the second pass if a parameter needs it, and free the graph; then add what was kept.

        Raises:
            UserError: if the layers computed something else than in the first pass.
        """
        self._to_sum = self.squares.keys() - self.factors.keys()
        if self._to_sum:
            self._clip = clip
            try:
                run_backward(False)
            finally:
                self._clip = None
            if not self._replay.is_same():
                raise UserError(
                    "--activation_checkpointing: the layers computed something else when they ran again (random numbers that are "
                    "not replayed?), so the norms do not belong to the summed gradients. Leave it out."
                )
        super().sum_pass(run_backward, clip)

    def accepts(self, source: Any, params: Collection[Any], tensors: Iterable[torch.Tensor]) -> bool:
        """Compare the tensors of both passes; the second one needs the parameters whose sums are missing."""
        if isinstance(source, nn.Module) or source.dim() > 1:  # a vector's gradient may be mere rounding (biases of keys)
            self._replay.add(source, tensors, is_second=self._clip is not None)
        return self._clip is None or not self._to_sum.isdisjoint(params)

    def max_materialized(self, parameter: Any) -> int:
        """Form what can be kept, at most: the second pass scales tokens, and a norm of what was formed ignores their rounding."""
        if self._clip is not None or parameter in self._tied:
            return 0
        return min(MATERIALIZE_ELEMENTS, (self.max_kept - self._kept) // 4)  # of 4 bytes

    def add(self, parameter: Any, grad: GradFactors, input_ids: torch.Tensor) -> None:
        """First pass: add to the squared norms, and keep what is small. Second pass: add the clipped sum."""
        if self._clip is not None:
            if parameter in self._to_sum:
                add_clipped_grad_factors(grad, parameter.summed_grad, self._clip)
        elif parameter in self.kept_params or parameter in self.factors:
            super().add(parameter, grad, input_ids)
        elif parameter in self.squares:
            self._handle_tied(parameter, grad)
        elif self._can_keep(grad):
            super().add(parameter, grad, input_ids)
        else:
            squared = grad.squared(self._authors)
            if isinstance(grad, OuterProduct) and parameter in self._tied and input_ids.shape == grad.left.shape[:2]:
                ids = input_ids.clamp(0, grad.left.shape[-1] - 1)
                self._head_rows[parameter] = input_ids, grad_factor_lookup_rows(ids, grad, self._authors), squared
            self.squares[parameter] = squared

    def _can_keep(self, grad: GradFactors) -> bool:
        """Return whether these are small per-author gradients that may still be kept; count them if so."""
        size = grad.gradients.numel() * grad.gradients.element_size() if isinstance(grad, MaterializedGrad) else self.max_kept + 1
        fits = self._kept + size <= self.max_kept
        self._kept += size if fits else 0
        return fits

    def _handle_tied(self, parameter: Any, grad: GradFactors) -> None:
        """Second use of a parameter: add the cross term of embedding and head, or fall back to keeping all factors."""
        head = self._head_rows.pop(parameter, None)
        if head is None or not isinstance(grad, EmbeddingGrad) or not same_ids(head[0], grad.ids):
            self.kept_params.add(parameter)
            return
        self.squares[parameter] = tied_grad_factors_norm(grad, *head[1:], self._authors)


def same_ids(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Return whether two tensors hold the same ids; waits for the device only where they have memory of their own."""
    is_view = one.shape == other.shape and one.stride() == other.stride() and one.data_ptr() == other.data_ptr()
    return is_view or torch.equal(one, other)


class TwoPassCheck:
    """Compare what the layers compute in two backward passes: all at once at the end, which takes few operations."""

    def __init__(self) -> None:
        self._calls: tuple[list[Any], list[Any]] = [], []  # of each pass: layers or parameters
        self._prints: tuple[list[torch.Tensor], list[torch.Tensor]] = [], []  # and the fingerprints of their tensors

    def add(self, source: Any, tensors: Iterable[torch.Tensor], is_second: bool) -> None:
        """Take fingerprints of the tensors of one call."""
        index = len(self._calls[is_second])
        self._calls[is_second].append(source)
        self._prints[is_second].extend(two_pass_fingerprint(tensor, 31 * index) for tensor in tensors)

    def is_same(self) -> bool:
        """Return whether the second pass saw the same calls with the same tensors."""
        expected, found = self._prints
        sizes = [len(prints) for prints in expected]
        if [id(source) for source in self._calls[0]] != [id(source) for source in self._calls[1]]:
            return False
        return sizes == [len(prints) for prints in found] and (not sizes or two_pass_fingerprints_match(expected, found))


def two_pass_fingerprint(tensor: torch.Tensor, index: int) -> torch.Tensor:
    """Return a copy of one feature of each token: the one at `index`, modulo the number of features."""
    return tensor.detach().select(-1, index % tensor.shape[-1]).to(torch.float32, copy=True).flatten()


def two_pass_fingerprints_match(expected: list[torch.Tensor], found: list[torch.Tensor]) -> bool:
    """Return whether each pair of fingerprints agrees; values that are not finite are not compared. Waits for the device."""
    sizes, (before, after) = [len(prints) for prints in expected], (torch.cat(prints) for prints in (expected, found))
    finite = before.isfinite()
    differences = torch._foreach_norm(torch.where(finite, after - before, 0.0).split(sizes))
    norms = torch._foreach_norm(before.where(finite, 0.0).split(sizes))
    return bool((torch.stack(differences) <= MISMATCH_TOLERANCE * torch.stack(norms)).all())


class TwoPassClipping(GhostClipping):
    """Clip per-author gradients without storing them, nor their factors.

    Guarantees: those of `GhostClipping`. Each backward pass must compute the same as the forward pass: non-reentrant
    checkpointing that restores the random generators.

    Args:
        model: as for `GhostClipping`. Without checkpointed layers, two passes take time and save little.
        clip_norm: C.
    """

    store_class = TwoPassStore
