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
