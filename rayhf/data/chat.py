"""Chat templates: conversations of text to token ids.

Text that a model generated is escaped before it is rendered into another prompt, so that it cannot
end a turn or begin one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from functools import cached_property
from itertools import groupby
from typing import TYPE_CHECKING, Any

from rayhf.errors import ConfigError, clean_line
from rayhf.types import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rayhf.data.jinja_sandbox import TemplateFailedError


_MAX_PASSES = 16
"""Passes over a text that break up special tokens; after them, every two characters are parted."""


def render(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, where: str
) -> tuple[int, ...]:
    """Return the token ids of a conversation under the chat template, generation prompt included.

    Raises ConfigError as `render_prompt` and `encode_prompts`.
    """
    text = render_prompt(tokenizer, messages, where=where)
    (token_ids,) = encode_prompts(tokenizer, [(where, text)])
    return tuple(token_ids)


Conversation = tuple[str, Sequence[Message], Sequence[Mapping[str, Any]] | None]
"""(where, messages, tools); error messages about it begin with `where`."""


def render_prompt(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, where: str
) -> str:
    """Return a conversation under the chat template, as `render_prompts`."""
    (text,) = render_prompts(tokenizer, [(where, messages, None)])
    return text


def render_prompts(
    tokenizer: PreTrainedTokenizerBase, conversations: Sequence[Conversation]
) -> list[str]:
    """Return conversations under the chat template, generation prompt included.

    Raises ConfigError, beginning with `where`, if the template refuses the messages or leaves the
    question out.
    """
    texts = render_texts(tokenizer, conversations, generation_prompt=True)
    for (where, messages, _), text in zip(conversations, texts, strict=True):
        last = messages[-1]
        if last["role"] == "user" and last["content"].strip() not in text:
            raise ConfigError(
                f"{where}: the chat template leaves out the content of the last message, it "
                f"renders {text[-80:]!r}; set policy.chat_template to one that writes it"
            )
    return texts


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[tuple[str, str]]
) -> list[list[int]]:
    """Return the token ids of (where, rendered text).

    Special tokens are the template's own; the tokenizer adds none. Raises ConfigError, beginning
    with `where`, for a text without tokens.
    """
    if not texts:
        return []
    ids: list[list[int]] = tokenizer([text for _, text in texts], add_special_tokens=False)[
        "input_ids"
    ]
    for (where, _), token_ids in zip(texts, ids, strict=True):
        if not token_ids:
            raise ConfigError(f"{where}: the chat template renders nothing")
    return ids


def render_text(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    generation_prompt: bool,
    where: str,
) -> str:
    """Return a conversation under the chat template.

    Raises ConfigError, beginning with `where`, if the template refuses the messages, fails, or
    prints the date.
    """
    (text,) = render_texts(
        tokenizer, [(where, messages, tools)], generation_prompt=generation_prompt
    )
    return text


def render_texts(
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Conversation],
    *,
    generation_prompt: bool,
) -> list[str]:
    """Return conversations under the chat template.

    The template runs in a process with limits (jinja_sandbox.py). Raises ConfigError, beginning
    with `where`, if the template refuses the messages, fails, exceeds a limit, or prints the date.
    """
    from rayhf.data.jinja_sandbox import TemplateFailedError, evaluate

    names = {
        name: list(map(str, value)) if isinstance(value, list | tuple) else str(value)
        for name, value in tokenizer.special_tokens_map.items()
    }
    texts: list[str] = []
    # A tokenizer may have a template of its own for tools.
    for has_tools, group in groupby(conversations, key=lambda one: bool(one[2])):
        own = list(group)
        try:
            source = tokenizer.get_chat_template(None, [{}] if has_tools else None)
        except ValueError as error:  # a tokenizer without one
            raise ConfigError(
                f"{own[0][0]}: the chat template fails: {clean_line(str(error))}"
            ) from None
        variables = [
            {
                **names,
                "messages": messages,
                "tools": None if tools is None else list(tools),
                "documents": None,
                "add_generation_prompt": generation_prompt,
            }
            for _, messages, tools in own
        ]
        try:
            results = list(evaluate("chat", source, variables))
        except TemplateFailedError as problem:
            raise ConfigError(f"{own[0][0]}: {_refusal(problem)}") from None
        for (where, _, _), text in zip(own, results, strict=True):
            if isinstance(text, TemplateFailedError):
                raise ConfigError(f"{where}: {_refusal(text)}")
            texts.append(text)
    return texts


def _refusal(problem: TemplateFailedError) -> str:
    if problem.kind == "ClockError":
        return (
            f"the chat template prints the date (strftime_now({problem.message!r})), so the prompt "
            "would change from day to day; set policy.chat_date to the date that it shall print, "
            f"for example {date.today()}"
        )
    if problem.line is not None and problem.refuses:
        return f"the chat template is not valid Jinja: {problem.message}, line {problem.line}"
    if problem.refuses:
        return f"the chat template refuses the messages ({problem.message})"
    return f"the chat template fails: {problem}"


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return every special token that a text could contain, longer ones first."""
    tokens = {
        *tokenizer.all_special_tokens,
        *(str(t) for t in tokenizer.added_tokens_decoder.values() if t.special),
    }
    return sorted(
        (token for token in tokens if len(token) > 1), key=lambda token: (-len(token), token)
    )


def special_token_escaper(tokenizer: PreTrainedTokenizerBase) -> Callable[[str], str]:
    """Return a function that breaks up every special token in a text with a space.

    Tokens of white space only stay: they end no turn. Raises ConfigError for a token that spaces do
    not break up.
    """
    tokens = [token for token in special_tokens(tokenizer) if not token.isspace()]
    for token in tokens:
        if " " in token and {" "} in (set(token[::2]), set(token[1::2])):
            raise ConfigError(
                f"the tokenizer has the special token {token!r:.60}, which a space in a text does "
                "not break up; remove it from the model's tokenizer"
            )
    special = re.compile("|".join(map(re.escape, tokens)) or r"(?!)")

    def escape(text: str) -> str:
        broken = text
        for _ in range(_MAX_PASSES):  # several, because tokens may overlap
            if not special.search(broken):
                return broken
            broken = special.sub(lambda match: f"{match[0][0]} {match[0][1:]}", broken)
            if len(broken) > 2 * len(text):
                break
        return " ".join(text)

    return escape


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return the special token that the chat template writes after an assistant's turn.

    None where it writes none, or takes no such conversation.
    """
    answer = "the answer of the assistant"
    turns = [{"role": "user", "content": "a question"}, {"role": "assistant", "content": answer}]
    try:
        text = render_text(tokenizer, turns, generation_prompt=False, where="chat template")
    except ConfigError:
        return None
    _, found, rest = text.rpartition(answer)
    tokens = special_tokens(tokenizer) if found else []
    return next((token for token in tokens if rest.lstrip().startswith(token)), None)


class Chat:
    """The policy's chat template, for what a campaign renders besides its prompts."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, max_length: int) -> None:
        self._tokenizer = tokenizer
        self._escape = special_token_escaper(tokenizer)
        self.max_length = max_length
        """Limit on prompt and completion together, in tokens."""

    def render(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """Return the token ids of a conversation, contents escaped, generation prompt included.

        Raises ConfigError if the template refuses the messages.
        """
        return render(self._tokenizer, self.escaped(messages), where="chat template")

    def escaped(self, messages: Sequence[Message]) -> list[Message]:
        """Return the messages with the special tokens in their contents broken up."""
        return [{**m, "content": self._escape(m["content"])} for m in messages]

    def render_given(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """Return the token ids of a conversation as those of a prompt source: contents as they are.

        Raises ConfigError if the template refuses the messages.
        """
        return render(self._tokenizer, messages, where="chat template")

    def encode_generated(self, messages: Sequence[Message], text: str) -> tuple[int, ...]:
        """Return `encode_response` of a generated text, in which special tokens are broken up."""
        return self.encode_response(messages, self._escape(text))

    def text(self, token_ids: Sequence[int]) -> str:
        """Return the text that an engine gives a completion with these tokens."""
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=True))

    # --- whole conversations with assistant turns, contents as they are

    @cached_property
    def end_token(self) -> str | None:
        """Token that ends an assistant's turn: the template's, else the tokenizer's."""
        token = end_of_turn(self._tokenizer) or self._tokenizer.eos_token
        return None if token is None else str(token)

    @property
    def end_token_id(self) -> int | None:
        """Id of `end_token`."""
        if self.end_token is None:
            return None
        return int(self._tokenizer.convert_tokens_to_ids(self.end_token))

    def without_space_after_end(self, text: str) -> str:
        """Return the text without white space after its last special token, if it ends so.

        Templates write such white space after a turn; a model never does.
        """
        stripped = text.rstrip()
        return stripped if stripped.endswith(self._special_tokens) else text

    @cached_property
    def _special_tokens(self) -> tuple[str, ...]:
        return tuple(special_tokens(self._tokenizer))

    @cached_property
    def marks_generation(self) -> bool:
        """Whether the template marks the assistant's text with {% generation %}."""
        template = self._tokenizer.chat_template
        return isinstance(template, str) and bool(re.search(r"\{%-?\s*generation\b", template))

    def template(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        generation_prompt: bool = False,
        where: str = "policy.model",
    ) -> str:
        """Return the text of a conversation. Raises ConfigError as `render_text`."""
        return render_text(
            self._tokenizer,
            messages,
            tools=tools,
            generation_prompt=generation_prompt,
            where=where,
        )

    def tokens_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Return the token ids of a rendered text, and the characters (begin, end) of each."""
        encoded = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return list(encoded["input_ids"]), list(encoded["offset_mapping"])

    def generation_mask(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        where: str = "policy.model",
    ) -> tuple[list[int], list[bool]]:
        """Return the token ids of a conversation and whether the template marks each.

        Raises ConfigError as `render_text`.
        """
        self.template(messages, tools=tools, where=where)  # refuses what cannot be rendered
        encoded = self._tokenizer.apply_chat_template(
            [dict(m) for m in messages],
            tools=None if tools is None else list(tools),
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        return list(encoded["input_ids"]), [bool(marked) for marked in encoded["assistant_masks"]]

    def encode_response(self, messages: Sequence[Message], text: str) -> tuple[int, ...]:
        """Return the token ids of `text` as the assistant's turn after `messages`.

        They include what the template puts at the end of a turn. Raises ConfigError if the template
        does not render the conversation with the response as an extension of the one without.
        """
        where = "chat template"
        prompt = render_text(self._tokenizer, messages, generation_prompt=True, where=where)
        turns = [*messages, {"role": "assistant", "content": text}]
        conversation = render_text(self._tokenizer, turns, generation_prompt=False, where=where)
        if not conversation.startswith(prompt):
            raise ConfigError(
                "policy.model: the chat template renders a conversation with a response "
                f"differently from its prompt ({prompt[-40:]!r} is not how "
                f"{conversation[: len(prompt)][-40:]!r} ends); given responses cannot be trained "
                "on with it"
            )
        # Templates may end a turn with white space after the end-of-turn token, which the model
        # never generates.
        response = conversation[len(prompt) :]
        if self.end_token and (end := response.rfind(self.end_token)) >= 0:
            end += len(self.end_token)
            if not response[end:].strip():
                response = response[:end]
        return tuple(self._tokenizer(response, add_special_tokens=False)["input_ids"])
