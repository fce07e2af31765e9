"""Find what lets evaluation metrics choose the model: an option, a callback or a scheduler.

Metrics have no noise. Those of held-out authors may choose, and the ledger records it; those of training authors may not.

Example:

    >>> metric_driven_option(args)
    '--load_best_model_at_end'
"""

from collections.abc import Iterable
from typing import Any, Optional

import numpy as np
from transformers import TrainerCallback, TrainingArguments

from author_dp.errors import UserError
from author_dp.guards.callbacks import EVALUATION, STEPS, get_declaration

# Values that depend on step numbers alone. All others, those of later versions too, count as driven by metrics.
STEP_ONLY = {
    "lr_scheduler_type": {
        "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt",
        "cosine_with_min_lr", "cosine_warmup_with_min_lr", "warmup_stable_decay",
    },
    "save_strategy": {"no", "steps", "epoch"},
    "eval_strategy": {"no", "steps", "epoch"},
    "logging_strategy": {"no", "steps", "epoch"},
}  # fmt: skip


def metric_driven_option(args: TrainingArguments) -> Optional[str]:
    """Return the option by which evaluation metrics choose what is saved or trained; None if they only inform."""
    if args.load_best_model_at_end:
        return "--load_best_model_at_end"
    for name, known in STEP_ONLY.items():
        value = getattr(args, name)
        value = str(getattr(value, "value", value))
        if value not in known:
            return f"--{name} {value}"
    if args.metric_for_best_model is not None:  # --save_total_limit keeps the best checkpoint
        return f"--metric_for_best_model {args.metric_for_best_model}"
    return None


def check_metric_options(allowed: Optional[bool], option: Optional[str], privacy: Any) -> None:
    """Raise UserError where metrics of training authors, which have no noise, would choose the model.

    Args:
        allowed: --allow_shared_authors, or whether evaluation authors are training authors; None if that is unknown.
        option: what lets metrics choose, like `metric_driven_option`.
    """
    if option is None or privacy.disable_dp:
        return
    if allowed is None:
        raise UserError(
            f"eval_dataset: with {option}, its losses choose the model, and whether its authors are training authors is unknown. "
            "Give both data sets the hashes of their authors, AuthorDataset(..., hashes=author_hashes(authors)), or "
            "shared_authors=False if they have none in common"
        )
    if allowed:
        raise UserError(
            f"--allow_shared_authors: with {option}, losses of training authors would choose the model without noise. "
            "Leave one of the two out"
        )


def have_shared_authors(train: Any, evaluation: Any) -> Optional[bool]:
    """Return whether evaluation authors are training authors; None where a data set does not say who they are.

    Args:
        train: the training set, `data_utils.AuthorDataset`.
        evaluation: another one, several by name, or None.
    """
    datasets = [one for one in (evaluation.values() if isinstance(evaluation, dict) else [evaluation]) if one is not None]
    for dataset in datasets:
        train_hashes, eval_hashes = getattr(train, "hashes", None), getattr(dataset, "hashes", None)
        if dataset is train:
            return True
        if train_hashes is not None and eval_hashes is not None and np.isin(eval_hashes, train_hashes).any():
            return True
    return None if any(getattr(one, "hashes", None) is None for one in [train, *datasets] if datasets) else False


def metric_driven_callback(callbacks: Iterable[TrainerCallback]) -> Optional[str]:
    """Return the name of a callback by which evaluation metrics steer the training; None without one."""
    return next((f"callback {type(c).__name__}" for c in callbacks if get_declaration(c) == EVALUATION), None)


def metric_driven_scheduler(trainer: Any) -> Optional[str]:
    """Return the name of a given scheduler by which evaluation metrics steer the training; None without one.

    Args:
        trainer: dp_utils.DPTrainer.
    Raises:
        UserError: with privacy, for a scheduler that has not declared what it follows. It may read training losses.
    """
    scheduler = trainer.lr_scheduler
    if scheduler is None or getattr(trainer, "_created_lr_scheduler", False):
        return None
    declared, name = vars(scheduler).get("follows", vars(type(scheduler)).get("follows")), type(scheduler).__name__
    if declared not in (STEPS, EVALUATION) and not trainer.privacy.disable_dp:
        raise UserError(
            f"optimizers: the scheduler {name} did not declare what it follows. Nothing may follow training losses, which have "
            f'no noise. If it follows step numbers alone, set scheduler.follows = "{STEPS}"; if metrics of held-out authors, '
            f'"{EVALUATION}"'
        )
    return None if declared == STEPS else f"optimizers: {name}"
