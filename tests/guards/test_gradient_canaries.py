"""gradient_canaries.py, canary_monitor.py, sampling_monitor.py: a run finds wrong sampling, clipping and noise by itself."""

import json
import math
import secrets
from types import SimpleNamespace

import bugs
import numpy as np
import pytest
import torch
from conftest import flat, make_dataset, read_report, run_script, tiny_gpt2, trainable, within
from mutation import catches
from planting import find, with_edit
from scipy import stats
from script_runs import PRIVACY, run_here, small
from transformers import TrainingArguments

from author_dp.accounting.accountant import epsilon_of
from author_dp.accounting.events import MechanismEvent
from author_dp.accounting.gaussian import gaussian_epsilon
from author_dp.accounting.ledger import PrivacyLedger
from author_dp.errors import MechanismError, UserError
from author_dp.guards.canary_monitor import CanaryMonitor, CanaryScoreDistribution, canary_score_to_normal, score_canaries
from author_dp.guards.gradient_canaries import GradientCanaries, gradient_canary_intervals
from author_dp.guards.one_run_audit import gaussian_mu_lower_bound, one_run_lower_bound, one_run_rejects_mu
from author_dp.guards.sampling_monitor import SamplingMonitor
from author_dp.guards.seed_checks import check_unseeded_sampling
from author_dp.mechanism.optimizer import PROBE_SIZE
from author_dp.mechanism.sampling import CyclicAuthorSampler, PoissonAuthorSampler, assign_sampling_groups, without_groups
from author_dp.outputs.guarantee import guarantee_table_rows
from data_utils import collate
from dp_utils import DPTrainer, PrivacyArguments

STEP = "author_dp.mechanism.optimizer.AuthorDPOptimizer.pre_step"
ADD_NOISE = "author_dp.mechanism.optimizer.AuthorDPOptimizer.add_noise_and_divide"
CLIP = "author_dp.clipping.author_groups.AuthorClipFactors.__init__"
DRAW = "author_dp.mechanism.sampling.PoissonAuthorSampler"


def audited(folder, canaries: int = 200, steps: int = 16, per_device: int = 16, authors: int = 150, **more) -> DPTrainer:
    """Return a trainer with gradient canaries, two samples of an author in a step, tested after each step."""
    privacy = {"noise_multiplier": 1.0, "per_sample_max_grad_norm": 0.5, "samples_per_author": 2, **more.pop("privacy", {})}
    args = TrainingArguments(
        output_dir=str(folder), max_grad_norm=0.0, optim="sgd", learning_rate=0.1, lr_scheduler_type="constant", max_steps=steps,
        use_cpu=True, report_to=[], disable_tqdm=True, save_strategy=more.pop("save_strategy", "no"),
        logging_steps=more.pop("logging_steps", 1),
        per_device_train_batch_size=per_device, remove_unused_columns=False, **more,
    )  # fmt: skip
    return DPTrainer(
        tiny_gpt2(), args, PrivacyArguments(**privacy), train_dataset=make_dataset([2] * authors), data_collator=collate,
        canaries=GradientCanaries(canaries, key=5) if canaries else None,
    )  # fmt: skip


# A plausible mistake, and the test that fails; tested at each step.
BUGS: dict[str, tuple] = {
    "no noise": (*bugs.NO_NOISE, "scale"),
    "half the noise": (*bugs.HALF_THE_NOISE, "scale"),
    "noise for the parameters alone": (*bugs.NOISE_FOR_PARAMETERS_ALONE, "scale"),
    "noise that spares the canaries": (
        ADD_NOISE, "self.grad_buffer.sums.split(self.noise.chunk_size)",
        "self.grad_buffer.sums[:-len(self.grad_buffer.probe) + 4096].split(self.noise.chunk_size)", "canaries fail"),
    "twice the clip norm": (*bugs.TWICE_THE_CLIP_NORM, "canaries fail", {"steps": 120}),
    "no clip": (*bugs.NO_CLIP, "canaries fail"),
    "an author counted twice": (
        CLIP, "(clip_norm / norms).clamp(max=1.0)",
        "(clip_norm / norms).clamp(max=1.0) * torch.bincount(authors.author, minlength=authors.num_authors)", "canaries fail",
        {"steps": 120}),
    "a clip for each sample": (*bugs.CLIP_PER_SAMPLE, "canaries fail", {"steps": 120}),
    "half the clip norm": (CLIP, "(clip_norm / norms)", "(0.5 * clip_norm / norms)", "canaries fail",
        {"steps": 80, "privacy": {"noise_multiplier": 0.5}}),
    "q doubled": (*bugs.RATE_DOUBLED, "number of sampled authors|batch size"),
    "shuffled batches": (
        f"{DRAW}.sample_indices", "chunks, last = [], -1",
        "chunks, last = [], -1\n    if not len(getattr(self, 'deck', [])): self.deck = __import__('numpy')"
        ".random.default_rng().permutation(size)\n    size = round(size * self.sample_rate); taken, self.deck = self.deck"
        "[:size], self.deck[size:]\n    return np.sort(taken)", "number of authors never sampled"),
    "an author who is always in": (*bugs.AN_AUTHOR_ALWAYS_IN, "frequency of one author"),
    "an author who is never in": (
        f"{DRAW}.sample_indices", "return sampled[sampled < size]", "return sampled[(sampled < size) & (sampled != 3)]",
        "frequency of one author", {"steps": 260, "per_device": 50, "canaries": 0}),
    "every draw used twice": (
        f"{DRAW}.sample_indices", "return sampled[sampled < size]",
        "last = getattr(self, 'last', None); self.last = sampled[sampled < size] if last is None else None\n"
        "    return self.last if last is None else last", "overlap of consecutive batches"),
    "empty draws skipped": (
        f"{DRAW}.sample_batch", "authors = self.sample_authors()",
        "authors = self.sample_authors()\n    while not len(authors): authors = self.sample_authors()",
        "number of|batch size", {"steps": 120, "per_device": 1, "canaries": 0, "logging_steps": 20}),
    "canaries drawn, real authors rarely": (
        f"{DRAW}.sample_batch", "authors = self.sample_authors()",
        "authors = self.sample_authors()\n    authors = authors[(authors >= self.num_real) | (authors % 2 == 0)]",
        "number of|batch size", {"steps": 40}),
    "division by the real batch size": (*bugs.DIVISION_BY_THE_REAL_BATCH_SIZE, "scale"),
    "noise of every microbatch": (*bugs.NOISE_OF_EVERY_MICROBATCH, "scale"),
    "clipped again after the noise": (
        STEP, "if self.after_release is not None:",
        "self.grad_buffer.sums.mul_(min(1.0, 0.5 / float(self.grad_buffer.sums.norm())))\n"
        "    if self.after_release is not None:", "scale"),
    "draws from --seed": (*bugs.SAMPLING_FROM_THE_SEED, "sampling follows the seed"),
}  # fmt: skip


@pytest.mark.integration
@pytest.mark.parametrize("bug", BUGS)
def test_wrong_mechanism_ends_the_run(tmp_path, monkeypatch, bug):
    name, old, new, message, *options = BUGS[bug]
    function = find(name)
    trainer = audited(tmp_path, **(options[0] if options else {}))
    code = with_edit(function, old, new)
    monkeypatch.setattr(function, "__code__", code)  # only now: the model check at the start finds wrong clipping
    with pytest.raises(MechanismError, match=message):
        trainer.train()
    assert PrivacyLedger(tmp_path / "privacy_ledger.jsonl").failure


@pytest.mark.integration
@pytest.mark.parametrize("clipping", ["ghost", "grad_sample"])
def test_correct_mechanism_passes_and_intervals_cover_it(tmp_path, clipping):
    trainer = audited(tmp_path, privacy={"clipping": clipping})
    trainer.train()
    audit = trainer.canaries.finish(trainer)
    low, high = audit["noise_multiplier_between"]
    assert within((low + high) / 2, 1.0, (high - low) / 4)  # 95 %: two standard errors each way
    assert audit["epsilon_between"][0] <= audit["epsilon_between"][1] and audit["steps_checked"] == 16
    assert audit["epsilon_lower_bound"] <= trainer.epsilon()


@catches("noise of earlier trainings taken for seen", "guards.gradient_canaries.gradient_canary_intervals",
    "events = [*earlier, event._replace",
    "events = [*(e._replace(noise_multiplier=e.noise_multiplier * factor) for e in earlier), event._replace")  # fmt: skip
def test_intervals_are_of_this_training_alone():
    earlier, event = MechanismEvent(0.5, 0.1, 1_000), MechanismEvent(10.0, 0.1, 1)
    monitor = SimpleNamespace(steps=1, confidence_interval=lambda confidence: (0.5, 2.0))
    plan = SimpleNamespace(noise_multiplier=10.0, slots=None, delta=1e-5)
    budget = SimpleNamespace(ledger=SimpleNamespace(events=[earlier, event]))
    monitors = SimpleNamespace(noise=monitor)
    trainer = SimpleNamespace(is_world_process_zero=lambda: True, monitors=monitors, plan=plan, budget=budget)
    audit = gradient_canary_intervals(trainer)
    exact = epsilon_of([earlier], 1e-5)
    assert audit["noise_multiplier_between"] == [5.0, 20.0]
    assert all(0.99 * exact < epsilon < 1.01 * exact for epsilon in audit["epsilon_between"])


@pytest.mark.integration
def test_gradient_canaries_change_neither_model_nor_losses(tmp_path):
    """Without noise and with every author in each step, canaries change nothing."""
    weights, losses = [], []
    for canaries in (0, 20):
        privacy = {"noise_multiplier": 1e-3, "sample_rate": 1.0, "target_delta": 1e-5}
        trainer = audited(tmp_path / str(canaries), canaries, steps=3, per_device=64, authors=12, privacy=privacy)
        trainer.train()
        weights.append(flat(trainable(trainer.model).values()))
        losses.append([row["loss"] for row in trainer.state.log_history if "loss" in row])
        assert trainer.norms.histogram() is not None
        trainer.save_model()
    assert torch.allclose(*weights, atol=1e-4) and np.allclose(*losses, atol=1e-4)
    names = [set(json.loads((tmp_path / c / "config.json").read_text())) for c in ("0", "20")]
    assert names[0] == names[1] and not any("table" in name for name in trainer.model.state_dict())


@pytest.mark.parametrize("clipping", ["ghost", "grad_sample"])
def test_gradient_canary_adds_the_clip_norm_in_its_coordinate(tmp_path, monkeypatch, clipping):
    privacy = {"noise_multiplier": 1e-6, "sample_rate": 1.0, "target_delta": 1e-5, "clipping": clipping}
    trainer = audited(tmp_path, 30, steps=1, per_device=16, authors=5, privacy=privacy)
    seen = []
    monkeypatch.setattr(CanaryMonitor, "add", lambda self, released: seen.append(released.clone()))
    trainer.train()
    expected = torch.from_numpy(trainer.canaries.included).float() * 0.5 / 16
    assert torch.allclose(seen[0], expected, atol=1e-5)
    assert len(trainer.optimizer.optimizer.grad_buffer.probe) == PROBE_SIZE + 30 and not trainer.canaries.table.weight.any()


# --- the distribution of releases ---------------------------------------------------------------------------


@pytest.mark.parametrize(("sigma", "rate"), [(0.65, 0.013), (1.0, 0.3), (3.0, 1.0)])
def test_to_normal_gives_standard_normals(sigma, rate):
    generator = np.random.default_rng(0)
    x = (generator.random(200_000) < rate) + sigma * generator.standard_normal(200_000)
    assert stats.kstest(canary_score_to_normal(x, sigma, rate), "norm").pvalue > 1e-4
    assert np.isfinite(canary_score_to_normal(np.array([-8.0 * sigma, 1 + 8 * sigma]), sigma, rate)).all()


@pytest.mark.parametrize(("sigma", "rate"), [(0.65, 0.013), (1.0, 0.3), (2.0, 1.0)])
def test_score_distribution_has_the_moments_of_samples(sigma, rate):
    generator = np.random.default_rng(0)
    x = (generator.random(400_000) < rate) + sigma * generator.standard_normal(400_000)
    scores, null = score_canaries(x, sigma, rate), CanaryScoreDistribution(sigma, rate)
    mean, variance = null.mean, null.variance
    assert np.abs(mean).max() < 1e-3  # scores are centered, but for the clipping at MAX_SCORE
    for k in range(2):
        assert scores[k].var() == pytest.approx(variance[k], rel=0.05, abs=1e-12)
        assert within(scores[k].mean(), mean[k], (variance[k] / 400_000) ** 0.5 + 1e-12)


def test_score_p_values_are_bounds_and_find_wrong_rate_and_norm():
    generator, null = np.random.default_rng(0), CanaryScoreDistribution(1.0, 0.1)

    def p_values(rate, norm):
        x = norm * (generator.random((300, 1_000)) < rate) + generator.standard_normal((300, 1_000))
        totals = (score_canaries(x, 1.0, 0.1) - null.mean[:, None, None]).sum(2)
        return [np.array([null.p_value(k, total, 1_000) for total in totals[k]]) for k in range(2)]

    for values in p_values(0.1, 1.0):
        for level in (0.3, 0.1, 0.03):
            assert (values <= level).mean() <= level + 4 * (level / 300) ** 0.5
    assert np.median(p_values(0.3, 1.0)[0]) < 1e-7 and np.median(p_values(0.1, 2.0)[1]) < 1e-7


@pytest.mark.integration
def test_monitors_pass_in_100_correct_runs():
    generator = np.random.default_rng(1)
    smallest = []
    for run in range(100):
        sigma, rate = 0.5 + run / 50, (0.01, 0.1, 0.5)[run % 3]
        included = generator.random(300) < 0.5
        canary_monitor, sampling = CanaryMonitor(sigma, rate, included), SamplingMonitor(300, 40, rate)
        sampler = PoissonAuthorSampler(np.arange(301), np.arange(300), sample_rate=rate, samples_per_author=1, steps=1,
                                       key=int(generator.integers(2**60)), num_canaries=40)  # fmt: skip
        sampler.on_batch = sampling.on_sample
        for step in range(1, 31):
            sampling.on_step(sampler.sample_batch().batch_size)
            drawn = included & (generator.random(300) < rate)
            canary_monitor.add(torch.from_numpy(drawn + sigma * generator.standard_normal(300)))
            if step % 5 == 0:
                canary_monitor.test()
                sampling.test()
        monitors = (canary_monitor, sampling)
        smallest.append(min(min(monitor.p_values().values()) * len(monitor.p_values()) for monitor in monitors))
    assert min(smallest) > 1e-6 and np.mean(np.array(smallest) < 0.1) < 0.3  # two monitors, Bonferroni within each


# --- sampling -----------------------------------------------------------------------------------------------


def test_check_unseeded_sampling_finds_seeds():
    def sampler_maker(key):
        return lambda: PoissonAuthorSampler(np.arange(31), np.arange(30), sample_rate=0.2, samples_per_author=1, steps=1,
                                            key=key()).sample_authors  # fmt: skip

    check_unseeded_sampling(sampler_maker(lambda: secrets.randbits(128)), 30, 0.2)
    for seeded in (torch.initial_seed, lambda: int(torch.randint(2**60, ())), lambda: int(np.random.randint(2**60)), lambda: 3):
        with pytest.raises(MechanismError, match="follows the seed"):
            check_unseeded_sampling(sampler_maker(seeded), 30, 0.2)
    check_unseeded_sampling(lambda: lambda: np.arange(30), 30, 1.0)  # every author, always: nothing to compare


@pytest.mark.parametrize("bands", [4, 16])
def test_check_unseeded_sampling_finds_seeds_behind_groups(bands):
    """Groups of few authors are often empty in two correct samplers; and secret groups would hide that batches are alike."""

    def sampler_maker(key):
        def make():
            groups = assign_sampling_groups(np.arange(6, dtype=np.uint64), bands, secrets.token_bytes(16))
            sampler = CyclicAuthorSampler(np.arange(7), np.arange(6), sample_rate=0.02, samples_per_author=1, steps=1, key=key(),
                                          groups=groups, bands=bands)  # fmt: skip
            return without_groups(sampler)

        return make

    for _ in range(100):
        check_unseeded_sampling(sampler_maker(lambda: secrets.randbits(128)), 6, bands * 0.02)
    with pytest.raises(MechanismError, match="follows the seed"):
        check_unseeded_sampling(sampler_maker(torch.initial_seed), 6, bands * 0.02)


# --- the one-run bound for mu-GDP -----------------------------------------------------------------------------


@pytest.mark.integration
def test_gaussian_mu_lower_bound_holds_and_is_tighter():
    generator = np.random.default_rng(0)
    for mu in (0.5, 2.0):
        found, other = [], []
        for _ in range(60):
            included = generator.random(1_000) < 0.5
            scores = mu * included + generator.standard_normal(1_000)
            found.append(gaussian_mu_lower_bound(scores, included))
            other.append(one_run_lower_bound(scores, included, 1e-5)["epsilon_lower_bound"])
        assert np.mean(np.array(found) > mu) <= 0.15  # 5 % expected at most
        assert np.median(found) > 0.3 * mu and gaussian_epsilon(np.median(found), 1e-5) > np.median(other)


def test_rejects_mu_accepts_likely_guesses():
    for mu in (0.3, 1.0, 3.0):
        right = stats.norm.cdf(mu / 2)  # of a guess by which side of the middle a score lies on
        likely = int(stats.binom.ppf(0.5, 500, right))
        assert not one_run_rejects_mu(mu, 500, 500, likely, 0.05)
        assert one_run_rejects_mu(0.2 * mu, 500, 500, int(stats.binom.ppf(0.999, 500, right)), 0.05) or mu < 0.5


# --- options and whole runs -----------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [["--audit_kind", "gradient"], ["--audit_kind", "nonsense", "--audit_canaries", "100"]])
def test_audit_options_are_checked(tmp_path, monkeypatch, capfd, options):
    status, stderr = run_here(monkeypatch, capfd, *small("model", "data.jsonl", tmp_path, *PRIVACY, *options))
    assert status == 2 and "--audit_kind" in stderr, stderr


@pytest.mark.parametrize("privacy", [{"noise_multiplier": 0.0}, {"noise_multiplier": None, "disable_dp": True}])
def test_gradient_canaries_need_noise(tmp_path, privacy):
    with pytest.raises(UserError, match="--audit_kind gradient"):
        audited(tmp_path, privacy=privacy)


@pytest.mark.integration
@pytest.mark.parametrize("processes", [0, 2])
def test_script_reports_the_gradient_audit(checkpoint, comments, tmp_path, processes):
    options = ["--audit_canaries", "300", "--audit_kind", "gradient", "--dataloader_num_workers", "1"]
    done = run_script(*small(checkpoint, comments, tmp_path, *PRIVACY, *options), processes=processes)
    assert done.returncode == 0, done.stderr
    audit = read_report(tmp_path)["audit"]
    assert audit["kind"] == "gradient" and audit["canaries"] == 300 and audit["steps_checked"] == 3
    low, high = audit["epsilon_between"]
    assert low < 8.0 * 1.1 and high > 8.0 * 0.9 and math.isclose(low, high, rel_tol=0.2)


@pytest.mark.integration
def test_finished_run_keeps_its_audit(tmp_path):
    """Started again, it trains nothing, and so has no new audit."""
    options = {"steps": 3, "save_strategy": "steps", "save_steps": 3}
    trainer = audited(tmp_path, **options)
    trainer.train()
    trainer.run_report.audit = trainer.canaries.finish(trainer)
    trainer.save_model()
    again = audited(tmp_path, **options, resume_from_checkpoint=True)
    again.train()
    again.run_report.audit = again.canaries.finish(again)
    assert again.run_report.audit == trainer.run_report.audit and again.run_report.audit["steps_checked"] == 3
    assert dict(guarantee_table_rows(again.privacy_report()))["Audit of gradients"]


@pytest.mark.parametrize(("sigma", "rate"), [(1.0, 1.0), (0.5, 0.5)])
def test_canary_monitor_passes_with_many_canaries(sigma, rate):
    """Some of so many float32 numbers are equal."""
    generator = np.random.default_rng(0)
    included = generator.random(300_000) < 0.5
    monitor = CanaryMonitor(sigma, rate, included)
    x = (included & (generator.random(len(included)) < rate)) + sigma * generator.standard_normal(len(included))
    monitor.add(torch.from_numpy(x.astype(np.float32)))
    monitor.test()


@pytest.mark.parametrize("are_included", [False, True])
def test_canary_monitor_passes_with_equal_coins(are_included):
    """The coins of 10 canaries, the fewest allowed, are all equal once in 512 runs."""
    monitor = CanaryMonitor(1.0, 1.0, np.full(10, are_included))
    generator = np.random.default_rng(0)
    for _ in range(5):
        monitor.add(torch.from_numpy((are_included + generator.standard_normal(10)).astype(np.float32)))
        monitor.test()
