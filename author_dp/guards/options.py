"""Refuse options under which the guarantee would silently not hold, or training would be nothing.

`validate_options` is the one check of options: the script calls it before it loads data, and DPTrainer always. Each error names
the option and the remedy. docs/verification.md, "Refused options", lists them.

Example:

    >>> validate_options(args, privacy, full_shard=False)
"""

from typing import Optional, Protocol

from transformers import TrainingArguments
from transformers.trainer_utils import HubStrategy
from transformers.training_args import OptimizerNames

from author_dp.accounting.plan import SAMPLINGS, check_plan_can_certify, check_planned_delta
from author_dp.errors import UserError
from author_dp.guards.clipping_check import TRANSFORMERS_MODULE
from author_dp.guards.launchers import check_launcher
from author_dp.guards.loggers import check_loggers
from author_dp.guards.metric_driven import check_metric_options, metric_driven_option
from author_dp.guards.precision import rounding_error, rounding_settings
from author_dp.guards.trainer_arguments import check_optimizer_name, check_trainer_options
from author_dp.mechanism.adam_bc import use_adam_bc
from author_dp.validation import check_choice, check_range

# Optimizers that update each element by itself, so that a shard is updated as it would be in the full tensor.
ELEMENTWISE_OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "sgd", "adagrad", "rmsprop")

# Intervals of Hugging Face's options whose other values would fail late, or train to nothing.
RANGES = {
    "learning_rate": "[0, 1e38]",
    "weight_decay": "[0, 1e38]",
    "adam_beta1": "[0, 1)",
    "adam_beta2": "[0, 1)",
    "adam_epsilon": "[0, 1e38]",
    "num_train_epochs": "[-1e9, 1e9]",
    "warmup_steps": "[0, 1e9]",
    "per_device_train_batch_size": "[1, 2147483648]",
    "per_device_eval_batch_size": "[1, 2147483648]",
    "gradient_accumulation_steps": "[1, 2147483648]",
    "eval_accumulation_steps": "[1, 2147483648]",
    "logging_steps": "[1e-9, 2147483648]",
    "eval_steps": "[1e-9, 2147483648]",
    "save_steps": "[1e-9, 2147483648]",
    "eval_delay": "[0, 2147483648]",
    "dataloader_num_workers": "[0, 32768]",
    "dataloader_prefetch_factor": "[1, 32768]",
    "ddp_timeout": "[1, 1e9]",
    "save_total_limit": "[1, 2147483648]",
    "seed": "[0, 4294967295]",
}


class PrivacyOptions(Protocol):
    """The privacy options that other options must agree with; dp_utils.PrivacyArguments has them."""

    disable_dp: bool
    clipping: str
    noise_multiplier: Optional[float]
    sample_rate: Optional[float]
    target_delta: Optional[float]
    adam_noise_correction: Optional[bool]
    sampling: Optional[str]
    target_epsilon: Optional[float]
    part_of_search: bool


def validate_options(
    args: TrainingArguments,
    privacy: PrivacyOptions,
    *,
    full_shard: bool = False,
    base_precision_flag: Optional[str] = None,
    shared_authors: bool = False,
) -> None:
    """Check all options that need neither model nor data.

    Args:
        args: Hugging Face's.
        full_shard: whether the model is sharded among the processes (--fsdp full_shard).
        base_precision_flag: the option by which a frozen base is kept in less than float32; None without one.
        shared_authors: whether evaluation authors may be training authors (--allow_shared_authors).
    Raises:
        UserError: for an option under which the guarantee would not hold, or training would be nothing.
    """
    check_trainer_options(args)
    check_option_ranges(args)
    check_checkpointing_options(args, privacy)
    check_launcher(args)
    check_loggers(args)
    if args.push_to_hub:
        check_upload_options(args, privacy)
    check_gradient_options(args, privacy)
    use_adam_bc(OptimizerNames(args.optim).value, privacy.adam_noise_correction, num_bands=1)
    check_planned_delta(privacy, args)
    check_sampling_options(privacy)
    if full_shard:
        check_fsdp_options(args, privacy, base_precision_flag)
    check_metric_options(shared_authors, metric_driven_option(args), privacy)


def check_sampling_options(privacy: PrivacyOptions) -> None:
    """Raise UserError for an unknown sampling, or one that cannot be certified."""
    if privacy.sampling is not None:
        check_choice("--sampling", privacy.sampling, [*SAMPLINGS, "auto"])
    if privacy.sampling == "balls-in-bins" and not privacy.disable_dp:
        check_plan_can_certify(privacy)


def check_option_ranges(args: TrainingArguments) -> None:
    """Raise UserError for a number out of its range, or an option that is no JSON object."""
    for name, interval in RANGES.items():
        check_range(f"--{name}", getattr(args, name, None), interval)
    for name in ("lr_scheduler_kwargs", "activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"):
        if not isinstance(getattr(args, name, None) or {}, dict):
            raise UserError(f"--{name} {getattr(args, name)}: not a JSON object. Give one, like '{{\"name\": 1}}'")
    for name in ("dataloader_persistent_workers", "dataloader_multiprocessing_context", "dataloader_prefetch_factor"):
        if getattr(args, name, None) and not args.dataloader_num_workers:
            raise UserError(f"--{name}: it needs workers. Give --dataloader_num_workers a number above 0, or leave it out")
    if args.max_steps == 0:  # the Trainer would follow --num_train_epochs
        raise UserError("--max_steps 0: nothing to train. Give a number above 0, or leave it out for --num_train_epochs")
    if args.max_steps < 0 and args.num_train_epochs <= 0:
        raise UserError(f"--num_train_epochs {args.num_train_epochs}: nothing to train. Give a number above 0, or --max_steps")


def check_gradient_options(args: TrainingArguments, privacy: PrivacyOptions) -> None:
    """Raise UserError for options that change gradients, samples or updates outside the mechanism."""
    if args.max_grad_norm and not privacy.disable_dp:
        raise UserError(
            f"--max_grad_norm {args.max_grad_norm}: it would clip the noisy sum once more. Set it to 0; "
            "--per_sample_max_grad_norm already clips each author's gradient"
        )
    settings = ["--tf32"] if args.tf32 else rounding_settings(args.device.type)
    if settings and not privacy.disable_dp:
        raise rounding_error(settings)
    check_optimizer_name(OptimizerNames(args.optim).value)


def check_upload_options(args: TrainingArguments, privacy: PrivacyOptions) -> None:
    """Raise UserError where --push_to_hub would upload private files, or a model without a guarantee."""
    if args.hub_strategy not in (HubStrategy.END, HubStrategy.EVERY_SAVE):
        raise UserError(
            f"--hub_strategy {HubStrategy(args.hub_strategy).value}: it would publish private losses in trainer_state.json. Use "
            "every_save or end"
        )
    without = {
        "--disable_dp": privacy.disable_dp,
        "--noise_multiplier 0": privacy.noise_multiplier == 0,
        "--part_of_search": privacy.part_of_search,
    }
    if option := next((name for name, given in without.items() if given), None):
        raise UserError(f"--push_to_hub: it publishes models with a guarantee only, and {option} gives none. Leave one out")


def check_checkpointing_options(args: TrainingArguments, privacy: PrivacyOptions) -> None:
    """Raise UserError for activation checkpointing that reruns layers without the clipping engine's knowledge."""
    name = next((n for n in ("gradient_checkpointing", "activation_checkpointing") if getattr(args, n, None)), None)
    if name is None or privacy.disable_dp:
        return
    if privacy.clipping != "ghost":
        raise UserError(f"--{name}: layers run twice, and --clipping {privacy.clipping} would count both. Use --clipping ghost")
    options = getattr(args, f"{name}_kwargs", None) or {}
    if options.get("use_reentrant", bool(options.keys() - TRANSFORMERS_MODULE)):  # torch's default beside other options is true
        raise UserError(f"--{name}_kwargs: use_reentrant hides the layers from the clipping hooks. Set it to false")
    if not options.get("preserve_rng_state", True):
        raise UserError(
            f"--{name}_kwargs: without preserve_rng_state layers use other dropout masks when they run again, so norms are not "
            "those of the summed gradients. Set it to true"
        )


def check_fsdp_options(args: TrainingArguments, privacy: PrivacyOptions, base_precision_flag: Optional[str] = None) -> None:
    """Raise UserError for options that do not work, or were not verified, with --fsdp full_shard."""
    if base_precision_flag is not None:
        raise UserError(f"--fsdp: it shards float32 weights only. Leave out {base_precision_flag}, or --fsdp")
    if args.world_size < 2:
        raise UserError("--fsdp full_shard: one process has nobody to share with. Start several with torch.distributed.run")
    if privacy.disable_dp or privacy.clipping != "ghost":
        name = "disable_dp" if privacy.disable_dp else f"clipping {privacy.clipping}"
        raise UserError(f"--{name}: not supported with --fsdp. Leave one of them out")
    if OptimizerNames(args.optim).value not in ELEMENTWISE_OPTIMIZERS:
        name = OptimizerNames(args.optim).value
        raise UserError(f"--optim {name}: with --fsdp it may mix elements of shards. Use {ELEMENTWISE_OPTIMIZERS[0]}")
    if args.load_best_model_at_end:
        raise UserError("--load_best_model_at_end: not supported with --fsdp. Leave it out, and choose a checkpoint yourself")
