"""voiding.py: a failed mechanism leaves no file that claims a guarantee, or says which one may; other runs keep theirs."""

import errno
import json
import os
import tempfile
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import make_dataset, make_trainer, read_report
from mutation import catches
from test_ledger import make_ledger
from transformers import TrainerCallback

from author_dp import cli
from author_dp.accounting import ledger_report
from author_dp.accounting.ledger import PrivacyLedger
from author_dp.accounting.voiding import guarantee_voided_on_failure, void_again, void_guarantee
from author_dp.errors import MechanismError, UserError
from author_dp.files import write_json
from author_dp.mechanism.noise import GaussianNoise
from author_dp.outputs import report
from author_dp.outputs.guarantee import summarize_guarantee
from author_dp.outputs.privacy_statement import read_privacy_statement
from author_dp.outputs.publish import publish

FAILURE = "the noise has another scale"
REPORT = {"epsilon": 8.0, "mu_gdp": 1.0, "delta": 1e-5, "disable_dp": False, "settings": {"a": "b" * 500}}
CARD = "| Guarantee | epsilon 8 |"


def make_reports(ledger: PrivacyLedger, *places: Path) -> list[Path]:
    """Write what certifies weights in each of the places."""
    for place in places:
        write_json(place / "privacy.json", {**REPORT, "ledger_link": ledger.record_hashes[-1]})
    return [place / "privacy.json" for place in places]


@pytest.fixture
def run(tmp_path, monkeypatch) -> tuple[PrivacyLedger, list[Path], list[Path]]:
    """A ledger; all reports of its weights; and reports of another run, in places where its own could lie."""
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    folder = tmp_path / "out[1]"  # brackets are no pattern
    folder.mkdir()
    ledger = make_ledger(folder)
    places = (folder, folder / "checkpoint-2", folder / "exports" / "step-5", tmp_path / "out[1]-rescued-a",
              temporary / "out[1]-rescued-b")  # fmt: skip
    (folder / "second").mkdir()
    other = make_ledger(folder / "second", noise_multiplier=0.8)
    (tmp_path / "linked").mkdir()
    (folder / "link").symlink_to(tmp_path / "linked")
    of_other = make_reports(other, folder / "second", tmp_path / "linked", temporary / "out[1]-rescued-c")
    of_other += make_reports(PrivacyLedger(tmp_path / "empty" / "a.jsonl"), folder / "untrained")
    return ledger, make_reports(ledger, *places), of_other


def is_void(path: Path) -> bool:
    try:
        report = json.loads(path.read_text())
    except (OSError, ValueError):
        return False
    return report.get("alarm") == FAILURE and report["epsilon"] is None and report["mu_gdp"] is None


def out_of_room(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@catches("weights saved elsewhere keep their epsilon", "accounting.voiding.find_voided_files", "if RESCUED in entry.name",
    "if False")  # fmt: skip
@catches("another run's weights lose their epsilon", "accounting.voiding.is_voided_report", "in record_hashes", "is not None")
@catches("weights of all runs without steps", "accounting.voiding.void_guarantee", "ledger.record_hashes[1:]",
    "ledger.record_hashes")  # fmt: skip
@catches("a damaged report that stays", "accounting.voiding.is_voided_report", "path.parent == folder or", "False and")
def test_all_reports_of_a_ledger_are_voided(run):
    ledger, reports, of_other = run
    for content in ("{", '{"epsilon": NaN, "ledger_link": "a"}'):
        damaged = ledger.path.parent / "checkpoint-1" / "privacy.json"
        damaged.parent.mkdir(exist_ok=True)
        damaged.write_text(content.replace('"a"', json.dumps(ledger.record_hashes[-1])))
        assert void_guarantee(ledger, FAILURE) == []
        assert all(map(is_void, [*reports, damaged]))
    assert all(json.loads(path.read_text())["epsilon"] == 8.0 for path in of_other)
    assert PrivacyLedger(ledger.path).failure == FAILURE


def test_texts_of_the_weights_are_named_and_pipes_are_not_read(run, tmp_path):
    ledger, *_ = run
    statement = ledger.path.parent / "exports" / "texts.jsonl.privacy.json"
    write_json(statement, {"covered": True, "model": {"ledger_link": ledger.record_hashes[-1]}})
    (tmp_path / "x-rescued-a").mkdir()
    os.mkfifo(tmp_path / "x-rescued-a" / "privacy.json")
    assert void_guarantee(ledger, FAILURE) == [f"{statement} (of synthetic texts)"]


@catches(
    "the search before the alarm",
    "accounting.voiding.void_guarantee",
    "hashes, folder = ",
    "find_voided_files(ledger.path, set())\n    hashes, folder = ",
)
@catches("an error of voiding in place of the failure", "accounting.voiding.guarantee_voided_on_failure",
    "except BaseException as problem:", "except ZeroDivisionError as problem:")  # fmt: skip
def test_an_error_while_voiding_leaves_the_failure_and_its_record(run, monkeypatch):
    ledger, *_ = run

    def fail(*_):
        raise RuntimeError("a bug")

    monkeypatch.setattr("author_dp.accounting.voiding.find_voided_files", fail)
    try:
        with guarantee_voided_on_failure(SimpleNamespace(ledger=ledger, is_main_process=True), lambda: None, "the hub"):
            raise MechanismError(FAILURE)
    except MechanismError as error:
        assert list(error.not_voided) == ["the hub (uploads)", f"{ledger.path.parent} (a bug)"]
    except RuntimeError:
        pytest.fail("the error of voiding")
    assert PrivacyLedger(ledger.path).failure == FAILURE


@catches(
    "a report that keeps its epsilon where there is no room", "accounting.voiding.void_report", "json.dump(content, file)", "pass"
)
@catches(
    "the report that makes a model known removed", "accounting.voiding.void_report", "json.dump(content, file)", "path.unlink()"
)
def test_reports_are_voided_in_place_where_there_is_no_room(run, monkeypatch):
    ledger, reports, _ = run
    with monkeypatch.context() as patched:
        patched.setattr("author_dp.accounting.voiding.write_json", out_of_room)
        assert void_guarantee(ledger, FAILURE) == []
    assert all(map(is_void, reports)) and all(read_report(path.parent)["delta"] == 1e-5 for path in reports)


@catches("pages that take the room", "accounting.voiding.void_guarantee", "for name in (CARD, *PAGES)", "for name in (CARD,)")
def test_on_a_full_disk_pages_make_room_for_the_alarm(run, monkeypatch):
    ledger, reports, _ = run
    figure = ledger.path.parent / "report" / "epsilon.png"
    figure.parent.mkdir()
    figure.write_bytes(b"")
    write, calls = os.write, []

    def write_if_room(descriptor: int, data) -> int:
        calls.append(len(data))
        if len(calls) == 1:  # the first attempt writes a part
            return write(descriptor, data[:20])
        return out_of_room() if figure.exists() or len(calls) == 2 else write(descriptor, data)

    monkeypatch.setattr(os, "write", write_if_room)
    assert void_guarantee(ledger, FAILURE) == []
    monkeypatch.undo()
    assert PrivacyLedger(ledger.path).failure == FAILURE and all(map(is_void, reports))


@catches("an alarm for a ledger that was not read again", "accounting.voiding.record_alarm", "ledger.read()", "pass")
def test_a_ledger_that_was_cut_gets_the_alarm(run):
    ledger, *_ = run
    ledger.path.write_bytes(b"".join(ledger.path.read_bytes().splitlines(keepends=True)[:-1]))
    assert void_guarantee(ledger, FAILURE) == []
    assert PrivacyLedger(ledger.path).failure == FAILURE and PrivacyLedger(ledger.path).steps == 2


@catches("a ledger without the alarm that nobody names", "accounting.voiding.record_alarm",
    "return [f", "return [] and [f")  # fmt: skip
@catches("a ledger that does not know what its reports do", "accounting.ledger.PrivacyLedger.read",
    " or find_reported_alarm(self.path.parent)", "")  # fmt: skip
def test_what_cannot_be_voided_is_named(run, monkeypatch, capfd):
    ledger, reports, _ = run
    card, page = ledger.path.parent / "README.md", ledger.path.parent / "report.html"
    card.write_text(CARD)
    page.write_text("epsilon 8")
    with monkeypatch.context() as patched, pytest.raises(MechanismError, match=FAILURE) as raised:
        patched.setattr(os, "write", out_of_room)  # of the ledger
        patched.setattr("author_dp.accounting.voiding.write_json", out_of_room)
        patched.setattr(json, "dump", out_of_room)
        patched.setattr(Path, "unlink", out_of_room)
        with guarantee_voided_on_failure(SimpleNamespace(ledger=ledger, is_main_process=True), lambda: card.write_text("new")):
            raise MechanismError(FAILURE)

    def main():
        raise raised.value

    with pytest.raises(SystemExit) as exited:
        cli.run(main, "fine-tune-dp.py", lambda: None)
    said = capfd.readouterr().err
    assert exited.value.code == 3 and FAILURE in said and "may still claim one" in said and "resume" not in said
    assert all(f"{path} (No space left on device)" in said for path in [*reports, card, page, ledger.path])
    assert card.read_text() == "new"
    write_json(reports[0], {**REPORT, "alarm": FAILURE, "ledger_link": ledger.record_hashes[-1], "weights": {}})
    monkeypatch.setattr("author_dp.outputs.privacy_statement.check_weights", lambda *_: None)
    assert read_privacy_statement(reports[0].parent)["alarm"] == FAILURE  # though the ledger has none
    with pytest.raises(UserError, match="was not as recorded in its ledger"):
        PrivacyLedger(ledger.path).check_no_failure()
        pytest.fail("forgotten")
    assert "trained without a privacy guarantee" in summarize_guarantee(read_report(reports[0].parent))


@catches("a page that keeps its epsilon", "accounting.voiding.remove_pages", "path.unlink(missing_ok=True)", "pass")
@pytest.mark.parametrize("fails", [False, True])
def test_pages_are_removed_and_the_card_is_written_anew(run, fails):
    ledger, reports, _ = run
    card, page, target = (ledger.path.parent / name for name in ("README.md", "report.html", "elsewhere.md"))
    target.write_text(CARD)
    card.symlink_to(target)
    page.write_text("epsilon 8")
    write_card = out_of_room if fails else lambda: card.write_text("no guarantee")
    with pytest.raises(MechanismError, match=FAILURE) as raised:
        with guarantee_voided_on_failure(SimpleNamespace(ledger=ledger, is_main_process=True), write_card):
            raise MechanismError(FAILURE)
    assert list(raised.value.not_voided) == [] and not page.exists() and target.read_text() == CARD
    assert not card.exists() if fails else card.read_text() == "no guarantee"
    assert is_void(reports[0])


def rescued_run(folder: Path, monkeypatch) -> Path:
    """Train a run whose weights are saved beside its folder; return where."""
    trainer = make_trainer(folder, dataset=make_dataset([1] * 60), max_steps=2, save_strategy="steps", save_steps=1)
    trainer.train()
    with monkeypatch.context() as patched, pytest.raises(Exception, match="The weights of this step are in"):
        patched.setattr("author_dp.training.saving.check_rescued", out_of_room)
        trainer.save_model()
    found = list(folder.resolve().parent.glob(f"{folder.resolve().name}-rescued-*"))
    assert len(found) == 1
    return found[0]


@catches("rescued weights under a name that is not looked up", "training.rescue.rescue_weights",
    "folder = trainer.folder.resolve()", "folder = trainer.folder")  # fmt: skip
def test_weights_rescued_from_the_current_folder_are_voided(tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path / "mine")
    rescued = rescued_run(Path(), monkeypatch)
    assert read_report(rescued)["epsilon"] > 0

    class AddNoNoise(TrainerCallback):
        def on_step_begin(self, *_, **__):
            monkeypatch.setattr(GaussianNoise, "add_", lambda self, total, std: total)

    trainer = make_trainer(Path(), dataset=make_dataset([1] * 60), max_steps=4, save_strategy="no", resume_from_checkpoint=True)
    trainer.add_callback(AddNoNoise())
    with pytest.raises(MechanismError):
        trainer.train()
    assert read_report(rescued)["epsilon"] is None


@catches("weights saved elsewhere by an earlier process", "accounting.voiding.find_voided_files",
    "| set(read_other_places(folder))", "")  # fmt: skip
@catches("where weights are is not recorded", "training.saving.CertifiedTrainer._save", "record_other_place(self.folder, folder)",
    "pass")  # fmt: skip
def test_weights_saved_or_published_elsewhere_before_are_voided(tmp_path, monkeypatch):
    out = tmp_path / "out"
    trainer = make_trainer(out, dataset=make_dataset([1] * 60), privacy={"noise_multiplier": None, "target_epsilon": 8.0})
    trainer.train()
    trainer.save_model(str(tmp_path / "exported"))
    trainer.save_model()
    publish(out, tmp_path / "published")
    monkeypatch.setattr("author_dp.accounting.voiding.certified_folders", set())  # a later process knows of none
    assert void_guarantee(PrivacyLedger(out / "privacy_ledger.jsonl"), FAILURE) == []
    for place in (out, tmp_path / "exported", tmp_path / "published"):
        assert is_void(place / "privacy.json"), f"not noticed: {place}"
    assert not (tmp_path / "published" / "README.md").exists()


@catches("reports of another owner are left", "accounting.voiding.is_voided_report", "if not path.is_file():",
    "if not path.is_file() or not is_own(path):")  # fmt: skip
def test_reports_of_another_owner_are_voided_but_not_in_a_shared_folder(run, monkeypatch):
    """A container runs as root on files of a user."""
    ledger, reports, _ = run
    monkeypatch.setattr("os.getuid", lambda: 12345)
    void_guarantee(ledger, FAILURE)
    assert [is_void(path) for path in reports] == ["-rescued-" not in str(path) for path in reports]


@catches("what a kill has left", "accounting.voiding.void_again", "void_guarantee(ledger, ledger.failure, is_recorded=True)",
    "pass")  # fmt: skip
@pytest.mark.parametrize("reader", [ledger_report.main, report.main])
def test_what_an_interrupted_voiding_left_is_voided_by_the_next_reader(run, reader, capsys):
    ledger, reports, of_other = run
    ledger.record_failure(FAILURE)  # and then the process was killed
    for path in reports[:1]:
        path.unlink()  # of the final weights, which this run has not saved
    with suppress(UserError, TypeError):  # the ledger is not a whole one
        reader([str(ledger.path.parent)])
    assert all(map(is_void, reports[1:])), "not noticed"
    assert PrivacyLedger(ledger.path).record_hashes == ledger.record_hashes  # there is one record of it
    assert all(json.loads(path.read_text())["epsilon"] == 8.0 for path in of_other)


@catches("a renamed checkpoint has no ledger", "outputs.privacy_statement.statement_ledger_path", "is_report_of(folder, above)",
    "False")  # fmt: skip
def test_a_renamed_checkpoint_is_of_its_run(tmp_path):
    make_trainer(tmp_path, save_strategy="steps", save_steps=1).train()
    best = (tmp_path / "checkpoint-1").rename(tmp_path / "best")
    PrivacyLedger(tmp_path / "privacy_ledger.jsonl").record_failure(FAILURE)
    found = read_privacy_statement(best)
    assert found is not None and found.get("alarm") == FAILURE, "not noticed"


@catches("the page of an earlier end", "models.weights.write_hashed_weights",
    "remove_pages([folder / name for name in pages])", "pass")  # fmt: skip
def test_newer_weights_have_no_older_pages(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.train()
    trainer.save_model()
    (tmp_path / "README.md").write_text(CARD)
    (tmp_path / "report.html").write_text("epsilon 8")
    trainer.save_model()
    assert not (tmp_path / "README.md").exists() and not (tmp_path / "report.html").exists(), "not noticed"
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "report.html").write_text("of somebody else")
    trainer.save_model(str(elsewhere))
    assert (elsewhere / "report.html").exists()


@catches("Ctrl-C while guarantees are voided", "accounting.voiding.guarantee_voided_on_failure",
    "except BaseException as problem:", "except Exception as problem:")  # fmt: skip
def test_ctrl_c_while_voiding_leaves_the_failure(run, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("author_dp.accounting.voiding.find_voided_files", interrupt)
    try:
        with guarantee_voided_on_failure(SimpleNamespace(ledger=run[0], is_main_process=True), lambda: None):
            raise MechanismError(FAILURE)
    except MechanismError as error:
        assert error.not_voided == [f"{run[0].path.parent} (KeyboardInterrupt)"]
    except KeyboardInterrupt:
        pytest.fail("the failure was lost")


@catches("the failure of another training", "accounting.voiding.find_mechanism_error", "seen = {id(outer)}", "seen = set()")
def test_a_training_in_the_handler_of_another_failure_has_its_own_end(run):
    ledger, reports, _ = run
    try:
        raise MechanismError("an earlier run")
    except MechanismError:
        with (
            pytest.raises(RuntimeError, match="of this one"),
            guarantee_voided_on_failure(SimpleNamespace(ledger=ledger, is_main_process=True), lambda: None),
        ):
            raise RuntimeError("of this one") from None
        try:
            with guarantee_voided_on_failure(SimpleNamespace(ledger=ledger, is_main_process=True), lambda: None):
                raise RuntimeError("with the context")
        except MechanismError:
            pytest.fail("the failure of another run")
        except RuntimeError:
            pass
    assert not PrivacyLedger(ledger.path).failure and not any(map(is_void, reports))


def test_reading_a_failed_ledger_again_leaves_its_card(run):
    ledger, *_ = run
    card = ledger.path.parent / "README.md"
    void_guarantee(ledger, FAILURE)
    card.write_text("| Guarantee | none: the run found |")
    void_again(PrivacyLedger(ledger.path))
    assert card.exists()
