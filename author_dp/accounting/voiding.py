"""Void the guarantee of a run whose mechanism failed: in its ledger, and in every file that claims it.

Guarantees: afterwards no file of the run says that its weights have a guarantee: it was rewritten or removed, or the error
names it. No file of another run is touched. The MechanismError is never replaced by another error. What a kill leaves is voided
by whoever reads the ledger next.

Example:

    >>> with guarantee_voided_on_failure(budget, write_card):
    ...     train()
"""

import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Optional

from author_dp.accounting.budget import Budget
from author_dp.accounting.ledger import REPORT_NAME, PrivacyLedger
from author_dp.accounting.output_dir import RESCUED, certified_folders, has_checkpoint_name, read_other_places
from author_dp.distributed import barrier
from author_dp.errors import MechanismError, UserError, first_line
from author_dp.files import read_json_object, write_json

CARD = "README.md"
PAGES = ("report.html", "report/epsilon.png")  # made from reports, and can be made again
STATEMENT_SUFFIX = ".privacy.json"  # of synthetic texts


@contextmanager
def guarantee_voided_on_failure(
    budget: Budget,
    write_card: Callable[[], None],
    published: Optional[str] = None,
    find_failure: Callable[[], Optional[MechanismError]] = lambda: None,
) -> Iterator[None]:
    """Within, a MechanismError voids the guarantees of the run before it propagates, also one that other code has wrapped.

    Args:
        write_card: writes the model card anew, if an earlier run left one.
        published: where checkpoints have been uploaded to, or may be just now.
        find_failure: returns a failure that this process can tell where the training ends by another error.
    """
    outer = sys.exc_info()[1]  # of another training, in whose handler this one runs
    try:
        yield
    except BaseException as error:
        raised = find_mechanism_error(error, outer)
        if (failure := raised or find_failure()) is None:
            raise
        try:
            if budget.is_main_process:
                failure.not_voided = [f"{published} (uploads)"] if published else []
                failure.not_voided += void_guarantee(budget.ledger, str(failure), write_card)
        except BaseException as problem:  # Ctrl-C, too: the failure is what must be known
            failure.not_voided = [*failure.not_voided, f"{budget.ledger.path.parent} ({first_line(problem)})"]
        if raised is not None:  # by all processes
            with suppress(Exception):  # of one that is lost
                barrier()  # or a launcher would end the main process, as another one has ended with an error
        raise failure from (None if raised is not None else error)


def find_mechanism_error(error: Optional[BaseException], outer: Optional[BaseException] = None) -> Optional[MechanismError]:
    """Return the MechanismError that an error is, or that it was raised from; none that was there before, `outer`."""
    seen = {id(outer)}
    while error is not None and id(error) not in seen:
        if isinstance(error, MechanismError):
            return error
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return None


def void_again(ledger: PrivacyLedger) -> None:
    """Void what an interrupted process has left of the guarantees of a ledger that knows of a failure."""
    if ledger.failure is not None and ledger.runs:
        with suppress(OSError):
            void_guarantee(ledger, ledger.failure, is_recorded=True)


def void_guarantee(
    ledger: PrivacyLedger, failure: str, write_card: Callable[[], None] = lambda: None, is_recorded: bool = False
) -> list[str]:
    """Record a failure in the ledger and in every report of its weights; remove pages; main process only.

    Args:
        is_recorded: whether the ledger, or a report, says so already.
    Returns:
        what may still claim a guarantee, with the reason: what could be neither rewritten nor removed.
    """
    hashes, folder = set(ledger.record_hashes[1:]), ledger.path.parent  # the first hash is that of every empty ledger
    if is_recorded and all(map(has_alarm, find_voided_files(folder.resolve(), hashes)[0])):
        return []
    kept, has_card = [] if is_recorded else record_alarm(ledger, failure), is_model_card(folder / CARD)
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


def has_alarm(path: Path) -> bool:
    """Return whether a report says that its guarantee is void."""
    try:
        return bool(read_json_object(path).get("alarm"))
    except UserError:
        return False


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

    They are below its folder; where weights were saved or published; and where they were rescued (training/rescue.py), under
    whatever name. Folders with such names that other users have made, as in a shared temporary folder, are left out.
    """
    below = set(files_below(folder))
    found = {path for path in below if path.name == REPORT_NAME}
    found |= {place / REPORT_NAME for place in certified_folders | set(read_other_places(folder))}
    with suppress(OSError):
        for parent in (folder.parent, Path(tempfile.gettempdir())):
            rescued = [Path(entry.path, REPORT_NAME) for entry in os.scandir(parent) if RESCUED in entry.name]
            found |= {path for path in rescued if is_own(path)}
    statements = [path for path in below if path.name.endswith(STATEMENT_SUFFIX)]
    reports = sorted(path for path in found if is_voided_report(path, folder, record_hashes))
    return reports, sorted(path for path in statements if is_voided_report(path, None, record_hashes, "model"))


def is_own(path: Path) -> bool:
    """Return whether this user has made a file."""
    try:
        return os.name != "posix" or path.stat().st_uid == os.getuid()
    except OSError:
        return False


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
        if not path.is_file():  # reading a pipe would not end
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
