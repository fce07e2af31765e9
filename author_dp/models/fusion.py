"""Fuse operations of GPT-2's activation and of LoRA's layers, to save memory and time.

transformers writes the activation as eight operations in Python, each of which reads and writes memory and keeps its result for
the backward pass. The fused function is the same, up to rounding. peft scales the wide output of an adapter, and casts the input
of a layer twice under autocast; here the narrow product is scaled, and one cast serves both. Weights, configuration and saved
files do not change. Model check and clipping see the model as it is trained, with fused operations.

References:
    [1] Hendrycks & Gimpel 2016, Gaussian Error Linear Units, arXiv 1606.08415, section 2 (the approximation by tanh)
    [2] Hu et al. 2021, LoRA: Low-Rank Adaptation of Large Language Models, arXiv 2106.09685, section 4.1
"""

from typing import Any

import torch
from peft.tuners import lora
from torch import nn
from transformers.activations import AccurateGELUActivation, FastGELUActivation, GELUTanh, NewGELUActivation

# x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2 in several operations: GPT-2, GPT-J, GPT-Neo, CodeGen, Phi.
UNFUSED_GELUS = (AccurateGELUActivation, FastGELUActivation, NewGELUActivation)


class FusedLora(lora.Linear):
    """peft's LoRA layer, which computes W x + B (s A x) where peft computes W x + s (B A x), s being the scale."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        adapters = [name for name in self.active_adapters if name in self.lora_A]
        if args or kwargs or self.disable_adapters or self.merged or len(adapters) != 1 or adapters[0] in self.lora_variant:
            return super().forward(x, *args, **kwargs)
        device, (name,) = x.device.type, adapters
        x = x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) and x.dtype == torch.float32 else x
        result = self.base_layer(x)
        if not torch.is_autocast_enabled(device):
            weight: Any = self.lora_A[name].weight
            x = x.to(weight.dtype)
        update = self.lora_B[name](self.lora_A[name](self.lora_dropout[name](x)) * self.scaling[name])
        return (result + update).to(result.dtype)


def fuse_operations(model: nn.Module) -> None:
    """Replace unfused activations and LoRA layers of a model, in place; leave all others, and activations with hooks."""
    for module in list(model.modules()):
        if type(module) is lora.Linear and not any(module.lora_bias.values()):
            module.__class__ = FusedLora
        for name, layer in module.named_children():
            is_unfused = type(layer) in UNFUSED_GELUS or (type(layer) is GELUTanh and layer.act == layer._gelu_tanh_python)
            has_hooks = any(value for attribute, value in vars(layer).items() if attribute.endswith("_hooks"))
            if is_unfused and not has_hooks:
                setattr(module, name, GELUTanh())
