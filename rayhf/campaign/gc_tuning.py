"""Python's garbage collector, set for a controller.

A round has millions of objects. They stay until it is learned, and go by themselves: nothing in a
round refers to itself. Looking through them again and again for cycles would be for nothing.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def gc_tuned() -> Iterator[None]:
    """To be entered once everything is there that is there to stay: modules, prompts, actors. It is
    not looked through before the end; then it must be, since a library may complain about what is
    left at the exit."""
    before = gc.get_threshold()
    gc.collect()
    gc.freeze()
    gc.set_threshold(1_000_000, 10, 10)
    try:
        yield
    finally:
        gc.set_threshold(*before)
        gc.unfreeze()
