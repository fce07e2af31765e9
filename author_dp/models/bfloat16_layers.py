"""Layers whose frozen weights are stored in bfloat16, and which compute in the dtype of their input."""

from typing import Optional

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D


class UpcastMatmul(torch.autograd.Function):
    """Compute x W^T for a frozen W of a lower precision than x.

    W is upcast in the forward pass and again in the backward pass. Between them, only W itself is kept.
    """

    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(weight)  # (outputs, inputs)
        return x @ weight.to(x.dtype).T

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        (weight,) = ctx.saved_tensors
        return gradient @ weight.to(gradient.dtype), None


def upcast_linear(x: torch.Tensor, weight: torch.Tensor, bias: Optional[torch.Tensor]) -> torch.Tensor:
    """Return x W^T + b in x's dtype; `weight` is (outputs, inputs)."""
    product: torch.Tensor = UpcastMatmul.apply(x, weight)
    return product if bias is None else product + bias


class BF16Linear(nn.Linear):
    """Linear layer with a frozen bfloat16 matrix that computes in the dtype of its input."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.is_autocast_enabled(x.device.type):
            return super().forward(x)
        return upcast_linear(x, self.weight, self.bias)


class BF16Conv1D(Conv1D):
    """GPT-2's linear layer, whose matrix is (inputs, outputs), in the same way."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.is_autocast_enabled(x.device.type):
            return super().forward(x)
        return upcast_linear(x, self.weight.T, self.bias)


class BF16Embedding(nn.Embedding):
    """Embedding with a frozen bfloat16 matrix and float32 outputs."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return super().forward(ids).float()


def is_plain_linear(layer: nn.Module) -> bool:
    """Return whether a layer computes x W^T + b and nothing else; a subclass may compute anything."""
    return type(layer).forward is nn.Linear.forward or type(layer).__name__ == "FalconLinear"


def bf16_class_for(layer: nn.Module) -> Optional[type]:
    """Return the class that runs a layer with a bfloat16 matrix.

    None where the layer may compute anything else.
    """
    if is_plain_linear(layer):
        return BF16Linear
    if type(layer) is Conv1D:
        return BF16Conv1D
    return BF16Embedding if type(layer) is nn.Embedding else None
