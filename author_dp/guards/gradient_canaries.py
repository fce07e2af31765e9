"""Audit a run by canary authors whose gradients are seen alone: the whole mechanism, draw, clip and noise, against its known law.

Promise: the canaries leave the model, its losses and its checkpoints alone, and tell nothing about any other author. What is
released for one is C [drawn] / B + N(0, (sigma C / B)^2), at each step, exactly; a run for which this does not hold is stopped,
one for which it holds only with probability below `FALSE_ALARM / CHECKS`.

How: each canary is an author like any other, counted in N, drawn by the same sampler, in the same microbatches, clipped by the
same engine. Its samples have no targets; its loss pushes one coordinate of its own behind the pad (mechanism.py), by far more
than C. Half of the canaries, by secret coins, are in the data; the coordinates of the others hold noise alone. From the
coordinates:

- the law: each value goes through its own distribution function and becomes a standard normal, to which the checks of the noise
  apply (selfcheck.py). Beside it the scores of sampling rate and clip norm, over all values, and of the rate for each canary,
  with Chernoff's bound [1];
- an interval for the noise, and so for epsilon, from the pad: if the noise is Gaussian and the draws are Poisson;
- a lower bound on epsilon, whatever the mechanism: who was in, guessed from likelihood ratios, by the one-run audit of [2]; and
  the tighter one of [3], for a mechanism that is mu-GDP for some mu.

References:
    [1] Boucheron, Lugosi and Massart 2013, Concentration Inequalities, section 2.2
    [2] Steinke, Nasr and Jagielski 2023, Privacy Auditing with One (1) Training Run, arXiv 2305.08846
    [3] Mahloujifar, Melis and Chaudhuri 2024, Auditing f-Differential Privacy in One Run, arXiv 2410.22235, algorithm 3
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Optional

import numpy as np
import torch
from scipy.special import expit, ndtr, ndtri
from torch import nn

from author_dp.accounting.accountant import EpsilonAccountant, gaussian_epsilon
from author_dp.accounting.ledger import REPORT_NAME
from author_dp.accounting.plan import PrivacyPlan
from author_dp.errors import UserError
from author_dp.guards.noise_inversion import MatchedFilter
from author_dp.guards.noise_monitor import NoiseMonitor
from author_dp.guards.text_canaries import CONFIDENCE, GUESS_SHARES, AuditedTrainer, guess_counts, lower_bound
from author_dp.mechanism.sampling import append_canary_hashes
from author_dp.types import IGNORE_INDEX, Batch

SAMPLES, TOKENS = 2, 2  # of a canary, at least two samples, so that a clip for each would show
PUSH = 1e3  # a canary's gradient over the clip norm, before clipping
MAX_RATIO = 8.0  # of a score, so that every moment of it exists
TILTS = np.geomspace(1e-3, 4.0, 40)  # at which Chernoff's bound is tried


class GradientCanaries:
    """Canaries of one run.

    Args:
        number: m, each included with probability 1/2.
        key: 128 secret bits for the coins, the same on all processes and in every run that goes on with this one.
    Attributes:
        included: bool (canaries,): the coins.
        table: (canaries, 1), the weights whose gradients are the canaries' own; always zero.
    """

    def __init__(self, number: int, key: int):
        generator = np.random.Generator(np.random.Philox(key=key))
        self.included = generator.random(number) < 0.5
        self.table = nn.Embedding(number, 1)
        nn.init.zeros_(self.table.weight)
        self.law: Optional[CanaryMonitor] = None

    def join(self, dataset: Any) -> "CanaryDataset":
        """Return the data set (`data_utils.AuthorDataset`) with the included canaries as its last authors."""
        return CanaryDataset(dataset, np.flatnonzero(self.included))

    def beside(self, model: nn.Module) -> nn.Module:
        """Return a model for a clipping engine that calls `model`, and holds the canaries' table."""
        return ModelWithCanaries(model, self.table.to(next(model.parameters()).device))

    def start(self, plan: PrivacyPlan) -> "CanaryMonitor":
        """Begin to check a run under `plan`, and return the check.

        Raises:
            UserError: for a run without noise, whose law has no density.
        """
        if plan.disable_dp or plan.noise_multiplier == 0:
            raise UserError("--audit_kind gradient checks the noise: it needs one; leave out --audit_canaries")
        self.clip_norm, self.expected_batch_size = plan.clip_norm, plan.expected_batch_size
        self.law = CanaryMonitor(plan.noise_multiplier, plan.event(0).sample_rate, self.included)
        return self.law

    def align(self, coefficients: np.ndarray, groups: np.ndarray) -> None:
        """Say how noise is correlated over steps, and the groups of all authors, those of the included canaries last."""
        assert self.law is not None
        own = np.zeros(len(self.included), np.int64)  # one who is not in has the same noise in every group
        own[self.included] = groups[len(groups) - int(self.included.sum()) :]
        self.law.filter = MatchedFilter(coefficients, own)

    def add(self, released: torch.Tensor) -> None:
        """Take the row of C x + z (bands.py) that one step released in the canaries' coordinates, (canaries,)."""
        assert self.law is not None
        self.law.add(released * (self.expected_batch_size / self.clip_norm))

    def push(self, losses: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Add the canaries' losses, which are zero but not flat, to those of the batch's authors, (authors,)."""
        which = batch["canary"]  # (samples,), -1 where there is none
        if not bool((which >= 0).any()):
            return losses
        looked_up = self.table(which.clamp(min=0)[:, None])[:, 0, 0]  # (samples,)
        pushed = torch.where(which >= 0, looked_up * (PUSH * self.clip_norm), 0.0)
        return losses.index_add(0, batch["author"], pushed)

    def finish(self, trainer: AuditedTrainer) -> Optional[dict[str, Any]]:
        """Return what privacy.json holds under "audit"; on the first process what needs the ledger, too.

        Of a finished run that is run again there is nothing to see, and what it saw itself stays; None where that is not known.
        """
        assert self.law is not None
        self.law.flush()
        if not self.law.steps:
            path = Path(str(trainer.args.output_dir)) / REPORT_NAME
            earlier = json.loads(path.read_text()).get("audit") if path.exists() else None
            return earlier if earlier and earlier.get("kind") == "gradient" else None
        found = lower_bound(self.law.scores(), self.included, trainer.plan.delta)
        mu = gaussian_mu_lower_bound(self.law.scores(), self.included)
        return {
            **found,
            "kind": "gradient",
            "epsilon_lower_bound_if_gaussian": round(gaussian_epsilon(mu, trainer.plan.delta), 4) if mu > 0 else 0.0,
            "steps_checked": self.law.steps,
            **self.interval(trainer),
        }

    def interval(self, trainer: Any) -> dict[str, Any]:
        """Return the noise multiplier and epsilon that the noise shows, with CONFIDENCE; on the first process only."""
        check, ledger = trainer.checks.noise, trainer.budget.ledger
        if not trainer.is_world_process_zero() or check is None or not check.steps:
            return {}
        factors, delta = check.interval(CONFIDENCE), trainer.plan.delta
        bounds = []
        for factor in reversed(factors):  # more noise, less epsilon
            events = [e._replace(noise_multiplier=e.noise_multiplier * factor) for e in ledger.events]
            bounds.append(EpsilonAccountant(events, delta).epsilon)
        return {
            "noise_multiplier_between": [factor * trainer.plan.noise_multiplier for factor in factors],
            "epsilon_between": [bound if np.isfinite(bound) else None for bound in bounds],
        }


class ModelWithCanaries(nn.Module):
    """A model as it is, and beside it the table of the canaries, for a clipping engine to find."""

    def __init__(self, model: nn.Module, table: nn.Embedding):
        super().__init__()
        self.model, self.table = model, table

    def forward(self, *args, **kwargs):
        return self.model(*args, **kwargs)


class CanaryDataset(torch.utils.data.Dataset):
    """A data set whose last authors are canaries, of SAMPLES samples each.

    Args:
        dataset: `data_utils.AuthorDataset`.
        canaries: int (included,), which they are.
    """

    def __init__(self, dataset: Any, canaries: np.ndarray):
        self.dataset, self.canaries = dataset, canaries
        self.rows = len(dataset.indices)
        ends = np.arange(1, len(canaries) + 1) * SAMPLES
        self.offsets = np.concatenate([dataset.offsets, self.rows + ends])
        self.hashes = append_canary_hashes(getattr(dataset, "hashes", None), len(canaries))
        # The rows of a data set may be more than those of its authors: canaries' rows come behind all of them.
        self.first = int(max(dataset.indices.max(initial=-1) + 1, len(dataset.samples)))
        self.indices = np.concatenate([dataset.indices, self.first + np.arange(len(canaries) * SAMPLES)])

    def __len__(self) -> int:
        """Number of authors."""
        return len(self.offsets) - 1

    def __getitems__(self, draws: list[np.ndarray]) -> list[list[dict[str, Any]]]:
        """Fetch the samples of several authors; those of a canary hold which it is."""
        real = [draw for draw in draws if draw[0] < self.first]
        found = iter(self.dataset.__getitems__(real))
        return [next(found) if draw[0] < self.first else self.samples_of(draw) for draw in draws]

    def samples_of(self, draw: np.ndarray) -> list[dict[str, Any]]:
        canary = int(self.canaries[(draw[0] - self.first) // SAMPLES])
        return [{"input_ids": np.zeros(TOKENS, np.int32), "canary": canary} for _ in draw]


class CollateWithCanaries:
    """Collate samples, and say which are canaries': `canary`, int64 (samples,), -1 for the others; these have no targets.

    A class, so that workers can be spawned.
    """

    def __init__(self, collate: Callable):
        self.collate = collate

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        canary = torch.tensor([sample.get("canary", -1) for sample in samples])
        batch = self.collate([{name: value for name, value in sample.items() if name != "canary"} for sample in samples])
        batch["labels"][canary >= 0] = IGNORE_INDEX
        return {**batch, "canary": canary}


# --- the law ----------------------------------------------------------------------------------------------


class CanaryMonitor(NoiseMonitor):
    """Test x = [drawn] + sigma z of the canaries that are in, sigma z of the others, over all steps.

    Args:
        sigma: the noise multiplier.
        rate: q.
        included: bool (canaries,).
    """

    def __init__(self, sigma: float, rate: float, included: np.ndarray):
        super().__init__(std=1.0)
        self.sigma, self.rate, self.included = sigma, rate, included
        self._evidence = np.zeros(len(included))  # log likelihood ratio of being in, for each canary
        self._score = np.zeros((2, int(included.sum())))  # of rate and clip norm, for each canary that is in
        self._law = ScoreDistribution(sigma, rate)
        self.filter: Optional[MatchedFilter] = None

    def add(self, pad: torch.Tensor) -> None:
        """Take what one step released over C / B, flat; with noise bands, each time a canary's group was drawn is one value."""
        value = pad if self.filter is None else self.filter(pad)
        if value is not None:
            super().add(value)

    def _flush_one(self, pad: np.ndarray) -> None:
        """Take the released values of one step over C / B, (canaries,)."""
        log_ratio = (pad - 0.5) / self.sigma**2  # of densities, drawn over not drawn
        self._evidence += log_ratio if self.rate == 1 else np.logaddexp(np.log1p(-self.rate), np.log(self.rate) + log_ratio)
        self._score += score(pad[self.included], self.sigma, self.rate) - self._law.mean[:, None]
        normal = pad / self.sigma
        normal[self.included] = to_normal(pad[self.included], self.sigma, self.rate)
        super()._flush_one(normal)

    def scores(self) -> np.ndarray:
        """Return how much more likely each canary's values are if it is in, (canaries,)."""
        self.flush()
        return self._evidence

    def p_values(self) -> dict[str, float]:
        found = super().p_values()
        found.pop("draws that are equal", None)  # among very many float32 numbers about 0 or 1 some are
        if not np.isfinite(self._score).all():
            return {"values that are not finite": 0.0}
        number = self._score.shape[1]
        for k, name in enumerate(("the rate at which canaries are drawn", "the norm to which they are clipped")):
            found[name] = self._law.p_value(k, self._score[k].sum(), number * self.steps)
        extremes = [self._score[0].max(initial=0.0), self._score[0].min(initial=0.0)]
        rarest = min(self._law.p_value(0, one, self.steps) for one in extremes)
        found["the draws of one canary"] = min(1.0, max(1, number) * rarest)  # none of no canary is odd
        return found

    def failure_message(self, failed: str) -> str:
        return f"what is released for canaries is not the law of draw, clip and noise, in {failed} (seen in {self.steps} steps)"


def to_normal(x: np.ndarray, sigma: float, rate: float) -> np.ndarray:
    """Map draws from (1 - rate) N(0, sigma^2) + rate N(1, sigma^2) to standard normals, through their distribution function."""
    below = (1 - rate) * ndtr(x / sigma) + rate * ndtr((x - 1) / sigma)
    above = (1 - rate) * ndtr(-x / sigma) + rate * ndtr((1 - x) / sigma)
    return np.where(below < above, ndtri(below), -ndtri(above))


def score(x: np.ndarray, sigma: float, rate: float) -> np.ndarray:
    """Return the scores of rate and clip norm at their true values, (2, ...), each capped at CAP.

    With L the ratio of the densities of drawn and not drawn, and w = q L / (1 - q + q L) the probability of having been drawn,
    they are derivatives of log(1 - q + q L): w / q - (1 - w) / (1 - q) by q, here times q, and w (x - 1) / sigma^2 by the norm,
    here times sigma.
    """
    log_odds = (x - 0.5) / sigma**2 + (np.log(rate) - np.log1p(-rate) if rate < 1 else np.inf)
    drawn = expit(log_odds)
    of_rate = drawn - (expit(-log_odds) * rate / (1 - rate) if rate < 1 else 1.0)
    return np.clip(np.stack([of_rate, drawn * (x - 1) / sigma]), -MAX_RATIO, MAX_RATIO)


class ScoreDistribution:
    """The law of both scores under the law of x, by quadrature.

    Attributes:
        mean, variance: (2,).
    """

    def __init__(self, sigma: float, rate: float):
        x = np.linspace(-12 * sigma, 1 + 12 * sigma, 40_001)
        normal = np.exp(-(np.stack([x, x - 1]) ** 2) / (2 * sigma**2)) / (sigma * np.sqrt(2 * np.pi))
        weights = (1 - rate) * normal[0] + rate * normal[1]
        weights /= weights.sum()
        scores = score(x, sigma, rate)
        self.mean = scores @ weights
        centred = scores - self.mean[:, None]
        self.variance = centred**2 @ weights
        # log E exp(t s) for positive and negative t, (2 scores, 2 signs, steps of t)
        signs = np.array([1.0, -1.0])[:, None, None]
        self._cumulants = np.log(np.exp(signs * TILTS[:, None] * centred[:, None, None, :]) @ weights)

    def p_value(self, which: int, total: float, terms: int) -> float:
        """Bound the probability that a sum of so many independent centred scores is as far from 0 as `total`: Chernoff's [1]."""
        if self.variance[which] < 1e-12:  # the rate's, at rate 1
            return 1.0
        exponents = terms * self._cumulants[which, 0 if total > 0 else 1] - TILTS * abs(total)
        return min(1.0, 2 * float(np.exp(min(0.0, exponents.min()))))


# --- the bound by one run, for mu-GDP [3] --------------------------------------------------------------------


def gaussian_mu_lower_bound(scores: np.ndarray, included: np.ndarray) -> float:
    """Return the largest mu for which the guesses rule out that the run is mu-GDP, with CONFIDENCE; 0 if none."""
    allowed, best = (1 - CONFIDENCE) / len(GUESS_SHARES), 0.0
    for number, correct in guess_counts(scores, included):
        low, high = 0.0, 40.0
        while high - low > 1e-4:
            middle = (low + high) / 2
            low, high = (middle, high) if rejects_mu(middle, len(scores), number, correct, allowed) else (low, middle)
        best = max(best, low)
    return best


def rejects_mu(mu: float, canaries: int, number: int, correct: int, probability: float) -> bool:
    """Whether `correct` of `number` guesses have less than this probability where the run is mu-GDP. Algorithm 3 of [3].

    With p_j the probability of j right guesses, r_i = sum_{j >= i} j p_j / m is that of a random canary being guessed rightly
    with i or more right in all, h_i = sum_{j >= i} (number - j) p_j / m that of it being guessed wrongly. To turn its coin makes
    a right guess among i + 1 a wrong one among i, so r_{i+1} <= 1 - f(h_i). If `correct` or more were as likely as `probability`,
    r_0 + h_0 would come out above number / m, which it is.
    """
    right, wrong = probability * correct / canaries, probability * (number - correct) / canaries
    for i in range(correct - 1, -1, -1):
        least = max(wrong, float(ndtr(ndtri(min(right, 1.0)) - mu)))
        right, wrong = right + i / (number - i) * (least - wrong), least
        if right + wrong > number / canaries:
            return True
    return False
