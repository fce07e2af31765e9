"""clipping/two_pass.py: what is kept, tied parameters used otherwise, and passes that differ."""

import weakref

import pytest
import reference
import torch
from conftest import as_arrays, flat, make_batch, make_trainer, tiny_gpt2, train
from families import TWO_PASS, close, make_model, run_engine
from mutation import catches
from planting import find, with_edit
from test_model_check import OwnScale
from transformers import GPT2LMHeadModel

from author_dp.clipping import engine_class
from author_dp.clipping.ghost import GhostClipping
from author_dp.clipping.grad_factors import MaterializedGrad
from author_dp.clipping.two_pass import TwoPassClipping
from author_dp.errors import UserError

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


@catches("the rows of other ids", "clipping.two_pass.TwoPassStore._handle_tied",
    "or not same_ids(head[0], grad.ids)", "", change=shifted)  # fmt: skip
@catches("the first of two calls alone", "clipping.two_pass.TwoPassStore._handle_tied", "self.kept_params.add(parameter)",
    "pass", change=shared_block)  # fmt: skip
@pytest.mark.parametrize("change", [shared_block, shifted])
def test_what_is_used_twice_in_another_way_is_kept_whole(change):
    model, batch = change(tiny_gpt2()).train(), make_batch()
    expected = reference.clipped_sum(model, as_arrays(batch), 0.1)
    for engine in TWO_PASS:
        ours, _, engine = run_engine(engine, model, batch)
        assert engine.store.kept_params and close(ours, expected)


def test_one_authors_ordinary_gradients_are_let_go_as_they_come():
    model, batch = tiny_gpt2().train(), make_batch([3])
    model.transformer.ln_f = OwnScale(model.transformer.ln_f)
    fallback = {model.transformer.ln_f.scale, model.transformer.h[0].mlp.c_fc.weight}
    expected = reference.clipped_sum(model, as_arrays(batch), 0.1)
    for engine in TWO_PASS:
        ours, *_ = run_engine(engine, model, batch, prepare=lambda engine: engine.freeze_fallback(fallback))
        assert close(ours, expected) and all(parameter.grad is None for parameter in model.parameters())


# --- both passes are of one function --------------------------------------------------------------------


@catches("a second pass of other gradients that nobody notices", "clipping.two_pass.TwoPassStore.sum_pass",
    "not self._replay.is_same()", "False", kind="tied")  # fmt: skip
@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_other_dropout_in_the_second_pass_ends_the_run(kind):
    model = make_model("gpt2", kind, dropout=0.1)
    model.activation_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
    with pytest.raises(UserError, match=r"--activation_checkpointing: .*Leave it out"):
        run_engine("two_pass", model, make_batch())


def test_random_numbers_of_the_models_own_end_the_run():
    model, generator = make_model("llama", "tied"), torch.Generator().manual_seed(0)
    inner = model.model.layers[0].mlp
    inner.register_forward_hook(lambda _, __, output: output * (torch.rand(output.shape, generator=generator) > 0.01))
    with pytest.raises(UserError, match="not replayed"):
        run_engine("two_pass", model, make_batch())


# --- what is kept, and in a run -------------------------------------------------------------------------


def test_nothing_of_a_layer_is_kept_but_what_is_small():
    seen, alive = [], []

    def prepare(engine):
        add = engine.store.add

        def watched(parameter, grad, input_ids):
            add(parameter, grad, input_ids)
            seen.extend(weakref.ref(tensor) for tensor in grad if not isinstance(grad, MaterializedGrad))
            alive.append(sum(1 for tensor in seen if tensor() is not None))

        engine.store.add = watched

    run_engine("two_pass", make_model("gpt2", "tied"), make_batch([2] * 4, longest=16), prepare=prepare)
    assert len(seen) > 20 and max(alive) <= 4  # a layer's input and output gradient, and their views


def test_one_pass_is_enough_where_everything_kept_is_small():
    """As with LoRA, whose factors' gradients are small."""
    for engine, passes in zip(TWO_PASS, (1, 2)):
        model, batch, calls = make_model("llama", "lora"), make_batch(longest=100), []

        def prepare(engine, calls=calls):
            backward = engine._backward
            engine._backward = lambda *args: calls.append(1) or backward(*args)
            engine.store.max_kept *= 1000

        assert close(run_engine(engine, model, batch, prepare=prepare)[0], run_engine("two_pass", model, batch)[0])
        assert len(calls) == passes


def test_a_run_that_checkpoints_takes_two_passes_and_its_update_is_the_reference_one(tmp_path, monkeypatch):
    passes = []
    backward = TwoPassClipping._backward
    monkeypatch.setattr(TwoPassClipping, "_backward", lambda self, *args: passes.append(args[-1]) or backward(self, *args))
    model = tiny_gpt2()
    before = flat(model.parameters()).clone()
    privacy = {"noise_multiplier": 0.0, "samples_per_author": 9}
    trainer = make_trainer(tmp_path, model, privacy=privacy, per_device_train_batch_size=2, gradient_accumulation_steps=3,
                           activation_checkpointing=True)  # fmt: skip
    assert passes.count(False) == 8 and not model.is_activation_checkpointing  # the proof's
    passes.clear()
    (batch,), _ = train(trainer)
    assert passes == [True, False] * len(batch.microbatches) and len(batch.microbatches) >= 3
    expected = reference.clipped_sum(tiny_gpt2(), as_arrays(make_batch()), 0.5) / 6
    assert close(before - flat(model.parameters()), expected, 1e-4)


def test_the_proof_at_the_start_is_of_the_engine_of_the_run(tmp_path, monkeypatch):
    add, bug = (
        find("author_dp.clipping.two_pass.TwoPassStore.add"),
        "self._clip.factors.mul_(1.01); add_clipped_grad_factors(grad, ",
    )
    monkeypatch.setattr(add, "__code__", with_edit(add, "add_clipped_grad_factors(grad, ", bug))
    make_trainer(tmp_path / "kept", tiny_gpt2())
    with pytest.raises(UserError, match=r"--clipping ghost: .* differ from the reference"):
        make_trainer(tmp_path / "out", tiny_gpt2(), activation_checkpointing=True)
    assert not (tmp_path / "out").exists()


def test_two_passes_are_for_checkpointed_layers():
    assert engine_class("ghost", checkpointed=True) is TwoPassClipping
    assert engine_class("ghost", checkpointed=False) is GhostClipping


def test_a_model_that_cannot_checkpoint_is_named(tmp_path):
    model = tiny_gpt2()
    model.supports_gradient_checkpointing = False
    with pytest.raises(UserError, match=r"--activation_checkpointing: this model does not support it\. Leave it out"):
        make_trainer(tmp_path / "out", model, activation_checkpointing=True)
    assert not (tmp_path / "out").exists()
