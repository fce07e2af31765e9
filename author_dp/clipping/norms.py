"""Squared norms of per-author gradients, without forming the gradients where that costs more.

Guarantees: `SquaredNorm.with_margin` is the squared norm of each author's gradient, rounded up by what rounding may take.

Where the tokens' gradients g_t a_t^T cancel, ||G||^2 is a small difference of large numbers. Rounding may leave any part of it,
or nothing at all, and the author would be clipped too little, or not at all. `SquaredNorm` therefore adds a margin. The sum of
the c g_t a_t^T may also come out larger than c G, as bfloat16 rounds each c g_t. The norm of scaled factors has slack for it.
"""

from typing import NamedTuple

import torch

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
    bound: torch.Tensor | None = None  # sum over tokens of |left_t| |right_t|; None where the gradient itself is scaled
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
