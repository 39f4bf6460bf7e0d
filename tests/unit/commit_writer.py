"""Kill processes during commits and check what is left: python commit_writer.py RUN KILLS SEED.

Each victim is a fork that commits checkpoints of random files until it is killed, and acknowledges
each through a pipe. Prints one JSON object: kills, inside (kills during a commit), commits, lost
(acknowledged, but missing or invalid), corrupt.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

from fakes import checkpoint_state

from rayhf.config.load import load_config
from rayhf.errors import CheckpointError
from rayhf.run_dir.files import verify
from rayhf.run_dir.store import RunDir


def config(run):
    return load_config(
        {
            "run": {"dir": str(run), "iterations": 10**6},
            "policy": {"model": "m"},
            "prompts": {"train": "t", "batch": 4},
            "algorithm": {"type": "online_dpo"},
            "scorer": {"train": [{"type": "rule", "function": "a:b"}]},
        }
    )


def commit_forever(run, pipe):
    store = RunDir(config(run))
    checkpoint = store.latest()
    iteration = checkpoint.iteration if checkpoint else 0
    os.write(pipe, b"0\n")
    while True:
        iteration += 1
        temporary = store.checkpoints.begin()
        for number in range(4):
            (temporary / f"shard-{number}").write_bytes(os.urandom(50_000))
        store.append_metrics({"iteration": float(iteration)})
        store.commit(temporary, checkpoint_state(iteration), campaign_state="running", score=None)
        os.write(pipe, f"{iteration}\n".encode())


def kill_one(run, wait_s):
    """Return every iteration that a victim acknowledged before it was killed."""
    reading, writing = os.pipe()
    victim = os.fork()
    if victim == 0:
        commit_forever(run, writing)
    os.close(writing)
    with os.fdopen(reading) as acknowledged:
        first = acknowledged.readline()
        time.sleep(wait_s)
        os.kill(victim, signal.SIGKILL)
        os.waitpid(victim, 0)
        return [int(line) for line in [first, *acknowledged] if line.endswith("\n")]


def main():
    run = Path(sys.argv[1])
    kills = int(sys.argv[2])
    rng = random.Random(int(sys.argv[3]))
    counts = {"kills": kills, "inside": 0, "commits": 0, "lost": 0, "corrupt": 0}
    for _ in range(kills):
        acknowledged = kill_one(run, rng.uniform(0.0, 0.08))
        counts["commits"] += len(acknowledged) - 1
        counts["inside"] += any((run / "checkpoints").glob(".saving-*"))
        state = json.loads((run / "campaign.json").read_text())
        counts["lost"] += state["iteration"] < max(acknowledged)
        if state["checkpoint"]:
            try:
                counts["lost"] += (
                    verify(run / "checkpoints" / state["checkpoint"])["iteration"]
                    != state["iteration"]
                )
            except CheckpointError:
                counts["corrupt"] += 1
    counts["corrupt"] += len(list((run / "checkpoints").glob(".corrupt-*")))
    print(json.dumps(counts))


main()
