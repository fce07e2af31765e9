"""Make privacy.json from a plan and a ledger: the only place where spent epsilon is computed for a report.

Example:

    >>> make_privacy_report(plan, ledger)["epsilon"]
    7.98
"""

import math
from pathlib import Path
from typing import Any, Optional

from author_dp.accounting.accountant import accountant_of
from author_dp.accounting.ledger import PrivacyLedger
from author_dp.accounting.plan import PrivacyPlan, plan_of
from author_dp.accounting.tradeoff import attack_bounds, certified_attack_bounds

PLAN_KEYS = (
    "delta", "target_epsilon", "noise_multiplier", "clip_norm", "sample_rate", "expected_batch_size", "noise_bands",
    "num_authors", "num_samples", "samples_per_author", "clipping", "world_size", "disable_dp",
)  # fmt: skip
MECHANISM_KEYS = ("noise_multiplier", "sample_rate", "noise_bands", "clip_norm", "samples_per_author")


def make_privacy_report(plan: PrivacyPlan, ledger: PrivacyLedger, steps: int = 0) -> dict[str, Any]:
    """Return privacy.json of a run.

    Args:
        steps: of the training, reported if there is no privacy and hence no ledger.
    """
    if plan.disable_dp:
        return privacy_report_of_plan(plan, steps)
    report = privacy_report_of_plan(plan, ledger.steps) | privacy_report_of_spending(ledger, plan.delta)
    if ledger.releases:
        report["evaluation_release"] = ledger.last_release
    return {**report, "ledger_link": ledger.record_hashes[-1]}


def recompute_privacy_report(path: Path, ledger: PrivacyLedger) -> dict[str, Any]:
    """Return the report at `path`, updated by all steps in its ledger.

    If the run has not finished and there is no file, the report is of the ledger's last run and certifies no weights.

    Raises:
        UserError: for a report that knows of records that the ledger lacks.
    """
    report = ledger.check_report(path) if path.exists() else make_interrupted_privacy_report(ledger)
    if report["disable_dp"] or not (ledger.steps or ledger.failure):
        return report
    return report | privacy_report_of_spending(ledger, report["delta"])


def make_interrupted_privacy_report(ledger: PrivacyLedger) -> dict[str, Any]:
    """Return the report of an interrupted run, without what it has spent."""
    plan = plan_of(ledger.last_run)
    return {**privacy_report_of_plan(plan, ledger.steps), "interrupted": True, "ledger_link": ledger.record_hashes[-1]}


def privacy_report_of_plan(plan: PrivacyPlan, steps: int) -> dict[str, Any]:
    """Return the entries of privacy.json that follow from the plan.

    Epsilon is null until `privacy_report_of_spending` replaces it.
    """
    public = plan.to_public_dict()
    if plan.disable_dp:
        public |= dict.fromkeys(("delta", "noise_multiplier", "clip_norm", "clipping"))
    return {
        "privacy_unit": "author",
        "adjacency": "add-or-remove-one",
        "accountant": "prv",
        "sampling": plan.sampling,
        **({"slots": plan.slots} if plan.slots else {}),
        "epsilon": None,
        **{name: public[name] for name in PLAN_KEYS},
        "steps": steps,
        "accounted_steps": None if plan.slots else steps,
        "accounted_sample_rate": None if plan.slots else plan.event(0).sample_rate,
    }


def privacy_report_of_spending(ledger: PrivacyLedger, delta: float) -> dict[str, Any]:
    """Return the entries of privacy.json that follow from the steps, releases and failures in the ledger.

    Args:
        delta: of the guarantee.
    """
    epsilon, certificate = ledger.epsilon(delta), ledger.certificate_at(delta)
    has_slots = any(header.get("slots") for header, _ in ledger.runs_with_steps)
    if not math.isfinite(epsilon):
        bounds = attack_bounds([], delta)
    else:
        bounds = certified_attack_bounds(epsilon, delta, ledger.events) if has_slots else attack_bounds(ledger.events, delta)
    # Of the first run: a later one's date tells how long that took.
    started = ledger.runs[0].get("started") if ledger.runs else None
    entries = {
        **({} if started is None else {"started": started}),
        "accountant": "monte-carlo" if certificate else accountant_of(ledger.events, delta),
        "epsilon": finite_or_none(epsilon),
        "steps": ledger.steps,
        "accounted_steps": None if has_slots else ledger.accounted_steps,
        **({"certificate": certificate} if certificate else {}),
        **({"split": ledger.runs[-1].get("split")} if ledger.runs else {}),
        **privacy_report_of_mechanism(ledger),
        **({} if ledger.failure is None else {"alarm": ledger.failure}),
        # Of any run: one that restarts without the option has the settings, and maybe steps, of one that a search ran.
        **({"tuning": {"ended": False}} if any(header.get("part_of_search") for header in ledger.runs) else {}),
        **bounds,
    }
    if ledger.releases:
        entries["epsilon_with_evaluation"] = finite_or_none(ledger.epsilon_with_releases(epsilon))
    return entries


def privacy_report_of_mechanism(ledger: PrivacyLedger) -> dict[str, Any]:
    """Return the entry `mechanisms`, each with its steps, where the ledger's steps had several: other entries are of one only."""
    steps: dict[tuple, int] = {}
    for header, number in ledger.runs_with_steps:
        mechanism = tuple((name, header.get(name)) for name in [*MECHANISM_KEYS, *(["slots"] if header.get("slots") else [])])
        steps[mechanism] = steps.get(mechanism, 0) + number
    if len(steps) < 2:
        return {}
    return {"mechanisms": [{"steps": number, **dict(mechanism)} for mechanism, number in steps.items()]}


def finite_or_none(epsilon: float) -> Optional[float]:
    """Return epsilon, or None if it is infinite, which JSON cannot hold."""
    return epsilon if math.isfinite(epsilon) else None
