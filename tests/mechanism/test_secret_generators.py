"""Test that no random number inside the model follows from --seed, and what an attacker who knows it can do."""

import random
import secrets
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import flat, make_dataset, make_trainer, tiny_gpt2, train, trainable
from forked_runs import in_processes
from mutation import catches
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader, Dataset
from transformers import TrainerCallback, set_seed

from author_dp.accounting.ledger import PrivacyLedger
from author_dp.errors import MechanismError
from author_dp.mechanism.secret_generators import SecretGenerators, default_generators, randomize, sample_generators

CLIP_NORM, AUTHORS = 0.5, 40
KINDS = {
    "ghost": {},
    "grad_sample": {"privacy": {"clipping": "grad_sample"}},
    "two passes": {"activation_checkpointing": True},
    "LoRA": {},
    "full determinism": {"full_determinism": True},
}


def released_sum(folder, kind: str = "ghost", dropout: float = 0.1, authors: int = AUTHORS, **options) -> torch.Tensor:
    """Run the Trainer for a step of all authors without noise, always by the same seeds; return the clipped sum over C."""
    model = tiny_gpt2(dropout=dropout)
    if kind == "LoRA":
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, lora_dropout=dropout, fan_in_fan_out=True))
    privacy = {"noise_multiplier": 0.0, "per_sample_max_grad_norm": CLIP_NORM, **KINDS[kind].get("privacy", {})}
    options = {"per_device_train_batch_size": AUTHORS, "seed": 7, **KINDS[kind], **options, "privacy": privacy}
    trainer = make_trainer(folder, model, make_dataset([1] * authors), **options)
    set_seed(7)
    _, recorder = train(trainer)
    return recorder.gradients[-1] * (AUTHORS / CLIP_NORM)


@pytest.mark.integration
@catches("dropout masks from --seed", "mechanism.secret_generators.set_up_secret_generators", "return SecretGenerators(",
    "return nullcontext(__import__('types').SimpleNamespace(check=lambda: None)) or SecretGenerators(", kind="ghost")  # fmt: skip
@catches("masks from a public state", "mechanism.secret_generators.randomize", "generator.set_state(state)",
    "generator.manual_seed(7)", kind="ghost")  # fmt: skip
@pytest.mark.parametrize("kind", KINDS)
def test_train_draws_masks_that_do_not_follow_the_seed(tmp_path, kind):
    one, other = (released_sum(tmp_path / run, kind) for run in "ab")
    assert (one - other).norm() > 1.0
    if kind == "ghost":  # all else does follow from the seeds
        one, other = (released_sum(tmp_path / run, kind, dropout=0.0) for run in "cd")
        assert (one - other).norm() < 1e-4


@pytest.mark.integration
def test_train_attacker_who_knows_the_seed_sees_an_author_move_the_sum_by_the_clip_norm_at_most(tmp_path):
    """The attacker runs the program on both neighboring data sets, and projects what is released onto the difference."""
    runs = {n: [released_sum(tmp_path / f"{n}-{run}", authors=n) for run in range(9)] for n in (AUTHORS, AUTHORS - 1)}
    (with_author, *seen_with), (without, *seen_without) = runs.values()
    direction = (with_author - without) / (with_author - without).norm()
    seen = [torch.stack([(total - without) @ direction for total in totals]) for totals in (seen_with, seen_without)]
    error = sum(float(values.var()) / len(values) for values in seen) ** 0.5
    assert float((with_author - without).norm()) > 1.4  # what the same masks would give away
    assert abs(float(seen[0].mean() - seen[1].mean())) < 1.0 + 6 * error


@pytest.mark.integration
@catches("the states of masks saved", "training.saving.CertifiedTrainer._save_rng_state", "if self.generators is None:",
    "if True:")  # fmt: skip
def test_train_resumed_twice_from_one_checkpoint_draws_other_masks(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 1, "learning_rate": 0.0}
    first = released_sum(tmp_path / "a", **options)
    assert not list((tmp_path / "a").rglob("rng_state*"))
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    resumed = [released_sum(tmp_path / run, max_steps=2, resume_from_checkpoint=True, **options) for run in "ab"]
    for one, other in ((resumed[0], resumed[1]), (first, resumed[0])):
        assert (one - other).norm() > 1.0


@catches("somebody seeds the masks' generator", "mechanism.secret_generators.SecretGenerators.check", "if [", "if False and [")
def test_train_ends_where_a_callback_seeds_the_generators(tmp_path):
    class Seed(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 1:
                set_seed(7)

    trainer = make_trainer(tmp_path, tiny_gpt2(dropout=0.1), max_steps=3)
    trainer.add_callback(Seed())
    with pytest.raises(MechanismError, match="seeded during training"):
        trainer.train()
    assert trainer.budget.ledger.steps == 1


def train_where_one_process_is_seeded(folder: Path) -> str:
    class Seed(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 1 and args.process_index == 1:
                set_seed(7)

    trainer = make_trainer(folder, tiny_gpt2(dropout=0.1), max_steps=4, per_device_train_batch_size=2, logging_steps=2)
    trainer.add_callback(Seed())
    try:
        trainer.train()
    except MechanismError as error:
        return str(error)
    return ""


@pytest.mark.integration
def test_a_failure_of_one_process_ends_all_and_is_recorded(tmp_path):
    """Otherwise the main process would only know that another one has ended, and leave its reports as they are."""
    try:
        found = in_processes(tmp_path, 2, train_where_one_process_is_seeded, tmp_path / "run")
    except (RuntimeError, OSError) as error:  # one failed, or one had to be killed
        pytest.fail(str(error))
    assert all("seeded during training" in message for message in found)
    ledger = PrivacyLedger(tmp_path / "run" / "privacy_ledger.jsonl")
    assert ledger.steps == 2 and "seeded" in ledger.failure


def test_train_without_privacy_follows_the_seed_and_saves_the_states(tmp_path):
    weights = []
    for run in "ab":
        model = tiny_gpt2(dropout=0.1)
        options = {"per_device_train_batch_size": 64, "save_strategy": "steps", "save_steps": 1, "seed": 7}
        privacy = {"noise_multiplier": None, "disable_dp": True}
        trainer = make_trainer(tmp_path / run, model, make_dataset([1] * 6), privacy=privacy, **options)
        trainer.train()
        weights.append(flat(trainable(model).values()))
    assert torch.equal(*weights) and (tmp_path / "a" / "checkpoint-1" / "rng_state.pth").exists()


def states() -> list[str]:
    return [str(torch.get_rng_state().tolist()), str(random.getstate()), str(np.random.get_state()[1].tolist())]


def test_secret_generators_leave_the_global_ones_as_they_were(tmp_path):
    before = states()
    with SecretGenerators([]):
        inside = states()
        torch.rand(3), random.random(), np.random.random(3)
    assert states() == before and not set(inside) & set(before)


@catches("masks from 32 bits", "mechanism.secret_generators.randomize", "generator.set_state(state)",
    "generator.manual_seed(secrets.randbits(32))")  # fmt: skip
def test_secret_generators_fill_the_whole_state(monkeypatch):
    """`manual_seed` keeps 32 bits: the words of the state would follow from its first one."""
    (generator,) = default_generators([])
    with SecretGenerators([]):
        words = generator.get_state()[24 : 24 + 8 * 624].view(torch.int64)
        follows = torch.Generator().manual_seed(int(words[0])).get_state()[24 : 24 + 8 * 624].view(torch.int64)
        assert int(words.min()) >= 0 and int(words.max()) < 2**32 and (words != follows).sum() > 600
        assert abs(torch.rand(100_000).mean() - 0.5) < 6 * 0.29 / 100_000**0.5


class Seeds(Dataset):
    def __len__(self):
        return 1

    def __getitem__(self, index):
        return torch.initial_seed()


def test_data_loader_workers_have_secret_seeds():
    seeds = set()
    for _ in range(2):
        torch.manual_seed(0)
        with SecretGenerators([]):
            seeds |= {int(seed) for seed in DataLoader(Seeds(), num_workers=1)}
    assert len(seeds) == 2


def first_numbers() -> torch.Tensor:
    torch.manual_seed(0)
    return sample_generators([], 4)


@catches("the same masks on every process", "mechanism.secret_generators.randomize", "secrets.token_bytes(4 * TWISTER_WORDS)",
    "bytes(4 * TWISTER_WORDS - 1) + b'1'")  # fmt: skip
def test_sample_generators_differ_between_processes(tmp_path):
    one, other = in_processes(tmp_path, 2, first_numbers)
    assert len(one) == 12 and not (one == other).any()


class OnDevice:
    """A device's generator, as far as it is used."""

    def __init__(self):
        self.device, self.seed = torch.device("cuda", 0), 0

    def manual_seed(self, seed):
        self.seed = seed

    def initial_seed(self):
        return self.seed


@catches("masks of a device not secret", "mechanism.secret_generators.default_generators", 'device.type != "cpu"', "False")
def test_default_generators_are_those_of_the_cpu_and_each_device(monkeypatch):
    module = type("Module", (), {"default_generators": [OnDevice(), OnDevice()], "current_device": staticmethod(lambda: 1)})
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    devices = [torch.device("cuda"), torch.device("cuda", 0), torch.device("cpu")]
    assert default_generators(devices) == [torch.default_generator, *reversed(module.default_generators)]


@catches("a device's masks from a public key", "mechanism.secret_generators.randomize", "secrets.randbits(64)", "0")
def test_randomize_gives_a_device_a_secret_key_of_64_bits():
    one, other = OnDevice(), OnDevice()
    randomize(one), randomize(other)
    assert one.seed != other.seed and max(one.seed, other.seed) > 2**48


@catches("one generator looked at", "mechanism.secret_generators.SecretGenerators.check",
    "for generator in self.generators] != self._seeds", "for generator in self.generators[:1]] != self._seeds[:1]")  # fmt: skip
def test_check_looks_at_every_generator():
    with SecretGenerators([]) as secret:
        secret.generators.append(OnDevice())
        secret._seeds.append(0)
        secret.check()
        secret.generators[-1].manual_seed(1)
        with pytest.raises(MechanismError):
            secret.check()
        secret.generators.pop()


@catches("Python's random from 32 bits", "mechanism.secret_generators.SecretGenerators.__enter__",
    "random.seed(secrets.token_bytes(4 * TWISTER_WORDS))", "random.seed(secrets.randbits(32))")  # fmt: skip
def test_secret_generators_take_whole_states_from_the_system(monkeypatch):
    sizes, token_bytes = [], secrets.token_bytes
    monkeypatch.setattr(secrets, "token_bytes", lambda size: sizes.append(size) or token_bytes(size))
    with SecretGenerators([]):
        assert sizes == [4 * 624] * 3  # Python's, NumPy's, torch's


@catches("the same masks in every step", "dp_utils.DPTrainer.training_step", "model.train()",
    "model.train(); self._state = getattr(self, '_state', torch.get_rng_state()); torch.set_rng_state(self._state)")  # fmt: skip
def test_train_draws_other_masks_in_every_step(tmp_path):
    model = tiny_gpt2(dropout=0.1)
    options = {"per_device_train_batch_size": AUTHORS, "max_steps": 2, "learning_rate": 0.0, "privacy": {"noise_multiplier": 0.0}}
    _, recorder = train(make_trainer(tmp_path, model, make_dataset([1] * AUTHORS), **options))
    first, second = (gradient * (AUTHORS / CLIP_NORM) for gradient in recorder.gradients)
    assert (first - second).norm() > 1.0
