"""A rule for each type of layer: from inputs and output gradients to the factors of each parameter's gradient.

Guarantees: a layer has a rule of its own only where its forward pass is known to be what the rule follows; a subclass may compute
anything.

A rule takes inputs and output gradients of shape (samples, tokens, features), and returns {name of a parameter: factors}. A small
layer without a rule of its own is called once more for each sample (`vmap_rule`), which follows whatever it computes. Parameters
of other layers are left to `fallback.py`.

To support a further layer, write its rule here, return it in `rule_for`, and add the layer to
tests/clipping/test_layer_rules.py, which compares it with autograd.
What a model family computes outside its layers' types is listed below.
"""

import re
from collections import defaultdict
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, vjp, vmap
from transformers.pytorch_utils import Conv1D

from author_dp.clipping.author_groups import AuthorIndex
from author_dp.clipping.grad_factors import EmbeddingGrad, GradFactors, MaterializedGrad, OuterProduct, materialize_grad_factors
from author_dp.models.bfloat16_layers import BF16Conv1D, BF16Linear, is_plain_linear

SMALL_ELEMENTS = 2**17  # parameters of a layer whose per-sample gradients are formed by `vmap_rule`

# Quirks of model families.
RMS_NORMS = {"LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm"}  # x / rms(x) * weight, nothing else
EXPERT_LAYERS = r"experts\.\d+\."  # experts see only some tokens, in an order of their own
DORA_MAGNITUDE, DORA_BASE = "lora_magnitude_vector", "base_layer"  # behind its base layer, DoRA subtracts the bias once more


class LayerRule(NamedTuple):
    """The rule of a layer, and its trained parameters."""

    rule: Callable
    params: dict[str, Any]  # by name; under FSDP the layer holds other tensors while it runs


def assign_rules(model: nn.Module) -> tuple[dict[nn.Module, LayerRule], set[Any], set[Any]]:
    """Return the layers with rules, the parameters that no rule follows, and those that several layers use."""
    uses: dict[Any, list[tuple[str, nn.Module]]] = defaultdict(list)
    for name, layer in model.named_modules():
        for parameter in layer.parameters(recurse=False):
            if parameter.requires_grad:
                uses[parameter].append((name, layer))
    magnitudes = [name for name, module in model.named_modules() if name.endswith(DORA_MAGNITUDE) and any(module.children())]
    bases = [re.escape(name).replace(DORA_MAGNITUDE, DORA_BASE) for name in magnitudes]
    excluded = re.compile("|".join([EXPERT_LAYERS, *bases]))
    layers: dict[nn.Module, LayerRule] = {}
    without_rule = set()
    for parameter, layers_of in uses.items():
        # A head may hold its layer's bias once more, under a name of its own.
        named = [(n, layer) for n, layer in layers_of if not any(other.startswith(f"{n}.") for other, _ in layers_of)]
        rules = {layer: rule_for(layer) for _, layer in named}
        kinds = set(rules.values())
        add_up = None not in kinds and (len(named) == 1 or kinds <= MATRIX_RULES)
        if not add_up or any(excluded.search(f"{name}.") for name, _ in named):
            without_rule.add(parameter)
        layers |= {layer: LayerRule(rule, trained_params(layer)) for layer, rule in rules.items() if rule is not None}
    return layers, without_rule, {parameter for parameter, layers_of in uses.items() if len(layers_of) > 1}


def trained_params(layer: nn.Module) -> dict[str, Any]:
    """Return a layer's trainable parameters by name, without those of its children."""
    return {name: p for name, p in layer.named_parameters(recurse=False) if p.requires_grad}


def rule_for(layer: nn.Module) -> Callable | None:
    """Return the rule for exactly this type of layer; None if there is none."""
    if is_plain_linear(layer) or type(layer) is BF16Linear:
        return linear
    if isinstance(layer, nn.Embedding) and layer.max_norm is None and not layer.scale_grad_by_freq and not layer.sparse:
        return embedding
    if type(layer) is nn.LayerNorm and len(layer.normalized_shape) == 1 and layer.weight is not None:
        return layer_norm
    if type(layer).__name__ in RMS_NORMS:
        return rms_norm
    if type(layer) in (Conv1D, BF16Conv1D):
        return conv1d
    is_small = sum(p.numel() for p in layer.parameters() if p.requires_grad) <= SMALL_ELEMENTS
    return vmap_rule if is_small and not any(True for _ in layer.children()) else None


def apply_rule(
    rule: Callable, layer: nn.Module, rows: list[torch.Tensor], authors: AuthorIndex, max_materialized: int
) -> dict[str, GradFactors] | None:
    """Return the factors of one call of a layer, by the name of the parameter; None where vmap cannot follow the layer.

    Args:
        rows: the layer's inputs, then its output gradient, each (samples, calls, ...).
        max_materialized: elements of per-author gradients of a matrix that may be formed.
    """
    *inputs, gradients = rows
    if rule is vmap_rule:
        try:
            return vmap_rule(layer, inputs, gradients, authors)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, NotImplementedError, ValueError, TypeError):
            return None
    tokens = inputs[0].flatten(1) if rule is embedding else inputs[0].flatten(1, -2)
    return rule(layer, tokens, gradients.flatten(1, -2), authors, max_materialized)


# --- the rules ------------------------------------------------------------------------------------------


def linear(layer: nn.Linear, inputs: torch.Tensor, gradients: torch.Tensor, authors: AuthorIndex, max_materialized: int) -> dict:
    return {"weight": matrix_grad(gradients, inputs, authors, max_materialized), **bias_grad(layer, gradients, authors)}


def conv1d(layer: Conv1D, inputs: torch.Tensor, gradients: torch.Tensor, authors: AuthorIndex, max_materialized: int) -> dict:
    """Hugging Face's linear layer with weight (inputs, outputs)."""
    return {"weight": matrix_grad(inputs, gradients, authors, max_materialized), **bias_grad(layer, gradients, authors)}


def embedding(layer: nn.Embedding, ids: torch.Tensor, gradients: torch.Tensor, *_) -> dict:
    if layer.padding_idx is not None:
        gradients = gradients * (ids != layer.padding_idx)[:, :, None]
    return {"weight": EmbeddingGrad(ids, gradients)}


def layer_norm(layer: nn.LayerNorm, inputs: torch.Tensor, gradients: torch.Tensor, authors: AuthorIndex, *_) -> dict:
    normalized = F.layer_norm(inputs.float(), layer.normalized_shape, eps=layer.eps)
    weight = MaterializedGrad(authors.sum(normalized.mul_(gradients).sum(1)))
    return {"weight": weight, **bias_grad(layer, gradients, authors)}


def rms_norm(layer: Any, inputs: torch.Tensor, gradients: torch.Tensor, authors: AuthorIndex, *_) -> dict:
    normalized = F.rms_norm(inputs.float(), inputs.shape[-1:], eps=layer.variance_epsilon)
    return {"weight": MaterializedGrad(authors.sum(normalized.mul_(gradients).sum(1)))}


def vmap_rule(layer: nn.Module, inputs: list[torch.Tensor], gradients: torch.Tensor, authors: AuthorIndex) -> dict:
    """Factors of a small layer's parameters, whatever it computes: its forward pass once more, sample by sample (vmap).

    Args:
        inputs: its arguments, each (samples, ...); a sample's outputs must depend on that sample's inputs only.
        gradients: (samples, ...), at its output.
    """
    params = {name: p.detach() for name, p in trained_params(layer).items()}
    dtype = next(layer.parameters(recurse=False)).dtype  # autocast, which cast the inputs for the layer, is off here
    inputs = [value.to(dtype) if value.is_floating_point() else value for value in inputs]

    def sample_gradients(gradient: torch.Tensor, *rows: torch.Tensor) -> dict[str, torch.Tensor]:
        output, pull_back, *_ = vjp(lambda params: functional_call(layer, params, rows), params)
        return pull_back(gradient.to(output.dtype))[0]

    per_sample = vmap(sample_gradients)(gradients, *inputs)  # {name: (samples, ...)}
    return {name: MaterializedGrad(authors.sum(gradient)) for name, gradient in per_sample.items()}


MATRIX_RULES = {linear, conv1d, embedding}  # their factors of one matrix add up, whichever layers they come from


def matrix_grad(left: torch.Tensor, right: torch.Tensor, authors: AuthorIndex, max_materialized: int) -> GradFactors:
    """Factors of a matrix, or the per-author gradients where these are smaller, and then also faster.

    They are smaller for LoRA's factors, and for any matrix where an author's tokens are many.

    Args:
        max_materialized: elements that may be formed.
    """
    product = OuterProduct(left, right)
    elements = authors.num_authors * left.shape[-1] * right.shape[-1]
    is_smaller = 4 * elements < sum(tensor.numel() * tensor.element_size() for tensor in product)
    return materialize_grad_factors(product, authors) if is_smaller and elements <= max_materialized else product


def bias_grad(layer: Any, gradients: torch.Tensor, authors: AuthorIndex) -> dict[str, MaterializedGrad]:
    """Per-author gradients of a bias that is added to a layer's output; empty where it has none."""
    return {} if layer.bias is None else {"bias": MaterializedGrad(authors.sum(gradients.sum(1, dtype=torch.float32)))}
