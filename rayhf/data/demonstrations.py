"""Demonstrations: conversations whose assistant turns are trained on, token by token.

A row has `messages` with assistant turns, or a prompt with `completion` (or `response`), of which
only the completion is trained on. The sequence is the conversation as the chat template renders it,
up to the last trained turn. Its mask marks what the model generates: the assistant's tokens and the
token that ends its turn, nothing of the template around them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rayhf.data.chat import Chat
from rayhf.data.columns import Row
from rayhf.data.conversations import message_list, parse_tools
from rayhf.data.examples import EncodedExample, EncodedRow, content_id, encoded_row
from rayhf.data.responses import Messages, completion_of, prompt_of
from rayhf.errors import ConfigError

Tools = Sequence[Mapping[str, Any]] | None


def encode_demonstration(row: Row, where: str, chat: Chat, *, last_only: bool) -> EncodedExample:
    """Return a row's conversation as an example with the scalar `trained_tokens`.

    Args:
        row: of the source.
        where: how error messages name it.
        chat: the policy's chat template.
        last_only: train on the last assistant turn only.

    Raises ConfigError for a malformed row, and for a chat template under which the assistant's
    tokens cannot be located.
    """
    messages, last_only = _conversation(row, where, last_only)
    tools = parse_tools(row, where)
    encoded = encode_conversation(messages, where, chat, tools=tools, last_only=last_only)
    return EncodedExample(
        prompt_id=content_id("demonstration", messages, tools),
        rows=(encoded,),
        scalars={"trained_tokens": float(encoded.trained_tokens)},
    )


def _conversation(row: Row, where: str, last_only: bool) -> tuple[Messages, bool]:
    """Return the messages up to the last assistant turn, and whether only that one is trained."""
    given = any(row.get(field) is not None for field in ("completion", "response"))
    if given:
        completion = completion_of(row, prompt_of(row, where), where)
        assert completion is not None
        prompt, text = completion
        messages: Messages = (*prompt, {"role": "assistant", "content": text})
        last_only = True
    elif row.get("messages") is not None:
        messages = message_list(row["messages"], "messages", where)
    else:
        raise ConfigError(
            f"{where}: expected `messages`, or `prompt` with `completion`, got keys "
            f"{', '.join(sorted(row)) or 'nothing'}"
        )
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not turns:
        raise ConfigError(f"{where}: `messages` has no assistant turn to train on")
    if turns[0] == 0:
        raise ConfigError(f"{where}: `messages` begins with the assistant; expected a prompt first")
    return messages[: turns[-1] + 1], last_only


def encode_conversation(
    messages: Messages, where: str, chat: Chat, *, tools: Tools, last_only: bool
) -> EncodedRow:
    """Return the tokens of a conversation that ends with an assistant turn, and their mask.

    The first trained token begins the response; tokens of later turns that are not trained on are
    masked. A template with `{% generation %}` marks the trained text itself.
    """
    messages = tuple(_without_end(message, chat) for message in messages)
    if chat.marks_generation:
        ids, mask = chat.generation_mask(messages, tools=tools, where=where)
        mask = _with_end_tokens(ids, mask, chat.end_token_id)
    else:
        ids, mask = _mask_by_prefixes(messages, where, chat, tools=tools, last_only=last_only)
    if last_only:
        mask = _last_run(mask)
    if True not in mask:
        raise ConfigError(f"{where}: the chat template renders no text of an assistant turn")
    first = mask.index(True)
    end = len(mask) - mask[::-1].index(True)
    if first == 0:
        raise ConfigError(f"{where}: the chat template renders nothing before the assistant's text")
    return encoded_row(ids[:first], ids[first:end], mask[first:end])


def _without_end(message: Any, chat: Chat) -> Any:
    """Return the message without an end-of-turn token, which the template adds."""
    end = chat.end_token
    if message["role"] != "assistant" or not end or not message["content"].endswith(end):
        return message
    return {**message, "content": message["content"].removesuffix(end)}


def _mask_by_prefixes(
    messages: Messages, where: str, chat: Chat, *, tools: Tools, last_only: bool
) -> tuple[list[int], list[bool]]:
    """Locate each assistant turn by rendering the conversation before it and up to its end."""
    whole = chat.template(messages, tools=tools, where=where)
    spans = []
    for turn, message in enumerate(messages):
        last = turn == len(messages) - 1
        if message["role"] != "assistant" or (last_only and not last):
            continue
        before = chat.template(messages[:turn], tools=tools, generation_prompt=True, where=where)
        upto = whole if last else chat.template(messages[: turn + 1], tools=tools, where=where)
        upto = chat.without_space_after_end(upto)
        if not (whole.startswith(upto) and upto.startswith(before)):
            remedy = "" if last else "algorithm.last_only: true, or "
            raise ConfigError(
                f"{where}: the chat template does not render message {turn + 1} as a continuation "
                "that later turns leave unchanged (some leave out earlier thinking), so its tokens "
                f"cannot be located; expected {remedy}a template with {{% generation %}}"
            )
        spans.append((len(before), len(upto)))
    ids, offsets = chat.tokens_with_offsets(whole)
    mask = [any(start <= begin < end for start, end in spans) for begin, _ in offsets]
    return ids, mask


def _with_end_tokens(ids: Sequence[int], mask: Sequence[bool], end_id: int | None) -> list[bool]:
    """Return the mask with the end-of-turn token that follows a marked text."""
    return [
        marked or (number > 0 and mask[number - 1] and ids[number] == end_id)
        for number, marked in enumerate(mask)
    ]


def _last_run(mask: Sequence[bool]) -> list[bool]:
    """Return the mask with its last consecutive run only."""
    end = len(mask) - list(mask)[::-1].index(True) if True in mask else 0
    start = end
    while start and mask[start - 1]:
        start -= 1
    return [start <= number < end for number in range(len(mask))]
