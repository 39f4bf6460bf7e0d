"""Writes the tables of iterations in a thread, beside the event loop.

Synchronization: one thread writes the tables one after the other, in the order in which they were
started. `written` waits for all of them and raises the first error.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import pyarrow as pa

Item = TypeVar("Item")

_PIECE = 256
"""Groups or examples that are converted at once: meanwhile the event loop's thread waits a few
milliseconds. With 64 the tables take a third more CPU time."""
_ROW_GROUP = 4096
"""Groups or examples per row group ..."""
_ROW_GROUP_BYTES = 16 << 20
"""... and its size as an Arrow table: those of a whole iteration may not fit into memory."""


class TableWriter:
    """Writes files, one at a time."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="tables")
        self._writes: list[asyncio.Future[None]] = []

    def start(self, write: Callable[..., None], *arguments: Any) -> None:
        """Start `write(*arguments)`, after what was started before."""
        loop = asyncio.get_running_loop()
        self._writes.append(loop.run_in_executor(self._thread, write, *arguments))

    async def written(self) -> None:
        """Wait until everything that was started is written. Raises the first error."""
        writes = self._writes
        self._writes = []
        for result in await asyncio.gather(*writes, return_exceptions=True):
            if isinstance(result, BaseException):
                raise result

    def close(self) -> None:
        """Wait for the file in progress; those that were not begun are dropped."""
        self._thread.shutdown(cancel_futures=True)


def row_groups(
    items: Iterable[Item], convert: Callable[[Sequence[Item]], pa.Table]
) -> Iterator[pa.Table]:
    """Yield the items as tables, one for each row group of a file.

    The items are copied now, and each is released as soon as it is converted: those of a whole
    iteration would be freed in one step, in which no other thread runs.
    """
    return _row_groups(list(items), convert)


def _row_groups(
    items: list[Item], convert: Callable[[Sequence[Item]], pa.Table]
) -> Iterator[pa.Table]:
    items.reverse()
    pieces: list[pa.Table] = []
    size = 0
    while items:
        pieces.append(convert(items[: -_PIECE - 1 : -1]))
        del items[-_PIECE:]
        size += pieces[-1].nbytes
        if len(pieces) * _PIECE >= _ROW_GROUP or size >= _ROW_GROUP_BYTES:
            yield pa.concat_tables(pieces)
            pieces = []
            size = 0
    if pieces:
        yield pa.concat_tables(pieces)
