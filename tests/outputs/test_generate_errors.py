"""generate.py, prompts.py and partial_file.py: what the user can mend is said in a line, before texts are made."""

import json

import pytest
from test_generate import made, run

from author_dp.errors import UserError
from author_dp.outputs import partial_file


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return made(tmp_path_factory.mktemp("run"))


@pytest.mark.parametrize(
    "options, words",
    [
        (["--prompts", "none.jsonl", "--public_prompts"], ["--prompts", "no such file"]),
        (["--prompts", "P", "--public_prompts", "--private_prompts"], ["exclude each other"]),
        (["--prompts", "P", "--public_prompts", "--prompt_column", "question"], ["row 1", "question", "topic"]),
        (["--prompts", "P", "--public_prompts", "--prompt_template", "{topic.upper}"], ["--prompt_template", "name of a column"]),
        (["--prompts", "P", "--public_prompts", "--prompt_template", "{topic"], ["--prompt_template", "braces"]),
        (["--prompt_template", "about {topic}"], ["'topic'", "--prompts"]),
        (["--prompts", "P", "--public_prompts", "--messages_column", "topic"], ["chat template"]),
        (["--prompts", "P", "--public_prompts", "--prompt_column", "long"], ["row 1", "32 positions"]),
        (["--prompts", "P", "--public_prompts", "--prompt_column", "topic", "--text_column", "prompt"], ["--text_column"]),
        (["--public_prompts"], ["no effect"]),
        (["--number", "0"], ["--number", "at least 1"]),
        (["--generation_options", "num_return_sequences=2"], ["num_return_sequences", "not to be set"]),
        (["--generation_options", "colour=red"], ["colour"]),
        (["--generation_options", "min_p=7"], ["--generation_options", "min_p"]),
        (["--generation_options", "cache_implementation=bla"], ["--generation_options cache_implementation=bla"]),
        (["--generation_options", "save_pretrained=2"], ["save_pretrained", "GenerationConfig"]),
        (["--generation_options", "num_beams=0"], ["--generation_options"]),
        (["--generation_options", "forced_eos_token_id=999999"], ["--generation_options"]),
        (["--temperature", "1e-45"], ["--temperature", "1e-4"]),
        (["--repetition_penalty", "1e-300"], ["--repetition_penalty", "0.01"]),
        (["--prompts", "P", "--public_prompts", "--prompt_column", "half"], ["row 1", "UTF-8"]),
        (["--prompts", "P", "--public_prompts", "--prompt_column", "topic", "--keep_columns", "half"], ["row 1", "UTF-8"]),
        (["--prompt_template", "\udcff"], ["--prompt_template", "UTF-8"]),
        (["--prompts", f"{'p' * 300}.jsonl", "--public_prompts"], ["--prompts", "ppp"]),
        (["--out", "s.csv"], ["--out s.csv", ".jsonl"]),
        (["--out", f"{'s' * 300}.jsonl"], ["--out sss", "name"]),
        (["--report", "P"], ["--validation_file", "held authors out by a file"]),
        (["--top_p", "7"], ["top_p"]),
        (["--report", "none.jsonl"], ["--report"]),
        (["--colour"], ["--colour", "--help"]),
    ],
)
def test_what_the_user_can_mend(trained, tmp_path, options, words):
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps({"topic": "chess", "long": "word " * 40, "half": "a\ud800"}) + "\n")
    with pytest.raises(UserError) as error:
        run(trained, tmp_path / "s.jsonl", *[str(path) if word == "P" else word for word in options])
    assert all(word in str(error.value) for word in words), error.value
    assert not (tmp_path / "s.jsonl").exists()


def test_numbers_that_json_has_not_are_null(tmp_path):
    output = partial_file.PartialFile(tmp_path / "s.jsonl", {}, 0o600)
    output.add([{"kept": [float("nan"), {"a": float("inf")}, 1.5]}], 0)
    assert json.loads(output.part.read_text(), parse_constant=pytest.fail) == {"kept": [None, {"a": None}, 1.5]}


def test_a_folder_without_a_model_is_named(tmp_path):
    with pytest.raises(UserError, match=r"FOLDER .*config\.json"):
        run(tmp_path, tmp_path / "s.jsonl")
    with pytest.raises(UserError, match="FOLDER"):
        run(tmp_path / "none", tmp_path / "s.jsonl")
