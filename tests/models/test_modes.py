"""models/modes.py: frozen weights are cast once, compute the same, and are what they were afterwards."""

from collections import Counter

import pytest
import torch
from conftest import tiny_gpt2
from mutation import catches
from torch.utils._python_dispatch import TorchDispatchMode

from author_dp.models.modes import frozen_weights_cast

IDS = torch.arange(12).view(2, 6)


class Casts(TorchDispatchMode):
    """Count casts to bfloat16, by the shape of what is cast."""

    def __init__(self):
        super().__init__()
        self.shapes: Counter = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._to_copy.default and (kwargs or {}).get("dtype") == torch.bfloat16:
            self.shapes[tuple(args[0].shape)] += 1
        return func(*args, **(kwargs or {}))


def forwards(model, times: int = 3) -> list[torch.Tensor]:
    return [model(input_ids=IDS).logits for _ in range(times)]


def test_frozen_weights_are_cast_once_and_compute_the_same():
    model = tiny_gpt2(lora=True)
    weight = model.base_model.model.transformer.h[0].mlp.c_fc.weight
    before = dict(model.named_parameters())
    with torch.autocast("cpu", torch.bfloat16), Casts() as plain:
        expected = forwards(model)
    with torch.autocast("cpu", torch.bfloat16), Casts() as once, frozen_weights_cast(model):
        found = forwards(model)
    assert all(torch.equal(*pair) for pair in zip(found, expected))
    layers = len(model.base_model.model.transformer.h)
    assert plain.shapes[tuple(weight.shape)] == 3 * layers and once.shapes[tuple(weight.shape)] == layers
    assert all(parameter is before[name] for name, parameter in model.named_parameters())


def test_embeddings_and_trained_weights_stay():
    model = tiny_gpt2()
    model.transformer.wte.weight.requires_grad_(False)  # also the head's
    with torch.autocast("cpu", torch.bfloat16), frozen_weights_cast(model):
        assert model.lm_head.weight.dtype == torch.bfloat16 and model.transformer.wte.weight.dtype == torch.float32
        assert model.transformer.h[0].mlp.c_fc.weight.dtype == torch.float32
    assert model.lm_head.weight is model.transformer.wte.weight


@catches("frozen weights stay rounded", "models.modes.frozen_weights_cast", "finally:", "except ZeroDivisionError:")
def test_weights_return_after_an_error():
    model = tiny_gpt2(lora=True)
    with pytest.raises(RuntimeError), torch.autocast("cpu", torch.bfloat16), frozen_weights_cast(model):
        raise RuntimeError
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("autocast", [False, True])
def test_nothing_is_cast_without_autocast_or_where_layers_are_checkpointed(autocast):
    model = tiny_gpt2(lora=True)
    if autocast:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), frozen_weights_cast(model):
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
