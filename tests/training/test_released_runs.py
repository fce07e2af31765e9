"""loss_release.py: options, whole runs, and models that held-out authors chose."""

import json
import math

import pytest
from conftest import MODELS, make_dataset, make_trainer, read_report, run_script, tiny_gpt2
from mutation import catches
from script_runs import PRIVACY, run_here, small
from test_ledger import make_ledger
from test_loss_release import with_eval_data

from author_dp.accounting.ledger import PrivacyLedger
from author_dp.errors import UserError
from author_dp.outputs.guarantee import guarantee_table_rows
from author_dp.training.loss_release import release_eval_loss
from data_utils import DataArguments, load_train_and_eval

# --- options and complete runs ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--release_eval_epsilon", "0"], "--release_eval_epsilon 0.0"),
        (["--release_eval_epsilon", "nan"], "--release_eval_epsilon nan"),
        (["--release_eval_epsilon", "1e-310"], "--release_eval_epsilon 1e-310"),  # its noise would overflow
        (["--release_eval_epsilon", "1", "--release_eval_range", "1e308"], "--release_eval_range 1e+308"),
        (["--release_eval_range", "5"], "--release_eval_range"),
        (["--release_eval_epsilon", "1", "--eval_fraction", "0"], "--eval_fraction above 0"),
        (["--release_eval_epsilon", "1", "--save_strategy", "best", "--eval_strategy", "epoch"], "--save_strategy best"),
        (["--release_eval_epsilon", "1", "--lr_scheduler_type", "reduce_lr_on_plateau", "--eval_strategy", "epoch"],
         "--lr_scheduler_type reduce_lr_on_plateau"),
        (["--release_eval_epsilon", "1", "--load_best_model_at_end", "--eval_strategy", "epoch", "--save_strategy", "epoch"],
         "--load_best_model_at_end"),
    ],
)  # fmt: skip
def test_check_release_refuses_what_no_epsilon_covers(tmp_path, monkeypatch, capfd, options, named):
    status, stderr = run_here(monkeypatch, capfd, *small("model", "data.jsonl", tmp_path, *PRIVACY, *options))
    assert status == 2 and named in stderr and "Traceback" not in stderr, stderr


def test_check_release_requires_privacy(tmp_path, monkeypatch, capfd):
    options = ["--disable_dp", "--release_eval_epsilon", "1"]
    status, stderr = run_here(monkeypatch, capfd, *small("model", "data.jsonl", tmp_path, *options))
    assert status == 2 and "--disable_dp" in stderr


@pytest.mark.integration
@pytest.mark.parametrize("processes", [0, 2])
def test_script_prints_only_the_released_loss(checkpoint, comments, tmp_path, processes):
    done = run_script(*small(checkpoint, comments, tmp_path, *PRIVACY, "--release_eval_epsilon", "2"), processes=processes)
    assert done.returncode == 0, done.stderr
    report, ledger = read_report(tmp_path), PrivacyLedger(tmp_path / "privacy_ledger.jsonl")
    found = report["evaluation_release"]
    last = done.stdout.strip().splitlines()[-1]
    assert found == ledger.current_release and report["epsilon_with_evaluation"] == max(report["epsilon"], 2.0)
    assert "both public" in last and "eval loss" not in last
    words = dict(guarantee_table_rows(report))["Evaluation, public"]
    assert words in (tmp_path / "README.md").read_text() and words in last


@pytest.mark.integration
def test_release_on_a_validation_file_adds_up(checkpoint, comments, tmp_path):
    some = tmp_path / "some.jsonl"
    some.write_text("".join(comments.read_text().splitlines(keepends=True)[:100]))
    options = small(checkpoint, comments, tmp_path, *PRIVACY, "--release_eval_epsilon", "2", "--validation_file", str(some))
    done = run_script(*options, "--allow_shared_authors")
    assert done.returncode == 0, done.stderr
    report = read_report(tmp_path)
    assert report["epsilon_with_evaluation"] == report["epsilon"] + 2.0


def test_release_range_defaults_to_the_log_of_the_vocabulary(tmp_path):
    for kind, options in MODELS.items():
        trainer = with_eval_data(make_trainer(tmp_path / kind, tiny_gpt2(**options)), make_dataset([1]))
        assert release_eval_loss(trainer, 1.0, None, limited=False)["range"][1] == pytest.approx(math.log(61)), kind


@catches("held-out rows that others move up into", "data_utils.load_train_and_eval",
    "subsample_split_authors if eval_is_public else", "")  # fmt: skip
def test_max_eval_samples_limits_authors_for_a_release(tmp_path):
    path = tmp_path / "data.jsonl"
    rows = [{"author": f"a{i % 50}", "content": f"text {i}"} for i in range(500)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = DataArguments(train_file=[str(path)], eval_fraction=0.5, max_eval_samples=7)
    _, texts_taken = load_train_and_eval(arguments, seed=1)
    _, authors_taken = load_train_and_eval(arguments, seed=1, eval_is_public=True)
    assert len(texts_taken) == 10 * len(set(texts_taken["author"])) <= 20
    assert len(authors_taken) == 70 and len(set(authors_taken["author"])) == 7


@pytest.mark.parametrize("epsilon", [-5.0, 0.0, math.inf, math.nan])
def test_record_release_writes_no_invalid_epsilon(tmp_path, epsilon):
    ledger = make_ledger(tmp_path)
    content = ledger.path.read_bytes()
    with pytest.raises(ValueError, match="must be above 0 and finite"):
        ledger.record_release({"epsilon": epsilon, "split": None})
    assert ledger.path.read_bytes() == content and ledger.releases == PrivacyLedger(ledger.path).releases == []


@pytest.mark.parametrize("epsilon", [-5.0, 0.0, math.inf, math.nan])
def test_ledger_refuses_a_release_that_gives_privacy_back(tmp_path, epsilon):
    ledger = make_ledger(tmp_path)
    ledger._chain.append({"record": "release", "epsilon": epsilon, "split": None})  # as another program would write it
    with pytest.raises(UserError, match="was changed"):
        PrivacyLedger(ledger.path)


def test_start_run_writes_no_invalid_header(tmp_path):
    ledger = make_ledger(tmp_path)
    content = ledger.path.read_bytes()
    with pytest.raises(KeyError):
        ledger.start_run({"noise_multiplier": 1.0})
    assert ledger.path.read_bytes() == content
