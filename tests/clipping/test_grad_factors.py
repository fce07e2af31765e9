"""clipping/norms.py, grad_factors.py and author_groups.py: norms and clipped sums against plain ones."""

import math

import pytest
import torch
from mutation import catches

from author_dp.clipping import grad_factors, norms
from author_dp.clipping.author_groups import AuthorClipFactors, AuthorIndex
from author_dp.clipping.factor_store import total_norms
from author_dp.clipping.grad_factors import OuterProduct
from author_dp.clipping.norms import SquaredNorm, lookup_squared_norms, product_squared_norms


def explicit(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    return torch.stack([(sum(torch.outer(a, b) for a, b in zip(*pair)) ** 2).sum() for pair in zip(left, right)])


@pytest.mark.parametrize(("tokens", "rows", "columns"), [(3, 20, 30), (40, 5, 7), (8, 16, 16), (1, 1, 1)])
def test_norm_of_a_product_both_ways(tokens, rows, columns, monkeypatch):
    left, right = torch.randn(4, tokens, rows), torch.randn(4, tokens, columns)
    assert torch.allclose(product_squared_norms(left, right).value, explicit(left, right), rtol=1e-4)
    monkeypatch.setattr(norms, "MATERIALIZE_ELEMENTS", 1)
    assert torch.allclose(product_squared_norms(left, right).value, explicit(left, right), rtol=1e-4)


@catches("a pair of tokens counted once for two", "clipping.norms.ghost_squared_norms", "+ 2 * products", "+ products",
    tokens=11, dtype=torch.float32)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [4, 11, 12])
def test_norm_of_a_product_in_blocks(tokens, dtype, monkeypatch):
    monkeypatch.setattr(norms, "GHOST_BLOCK", 4)
    left, right = (torch.randn(3, tokens, features).to(dtype) for features in (20, 30))
    found = norms.ghost_squared_norms(left, right, 4)
    most = (left.float().norm(dim=2) * right.float().norm(dim=2)).sum(1)
    assert torch.allclose(found.value, explicit(left.float(), right.float()), rtol=1e-4) and found.value.dtype == torch.float32
    assert torch.allclose(found.bound, most, rtol=1e-4)
    assert all(map(torch.equal, product_squared_norms(left, right)[:2], found[:2]))  # (12 + 4) / 2 x 50 < 20 x 30


def test_the_cheaper_way_is_taken(monkeypatch):
    shapes = []
    matmul = norms.matmul
    monkeypatch.setattr(norms, "matmul", lambda a, b: shapes.append((a.shape[-2], b.shape[-1])) or matmul(a, b))
    product_squared_norms(torch.randn(2, 10, 100), torch.randn(2, 10, 50))  # 10 x 150 < 100 x 50
    assert shapes == [(10, 10)] * 2
    product_squared_norms(torch.randn(2, 100, 8), torch.randn(2, 100, 4))  # 100 x 12 > 8 x 4
    assert shapes[2:] == [(8, 4)]


def test_norm_of_a_lookup_counts_equal_ids_together():
    ids, gradients = torch.tensor([[3, 1, 3, 3], [0, 1, 2, 3]]), torch.randn(2, 4, 5)
    expected = [torch.zeros(4, 5).index_add_(0, i, g).square().sum() for i, g in zip(ids, gradients)]
    found = lookup_squared_norms(ids, gradients)
    assert torch.allclose(found.value, torch.stack(expected), rtol=1e-5)
    assert torch.allclose(found.bound, gradients.norm(dim=2).sum(1), rtol=1e-5)


def cancelling(tokens: int, features: int, kind: str) -> torch.Tensor:
    """Output gradients whose sum over tokens is nearly nothing, (8 authors, tokens, features)."""
    generator = torch.Generator().manual_seed(0)
    if kind == "independent":  # rounding errors of pairs are independent too
        gradients = torch.randn(8, tokens, features, generator=generator)
        return gradients - gradients.mean(1, keepdim=True)
    one = torch.randn(8, 1, features, generator=generator)  # a word repeated: the same errors, which add up
    return torch.cat({"two kinds": [one * (1 + 1e-3), -one], "three to one": [3 * (one + 1e-4), *3 * [-one]]}[kind], 1).tile(
        1, tokens // (2 if kind == "two kinds" else 4), 1
    )


def is_above(found: torch.Tensor, truth: torch.Tensor, most: torch.Tensor) -> bool:
    """Whether squared norms are not below the truth, nor above by more than what may be lost."""
    return bool((found >= 0.999 * truth).all() and (found - truth <= 1e-3 * truth + 2e-6 * most.square()).all())


@catches("what cancels not rounded up", "clipping.norms.SquaredNorm.with_margin",
    "self.value + ROUNDING_MARGIN * bound", "self.value", tokens=1024, common=0, kind="two kinds")  # fmt: skip
@catches("as if rounding errors were independent", "clipping.norms.ghost_squared_norms",
    "bound + products.diagonal(dim1=1, dim2=2).sqrt().sum(1)", "(bound**2 + products.diagonal(dim1=1, dim2=2).sum(1)).sqrt()",
    tokens=1024, common=0, kind="two kinds")  # fmt: skip
@pytest.mark.parametrize("kind", ["independent", "two kinds", "three to one"])
@pytest.mark.parametrize(("tokens", "common"), [(4, 1_000), (128, 30), (128, 10_000), (512, 0), (1_024, 0)])
def test_a_norm_where_tokens_cancel(tokens, common, kind):
    """Inputs that are nearly the same, and output gradients that sum to nothing: rounding may leave less than that."""
    left = cancelling(tokens, 512, kind)
    right = torch.randn(8, tokens if common else 1, 512, generator=torch.Generator().manual_seed(1)).expand(8, tokens, 512)
    right = right / 512**0.5 + common * torch.nn.functional.one_hot(torch.tensor(3), 512)
    truth = (left.double().mT @ right.double()).square().sum((1, 2))
    found = norms.ghost_squared_norms(left, right, 128).with_margin()
    assert is_above(found, truth, (left.norm(dim=2) * right.norm(dim=2)).sum(1))


@catches("what cancels of a lookup not rounded up", "clipping.norms.lookup_squared_norms", "sqrt().sum(1)",
    "sqrt().sum(1) * 0", tokens=512, kind="two kinds")  # fmt: skip
@pytest.mark.parametrize("kind", ["independent", "two kinds", "three to one"])
@pytest.mark.parametrize("tokens", [8, 512])
def test_a_norm_of_a_lookup_where_tokens_cancel(tokens, kind):
    gradients = cancelling(tokens, 512, kind)
    truth = gradients.double().sum(1).square().sum(1)
    found = lookup_squared_norms(torch.zeros(8, tokens, dtype=torch.int64), gradients).with_margin()
    assert is_above(found, truth, gradients.norm(dim=2).sum(1))


@catches("what cancels of tied weights not rounded up", "clipping.grad_factors.tied_grad_factors_norm",
    "square.bound + head.bound",
    "cross * 0", vocabulary=50, features=64)  # fmt: skip
@pytest.mark.parametrize(("vocabulary", "features"), [(50, 64), (600, 300)])  # the explicit way, and the ghost norm
def test_a_norm_of_a_tied_matrix_whose_two_uses_cancel(vocabulary, features):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(8, 1, features, generator=generator).expand(8, 100, features).contiguous()
    gradients, ids = hidden * (1 + 1e-4), torch.full((8, 100), 7)
    logits = -torch.nn.functional.one_hot(ids, vocabulary).float()
    truth = (gradients.double() - hidden.double()).sum(1).square().sum(1)
    parts = [grad_factors.EmbeddingGrad(ids, gradients), OuterProduct(logits, hidden)]
    found = grad_factors.grad_factors_norms(parts, AuthorIndex(torch.arange(8), 8)).with_margin()
    assert is_above(found, truth, gradients.norm(dim=2).sum(1) + hidden.norm(dim=2).sum(1))


@catches(
    "no room for what bfloat16 rounds, of tied weights", "clipping.grad_factors.tied_grad_factors_norm", "head.rounded", "None"
)
def test_a_tied_head_whose_tokens_cancel_is_given_room_for_bfloat16():
    tokens = torch.tensor([*[1.0, 1.015625, -2.015625] * 5, 2.0**-8])  # times most factors, rounded, they sum to something else
    logits, hidden = tokens.view(1, -1, 1).expand(1, -1, 20).bfloat16(), torch.ones(1, len(tokens), 30, dtype=torch.bfloat16)
    parts = [
        grad_factors.EmbeddingGrad(torch.zeros(1, len(tokens), dtype=torch.int64), torch.zeros_like(hidden)),
        OuterProduct(logits, hidden),
    ]
    authors = AuthorIndex(torch.tensor([0]), 1)
    norm = grad_factors.grad_factors_norms(parts, authors).with_margin().sqrt()
    for share in torch.linspace(0.05, 0.85, 17):
        total = torch.zeros(20, 30)
        for part in parts:
            part.add_clipped(total, AuthorClipFactors(1.0, 1 / share.view(1), authors))
        assert total.norm() <= share * norm


def test_squared_norms_of_many_numbers_lose_nothing():
    """A sum of 16 million squares in one go is too small, in float32 on a CPU: authors would be clipped too little."""
    many = torch.randn(1, 2**24, generator=torch.Generator().manual_seed(0))
    assert norms.squared_norms(many).item() == pytest.approx(many.double().square().sum().item(), rel=1e-6)
    assert norms.squared_norms(torch.tensor([3.0, -2.0])).tolist() == [9.0, 4.0]  # a parameter without dimensions


@catches("a square below zero takes from the others", "clipping.factor_store.total_norms", "every.clamp(min=0)", "every")
def test_no_parameter_takes_norm_away_from_others():
    squares = [torch.tensor([-1.0, 1.0, 4.0, 1.0]), torch.tensor([4.0, -torch.inf, 5.0, torch.nan])]
    assert total_norms([SquaredNorm(square) for square in squares], torch.zeros(4)).tolist() == [2.0, torch.inf, 3.0, torch.inf]


@catches("authors in any order taken", "clipping.author_groups.AuthorIndex.__init__", "if not (len(author)",
    "if False and not (len(author)", author=[0, 1, 0, 1])  # fmt: skip
@pytest.mark.parametrize("author", [[0, 1, 0, 1], [1, 0], [0, 0, 2, 3], [1, 1, 2], [0, 1, 2], [0, 0, 0], []])
def test_authors_in_another_order_are_refused(author):
    """Or samples of one author would be clipped as those of two."""
    with pytest.raises(ValueError, match="ascending"):
        AuthorIndex(torch.tensor(author, dtype=torch.int64), 2)


@catches("as many samples of each author as said", "clipping.author_groups.AuthorIndex.__init__",
    "if samples_each is not None and num_authors * samples_each != len(author)", "if False")  # fmt: skip
def test_authors_with_another_number_of_samples_than_said_are_refused():
    assert AuthorIndex(torch.tensor([0, 0, 1, 1]), 2, samples_each=2).sum(torch.ones(4)).tolist() == [2, 2]
    with pytest.raises(ValueError, match="2 authors with 3 samples each are not 4 samples"):
        AuthorIndex(torch.tensor([0, 0, 1, 1]), 2, samples_each=3)
    with pytest.raises(ValueError, match="ascending"):  # on a CPU, where it costs no wait
        AuthorIndex(torch.tensor([0, 1, 0, 1]), 2, samples_each=2)


def test_authors_line_up_and_add_up_their_samples():
    authors = AuthorIndex(torch.tensor([0, 0, 0, 1, 2, 2]), 3)
    tensor = torch.arange(1.0, 13).view(6, 2, 1)
    assert authors.gather(tensor)[..., 0].tolist() == [[1, 2, 3, 4, 5, 6], [7, 8, 0, 0, 0, 0], [9, 10, 11, 12, 0, 0]]
    assert authors.sum(tensor)[..., 0].tolist() == [[9, 12], [7, 8], [20, 22]]
    even = AuthorIndex(torch.tensor([0, 0, 1, 1, 2, 2]), 3).gather(tensor)
    assert even[..., 0].tolist() == [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12]] and even.data_ptr() == tensor.data_ptr()


def test_product_scales_the_narrower_side():
    factors = torch.tensor([0.5, 0.25])
    clip = AuthorClipFactors(1.0, 1 / factors, AuthorIndex(torch.arange(2), 2))
    for rows, columns in ((3, 9), (9, 3)):
        left, right = torch.randn(2, 4, rows), torch.randn(2, 4, columns)
        total = torch.ones(rows, columns)
        OuterProduct(left, right).add_clipped(total, clip)
        expected = 1 + sum(f * a.T @ b for f, a, b in zip(factors, left, right))
        assert torch.allclose(total, expected, atol=1e-5) and math.isclose(clip._scratch[torch.float32].numel(), 2 * 4 * 3)
