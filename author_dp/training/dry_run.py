"""Take two steps of a run, with its noise, and estimate the time and memory of the full run.

The plan, with its noise and epsilon, is that of the full run. The ledger records the two steps, so they cost privacy. What is
saved is not a finished model: it gets no model card, and is not published.
"""

import resource
import time
from datetime import timedelta
from typing import Any

import torch
from transformers import TrainerCallback, TrainingArguments

from author_dp.accounting.accountant import format_guarantee
from author_dp.logs import get_logger
from author_dp.wording import format_count

logger = get_logger(__name__)

STEPS = 2  # a warm-up step, and one that is timed


def shorten_for_dry_run(args: TrainingArguments, has_evaluation: bool) -> None:
    """Log and evaluate at each step, so that two steps measure both; upload nothing."""
    args.push_to_hub = False
    args.logging_steps = args.eval_steps = 1
    args.logging_strategy, args.eval_strategy = "steps", "steps" if has_evaluation else "no"


class DryRun(TrainerCallback):
    """Stop after two steps, and log how long the full run will take.

    Args:
        trainer: dp_utils.DPTrainer.
    """

    follows = "steps"

    def __init__(self, trainer: Any):
        self.trainer = trainer
        trainer.run_report.dry_run = True  # privacy.json says so
        self.started, self.seconds, self.steps, self.evaluation_seconds = 0.0, 0.0, 0, 0.0

    def on_step_begin(self, args, state, control, **kwargs):
        self.started = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds, self.steps = time.perf_counter() - self.started, self.steps + 1
        control.should_training_stop |= self.steps >= STEPS

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        self.evaluation_seconds = (metrics or {}).get("eval_runtime", 0.0)

    def on_train_end(self, args, state, control, **kwargs):
        logger.info(self.summary())

    def summary(self) -> str:
        """Return the privacy cost so far, and the time and memory of the full run."""
        plan, spent = self.trainer.plan, ""
        if not plan.disable_dp and self.trainer.is_world_process_zero():
            spent = f", which spent {format_guarantee(self.trainer.epsilon(), plan.delta)}"
        total = timedelta(seconds=round(self.seconds * plan.steps))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        if self.trainer.args.device.type == "cuda":  # not with --use_cpu
            peak = torch.cuda.max_memory_allocated() / 2**30
        return (
            f"Dry run: {self.steps} of {format_count(plan.steps, 'step')} taken{spent}. The full run will take about {total} "
            f"({self.seconds:.2g} s per step), and {self.evaluation_seconds:.2g} s per evaluation; peak memory of a process: "
            f"{peak:.1f} GiB"
        )
