"""Files of the user's folder replace no module in an actor's process, and can be imported there."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

SCRIPT = """
import ray
from actors.environment import process_env
from actors.process import ReportsProcess
from launch.local import ray_cluster

class Probe(ReportsProcess):
    def look(self):
        import random, types, uuid, wave
        import actors, launch, rayhf
        import mine
        modules = (random, types, uuid, wave, actors, launch, rayhf)
        return [module.__file__ for module in modules], mine.VALUE

with ray_cluster("local", cpus=1):
    env = process_env("cpu", 1, vllm=False)
    probe = ray.remote(num_cpus=0.1, runtime_env={"env_vars": env})(Probe).remote()
    ray.get(probe.process_info.remote(), timeout=60)
    files, value = ray.get(probe.look.remote(), timeout=60)
    print(value, *files)
"""


def test_user_folder_is_last_on_an_actors_path(tmp_path: Path) -> None:
    for name in ("random", "types", "uuid", "wave", "actors", "launch", "rayhf"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('shadowed')\n")
    (tmp_path / "mine.py").write_text("VALUE = 7\n")
    run = subprocess.run(
        [sys.executable, "-P", "-c", textwrap.dedent(SCRIPT)],
        cwd=tmp_path,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    value, *files = run.stdout.split()
    assert value == "7"
    assert not any(Path(file).is_relative_to(tmp_path) for file in files)
