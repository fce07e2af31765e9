"""synthetic_report.py, passages.py and usefulness.py: what synthetic text shares with training texts, and what it is good for."""

import json
import random
import stat
from argparse import Namespace
from pathlib import Path

import pytest
from datasets import Dataset

from author_dp.data.authors import split_id
from author_dp.errors import UserError
from author_dp.files import write_json
from author_dp.outputs import synthetic_report
from author_dp.outputs import utility as usefulness
from author_dp.outputs.overlap import longest_overlaps, words_of
from author_dp.outputs.privacy_statement import make_statement, sha256_of, statement_path
from author_dp.outputs.synthetic_report import Text, main, make_report, overlap_report, split
from data_utils import DataArguments, split_by_author

OPTIONS = {
    "text_column": "content", "messages_column": None, "author_column": "author", "label_column": None, "validation_file": None,
    "eval_fraction": 0.25, "split_seed": 42,
}  # fmt: skip


# --- passages ---------------------------------------------------------------------------------------------


def naive(training: list[str], authors: list[str], texts: list[str]) -> list[list[tuple[int, bool]]]:
    """Of each place of each text: words of the longest passage that begins there in a training text; whether of one author."""
    found = []
    for text in map(words_of, texts):
        row = []
        for i in range(len(text)):
            lengths: dict[str, int] = {}
            for other, author in zip(map(words_of, training), authors):
                for j in range(len(other)):
                    pairs = list(zip(text[i:], other[j:]))
                    length = next((n for n, (a, b) in enumerate(pairs) if a != b), len(pairs))
                    lengths[author] = max(length, lengths.get(author, 0))
            best = max(lengths.values(), default=0)
            row.append((best, best > 0 and sum(length == best for length in lengths.values()) == 1))
        found.append(row)
    return found


def test_passages_are_those_of_a_plain_search():
    generator = random.Random(0)
    for _ in range(150):
        letters = "abcdef"[: generator.choice([1, 2, 3, 6])]
        training, texts = (
            [" ".join(generator.choices(letters, k=generator.randint(0, 7))) for _ in range(generator.randint(0, n))]
            for n in (7, 4)
        )
        authors = [generator.choice("xyz") for _ in training]
        found, expected = longest_overlaps(training, authors, texts), naive(training, authors, texts)
        assert list(zip(found.places.tolist(), found.of_one.tolist())) == [place for row in expected for place in row]
        assert found.longest.tolist() == [max([n for n, _ in row], default=0) for row in expected]
        assert found.longest_of_one.tolist() == [max([n for n, one in row if one], default=0) for row in expected]


def test_words_are_compared_without_case_and_punctuation():
    found = longest_overlaps(["He said: TWO, three! 你好吗"], ["a"], ["one two three four", "好吗?"])
    assert found.longest.tolist() == [2, 2] and (found.passage(0), found.passage(1)) == ("two three", "好 吗")


def test_a_copied_text_of_one_author_shows():
    generator = random.Random(1)
    words = [f"w{n}" for n in range(50)]

    def text(n: int) -> str:
        return " ".join(generator.choices(words, k=n))

    training = [Text(f"a{n // 2}", text(20), None) for n in range(200)]
    synthetic = [text(20) for _ in range(100)]
    synthetic[7] = f"{text(3)} {training[5].text.upper()} {text(2)}"
    found = overlap_report(synthetic, training, [text(20) for _ in range(100)])
    first = found["synthetic"]["longest_ones_of_one_author"][0]
    assert first["words"] >= 20 and first["row"] == 8 and " ".join(words_of(training[5].text)) in first["passage"]
    assert found["held_out"]["longest_passage_of_one_author"]["1"] < 8 and 0.01 <= found["beyond"]["synthetic"] < 0.1
    several = [*training, *(row._replace(author="b") for row in training)]  # of two authors each: nobody's alone
    assert overlap_report(synthetic, several, [text(20)])["synthetic"]["longest_passage_of_one_author"]["1"] == 0
    counts = found["synthetic"]["passages_of_one_author_per_1000_words"]
    assert counts["20 words or more"] == pytest.approx(1_000 / 2_005) and counts["40 words or more"] == 0


# --- who was held out -------------------------------------------------------------------------------------


@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_the_split_is_that_of_the_training(fraction):
    rows = [{"author": f"a{n % 60}", "content": str(n)} for n in range(180)]
    train, held_out = split_by_author(Dataset.from_list(rows), "author", 0.25, 42, fraction)
    model = {
        "split": DataArguments(eval_fraction=0.25).split_id(42),
        "data": {"train_fraction": fraction, "row_limit": None},
    }
    ours = split([Text(row["author"], row["content"], None) for row in rows], model, Namespace(**OPTIONS))
    assert [[row.text for row in part] for part in ours] == [train["content"], held_out["content"]]


def test_other_held_out_authors_than_the_runs_are_refused():
    rows = [Text(str(n), "a", None) for n in range(9)]
    for model, words in (({"split": split_id(1, 0.25, "author")}, "--split_seed"), ({"split": None}, "--validation_file")):
        with pytest.raises(UserError, match=words):
            split(rows, model, Namespace(**OPTIONS))
            pytest.fail("not noticed")
    with pytest.raises(UserError, match="leave out --validation_file"):
        split(
            rows,
            {"split": split_id(42, 0.25, "author"), "weights": {"a": "b"}},
            Namespace(**{**OPTIONS, "validation_file": ["v.jsonl"]}),
        )


# --- use --------------------------------------------------------------------------------------------------


def sentences(number: int, seed: int) -> list[str]:
    generator = random.Random(seed)
    return [f"the {generator.choice(['dog', 'cat'])} runs to the {generator.choice(['hill', 'lake'])}" for _ in range(number)]


def test_a_language_model_learns_from_text_that_is_alike():
    shuffled = [" ".join(random.Random(n).sample(text.split(), 6)) for n, text in enumerate(sentences(200, 1))]
    real, held_out = sentences(300, 2), sentences(50, 3)
    found = usefulness.compare_language_models(sentences(200, 4), real, held_out, steps=25)
    worse = usefulness.compare_language_models(shuffled, real, held_out, steps=25)
    assert found["synthetic"]["loss"] < 0.7 and abs(found["synthetic"]["loss"] - found["real"]["loss"]) < 0.1
    assert worse["synthetic"]["loss"] > found["synthetic"]["loss"] + 0.3 and found["untrained"]["loss"] > 3
    assert worse["real"] == found["real"] and found["synthetic"]["accuracy"] > 0.7 > worse["synthetic"]["accuracy"]


def test_a_classifier_learns_labels_that_are_right():
    real = [(text, "d" if "dog" in text else "c") for text in sentences(300, 1)]
    wrong = [(text, "d" if "hill" in text else "c") for text, _ in real]
    assert usefulness.compare_classifiers(real, real, real) == {
        "commonest label": pytest.approx(0.5, abs=0.1),
        "synthetic": 1,
        "real": 1,
    }
    assert usefulness.compare_classifiers(wrong, real, real)["synthetic"] < 0.7


# --- the report -------------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path, monkeypatch) -> tuple[Path, Path]:
    return make_files(tmp_path, monkeypatch)


def make_files(tmp_path: Path, monkeypatch) -> tuple[Path, Path]:
    """Synthetic text with its sidecar, and the text of the training."""
    monkeypatch.setattr(synthetic_report, "STEPS", 3)
    real = tmp_path / "real.jsonl"
    rows = [{"author": f"a{n % 40}", "content": text, "animal": text.split()[1]} for n, text in enumerate(sentences(120, 1))]
    real.write_text("".join(json.dumps(row) + "\n" for row in rows))
    synthetic = tmp_path / "s.jsonl"
    synthetic.write_text("".join(json.dumps({"content": t, "animal": t.split()[1]}) + "\n" for t in sentences(50, 2)))
    guarantee = {
        "epsilon": 8.0,
        "delta": 1e-5,
        "disable_dp": False,
        "split": split_id(42, 0.25, "author"),
        "weights": {"a": "b"},
    }
    write_json(statement_path(synthetic), {**make_statement(guarantee, "none"), "sha256": sha256_of(synthetic)})
    return synthetic, real


def test_the_report_is_private_and_marked(files, capsys):
    synthetic, real = files
    main([str(synthetic), str(real), "--eval_fraction", "0.25", "--label_column", "animal"])
    printed = capsys.readouterr().out
    path = synthetic.with_name("s.jsonl.report.json")
    report = json.loads(path.read_text())
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and "do not publish" in report["note"] and "do not publish" in printed
    assert report["sha256"] == sha256_of(synthetic) and report["classifier"]["real"] == 1
    assert report["passages"]["synthetic"]["texts"] == 50 and 0 < report["passages"]["held_out"]["texts"] < 120
    assert f"{report['language_model']['real']['loss']:.3f}" in printed


def test_the_report_is_for_its_owner(files):
    synthetic, real = files
    make_report(synthetic, [str(real)], Namespace(**OPTIONS))
    assert stat.S_IMODE(synthetic.with_name("s.jsonl.report.json").stat().st_mode) == 0o600


def test_conversations_are_compared_by_their_answers(tmp_path, files):
    synthetic, real = files
    for path in files:
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        talks = [[{"role": "user", "content": "Q"}, {"role": "assistant", "content": row["content"]}] for row in rows]
        path.write_text("".join(json.dumps({**row, "content": None, "messages": talk}) + "\n" for row, talk in zip(rows, talks)))
    write_json(statement_path(synthetic), {**json.loads(statement_path(synthetic).read_text()), "sha256": sha256_of(synthetic)})
    report = make_report(synthetic, [str(real)], Namespace(**{**OPTIONS, "messages_column": "messages"}))
    assert report["passages"]["held_out"]["words_of_a_text"] == report["passages"]["synthetic"]["words_of_a_text"] == 6


def test_what_the_user_can_mend(files):
    synthetic, real = files
    for options, words in (
        ([str(synthetic)], "FILE"), ([str(synthetic), "none.jsonl"], "no such file"),
        ([str(synthetic), str(real)], "--split_seed"),
        ([str(real), str(real)], "nothing says what it is"),
        ([str(synthetic), str(real), "--label_column", "colour"], "--label_column"),
        ([str(synthetic), str(real), "--text_column", "body"], "--text_column"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=words):
            main(options)
    synthetic.write_text(synthetic.read_text() + '{"content": "more", "animal": "dog"}\n')
    with pytest.raises(UserError, match="is not the text"):
        main([str(synthetic), str(real), "--eval_fraction", "0.25"])
