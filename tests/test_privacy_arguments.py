"""PrivacyArguments: options that are out of range or exclude each other are refused by name."""

import math

import pytest
from mutation import catches

from author_dp.errors import UserError
from dp_utils import PrivacyArguments


@catches("a clip norm whose noise float32 does not hold", "dp_utils.PrivacyArguments.__post_init__",
    'self.per_sample_max_grad_norm, "[1e-6, 1e6]"', 'self.per_sample_max_grad_norm, "(0, inf)"',
    options={"noise_multiplier": 1.0, "per_sample_max_grad_norm": 1e-22}, words="--per_sample_max_grad_norm")  # fmt: skip
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "^--target_epsilon: missing"),
        ({"per_sample_max_grad_norm": None}, "^--target_epsilon, --per_sample_max_grad_norm: missing"),
        ({"target_epsilon": 8.0, "noise_multiplier": 1.0}, "--target_epsilon, --noise_multiplier: they exclude each other"),
        ({"target_epsilon": 0.0}, "--target_epsilon"),
        ({"target_epsilon": math.inf}, "--target_epsilon"),
        ({"target_epsilon": math.nan}, "--target_epsilon"),
        ({"noise_multiplier": -1.0}, "--noise_multiplier"),
        ({"target_epsilon": 8.0, "per_sample_max_grad_norm": None}, "--per_sample_max_grad_norm"),
        ({"target_epsilon": 8.0, "per_sample_max_grad_norm": 0.0}, "--per_sample_max_grad_norm"),
        ({"target_epsilon": 8.0, "target_delta": 1.0}, "--target_delta"),
        ({"target_epsilon": 8.0, "samples_per_author": 0}, "--samples_per_author"),
        ({"target_epsilon": 8.0, "clipping": "none"}, "--clipping"),
        *[
            (
                {"noise_multiplier": 1.0, "per_sample_max_grad_norm": c},
                r"--per_sample_max_grad_norm.*at least 1e-6 and at most 1e6",
            )
            for c in (1e-22, 9e-7, 1.1e6, 1e20)
        ],
        *[
            ({"noise_multiplier": sigma}, r"--noise_multiplier.*at least 1e-6 and at most 1e6.*0 is for no privacy")
            for sigma in (1e-30, 9e-7, 1e20)
        ],
        *[({"target_epsilon": 8.0, "sample_rate": q}, "--sample_rate.*at least 1e-12 and at most 1") for q in (0.0, 1e-30, 1.1)],
        ({"per_sample_max_grad_norm": None, "disable_dp": True, "sample_rate": 1e-30}, "--sample_rate"),
    ],
)
def test_privacy_options_are_checked(options, words):
    with pytest.raises(UserError, match=words):
        PrivacyArguments(**{"per_sample_max_grad_norm": 1.0, **options})
