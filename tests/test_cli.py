"""cli.py: options from a file, suggestions for unknown ones, errors as an exit status."""

import logging
import runpy
import subprocess
import sys
from dataclasses import dataclass

import pytest
from conftest import ROOT
from mutation import catches

from author_dp import cli, option_names
from author_dp.accounting import ledger_report
from author_dp.errors import MechanismError, PeerLostError, SignalError, UserError
from author_dp.guards.canaries import AuditArguments
from author_dp.logs import is_useful_log
from author_dp.models.lora import LoraArguments
from author_dp.outputs import generate, publish, report, synthetic_report, tune
from author_dp.validation import option
from data_utils import DataArguments


@dataclass
class Arguments:
    target_epsilon: float = option(8.0, "Epsilon.")
    adam_epsilon: float = option(1e-8, "Of Adam.")
    sequence_len: int = option(128, "Tokens.")


@pytest.mark.parametrize(
    ("words", "suggestion"),
    [
        ("--epsilon 3", "--target_epsilon"),
        ("--sequence_lenn 3", "--sequence_len"),
        ("--block_size 9", "--sequence_len"),
        ("--xyz 1", None),
    ],
)
def test_parse_options_suggests_a_name(words, suggestion):
    with pytest.raises(UserError, match="unknown option") as error:
        cli.parse_options([Arguments], words.split())
    assert (f"did you mean {suggestion}?" in str(error.value)) == (suggestion is not None)
    assert suggestion is not None or "did you mean" not in str(error.value)


@catches("options from a file that nobody names", "cli.parse_options", "look_for_args_file=False", "look_for_args_file=True")
def test_parse_options_reads_no_file_beside_the_program(tmp_path, monkeypatch):
    """Hugging Face's parser would. A search, and the command that a report shows, would not have what is in it."""
    (tmp_path / "program.args").write_text("--sequence_len 7")
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "program.py")])
    (parsed,) = cli.parse_options([Arguments], ["--target_epsilon", "3"])
    assert parsed == Arguments(target_epsilon=3.0)


def test_option_given_with_its_default_is_refused_where_it_has_no_effect():
    for words in (["--lora_r", "8"], ["--lora_dropout=0.0"], ["--audit_kind", "text"]):
        with pytest.raises(UserError, match=r"without --enable_lora|it needs canaries"):
            cli.parse_options([LoraArguments, AuditArguments], words)
    cli.parse_options(
        [LoraArguments, AuditArguments], ["--enable_lora", "--lora_r", "8", "--audit_can", "10", "--audit_kind", "text"]
    )
    cli.parse_options([LoraArguments, AuditArguments], [])


@pytest.mark.parametrize(
    ("main", "words", "error"),
    [
        (generate.main, "FOLDER --numbr 3", "unknown option --numbr 3 \\(did you mean --number\\?\\)"),
        (synthetic_report.main, "a.jsonl b.jsonl --txt_column c", "did you mean --text_column"),
        (tune.main, "--expected_run 3 --serach a=1 --target_epsilon 1 --release_eval_epsilon 1 --search a=1,2", "mean --search"),
        (publish.main, "FOLDER OUT --push_to_hub", "unknown option --push_to_hub: there are none; usage: .*FOLDER OUT"),
        (report.main, "--output_dir FOLDER", "unknown option --output_dir"),
        (ledger_report.main, "FOLDER --delta 1e-5", "unknown option --delta"),
    ],
)
def test_programs_say_which_option_is_meant(main, words, error):
    with pytest.raises(UserError, match=error):
        main(words.split())


@pytest.mark.parametrize("main", [publish.main, report.main, ledger_report.main])
def test_programs_without_options_have_help(main, capsys):
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert not end.value.code and "usage: python -m author_dp." in capsys.readouterr().out


def test_known_names_are_options():
    """Each name that others use leads to an option that there is."""
    script = runpy.run_path(str(ROOT / "fine-tune-dp.py"), run_name="options")
    options = {name for group in script["GROUPS"] for name in group.__dataclass_fields__}
    assert set(option_names.KNOWN_AS.values()) <= options and not set(option_names.KNOWN_AS) & options


@pytest.mark.parametrize("word", ["--lora_r", "--lora-r", "--max_length", "--max-length"])
def test_names_of_peft_and_trl_are_aliases(word):
    lora, data = cli.parse_options([LoraArguments, DataArguments], ["--enable_lora", word, "64"])
    assert (lora.lora_dim, data.sequence_len) == ((64, 128) if "lora" in word else (8, 64))


@pytest.mark.parametrize(("line", "is_shown"), [("Saving model checkpoint to out", False), ("Loading the best model", True)])
def test_is_useful_drops_lines_that_say_nothing(line, is_shown):
    assert is_useful_log(logging.makeLogRecord({"msg": line})) == is_shown


def test_name_offending_options_finds_names_without_dashes():
    words = ["--seed", "3", "--bf16", "--fp16"]
    message = "At most one of fp16 and bf16 can be True"
    assert cli.name_offending_options(message, words) == f"--bf16, --fp16: {message}"
    assert cli.name_offending_options("of 3 devices", words) == "--seed: of 3 devices"


MISSING = "--target_epsilon, --per_sample_max_grad_norm: missing. Give "


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ("", MISSING),
        ("--train_file a.jsonl --output_dir out", MISSING),
        ("--config FILE", "--target_epsilon: missing"),
        ("--config=FILE --target_eps 8", None),
        ("--target-epsilon=8", "--per_sample_max_grad_norm: missing"),
        ("--noise_multiplier 1 --per_sample_max_grad_norm 1", None),
        ("--disable_dp", None),
        # What the parser says better.
        ("--help", None),
        ("--epsilon 8", None),
        ("--target_epsilon eight", None),
        ("--no_such_option 3", None),
        ("--lora_r 3 --max_len 8 --fp16 --bf16 True", MISSING),
        ("--target_epsilonn 8", None),
        ("--config missing.yaml", None),
    ],
)
def test_missing_options_are_named_together_before_libraries_are_imported(tmp_path, capsys, words, error):
    (tmp_path / "options.yaml").write_text("{per_sample_max_grad_norm: 1, seed: 3}")
    words = words.replace("FILE", str(tmp_path / "options.yaml")).split()
    if error is None:
        return option_names.exit_if_options_missing("fine-tune-dp.py", words, rank=0)
    option_names.exit_if_options_missing("fine-tune-dp.py", words, rank=1)  # rank 0 says it
    with pytest.raises(SystemExit) as status:
        option_names.exit_if_options_missing("fine-tune-dp.py", words, rank=0)
    assert status.value.code == 2 and capsys.readouterr().err.startswith(f"fine-tune-dp.py: error: {error}")


def test_option_names_knows_all_options():
    script = runpy.run_path(str(ROOT / "fine-tune-dp.py"), run_name="options")
    options = {name for group in script["GROUPS"] for name in group.__dataclass_fields__} | {"lora_r", "max_length"}
    assert options <= option_names.read_option_names("fine-tune-dp.py")


def test_option_names_imports_no_large_library():
    code = (
        "import sys, author_dp.startup, author_dp.option_names\n"
        "sys.exit(bool({'torch', 'numpy', 'transformers'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_parse_options_overrides_the_file_by_the_command_line(tmp_path):
    path = tmp_path / "options.yaml"
    path.write_text("target_epsilon: 3\nsequence_len: 64\n")
    for words in (["--config", str(path), "--target_epsilon", "5"], ["--target_epsilon", "5", f"--config={path}"]):
        (found,) = cli.parse_options([Arguments], words)
        assert (found.target_epsilon, found.sequence_len) == (5.0, 64)


@pytest.mark.parametrize("text", ["target_epsilon: 3\ntarget_epsilon: 4", "lr_scheduler_kwargs:\n  a: 1\n  a: 2"])
def test_load_config_args_refuses_a_key_twice(tmp_path, text):
    path = tmp_path / "options.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=r"--config .*is in it 2 times"):
        cli.load_config_args(["--config", str(path)])


def test_load_config_args_reads_utf8_in_any_locale(tmp_path, monkeypatch):
    path = tmp_path / "options.yaml"
    path.write_bytes("run_name: Zo\u00eb".encode())
    monkeypatch.setattr("locale.getpreferredencoding", lambda *_: "ascii")
    assert cli.load_config_args(["--config", str(path)]) == ["--run_name", "Zo\u00eb"]


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (UserError("--option: wrong. Fix it"), 2, "script.py: error: --option: wrong. Fix it"),
        (MechanismError("no noise"), 3, "the mechanism is not what the ledger says: no noise"),
        (SignalError(15), 143, "resume with --resume_from_checkpoint True"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (PeerLostError("another process ended"), 2, "another process ended"),
        (OSError(28, "No space left on device"), 2, "--output_dir cannot be written"),
    ],
)
def test_run_exits_with_status_and_one_message(capsys, error, status, message):
    cleaned = []

    def main():
        raise error

    with pytest.raises(SystemExit) as ended:
        cli.run(main, "script.py", lambda: cleaned.append(True))
    said = capsys.readouterr().err
    assert ended.value.code == status and message in said and len(said.splitlines()) == 1 and cleaned == [True]


def test_run_keeps_the_traceback_of_our_own_errors():
    with pytest.raises(ZeroDivisionError):
        cli.run(lambda: 1 / 0, "script.py", lambda: None)


def test_run_program_hands_over_the_words(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["program", "folder"])
    cli.run_program("author_dp.program", lambda words: print(words))
    assert "['folder']" in capsys.readouterr().out

    def fail(words):
        raise UserError("wrong")

    with pytest.raises(SystemExit) as ended:
        cli.run_program("author_dp.program", fail)
    assert ended.value.code == 2 and "author_dp.program: error: wrong" in capsys.readouterr().err
