"""wording.py: numbers with their nouns, and options in errors as a command line or Python has them."""

import pytest
from conftest import make_trainer

from author_dp import cli
from author_dp.errors import UserError
from author_dp.wording import format_count, to_python_names
from dp_utils import PrivacyArguments


def test_format_count_has_a_plural():
    assert [format_count(n, "step") for n in (0, 1, 1200)] == ["0 steps", "1 step", "1,200 steps"]
    assert [format_count(n, "process") for n in (1, 2)] == ["1 process", "2 processes"]


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("--sample_rate 1.5: out of range. Give a value", "sample_rate=1.5: out of range. Give a value"),
        (
            "--target_epsilon, --noise_multiplier: they exclude each other",
            "target_epsilon, noise_multiplier: they exclude each other",
        ),
        ("--fp16: it skips steps. Use --bf16", "fp16: it skips steps. Use bf16"),
        ("Resume with --resume_from_checkpoint True", "Resume with resume_from_checkpoint=True"),
        ("--fsdp full_shard: one process. Give --fsdp_config", "full_shard=True: one process. Give fsdp_config"),
        ("X (accelerate launch --mixed_precision): use --bf16", "X (accelerate launch --mixed_precision): use bf16"),
        ("it is in a--b, and nothing else", "it is in a--b, and nothing else"),
    ],
)
def test_to_python_names(message, expected):
    assert to_python_names(message) == expected


def test_errors_of_the_library_name_arguments(tmp_path, monkeypatch):
    monkeypatch.setattr(UserError, "on_command_line", False)
    with pytest.raises(UserError, match=r"^target_epsilon=0\.0: out of range"):
        PrivacyArguments(target_epsilon=0.0, per_sample_max_grad_norm=1.0)
    with pytest.raises(UserError, match=r"^max_grad_norm=1\.0: .* Set it to 0; per_sample_max_grad_norm already"):
        make_trainer(tmp_path, max_grad_norm=1.0)
    monkeypatch.setattr("sys.argv", ["program"])
    with pytest.raises(SystemExit):
        cli.run_program("program", lambda _: PrivacyArguments(target_epsilon=0.0))
    assert UserError.on_command_line
