"""generate.py, partial_file.py, prompts.py and privacy_statement.py: the text, where it goes on, and what is claimed for it."""

import hashlib
import json
import os
import shutil
import stat
from pathlib import Path

import pytest
import torch
from conftest import ROOT, make_dataset, make_trainer
from mutation import catches
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GPT2Config, GPT2LMHeadModel

from author_dp.accounting.ledger import PrivacyLedger
from author_dp.accounting.voiding import void_guarantee
from author_dp.data.chat import ChatFormatter, resolve_bos_token, tokenize_chat_examples
from author_dp.data.readers import read_rows
from author_dp.errors import UserError
from author_dp.files import write_json
from author_dp.outputs import generate
from author_dp.outputs import privacy_statement as sidecar
from author_dp.outputs.prompts import PromptSource, make_prompts

SHORT = ["--max_new_tokens", "5", "--use_cpu", "--batch_size", "4"]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(ROOT / "demo" / "model")


def tiny(vocabulary: int) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=vocabulary, n_positions=32, n_embd=16, n_layer=2, n_head=2, bos_token_id=0,
                                       eos_token_id=0, initializer_range=0.3))  # fmt: skip
    return model


def made(path: Path) -> Path:
    """Make the folder of a run of two steps, with its ledger, in `path`."""
    folder, tokenizer = path / "trained", AutoTokenizer.from_pretrained(ROOT / "demo" / "model")
    privacy = {"noise_multiplier": None, "target_epsilon": 8.0}
    trainer = make_trainer(folder, tiny(len(tokenizer)), make_dataset([1] * 40), max_steps=2, privacy=privacy)
    trainer.run_report.data = {
        "row_limit": None,
        "train_fraction": 1.0,
        "sequence_len": 16,
        "start_token": None,
        "end_token": None,
    }
    trainer.train()
    trainer.save_model()
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    return made(tmp_path_factory.mktemp("run"))


@pytest.fixture
def folder(trained, tmp_path) -> Path:
    """A copy of it, to be changed."""
    return Path(shutil.copytree(trained, tmp_path / "model"))


def run(folder, out, *more: str) -> dict:
    generate.main([str(folder), "--out", str(out), *SHORT, *more])
    return json.loads(sidecar.statement_path(Path(out)).read_text())


def mode(path) -> int:
    return stat.S_IMODE(Path(path).stat().st_mode)


def rows_of(path) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


# --- what is claimed --------------------------------------------------------------------------------------


def test_the_guarantee_travels_with_the_text(trained, tmp_path, capsys):
    said = run(trained, tmp_path / "s.jsonl", "--number", "6")
    report = json.loads((trained / "privacy.json").read_text())
    assert said["covered"] and said["epsilon"] == pytest.approx(report["epsilon"], rel=3e-3) and said["delta"] == report["delta"]
    assert said["model"]["ledger_was_read"] and said["model"]["ledger_link"] == report["ledger_link"]
    assert said["sha256"] == hashlib.sha256((tmp_path / "s.jsonl").read_bytes()).hexdigest()
    assert said["rows"] == len(rows_of(tmp_path / "s.jsonl")) == 6 and said["generated"]["sampling"]["max_new_tokens"] == 5
    assert any("comparison with training texts" in line for line in said["not_covered"])
    assert "epsilon" in capsys.readouterr().out and {path.name for path in tmp_path.glob("s.jsonl*")} == {
        "s.jsonl", "s.jsonl.privacy.json",
    }  # fmt: skip


@catches("a private count travels with the text", "outputs.privacy_statement.read_privacy_statement",
    "{key: report[key] for key in PUBLIC_KEYS if key in report}", "report")  # fmt: skip
def test_a_sidecar_tells_public_values_only(folder, tmp_path):
    report = json.loads((folder / "privacy.json").read_text())
    assert report["num_samples"] == 40
    write_json(folder / "privacy.json", {**report, "private_mean_loss": 1.25})
    said = run(folder, tmp_path / "s.jsonl", "--number", "1")
    assert not {"num_samples", "private_mean_loss"} & said["model"].keys() and str(folder) not in json.dumps(said)


@catches("text that nothing covers is for everybody", "outputs.generate.generate", "else 0o600", "else 0o666")
def test_private_prompts_are_covered_by_nothing(trained, tmp_path):
    prompts = tmp_path / "p.jsonl"
    prompts.write_text('{"prompt": "The patient Smith"}\n{"prompt": "Ward"}\n')
    said = run(trained, tmp_path / "s.jsonl", "--prompts", str(prompts), "--private_prompts")
    assert (said["covered"], said["epsilon"], said["delta"]) == (False, None, None)
    assert said["statement"].startswith("NO PRIVACY GUARANTEE") and "private data" in said["statement"]
    assert said["not_covered"][0].startswith("prompts and fields: they are taken from private data")
    assert "Smith" not in json.dumps(said) and "sha256_of_prompts" not in said["generated"]
    assert mode(tmp_path / "s.jsonl") == 0o600 and len(rows_of(tmp_path / "s.jsonl")) == 2


def test_public_and_fixed_prompts_are_said_to_be_so(trained, tmp_path):
    prompts = tmp_path / "p.csv"
    prompts.write_text("topic\nchess\nsailing\n")
    options = ["--prompts", str(prompts), "--public_prompts", "--prompt_template", "about {topic}:", "--number", "5"]
    said = run(trained, tmp_path / "s.jsonl", *options)
    assert said["covered"] and said["prompts"] == "public" and "declared them public" in said["not_covered"][0]
    written = rows_of(tmp_path / "s.jsonl")
    assert [row["topic"] for row in written] == ["chess", "sailing", "chess", "sailing", "chess"]
    assert all(row.keys() == {"topic", "prompt", "content"} and row["prompt"] == f"about {row['topic']}:" for row in written)
    said = run(trained, tmp_path / "f.jsonl", "--prompt_template", "I am", "--with_prompt", "--number", "2")
    assert said["covered"] and (said["prompts"], said["generated"]["prompt_template"]) == ("fixed", "I am")
    assert all(row.keys() == {"content"} and row["content"].startswith("I am") for row in rows_of(tmp_path / "f.jsonl"))


@catches("nobody is asked where prompts come from", "outputs.generate.check_generate_arguments",
    "if args.prompts and not (args.public_prompts or args.private_prompts):", "if False:")  # fmt: skip
def test_prompts_need_a_word_on_where_they_come_from(trained, tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n')
    with pytest.raises(UserError, match=r"--public_prompts .* or --private_prompts"):
        run(trained, tmp_path / "s.jsonl", "--prompts", str(tmp_path / "p.jsonl"))
        pytest.fail("nobody was asked")


def test_text_of_a_model_without_privacy_is_loud_and_for_its_owner(folder, tmp_path, caplog):
    (folder / "privacy.json").unlink()
    said = run(folder, tmp_path / "s.jsonl", "--number", "1")
    assert not said["covered"] and said["model"] is None and "do not publish" in said["statement"]
    assert mode(tmp_path / "s.jsonl") == 0o600


@catches("an edited epsilon travels with the text", "outputs.privacy_statement.read_privacy_statement",
    "report = recompute_privacy_report(path, ledger)", "report = read_json_object(path)")  # fmt: skip
def test_epsilon_is_that_of_the_ledger_not_of_an_edited_report(folder):
    path, ledger = folder / "privacy.json", PrivacyLedger(folder / "privacy_ledger.jsonl")
    report = json.loads(path.read_text())
    write_json(path, {**report, "epsilon": 0.1})
    assert sidecar.read_privacy_statement(folder)["epsilon"] == pytest.approx(report["epsilon"], rel=3e-3)
    ledger.record_failure("the noise is gone")
    assert not sidecar.make_statement(sidecar.read_privacy_statement(folder), "none")["covered"]
    write_json(path, {**report, "ledger_link": "0" * 64})
    with pytest.raises(UserError, match="lacks records"):
        sidecar.read_privacy_statement(folder)


def test_a_checkpoint_has_the_ledger_of_its_run(folder):
    checkpoint = folder / "checkpoint-2"
    checkpoint.mkdir()
    for name in ("privacy.json", "config.json", "model.safetensors"):
        (checkpoint / name).write_bytes((folder / name).read_bytes())
    assert sidecar.read_privacy_statement(checkpoint)["ledger_was_read"]
    (folder / "privacy_ledger.jsonl").unlink()
    assert not sidecar.read_privacy_statement(checkpoint)["ledger_was_read"]  # a model from elsewhere: as its privacy.json says


@catches("a sidecar of another text believed", "outputs.privacy_statement.check_statement",
    'statement.get("sha256") != sha256_of(text)', "False")  # fmt: skip
def test_a_text_that_was_changed_is_not_the_sidecars(trained, tmp_path):
    out = tmp_path / "s.jsonl"
    run(trained, out, "--number", "2")
    assert sidecar.check_statement(out)["rows"] == 2
    out.write_text(out.read_text().replace("content", "contents", 1))
    with pytest.raises(UserError, match="is not the text"):
        sidecar.check_statement(out)
        pytest.fail("not noticed")
    sidecar.statement_path(out).unlink()
    with pytest.raises(UserError, match="nothing says what it is"):
        sidecar.check_statement(out)


# --- going on ---------------------------------------------------------------------------------------------


def interrupted(monkeypatch, folder, out, batches: int, *more: str) -> None:
    """Begin a file, and be interrupted within a batch."""
    write, calls = generate.generate_batch, []

    def until(*arguments):
        if len(calls) == batches:
            raise KeyboardInterrupt
        calls.append(0)
        return write(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(generate, "generate_batch", until)
        with pytest.raises(KeyboardInterrupt):
            run(folder, out, *more)


@catches("rows twice after an interruption", "outputs.partial_file.PartialFile._resume",
    'os.truncate(self.part, min(int(known["bytes"]), self.part.stat().st_size))',
    'known["sha256"] = hashlib.sha256(self.part.read_bytes()).hexdigest()')  # fmt: skip
@catches("other rows after an interruption", "outputs.generate.generate_batch", "torch.manual_seed(seed)", "pass")
def test_an_interrupted_run_goes_on_to_the_same_rows(trained, tmp_path, monkeypatch):
    run(trained, tmp_path / "whole.jsonl", "--number", "11")
    for batches, torn in ((0, b""), (1, b'{"content": "to'), (2, b'{"content": "a whole row of a batch that does not count"}\n')):
        out = tmp_path / f"cut{batches}.jsonl"
        interrupted(monkeypatch, trained, out, batches, "--number", "11")
        assert not out.exists() and not sidecar.statement_path(out).exists()
        with open(f"{out}.part", "ab") as file:
            file.write(torn)
        torch.manual_seed(batches)  # whatever was drawn since
        try:
            run(trained, out, "--number", "11")
        except UserError as error:
            pytest.fail(str(error))
        assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
        assert not list(tmp_path.glob("*.part*"))
    lines = (tmp_path / "whole.jsonl").read_text().splitlines()
    assert len(set(lines)) > 8  # batches are drawn from seeds of their own


def test_an_unfinished_file_of_other_options_is_not_gone_on_with(trained, tmp_path, monkeypatch):
    out = tmp_path / "s.jsonl"
    interrupted(monkeypatch, trained, out, 1, "--number", "9")
    with pytest.raises(UserError, match="another seed"):
        run(trained, out, "--number", "9", "--seed", "5")
    part = Path(f"{out}.part")
    part.write_text(part.read_text().replace("content", "contend", 1))
    with pytest.raises(UserError, match="was changed"):
        run(trained, out, "--number", "9")


def test_a_file_that_is_there_is_not_written_over(trained, tmp_path):
    (tmp_path / "s.jsonl").write_text("mine")
    with pytest.raises(UserError, match="exists"):
        run(trained, tmp_path / "s.jsonl", "--number", "1")
    assert (tmp_path / "s.jsonl").read_text() == "mine"


def test_the_seed_decides_and_the_folders_own_sampling_does_not(folder, tmp_path):
    config = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(
        json.dumps({**config, "do_sample": True, "top_k": 1, "no_repeat_ngram_size": 1})
    )
    texts = []
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        run(folder, tmp_path / f"{name}.jsonl", "--number", "4", "--seed", seed)
        texts.append((tmp_path / f"{name}.jsonl").read_text())
    assert texts[0] == texts[1] != texts[2]


# --- what the model reads and writes ------------------------------------------------------------------------


def test_texts_of_a_batch_are_those_of_one_by_one(trained, tokenizer):
    model, _ = generate.load_generating_model(str(trained))
    ids = [tokenizer(text)["input_ids"] for text in ("a", "the match was late", "goal")]
    config, found = GenerationConfig(do_sample=False, max_new_tokens=6, eos_token_id=[0], pad_token_id=0), set()
    for seed in range(20):  # some models write one word, whatever they read
        torch.manual_seed(seed)
        model.transformer.wte.weight.data.normal_()
        together = generate.generate_batch(model, ids, config, 0)
        alone = [generate.generate_batch(model, [row], config, 0) for row in ids]
        assert together[0] == [texts[0] for texts, _ in alone]
        found.add(len({tuple(row) for row in together[0]}))
    assert max(found) > 1


def test_a_text_ends_at_its_end():
    class Model:
        device = torch.device("cpu")

        def generate(self, input_ids, **options):
            return torch.cat([input_ids, torch.tensor([[5, 9, 7, 7], [5, 6, 8, 5]])], dim=1)

    config = GenerationConfig(eos_token_id=[8, 9], pad_token_id=7)
    assert generate.generate_batch(Model(), [[1], [1, 2]], config, 0) == ([[5], [5, 6]], [True, True])
    config.eos_token_id = [9]
    assert generate.generate_batch(Model(), [[1], [1, 2]], config, 0) == ([[5], [5, 6, 8, 5]], [True, False])


def test_an_adapter_is_merged_into_its_base(trained, tokenizer, tmp_path):
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(trained), LoraConfig(task_type="CAUSAL_LM", r=4, fan_in_fan_out=True)
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    ids = torch.tensor([[3, 4, 5]])
    merged, _ = generate.load_generating_model(str(tmp_path))
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(trained), tmp_path)(ids).logits
    assert torch.allclose(merged(ids).logits, adapted, atol=1e-4)
    assert not torch.allclose(merged(ids).logits, AutoModelForCausalLM.from_pretrained(trained)(ids).logits, atol=1e-2)


def test_prompts_are_read_as_in_training(tokenizer, tmp_path):
    rows = [{"prompt": "a <|endoftext|> b"}, {"prompt": [{"role": "user", "content": "Two and two?"}]}, {"prompt": ""}]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    loaded = AutoTokenizer.from_pretrained(ROOT / "demo" / "model")
    loaded.chat_template = (ROOT / "demo" / "chat.jinja").read_text()
    form = ChatFormatter(loaded, "assistant")
    start = [resolve_bos_token(loaded, prepend_bos=True)]
    text, talk, empty = make_prompts(loaded, "<|endoftext|>", PromptSource(str(tmp_path / "p.jsonl")))
    for prompt, example in (
        (text, form.format_completion("a <|endoftext|> b", " c")),
        (talk, form.format_messages([rows[1]["prompt"][0], {"role": "assistant", "content": "Four"}])),
    ):
        (whole,), _ = tokenize_chat_examples([example], loaded, start, [])
        assert whole[: len(prompt.ids)] == prompt.ids and start[0] not in prompt.ids[1:] and prompt.ids[0] == start[0]
    assert loaded.decode(talk.ids).endswith("Question: Two and two?\nAnswer: ") and empty.ids == start
    written = generate.to_generated_row(talk, " Four\n", "content", False)
    assert written == {"messages": [*rows[1]["prompt"], {"role": "assistant", "content": "Four"}]}
    (asked,) = make_prompts(loaded, None, PromptSource(template="Two and two?", chat=True))
    assert asked.row == {"messages": rows[1]["prompt"]} and asked.ids == talk.ids[1:]


def test_the_last_answer_of_a_conversation_is_written_anew(tokenizer):
    loaded = AutoTokenizer.from_pretrained(ROOT / "demo" / "model")
    loaded.chat_template = (ROOT / "demo" / "chat.jinja").read_text()
    prompts = make_prompts(loaded, None, PromptSource(str(ROOT / "demo" / "chat.jsonl"), messages="messages"))
    first = next(read_rows(str(ROOT / "demo" / "chat.jsonl")))
    assert prompts[0].row == {"messages": first["messages"][:-1]} and "author" not in prompts[0].row


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_rows_of_each_format(tmp_path, suffix):
    import pandas as pd

    table = pd.DataFrame({"topic": ["chess", "a, b"], "stars": [3, 5]})
    path = tmp_path / f"p.{suffix}"
    {"jsonl": lambda: table.to_json(path, orient="records", lines=True), "csv": lambda: table.to_csv(path, index=False),
     "parquet": lambda: table.to_parquet(path)}[suffix]()  # fmt: skip
    tokens = AutoTokenizer.from_pretrained(ROOT / "demo" / "model")
    prompts = make_prompts(tokens, None, PromptSource(str(path), template="{stars} for {topic} {{x}}", keep=("topic",)))
    assert [prompt.row["prompt"] for prompt in prompts] == ["3 for chess {x}", "5 for a, b {x}"]


@catches("texts of a model whose guarantee was voided", "outputs.generate.generate",
    "privacy_statement.check_still_covered(Path(args.folder))", "pass")  # fmt: skip
def test_a_guarantee_that_is_voided_meanwhile_covers_no_text(folder, tmp_path, monkeypatch):
    """The run is resumed while texts are generated, which takes hours, and finds that its mechanism failed."""
    copy = shutil.copytree(folder, tmp_path / "copy")
    original = generate.write_generated_texts

    def write_and_void(*args):
        original(*args)
        void_guarantee(PrivacyLedger(copy / "privacy_ledger.jsonl"), "half the noise")

    monkeypatch.setattr(generate, "write_generated_texts", write_and_void)
    with pytest.raises(UserError, match=r"voided meanwhile.*half the noise"):
        run(copy, tmp_path / "s.jsonl", "--number", "2")
        pytest.fail("not noticed")
    assert not (tmp_path / "s.jsonl").exists()


def test_a_file_whose_name_is_not_utf8_is_part_of_the_fingerprint(tmp_path):
    before = generate.fingerprint_model(str(tmp_path))
    (tmp_path / os.fsdecode(b"caf\xe9.txt")).write_text("text")
    assert generate.fingerprint_model(str(tmp_path)) != before
