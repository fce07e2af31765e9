"""monitors.py: updates that the ledger lacks, and changes of frozen weights, end the run."""

import copy
import functools

import pytest
import torch
from conftest import MODELS, make_dataset, make_trainer, tiny_gpt2
from forked_runs import in_processes
from mutation import catches
from planting import find, with_edit
from transformers import TrainerCallback

from author_dp.accounting.ledger import PrivacyLedger
from author_dp.errors import MechanismError, UserError
from author_dp.guards.monitors import FrozenWeightsMonitor, UpdateMonitor


class AtStepEnd(TrainerCallback):
    """Call a function with model and optimizer at the end of each step from the second on."""

    follows = "steps"  # or the check of callbacks would fail first

    def __init__(self, function):
        self.function = function

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        if state.global_step >= 2:
            self.function(model, optimizer)


def half_frozen(tied: bool = True) -> torch.nn.Module:
    model = tiny_gpt2(tied=tied)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("h.1" in name)
    return model


def run(folder, model=None, at_step_end=None, **options) -> None:
    options = {"max_steps": 4, "logging_steps": 2, "save_strategy": "steps", "save_steps": 3, **options}
    trainer = make_trainer(folder, model, make_dataset([1] * 40), **options)
    if at_step_end is not None:
        trainer.add_callback(AtStepEnd(at_step_end))
    trainer.train()


@catches("updates that nobody counts", "guards.monitors.UpdateMonitor.test", "self.updates != self.budget.steps", "False")
def test_unrecorded_update_ends_the_run(tmp_path):
    with pytest.raises(MechanismError, match="updated 3 times, but the ledger has 2 steps"):
        run(tmp_path, at_step_end=lambda model, optimizer: optimizer.optimizer.original_optimizer.step())
    assert PrivacyLedger(tmp_path / "privacy_ledger.jsonl").failure


def test_nested_optimizer_step_counts_as_one_update(tmp_path):
    class Derived(torch.optim.SGD):
        def step(self, closure=None):
            return super().step(closure)

    torch.optim.SGD([torch.zeros(1, requires_grad=True)])  # from now on both classes have hooks
    trainer = make_trainer(tmp_path, max_steps=2)
    trainer.optimizer = Derived(trainer.model.parameters(), lr=1.0)
    trainer.train()


def test_step_without_update_ends_the_run(tmp_path, monkeypatch):
    step = find("author_dp.mechanism.optimizer.AuthorDPOptimizer.pre_step")
    code = with_edit(step, "self.before_release()", "self.before_release(); self.before_release()")
    monkeypatch.setattr(step, "__code__", code)
    with pytest.raises(MechanismError, match="updated 2 times, but the ledger has 4 steps"):
        run(tmp_path)


@catches("a ledger that is not read again", "accounting.budget.Budget.missing_steps", "PrivacyLedger(self.ledger.path).steps",
    "self.ledger.steps")  # fmt: skip
def test_step_missing_in_the_ledger_file_ends_the_run(tmp_path, monkeypatch):
    append = find("author_dp.accounting.ledger.PrivacyLedger._append")
    code = with_edit(append, "self._chain.append(record)", "None if self.steps == 3 else self._chain.append(record)")
    monkeypatch.setattr(append, "__code__", code)
    with pytest.raises(MechanismError, match="lacks 1 steps"):
        run(tmp_path)


def change_frozen_weight(model, optimizer) -> None:
    with torch.no_grad():
        next(p for p in model.parameters() if not p.requires_grad).view(-1)[0].add_(1e-6)


@pytest.mark.integration
@catches("noise on frozen weights", "dp_utils.DPTrainer.training_step", "self.norms.end_step()",
    "self.norms.end_step(); [p.data.add_(torch.randn_like(p), alpha=1e-3) for p in self.model.parameters()]",
    make=half_frozen)  # fmt: skip
@catches("frozen weights that nobody looks at", "guards.monitors.FrozenWeightsMonitor._checksums", "if not p.requires_grad",
    "if False", make=half_frozen)  # fmt: skip
@pytest.mark.parametrize("make", [half_frozen, functools.partial(tiny_gpt2, **MODELS["lora"])], ids=["frozen", "lora"])
def test_changed_frozen_weights_end_the_run(tmp_path, make):
    run(tmp_path / "honest", make(), optim="adamw_torch", weight_decay=0.1)
    with pytest.raises(MechanismError, match="is not trained, but has changed"):
        run(tmp_path / "noise", make(), change_frozen_weight)
    assert not (tmp_path / "noise" / "checkpoint-3").exists()


def test_changed_saved_buffer_ends_the_run(tmp_path):
    model = tiny_gpt2()
    model.register_buffer("memory", torch.zeros(3))
    model.register_buffer("scratch", torch.zeros(3), persistent=False)
    run(tmp_path / "scratch", copy.deepcopy(model), lambda model, _: model.scratch.add_(1))
    with pytest.raises(MechanismError, match="memory is not trained"):
        run(tmp_path / "memory", model, lambda model, _: model.memory.add_(1))


@pytest.mark.integration
def test_resuming_and_training_again_pass(tmp_path):
    options = {"optim": "adamw_torch", "save_steps": 2}
    run(tmp_path, half_frozen(), **options)
    run(tmp_path, half_frozen(), **options, resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    trainer = make_trainer(tmp_path / "twice", half_frozen(), make_dataset([1] * 40), max_steps=2)
    trainer.train()
    trainer.train()
    assert trainer.budget.ledger.steps == 4


def run_sharded(folder, noisy: bool) -> str:
    try:
        model = tiny_gpt2(**MODELS["lora"])
        run(folder, model, change_one_shard if noisy else None, full_shard=True, optim="adamw_torch")
    except MechanismError as error:
        return str(error)
    return ""


def change_one_shard(model, optimizer) -> None:
    if torch.distributed.get_rank():
        frozen = next(p for p in model.parameters() if not p.requires_grad)
        frozen.to_local().view(-1)[0].add_(1e-6)


@pytest.mark.integration
@pytest.mark.parametrize("noisy", [False, True])
def test_each_process_checks_its_shards_of_frozen_weights(tmp_path, noisy):
    first, second = in_processes(tmp_path, 2, functools.partial(run_sharded, tmp_path / "run", noisy))
    assert first == second and ("has changed" in first) == noisy


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.uint8, torch.bool])
def test_checksum_reads_every_dtype(dtype):
    for numbers in (torch.ones(2, 3).T, torch.ones(8), torch.ones(16)[1:9], torch.ones(())):
        model = torch.nn.Module()
        model.register_buffer("numbers", numbers.to(dtype))
        monitor = FrozenWeightsMonitor(model)
        monitor.test_full()
        model.numbers.view(-1)[-1:].zero_() if model.numbers.is_contiguous() else model.numbers[-1].zero_()
        with pytest.raises(MechanismError, match="numbers is not trained"):
            monitor.test_full()


@pytest.mark.parametrize("bits", ["bfloat16", "4 bits"])
def test_changed_quantized_base_or_scales_are_found(tmp_path, bits):
    test_quantization = pytest.importorskip("test_quantization")
    folder = test_quantization.make_folders(tmp_path)["llama"]
    options = {"optim": "adamw_torch", "max_steps": 3, "eval_strategy": "no"}
    run(tmp_path / "honest", test_quantization.make(folder, bits), **options)
    model = test_quantization.make(folder, bits)
    monitor = FrozenWeightsMonitor(model)
    if bits == "4 bits":
        next(p for p in model.parameters() if hasattr(p, "quant_state")).quant_state.absmax.view(-1)[0].add_(1)
    else:
        next(p for p in model.parameters() if p.dtype == torch.bfloat16).data.view(-1)[0].add_(1)
    with pytest.raises(MechanismError, match="not trained"):
        monitor.test_full()


@catches("a failure hidden by an edited ledger", "guards.monitors.RunMonitors.test", "except UserError as error:",
    "except ZeroDivisionError as error:")  # fmt: skip
def test_a_ledger_that_cannot_be_read_hides_no_failure(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path)
    monitors, path = trainer.monitors, tmp_path / "privacy_ledger.jsonl"
    path.write_text("changed\n")
    monitors._updates = UpdateMonitor(trainer.budget)
    with pytest.raises(UserError, match="line 1 was changed"):
        monitors.test(full=True)
    monitors._monitors = [monitors._updates]
    monitors._updates.updates = 1  # of which the ledger has none
    try:
        monitors.test(full=True)
    except MechanismError as error:
        assert "weights were updated 1 times" in str(error)
    except UserError:
        pytest.fail("hidden")
