"""Faults in a campaign with the real engines: it ends with the bits of an undisturbed one.

`make chaos` injects many more.
"""

from __future__ import annotations

import gzip
import json
import signal
import time
from collections import Counter
from pathlib import Path

import pyarrow.dataset
import pytest
from faults import Campaign, committed, fingerprint, orphans
from world import make_world, write_config

pytestmark = pytest.mark.timeout(1500)
FAULTS = (
    ("rollout", signal.SIGKILL),
    ("rollout", signal.SIGSTOP),
    ("scorer", signal.SIGKILL),
    ("learner", signal.SIGKILL),
    ("controller", signal.SIGKILL),
)
ITERATIONS = 21


SOURCES: list[dict[str, object]] = [
    {"type": "file", "path": "train.jsonl", "name": "said", "weight": 2},
    {"type": "file", "path": "sums.csv", "name": "sums", "rename": {"question": "prompt"}},
    {"type": "file", "path": "words.jsonl.gz", "name": "words", "template": "Say {{ word }}"},
]
"""Of different formats, columns, sizes and weights: none is dealt out in step with another."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_world(tmp_path_factory.mktemp("world"))
    sums = [f"What is {n} and {n}?,{2 * n}" for n in range(7)]
    (folder / "sums.csv").write_text("\n".join(["question,answer", *sums]) + "\n")
    with gzip.open(folder / "words.jsonl.gz", "wt") as file:
        file.writelines(json.dumps({"word": chr(97 + n)}) + "\n" for n in range(5))
    return folder


def campaign(
    world: Path, name: str, *, rule: str, supervised: bool = False, **sections: object
) -> Campaign:
    """`rule` scores every completion alike: slowly where faults need time to be injected."""
    scorer = {
        "train": [
            {"type": "rule", "function": f"my_rules:{rule}", "name": "same"},
            {"type": "rule", "function": "my_rules:even", "name": "even"},
        ]
    }
    run = {"iterations": ITERATIONS, "eval_every": 20, "checkpoint_every": 3, "stall_s": 8}
    config = write_config(
        world, name, scorer=scorer, run=run, prompts={"train": SOURCES}, **sections
    )
    return Campaign(world, config, supervised=supervised)


def pause_and_resume(faulty: Campaign) -> None:
    run = faulty.run_dir
    assert "pauses once iteration" in faulty.command("pause", run)
    faulty.wait_for_state("paused", 60)
    before = faulty.iterations()
    assert "PAUSED" in faulty.command("status", run)
    assert committed(run) == before
    assert "resumes" in faulty.command("unpause", run)
    faulty.wait_for_iterations(before + 1, 60)


def test_faults_change_no_bit(world: Path) -> None:
    """The undisturbed campaign is colocated: engines and learners that share a GPU in turns change
    no bit either, which nothing else tests."""
    faulty = campaign(world, "faulty", rule="slow", supervised=True)
    faulty.start()
    faulty.wait_for_iterations(2, 300)
    for role, number in FAULTS:
        took = faulty.inject_and_recover(role, number, timeout_s=300)
        print(f"{role} {number.name}: {took:.1f} s")
    pause_and_resume(faulty)
    assert faulty.alive(), "the campaign ended before the last fault: it needs more iterations"
    processes = faulty.processes()
    faulty.finish(500)
    finished = time.monotonic()
    undisturbed = campaign(world, "undisturbed", rule="quick", cluster={"placement": "colocate"})
    undisturbed.start()  # meanwhile Ray's agents of the first campaign have time to stop
    undisturbed.finish(500)
    assert orphans(processes, finished + 150.0 - time.monotonic()) == []
    assert fingerprint(faulty.run_dir) == fingerprint(undisturbed.run_dir)
    samples = pyarrow.dataset.dataset(faulty.run_dir / "samples", format="parquet")
    dealt = Counter(samples.to_table(columns=["source"])["source"].to_pylist())
    assert dealt == {"said": 168, "sums": 84, "words": 84}  # 21 iterations of 4 prompts, 4 samples
    kinds = [event["kind"] for event in faulty.events()]
    assert kinds.count("recovered") == 3
    assert kinds.count("fault") == 4
    assert list((faulty.run_dir / "logs").glob("attempt-*/stacks/rollout-engine-0-*.txt"))
    assert "faults in 24 h" in faulty.command("status", faulty.run_dir)
    assert "as they were written" in faulty.command("verify", faulty.run_dir)
