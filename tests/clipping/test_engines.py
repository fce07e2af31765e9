"""clipping/: every engine against the reference, on every family of models; and the statistics of norms."""

import functools
import itertools
import math

import bugs
import pytest
import reference
import torch
from conftest import COUNTS, as_arrays, clipped_sum, flat, make_batch, make_trainer, tiny_gpt2, trainable
from families import ALL_ENGINES, FAMILIES, KINDS, TWO_PASS, close, make_model, run_engine
from mutation import catches
from torch import nn

from author_dp.clipping import norms
from author_dp.clipping.ghost import GhostClipping
from author_dp.clipping.positions import separate_positions
from author_dp.errors import UserError
from author_dp.mechanism.losses import author_losses
from author_dp.mechanism.microbatches import make_microbatches
from data_utils import collate

# Samples of each author, and the tokens of the longest one. In long samples of a narrow model, per-author gradients of matrices
# are the cheaper way to the norm; in short ones the ghost norm is.
BATCHES = {"short": ([1] * 6, 5), "ragged": (COUNTS, 12)}
LONG = {"long": ([1] * 5, 100), "long pairs": ([2] * 5, 100), "long, ragged": ([4, 1, 2, 4], 100), "long, one author": ([3], 100)}
BATCHES |= LONG
FAST = {("gpt2", "tied"), ("gpt2", "untied"), ("llama", "lora"), ("opt", "tied"), ("neox", "untied"), ("qwen3", "tied")}


def select_authors(batch, chosen) -> dict:
    samples = [as_arrays(batch)[author] for author in chosen]
    (batch,) = make_microbatches([[{"input_ids": row} for row in rows] for rows in samples], len(chosen), collate)
    return batch


# --- against the reference --------------------------------------------------------------------------------


def cases() -> list:
    """Return engine, family, kind and batch; in two passes only some are fast tests."""
    found = []
    for engine, family, kind, batch in itertools.product(ALL_ENGINES, FAMILIES, KINDS, BATCHES):
        if batch in LONG and (family != "llama" or engine == "grad_sample"):
            continue
        fast = engine not in TWO_PASS or ((family, kind) in FAST and batch == "ragged") or (kind == "tied" and "," in batch)
        found.append(pytest.param(engine, family, kind, batch, marks=[] if fast else [pytest.mark.integration]))
    return found


@functools.cache
def reference_gradients(family: str, kind: str, batch: str) -> torch.Tensor:
    """Return each author's gradient, (authors, parameters)."""
    counts, longest = BATCHES[batch]
    model = make_model(family, kind)
    return torch.stack([flat(reference.author_gradient(model, rows)) for rows in as_arrays(make_batch(counts, longest=longest))])


@catches("half the clip: a bound of twice C", *bugs.TWICE_THE_CLIP_NORM, engine="ghost", family="gpt2", kind="tied",
    batch="ragged")  # fmt: skip
@catches("scaled up to C, not only down", "clipping.author_groups.AuthorClipFactors.__init__",
    "(clip_norm / norms).clamp(max=1.0)",
    "clip_norm / norms", engine="ghost", family="gpt2", kind="tied", batch="ragged")  # fmt: skip
@catches("tied weights counted as two", *bugs.TIED_COUNTED_AS_TWO, engine="ghost", family="gpt2", kind="tied", batch="short")
@catches("tied weights counted as two where they are formed", *bugs.TIED_COUNTED_AS_TWO_FORMED, engine="ghost", family="gpt2",
    kind="tied", batch="ragged")  # fmt: skip
@catches("no clip in two passes", *bugs.NO_CLIP, engine="two_pass", family="gpt2", kind="tied", batch="ragged")
@catches("no factor in the second pass", "clipping.two_pass.TwoPassStore.add", "summed_grad, self._clip)",
    "summed_grad, AuthorClipFactors(torch.inf, self._clip.factors, self._authors))", engine="two_pass", family="gpt2",
    kind="untied",
    batch="ragged")  # fmt: skip
@catches("tied weights counted as two in two passes", *bugs.TIED_COUNTED_AS_TWO, engine="two_pass", family="gpt2", kind="tied",
    batch="ragged")  # fmt: skip
@catches("a norm without what is kept", "clipping.factor_store.FactorStore.squared_norms", "[self._joined.squared()]",
    "[]", engine="two_pass", family="gpt2", kind="untied",
    batch="ragged")  # fmt: skip
@catches("one author's gradient depends on the others", "mechanism.losses.author_losses", "counts.clamp(min=1)",
    "counts.mean().clamp(min=1)", engine="ghost", family="gpt2", kind="tied", batch="ragged")  # fmt: skip
@pytest.mark.parametrize(("engine", "family", "kind", "batch"), cases())
def test_engine_equals_reference(engine, family, kind, batch):
    """In norms over all parameters, and in the clipped sum: where all authors are clipped, where half are, and where none is."""
    gradients = reference_gradients(family, kind, batch)
    counts, longest = BATCHES[batch]
    model, batch, norms = make_model(family, kind), make_batch(counts, longest=longest), gradients.norm(dim=1)
    for clip_norm in (1e-2, float(norms.sort().values[len(norms) // 2]), 2 * float(norms.max())):
        if engine == "grad_sample" and family == "opt" and kind != "lora":  # Opacus' hooks fail at its position embedding
            with pytest.raises(UserError, match=r"embed_positions.*--clipping ghost"):
                run_engine(engine, model, batch, clip_norm)
            continue
        ours, found, run = run_engine(engine, model, batch, clip_norm)
        assert found.tolist() == pytest.approx(norms.tolist(), rel=1e-5)
        assert close(ours, (clip_norm / norms).clamp(max=1) @ gradients)
        assert all(parameter.grad is None for parameter in model.parameters())
        if isinstance(run, GhostClipping):
            assert not run.fallback_params and not any(hasattr(parameter, "grad_sample") for parameter in model.parameters())
        if engine in TWO_PASS:
            assert not run.store.kept_params


@pytest.mark.parametrize("kind", ["tied", "untied"])  # LoRA's gradients are formed
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_ghost_norm_in_blocks_equals_reference(family, kind, monkeypatch):
    monkeypatch.setattr(norms, "GHOST_BLOCK", 2)
    test_engine_equals_reference("ghost", family, kind, "short")


def gradients_under_dropout(model: nn.Module, batch: dict, clip_norm: float, seed: int) -> torch.Tensor:
    """Return the clipped sum by one backward for each author over one forward, whose dropout masks all authors share."""
    torch.manual_seed(seed)
    losses, parameters = author_losses(model.train(), batch), list(trainable(model).values())
    gradients = [flat(torch.autograd.grad(loss, parameters, retain_graph=True)) for loss in losses]
    return sum(gradient * min(1.0, clip_norm / gradient.norm().item()) for gradient in gradients)


@catches("a second pass of other losses", "clipping.ghost.GhostClipping._backward", "backward(losses, ",
    "backward(losses * (1 if retain_graph else 2), ", family="gpt2", kind="tied")  # fmt: skip
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["gpt2", "neox", "llama"])
def test_engines_drop_what_the_forward_pass_dropped(family, kind):
    model, batch = make_model(family, kind, dropout=0.3), make_batch()
    expected = gradients_under_dropout(model, batch, 0.1, seed=5)
    assert not close(expected, gradients_under_dropout(model, batch, 0.1, seed=6))
    for engine in ALL_ENGINES:
        torch.manual_seed(5)
        assert close(run_engine(engine, model, batch)[0], expected), engine


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("counts", [[1] * 6, COUNTS])
def test_bfloat16_agrees_to_its_rounding_and_stays_below_the_clip_norm(kind, counts):
    model, batch = make_model("gpt2", kind), make_batch(counts)
    expected = reference.clipped_sum(model, as_arrays(batch), 0.1)
    with torch.autocast("cpu", torch.bfloat16):
        theirs, their_norms = clipped_sum(model, batch, 0.1, "grad_sample")
        for engine in ("ghost", *TWO_PASS):
            ours, norms, _ = run_engine(engine, model, batch)
            assert ours.dtype == norms.dtype == torch.float32
            assert close(ours, expected, 0.05) and close(ours, theirs, 0.02), engine
            assert ((0.99 * their_norms <= norms) & (norms <= 1.06 * their_norms)).all(), engine  # slack for rounding
            for seed in range(5):
                alone, *_ = run_engine(engine, model, make_batch([3], seed=seed, longest=15), 1e-3)
                assert alone.norm() <= 1e-3 * (1 + 1e-6), engine


# --- what one author can change ---------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ALL_ENGINES)
@pytest.mark.parametrize("kind", KINDS)
def test_an_authors_clipped_gradient_is_the_same_alone_and_among_others(engine, kind):
    model, batch = make_model("gpt2", kind), make_batch()
    everybody, *_ = run_engine(engine, model, batch)
    for author in range(len(COUNTS)):
        alone, *_ = run_engine(engine, model, select_authors(batch, [author]))
        others, *_ = run_engine(engine, model, select_authors(batch, [a for a in range(len(COUNTS)) if a != author]))
        assert alone.norm() <= 0.1 * (1 + 1e-5)
        assert (everybody - others - alone).norm() < 1e-5 * everybody.norm()


@catches("no clip", *bugs.NO_CLIP, engine="ghost")
@pytest.mark.parametrize("engine", ALL_ENGINES)
def test_many_samples_of_one_author_move_the_sum_by_the_clip_norm_at_most(engine):
    total, *_ = run_engine(engine, tiny_gpt2(), make_batch([40]))
    assert total.norm() <= 0.1 * (1 + 1e-5)


def check_only_author_3_is_left_out(engine: str, model: nn.Module, batch: dict, weights=1.0) -> None:
    expected = reference.clipped_sum(model, [samples for i, samples in enumerate(as_arrays(batch)) if i != 3], 0.1)
    ours, norms, _ = run_engine(engine, model, batch, weights=weights)
    assert norms.isfinite().tolist() == [True] * 3 + [False] + [True] * 2 and close(ours, expected)
    assert engine == "grad_sample" or norms[3].isinf()


@catches("a gradient that is not finite is let in", "clipping.grad_sample.GradSampleClipping.backward", "if not finite.all():",
    "if False:", engine="grad_sample", poison=float("nan"))  # fmt: skip
@pytest.mark.parametrize("engine", ALL_ENGINES)
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf, 1e30])
def test_an_author_whose_loss_is_not_finite_contributes_zero(engine, poison):
    weights = torch.ones(len(COUNTS))
    weights[3] = poison
    check_only_author_3_is_left_out(engine, tiny_gpt2(), make_batch(), weights)


@catches("zero times infinity in two passes", "clipping.author_groups.AuthorClipFactors.__init__",
    "None if norms.isfinite().all() else ~norms.isfinite()", "None", engine="two_pass")  # fmt: skip
@pytest.mark.parametrize("engine", ALL_ENGINES)
def test_an_author_whose_activations_are_not_finite_contributes_zero(engine):
    """Zero times such an activation is not a number, whatever weight the loss has."""
    model, batch = tiny_gpt2(tied=False), make_batch()
    batch["input_ids"].clamp_(max=50)
    batch["labels"].clamp_(max=50)
    batch["input_ids"][batch["author"] == 3, 0] = 55
    with torch.no_grad():
        model.transformer.wte.weight[55] = math.inf
    check_only_author_3_is_left_out(engine, model, batch)


# --- what is trained --------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ALL_ENGINES)
def test_frozen_parameters_are_left_alone(engine):
    model = tiny_gpt2()
    for name, parameter in model.named_parameters():
        parameter.requires_grad = "h.1" in name
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    batch = make_batch()
    expected = reference.clipped_sum(model, as_arrays(batch), 0.1)
    ours, *_ = run_engine(engine, model, batch)
    assert (ours - expected).norm() < 1e-5 * expected.norm()
    for name, before in frozen.items():
        parameter = model.get_parameter(name)
        assert torch.equal(parameter, before) and getattr(parameter, "summed_grad", None) is None


@pytest.mark.parametrize("engine", ALL_ENGINES)
def test_what_the_loss_does_not_use_contributes_nothing(engine):
    model, batch = tiny_gpt2(), make_batch()
    expected, expected_norms, _ = run_engine(engine, model, batch)
    model.transformer.unused = nn.Linear(3, 3)
    ours, norms, _ = run_engine(engine, model, batch)
    assert torch.equal(norms, expected_norms) and torch.equal(ours[ours != 0], expected[expected != 0])


@pytest.mark.parametrize("engine", ALL_ENGINES)
def test_positions_that_all_samples_share(engine, monkeypatch):
    """GPT-2's own positions: the fast engines expand them; grad_sample needs separate ones, and refuses others."""
    model, batch = tiny_gpt2(), make_batch()
    expected, *_ = run_engine(engine, model, batch)
    if engine == "grad_sample":
        monkeypatch.setattr("author_dp.clipping.grad_sample.separate_positions", lambda model: [])
        with pytest.raises(UserError, match="wpe"):
            run_engine(engine, model, batch)
    else:
        (hook,) = separate_positions(model)
        ours, *_ = run_engine(engine, model, batch)
        hook.remove()
        assert (ours - expected).norm() < 1e-5 * expected.norm()


def test_norms_are_counted_in_their_bins(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=4)
    trainer.train()
    counts, edges = trainer.norms.histogram(), trainer.norms.edges
    clipped = sum(counts[i] for i in range(len(counts)) if i > 0 and (i == len(edges) or edges[i] > 1.0001))
    assert sum(counts) > 0 and clipped == sum(counts)  # C is 0.5, the norms of a new model are above 1
