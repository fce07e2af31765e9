"""Copy the files of a result that may be published, and no others.

    python -m author_dp.publish FOLDER OUT

FOLDER is the --output_dir of a run, or a checkpoint in it. OUT is a new folder: it gets the weights, the files needed to load
them, privacy.json without the number of samples, and a model card. --push_to_hub uploads the same files.

Guarantees: a file is copied only if its name is on a list. All others, among them losses, reports, logs and the ledger, are left
out, and their names are printed. The weights are those that privacy.json certifies. A result without a guarantee is refused. OUT
appears complete or not at all. Its modification times reveal nothing: they are all the same constant.
"""

import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any, Optional

from huggingface_hub import HfApi

from author_dp.accounting.ledger import REPORT_NAME
from author_dp.accounting.output_dir import record_other_place
from author_dp.errors import UserError
from author_dp.files import write_json
from author_dp.models.weights import adapter_base_model, hash_weights, weight_name_pattern
from author_dp.outputs.guarantee import format_total_guarantee, guarantee_in_search, why_no_guarantee
from author_dp.outputs.model_card import CARD_NAME, model_card
from author_dp.outputs.privacy_statement import PUBLIC_KEYS, check_still_covered, read_privacy_statement, statement_ledger_path
from author_dp.validation import check_usage

# What transformers reads to load and use a model, beside the weights that privacy.json names. All of it is the base model's.
COPIED = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "chat_template.jinja",
    "additional_chat_templates/*.jinja",
)  # fmt: skip
MTIME = 946_684_800  # 2000-01-01, for all files: true times reveal how long steps took, and so how many authors they had


def publish(folder: Path, out: Path, name: str = ".") -> list[str]:
    """Copy the publishable files of `folder` to `out`; return the names that were left out.

    Args:
        folder: output directory of a run, or a checkpoint.
        out: new or empty folder, outside of `folder`.
        name: hub name or path that the model card loads the model by.
    Raises:
        UserError: if the result has no guarantee, privacy.json does not certify its weights, or `out` cannot be used.
    """
    check_publish_target(folder, out)
    left_out = copy_publishable(folder, out, publishable_report(folder), name)
    record_published_place(folder, out)
    return left_out


def record_published_place(folder: Path, out: Path) -> None:
    """Record where a copy of a run's weights is, to find it if the mechanism of the run fails later."""
    if (ledger := statement_ledger_path(folder)).exists():
        with suppress(OSError):  # of a folder that the publisher cannot write
            record_other_place(ledger.parent, out)


def copy_publishable(folder: Path, out: Path, report: dict[str, Any], name: str = ".") -> list[str]:
    """Copy weights and the files needed to load them to `out`, with `report` as privacy.json; return what was left out.

    Args:
        report: public, with a guarantee for the weights in `folder`.
        folder, out, name: as for `publish`.
    Raises:
        UserError: if the weights are others, or `out` cannot be written.
    """
    copied = [path for pattern in COPIED for path in folder.glob(pattern) if path.is_file() and not path.is_symlink()]
    copied += [folder / weights for weights in report["weights"]]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
        try:
            for path in copied:
                target = temporary / path.relative_to(folder)
                target.parent.mkdir(exist_ok=True)
                shutil.copyfile(path, target)
            if hash_weights(temporary) != report["weights"]:
                raise UserError(f"FOLDER {folder}: its weights changed while they were copied. Publish after the run has ended")
            write_json(temporary / REPORT_NAME, report)
            (temporary / CARD_NAME).write_text(model_card(report, name), encoding="utf-8")
            make_publishable(temporary)
            check_still_covered(folder)
            os.replace(temporary, out)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise UserError(f"OUT {out} cannot be written ({error.strerror}): choose a folder with free space") from error
    published = {path.relative_to(folder).parts[0] for path in copied} | {REPORT_NAME, CARD_NAME}
    left_out = {path.name for path in folder.iterdir()} - published
    return sorted(os.fsencode(name).decode(errors="replace") for name in left_out)


def check_publish_target(folder: Path, out: Path) -> None:
    """Raise UserError if `out` is not empty, or lies in the output directory of a run."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"OUT {out} exists and is not an empty folder: choose a new one")
    for parent in (folder, statement_ledger_path(folder).parent):  # the latter is the run's folder if `folder` is a checkpoint
        if out.resolve().is_relative_to(parent.resolve()) and (parent == folder or statement_ledger_path(folder).exists()):
            raise UserError(f"OUT {out} lies in {parent}, and would be taken for weights of that run: choose a folder outside it")


def publishable_report(folder: Path) -> dict[str, Any]:
    """Return the public part of the privacy.json in `folder`.

    Raises:
        UserError: if there is none, it certifies other weights, or it has no guarantee.
    """
    if not (folder / REPORT_NAME).is_file():
        raise UserError(
            f"FOLDER {folder} holds no {REPORT_NAME}, so nothing certifies its weights: give the --output_dir of a finished run, "
            "or a checkpoint in it"
        )
    guarantee = read_privacy_statement(folder)
    assert guarantee is not None  # the file exists
    if reason := why_no_guarantee(guarantee):
        remedy = (
            "Publish the result of the search" if guarantee_in_search(guarantee) else "Train it with privacy, in a new folder"
        )
        raise UserError(f"FOLDER {folder} has no guarantee to publish: {reason}. {remedy}")
    if guarantee.get("dry_run"):
        raise UserError(f"FOLDER {folder}: it holds the result of --dry_run, not a finished model. Give that of a full run")
    names = weight_name_pattern(adapter="adapter_base" in guarantee)
    if other := [name for name in guarantee["weights"] if not names.fullmatch(name)]:
        raise UserError(f"FOLDER {folder}: {REPORT_NAME} names {other[0]}, which is not a file that a run saves. Train again")
    return {key: guarantee[key] for key in PUBLIC_KEYS if key in guarantee and key != "alarm"}


def make_publishable(folder: Path) -> None:
    """Make `folder` readable for everyone, with the same modification time for all files."""
    for path in [*folder.rglob("*"), folder]:
        path.chmod(0o755 if path.is_dir() else 0o644)
        os.utime(path, (MTIME, MTIME))


def publish_to_hub(
    folder: Path, repo: str, message: str, token: Optional[str], revision: Optional[str], in_background: bool
) -> Any:
    """Upload to the hub what `publish` copies of `folder`.

    Args:
        repo: name of the repository.
        message, token, revision: of the commit.
    Returns:
        information on the commit, or its future if `in_background`.
    """
    temporary = Path(tempfile.mkdtemp(prefix="author-publish-"))
    job: Any = None
    try:
        copy_publishable(folder, temporary / "model", publishable_report(folder), repo)
        job = HfApi().upload_folder(  # type: ignore[call-overload]
            repo_id=repo, folder_path=temporary / "model", commit_message=message, token=token, revision=revision,
            run_as_future=in_background,
        )  # fmt: skip
    finally:
        if job is None or not in_background:
            shutil.rmtree(temporary, ignore_errors=True)
    if in_background:
        job.add_done_callback(lambda _: shutil.rmtree(temporary, ignore_errors=True))
    return job


def main(arguments: list[str]) -> None:
    check_usage(arguments, "author_dp.publish FOLDER OUT", range(2, 3))
    folder, out = map(Path, arguments)
    left_out = publish(folder, out)
    report = publishable_report(out)
    print(f"{out}: {format_total_guarantee(report)}")
    print(f"left out: {', '.join(left_out) or 'nothing'}")
    base = adapter_base_model(str(out))
    if base is not None and os.path.isdir(base):
        print(f"note: adapter_config.json names the base model by its local path {base}, which others cannot load")
