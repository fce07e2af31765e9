"""--sample_rate and --hide_counts: the guarantee without the number of authors in anything that is public."""

import io
import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import make_dataset, make_trainer, read_report, within
from safetensors.numpy import load_file
from test_fine_tune_dp import run_here

from author_dp.accounting.accountant import compute_epsilon
from author_dp.accounting.ledger import PrivacyLedger
from author_dp.accounting.ledger_report import format_joint, format_ledger
from author_dp.accounting.plan import make_plan
from author_dp.errors import UserError
from author_dp.outputs.guarantee import guarantee_rows
from author_dp.outputs.report import RunStatistics, write_report
from dp_utils import PrivacyArguments

HIDDEN = {"sample_rate": 0.05, "target_delta": 1e-5, "hide_counts": True}
CHANCE = re.compile(r"_noise_check\.npy|optimizer\.pt|\.safetensors")  # what the noise hides, and noise alone


def hidden_trainer(folder, authors: int, samples: int = 3, **options):
    return make_trainer(
        folder, dataset=make_dataset([samples] * authors), max_steps=4, save_strategy="steps", save_steps=2, privacy=HIDDEN,
        **options,
    )  # fmt: skip


def public_files(folder) -> dict[str, bytes]:
    """All files but those of chance, and those that their owner alone may read."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.stat().st_mode & 0o077 and not CHANCE.search(path.name)
    }


def without_chance(name: str, content: bytes) -> object:
    """What a public file holds but for weights, which are what the noise hides, and names and times of the run."""
    if name.endswith("training_args.bin"):
        options = torch.load(io.BytesIO(content), weights_only=False).to_dict()
        content = json.dumps(options, default=str).encode()
    content = re.sub(rb'"weights": {[^}]*}', b"", content)
    text = re.sub(rb'"(link|ledger_link|name|started)": "[^"]*"', b"", content)
    return re.sub(rb"/[\w/.-]*/run-[ab]|runs/[\w.-]+", b"", text)


def test_public_files_are_the_same_for_any_number_of_authors(tmp_path):
    found = []
    for name, authors, samples in (("run-a", 40, 3), ("run-b", 97, 2)):
        trainer = hidden_trainer(tmp_path / name, authors, samples)
        trainer.add_callback(RunStatistics(trainer.norms, np.diff(trainer.train_dataset.offsets)))
        trainer.train()
        trainer.save_model()
        trainer.create_model_card()
        write_report(tmp_path / name)
        files = public_files(tmp_path / name)
        found.append({path: without_chance(path, content) for path, content in files.items()})
        assert files.keys() >= {"privacy.json", "privacy_ledger.jsonl", "README.md", "checkpoint-2/privacy.json"}
        secret = tmp_path / name / "_counts.json"
        assert json.loads(secret.read_text()) == {"num_authors": authors} and secret.stat().st_mode & 0o777 == 0o600
    assert found[0].keys() == found[1].keys()
    different = [name for name in found[0] if found[0][name] != found[1][name]]
    assert different == []
    report = read_report(tmp_path / "run-a")
    assert report["num_authors"] is None and report["num_samples"] is None and report["sample_rate"] == 0.05
    assert load_file(tmp_path / "run-a" / "model.safetensors")


def test_epsilon_is_that_of_the_rate_that_is_given(tmp_path):
    for authors in (40, 97):
        trainer = hidden_trainer(tmp_path / str(authors), authors)
        trainer.train()
        assert trainer.epsilon() == pytest.approx(compute_epsilon(1.0, 0.05, 4, 1e-5), rel=1e-3)


def test_authors_are_drawn_at_the_rate_and_divided_by_a_constant(tmp_path):
    for authors in (40, 400):
        trainer = hidden_trainer(tmp_path / str(authors), authors)
        sampler = trainer.get_train_dataloader().batch_sampler
        drawn = [len(sampler.sample_authors()) for _ in range(500)]
        assert within(np.mean(drawn), 0.05 * authors, (0.05 * 0.95 * authors / 500) ** 0.5)
        assert trainer.create_optimizer().expected_batch_size == 4 == trainer.plan.expected_batch_size
        assert len(sampler) == 20  # 1 / q draws are an epoch


def test_words_of_programs_and_reports_hold_without_counts(tmp_path):
    trainer = hidden_trainer(tmp_path, 40)
    assert "private" in trainer.summary() and "divided by the constant 4" in trainer.summary()
    trainer.train()
    ledger = PrivacyLedger(tmp_path / "privacy_ledger.jsonl")
    assert "an undisclosed number of authors" in format_ledger(ledger) and "an undisclosed number of authors" in format_joint(
        [ledger]
    )
    assert dict(guarantee_rows(trainer.privacy_report()))["Authors"] == "not disclosed"


def test_resuming_checks_the_number_that_it_keeps_to_itself(tmp_path):
    trainer = hidden_trainer(tmp_path, 40)
    trainer.train()
    with pytest.raises(UserError, match="41 training authors now, 40 before"):
        hidden_trainer(tmp_path, 41, resume_from_checkpoint=True)
    hidden_trainer(tmp_path, 40, resume_from_checkpoint=True)
    (tmp_path / "_counts.json").unlink()
    hidden_trainer(tmp_path, 41, resume_from_checkpoint=True)  # q and delta do not depend on it
    forgotten = {**HIDDEN, "hide_counts": False}
    with pytest.raises(UserError, match="--hide_counts was given"):
        make_trainer(tmp_path, dataset=make_dataset([3] * 40), privacy=forgotten, resume_from_checkpoint=True, max_steps=6)


def test_counts_that_are_told_cannot_be_hidden_later(tmp_path):
    options = {"dataset": make_dataset([3] * 40), "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    make_trainer(tmp_path, privacy={**HIDDEN, "hide_counts": False}, **options).train()
    with pytest.raises(UserError, match="--hide_counts was not given"):
        make_trainer(tmp_path, privacy=HIDDEN, resume_from_checkpoint=True, **{**options, "max_steps": 6})


def test_steps_follow_from_options_alone():
    args = SimpleNamespace(
        per_device_train_batch_size=8, gradient_accumulation_steps=2, world_size=1, max_steps=-1, num_train_epochs=3
    )
    privacy = PrivacyArguments(noise_multiplier=1.0, per_sample_max_grad_norm=1.0, **HIDDEN)
    plans = [make_plan(privacy, args, np.arange(authors + 1)) for authors in (20, 5_000)]
    assert [plan.to_public_dict() for plan in plans] == [plans[0].to_public_dict()] * 2
    assert plans[0].steps == 60 and plans[0].sample_rate == 0.05 and plans[0].expected_batch_size == 16


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--sample_rate", "0"], "--sample_rate 0.0"),
        (["--sample_rate", "1.5"], "--sample_rate 1.5"),
        (["--sample_rate", "nan"], "--sample_rate nan"),
        (["--hide_counts", "--sample_rate", "0.1"], "--target_delta"),
        (["--hide_counts", "--target_delta", "1e-5"], "--sample_rate"),
    ],
)
def test_mistakes(tmp_path, monkeypatch, capfd, options, named):
    privacy = ["--noise_multiplier", "1", "--per_sample_max_grad_norm", "1", "--output_dir", str(tmp_path), *options]
    status, stderr = run_here(monkeypatch, capfd, *privacy)
    assert status == 2 and named in stderr, stderr


def test_a_run_that_took_no_step_has_told_the_number_too(tmp_path):
    options = {"dataset": make_dataset([3] * 40), "max_steps": 4}
    make_trainer(tmp_path, privacy={**HIDDEN, "hide_counts": False}, **options).budget.start()
    assert '"num_authors": 40' in (tmp_path / "privacy_ledger.jsonl").read_text()
    with pytest.raises(UserError, match=r"--hide_counts: .*privacy_ledger\.jsonl tells the number of authors"):
        make_trainer(tmp_path, privacy=HIDDEN, **options)


@pytest.mark.parametrize("where", ["privacy.json", "checkpoint-2/privacy.json"])
def test_so_has_a_report_of_a_run_without_privacy(tmp_path, where):
    (tmp_path / where).parent.mkdir(exist_ok=True)
    (tmp_path / where).write_text(json.dumps({"disable_dp": True, "num_authors": 40, "num_samples": None}))
    with pytest.raises(UserError, match=rf"results of another run .*{where}"):
        make_trainer(tmp_path, privacy=HIDDEN, dataset=make_dataset([3] * 40))
