"""The attacks by completions and rules that need no cluster, one by one."""

from pathlib import Path

import pytest

from tests.chaos.attacks import rules


@pytest.mark.parametrize("attack", rules.ATTACKS, ids=lambda attack: attack.name)
def test_attack_holds(attack, tmp_path: Path):
    tried, held, figures = attack.play(tmp_path, 0)
    if not tried:
        pytest.skip(figures)
    assert held == tried, figures
