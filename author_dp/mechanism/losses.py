"""Losses of tokens and of authors."""

import inspect
import weakref
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import nn

from author_dp.types import IGNORE_INDEX, Batch


class TokenLosses(torch.autograd.Function):
    """Cross-entropy of each token, a few rows at a time: of the size of the logits there is only their gradient.

    Call apply(logits, targets), (tokens, vocabulary) and (tokens,), for float32 losses (tokens,), 0 where ignored.
    """

    @staticmethod
    def forward(ctx, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        rows = TokenLosses.chunk_rows(logits)
        normalizers = torch.cat([part.float().logsumexp(1) for part in logits.split(rows)])
        ctx.save_for_backward(logits, targets, normalizers)
        picked = logits.gather(1, targets.clamp(min=0)[:, None])[:, 0].float()
        return torch.where(targets == IGNORE_INDEX, 0.0, normalizers - picked)

    @staticmethod
    def backward(ctx, weights: torch.Tensor) -> tuple[torch.Tensor, None]:
        """weight x (softmax - one-hot), in the logits' type."""
        logits, targets, normalizers = ctx.saved_tensors
        rows = TokenLosses.chunk_rows(logits)
        weights = torch.where(targets == IGNORE_INDEX, 0.0, weights)[:, None]
        gradient = torch.empty_like(logits)
        parts = (tensor.split(rows) for tensor in (logits, targets[:, None], normalizers[:, None], weights, gradient))
        for logit, target, normalizer, weight, result in zip(*parts):
            part = torch.sub(logit, normalizer, out=result if result.dtype == torch.float32 else None).exp_().mul_(weight)
            result.copy_(part.scatter_add_(1, target.clamp(min=0), -weight))  # nothing to copy where they are one
        return gradient, None

    @staticmethod
    def chunk_rows(logits: torch.Tensor) -> int:
        """What stays in a CPU's cache; on a GPU 256 MB, to launch few kernels."""
        return max(1, (2**20 if logits.device.type == "cpu" else 2**26) // logits.shape[1])


def token_losses(model: nn.Module, batch: Batch, needs_positions: Optional[bool] = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each next token's cross-entropy, float32 (samples, tokens), 0 without a target; and bool, where there is one."""
    input_ids = batch["input_ids"]
    inputs = {"input_ids": input_ids}
    if needs_position_ids(model) if needs_positions is None else needs_positions:
        inputs["position_ids"] = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
    logits = model(**inputs).logits  # (samples, tokens, vocabulary)
    targets = F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORE_INDEX)  # (samples, tokens): what comes next
    losses = TokenLosses.apply(logits.flatten(0, 1), targets.flatten()).view_as(targets)
    return losses, targets != IGNORE_INDEX


def author_losses(model: nn.Module, batch: Batch, needs_positions: Optional[bool] = None) -> torch.Tensor:
    """Return each author's mean cross-entropy over the author's own target tokens.

    Guarantee: an entry depends on that author's samples only. The model's built-in loss does not give this: it
    is a mean over the tokens of the batch, so one author's gradient would depend on the others' token counts.

    Args:
        batch: input_ids, labels (samples, tokens), labels -100 where nothing is predicted; author (samples,), num_authors.
        needs_positions: whether to give the model position_ids; None: as `takes_positions` says.
    Returns:
        losses, float32 (authors,); 0 for an author without target tokens.
    """
    losses, counted = token_losses(model, batch, needs_positions)
    # From (samples, tokens) to (authors,).
    authors = torch.zeros(batch["num_authors"], device=losses.device)
    totals = authors.index_add(0, batch["author"], losses.sum(1))
    counts = authors.index_add(0, batch["author"], counted.sum(1).float())
    return totals / counts.clamp(min=1)


def needs_position_ids(model: nn.Module) -> bool:
    """Whether `author_losses` is to give the model position_ids: 0, 1, 2, ... for each sample.

    Only where that changes nothing but their shape: GPT-2's own have batch size 1, in which no per-sample gradient can be told
    apart. Found by two calls on a few tokens, once a model; a model whose own positions are others keeps them (RoBERTa's).
    """
    while hasattr(model, "_module") or hasattr(model, "get_base_model"):
        model = model._module if hasattr(model, "_module") else model.get_base_model()  # type: ignore[assignment, operator]
    if model not in _takes_positions:
        _takes_positions[model] = _positions_are_shared(model)
    return _takes_positions[model]


_takes_positions: MutableMapping[nn.Module, bool] = weakref.WeakKeyDictionary()


def _positions_are_shared(model: Any) -> bool:
    words = getattr(model, "get_input_embeddings", lambda: None)()
    tables = [layer for layer in model.modules() if isinstance(layer, nn.Embedding) and layer.weight.requires_grad]
    tables = [table for table in tables if table is not words]
    if not tables or "position_ids" not in inspect.signature(model.forward).parameters:
        return False
    ids = torch.tensor([[3, 1, 4], [2, 5, 3]], device=tables[0].weight.device)
    shared: list[bool] = []
    hooks = [t.register_forward_hook(lambda _, args, __: shared.append(args[0].shape != ids.shape)) for t in tables]
    try:
        with deterministic_eval(model), torch.no_grad():
            own = model(input_ids=ids).logits
            if not any(shared):
                return False
            given = model(input_ids=ids, position_ids=torch.arange(3, device=ids.device).expand_as(ids)).logits
    finally:
        for hook in hooks:
            hook.remove()
    return torch.equal(own, given) or bool((own - given).norm() < 1e-5 * own.norm())


@contextmanager
def deterministic_eval(model: nn.Module) -> Iterator[None]:
    """Without dropout; the modes of the model and the random generators are as before, afterwards."""
    training = [module for module in model.modules() if module.training]
    devices = {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}
    with torch.random.fork_rng(devices=list(devices)):
        try:
            model.eval()
            yield
        finally:
            for module in training:
                module.training = True
