"""Compute evaluation losses that do not depend on the batch size, the number of processes or the model's class.

`loss` is the mean over all target tokens of all texts. `author_loss` is the mean over authors of each author's mean over target
tokens, which training minimizes. Both equal those of a loop over single texts. (For some classes, transformers' eval_loss divides
a batch's summed loss by all of its tokens, the first of each text included, and averages over batches.) Evaluation takes no more
memory than a training step of the same batch. It adds no noise, so no guarantee covers these losses.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch
import torch.distributed as dist
from accelerate.utils import send_to_device
from torch import nn
from torch.utils.data import DataLoader, Dataset
from transformers.trainer_utils import EvalLoopOutput

from author_dp.data.columns import get_column
from author_dp.distributed import all_reduce_sum
from author_dp.mechanism.fsdp import dummy_forwards, missing_fsdp_rounds
from author_dp.mechanism.losses import token_losses
from author_dp.types import Batch


class EvalBatches(Dataset):
    """One process's share of the texts of a data set, in batches.

    A batch holds texts of similar length, to avoid padding.

    Args:
        dataset: `data_utils.AuthorDataset`.
        batch_size: maximum number of texts per batch.
        collate: pads a list of samples to input_ids and labels, both (samples, tokens).
    """

    def __init__(self, dataset: Any, batch_size: int, collate: Callable, rank: int = 0, world_size: int = 1):
        self.dataset, self.collate = dataset, collate
        self.authors = np.empty(len(dataset.indices), np.int64)  # index of each text's author
        self.authors[dataset.indices] = np.repeat(np.arange(len(dataset)), np.diff(dataset.offsets))
        by_length = np.argsort(pc.list_value_length(get_column(dataset.samples, "input_ids")).to_numpy(), kind="stable")
        self.batches = [by_length[i : i + batch_size] for i in range(0, len(by_length), batch_size)][rank::world_size]

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> Batch:
        """Return input_ids and labels (samples, tokens), and author (samples,), indices in the complete data set."""
        texts = self.batches[index]
        (samples,) = self.dataset.__getitems__([texts])
        return {**self.collate(samples), "author": torch.from_numpy(self.authors[texts])}


def summarize_losses(losses: torch.Tensor, tokens: torch.Tensor) -> dict[str, float]:
    """Return the metrics of held-out authors, and their standard errors where there are two authors or more.

    The authors are taken for a random sample of all authors. The texts of one author are not independent, so the error of `loss`
    is that of a ratio of two sums over authors [1].

    Args:
        losses, tokens: sum of losses, and number of target tokens, of each author, float64 (authors,).

    References:
        [1] Cochran 1977, Sampling Techniques, third edition, chapter 6 (ratio estimators)
    """
    num_authors, means = len(tokens), losses / tokens
    loss = (losses.sum() / tokens.sum()).item()
    results = {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "author_loss": means.mean().item()}
    if num_authors > 1:
        residuals = (losses - loss * tokens) / tokens.mean()
        for name, values in (("loss", residuals), ("author_loss", means)):
            results[f"{name}_stderr"] = values.std().item() / math.sqrt(num_authors)
    return {**results, "num_authors": num_authors}


def evaluate(model: nn.Module, loader: DataLoader, on_batch: Callable[[], None], prefix: str) -> EvalLoopOutput:
    """Return the metrics of `summarize_losses` and num_texts, the same on every process. Collective.

    Args:
        loader: of `EvalBatches`.
        on_batch: called after each batch, for a progress bar.
        prefix: of the names of metrics.
    """
    model.eval()
    device = next(model.parameters()).device
    batches: Any = loader.dataset
    sums = torch.zeros(2, len(batches.dataset), dtype=torch.float64)  # (2, authors): losses, target tokens
    num_dummies = missing_fsdp_rounds(model, len(loader))
    with torch.no_grad():
        for batch in loader:
            author = batch.pop("author")
            losses, has_target = token_losses(model, send_to_device(batch, device, non_blocking=True))
            # (2, samples, tokens): one copy, and float64 on the CPU only, as Macs' GPUs have none.
            sums.index_add_(1, author, torch.stack([losses, has_target]).cpu().sum(2, dtype=torch.float64))
            on_batch()
    dummy_forwards(model, num_dummies)
    losses, tokens = all_reduce_sum(sums.to(device)).cpu() if dist.is_initialized() else sums
    results = summarize_losses(losses[tokens > 0], tokens[tokens > 0]) | {"num_texts": len(batches.authors)}
    metrics = {f"{prefix}_{name}": value for name, value in results.items()}
    return EvalLoopOutput(predictions=np.empty(0), label_ids=None, metrics=metrics, num_samples=len(batches.authors))
