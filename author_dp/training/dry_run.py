"""A dry run: two steps of the run that is asked for, with its noise, and what the whole of it will take.

Promise: the plan, with its noise and epsilon, is that of the whole run; the two steps are spent, and are in the ledger.
"""

import resource
import time
from datetime import timedelta
from typing import Any

import torch
from transformers import TrainerCallback

from author_dp.accounting.accountant import format_guarantee

STEPS = 2  # the first one warms up, the second is timed


class DryRun(TrainerCallback):
    """Stop after two steps, and know how long the second took."""

    follows = "steps"

    def __init__(self):
        self.started, self.seconds, self.steps = 0.0, 0.0, 0

    def on_step_begin(self, args, state, control, **kwargs):
        self.started = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds, self.steps = time.perf_counter() - self.started, self.steps + 1
        control.should_training_stop |= self.steps >= STEPS

    def in_words(self, trainer: Any, evaluation_seconds: float) -> str:
        """Say what was spent, and what the whole run will take; `trainer` is a dp_utils.DPTrainer."""
        plan, spent = trainer.plan, ""
        if not self.steps:
            return "Dry run: no step was left to take."
        if not plan.disable_dp and trainer.is_world_process_zero():
            spent = f", which spent {format_guarantee(trainer.epsilon(), plan.delta)}"
        total = timedelta(seconds=round(self.seconds * plan.steps))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        if torch.cuda.is_available():
            peak = torch.cuda.max_memory_allocated() / 2**30
        return (
            f"Dry run: {self.steps} of {plan.steps:,} steps taken{spent}. The whole run will take about {total} "
            f"({self.seconds:.2g} s a step), and {evaluation_seconds:.2g} s for each evaluation; peak memory of a process: "
            f"{peak:.1f} GiB"
        )
