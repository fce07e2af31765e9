"""How useful and how safe synthetic text is, against the real text that its model learned from.

    python -m author_dp.synthetic_report synthetic.jsonl comments.jsonl

Promise: the text is the one that its sidecar was written for, and the authors who are held out are those whom the model never
saw: their rule is checked against the run's. All of what is found is computed on private data without noise: the file is for its
owner's eyes only (mode 0600), is marked, and so is what is printed.

Useful: usefulness.py, small models that learn from it. Safe: passages.py, the longest passages that it shares with training
texts, against what held-out texts share with them, which is what people write alike. The proof is the guarantee, not this.
"""

import argparse
import json
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, Optional

import numpy as np

from author_dp.data.authors import holdout_scores, split_id
from author_dp.data.columns import ColumnSpec
from author_dp.data.readers import read_files, read_rows
from author_dp.errors import UserError
from author_dp.files import write_json
from author_dp.outputs.overlap import Passages, longest_overlaps
from author_dp.outputs.privacy_statement import check_statement
from author_dp.outputs.utility import compare_classifiers, compare_language_models

SUFFIX = ".report.json"
NOTE = "computed on private data without noise: do not publish, and choose no texts by it that are to be published"
QUANTILES = (0.5, 0.9, 0.99, 1.0)
LENGTHS = (5, 10, 20, 40)  # words of passages that are counted
SHOWN = 10  # passages
STEPS = 400  # of the language models


class Text(NamedTuple):
    author: str
    text: str
    label: Optional[str]


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; --help lists all options")


def add_options(parser: Any) -> None:
    """Add the options that say what the real text is."""
    add = parser.add_argument
    add("--validation_file", nargs="+", help="held-out text, if the training had such a file")
    add("--eval_fraction", type=float, default=0.02, help="that of the training; default: %(default)s")
    add("--split_seed", type=int, default=42, help="--seed of the training, which decided who is held out; default: %(default)s")
    add("--author_column", default="author", help="of the real text; default: %(default)s")
    add("--label_column", help="column of a label, in both: a classifier is trained too")


# --- reading ----------------------------------------------------------------------------------------------


def assistant_text(messages: Any) -> str:
    """Return what the assistant says in a conversation."""
    turns = messages if isinstance(messages, list) else []
    return "\n".join(str(turn["content"]) for turn in turns if isinstance(turn, dict) and turn.get("role") == "assistant")


def read_synthetic(path: Path, args: argparse.Namespace) -> list[tuple[str, Optional[str]]]:
    """Return text and label of each row that was generated; of a conversation the answer that was written."""
    rows = []
    for number, row in enumerate(read_rows(str(path), "SYNTHETIC"), 1):
        messages = row.get("messages")
        text = messages[-1]["content"] if isinstance(messages, list) and messages else row.get(args.text_column)
        if text is None or (args.label_column and args.label_column not in row):
            missing = "--label_column" if text is not None else "--text_column"
            raise UserError(f"{missing} is not in {path}, row {number}: its columns are {', '.join(row)}; name one")
        rows.append((str(text), str(row[args.label_column]) if args.label_column else None))
    if not rows:
        raise UserError(f"{path} holds no rows: generate some")
    return rows


def read_real(option: str, files: list[str], args: argparse.Namespace) -> list[Text]:
    """Return the texts of files, each with its author."""
    for name in files:
        if not Path(name).is_file():
            raise UserError(f"{option} {name}: there is no such file")
    is_chat = args.messages_column is not None

    def to_json(*values: Any) -> str:
        text = assistant_text(values[-1]) if is_chat else values[-1]
        return json.dumps([text or "", str(values[0]) if args.label_column else None])

    text_column = args.messages_column if is_chat else args.text_column
    names = {"text_option": "--messages_column" if is_chat else "--text_column", "prompt_option": "--label_column"}
    columns = ColumnSpec(option, text_column, args.author_column, args.label_column, to_json, **names)
    if not is_chat and args.label_column is None:
        columns = columns._replace(as_text=None)
    texts = []
    for batch in read_files(files, columns):
        for author, text in zip(batch.column(args.author_column).to_pylist(), batch.column(text_column).to_pylist()):
            texts.append(Text(author, *(json.loads(text) if columns.as_text else (text, None))))
    return texts


def split(real: list[Text], model: dict[str, Any], args: argparse.Namespace) -> tuple[list[Text], list[Text]]:
    """Return the texts that the model was trained on, and those of authors who were held out, as the training split them.

    Raises:
        UserError: where the run held out others, or nobody.
    """
    by_file, rule = args.validation_file is not None, model.get("split")
    if "split" in model and by_file != (rule is None):
        known = "by a file: give it, by --validation_file" if rule is None else "by the split: leave out --validation_file"
        raise UserError(f"--validation_file: the run of this model held authors out {known}")
    if rule is not None and rule != split_id(args.split_seed, args.eval_fraction, args.author_column):
        raise UserError(
            f"--split_seed {args.split_seed}, --eval_fraction {args.eval_fraction} and --author_column {args.author_column} are "
            "not those of the run of this model, which held out others: give its --seed, --eval_fraction and --author_column"
        )
    fraction = 0.0 if by_file else args.eval_fraction
    notes = model.get("data") or {}
    authors = sorted({row.author for row in real})
    draw = dict(zip(authors, holdout_scores(authors, args.split_seed)))
    limit = fraction + (notes.get("train_fraction") or 1.0) * (1 - fraction)
    training = [row for row in real if fraction <= draw[row.author] < limit][: notes.get("row_limit")]
    if by_file:
        return training, read_real("--validation_file", args.validation_file, args)
    return training, [row for row in real if draw[row.author] < fraction]


# --- what is found ----------------------------------------------------------------------------------------


def overlap_stats(found: Passages, first: int, last: int) -> dict[str, Any]:
    """Return what the texts from `first` to `last` share with training texts."""
    start, end = int(found.words_of[:first].sum()), int(found.words_of[:last].sum())
    places, of_one = found.places[start:end], found.of_one[start:end]
    # A passage is counted where it begins: the place after it has one word less of the same passage.
    begins = np.append(True, places[1:] != places[:-1] - 1)[: len(places)]
    longest, of_author = found.longest[first:last], found.longest_of_one[first:last]
    top = first + np.argsort(-of_author, kind="stable")[:SHOWN]
    lengths = found.words_of[first:last]
    return {
        "texts": last - first,
        "words_of_a_text": float(lengths.mean()),
        "longest_passage": {f"{q:g}": float(np.quantile(longest, q)) for q in QUANTILES},
        "longest_passage_of_one_author": {f"{q:g}": float(np.quantile(of_author, q)) for q in QUANTILES},
        "texts_that_stand_whole_in_a_training_text": float(((longest == lengths) & (lengths > 0)).mean()),
        "passages_of_one_author_per_1000_words": {
            f"{n} words or more": float((begins & of_one & (places >= n)).sum() * 1_000 / max(1, end - start)) for n in LENGTHS
        },
        "longest_ones_of_one_author": [
            {"words": int(found.longest_of_one[i]), "row": int(i - first) + 1, "passage": found.passage(i, of_one=True)}
            for i in top
        ],
    }


def overlap_report(synthetic: list[str], training: list[Text], held_out: list[str]) -> dict[str, Any]:
    """Return what synthetic and held-out texts share with training texts."""
    found = longest_overlaps([row.text for row in training], [row.author for row in training], [*synthetic, *held_out])
    number = len(synthetic)
    ours, theirs = overlap_stats(found, 0, number), overlap_stats(found, number, len(found.longest))
    bound = theirs["longest_passage_of_one_author"]["0.99"]
    beyond = int((found.longest_of_one[:number] > bound).sum())
    return {
        "synthetic": ours,
        "held_out": theirs,
        "beyond": {
            "meaning": "texts whose longest passage of one training author is longer than that of 99 % of the held-out texts",
            "words": bound,
            "synthetic": beyond / number,
            "held_out": float((found.longest_of_one[number:] > bound).mean()),
        },
    }


def make_report(path: Path, files: list[str], args: argparse.Namespace) -> dict[str, Any]:
    """Write the report of a file of synthetic text beside it, and return it.

    Args:
        files: the real text.
    """
    said = check_statement(path)
    synthetic = read_synthetic(path, args)
    training, held_out = split(read_real("FILE", files, args), said.get("model") or {}, args)
    for name, rows in (("trained on", training), ("held out", held_out)):
        if not any(row.text for row in rows):
            raise UserError(f"FILE {' '.join(files)}: it has no text of an author who was {name}: give the text of the training")
    texts = [text for text, _ in synthetic]
    learned: dict[str, Any] = {"texts": min(len(synthetic), len(training))}
    learned |= compare_language_models(texts, [row.text for row in training], [row.text for row in held_out], STEPS)
    report = {
        "note": NOTE,
        "file": path.name,
        "sha256": said["sha256"],
        "statement": said["statement"],
        "language_model": learned,
        "passages": overlap_report(texts, training, [row.text for row in held_out]),
    }
    if args.label_column:
        labelled = [[(row.text, str(row.label)) for row in rows] for rows in (training, held_out)]
        report["classifier"] = compare_classifiers([(text, str(label)) for text, label in synthetic], *labelled)
    write_json(path.with_name(path.name + SUFFIX), report, private=True)
    return report


def format_report(report: dict[str, Any]) -> str:
    """Return the report for people."""
    models, shared = report["language_model"], report["passages"]
    lines = [
        f"{report['file']}: PRIVATE: {NOTE}",
        f"{'a small language model, on held-out text':<58}{'loss':>10}{'guessed':>10}",
    ]
    for name, words in (
        ("untrained", "untrained"),
        ("synthetic", "trained on the synthetic text"),
        ("real", "on as much real text"),
    ):
        lines.append(f"  {words:<56}{models[name]['loss']:>10.3f}{models[name]['accuracy']:>10.1%}")
    if "classifier" in report:
        lines.append("a small classifier, labels of held-out texts found")
        lines += [f"  {name:<56}{share:>20.1%}" for name, share in report["classifier"].items()]
    lines.append(f"{'passages shared with training texts, in words':<58}{'synthetic':>10}{'held-out':>10}")
    both = [shared[name] for name in ("synthetic", "held_out")]
    rows = [
        ("words of a text", [f"{side['words_of_a_text']:.1f}" for side in both]),
        *(
            (f"longest passage{words}, {quantile}", [f"{side[key][number]:g}" for side in both])
            for key, words in (("longest_passage", ""), ("longest_passage_of_one_author", " of one author alone"))
            for number, quantile in (("0.5", "half of the texts"), ("0.99", "99 %"), ("1", "all"))
        ),
        ("texts that stand whole in a training text", [f"{s['texts_that_stand_whole_in_a_training_text']:.2%}" for s in both]),
        (
            f"texts with more than {shared['beyond']['words']:g} words of one author",
            [f"{shared['beyond'][name]:.2%}" for name in ("synthetic", "held_out")],
        ),
    ]
    return "\n".join([*lines, *(f"  {name:<56}{ours:>10}{theirs:>10}" for name, (ours, theirs) in rows)])


def main(arguments: list[str]) -> None:
    parser = Parser("python -m author_dp.synthetic_report", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("synthetic", metavar="SYNTHETIC", type=Path, help="a file that author_dp.generate wrote")
    parser.add_argument("files", metavar="FILE", nargs="+", help="the --train_file of the training")
    parser.add_argument("--text_column", default="content", help="in both; default: %(default)s")
    parser.add_argument("--messages_column", help="column of conversations in the real text, instead of --text_column")
    add_options(parser)
    args = parser.parse_args(arguments)
    print(format_report(make_report(args.synthetic, args.files, args)))
