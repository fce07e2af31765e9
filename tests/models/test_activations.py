"""models/activations.py: the fused activation is the one it replaces, and only the same function is replaced."""

import pytest
import torch
from conftest import make_dataset, make_trainer, tiny_gpt2
from torch import nn
from transformers import GPT2LMHeadModel
from transformers.activations import ACT2FN, GELUTanh, NewGELUActivation

from author_dp.guards.model_check import verify_model
from author_dp.models.activations import fuse_activations
from author_dp.training import setup

SAME = ["gelu_new", "gelu_fast", "gelu_accurate", "gelu_python_tanh"]


def with_gradient(function, inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    inputs = inputs.clone().requires_grad_()
    outputs = function(inputs)
    return outputs.detach(), torch.autograd.grad(outputs.sum(), inputs)[0]


@pytest.mark.parametrize("name", SAME)
def test_the_fused_activation_is_the_one_it_replaces(name):
    before = ACT2FN[name]
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(before))
    fuse_activations(model)
    inputs = torch.linspace(-12, 12, 4_001, dtype=torch.float64)
    assert type(model[1][0]) is GELUTanh
    for found, expected in zip(with_gradient(model[1], inputs), with_gradient(before, inputs)):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-8)  # gelu_fast has ten digits of its constant
    assert model[1](inputs.requires_grad_()).grad_fn.name() == "GeluBackward0"


@pytest.mark.parametrize("name", sorted(set(ACT2FN) - {*SAME, "prelu", "xielu"}))
def test_every_other_activation_stays(name):
    layer = ACT2FN[name]
    model = nn.Sequential(layer)
    fuse_activations(model)
    assert model[0] is layer


@pytest.mark.parametrize("hook", ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"])
def test_one_with_a_hook_stays(hook):
    layer = ACT2FN["gelu_new"]
    getattr(layer, hook)(lambda *_: None)
    model = nn.Sequential(layer)
    fuse_activations(model)
    assert model[0] is layer


def activations(model: nn.Module) -> set[type]:
    return {type(block.mlp.act) for block in model.transformer.h}


def test_a_trainer_proves_and_trains_with_it_and_saves_what_was_there(tmp_path, monkeypatch):
    proven = []
    monkeypatch.setattr(
        setup, "verify_model", lambda model, *rest: proven.append(activations(model)) or verify_model(model, *rest)
    )
    model = tiny_gpt2()
    fuse_activations(model)
    trainer = make_trainer(tmp_path, model, make_dataset([1, 2, 3]))
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    saved = GPT2LMHeadModel.from_pretrained(tmp_path / "saved")
    assert proven == [{GELUTanh}] and activations(trainer.model) == {GELUTanh}
    assert trainer.model.config.activation_function == "gelu_new" and activations(saved) == {NewGELUActivation}
    ids = torch.arange(12).view(2, 6)
    torch.testing.assert_close(saved(ids).logits, trainer.model.eval()(ids).logits, rtol=0, atol=1e-5)
