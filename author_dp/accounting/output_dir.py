"""Guard the output directory: check that it can be used, and lock it."""

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from author_dp.accounting.budget import Budget
from author_dp.distributed import barrier
from author_dp.errors import UserError
from author_dp.files import read_json_object, write_json

RESCUED = "-rescued-"  # in the name of a folder beside the output directory, with weights that could not be saved in it
certified_folders: set[Path] = set()  # where this process has saved weights with a report
PLACES_NAME = "_other_places.json"  # in the output directory: where else its weights are
TRIAL_PREFIX = ".trial-"  # of a folder for what is tried before training
FOLDERS = ("report", "_logs")
FILES = (
    "README.md", "report.html", "_private_statistics.json", "_noise_check.npy", "_counts.json", "_dry_run.json", PLACES_NAME,
    "training_args.bin",
)  # fmt: skip


def check_output_dir(folder: Path) -> None:
    """Raise UserError where `folder` cannot be made or written, or has a file where a run puts a folder, or the reverse."""
    place = next(path for path in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(path))
    name = f"--output_dir {folder}: {place}"
    if not place.is_dir():
        kind = "a file, not a folder" if place.exists() else "a link to nothing"
        raise UserError(f"{name} is {kind}. Choose another --output_dir")
    try:  # not os.access: it asks neither the file system nor the room
        with tempfile.TemporaryFile(dir=place):  # not a folder, into which other processes would look
            pass
    except OSError as error:
        raise UserError(
            f"{name} cannot be written ({error.strerror}). Make it writable, or choose another --output_dir"
        ) from None
    for path in place.iterdir() if place == folder.absolute() else ():
        check_output_target(path, path.name in FOLDERS or path.name.startswith("checkpoint-"), path.name in FILES)


def has_checkpoint_name(folder: Path) -> bool:
    """Return whether a folder is named as the Trainer names a checkpoint."""
    return re.fullmatch(r"checkpoint-\d+", folder.resolve().name) is not None


def record_other_place(folder: Path, place: Path) -> None:
    """Record that weights of the run in `folder` are saved or published in `place`, to find them if its mechanism fails later."""
    if not place.resolve().is_relative_to(folder.resolve()):
        places = {*read_other_places(folder), place.resolve()}
        write_json(folder / PLACES_NAME, {"places": sorted(map(str, places))}, private=True)


def read_other_places(folder: Path) -> list[Path]:
    """Return where else weights of the run in `folder` were saved."""
    try:
        return [Path(place) for place in read_json_object(folder / PLACES_NAME)["places"]]
    except (UserError, KeyError, TypeError):  # none, or a file that was changed
        return []


def check_output_is_not_model(folder: Path, model_name: str) -> None:
    """Raise UserError where a result would lie where its base is looked up; a hub name is looked up as a folder first."""
    try:
        is_model = folder.resolve() == Path(model_name).resolve()
    except (OSError, ValueError):  # no path at all: what needs it says so
        return
    if is_model:
        raise UserError(
            f"--output_dir {folder}, --model_name {model_name}: the result would be found in place of the model that it was made "
            "from. Choose another --output_dir"
        )


def check_output_target(path: Path, is_folder: bool, is_file: bool) -> None:
    """Raise UserError where `path` exists and is not what a run writes there: a folder, or a file."""
    if (is_folder and not path.is_dir()) or (is_file and path.is_dir()):
        raise UserError(f"--output_dir: {path} is {'not ' * is_folder}a folder. Move it away, or choose another --output_dir")
    if (is_folder or is_file) and path.exists() and not os.access(path, os.W_OK):
        raise UserError(f"--output_dir: {path} cannot be written. Make it writable, or choose another --output_dir")


def remove_output_trials(folder: Path) -> None:
    """Remove what a killed run has left of its trial."""
    for path in folder.glob(f"{TRIAL_PREFIX}*"):
        shutil.rmtree(path, ignore_errors=True)


@contextmanager
def lock_output_dir(budget: Budget) -> Iterator[None]:
    """Lock the output directory on the main process. All processes read the ledger first.

    Raises:
        UserError: if another run holds the lock, or wrote to the ledger since it was read.
    """
    barrier()
    if budget.plan.disable_dp or not budget.is_main_process:
        yield
        return
    ledger = budget.ledger
    known_steps = ledger.steps
    with ledger.locked():
        if ledger.steps != known_steps:
            raise UserError(
                f"--output_dir {ledger.path.parent}: another run wrote to it just now. Check what it wrote, then resume"
            )
        yield
