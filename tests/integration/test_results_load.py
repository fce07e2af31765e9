"""A result loads as it was trained: with the class that the run names, and in generation, for all LoRA options, tied or not."""

import copy
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from conftest import ROOT, make_trainer, sample, tiny_gpt2, trainable
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from author_dp.accounting.output_dir import check_output_is_not_model
from author_dp.errors import UserError
from author_dp.models import loading
from author_dp.models.lora import adapts_tied_weights, add_lora_adapters
from author_dp.outputs import generate, report
from author_dp.outputs.rehearsal import PEFT_LOADER, PLAIN_LOADER, find_rehearsal_loader
from author_dp.training.rescue import check_rescued

DEMO = ROOT / "demo" / "model"
NAMES = {"gpt2": ("c_attn", "wte", "ln_f"), "llama": ("q_proj", "embed_tokens", "model.norm")}
OPTIONS = [
    {},
    {"use_dora": True},
    {"use_rslora": True},
    {"bias": "all"},
    {"bias": "lora_only"},
    {"use_dora": True, "bias": "all"},
    {"modules_to_save": ["head"]},
    {"modules_to_save": ["embedding"]},
    {"modules_to_save": ["norm"]},
    {"trainable_token_indices": [1, 2]},
]
TARGETS = ["attention", "embedding", "head", "attention head", "embedding head", "all-linear"]
CASES = [(family, tied, targets) for targets in TARGETS[1:-1] for family in NAMES for tied in (True, False)]
# Neither adapts embedding or head: whether these are tied matters less.
CASES += [
    ("gpt2", True, "attention"),
    ("llama", False, "attention"),
    ("gpt2", False, "all-linear"),
    ("llama", True, "all-linear"),
]
IDS = torch.arange(1, 9)[None]


def make_base(family: str, tied: bool, vocabulary: int = 61):
    torch.manual_seed(0)
    if family == "gpt2":
        config = GPT2Config(vocab_size=vocabulary, n_positions=16, n_embd=16, n_layer=2, n_head=2, tie_word_embeddings=tied)
        return GPT2LMHeadModel(config)
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=vocabulary, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
                    num_key_value_heads=1, max_position_embeddings=16, tie_word_embeddings=tied)
    )  # fmt: skip


def change(model) -> torch.Tensor:
    """Change what is trained as a training would; return the logits."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter += 0.1 * torch.randn_like(parameter)
        return model.eval()(IDS).logits


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


def is_close(model, expected: torch.Tensor) -> bool:
    return bool((logits(model) - expected).abs().max() <= 1e-3 * expected.abs().max())


def class_named(loader: str):
    return {PLAIN_LOADER: AutoModelForCausalLM, PEFT_LOADER: AutoPeftModelForCausalLM}[loader]


@pytest.fixture(autouse=True)
def no_tokenizer(monkeypatch):
    monkeypatch.setattr(generate, "load_tokenizer", lambda _: None)
    transformers.logging.disable_progress_bar()


@pytest.mark.integration
@pytest.mark.parametrize(("family", "tied", "targets"), sample(CASES, of=8))
def test_every_adapter_loads_as_it_was_trained(tmp_path, family, tied, targets):
    attention, embedding, norm = NAMES[family]
    names = {"attention": attention, "embedding": embedding, "head": "lm_head", "norm": norm}
    make_base(family, tied).save_pretrained(tmp_path / "base")
    tried = 0
    for options in OPTIONS:
        options = {**options}
        if "modules_to_save" in options:
            options["modules_to_save"] = [names[name] for name in options["modules_to_save"]]
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        torch.manual_seed(2)
        try:
            model = add_lora_adapters(model, [names.get(name, name) for name in targets.split()], r=2, **options)
        except UserError:  # one layer cannot be adapted in two ways
            continue
        expected, folder = change(model), tmp_path / f"{tried}"
        model.save_pretrained(folder)
        check_rescued(folder, model)
        loader = find_rehearsal_loader(folder, model)
        assert loader == (PEFT_LOADER if options.get("use_dora") else PLAIN_LOADER), options
        for load in (class_named(loader).from_pretrained, lambda path: generate.load_generating_model(str(path))[0]):
            assert is_close(load(folder), expected), options
        tried += 1
    assert tried >= 6


@pytest.mark.parametrize("tied", [True, False])
def test_a_full_model_loads_as_it_was_trained(tmp_path, tied):
    model = tiny_gpt2(tied)
    expected = change(model)
    model.save_pretrained(tmp_path)
    check_rescued(tmp_path, model)
    assert find_rehearsal_loader(tmp_path, model) == PLAIN_LOADER
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), expected)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {"trainable_token_indices": [3, 5]},
        {"resized": True},
        {"resized": True, "modules_to_save": ["wte"]},
        {"resized": True, "target_modules": ["wte"]},
        {"resized": True, "target_modules": ["lm_head"]},
    ],
)
def test_adapters_made_elsewhere_are_resumed_and_generated_from(tmp_path, tied, options):
    """With trained token embeddings, or with more tokens than the base has."""
    options, tokenizer = {**options}, AutoTokenizer.from_pretrained(DEMO)
    make_base("gpt2", tied, len(tokenizer)).save_pretrained(tmp_path / "base")
    model, saved = AutoModelForCausalLM.from_pretrained(tmp_path / "base"), copy.deepcopy(tokenizer)
    if options.pop("resized", False):
        saved.add_tokens(["<a>", "<b>"])
        model.resize_token_embeddings(len(saved))
    model = get_peft_model(
        model, LoraConfig(**{"task_type": "CAUSAL_LM", "r": 2, "fan_in_fan_out": True, "target_modules": ["c_attn"], **options})
    )
    expected, folder = change(model), tmp_path / "adapter"
    model.save_pretrained(folder)
    saved.save_pretrained(folder)
    for load in (AutoPeftModelForCausalLM.from_pretrained, lambda path: generate.load_generating_model(str(path))[0]):
        assert is_close(load(folder), expected)
    resumed, _ = loading.load_model(str(folder), {"targets": None})
    assert is_close(resumed, expected)
    resumed.save_pretrained(tmp_path / "again")
    shutil.copy(folder / "tokenizer.json", tmp_path / "again")
    shutil.copy(folder / "tokenizer_config.json", tmp_path / "again")
    assert is_close(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "again"), expected)


def test_adapts_tied_weights_knows_where_merging_would_change_two_layers():
    def adapted(tied: bool, *targets: str):
        return add_lora_adapters(make_base("gpt2", tied), list(targets), r=2)

    assert adapts_tied_weights(adapted(True, "lm_head")) and adapts_tied_weights(adapted(True, "c_attn", "wte"))
    assert not adapts_tied_weights(adapted(True, "c_attn")) and not adapts_tied_weights(adapted(False, "lm_head", "wte"))


@pytest.mark.integration
@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["LoRA", "DoRA"])
def test_the_run_says_how_its_result_is_loaded(tmp_path, monkeypatch, options):
    make_base("gpt2", True).save_pretrained(tmp_path / "base")
    model = add_lora_adapters(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), ["c_attn"], r=2, **options)
    trainer, said = make_trainer(tmp_path / "out", model, rehearsal=True), []
    trainer.add_callback(statistics := report.RunStatistics(trainer.norms, [1]))
    trainer.train()
    monkeypatch.setattr(report.logger, "warning", said.append)
    trainer.save_model()
    report.report_result(trainer, statistics)
    expected = [f"Load the result with {PEFT_LOADER}.from_pretrained('{tmp_path / 'out'}')"] if options else []
    assert [line.split(". ")[0] for line in said] == expected
    loaded = class_named(trainer.loader).from_pretrained(tmp_path / "out")
    assert is_close(loaded, logits(model))


def test_a_result_is_not_put_in_the_place_of_its_base(tmp_path, monkeypatch):
    """A hub name is looked up as a folder first, so that the adapter would be found as its own base."""
    monkeypatch.chdir(tmp_path)
    for folder, name in (("gpt2", "gpt2"), (str(tmp_path / "gpt2"), "gpt2"), ("org/../gpt2", str(tmp_path / "gpt2"))):
        with pytest.raises(UserError, match=r"^--output_dir .*gpt2, --model_name .*Choose another --output_dir"):
            check_output_is_not_model(Path(folder), name)
    check_output_is_not_model(tmp_path / "out", "gpt2")
    model = tiny_gpt2()
    model.name_or_path = "gpt2"
    with pytest.raises(UserError, match="--model_name gpt2"):
        make_trainer("gpt2", model)
    assert not list(tmp_path.iterdir())
