"""generate.py and synthetic_report.py: each file has its own columns, by default those that its makers recorded."""

import json
from argparse import Namespace
from pathlib import Path

import pytest
from test_generate import rows_of, run, trained  # noqa: F401  # a fixture
from test_synthetic_report import OPTIONS, files  # noqa: F401  # a fixture

from author_dp.data.splits import split_id
from author_dp.errors import UserError
from author_dp.files import write_json
from author_dp.outputs.privacy_statement import sha256_of, statement_path
from author_dp.outputs.synthetic_report import main, make_synthetic_report


def rename(paths: tuple[Path, Path], **columns: tuple[str, str]) -> None:
    """Rename columns of the synthetic and of the real text, {old: (in synthetic, in real)}."""
    for number, path in enumerate(paths):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        names = {old: new[number] for old, new in columns.items()}
        path.write_text("".join(json.dumps({names.get(k, k): v for k, v in row.items()}) + "\n" for row in rows))


def note(synthetic: Path, data: dict, generated: dict, author_column: str) -> None:
    statement = json.loads(statement_path(synthetic).read_text())
    statement["model"] |= {"data": data, "split": split_id(42, 0.25, author_column)}
    write_json(statement_path(synthetic), {**statement, "generated": generated, "sha256": sha256_of(synthetic)})


def test_each_file_has_its_own_column_by_default_as_the_statement_says(files, capsys):  # noqa: F811
    rename(files, content=("body", "comment"), author=("author", "user"))
    note(files[0], {"text_column": "comment", "author_column": "user"}, {"text_column": "body"}, "user")
    given = ["--text_column", "comment", "--synthetic_column", "body", "--author_column", "user"]
    for options in ([], given, given[:2], given[4:]):
        main([str(files[0]), str(files[1]), "--eval_fraction", "0.25", *options])
        assert "6 words in a row of a training text" in capsys.readouterr().out
    for option, words in (
        ("--synthetic_column", "no such text in .*Its columns are body, animal"), ("--text_column", "no such column in FILE"),
        ("--author_column", "no such column in FILE"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=f"{option}.* {words}"):
            main([str(files[0]), str(files[1]), "--eval_fraction", "0.25", option, "content"])


def test_real_conversations_may_have_another_column(files, capsys):  # noqa: F811
    rows = [json.loads(line) for line in files[1].read_text().splitlines()]
    talks = [[{"role": "assistant", "content": row["content"]}] for row in rows]
    files[1].write_text("".join(json.dumps({"author": row["author"], "talk": t}) + "\n" for row, t in zip(rows, talks)))
    note(files[0], {"messages_column": "talk"}, {"text_column": "content"}, "author")
    main([str(files[0]), str(files[1]), "--eval_fraction", "0.25"])
    assert "6 words in a row of a training text" in capsys.readouterr().out


def test_real_text_may_be_a_glob_and_its_blank_rows_are_no_samples(files):  # noqa: F811
    synthetic, real = files
    lines = real.read_text().splitlines(keepends=True)
    (real.parent / "part1.jsonl").write_text("".join(lines[:50]) + '{"author": "a1", "content": " "}\n' * 9)
    (real.parent / "part2.jsonl").write_text("".join(lines[50:]))
    report = make_synthetic_report(synthetic, [str(real)], Namespace(**OPTIONS))
    parts = make_synthetic_report(synthetic, [str(real.parent / "part*.jsonl")], Namespace(**OPTIONS))
    assert report == parts and report["num_texts"]["held_out"] > 0


def test_the_output_has_the_column_of_the_training_and_is_reported_on(trained, tmp_path, capsys):  # noqa: F811
    report = json.loads((trained / "privacy.json").read_text())
    data = {**report["data"], "text_column": "body", "author_column": "user"}
    real = tmp_path / "real.jsonl"
    real.write_text("".join(json.dumps({"user": f"u{i}", "body": "the match was late again"}) + "\n" for i in range(40)))
    options = ["--number", "1", "--report", str(real), "--validation_file", str(real)]
    try:
        write_json(trained / "privacy.json", {**report, "data": data})
        said = run(trained, tmp_path / "s.jsonl", *options)
        assert list(rows_of(tmp_path / "s.jsonl")[0]) == ["body"] and said["generated"]["text_column"] == "body"
        assert "training text" in capsys.readouterr().out
        run(trained, tmp_path / "t.jsonl", *options, "--text_column", "mine")
        assert list(rows_of(tmp_path / "t.jsonl")[0]) == ["mine"] and "training text" in capsys.readouterr().out
        write_json(trained / "privacy.json", {**report, "data": {**data, "text_column": "prompt"}})
        run(trained, tmp_path / "u.jsonl", "--number", "1")
        assert list(rows_of(tmp_path / "u.jsonl")[0]) == ["prompt"]
        with pytest.raises(UserError, match="--text_column 'prompt' is the name of another column"):
            run(trained, tmp_path / "v.jsonl", "--number", "1", "--prompt_template", "I am")
    finally:
        write_json(trained / "privacy.json", report)
