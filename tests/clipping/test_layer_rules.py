"""clipping/layer_rules.py: each rule against autograd, and layers without a rule."""

import pytest
import reference
import torch
from conftest import as_arrays, clipped_sum, flat, make_batch, tiny_gpt2
from families import close, llama, qwen3
from torch import nn
from transformers.pytorch_utils import Conv1D

from author_dp.clipping.ghost import GhostClipping

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
    check(model, inputs)


class Scaled(nn.Linear):
    """Looks like a layer that has a rule, but is not."""

    def forward(self, x):
        return 2 * super().forward(x)


class OwnParameter(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(6))

    def forward(self, x):
        return torch.sin(x * self.weight) * (1 + self.weight)


class DataDependent(OwnParameter):
    def forward(self, x):
        return super().forward(x) if x.sum().item() > -1e9 else x


def check(model: nn.Module, inputs: list[torch.Tensor], authors: int = 3) -> GhostClipping:
    """Compare an engine on `model`, called with samples, to autograd on one sample at a time; each is an author's."""
    expected = []
    for sample in range(authors):
        (loss,) = model(*(x[sample : sample + 1] for x in inputs))
        found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
        expected.append(flat(torch.zeros_like(p) if g is None else g for p, g in zip(model.parameters(), found)))
    engine = GhostClipping(model, 2.0)
    for parameter in model.parameters():
        parameter.summed_grad = torch.zeros_like(parameter)
    norms = engine.backward(engine.module(*inputs), torch.arange(authors))
    assert norms.tolist() == pytest.approx([gradient.norm().item() for gradient in expected], rel=1e-4)
    clipped = sum(gradient * min(1.0, 2.0 / gradient.norm().item()) for gradient in expected)
    assert close(flat(p.summed_grad for p in model.parameters()), clipped, 1e-4)
    engine.close()
    return engine


class Uses(nn.Module):
    """Use a layer's weight without calling it, in place, or of samples and tokens joined."""

    def __init__(self, use):
        super().__init__()
        self.layer, self.use = nn.Linear(6, 6), use

    def forward(self, x):
        return self.use(self.layer, x).square().flatten(1).sum(1)


OTHER_LAYERS = {
    "scaled": (lambda: Scaled(6, 5), (3, 4, 6), False),
    "own parameter": (lambda: OwnParameter(), (3, 4, 6), False),
    "convolution": (lambda: nn.Conv1d(4, 4, 3, padding=1, groups=4), (3, 4, 6), False),
    "norm over two dimensions": (lambda: nn.LayerNorm((4, 6)), (3, 4, 6), False),
    "weight norm": (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(6, 6)), (3, 4, 6), True),
    "looks ahead of vmap": (lambda: DataDependent(), (3, 4, 6), True),
    "weight used directly": (lambda: Uses(lambda layer, x: x @ layer.weight), (3, 4, 6), True),
    "changed in place": (lambda: Uses(lambda layer, x: layer(x).mul_(3)), (3, 4, 6), False),
    "joined": (lambda: Uses(lambda layer, x: layer(x.flatten(0, 1)).unflatten(0, x.shape[:2])), (3, 4, 6), False),
    "as many tokens as samples": (lambda: Uses(lambda layer, x: layer(x[0] * 0 + 1) * x), (3, 3, 6), None),
}


@pytest.mark.parametrize("name", OTHER_LAYERS)
def test_a_layer_without_a_rule_is_followed_whatever_it_computes(name):
    """By its own forward, once more for each sample, or by a backward for each author."""
    torch.manual_seed(1)
    make, shape, uses_fallback = OTHER_LAYERS[name]
    layer = make()
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    engine = check(layer if isinstance(layer, Uses) else Calls(layer), [torch.randn(shape)])
    assert uses_fallback is None or bool(engine.fallback_params) == uses_fallback


class Shift(nn.Module):
    """Its per-sample gradient is the output gradient itself, which is also that of the layer before it."""

    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(1, 2, 6))

    def forward(self, x):
        return x + self.shift


class ShiftTwice(nn.Module):
    def __init__(self):
        super().__init__()
        self.shift, self.layer = Shift(), nn.Linear(6, 6)

    def forward(self, x):
        return self.shift(self.layer(self.shift(x))).square().flatten(1).sum(1)


def test_adding_up_the_calls_of_a_layer_changes_no_gradient_of_another():
    torch.manual_seed(1)
    assert not check(ShiftTwice(), [torch.randn(3, 2, 6)]).fallback_params  # so few tokens that the matrix is not formed


def test_two_matrices_that_share_a_weight_count_once():
    model, batch = tiny_gpt2(), make_batch()
    model.transformer.h[1].mlp.c_fc.weight = model.transformer.h[0].mlp.c_fc.weight
    ours, _ = clipped_sum(model, batch, 0.1, "ghost")
    assert close(ours, reference.clipped_sum(model, as_arrays(batch), 0.1))
