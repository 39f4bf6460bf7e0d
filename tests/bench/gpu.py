"""Ten minutes on one large GPU: does each path that needs one work, how fast, in which memory?

    make test-gpu GPU_PYTHON=python           # or: python -m tests.bench.gpu [--record] [STEP ...]

Needs the packages alone (`pip install -e ".[gpu,dev]"`): models are random, nothing is downloaded.
Every step is a process with a time limit of its own; a step that fails or is too slow does not stop
the others. The exit code is 1 where one did not work.

Not run on a GPU yet.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tests.bench import gpu_steps
from tests.bench.gpu_pace import ROOT
from tests.bench.results import put_section

TOTAL_S = 600.0
NO_DEVICE = "torch {version} sees no CUDA device here; nothing was run"


@dataclass(frozen=True)
class Step:
    run: Callable[[], str]
    limit_s: float
    expandable: bool = False
    """Let torch's allocator use expandable segments."""


STEPS = {
    "tests": Step(gpu_steps.gpu_tests, 130),
    "nccl": Step(gpu_steps.nccl, 30),
    "pace": Step(gpu_steps.pace, 90),
    "packed": Step(gpu_steps.packed, 60),
    "head": Step(gpu_steps.head, 60),
    "attention": Step(gpu_steps.attention, 30),
    "offload": Step(gpu_steps.offload, 60),
    "sleep": Step(gpu_steps.sleep, 40),
    "release": Step(gpu_steps.release, 40),
    "release-expandable": Step(gpu_steps.release, 40, expandable=True),
    "campaign": Step(gpu_steps.campaign, 90),
}


def check_device() -> None:
    """Exit with a plain line where there is no CUDA device."""
    import torch

    if not torch.cuda.is_available():
        raise SystemExit(f"tests.bench.gpu: {NO_DEVICE.format(version=torch.__version__)}")


def run_step(name: str) -> None:
    """Run one step in this process and print its figures."""
    check_device()
    print(STEPS[name].run())


def call(name: str, limit_s: float) -> tuple[bool, str]:
    """Run one step in a new process; return whether it worked, and its figures or its error."""
    env = dict(os.environ)
    if STEPS[name].expandable:
        env["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
    child = subprocess.Popen(
        [sys.executable, "-m", "tests.bench.gpu", "--child", name],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=env,
        start_new_session=True,
    )
    try:
        output, errors = child.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)  # with the processes that it started
        child.communicate()
        return False, f"not done after {limit_s:.0f} s"
    if child.returncode:
        return False, f"exit code {child.returncode}:\n{(output + errors)[-3000:].strip()}"
    return True, output.strip()


def run_steps(names: Sequence[str]) -> tuple[bool, str]:
    """Run steps within the total time; return whether all worked, and a report in Markdown."""
    started = time.monotonic()
    worked = True
    parts = []
    for name in names:
        left = TOTAL_S - (time.monotonic() - started)
        if left < 10:
            worked = False
            parts.append(f"**{name}**: not run, the {TOTAL_S:.0f} s are over")
            continue
        begun = time.monotonic()
        passed, text = call(name, min(STEPS[name].limit_s, left))
        worked &= passed
        state = "works" if passed else "**failed**"
        parts.append(f"**{name}**: {state}, {time.monotonic() - begun:.0f} s\n\n{text}")
        print(parts[-1], flush=True)
    return worked, "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("steps", nargs="*", metavar="STEP", help=f"of {', '.join(STEPS)}")
    parser.add_argument(
        "--record", action="store_true", help="write the report into tests/bench/RESULTS.md"
    )
    parser.add_argument("--child", choices=STEPS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if unknown := set(options.steps) - STEPS.keys():
        parser.error(f"no step {', '.join(sorted(unknown))}; expected some of {', '.join(STEPS)}")
    if options.child:
        run_step(options.child)
        return
    check_device()
    worked, text = run_steps(options.steps or list(STEPS))
    if options.record:
        put_section("## Ten minutes on one GPU", text)
    sys.exit(0 if worked else 1)


if __name__ == "__main__":
    main()
