"""output_dir.py: a failed mechanism leaves no file that claims a guarantee, or says which one does."""

import errno
import json
import os
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import read_report
from mutation import catches
from test_ledger import make_ledger

from author_dp import cli
from author_dp.accounting.ledger import PrivacyLedger
from author_dp.accounting.output_dir import failures_recorded, void_guarantee
from author_dp.errors import MechanismError
from author_dp.files import write_json

FAILURE = "the noise has another scale"


def make_reports(ledger: PrivacyLedger, *places: Path) -> list[Path]:
    """Write what certifies weights in each of the places."""
    for place in places:
        write_json(place / "privacy.json", {"epsilon": 8.0, "mu_gdp": 1.0, "ledger_link": ledger.record_hashes[-1]})
    return [place / "privacy.json" for place in places]


@pytest.fixture
def run(tmp_path, monkeypatch) -> tuple[PrivacyLedger, list[Path], Path]:
    """A ledger; all reports of its weights; and a report of another run, in a folder with a name as of these weights."""
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    folder = tmp_path / "out[1]"  # brackets are no pattern
    folder.mkdir()
    ledger = make_ledger(folder)
    places = (folder, folder / "checkpoint-2", tmp_path / "out[1]-rescued-a", temporary / "out[1]-rescued-b")
    other_folder = tmp_path / "another"
    other_folder.mkdir()
    (other,) = make_reports(make_ledger(other_folder, noise_multiplier=0.8), temporary / "out[1]-rescued-c")
    return ledger, make_reports(ledger, *places), other


@catches("weights saved elsewhere keep their epsilon", "accounting.output_dir.find_reports",
    'f"*/{REPORT_NAME}"), *ours]', 'f"*/{REPORT_NAME}")]')  # fmt: skip
@catches("another run's weights lose their epsilon", "accounting.output_dir.find_reports",
    '.get("ledger_link") in ledger.record_hashes', " is not None")  # fmt: skip
@catches("a damaged report that stays", "accounting.output_dir.void_guarantee", "not_voided += remove_files([path])", "pass")
def test_all_reports_of_a_ledger_are_voided(run):
    ledger, reports, other = run
    damaged = ledger.path.parent / "a" / "privacy.json"  # found before the others below the folder
    damaged.parent.mkdir()
    damaged.write_text("{")
    assert void_guarantee(ledger, FAILURE) == []
    for path in reports:
        report = read_report(path.parent)
        assert report["epsilon"] is None and report["mu_gdp"] is None and report["alarm"] == FAILURE
    assert not damaged.exists()
    assert json.loads(other.read_text())["epsilon"] == 8.0
    assert PrivacyLedger(ledger.path).failure == FAILURE


@catches("a half-written record stays", "accounting.hash_chain.HashChain.append", "os.ftruncate(descriptor, self._size)", "pass")
def test_on_a_full_disk_reports_make_room_for_the_failure(run, monkeypatch):
    ledger, reports, _ = run
    write = os.write

    def write_if_room(descriptor: int, data) -> int:
        if not any(path.exists() for path in reports):
            return write(descriptor, data)
        if len(data) > 10:  # the first write writes a part
            return write(descriptor, data[:10])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "write", lambda descriptor, data: write_if_room(descriptor, data[:20]))
    assert void_guarantee(ledger, FAILURE) == []
    monkeypatch.undo()
    assert not any(path.exists() for path in reports)
    assert PrivacyLedger(ledger.path).failure == FAILURE


@catches("a ledger without the failure that nobody names", "accounting.output_dir.void_guarantee",
    "not_voided.append(str(error))", "pass")  # fmt: skip
def test_what_cannot_be_voided_is_named(run, monkeypatch, capfd):
    ledger, reports, _ = run
    card = ledger.path.parent / "README.md"
    card.write_text("epsilon 8")

    def fail(*_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    with monkeypatch.context() as patched, pytest.raises(MechanismError, match=FAILURE) as raised:
        patched.setattr(os, "write", fail)
        patched.setattr(Path, "unlink", fail)
        with failures_recorded(SimpleNamespace(ledger=ledger, is_main_process=True), fail):
            raise MechanismError(FAILURE)

    def main():
        raise raised.value

    with pytest.raises(SystemExit) as exited:
        cli.run(main, "fine-tune-dp.py", lambda: None)
    said = capfd.readouterr().err
    assert exited.value.code == 3 and FAILURE in said and "Delete these" in said
    assert all(f"{path} (Read-only file system)" in said for path in [*reports, card]) and str(ledger.path) in said


@catches("a model card that keeps its epsilon", "accounting.output_dir.failures_recorded", "remove_files([card])", "[]")
def test_card_that_cannot_be_rewritten_is_removed(run):
    ledger, _, _ = run
    card = ledger.path.parent / "README.md"
    card.write_text("epsilon 8")

    def fail():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(MechanismError, match=FAILURE) as raised:
        with failures_recorded(SimpleNamespace(ledger=ledger, is_main_process=True), fail):
            raise MechanismError(FAILURE)
    assert not card.exists() and list(raised.value.not_voided) == []
    assert read_report(ledger.path.parent)["alarm"] == FAILURE
