"""Describe a privacy plan in the log: a summary before training, warnings and hints."""

import math
from typing import Optional

import numpy as np

from author_dp.accounting.accountant import format_guarantee
from author_dp.accounting.banded_mf import error_ratio
from author_dp.accounting.plan import PrivacyPlan

FEW_AUTHORS = 1_000  # below it, the summary explains delta
LARGE_DELTA = 1e-3  # above it, the log warns of delta
SMALL_BATCH, GOOD_BATCH = 64, 256  # authors: below the first, the log recommends the second
FEW_STEPS, ENOUGH_STEPS = 20, 60  # the same for steps
RESUME_NOTE = (
    "Resuming starts a new banded segment. Earlier steps round up to full cycles: at most one extra accounted step, so the "
    "target may not allow the last steps."
)


def format_plan(
    plan: PrivacyPlan,
    offsets: np.ndarray,
    num_trained: int,
    num_parameters: int,
    epsilon: float,
    earlier_steps: int,
    remaining_steps: int = 0,
) -> str:
    """Return the summary that is logged before training.

    Args:
        offsets: (authors + 1,), from `data_utils.group_by_author`.
        num_trained, num_parameters: numbers of trained and of all parameters.
        epsilon: at the end of the training.
        earlier_steps: taken by earlier runs.
        remaining_steps: that this training will take.
    """
    samples = np.diff(offsets)
    lines = [
        "*** NO PRIVACY: --disable_dp ***" if plan.disable_dp else "Author-level DP fine-tuning",
        f"  authors (N)             {plan.num_authors:,} with {plan.num_samples:,} samples; samples per author: median "
        f"{np.median(samples):g}, maximum {samples.max():,}, at most {plan.samples_per_author} in one step (k)",
        f"  sample rate (q)         {plan.sample_rate:.6g}, {format_batch(plan)}",
        f"  steps                   {plan.steps:,}"
        + (f", {earlier_steps:,} taken by earlier runs, {remaining_steps:,} left" if earlier_steps else ""),
        f"  trained parameters      {num_trained:,} of {num_parameters:,}",
    ]
    if plan.disable_dp:
        return "\n".join(lines)
    lines += [
        f"  clip norm (C)           {plan.clip_norm:g} per author, clipping engine {plan.clipping}",
        f"  noise multiplier        {plan.noise_multiplier:.4f}",
    ]
    if plan.noise_bands > 1:
        lines.append(f"  noise bands (b)         {format_bands(plan)}")
        if earlier_steps:
            lines.append(f"                          {RESUME_NOTE}")
    lines.append(f"  guarantee at the end    {format_guarantee(epsilon, plan.delta)}")
    if plan.num_authors < FEW_AUTHORS:
        lines.append(f"  delta                   {format_delta(plan.delta)}")
    lines.append("  Not covered by the guarantee: losses, metrics and gradient statistics in logs, computed on private data.")
    if plan.hide_counts:
        lines.append("  --hide_counts: this log discloses the numbers of authors and samples, so keep it private.")
    return "\n".join(lines)


def format_bands(plan: PrivacyPlan) -> str:
    """Describe the noise bands: what is accounted, and how much less noise the weights get."""
    event = plan.event(plan.steps)
    accounted = f"accounted as {event.steps:,} steps at sample rate {event.sample_rate:.6g}"
    words = f"{plan.noise_bands}: noise correlated over steps, {accounted}"
    if plan.target_epsilon is not None:
        ratio = error_ratio(
            plan.noise_multiplier, plan.sample_rate, plan.steps, plan.noise_bands, plan.target_epsilon, plan.delta
        )
        words += f"; noise in sums of updates {ratio:.2f} times that of independent noise at the same epsilon"
    return words


def format_batch(plan: PrivacyPlan) -> str:
    """Describe the expected batch, and the divisor of the sum if that is another number."""
    expected, divisor = plan.sample_rate * plan.num_authors, plan.expected_batch_size
    if abs(min(divisor, plan.num_authors) - expected) < 1e-6 * expected:
        return f"expected batch size (B) {divisor:,} authors"
    return f"expected batch {expected:,.1f} authors, their sum divided by the constant {divisor:,} (B)"


def format_delta(delta: float) -> str:
    """Explain delta by a mechanism that it would allow."""
    return f"{delta:.2g}: it would allow publishing all texts of one author in {1 / delta:,.0f}, and nothing of the others"


def delta_warning(plan: PrivacyPlan) -> Optional[str]:
    """Return a warning of a delta that protects little, such as the default 1 / N with few authors."""
    if plan.disable_dp or plan.delta <= LARGE_DELTA:
        return None
    return f"--target_delta: delta is {format_delta(plan.delta)}. Lower it, to about 1e-5; the noise is calibrated accordingly."


def tuning_hint(plan: PrivacyPlan) -> Optional[str]:
    """Return a hint if the plan alone shows that the model will be poor."""
    if plan.expected_batch_size < SMALL_BATCH and plan.sample_rate < 1:
        return (
            f"An expected batch of {plan.expected_batch_size} authors is small, so noise dominates: raise "
            f"--gradient_accumulation_steps, for a batch of about {GOOD_BATCH}."
        )
    if plan.steps < FEW_STEPS:
        epochs = math.ceil(ENOUGH_STEPS * plan.sample_rate)
        return (
            f"{plan.steps} steps train little: raise --num_train_epochs, to about {epochs}, or --max_steps if you gave it. With "
            "--target_epsilon, the noise is calibrated accordingly."
        )
    return None
