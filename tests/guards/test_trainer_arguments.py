"""guards/trainer_arguments.py: each option of Hugging Face's TrainingArguments works, is refused, or has no effect."""

import dataclasses

import pytest
import torch
from conftest import flat, make_dataset, make_trainer
from mutation import catches
from transformers import TrainingArguments
from transformers.training_args import OptimizerNames

from author_dp.errors import UserError
from author_dp.guards import trainer_arguments
from author_dp.guards.launchers import LAUNCHER_VARIABLES
from author_dp.guards.options import validate_options
from author_dp.guards.trainer_arguments import NO_EFFECT, OPTIMIZERS, REFUSED_OPTIONS, WORKS, trainer_options_without_effect
from dp_utils import DPTrainer, PrivacyArguments

# A value that is not the default, for each option that works and each without effect.
OTHER_VALUES = {
    "per_device_train_batch_size": 3, "num_train_epochs": 2.0, "max_steps": 2, "learning_rate": 0.1, "optim": "rmsprop",
    "lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 0.01}, "warmup_steps": 1,
    "optim_args": "momentum=0.5", "weight_decay": 0.01, "adam_beta1": 0.8, "adam_beta2": 0.9, "adam_epsilon": 1e-6,
    "optim_target_modules": "all-linear", "gradient_accumulation_steps": 2, "max_grad_norm": 0.0, "bf16": True, "tf32": False,
    "activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": False},
    "gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}, "use_cache": True,
    "logging_strategy": "epoch", "logging_steps": 2, "logging_first_step": True, "log_on_each_node": False,
    "logging_nan_inf_filter": False, "log_level": "warning", "log_level_replica": "error", "disable_tqdm": True,
    "report_to": "tensorboard", "run_name": "mine", "project": "mine", "eval_strategy": "steps", "eval_steps": 1,
    "eval_delay": 1, "per_device_eval_batch_size": 2, "eval_on_start": True, "save_only_model": True, "save_strategy": "epoch",
    "save_steps": 1, "save_total_limit": 1, "full_determinism": True, "seed": 7, "use_cpu": True,
    "restore_callback_states_from_checkpoint": True, "dataloader_num_workers": 1, "dataloader_pin_memory": False,
    "dataloader_persistent_workers": True, "dataloader_prefetch_factor": 1, "dataloader_multiprocessing_context": "fork",
    "ddp_timeout": 60, "skip_memory_metrics": False,
    # without effect
    "bf16_full_eval": True, "fp16_full_eval": True, "prediction_loss_only": True, "eval_do_concat_batches": False,
    "eval_use_gather_object": True, "eval_accumulation_steps": 1, "include_for_metrics": ["inputs"],
    "batch_eval_metrics": True, "label_names": ["x"], "dataloader_drop_last": True, "dataloader_in_order": False,
    "remove_unused_columns": True, "length_column_name": "x", "data_seed": 3, "ignore_data_skip": True,
    "ddp_find_unused_parameters": True, "ddp_bucket_cap_mb": 3, "ddp_broadcast_buffers": True, "ddp_static_graph": True,
    "do_train": True, "do_eval": True, "do_predict": True, "local_rank": 0, "average_tokens_across_devices": False,
    "torch_empty_cache_steps": 1, "liger_kernel_config": {"rope": True}, "fsdp_config": {"min_num_params": 1},
}  # fmt: skip
TESTED_ELSEWHERE = {  # test_publish.py, test_loggers.py, test_checkpointing.py, test_fine_tune_dp.py
    "push_to_hub", "hub_token", "hub_private_repo", "hub_model_id", "hub_strategy", "hub_always_push", "hub_revision",
    "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id", "resume_from_checkpoint", "output_dir",
    "load_best_model_at_end", "metric_for_best_model", "greater_is_better", "ddp_backend",
}  # fmt: skip


def make_arguments(folder):
    """Return options that are accepted, and those of privacy."""
    args = TrainingArguments(output_dir=str(folder), use_cpu=True, report_to=[], max_grad_norm=0.0)
    return args, PrivacyArguments(noise_multiplier=1.0, per_sample_max_grad_norm=1.0)


@pytest.fixture
def args(tmp_path):
    return make_arguments(tmp_path)[0]


@pytest.fixture
def privacy(tmp_path):
    return make_arguments(tmp_path)[1]


def test_table_knows_every_option_of_the_installed_transformers():
    """Where this fails, look where the new option leads in transformers, and add it to the table, here and to a test."""
    tables = [WORKS, REFUSED_OPTIONS.keys(), NO_EFFECT.keys()]
    names = [name for table in tables for name in table]
    assert len(names) == len(set(names))
    assert {field.name for field in dataclasses.fields(TrainingArguments)} - set(names) == set()
    assert OTHER_VALUES.keys() | TESTED_ELSEWHERE == WORKS | NO_EFFECT.keys()


@catches("a new option of transformers taken for harmless", "guards.trainer_arguments.check_trainer_options",
    "and trainer_option_is_set(args, field.name)", "and False")  # fmt: skip
def test_option_that_the_table_does_not_know_is_refused(args, privacy, monkeypatch):
    monkeypatch.setattr(trainer_arguments, "WORKS", WORKS - {"warmup_steps", "logging_nan_inf_filter"})
    monkeypatch.setattr(trainer_arguments, "NO_EFFECT", {k: v for k, v in NO_EFFECT.items() if k != "include_for_metrics"})
    validate_options(args, privacy)
    for name, value in (("warmup_steps", 5), ("logging_nan_inf_filter", False), ("include_for_metrics", ["inputs"])):
        default = getattr(args, name)
        setattr(args, name, value)
        with pytest.raises(UserError, match=f"--{name} .*not examined"):
            validate_options(args, privacy)
        setattr(args, name, default)


@catches("accelerate told to accumulate", "guards.trainer_arguments.trainer_option_is_set", "return value != AcceleratorConfig()",
    "return False", option="accelerator_config", value={"gradient_accumulation_kwargs": {"num_steps": 4}})  # fmt: skip
@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("accelerator_config", {"gradient_accumulation_kwargs": {"num_steps": 4}}),
        ("accelerator_config", {"split_batches": True}),
        ("accelerator_config", {"use_configured_state": False, "non_blocking": True}),
        ("include_num_input_tokens_seen", True),
        ("include_num_input_tokens_seen", "non_padding"),
        ("debug", "underflow_overflow"),
        ("enable_jit_checkpoint", True),
        ("train_sampling_strategy", "sequential"),
        ("optim", "schedule_free_adamw"),
        ("optim", "lomo"),
        ("dataloader_persistent_workers", True),
        ("dataloader_multiprocessing_context", "fork"),
        ("ddp_timeout", -1),
        ("save_total_limit", 0),
    ],
)
def test_options_that_reach_behind_the_loop_are_refused(tmp_path, option, value):
    with pytest.raises(UserError, match=rf"^--{option}\b.*: .*\. [A-Z]"):
        make_trainer(tmp_path, **{option: value})


ELSEWHERE_SET = {"optim": "adamw_torch", "optim_args": None, "activation_checkpointing": None, "gradient_checkpointing": None}


@pytest.mark.integration
@pytest.mark.parametrize("change", [{}, ELSEWHERE_SET])
def test_options_that_work_do_so_together(tmp_path, change):
    options = {name: value for name, value in OTHER_VALUES.items() if name in WORKS}
    trainer = make_trainer(tmp_path, eval_dataset=make_dataset([1, 2]), **options | change)
    try:
        trainer.train()
        trainer.save_model()
    finally:
        torch.use_deterministic_algorithms(False)
    assert trainer.budget.ledger.steps == 2


@pytest.mark.integration
@pytest.mark.parametrize("half", ["bf16_full_eval", "fp16_full_eval"])
def test_options_without_effect_change_neither_weights_nor_losses(tmp_path, half):
    def run(name, **options):
        privacy = {"noise_multiplier": None, "disable_dp": True}
        trainer = make_trainer(tmp_path / name, dataset=make_dataset([1] * 4), privacy=privacy, eval_dataset=make_dataset([1, 2]),
                               max_steps=2, **options)  # fmt: skip
        trainer.train()
        return trainer, flat(trainer.model.parameters()), trainer.evaluate()["eval_loss"]

    options = {name: OTHER_VALUES[name] for name in NO_EFFECT if not name.endswith("full_eval")}
    _, plain, plain_loss = run("plain")
    trainer, weights, loss = run("options", **{**options, half: True})
    assert torch.allclose(weights, plain, atol=1e-6) and abs(loss - plain_loss) < 1e-5
    named = trainer_options_without_effect(trainer.args)
    assert f"--{half}" in named and len(named) >= 20


def test_every_optimizer_is_examined(args, privacy):
    for name in OptimizerNames:
        args.optim = name
        if name.value in OPTIMIZERS:
            validate_options(args, privacy)
        else:
            with pytest.raises(UserError, match=f"--optim {name.value}: .*Use adamw_torch"):
                validate_options(args, privacy)


class ScheduleFree(torch.optim.SGD):
    """An optimizer that has two sets of weights."""

    def train(self): ...

    def eval(self): ...


class Closure(torch.optim.SGD):
    def step(self, closure):
        return super().step(closure)


@pytest.mark.parametrize(("optimizer", "words"), [(ScheduleFree, r"needs train\(\)"), (Closure, "computes the loss again")])
@pytest.mark.parametrize("disable_dp", [False, True])
def test_optimizer_objects_that_need_more_than_gradients_are_refused(tmp_path, optimizer, words, disable_dp):
    privacy = {"noise_multiplier": None, "disable_dp": True} if disable_dp else {}
    trainer = make_trainer(tmp_path, privacy=privacy)
    trainer.optimizer_cls_and_kwargs = (optimizer, {"lr": 0.1})
    with pytest.raises(UserError, match=f"{optimizer.__name__} {words}"):
        trainer.train()
    assert trainer.budget.ledger.steps == 0


def test_optimizer_arguments_that_nothing_reads_are_refused(tmp_path):
    for optim, given in (("adamw_torch", "beta3=0.9"), ("sgd", "momentm=0.9")):
        with pytest.raises(UserError, match=f"--optim_args {given}: --optim {optim} does not read it"):
            make_trainer(tmp_path, optim=optim, optim_args=given).train()
    make_trainer(tmp_path, optim="sgd", optim_args="momentum=0.9,nesterov=True").train()


@pytest.mark.parametrize("name", ["compute_loss_func", "compute_metrics", "preprocess_logits_for_metrics", "model_init"])
def test_arguments_of_trainer_that_are_not_followed_are_refused(name):
    trainer_arguments.check_trainer_arguments({name: None, "callbacks": []})
    with pytest.raises(UserError, match=f"^{name} of DPTrainer: "):
        trainer_arguments.check_trainer_arguments({name: lambda *_: None})


@catches("batches thrown away by a later change", "guards.trainer_arguments.check_trainer_adapted",
    "trainer.args.gradient_accumulation_steps != 1 or ", "")  # fmt: skip
@pytest.mark.parametrize(
    ("name", "value", "words"),
    [("gradient_accumulation_steps", 4, "gradient_accumulation_steps of DPTrainer"), ("max_grad_norm", 1.0, "--max_grad_norm")],
)
def test_options_changed_after_the_plan_are_checked_again(tmp_path, name, value, words):
    trainer = make_trainer(tmp_path)
    setattr(trainer.args, name, value)
    with pytest.raises(UserError, match=words):
        trainer.train()
    assert trainer.budget.ledger.steps == 0


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"SLURM_STEP_NUM_TASKS": "8"}, "SLURM_STEP_NUM_TASKS 8: srun started"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "OMPI_COMM_WORLD_SIZE 2: mpirun started"),
        ({"ACCELERATE_USE_CPU": "True", "MASTER_ADDR": "127.0.0.1"}, "accelerate launch --cpu: it starts one process"),
        ({"SLURM_STEP_NUM_TASKS": "2", "RANK": "0"}, None),  # one torch.distributed.run for each machine
        ({"SLURM_STEP_NUM_TASKS": "1", "MASTER_ADDR": "127.0.0.1"}, None),
    ],
)
def test_processes_that_know_nothing_of_each_other_are_refused(args, privacy, monkeypatch, environment, words):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if words is None:
        return validate_options(args, privacy)
    with pytest.raises(UserError, match=f"^{words}"):
        validate_options(args, privacy)


@pytest.mark.parametrize("name", LAUNCHER_VARIABLES)
def test_what_a_launcher_asks_for_by_the_environment_is_refused(args, privacy, monkeypatch, name):
    option, without, _ = LAUNCHER_VARIABLES[name]
    for value in (without, without.upper()):  # what `accelerate launch` sets by default
        monkeypatch.setenv(name, value)
        validate_options(args, privacy)
    for value in {"no": ("bf16", "fp16", "fp8", "inductor"), "false": ("true", "1"), "1": ("4",)}[without]:
        monkeypatch.setenv(name, value)
        with pytest.raises(UserError, match=rf"^{name} {value} \(accelerate launch {option}\): .*(Leave|Unset)"):
            validate_options(args, privacy)
    monkeypatch.setenv(name, "bf16")
    args.bf16 = True
    if option == "--mixed_precision":
        validate_options(args, privacy)


def test_a_loss_of_ones_own_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(DPTrainer, "compute_loss", lambda *_: pytest.fail("called"))
    with pytest.raises(UserError, match="compute_loss of DPTrainer: it is never called"):
        make_trainer(tmp_path).train()
