"""Audit a run from within: canary authors, each in or out by a secret coin, and guesses from their losses which were in.

Promise: with 95 % confidence the run's true epsilon is at least `epsilon_lower_bound`, whatever the model and the data [1,
Theorem 5.2]. A bound above the promised epsilon shows that the guarantee does not hold; one below it proves nothing, as most
leaks are weaker than what m canaries can show (docs/guarantee.md says how weak).

Canaries are authors like any other: counted in N, drawn, clipped, noised, in the ledger. Their texts are random tokens, so that
nothing else teaches them. The result tells nothing about any other author, and is safe to publish.

Example:

    >>> audit = Audit(canaries=1000, samples=1, tokens=128, vocabulary=50257, key=secrets.randbits(128))
    >>> trainer = DPTrainer(..., train_dataset=AuthorDataset(*audit.join(train, offsets, indices)))
    >>> audit.start(trainer); trainer.train(); trainer.audit = audit.finish(trainer)

References:
    [1] Steinke, Nasr and Jagielski 2023, Privacy Auditing with One (1) Training Run, arXiv 2305.08846
"""

import json
import os
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from accelerate.utils import send_to_device
from datasets import Dataset, Features, concatenate_datasets
from scipy import stats
from torch import nn
from transformers import TrainingArguments
from transformers.utils import logging

from author_dp.accounting.plan import PrivacyPlan
from author_dp.distributed import broadcast
from author_dp.errors import UserError
from author_dp.files import write_json
from author_dp.mechanism.losses import author_losses
from author_dp.mechanism.microbatches import make_microbatches

logger = logging.get_logger(f"transformers.{__name__}")

CONFIDENCE = 0.95
GUESS_SHARES = (
    1 / 8,
    1 / 4,
    1 / 2,
    1,
)  # of the canaries that are guessed; each share is a test of its own, so confidence is divided
KEY_NAME = "_audit_key.json"  # in the output folder; the leading _ keeps it out of uploads to the hub


@dataclass
class AuditArguments:
    """Whether to audit the run."""

    audit_canaries: int = field(
        default=0, metadata={"help": "Add so many canary authors, about half of them in, and report a lower bound on epsilon."}
    )
    audit_kind: str = field(
        default="text",
        metadata={
            "help": "What canaries are: text, to tell what a reader of the model could learn; gradient, which leaves the model "
            "alone and checks draws, clipping and noise exactly.",
            "choices": ["text", "gradient"],
        },
    )

    def __post_init__(self):
        if self.audit_kind not in ("text", "gradient"):
            raise UserError(f"--audit_kind {self.audit_kind} must be text or gradient")
        if self.audit_kind == "gradient" and not self.audit_canaries:
            raise UserError("--audit_kind gradient needs --audit_canaries: give 1000, or leave it out")
        if self.audit_canaries < 0 or 0 < self.audit_canaries < 10:
            raise UserError(f"--audit_canaries {self.audit_canaries}: fewer than 10 tell nothing; give 1000, or 0 for no audit")


class AuditedTrainer(Protocol):
    """What the audit asks of a Trainer: dp_utils.DPTrainer."""

    model: nn.Module
    args: TrainingArguments
    plan: PrivacyPlan
    data_collator: Callable
    needs_positions: bool

    def epsilon(self) -> float: ...

    def is_world_process_zero(self) -> bool: ...


class TextCanaries:
    """Canaries of one run.

    Args:
        canaries: m, each included with probability 1/2.
        samples: k, of each canary; a step that draws it takes them all.
        tokens: of each sample.
        vocabulary: size of the model's vocabulary, from which the tokens are drawn uniformly.
        key: 128 secret bits, the same on all processes and in every run that goes on with this one.
    Attributes:
        tokens: int32 (canaries, samples, tokens).
        included: bool (canaries,): the coins.
    """

    def __init__(self, canaries: int, samples: int, tokens: int, vocabulary: int, key: int):
        generator = np.random.Generator(np.random.Philox(key=key))
        self.included = generator.random(canaries) < 0.5
        self.tokens = generator.integers(vocabulary, size=(canaries, samples, tokens), dtype=np.int32)
        self.losses_before: np.ndarray = np.zeros(0)

    def join(self, train: Dataset, offsets: np.ndarray, indices: np.ndarray) -> tuple[Dataset, np.ndarray, np.ndarray]:
        """Return data set and grouping (`data_utils.group_by_author`) with the included canaries as further authors."""
        rows = self.tokens[self.included]  # (included, samples, tokens)
        names = [name for name in ("input_ids", "labels") if name in train.column_names]  # of a canary all is to be learned
        features = Features({name: train.features["input_ids"] for name in names})
        canaries = Dataset.from_dict({name: list(rows.reshape(-1, rows.shape[2])) for name in names}, features=features)
        more = np.arange(1, len(rows) + 1) * rows.shape[1]
        return (
            concatenate_datasets([train.select_columns(names), canaries]),
            np.concatenate([offsets, len(train) + more]),
            np.concatenate([indices, len(train) + np.arange(len(canaries))]),
        )

    def start(self, trainer: AuditedTrainer) -> None:
        """Note the losses of all canaries, in or out, before training."""
        self.losses_before = self.losses(trainer)

    def finish(self, trainer: AuditedTrainer) -> dict[str, Any]:
        """Return what privacy.json holds under "audit"."""
        gain = self.losses_before - self.losses(trainer)
        result = lower_bound(gain, self.included, trainer.plan.delta)
        epsilon = trainer.epsilon() if trainer.is_world_process_zero() and not trainer.plan.disable_dp else np.inf
        if result["epsilon_lower_bound"] > epsilon:
            logger.error(
                f"*** The audit contradicts the guarantee: epsilon is at least {result['epsilon_lower_bound']:.2f} with "
                f"{CONFIDENCE:.0%} confidence, and {epsilon:.2f} was accounted for. Do not publish the model. ***"
            )
        return result

    def losses(self, trainer: AuditedTrainer) -> np.ndarray:
        """Return the mean loss of each canary, (canaries,), without dropout."""
        authors = [[{"input_ids": row} for row in rows] for rows in self.tokens]
        trainer.model.eval()
        losses = []
        with torch.no_grad():
            for batch in make_microbatches(authors, trainer.args.per_device_eval_batch_size, trainer.data_collator):
                batch = send_to_device(batch, trainer.args.device)
                losses.append(author_losses(trainer.model, batch, trainer.needs_positions).cpu())
        return torch.cat(losses).double().numpy()


def format_audit(audit: dict[str, Any]) -> str:
    """Return what the run's last line says of epsilon."""
    found = f"at least {audit['epsilon_lower_bound']:.2f}"
    if None not in (between := audit.get("epsilon_between", [None])):
        found += f", and between {between[0]:.2f} and {between[1]:.2f} by the noise that was seen"
    return found


def lower_bound(gain: np.ndarray, included: np.ndarray, delta: float) -> dict[str, Any]:
    """Guess that the canaries of the highest gain were in and those of the lowest out, and bound epsilon.

    Args:
        gain: (canaries,), by how much the loss fell.
        included: bool (canaries,), the coins.
    """
    best = {"epsilon_lower_bound": 0.0, "guesses": 0, "correct": 0}
    for number, correct in guess_counts(gain, included):
        bound = epsilon_lower_bound(len(gain), number, correct, delta, 1 - (1 - CONFIDENCE) / len(GUESS_SHARES))
        if bound >= best["epsilon_lower_bound"]:
            best = {"epsilon_lower_bound": bound, "guesses": number, "correct": correct}
    return {"method": "one run (Steinke, Nasr and Jagielski 2023)", "confidence": CONFIDENCE, "canaries": len(gain), **best}


def guess_counts(gain: np.ndarray, included: np.ndarray) -> list[tuple[int, int]]:
    """Return for each of SHARES how many canaries are guessed, half of them in and half out, and how many of these rightly."""
    order, found = np.argsort(gain, kind="stable"), []
    for share in GUESS_SHARES:
        half = int(len(gain) * share / 2)
        found.append((2 * half, int(included[order[len(order) - half :]].sum() + (~included[order[:half]]).sum())))
    return found


def p_value(canaries: int, guesses: int, correct: int, epsilon: float, delta: float) -> float:
    """Bound the probability of at least `correct` right guesses where the run is (epsilon, delta)-DP [1, Theorem 5.2].

    P[W >= v] <= beta + 2 m delta alpha, for B binomial of r trials with probability e^epsilon / (1 + e^epsilon):
    beta = P[B >= v], alpha = max over i of P[v > B >= v - i] / i.

    Args:
        canaries, guesses, correct: m, r, v.
    """
    binomial = stats.binom(guesses, 1 / (1 + np.exp(-epsilon)))
    within = np.cumsum(binomial.pmf(np.arange(correct - 1, -1, -1)))  # P[v > B >= v - i] for i = 1, 2, ...
    alpha = (within / np.arange(1, correct + 1)).max(initial=0.0)
    return float(min(1.0, binomial.sf(correct - 1) + 2 * canaries * delta * alpha))


def epsilon_lower_bound(canaries: int, guesses: int, correct: int, delta: float, confidence: float) -> float:
    """Return the largest epsilon that `correct` of `guesses` rule out at this confidence; 0 if none."""
    low, high = 0.0, 64.0
    while high - low > 1e-4:
        middle = (low + high) / 2
        low, high = (middle, high) if p_value(canaries, guesses, correct, middle, delta) <= 1 - confidence else (low, middle)
    return round(low, 4)


def load_or_create_key(folder: str, go_on: bool) -> int:
    """Return 128 secret bits for the canaries, the same on all processes.

    They lie in the output folder, readable for its owner only: a run that goes on needs the same canaries, and the audit can be
    repeated. They are not those of the noise or of the sampling, which never leave the memory.

    Args:
        go_on: whether the run goes on with an earlier one, and its key is to be used if it is there.
    """
    path = Path(folder) / KEY_NAME
    key = secrets.randbits(128)
    if int(os.environ.get("RANK", 0)) == 0:
        if go_on and path.exists():
            key = json.loads(path.read_text())["key"]
        write_json(path, {"key": key}, private=True)
    return broadcast(key)
