"""training_marks.py: no training is left out of an epsilon because a model object, a folder or an adapter does not tell of it."""

import json
import shutil

import pytest
import torch
from conftest import ROOT, make_dataset, make_trainer, tiny_gpt2
from mutation import catches
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, GPT2LMHeadModel, GPT2TokenizerFast

from author_dp.accounting.ledger import PrivacyLedger
from author_dp.accounting.voiding import void_guarantee
from author_dp.errors import MechanismError, UserError
from author_dp.outputs.merge import merge
from author_dp.outputs.privacy_statement import read_privacy_statement
from author_dp.outputs.publish import publish
from data_utils import collate
from dp_utils import DPTrainer, PrivacyArguments

pytestmark = pytest.mark.integration  # whole runs
PRIVATE = {"noise_multiplier": None, "target_epsilon": 2.0}


def train(folder, model, **options) -> DPTrainer:
    trainer = make_trainer(folder, model, make_dataset([1] * 60), **{"privacy": PRIVATE, "max_steps": 2, **options})
    trainer.train()
    return trainer


def report(folder) -> dict:
    return json.loads((folder / "privacy.json").read_text())


@catches("a model object that was trained before", "models.training_marks.check_origin_is_known",
    "trained_under is not None and trained_under not in", "False and trained_under not in")  # fmt: skip
@pytest.mark.parametrize("first", [{}, {"privacy": {"noise_multiplier": None, "disable_dp": True}}])
def test_a_model_object_starts_one_run(tmp_path, first):
    """As in a notebook: one cell trains, or fails, and another one begins with the same object in a new folder."""
    model, first = tiny_gpt2(), first or {"privacy": {}}
    one = train(tmp_path / "one", model, save_strategy="steps", save_steps=2, **first)
    with pytest.raises(UserError, match="another run of this process has trained it"):
        train(tmp_path / "two", model)
        pytest.fail("not noticed")
    if not first["privacy"]:
        one.train()  # the same run counts all of its steps
        assert one.budget.ledger.steps == 4
        train(tmp_path / "one", model, resume_from_checkpoint=True, max_steps=3, privacy={})
        shutil.rmtree(tmp_path / "one")  # its ledger is gone, and with it what it has counted
        with pytest.raises(UserError, match="another run of this process has trained it"):
            train(tmp_path / "one", model)


def test_a_training_that_took_no_step_leaves_the_model_as_it_was(tmp_path, monkeypatch):
    """As out of memory in the first batch: a smaller one is tried with the same object."""
    model = tiny_gpt2()
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr("dp_utils.author_losses", lambda *_: (_ for _ in ()).throw(MemoryError("as if")))
        train(tmp_path / "one", model)
    train(tmp_path / "two", model).save_model()
    assert "base_model" not in report(tmp_path / "two")


def test_models_of_one_configuration_are_two(tmp_path):
    config = tiny_gpt2().config
    for name in ("one", "two"):
        train(tmp_path / name, GPT2LMHeadModel(config)).save_model()
        assert "base_model" not in report(tmp_path / name)


def test_new_adapters_of_any_kind_are_new(tmp_path):
    kinds: list[dict] = [{"target_modules": ["c_attn", "wte"]}, {"use_dora": True}, {"init_lora_weights": "gaussian"}]
    for number, options in enumerate([*kinds, {"init_lora_weights": False}]):
        config = LoraConfig(task_type="CAUSAL_LM", r=2, fan_in_fan_out=True, **options)
        trainer = make_trainer(tmp_path / str(number), get_peft_model(tiny_gpt2(), config), make_dataset([1] * 60))
        trainer.model_name = None
        if number == len(kinds):  # begins at random
            with pytest.raises(UserError, match="or that of its base, if the adapter begins"):
                trainer.train()
            trainer.model_name = "base"
        trainer.train()


@catches("weights that changed after the training", "training.saving.CertifiedTrainer.check_weights_unchanged",
    "self.weight_sums is not None and", "False and")  # fmt: skip
def test_weights_that_change_after_the_training_are_not_certified(tmp_path):
    trainer = train(tmp_path, tiny_gpt2())
    trainer.model.requires_grad_(False)
    trainer.save_model()  # no weight has changed
    trainer.model.requires_grad_(True)
    with torch.no_grad():
        trainer.model.lm_head.weight.add_(1.0)
    with pytest.raises(UserError, match="the weights have changed since the training ended"):
        trainer.save_model()
        pytest.fail("not noticed")
    with pytest.raises(UserError, match="the weights have changed since the training ended"):
        trainer.train()


@catches("a copy by hand taken for an untouched model", "models.training_marks.has_training_mark", "is True and", "is None and")
@pytest.mark.parametrize("adapter", [False, True])
def test_a_result_saved_by_hand_has_no_known_guarantee(tmp_path, adapter):
    """By save_pretrained, or downloaded without its privacy.json; of an adapter, merged in memory."""
    model = tiny_gpt2(lora=adapter)
    train(tmp_path / "one", model)
    (model.merge_and_unload() if adapter else model).save_pretrained(tmp_path / "copy")
    second = train(tmp_path / "two", AutoModelForCausalLM.from_pretrained(tmp_path / "copy"))
    second.save_model()
    assert not report(tmp_path / "two").get("base_model", {"covered": True})["covered"], "not noticed"
    with pytest.raises(UserError, match=r"its privacy\.json is not beside it"):
        publish(tmp_path / "two", tmp_path / "published")


@pytest.mark.parametrize("privacy", [PRIVATE, {"noise_multiplier": None, "disable_dp": True}])
def test_a_merged_adapter_has_its_guarantee(tmp_path, privacy):
    base = tiny_gpt2()
    base.save_pretrained(tmp_path / "base")
    GPT2TokenizerFast.from_pretrained(ROOT / "demo" / "model").save_pretrained(tmp_path / "base")
    model = tiny_gpt2(lora=True)
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    trainer = train(tmp_path / "one", model, privacy=privacy)
    trainer.save_model()
    GPT2TokenizerFast.from_pretrained(ROOT / "demo" / "model").save_pretrained(tmp_path / "one")
    merge(tmp_path / "one", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    inputs = torch.arange(10)[None]
    trainer.model.eval()
    assert torch.allclose(merged(inputs).logits, trainer.model(inputs).logits, atol=1e-5)
    found = read_privacy_statement(tmp_path / "merged")
    assert found["epsilon"] == report(tmp_path / "one")["epsilon"] and "adapter_base" not in found
    train(tmp_path / "two", merged).save_model()
    started = report(tmp_path / "two")["base_model"]
    assert started["covered"] == (privacy is PRIVATE) and started["epsilon"] == found["epsilon"]
    if privacy is PRIVATE:
        publish(tmp_path / "merged", tmp_path / "published")
    for folder, words in ((tmp_path / "two", "holds no adapter"), (tmp_path / "merged", "holds no adapter")):
        with pytest.raises(UserError, match=words):
            merge(folder, tmp_path / "again")


def test_an_adapter_names_its_training(tmp_path):
    tiny_gpt2().save_pretrained(tmp_path / "base")
    model = tiny_gpt2(lora=True)
    model.peft_config["default"].base_model_name_or_path = model.get_base_model().name_or_path = str(tmp_path / "base")
    train(tmp_path / "one", model, privacy={"noise_multiplier": None, "disable_dp": True}).save_model()
    assert json.loads((tmp_path / "one" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(tmp_path / "base")

    def again(**names) -> DPTrainer:
        loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "one", is_trainable=True)
        example = make_trainer(tmp_path / "two", max_steps=1)  # its options
        privacy = PrivacyArguments(per_sample_max_grad_norm=1.0, target_epsilon=2.0)
        trainer = DPTrainer(loaded, example.args, privacy, train_dataset=make_dataset([1] * 60), data_collator=collate, **names)
        trainer.rehearse = lambda: None
        trainer.train()
        return trainer

    with pytest.raises(UserError, match="its adapter is not a new one, and nothing says where it was trained"):
        again()
    again(model_name=str(tmp_path / "one")).save_model()
    assert not report(tmp_path / "two")["base_model"]["covered"]


@catches("an adapter of a base that has failed", "outputs.privacy_statement.read_privacy_statement",
    'found is not None and not found["covered"]', "False")  # fmt: skip
def test_an_adapter_has_no_guarantee_where_its_base_lost_it(tmp_path):
    train(tmp_path / "base", tiny_gpt2()).save_model()
    model = tiny_gpt2(lora=True)
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    train(tmp_path / "adapter", model).save_model()
    publish(tmp_path / "adapter", tmp_path / "before")
    void_guarantee(PrivacyLedger(tmp_path / "base" / "privacy_ledger.jsonl"), "half the noise")
    with pytest.raises(UserError, match="half the noise"):
        publish(tmp_path / "adapter", tmp_path / "after")
        pytest.fail("not noticed")


@catches("a report made from a ledger of before", "training.saving.CertifiedTrainer.privacy_report",
    "self.budget.ledger.read()", "pass")  # fmt: skip
def test_a_trainer_in_memory_claims_nothing_after_a_failure_of_its_folder(tmp_path):
    trainer = train(tmp_path / "out", tiny_gpt2(), save_strategy="steps", save_steps=2)
    void_guarantee(PrivacyLedger(tmp_path / "out" / "privacy_ledger.jsonl"), "half the noise")
    trainer.save_model(str(tmp_path / "elsewhere"))
    assert report(tmp_path / "elsewhere").get("alarm") == "half the noise", "not noticed"


def test_failures_are_known_though_a_callback_hides_them(tmp_path, monkeypatch):
    """A subclass of a user that wraps what goes wrong, or an error of its own before the next test."""
    original = DPTrainer.log

    def log(self, *args, **kwargs):
        try:
            original(self, *args, **kwargs)
        except Exception as error:
            raise RuntimeError("my experiment failed") from error

    monkeypatch.setattr(DPTrainer, "log", log)
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 8}
    for place, every in (("wrapped", 1), ("before the next test", 500)):
        trainer = make_trainer(
            tmp_path / place, tiny_gpt2(), make_dataset([1] * 60), privacy=PRIVATE, logging_steps=every, **options
        )
        step = trainer.training_step

        def coarse(*args, step=step, trainer=trainer, place=place):
            if trainer.state.global_step == 3:
                torch.set_float32_matmul_precision("medium")
            if trainer.state.global_step == 4 and place != "wrapped":
                raise KeyboardInterrupt
            return step(*args)

        monkeypatch.setattr(trainer, "training_step", coarse)
        with pytest.raises((MechanismError, UserError), match=r"rounded|precision"):
            trainer.train()
        torch.set_float32_matmul_precision("highest")
        assert PrivacyLedger(tmp_path / place / "privacy_ledger.jsonl").failure
        assert report(tmp_path / place / "checkpoint-2")["epsilon"] is None
    shutil.rmtree(tmp_path)
