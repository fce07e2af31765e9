"""training/resuming.py: a resumed run takes its new options, or refuses them by name; the newest checkpoint is the last one."""

import dataclasses
import json
import runpy

import pytest
from conftest import ROOT, make_dataset, make_trainer, read_report, tiny_gpt2
from peft import LoraConfig, get_peft_model
from script_runs import PRIVACY, run_here, small
from transformers import TrainerCallback

from author_dp.errors import UserError
from author_dp.models.weights import COMPLETE_MARKER
from author_dp.training.checkpointing import checkpoints_by_age, latest_complete_checkpoint
from author_dp.training.resuming import CHOICE_OF_AUTHORS, MAY_CHANGE, check_same_options

STEPS = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2}
LORA = {"r": 2, "lora_alpha": 4, "target_modules": ["c_attn"], "fan_in_fan_out": True, "task_type": "CAUSAL_LM"}


def lora(**options):
    return get_peft_model(tiny_gpt2(), LoraConfig(**{**LORA, **options}))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Output directories of two steps: one of a full model, one of an adapter."""
    full, adapter = tmp_path_factory.mktemp("full"), tmp_path_factory.mktemp("adapter")
    make_trainer(full, optim="adamw_torch", learning_rate=0.1, **STEPS).train()
    make_trainer(adapter, lora(), **STEPS).train()
    return full, adapter


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"learning_rate": 0.2}, r"^--learning_rate 0\.2: .*checkpoint-2 was made with --learning_rate 0\.1\. Give"),
        (
            {"weight_decay": 0.5, "adam_beta1": 0.5},
            r"^--weight_decay 0\.5, --adam_beta1 0\.5: .*with --weight_decay 0\.0, --adam_beta1",
        ),
        ({"optim": "sgd"}, "^--optim sgd: .*made with --optim adamw_torch"),
        ({"optim": "adafactor"}, "^--optim adafactor"),
        ({"optim_args": "eps=1e-3"}, "^--optim_args eps=1e-3: .*made with --optim_args .not given."),
        ({"lr_scheduler_type": "cosine"}, "^--lr_scheduler_type cosine: .*made with --lr_scheduler_type constant"),
        ({"warmup_steps": 3}, "^--warmup_steps 3"),
        ({"seed": 7}, "^--seed 7"),
        ({"privacy": {"adam_noise_correction": True}}, "^--adam_noise_correction True: .*made with --adam_noise_corr"),
        ({"dataset": make_dataset([1, 2, 3, 1, 1, 6])}, "^--train_file, or another data option: the training samples are not"),
        ({"dataset": make_dataset([1, 2, 3, 1, 1])}, "^--resume_from_checkpoint: there are 5 training authors now, 6 before"),
        ({"dataset": make_dataset([1, 2, 3, 1, 1, 5], seed=1)}, "--allow_other_authors if this is intended"),
        ({"model": tiny_gpt2(tied=False)}, "^--model_name: its config.json has tie_word_embeddings False: .*made with True"),
        ({"max_steps": 1}, "^--max_steps or --num_train_epochs: 1 step, but .*checkpoint-2 has 2 already"),
    ],
)
def test_what_cannot_take_effect_is_refused_by_name(folders, options, words):
    known = {"optim": "adamw_torch", "learning_rate": 0.1, **STEPS, "max_steps": 4, "resume_from_checkpoint": True}
    with pytest.raises(UserError, match=words):
        make_trainer(folders[0], **{**known, **options})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"r": 4}, "^--lora_dim 4: .*made with 2"),
        ({"lora_alpha": 8}, "^--lora_alpha 8"),
        ({"target_modules": ["c_fc"]}, "^--lora_target_modules c_fc: .*made with c_attn"),
        ({"use_dora": True}, "^--lora_use_dora True"),
        ({"bias": "all"}, "^--lora_bias all"),
        ({"modules_to_save": ["ln_f"]}, "^--lora_modules_to_save ln_f: .*made with .not given."),
        (None, "holds results of another kind of run .* than the resumed one .a full model, with privacy"),
    ],
)
def test_another_adapter_is_refused_by_name(folders, options, words):
    model = tiny_gpt2() if options is None else lora(**options)
    with pytest.raises(UserError, match=words):
        make_trainer(folders[1], model, **{**STEPS, "max_steps": 4}, resume_from_checkpoint=True)


def test_an_adapter_instead_of_a_full_model_is_refused_by_name(folders):
    with pytest.raises(UserError, match="--enable_lora"):
        make_trainer(folders[0], lora(), **STEPS, resume_from_checkpoint=True)


def test_other_parameters_are_refused(folders):
    model = lora()
    next(p for p in model.parameters() if p.requires_grad).requires_grad = False
    with pytest.raises(UserError, match="other parameters are trained"):
        make_trainer(folders[1], model, **STEPS, resume_from_checkpoint=True)


class Watch(TrainerCallback):
    follows = "steps"

    def on_train_begin(self, args, state, control, **kwargs):
        self.steps = (state.save_steps, state.logging_steps, state.eval_steps)


@pytest.mark.integration
def test_what_may_change_takes_effect(tmp_path):
    make_trainer(tmp_path, **STEPS).train()
    options = {"save_strategy": "steps", "save_steps": 3, "logging_steps": 5, "max_steps": 6, "per_device_train_batch_size": 2}
    privacy = {"noise_multiplier": 2.0, "per_sample_max_grad_norm": 0.25, "samples_per_author": 2, "target_delta": 0.01}
    other = make_trainer(tmp_path, privacy=privacy, resume_from_checkpoint=True, **options)
    other.add_callback(watch := Watch())
    other.train()
    header = other.budget.ledger.runs[-1]
    wanted = ("noise_multiplier", "clip_norm", "samples_per_author", "delta", "expected_batch_size", "sample_rate")
    assert tuple(header[name] for name in wanted) == (2.0, 0.25, 2, 0.01, 2, 2 / 6)
    assert watch.steps[:2] == (3, 5)
    assert other.state.epoch == 6 / 3  # 3 steps of q = 2 / 6 are an epoch; counted from the first run's beginning
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == [f"checkpoint-{n}" for n in (1, 2, 3, 6)]


def test_other_authors_are_taken_where_they_are_allowed(folders, tmp_path):
    make_trainer(tmp_path, **STEPS).train()
    other = make_trainer(
        tmp_path, privacy={"allow_other_authors": True}, dataset=make_dataset([1, 2, 3, 1, 1, 5], seed=1), seed=7,
        **{**STEPS, "max_steps": 3}, resume_from_checkpoint=True,
    )  # fmt: skip
    assert other.checkpoint.name == "checkpoint-2"


@pytest.mark.integration
def test_the_newest_checkpoint_is_that_of_the_last_branch(tmp_path):
    make_trainer(tmp_path, **{**STEPS, "max_steps": 4}).train()
    back = make_trainer(
        tmp_path, resume_from_checkpoint=str(tmp_path / "checkpoint-1"), max_steps=3, save_strategy="no",
    )  # fmt: skip
    back.train()
    assert latest_complete_checkpoint(tmp_path).name == "checkpoint-1"  # where the branch began, as nothing of it was saved
    make_trainer(tmp_path, **{**STEPS, "max_steps": 3}, resume_from_checkpoint=True).train()
    assert latest_complete_checkpoint(tmp_path).name == "checkpoint-3"
    again = make_trainer(tmp_path, **{**STEPS, "max_steps": 3}, resume_from_checkpoint=True)
    again.train()
    again.save_model()
    kept, abandoned = tmp_path / "checkpoint-3", tmp_path / "checkpoint-4"
    assert read_report(tmp_path)["weights"] == read_report(kept)["weights"] != read_report(abandoned)["weights"]
    last = make_trainer(tmp_path, **{**STEPS, "max_steps": 5}, save_total_limit=2, resume_from_checkpoint=True)
    last.train()
    assert [path.name for path in checkpoints_by_age(tmp_path)] == ["checkpoint-4", "checkpoint-5"]
    assert last.state.global_step == 5 and last.budget.ledger.steps == 4 + 2 + 2 + 2


def test_checkpoints_of_an_older_version_resume(tmp_path):
    make_trainer(tmp_path, **{**STEPS, "max_steps": 3}).train()
    for path in tmp_path.glob(f"*/{COMPLETE_MARKER}"):
        marker = json.loads(path.read_text())
        path.write_text(json.dumps({name: marker[name] for name in ("files", "sha256")}))
    trainer = make_trainer(tmp_path, **{**STEPS, "max_steps": 4}, learning_rate=0.5, resume_from_checkpoint=True)
    assert trainer.checkpoint.name == "checkpoint-3"


def test_a_finished_run_loads_its_best_checkpoint_again(tmp_path):
    """Not its last one, which would replace the model that was saved."""
    options = {**STEPS, "max_steps": 3, "load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 1}
    held_out = make_dataset([1, 1], seed=5)
    held_out.hashes = ~held_out.hashes  # of no training authors
    first = make_trainer(tmp_path, eval_dataset=held_out, learning_rate=50.0, **options)
    first.train()
    first.save_model()
    weights = read_report(tmp_path)["weights"]
    again = make_trainer(tmp_path, eval_dataset=held_out, learning_rate=50.0, **options, resume_from_checkpoint=True)
    again.train()
    again.save_model()
    assert read_report(tmp_path)["weights"] == weights


def test_what_may_change_are_options_that_exist():
    """A name that is no option any more would let another option through one day."""
    groups = runpy.run_path(str(ROOT / "fine-tune-dp.py"), run_name="options")["GROUPS"]
    known = {field.name for group in groups for field in dataclasses.fields(group)}
    assert not MAY_CHANGE - known and not CHOICE_OF_AUTHORS - known and not CHOICE_OF_AUTHORS & MAY_CHANGE
    compared = {"learning_rate", "optim", "weight_decay", "seed", "max_grad_norm", "lora_dim", "sequence_len", "audit_canaries"}
    assert compared <= known - MAY_CHANGE


def test_no_token_is_kept(tmp_path):
    make_trainer(tmp_path, **{**STEPS, "max_steps": 1}, hub_token="hf_secret").train()
    assert "hf_secret" not in (tmp_path / "checkpoint-1" / COMPLETE_MARKER).read_text()
    check_same_options(tmp_path / "checkpoint-1", {"hub_token": "another", "learning_rate": 1.0})


@pytest.mark.integration
def test_the_program_refuses_other_options_before_it_loads_anything(checkpoint, comments, tmp_path, monkeypatch, capfd):
    arguments = small(checkpoint, comments, tmp_path / "out", *PRIVACY, "--enable_lora", "--save_steps", "1", "--max_steps", "1")
    assert run_here(monkeypatch, capfd, *arguments)[0] == 0
    monkeypatch.setattr("author_dp.models.loading.load_base", None)
    resume = ["--resume_from_checkpoint", "True", "--max_steps", "2"]
    for option, value in (("--lora_dim", "3"), ("--sequence_len", "16"), ("--audit_canaries", "20"), ("--eval_fraction", "0.2")):
        status, stderr = run_here(monkeypatch, capfd, *arguments, *resume, option, value)
        assert status == 2 and f"error: {option} {value}: " in stderr, stderr
