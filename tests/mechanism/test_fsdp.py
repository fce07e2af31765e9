"""Test a step of a sharded model against a plain loop over authors, its noise, and saving and resuming."""

import functools
import math
from pathlib import Path

import bugs
import numpy as np
import pytest
import reference
import torch
import torch.distributed as dist
from conftest import (
    COUNTS,
    MODELS,
    as_arrays,
    flat,
    make_batch,
    make_dataset,
    make_trainer,
    read_report,
    tiny_gpt2,
    train,
    trainable,
    within,
)
from families import make_model
from forked_runs import in_processes
from mutation import catches
from scipy.linalg import toeplitz
from torch import nn
from torch.distributed.tensor import DTensor

from author_dp.accounting.banded_mf import toeplitz_coefficients
from author_dp.accounting.ledger import PrivacyLedger
from author_dp.errors import UserError
from author_dp.guards.gradient_canaries import GradientCanaries
from author_dp.guards.model_check import verify_model
from author_dp.mechanism import fsdp
from author_dp.mechanism.adam_bc import AdamBC
from author_dp.mechanism.fsdp import (
    ShardedOptimizer,
    find_blocks,
    gather_in_bfloat16,
    local_shard,
    missing_fsdp_rounds,
    shard_model,
)
from author_dp.mechanism.fsdp_clipping import ShardedClipping, make_engine, make_sharded_buckets
from author_dp.mechanism.losses import author_losses
from author_dp.mechanism.optimizer import PROBE_SIZE

CPU = torch.device("cpu")

# --- the update, against a plain loop ---------------------------------------------------------------------


def released(kind: str, counts: list, checkpointing: bool = False, bf16: bool = False) -> dict:
    """Return what a sharded step releases without noise; `counts[rank]` has the samples of each author of each microbatch."""
    model = tiny_gpt2(**MODELS[kind])
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    shard_model(model.train(), CPU)
    if bf16:
        gather_in_bfloat16(model)
    parameters = trainable(model).values()
    optimizer = ShardedOptimizer(
        torch.optim.SGD(parameters, lr=1.0),
        noise_multiplier=0.0,
        clip_norm=0.5,
        expected_batch_size=8,
        before_release=lambda: None,
    )
    engine = make_engine(model, "ghost", 0.5, False)
    before = flat(parameters)
    optimizer.zero_grad()
    rank, authors = dist.get_rank(), []
    idle = missing_fsdp_rounds(model, len(counts[rank]))
    for number, samples in enumerate(counts[rank]):
        batch = make_batch(samples, seed=10 * rank + number)
        authors += [[row.tolist() for row in rows] for rows in as_arrays(batch)]
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            losses = author_losses(engine.module, batch)
        engine.backward(losses, batch["author"])
    for _ in range(idle):
        engine.dummy_backward()
    sums = [local_shard(parameter.summed_grad) for parameter in parameters]
    optimizer.step()
    return {
        "dtypes": {tensor.dtype for tensor in [*sums, *(local_shard(parameter) for parameter in parameters)]},
        "authors": authors,
        "update": before - flat(parameters),
        "local_sizes": [local_shard(parameter).numel() for parameter in parameters],
        "sizes": [parameter.numel() for parameter in parameters],
    }


def check_update(folder: Path, kind: str, counts: list, tolerance: float = 1e-5, **options) -> None:
    found = in_processes(folder, len(counts), functools.partial(released, kind, counts, **options))
    authors = [author for process in found for author in process["authors"]]
    expected = reference.clipped_sum(tiny_gpt2(**MODELS[kind]), authors, 0.5) / 8
    for process in found:
        assert (process["update"] - expected).norm() <= tolerance * expected.norm()
        assert process["dtypes"] == {torch.float32}  # sums and updated weights, also under bfloat16
        assert torch.equal(process["update"], found[0]["update"])
    local_sizes = np.sum([process["local_sizes"] for process in found], 0).tolist()
    assert local_sizes == found[0]["sizes"]  # each coordinate is on one process


# One process has more microbatches than another, one of them none at all.
UNEQUAL = [[[1, 2], [3]], [[2, 1, 1]], [], [[1]]]


@pytest.mark.integration
@catches("shares: the mean of the processes' sums", "mechanism.fsdp_clipping.ShardedStore.sum_pass", "view_as(local))",
    "view_as(local), alpha=1 / world_size)", kind="tied", counts=UNEQUAL[:2])  # fmt: skip
@catches("shares: an idle round counts", "mechanism.fsdp_clipping.ShardedStore.sum_pass", "if self.is_dummy:", "if False:",
    kind="tied", counts=UNEQUAL[:2])  # fmt: skip
@catches("shares: the sums of one process alone", "mechanism.fsdp_clipping.ShardedStore.sum_pass",
    "reduce_scatter(shards, flat.view(-1),",
    "shards.copy_(flat[dist.get_rank()]) if True else reduce_scatter(shards, flat.view(-1),", kind="tied",
    counts=UNEQUAL[:2])  # fmt: skip
@pytest.mark.parametrize(
    ("kind", "counts"), [("tied", UNEQUAL[:2]), ("lora", UNEQUAL[1:3]), ("untied", UNEQUAL[:3]), ("tied", UNEQUAL)]
)
def test_sharded_update_equals_a_plain_loop(tmp_path, kind, counts):
    check_update(tmp_path, kind, counts)


@pytest.mark.integration
@pytest.mark.parametrize(("option", "tolerance"), [({"checkpointing": True}, 1e-5), ({"bf16": True}, 0.02)])
def test_sharded_update_with_checkpointing_and_bfloat16(tmp_path, option, tolerance):
    check_update(tmp_path, "tied", UNEQUAL[:2], tolerance, **option)


def gathered(bf16: bool) -> dict:
    """Return the types in which processes send the weights of a forward pass, and the losses."""
    model, sent = shard_and_note(tiny_gpt2(), bf16)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        losses = author_losses(model, make_batch([1, 2, 1]))
    return {"losses": losses, "sent": sent}


def shard_and_note(model: nn.Module, bf16: bool) -> tuple[nn.Module, dict]:
    """Shard a model; return it, and {dtype: bytes} of what is gathered from now on."""
    sent: dict = {}
    shard_model(model.train(), CPU)
    if bf16:
        gather_in_bfloat16(model)
    gather = fsdp.all_gather

    def note(output: torch.Tensor, values: torch.Tensor, **options) -> None:
        sent[values.dtype] = sent.get(values.dtype, 0) + values.nbytes
        gather(output, values, **options)

    fsdp.all_gather = note
    return model, sent


@pytest.mark.integration
@catches("weights gathered in float32", "mechanism.fsdp.gather_in_bfloat16", "block.set_custom_all_gather", "(lambda _: None)")
def test_blocks_are_gathered_in_half_the_bytes_under_bfloat16(tmp_path):
    found = []
    for bf16 in (False, True):
        (folder := tmp_path / str(bf16)).mkdir()
        found.append(in_processes(folder, 2, gathered, bf16)[0])
    plain, half = found
    block_bytes = sum(p.numel() for block in find_blocks(tiny_gpt2()) for p in block.parameters()) * 2 / 2  # on each process
    assert not plain["sent"] and half["sent"].get(torch.uint8, 0) >= block_bytes
    assert half["sent"][torch.uint8] <= 1.1 * block_bytes  # padding
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        expected = author_losses(tiny_gpt2().train(), make_batch([1, 2, 1]))
    assert torch.allclose(plain["losses"], expected, rtol=1e-6)
    assert torch.allclose(half["losses"], expected, rtol=2**-8)  # where the layer norms' weights are rounded, too


def one_step(folder: Path) -> dict:
    """Take steps of the Trainer, with noise, gradient canaries and evaluation, all authors in each batch."""
    canaries = GradientCanaries(40, key=3)
    trainer = make_trainer(
        folder / "run", tiny_gpt2(), make_dataset([2, 1, 5]), full_shard=True, canaries=canaries, per_device_train_batch_size=8,
        gradient_accumulation_steps=2, max_steps=3,
    )  # fmt: skip
    batches, recorder = train(trainer)
    loss = trainer.evaluate(make_dataset([3, 1, 2, 1, 1], seed=3))["eval_loss"]
    trainer.save_model()
    return {
        "microbatches": [len(batch.microbatches) for batch in batches],
        "weights": flat(trainer.model.parameters()),
        "update": sum(recorder.gradients),
        "wrapped_in": recorder.wrapped_in,
        "proven": trainer.model_check.error,
        "checked": (trainer.monitors.noise.steps, canaries.monitor.steps),
        "loss": loss,
    }


@pytest.mark.integration
def test_sharded_run_is_checked_monitored_and_evaluated(tmp_path):
    first, second = in_processes(tmp_path, 2, one_step, tmp_path)
    assert first["wrapped_in"] == "NoDDPWrapper" and first["proven"] < 1e-5 and first["checked"] == (3, 3)
    before = flat(tiny_gpt2().parameters())
    assert torch.allclose(before - first["update"], first["weights"], atol=1e-5) and torch.equal(
        first["weights"], second["weights"]
    )
    model = tiny_gpt2()
    torch.nn.utils.vector_to_parameters(first["weights"], model.parameters())
    samples = make_dataset([3, 1, 2, 1, 1], seed=3).samples.with_format(None)["input_ids"][:]
    total, targets = 0.0, 0
    for ids in map(torch.tensor, samples):
        total += nn.functional.cross_entropy(model.eval()(ids[None]).logits[0, :-1], ids[1:], reduction="sum").item()
        targets += len(ids) - 1
    assert first["loss"] == second["loss"] == pytest.approx(total / targets, rel=1e-4)
    assert read_report(tmp_path / "run")["world_size"] == 2
    assert PrivacyLedger(tmp_path / "run" / "privacy_ledger.jsonl").steps == 3


# --- noise ------------------------------------------------------------------------------------------------


def released_noise(canaries: int = 0) -> dict:
    """Return what a sharded optimizer releases in two empty steps, over sigma C / B; canary sums differ by process."""
    model = nn.Linear(400, 331, bias=True)
    shard_plainly(model)
    table = None if not canaries else GradientCanaries(canaries, key=1)
    parameters, probes = list(model.parameters()), []
    optimizer = ShardedOptimizer(
        torch.optim.SGD(parameters, lr=0.0), noise_multiplier=1.5, clip_norm=0.2, expected_batch_size=10,
        before_release=lambda: None, after_release=lambda probe: probes.append(probe.clone()), canaries=table,
    )  # fmt: skip
    steps = []
    for _ in range(2):
        optimizer.zero_grad()
        if table is not None:
            table.table.weight.summed_grad.add_(1.0 + dist.get_rank())
        optimizer.step()
        steps.append({"local": torch.cat([local_shard(p.grad).flatten() for p in parameters]) / 0.03, "probe": probes[-1] / 0.03})
    return {"steps": steps, "complete": flat(p.grad for p in parameters) / 0.03}


def shard_plainly(model: nn.Module) -> None:
    from torch.distributed.fsdp import fully_shard

    fully_shard(model, reshard_after_forward=True)


@catches("shares: a part of the noise for each process", "mechanism.optimizer.AuthorDPOptimizer.add_noise_and_divide",
    "self.noise_multiplier * self.max_grad_norm",
    "self.noise_multiplier * self.max_grad_norm / torch.distributed.get_world_size() ** 0.5")  # fmt: skip
@catches("shares: noise on the first process alone", *bugs.NOISE_ON_RANK_0_ALONE)
@catches("shares: the same noise for each", *bugs.SEEDED_NOISE_IN_EACH_STEP)
def test_sharded_noise_is_added_once_and_independent_between_shards(tmp_path):
    found = in_processes(tmp_path, 2, released_noise)
    complete = found[0]["complete"]
    assert len(complete) == 401 * 331 and torch.equal(complete, found[1]["complete"])
    shards = [process["steps"][-1]["local"] for process in found]
    assert sum(len(shard) for shard in shards) == len(complete)
    for noise in (*shards, complete, found[0]["steps"][-1]["probe"]):
        assert within(noise.mean().item(), 0, 1 / math.sqrt(len(noise)))
        assert within(noise.var().item(), 1, math.sqrt(2 / len(noise)))
    steps = [process["steps"] for process in found]
    for first, second in ((steps[0][1], steps[1][1]), (steps[0][0], steps[0][1]), (steps[0][0], steps[1][1])):
        size = min(len(first["local"]), len(second["local"]))
        for one, other in ((first["local"][:size], second["local"][:size]), (first["local"][:1000], second["local"][-1000:])):
            assert within(np.corrcoef(one, other)[0, 1], 0, 1 / math.sqrt(len(one)))
    assert len(complete.unique()) > 0.9 * len(complete)


@catches("shares: the pad noised twice", "mechanism.optimizer.AuthorDPOptimizer.add_noise_and_divide",
    "std /= math.sqrt(self.grad_buffer.noise_shares)", "self.noise.add_(self.grad_buffer._probe_chunk, std)")  # fmt: skip
@catches("shares: canaries of one process alone", "mechanism.fsdp.ShardedGradBuffer.reduce_sums",
    "dist.all_reduce(self._probe_sums)", "pass")  # fmt: skip
@catches("shares: canaries used twice", "mechanism.fsdp.ShardedGradBuffer.zero_", "self._probe_sums.zero_()", "pass")
def test_sharded_probe_has_the_noise_of_all_processes_once(tmp_path):
    found = in_processes(tmp_path, 3, released_noise, 60)
    probes = [process["steps"][-1]["probe"] for process in found]
    assert len(probes[0]) == PROBE_SIZE + 60 and torch.equal(probes[0], probes[1]) and torch.equal(probes[0], probes[2])
    probe, canaries = probes[0][:PROBE_SIZE], probes[0][PROBE_SIZE:]
    assert within(probe.var().item(), 1, math.sqrt(2 / PROBE_SIZE))
    thirds = probe[: PROBE_SIZE // 3 * 3].view(3, -1)
    between = np.corrcoef(thirds)[np.triu_indices(3, 1)]
    assert all(within(correlation, 0, 1 / math.sqrt(PROBE_SIZE // 3)) for correlation in between)
    # Of three processes, 1 + 2 + 3, over sigma C = 0.3.
    assert within(canaries.mean().item(), 6 / 0.3, 1 / math.sqrt(60)) and within(canaries.var().item(), 1, math.sqrt(2 / 60))


def banded_noise(coefficients: np.ndarray, steps: int) -> list[torch.Tensor]:
    """Return what a sharded optimizer releases in empty steps with noise bands, over sigma C / B, (coordinates,) each."""
    model = nn.Linear(200, 151)
    shard_plainly(model)
    plain = AdamBC(torch.optim.AdamW(model.parameters(), lr=0.0))
    optimizer = ShardedOptimizer(plain, noise_multiplier=1.5, clip_norm=0.2, expected_batch_size=10, before_release=lambda: None)
    optimizer.start_training(coefficients)
    released = []
    for number in range(steps):
        optimizer.zero_grad()
        with pytest.raises(RuntimeError, match="needs the batch of that index"):
            optimizer.step()
        optimizer.batch_index = number
        optimizer.step()
        released.append(flat(p.grad for p in optimizer.params) / 0.03)
        assert plain.noise_variance == pytest.approx(0.03**2 * optimizer.band_noise.variance)
    return released


@catches("shares: noise with bands that reaches no sum", "mechanism.optimizer.AuthorDPOptimizer.add_noise_and_divide",
    "self.band_noise.add_(self.grad_buffer.noise_slice,",
    "self.band_noise.add_(torch.zeros_like(self.grad_buffer.noise_slice),")  # fmt: skip
@catches("shares: bands for a part of the share", "mechanism.fsdp.ShardedGradBuffer.__init__", "= 1, self.sums",
    "= 1, self.sums.tensor_split(world_size)[rank]")  # fmt: skip
def test_sharded_noise_with_bands_is_correlated_over_steps(tmp_path):
    c, steps = toeplitz_coefficients(3, 5), 5
    first, second = in_processes(tmp_path, 2, banded_noise, np.array(c), steps)
    inverse = np.linalg.inv(toeplitz(np.pad(c, (0, 2)), np.zeros(steps)))
    covariance = inverse @ inverse.T
    size = 201 * 151
    for one, other in zip(first, second):
        assert torch.equal(one, other)
    for half in torch.stack(first).tensor_split(2, dim=1):
        found, bound = np.cov(half.numpy()), 6 * np.sqrt(2 / (size / 2)) * covariance.max()
        assert np.abs(found - covariance).max() < bound
    assert within(np.corrcoef(first[0][: size // 2], first[0][-(size // 2) :])[0, 1], 0, 1 / math.sqrt(size // 2))


def fail_to_record() -> bool:
    model = nn.Linear(4, 4)
    shard_plainly(model)
    before = local_shard(model.weight).clone()

    def fail():
        raise OSError("disk full")

    optimizer = ShardedOptimizer(
        torch.optim.SGD(model.parameters(), lr=1.0),
        noise_multiplier=1.0,
        clip_norm=1.0,
        expected_batch_size=1,
        before_release=fail,
    )
    with pytest.raises(OSError):
        optimizer.step()
    return torch.equal(local_shard(model.weight), before)


@catches("shares: a step that no ledger holds", "mechanism.optimizer.AuthorDPOptimizer.pre_step", "self.before_release()", "pass")
def test_sharded_optimizer_updates_nothing_when_the_step_cannot_be_recorded(tmp_path):
    assert in_processes(tmp_path, 2, fail_to_record) == [True, True]


# --- the engine -------------------------------------------------------------------------------------------


def memory_of_sums() -> list[bool]:
    """Return whether all weights are sharded after a microbatch, without ordinary gradients, and the engine keeps nothing."""
    model = tiny_gpt2()
    shard_model(model, CPU)
    engine = ShardedClipping(model, 0.5)
    parameters = list(model.parameters())
    for parameter in parameters:
        parameter.summed_grad = torch.zeros_like(parameter, requires_grad=False)
    batch = make_batch(COUNTS)
    engine.backward(author_losses(model, batch), batch["author"])
    held = [p for module in model.modules() for p in module.parameters(recurse=False)]
    return [all(isinstance(p, DTensor) and p.grad is None for p in held), not engine.store.factors]


def test_sharded_engine_leaves_nothing_complete_and_no_ordinary_gradient(tmp_path):
    assert in_processes(tmp_path, 2, memory_of_sums) == [[True, True]] * 2


def test_buckets_hold_small_parameters_together(monkeypatch):
    monkeypatch.setattr("author_dp.mechanism.fsdp_clipping.BUCKET_ELEMENTS", 10)
    sizes = [3, 4, 5, 20, 1, 9, 1]
    buckets = make_sharded_buckets([torch.zeros(n) for n in sizes])
    assert [[p.numel() for p in b] for b in buckets] == [[3, 4], [5], [20], [1, 9], [1]]


def test_find_blocks_refuses_a_model_without_blocks():
    with pytest.raises(UserError, match="Leave out --fsdp"):
        find_blocks(nn.Linear(2, 2))
    assert len(find_blocks(tiny_gpt2())) == 2


def proven(family: str, kind: str) -> float:
    model = make_model(family, kind)
    shard_model(model, CPU)
    return verify_model(model, "ghost", 14).error


@pytest.mark.integration
@pytest.mark.parametrize(("family", "kind"), [("llama", "untied"), ("opt", "tied"), ("qwen3", "lora")])
def test_verify_model_accepts_sharded_families(tmp_path, family, kind):
    first, second = in_processes(tmp_path, 2, proven, family, kind)
    assert first == second < 1e-5
