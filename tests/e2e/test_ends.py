"""A process of the campaign's own Ray cluster dies: one line and exit code 10, and nothing is left.

`python -m tests.chaos attack` plays the other ends.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos.attacks.ends import RAYLET

pytestmark = pytest.mark.timeout(400)


def test_lost_raylet_ends_the_campaign(tmp_path: Path) -> None:
    tried, held, figures = RAYLET.play(tmp_path, 0)
    assert held == tried, figures
