"""What a generator begins with: nothing, a fixed text, or a prompt for each row of a file.

Promise: a model reads prompts as it read them in training: the same start token, the same chat template, and text that is spelled
like a special token is text. A row that makes no prompt is an error that names it.

Example:

    >>> prompts = make_prompts(tokenizer, None, Source(template="about chess:"))
    >>> prompts[0].row
    {'prompt': 'about chess:'}
"""

import string
from collections.abc import Iterator
from typing import Any, NamedTuple, Optional

from transformers import PreTrainedTokenizerBase

from author_dp.data.chat import ChatFormatter, Example, resolve_bos_token, to_messages, tokenize_examples
from author_dp.data.readers import read_rows
from author_dp.errors import UserError


class Source(NamedTuple):
    """Where prompts come from, as the options say."""

    file: Optional[str] = None
    column: str = "prompt"
    messages: Optional[str] = None  # column of conversations
    template: Optional[str] = None  # a text with {column}s
    keep: tuple[str, ...] = ()  # columns that go to the output
    chat: bool = False  # whether a text is what the user says, for the chat template to write


class Prompt(NamedTuple):
    """What one text begins with."""

    ids: list[int]  # token ids
    row: dict[str, Any]  # what stands beside the text in the output


def make_prompts(tokenizer: PreTrainedTokenizerBase, begin: Optional[str], source: Source) -> list[Prompt]:
    """Return the prompts, one where there is no file.

    Args:
        begin: the token that the model's training texts began with, if that is known.
    Raises:
        UserError: for a file, row, column or template that makes no prompt.
    """
    named = template_fields(source.template) if source.template is not None else []
    if named and source.file is None:
        raise UserError(f"--prompt_template names the column {named[0]!r}, and there is no --prompts FILE that has it: give one")
    form = ChatFormatter(tokenizer, "assistant")
    if (source.chat or source.messages) and form.template is None:
        raise UserError("--chat, or --messages_column: the tokenizer in FOLDER has no chat template; leave it out")
    if source.file is None:
        rows: Iterator[tuple[str, dict[str, Any]]] = iter([("--prompt_template", {})])
    else:
        rows = ((f"--prompts {source.file}, row {number}", row) for number, row in enumerate(read_rows(source.file), 1))
    examples, beside = [], []
    for place, row in rows:
        example, columns = render_prompt(row, source, named, form, place)
        examples.append(example.to_json())
        beside.append(columns)
    if not examples:
        raise UserError(f"--prompts {source.file} holds no rows: give a file with one prompt a row")
    start = start_ids(tokenizer, begin)
    ids, _ = tokenize_examples(examples, tokenizer, start, [])
    if empty := [number for number, prompt in enumerate(ids, 1) if not (prompt or start or default_start_ids(tokenizer))]:
        raise UserError(
            f"--prompts, row {empty[0]}: it is empty, and the tokenizer has no token that begins a text: give a prompt"
        )
    return [Prompt(prompt or start or default_start_ids(tokenizer), columns) for prompt, columns in zip(ids, beside)]


def render_prompt(
    row: dict[str, Any], source: Source, named: list[str], form: ChatFormatter, place: str
) -> tuple[Example, dict[str, Any]]:
    """Return what a text of this row begins with, and its columns in the output."""
    kept = {name: value_of(row, name, place) for name in dict.fromkeys([*source.keep, *named])}
    if source.messages is not None:
        given: Any = value_of(row, source.messages, place)
    elif source.template is not None:
        given = "".join(
            literal + (text_of(row, name, place) if name is not None else "")
            for literal, name, _, _ in string.Formatter().parse(source.template)
        )
    elif source.file is not None:
        given = value_of(row, source.column, place)
    else:
        return Example("", [], False), kept
    if isinstance(given, str) and source.messages is None:
        if not source.chat:
            return Example(given, [], False), {**kept, "prompt": given}
        given = [{"role": "user", "content": given}]
    try:
        messages = to_messages(given)
        if messages[-1]["role"] == "assistant":  # whose words are to be written
            messages = messages[:-1]
        text = form.render(messages, opens_answer=True)
    except ValueError as error:
        raise UserError(f"{place} {error}") from error
    return Example(text, [], True), {**kept, "messages": messages}


def template_fields(template: str) -> list[str]:
    """Return the columns that a template names, like {topic}; {{ and }} are braces."""
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise UserError(f"--prompt_template {template!r}: {error}; write {{{{ and }}}} for braces that are text") from error
    for _, name, form, conversion in parts:
        if name is not None and (not name.strip() or any(sign in name for sign in ".[]") or form or conversion):
            raise UserError(f"--prompt_template {template!r}: {{{name}}} must be the name of a column, and nothing else")
    return [name for _, name, _, _ in parts if name is not None]


def value_of(row: dict[str, Any], name: str, place: str) -> Any:
    if name not in row:
        raise UserError(f"{place} has no column {name!r}: its columns are {', '.join(map(str, row))}")
    return row[name]


def text_of(row: dict[str, Any], name: str, place: str) -> str:
    value = value_of(row, name, place)
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise UserError(f"{place} holds {str(value)[:40]!r} as {name!r}, neither text nor a number: mend the row")
    return str(value)


def start_ids(tokenizer: PreTrainedTokenizerBase, begin: Optional[str]) -> list[int]:
    """Return the token with which training texts began, as a list of one, or of none."""
    token: Any = resolve_bos_token(tokenizer)
    if token is None and begin is not None:
        token = tokenizer.convert_tokens_to_ids(begin)
    return [] if token is None else [int(token)]


def default_start_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return what to begin with where nothing does: a model must read one token to write the next."""
    tokens = [token for token in (tokenizer.bos_token_id, tokenizer.eos_token_id) if token is not None]
    return [int(token) for token in tokens[:1]]
