"""What a call of a layer adds to the gradient of one parameter: its norm for each author, and its share of the clipped sum.

Promise: `squared` is the squared norm of each author's gradient, and `add_clipped` adds the sum of these gradients, each
times its author's factor; neither forms per-author gradients that take more memory than what they are made of. With a_t the
inputs and g_t the output gradients of a linear layer, t running over all tokens of all the author's samples, the author's weight
gradient is G = sum_t g_t a_t^T, and

    ||G||^2 = sum_{s,t} <a_s, a_t> <g_s, g_t>        (the ghost norm [1]: G itself is never formed)

The clipped sum over all authors is then sum_t (c_author g_t) a_t^T: an ordinary matrix product [2].

Where the tokens' gradients g_t a_t^T cancel, ||G||^2 is a small difference of large numbers. Rounding may leave anything of it,
nothing at all included, and the author would be clipped too little, or not: `Squared` adds what rounding may take. The sum of the
c g_t a_t^T may come out larger than c G, as bfloat16 rounds each c g_t: a norm that clips such tokens leaves room for that.

References:
    [1] Li et al. 2022, Large Language Models Can Be Strong Differentially Private Learners, arXiv 2110.05679, section 4
    [2] Bu et al. 2023, Differentially Private Optimization on Large Model at Small Cost, arXiv 2210.00038 (book-keeping)
"""

from typing import NamedTuple

import torch

from author_dp.clipping.author_groups import AuthorIndex

MATERIALIZE_ELEMENTS = 2**24  # per-author gradients formed at once, where they are the cheaper way: 64 MB
GHOST_BLOCK = 128  # tokens whose products with the later ones are formed at once; on a GPU 256, so that the proof has two of them
# Both of the square that a norm had if nothing cancelled: below the first a squared norm is rounded up, by the second, which is
# more than twice what rounding was seen to take (3.5e-7, where tokens repeat). 1,024 independent tokens or more are below it too.
CANCELS, ROUNDING = 2.0**-10, 2.0**-20
BFLOAT16_ROUNDING = 2.0**-8  # of its size, at most, is what a number changes by when it is rounded to bfloat16

# --- which sample is whose ------------------------------------------------------------------------------


# --- what a call of a layer adds to the gradient of one parameter ---------------------------------------


class SquaredNorm(NamedTuple):
    """A squared norm that is a difference, and the norm that it were the square of if nothing cancelled; float32 (authors,)."""

    found: torch.Tensor
    most: torch.Tensor  # the sum over tokens of |left_t| |right_t|; 0 where the gradient itself is what is scaled
    room: torch.Tensor | None = None  # by how much the norm of what is added may be larger, as c g_t is rounded

    def with_margin(self) -> torch.Tensor:
        most = self.most.square()
        square = torch.where(self.found < CANCELS * most, self.found + ROUNDING * most, self.found)
        return square if self.room is None else (square.clamp(min=0).sqrt() + self.room).square()


class MaterializedGrad(NamedTuple):
    """Per-author gradients, of what is small or smaller than what it is made of."""

    gradients: torch.Tensor  # (authors, ...), float32

    def squared(self, authors: AuthorIndex) -> SquaredNorm:
        found = squared_norms(self.gradients)
        return SquaredNorm(found, torch.zeros_like(found))

    def add_clipped(self, total: torch.Tensor, factors: torch.Tensor, authors: AuthorIndex) -> None:
        total.view(-1).addmv_(self.gradients.reshape(len(self.gradients), -1).T, factors)


class OuterProduct(NamedTuple):
    """The gradient of a matrix: sum over tokens of left_t right_t^T, of the matrix' shape."""

    left: torch.Tensor  # (samples, tokens, rows)
    right: torch.Tensor  # (samples, tokens, columns)

    def squared(self, authors: AuthorIndex) -> SquaredNorm:
        squared = product_squared_norms(authors.gather(self.left), authors.gather(self.right))
        # |sum_t r_t a_t^T| <= |c G| + sum_t |r_t - c g_t| |a_t| for the rounded r_t, and the last sum is at most c `room`.
        return squared if self.left.dtype == torch.float32 else squared._replace(room=BFLOAT16_ROUNDING * squared.most)

    def add_clipped(self, total: torch.Tensor, factors: torch.Tensor, authors: AuthorIndex) -> None:
        left, right = self.left, self.right
        if left.shape[-1] < right.shape[-1]:  # scale the narrower: the other may be as wide as the vocabulary
            left = authors.scale(left, factors)
        else:
            right = authors.scale(right, factors)
        if left.dtype == torch.float32:
            total.addmm_(left.flatten(0, 1).T, right.flatten(0, 1))
        else:
            total.add_(matmul(left.flatten(0, 1).T, right.flatten(0, 1)))


class EmbeddingGrad(NamedTuple):
    """The gradient of an embedding: the tokens' output gradients, added to the rows that were looked up."""

    ids: torch.Tensor  # (samples, tokens)
    gradients: torch.Tensor  # (samples, tokens, features)

    def squared(self, authors: AuthorIndex) -> SquaredNorm:
        return lookup_squared_norms(authors.gather(self.ids), authors.gather(self.gradients))

    def add_clipped(self, total: torch.Tensor, factors: torch.Tensor, authors: AuthorIndex) -> None:
        gradients = authors.scale(self.gradients.float(), factors)
        total.index_add_(0, self.ids.flatten(), gradients.flatten(0, 1))


GradFactors = MaterializedGrad | OuterProduct | EmbeddingGrad


def matmul(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Product of matrices, or of batches of them, summed and returned in float32 whatever the type of the factors."""
    if left.dtype == torch.float32 or left.device.type != "cuda":
        return left.float() @ right.float()
    return (torch.bmm if left.dim() == 3 else torch.mm)(left, right, out_dtype=torch.float32)


def squared_norms(gradients: torch.Tensor) -> torch.Tensor:
    """Squared norms of per-author gradients, (authors, ...): piece by piece, for a cache, and as one sum of many loses norm."""
    rows = gradients.reshape(len(gradients), -1)
    at_once = max(1, (2**20 if rows.device.type == "cpu" else 2**26) // len(rows))
    return torch.stack([part.square().sum(1) for part in rows.split(at_once, 1)], 1).sum(1)  # along rows: see `norms_of`


def product_squared_norms(left: torch.Tensor, right: torch.Tensor) -> SquaredNorm:
    """||sum_t left_t right_t^T||^2 of each author, by the way that costs fewer multiplications.

    With T tokens an author, the ghost norm takes up to T^2 (rows + columns) multiplications, the gradient T rows columns.

    Args:
        left, right: (authors, tokens, rows) and (authors, tokens, columns), of one type.
    """
    _, tokens, rows = left.shape
    columns = right.shape[-1]
    block = min(tokens, GHOST_BLOCK if left.device.type == "cpu" else 2 * GHOST_BLOCK)
    if (tokens + block) / 2 * (rows + columns) <= rows * columns:
        return ghost_squared_norms(left, right, block)
    at_once = max(1, MATERIALIZE_ELEMENTS // (rows * columns))
    parts = zip(left.split(at_once), right.split(at_once))
    found = torch.cat([matmul(left_part.mT, right_part).square_().sum((1, 2)) for left_part, right_part in parts])
    return SquaredNorm(found, (left.float().norm(dim=2) * right.float().norm(dim=2)).sum(1))


def ghost_squared_norms(left: torch.Tensor, right: torch.Tensor, block: int) -> SquaredNorm:
    """sum_{s,t} <left_s, left_t> <right_s, right_t>: blocks of s, with t from there on: the rest is the same once more."""
    if left.device.type == "cpu":
        left, right = left.float(), right.float()  # once for all blocks
    found = most = torch.zeros((), device=left.device)
    for start in range(0, left.shape[1], block):
        products, others = (matmul(side[:, start : start + block], side[:, start:].mT) for side in (left, right))
        products.mul_(others)  # (authors, block, tokens from start on)
        most = most + products.diagonal(dim1=1, dim2=2).sqrt().sum(1)
        found = found + products[:, :, :block].sum((1, 2)) + 2 * products[:, :, block:].sum((1, 2))
    return SquaredNorm(found, most)


def lookup_squared_norms(ids: torch.Tensor, gradients: torch.Tensor) -> SquaredNorm:
    """sum_{s,t} [id_s = id_t] <e_s, e_t> of each author: (authors, tokens), (authors, tokens, features)."""
    products = matmul(gradients, gradients.mT)
    most = products.diagonal(dim1=1, dim2=2).sqrt().sum(1)
    return SquaredNorm(products.mul_(ids[:, :, None] == ids[:, None, :]).sum((1, 2)), most)


def tied_cross_terms(
    ids: torch.Tensor, gradients: torch.Tensor, logit_gradients: torch.Tensor, hidden: torch.Tensor
) -> torch.Tensor:
    """2 <G_embedding, G_head> of each author, for one matrix that is both: 2 sum_{s,t} z_t[id_s] <e_s, h_t>.

    Args:
        ids, gradients: id_s and e_s, (authors, tokens) and (authors, tokens, features).
        logit_gradients, hidden: z_t and h_t, (authors, tokens, vocabulary) and (authors, tokens, features).
    Returns:
        float32 (authors,).
    """
    picked = logit_gradients.gather(2, ids[:, None, :].expand(-1, logit_gradients.shape[1], -1)).float()  # z_t[id_s]
    return 2 * (hidden.float() @ gradients.float().mT).mul_(picked).sum((1, 2))


def looked_up_rows(ids: torch.Tensor, logit_gradients: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """The rows of each author's G_head that the ids look up, so that 2 <G_embedding, G_head> is 2 sum_s <row_s, e_s>.

    Args:
        ids, logit_gradients, hidden: as of `tied_cross_terms`.
    Returns:
        sum_t z_t[id_s] h_t, float32 (authors, tokens, features): all that need be kept of the head for that product.
    """
    picked = logit_gradients.gather(2, ids[:, None, :].expand(-1, logit_gradients.shape[1], -1))  # z_t[id_s]
    return matmul(picked.mT, hidden.to(picked.dtype))


def total_squared_norms(parts: list[GradFactors], authors: AuthorIndex) -> torch.Tensor:
    """||sum of the contributions||^2 for one parameter, (authors,): one contribution, or the two of a tied embedding."""
    if len(parts) == 1:
        return parts[0].squared(authors).with_margin()
    lookup, product = sorted(parts, key=lambda part: isinstance(part, OuterProduct))
    assert isinstance(product, OuterProduct)
    cross = tied_cross_terms(*(authors.gather(tensor) for tensor in (*lookup, *product)))
    return tied_squared_norm(lookup.squared(authors), product.squared(authors), cross)


def tied_squared_norm(lookup: SquaredNorm, product: SquaredNorm, cross: torch.Tensor) -> torch.Tensor:
    """Return the squared norm of a sum of two gradients, from their own and 2 <one, other>, (authors,)."""
    return SquaredNorm(lookup.found + product.found + cross, lookup.most + product.most, product.room).with_margin()


def merge_factors(parts: list[GradFactors], authors: AuthorIndex) -> list[GradFactors]:
    """Make one contribution of those of one kind: all calls of a layer share one token axis."""
    if len(parts) < 2:
        return parts
    explicit = [part for part in parts if isinstance(part, MaterializedGrad)]
    if explicit:
        total = explicit[0]
        for part in [*explicit[1:], *(part for part in parts if not isinstance(part, MaterializedGrad))]:
            total = add(total, part, authors)
        return [total]
    kinds = ([part for part in parts if isinstance(part, kind)] for kind in (EmbeddingGrad, OuterProduct))
    return [same[0] if len(same) == 1 else type(same[0])(*(torch.cat(t, 1) for t in zip(*same))) for same in kinds if same]


def materialize(part: OuterProduct, authors: AuthorIndex) -> MaterializedGrad:
    """Form the per-author gradients of a matrix: of small ones for each sample first, which moves nothing."""
    if len(part.left) * part.left.shape[-1] * part.right.shape[-1] <= MATERIALIZE_ELEMENTS:
        return MaterializedGrad(authors.sum(matmul(part.left.mT, part.right)))
    return MaterializedGrad(matmul(authors.gather(part.left).mT, authors.gather(part.right)))


def add(total: MaterializedGrad, part: GradFactors, authors: AuthorIndex) -> MaterializedGrad:
    """Return the sum of two contributions; a lookup is added in place, as what is formed of a matrix has memory of its own."""
    if isinstance(part, EmbeddingGrad):
        rows = authors.author.view(-1, 1) * total.gradients.shape[1] + part.ids  # (samples, tokens), among all authors' rows
        total.gradients.view(-1, total.gradients.shape[2]).index_add_(0, rows.flatten(), part.gradients.float().flatten(0, 1))
        return total
    return MaterializedGrad(total.gradients + (materialize(part, authors) if isinstance(part, OuterProduct) else part).gradients)


def mask_authors(part: GradFactors, bad: torch.Tensor, author: torch.Tensor) -> GradFactors:
    """Return the contribution with zeros for the `bad` authors, (authors,), whatever they held."""
    rows = bad if isinstance(part, MaterializedGrad) else bad[author]
    return type(part)(*(tensor.masked_fill(rows.view(-1, *[1] * (tensor.dim() - 1)), 0) for tensor in part))
