"""plan.py and plan_text.py: sample rate, steps and delta from options, and the words about them."""

import math
import re

import numpy as np
import pytest
from mutation import catches

from author_dp.accounting.plan import make_plan, planned_steps
from author_dp.accounting.plan_text import format_plan, plan_utility_hint, plan_warnings
from author_dp.errors import UserError
from dp_utils import PrivacyArguments


def test_tuning_hint_names_small_batches_and_few_steps_only():
    class Args:
        per_device_train_batch_size, gradient_accumulation_steps, world_size, max_steps, num_train_epochs = 8, 1, 1, -1, 3

    privacy = PrivacyArguments(noise_multiplier=0.5, per_sample_max_grad_norm=1.0)
    assert "--gradient_accumulation_steps" in plan_utility_hint(make_plan(privacy, Args, np.arange(1_001)))
    Args.gradient_accumulation_steps = 32
    assert plan_utility_hint(make_plan(privacy, Args, np.arange(10_001))) is None
    hint = plan_utility_hint(make_plan(privacy, Args, np.arange(201)))  # all 200 authors are in each of three steps
    assert hint.startswith("3 steps") and "--num_train_epochs, to about 60" in hint
    Args.max_steps = 1
    assert plan_utility_hint(make_plan(privacy, Args, np.arange(10_001))).startswith("1 step will train")


@pytest.mark.parametrize(
    ("authors", "batch", "options", "words"),
    [
        (290, 8, {}, "raise --gradient_accumulation_steps, for a batch of about 58"),  # not 256 of 290
        (290, 48, {}, "290 authors are few.*Add authors"),
        (100_000, 8, {}, "for a batch of about 256"),
        (10_000, 256, {"sample_rate": 1e-3, "target_delta": 1e-6}, "expected batch of 10 authors.*--sample_rate, to about 0.026"),
        (10_000, 256, {"sample_rate": 1e-9, "target_delta": 1e-12}, "expected batch of 1e-05 authors"),
    ],
)
def test_tuning_hint_recommends_no_rate_that_few_authors_cannot_bear(authors, batch, options, words):
    class Args:
        per_device_train_batch_size, gradient_accumulation_steps, world_size, max_steps, num_train_epochs = batch, 1, 1, 100, 3

    privacy = PrivacyArguments(noise_multiplier=0.5, per_sample_max_grad_norm=1.0, **options)
    assert re.search(words, plan_utility_hint(make_plan(privacy, Args, np.arange(authors + 1))))


def test_make_plan_sets_default_delta_steps_and_rate():
    class Args:
        per_device_train_batch_size, gradient_accumulation_steps, world_size, max_steps, num_train_epochs = 32, 2, 16, -1, 3

    privacy = PrivacyArguments(noise_multiplier=0.5, per_sample_max_grad_norm=1.0)
    plan = make_plan(privacy, Args, np.arange(304_280))
    assert plan.delta == 1 / 304_279 and plan.sample_rate == 1_024 / 304_279 and plan.steps == math.ceil(3 * 304_279 / 1_024)
    Args.max_steps = 7
    assert make_plan(privacy, Args, np.arange(304_280)).steps == 7
    assert make_plan(privacy, Args, np.arange(101)).sample_rate == 1.0
    with pytest.raises(UserError, match="one author"):
        make_plan(privacy, Args, np.array([0, 5]))


def test_large_delta_is_explained_and_warned_of():
    class Args:
        per_device_train_batch_size, gradient_accumulation_steps, world_size, max_steps, num_train_epochs = 4, 1, 1, 10, 3

    def plan(authors, **options):
        return make_plan(
            PrivacyArguments(noise_multiplier=0.5, per_sample_max_grad_norm=1.0, **options), Args, np.arange(authors + 1)
        )

    def summary(plan):
        return format_plan(plan, np.arange(plan.num_authors + 1), 1, 1, 1.0, 0)

    def warning(plan):
        return "\n".join(plan_warnings(plan))

    few = plan(4)
    assert few.delta == 0.25 and "--target_delta: delta is 0.25: it would allow" in warning(few)
    assert "one author in 4" not in summary(few)  # the same log has the warning
    safe = plan(999, target_delta=1e-5)
    assert "one author in 100,000" in summary(safe) and not warning(safe)
    many = plan(2_000)
    assert "one author in" not in summary(many) and "one in 40 authors in any step" in warning(many)
    assert "more than 1 / N: it would allow publishing all texts of about 2 authors" in warning(plan(2_000, target_delta=1e-3))
    assert not warning(plan(2_000, target_delta=1e-5))


def make_calibrated_plan(authors=1_000, steps=10, **options):
    class Args:
        per_device_train_batch_size, gradient_accumulation_steps, world_size, max_steps, num_train_epochs = 10, 1, 1, steps, 3

    options = {"target_epsilon": 8.0, "per_sample_max_grad_norm": 1.0, **options}
    if "noise_multiplier" in options:
        del options["target_epsilon"]
    return make_plan(PrivacyArguments(**options), Args, np.arange(authors + 1))


@catches("delta compared with the wrong probability", "accounting.events.delta_promises_nothing", "2 * delta >", "0.5 * delta >",
    options={"sample_rate": 0.05, "target_delta": 0.3})  # fmt: skip
@catches("a noise multiplier given with a delta that promises nothing", "accounting.plan.make_plan",
    "check_delta([slot_event(0.0, slots, steps) if slots else MechanismEvent(0.0, sample_rate, steps)], delta)", "pass",
    options={"sample_rate": 1e-09, "target_delta": 1e-05, "noise_multiplier": 1.0})  # fmt: skip
@pytest.mark.parametrize(
    "options",
    [
        {"sample_rate": 1e-9, "target_delta": 1e-5},
        {"sample_rate": 1e-9, "target_delta": 1e-5, "noise_multiplier": 1.0},  # epsilon would be 0
        {"sample_rate": 1e-9, "target_delta": 1e-5, "noise_bands": "4"},
        {"sample_rate": 1e-9, "target_delta": 1e-5, "noise_bands": "auto"},
        {"sample_rate": 1e-6, "target_delta": 9.9e-6},  # below the probability, but nothing is promised
        {"sample_rate": 0.05, "target_delta": 0.9},
        {"sample_rate": 1.0, "target_delta": 0.6},
        {"sample_rate": 1e-5},  # delta is 1 / N = 1e-3
        {"sample_rate": 1e-12, "target_delta": 1e-11},
    ],
)
def test_make_plan_refuses_a_delta_that_promises_nothing(options):
    with pytest.raises(UserError, match=r"--target_delta .* probability of .* only.*Lower it to .* or less") as error:
        make_calibrated_plan(**options)
    lower = float(re.search(r"([\d.e-]+) or less", str(error.value))[1])
    plan = make_calibrated_plan(**options | {"target_delta": lower})  # the remedy works
    assert 0.05 < plan.noise_multiplier < 10


def test_make_plan_refuses_no_delta_where_nothing_is_promised():
    assert make_calibrated_plan(sample_rate=1e-9, target_delta=1e-5, noise_multiplier=0.0).noise_multiplier == 0.0


@catches("calibrated to hardly any noise", "accounting.accountant.find_noise_multiplier", "low < LEAST_NOISE", "low < 1e-9",
    epsilon=100000000.0)  # fmt: skip
@pytest.mark.parametrize("epsilon", [1e8, 1e300])
def test_make_plan_refuses_an_epsilon_that_needs_no_noise(epsilon):
    with pytest.raises(UserError, match=r"--target_epsilon .*hardly any noise.*Lower it"):
        make_calibrated_plan(target_epsilon=epsilon, sample_rate=1.0)
    large = make_calibrated_plan(target_epsilon=500.0, sample_rate=1.0)
    assert "--target_epsilon: epsilon 500 promises little" in "".join(plan_warnings(large))


@pytest.mark.parametrize(("batch", "authors", "steps"), [(32, 56_672, 3_542), (32, 56_673, 3_543), (8, 1_000, 250)])
def test_epochs_of_a_whole_number_of_steps_have_no_step_more(batch, authors, steps):
    class Args:
        max_steps, num_train_epochs = -1, 2

    assert planned_steps(Args, batch / authors) == steps
