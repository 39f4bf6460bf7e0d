"""An environment's reply as the tokens between two turns of the policy.

In: messages. Out: the tokens that the chat template puts after the policy's turn: the reply, and
the beginning of the policy's next turn. What the policy wrote is not rendered again, so its tokens
stay those of the engine. The template renders a short conversation in whose place the real one
stands; `check_replies` tries, before anything starts, whether it can stand there.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from rayhf.data.chat import Chat
from rayhf.errors import ConfigError
from rayhf.types import Message, TokenIds

_QUESTION: Message = {"role": "user", "content": "a question"}
_ANSWER = "the answer of the policy"
_LATER = "a later answer of the policy"
_REPLY = "a reply of the environment"
_CACHED = 4096
"""Most replies that are kept."""


class ReplyRenderer:
    """Renders replies for one chat template."""

    def __init__(self, chat: Chat) -> None:
        self._chat = chat
        self._known: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {}

    def render(self, messages: Sequence[Message], *, turn: TokenIds) -> tuple[int, ...]:
        """Return the tokens after a turn of the policy, which has the tokens `turn`.

        They begin with the end-of-turn token where the policy did not write it. Contents are
        escaped. Raises ConfigError if the template refuses the messages.
        """
        key = json.dumps([dict(message) for message in messages])
        if key not in self._known:
            if len(self._known) >= _CACHED:
                self._known.clear()
            self._known[key] = self._render(messages)
        end, rest = self._known[key]
        written = len(turn) > 0 and int(turn[-1]) == self._chat.end_token_id
        return rest if written else (*end, *rest)

    def _render(self, messages: Sequence[Message]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        end, rest = _after_answer(self._chat, self._chat.escaped(messages))
        encode = self._chat.tokens_with_offsets
        return tuple(encode(end)[0]), tuple(encode(rest)[0])


def _after_answer(chat: Chat, messages: Sequence[Message]) -> tuple[str, str]:
    """Return the end of the policy's turn, and what the template writes after it."""
    turns = [_QUESTION, {"role": "assistant", "content": _ANSWER}, *messages]
    text = chat.template(turns, generation_prompt=True)
    _, found, tail = text.partition(_ANSWER)
    end = chat.end_token
    if not found or end is None or not tail.lstrip().startswith(end):
        raise ConfigError(
            f"policy.model: the chat template writes {tail[:40]!r} after an assistant's turn, not "
            f"the end-of-turn token {end!r}; environments need a template that does"
        )
    before, _, rest = tail.partition(end)
    return before + end, rest


def check_replies(chat: Chat, roles: Sequence[str]) -> None:
    """Check that the template continues a conversation by a reply without changing what was before.

    Raises ConfigError, in one line, for a template that does not.
    """
    for role in roles:
        reply: Message = {"role": role, "content": _REPLY}
        answer: Message = {"role": "assistant", "content": _ANSWER}
        later: Message = {"role": "assistant", "content": _LATER}
        try:
            prompt = chat.template([_QUESTION], generation_prompt=True)
            _, rest = _after_answer(chat, [reply])
            second = chat.template([_QUESTION, answer, reply], generation_prompt=True)
            third = chat.template([_QUESTION, answer, reply, later, reply], generation_prompt=True)
        except ConfigError as error:
            raise ConfigError(
                f"environment: replies of role {role!r} cannot be rendered: {error}"
            ) from None
        # What the policy read before each turn begins with what the template writes later.
        heads = [(prompt, second.partition(_ANSWER)[0]), (second, third.partition(_LATER)[0])]
        for read, head in heads:
            if not read.startswith(head):
                raise ConfigError(
                    "environment: the chat template renders earlier turns differently once others "
                    f"follow ({head[-40:]!r} is not how {read[-40:]!r} begins); expected a "
                    "template that only appends (policy.chat_template)"
                )
        if _REPLY not in rest:
            raise ConfigError(
                f"environment: the chat template leaves out a message of role {role!r}; expected "
                "one that writes it (policy.chat_template)"
            )
