"""Give a model one position id per sample and token, where its samples share the positions 0, 1, 2, ...

Why: GPT-2's position embedding sees one row of ids for all samples, so Opacus cannot tell their gradients apart. Ghost clipping
expands that row by itself.
"""

import inspect
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from author_dp.models.modes import deterministic_eval


def separate_positions(model: nn.Module) -> list[RemovableHandle]:
    """Make a model, or the one that it wraps, compute with separate position ids; return the hooks that do so."""
    inner = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), model)
    return [inner.register_forward_pre_hook(add_position_ids, with_kwargs=True)] if shares_positions(inner) else []


def add_position_ids(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Add position_ids, int64 (samples, tokens), to the arguments of a call with input_ids."""
    ids = kwargs["input_ids"]
    return args, {"position_ids": torch.arange(ids.shape[1], device=ids.device).expand_as(ids), **kwargs}


def shares_positions(model: Any) -> bool:
    """Return whether samples share their positions, and separate ones would change nothing but their shape.

    Found by two calls on a few tokens. A model whose positions are not 0, 1, 2, ... keeps them (RoBERTa's start behind the id of
    padding).
    """
    words = getattr(model, "get_input_embeddings", lambda: None)()
    tables = [layer for layer in model.modules() if isinstance(layer, nn.Embedding) and layer.weight.requires_grad]
    tables = [table for table in tables if table is not words]
    if not tables or "position_ids" not in inspect.signature(model.forward).parameters:
        return False
    ids = torch.tensor([[3, 1, 4], [2, 5, 3]], device=tables[0].weight.device)
    are_shared: list[bool] = []
    hooks = [t.register_forward_hook(lambda _, args, __: are_shared.append(args[0].shape != ids.shape)) for t in tables]
    try:
        with deterministic_eval(model), torch.no_grad():
            default = model(input_ids=ids).logits
            if not any(are_shared):
                return False
            separate = model(input_ids=ids, position_ids=torch.arange(3, device=ids.device).expand_as(ids)).logits
    finally:
        for hook in hooks:
            hook.remove()
    return torch.equal(default, separate) or bool((default - separate).norm() < 1e-5 * default.norm())
