"""weights.py: privacy.json is about the weights beside it, whatever is put there, swapped, or interrupted."""

import json
import shutil
from pathlib import Path

import bugs
import pytest
import torch
from conftest import ROOT, make_trainer, read_report, resumable, sample, tiny_gpt2
from mutation import catches
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from author_dp.errors import UserError
from author_dp.files import write_json
from author_dp.models.weights import check_weights, hash_weights, weight_files, write_hashed_weights
from author_dp.outputs import generate, report
from author_dp.outputs import privacy_statement as sidecar
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
        lambda: sidecar.read_privacy_statement(out),
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


@pytest.mark.integration
@catches("hashes of another folder", "models.weights.write_hashed_weights", "hash_weights(folder)",
    "hash_weights(folder.parent)",
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
    guarantee = sidecar.read_privacy_statement(tmp_path / "out")
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


@pytest.mark.integration
@catches("a weight file beside the weights", "models.weights.check_weights", "if extra := sorted(found - named.keys()):",
    "if extra := []:", how="adapter beside")  # fmt: skip
@catches("other weights of the same name", "models.weights.check_weights", "sha256_of(folder / name) != named[name]", "False",
    how="one byte")  # fmt: skip
@catches("a report that names no weights", "models.weights.check_weights", "    if not isinstance",
    "    if named is None:\n        return\n    if not isinstance", how="no key")  # fmt: skip
@catches("a configuration that is not hashed", "models.weights.is_weight_file", "name in CONFIGS or", "", how="configuration")
@catches("text written by other weights", *bugs.WEIGHTS_NOT_CHECKED, how="one byte")
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


@pytest.mark.integration
@catches(
    "another base under the adapter", "models.weights.check_weights", "check_base_weights(folder, report)", "pass", how="base"
)
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
        tmp_path,
        "adapter's base|the base model is not the one|its config.json has"
        if how.startswith("base")
        else r"out/adapter_\S*: its SHA-256",
    )


@catches("a local folder for a base of the hub", "models.weights.check_base_weights", "if files is None:",
    "if files is None:\n        return\n    if False:")  # fmt: skip
def test_a_folder_that_is_named_like_a_base_of_the_hub_is_not_that_base(tmp_path):
    run(tmp_path, lora=True)
    write_json(
        tmp_path / "out" / "privacy.json", {**read_report(tmp_path / "out"), "adapter_base": {"name": "base", "revision": "1a"}}
    )
    with pytest.raises(UserError, match="on the hub, but"):
        sidecar.read_privacy_statement(tmp_path / "out")
        pytest.fail("not noticed")


def test_a_base_of_the_hub_is_loaded_at_its_commit(tmp_path, monkeypatch):
    run(tmp_path, lora=True)
    guarantee = {**sidecar.read_privacy_statement(tmp_path / "out"), "adapter_base": {"name": "gpt2", "revision": "1a2b"}}
    monkeypatch.setattr(sidecar, "read_privacy_statement", lambda folder: guarantee)
    asked = []
    monkeypatch.setattr(generate, "load_base", lambda name, **options: asked.append(options) or make_model(tmp_path))
    with pytest.raises(UserError):  # of which tokenizer and model do not fit
        generate.main([str(tmp_path / "out"), "--out", str(tmp_path / "s.jsonl"), "--number", "1", "--max_new_tokens", "99"])
    assert asked[0]["revision"] == "1a2b"


def test_an_adapter_and_a_full_model_in_one_folder_are_ambiguous_without_a_certificate_too(tmp_path):
    make_model(tmp_path, lora=True).save_pretrained(tmp_path / "out")
    make_model(tmp_path).save_pretrained(tmp_path / "out")
    with pytest.raises(UserError, match=r"FOLDER .* both an adapter .* and a full model \(model\.safetensors\)"):
        generate.load_generating_model(str(tmp_path / "out"))


def test_without_a_privacy_json_a_model_writes_uncertified(tmp_path):
    assert sidecar.read_privacy_statement(tmp_path) is None
    run(tmp_path, privacy=PLAIN)
    assert not sidecar.make_statement(sidecar.read_privacy_statement(tmp_path / "out"), "none")["covered"]


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


@catches("shards of before certified with the weights", "models.weights.write_hashed_weights", "path.unlink()", "pass")
def test_sharded_weights_are_certified_and_replaced_by_others(tmp_path):
    model = tiny_gpt2()
    with write_hashed_weights(tmp_path, adapter=False, make_report=dict):
        model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert is_certified(tmp_path) and len(weight_files(tmp_path)) > 3
    with write_hashed_weights(tmp_path, adapter=False, make_report=dict):
        model.save_pretrained(tmp_path)
    assert {path.name for path in weight_files(tmp_path)} == {"config.json", "model.safetensors"} and is_certified(tmp_path)


@pytest.mark.integration
@catches("weights of another run certified with ours", "models.weights.write_hashed_weights",
    "if not pattern.fullmatch(Path(name).name)]", "if False]")  # fmt: skip
def test_what_somebody_puts_there_during_the_run_is_not_certified(tmp_path):
    trainer = resumable(tmp_path, max_steps=2)
    trainer.train()
    (tmp_path / "pytorch_model.bin").write_bytes(b"other weights")
    with pytest.raises(UserError, match=r"it holds pytorch_model\.bin besides the weights"):
        trainer.save_model()
    assert not (tmp_path / "privacy.json").exists()


@pytest.mark.integration
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
