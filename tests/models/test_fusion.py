"""models/fusion.py: a fused operation computes what it replaces, and only the same function is replaced."""

import copy

import pytest
import torch
from conftest import make_dataset, make_trainer, tiny_gpt2
from mutation import catches
from peft import LoraConfig
from torch import nn
from transformers import GPT2LMHeadModel
from transformers.activations import ACT2FN, GELUTanh, NewGELUActivation

from author_dp.guards.model_check import verify_model
from author_dp.models.fusion import FusedLora, fuse_operations
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
    fuse_operations(model)
    inputs = torch.linspace(-12, 12, 4_001, dtype=torch.float64)
    assert type(model[1][0]) is GELUTanh
    for found, expected in zip(with_gradient(model[1], inputs), with_gradient(before, inputs)):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-8)  # gelu_fast has ten digits of its constant
    assert model[1](inputs.requires_grad_()).grad_fn.name() == "GeluBackward0"


@pytest.mark.parametrize("name", sorted(set(ACT2FN) - {*SAME, "prelu", "xielu"}))
def test_every_other_activation_stays(name):
    layer = ACT2FN[name]
    model = nn.Sequential(layer)
    fuse_operations(model)
    assert model[0] is layer


@pytest.mark.parametrize("hook", ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"])
def test_one_with_a_hook_stays(hook):
    layer = ACT2FN["gelu_new"]
    getattr(layer, hook)(lambda *_: None)
    model = nn.Sequential(layer)
    fuse_operations(model)
    assert model[0] is layer


def activations(model: nn.Module) -> set[type]:
    return {type(block.mlp.act) for block in model.transformer.h}


def test_a_trainer_proves_and_trains_with_it_and_saves_what_was_there(tmp_path, monkeypatch):
    proven = []
    monkeypatch.setattr(
        setup, "verify_model", lambda model, *rest: proven.append(activations(model)) or verify_model(model, *rest)
    )
    model = tiny_gpt2()
    fuse_operations(model)
    trainer = make_trainer(tmp_path, model, make_dataset([1, 2, 3]))
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    saved = GPT2LMHeadModel.from_pretrained(tmp_path / "saved")
    assert proven == [{GELUTanh}] and activations(trainer.model) == {GELUTanh}
    assert trainer.model.config.activation_function == "gelu_new" and activations(saved) == {NewGELUActivation}
    ids = torch.arange(12).view(2, 6)
    torch.testing.assert_close(saved(ids).logits, trainer.model.eval()(ids).logits, rtol=0, atol=1e-5)


# --- LoRA -----------------------------------------------------------------------------------------------


def lora_pair(**options) -> tuple[nn.Module, nn.Module]:
    """Return a model with adapters that are not zero, as peft computes it, and fused."""
    plain = tiny_gpt2(lora=True, **options)
    for name, parameter in plain.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.1)
    fuse_operations(fused := copy.deepcopy(plain))
    assert any(type(layer) is FusedLora for layer in fused.modules())
    return plain, fused


def outputs_and_gradients(model: nn.Module, bf16: bool = False) -> list[torch.Tensor]:
    """Return the logits, and the gradients of the adapters."""
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        logits = model(input_ids=torch.arange(12).view(2, 6)).logits.float()
    logits.square().sum().backward()
    return [logits.detach(), *(p.grad for p in model.parameters() if p.requires_grad)]


@catches("an adapter without its scale", "models.fusion.FusedLora.forward", " * self.scaling[name]", "", dropout=0.0, bf16=False)
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_fused_adapter_computes_what_pefts_does(dropout, bf16):
    plain, fused = lora_pair(dropout=dropout)
    for layer in [*plain.modules(), *fused.modules()]:
        if isinstance(layer, nn.Dropout):
            layer.train()
    for found, expected in zip(outputs_and_gradients(fused, bf16), outputs_and_gradients(plain, bf16)):
        assert (found - expected).norm() <= (0.05 if bf16 else 1e-6) * expected.norm()


def test_other_uses_of_a_fused_adapter_are_pefts(tmp_path):
    plain, fused = lora_pair()
    ids = torch.arange(12).view(2, 6)
    with fused.disable_adapter(), plain.disable_adapter():
        assert torch.equal(fused(ids).logits, plain(ids).logits)
    for model in (plain, fused):
        model.add_adapter("other", LoraConfig(r=2, fan_in_fan_out=True, init_lora_weights=True))
        model.base_model.set_adapter(["default", "other"])
    assert torch.allclose(fused(ids).logits, plain(ids).logits, atol=1e-6)
    merged = [model.merge_and_unload(adapter_names=["default"])(ids).logits for model in (plain, fused)]
    assert torch.allclose(*merged, atol=1e-6)
