"""weights.py: privacy.json is about the weights beside it, whatever is put there, swapped, or interrupted."""

import json
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, make_dataset, make_trainer, read_report, resumable, sample, tiny_gpt2
from mutation import catches
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from author_dp.accounting import privacy_report
from author_dp.accounting.ledger_report import main
from author_dp.data import hub
from author_dp.errors import UserError
from author_dp.files import write_json
from author_dp.models.weights import (
    COMPLETE_MARKER,
    check_base,
    check_weights,
    describe_base,
    hash_weights,
    weight_files,
    write_certified,
)
from author_dp.outputs import generate, report
from author_dp.outputs import privacy_statement as sidecar
from author_dp.training.checkpointing import latest_complete, remove_checkpoint
from dp_utils import DPTrainer

PLAIN = {"disable_dp": True, "noise_multiplier": None}
STEPS = {"max_steps": 2, "save_strategy": "steps", "save_steps": 2}


def is_certified(folder: Path) -> bool:
    """Whether the folder has a privacy.json; fail where it is not about the weights there."""
    if not (folder / "privacy.json").exists():
        return False
    try:
        check_weights(folder, read_report(folder))
    except UserError as error:
        pytest.fail(f"a certificate of other weights: {error}")
    return True


def make_model(folder: Path, lora: bool = False, seed: int = 0):
    """A model that was loaded from a base folder, as the script does."""
    if not (folder / "base").exists():
        tiny_gpt2(seed=7).save_pretrained(folder / "base")
    model = AutoModelForCausalLM.from_pretrained(folder / "base")
    if lora:
        adapter = LoraConfig(task_type="CAUSAL_LM", r=2, fan_in_fan_out=True, target_modules=["c_attn"], init_lora_weights=False)
        torch.manual_seed(seed)
        return get_peft_model(model, adapter)
    return model


def run(folder: Path, lora: bool = False, privacy: dict | None = None, **options) -> DPTrainer:
    """Train in folder/out, from folder/base, and save the model."""
    trainer = make_trainer(folder / "out", make_model(folder, lora), privacy=privacy, **{**STEPS, **options})
    trainer.train()
    trainer.save_model()
    AutoTokenizer.from_pretrained(ROOT / "demo" / "model").save_pretrained(folder / "out")
    return trainer


def all_that_read(folder: Path) -> list:
    """Each reader of the guarantee of folder/out."""
    out = folder / "out"
    options = ["--out", str(folder / "s.jsonl"), "--number", "1", "--max_new_tokens", "2", "--use_cpu"]
    return [
        lambda: sidecar.read_guarantee(out),
        lambda: generate.main([str(out), *options]),
        lambda: report.main([str(out)]),
        lambda: make_trainer(
            out, make_model(folder, (out / "adapter_config.json").exists()), resume_from_checkpoint=True, max_steps=3
        ).train(),
    ]


def refused_by_all(folder: Path, words: str) -> None:
    for reader in all_that_read(folder):
        with pytest.raises(UserError, match=words):
            reader()
            pytest.fail("nobody noticed")


# --- other weights ----------------------------------------------------------------------------------------


@catches("hashes of another folder", "models.weights.write_certified", "hash_weights(folder)", "hash_weights(folder.parent)",
    lora=False)  # fmt: skip
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_a_run_certifies_its_own_weights_and_those_of_its_checkpoints(tmp_path, lora):
    run(tmp_path, lora)
    for folder in (tmp_path / "out", tmp_path / "out" / "checkpoint-2"):
        assert is_certified(folder)
        names = {"adapter_model.safetensors", "adapter_config.json"} if lora else {"model.safetensors", "config.json"}
        assert read_report(folder)["weights"].keys() == names and read_report(folder)["weights"] == hash_weights(folder)
    if lora:
        base = read_report(tmp_path / "out")["adapter_base"]
        assert base == {"name": "base", "files": hash_weights(tmp_path / "base")}
        assert base["files"].keys() == {"model.safetensors", "config.json"}
    guarantee = sidecar.read_guarantee(tmp_path / "out")
    assert guarantee["weights"] == hash_weights(tmp_path / "out") and "base_model" not in guarantee


def spoil(folder: Path, how: str) -> str:
    """Change the weights of a certified folder, and return the words that name it."""
    out, other = folder / "out", folder / "other"
    if how == "swapped":
        tiny_gpt2(seed=1).save_pretrained(out)
        return r"out/(model\.safetensors|config\.json): its SHA-256"
    if how == "one byte":
        content = bytearray((out / "model.safetensors").read_bytes())
        content[-1] ^= 1
        (out / "model.safetensors").write_bytes(content)
        return r"out/model\.safetensors: its SHA-256"
    if how == "configuration":
        write_json(out / "config.json", {**json.loads((out / "config.json").read_text()), "activation_function": "relu"})
        return r"out/config\.json: its SHA-256"
    if how == "missing":
        (out / "model.safetensors").unlink()
        return r"model\.safetensors is missing"
    if how == "adapter beside":
        make_model(folder, lora=True).save_pretrained(out)
        return "adapter_config.json, adapter_model.safetensors"
    if how == "adapter in a subfolder":
        make_model(folder, lora=True).save_pretrained(out / "other")
        return "other/adapter_config.json, other/adapter_model.safetensors"
    if how == "sharded":
        tiny_gpt2(seed=1).save_pretrained(other, max_shard_size="20KB")
        for path in other.glob("model*"):
            shutil.copy(path, out)
        return r"model-00001-of-.*model\.safetensors\.index\.json"
    if how == "another format":
        torch.save(tiny_gpt2(seed=1).state_dict(), out / "pytorch_model.bin")
        return r"pytorch_model\.bin"
    assert how == "no key"
    write_json(out / "privacy.json", {name: value for name, value in read_report(out).items() if name != "weights"})
    return "it names no weights"


SPOILED = ["swapped", "one byte", "configuration", "missing", "adapter beside", "adapter in a subfolder", "sharded",
           "another format", "no key"]  # fmt: skip


@catches("a weight file beside the weights", "models.weights.check_weights", "if extra := sorted(found - named.keys()):",
    "if extra := []:", how="adapter beside")  # fmt: skip
@catches("other weights of the same name", "models.weights.check_weights", "sha256_of(folder / name) != named[name]", "False",
    how="one byte")  # fmt: skip
@catches("a report that names no weights", "models.weights.check_weights", "    if not isinstance",
    "    if named is None:\n        return\n    if not isinstance", how="no key")  # fmt: skip
@catches("a configuration that is not hashed", "models.weights.is_weight_file", "name in CONFIGS or", "", how="configuration")
@catches("text written by other weights", "outputs.privacy_statement.read_guarantee", "check_weights(folder, report)", "pass",
    how="one byte")  # fmt: skip
@catches("a page on other weights", "outputs.report.main", "check_weights(folder, report)", "pass", how="one byte")
@pytest.mark.parametrize("how", sample(SPOILED))
def test_other_weights_are_refused_by_all_that_read_a_guarantee(tmp_path, how):
    run(tmp_path)
    spoiled = spoil(tmp_path, how)
    *readers, resume = all_that_read(tmp_path)
    for reader in readers:
        with pytest.raises(UserError, match=spoiled):
            reader()
            pytest.fail("not noticed")
    with pytest.raises(UserError, match=f"{spoiled}|another kind of run"):
        resume()
        pytest.fail("not noticed")


@catches("another base under the adapter", "models.weights.check_weights", "check_base(folder, report)", "pass", how="base")
@pytest.mark.parametrize("how", sample(["base", "adapter's configuration", "base's configuration", "base's format", "adapter"]))
def test_another_adapter_or_base_is_refused(tmp_path, how):
    run(tmp_path, lora=True)
    out, base = tmp_path / "out", tmp_path / "base"
    if how == "adapter":
        make_model(tmp_path, lora=True, seed=5).save_pretrained(tmp_path / "other")
        shutil.copy(tmp_path / "other" / "adapter_model.safetensors", out)
    elif how == "base":
        tiny_gpt2(seed=8).save_pretrained(base)
    elif how == "base's format":
        (base / "pytorch_model.bin").write_bytes(b"other weights")
    else:
        path = out / "adapter_config.json" if how.startswith("adapter") else base / "config.json"
        write_json(path, {**json.loads(path.read_text()), "lora_alpha": 800, "activation_function": "relu"})
    refused_by_all(
        tmp_path, "adapter's base|the base model is not the one" if how.startswith("base") else r"out/adapter_\S*: its SHA-256"
    )


@catches("a local folder for a base of the hub", "models.weights.check_base", "if files is None:",
    "if files is None:\n        return\n    if False:")  # fmt: skip
def test_a_folder_that_is_named_like_a_base_of_the_hub_is_not_that_base(tmp_path):
    run(tmp_path, lora=True)
    write_json(
        tmp_path / "out" / "privacy.json", {**read_report(tmp_path / "out"), "adapter_base": {"name": "base", "revision": "1a"}}
    )
    with pytest.raises(UserError, match="on the hub, but"):
        sidecar.read_guarantee(tmp_path / "out")
        pytest.fail("not noticed")


def test_a_base_of_the_hub_is_loaded_at_its_commit(tmp_path, monkeypatch):
    run(tmp_path, lora=True)
    guarantee = {**sidecar.read_guarantee(tmp_path / "out"), "adapter_base": {"name": "gpt2", "revision": "1a2b"}}
    monkeypatch.setattr(sidecar, "read_guarantee", lambda folder: guarantee)
    asked = []
    monkeypatch.setattr(generate, "load_base", lambda name, **options: asked.append(options) or make_model(tmp_path))
    with pytest.raises(UserError):  # of which tokenizer and model do not fit
        generate.main([str(tmp_path / "out"), "--out", str(tmp_path / "s.jsonl"), "--number", "1", "--max_new_tokens", "99"])
    assert asked[0]["revision"] == "1a2b"


def test_an_adapter_and_a_full_model_in_one_folder_are_ambiguous_without_a_certificate_too(tmp_path):
    make_model(tmp_path, lora=True).save_pretrained(tmp_path / "out")
    make_model(tmp_path).save_pretrained(tmp_path / "out")
    with pytest.raises(UserError, match=r"FOLDER .* both an adapter .* and a full model \(model\.safetensors\)"):
        generate.load_model(str(tmp_path / "out"))


def test_without_a_privacy_json_a_model_writes_uncertified(tmp_path):
    assert sidecar.read_guarantee(tmp_path) is None
    run(tmp_path, privacy=PLAIN)
    assert not sidecar.make_statement(sidecar.read_guarantee(tmp_path / "out"), "none")["covered"]


@catches("a sidecar that names no weights", "outputs.privacy_statement.check_statement", 'statement.get("covered") and',
    "False and")  # fmt: skip
def test_a_text_whose_sidecar_names_no_weights_is_not_covered(tmp_path):
    path = tmp_path / "s.jsonl"
    path.write_text("{}\n")
    said = {"sha256": sidecar.sha256_of(path), "covered": True, "model": {"epsilon": 2.0}}
    write_json(sidecar.statement_path(path), said)
    with pytest.raises(UserError, match="without the hashes of the weights"):
        sidecar.check_statement(path)
    write_json(sidecar.statement_path(path), {**said, "model": {"weights": {"model.safetensors": "1a"}}})
    assert sidecar.check_statement(path)["covered"]


@catches("shards of before write_certified with the weights", "models.weights.write_certified", "path.unlink()", "pass")
def test_sharded_weights_are_certified_and_replaced_by_others(tmp_path):
    model = tiny_gpt2()
    with write_certified(tmp_path, adapter=False, make_report=dict):
        model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert is_certified(tmp_path) and len(weight_files(tmp_path)) > 3
    with write_certified(tmp_path, adapter=False, make_report=dict):
        model.save_pretrained(tmp_path)
    assert {path.name for path in weight_files(tmp_path)} == {"config.json", "model.safetensors"} and is_certified(tmp_path)


@catches("weights of another run write_certified with ours", "models.weights.write_certified",
    "if not pattern.fullmatch(Path(name).name)]", "if False]")  # fmt: skip
def test_what_somebody_puts_there_during_the_run_is_not_certified(tmp_path):
    trainer = resumable(tmp_path, max_steps=2)
    trainer.train()
    (tmp_path / "pytorch_model.bin").write_bytes(b"other weights")
    with pytest.raises(UserError, match=r"it holds pytorch_model\.bin besides the weights"):
        trainer.save_model()
    assert not (tmp_path / "privacy.json").exists()


@catches("the best checkpoint of another run", "training.saving.CertifiedTrainer._load_best_model", "not self.plan.disable_dp",
    "False")  # fmt: skip
def test_the_best_checkpoint_is_one_of_this_run(tmp_path):
    """trainer_state.json says where it lies; a folder that was copied names the old one."""
    run(tmp_path, privacy=PLAIN)
    trainer = resumable(tmp_path / "run", max_steps=2)
    trainer.train()
    trainer.state.best_model_checkpoint = str(tmp_path / "out" / "checkpoint-2")
    with pytest.raises(UserError, match="its privacy cost is not in"):
        trainer._load_best_model()
    trainer.state.best_model_checkpoint = str(tmp_path / "run" / "checkpoint-2")
    trainer._load_best_model()


# --- folders of another run -------------------------------------------------------------------------------


@catches("a private run among results without privacy", "training.checkpointing.check_unused", "if results:", "if False:",
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


@catches("results of another kind beside those resumed", "training.checkpointing.check_own_results", "    if foreign:",
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
    from programs import run_here

    (tmp_path / "adapter_model.bin").write_bytes(b"other weights")
    options = ["--model_name", "/nowhere", "--train_file", "/nowhere.jsonl", "--output_dir", str(tmp_path)]
    status, stderr = run_here(monkeypatch, capfd, *options, "--target_epsilon", "8", "--per_sample_max_grad_norm", "1")
    assert status == 2 and "adapter_model.bin" in stderr and "another --output_dir" in stderr, stderr


@catches("an adapter resumed on another base", "training.run_report.RunReport.identify_base",
    "check_same_base(self.adapter_base, ", "print(self.adapter_base, ")  # fmt: skip
def test_an_adapter_is_not_resumed_on_another_base(tmp_path):
    run(tmp_path, lora=True)
    tiny_gpt2(seed=8).save_pretrained(tmp_path / "b" / "base")
    trainer = make_trainer(tmp_path / "out", make_model(tmp_path / "b", lora=True), resume_from_checkpoint=True, max_steps=3)
    with pytest.raises(UserError, match="--model_name: the base model is not the one"):
        trainer.train()
        pytest.fail("resumed")


@catches("other weights resumed", "training.checkpointing.check_ledger_covers",
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


@catches("moments of another run resumed", "training.checkpointing.check_ledger_covers",
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


@catches("an optimizer's state without a hash", "training.checkpointing.check_ledger_covers",
    "[OPTIMIZER_NAME] if (checkpoint / OPTIMIZER_NAME).exists() else []", "[]")  # fmt: skip
def test_an_optimizers_state_without_a_hash_is_not_resumed(tmp_path):
    make_trainer(tmp_path, **STEPS).train()
    seal = tmp_path / "checkpoint-2" / COMPLETE_MARKER
    for other in ({"sha256": {}}, {"sha256": None}):
        write_json(seal, {**json.loads(seal.read_text()), **other})
        with pytest.raises(UserError, match=r"checkpoint-2/optimizer\.pt: its SHA-256"):
            make_trainer(tmp_path, resume_from_checkpoint=True, **STEPS)
            pytest.fail("resumed")


def test_an_adapter_is_resumed_on_its_base_wherever_that_lies_now(tmp_path):
    run(tmp_path, lora=True)
    (tmp_path / "b").mkdir()
    (tmp_path / "base").rename(tmp_path / "b" / "base")
    trainer = make_trainer(tmp_path / "out", make_model(tmp_path / "b", lora=True), resume_from_checkpoint=True, max_steps=3)
    trainer.train()
    trainer.save_model()
    assert is_certified(tmp_path / "out")


# --- where training started -------------------------------------------------------------------------------


@catches("a starting model without privacy not named", "training.run_report.RunReport.to_dict",
    '"base_model": self.base_model', '"base_model": None')  # fmt: skip
@catches("text of a model that started from one without privacy is covered", "outputs.privacy_statement.not_covered_reason",
    "if not base_is_covered(guarantee):", "if False:")  # fmt: skip
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
        said = sidecar.make_statement(sidecar.read_guarantee(folder / "second"), "none")
        assert said["covered"] == named["covered"] and "out has" in said["statement"]
        report.main([str(folder / "second")])
        page = (folder / "second" / "report.html").read_text()
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
        third = sidecar.starting_model(str(folder / "second"))
        assert third["covered"] == named["covered"] and "out" in json.dumps(third)


def test_a_starting_model_that_its_certificate_does_not_fit_has_none(tmp_path):
    assert sidecar.starting_model("gpt2") is sidecar.starting_model("") is sidecar.starting_model(str(tmp_path)) is None
    run(tmp_path)
    spoil(tmp_path, "one byte")
    assert "does not certify" in sidecar.starting_model(str(tmp_path / "out"))["reason"]
    (tmp_path / "out" / "privacy.json").unlink()
    assert not sidecar.starting_model(str(tmp_path / "out"))["covered"]  # what was interrupted
    shutil.copytree(tmp_path / "out" / "checkpoint-2", tmp_path / "copy")
    assert sidecar.starting_model(str(tmp_path / "copy"))["covered"]  # with its own certificate


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
    named = sidecar.starting_model("somebody/model")
    assert named["name"] == "somebody/model" and not named["covered"] and "--disable_dp" in named["reason"]
    assert sidecar.starting_model("somebody/other") is None


def test_the_base_of_an_adapter_from_elsewhere_is_named_too(tmp_path):
    run(tmp_path, privacy=PLAIN)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=["c_attn"])).save_pretrained(tmp_path / "adapter")
    assert sidecar.starting_model(str(tmp_path / "adapter"))["name"] == "out"


# --- interruptions ----------------------------------------------------------------------------------------


class Interrupt:
    """Stop the process, or raise, when it opens, renames or removes its n-th file of a folder."""

    def __init__(self):
        self.folder, self.left, self.act = "", 0, lambda: None
        sys.addaudithook(self.hook)

    def hook(self, event: str, arguments: tuple) -> None:
        if not self.folder or event not in ("open", "os.remove", "os.rename", "os.mkdir", "os.rmdir"):
            return
        changes = event != "open" or (arguments[1] or "r") != "r" or arguments[2] & (os.O_WRONLY | os.O_RDWR)
        by_descriptor = event in ("os.remove", "os.rmdir") and arguments[1] != -1  # shutil.rmtree gives names in a folder
        if not changes or not (by_descriptor or str(arguments[0]).startswith(self.folder)):
            return
        self.left -= 1
        if self.left == 0:
            self.act()

    def arm(self, folder: Path, number: int, act) -> None:
        self.folder, self.left, self.act = str(folder), number, act


INTERRUPT = Interrupt()


def fail(error: BaseException):
    def act():
        raise error

    return act


def in_a_child(work) -> int:
    """Run `work` in a forked process; return the signal that ended it, 0 where it went through."""
    if (child := os.fork()) == 0:
        try:
            work()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


ENDS = {"killed": None, "Ctrl-C": KeyboardInterrupt(), "disk full": OSError(28, "No space left on device")}


@catches("privacy.json written before the weights", "models.weights.write_certified", "    yield\n",
    "    write_json(folder / REPORT_NAME, {**make_report(), 'weights': hash_weights(folder)})\n    yield\n", how="Ctrl-C",
    what="model")  # fmt: skip
@catches("privacy.json of before left while weights are written", "models.weights.write_certified", "remove_report(folder)",
    "pass", how="killed", what="model")  # fmt: skip
@pytest.mark.parametrize(("how", "what"), sample([(how, what) for what in ("model", "checkpoint") for how in ENDS]))
def test_wherever_a_save_is_cut_nothing_false_is_certified(tmp_path, how, what):
    """Into a folder with certified weights of before: those of an earlier end, or of a lost step of the same number."""
    out, kept = tmp_path / "out", tmp_path / "kept"
    trainer = resumable(out, max_steps=2)
    trainer.train()
    trainer.save_model()
    place = out if what == "model" else out / "checkpoint-2"
    shutil.copytree(out, kept)
    save = trainer.save_model if what == "model" else lambda: trainer._save_checkpoint(trainer.model, None)
    outcomes, number = set(), 0
    while True:
        number += 1
        shutil.rmtree(out)
        shutil.copytree(kept, out)
        with torch.no_grad():
            trainer.model.transformer.wte.weight.add_(0.01)
        act = (lambda: os.kill(os.getpid(), signal.SIGKILL)) if ENDS[how] is None else fail(ENDS[how])
        INTERRUPT.arm(out, number, act)
        try:
            if ENDS[how] is None:
                ended = in_a_child(save) == 0
            else:
                save()
                ended = True
        except (KeyboardInterrupt, OSError, UserError):
            ended = False
        left, INTERRUPT.folder = INTERRUPT.left, ""
        outcomes.add((is_certified(place), (place / "model.safetensors").exists()))
        is_certified(out)
        assert latest_complete(out) is not None or what == "checkpoint"
        resumable(out, max_steps=2, resume_from_checkpoint=True)  # nothing of it is in the way of going on
        if ended and (ENDS[how] is None or left > 0):
            break
    assert number > 5 and is_certified(place)
    assert outcomes == {(True, True), (False, True), (False, False)}


@catches("the folder's privacy.json written with each checkpoint", "training.saving.CertifiedTrainer._save",
    "with write_certified(", "with write_certified(self.folder, adapter, self.privacy_report), write_certified(")  # fmt: skip
def test_an_interrupted_run_has_certified_checkpoints_and_none_of_its_own(tmp_path):
    resumable(tmp_path, max_steps=4).train()
    assert not (tmp_path / "privacy.json").exists() and all(is_certified(tmp_path / f"checkpoint-{n}") for n in (2, 4))
    main([str(tmp_path)])
    report.main([str(tmp_path)])
    page = (tmp_path / "report.html").read_text()
    assert "nothing yet" in page and "<td>4</td>" in page and "covered by the guarantee" not in page
    assert sidecar.read_guarantee(tmp_path) is None


def test_a_report_of_the_ledger_tells_what_it_spent(tmp_path):
    trainer = resumable(tmp_path, max_steps=4)
    trainer.train()
    found = privacy_report.recompute_report(tmp_path / "privacy.json", trainer.budget.ledger)
    assert found["epsilon"] == pytest.approx(trainer.epsilon(), rel=3e-3) and found["interrupted"] and found["steps"] == 4
    assert found["num_authors"] == 60 and "weights" not in found


@catches("a ledger rolled back behind its checkpoints", "accounting.ledger_report.main", "in find_reports(folder)", "in []")
def test_checkpoints_know_of_records_that_a_ledger_has_lost(tmp_path):
    resumable(tmp_path, max_steps=4).train()
    path = tmp_path / "privacy_ledger.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    for program in (main, report.main):
        with pytest.raises(UserError, match=r"lacks records that \S*checkpoint-4/privacy.json"):
            program([str(tmp_path)])
            pytest.fail("not noticed")
    with pytest.raises(UserError, match="lacks records"):
        resumable(tmp_path, resume_from_checkpoint=True)
        pytest.fail("not noticed")
    with pytest.raises(UserError, match="lacks records"):
        resumable(tmp_path, resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
        pytest.fail("not noticed")


def test_a_run_without_a_whole_checkpoint_starts_anew_and_certifies_its_own_end(tmp_path):
    options = {"dataset": make_dataset([1] * 60), "max_steps": 2}
    first = make_trainer(tmp_path, **options)
    first.train()
    first.save_model()
    before = hash_weights(tmp_path)
    again = make_trainer(tmp_path, resume_from_checkpoint=True, **options)
    again.train()
    assert hash_weights(tmp_path) == before and is_certified(tmp_path)  # those of the first end, until there are others
    again.save_model()
    assert hash_weights(tmp_path) != before and is_certified(tmp_path) and read_report(tmp_path)["steps"] == 4


def test_a_model_in_memory_has_an_adapter_without_a_base(tmp_path):
    trainer = make_trainer(tmp_path, tiny_gpt2(lora=True))
    trainer.save_model()
    assert is_certified(tmp_path) and read_report(tmp_path)["adapter_base"]["name"] is None
    assert isinstance(trainer.model, PeftModel)


# --- what lies in subfolders, and what has no guarantee ---------------------------------------------------------


@catches("an adapter in a folder named like a checkpoint", "models.weights.weight_files",
    "in_checkpoint or not is_checkpoint(path.parent)", 'not path.parent.name.startswith("checkpoint-")',
    place="checkpoint-x")  # fmt: skip
@catches("an adapter in a checkpoint's checkpoint", "models.weights.weight_files", "in_checkpoint or not", "not",
    place="checkpoint-2/checkpoint-3")  # fmt: skip
@pytest.mark.parametrize("place", ["checkpoint-x", "checkpoint-2/checkpoint-x", "checkpoint-2/checkpoint-3"])
def test_an_adapter_in_a_subfolder_that_is_no_checkpoint_is_found(tmp_path, place):
    run(tmp_path, lora=True)
    out = tmp_path / "out"
    shutil.copytree(out / "checkpoint-2", tmp_path / "copy")  # a copy of another name is one too, by its seal
    make_model(tmp_path, lora=True, seed=5).save_pretrained(out / place)
    with pytest.raises(UserError, match=r"checkpoint-[x3]/adapter_config\.json"):
        check_weights((out / place).parent, read_report((out / place).parent))
        pytest.fail("not noticed")
    if place.startswith("checkpoint-2/"):
        with pytest.raises(UserError, match=r"checkpoint-[x3]/adapter_config\.json"):
            make_trainer(out, make_model(tmp_path, lora=True), resume_from_checkpoint=True, max_steps=3)
            pytest.fail("resumed")
    make_model(tmp_path, lora=True, seed=5).save_pretrained(tmp_path / "copy" / "checkpoint-3")
    assert "checkpoint-3/adapter_model.safetensors" in hash_weights(tmp_path / "copy")


def test_an_output_folder_is_not_called_like_a_checkpoint(tmp_path):
    with pytest.raises(UserError, match=r"--output_dir .*checkpoint-3: this is the name of a checkpoint"):
        make_trainer(tmp_path / "checkpoint-3")


@catches("weights without privacy that pass for a base model", "models.weights.write_certified", "if disable_dp:", "if False:",
    what="model")  # fmt: skip
@pytest.mark.parametrize("what", ["model", "checkpoint", "rotation"])
def test_wherever_a_run_without_privacy_is_killed_its_weights_are_not_a_base_model(tmp_path, what):
    out, kept = tmp_path / "out", tmp_path / "kept"
    trainer = make_trainer(out, privacy=PLAIN, **STEPS)
    trainer.train()
    place = out if what == "model" else out / "checkpoint-2"
    shutil.copytree(out, kept)
    save = {
        "model": trainer.save_model,
        "checkpoint": lambda: trainer._save_checkpoint(trainer.model, None),
        "rotation": lambda: remove_checkpoint(place),
    }[what]
    for number in range(1, 100):
        shutil.rmtree(out)
        shutil.copytree(kept, out)
        INTERRUPT.arm(out, number, lambda: os.kill(os.getpid(), signal.SIGKILL))
        ended = in_a_child(save) == 0
        INTERRUPT.folder = ""
        if weight_files(place) and (place / "model.safetensors").exists():
            assert (place / "privacy.json").exists() and not sidecar.starting_model(str(place))["covered"]
        if ended:
            break
    assert number > 3


@catches("a file beside the adapter's base", "models.weights.check_base", "files.keys() | present.keys()", "files")
def test_a_file_beside_the_base_of_before_is_another_base(tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "adapter").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}")
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(tmp_path / "base")}))
    report = {"adapter_base": describe_base(str(tmp_path / "base"))}
    check_base(tmp_path / "adapter", report)
    (tmp_path / "base" / "pytorch_model.bin").write_bytes(b"other weights")
    with pytest.raises(UserError, match=r"base/pytorch_model\.bin is not what"):
        check_base(tmp_path / "adapter", report)
        pytest.fail("not noticed")
