"""Void the guarantee of a run whose mechanism failed: in its ledger, and in every file that claims it.

Guarantees: afterwards no file of the run says that its weights have a guarantee: it was rewritten or removed, or the error
names it. No file of another run is touched. The MechanismError is never replaced by another error.

Example:

    >>> with guarantee_voided_on_failure(budget, write_card):
    ...     train()
"""

import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Optional

from author_dp.accounting.budget import Budget
from author_dp.accounting.ledger import REPORT_NAME, PrivacyLedger
from author_dp.accounting.output_dir import RESCUED, certified_folders, has_checkpoint_name
from author_dp.distributed import barrier
from author_dp.errors import MechanismError, UserError, first_line
from author_dp.files import read_json_object, write_json

CARD = "README.md"
PAGES = ("report.html", "report/epsilon.png")  # made from reports, and can be made again
STATEMENT_SUFFIX = ".privacy.json"  # of synthetic texts


@contextmanager
def guarantee_voided_on_failure(
    budget: Budget, write_card: Callable[[], None], published: Optional[str] = None
) -> Iterator[None]:
    """Within, a MechanismError, which all processes raise, voids the guarantees of the run before it propagates.

    Args:
        write_card: writes the model card anew, if an earlier run left one.
        published: where checkpoints have been uploaded to, or may be just now.
    """
    try:
        yield
    except MechanismError as error:
        try:
            if budget.is_main_process:
                error.not_voided = [f"{published} (uploads)"] if published else []
                error.not_voided += void_guarantee(budget.ledger, str(error), write_card)
        except Exception as problem:
            error.not_voided = [*error.not_voided, f"{budget.ledger.path.parent} ({first_line(problem)})"]
        with suppress(Exception):  # of one that is lost
            barrier()  # or a launcher would end the main process, as another one has ended with an error
        raise error


def void_guarantee(ledger: PrivacyLedger, failure: str, write_card: Callable[[], None] = lambda: None) -> list[str]:
    """Record a failure in the ledger and in every report of its weights; remove pages; main process only.

    Returns:
        what may still claim a guarantee, with the reason: what could be neither rewritten nor removed.
    """
    hashes, folder = set(ledger.record_hashes[1:]), ledger.path.parent  # the first hash is that of every empty ledger
    kept, has_card = record_alarm(ledger, failure), is_model_card(folder / CARD)
    kept_pages = remove_pages([folder / name for name in (CARD, *PAGES)])
    kept = record_alarm(ledger, failure) if kept else []  # there may be room now, and the ledger was read again
    void: dict[str, Any] = dict.fromkeys(("epsilon", "epsilon_with_evaluation", "mu_gdp", "tpr_at_fpr"))
    void |= {"alarm": failure, "certificate": None}
    if not kept:  # the hash of the alarm's record: a ledger from which that was removed is refused
        void["ledger_link"] = ledger.record_hashes[-1]
    ledger.failure = failure  # also where it could not be written
    reports, statements = find_voided_files(folder.resolve(), hashes)
    for path in reports:
        kept += void_report(path, void)
        if path.parent != folder.resolve():
            kept_pages += remove_pages([path.parent / CARD, path.parent / PAGES[0]])
    if has_card:
        with suppress(Exception):  # no room, for example: then there is none
            write_card()
    return [*kept, *kept_pages, *(f"{path} (of synthetic texts)" for path in statements)]


def record_alarm(ledger: PrivacyLedger, failure: str) -> list[str]:
    """Record a failure in the ledger. If that fails, read it again, as it may have been cut; return its path and the reason."""
    try:
        ledger.record_failure(failure)
        return []
    except UserError as error:
        with suppress(UserError):
            ledger.read()
        return [f"{ledger.path} ({getattr(error.__cause__, 'strerror', None) or error})"]


def void_report(path: Path, void: dict[str, Any]) -> list[str]:
    """Write what is void into a report; return its path and the reason if that fails.

    A report is never removed: weights without one would pass for an ordinary model.
    """
    content = {"disable_dp": False, "delta": None, **void}  # of one that cannot be read
    with suppress(UserError):
        content = {**read_json_object(path), **void}
    with suppress(OSError, ValueError):
        write_json(path, content)
        return []
    try:  # in place, which needs no room on a full disk: this form is shorter
        with open(os.open(path, os.O_WRONLY | os.O_NOFOLLOW), "w", encoding="utf-8") as file:
            json.dump(content, file)
            file.truncate()
        return []
    except OSError as error:
        return [f"{path} ({error.strerror})"]


def find_voided_files(folder: Path, record_hashes: set[str]) -> tuple[list[Path], list[Path]]:
    """Return the reports that were made from the records of a ledger, and the statements of texts by its weights.

    They are below its folder; where weights were saved in this process; and where they were rescued (training/rescue.py), under
    whatever name.
    """
    below = set(files_below(folder))
    found = {path for path in below if path.name == REPORT_NAME} | {place / REPORT_NAME for place in certified_folders}
    with suppress(OSError):
        for parent in (folder.parent, Path(tempfile.gettempdir())):
            found |= {Path(entry.path, REPORT_NAME) for entry in os.scandir(parent) if RESCUED in entry.name}
    statements = [path for path in below if path.name.endswith(STATEMENT_SUFFIX)]
    reports = sorted(path for path in found if is_voided_report(path, folder, record_hashes))
    return reports, sorted(path for path in statements if is_voided_report(path, None, record_hashes, "model"))


def files_below(folder: Path) -> Iterator[Path]:
    """Yield the files below a folder, and what may be a report in a folder that is linked; skip what cannot be read."""
    for root, folders, names in os.walk(folder):
        yield from (Path(root, name) for name in names)
        yield from (Path(root, name, REPORT_NAME) for name in folders if os.path.islink(os.path.join(root, name)))


def is_voided_report(path: Path, folder: Optional[Path], record_hashes: set[str], *keys: str) -> bool:
    """Return whether a report was made from a ledger's records; a damaged one, whether it lies where that ledger's do.

    Args:
        folder: of the ledger.
        keys: under which the report is, in a file of another kind.
    """
    try:
        if not path.is_file() or (os.name == "posix" and path.stat().st_uid != os.getuid()):  # reading a pipe would not end
            return False
        content: Any = read_json_object(path)
        for key in keys:
            content = content.get(key) or {}
        return content.get("ledger_link") in record_hashes
    except (OSError, UserError, AttributeError):
        return path.parent == folder or (path.parent.parent == folder and has_checkpoint_name(path.parent))


def is_model_card(path: Path) -> bool:
    """Return whether a file is the card of a model with or without a guarantee."""
    try:
        return "| Guarantee |" in path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False


def remove_pages(paths: Iterable[Path]) -> list[str]:
    """Remove files that show a guarantee; return those that cannot be removed, with the reason."""
    kept = []
    for path in paths:
        try:
            if path.name != CARD or is_model_card(path):
                path.unlink(missing_ok=True)
        except OSError as error:
            kept.append(f"{path} ({error.strerror})")
    return kept
