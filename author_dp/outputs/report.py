"""Report of a run: one self-contained page, the same figures as PNGs, and a model card that is safe to publish.

    python -m author_dp.report OUTPUT_DIR

Promise: epsilon is computed anew from the ledger. The model card (README.md) holds public values only. The page and the figures
show losses, gradient norms, sample counts and times too, which are computed on private data: they are marked, and are not for
publication: author_dp/outputs/publish.py and --push_to_hub leave them here. What the page says is in report_page.py, its
figures in report_figures.py, what the model writes in specimens.py.
"""

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from transformers import TrainerCallback

from author_dp.accounting.ledger import LEDGER_NAME, REPORT_NAME, PrivacyLedger, find_reports
from author_dp.accounting.privacy_report import recompute_report
from author_dp.clipping.norm_stats import NormStatistics
from author_dp.errors import UserError
from author_dp.files import make_private, write_json
from author_dp.models.weights import check_weights
from author_dp.outputs.figures import draw_figures
from author_dp.outputs.page import PAGE_NAME, STATISTICS_NAME, page

# --- what is noted during the run -------------------------------------------------------------------------


class RunStatistics(TrainerCallback):
    """Note what the report shows and no other file holds. All of it is private.

    Args:
        samples_of_authors: (authors,), how many samples each has.
        norms: of the gradients, read at the end.
    """

    follows = "steps"  # it changes nothing, and need not be looked at (callbacks.py)

    def __init__(self, norms: NormStatistics, samples_of_authors: np.ndarray):
        self.norms, self.started = norms, 0.0
        self.before: dict[str, Any] = {}  # what was found before training: written when the folder is this run's own
        self.seconds: list[float] = []
        self.counts = np.unique(samples_of_authors, return_counts=True)

    def add(self, folder: str, **more: Any) -> None:
        """Add to what the file holds, also from before this run was resumed."""
        path = Path(folder) / STATISTICS_NAME
        finite = json.loads(json.dumps(more), parse_constant=lambda _: None)
        write_json(path, deep_merge(json.loads(path.read_text()) if path.exists() else {}, finite), private=True)

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero and self.before:
            (Path(args.output_dir) / STATISTICS_NAME).unlink(missing_ok=True)  # of another run, perhaps one without privacy
            self.add(args.output_dir, **self.before)

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
        self.add(args.output_dir, **statistics)


def deep_merge(old: dict, new: dict) -> dict:
    """Return `old` with what `new` has, dictionaries within merged alike."""
    both = {name: deep_merge(old[name], value) for name, value in new.items() if isinstance(value, dict) and name in old}
    return {**old, **new, **both}


# --- the report ---------------------------------------------------------------------------------------------


def write_report(folder: Path) -> None:
    """Write report.html and report/*.png of the run in `folder`.

    Raises:
        UserError: where the folder holds no report of a run, or a ledger that was changed.
    """
    ledger = PrivacyLedger(folder / LEDGER_NAME)
    if not (folder / REPORT_NAME).exists() and not ledger.runs:
        raise UserError(f"OUTPUT_DIR {folder} holds no {REPORT_NAME} or {LEDGER_NAME}: give the --output_dir of a run")
    report = recompute_report(folder / REPORT_NAME, ledger)
    path = folder / STATISTICS_NAME
    statistics = json.loads(path.read_text()) if path.exists() else {}
    figures = draw_figures(folder / "report", report, ledger, statistics)
    path = folder / PAGE_NAME
    make_private(path)
    path.write_text(page(folder.resolve().name, report, figures, statistics), encoding="utf-8")


def main(arguments: list[str]) -> None:
    if len(arguments) != 1:
        raise UserError("usage: python -m author_dp.report OUTPUT_DIR")
    folder = Path(arguments[0])
    ledger = PrivacyLedger(folder / LEDGER_NAME)
    for path in find_reports(folder):
        report = ledger.check_report(path)
        if path.parent == folder and not report["disable_dp"]:
            check_weights(folder, report)
    write_report(folder)
