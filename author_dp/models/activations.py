"""Fuse GPT-2's activation into one operation, to save memory and time.

transformers writes it as eight operations in Python, each of which reads and writes memory and keeps its result for the backward
pass. The fused function is the same, up to rounding. Weights, configuration and saved files do not change. Model check and
clipping see the model as it is trained, with fused activations.

References:
    [1] Hendrycks & Gimpel 2016, Gaussian Error Linear Units, arXiv 1606.08415, section 2 (the approximation by tanh)
"""

from torch import nn
from transformers.activations import AccurateGELUActivation, FastGELUActivation, GELUTanh, NewGELUActivation

# x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2 in several operations: GPT-2, GPT-J, GPT-Neo, CodeGen, Phi.
UNFUSED_GELUS = (AccurateGELUActivation, FastGELUActivation, NewGELUActivation)


def fuse_activations(model: nn.Module) -> None:
    """Replace unfused activations of a model, in place; leave all others, and any with hooks."""
    for module in list(model.modules()):
        for name, layer in module.named_children():
            is_unfused = type(layer) in UNFUSED_GELUS or (type(layer) is GELUTanh and layer.act == layer._gelu_tanh_python)
            has_hooks = any(value for attribute, value in vars(layer).items() if attribute.endswith("_hooks"))
            if is_unfused and not has_hooks:
                setattr(module, name, GELUTanh())
