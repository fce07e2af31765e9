"""One epsilon: files, logs, pages and programs show the same number for a model, however its run ended."""

import re
import runpy
import sys

import numpy as np
import pytest
from conftest import ROOT, make_dataset, make_trainer, read_report, resumable
from mutation import catches
from script_runs import PRIVACY, small
from transformers import TrainerCallback

from author_dp.accounting import ledger_report
from author_dp.accounting.accountant import (
    EpsilonAccountant,
    compute_epsilon,
    epsilon_of,
    find_noise_multiplier,
    format_epsilon,
    round_up,
)
from author_dp.accounting.budget import Budget
from author_dp.accounting.events import MechanismEvent, merge_events
from author_dp.accounting.ledger import PrivacyLedger
from author_dp.accounting.privacy_report import make_interrupted_privacy_report, recompute_privacy_report
from author_dp.accounting.tradeoff import attack_bounds
from author_dp.guards.one_run_audit import one_run_lower_bound
from author_dp.outputs import generate
from author_dp.outputs.privacy_statement import check_statement, read_privacy_statement
from author_dp.outputs.report import write_report

NUMBER = r"([\d.,]*\d)"
SETTINGS = {  # by the accountant, or by the option
    "prv": [],
    "gaussian": ["--per_device_train_batch_size", "60", "--max_train_samples", "60"],
    "pld": ["--target_epsilon", "0.02"],
    "bands": ["--noise_bands", "2"],
    "monte-carlo": ["--sampling", "balls-in-bins", "--noise_bands", "2"],
}


def run(monkeypatch, capfd, caplog, *arguments: str) -> tuple[int, str, str]:
    """Run the script in this process; return its exit status, stdout, and stderr with the log."""
    monkeypatch.setattr(sys, "argv", ["fine-tune-dp.py", *arguments])
    monkeypatch.setattr("author_dp.outputs.report.draw_figures", lambda *_: {})  # half the time of a run on a tiny model
    capfd.readouterr()
    caplog.clear()
    try:
        runpy.run_path(str(ROOT / "fine-tune-dp.py"), run_name="__main__")
        status = 0
    except SystemExit as exit_:
        status = exit_.code or 0
    stdout, stderr = capfd.readouterr()
    return status, stdout, stderr + caplog.text


def shown_epsilons(folder, stdout: str, stderr: str, capfd) -> dict[str, float]:
    """Return epsilon of a finished run from all places that show it."""

    def all_pages(when: str) -> dict[str, str]:
        page, card = (folder / "report.html").read_text(), (folder / "README.md").read_text()
        return {
            f"headline {when}": re.search(rf"<strong>epsilon {NUMBER} at", page)[1],
            f"page {when}": re.search(rf"<tr><th>Epsilon</th><td>{NUMBER}</td>", page)[1],
            f"card {when}": re.search(rf"\| Epsilon \| {NUMBER} \|", card)[1],
            f"card's guarantee {when}": re.search(rf"\| Guarantee \| epsilon {NUMBER} at", card)[1],
        }

    found = {
        "privacy.json": read_report(folder)["epsilon"],
        "last line": re.match(rf"epsilon {NUMBER} at", stdout.strip().splitlines()[-1])[1],
        "summary": re.search(rf"guarantee at the end +epsilon {NUMBER} at", stderr)[1],
        "last log line": re.findall(r"'epsilon': '([\d.e+-]+)'", stdout)[-1],
        **all_pages("of the run"),
    }
    write_report(folder)
    found |= all_pages("by author_dp.report")
    capfd.readouterr()
    ledger_report.main([str(folder)])
    found["ledger"] = re.search(rf"spent: epsilon {NUMBER} at", capfd.readouterr().out)[1]
    text = folder.parent / f"{folder.name}.jsonl"
    text.unlink(missing_ok=True)
    generate.main([str(folder), "--out", str(text), "--number", "2", "--max_new_tokens", "2", "--use_cpu"])
    sidecar = check_statement(text)
    found |= {"sidecar": sidecar["epsilon"], "sidecar's model": sidecar["model"]["epsilon"]}
    found["sidecar's words"] = re.match(rf"epsilon {NUMBER} at", sidecar["statement"])[1]
    return {name: float(str(value).replace(",", "")) for name, value in found.items()}


def stop_after(monkeypatch, steps: int) -> None:
    """Interrupt the next run after `steps` of its steps are in the ledger, the last of them not applied."""
    record = Budget.record_step

    def record_step(self):
        record(self)
        if self.steps == steps:
            raise KeyboardInterrupt

    monkeypatch.setattr(Budget, "record_step", record_step)


@pytest.mark.integration
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("lost", [0, 1], ids=["to the end", "with a lost step"])
def test_all_outputs_show_one_epsilon(checkpoint, comments, tmp_path, monkeypatch, capfd, caplog, setting, lost):
    """A run to its end, or interrupted one step after a checkpoint and resumed; then called twice more."""
    folder = tmp_path / "out"
    typed = small(checkpoint, comments, folder, *PRIVACY, "--max_steps", "6", "--save_strategy", "steps", "--save_steps", "2")
    typed += ["--logging_steps", "1", *SETTINGS[setting]]
    target = float(typed[len(typed) - typed[::-1].index("--target_epsilon")])
    if lost:
        with monkeypatch.context() as patched:
            stop_after(patched, 3)
            assert run(patched, capfd, caplog, *typed)[0] == 130
        typed += ["--resume_from_checkpoint", "True"]
    status, stdout, stderr = run(monkeypatch, capfd, caplog, *typed)
    assert status == 0, stderr
    first = shown_epsilons(folder, stdout, stderr, capfd)
    assert len(set(first.values())) == 1, first
    assert 0.8 * target < first["privacy.json"] <= target
    report, state = (folder / "privacy.json").read_bytes(), read_report(folder)
    spent = PrivacyLedger(folder / "privacy_ledger.jsonl")
    assert state["steps"] == spent.steps and state["accountant"] == {"bands": "prv"}.get(setting, setting)
    for _ in range(2):
        status, stdout, stderr = run(monkeypatch, capfd, caplog, *typed, "--resume_from_checkpoint", "True")
        if lost and setting != "monte-carlo":  # one step short of the plan, and no further step is allowed
            assert status == 2 and "used up" in stderr, stderr
        else:
            assert status == 0, stderr
            assert shown_epsilons(folder, stdout, stderr, capfd) == first
        assert (folder / "privacy.json").read_bytes() == report


# --- epsilon follows from the mechanisms, their steps and delta alone -------------------------------------


CASES = [
    ([MechanismEvent(0.4715, 1024 / 304_279, 894)], 1 / 304_279),
    ([MechanismEvent(1.0, 4 / 60, 5), MechanismEvent(1.5, 0.2, 7)], 1 / 60),
    ([MechanismEvent(5.0, 1.0, 30)], 1e-5),
    ([MechanismEvent(10.0, 0.9, 100)], 1e-14),
]


@catches("epsilon depends on the order of runs", "accounting.events.merge_events", "return sorted(", "return list(",
    events=CASES[1][0], delta=CASES[1][1])  # fmt: skip
@pytest.mark.parametrize(("events", "delta"), CASES)
def test_epsilon_of_ignores_order_and_splits_of_runs(events, delta):
    pieces = [MechanismEvent(sigma, rate, steps) for sigma, rate, all_ in events for steps in (1, all_ - 3, 0, 2)]
    assert merge_events(events) == merge_events(pieces) == merge_events(pieces[::-1])  # sums in another order round otherwise
    assert epsilon_of(events, delta) == epsilon_of(pieces, delta) == epsilon_of(pieces[::-1], delta)
    assert attack_bounds(events, delta) == attack_bounds(pieces, delta) == attack_bounds(pieces[::-1], delta)


@pytest.mark.parametrize(("events", "delta"), CASES)
def test_epsilon_of_rounds_up_to_shown_digits(events, delta):
    epsilon, bound = epsilon_of(events, delta), EpsilonAccountant(events, delta).epsilon
    assert bound <= epsilon <= bound * 1.001 and float(f"{epsilon:.4g}") == epsilon == float(format_epsilon(epsilon))


@catches("epsilon rounded to the nearest", "accounting.accountant.round_up", "FOUR_DIGITS.", "decimal.Context(prec=4).",
    exact=7.9951, rounded=7.996, words="7.996")  # fmt: skip
@pytest.mark.parametrize(
    ("exact", "rounded", "words"),
    [(7.9951, 7.996, "7.996"), (8.0, 8.0, "8.00"), (0.000123401, 0.0001235, "0.0001235"), (12345.1, 12350.0, "12,350.00"),
     (7.996, 7.996, "7.996"), (0.1, 0.1, "0.10"), (0.0, 0.0, "0.00"), (99.999, 100.0, "100.00")],
)  # fmt: skip
def test_round_up_rounds_once(exact, rounded, words):
    assert round_up(exact) == rounded and round_up(rounded) == rounded and format_epsilon(exact) == words


def test_round_up_rounds_sums():
    assert round_up(7.996, 2.0) == 9.996 and round_up(0.1, 0.2) == 0.3 and round_up(9.123, 2.0) == 11.13


@catches("calibrated for another number than is shown", "accounting.accountant.find_noise_multiplier",
    "epsilon = compute_epsilon(sigma, sample_rate, steps, target_delta)",
    "epsilon = EpsilonAccountant([MechanismEvent(sigma, sample_rate, steps)], target_delta).epsilon", rate=0.05, steps=100,
    epsilon=2.34567)  # fmt: skip
@pytest.mark.parametrize(("rate", "steps", "epsilon"), [(0.05, 100, 8.0), (0.05, 100, 2.34567), (1.0, 10, 2.0), (0.01, 40, 0.02)])
def test_find_noise_multiplier_meets_target_by_the_displayed_epsilon(rate, steps, epsilon):
    sigma = find_noise_multiplier(rate, steps, epsilon, 1e-5)
    assert 0.9995 * epsilon <= epsilon_of([MechanismEvent(sigma, rate, steps)], 1e-5) <= epsilon
    assert compute_epsilon(sigma, rate, steps, 1e-5) == epsilon_of([MechanismEvent(sigma, rate, steps)], 1e-5)


@catches("a target that is nearly kept", "accounting.budget.Budget.affordable_steps", "> target)",
    "> target * 1.001)")  # fmt: skip
def test_affordable_steps_excludes_step_past_target(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=9, privacy={"sample_rate": 0.05, "target_delta": 1e-3})
    plan = trainer.plan
    for steps in (2, 5, 9):
        object.__setattr__(plan, "target_epsilon", epsilon_of([plan.event(steps)], plan.delta) * (1 - 1e-6))
        assert trainer.budget.affordable_steps(9) == steps - 1


# --- a run that is resumed -----------------------------------------------------------------------------------


class Stop(TrainerCallback):
    follows = "steps"

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


@pytest.mark.integration
@catches("a summary that adds all planned steps to those taken", "training.saving.CertifiedTrainer.summary",
    "self.plan.steps - steps_before", "self.plan.steps", stop=4, steps=6, target=30.0)  # fmt: skip
@catches("a summary that knows of no target", "accounting.budget.Budget.forecast",
    "min(remaining_steps, self.affordable_steps(remaining_steps))", "remaining_steps", stop=3, steps=6, target=3.0)  # fmt: skip
@pytest.mark.parametrize("stop", [2, 3, 4, 5])
@pytest.mark.parametrize(("steps", "target"), [(6, 3.0), (16, 3.0), (6, 30.0)])
def test_summary_of_resumed_run_states_its_end(tmp_path, stop, steps, target):
    """Regression: the summary added all planned steps to those taken, 9.53 for a run that ended at 8.00."""
    first = resumable(tmp_path)
    first.add_callback(Stop(stop))
    first.train()
    again = resumable(tmp_path, max_steps=steps, target=target, resume_from_checkpoint=True)
    summary = again.summary()
    again.train()
    spent = again.epsilon()
    assert spent <= target and f"guarantee at the end    epsilon {format_epsilon(spent)} at" in summary
    assert f"{stop} taken by earlier runs, {again.budget.ledger.steps - stop} left" in summary


@catches("a report of the plan, not of what was spent", "accounting.privacy_report.make_privacy_report",
    "privacy_report_of_spending(ledger, plan.delta)",
    "privacy_report_of_spending(ledger, plan.delta) | {'epsilon': ledger.epsilon(plan.delta, plan.event(plan.steps - "
    "ledger.steps))}")  # fmt: skip
@catches("a page and a sidecar that compute on their own", "accounting.privacy_report.recompute_privacy_report",
    'privacy_report_of_spending(ledger, report["delta"])',
    'privacy_report_of_spending(ledger, report["delta"]) | '
    '{"epsilon": ledger.epsilon(report["delta"], ledger.events[-1])}')  # fmt: skip
@pytest.mark.integration
def test_recomputed_report_and_guarantee_match_privacy_json(tmp_path):
    trainer = resumable(tmp_path)
    trainer.add_callback(Stop(4))
    trainer.train()
    trainer.save_model()
    found = read_report(tmp_path)
    assert found["epsilon"] == trainer.epsilon() < trainer.plan.target_epsilon
    assert recompute_privacy_report(tmp_path / "privacy.json", PrivacyLedger(trainer.budget.ledger.path)) == found
    sidecar = read_privacy_statement(tmp_path)
    assert {name: sidecar[name] for name in found if name in sidecar} == {name: found[name] for name in found if name in sidecar}
    assert {"epsilon", "accountant", "mu_gdp", "tpr_at_fpr", "steps", "accounted_steps"} <= sidecar.keys()


@catches("spent at the delta of a run that took no step", "accounting.ledger_report.format_ledger", "last = ledger.last_run",
    "last = ledger.runs[-1]")  # fmt: skip
def test_run_without_steps_changes_no_number(tmp_path):
    trainer = resumable(tmp_path)
    trainer.train()
    trainer.save_model()
    privacy = {"noise_multiplier": 5.0, "target_delta": 1e-9}
    options = {"privacy": privacy, "dataset": make_dataset([1] * 60), "resume_from_checkpoint": True}
    again = make_trainer(tmp_path, max_steps=9, save_strategy="steps", **options)
    again.budget.start()  # and no step
    epsilon = format_epsilon(read_report(tmp_path)["epsilon"])
    assert f"spent: epsilon {epsilon} at delta 0.017" in ledger_report.format_ledger(again.budget.ledger)


OTHER = {"noise_multiplier": 9.0, "target_epsilon": None, "target_delta": 0.004, "secure_noise": True, "samples_per_author": 2,
         "per_sample_max_grad_norm": 0.001, "allow_other_authors": True, "sample_rate": 0.01}  # fmt: skip


def finished(folder, **options):
    """Return a trainer after two steps, with its model, audit and card saved."""
    trainer = make_trainer(
        folder, dataset=make_dataset([1] * 60), max_steps=2, save_strategy="steps", save_steps=2, learning_rate=0.1, **options
    )
    trainer.run_report.data, trainer.run_report.base_model = (
        {"dataset": "mine"},
        {"name": "base", "covered": True, "epsilon": 1.0, "delta": 1e-5},
    )
    trainer.train()
    trainer.run_report.audit = one_run_lower_bound(np.zeros(4), np.ones(4, bool), 0.01)
    trainer.save_model()
    trainer.create_model_card()
    return trainer


NEVER = (
    "--noise_multiplier 9 --target_delta 0.9 --secure_noise True --train_fraction 0.5 --allow_other_authors "
    "--per_sample_max_grad_norm 0.001 --samples_per_author 2"
)


@pytest.mark.integration
def test_script_certifies_no_run_without_steps(checkpoint, comments, tmp_path, monkeypatch, capfd, caplog):
    folder = tmp_path / "out"
    typed = small(checkpoint, comments, folder, "--max_steps", "4", "--save_strategy", "steps", "--save_steps", "2")
    status, stdout, stderr = run(monkeypatch, capfd, caplog, *typed, *PRIVACY)
    assert status == 0, stderr
    kept = [(folder / name).read_bytes() for name in ("privacy.json", "README.md")]
    status, again, stderr = run(monkeypatch, capfd, caplog, *typed, "--resume_from_checkpoint", "True", *NEVER.split())
    assert status == 0, stderr
    assert [(folder / name).read_bytes() for name in ("privacy.json", "README.md")] == kept
    first, second = (re.match(r"epsilon .* at delta [^,]*", text.strip().splitlines()[-1])[0] for text in (stdout, again))
    assert first == second and "audit" not in again.strip().splitlines()[-1]


@pytest.mark.integration
@catches("a finished run called again reports the options of now", "training.run_report.RunReport.adopt_finished_run",
    "plan_of({**self.budget.ledger.last_run, **made})", "self.plan", how="options")  # fmt: skip
@catches("settings of now in the report of a finished run", "training.run_report.RunReport.to_dict",
    "if self.finished is not None and", "if False and", how="options")  # fmt: skip
@pytest.mark.parametrize("how", ["options", "argument", "hidden counts", "without privacy"])
def test_finished_run_keeps_its_report_when_called_again(tmp_path, how):
    """It takes no step, so privacy.json, card, summary and epsilon are those of the run that took the steps."""
    plain = {"disable_dp": True, "noise_multiplier": None} if how == "without privacy" else {}
    hidden = {"hide_counts": True, "sample_rate": 0.1, "target_delta": 0.017} if how == "hidden counts" else {}
    options = {"privacy": {**hidden, **OTHER, **plain}, "learning_rate": 0.1, "max_steps": 2, "per_device_train_batch_size": 3}
    other = make_trainer(tmp_path, dataset=make_dataset([1] * 50), **options) if how == "argument" else None
    first = finished(tmp_path, privacy={**hidden, **plain})
    names = ("privacy.json", "README.md")
    kept = [(tmp_path / name).read_bytes() for name in names]
    for _ in range(2):
        if how == "argument":
            other.train(resume_from_checkpoint=True)
        else:
            other = make_trainer(tmp_path, dataset=make_dataset([1] * 50), resume_from_checkpoint=True, **options)
            words = f"guarantee at the end    epsilon {format_epsilon(first.epsilon())} at delta 0.017"
            assert plain or words in other.summary()
            other.train()
        other.save_model()
        other.create_model_card()
        assert [(tmp_path / name).read_bytes() for name in names] == kept and other.run_report.audit == first.run_report.audit
        assert plain or other.epsilon() == first.epsilon()


@pytest.mark.integration
@catches("the page's delta of a run that took no step", "accounting.privacy_report.make_interrupted_privacy_report",
    "ledger.last_run",
    "ledger.runs[-1]")  # fmt: skip
def test_more_steps_with_another_delta_report_that_delta(tmp_path):
    finished(tmp_path)
    privacy = {"noise_multiplier": 2.0, "target_delta": 1e-4, "sample_rate": 0.2}
    again = make_trainer(tmp_path, dataset=make_dataset([1] * 60), privacy=privacy, max_steps=3, learning_rate=0.1,
                         resume_from_checkpoint=True)  # fmt: skip
    again.train()
    again.save_model()
    report, events = read_report(tmp_path), [MechanismEvent(1.0, 4 / 60, 2), MechanismEvent(2.0, 0.2, 1)]
    assert report["delta"] == 1e-4 and report["epsilon"] == again.epsilon() == epsilon_of(events, 1e-4)
    assert report["steps"] == 3 and "audit" not in report  # the audit was of the earlier steps
    words = f"epsilon {format_epsilon(report['epsilon'])} at delta 0.0001"
    assert f"spent: {words}" in ledger_report.format_ledger(again.budget.ledger)
    again.create_model_card()
    assert words in (tmp_path / "README.md").read_text()
    begun = make_trainer(tmp_path, dataset=make_dataset([1] * 60), privacy={"target_delta": 0.1}, max_steps=9,
                         learning_rate=0.1, resume_from_checkpoint=True)  # fmt: skip
    begun.budget.start()  # and no step
    assert (
        make_interrupted_privacy_report(begun.budget.ledger)["delta"]
        == recompute_privacy_report(tmp_path / "privacy.json", begun.budget.ledger)["delta"]
    )


@pytest.mark.integration
@catches("epsilon cut off at the target", "accounting.budget.Budget.epsilon", "return self.ledger.epsilon(",
    "return (lambda *spent: min(self.plan.target_epsilon or math.inf, self.ledger.epsilon(*spent)))(", bands=None)  # fmt: skip
@catches(
    "a step more than the target allows",
    "accounting.budget.Budget.affordable_steps",
    "bisect.bisect_left",
    "1 + bisect.bisect_left",
    bands=None,
)
@pytest.mark.parametrize("bands", [None, "2"])
def test_affordable_steps_is_the_most_under_the_target(tmp_path, bands):
    """The allowed steps agree with the epsilon reported afterwards, to the step."""
    trainer = make_trainer(tmp_path, max_steps=40, privacy={"noise_bands": bands, "sample_rate": 0.05, "target_delta": 1e-3})
    plan = trainer.plan
    for target in (0.99, 1.05, 1.3):
        object.__setattr__(plan, "target_epsilon", target)
        steps = trainer.budget.affordable_steps(40)
        assert 0 < steps < 40
        assert epsilon_of([plan.event(steps)], plan.delta) <= target < epsilon_of([plan.event(steps + 1)], plan.delta)
