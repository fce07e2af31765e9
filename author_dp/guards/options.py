"""Options and models under which the guarantee would silently not hold: each is refused by name, with the remedy.

Promise: what passes here works as the mechanism is accounted for. The list in docs/guarantee.md, "Refused by
name", is made from this file.
"""

import os
from collections.abc import Iterable
from typing import Any, Optional

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn
from transformers import TrainingArguments
from transformers.trainer_utils import HubStrategy
from transformers.training_args import OptimizerNames

from author_dp.errors import UserError
from author_dp.guards.loggers import check_loggers
from author_dp.guards.model_check import TRANSFORMERS_MODULE, check_sample_independence
from author_dp.guards.precision import raise_rounded, rounding_settings
from author_dp.mechanism.adam_bc import SUPPORTED
from author_dp.mechanism.fsdp import is_finite
from author_dp.models.quantization import check_quantized_frozen

# Options that would change the mechanism behind the accountant's back: refused by name, with the remedy.
REFUSED_OPTIONS = {
    "auto_find_batch_size": "the batch size is part of the guarantee; lower --per_device_train_batch_size and raise "
    "--gradient_accumulation_steps by the same factor",
    "fp16": "its loss scaler rescales and skips steps; use --bf16",
    "deepspeed": "it averages and clips gradients on its own; start processes with torch.distributed.run",
    "fsdp": "accelerate would share gradients that are not per author; give full_shard to DPTrainer instead",
    "neftune_noise_alpha": "its noise is not the noise of the mechanism; leave it out",
    "label_smoothing_factor": "it would replace the per-author loss; leave it at 0",
    "torch_compile": "it hides the layers from the clipping hooks; leave it out",
    "save_on_each_node": "other nodes know nothing of the ledger, so their privacy.json would be wrong; leave it out",
    "use_liger_kernel": "it fuses the loss, which must be per author; leave it out",
}


SUPPORTED_LAUNCHES = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU, DistributedType.MULTI_XPU)

# Lowest and highest value of Hugging Face's options that would otherwise fail late, or train to nothing.
RANGES = {
    "learning_rate": (0, 1e38),
    "weight_decay": (0, 1e38),
    "adam_beta1": (0, 1 - 1e-12),
    "adam_beta2": (0, 1 - 1e-12),
    "adam_epsilon": (0, 1e38),
    "num_train_epochs": (-1e9, 1e9),
    "warmup_steps": (0, 1e9),
    "per_device_train_batch_size": (1, 2**31),
    "per_device_eval_batch_size": (1, 2**31),
    "gradient_accumulation_steps": (1, 2**31),
    "eval_accumulation_steps": (1, 2**31),
    "logging_steps": (1e-9, 2**31),
    "eval_steps": (1e-9, 2**31),
    "save_steps": (1e-9, 2**31),
    "eval_delay": (0, 2**31),
    "dataloader_num_workers": (0, 2**15),
    "seed": (0, 2**32 - 1),
}


def check_options(args: TrainingArguments, privacy: Any) -> None:
    """Raise UserError for an option under which the guarantee would not hold, or training would be nothing.

    The script calls it before data are loaded; DPTrainer calls it again for whoever builds one directly.

    Args:
        args: Hugging Face's.
        privacy: dp_utils.PrivacyArguments.
    """
    for name, remedy in REFUSED_OPTIONS.items():
        if getattr(args, name, None):
            raise UserError(f"--{name} does not work here: {remedy}")
    check_checkpointing(args, privacy)
    if args.world_size != int(os.environ.get("WORLD_SIZE", 1)):
        raise UserError("torch.distributed.run started several processes, but they are not connected: on CPUs add --use_cpu")
    check_loggers(args)
    if args.push_to_hub:
        check_uploads(args, privacy)
    if args.max_grad_norm and not privacy.disable_dp:
        raise UserError(
            f"--max_grad_norm {args.max_grad_norm} would clip the noisy sum once more; set it to 0, as "
            "--per_sample_max_grad_norm already clips each author's gradient"
        )
    if os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower() != "no":
        raise UserError(
            "ACCELERATE_DYNAMO_BACKEND (accelerate launch --dynamo_backend) does not work here: like --torch_compile it hides "
            "the layers from the clipping hooks, and it switches TF32 on; unset it"
        )
    if not privacy.disable_dp and (args.tf32 or rounding_settings(args.device.type)):
        raise_rounded(["--tf32"] if args.tf32 else rounding_settings(args.device.type))
    if getattr(args, "train_sampling_strategy", "random") != "random" or getattr(args, "group_by_length", False):
        raise UserError("--train_sampling_strategy does not work here: authors are sampled by the mechanism; leave it out")
    if any(word in str(args.optim).lower() for word in ("lomo", "layerwise")):
        name = OptimizerNames(args.optim).value
        raise UserError(f"--optim {name} updates weights during the backward pass, before clipping; use adamw_torch")
    use_adam_bc(args, privacy, 1)
    for name, (lowest, highest) in RANGES.items():
        value = getattr(args, name, None)
        if value is not None and not lowest <= value <= highest:  # nan is neither
            raise UserError(f"--{name} {value} must be a number from {lowest:g} to {highest:g}")
    for name in ("lr_scheduler_kwargs", "activation_checkpointing_kwargs"):
        if not isinstance(getattr(args, name, None) or {}, dict):
            raise UserError(f"--{name} {getattr(args, name)} must be a JSON object, like '{{\"name\": 1}}'")
    if args.max_steps <= 0 and args.num_train_epochs <= 0:
        raise UserError(f"--num_train_epochs {args.num_train_epochs} must be above 0 where --max_steps is not given")


def use_adam_bc(args: TrainingArguments, privacy: Any, bands: int) -> bool:
    """Return whether Adam's second moment is to be corrected for the noise: if asked, or with so many noise bands.

    Raises:
        UserError: if asked for with an optimizer that has none, or none of that kind.
    """
    name = OptimizerNames(args.optim).value
    if not privacy.adam_noise_correction:
        return privacy.adam_noise_correction is None and bands > 1 and name in SUPPORTED
    if name not in SUPPORTED:
        raise UserError(f"--adam_noise_correction is for AdamW, not for --optim {name}: use {SUPPORTED[0]}, or leave it out")
    return True


# Values known to depend on step numbers alone; all others, those of later versions too, count as chosen by metrics.
STEP_ONLY = {
    "lr_scheduler_type": {
        "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt",
        "cosine_with_min_lr", "cosine_warmup_with_min_lr", "warmup_stable_decay",
    },
    "save_strategy": {"no", "steps", "epoch"},
    "eval_strategy": {"no", "steps", "epoch"},
    "logging_strategy": {"no", "steps", "epoch"},
}  # fmt: skip


def metric_driven_option(args: TrainingArguments) -> Optional[str]:
    """Return the option by which evaluation metrics choose what is saved or trained; None where they only inform."""
    if args.load_best_model_at_end:
        return "--load_best_model_at_end"
    for name, known in STEP_ONLY.items():
        value = getattr(args, name)
        value = str(getattr(value, "value", value))
        if value not in known:
            return f"--{name} {value}"
    if args.metric_for_best_model is not None:  # --save_total_limit spares the best checkpoint
        return f"--metric_for_best_model {args.metric_for_best_model}"
    return None


def check_shared_authors(allowed: bool, option: Optional[str], privacy: Any) -> None:
    """Raise UserError where metrics of training authors, which have no noise, would choose the model.

    Args:
        allowed: --allow_shared_authors, or whether evaluation authors are training authors.
        option: what lets metrics choose, from `by_metrics`.
        privacy: dp_utils.PrivacyArguments.
    """
    if allowed and option is not None and not privacy.disable_dp:
        raise UserError(
            f"--allow_shared_authors: with {option} the losses of training authors, which have no noise, would choose the model: "
            "leave one of the two out"
        )


def have_shared_authors(train: Any, evaluation: Any) -> bool:
    """Return whether evaluation authors are seen to be training authors.

    Args:
        train: data set of the training, `data_utils.AuthorDataset`.
        evaluation: another one, several by name, or None.
    """
    for dataset in evaluation.values() if isinstance(evaluation, dict) else [evaluation]:
        ours, theirs = getattr(train, "hashes", None), getattr(dataset, "hashes", None)
        if dataset is train or (ours is not None and theirs is not None and bool(np.isin(theirs, ours).any())):
            return True
    return False


def check_uploads(args: TrainingArguments, privacy: Any) -> None:
    """Raise UserError where --push_to_hub would upload more than outputs/publish.py copies, or a model without a guarantee."""
    if args.hub_strategy not in (HubStrategy.END, HubStrategy.EVERY_SAVE):
        raise UserError(
            f"--hub_strategy {HubStrategy(args.hub_strategy).value} would publish private losses in trainer_state.json: use "
            "every_save or end"
        )
    if privacy.disable_dp or privacy.noise_multiplier == 0:
        option = "--disable_dp" if privacy.disable_dp else "--noise_multiplier 0"
        raise UserError(
            f"--push_to_hub publishes models with a guarantee only, and {option} gives none: leave out one of the two"
        )


def check_checkpointing(args: TrainingArguments, privacy: Any) -> None:
    """Raise UserError for gradient checkpointing that runs layers again where the clipping cannot tell."""
    name = next((n for n in ("gradient_checkpointing", "activation_checkpointing") if getattr(args, n, None)), None)
    if name is None or privacy.disable_dp:
        return
    if privacy.clipping != "ghost":
        raise UserError(f"--{name} runs layers twice, which --clipping {privacy.clipping} would count: use --clipping ghost")
    options = getattr(args, f"{name}_kwargs", None) or {}
    if options.get("use_reentrant", bool(options.keys() - TRANSFORMERS_MODULE)):  # beside other options, torch's default is true
        raise UserError(f"--{name}_kwargs: use_reentrant hides the layers from the clipping hooks; set it to false")
    if not options.get("preserve_rng_state", True):
        raise UserError(
            f"--{name}_kwargs: without preserve_rng_state layers that run again drop other numbers, and norms are not those of "
            "what is summed; set it to true"
        )


# Optimizers that treat each number by itself, so that a share is updated as it would be in the whole.
ELEMENTWISE_OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "sgd", "adagrad", "rmsprop")


def check_fsdp(args: TrainingArguments, privacy: Any, model: Any = None) -> None:
    """Raise UserError for what does not work, or was not proven, with a model in shares (--fsdp full_shard).

    Args:
        model: None where it is not loaded yet.
    """
    if args.world_size < 2:
        raise UserError("--fsdp full_shard shares among processes: start several with torch.distributed.run, or leave it out")
    if privacy.disable_dp or privacy.clipping != "ghost":
        name = "disable_dp" if privacy.disable_dp else f"clipping {privacy.clipping}"
        raise UserError(f"--{name} does not work with --fsdp: leave out one of the two")
    if OptimizerNames(args.optim).value not in ELEMENTWISE_OPTIMIZERS:
        raise UserError(f"--optim {OptimizerNames(args.optim).value} may mix shares of --fsdp: use {ELEMENTWISE_OPTIMIZERS[0]}")
    if args.load_best_model_at_end:
        raise UserError("--load_best_model_at_end does not work with --fsdp: leave it out, and choose a checkpoint yourself")
    kinds = {parameter.dtype for parameter in model.parameters()} if model is not None else {torch.float32}
    if kinds != {torch.float32} or getattr(model, "hf_device_map", None):
        raise UserError("--fsdp wants all weights in float32, on no device yet: load the model whole, without quantization")


def check_launch(accelerator: Accelerator, bf16: bool) -> None:
    """Raise UserError where accelerate's own configuration would change the mechanism.

    Args:
        bf16: --bf16, which alone says whether the run computes in bfloat16.
    """
    if not bf16 and accelerator.mixed_precision == "bf16":
        raise UserError("ACCELERATE_MIXED_PRECISION bf16 (accelerate launch --mixed_precision): use --bf16 instead")
    known = accelerator.mixed_precision in ("no", "bf16") and accelerator.distributed_type in SUPPORTED_LAUNCHES
    if accelerator.scaler is not None or not known:
        raise UserError(
            "accelerate's configuration asks for fp16, fp8, deepspeed, fsdp or a TPU: use --bf16, torch.distributed.run"
        )


def check_model(model: nn.Module, proven: bool = True) -> None:
    """Raise UserError for a model whose per-author gradients do not exist, that would round the noise, or is broken.

    Args:
        proven: whether to prove by calling it that it keeps samples apart; DPTrainer does so in `proof.prove`, if at all.
    """
    check_weights(model.named_parameters(), "--model_name: ", "choose another model, or mend the checkpoint")
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise UserError("--model_name: an encoder-decoder model has no text of its own to continue; choose a decoder (causal LM)")
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise UserError(f"--model_name: {name} is a batch norm, which mixes the authors of a batch; choose another model")
    check_quantized_frozen(model)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.dtype != torch.float32:
            raise UserError(
                f"--model_name: {name} is {parameter.dtype}, which would round the noise; load it in float32, use --bf16"
            )
    if proven:
        check_sample_independence(model)


def check_trained_weights(model: nn.Module, step: int) -> None:
    """Raise UserError where training has made a weight infinite or nan by `step`."""
    trained = ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)
    check_weights(trained, f"--learning_rate: by step {step}, ", "lower it, and start anew")


def check_weights(parameters: Iterable[tuple[str, nn.Parameter]], where: str, remedy: str) -> None:
    """Raise UserError where a weight is not a finite number. Weights are public, so this tells nothing about any author."""
    for name, parameter in parameters:
        if not is_finite(parameter):
            raise UserError(f"{where}{name} holds weights that are not finite: {remedy}")
