"""Release the evaluation loss with differential privacy for held-out authors: one number of a run that may be published.

Guarantees: the released loss is epsilon-DP (delta 0). The unit is a held-out author with all texts, under add-or-remove-one
adjacency. The loss is the mean over authors of each author's mean loss, clipped to [0, R]. R, epsilon and the noise follow from
options, and are public.

Mechanism: an author with clipped loss l adds the integers (g, GRID - g) to two sums, with g = l / R on a grid. So an author moves
the sums by GRID in L1 norm, whatever l is. Each sum gets discrete Laplace noise [1] of scale GRID / epsilon. The mean is R times
the first sum over both. So the number of authors is protected as well. Sums and noise are exact integers, and the noise comes
from the operating system's secret bits: nothing depends on floating-point noise [2]. An author's loss is computed in batches
without other authors. Kernels are selected by a batch's shape, so one author could otherwise move the last bits of all others.
Constant shapes with several authors would not do: an author is in a row that follows from who else is there, and the last bit may
change with the row (docs/threat-model.md, "Rounding and shapes"). The integers of many authors could move then, beyond the noise.

With a limit on the number of authors, those with the lowest hashes are evaluated. One author may then replace another: this moves
the sums by up to 2 GRID, and the noise is doubled. Without a release, a threshold selects authors instead. It follows from the
number of texts, so one author may move it and with it many others: no noise would cover that.

Where the split decides by a hash of the author, held-out authors are never trained on. So model and loss together have the larger
epsilon of the two. Authors of a validation file may be in the training data, or in that of a neighbor: there the two are added.

References:
    [1] Canonne, Kamath and Steinke 2020, The Discrete Gaussian for Differential Privacy, arXiv 2004.00010, algorithms 1 and 2
    [2] Mironov 2012, On Significance of the Least Significant Bits for Differential Privacy
"""

import math
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Optional, Protocol

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from transformers import PreTrainedModel, TrainerState, TrainingArguments

from author_dp.accounting.budget import Budget
from author_dp.accounting.ledger import PrivacyLedger
from author_dp.distributed import all_reduce_sum, broadcast
from author_dp.errors import UserError
from author_dp.guards.metric_driven import metric_driven_option
from author_dp.mechanism.fsdp import dummy_forwards, missing_fsdp_rounds
from author_dp.mechanism.losses import token_losses
from author_dp.progress import track
from author_dp.validation import check_range, option

GRID = 2**20  # steps between a loss of 0 and one of R
RANGES = {"release_eval_epsilon": "[1e-9, 1e9]", "release_eval_range": "[1e-6, 1e6]"}  # beyond, floats lose the result


@dataclass
class LossReleaseArguments:
    """Options of an evaluation loss that may be published."""

    release_eval_epsilon: Optional[float] = option(
        None, "Release the evaluation loss with this epsilon for held-out authors. The released number is public."
    )
    release_eval_range: Optional[float] = option(
        None, "Clip each author's loss to at most this for the release. Default: log of the vocabulary size."
    )

    def __post_init__(self):
        for name, interval in RANGES.items():
            check_range(f"--{name}", getattr(self, name), interval)
        if self.release_eval_range is not None and self.release_eval_epsilon is None:
            raise UserError("--release_eval_range: it has no effect without --release_eval_epsilon. Give both, or leave it out")


class EvaluatedTrainer(Protocol):
    """The attributes of a Trainer that a release uses; dp_utils.DPTrainer has them."""

    model: PreTrainedModel
    args: TrainingArguments
    accelerator: Accelerator
    state: TrainerState
    budget: Budget
    eval_dataset: Any
    data_collator: Callable


def check_loss_release(
    arguments: LossReleaseArguments, args: TrainingArguments, disable_dp: bool, has_evaluation: bool, ledger: PrivacyLedger
) -> None:
    """Raise UserError if nothing can be released, or the model depends on held-out authors otherwise."""
    if arguments.release_eval_epsilon is None:
        return
    name = "--release_eval_epsilon"
    if disable_dp:
        raise UserError(f"{name}, --disable_dp: they exclude each other: a run without privacy publishes nothing. Leave one out")
    if not has_evaluation:
        raise UserError(f"{name}: it needs held-out authors. Give --validation_file, or an --eval_fraction above 0")
    if (chosen_by := metric_driven_option(args)) is not None:
        raise UserError(
            f"{chosen_by}: it lets held-out authors choose what is saved or trained, which {name} does not cover. Leave it out"
        )
    check_release_not_chosen(ledger.by_metrics)


def check_release_not_chosen(option: Optional[str]) -> None:
    """Raise UserError if metrics chose the model of a run with steps, by `option` of its ledger."""
    if option is not None:
        raise UserError(
            f"--release_eval_epsilon: an earlier run in --output_dir had {option}, so held-out authors have chosen its model, "
            "which no epsilon covers. Leave it out, or start in a new --output_dir"
        )


def release_eval_loss(
    trainer: EvaluatedTrainer, epsilon: float, upper: Optional[float], limited: bool
) -> Optional[dict[str, Any]]:
    """Release the evaluation loss of the current model, once per step of training. Collective.

    Args:
        epsilon, upper: as in `LossReleaseArguments`.
        limited: whether the number of held-out authors is limited, so that hashes choose them.
    Returns:
        the value of "evaluation_release" in privacy.json on rank 0; None elsewhere.
    Raises:
        UserError: if held-out authors have chosen the model.
    """
    if isinstance(trainer.eval_dataset, dict):
        raise UserError("eval_dataset of DPTrainer: it names several, and one loss can be released. Give one")
    check_release_not_chosen(broadcast(trainer.budget.ledger.by_metrics))
    previous = broadcast(trainer.budget.ledger.current_release)
    upper = upper or math.log(len(trainer.model.get_input_embeddings().weight))  # type: ignore[arg-type]
    parameters = {"epsilon": epsilon, "step": trainer.state.global_step, "limited": limited}
    request = {**parameters, "split": trainer.budget.split, "range": [0.0, upper]}
    if previous is not None and previous["split"] is not None and {name: previous.get(name) for name in request} == request:
        return previous  # the loss of the same model on the same authors: publishing it again costs nothing
    sums = all_reduce_sum(local_released_loss_sums(trainer, upper)).tolist()
    if not trainer.budget.is_main_process:
        return None
    sensitivity = GRID * (2 if limited else 1)
    noisy_sums = [value + discrete_laplace(Fraction(sensitivity) / Fraction(epsilon)) for value in sums]
    record = {**parameters, "unit": "held-out author", **noisy_released_loss(noisy_sums, upper, sensitivity / epsilon)}
    trainer.budget.record_release(record)
    return record


def local_released_loss_sums(trainer: EvaluatedTrainer, upper: float) -> torch.Tensor:
    """Return the sums of (g, GRID - g) over this process's held-out authors, int64 (2,)."""
    dataset, size, device = trainer.eval_dataset, trainer.args.per_device_eval_batch_size, trainer.args.device
    totals = torch.zeros(2, dtype=torch.int64)
    trainer.model.eval()
    local_authors = range(trainer.args.process_index, len(dataset), trainer.args.world_size)
    texts_per_author = np.diff(dataset.offsets)[local_authors.start :: local_authors.step]
    num_dummies = missing_fsdp_rounds(trainer.model, int((-(-texts_per_author // size)).clip(min=1).sum()))
    for author in track(local_authors, "Release the evaluation loss", not trainer.args.disable_tqdm):
        texts = dataset.indices[dataset.offsets[author] : dataset.offsets[author + 1]]
        loss, num_targets = 0.0, 0
        for chunk in np.split(texts, range(size, len(texts), size)):
            (samples,) = dataset.__getitems__([chunk])
            batch = send_to_device(trainer.data_collator(samples), device)
            with torch.no_grad(), trainer.accelerator.autocast():
                losses, has_target = token_losses(trainer.model, batch)
            # One copy, and float64 on the CPU only, as Macs' GPUs have none.
            sums = torch.stack([losses, has_target]).cpu().sum((1, 2), dtype=torch.float64).tolist()
            loss, num_targets = loss + sums[0], num_targets + int(sums[1])
        if num_targets:
            totals += torch.tensor(quantize_released_loss(loss / num_targets, upper))
    dummy_forwards(trainer.model, num_dummies)
    return totals.to(device)


def format_released_loss(release: Optional[dict[str, Any]]) -> str:
    """Return a sentence about the released loss, which is public."""
    if release is None or release["loss"] is None:
        return "no evaluation loss, as there are too few held-out authors for its noise"
    at_step = f" at step {release['step']}" if "step" in release else ""  # absent in older records
    return (
        f"evaluation loss {release['loss']:.3f}{at_step} (mean over about {release['authors']:,} held-out authors, each clipped "
        f"to at most {release['range'][1]:.3g}; standard error of its noise {release['standard_error']:.2g}; epsilon "
        f"{release['epsilon']:g} for a held-out author)"
    )


def quantize_released_loss(loss: float, upper: float) -> tuple[int, int]:
    """Return (g, GRID - g) for an author's mean loss, clipped to [0, upper]. A non-finite loss counts as `upper`."""
    clipped = min(max(loss, 0.0), upper) if math.isfinite(loss) else upper
    quantized = min(GRID, round(clipped / upper * GRID))
    return quantized, GRID - quantized


def noisy_released_loss(noisy_sums: list[int], upper: float, scale: float) -> dict[str, Any]:
    """Compute loss, its standard error due to the noise, and the number of authors.

    Args:
        noisy_sums: sums of g and of GRID - g, with noise.
        scale: of the noise in each sum.
    """
    total = sum(noisy_sums)
    result: dict[str, Any] = {"loss": None, "standard_error": None, "authors": max(0, round(total / GRID)), "range": [0.0, upper]}
    if total > 0:
        fraction = min(1.0, max(0.0, noisy_sums[0] / total))
        error = math.sqrt(2) * scale / total * math.hypot(fraction, 1 - fraction)
        result |= {"loss": fraction * upper, "standard_error": error * upper}
    return result


# --- exact noise [1] -----------------------------------------------------------------------------------------


def discrete_laplace(scale: Fraction) -> int:
    """Return an integer z with probability proportional to exp(-|z| / scale), exactly. Algorithm 2 of [1]."""
    t, s = scale.numerator, scale.denominator
    while True:
        u = secrets.randbelow(t)
        if not bernoulli_exp(Fraction(u, t)):
            continue
        v = 0
        while bernoulli_exp(Fraction(1)):
            v += 1
        magnitude, negative = (u + t * v) // s, secrets.randbelow(2)
        if magnitude or not negative:  # rejects -0, or zero would be twice as likely
            return -magnitude if negative else magnitude


def bernoulli_exp(rate: Fraction) -> bool:
    """Return True with probability exp(-rate), for a rate from 0 to 1, exactly. Algorithm 1 of [1]."""
    k = 1
    while secrets.randbelow(rate.denominator * k) < rate.numerator:
        k += 1
    return k % 2 == 1
