"""Prepare a run: check options and model, read the ledger, plan the steps and their noise.

User errors are raised here, before the first step costs privacy.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Optional

import torch
from peft import PeftModel
from transformers import PreTrainedModel, TrainingArguments
from transformers.training_args import OptimizerNames

from author_dp.accounting.budget import Budget
from author_dp.accounting.ledger import PrivacyLedger, read_ledger_private_count
from author_dp.accounting.output_dir import check_output_is_not_model
from author_dp.accounting.plan import PrivacyPlan, certify_plan, choose_plan_sampling, make_plan
from author_dp.clipping.norm_stats import NormStatistics
from author_dp.distributed import broadcast
from author_dp.errors import UserError
from author_dp.guards.gradient_canaries import CollateWithGradientCanaries, GradientCanaries
from author_dp.guards.metric_driven import (
    check_metric_options,
    have_shared_authors,
    metric_driven_callback,
    metric_driven_option,
    metric_driven_scheduler,
)
from author_dp.guards.model_check import ModelCheck, check_model, check_sharded_model, verify_model
from author_dp.guards.monitors import RunMonitors
from author_dp.guards.options import validate_options
from author_dp.guards.precision import check_float32
from author_dp.guards.probing import resolve_sequence_len
from author_dp.guards.process_agreement import check_processes_agree_at_start
from author_dp.guards.sample_values import check_sample_lengths, check_samples_fit
from author_dp.guards.trainer_arguments import check_trainer_adapted, trainer_options_without_effect
from author_dp.logs import get_logger
from author_dp.mechanism.adam_bc import AdamBC, use_adam_bc
from author_dp.mechanism.fsdp import ShardedOptimizer, gather_in_bfloat16, shard_model
from author_dp.mechanism.optimizer import AuthorDPOptimizer
from author_dp.models.training_marks import check_origin_is_known, mark_as_trained
from author_dp.training.dataloading import max_bands_in_memory, to_device
from author_dp.training.resuming import (
    check_checkpoint_not_released,
    describe_training,
    find_checkpoint,
    load_checkpoint_state,
    resumable_options,
    write_sample_hashes,
)

logger = get_logger(__name__)


@dataclass
class RunSetup:
    """Everything that is decided before a run's first step.

    Args:
        model_check: how the clipping engine compares with the reference loop on this model; None without privacy.
        checkpoint: where the run resumes; None if it starts with the model as given.
        made_with: options, model and data of this run, which its checkpoints keep (resuming.py).
        train_dataset, data_collator: including the gradient canaries, if any.
        sequence_len: tokens of the longest sample; determines the shapes of microbatches.
    """

    model_check: Optional[ModelCheck]
    sequence_len: int
    checkpoint: Optional[Path]
    made_with: dict[str, Any]
    train_dataset: Any
    data_collator: Callable
    plan: PrivacyPlan
    budget: Budget
    norms: NormStatistics
    monitors: RunMonitors


def set_up_run(
    model: PreTrainedModel,
    args: TrainingArguments,
    privacy: Any,
    *,
    train_dataset: Any,
    data_collator: Callable,
    sequence_len: Optional[int],
    canaries: Optional[GradientCanaries],
    full_shard: bool,
    split_id: Optional[str],
    shared_authors: Optional[bool],
    program_args: Sequence[Any],
    tokenizer: Any,
    model_name: Optional[str],
) -> RunSetup:
    """Check and plan a run; move the model to its device, sharded if `full_shard`. Collective.

    Args:
        privacy: dp_utils.PrivacyArguments.
        tokenizer: to compare with that of the resumed run; may be None.
        others: as in dp_utils.DPTrainer.
    Raises:
        UserError: if the guarantee would not hold for the options, the model, the data or the output directory.
    """
    validate_options(args, privacy, full_shard=full_shard, shared_authors=bool(shared_authors))
    if names := trainer_options_without_effect(args):
        logger.info(f"Without effect here: {', '.join(names)} (docs/options.md).")
    made_with = {
        "options": resumable_options(*program_args, privacy, args),
        "training": describe_training(model, train_dataset, tokenizer, model_name),
    }
    checkpoint, ledger = find_checkpoint(args, privacy, isinstance(model, PeftModel), **made_with)
    if model_name:
        check_output_is_not_model(Path(str(args.output_dir)), model_name)
    earlier = broadcast(ledger.runs if ledger.steps else [])  # a run without steps restricts nothing
    if earlier and canaries is None:
        plan = make_plan(privacy, args, train_dataset.offsets, earlier[-1])
        if not plan.slots:  # whose noise is found with the check
            check_budget_left(Budget(plan, ledger, args.process_index == 0), checkpoint)
    model_check = check_and_place_model(model, args, privacy, sequence_len, full_shard)
    longest = resolve_sequence_len(model, sequence_len)
    check_sample_lengths(train_dataset, sequence_len, longest)
    if canaries is not None:
        train_dataset, data_collator = canaries.join(train_dataset), CollateWithGradientCanaries(data_collator)
    plan = plan_and_certify(model, args, privacy, train_dataset, ledger, checkpoint, earlier[-1] if earlier else None)
    check_processes_agree_at_start(plan, train_dataset, model, args.bf16)
    hidden_count = broadcast(read_ledger_private_count(ledger.path.parent))
    check_author_count(earlier, hidden_count, plan.num_authors, privacy.hide_counts, privacy.allow_other_authors)
    check_counts_hidden(ledger, privacy.hide_counts)
    budget = Budget(plan, ledger, is_main_process=args.process_index == 0)
    budget.by_metrics, budget.split = metric_driven_option(args), split_id
    norms = NormStatistics(plan.clip_norm, args.device)
    monitors = RunMonitors(plan, canaries, norms)
    return RunSetup(model_check, longest, checkpoint, made_with, train_dataset, data_collator, plan, budget, norms, monitors)


def plan_and_certify(
    model: PreTrainedModel,
    args: TrainingArguments,
    privacy: Any,
    train_dataset: Any,
    ledger: PrivacyLedger,
    checkpoint: Optional[Path],
    earlier: Optional[dict[str, Any]],
) -> PrivacyPlan:
    """Return the plan of a run, its sampling chosen and its noise certified where needed. Collective.

    Args:
        earlier: header of the run that this one resumes; None for a new one.
        others: as for `set_up_run`.
    """
    max_bands = max_bands_in_memory(model, args)
    if privacy.sampling == "auto" and not privacy.disable_dp and earlier is None:  # the main process chooses for all
        chosen = None if args.process_index else choose_plan_sampling(privacy, args, len(train_dataset), max_bands)
        privacy = replace(privacy, sampling=broadcast(chosen))
    plan = make_plan(privacy, args, train_dataset.offsets, earlier, max_bands)
    if (plan.noise_bands > 1 or plan.slots) and getattr(train_dataset, "hashes", None) is None:
        raise UserError(
            "train_dataset: noise bands and balls-in-bins sampling need the hashes of all authors. Give AuthorDataset(..., "
            "hashes=author_hashes(authors))"
        )
    if plan.slots:  # the main process draws for all
        left = plan.steps - (load_checkpoint_state(checkpoint).global_step if checkpoint else 0)
        plan = broadcast(certify_plan(plan, ledger.runs_with_steps, left) if args.process_index == 0 else plan)
    return plan


def check_budget_left(budget: Budget, checkpoint: Optional[Path]) -> None:
    """Raise UserError if no further step is allowed, unless the training has ended at `checkpoint`. Collective.

    `Budget.start` does so again. This call is before the model check, which may take minutes.
    """
    if checkpoint is None or load_checkpoint_state(checkpoint).global_step < budget.plan.steps:
        budget.check_left()


def check_and_place_model(
    model: PreTrainedModel, args: TrainingArguments, privacy: Any, sequence_len: Optional[int], full_shard: bool
) -> Optional[ModelCheck]:
    """Check the model; return how the clipping engine compares with the reference loop.

    Raises:
        UserError: if per-author clipping would be wrong for this model. It names the property that does not hold.
    """
    check_model(model, call_model=False)
    if full_shard:
        check_sharded_model(model)
        shard_model(model, args.device)
    model_check = None
    if not privacy.disable_dp:
        checkpointing: Any = (args.activation_checkpointing_kwargs or {}) if args.activation_checkpointing else None
        check_float32(to_device(model, args), args.bf16)
        model_check = verify_model(model, privacy.clipping, sequence_len, checkpointing, args.bf16)
        logger.info(model_check.summary())
    if full_shard and args.bf16:
        gather_in_bfloat16(model)
    return model_check


def set_up_dp_optimizer(optimizer: torch.optim.Optimizer, trainer: Any) -> AuthorDPOptimizer:
    """Wrap an optimizer in one that adds the noise, and records each step before its noisy gradient exists.

    Args:
        trainer: dp_utils.DPTrainer.
    """
    plan, args, privacy = trainer.plan, trainer.args, trainer.privacy

    def record_step() -> None:
        if not trainer.budget.steps:  # by now the precision is final
            check_float32(trainer.model, args.bf16)
            mark_as_trained(trainer.model, trainer.budget.ledger)
        trainer.budget.record_step()

    if use_adam_bc(OptimizerNames(args.optim).value, privacy.adam_noise_correction, plan.noise_bands, optimizer):
        logger.info("Adam's second moment has the noise variance subtracted (--adam_noise_correction).")
        optimizer = AdamBC(optimizer)
    trainer.monitors.count_updates(optimizer)
    return (ShardedOptimizer if trainer.full_shard else AuthorDPOptimizer)(
        optimizer,
        noise_multiplier=plan.noise_multiplier,
        clip_norm=plan.clip_norm,
        expected_batch_size=plan.expected_batch_size,
        before_release=record_step,
        after_release=trainer.monitors.on_release,
        canaries=trainer.gradient_canaries,
        secure_noise=privacy.secure_noise,
    )


def recheck_before_training(trainer: Any, shared_authors: Optional[bool]) -> None:
    """Check options once more, as they may have changed, and record the option by which metrics choose the model.

    A run of a search also records its samples.

    Args:
        trainer: dp_utils.DPTrainer, about to train.
        shared_authors: whether evaluation authors may be training authors; None: the hashes of both tell.
    Raises:
        UserError: if an option is refused, no epsilon covers that choice, or the model or samples are not those of a run.
    """
    validate_options(trainer.args, trainer.privacy, full_shard=trainer.full_shard, shared_authors=bool(shared_authors))
    check_trainer_adapted(trainer)
    if not trainer.plan.disable_dp and trainer.checkpoint is None:
        check_origin_is_known(trainer.model, trainer.model_name is not None, trainer.budget.ledger)
        trainer.check_weights_unchanged()
    check_samples_fit(trainer)
    scheduler = metric_driven_scheduler(trainer)
    option = metric_driven_option(trainer.args) or scheduler or metric_driven_callback(trainer.callback_handler.callbacks)
    found = have_shared_authors(trainer.train_dataset, trainer.eval_dataset)
    shared = bool(shared_authors or found) if shared_authors is not None else found
    check_metric_options(shared, option, trainer.privacy)
    if not trainer.plan.disable_dp:
        check_checkpoint_not_released(trainer.budget.ledger, option)
    trainer.budget.by_metrics = option
    write_sample_hashes(trainer)


def check_author_count(
    runs: list[dict[str, Any]], private_count: Optional[int], num_authors: int, hidden: bool, allowed: bool
) -> None:
    """Raise UserError for another number of authors than in the previous run, unless `allowed`.

    Args:
        runs: the ledger's headers. Other sample rates, noise, clip norms or samples per author compose as they ran. So do other
            authors, but these are more likely a mistake.
        private_count: the previous number of authors, where the headers do not disclose it.
        hidden: --hide_counts. It holds for a folder: one header that discloses the number would disclose it for all runs.
        allowed: --allow_other_authors.
    """
    if not runs:
        return
    previous = runs[-1]["num_authors"]
    if hidden != (previous is None):
        fix = "Add it again" if previous is None else "Leave it out, or start in a new --output_dir"
        raise UserError(f"--hide_counts: the resumed run was started {'with' if previous is None else 'without'} it. {fix}")
    previous = private_count if previous is None else previous
    if previous not in (None, num_authors) and not allowed:
        raise UserError(
            f"--resume_from_checkpoint: there are {num_authors:,} training authors now, {previous:,} before. "
            "Give the same data and options, or add --allow_other_authors if this is intended"
        )


def check_counts_hidden(ledger: PrivacyLedger, hidden: bool) -> None:
    """Raise UserError where the public ledger discloses the number of authors, despite --hide_counts (`hidden`)."""
    # Headers with steps are checked by check_author_count, which knows a remedy.
    unused = (header for header, steps in zip(ledger.runs, ledger.steps_per_run) if not steps)
    if hidden and any(header.get("num_authors") is not None for header in unused):
        raise UserError(
            f"--hide_counts: {ledger.path} discloses the number of authors of an earlier run. Choose another --output_dir"
        )
