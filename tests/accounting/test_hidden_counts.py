"""--sample_rate and --hide_counts: a guarantee, and no public file discloses the number of authors."""

import io
import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import make_dataset, make_trainer, read_report, within
from mutation import catches
from safetensors.numpy import load_file
from script_runs import run_here

from author_dp.accounting.accountant import compute_epsilon
from author_dp.accounting.ledger import PrivacyLedger
from author_dp.accounting.ledger_report import format_joint_ledgers, format_ledger
from author_dp.accounting.plan import make_plan
from author_dp.errors import UserError
from author_dp.models.weights import COMPLETE_MARKER
from author_dp.outputs.guarantee import guarantee_table_rows
from author_dp.outputs.report import RunStatistics, write_report
from dp_utils import PrivacyArguments

HIDDEN = {"sample_rate": 0.05, "target_delta": 1e-5, "hide_counts": True}
RANDOM_FILES = re.compile(r"_noise_check\.npy|optimizer\.pt|\.safetensors")  # noise alone, or protected by noise


def hidden_trainer(folder, authors: int, samples: int = 3, **options):
    return make_trainer(
        folder, dataset=make_dataset([samples] * authors), max_steps=4, save_strategy="steps", save_steps=2, privacy=HIDDEN,
        **options,
    )  # fmt: skip


def public_files(folder) -> dict[str, bytes]:
    """Return all files except the random ones and those that only their owner may read."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.stat().st_mode & 0o077 and not RANDOM_FILES.search(path.name)
    }


def without_randomness(name: str, content: bytes) -> object:
    """Return the content of a public file without hashes of weights and names and times of the run."""
    if name.endswith("training_args.bin"):
        options = torch.load(io.BytesIO(content), weights_only=False).to_dict()
        content = json.dumps(options, default=str).encode()
    content = re.sub(rb'"weights": {[^}]*}', b"", content)
    text = re.sub(rb'"(link|ledger_link|name|started)": "[^"]*"', b"", content)
    return re.sub(rb"/[\w/.-]*/run-[ab]|runs/[\w.-]+", b"", text)


@pytest.mark.integration
@catches("a hidden number of authors in the ledger", "accounting.plan.PrivacyPlan.to_public_dict",
    "if self.hide_counts else []", "if False else []")  # fmt: skip
def test_public_files_do_not_depend_on_number_of_authors(tmp_path):
    contents = []
    for name, authors, samples in (("run-a", 40, 3), ("run-b", 97, 2)):
        trainer = hidden_trainer(tmp_path / name, authors, samples)
        trainer.add_callback(RunStatistics(trainer.norms, np.diff(trainer.train_dataset.offsets)))
        trainer.train()
        trainer.save_model()
        trainer.create_model_card()
        write_report(tmp_path / name)
        files = public_files(tmp_path / name)
        contents.append({path: without_randomness(path, content) for path, content in files.items()})
        assert files.keys() >= {"privacy.json", "privacy_ledger.jsonl", "README.md", "checkpoint-2/privacy.json"}
        private = tmp_path / name / "_counts.json"
        assert json.loads(private.read_text()) == {"num_authors": authors} and private.stat().st_mode & 0o777 == 0o600
    assert contents[0].keys() == contents[1].keys()
    different = [name for name in contents[0] if contents[0][name] != contents[1][name]]
    assert different == []
    report = read_report(tmp_path / "run-a")
    assert report["num_authors"] is None and report["num_samples"] is None and report["sample_rate"] == 0.05
    assert load_file(tmp_path / "run-a" / "model.safetensors")


@pytest.mark.integration
def test_epsilon_follows_from_given_sample_rate(tmp_path):
    for authors in (40, 97):
        trainer = hidden_trainer(tmp_path / str(authors), authors)
        trainer.train()
        assert trainer.epsilon() == pytest.approx(compute_epsilon(1.0, 0.05, 4, 1e-5), rel=1e-3)


@catches("a rate other than the one accounted for", "training.dataloading.make_sampler", "sample_rate=plan.sample_rate",
    "sample_rate=plan.expected_batch_size / plan.num_authors")  # fmt: skip
def test_authors_are_drawn_at_the_rate_and_divided_by_a_constant(tmp_path):
    for authors in (40, 400):
        trainer = hidden_trainer(tmp_path / str(authors), authors)
        sampler = trainer.get_train_dataloader().batch_sampler
        sizes = [len(sampler.sample_authors()) for _ in range(500)]
        assert within(np.mean(sizes), 0.05 * authors, (0.05 * 0.95 * authors / 500) ** 0.5)
        assert trainer.create_optimizer().expected_batch_size == 4 == trainer.plan.expected_batch_size
        assert len(sampler) == 20  # an epoch is 1 / q batches


def test_summary_and_reports_work_without_counts(tmp_path):
    trainer = hidden_trainer(tmp_path, 40)
    assert "private" in trainer.summary() and "divided by the constant 4" in trainer.summary()
    trainer.train()
    ledger = PrivacyLedger(tmp_path / "privacy_ledger.jsonl")
    assert "an undisclosed number of authors" in format_ledger(
        ledger
    ) and "an undisclosed number of authors" in format_joint_ledgers([ledger])
    assert dict(guarantee_table_rows(trainer.privacy_report()))["Authors"] == "not disclosed"


@pytest.mark.integration
def test_resume_checks_hidden_author_count(tmp_path):
    trainer = hidden_trainer(tmp_path, 40)
    trainer.train()
    with pytest.raises(UserError, match="41 training authors now, 40 before"):
        hidden_trainer(tmp_path, 41, resume_from_checkpoint=True)
    hidden_trainer(tmp_path, 40, resume_from_checkpoint=True)
    (tmp_path / "_counts.json").unlink()
    for path in tmp_path.glob(f"*/{COMPLETE_MARKER}"):  # then nothing knows the number any more
        path.write_text(json.dumps({**json.loads(path.read_text()), "training": {}}))
    hidden_trainer(tmp_path, 41, resume_from_checkpoint=True)  # q and delta do not depend on the number
    not_hidden = {**HIDDEN, "hide_counts": False}
    with pytest.raises(UserError, match="--hide_counts: the resumed run was started with it"):
        make_trainer(tmp_path, dataset=make_dataset([3] * 40), privacy=not_hidden, resume_from_checkpoint=True, max_steps=6)


def test_disclosed_counts_cannot_be_hidden_later(tmp_path):
    options = {"dataset": make_dataset([3] * 40), "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    make_trainer(tmp_path, privacy={**HIDDEN, "hide_counts": False}, **options).train()
    with pytest.raises(UserError, match="--hide_counts: the resumed run was started without it"):
        make_trainer(tmp_path, privacy=HIDDEN, resume_from_checkpoint=True, **{**options, "max_steps": 6})


@catches("a divisor that follows the number of authors", "accounting.plan.make_plan", "expected_batch_size=batch_size",
    "expected_batch_size=round(sample_rate * num_authors)")  # fmt: skip
@catches("steps that follow the number of authors", "accounting.plan.make_plan",
    "planned_steps(args, sample_rate, slots)", "planned_steps(args, 16 / num_authors, slots)")  # fmt: skip
def test_plan_follows_from_options_alone():
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
def test_invalid_options_are_named(tmp_path, monkeypatch, capfd, options, named):
    privacy = ["--noise_multiplier", "1", "--per_sample_max_grad_norm", "1", "--output_dir", str(tmp_path), *options]
    status, stderr = run_here(monkeypatch, capfd, *privacy)
    assert status == 2 and named in stderr, stderr


@catches("a number that a run without steps has told", "training.setup.check_counts_hidden", "if not steps", "if False")
def test_a_run_that_took_no_step_has_told_the_number_too(tmp_path):
    options = {"dataset": make_dataset([3] * 40), "max_steps": 4}
    make_trainer(tmp_path, privacy={**HIDDEN, "hide_counts": False}, **options).budget.start()
    assert '"num_authors": 40' in (tmp_path / "privacy_ledger.jsonl").read_text()
    with pytest.raises(UserError, match=r"--hide_counts: .*privacy_ledger\.jsonl discloses the number of authors"):
        make_trainer(tmp_path, privacy=HIDDEN, **options)


@pytest.mark.parametrize("where", ["privacy.json", "checkpoint-2/privacy.json"])
def test_report_without_privacy_has_disclosed_the_number(tmp_path, where):
    (tmp_path / where).parent.mkdir(exist_ok=True)
    (tmp_path / where).write_text(json.dumps({"disable_dp": True, "num_authors": 40, "num_samples": None}))
    with pytest.raises(UserError, match=rf"results of another run .*{where}"):
        make_trainer(tmp_path, privacy=HIDDEN, dataset=make_dataset([3] * 40))
