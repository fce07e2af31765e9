"""Whole runs of fine-tune-dp.py on data of one's own, resumed, and with each kind of model."""

import gc
import json
import re
import runpy
import socket
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT, flat, read_report, run_script
from peft import PeftModel
from script_runs import PRIVACY, Program, run_here, small
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_fine_tune_dp import FULL, LORA
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
    Qwen2Config,
    Qwen3Config,
    T5Config,
    T5ForConditionalGeneration,
)

from author_dp.accounting.accountant import find_noise_multiplier
from author_dp.cli import load_config_args

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


@pytest.mark.parametrize(
    ("value", "words"),
    [("hybrid_shard", "give full_shard"), ("auto_wrap", "give full_shard"), ("full_shard", "torch.distributed.run")],
)
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


@pytest.mark.integration
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
@pytest.mark.parametrize(
    ("family", "lora"),
    [
        ("pythia", []),
        ("opt", ["--enable_lora"]),
        ("llama", []),
        ("mistral", ["--enable_lora"]),
        ("qwen2", []),
        ("qwen3", ["--enable_lora"]),
    ],
)
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
    arguments = ["-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1", "--rdzv_id", "7"]
    arguments += ["--rdzv_backend", "c10d", "--rdzv_endpoint", endpoint, str(ROOT / "fine-tune-dp.py")]
    arguments += small(checkpoint, comments, tmp_path / "out", *PRIVACY)
    nodes = [Program(*arguments) for _ in range(2)]
    ended = [node.wait(240) for node in nodes]
    outputs = [node.stderr for node in ended]
    assert [node.returncode for node in ended] == [0, 0], outputs
    assert "".join(outputs).count("so noise dominates") == 1  # advice is given once, whatever the number of processes
    report = read_report(tmp_path / "out")
    assert report["world_size"] == 2 and report["expected_batch_size"] == 16 and report["steps"] == 3
