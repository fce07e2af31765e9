"""Save complete checkpoints only, and tell which of them is the newest.

Guarantees: a checkpoint counts only when all its files are on disk, so a checkpoint that a crash left half written is skipped.
Checkpoints are in the order in which they were saved, so that the newest one is that of the last branch, after a run went back
to an earlier checkpoint. (From where a run resumes, and what may change then: resuming.py.)

Example:

    >>> mark_checkpoint_complete(Path("scratch/checkpoint-100"))
    >>> latest_complete_checkpoint(Path("scratch"))
    PosixPath('scratch/checkpoint-100')
"""

import math
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

from author_dp.accounting.ledger import REPORT_NAME
from author_dp.distributed import barrier
from author_dp.files import fsync_folder, sha256_of, write_json
from author_dp.logs import get_logger
from author_dp.models.modes import temporarily_set
from author_dp.models.weights import (
    COMPLETE_MARKER,
    read_weights_marker,
    remove_weights_report,
    weight_files,
    weights_have_no_guarantee,
)
from author_dp.permissions import make_private

logger = get_logger(__name__)


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
    with temporarily_set((args, "save_total_limit", None)):
        yield
    barrier()  # all processes have written their files
    if args.should_save:
        mark_checkpoint_complete(checkpoint, made_with)
        prune_checkpoints(checkpoint, args.save_total_limit, state.best_model_checkpoint)
