"""Python's garbage collector, set for a controller.

A round has millions of objects. They stay until it is learned, and go by themselves: nothing in a round refers to itself. Looking
through them again and again for cycles would take up to a quarter of the controller's time.
"""

from __future__ import annotations

import gc


def calm_collector() -> None:
    """To be called once everything is there that is there to stay: modules, prompts, actors. It is never looked through again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(1_000_000, 10, 10)
