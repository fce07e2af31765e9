"""Make the prompts of synthetic texts: none, a fixed text, or one for each row of a file.

Guarantees: the model reads prompts as it read texts in training, with the same start token and chat template. Text that is
spelled like a special token is text. A row that makes no prompt is an error that names the row.

Example:

    >>> prompts = make_prompts(tokenizer, None, PromptSource(template="about chess:"))
    >>> prompts[0].row
    {'prompt': 'about chess:'}
"""

import json
import string
from collections.abc import Iterator
from typing import Any, NamedTuple, Optional

from transformers import PreTrainedTokenizerBase

from author_dp.data.chat import ChatExample, ChatFormatter, resolve_bos_token, to_messages, tokenize_chat_examples
from author_dp.data.readers import is_encodable, read_rows
from author_dp.errors import UserError


class PromptSource(NamedTuple):
    """Where prompts come from, by the options."""

    file: Optional[str] = None
    column: str = "prompt"
    messages: Optional[str] = None  # column of conversations
    template: Optional[str] = None  # a text with {column}s
    keep: tuple[str, ...] = ()  # columns that are copied to the output
    chat: bool = False  # whether a text is a user message, to be rendered by the chat template


class Prompt(NamedTuple):
    """The beginning of one text."""

    ids: list[int]  # token ids
    row: dict[str, Any]  # further columns of the output


def make_prompts(tokenizer: PreTrainedTokenizerBase, start_token: Optional[str], source: PromptSource) -> list[Prompt]:
    """Return the prompts; a single one if there is no file.

    Args:
        start_token: the token that training texts began with, if known.
    Raises:
        UserError: for a file, row, column or template that makes no prompt.
    """
    fields = prompt_template_fields(source.template) if source.template is not None else []
    if fields and source.file is None:
        raise UserError(f"--prompt_template names the column {fields[0]!r}, but there is no --prompts FILE that has it: give one")
    formatter = ChatFormatter(tokenizer, "assistant")
    if (source.chat or source.messages) and formatter.template is None:
        raise UserError("--chat, or --messages_column: the tokenizer in FOLDER has no chat template; leave it out")
    rendered = [render_encodable_prompt(row, source, fields, formatter, place) for place, row in prompt_rows(source)]
    if not rendered:
        raise UserError(f"--prompts {source.file} holds no rows: give a file with one prompt per row")
    start = prompt_start_ids(tokenizer, start_token)
    ids, _ = tokenize_chat_examples([example for example, _ in rendered], tokenizer, start, [])
    default = start or default_prompt_start_ids(tokenizer)
    if not default and (empty := [number for number, prompt in enumerate(ids, 1) if not prompt]):
        raise UserError(
            f"--prompts, row {empty[0]}: it is empty, and the tokenizer has no token that begins a text: give a prompt"
        )
    return [Prompt(prompt or default, columns) for prompt, (_, columns) in zip(ids, rendered)]


def prompt_rows(source: PromptSource) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each row of the file, and its place for error messages; one empty row if there is no file."""
    if source.file is None:
        yield "--prompt_template", {}
        return
    for number, row in enumerate(read_rows(source.file), 1):
        yield f"--prompts {source.file}, row {number}", row


def render_encodable_prompt(row: dict[str, Any], *source: Any) -> tuple[ChatExample, dict[str, Any]]:
    """Return `render_prompt`; raise UserError where a text of it cannot be written as UTF-8."""
    example, columns = render_prompt(row, *source)
    if not is_encodable(json.dumps([example.text, columns], ensure_ascii=False, default=str)):
        raise UserError(f"{source[-1]}: a text in it cannot be written as UTF-8 (half of a surrogate pair). Remove it")
    return example, columns


def render_prompt(
    row: dict[str, Any], source: PromptSource, fields: list[str], formatter: ChatFormatter, place: str
) -> tuple[ChatExample, dict[str, Any]]:
    """Return the beginning of the row's text, and the further columns of its output."""
    columns = {name: get_prompt_value(row, name, place) for name in dict.fromkeys([*source.keep, *fields])}
    if source.messages is not None:
        prompt: Any = get_prompt_value(row, source.messages, place)
    elif source.template is not None:
        prompt = "".join(
            literal + (get_prompt_text(row, name, place) if name is not None else "")
            for literal, name, _, _ in string.Formatter().parse(source.template)
        )
    elif source.file is not None:
        prompt = get_prompt_value(row, source.column, place)
    else:
        return ChatExample("", [], False), columns
    if isinstance(prompt, str) and source.messages is None:
        if not source.chat:
            return ChatExample(prompt, [], False), {**columns, "prompt": prompt}
        prompt = [{"role": "user", "content": prompt}]
    try:
        messages = to_messages(prompt)
        if messages[-1]["role"] == "assistant":  # the answer that the model is to write instead
            messages = messages[:-1]
        text = formatter.render_prompt(messages)
    except ValueError as error:
        raise UserError(f"{place} {error}") from error
    return ChatExample(text, [], True), {**columns, "messages": messages}


def prompt_template_fields(template: str) -> list[str]:
    """Return the columns that a template names, like {topic}; {{ and }} are literal braces."""
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise UserError(f"--prompt_template {template!r}: {error}; write {{{{ and }}}} for literal braces") from error
    for _, name, format_spec, conversion in parts:
        if name is not None and (not name.strip() or any(sign in name for sign in ".[]") or format_spec or conversion):
            raise UserError(f"--prompt_template {template!r}: {{{name}}} must be the name of a column, and nothing else")
    return [name for _, name, _, _ in parts if name is not None]


def get_prompt_value(row: dict[str, Any], name: str, place: str) -> Any:
    if name not in row:
        raise UserError(f"{place} has no column {name!r}: its columns are {', '.join(map(str, row))}")
    return row[name]


def get_prompt_text(row: dict[str, Any], name: str, place: str) -> str:
    value = get_prompt_value(row, name, place)
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise UserError(f"{place} holds {str(value)[:40]!r} as {name!r}, neither text nor a number: fix the row")
    return str(value)


def prompt_start_ids(tokenizer: PreTrainedTokenizerBase, start_token: Optional[str]) -> list[int]:
    """Return the token that training texts began with, as a list of one; an empty list if there was none."""
    token: Any = resolve_bos_token(tokenizer)
    if token is None and start_token is not None:
        token = tokenizer.convert_tokens_to_ids(start_token)
    return [] if token is None else [int(token)]


def default_prompt_start_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return a token for empty prompts: a model must read one to write the next."""
    tokens = [token for token in (tokenizer.bos_token_id, tokenizer.eos_token_id) if token is not None]
    return [int(token) for token in tokens[:1]]
