"""Garbage collector settings for the controller's process.

An iteration has millions of objects, which live until it has been trained on. They form no
reference cycles, so reference counting frees them and scanning them for cycles only costs time.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def gc_tuned() -> Iterator[None]:
    """Exclude existing objects from garbage collection and collect new ones rarely.

    Enter it once all long-lived objects exist: modules, prompts, actors. They are unfrozen at the
    end, because a library may complain at exit about objects that were never collected.
    """
    before = gc.get_threshold()
    gc.collect()
    gc.freeze()
    gc.set_threshold(1_000_000, 10, 10)
    try:
        yield
    finally:
        gc.set_threshold(*before)
        gc.unfreeze()
