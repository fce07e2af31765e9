"""Describe a privacy plan in the log: a summary before training, warnings and hints."""

import math
from typing import Optional

import numpy as np

from author_dp.accounting.accountant import format_guarantee
from author_dp.accounting.banded_mf import banded_error_ratio
from author_dp.accounting.events import prob_ever_sampled
from author_dp.accounting.plan import PrivacyPlan
from author_dp.wording import format_count

FEW_AUTHORS = 1_000  # below it, the summary explains delta
LARGE_DELTA = 1e-3  # above it, the log warns of delta
LARGE_DELTA_SHARE = 1e-2  # of the probability that an author is in any step: the same
LARGE_EPSILON = 20.0  # above it, the log warns of epsilon
SMALL_BATCH, GOOD_BATCH = 64, 256  # authors: below the first, the log recommends the second
LARGE_RATE = 0.2  # no larger sample rate is recommended: each author would be in nearly every step
FEW_STEPS, ENOUGH_STEPS = 20, 60  # the same for steps
NEW_SLOTS_NOTE = (
    "Resuming draws new slots. The noise is certified again, for earlier steps and those left together. This holds "
    "if the run was not stopped because of its results."
)
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
    devices: str = "",
) -> str:
    """Return the summary that is logged before training.

    Args:
        offsets: (authors + 1,), from `data_utils.group_by_author`.
        num_trained, num_parameters: numbers of trained and of all parameters.
        epsilon: at the end of the training.
        earlier_steps: taken by earlier runs.
        remaining_steps: that this training will take.
        devices: the processes and what they run on.
    """
    samples = np.diff(offsets)
    lines = [
        "*** NO PRIVACY: --disable_dp ***" if plan.disable_dp else "Author-level DP fine-tuning",
        *([f"  processes               {devices}"] if devices else []),
        f"  authors (N)             {plan.num_authors:,} with {format_count(plan.num_samples, 'sample')}; samples per author: "
        f"median {np.median(samples):g}, maximum {samples.max():,}, at most {plan.samples_per_author} in one step (k)",
        f"  sample rate (q)         {plan.sample_rate:.6g}, {format_plan_batch(plan)}",
        *([f"  sampling                {format_plan_slots(plan)}"] if plan.slots else []),
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
        lines.append(f"  noise bands (b)         {format_plan_bands(plan)}")
    if earlier_steps and (plan.slots or plan.noise_bands > 1):
        lines.append(f"                          {NEW_SLOTS_NOTE if plan.slots else RESUME_NOTE}")
    lines.append(f"  guarantee at the end    {format_guarantee(epsilon, plan.delta)}")
    if plan.num_authors < FEW_AUTHORS and plan_delta_warning(plan) is None:
        lines.append(f"  delta                   {format_plan_delta(plan.delta)}")
    lines.append("  Not covered by the guarantee: losses, metrics and gradient statistics in logs, computed on private data.")
    if plan.hide_counts:
        lines.append("  --hide_counts: this log discloses the numbers of authors and samples, so keep it private.")
    return "\n".join(lines)


def format_plan_bands(plan: PrivacyPlan) -> str:
    """Describe the noise bands: what is accounted, and how much less noise the weights get."""
    words = f"{plan.noise_bands}: noise correlated over steps"
    if not plan.slots:
        event = plan.event(plan.steps)
        words += f", accounted as {format_count(event.steps, 'step')} at sample rate {event.sample_rate:.6g}"
    if plan.target_epsilon is not None:
        ratio = banded_error_ratio(
            plan.noise_multiplier, plan.sample_rate, plan.steps, plan.noise_bands, plan.target_epsilon, plan.delta
        )
        words += f"; noise in sums of updates {ratio:.2f} times that of independent noise at the same epsilon"
    return words


def format_plan_slots(plan: PrivacyPlan) -> str:
    """Describe balls-in-bins sampling, and where its epsilon comes from."""
    words = f"balls-in-bins: each author in one secret step of every {plan.slots:,}"
    if plan.certificate is None:
        return words
    attempts = format_count(len(plan.certificate["attempts"]), "attempt")
    return f"{words}; epsilon certified by {plan.certificate['draws']:,} draws, in {attempts}"


def format_plan_batch(plan: PrivacyPlan) -> str:
    """Describe the expected batch, and the divisor of the sum if that is another number."""
    expected, divisor = plan.sample_rate * plan.num_authors, plan.expected_batch_size
    if abs(min(divisor, plan.num_authors) - expected) < 1e-6 * expected:
        return f"expected batch size (B) {format_count(divisor, 'author')}"
    return f"expected batch {expected:,.1f} authors, their sum divided by the constant {divisor:,} (B)"


def format_plan_delta(delta: float) -> str:
    """Explain delta by a mechanism that it would allow."""
    return f"{delta:.2g}: it would allow publishing all texts of one author in {1 / delta:,.0f}, and nothing of the others"


def plan_warnings(plan: PrivacyPlan) -> list[str]:
    """Return warnings of an epsilon or delta that protects little, such as the default 1 / N with few authors."""
    if plan.disable_dp:
        return []
    warnings = []
    if (plan.target_epsilon or 0) > LARGE_EPSILON:
        warnings.append(
            f"--target_epsilon: epsilon {plan.target_epsilon:g} promises little: one author may make an outcome e^epsilon times "
            "as likely. Lower it, to 8 or less."
        )
    return warnings if (of_delta := plan_delta_warning(plan)) is None else [*warnings, of_delta]


def plan_delta_warning(plan: PrivacyPlan) -> Optional[str]:
    """Return a warning of a delta that protects little."""
    sampled = prob_ever_sampled([plan.event(plan.steps)])
    expected = plan.delta * plan.num_authors
    if plan.delta > LARGE_DELTA:
        words = format_plan_delta(plan.delta)
    elif expected > 1 + 1e-9:
        words = f"{plan.delta:.2g}, more than 1 / N: it would allow publishing all texts of about {expected:.2g} authors"
    elif plan.delta > LARGE_DELTA_SHARE * sampled:
        words = f"{plan.delta:.2g}: it would allow publishing all texts of one in {sampled / plan.delta:,.0f} authors in any step"
    else:
        return None
    return f"--target_delta: delta is {words}. Lower it, to about 1e-5 or less; the noise is calibrated accordingly."


def plan_utility_hint(plan: PrivacyPlan) -> Optional[str]:
    """Return a hint if the plan alone shows that the model will be poor."""
    expected = plan.sample_rate * plan.num_authors
    if expected < SMALL_BATCH and plan.sample_rate < 1:
        return f"An expected batch of {expected:.3g} authors is small, so noise dominates: {plan_batch_remedy(plan)}."
    if plan.steps < FEW_STEPS:
        epochs = math.ceil(ENOUGH_STEPS * plan.sample_rate)
        return (
            f"{format_count(plan.steps, 'step')} will train little: raise --num_train_epochs, to about {epochs}, or --max_steps "
            "if you gave it. With --target_epsilon, the noise is calibrated accordingly."
        )
    return None


def plan_batch_remedy(plan: PrivacyPlan) -> str:
    """Return how to get a larger batch, up to GOOD_BATCH authors and LARGE_RATE of them all."""
    batch = math.floor(min(GOOD_BATCH, LARGE_RATE * plan.num_authors))
    if batch <= 1.5 * plan.sample_rate * plan.num_authors:
        return f"{plan.num_authors:,} authors are few, and a larger sample rate would need more noise. Add authors"
    if abs(plan.sample_rate * plan.num_authors / plan.expected_batch_size - 1) < 1e-6:
        return f"raise --gradient_accumulation_steps, for a batch of about {batch}"
    return f"raise --sample_rate, to about {batch / plan.num_authors:.2g}, and the batch options to about {batch} authors"
