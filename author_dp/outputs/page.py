"""What a report says: the guarantee in plain words and in full, the page, and a model card that is safe to publish.

Promise: the card holds public values only. The page marks whatever is computed on private data.

What is told about the guarantee follows Ponomareva et al. 2023, How to DP-fy ML, arXiv 2303.00654, section 5.3.3.
"""

import base64
import html
import math
from pathlib import Path
from typing import Optional

from author_dp.accounting.accountant import format_epsilon, format_guarantee, round_up
from author_dp.training.public_loss import format_release

INTERRUPTED = "nothing yet, as the run has not saved its model; epsilon is what the steps in its ledger have spent"
STATISTICS_NAME = "_private_statistics.json"
PAGE_NAME = "report.html"
BLUE, RED, GREY = "#1b6ca8", "#c8553d", "#8a8f98"


def fmt(value: Optional[float]) -> str:
    return "none" if value is None else f"{value:,.6g}"


def guarantee_rows(report: dict) -> list[tuple[str, str]]:
    """Return the reporting list of Ponomareva et al. 2023, section 5.3.3; public values only."""
    if report["disable_dp"]:
        return [("Guarantee", "none: trained with --disable_dp")]
    if report.get("alarm"):
        return [("Guarantee", f"none: the run found that its mechanism is not what its ledger says ({report['alarm']})")]
    rows = [
        ("Guarantee", format_guarantee(report["epsilon"], report["delta"])),
        *([("Certified", INTERRUPTED)] if report.get("interrupted") else []),
        *([("Starting model", format_model(report["base_model"]))] if "base_model" in report else []),
        ("Setting", "central: the trainer sees the data, the public sees the model"),
        ("Definition", "approximate DP, (epsilon, delta)"),
        ("Privacy unit", "one author with all samples"),
        ("Adjacency", "add or remove one author"),
        ("What is covered", "the released weights and every checkpoint; training data only, not the base model's own"),
        ("Mechanism", "DP-SGD on authors: Poisson sampling, per-author clipping, Gaussian noise"),
        ("Accountant", f"{report['accountant'].upper()} (upper bound), all steps ever taken in this folder, lost ones included"),
        ("Epsilon", "none" if report["epsilon"] is None else format_epsilon(report["epsilon"])),
        ("Target epsilon", fmt(report["target_epsilon"])),
        ("Delta", fmt(report["delta"])),
        *attack_rows(report),
        ("Noise multiplier", fmt(report["noise_multiplier"])),
        ("Clip norm", f"{fmt(report['clip_norm'])} for each author's gradient"),
        ("Authors", "not told" if report["num_authors"] is None else fmt(report["num_authors"])),
        ("Sample rate", fmt(report["sample_rate"])),
        *noise_band_rows(report),
        ("Expected batch", f"{fmt(report['expected_batch_size'])} authors"),
        ("Samples of an author per step", f"at most {report['samples_per_author']}"),
        ("Steps", fmt(report["steps"])),
        *row_limit_row(report),
        ("Tuning", "not included: each further run on the same authors adds its own epsilon"),
    ]
    if release := report.get("evaluation_release"):
        rows.append(("Evaluation, public", format_release(release)))
    if "epsilon_with_evaluation" in report:
        together = report["epsilon_with_evaluation"]
        rows.append(("Epsilon with it", "none" if together is None else format_epsilon(together)))
    if audit := report.get("audit"):
        found = f"epsilon at least {audit['epsilon_lower_bound']:.2f} with {audit['confidence']:.0%} confidence"
        rows.append(("Audit", f"{found}: {audit['correct']} of {audit['guesses']} guesses on {audit['canaries']} canaries right"))
        if audit.get("kind") == "gradient":
            between = " and ".join(fmt(bound) for bound in audit["epsilon_between"])
            law = f"draws, clip and noise were as promised in {audit['steps_checked']:,} steps"
            rows.append(("Audit of gradients", f"{law}; from the noise seen, epsilon is between {between}, if it is Gaussian"))
    return rows


def format_model(model: dict) -> str:
    """Return what a model that training started from promises to its own authors.

    Args:
        model: from `sidecar.starting_model`.
    """
    if not model["covered"]:
        return f"{model['name']} has no guarantee ({model['reason']})"
    words = f"{model['name']} has {format_guarantee(model['epsilon'], model['delta'])}, on top for authors of both trainings"
    return f"{words}; it started from {format_model(model['base_model'])}" if "base_model" in model else words


def has_guarantee(report: dict) -> bool:
    """Return whether the folder's model has a guarantee, and the one that it started from, if this program trained that too."""
    return (
        report["epsilon"] is not None and not report.get("interrupted") and report.get("base_model", {"covered": True})["covered"]
    )


def noise_band_rows(report: dict) -> list[tuple[str, str]]:
    """Return a row where noise is correlated over steps; reports of older versions do not know of it."""
    if report.get("noise_bands", 1) == 1:
        return []
    accounted = f"{report['accounted_steps']:,} steps at sample rate {fmt(report['accounted_sample_rate'])}"
    return [("Noise bands", f"{report['noise_bands']}: noise correlated over steps, groups in turn; accounted as {accounted}")]


def row_limit_row(report: dict) -> list[tuple[str, str]]:
    """Return a row where rows were taken as given, whoever wrote them."""
    limit = (report.get("data") or {}).get("row_limit")
    return (
        [("Rows", f"the first {limit:,}, taken as given: the guarantee is for these, not for all of the file")] if limit else []
    )


def attack_rows(report: dict) -> list[tuple[str, str]]:
    """Return what the best attacker can do, who is to tell whether an author was in the data."""
    rows = []
    if report.get("mu_gdp") is not None:
        rows.append(
            ("Gaussian DP", f"mu {math.ceil(report['mu_gdp'] * 1e3) / 1e3:.3f}: as hard to tell as two normals that far apart")
        )
    for false, true in (report.get("tpr_at_fpr") or {}).items():
        words = f"at most {math.ceil(true * 1e4) / 1e4:.4f} of those who were in are found by whoever wrongly accuses that share"
        rows.append((f"Attacker at {float(false):.1%}", words))
    return rows


def plain_summary(report: dict) -> str:
    if report["disable_dp"] or report["epsilon"] is None:
        return "This model was trained without a privacy guarantee. It may repeat what its authors wrote."
    if report.get("interrupted"):
        return f"Certified: {INTERRUPTED}."
    if not has_guarantee(report):
        return (
            "This training has the guarantee above for its own authors, but it started from a model that has none: "
            f"{format_model(report['base_model'])}. The model may repeat what the authors of that one wrote."
        )
    rates = report.get("tpr_at_fpr") or {}
    found = ""
    if "0.01" in rates:
        found = (
            " Even an attacker who knows everything else, and who wrongly accuses 1 % of the authors who were not in the data, "
            f"finds at most {math.ceil(rates['0.01'] * 1e3) / 10:.1f} % of those who were."
        )
    factor = f"{round_up(math.exp(min(report['epsilon'], 700))):,g}"
    return (
        f"Whatever anyone concludes from this model becomes at most {factor} times (e^epsilon) as likely by the presence or "
        "absence of any one author, with all of that author's texts, in the training data, but for a chance of "
        f"{report['delta']:.2g}." + found
    )


NOT_COVERED = (
    "Losses, gradient norms, sample counts, times and what the model makes of held-out texts, all below, are computed on private "
    "data without noise: do not publish them. The numbers of authors and steps and the sample rate are taken as public. Held-out "
    "authors, choices among several runs, and people who appear in the texts of others are not covered."
)
CITE = """@misc{author-level-dp,
  title = {Author-level differentially private fine-tuning},
  note = {DP-SGD with the author as the privacy unit, for Hugging Face's Trainer},
  year = {2026}
}"""
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Privacy report: {title}</title><style>
* {{ box-sizing: border-box; }} body {{ font: 16px/1.55 system-ui, sans-serif; color: #1d2127; background: #f5f6f8; margin: 0; }}
main {{ max-width: 900px; margin: 0 auto; padding: 32px 20px 64px; }}
h1 {{ font-size: 1.7rem; margin: 0 0 4px; }} h2 {{ font-size: 1.15rem; margin: 40px 0 12px; }}
.headline {{ background: #fff; border-left: 6px solid {colour}; padding: 16px 20px; border-radius: 6px; margin: 20px 0; }}
.headline strong {{ font-size: 1.25rem; }} .headline p {{ margin: 8px 0 0; }}
table {{ border-collapse: collapse; width: 100%; background: #fff; border-radius: 6px; overflow: hidden; }}
th, td {{ text-align: left; padding: 7px 14px; border-bottom: 1px solid #eceef1; vertical-align: top; }}
th {{ font-weight: 600; width: 34%; color: #4a515c; }}
.figures {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(390px, 1fr)); gap: 16px; }}
figure {{ background: #fff; margin: 0; padding: 10px; border-radius: 6px; }} img {{ width: 100%; display: block; }}
figcaption {{ font-size: .82rem; padding: 4px 8px; color: #5b626d; }}
.private {{ color: {red}; font-weight: 600; }} .public {{ color: #2c7a4b; font-weight: 600; }}
pre {{ background: #fff; padding: 14px; border-radius: 6px; overflow-x: auto; font-size: .85rem; }}
details {{ background: #fff; border-radius: 6px; padding: 10px 14px; margin: 12px 0; }} summary {{ cursor: pointer; }}
details p {{ margin: 10px 0; font-size: .9rem; color: #4a515c; }} .texts td {{ white-space: pre-wrap; }}
.texts {{ table-layout: fixed; font-size: .9rem; overflow-wrap: anywhere; }} .texts th {{ width: auto; }}
.begun {{ color: #8a8f98; }}
@media (max-width: 480px) {{ .figures {{ grid-template-columns: 1fr; }} }}
</style></head><body><main>
<h1>Privacy report</h1><div>{title}</div>
<div class="headline"><strong>{headline}</strong><p>{words}</p></div>
<h2>The guarantee, in full</h2><table>{rows}</table>
<h2>What it does not cover</h2><p>{not_covered}</p>
<h2>The run</h2>{losses}<div class="figures">{figures}</div>
{specimens}<h2>How to cite</h2><pre>{cite}</pre>
</main></body></html>
"""


PRIVATE = '<span class="private">private: do not publish</span>'
PUBLIC = '<span class="public">public</span>'
COVERED = '<span class="public">covered by the guarantee, as the model itself is</span>'
AUTHOR_LOSS = "eval_author_loss"
EVALUATION = (
    (AUTHOR_LOSS, "Held-out authors: mean over authors"),
    ("eval_loss", "Held-out authors: mean over tokens"),
    ("eval_perplexity", "Held-out authors: perplexity, e to the mean over tokens"),
)
SCALES = (
    "All losses are in nats a token; lower is better. The mean over authors is what training lowers, and what the figure shows "
    "for training and held-out authors alike: over each author's own tokens first, then over authors, so that whoever writes "
    "little counts as much as whoever writes much. The mean over tokens, which other tools report, is not to be set against a "
    "training loss. Training losses are of the authors drawn since the last line of the log, with dropout if the model has it."
)


def loss_table(log: list[dict], evaluation: dict[str, dict[str, float]]) -> str:
    """Return losses before and after training as HTML; "" where there is none."""
    before, after = evaluation.get("before", {}), evaluation.get("after", {})
    rows = [(label, before.get(name), after[name]) for name, label in EVALUATION if name in after]
    trained = [row["loss"] for row in log if row.get("loss") is not None]
    if trained:
        rows.insert(1 if rows else 0, ("Training authors: mean over authors, last line of the log", None, trained[-1]))
    if not rows:
        return ""
    cells = "".join(f"<tr><th>{name}</th><td>{fmt_loss(early)}</td><td>{fmt_loss(late)}</td></tr>" for name, early, late in rows)
    head = f"<tr><th>Loss, {PRIVATE}</th><td>before</td><td>after</td></tr>"
    return f"<table>{head}{cells}</table><p>{SCALES}</p>"


def fmt_loss(value: Optional[float]) -> str:
    return "" if value is None else f"{value:,.3f}"


def samples_html(specimens: dict[str, dict[str, list[str]]], covered: bool) -> str:
    """Return what the model wrote, behind folds; "" where it wrote nothing.

    Args:
        specimens: `specimens.Specimens.found`.
        covered: whether the trained model has a guarantee.
    """
    folds = ""
    free, continued = specimens.get("free", {}), specimens.get("continued", {})
    if free.get("after"):
        words = (
            "They are made from the released weights alone: whatever a model with a guarantee writes has the same guarantee "
            "(post-processing). What is shown are the first texts, none of them chosen."
            if covered
            else "The model has no guarantee, and may repeat what its authors wrote."
        )
        begins = (
            f"Each begins with nothing. {words} The text before training is the base model's own, which this "
            "run says nothing of: it is public only if that model is."
        )
        folds += details_table(f"Texts that begin with nothing: {COVERED if covered else PRIVATE}", begins, free)
    if continued.get("after"):
        words = (
            "Beginnings (grey) are word for word what held-out authors wrote. No guarantee covers these authors, and none covers "
            "text that is made of what they wrote."
        )
        folds += details_table(f"Held-out texts, continued: {PRIVATE}", words, continued)
    return f"<h2>What the model writes</h2>{folds}" if folds else ""


def details_table(title: str, words: str, texts: dict[str, list[str]]) -> str:
    """Return a fold with a table, what was written before training beside what was written after it."""
    after = texts["after"]
    before, begun = texts.get("before", [""] * len(after)), texts.get("prompts", [""] * len(after))
    rows = ""
    for start, *written in zip(begun, before, after):
        start = f'<span class="begun">{html.escape(start)}</span>' if start else ""
        rows += "<tr>" + "".join(f"<td>{start}{html.escape(text)}</td>" for text in written) + "</tr>"
    table = f'<table class="texts"><tr><th>before training</th><th>after</th></tr>{rows}</table>'
    return f"<details><summary>{title}</summary><p>{words}</p>{table}</details>"


def page(title: str, report: dict, figures: dict[str, tuple[Path, bool]], statistics: dict) -> str:
    """Return the report as one HTML page with its pictures inside.

    Args:
        figures: of each name its file, and whether it is private.
        statistics: what `report.Statistics` has noted; may be empty.
    """
    rows = "".join(
        f"<tr><th>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>" for name, value in guarantee_rows(report)
    )
    pictures = ""
    for name, (path, is_private) in figures.items():
        picture = base64.b64encode(path.read_bytes()).decode()
        mark = PRIVATE if is_private else PUBLIC
        pictures += f'<figure><img alt="{name}" src="data:image/png;base64,{picture}"><figcaption>{mark}</figcaption></figure>'
    return PAGE.format(
        title=html.escape(title), rows=rows, figures=pictures, cite=html.escape(CITE), not_covered=NOT_COVERED, red=RED,
        headline=html.escape(guarantee_rows(report)[0][1]), words=html.escape(plain_summary(report)),
        colour=BLUE if has_guarantee(report) else RED,
        losses=loss_table(statistics.get("log", []), statistics.get("evaluation", {})),
        specimens=samples_html(statistics.get("specimens", {}), has_guarantee(report)),
    )  # fmt: skip
