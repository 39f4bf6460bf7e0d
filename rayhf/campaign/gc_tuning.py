"""Garbage collector settings for the controller's process.

An iteration has millions of objects, which live until it has been trained on. They form no
reference cycles, so reference counting frees them and scanning them for cycles only costs time:
about 0.3 s per million, during which nothing else runs.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

_THRESHOLDS = (100_000, 4, 1_000)
"""New objects per collection of the young ones; such collections per one of the middle-aged, which
then scans half a million objects at most; and those per one of all objects, whose cycles are so few
that it hardly ever pays."""


@contextmanager
def gc_tuned() -> Iterator[None]:
    """Exclude existing objects from garbage collection and collect new ones rarely.

    Enter it once all long-lived objects exist: modules, prompts, actors. They are unfrozen at the
    end, because a library may complain at exit about objects that were never collected.
    """
    before = gc.get_threshold()
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_THRESHOLDS)
    try:
        yield
    finally:
        gc.set_threshold(*before)
        gc.unfreeze()
