"""weights.py: results of other runs in the folder, and the model that training started from."""

import json
import shutil

import pytest
from conftest import make_trainer, read_report, tiny_gpt2
from mutation import catches
from peft import LoraConfig, get_peft_model
from test_weights import PLAIN, STEPS, is_certified, make_model, run, spoil
from transformers import AutoModelForCausalLM

from author_dp.data import hub
from author_dp.errors import UserError
from author_dp.files import write_json
from author_dp.models.weights import COMPLETE_MARKER
from author_dp.outputs import privacy_statement as sidecar
from author_dp.outputs import report

# --- folders of another run -------------------------------------------------------------------------------


@pytest.mark.integration
@catches("a private run among results without privacy", "training.resuming.check_no_earlier_run", "if results:", "if False:",
    lora=True, interrupted=False)  # fmt: skip
@pytest.mark.parametrize("lora", [True, False], ids=["lora then full", "full then lora"])
@pytest.mark.parametrize("interrupted", [False, True])
def test_a_private_run_does_not_begin_among_results_without_privacy(tmp_path, lora, interrupted):
    """Nor the other way round; whether they were saved or stopped after the first checkpoint."""
    first = make_trainer(tmp_path / "out", make_model(tmp_path, lora), privacy=PLAIN, **STEPS)
    first.train()
    if not interrupted:
        first.save_model()
    for privacy in (None, PLAIN):
        with pytest.raises(UserError, match=r"results of another run or other weights \(.*checkpoint-2"):
            make_trainer(tmp_path / "out", make_model(tmp_path, not lora), privacy=privacy, **STEPS)
            pytest.fail("begun")
    for kind, privacy in ((not lora, PLAIN), (lora, None)):
        with pytest.raises(UserError, match="another kind of run"):
            make_trainer(tmp_path / "out", make_model(tmp_path, kind), privacy=privacy, resume_from_checkpoint=True, **STEPS)
            pytest.fail("resumed")
    make_trainer(tmp_path / "out", make_model(tmp_path, lora), privacy=PLAIN, resume_from_checkpoint=True, max_steps=3).train()


@pytest.mark.parametrize("where", [".", "checkpoint-7", "other"])
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "adapter_model.safetensors", "m.gguf"])
def test_foreign_weights_are_refused_with_their_names(tmp_path, where, name):
    (tmp_path / where).mkdir(exist_ok=True)
    (tmp_path / where / name).write_bytes(b"other weights")
    if where == "other" and not name.startswith("adapter"):  # nothing loads them
        make_trainer(tmp_path)
        return
    with pytest.raises(UserError, match=name if where == "." else where):
        make_trainer(tmp_path)
        pytest.fail("begun")


@pytest.mark.integration
@catches("results of another kind beside those resumed", "training.resuming.check_checkpoint_kind", "    if foreign:",
    "    if False:", lora=True)  # fmt: skip
@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_a_run_goes_on_among_results_of_its_own_kind_only(tmp_path, lora):
    run(tmp_path, lora)
    make_trainer(tmp_path / "out", make_model(tmp_path, lora), resume_from_checkpoint=True, max_steps=3)
    with pytest.raises(UserError, match="another kind of run"):
        make_trainer(tmp_path / "out", make_model(tmp_path, not lora), resume_from_checkpoint=True)
        pytest.fail("resumed")
    foreign = tmp_path / "out" / "checkpoint-9"
    foreign.mkdir()
    (foreign / "model.safetensors").write_bytes(b"killed while this was written")
    (foreign / "trainer_state.json").write_text("{}")  # but no privacy.json, which ours have by then
    with pytest.raises(UserError, match=r"another kind of run .*checkpoint-9"):
        make_trainer(tmp_path / "out", make_model(tmp_path, lora), resume_from_checkpoint=True)
        pytest.fail("resumed")


def test_a_folder_is_looked_into_before_model_and_data_are_read(tmp_path, monkeypatch, capfd):
    from script_runs import run_here

    (tmp_path / "adapter_model.bin").write_bytes(b"other weights")
    options = ["--model_name", "/nowhere", "--train_file", "/nowhere.jsonl", "--output_dir", str(tmp_path)]
    status, stderr = run_here(monkeypatch, capfd, *options, "--target_epsilon", "8", "--per_sample_max_grad_norm", "1")
    assert status == 2 and "adapter_model.bin" in stderr and "another --output_dir" in stderr, stderr


@catches("an adapter resumed on another base", "training.run_report.RunReport.identify_base",
    "check_same_base_weights(self.adapter_base, ", "print(self.adapter_base, ")  # fmt: skip
def test_an_adapter_is_not_resumed_on_another_base(tmp_path):
    run(tmp_path, lora=True)
    tiny_gpt2(seed=8).save_pretrained(tmp_path / "b" / "base")
    trainer = make_trainer(tmp_path / "out", make_model(tmp_path / "b", lora=True), resume_from_checkpoint=True, max_steps=3)
    with pytest.raises(UserError, match="--model_name: the base model is not the one"):
        trainer.train()
        pytest.fail("resumed")


@catches("other weights resumed", "training.resuming.check_ledger_covers_checkpoint",
    "check_weights(checkpoint, report, base=False)", "pass")  # fmt: skip
def test_another_checkpoint_under_the_same_certificate_is_not_resumed(tmp_path):
    run(tmp_path)
    weights = tmp_path / "out" / "checkpoint-2" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(UserError, match=r"checkpoint-2/model\.safetensors: its SHA-256"):
        make_trainer(tmp_path / "out", make_model(tmp_path), resume_from_checkpoint=True)
        pytest.fail("resumed")


@catches("moments of another run resumed", "training.resuming.check_ledger_covers_checkpoint",
    "sha256_of(checkpoint / name) != known.get(name)", "False")  # fmt: skip
def test_another_optimizers_state_is_not_resumed(tmp_path):
    """Its moments may hold gradients without noise; sizes are the same."""
    options = {**STEPS, "optim": "adamw_torch"}
    make_trainer(tmp_path / "plain", privacy=PLAIN, **options).train()
    make_trainer(tmp_path / "out", **options).train()
    shutil.copy(tmp_path / "plain" / "checkpoint-2" / "optimizer.pt", tmp_path / "out" / "checkpoint-2")
    with pytest.raises(UserError, match=r"checkpoint-2/optimizer\.pt: its SHA-256"):
        make_trainer(tmp_path / "out", resume_from_checkpoint=True, **options)
        pytest.fail("resumed")


@catches("an optimizer's state without a hash", "training.resuming.check_ledger_covers_checkpoint",
    "[OPTIMIZER_NAME] if (checkpoint / OPTIMIZER_NAME).exists() else []", "[]")  # fmt: skip
def test_an_optimizers_state_without_a_hash_is_not_resumed(tmp_path):
    make_trainer(tmp_path, **STEPS).train()
    seal = tmp_path / "checkpoint-2" / COMPLETE_MARKER
    for other in ({"sha256": {}}, {"sha256": None}):
        write_json(seal, {**json.loads(seal.read_text()), **other})
        with pytest.raises(UserError, match=r"checkpoint-2/optimizer\.pt: its SHA-256"):
            make_trainer(tmp_path, resume_from_checkpoint=True, **STEPS)
            pytest.fail("resumed")


@pytest.mark.integration
def test_an_adapter_is_resumed_on_its_base_wherever_that_lies_now(tmp_path):
    run(tmp_path, lora=True)
    (tmp_path / "b").mkdir()
    (tmp_path / "base").rename(tmp_path / "b" / "base")
    trainer = make_trainer(tmp_path / "out", make_model(tmp_path / "b", lora=True), resume_from_checkpoint=True, max_steps=3)
    trainer.train()
    trainer.save_model()
    assert is_certified(tmp_path / "out")


# --- where training started -------------------------------------------------------------------------------


@pytest.mark.integration
@catches("a starting model without privacy not named", "training.run_report.RunReport.to_dict",
    '"base_model": self.base_model', '"base_model": None')  # fmt: skip
@catches("text of a model that started from one without privacy is covered", "outputs.guarantee.why_no_guarantee",
    "if not guarantee_covers_base(guarantee):", "if False:")  # fmt: skip
def test_the_model_that_training_started_from_is_named_with_its_guarantee(tmp_path):
    for name, privacy in (("private", None), ("plain", PLAIN)):
        folder = tmp_path / name
        first = run(folder, privacy=privacy)
        second = make_trainer(folder / "second", AutoModelForCausalLM.from_pretrained(folder / "out"), **STEPS)
        second.train()
        second.save_model()
        named = read_report(folder / "second").get("base_model")
        assert named is not None
        assert named["name"] == "out" and named["covered"] == (name == "private")
        said = sidecar.make_statement(sidecar.read_privacy_statement(folder / "second"), "none")
        assert said["covered"] == named["covered"] and "out has" in said["statement"]
        report.main([str(folder / "second")])
        page = (folder / "second" / "report.html").read_text()
        assert ("For an author of the starting model" in page) == ("With its training" in page) == named["covered"]
        assert "Starting model" in page and ("none: " not in page if named["covered"] else "has no guarantee" in page)
        if name == "private":
            assert named["epsilon"] == pytest.approx(first.epsilon(), rel=3e-3) and named["delta"] == first.plan.delta
        else:
            assert named["epsilon"] is None and "--disable_dp" in named["reason"]
        # Whatever --model_name is given when it is resumed, and from there on.
        again = make_trainer(folder / "second", make_model(folder), resume_from_checkpoint=True, **{**STEPS, "max_steps": 3})
        again.train()
        again.save_model()
        assert read_report(folder / "second")["base_model"] == named
        third = sidecar.statement_starting_model(str(folder / "second"))
        assert third["covered"] == named["covered"] and "out" in json.dumps(third)


def test_a_starting_model_that_its_certificate_does_not_fit_has_none(tmp_path):
    assert (
        sidecar.statement_starting_model("gpt2")
        is sidecar.statement_starting_model("")
        is sidecar.statement_starting_model(str(tmp_path))
        is None
    )
    run(tmp_path)
    spoil(tmp_path, "one byte")
    assert "does not certify" in sidecar.statement_starting_model(str(tmp_path / "out"))["reason"]
    (tmp_path / "out" / "privacy.json").unlink()
    assert not sidecar.statement_starting_model(str(tmp_path / "out"))["covered"]  # what was interrupted
    shutil.copytree(tmp_path / "out" / "checkpoint-2", tmp_path / "copy")
    assert sidecar.statement_starting_model(str(tmp_path / "copy"))["covered"]  # with its own certificate


def test_a_starting_model_of_the_hub_is_looked_at_too(tmp_path, monkeypatch):
    run(tmp_path, privacy=PLAIN)
    repository = tmp_path / "cache" / "models--somebody--model"
    shutil.copytree(tmp_path / "out", repository / "snapshots" / ("1a" * 20))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("1a" * 20)
    download = hub.hf_hub_download
    monkeypatch.setattr(
        hub, "hf_hub_download", lambda *names, **options: download(*names, cache_dir=tmp_path / "cache", **options)
    )
    named = sidecar.statement_starting_model("somebody/model")
    assert named["name"] == "somebody/model" and not named["covered"] and "--disable_dp" in named["reason"]
    assert sidecar.statement_starting_model("somebody/other") is None


def test_the_base_of_an_adapter_from_elsewhere_is_named_too(tmp_path):
    run(tmp_path, privacy=PLAIN)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=["c_attn"])).save_pretrained(tmp_path / "adapter")
    assert sidecar.statement_starting_model(str(tmp_path / "adapter"))["name"] == "out"
