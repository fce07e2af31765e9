"""metric_driven.py: schedulers that are given, and what is refused after metrics have chosen a model."""

import pytest
import torch
from mutation import catches
from test_callbacks import declared, header, trainer_with

from author_dp.errors import UserError
from author_dp.training.loss_release import release_eval_loss


def given_scheduler(trainer):
    optimizer = torch.optim.SGD(trainer.model.parameters(), lr=1.0)
    trainer.optimizer = optimizer
    trainer.lr_scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
    trainer.lr_scheduler.follows = "evaluation"
    trainer.args.metric_for_best_model = None


@catches("a callback that follows metrics not in the header", "guards.metric_driven.metric_driven_callback", "== EVALUATION",
    "== 0", kind="callback", reason="shared authors")  # fmt: skip
@catches("training data that evaluate", "training.setup.recheck_before_training",
    "have_shared_authors(trainer.train_dataset, trainer.eval_dataset)", "shared_authors or False", kind="option",
    reason="same hashes")  # fmt: skip
@catches("a callback chooses after a release", "training.setup.recheck_before_training",
    "check_checkpoint_not_released(trainer.budget.ledger, option)", "pass", kind="callback",
    reason="an earlier release")  # fmt: skip
@pytest.mark.parametrize("kind", ["callback", "scheduler", "option"])
@pytest.mark.parametrize("reason", ["shared authors", "same data", "same hashes", "an earlier release"])
def test_where_nothing_pays_no_metrics_choose(tmp_path, kind, reason):
    more = {"lr_scheduler_type": "greedy"} if kind == "option" else {}
    trainer = trainer_with(tmp_path, *([declared("evaluation")] if kind == "callback" else []), **more)
    if kind == "scheduler":
        given_scheduler(trainer)
    if reason == "shared authors":
        trainer.shared_authors = True
    elif reason == "same data":
        trainer.eval_dataset = {"held-out": trainer.eval_dataset, "train": trainer.train_dataset}
    elif reason == "same hashes":
        trainer.eval_dataset.hashes = trainer.train_dataset.hashes[-1:]
    else:
        ledger = trainer.budget.ledger
        ledger.start_run({**trainer.plan.to_public_dict(), "split": "s"})
        ledger.record_release({"epsilon": 1.0, "split": "s"})
    with pytest.raises(UserError, match="was released" if reason == "an earlier release" else "--allow_shared_authors"):
        trainer.train()
    assert trainer.budget.ledger.steps == 0


@catches("a scheduler that was given taken for harmless", "guards.metric_driven.metric_driven_scheduler",
    "if scheduler is None or", "if True or", kind="scheduler")  # fmt: skip
@catches("a loss released of a model that it chose", "training.loss_release.release_eval_loss",
    "check_release_not_chosen(broadcast(trainer.budget.ledger.by_metrics))", "pass", kind="callback")  # fmt: skip
@pytest.mark.parametrize("kind", ["callback", "scheduler"])
def test_after_metrics_have_chosen_nothing_is_released(tmp_path, kind):
    trainer = trainer_with(tmp_path, *([declared("evaluation")] if kind == "callback" else []), eval_strategy="no")
    if kind == "scheduler":
        trainer.optimizer = torch.optim.SGD(trainer.model.parameters(), lr=1.0)
        trainer.lr_scheduler = torch.optim.lr_scheduler.StepLR(trainer.optimizer, 1)
        trainer.lr_scheduler.follows = "evaluation"
    trainer.train()
    said = "callback Declared" if kind == "callback" else "optimizers: StepLR"
    assert header(tmp_path)["by_metrics"] == said
    with pytest.raises(UserError, match=f"had {said}"):
        release_eval_loss(trainer, 1.0, None, limited=False)


def with_scheduler(folder, **more):
    """Return a trainer with a given scheduler that reads the logged losses."""
    trainer = trainer_with(folder, **more)
    trainer.optimizer = torch.optim.SGD(trainer.model.parameters(), lr=1.0)
    trainer.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
        trainer.optimizer, lambda step: 1.0 + sum(line.get("loss", 0.0) for line in trainer.state.log_history)
    )
    return trainer


@catches("a given scheduler that reads training losses", "guards.metric_driven.metric_driven_scheduler",
    "declared not in (STEPS, EVALUATION)", "False", more={})  # fmt: skip
@pytest.mark.parametrize("more", [{}, {"lr_scheduler_type": "greedy"}])  # an option in the header does not cover it
def test_given_scheduler_must_declare_what_it_follows(tmp_path, more):
    trainer = with_scheduler(tmp_path / "none", **more)
    for kind in (None, "step", "training"):
        trainer.lr_scheduler.follows = kind
        with pytest.raises(UserError, match=r"optimizers: the scheduler LambdaLR .*scheduler\.follows"):
            trainer.train()
    assert trainer.budget.ledger.steps == 0


@pytest.mark.integration
def test_given_scheduler_is_held_to_its_declaration(tmp_path):
    trainer = with_scheduler(tmp_path / "steps")
    trainer.lr_scheduler.follows = "steps"
    trainer.train()
    assert header(tmp_path / "steps")["by_metrics"] is None
    kind = type("Own", (torch.optim.lr_scheduler.StepLR,), {"follows": "evaluation"})
    trainer = with_scheduler(tmp_path / "class")
    trainer.lr_scheduler = kind(trainer.optimizer, 1)
    trainer.train()
    assert header(tmp_path / "class")["by_metrics"] == "optimizers: Own"
    trainer.lr_scheduler, trainer._created_lr_scheduler = type("Inherits", (kind,), {})(trainer.optimizer, 1), False
    with pytest.raises(UserError, match="the scheduler Inherits did not declare"):
        trainer.train()
    with_scheduler(tmp_path / "free", privacy={"disable_dp": True}).train()


@pytest.mark.integration
def test_second_training_has_no_given_scheduler(tmp_path):
    trainer = trainer_with(tmp_path)
    trainer.train()
    trainer.train()
    assert header(tmp_path)["by_metrics"] is None
