"""Try, before the first step costs privacy, everything that a run needs after its last step.

`rehearse` saves the model to a temporary folder of the same file system, loads it from there as its user will, evaluates one
batch and generates two tokens. A large model is not saved: its size is compared with the free room. What fails ends the run with
a line that names the cause, and nothing is spent. The model and all random generators are left as they were.

Example:

    >>> rehearse(trainer)
    >>> trainer.train()
"""

import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Optional

import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase
from transformers.trainer_utils import align_special_tokens
from transformers.utils import logging

from author_dp.accounting.output_dir import TRIAL_PREFIX, check_output_target, remove_output_trials
from author_dp.errors import UserError, first_line, to_user_error
from author_dp.logs import get_logger
from author_dp.mechanism.fsdp import full_state_dict
from author_dp.models.modes import deterministic_eval
from author_dp.models.quantization import computes_in_float32
from author_dp.models.sizes import result_bytes, weight_bytes
from author_dp.outputs.samples import sample_rows
from author_dp.permissions import owner_only
from author_dp.training.evaluation import EvalBatches, evaluate
from author_dp.training.rescue import check_rescued
from author_dp.training.saving import CertifiedTrainer

logger = get_logger(__name__)

PLAIN_LOADER, PEFT_LOADER = "transformers.AutoModelForCausalLM", "peft.AutoPeftModelForCausalLM"
LARGE = 2**30  # bytes; a larger model is neither saved nor loaded for a trial
NUM_TOKENS = 8  # of the text whose logits are compared
MAX_ERROR = 1e-3  # of logits, relative to the largest one: other kernels round otherwise
TIMES = ("runtime", "samples_per_second", "steps_per_second")  # metrics that the Trainer adds
PERTURBATION = 0.05  # of adapters before the trial: at first they do nothing, and what loading loses would not be seen


def rehearse(trainer: Any) -> None:
    """Try what follows the last step. Collective.

    Args:
        trainer: dp_utils.DPTrainer, about to train.
    Raises:
        UserError: if the result could not be saved, loaded or evaluated.
    """
    if trainer.args.should_save:
        rehearse_disk_space(trainer)
    if isinstance(trainer.processing_class, PreTrainedTokenizerBase):
        # As training does; a configuration that has changed must be valid to be saved.
        align_special_tokens(trainer.model, trainer.processing_class)
    with quiet_rehearsal():
        rehearse_saving(trainer)
        rehearse_evaluation(trainer)
        if not trainer.full_shard and trainer.is_world_process_zero():
            rehearse_generation(trainer)


@contextmanager
def quiet_rehearsal() -> Iterator[None]:
    """Inside, log errors only, and show no progress bar: a trial is not the run."""
    verbosity, has_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if has_bars:
            logging.enable_progress_bar()


# --- saving -------------------------------------------------------------------------------------------------


def rehearse_disk_space(trainer: Any) -> None:
    """Raise UserError unless the result and one checkpoint fit beside what is on the disk; warn unless all checkpoints do."""
    args, result = trainer.args, result_bytes(trainer.model)
    adam = 0 if args.save_only_model or "adam" not in str(args.optim).lower() else 2
    trained = sum(
        parameter.numel() * parameter.element_size() for parameter in trainer.model.parameters() if parameter.requires_grad
    )
    strategy = str(getattr(args.save_strategy, "value", args.save_strategy))
    checkpoint = 0 if strategy == "no" else result + adam * trained
    free, gib = shutil.disk_usage(existing_parent(trainer.folder)).free, 2**30
    if free < result + checkpoint:
        raise UserError(
            f"--output_dir {trainer.folder}: {free / gib:,.2f} GiB are free, and the result and a checkpoint need "
            f"{(result + checkpoint) / gib:,.2f}. Make room, or choose another --output_dir"
        )
    every = args.save_steps if args.save_steps >= 1 else args.save_steps * trainer.plan.steps
    every = trainer.plan.steps_per_epoch if strategy == "epoch" else every
    number = max(1, int(trainer.plan.steps / max(every, 1)))
    number = min(number, args.save_total_limit + 1) if args.save_total_limit else number
    if checkpoint and free < result + number * checkpoint:
        logger.warning(
            f"--output_dir {trainer.folder}: {free / gib:,.2f} GiB are free, and all {number} checkpoints need "
            f"{(result + number * checkpoint) / gib:,.2f}. Add --save_total_limit 1"
        )


def existing_parent(folder: Path) -> Path:
    """Return a folder, or the nearest one above it that exists."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())


def rehearse_saving(trainer: Any) -> None:
    """Save the model for a trial, and find out how it loads. Collective if the model is sharded."""
    if result_bytes(trainer.model) > LARGE:
        return
    state_dict = full_state_dict(trainer.model) if trainer.full_shard else None
    if not trainer.args.should_save:
        return
    remove_output_trials(trainer.folder)
    place: Optional[Path] = None
    try:
        with owner_only(), nullcontext() if trainer.full_shard else perturbed_adapter(trainer.model):
            trainer.folder.mkdir(parents=True, exist_ok=True)
            place = Path(tempfile.mkdtemp(prefix=TRIAL_PREFIX, dir=trainer.folder))
            model = place / "model"  # two levels deep, where nothing takes it for a result
            super(CertifiedTrainer, trainer)._save(str(model), state_dict)
            check_rescued(model, trainer.model, state_dict)
            for path in model.iterdir():
                check_output_target(trainer.folder / path.name, path.is_dir(), path.is_file())
            if not trainer.full_shard:
                trainer.loader = find_rehearsal_loader(model, trainer.model)
    except UserError:
        raise
    except Exception as error:  # transformers, safetensors, peft and each tokenizer raise their own
        raise rehearsal_saving_error(error) from error
    finally:
        if place is not None:
            shutil.rmtree(place, ignore_errors=True)


def rehearsal_saving_error(error: Exception) -> UserError:
    """Return what to change where a trial of saving fails."""
    if (known := to_user_error(error)) is not None:
        return known
    words = " ".join(line.strip() for line in str(error).splitlines() if line.strip())[:300]
    fix = "Correct the file, or choose another model"
    if "GenerationConfig" in str(error):
        words = " ".join(re.findall(r"(?m)^- (.*)", str(error))).replace("`", "")[:300] or words
        fix = "Correct generation_config.json in its folder, or delete it"
    return UserError(f"--model_name: the trained model could not be saved ({words or type(error).__name__}). {fix}")


@contextmanager
def perturbed_adapter(model: Any) -> Iterator[None]:
    """Inside, the trained parameters of an adapter are a little different, each element by another amount."""
    trained = [p for p in model.parameters() if p.requires_grad] if isinstance(model, PeftModel) else []
    kept = [parameter.detach().clone() for parameter in trained]
    try:
        with torch.no_grad():
            for parameter in trained:  # in the same way each time, without a random generator
                change = torch.linspace(-PERTURBATION, PERTURBATION, parameter.numel(), device=parameter.device)
                parameter.add_(change.view_as(parameter))
        yield
    finally:
        with torch.no_grad():
            for parameter, value in zip(trained, kept):
                parameter.copy_(value)


# --- loading ------------------------------------------------------------------------------------------------


def find_rehearsal_loader(folder: Path, model: Any) -> Optional[str]:
    """Return the call that loads the saved model as it is in memory; None if that cannot be known without more memory or a base.

    Raises:
        UserError: if none does.
    """
    is_adapter = isinstance(model, PeftModel)
    if not computes_in_float32(model) or weight_bytes(model) > LARGE or any(p.dtype != torch.float32 for p in model.parameters()):
        return None
    if is_adapter and not model.peft_config[model.active_adapter].base_model_name_or_path:
        return None
    ways: dict[str, Callable] = {PLAIN_LOADER: AutoModelForCausalLM.from_pretrained}
    if is_adapter:
        ways[PEFT_LOADER] = AutoPeftModelForCausalLM.from_pretrained
    else:
        ways[f"{type(model).__module__}.{type(model).__name__}"] = type(model).from_pretrained
    found = {}
    with deterministic_eval(model), torch.no_grad():
        ids = torch.arange(1, NUM_TOKENS + 1, device=model.device)[None] % len(model.get_input_embeddings().weight)
        expected = model(input_ids=ids).logits
        for name, load in ways.items():
            try:
                loaded = load(str(folder), dtype=torch.float32, local_files_only=True).to(model.device).eval()
                error = (loaded(input_ids=ids).logits - expected).abs().max() / expected.abs().max()
                found[name] = f"logits that are {error:.2g} off"
                if error <= MAX_ERROR:
                    return name
            except Exception as error:  # each library raises its own
                found[name] = first_line(error)[:100]
    tried = ", ".join(": ".join(pair) for pair in found.items())
    raise UserError(
        f"--model_name, or a --lora option: the result would not load as it was trained ({tried}). Change the option, or choose "
        "another model"
    )


# --- evaluating and generating ------------------------------------------------------------------------------


def rehearse_evaluation(trainer: Any) -> None:
    """Evaluate the batch of the longest texts. Collective.

    Raises:
        UserError: for a metric that does not exist, or too little memory.
    """
    args, known = trainer.args, set[str]()
    datasets = trainer.eval_dataset if isinstance(trainer.eval_dataset, dict) else {"": trainer.eval_dataset}
    for name, dataset in datasets.items():
        if dataset is None:
            continue
        batches = EvalBatches(
            dataset, args.per_device_eval_batch_size, trainer.data_collator, args.process_index, args.world_size
        )
        batches.batches = batches.batches[-1:]  # sorted by length
        try:
            with deterministic_eval(trainer.model), trainer.accelerator.autocast():
                prefix = f"eval_{name}" if name else "eval"
                found = evaluate(trainer.model, DataLoader(batches, batch_size=None), lambda: None, prefix).metrics
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"--per_device_eval_batch_size {args.per_device_eval_batch_size}: not enough memory to evaluate. Lower it"
            ) from error
        known |= {*(found or {}), *(f"{prefix}_{time}" for time in TIMES)}
    if known:
        rehearse_best_model_metric(args.metric_for_best_model, known)


def rehearse_best_model_metric(name: Optional[str], known: set[str]) -> None:
    """Raise UserError where --metric_for_best_model `name` is none of the `known` metrics of an evaluation."""
    if name is not None and (name if name.startswith("eval_") else f"eval_{name}") not in known:
        names = ", ".join(sorted(metric.removeprefix("eval_") for metric in known if metric.endswith(("loss", "perplexity"))))
        raise UserError(f"--metric_for_best_model {name}: no such metric. Give one of {names}")


def rehearse_generation(trainer: Any) -> None:
    """Generate two tokens; warn if the model cannot, as it may be meant for other things."""
    try:
        sample_rows(trainer.model, [[0]], 2, None)
    except Exception as error:  # any error of the model's own code
        logger.error(f"--model_name: the trained model will not generate text ({type(error).__name__}: {first_line(error)}).")
