"""A rule for each type of layer: from (layer, inputs, output gradients, authors) to what each parameter's gradient is made of.

Promise: a layer has a rule of its own only where its forward pass is known to be what the rule follows; a subclass may compute
anything. Inputs and output gradients are of shape (samples, tokens, features); a rule returns {parameter: contribution}. A small
layer without one is run once more for each sample (`general`), which follows whatever it computes. What has neither is left to
ghost.py, which takes its parameters author by author.

To support a further layer, write its rule here, name it in `rule_of`, and put its naive twin into tests/test_clipping_rules.py.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, vjp, vmap
from transformers.pytorch_utils import Conv1D

from author_dp.clipping.author_groups import AuthorIndex
from author_dp.clipping.grad_factors import EmbeddingGrad, GradFactors, MaterializedGrad, OuterProduct, materialize
from author_dp.models.quantization import BF16Conv1D, BF16Linear, is_plain_linear

SMALL_ELEMENTS = 2**17  # parameters of a layer whose per-sample gradients are formed by `general`


def matrix_grad(left: torch.Tensor, right: torch.Tensor, authors: AuthorIndex, most_explicit: int) -> GradFactors:
    """The gradient of a matrix, formed for each author where that is smaller than what it is made of: then it is also faster.

    So it is for LoRA's factors, and for any matrix where an author's tokens are many.

    Args:
        most_explicit: elements of what may be formed.
    """
    product = OuterProduct(left, right)
    elements = authors.count * left.shape[-1] * right.shape[-1]
    smaller = 4 * elements < sum(tensor.numel() * tensor.element_size() for tensor in product)
    return materialize(product, authors) if smaller and elements <= most_explicit else product


def linear(layer: nn.Linear, inputs: torch.Tensor, gradients: torch.Tensor, authors: AuthorIndex, most_explicit: int) -> dict:
    contributions = {layer.weight: matrix_grad(gradients, inputs, authors, most_explicit)}
    if layer.bias is not None:
        contributions[layer.bias] = MaterializedGrad(authors.sum(gradients.sum(1, dtype=torch.float32)))
    return contributions


def conv1d(layer: Conv1D, inputs: torch.Tensor, gradients: torch.Tensor, authors: AuthorIndex, most_explicit: int) -> dict:
    """Hugging Face's linear layer with weight (inputs, outputs)."""
    return {
        layer.weight: matrix_grad(inputs, gradients, authors, most_explicit),
        layer.bias: MaterializedGrad(authors.sum(gradients.sum(1, dtype=torch.float32))),
    }


def embedding(layer: nn.Embedding, ids: torch.Tensor, gradients: torch.Tensor, *_) -> dict:
    if layer.padding_idx is not None:
        gradients = gradients * (ids != layer.padding_idx)[:, :, None]
    return {layer.weight: EmbeddingGrad(ids, gradients)}


def layer_norm(layer: nn.LayerNorm, inputs: torch.Tensor, gradients: torch.Tensor, authors: AuthorIndex, *_) -> dict:
    normalized = F.layer_norm(inputs.float(), layer.normalized_shape, eps=layer.eps)
    contributions = {layer.weight: MaterializedGrad(authors.sum(normalized.mul_(gradients).sum(1)))}
    if layer.bias is not None:
        contributions[layer.bias] = MaterializedGrad(authors.sum(gradients.sum(1, dtype=torch.float32)))
    return contributions


def rms_norm(layer: Any, inputs: torch.Tensor, gradients: torch.Tensor, authors: AuthorIndex, *_) -> dict:
    normalized = F.rms_norm(inputs.float(), inputs.shape[-1:], eps=layer.variance_epsilon)
    return {layer.weight: MaterializedGrad(authors.sum(normalized.mul_(gradients).sum(1)))}


def vmap_rule(layer: nn.Module, inputs: list[torch.Tensor], gradients: torch.Tensor, authors: AuthorIndex) -> dict:
    """The gradients of a small layer's own parameters, whatever it computes: its own forward, once more, sample by sample (vmap).

    Args:
        inputs: its arguments, each (samples, ...); a sample's outputs must depend on that sample's inputs only.
        gradients: (samples, ...), at its output.
    """
    trained = {name: p.detach() for name, p in layer.named_parameters(recurse=False) if p.requires_grad}
    dtype = next(layer.parameters(recurse=False)).dtype  # autocast, which cast the inputs for the layer, is off here
    inputs = [value.to(dtype) if value.is_floating_point() else value for value in inputs]

    def of_sample(gradient: torch.Tensor, *rows: torch.Tensor) -> dict[str, torch.Tensor]:
        output, pull, *_ = vjp(lambda parameters: functional_call(layer, parameters, rows), trained)
        return pull(gradient.to(output.dtype))[0]

    found = vmap(of_sample)(gradients, *inputs)  # {name: (samples, ...)}
    return {layer.get_parameter(name): MaterializedGrad(authors.sum(gradient)) for name, gradient in found.items()}


def rule_for(layer: nn.Module) -> Callable | None:
    """Return the rule for exactly this type of layer, None if there is none: a subclass may compute anything."""
    if is_plain_linear(layer) or type(layer) is BF16Linear:
        return linear
    if isinstance(layer, nn.Embedding) and layer.max_norm is None and not layer.scale_grad_by_freq and not layer.sparse:
        return embedding
    if type(layer) is nn.LayerNorm and len(layer.normalized_shape) == 1 and layer.weight is not None:
        return layer_norm
    if type(layer).__name__ in ("LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm"):
        return rms_norm
    if type(layer) in (Conv1D, BF16Conv1D):
        return conv1d
    if (
        not any(True for _ in layer.children())
        and sum(p.numel() for p in layer.parameters() if p.requires_grad) <= SMALL_ELEMENTS
    ):
        return vmap_rule
    return None
