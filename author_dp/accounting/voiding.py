"""Void the guarantee of a run whose mechanism failed: in its ledger, and in every file that claims it.

Guarantees: afterwards no file of the run says that its weights have a guarantee: it was rewritten or removed, or the error
names it. No file of another run is touched.

Example:

    >>> with guarantee_voided_on_failure(budget, write_card):
    ...     train()
"""

import glob
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from author_dp.accounting.budget import Budget
from author_dp.accounting.ledger import REPORT_NAME, PrivacyLedger
from author_dp.accounting.output_dir import RESCUED, has_checkpoint_name
from author_dp.errors import MechanismError, UserError
from author_dp.files import read_json_object, write_json

CARD = "README.md"
PAGES = (CARD, "report.html", "report/*.png")  # made from reports, and can be made again


@contextmanager
def guarantee_voided_on_failure(budget: Budget, write_card: Callable[[], None]) -> Iterator[None]:
    """Within, a MechanismError voids the guarantees of the output directory before it propagates.

    Args:
        write_card: writes the model card anew, if an earlier run left one.
    """
    try:
        yield
    except MechanismError as error:
        if budget.is_main_process:
            has_card = (budget.ledger.path.parent / CARD).exists()
            error.not_voided = void_guarantee(budget.ledger, str(error))
            if has_card and budget.ledger.failure is not None:  # otherwise the card would claim what the ledger has
                with suppress(Exception):  # no room, for example: then there is none
                    write_card()
        raise


def void_guarantee(ledger: PrivacyLedger, failure: str) -> list[str]:
    """Record a failure in the ledger and in every report of its weights; remove pages; main process only.

    Returns:
        what still claims a guarantee, with the reason: what could be neither rewritten nor removed.
    """
    folder = ledger.path.parent
    kept = remove_pages(path for name in PAGES for path in folder.glob(name))  # first, as they may make room
    reports = find_voided_reports(ledger)
    kept += record_alarm(ledger, failure)
    void: dict[str, Any] = dict.fromkeys(("epsilon", "epsilon_with_evaluation", "mu_gdp", "tpr_at_fpr"))
    void["alarm"] = failure
    if ledger.failure is not None:  # the hash of the alarm's record: a ledger from which that was removed is refused
        void["ledger_link"] = ledger.record_hashes[-1]
    return kept + [problem for path in reports for problem in void_report(path, void)]


def record_alarm(ledger: PrivacyLedger, failure: str) -> list[str]:
    """Record a failure in the ledger, also in one that was cut meanwhile; return its path and the reason if that fails."""
    reason: object = ""
    for _ in range(2):
        try:
            ledger.record_failure(failure)
            ledger.failure = failure
            return []
        except UserError as error:
            reason = getattr(error.__cause__, "strerror", error)
            with suppress(UserError):
                ledger.read()
    return [f"{ledger.path} ({reason})"]


def void_report(path: Path, void: dict[str, Any]) -> list[str]:
    """Write what is void into a report; return its path and the reason if that fails.

    A report is never removed: weights without one would pass for an ordinary model.
    """
    with suppress(OSError, ValueError):
        write_json(path, {**read_json_object(path), **void})
        return []
    try:  # in place, which needs no room on a full disk
        with open(os.open(path, os.O_WRONLY | os.O_NOFOLLOW), "w", encoding="utf-8") as file:
            json.dump(void, file)
        return []
    except OSError as error:
        return [f"{path} ({error.strerror})"]


def find_voided_reports(ledger: PrivacyLedger) -> list[Path]:
    """Return the reports of a ledger: beside and below it, and of weights that were saved elsewhere (training/rescue.py)."""
    folder = ledger.path.parent.resolve()
    rescued = f"{glob.escape(folder.name)}{RESCUED}*/{REPORT_NAME}"
    found = {*folder.rglob(REPORT_NAME), *folder.glob(f"*/{REPORT_NAME}"), *folder.parent.glob(rescued)}
    found |= {*Path(tempfile.gettempdir()).glob(rescued)}  # which may have those of another directory of this name
    return sorted(path for path in found if is_voided_report(path, folder, ledger.record_hashes))


def is_voided_report(path: Path, folder: Path, record_hashes: list[str]) -> bool:
    """Return whether a report was made from a ledger in `folder`; a damaged one, whether it lies where that ledger's do."""
    try:
        return read_json_object(path).get("ledger_link") in record_hashes
    except UserError:
        return path.parent == folder or (path.parent.parent == folder and has_checkpoint_name(path.parent))


def remove_pages(paths: Iterable[Path]) -> list[str]:
    """Remove files; return those that cannot be removed, with the reason."""
    kept = []
    for path in paths:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            kept.append(f"{path} ({error.strerror})")
    return kept
