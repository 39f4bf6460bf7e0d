"""Texts of token ids, by the tokenizer that a run exported with its policy."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any


class TokenTexts:
    """Texts of tokens; None for all where the run has no tokenizer.json yet."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._tokenizer: Any = None

    def _load(self) -> Any:
        """Return the tokenizer; it may appear later, with the first checkpoint."""
        from tokenizers import Tokenizer

        if self._tokenizer is None and self._file.is_file():
            try:
                self._tokenizer = Tokenizer.from_file(str(self._file))
            except Exception:  # noqa: BLE001  the library raises bare Exception for a damaged file
                return None
        return self._tokenizer

    def pieces(self, ids: Sequence[int]) -> list[str] | None:
        """Return the text that each token adds; a character of several tokens is its last one's."""
        from tokenizers.decoders import DecodeStream

        tokenizer = self._load()
        if tokenizer is None:
            return None
        stream = DecodeStream(ids=[], skip_special_tokens=False)
        size = tokenizer.get_vocab_size()
        return [
            stream.step(tokenizer, int(token)) or "" if token < size else f"[{token}]"
            for token in ids
        ]

    def text(self, ids: Sequence[int]) -> str | None:
        """Return the text of a sequence, without special tokens."""
        tokenizer = self._load()
        if tokenizer is None:
            return None
        decoded: str = tokenizer.decode([int(token) for token in ids])
        return decoded
