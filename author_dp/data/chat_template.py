"""Render conversations with a tokenizer's chat template, and find what the template does with words and ends of turns.

Guarantees: a template that leaves out a message's words is noticed, whether it drops a role or what stands in a text.

A generator stops at a token, so a turn of the assistant must end with one that is learned. ChatML, for example, writes
<|im_end|>. GLM's template writes nothing: there the mark of the next role, <|user|>, ends a turn. Both are found by rendering a
short conversation (`ChatTemplate.turn_end`).

References:
    https://huggingface.co/docs/transformers/chat_templating
"""

import functools
import json
import re
from pathlib import Path
from typing import Any, NamedTuple, Optional

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from author_dp.errors import UserError

GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")  # in a template, before the assistant's words
COMMENT = re.compile(r"\{#.*?#\}", re.DOTALL)
WORD = "zq0qz"  # in place of a message's words, to find where a template writes them


class TemplateToken(NamedTuple):
    """A token, and where its name is in a text."""

    id: int
    start: int
    end: int


class TurnEnd(NamedTuple):
    """What ends a turn of the assistant, where an answer is learned."""

    token: Optional[int]  # id of the token that a generator stops at; None where no token of its own is learned
    borrowed: str  # begins the next turn, and is written after the last one; "" where the template itself ends a turn


class ChatTemplate:
    """The chat template of a tokenizer.

    Args:
        tokenizer: None where there are no conversations.
    Attributes:
        template: None where the tokenizer has none.
        has_marks: whether the template marks the assistant's words by {% generation %}.
    """

    def __init__(self, tokenizer: Optional[PreTrainedTokenizerBase]):
        self.tokenizer = tokenizer
        self.template = None if tokenizer is None else tokenizer.chat_template
        if isinstance(self.template, dict):  # some hub models have several, by name
            self.template = self.template.get("default")
        self.has_marks = self.template is not None and bool(GENERATION_MARK.search(COMMENT.sub("", self.template)))

    def render(self, messages: list[dict[str, str]], opens_answer: bool = False) -> str:
        """Return the text of a conversation, with the opening of an answer if `opens_answer`."""
        return self._apply_template(messages, add_generation_prompt=opens_answer)[0]

    def opening(self, messages: list[dict[str, str]]) -> str:
        """Return the text before the first message's words."""
        return self.render([{**messages[0], "content": WORD}, *messages[1:]]).partition(WORD)[0]

    def render_prompt(self, messages: list[dict[str, str]]) -> str:
        """Return the beginning of an answer to a conversation, which may be empty.

        Raises:
            ValueError: where the template cannot render it, or leaves out words.
        """
        if not messages:
            return self.opening([{"role": "assistant", "content": ""}])
        text = self.render(messages, opens_answer=True)
        self.check_words(messages, text)
        return text

    def check_words(self, messages: list[dict[str, str]], text: str) -> None:
        """Raise ValueError where a message's words are not in the text that the template makes of all messages."""
        missing = self.left_out(tuple(message["role"] for message in messages))
        if missing is None:
            normalized = normalize_template(text)
            forms = [(m["content"], json.dumps(m["content"], ensure_ascii=False)[1:-1]) for m in messages]
            missing = next(
                (i for i, pair in enumerate(forms) if not any(normalize_template(form) in normalized for form in pair)), None
            )
        if missing is not None:
            raise ValueError(
                f"loses words: the chat template leaves out those of message {missing + 1} ({messages[missing]['role']}). Remove "
                "the message, or give a --chat_template that writes it"
            )

    @functools.cache  # noqa: B019  # a formatter lives as long as its run
    def left_out(self, roles: tuple[str, ...]) -> Optional[int]:
        """Return the index of the first message of a conversation that the template leaves out; None if there is none."""
        words = [WORD.replace("0", str(number)) for number in range(len(roles))]
        text = self.render([{"role": role, "content": word} for role, word in zip(roles, words)])
        return next((i for i, word in enumerate(words) if word not in text.lower()), None)

    @functools.cached_property
    def turn_end(self) -> Optional[TurnEnd]:
        """What ends the assistant's turns, found by rendering a short conversation; None where the template cannot render it."""
        talk = [{"role": role, "content": word} for role, word in (("user", "zq1"), ("assistant", "zq2"), ("user", "zq3"))]
        try:
            text, longer = self.render(talk[:2]), self.render(talk)
            marks = self._apply_template(talk[:2], return_assistant_tokens_mask=True)[1] if self.has_marks else [(0, len(text))]
        except ValueError:
            return None
        closing = text[: marks[-1][1] if marks else 0].rpartition("zq2")[2]
        if (found := self.find_token(closing)) is not None:
            return TurnEnd(found.id, "")
        following = longer.rpartition("zq3")[0].rpartition("zq2")[2].removeprefix(closing)
        if self.has_marks or (found := self.find_token(following)) is None:
            return TurnEnd(None, "")
        return TurnEnd(found.id, following[: found.end])

    def find_token(self, text: str) -> Optional[TemplateToken]:
        """Return the first token in `text` that a template can write by its name, such as <|im_end|>."""
        assert self.tokenizer is not None
        names = {token.content: id_ for id_, token in self.tokenizer.added_tokens_decoder.items() if token.content.strip()}
        places = [(text.find(name), -len(name), name) for name in names if name in text]
        start, _, name = min(places, default=(0, 0, ""))
        return TemplateToken(names[name], start, start + len(name)) if name else None

    def _apply_template(self, messages: list[dict[str, str]], **options) -> tuple[str, list[tuple[int, int]]]:
        """Return the rendered text, and the spans of its generation marks if asked for."""
        if self.tokenizer is None or self.template is None:
            raise ValueError("needs a chat template, which the model's tokenizer lacks. Give one with --chat_template FILE")
        names: dict[str, Any] = self.tokenizer.special_tokens_map
        result: Any
        try:
            result = render_jinja_template([messages], chat_template=self.template, **options, **names)
        except Exception as error:  # a template is a program, and may raise anything
            reason = str(error).strip() or type(error).__name__
            raise ValueError(f"does not fit the chat template: {reason}. Fix the row or the template") from error
        texts, marks = result
        return texts[0], marks[0] if marks else []


def normalize_template(text: str) -> str:
    """Return a text without the differences that templates make: of case, and of white space."""
    return " ".join(text.casefold().split())


def set_chat_template(tokenizer: PreTrainedTokenizerBase, path: Optional[str]) -> None:
    """Give the tokenizer the chat template in a file, if one is named."""
    if path is None:
        return
    try:
        tokenizer.chat_template = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise UserError(f"--chat_template {path}: it cannot be read ({error}). Name a file with a Jinja template") from error
