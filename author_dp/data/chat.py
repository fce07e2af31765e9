"""Turn prompts with completions, and conversations, into texts of which a part is to be learned.

Promise: what is a target is decided by exact positions in the text that the model reads, never by searching it for words; a
conversation for which no such positions can be found is an error. An example is kept as one JSON text, `Example.to_json()`, so
that all that reads, splits and stores texts need not know of it.

The columns are those of TRL [1]: "prompt" and "completion", texts or lists of messages; or "messages", a list of {"role",
"content"}. Where the chat template marks the assistant's words ({% generation %}), these marks are followed. Elsewhere an
assistant's turn is what the conversation up to it, with the template's opening of an answer, lacks of the conversation with it;
the one must be the beginning of the other, to the letter.

Example:

    >>> Example.from_json(ChatFormatter(None, "assistant").completion("two and two?", " four")).targets
    [[12, 17]]

References:
    [1] https://huggingface.co/docs/trl/dataset_formats
"""

import json
import re
from typing import Any, NamedTuple, Optional

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from author_dp.types import IGNORE_INDEX

TARGETS = ("assistant", "all")
GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")  # in a template, where the assistant's words begin
COMMENT = re.compile(r"\{#.*?#\}", re.DOTALL)


class Example(NamedTuple):
    """A text, and which of its characters are to be learned."""

    text: str
    targets: list[tuple[int, int]]  # from, to; in order, apart
    templated: bool  # whether a chat template wrote it, so that its special tokens are meant as such

    def to_json(self) -> str:
        return json.dumps(self, ensure_ascii=False, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> "Example":
        """Undo `packed`; a missing text is an example of nothing."""
        return cls(*json.loads(text)) if text else cls("", [], False)


class ChatFormatter:
    """How rows become examples.

    Args:
        tokenizer: whose chat template writes conversations; None where there are none.
        targets: assistant or all: what of an example is learned.
    """

    def __init__(self, tokenizer: Optional[PreTrainedTokenizerBase], targets: str):
        self.tokenizer, self.targets = tokenizer, targets
        self.template = None if tokenizer is None else tokenizer.chat_template
        if isinstance(self.template, dict):  # several by name, as some hub models have
            self.template = self.template.get("default")
        self.has_marks = self.template is not None and bool(GENERATION_MARK.search(COMMENT.sub("", self.template)))

    def messages(self, value: Any) -> str:
        """Return a conversation as a packed example, "" where it is missing.

        Raises:
            ValueError: for what is no conversation, or not one that the template can write and divide into turns.
        """
        if value is None:
            return ""
        messages = to_messages(value)
        if self.targets == "all":
            text = self.render(messages)
            return Example(text, [(0, len(text))], True).to_json()
        if self.has_marks:
            return self.render_with_generation_mask(messages).to_json()
        text, spans = self.render(messages), []
        for number, message in enumerate(messages):
            if message["role"] == "assistant":
                start, end = (self.prefix(text, messages[: number + i], is_prompt=i == 0) for i in (0, 1))
                spans.append((start, end))
        return Example(text, spans, True).to_json()

    def completion(self, prompt: Any, completion: Any) -> str:
        """Return a prompt and its completion, both texts or both lists of messages, as a packed example.

        A missing completion is no example (""); a missing prompt is an empty one.

        Raises:
            ValueError: as `messages`.
        """
        if completion is None or completion == "":
            return ""
        prompt = type(completion)() if prompt is None and isinstance(completion, (str, list)) else prompt
        if type(prompt) is str and type(completion) is str:
            text = prompt + completion
            return Example(text, [(0 if self.targets == "all" else len(prompt), len(text))], False).to_json()
        if type(prompt) is not list or type(completion) is not list:
            raise ValueError("must hold a prompt and a completion that are both texts, or both lists of messages")
        before, after = (to_messages(part) if part else [] for part in (prompt, completion))
        text, start = self.render(before + after), 0
        if before and self.targets != "all":
            start = self.prefix(text, before, is_prompt=bool(after) and after[0]["role"] == "assistant")
        return Example(text, [(start, len(text))], True).to_json()

    def prefix(self, text: str, messages: list[dict[str, str]], is_prompt: bool) -> int:
        """Return how long the beginning of `text` is that these messages are, with the opening of an answer if `is_prompt`."""
        beginning = self.render(messages, is_prompt) if messages or is_prompt else ""
        if not text.startswith(beginning):
            raise ValueError(
                f"cannot be divided into turns: with the chat template the first {len(messages)} messages are not the beginning "
                "of all; give --targets all, or a --chat_template with {% generation %} around the assistant's words"
            )
        return len(beginning)

    def render(self, messages: list[dict[str, str]], opens_answer: bool = False) -> str:
        return self.rendered(messages, add_generation_prompt=opens_answer)[0]

    def render_with_generation_mask(self, messages: list[dict[str, str]]) -> Example:
        text, spans = self.rendered(messages, return_assistant_tokens_mask=True)
        # Within macros and filters marks are counted from elsewhere. Then something outside follows what the assistant says.
        others = [{**m, "content": m["content"] + "x"} if m["role"] == "assistant" else m for m in messages]
        if text_outside_spans(text, spans) != text_outside_spans(*self.rendered(others, return_assistant_tokens_mask=True)):
            raise ValueError(
                "cannot be divided into turns: {% generation %} stands where its place in the text is not known, or not around "
                "all of the assistant's words; take it out of macros, filters and set blocks, or give --targets all"
            )
        return Example(text, [(start, end) for start, end in spans if start < end], True)

    def rendered(self, messages: list[dict[str, str]], **options) -> tuple[str, list[tuple[int, int]]]:
        """Return what the template makes of a conversation, and the places of its marks if asked for."""
        if self.tokenizer is None or self.template is None:
            raise ValueError("needs a chat template, which the model's tokenizer lacks: give one by --chat_template FILE")
        names: dict[str, Any] = self.tokenizer.special_tokens_map
        result: Any
        try:
            result = render_jinja_template([messages], chat_template=self.template, **options, **names)
        except Exception as error:  # the template is a program of the user's
            raise ValueError(f"does not fit the chat template: {str(error).strip() or type(error).__name__}") from error
        texts, marks = result
        return texts[0], marks[0] if marks else []


def text_outside_spans(text: str, spans: list[tuple[int, int]]) -> list[str]:
    """Return the parts of a text before, between and after the spans, which are in order."""
    bounds = [0, *(place for span in spans for place in span), len(text)]
    return [text[start:end] for start, end in zip(bounds[::2], bounds[1::2])]


def to_messages(value: Any) -> list[dict[str, str]]:
    """Check a list of messages.

    Raises:
        ValueError: saying what is wrong with it.
    """
    if type(value) is not list or not value:
        raise ValueError(f"must hold a list of messages, like [{{'role': 'user', 'content': '...'}}], not {str(value)[:40]!r}")
    messages = []
    for number, message in enumerate(value, 1):
        if type(message) is not dict:
            raise ValueError(f"has {str(message)[:40]!r} as message {number}: it must be an object with role and content")
        given = {name: part for name, part in message.items() if part is not None}
        for name in ("role", "content"):
            if type(given.get(name)) is not str:
                raise ValueError(f"has no text as {name!r} of message {number}: mend the row")
        if others := given.keys() - {"role", "content"}:
            raise ValueError(
                f"has {', '.join(map(repr, sorted(others)))} in message {number}: only role and content can be learned"
            )
        messages.append({"role": given["role"], "content": given["content"]})
    return messages


def resolve_bos_token(tokenizer: PreTrainedTokenizerBase, prepend_bos: bool = False) -> Optional[int]:
    """Return the token with which the tokenizer itself begins every text, as Llama's and Gemma's do; None if there is none.

    Args:
        prepend_bos: where it begins none, its start token, or else its end-of-text token, is to do so.
    """
    whole, bare = tokenizer("a")["input_ids"], tokenizer("a", add_special_tokens=False)["input_ids"]
    bos = tokenizer.bos_token_id
    if bos is not None and whole[:1] == [bos] != bare[:1]:
        return bos
    return (tokenizer.eos_token_id if bos is None else bos) if prepend_bos else None


def tokenize_examples(
    packed: list[str], tokenizer: PreTrainedTokenizerBase, start: list[int], end: list[int]
) -> tuple[list[list[int]], list[list[int]]]:
    """Return token ids and labels of packed examples; a token that holds a character of a target is a target.

    Args:
        start: the start token, if any; not repeated where the template wrote it.
        end: the end-of-text token, if asked for; a target, not repeated either.
    Returns:
        (ids, labels), a list of each for each example; a label is the token's own id, or IGNORED.
    """
    ids: list[list[int]] = [[] for _ in packed]
    labels: list[list[int]] = [[] for _ in packed]
    examples = [Example.from_json(text) for text in packed]
    for templated in (False, True):
        chosen = [i for i, example in enumerate(examples) if example.templated == templated and example.text]
        if not chosen:
            continue
        options = {"add_special_tokens": False, "split_special_tokens": not templated, "return_offsets_mapping": True}
        encoded = tokenizer([examples[i].text for i in chosen], **options, verbose=False)
        for i, row, places in zip(chosen, encoded["input_ids"], encoded["offset_mapping"]):
            targets = [
                token if is_target(place, examples[i].targets) else IGNORE_INDEX for token, place in zip(row, places, strict=True)
            ]
            before, after = start * (row[:1] != start), end * (row[-1:] != end)
            ids[i], labels[i] = before + row + after, [IGNORE_INDEX] * len(before) + targets + after
    return ids, labels


def is_target(place: tuple[int, int], targets: list[tuple[int, int]]) -> bool:
    return any(place[0] < end and place[1] > start for start, end in targets)
