"""`make bench`: how fast rayhf trains, against TRL and against its own bare engines, in one table
from one run.

    python -m tests.bench.speed [--quick] [--record]

Every case starts its peers (peers.py), lets each do warm-up steps, and then gives them turns: one
step of A, one of B, ..., again and again. Medians over the turns. Same model, prompts, reward,
threads and optimizer work. `--record` writes the table into RESULTS.md. Whole runs: full about half
an hour, quick under 10 minutes, on two cores.
"""

from __future__ import annotations

import argparse
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
"""Between turns, so that one peer's spinning worker threads are asleep when the next one starts."""

TURNS_S = 120.0
"""For the turns of one case."""


@dataclass
class Peer:
    """A child process and what it did."""

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
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, text=True, bufsize=1, cwd=scratch, env=env,
            )  # fmt: skip
        peer = Peer(label, kind, spec, process, log)
        peer._write(spec.dump())
        return peer

    def _write(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def answer(self) -> dict[str, Any]:
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
        report = self.answer()
        if keep:
            self.seconds.append(time.perf_counter() - started)
            self.reports.append(report)

    def stop(self) -> None:
        """Note the memory, then end the process tree."""
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
        """Completions per second of whole training steps."""
        return self.spec.completions / self.median

    def phase(self, name: str) -> float | None:
        values = [r["phases"][name] for r in self.reports if name in r.get("phases", {})]
        return statistics.median(values) if values else None

    @property
    def length(self) -> float:
        return statistics.fmean(report["length"] for report in self.reports)


def usage(pid: int) -> tuple[float, float, float]:
    """Of a process tree: the sum of every process's own peak RSS in GiB (pages that processes share
    count for each of them), the sum of what they hold now with shared pages divided among them
    (PSS) in GiB, and CPU seconds."""
    peak = proportional = 0
    cpu = 0.0
    for process in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
            rollup = Path(f"/proc/{process.pid}/smaps_rollup").read_text()
            cpu += sum(process.cpu_times()[:4])
        except (OSError, psutil.NoSuchProcess):  # it ended meanwhile
            continue
        peak += sum(int(kib) for kib in re.findall(r"^VmHWM:\s+(\d+) kB", status, re.M))
        proportional += sum(int(kib) for kib in re.findall(r"^Pss:\s+(\d+) kB", rollup, re.M))
    return peak / 2**20, proportional / 2**20, cpu


class Neighbours:
    """How much of the machine's CPU time went to processes that are not ours: a table from a busy
    machine means little."""

    def __init__(self) -> None:
        self._started, self._busy, self._self = (
            time.monotonic(),
            self._total(),
            sum(psutil.Process().cpu_times()[:2]),
        )
        self.ours = 0.0

    @staticmethod
    def _total() -> float:
        times = psutil.cpu_times()
        return float(times.user + times.system + times.nice)

    def share(self) -> float:
        """From 0 to 1."""
        busy = (
            self._total()
            - self._busy
            - self.ours
            - (sum(psutil.Process().cpu_times()[:2]) - self._self)
        )
        return max(0.0, busy) / ((time.monotonic() - self._started) * (os.cpu_count() or 1))


def play(
    title: str, cast: dict[str, tuple[str, Spec]], scratch: Path, *, warmup: int, turns: int
) -> dict[str, Peer]:
    """Start every peer, warm up, take turns, stop. The first report of a peer ends its first step.
    A slow or busy machine gets fewer turns, but at least 3, once TURNS_S have passed."""
    say(f"{title}: starting {', '.join(cast)}")
    peers: dict[str, Peer] = {}
    try:
        for (
            label,
            (kind, spec),
        ) in (
            cast.items()
        ):  # one after the other: several Ray clusters starting at once run into its limits
            peers[label] = Peer.start(label, kind, spec, scratch)
            peers[label].answer()
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
        say(
            f"  {label:<24} {peer.median:6.2f} s a step ({min(peer.seconds):.2f} to {max(peer.seconds):.2f}), {peer.rate:.1f}/s"
        )
    return peers


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# ------------------------------------------------------------------------------------------------------------- cases


class Bench:
    """Builds the models, plays the cases, writes the report."""

    def __init__(self, scratch: Path, *, quick: bool) -> None:
        self.scratch, self.quick = scratch, quick
        self.threads = len(os.sched_getaffinity(0))
        self.lines: list[str] = []
        self.verdicts: list[str] = []
        self.neighbors = Neighbours()
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
        """A case of the table; `engines`: the bare engines take turns, too."""
        spec = self.spec(size, algorithm, varying=varying)
        cast = {
            "rayhf": ("rayhf", spec),
            "rayhf overlap": ("rayhf", replace(spec, max_staleness=1)),
            "TRL": ("trl", spec),
        }
        if engines:
            cast |= {"vLLM alone": ("vllm", spec), "DeepSpeed alone": ("deepspeed", spec)}
        name = {"grpo": "GRPO", "online_dpo": "online DPO"}[algorithm]
        title = f"{size}, {name}, {'varying' if varying else 'fixed'} length"
        peers = play(title, cast, self.scratch, warmup=2, turns=turns)
        self.neighbors.ours += sum(peer.cpu_s for peer in peers.values())
        say(f"  other processes' share of the machine so far: {self.neighbors.share():.0%}")
        for peer in peers.values():
            self._row(title, peer, peers["TRL"])
        target = 2.0 if varying else 1.0
        best = max(
            (peers[label] for label in ("rayhf", "rayhf overlap")), key=lambda peer: peer.rate
        )
        self._verdict(
            f"{title}: {best.label} / TRL, completions per second",
            best.rate / peers["TRL"].rate,
            target,
        )
        if engines:
            self._overhead(title, peers)

    def _row(self, title: str, peer: Peer, trl: Peer) -> None:
        phases = [
            peer.phase(name) for name in ("rollout", "scorer", "reference", "learner", "sync")
        ]
        cells = [
            title,
            peer.label,
            f"{peer.length:.0f}",
            f"{peer.median:.2f} ({min(peer.seconds):.2f}-{max(peer.seconds):.2f})",
        ]
        alone = peer.kind in ("vllm", "deepspeed")
        cells += ["", ""] if alone else [f"{peer.rate:.1f}", f"{peer.rate / trl.rate:.2f}x"]
        cells += ["" if s is None else f"{s:.3f}" for s in phases]
        self.lines.append(
            "| " + " | ".join([*cells, f"{peer.rss_gib:.1f}", f"{peer.pss_gib:.1f}"]) + " |"
        )

    def _overhead(self, title: str, peers: dict[str, Peer]) -> None:
        bare = peers["vLLM alone"].median + peers["DeepSpeed alone"].median
        for label in ("rayhf", "rayhf overlap"):
            self._verdict(
                f"{title}: time of a {label} round / (vLLM alone + DeepSpeed alone)",
                peers[label].median / bare,
                -1.25,
            )

    def _verdict(self, what: str, value: float, target: float) -> None:
        """A target below zero is an upper limit."""
        met = value <= -target if target < 0 else value >= target
        limit = f"at most {-target:g}" if target < 0 else f"at least {target:g}"
        self.verdicts.append(f"| {what} | {value:.2f} | {limit} | {'yes' if met else '**no**'} |")

    def weight_sync(self, dtype: str) -> None:
        """How far the engine's log-probs are from the learner's after three syncs."""
        spec = self.spec("tiny", "grpo", varying=False, dtype=dtype)
        say(f"weight sync, engine in {dtype}")
        peer = Peer.start(f"sync {dtype}", "agreement", spec, self.scratch)
        try:
            found = peer.answer()
        finally:
            peer.stop()
        self.neighbors.ours += peer.cpu_s
        self.verdicts.append(
            f"| weight sync, engine in {dtype}, learner in float32: mean (max) gap of the log-probs of {found['tokens']} "
            f"sampled tokens, in nats; the policy had moved by {found['moved']:.2f} on average "
            f"| {found['mean']:.1e} ({found['max']:.1e}) | | |"
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
        packages = ", ".join(
            f"{name} {version(name)}"
            for name in ("trl", "transformers", "deepspeed", "ray", "torch")
        )
        return "\n".join(
            [
                f"Measured {datetime.now(UTC):%Y-%m-%d %H:%M} UTC in {seconds / 60:.0f} minutes, {'quick run, ' * self.quick}on "
                f"{self.threads} threads of {_cpu()}; other processes had {self.neighbors.share():.0%} of the machine; "
                f"{packages}.",
                "",
                "64 completions per optimizer step, prompts of 16 tokens, float32, reference model included, everything "
                "interleaved step by step; medians (and range). Fixed: every answer has 64 tokens. Varying: answers end by "
                "themselves, the limit is 256. rayhf is synchronous and deterministic, rayhf overlap has max_staleness 1; TRL's "
                "trainers are synchronous, with transformers' generate (its vLLM modes do not run on CPU). Phases of rayhf "
                "overlap run at the same time. RSS: sum of every process's peak, shared pages counted in each; PSS: at the "
                "end, shared pages divided.",
                "",
                "| case | system | mean length | s per step | completions/s | vs TRL "
                "| rollout s | scorer s | reference s | learner s | sync s | RSS GiB | PSS GiB |",
                "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
                *self.lines,
                "",
                "| target | measured | wanted | met |",
                "|---|--:|--:|---|",
                *self.verdicts,
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
