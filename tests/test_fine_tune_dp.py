"""fine-tune-dp.py by its command line, as a user would run it."""

import gc
import json
import re
import runpy
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import ROOT, flat, of_a_terminal, read_report, run_script, sample
from peft import PeftModel
from programs import PRIVACY, run_here, small
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertLMHeadModel,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    T5Config,
    T5ForConditionalGeneration,
)

from author_dp.accounting.accountant import compute_epsilon, find_noise_multiplier
from author_dp.accounting.ledger import PrivacyLedger
from author_dp.cli import load_config_args

# The two commands of the original example, flag for flag, but for the process count.
FULL = """--output_dir scratch --model_name gpt2 --sequence_len 128 --per_device_train_batch_size 32
--gradient_accumulation_steps 2 --evaluation_strategy steps --eval_steps 45 --log_level info --per_device_eval_batch_size 64
--eval_accumulation_steps 1 --seed 42 --target_epsilon 8 --per_sample_max_grad_norm 1.0 --prediction_loss_only
--weight_decay 0.01 --remove_unused_columns False --num_train_epochs 3 --logging_steps 5 --max_grad_norm 0
--lr_scheduler_type constant --learning_rate 1e-4 --disable_tqdm True --label_names labels --dataloader_num_workers 2"""
LORA = """--output_dir scratch --model_name gpt2 --sequence_len 128 --per_device_train_batch_size 64
--gradient_accumulation_steps 1 --evaluation_strategy steps --eval_steps 45 --log_level info --per_device_eval_batch_size 64
--eval_accumulation_steps 1 --seed 42 --target_epsilon 8 --per_sample_max_grad_norm 1.0 --prediction_loss_only
--weight_decay 0.01 --remove_unused_columns False --num_train_epochs 3 --logging_steps 5 --max_grad_norm 0 --lora_dim 4
--lora_alpha 32 --lora_dropout 0.0 --lr_scheduler_type constant --learning_rate 3e-4 --disable_tqdm True
--label_names labels --dataloader_num_workers 2 --enable_lora"""


# --- the published commands -----------------------------------------------------------------------------


@pytest.mark.integration
@pytest.mark.parametrize("command", [FULL, LORA], ids=["full", "lora"])
def test_the_published_commands_on_two_processes(checkpoint, comments, tmp_path, command):
    arguments = [checkpoint if word == "gpt2" else word for word in command.split()]
    arguments += ["--train_file", str(comments), "--max_train_samples", "700", "--num_train_epochs", "1"]
    done = run_script(*arguments, processes=2, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    report = read_report(tmp_path / "scratch")
    assert report["expected_batch_size"] == 128 and report["world_size"] == 2
    assert 7.5 < report["epsilon"] <= 8.0
    spent = compute_epsilon(report["noise_multiplier"], report["sample_rate"], report["steps"], report["delta"])
    assert report["epsilon"] == pytest.approx(spent)
    assert PrivacyLedger(tmp_path / "scratch" / "privacy_ledger.jsonl").steps == report["steps"]
    # What the user sees: once, in this order.
    output = done.stdout + done.stderr
    assert "Without effect here: --eval_accumulation_steps, --label_names, --prediction_loss_only (" in done.stderr
    summary = re.search(
        r"processes +2, on cpu\n +authors \(N\) +(\d+) .*\n.*sample rate.*"
        r"\n.*steps.*\n.*trained parameters.*\n.*clip norm",
        done.stderr,
    )
    assert summary and int(summary[1]) == report["num_authors"]
    last = done.stdout.strip().splitlines()[-1]
    assert re.fullmatch(
        r"epsilon \d\.\d\d at delta \S+ \(author level, add or remove one\), eval loss \d+\.\d\d, saved to scratch", last
    )
    assert output.count("saved to scratch") == 1 and "Traceback" not in output
    for needless in ("We strongly recommend", "loss_type", "max_steps is given"):  # of what is in order nobody is warned
        assert needless not in output
    logs = [line for line in done.stdout.splitlines() if line.startswith("{")]
    assert "eval_loss" in logs[0] and "eval_loss" in logs[-1] and all("'epsilon'" in line for line in logs)
    # What loads.
    if command is LORA:
        base = AutoModelForCausalLM.from_pretrained(checkpoint)
        model = PeftModel.from_pretrained(base, tmp_path / "scratch")
        assert model.peft_config["default"].r == 4
        assert any(p.abs().sum() > 0 for name, p in model.named_parameters() if "lora_B" in name)
    else:
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "scratch")
        assert model.lm_head.weight is model.transformer.wte.weight
    assert AutoTokenizer.from_pretrained(tmp_path / "scratch")("hello there")["input_ids"]


@pytest.mark.integration
def test_the_published_commands_without_a_hub(tmp_path):
    done = run_script(*FULL.split(), cwd=tmp_path)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    message = done.stderr.strip().splitlines()[-1]
    assert all(word in message for word in ("hub", "--train_file", "--model_name", "demo")), done.stderr
    assert not (tmp_path / "scratch" / "privacy_ledger.jsonl").exists()


@pytest.mark.integration
def test_a_hub_data_set_as_a_local_folder(checkpoint, tmp_path, monkeypatch, capfd):
    shards = tmp_path / "tldr-17" / "default" / "partial-train"
    shards.mkdir(parents=True)
    for shard in range(2):
        rows = [(f"u{n % 30}", f"text number {n} of shard {shard}") for n in range(100)]
        table = pa.table({"author": [a for a, _ in rows], "content": [c for _, c in rows], "subreddit": ["x"] * 100})
        pq.write_table(table, shards / f"{shard:04d}.parquet")
    arguments = ["--model_name", checkpoint, "--dataset_name", str(tmp_path / "tldr-17"), "--output_dir", str(tmp_path / "out")]
    status, stderr = run_here(monkeypatch, capfd, *arguments, *PRIVACY, "--dry_run", "--disable_tqdm", "True")
    assert status == 0, stderr
    report = read_report(tmp_path / "out")
    assert report["steps"] == 2 and 20 <= report["num_authors"] <= 30


# --- own data -------------------------------------------------------------------------------------------


@pytest.mark.integration
@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_own_columns_and_whole_numbers_as_authors(checkpoint, tmp_path, suffix, monkeypatch, capfd):
    frame = pd.DataFrame({"user": [n % 40 for n in range(200)], "body": [f"comment {n} of mine" for n in range(200)]})
    path = tmp_path / f"comments{suffix}"
    frame.to_csv(path, index=False) if suffix == ".csv" else frame.to_parquet(path)
    arguments = small(checkpoint, path, tmp_path / "out", "--author_column", "user", "--text_column", "body", *PRIVACY)
    status, stderr = run_here(monkeypatch, capfd, *arguments)
    assert status == 0, stderr
    assert 30 <= read_report(tmp_path / "out")["num_authors"] < 40


@pytest.mark.integration
def test_validation_file_bf16_and_several_samples_per_author(checkpoint, comments, tmp_path, monkeypatch, capfd):
    options = "--bf16 --samples_per_author 3 --per_device_train_batch_size 4 --noise_multiplier 1 --per_sample_max_grad_norm 0.5"
    arguments = small(checkpoint, comments, tmp_path / "out", "--validation_file", str(comments), *options.split())
    status, stderr = run_here(monkeypatch, capfd, *arguments, "--allow_shared_authors")
    assert status == 0, stderr
    report = read_report(tmp_path / "out")
    assert report["samples_per_author"] == 3 and report["target_epsilon"] is None and 0 < report["epsilon"] < 10
    weights = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert next(weights.parameters()).dtype == torch.float32


@pytest.mark.integration
def test_one_seed_shares_split_and_lora_but_neither_noise_nor_batches(checkpoint, comments, tmp_path, monkeypatch, capfd):
    runs = []
    for name, rate in (("a", "0"), ("b", "0"), ("c", "1e-3"), ("d", "1e-3")):
        lora = ["--enable_lora", "--seed", "5", "--learning_rate", rate]
        status, stderr = run_here(monkeypatch, capfd, *small(checkpoint, comments, tmp_path / name, *PRIVACY, *lora))
        assert status == 0, stderr
        adapters = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(checkpoint), tmp_path / name)
        runs.append((read_report(tmp_path / name), flat(p for n, p in adapters.named_parameters() if "lora_" in n)))
    assert len({(report["num_authors"], report["num_samples"]) for report, _ in runs}) == 1
    assert torch.equal(runs[0][1], runs[1][1])  # nothing learned: the same initial adapters
    assert not torch.equal(runs[2][1], runs[3][1])  # two steps of different batches and noise


@pytest.mark.integration
def test_resume_and_the_ways_on(checkpoint, comments, tmp_path, monkeypatch, capfd):
    first = small(
        checkpoint, comments, tmp_path / "out", "--noise_multiplier", "1", "--per_sample_max_grad_norm", "1", "--save_steps", "2"
    )
    assert run_here(monkeypatch, capfd, *first)[0] == 0
    status, stderr = run_here(monkeypatch, capfd, *first)
    assert status == 2 and "--resume_from_checkpoint" in stderr and "--output_dir" in stderr
    status, stderr = run_here(monkeypatch, capfd, *first, "--resume_from_checkpoint", "True", "--max_steps", "5")
    assert status == 0, stderr
    assert read_report(tmp_path / "out")["steps"] == 5


@pytest.mark.integration
def test_disable_dp(checkpoint, comments, tmp_path, monkeypatch, capfd):
    arguments = small(checkpoint, comments, tmp_path / "out", "--disable_dp", "--max_grad_norm", "1.0")
    status, stderr = run_here(monkeypatch, capfd, *arguments)
    assert status == 0, stderr
    assert read_report(tmp_path / "out")["disable_dp"] is True


@pytest.mark.parametrize(("value", "words"), [("hybrid_shard", "full_shard"), ("full_shard", "torch.distributed.run")])
def test_fsdp_that_does_not_work_is_refused(checkpoint, comments, tmp_path, monkeypatch, capfd, value, words):
    status, stderr = run_here(monkeypatch, capfd, *small(checkpoint, comments, tmp_path / "out", *PRIVACY, "--fsdp", value))
    assert status == 2 and f"--fsdp {value}" in stderr and words in stderr and "Traceback" not in stderr


@pytest.mark.integration
def test_full_shard_on_two_processes(checkpoint, comments, tmp_path):
    more = ["--fsdp", "full_shard", "--enable_lora", "--release_eval_epsilon", "2", "--activation_checkpointing"]
    done = run_script(*small(checkpoint, comments, tmp_path / "out", *PRIVACY, *more), processes=2)
    assert done.returncode == 0, done.stderr
    assert read_report(tmp_path / "out")["steps"] == 3 and "evaluation_release" in read_report(tmp_path / "out")
    assert "clipping matches the reference" in done.stderr
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(checkpoint), tmp_path / "out")


@pytest.mark.integration
def test_disable_dp_on_two_processes(checkpoint, comments, tmp_path):
    done = run_script(*small(checkpoint, comments, tmp_path / "out", "--disable_dp", "--ddp_backend", "gloo"), processes=2)
    assert done.returncode == 0 and done.stderr.count("NO PRIVACY") == 1, done.stderr
    assert read_report(tmp_path / "out")["world_size"] == 2


@pytest.mark.integration
@pytest.mark.parametrize(
    "options", [["--clipping", "grad_sample"], ["--activation_checkpointing"]], ids=["grad_sample", "checkpointing"]
)
def test_the_other_engine_and_checkpointing(checkpoint, comments, tmp_path, monkeypatch, capfd, options):
    status, stderr = run_here(monkeypatch, capfd, *small(checkpoint, comments, tmp_path / "out", *PRIVACY, *options))
    assert status == 0, stderr
    assert read_report(tmp_path / "out")["clipping"] == ("grad_sample" if "grad_sample" in options else "ghost")


ADAPTERS = "--enable_lora --lora_target_modules all-linear --lora_use_dora --lora_use_rslora --lora_bias all".split()
ADAPTERS += ["--lora_modules_to_save", "lm_head"]


def save_tiny(checkpoint, folder, model_class, config_class, **more) -> Path:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    model_class(config_class(**sizes, num_attention_heads=2, **more)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.integration
@pytest.mark.parametrize("options", [[], ADAPTERS], ids=["full", "adapters"])
def test_a_model_whose_norms_have_no_rule_of_their_own_trains(checkpoint, comments, tmp_path, monkeypatch, capfd, options):
    """Gemma's norms scale by 1 + weight."""
    folder = save_tiny(checkpoint, tmp_path / "gemma", GemmaForCausalLM, GemmaConfig, num_key_value_heads=1, head_dim=8)
    status, stderr = run_here(monkeypatch, capfd, *small(folder, comments, tmp_path / "out", *PRIVACY, *options))
    assert status == 0, stderr
    if options:
        kept = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "out").peft_config["default"]
        assert kept.use_dora and kept.use_rslora and kept.bias == "all" and kept.modules_to_save == ["lm_head"]


def test_an_encoder_decoder_is_refused_in_a_line(checkpoint, comments, tmp_path, monkeypatch, capfd):
    T5ForConditionalGeneration(T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)).save_pretrained(tmp_path / "t5")
    AutoTokenizer.from_pretrained(checkpoint).save_pretrained(tmp_path / "t5")
    status, stderr = run_here(monkeypatch, capfd, *small(tmp_path / "t5", comments, tmp_path / "out", *PRIVACY))
    assert status == 2 and "t5: it is no causal language model. Choose a decoder" in stderr, stderr


@pytest.mark.integration
def test_a_model_that_sees_the_future_ends_in_a_line_and_writes_nothing(checkpoint, comments, tmp_path, monkeypatch, capfd):
    folder = save_tiny(checkpoint, tmp_path / "bert", BertLMHeadModel, BertConfig)
    status, stderr = run_here(monkeypatch, capfd, *small(folder, comments, tmp_path / "out", *PRIVACY))
    assert status == 2 and re.search(r"error: --model_name: .*sees later tokens", stderr), stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("name", "command"), [("reddit-full", FULL), ("reddit-lora", LORA)])
def test_the_published_commands_as_files(name, command):
    runpy.run_path(str(ROOT / "fine-tune-dp.py"), run_name="read")
    assert gc.isenabled()  # it is off for the imports only
    pairs = zip(command.split(), [*command.split()[1:], "--"])
    expected = {option: "True" if value.startswith("--") else value for option, value in pairs if option.startswith("--")}
    words = load_config_args(["--config", str(ROOT / "configs" / f"{name}.yaml")])
    found = dict(zip(words[::2], words[1::2]))
    folder = {"--output_dir": "scratch-lora" if name == "reddit-lora" else "scratch"}
    assert found.keys() == expected.keys()
    for option, value in {**expected, **folder}.items():
        assert found[option] == value or float(found[option]) == float(value), option


def test_a_config_file_is_taken_as_it_is_written(tmp_path):
    """YAML alone makes `no` and `off` false, and 042 thirty-four."""
    path = tmp_path / "options.yaml"
    path.write_text(
        "save_strategy: no\nlog_level: off\nseed: 042\nuse_cpu: yes\ntrain_file: [on.csv, 1e3]\nlearning_rate: 1e-3\n"
        "lr_scheduler_kwargs: {num_cycles: 2}\nmax_steps:\nrun_name: null\noutput_dir: '~'\nlogging_dir: 2024-02-30\n"
    )
    expected = "--save_strategy no --log_level off --seed 042 --use_cpu yes --train_file on.csv 1e3 --learning_rate 1e-3"
    expected = [
        *expected.split(),
        "--lr_scheduler_kwargs",
        '{"num_cycles": 2}',
        "--output_dir",
        "~",
        "--logging_dir",
        "2024-02-30",
        "--more",
    ]
    assert load_config_args(["--config", str(path), "--more"]) == expected


@pytest.mark.integration
def test_a_config_file_is_read_and_the_command_line_prevails(checkpoint, comments, tmp_path, monkeypatch, capfd):
    options = ["model_name: nowhere", f"train_file: [{comments}]", "target_epsilon: 8", "per_sample_max_grad_norm: 1.0"]
    options += ["max_steps: 2", "lr_scheduler_kwargs: {}", "target_delta: null", "disable_tqdm: true", "learning_rate: 1e-4"]
    (tmp_path / "run.yaml").write_text("\n".join(options))
    arguments = ["--config", str(tmp_path / "run.yaml"), "--model_name", checkpoint, "--output_dir", str(tmp_path / "out")]
    status, stderr = run_here(monkeypatch, capfd, *arguments, "--sequence_len", "32")
    assert status == 0, stderr
    assert read_report(tmp_path / "out")["target_epsilon"] == 8


@pytest.mark.parametrize("content", [None, "- a list", "a: [", b"\xff", "no_such_option: 3"])
def test_a_wrong_config_file_is_named(tmp_path, content, monkeypatch, capfd):
    path = tmp_path / "run.yaml"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    status, stderr = run_here(monkeypatch, capfd, "--config", str(path))
    assert status == 2 and ("--config" in stderr or "--no_such_option" in stderr) and "Traceback" not in stderr, stderr


def tiny(family: str, vocabulary: int):
    """A checkpoint of the family's shape, as its name on the hub would load."""
    small = {"vocab_size": vocabulary, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    small |= {"intermediate_size": 24, "max_position_embeddings": 64}
    configs = {
        "gpt2": lambda: GPT2Config(vocab_size=vocabulary, n_positions=64, n_embd=16, n_layer=2, n_head=2),
        "pythia": lambda: GPTNeoXConfig(**small),
        "opt": lambda: OPTConfig(**{**small, "ffn_dim": 24, "word_embed_proj_dim": 16}),
        "llama": lambda: LlamaConfig(**small, num_key_value_heads=1),
        "mistral": lambda: MistralConfig(**small, num_key_value_heads=1),
        "qwen2": lambda: Qwen2Config(**small, num_key_value_heads=1),
        "qwen3": lambda: Qwen3Config(**small, num_key_value_heads=1, head_dim=8),
    }
    return AutoModelForCausalLM.from_config(configs[family]())


@pytest.mark.integration
@pytest.mark.parametrize("lora", [[], ["--enable_lora"]], ids=["full", "lora"])
@pytest.mark.parametrize("family", ["pythia", "opt", "llama", "mistral", "qwen2", "qwen3"])
def test_other_families_train_by_name_alone(checkpoint, comments, tmp_path, monkeypatch, capfd, family, lora):
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    tiny(family, len(tokenizer)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    status, stderr = run_here(monkeypatch, capfd, *small(tmp_path / "model", comments, tmp_path / "out", *PRIVACY, *lora))
    assert status == 0, stderr
    model = AutoModelForCausalLM.from_pretrained(tmp_path / ("model" if lora else "out"))
    if lora:
        model = PeftModel.from_pretrained(model, tmp_path / "out")
    assert model(torch.tensor([[1, 2, 3]])).logits.isfinite().all()


@pytest.mark.integration
def test_a_dry_run_plans_the_run_that_is_asked_for(checkpoint, comments, tmp_path):
    done = run_script(*small(checkpoint, comments, tmp_path / "out", *PRIVACY, "--max_steps", "400", "--dry_run"))
    stderr = done.stderr
    assert done.returncode == 0, stderr
    assert re.search(r"steps +400\n", stderr) and re.search(r"guarantee at the end +epsilon 8\.00", stderr)
    report = read_report(tmp_path / "out")
    assert report["steps"] == 2 and 0 < report["epsilon"] < 4
    header = json.loads((tmp_path / "out" / "privacy_ledger.jsonl").read_text().splitlines()[0])
    planned = find_noise_multiplier(report["sample_rate"], 400, 8.0, report["delta"])
    assert header["steps"] == 400 and report["noise_multiplier"] == pytest.approx(planned, rel=1e-6)
    said = re.search(
        r"Dry run: 2 of 400 steps taken, which spent epsilon (\S+) at .* will take about \d+:\d\d:\d\d .*GiB", stderr
    )
    assert said and float(said[1]) == pytest.approx(report["epsilon"], abs=0.02)


@pytest.mark.integration
def test_an_adapter_is_gone_on_with_or_refused(checkpoint, comments, tmp_path, monkeypatch, capfd):
    plain = ["--disable_dp", "--learning_rate", "0.1"]
    lora = ["--enable_lora", "--lora_dim", "3"]
    first, second = tmp_path / "first", tmp_path / "second"
    assert run_here(monkeypatch, capfd, *small(checkpoint, comments, first, *plain, *lora))[0] == 0
    trained = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(checkpoint), first).state_dict()
    status, stderr = run_here(monkeypatch, capfd, *small(str(first), comments, tmp_path / "no", *plain))
    assert status == 2 and "it holds a LoRA adapter. Add --enable_lora" in stderr
    arguments = small(str(first), comments, second, "--enable_lora", "--disable_dp", "--learning_rate", "0")
    assert run_here(monkeypatch, capfd, *arguments)[0] == 0
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(checkpoint), second).state_dict()
    assert trained.keys() == again.keys() and all(torch.equal(trained[name], again[name]) for name in trained)
    assert any(value.abs().sum() > 0 for name, value in again.items() if "lora_B" in name)


@pytest.mark.integration
def test_resuming_from_a_model_alone_is_refused(checkpoint, comments, tmp_path, monkeypatch, capfd):
    arguments = small(checkpoint, comments, tmp_path / "out", "--noise_multiplier", "1", "--per_sample_max_grad_norm", "1")
    assert run_here(monkeypatch, capfd, *arguments, "--save_steps", "1", "--save_only_model")[0] == 0
    status, stderr = run_here(monkeypatch, capfd, *arguments, "--max_steps", "4", "--resume_from_checkpoint", "True")
    assert status == 2 and "--save_only_model" in stderr and "learning rate" in stderr


@pytest.mark.integration
@pytest.mark.parametrize("lora", [[], ["--enable_lora"]], ids=["full", "lora"])
def test_the_recipe_of_the_readme_writes_text(checkpoint, comments, tmp_path, monkeypatch, capfd, lora):
    assert run_here(monkeypatch, capfd, *small(checkpoint, comments, tmp_path / "mine", *PRIVACY, *lora))[0] == 0
    recipe = re.search(r"<!-- the recipe -->\n```python\n(.*?)```", (ROOT / "docs" / "outputs.md").read_text(), re.S)[1]
    monkeypatch.chdir(tmp_path)
    exec(recipe.replace("max_new_tokens=60", "max_new_tokens=5").replace("num_return_sequences=8", "num_return_sequences=2"), {})
    written = [json.loads(line) for line in (tmp_path / "synthetic.jsonl").read_text().splitlines()]
    assert len(written) == 2 and all(isinstance(row["content"], str) for row in written)


@pytest.mark.integration
def test_what_tensorboard_shows(checkpoint, comments, tmp_path, monkeypatch, capfd):
    arguments = ["--report_to", "tensorboard", "--logging_steps", "1", "--eval_strategy", "steps", "--eval_steps", "2"]
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    status, stderr = run_here(monkeypatch, capfd, *small(checkpoint, comments, tmp_path / "out", *PRIVACY, *arguments))
    assert status == 0, stderr
    events = EventAccumulator(str(next((tmp_path / "board").rglob("events*")).parent))
    events.Reload()
    wanted = {
        "train/epsilon",
        "train/noise_multiplier",
        "train/clip_fraction",
        "train/authors_per_step",
        "train/loss",
        "eval/loss",
    }
    assert wanted <= set(events.Tags()["scalars"]), events.Tags()
    assert all(event.value > 0 for event in events.Scalars("train/noise_multiplier"))
    rates = [event.value for event in events.Scalars("train/learning_rate")]
    assert rates == pytest.approx([1e-3] * 3)  # this script's default, constant


@pytest.mark.integration
@pytest.mark.parametrize("lora", [[], ["--enable_lora"]], ids=["full", "lora"])
def test_the_best_checkpoint_is_loaded_at_the_end_and_every_step_counts(checkpoint, comments, tmp_path, monkeypatch, capfd, lora):
    # The first step has rate 0, the noise of the others ruins a model that is trained in full: checkpoint 1 is best.
    arguments = ["--noise_multiplier", "50", "--per_sample_max_grad_norm", "1", "--learning_rate", "100", "--warmup_steps", "3"]
    arguments += ["--lr_scheduler_type", "constant_with_warmup", "--load_best_model_at_end", *lora]
    arguments += ["--eval_strategy", "steps", "--eval_steps", "1", "--save_steps", "1"]
    status, stderr = run_here(monkeypatch, capfd, *small(checkpoint, comments, tmp_path / "out", *arguments))
    assert status == 0, stderr
    state = json.loads((tmp_path / "out" / "checkpoint-3" / "trainer_state.json").read_text())
    losses = [log["eval_loss"] for log in state["log_history"] if "eval_loss" in log]
    best = 1 + int(np.argmin(losses[-3:]))
    assert state["best_global_step"] == best and (lora or best == 1)
    folders = (checkpoint if best == 1 else tmp_path / "out" / f"checkpoint-{best}", tmp_path / "out")
    expected, released = (AutoModelForCausalLM.from_pretrained(folder) for folder in folders)
    tokens = torch.arange(8)[None]
    assert torch.equal(expected(tokens).logits, released(tokens).logits)
    assert read_report(tmp_path / "out")["steps"] == 3


@pytest.mark.integration
def test_two_nodes_with_a_launcher_each(checkpoint, comments, tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        endpoint = f"localhost:{free.getsockname()[1]}"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1", "--rdzv_id", "7"]
    launcher += ["--rdzv_backend", "c10d", "--rdzv_endpoint", endpoint, str(ROOT / "fine-tune-dp.py")]
    arguments = [*launcher, *small(checkpoint, comments, tmp_path / "out", *PRIVACY)]
    nodes = [subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True, env=of_a_terminal()) for _ in range(2)]
    outputs = [node.communicate(timeout=240)[1] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outputs
    assert "".join(outputs).count("so noise dominates") == 1  # advice is given once, whatever the number of processes
    report = read_report(tmp_path / "out")
    assert report["world_size"] == 2 and report["expected_batch_size"] == 16 and report["steps"] == 3


# --- what the user can mend -----------------------------------------------------------------------------


@pytest.mark.integration
@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--report_to", "wandb"], "--report_to"),
        (["--optim_args", "x"], "--optim_args"),
        (["--lr_scheduler_type", "cosine_with_min_lr"], "--lr_scheduler_type"),
        (["--load_best_model_at_end", "--eval_strategy", "steps", "--metric_for_best_model", "no"], "--metric_for_best_model"),
    ],
)
def test_what_the_trainer_alone_notices_ends_with_status_2_too(
    checkpoint, comments, tmp_path, monkeypatch, capfd, arguments, word
):
    status, stderr = run_here(monkeypatch, capfd, *small(checkpoint, comments, tmp_path / "out", *PRIVACY, *arguments))
    assert status == 2 and word in stderr[stderr.rindex("fine-tune-dp.py: error:") :] and "Traceback" not in stderr, stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    sample(
        [
            (["--no_such_option", "3"], ["--no_such_option", "--help"]),
            (["--target_epsilon", "eight"], ["--target_epsilon"]),
            (["--target_epsilon", "8"], ["--per_sample_max_grad_norm"]),
            (["--per_sample_max_grad_norm", "1"], ["--target_epsilon", "--noise_multiplier"]),
            ([*PRIVACY, "--noise_multiplier", "1"], ["--target_epsilon", "--noise_multiplier"]),
            ([*PRIVACY, "--clipping", "sideways"], ["--clipping", "grad_sample"]),
            ([*PRIVACY, "--max_grad_norm", "1"], ["--max_grad_norm", "--per_sample_max_grad_norm"]),
            ([*PRIVACY, "--text_column", "body"], ["--text_column", "body", "content"]),
            ([*PRIVACY, "--author_column", "user"], ["--author_column", "user", "author"]),
            ([*PRIVACY, "--train_file", "nowhere.jsonl"], ["--train_file", "nowhere.jsonl"]),
            ([*PRIVACY, "--validation_file", "nowhere.csv"], ["--validation_file", "nowhere.csv"]),
            ([*PRIVACY, "--model_name", "."], ["--model_name"]),
            ([*PRIVACY, "--sequence_len", "100000"], ["--sequence_len"]),
            ([*PRIVACY, "--enable_lora", "--lora_dim", "0"], ["--lora_dim"]),
            ([*PRIVACY, "--enable_lora", "--lora_target_modules", "nothing"], ["--lora_target_modules"]),
            ([*PRIVACY, "--optim", "nothing"], ["--optim"]),
            ([*PRIVACY, "--eval_fraction", "0", "--eval_strategy", "steps"], ["--eval_strategy", "--validation_file"]),
            ([*PRIVACY, "--max_train_samples", "1"], ["author"]),
            ([*PRIVACY, "--target_delta", "2"], ["--target_delta"]),
            ([*PRIVACY, "--learning_rate", "-1"], ["--learning_rate"]),
            ([*PRIVACY, "--learning_rate", "nan"], ["--learning_rate"]),
            ([*PRIVACY, "--save_steps", "inf"], ["--save_steps"]),
            ([*PRIVACY, "--accelerator_config", "nowhere.json"], ["--accelerator_config", "nowhere.json"]),
            ([*PRIVACY, "--lr_scheduler_kwargs", "x"], ["--lr_scheduler_kwargs"]),
            ([*PRIVACY, "--lr_scheduler_kwargs", "{"], ["--lr_scheduler_kwargs"]),
            ([*PRIVACY, "--audit_canaries", "3"], ["--audit_canaries"]),
            ([*PRIVACY, "--seed", "-1"], ["--seed"]),
            ([*PRIVACY, "--evaluation_strategy", "sometimes"], ["sometimes"]),
            ([*PRIVACY, "--per_device_train_batch_size", "0"], ["--per_device_train_batch_size"]),
            ([*PRIVACY, "--gradient_accumulation_steps", "0"], ["--gradient_accumulation_steps"]),
            ([*PRIVACY, "--num_train_epochs", "0", "--max_steps", "-1"], ["--num_train_epochs"]),
            ([*PRIVACY, "--resume_from_checkpoint", "nowhere"], ["--resume_from_checkpoint", "nowhere"]),
            ([*PRIVACY, "--resume_from_checkpoint", "True"], ["--resume_from_checkpoint"]),
            (["--target_epsilon", "1e-9", "--target_delta", "1e-12", "--per_sample_max_grad_norm", "1"], ["--target_epsilon"]),
        ]
    ),
)
def test_mistakes_end_with_status_2_and_name_option_and_remedy(
    checkpoint, comments, tmp_path, monkeypatch, capfd, arguments, words
):
    monkeypatch.chdir(tmp_path)
    status, stderr = run_here(monkeypatch, capfd, *small(checkpoint, comments, tmp_path / "out", *arguments))
    complaint = stderr[stderr.rindex("fine-tune-dp.py: error:") :].strip().splitlines()
    assert status == 2 and len(complaint) <= 2 and "Traceback" not in stderr, stderr
    assert all(word in complaint[0] for word in words), complaint
    assert not Path("out/privacy_ledger.jsonl").exists()


@pytest.mark.integration
def test_a_flood_and_a_very_long_text_are_samples_like_any_other(checkpoint, comments, tmp_path, monkeypatch, capfd):
    """20,000 samples of one author, and a text of 2 MB."""
    rows = [*comments.read_text().splitlines()[:200]]
    rows += [json.dumps({"author": "flood", "content": f"the flood {i}"}) for i in range(20_000)]
    rows += [json.dumps({"author": "long", "content": "a very long text " * 120_000})]
    (tmp_path / "many.jsonl").write_text("\n".join(rows) + "\n")
    arguments = small(checkpoint, tmp_path / "many.jsonl", tmp_path / "out", *PRIVACY, "--eval_fraction", "0")
    status, stderr = run_here(monkeypatch, capfd, *arguments, "--samples_per_author", "4", "--per_device_train_batch_size", "512")
    assert status == 0, stderr
    assert read_report(tmp_path / "out")["num_samples"] > 20_100


@pytest.mark.integration
def test_a_tokenizer_without_pad_or_eos_token_is_fine(checkpoint, comments, tmp_path, monkeypatch, capfd):
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    assert bare.pad_token is None and bare.eos_token is None
    AutoModelForCausalLM.from_pretrained(checkpoint).save_pretrained(tmp_path / "model")
    bare.save_pretrained(tmp_path / "model")
    status, stderr = run_here(monkeypatch, capfd, *small(tmp_path / "model", comments, tmp_path / "out", *PRIVACY))
    assert status == 0, stderr


def test_a_tokenizer_larger_than_the_model_is_refused(checkpoint, comments, tmp_path, monkeypatch, capfd):
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    model.resize_token_embeddings(500)
    model.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(checkpoint).save_pretrained(tmp_path / "model")
    status, stderr = run_here(monkeypatch, capfd, *small(tmp_path / "model", comments, tmp_path / "out", *PRIVACY))
    assert status == 2 and "500 embeddings" in stderr and "Traceback" not in stderr


@pytest.mark.integration
def test_a_model_that_is_broken_is_refused(checkpoint, comments, tmp_path, monkeypatch, capfd):
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    model.transformer.ln_f.weight.data[3] = float("nan")
    model.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(checkpoint).save_pretrained(tmp_path / "model")
    status, stderr = run_here(monkeypatch, capfd, *small(tmp_path / "model", comments, tmp_path / "out", *PRIVACY))
    assert status == 2 and "--model_name: transformer.ln_f.weight holds weights that are not finite" in stderr


@pytest.mark.integration
def test_several_processes_complain_once(checkpoint, comments, tmp_path):
    done = run_script(*small(checkpoint, comments, tmp_path / "out", *PRIVACY, "--text_column", "body"), processes=2)
    assert done.returncode != 0 and done.stderr.count("fine-tune-dp.py: error:") == 1
    assert "--text_column" in done.stderr and not Path(tmp_path / "out/privacy_ledger.jsonl").exists()


def test_help_lists_the_options(monkeypatch, capfd):
    monkeypatch.setattr(sys, "argv", ["fine-tune-dp.py", "--help"])
    with pytest.raises(SystemExit) as exit_:
        runpy.run_path(str(ROOT / "fine-tune-dp.py"), run_name="__main__")
    assert exit_.value.code == 0
    assert {"--target_epsilon", "--train_file", "--enable_lora", "--samples_per_author"} <= set(capfd.readouterr().out.split())


# --- the demo -------------------------------------------------------------------------------------------


def test_the_demo_is_what_its_script_makes():
    sys.path.insert(0, str(ROOT / "demo"))
    from make_corpus import make_corpus

    comments = [json.loads(line) for line in (ROOT / "demo" / "comments.jsonl").read_text().splitlines()]
    made = make_corpus("private", authors=20_000, seed=7)
    assert comments == [{name: row[name] for name in ("author", "content")} for row in made]
    sizes = pd.Series([comment["author"] for comment in comments]).value_counts()
    assert len(sizes) == 20_000 and (sizes <= 2).mean() > 0.7 and (sizes > 100).sum() >= 3
    assert sum(path.stat().st_size for path in (ROOT / "demo").rglob("*") if path.is_file()) < 10e6


@pytest.mark.integration
def test_the_demo_learns(tmp_path):
    """A tenth of the README's demo, from the same files, at the same epsilon."""
    demo = ["--model_name", str(ROOT / "demo/model"), "--train_file", str(ROOT / "demo/comments.jsonl"), "--sequence_len", "64"]
    done = run_script(*demo, *PRIVACY, "--output_dir", str(tmp_path / "out"), "--max_steps", "8", "--max_eval_samples", "300",
                      "--per_device_train_batch_size", "128", "--gradient_accumulation_steps", "4", "--learning_rate", "5e-3",
                      "--lr_scheduler_type", "constant", "--disable_tqdm", "True")  # fmt: skip
    assert done.returncode == 0, done.stderr
    before, after = (float(loss) for loss in re.findall(r"'eval_loss': '?([\d.]+)", done.stdout))
    assert after < before - 1
    said = re.search(r"Evaluation loss before training: (\d+\.\d\d)$", done.stderr, re.MULTILINE)
    assert float(said[1]) == pytest.approx(before, abs=0.01)
    assert read_report(tmp_path / "out")["epsilon"] <= 8.0
