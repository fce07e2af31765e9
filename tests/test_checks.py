"""checks.py: updates without a step in the ledger, and weights that change though nobody trains them, end the run."""

import functools

import pytest
import torch
from conftest import MODELS, make_dataset, make_trainer, tiny_gpt2
from forked import in_processes
from planting import find, with_edit
from transformers import TrainerCallback

from author_dp.accounting.ledger import PrivacyLedger
from author_dp.errors import MechanismError
from author_dp.guards.monitors import FrozenWeightsMonitor


class At(TrainerCallback):
    """Call a function with the model and the optimizer at the end of each step from the second on."""

    follows = "steps"  # or the callbacks' own check would come first

    def __init__(self, act):
        self.act = act

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        if state.global_step >= 2:
            self.act(model, optimizer)


def half_frozen(tied: bool = True) -> torch.nn.Module:
    model = tiny_gpt2(tied=tied)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("h.1" in name)
    return model


def run(folder, model=None, act=None, **options) -> None:
    options = {"max_steps": 4, "logging_steps": 2, "save_strategy": "steps", "save_steps": 3, **options}
    trainer = make_trainer(folder, model, make_dataset([1] * 40), **options)
    if act is not None:
        trainer.add_callback(At(act))
    trainer.train()


def test_an_update_that_no_ledger_holds_ends_the_run(tmp_path):
    with pytest.raises(MechanismError, match="updated 3 times in 2 steps"):
        run(tmp_path, act=lambda model, optimizer: optimizer.optimizer.original_optimizer.step())
    assert PrivacyLedger(tmp_path / "privacy_ledger.jsonl").failure


def test_an_optimizer_whose_step_calls_that_of_its_base_makes_one_update(tmp_path):
    class Derived(torch.optim.SGD):
        def step(self, closure=None):
            return super().step(closure)

    torch.optim.SGD([torch.zeros(1, requires_grad=True)])  # from here on both have hooks
    trainer = make_trainer(tmp_path, max_steps=2)
    trainer.optimizer = Derived(trainer.model.parameters(), lr=1.0)
    trainer.train()


def test_a_step_without_an_update_ends_the_run(tmp_path, monkeypatch):
    step = find("author_dp.mechanism.optimizer.AuthorDPOptimizer.pre_step")
    twice = with_edit(step, "self.before_release()", "self.before_release(); self.before_release()")
    monkeypatch.setattr(step, "__code__", twice)
    with pytest.raises(MechanismError, match="updated 2 times in 4 steps"):
        run(tmp_path)


def test_a_step_that_is_not_on_the_disk_ends_the_run(tmp_path, monkeypatch):
    append = find("author_dp.accounting.ledger.PrivacyLedger._append")
    code = with_edit(append, "self._chain.append(record)", "None if self.steps == 3 else self._chain.append(record)")
    monkeypatch.setattr(append, "__code__", code)
    with pytest.raises(MechanismError, match="lacks 1 steps"):
        run(tmp_path)


def add_noise(model, optimizer) -> None:
    with torch.no_grad():
        next(p for p in model.parameters() if not p.requires_grad).view(-1)[0].add_(1e-6)


@pytest.mark.parametrize("make", [half_frozen, functools.partial(tiny_gpt2, **MODELS["lora"])], ids=["frozen", "lora"])
def test_weights_that_are_not_trained_stay_as_they_are(tmp_path, make):
    run(tmp_path / "honest", make(), optim="adamw_torch", weight_decay=0.1)
    with pytest.raises(MechanismError, match="has changed, which is not trained"):
        run(tmp_path / "noise", make(), add_noise)
    assert not (tmp_path / "noise" / "checkpoint-3").exists()


def test_a_buffer_that_is_saved_stays_as_it_is(tmp_path):
    model = tiny_gpt2()
    model.register_buffer("memory", torch.zeros(3))
    model.register_buffer("scratch", torch.zeros(3), persistent=False)
    run(tmp_path / "scratch", model, lambda model, _: model.scratch.add_(1))
    with pytest.raises(MechanismError, match="memory has changed"):
        run(tmp_path / "memory", model, lambda model, _: model.memory.add_(1))


def test_resuming_and_training_again_raise_nothing(tmp_path):
    options = {"optim": "adamw_torch", "save_steps": 2}
    run(tmp_path, half_frozen(), **options)
    run(tmp_path, half_frozen(), **options, resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    trainer = make_trainer(tmp_path / "twice", half_frozen(), make_dataset([1] * 40), max_steps=2)
    trainer.train()
    trainer.train()
    assert trainer.budget.ledger.steps == 4


def sharded(folder, noisy: bool) -> str:
    try:
        model = tiny_gpt2(**MODELS["lora"])
        run(folder, model, act_on_share if noisy else None, full_shard=True, optim="adamw_torch")
    except MechanismError as error:
        return str(error)
    return ""


def act_on_share(model, optimizer) -> None:
    if torch.distributed.get_rank():
        frozen = next(p for p in model.parameters() if not p.requires_grad)
        frozen.to_local().view(-1)[0].add_(1e-6)


@pytest.mark.parametrize("noisy", [False, True])
def test_of_weights_in_shares_each_process_checks_its_own(tmp_path, noisy):
    first, second = in_processes(tmp_path, 2, functools.partial(sharded, tmp_path / "run", noisy))
    assert first == second and ("has changed" in first) == noisy


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.uint8, torch.bool])
def test_bits_of_every_type_are_read(dtype):
    for numbers in (torch.ones(2, 3).T, torch.ones(8), torch.ones(16)[1:9], torch.ones(())):
        model = torch.nn.Module()
        model.register_buffer("numbers", numbers.to(dtype))
        fixed = FrozenWeightsMonitor(model)
        fixed.test_full()
        model.numbers.view(-1)[-1:].zero_() if model.numbers.is_contiguous() else model.numbers[-1].zero_()
        with pytest.raises(MechanismError, match="numbers has changed"):
            fixed.test_full()


@pytest.mark.parametrize("bits", ["bfloat16", "4 bits"])
def test_a_base_in_fewer_bits_and_its_scales_stay_as_they_are(tmp_path, bits):
    test_frozen = pytest.importorskip("test_frozen")
    folder = test_frozen.make_folders(tmp_path)["llama"]
    options = {"optim": "adamw_torch", "max_steps": 3, "eval_strategy": "no"}
    run(tmp_path / "honest", test_frozen.make(folder, bits), **options)
    model = test_frozen.make(folder, bits)
    fixed = FrozenWeightsMonitor(model)
    if bits == "4 bits":
        next(p for p in model.parameters() if hasattr(p, "quant_state")).quant_state.absmax.view(-1)[0].add_(1)
    else:
        next(p for p in model.parameters() if p.dtype == torch.bfloat16).data.view(-1)[0].add_(1)
    with pytest.raises(MechanismError, match="not trained"):
        fixed.test_full()
