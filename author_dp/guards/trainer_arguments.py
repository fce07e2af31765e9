"""Say of each option of Hugging Face's TrainingArguments whether it works here, is refused, or has no effect.

Guarantees: an option that this table does not know, as of a later transformers, is refused unless it has its default. So no
option reaches behind the training loop unexamined.
tests/guards/test_trainer_arguments.py compares the table with the installed version.

Example:

    >>> check_trainer_options(args)
    Traceback (most recent call last):
    author_dp.errors.UserError: --fp16: its loss scaler rescales and skips steps. Use --bf16
"""

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from transformers.trainer_optimizer import _parse_optim_args
from transformers.trainer_pt_utils import AcceleratorConfig
from transformers.training_args import OptimizerNames

from author_dp.errors import UserError

WORKS = frozenset(
    # Some values of these are refused by guards/options.py, or elsewhere.
    """
    output_dir per_device_train_batch_size num_train_epochs max_steps learning_rate lr_scheduler_type lr_scheduler_kwargs
    warmup_steps optim optim_args weight_decay adam_beta1 adam_beta2 adam_epsilon optim_target_modules
    gradient_accumulation_steps max_grad_norm bf16 tf32 activation_checkpointing activation_checkpointing_kwargs
    gradient_checkpointing gradient_checkpointing_kwargs use_cache logging_strategy logging_steps logging_first_step
    log_on_each_node logging_nan_inf_filter log_level log_level_replica disable_tqdm report_to run_name project trackio_space_id
    trackio_bucket_id trackio_static_space_id eval_strategy eval_steps eval_delay per_device_eval_batch_size eval_on_start
    save_only_model save_strategy save_steps save_total_limit push_to_hub hub_token hub_private_repo hub_model_id hub_strategy
    hub_always_push hub_revision load_best_model_at_end metric_for_best_model greater_is_better
    restore_callback_states_from_checkpoint full_determinism seed use_cpu dataloader_num_workers dataloader_pin_memory
    dataloader_persistent_workers dataloader_prefetch_factor dataloader_multiprocessing_context
    ddp_backend ddp_timeout skip_memory_metrics resume_from_checkpoint
    """.split()
)

# Options that would change the mechanism without the accountant's knowledge, or would not do what they say: the problem, and the
# remedy.
REFUSED_OPTIONS = {
    "auto_find_batch_size": "the batch size is part of the guarantee. Lower --per_device_train_batch_size, and raise "
    "--gradient_accumulation_steps by the same factor",
    "fp16": "its loss scaler rescales and skips steps. Use --bf16",
    "deepspeed": "it averages and clips gradients itself. Start processes with torch.distributed.run instead",
    "fsdp": "accelerate would shard gradients that are not per author. Give full_shard to DPTrainer instead",
    "parallelism_config": "accelerate would split the model or its texts. Start processes with torch.distributed.run instead",
    "accelerator_config": "accelerate's accumulation and loaders would change losses and batches. Leave it out; "
    "--gradient_accumulation_steps works",
    "neftune_noise_alpha": "its noise is not that of the mechanism. Leave it out",
    "label_smoothing_factor": "it would replace the per-author loss. Leave it at 0",
    "torch_compile": "it hides the layers from the clipping hooks. Leave it out",
    "torch_compile_backend": "it enables --torch_compile, which hides the layers from the clipping hooks. Leave it out",
    "torch_compile_mode": "it enables --torch_compile, which hides the layers from the clipping hooks. Leave it out",
    "save_on_each_node": "other nodes have no ledger, so their privacy.json would be wrong. Leave it out",
    "use_liger_kernel": "it fuses the loss, which must be per author. Leave it out",
    "train_sampling_strategy": "the mechanism samples the authors. Leave it out",
    "include_num_input_tokens_seen": "it would count 0 tokens, as a batch holds authors. Leave it out",
    "enable_jit_checkpoint": "its signal handler would replace ours, which also saves a checkpoint at SIGTERM. Leave it out",
    "debug": "it prints statistics of private texts, and one author's could end the run. Leave it out",
}

NO_EFFECT = {  # why
    **dict.fromkeys(
        ("bf16_full_eval", "fp16_full_eval", "prediction_loss_only", "eval_do_concat_batches", "eval_use_gather_object",
         "eval_accumulation_steps", "include_for_metrics", "batch_eval_metrics", "label_names"),
        "evaluation computes losses only, as training does",
    ),
    **dict.fromkeys(
        ("dataloader_drop_last", "dataloader_in_order", "remove_unused_columns", "length_column_name", "data_seed",
         "ignore_data_skip"),
        "authors are sampled at random, with secret keys, and their samples hold only what is used",
    ),
    **dict.fromkeys(
        ("ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_broadcast_buffers", "ddp_static_graph"),
        "there is no DistributedDataParallel",
    ),
    **dict.fromkeys(("do_train", "do_eval", "do_predict", "local_rank"), "the Trainer does not read it"),
    "average_tokens_across_devices": "losses are means over authors",
    "torch_empty_cache_steps": "the training step is not the Trainer's",
    "liger_kernel_config": "--use_liger_kernel is refused",
    "fsdp_config": "accelerate's FSDP is refused",
}  # fmt: skip
SET_BY_OTHERS = ("do_eval", "fsdp_config", "local_rank", "average_tokens_across_devices")  # not by the user alone

# Optimizers whose step() is a function of gradients, weights and their state. Others, those of later versions too, are refused.
OPTIMIZERS = frozenset(
    """
    adamw_torch adamw_torch_fused adafactor adamw_anyprecision adamw_torch_4bit adamw_torch_8bit ademamix sgd adagrad
    adamw_bnb_8bit adamw_8bit ademamix_8bit lion_8bit lion_32bit paged_adamw_32bit paged_adamw_8bit paged_ademamix_32bit
    paged_ademamix_8bit paged_lion_32bit paged_lion_8bit rmsprop rmsprop_bnb rmsprop_bnb_8bit rmsprop_bnb_32bit galore_adamw
    galore_adamw_8bit galore_adafactor grokadamw apollo_adamw stable_adamw
    """.split()
)
TORCH_OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "sgd", "adagrad", "rmsprop", "adafactor")

# Arguments of Trainer that DPTrainer passes on; None may be given for all others.
TRAINER_ARGUMENTS = frozenset("eval_dataset processing_class callbacks optimizers optimizer_cls_and_kwargs".split())


def check_trainer_options(args: transformers.TrainingArguments) -> None:
    """Raise UserError for an option that is refused, or unknown to the table and set to another value than its default."""
    for name, reason in REFUSED_OPTIONS.items():
        if trainer_option_is_set(args, name):
            raise UserError(f"--{name}: {reason}")
    for field in dataclasses.fields(transformers.TrainingArguments):
        if field.name not in WORKS and field.name not in NO_EFFECT and trainer_option_is_set(args, field.name):
            raise UserError(
                f"--{field.name} {getattr(args, field.name)}: not examined, as it is new in transformers "
                f"{transformers.__version__}. It may reach behind the training loop. Leave it out"
            )


def trainer_option_is_set(args: transformers.TrainingArguments, name: str) -> bool:
    """Return whether an option has another value than its default."""
    value, default = getattr(args, name, None), default_trainer_option(transformers.TrainingArguments, name)
    if isinstance(value, AcceleratorConfig):
        return value != AcceleratorConfig()
    return value != default and not (trainer_option_is_empty(value) and trainer_option_is_empty(default))


def trainer_option_is_empty(value: Any) -> bool:
    """Return whether a value is one of the kinds of nothing that TrainingArguments turns into one another."""
    return value in (None, False, "", "no", [], {})


def default_trainer_option(arguments_class: type, name: str) -> Any:
    """Return the default of an option; None where it has none."""
    for field in dataclasses.fields(arguments_class):
        if field.name == name:
            return field.default_factory() if callable(field.default_factory) else field.default
    return None


def trainer_options_without_effect(args: transformers.TrainingArguments) -> list[str]:
    """Return the options that were given and have no effect."""
    names = sorted(NO_EFFECT.keys() - set(SET_BY_OTHERS))
    return [f"--{name}" for name in names if getattr(args, name, None) != default_trainer_option(type(args), name)]


def check_optimizer_name(name: str) -> None:
    """Raise UserError for an --optim whose step is not a function of released gradients alone."""
    if name in OPTIMIZERS:
        return
    if any(word in name for word in ("lomo", "layerwise")):
        problem = "it updates weights during the backward pass, before clipping"
    elif name.startswith("schedule_free"):
        problem = "it evaluates and saves other weights than it trains, and is not told when"
    else:
        problem = "it was not examined"
    raise UserError(f"--optim {name}: {problem}. Use adamw_torch")


def check_optimizer(optimizer: torch.optim.Optimizer, args: transformers.TrainingArguments) -> None:
    """Raise UserError for an optimizer, also one that was given as an object, that needs more than gradients.

    Args:
        optimizer: before any step.
    """
    name = type(optimizer).__name__
    if any(callable(getattr(optimizer, mode, None)) for mode in ("train", "eval")):
        raise UserError(
            f"optimizers: {name} needs train() and eval() calls: it evaluates and saves other weights than it trains. Use another"
        )
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise UserError(f"optimizers: {name} computes the loss again in its step, which would not be private. Use another")
    option = OptimizerNames(args.optim).value
    if option in TORCH_OPTIMIZERS and args.optim_args:
        for key, value in _parse_optim_args(args.optim_args).items():
            if str(optimizer.defaults.get(key)).lower() not in (value.lower(), str(to_number(value))):
                raise UserError(f"--optim_args {key}={value}: --optim {option} does not read it. Leave it out")


def to_number(value: str) -> float | str:
    """Return a word as a number, or as it is."""
    try:
        return float(value)
    except ValueError:
        return value


def check_trainer_arguments(arguments: Mapping[str, Any]) -> None:
    """Raise UserError for an argument of Trainer that DPTrainer would not follow."""
    for name, value in arguments.items():
        if name not in TRAINER_ARGUMENTS and value is not None:
            raise UserError(f"{name} of DPTrainer: training and evaluation use the losses of authors alone. Leave it out")


def check_trainer_adapted(trainer: Any) -> None:
    """Raise UserError where options were changed after DPTrainer was made, accelerate accumulates, or a loss is not used.

    Args:
        trainer: dp_utils.DPTrainer, about to train.
    """
    if trainer.args.gradient_accumulation_steps != 1 or trainer.accelerator.gradient_accumulation_steps != 1:
        raise UserError(
            "gradient_accumulation_steps of DPTrainer: it was changed after the plan was made, so sampled batches would be "
            "thrown away. Give it to TrainingArguments"
        )
    if type(trainer).compute_loss is not transformers.Trainer.compute_loss:
        raise UserError(
            f"compute_loss of {type(trainer).__name__}: it is never called, as training uses the losses of authors. Leave it out"
        )


def check_no_trial(trial: Any) -> None:
    """Raise UserError for a hyperparameter search: every trial spends budget, and losses choose the best."""
    if trial is not None:
        raise UserError(
            "hyperparameter_search: not supported, as every trial spends privacy budget, and so does choosing by its losses. "
            "Call train() with fixed options"
        )
