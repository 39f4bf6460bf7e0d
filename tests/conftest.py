import os
import sys
from pathlib import Path

import pytest

# Before anything imports torch, and for every process that tests start: a thread that waits for its
# team's others must not spin. On cores that other tests use too, 80 steps of training a toy policy
# take 23 seconds of processor time with spinning, and 1.6 without. Not a bit of the result depends
# on it.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

for folder in ("unit", "e2e", "chaos"):
    sys.path.insert(0, str(Path(__file__).parent / folder))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` are skipped where torch has no CUDA device."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
