"""budget.py: no step exceeds the target, and each is recorded before its update, across runs."""

import re

import numpy as np
import pytest
import torch
from conftest import flat, make_dataset, make_trainer, resumable, train
from mutation import catches
from test_accountant import exact_epsilon
from test_slots import Args, arguments
from transformers import TrainerCallback

from author_dp.accounting.budget import Budget, StopAtTargetEpsilon
from author_dp.accounting.ledger import PrivacyLedger
from author_dp.accounting.plan import certify_plan, make_plan
from author_dp.errors import UserError


@catches("the ledger after the update", "mechanism.optimizer.AuthorDPOptimizer.pre_step", "self.before_release()",
    "self.original_optimizer.register_step_post_hook(lambda *_: self.before_release())")  # fmt: skip
def test_the_ledger_is_ahead_of_every_update(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=3)
    seen = []
    optimizer_step = torch.optim.SGD.step

    class Watched(torch.optim.SGD):
        def step(self, *args, **kwargs):
            seen.append(PrivacyLedger(tmp_path / "privacy_ledger.jsonl").steps)
            return optimizer_step(self, *args, **kwargs)

    trainer.optimizer = Watched(trainer.model.parameters(), lr=1.0)
    trainer.train()
    assert seen == [1, 2, 3]


@catches("the time of day in the ledger", "accounting.budget.Budget._write_header", ".date().isoformat()", ".isoformat()")
def test_the_ledger_tells_the_day_not_the_time(tmp_path):
    make_trainer(tmp_path, max_steps=1).train()
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", PrivacyLedger(tmp_path / "privacy_ledger.jsonl").runs[0]["started"])


def test_failing_ledger_stops_before_the_update(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path)
    before = flat(trainer.model.parameters()).clone()

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(PrivacyLedger, "record_step", fail)
    with pytest.raises(OSError):
        trainer.train()
    assert torch.equal(before, flat(trainer.model.parameters()))


@pytest.mark.integration
@catches("steps lost in a crash not counted on resume", "accounting.budget.Budget.epsilon",
    "self.ledger.epsilon(self.plan.delta, self.plan.event(more_steps))",
    "PrivacyLedger(self.ledger.path / 'none').epsilon(self.plan.delta, self.plan.event(self.steps + more_steps))")  # fmt: skip
def test_resumed_run_counts_lost_steps_and_samples_again(tmp_path):
    first = resumable(tmp_path)

    class Stop(TrainerCallback):
        follows = "steps"

        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 3  # one step after the checkpoint, so it is lost

    first.add_callback(Stop())
    _, before = train(first)
    second = resumable(tmp_path, resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert second.plan.noise_multiplier == first.plan.noise_multiplier
    _, after = train(second)
    assert second.budget.ledger.steps == 6 and second.state.global_step == 5  # the budget allows six steps, and one was lost
    assert second.epsilon() <= 3.0
    assert abs(np.corrcoef(before.gradients[2], after.gradients[0])[0, 1]) < 0.3
    with pytest.raises(UserError, match=r"--target_epsilon 3\.0: used up"):
        resumable(tmp_path, resume_from_checkpoint=str(tmp_path / "checkpoint-2")).train()


def test_used_up_budget_is_found_before_the_model_check(tmp_path, monkeypatch):
    resumable(tmp_path, max_steps=2).train()
    monkeypatch.setattr("author_dp.training.setup.check_and_place_model", lambda *_: pytest.fail("the model was checked first"))
    with pytest.raises(UserError, match="used up"):
        resumable(tmp_path, max_steps=60, resume_from_checkpoint=True)


@catches("resumed under a delta that promises nothing", "accounting.budget.Budget.start",
    "check_delta([*self.ledger.events, self.plan.event(self.plan.steps)], self.plan.delta)", "pass", delta=0.9)  # fmt: skip
@pytest.mark.parametrize("delta", [0.3, 0.9])  # 60 authors at q = 1/15: in any of six steps with a probability of 0.34
def test_resumed_run_refuses_a_delta_that_promises_nothing(tmp_path, delta):
    budget = resumable(tmp_path).budget
    budget.start()
    budget.record_step()
    object.__setattr__(budget.plan, "delta", delta)
    with pytest.raises(UserError, match=f"--target_delta {delta}: .* probability of 0.38"):  # with the step before
        budget.start()


def test_run_without_noise_is_no_start_for_one_with_a_target(tmp_path):
    budget = make_trainer(tmp_path, dataset=make_dataset([1] * 60), privacy={"noise_multiplier": 0.0, "sample_rate": 1e-9}).budget
    budget.start()
    budget.record_step()
    object.__setattr__(budget.plan, "target_epsilon", 8.0)
    with pytest.raises(UserError, match=r"--target_epsilon 8\.0: used up"):
        budget.start()


@pytest.mark.integration
def test_run_without_steps_does_not_bind_later_runs(tmp_path):
    """Its header may exist; a new run is calibrated and accounted by itself."""
    idle = resumable(tmp_path, max_steps=60, target=1.0)
    idle.budget.start()
    assert idle.budget.ledger.steps == 0 and len(idle.budget.ledger.runs) == 1
    fresh = make_trainer(
        tmp_path, dataset=make_dataset([1] * 50), max_steps=3, privacy={"noise_multiplier": None, "target_epsilon": 4.0}
    )
    fresh.train()
    assert fresh.budget.ledger.steps == 3 and 3.9 < fresh.epsilon() <= 4.0


@pytest.mark.integration
def test_runs_with_other_options_compose_as_they_ran(tmp_path):
    def run(steps, sigma, batch, **privacy):
        trainer = make_trainer(
            tmp_path, dataset=make_dataset([2] * 60), max_steps=steps, save_strategy="steps", save_steps=1,
            per_device_train_batch_size=batch, resume_from_checkpoint=steps > 2,
            privacy={"noise_multiplier": sigma, "per_sample_max_grad_norm": 1.0, **privacy},
        )  # fmt: skip
        trainer.train()
        return trainer

    run(2, 1.5, 6)
    run(5, 2.0, 12, samples_per_author=2)
    last = run(6, 2.0, 6, per_sample_max_grad_norm=0.1)
    expected = exact_epsilon([(1.5, 0.1, 2), (2.0, 0.2, 3), (2.0, 0.1, 1)], 1 / 60, 1e-4)
    report = last.privacy_report()
    assert expected <= report["epsilon"] * (1 + 1e-6) and report["epsilon"] == pytest.approx(expected, rel=5e-3)
    assert report["steps"] == 6 and [run["samples_per_author"] for run in last.budget.ledger.runs] == [1, 2, 1]


@pytest.mark.integration
def test_resumed_run_spends_only_the_rest(tmp_path):
    resumable(tmp_path, max_steps=6).train()
    with pytest.raises(UserError, match="used up"):
        resumable(tmp_path, max_steps=60, resume_from_checkpoint=True).train()
    more = resumable(tmp_path, max_steps=60, target=4.0, resume_from_checkpoint=True)
    more.train()
    assert 6 < more.budget.ledger.steps < 60 and more.epsilon() <= 4.0 < more.epsilon(1)


@catches("the budget passed", "accounting.budget.Budget.record_step", "if self.steps >= self.allowed_steps:", "if False:")
def test_record_step_refuses_steps_beyond_the_budget(tmp_path):
    trainer = resumable(tmp_path)
    trainer.callback_handler.callbacks = [c for c in trainer.callback_handler.callbacks if not isinstance(c, StopAtTargetEpsilon)]
    trainer.budget.start()
    for _ in range(6):
        trainer.budget.record_step()
    with pytest.raises(RuntimeError, match="exceed"):
        trainer.budget.record_step()
    assert trainer.budget.ledger.steps == 6


@catches("a certificate of more than can be shown", "accounting.plan.certify_plan", "round_down(plan.target_epsilon)",
    "plan.target_epsilon")  # fmt: skip
def test_any_target_can_be_certified(tmp_path):
    """Epsilon is shown with four digits, rounded up, and must not exceed a target of more digits."""
    plan = certify_plan(make_plan(arguments(target_epsilon=7.98765), Args, np.arange(25)), [], 3)
    budget = Budget(plan, PrivacyLedger(tmp_path / "a"), True)
    assert budget.affordable_steps(3) == 3 and budget.epsilon(3) == 7.987
