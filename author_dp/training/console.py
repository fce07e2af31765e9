"""Say on the console what a training does. The Trainer's own lines call authors examples, and count no accumulation steps."""

from typing import Any

import torch
from transformers import ProgressCallback, Trainer, TrainerCallback, TrainingArguments

from author_dp.accounting.plan import PrivacyPlan
from author_dp.logs import get_logger

logger = get_logger(__name__)

TRAINER_LINES = (
    "***** Running training *****", "  Num examples = ", "  Num Epochs = ", "  Num update steps per epoch = ",
    "  Instantaneous batch size per device = ", "  Total train batch size ", "  Gradient Accumulation steps = ",
    "  Total optimization steps = ", "  Number of trainable parameters = ", "  Resuming training from checkpoint with epoch",
    "\n\nTraining completed. Do not forget to share",
)  # fmt: skip


class AnnounceTraining(TrainerCallback):
    """Log the steps and the batch of a training when it begins, and count its epochs from the first run's beginning.

    The Trainer counts the epoch of a resumed run from its start: batches are sampled anew, and none is skipped.

    Args:
        plan: of the run.
    """

    follows = "steps"

    def __init__(self, plan: PrivacyPlan):
        self.plan = plan

    def on_train_begin(self, args, state, control, **kwargs):
        batch, per_device, processes = self.plan.expected_batch_size, args.per_device_train_batch_size, args.world_size
        logger.info(
            f"Training: step {state.global_step + 1:,} to {state.max_steps:,}, with a batch size (B) of {batch:,} authors = "
            f"{per_device:,} per device x {batch // (per_device * processes):,} (accumulation) x {processes:,} (processes)."
        )

    def on_step_end(self, args, state, control, **kwargs):
        state.epoch = state.global_step / self.plan.steps_per_epoch


class TrainingBar(ProgressCallback):
    """The Trainer's progress bar, with a name; author_dp/progress.py shows evaluations."""

    follows = "steps"

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        if self.training_bar is not None:
            self.training_bar.set_description("Train")

    def on_prediction_step(self, args, state, control, eval_dataloader=None, **kwargs):
        """Show no bar of an evaluation."""


def set_up_console(trainer: Trainer, plan: PrivacyPlan) -> None:
    """Replace the Trainer's progress bar, and announce trainings."""
    has_bar: Any = trainer.pop_callback(ProgressCallback)  # None in a notebook, or without bars
    if has_bar is not None:
        trainer.add_callback(TrainingBar())
    trainer.add_callback(AnnounceTraining(plan))


def format_devices(args: TrainingArguments) -> str:
    """Return the number of processes, and the device of this one, for the summary."""
    name = f" ({torch.cuda.get_device_name(args.device)})" if args.device.type == "cuda" else ""
    if args.world_size == 1:
        return f"1, on {args.device}{name}"
    return f"{args.world_size}, {'on' if args.device.type == 'cpu' else 'one per device:'} {args.device.type}{name}"
