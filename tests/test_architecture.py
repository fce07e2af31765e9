"""docs/architecture.md: the script on the page trains, and its table names the modules that exist."""

import re

import pytest
from conftest import ROOT, read_report

from author_dp.accounting.ledger import PrivacyLedger

PAGE = (ROOT / "docs" / "architecture.md").read_text()
PACKAGES = sorted(path.parent for path in (ROOT / "author_dp").glob("*/__init__.py"))


def replace(script: str, old: str, new: str) -> str:
    assert script.count(old) == 1, old
    return script.replace(old, new)


@pytest.mark.integration
def test_script_on_the_page_trains(checkpoint, tmp_path, monkeypatch):
    (script,) = re.findall(r"^```python\n(.*?)^```$", PAGE, re.M | re.S)
    for old, new in (('"demo/model"', repr(checkpoint)), ("max_steps=20", "max_steps=2"), ("range(300)", "range(100)")):
        script = replace(script, old, new)
    monkeypatch.chdir(tmp_path)
    exec(compile(script, "docs/architecture.md", "exec"), {"__name__": "__main__"})
    report = read_report(tmp_path / "scratch-own")
    assert report["steps"] == PrivacyLedger(tmp_path / "scratch-own" / "privacy_ledger.jsonl").steps == 2
    assert report["num_authors"] == 100 and report["expected_batch_size"] == 64 and 0 < report["epsilon"] <= 8
    assert report["weights"]


def test_table_names_the_modules_of_each_package():
    assert PACKAGES
    for package in PACKAGES:
        (row,) = re.findall(rf"^\| \[{package.name}\]\(\.\./author_dp/{package.name}\) \|[^|]*\|(.*)\|$", PAGE, re.M)
        named = set(re.findall(r"`(\w+)`", row)) - {"ENGINES", "__init__"}
        assert named == {path.stem for path in package.glob("*.py")} - {"__init__"}, package.name
