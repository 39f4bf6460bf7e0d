"""Text of models, scorers and files, made safe to print: it must not control a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


def plain(text: str) -> str:
    r"""Return `text` with every character escaped that is not printable, a line break or a tab.

    An escape character becomes \x1b.
    """
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text
    )


def print_plain(console: Console, text: str, *, style: str | None = None) -> None:
    """Print a text as it is: no markup, no highlighting, no line breaks added."""
    console.print(plain(text), style=style, markup=False, highlight=False, soft_wrap=True)
