"""clipping/: what is asked of every engine, the plain one (grad_sample.py) and the fast one alike; and the counting of norms."""

import math

import naive
import pytest
import torch
from conftest import COUNTS, MODELS, as_arrays, clipped_sum, flat, make_batch, make_trainer, tiny_gpt2
from torch import nn

from author_dp.clipping import ENGINES
from author_dp.clipping.positions import separate_positions
from author_dp.errors import UserError
from author_dp.mechanism.losses import author_losses
from author_dp.mechanism.microbatches import make_microbatches
from data_utils import collate


def select_authors(batch, chosen) -> dict:
    samples = [as_arrays(batch)[author] for author in chosen]
    (batch,) = make_microbatches([[{"input_ids": row} for row in rows] for rows in samples], len(chosen), collate)
    return batch


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("clip_norm", [1e-2, 1.0, 1e3])
def test_clipped_sum_equals_the_naive_one(clipping, kind, clip_norm):
    model, batch = tiny_gpt2(**MODELS[kind]), make_batch()
    ours, _ = clipped_sum(model, batch, clip_norm, clipping)
    expected = naive.clipped_sum(model, as_arrays(batch), clip_norm)
    assert (ours - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize("kind", MODELS)
def test_norm_is_that_of_all_parameters_together(clipping, kind):
    model, batch = tiny_gpt2(**MODELS[kind]), make_batch()
    _, norms = clipped_sum(model, batch, 1.0, clipping)
    expected = [flat(naive.author_gradient(model, samples)).norm().item() for samples in as_arrays(batch)]
    assert norms.tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", MODELS)
def test_an_authors_clipped_gradient_is_the_same_alone_and_among_others(clipping, kind):
    model, batch = tiny_gpt2(**MODELS[kind]), make_batch()
    everybody, _ = clipped_sum(model, batch, 0.1, clipping)
    for author in range(len(COUNTS)):
        alone, _ = clipped_sum(model, select_authors(batch, [author]), 0.1, clipping)
        others, _ = clipped_sum(model, select_authors(batch, [a for a in range(len(COUNTS)) if a != author]), 0.1, clipping)
        assert alone.norm() <= 0.1 * (1 + 1e-5)
        assert (everybody - others - alone).norm() < 1e-5 * everybody.norm()


def test_many_samples_of_one_author_move_the_sum_by_the_clip_norm_at_most(clipping):
    model = tiny_gpt2()
    total, _ = clipped_sum(model, make_batch([40]), 0.1, clipping)
    assert total.norm() <= 0.1 * (1 + 1e-5)


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf, 1e30])
def test_an_author_whose_gradient_is_not_finite_contributes_zero(clipping, poison):
    model, batch = tiny_gpt2(), make_batch()
    expected, _ = clipped_sum(model, select_authors(batch, [0, 1, 2, 4, 5]), 0.1, clipping)
    engine = ENGINES[clipping](model, 0.1)
    for parameter in model.parameters():
        parameter.summed_grad = torch.zeros_like(parameter)
    losses = author_losses(engine.module, batch)
    weights = torch.ones_like(losses)
    poisoned = 3
    weights[poisoned] = poison
    norms = engine.backward(losses * weights, batch["author"])
    ours = flat(parameter.summed_grad for parameter in model.parameters())
    assert norms.isfinite().sum() == len(COUNTS) - 1
    assert (ours - expected).norm() < 1e-5 * expected.norm()


def test_frozen_parameters_are_left_alone(clipping):
    model = tiny_gpt2()
    for name, parameter in model.named_parameters():
        parameter.requires_grad = "h.1" in name
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    batch = make_batch()
    ours, _ = clipped_sum(model, batch, 0.1, clipping)
    expected = naive.clipped_sum(model, as_arrays(batch), 0.1)
    assert (ours - expected).norm() < 1e-5 * expected.norm()
    for name, before in frozen.items():
        parameter = model.get_parameter(name)
        assert torch.equal(parameter, before) and getattr(parameter, "summed_grad", None) is None


def test_what_the_loss_does_not_use_contributes_nothing(clipping):
    model, batch = tiny_gpt2(), make_batch()
    expected, expected_norms = clipped_sum(model, batch, 0.1, clipping)
    model.transformer.unused = nn.Linear(3, 3)
    ours, norms = clipped_sum(model, batch, 0.1, clipping)
    assert torch.equal(norms, expected_norms) and torch.equal(ours[ours != 0], expected[expected != 0])


def test_positions_that_all_samples_share(clipping, monkeypatch):
    """GPT-2's: ghost clipping expands them; grad_sample needs separate ones, and refuses without them."""
    model, batch = tiny_gpt2(), make_batch()
    expected, _ = clipped_sum(model, batch, 0.1, clipping)
    if clipping == "grad_sample":
        monkeypatch.setattr("author_dp.clipping.grad_sample.separate_positions", lambda model: [])
        with pytest.raises(UserError, match="wpe"):
            clipped_sum(model, batch, 0.1, clipping)
    else:
        (hook,) = separate_positions(model)
        ours, _ = clipped_sum(model, batch, 0.1, clipping)
        hook.remove()
        assert (ours - expected).norm() < 1e-5 * expected.norm()


def test_norms_are_counted_in_their_bins(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=4)
    trainer.train()
    counts, edges = trainer.norms.histogram(), trainer.norms.edges
    clipped = sum(counts[i] for i in range(len(counts)) if i > 0 and (i == len(edges) or edges[i] > 1.0001))
    assert sum(counts) > 0 and clipped == sum(counts)  # C is 0.5, the norms of a new model are above 1
