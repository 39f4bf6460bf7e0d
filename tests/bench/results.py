"""RESULTS.md, the file of measured figures: every benchmark replaces its own section."""

from __future__ import annotations

import re
from pathlib import Path

RESULTS = Path(__file__).with_name("RESULTS.md")


def put_section(heading: str, body: str, *, under: str | None = None) -> None:
    """Replace the section `heading` ("## Speed", "### Chaos: nodes").

    A new section is appended to the section `under`, or to the file.
    A person's note at its end, from the first line that begins with ">", is kept.
    """
    text = RESULTS.read_text(encoding="utf-8")
    level = heading.split()[0]
    start = re.search(rf"^{re.escape(heading)}\n", text, flags=re.MULTILINE)
    if start is None:
        place = _end(text, text.index(f"\n{under}\n") + 1, "##") if under is not None else len(text)
        text = f"{text[:place].rstrip()}\n\n{heading}\n\n{body.strip()}\n\n{text[place:].lstrip()}"
    else:
        end = _end(text, start.start(), level)
        note = re.search(r"^>.*", text[start.end() : end], flags=re.MULTILINE | re.DOTALL)
        comment = f"\n\n{note[0].rstrip()}" if note else ""
        section = f"{heading}\n\n{body.strip()}{comment}"
        text = f"{text[: start.start()]}{section}\n\n{text[end:].lstrip()}"
    RESULTS.write_text(text.rstrip() + "\n", encoding="utf-8")


def _end(text: str, start: int, level: str) -> int:
    """Return where the section at `start` ends: at the next heading of its level or above."""
    following = re.compile(rf"^#{{1,{len(level)}}} ", flags=re.MULTILINE).search(
        text, text.index("\n", start)
    )
    return following.start() if following else len(text)
