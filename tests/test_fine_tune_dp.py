"""fine-tune-dp.py by its command line, as a user would run it."""

import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import read_report, run_script
from peft import PeftModel
from script_runs import PRIVACY, run_here
from transformers import AutoModelForCausalLM, AutoTokenizer

from author_dp.accounting.accountant import compute_epsilon
from author_dp.accounting.ledger import PrivacyLedger

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
