"""Texts of token ids, by the tokenizer that a run exported with its policy."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any


class TokenTexts:
    """Texts of tokens; None for all where the run has no tokenizer.json yet."""

    def __init__(self, file: Path) -> None:
        self._file = file

    @cached_property
    def _tokenizer(self) -> Any:
        from tokenizers import Tokenizer

        try:
            return Tokenizer.from_file(str(self._file))
        except Exception:  # noqa: BLE001  the library raises bare Exception for a missing file
            return None

    def pieces(self, ids: Sequence[int]) -> list[str] | None:
        """Return the text that each token adds; a character of several tokens is its last one's."""
        from tokenizers.decoders import DecodeStream

        if self._tokenizer is None:
            return None
        stream = DecodeStream(ids=[], skip_special_tokens=False)
        size = self._tokenizer.get_vocab_size()
        return [
            stream.step(self._tokenizer, int(token)) or "" if token < size else f"[{token}]"
            for token in ids
        ]

    def text(self, ids: Sequence[int]) -> str | None:
        """Return the text of a sequence, without special tokens."""
        if self._tokenizer is None:
            return None
        decoded: str = self._tokenizer.decode([int(token) for token in ids])
        return decoded
