"""Compute the cross-entropy of tokens, and its mean for each author."""

import torch
import torch.nn.functional as F
from torch import nn

from author_dp.models.modes import one_text_per_row
from author_dp.types import IGNORE_INDEX, Batch


class TokenLosses(torch.autograd.Function):
    """Cross-entropy of each token, a few rows at a time; of the size of the logits, only their gradient is kept.

    Call apply(logits, targets), (tokens, vocabulary) and int64 (tokens,). It returns float32 (tokens,), 0 where ignored.
    """

    @staticmethod
    def forward(ctx, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Compute -log softmax(logits)[target] in float32."""
        indices, ignored = targets.clamp(min=0)[:, None], targets == IGNORE_INDEX
        chunks = zip(*(t.split(TokenLosses.chunk_rows(logits)) for t in (logits, indices)))
        losses = -torch.cat([logit.float().log_softmax(1).gather(1, index)[:, 0] for logit, index in chunks])
        ctx.save_for_backward(logits, indices, ignored, losses + logits.gather(1, indices)[:, 0].float())
        return losses.masked_fill_(ignored, 0.0)

    @staticmethod
    def backward(ctx, weights: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Compute weight x (softmax - one-hot), in the logits' type; on a GPU nan for a weight below 0, which no loss has."""
        logits, indices, ignored, normalizers = ctx.saved_tensors
        weights, normalizers = torch.where(ignored, 0.0, weights)[:, None], normalizers[:, None]
        shifts, on_cpu, gradient = normalizers - weights.log(), logits.device.type == "cpu", torch.empty_like(logits)
        tensors = (logits, normalizers, shifts, weights, gradient)
        for logit, normalizer, shift, weight, result in zip(*(t.split(TokenLosses.chunk_rows(logits)) for t in tensors)):
            out = result if result.dtype == torch.float32 else None
            if on_cpu:  # in a cache, where passes cost less than an exponential that converts
                result.copy_(torch.sub(logit, normalizer, out=out).exp_().mul_(weight))  # no copy where both are one tensor
            else:  # two passes over memory
                torch.exp(torch.sub(logit, shift, out=out), out=result)
        at_target = torch.expm1(logits.gather(1, indices).float() - normalizers).mul_(weights)  # (softmax - 1) x weight
        return gradient.scatter_(1, indices, at_target.to(gradient.dtype)), None

    @staticmethod
    def chunk_rows(logits: torch.Tensor) -> int:
        """Return how many rows stay in a CPU's cache; on a GPU an eighth, or 256 MB if that is more, to launch few kernels."""
        elements = 2**20 if logits.device.type == "cpu" else max(2**26, logits.numel() // 8)
        return max(1, elements // logits.shape[1])


def token_losses(model: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each next token's cross-entropy, and where there is a target.

    Returns:
        losses, float32 (samples, tokens), 0 without a target; has_target, bool (samples, tokens).
    """
    with one_text_per_row():
        logits = model(input_ids=batch["input_ids"]).logits  # (samples, tokens, vocabulary)
    targets = F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORE_INDEX)  # (samples, tokens): the next token
    losses = TokenLosses.apply(logits.flatten(0, 1), targets.flatten()).view_as(targets)
    return losses, targets != IGNORE_INDEX


def author_losses(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Return each author's mean cross-entropy over the author's target tokens.

    Guarantee: an author's loss depends on that author's samples alone, so adding or removing an author changes no other author's
    loss or gradient. The model's built-in loss does not give this: it is a mean over the tokens of the batch, so an author's
    gradient would depend on the others' token counts.

    Not protected: the losses are private; they are neither clipped nor noised.

    Args:
        batch: input_ids, labels, int64 (samples, tokens), labels -100 where nothing is predicted; author (samples,), num_authors.
    Returns:
        losses, float32 (authors,); 0 for an author without target tokens.
    """
    losses, has_target = token_losses(model, batch)
    # From (samples, tokens) to (authors,).
    zeros = torch.zeros(batch["num_authors"], device=losses.device)
    totals = zeros.index_add(0, batch["author"], losses.sum(1))
    counts = zeros.index_add(0, batch["author"], has_target.sum(1, dtype=torch.float32))
    return totals / counts.clamp(min=1)
