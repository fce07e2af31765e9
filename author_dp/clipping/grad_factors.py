"""Factors of per-author gradients: their norms and clipped sums.

Guarantees: `squared` is the squared norm of each author's gradient, rounded up by what rounding may take. `add_clipped` adds the
sum of these gradients, each times its author's factor. Neither forms per-author gradients that are larger than their factors.

With a_t the inputs and g_t the output gradients of a linear layer, t running over all tokens of all the author's samples, the
author's weight gradient is G = sum_t g_t a_t^T, and

    ||G||^2 = sum_{s,t} <a_s, a_t> <g_s, g_t>        (the ghost norm [1]: G itself is never formed)

The clipped sum over all authors is then sum_t (c_author g_t) a_t^T: an ordinary matrix product [2].

Where the tokens' gradients g_t a_t^T cancel, ||G||^2 is a small difference of large numbers. Rounding may leave any part of it,
or nothing at all, and the author would be clipped too little, or not at all. `SquaredNorm` therefore adds a margin. The sum of
the c g_t a_t^T may also come out larger than c G, as bfloat16 rounds each c g_t. The norm of scaled factors has slack for it.

References:
    [1] Li et al. 2022, Large Language Models Can Be Strong Differentially Private Learners, arXiv 2110.05679, section 4
    [2] Bu et al. 2023, Differentially Private Optimization on Large Model at Small Cost, arXiv 2210.00038 (book-keeping)
"""

from typing import NamedTuple

import torch

from author_dp.clipping.author_groups import AuthorIndex, ClipFactors

MATERIALIZE_ELEMENTS = 2**24  # per-author gradients formed at a time, where that is cheaper: 64 MB
# Tokens whose products with the later ones are formed at a time; on a GPU 256, so that the model check has two such blocks.
GHOST_BLOCK = 128
# Both are relative to the squared bound, the square if nothing cancelled. A squared norm below the first is rounded up by the
# second, which is more than twice the largest rounding error seen (3.5e-7, where tokens repeat). The squared norm of 1,024
# independent tokens or more is below the first, too.
CANCELLATION_RATIO, ROUNDING_MARGIN = 2.0**-10, 2.0**-20
BFLOAT16_ROUNDING = 2.0**-8  # largest relative change of a number that is rounded to bfloat16


class SquaredNorm(NamedTuple):
    """Squared norm, and the largest norm it could have without cancellation, which bounds the rounding error.

    All are float32, (authors,), or (authors, parameters) for several parameters together.
    """

    value: torch.Tensor
    bound: torch.Tensor | None = (
        None  # the sum over tokens of |left_t| |right_t|; None where the gradient itself is what is scaled
    )
    rounded: torch.Tensor | None = None  # the part of `bound` whose tokens c g_t are rounded to bfloat16

    def with_margin(self) -> torch.Tensor:
        """Return the squared norm, rounded up by what rounding may take."""
        square = self.value
        if self.bound is not None:
            bound = self.bound.square()
            square = torch.where(self.value < CANCELLATION_RATIO * bound, self.value + ROUNDING_MARGIN * bound, self.value)
        if self.rounded is None:
            return square
        return (square.clamp(min=0).sqrt() + BFLOAT16_ROUNDING * self.rounded).square()


def stack_squares(squares: list[SquaredNorm]) -> SquaredNorm:
    """Return the squares of several parameters, each of (authors,), as one of (authors, parameters)."""
    zero = torch.zeros_like(squares[0].value)

    def stack(parts: list[torch.Tensor | None]) -> torch.Tensor | None:
        return None if all(part is None for part in parts) else torch.stack([zero if p is None else p for p in parts], 1)

    value = torch.stack([square.value for square in squares], 1)
    return SquaredNorm(value, stack([square.bound for square in squares]), stack([square.rounded for square in squares]))


class MaterializedGrad(NamedTuple):
    """Per-author gradients, of small parameters or where they are smaller than their factors."""

    gradients: torch.Tensor  # (authors, ...), float32

    def squared(self, authors: AuthorIndex) -> SquaredNorm:
        return SquaredNorm(squared_norms(self.gradients))

    def add_clipped(self, total: torch.Tensor, clip: ClipFactors) -> None:
        total.view(-1).addmv_(self.gradients.reshape(len(self.gradients), -1).T, clip.factors)


class OuterProduct(NamedTuple):
    """Factors of a matrix: its gradient is the sum over tokens of left_t right_t^T."""

    left: torch.Tensor  # (samples, tokens, rows)
    right: torch.Tensor  # (samples, tokens, columns)

    def squared(self, authors: AuthorIndex) -> SquaredNorm:
        squared = product_squared_norms(authors.gather(self.left), authors.gather(self.right))
        # |sum_t r_t a_t^T| <= |c G| + sum_t |r_t - c g_t| |a_t| for the rounded r_t; the last sum is at most 2^-8 c `rounded`.
        return squared if self.left.dtype == torch.float32 else squared._replace(rounded=squared.bound)

    def add_clipped(self, total: torch.Tensor, clip: ClipFactors) -> None:
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

    def add_clipped(self, total: torch.Tensor, clip: ClipFactors) -> None:
        total.index_add_(0, self.ids.flatten(), clip.scale(self.gradients.float()).flatten(0, 1))


GradFactors = MaterializedGrad | OuterProduct | EmbeddingGrad


def add_clipped(grad: GradFactors, total: torch.Tensor, clip: ClipFactors) -> None:
    """Add the sum of all authors' gradients, each times the author's clipping factor, to `total`, of the parameter's shape."""
    if clip.non_finite is not None:  # the factor is zero, but zero times nan would be nan
        grad = mask_authors(grad, clip.non_finite, clip.authors.author)
    grad.add_clipped(total, clip)


# --- norms ----------------------------------------------------------------------------------------------


def matmul(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Return the product of matrices, or of batches of them, summed in float32 and float32 whatever the factors' dtype."""
    # ROCm's device is "cuda", too, and like other devices it has no product with another type of result.
    if left.dtype == torch.float32 or left.device.type != "cuda" or torch.version.hip is not None:
        return left.float() @ right.float()
    return (torch.bmm if left.dim() == 3 else torch.mm)(left, right, out_dtype=torch.float32)


def squared_norms(gradients: torch.Tensor) -> torch.Tensor:
    """Return squared norms of per-author gradients, (authors, ...) to (authors,).

    They are summed in pieces that fit in a cache. A single sum of many squares would also come out too small.
    """
    rows = gradients.reshape(len(gradients), -1)
    chunk = max(1, (2**20 if rows.device.type == "cpu" else 2**26) // len(rows))
    sums = [piece.square().sum(1) for piece in rows.split(chunk, 1)]
    return sums[0] if len(sums) == 1 else torch.stack(sums, 1).sum(1)  # along rows: see `total_norms`


def product_squared_norms(left: torch.Tensor, right: torch.Tensor) -> SquaredNorm:
    """Return ||sum_t left_t right_t^T||^2 of each author, in the way that costs fewer multiplications.

    With T tokens an author, the ghost norm takes up to T^2 (rows + columns) multiplications, the gradient T rows columns.

    Args:
        left, right: (authors, tokens, rows) and (authors, tokens, columns), of one dtype.
    """
    _, tokens, rows = left.shape
    columns = right.shape[-1]
    block = min(tokens, GHOST_BLOCK if left.device.type == "cpu" else 2 * GHOST_BLOCK)
    if (tokens + block) / 2 * (rows + columns) <= rows * columns:
        return ghost_squared_norms(left, right, block)
    chunk = max(1, MATERIALIZE_ELEMENTS // (rows * columns))  # authors
    pairs = zip(left.split(chunk), right.split(chunk))
    value = torch.cat([matmul(left_chunk.mT, right_chunk).square_().sum((1, 2)) for left_chunk, right_chunk in pairs])
    return SquaredNorm(value, (token_norms(left) * token_norms(right)).sum(1))


def token_norms(factor: torch.Tensor) -> torch.Tensor:
    """Return the norm of each token, float32 (authors, tokens)."""
    return torch.linalg.vector_norm(factor, dim=2, dtype=torch.float32)


def ghost_squared_norms(left: torch.Tensor, right: torch.Tensor, block: int) -> SquaredNorm:
    """Return sum_{s,t} <left_s, left_t> <right_s, right_t>, in blocks of s with t from there on, as pairs are symmetric."""
    if left.device.type == "cpu":
        left, right = left.float(), right.float()  # once for all blocks
    if left.shape[1] <= block:
        products = matmul(left, left.mT).mul_(matmul(right, right.mT))  # (authors, tokens, tokens)
        return SquaredNorm(products.sum((1, 2)), products.diagonal(dim1=1, dim2=2).sqrt().sum(1))
    value = bound = torch.zeros((), device=left.device)
    for start in range(0, left.shape[1], block):
        products, others = (matmul(side[:, start : start + block], side[:, start:].mT) for side in (left, right))
        products.mul_(others)  # (authors, block, tokens from start on)
        bound = bound + products.diagonal(dim1=1, dim2=2).sqrt().sum(1)
        value = value + products[:, :, :block].sum((1, 2)) + 2 * products[:, :, block:].sum((1, 2))
    return SquaredNorm(value, bound)


def lookup_squared_norms(ids: torch.Tensor, gradients: torch.Tensor) -> SquaredNorm:
    """Return sum_{s,t} [id_s = id_t] <e_s, e_t> of each author, from (authors, tokens) and (authors, tokens, features)."""
    products = matmul(gradients, gradients.mT)
    bound = products.diagonal(dim1=1, dim2=2).sqrt().sum(1)
    return SquaredNorm(products.mul_(ids[:, :, None] == ids[:, None, :]).sum((1, 2)), bound)


def total_squared_norms(grads: list[GradFactors], authors: AuthorIndex) -> SquaredNorm:
    """Return ||sum of the gradients||^2 for one parameter, (authors,): of one, or of the two of a tied embedding."""
    if len(grads) == 1:
        return grads[0].squared(authors)
    lookup, product = sorted(grads, key=lambda grad: isinstance(grad, OuterProduct))
    assert isinstance(lookup, EmbeddingGrad) and isinstance(product, OuterProduct)
    return tied_squared_norm(lookup, looked_up_rows(lookup.ids, product, authors), product.squared(authors), authors)


def looked_up_rows(ids: torch.Tensor, product: OuterProduct, authors: AuthorIndex) -> torch.Tensor:
    """Return the rows of each author's G_head that the ids look up, sum_t z_t[id_s] h_t, all that `tied_squared_norm` needs.

    Args:
        ids: id_s, (samples, tokens).
        product: the head's factors, z_t (samples, tokens, vocabulary) and h_t (samples, tokens, features).
    Returns:
        float32 (authors, tokens of all, features).
    """
    ids, logit_gradients, hidden = (authors.gather(tensor) for tensor in (ids, *product))
    picked = logit_gradients.gather(2, ids[:, None, :].expand(-1, logit_gradients.shape[1], -1))  # z_t[id_s]
    return matmul(picked.mT, hidden.to(picked.dtype))


def tied_squared_norm(lookup: EmbeddingGrad, rows: torch.Tensor, head: SquaredNorm, authors: AuthorIndex) -> SquaredNorm:
    """Return ||G_embedding + G_head||^2 of each author, (authors,), for a matrix that is both.

    Args:
        rows: of G_head, from `looked_up_rows`; overwritten.
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
            total = add(total, grad, authors)
        return [total]
    by_type = ([grad for grad in grads if isinstance(grad, type_)] for type_ in (EmbeddingGrad, OuterProduct))
    return [same[0] if len(same) == 1 else type(same[0])(*(torch.cat(t, 1) for t in zip(*same))) for same in by_type if same]


def materialize(grad: OuterProduct, authors: AuthorIndex) -> MaterializedGrad:
    """Form the per-author gradients of a matrix: small ones for each sample first, which moves nothing."""
    if len(grad.left) * grad.left.shape[-1] * grad.right.shape[-1] <= MATERIALIZE_ELEMENTS:
        return MaterializedGrad(authors.sum(matmul(grad.left.mT, grad.right)))
    return MaterializedGrad(matmul(authors.gather(grad.left).mT, authors.gather(grad.right)))


def add(total: MaterializedGrad, grad: GradFactors, authors: AuthorIndex) -> MaterializedGrad:
    """Return the sum of two gradients; a lookup is added in place, as a matrix that was formed has its own memory."""
    if isinstance(grad, EmbeddingGrad):
        rows = authors.author.view(-1, 1) * total.gradients.shape[1] + grad.ids  # (samples, tokens), among all authors' rows
        total.gradients.view(-1, total.gradients.shape[2]).index_add_(0, rows.flatten(), grad.gradients.float().flatten(0, 1))
        return total
    return MaterializedGrad(total.gradients + (materialize(grad, authors) if isinstance(grad, OuterProduct) else grad).gradients)


def mask_authors(grad: GradFactors, masked: torch.Tensor, author: torch.Tensor) -> GradFactors:
    """Return `grad` with zeros for the authors `masked`, bool (authors,), whatever values they had."""
    rows = masked if isinstance(grad, MaterializedGrad) else masked[author]
    return type(grad)(*(tensor.masked_fill(rows.view(-1, *[1] * (tensor.dim() - 1)), 0) for tensor in grad))
