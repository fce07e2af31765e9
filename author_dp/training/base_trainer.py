"""Adapt the methods of Hugging Face's Trainer that count, schedule and evaluate to logical batches of authors.

`dp_utils.DPTrainer` computes per-author gradients; this module does not.
"""

from collections.abc import Iterator
from typing import Any, Optional

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput, SchedulerType

from author_dp.accounting.plan import PrivacyPlan
from author_dp.errors import as_user_error
from author_dp.guards.trainer_arguments import check_no_trial
from author_dp.logs import without_log_lines
from author_dp.mechanism.microbatches import LogicalBatch
from author_dp.progress import Progress, track
from author_dp.training.console import TRAINER_LINES, set_up_console
from author_dp.training.evaluation import EvalBatches, evaluate
from author_dp.types import Batch


class LogicalBatchTrainer(Trainer):
    """Trainer that counts, schedules and evaluates in logical batches.

    Attributes:
        plan: the public parameters of the run.
    """

    model: Any
    optimizer: Any
    plan: PrivacyPlan

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        set_up_console(self, self.plan)

    def _inner_training_loop(self, *args, **kwargs) -> Any:
        """Train, without the Trainer's lines in which authors are examples."""
        with without_log_lines("trainer", TRAINER_LINES):
            return super()._inner_training_loop(*args, **kwargs)

    def create_scheduler(self, *args, **kwargs) -> torch.optim.lr_scheduler.LRScheduler:
        """Create the Trainer's scheduler; raise UserError if it does not accept its arguments."""
        name, options = SchedulerType(self.args.lr_scheduler_type).value, self.args.lr_scheduler_kwargs
        with as_user_error(f"--lr_scheduler_type {name}, with --lr_scheduler_kwargs {options}"):
            return super().create_scheduler(*args, **kwargs)

    def _init_training_state(self, max_steps: int, *args, **kwargs) -> tuple[int, int]:
        """Restore a checkpoint's state, but save, evaluate and log as often as the options of this run say."""
        with without_log_lines("trainer_utils", ("Warning: The following arguments do not match",)):  # they take effect
            restored = super()._init_training_state(max_steps, *args, **kwargs)
        self.state.compute_steps(self.args, max_steps)
        return restored

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Warn of parameters that a checkpoint lacks, but not of tied ones: they are saved under one name only."""
        tied = getattr(self.model, "all_tied_weights_keys", None) or {}
        load_result.missing_keys[:] = [name for name in load_result.missing_keys if name not in tied]
        super()._issue_warnings_after_load(load_result)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Optional[torch.Tensor] = None) -> Optional[torch.Tensor]:
        """Return no norm with privacy: before the optimizer's step there is no gradient that could be disclosed."""
        return super()._get_grad_norm(model, grad_norm) if self.plan.disable_dp else None

    def get_total_train_batch_size(self, args: TrainingArguments) -> int:
        """Return B, for the Trainer's log."""
        return self.plan.expected_batch_size

    def floating_point_ops(self, inputs: LogicalBatch) -> int:  # type: ignore[override]
        """Return the sum over the microbatches."""
        return sum(super(LogicalBatchTrainer, self).floating_point_ops(microbatch) for microbatch in inputs.microbatches)

    def tracked(self, microbatches: list[Batch]) -> Iterator[Batch]:
        """Yield the microbatches of the next step; show progress."""
        return track(microbatches, f"Step {self.state.global_step + 1}", not self.args.disable_tqdm)

    def hyperparameter_search(self, *args, **kwargs) -> Any:
        """Raise UserError: each trial would cost privacy, and losses would choose the best one."""
        check_no_trial("all")

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """Return this process's share of the evaluation texts, in batches of --per_device_eval_batch_size.

        Args:
            eval_dataset: `data_utils.AuthorDataset`, or the name of one among several; default: the trainer's.
        """
        dataset: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        dataset = self.eval_dataset[dataset] if isinstance(dataset, str) else dataset  # type: ignore[index]
        size, rank, world_size = self.args.per_device_eval_batch_size, self.args.process_index, self.args.world_size
        batches = EvalBatches(dataset, size, self.data_collator, rank, world_size)
        return DataLoader(batches, batch_size=None, pin_memory=self.args.dataloader_pin_memory)

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader:
        """Return this process's share of the texts of `Trainer.predict`, whose metrics are those of `evaluate`."""
        return self.get_eval_dataloader(test_dataset)

    def evaluation_loop(self, dataloader: DataLoader, *_, metric_key_prefix: str = "eval", **__) -> EvalLoopOutput:
        """Return losses that depend neither on the batch size nor on the number of processes (evaluation.py)."""

        self.callback_handler.eval_dataloader = dataloader  # for callbacks that read its length
        with self.accelerator.autocast(), Progress("Evaluate", len(dataloader), not self.args.disable_tqdm) as progress:

            def on_batch() -> None:
                self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
                progress.update()

            return evaluate(self.model, dataloader, on_batch, metric_key_prefix)


class PlainEngine:
    """Compute gradients without privacy, with the interface of the clipping engines.

    Args:
        model: called unchanged.
        expected_batch_size: divides the sum of losses.
    """

    def __init__(self, model: nn.Module, expected_batch_size: int):
        self.module, self.expected_batch_size = model, expected_batch_size

    def backward(self, losses: torch.Tensor, author: torch.Tensor, samples_each: Optional[int] = None) -> torch.Tensor:
        """Add the gradients of the authors' losses, (authors,), to `grad`; return zeros in place of norms."""
        (losses.sum() / self.expected_batch_size).backward()
        return torch.zeros_like(losses.detach())

    def close(self) -> None:
        """Do nothing, as there are no hooks."""


class NoDDPWrapper(nn.Module):
    """Call the model, nothing else. accelerate adds DistributedDataParallel only to a bare model."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, *args, **kwargs):
        return self.model(*args, **kwargs)
