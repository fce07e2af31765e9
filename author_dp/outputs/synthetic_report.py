"""Report which word n-grams synthetic text shares with the texts that its model was trained on.

    python -m author_dp.synthetic_report synthetic.jsonl comments.jsonl

Held-out texts show the background: what people write alike without having read each other. The report is evidence, the guarantee
is the proof.

Guarantees: the text is the one that its privacy statement was written for. The held-out authors are those of the run: their rule
is compared to the run's. All results are computed on private data without noise, so the file is readable for its owner only
(mode 0600), and is marked as private, as the printed report is.
"""

import argparse
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.compute as pc

from author_dp.cli import OptionParser
from author_dp.data.chat import ChatExample
from author_dp.data.columns import ColumnSpec
from author_dp.data.loading import expand_files
from author_dp.data.readers import read_files, read_rows
from author_dp.data.splits import holdout_split_scores, split_id
from author_dp.errors import UserError
from author_dp.files import write_json
from author_dp.outputs.overlap import Overlap, OverlapHashes, find_overlap, hash_ngrams, hash_words, words_of
from author_dp.outputs.privacy_statement import check_statement

SUFFIX = ".report.json"
NOTE = "computed on private data without noise: do not publish, and choose no texts by it that are to be published"
LENGTHS = (8, 13, 25, 50)  # words of an n-gram
NUM_EXAMPLES = 10
COLUMN_OPTIONS = ("text_column", "messages_column", "synthetic_column")


class SyntheticText(NamedTuple):
    author: str
    text: str


def add_synthetic_report_options(parser: Any) -> None:
    """Add the options that describe the real text."""
    add = parser.add_argument
    add("--validation_file", nargs="+", help="held-out text, if the training had such a file")
    add("--eval_fraction", type=float, default=0.02, help="that of the training; default: %(default)s")
    add("--split_seed", type=int, default=42, help="--seed of the training, which decided who is held out; default: %(default)s")
    add("--author_column", help="of the real text; default: that of the training")


# --- Reading ----------------------------------------------------------------------------------------------


def read_synthetic(path: Path, column: str) -> list[str]:
    """Return the generated text of each row; of a conversation its last message.

    Raises:
        UserError: if the file has no rows, or a row has no text.
    """
    texts = []
    for number, row in enumerate(read_rows(str(path), "SYNTHETIC"), 1):
        messages = row.get("messages")
        text = messages[-1]["content"] if isinstance(messages, list) and messages else row.get(column)
        if text is None:
            raise UserError(
                f"--synthetic_column {column!r}: no such text in {path}, row {number}. Its columns are {', '.join(row)}. Name one"
            )
        texts.append(str(text))
    if not texts:
        raise UserError(f"{path} holds no rows: generate some")
    return texts


def read_real(option: str, files: list[str], args: argparse.Namespace) -> list[SyntheticText]:
    """Return the texts of files, each with its author; of a conversation the assistant's messages.

    Raises:
        UserError: if a file is missing or cannot be read.
    """
    columns = ColumnSpec(option, args.text_column, args.author_column)
    if args.messages_column is not None:
        columns = columns._replace(
            text=args.messages_column, as_text=synthetic_assistant_example, text_option="--messages_column"
        )
    texts: list[SyntheticText] = []
    for batch in read_files(expand_files(option, files), columns):
        written = batch.column(columns.text)
        written = written if columns.as_text is None else pc.struct_field(written, "text")
        texts += map(SyntheticText, batch.column(columns.author).to_pylist(), written.to_pylist())
    return [row for row in texts if row.text.strip()]  # as the training does: without a text, there is no sample


def synthetic_assistant_example(messages: Any) -> ChatExample:
    """Return an example whose text is the assistant's messages of a conversation, joined."""
    turns = messages if isinstance(messages, list) else []
    answers = (str(turn["content"]) for turn in turns if isinstance(turn, dict) and turn.get("role") == "assistant")
    return ChatExample("\n".join(answers), [], False)


def check_synthetic_split(model: dict[str, Any], args: argparse.Namespace) -> None:
    """Raise UserError if the run of the model held out other authors than the options say, as far as its guarantee tells."""
    by_file, rule = args.validation_file is not None, model.get("split")
    if "split" in model and by_file != (rule is None):
        known = "by a file: give it, by --validation_file" if rule is None else "by the split: leave out --validation_file"
        raise UserError(f"--validation_file: the run of this model held authors out {known}")
    if rule is not None and rule != split_id(args.split_seed, args.eval_fraction, args.author_column):
        raise UserError(
            f"--split_seed {args.split_seed}, --eval_fraction {args.eval_fraction} and --author_column {args.author_column} are "
            "not those of the run of this model, which held out others: give its --seed, --eval_fraction and --author_column"
        )


def split_synthetic_texts(
    real: list[SyntheticText], model: dict[str, Any], args: argparse.Namespace
) -> tuple[list[SyntheticText], list[SyntheticText]]:
    """Return the texts that the model was trained on and those of held-out authors, as the training split them.

    Args:
        model: guarantee of the model, from the privacy statement.
    Raises:
        UserError: if the run held out other authors, or nobody.
    """
    check_synthetic_split(model, args)
    by_file = args.validation_file is not None
    fraction = 0.0 if by_file else args.eval_fraction
    notes = model.get("data") or {}
    authors = sorted({row.author for row in real})
    score = dict(zip(authors, holdout_split_scores(authors, args.split_seed)))
    limit = fraction + (notes.get("train_fraction") or 1.0) * (1 - fraction)
    if fraction and score:  # as `splits.split_by_author`, where no author's hash is below the fraction
        fraction = max(fraction, float(np.nextafter(min(score.values()), 1)))
    training = [row for row in real if fraction <= score[row.author] < limit][: notes.get("row_limit")]
    if by_file:
        return training, read_real("--validation_file", args.validation_file, args)
    return training, [row for row in real if score[row.author] < fraction]


# --- The report -------------------------------------------------------------------------------------------


def make_synthetic_report(path: Path, files: list[str], args: argparse.Namespace) -> dict[str, Any]:
    """Write the report of a file of synthetic text beside it, and return it.

    Args:
        files: with the real text.
    """
    statement = check_statement(path)
    args = with_default_synthetic_columns(args, statement)
    synthetic = read_synthetic(path, args.synthetic_column)
    training, held_out = split_synthetic_texts(read_real("FILE", files, args), statement.get("model") or {}, args)
    for name, rows in (("trained on", training), ("held out", held_out)):
        if not any(row.text for row in rows):
            raise UserError(f"FILE {' '.join(files)}: it has no text of an author who was {name}: give the text of the training")
    report = {
        "note": NOTE,
        "file": path.name,
        "sha256": statement["sha256"],
        "statement": statement["statement"],
        **synthetic_overlap_report(synthetic, training, [row.text for row in held_out]),
    }
    write_json(path.with_name(path.name + SUFFIX), report, private=True)
    return report


def with_default_synthetic_columns(args: argparse.Namespace, statement: dict[str, Any]) -> argparse.Namespace:
    """Return the options with the columns that are not given: those of the training, and the one that was generated."""
    data = (statement.get("model") or {}).get("data") or {}
    columns = {**vars(args), "author_column": args.author_column or data.get("author_column") or "author"}
    if args.text_column is None and args.messages_column is None:
        columns["messages_column"] = data.get("messages_column")
    columns["text_column"] = args.text_column or data.get("text_column") or "content"
    generated = (statement.get("generated") or {}).get("text_column")
    columns["synthetic_column"] = args.synthetic_column or generated or "content"
    return argparse.Namespace(**columns)


def synthetic_overlap_report(synthetic: list[str], training: list[SyntheticText], held_out: list[str]) -> dict[str, Any]:
    """Return the n-grams that synthetic and held-out texts share with training texts."""
    authors = np.unique([row.author for row in training], return_inverse=True)[1]
    training_words = hash_words(row.text for row in training)
    words = {"synthetic": hash_words(synthetic), "held_out": hash_words(held_out)}
    num_texts = {"synthetic": len(synthetic), "held_out": len(held_out)}
    shares: dict[str, dict[str, Any]] = {}
    examples: dict[int, dict[str, Any]] = {}  # by index of the synthetic text
    for length in sorted(LENGTHS, reverse=True):
        training_ngrams = hash_ngrams(training_words, length)
        shares[str(length)] = {}
        for side in words:
            ngrams = hash_ngrams(words[side], length)
            overlap = find_overlap(ngrams, training_ngrams, authors)
            shares[str(length)][side] = synthetic_overlap_shares(ngrams, overlap, num_texts[side])
            if side == "synthetic":
                examples = synthetic_single_author_examples(ngrams, overlap, synthetic, length) | examples
    examples = dict(sorted(examples.items(), key=lambda item: -item[1]["words"])[:NUM_EXAMPLES])
    return {
        "num_texts": num_texts,
        "words_per_text": {side: len(words[side].values) / num_texts[side] for side in words},
        "ngrams": dict(reversed(shares.items())),
        "examples_single_author": list(examples.values()),
    }


def synthetic_overlap_shares(ngrams: OverlapHashes, overlap: Overlap, num_texts: int) -> dict[str, Any]:
    """Return the share of texts with an n-gram of a training text, and with one that a single training author wrote."""
    return {
        "texts": len(np.unique(ngrams.text[overlap.shared])) / num_texts,
        "texts_single_author": len(np.unique(ngrams.text[overlap.single_author])) / num_texts,
        "training_authors": overlap.num_authors,
    }


def synthetic_single_author_examples(
    ngrams: OverlapHashes, overlap: Overlap, texts: list[str], length: int
) -> dict[int, dict[str, Any]]:
    """Return the first n-gram of a single training author in each of NUM_EXAMPLES texts, by index of the text."""
    matches = np.flatnonzero(overlap.single_author)
    found, first_match = np.unique(ngrams.text[matches], return_index=True)
    examples = {}
    for text, match in zip(found[:NUM_EXAMPLES].tolist(), matches[first_match]):
        start = int(ngrams.position[match])
        passage = " ".join(words_of(texts[text])[start : start + length])
        examples[text] = {"words": length, "row": text + 1, "passage": passage}
    return examples


def format_synthetic_report(report: dict[str, Any]) -> str:
    """Return the report as a table for the terminal."""
    sides = ("synthetic", "held_out")
    rows = [("words per text", [f"{report['words_per_text'][side]:.1f}" for side in sides])]
    for length, of_length in report["ngrams"].items():
        for key, words in (("texts", "a training text"), ("texts_single_author", "a single training author")):
            rows.append((f"texts with {length} words in a row of {words}", [f"{of_length[side][key]:.2%}" for side in sides]))
        rows.append(("  training authors who wrote them", [f"{of_length[side]['training_authors']:,}" for side in sides]))
    return "\n".join(
        [
            f"{report['file']}: PRIVATE: {NOTE}",
            f"{'':<58}{'synthetic':>10}{'held-out':>10}",
            *(f"  {name:<56}{synthetic:>10}{held_out:>10}" for name, (synthetic, held_out) in rows),
        ]
    )


def main(arguments: list[str]) -> None:
    parser = OptionParser("python -m author_dp.synthetic_report", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("synthetic", metavar="SYNTHETIC", type=Path, help="a file that author_dp.generate wrote")
    parser.add_argument("files", metavar="FILE", nargs="+", help="the --train_file of the training")
    parser.add_argument("--text_column", help="of the real text; default: that of the training")
    parser.add_argument("--messages_column", help="column of conversations in the real text, instead of --text_column")
    parser.add_argument("--synthetic_column", help="column of the synthetic text; default: the one that was generated")
    add_synthetic_report_options(parser)
    args = parser.parse_args(arguments)
    print(format_synthetic_report(make_synthetic_report(args.synthetic, args.files, args)))
