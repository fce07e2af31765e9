"""What a run promises: its public parameters, what the log says about them, and what privacy.json repeats.

Promise: everything in a `PrivacyPlan` is public, and follows from options and the number of authors and samples alone; with
`hide_counts` from options alone, but for these two numbers, which `public` then leaves out.

Example:

    >>> plan = make_plan(privacy, args, offsets)
    >>> plan.report(epsilon=7.98, steps=154)["epsilon"]
    7.98
"""

import math
from dataclasses import asdict, dataclass, fields
from typing import Any, Optional

import numpy as np

from author_dp.accounting.accountant import (
    MechanismEvent,
    cyclic_event,
    cyclic_sample_rate,
    find_noise_multiplier,
    format_guarantee,
)
from author_dp.accounting.banded_mf import BAND_CHOICES, choose_bands, error_ratio, toeplitz_coefficients
from author_dp.errors import UserError

FEW_AUTHORS, LARGE_DELTA = 1_000, 1e-3  # below and above which a delta is explained, and warned of
RESUME_NOTE = (
    "the earlier steps are accounted by themselves, rounded up to whole cycles: up to one accounted step more, so that the "
)
RESUME_NOTE += "target may not allow the last steps"
SMALL_BATCH, GOOD_BATCH = 64, 256  # authors: below the first the log has advice
FEW_STEPS, ENOUGH_STEPS = 20, 60  # the same of steps


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
    hide_counts: bool = False
    noise_bands: int = 1  # b

    def spending(self, steps: int) -> MechanismEvent:
        """Return what so many steps of a training spend."""
        return cyclic_event(self.noise_multiplier, self.sample_rate, steps, self.noise_bands)

    def coefficients(self) -> np.ndarray:
        """Return the band coefficients of a training, float64 (bands,)."""
        return toeplitz_coefficients(self.noise_bands, self.steps)

    def public(self) -> dict[str, Any]:
        """Return what a ledger's header may hold."""
        hidden = {"num_authors": None, "num_samples": None} if self.hide_counts else {}
        return {**asdict(self), **hidden}

    def report(
        self, epsilon: float, steps: int, accountant: str = "prv", accounted_steps: Optional[int] = None
    ) -> dict[str, Any]:
        """Return what privacy.json holds.

        Args:
            epsilon: spent so far; null in the report where it is infinite or there is no DP.
            steps: taken so far, by this run and earlier ones.
            accountant: whose bound epsilon is.
            accounted_steps: in how many of them an author's group was drawn, at most; by default all.
        """
        return {
            "privacy_unit": "author",
            "adjacency": "add-or-remove-one",
            "accountant": accountant,
            "sampling": "poisson" if self.noise_bands == 1 else "cyclic-poisson",
            "epsilon": epsilon if math.isfinite(epsilon) and not self.disable_dp else None,
            "delta": None if self.disable_dp else self.delta,
            "target_epsilon": self.target_epsilon,
            "noise_multiplier": None if self.disable_dp else self.noise_multiplier,
            "clip_norm": None if self.disable_dp else self.clip_norm,
            "sample_rate": self.sample_rate,
            "expected_batch_size": self.expected_batch_size,
            "steps": steps,
            "noise_bands": self.noise_bands,
            "accounted_sample_rate": cyclic_sample_rate(self.sample_rate, self.noise_bands),
            "accounted_steps": steps if accounted_steps is None else accounted_steps,
            **{name: self.public()[name] for name in ("num_authors", "num_samples")},
            "samples_per_author": self.samples_per_author,
            "clipping": None if self.disable_dp else self.clipping,
            "world_size": self.world_size,
            "disable_dp": self.disable_dp,
        }

    def summary(
        self, samples_of_authors: np.ndarray, trained: int, parameters: int, epsilon: float, earlier_steps: int, left: int = 0
    ) -> str:
        """Return what will happen, for the log before training.

        Args:
            samples_of_authors: number of samples of each author, (authors,).
            trained, parameters: numbers of trained and of all parameters.
            epsilon: at which the training will end.
            earlier_steps: taken by earlier runs.
            left: steps that the training will take now.
        """
        median, largest = np.median(samples_of_authors), samples_of_authors.max()
        lines = [
            "*** NO PRIVACY: --disable_dp ***" if self.disable_dp else "Author-level DP fine-tuning",
            f"  authors (N)             {self.num_authors:,} with {self.num_samples:,} samples; samples per author: median "
            f"{median:g}, largest {largest:,}, used per step (k) {self.samples_per_author}",
            f"  sample rate (q)         {self.sample_rate:.6g}, {self.format_batch()}",
            f"  steps                   {self.steps:,}"
            + (f", {earlier_steps:,} taken by earlier runs, {left:,} left" if earlier_steps else ""),
            f"  trained parameters      {trained:,} of {parameters:,}",
        ]
        if not self.disable_dp:
            lines += [
                f"  clip norm (C)           {self.clip_norm:g} per author, by {self.clipping}",
                f"  noise multiplier        {self.noise_multiplier:.4f}",
                *([f"  noise bands (b)         {self.format_bands()}"] if self.noise_bands > 1 else []),
                *([f"    a new mechanism begins, and {RESUME_NOTE}"] if self.noise_bands > 1 and earlier_steps else []),
                f"  guarantee at the end    {format_guarantee(epsilon, self.delta)}",
                *([f"  delta                   {self.format_delta()}"] if self.num_authors < FEW_AUTHORS else []),
                "  Losses, metrics and gradient statistics in logs are computed on private data: not covered by the promise.",
                *(
                    ["  --hide_counts: this log tells numbers of authors and samples, so it is private."]
                    if self.hide_counts
                    else []
                ),
            ]
        return "\n".join(lines)

    def format_bands(self) -> str:
        words = (
            f"{self.noise_bands}: noise correlated over steps; accounted as {self.spending(self.steps).steps:,} steps at sample "
            f"rate {self.spending(0).sample_rate:.6g}"
        )
        if self.target_epsilon is not None:
            known = self.noise_multiplier, self.sample_rate, self.steps, self.noise_bands, self.target_epsilon, self.delta
            words += f"; sums of updates are {error_ratio(*known):.2f} as noisy as by independent noise of the same epsilon"
        return words

    def format_batch(self) -> str:
        drawn, divisor = self.sample_rate * self.num_authors, self.expected_batch_size
        if abs(min(divisor, self.num_authors) - drawn) < 1e-6 * drawn:
            return f"expected batch size (B) {divisor:,} authors"
        return f"expected batch {drawn:,.1f} authors, their sum divided by the constant {divisor:,} (B)"

    def format_delta(self) -> str:
        return (
            f"{self.delta:.2g}: what published all texts of one author in {1 / self.delta:,.0f}, and no other, would keep it too"
        )

    def delta_warning(self) -> Optional[str]:
        """Return what is to be said of a delta that promises little; 1 / N, the default, does where authors are few."""
        if self.disable_dp or self.delta <= LARGE_DELTA:
            return None
        return f"--target_delta: delta is {self.format_delta()}. Set it lower, to 1e-5 or so; the noise follows"

    def tuning_hint(self) -> Optional[str]:
        """Return what stands in the way of a good model, if it can be told from the plan."""
        if self.expected_batch_size < SMALL_BATCH and self.sample_rate < 1:
            return (
                f"An expected batch of {self.expected_batch_size} authors is small, noise outweighs them: raise "
                f"--gradient_accumulation_steps, so that it becomes {GOOD_BATCH} or so"
            )
        if self.steps < FEW_STEPS:
            epochs = math.ceil(ENOUGH_STEPS * self.sample_rate)
            return (
                f"{self.steps} steps teach little: raise --num_train_epochs, to {epochs} or so, or --max_steps if you gave it; "
                "under --target_epsilon the noise follows"
            )
        return None


def plan_of(header: dict[str, Any]) -> PrivacyPlan:
    """Return the plan that a ledger's header holds; its numbers of authors and samples are None with --hide_counts."""
    names = {field.name for field in fields(PrivacyPlan)}
    return PrivacyPlan(**{name: value for name, value in header.items() if name in names})


def make_plan(
    privacy: Any, args: Any, offsets: np.ndarray, earlier: Optional[dict[str, Any]] = None, most_bands: int = BAND_CHOICES[-1]
) -> PrivacyPlan:
    """Work out sample rate, steps and noise.

    Args:
        privacy: dp_utils.PrivacyArguments.
        args: transformers.TrainingArguments, whose import would take ledger.py a second.
        offsets: (authors + 1,), from `data_utils.group_by_author`.
        earlier: header of the run that is resumed, if any, whose noise this one has; otherwise it is as given or calibrated.
        most_bands: for whose noise there is memory.
    Raises:
        UserError: for fewer than two authors, or a target that cannot be reached.
    """
    num_authors = len(offsets) - 1
    if num_authors < 2:
        raise UserError(
            "--author_column: there is one author only, whom no noise can hide among others; give data of many authors"
        )
    batch_size = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    sample_rate = privacy.sample_rate or min(1.0, batch_size / num_authors)
    steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs / sample_rate)
    delta = privacy.target_delta if privacy.target_delta is not None else 1 / num_authors
    bands = 1 if privacy.disable_dp else resolve_num_bands(privacy, earlier, sample_rate, steps, delta, most_bands)
    if privacy.disable_dp:
        sigma = 0.0
    elif privacy.noise_multiplier is not None:
        sigma = privacy.noise_multiplier
    elif earlier is not None:
        sigma = earlier["noise_multiplier"]
    else:
        accounted = cyclic_event(0.0, sample_rate, steps, bands)
        sigma = find_noise_multiplier(accounted.sample_rate, accounted.steps, privacy.target_epsilon, delta)
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
        hide_counts=privacy.hide_counts,
        noise_bands=bands,
    )


def resolve_num_bands(
    privacy: Any, earlier: Optional[dict[str, Any]], sample_rate: float, steps: int, delta: float, most_bands: int
) -> int:
    """Return --noise_bands as a number, that of the run that is resumed where there is one.

    Raises:
        UserError: for another one than before, or too many.
    """
    asked = privacy.noise_bands
    if earlier is not None:
        before = earlier.get("noise_bands", 1)
        if asked not in (None, "auto", str(before)):
            raise UserError(f"--noise_bands {asked}: the run that this one goes on with has {before}; give that, or leave it out")
        asked = str(before)
    if asked == "auto":
        return choose_bands(sample_rate, steps, privacy.target_epsilon, delta, most_bands)
    bands = int(asked or 1)
    cyclic_sample_rate(sample_rate, bands)  # which refuses too many
    if bands > steps:
        raise UserError(f"--noise_bands {bands} is more than the {steps} steps of the run: lower it")
    return bands
