"""Audit the mechanism, sampling, clipping and noise, by canary authors whose gradients are seen separately.

Guarantees: the canaries change neither the model nor its losses nor its checkpoints, and reveal nothing about any other author.

How: each canary is an author like any other. It counts in N, is sampled by the same sampler, in the same microbatches, and
clipped by the same engine. Its samples have no targets; its loss has a gradient in one coordinate of its own behind the probe,
much larger than C. Half of the canaries, by secret coins, are in the data; the coordinates of the others hold noise alone. From
these coordinates and the probe come:

- a test of each step's release against its exact distribution (canary_monitor.py);
- a confidence interval for the noise, and so for epsilon, from the probe: if the noise is Gaussian and sampling is Poisson;
- lower bounds on epsilon by guessing who was in, from likelihood ratios (one_run_audit.py): for any mechanism, and a tighter one
  for a mechanism that is mu-GDP for some mu.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Optional

import numpy as np
import torch
from torch import nn

from author_dp.accounting.accountant import EpsilonAccountant
from author_dp.accounting.gaussian import gaussian_epsilon
from author_dp.accounting.ledger import REPORT_NAME
from author_dp.accounting.plan import PrivacyPlan
from author_dp.errors import UserError
from author_dp.files import read_json_object
from author_dp.guards.canary_monitor import CanaryMonitor
from author_dp.guards.one_run_audit import CONFIDENCE, gaussian_mu_lower_bound, one_run_lower_bound
from author_dp.guards.slot_monitors import SlotCanaryMonitor
from author_dp.mechanism.sampling import append_canary_sampling_hashes
from author_dp.types import IGNORE_INDEX, Batch

SAMPLES, TOKENS = 2, 2  # of a canary; with two samples or more, clipping each of them separately would show
GRAD_NORM_RATIO = 1e3  # norm of a canary's gradient before clipping, over the clip norm


class GradientCanaries:
    """Canaries of one run: their coins and their gradients.

    Args:
        number: m, each included with probability 1/2.
        key: 128 secret bits for the coins, the same on all processes and in every run that resumes this one.
    Attributes:
        included: bool (canaries,), the coins.
        table: (canaries, 1), the weights that receive the canaries' gradients; always zero.
        monitor: of the current training; None before `start`.
    """

    def __init__(self, number: int, key: int):
        generator = np.random.Generator(np.random.Philox(key=key))
        self.included = generator.random(number) < 0.5
        self.table = nn.Embedding(number, 1)
        nn.init.zeros_(self.table.weight)
        self.monitor: Optional[CanaryMonitor | SlotCanaryMonitor] = None

    def join(self, dataset: Any) -> "GradientCanaryDataset":
        """Return the data set (`data_utils.AuthorDataset`) with the included canaries as its last authors."""
        return GradientCanaryDataset(dataset, np.flatnonzero(self.included))

    def wrap_model(self, model: nn.Module) -> nn.Module:
        """Return a model that calls `model` and also holds the canaries' table, for a clipping engine."""
        return ModelWithCanaries(model, self.table.to(next(model.parameters()).device))

    def start(self, plan: PrivacyPlan) -> CanaryMonitor | SlotCanaryMonitor:
        """Start to monitor a training under `plan`, and return the monitor.

        Raises:
            UserError: for a run without noise, whose releases have no density.
        """
        if plan.disable_dp or plan.noise_multiplier == 0:
            raise UserError("--audit_kind gradient: it tests the noise, and this run has none. Leave out --audit_canaries")
        self.clip_norm = plan.clip_norm
        scale, sigma = plan.clip_norm / plan.expected_batch_size, plan.noise_multiplier
        if plan.slots:
            self.monitor = SlotCanaryMonitor(sigma, plan.coefficients(), plan.slots, self.included, scale)
        else:
            self.monitor = CanaryMonitor(sigma, plan.event(0).sample_rate, self.included, scale)
        return self.monitor

    def add_canary_losses(self, losses: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Add canary losses to the authors' losses, (authors,).

        Each has value zero, and a gradient of norm GRAD_NORM_RATIO x C in the canary's own coordinate.
        """
        canary = batch["canary"]  # (samples,), -1 for other authors
        if not bool((canary >= 0).any()):
            return losses
        weights = self.table(canary.clamp(min=0)[:, None])[:, 0, 0]  # (samples,)
        canary_losses = torch.where(canary >= 0, weights * (GRAD_NORM_RATIO * self.clip_norm), 0.0)
        return losses.index_add(0, batch["author"], canary_losses)

    def finish(self, trainer: Any) -> Optional[dict[str, Any]]:
        """Return the audit for privacy.json; on the main process with what needs the ledger.

        A finished run that is started again trains nothing. Its audit is then that of its report, None if that has none.

        Args:
            trainer: `dp_utils.DPTrainer`.
        """
        assert self.monitor is not None
        self.monitor.flush()
        return gradient_canary_result(self.monitor, trainer) if self.monitor.steps else load_gradient_canary_result(trainer)


# --- canaries in data and model -----------------------------------------------------------------------------


class ModelWithCanaries(nn.Module):
    """A model, unchanged, and beside it the canaries' table, so that a clipping engine finds both."""

    def __init__(self, model: nn.Module, table: nn.Embedding):
        super().__init__()
        self.model, self.table = model, table

    def forward(self, *args, **kwargs):
        return self.model(*args, **kwargs)


class GradientCanaryDataset(torch.utils.data.Dataset):
    """A data set whose last authors are canaries, with `SAMPLES` samples each.

    Args:
        dataset: `data_utils.AuthorDataset`.
        canaries: int (included,), the numbers of the included canaries.
    """

    def __init__(self, dataset: Any, canaries: np.ndarray):
        self.dataset, self.canaries = dataset, canaries
        self.num_rows = len(dataset.indices)
        ends = np.arange(1, len(canaries) + 1) * SAMPLES
        self.offsets = np.concatenate([dataset.offsets, self.num_rows + ends])
        self.hashes = append_canary_sampling_hashes(getattr(dataset, "hashes", None), len(canaries))
        # A data set may have more rows than its authors use: canaries' rows follow all of them.
        self.first_row = int(max(dataset.indices.max(initial=-1) + 1, len(dataset.samples)))
        self.indices = np.concatenate([dataset.indices, self.first_row + np.arange(len(canaries) * SAMPLES)])

    def __len__(self) -> int:
        """Number of authors."""
        return len(self.offsets) - 1

    def __getitems__(self, rows_of_authors: list[np.ndarray]) -> list[list[dict[str, Any]]]:
        """Fetch the samples of several authors; those of a canary have its number under "canary"."""
        real = [rows for rows in rows_of_authors if rows[0] < self.first_row]
        fetched = iter(self.dataset.__getitems__(real))
        return [next(fetched) if rows[0] < self.first_row else self._canary_samples(rows) for rows in rows_of_authors]

    def _canary_samples(self, rows: np.ndarray) -> list[dict[str, Any]]:
        canary = int(self.canaries[(rows[0] - self.first_row) // SAMPLES])
        return [{"input_ids": np.zeros(TOKENS, np.int32), "canary": canary} for _ in rows]


class CollateWithGradientCanaries:
    """Collate samples, and add `canary`, int64 (samples,), -1 for other authors; canaries' samples have no targets.

    A class, so that workers can be spawned.
    """

    def __init__(self, collate: Callable):
        self.collate = collate

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        canary = torch.tensor([sample.get("canary", -1) for sample in samples])
        batch = self.collate([{name: value for name, value in sample.items() if name != "canary"} for sample in samples])
        batch["labels"][canary >= 0] = IGNORE_INDEX
        return {**batch, "canary": canary}


# --- the audit's result -------------------------------------------------------------------------------------


def gradient_canary_result(monitor: CanaryMonitor | SlotCanaryMonitor, trainer: Any) -> dict[str, Any]:
    """Return lower bounds on epsilon, and on the main process the intervals that the noise gives."""
    scores, delta = monitor.log_likelihood_ratios(), trainer.plan.delta
    mu = gaussian_mu_lower_bound(scores, monitor.included)
    return {
        **one_run_lower_bound(scores, monitor.included, delta),
        "kind": "gradient",
        "epsilon_lower_bound_if_gaussian": round(gaussian_epsilon(mu, delta), 4) if mu > 0 else 0.0,
        "steps_checked": monitor.steps,
        **gradient_canary_intervals(trainer),
    }


def gradient_canary_intervals(trainer: Any) -> dict[str, Any]:
    """Return intervals for noise multiplier and epsilon at `CONFIDENCE`, from the probe; on the main process only.

    They are of this training; what earlier ones in the ledger spent counts as recorded. With balls-in-bins sampling there is none
    for epsilon: each of its ends would need a certificate.
    """
    monitor = trainer.monitors.noise
    if not trainer.is_world_process_zero() or monitor is None or not monitor.steps:
        return {}
    low, high = monitor.confidence_interval(CONFIDENCE)
    of_noise = {"noise_multiplier_between": [factor * trainer.plan.noise_multiplier for factor in (low, high)]}
    if trainer.plan.slots:
        return of_noise
    *earlier, event = trainer.budget.ledger.events
    epsilons = []
    for factor in (high, low):  # more noise gives less epsilon
        events = [*earlier, event._replace(noise_multiplier=event.noise_multiplier * factor)]
        epsilons.append(EpsilonAccountant(events, trainer.plan.delta).epsilon)
    return {**of_noise, "epsilon_between": [epsilon if np.isfinite(epsilon) else None for epsilon in epsilons]}


def load_gradient_canary_result(trainer: Any) -> Optional[dict[str, Any]]:
    """Return the gradient audit in the output directory's privacy.json; None if it has none."""
    path = Path(str(trainer.args.output_dir)) / REPORT_NAME
    audit = read_json_object(path).get("audit") if path.exists() else None
    return audit if audit and audit.get("kind") == "gradient" else None
