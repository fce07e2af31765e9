"""Count the parameters of a model, and the memory of its weights, also where they are stored in 4 bits."""

from typing import Any

from peft import PeftModel
from torch import nn

from author_dp.models.quantization import quant_scales


def num_elements(parameter: Any) -> int:
    """Return the number of elements of a parameter; in 4 bits, each stored byte holds two."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else state.shape.numel()


def model_sizes(model: nn.Module) -> tuple[int, int]:
    """Return the numbers of trainable and of all parameters."""
    sizes = [(num_elements(parameter), parameter.requires_grad) for parameter in model.parameters()]
    return sum(size for size, is_trainable in sizes if is_trainable), sum(size for size, _ in sizes)


def weight_bytes(model: nn.Module) -> int:
    """Return the memory of all weights in bytes, including quantization scales."""
    return sum(t.numel() * t.element_size() for p in model.parameters() for t in (p, *quant_scales(p)))


def result_bytes(model: nn.Module) -> int:
    """Return the size of the saved weights, about: of an adapter's trained parameters, or of all."""
    is_adapter = isinstance(model, PeftModel)
    sizes = (p.numel() * p.element_size() for p in model.parameters() if p.requires_grad or not is_adapter)
    return sum(sizes)
