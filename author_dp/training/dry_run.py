"""Take two steps of a run, with its noise, and estimate the time and memory of the full run.

The plan, with its noise and epsilon, is that of the full run. The ledger records the two steps, so they cost privacy. What is
saved is not a finished model: it gets no model card, and is not published.

On a GPU, the log also proposes how many authors should be in memory at once, from the memory that the steps took. Its last line
is the planner's advice (accounting/run_planning.py), which follows from the plan alone.
"""

import resource
import time
from datetime import timedelta
from pathlib import Path
from typing import Any, Optional

import torch
from peft import PeftModel
from transformers import TrainerCallback, TrainingArguments
from transformers.training_args import OptimizerNames

from author_dp.accounting.accountant import format_guarantee
from author_dp.accounting.run_planning import format_planning_advice
from author_dp.files import write_json
from author_dp.logs import get_logger
from author_dp.mechanism.adam_bc import SUPPORTED
from author_dp.mechanism.microbatches import MicrobatchShape, max_microbatch_authors
from author_dp.models.sizes import model_sizes
from author_dp.wording import format_count

logger = get_logger(__name__)

MEASURED_NAME = "_dry_run.json"  # in the output directory, for author_dp.plan: from private texts, so private
STEPS = 2  # a warm-up step, and one that is timed
USABLE = 0.9  # of a GPU's memory: the rest is for fragmentation, and for longer texts than those of the two steps


def shorten_for_dry_run(args: TrainingArguments, has_evaluation: bool) -> None:
    """Log and evaluate at each step, so that two steps measure both; upload nothing."""
    args.push_to_hub = False
    args.logging_steps = args.eval_steps = 1
    args.logging_strategy, args.eval_strategy = "steps", "steps" if has_evaluation else "no"


def largest_microbatch(resident: int, peak: int, authors: int, available: int, most: int) -> int:
    """Return how many authors fit in a GPU's memory at once: a power of two, at most `most`; 0 if not even one fits.

    Args:
        resident: bytes in use between steps: weights, clipped sums, optimizer state.
        peak: bytes in use at most during a step.
        authors: of a microbatch of this step; what it takes beyond `resident` is proportional to it, or less.
        available: bytes that the process can have.
        most: authors beyond which a microbatch does not grow.
    """
    per_author = max(peak - resident, 1) / authors
    fitting = min(int((USABLE * available - resident) / per_author), most)
    return 1 << (fitting.bit_length() - 1) if fitting > 0 else 0


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
        self.on_gpu = trainer.args.device.type == "cuda"  # not with --use_cpu
        self.step_peak = self.resident = 0  # bytes of the GPU
        self.shape: Optional[MicrobatchShape] = None  # None without privacy

    def on_step_begin(self, args, state, control, **kwargs):
        if self.on_gpu:  # what evaluation and the model check took is not the steps'
            torch.cuda.reset_peak_memory_stats()
        self.started = time.perf_counter()

    def on_step_end(self, args, state, control, train_dataloader=None, **kwargs):
        self.seconds, self.steps = time.perf_counter() - self.started, self.steps + 1
        if self.on_gpu:
            self.step_peak = max(self.step_peak, torch.cuda.max_memory_allocated())
            self.resident = torch.cuda.memory_allocated()
            self.shape = train_dataloader.dataset.shape
        control.should_training_stop |= self.steps >= STEPS

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        self.evaluation_seconds = (metrics or {}).get("eval_runtime", 0.0)

    def on_train_end(self, args, state, control, **kwargs):
        logger.info(self.summary())
        if state.is_world_process_zero:
            measured = {"seconds_per_step": self.seconds, "evaluation_seconds": self.evaluation_seconds, "peak_gib": self.peak()}
            path = Path(args.output_dir) / MEASURED_NAME
            measured |= {"planned_steps": self.trainer.plan.steps, "authors_at_once": args.per_device_train_batch_size}
            write_json(path, measured, private=True)
            if advice := self.advice():
                logger.info(advice)

    def peak(self) -> float:
        """Return the peak memory of this process, in GiB."""
        if self.on_gpu:
            return max(self.step_peak, torch.cuda.max_memory_allocated()) / 2**30
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20

    def advice(self) -> str:
        """Return the planner's advice for a run of as many sampled authors; empty where the formula does not apply."""
        plan, args, model = self.trainer.plan, self.trainer.args, self.trainer.model
        if plan.target_epsilon is None or plan.samples_per_author > 1 or OptimizerNames(args.optim).value not in SUPPORTED:
            return ""
        trained, parameters = model_sizes(model)
        return format_planning_advice(plan, args.learning_rate, parameters, trained, isinstance(model, PeftModel))

    def summary(self) -> str:
        """Return the privacy cost so far, and the time and memory of the full run."""
        plan, spent = self.trainer.plan, ""
        if not plan.disable_dp and self.trainer.is_world_process_zero():
            spent = f", which spent {format_guarantee(self.trainer.epsilon(), plan.delta)}"
        total = timedelta(seconds=round(self.seconds * plan.steps))
        return (
            f"Dry run: {self.steps} of {format_count(plan.steps, 'step')} taken{spent}. The full run will take about {total} "
            f"({self.seconds:.2g} s per step), and {self.evaluation_seconds:.2g} s per evaluation; peak memory of a process: "
            f"{self.peak():.1f} GiB{self.proposal()}"
        )

    def proposal(self) -> str:
        """Return a sentence with the batch options that use the GPU's memory; empty on a CPU, and without privacy."""
        if self.shape is None:
            return ""
        args, now = self.trainer.args, self.shape.authors
        share = self.trainer.plan.expected_batch_size // args.world_size
        most = min(max_microbatch_authors(share), share & -share)  # a power of two that divides the share: B stays
        available = torch.cuda.mem_get_info(args.device)[0] + torch.cuda.memory_reserved()
        most = self.trainer.model_check.max_authors(most)
        authors = largest_microbatch(self.resident, self.step_peak, now, available, most)
        if authors <= now and self.step_peak <= USABLE * available:
            return f". Microbatches of {format_count(now, 'author')}, as now, suit this GPU"
        if not authors:
            remedy = "a shorter --sequence_len" if args.activation_checkpointing else "--activation_checkpointing"
            return f". Even one author at a time fills more than 90 % of this GPU: consider {remedy}"
        return (
            f". For this GPU, give --per_device_train_batch_size {authors} --gradient_accumulation_steps {share // authors}: the "
            "same expected batch"
        )
