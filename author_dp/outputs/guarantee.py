"""Describe the guarantee of a result: as the rows of a table, and in plain words. Public values only.

The rows follow Ponomareva et al. 2023, How to DP-fy ML, arXiv 2303.00654, section 5.3.3.
"""

import math
from typing import Any, Optional

from author_dp.accounting.accountant import format_epsilon, format_guarantee, round_up
from author_dp.accounting.plan_text import LARGE_DELTA, format_plan_delta
from author_dp.training.loss_release import format_released_loss
from author_dp.wording import format_count, format_number, format_percent_up

Row = tuple[str, str]

INTERRUPTED = "nothing yet, as the run has not saved its model; epsilon is what the steps in its ledger have spent"
IN_SEARCH = "nothing yet: this is one run of a search, and the choice among its runs costs more. Only the search's result counts"


def report_has_guarantee(report: dict[str, Any]) -> bool:
    """Return whether the model has a guarantee, and so has the one it started from, if this program trained that too."""
    return not report.get("interrupted") and why_no_guarantee(report) is None


def guarantee_covers_base(report: dict[str, Any]) -> bool:
    """Return whether the model that the training started from has a guarantee, if this program trained it."""
    return report.get("base_model", {"covered": True})["covered"]


def guarantee_with_base(report: dict[str, Any]) -> Optional[tuple[float, float]]:
    """Return epsilon and delta for an author of this training and of those before, of the models that it started from.

    They add up (basic composition; Dwork and Roth 2014, Theorem 3.16). None without such a model, or without a guarantee.
    """
    trainings, model = [report], report.get("base_model")
    if model is None or report["epsilon"] is None or not guarantee_covers_base(report):
        return None
    while model is not None:
        trainings.append(model)
        model = model.get("base_model")
    return round_up(*(one["epsilon"] for one in trainings)), sum(one["delta"] for one in trainings)


def format_total_guarantee(report: dict[str, Any]) -> str:
    """Return the guarantee of a report in a few words, with that of the models before."""
    words = format_guarantee(report["epsilon"], report["delta"])
    both = guarantee_with_base(report)
    return f"{words}; with the training of its starting model, {format_guarantee(*both)}" if both else words


def guarantee_in_search(report: dict[str, Any]) -> bool:
    """Return whether the model is one run of a search that has not ended, or not its best."""
    return "tuning" in report and not report["tuning"]["ended"]


def guarantee_is_tuned(report: dict[str, Any]) -> bool:
    """Return whether the model is the result of a search, and epsilon that of the search."""
    return "tuning" in report and report["tuning"]["ended"]


def guarantee_table_rows(report: dict[str, Any]) -> list[Row]:
    """Return name and value of each row of the table.

    Args:
        report: content of privacy.json.
    """
    if report["disable_dp"]:
        return [("Guarantee", "none: trained with --disable_dp")]
    if report.get("alarm"):
        return [("Guarantee", f"none: the run found that its mechanism is not what its ledger says ({report['alarm']})")]
    return [
        ("Guarantee", format_guarantee(report["epsilon"], report["delta"])),
        *([("Certified", format_interrupted_guarantee(report))] if report.get("interrupted") else []),
        *([("Certified", IN_SEARCH)] if guarantee_in_search(report) else []),
        *([("Starting model", format_guarantee_model(report["base_model"]))] if "base_model" in report else []),
        *([("With its training", format_guarantee(*both))] if (both := guarantee_with_base(report)) else []),
        ("Setting", "central: the trainer sees the data, the public sees the model"),
        ("Definition", "approximate DP, (epsilon, delta)"),
        ("Privacy unit", "one author with all samples"),
        ("Adjacency", "add or remove one author"),
        ("What is covered", f"{format_guarantee_coverage(report)}; the training data only, not the base model's"),
        ("Mechanism", f"DP-SGD on authors: {format_guarantee_sampling(report)}, per-author clipping, Gaussian noise"),
        ("Accountant", f"{format_guarantee_accountant(report)}, {format_guarantee_events(report)}"),
        ("Epsilon", format_guarantee_epsilon(report["epsilon"])),
        ("Target epsilon", format_number(report["target_epsilon"])),
        ("Delta", format_number(report["delta"])),
        *guarantee_attack_rows(report),
        ("Noise multiplier", format_number(report["noise_multiplier"])),
        ("Clip norm", f"{format_number(report['clip_norm'])} for each author's gradient"),
        ("Authors", "not disclosed" if report["num_authors"] is None else format_number(report["num_authors"])),
        *([("Sample rate", format_number(report["sample_rate"]))] if "slots" not in report else []),
        *guarantee_noise_band_rows(report),
        ("Expected batch", f"{format_number(report['expected_batch_size'])} authors"),
        ("Samples of an author per step", f"at most {report['samples_per_author']}"),
        ("Steps", format_number(report["steps"])),
        *guarantee_mechanism_rows(report),
        *guarantee_row_limit(report),
        ("Tuning", format_guarantee_tuning(report)),
        *guarantee_release_rows(report),
        *guarantee_audit_rows(report),
    ]


def format_interrupted_guarantee(report: dict[str, Any]) -> str:
    """Describe what is certified of a run that has not saved its model."""
    zero = "; that of so few steps is 0, as they can disclose anyone with a probability of at most delta"
    return INTERRUPTED + (zero if report["epsilon"] == 0 else "")


def guarantee_mechanism_rows(report: dict[str, Any]) -> list[Row]:
    """Return a row where the steps in the folder had several mechanisms, which epsilon composes."""
    found = [
        f"{format_count(one['steps'], 'step')} with noise multiplier {format_number(one['noise_multiplier'])}, "
        + (f"{one['slots']:,} slots" if "slots" in one else f"sample rate {format_number(one['sample_rate'])}")
        + f" and clip norm {format_number(one['clip_norm'])}"
        for one in report.get("mechanisms") or []
    ]
    return [("Mechanisms of all steps", "; ".join(found))] if found else []


def format_guarantee_coverage(report: dict[str, Any]) -> str:
    """Describe what the guarantee is of."""
    if guarantee_is_tuned(report):
        return "the released weights, their settings and their released loss, and nothing else of the search"
    return "the released weights and every checkpoint"


def format_guarantee_sampling(report: dict[str, Any]) -> str:
    """Describe how authors are sampled."""
    if "slots" in report:
        return f"balls-in-bins sampling (each author in one of {report['slots']:,} steps, the same one in every epoch)"
    return "Poisson sampling"


def format_guarantee_accountant(report: dict[str, Any]) -> str:
    """Describe where epsilon comes from."""
    if report["accountant"] == "monte-carlo":
        failure = report["certificate"]["failure_probability"]
        return f"Monte Carlo (upper bound, except with probability {failure:.1g}, which is part of delta)"
    return f"{report['accountant'].upper()} (upper bound)"


def format_guarantee_events(report: dict[str, Any]) -> str:
    """Describe what epsilon counts."""
    if guarantee_is_tuned(report):
        return "the search: its runs, their scores and the choice of the best"
    return "all steps ever taken in this folder, lost ones included"


def format_guarantee_tuning(report: dict[str, Any]) -> str:
    """Describe what was searched, and what it cost; never how many runs there were."""
    if not guarantee_is_tuned(report):
        return "not included: each further run on the same authors adds its own epsilon"
    tuning = report["tuning"]
    grid = "; ".join(f"{name} of {', '.join(values)}" for name, values in tuning["grid"].items())
    return (
        f"included: the best, by its released loss, of a random number of runs ({tuning['law']}, "
        f"{format_number(tuning['expected_runs'])} expected), each with settings drawn at random ({grid}). A single run would "
        f"need the noise multiplier {format_number(tuning['single_noise_multiplier'])}"
    )


def format_guarantee_epsilon(epsilon: Optional[float]) -> str:
    return "none" if epsilon is None else format_epsilon(epsilon)


def format_guarantee_model(model: dict[str, Any]) -> str:
    """Describe the guarantee that a starting model has for its own authors.

    Args:
        model: from `privacy_statement.statement_starting_model`.
    """
    if not model["covered"]:
        return f"{model['name']} has no guarantee ({model['reason']})"
    words = f"{model['name']} has {format_guarantee(model['epsilon'], model['delta'])}, on top for authors of both trainings"
    return f"{words}; it started from {format_guarantee_model(model['base_model'])}" if "base_model" in model else words


def guarantee_attack_rows(report: dict[str, Any]) -> list[Row]:
    """Return bounds on the best membership inference: whether an author was in the data."""
    rows = []
    if report.get("mu_gdp") is not None:
        mu = math.ceil(report["mu_gdp"] * 1e3) / 1e3
        rows.append(("Gaussian DP", f"mu {mu:.3f}: as hard to tell apart as N(0, 1) and N(mu, 1)"))
    rates = [
        f"at most {format_percent_up(tpr)} at {100 * float(fpr):g} % FPR" for fpr, tpr in (report.get("tpr_at_fpr") or {}).items()
    ]
    if rates:
        meaning = "TPR: share of the authors in the data who are found; FPR: share of all others who are wrongly accused"
        rows.append(("Membership inference", f"TPR {', '.join(rates)} ({meaning})"))
    return rows


def guarantee_noise_band_rows(report: dict[str, Any]) -> list[Row]:
    """Return a row if noise is correlated over steps; reports of older versions do not say."""
    if report.get("noise_bands", 1) == 1:
        return []
    if "slots" in report:
        return [("Noise bands", f"{report['noise_bands']}: noise correlated over steps")]
    accounted = (
        f"{format_count(report['accounted_steps'], 'step')} at sample rate {format_number(report['accounted_sample_rate'])}"
    )
    return [("Noise bands", f"{report['noise_bands']}: noise correlated over steps, groups in turn; accounted as {accounted}")]


def guarantee_row_limit(report: dict[str, Any]) -> list[Row]:
    """Return a row if training used a limited number of rows, whoever wrote them."""
    limit = (report.get("data") or {}).get("row_limit")
    words = "the first {:,}, taken as given: the guarantee is for these, not for the entire file"
    return [("Rows", words.format(limit))] if limit else []


def guarantee_release_rows(report: dict[str, Any]) -> list[Row]:
    """Return rows about a released evaluation loss, and the epsilon of model and loss together."""
    rows = []
    if release := report.get("evaluation_release"):
        rows.append(("Evaluation, public", format_released_loss(release)))
    if "epsilon_with_evaluation" in report:
        rows.append(("Epsilon with it", format_guarantee_epsilon(report["epsilon_with_evaluation"])))
    return rows


def guarantee_audit_rows(report: dict[str, Any]) -> list[Row]:
    """Return rows about the run's audit by canaries."""
    audit = report.get("audit")
    if not audit:
        return []
    found = f"epsilon at least {audit['epsilon_lower_bound']:.2f} with {audit['confidence']:.0%} confidence"
    rows = [("Audit", f"{found}: {audit['correct']} of {audit['guesses']} guesses on {audit['canaries']} canaries correct")]
    if audit.get("kind") == "gradient":
        checked, interval = f"sampling, clipping and noise matched the ledger in {audit['steps_checked']:,} steps", ""
        if "epsilon_between" in audit:
            bounds = " and ".join(format_number(bound) for bound in audit["epsilon_between"])
            interval = f"; by the observed noise, if Gaussian, epsilon is between {bounds}"
        rows.append(("Audit of gradients", checked + interval))
    return rows


def summarize_guarantee(report: dict[str, Any]) -> str:
    """Return the guarantee in plain words, for readers who do not know differential privacy."""
    if report["disable_dp"] or report["epsilon"] is None or report.get("alarm"):
        return "This model was trained without a privacy guarantee. It may repeat what its authors wrote."
    if report.get("interrupted"):
        return f"Certified: {format_interrupted_guarantee(report)}."
    if guarantee_in_search(report):
        return f"Certified: {IN_SEARCH}."
    if report.get("dry_run"):
        return "This is a dry run: the model has taken two steps of a longer training, and is not a finished one."
    if not report_has_guarantee(report):
        return (
            "This training has the guarantee above for its own authors, but it started from a model that has none: "
            f"{format_guarantee_model(report['base_model'])}. The model may repeat what the authors of that one wrote."
        )
    factor = f"{round_up(math.exp(min(report['epsilon'], 700))):,g}"
    both = guarantee_with_base(report)
    return (
        f"Whatever anyone concludes from this model becomes at most {factor} times (e^epsilon) as likely by the presence or "
        "absence of any one author, with all of that author's texts, in the training data, except with probability "
        f"{report['delta']:.2g}."
        + (f" For an author of the starting model's training, too, it is {format_guarantee(*both)}." if both else "")
    )


def guarantee_in_words(report: dict[str, Any]) -> str:
    """Return what epsilon means to a person who decides on the use of the model; empty if it has no guarantee.

    The scale is that of Ponomareva et al. 2023. It is about epsilon alone, so the bound on attackers is named first.
    """
    if report["disable_dp"] or not report_has_guarantee(report) or report.get("dry_run"):
        return ""
    rates, attack = report.get("tpr_at_fpr") or {}, ""
    if "0.01" in rates:
        attack = (
            "Someone who knows everything else, tries to tell who was in the training data, and wrongly accuses 1 % of the "
            f"authors who were not, finds at most {format_percent_up(rates['0.01'])} of those who were; blind guessing finds "
            "1 %. "
        )
    epsilon, strengths = report["epsilon"], ((1, "strong"), (10, "reasonable"), (math.inf, "weak by itself"))
    strength = next(word for limit, word in strengths if epsilon <= limit)
    delta = f"The scale supposes a small delta, and this one is large: {format_plan_delta(report['delta'])}. "
    delta = delta if report["delta"] > LARGE_DELTA else ""
    return (
        f"{attack}On a common scale of epsilon (Ponomareva et al. 2023: up to 1 strong, up to 10 reasonable, above 10 weak by "
        f"itself), {format_epsilon(epsilon)} is {strength}. {delta}Each author is protected, not "
        "what many authors have written alike."
        + (" All of this is of this training alone, without that of its starting model." if guarantee_with_base(report) else "")
    )


def why_no_guarantee(guarantee: dict[str, Any]) -> Optional[str]:
    """Return why a model has no guarantee; None if it has one.

    Args:
        guarantee: from `read_privacy_statement`.
    """
    if guarantee["disable_dp"]:
        return "its model was trained without privacy (--disable_dp)"
    if guarantee.get("alarm"):
        return f"the run of its model found that its mechanism is not what its ledger says ({guarantee['alarm']})"
    if guarantee["epsilon"] is None:
        return "the epsilon of its model is infinite"
    if guarantee_in_search(guarantee):
        return "it is one run of a search, of which only the best may be released, by python -m author_dp.tune at its end"
    if not guarantee_covers_base(guarantee):
        return f"the training of its model started from another one: {format_guarantee_model(guarantee['base_model'])}"
    return None
