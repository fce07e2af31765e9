"""plan.py: sample rate, steps, delta and advice from options."""

import math

import numpy as np
import pytest

from author_dp.accounting.plan import make_plan
from author_dp.accounting.plan_text import delta_warning, format_plan, tuning_hint
from author_dp.errors import UserError
from dp_utils import PrivacyArguments


def test_advice_for_small_batches_and_few_steps_alone():
    class Args:
        per_device_train_batch_size, gradient_accumulation_steps, world_size, max_steps, num_train_epochs = 8, 1, 1, -1, 3

    privacy = PrivacyArguments(noise_multiplier=0.5, per_sample_max_grad_norm=1.0)
    assert "--gradient_accumulation_steps" in tuning_hint(make_plan(privacy, Args, np.arange(1_001)))
    Args.gradient_accumulation_steps = 32
    assert tuning_hint(make_plan(privacy, Args, np.arange(10_001))) is None
    advice = tuning_hint(make_plan(privacy, Args, np.arange(201)))  # all of 200 authors in each of three steps
    assert advice.startswith("3 steps") and "--num_train_epochs, to about 60" in advice


def test_default_delta_steps_and_rate():
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


def test_a_delta_that_promises_little_is_explained_and_warned_of():
    class Args:
        per_device_train_batch_size, gradient_accumulation_steps, world_size, max_steps, num_train_epochs = 4, 1, 1, 10, 3

    def plan(authors, **options):
        return make_plan(
            PrivacyArguments(noise_multiplier=0.5, per_sample_max_grad_norm=1.0, **options), Args, np.arange(authors + 1)
        )

    def summary(plan):
        return format_plan(plan, np.arange(plan.num_authors + 1), 1, 1, 1.0, 0)

    few = plan(4)
    assert few.delta == 0.25 and "one author in 4" in summary(few) and "--target_delta: delta is 0.25" in delta_warning(few)
    safe = plan(999, target_delta=1e-5)
    assert "one author in 100,000" in summary(safe) and delta_warning(safe) is None
    many = plan(1_000)
    assert "one author in" not in summary(many) and delta_warning(many) is None
