"""Render the report page of a run: one HTML file, its figures inside. What is computed on private data is marked."""

import base64
from pathlib import Path
from typing import Any, Optional

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from author_dp.data.splits import FEW_HELD_OUT
from author_dp.outputs.guarantee import (
    guarantee_in_words,
    guarantee_is_tuned,
    guarantee_table_rows,
    report_has_guarantee,
    summarize_guarantee,
)
from author_dp.outputs.model_card import format_model_card_value, model_card_options
from author_dp.outputs.samples import CONTINUATION, UNCONDITIONAL

STATISTICS_NAME = "_private_statistics.json"
PAGE_NAME = "report.html"
BLUE, RED, GRAY = "#1b6ca8", "#c8553d", "#8a8f98"
PRIVATE, PUBLIC, COVERED = "private", "public", "covered"  # marks of what the page shows
AUTHOR_LOSS = "eval_author_loss"
STANDARD_ERRORS = {"eval_loss": "eval_loss_stderr", AUTHOR_LOSS: "eval_author_loss_stderr"}  # metrics, over authors
EVALUATION_LABELS = (
    (AUTHOR_LOSS, "Held-out authors: mean over authors"),
    ("eval_loss", "Held-out authors: mean over tokens"),
    ("eval_perplexity", "Held-out authors: perplexity, e to the mean over tokens"),
)


def make_html_page(
    title: str, report: dict, figures: dict[str, tuple[Path, bool]], statistics: dict, header: Optional[dict] = None
) -> str:
    """Return the page as HTML; all values are escaped.

    Args:
        report: content of privacy.json.
        figures: file of each figure by name, and whether it is private.
        statistics: recorded by `report.RunStatistics`; may be empty.
        header: of the last run in the ledger; None without privacy.
    """
    templates = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined)
    return templates.get_template("page.html.jinja").render(
        title=title,
        guarantee=guarantee_table_rows(report),
        summary=summarize_guarantee(report),
        decision=guarantee_in_words(report),
        run=html_run_rows(report, header or {}, statistics),
        command=statistics.get("command"),
        held_out=format_held_out_html(statistics.get("evaluation", {}).get("after", {})),
        tuned=guarantee_is_tuned(report),
        accent=BLUE if report_has_guarantee(report) else RED,
        losses=html_loss_rows(statistics.get("log", []), statistics.get("evaluation", {})),
        figures=[
            {"name": name, "png": base64.b64encode(path.read_bytes()).decode(), "kind": PRIVATE if is_private else PUBLIC}
            for name, (path, is_private) in figures.items()
        ],
        texts=html_text_sections(statistics.get("specimens", {}), report_has_guarantee(report)),
    )


def html_run_rows(report: dict, header: dict, statistics: dict) -> list[tuple[str, str]]:
    """Return name and value of what was trained on which data, when and how; public values only.

    Args:
        header, statistics: as for `make_html_page`.
    """
    options = model_card_options(report)
    model, dataset = options.pop("base_model"), options.pop("dataset")
    named = ", named in the command" if statistics.get("command") else ""
    sizes = [options.pop(name, None) for name in ("architecture", "parameters", "trained_parameters")]
    size = "" if None in sizes else f" ({sizes[0]}, {sizes[1]:,} parameters, {sizes[2]:,} of them trained)"
    settings = (f"{name} {format_model_card_value(value)}" for name, value in options.items() if value is not None)
    rows = [
        ("Base model", (model or f"a local folder{named}") + size),
        ("Data", dataset or f"local files{named}"),
        ("Date", report.get("started") or header.get("started") or statistics.get("started")),
        ("Software", ", ".join(f"{name} {version}" for name, version in header.get("versions", {}).items())),
        ("Processes", report.get("world_size")),
        ("Settings", ", ".join(settings)),
    ]
    return [(name, format_model_card_value(value)) for name, value in rows if value not in (None, "")]


def format_held_out_html(metrics: dict[str, Any]) -> str:
    """Return a sentence about the number of held-out authors, which is private; empty if it is unknown."""
    authors, texts = metrics.get("eval_num_authors"), metrics.get("eval_num_texts")
    if authors is None or texts is None:
        return ""
    words = f"Held out: {authors:,} authors with {texts:,} texts."
    if authors < FEW_HELD_OUT:
        words += " So few authors say little: a difference within two standard errors may be chance."
    return words


def html_loss_rows(log: list[dict], evaluation: dict[str, dict]) -> list[tuple[str, str, str]]:
    """Return label and value of each loss before and after training, with two standard errors where they are known.

    Args:
        log: log history of the Trainer.
        evaluation: metrics "before" and "after" training.
    """
    before, after = evaluation.get("before", {}), evaluation.get("after", {})
    rows = [
        (label, format_html_loss(before, name), format_html_loss(after, name))
        for name, label in EVALUATION_LABELS
        if name in after
    ]
    training = [row for row in log if row.get("loss") is not None]
    if training:
        label = "Training authors: mean over authors, last line of the log"
        rows.insert(1 if rows else 0, (label, "", format_html_loss(training[-1], "loss")))
    return rows


def format_html_loss(metrics: dict[str, Any], name: str) -> str:
    """Return a metric, with two standard errors if they are known; empty if there is none."""
    if metrics.get(name) is None:
        return ""
    error = metrics.get(STANDARD_ERRORS.get(name, ""))
    return f"{metrics[name]:,.3f}" + ("" if error is None else f" \u00b1 {2 * error:,.3f}")


def html_text_sections(samples: dict[str, dict[str, list[str]]], covered: bool) -> list[dict[str, Any]]:
    """Return the sections of texts that the model wrote; none if it wrote nothing.

    Args:
        samples: `TextSamples.found`.
        covered: whether the trained model has a guarantee.
    """
    sections = []
    unconditional, continuation = samples.get(UNCONDITIONAL, {}), samples.get(CONTINUATION, {})
    if unconditional.get("after"):
        status = (
            "They are made from the released weights alone: all that a model with a guarantee writes has the same guarantee "
            "(post-processing). Shown are the first texts, none of them selected."
            if covered
            else "The model has no guarantee, and may repeat what its authors wrote."
        )
        note = (
            f"Each begins with nothing. {status} The text before training is the base model's own, on which this run has no "
            "bearing: it is public only if that model is."
        )
        kind = COVERED if covered else PRIVATE
        sections.append(
            {"title": "Texts that begin with nothing", "kind": kind, "note": note, "rows": html_text_rows(unconditional)}
        )
    if continuation.get("after"):
        note = (
            "Prompts (gray) are word for word what held-out authors wrote. No guarantee covers these authors, or text that is "
            "made of what they wrote."
        )
        rows = html_text_rows(continuation)
        sections.append({"title": "Held-out texts, continued", "kind": PRIVATE, "note": note, "rows": rows})
    return sections


def html_text_rows(texts: dict[str, list[str]]) -> list[tuple[str, str, str]]:
    """Return prompt, text before and text after training of each row."""
    after = texts["after"]
    empty = [""] * len(after)
    return list(zip(texts.get("prompts", empty), texts.get("before", empty), after))
