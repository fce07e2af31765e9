"""metric_driven_option: options by which losses without noise decide are recorded, or refused."""

import inspect

import pytest
import torch
from mutation import catches
from script_runs import PRIVACY, run_here, small
from test_callbacks import header, trainer_with
from transformers import TrainingArguments, get_scheduler
from transformers.trainer_utils import IntervalStrategy, SaveStrategy, SchedulerType

from author_dp.guards.metric_driven import STEP_ONLY, metric_driven_option

# --- options -------------------------------------------------------------------------------------------------

SCHEDULER_KWARGS = {"cosine_with_min_lr": {"min_lr": 1e-5}, "cosine_warmup_with_min_lr": {"min_lr": 1e-5}}
SCHEDULER_KWARGS["warmup_stable_decay"] = {"num_decay_steps": 3}


def options(folder, **more) -> TrainingArguments:
    return TrainingArguments(output_dir=str(folder), use_cpu=True, report_to=[], **more)


@catches("a scheduler of a later version taken for harmless", "guards.metric_driven.metric_driven_option",
    "if value not in known:", 'if value in ("best", "reduce_lr_on_plateau"):', kind="greedy")  # fmt: skip
@pytest.mark.parametrize("kind", [kind.value for kind in SchedulerType])
def test_metric_driven_option_knows_each_scheduler_type(tmp_path, kind):
    """In each version of transformers, listed schedulers step without metrics, by the number of steps alone."""
    args = options(tmp_path, lr_scheduler_type=kind, eval_strategy="steps", eval_steps=1)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
    scheduler = get_scheduler(kind, optimizer, 2, 10, SCHEDULER_KWARGS.get(kind))
    if kind not in STEP_ONLY["lr_scheduler_type"]:
        assert metric_driven_option(args) == f"--lr_scheduler_type {kind}"
        return
    assert metric_driven_option(args) is None
    assert isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR)
    required = [name for name, p in inspect.signature(scheduler.step).parameters.items() if p.default is p.empty]
    assert not required
    rates = []
    for step in range(10):
        rates.append(scheduler.get_last_lr()[0])
        assert scheduler.lr_lambdas[0](step) * 1.0 == rates[-1]  # asked again, out of order, it says the same
        optimizer.step()
        scheduler.step()
    assert rates == [scheduler.lr_lambdas[0](step) for step in range(10)]


def test_step_only_lists_nothing_that_follows_metrics():
    kinds = {kind.value for kind in SchedulerType}
    assert {"greedy", "reduce_lr_on_plateau"} & kinds <= kinds - STEP_ONLY["lr_scheduler_type"]
    for name, members in (
        ("save_strategy", SaveStrategy),
        ("eval_strategy", IntervalStrategy),
        ("logging_strategy", IntervalStrategy),
    ):
        assert {member.value for member in members} - STEP_ONLY[name] <= {"best"}


@catches("the best checkpoint spared, and nobody told", "guards.metric_driven.metric_driven_option",
    "if args.metric_for_best_model is not None:", "if False:", given={"metric_for_best_model": "loss", "save_total_limit": 1},
    said="--metric_for_best_model loss")  # fmt: skip
@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"lr_scheduler_type": "greedy"}, "--lr_scheduler_type greedy"),
        ({"lr_scheduler_type": "reduce_lr_on_plateau"}, "--lr_scheduler_type reduce_lr_on_plateau"),
        ({"load_best_model_at_end": True, "save_steps": 1}, "--load_best_model_at_end"),
        ({"save_strategy": "best", "metric_for_best_model": "loss"}, "--save_strategy best"),
        ({"metric_for_best_model": "loss", "save_total_limit": 1}, "--metric_for_best_model loss"),
        ({}, None),
    ],
)
def test_metric_driven_option_names_the_option(tmp_path, given, said):
    given = {"save_strategy": "steps", "eval_strategy": "steps", "eval_steps": 1, **given}
    assert metric_driven_option(options(tmp_path, **given)) == said


def test_metric_driven_option_counts_unknown_values(tmp_path):
    for name in STEP_ONLY:
        args = options(tmp_path)
        setattr(args, name, "new_in_a_later_version")
        assert metric_driven_option(args) == f"--{name} new_in_a_later_version"


GREEDY = ["--lr_scheduler_type", "greedy", "--eval_strategy", "epoch"]


@pytest.mark.parametrize("more", [["--allow_shared_authors", "--validation_file", "x"], ["--release_eval_epsilon", "1"]])
def test_script_refuses_greedy_with_shared_authors_or_a_release(tmp_path, monkeypatch, capfd, more):
    status, stderr = run_here(monkeypatch, capfd, *small("model", "data.jsonl", tmp_path, *PRIVACY, *GREEDY, *more))
    assert status == 2 and "--lr_scheduler_type greedy" in stderr and more[0] in stderr, stderr


def test_train_records_greedy_in_the_header(tmp_path):
    trainer = trainer_with(tmp_path, lr_scheduler_type="greedy")
    trainer.train()
    assert header(tmp_path)["by_metrics"] == "--lr_scheduler_type greedy" and trainer.budget.ledger.steps == 4
