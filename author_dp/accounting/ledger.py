"""Record the privacy cost of every step of a run on disk, before the step is released.

Guarantees: `record_step` returns only when the record is on disk, so nothing is released that the ledger lacks. A step that is
recorded and then lost in a crash counts as spent. Records are chained by hashes (hash_chain.py): edited, removed and inserted
records are detected, and so is a missing end that some privacy.json knows of. Rewriting the complete chain and every report is
not detected.

Everything in the ledger is public, except the number of samples. --hide_counts leaves that number out, and the number of authors
too. The ledger holds no text, author, seed or duration of a step.

Example:

    >>> ledger = PrivacyLedger(Path("scratch") / LEDGER_NAME)
    >>> with ledger.locked():
    ...     ledger.start_run({"noise_multiplier": 0.7, "sample_rate": 0.01})
    ...     ledger.record_step()
"""

import json
import math
import operator
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Optional

from author_dp.accounting.accountant import epsilon_of, round_up
from author_dp.accounting.events import MechanismEvent, cyclic_event, slot_event
from author_dp.accounting.hash_chain import HashChain
from author_dp.errors import UserError
from author_dp.files import read_json_object
from author_dp.logs import get_logger

logger = get_logger(__name__)

LEDGER_NAME = "privacy_ledger.jsonl"
REPORT_NAME = "privacy.json"
COUNTS_NAME = "_counts.json"  # with --hide_counts: needed to resume; the leading _ keeps it out of uploads to the hub
TRUNCATED_RELEASE = re.compile(rb'\{"record": "release", "epsilon": ([^,]+), "split": (null|"[^"]*"), ')


class PrivacyLedger:
    """Records of all runs in an output directory: a header per run, a record per step, released losses, failures.

    Args:
        path: the file. The first header creates it.
    Attributes:
        runs: the headers, in order.
        steps_per_run: the number of steps under each header.
        releases: all released evaluation losses (loss_release.py), in order.
        current_release: the last release, if no step followed it; else None.
        failure: how a run's mechanism differed from this ledger; then no result in the directory has a guarantee.
    Raises:
        UserError: if the ledger was edited, cannot be read, or (from methods that write) cannot be written.
    """

    def __init__(self, path: Path):
        self.path, self._chain = path, HashChain(path)
        self.read()

    # Reading.

    def read(self) -> None:
        """Read the file again."""
        self.runs: list[dict[str, Any]] = []
        self.steps_per_run: list[int] = []
        self.releases: list[dict[str, Any]] = []
        self.current_release: Optional[dict[str, Any]] = None
        self.failure: Optional[str] = None
        self._replacement: Optional[dict[str, Any]] = None  # of a truncated last record
        records = self._chain.read()
        try:
            for record in records:
                self._apply(record)
            if self._chain.truncated and self.runs:
                self._replacement = interpret_truncated_ledger(self._chain.truncated, self.steps + 1)
                logger.warning_once(f"The last record of {self.path} is truncated. It counts as: {self._replacement['record']}.")
                self._apply(self._replacement)
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            line = len(self._chain.record_hashes)
            raise UserError(
                f"{self.path}: line {line} was changed after it was written. Restore the file, or use a new --output_dir"
            ) from error
        self.failure = self.failure or find_reported_alarm(self.path.parent)

    def _apply(self, record: dict[str, Any]) -> None:
        """Update the attributes by one record; raise ValueError, KeyError, TypeError or IndexError for an invalid one."""
        check_ledger_record(record)
        if record["record"] == "run":
            self.steps_per_run.append(0)
            self.runs.append(record)
        elif record["record"] == "alarm":
            self.failure = str(record["found"])
        elif record["record"] == "release":
            release = {name: value for name, value in record.items() if name != "record"}
            self.current_release = None if "torn" in release else release
            self.releases.append(release)
        elif record["step"] != self.steps + 1:
            raise ValueError("a step is missing")
        else:
            self.current_release = None
            self.steps_per_run[-1] += 1

    @property
    def record_hashes(self) -> list[str]:
        """That of an empty ledger, then the hash of every record. A report that names one of the latter was made from these."""
        return self._chain.record_hashes

    @property
    def last_release(self) -> Optional[dict[str, Any]]:
        """The newest evaluation loss that was disclosed."""
        return next((release for release in reversed(self.releases) if "torn" not in release), None)

    @property
    def released_epsilon(self) -> float:
        """The epsilon of all released evaluation losses, for held-out authors."""
        return sum(release["epsilon"] for release in self.releases)

    @property
    def by_metrics(self) -> Optional[str]:
        """The option by which evaluation metrics chose the model of a run with steps, if any."""
        with_steps = (header for header, steps in zip(self.runs, self.steps_per_run) if steps)
        return next((option for header in with_steps if (option := header.get("by_metrics"))), None)

    @property
    def last_run(self) -> dict[str, Any]:
        """The header of the last run with steps, whose delta the reports use; the last header if no run has steps."""
        newest_first = zip(self.runs[::-1], self.steps_per_run[::-1])
        return next((header for header, steps in newest_first if steps), self.runs[-1])

    @property
    def steps(self) -> int:
        """The number of steps of all runs."""
        return sum(self.steps_per_run)

    @property
    def events(self) -> list[MechanismEvent]:
        """The mechanism event of each run, accounted separately: each run is a mechanism of its own.

        With balls-in-bins sampling they cost more than the run: see `certificate`.
        """
        return [ledger_event_of_run(header, steps) for header, steps in zip(self.runs, self.steps_per_run)]

    @property
    def accounted_steps(self) -> int:
        """The number of steps in the accounting. With noise bands, an author's group is sampled in at most so many."""
        return sum(event.steps for event in self.events)

    @property
    def runs_with_steps(self) -> list[tuple[dict[str, Any], int]]:
        """The header of each run that took steps, and their number."""
        return [(header, steps) for header, steps in zip(self.runs, self.steps_per_run) if steps]

    @property
    def certificate(self) -> Optional[dict[str, Any]]:
        """The certificate of the last run with steps, if it is of all steps in the ledger (slot_certificates.py)."""
        runs = self.runs_with_steps
        certificate = runs[-1][0].get("certificate") if runs else None
        is_certified = certificate and self.failure is None and ledger_is_certified(certificate, runs[:-1], runs[-1][1])
        return certificate if is_certified else None

    def certificate_at(self, delta: float) -> Optional[dict[str, Any]]:
        """Return `certificate` if it holds at that delta, too: at its own, and at any larger one."""
        return self.certificate if self.certificate and delta >= self.certificate["delta"] else None

    def epsilon(self, delta: float, *more_events: MechanismEvent) -> float:
        """Return the epsilon of all recorded steps and `more_events`; inf after a failure."""
        if self.failure is not None:
            return math.inf
        certificate = None if any(event.steps for event in more_events) else self.certificate_at(delta)
        if certificate:
            return round_up(certificate["epsilon"])
        return epsilon_of([*self.events, *more_events], delta)

    def epsilon_with_releases(self, epsilon: float) -> float:
        """Return the epsilon of models and released evaluation losses together, for any author.

        If all runs and releases share one split, each author is either trained on or held out. Then the larger epsilon counts.
        Otherwise (a validation file, runs that held out other authors, an older ledger) the sum counts.

        Args:
            epsilon: of the models.
        """
        splits = {record.get("split") for record in [*self.runs, *self.releases]}
        one_split = len(splits) == 1 and None not in splits
        return max(epsilon, self.released_epsilon) if one_split else round_up(epsilon, self.released_epsilon)

    # Checks.

    def check_report(self, path: Path) -> dict[str, Any]:
        """Return the report at `path`; raise UserError if it knows of records that this ledger lacks."""
        try:
            report = json.loads(path.read_text(encoding="utf-8"))
            known = report["disable_dp"] or report["ledger_link"] in self.record_hashes
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: not a report of this program. Restore it, or choose another directory") from error
        if not known:
            raise UserError(f"{self.path}: lacks records that {path} knows of. Restore the file, or use a new --output_dir")
        return report

    def check_no_failure(self) -> None:
        """Raise UserError if the mechanism of a run in this directory failed."""
        if self.failure is not None:
            raise UserError(
                f"--output_dir {self.path.parent}: the mechanism of a run in it was not as recorded in its ledger, so its models "
                f"have no guarantee. Fix the mechanism, and choose another --output_dir. The failure: {self.failure}"
            )

    # Writing.

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other runs out of the directory, and read what they wrote before.

        Raises:
            UserError: if another run holds the lock.
        """
        with self._chain.locked():
            self.read()
            yield

    def start_run(self, header: dict[str, Any]) -> None:
        """Write the header of a run: the parameters of the steps that follow."""
        self._append({"record": "run", **header})

    def record_step(self) -> None:
        """Write one step of the current run to disk."""
        self._append({"record": "step", "step": self.steps + 1})

    def record_failure(self, failure: str) -> None:
        """Write that the mechanism is not as recorded in this ledger."""
        self._append({"record": "alarm", "found": failure})

    def record_release(self, release: dict[str, Any]) -> None:
        """Write an evaluation loss with its epsilon, before the loss is disclosed.

        Args:
            release: with the keys "epsilon" and "split". These are written first: if the loss is on disk, so is its cost.
        """
        cost = {"record": "release", "epsilon": release["epsilon"], "split": release["split"]}
        self._append({**cost, **release})

    def _append(self, record: dict[str, Any]) -> None:
        check_ledger_record(record)  # before it is written: the ledger could not be read again
        self._chain.repair_tail(self._replacement)
        self._chain.append(record)
        self._apply(record)


def check_ledger_record(record: dict[str, Any]) -> None:
    """Raise ValueError, KeyError or TypeError for a header without a mechanism, or a release without a valid epsilon."""
    if record["record"] == "run":
        ledger_event_of_run(record, 0)
        if record.get("slots") is not None:
            ledger_is_certified(record["certificate"], [], 0)
            made = record["certificate"]
            if (made["noise_multiplier"], len(made["coefficients"])) != (record["noise_multiplier"], record["noise_bands"]):
                raise ValueError("the certificate is of other noise")
    elif record["record"] == "release" and not 0 < record["epsilon"] < math.inf:
        raise ValueError("the epsilon of a release must be above 0 and finite")


def interpret_truncated_ledger(tail: bytes, next_step: int) -> dict[str, Any]:
    """Return the record that a truncated one counts as: a release or failure if it says so, otherwise a step."""
    if found := TRUNCATED_RELEASE.match(tail):  # long enough that the loss may follow
        return {"record": "release", "epsilon": float(found[1]), "split": json.loads(found[2]), "torn": True}
    if tail.startswith(b'{"record": "alarm"'):
        return {"record": "alarm", "found": "unknown, as its record is truncated"}
    return {"record": "step", "step": next_step, "torn": True}


def find_ledger_reports(folder: Path) -> list[Path]:
    """Return the privacy.json of a run, if it saved its model, and those of its checkpoints."""
    return sorted([*folder.glob(REPORT_NAME), *folder.glob(f"checkpoint-*/{REPORT_NAME}")])


def find_reported_alarm(folder: Path) -> Optional[str]:
    """Return the failure that a report beside a ledger, or of its checkpoints, knows of: the ledger could not be written then."""
    for path in find_ledger_reports(folder):
        with suppress(OSError, UserError):
            if path.is_file() and (alarm := read_json_object(path).get("alarm")):
                return str(alarm)
    return None


def ledger_event_of_run(header: dict[str, Any], steps: int) -> MechanismEvent:
    """Return the mechanism event of `steps` steps of the run with that header.

    Raises:
        KeyError, TypeError, ValueError: if the header describes no mechanism.
    """
    noise_multiplier = float(header["noise_multiplier"])
    bands = operator.index(header.get("noise_bands", 1))  # older versions had one band only
    if bands < 1:
        raise ValueError("noise_bands must be at least 1")
    if header.get("slots") is None:
        return cyclic_event(noise_multiplier, float(header["sample_rate"]), steps, bands)
    if bands > (slots := operator.index(header["slots"])):
        raise ValueError("noise_bands must be at most the steps of an epoch")
    return slot_event(noise_multiplier, slots, steps)


def ledger_is_certified(certificate: dict[str, Any], earlier: Sequence[tuple[dict[str, Any], int]], steps: int) -> bool:
    """Return whether a certificate is of at most so many steps of its run, after exactly these of earlier ones.

    Args:
        earlier: header and steps of each earlier run.
    """
    return [[header["name"], taken] for header, taken in earlier] == certificate["earlier"] and steps <= certificate["steps"]


def read_ledger_private_count(folder: Path) -> Optional[int]:
    """Return the number of authors of the last run with --hide_counts in `folder`; None if unknown."""
    try:
        return int(json.loads((folder / COUNTS_NAME).read_text(encoding="utf-8"))["num_authors"])
    except (OSError, ValueError, KeyError, TypeError):
        return None  # the number guards against mistakes only
