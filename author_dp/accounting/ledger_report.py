"""Report what the runs of one ledger, or of several, spent together."""

import math
from pathlib import Path
from typing import Any, Optional

from author_dp.accounting.accountant import accountant_of, epsilon_of, format_guarantee, round_up
from author_dp.accounting.ledger import LEDGER_NAME, PrivacyLedger, event_of_run, reports_in
from author_dp.accounting.plan import plan_of
from author_dp.accounting.tradeoff import attack_bounds
from author_dp.errors import UserError


def format_ledger(ledger: PrivacyLedger, delta: Optional[float] = None) -> str:
    """Return in words what the ledger says was spent, computed anew, and what one more run like its last would cost.

    Args:
        delta: at which epsilon is asked for; by default that of the last run.
    """
    last = ledger.last_run
    delta = delta or last["delta"]
    again = event_of_run(last, last["steps"])
    lines = [f"{ledger.path}: runs {len(ledger.runs)}, steps {ledger.steps:,}, records unbroken"]
    for number, (header, steps) in enumerate(zip(ledger.runs, ledger.taken), 1):
        bands = header.get("noise_bands", 1)
        accounted = event_of_run(header, steps)
        lines.append(
            f"  run {number}: {steps:,} of {header['steps']:,} steps, noise multiplier {header['noise_multiplier']:.4f}, "
            f"sample rate {header['sample_rate']:.6g} of {format_num_authors(header)}, clip norm {header['clip_norm']:g}"
            + (f", {bands} noise bands: {accounted.steps:,} steps at {accounted.sample_rate:.6g}" if bands > 1 else "")
        )
    spent, after = (epsilon_of(spendings, delta) for spendings in (ledger.spendings, [*ledger.spendings, again]))
    target = last["target_epsilon"]
    if ledger.alarm is not None:
        lines.append(f"  ALARM: the mechanism was not what this ledger says: {ledger.alarm}")
        spent = after = math.inf
    together = []
    if ledger.releases:
        total, words = sum(release["epsilon"] for release in ledger.releases), "epsilon {:g} for the held-out authors"
        together = [
            f"  evaluation losses released: {len(ledger.releases)}, with {words.format(total)}",
            f"  models and these losses together: {format_guarantee(ledger.epsilon_with_releases(spent), delta)}",
        ]
    return "\n".join(
        [
            *lines,
            f"  spent: {format_guarantee(spent, delta)}",
            *together,
            "  promised: " + (f"epsilon {target:g}" if target is not None else "no target, the noise was given"),
            f"  after one more run of {last['steps']:,} steps: {format_guarantee(after, delta)}",
        ]
    )


def format_num_authors(header: dict[str, Any]) -> str:
    number = header["num_authors"]
    return "an untold number of authors" if number is None else f"{number:,} authors"


def format_joint(ledgers: list[PrivacyLedger], delta: Optional[float] = None) -> str:
    """Return in words what several folders have spent on authors that are in all of them, at one delta.

    All that was released from them is one mechanism, the steps of all ledgers in a row; its epsilon is less than the sum. To it
    the released evaluation losses are added, as another split holds out other authors.

    Args:
        delta: by default that of the last runs, if they have the same one.
    Raises:
        UserError: where they have not, or a record is in two of the ledgers and would be counted twice.
    """
    check_no_shared_records(ledgers)
    deltas = {ledger.last_run["delta"] for ledger in ledgers}
    if delta is None:
        if len(deltas) > 1:
            raise UserError(
                f"the folders have different deltas ({', '.join(map(str, sorted(deltas)))}): give one DELTA for all at the end"
            )
        (delta,) = deltas
    lines, spendings = [], []
    for ledger in ledgers:
        own = epsilon_of(ledger.spendings, delta) if ledger.alarm is None else math.inf
        authors = sorted({format_num_authors(header) for header in ledger.runs})
        lines.append((f"{ledger.path}: steps {ledger.steps:,} on {', '.join(authors)}", own))
        spendings += ledger.spendings
    alone = [own for _, own in lines]
    together = epsilon_of(spendings, delta) if max(alone) < math.inf else math.inf
    released = sum(release["epsilon"] for ledger in ledgers for release in ledger.releases)
    with_losses = f"  with the evaluation losses that they released: {format_guarantee(round_up(together, released), delta)}"
    return "\n".join(
        [
            *(f"{words}: {format_guarantee(own, delta)}" for words, own in lines),
            f"  together: {format_guarantee(together, delta)}, for an author who is in all of them",
            *([with_losses] if released else []),
            f"  their sum, for comparison: {format_guarantee(round_up(*alone), len(alone) * delta)}",
            "  This holds where the options of each run were chosen without a look at private results. Options that were chosen",
            "  by looking at earlier private results (losses, models) need more than this: composition that allows for adaptive",
            "  choices of noise and sample rate, and a choice by losses that are not private has no bound at all.",
        ]
    )


def check_no_shared_records(ledgers: list[PrivacyLedger]) -> None:
    """Raise UserError where two ledgers hold the same record: one is the other, or a copy, and would be counted twice."""
    owners: dict[str, Path] = {}
    for ledger in ledgers:
        for its_link in ledger.links[1:]:
            if (other := owners.setdefault(its_link, ledger.path)) is not ledger.path:
                raise UserError(
                    f"OUTPUT_DIR {ledger.path.parent} and {other.parent} share records of one run, which would be counted twice: "
                    "give each folder once, and of a copy that went on only the one with all steps"
                )


def main(arguments: list[str]) -> None:
    folders, delta = list(arguments), None
    if len(folders) > 1 and not Path(folders[-1]).is_dir():
        try:
            delta = float(folders[-1])
            folders.pop()
        except ValueError:
            pass  # a folder, which is not there
    if not folders or any(folder.startswith("-") for folder in folders):
        raise UserError("usage: python -m author_dp.ledger OUTPUT_DIR... [DELTA]")
    if delta is not None and not 0 < delta < 1:
        raise UserError(f"DELTA {arguments[-1]} must be a number above 0 and below 1")
    ledgers = []
    for folder in map(Path, folders):
        ledger = PrivacyLedger(folder / LEDGER_NAME)
        if not ledger.runs:
            raise UserError(f"OUTPUT_DIR {folder} holds no {LEDGER_NAME} with a run in it: give the --output_dir of a run")
        for path in reports_in(folder):
            ledger.check_report(path)
        ledgers.append(ledger)
    print(format_ledger(ledgers[0], delta) if len(ledgers) == 1 else format_joint(ledgers, delta))


def recompute_report(path: Path, ledger: PrivacyLedger) -> dict[str, Any]:
    """Return the report at `path` with what all steps of its ledger have spent since.

    Where there is no file, since the run has not finished, the report is of the ledger's last run and certifies nothing.

    Raises:
        UserError: for a report that knows more than the ledger does.
    """
    report = ledger.check_report(path) if path.exists() else make_ledger_report(ledger)
    if not report["disable_dp"] and ledger.steps:
        accounted = ledger.spendings, report["delta"]
        epsilon = epsilon_of(*accounted) if ledger.alarm is None else math.inf
        report |= {"epsilon": epsilon if math.isfinite(epsilon) else None, "steps": ledger.steps}
        report["accountant"] = accountant_of(*accounted)
        if ledger.releases:
            together = ledger.epsilon_with_releases(epsilon)
            report["epsilon_with_evaluation"] = together if math.isfinite(together) else None
        report["accounted_steps"] = ledger.accounted_steps
        report |= attack_bounds(ledger.spendings if report["epsilon"] is not None else [], report["delta"])
    return report


def make_ledger_report(ledger: PrivacyLedger) -> dict[str, Any]:
    """Return the report of an interrupted run, without what it has spent."""
    alarm = {} if ledger.alarm is None else {"alarm": ledger.alarm}
    report = plan_of(ledger.last_run).report(math.inf, ledger.steps)
    return {**report, **alarm, "interrupted": True, "ledger_link": ledger.links[-1]}
