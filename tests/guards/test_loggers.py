"""loggers.py and permissions.py: private numbers stay in the output directory, readable by their owner alone."""

import importlib.util
import os
import shutil
import stat
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import COUNTS, ROOT, make_dataset, make_trainer, sample
from mutation import catches
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from author_dp.errors import UserError
from author_dp.guards.loggers import DISABLED, VARIABLES, check_logger_variable, check_loggers, redirect_loggers
from author_dp.training.checkpointing import mark_checkpoint_complete

OFFLINE = {
    "WANDB_MODE": "offline", "COMET_START_ONLINE": "false", "COMET_API_KEY": "", "CLEARML_OFFLINE_MODE": "1",
    "WANDB_SILENT": "true",
}  # fmt: skip
NO_LOGS = (".session.json", "telemetry.json", "fontlist")  # identifiers, settings, fonts
# Without --hide_counts, and without what is written after training.
FOR_ALL = {"privacy.json", "privacy_ledger.jsonl", "privacy_ledger.jsonl.lock"}


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def files_of(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*")) if path.is_file()]


def run_with(folder: Path, monkeypatch, *loggers: str):
    """Evaluate, train and evaluate, with a separate current directory and home."""
    for name in ("cwd", "home"):
        (folder / name).mkdir(parents=True)
    monkeypatch.chdir(folder / "cwd")
    monkeypatch.setenv("HOME", str(folder / "home"))
    for variable, value in OFFLINE.items():
        monkeypatch.setenv(variable, value)
    for name in loggers:
        for variable in VARIABLES[name]:
            monkeypatch.delenv(variable, raising=False)
    trainer = make_trainer(
        folder / "out", report_to=list(loggers), max_steps=2, save_strategy="steps", save_steps=1
    )  # fmt: skip
    trainer.evaluate(held_out := make_dataset(COUNTS, seed=1))
    trainer.train()
    trainer.evaluate(held_out)
    trainer.save_model()
    return trainer


@catches("losses in the current folder", "guards.loggers.redirect_loggers",
    "if (chosen := get_logger_variable(variable)) is None:",
    "if (chosen := get_logger_variable(variable)) is None and args.push_to_hub:", name="tensorboard")  # fmt: skip
@catches("logs that others can read", "permissions.owner_only", "os.umask(0o077)", "os.umask(0o022)", name="tensorboard")
@catches(
    "log folders that others can enter", "guards.loggers.make_private_logger_dir", "mode=0o700", "mode=0o755", name="tensorboard"
)
@pytest.mark.parametrize("name", ["tensorboard", *sorted(VARIABLES.keys() - {"tensorboard"})])
def test_loggers_keep_losses_in_the_output_folder(tmp_path, monkeypatch, name):
    if importlib.util.find_spec(name) is None:  # not imported yet: some read their variables then
        pytest.skip(f"{name} is not installed")
    run_with(tmp_path, monkeypatch, name)
    outside = {path.name for place in ("cwd", "home") for path in files_of(tmp_path / place)}
    assert {file for file in outside if not file.startswith(NO_LOGS)} == set()
    logs = tmp_path / "out" / "_logs"
    assert mode(logs.parent) == mode(tmp_path / "cwd")
    written = [tmp_path / "out" / "emissions.csv"] if name == "codecarbon" else files_of(logs)
    assert written and {mode(path) for path in written} == {0o600}
    assert {mode(path) for path in [logs, *logs.rglob("*")] if path.is_dir()} <= {0o700}


@catches("training_args.bin and the like for everybody", "training.saving.CertifiedTrainer._save", ", owner_only():", ":")
def test_others_read_nothing_but_the_guarantee(tmp_path, monkeypatch):
    run_with(tmp_path, monkeypatch, "tensorboard")
    readable = {path.name for path in files_of(tmp_path / "out") if mode(path) & 0o077}
    private = {"training_args.bin", "trainer_state.json", "optimizer.pt", "scheduler.pt", "_noise_check.npy"}
    assert {path.name for path in files_of(tmp_path / "out")} >= private | FOR_ALL
    assert readable == FOR_ALL


@catches("all_results.json for everybody", "training.saving.CertifiedTrainer.save_metrics", "with owner_only():", "if True:")
def test_metrics_that_a_program_saves_are_its_owners(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.save_metrics("eval", {"eval_loss": 3.0})
    trainer.save_state()
    assert {path.name: mode(path) for path in files_of(tmp_path)} == dict.fromkeys(
        ("all_results.json", "eval_results.json", "trainer_state.json"), 0o600
    )


@catches("private states that all may read", "permissions.make_private", "path.chmod(0o600)", "pass")
@catches(
    "an older checkpoint's files stay everybody's",
    "training.checkpointing.mark_checkpoint_complete",
    "make_private(path)",
    "pass",
)
def test_a_sealed_checkpoint_is_its_owners(tmp_path):
    """The same holds for readable files that an older version wrote."""
    for name in ("privacy.json", "trainer_state.json", "optimizer.pt", "whatever_comes_next.bin"):
        (tmp_path / name).write_text("{}")
        (tmp_path / name).chmod(0o644)
    mark_checkpoint_complete(tmp_path)
    assert {path.name for path in files_of(tmp_path) if mode(path) & 0o077} == {"privacy.json"}


@catches("a logger that nobody looked at", "guards.loggers.check_loggers", "if name not in VARIABLES:",
    "if name not in VARIABLES:\n            continue\n        if False:", name="one_that_comes_next")  # fmt: skip
@pytest.mark.parametrize("name", [*sorted(INTEGRATION_TO_CALLBACK.keys() - VARIABLES.keys()), "one_that_comes_next"])
def test_check_loggers_refuses_unknown_loggers(name):
    with pytest.raises(UserError, match=f"--report_to {name}: "):
        check_loggers(SimpleNamespace(report_to=[name]))


@catches("a log folder of the user's that others can read", "guards.loggers.check_logger_variable", "& 0o077", "& 0")
def test_trainer_wants_log_directories_to_be_private(tmp_path, monkeypatch):
    shared, private, new = (tmp_path / name for name in ("shared", "private", "new"))
    shared.mkdir(mode=0o755), private.mkdir(mode=0o700)
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(shared))
    with pytest.raises(UserError, match=r"TENSORBOARD_LOGGING_DIR=.*shared"):
        make_trainer(tmp_path / "out", report_to=["tensorboard"])
    for number, folder in enumerate((private, new)):
        monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(folder))
        make_trainer(tmp_path / f"out{number}", report_to=["tensorboard"]).train()
        assert len(files_of(folder)) == 1 and mode(folder) == 0o700
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "mlruns")
    with pytest.raises(UserError, match="MLFLOW_TRACKING_URI=mlruns"):
        make_trainer(tmp_path / "out", report_to=["mlflow"])


@catches("logs that a group can read", "guards.loggers.check_logger_variable", "& 0o077", "& 0o007", permissions=488)
@pytest.mark.parametrize("permissions", [0o750, 0o705, 0o710, 0o755])
def test_check_variable_refuses_directories_that_others_can_open(tmp_path, monkeypatch, permissions):
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs").chmod(permissions)
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "logs"))
    with pytest.raises(UserError, match=r"TENSORBOARD_LOGGING_DIR=.*logs"):
        check_logger_variable("TENSORBOARD_LOGGING_DIR", "{}")
        pytest.fail("not noticed")


@catches("comet_ml follows into the current folder", "guards.loggers.redirect_loggers", '{*used, "comet_ml"}', "{*used}")
def test_redirect_loggers_redirects_comet_ml_too(tmp_path, monkeypatch):
    for variable in [*VARIABLES["comet_ml"], *VARIABLES["tensorboard"]]:
        monkeypatch.setenv(variable, "")  # so that it is as before at the end
        monkeypatch.delenv(variable)
    redirect_loggers(SimpleNamespace(report_to=["tensorboard"], output_dir=str(tmp_path), process_index=0))
    assert os.environ.get("COMET_OFFLINE_DIRECTORY") == str(tmp_path / "_logs" / "comet_ml")
    assert os.environ["COMET_LOG_ASSETS"] == DISABLED


def test_redirect_loggers_separates_two_runs_of_one_process(tmp_path, monkeypatch):
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    for name in ("a", "b"):
        make_trainer(tmp_path / name, report_to=["tensorboard"]).train()
        assert len(files_of(tmp_path / name / "_logs" / "tensorboard")) == 1


@catches("a logger that uploads checkpoints", "guards.loggers.check_logger_variable", "if value == DISABLED:",
    "if value == DISABLED and False:", name="wandb", variable="WANDB_LOG_MODEL")  # fmt: skip
@pytest.mark.parametrize(
    ("name", "variable"), sample((n, v) for n, values in VARIABLES.items() for v, value in values.items() if value == DISABLED)
)
def test_check_loggers_refuses_uploads_of_checkpoints(monkeypatch, name, variable):
    """A checkpoint holds losses; the output folder holds texts of held-out authors."""
    monkeypatch.setenv(variable, "checkpoint")
    with pytest.raises(UserError, match=f"{variable}=checkpoint: "):
        check_loggers(SimpleNamespace(report_to=[name]))


def test_trainer_refuses_a_public_space(tmp_path):
    with pytest.raises(UserError, match="--trackio_space_id me/losses: "):
        make_trainer(tmp_path, report_to=["trackio"], trackio_space_id="me/losses")


@pytest.mark.skipif(not (ROOT / ".git").exists() or not shutil.which("git"), reason="no repository")
def test_git_ignores_private_files():
    names = ["_logs/x", "runs/x", "report.html", "report/loss.png", "trainer_state.json", "training_args.bin", "_audit_key.json",
             "_counts.json", "_private_statistics.json", "_noise_check.npy", "emissions.csv", "checkpoint-5/model.safetensors",
             "wandb/x", "mlruns/x", "mlflow.db", "s.jsonl.report.json"]  # fmt: skip
    paths = [f"{folder}{name}" for folder in ("", "mine/") for name in names]
    found = subprocess.run(["git", "check-ignore", *paths], cwd=ROOT, capture_output=True, text=True)
    assert set(paths) - set(found.stdout.splitlines()) == set()
