"""clipping/contributions.py: norms and clipped sums against their naive twins."""

import math

import pytest
import torch

from author_dp.clipping import contributions
from author_dp.clipping.contributions import Authors, Product, lookup_squared_norms, product_squared_norms


def explicit(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    return torch.stack([(sum(torch.outer(a, b) for a, b in zip(*pair)) ** 2).sum() for pair in zip(left, right)])


@pytest.mark.parametrize(("tokens", "rows", "columns"), [(3, 20, 30), (40, 5, 7), (8, 16, 16), (1, 1, 1)])
def test_norm_of_a_product_both_ways(tokens, rows, columns, monkeypatch):
    left, right = torch.randn(4, tokens, rows), torch.randn(4, tokens, columns)
    assert torch.allclose(product_squared_norms(left, right), explicit(left, right), rtol=1e-4)
    monkeypatch.setattr(contributions, "EXPLICIT_ELEMENTS", 1)
    assert torch.allclose(product_squared_norms(left, right), explicit(left, right), rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [4, 11, 12])
def test_norm_of_a_product_in_blocks(tokens, dtype, monkeypatch):
    monkeypatch.setattr(contributions, "GHOST_BLOCK", 4)
    left, right = (torch.randn(3, tokens, features).to(dtype) for features in (20, 30))
    found = contributions.ghost_squared_norms(left, right, 4)
    assert torch.allclose(found, explicit(left.float(), right.float()), rtol=1e-4) and found.dtype == torch.float32
    assert torch.equal(product_squared_norms(left, right), found)  # (12 + 4) / 2 x 50 < 20 x 30


def test_the_cheaper_way_is_taken(monkeypatch):
    shapes = []
    matmul = contributions.matmul
    monkeypatch.setattr(contributions, "matmul", lambda a, b: shapes.append((a.shape[-2], b.shape[-1])) or matmul(a, b))
    product_squared_norms(torch.randn(2, 10, 100), torch.randn(2, 10, 50))  # 10 x 150 < 100 x 50
    assert shapes == [(10, 10)] * 2
    product_squared_norms(torch.randn(2, 100, 8), torch.randn(2, 100, 4))  # 100 x 12 > 8 x 4
    assert shapes[2:] == [(8, 4)]


def test_norm_of_a_lookup_counts_equal_ids_together():
    ids, gradients = torch.tensor([[3, 1, 3, 3], [0, 1, 2, 3]]), torch.randn(2, 4, 5)
    expected = [torch.zeros(4, 5).index_add_(0, i, g).square().sum() for i, g in zip(ids, gradients)]
    assert torch.allclose(lookup_squared_norms(ids, gradients), torch.stack(expected), rtol=1e-5)


@pytest.mark.parametrize("tokens", [3, 120, 200])
@pytest.mark.parametrize("common", [30, 1_000, 10_000])
def test_a_norm_is_not_below_the_truth_where_tokens_cancel(tokens, common):
    """Inputs that are nearly the same, and output gradients that sum to zero: rounding may leave less than nothing."""
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(8, tokens, 512, generator=generator), torch.randn(8, tokens, 512, generator=generator)
    left, right = left - left.mean(1, keepdim=True), right / 512**0.5 + common * torch.nn.functional.one_hot(torch.tensor(3), 512)
    truth = (left.double().mT @ right.double()).square().sum((1, 2))
    allowed = 1e-4 * truth + 2e-6 * (left.square().sum(2) * right.square().sum(2)).sum(1)
    found = contributions.ghost_squared_norms(left, right, 128)
    assert (found >= 0.999 * truth).all() and (found - truth <= allowed).all()


def test_a_norm_of_a_lookup_is_not_below_the_truth_where_tokens_cancel():
    gradients = 10_000 + torch.randn(8, 100, 512, generator=torch.Generator().manual_seed(0))
    gradients[:, ::2] = 0.9999 * -gradients[:, 1::2]  # the same token, pulled to and fro
    truth = gradients.double().sum(1).square().sum(1)
    found = lookup_squared_norms(torch.zeros(8, 100, dtype=torch.int64), gradients)
    assert (found >= 0.999 * truth).all() and (found - truth <= 1e-4 * truth + 2e-6 * gradients.square().sum((1, 2))).all()


@pytest.mark.parametrize("author", [[0, 1, 0, 1], [1, 0], [0, 0, 2, 3], [1, 1, 2], [0, 1, 2], [0, 0, 0], []])
def test_authors_in_another_order_are_refused(author):
    """Or samples of one author would be clipped as those of two."""
    with pytest.raises(ValueError, match="ascending"):
        Authors(torch.tensor(author, dtype=torch.int64), 2)


def test_authors_line_up_and_add_up_their_samples():
    authors = Authors(torch.tensor([0, 0, 0, 1, 2, 2]), 3)
    tensor = torch.arange(1.0, 13).view(6, 2, 1)
    assert authors.gather(tensor)[..., 0].tolist() == [[1, 2, 3, 4, 5, 6], [7, 8, 0, 0, 0, 0], [9, 10, 11, 12, 0, 0]]
    assert authors.sum(tensor)[..., 0].tolist() == [[9, 12], [7, 8], [20, 22]]
    even = Authors(torch.tensor([0, 0, 1, 1, 2, 2]), 3).gather(tensor)
    assert even[..., 0].tolist() == [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12]] and even.data_ptr() == tensor.data_ptr()


def test_product_scales_the_narrower_side():
    authors, factors = Authors(torch.arange(2), 2), torch.tensor([0.5, 2.0])
    for rows, columns in ((3, 9), (9, 3)):
        left, right = torch.randn(2, 4, rows), torch.randn(2, 4, columns)
        total = torch.ones(rows, columns)
        Product(left, right).add_clipped(total, factors, authors)
        expected = 1 + sum(f * a.T @ b for f, a, b in zip(factors, left, right))
        assert torch.allclose(total, expected, atol=1e-5) and math.isclose(authors._scratch[torch.float32].numel(), 2 * 4 * 3)
