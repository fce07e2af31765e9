"""process_agreement.py: processes with different data, keys, groups or shares all end the run."""

import functools

import bugs
import numpy as np
import pytest
import torch
from conftest import make_dataset, make_trainer, sample
from forked_runs import in_processes
from mutation import catches
from planting import find, with_edit

from author_dp.accounting.ledger import PrivacyLedger
from author_dp.errors import MechanismError, UserError
from author_dp.guards.gradient_canaries import GradientCanaries
from author_dp.guards.process_agreement import hash_process_data, hash_process_set

DRAW = "author_dp.mechanism.sampling.PoissonAuthorSampler.sample_batch"
TRAINING_STEP = "dp_utils.DPTrainer.training_step"
TWO = {"processes": 2, "bands": "1", "canaries": 0, "full_shard": False, "workers": 0}

# A plausible mistake, and words of the error.
BUGS = {
    "another sampler key on each": (*bugs.A_SAMPLER_KEY_EACH, "sampled authors"),
    "another group key on each": (*bugs.A_GROUP_KEY_EACH, "groups"),
    "the whole draw on each": (*bugs.ALL_OF_THE_BATCH_ON_EACH, "shares"),
    "the same half on each": (*bugs.THE_SAME_HALF_ON_EACH, "shares"),
    "an author on none": (DRAW, "self.rank :: self.world_size]", "self.rank :: self.world_size][1:]", "shares"),
    "samples of another author": (
        "author_dp.mechanism.sampling.choose_samples", "offsets[authors][owners] + order",
        "offsets[authors][owners] - 1 + order", "shares"),
    "microbatches left out": (
        TRAINING_STEP, "self.tracked(inputs.microbatches)",
        "self.tracked(inputs.microbatches[: 0 if self.args.process_index else None])", "clipped"),
    "microbatches taken twice": (
        TRAINING_STEP, "self.tracked(inputs.microbatches)", "self.tracked(inputs.microbatches * 2)", "clipped"),
}  # fmt: skip


def make_run(folder, *, processes: int = 2, **options):
    defaults = {"per_device_train_batch_size": 8 // processes, "max_steps": 6, "logging_steps": 3, "learning_rate": 1e-3}
    return make_trainer(folder / "run", dataset=options.pop("dataset", make_dataset([2] * 40)), **{**defaults, **options})


def error_of(work, *arguments) -> str:
    """Return type and text of the error that `work` raises, "" if it raises none."""
    try:
        work(*arguments)
    except (MechanismError, UserError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def run_with_bug(folder, bug: str, bands: str, canaries: int, full_shard: bool, workers: int) -> str:
    if bug:
        function = find(BUGS[bug][0])
        function.__code__ = with_edit(function, *BUGS[bug][1:3])
    trainer = make_run(
        folder, privacy={"noise_bands": bands}, canaries=GradientCanaries(canaries, key=3) if canaries else None,
        full_shard=full_shard, dataloader_num_workers=workers,
    )  # fmt: skip
    return error_of(trainer.train)


def check_passes(work, folder) -> None:
    assert not (error := work(folder)), error


@pytest.mark.integration
@catches("draws that nobody compares", "guards.process_agreement.find_process_mismatches", '"batches": "sampled authors"', "",
    bug="another sampler key on each")  # fmt: skip
@catches("groups that nobody compares", "guards.process_agreement.AgreementMonitor.__init__", 'b"" if sampler.groups is None',
    'b"" if True', bug="another group key on each")  # fmt: skip
@catches("shares that nobody adds up", "guards.process_agreement.find_process_mismatches", "!= main.whole", "is None",
    bug="the same half on each")  # fmt: skip
@catches("an alarm that one process keeps to itself", "guards.monitors.RunMonitors.test", "gather(", "(lambda one: [one])(",
    bug="another sampler key on each")  # fmt: skip
@pytest.mark.parametrize("bug", sample(BUGS))
def test_mismatch_between_processes_ends_all_of_them(tmp_path, bug):
    bands = "3" if "group" in bug else "1"
    errors = in_processes(tmp_path, 2, functools.partial(run_with_bug, tmp_path, bug, bands, 0, False, 0))
    assert errors[0] == errors[1] and errors[0].startswith("MechanismError") and BUGS[bug][3] in errors[0], errors
    ledger = PrivacyLedger(tmp_path / "run" / "privacy_ledger.jsonl")
    assert ledger.steps == 3 and ledger.failure


@pytest.mark.integration
@catches("another sampler key on each process", *bugs.A_SAMPLER_KEY_EACH, **TWO)
@catches("another group key on each process", *bugs.A_GROUP_KEY_EACH, **TWO | {"bands": "3"})
@catches("the whole draw on each process", *bugs.ALL_OF_THE_BATCH_ON_EACH, **TWO)
@catches("the same half of the draw on each process", *bugs.THE_SAME_HALF_ON_EACH, **TWO)
@pytest.mark.parametrize(
    ("processes", "bands", "canaries", "full_shard", "workers"),
    sample([(3, "3", 20, False, 2), (2, "1", 0, False, 0), (3, "1", 20, False, 0), (2, "1", 0, True, 0)]),
)
def test_correct_processes_pass(tmp_path, processes, bands, canaries, full_shard, workers):
    work = functools.partial(run_with_bug, tmp_path, "", bands, canaries, full_shard, workers)
    assert in_processes(tmp_path, processes, work) == [""] * processes


def start_with_difference(folder, difference: str) -> str:
    """Start a run whose second process has different data or options."""
    options: dict = {"dataset": make_dataset([2] * 40)}
    if torch.distributed.get_rank():
        options |= {
            "texts": {"dataset": make_dataset([2] * 40, seed=1)},
            "authors": {"dataset": make_dataset([2] * 41)},
            "samples": {"dataset": make_dataset([2] * 39 + [3])},
            "samples_per_author": {"privacy": {"samples_per_author": 2}},
            "noise_multiplier": {"privacy": {"noise_multiplier": 0.5}},
            "max_steps": {"max_steps": 7},
        }[difference]
    return error_of(lambda: make_run(folder, **options))


@pytest.mark.integration
@catches("data that nobody compares", "guards.process_agreement.check_processes_agree_at_start",
    'start["data"] != starts[0]["data"]', "False",
    difference="texts", words="training data")  # fmt: skip
@pytest.mark.parametrize(
    ("difference", "words"),
    sample([
        ("texts", "training data"), ("authors", "training data"), ("samples", "training data"),
        ("max_steps", "steps"), ("noise_multiplier", "noise_multiplier"), ("samples_per_author", "samples_per_author"),
    ], of=3),
)  # fmt: skip
def test_processes_with_different_data_or_options_do_not_start(tmp_path, difference, words):
    errors = in_processes(tmp_path, 2, functools.partial(start_with_difference, tmp_path, difference))
    assert errors[0] == errors[1] and errors[0].startswith("UserError") and words in errors[0], errors


def test_hash_data_follows_the_content():
    hashes = [hash_process_data(make_dataset([2, 1, 3] * 10, seed)) for seed in (0, 0, 1)]
    assert hashes[0] == hashes[1] != hashes[2]
    assert hash_process_data(make_dataset([2, 1, 3] * 9 + [2, 3, 1])) != hashes[0]


def test_set_hash_is_additive():
    authors = np.arange(1_000)
    whole = hash_process_set(authors, 7)
    assert (
        (hash_process_set(authors[::2], 7) + hash_process_set(authors[1::2], 7)) % 2**64 == whole != hash_process_set(authors, 8)
    )
    assert (2 * hash_process_set(authors[::2], 7)) % 2**64 != whole
    assert hash_process_set(authors[:0], 7) == 0


@catches("authors clipped that nobody counts", "guards.process_agreement.find_process_mismatches", "!= main.sampled", "is None",
    bug="microbatches taken twice")  # fmt: skip
@pytest.mark.parametrize("bug", ["microbatches taken twice"])
def test_mismatch_within_one_process_ends_it(tmp_path, monkeypatch, bug):
    name, old, new, words = BUGS[bug]
    monkeypatch.setattr(find(name), "__code__", with_edit(find(name), old, new))
    with pytest.raises(MechanismError, match=words):
        make_run(tmp_path, processes=1).train()
