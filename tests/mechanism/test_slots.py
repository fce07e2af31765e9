"""Balls-in-bins sampling: each author once an epoch in a secret slot, whole runs, and what their monitors find."""

import json
import math
import secrets

import numpy as np
import pytest
from conftest import make_dataset, make_trainer, read_report, train
from mutation import catches
from test_gradient_canaries import audited
from transformers import TrainerCallback

from author_dp.accounting.accountant import epsilon_of
from author_dp.accounting.events import slot_event
from author_dp.accounting.ledger import PrivacyLedger
from author_dp.accounting.ledger_report import format_ledger
from author_dp.accounting.plan import choose_sampling, make_plan, plan_of
from author_dp.data.splits import author_hashes
from author_dp.errors import MechanismError, UserError
from author_dp.guards.slot_monitors import SlotCanaryMonitor, SlotMonitor, even_sizes_p_value
from author_dp.mechanism.sampling import BallsInBinsAuthorSampler, assign_groups
from author_dp.training.dataloading import make_sampler
from data_utils import group_by_author
from dp_utils import PrivacyArguments

TARGET = {"target_epsilon": 8.0, "target_delta": 1e-3, "noise_multiplier": None}


def in_slots(folder, steps=12, authors=24, bands="3", privacy=None, **options):
    """A trainer of 6 slots, two epochs by default."""
    privacy = {**TARGET, "sampling": "balls-in-bins", "noise_bands": bands, **(privacy or {})}
    return make_trainer(folder, dataset=make_dataset([2] * authors), privacy=privacy, max_steps=steps, **options)


class Args:
    per_device_train_batch_size, gradient_accumulation_steps, world_size, max_steps, num_train_epochs = 4, 1, 1, -1, 3
    process_index = 0


def arguments(**options) -> PrivacyArguments:
    return PrivacyArguments(per_sample_max_grad_norm=1.0, **{"sampling": "balls-in-bins", **TARGET, **options})


# --- the plan -------------------------------------------------------------------------------------------------


@catches("fewer slots than steps of an epoch", "accounting.plan.resolve_slots", "math.ceil(1 / sample_rate - 1e-9)",
    "int(1 / sample_rate)")  # fmt: skip
@catches("epochs of other steps", "accounting.plan.planned_steps", "args.num_train_epochs * slots - 1e-9", "3 / 0.16")
def test_slots_are_a_whole_number_and_epochs_have_so_many_steps():
    for authors, slots in ((24, 6), (25, 7), (23, 6), (196, 49), (3, 1)):
        plan = make_plan(arguments(), Args, np.arange(authors + 1))
        assert (plan.slots, plan.steps, plan.steps_per_epoch) == (slots, 3 * slots, slots)
        assert plan.sample_rate <= 4 / authors + 1e-12 or slots == 1
    assert plan.sampling == "balls-in-bins" and math.isnan(plan.noise_multiplier)  # until it is certified


@catches("slots from the counted authors", "accounting.plan.make_plan", "resolve_slots(privacy, earlier, sample_rate)",
    "resolve_slots(privacy, earlier, batch_size / num_authors)")  # fmt: skip
def test_hidden_counts_do_not_set_the_slots():
    privacy = arguments(hide_counts=True, sample_rate=0.1, noise_bands=None)
    plans = [make_plan(privacy, Args, np.arange(authors + 1)) for authors in (30, 100)]
    assert {plan.slots for plan in plans} == {10}
    assert all(plan.to_public_dict()["num_authors"] is None for plan in plans)


def test_header_is_no_poisson_run_to_older_versions():
    plan = make_plan(arguments(), Args, np.arange(25))
    public = plan.to_public_dict()
    assert public["sample_rate"] is None and public["slots"] == 6  # float(None) fails there, before anything is accounted
    assert plan_of(public).sample_rate == 1 / 6
    poisson = make_plan(arguments(sampling=None, noise_multiplier=1.0, target_epsilon=None), Args, np.arange(25))
    assert not {"slots", "certificate"} & set(poisson.to_public_dict())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"target_epsilon": None, "noise_multiplier": 1.0}, "--sampling balls-in-bins: .* Give --target_epsilon"),
        ({"part_of_search": True}, "--sampling balls-in-bins: a search"),
        ({"sampling": "shuffled"}, "--sampling shuffled: no such choice"),
        ({"noise_bands": "7"}, "--noise_bands 7: .* at most 6"),  # wider than an epoch
        ({"sample_rate": 1e-4, "target_delta": 1e-9}, "--sampling balls-in-bins: an epoch of 10,000 steps"),
    ],
)
def test_what_cannot_be_certified_is_refused(tmp_path, options, words):
    with pytest.raises(UserError, match=words):
        in_slots(tmp_path, privacy=options)


def test_delta_that_promises_nothing_is_refused():
    with pytest.raises(UserError, match=r"--target_delta 0\.2: an author is in any step with a probability of 0\.33"):
        make_plan(arguments(target_delta=0.2), type("Args", (Args,), {"max_steps": 2}), np.arange(25))
    make_plan(arguments(target_delta=0.2), Args, np.arange(25))  # an author is in three of these steps


# --- the sampler ----------------------------------------------------------------------------------------------


def sampler_of(authors=50, slots=7, key=bytes(32)) -> BallsInBinsAuthorSampler:
    ids = [f"author {number}" for number in range(authors)]
    assigned = assign_groups(author_hashes(ids), slots, key)
    return BallsInBinsAuthorSampler(*group_by_author(ids), slots=assigned, samples_per_author=1, steps=slots, key=1)


@catches("two slots", "mechanism.sampling.BallsInBinsAuthorSampler.sample_authors", "self.members[self.batches % self.steps]",
    "np.union1d(self.members[self.batches % self.steps], self.members[(self.batches + 1) % self.steps])")  # fmt: skip
@catches("a new slot each epoch", "mechanism.sampling.BallsInBinsAuthorSampler.sample_authors",
    "self.members[self.batches % self.steps]", "self.members[(self.batches * 8 // 7) % self.steps]")  # fmt: skip
def test_each_author_is_in_one_batch_of_every_epoch_the_same_one():
    sampler, batches = sampler_of(), []
    sampler.on_batch = lambda authors: batches.append(authors.tolist())
    for _ in range(3):
        assert sum(batch.batch_size for batch in sampler) == 50
    epochs = [batches[:7], batches[7:14], batches[14:]]
    for epoch in epochs:
        assert sorted(author for batch in epoch for author in batch) == list(range(50)) and epoch == epochs[0]


@catches("a slot that moves when someone leaves", "training.dataloading.make_sampler",
    "assign_groups(dataset.hashes, plan.slots, broadcast(secrets.token_bytes(32)))",
    "torch.randperm(len(dataset)).numpy() % plan.slots")  # fmt: skip
@catches("slots kept after resuming", "training.dataloading.make_sampler", "plan.slots, broadcast(secrets.token_bytes(32))",
    "plan.slots, bytes(32)")  # fmt: skip
def test_slots_depend_on_the_author_and_a_secret_key_alone(monkeypatch):
    dataset = make_dataset([1] * 60)
    plan = make_plan(arguments(), Args, dataset.offsets)
    first, second = (make_sampler(dataset, plan, Args, 0).groups for _ in range(2))
    assert (first != second).mean() > 0.5
    monkeypatch.setattr(secrets, "token_bytes", lambda size: bytes(size))
    with_all = make_sampler(dataset, plan, Args, 0).groups
    dataset.hashes, dataset.offsets = np.delete(dataset.hashes, 7), np.arange(60)
    without = make_sampler(dataset, plan, Args, 0).groups
    assert (without == np.delete(with_all, 7)).all() and set(with_all) == set(range(15))


@catches("an author without a slot", "mechanism.sampling.BallsInBinsAuthorSampler.__init__", "slots.max(initial=0) >= self.steps",
    "False")  # fmt: skip
def test_every_author_needs_a_slot():
    options = {"samples_per_author": 1, "steps": 3, "key": 1}
    for slots in (np.array([0, 1]), np.array([0, 1, 3]), np.array([0, -1, 2])):
        with pytest.raises(ValueError, match="every author needs a slot"):
            BallsInBinsAuthorSampler(np.arange(4), np.arange(3), slots=slots, **options)


# --- whole runs -----------------------------------------------------------------------------------------------


@pytest.mark.integration
@catches("epsilon of the planned end kept beyond it", "accounting.ledger.is_certified", ' and steps <= certificate["steps"]', "")
@catches("steps of earlier runs not asked for", "accounting.ledger.is_certified",
    '[[header["name"], taken] for header, taken in earlier] == certificate["earlier"] and ', "")  # fmt: skip
def test_report_and_ledger_tell_what_was_certified(tmp_path):
    trainer = in_slots(tmp_path)
    batches, _ = train(trainer)
    trainer.save_model()
    assert sorted(batch.batch_size for batch in batches[:6]) == sorted(batch.batch_size for batch in batches[6:])
    assert sum(batch.batch_size for batch in batches) == 2 * 24
    report, ledger = read_report(tmp_path), PrivacyLedger(tmp_path / "privacy_ledger.jsonl")
    told = {name: report[name] for name in ("sampling", "slots", "accountant", "epsilon", "steps", "noise_bands")}
    assert told == {
        "sampling": "balls-in-bins", "slots": 6, "accountant": "monte-carlo", "epsilon": 8.0, "steps": 12, "noise_bands": 3
    }  # fmt: skip
    nothing = ("sample_rate", "accounted_sample_rate", "accounted_steps", "mu_gdp")
    assert all(report[name] is None for name in nothing) and 0 < report["tpr_at_fpr"]["0.01"] <= 1
    made = report["certificate"]
    assert made == ledger.certificate and made["failure_probability"] == 1e-5 and made["numpy"] == np.__version__
    assert made["noise_multiplier"] == report["noise_multiplier"] == made["attempts"][-1]["noise_multiplier"]
    assert "repeated by their key" in format_ledger(ledger) and "balls-in-bins sampling in 6 slots" in format_ledger(ledger)
    # At a smaller delta, and with one step more, only the bound by events is known.
    event = slot_event(report["noise_multiplier"], 6, 12)
    assert ledger.epsilon(1e-4) == epsilon_of([event], 1e-4) > ledger.epsilon(1e-3) == ledger.epsilon(2e-3) == 8.0
    ledger.record_step()
    assert ledger.certificate is None and ledger.epsilon(1e-3) > 8.0
    another = PrivacyLedger(ledger.path)
    another.start_run({**ledger.runs[0], "name": "another"})
    another.record_step()
    assert another.certificate is None


@pytest.mark.integration
def test_epsilon_is_that_of_the_end_from_the_first_step_on(tmp_path):
    trainer = in_slots(tmp_path, save_strategy="steps", save_steps=5)
    assert trainer.epsilon() == 0.0 and trainer.epsilon(1) == trainer.epsilon(12) == 8.0 < trainer.epsilon(13)
    train(trainer)
    assert json.loads((tmp_path / "checkpoint-5" / "privacy.json").read_text())["epsilon"] == 8.0
    assert trainer.budget.allowed_steps == 12


@pytest.mark.integration
@catches("noise of a resumed run without the steps before", "accounting.plan.certify_plan", "plan.delta, segments)",
    "plan.delta, ())")  # fmt: skip
def test_resumed_run_certifies_all_steps_with_new_slots(tmp_path, caplog):
    first = in_slots(tmp_path, save_strategy="steps", save_steps=5)
    first.add_callback(StopAt(7))
    train(first)
    options = {"resume_from_checkpoint": str(tmp_path / "checkpoint-5"), "save_strategy": "steps", "save_steps": 12}
    again = in_slots(tmp_path, bands=None, privacy={"sampling": None}, **options)
    assert again.plan.certificate["earlier"] == [[first.budget.ledger.runs[0]["name"], 7]] and again.plan.noise_bands == 3
    assert again.plan.certificate["steps"] == 7 and again.plan.noise_multiplier > first.plan.noise_multiplier
    again.train()
    again.save_model()
    report, ledger = read_report(tmp_path), PrivacyLedger(tmp_path / "privacy_ledger.jsonl")
    assert report["epsilon"] == 8.0 and report["steps"] == 14 and report["accountant"] == "monte-carlo"
    assert [one["slots"] for one in report["mechanisms"]] == [6, 6]
    assert "repeated by their key" in format_ledger(ledger)
    finished = in_slots(tmp_path, resume_from_checkpoint=True)
    assert finished.epsilon() == 8.0 and finished.plan.noise_multiplier == again.plan.noise_multiplier
    with pytest.raises(UserError, match="--sampling poisson: the resumed run has balls-in-bins"):
        in_slots(tmp_path, privacy={"sampling": "poisson"}, resume_from_checkpoint=True)
    # From the checkpoint at step 5 once more: nearly nothing is left for its steps.
    with caplog.at_level("WARNING"):
        in_slots(tmp_path, privacy={"target_epsilon": 8.2}, **options)
    assert "times that before" in caplog.text


class StopAt(TrainerCallback):
    follows = "steps"

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


# --- monitors -------------------------------------------------------------------------------------------------


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
        p_values = [even_sizes_p_value(generator.multinomial(authors, np.ones(number) / number)) for _ in range(2_000)]
        for level in (0.5, 0.1, 0.01):
            assert np.mean(np.array(p_values) <= level) <= level + 5 * math.sqrt(level / 2_000)
    assert even_sizes_p_value(np.array([5, 5])) > 0.1 and even_sizes_p_value(np.full(100, 20)) < 1e-12


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
    assert low < trainer.plan.noise_multiplier < high and audit["steps_checked"] == 20
    assert "epsilon_between" not in audit and audit["epsilon_lower_bound"] <= 8.0


# --- auto -----------------------------------------------------------------------------------------------------


@pytest.mark.integration
@catches("the sampling with more noise", "accounting.plan.choose_sampling", "in_slots_error < WORTH_SLOTS * error",
    "in_slots_error > WORTH_SLOTS * error")  # fmt: skip
def test_auto_takes_the_sampling_with_less_noise():
    options = {"target_delta": 1e-5, "noise_bands": "auto"}
    few, many = (type("Args", (Args,), {"per_device_train_batch_size": 64, "max_steps": steps}) for steps in (60, 24))
    assert choose_sampling(arguments(target_epsilon=1.0, **options), few, 500) == "poisson"
    assert choose_sampling(arguments(target_epsilon=2.0, **options), many, 4_000) == "balls-in-bins"
    for more in ({"part_of_search": True}, {"target_epsilon": None, "noise_bands": None, "noise_multiplier": 1.0}):
        assert choose_sampling(arguments(**{**options, **more}), many, 4_000) == "poisson"
    assert choose_sampling(arguments(**options), type("Args", (many,), {"max_steps": 4}), 64 * 5_000) == "poisson"  # too long


@pytest.mark.integration
def test_run_with_auto_says_which_and_resumes_with_it(tmp_path):
    trainer = in_slots(tmp_path, steps=5, authors=200, privacy={"sampling": "auto"}, save_strategy="steps", save_steps=5)
    trainer.train()
    sampling = trainer.plan.sampling
    assert trainer.privacy_report()["sampling"] == sampling and trainer.privacy.sampling == "auto"
    options = {"resume_from_checkpoint": True, "save_strategy": "steps", "save_steps": 5}
    again = in_slots(tmp_path, steps=5, authors=200, privacy={"sampling": "auto"}, **options)
    assert again.plan.sampling == sampling
    ordinary = in_slots(tmp_path / "plain", privacy={"sampling": "auto", "disable_dp": True})
    assert ordinary.plan.slots is None
