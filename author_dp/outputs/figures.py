"""Draw the figures of a report as PNGs: losses, epsilon, samples per author, gradient norms and step times.

Losses of training and evaluation are on the same scale, the mean over authors.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

import numpy as np

from author_dp.accounting.accountant import MechanismEvent, epsilon_of
from author_dp.accounting.ledger import PrivacyLedger, event_of_run
from author_dp.files import make_private
from author_dp.outputs.page import AUTHOR_LOSS, BLUE, GRAY, RED

if TYPE_CHECKING:
    from matplotlib.axes import Axes

STYLE: Any = {
    "figure.figsize": (6.4, 3.4), "figure.dpi": 150, "figure.constrained_layout.use": True, "font.size": 10, "axes.titlesize": 11,
    "axes.titlelocation": "left", "axes.titleweight": "bold", "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "grid.color": "#e6e8eb", "axes.axisbelow": True, "legend.frameon": False,
}  # fmt: skip


def loss_points(log: list[dict], evaluation: dict[str, dict]) -> tuple[list, list]:
    """Return (step, loss) of training and of evaluation; both losses are means over authors of their mean over tokens.

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
    evaluated = {step: row[AUTHOR_LOSS] for step, row in rows if row.get(AUTHOR_LOSS) is not None}  # one for each step
    return training, sorted(evaluated.items())


def draw_losses(axes: "Axes", training: list, evaluated: list) -> None:
    if training:
        marker = "o" if len(training) == 1 else None  # a line of one point is invisible
        axes.plot(*zip(*training), label="training authors", color=GRAY, marker=marker, markersize=4)
    if evaluated:
        axes.plot(*zip(*evaluated), label="held-out authors", color=BLUE, marker="o", markersize=5, linestyle="none")
        for step, loss in {evaluated[0], evaluated[-1]}:
            side = "left" if step == evaluated[0][0] else "right"
            axes.annotate(f"{loss:.2f}", (step, loss), (0, 7), textcoords="offset points", color=BLUE, ha=side)
    top = max(loss for _, loss in [*training, *evaluated])
    axes.set(title="Loss, same scale for both", xlabel="step", ylabel="nats per token, mean over authors", ylim=(0, 1.12 * top))
    axes.legend()


def draw_epsilon(axes: "Axes", ledger: PrivacyLedger, delta: float, target: Optional[float]) -> None:
    """Draw epsilon over the steps of all runs in the ledger."""
    steps = np.unique(np.linspace(0, ledger.steps, 11).round().astype(int)).tolist()
    epsilons = [epsilon_of(first_steps(ledger, number), delta) for number in steps]
    axes.plot(steps, epsilons, color=BLUE, label="spent")
    for end in np.cumsum(ledger.steps_per_run)[:-1]:
        axes.axvline(end, color=GRAY, linewidth=1, linestyle="--")
    if target is not None:
        axes.axhline(target, color=RED, linestyle=":", label=f"target {target:g}")
    axes.set(title="Epsilon spent", xlabel="step, lost ones included", ylabel=f"epsilon at delta {delta:.2g}", ylim=(0, None))
    axes.legend()


def first_steps(ledger: PrivacyLedger, steps: int) -> list[MechanismEvent]:
    """Return the event of each run, limited to the first `steps` steps of all runs."""
    ends = np.cumsum(ledger.steps_per_run)
    steps_of_runs = np.clip(steps - (ends - ledger.steps_per_run), 0, ledger.steps_per_run)
    return [event_of_run(header, int(number)) for header, number in zip(ledger.runs, steps_of_runs)]


def draw_samples(axes: "Axes", samples: list[int], authors: list[int], bound: int) -> None:
    """Draw how many authors have how many samples.

    Args:
        bound: k, samples of an author per step.
    """
    edges = np.unique(np.geomspace(1, max(samples) + 1, 25).round())
    axes.hist(samples, bins=list(edges), weights=authors, color=BLUE)
    axes.axvline(bound + 1, color=RED, linestyle=":", label=f"used per step: up to {bound} (k)")  # right end of k's bin
    axes.set(title="Samples per author", xlabel="samples", ylabel="authors", yscale="log", xscale="log")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.legend()


def draw_norms(axes: "Axes", edges: np.ndarray, counts: np.ndarray, clip_norm: float) -> None:
    """Draw a histogram of gradient norms on a logarithmic axis.

    Args:
        edges: (bins + 1,), multiples of `clip_norm`.
        counts: (bins + 2,); the first and the last are of norms beyond the edges.
    """
    edges = edges * clip_norm
    clipped = counts[np.searchsorted(edges, clip_norm * (1 - 1e-9)) + 1 :].sum() / max(1, counts.sum())
    shown = np.flatnonzero(counts[1:-1])
    axes.stairs(counts[1:-1], edges, fill=True, color=BLUE)
    axes.axvline(clip_norm, color=RED, linestyle=":", label=f"clip norm {clip_norm:g}: {clipped:.0%} are clipped")
    axes.set(title="Author gradient norms", xlabel="norm before clipping", ylabel="sampled authors", xscale="log")
    if len(shown):
        axes.set_xlim(min(edges[shown[0]], clip_norm) / 1.5, max(edges[shown[-1] + 1], clip_norm) * 1.5)
    axes.legend()


def draw_times(axes: "Axes", seconds: list[float]) -> None:
    axes.plot(range(1, len(seconds) + 1), seconds, color=BLUE, linewidth=1)
    axes.axhline(float(np.median(seconds)), color=GRAY, linestyle=":", label=f"median {np.median(seconds):.2g} s")
    axes.set(title="Time per step", xlabel="step of the last run", ylabel="seconds", ylim=(0, None))
    axes.legend()


def draw_figures(folder: Path, report: dict, ledger: PrivacyLedger, statistics: dict) -> dict[str, tuple[Path, bool]]:
    """Write the figures for which there is data.

    Args:
        folder: where to write them.
    Returns:
        for each name its file, and whether it is private.
    """
    drawings: dict[str, tuple] = {}
    if any(points := loss_points(statistics.get("log", []), statistics.get("evaluation", {}))):
        drawings["loss"] = (draw_losses, points, True)
    if ledger.steps and report["epsilon"] is not None:
        drawings["epsilon"] = (draw_epsilon, (ledger, report["delta"], report["target_epsilon"]), False)
    if "samples_per_author" in statistics:
        samples = statistics["samples_per_author"]
        drawings["samples"] = (draw_samples, (samples["samples"], samples["authors"], report["samples_per_author"]), True)
        norms = statistics["norms_over_clip_norm"]
        if report["clip_norm"] and sum(norms["counts"]):
            drawings["norms"] = (draw_norms, (np.array(norms["edges"]), np.array(norms["counts"]), report["clip_norm"]), True)
        if statistics["seconds_per_step"]:
            drawings["time"] = (draw_times, (statistics["seconds_per_step"],), True)
    import matplotlib  # slow: not before a run's first step

    matplotlib.use("Agg")
    from matplotlib import pyplot

    folder.mkdir(exist_ok=True)
    files = {}
    with pyplot.rc_context(STYLE):
        for name, (draw, data, is_private) in drawings.items():
            figure, axes = pyplot.subplots()
            draw(axes, *data)
            files[name] = (folder / f"{name}.png", is_private)
            if is_private:
                make_private(files[name][0])
            figure.savefig(files[name][0])
            pyplot.close(figure)
    return files
