"""`make bench`: training speed of rayhf, TRL, and rayhf's bare engines, measured in one run.

    python -m tests.bench.speed [--quick] [--record]

Every case starts its systems (peers.py), lets each do warm-up steps, and then times them in turns:
one step of A, one of B, ..., repeatedly. Reported are medians over the turns. Model, prompts,
reward, threads and optimizer work are the same. `--record` writes the table into RESULTS.md. A full
run takes about half an hour on two cores, a quick one under 10 minutes.
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from importlib.metadata import version
from json import loads
from pathlib import Path
from typing import Any

import psutil

from tests.bench.results import put_section
from tests.bench.workload import Size, Spec, write_model, write_prompts

ROOT = Path(__file__).resolve().parents[2]
PAUSE_S = 0.2
"""Pause between turns: spinning worker threads of one system sleep before the next starts."""
TURNS_S = 120.0
"""Time limit for the turns of one case."""
PHASES = ("rollout", "scorer", "reference", "learner", "sync")
SETTING = (
    "64 completions per optimizer step, prompts of 16 tokens, float32, reference model included, "
    "everything interleaved step by step; medians (and range). Fixed: every completion has 64 "
    "tokens. Varying: completions end by themselves, the limit is 256. rayhf is synchronous and "
    "deterministic, rayhf overlap has max_staleness 1; TRL's trainers are synchronous, with "
    "transformers' generate (its vLLM modes do not run on CPU). Phases of rayhf overlap run at the "
    "same time. RSS: sum of every process's peak, shared pages counted in each; PSS: at the end, "
    "shared pages divided."
)


@dataclass
class Peer:
    """A timed system in a child process, and its measurements."""

    label: str
    kind: str
    spec: Spec
    process: subprocess.Popen[str]
    log: Path
    seconds: list[float] = field(default_factory=list)
    reports: list[dict[str, Any]] = field(default_factory=list)
    rss_gib: float = 0.0
    pss_gib: float = 0.0
    cpu_s: float = 0.0
    """CPU seconds of the process tree."""

    @staticmethod
    def start(label: str, kind: str, spec: Spec, scratch: Path) -> Peer:
        log = scratch / f"{label}.log".replace(" ", "-")
        env = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": str(spec.threads),
            "TOKENIZERS_PARALLELISM": "false",
        }
        env |= {"HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
        with log.open("w") as stderr:
            process = subprocess.Popen(
                [sys.executable, "-m", "tests.bench.peers", kind],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                bufsize=1,
                cwd=scratch,
                env=env,
            )
        peer = Peer(label, kind, spec, process, log)
        peer._write(spec.dump())
        return peer

    def _write(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def read_report(self) -> dict[str, Any]:
        """Wait for the report of a step. Raises SystemExit where the process ended."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-30:])
            raise SystemExit(f"{self.label} ended with code {self.process.wait()}:\n{tail}")
        report: dict[str, Any] = loads(line)
        return report

    def turn(self, *, keep: bool) -> None:
        time.sleep(PAUSE_S)
        started = time.perf_counter()
        self._write("go")
        report = self.read_report()
        if keep:
            self.seconds.append(time.perf_counter() - started)
            self.reports.append(report)

    def stop(self) -> None:
        """Record memory and CPU time, then stop the process."""
        if self.process.poll() is None:
            self.rss_gib, self.pss_gib, self.cpu_s = usage(self.process.pid)
            assert self.process.stdin is not None
            self.process.stdin.close()
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                self.process.kill()

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def rate(self) -> float:
        """Completions per second over whole training steps."""
        return self.spec.completions / self.median

    def phase(self, name: str) -> float | None:
        values = [r["phases"][name] for r in self.reports if name in r.get("phases", {})]
        return statistics.median(values) if values else None

    @property
    def length(self) -> float:
        return statistics.fmean(report["length"] for report in self.reports)


def usage(pid: int) -> tuple[float, float, float]:
    """Return the peak RSS and the PSS of a process tree in GiB, and its CPU seconds.

    The peak is the sum of every process's own, shared pages counted in each; PSS divides them.
    """
    peak = 0
    proportional = 0
    cpu = 0.0
    for process in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
            rollup = Path(f"/proc/{process.pid}/smaps_rollup").read_text()
            cpu += sum(process.cpu_times()[:4])
        except (OSError, psutil.NoSuchProcess):  # it has just ended
            continue
        peak += sum(int(kib) for kib in re.findall(r"^VmHWM:\s+(\d+) kB", status, re.M))
        proportional += sum(int(kib) for kib in re.findall(r"^Pss:\s+(\d+) kB", rollup, re.M))
    return peak / 2**20, proportional / 2**20, cpu


class OtherProcesses:
    """CPU time of processes that do not belong to the benchmark: much of it spoils the figures."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._busy = self._total()
        self._self = self._own()
        self.peers_s = 0.0
        """CPU seconds of stopped peers."""

    @staticmethod
    def _total() -> float:
        times = psutil.cpu_times()
        return float(times.user + times.system + times.nice)

    @staticmethod
    def _own() -> float:
        return float(sum(psutil.Process().cpu_times()[:2]))

    def share(self) -> float:
        """Return their share of the machine's CPU time so far, from 0 to 1."""
        busy = self._total() - self._busy - self.peers_s - (self._own() - self._self)
        return max(0.0, busy) / ((time.monotonic() - self._started) * (os.cpu_count() or 1))


def time_peers(
    title: str, systems: dict[str, tuple[str, Spec]], scratch: Path, *, warmup: int, turns: int
) -> dict[str, Peer]:
    """Start every system, warm up, time it in turns, stop it.

    A system's first report ends its first step. After TURNS_S there are no more turns, but there
    are at least 3.
    """
    log(f"{title}: starting {', '.join(systems)}")
    peers: dict[str, Peer] = {}
    try:
        # One after the other: Ray clusters that start at the same time exceed Ray's time limits.
        for label, (kind, spec) in systems.items():
            peers[label] = Peer.start(label, kind, spec, scratch)
            peers[label].read_report()
        deadline = time.monotonic() + TURNS_S
        for number in range(warmup - 1 + turns):
            if number >= warmup + 2 and time.monotonic() > deadline:
                break
            for peer in peers.values():
                peer.turn(keep=number >= warmup - 1)
    finally:
        for peer in peers.values():
            peer.stop()
    for label, peer in peers.items():
        spread = f"{min(peer.seconds):.2f} to {max(peer.seconds):.2f}"
        log(f"  {label:<24} {peer.median:6.2f} s per step ({spread}), {peer.rate:.1f}/s")
    return peers


def log(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# -------------------------------------------------------------------------------------------- cases


class Bench:
    """Builds the models, runs the cases, writes the report."""

    def __init__(self, scratch: Path, *, quick: bool) -> None:
        self.scratch = scratch
        self.quick = quick
        self.threads = len(os.sched_getaffinity(0))
        self.lines: list[str] = []
        self.targets: list[str] = []
        self.others = OtherProcesses()
        write_prompts(scratch / "prompts.jsonl")

    def spec(self, size: Size, algorithm: Any, *, varying: bool, dtype: str = "float32") -> Spec:
        max_tokens = 256 if varying else 64
        model = self.scratch / f"{size}-{'varying' if varying else 'fixed'}-{dtype}"
        if not model.exists():
            write_model(
                model, size, mean_length=64 if varying else None, max_tokens=max_tokens, dtype=dtype
            )
        prompts = 8 if algorithm == "grpo" else 32
        return Spec(
            algorithm=algorithm,
            model=str(model),
            train=str(self.scratch / "prompts.jsonl"),
            max_tokens=max_tokens,
            prompts=prompts,
            samples=64 // prompts,
            micro=16,
            threads=self.threads,
            dtype=dtype,
        )

    def against_trl(
        self, size: Size, algorithm: Any, *, varying: bool, turns: int, engines: bool
    ) -> None:
        """Run one case of the table; `engines`: time the bare engines, too."""
        spec = self.spec(size, algorithm, varying=varying)
        systems = {
            "rayhf": ("rayhf", spec),
            "rayhf overlap": ("rayhf", replace(spec, max_staleness=1)),
            "TRL": ("trl", spec),
        }
        if engines:
            systems |= {"vLLM alone": ("vllm", spec), "DeepSpeed alone": ("deepspeed", spec)}
        name = {"grpo": "GRPO", "online_dpo": "online DPO"}[algorithm]
        title = f"{size}, {name}, {'varying' if varying else 'fixed'} length"
        peers = time_peers(title, systems, self.scratch, warmup=2, turns=turns)
        self.others.peers_s += sum(peer.cpu_s for peer in peers.values())
        log(f"  other processes' share of the machine so far: {self.others.share():.0%}")
        for peer in peers.values():
            self._row(title, peer, peers["TRL"])
        best = max((peers["rayhf"], peers["rayhf overlap"]), key=lambda peer: peer.rate)
        self._target(
            f"{title}: {best.label} / TRL, completions per second",
            best.rate / peers["TRL"].rate,
            at_least=2.0 if varying else 1.0,
        )
        if engines:
            self._overhead(title, peers)

    def _row(self, title: str, peer: Peer, trl: Peer) -> None:
        phases = [peer.phase(name) for name in PHASES]
        cells = [
            title,
            peer.label,
            f"{peer.length:.0f}",
            f"{peer.median:.2f} ({min(peer.seconds):.2f}-{max(peer.seconds):.2f})",
        ]
        alone = peer.kind in ("vllm", "deepspeed")
        cells += ["", ""] if alone else [f"{peer.rate:.1f}", f"{peer.rate / trl.rate:.2f}x"]
        cells += ["" if s is None else f"{s:.3f}" for s in phases]
        cells += [f"{peer.rss_gib:.1f}", f"{peer.pss_gib:.1f}"]
        self.lines.append(f"| {' | '.join(cells)} |")

    def _overhead(self, title: str, peers: dict[str, Peer]) -> None:
        bare = peers["vLLM alone"].median + peers["DeepSpeed alone"].median
        for label in ("rayhf", "rayhf overlap"):
            self._target(
                f"{title}: time of a {label} step / (vLLM alone + DeepSpeed alone)",
                peers[label].median / bare,
                at_most=1.25,
            )

    def _target(
        self, what: str, value: float, *, at_least: float = -math.inf, at_most: float = math.inf
    ) -> None:
        met = "yes" if at_least <= value <= at_most else "**no**"
        limit = f"at least {at_least:g}" if at_most == math.inf else f"at most {at_most:g}"
        self.targets.append(f"| {what} | {value:.2f} | {limit} | {met} |")

    def weight_sync(self, dtype: str) -> None:
        """Measure how far the engine's log-probs are from the learner's after three syncs."""
        spec = self.spec("tiny", "grpo", varying=False, dtype=dtype)
        log(f"weight sync, engine in {dtype}")
        peer = Peer.start(f"sync {dtype}", "agreement", spec, self.scratch)
        try:
            report = peer.read_report()
        finally:
            peer.stop()
        self.others.peers_s += peer.cpu_s
        self.targets.append(
            f"| weight sync, engine in {dtype}, learner in float32: mean (max) gap of the log-"
            f"probs of {report['tokens']} sampled tokens, in nats; the policy had moved by "
            f"{report['moved']:.2f} on average | {report['mean']:.1e} ({report['max']:.1e}) | | |"
        )

    def run(self) -> str:
        started = time.monotonic()
        self.against_trl("tiny", "grpo", varying=False, turns=5 if self.quick else 9, engines=True)
        self.against_trl("tiny", "grpo", varying=True, turns=3 if self.quick else 7, engines=False)
        if not self.quick:
            self.against_trl("tiny", "online_dpo", varying=False, turns=9, engines=False)
            self.against_trl("tiny", "online_dpo", varying=True, turns=7, engines=False)
            self.against_trl("mid", "grpo", varying=False, turns=3, engines=True)
        for dtype in ("float32",) if self.quick else ("float32", "bfloat16"):
            self.weight_sync(dtype)
        return self.report(time.monotonic() - started)

    def report(self, seconds: float) -> str:
        names = ("trl", "transformers", "deepspeed", "ray", "torch")
        packages = ", ".join(f"{name} {version(name)}" for name in names)
        heads = ["case", "system", "mean length", "s per step", "completions/s", "vs TRL"]
        heads += [*(f"{phase} s" for phase in PHASES), "RSS GiB", "PSS GiB"]
        return "\n".join(
            [
                f"Measured {datetime.now(UTC):%Y-%m-%d %H:%M} UTC in {seconds / 60:.0f} minutes, "
                f"{'quick run, ' * self.quick}on {self.threads} threads of {_cpu()}; other "
                f"processes had {self.others.share():.0%} of the machine; {packages}.",
                "",
                SETTING,
                "",
                f"| {' | '.join(heads)} |",
                "|---|---|" + "--:|" * (len(heads) - 2),
                *self.lines,
                "",
                "| target | measured | expected | met |",
                "|---|--:|--:|---|",
                *self.targets,
                "",
            ]
        )


def _cpu() -> str:
    names = re.findall(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.M)
    return names[0] if names else platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="two cases, fewer turns")
    parser.add_argument(
        "--record", action="store_true", help="write the table into tests/bench/RESULTS.md"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="rayhf-bench-") as scratch:
        text = Bench(Path(scratch), quick=options.quick).run()
    print(text)
    if options.record:
        put_section("## Speed", text)


if __name__ == "__main__":
    main()
