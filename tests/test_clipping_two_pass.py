"""clipping/two_pass.py: the same clipped sums as by book-keeping, of layers that are checkpointed, with nothing kept of them."""

import math
import weakref

import naive
import pytest
import torch
from conftest import COUNTS, as_arrays, flat, make_batch, make_trainer, tiny_gpt2, train, trainable
from families import close, make_model
from planting import find, with_edit
from test_clipping import select_authors
from test_clipping_ghost import per_author_by_autograd
from test_proof import OwnScale
from transformers import GPT2LMHeadModel

from author_dp.clipping import engine_class
from author_dp.clipping.ghost import GhostClipping
from author_dp.clipping.grad_factors import MaterializedGrad
from author_dp.clipping.two_pass import TwoPassClipping
from author_dp.errors import UserError
from author_dp.mechanism.losses import author_losses


def checkpointed(model, **options):
    model.activation_checkpointing_enable({"use_reentrant": False, **options})
    return model


def two_pass(model, batch, clip_norm: float = 0.1, *, keep: bool = True, settled: bool = True, weights=1.0, watch=None):
    """Flat clipped sum, norms and the engine; `keep`: whether small contributions may be kept."""
    engine = engine_class("ghost", checkpointed=True)(model, clip_norm)
    assert type(engine) is TwoPassClipping
    engine.store.max_kept *= keep
    if settled:
        engine.freeze_fallback(set())
    if watch is not None:
        watch(engine)
    for parameter in trainable(model).values():
        parameter.summed_grad = torch.zeros_like(parameter, requires_grad=False)
    try:
        norms = engine.backward(author_losses(engine.module, batch) * weights, batch["author"])
    finally:
        engine.close()
    return flat(parameter.summed_grad for parameter in trainable(model).values()), norms, engine


# --- the clipped sum ------------------------------------------------------------------------------------


CASES = [("gpt2", "tied"), ("gpt2", "untied"), ("llama", "lora"), ("opt", "tied"), ("neox", "untied"), ("qwen3", "tied")]


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_clipped_sum_equals_the_naive_one(family, kind):
    model, batch = make_model(family, kind).train(), make_batch()
    expected_norms = [flat(naive.author_gradient(model, samples)).norm().item() for samples in as_arrays(batch)]
    clip_norm = sorted(expected_norms)[3]
    expected = naive.clipped_sum(model, as_arrays(batch), clip_norm)
    for keep in (True, False):
        ours, norms, engine = two_pass(checkpointed(model), batch, clip_norm, keep=keep, settled=keep)
        assert norms.tolist() == pytest.approx(expected_norms, rel=1e-5) and close(ours, expected)
        assert not engine.fallback_params and not engine.store.kept_params


@pytest.mark.parametrize("counts", [[4, 1, 2, 4], [3]], ids=str)
def test_long_samples_of_a_narrow_model(counts):
    """The per-author gradients of its matrices are the cheaper way to the norm; only biases and the like are kept."""
    model, batch = checkpointed(make_model("llama", "tied")).train(), make_batch(counts, longest=100)
    expected = naive.clipped_sum(make_model("llama", "tied"), as_arrays(batch), 0.1)
    assert close(two_pass(model, batch)[0], expected) and close(two_pass(model, batch, keep=False)[0], expected)


@pytest.mark.parametrize(("family", "kind"), [("gpt2", "tied"), ("llama", "untied"), ("gpt2", "lora")])
def test_with_dropout_both_passes_drop_the_same(family, kind):
    model, batch = make_model(family, kind, dropout=0.3), make_batch()
    expected = per_author_by_autograd(model, batch, 0.1, seed=5)
    for keep in (True, False):
        torch.manual_seed(5)
        assert close(two_pass(checkpointed(model), batch, keep=keep)[0], expected)


def test_one_pass_is_enough_where_everything_kept_is_small():
    """As with LoRA, whose factors' gradients are small."""
    for keep, passes in ((True, 1), (False, 2)):
        model, batch, visits = checkpointed(make_model("llama", "lora")).train(), make_batch(longest=100), []

        def watch(engine, visits=visits):
            visit = engine._backward
            engine._backward = lambda *args, **options: visits.append(1) or visit(*args, **options)
            engine.store.max_kept *= 1000

        assert close(two_pass(model, batch, keep=keep, watch=watch)[0], two_pass(model, batch)[0])
        assert len(visits) == passes


# --- what is used otherwise -----------------------------------------------------------------------------


class Shifted(GPT2LMHeadModel):
    """It looks up other ids than it is given, so that the rows that the head's pass keeps are the wrong ones."""

    def forward(self, input_ids, **kwargs):
        return super().forward((input_ids + 7) % self.config.vocab_size, **kwargs)


def shared_block(model):
    model.transformer.h[1] = model.transformer.h[0]
    model.config.use_cache = False
    return model


def shifted(model):
    model.__class__ = Shifted
    return model


@pytest.mark.parametrize("change", [shared_block, shifted])
def test_what_is_used_twice_in_another_way_is_kept_whole(change):
    model, batch = change(tiny_gpt2()).train(), make_batch()
    expected = naive.clipped_sum(model, as_arrays(batch), 0.1)
    for settled in (False, True):
        ours, _, engine = two_pass(checkpointed(model), batch, settled=settled)
        assert engine.store.kept_params and close(ours, expected)


def test_one_authors_ordinary_gradients_are_let_go_as_they_come():
    model, batch = tiny_gpt2().train(), make_batch([3])
    model.transformer.ln_f = OwnScale(model.transformer.ln_f)
    apart = {model.transformer.ln_f.scale, model.transformer.h[0].mlp.c_fc.weight}
    expected = naive.clipped_sum(model, as_arrays(batch), 0.1)
    for keep in (True, False):
        ours, *_ = two_pass(checkpointed(model), batch, keep=keep, watch=lambda engine: engine.fallback_params.update(apart))
        assert close(ours, expected) and all(parameter.grad is None for parameter in model.parameters())


# --- authors whose gradients are not finite -------------------------------------------------------------


@pytest.mark.parametrize("poison", [math.nan, -math.inf, 1e30])
def test_an_author_whose_loss_is_not_finite_contributes_zero(poison):
    model, batch = checkpointed(tiny_gpt2()).train(), make_batch()
    weights = torch.ones(len(COUNTS))
    weights[3] = poison
    expected = naive.clipped_sum(tiny_gpt2(), as_arrays(select_authors(batch, [0, 1, 2, 4, 5])), 0.1)
    for keep in (True, False):
        ours, norms, _ = two_pass(model, batch, keep=keep, weights=weights)
        assert norms.isinf().tolist() == [False] * 3 + [True] + [False] * 2 and close(ours, expected)


def test_an_author_whose_activations_are_not_finite_contributes_zero():
    """Zero times such an activation is no number, whatever weight the loss has."""
    model, batch = checkpointed(tiny_gpt2(tied=False)).train(), make_batch()
    batch["input_ids"].clamp_(max=50)
    batch["labels"].clamp_(max=50)
    batch["input_ids"][batch["author"] == 3, 0] = 55
    with torch.no_grad():
        model.transformer.wte.weight[55] = math.inf
    others = [samples for author, samples in enumerate(as_arrays(batch)) if author != 3]
    expected = naive.clipped_sum(tiny_gpt2(tied=False), others, 0.1)
    for keep in (True, False):
        ours, norms, _ = two_pass(model, batch, keep=keep)
        assert norms.isinf().tolist() == [False] * 3 + [True] + [False] * 2 and close(ours, expected)


# --- both passes are of one function --------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_other_dropout_in_the_second_pass_ends_the_run(kind):
    model = checkpointed(make_model("gpt2", kind, dropout=0.1), preserve_rng_state=False).train()
    with pytest.raises(UserError, match=r"--activation_checkpointing: .*Leave it out"):
        two_pass(model, make_batch())


def test_random_numbers_of_the_models_own_end_the_run():
    model, generator = make_model("llama", "tied").train(), torch.Generator().manual_seed(0)
    inner = model.model.layers[0].mlp
    inner.register_forward_hook(lambda _, __, output: output * (torch.rand(output.shape, generator=generator) > 0.01))
    with pytest.raises(UserError, match="not replayed"):
        two_pass(checkpointed(model), make_batch())


@pytest.mark.parametrize("counts", [[1] * 6, [1, 2, 3, 1, 1, 5]])
def test_bfloat16_stays_below_the_clip_norm(counts):
    model, batch = checkpointed(make_model("gpt2", "tied")).train(), make_batch(counts)
    expected = naive.clipped_sum(make_model("gpt2", "tied"), as_arrays(batch), 0.1)
    with torch.autocast("cpu", torch.bfloat16):
        assert close(two_pass(model, batch)[0], expected, 0.05)
        for seed in range(5):
            alone, *_ = two_pass(model, make_batch([3], seed=seed, longest=15), 1e-3, keep=False)
            assert alone.norm() <= 1e-3 * (1 + 1e-6)


# --- what is kept, and in a run -------------------------------------------------------------------------


def test_nothing_of_a_layer_is_kept_but_what_is_small():
    model, batch = checkpointed(make_model("gpt2", "tied")).train(), make_batch([2] * 4, longest=16)
    alive, most = [], []

    def watch(engine):
        take = engine.store.add

        def taking(parameter, part, given):
            take(parameter, part, given)
            alive.extend(weakref.ref(tensor) for tensor in part if not isinstance(part, MaterializedGrad))
            most.append(sum(1 for tensor in alive if tensor() is not None))

        engine.store.add = taking

    two_pass(model, batch, watch=watch)
    assert len(alive) > 20 and max(most) <= 4  # a layer's input and output gradient, and their views


def test_a_run_that_checkpoints_takes_two_passes_and_its_update_is_the_naive_one(tmp_path, monkeypatch):
    passes = []
    visit = TwoPassClipping._backward
    monkeypatch.setattr(TwoPassClipping, "_backward", lambda self, *a, **o: passes.append(a[-1]) or visit(self, *a, **o))
    model = tiny_gpt2()
    before = flat(model.parameters()).clone()
    privacy = {"noise_multiplier": 0.0, "samples_per_author": 9}
    trainer = make_trainer(tmp_path, model, privacy=privacy, per_device_train_batch_size=2, gradient_accumulation_steps=3,
                           activation_checkpointing=True)  # fmt: skip
    assert passes.count(False) == 5 and not model.is_activation_checkpointing  # the proof's
    passes.clear()
    (batch,), _ = train(trainer)
    assert passes == [True, False] * len(batch.microbatches) and len(batch.microbatches) >= 3
    expected = naive.clipped_sum(tiny_gpt2(), as_arrays(make_batch()), 0.5) / 6
    assert close(before - flat(model.parameters()), expected, 1e-4)


def test_the_proof_at_the_start_is_of_the_engine_of_the_run(tmp_path, monkeypatch):
    take = find("author_dp.clipping.two_pass.TwoPassStore.add")
    bug = "self._clip.factors.mul_(1.01); add_clipped(part, "
    monkeypatch.setattr(take, "__code__", with_edit(take, "add_clipped(part, ", bug))
    make_trainer(tmp_path / "kept", tiny_gpt2())
    with pytest.raises(UserError, match=r"--clipping ghost: .* differ from the reference"):
        make_trainer(tmp_path / "out", tiny_gpt2(), activation_checkpointing=True)
    assert not (tmp_path / "out").exists()


def test_layers_that_are_not_checkpointed_are_kept_for():
    assert engine_class("ghost", checkpointed=False) is GhostClipping


def test_a_model_that_cannot_checkpoint_is_named(tmp_path):
    model = tiny_gpt2()
    model.supports_gradient_checkpointing = False
    with pytest.raises(UserError, match=r"--activation_checkpointing: this model does not support it\. Leave it out"):
        make_trainer(tmp_path / "out", model, activation_checkpointing=True)
    assert not (tmp_path / "out").exists()
