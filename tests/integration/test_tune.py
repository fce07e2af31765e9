"""tune: a search is drawn once, releases its best run alone, and keeps all else secret.

Most tests replace the script by `FakeRuns`, which write what a run leaves: the tests here are about the search.
"""

import json
import os
import signal
import sys
import threading
from collections import Counter
from pathlib import Path

import pytest
from conftest import ROOT, read_report, within
from mutation import catches
from script_runs import Program

from author_dp.accounting.accountant import find_noise_multiplier
from author_dp.accounting.budget import Budget
from author_dp.accounting.ledger import LEDGER_NAME, PrivacyLedger
from author_dp.accounting.plan import PrivacyPlan
from author_dp.accounting.privacy_report import make_privacy_report
from author_dp.accounting.tuning import RunCount
from author_dp.errors import SignalError, UserError
from author_dp.files import write_json
from author_dp.models.weights import hash_weights
from author_dp.outputs import search, tune
from author_dp.outputs.model_card import model_card
from author_dp.outputs.publish import publish
from author_dp.outputs.search import PLAN_NAME, run_search_command
from author_dp.training.resuming import SAMPLES_NAME

RATES = {"1": 4.0, "2": 1.0, "3": 2.0}  # released loss by learning rate


class FakeRuns:
    """What `run_search_command` starts: runs of 3 steps with every author in each, whose loss follows from RATES.

    Attributes:
        started: the settings of each call, dry runs left out.
        before: called with the number of such calls so far, the folder and the budget; may raise.
        commands: the different commands so far.
        data: the samples' hash by the number of such calls so far, and whether it is a dry run.
        changes: of the plan of a run; the noise multiplier is a factor.
    """

    def __init__(self):
        self.started, self.resumed, self.before, self.changes, self.extra_steps = [], [], lambda *_: None, {}, 0
        self.private_loss = lambda loss: loss
        self.commands, self.data = set(), lambda number, is_dry: "data"

    def __call__(self, command, log):
        self.commands.add(tuple(command))
        assert Path(command[-1]).stat().st_mode & 0o777 == 0o600 and command[-2] == "--config"
        options = json.loads(Path(command[-1]).read_text())
        folder = Path(options["output_dir"])
        log.touch(0o600)
        log.write_text("The full run will take about 0:00:03 (1 s per step)\nfine-tune-dp.py: error: --lora_dim 0: too small\n")
        target, is_dry = float(options["target_epsilon"]), options.get("dry_run") == "True"
        sigma = find_noise_multiplier(1.0, 3, target, 1e-5)
        plan = PrivacyPlan(
            target, 1e-5, sigma, 1.0, 1.0, 100, 3, 100, 200, 1, "ghost", 1, False, False, 1, options["part_of_search"] == "True"
        )  # fmt: skip
        changes = {name: value * sigma if name == "noise_multiplier" else value for name, value in self.changes.items()}
        plan = plan.__class__(**{**plan.__dict__, **({} if is_dry else changes)})
        ledger = PrivacyLedger(folder / LEDGER_NAME)
        budget = Budget(plan, ledger, True)
        budget.split = "a split"
        folder.mkdir(exist_ok=True)
        if plan.disable_dp:
            budget.start = lambda: ledger.start_run(plan.to_public_dict() | {"noise_multiplier": sigma})
        budget.start()
        write_json(folder / SAMPLES_NAME, {"train": self.data(len(self.started), is_dry), "evaluation": None}, private=True)
        if is_dry:
            return 2 * (options.get("lora_dim") == "0")
        self.started.append({name: options[name] for name in ("learning_rate", "lora_dim") if name in options})
        self.resumed.append("resume_from_checkpoint" in options)
        self.before(len(self.started), folder, budget)
        while ledger.steps < 3 + self.extra_steps:
            ledger.record_step()
        loss = RATES[options["learning_rate"]]
        budget.record_release({"epsilon": float(options["release_eval_epsilon"]), "step": 3, "limited": False, "loss": loss,
                               "standard_error": 0.1, "authors": 50, "range": [0.0, 5.0]})  # fmt: skip
        (folder / "model.safetensors").write_text(options["learning_rate"])
        (folder / "config.json").write_text("{}")
        (folder / "run_statistics.json").write_text(json.dumps({"evaluation": {"after": {"eval_loss": self.private_loss(loss)}}}))
        write_json(folder / "privacy.json", make_privacy_report(plan, ledger) | {"weights": hash_weights(folder)})
        return 0


@pytest.fixture
def runs(monkeypatch):
    monkeypatch.setattr(search, "run_search_command", fake := FakeRuns())
    return fake


def draws(monkeypatch, number):
    """Let K be `number`, once."""
    numbers = iter([number])
    monkeypatch.setattr(RunCount, "draw", lambda self: next(numbers))  # a second draw raises


def begin_and_interrupt(tmp_path, monkeypatch, runs, number: int, **options) -> None:
    """Begin a search of `number` runs, which a signal ends in the first one."""

    def stop(run, folder, budget):
        if run == 1:
            raise SignalError(15)

    runs.before = stop
    draws(monkeypatch, number)
    with pytest.raises(SystemExit):
        call(tmp_path, **options)


def call(path, *more, grid="learning_rate=1,2,3", epsilon=8.0, script=()):
    options = ["--expected_runs", "3", "--target_epsilon", f"{epsilon}", "--release_eval_epsilon", "0.5", *more]
    tune.main(["--search", *grid.split(), *options, "--", "--train_file", "a.jsonl", "--output_dir", str(path / "out"), *script])


def choices(monkeypatch, *values):
    """Let the settings be these, in turn."""
    values = iter(values)
    monkeypatch.setattr(search.secrets, "choice", lambda _: next(values))


def files_in(folder):
    return {path.relative_to(folder): (path.stat().st_mtime, path.read_bytes()) for path in folder.rglob("*") if path.is_file()}


@catches("scores without noise", "outputs.search.Search.score", 'return guarantee["evaluation_release"]["loss"]',
    'return read_json_object(folder / "run_statistics.json")["evaluation"]["after"]["eval_loss"]')  # fmt: skip
@catches("losers left behind", "outputs.search.Search.end", "delete_search_runs(self.folder, self.plan)", "pass")
def test_best_run_is_released_by_its_released_loss(tmp_path, monkeypatch, runs):
    runs.before = lambda *_: check_modes(tmp_path / "out-search")
    runs.private_loss = lambda loss: -loss  # others are best by the exact loss
    draws(monkeypatch, 4)
    choices(monkeypatch, "1", "3", "2", "3")
    call(tmp_path)
    assert (tmp_path / "out" / "model.safetensors").read_text() == "2"
    report = read_report(tmp_path / "out")
    assert 7.96 < report["epsilon"] <= 8.0 and report["accountant"] == "rdp" and report["mu_gdp"] is None
    assert report["noise_multiplier"] > 1.1 * report["tuning"]["single_noise_multiplier"]
    assert report["tuning"]["expected_runs"] == 3 and report["tuning"]["grid"] == {"learning_rate": ["1", "2", "3"]}
    assert report["evaluation_release"]["loss"] == 1.0 and report["evaluation_release"]["epsilon"] == report["epsilon"]
    assert not {"ledger_link", "epsilon_with_evaluation"} & report.keys()
    card = (tmp_path / "out" / "README.md").read_text()
    assert "best, by its released loss, of a random number of runs (logarithmic, 3 expected)" in card and "further runs" in card
    assert {path.name for path in (tmp_path / "out-search").iterdir()} == {PLAN_NAME, "lock"}
    assert json.loads((tmp_path / "out-search" / PLAN_NAME).read_text()) == {"ended": True, "keep_runs": False}
    publish(tmp_path / "out", tmp_path / "copy")
    assert files_in(tmp_path / "copy") == files_in(tmp_path / "out")
    with pytest.raises(UserError, match="its search has ended"):
        call(tmp_path)


def check_modes(folder):
    assert folder.stat().st_mode & 0o777 == 0o700
    assert (folder / PLAN_NAME).stat().st_mode & 0o777 == 0o600


@catches("the number of runs in a public file", "outputs.search.Search.final_report", '{"tuning": self.plan["tuning"]}',
    '{"tuning": {**self.plan["tuning"], "runs": len(self.plan["runs"])}}')  # fmt: skip
def test_nothing_public_depends_on_the_number_of_runs(tmp_path, monkeypatch, runs):
    for number in (1, 5):
        draws(monkeypatch, number)
        choices(monkeypatch, "2", *["1"] * 4)
        call(tmp_path / f"{number}")
    assert files_in(tmp_path / "1" / "out") == files_in(tmp_path / "5" / "out")


@catches("settings without replacement", "outputs.search.Search.draw", "secrets.choice(values)", "values[_ % len(values)]")
def test_settings_are_drawn_with_replacement_before_the_first_run(tmp_path, monkeypatch, runs):
    begin_and_interrupt(tmp_path, monkeypatch, runs, 600, grid="learning_rate=1,2,3 lora_dim=4,16")
    plan = json.loads((tmp_path / "out-search" / PLAN_NAME).read_text())
    pairs = [tuple(run["settings"].values()) for run in plan["runs"]]
    found, repeated = Counter(pairs), sum(a == b for a, b in zip(pairs, pairs[1:]))
    assert len(pairs) == 600 and len(found) == 6 and len({run["name"] for run in plan["runs"]}) == 600
    assert all(within(number, 100, 9.2) for number in found.values()) and within(repeated, 100, 9.2)


@catches("the best of an unfinished search published", "outputs.guarantee.why_no_guarantee",
    "if guarantee_in_search(guarantee):", "if False:")  # fmt: skip
def test_interrupted_search_resumes_as_it_was_drawn(tmp_path, monkeypatch, runs):
    def stop(number, folder, budget):
        if number == 2:
            budget.record_step()
            raise SignalError(2)

    runs.before = stop
    draws(monkeypatch, 3)
    with pytest.raises(SystemExit) as status:
        call(tmp_path)
    assert status.value.code == 130 and not (tmp_path / "out").exists()
    plan = json.loads((tmp_path / "out-search" / PLAN_NAME).read_text())
    unfinished = tmp_path / "out-search" / "runs" / plan["runs"][0]["name"]
    with pytest.raises(UserError, match="one run of a search"):
        publish(unfinished, tmp_path / "copy")
    card = model_card(read_report(unfinished))
    assert "Certified: nothing yet: this is one run of a search" in card and "choices among several runs" in card
    assert "included: the best" not in card and "author-level-dp" not in card
    with pytest.raises(UserError, match="a search with other options"):
        call(tmp_path, epsilon=9.0)
    call(tmp_path)
    settings = [run["settings"] for run in plan["runs"]]
    assert runs.started == [settings[0], settings[1], settings[1], settings[2]]
    assert runs.resumed == [False, False, True, False]
    assert (tmp_path / "out" / "privacy.json").exists()


@catches("a new draw after a crash", "outputs.tune.tune", "if not search.plan:", 'if not search.plan.get("scores"):')
def test_search_interrupted_in_its_first_run_is_not_drawn_again(tmp_path, monkeypatch, runs):
    begin_and_interrupt(tmp_path, monkeypatch, runs, 1)
    try:
        call(tmp_path)
    except StopIteration:
        pytest.fail("the number of runs was drawn again")
    assert runs.started[0] == runs.started[1] and len(runs.started) == 2


@catches("a failed run drawn again", "outputs.search.Search.run_all",
    'self.plan["scores"].append(self.score(folder))',
    'self.plan["scores"].append(self.score(folder) or self.start(folder, run["settings"], own, '
    'folder.with_suffix(".log")))')  # fmt: skip
@catches("settings chosen by earlier scores", "outputs.search.Search.run_all", 'self.start(folder, run["settings"], own',
    'self.start(folder, (self.plan["runs"][0] if self.plan["scores"] else run)["settings"], own')  # fmt: skip
def test_failed_run_is_worst_and_not_replaced(tmp_path, monkeypatch, runs):
    def fail(number, folder, budget):
        if number == 1:
            raise ChildProcessError

    def run_command_that_fails(command, log):
        try:
            return runs(command, log)
        except ChildProcessError:
            return 1

    runs.before = fail
    monkeypatch.setattr(search, "run_search_command", run_command_that_fails)
    draws(monkeypatch, 3)
    choices(monkeypatch, "2", "1", "3")
    call(tmp_path)
    assert [run["learning_rate"] for run in runs.started] == ["2", "1", "3"]
    assert (tmp_path / "out" / "model.safetensors").read_text() == "3"


@catches("a run that takes more than its share", "outputs.search.Search.score",
    'if not np.all(run_rdp(ledger.events, release) <= np.array(self.plan["rdp"])):', "if False:",
    changes={"noise_multiplier": 0.99})  # fmt: skip
@pytest.mark.parametrize(
    "changes",
    [
        {"noise_multiplier": 0.99},
        {"sample_rate": 1.0, "steps": 9},
        {"disable_dp": True},
        {"part_of_search": False},
        {"alarm": True},
        {"ledger": None},
    ],
    ids=str,
)
def test_run_that_breaks_its_share_is_not_released(tmp_path, monkeypatch, runs, changes):
    """A run with less noise or more steps than the search counts, or one that its monitors stopped."""
    if "steps" in changes:
        runs.extra_steps = 1
    if changes.pop("alarm", None):
        runs.before = lambda number, folder, budget: budget.ledger.record_failure("the noise is too small")
    if "ledger" in changes:
        changes.clear()
        monkeypatch.setattr(
            search, "run_search_command", lambda *words: [runs(*words), *map(Path.unlink, ledgers_of_runs(tmp_path))][0]
        )
    runs.changes = changes
    draws(monkeypatch, 2)
    call(tmp_path)
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="its search has ended"):
        call(tmp_path)


def ledgers_of_runs(path):
    return [ledger for ledger in path.glob(f"out-search/runs/*/{LEDGER_NAME}") if ledger.parent.name != "probe"]


def test_no_run_with_poisson_ends_the_search(tmp_path, monkeypatch, runs, capsys):
    draws(monkeypatch, 0)
    call(tmp_path, "--law", "poisson")
    output = capsys.readouterr().out
    assert "with probability 0.05 nothing is released" in output and "releases nothing" in output and not runs.started


@catches("losers left readable", "outputs.search.Search.make_folder", "self.folder.chmod(0o700)", "self.folder.chmod(0o755)")
def test_kept_runs_are_private_and_refused(tmp_path, monkeypatch, runs):
    draws(monkeypatch, 2)
    call(tmp_path, "--keep_runs", "True")
    folder = tmp_path / "out-search"
    assert folder.stat().st_mode & 0o777 == 0o700
    kept = [path for path in (folder / "runs").iterdir() if path.is_dir()]
    assert len(kept) == 2
    for path in kept:
        with pytest.raises(UserError, match="one run of a search"):
            publish(path, tmp_path / "copy")


def test_release_that_was_interrupted_is_completed(tmp_path, monkeypatch, runs):
    draws(monkeypatch, 2)
    with monkeypatch.context() as patch:
        patch.setattr(search, "delete_search_runs", lambda *_: sys.exit(1))
        with pytest.raises(SystemExit):
            call(tmp_path)
    with pytest.raises(UserError, match="its search has ended"):
        call(tmp_path)
    assert {path.name for path in (tmp_path / "out-search").iterdir()} == {PLAN_NAME, "lock"}


@pytest.mark.parametrize(
    ("grid", "script", "words"),
    [
        ("max_steps=10,20", (), "--search max_steps: it changes what a run costs"),
        ("noise_bands=1,2", (), "it changes what a run costs"),
        ("seed=1,2", (), "not an option that can be searched"),
        ("learning_rate=1,1", (), "with different values"),
        ("learning_rate=", (), "with different values"),
        ("learning_rate=1,2", ("--target_epsilon", "3"), "the search itself sets --target_epsilon"),
        ("learning_rate=1,2", ("--noise_mult", "0"), "sets --noise_multiplier"),
        ("learning_rate=1,2", ("--disable-dp",), "sets --disable_dp"),
        ("learning_rate=1,2", ("--learning_rate=1",), "sets --learning_rate"),
        ("learning_rate=1,2", ("--push_to_hub", "True"), "sets --push_to_hub"),
        ("learning_rate=1,2", ("--config", "{path}/options.yaml"), "sets --target_epsilon"),
        ("lora_dim=4,8", ("--lora_r", "4"), "--lora_r, after --: the search itself sets --lora_dim"),
        ("lora_dim=4,8", ("--lora-r=4",), "sets --lora_dim"),
        ("lora_dim=4,0", (), "--lora_dim 0: too small"),
    ],
)
def test_refused_options(tmp_path, runs, grid, script, words):
    (tmp_path / "options.yaml").write_text("target_epsilon: 3\n")
    with pytest.raises(UserError, match=words):
        call(tmp_path, grid=grid, script=[word.format(path=tmp_path) for word in script])
    assert not runs.started and not (tmp_path / "out").exists()


def test_settings_that_change_what_a_run_costs_are_found_by_the_dry_runs(tmp_path, monkeypatch, runs):
    headers = iter([3, 4, 5])
    original = PrivacyLedger.start_run
    monkeypatch.setattr(PrivacyLedger, "start_run", lambda self, header: original(self, {**header, "steps": next(headers)}))
    with pytest.raises(UserError, match="its settings change steps"):
        call(tmp_path)


def test_run_command_hands_a_signal_on_and_waits(tmp_path):
    script = (
        "import signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: (print('saved', flush=True), sys.exit(143)))\n"
        "print('ready', flush=True)\ntime.sleep(60)"
    )
    log = tmp_path / "log"

    def interrupt():
        while "ready" not in (log.read_text() if log.exists() else ""):
            pass
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(SignalError) as error:
        run_search_command([sys.executable, "-c", script], log)
    thread.join()
    assert error.value.number == signal.SIGINT and log.read_text() == "ready\nsaved\n"
    assert log.stat().st_mode & 0o777 == 0o600
    assert run_search_command([sys.executable, "-c", "raise SystemExit(3)"], log) == 3
    with pytest.raises(UserError, match="cannot be started"):
        run_search_command(["no-such-command"], log)


@pytest.mark.integration
def test_whole_search_on_the_demo_with_two_processes(tmp_path, monkeypatch, capsys):
    def run_forked(command, log):
        done = Program(*command[1:]).wait(300)
        log.write_text(done.stdout + done.stderr)
        return done.returncode

    monkeypatch.setattr(search, "run_search_command", run_forked)
    draws(monkeypatch, 1)
    monkeypatch.chdir(ROOT)
    call(
        tmp_path, "--launch", f"{sys.executable} -m torch.distributed.run --nproc_per_node 2", grid="learning_rate=1e-2",
        script=["--model_name", "demo/model", "--train_file", "demo/comments.jsonl", "--max_train_samples", "4000",
                "--sequence_len", "32", "--per_device_train_batch_size", "32", "--max_steps", "3", "--eval_fraction", "0.1",
                "--max_eval_samples", "100", "--per_sample_max_grad_norm", "1", "--noise_bands", "auto", "--use_cpu", "True"],
    )  # fmt: skip
    report = read_report(tmp_path / "out")
    assert report["world_size"] == 2 and report["epsilon"] <= 8.0 and report["evaluation_release"]["loss"] > 0
    assert "for the search" in capsys.readouterr().out
    publish(tmp_path / "out", tmp_path / "copy")
