"""clipping/rules.py: each rule against its naive twin, and what has no rule."""

import pytest
import torch
from conftest import flat, tiny_gpt2
from families import close, llama, qwen3
from torch import nn
from transformers.pytorch_utils import Conv1D

from author_dp.clipping.ghost import GhostClipping
from author_dp.errors import UserError

LAYERS = {
    "linear": (lambda: nn.Linear(6, 5), (3, 4, 6)),
    "linear without bias": (lambda: nn.Linear(6, 5, bias=False), (3, 4, 6)),
    "linear on more dimensions": (lambda: nn.Linear(6, 5), (3, 2, 4, 6)),
    "Conv1D": (lambda: Conv1D(5, 6), (3, 4, 6)),
    "LayerNorm": (lambda: nn.LayerNorm(6), (3, 4, 6)),
    "LayerNorm without bias": (lambda: nn.LayerNorm(6, bias=False), (3, 4, 6)),
    "RMSNorm": (lambda: llama(True, 0.0).model.norm, (3, 4, 16)),
    "RMSNorm of heads": (lambda: qwen3(True, 0.0).model.layers[0].self_attn.q_norm, (3, 4, 2, 8)),
    "Embedding": (lambda: nn.Embedding(7, 5), None),
    "Embedding with padding": (lambda: nn.Embedding(7, 5, padding_idx=2), None),
}


class Calls(nn.Module):
    """Square what a layer makes of each of several inputs."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, *inputs):
        return sum(self.layer(x).square().flatten(1).sum(1) for x in inputs)


@pytest.mark.parametrize("calls", [1, 2])
@pytest.mark.parametrize("name", LAYERS)
def test_each_rule_equals_autograd_on_one_sample(name, calls):
    """Called once, and twice with other numbers of tokens: the gradients of the calls add up before the norm."""
    torch.manual_seed(1)
    make, shape = LAYERS[name]
    model = Calls(make())
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    inputs = [torch.randn(shape) if shape else torch.randint(7, (3, 9)) for _ in range(calls)]
    inputs[-1] = inputs[-1].repeat(1, 30, *[1] * (inputs[-1].dim() - 2)) if calls > 1 else inputs[-1]
    expected = []
    for sample in range(3):
        (loss,) = model(*(x[sample : sample + 1] for x in inputs))
        expected.append(flat(torch.autograd.grad(loss, list(model.parameters()))))
    engine = GhostClipping(model, 2.0)
    for parameter in model.parameters():
        parameter.summed_grad = torch.zeros_like(parameter)
    norms = engine.backward(engine.module(*inputs), torch.arange(3))
    assert norms.tolist() == pytest.approx([gradient.norm().item() for gradient in expected], rel=1e-4)
    clipped = sum(gradient * min(1.0, 2.0 / gradient.norm().item()) for gradient in expected)
    assert close(flat(p.summed_grad for p in model.parameters()), clipped, 1e-4)


def refused(layer: nn.Module) -> nn.Module:
    model = tiny_gpt2()
    model.transformer.extra = layer
    return model


class Scaled(nn.Linear):
    """Looks like a layer that has a rule, but is not."""

    def forward(self, x):
        return 2 * super().forward(x)


class OwnParameter(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))


@pytest.mark.parametrize(
    "layer",
    [
        Scaled(3, 3), OwnParameter(), nn.Conv1d(3, 3, 1), nn.Embedding(4, 3, max_norm=1.0), nn.LayerNorm((2, 3)),
        nn.Embedding(4, 3, scale_grad_by_freq=True), nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)),
    ],
    ids=lambda layer: type(layer).__name__,
)  # fmt: skip
def test_a_trainable_layer_without_a_rule_is_refused_by_name(layer):
    with pytest.raises(UserError, match=r"transformer\.extra.*--clipping grad_sample"):
        GhostClipping(refused(layer), 0.1)


def test_a_frozen_layer_needs_no_rule():
    GhostClipping(refused(Scaled(3, 3).requires_grad_(False)), 0.1)


def test_two_matrices_that_share_a_weight_are_refused():
    model = tiny_gpt2()
    model.transformer.h[1].mlp.c_fc.weight = model.transformer.h[0].mlp.c_fc.weight
    with pytest.raises(UserError, match=r"h\.1\.mlp\.c_fc"):
        GhostClipping(model, 0.1)
