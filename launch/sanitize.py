"""Text from elsewhere, safe to print: what a model, a scorer or a file wrote must not steer a
terminal."""

from __future__ import annotations


def plain(text: str) -> str:
    """`text` with every character spelled out that is neither printable nor a line break or tab: an
    escape becomes \\x1b."""
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text
    )
