"""Draw the figures of a report as PNGs: losses, epsilon, samples per author, gradient norms and step times.

Losses of training and evaluation are on the same scale, the mean over authors.
"""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

import numpy as np

from author_dp.accounting.accountant import epsilon_of, format_epsilon
from author_dp.accounting.events import MechanismEvent
from author_dp.accounting.ledger import PrivacyLedger, ledger_event_of_run
from author_dp.outputs.html_page import AUTHOR_LOSS, BLUE, GRAY, RED, STANDARD_ERRORS
from author_dp.permissions import make_private

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LOG_BOTTOM = 0.5  # of axes of counts, where no bar stands
STYLE: Any = {
    "figure.figsize": (6.4, 3.4), "figure.dpi": 150, "figure.constrained_layout.use": True, "font.size": 10, "axes.titlesize": 11,
    "axes.titlelocation": "left", "axes.titleweight": "bold", "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "grid.color": "#e6e8eb", "axes.axisbelow": True, "legend.frameon": False,
}  # fmt: skip


def figure_loss_points(log: list[dict], evaluation: dict[str, dict]) -> tuple[list, list]:
    """Return (step, loss) of training, and (step, loss, standard error) of evaluation; the error is None if unknown.

    Both losses are means over authors of each author's mean over tokens.

    Args:
        log: log history of the Trainer. A training loss is the mean over the steps since the previous one: its point is halfway.
        evaluation: metrics "before" and "after" the run.
    """
    training, previous = [], 0
    for row in log:
        if row.get("loss") is not None:
            training.append(((previous + 1 + row["step"]) / 2, row["loss"]))
            previous = row["step"]
    end = max((row["step"] for row in log), default=0)
    rows = [(0, evaluation.get("before", {})), *((row["step"], row) for row in log), (end, evaluation.get("after", {}))]
    found = {
        step: (row[AUTHOR_LOSS], row.get(STANDARD_ERRORS[AUTHOR_LOSS])) for step, row in rows if row.get(AUTHOR_LOSS) is not None
    }
    return training, [(step, *values) for step, values in sorted(found.items())]  # one for each step


def draw_losses_figure(axes: "Axes", training: list, evaluated: list) -> None:
    """Draw losses; those of held-out authors with two standard errors, where they are known."""
    if training:
        marker = "o" if len(training) == 1 else None  # a line of one point is invisible
        axes.plot(*zip(*training), label="training authors", color=GRAY, marker=marker, markersize=4)
    if evaluated:
        steps, losses, errors = zip(*evaluated)
        bars = None if None in errors else [2 * error for error in errors]
        axes.errorbar(steps, losses, bars, label="held-out authors", color=BLUE, fmt="o", markersize=5, capsize=3)
        for step, loss in {evaluated[0][:2], evaluated[-1][:2]}:
            side = "right" if step == steps[-1] and step > 0 else "left"
            axes.annotate(f"{loss:.2f}", (step, loss), (0, 9), textcoords="offset points", color=BLUE, ha=side)
    axes.margins(y=0.18)  # room for the annotations
    axes.set_ylim(bottom=max(0.0, axes.get_ylim()[0]))
    axes.set(title="Loss, same scale for both", xlabel="step", ylabel="nats per token, mean over authors")
    put_legend_above(axes)


def put_legend_above(axes: "Axes") -> None:
    """Put the legend beside the title, where it hides nothing."""
    axes.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=2, borderaxespad=0.2, fontsize=9, columnspacing=1.2)


def draw_epsilon_figure(axes: "Axes", ledger: PrivacyLedger, delta: float, target: Optional[float]) -> None:
    """Draw epsilon over the steps of all runs in the ledger, as a staircase."""
    steps = figure_staircase_steps(ledger)
    # With balls-in-bins sampling the events cost more than the steps, whose epsilon is certified together.
    largest = ledger.epsilon(delta) if any(header.get("slots") for header, _ in ledger.runs_with_steps) else math.inf
    epsilons = [min(epsilon_of(first_steps(ledger, number), delta), largest) for number in steps]
    label = f"spent: {format_epsilon(epsilons[-1])} after step {steps[-1]:,}"
    axes.stairs(epsilons, [0, *steps], baseline=None, color=BLUE, linewidth=1.5, label=label)
    axes.plot(steps[-1:], epsilons[-1:], color=BLUE, marker="o", markersize=4)
    for end in np.cumsum(ledger.steps_per_run)[:-1]:
        axes.axvline(end, color=GRAY, linewidth=1, linestyle="--")
    if target is not None:
        axes.axhline(target, color=RED, linestyle=":", label=f"target {target:g}")
    axes.set(title="Epsilon spent", xlabel="step, lost ones included", ylabel=f"epsilon at delta {delta:.2g}", ylim=(0, None))
    put_legend_above(axes)


def figure_staircase_steps(ledger: PrivacyLedger, most: int = 30) -> list[int]:
    """Return the steps at which a stair ends, ascending; the last one is the ledger's last step.

    With noise bands, epsilon is the same for all steps of a cycle, so a cycle is a stair. Where there are more than `most`, a
    stair covers several, at the epsilon of its last step: it then shows too much, never too little.
    """
    ends: list[int] = []
    started = 0
    for header, steps in zip(ledger.runs, ledger.steps_per_run):
        bands = header.get("noise_bands", 1)
        ends += [started + min(end, steps) for end in range(bands, steps + bands, bands)]
        started += steps
    chosen = np.linspace(0, len(ends) - 1, min(most, len(ends))).round().astype(int)
    return [ends[index] for index in chosen]


def first_steps(ledger: PrivacyLedger, steps: int) -> list[MechanismEvent]:
    """Return the event of each run, limited to the first `steps` steps of all runs."""
    ends = np.cumsum(ledger.steps_per_run)
    steps_of_runs = np.clip(steps - (ends - ledger.steps_per_run), 0, ledger.steps_per_run)
    return [ledger_event_of_run(header, int(number)) for header, number in zip(ledger.runs, steps_of_runs)]


def draw_samples_figure(axes: "Axes", samples: list[int], authors: list[int], bound: int) -> None:
    """Draw how many authors have how many samples, as bars of equal width with their numbers on top.

    Args:
        samples, authors: for each number of samples that occurs, how many authors have it.
        bound: k, samples of an author per step.
    """
    starts = figure_sample_bins(max(samples), bound)
    counts = np.histogram(samples, [*starts, max(samples) + 1], weights=authors)[0].astype(int)
    bars = axes.bar(range(len(starts)), counts, width=0.85, color=BLUE)
    axes.bar_label(bars, [f"{count:,}" if count else "" for count in counts], fontsize=7)
    labels = [f"{a:,}" if a == b else f"{a:,}\u2013{b:,}" for a, b in zip(starts, [*(s - 1 for s in starts[1:]), max(samples)])]
    crowded = max(map(len, labels)) > 4
    axes.set_xticks(range(len(starts)), labels, rotation=45 if crowded else 0, ha="right" if crowded else "center", fontsize=8)
    if bound < max(samples):  # to the right of the bar that ends at k
        axes.axvline(starts.index(bound + 1) - 0.5, color=RED, linestyle=":", label=f"used per step: up to {bound:,} (k)")
        put_legend_above(axes)
    axes.set(title="Samples per author", xlabel="samples of an author", ylabel="authors", yscale="log")
    scale_figure_counts(axes, max(counts))
    axes.grid(visible=False, axis="x")


def scale_figure_counts(axes: "Axes", largest: float) -> None:
    """Scale a logarithmic axis of counts: 1 is visible, and a number fits above the highest bar."""
    axes.set_ylim(LOG_BOTTOM, 3 * max(1, largest))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,g}" if value >= 1 else "")


def figure_sample_bins(largest: int, bound: int, bins: int = 14) -> list[int]:
    """Return the smallest number of samples in each bar of a figure; one of them begins after `bound`.

    Bars cover single numbers first, then ranges that grow by a constant factor.
    """
    starts = {int(start) for start in np.geomspace(1, largest + 1, bins + 1).round()} | {bound + 1}
    return sorted(start for start in starts if start <= largest)


def draw_norms_figure(axes: "Axes", edges: np.ndarray, counts: np.ndarray, clip_norm: float) -> None:
    """Draw a histogram of gradient norms on a logarithmic axis.

    Args:
        edges: (bins + 1,), multiples of `clip_norm`.
        counts: (bins + 2,); the first and the last are of norms beyond the edges.
    """
    edges = edges * clip_norm
    clipped = counts[np.searchsorted(edges, clip_norm * (1 - 1e-9)) + 1 :].sum() / max(1, counts.sum())
    shown = np.flatnonzero(counts[1:-1])
    axes.stairs(np.maximum(counts[1:-1], LOG_BOTTOM), edges, baseline=LOG_BOTTOM, fill=True, color=BLUE)
    axes.axvline(clip_norm, color=RED, linestyle=":", label=f"clip norm {clip_norm:g}: {100 * clipped:.0f} % are clipped")
    axes.set(title="Author gradient norms", xlabel="norm before clipping", ylabel="sampled authors", xscale="log", yscale="log")
    scale_figure_counts(axes, max(counts))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    if len(shown):
        axes.set_xlim(min(edges[shown[0]], clip_norm) / 1.5, max(edges[shown[-1] + 1], clip_norm) * 1.5)
    put_legend_above(axes)


def draw_times_figure(axes: "Axes", seconds: list[float]) -> None:
    axes.plot(range(1, len(seconds) + 1), seconds, color=BLUE, linewidth=1)
    axes.axhline(float(np.median(seconds)), color=GRAY, linestyle=":", label=f"median {np.median(seconds):.2g} s")
    axes.set(title="Time per step", xlabel="step of the last run", ylabel="seconds", ylim=(0, None))
    put_legend_above(axes)


def draw_figures(folder: Path, report: dict, ledger: PrivacyLedger, statistics: dict) -> dict[str, tuple[Path, bool]]:
    """Write the figures for which there is data.

    Args:
        folder: where to write them.
    Returns:
        for each name its file, and whether it is private.
    """
    drawings: dict[str, tuple] = {}
    if any(points := figure_loss_points(statistics.get("log", []), statistics.get("evaluation", {}))):
        drawings["loss"] = (draw_losses_figure, points, True)
    if ledger.steps and report["epsilon"] is not None:
        drawings["epsilon"] = (draw_epsilon_figure, (ledger, report["delta"], report["target_epsilon"]), False)
    if "samples_per_author" in statistics:
        samples = statistics["samples_per_author"]
        drawings["samples"] = (draw_samples_figure, (samples["samples"], samples["authors"], report["samples_per_author"]), True)
        norms = statistics["norms_over_clip_norm"]
        if report["clip_norm"] and sum(norms["counts"]):
            drawings["norms"] = (
                draw_norms_figure,
                (np.array(norms["edges"]), np.array(norms["counts"]), report["clip_norm"]),
                True,
            )
        if statistics["seconds_per_step"]:
            drawings["time"] = (draw_times_figure, (statistics["seconds_per_step"],), True)
    from matplotlib import rc_context  # slow: not before a run's first step
    from matplotlib.figure import Figure  # pyplot would take a second more, and change the backend of a notebook

    if drawings:
        folder.mkdir(exist_ok=True)
    files = {}
    with rc_context(STYLE):
        for name, (draw, data, is_private) in drawings.items():
            figure = Figure()
            draw(figure.subplots(), *data)
            files[name] = (folder / f"{name}.png", is_private)
            if is_private:
                make_private(files[name][0])
            figure.savefig(files[name][0])
    return files
