"""chat_template.py: templates that lose words, end no turn, or cannot begin with the assistant."""

import json
import logging

import pytest
from conftest import ROOT
from test_chat import MARKED, PLAIN, TALK, learned
from tokenizers import AddedToken
from transformers import AutoTokenizer, TrainingArguments

from author_dp.data.chat import ChatFormatter, missing_chat_end_warning, tokenize_chat_examples
from author_dp.data.chat_template import ChatTemplate, TurnEnd
from author_dp.errors import UserError
from author_dp.outputs import generate
from author_dp.outputs.prompts import PromptSource, make_prompts
from data_utils import DataArguments, load_author_datasets

GLM = (  # the next role's mark is all that ends a turn
    "[gMASK]<sop>{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
CHATML = (
    "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nBe helpful<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NO_SYSTEM = (
    "{% for m in messages %}{% if m.role != 'system' %}{{ '<' + m.role + '>' + m.content + '<end>' }}{% endif %}{% endfor %}"
)
LATE_SYSTEM = (  # as Mistral's, which writes it before the last question
    "{% set ns = namespace(system='') %}{% if messages[0].role == 'system' %}{% set ns.system = messages[0].content + '\n\n' %}"
    "{% endif %}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + (ns.system if loop.last else '') + m.content }}"
    "{{ '[/INST]' }}{% elif m.role == 'assistant' %}{{ ' ' + m.content + '</s>' }}{% endif %}{% endfor %}"
)
NAMES = ["<|user|>", "<|assistant|>", "<|system|>", "<|observation|>", "<sop>", "<|im_start|>", "<|im_end|>", "<end>", "</s>"]
ANSWER_FIRST = [{"role": "assistant", "content": "hello"}, *TALK]


@pytest.fixture
def tokenizer():
    loaded = AutoTokenizer.from_pretrained(ROOT / "demo" / "model")
    loaded.add_special_tokens({"additional_special_tokens": [AddedToken(name) for name in NAMES]})
    return loaded


def formatter(tokenizer, template: str, targets: str = "assistant") -> ChatFormatter:
    tokenizer.chat_template = template
    return ChatFormatter(tokenizer, targets)


# --- the end of a turn ------------------------------------------------------------------------------------


def test_the_mark_that_ends_a_turn_is_learned_where_it_begins_the_next(tokenizer):
    form = formatter(tokenizer, GLM)
    assert form.turn_end == TurnEnd(tokenizer.convert_tokens_to_ids("<|user|>"), "<|user|>")
    example = form.format_messages(TALK)
    assert learned(example) == "one<|user|>|two<|user|>"
    text = example.text
    assert text == form.render(TALK) + "<|user|>" and text.count("<|user|>") == 3
    _, (labels,) = tokenize_chat_examples([example], tokenizer, [], [])
    assert labels[-1] == form.turn_end.token and labels.count(form.turn_end.token) == 2
    assert learned(form.format_completion(TALK[:1], TALK[1:2])) == "one<|user|>"
    call = [*TALK[:2], {"role": "observation", "content": "42"}, TALK[3]]
    assert learned(form.format_messages(call)) == "one<|observation|>|two<|user|>"
    everything = formatter(tokenizer, GLM, "all").format_messages(TALK)
    assert learned(everything) == everything.text == text
    assert not learned(form.format_messages(TALK[:3])).endswith("more<|user|>")


@pytest.mark.parametrize(
    ("template", "end"),
    [(CHATML, "<|im_end|>"), (PLAIN, "<end>"), (MARKED, "<end>"), (LATE_SYSTEM, "</s>"),
     (PLAIN.replace("<end>", "\n"), None), (MARKED.replace(" + '<end>' }}{% endgen", " }}{% endgen"), None),
     ((ROOT / "demo" / "chat.jinja").read_text(), None)],
)  # fmt: skip
def test_the_token_that_ends_a_turn_is_found_or_its_absence_is_a_warning(tokenizer, template, end):
    form = formatter(tokenizer, template)
    warning = missing_chat_end_warning(form, is_templated=True)
    assert form.turn_end == TurnEnd(None if end is None else tokenizer.convert_tokens_to_ids(end), "")
    assert (warning is None) == (end is not None)
    assert warning is None or "a generator goes on to --max_new_tokens. Add --append_eos" in warning


def test_training_warns_where_no_end_is_learned(tmp_path, tokenizer, monkeypatch, caplog):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    path = tmp_path / "a.jsonl"
    rows = [{"author": f"u{i}", "messages": TALK, "prompt": "two?", "content": " four"} for i in range(9)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer.chat_template = PLAIN.replace("<end>", "\n")
    training_args = TrainingArguments(str(tmp_path / "out"), use_cpu=True)
    for options, words in (
        ({"messages_column": "messages"}, "The chat template has no token"),
        ({"prompt_column": "prompt"}, "Completions have no end"), ({"messages_column": "messages", "append_eos": True}, None),
    ):  # fmt: skip
        caplog.clear()
        load_author_datasets(DataArguments(train_file=[str(path)], eval_fraction=0.0, **options), training_args, tokenizer)
        assert (words in caplog.text) if words else "generator goes on" not in caplog.text


def test_generation_stops_at_the_token_that_ends_a_turn(tokenizer):
    class Model:
        generation_config = None

    tokenizer.chat_template = GLM
    mark = tokenizer.convert_tokens_to_ids("<|user|>")
    assert generate.eos_token_ids(Model(), tokenizer, ChatTemplate(tokenizer).turn_end) == sorted([tokenizer.eos_token_id, mark])
    assert generate.eos_token_ids(Model(), tokenizer, None) == [tokenizer.eos_token_id]


@pytest.mark.parametrize(
    ("data", "turn_end", "warns"),
    [
        ({"end_token": None, "targets": "assistant", "messages_column": "m"}, TurnEnd(None, ""), True),
        ({"end_token": None, "targets": "assistant", "messages_column": "m"}, TurnEnd(5, ""), False),
        ({"end_token": "</s>", "targets": "assistant", "messages_column": "m"}, TurnEnd(None, ""), False),
        ({"end_token": None, "targets": "assistant", "text_column": "t"}, None, True),
        ({"end_token": None, "targets": "assistant", "text_column": "t"}, TurnEnd(5, ""), False),
        ({"end_token": None, "targets": "assistant"}, None, False),
        ({"end_token": None}, None, True),
        ({}, None, False),
    ],
)
def test_generation_warns_where_no_end_was_learned(data, turn_end, warns):
    args = generate.make_generate_parser().parse_args(["folder", "--prompt_template", "a"])
    found = generate.make_generation_warnings({"covered": True}, data, args, turn_end)
    assert any("never saw how a text ends" in warning for warning in found) == warns


# --- words that vanish ------------------------------------------------------------------------------------


SYSTEM = {"role": "system", "content": "Speak like a pirate"}


@pytest.mark.parametrize("targets", ["assistant", "all"])
def test_a_template_that_loses_a_message_is_refused(tokenizer, targets):
    form = formatter(tokenizer, NO_SYSTEM, targets)
    assert learned(form.format_messages(TALK))
    for system in (SYSTEM, {**SYSTEM, "content": "one"}):  # also where its words are those of another message
        with pytest.raises(ValueError, match=r"loses words: .* message 1 \(system\)"):
            form.format_messages([system, *TALK])
        with pytest.raises(ValueError, match="loses words"):
            form.format_completion([system, TALK[0]], TALK[1:2])
    with pytest.raises(ValueError, match="loses words"):
        form.render_prompt([SYSTEM, TALK[0]])


def test_words_that_a_template_cuts_out_of_a_message_are_missed(tokenizer):
    thinking = [TALK[0], {"role": "assistant", "content": "<think>let me see</think>four"}]
    template = MARKED.replace("m.content + '<end>' }}{% endgen", "m.content.split('</think>')[-1] + '<end>' }}{% endgen")
    form = formatter(tokenizer, template)
    assert learned(form.format_messages(TALK)) == "one<end>|two<end>"
    with pytest.raises(ValueError, match=r"loses words: .* message 2 \(assistant\)"):
        form.format_messages(thinking)


def test_words_may_move_be_trimmed_or_be_quoted(tokenizer):
    assert "pirate" in formatter(tokenizer, LATE_SYSTEM, "all").format_messages([SYSTEM, *TALK[:1]]).text
    spaced = [{"role": "user", "content": "  a\n\n b "}, {"role": "assistant", "content": 'say "no"\n\u00e9 '}]
    for change in ("m.content | trim", "m.content | tojson", "m.content.split() | join(' ')"):
        assert learned(formatter(tokenizer, PLAIN.replace("m.content", f"({change})")).format_messages(spaced))


# --- conversations that begin with the assistant ----------------------------------------------------------


@pytest.mark.parametrize(("template", "end"), [(CHATML, "<|im_end|>\n"), (PLAIN, "<end>"), (MARKED, "<end>"), (GLM, "<|user|>")])
def test_a_conversation_may_begin_with_the_assistant(tokenizer, template, end):
    form = formatter(tokenizer, template)
    example = form.format_messages(ANSWER_FIRST)
    assert [example.text[start:stop] for start, stop in example.targets] == [f"hello{end}", f"one{end}", f"two{end}"]
    prompt = form.render_prompt([])
    assert form.render(ANSWER_FIRST[:1]).startswith(prompt + "hello") and "assistant" in prompt


def test_a_default_system_prompt_is_no_target(tokenizer):
    form = formatter(tokenizer, CHATML)
    for prompt in ([], None):
        assert learned(form.format_completion(prompt, TALK[1:2])) == "one<|im_end|>\n"
        assert learned(form.format_completion(prompt, TALK[:2])).startswith("hi<|im_end|>\n<|im_start|>assistant\none")
    assert "Be helpful" in learned(formatter(tokenizer, CHATML, "all").format_completion([], TALK[1:2]))


@pytest.mark.parametrize("targets", ["assistant", "all"])
def test_a_conversation_without_words_to_learn_is_a_missing_text(tokenizer, targets):
    form = formatter(tokenizer, CHATML, targets)
    silent = [TALK[0], {"role": "assistant", "content": " "}]
    assert (form.format_messages(silent) is None) == (targets == "assistant")
    assert form.format_messages([{**message, "content": ""} for message in silent]) is None
    assert form.format_completion(TALK[:1], silent[1:]) is form.format_completion(TALK[:1], []) is None
    assert form.format_messages(TALK[:1]) is None or targets == "all"


def test_generation_may_begin_with_the_assistant(tokenizer, tmp_path):
    tokenizer.chat_template = CHATML
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps({"messages": ANSWER_FIRST[:1]}) + "\n" + json.dumps({"messages": [SYSTEM, TALK[0]]}) + "\n")
    first, second = make_prompts(tokenizer, None, PromptSource(str(path), messages="messages"))
    assert tokenizer.decode(first.ids).endswith("assistant\n") and first.row == {"messages": []}
    assert "pirate" in tokenizer.decode(second.ids)
    tokenizer.chat_template = NO_SYSTEM
    with pytest.raises(UserError, match=r"row 2.*loses words"):
        make_prompts(tokenizer, None, PromptSource(str(path), messages="messages"))
