"""Report what the runs of one ledger, or of several, have spent together.

python -m author_dp.ledger OUTPUT_DIR... [DELTA]
"""

import math
import sys
from pathlib import Path
from typing import Any, Optional

from author_dp.accounting.accountant import MIN_DELTA, epsilon_of, format_guarantee, round_up
from author_dp.accounting.events import delta_promises_nothing
from author_dp.accounting.ledger import LEDGER_NAME, PrivacyLedger, find_ledger_reports, ledger_event_of_run
from author_dp.accounting.slot_certificates import certify_epsilon, repeat_certificate, slot_segment_of
from author_dp.errors import UserError
from author_dp.validation import check_usage
from author_dp.wording import format_count

ADAPTIVE_CHOICES = """\
  This holds if the options of each run were chosen without looking at private results. Options chosen by
  looking at earlier private results (losses, models) need more than this: composition with adaptive choices
  of noise and sample rate. A choice by losses that are not private has no bound at all."""

EMPTY_PROMISE = "  This promises nothing: an author is in any step with a probability of about this delta. Give a smaller DELTA"


def format_ledger(ledger: PrivacyLedger, delta: Optional[float] = None) -> str:
    """Describe what the ledger's runs have spent, computed again, and the cost of one more run like the last.

    Args:
        delta: at which to report epsilon; by default that of the last run with steps.
    """
    last = ledger.last_run
    delta = delta or last["delta"]
    spent, after = ledger.epsilon(delta), ledger.epsilon(delta, ledger_event_of_run(last, last["steps"]))
    target = last["target_epsilon"]
    lines = [f"{ledger.path}: runs {len(ledger.runs)}, steps {ledger.steps:,}, hash chain intact"]
    for number, (header, steps) in enumerate(zip(ledger.runs, ledger.steps_per_run), 1):
        lines.append(f"  run {number}: {format_ledger_run(header, steps)}")
    if ledger.failure is not None:
        lines.append(f"  FAILURE: the mechanism was not as recorded in this ledger: {ledger.failure}")
    lines.append(f"  spent: {format_guarantee(spent, delta)}")
    if ledger.certificate_at(delta):
        lines.append(format_ledger_certificate(ledger))
    if ledger.steps and delta_promises_nothing(ledger.events, delta):
        lines.append(EMPTY_PROMISE)
    if ledger.releases:
        lines += [
            f"  released evaluation losses: {len(ledger.releases)}, epsilon {ledger.released_epsilon:g} for held-out authors",
            f"  models and these losses together: {format_guarantee(ledger.epsilon_with_releases(spent), delta)}",
        ]
    return "\n".join(
        [
            *lines,
            "  target: " + (f"epsilon {target:g}" if target is not None else "none, the noise multiplier was given"),
            f"  after one more run of {format_count(last['steps'], 'step')}: {format_guarantee(after, delta)}"
            + (" by a bound that does not count on secret slots" if last.get("slots") else ""),
        ]
    )


def format_ledger_run(header: dict[str, Any], steps: int) -> str:
    """Describe one run of a ledger: its steps and its mechanism."""
    words = (
        f"{steps:,} of {format_count(header['steps'], 'step')}, noise multiplier {header['noise_multiplier']:.4f}, "
        f"{format_ledger_sampling(header)} of {format_ledger_num_authors(header)}, clip norm {header['clip_norm']:g}"
    )
    bands = header.get("noise_bands", 1)
    if bands > 1 and header.get("slots"):
        words += f", {bands} noise bands"
    elif bands > 1:
        event = ledger_event_of_run(header, steps)
        words += f", {bands} noise bands: accounted as {format_count(event.steps, 'step')} at sample rate {event.sample_rate:.6g}"
    return words


def format_ledger_sampling(header: dict[str, Any]) -> str:
    """Return how a run sampled authors."""
    if slots := header.get("slots"):
        return f"balls-in-bins sampling in {slots:,} slots"
    return f"sample rate {header['sample_rate']:.6g}"


def format_ledger_certificate(ledger: PrivacyLedger) -> str:
    """Repeat the certificate of the ledger's steps by its key, and describe it.

    Raises:
        UserError: if it does not pass.
    """
    certificate, (*earlier, (last, _)) = ledger.certificate, ledger.runs_with_steps
    assert certificate is not None
    try:
        passed = repeat_certificate(last, [slot_segment_of(header, steps) for header, steps in earlier])
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise UserError(f"{ledger.path}: its certificate was changed after it was made. Restore the file") from error
    if not passed:
        raise UserError(
            f"{ledger.path}: the certificate of its balls-in-bins sampling does not pass when its draws are repeated (made with "
            f"numpy {certificate['numpy']}). Use that version, or a new --output_dir"
        )
    delta = max(certificate["attempts"][-1]["bounds"].values())
    words = f"  certificate: {certificate['draws']:,} draws, repeated by their key; they bound delta by {delta:.3g}"
    return words + ("; it holds if no run was stopped because of its results" if earlier else "")


def format_ledger_num_authors(header: dict[str, Any]) -> str:
    """Return the number of authors of a run, if it is public."""
    number = header["num_authors"]
    return "an undisclosed number of authors" if number is None else f"{number:,} authors"


def format_joint_ledgers(ledgers: list[PrivacyLedger], delta: Optional[float] = None) -> str:
    """Describe what several output directories have spent on authors that are in all of them.

    All their releases are one mechanism, the steps of all ledgers composed; its epsilon is less than the sum. The epsilon of
    released evaluation losses is added, as another split holds out other authors.

    Args:
        delta: one for all; by default that of the last runs, if they agree.
    Raises:
        UserError: if they do not agree, or a record is in two ledgers and would be counted twice.
    """
    check_no_shared_ledger_records(ledgers)
    deltas = sorted({ledger.last_run["delta"] for ledger in ledgers})
    if delta is None and len(deltas) > 1:
        raise UserError(f"DELTA: the runs have different deltas ({', '.join(map(str, deltas))}). Add one DELTA as last argument")
    delta = deltas[0] if delta is None else delta
    epsilons = [ledger.epsilon(delta) for ledger in ledgers]
    events = [event for ledger in ledgers for event in ledger.events]
    joint = epsilon_of(events, delta) if max(epsilons) < math.inf else math.inf
    runs = [run for ledger in ledgers for run in ledger.runs_with_steps]
    if runs and joint < math.inf and all(header.get("slots") for header, _ in runs):
        joint = round_up(certify_epsilon([slot_segment_of(*run) for run in runs], delta, joint))
    lines = []
    for ledger, epsilon in zip(ledgers, epsilons):
        authors = ", ".join(sorted({format_ledger_num_authors(header) for header in ledger.runs}))
        lines.append(f"{ledger.path}: steps {ledger.steps:,} on {authors}: {format_guarantee(epsilon, delta)}")
        if ledger.certificate_at(delta):
            lines.append(format_ledger_certificate(ledger))
    lines.append(f"  together: {format_guarantee(joint, delta)}, for an author in all of them")
    if events and delta_promises_nothing(events, delta):
        lines.append(EMPTY_PROMISE)
    if released := sum(ledger.released_epsilon for ledger in ledgers):
        lines.append(f"  with their released evaluation losses: {format_guarantee(round_up(joint, released), delta)}")
    lines.append(f"  sum, for comparison: {format_guarantee(round_up(*epsilons), len(ledgers) * delta)}")
    return "\n".join([*lines, ADAPTIVE_CHOICES])


def check_no_shared_ledger_records(ledgers: list[PrivacyLedger]) -> None:
    """Raise UserError if two ledgers hold the same record: they are one file or copies, and would be counted twice."""
    owners: dict[str, Path] = {}
    for ledger in ledgers:
        for one_hash in ledger.record_hashes[1:]:
            if (other := owners.setdefault(one_hash, ledger.path)) is not ledger.path:
                raise UserError(
                    f"OUTPUT_DIR {ledger.path.parent} and {other.parent}: they share records of one run, which would be counted "
                    "twice. Give each directory once; of a run and its resumed copy, the one with all steps. If both took "
                    "further steps, give each alone, and add up their epsilons and deltas"
                )


def main(arguments: list[str]) -> None:
    """Print what the given output directories have spent."""
    check_usage(arguments, "author_dp.ledger OUTPUT_DIR... [DELTA]", range(1, sys.maxsize))
    folders, delta = list(arguments), None
    if len(folders) > 1 and not Path(folders[-1]).is_dir():
        try:
            delta = float(folders[-1])
            folders.pop()
        except ValueError:
            pass  # a directory that does not exist, which is refused below
    if delta is not None and not MIN_DELTA <= delta < 1:
        raise UserError(f"DELTA {arguments[-1]}: out of range. Give a number of at least {MIN_DELTA:g} and below 1")
    ledgers = []
    for folder in map(Path, folders):
        ledger = PrivacyLedger(folder / LEDGER_NAME)
        if not ledger.runs:
            raise UserError(f"OUTPUT_DIR {folder}: holds no {LEDGER_NAME} with a run in it. Give the --output_dir of a run")
        for path in find_ledger_reports(folder):
            ledger.check_report(path)
        if ledger.failure is not None:  # imported here, as it takes seconds
            from author_dp.accounting.voiding import void_again

            void_again(ledger)
        ledgers.append(ledger)
    print(format_ledger(ledgers[0], delta) if len(ledgers) == 1 else format_joint_ledgers(ledgers, delta))
