"""What is promised and what is spent: the epsilon of steps, the noise for a target, the report.

Promise: every epsilon is an upper bound for add-or-remove-one adjacency and Poisson sampling, computed from public
parameters alone.

Example:

    >>> sigma = find_noise_multiplier(sample_rate=0.01, steps=1000, target_epsilon=8.0, target_delta=1e-5)
    >>> compute_epsilon(sigma, sample_rate=0.01, steps=1000, delta=1e-5) <= 8.0
    True

References:
    [1] Gopi, Lee and Wutschitz 2021, Numerical Composition of Differential Privacy, arXiv 2106.02848 (the PRV accountant)
    [2] Mironov, Talwar and Zhang 2019, Renyi DP of the Sampled Gaussian Mechanism, arXiv 1908.10530 (the cheap bound)
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Optional

import numpy as np
from opacus.accountants import RDPAccountant
from opacus.accountants.analysis.prv import (
    Domain,
    PoissonSubsampledGaussianPRV,
    TruncatedPrivacyRandomVariable,
    compose_heterogeneous,
    compute_safe_domain_size,
    discretize,
)
from transformers.utils import logging

from author_dp.errors import UserError

logger = logging.get_logger(f"transformers.{__name__}")

SMALL_BATCH, FEW_STEPS, ENOUGH_STEPS = 64, 20, 60  # authors, steps: below the first two the log has advice
EPSILON_BEYOND_USE = 1_000.0  # from here on epsilon is the cheap bound [2]; the grid of [1] would take minutes and GBs


class Spending(NamedTuple):
    """A number of steps of the Poisson-subsampled Gaussian mechanism."""

    noise_multiplier: float
    sample_rate: float
    steps: int


def compose(spendings: Sequence[Spending]) -> list[Spending]:
    """Add up the steps of equal mechanisms; the order of composition does not matter."""
    steps: dict[tuple[float, float], int] = {}
    for sigma, rate, count in spendings:
        steps[sigma, rate] = steps.get((sigma, rate), 0) + count
    return [Spending(*mechanism, count) for mechanism, count in steps.items() if count > 0]


def rdp_epsilon(spendings: Sequence[Spending], delta: float) -> float:
    """Cheap upper bound by Renyi differential privacy at integer orders, which have a closed form [2]."""
    if any(spending.noise_multiplier == 0 for spending in spendings):
        return math.inf
    accountant = RDPAccountant()
    accountant.history = [tuple(spending) for spending in spendings]
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")  # that the best order is the smallest or largest one: it is a bound all the same
        epsilon = accountant.get_epsilon(delta, alphas=[*range(2, 64), 96, 128, 192, 256, 384, 512, 768, 1024])
    return math.inf if math.isnan(epsilon) else max(0.0, float(epsilon))


class PrivacyLoss:
    """Upper bound on the epsilon of composed steps, by numerical composition of privacy loss variables [1].

    The grid is made once, for `planned`; `epsilon` then costs two FFTs a mechanism for any smaller numbers of
    steps. Opacus' default error of 0.01 in epsilon would cost 1 % of noise at epsilon 1, so here the error is
    0.2 % of epsilon, of which a coarse grid tells the size.

    Args:
        planned: the mechanisms, each with the largest number of steps that will be asked about.
        delta: the delta at which epsilon is asked for.
    """

    MAX_CELLS = 2**23  # of the grid: 64 MB an array, about two seconds

    def __init__(self, planned: Sequence[Spending], delta: float):
        self.delta = delta
        self.delta_error = delta / 1000
        self.variables: dict[tuple[float, float], Any] = {}
        planned = compose(planned)
        bound = rdp_epsilon(planned, delta) if planned else 0.0
        if planned and bound <= EPSILON_BEYOND_USE:
            try:
                self._discretize(planned, max(1e-4, 2e-2 * bound))
                finer = max(1e-4, 2e-3 * self.epsilon(planned))
                if finer < 0.9 * self.epsilon_error and self.cells < 0.9 * self.MAX_CELLS:
                    self._discretize(planned, finer)
            except (RuntimeError, ValueError) as error:
                logger.warning(f"The PRV accountant cannot handle these parameters ({error}); epsilon is the RDP bound.")
        # Whose bound `epsilon` is; without noise there is none.
        self.accountant = "prv" if self.variables or bound in (0.0, math.inf) else "rdp"

    def _discretize(self, planned: list[Spending], epsilon_error: float) -> None:
        """Opacus' PRVAccountant, taken apart so that the grid is made once ([1], Algorithm 1 and Remark 5.6)."""
        steps = [spending.steps for spending in planned]
        variables = [PoissonSubsampledGaussianPRV(s.sample_rate, s.noise_multiplier) for s in planned]
        with warnings.catch_warnings(), np.errstate(all="ignore"):  # log(0) at q = 1 is handled by their np.where
            warnings.simplefilter("ignore")
            cells_per_error = math.sqrt(sum(steps) * math.log(12 / self.delta_error) / 2)
            epsilon_error = min(0.1, epsilon_error)
            bound = compute_safe_domain_size(variables, steps, epsilon_error, self.delta_error)
            epsilon_error = max(epsilon_error, 2 * bound * cells_per_error / self.MAX_CELLS)
            domain = Domain.create_aligned(-bound, bound, epsilon_error / cells_per_error)
            truncated = [TruncatedPrivacyRandomVariable(variable, domain.t_min, domain.t_max) for variable in variables]
            discrete = [discretize(variable, domain) for variable in truncated]
        self.epsilon_error, self.cells = epsilon_error, domain.size
        self.variables = {spending[:2]: variable for spending, variable in zip(planned, discrete)}

    def epsilon(self, spendings: Sequence[Spending]) -> float:
        """Return an upper bound on the epsilon of `spendings`, at most those planned; inf without noise."""
        spendings = compose(spendings)
        if not spendings:
            return 0.0
        bound = rdp_epsilon(spendings, self.delta)
        if not self.variables:
            return bound
        variables = [self.variables[spending[:2]] for spending in spendings]
        try:
            composed = compose_heterogeneous(variables, [spending.steps for spending in spendings])
            with np.errstate(all="ignore"):
                _, _, upper = composed.compute_epsilon(self.delta, self.delta_error, self.epsilon_error)
        except (RuntimeError, ValueError):  # a delta beyond floating point: the bound holds all the same
            return bound
        return min(bound, max(0.0, float(upper))) if math.isfinite(upper) else bound


def compute_epsilon(noise_multiplier: float, sample_rate: float, steps: int, delta: float) -> float:
    """Return an upper bound on the epsilon of `steps` steps at add-or-remove-one adjacency.

    Args:
        noise_multiplier: sigma, noise standard deviation over clip norm; 0 gives inf.
        sample_rate: q, probability that an author is in a step's batch; 1 is the Gaussian mechanism.
        steps: number of noisy steps released.
        delta: the delta of (epsilon, delta).
    Returns:
        The PRV accountant's upper bound [1]; above 1,000 the RDP bound, which is at hand at once.
    Raises:
        UserError (a ValueError): for an argument out of range.
    """
    if not noise_multiplier >= 0 or not 0 <= sample_rate <= 1 or steps < 0 or not 0 < delta < 1:
        raise UserError(
            f"no epsilon for noise_multiplier {noise_multiplier}, sample_rate {sample_rate}, steps {steps}, delta {delta}"
        )
    if sample_rate == 0:
        return 0.0
    spending = [Spending(noise_multiplier, sample_rate, steps)]
    return PrivacyLoss(spending, delta).epsilon(spending)


def find_noise_multiplier(sample_rate: float, steps: int, target_epsilon: float, target_delta: float) -> float:
    """Return the smallest noise multiplier, to 0.1 % of epsilon, whose `compute_epsilon` is at most the target.

    Args:
        sample_rate: q, probability that an author is in a step's batch.
        steps: number of noisy steps.
        target_epsilon, target_delta: the promise; epsilon never exceeds it.
    Raises:
        UserError (a ValueError): for an argument out of range, or a target that no noise reaches.
    """
    if not 0 < target_epsilon < math.inf or steps < 1 or not 0 < sample_rate <= 1 or not 0 < target_delta < 1:
        raise UserError(
            f"no noise for target_epsilon {target_epsilon}, target_delta {target_delta}, sample_rate {sample_rate}, {steps} steps"
        )

    def excess(sigma: float) -> float:
        """log(epsilon / target): negative where the promise is kept; nearly linear in log sigma."""
        epsilon = compute_epsilon(sigma, sample_rate, steps, target_delta)
        return math.log(max(epsilon, 1e-12) / target_epsilon) if epsilon < math.inf else math.inf

    # Bracket: `high` keeps the promise, `low` breaks it. The cheap bound tells where to begin.
    high = 0.1
    while high < 1e3 and rdp_epsilon([Spending(high, sample_rate, steps)], target_delta) > target_epsilon:
        high *= 1.1
    while (at_high := excess(high)) > 0:
        high *= 2
        if high > 1e6:
            raise UserError(f"--target_epsilon {target_epsilon} at delta {target_delta} is out of reach: raise it")
    low = high / 1.2
    while (at_low := excess(low)) <= 0 and low > 1e-3:
        high, at_high, low = low, at_low, low / 1.2
    # Regula falsi on the logarithms, aimed just below the target and kept off the ends.
    while at_high < -1e-3 and high / low > 1 + 1e-5:
        weight = (at_low + 5e-4) / (at_low - at_high) if math.isfinite(at_low) else 0.5
        middle = math.exp(math.log(low) + min(0.95, max(0.05, weight)) * math.log(high / low))
        at_middle = excess(middle)
        if at_middle <= 0:
            high, at_high = middle, at_middle
        else:
            low, at_low = middle, at_middle
    return high


# --- the promise --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PrivacyPlan:
    """The public parameters of a run; the report repeats them."""

    target_epsilon: Optional[float]
    delta: float
    noise_multiplier: float
    clip_norm: float
    sample_rate: float
    expected_batch_size: int
    steps: int  # that the run is calibrated for
    num_authors: int
    num_samples: int
    samples_per_author: int
    clipping: str
    world_size: int
    disable_dp: bool

    def report(self, epsilon: float, steps: int, accountant: str = "prv") -> dict[str, Any]:
        """Return what privacy.json holds.

        Args:
            epsilon: spent so far; null in the report where it is infinite or there is no DP.
            steps: taken so far, by this run and earlier ones.
            accountant: whose bound epsilon is.
        """
        return {
            "privacy_unit": "author",
            "adjacency": "add-or-remove-one",
            "accountant": accountant,
            "sampling": "poisson",
            "epsilon": epsilon if math.isfinite(epsilon) and not self.disable_dp else None,
            "delta": None if self.disable_dp else self.delta,
            "target_epsilon": self.target_epsilon,
            "noise_multiplier": None if self.disable_dp else self.noise_multiplier,
            "clip_norm": None if self.disable_dp else self.clip_norm,
            "sample_rate": self.sample_rate,
            "expected_batch_size": self.expected_batch_size,
            "steps": steps,
            "num_authors": self.num_authors,
            "num_samples": self.num_samples,
            "samples_per_author": self.samples_per_author,
            "clipping": None if self.disable_dp else self.clipping,
            "world_size": self.world_size,
            "disable_dp": self.disable_dp,
        }

    def summary(self, samples_of_authors: np.ndarray, trained: int, parameters: int, epsilon: float, earlier_steps: int) -> str:
        """Return what will happen, for the log before training.

        Args:
            samples_of_authors: number of samples of each author, (authors,).
            trained, parameters: numbers of trained and of all parameters.
            epsilon: after all planned steps and the earlier ones.
            earlier_steps: taken by earlier runs.
        """
        median, largest = np.median(samples_of_authors), samples_of_authors.max()
        lines = [
            "*** NO PRIVACY: --disable_dp ***" if self.disable_dp else "Author-level DP fine-tuning",
            f"  authors (N)             {self.num_authors:,} with {self.num_samples:,} samples; samples per author: median "
            f"{median:g}, largest {largest:,}, used per step (k) {self.samples_per_author}",
            f"  sample rate (q)         {self.sample_rate:.6g}, expected batch size (B) {self.expected_batch_size:,} authors",
            f"  steps                   {self.steps:,}" + (f", {earlier_steps:,} taken by earlier runs" if earlier_steps else ""),
            f"  trained parameters      {trained:,} of {parameters:,}",
        ]
        if not self.disable_dp:
            lines += [
                f"  clip norm (C)           {self.clip_norm:g} per author, by {self.clipping}",
                f"  noise multiplier        {self.noise_multiplier:.4f}",
                f"  promise after all steps {guarantee_in_words(epsilon, self.delta)}",
                "  Losses, metrics and gradient statistics in logs are computed on private data: not covered by the promise.",
            ]
        return "\n".join(lines)

    def advice(self) -> Optional[str]:
        """Return what stands in the way of a good model, if it can be told from the plan."""
        if self.expected_batch_size < SMALL_BATCH and self.sample_rate < 1:
            return (
                f"An expected batch of {self.expected_batch_size} authors is small, noise outweighs them: raise "
                "--gradient_accumulation_steps, to 256 authors or so"
            )
        if self.steps < FEW_STEPS:
            epochs = math.ceil(ENOUGH_STEPS * self.sample_rate)
            return (
                f"{self.steps} steps teach little: raise --num_train_epochs, to {epochs} or so, or --max_steps if you gave it; "
                "under --target_epsilon the noise follows"
            )
        return None


def make_plan(privacy: Any, args: Any, offsets: np.ndarray, noise_multiplier: Optional[float] = None) -> PrivacyPlan:
    """Work out sample rate, steps and noise.

    Args:
        privacy: dp_utils.PrivacyArguments.
        args: transformers.TrainingArguments, whose import would take ledger.py a second.
        offsets: (authors + 1,), from `data_utils.group_by_author`.
        noise_multiplier: of the run that is resumed, if any; otherwise it is as given or calibrated.
    Raises:
        UserError: for fewer than two authors, or a target that cannot be reached.
    """
    num_authors = len(offsets) - 1
    if num_authors < 2:
        raise UserError(
            "--author_column: there is one author only, whom no noise can hide among others; give data of many authors"
        )
    batch_size = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    sample_rate = min(1.0, batch_size / num_authors)
    steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs / sample_rate)
    delta = privacy.target_delta if privacy.target_delta is not None else 1 / num_authors
    if privacy.disable_dp:
        sigma = 0.0
    elif privacy.noise_multiplier is not None:
        sigma = privacy.noise_multiplier
    elif noise_multiplier is not None:
        sigma = noise_multiplier
    else:
        sigma = find_noise_multiplier(sample_rate, steps, privacy.target_epsilon, delta)
    return PrivacyPlan(
        target_epsilon=None if privacy.disable_dp else privacy.target_epsilon,
        delta=delta,
        noise_multiplier=sigma,
        clip_norm=math.inf if privacy.disable_dp else privacy.per_sample_max_grad_norm,
        sample_rate=sample_rate,
        expected_batch_size=batch_size,
        steps=steps,
        num_authors=num_authors,
        num_samples=int(offsets[-1]),
        samples_per_author=privacy.samples_per_author,
        clipping=privacy.clipping,
        world_size=args.world_size,
        disable_dp=privacy.disable_dp,
    )


def guarantee_in_words(epsilon: Optional[float], delta: float) -> str:
    """One phrase for people; epsilon is rounded up."""
    if epsilon is None or math.isinf(epsilon):
        return "no privacy guarantee (epsilon is infinite)"
    return f"epsilon {math.ceil(epsilon * 100) / 100:.2f} at delta {delta:.2g} (author level, add or remove one)"
