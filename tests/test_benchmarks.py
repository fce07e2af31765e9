"""benchmarks/: the pages name tables that exist, their options are accepted, and cached rows are not measured again."""

import importlib
import re
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))

import common
from common import ROOT

TABLES = {
    path.stem: found[1].split(", ")
    for path in sorted(ROOT.glob("benchmarks/*.py"))
    if (found := re.search(r"^    main\(__doc__, (.*)\)$", path.read_text(), re.MULTILINE))
}


def unknown_commands(text: str) -> list[str]:
    """Return the commands in a text whose file or table does not exist."""
    unknown = []
    for file, word in re.findall(r"benchmarks/([a-z_]+)\.py(?: (\w+))?", text):
        names = TABLES.get(file, [])
        if not (ROOT / "benchmarks" / f"{file}.py").exists() or (len(names) > 1 and word and word not in names):
            unknown.append(f"{file}.py {word}")
    return unknown


def test_pages_and_docstrings_name_tables_that_exist():
    assert unknown_commands("python benchmarks/memory.py sharding") == []
    assert unknown_commands("python benchmarks/memory.py noise") == ["memory.py noise"]
    assert unknown_commands("python benchmarks/sharding.py --computed") == ["sharding.py "]
    texts = [path for pattern in ("*.md", "docs/*.md", "benchmarks/*.py", "author_dp/**/*.py") for path in ROOT.glob(pattern)]
    found = {path.name: unknown for path in texts if (unknown := unknown_commands(path.read_text(encoding="utf-8")))}
    assert not found


@pytest.mark.parametrize("file", TABLES)
def test_tables_accept_their_options(file, monkeypatch, capsys):
    module = importlib.import_module(file)
    for name in TABLES[file]:
        monkeypatch.setattr(sys, "argv", [file, "--help"])
        with pytest.raises(SystemExit) as end:
            common.main("", getattr(module, name))
        assert end.value.code == 0 and "usage" in capsys.readouterr().out


def test_cached_measures_what_is_missing(tmp_path):
    file, measured = tmp_path / "rows.jsonl", []

    def measure(key):
        measured.append(key)
        return len(measured)

    keys = [("a", 1), ("b", 1), ("a", 1)]
    assert list(common.cached(file, keys, measure)) == [1, 2, 3]  # a key that comes twice is measured twice
    assert list(common.cached(file, [*keys, ("c", 2)], measure)) == [1, 2, 3, 4]
    assert measured == [*keys, ("c", 2)]


def test_rows_take_turns():
    order = []
    seconds = common.in_turns(["a", "b"], 2, lambda row: [order.append(row) or float(len(order))])
    assert order == ["a", "b", "a", "b"] and common.medians(seconds) == {"a": 2.0, "b": 3.0}
