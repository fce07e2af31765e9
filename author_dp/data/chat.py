"""Format prompts with completions, and conversations, as texts with target spans.

Guarantees: targets are exact positions in the text that the model reads, never found by searching for words. A conversation
without such positions is an error, and so is one of which the template leaves out words.

The columns are those of TRL [1]: "prompt" and "completion", texts or lists of messages; or "messages", a list of {"role",
"content"}. Where the chat template marks the assistant's words ({% generation %}), these marks are used. Otherwise a turn of the
assistant begins where the rendered conversation before it ends, including the template's opening of an answer. It ends where the
rendered conversation up to it ends. Each of these must be an exact prefix of the complete text. Some templates, as GLM's, end a
turn by the mark of the next role alone: there this mark is learned, and written after the last turn (`TurnEnd`).

Example:

    >>> ChatFormatter(None, "assistant").format_completion("two and two?", " four").targets
    [(12, 17)]

References:
    [1] https://huggingface.co/docs/trl/dataset_formats
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Optional

from tokenizers.processors import ByteLevel
from transformers import PreTrainedTokenizerBase

from author_dp.data.chat_template import ChatTemplate
from author_dp.types import IGNORE_INDEX

TARGETS = ("assistant", "all")


class ChatExample(NamedTuple):
    """A text, and the spans of its characters to learn. `columns.EXAMPLE_TYPE` is its type in Arrow."""

    text: str
    targets: Sequence[Sequence[int]]  # (start, end), in order, disjoint
    is_templated: bool  # whether a chat template rendered it, so that its special tokens are tokens


class ChatFormatter(ChatTemplate):
    """Format rows as examples.

    Args:
        tokenizer: its chat template renders conversations; None where there are none.
        targets: "assistant" (the assistant's turns, completions) or "all" of an example.
    """

    def __init__(self, tokenizer: Optional[PreTrainedTokenizerBase], targets: str):
        super().__init__(tokenizer)
        self.targets = targets

    def format_messages(self, value: Any) -> Optional[ChatExample]:
        """Return a conversation as an example, None where it is missing.

        Raises:
            ValueError: where it is no conversation, or the template cannot render it or divide it into turns.
        """
        if value is None:
            return None
        messages = to_messages(value)
        text = self.render_all(messages)
        if not any(m["content"].strip() for m in messages if self.targets == "all" or m["role"] == "assistant"):
            return None  # a missing text, whatever the template adds
        if self.targets == "all":
            return ChatExample(text, [(0, len(text))], True)
        if self.has_marks:
            return self.render_with_generation_mask(messages)
        spans = []
        for number, message in enumerate(messages):
            if message["role"] == "assistant":
                start = (
                    self.prefix_length(text, messages[:number], is_prompt=True) if number else self.first_content(text, messages)
                )
                end = self.prefix_length(text, messages[: number + 1], is_prompt=False)
                spans.append((start, end + self.borrowed_length(text[end:])))
        return ChatExample(text, spans, True)

    def format_completion(self, prompt: Any, completion: Any) -> Optional[ChatExample]:
        """Return a prompt and its completion as an example.

        Both are texts, or both are lists of messages. A missing completion gives None, no example, and so do messages without
        words. A missing prompt is empty.

        Raises:
            ValueError: as `format_messages`.
        """
        if completion is None or completion in ("", []):
            return None
        prompt = type(completion)() if prompt is None and isinstance(completion, (str, list)) else prompt
        if type(prompt) is str and type(completion) is str:
            text = prompt + completion
            return ChatExample(text, [(0 if self.targets == "all" else len(prompt), len(text))], False)
        if type(prompt) is not list or type(completion) is not list:
            raise ValueError("must hold a prompt and a completion that are both texts, or both lists of messages")
        before, after = (to_messages(value) if value else [] for value in (prompt, completion))
        text, start = self.render_all(before + after), 0
        if not any(message["content"].strip() for message in after):
            return None
        if self.targets != "all":
            is_answer = after[0]["role"] == "assistant"
            start = self.prefix_length(text, before, is_prompt=is_answer) if before else self.first_content(text, after)
        return ChatExample(text, [(start, len(text))], True)

    def prefix_length(self, text: str, messages: list[dict[str, str]], is_prompt: bool) -> int:
        """Return the length of the prefix of `text` that these messages render to.

        Args:
            is_prompt: whether the prefix includes the template's opening of an answer.
        Raises:
            ValueError: where they render to no prefix.
        """
        return common_chat_length(self.render(messages, is_prompt), text, len(messages))

    def first_content(self, text: str, messages: list[dict[str, str]]) -> int:
        """Return the position in `text` of the first message's words, after a system prompt that the template adds.

        Many templates cannot render the empty conversation before it.
        """
        return common_chat_length(self.opening(messages), text, 0)

    def render_all(self, messages: list[dict[str, str]]) -> str:
        """Return the text of a conversation to learn, with the end of the assistant's last turn.

        Raises:
            ValueError: where the template cannot render it, or leaves out words.
        """
        text = self.render(messages)
        self.check_words(messages, text)
        return text + self.turn_end.borrowed if messages[-1]["role"] == "assistant" and self.turn_end else text

    def borrowed_length(self, text: str) -> int:
        """Return the length of the mark that begins the next turn's `text`, where marks end the turns before them."""
        if not self.turn_end or not self.turn_end.borrowed:
            return 0
        found = self.find_token(text)
        return found.end if found and not text[: found.start].strip() else 0

    def render_with_generation_mask(self, messages: list[dict[str, str]]) -> ChatExample:
        """Return a conversation with the template's {% generation %} spans as targets."""
        text, spans = self._apply_template(messages, return_assistant_tokens_mask=True)
        # Inside macros and filters, transformers counts positions from another start. Text outside the spans then depends on the
        # assistant's words: change these words, and compare.
        changed = [{**m, "content": m["content"] + "x"} if m["role"] == "assistant" else m for m in messages]
        expected = text_outside_spans(*self._apply_template(changed, return_assistant_tokens_mask=True))
        if text_outside_spans(text, spans) != expected:
            raise ValueError(
                "cannot be divided into turns: {% generation %} is where its position in the text is unknown, or not around all "
                "of the assistant's words. Move it out of macros, filters and set blocks, or give --targets all"
            )
        return ChatExample(text, [(start, end) for start, end in spans if start < end], True)


def common_chat_length(prefix: str, text: str, num_messages: int) -> int:
    """Return the length of `prefix`; raise ValueError unless `text` begins with it.

    Args:
        num_messages: whose text the prefix is.
    """
    if not text.startswith(prefix):
        raise ValueError(
            f"cannot be divided into turns: in the chat template's text, the first {num_messages} messages are no prefix of all. "
            "Give --targets all, or a --chat_template with {% generation %} around the assistant's words"
        )
    return len(prefix)


def missing_chat_end_warning(formatter: ChatFormatter, is_templated: bool) -> Optional[str]:
    """Return a warning where nothing ends what is learned, so that a generator will not learn to stop; None otherwise.

    Args:
        is_templated: whether a chat template rendered the run's examples.
    """
    if not is_templated:
        return "Completions have no end to learn, so a generator goes on to --max_new_tokens. Add --append_eos to learn one"
    if formatter.turn_end is None or formatter.turn_end.token is not None:
        return None
    where = "marks no token" if formatter.has_marks else "has no token"
    return (
        f"The chat template {where} that ends the assistant's turns, so a generator goes on to --max_new_tokens. Add "
        "--append_eos, or give a --chat_template whose turns end with a special token"
    )


def text_outside_spans(text: str, spans: list[tuple[int, int]]) -> list[str]:
    """Return the pieces of a text before, between and after ordered spans."""
    bounds = [0, *(position for span in spans for position in span), len(text)]
    return [text[start:end] for start, end in zip(bounds[::2], bounds[1::2])]


def to_messages(value: Any) -> list[dict[str, str]]:
    """Check a list of messages, and return role and content of each.

    Raises:
        ValueError: with the message at fault.
    """
    if type(value) is not list or not value:
        raise ValueError(f"must hold a list of messages like [{{'role': 'user', 'content': '...'}}], not {str(value)[:40]!r}")
    messages = []
    for number, message in enumerate(value, 1):
        if type(message) is not dict:
            raise ValueError(f"has {str(message)[:40]!r} as message {number}. Write an object with role and content")
        given = {name: value for name, value in message.items() if value is not None}
        for name in ("role", "content"):
            if type(given.get(name)) is not str:
                raise ValueError(f"has no text as {name!r} of message {number}. Fix the row")
        if others := given.keys() - {"role", "content"}:
            raise ValueError(
                f"has {', '.join(map(repr, sorted(others)))} in message {number}. Remove it: only role and content can be learned"
            )
        messages.append({"role": given["role"], "content": given["content"]})
    return messages


def resolve_bos_token(tokenizer: PreTrainedTokenizerBase, prepend_bos: bool = False) -> Optional[int]:
    """Return the token that the tokenizer puts before every text; None if there is none.

    Llama's and Gemma's tokenizers have one, GPT-2's has none.

    Args:
        prepend_bos: where there is none, return the start token, or else the end-of-text token.
    """
    complete, bare = tokenizer("a")["input_ids"], tokenizer("a", add_special_tokens=False)["input_ids"]
    bos = tokenizer.bos_token_id
    if bos is not None and complete[:1] == [bos] != bare[:1]:
        return bos
    return (tokenizer.eos_token_id if bos is None else bos) if prepend_bos else None


def tokenize_chat_examples(
    examples: Sequence[Optional[ChatExample]], tokenizer: PreTrainedTokenizerBase, start: list[int], end: list[int]
) -> tuple[list[list[int]], list[list[int]]]:
    """Return token IDs and labels of examples.

    A token is a target if it has a character of a target.

    Args:
        examples: None where one is missing.
        start: the start token, if any; not repeated where the template wrote it.
        end: the end-of-text token, if asked for; a target, not repeated either.
    Returns:
        (ids, labels), a list of each per example; a label is the token's ID, or IGNORE_INDEX.
    """
    ids: list[list[int]] = [[] for _ in examples]
    labels: list[list[int]] = [[] for _ in examples]
    for is_templated in (False, True):
        present = ((i, example) for i, example in enumerate(examples) if example and example.text)
        chosen = {i: example for i, example in present if example.is_templated == is_templated}
        if not chosen:
            continue
        options = {"add_special_tokens": False, "split_special_tokens": not is_templated, "return_offsets_mapping": True}
        with untrimmed_offsets(tokenizer):
            encoded = tokenizer([example.text for example in chosen.values()], **options, verbose=False)
        for (i, example), row, spans in zip(chosen.items(), encoded["input_ids"], encoded["offset_mapping"]):
            targets = [
                token if any(first < end and last > begin for begin, end in example.targets) else IGNORE_INDEX
                for token, (first, last) in zip(row, spans, strict=True)
            ]
            before, after = start * (row[:1] != start), end * (row[-1:] != end)
            ids[i], labels[i] = before + row + after, [IGNORE_INDEX] * len(before) + targets + after
    return ids, labels


@contextmanager
def untrimmed_offsets(tokenizer: PreTrainedTokenizerBase) -> Iterator[None]:
    """Inside, a token's offsets include its white space, which some post-processors leave out of them.

    A token of white space alone would have no character otherwise. Nothing else of a post-processor is needed: it adds special
    tokens, which `tokenize_chat_examples` does itself.
    """
    backend = tokenizer.backend_tokenizer
    processor, backend.post_processor = backend.post_processor, ByteLevel(trim_offsets=False)
    try:
        yield
    finally:
        backend.post_processor = processor
