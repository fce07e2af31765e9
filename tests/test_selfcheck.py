"""selfcheck.py: wrong noise is found in real runs, by the run itself; right noise never is."""

import random

import numpy as np
import pytest
import torch
from conftest import ROOT, make_dataset, make_trainer, read_report, run_script, sample
from planting import find, with_edit
from transformers import TrainerCallback

from author_dp.accounting.ledger import PrivacyLedger
from author_dp.accounting.ledger_report import format_ledger
from author_dp.errors import MechanismError, UserError
from author_dp.guards.noise_monitor import NoiseMonitor, check_unseeded
from author_dp.mechanism.noise import GaussianNoise
from author_dp.mechanism.optimizer import PROBE_SIZE
from author_dp.outputs.report import write_report

STEP = "author_dp.mechanism.optimizer.AuthorDPOptimizer.pre_step"
NOISE = "author_dp.mechanism.noise.GaussianNoise"
ADD = "self.noise.add_(part, std)"

# What a careless colleague would write, and what finds it: in a run of 12 steps, tested at each.
BUGS = {
    "no noise": (STEP, "if std > 0:", "if False:", "its scale"),
    "noise for the parameters alone": (
        STEP, "self.grad_buffer.split(self.noise.elements)", "self.grad_buffer[:-4096].split(9**6)", "its scale"),
    "half the noise": (STEP, ADD, "self.noise.add_(part, std / 2)", "its scale"),
    "half of the variance": (f"{NOISE}._add_pairs", "mul_(-2 * std * std)", "mul_(-std * std)", "its scale"),
    "noise twice": (STEP, ADD, f"{ADD}; {ADD}", "its scale"),
    "noise that does not scale with the clip norm": (
        STEP, "self.noise_multiplier * self.max_grad_norm", "self.noise_multiplier", "its scale"),
    "noise divided twice": (STEP, "part.div_(self.expected_batch_size)", "part.div_(self.expected_batch_size**2)", "its scale"),
    "noise of every microbatch": (
        "dp_utils.DPTrainer.training_step", "total += losses.detach()",
        "self.optimizer.optimizer.grad_buffer.add_(torch.randn_like("
        "self.optimizer.optimizer.grad_buffer) * self.plan.noise_multiplier * self.plan.clip_norm); total += losses.detach()",
        "its scale"),
    "scaled by the number of microbatches": (
        "dp_utils.DPTrainer.training_step", "model.train()",
        "model.train(); self.optimizer.optimizer.expected_batch_size = 4 * max(1, len(inputs.microbatches))", "its scale"),
    "division by the real batch size": (
        "dp_utils.DPTrainer.training_step", "model.train()",
        "model.train(); self.optimizer.optimizer.expected_batch_size = max(1, inputs.batch_size)", "its scale"),
    "noise reused in each step": (
        STEP, ADD, "self.noise = type(self.noise)(part.device); self.noise._stream = __import__('cryptography.hazmat.primitives."
        "ciphers', fromlist=['x']).Cipher(__import__('cryptography.hazmat.primitives.ciphers.algorithms', fromlist=['x'])"
        ".AES128(bytes(16)), __import__('cryptography.hazmat.primitives.ciphers.modes', fromlist=['x']).CTR(bytes(16)))"
        ".encryptor(); self.noise.add_(part, std)", "correlation between steps, 1 apart"),
    "noise from --seed in each step": (
        STEP, ADD, "part.add_(torch.randn(len(part), generator=torch.Generator().manual_seed(7)), alpha=std)",
        "correlation between steps, 1 apart"),
    "noise that remembers the step before": (
        STEP, ADD, "last = getattr(self, 'last', self.noise.add_(torch.zeros_like(part), std)); self.last = self.noise.add_("
        "torch.zeros_like(part), std).mul_(0.6).add_(last, alpha=0.8); part.add_(self.last)",
        "correlation between steps, 1 apart"),
    "the same noise for two halves": (
        STEP, ADD, "new = self.noise.add_(torch.zeros_like(part), std); new[-2048:] = new[-4096:-2048]; part.add_(new)",
        "correlation between coordinates"),
    "Laplacian noise": (
        STEP, ADD, "part.add_(torch.distributions.Laplace(0.0, std / 2**0.5).sample(part.shape))", "its shape"),
    "uniform noise": (STEP, ADD, "part.add_(torch.rand_like(part) - 0.5, alpha=std * 12**0.5)", "its shape"),
    "noise on a coarse grid": (
        STEP, ADD, "part.add_((torch.randn_like(part) * 16).round() / 16, alpha=std)", "draws that are equal"),
}  # fmt: skip


def small(folder, **options):
    return make_trainer(folder, dataset=make_dataset([1] * 60), max_steps=12, per_device_train_batch_size=2,
                        gradient_accumulation_steps=2, learning_rate=1e-3, **options)  # fmt: skip


@pytest.mark.parametrize("bug", sample(BUGS))
def test_wrong_noise_ends_a_real_run(tmp_path, monkeypatch, bug):
    where, old, new, found = BUGS[bug]
    function = find(where)
    monkeypatch.setattr(function, "__code__", with_edit(function, old, new))
    with pytest.raises(MechanismError, match=found):
        small(tmp_path).train()
    assert PrivacyLedger(tmp_path / "privacy_ledger.jsonl").steps <= 12


def test_after_an_alarm_nothing_is_saved_or_resumed_and_no_report_promises_anything(tmp_path):
    patch = pytest.MonkeyPatch()

    class Plant(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 4:
                patch.setattr(GaussianNoise, "add_", lambda self, total, std: total)

    options = {"save_strategy": "steps", "save_steps": 2, "logging_steps": 100}
    trainer = small(tmp_path, **options)
    (tmp_path / "README.md").write_text("epsilon 1")
    trainer.add_callback(Plant())
    with pytest.raises(MechanismError, match=r"its scale.* \(seen in 6 steps"):
        trainer.train()
    patch.undo()
    assert not (tmp_path / "checkpoint-6").exists()
    for path in (tmp_path / "checkpoint-2", tmp_path / "checkpoint-4"):
        report = read_report(path)
        assert report["epsilon"] is None and "its scale" in report["alarm"] and report["steps"] in (2, 4)
    ledger = PrivacyLedger(tmp_path / "privacy_ledger.jsonl")
    assert (
        ledger.steps == 6
        and ledger.failure
        and "its scale" in ledger.failure
        and "FAILURE" in format_ledger(ledger)
        and "no privacy" in format_ledger(ledger)
    )
    assert "without a privacy guarantee" in (tmp_path / "README.md").read_text()
    write_report(tmp_path)
    assert "none: the run found" in (tmp_path / "report.html").read_text()
    for resume in (True, str(tmp_path / "checkpoint-2"), None):
        with pytest.raises(UserError, match=r"was not as recorded in its ledger.*choose another --output_dir"):
            small(tmp_path, resume_from_checkpoint=resume, **options)
    with pytest.raises(UserError, match="the mechanism of a run"):
        trainer.train()
    lines = (tmp_path / "privacy_ledger.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "privacy_ledger.jsonl").write_text("".join(lines[:-1]))
    with pytest.raises(UserError, match="lacks records"):  # the alarm alone taken away
        small(tmp_path, resume_from_checkpoint=True, **options)


@pytest.mark.parametrize(
    "seeded", ["torch.initial_seed().to_bytes(16, 'big')", "__import__('numpy').random.bytes(16)",
               "__import__('random').randbytes(16)", "bytes(16)"],
)  # fmt: skip
def test_noise_from_a_seed_is_found_before_the_first_step(tmp_path, monkeypatch, seeded):
    code = with_edit(find(f"{NOISE}.__init__"), "secrets.token_bytes(16)", seeded)
    monkeypatch.setattr(find(f"{NOISE}.__init__"), "__code__", code)
    with pytest.raises(MechanismError, match="follows the seed"):
        small(tmp_path).train()
    ledger = PrivacyLedger(tmp_path / "privacy_ledger.jsonl")
    assert ledger.steps == 0 and ledger.failure


def test_looking_for_seeds_leaves_every_generator_as_it_was(tmp_path):
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    check_unseeded(lambda: GaussianNoise(torch.device("cpu")).add_(torch.zeros(PROBE_SIZE), 1.0))
    assert torch.equal(before[0], torch.get_rng_state()) and before[1] == np.random.get_state()[1].tolist()
    assert before[2] == random.getstate()


def test_noise_of_an_earlier_run_is_found(tmp_path, monkeypatch):
    code = with_edit(find(f"{NOISE}.__init__"), "secrets.token_bytes(16)", "bytes(16)")
    monkeypatch.setattr(find(f"{NOISE}.__init__"), "__code__", code)
    monkeypatch.setattr("author_dp.guards.noise_monitor.check_unseeded", lambda draw: None)  # which would find it first
    small(tmp_path, save_strategy="steps", save_steps=6).train()
    with pytest.raises(MechanismError, match="correlation with run 1 of the folder"):
        small(tmp_path, save_strategy="steps", save_steps=6, resume_from_checkpoint=str(tmp_path / "checkpoint-6")).train()


@pytest.mark.slow
def test_honest_runs_of_a_folder_do_not_resemble_each_other(tmp_path):
    for resume in (None, str(tmp_path / "checkpoint-6"), str(tmp_path / "checkpoint-6")):
        small(tmp_path, save_strategy="steps", save_steps=6, resume_from_checkpoint=resume).train()
    assert np.load(tmp_path / "_noise_check.npy").shape == (3, PROBE_SIZE)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [0, 2])
def test_the_program_ends_with_status_3(tmp_path, checkpoint, comments, processes, monkeypatch):
    (tmp_path / "sitecustomize.py").write_text(
        "import author_dp.mechanism.noise as noise\nadd = noise.NoiseSource.add_\n"
        "noise.NoiseSource.add_ = lambda self, total, std: add(self, total, std / 2)\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    done = run_script(
        "--model_name", checkpoint, "--train_file", str(comments), "--output_dir", str(tmp_path / "out"),
        "--noise_multiplier", "1", "--per_sample_max_grad_norm", "1", "--max_steps", "3", "--sequence_len", "16",
        "--eval_fraction", "0", processes=processes, anew=True,
    )  # fmt: skip
    said = "fine-tune-dp.py: the mechanism is not what the ledger says"
    assert done.stderr.count(said) == 1 and "MechanismError" not in done.stderr
    assert done.returncode == (3 if not processes else 1)
    assert (
        PrivacyLedger(tmp_path / "out" / "privacy_ledger.jsonl").failure and not (tmp_path / "out" / "model.safetensors").exists()
    )


@pytest.mark.parametrize("secure", [False, True])
def test_right_noise_raises_no_alarm_in_a_real_run(tmp_path, secure):
    trainer = small(tmp_path, privacy={"secure_noise": secure})
    trainer.train()
    assert trainer.budget.steps == 12 and trainer.checks.noise.steps == 12 and trainer.budget.ledger.failure is None


def test_without_noise_nothing_is_checked(tmp_path):
    small(tmp_path, privacy={"noise_multiplier": 0.0}).train()


def test_the_pad_belongs_to_no_parameter(tmp_path):
    trainer = small(tmp_path)
    trainer.train()
    optimizer = trainer.optimizer.optimizer
    assert len(optimizer.pad) == PROBE_SIZE and len(optimizer.grad_buffer) == PROBE_SIZE + sum(
        p.numel() for p in optimizer.params
    )
    places = [p.summed_grad.data_ptr() for p in optimizer.params]
    assert optimizer.pad.data_ptr() > max(places) and all(p.grad is None for p in [optimizer.pad])


@pytest.mark.slow
def test_two_hundred_honest_runs_raise_no_alarm_and_their_p_values_are_uniform():
    smallest = []
    for _ in range(200):
        source, check = GaussianNoise(torch.device("cpu")), NoiseMonitor(std=0.01)
        for step in range(1, 31):
            check.add(source.add_(torch.zeros(PROBE_SIZE), 0.01))
            if step % 5 == 0:
                check.test()
        smallest.append(min(check.p_values().values()) * len(check.p_values()))
    assert sorted(smallest)[0] > 1e-5 and np.mean(np.array(smallest) < 0.1) < 0.2  # Bonferroni: at most a tenth, on average


def test_one_percent_is_found_within_some_hundred_steps():
    source, check, found = GaussianNoise(torch.device("cpu")), NoiseMonitor(std=1.0), None
    for step in range(1, 301):
        check.add(source.add_(torch.zeros(PROBE_SIZE), 1.01))
        if step % 10 == 0:
            try:
                check.test()
            except MechanismError:
                found = step
                break
    assert found is not None and found <= 200


def test_what_is_not_finite_is_found():
    check = NoiseMonitor(std=1.0)
    check.add(torch.full((PROBE_SIZE,), float("nan")))
    with pytest.raises(MechanismError, match="not finite"):
        check.test()


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan, 1e300])
def test_kept_noise_that_was_damaged_stops_nobody(tmp_path, value):
    pads = np.random.default_rng(0).standard_normal((2, PROBE_SIZE))
    pads[0, 7] = value
    np.save(tmp_path / "pads.npy", pads)
    check = NoiseMonitor(1.0, tmp_path / "pads.npy")
    for _ in range(3):
        check.add(torch.randn(PROBE_SIZE))
        check.test()
    check = NoiseMonitor(1.0, tmp_path / "pads.npy")
    check.add(torch.from_numpy(pads[1]).float())  # the other one is still compared
    with pytest.raises(MechanismError, match="of the folder"):
        check.test()
