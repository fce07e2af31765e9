"""fine-tune-dp.py: what the user can mend ends in a line or two, and the demo."""

import json
import re
import runpy
import sys
from pathlib import Path

import pandas as pd
import pytest
from conftest import ROOT, read_report, run_script, sample
from script_runs import PRIVACY, run_here, small
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

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


@pytest.mark.integration
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


@pytest.mark.integration
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
