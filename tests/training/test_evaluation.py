"""evaluation.py: losses equal a loop over single texts, for any batch size, number of processes and model class."""

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_dataset, make_trainer, tiny_gpt2
from families import make_model
from forked_runs import in_processes
from mutation import catches
from test_processes import run_processes
from transformers import GPT2Config, GPT2LMHeadModel, TrainerCallback

from author_dp.errors import UserError
from author_dp.training.evaluation import summarize_losses
from author_dp.training.loss_release import release_eval_loss

COUNTS = [1, 3, 2, 1]


def reference_losses(model, dataset) -> tuple[float, float]:
    """Return the mean over target tokens, and the mean over authors of each author's mean, from one text at a time."""
    model.eval()
    authors = []
    for a, b in zip(dataset.offsets, dataset.offsets[1:]):
        losses = []
        for row in dataset.__getitems__([dataset.indices[a:b]])[0]:
            ids = torch.as_tensor(row["input_ids"], dtype=torch.int64)
            with torch.no_grad():
                log_probabilities = model(ids[None]).logits[0, :-1].log_softmax(-1)
            losses += (-log_probabilities.gather(1, ids[1:, None])[:, 0]).tolist()
        authors.append(losses)
    tokens = [loss for losses in authors for loss in losses]
    return sum(tokens) / len(tokens), sum(sum(losses) / len(losses) for losses in authors) / len(authors)


@pytest.mark.parametrize("batch", [1, 2, 5, 64])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_evaluate_equals_the_reference_for_any_batch_size(tmp_path, family, batch):
    model, held_out = make_model(family, "untied"), make_dataset(COUNTS, seed=3)
    with torch.no_grad():  # larger differences between texts
        model.lm_head.weight.mul_(10)
    trainer = make_trainer(tmp_path, model, per_device_eval_batch_size=batch)
    metrics = trainer.evaluate(held_out)
    loss, author_loss = reference_losses(model, held_out)
    assert metrics["eval_loss"] == pytest.approx(loss, abs=1e-4)
    assert metrics["eval_author_loss"] == pytest.approx(author_loss, abs=1e-4)
    assert metrics["eval_perplexity"] == pytest.approx(math.exp(loss), rel=1e-3)
    assert (metrics["eval_num_authors"], metrics["eval_num_texts"]) == (len(COUNTS), sum(COUNTS))
    assert 0 < metrics["eval_loss_stderr"] < 1 and 0 < metrics["eval_author_loss_stderr"] < 1
    assert abs(loss - author_loss) > 1e-4  # otherwise the test could not distinguish them


def test_training_loss_is_the_mean_over_authors(tmp_path):
    dataset = make_dataset([1, 2, 3])
    trainer = make_trainer(
        tmp_path, dataset=dataset, learning_rate=0.0, per_device_train_batch_size=3,
        privacy={"noise_multiplier": 0.0, "samples_per_author": 9},
    )  # fmt: skip
    trainer.train()
    logged = next(row["loss"] for row in trainer.state.log_history if "loss" in row)
    trainer.model.eval()
    assert logged == pytest.approx(trainer.evaluate(dataset)["eval_author_loss"], rel=1e-4)


@catches("the name of a data set taken for one", "training.base_trainer.LogicalBatchTrainer.get_eval_dataloader",
    "if isinstance(dataset, str)", "if False")  # fmt: skip
def test_several_data_sets_are_evaluated_by_name(tmp_path, monkeypatch):
    """A run evaluates them at its steps, as the Trainer does; and `predict` gives the same losses."""
    several = {"few": make_dataset([1, 2], seed=3), "many": make_dataset(COUNTS, seed=4)}
    trainer = make_trainer(tmp_path, eval_dataset=several, eval_strategy="steps", eval_steps=1, learning_rate=0.0)
    try:
        trainer.train()
    except AttributeError as error:
        pytest.fail(str(error))
    found = {name: value for row in trainer.state.log_history for name, value in row.items() if name.endswith("_loss")}
    for name, dataset in several.items():
        loss, author_loss = reference_losses(trainer.model, dataset)
        assert found[f"eval_{name}_loss"] == pytest.approx(loss, abs=1e-4)
        assert found[f"eval_{name}_author_loss"] == pytest.approx(author_loss, abs=1e-4)
        assert trainer.predict(dataset).metrics["test_loss"] == pytest.approx(loss, abs=1e-4)


@catches("metrics of several data sets not known", "outputs.rehearsal.rehearse_evaluation", 'f"eval_{name}" if name else "eval"',
    '"eval"', metric="eval_a_loss")  # fmt: skip
@pytest.mark.parametrize("metric", ["loss", "a_loss", "eval_a_loss"])
def test_the_metric_of_the_best_model_is_that_of_one_of_several(tmp_path, metric):
    several = {"a": make_dataset([1, 2], seed=3), "b": make_dataset(COUNTS, seed=4)}
    for dataset in several.values():
        dataset.hashes = ~dataset.hashes  # or they would be training authors
    trainer = make_trainer(
        tmp_path, eval_dataset=several, eval_strategy="steps", save_strategy="steps", save_steps=1, eval_steps=1, max_steps=2,
        load_best_model_at_end=True, metric_for_best_model=metric, rehearsal=True,
    )  # fmt: skip
    if metric == "loss":  # of which one?
        with pytest.raises(UserError, match=r"--metric_for_best_model loss: no such metric\. Give one of a_author_loss, a_loss"):
            trainer.train()
    else:
        try:
            trainer.train()
        except (KeyError, UserError) as error:
            pytest.fail(str(error))
        assert trainer.state.best_model_checkpoint
    with pytest.raises(UserError, match="it names several, and one loss can be released"):
        release_eval_loss(trainer, 0.5, None, False)


@pytest.mark.integration
def test_evaluate_is_the_same_with_two_processes(tmp_path):
    options = {"model": {}, "counts": [1] * 9, "privacy": {"noise_multiplier": 1.0}, "per_device": 2, "evaluate": COUNTS}
    found = run_processes(tmp_path, 2, **options)
    model = tiny_gpt2()
    expected = reference_losses(model, make_dataset(COUNTS, seed=3))
    for process in found:
        assert process["evaluation"] == pytest.approx(list(expected), abs=1e-4)


def peak_growth(folder: Path, what: str) -> int:
    """Return by how many KiB the peak of this process's memory grows in evaluation, or else in training."""
    model = GPT2LMHeadModel(GPT2Config(vocab_size=30_000, n_positions=64, n_embd=16, n_layer=1, n_head=1))
    dataset = make_dataset([1] * 64, longest=64)
    plain = {"disable_dp": True, "noise_multiplier": None}  # without the model check, whose peak would hide the others
    trainer = make_trainer(folder, model, dataset, privacy=plain, per_device_train_batch_size=64, per_device_eval_batch_size=64)
    Path("/proc/self/clear_refs").write_text("5")  # from here on
    before = int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])
    trainer.evaluate(dataset) if what == "evaluate" else trainer.train()
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) - before


@pytest.mark.integration
def test_evaluate_needs_no_more_memory_than_training(tmp_path):
    peaks = {}
    for what in ("train", "evaluate"):
        (tmp_path / what).mkdir()
        (peaks[what],) = in_processes(tmp_path / what, 1, peak_growth, tmp_path / what / "out", what)
    assert 0 < peaks["evaluate"] <= peaks["train"]


def test_evaluate_reports_progress(tmp_path):
    trainer = make_trainer(tmp_path, per_device_eval_batch_size=2)
    lengths = []

    class Bar(TrainerCallback):
        def on_prediction_step(self, args, state, control, eval_dataloader=None, **kwargs):
            lengths.append(len(eval_dataloader))

    trainer.add_callback(Bar())
    trainer.evaluate(make_dataset(COUNTS, seed=3))
    assert lengths == [4, 4, 4, 4]  # of seven texts


def test_standard_errors_are_those_of_resampled_authors():
    """Authors of different lengths: the error of the mean over tokens is that of a ratio, as a bootstrap measures it."""
    generator = np.random.default_rng(0)
    tokens = generator.geometric(0.1, 300).astype(float)
    losses = tokens * (3 + generator.normal(0, 0.5, 300) + 0.02 * tokens)
    found = summarize_losses(torch.tensor(losses), torch.tensor(tokens))
    picks = generator.integers(0, 300, (4_000, 300))
    ratios, means = losses[picks].sum(1) / tokens[picks].sum(1), (losses / tokens)[picks].mean(1)
    assert found["loss_stderr"] == pytest.approx(ratios.std(), rel=0.06)
    assert found["author_loss_stderr"] == pytest.approx(means.std(), rel=0.06)
    assert found["num_authors"] == 300
    assert not [name for name in summarize_losses(torch.ones(1), torch.ones(1)) if "stderr" in name]
