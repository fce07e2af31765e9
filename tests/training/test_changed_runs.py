"""What privacy.json says of a model whose steps ran under several options, or whose folder has steps of another branch."""

import pytest
from conftest import make_trainer, read_report
from mutation import catches
from transformers import TrainerCallback

from author_dp.accounting.ledger import LEDGER_NAME, PrivacyLedger
from author_dp.accounting.privacy_report import recompute_privacy_report
from author_dp.outputs.guarantee import guarantee_table_rows
from author_dp.outputs.privacy_statement import PUBLIC_KEYS

STEPS = {"save_strategy": "steps", "save_steps": 1}


class EndAfter(TrainerCallback):
    """A crash behind a step."""

    follows = "steps"

    def on_step_end(self, args, state, control, **kwargs):
        raise RuntimeError("crash")


def resume(folder, max_steps, **privacy):
    return make_trainer(folder, max_steps=max_steps, privacy=privacy, resume_from_checkpoint=True, **STEPS)


def leave_a_branch(folder):
    """Take two steps with noise multiplier 1, then a branch of another mechanism that crashes behind its first step."""
    make_trainer(folder, max_steps=2, **STEPS).train()
    trainer = resume(folder, 4, noise_multiplier=0.5, per_sample_max_grad_norm=7.0, target_delta=0.1)
    trainer.add_callback(EndAfter())
    with pytest.raises(RuntimeError, match="crash"):
        trainer.train()
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return leave_a_branch(tmp_path_factory.mktemp("run"))


@catches(
    "a finished run called again reports the last branch", "training.run_report.RunReport.adopt_finished_run", ", **made}", "}"
)
def test_a_finished_model_is_reported_with_the_mechanism_that_made_it(folder):
    trainer = resume(folder, 2)
    trainer.train()  # finished: no step
    trainer.save_model()
    report, made = read_report(folder), read_report(folder / "checkpoint-2")
    for name in ("noise_multiplier", "clip_norm", "delta", "sample_rate"):
        assert report[name] == made[name], name
    assert report["steps"] == 3
    assert report["epsilon"] == trainer.budget.ledger.epsilon(made["delta"]) > made["epsilon"]


def test_several_mechanisms_are_named_wherever_the_guarantee_is(folder):
    report = resume(folder, 2).privacy_report()
    wanted = ("steps", "noise_multiplier", "clip_norm", "sample_rate")
    assert [tuple(one[name] for name in wanted) for one in report["mechanisms"]] == [(2, 1.0, 0.5, 4 / 6), (1, 0.5, 7.0, 4 / 6)]
    assert "mechanisms" not in read_report(folder / "checkpoint-2")  # made before
    assert "mechanisms" in PUBLIC_KEYS and "mechanisms" in recompute_privacy_report(
        folder / "checkpoint-2" / "privacy.json", PrivacyLedger(folder / LEDGER_NAME)
    )
    row = dict(guarantee_table_rows(report))["Mechanisms of all steps"]
    assert row.startswith("2 steps with noise multiplier 1,") and "1 step with noise multiplier 0.5," in row


@catches("noise called secure if that of the last steps is", "training.run_report.RunReport.identify_base",
    'self.secure_noise and report.get("secure_noise") is True', "self.secure_noise")  # fmt: skip
def test_noise_is_not_called_secure_where_that_of_earlier_steps_was_not(tmp_path):
    make_trainer(tmp_path, **STEPS).train()
    trainer = resume(tmp_path, 2, secure_noise=True)
    trainer.train()
    assert trainer.privacy_report()["secure_noise"] is False
