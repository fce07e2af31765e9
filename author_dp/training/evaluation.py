"""Evaluation losses that mean the same whatever the batch, the number of processes and the model's class.

Promise: `loss` is the mean over all target tokens of all texts, `author_loss` the mean over authors of each author's mean over
own target tokens, which is what training minimizes; both equal a plain loop over the texts, one by one. (transformers' own
eval_loss is, for some classes, a batch's summed loss over all of its tokens, the first of each text included, averaged over
batches.) They take no more memory than a training step of the same batch. Computed without noise: not covered by any guarantee.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch
from accelerate.utils import send_to_device
from torch import nn
from torch.utils.data import DataLoader, Dataset
from transformers.trainer_utils import EvalLoopOutput

from author_dp.data.authors import get_column
from author_dp.distributed import all_reduce_sum
from author_dp.mechanism.fsdp import dummy_forwards, missing_rounds
from author_dp.mechanism.losses import token_losses
from author_dp.types import Batch


class EvalBatches(Dataset):
    """One process' share of the texts of a data set, in batches of texts similar in length: padding is not work.

    Args:
        dataset: `data_utils.AuthorDataset`.
        batch_size: texts of a batch, at most.
        collate: pads a list of samples to input_ids and labels (samples, tokens).
    """

    def __init__(self, dataset: Any, batch_size: int, collate: Callable, rank: int = 0, world_size: int = 1):
        self.dataset, self.collate = dataset, collate
        self.authors = np.empty(len(dataset.indices), np.int64)  # of each text
        self.authors[dataset.indices] = np.repeat(np.arange(len(dataset)), np.diff(dataset.offsets))
        by_length = np.argsort(pc.list_value_length(get_column(dataset.samples, "input_ids")).to_numpy(), kind="stable")
        self.batches = [by_length[i : i + batch_size] for i in range(0, len(by_length), batch_size)][rank::world_size]

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, number: int) -> Batch:
        """Return input_ids and labels (samples, tokens), and author (samples,), counted over the whole data set."""
        texts = self.batches[number]
        (samples,) = self.dataset.__getitems__([texts])
        return {**self.collate(samples), "author": torch.from_numpy(self.authors[texts])}


def evaluate(model: nn.Module, loader: DataLoader, on_batch: Callable[[], None], prefix: str) -> EvalLoopOutput:
    """Return loss, perplexity and author_loss of the model on a loader of `TextBatches`; the same on every process.

    Args:
        on_batch: called after each batch, for a progress bar.
        prefix: of the metrics' names.
    """
    model.eval()
    device = next(model.parameters()).device
    texts: Any = loader.dataset
    sums = torch.zeros(2, len(texts.dataset), dtype=torch.float64)  # losses, tokens
    idle = missing_rounds(model, len(loader))
    with torch.no_grad():
        for batch in loader:
            batch = send_to_device(batch, device)
            losses, counted = token_losses(model, batch)
            for row, values in zip(sums, (losses, counted)):
                row.index_add_(0, batch["author"].cpu(), values.sum(1, dtype=torch.float64).cpu())
            on_batch()
    dummy_forwards(model, idle)
    losses, tokens = all_reduce_sum(sums.to(device)).cpu()
    loss = (losses.sum() / tokens.sum()).item()
    author_loss = (losses / tokens)[tokens > 0].mean().item()
    found = {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "author_loss": author_loss}
    metrics = {f"{prefix}_{name}": value for name, value in found.items()}
    return EvalLoopOutput(predictions=np.empty(0), label_ids=None, metrics=metrics, num_samples=len(texts.authors))
