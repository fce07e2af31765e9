"""privacy_statement.py: what is claimed for a text."""

import pytest
from mutation import catches

from author_dp.outputs import privacy_statement as sidecar


@catches("text of private prompts is covered", "outputs.privacy_statement.make_statement", "prompts == PRIVATE:", "False:")
def test_the_word_on_prompts_decides():
    guarantee = {"epsilon": 2.0, "delta": 1e-5, "disable_dp": False}
    for prompts in ("none", "fixed", "public", "private"):
        said, is_private = sidecar.make_statement(guarantee, prompts), prompts == "private"
        assert (said["covered"], said["epsilon"]) == ((False, None) if is_private else (True, 2.0))
        assert said["statement"].startswith("NO PRIVACY GUARANTEE" if is_private else "epsilon 2.00 at delta 1e-05")


@catches("text of a model with infinite epsilon is covered", "outputs.guarantee.why_no_guarantee",
    'if guarantee["epsilon"] is None:', "if False:", guarantee={"epsilon": None, "delta": 1e-05, "disable_dp": False},
    words="infinite")  # fmt: skip
@catches("text of a model whose mechanism failed is covered", "outputs.guarantee.why_no_guarantee",
    'if guarantee.get("alarm"):', "if False:",
    guarantee={"epsilon": 2.0, "delta": 1e-05, "disable_dp": False, "alarm": "half the noise"},
    words="half the noise")  # fmt: skip
@pytest.mark.parametrize(
    "guarantee, words",
    [
        (None, "no privacy.json"),
        ({"epsilon": None, "delta": None, "disable_dp": True}, "--disable_dp"),
        ({"epsilon": None, "delta": 1e-5, "disable_dp": False}, "infinite"),
        ({"epsilon": 2.0, "delta": 1e-5, "disable_dp": False, "alarm": "half the noise"}, "half the noise"),
    ],
)
def test_nothing_is_claimed_where_there_is_no_guarantee(guarantee, words):
    for prompts in ("none", "fixed", "public", "private"):
        said = sidecar.make_statement(guarantee, prompts)
        assert (said["covered"], said["epsilon"]) == (False, None) and words in said["statement"]
        assert said["statement"].startswith("NO PRIVACY GUARANTEE")


@catches("the ledger of any folder named like a checkpoint is above it", "outputs.privacy_statement.statement_ledger_path",
    "has_checkpoint_name(folder)", 'folder.resolve().name.startswith("checkpoint-")')  # fmt: skip
def test_ledger_path_is_above_a_checkpoint_only(tmp_path):
    """A run may have the name checkpoint-best: without its ledger, its alarm would not be known."""
    for name in ("checkpoint-best", "checkpoint-", "checkpoint-3-copy", "scratch"):
        assert sidecar.statement_ledger_path(tmp_path / name) == tmp_path / name / "privacy_ledger.jsonl"
    assert sidecar.statement_ledger_path(tmp_path / "checkpoint-3") == tmp_path / "privacy_ledger.jsonl"
