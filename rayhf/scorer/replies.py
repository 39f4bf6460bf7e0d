"""Replies of judges on their way into the tables: named, moved, bounded.

A reply is text of a model: it is stored and shown, and nothing is ever read from it again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain, islice, zip_longest

from rayhf.errors import clean_line, clean_text, one_line
from rayhf.types import JudgeReply

MAX_REPLIES = 64
"""Largest number of replies about a completion, of one scorer."""
REPLY_CHARS = 2000
"""Largest number of characters of a reply; the middle of a longer one is left out."""
_NAME_CHARS = 200

Replies = tuple[JudgeReply, ...]


def select_replies(by_question: Sequence[Replies], limit: int) -> Replies:
    """Return at most `limit` replies to several questions: the first to each, then the second."""
    turns = chain.from_iterable(zip_longest(*by_question))
    return tuple(islice((reply for reply in turns if reply is not None), limit))


def named(replies: Replies, name: str) -> Replies:
    """Return the replies with `name` in front of the parts that they belong to."""
    return tuple(
        replace(reply, part=f"{name}/{reply.part}" if reply.part else name) for reply in replies
    )


def moved(replies: Replies, positions: Sequence[int]) -> Replies:
    """Return replies of a part of a request; its completion i is `positions[i]` in the whole."""
    return tuple(
        reply if reply.against is None else replace(reply, against=positions[reply.against])
        for reply in replies
    )


def bounded_replies(replies: Replies, completions: int) -> Replies:
    """Return replies that can be stored.

    Raises ValueError where they are none, or one is about a pair with a completion that the request
    does not have.
    """
    try:
        return tuple(_bounded(reply, completions) for reply in replies[:MAX_REPLIES])
    except (TypeError, AttributeError) as error:  # of other types than Scored declares
        raise ValueError(f"its replies are no JudgeReplies: {one_line(error)}") from error


def _bounded(reply: JudgeReply, completions: int) -> JudgeReply:
    if reply.against is not None and not 0 <= reply.against < completions:
        raise ValueError(
            f"a reply compares with completion {reply.against}, the request has {completions}"
        )
    return replace(
        reply,
        text=clean_text(reply.text, REPLY_CHARS),
        part=clean_line(reply.part, _NAME_CHARS),
    )
