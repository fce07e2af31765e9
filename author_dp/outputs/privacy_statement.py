"""Make the privacy statement of a synthetic text: a file beside it that says what is covered, and what is not.

    synthetic.jsonl                 the text
    synthetic.jsonl.privacy.json    its privacy statement

Guarantees: a statement has an epsilon only if the text is post-processing [1] of a model that has one. Its prompts must be fixed,
or declared public by the person who generated it, and the model's privacy.json must agree with its weights and its ledger. In all
other cases epsilon is null, and the first line says why. A statement holds public values only. It identifies its text by SHA-256,
so that no other text can claim it.

References:
    [1] Dwork and Roth 2014, The Algorithmic Foundations of Differential Privacy, Proposition 2.1
"""

from pathlib import Path
from typing import Any, Optional

from author_dp.accounting.accountant import format_guarantee
from author_dp.accounting.ledger import LEDGER_NAME, REPORT_NAME, PrivacyLedger
from author_dp.accounting.output_dir import has_checkpoint_name
from author_dp.accounting.privacy_report import recompute_privacy_report
from author_dp.data.hub import cached_copy
from author_dp.errors import UserError
from author_dp.files import read_json_object, sha256_of
from author_dp.logs import get_logger
from author_dp.models.weights import adapter_base_model, check_weights, public_model_name
from author_dp.outputs.guarantee import format_guarantee_model, why_no_guarantee

logger = get_logger(__name__)

SUFFIX = ".privacy.json"
NO_PROMPTS, FIXED, PUBLIC, PRIVATE = "none", "fixed", "public", "private"  # source of the prompts

# Keys of privacy.json that are published. All others are left out, above all num_samples, an exact count of private texts.
PUBLIC_KEYS = (
    "privacy_unit", "adjacency", "accountant", "sampling", "epsilon", "delta", "target_epsilon", "noise_multiplier", "clip_norm",
    "sample_rate", "expected_batch_size", "steps", "num_authors", "samples_per_author", "clipping", "world_size", "disable_dp",
    "noise_bands", "accounted_sample_rate", "accounted_steps", "mu_gdp", "tpr_at_fpr", "data", "ledger_link", "alarm",
    "weights", "adapter_base", "base_model", "secure_noise", "audit", "evaluation_release", "epsilon_with_evaluation", "settings",
    "dry_run", "mechanisms", "tuning", "split", "started", "slots", "certificate",
)  # fmt: skip

NOT_COVERED = (
    "removing, selecting or changing texts by comparison with training texts, or by any other use of private data, such as the "
    "report of python -m author_dp.synthetic_report",
    "a choice among several models, runs or files of text by losses or reports on private data; further models trained on the "
    "same authors, which add their own epsilon",
    "authors who were held out, people who appear in the texts of others, and the base model's own training data",
    "the numbers of authors and steps and the sample rate, which are taken as public",
)
PRIVATE_PROMPTS = (
    "prompts and fields: they are taken from private data, appear in the file or affect it, and nothing protects them"
)
PUBLIC_PROMPTS = (
    "prompts and fields, if they are taken from private data after all: the person who made the file declared them public"
)


def read_privacy_statement(folder: Path) -> Optional[dict[str, Any]]:
    """Return the public part of a model's guarantee; None if it has none. Epsilon is recomputed if the ledger is there.

    Raises:
        UserError: if privacy.json cannot be read, knows of steps that its ledger lacks, or certifies other weights.
    """
    path = folder / REPORT_NAME
    if not path.exists():
        return None
    ledger = PrivacyLedger(statement_ledger_path(folder))
    if ledger.runs:
        report = recompute_privacy_report(path, ledger)
        report["alarm"] = ledger.failure
    else:
        report = read_json_object(path)
        if not {"epsilon", "delta", "disable_dp"} <= report.keys():
            raise UserError(f"{path} is not a report of this program: restore it, or generate from another folder")
    if not report["disable_dp"]:
        check_weights(folder, report)
        if (base := adapter_base_model(str(folder))) is not None and (Path(base) / REPORT_NAME).exists():
            found = statement_starting_model(base)  # its mechanism may have been found to have failed since
            report |= {"base_model": found} if found is not None and not found["covered"] else {}
    return {**{key: report[key] for key in PUBLIC_KEYS if key in report}, "ledger_was_read": bool(ledger.runs)}


def check_still_covered(folder: Path) -> None:
    """Raise UserError where the guarantee of the weights in `folder` was voided since it was read: a run may have failed."""
    report, ledger = read_json_object(folder / REPORT_NAME), PrivacyLedger(statement_ledger_path(folder))
    if alarm := report.get("alarm") or ledger.failure:
        raise UserError(f"FOLDER {folder}: its guarantee was voided meanwhile. A run found: {alarm}. Call this again")


def statement_ledger_path(folder: Path) -> Path:
    """Return the path of the ledger of a model: in its folder, or for a checkpoint, whatever it is called now, in that above."""
    above = folder.resolve().parent / LEDGER_NAME
    if has_checkpoint_name(folder) or (above.exists() and not (folder / LEDGER_NAME).exists() and is_report_of(folder, above)):
        return above
    return folder / LEDGER_NAME


def is_report_of(folder: Path, ledger: Path) -> bool:
    """Return whether the privacy.json in a folder was made from the records of a ledger."""
    try:
        return read_json_object(folder / REPORT_NAME).get("ledger_link") in PrivacyLedger(ledger).record_hashes[1:]
    except UserError:
        return False


def statement_starting_model(name: Optional[str], is_marked: bool = False) -> Optional[dict[str, Any]]:
    """Describe the guarantee of a model that training starts from; None if this program did not train it.

    Args:
        name: hub name or local folder.
        is_marked: whether the model's configuration says that this program has trained it.
    """
    found = describe_starting_model(name)
    if found is None and is_marked:
        reason = "this program has trained it, and its privacy.json is not beside it"
        found = {"name": public_model_name(name or "the model"), "covered": False, "epsilon": None, "delta": None}
        found |= {"reason": reason}
        logger.warning(f"--model_name {name}: {format_guarantee_model(found)}")
    return found


def describe_starting_model(name: Optional[str]) -> Optional[dict[str, Any]]:
    """Return `statement_starting_model`, as far as the folder of the model tells."""
    if not name or (folder := cached_copy(name, REPORT_NAME)) is None:
        return None
    reason: Optional[str]
    try:
        guarantee = read_privacy_statement(folder)
    except UserError as error:
        logger.warning(f"--model_name {name}: {error}")
        reason = "its privacy.json does not certify its weights"
    else:
        if guarantee is not None:
            reason = why_no_guarantee(guarantee)
        elif statement_ledger_path(folder).exists():
            reason = "it has a privacy ledger, but no privacy.json: its run did not finish"
        else:
            base = adapter_base_model(name)
            return None if base is None else describe_starting_model(base)
    description: dict[str, Any] = {"name": public_model_name(name), "covered": reason is None, "epsilon": None, "delta": None}
    if reason is None and guarantee is not None:
        description |= {key: guarantee[key] for key in ("epsilon", "delta", "base_model") if key in guarantee}
    else:
        description["reason"] = reason
    logger.warning(f"--model_name {name} was trained by this program: {format_guarantee_model(description)}")
    return description


def statement_prompt_source(private: bool, file: Optional[str], template: Optional[str]) -> str:
    """Return where prompts come from, as the user declared: private ones, a public file, a fixed template, or none."""
    if private:
        return PRIVATE
    if file:
        return PUBLIC
    return NO_PROMPTS if template is None else FIXED


def make_statement(guarantee: Optional[dict[str, Any]], prompts: str) -> dict[str, Any]:
    """Return the privacy statement of a text, without what identifies the text.

    Args:
        guarantee: of the model, from `read_privacy_statement`.
        prompts: their source, one of NO_PROMPTS, FIXED, PUBLIC, PRIVATE.
    """
    reason: Optional[str] = None
    if guarantee is None:
        reason = f"its model has no {REPORT_NAME}: nothing is known about the protection of its training data"
    else:
        reason = why_no_guarantee(guarantee)
        if reason is None and prompts == PRIVATE:
            reason = "its prompts or fields are taken from private data"
    covered = reason is None and guarantee is not None
    if guarantee is not None and covered:
        words = (
            f"{format_guarantee(guarantee['epsilon'], guarantee['delta'])}: the text is post-processing of a model with that "
            "guarantee for each author of its training data, and costs nothing more, however much of it there is."
        )
        if "base_model" in guarantee:
            words += f" The training started from another model: {format_guarantee_model(guarantee['base_model'])}."
    else:
        words = f"NO PRIVACY GUARANTEE: {reason}. The text may repeat what people wrote: do not publish it."
    excluded = [PRIVATE_PROMPTS] if prompts == PRIVATE else [] if prompts == NO_PROMPTS else [PUBLIC_PROMPTS]
    return {
        "statement": words,
        "covered": covered,
        "epsilon": guarantee["epsilon"] if guarantee is not None and covered else None,
        "delta": guarantee["delta"] if guarantee is not None and covered else None,
        "prompts": prompts,
        "not_covered": [*excluded, *NOT_COVERED],
        "model": guarantee,
    }


def statement_path(text: Path) -> Path:
    """Return the path of the privacy statement of a file of text."""
    return text.with_name(text.name + SUFFIX)


def check_statement(text: Path) -> dict[str, Any]:
    """Return the privacy statement of a file of text.

    Raises:
        UserError: if there is none, or it is that of another text.
    """
    path = statement_path(text)
    if not path.exists():
        raise UserError(f"{text} has no {path.name} beside it: nothing says what it is. Copy both, or generate it again")
    statement = read_json_object(path)
    if statement.get("sha256") != sha256_of(text):
        raise UserError(
            f"{text} is not the text that {path.name} was written for, by its SHA-256: the statement does not hold for it. "
            "Restore the file, or generate it again"
        )
    if statement.get("covered") and not (statement.get("model") or {}).get("weights"):
        raise UserError(
            f"{path}: an older version wrote it, without the hashes of the weights that generated the text, so its claim cannot "
            "be verified. Generate the text again"
        )
    return statement
