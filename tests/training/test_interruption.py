"""interruption.py: a signal after the last step ends the program with what is saved, where, and how to write the rest."""

import os
import signal

import pytest
from conftest import make_dataset, make_trainer, read_report
from script_runs import PRIVACY, run_here, small
from transformers import TrainerCallback

from author_dp.errors import NOT_SAVED, RESUME, SignalError
from author_dp.guards.text_canaries import TextCanaries
from author_dp.models.weights import check_weights
from author_dp.outputs.report import main as report_main
from author_dp.outputs.samples import TextSamples
from author_dp.training.interruption import SIGNALS, finished_training


class SignalWhenSaved(TrainerCallback):
    """Send a signal while the checkpoint of a step is saved."""

    follows = "steps"

    def __init__(self, step: int):
        self.step = step

    def on_save(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGINT)


def trained(folder, **options):
    trainer = make_trainer(folder, dataset=make_dataset([1] * 40), max_steps=2, **options)
    trainer.train()
    return trainer


@pytest.mark.integration
@pytest.mark.parametrize("step", [1, 2])
def test_signal_while_a_checkpoint_is_saved_says_what_is_finished(tmp_path, step):
    trainer = make_trainer(tmp_path, dataset=make_dataset([1] * 40), max_steps=2, save_strategy="steps", save_steps=1)
    trainer.add_callback(SignalWhenSaved(step))
    with pytest.raises(SignalError) as caught:
        trainer.train()
    rest = "The same command with --resume_from_checkpoint True writes the rest, and spends no privacy budget"
    if step == 2:
        assert str(caught.value) == f"interrupted; training is finished, and its model is saved in {tmp_path}. {rest}"
        check_weights(tmp_path, read_report(tmp_path))
    else:  # the next step is finished first, which here is the last one
        assert (
            str(caught.value) == f"interrupted; training is finished, and its model is saved in {tmp_path}/checkpoint-2. {rest}"
        )


def test_signal_before_the_last_step_is_to_be_resumed(tmp_path):
    trainer = make_trainer(tmp_path, dataset=make_dataset([1] * 40), max_steps=9, save_strategy="steps", save_steps=1)
    trainer.add_callback(SignalWhenSaved(1))
    with pytest.raises(SignalError, match=RESUME):
        trainer.train()


@pytest.mark.parametrize("number", SIGNALS)
def test_signal_after_training_says_where_the_model_is(tmp_path, number):
    handlers = [signal.getsignal(each) for each in SIGNALS]
    with pytest.raises(SignalError, match=f"saved in {tmp_path}. python -m author_dp.report {tmp_path} writes") as caught:
        with finished_training(trained(tmp_path)):
            os.kill(os.getpid(), number)
    assert caught.value.number == number and handlers == [signal.getsignal(each) for each in SIGNALS]
    report_main([str(tmp_path)])
    assert "author-level differential privacy" in (tmp_path / "README.md").read_text() and (tmp_path / "report.html").exists()


def test_signal_while_the_model_is_saved_waits(tmp_path, monkeypatch):
    trainer = trained(tmp_path)
    save = trainer.save_model
    monkeypatch.setattr(trainer, "save_model", lambda: (os.kill(os.getpid(), signal.SIGINT), save()))
    with pytest.raises(SignalError, match="training is finished"):
        with finished_training(trainer):
            raise AssertionError("not reached")
    check_weights(tmp_path, read_report(tmp_path))


@pytest.mark.integration
def test_interrupted_end_of_a_run_is_written_by_the_same_command(checkpoint, comments, tmp_path, monkeypatch, capfd):
    arguments = small(checkpoint, comments, folder := tmp_path / "out", *PRIVACY, "--save_strategy", "steps")
    write = TextSamples.write

    def interrupt_after(self, model, when):
        if when == "after":
            raise KeyboardInterrupt
        write(self, model, when)

    with monkeypatch.context() as patched:
        patched.setattr(TextSamples, "write", interrupt_after)
        status, stderr = run_here(patched, capfd, *arguments)
    assert status == 130 and f"interrupted; training is finished, and its model is saved in {folder}. The same" in stderr, stderr
    spent = read_report(folder)
    check_weights(folder, spent)
    assert not (folder / "report.html").exists()
    status, stderr = run_here(monkeypatch, capfd, *arguments, "--resume_from_checkpoint", "True")
    assert status == 0 and (folder / "report.html").exists() and (folder / "README.md").exists(), stderr
    assert read_report(folder)["epsilon"] == spent["epsilon"]


@pytest.mark.parametrize(("strategy", "words"), [("steps", "training is finished.*checkpoint-2"), ("no", NOT_SAVED)])
def test_signal_while_the_audit_is_made_says_what_is_saved(tmp_path, monkeypatch, strategy, words):
    canaries = TextCanaries(number=4, samples=1, tokens=8, vocab_size=20, key=1)
    monkeypatch.setattr(TextCanaries, "finish", lambda *_: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(SignalError, match=words):
        trained(tmp_path, canaries=canaries, save_strategy=strategy)
