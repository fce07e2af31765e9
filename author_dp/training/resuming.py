"""Compare the options of a resumed run with those that its checkpoint was made with.

An option of a resumed run either takes effect from the next step on, and is in MAY_CHANGE, or it must have the value that the
checkpoint was made with. The optimizer keeps its learning rate, for example, whatever --learning_rate says. Model, tokenizer and
training samples are compared by what they are, as their folders and files may have moved. What a checkpoint was made with is in
its marker file, which is private, as is the checkpoint.

Example:

    >>> options = resumable_options(training_args, privacy_args, lora_args)
    >>> check_same_options(Path("scratch/checkpoint-100"), options)
"""

import hashlib
import json
from pathlib import Path
from typing import Any, Optional

import pyarrow as pa
from transformers import PreTrainedTokenizerBase, TrainingArguments

from author_dp.data.columns import get_column
from author_dp.errors import UserError
from author_dp.files import write_json
from author_dp.models.loading import public_model_name
from author_dp.models.weights import read_weights_marker

# Options that take effect when they change. All others, those of later versions too, are compared.
MAY_CHANGE = {
    # The mechanism: the ledger accounts for each run as it ran. What may not change of it has checks of its own.
    "target_epsilon", "noise_multiplier", "target_delta", "per_sample_max_grad_norm", "samples_per_author", "sample_rate",
    "secure_noise", "clipping", "noise_bands", "sampling", "hide_counts", "allow_other_authors", "disable_dp",
    "per_device_train_batch_size", "gradient_accumulation_steps",
    # How long the training is, and where from and where to.
    "num_train_epochs", "max_steps", "output_dir", "resume_from_checkpoint", "dry_run", "do_train", "do_eval", "do_predict",
    # Places. What is found there is compared.
    "model_name", "train_file", "validation_file", "dataset_name", "dataset_config_name", "dataset_revision", "chat_template",
    # Evaluation and release, which train nothing.
    "eval_strategy", "evaluation_strategy", "eval_steps", "eval_delay", "eval_on_start", "per_device_eval_batch_size",
    "eval_accumulation_steps", "eval_do_concat_batches", "prediction_loss_only", "batch_eval_metrics", "max_eval_samples",
    "release_eval_epsilon", "release_eval_range",
    # Logs.
    "logging_strategy", "logging_steps", "logging_first_step", "logging_nan_inf_filter", "log_level",
    "log_level_replica", "log_on_each_node", "report_to", "run_name", "project", "trackio_space_id", "trackio_bucket_id",
    "trackio_static_space_id", "disable_tqdm", "include_num_input_tokens_seen", "skip_memory_metrics", "debug",
    # Saving and uploads.
    "save_strategy", "save_steps", "save_total_limit", "save_only_model", "enable_jit_checkpoint", "push_to_hub", "hub_token",
    "hub_private_repo", "hub_model_id", "hub_strategy", "hub_always_push", "hub_revision",
    # Hardware: the same mechanism, on other machines.
    "use_cpu", "bf16", "bf16_full_eval", "tf32", "fsdp", "gradient_checkpointing", "gradient_checkpointing_kwargs",
    "activation_checkpointing", "activation_checkpointing_kwargs", "use_cache", "torch_empty_cache_steps", "local_rank",
    "dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers", "dataloader_prefetch_factor",
    "dataloader_multiprocessing_context", "dataloader_in_order", "preprocessing_num_workers", "ddp_find_unused_parameters",
    "ddp_bucket_cap_mb", "ddp_broadcast_buffers", "ddp_static_graph", "ddp_backend", "ddp_timeout",
}  # fmt: skip
SAMPLES_NAME = "_samples.json"  # of a search's run; as private as the samples, and the leading _ keeps it out of uploads
CHOICE_OF_AUTHORS = {"seed", "eval_fraction", "train_fraction", "max_train_samples"}  # free with --allow_other_authors
VOLATILE_CONFIG = {"transformers_version", "architectures", "dtype", "torch_dtype", "use_cache", "quantization_config"}
VOLATILE_ADAPTER = {"base_model_name_or_path", "inference_mode", "revision", "peft_version", "task_type"}
PEFT_NAMES = {
    "r": "dim",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
}  # where this program's name of a --lora option is not peft's


def resumable_options(*groups: Any) -> dict[str, Any]:
    """Return the options of dataclasses by name, as JSON can hold them; tokens are left out."""
    options: dict[str, Any] = {}
    for group in groups:
        options |= group.to_dict() if isinstance(group, TrainingArguments) else vars(group)
    return to_resumable_json(options)


def to_resumable_json(value: Any) -> Any:
    """Return a value as it is after it was written to JSON; sets become sorted lists."""
    return json.loads(json.dumps(value, default=lambda other: sorted(other) if isinstance(other, set) else str(other)))


def describe_training(model: Any, dataset: Any, tokenizer: Optional[Any], name: Optional[str]) -> dict[str, Any]:
    """Describe model, tokenizer and training samples by what they are, for `check_same_options`.

    Args:
        dataset: `data_utils.AuthorDataset`.
        tokenizer: None if unknown.
        name: hub name or local folder of the model.
    """
    config = {key: value for key, value in model.config.to_dict().items() if key not in VOLATILE_CONFIG and key[0] != "_"}
    adapter = getattr(model, "peft_config", {}).get(getattr(model, "active_adapter", None))
    shapes = [(key, list(value.shape)) for key, value in model.named_parameters() if value.requires_grad]
    is_named = bool(name) and public_model_name(str(name)) == name and not Path(str(name)).is_absolute()
    return to_resumable_json({
        "hub name": name if is_named else None,
        "config": config,
        "adapter": {key: value for key, value in (adapter.to_dict() if adapter else {}).items() if key not in VOLATILE_ADAPTER},
        "trained parameters": hashlib.sha256(json.dumps(shapes).encode()).hexdigest(),
        "tokenizer": hash_tokenizer(tokenizer) if isinstance(tokenizer, PreTrainedTokenizerBase) else None,
        "authors": len(dataset),
        "samples": hash_samples(dataset),
    })  # fmt: skip


def hash_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the SHA-256 of a vocabulary."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()


def hash_samples(dataset: Any) -> str:
    """Return the SHA-256 of all tokens and labels and of which author they have. It is as private as they are."""
    digest = hashlib.sha256(dataset.offsets.tobytes() + dataset.indices.tobytes())
    for name in dataset.columns:
        for chunk in get_column(dataset.samples, name).chunks:
            for array in (pa.compute.list_value_length(chunk), chunk.flatten()):
                digest.update(array.to_numpy().tobytes())
    return digest.hexdigest()


def write_sample_hashes(trainer: Any) -> None:
    """Write hashes of the training and evaluation samples of a search's run to its folder: all of its runs need the same."""
    if trainer.privacy.part_of_search and trainer.is_world_process_zero():
        held_out = trainer.eval_dataset
        hashes = {
            "train": trainer.made_with["training"]["samples"],
            "evaluation": None if held_out is None else hash_samples(held_out),
        }
        write_json(trainer.folder / SAMPLES_NAME, hashes, private=True)


def check_same_options(checkpoint: Path, options: dict[str, Any], training: Optional[dict[str, Any]] = None) -> None:
    """Raise UserError where the resumed run has another option, model or data than `checkpoint` was made with.

    Args:
        options: from `resumable_options`. Only names that the checkpoint knows too are compared.
        training: from `describe_training`; None where model and data are not loaded yet.
    """
    marker = read_weights_marker(checkpoint)
    before, others_allowed = marker.get("options"), bool(options.get("allow_other_authors"))
    if before is None:  # an older version wrote it
        return
    free = MAY_CHANGE | (CHOICE_OF_AUTHORS if others_allowed else set())
    changed = [name for name in options if name in before and name not in free and options[name] != before[name]]
    if changed:
        now = ", ".join(f"--{name} {format_resumed_value(options[name])}" for name in changed)
        then = ", ".join(f"--{name} {format_resumed_value(before[name])}" for name in changed)
        raise UserError(f"{now}: {checkpoint} was made with {then}. Give what it was made with, or start in a new --output_dir")
    if training is not None:
        check_same_training(checkpoint, marker.get("training") or {}, training, others_allowed)


def format_resumed_value(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value))
    return "(not given)" if value is None else str(value)


def check_same_training(checkpoint: Path, before: dict[str, Any], now: dict[str, Any], others_allowed: bool) -> None:
    """Raise UserError where model, tokenizer or samples, from `describe_training`, are not those of `checkpoint`."""
    remedy = "Give that of the checkpoint, or start in a new --output_dir"
    for key in ("adapter", "config"):
        old, new = before.get(key, {}), now[key]
        for name in sorted(old.keys() & new.keys() if old and new else ()):
            if old[name] != new[name]:
                is_adapter = key == "adapter"
                option = f"--lora_{PEFT_NAMES.get(name, name)}" if is_adapter else f"--model_name: its config.json has {name}"
                raise UserError(
                    f"{option} {format_resumed_value(new[name])}: {checkpoint} was made with "
                    f"{format_resumed_value(old[name])}. {remedy}"
                )
    if None not in (before.get("hub name"), now["hub name"]) and before["hub name"] != now["hub name"]:
        raise UserError(f"--model_name {now['hub name']}: {checkpoint} was made from {before['hub name']}. {remedy}")
    if before.get("trained parameters") not in (None, now["trained parameters"]):
        raise UserError(f"--model_name, or a --lora option: other parameters are trained than in {checkpoint}. {remedy}")
    if None not in (before.get("tokenizer"), now["tokenizer"]) and before["tokenizer"] != now["tokenizer"]:
        raise UserError(f"--model_name: its tokenizer has another vocabulary than that of {checkpoint}. {remedy}")
    if before.get("samples") in (None, now["samples"]) or others_allowed:
        return
    remedy = "Give the same data and options, or add --allow_other_authors if this is intended"
    if before["authors"] != now["authors"]:
        raise UserError(
            f"--resume_from_checkpoint: there are {now['authors']:,} training authors now, {before['authors']:,} before. {remedy}"
        )
    raise UserError(f"--train_file, or another data option: the training samples are not those of {checkpoint}. {remedy}")
