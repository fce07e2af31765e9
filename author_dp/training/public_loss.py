"""Release the evaluation loss with differential privacy for the held-out authors: one number of a run that may be published.

Promise: the released loss is epsilon-DP (delta 0), the unit a held-out author with all texts, under add-or-remove-one adjacency.
It is the mean over authors of each author's mean loss, clipped to [0, R]. R, epsilon and the noise follow from options, and are
public.

How: an author with clipped loss l adds the whole numbers (g, GRID - g), g = l / R on a grid, to two sums, and so moves them by
GRID in L1 norm, whatever l is. Each sum gets discrete Laplace noise [1] of scale GRID / epsilon; the mean is R times the first
over both. So how many authors there are is paid for as well. Sums and noise are whole numbers and exact, drawn from the operating
system's secret bits: nothing is left to floating point [2]. An author's loss is computed alone, in batches with nobody else: the
kernels that a batch's shape selects would otherwise let one author move the last bits of all the others.

With a limit on the authors, those of the lowest hashes are taken; one author may then take another's place, which moves the sums
by up to 2 GRID, and the noise is doubled.

Who is held out is never trained on where the split decides (a hash of the author), so model and loss together have the larger
epsilon of the two. Authors of a validation file may be in the training data, or in a neighbour's: there the two are added up.

References:
    [1] Canonne, Kamath and Steinke 2020, The Discrete Gaussian for Differential Privacy, arXiv 2004.00010, algorithms 1 and 2
    [2] Mironov 2012, On Significance of the Least Significant Bits for Differential Privacy
"""

import math
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any, Optional, Protocol

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from transformers import PreTrainedModel, TrainerState, TrainingArguments

from author_dp.accounting.budget import Budget
from author_dp.accounting.ledger import LEDGER_NAME, PrivacyLedger
from author_dp.distributed import all_reduce_sum, broadcast
from author_dp.errors import UserError
from author_dp.guards.options import metric_driven_option
from author_dp.mechanism.fsdp import dummy_forwards, missing_rounds
from author_dp.mechanism.losses import token_losses

GRID = 2**20  # steps between a loss of 0 and one of R
LIMITS = {"release_eval_epsilon": (1e-9, 1e9), "release_eval_range": (1e-6, 1e6)}  # beyond, floats cannot tell what was found


@dataclass
class ReleaseArguments:
    """An evaluation loss that may be published."""

    release_eval_epsilon: Optional[float] = field(
        default=None,
        metadata={"help": "Release the evaluation loss with so much epsilon, for the held-out authors: that number is public."},
    )
    release_eval_range: Optional[float] = field(
        default=None,
        metadata={"help": "Clip an author's loss to at most this for the release. Default: log of the model's vocabulary."},
    )

    def __post_init__(self):
        for name, (lowest, highest) in LIMITS.items():
            value = getattr(self, name)
            if value is not None and not lowest <= value <= highest:  # nan is neither
                raise UserError(f"--{name} {value} must be a number from {lowest:g} to {highest:g}")
        if self.release_eval_range is not None and self.release_eval_epsilon is None:
            raise UserError("--release_eval_range has no effect without --release_eval_epsilon: give both, or leave it out")


class EvaluatedTrainer(Protocol):
    """What a release asks of a Trainer: dp_utils.DPTrainer."""

    model: PreTrainedModel
    args: TrainingArguments
    accelerator: Accelerator
    state: TrainerState
    budget: Budget
    eval_dataset: Any
    data_collator: Callable


def check_release(arguments: ReleaseArguments, args: TrainingArguments, disable_dp: bool, has_evaluation: bool) -> None:
    """Raise UserError where the model would depend on held-out authors beyond the release, or there is nothing to release."""
    if arguments.release_eval_epsilon is None:
        return
    name = "--release_eval_epsilon"
    if disable_dp:
        raise UserError(f"{name} and --disable_dp exclude each other: a run without privacy publishes nothing; leave one out")
    if not has_evaluation:
        raise UserError(f"{name} needs held-out authors: give --validation_file, or an --eval_fraction above 0")
    if (option := metric_driven_option(args)) is not None:
        raise UserError(
            f"{option} lets held-out authors choose what is saved or trained, for which {name} does not pay: leave it out"
        )
    check_not_chosen(PrivacyLedger(Path(str(args.output_dir)) / LEDGER_NAME).by_metrics)


def check_not_chosen(option: Optional[str]) -> None:
    """Raise UserError where metrics have chosen the model of a run with steps (by `option`, of its ledger)."""
    if option is not None:
        raise UserError(
            f"--release_eval_epsilon: an earlier run in --output_dir had {option}, so held-out authors have chosen its model, "
            "for which nothing pays: leave it out, or start in a new --output_dir"
        )


def release_eval_loss(
    trainer: EvaluatedTrainer, epsilon: float, upper: Optional[float], limited: bool
) -> Optional[dict[str, Any]]:
    """Release the evaluation loss of the model as it is, once for the steps that it has taken. Collective.

    Args:
        epsilon, upper: as in `ReleaseArguments`.
        limited: whether the held-out authors are a limited number, chosen by a hash.
    Returns:
        what privacy.json holds under "evaluation_release", on the first process; None elsewhere.
    Raises:
        UserError: where held-out authors have chosen the model.
    """
    check_not_chosen(broadcast(trainer.budget.ledger.by_metrics))
    known = broadcast(trainer.budget.ledger.current_release)
    upper = upper or math.log(len(trainer.model.get_input_embeddings().weight))  # type: ignore[arg-type]
    about = {"epsilon": epsilon, "step": trainer.state.global_step, "limited": limited}
    asked = {**about, "split": trainer.budget.split, "range": [0.0, upper]}
    if known is not None and known["split"] is not None and {name: known.get(name) for name in asked} == asked:
        return known  # the loss of this very model on these authors: to publish it again costs nothing
    shares = all_reduce_sum(local_loss_sums(trainer, upper)).tolist()
    if not trainer.budget.is_main_process:
        return None
    sensitivity = GRID * (2 if limited else 1)
    noisy = [share + discrete_laplace(Fraction(sensitivity) / Fraction(epsilon)) for share in shares]
    record = {**about, "unit": "held-out author", **noisy_mean(noisy, upper, sensitivity / epsilon)}
    trainer.budget.record_release(record)
    return record


def local_loss_sums(trainer: EvaluatedTrainer, upper: float) -> torch.Tensor:
    """Return the sums of (g, GRID - g) over this process' share of the held-out authors, int64 (2,)."""
    dataset, size, device = trainer.eval_dataset, trainer.args.per_device_eval_batch_size, trainer.args.device
    totals = torch.zeros(2, dtype=torch.int64)
    trainer.model.eval()
    mine = range(trainer.args.process_index, len(dataset), trainer.args.world_size)
    counts = np.diff(dataset.offsets)[mine.start :: mine.step]  # of texts
    idle = missing_rounds(trainer.model, int((-(-counts // size)).clip(min=1).sum()))
    for author in mine:
        texts = dataset.indices[dataset.offsets[author] : dataset.offsets[author + 1]]
        loss, tokens = 0.0, 0
        for part in np.split(texts, range(size, len(texts), size)):
            (samples,) = dataset.__getitems__([part])
            batch = send_to_device(trainer.data_collator(samples), device)
            with torch.no_grad(), trainer.accelerator.autocast():
                losses, counted = token_losses(trainer.model, batch)
            loss, tokens = loss + losses.double().sum().item(), tokens + int(counted.sum())
        if tokens:
            totals += torch.tensor(quantize_loss(loss / tokens, upper))
    dummy_forwards(trainer.model, idle)
    return totals.to(device)


def format_release(release: Optional[dict[str, Any]]) -> str:
    """Return the released loss for people: it is public."""
    if release is None or release["loss"] is None:
        return "no evaluation loss, as there are too few held-out authors for its noise"
    at_step = f" at step {release['step']}" if "step" in release else ""  # older records do not tell
    return (
        f"evaluation loss {release['loss']:.3f}{at_step} (mean over about {release['authors']:,} held-out authors, each clipped "
        f"to at most {release['range'][1]:.3g}; standard error of its noise {release['standard_error']:.2g}; epsilon "
        f"{release['epsilon']:g} for a held-out author)"
    )


def quantize_loss(loss: float, upper: float) -> tuple[int, int]:
    """Return (g, GRID - g) for an author's mean loss, clipped to [0, upper]; one that is not a number counts as the highest."""
    clipped = min(max(loss, 0.0), upper) if math.isfinite(loss) else upper
    share = min(GRID, round(clipped / upper * GRID))
    return share, GRID - share


def noisy_mean(noisy: list[int], upper: float, scale: float) -> dict[str, Any]:
    """Return loss, its standard error by the noise alone, and the number of authors, all from the two noisy sums.

    Args:
        noisy: sums of g and of GRID - g, with noise.
        scale: of the noise in each.
    """
    total = sum(noisy)
    found: dict[str, Any] = {"loss": None, "standard_error": None, "authors": max(0, round(total / GRID)), "range": [0.0, upper]}
    if total > 0:
        share = min(1.0, max(0.0, noisy[0] / total))
        error = math.sqrt(2) * scale / total * math.hypot(share, 1 - share)
        found |= {"loss": share * upper, "standard_error": error * upper}
    return found


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
        size, negative = (u + t * v) // s, secrets.randbelow(2)
        if size or not negative:  # or zero would be twice as likely
            return -size if negative else size


def bernoulli_exp(rate: Fraction) -> bool:
    """Return True with probability exp(-rate), for a rate from 0 to 1, exactly. Algorithm 1 of [1]."""
    k = 1
    while secrets.randbelow(rate.denominator * k) < rate.numerator:
        k += 1
    return k % 2 == 1
