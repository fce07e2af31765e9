"""Write the report of a run: one self-contained page, its figures as PNGs, and a model card that is safe to publish.

    python -m author_dp.report OUTPUT_DIR

Epsilon is recomputed from the ledger. The model card (README.md) holds public values only. The page and the figures also show
losses, gradient norms, sample counts and times, which are computed on private data. They are marked as private and are not for
publication: publish.py and --push_to_hub leave them out.
"""

import json
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Optional

import numpy as np
from peft import PeftModel
from transformers import TrainerCallback

from author_dp.accounting.accountant import format_guarantee
from author_dp.accounting.ledger import LEDGER_NAME, REPORT_NAME, PrivacyLedger, find_ledger_reports
from author_dp.accounting.privacy_report import recompute_privacy_report
from author_dp.accounting.voiding import void_again
from author_dp.clipping.norm_stats import NormStatistics
from author_dp.errors import UserError, first_line
from author_dp.files import read_json_object, write_json
from author_dp.guards.one_run_audit import format_one_run_audit
from author_dp.logs import get_logger
from author_dp.models.weights import check_weights
from author_dp.outputs.figures import draw_figures
from author_dp.outputs.guarantee import guarantee_is_tuned, report_has_guarantee
from author_dp.outputs.html_page import PAGE_NAME, STATISTICS_NAME, make_html_page
from author_dp.outputs.model_card import CARD_NAME, model_card
from author_dp.outputs.rehearsal import PEFT_LOADER, PLAIN_LOADER
from author_dp.outputs.samples import TextSamples
from author_dp.permissions import make_private
from author_dp.training.loss_release import format_released_loss
from author_dp.validation import check_usage

logger = get_logger(__name__)

# --- Recorded during the run --------------------------------------------------------------------------------


class RunStatistics(TrainerCallback):
    """Record what the report shows and no other file holds. All of it is private.

    Args:
        norms: statistics of the per-author gradient norms, read when training ends.
        samples_per_author: (authors,), number of samples of each author.
        text_samples: writes texts before and after training; None: the report shows none.
        command: the command line, without secrets (`cli.command_line`).
    Attributes:
        before, after: metrics and texts of the evaluations before and after training.
    """

    follows = "steps"  # it changes nothing, so callbacks.py need not watch it

    def __init__(
        self,
        norms: NormStatistics,
        samples_per_author: np.ndarray,
        text_samples: Optional[TextSamples] = None,
        command: Optional[str] = None,
    ):
        self.norms, self.text_samples, self.command = norms, text_samples, command
        self.samples, self.authors = np.unique(samples_per_author, return_counts=True)
        self.before: dict[str, Any] = {}
        self.after: dict[str, Any] = {}
        self.step_started, self.seconds = 0.0, list[float]()

    def record_evaluation(self, when: str, metrics: dict[str, float]) -> None:
        """Keep the metrics and the texts of an evaluation, until the file may be written.

        Args:
            when: "before" or "after" training.
        """
        texts = {} if self.text_samples is None else {"specimens": self.text_samples.found}
        setattr(self, when, {"evaluation": {when: metrics}, **texts})

    def add(self, folder: str, **content: Any) -> None:
        """Merge `content` into the file, which may hold what was recorded before this run was resumed."""
        path = Path(folder) / STATISTICS_NAME
        finite = json.loads(json.dumps(content), parse_constant=lambda _: None)
        write_json(path, merge_run_statistics(read_json_object(path) if path.exists() else {}, finite), private=True)

    def on_train_begin(self, args, state, control, **kwargs):
        # Not earlier: only now does the run hold the lock of its output directory.
        if state.is_world_process_zero and self.before:
            # The file may be that of another run in this directory, even of one without privacy.
            (Path(args.output_dir) / STATISTICS_NAME).unlink(missing_ok=True)
            self.add(args.output_dir, **self.before)
        if state.is_world_process_zero and self.command is not None:
            started = datetime.now(timezone.utc).date().isoformat()
            self.add(args.output_dir, command=self.command, started=started)

    def on_step_begin(self, args, state, control, **kwargs):
        self.step_started = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds.append(round(time.perf_counter() - self.step_started, 6))

    def on_train_end(self, args, state, control, **kwargs):
        norm_counts = self.norms.histogram()  # collective
        if not state.is_world_process_zero:
            return
        self.add(
            args.output_dir,
            note="computed on private data without noise: do not publish",
            samples_per_author={"samples": self.samples.tolist(), "authors": self.authors.tolist()},
            norms_over_clip_norm={"edges": self.norms.edges.tolist(), "counts": norm_counts},
            seconds_per_step=self.seconds,
            log=state.log_history,
        )


def merge_run_statistics(old: dict, new: dict) -> dict:
    """Return `old` updated by `new`; nested dictionaries are merged."""
    merged = {
        name: merge_run_statistics(old[name], value) for name, value in new.items() if isinstance(value, dict) and name in old
    }
    return {**old, **new, **merged}


def evaluate_and_sample(trainer: Any, statistics: RunStatistics, when: str) -> dict[str, float]:
    """Evaluate and write the report's texts; record both in `statistics`.

    Args:
        trainer: a dp_utils.DPTrainer.
        when: "before" or "after" training.
    Returns:
        metrics of the held-out authors; empty if there are none.
    """
    metrics = trainer.evaluate() if trainer.eval_dataset is not None else {}
    if metrics:  # the Trainer's progress bar shows log lines during training only
        logger.info(f"Evaluation loss {when} training: {format_reported_losses(metrics)}")
    if statistics.text_samples is not None:
        statistics.text_samples.write(trainer.model, when)
    statistics.record_evaluation(when, metrics)
    return metrics


def format_reported_losses(metrics: dict[str, float]) -> str:
    """Return the loss, then a line with its standard error, which a single author does not have, and the other metrics."""
    error, author_error = (
        f", standard error {metrics[name]:.2g}" if name in metrics else ""
        for name in ("eval_loss_stderr", "eval_author_loss_stderr")
    )
    return (
        f"{metrics['eval_loss']:.2f}\n  {metrics['eval_num_authors']:,} held-out authors{error}; "
        f"perplexity {metrics['eval_perplexity']:,.1f}; mean over authors, as in training: {metrics['eval_author_loss']:.2f}"
        f"{author_error}"
    )


def report_result(trainer: Any, statistics: RunStatistics, release: Optional[dict[str, Any]] = None) -> None:
    """On the main process, write model card and report of a saved model, and print the guarantee as the last line.

    Args:
        trainer: a dp_utils.DPTrainer.
        release: of the evaluation loss, from `release_eval_loss`; None: the last line shows the exact, private loss.
    Raises:
        UserError: if the report cannot be written. The model is saved.
    """
    if not trainer.is_world_process_zero():
        return
    if release is not None:
        trainer.update_report()
    folder = trainer.args.output_dir
    try:
        trainer.create_model_card()
        statistics.add(folder, **statistics.after)
        write_report(Path(folder))
    except Exception as error:  # of the system, or of a library that draws
        raise UserError(
            f"--output_dir {folder}: training is finished and the model saved, but its report cannot be written "
            f"({first_line(error)}). Fix that, then python -m author_dp.report {folder}"
        ) from error
    if (loader := report_loader(trainer)) != PLAIN_LOADER:
        logger.warning(f"Load the result with {loader}.from_pretrained({folder!r}). Other classes may lose weights of it.")
    report, metrics = trainer.privacy_report(), statistics.after.get("evaluation", {}).get("after")
    loss = f", eval loss {metrics['eval_loss']:.2f}" if metrics else ""
    if release is not None:
        loss = f", {format_released_loss(release)}, both public"
    audit = f", audit: epsilon {format_one_run_audit(report['audit'])}" if report.get("audit") else ""
    logger.info(f"Report: {Path(folder) / PAGE_NAME}, private{report_publish_hint(report, folder)}")
    kind = "dry run, not a finished model: " if report.get("dry_run") else ""
    print(f"{kind}{format_guarantee(report['epsilon'], report['delta'])}{loss}{audit}, saved to {folder}")


def report_loader(trainer: Any) -> str:
    """Return the class that loads the result as it was trained: as tried before training, or peft's for an adapter."""
    return trainer.loader or (PEFT_LOADER if isinstance(trainer.model, PeftModel) else PLAIN_LOADER)


# --- The report ---------------------------------------------------------------------------------------------


def report_publish_hint(report: dict[str, Any], folder: str | Path) -> str:
    """Return how to publish a result; empty if `publish` refuses it."""
    if not report_has_guarantee(report) or report.get("alarm") or report.get("dry_run"):
        return ""
    return f". What may be published: python -m author_dp.publish {folder} OUT"


def write_report(folder: Path) -> dict[str, Any]:
    """Write report.html and report/*.png of the run in `folder`; return its privacy.json, recomputed.

    Raises:
        UserError: if the folder holds no report of a run, or its ledger was changed.
    """
    ledger = PrivacyLedger(folder / LEDGER_NAME)
    if not (folder / REPORT_NAME).exists() and not ledger.runs:
        raise UserError(f"OUTPUT_DIR {folder} holds no {REPORT_NAME} or {LEDGER_NAME}: give the --output_dir of a run")
    report = read_report(folder / REPORT_NAME, ledger)
    path = folder / STATISTICS_NAME
    statistics = read_json_object(path) if path.exists() else {}
    figures = draw_figures(folder / "report", report, ledger, statistics)
    path = folder / PAGE_NAME
    make_private(path)
    header = ledger.last_run if ledger.runs else None
    path.write_text(make_html_page(folder.resolve().name, report, figures, statistics, header), encoding="utf-8")
    return report


def read_report(path: Path, ledger: PrivacyLedger) -> dict[str, Any]:
    """Return the report at `path`: recomputed from the ledger, or as it is if it is the result of a search, which has none."""
    if not ledger.runs and path.exists() and guarantee_is_tuned(report := read_json_object(path)):
        return report
    return recompute_privacy_report(path, ledger)


def main(arguments: list[str]) -> None:
    check_usage(arguments, "author_dp.report OUTPUT_DIR", range(1, 2))
    folder = Path(arguments[0])
    ledger = PrivacyLedger(folder / LEDGER_NAME)
    void_again(ledger)
    for path in find_ledger_reports(folder):
        if path.parent != folder:
            ledger.check_report(path)
            continue
        report = read_report(path, ledger)
        if not report["disable_dp"]:
            check_weights(folder, report)
        if not report.get("dry_run"):
            (folder / CARD_NAME).write_text(model_card(report), encoding="utf-8")
    print(f"{folder / PAGE_NAME}: private{report_publish_hint(write_report(folder), folder)}")
