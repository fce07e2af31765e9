"""Noise with bands in whole runs: what is accounted, what the run checks of itself, and options."""

import math

import bugs
import numpy as np
import pytest
import test_processes
import torch
from conftest import flat, make_dataset, make_trainer, read_report, tiny_gpt2, train, trainable, within
from mutation import catches
from planting import find, with_edit
from test_gradient_canaries import audited
from test_noise_bands import CPU, KEY, make_sampler, matrix, participation

from author_dp.accounting.accountant import compute_epsilon, find_noise_multiplier
from author_dp.accounting.banded_mf import toeplitz_coefficients
from author_dp.accounting.events import MechanismEvent
from author_dp.accounting.ledger import PrivacyLedger
from author_dp.accounting.plan_text import format_plan
from author_dp.errors import MechanismError, UserError
from author_dp.guards.canary_monitor import CanaryMonitor
from author_dp.guards.noise_inversion import MatchedFilter, NoiseDecorrelator
from author_dp.guards.sampling_monitor import CyclicSamplingMonitor
from author_dp.mechanism.noise import BandMFNoise, GaussianNoise
from author_dp.mechanism.sampling import assign_sampling_groups
from dp_utils import PrivacyArguments

# --- whole runs -------------------------------------------------------------------------------------------


def banded(folder, bands="3", steps=7, authors=60, **options):
    privacy = {"noise_bands": bands, **options.pop("privacy", {})}
    return make_trainer(folder, dataset=make_dataset([1] * authors), privacy=privacy, max_steps=steps, **options)


@pytest.mark.integration
def test_report_and_ledger_tell_the_bands_and_what_is_accounted(tmp_path):
    trainer = banded(tmp_path, save_strategy="steps", save_steps=7)
    batches, _ = train(trainer)
    trainer.save_model()
    assert [batch.batch_index for batch in batches] == list(range(7))
    report, ledger = read_report(tmp_path), PrivacyLedger(tmp_path / "privacy_ledger.jsonl")
    told = {name: report[name] for name in ("sampling", "noise_bands", "sample_rate", "steps", "accounted_steps")}
    assert told == {"sampling": "cyclic-poisson", "noise_bands": 3, "sample_rate": 4 / 60, "steps": 7, "accounted_steps": 3}
    assert report["accounted_sample_rate"] == pytest.approx(0.2)
    assert report["epsilon"] == pytest.approx(compute_epsilon(1.0, 0.2, 3, 1 / 60), rel=2e-3)
    assert ledger.runs[0]["noise_bands"] == 3 and ledger.events == [MechanismEvent(1.0, pytest.approx(0.2), 3)]
    # Resumed for two more steps, a new mechanism begins: ceil(7 / 3) + ceil(2 / 3) accounted steps.
    again = banded(tmp_path, bands=None, steps=9, resume_from_checkpoint=True)
    assert again.plan.noise_bands == 3 and "starts a new banded segment" in again.summary()
    assert "starts a new banded segment" not in format_plan(trainer.plan, np.arange(61), 1, 1, 1.0, earlier_steps=0)
    again.train()
    again.save_model()
    assert read_report(tmp_path)["accounted_steps"] == 4 and read_report(tmp_path)["steps"] == 9
    spent = [MechanismEvent(1.0, pytest.approx(0.2), 3), MechanismEvent(1.0, pytest.approx(0.2), 1)]
    assert again.budget.ledger.events == spent
    with pytest.raises(UserError, match=r"--noise_bands 2: .* has 3"):
        banded(tmp_path, bands="2", resume_from_checkpoint=True)


def test_one_band_says_so(tmp_path):
    trainer = banded(tmp_path, bands=None, steps=2)
    trainer.train()
    report = trainer.privacy_report()
    assert report["sampling"] == "poisson" and report["noise_bands"] == 1
    assert report["accounted_sample_rate"] == report["sample_rate"] and report["accounted_steps"] == report["steps"] == 2


@pytest.mark.integration
def test_the_target_holds_for_each_step_taken_and_none_more(tmp_path):
    privacy = {"target_epsilon": 3.0, "noise_multiplier": None}
    trainer = banded(tmp_path, "4", steps=10, authors=200, privacy=privacy)
    accounted = [trainer.epsilon(steps) for steps in range(11)]
    assert len(set(accounted)) == 4 and accounted[-1] <= 3.0 and accounted[1] == accounted[4] < accounted[5]
    assert trainer.plan.noise_multiplier == pytest.approx(find_noise_multiplier(4 * 4 / 200, 3, 3.0, 1 / 200), rel=1e-3)


def test_released_noise_of_a_run_is_correlated_as_promised(tmp_path):
    trainer = banded(tmp_path, steps=9, authors=2_000, per_device_train_batch_size=1, privacy={"noise_multiplier": 20.0})
    _, recorder = train(trainer)
    released = torch.stack(recorder.gradients).numpy() / (20.0 * 0.5)  # the clipped sums drown
    found = released @ released.T / released.shape[1]
    inverse = np.linalg.inv(matrix(trainer.plan.coefficients(), 9))
    assert np.abs(found - inverse @ inverse.T).max() < 0.2 and abs((inverse @ inverse.T)[1, 0]) > 0.3


@pytest.mark.integration
@catches("noises kept over a resume", "dp_utils.DPTrainer.create_optimizer", "noisy.start_training(",
    "noisy.band_noise or noisy.start_training(")  # fmt: skip
def test_a_second_training_begins_a_new_mechanism(tmp_path):
    trainer = banded(tmp_path, steps=4)
    trainer.train()
    past = trainer.dp_optimizer.band_noise
    assert past.steps == 4
    try:
        trainer.train()
    except RuntimeError as error:  # draws are numbered anew, noises would not be
        pytest.fail(str(error))
    assert trainer.dp_optimizer.band_noise is not past and trainer.dp_optimizer.band_noise.steps == 4
    assert [spending.steps for spending in trainer.budget.ledger.events] == [2, 2]


def test_the_last_noises_are_on_no_disk(tmp_path):
    trainer = banded(tmp_path, steps=4, save_strategy="steps", save_steps=4, optim="adamw_torch")
    trainer.train()
    past = trainer.dp_optimizer.band_noise.past[:, :50].numpy()
    secrets = [row[i : i + 2].tobytes() for row in past for i in range(0, 50, 2)]  # two numbers are in no file by chance
    optimizer = torch.load(tmp_path / "checkpoint-4" / "optimizer.pt", weights_only=True)
    names = {name for state in optimizer["state"].values() for name in state}
    assert names == {"step", "exp_avg", "exp_avg_sq", "noise_variance"}  # the last one a number, which is public
    assert all(isinstance(state["noise_variance"], float) for state in optimizer["state"].values())
    for path in tmp_path.rglob("*"):
        content = path.read_bytes() if path.is_file() else b""
        assert not any(secret in content for secret in secrets), path


@pytest.mark.integration
@catches("groups from --seed", *bugs.GROUPS_FROM_THE_SEED)
def test_one_seed_deals_no_groups(tmp_path):
    groups = []
    for run in range(2):
        trainer = banded(tmp_path / str(run), steps=3, seed=5)
        watch = trainer.monitors.watch_sampler
        trainer.monitors.watch_sampler = lambda sampler, watch=watch: (groups.append(sampler.groups), watch(sampler))
        trainer.train()
    assert within((groups[0] == groups[1]).mean(), 1 / 3, math.sqrt(2 / 9 / 60))


def throw_a_draw_away(trainer):
    """Let the run sample a batch that no step uses."""
    watch = trainer.monitors.watch_sampler

    def watch_and_skip(sampler):
        watch(sampler)
        sampler.sample_batch()

    trainer.monitors.watch_sampler = watch_and_skip


@catches("draws thrown away", "mechanism.optimizer.AuthorDPOptimizer.check_batch", "self.batch_index != self.next_batch",
    "False")  # fmt: skip
def test_draws_thrown_away_end_the_run(tmp_path):
    trainer = banded(tmp_path, steps=6)
    throw_a_draw_away(trainer)
    with pytest.raises(RuntimeError, match="discarded batch"):
        trainer.train()
    assert trainer.budget.ledger.steps == 0


@catches("a share of the noise in a slice that has it alone", "mechanism.optimizer.AuthorDPOptimizer.add_noise_and_divide",
    "self.noise, std)", "self.noise, std / math.sqrt(self.grad_buffer.noise_shares))", spawned=True)  # fmt: skip
@pytest.mark.integration
def test_two_processes_add_the_noise_of_one_in_slices(tmp_path):
    options = {"model": {}, "counts": [1] * 9, "privacy": {"noise_multiplier": 30.0, "noise_bands": "2"}, "per_device": 1}
    first, second = test_processes.run_processes(tmp_path, 2, **options, steps=2)
    scale = 1 / toeplitz_coefficients(2, 2)[0]  # of the first step
    noise = first["gradient"] * 2 / (30.0 * 0.5 * scale)
    for part in noise.tensor_split(2):
        assert within(part.var().item(), 1, math.sqrt(2 / len(part)) + 0.01)
    assert torch.equal(first["gradient"], second["gradient"])


# --- options ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"noise_bands": "0"}, "--noise_bands 0: not a number of steps"),
        ({"noise_bands": "-2"}, "--noise_bands -2: not"),
        ({"noise_bands": "many"}, "--noise_bands many: not"),
        ({"noise_bands": "auto"}, "auto: it minimizes the noise for a --target_epsilon"),
    ],
)
def test_options_are_checked(options, words):
    with pytest.raises(UserError, match=words):
        PrivacyArguments(noise_multiplier=1.0, per_sample_max_grad_norm=1.0, **options)


def test_too_many_bands_are_refused(tmp_path):
    with pytest.raises(UserError, match="at most 5"):
        banded(tmp_path, "6", authors=20)
    with pytest.raises(UserError, match="more than the 7 steps"):
        banded(tmp_path, "8", authors=400)
    assert banded(tmp_path, "6", authors=20, privacy={"disable_dp": True}).plan.noise_bands == 1


def test_a_data_set_without_hashes_is_refused(tmp_path):
    dataset = make_dataset([1] * 60)
    dataset.hashes = None
    with pytest.raises(ValueError, match="author_hashes"):
        make_trainer(tmp_path, dataset=dataset, privacy={"noise_bands": "2"}, max_steps=4)


# --- what a run checks of itself --------------------------------------------------------------------------


def test_honest_draws_of_groups_raise_no_alarm_and_wrong_ones_do():
    hashes = np.random.default_rng(3).integers(2**63, size=600).astype(np.uint64)
    wrong = {
        "another group": lambda sampler: setattr(sampler, "members", sampler.members[::-1]),
        "number of sampled authors|batch size": lambda sampler: setattr(sampler, "sample_rate", 0.4),
        "never sampled": lambda sampler: setattr(sampler, "sample_indices", lambda number: np.arange(number // 10)),
    }
    for name, spoil in {"": lambda sampler: None, **wrong}.items():
        groups = assign_sampling_groups(hashes, 4, KEY)
        sampler, check = make_sampler([1] * 600, 0.025, 4, groups), CyclicSamplingMonitor(groups, 4, 0, 0.1)
        sampler.on_batch = check.on_sample
        spoil(sampler)
        for _ in range(400):
            check.on_step(sampler.sample_batch().batch_size)
        if name:
            with pytest.raises(MechanismError, match=name):
                check.test()
        else:
            check.test()
            assert min(check.p_values().values()) > 1e-6
    lopsided = CyclicSamplingMonitor(np.zeros(600, np.int64), 4, 0, 0.1)
    lopsided.on_step(0)
    with pytest.raises(MechanismError, match="group sizes"):
        lopsided.test()


def test_a_canary_gives_one_number_for_each_time_its_group_is_drawn():
    c, steps, authors, sigma = toeplitz_coefficients(3, 60), 60, 4_000, 0.7
    drawn, groups = participation(authors, 0.1, 3, steps)
    noise = BandMFNoise(c, authors, CPU)
    source, undo, filtered = GaussianNoise(CPU), NoiseDecorrelator(c), MatchedFilter(c, groups)
    values = []
    for row in drawn:
        released = noise.add_(torch.from_numpy(row.astype(np.float32)), source, sigma)
        if (value := filtered(undo(released))) is not None:
            values.append(value.numpy())
    whens = np.stack([drawn[group::3][: len(values)][:, a] for a, group in enumerate(groups)], 1)
    assert len(values) == 19  # the last cycle is not whole
    rest = np.stack(values) - whens
    assert within(rest.var() / sigma**2, 1, math.sqrt(2 / rest.size)) and within(rest.mean(), 0, sigma / math.sqrt(rest.size))
    assert within((rest[1:] * rest[:-1]).mean() / sigma**2, 0, 1 / math.sqrt(rest[1:].size))
    law = CanaryMonitor(sigma, 0.3, np.ones(authors, bool))
    for value in values:
        law.add(torch.from_numpy(value))
    law.test()
    assert min(law.p_values().values()) > 1e-6


STEP = "author_dp.mechanism.optimizer.AuthorDPOptimizer"
BUGS = {
    "no bug": (f"{STEP}.pre_step", "self._used = True", "self._used = True", None),
    "a band dropped": (*bugs.A_BAND_DROPPED, "between steps"),
    "independent noise": ("author_dp.mechanism.noise.BandMFNoise.add_", "noise.sub_(past[row], alpha=coefficient)", "pass",
        "scale"),
    "half the noise": (f"{STEP}.add_noise_and_divide", "noise_slice, self.noise, std", "noise_slice, self.noise, 0.5 * std",
        "scale"),
    "a group in every step": (
        "author_dp.mechanism.sampling.CyclicAuthorSampler.sample_authors", "self.batches % len(self.members)", "0",
        "another group"),
    "b q drawn twice": (
        "author_dp.mechanism.sampling.PoissonAuthorSampler.sample_indices", "chunks, last = [], -1",
        "chunks, last, self.sample_rate = [], -1, 0.45",
        "number of sampled authors|batch size"),
    "groups from --seed": (*bugs.GROUPS_FROM_THE_SEED, "group assignment"),
    "draws from --seed behind secret groups": (*bugs.SAMPLING_FROM_THE_SEED, "sampling follows the seed"),
}  # fmt: skip


@pytest.mark.integration
@pytest.mark.parametrize("bug", BUGS)
def test_a_wrong_mechanism_ends_a_real_run_and_a_right_one_does_not(tmp_path, monkeypatch, bug):
    where, old, new, found = BUGS[bug]
    trainer = audited(tmp_path, steps=40, privacy={"noise_bands": "3"})
    monkeypatch.setattr(find(where), "__code__", with_edit(find(where), old, new))
    if found is None:
        trainer.train()
        result = trainer.canaries.finish(trainer)
        low, high = result["noise_multiplier_between"]
        assert within((low + high) / 2, 1.0, (high - low) / 4) and result["steps_checked"] == 12  # 95 %: two deviations each way
        assert result["epsilon_lower_bound"] <= trainer.epsilon()
    else:
        with pytest.raises(MechanismError, match=found):
            trainer.train()


@catches("bands forgotten by the ledger", "accounting.ledger.ledger_event_of_run", 'header.get("noise_bands", 1)', "1")
def test_the_ledger_reads_bands_and_refuses_none(tmp_path):
    path = tmp_path / "privacy_ledger.jsonl"
    ledger = PrivacyLedger(path)
    ledger.start_run({"noise_multiplier": 1.0, "sample_rate": 0.1, "noise_bands": 4})
    for _ in range(5):
        ledger.record_step()
    assert PrivacyLedger(path).events == [MechanismEvent(1.0, 0.4, 2)] and PrivacyLedger(path).accounted_steps == 2
    for bands in (0, -1, 2.5, 11):
        with pytest.raises((ValueError, TypeError)):
            header = {"record": "run", "noise_multiplier": 1.0, "sample_rate": 0.1, "noise_bands": bands}
            PrivacyLedger(tmp_path / "other.jsonl")._apply(header)


def test_weights_learn_with_bands_as_without_noise(tmp_path):
    """The clipped sums are as ever: without noise, bands change who is drawn, nothing else."""
    model = tiny_gpt2()
    before = flat(trainable(model).values()).clone()
    trainer = make_trainer(
        tmp_path, model, dataset=make_dataset([1] * 60), privacy={"noise_multiplier": 0.0, "noise_bands": "3"}, max_steps=3
    )
    _, recorder = train(trainer)
    assert torch.allclose(before - flat(trainable(model).values()), sum(recorder.gradients), atol=1e-5)
