"""Author-level DP for Hugging Face's Trainer: what is promised, and the Trainer that keeps the promise.

Promise: every model that a run saves is (epsilon, delta)-differentially private under add-or-remove-one-author
adjacency: all samples of one author together. The number of authors N, the sample rate q, the number of steps
and all options are public. Losses, evaluation metrics and gradient statistics are not covered: they are
computed on private data without noise.

The rooms behind it are in `author_dp/`: a step in `mechanism.py` and `clipping/`, what a run may spend in `budget.py` with
`accounting.py` and `ledger.py`, resuming in `checkpoints.py`, refusals in `guards.py`. `DPTrainer` connects them, in the order in
which the Trainer asks.

Example:

    >>> privacy = PrivacyArguments(target_epsilon=8.0, per_sample_max_grad_norm=1.0)
    >>> trainer = DPTrainer(model, args, privacy, train_dataset=AuthorDataset(...), data_collator=collate)
    >>> trainer.train()
"""

import json
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Optional

import torch
from accelerate.utils import AutocastKwargs, send_to_device
from peft import PeftModel
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME
from transformers.trainer_utils import EvalLoopOutput, HubStrategy, SchedulerType
from transformers.training_args import OptimizerNames
from transformers.utils import PushInProgress, logging

from author_dp.accounting.accountant import compute_epsilon, find_noise_multiplier
from author_dp.accounting.budget import Budget, StopAtTargetEpsilon
from author_dp.accounting.ledger import LEDGER_NAME, REPORT_NAME, PrivacyLedger, read_private_count
from author_dp.accounting.plan import make_plan, plan_of
from author_dp.clipping import ENGINES, ClippingEngine
from author_dp.clipping.norm_stats import NormStatistics
from author_dp.distributed import all_reduce_gradients, broadcast
from author_dp.errors import SignalError, UserError
from author_dp.guards.agreement import check_same_start
from author_dp.guards.callbacks import WatchedCallbacks, check_no_trial, metric_driven_callback, metric_driven_scheduler
from author_dp.guards.gradient_canaries import CollateWithCanaries, GradientCanaries
from author_dp.guards.loggers import redirect_loggers
from author_dp.guards.model_check import ModelCheck, longest_sample, verify_model
from author_dp.guards.monitors import RunMonitors
from author_dp.guards.options import (
    check_fsdp,
    check_launch,
    check_model,
    check_options,
    check_shared_authors,
    check_trained_weights,
    have_shared_authors,
    metric_driven_option,
    use_adam_bc,
)
from author_dp.guards.precision import check_float32, full_precision_sums
from author_dp.mechanism.adam_bc import AdamBC
from author_dp.mechanism.fsdp import ShardedOptimizer, full_state_dict, load_weights, make_engine, missing_rounds, shard
from author_dp.mechanism.losses import author_losses, needs_position_ids
from author_dp.mechanism.microbatches import LogicalBatch, is_real, make_microbatch_shape
from author_dp.mechanism.optimizer import AuthorDPOptimizer
from author_dp.mechanism.sampling import PoissonAuthorSampler
from author_dp.mechanism.secret_generators import SecretGenerators
from author_dp.models.activations import fuse_activations
from author_dp.models.quantization import model_sizes
from author_dp.models.weights import check_same_base, describe_base, write_certified
from author_dp.outputs.model_card import model_card, public_settings
from author_dp.outputs.privacy_statement import starting_model
from author_dp.outputs.publish import upload
from author_dp.permissions import owner_only
from author_dp.training.checkpointing import (
    atomic_checkpoint,
    check_author_count,
    check_counts_hidden,
    check_ledger_covers,
    check_not_released,
    find_checkpoint,
    load_trainer_state,
)
from author_dp.training.dataloading import (
    NoDDPWrapper,
    adapt_trainer_args,
    as_user_error,
    broadcast_parameters,
    load_logical_batches,
    make_sampler,
    max_bands_in_memory,
    to_device,
)
from author_dp.training.evaluation import EvalBatches, evaluate
from author_dp.training.interruption import StopOnSignal
from author_dp.training.malloc import memory_kept

logger = logging.get_logger(f"transformers.{__name__}")

__all__ = ["DPTrainer", "PrivacyArguments", "compute_epsilon", "find_noise_multiplier"]

# --- options ------------------------------------------------------------------------------------------


# Beyond them float32 does not hold the noise, its square or that of a clipped gradient, or an epoch has too many steps to count.
FLOAT_RANGES = {
    "per_sample_max_grad_norm": (1e-6, 1e6, "Give a clip norm near an author's gradient norm, often 0.1 to 10"),
    "noise_multiplier": (1e-6, 1e6, "Give 0, for no privacy, or a number often near 1"),
    "sample_rate": (1e-12, 1, "Give a probability"),
}


@dataclass
class PrivacyArguments:
    """What is promised, and how. All of it is public."""

    target_epsilon: Optional[float] = field(
        default=None, metadata={"help": "Promised epsilon; the noise follows from it. Give it or --noise_multiplier."}
    )
    noise_multiplier: Optional[float] = field(
        default=None, metadata={"help": "Noise standard deviation over the clip norm, instead of --target_epsilon."}
    )
    target_delta: Optional[float] = field(
        default=None, metadata={"help": "Promised delta. Default: 1 / number of training authors."}
    )
    per_sample_max_grad_norm: Optional[float] = field(
        default=None,
        metadata={"help": "Clip norm C: bound on the L2 norm of one author's gradient. Required; 1.0 is a good start."},
    )
    samples_per_author: int = field(default=1, metadata={"help": "At most so many samples of an author enter one step (k)."})
    clipping: str = field(
        default="ghost",
        metadata={
            "help": "How per-author gradients are clipped: ghost hardly stores any; grad_sample (Opacus) does, for comparison.",
            "choices": ["ghost", "grad_sample"],
        },
    )
    secure_noise: bool = field(
        default=False,
        metadata={
            "help": "Harden the noise against floating-point attacks: four cryptographic draws summed; four times the cost."
        },
    )
    sample_rate: Optional[float] = field(
        default=None,
        metadata={
            "help": "Probability with which an author enters a step (q). Default: expected batch size / number of training "
            "authors. The product of the batch options is then only what the sum is divided by."
        },
    )
    noise_bands: Optional[str] = field(
        default=None,
        metadata={
            "help": "Correlate the noise over so many steps (b), or auto: less noise in the sum of updates at the same epsilon. "
            "Needs memory for b - 1 times the trained parameters. Default: 1, independent noise; what is resumed stays as it was."
        },
    )
    adam_noise_correction: Optional[bool] = field(
        default=None,
        metadata={
            "help": "Take the noise's variance out of Adam's second moment (DP-AdamBC). Default: with noise bands only, which "
            "gain less without it."
        },
    )
    hide_counts: bool = field(
        default=False,
        metadata={
            "help": "Keep the numbers of authors and samples out of all public files; needs --sample_rate and --target_delta."
        },
    )
    allow_other_authors: bool = field(
        default=False, metadata={"help": "Resume with another number of training authors than before: it is meant."}
    )
    disable_dp: bool = field(
        default=False, metadata={"help": "Ordinary fine-tuning through the same data path, for comparison. No privacy."}
    )

    def __post_init__(self):
        for name in ("target_epsilon", "noise_multiplier", "target_delta", "per_sample_max_grad_norm", "sample_rate"):
            if getattr(self, name) is not None and not math.isfinite(getattr(self, name)):
                raise UserError(f"--{name} {getattr(self, name)} must be a finite number")
        if self.target_epsilon is not None and self.target_epsilon <= 0:
            raise UserError(f"--target_epsilon {self.target_epsilon} must be above 0")
        if self.target_delta is not None and not 0 < self.target_delta < 1:
            raise UserError(f"--target_delta {self.target_delta} must be above 0 and below 1")
        for name, (lowest, highest, remedy) in FLOAT_RANGES.items():
            value = getattr(self, name)
            if value is not None and not lowest <= value <= highest and (name, value) != ("noise_multiplier", 0):
                raise UserError(f"--{name} {value}: out of range. {remedy}, from {lowest:g} to {highest:g}")
        if self.hide_counts and (self.sample_rate is None or self.target_delta is None):
            raise UserError(
                "--hide_counts needs --sample_rate and --target_delta: their defaults tell the number of authors; give both"
            )
        if self.noise_bands not in (None, "auto") and (not str(self.noise_bands).isdecimal() or int(self.noise_bands) < 1):
            raise UserError(f"--noise_bands {self.noise_bands} must be a whole number above 0, or auto")
        if self.noise_bands == "auto" and self.target_epsilon is None and not self.disable_dp:
            raise UserError("--noise_bands auto needs --target_epsilon, for which it compares; or give a number")
        if self.samples_per_author < 1:
            raise UserError(f"--samples_per_author {self.samples_per_author} must be at least 1")
        if self.clipping not in ENGINES:
            raise UserError(f"--clipping {self.clipping} must be one of {', '.join(ENGINES)}")
        if self.disable_dp:
            return
        if (self.target_epsilon is None) == (self.noise_multiplier is None):
            raise UserError("give exactly one of --target_epsilon and --noise_multiplier (or --disable_dp for no privacy)")
        if self.per_sample_max_grad_norm is None:
            raise UserError("--per_sample_max_grad_norm, the clip norm of an author's gradient, must be given; try 1.0")


# --- the Trainer ----------------------------------------------------------------------------------------


class DPTrainer(Trainer):
    """Trainer whose training is the mechanism of author_dp/mechanism/optimizer.py; everything else is the Trainer's.

    The batch size that is accounted for, B, is per_device_train_batch_size x gradient_accumulation_steps x
    world_size authors; a draw is cut into microbatches of at most per_device_train_batch_size authors, and the
    Trainer's own loop sees one logical batch per step.

    Args:
        model: in float32; its trainable parameters are trained, all others are left as they are. An activation that is
            written out in Python becomes one operation (author_dp/models/activations.py).
        args: Hugging Face's, with max_grad_norm 0.
        privacy: what is promised.
        train_dataset: `data_utils.AuthorDataset`: offsets and indices, and the samples of many authors at once.
        data_collator: pads a list of samples to input_ids and labels of shape (samples, tokens).
        sequence_len: tokens of the longest sample, from which the shapes of microbatches follow; default: 128, or the model's
            positions.
        canaries: authors by whom the run audits itself, not yet in the data set.
        full_shard: share weights, sums, noise and optimizer state among the processes (author_dp/mechanism/fsdp.py).
        model_name: hub name or folder that the model comes from; default: the one that it was loaded from.
        kwargs: the Trainer's.
    Raises:
        UserError: for options, a model or data under which the guarantee would not hold.
    """

    model: PreTrainedModel
    train_dataset: Any
    optimizer: Any
    audit: Optional[dict[str, Any]] = None  # its result, for the report
    adapter_base: Optional[dict[str, Any]] = None  # the model under an adapter, for the report

    def __init__(
        self,
        model: PreTrainedModel,
        args: TrainingArguments,
        privacy: PrivacyArguments,
        *,
        train_dataset: Any,
        data_collator: Callable,
        sequence_len: Optional[int] = None,
        canaries: Optional[GradientCanaries] = None,
        full_shard: bool = False,
        model_name: Optional[str] = None,
        **kwargs,
    ):
        check_options(args, privacy)
        check_model(model, proven=False)
        fuse_activations(model)
        self.full_shard = full_shard
        if full_shard:
            check_fsdp(args, privacy, model)
            shard(model, args.device)
        self.proof: Optional[ModelCheck] = None
        if not privacy.disable_dp:  # a model that cannot be clipped is refused before anything is written
            checkpointing: Any = (args.activation_checkpointing_kwargs or {}) if args.activation_checkpointing else None
            check_float32(to_device(model, args), args.bf16)
            self.proof = verify_model(model, privacy.clipping, sequence_len, checkpointing, args.bf16)
            logger.info(self.proof.in_words())
        self.privacy = privacy
        self.sequence_len = longest_sample(model, sequence_len)
        if sequence_len is None and (longest := getattr(train_dataset, "longest", 0)) > self.sequence_len:
            raise UserError(f"DPTrainer needs sequence_len={longest}: a sample is longer than {self.sequence_len} tokens")
        self.adapter = isinstance(model, PeftModel)
        self.checkpoint = find_checkpoint(args, privacy, self.adapter)
        self.base_model = starting_model(model_name or model.name_or_path) if args.process_index == 0 else None
        self.canaries = canaries
        if canaries is not None:
            train_dataset, data_collator = canaries.join(train_dataset), CollateWithCanaries(data_collator)
        self.folder = Path(str(args.output_dir))
        ledger = PrivacyLedger(self.folder / LEDGER_NAME)
        earlier = broadcast(ledger.runs if ledger.steps else [])  # a run that took no step binds nobody
        self.plan = make_plan(
            privacy, args, train_dataset.offsets, earlier[-1] if earlier else None, max_bands_in_memory(model, args)
        )
        if self.plan.noise_bands > 1 and getattr(train_dataset, "hashes", None) is None:
            raise ValueError("noise bands need the hashes of all authors: AuthorDataset(..., hashes=author_hashes(authors))")
        check_same_start(self.plan, train_dataset, model, args.bf16)
        self.norms = NormStatistics(self.plan.clip_norm, args.device)
        self.checks = RunMonitors(self.plan, canaries, self.norms)
        kept = broadcast(read_private_count(self.folder))
        check_author_count(earlier, kept, self.plan.num_authors, privacy.hide_counts, privacy.allow_other_authors)
        check_counts_hidden(self.folder, ledger, privacy.hide_counts)
        self.budget = Budget(self.plan, ledger, is_first_process=args.process_index == 0)
        self.budget.by_metrics = metric_driven_option(args)
        self.shared_authors = False  # whether evaluation authors may be training authors
        self.engine: Optional[ClippingEngine] = None  # while training
        self.data: Optional[dict[str, Any]] = None  # how texts became samples, for the report
        self.generators: Optional[SecretGenerators] = None  # while training with privacy
        self.settings = public_settings(args, model, model_name or model.name_or_path)
        self.ended: Optional[dict[str, Any]] = None  # the privacy.json of a training that is at its end
        self._look_for_end()
        self._step_loss = torch.zeros((), device=args.device)
        redirect_loggers(args)
        args = adapt_trainer_args(args)
        super().__init__(model=model, args=args, train_dataset=train_dataset, data_collator=data_collator, **kwargs)
        args.max_steps = self.plan.steps  # not before: it would be said to override --num_train_epochs, of which it is made
        check_launch(self.accelerator, args.bf16)
        if full_shard:  # or copies of all gathered weights in bfloat16 would wait for the end of a forward
            self.accelerator.autocast_handler = AutocastKwargs(cache_enabled=False)
        if not privacy.disable_dp:
            self.callback_handler = WatchedCallbacks(self)
        self.add_callback(StopAtTargetEpsilon(self.budget))
        self.needs_positions = needs_position_ids(model)

    # What the Trainer asks for, in the order in which it asks.

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs) -> Any:
        """Train under the plan, continuing at `resume_from_checkpoint` if given (args.resume_from_checkpoint otherwise).

        Raises:
            UserError: where the budget is used up, or the folder in use or not to be written.
            SignalError: after a signal, when the checkpoint is saved.
            MechanismError: where the noise is not what the ledger says; that is then noted in the folder, and nothing saved.
        """
        check_no_trial(args[0] if args else kwargs.get("trial"))
        if resume_from_checkpoint:
            self.args.resume_from_checkpoint = resume_from_checkpoint  # type: ignore[assignment]  # True: the newest
            self.checkpoint = find_checkpoint(self.args, self.privacy, self.adapter)
        if self.args.process_index == 0:
            self._identify_base()
        self._look_for_end()
        if self.checkpoint and self.ended is not None:
            logger.info(f"{self.checkpoint} is the end of the training: nothing is left to do, or spent.")
            self.state = load_trainer_state(self.checkpoint)
            return self._load_from_checkpoint(str(self.checkpoint))
        self._check_choices()
        self.add_callback(signals := StopOnSignal())
        little = self.full_shard or self.args.activation_checkpointing  # memory counts for more than time
        try:
            with (
                self.budget.lock_output_dir(),
                self.budget.alarm(self.create_model_card),
                memory_kept(self.args.device.type == "cpu" and not little),
                self._secret_generators() as self.generators,
                full_precision_sums(),
            ):
                self.budget.start()
                self.checks.start(self._sampler, self.budget, self.args.device, self.privacy.secure_noise)
                with owner_only():
                    result = super().train(str(self.checkpoint) if self.checkpoint else None, *args, **kwargs)
                self._check(whole=True)
        finally:
            self.checkpoint = self.generators = None
            self.checks.stop()
            self.remove_callback(signals)
            signals.restore()
            if self.engine is not None:
                self.engine.close()
                self.engine, self.model_wrapped = None, self.model
        if signals.agreed:
            raise SignalError(signals.agreed)
        return result

    def _look_for_end(self) -> None:
        """Where the checkpoint is the end of the training, report the run that took its steps, whatever the options are now."""
        self.ended, self.audit, self.budget.plan = None, None, self.plan
        if not self.checkpoint or load_trainer_state(self.checkpoint).global_step < self.plan.steps:
            return
        self.ended, final = json.loads((self.checkpoint / REPORT_NAME).read_text()), self.folder / REPORT_NAME
        if final.exists() and (known := json.loads(final.read_text())).get("weights") == self.ended.get("weights"):
            self.ended = known  # with an audit, if there was one
        self.audit = self.ended.get("audit")
        if not self.plan.disable_dp:
            self.budget.ledger.read()  # another run may have written it since
            plan = plan_of(self.budget.ledger.last_run)
            if plan.hide_counts:  # then the header does not tell them, and nor will the report
                plan = replace(plan, num_authors=self.plan.num_authors, num_samples=self.plan.num_samples)
            self.budget.plan = plan

    def _secret_generators(self) -> AbstractContextManager[Optional[SecretGenerators]]:
        """Return the context that makes random numbers inside the model secret; without privacy, one that does nothing."""
        if self.privacy.disable_dp:
            return nullcontext()
        return SecretGenerators({self.args.device, *(parameter.device for parameter in self.model.parameters())})

    def _save_rng_state(self, output_dir: str) -> None:
        """Save the generators' states without privacy only: otherwise they are secrets."""
        if self.generators is None:
            super()._save_rng_state(output_dir)

    def _load_rng_state(self, checkpoint: Optional[str]) -> None:
        """Restore the generators' states without privacy only: otherwise each training has new ones."""
        if self.generators is None:
            super()._load_rng_state(checkpoint)

    def _identify_base(self) -> None:
        """Hash an adapter's base, once; a checkpoint must have the same one, and knows the model that training started from.

        Raises:
            UserError: for another base.
        """
        if self.adapter:
            base: Any = self.model
            name = base.peft_config[base.active_adapter].base_model_name_or_path
            self.adapter_base = describe_base(name, getattr(base.get_base_model().config, "_commit_hash", None))
        if self.checkpoint:
            report = json.loads((self.checkpoint / REPORT_NAME).read_text())
            if not self.privacy.disable_dp:
                check_same_base(self.adapter_base, report.get("adapter_base"))
            self.base_model = report.get("base_model")

    def _check_choices(self) -> None:
        """Note what lets metrics choose the model, for the ledger; raise UserError where nothing would pay for that."""
        scheduler = metric_driven_scheduler(self)
        option = metric_driven_option(self.args) or scheduler or metric_driven_callback(self.callback_handler.callbacks)
        shared = self.shared_authors or have_shared_authors(self.train_dataset, self.eval_dataset)
        check_shared_authors(shared, option, self.privacy)
        if not self.privacy.disable_dp:
            check_not_released(self.budget.ledger, option)
        self.budget.by_metrics = option

    def hyperparameter_search(self, *args, **kwargs) -> Any:
        """Refuse: each trial would spend, and the best one be chosen by losses."""
        check_no_trial("all")

    def get_train_dataloader(self) -> DataLoader:
        """Return the logical batches of an epoch."""
        at_once = self.args.per_device_train_batch_size
        at_once = at_once if self.proof is None else self.proof.max_authors(at_once)
        shape = None
        if not self.privacy.disable_dp:
            accumulation = self.plan.expected_batch_size // (at_once * self.args.world_size)
            shape = make_microbatch_shape(at_once, accumulation, self.privacy.samples_per_author, self.sequence_len)
        sampler = self._sampler()
        self.checks.watch(sampler)
        return load_logical_batches(self.train_dataset, sampler, self.args, self.data_collator, at_once, shape)

    def _sampler(self) -> PoissonAuthorSampler:
        return make_sampler(self.train_dataset, self.plan, self.args, self.checks.number)

    def create_optimizer(self, *args, **kwargs) -> torch.optim.Optimizer:
        """Wrap the Trainer's optimizer in the one that adds the noise."""
        with as_user_error(f"--optim {OptimizerNames(self.args.optim).value}, with --optim_args {self.args.optim_args}"):
            optimizer = super().create_optimizer(*args, **kwargs)
        if self.privacy.disable_dp:
            return optimizer
        noisy = getattr(optimizer, "optimizer", optimizer)  # for a second training it is there, in accelerate's wrapper
        if not isinstance(noisy, AuthorDPOptimizer):
            if use_adam_bc(self.args, self.privacy, self.plan.noise_bands):
                logger.info("Adam's second moment is rid of the noise's variance (--adam_noise_correction).")
                optimizer = AdamBC(optimizer)
            self.checks.count_updates(optimizer)
            self.optimizer = noisy = (ShardedOptimizer if self.full_shard else AuthorDPOptimizer)(
                optimizer,
                noise_multiplier=self.plan.noise_multiplier,
                clip_norm=self.plan.clip_norm,
                expected_batch_size=self.plan.expected_batch_size,
                before_release=self._record_step,
                after_release=self.checks.released,
                canaries=self.canaries,
                secure_noise=self.privacy.secure_noise,
            )
        noisy.begin(self.plan.coefficients())
        self._noisy = noisy
        return self.optimizer

    def _record_step(self) -> None:
        """Record a step in the ledger; before the first one, check the precision that is in force by now."""
        if not self.budget.steps:
            check_float32(self.model, self.args.bf16)
        self.budget.record_step()

    def create_scheduler(self, *args, **kwargs) -> torch.optim.lr_scheduler.LRScheduler:
        """Name the option where the Trainer's scheduler does not take its arguments."""
        kind, options = SchedulerType(self.args.lr_scheduler_type).value, self.args.lr_scheduler_kwargs
        with as_user_error(f"--lr_scheduler_type {kind}, with --lr_scheduler_kwargs {options}"):
            return super().create_scheduler(*args, **kwargs)

    def _wrap_model(self, model: nn.Module, training: bool = True, dataloader: Optional[DataLoader] = None) -> nn.Module:
        """Return the clipping engine's module, for training only; wrapped, so that accelerate adds no DistributedDataParallel."""
        if not training:
            return model
        if not self.full_shard:
            broadcast_parameters(self.model)
        self.checks.hold(self.model)
        if self.privacy.disable_dp:
            return NoDDPWrapper(self.model)
        clipped = self.model if self.canaries is None else self.canaries.beside(self.model)
        self.engine = make_engine(clipped, self.plan.clipping, self.plan.clip_norm, bool(self.args.activation_checkpointing))
        if self.proof is not None:
            self.proof.settle(self.engine)
        return NoDDPWrapper(self.engine.module)

    def training_step(self, model: nn.Module, inputs: LogicalBatch, *_) -> torch.Tensor:  # type: ignore[override]
        """Accumulate the clipped gradients of one logical batch; an empty one costs nothing.

        Returns:
            the mean loss over the authors of the whole draw, as this process' summand of a mean over processes.
            Not private.
        """
        model.train()
        self.optimizer.zero_grad()  # also what a step left that was broken off
        total = torch.zeros_like(self._step_loss)
        idle = missing_rounds(model, len(inputs.microbatches))  # of a model in shares, whose layers all must gather alike
        for microbatch in inputs.microbatches:
            real = is_real(microbatch)
            microbatch = send_to_device(microbatch, self.args.device, non_blocking=True)
            with self.accelerator.autocast():
                losses = author_losses(model, microbatch, self.needs_positions)
            if self.engine is None:
                (losses.sum() / self.plan.expected_batch_size).backward()
            else:
                losses = losses if self.canaries is None else self.canaries.push(losses, microbatch)
                norms = self.engine.backward(losses, microbatch["author"])
                self.norms.add(norms, real)
            total += losses.detach().nan_to_num(posinf=0.0).sum()
            del losses  # and what of its graph is not freed yet
        for _round in range(idle):
            with self.accelerator.autocast():
                self.engine.dummy_backward()  # type: ignore[union-attr]
        if self.generators is not None:
            self.generators.check()
        if self.engine is not None:
            self._noisy.draw = inputs.number
        self.norms.end_step()
        self.checks.taken(inputs.batch_size, inputs.number)
        if self.engine is None:
            all_reduce_gradients([parameter for parameter in self.model.parameters() if parameter.requires_grad])
        if inputs.batch_size:  # the loss of an empty draw does not exist: repeat the last one
            self._step_loss = total * self.args.world_size / inputs.batch_size
        return self._step_loss.clone()

    def _get_grad_norm(self, model: nn.Module, grad_norm: Optional[torch.Tensor] = None) -> Optional[torch.Tensor]:
        """Skip the norm that the Trainer logs: before the optimizer's step there is no gradient that could be shown."""
        return super()._get_grad_norm(model, grad_norm) if self.privacy.disable_dp else None

    def get_total_train_batch_size(self, args: TrainingArguments) -> int:
        """Return B, for the Trainer's log."""
        return self.plan.expected_batch_size

    def floating_point_ops(self, inputs: LogicalBatch) -> int:  # type: ignore[override]
        """Sum over the microbatches."""
        return sum(super(DPTrainer, self).floating_point_ops(microbatch) for microbatch in inputs.microbatches)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """Return this process' share of the evaluation texts, in batches of --per_device_eval_batch_size."""
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        size, rank, world_size = self.args.per_device_eval_batch_size, self.args.process_index, self.args.world_size
        return DataLoader(EvalBatches(dataset, size, self.data_collator, rank, world_size), batch_size=None)

    def evaluation_loop(self, dataloader: DataLoader, *_, metric_key_prefix: str = "eval", **__) -> EvalLoopOutput:
        """Return losses that depend neither on the batch nor on the number of processes; see author_dp/training/evaluation.py."""

        def on_batch() -> None:
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)

        self.callback_handler.eval_dataloader = dataloader  # the progress bar asks for its length
        with self.accelerator.autocast():
            return evaluate(self.model, dataloader, self.needs_positions, on_batch, metric_key_prefix)

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """Add epsilon spent so far to every line, and to the training ones statistics that are not private."""
        if not self.privacy.disable_dp:
            if "loss" in logs:
                self._check()
                logs |= {**self.norms.pop(), "noise_multiplier": self.plan.noise_multiplier}
            if self.args.process_index == 0:
                logs["epsilon"] = self.epsilon()
        with owner_only():
            super().log(logs, *args, **kwargs)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Save as the Trainer does, whole or not at all."""
        self._check(whole=True)
        with atomic_checkpoint(self.folder, self.args, self.state):
            super()._save_checkpoint(model, trial)

    def _check(self, whole: bool = False) -> None:
        """Raise MechanismError for draws, clips or noise that are not as promised, UserError for weights that are not finite."""
        self.checks.test(whole)
        check_trained_weights(self.model, self.state.global_step)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Save the whole of an optimizer's state that is in shares, as one without shares would be."""
        if not self.full_shard:
            return super()._save_optimizer_and_scheduler(output_dir)
        state = getattr(self.optimizer, "optimizer", self.optimizer).full_optim_state()
        if self.args.should_save:
            torch.save(state, Path(output_dir) / OPTIMIZER_NAME)
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)  # type: ignore[union-attr]

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Optional[nn.Module] = None) -> None:
        if not self.full_shard:
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        load_weights(self.model, Path(resume_from_checkpoint))

    def _save(self, output_dir: Optional[str] = None, state_dict: Optional[dict] = None) -> None:
        """Save model and tokenizer, and the privacy report of these weights beside them."""
        if self.full_shard:
            state_dict = full_state_dict(self.model)
        if not self.args.should_save:
            return super()._save(output_dir, state_dict)
        if self.adapter and self.adapter_base is None:  # never trained
            self._identify_base()
        with write_certified(Path(output_dir or self.folder), self.adapter, self.privacy_report, self.plan.disable_dp):
            with owner_only():
                super()._save(output_dir, state_dict)

    def _load_best_model(self) -> None:
        """Load the best checkpoint after the checks of one that is resumed: trainer_state.json says where it lies."""
        if self.budget.is_first_process and not self.privacy.disable_dp:
            check_ledger_covers(Path(str(self.state.best_model_checkpoint)), self.budget.ledger)
        super()._load_best_model()

    def push_to_hub(  # type: ignore[override]
        self,
        commit_message: str = "End of training",
        blocking: bool = True,
        token: Optional[str] = None,
        revision: Optional[str] = None,
        private: Optional[bool] = None,
        **_: Any,
    ) -> Any:
        """Upload what author_dp/outputs/publish.py copies of the output folder, and nothing else."""
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self.save_model(_internal_call=True)
        if self.is_world_process_zero():
            self._finish_current_push()
            return self._upload(self.folder, commit_message, token, revision, in_background=not blocking)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Upload what author_dp/outputs/publish.py copies of a checkpoint; leave it out while the last upload is not finished."""
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        if self.push_in_progress is None or self.push_in_progress.is_done() or self.args.hub_always_push:
            self._finish_current_push()
            job = self._upload(
                Path(checkpoint_folder), f"Training in progress, step {self.state.global_step}", in_background=True
            )
            self.push_in_progress = PushInProgress([job])  # type: ignore[assignment, arg-type]

    def _upload(self, folder: Path, message: str, token: Any = None, revision: Any = None, *, in_background: bool) -> Any:
        token, revision = token or self.args.hub_token, revision or self.args.hub_revision
        return upload(folder, str(self.hub_model_id), message, token, revision, in_background)

    def save_metrics(self, *args, **kwargs) -> None:
        """Save metrics for the owner only."""
        with owner_only():
            super().save_metrics(*args, **kwargs)

    def save_state(self) -> None:
        """Save the Trainer's state, with its losses, for the owner only."""
        with owner_only():
            super().save_state()

    def create_model_card(self, *args, **kwargs) -> None:
        """Write a card of public values instead of the Trainer's, which would show private metrics."""
        if self.is_world_process_zero():
            (self.folder / "README.md").write_text(model_card(self.privacy_report()), encoding="utf-8")

    # What the run has promised and spent.

    def summary(self) -> str:
        """Return what will happen, for the log before training."""
        taken = load_trainer_state(self.checkpoint).global_step if self.checkpoint else 0
        return self.budget.summary(model_sizes(self.model), self.train_dataset.offsets, max(0, self.plan.steps - taken))

    def epsilon(self, more_steps: int = 0) -> float:
        """Return the epsilon spent by all steps in the ledger and `more_steps`; on the first process only."""
        return self.budget.epsilon(more_steps)

    def privacy_report(self) -> dict[str, Any]:
        """Return what privacy.json holds; on the first process only."""
        report = self.budget.report(self.state.global_step)
        if self.ended is not None and self.ended["disable_dp"] == self.plan.disable_dp:
            kept = {name: value for name, value in self.ended.items() if name != "weights"}
            return report | kept if self.plan.disable_dp else kept | report
        if not self.plan.disable_dp:
            report["secure_noise"] = self.privacy.secure_noise
        more = {
            "settings": self.settings,
            "data": self.data,
            "audit": self.audit,
            "adapter_base": self.adapter_base,
            "base_model": self.base_model,
        }
        return report | {name: value for name, value in more.items() if value}
