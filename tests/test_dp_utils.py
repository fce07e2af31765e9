"""dp_utils.py: whole steps and runs of the Trainer against their definition, and each silent way to break them."""

import json
import math
import secrets
from base64 import b64encode

import bugs
import numpy as np
import pytest
import reference
import torch
import transformers
from conftest import (
    COUNTS,
    MODELS,
    as_arrays,
    flat,
    make_batch,
    make_dataset,
    make_trainer,
    read_report,
    sample,
    tiny_gpt2,
    train,
    trainable,
    within,
)
from mutation import catches
from transformers import TrainerCallback

import dp_utils
from author_dp.accounting import budget
from author_dp.accounting.accountant import compute_epsilon, format_guarantee
from author_dp.mechanism.losses import author_losses
from author_dp.mechanism.noise import GaussianNoise
from data_utils import collate
from dp_utils import PrivacyArguments

# --- the Trainer ----------------------------------------------------------------------------------------


@catches("no clip by the other engine", *bugs.NO_CLIP_BY_GRAD_SAMPLE, clipping="grad_sample", kind="tied", k=1, per_device=4,
    accumulation=1)  # fmt: skip
@catches("a clip for each sample", *bugs.CLIP_PER_SAMPLE, clipping="ghost", kind="tied", k=3, per_device=64, accumulation=1)
@catches("each layer clipped by itself", "clipping.grad_sample.GradSampleClipping.backward", "1).norm(dim=1)",
    "1).amax(dim=1)", clipping="grad_sample", kind="tied", k=1, per_device=64, accumulation=1)  # fmt: skip
@catches("division by the real batch size", *bugs.DIVISION_BY_THE_REAL_BATCH_SIZE, clipping="ghost", kind="tied", k=1,
    per_device=64, accumulation=1)  # fmt: skip
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize(("per_device", "accumulation"), [(4, 1), (2, 2), (1, 3), (64, 1)])
def test_the_update_of_a_step_equals_a_reference_loop_over_authors(tmp_path, clipping, kind, k, per_device, accumulation):
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
    untrained = tiny_gpt2(**MODELS[kind])
    expected = (
        reference.clipped_sum(untrained, authors, 0.5) / (per_device * accumulation) if authors else torch.zeros_like(before)
    )
    assert torch.allclose(recorder.gradients[0], expected, atol=1e-5 * expected.norm().item(), rtol=0)
    assert (before - after - expected).norm() <= 1e-5 * expected.norm() + 1e-6
    if kind == "tied":
        assert model.lm_head.weight is model.transformer.wte.weight


@pytest.mark.integration
@catches("noise of every microbatch", *bugs.NOISE_OF_EVERY_MICROBATCH)
def test_noise_is_drawn_once_per_step_whatever_the_microbatches(tmp_path):
    counts = []
    for per_device, accumulation in ((16, 1), (1, 16)):
        trainer = make_trainer(
            tmp_path / str(accumulation), dataset=make_dataset([1] * 12), privacy={"noise_multiplier": 3.0},
            per_device_train_batch_size=per_device, gradient_accumulation_steps=accumulation,
        )  # fmt: skip
        batches, recorder = train(trainer)
        counts.append(len(batches[0].microbatches))
        authors = [samples for batch in batches[0].microbatches for samples in as_arrays(batch)]
        noise = recorder.gradients[0] * 16 - reference.clipped_sum(tiny_gpt2(), authors, 0.5)
        assert within(noise.var().item() / 1.5**2, 1, math.sqrt(2 / len(noise)))
    assert counts[0] < counts[1] == 12


@pytest.mark.integration
def test_epochs_are_as_many_steps_as_were_planned_and_accounted_for(tmp_path):
    # q = 4 / 10: 3 epochs are ceil(7.5) steps, where the Trainer's own count of whole epochs is 9.
    trainer = make_trainer(tmp_path, dataset=make_dataset([1] * 10), max_steps=-1, num_train_epochs=3)
    trainer.train()
    assert trainer.budget.ledger.steps == trainer.state.global_step == trainer.plan.steps == 8


def test_empty_draws_are_steps_of_noise_alone(tmp_path):
    trainer = make_trainer(
        tmp_path, dataset=make_dataset([1] * 1_000), privacy={"noise_multiplier": 1.0}, max_steps=3, logging_steps=3
    )
    trainer.plan = trainer.monitors.plan = type(trainer.plan)(**{**vars(trainer.plan), "sample_rate": 1e-9})
    trainer.args.max_steps = 3
    batches, recorder = train(trainer)
    assert [batch.batch_size for batch in batches] == [0, 0, 0] and trainer.budget.ledger.steps == 3
    for gradient in recorder.gradients:
        assert within(gradient.var().item(), (0.5 / 4) ** 2, (0.5 / 4) ** 2 * math.sqrt(2 / len(gradient)))


@pytest.mark.integration
@catches("the same noise in every run, and on resume", *bugs.THE_SAME_NOISE_IN_EVERY_RUN)
@catches("sampling from --seed", *bugs.SAMPLING_FROM_THE_SEED)
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


@catches("what a broken step left is used", "dp_utils.DPTrainer.training_step", "self.optimizer.zero_grad()", "pass")
def test_a_step_that_was_broken_off_leaves_nothing_for_the_next(tmp_path):
    """Or its authors would count twice."""
    trainer = make_trainer(tmp_path, privacy={"noise_multiplier": 0.0})
    trainer.create_optimizer()
    for parameter in trainer.model.parameters():
        parameter.summed_grad.fill_(1e6)
    _, recorder = train(trainer)
    assert recorder.gradients[0].norm() * 4 <= 0.5 * len(COUNTS)


@pytest.mark.integration
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


@catches("q miscounted: sampled at twice the rate", *bugs.RATE_DOUBLED)
def test_the_trainer_samples_as_the_ledger_says(tmp_path):
    trainer = make_trainer(tmp_path, dataset=make_dataset([1, 3] * 100), per_device_train_batch_size=10,
                           gradient_accumulation_steps=2, privacy={"samples_per_author": 2})  # fmt: skip
    sampler = trainer.get_train_dataloader().batch_sampler
    sizes = np.array([sampler.sample_batch().batch_size for _ in range(2_000)])
    q = trainer.plan.sample_rate
    assert q == 0.1 == trainer.plan.event(1).sample_rate and len(sampler) == 10
    assert within(sizes.mean(), 200 * q, math.sqrt(200 * q * (1 - q) / len(sizes)))
    assert {len(samples) for _ in range(5) for samples in sampler.sample_batch().samples} <= {1, 2}


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
    monkeypatch.setattr(budget.logger, "warning", warnings.append)
    trainer = make_trainer(tmp_path, privacy={"noise_multiplier": 0.0})
    trainer.train()
    trainer.save_model()
    assert read_report(tmp_path)["epsilon"] is None and any("NO PRIVACY" in message for message in warnings)
    assert "no privacy" in format_guarantee(None, 1e-5)


@pytest.mark.integration
def test_a_bound_that_is_not_the_prv_accountants_is_not_called_so(tmp_path):
    trainer = make_trainer(tmp_path, privacy={"noise_multiplier": 0.01})
    trainer.train()
    trainer.save_model()
    report = read_report(tmp_path)
    assert report["epsilon"] > 1_000 and report["accountant"] == "pld"


def test_disable_dp_is_plain_averaging(tmp_path):
    model = tiny_gpt2()
    before = flat(model.parameters()).clone()
    trainer = make_trainer(tmp_path, model, privacy={"disable_dp": True, "noise_multiplier": None, "samples_per_author": 9},
                           per_device_train_batch_size=3, gradient_accumulation_steps=2)  # fmt: skip
    trainer.train()
    trainer.save_model()
    expected = reference.clipped_sum(tiny_gpt2(), as_arrays(make_batch()), 1e9) / 6
    assert (before - flat(model.parameters()) - expected).norm() < 1e-5 * expected.norm()
    report = read_report(tmp_path)
    assert report["disable_dp"] is True and report["epsilon"] is None and report["noise_multiplier"] is None
    assert not (tmp_path / "privacy_ledger.jsonl").exists()


# --- runs that go on -----------------------------------------------------------------------------------


@pytest.mark.integration
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

    follows = "steps"

    def __init__(self, step: int):
        self.step, self.before, self.optimizer = step, None, None

    def on_step_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        self.optimizer = optimizer
        if self.before is None:
            states = {name: optimizer.state.get(p, {}) for name, p in trainable(model).items()}
            self.before = {name: state["exp_avg"].clone() for name, state in states.items() if "exp_avg" in state}

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


def test_checkpoints_load_plainly(tmp_path):
    trainer = make_trainer(tmp_path, save_strategy="steps", save_steps=1)
    trainer.train()
    loaded = type(trainer.model).from_pretrained(tmp_path / "checkpoint-1")
    assert torch.equal(flat(loaded.parameters()), flat(trainer.model.parameters()))
    assert loaded.lm_head.weight is loaded.transformer.wte.weight


@pytest.mark.integration
def test_no_file_of_a_run_holds_a_secret(tmp_path, monkeypatch, capfd):
    """Every key that the operating system gave, and every noise that was added, is looked for in all files and in the log."""
    keys, noises = [], []
    randbits, token_bytes, add = secrets.randbits, secrets.token_bytes, GaussianNoise.add_

    def watched_add(self, total, std):
        before = total.clone()
        add(self, total, std)
        noises.append((total - before).numpy().tobytes())
        return total

    monkeypatch.setattr(secrets, "randbits", lambda bits: keys.append(randbits(bits)) or keys[-1])
    monkeypatch.setattr(secrets, "token_bytes", lambda size: keys.append(token_bytes(size)) or keys[-1])
    monkeypatch.setattr(GaussianNoise, "add_", watched_add)
    torch.manual_seed(5)
    trainer = make_trainer(tmp_path, max_steps=2, save_strategy="steps", save_steps=1, optim="adamw_torch")
    trainer.train()
    trainer.save_model()
    keys = [key if isinstance(key, int) else int.from_bytes(key, "big") for key in keys]
    assert len(keys) >= 6 and all(key.bit_length() > 40 for key in keys) and len(noises) >= 2  # torch's generator: 64 bits
    needles = [noise[:16] for noise in noises]
    for key in keys:
        size = (key.bit_length() + 7) // 8
        raw = [key.to_bytes(size, order) for order in ("big", "little")]
        needles += [*raw, *(part.hex().encode() for part in raw), *(b64encode(part)[:-4] for part in raw)]
        needles += [str(key).encode()] if size < 100 else []  # python refuses to write out the state of a Mersenne Twister
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"optimizer.pt", "model.safetensors", "privacy_ledger.jsonl"} <= {path.name for path in files}
    assert not any(path.name.startswith("rng_state") for path in files)
    contents = [path.read_bytes() for path in files] + [stream.encode() for stream in capfd.readouterr()]
    assert not [needle for needle in needles for content in contents if needle in content]


def test_several_gpus_in_one_process_become_one(tmp_path, monkeypatch):
    from transformers import TrainingArguments

    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda self: getattr(self, "_n_gpu", 1) or 1))
    seen = []
    init = transformers.Trainer.__init__
    monkeypatch.setattr(
        transformers.Trainer,
        "__init__",
        lambda self, model, args, *a, **k: seen.append(args._n_gpu) or init(self, model, args, *a, **k),
    )
    args = make_trainer(tmp_path / "a").args
    args._n_gpu = 4
    dp_utils.DPTrainer(tiny_gpt2(), args, PrivacyArguments(noise_multiplier=1.0, per_sample_max_grad_norm=1.0),
                       train_dataset=make_dataset(COUNTS), data_collator=collate)  # fmt: skip
    assert seen[-1] == 1


ENDS = [(c, sigma) for c in (1e-6, 1e6) for sigma in (0.0, 1e-6, 0.3, 1e6)]
KINDS: list[dict] = [
    {"optim": "adamw_torch"}, {"optim": "sgd"}, {"optim": "adafactor"}, {"optim": "rmsprop"}, {"clipping": "grad_sample"},
    {"noise_bands": "3"}, {"secure_noise": True}, {"bf16": True}, {"per_device_train_batch_size": 2**31},
    {"sample_rate": 1e-12, "target_delta": 1e-20},
]  # fmt: skip


@pytest.mark.integration
@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize(("clip_norm", "sigma"), sample(ENDS, of=8))
def test_at_the_ends_of_the_ranges_nothing_raises_an_alarm(tmp_path, clip_norm, sigma, kind):
    """Nor are weights lost in float32's: squares of noise overflow above, and vanish below."""
    privacy = {"per_sample_max_grad_norm": clip_norm, "noise_multiplier": sigma}
    options: dict = {"learning_rate": 1e-3, "max_steps": 4, "logging_steps": 2, "dataset": make_dataset([1] * 40)}
    for name, value in kind.items():
        (privacy if hasattr(PrivacyArguments, name) else options)[name] = value
    trainer = make_trainer(tmp_path, privacy=privacy, **options)
    before = flat(trainer.model.parameters()).clone()
    trainer.train()
    after = flat(trainer.model.parameters())
    assert after.isfinite().all() and trainer.budget.ledger.steps == 4
    assert sigma == 0 or kind.get("optim") == "sgd" or not torch.equal(before, after)
