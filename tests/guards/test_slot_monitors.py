"""guards/slot_monitors.py: a run finds other authors than those of a slot, slots that are no random ones, and wrong canaries."""

import math

import numpy as np
import pytest
from conftest import within
from mutation import catches
from test_gradient_canaries import audited
from test_slots import TARGET, sampler_of

from author_dp.errors import MechanismError
from author_dp.guards.slot_monitors import SlotCanaryMonitor, SlotMonitor, slot_sizes_p_value


def watched(sampler, epochs=3, num_canaries=0):
    monitor = SlotMonitor(sampler.groups, sampler.steps, num_canaries)
    sampler.on_batch = monitor.on_sample
    for _ in range(epochs):
        for batch in sampler:
            monitor.on_step(batch.batch_size)
    return monitor


def test_monitor_passes_correct_slots():
    for seed in range(50):
        watched(sampler_of(authors=300 if seed % 2 else 5, key=seed.to_bytes(32, "big")), num_canaries=0).test()


def skip_empty(sampler):
    sample = sampler.sample_batch
    sampler.sample_batch = lambda: next(batch for batch in iter(sample, None) if batch.batch_size)


def draw_anew(sampler):
    def authors():
        generator = np.random.default_rng(sampler.batches // sampler.steps)
        return np.flatnonzero(generator.permutation(sampler.groups) == sampler.batches % sampler.steps)

    sampler.sample_authors = authors


def keep_one(sampler):
    of_slot = sampler.sample_authors
    sampler.sample_authors = lambda: np.union1d(of_slot(), [3])


def leave_one_out(sampler):
    of_slot = sampler.sample_authors
    sampler.sample_authors = lambda: np.setdiff1d(of_slot(), [3])


@pytest.mark.parametrize(
    ("break_it", "words"),
    [(draw_anew, "authors other than"), (keep_one, "authors other than"), (leave_one_out, "authors other than"),
     (skip_empty, "batch size")],
)  # fmt: skip
def test_monitor_finds_other_batches(break_it, words):
    sampler = sampler_of(authors=6 if break_it is skip_empty else 300)
    break_it(sampler)
    with pytest.raises(MechanismError, match=f"balls-in-bins sampling of authors fails a test: .*{words}"):
        watched(sampler).test()


@catches("slots of any size", "guards.slot_monitors.SlotMonitor.p_values", "2 * self.number * float(extremes.min())", "1.0")
def test_monitor_finds_slots_that_are_not_independent():
    for slots in (np.arange(2_000) % 40, np.random.default_rng(0).permutation(2_000) % 40):  # dealt out, however shuffled
        monitor = SlotMonitor(slots, 40, 0)
        monitor.steps = 1
        with pytest.raises(MechanismError, match="slots of equal size"):
            monitor.test()
    crowded = np.random.default_rng(0).integers(0, 40, 2_000)
    crowded[:100] = 5
    monitor = SlotMonitor(crowded, 40, 0)
    monitor.steps = 1
    with pytest.raises(MechanismError, match="size of one slot"):
        monitor.test()


def test_bound_on_even_sizes_is_a_bound():
    generator = np.random.default_rng(0)
    for authors, number in ((3, 2), (20, 2), (50, 7), (500, 40), (40, 100)):
        p_values = [slot_sizes_p_value(generator.multinomial(authors, np.ones(number) / number)) for _ in range(2_000)]
        for level in (0.5, 0.1, 0.01):
            assert np.mean(np.array(p_values) <= level) <= level + 5 * math.sqrt(level / 2_000)
    assert slot_sizes_p_value(np.array([5, 5])) > 0.1 and slot_sizes_p_value(np.full(100, 20)) < 1e-12


def canary_monitor(rows, slots, included, sigma=0.7, coefficients=(0.8, 0.5, 0.3), number=5) -> SlotCanaryMonitor:
    monitor = SlotCanaryMonitor(sigma, np.array(coefficients), number, included)
    monitor.set_slots(np.concatenate([np.zeros(9, np.int64), slots[included]]))
    for row in rows:
        monitor.add_step(row)
    return monitor


def canary_rows(slots, included, steps, norm=1.0, sigma=0.7, coefficients=(0.8, 0.5, 0.3), number=5, seed=0):
    rows = np.random.default_rng(seed).normal(size=(steps, len(slots))) * sigma
    for step in range(steps):
        for lag, coefficient in enumerate(coefficients[: steps - step]):
            rows[step + lag] += norm * coefficient * (included & (slots == step % number))
    return rows


@pytest.mark.parametrize("steps", [3, 12, 61])
def test_canary_monitor_passes_and_has_the_ratio_of_the_mixture(steps):
    generator = np.random.default_rng(steps)
    for seed in range(20):
        slots, included = generator.integers(0, 5, 300), generator.random(300) < 0.5
        rows = canary_rows(slots, included, steps, seed=seed)
        monitor = canary_monitor(rows, slots, included)
        monitor.test()
    alone = canary_rows(np.arange(5), np.ones(5, bool), steps, sigma=0.0)  # x_j of each slot, as columns
    exponents = rows.T @ alone / 0.7**2 - (alone**2).sum(axis=0) / (2 * 0.7**2)
    np.testing.assert_allclose(monitor.log_likelihood_ratios(), np.log(np.exp(exponents).mean(axis=1)), rtol=1e-9, atol=1e-9)


@catches("a canary clipped at another norm", "guards.slot_monitors.SlotCanaryMonitor.p_values",
    "normal_p_value(self._score / self._score_variance**0.5) if self._score_variance else 1.0", "1.0")  # fmt: skip
@pytest.mark.parametrize("wrong", ["norm", "slot", "noise"])
def test_canary_monitor_finds_another_mechanism(wrong):
    generator = np.random.default_rng(0)
    slots, included = generator.integers(0, 5, 300), generator.random(300) < 0.5
    options = {"norm": {"norm": 1.2}, "slot": {"number": 4}, "noise": {"sigma": 0.65}}[wrong]
    with pytest.raises(MechanismError, match="gradient canaries fail a test"):
        canary_monitor(canary_rows(slots, included, 61, **options), slots, included).test()


@pytest.mark.integration
def test_run_with_gradient_canaries_audits_itself(tmp_path):
    privacy = {**TARGET, "sampling": "balls-in-bins", "noise_bands": "2", "per_sample_max_grad_norm": 0.5}
    trainer = audited(tmp_path, canaries=100, steps=20, authors=150, privacy=privacy)
    trainer.train()
    audit = trainer.run_report.audit
    low, high = audit["noise_multiplier_between"]
    assert within((low + high) / 2, trainer.plan.noise_multiplier, (high - low) / 4)  # 95 %: two standard errors each way
    assert audit["steps_checked"] == 20
    assert "epsilon_between" not in audit and audit["epsilon_lower_bound"] <= 8.0
