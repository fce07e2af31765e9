"""synthetic_report.py and overlap.py: what synthetic text shares with training texts."""

import importlib
import itertools
import json
import random
import stat
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from datasets import Dataset
from mutation import catches

from author_dp.data.splits import split_id
from author_dp.errors import UserError
from author_dp.files import write_json
from author_dp.outputs import synthetic_report
from author_dp.outputs.overlap import find_overlap, hash_ngrams, hash_words, words_of
from author_dp.outputs.privacy_statement import make_statement, sha256_of, statement_path
from author_dp.outputs.synthetic_report import (
    SyntheticText,
    main,
    make_synthetic_report,
    split_synthetic_texts,
    synthetic_overlap_report,
)
from data_utils import DataArguments, split_by_author

FILES = ("--train_file", "--validation_file")
OPTIONS = {
    "text_column": None, "messages_column": None, "synthetic_column": None, "author_column": "author", "validation_file": None,
    "eval_fraction": 0.25, "split_seed": 42,
}  # fmt: skip


# --- n-grams ----------------------------------------------------------------------------------------------


def reference(training: list[str], authors: list[int], texts: list[str], length: int) -> tuple[list[int], list[int], int]:
    """Return the texts with an n-gram of a training text, those with one of a single author, and how many authors wrote any."""

    def ngrams(text: str) -> set[tuple[str, ...]]:
        words = words_of(text)
        return {tuple(words[i : i + length]) for i in range(len(words) - length + 1)}

    writers: dict[tuple[str, ...], set[int]] = {}
    for text, author in zip(training, authors):
        for ngram in ngrams(text):
            writers.setdefault(ngram, set()).add(author)
    found = [[writers[ngram] for ngram in ngrams(text) if ngram in writers] for text in texts]
    shared = [i for i, matches in enumerate(found) if matches]
    single = [i for i, matches in enumerate(found) if any(len(authors) == 1 for authors in matches)]
    return shared, single, len({author for matches in found for authors in matches for author in authors})


@catches("an n-gram that several wrote taken for one author's", "outputs.overlap.find_overlap", "authors_of_ngram == 1",
    "authors_of_ngram >= 1")  # fmt: skip
def test_overlap_is_that_of_a_plain_search():
    generator = random.Random(0)
    for _ in range(150):
        letters, length = "abcdef"[: generator.choice([1, 2, 3, 6])], generator.randint(1, 4)
        training, texts = (
            [" ".join(generator.choices(letters, k=generator.randint(0, 7))) for _ in range(generator.randint(0, n))]
            for n in (7, 4)
        )
        authors = [generator.randrange(3) for _ in training]
        ngrams = hash_ngrams(hash_words(texts), length)
        found = find_overlap(ngrams, hash_ngrams(hash_words(training), length), np.array(authors, int))
        shared, single = ([*dict.fromkeys(ngrams.text[mask].tolist())] for mask in (found.shared, found.single_author))
        assert (shared, single, found.num_authors) == reference(training, authors, texts, length)


def test_words_are_compared_without_case_and_punctuation():
    texts = hash_ngrams(hash_words(["one two three four", "好吗?", "two-three"]), 2)
    found = find_overlap(texts, hash_ngrams(hash_words(["He said: TWO, three! 你好吗"]), 2), np.array([0]))
    assert texts.text[found.shared].tolist() == [0, 1, 2] and texts.position[found.shared].tolist() == [1, 0, 0]


def test_order_of_words_counts():
    texts = hash_ngrams(hash_words([" ".join(words) for words in itertools.permutations("abcdef")]), 6)
    assert len(set(texts.values.tolist())) == 720


def test_a_copied_text_of_one_author_shows():
    generator = random.Random(1)
    words = [f"w{n}" for n in range(50)]

    def text(n: int) -> str:
        return " ".join(generator.choices(words, k=n))

    training = [SyntheticText(f"a{n // 2}", text(20)) for n in range(200)]
    synthetic = [text(20) for _ in range(100)]
    synthetic[7] = f"{text(3)} {training[5].text.upper()} {text(2)}"
    synthetic[9] = f"{text(3)} {' '.join(training[8].text.split()[4:14])}"
    found = synthetic_overlap_report(synthetic, training, [text(20) for _ in range(100)])
    shares = {length: of["synthetic"]["texts_single_author"] for length, of in found["ngrams"].items()}
    assert shares == {"8": 0.02, "13": 0.01, "25": 0.0, "50": 0.0} and found["num_texts"]["synthetic"] == 100
    assert found["ngrams"]["8"]["synthetic"]["training_authors"] == 2 and found["ngrams"]["8"]["held_out"]["texts"] == 0
    long, short = found["examples_single_author"]
    assert (long["words"], long["row"]) == (13, 8) and long["passage"] == " ".join(words_of(training[5].text)[:13])
    assert (short["words"], short["row"]) == (8, 10) and short["passage"] in training[8].text
    several = [*training, *(row._replace(author="b") for row in training)]  # two authors wrote each: no single one
    found = synthetic_overlap_report(synthetic, several, [text(20)])
    assert found["ngrams"]["8"]["synthetic"] == {"texts": 0.02, "texts_single_author": 0, "training_authors": 3}
    assert found["examples_single_author"] == []


# --- who was held out -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("fraction", "eval_fraction"), [(1.0, 0.25), (0.5, 0.25), (1.0, 1e-4)])  # the last one holds out one
def test_the_split_is_that_of_the_training(fraction, eval_fraction):
    rows = [{"author": f"a{n % 60}", "content": str(n)} for n in range(180)]
    samples = Dataset.from_list(rows).data
    train, held_out = split_by_author(samples.to_batches(), samples.schema, "author", eval_fraction, 42, fraction)
    split = DataArguments(eval_fraction=eval_fraction).split_id(42)
    model = {"split": split, "data": {"train_fraction": fraction, "row_limit": None}}
    options = Namespace(**{**OPTIONS, "eval_fraction": eval_fraction})
    ours = split_synthetic_texts([SyntheticText(row["author"], row["content"]) for row in rows], model, options)
    assert [[row.text for row in part] for part in ours] == [train["content"], held_out["content"]]


@catches("authors of the training taken for strangers", "outputs.synthetic_report.check_synthetic_split",
    "rule is not None and rule != split_id(args.split_seed, args.eval_fraction, args.author_column)", "False")  # fmt: skip
def test_other_held_out_authors_than_the_runs_are_refused():
    rows = [SyntheticText(str(n), "a") for n in range(9)]
    for model, words in (({"split": split_id(1, 0.25, "author")}, "--split_seed"), ({"split": None}, "--validation_file")):
        with pytest.raises(UserError, match=words):
            split_synthetic_texts(rows, model, Namespace(**OPTIONS))
            pytest.fail("not noticed")
    with pytest.raises(UserError, match="leave out --validation_file"):
        split_synthetic_texts(
            rows,
            {"split": split_id(42, 0.25, "author"), "weights": {"a": "b"}},
            Namespace(**{**OPTIONS, "validation_file": ["v.jsonl"]}),
        )


def sentences(number: int, seed: int) -> list[str]:
    generator = random.Random(seed)
    return [f"the {generator.choice(['dog', 'cat'])} runs to the {generator.choice(['hill', 'lake'])}" for _ in range(number)]


# --- the report -------------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path, monkeypatch) -> tuple[Path, Path]:
    return make_files(tmp_path, monkeypatch)


def make_files(tmp_path: Path, monkeypatch) -> tuple[Path, Path]:
    """Synthetic text with its sidecar, and the text of the training."""
    monkeypatch.setattr(synthetic_report, "LENGTHS", (3, 6))
    real = tmp_path / "real.jsonl"
    rows = [{"author": f"a{n % 40}", "content": text, "animal": text.split()[1]} for n, text in enumerate(sentences(120, 1))]
    real.write_text("".join(json.dumps(row) + "\n" for row in rows))
    synthetic = tmp_path / "s.jsonl"
    synthetic.write_text("".join(json.dumps({"content": t, "animal": t.split()[1]}) + "\n" for t in sentences(50, 2)))
    guarantee = {"epsilon": 8.0, "delta": 1e-5, "disable_dp": False, "split": split_id(42, 0.25, "author"), "weights": {"a": "b"}}
    write_json(statement_path(synthetic), {**make_statement(guarantee, "none"), "sha256": sha256_of(synthetic)})
    return synthetic, real


def test_the_report_is_private_and_marked(files, capsys):
    synthetic, real = files
    main([str(synthetic), str(real), "--eval_fraction", "0.25"])
    printed = capsys.readouterr().out
    path = synthetic.with_name("s.jsonl.report.json")
    report = json.loads(path.read_text())
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and "do not publish" in report["note"] and "do not publish" in printed
    assert report["sha256"] == sha256_of(synthetic)
    assert report["num_texts"]["synthetic"] == 50 and 0 < report["num_texts"]["held_out"] < 120
    assert report["ngrams"]["6"]["synthetic"]["texts"] == 1 and "texts with 6 words in a row of a training text" in printed


@catches(
    "a report on private text for everybody", "outputs.synthetic_report.make_synthetic_report", "private=True", "private=False"
)
def test_the_report_is_for_its_owner(files):
    synthetic, real = files
    make_synthetic_report(synthetic, [str(real)], Namespace(**OPTIONS))
    assert stat.S_IMODE(synthetic.with_name("s.jsonl.report.json").stat().st_mode) == 0o600


def test_conversations_are_compared_by_their_answers(tmp_path, files):
    synthetic, real = files
    for path in files:
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        talks = [[{"role": "user", "content": "Q"}, {"role": "assistant", "content": row["content"]}] for row in rows]
        path.write_text("".join(json.dumps({**row, "content": None, "messages": talk}) + "\n" for row, talk in zip(rows, talks)))
    write_json(statement_path(synthetic), {**json.loads(statement_path(synthetic).read_text()), "sha256": sha256_of(synthetic)})
    report = make_synthetic_report(synthetic, [str(real)], Namespace(**{**OPTIONS, "messages_column": "messages"}))
    assert report["words_per_text"] == {"synthetic": 6, "held_out": 6}


def test_usefulness_is_compared_with_as_much_real_text(files, monkeypatch, capsys):
    """benchmarks/quality.py synthetic_utility, without its two trainings."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    quality = importlib.import_module("quality")
    trained = []

    def fine_tune(*words):
        rows = {name: [json.loads(row) for row in Path(words[words.index(name) + 1]).read_text().splitlines()] for name in FILES}
        trained.append([[row["content"] for row in rows[name]] for name in FILES])
        assert len({row["author"] for row in rows[FILES[0]]}) == len(rows[FILES[0]]) and words[-2:] == ("--model_name", "m")
        return {when: {"eval_loss": 2.0, "eval_perplexity": 7.4} for when in ("before", "after")}

    monkeypatch.setattr(quality, "fine_tune", fine_tune)
    synthetic, real = map(str, files)
    rows = [json.loads(row) for row in files[1].read_text().splitlines()]
    files[1].write_text("".join(json.dumps({**row, "content": f"{row['content']} {n}"}) + "\n" for n, row in enumerate(rows)))
    monkeypatch.setattr(sys, "argv", ["quality.py", synthetic, real, "--eval_fraction", "0.25", "--model_name", "m"])
    quality.main("", quality.synthetic_utility)
    (from_synthetic, held_out), (from_real, again) = trained
    assert sorted(from_synthetic) == sorted(json.loads(row)["content"] for row in files[0].read_text().splitlines())
    assert len(set(from_real)) == len(from_synthetic) == 50 and held_out == again
    assert (
        held_out
        and not {*held_out} & {*from_real}
        and {*held_out, *from_real} <= {f"{row['content']} {n}" for n, row in enumerate(rows)}
    )
    assert "do not publish" in capsys.readouterr().out


def test_what_the_user_can_mend(files):
    synthetic, real = files
    for options, words in (
        ([str(synthetic)], "FILE"), ([str(synthetic), "none.jsonl"], "no such file"),
        ([str(synthetic), str(real)], "--split_seed"),
        ([str(real), str(real)], "nothing says what it is"),
        ([str(synthetic), str(real), "--label_column", "animal"], "--label_column"),  # of older versions
        ([str(synthetic), str(real), "--text_column", "body"], "--text_column"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=words):
            main(options)
    synthetic.write_text(synthetic.read_text() + '{"content": "more", "animal": "dog"}\n')
    with pytest.raises(UserError, match="is not the text"):
        main([str(synthetic), str(real), "--eval_fraction", "0.25"])
