"""Audit what a model's readers could learn, by canary authors whose texts the model may memorize.

Canaries are authors like any other: counted in N, sampled, clipped, noised, in the ledger. A secret coin decides whether each is
in the data. Their texts are random tokens, so that nothing else teaches them. Guesses from the fall of their losses bound epsilon
from below (one_run_audit.py). The result reveals nothing about any other author, and is safe to publish.

Example:

    >>> canaries = TextCanaries(1000, samples=1, tokens=128, vocab_size=50257, key=secrets.randbits(128))
    >>> trainer = DPTrainer(..., train_dataset=AuthorDataset(*canaries.join(train, offsets, indices)), canaries=canaries)
    >>> trainer.train()  # with canaries=canaries it measures their losses before and after; the report has the audit
"""

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch
from accelerate.utils import send_to_device
from datasets import Dataset, Features, concatenate_datasets
from torch import nn
from transformers import TrainingArguments

from author_dp.accounting.plan import PrivacyPlan
from author_dp.guards.one_run_audit import CONFIDENCE, one_run_lower_bound
from author_dp.logs import get_logger
from author_dp.mechanism.losses import author_losses
from author_dp.mechanism.microbatches import make_microbatches
from author_dp.progress import track

logger = get_logger(__name__)


class AuditedTrainer(Protocol):
    """What the audit needs of a Trainer: `dp_utils.DPTrainer`."""

    model: nn.Module
    args: TrainingArguments
    plan: PrivacyPlan
    data_collator: Callable

    def epsilon(self) -> float: ...

    def is_world_process_zero(self) -> bool: ...


class TextCanaries:
    """Canaries of one run: their coins and their texts.

    Args:
        number: m, each included with probability 1/2.
        samples: of each canary, k; a step that samples it uses them all.
        tokens: of each sample.
        vocab_size: of the model; tokens are uniform over it.
        key: 128 secret bits, the same on all processes and in every run that resumes this one.
    Attributes:
        tokens: int32 (canaries, samples, tokens).
        included: bool (canaries,), the coins.
    """

    def __init__(self, number: int, samples: int, tokens: int, vocab_size: int, key: int):
        generator = np.random.Generator(np.random.Philox(key=key))
        self.included = generator.random(number) < 0.5
        self.tokens = generator.integers(vocab_size, size=(number, samples, tokens), dtype=np.int32)
        self.losses_before: np.ndarray = np.zeros(0)

    def join(self, train: Dataset, offsets: np.ndarray, indices: np.ndarray) -> tuple[Dataset, np.ndarray, np.ndarray]:
        """Return data set and grouping (`data_utils.group_by_author`) with the included canaries as the last authors."""
        rows = self.tokens[self.included]  # (included, samples, tokens)
        names = [name for name in ("input_ids", "labels") if name in train.column_names]  # every token is a target
        features = Features({name: train.features["input_ids"] for name in names})
        canaries = Dataset.from_dict({name: list(rows.reshape(-1, rows.shape[2])) for name in names}, features=features)
        ends = np.arange(1, len(rows) + 1) * rows.shape[1]
        return (
            concatenate_datasets([train.select_columns(names), canaries]),
            np.concatenate([offsets, len(train) + ends]),
            np.concatenate([indices, len(train) + np.arange(len(canaries))]),
        )

    def start(self, trainer: AuditedTrainer) -> None:
        """Record the losses of all canaries, included or not, before training."""
        self.losses_before = self.losses(trainer)

    def finish(self, trainer: AuditedTrainer) -> dict[str, Any]:
        """Return the audit for privacy.json, and log an error if it contradicts the guarantee."""
        result = one_run_lower_bound(self.losses_before - self.losses(trainer), self.included, trainer.plan.delta)
        epsilon = trainer.epsilon() if trainer.is_world_process_zero() and not trainer.plan.disable_dp else np.inf
        if result["epsilon_lower_bound"] > epsilon:
            logger.error(
                f"*** The audit contradicts the guarantee: epsilon is at least {result['epsilon_lower_bound']:.2f} with "
                f"{CONFIDENCE:.0%} confidence, but {epsilon:.2f} was accounted for. Do not publish the model. ***"
            )
        return result

    def losses(self, trainer: AuditedTrainer) -> np.ndarray:
        """Return the mean loss of each canary without dropout, (canaries,)."""
        authors = [[{"input_ids": row} for row in rows] for rows in self.tokens]
        trainer.model.eval()
        losses = []
        with torch.no_grad():
            batches = make_microbatches(authors, trainer.args.per_device_eval_batch_size, trainer.data_collator)
            for batch in track(batches, "Score the canaries", not trainer.args.disable_tqdm):
                batch = send_to_device(batch, trainer.args.device)
                losses.append(author_losses(trainer.model, batch).cpu())
        return torch.cat(losses).double().numpy()
