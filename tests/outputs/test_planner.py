"""The planner: its noise is that of a run, its command runs, and more of anything never makes its best setting worse."""

import json
import runpy
import shlex
import sys

import numpy as np
import pytest
from conftest import ROOT, make_dataset, make_trainer, run_script, tiny_gpt2
from mutation import catches

from author_dp.accounting.banded_mf import banded_error_ratio
from author_dp.accounting.plan import make_plan
from author_dp.accounting.run_planning import format_planning_advice
from author_dp.cli import parse_options
from author_dp.errors import UserError
from author_dp.outputs import planner
from author_dp.outputs.planner_command import without_planner_options
from author_dp.training.dry_run import DryRun

pytestmark = pytest.mark.integration  # each plan calibrates several noise multipliers exactly

ASKED = ["--authors", "3000", "--target_epsilon", "8", "--parameters", "4e5"]
IN_TIME = ["--hours", "0.5", "--seconds_per_author", "0.25"]  # 7,200 authors in all batches


def plan(capsys, *words: str) -> dict:
    """Return what the planner prints as JSON."""
    place = words.index("--") if "--" in words else len(words)
    capsys.readouterr()  # what was printed before
    planner.main([*words[:place], "--json", *words[place:]])
    printed = capsys.readouterr().out
    return json.loads(printed[printed.index("{\n") :])


@pytest.fixture
def few_rows(monkeypatch):
    monkeypatch.setattr(planner, "ROWS", 2)


def plan_of_run(words: list[str]):
    """Return the plan of a run with these options, on 3,000 authors."""
    script = runpy.run_path("fine-tune-dp.py", run_name="options")
    parsed = {type(group).__name__: group for group in parse_options(script["GROUPS"], words)}
    args = parsed["TrainingArguments"]
    return make_plan(parsed["PrivacyArguments"], args, np.arange(3_001)), args


@catches(
    "the planner ignores the bands",
    "accounting.run_planning.calibrate_planned_run",
    "setting.steps, setting.bands)",
    "setting.steps, 1)",
)
@catches(
    "the planner takes another delta", "accounting.run_planning.calibrate_planned_run", "epsilon, task.delta)", "epsilon, 1e-9)"
)
def test_noise_and_error_are_those_of_the_run(capsys, few_rows):
    report = plan(capsys, *ASKED, *IN_TIME)
    best, run = report["rows"][0], plan_of_run(shlex.split(report["command"])[2:])
    made, args = run
    assert best["best"] and best["noise_bands"] == made.noise_bands > 1
    assert (best["expected_batch"], best["steps"], best["noise_multiplier"]) == (
        made.expected_batch_size,
        made.steps,
        made.noise_multiplier,
    )
    assert best["noise_per_step"] == made.noise_multiplier / made.expected_batch_size
    ratio = banded_error_ratio(made.noise_multiplier, made.sample_rate, made.steps, made.noise_bands, 8.0, made.delta)
    assert best["sum_error_ratio"] == pytest.approx(ratio, rel=1e-12)
    impulses = np.linalg.inv(
        sum(c * np.eye(made.steps, k=-i) for i, c in enumerate(made.coefficients()))
    )  # C^-1; row sums are the noise of sums of updates
    error = np.sqrt((np.cumsum(impulses, axis=0) ** 2).sum(1).mean()) * made.noise_multiplier / made.expected_batch_size
    assert best["sum_error"] == pytest.approx(error, rel=1e-9)
    assert args.learning_rate == best["learning_rate"]


def test_json_has_the_table_and_the_command(capsys, few_rows):
    report = plan(capsys, *ASKED, *IN_TIME, "--", "--train_file", "mine.jsonl", "--sequence_len=64")
    assert set(report) == {
        "task",
        "no_ground",
        "from_private_texts",
        "memory_is_measured",
        "trained_is_estimated",
        "rows",
        "command",
    }
    best, second = report["rows"]
    assert set(best) == {
        "best", "expected_batch", "steps", "noise_bands", "learning_rate", "noise_multiplier", "noise_per_step", "sum_error",
        "sum_error_ratio", "share", "share_low", "share_high", "gain", "minutes", "memory_gib",
    }  # fmt: skip
    assert best["best"] and not second["best"] and best["gain"] >= second["gain"]
    assert 0 <= best["share_low"] <= best["share"] <= best["share_high"] <= 1
    assert best["minutes"] == pytest.approx(best["expected_batch"] * best["steps"] * 0.25 / 60) and best["minutes"] <= 30
    assert report["task"]["delta"] == 1 / 3000 and report["no_ground"] is None and not report["from_private_texts"]
    assert "--train_file mine.jsonl --sequence_len=64" in report["command"] and "FILE" not in report["command"]
    from_hub = plan(capsys, *ASKED, *IN_TIME, "--", "--dataset_name", "me/data")["command"]
    assert "--dataset_name me/data" in from_hub and "--train_file" not in from_hub


def test_more_time_than_was_measured_is_left(capsys, few_rows):
    report = plan(capsys, *ASKED, "--hours", "1000", "--seconds_per_author", "0.001")
    assert report["no_ground"] is None and report["command"]
    assert all(row["expected_batch"] * row["steps"] <= planner.MAX_SAMPLED for row in report["rows"])
    planner.main([*ASKED, "--hours", "1000", "--seconds_per_author", "0.001"])
    out = capsys.readouterr().out
    assert "There is time for more" in out and "predicted alike" in out
    report["rows"][0]["share"] -= 0.1
    assert "predicted alike" not in planner.format_planner_report(report)


def test_adapters_of_a_number_of_parameters_are_estimated(capsys, few_rows):
    """SmolLM2-135M has 2,442,240 parameters in adapters of rank 8 on all linear layers."""
    words = ["--authors", "3000", "--target_epsilon", "8", "--parameters", "134515008", "--enable_lora", "--lora_target_modules"]
    report = plan(capsys, *words, "all-linear")
    assert report["trained_is_estimated"] and 1.2e6 < report["task"]["trained"] < 4e6
    given = plan(capsys, *words, "all-linear", "--trained_parameters", "2442240")
    assert not given["trained_is_estimated"] and given["task"]["trained"] == 2_442_240


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--authors", "3000", "--target_epsilon", "8", "--parameters", "70e9"], "a model of 70,000,000,000"),
        (["--authors", "3000", "--target_epsilon", "50", "--parameters", "4e5"], "an epsilon of 50"),
        (["--authors", "90000000", "--target_epsilon", "8", "--parameters", "4e5"], "authors: 90,000,000"),
    ],
)
def test_without_ground_nothing_is_predicted(capsys, monkeypatch, words, reason):
    monkeypatch.setattr(planner, "ROWS", 1)
    report = plan(capsys, *words)
    (row,) = report["rows"]
    assert reason in report["no_ground"] and report["command"] is None and not row["best"]
    assert row["share"] is row["share_low"] is row["gain"] is row["learning_rate"] is None and row["noise_multiplier"] > 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--authors", "3000", "--parameters", "4e5"], "--target_epsilon: missing"),
        (["--target_epsilon", "8"], "--authors: missing"),
        (["--authors", "3000", "--target_epsilon", "8"], "--model, --parameters: the model's size is missing"),
        ([*ASKED, "--hours", "2"], "--hours: how many steps fit is unknown"),
        ([*ASKED, "--seconds_per_author", "2"], "--seconds_per_author: it limits nothing"),
        ([*ASKED, "--hours", "-1", "--seconds_per_author", "2"], "--hours -1.0: out of range"),
        ([*ASKED, "--hours", "nan", "--seconds_per_author", "2"], "--hours nan: out of range"),
        ([*ASKED, "--hours", "0.001", "--seconds_per_author", "2"], "--hours: not even the smallest batch"),
        ([*ASKED, "--model", "here"], "they exclude each other"),
        (["--authors", "3000", "--target_epsilon", "8", "--model", "no-such-model"], "--model no-such-model"),
        (["--from_dry_run", "nowhere"], "--from_dry_run nowhere: it holds no dry run"),
        ([*ASKED, "--colour", "red"], "unknown option --colour"),
        ([*ASKED, "--authors", "many"], "--authors"),
        ([*ASKED, "--authors", "1"], "--authors 1: out of range"),
        ([*ASKED, "--target_delta", "0.5"], "--target_delta 0.5"),
        ([*ASKED, *IN_TIME, "--", "--max_steps", "3"], "--max_steps, after --"),
        ([*ASKED, *IN_TIME, "--", "--sampling", "balls-in-bins"], "--sampling, after --: the run would not be the planned one"),
        ([*ASKED, *IN_TIME, "--", "--sample_rate=0.5"], "--sample_rate, after --: the run would not be"),
        ([*ASKED, *IN_TIME, "--", "--config", "run.yaml"], "--config, after --: the run would not be"),
        ([*ASKED, *IN_TIME, "--", "--lora_r", "4"], "--lora_r, after --: it changes what is trained"),
        ([*ASKED, *IN_TIME, "--", "--enable_lora"], "--enable_lora, after --: it changes what is trained"),
        ([*ASKED, "--trained_parameters", "1e4"], "--trained_parameters: without --enable_lora"),
        ([*ASKED, "--trained_parameters", "1e7", "--enable_lora"], "--trained_parameters: it is a part of --parameters"),
    ],
)
def test_errors_name_the_option(words, message, few_rows):
    with pytest.raises(UserError, match=message) as error:
        planner.main(words)
    assert "\n" not in str(error.value)


def test_a_dry_run_gives_times_memory_and_the_rest_of_the_command(tmp_path, capsys, few_rows):
    folder = tmp_path / "dry"
    privacy = {"noise_multiplier": None, "target_epsilon": 8.0, "target_delta": 1e-3}
    trainer = make_trainer(
        folder, tiny_gpt2(), make_dataset([1] * 400), privacy=privacy, max_steps=100, optim="adamw_torch", learning_rate=1e-3
    )
    trainer.add_callback(dry_run := DryRun(trainer))
    trainer.train()
    trainer.save_model()
    write_dry_run_command(folder, "fine-tune-dp.py", *"--enable_lora --max_steps 100 --optim adamw_torch --bf16".split())
    assert "Planner: it predicts nothing here (a model of" in dry_run.advice()
    measured, report = json.loads((folder / "_dry_run.json").read_text()), json.loads((folder / "privacy.json").read_text())
    assert (folder / "_dry_run.json").stat().st_mode & 0o077 == 0 and measured["authors_at_once"] == 4
    rewrite(folder / "privacy.json", settings={**report["settings"], "parameters": 400_000, "trained_parameters": 400_000})
    report = plan(capsys, "--from_dry_run", str(folder))
    assert report["from_private_texts"] and report["memory_is_measured"] and measured["planned_steps"] == 100
    assert report["task"]["max_sampled"] == 400 and report["task"]["num_authors"] == 400 and report["task"]["delta"] == 1e-3
    row = report["rows"][0]
    assert row["minutes"] == pytest.approx(measured["seconds_per_step"] / 4 * row["expected_batch"] * row["steps"] / 60)
    assert row["memory_gib"] >= measured["peak_gib"]
    assert report["command"].endswith("--enable_lora --optim adamw_torch --bf16") and "dry" not in report["command"]
    assert all(word not in report["command"] for word in ("MODEL", "FILE", "constant"))  # those of the dry run stay
    planner.main(["--from_dry_run", str(folder)])
    assert "from private texts" in capsys.readouterr().out


def rewrite(path, **values) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def write_dry_run_command(folder, program: str, *words: str) -> None:
    command = shlex.join(["python", program, "--dry_run", "--output_dir", "dry", *words])
    (folder / "_private_statistics.json").write_text(json.dumps({"command": command}))


@pytest.fixture
def tried(tmp_path):
    """The files of a dry run: 4,000 authors, 2 at once in each of 4 processes."""
    settings = {"parameters": 400_000, "trained_parameters": 400_000, "optim": "adamw_torch"}
    public = {"num_authors": 4000, "target_epsilon": 8.0, "delta": 1e-4, "noise_bands": 1, "expected_batch_size": 16}
    public |= {"world_size": 4, "samples_per_author": 1, "settings": settings}
    (tmp_path / "privacy.json").write_text(json.dumps(public))
    measured = {"seconds_per_step": 1.6, "peak_gib": 1.0, "planned_steps": 64, "authors_at_once": 2}
    (tmp_path / "_dry_run.json").write_text(json.dumps(measured))
    write_dry_run_command(tmp_path, "fine-tune-dp.py", "--train_file", "mine.jsonl", "--sampling", "auto")
    return tmp_path


@catches("the planner forgets the processes", "outputs.planner_command.options_of_planner", "// costs.processes", "// 1")
def test_the_command_of_a_dry_run_is_of_its_processes_and_memory(tried, capsys, few_rows):
    report = plan(capsys, "--from_dry_run", str(tried))
    words = shlex.split(report["command"])
    value = dict(zip(words, words[1:]))
    assert (
        words[:5] == ["python", "-m", "torch.distributed.run", "--nproc_per_node", "4"] and value["--train_file"] == "mine.jsonl"
    )
    at_once, steps = (int(value[f"--{name}"]) for name in ("per_device_train_batch_size", "gradient_accumulation_steps"))
    assert at_once == 2 and at_once * steps * 4 == report["rows"][0]["expected_batch"] and "--sampling" not in words
    assert value["--train_file"] == "mine.jsonl"
    rewrite(tried / "privacy.json", world_size=3)
    with pytest.raises(UserError, match="3 processes divide no batch"):
        planner.main(["--from_dry_run", str(tried)])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--enable_lora"], "--enable_lora: the dry run says"),
        (["--model", "here"], "they exclude each other"),
        (["--parameters", "1e6"], "they exclude each other"),
    ],
)
def test_a_dry_run_is_of_one_model(tried, words, message):
    with pytest.raises(UserError, match=message):
        planner.main(["--from_dry_run", str(tried), *words])


def test_a_dry_run_that_cannot_be_planned_is_refused(tried, capsys, few_rows):
    public = json.loads((tried / "privacy.json").read_text())
    for changed, name in (
        ({"samples_per_author": 4}, "--samples_per_author 4"),
        ({"settings": {**public["settings"], "optim": "sgd"}}, "--optim sgd"),
    ):
        rewrite(tried / "privacy.json", **changed)
        with pytest.raises(UserError, match=name):
            planner.main(["--from_dry_run", str(tried)])
        rewrite(tried / "privacy.json", **public)
    write_dry_run_command(tried, "fine-tune-dp.py", "--config", "run.yaml")
    with pytest.raises(UserError, match="its command has --config"):
        planner.main(["--from_dry_run", str(tried)])
    write_dry_run_command(tried, "mine.py")
    assert plan(capsys, "--from_dry_run", str(tried))["command"] is None
    planner.main(["--from_dry_run", str(tried)])
    assert "No command: the dry run was not one of fine-tune-dp.py" in capsys.readouterr().out


def test_the_dry_run_advises(tmp_path):
    privacy = {"noise_multiplier": None, "target_epsilon": 8.0, "target_delta": 1e-3}
    trainer = make_trainer(
        tmp_path, tiny_gpt2(), make_dataset([1] * 400), privacy=privacy, max_steps=100, optim="adamw_torch", learning_rate=1e-6
    )
    advice = format_planning_advice(trainer.plan, 1e-6, 400_000, 400_000, is_lora=False)
    assert advice.startswith("Planner: these settings are predicted to keep 0% (0% to") and "--noise_bands" in advice
    args = trainer.args
    args.optim = "sgd"
    assert DryRun(trainer).advice() == ""


def test_lora_is_counted_as_the_script_trains_it(tmp_path, capsys, few_rows):
    tiny_gpt2().save_pretrained(tmp_path)
    task = plan(
        capsys, "--authors", "3000", "--target_epsilon", "8", "--model", str(tmp_path), "--enable_lora", "--lora_dim", "4",
        "--lora_target_modules", "c_attn", "c_fc", *IN_TIME,
    )["task"]  # fmt: skip
    adapted = tiny_gpt2(lora=True)
    assert task["trained"] == sum(p.numel() for p in adapted.parameters() if p.requires_grad) and task["is_lora"]
    assert task["parameters"] == sum(p.numel() for p in tiny_gpt2().parameters())


def test_options_and_their_values_are_left_out():
    words = ["--max_st", "3", "--lora_target_modules", "a", "b", "--max-steps=4", "--bf16"]
    assert without_planner_options(words, {"max_steps"}) == ["--lora_target_modules", "a", "b", "--bf16"]
    assert without_planner_options(words, {"lora_target_modules", "max_steps"}) == ["--bf16"]


def test_the_command_runs(checkpoint, comments, tmp_path, capsys, few_rows):
    words = ["--authors", "120", "--target_epsilon", "8", "--parameters", "4e5", "--hours", "1", "--seconds_per_author", "20"]
    more = ["--train_file", str(comments), "--output_dir", str(tmp_path / "out"), "--sequence_len", "32", "--dry_run"]
    report = plan(capsys, *words, "--", "--model_name", str(checkpoint), *more)
    done = run_script(*shlex.split(report["command"])[2:])
    assert done.returncode == 0, done.stderr


def test_errors_of_the_program_are_of_one_line(monkeypatch, capfd):
    monkeypatch.setattr(sys, "argv", ["plan", *ASKED, "--hours", "2"])
    with pytest.raises(SystemExit) as exited:
        runpy.run_path(str(ROOT / "author_dp" / "plan.py"), run_name="__main__")
    said = capfd.readouterr().err
    assert exited.value.code == 2 and said.count("\n") == 1 and "--hours" in said
