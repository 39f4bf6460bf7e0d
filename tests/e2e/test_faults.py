"""A campaign under fire, with the real engines: it ends with the bits of one that was left alone. More of it: `make chaos`."""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path

import pytest
from nemesis import RAYHF, Campaign, fingerprint, orphans
from world import make_world, write_config

pytestmark = pytest.mark.timeout(1500)
FIRE = (
    ("rollout", signal.SIGKILL),
    ("rollout", signal.SIGSTOP),
    ("scorer", signal.SIGKILL),
    ("learner", signal.SIGKILL),
    ("controller", signal.SIGKILL),
)
ROUNDS = 24


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


def campaign(world: Path, name: str) -> Campaign:
    scorer = {
        "train": [{"type": "rule", "function": "my_rules:slow"}, {"type": "rule", "function": "my_rules:even", "name": "even"}]
    }
    config = write_config(
        world, name, scorer=scorer, run={"iterations": ROUNDS, "eval_every": 20, "checkpoint_every": 3, "stall_s": 8}
    )
    return Campaign(world, config)


def test_whoever_is_killed_or_stopped_the_campaign_ends_with_the_same_bits(world: Path) -> None:
    calm, stormy = campaign(world, "calm"), campaign(world, "stormy")
    calm.start()
    calm.finish(500)
    stormy.start()
    stormy.wait_for_rounds(2, 300)
    for role, number in FIRE:
        family = stormy.family()
        took = stormy.strike_and_recover(role, number, timeout_s=300)
        print(f"{role} {number.name}: {took:.1f} s")
        if role == "controller":
            assert orphans(family) == []
    assert stormy.alive(), "the campaign ended before the last fault: give it more rounds"
    family = stormy.family()
    stormy.finish(500)
    assert orphans(family) == []
    assert fingerprint(stormy.run_dir) == fingerprint(calm.run_dir)
    kinds = [event["kind"] for event in stormy.events()]
    assert kinds.count("recovered") == 3 and kinds.count("fault") == 4
    assert list((stormy.run_dir / "logs").glob("attempt-*/stacks/rollout-engine-0-*.txt"))
    for command in ("status", "verify"):
        shown = subprocess.run([RAYHF, command, stormy.run_dir], capture_output=True, text=True, timeout=60)
        assert shown.returncode == 0, shown.stderr
        assert "faults in 24 h: 4" in shown.stdout or command == "verify"
