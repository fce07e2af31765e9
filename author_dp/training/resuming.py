"""Decide whether a run may resume, from which checkpoint, and which options may differ then.

Guarantees: a checkpoint is resumed only beside the ledger that holds its steps, with the weights and the optimizer's state that
were saved. This module decides nothing about epsilon: the ledger alone does.

An option of a resumed run either takes effect from the next step on, and is in MAY_CHANGE, or it must have the value that the
checkpoint was made with. The optimizer keeps its learning rate, for example, whatever --learning_rate says. Model, tokenizer and
training samples are compared by what they are, as their folders and files may have moved. What a checkpoint was made with is in
its marker file, which is private, as is the checkpoint.

Example:

    >>> options = resumable_options(training_args, privacy_args, lora_args)
    >>> check_same_options(Path("scratch/checkpoint-100"), options)
"""

import errno
import hashlib
import json
import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Optional

import pyarrow as pa
from transformers import PreTrainedTokenizerBase, TrainerState, TrainingArguments
from transformers.trainer import OPTIMIZER_NAME, TRAINER_STATE_NAME

from author_dp.accounting.hash_chain import HashChain
from author_dp.accounting.ledger import LEDGER_NAME, REPORT_NAME, PrivacyLedger, find_ledger_reports
from author_dp.accounting.output_dir import check_output_dir, has_checkpoint_name
from author_dp.accounting.voiding import void_again
from author_dp.data.columns import get_column
from author_dp.errors import UserError
from author_dp.files import sha256_of, write_json
from author_dp.guards.metric_driven import metric_driven_option
from author_dp.logs import get_logger
from author_dp.models.weights import (
    COMPLETE_MARKER,
    check_weights,
    public_model_name,
    read_weights_marker,
    weight_files,
    weight_name_pattern,
)
from author_dp.training.checkpointing import checkpoints_by_step, find_checkpoint_corruption, latest_complete_checkpoint
from author_dp.wording import format_names

logger = get_logger(__name__)

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


# --- from which checkpoint ------------------------------------------------------------------------------


def load_checkpoint_state(checkpoint: Path) -> TrainerState:
    """Return the Trainer's state in `checkpoint`."""
    return TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))


def find_checkpoint(
    args: TrainingArguments,
    privacy: Any,
    adapter: bool,
    options: Optional[dict[str, Any]] = None,
    training: Optional[dict[str, Any]] = None,
) -> tuple[Optional[Path], PrivacyLedger]:
    """Return the checkpoint to resume from, and the ledger of the folder.

    Args:
        args: Hugging Face's. Used are output_dir and resume_from_checkpoint (a path, or True for the newest).
        privacy: dp_utils.PrivacyArguments.
        adapter: whether the run trains an adapter.
        options, training: as for `resuming.check_same_options`; None: not compared.
    Returns:
        (checkpoint, ledger); no checkpoint if the run starts with the model as given.
    Raises:
        UserError: where steps would be forgotten, the folder holds results of another run, or there is no such checkpoint.
    """
    folder, is_main_process = Path(str(args.output_dir)), args.process_index == 0
    check_checkpoint_path(folder, "--output_dir")
    check_output_dir(folder)
    ledger = open_checkpoint_ledger(folder, metric_driven_option(args), privacy.disable_dp, is_main_process)
    if not args.resume_from_checkpoint:
        check_no_earlier_run(folder, ledger)
        return None, ledger
    check_checkpoint_kind(folder, ledger, privacy.disable_dp, adapter, is_main_process)
    checkpoint = choose_checkpoint(args.resume_from_checkpoint, folder, ledger, privacy.disable_dp)
    if checkpoint is not None and not privacy.disable_dp:
        check_ledger_covers_checkpoint(checkpoint, ledger, is_main_process)
    if checkpoint is not None and options is not None:
        check_same_options(checkpoint, options, training)
    return checkpoint, ledger


def check_checkpoint_path(path: Path, option: str) -> None:
    """Raise UserError where the operating system rejects a path: a null byte, bad Unicode, or a name too long."""
    try:
        os.stat(path / LEDGER_NAME)
    except (ValueError, OSError) as error:  # a missing path is fine; others fail where they are used
        problem = error.strerror if isinstance(error, OSError) else error
        if isinstance(error, ValueError) or error.errno == errno.ENAMETOOLONG:
            raise UserError(f"{option} {ascii(str(path))[:80]}: not a valid path ({problem}). Choose another path") from error


def open_checkpoint_ledger(folder: Path, option: Optional[str], disable_dp: bool, is_main_process: bool) -> PrivacyLedger:
    """Return the ledger of `folder`, after checks that the run may use this folder.

    Args:
        option: by which evaluation metrics choose the model, if any.
    Raises:
        UserError: for a checkpoint's folder, one in use or with a failed mechanism, or a ledger that this run would contradict.
    """
    if has_checkpoint_name(folder):
        raise UserError(f"--output_dir {folder}: this is the name of a checkpoint, not of a run. Choose another --output_dir")
    path = folder / LEDGER_NAME
    # Fails if another run uses the folder.
    with HashChain(path).locked() if is_main_process and path.exists() else nullcontext():
        ledger = PrivacyLedger(path)
    if is_main_process:
        void_again(ledger)
    ledger.check_no_failure()
    check_checkpoint_not_released(ledger, option)
    if ledger.steps and disable_dp:
        raise UserError(f"--output_dir {folder}: it holds a private run. Choose another --output_dir for one with --disable_dp")
    return ledger


def check_no_earlier_run(folder: Path, ledger: PrivacyLedger) -> None:
    """Raise UserError where `folder` holds steps, a model, a checkpoint or a privacy.json.

    They could pass for results of a run that starts there.
    """
    if ledger.steps:
        raise UserError(
            f"--output_dir {folder} holds the privacy ledger of an earlier run. Resume that run with "
            "--resume_from_checkpoint True, or choose another --output_dir"
        )
    results = [*weight_files(folder), *find_ledger_reports(folder), *checkpoints_by_step(folder)]
    if results:
        names = format_names(sorted(str(path.relative_to(folder)) for path in results), 4)
        raise UserError(
            f"--output_dir {folder}: it holds results of another run or other weights ({names}). Choose another --output_dir, or "
            "resume that run with --resume_from_checkpoint True"
        )


def choose_checkpoint(resume: str | bool, folder: Path, ledger: PrivacyLedger, disable_dp: bool) -> Optional[Path]:
    """Return the checkpoint that `resume` names, or the newest complete one in `folder` for True.

    Returns:
        None where the run was interrupted before its first complete checkpoint.
    Raises:
        UserError: where there is no checkpoint, or it cannot be resumed.
    """
    checkpoint = latest_complete_checkpoint(folder) if resume is True else Path(str(resume))
    if checkpoint is not None:
        check_checkpoint_resumable(checkpoint)
    elif ledger.steps or (disable_dp and checkpoints_by_step(folder)):
        logger.warning_once(f"No complete checkpoint in {folder}: restarting; the {ledger.steps} recorded steps still count.")
    else:
        raise UserError(f"--resume_from_checkpoint: there is no checkpoint in --output_dir {folder}. Leave it out to start")
    return checkpoint


def check_checkpoint_resumable(checkpoint: Path) -> None:
    """Raise UserError unless `checkpoint` is a complete folder that holds the optimizer and the scheduler too."""
    name = f"--resume_from_checkpoint {checkpoint}"
    check_checkpoint_path(checkpoint, "--resume_from_checkpoint")
    if not checkpoint.is_dir():
        raise UserError(f"{name}: no such folder. Give a checkpoint folder, or True for the newest")
    if corruption := find_checkpoint_corruption(checkpoint):
        raise UserError(f"{name}: {corruption}. Give an earlier checkpoint, or True for the newest complete one")
    if not (checkpoint / "scheduler.pt").exists():
        raise UserError(
            f"{name}: it holds the model alone (--save_only_model), so the learning rate and the optimizer would start afresh. "
            "Resume from a checkpoint that was saved without --save_only_model"
        )


def check_checkpoint_kind(folder: Path, ledger: PrivacyLedger, disable_dp: bool, adapter: bool, is_main_process: bool) -> None:
    """Raise UserError where `folder` holds results of another kind of run than the resumed one.

    Args:
        disable_dp, adapter: the kind of run: whether it is without privacy, and whether it trains an adapter.
        is_main_process: only this process hashes weights.
    """
    checkpoints, foreign = checkpoints_by_step(folder), []
    for directory in (folder, *checkpoints):
        foreign += [path for path in weight_files(directory) if not weight_name_pattern(adapter).fullmatch(path.name)]
    foreign += [path for path in find_ledger_reports(folder) if ledger.check_report(path)["disable_dp"] != disable_dp]
    # This program writes privacy.json before the Trainer's state, and removes it after that.
    foreign += [p for p in checkpoints if (p / TRAINER_STATE_NAME).exists() and not (p / REPORT_NAME).exists()]
    if foreign:
        names = format_names(sorted(str(path.relative_to(folder)) for path in foreign), 4)
        kind = f"{'an adapter, --enable_lora' if adapter else 'a full model'}, {'without' if disable_dp else 'with'} privacy"
        raise UserError(
            f"--output_dir {folder}: it holds results of another kind of run ({names}) than the resumed "
            f"one ({kind}). Move them away, or choose another --output_dir"
        )
    if is_main_process and not disable_dp and (folder / REPORT_NAME).exists():
        check_weights(folder, ledger.check_report(folder / REPORT_NAME), base=False)


def check_checkpoint_not_released(ledger: PrivacyLedger, option: Optional[str]) -> None:
    """Raise UserError where `option` chooses a model by authors whose evaluation loss was released."""
    if ledger.releases and option is not None:
        raise UserError(
            f"{option}: it lets held-out authors choose what is saved or trained, but their evaluation loss was released from "
            f"--output_dir {ledger.path.parent}. Leave it out, or choose another --output_dir"
        )


def check_ledger_covers_checkpoint(checkpoint: Path, ledger: PrivacyLedger, is_main_process: bool = True) -> None:
    """Raise UserError unless `ledger` holds the steps behind `checkpoint`, and its weights are those that were saved.

    Args:
        is_main_process: only this process hashes weights.
    """
    if checkpoint.resolve().parent != ledger.path.resolve().parent or not ledger.path.exists():
        raise UserError(
            f"--resume_from_checkpoint {checkpoint}: its privacy cost is not in {ledger.path}. Resume in the --output_dir that "
            "the checkpoint was saved in, with its ledger"
        )
    report = ledger.check_report(checkpoint / REPORT_NAME)
    if report["disable_dp"]:
        raise UserError(
            f"--resume_from_checkpoint {checkpoint}: it was trained with --disable_dp. Start a new run, or add --disable_dp"
        )
    if is_main_process:
        check_weights(checkpoint, report, base=False)  # the run compares its base itself, wherever the base is stored now
        known = read_weights_marker(checkpoint).get("sha256") or {}
        for name in {*known, *([OPTIMIZER_NAME] if (checkpoint / OPTIMIZER_NAME).exists() else [])}:
            if sha256_of(checkpoint / name) != known.get(name):
                raise UserError(f"{checkpoint / name}: its SHA-256 is not the one in {COMPLETE_MARKER}. Restore the file")
