"""A campaign under fire, with the real engines: it ends with the bits of one that was left alone.
More of it: `make chaos`."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest
from nemesis import Campaign, committed, fingerprint, orphans
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


def campaign(
    world: Path, name: str, *, rule: str, supervised: bool = False, **sections: object
) -> Campaign:
    """`rule` says the same of every answer, slowly where there must be time to strike."""
    scorer = {
        "train": [
            {"type": "rule", "function": f"my_rules:{rule}", "name": "same"},
            {"type": "rule", "function": "my_rules:even", "name": "even"},
        ]
    }
    run = {"iterations": ROUNDS, "eval_every": 20, "checkpoint_every": 3, "stall_s": 8}
    config = write_config(world, name, scorer=scorer, run=run, **sections)
    return Campaign(world, config, supervised=supervised)


def pause_and_go_on(one: Campaign) -> None:
    run = one.run_dir
    assert "pauses once iteration" in one.command("pause", run)
    one.wait_for_state("paused", 60)
    before = one.rounds()
    assert "PAUSED" in one.command("status", run) and committed(run) == before
    assert "resumes" in one.command("unpause", run)
    one.wait_for_rounds(before + 1, 60)


def stop_and_start_again(one: Campaign) -> None:
    assert "stops once iteration" in one.command("stop", one.run_dir)
    assert one.process is not None and one.process.wait(120) == 75
    assert "STOPPED" in one.command("status", one.run_dir)
    one.start()
    one.wait_for_rounds(committed(one.run_dir) + 1, 300)


def test_whoever_is_killed_or_stopped_the_campaign_ends_with_the_same_bits(world: Path) -> None:
    """As one that was left alone, and in which engines and learners took turns (nothing else tests
    that this changes no bit)."""
    stormy = campaign(world, "stormy", rule="slow", supervised=True)
    stormy.start()
    stormy.wait_for_rounds(2, 300)
    for role, number in FIRE:
        took = stormy.strike_and_recover(role, number, timeout_s=300)
        print(f"{role} {number.name}: {took:.1f} s")
    pause_and_go_on(stormy)
    stop_and_start_again(stormy)
    assert stormy.alive(), "the campaign ended before the last fault: give it more rounds"
    family = stormy.family()
    stormy.finish(500)
    over = time.monotonic()
    calm = campaign(world, "calm", rule="quick", cluster={"placement": "colocate"})
    calm.start()  # meanwhile Ray's agents notice that they are not needed any more
    calm.finish(500)
    assert orphans(family, over + 150.0 - time.monotonic()) == []
    assert fingerprint(stormy.run_dir) == fingerprint(calm.run_dir)
    kinds = [event["kind"] for event in stormy.events()]
    assert kinds.count("recovered") == 3 and kinds.count("fault") == 4
    assert list((stormy.run_dir / "logs").glob("attempt-*/stacks/rollout-engine-0-*.txt"))
    assert "faults in 24 h" in stormy.command("status", stormy.run_dir)
    assert "as they were written" in stormy.command("verify", stormy.run_dir)
