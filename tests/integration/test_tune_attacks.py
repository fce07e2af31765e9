"""tune: what an attacker, or a user in a hurry, tried against a search and its runs."""

import json
import re
import shutil

import numpy as np
import pytest
from mutation import catches
from test_tune import FakeRuns, begin_and_interrupt, call, choices, draws

from author_dp.accounting.budget import Budget
from author_dp.accounting.ledger import LEDGER_NAME, PrivacyLedger
from author_dp.accounting.plan import PrivacyPlan
from author_dp.accounting.privacy_report import make_privacy_report
from author_dp.accounting.tuning import MOST_RUNS, RunCount, SearchNoise
from author_dp.errors import SignalError, UserError
from author_dp.files import write_json
from author_dp.models.weights import hash_weights
from author_dp.outputs import report, search, tune
from author_dp.outputs.publish import publish
from author_dp.outputs.search import OPTIONS_NAME, PLAN_NAME

UNCOVERED = {"name": "m", "covered": False, "epsilon": None, "delta": None, "reason": "it is one run of a search"}


@pytest.fixture
def runs(monkeypatch):
    monkeypatch.setattr(search, "run_search_command", fake := FakeRuns())
    return fake


def call_with_reports(tmp_path, monkeypatch, runs, entry: dict) -> None:
    """Search with one run, in whose privacy.json `entry` is changed."""

    def run(command, log):
        status = runs(command, log)
        for path in tmp_path.glob("out-search/runs/*/privacy.json"):
            write_json(path, json.loads(path.read_text()) | entry)
        return status

    monkeypatch.setattr(search, "run_search_command", run)
    draws(monkeypatch, 1)
    call(tmp_path)


def interrupt(*_):
    raise SignalError(15)


@catches("a run of a search restarted outside of it, published", "accounting.privacy_report.privacy_report_of_spending",
    'any(header.get("part_of_search") for header in ledger.runs)', 'ledger.last_run.get("part_of_search")')  # fmt: skip
def test_run_of_a_search_that_restarts_outside_of_it_is_not_published(tmp_path):
    """Without a checkpoint, no options are compared; the ledger still knows."""
    folder = tmp_path / "out"
    folder.mkdir()
    for searched in (True, False):
        plan = PrivacyPlan(8.0, 1e-5, 4.0, 1.0, 1.0, 100, 3, 100, 200, 1, "ghost", 1, False, False, 1, searched)
        budget = Budget(plan, PrivacyLedger(folder / LEDGER_NAME), True)
        budget.start()
        budget.record_step()
    (folder / "model.safetensors").write_text("weights")
    write_json(folder / "privacy.json", make_privacy_report(plan, budget.ledger) | {"weights": hash_weights(folder)})
    with pytest.raises(UserError, match="one run of a search"):
        publish(folder, tmp_path / "copy")


def test_search_whose_base_has_no_guarantee_is_refused_before_the_draw(tmp_path, monkeypatch, runs):
    def run(command, log):
        status = runs(command, log)
        (folder,) = (tmp_path / "out-search" / "runs" / "probe",)
        write_json(folder / "privacy.json", {"base_model": UNCOVERED})
        return status

    monkeypatch.setattr(search, "run_search_command", run)
    with pytest.raises(UserError, match="--model_name: m has no guarantee"):
        call(tmp_path)
    assert not runs.started and not (tmp_path / "out-search" / PLAN_NAME).exists()


@catches("a search that starts from a model without a guarantee", "outputs.search.Search.score",
    "and guarantee_covers_base(guarantee)", "")  # fmt: skip
def test_run_whose_base_has_no_guarantee_is_not_released(tmp_path, monkeypatch, runs):
    call_with_reports(tmp_path, monkeypatch, runs, {"base_model": UNCOVERED})
    assert runs.started and not (tmp_path / "out").exists()


@catches("a search run again after another call ended it", "outputs.tune.tune",
    "        with lock.acquire(timeout=0):\n            search.open()",
    "        search.open()\n        with lock.acquire(timeout=0):")  # fmt: skip
def test_search_that_another_call_ends_meanwhile_is_not_run_again(tmp_path, monkeypatch, runs):
    class LateLock(tune.FileLock):
        def acquire(self, *args, **kwargs):
            write_json(tmp_path / "out-search" / PLAN_NAME, {"ended": True, "keep_runs": False})
            return super().acquire(*args, **kwargs)

    monkeypatch.setattr(tune, "FileLock", LateLock)
    with pytest.raises(UserError, match="its search has ended"):
        call(tmp_path)
    assert not runs.started


def test_plan_half_written_before_the_first_run_is_no_obstacle(tmp_path, monkeypatch, runs):
    (tmp_path / "out-search").mkdir()
    (tmp_path / "out-search" / f"{PLAN_NAME}.tmp").write_text("{")
    draws(monkeypatch, 1)
    call(tmp_path)
    assert (tmp_path / "out" / "privacy.json").exists()


def test_resumed_search_makes_its_folder_private_again(tmp_path, monkeypatch, runs):
    runs.before = interrupt
    draws(monkeypatch, 1)
    with pytest.raises(SystemExit):
        call(tmp_path)
    (tmp_path / "out-search").chmod(0o755)  # as a copy to another disk may
    with pytest.raises(SystemExit):
        call(tmp_path)
    assert (tmp_path / "out-search").stat().st_mode & 0o777 == 0o700


def test_plan_that_cannot_be_read_is_an_error_of_the_user(tmp_path, runs):
    (tmp_path / "out-search").mkdir()
    (tmp_path / "out-search" / PLAN_NAME).write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        call(tmp_path)
    assert not runs.started


def test_options_hidden_in_values_and_files_are_refused(tmp_path, runs):
    with pytest.raises(UserError, match="with different values"):
        call(tmp_path, grid="adam_noise_correction=--allow_other_authors,True")
    (tmp_path / "options.yaml").write_text("config: other.yaml\n")  # the script would read it, over what the search checked
    with pytest.raises(UserError, match="sets --config"):
        call(tmp_path, script=["--config", str(tmp_path / "options.yaml")])


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_laws_end_beyond_all_draws(eta):
    assert (1 - RunCount(1000.0, eta).gamma) ** MOST_RUNS < 1e-300


def test_run_whose_only_release_is_torn_counts_as_failed(tmp_path, monkeypatch, runs):
    call_with_reports(tmp_path, monkeypatch, runs, {"evaluation_release": None})
    assert runs.started and not (tmp_path / "out").exists()


@catches("a search resumed on other data", "outputs.tune.tune", "check_same_tune_samples(search)", "pass")
def test_interrupted_search_is_not_resumed_on_other_data(tmp_path, monkeypatch, runs):
    begin_and_interrupt(tmp_path, monkeypatch, runs, 2)
    runs.data = lambda *_: "other data"
    with pytest.raises(UserError, match="not those that the search was drawn for"):
        call(tmp_path)
    assert len(runs.started) == 1
    runs.data = lambda *_: "data"
    call(tmp_path)
    assert len(runs.started) == 3 and (tmp_path / "out" / "privacy.json").exists()


@catches("a run on other data released", "outputs.search.Search.score",
    'if read_search_sample_hashes(folder) != self.plan["samples"]:', "if False:")  # fmt: skip
def test_run_on_data_that_changed_meanwhile_counts_as_failed(tmp_path, monkeypatch, runs):
    runs.data = lambda number, is_dry: "data" if is_dry or number == 0 else "other data"
    draws(monkeypatch, 2)
    choices(monkeypatch, "1", "2")
    call(tmp_path)
    assert (tmp_path / "out" / "model.safetensors").read_text() == "1"


@catches("settings in a run's command", "outputs.search.Search.start", 'pinned, "--config"',
    'pinned, *settings.values(), "--config"')  # fmt: skip
@catches("runs that choose noise bands anew", "outputs.search.Search.start", "if self.plan else []", "if False else []")
@catches("the number of runs in the links of a folder", "outputs.search.Search.__init__", 'self.folder / "runs"', "self.folder")
def test_other_users_see_one_command_and_one_list_of_entries(tmp_path, monkeypatch, runs):
    seen = []
    runs.before = lambda *_: seen.append({path.name for path in (tmp_path / "out-search").iterdir()})
    draws(monkeypatch, 3)
    choices(monkeypatch, "1", "2", "1")
    call(tmp_path, "--keep_runs", "True")
    script, config = ("fine-tune-dp.py", "--train_file", "a.jsonl"), ("--config", str(tmp_path / "out-search" / OPTIONS_NAME))
    of_runs = (*script, "--noise_bands", "1", *config)
    assert {command[1:] for command in runs.commands} == {script + config, of_runs}  # the first one is that of dry runs
    seen.append({path.name for path in (tmp_path / "out-search").iterdir()})
    assert set.union(*seen) == {PLAN_NAME, "lock", "runs", OPTIONS_NAME}


def test_result_of_a_search_has_a_report_that_says_so(tmp_path, monkeypatch, runs, capsys):
    draws(monkeypatch, 1)
    call(tmp_path)
    card = (tmp_path / "out" / "README.md").read_text()
    report.main([str(tmp_path / "out")])
    page = (tmp_path / "out" / "report.html").read_text()
    assert "best, by its released loss, of a random number of runs" in page and "choices among further runs" in page
    assert not (tmp_path / "out" / "report").exists() and (tmp_path / "out" / "README.md").read_text() == card
    assert "author_dp.publish" in capsys.readouterr().out
    (tmp_path / "out" / "model.safetensors").write_text("other weights")
    with pytest.raises(UserError, match=r"model\.safetensors"):
        report.main([str(tmp_path / "out")])


def test_prediction_falls_with_the_noise_of_a_search():
    header = {
        "expected_batch_size": 64, "steps": 40, "num_authors": 19_600, "target_epsilon": 8.0, "delta": 5e-5, "noise_bands": 1,
        "noise_multiplier": 0.48,
        "settings": [{"learning_rate": rate, "parameters": 413_664, "trained_parameters": 413_664} for rate in (1e-3, 1e-2)],
    }  # fmt: skip
    noises = [SearchNoise(RunCount(6.0, 0.0), 4.0, sigma, np.zeros(1), 8.0) for sigma in (0.48, 2.0, 8.0)]
    shares = [int(re.search(r"gains (\d+)%", tune.format_tune_prediction(noise, header))[1]) for noise in noises]
    assert shares[0] == 100 > shares[1] > shares[2]
    assert tune.format_tune_prediction(noises[0], header | {"settings": [None]}) == ""
    assert tune.format_tune_prediction(noises[0], header | {"num_authors": 5}) == ""


@catches("the date of the best run", "outputs.search.Search.final_report", 'report["started"] = self.plan["started"]',
    'report["started"] = guarantee["started"]')  # fmt: skip
def test_date_of_the_result_is_that_of_the_draw(tmp_path, monkeypatch, runs):
    """The best run's date tells how many were before it."""
    start_run = PrivacyLedger.start_run

    def start_run_on(self, header):
        start_run(self, header | {"started": f"2026-01-{1 + len(runs.started):02}"})

    monkeypatch.setattr(PrivacyLedger, "start_run", start_run_on)
    draws(monkeypatch, 3)
    choices(monkeypatch, "1", "3", "2")
    call(tmp_path)
    assert json.loads((tmp_path / "out" / "privacy.json").read_text())["started"] == "2026-01-01"
    assert "2026-01-01" in (tmp_path / "out" / "README.md").read_text()


def test_folders_of_others_are_left_alone(tmp_path, runs):
    (tmp_path / "out-search").mkdir()
    (tmp_path / "out-search" / "mine").touch()
    with pytest.raises(UserError, match="in use for something else"):
        call(tmp_path)
    shutil.rmtree(tmp_path / "out-search")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(UserError, match="not an empty folder"):
        call(tmp_path)
