"""Garbage collector settings for the controller's process.

An iteration has millions of objects, which live until it has been trained on. They form no
reference cycles, so reference counting frees them and scanning them for cycles only costs time:
about 1.5 s per million, during which nothing else runs.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

_THRESHOLDS = (50_000, 2_000, 10)
"""New objects per collection, which scans only these; and such collections per one that scans
everything since the start, about every 50 iterations of 100,000 prompts."""


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
