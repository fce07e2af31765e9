"""Author-level differential privacy for Hugging Face's Trainer: the options, and the Trainer.

Guarantees: every model that a private run saves is (epsilon, delta)-differentially private under add-or-remove-one-author
adjacency: two data sets are neighbors if they differ by all samples of one author. The number of authors N (without
--hide_counts), the sample rate q, the number of steps and all options are public. Losses, evaluation metrics and gradient
statistics are not covered: they are computed on private data without noise.

The parts are in `author_dp/`. A step is in `mechanism/` and `clipping/`: read `mechanism/optimizer.py` first: it adds the noise.
What a run may spend is in `accounting/`, checks are in `guards/`, checkpoints and evaluation in `training/`. `DPTrainer` connects
them, in the order in which the Trainer calls it.

Example:

    >>> privacy = PrivacyArguments(target_epsilon=8.0, per_sample_max_grad_norm=1.0)
    >>> trainer = DPTrainer(model, args, privacy, train_dataset=AuthorDataset(...), data_collator=collate)
    >>> trainer.train()

References: Abadi et al. 2016, Deep Learning with Differential Privacy (DP-SGD); McMahan et al. 2018, Learning Differentially
Private Recurrent Language Models (user-level DP).
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import torch
from accelerate.utils import AutocastKwargs, send_to_device
from peft import PeftModel
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, TrainingArguments
from transformers.training_args import OptimizerNames

from author_dp.accounting.accountant import compute_epsilon, find_noise_multiplier
from author_dp.accounting.budget import StopAtTargetEpsilon
from author_dp.accounting.output_dir import lock_output_dir
from author_dp.accounting.voiding import guarantee_voided_on_failure
from author_dp.clipping import ENGINES
from author_dp.distributed import all_reduce_gradients
from author_dp.errors import UserError, as_user_error
from author_dp.guards.callbacks import WatchedCallbacks
from author_dp.guards.gradient_canaries import GradientCanaries
from author_dp.guards.launchers import check_accelerate_launcher
from author_dp.guards.loggers import redirect_loggers
from author_dp.guards.text_canaries import TextCanaries
from author_dp.guards.trainer_arguments import check_no_trial, check_optimizer, check_trainer_arguments
from author_dp.mechanism.fsdp import missing_fsdp_rounds
from author_dp.mechanism.fsdp_clipping import make_engine
from author_dp.mechanism.losses import author_losses
from author_dp.mechanism.microbatches import LogicalBatch, make_microbatch_shape
from author_dp.mechanism.optimizer import AuthorDPOptimizer
from author_dp.mechanism.sampling import PoissonAuthorSampler
from author_dp.mechanism.secret_generators import set_up_secret_generators
from author_dp.models.modes import deterministic_kernels, frozen_weights_cast, full_precision_sums
from author_dp.models.training_marks import has_training_mark
from author_dp.option_names import find_missing_options
from author_dp.outputs.model_card import model_card_settings
from author_dp.outputs.privacy_statement import statement_starting_model
from author_dp.outputs.uploads import UploadingTrainer
from author_dp.permissions import owner_only
from author_dp.training.base_trainer import NoDDPWrapper, PlainEngine
from author_dp.training.dataloading import adapt_trainer_args, broadcast_parameters, load_logical_batches, make_sampler
from author_dp.training.interruption import StopOnSignal, signals_end_with_message
from author_dp.training.resuming import find_checkpoint
from author_dp.training.run_report import RunReport
from author_dp.training.setup import recheck_before_training, set_up_dp_optimizer, set_up_run
from author_dp.validation import check_choice, check_exclusive, check_range, option

__all__ = ["DPTrainer", "PrivacyArguments", "compute_epsilon", "find_noise_multiplier"]

# --- options ------------------------------------------------------------------------------------------


@dataclass
class PrivacyArguments:
    """Privacy target and mechanism. All of these options are public."""

    target_epsilon: Optional[float] = option(None, "Target epsilon; the noise follows from it. Give it or --noise_multiplier.")
    noise_multiplier: Optional[float] = option(None, "Noise standard deviation over clip norm, instead of --target_epsilon.")
    target_delta: Optional[float] = option(None, "Target delta. Default: 1 / number of training authors.")
    per_sample_max_grad_norm: Optional[float] = option(
        None, "Clip norm C: bound on the L2 norm of one author's gradient. Required; 1.0 is a good start."
    )
    samples_per_author: int = option(1, "Maximum number of samples of one author in one step (k).")
    clipping: str = option(
        "ghost",
        "How per-author gradients are clipped: ghost stores almost none; grad_sample (Opacus) stores all, for comparison.",
        tuple(ENGINES),
    )
    secure_noise: bool = option(False, "Harden the noise against floating-point attacks, at four times the cost.")
    sample_rate: Optional[float] = option(
        None,
        "Probability that an author is in a step's batch (q). Default: expected batch size / number of training authors. If "
        "given, the product of the batch options is only the divisor of the sum.",
    )
    sampling: Optional[str] = option(
        None,
        "How authors are sampled: poisson; balls-in-bins, each in one secret step of every epoch, for less noise with "
        "--noise_bands; or auto, whichever has less noise. Default: poisson, or that of a resumed run.",
    )
    noise_bands: Optional[str] = option(
        None,
        "Number of steps over which the noise is correlated (b), or auto: less noise in the sum of updates at the same epsilon "
        "(DP-MF). Needs memory for b - 1 times the trained parameters. Default: 1, independent noise, or that of a resumed run.",
    )
    adam_noise_correction: Optional[bool] = option(
        None, "Subtract the noise variance from Adam's second moment (DP-AdamBC). Default: with noise bands only."
    )
    hide_counts: bool = option(
        False, "Keep the numbers of authors and samples out of all public files; needs --sample_rate and --target_delta."
    )
    allow_other_authors: bool = option(False, "Resume although the number of training authors has changed.")
    part_of_search: bool = option(False, "Set by python -m author_dp.tune: one run of a search, without a guarantee of its own.")
    disable_dp: bool = option(False, "Ordinary fine-tuning through the same data path, for comparison. No privacy.")

    def __post_init__(self):
        check_range("--target_epsilon", self.target_epsilon, "(0, inf)")
        check_range("--target_delta", self.target_delta, "[1e-100, 1)", "Often it is 1e-5, or 1 / (10 N) for N authors")
        # Beyond these, squares in float32 overflow or vanish; at a smaller rate, an epoch has too many steps.
        check_range("--per_sample_max_grad_norm", self.per_sample_max_grad_norm, "[1e-6, 1e6]", "Often it is 0.1 to 10")
        if self.noise_multiplier != 0:  # 0 is for no privacy
            check_range("--noise_multiplier", self.noise_multiplier, "[1e-6, 1e6]", "Often it is near 1; 0 is for no privacy")
        check_range("--sample_rate", self.sample_rate, "[1e-12, 1]")
        check_range("--samples_per_author", self.samples_per_author, "[1, 65536]")
        check_choice("--clipping", self.clipping, ENGINES)
        if self.hide_counts and (self.sample_rate is None or self.target_delta is None):
            raise UserError(
                "--hide_counts: the defaults of --sample_rate and --target_delta disclose the number of authors. Give both"
            )
        if self.noise_bands not in (None, "auto") and (not str(self.noise_bands).isdecimal() or int(self.noise_bands) < 1):
            raise UserError(f"--noise_bands {self.noise_bands}: not a number of steps. Give a whole number above 0, or auto")
        if self.noise_bands == "auto" and self.target_epsilon is None and not self.disable_dp:
            raise UserError("--noise_bands auto: it minimizes the noise for a --target_epsilon. Give one, or a number of bands")
        if self.disable_dp:
            return
        if missing := find_missing_options(lambda name: getattr(self, name) is not None and getattr(self, name) is not False):
            raise UserError(missing)
        check_exclusive(self, "target_epsilon", "noise_multiplier")


# --- the Trainer ----------------------------------------------------------------------------------------


class DPTrainer(UploadingTrainer):
    """Trainer whose steps are those of author_dp/mechanism.

    The expected batch size B is per_device_train_batch_size x gradient_accumulation_steps x world_size authors: the constant that
    divides each sum, and by default the sample rate is q = B / N. A sampled batch is cut into microbatches of at most
    per_device_train_batch_size authors, and the Trainer's own loop sees one logical batch per step. The base classes adapt the
    rest of the Trainer: LogicalBatchTrainer counts and evaluates, CertifiedTrainer saves, UploadingTrainer uploads.

    Args:
        model: its trainable parameters, in float32, are trained, except those that the loss does not use.
        args: Hugging Face's, with max_grad_norm 0.
        privacy: privacy target and mechanism.
        train_dataset: `data_utils.AuthorDataset`: offsets and indices, and the samples of many authors at once.
        data_collator: pads a list of samples to input_ids and labels of shape (samples, tokens).
        sequence_len: maximum tokens per sample; microbatches are padded to one of a few lengths up to it. Default: 128, or the
            model's positions where these are fewer.
        canaries: for an audit. TextCanaries must be in `train_dataset` already; GradientCanaries are added here.
        full_shard: shard weights, gradients, noise and optimizer state over the processes (author_dp/mechanism/fsdp.py).
        model_name: hub name or folder that the model comes from; default: the one that it was loaded from.
        data_summary: how texts became samples, for privacy.json; public.
        split_id: of the rule that held authors out, from `DataArguments.split_id`.
        shared_authors: whether evaluation authors may be training authors; default: the hashes of both tell.
        program_args: dataclasses of further options, compared when a run resumes; other `kwargs` are the Trainer's.
    Raises:
        UserError: for options, a model or data under which the guarantee would not hold.
    """

    engine: Any  # a ClippingEngine while a private run trains, None otherwise; with --disable_dp a PlainEngine

    def __init__(
        self,
        model: PreTrainedModel,
        args: TrainingArguments,
        privacy: PrivacyArguments,
        *,
        train_dataset: Any,
        data_collator: Callable,
        sequence_len: Optional[int] = None,
        canaries: GradientCanaries | TextCanaries | None = None,
        full_shard: bool = False,
        model_name: Optional[str] = None,
        data_summary: Optional[dict[str, Any]] = None,
        split_id: Optional[str] = None,
        shared_authors: Optional[bool] = None,
        program_args: Sequence[Any] = (),
        **kwargs,
    ):
        check_trainer_arguments(kwargs)
        self.privacy, self.full_shard, self.shared_authors, self.canaries = privacy, full_shard, shared_authors, canaries
        self.gradient_canaries = gradient = canaries if isinstance(canaries, GradientCanaries) else None
        self.model_name, name, tokenizer = model_name, model_name or model.name_or_path, kwargs.get("processing_class")
        setup = set_up_run(
            model, args, privacy, train_dataset=train_dataset, data_collator=data_collator, sequence_len=sequence_len,
            canaries=gradient, full_shard=full_shard, split_id=split_id, shared_authors=shared_authors, program_args=program_args,
            tokenizer=tokenizer, model_name=name,
        )  # fmt: skip
        self.model_check, self.sequence_len, self.checkpoint = setup.model_check, setup.sequence_len, setup.checkpoint
        self.plan, self.budget, self.norms, self.monitors = setup.plan, setup.budget, setup.norms, setup.monitors
        self.folder, self.made_with = Path(str(args.output_dir)), setup.made_with
        self.engine = PlainEngine(model, self.plan.expected_batch_size) if privacy.disable_dp else None
        is_marked = has_training_mark(model, bool(self.checkpoint))
        base_model = statement_starting_model(name, is_marked) if args.process_index == 0 else None
        settings = model_card_settings(args, model, name)
        self.run_report = RunReport(self.budget, settings, data_summary, base_model, privacy.secure_noise)
        self.run_report.adopt_finished_run(self.checkpoint)
        self._step_loss = torch.zeros((), device=args.device)
        args = adapt_trainer_args(redirect_loggers(args))
        super().__init__(model, args, setup.data_collator, setup.train_dataset, **kwargs)
        args.max_steps = self.plan.steps  # set only now: otherwise the Trainer would log that it overrides --num_train_epochs
        check_accelerate_launcher(self.accelerator, args.bf16)
        if full_shard:  # otherwise bfloat16 copies of all gathered weights would be kept until the forward ends
            self.accelerator.autocast_handler = AutocastKwargs(cache_enabled=False)
        if not privacy.disable_dp:
            self.callback_handler = WatchedCallbacks(self)
        self.add_callback(StopAtTargetEpsilon(self.budget))

    # Training, in the order in which the Trainer calls.

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs) -> Any:
        """Train under the plan, resuming from `resume_from_checkpoint` if given (args.resume_from_checkpoint otherwise).

        Raises:
            UserError: where the budget is used up, or the output directory is in use or cannot be written.
            SignalError: after a signal, when the checkpoint is saved.
            MechanismError: where the noise is not what the ledger says; the output directory then says so, and nothing is saved.
        """
        check_no_trial(args[0] if args else kwargs.get("trial"))
        if resume_from_checkpoint:
            self.args.resume_from_checkpoint = resume_from_checkpoint  # type: ignore[assignment]  # True: the newest
            self.checkpoint, _ = find_checkpoint(self.args, self.privacy, isinstance(self.model, PeftModel), **self.made_with)
        if self.args.process_index == 0:
            self.run_report.identify_base(self.model, self.checkpoint)
        self.run_report.adopt_finished_run(self.checkpoint)
        if self.checkpoint and self.run_report.finished is not None:
            return self.load_finished()
        recheck_before_training(self, self.shared_authors)
        if isinstance(self.canaries, TextCanaries):
            self.canaries.start(self)
        self.add_callback(signals := StopOnSignal())
        voided = guarantee_voided_on_failure(self.budget, self.create_model_card, self.hub_name, self.monitors.find_failure)
        try:
            with lock_output_dir(self.budget), voided:
                self.rehearse()
                with (
                    set_up_secret_generators(self.model, self.args.device, self.privacy.disable_dp) as self.generators,
                    full_precision_sums(),
                    deterministic_kernels(self.args.device) if self.args.activation_checkpointing else nullcontext(),
                ):
                    self.budget.start()
                    self.continue_from_checkpoint()
                    self.monitors.start(self._sampler, self.budget, self.args.device, self.privacy.secure_noise)
                    with owner_only():
                        result = super().train(str(self.checkpoint) if self.checkpoint else None, *args, **kwargs)
                    self.finish_run()
        finally:
            self.checkpoint = self.generators = None
            self.monitors.stop()
            self.remove_callback(signals)
            signals.restore()
            if self.engine is not None:
                self.engine.close()
            self.engine, self.model_wrapped = self.engine if self.privacy.disable_dp else None, self.model
        signals.check(self)
        if self.canaries is not None:
            with signals_end_with_message(self, saved=False):
                self.run_report.audit = self.canaries.finish(self)
        return result

    def get_train_dataloader(self) -> DataLoader:
        """Return the logical batches of an epoch."""
        max_authors, shape = self.args.per_device_train_batch_size, None
        if self.model_check is not None:
            max_authors = self.model_check.max_authors(max_authors)
            accumulation = self.plan.expected_batch_size // (max_authors * self.args.world_size)
            shape = make_microbatch_shape(max_authors, accumulation, self.privacy.samples_per_author, self.sequence_len)
        sampler = self._sampler()
        self.monitors.watch_sampler(sampler)
        return load_logical_batches(self.train_dataset, sampler, self.args, self.data_collator, max_authors, shape)

    def _sampler(self) -> PoissonAuthorSampler:
        return make_sampler(self.train_dataset, self.plan, self.args, self.monitors.num_canaries)

    def create_optimizer(self, *args, **kwargs) -> torch.optim.Optimizer:
        """Wrap the Trainer's optimizer in the one that adds the noise."""
        with as_user_error(f"--optim {OptimizerNames(self.args.optim).value}, with --optim_args {self.args.optim_args}"):
            optimizer = super().create_optimizer(*args, **kwargs)
        noisy = getattr(optimizer, "optimizer", optimizer)  # when train() is called again, accelerate has wrapped ours
        check_optimizer(getattr(noisy, "original_optimizer", noisy), self.args)
        if self.privacy.disable_dp:
            return optimizer
        if not isinstance(noisy, AuthorDPOptimizer):
            self.optimizer = noisy = set_up_dp_optimizer(optimizer, self)
        noisy.start_training(self.plan.coefficients(), in_turn=bool(self.plan.slots))
        self.dp_optimizer = noisy
        return self.optimizer

    def _wrap_model(self, model: nn.Module, training: bool = True, dataloader: Optional[DataLoader] = None) -> nn.Module:
        """Build the clipping engine, watch frozen weights, and return the module to train: no DistributedDataParallel."""
        if not training:
            return model
        if not self.full_shard:
            broadcast_parameters(self.model)
        self.monitors.watch_frozen_weights(self.model)
        if not self.privacy.disable_dp:
            clipped = self.model if self.gradient_canaries is None else self.gradient_canaries.wrap_model(self.model)
            self.engine = make_engine(clipped, self.plan.clipping, self.plan.clip_norm, bool(self.args.activation_checkpointing))
            self.model_check.freeze_fallback(self.engine)  # type: ignore[union-attr]
        return NoDDPWrapper(self.engine.module)

    def training_step(self, model: nn.Module, inputs: LogicalBatch, *_) -> torch.Tensor:  # type: ignore[override]
        """Accumulate the clipped gradients of one logical batch; an empty one costs nothing.

        The Trainer's loop then calls the optimizer, whose `pre_step` adds the noise (author_dp/mechanism/optimizer.py).

        Returns:
            this process' sum of losses x world_size / batch size, whose mean over processes is that over authors. Not private.
        """
        model.train()
        self.optimizer.zero_grad()  # also what an interrupted step left
        total = torch.zeros_like(self._step_loss)
        # All processes of a sharded model gather its layers together, so each needs as many rounds.
        missing = missing_fsdp_rounds(model, len(inputs.microbatches))
        with self.accelerator.autocast(), frozen_weights_cast(self.model):  # weights are cast once for all microbatches
            for microbatch in self.tracked(inputs.microbatches):
                microbatch = send_to_device(microbatch, self.args.device, non_blocking=True)
                losses = author_losses(model, microbatch)
                with torch.autocast(self.args.device.type, enabled=False):  # otherwise norms and sums would be rounded
                    if self.gradient_canaries is not None:
                        losses = self.gradient_canaries.add_canary_losses(losses, microbatch)
                    norms = self.engine.backward(losses, microbatch["author"], microbatch["samples_each"])
                    self.norms.add(norms, microbatch["is_real"], microbatch["num_real"])
                total += losses.detach().nan_to_num(posinf=0.0).sum()
                del losses  # also frees what is left of its graph
            for _round in range(missing):
                self.engine.dummy_backward()
        if self.privacy.disable_dp:
            all_reduce_gradients([parameter for parameter in self.model.parameters() if parameter.requires_grad])
        else:
            self.monitors.record_failure(self.generators.check)  # type: ignore[union-attr]
            self.dp_optimizer.batch_index = inputs.batch_index
        self.norms.end_step()
        self.monitors.on_step(inputs.batch_size, inputs.batch_index)
        if inputs.batch_size:  # an empty batch has no loss: repeat the last one
            self._step_loss = total * self.args.world_size / inputs.batch_size
        return self._step_loss.clone()
