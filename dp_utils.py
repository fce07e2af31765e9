"""Author-level DP for Hugging Face's Trainer: what is promised, and the Trainer that keeps the promise.

Promise: every model that a run saves is (epsilon, delta)-differentially private under add-or-remove-one-author
adjacency: all samples of one author together. The number of authors N, the sample rate q, the number of steps
and all options are public. Losses, evaluation metrics and gradient statistics are not covered: they are
computed on private data without noise.

Sampling, loss, clipping and noise are in `mechanism.py`, epsilon in `accounting.py`, the record of every step in
`ledger.py`, resuming in `checkpoints.py`. `DPTrainer` connects them, in the order in which the Trainer asks.

Example:

    >>> privacy = PrivacyArguments(target_epsilon=8.0, per_sample_max_grad_norm=1.0)
    >>> trainer = DPTrainer(model, args, privacy, train_dataset=AuthorDataset(...), data_collator=collate)
    >>> trainer.train()
"""

import copy
import inspect
import math
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any, Optional

import numpy as np
import torch
import torch.distributed as dist
from accelerate.utils import DistributedType, send_to_device
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from accounting import PrivacyLoss, Spending, compute_epsilon, find_noise_multiplier, make_plan
from checkpoints import SEAL_NAME, SignalError, StopOnSignal, check_same_authors, find_checkpoint, rotate, seal
from data_utils import UserError
from guards import check_model, check_options, check_weights
from ledger import LEDGER_NAME, REPORT_NAME, PrivacyLedger, write_json
from mechanism import ENGINES, AuthorDPOptimizer, ClippingEngine, DrawnDataset, LogicalBatch, PoissonAuthorSampler, author_losses

logger = logging.get_logger(f"transformers.{__name__}")

__all__ = ["DPTrainer", "PrivacyArguments", "compute_epsilon", "find_noise_multiplier"]

# --- options ------------------------------------------------------------------------------------------


@dataclass
class PrivacyArguments:
    """What is promised, and how. All of it is public."""

    target_epsilon: Optional[float] = field(default=None, metadata={"help": "Promised epsilon; the noise follows from it."})
    noise_multiplier: Optional[float] = field(
        default=None, metadata={"help": "Noise standard deviation over the clip norm, instead of --target_epsilon."}
    )
    target_delta: Optional[float] = field(
        default=None, metadata={"help": "Promised delta. Default: 1 / number of training authors."}
    )
    per_sample_max_grad_norm: Optional[float] = field(
        default=None, metadata={"help": "Clip norm C: bound on the L2 norm of one author's gradient. Required."}
    )
    samples_per_author: int = field(default=1, metadata={"help": "At most so many samples of an author enter one step (k)."})
    clipping: str = field(
        default="ghost",
        metadata={
            "help": "How per-author gradients are clipped: ghost never stores them; grad_sample (Opacus) does, for more layers.",
            "choices": ["ghost", "grad_sample"],
        },
    )
    secure_noise: bool = field(
        default=False,
        metadata={
            "help": "Harden the noise against floating-point attacks: four cryptographic draws summed; four times the cost."
        },
    )
    allow_other_authors: bool = field(
        default=False, metadata={"help": "Resume with another number of training authors than before: it is meant."}
    )
    disable_dp: bool = field(
        default=False, metadata={"help": "Ordinary fine-tuning through the same data path, for comparison. No privacy."}
    )

    def __post_init__(self):
        for name in ("target_epsilon", "noise_multiplier", "target_delta", "per_sample_max_grad_norm"):
            if getattr(self, name) is not None and not math.isfinite(getattr(self, name)):
                raise UserError(f"--{name} {getattr(self, name)} must be a finite number")
        if self.target_epsilon is not None and self.target_epsilon <= 0:
            raise UserError(f"--target_epsilon {self.target_epsilon} must be above 0")
        if self.noise_multiplier is not None and self.noise_multiplier < 0:
            raise UserError(f"--noise_multiplier {self.noise_multiplier} must be at least 0")
        if self.target_delta is not None and not 0 < self.target_delta < 1:
            raise UserError(f"--target_delta {self.target_delta} must be above 0 and below 1")
        if self.samples_per_author < 1:
            raise UserError(f"--samples_per_author {self.samples_per_author} must be at least 1")
        if self.clipping not in ENGINES:
            raise UserError(f"--clipping {self.clipping} must be one of {', '.join(ENGINES)}")
        if self.disable_dp:
            return
        if (self.target_epsilon is None) == (self.noise_multiplier is None):
            raise UserError("give exactly one of --target_epsilon and --noise_multiplier (or --disable_dp for no privacy)")
        if self.per_sample_max_grad_norm is None or self.per_sample_max_grad_norm <= 0:
            raise UserError(
                "--per_sample_max_grad_norm, the clip norm of an author's gradient, must be given and above 0; try 1.0"
            )


# --- the Trainer ----------------------------------------------------------------------------------------

SUPPORTED_LAUNCHES = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU, DistributedType.MULTI_XPU)


class BudgetCallback(TrainerCallback):
    """Stop the training when the ledger allows no further step."""

    def __init__(self, trainer: "DPTrainer"):
        self.trainer = trainer

    def on_step_end(self, args, state, control, **kwargs):
        if self.trainer.run_steps >= self.trainer.allowed_steps and state.global_step < state.max_steps:
            logger.warning(f"Stopped at step {state.global_step} of {state.max_steps}: --target_epsilon is used up.")
            control.should_training_stop = True


class DPTrainer(Trainer):
    """Trainer whose training is the mechanism of this module; everything else is the Trainer's.

    The batch size that is accounted for, B, is per_device_train_batch_size x gradient_accumulation_steps x
    world_size authors; a draw is cut into microbatches of at most per_device_train_batch_size authors, and the
    Trainer's own loop sees one logical batch per step.

    Args:
        model: in float32; its trainable parameters are trained, all others are left as they are.
        args: Hugging Face's, with max_grad_norm 0.
        privacy: what is promised.
        train_dataset: `data_utils.AuthorDataset`: offsets and indices, and the samples of many authors at once.
        data_collator: pads a list of samples to input_ids and labels of shape (samples, tokens).
        kwargs: the Trainer's.
    Raises:
        UserError: for options, a model or data under which the guarantee would not hold.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        args: TrainingArguments,
        privacy: PrivacyArguments,
        *,
        train_dataset: Any,
        data_collator: Callable,
        **kwargs,
    ):
        check_options(args, privacy)
        check_model(model)
        if not privacy.disable_dp:  # a model that cannot be clipped is refused before anything is written
            ENGINES[privacy.clipping](model, privacy.per_sample_max_grad_norm).close()
        args = copy.copy(args)
        if args.n_gpu > 1:
            logger.warning(
                "Several GPUs in one process would need DataParallel, which mixes authors: using one. To use all, start a "
                "process for each with torch.distributed.run."
            )
            args._n_gpu = 1
        self.privacy = privacy
        self.checkpoint = find_checkpoint(args, privacy)
        self.ledger = PrivacyLedger(Path(args.output_dir) / LEDGER_NAME)
        earlier = broadcast(self.ledger.runs if self.ledger.steps else [])  # a run that took no step binds nobody
        self.plan = make_plan(privacy, args, train_dataset.offsets, earlier[-1]["noise_multiplier"] if earlier else None)
        check_same_authors(earlier, self.plan.num_authors, privacy.allow_other_authors)
        self.privacy_loss: Optional[PrivacyLoss] = None  # of the earlier runs and this one, on the first process
        self.run_steps = 0  # steps of this run, as opposed to those of earlier runs in the ledger
        self.allowed_steps: float = math.inf
        self.engine: Optional[ClippingEngine] = None
        self.audit: Optional[dict[str, Any]] = None  # its result, for the report
        self.model_card: Optional[Callable[[dict[str, Any]], str]] = None  # makes one of a privacy report
        self._step_loss = torch.zeros((), device=args.device)
        # Norms over the clip norm that were seen, in bins of a tenth of a decade; private.
        self.norm_edges = torch.logspace(-4, 4, 81, device=args.device)
        self._norm_counts = torch.zeros(len(self.norm_edges) + 1, device=args.device)
        self._clip_counts = torch.zeros(4, device=args.device)  # authors seen, clipped, not finite, and steps, since the last log
        args.ignore_data_skip = True  # batches are drawn afresh: there is nothing to skip
        args.gradient_accumulation_steps = 1  # the logical batch is cut in training_step
        args.dataloader_pin_memory = args.dataloader_pin_memory and args.device.type != "cpu"
        super().__init__(model=model, args=args, train_dataset=train_dataset, data_collator=data_collator, **kwargs)
        args.max_steps = self.plan.steps  # not before: it would be said to override --num_train_epochs, of which it is made
        if self.accelerator.scaler is not None or self.accelerator.distributed_type not in SUPPORTED_LAUNCHES:
            raise UserError(
                "accelerate's configuration asks for fp16, deepspeed, fsdp or a TPU: use --bf16, torch.distributed.run"
            )
        self.add_callback(BudgetCallback(self))
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.needs_positions = "position_ids" in inspect.signature(base.forward).parameters

    # What the Trainer asks for, in the order in which it asks.

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs):
        """Train under the plan, continuing at `resume_from_checkpoint` if given (args.resume_from_checkpoint otherwise).

        Raises:
            UserError: where the budget is used up, or the folder in use or not to be written.
            SignalError: after a signal, when the checkpoint is saved.
        """
        if resume_from_checkpoint:
            self.args.resume_from_checkpoint = resume_from_checkpoint
            self.checkpoint = find_checkpoint(self.args, self.privacy)
        if self._is_finished():
            logger.info(f"{self.checkpoint} is the end of the training: nothing is left to do, or spent.")
            self.state = TrainerState.load_from_json(str(self.checkpoint / TRAINER_STATE_NAME))
            return self._load_from_checkpoint(str(self.checkpoint))
        signals = StopOnSignal()
        self.add_callback(signals)
        try:
            with self._folder_of_ones_own():
                if not self.privacy.disable_dp:
                    self._start_run()
                result = super().train(str(self.checkpoint) if self.checkpoint else None, **kwargs)
        finally:
            self.checkpoint = None
            self.remove_callback(signals)
            signals.restore()
            if self.engine is not None:
                self.engine.close()
                self.engine, self.model_wrapped = None, self.model
        if signals.agreed:
            raise SignalError(signals.agreed)
        return result

    def _is_finished(self) -> bool:
        """Whether all planned steps are in the checkpoint."""
        if self.checkpoint is None:
            return False
        return TrainerState.load_from_json(str(self.checkpoint / TRAINER_STATE_NAME)).global_step >= self.plan.steps

    @contextmanager
    def _folder_of_ones_own(self) -> Iterator[None]:
        """Lock the folder, for the first process; every process has looked into it before that one writes."""
        if dist.is_initialized():
            dist.barrier()
        if self.privacy.disable_dp or self.args.process_index > 0:
            yield
            return
        known = self.ledger.steps
        with self.ledger.locked():
            if self.ledger.steps != known:
                raise UserError(
                    f"--output_dir {self.args.output_dir}: another run wrote to it just now; look what it is, then resume"
                )
            yield

    def _start_run(self) -> None:
        """Work out how many steps the budget allows, and write the ledger's header."""
        plan = self.plan
        if plan.noise_multiplier == 0:
            logger.warning("*** NO PRIVACY: --noise_multiplier 0 clips without noise. Epsilon is infinite. ***")
        if self.args.process_index == 0:
            if self.run_steps:  # trained before: the grid was planned for these steps only
                self.run_steps, self.privacy_loss = 0, None
            if plan.target_epsilon is not None:
                self.allowed_steps = largest(plan.steps, lambda steps: self.epsilon(steps) <= plan.target_epsilon)
            if self.allowed_steps >= 1:
                versions = {name: version(name) for name in ("torch", "transformers", "opacus")}
                started = datetime.now(timezone.utc).isoformat(timespec="seconds")
                self.ledger.start_run({**asdict(plan), "started": started, "versions": versions})
        self.run_steps, self.allowed_steps = 0, broadcast(self.allowed_steps)
        if self.allowed_steps < 1:
            raise UserError(
                f"--target_epsilon {plan.target_epsilon} is used up by the steps in {self.ledger.path}: raise it, or take the "
                "model of the newest checkpoint as it is"
            )

    def get_train_dataloader(self) -> DataLoader:
        """Return the logical batches of an epoch, ceil(1 / q) of them, drawn and padded in the workers."""
        args = self.args
        sampler = PoissonAuthorSampler(
            self.train_dataset.offsets,
            self.train_dataset.indices,
            sample_rate=self.plan.sample_rate,
            samples_per_author=self.plan.samples_per_author,
            steps=math.ceil(1 / self.plan.sample_rate),
            key=broadcast(secrets.randbits(128)),
            rank=args.process_index,
            world_size=args.world_size,
        )
        return DataLoader(
            DrawnDataset(self.train_dataset, args.per_device_train_batch_size, self.data_collator),
            batch_sampler=sampler,
            collate_fn=as_is,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
            multiprocessing_context=args.dataloader_multiprocessing_context,
        )

    def create_optimizer(self, *args, **kwargs) -> torch.optim.Optimizer:
        """Wrap the Trainer's optimizer in the one that adds the noise."""
        try:
            optimizer = super().create_optimizer(*args, **kwargs)
        except (ValueError, TypeError, ImportError, KeyError) as error:
            raise UserError(f"--optim {self.args.optim.value}, with --optim_args {self.args.optim_args}: {error}") from error
        if not self.privacy.disable_dp and not isinstance(getattr(optimizer, "optimizer", optimizer), AuthorDPOptimizer):
            self.optimizer = AuthorDPOptimizer(
                optimizer,
                noise_multiplier=self.plan.noise_multiplier,
                clip_norm=self.plan.clip_norm,
                expected_batch_size=self.plan.expected_batch_size,
                before_release=self._record_step,
                secure_noise=self.privacy.secure_noise,
            )
        return self.optimizer

    def create_scheduler(self, *args, **kwargs) -> torch.optim.lr_scheduler.LRScheduler:
        """Name the option where the Trainer's scheduler does not take its arguments."""
        try:
            return super().create_scheduler(*args, **kwargs)
        except (ValueError, TypeError, KeyError) as error:
            kind, options = self.args.lr_scheduler_type.value, self.args.lr_scheduler_kwargs
            raise UserError(f"--lr_scheduler_type {kind}, with --lr_scheduler_kwargs {options}: {error}") from error

    def _wrap_model(self, model: nn.Module, training: bool = True, dataloader: Optional[DataLoader] = None) -> nn.Module:
        """Return the clipping engine's module, for training only; wrapped, so that accelerate adds no DistributedDataParallel."""
        if not training:
            return model
        if dist.is_initialized():
            for parameter in self.model.parameters():
                dist.broadcast(parameter.data, src=0)
        if self.privacy.disable_dp:
            return Wrapper(self.model)
        self.engine = ENGINES[self.plan.clipping](self.model, self.plan.clip_norm)
        return Wrapper(self.engine.module)

    def training_step(
        self, model: nn.Module, inputs: LogicalBatch, num_items_in_batch: Optional[torch.Tensor] = None
    ) -> torch.Tensor:
        """Accumulate the clipped gradients of one logical batch; an empty one costs nothing.

        Returns:
            the mean loss over the authors of the whole draw, as this process' summand of a mean over processes.
            Not private.
        """
        model.train()
        self.optimizer.zero_grad()  # also what a step left that was broken off
        total = torch.zeros_like(self._step_loss)
        for microbatch in inputs.microbatches:
            microbatch = send_to_device(microbatch, self.args.device, non_blocking=True)
            with self.accelerator.autocast():
                losses = author_losses(model, microbatch, self.needs_positions)
            if self.engine is None:
                (losses.sum() / self.plan.expected_batch_size).backward()
            else:
                norms = self.engine.backward(losses, microbatch["author"])
                counts = [norms.new_tensor(len(norms)), (norms > self.plan.clip_norm).sum(), (~norms.isfinite()).sum()]
                self._clip_counts[:3] += torch.stack(counts)
                bins = torch.bucketize(norms / self.plan.clip_norm, self.norm_edges)
                self._norm_counts.scatter_add_(0, bins, torch.ones_like(norms))
            total += losses.detach().nan_to_num(posinf=0.0).sum()
        self._clip_counts[3] += 1 / self.args.world_size
        if self.engine is None and dist.is_initialized():
            sum_gradients([parameter for parameter in self.model.parameters() if parameter.requires_grad])
        if inputs.batch_size:  # the loss of an empty draw does not exist: repeat the last one
            self._step_loss = total * self.args.world_size / inputs.batch_size
        return self._step_loss.clone()

    def _record_step(self) -> None:
        """Write the step ahead of its update; refuse one that the budget does not allow."""
        if self.run_steps >= self.allowed_steps:
            raise RuntimeError(f"step {self.run_steps + 1} would exceed --target_epsilon {self.plan.target_epsilon}")
        if self.args.process_index == 0:
            self.ledger.record_step()
        self.run_steps += 1

    def _get_grad_norm(self, model: nn.Module, grad_norm: Optional[torch.Tensor] = None) -> Optional[torch.Tensor]:
        """Skip the norm that the Trainer logs: before the optimizer's step there is no gradient that could be shown."""
        return super()._get_grad_norm(model, grad_norm) if self.privacy.disable_dp else None

    def get_total_train_batch_size(self, args: TrainingArguments) -> int:
        """Return B, for the Trainer's log."""
        return self.plan.expected_batch_size

    def floating_point_ops(self, inputs: LogicalBatch) -> int:
        """Sum over the microbatches."""
        return sum(super(DPTrainer, self).floating_point_ops(microbatch) for microbatch in inputs.microbatches)

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """Add epsilon spent so far to every line, and to the training ones statistics that are not private."""
        if not self.privacy.disable_dp:
            if "loss" in logs:
                self._check_weights()
                authors, clipped, not_finite, steps = self._pop_clip_counts()
                logs["clip_fraction"] = clipped / max(authors, 1)
                logs["authors_per_step"] = authors / max(1, steps)
                logs["noise_multiplier"] = self.plan.noise_multiplier
                if not_finite:
                    logger.warning(f"The gradients of {not_finite:.0f} authors were not finite; they contributed zero.")
            if self.args.process_index == 0:
                logs["epsilon"] = self.epsilon()
        super().log(logs, *args, **kwargs)

    def _pop_clip_counts(self) -> list[float]:
        if dist.is_initialized():
            dist.all_reduce(self._clip_counts)
        counts = self._clip_counts.tolist()
        self._clip_counts.zero_()
        return counts

    def gathered_norm_counts(self) -> list[float]:
        """Return how many gradient norms of all processes lie below, between and above `norm_edges`; private."""
        counts = self._norm_counts.clone()
        if dist.is_initialized():
            dist.all_reduce(counts)
        return counts.tolist()

    def create_model_card(self, *args, **kwargs) -> None:
        """Write `model_card`, if there is one, instead of the Trainer's card, which would show private metrics."""
        if self.model_card is not None and self.is_world_process_zero():
            (Path(self.args.output_dir) / "README.md").write_text(self.model_card(self.privacy_report()))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Save as the Trainer does, whole or not at all: sealed at the end, and only then are older ones deleted."""
        self._check_weights()
        folder = Path(self.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.args.should_save:
            (folder / SEAL_NAME).unlink(missing_ok=True)  # of a lost step of the same number
        keep, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = keep
        if dist.is_initialized():
            dist.barrier()  # every process has its files in there
        if self.args.should_save:
            seal(folder)
            rotate(folder, keep, self.state.best_model_checkpoint)

    def _check_weights(self) -> None:
        trained = ((name, parameter) for name, parameter in self.model.named_parameters() if parameter.requires_grad)
        check_weights(trained, f"--learning_rate: by step {self.state.global_step}, ", "lower it, and start anew")

    def _save(self, output_dir: Optional[str] = None, state_dict: Optional[dict] = None) -> None:
        """Save model and tokenizer, and the privacy report beside them."""
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            report = self.privacy_report()
            for folder in {output_dir or self.args.output_dir, self.args.output_dir}:
                write_json(Path(folder) / REPORT_NAME, report)

    # What the run has promised and spent.

    def _spending(self, steps: int) -> Spending:
        return Spending(self.plan.noise_multiplier, self.plan.sample_rate, steps)

    def privacy_report(self) -> dict[str, Any]:
        """Return what privacy.json holds; on the first process only."""
        audit = {"audit": self.audit} if self.audit else {}
        if self.plan.disable_dp:
            return {**self.plan.report(math.inf, self.state.global_step), **audit}
        report = self.plan.report(self.epsilon(), self.ledger.steps, self.privacy_loss.accountant)
        return {**report, "secure_noise": self.privacy.secure_noise, **audit, "ledger_link": self.ledger.links[-1]}

    def summary(self) -> str:
        """Return what will happen, for the log before training."""
        sizes = [(p.numel(), p.requires_grad) for p in self.model.parameters()]
        trained, total = sum(size for size, is_trained in sizes if is_trained), sum(size for size, _ in sizes)
        epsilon = math.inf if self.plan.disable_dp or self.args.process_index > 0 else self.epsilon(self.plan.steps)
        return self.plan.summary(np.diff(self.train_dataset.offsets), trained, total, epsilon, self.ledger.steps)

    def epsilon(self, more_steps: int = 0) -> float:
        """Return the epsilon spent by all steps in the ledger and `more_steps`; on the first process only."""
        if self.privacy_loss is None:
            self.privacy_loss = PrivacyLoss([*self.ledger.spendings, self._spending(self.plan.steps)], self.plan.delta)
        return self.privacy_loss.epsilon([*self.ledger.spendings, self._spending(more_steps)])


class Wrapper(nn.Module):
    """Call the model, nothing else: accelerate adds DistributedDataParallel to a bare model only."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, *args, **kwargs):
        return self.model(*args, **kwargs)


def as_is(batch: Any) -> Any:
    """Collate nothing: the data set returns whole batches. A function by name, so that workers can be spawned."""
    return batch


def sum_gradients(parameters: list[nn.Parameter]) -> None:
    """Sum the gradients of all processes, in one buffer; one who had no author has zeros."""
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    total = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(total)
    for parameter, part in zip(parameters, total.split([p.numel() for p in parameters])):
        parameter.grad = part.view_as(parameter)


def broadcast(value: Any) -> Any:
    """Return the first process' value on every process."""
    if not dist.is_initialized():
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def largest(limit: int, allowed: Callable[[int], bool]) -> int:
    """Return the largest number up to `limit` that is allowed, by bisection; 0 if none is."""
    low, high = 0, limit
    if allowed(high):
        return high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if allowed(middle) else (low, middle)
    return low
