"""Fine-tune a GPT-2 style language model with author-level differential privacy.

The demo, without a hub, in minutes on a laptop:

    python fine-tune-dp.py --model_name demo/model --train_file demo/comments.jsonl --sequence_len 64 \
        --output_dir scratch --target_epsilon 8 --per_sample_max_grad_norm 1.0

Full fine-tuning on Reddit (500,000 comments of 304,279 authors), one process per GPU:

    python -m torch.distributed.run --nproc_per_node 16 fine-tune-dp.py --output_dir scratch --model_name gpt2 \
        --sequence_len 128 --per_device_train_batch_size 32 --gradient_accumulation_steps 2 \
        --evaluation_strategy steps --eval_steps 45 --log_level info --per_device_eval_batch_size 64 \
        --eval_accumulation_steps 1 --seed 42 --target_epsilon 8 --per_sample_max_grad_norm 1.0 \
        --prediction_loss_only --weight_decay 0.01 --remove_unused_columns False --num_train_epochs 3 \
        --logging_steps 5 --max_grad_norm 0 --lr_scheduler_type constant --learning_rate 1e-4 \
        --disable_tqdm True --label_names labels --dataloader_num_workers 2

LoRA: the same with

        --per_device_train_batch_size 64 --gradient_accumulation_steps 1 --learning_rate 3e-4 \
        --enable_lora --lora_dim 4 --lora_alpha 32 --lora_dropout 0.0

All options may stand in a YAML file, and others after it: fine-tune-dp.py --config configs/reddit-lora.yaml --seed 7

`data_utils.py` makes samples and authors of a data set; `dp_utils.py` holds the Trainer; `author_dp/` what it does in a step.
"""

import gc
import signal

import author_dp  # noqa: F401  before all else: it quiets a library

# Until all is imported: none of it is garbage, and looking for some takes a fifth of the time; and a Ctrl-C ends it at once, as
# Python's exception would have a traceback, or be swallowed by some library.
gc.disable()
if (on_interrupt := signal.getsignal(signal.SIGINT)) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
import json
import os
import sys
import time
import warnings
from dataclasses import dataclass, field
from logging import LogRecord
from pathlib import Path
from typing import Any, NoReturn, Optional

import datasets
import numpy as np
import torch
import transformers
import yaml
from transformers import (
    HfArgumentParser,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)
from transformers.trainer_utils import SchedulerType
from transformers.utils import logging

from author_dp.accounting.accountant import format_guarantee
from author_dp.data.authors import get_column
from author_dp.data.chat import resolve_bos_token
from author_dp.data.splits import author_hashes, format_data_summary
from author_dp.data.storage import cleanup_temp_dirs
from author_dp.errors import MechanismError, PeerLostError, SignalError, UserError, to_user_error
from author_dp.guards.gradient_canaries import GradientCanaries
from author_dp.guards.options import check_fsdp, check_options, check_shared_authors, metric_driven_option
from author_dp.guards.text_canaries import AuditArguments, TextCanaries, load_or_create_key
from author_dp.guards.text_canaries import format_audit as audit_in_words
from author_dp.hub_access import hub_error, hub_is_reachable
from author_dp.mechanism.sampling import append_canary_hashes
from author_dp.models.loading import (
    adapter_base_model,
    first_line,
    load_adapter,
    load_base,
    load_tokenizer,
    reload_adapter_weights,
    to_absolute,
)
from author_dp.models.lora import add_lora
from author_dp.models.quantization import cast_parameters, check_quantized_frozen, nf4_config, quantized_layers, weight_bytes
from author_dp.outputs.report import RunStatistics, write_report
from author_dp.outputs.samples import TextSamples
from author_dp.training.checkpointing import find_checkpoint
from author_dp.training.dry_run import DryRun
from author_dp.training.public_loss import ReleaseArguments, check_release, release_eval_loss
from author_dp.training.public_loss import format_release as released_in_words
from data_utils import (
    AuthorDataset,
    DataArguments,
    collate,
    group_by_author,
    load_author_datasets,
)
from dp_utils import DPTrainer, PrivacyArguments

signal.signal(signal.SIGINT, on_interrupt)
gc.freeze()
gc.enable()

logger = logging.get_logger(f"transformers.{__name__}")

# What transformers says without need: padding is on the right, where causal attention does not look; and GPT-2's class name,
# which nobody "set in the config", makes it take the default loss.
warnings.filterwarnings("ignore", message=r"`\w*gradient_checkpointing\w*` is deprecated")  # by peft's calls of transformers
NEEDLESS_LINES = (
    "We strongly recommend passing in an `attention_mask`", "`loss_type=None` was set in the config",
    "loading configuration file", "Model config ", "Generate config ",  # pages of them, at each save
    "\n\nTraining completed. Do not forget to share",
)  # fmt: skip


@dataclass
class ModelArguments:
    """What to fine-tune."""

    model_name: str = field(default="gpt2", metadata={"help": "Hub name or local folder of a causal language model."})
    dry_run: bool = field(
        default=False,
        metadata={"help": "Two steps of the run that is asked for, with evaluation at each; says how long it will take."},
    )


@dataclass
class LoraArguments:
    """Train low-rank adapters instead of all weights (Hu et al. 2021, arXiv 2106.09685)."""

    enable_lora: bool = field(default=False, metadata={"help": "Train LoRA adapters; the base model stays frozen."})
    lora_dim: int = field(default=8, metadata={"help": "Rank of the adapters."})
    lora_alpha: int = field(default=8, metadata={"help": "The adapters' output is scaled by lora_alpha / lora_dim."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout before the adapters."})
    lora_target_modules: Optional[list[str]] = field(
        default=None,
        metadata={
            "help": "Names of the layers to adapt, or all-linear: all but the head. Default: peft's choice for the model, or "
            "all-linear where peft has none."
        },
    )
    lora_use_dora: bool = field(default=False, metadata={"help": "Train magnitudes apart from directions (DoRA)."})
    lora_use_rslora: bool = field(
        default=False, metadata={"help": "Scale by lora_alpha / sqrt(lora_dim) instead: rank-stabilized LoRA."}
    )
    lora_bias: str = field(
        default="none",
        metadata={"help": "Biases to train too: all, or those of adapted layers.", "choices": ["none", "all", "lora_only"]},
    )
    lora_modules_to_save: Optional[list[str]] = field(
        default=None, metadata={"help": "Names of layers to train in full beside the adapters, like lm_head."}
    )
    base_dtype: Optional[str] = field(
        default=None,
        metadata={
            "help": "How the frozen base under LoRA is kept: float32 (the default), or bfloat16 for half of the memory.",
            "choices": ["float32", "bfloat16"],
        },
    )
    load_in_4bit: bool = field(
        default=False,
        metadata={"help": "Keep the frozen base's linear layers under LoRA in 4 bits (NF4); needs bitsandbytes."},
    )

    def __post_init__(self):
        if self.load_in_4bit and self.base_dtype is not None:
            raise UserError(
                f"--load_in_4bit and --base_dtype {self.base_dtype} contradict each other: leave one of them out (in 4 bits, "
                "embeddings and the head are in bfloat16)"
            )
        fewer = self.fewer_bits()
        if fewer and not self.enable_lora:
            raise UserError(f"{fewer} is for weights that are not trained: add --enable_lora, or leave it out")
        if self.load_in_4bit and self.lora_bias != "none":
            raise UserError(
                f"--lora_bias {self.lora_bias} would train biases of layers that --load_in_4bit keeps in 4 bits: leave it out, "
                "or use --base_dtype bfloat16"
            )
        for name in ("lora_dim", "lora_alpha"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} {getattr(self, name)} must be at least 1")
        if not 0 <= self.lora_dropout < 1:
            raise UserError(f"--lora_dropout {self.lora_dropout} must be at least 0 and below 1")

    def fewer_bits(self) -> Optional[str]:
        """Return the option by which the base is in fewer bits than float32's, None without one."""
        return "--load_in_4bit" if self.load_in_4bit else "--base_dtype bfloat16" if self.base_dtype == "bfloat16" else None


@dataclass
class TrainingArguments(transformers.TrainingArguments):
    """Hugging Face's, with the defaults of this script."""

    max_grad_norm: float = field(
        default=0.0, metadata={"help": "Must be 0 under DP: --per_sample_max_grad_norm clips each author's gradient instead."}
    )
    learning_rate: float = field(
        default=1e-3, metadata={"help": "Higher than for ordinary fine-tuning: the steps are few, and noise is averaged out."}
    )
    lr_scheduler_type: SchedulerType | str = field(
        default="constant_with_warmup", metadata={"help": "Shape of the learning rate; warmup is of 0 steps by default."}
    )
    log_level: str = field(
        default="info",
        metadata={"help": "Log level of the main process.", "choices": [*logging.get_log_levels_dict(), "passive"]},
    )
    remove_unused_columns: bool = field(default=False, metadata={"help": "Of no effect: the samples hold what is used."})
    evaluation_strategy: Optional[str] = field(default=None, metadata={"help": "Older name of --eval_strategy."})
    fsdp: Optional[str] = field(
        default=None,
        metadata={
            "help": "full_shard: share weights, clipped sums, noise and optimizer state among the processes, each 1/W of them."
        },
    )

    def __post_init__(self):
        if not set((self.fsdp or "").split()) <= {"full_shard", "auto_wrap"}:
            raise UserError(f"--fsdp {self.fsdp} does not work here: give full_shard, or leave it out")
        if self.fsdp and (self.fsdp_config or os.environ.get("ACCELERATE_USE_FSDP")):
            raise UserError("--fsdp_config, or accelerate's own, has no part in --fsdp full_shard here: leave it out")
        # The Trainer must not see it: accelerate would share gradients that are not per author.
        self.full_shard, self.fsdp = bool(self.fsdp), None
        if self.evaluation_strategy is not None:
            self.eval_strategy = self.evaluation_strategy
            self.evaluation_strategy = None
        if self.resume_from_checkpoint in ("True", "true"):
            self.resume_from_checkpoint = True
        # Without it the Trainer takes processes on CPUs for runs that know nothing of each other, and refuses --bf16.
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        super().__post_init__()


class ArgumentParser(HfArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Say what is wrong in a line, without the pages of usage; --help shows these."""
        raise UserError(message)


# Of options, as --help and docs/options.md show them.
GROUPS = (ModelArguments, LoraArguments, DataArguments, PrivacyArguments, AuditArguments, ReleaseArguments, TrainingArguments)


def parse_arguments() -> tuple:
    """Return the options, one object for each of GROUPS.

    Raises:
        UserError: for options that are unknown, or cannot be used.
    """
    arguments = expand_config(sys.argv[1:])
    parser = ArgumentParser(GROUPS)
    _, unknown = parser.parse_known_args(arguments)
    if unknown:
        raise UserError(f"unknown option {' '.join(unknown)}; --help lists all options")
    try:
        groups = parser.parse_args_into_dataclasses(arguments)
    except UserError:
        raise
    except (ValueError, TypeError, ImportError, OverflowError, OSError) as error:  # what Hugging Face's own checks raise
        raise UserError(blame(str(error).strip().splitlines()[0], arguments)) from error
    model_args, lora_args, data_args, privacy_args, _, release_args, training_args = groups
    has_evaluation = data_args.validation_file is not None or data_args.eval_fraction > 0
    if model_args.dry_run:
        release_args.release_eval_epsilon = None  # of a model that nobody wants
        training_args.logging_steps = training_args.eval_steps = 1
        training_args.logging_strategy, training_args.eval_strategy = "steps", "steps" if has_evaluation else "no"
    check_options(training_args, privacy_args)
    check_shared_authors(data_args.allow_shared_authors, metric_driven_option(training_args), privacy_args)
    if training_args.full_shard:
        if lora_args.fewer_bits():
            raise UserError(f"--fsdp shares weights in float32 only: leave out {lora_args.fewer_bits()}, or --fsdp")
        check_fsdp(training_args, privacy_args)
    check_release(release_args, training_args, privacy_args.disable_dp, has_evaluation)
    # A folder that cannot be used is refused before the data are read.
    find_checkpoint(training_args, privacy_args, lora_args.enable_lora)
    return groups


def expand_config(arguments: list[str]) -> list[str]:
    """Replace `--config FILE` by the options in that YAML file; options on the command line come after, and prevail."""
    if "--config" not in arguments:
        return arguments
    place = arguments.index("--config")
    path, rest = Path("".join(arguments[place + 1 : place + 2])), arguments[:place] + arguments[place + 2 :]
    try:
        options = yaml.compose(path.read_text())
        expanded = [] if options is None else [word for name, value in options.value for word in as_words(name.value, value)]
    except (OSError, ValueError, TypeError, AttributeError, RecursionError, yaml.YAMLError) as error:
        reason = f"it must hold options, a line each, like 'target_epsilon: 8' ({error})"
        raise UserError(f"--config {path} cannot be read: {reason}") from error
    return expanded + rest


def as_words(name: str, value: yaml.Node) -> list[str]:
    """Return an option of the command line, its value as it is written ("no", "042"); none for null."""
    if isinstance(value, yaml.MappingNode):  # Hugging Face wants JSON, with numbers
        return [f"--{name}", json.dumps(yaml.safe_load(yaml.serialize(value)), default=str)]
    if isinstance(value, yaml.SequenceNode):
        return [f"--{name}", *(str(item.value) for item in value.value)]
    is_null = value.style is None and value.value.lower() in ("", "~", "null")
    return [] if is_null else [f"--{name}", value.value]


def blame(message: str, arguments: list[str]) -> str:
    """Name the options that an error may be about, where it does not say: those whose values it quotes, or all."""
    given = [(option, value) for option, value in zip(arguments, [*arguments[1:], ""]) if option.startswith("--")]
    if any(option in message for option, _ in given):
        return message
    quoted = [option for option, value in given if value and (value in message or value.startswith("{"))]
    return f"{', '.join(quoted or [option for option, _ in given])}: {message}"


def load_model(
    model_args: ModelArguments, lora_args: LoraArguments, training_args: TrainingArguments
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load model and tokenizer, and add LoRA if asked for; all that is trained is in float32 (noise would be rounded in less)."""
    name = to_absolute(model_args.model_name)  # for an adapter to find its base from wherever it is loaded
    adapter = adapter_base_model(name)
    if adapter is not None and not lora_args.enable_lora:
        raise UserError(
            f"--model_name {name} holds a LoRA adapter: add --enable_lora to go on training it, or merge it into its base"
        )
    base = adapter or name
    local_only = not os.path.isdir(base) and not hub_is_reachable()
    compute = torch.bfloat16 if training_args.bf16 else torch.float32  # in which what is in 4 bits is multiplied
    bits: dict[str, Any] = {"dtype": torch.bfloat16} if lora_args.fewer_bits() else {}
    if lora_args.load_in_4bit:
        bits["quantization_config"] = nf4_config(compute)
        bits["device_map"] = {"": training_args.device}
    try:
        model = load_base(base, local_files_only=local_only, **bits)
        tokenizer = load_tokenizer(name, local_files_only=local_only)
        if adapter is not None:
            logger.info(f"Going on with the LoRA adapter in {name}, as it was made: --lora_dim and the like have no effect.")
            model = load_adapter(model, name)
    except UserError:
        raise
    except Exception as error:  # transformers, safetensors, peft and each quantization library raise their own
        if local_only:
            raise hub_error("--model_name", base) from error
        if "Unrecognized configuration class" in str(error):  # T5, or a model of pictures
            raise UserError(f"--model_name {base} is no causal language model: choose a decoder, like GPT-2 or Llama") from error
        raise UserError(f"--model_name {base} cannot be loaded: {first_line(error)}") from error
    vocabulary = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > vocabulary:
        raise UserError(
            f"--model_name {name}: its tokenizer has {len(tokenizer)} tokens, its model {vocabulary} embeddings; resize the "
            "embeddings, or give the tokenizer that belongs to the model"
        )
    if lora_args.enable_lora and adapter is None:
        model = adapt(model, lora_args, name)
    if lora_args.load_in_4bit and not quantized_layers(model):
        raise UserError(f"--load_in_4bit finds no plain linear layer in {base}: use --base_dtype bfloat16")
    if lora_args.fewer_bits() or quantized_layers(model):  # a folder may hold 4 bits, and a type to multiply in, of its own
        model = cast_parameters(model, compute)
        if adapter is not None:
            reload_adapter_weights(model, name)
    return model, tokenizer


def adapt(model: PreTrainedModel, lora_args: LoraArguments, name: str) -> PreTrainedModel:
    """Return the model, called `name`, with the LoRA adapters that are asked for."""
    options = {option.removeprefix("lora_"): value for option, value in vars(lora_args).items() if option.startswith("lora_")}
    targets, options["r"], options["lora_alpha"] = options.pop("target_modules"), options.pop("dim"), options.pop("alpha")
    options["lora_dropout"] = options.pop("dropout")
    check_quantized_frozen(model, lora_args.lora_modules_to_save or [])
    try:
        return add_lora(model, targets, **options)
    except (ValueError, TypeError, NotImplementedError) as error:
        raise UserError(f"--lora_target_modules, or another --lora option, does not fit {name}: {first_line(error)}") from error


def losses_in_words(metrics: dict[str, float]) -> str:
    return (
        f"{metrics['eval_loss']:.2f}\n"
        f"  perplexity {metrics['eval_perplexity']:,.1f}; mean over authors, as in training: {metrics['eval_author_loss']:.2f}"
    )


def look(trainer: DPTrainer, when: str, specimens: Optional[TextSamples]) -> dict[str, float]:
    """Evaluate, and let the model write for the report; return the metrics, none where nobody is held out."""
    metrics = trainer.evaluate() if trainer.eval_dataset is not None else {}
    if metrics:  # in words, since the Trainer's progress bar shows log lines during training only
        logger.info(f"Evaluation loss {when} training: {losses_in_words(metrics)}")
    if specimens is not None:
        specimens.write(trainer.model, when)
    return metrics


def is_needed(record: LogRecord) -> bool:
    """Let a log record through unless it is one of NEEDLESS_LINES."""
    return not record.getMessage().startswith(NEEDLESS_LINES)


def keep_quiet(training_args: TrainingArguments) -> None:
    """Show progress bars where they are wanted, on the first process, and no NEEDLESS_LINES."""
    if training_args.disable_tqdm or training_args.process_index > 0:
        datasets.disable_progress_bars()
        logging.disable_progress_bar()
    for name in ("modeling_utils", "configuration_utils", "generation.configuration_utils", "trainer"):
        logging.get_logger(f"transformers.{name}").addFilter(is_needed)


def make_audit(
    args: AuditArguments, most_samples: int, most_tokens: int, vocabulary: int, folder: str, go_on: bool
) -> TextCanaries | GradientCanaries | None:
    """Return the canaries that are asked for, as authors or as gradients.

    Args:
        most_samples, most_tokens: of a canary: k and --sequence_len.
        folder, go_on: where their key is kept, and whether it is there already.
    """
    if not args.audit_canaries:
        return None
    key = load_or_create_key(folder, go_on=go_on)
    if args.audit_kind == "gradient":
        return GradientCanaries(args.audit_canaries, key)
    return TextCanaries(args.audit_canaries, most_samples, most_tokens, vocabulary, key)


def save_all(trainer: DPTrainer, statistics: RunStatistics, specimens: TextSamples, metrics: dict[str, float], loss: str) -> None:
    """Save the model; on the first process write what stands beside it, and say what was promised, as the last line.

    Args:
        metrics: of the last evaluation.
        loss: the phrase about it in that line.
    """
    trainer.save_model()
    if trainer.is_world_process_zero():
        folder = trainer.args.output_dir
        trainer.create_model_card()
        statistics.add(folder, evaluation={"after": metrics}, specimens=specimens.found)
        write_report(Path(folder))
        report = trainer.privacy_report()
        if trainer.audit is not None:
            loss += f", audit: epsilon {audit_in_words(trainer.audit)}"
        print(f"{format_guarantee(report['epsilon'], report['delta'])}{loss}, saved to {folder}")


def main() -> None:
    model_args, lora_args, data_args, privacy_args, audit_args, release_args, training_args = parse_arguments()
    keep_quiet(training_args)
    set_seed(training_args.seed)  # the data split and LoRA's initialization; never noise or sampling

    model, tokenizer = load_model(model_args, lora_args, training_args)
    logging.set_verbosity(training_args.get_process_log_level())
    if lora_args.fewer_bits():
        logger.info(f"{lora_args.fewer_bits()}: all weights, adapters too, take {weight_bytes(model) / 2**20:,.1f} MiB.")
    longest = getattr(model.config, "max_position_embeddings", data_args.sequence_len)
    if data_args.sequence_len > longest:
        raise UserError(f"--sequence_len {data_args.sequence_len} is more than the model's {longest} positions: lower it")

    released = release_args.release_eval_epsilon is not None
    train, evaluation = load_author_datasets(data_args, training_args, tokenizer, released)
    grouped = (train, *group_by_author(get_column(train, data_args.author_column)))
    held_out = None
    if evaluation is not None:
        held_out = AuthorDataset(evaluation, *group_by_author(get_column(evaluation, data_args.author_column)))
    elif training_args.eval_strategy != "no":
        raise UserError("--eval_strategy needs evaluation data: give --validation_file or an --eval_fraction above 0")
    hashes = None
    if privacy_args.noise_bands or training_args.resume_from_checkpoint:  # they deal authors to groups
        hashes = author_hashes(get_column(train, data_args.author_column))
    audit = make_audit(
        audit_args, privacy_args.samples_per_author, data_args.sequence_len, len(model.get_input_embeddings().weight),
        training_args.output_dir, go_on=bool(training_args.resume_from_checkpoint),
    )  # fmt: skip
    if isinstance(audit, TextCanaries):
        grouped = audit.join(*grouped)
        hashes = append_canary_hashes(hashes, len(grouped[1]) - 1 - len(hashes)) if hashes is not None else None

    trainer = DPTrainer(
        model,
        training_args,
        privacy_args,
        train_dataset=AuthorDataset(*grouped, hashes),
        eval_dataset=held_out,
        data_collator=collate,
        sequence_len=data_args.sequence_len,
        canaries=audit if isinstance(audit, GradientCanaries) else None,
        full_shard=training_args.full_shard,
        model_name=model_args.model_name,
        processing_class=tokenizer,
    )
    trainer.shared_authors = data_args.allow_shared_authors
    trainer.data = data_args.summary(tokenizer)
    trainer.budget.split = data_args.split_id(training_args.seed)
    trainer.add_callback(statistics := RunStatistics(trainer.norms, np.diff(grouped[1])))
    if model_args.dry_run:
        trainer.add_callback(dry_run := DryRun())
    logger.info("\n".join([trainer.summary(), *format_data_summary(trainer.data)]))
    for warning in (trainer.budget.plan.delta_warning(), trainer.budget.plan.tuning_hint()):
        if warning and not privacy_args.disable_dp and trainer.is_world_process_zero():
            logger.warning(warning)
    start = resolve_bos_token(tokenizer, data_args.prepend_bos)
    specimens = TextSamples(
        tokenizer, held_out, [] if start is None else [start], data_args.sequence_len, answers=data_args.has_loss_mask
    )
    writes = trainer.is_world_process_zero() and not training_args.full_shard and not model_args.dry_run
    if not training_args.resume_from_checkpoint:
        before = look(trainer, "before", specimens if writes else None)
        statistics.before = {"evaluation": {"before": before}, "specimens": specimens.found}
    if isinstance(audit, TextCanaries):
        audit.start(trainer)
    trainer.train()
    if audit is not None and trainer.ended is None:  # or there is nothing to see, and what it saw itself stays
        trainer.audit = audit.finish(trainer)
    metrics = look(trainer, "after", specimens if writes else None)
    if model_args.dry_run:
        logger.info(dry_run.in_words(trainer, metrics.get("eval_runtime", 0.0)))
    loss = f", eval loss {metrics['eval_loss']:.2f}" if metrics else ""
    if released:
        limited = data_args.max_eval_samples is not None
        release = release_eval_loss(trainer, release_args.release_eval_epsilon, release_args.release_eval_range, limited)
        loss = f", {released_in_words(release)}, both public"
    save_all(trainer, statistics, specimens, metrics, loss)
    if torch.distributed.is_initialized():  # a process that just ends may abort: its gloo threads are still there
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def complain(error: UserError) -> NoReturn:
    """Say on stderr what the user can mend, once, and exit with status 2."""
    if int(os.environ.get("RANK", 0)) > 0 and not isinstance(error, PeerLostError):
        time.sleep(10)  # the first process says it, and its exit ends this one; if it has no complaint, go on and say it
    print(f"fine-tune-dp.py: error: {error}", file=sys.stderr)
    end(2)


def denounce(error: MechanismError) -> NoReturn:
    """Say on stderr that the run is not what it promised to be, once, and exit with status 3."""
    if int(os.environ.get("RANK", 0)) > 0:
        time.sleep(10)  # the first process says it, and writes it down
    print(
        f"fine-tune-dp.py: the mechanism is not what the ledger says: {error}. Nothing more was saved, and what this run saved "
        "before has no guarantee, as its privacy.json now say: do not publish it",
        file=sys.stderr,
    )
    end(3)


def end(status: int) -> NoReturn:
    """Exit at once where there are several processes: gloo's threads may abort one that ends in the usual way."""
    sys.stdout.flush()
    sys.stderr.flush()
    cleanup_temp_dirs()
    if torch.distributed.is_initialized():
        os._exit(status)
    sys.exit(status)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        complain(error)
    except MechanismError as error:
        denounce(error)
    except SignalError as interruption:
        if int(os.environ.get("RANK", 0)) == 0:
            print("fine-tune-dp.py: interrupted; go on with --resume_from_checkpoint True", file=sys.stderr)
        end(128 + interruption.number)
    except KeyboardInterrupt:
        print(
            "fine-tune-dp.py: interrupted; no checkpoint was saved just now, and no step that was taken is forgotten",
            file=sys.stderr,
        )
        end(130)
    except Exception as error:
        if hasattr(signal, "SIGCHLD"):  # or torch's handler would raise in here, of a worker whose death is what is to be told
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        if (mistake := to_user_error(error)) is None:
            raise
        complain(mistake)
