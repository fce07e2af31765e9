"""The figures of a report, as PNGs.

Promise: each says in its caption whether it is private. Losses of training and evaluation stand on one scale.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

import numpy as np

from author_dp.accounting.accountant import MechanismEvent, epsilon_of
from author_dp.accounting.ledger import PrivacyLedger, event_of_run
from author_dp.files import make_private
from author_dp.outputs.page import AUTHOR_LOSS, BLUE, GREY, RED

if TYPE_CHECKING:
    from matplotlib.axes import Axes

STYLE: Any = {
    "figure.figsize": (6.4, 3.4), "figure.dpi": 150, "figure.constrained_layout.use": True, "font.size": 10, "axes.titlesize": 11,
    "axes.titlelocation": "left", "axes.titleweight": "bold", "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "grid.color": "#e6e8eb", "axes.axisbelow": True, "legend.frameon": False,
}  # fmt: skip


def loss_points(log: list[dict], evaluation: dict[str, dict]) -> tuple[list, list]:
    """Return (step, loss) of training and of evaluation, both the mean over authors of each author's mean over own tokens.

    Args:
        log: the Trainer's; its training losses are means over the steps since the one before, and stand in their middle.
        evaluation: the metrics before and after the run.
    """
    training, last = [], 0
    for row in log:
        if row.get("loss") is not None:
            training.append(((last + 1 + row["step"]) / 2, row["loss"]))
            last = row["step"]
    end = max((row["step"] for row in log), default=0)
    rows = [(0, evaluation.get("before", {})), *((row["step"], row) for row in log), (end, evaluation.get("after", {}))]
    evaluated = {step: row[AUTHOR_LOSS] for step, row in rows if row.get(AUTHOR_LOSS) is not None}  # the last of a step
    return training, sorted(evaluated.items())


def draw_losses(axes: "Axes", training: list, evaluated: list) -> None:
    if training:
        is_one = len(training) == 1
        axes.plot(*zip(*training), label="training authors", color=GREY, marker="o" if is_one else None, markersize=4)
    if evaluated:
        axes.plot(*zip(*evaluated), label="held-out authors", color=BLUE, marker="o", markersize=5, linestyle="none")
        for step, loss in {evaluated[0], evaluated[-1]}:
            side = "left" if step == evaluated[0][0] else "right"
            axes.annotate(f"{loss:.2f}", (step, loss), (0, 7), textcoords="offset points", color=BLUE, ha=side)
    top = max(loss for _, loss in [*training, *evaluated])
    axes.set(title="Loss, one scale for both", xlabel="step", ylabel="nats a token, mean over authors", ylim=(0, 1.12 * top))
    axes.legend()


def draw_epsilon(axes: "Axes", ledger: PrivacyLedger, delta: float, target: Optional[float]) -> None:
    """Epsilon after each number of steps, across runs."""
    steps = np.unique(np.linspace(0, ledger.steps, 11).round().astype(int)).tolist()
    epsilons = [epsilon_of(first_steps(ledger, count), delta) for count in steps]
    axes.plot(steps, epsilons, color=BLUE, label="spent")
    for end in np.cumsum(ledger.steps_per_run)[:-1]:
        axes.axvline(end, color=GREY, linewidth=1, linestyle="--")
    if target is not None:
        axes.axhline(target, color=RED, linestyle=":", label=f"target {target:g}")
    axes.set(title="Epsilon spent", xlabel="step, lost ones included", ylabel=f"epsilon at delta {delta:.2g}", ylim=(0, None))
    axes.legend()


def first_steps(ledger: PrivacyLedger, steps: int) -> list[MechanismEvent]:
    """Return what the first `steps` steps have spent."""
    ends = np.cumsum(ledger.steps_per_run)
    counts = np.clip(steps - (ends - ledger.steps_per_run), 0, ledger.steps_per_run)
    return [event_of_run(header, int(count)) for header, count in zip(ledger.runs, counts)]


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


def draw_figures(pictures: Path, report: dict, ledger: PrivacyLedger, statistics: dict) -> dict[str, tuple[Path, bool]]:
    """Write the figures that there are data for; return for each name its file in `pictures`, and whether it is private."""
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
            if is_private:
                make_private(files[name][0])
            figure.savefig(files[name][0])
            pyplot.close(figure)
    return files
