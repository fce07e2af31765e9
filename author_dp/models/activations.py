"""GPT-2's activation as one operation instead of eight, each of which reads and writes memory and keeps its result.

Promise: nothing here is about privacy. The function is the same one, to rounding; weights, configuration and what is saved
stay as they are. The proof at the start and every clipped gradient see the model as it is trained: with what is put here.

References:
    [1] Hendrycks & Gimpel 2016, Gaussian Error Linear Units, arXiv 1606.08415, section 2 (the approximation by tanh)
"""

from torch import nn
from transformers.activations import AccurateGELUActivation, FastGELUActivation, GELUTanh, NewGELUActivation

# x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2, written out in Python: of GPT-2, GPT-J, GPT-Neo, CodeGen, Phi.
UNFUSED_GELUS = (AccurateGELUActivation, FastGELUActivation, NewGELUActivation)


def fuse_activations(model: nn.Module) -> None:
    """Replace these activations, in place, by transformers' own in one operation; leave all others, and any with hooks."""
    for module in list(model.modules()):
        for name, layer in module.named_children():
            written_out = type(layer) in UNFUSED_GELUS or (type(layer) is GELUTanh and layer.act == layer._gelu_tanh_python)
            hooked = any(value for kind, value in vars(layer).items() if kind.endswith("_hooks"))  # somebody listens there
            if written_out and not hooked:
                setattr(module, name, GELUTanh())
