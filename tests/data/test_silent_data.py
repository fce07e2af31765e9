"""Data that would be trained on otherwise than it is written: missing texts, repeated rows, cuts and white space."""

import ast
import json
import logging
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT
from datasets import Dataset
from mutation import catches
from test_tokenization import small_tokenizer
from tokenizers.processors import ByteLevel
from transformers import AutoTokenizer

from author_dp.data.authors import suspicious_author_warnings
from author_dp.data.chat import ChatFormatter, tokenize_chat_examples
from author_dp.data.chat_template import set_chat_template
from author_dp.data.columns import ColumnSpec, get_column
from author_dp.data.loading import load_files
from author_dp.data.readers import read_files, read_rows
from author_dp.data.splits import describe_held_out_split, limit_eval_split_texts
from author_dp.data.tokenization import tokenize
from author_dp.errors import UserError
from author_dp.types import IGNORE_INDEX
from data_utils import AuthorDataset, DataArguments, group_by_author, load_train_and_eval

COLUMNS = ColumnSpec("--train_file", "body", "user")


def write_rows(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def demo_tokenizer():
    return AutoTokenizer.from_pretrained(ROOT / "demo" / "model")


@pytest.fixture
def log(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    caplog.set_level(logging.INFO)
    return caplog


# --- missing texts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("added", [{}, {"prepend_bos": True, "append_eos": True}])
@pytest.mark.parametrize("how", [{}, {"long_samples": "split"}])
def test_tokenize_makes_no_sample_of_a_missing_text(added, how):
    texts = ["a b c", "", None, " ", "\n\t", "\u2003", "a b c a b c"]
    samples = Dataset.from_dict({"user": list("abcdefg"), "body": texts})
    for tokenizer in (small_tokenizer(start=False), small_tokenizer(start=True)):
        tokens = tokenize(samples, tokenizer, text_column="body", sequence_len=8, **added, **how)
        assert tokens["user"][:] == ["a", "g"]


def test_tokenize_splits_off_no_piece_of_start_and_end_alone():
    tokenizer = small_tokenizer(start=False)
    samples = Dataset.from_dict({"user": ["a", "b"], "body": ["a b c a", "a"]})
    for length, expected in ((3, [[1, 3, 4], [1, 5, 3], [1, 3, 2]]), (2, [[1, 3], [1, 4], [1, 5], [1, 3], [1, 3]])):
        options = {"sequence_len": length, "long_samples": "split", "prepend_bos": True, "append_eos": True}
        assert tokenize(samples, tokenizer, text_column="body", **options)["input_ids"][:] == expected


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_rows_without_a_text_are_dropped_counted_and_in_no_number_of_authors(tmp_path, log, suffix):
    rows = [{"user": f"u{i % 6}", "body": "one two" if i < 5 else ["", " ", None][i % 3]} for i in range(30)]
    path = tmp_path / f"a.{suffix}"
    if suffix == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif suffix == "csv":
        path.write_text("user,body\n" + "".join(f"{row['user']},{row['body'] or ''}\n" for row in rows))
    else:
        write_rows(path, rows)
    samples = load_files([str(path)], COLUMNS)
    assert samples["user"][:] == [f"u{i}" for i in range(5)]  # u5 has blank texts only
    assert len(group_by_author(get_column(samples, "user"))[0]) - 1 == 5
    assert "dropped 25 of 30 rows" in log.text and "without another text, who do not count: 1" in log.text
    path = write_rows(tmp_path / "blank.jsonl", [{"user": "a", "body": " "}] * 3)
    with pytest.raises(UserError, match=r"--train_file .*all 3 texts in 'body' are missing or blank"):
        load_files([path], COLUMNS)


@catches("an author without a text counts", "data.loading.drop_blank_texts", "batch.filter(pc.invert(is_blank))", "batch")
def test_an_author_without_texts_is_neither_held_out_nor_the_last_to_train_on(tmp_path):
    rows = [{"author": f"a{i}", "content": "some text here"} for i in range(40)]
    blank = [{"author": f"b{i}", "content": ""} for i in range(200)]
    args = DataArguments(train_file=[write_rows(tmp_path / "a.jsonl", [*blank, *rows])], eval_fraction=0.2)
    train, evaluation = load_train_and_eval(args, seed=0)
    assert {*train["author"], *evaluation["author"]} == {f"a{i}" for i in range(40)}
    args.train_file = [write_rows(tmp_path / "b.jsonl", rows)]  # authors without texts move nobody
    assert [side["author"][:] for side in load_train_and_eval(args, seed=0)] == [train["author"][:], evaluation["author"][:]]


# --- the same rows twice ----------------------------------------------------------------------------------


@catches("one file by two names", "data.columns.check_distinct_files", "(status.st_dev, status.st_ino)", "(name, 0)",
    how="symlink")  # fmt: skip
@pytest.mark.parametrize("how", ["spelling", "symlink", "hard link", "folder link", "glob"])
def test_one_file_by_two_names_is_refused(tmp_path, how):
    path = write_rows(tmp_path / "a.jsonl", [{"user": "a", "body": "x y"}])
    other = tmp_path / "b.jsonl"
    if how == "symlink":
        other.symlink_to(path)
    elif how == "hard link":
        os.link(path, other)
    elif how == "folder link":
        (tmp_path / "link").symlink_to(tmp_path)
        other = tmp_path / "link" / "a.jsonl"
    names = [path, {"spelling": os.path.relpath(path), "glob": f"{tmp_path}/./*.jsonl"}.get(how, str(other))]
    with pytest.raises(UserError, match=r"--train_file .*a\.jsonl: it is named 2 times, as .* too"):
        load_files(names, COLUMNS)


def test_hub_shards_that_are_one_file_are_refused(tmp_path):
    folder = tmp_path / "default" / "train"
    folder.mkdir(parents=True)
    pq.write_table(pa.table({"author": ["a", "b"], "content": ["x y", "z w"]}), folder / "0.parquet")
    (folder / "1.parquet").symlink_to(folder / "0.parquet")
    with pytest.raises(UserError, match=r"--dataset_name .*named 2 times"):
        load_train_and_eval(DataArguments(dataset_name=str(tmp_path)), seed=0)


def test_repeated_texts_of_one_author_are_counted():
    def warnings(rows):
        samples = Dataset.from_dict({"user": [user for user, _ in rows], "body": [text for _, text in rows]})
        return suspicious_author_warnings(samples, "body", "user")

    rows = [(f"u{i % 50}", f"text number {i}") for i in range(300)]
    assert warnings(rows) == []
    (warning,) = warnings([*rows, *rows[:30], *rows[:30], ("new", "hi"), ("new", "hi")])
    assert "61 of 362 samples repeat a text of the same author" in warning
    assert not any("repeat" in warning for warning in warnings([*rows, *[("[deleted]", "thanks")] * 9]))
    assert warning.startswith("--text_column 'body': ")
    (warning,) = warnings([*rows, ("u1", "[removed]"), ("u2", "[deleted]"), ("u3", "[removed]")])
    assert "3 of 303 samples are [deleted] or [removed]" in warning


# --- who is evaluated -------------------------------------------------------------------------------------


@catches("evaluated authors who move others", "data.splits.limit_eval_split_texts",
    "scores < max(threshold, np.nextafter(scores.min(), 1))", "scores.argsort().argsort() < 20")  # fmt: skip
def test_the_limit_of_evaluation_takes_complete_authors_and_moves_nobody():
    authors = [f"u{i // 5}" for i in range(1_000)]  # sorted by author
    samples = Dataset.from_dict({"author": authors, "content": [f"t{i}" for i in range(1_000)]})
    limited = limit_eval_split_texts(samples, "author", 100, seed=0)
    chosen = set(limited["author"])
    assert 10 <= len(chosen) <= 40 and len(limited) == 5 * len(chosen)
    assert set(limit_eval_split_texts(samples, "author", 100, seed=1)["author"]) != chosen
    for gone in {*sorted(chosen), "u1", "u7"}:
        rest = samples.select([i for i, author in enumerate(authors) if author != gone])
        assert set(limit_eval_split_texts(rest, "author", 100, seed=0)["author"]) == chosen - {gone}
    more = Dataset.from_dict({"author": [*authors, "new"], "content": ["t"] * 1_001})
    assert set(limit_eval_split_texts(more, "author", 100, seed=0)["author"]) - {"new"} == chosen
    assert limit_eval_split_texts(samples, "author", 1_000, seed=0) is samples
    assert len(limit_eval_split_texts(samples, "author", 1, seed=0)) == 5  # one author


def test_held_out_authors_are_counted_and_few_of_them_are_a_warning():
    def describe(number, training=1_000, **options):
        options = {"validation_file": False, "eval_fraction": 0.02, "limit": None, **options}
        held_out, others = (
            pa.chunked_array([[f"{side}{i}" for i in range(n)] * 2]) for side, n in (("e", number), ("t", training))
        )
        return describe_held_out_split(held_out, others, **options)

    assert describe(30) == (logging.INFO, "Held out for evaluation: 30 authors with 60 texts.")
    level, line = describe(2, 309)
    assert level == logging.WARNING and line.startswith("--eval_fraction 0.02: only 2 authors with 4 texts")
    assert "raise it to about 0.096" in line
    assert "1 author with 2 texts" in describe(1)[1]
    assert describe(2, validation_file=True)[1].startswith("--validation_file: only 2") and "--eval" not in describe(2, 9)[1][20:]
    assert describe(5, limit=10)[1].startswith("--eval_fraction 0.02, --max_eval_samples 10: only 5")


# --- cut from the end, with all white space ----------------------------------------------------------------


@pytest.mark.parametrize("how", ["truncation_side", "tokenizer.json"])
def test_texts_are_cut_at_their_end_whatever_the_tokenizer_is_set_to(how):
    tokenizer = small_tokenizer(start=False)
    if how == "truncation_side":
        tokenizer.truncation_side = "left"
    else:
        tokenizer.backend_tokenizer.enable_truncation(3, direction="left")
    samples = Dataset.from_dict({"user": ["a"], "body": ["a b c a b c"]})
    tokens = tokenize(samples, tokenizer, text_column="body", sequence_len=4, prepend_bos=True)
    assert tokens["input_ids"][:] == [[1, 3, 4, 5]]


@pytest.mark.parametrize("trimmed", [False, True, None])
@pytest.mark.parametrize("completion", [" ", "\n", " four", " four  ", "x\n\t ", "four\n\n"])
def test_white_space_of_a_completion_is_learned(trimmed, completion):
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "demo" / "model")
    if trimmed is not None:
        tokenizer.backend_tokenizer.post_processor = ByteLevel(trim_offsets=trimmed)
    processor = str(tokenizer.backend_tokenizer.post_processor)
    example = ChatFormatter(tokenizer, "assistant").format_completion("Say:", completion)
    _, (labels,) = tokenize_chat_examples([example], tokenizer, [], [])
    assert tokenizer.decode([token for token in labels if token != IGNORE_INDEX]) == completion
    assert str(tokenizer.backend_tokenizer.post_processor) == processor  # which is saved with the model


def test_a_tokenizer_without_post_processor_is_left_as_it_was():
    tokenizer = small_tokenizer(start=False)
    tokenizer.backend_tokenizer.post_processor = None
    example = ChatFormatter(tokenizer, "assistant").format_completion("a ", "b")
    assert tokenize_chat_examples([example], tokenizer, [], []) == ([[3, 4]], [[IGNORE_INDEX, 4]])
    assert tokenizer.backend_tokenizer.post_processor is None


# --- one exact reader -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("p.csv", "prompt\nHello, world\n", "line 2 has 2 values and the header 1"),
        ("p.csv", "prompt,topic\nHello, world,x\n", "line 2 has 3 values and the header 2"),
        ("p.csv", "prompt,topic\nHello\n", "line 2 has 1 values and the header 2"),
        ("p.csv", "prompt,topic,prompt\na,b,c\n", "2 columns are called 'prompt'"),
        ("p.jsonl", '{"prompt": "a", "prompt": "b"}\n', "'prompt' is twice in one object"),
        ("p.jsonl", '{"prompt": [{"role": "user", "content": "a", "content": "b"}]}\n', "'content' is twice in one object"),
    ],
)
def test_prompts_are_read_as_exactly_as_training_data(tmp_path, name, content, words):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=f"--prompts .*{words}"):
        list(read_rows(str(tmp_path / name)))


def test_a_parquet_column_twice_is_refused(tmp_path):
    pq.write_table(pa.table([pa.array(["a"]), pa.array(["b"])], names=["prompt", "prompt"]), tmp_path / "p.parquet")
    with pytest.raises(UserError, match="2 columns are called 'prompt'"):
        list(read_rows(str(tmp_path / "p.parquet")))


@pytest.mark.parametrize("name", ["a.jsonl.zst", "a.parquet.zst"])
def test_a_large_zstd_window_is_refused_with_the_command_that_decodes_it(tmp_path, name):
    content = b'{"user": "a", "body": "x y"}\n'
    block = (len(content) << 3 | 1).to_bytes(3, "little") + content
    for exponent, is_read in ((10, True), (31, False)):  # RFC 8878, section 3.1.1: frame header and one raw block
        (tmp_path / name).write_bytes(bytes.fromhex("28b52ffd00") + bytes([(exponent - 10) << 3]) + block)
        if not is_read:
            with pytest.raises(UserError, match=r"window is larger than 128 MiB.*`zstd -d --long=31 .*zst`"):
                list(read_files([str(tmp_path / name)], COLUMNS))
        elif "jsonl" in name:
            assert [batch.num_rows for batch in read_files([str(tmp_path / name)], COLUMNS)] == [1]


@pytest.mark.parametrize("name", ["input_ids", "labels"])
def test_columns_of_tokens_are_no_authors_and_may_be_texts(tmp_path, name, demo_tokenizer):
    with pytest.raises(UserError, match=f"--author_column {name}: .*Rename"):
        DataArguments(author_column=name)
    path = write_rows(tmp_path / "a.jsonl", [{"author": f"u{i}", name: "hello you there"} for i in range(5)])
    args = DataArguments(train_file=[path], text_column=name, eval_fraction=0.0)
    tokens = tokenize(load_train_and_eval(args, 0)[0], demo_tokenizer, text_column=name, sequence_len=8)
    assert {*tokens.column_names} == {"author", "input_ids"} and len(tokens) == 5


# --- UTF-8 in any locale ----------------------------------------------------------------------------------


def calls_without_encoding(source: str) -> list[int]:
    """Return the lines that open a text file in the locale's encoding."""
    lines = []
    for call in (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)):
        name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
        values = [value.value for value in (*call.args, *(k.value for k in call.keywords)) if isinstance(value, ast.Constant)]
        is_text = name in ("read_text", "write_text") or (isinstance(call.func, ast.Name) and name == "open")
        if is_text and not any(value in ("rb", "wb", "ab", "utf-8", "utf-8-sig") for value in values):
            lines.append(call.lineno)
    return lines


def test_every_text_file_is_utf8_whatever_the_locale():
    assert calls_without_encoding("open('a')\nopen('a', 'rb')\nopen('a', 'w', encoding='utf-8')\np.read_text()") == [1, 4]
    paths = [*ROOT.glob("*.py"), *(path for name in ("author_dp", "demo") for path in (ROOT / name).rglob("*.py"))]
    found = {str(path): lines for path in paths if (lines := calls_without_encoding(path.read_text(encoding="utf-8")))}
    assert len(paths) > 80 and not found


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_a_chat_template_is_utf8_without_a_byte_order_mark(tmp_path, mark):
    template = "{{ 'Frage: \u00fcber \u2014 ' }}{{ messages[0].content }}"
    (tmp_path / "t.jinja").write_bytes(mark + template.encode())
    tokenizer = small_tokenizer(start=False)
    set_chat_template(tokenizer, str(tmp_path / "t.jinja"))
    assert tokenizer.chat_template == template


@pytest.mark.parametrize("short", [[], [5]])
def test_an_author_dataset_of_your_own_has_no_samples_that_predict_nothing(short):
    rows = {"input_ids": [[1, 2], short, [3, 4, 5], short]}
    with pytest.raises(UserError, match=r"AuthorDataset: 2 samples have fewer than two tokens.*count in N"):
        AuthorDataset(Dataset.from_dict(rows), *group_by_author(list("abca")))
    assert len(AuthorDataset(Dataset.from_dict(rows).select([0, 2]), *group_by_author(list("ac")))) == 2
