"""loss_release.py: the distribution of its noise, its sensitivity, its cost, and what is refused."""

import json
import math
from fractions import Fraction

import numpy as np
import pytest
from conftest import make_dataset, make_trainer, tiny_gpt2, within
from mutation import catches
from scipy import stats
from script_runs import PRIVACY, run_here, small
from test_evaluation import reference_losses
from test_ledger import make_ledger

from author_dp.accounting.budget import Budget
from author_dp.accounting.ledger import PrivacyLedger
from author_dp.data.columns import ColumnSpec
from author_dp.data.loading import load_files
from author_dp.data.splits import subsample_split_authors
from author_dp.errors import UserError
from author_dp.guards.seed_checks import replay_global_rng
from author_dp.training import loss_release as release
from author_dp.training.loss_release import (
    GRID,
    RANGES,
    bernoulli_exp,
    discrete_laplace,
    format_released_loss,
    local_released_loss_sums,
    noisy_released_loss,
    quantize_released_loss,
    release_eval_loss,
)
from data_utils import AuthorDataset, DataArguments, split_by_author

COUNTS = [1, 3, 2, 1, 7]

# --- the noise ----------------------------------------------------------------------------------------------


@catches("noise that is zero twice as often", "training.loss_release.discrete_laplace", "if magnitude or not negative:",
    "if True:", scale=Fraction(1))  # fmt: skip
@pytest.mark.parametrize("scale", [Fraction(1, 3), Fraction(1), Fraction(7, 2)])
def test_discrete_laplace_has_its_distribution(scale):
    samples = np.array([discrete_laplace(scale) for _ in range(6_000)])
    ratio = math.exp(-1 / scale)
    values = np.arange(-40, 41)
    probabilities = (1 - ratio) / (1 + ratio) * ratio ** np.abs(values)
    counted = np.array([(samples == value).sum() for value in values])
    likely = probabilities * len(samples) >= 5
    observed = [*counted[likely], len(samples) - counted[likely].sum()]
    expected = [*(probabilities * len(samples))[likely], len(samples) * (1 - probabilities[likely].sum())]
    assert stats.chisquare(observed, expected).pvalue > 1e-6


def test_discrete_laplace_has_its_scale():
    samples = np.array([discrete_laplace(Fraction(GRID) / Fraction(0.3)) for _ in range(2_000)]) / (GRID / 0.3)
    assert within(np.abs(samples).mean(), 1.0, 1 / 2_000**0.5) and within(samples.mean(), 0.0, (2 / 2_000) ** 0.5)


@pytest.mark.parametrize("rate", [Fraction(0), Fraction(1, 7), Fraction(1)])
def test_bernoulli_exp_has_its_probability(rate):
    heads = sum(bernoulli_exp(rate) for _ in range(3_000))
    p = math.exp(-rate)
    assert within(heads, 3_000 * p, (3_000 * p * (1 - p)) ** 0.5 + 1e-9)


@catches("the noise of a public loss from --seed", "training.loss_release.discrete_laplace",
    "t, s = scale.numerator, scale.denominator",
    "t, s = scale.numerator, scale.denominator\n    return round(np.random.laplace(scale=t / s))")  # fmt: skip
def test_discrete_laplace_follows_no_seed():
    """Otherwise anyone who knows --seed could subtract the noise of a published loss."""
    first, second = replay_global_rng(lambda: [discrete_laplace(Fraction(GRID)) for _ in range(20)])
    assert first != second


# --- sensitivity --------------------------------------------------------------------------------------------


@catches("a public loss that is not clipped", "training.loss_release.quantize_released_loss", "min(max(loss, 0.0), upper)",
    "loss",
    loss=-3.0)  # fmt: skip
@pytest.mark.parametrize("loss", [0.0, 1e-9, 2.5, 4.0, 4.1, 1e300, -3.0, math.inf, -math.inf, math.nan])
def test_quantize_loss_has_constant_l1_norm(loss):
    first, second = quantize_released_loss(loss, 4.0)
    assert min(first, second) >= 0 and first + second == GRID


def sums_of(trainer, dataset, which=None) -> list[int]:
    authors = range(len(dataset)) if which is None else which
    bounds = list(zip(dataset.offsets, dataset.offsets[1:]))
    indices = np.concatenate([dataset.indices[slice(*bounds[a])] for a in authors])
    offsets = np.cumsum([0, *(np.diff(bounds[a])[0] for a in authors)])
    trainer.eval_dataset = AuthorDataset(dataset.samples, offsets, indices)
    return local_released_loss_sums(trainer, upper=5.0).tolist()


def test_local_loss_sums_are_bitwise_independent_of_other_authors(tmp_path):
    dataset = make_dataset(COUNTS, seed=3)
    trainer = make_trainer(tmp_path, per_device_eval_batch_size=4)
    alone = np.array([sums_of(trainer, dataset, [author]) for author in range(len(COUNTS))])
    assert len(np.unique(alone[:, 0])) == len(COUNTS)  # the losses of authors differ
    seen = []
    trainer.data_collator = recording(trainer.data_collator, seen)
    assert sums_of(trainer, dataset) == alone.sum(0).tolist()
    owner = {row.tobytes(): a for a in range(len(COUNTS)) for row in rows_of(dataset, a)}
    assert all(len({owner[row] for row in batch}) == 1 and len(batch) <= 4 for batch in seen)


def rows_of(dataset, author) -> list[np.ndarray]:
    (rows,) = dataset.__getitems__([dataset.indices[dataset.offsets[author] : dataset.offsets[author + 1]]])
    return [row["input_ids"] for row in rows]


def recording(collate, seen):
    def collate_and_record(samples):
        seen.append([np.asarray(sample["input_ids"]).tobytes() for sample in samples])
        return collate(samples)

    return collate_and_record


def test_release_with_little_noise_equals_the_mean_over_authors(tmp_path):
    dataset, model = make_dataset(COUNTS, seed=3), tiny_gpt2()
    trainer = with_eval_data(make_trainer(tmp_path, model), dataset)
    found = release_eval_loss(trainer, 1e7, 9.0, limited=False)
    assert found["loss"] == pytest.approx(reference_losses(model, dataset)[1], abs=1e-3)
    assert found["authors"] == len(COUNTS) and found["range"] == [0.0, 9.0]
    assert f"{found['loss']:.3f}" in format_released_loss(found)


def with_eval_data(trainer, dataset):
    """Give a trainer evaluation data, and a ledger with a run, as after training."""
    trainer.budget.ledger.start_run({"noise_multiplier": 1.0, "sample_rate": 0.1, "split": "s"})
    trainer.budget.ledger.record_step()
    trainer.eval_dataset, trainer.budget.split = dataset, "s"
    return trainer


@catches("a public loss with half the noise", "training.loss_release.release_eval_loss", "Fraction(sensitivity) / ",
    "Fraction(sensitivity, 2) / ", limited=False, factor=1)  # fmt: skip
@catches("a place that another author takes is free", "training.loss_release.release_eval_loss", "GRID * (2 if limited else 1)",
    "GRID", limited=True, factor=2)  # fmt: skip
@pytest.mark.parametrize(("limited", "factor"), [(False, 1), (True, 2)])
def test_release_noise_has_the_scale_of_the_sensitivity(tmp_path, monkeypatch, limited, factor):
    scales = []
    monkeypatch.setattr(release, "discrete_laplace", lambda scale: scales.append(scale) or 0)
    found = release_eval_loss(with_eval_data(make_trainer(tmp_path), make_dataset(COUNTS)), 0.5, 5.0, limited)
    assert scales == [Fraction(GRID * factor * 2)] * 2
    assert found["standard_error"] > 0


def test_noisy_mean_has_the_standard_error_of_the_noise():
    sums = [300 * GRID, 700 * GRID]
    error = noisy_released_loss(sums, 6.0, GRID / 1.0)["standard_error"]
    generator = np.random.default_rng(0)
    noisy = np.array(sums) + generator.laplace(scale=GRID, size=(20_000, 2))
    assert error == pytest.approx((noisy[:, 0] / noisy.sum(1) * 6.0).std(), rel=0.05)


def test_noisy_mean_of_too_few_authors_is_none():
    found = noisy_released_loss([-5 * GRID, 2 * GRID], 6.0, GRID)
    assert found["loss"] is None and found["authors"] == 0 and "too few" in format_released_loss(found)


@pytest.mark.integration
def test_subsample_authors_replaces_at_most_one(tmp_path, comments):
    path = tmp_path / "data.jsonl"
    rows = [{"author": f"a{i % 40}", "content": f"text {i}"} for i in range(200)]
    taken = []
    for gone in [None, *range(40)]:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows if row["author"] != f"a{gone}"))
        samples = load_file(path)
        taken.append({str(author) for author in subsample_split_authors(samples, "author", 10, seed=1)["author"]})
    reference = taken[0]
    assert len(reference) == 10 and len(subsample_split_authors(samples, "author", 10, seed=1)) == 50  # all texts of each author
    for gone, others in enumerate(taken[1:]):
        assert len(reference ^ others) == (2 if f"a{gone}" in reference else 0)


def load_file(path):
    return load_files([str(path)], ColumnSpec("--train_file", "content", "author"))


def test_split_by_author_forces_no_author_for_a_release(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps({"author": f"a{i}", "content": "some text"}) + "\n" for i in range(5)))
    samples = load_file(path).data
    options = (samples.schema, "author", 1e-6, 1)
    assert len(split_by_author(samples.to_batches(), *options)[1]) == 1
    with pytest.raises(UserError, match="--eval_fraction 1e-06: it holds out none"):
        split_by_author(samples.to_batches(), *options, hold_out_at_least_one=False)


# --- cost ---------------------------------------------------------------------------------------------------


@catches("a public loss that no ledger holds", "training.loss_release.release_eval_loss",
    "trainer.budget.record_release(record)", "pass")  # fmt: skip
def test_release_is_recorded_before_it_is_disclosed(tmp_path, monkeypatch):
    # With little noise: no loss is at an end of the range, where two losses would be equal.
    trainer = with_eval_data(make_trainer(tmp_path), make_dataset(COUNTS))
    found = release_eval_loss(trainer, 20.0, 8.0, limited=False)
    again = PrivacyLedger(trainer.budget.ledger.path)
    assert again.releases == [{**found, "split": "s"}] and again.current_release == again.releases[0] and again.steps == 1
    monkeypatch.setattr(release, "discrete_laplace", lambda scale: pytest.fail("noise was sampled again for the same loss"))
    assert release_eval_loss(trainer, 20.0, 8.0, limited=False)["loss"] == found["loss"]
    monkeypatch.undo()
    trainer.budget.ledger.record_step()
    assert release_eval_loss(trainer, 20.0, 8.0, limited=False)["loss"] != found["loss"]
    assert [one["epsilon"] for one in PrivacyLedger(again.path).releases] == [20.0, 20.0]


@catches("held-out authors of two splits", "accounting.ledger.PrivacyLedger.epsilon_with_releases", "len(splits) == 1 and", "",
    runs=["s", "t"], releases=["s"], expected=10.0)  # fmt: skip
@catches("held-out authors who may be trained on", "accounting.ledger.PrivacyLedger.epsilon_with_releases",
    "and None not in splits", "", runs=[None], releases=[None], expected=10.0)  # fmt: skip
@pytest.mark.parametrize(
    ("runs", "releases", "expected"),
    [
        (["s"], ["s"], 8.0),
        (["s", "s"], ["s", "s"], 8.0),
        (["s"], ["s"] * 5, 10.0),  # five times the release's 2
        (["s", "t"], ["s"], 10.0),  # one run may train on authors that another holds out
        (["s"], ["t"], 10.0),
        ([None], [None], 10.0),  # a validation file
        (["s"], ["s", None], 12.0),
    ],
)
def test_epsilon_with_releases_depends_on_the_splits(tmp_path, runs, releases, expected):
    ledger = PrivacyLedger(tmp_path / "privacy_ledger.jsonl")
    for split in runs:
        ledger.start_run({"noise_multiplier": 1.0, "sample_rate": 0.1, "split": split})
    for split in releases:
        ledger.record_release({"epsilon": 2.0, "split": split})
    assert PrivacyLedger(ledger.path).epsilon_with_releases(8.0) == expected


def test_epsilon_with_releases_adds_up_for_old_ledgers(tmp_path):
    ledger = make_ledger(tmp_path)  # without a split
    ledger.record_release({"epsilon": 2.0, "split": "s"})
    assert ledger.epsilon_with_releases(8.0) == 10.0


# --- models that held-out authors chose ---------------------------------------------------------------------

BEST = ["--save_strategy", "best", "--eval_strategy", "epoch"]


def make_run(folder, **header) -> PrivacyLedger:
    ledger = PrivacyLedger(folder / "privacy_ledger.jsonl")
    ledger.start_run({"noise_multiplier": 1.0, "sample_rate": 0.1, "split": "s", "num_authors": 5, **header})
    ledger.record_step()
    return ledger


@pytest.mark.integration
def test_release_is_refused_after_metrics_chose_the_model(tmp_path, monkeypatch, capfd):
    make_run(tmp_path, by_metrics="--save_strategy best")
    options = ["--release_eval_epsilon", "1", "--resume_from_checkpoint", "True"]
    status, stderr = run_here(monkeypatch, capfd, *small("model", "data.jsonl", tmp_path, *PRIVACY, *options))
    assert status == 2 and "an earlier run" in stderr and "--save_strategy best" in stderr, stderr


def test_metrics_choose_no_model_after_a_release(tmp_path, monkeypatch, capfd):
    make_run(tmp_path).record_release({"epsilon": 2.0, "split": "s"})
    options = [*BEST, "--resume_from_checkpoint", "True"]
    status, stderr = run_here(monkeypatch, capfd, *small("model", "data.jsonl", tmp_path, *PRIVACY, *options))
    assert status == 2 and "--save_strategy best" in stderr and "was released" in stderr, stderr


@catches("nobody knows that metrics chose a model", "accounting.budget.Budget._write_header", '"by_metrics": self.by_metrics,',
    "")  # fmt: skip
def test_ledger_records_which_metrics_chose_the_model(tmp_path, monkeypatch):
    monkeypatch.setattr("author_dp.training.setup.metric_driven_option", lambda args: "--some option")
    trainer = make_trainer(tmp_path)
    trainer.budget.start()
    ledger = PrivacyLedger(trainer.budget.ledger.path)
    assert ledger.runs[-1].get("by_metrics") == "--some option" and ledger.by_metrics is None  # without steps there is no model
    trainer.budget.record_step()
    assert PrivacyLedger(ledger.path).by_metrics == "--some option"


def test_shared_authors_choose_no_model_by_exact_losses(tmp_path, monkeypatch, capfd):
    shared = ["--validation_file", "data.jsonl", "--allow_shared_authors"]
    status, stderr = run_here(monkeypatch, capfd, *small("model", "data.jsonl", tmp_path, *PRIVACY, *shared, *BEST))
    assert status == 2 and "--allow_shared_authors" in stderr and "--save_strategy best" in stderr, stderr


# --- truncated records of releases --------------------------------------------------------------------------


@catches("a torn release is taken for a step", "accounting.ledger.interpret_truncated_ledger",
    "if found := TRUNCATED_RELEASE.match(tail):", "if found := None:", then="run")  # fmt: skip
@catches("a record that sticks to a torn one", "accounting.ledger.PrivacyLedger._append",
    "self._chain.repair_tail(self._replacement)", "pass", then="release")  # fmt: skip
@pytest.mark.parametrize("then", ["release", "run", "alarm"])
def test_truncated_release_counts_and_leaves_the_ledger_readable(tmp_path, then):
    """The part on disk may hold the loss, so it counts. The next record starts on a new line."""
    ledger = make_run(tmp_path)
    Budget(make_trainer(tmp_path / "other").plan, ledger, True).record_release({"epsilon": 2.0, "unit": "u", "loss": 3.25})
    ledger.path.write_bytes(ledger.path.read_bytes()[:-20])
    assert b'"loss": 3.25' in ledger.path.read_bytes()
    truncated = PrivacyLedger(ledger.path)
    with truncated.locked():
        assert truncated.steps == 1 and truncated.current_release is None
        if then == "release":
            truncated.record_release({"epsilon": 0.5, "split": None})
        elif then == "run":
            truncated.start_run(truncated.runs[0])
        else:
            truncated.record_failure("something")
    try:
        again = PrivacyLedger(ledger.path)
    except UserError as error:
        pytest.fail(str(error))
    assert again.steps == 1 and again.releases[0]["epsilon"] == 2.0 and b"3.25" not in ledger.path.read_bytes()
    assert again.epsilon_with_releases(8.0) == 8.0 + (2.5 if then == "release" else 2.0)


@pytest.mark.parametrize("length", [15, 33, 40])
def test_release_truncated_before_its_loss_counts_as_a_step(tmp_path, length):
    ledger = make_run(tmp_path)
    with open(ledger.path, "a") as file:
        file.write('{"record": "release", "epsilon": 2.0, "split": null, "loss": 3.25'[:length])
    truncated = PrivacyLedger(ledger.path)
    assert truncated.releases == [] and truncated.steps == 2  # it counts as a step, like any unknown truncated record


@catches("the loss of another checkpoint's model", "training.loss_release.release_eval_loss",
    ', "step": trainer.state.global_step', ', "step": 4')  # fmt: skip
def test_release_is_reused_for_the_same_step_only(tmp_path):
    trainer = with_eval_data(make_trainer(tmp_path), make_dataset(COUNTS))
    trainer.state.global_step = 4
    found = release_eval_loss(trainer, 20.0, 8.0, limited=False)
    assert found["step"] == 4 and "at step 4" in format_released_loss(found)
    trainer.state.global_step = 2  # an earlier checkpoint
    assert release_eval_loss(trainer, 20.0, 8.0, limited=False)["loss"] != found["loss"]
    assert [one["step"] for one in PrivacyLedger(trainer.budget.ledger.path).releases] == [4, 2]


@pytest.mark.parametrize("epsilon", json.loads(RANGES["release_eval_epsilon"]))
@pytest.mark.parametrize("upper", json.loads(RANGES["release_eval_range"]))
def test_release_limits_give_finite_numbers(tmp_path, epsilon, upper):
    found = release_eval_loss(with_eval_data(make_trainer(tmp_path), make_dataset(COUNTS)), epsilon, upper, limited=True)
    assert json.loads(json.dumps(found, allow_nan=False)) == found and format_released_loss(found)
    assert found == {k: v for k, v in PrivacyLedger(tmp_path / "privacy_ledger.jsonl").current_release.items() if k != "split"}


@catches("a split that forgets by which column", "data.splits.split_id", ":{author_column}", "")
def test_split_id_depends_on_every_rule():
    """With another column or rule, held-out authors may be trained on, so the epsilons add up."""
    options = [{}, {"eval_fraction": 0.1}, {"author_column": "device"}, {"author_column": "a:b"}]
    names = [DataArguments(train_file=["x"], **more).split_id(seed) for more in options for seed in (1, 2)]
    assert len(set(names)) == 8 and DataArguments(train_file=["x"], validation_file=["y"]).split_id(1) is None
