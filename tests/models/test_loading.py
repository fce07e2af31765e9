"""models/loading.py: a model is what its folder holds, or the error names the file."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from author_dp.errors import UserError
from author_dp.files import to_absolute_model_path
from author_dp.models.loading import check_vocabulary, load_base, load_model, load_tokenizer
from author_dp.models.lora import LoraArguments, load_adapter
from author_dp.models.quantization import quantized_layers
from author_dp.models.weights import adapter_base_model


def load(folder: Path):
    return load_base(str(folder)), load_tokenizer(str(folder))


def reconfigure(folder: Path, **values) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def remove(folder: Path, *words: str) -> None:
    for path in folder.iterdir():
        if any(word in path.name for word in words):
            path.unlink()


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 548105171\n"


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda f: (f / "model.safetensors").write_text(POINTER), ["model.safetensors", "git lfs pull"]),
        (lambda f: (f / "tokenizer.json").write_text(POINTER), ["tokenizer.json", "git lfs pull"]),
        (lambda f: reconfigure(f, vocab_size=99_999), ["config.json", "vocab_size"]),
        (lambda f: reconfigure(f, n_layer=9), ["lack", "transformer.h.2"]),
        (lambda f: reconfigure(f, n_layer=1), ["does not ask for", "h.1"]),
        (lambda f: remove(f, "tok", "vocab", "merges"), ["tokenizer files", "tokenizer.json"]),
        (lambda f: (f / "tokenizer.json").write_text("{"), ["tokenizer"]),
        (lambda f: remove(f, ""), ["config.json"]),
        (lambda f: remove(f, "safetensors"), ["no weights"]),
        (lambda f: (f / "config.json").write_text("{"), ["config.json", "not JSON"]),
    ],
)
def test_what_is_wrong_with_which_file_is_said(checkpoint, tmp_path, spoil, words):
    folder = tmp_path / "model"
    shutil.copytree(checkpoint, folder)
    spoil(folder)
    with pytest.raises(UserError) as error:
        load(folder)
    assert all(word in str(error.value) for word in ["--model_name", str(folder), *words]), str(error.value)


def test_a_whole_folder_loads(checkpoint):
    model, tokenizer = load(Path(checkpoint))
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters()) and len(tokenizer) > 100


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda f: (f / "adapter_model.safetensors").write_text(POINTER), ["git lfs pull"]),
        (lambda f: (f / "adapter_model.safetensors").unlink(), ["no adapter weights"]),
        (lambda f: (f / "adapter_config.json").write_text('{"peft_type": "IA3"}'), ["type IA3"]),
    ],
)
def test_what_is_wrong_with_an_adapter_is_said(checkpoint, tmp_path, spoil, words):
    make_adapter(checkpoint, tmp_path)
    assert any("lora_B" in name for name, _ in load_adapter(load_base(checkpoint), str(tmp_path)).named_parameters())
    spoil(tmp_path)
    with pytest.raises(UserError) as error:
        load_adapter(load_base(checkpoint), str(tmp_path))
    assert all(word in str(error.value) for word in [str(tmp_path), *words]), str(error.value)


@pytest.mark.parametrize("layers", [1, 3])
def test_an_adapter_on_another_base_is_refused(checkpoint, tmp_path, layers):
    """Fewer layers would throw weights away, more would make some up."""
    make_adapter(checkpoint, tmp_path)
    config = AutoConfig.from_pretrained(checkpoint)
    config.n_layer = layers
    with pytest.raises(UserError, match="does not fit its base: 2 weights"):
        load_adapter(AutoModelForCausalLM.from_config(config), str(tmp_path))


def make_adapter(checkpoint, folder: Path) -> None:
    get_peft_model(load_base(checkpoint), LoraConfig(task_type="CAUSAL_LM", fan_in_fan_out=True)).save_pretrained(folder)


def test_an_adapter_names_its_base_from_everywhere(checkpoint, tmp_path, monkeypatch):
    assert adapter_base_model(checkpoint) is None and to_absolute_model_path("gpt2") == "gpt2"
    shutil.copytree(checkpoint, tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    model = get_peft_model(load_base(to_absolute_model_path("base")), LoraConfig(task_type="CAUSAL_LM", fan_in_fan_out=True))
    model.save_pretrained("adapter")
    monkeypatch.chdir("/")
    assert adapter_base_model(str(tmp_path / "adapter")) == str(tmp_path / "base")
    assert isinstance(
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter"), PeftModel
    )
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": "../base"}))
    assert adapter_base_model(str(tmp_path / "adapter")) == str(tmp_path / "base")
    config.write_text("{}")
    with pytest.raises(UserError, match=r"adapter_config\.json"):
        adapter_base_model(str(tmp_path / "adapter"))


# --- load_model: model, tokenizer and adapters by plain values ---------------------------------------------


def test_load_model_without_lora_trains_all_in_float32(checkpoint):
    model, tokenizer = load_model(checkpoint, LoraArguments().to_options())
    assert all(parameter.requires_grad and parameter.dtype == torch.float32 for parameter in model.parameters())
    assert len(tokenizer) > 100


@pytest.mark.parametrize(
    ("precision", "dtypes"),
    [
        ("float32", {torch.float32}),
        ("bfloat16", {torch.bfloat16, torch.float32}),
        ("nf4", {torch.uint8, torch.bfloat16, torch.float32}),
    ],
)
@pytest.mark.parametrize("bf16", [False, True])
def test_load_model_trains_adapters_in_float32_on_a_frozen_base(checkpoint, precision, dtypes, bf16):
    flags = {"float32": {}, "bfloat16": {"base_dtype": "bfloat16"}, "nf4": {"load_in_4bit": True}}[precision]
    arguments = LoraArguments(enable_lora=True, lora_dim=3, lora_target_modules=["all-linear"], **flags)
    assert arguments.base_precision == precision
    model, _ = load_model(checkpoint, arguments.to_options(), arguments.base_precision, bf16=bf16)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained and all("lora_" in name and parameter.dtype == torch.float32 for name, parameter in trained.items())
    assert {parameter.dtype for parameter in model.parameters()} == dtypes
    compute_dtypes = {torch.bfloat16 if bf16 else torch.float32} if precision == "nf4" else set()
    assert {layer.compute_dtype for layer in quantized_layers(model)} == compute_dtypes
    assert next(p for name, p in trained.items() if "lora_A" in name).shape[0] == 3


def test_load_model_resumes_an_adapter(checkpoint, tmp_path):
    make_adapter(checkpoint, tmp_path)
    shutil.copy(Path(checkpoint) / "tokenizer.json", tmp_path)
    shutil.copy(Path(checkpoint) / "tokenizer_config.json", tmp_path)
    with pytest.raises(UserError, match=r"--model_name .* holds a LoRA adapter\. Add --enable_lora"):
        load_model(str(tmp_path))
    model, _ = load_model(str(tmp_path), LoraArguments(enable_lora=True, lora_dim=3).to_options(), "bfloat16")
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert next(p for name, p in trained.items() if "lora_A" in name).shape[0] == 8  # as it was made
    assert {parameter.dtype for parameter in trained.values()} == {torch.float32}


def test_load_model_refuses_a_tokenizer_of_another_model(checkpoint, tmp_path):
    model = load_base(checkpoint)
    model.resize_token_embeddings(7)
    model.save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(checkpoint) / name, tmp_path)
    with pytest.raises(UserError, match=r"its tokenizer has token ids up to \d+, its model 7 embeddings"):
        load_model(str(tmp_path))


def test_check_vocabulary_wants_an_embedding_for_the_largest_id(checkpoint):
    """Ids may have gaps, so that the number of tokens says nothing."""
    model, tokenizer = load(Path(checkpoint))
    check_vocabulary(model, tokenizer, "mine")
    tokenizer.get_vocab = lambda: {"a": 0, "b": len(model.get_input_embeddings().weight)}
    with pytest.raises(UserError, match=r"^--model_name mine: its tokenizer has token ids up to \d+"):
        check_vocabulary(model, tokenizer, "mine")


def test_load_model_names_a_model_that_cannot_be_loaded(tmp_path):
    with pytest.raises(UserError, match=r"--model_name no/such-model.*hub cannot be reached"):
        load_model("no/such-model")
