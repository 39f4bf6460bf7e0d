"""`make bench`: training speed of rayhf, TRL, and rayhf's bare engines, measured in one run.

    python -m tests.bench.speed [CASE ...] [--quick] [--record]

Every case starts its systems (peers.py), lets each do warm-up steps, and then times them in turns:
one step of A, one of B, ..., repeatedly. Reported are medians over the turns. Model, prompts,
reward, threads and optimizer work are the same. `--record` writes each case into a section of its
own of RESULTS.md, as soon as it is measured. A full run takes 40 minutes on two cores, a quick one
under 10.
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import re
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from tests.bench.results import put_section
from tests.bench.timed_peers import OtherProcesses, Peer, log, time_peers
from tests.bench.workload import Size, Spec, write_model, write_prompts

PHASES = ("rollout", "scorer", "reference", "learner", "sync")
SYSTEMS: dict[str, tuple[str, dict[str, Any]]] = {
    "rayhf": ("rayhf", {}),
    "rayhf overlap": ("rayhf", {"max_staleness": 1}),
    "rayhf padded": ("rayhf", {"packing": "off"}),
    "TRL": ("trl", {}),
    "vLLM alone": ("vllm", {}),
    "DeepSpeed alone": ("deepspeed", {}),
}
"""By label: the kind of peer, and what its Spec has of its own."""
BARE = ("vLLM alone", "DeepSpeed alone")


@dataclass(frozen=True, kw_only=True)
class Case:
    """One case of the table, with what is wanted of it."""

    size: Size
    algorithm: Literal["grpo", "online_dpo", "mcts_dpo"]
    prompts: int
    samples: int
    prompt_tokens: int = 16
    natural: bool = False
    """Whether completions end by themselves; otherwise each has `max_tokens`."""
    max_tokens: int = 64
    micro: int = 16
    turns: int
    against_trl: Mapping[str, float] = field(default_factory=dict)
    """By label: the least completions per second, as a multiple of TRL's."""
    against_bare: float | None = None
    """The longest step, as a multiple of vLLM alone + DeepSpeed alone."""
    against_padded: float | None = None
    """The longest learner phase, as a multiple of that of padded rows."""
    quick: bool = False
    """Whether a quick run has it."""

    @property
    def labels(self) -> list[str]:
        """The systems of the case, in the order of their turns."""
        labels = ["rayhf"]
        labels += ["rayhf overlap"] * ("rayhf overlap" in self.against_trl)
        labels += ["rayhf padded"] * (self.against_padded is not None)
        labels += ["TRL"] * bool(self.against_trl)
        return [*labels, *(BARE if self.against_bare is not None else ())]

    @property
    def title(self) -> str:
        tokens = "natural" if self.natural else str(self.max_tokens)
        name = {"grpo": "GRPO", "online_dpo": "online DPO", "mcts_dpo": "MCTS-DPO"}[self.algorithm]
        size = f"{self.prompts} x {self.samples} x {tokens}"
        return f"{self.size}, {name}, prompts of {self.prompt_tokens}, {size}"


def _fixed(sync: float, overlap: float) -> dict[str, float]:
    return {"rayhf": sync, "rayhf overlap": overlap}


GRPO: dict[str, Any] = {"algorithm": "grpo", "prompts": 8, "samples": 8}
DPO: dict[str, Any] = {"algorithm": "online_dpo", "prompts": 32, "samples": 2}
NATURAL: dict[str, Any] = {"natural": True, "max_tokens": 256}
CASES = {
    "grpo": Case(
        size="tiny", **GRPO, turns=9, against_trl=_fixed(1.0, 1.25), against_bare=1.1, quick=True
    ),
    "grpo-natural": Case(
        size="tiny", **GRPO, **NATURAL, turns=7, against_trl=_fixed(2.2, 2.7), quick=True
    ),
    "dpo": Case(size="tiny", **DPO, turns=9, against_trl=_fixed(1.0, 1.25), against_bare=1.1),
    "dpo-natural": Case(size="tiny", **DPO, **NATURAL, turns=7, against_trl=_fixed(2.2, 2.7)),
    "mid": Case(size="mid", **GRPO, turns=3, against_trl=_fixed(1.25, 1.35), against_bare=1.1),
    "mid-prefix": Case(
        size="mid",
        **GRPO | {"prompts": 4},
        prompt_tokens=256,
        turns=3,
        against_trl={"rayhf": 2.5},
        against_padded=0.45,
    ),
    "smollm2": Case(
        size="smollm2",
        **GRPO | {"prompts": 2},
        prompt_tokens=128,
        max_tokens=48,
        micro=4,
        turns=3,
        against_trl={"rayhf": 1.5},
        against_bare=1.15,
    ),
    "mcts": Case(size="tiny", algorithm="mcts_dpo", prompts=64, samples=8, turns=5),
}
AGREEMENT = "agreement"
"""Not a comparison: the engine's log-probs against the learner's, after weight syncs."""


class Bench:
    """Builds the models, runs the cases, writes the report."""

    def __init__(self, scratch: Path, *, quick: bool) -> None:
        self.scratch = scratch
        self.quick = quick
        self.threads = len(os.sched_getaffinity(0))
        self.lines: list[str] = []
        """Rows of the table of the case under way."""
        self.targets: list[str] = []
        self.others = OtherProcesses()
        self._started = time.monotonic()

    def spec(self, case: Case, *, dtype: str = "float32") -> Spec:
        """Write the case's model and prompts, and return its workload."""
        model = self.scratch / f"{case.size}-{'natural' if case.natural else 'fixed'}-{dtype}"
        if not model.exists():
            write_model(
                model,
                case.size,
                mean_length=64 if case.natural else None,
                max_tokens=case.max_tokens,
                dtype=dtype,
            )
        prompts = self.scratch / f"prompts-{case.prompt_tokens}.jsonl"
        write_prompts(prompts, tokens=case.prompt_tokens)
        return Spec(
            algorithm=case.algorithm,
            model=str(model),
            train=str(prompts),
            prompt_tokens=case.prompt_tokens,
            max_tokens=case.max_tokens,
            prompts=case.prompts,
            samples=case.samples,
            micro=case.micro,
            threads=self.threads,
            dtype=dtype,
        )

    def compare(self, case: Case) -> str:
        """Run one case; return its report."""
        self._start()
        spec = self.spec(case)
        systems: dict[str, tuple[str, Spec]] = {}
        for label in case.labels:
            kind, own = SYSTEMS[label]
            systems[label] = (kind, replace(spec, **own))
        turns = max(3, case.turns // 2) if self.quick else case.turns
        peers = time_peers(case.title, systems, self.scratch, warmup=2, turns=turns)
        self.others.peers_s += sum(peer.cpu_s for peer in peers.values())
        log(f"  other processes' share of the machine so far: {self.others.share():.0%}")
        for peer in peers.values():
            self._row(peer, peers.get("TRL"))
        for label, least in case.against_trl.items():
            self._target(
                f"{label} / TRL, completions per second",
                peers[label].rate / peers["TRL"].rate,
                at_least=least,
            )
        if case.against_bare is not None:
            self._target(
                "time of a rayhf step / (vLLM alone + DeepSpeed alone)",
                peers["rayhf"].median / sum(peers[label].median for label in BARE),
                at_most=case.against_bare,
            )
        if case.against_padded is not None:
            learner, padded = (peers[p].phase("learner") for p in ("rayhf", "rayhf padded"))
            assert learner is not None and padded is not None
            self._target(
                "learner's time / of padded rows",
                learner / padded,
                at_most=case.against_padded,
            )
        if case.algorithm == "mcts_dpo":
            self._search(peers["rayhf"])
        return self._report()

    def _search(self, peer: Peer) -> None:
        """Report what a tree search feeds the learner, and how long its engine waits."""

        def median(above: str, below: str) -> float:
            reports = [report["metrics"] for report in peer.reports]
            return float(statistics.median(r[above] / r[below] for r in reports))

        fed = median("learner/tokens_fed", "learner/tokens_distinct")
        self._target("tokens fed / distinct", fed, at_most=1.05)
        busy = median("time/rollout_s", "time/explore_s")
        self._target("share of the search in which the engine works", busy, at_least=0.8)

    def _row(self, peer: Peer, trl: Peer | None) -> None:
        phases = [peer.phase(name) for name in PHASES]
        cells = [
            peer.label,
            f"{peer.length:.0f}",
            f"{peer.median:.2f} ({min(peer.seconds):.2f}-{max(peer.seconds):.2f})",
        ]
        if trl is None or peer.label in BARE:
            cells += ["", ""]
        else:
            cells += [f"{peer.rate:.1f}", f"{peer.rate / trl.rate:.2f}x"]
        cells += ["" if s is None else f"{s:.3f}" for s in phases]
        cells += [f"{peer.rss_gib:.1f}", f"{peer.pss_gib:.1f}"]
        self.lines.append(f"| {' | '.join(cells)} |")

    def _target(
        self, what: str, value: float, *, at_least: float = -math.inf, at_most: float = math.inf
    ) -> None:
        met = "yes" if at_least <= value <= at_most else "**no**"
        limit = f"at least {at_least:g}" if at_most == math.inf else f"at most {at_most:g}"
        self.targets.append(f"| {what} | {value:.3f} | {limit} | {met} |")

    def weight_sync(self, dtype: str) -> str:
        """Measure how far the engine's log-probs are from the learner's after three syncs."""
        self._start()
        spec = self.spec(CASES["grpo"], dtype=dtype)
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
        return self._report()

    def run(self, names: Sequence[str], *, record: bool) -> None:
        """Run the cases, by default all; print each one's report, and record it if asked."""

        def show(heading: str, text: str) -> None:
            print(f"{heading}\n\n{text}", flush=True)
            if record:
                put_section(heading, text, under="## Speed")

        default = [n for n, case in CASES.items() if case.quick or not self.quick]
        for name in names or [*default, AGREEMENT]:
            if name == AGREEMENT:
                for dtype in ("float32",) if self.quick else ("float32", "bfloat16"):
                    show(f"### Speed: weight sync, engine in {dtype}", self.weight_sync(dtype))
            else:
                show(f"### Speed: {CASES[name].title}", self.compare(CASES[name]))

    def _start(self) -> None:
        self.lines, self.targets = [], []
        self.others = OtherProcesses()
        self._started = time.monotonic()

    def _report(self) -> str:
        names = ("trl", "transformers", "deepspeed", "ray", "torch")
        packages = ", ".join(f"{name} {version(name)}" for name in names)
        heads = ["system", "mean length", "s per step", "completions/s", "vs TRL"]
        heads += [*(f"{phase} s" for phase in PHASES), "RSS GiB", "PSS GiB"]
        table = [f"| {' | '.join(heads)} |", "|---|" + "--:|" * (len(heads) - 1), *self.lines, ""]
        return "\n".join(
            [
                f"Measured {datetime.now(UTC):%Y-%m-%d %H:%M} UTC in "
                f"{(time.monotonic() - self._started) / 60:.0f} minutes, "
                f"{'quick run, ' * self.quick}on {self.threads} threads of {_cpu()}; other "
                f"processes had {self.others.share():.0%} of the machine; {packages}.",
                "",
                *(table if self.lines else ()),
                "| target | measured | expected | met |",
                "|---|--:|--:|---|",
                *self.targets,
            ]
        )


def _cpu() -> str:
    names = re.findall(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.M)
    return names[0] if names else platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cases", nargs="*", choices=[*CASES, AGREEMENT, []], help="default: all")
    parser.add_argument("--quick", action="store_true", help="two cases, fewer turns")
    parser.add_argument(
        "--record", action="store_true", help="write the table into tests/bench/RESULTS.md"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="rayhf-bench-") as scratch:
        Bench(Path(scratch), quick=options.quick).run(options.cases, record=options.record)


if __name__ == "__main__":
    main()
