"""dp_utils.py: whole steps and runs of the Trainer against their definition, and each silent way to break them."""

import json
import math
import re
import secrets
import subprocess
import sys
from base64 import b64encode
from pathlib import Path

import naive
import numpy as np
import pytest
import torch
from conftest import (
    COUNTS,
    MODELS,
    ROOT,
    VOCABULARY,
    as_arrays,
    flat,
    make_batch,
    make_dataset,
    make_trainer,
    read_report,
    tiny_gpt2,
    trainable,
    within,
)
from test_accounting import exact_epsilon
from torch import nn
from transformers import TrainerCallback

import dp_utils
import guards
from accounting import Spending, compute_epsilon, guarantee_in_words
from data_utils import UserError, collate
from dp_utils import PrivacyArguments
from ledger import PrivacyLedger
from mechanism import LogicalBatch, author_losses
from noise import NoiseSource

# --- the Trainer ----------------------------------------------------------------------------------------


class Recorder(TrainerCallback):
    """Keep the gradient that each step releases, and the weights around it."""

    def __init__(self):
        self.gradients, self.logs = [], []

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradients.append(flat(p.grad for p in trainable(model).values()).clone())

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs))


def train(trainer) -> tuple[list[LogicalBatch], Recorder]:
    """Train, and return what each step saw and released."""
    batches, recorder = [], Recorder()
    step = trainer.training_step

    def training_step(model, inputs, *args):
        batches.append(inputs)
        recorder.wrapped_in = type(model).__name__
        return step(model, inputs, *args)

    trainer.training_step = training_step
    trainer.add_callback(recorder)
    trainer.train()
    return batches, recorder


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize(("per_device", "accumulation"), [(4, 1), (2, 2), (1, 3), (64, 1)])
def test_the_update_of_a_step_equals_a_naive_loop_over_authors(tmp_path, clipping, kind, k, per_device, accumulation):
    model = tiny_gpt2(**MODELS[kind])
    before = flat(trainable(model).values()).clone()
    trainer = make_trainer(
        tmp_path, model, privacy={"noise_multiplier": 0.0, "samples_per_author": k, "clipping": clipping},
        per_device_train_batch_size=per_device, gradient_accumulation_steps=accumulation,
    )  # fmt: skip
    batches, recorder = train(trainer)
    after = flat(trainable(model).values())
    authors = [samples for batch in batches[0].microbatches for samples in as_arrays(batch)]
    assert all(1 <= len(samples) <= k for samples in authors)
    assert all(batch["num_authors"] <= per_device for batch in batches[0].microbatches)
    reference = tiny_gpt2(**MODELS[kind])
    expected = naive.clipped_sum(reference, authors, 0.5) / (per_device * accumulation) if authors else torch.zeros_like(before)
    assert torch.allclose(recorder.gradients[0], expected, atol=1e-5 * expected.norm().item(), rtol=0)
    assert (before - after - expected).norm() <= 1e-5 * expected.norm() + 1e-6
    if kind == "tied":
        assert model.lm_head.weight is model.transformer.wte.weight


def test_noise_is_drawn_once_per_step_whatever_the_microbatches(tmp_path):
    for per_device, accumulation in ((16, 1), (1, 16)):
        trainer = make_trainer(
            tmp_path / str(accumulation), dataset=make_dataset([1] * 12), privacy={"noise_multiplier": 3.0},
            per_device_train_batch_size=per_device, gradient_accumulation_steps=accumulation,
        )  # fmt: skip
        batches, recorder = train(trainer)
        assert len(batches[0].microbatches) == (1 if per_device == 16 else 12)
        authors = [samples for batch in batches[0].microbatches for samples in as_arrays(batch)]
        noise = recorder.gradients[0] * 16 - naive.clipped_sum(tiny_gpt2(), authors, 0.5)
        assert within(noise.var().item() / 1.5**2, 1, math.sqrt(2 / len(noise)))


def test_epochs_are_as_many_steps_as_were_planned_and_accounted_for(tmp_path):
    # q = 4 / 10: 3 epochs are ceil(7.5) steps, where the Trainer's own count of whole epochs is 9.
    trainer = make_trainer(tmp_path, dataset=make_dataset([1] * 10), max_steps=-1, num_train_epochs=3)
    trainer.train()
    assert trainer.ledger.steps == trainer.state.global_step == trainer.plan.steps == 8


def test_empty_draws_are_steps_of_noise_alone(tmp_path):
    trainer = make_trainer(
        tmp_path, dataset=make_dataset([1] * 1_000), privacy={"noise_multiplier": 1.0}, max_steps=3, logging_steps=3
    )
    trainer.plan = type(trainer.plan)(**{**vars(trainer.plan), "sample_rate": 1e-9})
    trainer.args.max_steps = 3
    batches, recorder = train(trainer)
    assert [batch.batch_size for batch in batches] == [0, 0, 0] and trainer.ledger.steps == 3
    for gradient in recorder.gradients:
        assert within(gradient.var().item(), (0.5 / 4) ** 2, (0.5 / 4) ** 2 * math.sqrt(2 / len(gradient)))


def test_one_seed_shares_neither_noise_nor_batches(tmp_path):
    runs = []
    for run in "ab":
        batches, recorder = train(make_trainer(tmp_path / run, dataset=make_dataset([1] * 40), max_steps=3, seed=7))
        drawn = [[samples for batch in b.microbatches for samples in as_arrays(batch)] for b in batches]
        runs.append((drawn, recorder.gradients))
    assert str(runs[0][0]) != str(runs[1][0])
    for a, b in zip(runs[0][1], runs[1][1]):
        assert abs(np.corrcoef(a, b)[0, 1]) < 0.3


def test_training_and_gradients_never_touch_the_global_generators(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=2)
    states = []

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, *args, **kwargs):
            states.append(torch.get_rng_state())

        def on_optimizer_step(self, *args, **kwargs):
            states.append(torch.get_rng_state())

    trainer.add_callback(Watch())
    trainer.train()
    assert torch.equal(states[0], states[1]) and torch.equal(states[2], states[3])


def test_the_ledger_is_ahead_of_every_update(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=3)
    seen = []
    optimizer_step = torch.optim.SGD.step

    class Watched(torch.optim.SGD):
        def step(self, *args, **kwargs):
            seen.append(PrivacyLedger(tmp_path / "privacy_ledger.jsonl").steps)
            return optimizer_step(self, *args, **kwargs)

    trainer.optimizer = Watched(trainer.model.parameters(), lr=1.0)
    trainer.train()
    assert seen == [1, 2, 3]


def test_a_ledger_that_fails_stops_the_run_before_the_update(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path)
    before = flat(trainer.model.parameters()).clone()

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(PrivacyLedger, "record_step", fail)
    with pytest.raises(OSError):
        trainer.train()
    assert torch.equal(before, flat(trainer.model.parameters()))


def test_a_step_that_was_broken_off_leaves_nothing_for_the_next(tmp_path):
    """Or its authors would count twice."""
    trainer = make_trainer(tmp_path, privacy={"noise_multiplier": 0.0})
    trainer.create_optimizer()
    for parameter in trainer.model.parameters():
        parameter.summed_grad.fill_(1e6)
    _, recorder = train(trainer)
    assert recorder.gradients[0].norm() * 4 <= 0.5 * len(COUNTS)


def test_report_and_ledger_say_what_was_done(tmp_path):
    trainer = make_trainer(
        tmp_path, dataset=make_dataset([1, 2] * 50), max_steps=5, save_strategy="steps", save_steps=2,
        per_device_train_batch_size=5, gradient_accumulation_steps=2,
        privacy={"noise_multiplier": None, "target_epsilon": 4.0, "samples_per_author": 2},
    )  # fmt: skip
    _, recorder = train(trainer)
    trainer.save_model()
    report = read_report(tmp_path)
    sigma = report["noise_multiplier"]
    assert report["epsilon"] == pytest.approx(compute_epsilon(sigma, 0.1, 5, 0.01)) and 3.9 < report["epsilon"] <= 4.0
    expected = {
        "privacy_unit": "author", "adjacency": "add-or-remove-one", "accountant": "prv", "sampling": "poisson", "delta": 0.01,
        "target_epsilon": 4.0, "clip_norm": 0.5, "sample_rate": 0.1, "expected_batch_size": 10, "steps": 5, "num_authors": 100,
        "num_samples": 150, "samples_per_author": 2, "clipping": "ghost", "world_size": 1, "disable_dp": False,
    }  # fmt: skip
    assert {key: report[key] for key in expected} == expected
    middle = read_report(tmp_path / "checkpoint-2")
    assert middle["steps"] == 2 and middle["epsilon"] < report["epsilon"]
    header, *steps = (json.loads(line) for line in (tmp_path / "privacy_ledger.jsonl").read_text().splitlines())
    assert header["noise_multiplier"] == sigma and header["sample_rate"] == 0.1 and len(steps) == 5
    epsilons = [log["epsilon"] for log in recorder.logs]
    assert epsilons == sorted(epsilons) and epsilons[-1] == pytest.approx(report["epsilon"])


def test_the_trainer_samples_as_the_ledger_says(tmp_path):
    trainer = make_trainer(tmp_path, dataset=make_dataset([1, 3] * 100), per_device_train_batch_size=10,
                           gradient_accumulation_steps=2, privacy={"samples_per_author": 2})  # fmt: skip
    sampler = trainer.get_train_dataloader().batch_sampler
    sizes = np.array([sampler.draw().batch_size for _ in range(2_000)])
    q = trainer.plan.sample_rate
    assert q == 0.1 == trainer._spending(1).sample_rate and len(sampler) == 10
    assert within(sizes.mean(), 200 * q, math.sqrt(200 * q * (1 - q) / len(sizes)))
    assert {len(samples) for _ in range(5) for samples in sampler.draw().samples} <= {1, 2}


def test_logged_loss_is_the_mean_over_authors_and_clipping_is_counted(tmp_path):
    trainer = make_trainer(
        tmp_path, per_device_train_batch_size=3, gradient_accumulation_steps=2, learning_rate=0.0,
        privacy={"noise_multiplier": 0.0, "samples_per_author": 9, "per_sample_max_grad_norm": 1e-6},
    )  # fmt: skip
    model = tiny_gpt2()
    model.train()
    expected = author_losses(model, make_batch()).mean().item()
    _, recorder = train(trainer)
    assert recorder.logs[0]["loss"] == pytest.approx(expected, rel=1e-4)
    assert recorder.logs[0]["clip_fraction"] == 1.0


def test_without_noise_epsilon_is_null_and_the_warning_loud(tmp_path, monkeypatch):
    warnings = []
    monkeypatch.setattr(dp_utils.logger, "warning", warnings.append)
    trainer = make_trainer(tmp_path, privacy={"noise_multiplier": 0.0})
    trainer.train()
    trainer.save_model()
    assert read_report(tmp_path)["epsilon"] is None and any("NO PRIVACY" in message for message in warnings)
    assert "no privacy" in guarantee_in_words(None, 1e-5)


def test_a_bound_that_is_not_the_prv_accountants_is_not_called_so(tmp_path):
    trainer = make_trainer(tmp_path, privacy={"noise_multiplier": 0.01})
    trainer.train()
    trainer.save_model()
    report = read_report(tmp_path)
    assert report["epsilon"] > 1_000 and report["accountant"] == "rdp"


def test_disable_dp_is_plain_averaging(tmp_path):
    model = tiny_gpt2()
    before = flat(model.parameters()).clone()
    trainer = make_trainer(tmp_path, model, privacy={"disable_dp": True, "noise_multiplier": None, "samples_per_author": 9},
                           per_device_train_batch_size=3, gradient_accumulation_steps=2)  # fmt: skip
    trainer.train()
    trainer.save_model()
    expected = naive.clipped_sum(tiny_gpt2(), as_arrays(make_batch()), 1e9) / 6
    assert (before - flat(model.parameters()) - expected).norm() < 1e-5 * expected.norm()
    report = read_report(tmp_path)
    assert report["disable_dp"] is True and report["epsilon"] is None and report["noise_multiplier"] is None
    assert not (tmp_path / "privacy_ledger.jsonl").exists()


def test_dropout_gives_every_author_a_mask_of_its_own(tmp_path):
    trainer = make_trainer(tmp_path, tiny_gpt2(dropout=0.3), max_steps=2)
    trainer.train()
    assert trainer.ledger.steps == 2


# --- runs that go on -----------------------------------------------------------------------------------


def resumable(folder, max_steps=6, target=3.0, **options):
    privacy = {"noise_multiplier": None, "target_epsilon": target}
    return make_trainer(folder, dataset=make_dataset([1] * 60), max_steps=max_steps, privacy=privacy,
                        save_strategy="steps", save_steps=2, **options)  # fmt: skip


def test_resuming_counts_lost_steps_stops_in_time_and_draws_afresh(tmp_path):
    first = resumable(tmp_path)

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 3  # one step after the checkpoint: it will be lost

    first.add_callback(Stop())
    _, before = train(first)
    second = resumable(tmp_path, resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert second.plan.noise_multiplier == first.plan.noise_multiplier
    _, after = train(second)
    assert second.ledger.steps == 6 and second.state.global_step == 5  # the budget was for six steps, one was lost
    assert second.epsilon() <= 3.0
    assert abs(np.corrcoef(before.gradients[2], after.gradients[0])[0, 1]) < 0.3
    with pytest.raises(UserError, match=r"--target_epsilon 3\.0 is used up"):
        resumable(tmp_path, resume_from_checkpoint=str(tmp_path / "checkpoint-2")).train()


def test_a_run_that_took_no_step_binds_nobody(tmp_path):
    """Its header may be there; a new run is calibrated and counted for itself."""
    idle = resumable(tmp_path, max_steps=60, target=1.0)
    idle._start_run()
    assert idle.ledger.steps == 0 and len(idle.ledger.runs) == 1
    fresh = make_trainer(
        tmp_path, dataset=make_dataset([1] * 50), max_steps=3, privacy={"noise_multiplier": None, "target_epsilon": 4.0}
    )
    fresh.train()
    assert fresh.ledger.steps == 3 and 3.9 < fresh.epsilon() <= 4.0


def test_other_noise_batch_clip_norm_and_samples_compose_exactly_as_they_ran(tmp_path):
    def run(steps, sigma, batch, **privacy):
        trainer = make_trainer(
            tmp_path, dataset=make_dataset([2] * 60), max_steps=steps, save_strategy="steps", save_steps=1,
            per_device_train_batch_size=batch, resume_from_checkpoint=steps > 2,
            privacy={"noise_multiplier": sigma, "per_sample_max_grad_norm": 1.0, **privacy},
        )  # fmt: skip
        trainer.train()
        return trainer

    run(2, 1.5, 6)
    run(5, 2.0, 12, samples_per_author=2)
    last = run(6, 2.0, 6, per_sample_max_grad_norm=0.1)
    expected = exact_epsilon([(1.5, 0.1, 2), (2.0, 0.2, 3), (2.0, 0.1, 1)], 1 / 60, 1e-4)
    report = last.privacy_report()
    assert expected <= report["epsilon"] * (1 + 1e-6) and report["epsilon"] == pytest.approx(expected, rel=5e-3)
    assert report["steps"] == 6 and [run["samples_per_author"] for run in last.ledger.runs] == [1, 2, 1]


def test_another_number_of_authors_needs_a_word(tmp_path):
    options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "dataset": make_dataset([1] * 60)}
    make_trainer(tmp_path, **options).train()
    options = {**options, "dataset": make_dataset([1] * 59), "max_steps": 3, "resume_from_checkpoint": True}
    with pytest.raises(UserError, match=r"59 training authors now, 60 before.*--allow_other_authors"):
        make_trainer(tmp_path, **options)
    trainer = make_trainer(tmp_path, **options, privacy={"allow_other_authors": True})
    trainer.train()
    assert trainer.ledger.steps == 3 and [run["num_authors"] for run in trainer.ledger.runs] == [60, 59]
    assert trainer.ledger.spendings == [Spending(1.0, 4 / 60, 2), Spending(1.0, 4 / 59, 1)]


def test_more_epochs_on_resume_spend_only_what_is_left(tmp_path):
    resumable(tmp_path, max_steps=6).train()
    with pytest.raises(UserError, match="used up"):
        resumable(tmp_path, max_steps=60, resume_from_checkpoint=True).train()
    more = resumable(tmp_path, max_steps=60, target=4.0, resume_from_checkpoint=True)
    more.train()
    assert 6 < more.ledger.steps < 60 and more.epsilon() <= 4.0 < more.epsilon(1)


def test_resuming_restores_optimizer_and_scheduler(tmp_path):
    """And nothing is drawn in vain: the batches before are not drawn again."""
    options = {
        "optim": "adamw_torch",
        "learning_rate": 1e-2,
        "lr_scheduler_type": "linear",
        "save_strategy": "steps",
        "save_steps": 2,
    }
    first = make_trainer(tmp_path, max_steps=4, **options)
    first.add_callback(stop := StopAt(2))
    first.train()
    moments = {name: stop.optimizer.state[p]["exp_avg"].clone() for name, p in trainable(first.model).items()}
    second = make_trainer(tmp_path, tiny_gpt2(), max_steps=4, resume_from_checkpoint=True, **options)
    second.add_callback(seen := StopAt(4))
    batches, recorder = train(second)
    assert seen.before.keys() == moments.keys() and all(torch.equal(seen.before[name], moments[name]) for name in moments)
    assert recorder.logs[0]["learning_rate"] == pytest.approx(1e-2 * (4 - 2) / 4) and len(batches) == 2


class StopAt(TrainerCallback):
    """Stop after a step, and keep Adam's first moments as they were at the start of this run."""

    def __init__(self, step: int):
        self.step, self.before, self.optimizer = step, None, None

    def on_step_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        self.optimizer = optimizer
        if self.before is None:
            states = {name: optimizer.state.get(p, {}) for name, p in trainable(model).items()}
            self.before = {name: state["exp_avg"].clone() for name, state in states.items() if "exp_avg" in state}

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


def test_a_folder_with_a_ledger_is_not_started_afresh(tmp_path):
    resumable(tmp_path, max_steps=1).train()
    with pytest.raises(UserError, match="--resume_from_checkpoint"):
        resumable(tmp_path)


def test_a_checkpoint_is_not_resumed_away_from_its_ledger(tmp_path):
    """The steps behind it would be spent, and forgotten."""
    resumable(tmp_path / "a", max_steps=2).train()
    checkpoint = str(tmp_path / "a" / "checkpoint-2")
    elsewhere = "what it has spent is not in"
    with pytest.raises(UserError, match=elsewhere):
        resumable(tmp_path / "b", resume_from_checkpoint=checkpoint)
    with pytest.raises(UserError, match=elsewhere):
        resumable(tmp_path / "b").train(resume_from_checkpoint=checkpoint)
    (tmp_path / "a" / "privacy_ledger.jsonl").unlink()
    with pytest.raises(UserError, match="lacks records"):  # the report beside it knows better
        resumable(tmp_path / "a", resume_from_checkpoint=True)
    (tmp_path / "a" / "privacy.json").unlink()
    with pytest.raises(UserError, match=elsewhere):
        resumable(tmp_path / "a", resume_from_checkpoint=True)


def test_a_checkpoint_without_privacy_is_not_resumed_with_it(tmp_path):
    plain = {"privacy": {"disable_dp": True, "noise_multiplier": None}, "save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    make_trainer(tmp_path, **plain).train()
    resumable(tmp_path, max_steps=1).train()
    with pytest.raises(UserError, match=r"checkpoint-2 was trained with --disable_dp"):
        resumable(tmp_path, resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    with pytest.raises(UserError, match="holds a private run"):
        make_trainer(tmp_path, **plain)


def test_no_step_beyond_the_budget_even_if_nobody_stops_the_loop(tmp_path):
    trainer = resumable(tmp_path)
    trainer.callback_handler.callbacks = [
        c for c in trainer.callback_handler.callbacks if not isinstance(c, dp_utils.BudgetCallback)
    ]
    trainer._start_run()
    for _ in range(6):
        trainer._record_step()
    with pytest.raises(RuntimeError, match="exceed"):
        trainer._record_step()
    assert trainer.ledger.steps == 6


def test_checkpoints_hold_no_noise_state_and_load_plainly(tmp_path):
    trainer = make_trainer(tmp_path, save_strategy="steps", save_steps=1)
    trainer.train()
    loaded = type(trainer.model).from_pretrained(tmp_path / "checkpoint-1")
    assert torch.equal(flat(loaded.parameters()), flat(trainer.model.parameters()))
    assert loaded.lm_head.weight is loaded.transformer.wte.weight
    rng = torch.load(tmp_path / "checkpoint-1" / "rng_state.pth", weights_only=False)
    assert set(rng) <= {"python", "numpy", "cpu", "cuda", "xpu", "npu", "mlu", "musa", "xla", "hpu", "neuron"}


def test_no_file_of_a_run_holds_a_secret(tmp_path, monkeypatch, capfd):
    """Every key that the operating system gave, and every noise that was added, is looked for in all files and in the log."""
    keys, noises = [], []
    randbits, token_bytes, add = secrets.randbits, secrets.token_bytes, NoiseSource.add_

    def watched_add(self, total, std):
        before = total.clone()
        add(self, total, std)
        noises.append((total - before).numpy().tobytes())
        return total

    monkeypatch.setattr(secrets, "randbits", lambda bits: keys.append(randbits(bits)) or keys[-1])
    monkeypatch.setattr(secrets, "token_bytes", lambda size: keys.append(token_bytes(size)) or keys[-1])
    monkeypatch.setattr(NoiseSource, "add_", watched_add)
    torch.manual_seed(5)
    trainer = make_trainer(tmp_path, max_steps=2, save_strategy="steps", save_steps=1, optim="adamw_torch")
    trainer.train()
    trainer.save_model()
    keys = [key if isinstance(key, int) else int.from_bytes(key, "big") for key in keys]
    assert len(keys) >= 3 and all(key.bit_length() > 90 for key in keys) and len(noises) >= 2
    needles = [noise[:16] for noise in noises]
    for key in keys:
        size = (key.bit_length() + 7) // 8
        raw = [key.to_bytes(size, order) for order in ("big", "little")]
        needles += [*raw, *(part.hex().encode() for part in raw), str(key).encode(), *(b64encode(part)[:-4] for part in raw)]
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"rng_state.pth", "optimizer.pt", "model.safetensors", "privacy_ledger.jsonl"} <= {path.name for path in files}
    contents = [path.read_bytes() for path in files] + [stream.encode() for stream in capfd.readouterr()]
    assert not [needle for needle in needles for content in contents if needle in content]
    rng = torch.load(tmp_path / "checkpoint-2" / "rng_state.pth", weights_only=False)
    assert not any(str(key) in str(rng) for key in keys)


# --- refusals -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_grad_norm": 1.0}, "--max_grad_norm.*--per_sample_max_grad_norm"),
        ({"auto_find_batch_size": True}, "--auto_find_batch_size.*--gradient_accumulation_steps"),
        ({"neftune_noise_alpha": 5.0}, "--neftune_noise_alpha"),
        ({"label_smoothing_factor": 0.1}, "--label_smoothing_factor"),
        ({"torch_compile": True}, "--torch_compile"),
        ({"use_liger_kernel": True}, "--use_liger_kernel"),
        ({"optim": "galore_adamw_layerwise", "optim_target_modules": ["c_attn"]}, "--optim"),
    ],
)
def test_options_that_would_change_the_mechanism_are_refused_by_name(tmp_path, options, words):
    with pytest.raises(UserError, match=words):
        make_trainer(tmp_path, **options)


@pytest.mark.parametrize(
    ("clipping_of_run", "options", "words"),
    [
        ("grad_sample", {}, "--(gradient|activation)_checkpointing.*--clipping ghost"),
        ("ghost", {"gradient_checkpointing_kwargs": {"use_reentrant": True}}, "use_reentrant"),
    ],
)
def test_checkpointing_is_refused_where_layers_cannot_be_told_apart(tmp_path, clipping_of_run, options, words):
    with pytest.raises(UserError, match=words):
        make_trainer(tmp_path, privacy={"clipping": clipping_of_run}, gradient_checkpointing=True, **options)


@pytest.mark.parametrize("name", ["fp16", "deepspeed", "fsdp"])
def test_options_that_need_a_gpu_are_refused_by_name(tmp_path, name):
    args = make_trainer(tmp_path).args
    setattr(args, name, True)
    with pytest.raises(UserError, match=f"--{name}"):
        guards.check_options(args, PrivacyArguments(noise_multiplier=1.0, per_sample_max_grad_norm=1.0))


def test_models_that_mix_authors_or_round_noise_are_refused(tmp_path):
    batch_norm, experts, half = tiny_gpt2(), tiny_gpt2(), tiny_gpt2().bfloat16()
    batch_norm.transformer.h[0].norm = nn.BatchNorm1d(4)
    experts.config.num_local_experts = 8
    for model, words in ((batch_norm, r"h\.0\.norm"), (experts, "mixture of experts"), (half, "bfloat16")):
        with pytest.raises(UserError, match=words):
            make_trainer(tmp_path, model)


def test_several_gpus_in_one_process_become_one(tmp_path, monkeypatch):
    from transformers import TrainingArguments

    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda self: getattr(self, "_n_gpu", 1) or 1))
    seen = []
    init = dp_utils.Trainer.__init__
    monkeypatch.setattr(
        dp_utils.Trainer, "__init__", lambda self, *a, args, **k: seen.append(args._n_gpu) or init(self, *a, args=args, **k)
    )
    args = make_trainer(tmp_path / "a").args
    args._n_gpu = 4
    dp_utils.DPTrainer(tiny_gpt2(), args, PrivacyArguments(noise_multiplier=1.0, per_sample_max_grad_norm=1.0),
                       train_dataset=make_dataset(COUNTS), data_collator=collate)  # fmt: skip
    assert seen[-1] == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "exactly one of --target_epsilon and --noise_multiplier"),
        ({"target_epsilon": 8.0, "noise_multiplier": 1.0}, "exactly one"),
        ({"target_epsilon": 0.0}, "--target_epsilon"),
        ({"target_epsilon": math.inf}, "--target_epsilon"),
        ({"target_epsilon": math.nan}, "--target_epsilon"),
        ({"noise_multiplier": -1.0}, "--noise_multiplier"),
        ({"target_epsilon": 8.0, "per_sample_max_grad_norm": None}, "--per_sample_max_grad_norm"),
        ({"target_epsilon": 8.0, "per_sample_max_grad_norm": 0.0}, "--per_sample_max_grad_norm"),
        ({"target_epsilon": 8.0, "target_delta": 1.0}, "--target_delta"),
        ({"target_epsilon": 8.0, "samples_per_author": 0}, "--samples_per_author"),
        ({"target_epsilon": 8.0, "clipping": "none"}, "--clipping"),
    ],
)
def test_privacy_options_are_checked(options, words):
    with pytest.raises(UserError, match=words):
        PrivacyArguments(**{"per_sample_max_grad_norm": 1.0, **options})


# --- several processes ----------------------------------------------------------------------------------


def run_processes(folder: Path, processes: int, **options) -> list[dict]:
    """Run tests/one_step.py under torch.distributed.run; return what each process saw and released."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes), str(ROOT / "tests/one_step.py")]
    done = subprocess.run([*command, str(folder), json.dumps(options)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(processes)]


@pytest.mark.parametrize(("kind", "engine"), [("tied", "ghost"), ("lora", "ghost"), ("tied", "grad_sample")])
def test_two_processes_release_the_naive_update_and_stay_identical(tmp_path, kind, engine):
    # Expected batch 24 of 27 authors: an empty draw has a chance of 1e-26.
    privacy = {"noise_multiplier": 0.0, "samples_per_author": 3, "clipping": engine}
    options = {"model": MODELS[kind], "counts": [1, 2, 3, 1, 4, 1, 1, 2, 2] * 3, "privacy": privacy, "per_device": 12}
    first, second = run_processes(tmp_path, 2, **options)
    authors = first["authors"] + second["authors"]
    assert abs(len(first["authors"]) - len(second["authors"])) <= 1
    assert len({str(samples) for samples in authors}) == len(authors) == first["batch_size"] == second["batch_size"]
    expected = naive.clipped_sum(tiny_gpt2(**MODELS[kind]), authors, 0.5) / 24
    assert (first["gradient"] - expected).norm() <= 1e-5 * expected.norm()
    assert torch.equal(first["gradient"], second["gradient"]) and torch.equal(first["weights"], second["weights"])
    assert first["loss"] == pytest.approx(second["loss"])
    assert first["wrapped_in"] == "Wrapper"  # and not in DistributedDataParallel, which would average
    assert read_report(tmp_path / "run")["world_size"] == 2
    assert PrivacyLedger(tmp_path / "run" / "privacy_ledger.jsonl").steps == 1


def test_two_processes_add_the_noise_of_one(tmp_path):
    # Expected batch 1 of 9: one process' share is usually empty, sometimes both are.
    options = {"model": {}, "counts": [1] * 9, "privacy": {"noise_multiplier": 3.0}, "per_device": 1}
    first, second = run_processes(tmp_path, 2, **options)
    authors = first["authors"] + second["authors"]
    total = naive.clipped_sum(tiny_gpt2(), authors, 0.5) if authors else 0.0
    noise = first["gradient"] * 2 - total  # expected batch 2 = 1 per device on two processes
    assert within(noise.var().item() / (3.0 * 0.5) ** 2, 1, math.sqrt(2 / len(noise)))
    assert torch.equal(first["gradient"], second["gradient"])


def test_two_processes_without_privacy_average_over_all(tmp_path):
    """One process often has no author."""
    options = {"model": {}, "counts": [1] * 4, "privacy": {"disable_dp": True, "noise_multiplier": None}, "per_device": 1}
    first, second = run_processes(tmp_path, 2, **options)
    authors = first["authors"] + second["authors"]
    expected = naive.clipped_sum(tiny_gpt2(), authors, 1e9) / 2 if authors else torch.zeros_like(first["gradient"])
    assert (first["gradient"] - expected).norm() <= 1e-5 * expected.norm()
    assert torch.equal(first["gradient"], second["gradient"]) and torch.equal(first["weights"], second["weights"])


def test_nothing_in_the_project_seeds_protected_randomness():
    for name in ("dp_utils.py", "mechanism.py", "accounting.py", "noise.py", "ghost_clipping.py"):
        text = (ROOT / name).read_text()
        assert not re.search(r"args\.seed|data_seed|default_rng\(|torch\.randn|np\.random\.seed", text)
    assert VOCABULARY == tiny_gpt2().config.vocab_size
