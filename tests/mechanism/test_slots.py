"""Balls-in-bins sampling: each author once an epoch in a secret slot, whole runs, and what their monitors find."""

import json
import math
import secrets
from dataclasses import replace

import numpy as np
import pytest
from conftest import make_dataset, make_trainer, read_report, train
from mutation import catches
from test_noise_bands_in_runs import throw_a_draw_away
from transformers import TrainerCallback

from author_dp.accounting.accountant import epsilon_of
from author_dp.accounting.budget import Budget
from author_dp.accounting.events import slot_event
from author_dp.accounting.ledger import PrivacyLedger
from author_dp.accounting.ledger_report import format_joint_ledgers, format_ledger
from author_dp.accounting.plan import certify_plan, choose_plan_sampling, make_plan, plan_of
from author_dp.data.splits import author_hashes
from author_dp.errors import UserError
from author_dp.mechanism.sampling import BallsInBinsAuthorSampler, assign_sampling_groups
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


@catches("fewer slots than steps of an epoch", "accounting.plan.resolve_plan_slots", "math.ceil(1 / sample_rate - 1e-9)",
    "int(1 / sample_rate)")  # fmt: skip
@catches("epochs of other steps", "accounting.plan.planned_steps", "args.num_train_epochs * slots - 1e-9", "3 / 0.16")
def test_slots_are_a_whole_number_and_epochs_have_so_many_steps():
    for authors, slots in ((24, 6), (25, 7), (23, 6), (196, 49), (3, 1)):
        plan = make_plan(arguments(), Args, np.arange(authors + 1))
        assert (plan.slots, plan.steps, plan.steps_per_epoch) == (slots, 3 * slots, slots)
        assert plan.sample_rate <= 4 / authors + 1e-12 or slots == 1
    assert plan.sampling == "balls-in-bins" and math.isnan(plan.noise_multiplier)  # until it is certified


@catches("slots from the counted authors", "accounting.plan.make_plan", "resolve_plan_slots(privacy, earlier, sample_rate)",
    "resolve_plan_slots(privacy, earlier, batch_size / num_authors)")  # fmt: skip
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


CERTIFICATE = {"epsilon": 8.0, "delta": 1e-3, "steps": 18, "earlier": [], "noise_multiplier": 0.6, "numpy": np.__version__}


def certified_plan(**changed):
    """A plan of 18 steps in 6 slots, whose certificate nobody has drawn."""
    return certified(make_plan(arguments(noise_bands="3"), Args, np.arange(25)), **changed)


def certified(plan, **changed):
    certificate = {**CERTIFICATE, "coefficients": plan.coefficients().tolist(), **changed}
    return replace(plan, noise_multiplier=0.6, certificate=certificate)


@catches("other coefficients", "accounting.plan.certify_plan", "Claim(plan.coefficients(),", "Claim(plan.coefficients()[:1],")
@catches("more slots", "accounting.plan.certify_plan", "plan.slots, steps,", "plan.slots + 1, steps,")
@catches("a larger delta", "accounting.plan.certify_plan", "plan.delta, segments", "10 * plan.delta, segments")
@catches("a larger epsilon", "accounting.plan.certify_plan", "round_down(plan.target_epsilon)", "plan.target_epsilon + 1")
@catches("fewer steps before", "accounting.plan.certify_plan", "slot_segment_of(header, taken)",
    "slot_segment_of(header, taken - 1)")  # fmt: skip
@catches("other noise before", "accounting.slot_certificates.slot_segment_of", 'header["noise_multiplier"]',
    '4 * header["noise_multiplier"]')  # fmt: skip
@catches("no bands before", "accounting.slot_certificates.slot_segment_of",
    'np.array(header["certificate"]["coefficients"])', "np.ones(1)")  # fmt: skip
def test_plan_is_certified_for_what_the_run_does(monkeypatch):
    plan, claims = certified_plan(), []
    monkeypatch.setattr("author_dp.accounting.plan.make_certificate", lambda claim, earlier: claims.append(claim) or CERTIFICATE)
    headers = [({**plan.to_public_dict(), "name": name}, steps) for name, steps in (("first", 7), ("killed", 0))]
    assert certify_plan(plan, headers, 11).certificate is CERTIFICATE
    (claim,) = claims
    assert (claim.slots, claim.steps, claim.epsilon, claim.delta) == (6, 11, 8.0, 1e-3)
    (before,) = claim.earlier
    assert (before.slots, before.steps, before.noise_multiplier) == (6, 7, 0.6)
    for coefficients in (claim.coefficients, before.coefficients):
        assert (coefficients == plan.coefficients()).all()


def ledger_of(folder, plan, steps, name="first", failure=None) -> PrivacyLedger:
    ledger = PrivacyLedger(folder / "privacy_ledger.jsonl")
    ledger.start_run({**plan.to_public_dict(), "name": name})
    for _ in range(steps):
        ledger.record_step()
    if failure:
        ledger.record_failure(failure)
    return ledger


@catches("a certificate despite a failure", "accounting.budget.Budget.epsilon", " and self.ledger.failure is None", "")
@catches("steps before that no certificate is of", "accounting.budget.Budget.epsilon",
    "ledger_is_certified(certificate, earlier, self.steps + more_steps)",
    'self.steps + more_steps <= certificate["steps"]')  # fmt: skip
@catches("one more step of the ledger for nothing", "accounting.ledger.PrivacyLedger.epsilon",
    "None if any(event.steps for event in more_events) else ", "")  # fmt: skip
@catches("more steps than certified", "accounting.budget.Budget.start", "self.affordable_steps(self.plan.steps)", "math.inf")
def test_budget_counts_on_the_certificate_for_its_steps_alone(tmp_path):
    plan = certified_plan()
    budget = Budget(plan, PrivacyLedger(tmp_path / "privacy_ledger.jsonl"), is_main_process=True)
    with budget.ledger.locked():
        budget.start()
        assert budget.allowed_steps == 18 and budget.epsilon() == 0.0 and budget.epsilon(18) == 8.0 < budget.epsilon(19)
        for _ in range(18):
            budget.record_step()
        with pytest.raises(RuntimeError, match="would exceed"):
            budget.record_step()
    assert budget.epsilon() == 8.0 == budget.ledger.epsilon(1e-3) < budget.ledger.epsilon(1e-3, plan.event(1))
    budget.ledger.record_failure("no noise")
    assert budget.epsilon() == math.inf
    (tmp_path / "after").mkdir()
    after = Budget(plan, ledger_of(tmp_path / "after", plan, 5), is_main_process=True)
    assert after.epsilon(5) > 8.0 and after.ledger.epsilon(1e-3) == 8.0
    resumed = replace(plan, certificate={**CERTIFICATE, "steps": 13, "earlier": [["first", 5]]})
    assert Budget(resumed, after.ledger, is_main_process=True).epsilon(13) == 8.0


@catches("other noise than the certificate's", "accounting.ledger.check_ledger_record", "!= (record[", "is (record[")
def test_header_has_the_noise_of_its_certificate(tmp_path):
    with pytest.raises(ValueError, match="other noise"):
        ledger_of(tmp_path, replace(certified_plan(), noise_multiplier=0.5), 0)
    with pytest.raises(KeyError):
        ledger_of(tmp_path, certified_plan(earlier=None), 0).start_run({"slots": 6, "noise_multiplier": 1.0})


@catches("the last folder alone", "accounting.ledger_report.format_joint_ledgers", "[slot_segment_of(*run) for run in runs]",
    "[slot_segment_of(*runs[-1])]")  # fmt: skip
def test_folders_are_certified_together(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("author_dp.accounting.ledger_report.certify_epsilon", lambda segments, *_: seen.extend(segments) or 9.0)
    monkeypatch.setattr("author_dp.accounting.ledger_report.format_ledger_certificate", lambda ledger: f"repeated {ledger.steps}")
    folders = [tmp_path / name for name in "abc"]
    for folder in folders:
        folder.mkdir()
    ledgers = [ledger_of(folders[0], certified_plan(), 7, "a"), ledger_of(folders[1], certified_plan(), 18, "b")]
    assert all(f"repeated {steps}" in format_joint_ledgers(ledgers) for steps in (7, 18))
    seen.clear()
    assert "together: epsilon 9.00" in format_joint_ledgers(ledgers) and [segment.steps for segment in seen] == [7, 18]
    seen.clear()
    poisson = make_plan(arguments(sampling=None, noise_multiplier=1.0, target_epsilon=None), Args, np.arange(25))
    assert "together: epsilon 9.00" not in format_joint_ledgers([*ledgers, ledger_of(folders[2], poisson, 3, "c")]) and not seen


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
    assigned = assign_sampling_groups(author_hashes(ids), slots, key)
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
    "assign_sampling_groups(dataset.hashes, plan.slots or plan.noise_bands, broadcast(secrets.token_bytes(32)))",
    "torch.randperm(len(dataset)).numpy() % plan.slots")  # fmt: skip
@catches("slots kept after resuming", "training.dataloading.make_sampler", "broadcast(secrets.token_bytes(32))", "bytes(32)")
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
@catches(
    "epsilon of the planned end kept beyond it", "accounting.ledger.ledger_is_certified", ' and steps <= certificate["steps"]', ""
)
@catches("steps of earlier runs not asked for", "accounting.ledger.ledger_is_certified",
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
@catches("the certificate of the training before", "accounting.budget.Budget.start", "self.steps = 0", "pass")
def test_second_training_in_one_process_needs_a_budget_of_its_own(tmp_path):
    trainer = in_slots(tmp_path, save_strategy="steps", save_steps=5)
    stop = StopAt(7)
    trainer.add_callback(stop)
    trainer.train()
    trainer.remove_callback(stop)
    try:
        with pytest.raises(UserError, match=r"--target_epsilon 8\.0: used up"):
            trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    except RuntimeError as error:  # too late: a header is in the ledger
        pytest.fail(str(error))
    assert trainer.budget.ledger.steps == 7


@catches("a batch left out, without bands", "dp_utils.DPTrainer.create_optimizer", "in_turn=bool(self.plan.slots)",
    "in_turn=False", bands="1")  # fmt: skip
@pytest.mark.parametrize("bands", ["1", "3"])
def test_batch_left_out_ends_the_run(tmp_path, monkeypatch, bands):
    monkeypatch.setattr("author_dp.training.setup.certify_plan", lambda plan, *_: certified(plan))
    trainer = in_slots(tmp_path, bands=bands)
    throw_a_draw_away(trainer)
    with pytest.raises(RuntimeError, match="discarded batch"):
        trainer.train()
    assert trainer.budget.ledger.steps == 0


@pytest.mark.integration
def test_run_without_steps_binds_no_later_one(tmp_path):
    killed = in_slots(tmp_path)
    with killed.budget.ledger.locked():
        killed.budget.start()  # a header, and then nothing
    poisson = in_slots(tmp_path, privacy={"sampling": None})
    poisson.train()
    poisson.save_model()
    report = read_report(tmp_path)
    assert report["sampling"] == "cyclic-poisson" and report["accounted_steps"] == 4 and report["accountant"] == "prv"


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
    assert "repeated by their key" in format_ledger(ledger) and "stopped because of its results" in format_ledger(ledger)
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


# --- auto -----------------------------------------------------------------------------------------------------


@pytest.mark.integration
@catches("the sampling with more noise", "accounting.plan.choose_plan_sampling", "in_slots_error < WORTH_SLOTS * error",
    "in_slots_error > WORTH_SLOTS * error")  # fmt: skip
def test_auto_takes_the_sampling_with_less_noise():
    options = {"target_delta": 1e-5, "noise_bands": "auto"}
    few, many = (type("Args", (Args,), {"per_device_train_batch_size": 64, "max_steps": steps}) for steps in (60, 24))
    assert choose_plan_sampling(arguments(target_epsilon=1.0, **options), few, 500) == "poisson"
    assert choose_plan_sampling(arguments(target_epsilon=2.0, **options), many, 4_000) == "balls-in-bins"
    for more in ({"part_of_search": True}, {"target_epsilon": None, "noise_bands": None, "noise_multiplier": 1.0}):
        assert choose_plan_sampling(arguments(**{**options, **more}), many, 4_000) == "poisson"
    short = type("Args", (many,), {"max_steps": 4})  # of an epoch that is too long
    assert choose_plan_sampling(arguments(**options), short, 64 * 5_000) == "poisson"


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
