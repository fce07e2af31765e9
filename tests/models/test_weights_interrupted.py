"""weights.py: nothing false is certified wherever a run or a save is cut."""

import json
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_dataset, make_trainer, read_report, resumable, sample, tiny_gpt2
from mutation import catches
from peft import PeftModel
from test_weights import PLAIN, STEPS, is_certified, make_model, run

from author_dp.accounting import privacy_report
from author_dp.accounting.ledger_report import main
from author_dp.errors import UserError
from author_dp.models.weights import check_base_weights, check_weights, describe_base_weights, hash_weights, weight_files
from author_dp.outputs import privacy_statement as sidecar
from author_dp.outputs import report
from author_dp.training.checkpointing import latest_complete_checkpoint, remove_checkpoint

# --- interruptions ----------------------------------------------------------------------------------------


class Interrupt:
    """Stop the process, or raise, when it opens, renames or removes its n-th file of a folder."""

    def __init__(self):
        self.folder, self.left, self.act = "", 0, lambda: None
        sys.addaudithook(self.hook)

    def hook(self, event: str, arguments: tuple) -> None:
        if not self.folder or event not in ("open", "os.remove", "os.rename", "os.mkdir", "os.rmdir"):
            return
        changes = event != "open" or (arguments[1] or "r") != "r" or arguments[2] & (os.O_WRONLY | os.O_RDWR)
        by_descriptor = event in ("os.remove", "os.rmdir") and arguments[1] != -1  # shutil.rmtree gives names in a folder
        if not changes or not (by_descriptor or str(arguments[0]).startswith(self.folder)):
            return
        self.left -= 1
        if self.left == 0:
            self.act()

    def arm(self, folder: Path, number: int, act) -> None:
        self.folder, self.left, self.act = str(folder), number, act


INTERRUPT = Interrupt()


def fail(error: BaseException):
    def act():
        raise error

    return act


def in_a_child(work) -> int:
    """Run `work` in a forked process; return the signal that ended it, 0 where it went through."""
    if (child := os.fork()) == 0:
        try:
            work()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


ENDS = {"killed": None, "Ctrl-C": KeyboardInterrupt(), "disk full": OSError(28, "No space left on device")}


@pytest.mark.integration
@catches("privacy.json written before the weights", "models.weights.write_hashed_weights", "    yield\n",
    "    write_json(folder / REPORT_NAME, {**make_report(), 'weights': hash_weights(folder)})\n    yield\n", how="Ctrl-C",
    what="model")  # fmt: skip
@catches("privacy.json of before left while weights are written", "models.weights.write_hashed_weights",
    "remove_weights_report(folder)",
    "pass", how="killed", what="model")  # fmt: skip
@pytest.mark.parametrize(("how", "what"), sample([(how, what) for what in ("model", "checkpoint") for how in ENDS]))
def test_wherever_a_save_is_cut_nothing_false_is_certified(tmp_path, how, what):
    """Into a folder with certified weights of before: those of an earlier end, or of a lost step of the same number."""
    out, kept = tmp_path / "out", tmp_path / "kept"
    trainer = resumable(out, max_steps=2)
    trainer.train()
    trainer.save_model()
    place = out if what == "model" else out / "checkpoint-2"
    shutil.copytree(out, kept)
    save = trainer.save_model if what == "model" else lambda: trainer._save_checkpoint(trainer.model, None)
    outcomes, number = set(), 0
    while True:
        number += 1
        shutil.rmtree(out)
        shutil.copytree(kept, out)
        with torch.no_grad():
            trainer.model.transformer.wte.weight.add_(0.01)
        trainer.weight_sums = None  # as if it had taken another step
        act = (lambda: os.kill(os.getpid(), signal.SIGKILL)) if ENDS[how] is None else fail(ENDS[how])
        INTERRUPT.arm(out, number, act)
        try:
            if ENDS[how] is None:
                ended = in_a_child(save) == 0
            else:
                save()
                ended = True
        except (KeyboardInterrupt, OSError, UserError):
            ended = False
        left, INTERRUPT.folder = INTERRUPT.left, ""
        outcomes.add((is_certified(place), (place / "model.safetensors").exists()))
        is_certified(out)
        assert latest_complete_checkpoint(out) is not None or what == "checkpoint"
        resumable(out, max_steps=2, target=30.0, resume_from_checkpoint=True)  # nothing of it is in the way of going on
        if ended and (ENDS[how] is None or left > 0):
            break
    assert number > 5 and is_certified(place)
    assert outcomes == {(True, True), (False, True), (False, False)}


@pytest.mark.integration
@catches("the folder's privacy.json written with each checkpoint", "training.saving.CertifiedTrainer._save",
    "with write_hashed_weights(",
    "with write_hashed_weights(self.folder, adapter, self.privacy_report), write_hashed_weights(")  # fmt: skip
def test_an_interrupted_run_has_certified_checkpoints_and_none_of_its_own(tmp_path):
    resumable(tmp_path, max_steps=4).train()
    assert not (tmp_path / "privacy.json").exists() and all(is_certified(tmp_path / f"checkpoint-{n}") for n in (2, 4))
    main([str(tmp_path)])
    report.main([str(tmp_path)])
    page = (tmp_path / "report.html").read_text()
    assert "nothing yet" in page and "<td>4</td>" in page and "covered by the guarantee" not in page
    assert sidecar.read_privacy_statement(tmp_path) is None


def test_a_report_of_the_ledger_tells_what_it_spent(tmp_path):
    trainer = resumable(tmp_path, max_steps=4)
    trainer.train()
    found = privacy_report.recompute_privacy_report(tmp_path / "privacy.json", trainer.budget.ledger)
    assert found["epsilon"] == pytest.approx(trainer.epsilon(), rel=3e-3) and found["interrupted"] and found["steps"] == 4
    assert found["num_authors"] == 60 and "weights" not in found


@pytest.mark.integration
@catches(
    "a ledger rolled back behind its checkpoints", "accounting.ledger_report.main", "in find_ledger_reports(folder)", "in []"
)
def test_checkpoints_know_of_records_that_a_ledger_has_lost(tmp_path):
    resumable(tmp_path, max_steps=4).train()
    path = tmp_path / "privacy_ledger.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    for program in (main, report.main):
        with pytest.raises(UserError, match=r"lacks records that \S*checkpoint-4/privacy.json"):
            program([str(tmp_path)])
            pytest.fail("not noticed")
    with pytest.raises(UserError, match="lacks records"):
        resumable(tmp_path, resume_from_checkpoint=True)
        pytest.fail("not noticed")
    with pytest.raises(UserError, match="lacks records"):
        resumable(tmp_path, resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
        pytest.fail("not noticed")


@pytest.mark.integration
def test_a_run_without_a_whole_checkpoint_starts_anew_and_certifies_its_own_end(tmp_path):
    options = {"dataset": make_dataset([1] * 60), "max_steps": 2}
    first = make_trainer(tmp_path, **options)
    first.train()
    first.save_model()
    before = hash_weights(tmp_path)
    again = make_trainer(tmp_path, resume_from_checkpoint=True, **options)
    again.train()
    assert hash_weights(tmp_path) == before and is_certified(tmp_path)  # those of the first end, until there are others
    again.save_model()
    assert hash_weights(tmp_path) != before and is_certified(tmp_path) and read_report(tmp_path)["steps"] == 4


def test_a_model_in_memory_has_an_adapter_without_a_base(tmp_path):
    trainer = make_trainer(tmp_path, tiny_gpt2(lora=True))
    trainer.save_model()
    assert is_certified(tmp_path) and read_report(tmp_path)["adapter_base"]["name"] is None
    assert isinstance(trainer.model, PeftModel)


# --- what lies in subfolders, and what has no guarantee ---------------------------------------------------------


@pytest.mark.integration
@catches("an adapter in a folder named like a checkpoint", "models.weights.weight_files",
    "in_checkpoint or not has_checkpoint_name(path.parent)", 'not path.parent.name.startswith("checkpoint-")',
    place="checkpoint-x")  # fmt: skip
@catches("an adapter in a checkpoint's checkpoint", "models.weights.weight_files", "in_checkpoint or not", "not",
    place="checkpoint-2/checkpoint-3")  # fmt: skip
@pytest.mark.parametrize("place", ["checkpoint-x", "checkpoint-2/checkpoint-x", "checkpoint-2/checkpoint-3"])
def test_an_adapter_in_a_subfolder_that_is_no_checkpoint_is_found(tmp_path, place):
    run(tmp_path, lora=True)
    out = tmp_path / "out"
    shutil.copytree(out / "checkpoint-2", tmp_path / "copy")  # a copy of another name is one too, by its seal
    make_model(tmp_path, lora=True, seed=5).save_pretrained(out / place)
    with pytest.raises(UserError, match=r"checkpoint-[x3]/adapter_config\.json"):
        check_weights((out / place).parent, read_report((out / place).parent))
        pytest.fail("not noticed")
    if place.startswith("checkpoint-2/"):
        with pytest.raises(UserError, match=r"checkpoint-[x3]/adapter_config\.json"):
            make_trainer(out, make_model(tmp_path, lora=True), resume_from_checkpoint=True, max_steps=3)
            pytest.fail("resumed")
    make_model(tmp_path, lora=True, seed=5).save_pretrained(tmp_path / "copy" / "checkpoint-3")
    assert "checkpoint-3/adapter_model.safetensors" in hash_weights(tmp_path / "copy")


def test_an_output_folder_is_not_called_like_a_checkpoint(tmp_path):
    with pytest.raises(UserError, match=r"--output_dir .*checkpoint-3: this is the name of a checkpoint"):
        make_trainer(tmp_path / "checkpoint-3")


@pytest.mark.integration
@catches("weights without privacy that pass for a base model", "models.weights.write_hashed_weights",
    "write_json(folder / REPORT_NAME, make_report())", "remove_weights_report(folder)", what="model")  # fmt: skip
@pytest.mark.parametrize("what", ["model", "checkpoint", "rotation"])
def test_wherever_a_run_without_privacy_is_killed_its_weights_are_not_a_base_model(tmp_path, what):
    out, kept = tmp_path / "out", tmp_path / "kept"
    trainer = make_trainer(out, privacy=PLAIN, **STEPS)
    trainer.train()
    place = out if what == "model" else out / "checkpoint-2"
    shutil.copytree(out, kept)
    save = {
        "model": trainer.save_model,
        "checkpoint": lambda: trainer._save_checkpoint(trainer.model, None),
        "rotation": lambda: remove_checkpoint(place),
    }[what]
    for number in range(1, 100):
        shutil.rmtree(out)
        shutil.copytree(kept, out)
        INTERRUPT.arm(out, number, lambda: os.kill(os.getpid(), signal.SIGKILL))
        ended = in_a_child(save) == 0
        INTERRUPT.folder = ""
        if weight_files(place) and (place / "model.safetensors").exists():
            assert (place / "privacy.json").exists() and not sidecar.statement_starting_model(str(place))["covered"]
        if ended:
            break
    assert number > 3


@catches("a file beside the adapter's base", "models.weights.check_base_weights", "files.keys() | present.keys()", "files")
def test_a_file_beside_the_base_of_before_is_another_base(tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "adapter").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}")
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(tmp_path / "base")}))
    report = {"adapter_base": describe_base_weights(str(tmp_path / "base"))}
    check_base_weights(tmp_path / "adapter", report)
    (tmp_path / "base" / "pytorch_model.bin").write_bytes(b"other weights")
    with pytest.raises(UserError, match=r"base/pytorch_model\.bin is not what"):
        check_base_weights(tmp_path / "adapter", report)
        pytest.fail("not noticed")
