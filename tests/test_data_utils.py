"""py: who is an author, what is a sample, and that neither changes silently."""

import json
from pathlib import Path
from typing import Optional

import datasets
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from mutation import catches
from transformers import AutoTokenizer

from author_dp.data import storage
from author_dp.data.authors import suspicious_author_warnings
from author_dp.data.columns import ColumnSpec, get_column
from author_dp.data.hub import read_hub
from author_dp.data.loading import drop_blank_texts, load_files
from author_dp.data.splits import format_data_summary
from author_dp.errors import UserError
from data_utils import DataArguments, group_by_author, load_train_and_eval, split_by_author

ROWS = [("alice", "one two three"), (" alice", "four five"), ("bob", "six"), ("alice", "seven eight"), ("Bob", "nine ten")]


def write(folder, suffix, authors, texts):
    frame = pd.DataFrame({"user": authors, "body": texts, "score": range(len(texts))})
    path = folder / f"comments{suffix}"
    {
        ".jsonl": lambda: frame.to_json(path, orient="records", lines=True),
        ".json": lambda: frame.to_json(path, orient="records"),
        ".csv": lambda: frame.to_csv(path, index=False),
        ".parquet": lambda: frame.to_parquet(path, index=False),
    }[suffix]()
    return str(path)


def load(*patterns):
    return load_files(list(patterns), ColumnSpec("--train_file", "body", "user"))


# --- loading ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_every_format_gives_the_same_samples(tmp_path, suffix):
    samples = load(write(tmp_path, suffix, *zip(*ROWS)))
    assert list(zip(samples["user"], samples["body"])) == ROWS
    assert set(samples.column_names) == {"user", "body"}


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_authors_may_be_integers(tmp_path, suffix):
    samples = load(write(tmp_path, suffix, [3, 10, 3], ["a b", "c d", "e f"]))
    offsets, indices = group_by_author(get_column(samples, "user"))
    assert offsets.tolist() == [0, 2, 3] and indices.tolist() == [0, 2, 1]


def test_csv_authors_are_as_written(tmp_path):
    path = tmp_path / "comments.csv"
    path.write_text("user,body\n007,a b\n7,c d\nNA,e f\nnull,g h\n7.0,i j\n")
    assert load(str(path))["user"][:] == ["007", "7", "NA", "null", "7.0"]


def test_a_byte_order_mark_as_spreadsheets_write_it_is_no_part_of_a_column(tmp_path):
    path = tmp_path / "comments.csv"
    path.write_text("user,body\na,b c\n", encoding="utf-8-sig")
    assert load(str(path))["user"][:] == ["a"]


def test_several_files_and_globs(tmp_path):
    for name, author in (("x1", "a"), ("x2", "b"), ("y", "c")):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"user": author, "body": "t u"}) + "\n")
    assert load(str(tmp_path / "x*.jsonl"), str(tmp_path / "y.jsonl"))["user"][:] == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", '{"user": "a", "text": "t"}\n', ["--text_column", "'body'", "user, text"]),
        ("a.jsonl", '{"writer": "a", "body": "t"}\n', ["--author_column", "'user'", "writer, body"]),
        ("a.jsonl", '{"user": null, "body": "t"}\n{"user": "a", "body": "t"}\n', ["--author_column", "row 1"]),
        ("a.jsonl", '{"user": "a", "body": "t"}\n{"body": "t"}\n', ["--author_column", "row 2"]),
        ("a.jsonl", '{"user": "a", "body": "t"}\n{"user": "  ", "body": "t"}\n', ["--author_column", "row 2"]),
        ("a.csv", "user,body\na,t\n,u\n", ["--author_column", "row 2"]),
        (
            "a.jsonl",
            '{"user": "a", "body": "t"}\n{"user": "a", "body": 3}\n',
            ["--text_column", "'3' in line 2 (row 2)", "fix the row"],
        ),
        ("a.jsonl", '{"user": "a", "body": ["t"]}\n', ["--text_column", "row 1", "fix the row"]),
        ("a.jsonl", b'{"user": "a", "body": "t"}\n{"user": "a\xff", "body": "t"}\n', ["--train_file", "line 2", "UTF-8"]),
        ("a.jsonl", b'{"user": "a", "body": "t"}\n{"user": "a", "body": "\xe9"}\n', ["--train_file", "line 2", "UTF-8"]),
        ("a.csv", "user,body\na,t\nb,one, two\n", ["--train_file", "line 3", "3 values", "quote"]),
        ("a.csv", "body,user\none, two,a\none, two,b\n", ["--train_file", "line 2", "quote"]),
        ("a.csv", "user,body\na,t\nb\n", ["--train_file", "line 3", "1 values"]),
        ("a.csv", 'user,body\na,"t\nb,u\n', ["--train_file", "a.csv"]),
        ("a.json", '{"data": [{"user": "a", "body": "t"}]}', ["--text_column", "'body'", "data"]),
        ("a.jsonl", '{"user": ["a"], "body": "t"}\n', ["--author_column"]),
        ("a.jsonl", '{"user": 1, "body": "t"}\n{"user": "1", "body": "t"}\n', ["--author_column"]),
        ("a.jsonl", '{"user": "a", "body": \n', ["--train_file", "a.jsonl"]),
        ("a.jsonl", "", ["--train_file", "empty"]),
        ("a.csv", "user,body\n", ["--train_file", "no rows"]),
        ("a.csv", "user;body\na;t\n", ["--text_column", "'user;body'", "commas"]),
        ("a.csv", "user,body,user\na,t,b\n", ["--author_column", "2 columns"]),
        ("a.csv", b"user,body\na,t\na,\xff\xfe\n", ["--train_file", "a.csv", "line 3", "UTF-8"]),
        ("a.parquet", b"PAR1 and then nothing", ["--train_file", "a.parquet"]),
        ("a.xlsx", "x", ["--train_file", ".xlsx", ".csv"]),
    ],
)
def test_a_wrong_file_is_named_with_the_remedy(tmp_path, name, content, words):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as error:
        load(str(path))
    assert all(word in str(error.value) for word in words), str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_a_truncated_parquet_file_is_named(tmp_path):
    write(tmp_path, ".parquet", ["a", "b"], ["one", "two"])
    (path,) = tmp_path.glob("*.parquet")
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match=rf"--train_file .*{path.name}: it cannot be read as \.parquet"):
        load(str(path))


def test_nothing_is_said_but_the_complaint(tmp_path, capfd):
    (tmp_path / "a.jsonl").write_text("no JSON\n")
    with pytest.raises(UserError, match=r"cannot be read as \.jsonl"):
        load(str(tmp_path / "a.jsonl"))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_a_byte_order_mark_is_no_part_of_a_name(tmp_path, suffix):
    write(tmp_path, suffix, ["a", "b"], ["one", "two"])
    (path,) = tmp_path.glob(f"*{suffix}")
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert load(str(path))["user"][:] == ["a", "b"]


def test_one_author_only_is_refused():
    with pytest.raises(UserError, match="one author only"):
        split(["a"] * 10)


def test_a_name_that_looks_like_a_pattern_is_a_name(tmp_path):
    for name, author in (("c[1].jsonl", "a"), ("c1.jsonl", "b")):
        (tmp_path / name).write_text(json.dumps({"user": author, "body": "t u"}) + "\n")
    assert load(str(tmp_path / "c[1].jsonl"))["user"][:] == ["a"]
    with pytest.raises(UserError, match="2 times"):
        load(str(tmp_path / "c1.jsonl"), str(tmp_path / "c?.jsonl"))


def test_texts_are_left_nowhere(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    path = write(tmp_path, ".jsonl", ["a", "b"], ["one", "two"])
    samples = load(path)
    (folder,) = tmp_path.glob("author-texts-*")
    assert folder.stat().st_mode & 0o777 == 0o700 and samples["body"][:] == ["one", "two"]
    storage.cleanup_temp_dirs()
    assert not folder.exists()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "gone"))
    for name in (None, "author-texts-a"):
        with pytest.raises(UserError, match=r"^TMPDIR .*gone: no such folder"):  # instead of leaving them in /tmp
            storage.make_private_temp_dir(name)
    (tmp_path / "full").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "full"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))  # as Python does where that one cannot be written
    with pytest.raises(UserError, match=r"^TMPDIR .*full: it cannot be written"):
        storage.make_private_temp_dir()


def test_missing_files_and_folders_are_named(tmp_path):
    with pytest.raises(UserError, match=r"--train_file .*nothing\.jsonl"):
        load(str(tmp_path / "nothing.jsonl"))
    with pytest.raises(UserError, match="folder"):
        load(str(tmp_path))


# --- the hub's layout ---------------------------------------------------------------------------------


HUB_COLUMNS = ColumnSpec("--dataset_name", "content", "author")


def make_conversion(root, rows_per_shard, shards, split="partial-train"):
    folder = root / "default" / split
    folder.mkdir(parents=True)
    for shard in range(shards):
        numbers = range(shard * rows_per_shard, (shard + 1) * rows_per_shard)
        table = pa.table(
            {"author": [f"u{n % 7}" for n in numbers], "content": [f"text {n}" for n in numbers], "id": list(numbers)}
        )
        pq.write_table(table, folder / f"{shard:04d}.parquet")


def load_hub(name: str, columns: ColumnSpec, limit: Optional[int] = None) -> Dataset:
    batches = read_hub(name, "default", "main", columns, limit, {})
    return storage.write_arrow(drop_blank_texts(batches, columns, name), columns.schema, None)


@pytest.mark.parametrize("split", ["partial-train", "train"])
def test_hub_layout_in_a_local_folder(tmp_path, split):
    make_conversion(tmp_path, rows_per_shard=10, shards=3, split=split)
    args = DataArguments(dataset_name=str(tmp_path), eval_fraction=0.0)
    train, evaluation = load_train_and_eval(args, seed=0)
    assert evaluation is None and train["content"][:] == [f"text {n}" for n in range(30)]


def test_only_the_shards_that_are_needed_are_read(tmp_path):
    make_conversion(tmp_path, rows_per_shard=10, shards=3)
    (tmp_path / "default" / "partial-train" / "0002.parquet").write_bytes(b"must not be opened")
    samples = load_hub(str(tmp_path), HUB_COLUMNS, limit=15)
    assert samples["content"][:] == [f"text {n}" for n in range(15)]


def test_hub_errors_name_option_and_remedy(tmp_path):
    with pytest.raises(UserError, match="--dataset_config_name"):
        load_hub(str(tmp_path), HUB_COLUMNS)
    with pytest.raises(UserError, match=r"--train_file.*--model_name.*demo"):
        load_hub("webis/tldr-17", HUB_COLUMNS)
    make_conversion(tmp_path, rows_per_shard=3, shards=1)
    with pytest.raises(UserError, match="--author_column 'user'"):
        load_hub(str(tmp_path), HUB_COLUMNS._replace(author="user"))


# --- split --------------------------------------------------------------------------------------------


def split_dataset(samples: Dataset, *options, **more) -> tuple[Dataset, Optional[Dataset]]:
    return split_by_author(
        samples.with_format("arrow")[:].to_batches(100), samples.features.arrow_schema, "user", *options, **more
    )


def split(authors, seed=0, fraction=0.2):
    samples = datasets.Dataset.from_dict({"user": authors, "body": [f"text {i}" for i in range(len(authors))]})
    train, evaluation = split_dataset(samples, fraction, seed)
    return set(train["user"]), set(evaluation["user"]), len(train) + len(evaluation)


def test_no_author_is_on_both_sides():
    authors = [f"u{i % 500}" for i in range(1_300)]
    train, evaluation, total = split(authors)
    assert total == 1_300 and not train & evaluation and train | evaluation == set(authors)
    assert 60 <= len(evaluation) <= 140  # 100 expected, standard deviation 9


@catches("authors move when another one leaves", "data.authors.hash_authors", '{prefix}{author}".encode()',
    '{len(authors)}:{author}".encode()')  # fmt: skip
def test_split_depends_on_seed_and_author_alone():
    authors = [f"u{i}" for i in range(500)]
    _, evaluation, _ = split(authors)
    assert split(authors)[1] == evaluation != split(authors, seed=1)[1]
    # Adding or removing an author moves nobody else: neighbouring data sets stay neighbours.
    assert split([*authors, "newcomer"])[1] - {"newcomer"} == evaluation
    assert split(authors[1:])[1] == evaluation - {"u0"}
    assert split(authors[::-1])[1] == evaluation


@pytest.mark.integration
@catches("who is trained depends on who else is there", "data.splits.write_split_sides", "(scores < train_below)",
    "(np.argsort(np.argsort(scores)) / len(scores) < train_below)")  # fmt: skip
def test_a_fraction_of_the_authors_depends_on_each_alone():
    """Whole authors; without one of them, no other one moves."""
    authors = [f"u{i % 300}" for i in range(900)]
    samples = Dataset.from_dict({"user": authors, "body": ["a b"] * 900})

    def trained(samples, fraction=0.5):
        train, evaluation = split_dataset(samples, 0.2, 0, fraction)
        return set(train["user"]), set(evaluation["user"])

    train, evaluation = trained(samples)
    few = Dataset.from_dict({"user": list("abcdefgh"), "body": ["a b"] * 8})
    for gone in "abcdefgh":  # among few, a rank or a count of those who are there would move somebody
        rest = few.select([i for i, author in enumerate("abcdefgh") if author != gone])
        sides, others = (split_dataset(s, 0.0, 3, 0.5)[0]["user"][:] for s in (few, rest))
        assert set(others) == set(sides) - {gone}
    assert 80 < len(train) < 160 and not train & evaluation and trained(samples, 0.3)[0] < train
    assert evaluation == trained(samples, 1.0)[1]
    for gone in (*sorted(train)[:20], *sorted(evaluation)[:5]):
        rest = samples.select([i for i, author in enumerate(authors) if author != gone])
        assert trained(rest) == (train - {gone}, evaluation - {gone})


def test_small_data_still_has_an_author_on_each_side():
    train, evaluation, _ = split(["a", "b", "c"], fraction=0.001)
    assert len(train) == 2 and len(evaluation) == 1
    with pytest.raises(UserError, match="--eval_fraction"):
        split(["a", "b"], fraction=0.999999)


def test_validation_authors_are_not_those_of_training(tmp_path, caplog):
    files = {}
    for name, authors in (("train", "abcd"), ("same", "xcd"), ("other", "xyz")):
        files[name] = str(tmp_path / f"{name}.jsonl")
        Path(files[name]).write_text("".join(json.dumps({"author": a, "content": f"text {a}"}) + "\n" for a in authors))
    with pytest.raises(UserError, match=r"--validation_file: 2 of its 3 authors.*--allow_shared_authors"):
        load_train_and_eval(DataArguments(train_file=[files["train"]], validation_file=[files["same"]]), seed=0)
    for arguments in ({"validation_file": [files["other"]]}, {"validation_file": [files["same"]], "allow_shared_authors": True}):
        train, evaluation = load_train_and_eval(DataArguments(train_file=[files["train"]], **arguments), seed=0)
        assert len(train) == 4 and len(evaluation) == 3


def test_authors_of_another_kind_in_the_validation_file_are_refused(tmp_path):
    """Or 7 and "7" would not be seen to be one."""
    for name, kind in (("train", int), ("other", str)):
        rows = [{"author": kind(i), "content": f"text {i}"} for i in range(3)]
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    files = {"train_file": [str(tmp_path / "train.json")], "validation_file": [str(tmp_path / "other.json")]}
    with pytest.raises(UserError, match=r"--validation_file: .*other\.json.*holds a string.*train\.json.*holds an integer"):
        load_train_and_eval(DataArguments(**files), seed=0)


def test_rows_taken_as_given_are_told_from_whole_authors(checkpoint):
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    assert DataArguments().row_limit == 500_000 and DataArguments(max_train_samples=7).row_limit == 7
    assert DataArguments(train_file=["a"]).row_limit is None
    notes = DataArguments(train_file=["a"], max_train_samples=1_000).summary(tokenizer)
    assert notes["row_limit"] == 1_000 and "taken as given" in " ".join(format_data_summary(notes))
    notes = DataArguments(train_file=["a"], train_fraction=0.5).summary(tokenizer)
    assert "0.5 of the training authors" in " ".join(format_data_summary(notes)) and notes["start_token"] is None


def test_authors_for_nobody_and_texts_of_several_are_counted():
    authors = [f"u{i}" for i in range(200)] + ["[deleted]"] * 3 + ["Anonymous "] + ["busy"] * 40
    texts = [f"a text of {i}" for i in range(200)] + ["the same text"] * 4 + [f"busy text {i}" for i in range(40)]
    texts[5] = texts[6] = "word for word"
    texts[7] = texts[8] = "thanks"  # too short to be told from others
    nobody, large, texts = suspicious_author_warnings(Dataset.from_dict({"user": authors, "body": texts}), "body", "user")
    assert "'[deleted]', 'Anonymous '" in nobody and "4 of 244" in nobody and "'busy' has 16%" in large
    assert "each: 2, in 6 of 244" in texts
    assert (
        suspicious_author_warnings(
            Dataset.from_dict({"user": ["a", "b", "c"], "body": ["one two three"[:i] for i in (9, 11, 13)]}), "body", "user"
        )
        == []
    )


def test_limits_cut_each_side(tmp_path):
    path = write(tmp_path, ".jsonl", [f"u{i}" for i in range(200)], ["t u"] * 200)
    args = DataArguments(train_file=[path], text_column="body", author_column="user", eval_fraction=0.5)
    args.max_train_samples, args.max_eval_samples = 20, 10
    train, evaluation = load_train_and_eval(args, seed=1)
    assert len(train) == 20 and 5 <= len(evaluation) <= 25


@pytest.mark.parametrize(
    ("option", "value"),
    [("sequence_len", 1), ("eval_fraction", 1.0), ("eval_fraction", -0.1), ("max_train_samples", 0), ("max_eval_samples", 0),
     ("preprocessing_num_workers", 0), ("text_column", "author")],
)  # fmt: skip
def test_options_are_checked(option, value):
    with pytest.raises(UserError, match=f"--{option}"):
        DataArguments(**{option: value})
    with pytest.raises(UserError, match="--train_file"):
        DataArguments(dataset_name="x", train_file=["y"])
