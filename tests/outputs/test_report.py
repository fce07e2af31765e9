"""report.py, html_page.py, model_card.py: what page and card say, from the ledger; the card tells nothing private."""

import html
import json
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from conftest import make_dataset, make_trainer, read_report
from matplotlib.image import imread
from mutation import catches

from author_dp.accounting.accountant import compute_epsilon, format_epsilon
from author_dp.accounting.events import MechanismEvent
from author_dp.accounting.ledger import PrivacyLedger
from author_dp.cli import command_line
from author_dp.errors import UserError
from author_dp.outputs.figures import figure_loss_points, first_steps
from author_dp.outputs.guarantee import (
    format_interrupted_guarantee,
    guarantee_attack_rows,
    guarantee_in_words,
    guarantee_table_rows,
)
from author_dp.outputs.model_card import model_card
from author_dp.outputs.publish import publish
from author_dp.outputs.report import RunStatistics, evaluate_and_sample, report_publish_hint, report_result, write_report
from author_dp.outputs.samples import TextSamples
from author_dp.training.dry_run import DryRun, shorten_for_dry_run
from author_dp.training.loss_release import format_released_loss
from author_dp.wording import format_percent_up


def run(folder, **privacy):
    dataset = make_dataset([1, 2, 3, 70] * 10)
    trainer = make_trainer(
        folder, dataset=dataset, max_steps=4, learning_rate=0.1, eval_strategy="no", logging_steps=1,
        privacy={"noise_multiplier": None, "target_epsilon": 8.0, "samples_per_author": 2, **privacy},
    )  # fmt: skip
    trainer.add_callback(RunStatistics(trainer.norms, np.diff(dataset.offsets)))
    trainer.train()
    trainer.save_model()
    return trainer


@pytest.mark.integration
def test_the_page_shows_the_guarantee_and_the_run(tmp_path):
    trainer = run(tmp_path)
    write_report(tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert f"epsilon {format_epsilon(trainer.epsilon())} at delta 0.025" in page
    assert page.count("data:image/png;base64,") == 5 and page.count("private: do not publish") == 5
    assert "http" not in page.replace("http-equiv", "")  # self-contained
    names = {path.stem for path in (tmp_path / "report").glob("*.png")}
    assert names == {"loss", "epsilon", "samples", "norms", "time"}
    for path in (tmp_path / "report").glob("*.png"):
        assert imread(path)[..., :3].std() > 0.03  # something is drawn
    statistics = json.loads((tmp_path / "_private_statistics.json").read_text())
    assert statistics["samples_per_author"] == {"samples": [1, 2, 3, 70], "authors": [10, 10, 10, 10]}
    assert len(statistics["seconds_per_step"]) == 4 and sum(statistics["norms_over_clip_norm"]["counts"]) > 0


@pytest.mark.integration
@catches("a secret in the report's command", "cli.command_line", "word = option + equals + HIDDEN", "pass")
def test_page_says_what_was_trained_and_by_which_command(tmp_path, monkeypatch):
    typed = ["fine-tune-dp.py", "--train_file", "my <file>.jsonl", "--hub_token", "hf_1", "--hub_tok=hf_2", "--hub-token", "hf_3"]
    monkeypatch.setattr(sys, "argv", typed)
    statistics = RunStatistics(None, np.ones(3, int), command=command_line())
    statistics.on_train_begin(SimpleNamespace(output_dir=str(tmp_path)), SimpleNamespace(is_world_process_zero=True), None)
    run(tmp_path)
    after = {"eval_author_loss": 2.0, "eval_author_loss_stderr": 0.25, "eval_num_authors": 9, "eval_num_texts": 1234}
    statistics.add(str(tmp_path), evaluation={"before": {}, "after": after})
    write_report(tmp_path)
    page = html.unescape((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert "python fine-tune-dp.py --train_file 'my <file>.jsonl' --hub_token HIDDEN --hub_tok=HIDDEN --hub-token HIDDEN" in page
    today = json.loads((tmp_path / "privacy_ledger.jsonl").read_text().splitlines()[0])["started"]
    assert f"<tr><th>Date</th><td>{today}</td></tr>" in page
    assert re.search(r"<th>Settings</th><td>learning_rate 0.1, lr_scheduler_type constant,.* optim sgd, .*bf16 False</td>", page)
    assert re.search(r"<th>Software</th><td>torch \S+, transformers \S+, opacus", page)
    assert re.search(r"a local folder, named in the command \(GPT2LMHeadModel, [\d,]+ parameters, [\d,]+ of them trained\)", page)
    assert "Held out: 9 authors with 1,234 texts. So few" in page and "<td>2.000 \u00b1 0.500</td>" in page


@pytest.mark.parametrize(
    ("epsilon", "strength"),
    [(0.5, "strong"), (1.0, "strong"), (1.001, "reasonable"), (10.0, "reasonable"), (10.01, "weak by itself")],
)
def test_summary_says_what_epsilon_means_for_a_decision(epsilon, strength):
    report = {"disable_dp": False, "epsilon": epsilon, "delta": 1e-5, "tpr_at_fpr": {"0.01": 0.0555, "0.001": 0.00286}}
    words = guarantee_in_words(report)
    assert f"itself), {format_epsilon(epsilon)} is {strength}." in words
    assert (
        "wrongly accuses 1 % of the authors who were not, finds at most 5.6 % of those who were; blind guessing finds 1 %"
        in words
    )
    assert ("Membership inference", "TPR at most 5.6 % at 1 % FPR, at most 0.29 % at 0.1 % FPR") == (
        guarantee_attack_rows(report)[0][0], guarantee_attack_rows(report)[0][1].partition(" (")[0],
    )  # fmt: skip
    assert "this one is large" not in guarantee_in_words({**report, "delta": 1e-5})
    assert "this one is large: 0.0026: it would allow" in guarantee_in_words({**report, "delta": 0.0026})
    for change in ({"disable_dp": True}, {"epsilon": None}, {"interrupted": True}):
        assert guarantee_in_words({**report, **change}) == ""


def test_publishing_is_advised_only_where_it_would_work():
    result = {"epsilon": 3.0, "disable_dp": False}
    assert "author_dp.publish out OUT" in report_publish_hint(result, "out")
    for change in ({"dry_run": True}, {"epsilon": None}, {"interrupted": True}, {"alarm": "noise"}, {"tuning": {"ended": False}}):
        assert report_publish_hint({**result, **change}, "out") == ""


def test_interrupted_report_explains_an_epsilon_of_zero():
    assert "is 0, as they can disclose" in format_interrupted_guarantee({"epsilon": 0.0})
    assert "is 0" not in format_interrupted_guarantee({"epsilon": 0.01})


@catches("fewer are found than can be", "wording.format_percent_up", "math.ceil(", "round(", share=0.0561, words="5.7 %")
@pytest.mark.parametrize(
    ("share", "words"),
    [(0.0555, "5.6 %"), (0.056, "5.6 %"), (0.0561, "5.7 %"), (0.00281, "0.29 %"), (0.01, "1 %"), (1.0, "100 %")],
)
def test_shares_are_rounded_up(share, words):
    assert format_percent_up(share) == words


@catches(
    "evaluation on another scale than training", "outputs.figures.figure_loss_points", "row[AUTHOR_LOSS]", 'row["eval_loss"]'
)
def test_losses_of_training_and_evaluation_are_on_one_scale(tmp_path):
    """Without dropout and learning, all authors in each step with all texts: the loss of training is that of evaluation."""
    dataset = make_dataset([1, 1, 2, 9], seed=3)
    trainer = make_trainer(
        tmp_path, dataset=dataset, max_steps=3, learning_rate=0.0, eval_strategy="no", per_device_train_batch_size=4,
        privacy={"disable_dp": True, "samples_per_author": 9},
    )  # fmt: skip
    metrics = trainer.evaluate(dataset)
    trainer.train()
    training, evaluated = figure_loss_points(trainer.state.log_history, {"before": metrics, "after": metrics})
    assert [step for step, _ in training] == [1, 2, 3] and [step for step, *_ in evaluated] == [0, 3]
    assert [loss for _, loss in training] == pytest.approx([evaluated[0][1]] * 3, abs=1e-4)
    assert abs(metrics["eval_loss"] - evaluated[0][1]) > 1e-3  # the mean over tokens is another
    assert figure_loss_points([{"step": 10, "loss": 2.0}, {"step": 20, "loss": 1.0}], {})[0] == [(5.5, 2.0), (15.5, 1.0)]


@pytest.mark.integration
@catches("every model's text called covered", "outputs.html_page.make_html_page",
    '"specimens", {}), report_has_guarantee(report))', '"specimens", {}), True)', disable_dp=True)  # fmt: skip
@catches("a report for everybody", "outputs.report.write_report", "make_private(path)", "path.touch(mode=0o644)", disable_dp=True)
@pytest.mark.parametrize("disable_dp", [False, True])
def test_the_page_calls_text_covered_where_there_is_a_guarantee_alone(tmp_path, disable_dp):
    run(tmp_path, disable_dp=disable_dp)
    texts = {"free": {"before": ["a"], "after": ["b"]}}
    RunStatistics(None, np.ones(3, int)).add(str(tmp_path), specimens=texts)
    write_report(tmp_path)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert ("covered by the guarantee, as the model" in page) is not disable_dp
    assert (tmp_path / "report.html").stat().st_mode & 0o777 == 0o600


@catches("texts of the run before, perhaps without privacy", "outputs.report.RunStatistics.on_train_begin",
    "unlink(missing_ok=True)", "exists()")  # fmt: skip
def test_nothing_of_an_earlier_run_is_in_the_statistics(tmp_path):
    """One without privacy may have been in the folder before."""
    RunStatistics(None, np.ones(3, int)).add(str(tmp_path), specimens={"free": {"after": ["what an author wrote"]}})
    statistics = RunStatistics(None, np.ones(3, int))
    statistics.before = {"specimens": {"free": {"before": ["a"]}}}
    statistics.on_train_begin(SimpleNamespace(output_dir=str(tmp_path)), SimpleNamespace(is_world_process_zero=True), None)
    assert json.loads((tmp_path / "_private_statistics.json").read_text()) == statistics.before


@catches("statistics for everybody", "outputs.report.RunStatistics.add", "private=True", "private=False")
def test_what_was_found_before_training_outlives_an_interruption(tmp_path):
    statistics, args = RunStatistics(None, np.ones(3, int)), SimpleNamespace(output_dir=str(tmp_path))
    statistics.before = {"evaluation": {"before": {"eval_loss": 3.0}}, "specimens": {"free": {"before": ["a"]}}}
    statistics.on_train_begin(args, SimpleNamespace(is_world_process_zero=True), None)
    resumed = RunStatistics(None, np.ones(3, int))
    resumed.on_train_begin(args, SimpleNamespace(is_world_process_zero=True), None)
    resumed.add(str(tmp_path), evaluation={"after": {"eval_loss": float("nan")}}, specimens={"free": {"after": ["b"]}})
    path = tmp_path / "_private_statistics.json"
    assert json.loads(path.read_text()) == {
        "evaluation": {"before": {"eval_loss": 3.0}, "after": {"eval_loss": None}},
        "specimens": {"free": {"before": ["a"], "after": ["b"]}},
    }
    assert path.stat().st_mode & 0o777 == 0o600


class Tokenizer:
    """Each token is a word."""

    bos_token_id, eos_token_id = 0, 0

    def batch_decode(self, rows, **options):
        return [" ".join(f"w{token}" for token in row) for row in rows]


def report_run(folder, held_out, text_samples=None, release=None, resume=False):
    """The calls of fine-tune-dp.py."""
    dataset = make_dataset([1, 2, 3] * 10)
    trainer = make_trainer(folder, dataset=dataset, max_steps=2, eval_strategy="no", eval_dataset=held_out, save_steps=1,
                           save_strategy="steps", resume_from_checkpoint=resume)  # fmt: skip
    statistics = RunStatistics(trainer.norms, np.diff(dataset.offsets), text_samples)
    trainer.add_callback(statistics)
    if not resume:
        evaluate_and_sample(trainer, statistics, "before")
    trainer.train()
    metrics = evaluate_and_sample(trainer, statistics, "after")
    trainer.save_model()
    report_result(trainer, statistics, release)
    return trainer, metrics


@pytest.mark.integration
def test_report_of_a_run_holds_evaluations_and_texts(tmp_path, capsys):
    held_out = make_dataset([2] * 9, seed=1)
    trainer, metrics = report_run(tmp_path, held_out, TextSamples(Tokenizer(), held_out, 16))
    found = json.loads((tmp_path / "_private_statistics.json").read_text())
    assert found["evaluation"]["after"]["eval_loss"] == metrics["eval_loss"] != found["evaluation"]["before"]["eval_loss"]
    assert all({"before", "after"} <= texts.keys() for texts in found["specimens"].values()) and len(found["specimens"]) == 2
    page = (tmp_path / "report.html").read_text()
    assert f"{metrics['eval_author_loss']:,.3f}" in page and page.count("<details>") == 2
    last = capsys.readouterr().out.splitlines()[-1]
    assert (
        last.startswith(f"epsilon {format_epsilon(trainer.epsilon())} at delta")
        and "author-level" in (tmp_path / "README.md").read_text()
    )
    assert last.endswith(f", eval loss {metrics['eval_loss']:.2f}, saved to {tmp_path}")
    # Resumed after its last step: what was found before training stays.
    _, again = report_run(tmp_path, held_out, TextSamples(Tokenizer(), held_out, 16), resume=True)
    assert again["eval_loss"] == metrics["eval_loss"]
    found_again = json.loads((tmp_path / "_private_statistics.json").read_text())
    assert found_again["evaluation"]["before"] == found["evaluation"]["before"] and "free" in found_again["specimens"]


@pytest.mark.integration
def test_last_line_shows_a_released_loss_instead_of_the_exact_one(tmp_path, capsys):
    release = {"loss": 3.5, "authors": 9, "range": [0, 4.0], "standard_error": 0.1, "epsilon": 0.5}
    _, metrics = report_run(tmp_path, make_dataset([2] * 9, seed=1), release=release)
    last = capsys.readouterr().out.splitlines()[-1]
    assert f", {format_released_loss(release)}, both public, saved to" in last and f"{metrics['eval_loss']:.2f}" not in last


@pytest.mark.integration
def test_without_held_out_authors_a_run_is_reported_too(tmp_path, capsys):
    _, metrics = report_run(tmp_path, None)
    assert metrics == {} and "eval loss" not in capsys.readouterr().out
    found = json.loads((tmp_path / "_private_statistics.json").read_text())
    assert found["evaluation"] == {"before": {}, "after": {}} and "specimens" not in found


def test_the_card_holds_public_values_only(tmp_path):
    trainer = run(tmp_path)
    trainer.run_report.audit = {"epsilon_lower_bound": 0.5, "confidence": 0.95, "correct": 60, "guesses": 100, "canaries": 200}
    text = model_card(trainer.privacy_report())
    assert "differential-privacy" in yaml.safe_load(text.split("---")[1])["tags"]
    assert "760" not in re.sub(r"\d\.\d+", "", text)  # the number of samples
    assert "loss" not in text.lower() and "60 of 100" in text and f"{trainer.plan.noise_multiplier:.6g}" in text


def test_values_stay_in_their_cell_of_the_card():
    report = {"disable_dp": True, "epsilon": None, "num_authors": 3, "data": {"dataset": "{{ 7 * 7 }} | a\n# b"}}
    assert "| dataset | {{ 7 * 7 }} \\| a # b |" in model_card(report)


def test_the_trainer_writes_this_card_and_not_its_own(tmp_path):
    trainer = run(tmp_path)
    trainer.create_model_card()
    assert "author-level-dp" in (tmp_path / "README.md").read_text()


@pytest.mark.integration
def test_epsilon_comes_from_the_ledger(tmp_path):
    trainer = run(tmp_path)
    ledger = PrivacyLedger(tmp_path / "privacy_ledger.jsonl")
    ledger.start_run({key: value for key, value in ledger.runs[0].items() if key != "record"})
    for _ in range(20):
        ledger.record_step()
    write_report(tmp_path)
    page = (tmp_path / "report.html").read_text()
    found = re.search(r"<tr><th>Epsilon</th><td>([\d.]+)</td>", page)
    expected = compute_epsilon(trainer.plan.noise_multiplier, trainer.plan.sample_rate, 24, trainer.plan.delta)
    assert float(found[1]) == expected and "<td>24</td>" in page


def test_without_privacy_nothing_is_promised(tmp_path):
    trainer = run(tmp_path, target_epsilon=None, disable_dp=True)
    write_report(tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert "without a privacy guarantee" in page and "--disable_dp" in page and page.count("data:image") == 3
    assert guarantee_table_rows(trainer.privacy_report())[0][1].startswith("none")
    without_noise = {**trainer.privacy_report(), "disable_dp": False, "delta": 0.01, "samples_per_author": 1}
    for report in (trainer.privacy_report(), without_noise):  # neither by --disable_dp nor by --noise_multiplier 0
        text = model_card(report)
        assert "differential-privacy" not in text and "# Fine-tuned without a privacy guarantee" in text


def test_first_steps_of_several_runs(tmp_path):
    ledger = PrivacyLedger(tmp_path / "privacy_ledger.jsonl")
    for sigma in (1.0, 2.0):
        ledger.start_run({"noise_multiplier": sigma, "sample_rate": 0.1, "noise_bands": int(sigma)})
        for _ in range(5):
            ledger.record_step()
    assert first_steps(ledger, 8) == [MechanismEvent(1.0, 0.1, 5), MechanismEvent(2.0, 0.2, 2)]
    assert (
        first_steps(ledger, 3) == [MechanismEvent(1.0, 0.1, 3), MechanismEvent(2.0, 0.2, 0)]
        and first_steps(ledger, 10) == ledger.events
    )


def test_a_folder_without_a_run_is_named(tmp_path):
    with pytest.raises(UserError, match="OUTPUT_DIR"):
        write_report(tmp_path)


def test_dry_run_gets_no_card_of_a_finished_model_and_is_not_published(tmp_path, capsys):
    folder, dataset = tmp_path / "dry", make_dataset([1, 2, 3] * 10)
    trainer = make_trainer(folder, dataset=dataset, max_steps=50)
    shorten_for_dry_run(args := SimpleNamespace(push_to_hub=True), has_evaluation=False)
    assert not args.push_to_hub
    trainer.add_callback(DryRun(trainer))
    trainer.train()
    trainer.save_model()
    report_result(trainer, RunStatistics(None, np.ones(3, int)))
    assert read_report(folder)["dry_run"] and read_report(folder)["steps"] == 2
    assert not (folder / "README.md").exists()
    assert capsys.readouterr().out.splitlines()[-1].startswith("dry run, not a finished model: epsilon ")
    page = (folder / "report.html").read_text()
    assert "is a dry run" in page and "What this means for a decision" not in page
    with pytest.raises(UserError, match="--dry_run, not a finished model"):
        publish(folder, tmp_path / "out")
