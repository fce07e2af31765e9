"""one_run_audit.py, text_canaries.py: bounds against the paper and by simulation; runs with and without noise."""

import functools
import json
import math
import stat

import numpy as np
import pytest
from conftest import VOCABULARY, make_dataset, make_trainer
from datasets import List, Value
from mutation import catches
from scipy import stats
from transformers import GPT2Config, GPT2LMHeadModel

from author_dp.errors import UserError
from author_dp.guards.canaries import AuditArguments, load_or_create_key, make_canaries
from author_dp.guards.gradient_canaries import GradientCanaries
from author_dp.guards.one_run_audit import epsilon_lower_bound, one_run_lower_bound, one_run_p_value
from author_dp.guards.text_canaries import TextCanaries
from data_utils import AuthorDataset

KEY = 2**100 + 7


def test_p_value_without_delta_is_the_binomial_tail():
    for guesses, correct, epsilon in ((100, 80, 1.0), (30, 30, 2.0), (50, 20, 0.0), (10, 0, 3.0)):
        expected = sum(
            stats.binom.pmf(w, guesses, math.exp(epsilon) / (1 + math.exp(epsilon))) for w in range(correct, guesses + 1)
        )
        assert one_run_p_value(1_000, guesses, correct, epsilon, 0.0) == pytest.approx(expected, rel=1e-9)


def test_epsilon_lower_bound_has_closed_form_if_all_guesses_are_correct():
    """p^(1/r) = e^eps / (1 + e^eps)."""
    for guesses in (10, 100, 1_000):
        accuracy = 0.05 ** (1 / guesses)
        assert epsilon_lower_bound(guesses, guesses, guesses, 0.0, 0.95) == pytest.approx(
            math.log(accuracy / (1 - accuracy)), abs=1e-3
        )


@catches("an audit that forgets delta", "guards.one_run_audit.one_run_p_value", "+ 2 * canaries * delta * alpha", "")
def test_p_value_follows_the_theorem_in_delta():
    """Theorem 5.2, summand by summand."""
    canaries, guesses, correct, epsilon, delta = 300, 60, 51, 1.2, 1e-3
    accuracy = 1 / (1 + math.exp(-epsilon))
    mass = [math.comb(guesses, w) * accuracy**w * (1 - accuracy) ** (guesses - w) for w in range(guesses + 1)]
    alpha = max(sum(mass[correct - i : correct]) / i for i in range(1, correct + 1))
    expected = sum(mass[correct:]) + 2 * canaries * delta * alpha
    assert one_run_p_value(canaries, guesses, correct, epsilon, delta) == pytest.approx(expected, rel=1e-9)
    assert one_run_p_value(canaries, guesses, correct, epsilon, 1.0) == 1.0
    assert epsilon_lower_bound(canaries, guesses, correct, delta, 0.95) < epsilon_lower_bound(canaries, guesses, correct, 0, 0.95)


def test_epsilon_lower_bound_is_zero_for_chance_and_wrong_guesses():
    assert epsilon_lower_bound(100, 100, 50, 0.0, 0.95) == 0 == epsilon_lower_bound(100, 100, 0, 0.0, 0.95)
    assert epsilon_lower_bound(0, 0, 0, 1e-5, 0.95) == 0


@pytest.mark.integration
@catches("an audit that picks its best guess for free", "guards.one_run_audit.one_run_lower_bound",
    "1 - (1 - CONFIDENCE) / len(GUESS_SHARES)", "0.8", epsilon=0.5)  # fmt: skip
@pytest.mark.parametrize("epsilon", [0.0, 0.5, 2.0])
def test_lower_bound_covers_epsilon_of_randomized_response(epsilon, monkeypatch):
    """One-bit randomized response is exactly epsilon-DP and the audit's worst case: at least 95 % of bounds hold."""
    monkeypatch.setattr("author_dp.guards.one_run_audit.epsilon_lower_bound", functools.cache(epsilon_lower_bound))
    generator, runs = np.random.default_rng(3), 2_000
    exceeded = 0
    for _ in range(runs):
        included = generator.random(200) < 0.5
        responses = included ^ (generator.random(200) >= 1 / (1 + math.exp(-epsilon)))
        scores = responses + generator.random(200) * 0.5  # chance decides which canaries are guessed
        exceeded += one_run_lower_bound(scores, included, 0.0)["epsilon_lower_bound"] > epsilon
    assert exceeded <= stats.binom.ppf(1 - 1e-6, runs, 0.05)


def test_lower_bound_is_positive_without_privacy():
    included = np.arange(200) % 3 == 0
    found = one_run_lower_bound(included + 0.0, included, 1e-6)
    assert found["epsilon_lower_bound"] > 2 and found["correct"] == found["guesses"] > 0


# --- canaries -------------------------------------------------------------------------------------------


def columns(dataset: AuthorDataset):
    return dataset.samples.cast_column("input_ids", List(Value("int32"))), dataset.offsets, dataset.indices


def test_text_canaries_join_as_authors():
    dataset = make_dataset([2, 1, 3])
    canaries = TextCanaries(40, 2, 5, VOCABULARY, KEY)
    joined = AuthorDataset(*canaries.join(*columns(dataset)))
    assert len(joined) == 3 + canaries.included.sum()
    draws = [joined.indices[a:b] for a, b in zip(joined.offsets, joined.offsets[1:])]
    fetched = [[row["input_ids"].tolist() for row in rows] for rows in joined.__getitems__(draws)]
    old = [dataset.indices[a:b] for a, b in zip(dataset.offsets, dataset.offsets[1:])]
    assert fetched[:3] == [[row["input_ids"].tolist() for row in rows] for rows in dataset.__getitems__(old)]
    assert fetched[3:] == canaries.tokens[canaries.included].tolist()


def test_text_canaries_have_fair_coins_and_follow_the_key():
    a, b = TextCanaries(4_000, 1, 8, VOCABULARY, KEY), TextCanaries(4_000, 1, 8, VOCABULARY, KEY + 1)
    assert abs(a.included.sum() - 2_000) < 6 * math.sqrt(1_000) and a.tokens.min() == 0 and a.tokens.max() == VOCABULARY - 1
    assert 0.4 < (a.included == b.included).mean() < 0.6 and not np.array_equal(a.tokens, b.tokens)
    again = TextCanaries(4_000, 1, 8, VOCABULARY, KEY)
    assert np.array_equal(a.included, again.included) and np.array_equal(a.tokens, again.tokens)


def test_key_is_private_and_kept_for_resumed_runs_only(tmp_path):
    first = load_or_create_key(str(tmp_path / "out"), resume=False)
    path = tmp_path / "out" / "_audit_key.json"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and json.loads(path.read_text())["key"] == first
    assert (
        load_or_create_key(str(tmp_path / "out"), resume=True) == first != load_or_create_key(str(tmp_path / "out"), resume=False)
    )
    assert first.bit_length() > 90


def test_make_canaries_returns_the_kind_and_the_same_ones_for_a_resumed_run(tmp_path):
    options = {"samples": 2, "tokens": 5, "vocab_size": VOCABULARY, "output_dir": str(tmp_path)}
    assert make_canaries(0, "text", **options, resume=False) is None and not list(tmp_path.iterdir())
    texts, again, new = (make_canaries(40, "text", **options, resume=resume) for resume in (False, True, False))
    assert isinstance(texts, TextCanaries) and texts.tokens.shape == (40, 2, 5)
    assert np.array_equal(texts.tokens, again.tokens) and not np.array_equal(texts.tokens, new.tokens)
    gradients = make_canaries(40, "gradient", **options, resume=True)
    assert isinstance(gradients, GradientCanaries) and np.array_equal(gradients.included, new.included)


@pytest.mark.parametrize("number", [-1, 5])
def test_audit_arguments_refuse_too_few_canaries(number):
    with pytest.raises(UserError, match="--audit_canaries"):
        AuditArguments(audit_canaries=number)


# --- runs -----------------------------------------------------------------------------------------------


def audited_run(folder, **privacy) -> tuple[dict, float]:
    """Train on 200 authors and 200 canaries until an unprotected model memorizes them."""
    dataset, canaries = make_dataset([1] * 200), TextCanaries(200, 1, 10, VOCABULARY, KEY)
    config = GPT2Config(vocab_size=VOCABULARY, n_positions=16, n_embd=48, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0,
                        resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)  # fmt: skip
    trainer = make_trainer(
        folder, GPT2LMHeadModel(config), AuthorDataset(*canaries.join(*columns(dataset))),
        privacy={"target_delta": 1e-5, **privacy}, max_steps=60, per_device_train_batch_size=1_000, optim="adamw_torch",
        learning_rate=2e-2, logging_steps=30,
    )  # fmt: skip
    canaries.start(trainer)
    trainer.train()
    trainer.run_report.audit = canaries.finish(trainer)
    report = trainer.privacy_report()
    assert (
        report["audit"] == trainer.run_report.audit
        and report["num_authors"] == 200 + canaries.included.sum() == trainer.plan.num_authors
    )
    return trainer.run_report.audit, report["epsilon"]


@pytest.mark.integration
def test_text_audit_without_noise_finds_a_leak(tmp_path):
    found, epsilon = audited_run(tmp_path, noise_multiplier=0.0)
    assert found["epsilon_lower_bound"] > 2 and epsilon is None


@pytest.mark.integration
def test_text_audit_with_noise_stays_below_epsilon(tmp_path, monkeypatch):
    errors = []
    monkeypatch.setattr("author_dp.guards.text_canaries.logger.error", errors.append)
    found, epsilon = audited_run(tmp_path, noise_multiplier=None, target_epsilon=2.0)
    assert found["epsilon_lower_bound"] <= epsilon <= 2.0 and not errors


@pytest.mark.integration
def test_text_audit_finds_missing_noise(tmp_path, monkeypatch):
    errors = []
    monkeypatch.setattr("author_dp.guards.text_canaries.logger.error", errors.append)
    monkeypatch.setattr("author_dp.mechanism.noise.GaussianNoise.add_", lambda self, total, std: total)
    for name in ("make_noise_monitor", "check_unseeded"):  # or they would find it before the first step
        monkeypatch.setattr(f"author_dp.guards.monitors.{name}", lambda *_: None)
    found, epsilon = audited_run(tmp_path, noise_multiplier=None, target_epsilon=2.0)
    assert found["epsilon_lower_bound"] > epsilon and "contradicts the guarantee" in errors[0]
