"""Save complete checkpoints only, and decide whether and from where a run may resume.

Guarantees: a checkpoint counts only when all its files are on disk, so a checkpoint that a crash left half written is skipped.
A checkpoint is resumed only beside the ledger that holds its steps. This module decides nothing about epsilon: the ledger alone
does. Checkpoints are in the order in which they were saved, so that the newest one is that of the last branch, after a run went
back to an earlier checkpoint. (What may change when a run resumes: resuming.py.)

Example:

    >>> mark_checkpoint_complete(Path("scratch/checkpoint-100"))
    >>> latest_complete_checkpoint(Path("scratch"))
    PosixPath('scratch/checkpoint-100')
"""

import errno
import math
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Optional

from transformers import TrainerState, TrainingArguments
from transformers.trainer import OPTIMIZER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from author_dp.accounting.hash_chain import HashChain
from author_dp.accounting.ledger import LEDGER_NAME, REPORT_NAME, PrivacyLedger, find_ledger_reports
from author_dp.accounting.output_dir import check_output_dir, has_checkpoint_name
from author_dp.distributed import barrier
from author_dp.errors import UserError
from author_dp.files import fsync_folder, make_private, sha256_of, write_json
from author_dp.guards.options import metric_driven_option
from author_dp.logs import get_logger
from author_dp.models.weights import (
    COMPLETE_MARKER,
    check_weights,
    read_weights_marker,
    remove_weights_report,
    weight_files,
    weight_name_pattern,
    weights_have_no_guarantee,
)
from author_dp.training.resuming import check_same_options
from author_dp.wording import format_names

logger = get_logger(__name__)


# --- complete checkpoints ---------------------------------------------------------------------------------


def mark_checkpoint_complete(checkpoint: Path, made_with: Optional[dict[str, Any]] = None) -> None:
    """Flush every file of `checkpoint` to disk, then write the marker file with their sizes, as the newest checkpoint.

    All files but the report become readable by their owner only: the Trainer's state discloses losses, how much was computed,
    and when. The optimizer's state is hashed, as weights are in privacy.json. Another run's state would be applied without noise.

    Args:
        made_with: options, model and data of the run, for resuming.py.
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
    marker = {"files": sizes, "sha256": hashes, "saved": next_checkpoint_number(checkpoint.parent), **(made_with or {})}
    write_json(checkpoint / COMPLETE_MARKER, marker, private=True)
    fsync_folder(checkpoint.parent)


def mark_checkpoint_newest(checkpoint: Path) -> None:
    """Make `checkpoint` the newest one of its folder, before a run continues from it: later ones are of another branch."""
    if find_checkpoint_corruption(checkpoint) is None and checkpoint_number(checkpoint) + 1 < next_checkpoint_number(
        checkpoint.parent
    ):
        marker = read_weights_marker(checkpoint)
        write_json(checkpoint / COMPLETE_MARKER, {**marker, "saved": next_checkpoint_number(checkpoint.parent)}, private=True)


def checkpoint_number(checkpoint: Path) -> float:
    """Return the place of `checkpoint` in the order of saving; 0 if an older version saved it, infinity if incomplete."""
    try:
        return int(read_weights_marker(checkpoint).get("saved", 0))
    except (OSError, ValueError, TypeError, AttributeError):
        return math.inf


def next_checkpoint_number(output_dir: Path) -> int:
    """Return the number of the next checkpoint to be saved in `output_dir`."""
    numbers = (checkpoint_number(checkpoint) for checkpoint in checkpoints_by_step(output_dir))
    return 1 + max((int(number) for number in numbers if math.isfinite(number)), default=0)


def find_checkpoint_corruption(checkpoint: Path) -> Optional[str]:
    """Return what is missing in `checkpoint`, or None if it is complete."""
    try:
        sizes = read_weights_marker(checkpoint)["files"]
    except FileNotFoundError:
        return f"it is incomplete ({COMPLETE_MARKER} is missing)"
    except (OSError, ValueError, KeyError, TypeError):
        return f"{COMPLETE_MARKER} cannot be read"
    for name, size in sizes.items():
        path = checkpoint / name
        if not path.is_file() or path.stat().st_size != size:
            return f"{name} is missing or truncated"
    return None


def latest_complete_checkpoint(output_dir: Path) -> Optional[Path]:
    """Return the complete checkpoint that was saved last; skip incomplete ones with a warning."""
    for checkpoint in reversed(checkpoints_by_age(output_dir)):
        corruption = find_checkpoint_corruption(checkpoint)
        if corruption is None:
            return checkpoint
        logger.warning_once(f"Skipped {checkpoint}: {corruption}.")
    return None


def checkpoints_by_step(output_dir: Path) -> list[Path]:
    """Return the checkpoints in order of step, not of time: a clock may go backwards."""
    matches = ((re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", path.name), path) for path in output_dir.glob("*"))
    return [path for _, path in sorted((int(match[1]), path) for match, path in matches if match)]


def checkpoints_by_age(output_dir: Path) -> list[Path]:
    """Return the checkpoints in the order of saving, incomplete ones last; those of older versions by step."""
    return sorted(checkpoints_by_step(output_dir), key=checkpoint_number)  # a stable sort


def prune_checkpoints(newest: Path, limit: Optional[int], best: Optional[str]) -> None:
    """Delete the oldest complete checkpoints until `limit` are left, `newest` included; never `newest` or `best`."""
    if limit is None or limit <= 0:
        return
    others = [path for path in checkpoints_by_age(newest.parent) if path != newest and find_checkpoint_corruption(path) is None]
    for path in others[: max(0, len(others) + 1 - limit)]:
        if best is None or path.resolve() != Path(best).resolve():
            remove_checkpoint(path)


def remove_checkpoint(path: Path) -> None:
    """Delete a checkpoint, in an order that is safe if it is interrupted.

    The Trainer's state goes first: a checkpoint with it and without privacy.json counts as another program's. Weights go before a
    privacy.json that certifies nothing: without it they would pass for those of a base model.
    """
    (path / TRAINER_STATE_NAME).unlink(missing_ok=True)
    if not weights_have_no_guarantee(path):
        remove_weights_report(path)
    for weights in weight_files(path):
        weights.unlink()
    shutil.rmtree(path)


@contextmanager
def atomic_checkpoint(
    output_dir: Path, args: TrainingArguments, state: TrainerState, made_with: dict[str, Any]
) -> Iterator[None]:
    """Mark the checkpoint that the Trainer writes inside as complete; only then delete older ones. `made_with`: as above."""
    checkpoint = output_dir / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
    if args.should_save and checkpoint.exists():  # from before a restart: the step with this number was lost
        remove_checkpoint(checkpoint)
    barrier()  # no process writes files before the old ones are gone
    limit, args.save_total_limit = args.save_total_limit, None
    try:
        yield
    finally:
        args.save_total_limit = limit
    barrier()  # all processes have written their files
    if args.should_save:
        mark_checkpoint_complete(checkpoint, made_with)
        prune_checkpoints(checkpoint, limit, state.best_model_checkpoint)


def load_checkpoint_state(checkpoint: Path) -> TrainerState:
    """Return the Trainer's state in `checkpoint`."""
    return TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))


# --- what may be resumed ----------------------------------------------------------------------------------


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
        check_unused(folder, ledger)
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
    ledger.check_no_failure()
    check_checkpoint_not_released(ledger, option)
    if ledger.steps and disable_dp:
        raise UserError(f"--output_dir {folder}: it holds a private run. Choose another --output_dir for one with --disable_dp")
    return ledger


def check_unused(folder: Path, ledger: PrivacyLedger) -> None:
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


def check_checkpoint_author_count(
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


def check_checkpoint_hides_counts(ledger: PrivacyLedger, hidden: bool) -> None:
    """Raise UserError where the public ledger discloses the number of authors, despite --hide_counts (`hidden`)."""
    # Headers with steps are checked by check_checkpoint_author_count, which knows a remedy.
    unused = (header for header, steps in zip(ledger.runs, ledger.steps_per_run) if not steps)
    if hidden and any(header.get("num_authors") is not None for header in unused):
        raise UserError(
            f"--hide_counts: {ledger.path} discloses the number of authors of an earlier run. Choose another --output_dir"
        )
