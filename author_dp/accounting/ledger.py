"""The ledger of a run: what was spent, on disk before it is spent. As a program, it says what output folders have spent.

    python -m author_dp.ledger OUTPUT_DIR... [DELTA]

Promise: `record_step` returns only when the record is on disk, so that nothing is released which the ledger does not hold;
a step recorded and then lost in a crash counts as spent. Records are chained by hashes: one that was edited, removed or put
in between is noticed, and so is a missing end that some privacy.json knows of. (Whoever rewrites the whole chain and every
report is not noticed: the chain protects from accidents and from retouching, not from the folder's owner.)

Everything in the ledger is public, but for the number of samples; --hide_counts leaves it out, and the number of authors too. No
text, author, seed or duration of a step is in it.

Example:

    >>> ledger = PrivacyLedger(Path("scratch") / LEDGER_NAME)
    >>> with ledger.locked():
    ...     ledger.start_run({"noise_multiplier": 0.7, "sample_rate": 0.01})
    ...     ledger.record_step()
"""

import hashlib
import json
import math
import operator
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Optional

from filelock import FileLock, Timeout
from transformers.utils import logging

from author_dp.accounting.accountant import MechanismEvent, cyclic_event, round_up
from author_dp.errors import UserError
from author_dp.files import fsync_folder

logger = logging.get_logger(f"transformers.{__name__}")

LEDGER_NAME = "privacy_ledger.jsonl"
REPORT_NAME = "privacy.json"
COUNTS_NAME = "_counts.json"  # with --hide_counts: what resuming needs; the leading _ keeps it out of uploads to the hub
LOCK_SECONDS = 10  # data loader workers of a killed run hold its lock until they notice, about five seconds later
TRUNCATED_RELEASE = re.compile(rb'\{"record": "release", "epsilon": ([^,]+), "split": (null|"[^"]*"), ')
FIRST_HASH = hashlib.sha256(b"privacy ledger").hexdigest()


class PrivacyLedger:
    """Append-only record of what was spent, one JSON object a line: a header per run, then a record per step.

    Args:
        path: the file; made at the first header.
    Attributes:
        runs: the headers, in order.
        taken: of each header, the number of steps that were taken under it.
        links: the hash of every record so far; a report that holds one of them knows no more than this ledger.
        releases: of evaluation losses (release.py), in order.
        released: the last of them, where no step was taken since; else None.
        alarm: what a run found wrong with its own mechanism; then nothing in the folder has a guarantee.
    Raises:
        UserError: for a ledger that was edited, cannot be read, or (from the methods that write) cannot be written.
    """

    def __init__(self, path: Path):
        self.path = path
        self._size = 0
        self._lock = FileLock(f"{path}.lock")
        self.read()

    # Reading.

    def read(self) -> None:
        """Read the file anew."""
        self.runs: list[dict[str, Any]] = []
        self.taken: list[int] = []
        self.links = [FIRST_HASH]
        self.alarm: Optional[str] = None
        self.releases: list[dict[str, Any]] = []
        self.released: Optional[dict[str, Any]] = None
        try:
            content = self.path.read_bytes() if self.path.exists() else b""
        except OSError as error:
            raise UserError(
                f"{self.path} cannot be read ({error.strerror}): the privacy ledger must be a readable file"
            ) from error
        *lines, self._torn = content.split(b"\n")  # the last one is empty, unless a crash cut its record short
        self._size = len(content)
        self._taken_for: Optional[dict[str, Any]] = None
        number = 1  # of the line
        try:
            for line in lines:
                record = json.loads(line)
                if (found := record.pop("link")) != record_hash(self.links[-1], record):
                    raise ValueError("the chain is broken")
                self._count(record, found)
                number += 1
            if self._torn and self.runs:
                self._taken_for = self._truncated_record()
                logger.warning_once(f"The last record of {self.path} is incomplete; it counts as: {self._taken_for['record']}.")
                self._count(self._taken_for)
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            raise UserError(
                f"{self.path}, line {number} was changed after it was written: restore it, or start in a new --output_dir"
            ) from error

    def _truncated_record(self) -> dict[str, Any]:
        """Return what a record that was cut short is taken for: a release or an alarm if it says so, otherwise a step."""
        if found := TRUNCATED_RELEASE.match(self._torn):  # so much of it that a loss may follow
            return {"record": "release", "epsilon": float(found[1]), "split": json.loads(found[2]), "torn": True}
        if self._torn.startswith(b'{"record": "alarm"'):
            return {"record": "alarm", "found": "something, in a record that was cut short"}
        return {"record": "step", "step": self.steps + 1, "torn": True}

    def _count(self, record: dict[str, Any], its_link: Optional[str] = None) -> None:
        if record["record"] == "run":
            event_of_run(record, 0)  # which raises for a header without a mechanism
            self.taken.append(0)
            self.runs.append(record)
        elif record["record"] == "alarm":
            self.alarm = str(record["found"])
        elif record["record"] == "release":
            if not 0 < record["epsilon"] < math.inf:
                raise ValueError("a release that gives privacy back")
            release = {name: value for name, value in record.items() if name not in ("record", "link")}
            self.released = None if "torn" in release else release
            self.releases.append(release)
        elif record["step"] != self.steps + 1:
            raise ValueError("a step is missing")
        else:
            self._count_step()
        if its_link is not None:
            self.links.append(its_link)

    def _count_step(self) -> None:
        self.released = None
        self.taken[-1] += 1

    @property
    def last_release(self) -> Optional[dict[str, Any]]:
        """The newest evaluation loss that was told."""
        return next((release for release in reversed(self.releases) if "torn" not in release), None)

    @property
    def by_metrics(self) -> Optional[str]:
        """The option by which evaluation metrics chose the model of a run that took steps, if any."""
        taken = (header for header, steps in zip(self.runs, self.taken) if steps)
        return next((option for header in taken if (option := header.get("by_metrics"))), None)

    @property
    def last_run(self) -> dict[str, Any]:
        """The header of the last run that took steps, whose delta the reports have; of the very last one where none did."""
        return next((header for header, steps in zip(self.runs[::-1], self.taken[::-1]) if steps), self.runs[-1])

    @property
    def steps(self) -> int:
        """Number of steps of all runs."""
        return sum(self.taken)

    @property
    def spendings(self) -> list[MechanismEvent]:
        """What the steps under each header spend, by themselves: each run is a mechanism of its own."""
        return [event_of_run(header, steps) for header, steps in zip(self.runs, self.taken)]

    @property
    def accounted_steps(self) -> int:
        """Number of steps that the accountant counts: with noise bands, in how many an author's group was drawn, at most."""
        return sum(spending.steps for spending in self.spendings)

    def check_report(self, path: Path) -> dict[str, Any]:
        """Return the report at `path`; raise UserError where it knows of records that this ledger has lost."""
        try:
            report = json.loads(path.read_text())
            known = report["disable_dp"] or report["ledger_link"] in self.links
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is not a report of this program: restore it, or choose another folder") from error
        if not known:
            raise UserError(f"{self.path} lacks records that {path} knows of: restore the file, or start in a new --output_dir")
        return report

    # Writing.

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other runs out of the folder, and read what they wrote before.

        Raises:
            UserError: where another run is in there.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=LOCK_SECONDS, poll_interval=0.2)
        except Timeout as error:
            raise UserError(
                f"--output_dir {self.path.parent} is in use by another run: wait for its end, or choose another --output_dir"
            ) from error
        except OSError as error:
            raise self._unwritable(error) from error
        try:
            self.read()
            yield
        finally:
            self._lock.release()

    def start_run(self, header: dict[str, Any]) -> None:
        """Write the header of a run: the parameters of the steps that follow."""
        self._append({"record": "run", **header})

    def record_step(self) -> None:
        """Write one step of the current run to disk."""
        self._append({"record": "step", "step": self.steps + 1})

    def record_failure(self, found: str) -> None:
        """Write that the mechanism is not what this ledger says."""
        self._append({"record": "alarm", "found": found})

    def record_release(self, release: dict[str, Any]) -> None:
        """Write an evaluation loss, with what it spends, before anybody sees it.

        Args:
            release: with its epsilon and its split, which stand first: where the loss is on disk, so is what it cost.
        """
        first = {"record": "release", "epsilon": release["epsilon"], "split": release["split"]}
        self._append({**first, **release})

    def epsilon_with_releases(self, epsilon: float) -> float:
        """Return the epsilon of models and released evaluation losses together, for any author.

        An author whom one split decides on is trained on or held out, never both: then the larger counts. Otherwise (a validation
        file, runs that held out others, an older ledger) it is the sum.

        Args:
            epsilon: of the models.
        """
        released = sum(release["epsilon"] for release in self.releases)
        splits = {record.get("split") for record in [*self.runs, *self.releases]}
        return max(epsilon, released) if len(splits) == 1 and None not in splits else round_up(epsilon, released)

    def check_alarm(self) -> None:
        """Raise UserError where a run in this folder was stopped for its mechanism."""
        if self.alarm is not None:
            raise UserError(
                f"--output_dir {self.path.parent}: a run in it found that its mechanism is not what its ledger says; its models "
                f"have no guarantee: mend the mechanism, and choose another --output_dir. Found: {self.alarm}"
            )

    def _append(self, record: dict[str, Any]) -> None:
        self._repair_tail()
        self._count(record, self._write(record))

    def _repair_tail(self) -> None:
        """Write in place of a record that was cut short what it was taken for, if there is a run that it can belong to."""
        if not self._torn:
            return
        whole = self._size - len(self._torn)
        try:
            os.truncate(self.path, whole)
        except OSError as error:
            raise self._unwritable(error) from error
        self._size, self._torn = whole, b""
        if self._taken_for is not None:
            self.links.append(self._write(self._taken_for))

    def _write(self, record: dict[str, Any]) -> str:
        """Write, flush and fsync; return the link. Only the first record makes the file: one taken away must not begin anew."""
        its_link = record_hash(self.links[-1], record)
        line = json.dumps({**record, "link": its_link}).encode() + b"\n"
        try:
            created = 0 if self._size else os.O_CREAT
            descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | created, 0o644)
            try:
                if os.fstat(descriptor).st_size != self._size:
                    raise OSError(0, "another program has written to it")
                rest = memoryview(line)
                while rest:
                    rest = rest[os.write(descriptor, rest) :]  # where half a record had room, the second try says why
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            if created:
                fsync_folder(self.path.parent)
        except OSError as error:
            raise self._unwritable(error) from error
        self._size += len(line)
        return its_link

    def _unwritable(self, error: OSError) -> UserError:
        return UserError(
            f"{self.path} cannot be written ({error.strerror}): stopped before the next update. Make --output_dir writable, with "
            "free space, then go on with --resume_from_checkpoint True"
        )


def event_of_run(header: dict[str, Any], steps: int) -> MechanismEvent:
    """Return what so many steps of the run with that header spend."""
    mechanism = float(header["noise_multiplier"]), float(header["sample_rate"])
    bands = operator.index(header.get("noise_bands", 1))  # older versions knew of one only
    if bands < 1:
        raise ValueError("no number of bands")
    return cyclic_event(*mechanism, steps, bands)


def record_hash(previous: str, record: dict[str, Any]) -> str:
    """Return the hash that chains `record` to the one before it."""
    return hashlib.sha256(f"{previous}{json.dumps(record)}".encode()).hexdigest()


def reports_in(folder: Path) -> list[Path]:
    """Return each privacy.json of a run: that of its folder, while it holds a model, and those of its checkpoints."""
    return sorted([*folder.glob(REPORT_NAME), *folder.glob(f"checkpoint-*/{REPORT_NAME}")])


def read_private_count(folder: Path) -> Optional[int]:
    """Return the number of authors of the last run with --hide_counts in `folder`; None where that is not known."""
    try:
        return int(json.loads((folder / COUNTS_NAME).read_text())["num_authors"])
    except (OSError, ValueError, KeyError, TypeError):
        return None  # it guards from mistakes only


# --- what a folder has spent --------------------------------------------------------------------------------
