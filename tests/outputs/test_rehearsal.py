"""outputs/rehearsal.py, training/rescue.py: what would fail after the last step fails before the first; rescued weights."""

import errno
import json
import shutil
import stat
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import flat, make_dataset, make_trainer, tiny_gpt2, trainable
from mutation import catches
from peft import LoraConfig, get_peft_model
from script_runs import PRIVACY, run_here, small
from transformers import AutoModelForCausalLM, GPT2LMHeadModel

from author_dp.accounting.ledger import PrivacyLedger
from author_dp.accounting.output_dir import TRIAL_PREFIX, check_output_dir
from author_dp.errors import UserError, to_user_error
from author_dp.models.weights import check_weights
from author_dp.outputs import rehearsal, report
from author_dp.training.rescue import check_rescued

ADAPTER = {"task_type": "CAUSAL_LM", "r": 2, "fan_in_fan_out": True, "target_modules": ["c_attn"]}


def saved_base(folder: Path):
    tiny_gpt2().save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder)


def refused(trainer, words: str) -> None:
    """The training must end with `words`, with no step taken and nothing left of a trial."""
    with pytest.raises(UserError, match=words):
        trainer.train()
    assert trainer.budget.ledger.steps == PrivacyLedger(trainer.folder / "privacy_ledger.jsonl").steps == 0
    assert not list(trainer.folder.glob(f"{TRIAL_PREFIX}*")) and not list(trainer.folder.glob("*.safetensors"))


# --- before the first step --------------------------------------------------------------------------------


def test_rehearse_refuses_a_generation_config_that_cannot_be_saved(tmp_path):
    model = tiny_gpt2()
    model.generation_config.temperature = 0.5  # without do_sample, as in many folders
    refused(make_trainer(tmp_path / "out", model, rehearsal=True), "generation_config.json")


def test_rehearse_refuses_a_model_or_tokenizer_whose_code_cannot_save(tmp_path):
    def fail(*_, **__):
        raise NotImplementedError("no such tensor")

    model = tiny_gpt2()
    model.save_pretrained = fail
    refused(make_trainer(tmp_path / "out", model, rehearsal=True), r"^--model_name: .*could not be saved \(no such tensor\)")


@pytest.mark.parametrize("free", ["model", "checkpoint"])
def test_rehearse_compares_the_room_with_result_and_checkpoint(tmp_path, monkeypatch, free):
    trainer = make_trainer(
        tmp_path / "out", rehearsal=True, save_strategy="steps", save_steps=1, max_steps=3, optim="adamw_torch"
    )
    size = 4 * sum(parameter.numel() for parameter in trainer.model.parameters())
    room = {"model": size - 1, "checkpoint": size + 4 * size - 1 - size}[free]  # the result, and weights and moments
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=room))
    refused(trainer, r"^--output_dir .*GiB are free, and the result and a checkpoint need .*Make room")


def test_rehearse_warns_where_not_all_checkpoints_fit(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path / "out", rehearsal=True, save_strategy="steps", save_steps=1, max_steps=30)
    size, said = 4 * sum(parameter.numel() for parameter in trainer.model.parameters()), []
    monkeypatch.setattr(rehearsal.logger, "warning", said.append)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=5 * size))
    trainer.rehearse()
    assert len(said) == 1 and "--save_total_limit" in said[0]


def test_rehearse_refuses_a_folder_in_the_place_of_a_file(tmp_path):
    (tmp_path / "model.safetensors").mkdir()
    refused_here = make_trainer(tmp_path, rehearsal=True)
    with pytest.raises(UserError, match=r"model\.safetensors is a folder"):
        refused_here.train()
    assert refused_here.budget.ledger.steps == 0


def test_rehearse_refuses_an_unknown_metric(tmp_path):
    options = {"eval_dataset": make_dataset([1, 2]), "eval_strategy": "steps", "eval_steps": 1}
    held_out = options["eval_dataset"]
    held_out.hashes = ~held_out.hashes
    refused(
        make_trainer(tmp_path / "out", rehearsal=True, metric_for_best_model="accuracy", **options),
        "^--metric_for_best_model accuracy: no such metric. Give one of author_loss, loss, perplexity",
    )
    make_trainer(tmp_path / "other", rehearsal=True, metric_for_best_model="eval_author_loss", **options).train()


def test_rehearse_refuses_an_evaluation_that_needs_too_much_memory(tmp_path, monkeypatch):
    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(rehearsal, "evaluate", fail)
    trainer = make_trainer(tmp_path / "out", rehearsal=True, eval_dataset=make_dataset([1, 2]), per_device_eval_batch_size=7)
    refused(trainer, "^--per_device_eval_batch_size 7: not enough memory")


@pytest.mark.parametrize("adapter", [False, True])
def test_rehearse_leaves_weights_generators_and_folder_as_they_were(tmp_path, adapter):
    model = saved_base(tmp_path / "base")
    model = get_peft_model(model, LoraConfig(**ADAPTER, use_dora=True)) if adapter else model
    trainer = make_trainer(tmp_path / "out", model, rehearsal=True, eval_dataset=make_dataset([1, 2]))
    (tmp_path / "out" / f"{TRIAL_PREFIX}killed" / "model").mkdir(parents=True)  # by a run that was killed
    model.train()
    weights, state = flat(model.parameters()).clone(), torch.get_rng_state()
    trainer.rehearse()
    assert torch.equal(flat(model.parameters()), weights) and torch.equal(torch.get_rng_state(), state)
    assert model.training and not list((tmp_path / "out").iterdir())
    assert trainer.loader == (rehearsal.PEFT_LOADER if adapter else rehearsal.PLAIN_LOADER)


def test_a_large_model_is_neither_saved_nor_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(rehearsal, "LARGE", 100)
    monkeypatch.setattr(GPT2LMHeadModel, "save_pretrained", None)
    make_trainer(tmp_path / "out", rehearsal=True).rehearse()


def test_rehearse_refuses_a_result_that_no_class_loads_as_it_is(tmp_path):
    model = tiny_gpt2()
    model.transformer.ln_f.eps = 10.0  # which no file holds
    refused(make_trainer(tmp_path / "out", model, rehearsal=True), "would not load as it was trained")


def make_blocked(folder: Path, how: str) -> Path:
    """Return an output directory that cannot be used, in `folder`."""
    out, elsewhere = folder / "out", folder / "file"
    elsewhere.write_text("mine")
    if how == "a file":
        return elsewhere
    if how == "below a file":
        return elsewhere / "out"
    if how == "a link to nothing":
        out.symlink_to(folder / "nothing")
        return out
    out.mkdir()
    name, is_folder = {"report": ("report", False), "logs": ("_logs", False), "card": ("README.md", True),
                       "page": ("report.html", True), "numbers": ("_private_statistics.json", True)}[how]  # fmt: skip
    (out / name).mkdir() if is_folder else (out / name).write_text("mine")
    return out


@pytest.mark.parametrize(
    "how", ["a file", "below a file", "a link to nothing", "report", "logs", "card", "page", "numbers"]
)  # fmt: skip
def test_check_output_dir_refuses_what_cannot_be_written(tmp_path, how):
    with pytest.raises(UserError, match=r"^--output_dir"):
        check_output_dir(make_blocked(tmp_path, how))


def test_check_output_dir_asks_the_file_system_itself(tmp_path, monkeypatch):
    """Permissions alone say nothing of a read-only file system, or of the superuser's limits."""

    def fail(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    check_output_dir(tmp_path / "out")
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr("author_dp.accounting.output_dir.tempfile.TemporaryFile", fail)
    with pytest.raises(UserError, match=r"^--output_dir .*cannot be written \(Read-only file system\)"):
        check_output_dir(tmp_path / "out")


def test_check_output_dir_accepts_new_and_used_folders(tmp_path):
    check_output_dir(tmp_path / "a" / "b")
    for name in ("report", "_logs", "checkpoint-3"):
        (tmp_path / name).mkdir()
    (tmp_path / "README.md").write_text("a card")
    check_output_dir(tmp_path)


def test_full_temporary_folder_is_blamed_by_its_own_name(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    inside = str(tmp_path / "author-texts-1a" / "train.arrow")
    message = str(to_user_error(OSError(28, "No space left on device", inside)))
    assert message.startswith(f"TMPDIR: the temporary folder {tmp_path} cannot be written (No space")
    assert str(to_user_error(OSError(28, "No space left on device"))).startswith("--output_dir")
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=0))
    assert str(to_user_error(OSError(28, "No space left on device"))).startswith("TMPDIR")
    assert "TMPDIR" in str(to_user_error(FileNotFoundError(2, "No usable temporary directory found in ['/tmp']")))


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory."), MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")],
)
def test_too_little_memory_is_the_batchs(error):
    assert "--gradient_accumulation_steps" in str(to_user_error(error))


# --- after the last step ----------------------------------------------------------------------------------


def break_saving(monkeypatch, folder: Path) -> list[bool]:
    """Let no weights be written to `folder`; return a list that notes if others are written beside a certificate."""
    save, certified = GPT2LMHeadModel.save_pretrained, list[bool]()

    def save_pretrained(self, place, **options):
        if Path(place).resolve() == folder.resolve():
            raise OSError(28, "No space left on device")
        certified.append(json.loads((Path(place) / "privacy.json").read_text())["epsilon"] is not None)
        return save(self, place, **options)

    monkeypatch.setattr(GPT2LMHeadModel, "save_pretrained", save_pretrained)
    return certified


@catches("rescued weights under a certificate that names none", "training.rescue.rescue_weights", "trainer.plan.disable_dp)",
    "True)")  # fmt: skip
def test_weights_that_cannot_be_saved_are_saved_beside(tmp_path, monkeypatch):
    out = tmp_path / "out"
    trainer = make_trainer(out, max_steps=2)
    trainer.train()
    certified = break_saving(monkeypatch, out)
    with pytest.raises(UserError, match=r"^--output_dir cannot be written .*The weights of this step are in .*out-rescued-"):
        trainer.save_model()
    (rescued,) = tmp_path.glob("out-rescued-*")
    assert stat.S_IMODE(rescued.stat().st_mode) == 0o700 and not (out / "privacy.json").exists()
    certificate = json.loads((rescued / "privacy.json").read_text())
    check_weights(rescued, certificate)
    assert certified == [False]  # it is written last
    assert certificate["epsilon"] == trainer.epsilon() and certificate["steps"] == 2
    assert torch.equal(flat(AutoModelForCausalLM.from_pretrained(rescued).parameters()), flat(trainer.model.parameters()))


def test_weights_are_rescued_from_a_generation_config_and_from_a_checkpoint(tmp_path):
    """A generation configuration that became invalid during training, say by a callback."""
    trainer = make_trainer(tmp_path / "out", max_steps=2, save_strategy="steps", save_steps=2)
    trainer.model.generation_config.temperature = 0.5
    with pytest.raises(UserError, match=r"could not be saved .*The weights of this step are in"):
        trainer.train()
    (rescued,) = tmp_path.glob("out-rescued-*")
    check_weights(rescued, json.loads((rescued / "privacy.json").read_text()))
    assert trainer.model.generation_config.temperature == 0.5 and trainer.budget.ledger.steps == 2


def test_weights_that_fit_nowhere_leave_no_folder(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path / "out", max_steps=1)
    trainer.train()

    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(GPT2LMHeadModel, "save_pretrained", fail)
    with pytest.raises(UserError, match=r"^--output_dir cannot be written"):
        trainer.save_model()
    assert not list(tmp_path.glob("*rescued*"))


@pytest.mark.parametrize("adapter", [False, True])
def test_check_saved_notices_other_and_missing_weights(tmp_path, adapter):
    model = tiny_gpt2()
    model = get_peft_model(model, LoraConfig(**ADAPTER, use_dora=True, modules_to_save=["ln_f"])) if adapter else model
    model.save_pretrained(tmp_path)
    check_rescued(tmp_path, model)
    parameter = list(trainable(model).values())[-1]
    with torch.no_grad():
        parameter.view(-1)[-1] += 1
    with pytest.raises(UserError, match="is not what is in memory"):
        check_rescued(tmp_path, model)
    with torch.no_grad():
        parameter.view(-1)[-1] -= 1
    model.register_parameter("extra", torch.nn.Parameter(torch.zeros(1)))
    with pytest.raises(UserError, match="extra was trained, and is not among the saved weights"):
        check_rescued(tmp_path, model)


def test_a_report_that_fails_says_that_the_model_is_saved(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path / "out", max_steps=1)
    trainer.add_callback(statistics := report.RunStatistics(trainer.norms, [1]))
    trainer.train()
    trainer.save_model()
    monkeypatch.setattr(report, "write_report", lambda _: (tmp_path / "out" / "README.md").mkdir())
    with pytest.raises(UserError, match=r"the model saved, but its report cannot be written .*python -m author_dp\.report"):
        report.report_result(trainer, statistics)
    assert (tmp_path / "out" / "privacy.json").exists()


@pytest.mark.integration
def test_the_program_takes_no_step_where_its_end_would_fail(checkpoint, comments, tmp_path, monkeypatch, capfd):
    model = tmp_path / "model"
    shutil.copytree(checkpoint, model)
    (model / "generation_config.json").write_text('{"temperature": 0.7}')
    for name, out in (("model", tmp_path / "out"), ("checkpoint", make_blocked(tmp_path, "report"))):
        arguments = small(str(model) if name == "model" else checkpoint, comments, out, *PRIVACY)
        status, stderr = run_here(monkeypatch, capfd, *arguments)
        assert status == 2 and "Traceback" not in stderr, stderr
        assert PrivacyLedger(out / "privacy_ledger.jsonl").steps == 0
