"""Fine-tune a GPT-2 style language model with author-level differential privacy.

The demo, without a hub, in minutes on a laptop:

    python fine-tune-dp.py --model_name demo/model --train_file demo/comments.jsonl --sequence_len 64 \
        --output_dir scratch --target_epsilon 8 --per_sample_max_grad_norm 1.0 --per_device_train_batch_size 64 \
        --gradient_accumulation_steps 4 --num_train_epochs 2 --learning_rate 1e-2 --noise_bands auto

Full fine-tuning on Reddit (500,000 comments of 304,279 authors), one process per GPU:

    python -m torch.distributed.run --nproc_per_node 16 fine-tune-dp.py --output_dir scratch --model_name gpt2 \
        --sequence_len 128 --per_device_train_batch_size 32 --gradient_accumulation_steps 2 \
        --evaluation_strategy steps --eval_steps 45 --log_level info --per_device_eval_batch_size 64 \
        --eval_accumulation_steps 1 --seed 42 --target_epsilon 8 --per_sample_max_grad_norm 1.0 \
        --prediction_loss_only --weight_decay 0.01 --remove_unused_columns False --num_train_epochs 3 \
        --logging_steps 5 --max_grad_norm 0 --lr_scheduler_type constant --learning_rate 1e-4 \
        --disable_tqdm True --label_names labels --dataloader_num_workers 2

LoRA: the same in another --output_dir, with

        --per_device_train_batch_size 64 --gradient_accumulation_steps 1 --learning_rate 3e-4 \
        --enable_lora --lora_dim 4 --lora_alpha 32 --lora_dropout 0.0

Options may come from a YAML file; others override it: fine-tune-dp.py --config configs/reddit-lora.yaml --seed 7

`data_utils.py` turns a data set into samples of authors, `dp_utils.py` holds the Trainer, `author_dp/` the library behind both.
"""

import os
import sys

from author_dp import startup  # first: imports are a fifth faster, and Ctrl-C ends them
from author_dp.option_names import exit_if_options_missing

if __name__ == "__main__":
    exit_if_options_missing("fine-tune-dp.py", sys.argv[1:], rank=int(os.environ.get("RANK", 0)))  # before seconds of imports

# ruff: isort: split
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

import numpy as np
import torch
import transformers
from datasets import Dataset
from transformers import set_seed
from transformers.trainer_utils import SchedulerType
from transformers.utils import logging

from author_dp import cli
from author_dp.accounting.output_dir import check_output_is_not_model
from author_dp.data.columns import get_column
from author_dp.data.splits import author_hashes
from author_dp.data.storage import cleanup_temp_dirs
from author_dp.errors import UserError
from author_dp.guards.canaries import AuditArguments, Canaries, make_canaries
from author_dp.guards.launchers import check_launcher_variables
from author_dp.guards.options import validate_options
from author_dp.guards.text_canaries import TextCanaries
from author_dp.logs import configure_logging, get_logger
from author_dp.mechanism.sampling import append_canary_sampling_hashes
from author_dp.models.fusion import fuse_operations
from author_dp.models.loading import check_sequence_len, load_model
from author_dp.models.lora import LoraArguments
from author_dp.models.sizes import weight_bytes
from author_dp.outputs.report import RunStatistics, evaluate_and_sample, report_result
from author_dp.outputs.samples import TextSamples
from author_dp.training.dry_run import DryRun, shorten_for_dry_run
from author_dp.training.interruption import finished_training
from author_dp.training.loss_release import LossReleaseArguments, check_loss_release, release_eval_loss
from author_dp.training.resuming import find_checkpoint, resumable_options
from author_dp.validation import option
from data_utils import AuthorDataset, DataArguments, collate, group_by_author, load_author_datasets
from dp_utils import DPTrainer, PrivacyArguments

startup.finish_startup()

logger = get_logger(__name__)


@dataclass
class ModelArguments:
    """What to fine-tune."""

    model_name: str = option("gpt2", "Hub name or local folder of a causal language model.")
    dry_run: bool = option(
        False, "Run two steps, evaluate after each, and estimate the run's time and memory. Needs an --output_dir of its own."
    )


@dataclass
class TrainingArguments(transformers.TrainingArguments):
    """Hugging Face's, with the defaults of this script."""

    max_grad_norm: float = option(0.0, "Must be 0 under DP: --per_sample_max_grad_norm clips each author's gradient instead.")
    learning_rate: float = option(
        1e-3, "Higher than in ordinary fine-tuning: steps are few, and the noise averages out across them."
    )
    lr_scheduler_type: SchedulerType | str = option(
        "constant_with_warmup", "Shape of the learning rate; there is no warmup by default."
    )
    log_level: str = option("info", "Log level of the main process.", [*logging.get_log_levels_dict(), "passive"])
    remove_unused_columns: bool = option(False, "Has no effect: samples contain only the columns that are used.")
    evaluation_strategy: Optional[str] = option(None, "Older name of --eval_strategy.")
    fsdp: Optional[str] = option(
        None, "full_shard: split weights, clipped sums, noise and optimizer state evenly across the processes."
    )

    def __post_init__(self):
        if self.fsdp and {"full_shard"} != {*self.fsdp.split()} - {"auto_wrap"}:
            raise UserError(f"--fsdp {self.fsdp} does not work here: give full_shard, or leave it out")
        if self.fsdp and self.fsdp_config:
            raise UserError("--fsdp_config: not supported with --fsdp full_shard. Leave it out")
        check_launcher_variables(self.bf16)  # before Hugging Face's code follows them
        # The Trainer must not see it: accelerate would shard gradients that are not per author.
        self.full_shard, self.fsdp = bool(self.fsdp), None
        if self.evaluation_strategy is not None:
            self.eval_strategy = self.evaluation_strategy
            self.evaluation_strategy = None
        if self.resume_from_checkpoint in ("True", "true"):
            self.resume_from_checkpoint = True
        # Otherwise the Trainer takes processes on CPUs for independent runs, and refuses --bf16.
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        super().__post_init__()


# Option groups, in the order of --help and docs/options.md.
GROUPS = (ModelArguments, LoraArguments, DataArguments, PrivacyArguments, AuditArguments, LossReleaseArguments, TrainingArguments)


def parse_arguments() -> tuple:
    """Return one object for each of GROUPS; refuse what would break the guarantee before anything is loaded."""
    groups = cli.parse_options(GROUPS)
    model_args, lora_args, data_args, privacy_args, _, release_args, training_args = groups
    if model_args.dry_run:
        shorten_for_dry_run(training_args, data_args.has_evaluation)
    if training_args.eval_strategy != "no" and not data_args.has_evaluation:
        raise UserError("--eval_strategy needs evaluation data: give --validation_file or an --eval_fraction above 0")
    validate_options(
        training_args, privacy_args, full_shard=training_args.full_shard, shared_authors=data_args.allow_shared_authors,
        base_precision_flag=lora_args.base_precision_flag(),
    )  # fmt: skip
    check_output_is_not_model(Path(training_args.output_dir), model_args.model_name)
    _, ledger = find_checkpoint(training_args, privacy_args, lora_args.enable_lora, resumable_options(*groups))
    check_loss_release(release_args, training_args, privacy_args.disable_dp, data_args.has_evaluation, ledger)
    return groups


def group_datasets(
    train: Dataset, evaluation: Optional[Dataset], canaries: Canaries, data_args: DataArguments, needs_hashes: bool
) -> tuple[AuthorDataset, Optional[AuthorDataset]]:
    """Group samples by author, and add text canaries to the training authors.

    Args:
        needs_hashes: whether author hashes are needed: for noise bands, for balls-in-bins sampling, or to resume a run with them.
    """
    authors = get_column(train, data_args.author_column)
    grouped = (train, *group_by_author(authors))
    hashes = author_hashes(authors) if needs_hashes else None
    if isinstance(canaries, TextCanaries):
        grouped = canaries.join(*grouped)
        hashes = append_canary_sampling_hashes(hashes, len(grouped[1]) - 1 - len(hashes)) if hashes is not None else None
    if evaluation is None:
        return AuthorDataset(*grouped, hashes), None
    eval_dataset = AuthorDataset(evaluation, *group_by_author(get_column(evaluation, data_args.author_column)))
    return AuthorDataset(*grouped, hashes), eval_dataset


def main() -> None:
    model_args, lora_args, data_args, privacy_args, audit_args, release_args, training_args = parse_arguments()
    configure_logging(training_args)
    set_seed(training_args.seed)  # the data split and LoRA's initialization; never noise, sampling or dropout
    resumes, releases_loss = bool(training_args.resume_from_checkpoint), release_args.release_eval_epsilon is not None

    model, tokenizer = load_model(
        model_args.model_name, lora_args.to_options(), lora_args.base_precision, training_args.device, training_args.bf16
    )
    fuse_operations(model)
    logging.set_verbosity(training_args.get_process_log_level())  # set after loading, which would otherwise log a lot
    if flag := lora_args.base_precision_flag():
        logger.info(f"{flag}: all weights, adapters included, take {weight_bytes(model) / 2**20:,.1f} MiB.")
    check_sequence_len(model, data_args.sequence_len)

    train, evaluation = load_author_datasets(data_args, training_args, tokenizer, releases_loss)
    canaries = make_canaries(
        audit_args.audit_canaries, audit_args.audit_kind, samples=privacy_args.samples_per_author, tokens=data_args.sequence_len,
        vocab_size=len(model.get_input_embeddings().weight), output_dir=training_args.output_dir, resume=resumes,
    )  # fmt: skip
    needs_hashes = resumes or privacy_args.noise_bands is not None or privacy_args.sampling is not None
    train_dataset, eval_dataset = group_datasets(train, evaluation, canaries, data_args, needs_hashes)

    trainer = DPTrainer(
        model,
        training_args,
        privacy_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        data_collator=collate,
        sequence_len=data_args.sequence_len,
        canaries=canaries,
        full_shard=training_args.full_shard,
        model_name=model_args.model_name,
        data_summary=data_args.summary(tokenizer),
        split_id=data_args.split_id(training_args.seed),
        shared_authors=data_args.allow_shared_authors,
        program_args=(model_args, lora_args, data_args, audit_args),
        processing_class=tokenizer,
    )
    writes_texts = trainer.is_world_process_zero() and not training_args.full_shard and not model_args.dry_run
    texts = TextSamples(tokenizer, eval_dataset, data_args.sequence_len, data_args.has_loss_mask) if writes_texts else None
    statistics = RunStatistics(trainer.norms, np.diff(train_dataset.offsets), texts, cli.command_line())
    trainer.add_callback(statistics)
    if model_args.dry_run:
        trainer.add_callback(DryRun(trainer))
    trainer.log_summary()

    if not resumes:
        evaluate_and_sample(trainer, statistics, "before")
    trainer.train()
    with finished_training(trainer):  # saves the model first
        evaluate_and_sample(trainer, statistics, "after")
        released_loss = None
        if releases_loss and not model_args.dry_run:  # a dry run's model is discarded
            limited = data_args.max_eval_samples is not None
            released_loss = release_eval_loss(
                trainer, release_args.release_eval_epsilon, release_args.release_eval_range, limited
            )
        report_result(trainer, statistics, released_loss)


if __name__ == "__main__":
    cli.run(main, "fine-tune-dp.py", cleanup_temp_dirs)
