"""How a run ends early and goes on: whole checkpoints, signals, faults, and what may be resumed.

Promise: a checkpoint counts only when all its files are on disk, so that what a crash left half written is passed over; a
checkpoint is resumed only beside the ledger that holds its steps; Ctrl-C and SIGTERM save one before the run ends. Nothing here
decides about epsilon: the ledger alone does.

Example:

    >>> seal(Path("scratch/checkpoint-100"))
    >>> newest_whole(Path("scratch"))
    PosixPath('scratch/checkpoint-100')
"""

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Optional

from transformers import TrainerState, TrainingArguments
from transformers.trainer import OPTIMIZER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from author_dp.accounting.ledger import LEDGER_NAME, REPORT_NAME, PrivacyLedger, find_reports
from author_dp.distributed import barrier
from author_dp.errors import UserError
from author_dp.files import fsync_folder, make_private, write_json
from author_dp.guards.options import metric_driven_option
from author_dp.models.weights import (
    COMPLETE_MARKER,
    check_weights,
    has_no_guarantee,
    is_checkpoint,
    remove_report,
    sha256_of,
    weight_files,
    weight_name_pattern,
)

logger = logging.get_logger(f"transformers.{__name__}")


# --- whole checkpoints ------------------------------------------------------------------------------------


def mark_complete(checkpoint: Path) -> None:
    """Put every file of `checkpoint` on disk, then say so in a file of its own, with their sizes.

    All but the report are for their owner only: the Trainer's state tells losses, how much was computed, and when. The
    optimizer's state is hashed, as privacy.json does with weights: another run's would be applied without noise.
    """
    for path in checkpoint.rglob("*"):
        if path.is_file() and path.name != REPORT_NAME:
            make_private(path)
    sizes = {}
    for path in sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.name != COMPLETE_MARKER):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
        sizes[str(path.relative_to(checkpoint))] = path.stat().st_size
    hashes = {name: sha256_of(checkpoint / name) for name in sizes if name == OPTIMIZER_NAME}
    fsync_folder(checkpoint)
    write_json(checkpoint / COMPLETE_MARKER, {"files": sizes, "sha256": hashes}, private=True)
    fsync_folder(checkpoint.parent)


def find_corruption(checkpoint: Path) -> Optional[str]:
    """Return what is missing in `checkpoint`, or None where it is whole."""
    try:
        sizes = json.loads((checkpoint / COMPLETE_MARKER).read_text())["files"]
    except FileNotFoundError:
        return f"it was not written to its end ({COMPLETE_MARKER} is missing)"
    except (OSError, ValueError, KeyError, TypeError):
        return f"{COMPLETE_MARKER} cannot be read"
    for name, size in sizes.items():
        path = checkpoint / name
        if not path.is_file() or path.stat().st_size != size:
            return f"{name} is missing or was cut short"
    return None


def latest_complete(output_dir: Path) -> Optional[Path]:
    """Return the checkpoint of the highest step that is whole; pass over the others with a warning."""
    for checkpoint in reversed(checkpoints_by_step(output_dir)):
        damage = find_corruption(checkpoint)
        if damage is None:
            return checkpoint
        logger.warning_once(f"Passed over {checkpoint}: {damage}.")
    return None


def checkpoints_by_step(output_dir: Path) -> list[Path]:
    """Return the checkpoints in the order of their steps, not of their times: a clock may go backwards."""
    found = ((re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", path.name), path) for path in output_dir.glob("*"))
    return [path for _, path in sorted((int(match[1]), path) for match, path in found if match)]


def prune_checkpoints(newest: Path, limit: Optional[int], best: Optional[str]) -> None:
    """Delete whole checkpoints beside `newest` but for `limit` of them; never `newest` itself, nor `best`."""
    if limit is None or limit <= 0:
        return
    others = [path for path in checkpoints_by_step(newest.parent) if path != newest and find_corruption(path) is None]
    for path in others[: max(0, len(others) + 1 - limit)]:
        if best is None or path.resolve() != Path(best).resolve():
            remove_checkpoint(path)


def remove_checkpoint(path: Path) -> None:
    """Delete a checkpoint: the Trainer's state first, as one without privacy.json would be another program's.

    Weights go before a privacy.json that certifies nothing: without it they would pass for those of a base model.
    """
    (path / TRAINER_STATE_NAME).unlink(missing_ok=True)
    if not has_no_guarantee(path):
        remove_report(path)
    for weights in weight_files(path):
        weights.unlink()
    shutil.rmtree(path)


@contextmanager
def atomic_checkpoint(output_dir: Path, args: TrainingArguments, state: TrainerState) -> Iterator[None]:
    """Within, the Trainer writes the checkpoint of its step; it is sealed at the end, and only then are older ones deleted."""
    checkpoint = output_dir / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
    if args.should_save and checkpoint.exists():  # of a lost step of the same number
        remove_checkpoint(checkpoint)
    barrier()  # or another process could write its files before
    keep, args.save_total_limit = args.save_total_limit, None
    try:
        yield
    finally:
        args.save_total_limit = keep
    barrier()  # every process has its files in there
    if args.should_save:
        mark_complete(checkpoint)
        prune_checkpoints(checkpoint, keep, state.best_model_checkpoint)


def load_trainer_state(checkpoint: Path) -> TrainerState:
    """Return the Trainer's state in `checkpoint`."""
    return TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))


# --- what may be resumed ----------------------------------------------------------------------------------


def find_checkpoint(args: TrainingArguments, privacy: Any, adapter: bool) -> Optional[Path]:
    """Return the checkpoint to go on from; None where the run starts with the model as it was given.

    Args:
        args: Hugging Face's; of interest are output_dir and resume_from_checkpoint (a path, or True for the newest).
        privacy: dp_utils.PrivacyArguments.
        adapter: whether the run trains an adapter.
    Raises:
        UserError: where spent steps would be forgotten, the folder holds results of another run, or there is nothing to resume.
    """
    folder, resume = Path(str(args.output_dir)), args.resume_from_checkpoint
    if is_checkpoint(folder):
        raise UserError(f"--output_dir {folder}: this is the name of a checkpoint, not of a run. Choose another --output_dir")
    ledger = PrivacyLedger(folder / LEDGER_NAME)
    if args.process_index == 0 and ledger.path.exists():
        with ledger.locked():  # or say at once that another run is in there
            pass
    ledger.check_no_failure()
    check_not_released(ledger, metric_driven_option(args))
    if ledger.steps and privacy.disable_dp:
        raise UserError(f"--output_dir {folder} holds a private run: choose another --output_dir for one with --disable_dp")
    if not resume:
        if ledger.steps:
            raise UserError(
                f"--output_dir {folder} holds the privacy ledger of an earlier run: continue that run with "
                "--resume_from_checkpoint True, or choose another --output_dir"
            )
        check_empty(folder)
        return None
    check_own_results(folder, ledger, privacy.disable_dp, adapter, is_first_process=args.process_index == 0)
    checkpoint = latest_complete(folder) if resume is True else Path(resume)
    if checkpoint is None:
        if ledger.steps or (privacy.disable_dp and checkpoints_by_step(folder)):
            logger.warning_once(
                f"No checkpoint in {folder} is whole: starting anew, with the {ledger.steps} steps of its ledger counted."
            )
            return None
        raise UserError(f"--resume_from_checkpoint: there is no checkpoint in --output_dir {folder}; leave it out to start")
    if not checkpoint.is_dir():
        raise UserError(
            f"--resume_from_checkpoint {checkpoint}: there is no such folder; give a checkpoint folder, or True for the newest"
        )
    if damage := find_corruption(checkpoint):
        raise UserError(
            f"--resume_from_checkpoint {checkpoint}: {damage}; give an earlier checkpoint, or True for the newest whole one"
        )
    if not (checkpoint / "scheduler.pt").exists():
        raise UserError(
            f"--resume_from_checkpoint {checkpoint}: it holds the model alone (--save_only_model), so the learning rate and the "
            "optimizer would begin anew; resume from a checkpoint that was saved without --save_only_model"
        )
    if not privacy.disable_dp:
        check_ledger_covers(checkpoint, ledger, is_first_process=args.process_index == 0)
    return checkpoint


def check_empty(folder: Path) -> None:
    """Raise UserError where `folder` holds a model, a checkpoint or a privacy.json: they could pass for results of this run."""
    if results := [*weight_files(folder), *find_reports(folder), *checkpoints_by_step(folder)]:
        raise UserError(
            f"--output_dir {folder}: it holds results of another run or other weights ({list_names(results, folder)}). Choose "
            "another --output_dir, or continue that run with --resume_from_checkpoint True"
        )


def check_own_results(folder: Path, ledger: PrivacyLedger, disable_dp: bool, adapter: bool, is_first_process: bool) -> None:
    """Raise UserError where `folder` holds results of another kind than those of the run that is resumed.

    Args:
        disable_dp, adapter: the run's kind: whether it is without privacy, and whether it trains an adapter.
        is_first_process: which alone hashes weights.
    """
    checkpoints, foreign = checkpoints_by_step(folder), []
    for place in (folder, *checkpoints):
        foreign += [path for path in weight_files(place) if not weight_name_pattern(adapter).fullmatch(path.name)]
    foreign += [path for path in find_reports(folder) if ledger.check_report(path)["disable_dp"] != disable_dp]
    # Of our own, privacy.json is written before the Trainer's state, and removed after it.
    foreign += [p for p in checkpoints if (p / TRAINER_STATE_NAME).exists() and not (p / REPORT_NAME).exists()]
    if foreign:
        kind = f"{'an adapter' if adapter else 'a full model'} {'without' if disable_dp else 'with'} privacy"
        raise UserError(
            f"--output_dir {folder}: it holds results of another kind of run ({list_names(foreign, folder)}) than the one that "
            f"is resumed ({kind}). Move them away, or choose another --output_dir"
        )
    if is_first_process and not disable_dp and (folder / REPORT_NAME).exists():
        check_weights(folder, ledger.check_report(folder / REPORT_NAME), base=False)


def list_names(paths: list[Path], folder: Path) -> str:
    """Return the first few names, for an error."""
    names = sorted(str(path.relative_to(folder)) for path in paths)
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def check_not_released(ledger: PrivacyLedger, option: Optional[str]) -> None:
    """Raise UserError where metrics would choose a model (by `option`) whose held-out authors' loss was released."""
    if ledger.releases and option is not None:
        raise UserError(
            f"{option} lets held-out authors choose what is saved or trained, and --output_dir {ledger.path.parent} holds an "
            "evaluation loss that was released of them: leave it out, or choose another --output_dir"
        )


def check_ledger_covers(checkpoint: Path, ledger: PrivacyLedger, is_first_process: bool = True) -> None:
    """Raise UserError unless the steps behind `checkpoint` are in `ledger`, and its weights are those that were saved.

    Args:
        is_first_process: which alone hashes weights.
    """
    if checkpoint.resolve().parent != ledger.path.resolve().parent or not ledger.path.exists():
        raise UserError(
            f"--resume_from_checkpoint {checkpoint}: what it has spent is not in {ledger.path}; resume in the --output_dir that "
            "the checkpoint was made in, with its ledger"
        )
    report = ledger.check_report(checkpoint / REPORT_NAME)
    if report["disable_dp"]:
        raise UserError(f"--resume_from_checkpoint {checkpoint} was trained with --disable_dp: start anew, or add --disable_dp")
    if is_first_process:
        check_weights(checkpoint, report, base=False)  # the run compares its own base, wherever that lies now
        known = json.loads((checkpoint / COMPLETE_MARKER).read_text()).get("sha256") or {}
        for name in {*known, *([OPTIMIZER_NAME] if (checkpoint / OPTIMIZER_NAME).exists() else [])}:
            if sha256_of(checkpoint / name) != known.get(name):
                raise UserError(f"{checkpoint / name}: its SHA-256 is not the one in {COMPLETE_MARKER}. Restore the file")


def check_author_count(runs: list[dict[str, Any]], kept: Optional[int], num_authors: int, hidden: bool, allowed: bool) -> None:
    """Raise UserError for another number of authors than in the run before, unless the user says that it is meant.

    Args:
        runs: the ledger's headers. Other sample rates, noise, clip norms or samples per author compose as they ran; so do other
            authors, but these are more likely a mistake.
        kept: the number before, where the headers do not tell it.
        hidden: --hide_counts, which is for a whole folder: one header that tells the number would tell it for all.
        allowed: --allow_other_authors.
    """
    if not runs:
        return
    before = runs[-1]["num_authors"]
    if hidden != (before is None):
        remedy = "add it again" if before is None else "leave it out, or start in a new --output_dir"
        raise UserError(
            f"--hide_counts was {'' if before is None else 'not '}given to the run that this one goes on with: {remedy}"
        )
    before = kept if before is None else before
    if before not in (None, num_authors) and not allowed:
        raise UserError(
            f"--resume_from_checkpoint: there are {num_authors:,} training authors now, {before:,} before; "
            "give the same data and options, or add --allow_other_authors if it is meant"
        )


def check_counts_hidden(folder: Path, ledger: PrivacyLedger, hidden: bool) -> None:
    """Raise UserError where a public file of `folder` tells the number of authors, and --hide_counts (`hidden`) is to keep it."""
    if not hidden:
        return
    # Of headers those with steps are in check_same_authors, which knows a remedy.
    unused = (header for header, steps in zip(ledger.runs, ledger.steps_per_run) if not steps)
    told = [ledger.path] if any(header.get("num_authors") is not None for header in unused) else []
    if told:
        raise UserError(f"--hide_counts: {told[0]} tells the number of authors, of an earlier run: choose another --output_dir")


# --- how a run ends early ---------------------------------------------------------------------------------
