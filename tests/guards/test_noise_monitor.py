"""noise_monitor.py, seed_checks.py: a run finds wrong noise by itself, and passes with correct noise."""

import random

import bugs
import numpy as np
import pytest
import torch
from conftest import ROOT, make_dataset, make_trainer, read_report, run_script, sample
from mutation import catches
from planting import find, with_edit
from script_runs import SCRIPT
from transformers import TrainerCallback

from author_dp.accounting.ledger import PrivacyLedger
from author_dp.accounting.ledger_report import format_ledger
from author_dp.errors import MechanismError, UserError
from author_dp.guards.noise_monitor import NoiseMonitor
from author_dp.guards.seed_checks import check_unseeded
from author_dp.mechanism.noise import GaussianNoise
from author_dp.mechanism.optimizer import PROBE_SIZE
from author_dp.outputs.report import write_report

STEP = "author_dp.mechanism.optimizer.AuthorDPOptimizer.add_noise_and_divide"
NOISE = "author_dp.mechanism.noise.GaussianNoise"
ADD = "self.noise.add_(chunk, std)"

# A plausible mistake, and the test that fails: in a run of 12 steps, tested at each step.
BUGS = {
    "no noise": (*bugs.NO_NOISE, "scale"),
    "noise for the parameters alone": (*bugs.NOISE_FOR_PARAMETERS_ALONE, "scale"),
    "half the noise": (*bugs.HALF_THE_NOISE, "scale"),
    "half of the variance": (*bugs.HALF_OF_THE_VARIANCE, "scale"),
    "noise twice": (STEP, ADD, f"{ADD}; {ADD}", "scale"),
    "noise that does not scale with the clip norm": (*bugs.NOISE_WITHOUT_CLIP_NORM, "scale"),
    "noise divided twice": (STEP, "chunk.div_(self.expected_batch_size)", "chunk.div_(self.expected_batch_size**2)", "scale"),
    "noise of every microbatch": (*bugs.NOISE_OF_EVERY_MICROBATCH, "scale"),
    "scaled by the number of microbatches": (
        "dp_utils.DPTrainer.training_step", "model.train()",
        "model.train(); self.optimizer.optimizer.expected_batch_size = 4 * max(1, len(inputs.microbatches))", "scale"),
    "division by the real batch size": (*bugs.DIVISION_BY_THE_REAL_BATCH_SIZE, "scale"),
    "noise reused in each step": (
        STEP, ADD, "self.noise = type(self.noise)(chunk.device); self.noise._stream = __import__('cryptography.hazmat.primitives."
        "ciphers', fromlist=['x']).Cipher(__import__('cryptography.hazmat.primitives.ciphers.algorithms', fromlist=['x'])"
        ".AES128(bytes(16)), __import__('cryptography.hazmat.primitives.ciphers.modes', fromlist=['x']).CTR(bytes(16)))"
        ".encryptor(); self.noise.add_(chunk, std)", "correlation between steps, lag 1"),
    "noise from --seed in each step": (*bugs.SEEDED_NOISE_IN_EACH_STEP, "correlation between steps, lag 1"),
    "noise that remembers the step before": (
        STEP, ADD, "last = getattr(self, 'last', self.noise.add_(torch.zeros_like(chunk), std)); self.last = self.noise.add_("
        "torch.zeros_like(chunk), std).mul_(0.6).add_(last, alpha=0.8); chunk.add_(self.last)",
        "correlation between steps, lag 1"),
    "the same noise for two halves": (
        STEP, ADD, "new = self.noise.add_(torch.zeros_like(chunk), std); new[-2048:] = new[-4096:-2048]; chunk.add_(new)",
        "correlation between coordinates"),
    "Laplacian noise": (
        STEP, ADD, "chunk.add_(torch.distributions.Laplace(0.0, std / 2**0.5).sample(chunk.shape))", "shape"),
    "uniform noise": (STEP, ADD, "chunk.add_(torch.rand_like(chunk) - 0.5, alpha=std * 12**0.5)", "shape"),
    "noise on a coarse grid": (
        STEP, ADD, "chunk.add_((torch.randn_like(chunk) * 16).round() / 16, alpha=std)", "repeated values"),
}  # fmt: skip


def make_run(folder, **options):
    return make_trainer(folder, dataset=make_dataset([1] * 60), max_steps=12, per_device_train_batch_size=2,
                        gradient_accumulation_steps=2, learning_rate=1e-3, **options)  # fmt: skip


@catches("a check that is never asked", "training.saving.CertifiedTrainer.check_run", "self.monitors.test(full)", "pass",
    bug="half the noise")  # fmt: skip
@pytest.mark.parametrize("bug", sample(BUGS))
def test_wrong_noise_ends_the_run(tmp_path, monkeypatch, bug):
    name, old, new, message = BUGS[bug]
    function = find(name)
    monkeypatch.setattr(function, "__code__", with_edit(function, old, new))
    with pytest.raises(MechanismError, match=message):
        make_run(tmp_path).train()
    assert PrivacyLedger(tmp_path / "privacy_ledger.jsonl").steps <= 12


@catches("an alarm that is not written down", "accounting.ledger.PrivacyLedger.record_failure",
    'self._append({"record": "alarm", "found": failure})', "pass")  # fmt: skip
@catches("a run with an alarm that is resumed", "training.resuming.open_checkpoint_ledger", "ledger.check_no_failure()", "pass")
def test_failed_run_saves_resumes_and_claims_nothing(tmp_path):
    patch = pytest.MonkeyPatch()

    class AddNoNoiseFromStep4(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 4:
                patch.setattr(GaussianNoise, "add_", lambda self, total, std: total)

    options = {"save_strategy": "steps", "save_steps": 2, "logging_steps": 100}
    trainer = make_run(tmp_path, **options)
    (tmp_path / "README.md").write_text("| Guarantee | epsilon 1 |")
    trainer.add_callback(AddNoNoiseFromStep4())
    with pytest.raises(MechanismError, match=r"scale.* \(after 6 steps"):
        trainer.train()
    patch.undo()
    assert not (tmp_path / "checkpoint-6").exists()
    for path in (tmp_path / "checkpoint-2", tmp_path / "checkpoint-4"):
        report = read_report(path)
        assert report["epsilon"] is None and "scale" in report["alarm"] and report["steps"] in (2, 4)
    ledger = PrivacyLedger(tmp_path / "privacy_ledger.jsonl")
    assert (
        ledger.steps == 6
        and ledger.failure
        and "scale" in ledger.failure
        and "FAILURE" in format_ledger(ledger)
        and "no privacy" in format_ledger(ledger)
    )
    assert "without a privacy guarantee" in (tmp_path / "README.md").read_text()
    write_report(tmp_path)
    assert "none: the run found" in (tmp_path / "report.html").read_text()
    for resume in (True, str(tmp_path / "checkpoint-2"), None):
        with pytest.raises(UserError, match=r"was not as recorded in its ledger.*choose another --output_dir"):
            make_run(tmp_path, resume_from_checkpoint=resume, **options)
    with pytest.raises(UserError, match="the mechanism of a run"):
        trainer.train()
    lines = (tmp_path / "privacy_ledger.jsonl").read_text().splitlines(keepends=True)
    assert '"record": "alarm"' in lines[-1]
    (tmp_path / "privacy_ledger.jsonl").write_text("".join(lines[:-1]))
    with pytest.raises(UserError, match="was not as recorded"):  # though the record of the failure is removed
        make_run(tmp_path, resume_from_checkpoint=True, **options)


@pytest.mark.parametrize(
    "seeded", [bugs.NOISE_FROM_THE_SEED[2], "__import__('numpy').random.bytes(16)", "__import__('random').randbytes(16)",
               bugs.THE_SAME_NOISE_IN_EVERY_RUN[2]],
)  # fmt: skip
def test_seeded_noise_ends_the_run_before_its_first_step(tmp_path, monkeypatch, seeded):
    code = with_edit(find(f"{NOISE}.__init__"), "secrets.token_bytes(16)", seeded)
    monkeypatch.setattr(find(f"{NOISE}.__init__"), "__code__", code)
    with pytest.raises(MechanismError, match="follows the seed"):
        make_run(tmp_path).train()
    ledger = PrivacyLedger(tmp_path / "privacy_ledger.jsonl")
    assert ledger.steps == 0 and ledger.failure


def test_check_unseeded_restores_every_generator(tmp_path):
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    check_unseeded(lambda: GaussianNoise(torch.device("cpu")).add_(torch.zeros(PROBE_SIZE), 1.0), "noise")
    assert torch.equal(before[0], torch.get_rng_state()) and before[1] == np.random.get_state()[1].tolist()
    assert before[2] == random.getstate()


@pytest.mark.integration
def test_reused_noise_of_an_earlier_run_ends_the_run(tmp_path, monkeypatch):
    code = with_edit(find(f"{NOISE}.__init__"), *bugs.THE_SAME_NOISE_IN_EVERY_RUN[1:])
    monkeypatch.setattr(find(f"{NOISE}.__init__"), "__code__", code)
    monkeypatch.setattr("author_dp.guards.monitors.check_unseeded", lambda *_: None)  # or it would find it first
    make_run(tmp_path, save_strategy="steps", save_steps=6).train()
    with pytest.raises(MechanismError, match="correlation between this and earlier run 1"):
        make_run(tmp_path, save_strategy="steps", save_steps=6, resume_from_checkpoint=str(tmp_path / "checkpoint-6")).train()


@pytest.mark.integration
def test_correct_runs_in_one_directory_pass(tmp_path):
    for resume in (None, str(tmp_path / "checkpoint-6"), str(tmp_path / "checkpoint-6")):
        make_run(tmp_path, save_strategy="steps", save_steps=6, resume_from_checkpoint=resume).train()
    assert np.load(tmp_path / "_noise_check.npy").shape == (3, PROBE_SIZE)


@pytest.mark.integration
@pytest.mark.parametrize("processes", [0, 2])
def test_script_exits_with_status_3(tmp_path, checkpoint, comments, processes):
    (script := tmp_path / "fine-tune-dp.py").write_text(
        f"import runpy, sys\nsys.path.insert(0, {str(ROOT)!r})\nimport author_dp.mechanism.noise as noise\n"
        "add = noise.GaussianNoise.add_\nnoise.GaussianNoise.add_ = lambda self, total, std: add(self, total, std / 2)\n"
        f"runpy.run_path({str(SCRIPT)!r}, run_name='__main__')\n"
    )
    done = run_script(
        "--model_name", checkpoint, "--train_file", str(comments), "--output_dir", str(tmp_path / "out"),
        "--noise_multiplier", "1", "--per_sample_max_grad_norm", "1", "--max_steps", "3", "--sequence_len", "16",
        "--eval_fraction", "0", processes=processes, script=script,
    )  # fmt: skip
    message = "fine-tune-dp.py: the mechanism is not what the ledger says"
    assert done.stderr.count(message) == 1 and "MechanismError" not in done.stderr
    assert done.returncode == (3 if not processes else 1)
    assert (
        PrivacyLedger(tmp_path / "out" / "privacy_ledger.jsonl").failure and not (tmp_path / "out" / "model.safetensors").exists()
    )


@pytest.mark.integration
@pytest.mark.parametrize("secure", [False, True])
def test_correct_noise_passes(tmp_path, secure):
    trainer = make_run(tmp_path, privacy={"secure_noise": secure})
    trainer.train()
    assert trainer.budget.steps == 12 and trainer.monitors.noise.steps == 12 and trainer.budget.ledger.failure is None


@pytest.mark.integration
def test_run_without_noise_is_not_tested(tmp_path):
    make_run(tmp_path, privacy={"noise_multiplier": 0.0}).train()


@pytest.mark.integration
def test_probe_belongs_to_no_parameter(tmp_path):
    trainer = make_run(tmp_path)
    trainer.train()
    optimizer = trainer.optimizer.optimizer
    assert len(optimizer.grad_buffer.probe) == PROBE_SIZE and len(optimizer.grad_buffer.sums) == PROBE_SIZE + sum(
        p.numel() for p in optimizer.params
    )
    addresses = [p.summed_grad.data_ptr() for p in optimizer.params]
    assert optimizer.grad_buffer.probe.data_ptr() > max(addresses) and all(p.grad is None for p in [optimizer.grad_buffer.probe])


@pytest.mark.integration
def test_p_values_of_200_correct_runs_are_uniform():
    smallest = []
    for _ in range(200):
        source, monitor = GaussianNoise(torch.device("cpu")), NoiseMonitor(std=0.01)
        for step in range(1, 31):
            monitor.add(source.add_(torch.zeros(PROBE_SIZE), 0.01))
            if step % 5 == 0:
                monitor.test()
        smallest.append(min(monitor.p_values().values()) * len(monitor.p_values()))
    assert sorted(smallest)[0] > 1e-5 and np.mean(np.array(smallest) < 0.1) < 0.2  # Bonferroni: at most a tenth, on average


def test_scale_error_of_one_percent_is_found_within_200_steps():
    source, monitor, found = GaussianNoise(torch.device("cpu")), NoiseMonitor(std=1.0), None
    for step in range(1, 301):
        monitor.add(source.add_(torch.zeros(PROBE_SIZE), 1.01))
        if step % 10 == 0:
            try:
                monitor.test()
            except MechanismError:
                found = step
                break
    assert found is not None and found <= 200


def test_non_finite_noise_is_found():
    monitor = NoiseMonitor(std=1.0)
    monitor.add(torch.full((PROBE_SIZE,), float("nan")))
    with pytest.raises(MechanismError, match="not finite"):
        monitor.test()


def test_probe_history_of_another_size_is_ignored(tmp_path):
    np.save(tmp_path / "probes.npy", np.random.default_rng(0).standard_normal((2, 100)))
    monitor = NoiseMonitor(1.0, tmp_path / "probes.npy")
    monitor.add(torch.randn(PROBE_SIZE))
    monitor.test()
    assert np.load(tmp_path / "probes.npy").shape == (1, PROBE_SIZE)


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan, 1e300])
def test_damaged_probe_history_is_ignored(tmp_path, value):
    probes = np.random.default_rng(0).standard_normal((2, PROBE_SIZE))
    probes[0, 7] = value
    np.save(tmp_path / "probes.npy", probes)
    monitor = NoiseMonitor(1.0, tmp_path / "probes.npy")
    for _ in range(3):
        monitor.add(torch.randn(PROBE_SIZE))
        monitor.test()
    monitor = NoiseMonitor(1.0, tmp_path / "probes.npy")
    monitor.add(torch.from_numpy(probes[1]).float())  # the undamaged probe is still compared
    with pytest.raises(MechanismError, match="earlier run"):
        monitor.test()
