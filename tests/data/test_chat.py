"""author_dp/data/chat.py: what of a prompt or conversation is learned, from the file to the loss."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import ROOT, run_script
from datasets import Dataset
from mutation import catches
from tokenizers import AddedToken
from transformers import AutoModelForCausalLM, AutoTokenizer

from author_dp.data.chat import ChatExample, ChatFormatter, tokenize_chat_examples
from author_dp.data.chat_template import set_chat_template
from author_dp.data.tokenization import tokenize
from author_dp.errors import UserError
from author_dp.guards.text_canaries import TextCanaries
from author_dp.mechanism.losses import author_losses
from author_dp.mechanism.microbatches import make_microbatches
from author_dp.types import IGNORE_INDEX
from data_utils import AuthorDataset, DataArguments, collate, group_by_author, load_train_and_eval

PLAIN = (  # as ChatML, with a start token and without marks
    "{{ bos_token }}{% for m in messages %}{% if m.role not in ['user', 'assistant', 'system'] %}"
    "{{ raise_exception('unknown role ' + m.role) }}{% endif %}"
    "{{ '<' + m.role + '>' + m.content + '<end>' }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
MARKED = (
    "{% for m in messages %}{{ '<' + m.role + '>' }}{% if m.role == 'assistant' %}{% generation %}{{ m.content + '<end>' }}"
    "{% endgeneration %}{% else %}{{ m.content + '<end>' }}{% endif %}{% endfor %}"
)
FORGETFUL = "{{ '<' + messages|length|string + '>' }}" + PLAIN  # what comes later changes what came before
TALK = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "one"},
    {"role": "user", "content": "more"},
    {"role": "assistant", "content": "two"},
]


@pytest.fixture
def tokenizer():
    loaded = AutoTokenizer.from_pretrained(ROOT / "demo" / "model")
    loaded.add_special_tokens({"bos_token": AddedToken("<s>")})
    loaded.chat_template = PLAIN
    return loaded


def learned(example: ChatExample) -> str:
    return "|".join(example.text[start:end] for start, end in example.targets)


@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_the_assistants_turns_are_the_targets(tokenizer, template):
    tokenizer.chat_template = template
    example = ChatFormatter(tokenizer, "assistant").format_messages(TALK)
    assert learned(example) == "one<end>|two<end>"
    assert learned(ChatFormatter(tokenizer, "all").format_messages(TALK)) == example.text


def test_a_template_that_rewrites_earlier_turns_is_refused_and_may_be_learned_whole(tokenizer):
    tokenizer.chat_template = FORGETFUL
    with pytest.raises(ValueError, match=r"cannot be divided into turns.*--targets all"):
        ChatFormatter(tokenizer, "assistant").format_messages(TALK)
    assert learned(ChatFormatter(tokenizer, "all").format_messages(TALK)).startswith("<4>")


def test_completions_follow_prompts_of_text_and_of_messages(tokenizer):
    form = ChatFormatter(tokenizer, "assistant")
    assert learned(form.format_completion("two and two?", " four")) == " four"
    assert learned(form.format_completion(None, "four")) == "four"
    assert form.format_completion("two?", None) is form.format_completion("two?", "") is None
    assert learned(form.format_completion(TALK[:1], TALK[1:])) == "one<end><user>more<end><assistant>two<end>"
    assert learned(ChatFormatter(tokenizer, "all").format_completion("two?", " four")) == "two? four"
    for prompt, completion in (("two?", TALK), (TALK, "two"), (5, "two"), ("two?", {})):
        with pytest.raises(ValueError, match="both texts, or both lists"):
            form.format_completion(prompt, completion)


def test_tokens_of_targets_and_the_start_and_end_tokens(tokenizer):
    """A token is a target if it holds a character of one; the template's start token is not doubled."""
    start, end = [tokenizer.bos_token_id], [tokenizer.eos_token_id]
    examples = [
        ChatFormatter(tokenizer, "assistant").format_messages(TALK),
        ChatFormatter(tokenizer, "assistant").format_completion("Q: ", "<s>an answer"),
        None,
    ]
    ids, labels = tokenize_chat_examples(examples, tokenizer, start, end)
    assert [row.count(start[0]) for row in ids] == [1, 1, 0] and [row.count(end[0]) for row in ids] == [1, 1, 0]
    targets = [tokenizer.decode([token for token in row if token != IGNORE_INDEX]) for row in labels]
    assert targets[0].replace(" ", "").startswith("one<end>two<end>") and "<s>an answer" in targets[1] and targets[2] == ""
    assert labels[0][0] == IGNORE_INDEX
    assert all(label in (token, IGNORE_INDEX) for row, own in zip(ids, labels) for token, label in zip(row, own))


# --- from files ------------------------------------------------------------------------------------------


def write(folder: Path, name: str, rows: list[dict]) -> str:
    path = folder / name
    if name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def load(path: str, tokenizer, **options) -> list[ChatExample]:
    args = DataArguments(train_file=[path], eval_fraction=0.0, **options)
    return [ChatExample(**row) for row in load_train_and_eval(args, 0, tokenizer=tokenizer)[0][args.text_column]]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_conversations_and_prompts_are_read_from_files(tmp_path, tokenizer, suffix):
    rows = [{"author": name, "messages": TALK, "prompt": "two?", "content": " four"} for name in "ab"]
    path = write(tmp_path, f"chat.{suffix}", rows)
    assert [learned(text) for text in load(path, tokenizer, messages_column="messages")] == ["one<end>|two<end>"] * 2
    assert [learned(text) for text in load(path, tokenizer, prompt_column="prompt")] == [" four"] * 2


def test_prompts_are_read_from_csv_and_conversations_are_not(tmp_path, tokenizer):
    path = tmp_path / "a.csv"
    path.write_text("author,prompt,content,messages\na,two?, four,[]\nb,,five,[]\n")
    assert [learned(text) for text in load(str(path), tokenizer, prompt_column="prompt")] == [" four", "five"]
    with pytest.raises(UserError, match=r"a .csv holds no lists of messages"):
        load(str(path), tokenizer, messages_column="messages")


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize(
    ("broken", "words"),
    [
        ([{"content": "hi"}], "no text as 'role' of message 1"),
        ([TALK[0], {"role": "assistant"}], "no text as 'content' of message 2"),
        ([{"role": "wizard", "content": "hi"}], "does not fit the chat template: unknown role wizard"),
        ([{**TALK[0], "tool_calls": "x"}], "'tool_calls' in message 1"),
        ([], "list of messages"),
    ],
)
def test_a_broken_conversation_is_refused_with_its_row(tmp_path, tokenizer, suffix, broken, words):
    path = write(tmp_path, f"chat.{suffix}", [{"author": "a", "messages": TALK}, {"author": "b", "messages": broken}])
    with pytest.raises(UserError, match=words) as raised:
        load(path, tokenizer, messages_column="messages")
    assert "row 2" in str(raised.value) and "--messages_column 'messages' of --train_file" in str(raised.value)


@pytest.mark.parametrize("broken", [5, "hi", {"role": "user"}, ["hi"], [{"role": "user", "content": 5}]])
def test_what_is_no_conversation_is_refused(tmp_path, tokenizer, broken):
    path = write(tmp_path, "chat.jsonl", [{"author": "a", "messages": TALK}, {"author": "b", "messages": broken}])
    with pytest.raises(UserError, match="row 2"):
        load(path, tokenizer, messages_column="messages")


def test_a_template_is_needed_and_may_come_from_a_file(tmp_path, tokenizer):
    path = write(tmp_path, "chat.jsonl", [{"author": name, "messages": TALK} for name in "ab"])
    tokenizer.chat_template = "{% for"
    with pytest.raises(UserError, match=r"row 1.*does not fit the chat template"):
        load(path, tokenizer, messages_column="messages")
    tokenizer.chat_template = None
    with pytest.raises(UserError, match=r"Give one with --chat_template FILE"):
        load(path, tokenizer, messages_column="messages")
    (tmp_path / "template").write_text(MARKED)
    set_chat_template(tokenizer, str(tmp_path / "template"))
    assert learned(load(path, tokenizer, messages_column="messages")[0]) == "one<end>|two<end>"
    with pytest.raises(UserError, match="--chat_template no-such-file"):
        set_chat_template(tokenizer, "no-such-file")


def test_a_missing_prompt_column_is_refused(tmp_path, tokenizer):
    path = write(tmp_path, "chat.jsonl", [{"author": name, "content": "four"} for name in "ab"])
    with pytest.raises(UserError, match="--prompt_column 'prompt': no such column in"):
        load(path, tokenizer, prompt_column="prompt")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"prompt_column": "a", "messages_column": "b"}, "exclude"),
        ({"targets": "all"}, "Leave it out"),
        ({"targets": "user", "prompt_column": "a"}, "--targets user"),
        ({"prompt_column": "content"}, "both name 'content'"),
        ({"messages_column": "author"}, "both name 'author'"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, words):
    with pytest.raises(UserError, match=words):
        DataArguments(**options)


# --- to the loss -----------------------------------------------------------------------------------------


def dataset_of(tokenizer, rows: list[tuple[str, str, str]], **options) -> AuthorDataset:
    """The samples of (author, prompt, completion)."""
    form = ChatFormatter(tokenizer, "assistant")
    examples = [form.format_completion(*row[1:]) for row in rows]
    samples = Dataset.from_dict({
        "author": [row[0] for row in rows], "content": [example and example._asdict() for example in examples]
    })  # fmt: skip
    options = {"sequence_len": 64, **options}
    tokens = tokenize(samples, tokenizer, text_column="content", has_loss_mask=True, **options)
    return AuthorDataset(tokens, *group_by_author(tokens["author"][:]))


def batch_of(dataset: AuthorDataset) -> dict:
    draws = [dataset.indices[a:b] for a, b in zip(dataset.offsets, dataset.offsets[1:])]
    (batch,) = make_microbatches(dataset.__getitems__(draws), len(draws), collate)
    return batch


ROWS = [("a", "the hive is", " calm and golden"), ("b", "a very long prompt about the telescope", " yes"), ("a", "", "the queen")]


def test_losses_equal_a_plain_loop_over_completions(tokenizer):
    """Each author's mean over own target tokens, wherever the model is asked for one token at a time."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(ROOT / "demo" / "model").eval()
    sums: dict[str, list[float]] = {}
    with torch.no_grad():
        for author, prompt, completion in ROWS:
            before, after = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, completion))
            row = before + after
            assert row == tokenizer(prompt + completion, add_special_tokens=False)["input_ids"]
            for place in range(max(1, len(before)), len(row)):
                logits = model(input_ids=torch.tensor([row[:place]])).logits[0, -1]
                sums.setdefault(author, []).append(-logits.log_softmax(-1)[row[place]].item())
        batch = batch_of(dataset_of(tokenizer, ROWS))
        losses = author_losses(model, batch)
    assert sorted(losses.tolist()) == pytest.approx(sorted(np.mean(values) for values in sums.values()), rel=1e-4)


@catches("prompts are learned", "data_utils.collate", 'sample.get("labels", row)', "row")
def test_what_stands_as_a_prompts_target_changes_no_loss():
    """The ids of prompts are context, never what is predicted: other labels there are no labels."""
    sample = {"input_ids": [5, 6, 7, 8], "labels": [IGNORE_INDEX, IGNORE_INDEX, 7, 8]}
    assert collate([sample, {"input_ids": [1, 2, 3]}])["labels"].tolist() == [
        [IGNORE_INDEX, IGNORE_INDEX, 7, 8],
        [1, 2, 3, IGNORE_INDEX],
    ]


def test_samples_without_a_target_are_dropped_and_counted(tokenizer, caplog):
    long = "the hive is calm and the queen is golden " * 20
    dataset = dataset_of(tokenizer, [*ROWS, ("c", long, " cut away"), ("d", "nothing", "")])
    assert len(dataset) == 2 and len(dataset.samples) == 3
    with pytest.raises(UserError, match=r"a target within 64 tokens\. Raise --sequence_len"):
        dataset_of(tokenizer, [("c", long, " cut away")])
    assert len(dataset_of(tokenizer, [("c", long, " cut away")], long_samples="split").samples) == 1


@catches("labels of another sample", "data_utils.AuthorDataset.__getitems__", "zip(*rows.values())",
    "zip(*(row[::-1] if name == 'labels' else row for name, row in rows.items()))")  # fmt: skip
def test_rows_of_labels_stay_beside_their_ids():
    columns = {
        "input_ids": [[1, 2], [3, 4, 5], [6, 7]],
        "labels": [[IGNORE_INDEX, 2], [IGNORE_INDEX, IGNORE_INDEX, 5], [IGNORE_INDEX, 7]],
    }
    dataset = AuthorDataset(Dataset.from_dict(columns), *group_by_author(["a", "b", "b"]))
    ((first, second),) = dataset.__getitems__([np.array([1, 2])])
    assert (first["input_ids"].tolist(), first["labels"].tolist()) == ([3, 4, 5], [IGNORE_INDEX, IGNORE_INDEX, 5])
    assert (second["input_ids"].tolist(), second["labels"].tolist()) == ([6, 7], [IGNORE_INDEX, 7])


@catches("targets found where none are", "data.chat.common_chat_length", "not text.startswith(prefix)", "False")
def test_what_is_no_beginning_is_refused():
    loaded = AutoTokenizer.from_pretrained(ROOT / "demo" / "model")
    loaded.chat_template = "{{ messages|length }}" + MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    with pytest.raises(ValueError, match="cannot be divided into turns"):
        ChatFormatter(loaded, "assistant").format_messages(TALK)


def test_fetched_rows_keep_their_own_labels(tokenizer):
    dataset = dataset_of(tokenizer, ROWS)
    ((second, first),) = dataset.__getitems__([np.array([2, 0])])
    for sample, row in ((second, 2), (first, 0)):
        assert sample["input_ids"].tolist() == dataset.samples.with_format(None)[row]["input_ids"]
        assert sample["labels"].tolist() == dataset.samples.with_format(None)[row]["labels"]


def test_of_canaries_all_is_learned(tokenizer):
    dataset = dataset_of(tokenizer, ROWS)
    joined = AuthorDataset(
        *TextCanaries(20, 1, 6, 100, key=1).join(dataset.samples.with_format(None), dataset.offsets, dataset.indices)
    )
    last = joined.__getitems__([joined.indices[-1:]])[0][0]
    assert len(joined) > len(dataset) and last["labels"].tolist() == last["input_ids"].tolist() and len(last["labels"]) == 6


@pytest.mark.integration
def test_a_run_on_conversations(tmp_path):
    done = run_script(
        "--model_name", "demo/model", "--train_file", "demo/chat.jsonl", "--messages_column", "messages",
        "--chat_template", "demo/chat.jinja", "--sequence_len", "64", "--output_dir", str(tmp_path / "out"),
        "--target_epsilon", "8", "--per_sample_max_grad_norm", "1", "--max_steps", "2", "--use_cpu", "--audit_canaries", "10",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == (ROOT / "demo" / "chat.jinja").read_text()
    assert json.loads((tmp_path / "out" / "privacy.json").read_text())["data"]["targets"] == "assistant"


# --- templates that deceive or break ---------------------------------------------------------------------------

TURN = MARKED.removeprefix("{% for m in messages %}").removesuffix("{% endfor %}")


@pytest.mark.parametrize(
    "template",
    [
        "{% macro turn(m) %}" + TURN + "{% endmacro %}{% for m in messages %}{{ turn(m) }}{% endfor %}",
        "{% for m in messages %}{% set turn %}" + TURN + "{% endset %}{{ turn }}{% endfor %}",
        "{% filter upper %}" + MARKED + "{% endfilter %}",
        "{% filter trim %} " + MARKED + "{% endfilter %}",
        "{% for m in messages recursive %}"
        + TURN
        + "{% if false %}{{ loop([]) }}{% endif %}{% endfor %}{{ messages[1].content }}",
    ],
    ids=["macro", "set", "filter", "trim", "outside the marks"],
)
def test_marks_whose_places_are_not_known_are_refused(tokenizer, template):
    """transformers counts from the start of the innermost text at hand, so that prompts would be learned."""
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match="generation %} is where its position"):
        ChatFormatter(tokenizer, "assistant").format_messages(TALK)
    assert ChatFormatter(tokenizer, "all").format_messages(TALK)


def test_what_an_assistant_says_may_be_rewritten_within_the_marks(tokenizer):
    tokenizer.chat_template = MARKED.replace("m.content + '<end>' }}{% endgen", "(m.content|trim|upper) + '<end>' }}{% endgen")
    talk = [TALK[0], {"role": "assistant", "content": "  one \n"}, TALK[2], {"role": "assistant", "content": ""}]
    assert learned(ChatFormatter(tokenizer, "assistant").format_messages(talk)) == "ONE<end>|<end>"


def test_a_mark_in_a_comment_is_none(tokenizer):
    tokenizer.chat_template = "{# {% generation %} is\nfor later #}" + PLAIN
    assert learned(ChatFormatter(tokenizer, "assistant").format_messages(TALK)) == "one<end>|two<end>"


@pytest.mark.parametrize(
    "template",
    ["{{ 1 / 0 }}", "{{ '{0}'.format() }}", "{{ 10.0 ** 1000 }}", "{% for i in range(10 ** 9) %}{% endfor %}", "{% break %}",
     "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"],
)  # fmt: skip
def test_whatever_a_template_does_is_told_with_its_row(tmp_path, tokenizer, template):
    tokenizer.chat_template = template
    path = write(tmp_path, "chat.jsonl", [{"author": "a", "messages": TALK}])
    with pytest.raises(UserError, match=r"line 1 \(row 1\): it does not fit the chat template"):
        load(path, tokenizer, messages_column="messages")
