"""Arbitrary options and files: a mistake ends in one or two lines for the user, and no author ever becomes another one."""

import contextlib
import csv
import dataclasses
import io
import json
import os
import runpy
import sys
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from author_dp.data.columns import ColumnSpec, get_column
from author_dp.data.loading import load_files
from author_dp.errors import UserError
from data_utils import group_by_author

SCRIPT = runpy.run_path(str(ROOT / "fine-tune-dp.py"), run_name="fuzzed")
GROUPS = ("ModelArguments", "LoraArguments", "DataArguments", "PrivacyArguments", "AuditArguments", "TrainingArguments")
OPTIONS = sorted({field.name for group in GROUPS for field in dataclasses.fields(SCRIPT[group])})
FUZZ = settings(deadline=None, database=None, suppress_health_check=list(HealthCheck))

NUMBERS = st.one_of(st.integers(), st.floats()).map(str)
ODD = st.sampled_from(
    ["", "nan", "inf", "-inf", "1e400", "{", "[]", "null", "True", "../..", "a b", "--", "-", "\x00", "\u00e9\U0001f600"]
)


def parse(arguments: list[str]) -> str | None:
    """Return the complaint, or None where the options are fine."""
    earlier, sys.argv = sys.argv, ["fine-tune-dp.py", *arguments]
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        try:
            SCRIPT["parse_arguments"]()
        except UserError as error:
            return str(error)
        finally:
            sys.argv = earlier
    return None


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.integration
@settings(FUZZ, max_examples=400)
@given(option=st.sampled_from(OPTIONS), value=st.one_of(NUMBERS, ODD, st.text(max_size=8)))
def test_any_value_of_any_option_is_taken_or_complained_about(option, value):
    complaint = parse(["--output_dir", "out", "--target_epsilon", "8", "--per_sample_max_grad_norm", "1", f"--{option}", value])
    assert complaint is None or (len(complaint.splitlines()) <= 2 and "--" in complaint), complaint
    assert not Path("out/privacy_ledger.jsonl").exists()


@settings(FUZZ, max_examples=100)
@given(st.lists(st.one_of(st.sampled_from(OPTIONS).map("--{}".format), NUMBERS, ODD), max_size=6))
def test_any_words_are_taken_or_complained_about(words):
    if "--output_dir" not in words and "--help" not in words:
        complaint = parse(words)
        assert complaint is None or len(complaint.splitlines()) <= 2, complaint


# --- files ----------------------------------------------------------------------------------------------

TEXTS = st.text(st.characters(codec="utf-8"), max_size=6)
AUTHORS = st.one_of(
    st.sampled_from([" alice", "alice", "Alice", "007", "7", "7.0", "NA", "null", "None", "nan", "", " ", "\t", "1e3", "true"]),
    TEXTS,
)
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), TEXTS),
    lambda inner: st.one_of(st.lists(inner, max_size=2), st.dictionaries(TEXTS, inner, max_size=2)),
    max_leaves=3,
)  # fmt: skip


def load(name: str, content: bytes) -> list | None:
    """Return the authors of a file of this content, or None where it is refused in one line."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, name)
        Path(path).write_bytes(content)
        try:
            samples = load_files([path], ColumnSpec("--train_file", "content", "author"))
        except UserError as error:
            assert len(str(error).splitlines()) == 1 and ("--train_file" in str(error) or "_column" in str(error)), error
            return None
        values = get_column(samples, "author")
        group_by_author(values)
        return values.to_pylist()


@pytest.mark.integration
@settings(FUZZ, max_examples=120)
@given(name=st.sampled_from(["a.jsonl", "a.json", "a.csv", "a.parquet"]), content=st.binary(max_size=60))
def test_any_bytes_are_refused_or_read(name, content):
    load(name, content)


@pytest.mark.integration
@settings(FUZZ, max_examples=80)
@given(st.lists(st.fixed_dictionaries({}, optional={"author": JSON, "content": JSON, "more": JSON}), min_size=1, max_size=3))
def test_any_json_is_refused_or_read_with_its_authors_as_they_are(rows):
    found = load("a.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
    if found is not None:
        authors = [row["author"] for row in rows]  # as they stand in the file: numbers and Booleans as their text
        written = [author if isinstance(author, str) else json.dumps(author) for author in authors]
        with_text = [author for author, row in zip(written, rows) if str(row.get("content") or "").isalnum()]
        # Rows without a text are left out, wherever they stand; those with one are not.
        assert is_subsequence(found, written) and is_subsequence(with_text, found) and None not in authors


def is_subsequence(part: list, whole: list) -> bool:
    rest = iter(whole)
    return all(one in rest for one in part)


@pytest.mark.integration
@settings(FUZZ, max_examples=100)
@given(st.lists(st.tuples(AUTHORS, TEXTS), min_size=1, max_size=4), st.sampled_from(["a.jsonl", "a.csv", "a.parquet"]))
def test_authors_are_read_as_they_are_written_or_refused(rows, name):
    authors = [author for author, _ in rows]
    if name == "a.csv":
        file = io.StringIO(newline="")
        csv.writer(file, lineterminator="\n").writerows([("author", "content"), *rows])
        content = file.getvalue().encode()
    elif name == "a.jsonl":
        content = "".join(json.dumps({"author": a, "content": text}) + "\n" for a, text in rows).encode()
    else:
        buffer = io.BytesIO()
        pq.write_table(pa.table({"author": authors, "content": [text for _, text in rows]}), buffer)
        content = buffer.getvalue()
    found = load(name, content)
    kept = [author for author, text in rows if text.strip()]  # a missing text is no sample
    if found is None:
        assert name == "a.csv" or kept != authors or any(not author.strip() for author in authors), rows
    else:
        assert found == kept and all(author.strip() for author in kept), (rows, found)
