"""Report of a run: one self-contained page, the same figures as PNGs, and a model card that is safe to publish.

    python -m author_dp.report OUTPUT_DIR

Promise: epsilon is computed anew from the ledger. The model card (README.md) holds public values only. The page and the figures
show losses, gradient norms, sample counts and times too, which are computed on private data: they are marked, and are not for
publication. With --push_to_hub their names begin with _, which no upload takes.

What is told about the guarantee follows Ponomareva et al. 2023, How to DP-fy ML, arXiv 2303.00654, section 5.3.3.
"""

import base64
import html
import json
import math
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

import numpy as np
from transformers import TrainerCallback

from author_dp.accounting import PrivacyLoss, Spending, guarantee_in_words
from author_dp.attack import attack
from author_dp.clipping.statistics import NormStatistics
from author_dp.errors import UserError
from author_dp.ledger import LEDGER_NAME, REPORT_NAME, PrivacyLedger, keep_private, spending_under, write_json
from author_dp.release import in_words

if TYPE_CHECKING:
    from matplotlib.axes import Axes

STATISTICS_NAME = "_private_statistics.json"
PAGE_NAME = "report.html"
BLUE, RED, GREY = "#1b6ca8", "#c8553d", "#8a8f98"
STYLE: Any = {
    "figure.figsize": (6.4, 3.4), "figure.dpi": 150, "figure.constrained_layout.use": True, "font.size": 10, "axes.titlesize": 11,
    "axes.titlelocation": "left", "axes.titleweight": "bold", "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "grid.color": "#e6e8eb", "axes.axisbelow": True, "legend.frameon": False,
}  # fmt: skip

# --- what is noted during the run -------------------------------------------------------------------------


class Statistics(TrainerCallback):
    """Note what the report shows and no other file holds. All of it is private.

    Args:
        samples_of_authors: (authors,), how many samples each has.
        norms: of the gradients, read at the end.
    """

    def __init__(self, norms: NormStatistics, samples_of_authors: np.ndarray):
        self.norms, self.started = norms, 0.0
        self.seconds: list[float] = []
        self.counts = np.unique(samples_of_authors, return_counts=True)

    def add(self, folder: str, **more: Any) -> None:
        """Add to what `on_train_end` has written."""
        path = Path(folder) / STATISTICS_NAME
        write_json(path, {**(json.loads(path.read_text()) if path.exists() else {}), **more}, private=True)

    def on_step_begin(self, args, state, control, **kwargs):
        self.started = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds.append(round(time.perf_counter() - self.started, 6))

    def on_train_end(self, args, state, control, **kwargs):
        norms = self.norms.histogram()
        if not state.is_world_process_zero:
            return
        statistics = {
            "note": "computed on private data without noise: do not publish",
            "samples_per_author": {"samples": self.counts[0].tolist(), "authors": self.counts[1].tolist()},
            "norms_over_clip_norm": {"edges": self.norms.edges.tolist(), "counts": norms},
            "seconds_per_step": self.seconds,
            "log": state.log_history,
        }
        finite = json.loads(json.dumps(statistics), parse_constant=lambda _: None)
        write_json(Path(args.output_dir) / STATISTICS_NAME, finite, private=True)


# --- figures ----------------------------------------------------------------------------------------------


def draw_losses(axes: "Axes", log: list[dict]) -> None:
    for name, label, colour, marker in (("loss", "training", GREY, None), ("eval_loss", "evaluation", BLUE, "o")):
        points = [(row["step"], row[name]) for row in log if row.get(name) is not None]
        if points:
            axes.plot(*zip(*points), label=label, color=colour, marker=marker, markersize=4)
    axes.set(title="Loss", xlabel="step", ylabel="mean loss (nats a token)")
    axes.legend()


def draw_epsilon(axes: "Axes", ledger: PrivacyLedger, loss: PrivacyLoss, target: Optional[float]) -> None:
    """Epsilon after each number of steps, across runs."""
    steps = np.unique(np.linspace(0, ledger.steps, 21).round().astype(int)).tolist()
    epsilons = [loss.epsilon(first(ledger, count)) for count in steps]
    axes.plot(steps, epsilons, color=BLUE, label="spent")
    for end in np.cumsum(ledger.taken)[:-1]:
        axes.axvline(end, color=GREY, linewidth=1, linestyle="--")
    if target is not None:
        axes.axhline(target, color=RED, linestyle=":", label=f"target {target:g}")
    axes.set(
        title="Epsilon spent", xlabel="step, lost ones included", ylabel=f"epsilon at delta {loss.delta:.2g}", ylim=(0, None)
    )
    axes.legend()


def first(ledger: PrivacyLedger, steps: int) -> list[Spending]:
    """Return what the first `steps` steps have spent."""
    ends = np.cumsum(ledger.taken)
    counts = np.clip(steps - (ends - ledger.taken), 0, ledger.taken)
    return [spending_under(header, int(count)) for header, count in zip(ledger.runs, counts)]


def draw_samples(axes: "Axes", samples: list[int], authors: list[int], bound: int) -> None:
    edges = np.unique(np.geomspace(1, max(samples) + 1, 25).round())
    axes.hist(samples, bins=list(edges), weights=authors, color=BLUE)
    axes.axvline(bound + 1, color=RED, linestyle=":", label=f"used per step: up to {bound} (k)")  # the end of the bin of k
    axes.set(title="Samples per author", xlabel="samples", ylabel="authors", yscale="log", xscale="log")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.legend()


def draw_norms(axes: "Axes", edges: np.ndarray, counts: np.ndarray, clip_norm: float) -> None:
    """Histogram on a logarithmic axis; the first and the last bin hold what lies beyond."""
    edges = edges * clip_norm
    share = counts[np.searchsorted(edges, clip_norm * (1 - 1e-9)) + 1 :].sum() / max(1, counts.sum())
    shown = np.flatnonzero(counts[1:-1])
    axes.stairs(counts[1:-1], edges, fill=True, color=BLUE)
    axes.axvline(clip_norm, color=RED, linestyle=":", label=f"clip norm {clip_norm:g}: {share:.0%} are clipped")
    axes.set(title="Author gradient norms", xlabel="norm before clipping", ylabel="drawn authors", xscale="log")
    if len(shown):
        axes.set_xlim(min(edges[shown[0]], clip_norm) / 1.5, max(edges[shown[-1] + 1], clip_norm) * 1.5)
    axes.legend()


def draw_times(axes: "Axes", seconds: list[float]) -> None:
    axes.plot(range(1, len(seconds) + 1), seconds, color=BLUE, linewidth=1)
    axes.axhline(float(np.median(seconds)), color=GREY, linestyle=":", label=f"median {np.median(seconds):.2g} s")
    axes.set(title="Time per step", xlabel="step of the last run", ylabel="seconds", ylim=(0, None))
    axes.legend()


def draw_all(
    pictures: Path, report: dict, ledger: PrivacyLedger, loss: Optional[PrivacyLoss], statistics: dict
) -> dict[str, tuple[Path, bool]]:
    """Write the figures that there are data for; return for each name its file in `pictures`, and whether it is private."""
    drawings: dict[str, tuple] = {}
    if any("loss" in row or "eval_loss" in row for row in statistics.get("log", [])):
        drawings["loss"] = (draw_losses, (statistics["log"],), True)
    if loss is not None and report["epsilon"] is not None:
        drawings["epsilon"] = (draw_epsilon, (ledger, loss, report["target_epsilon"]), False)
    if statistics:
        samples = statistics["samples_per_author"]
        drawings["samples"] = (draw_samples, (samples["samples"], samples["authors"], report["samples_per_author"]), True)
        norms = statistics["norms_over_clip_norm"]
        if report["clip_norm"] and sum(norms["counts"]):
            drawings["norms"] = (draw_norms, (np.array(norms["edges"]), np.array(norms["counts"]), report["clip_norm"]), True)
        if statistics["seconds_per_step"]:
            drawings["time"] = (draw_times, (statistics["seconds_per_step"],), True)
    import matplotlib  # here, as a run is to take its first step before it waits for what draws its last one

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pictures.mkdir(exist_ok=True)
    files = {}
    with pyplot.rc_context(STYLE):
        for name, (draw, data, is_private) in drawings.items():
            figure, axes = pyplot.subplots()
            draw(axes, *data)
            files[name] = (pictures / f"{name}.png", is_private)
            files[name][0].touch()
            if is_private:
                keep_private(files[name][0])
            figure.savefig(files[name][0])
            pyplot.close(figure)
    return files


# --- words ------------------------------------------------------------------------------------------------


def number(value: Optional[float]) -> str:
    return "none" if value is None else f"{value:,.6g}"


def guarantee(report: dict) -> list[tuple[str, str]]:
    """Return the reporting list of Ponomareva et al. 2023, section 5.3.3; public values only."""
    if report["disable_dp"]:
        return [("Guarantee", "none: trained with --disable_dp")]
    if report.get("alarm"):
        return [("Guarantee", f"none: the run found that its mechanism is not what its ledger says ({report['alarm']})")]
    rows = [
        ("Guarantee", guarantee_in_words(report["epsilon"], report["delta"])),
        ("Setting", "central: the trainer sees the data, the public sees the model"),
        ("Definition", "approximate DP, (epsilon, delta)"),
        ("Privacy unit", "one author with all samples"),
        ("Adjacency", "add or remove one author"),
        ("What is covered", "the released weights and every checkpoint; training data only, not the base model's own"),
        ("Mechanism", "DP-SGD on authors: Poisson sampling, per-author clipping, Gaussian noise"),
        ("Accountant", f"{report['accountant'].upper()} (upper bound), all steps ever taken in this folder, lost ones included"),
        ("Epsilon", number(report["epsilon"])),
        ("Target epsilon", number(report["target_epsilon"])),
        ("Delta", number(report["delta"])),
        *attacker(report),
        ("Noise multiplier", number(report["noise_multiplier"])),
        ("Clip norm", f"{number(report['clip_norm'])} for each author's gradient"),
        ("Authors", "not told" if report["num_authors"] is None else number(report["num_authors"])),
        ("Sample rate", number(report["sample_rate"])),
        *noise_bands(report),
        ("Expected batch", f"{number(report['expected_batch_size'])} authors"),
        ("Samples of an author per step", f"at most {report['samples_per_author']}"),
        ("Steps", number(report["steps"])),
        *rows_taken(report),
        ("Tuning", "not included: each further run on the same authors adds its own epsilon"),
    ]
    if release := report.get("evaluation_release"):
        rows.append(("Evaluation, public", in_words(release)))
    if "epsilon_with_evaluation" in report:
        rows.append(("Epsilon with it", number(report["epsilon_with_evaluation"])))
    if audit := report.get("audit"):
        found = f"epsilon at least {audit['epsilon_lower_bound']:.2f} with {audit['confidence']:.0%} confidence"
        rows.append(("Audit", f"{found}: {audit['correct']} of {audit['guesses']} guesses on {audit['canaries']} canaries right"))
        if audit.get("kind") == "gradient":
            between = " and ".join(number(bound) for bound in audit["epsilon_between"])
            law = f"draws, clip and noise were as promised in {audit['steps_checked']:,} steps"
            rows.append(("Audit of gradients", f"{law}; from the noise seen, epsilon is between {between}, if it is Gaussian"))
    return rows


def noise_bands(report: dict) -> list[tuple[str, str]]:
    """Return a row where noise is correlated over steps; reports of older versions do not know of it."""
    if report.get("noise_bands", 1) == 1:
        return []
    accounted = f"{report['accounted_steps']:,} steps at sample rate {number(report['accounted_sample_rate'])}"
    return [("Noise bands", f"{report['noise_bands']}: noise correlated over steps, groups in turn; accounted as {accounted}")]


def rows_taken(report: dict) -> list[tuple[str, str]]:
    """Return a row where rows were taken as given, whoever wrote them."""
    limit = (report.get("data") or {}).get("row_limit")
    return (
        [("Rows", f"the first {limit:,}, taken as given: the guarantee is for these, not for all of the file")] if limit else []
    )


def attacker(report: dict) -> list[tuple[str, str]]:
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


def in_plain_words(report: dict) -> str:
    if report["disable_dp"] or report["epsilon"] is None:
        return "This model was trained without a privacy guarantee. It may repeat what its authors wrote."
    rates = report.get("tpr_at_fpr") or {}
    found = ""
    if "0.01" in rates:
        found = (
            " Even an attacker who knows everything else, and who wrongly accuses 1 % of the authors who were not in the data, "
            f"finds at most {math.ceil(rates['0.01'] * 1e3) / 10:.1f} % of those who were."
        )
    factor = f"{float(format(math.exp(min(report['epsilon'], 700)), '.3g')):,g}"
    return (
        "Whoever sees this model learns nearly the same, whether or not any one author, with all of that author's texts, was in "
        f"the training data: no conclusion becomes more than {factor} times (e^epsilon) as likely by it, but for "
        f"a chance of {report['delta']:.2g}." + found
    )


NOT_COVERED = (
    "Losses, gradient norms, sample counts and times below are computed on private data without noise: do not publish them. "
    "The numbers of authors and steps and the sample rate are taken as public. Held-out authors, choices among several runs, and "
    "people who appear in the texts of others are not covered."
)
CITE = """@misc{author-level-dp,
  title = {Author-level differentially private fine-tuning},
  note = {DP-SGD with the author as the privacy unit, for Hugging Face's Trainer},
  year = {2026}
}"""
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Privacy report: {title}</title><style>
body {{ font: 16px/1.55 system-ui, sans-serif; color: #1d2127; background: #f5f6f8; margin: 0; }}
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
@media (max-width: 480px) {{ .figures {{ grid-template-columns: 1fr; }} }}
</style></head><body><main>
<h1>Privacy report</h1><div>{title}</div>
<div class="headline"><strong>{headline}</strong><p>{words}</p></div>
<h2>The guarantee, in full</h2><table>{rows}</table>
<h2>What it does not cover</h2><p>{not_covered}</p>
<h2>The run</h2>{evaluation}<div class="figures">{figures}</div>
<h2>How to cite</h2><pre>{cite}</pre>
</main></body></html>
"""


EVALUATION = (
    ("eval_loss", "Loss, mean over tokens"),
    ("eval_perplexity", "Perplexity"),
    ("eval_author_loss", "Loss, mean over authors (comparable with the training loss)"),
)


def evaluation_table(evaluation: dict[str, dict[str, float]]) -> str:
    """Return losses before and after training as HTML; "" where nothing was evaluated."""
    before, after = evaluation.get("before", {}), evaluation.get("after", {})
    rows = "".join(
        f"<tr><th>{label}</th><td>{number(before.get(name))}</td><td>{number(after[name])}</td></tr>"
        for name, label in EVALUATION
        if name in after
    )
    head = '<tr><th>Evaluation, <span class="private">private: do not publish</span></th><td>before</td><td>after</td></tr>'
    return f"<table>{head}{rows}</table><p></p>" if rows else ""


def page(title: str, report: dict, figures: dict[str, tuple[Path, bool]], evaluation: dict[str, dict[str, float]]) -> str:
    """Return the report as one HTML page with its pictures inside."""
    rows = "".join(f"<tr><th>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>" for name, value in guarantee(report))
    pictures = ""
    for name, (path, is_private) in figures.items():
        mark = '<span class="private">private: do not publish</span>' if is_private else '<span class="public">public</span>'
        picture = base64.b64encode(path.read_bytes()).decode()
        pictures += f'<figure><img alt="{name}" src="data:image/png;base64,{picture}"><figcaption>{mark}</figcaption></figure>'
    return PAGE.format(
        title=html.escape(title), rows=rows, figures=pictures, cite=html.escape(CITE), not_covered=NOT_COVERED, red=RED,
        headline=html.escape(guarantee(report)[0][1]), words=html.escape(in_plain_words(report)),
        colour=BLUE if report["epsilon"] is not None else RED, evaluation=evaluation_table(evaluation),
    )  # fmt: skip


def card(report: dict, base_model: str) -> str:
    """Return a model card with Hugging Face's metadata; public values only."""
    rows = "\n".join(f"| {name} | {value} |" for name, value in guarantee(report))
    base = f"base_model: {base_model}\n" if base_model and not Path(base_model).exists() else ""
    is_private = report["epsilon"] is not None
    tags = "- differential-privacy\n- author-level-dp\n" if is_private else ""
    title = "Fine-tuned with author-level differential privacy" if is_private else "Fine-tuned without a privacy guarantee"
    return f"""---
{base}pipeline_tag: text-generation
library_name: transformers
tags:
- text-generation
{tags}---

# {title}

{in_plain_words(report)}

| | |
|---|---|
{rows}

The base model's own training data are not covered. The folder of the run also holds files that are not for publication:
`{PAGE_NAME}`, `report/`, `{STATISTICS_NAME}` and the checkpoints' `trainer_state.json`.
"""


def report_anew(path: Path, ledger: PrivacyLedger) -> tuple[dict[str, Any], Optional[PrivacyLoss]]:
    """Return the report at `path` with what all steps of its ledger have spent since, and the accountant that says so, if any.

    Raises:
        UserError: for a report that knows more than the ledger does.
    """
    report, loss = ledger.check_report(path), None
    if not report["disable_dp"] and ledger.steps:
        loss = PrivacyLoss(ledger.spendings, report["delta"])
        epsilon = loss.epsilon(ledger.spendings) if ledger.alarm is None else math.inf
        report |= {"epsilon": epsilon if math.isfinite(epsilon) else None, "steps": ledger.steps, "accountant": loss.accountant}
        if ledger.releases:
            together = ledger.epsilon_with_releases(epsilon)
            report["epsilon_with_evaluation"] = together if math.isfinite(together) else None
        report["accounted_steps"] = ledger.accounted_steps
        report |= attack(ledger.spendings if report["epsilon"] is not None else [], report["delta"])
    return report, loss


def write_report(folder: Path, hidden: bool = False) -> None:
    """Write report.html and report/*.png of the run in `folder`.

    Args:
        hidden: from uploads to the hub, by names that begin with _.
    Raises:
        UserError: where the folder holds no report of a run, or a ledger that was changed.
    """
    if not (folder / REPORT_NAME).exists():
        raise UserError(f"OUTPUT_DIR {folder} holds no {REPORT_NAME}: give the --output_dir of a run")
    ledger = PrivacyLedger(folder / LEDGER_NAME)
    report, loss = report_anew(folder / REPORT_NAME, ledger)
    path = folder / STATISTICS_NAME
    statistics = json.loads(path.read_text()) if path.exists() else {}
    prefix = "_" if hidden else ""
    figures = draw_all(folder / f"{prefix}report", report, ledger, loss, statistics)
    path = folder / f"{prefix}{PAGE_NAME}"
    path.touch()
    keep_private(path)
    path.write_text(page(folder.resolve().name, report, figures, statistics.get("evaluation", {})))


if __name__ == "__main__":
    try:
        if len(sys.argv) != 2:
            raise UserError("usage: python -m author_dp.report OUTPUT_DIR")
        write_report(Path(sys.argv[1]))
    except UserError as error:
        print(f"author_dp.report: error: {error}", file=sys.stderr)
        sys.exit(2)
