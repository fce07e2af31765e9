"""Factors of per-author gradients: their norms and clipped sums.

Guarantees: `squared` is the squared norm of each author's gradient, rounded up by what rounding may take.
`add_clipped_grad_factors` adds the sum of these gradients, each times its author's factor. Neither forms per-author gradients
that are larger than their factors.

With a_t the inputs and g_t the output gradients of a linear layer, t running over all tokens of all the author's samples, the
author's weight gradient is G = sum_t g_t a_t^T, and

    ||G||^2 = sum_{s,t} <a_s, a_t> <g_s, g_t>        (the ghost norm [1]: G itself is never formed)

The clipped sum over all authors is then sum_t (c_author g_t) a_t^T: an ordinary matrix product [2].

References:
    [1] Li et al. 2022, Large Language Models Can Be Strong Differentially Private Learners, arXiv 2110.05679, section 4
    [2] Bu et al. 2023, Differentially Private Optimization on Large Model at Small Cost, arXiv 2210.00038 (book-keeping)
"""

from typing import NamedTuple

import torch

from author_dp.clipping.author_groups import AuthorClipFactors, AuthorIndex
from author_dp.clipping.norms import (
    MATERIALIZE_ELEMENTS,
    SquaredNorm,
    lookup_squared_norms,
    matmul,
    product_squared_norms,
    squared_norms,
)


class MaterializedGrad(NamedTuple):
    """Per-author gradients, of small parameters or where they are smaller than their factors."""

    gradients: torch.Tensor  # (authors, ...), float32

    def squared(self, authors: AuthorIndex) -> SquaredNorm:
        return SquaredNorm(squared_norms(self.gradients))

    def add_clipped(self, total: torch.Tensor, clip: AuthorClipFactors) -> None:
        total.view(-1).addmv_(self.gradients.reshape(len(self.gradients), -1).T, clip.factors)


class OuterProduct(NamedTuple):
    """Factors of a matrix: its gradient is the sum over tokens of left_t right_t^T."""

    left: torch.Tensor  # (samples, tokens, rows)
    right: torch.Tensor  # (samples, tokens, columns)

    def squared(self, authors: AuthorIndex) -> SquaredNorm:
        squared = product_squared_norms(authors.gather(self.left), authors.gather(self.right))
        # |sum_t r_t a_t^T| <= |c G| + sum_t |r_t - c g_t| |a_t| for the rounded r_t; the last sum is at most 2^-8 c `rounded`.
        return squared if self.left.dtype == torch.float32 else squared._replace(rounded=squared.bound)

    def add_clipped(self, total: torch.Tensor, clip: AuthorClipFactors) -> None:
        left, right = self.left, self.right
        if left.shape[-1] < right.shape[-1]:  # scale the narrower one: the other may be as wide as the vocabulary
            left = clip.scale(left)
        else:
            right = clip.scale(right)
        if left.dtype == torch.float32:
            total.addmm_(left.flatten(0, 1).T, right.flatten(0, 1))
        else:
            total.add_(matmul(left.flatten(0, 1).T, right.flatten(0, 1)))


class EmbeddingGrad(NamedTuple):
    """Factors of an embedding: its gradient adds the tokens' output gradients to the rows that the ids look up."""

    ids: torch.Tensor  # (samples, tokens)
    gradients: torch.Tensor  # (samples, tokens, features)

    def squared(self, authors: AuthorIndex) -> SquaredNorm:
        return lookup_squared_norms(authors.gather(self.ids), authors.gather(self.gradients))

    def add_clipped(self, total: torch.Tensor, clip: AuthorClipFactors) -> None:
        total.index_add_(0, self.ids.flatten(), clip.scale(self.gradients.float()).flatten(0, 1))


GradFactors = MaterializedGrad | OuterProduct | EmbeddingGrad


def add_clipped_grad_factors(grad: GradFactors, total: torch.Tensor, clip: AuthorClipFactors) -> None:
    """Add the sum of all authors' gradients, each times the author's clipping factor, to `total`, of the parameter's shape."""
    if clip.non_finite is not None:  # the factor is zero, but zero times nan would be nan
        grad = mask_authors_in_grad_factors(grad, clip.non_finite, clip.authors.author)
    grad.add_clipped(total, clip)


# --- norms of all uses of a parameter ----------------------------------------------------------------------


def grad_factors_norms(grads: list[GradFactors], authors: AuthorIndex) -> SquaredNorm:
    """Return ||sum of the gradients||^2 for one parameter, (authors,): of one, or of the two of a tied embedding."""
    if len(grads) == 1:
        return grads[0].squared(authors)
    lookup, product = sorted(grads, key=lambda grad: isinstance(grad, OuterProduct))
    assert isinstance(lookup, EmbeddingGrad) and isinstance(product, OuterProduct)
    return tied_grad_factors_norm(
        lookup, grad_factor_lookup_rows(lookup.ids, product, authors), product.squared(authors), authors
    )


def grad_factor_lookup_rows(ids: torch.Tensor, product: OuterProduct, authors: AuthorIndex) -> torch.Tensor:
    """Return the rows of each author's G_head that the ids look up, sum_t z_t[id_s] h_t.

    `tied_grad_factors_norm` needs no more of it.

    Args:
        ids: id_s, (samples, tokens).
        product: the head's factors, z_t (samples, tokens, vocabulary) and h_t (samples, tokens, features).
    Returns:
        float32 (authors, tokens of all, features).
    """
    ids, logit_gradients, hidden = (authors.gather(tensor) for tensor in (ids, *product))
    picked = logit_gradients.gather(2, ids[:, None, :].expand(-1, logit_gradients.shape[1], -1))  # z_t[id_s]
    return matmul(picked.mT, hidden.to(picked.dtype))


def tied_grad_factors_norm(lookup: EmbeddingGrad, rows: torch.Tensor, head: SquaredNorm, authors: AuthorIndex) -> SquaredNorm:
    """Return ||G_embedding + G_head||^2 of each author, (authors,), for a matrix that is both.

    Args:
        rows: of G_head, from `grad_factor_lookup_rows`; overwritten.
        head: ||G_head||^2.
    """
    cross = 2 * rows.mul_(authors.gather(lookup.gradients)).sum((1, 2))  # 2 <G_embedding, G_head> = 2 sum_s <row_s, e_s>
    square = lookup.squared(authors)
    return SquaredNorm(square.value + head.value + cross, square.bound + head.bound, head.rounded)  # type: ignore[operator]


# --- several uses of a parameter ------------------------------------------------------------------------


def merge_factors(grads: list[GradFactors], authors: AuthorIndex) -> list[GradFactors]:
    """Merge the factors of one type into one: all calls of a layer share one token axis."""
    if len(grads) < 2:
        return grads
    materialized = [grad for grad in grads if isinstance(grad, MaterializedGrad)]
    if materialized:
        total = materialized[0]
        for grad in [*materialized[1:], *(grad for grad in grads if not isinstance(grad, MaterializedGrad))]:
            total = add_grad_factors(total, grad, authors)
        return [total]
    by_type = ([grad for grad in grads if isinstance(grad, type_)] for type_ in (EmbeddingGrad, OuterProduct))
    return [same[0] if len(same) == 1 else type(same[0])(*(torch.cat(t, 1) for t in zip(*same))) for same in by_type if same]


def materialize_grad_factors(grad: OuterProduct, authors: AuthorIndex) -> MaterializedGrad:
    """Form the per-author gradients of a matrix: small ones for each sample first, which moves nothing."""
    if len(grad.left) * grad.left.shape[-1] * grad.right.shape[-1] <= MATERIALIZE_ELEMENTS:
        return MaterializedGrad(authors.sum(matmul(grad.left.mT, grad.right)))
    return MaterializedGrad(matmul(authors.gather(grad.left).mT, authors.gather(grad.right)))


def add_grad_factors(total: MaterializedGrad, grad: GradFactors, authors: AuthorIndex) -> MaterializedGrad:
    """Return the sum of two gradients; a lookup is added in place, as a matrix that was formed has its own memory."""
    if isinstance(grad, EmbeddingGrad):
        rows = authors.author.view(-1, 1) * total.gradients.shape[1] + grad.ids  # (samples, tokens), among all authors' rows
        total.gradients.view(-1, total.gradients.shape[2]).index_add_(0, rows.flatten(), grad.gradients.float().flatten(0, 1))
        return total
    return MaterializedGrad(
        total.gradients + (materialize_grad_factors(grad, authors) if isinstance(grad, OuterProduct) else grad).gradients
    )


def mask_authors_in_grad_factors(grad: GradFactors, masked: torch.Tensor, author: torch.Tensor) -> GradFactors:
    """Return `grad` with zeros for the authors `masked`, bool (authors,), whatever values they had."""
    rows = masked if isinstance(grad, MaterializedGrad) else masked[author]
    return type(grad)(*(tensor.masked_fill(rows.view(-1, *[1] * (tensor.dim() - 1)), 0) for tensor in grad))
