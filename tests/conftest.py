import os
import sys
from pathlib import Path

import hypothesis
import pytest

# A thread that waits for the others of its OpenMP team must not spin: on cores that other tests
# use, too, 80 training steps of a tiny policy take 23 s of CPU time with spinning and 1.6 s
# without. Set before anything imports torch, and inherited by every process that tests start. It
# changes no bit of a result.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# No test is timed: this machine may be busy.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")

for folder in ("unit", "e2e", "chaos"):
    sys.path.insert(0, str(Path(__file__).parent / folder))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `gpu` where torch has no CUDA device."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _own_import_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Undo what a command that runs in the test's process adds to the import path.

    A later test would import another one's modules.
    """
    monkeypatch.setattr(sys, "path", [*sys.path])
