"""Every loop beside its baselines at an equal budget: presets of configs/tiny with overrides.

Two cases that name the same preset with the same overrides share its runs. Numbers in overrides
make budgets equal: prompts x completions x iterations, or calls of the judge. Where completions of
two loops differ in length, as answers and judgments do, iterations were chosen from the tokens of
one run of each.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

from rayhf.config.load import load_config
from rayhf.config.schema import CampaignConfig

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, kw_only=True)
class Setup:
    """A preset with overrides."""

    label: str
    preset: str
    overrides: tuple[str, ...] = ()
    reference: Setup | None = None
    """Its last policy, of the same seed, becomes reference.model: the teacher of a distillation."""

    @property
    def name(self) -> str:
        """Name of its runs: equal setups have equal names, whatever their labels are."""
        parts = [*self.overrides, self.reference.name if self.reference else ""]
        if not any(parts):
            return self.preset
        return f"{self.preset}-{hashlib.sha256(repr(parts).encode()).hexdigest()[:8]}"

    @property
    def config(self) -> CampaignConfig:
        """Its config, validated. Raises ConfigError."""
        return load_config(ROOT / "configs/tiny" / f"{self.preset}.yaml", self.overrides)

    def plus(self, *overrides: str) -> Setup:
        """Return the same setup with further overrides."""
        return replace(self, overrides=(*self.overrides, *overrides))


@dataclass(frozen=True, kw_only=True)
class Case:
    """One loop's table."""

    loop: Setup
    baselines: tuple[Setup, ...]
    budget: str
    """What is equal."""
    metrics: tuple[str, ...]
    """Held-out figures; the first one chooses learning rates."""
    lower_is_better: bool = False


def _setup(label: str, preset: str, *overrides: str) -> Setup:
    return Setup(label=label, preset=preset, overrides=overrides)


def _case(metrics: tuple[str, ...], budget: str, loop: Setup, *baselines: Setup) -> Case:
    return Case(loop=loop, baselines=baselines, budget=budget, metrics=metrics)


def _game(label: str, preset: str) -> Case:
    return Case(
        loop=_setup(label, preset),
        baselines=(ONLINE_DPO_GAME,),
        budget="comparisons and generated tokens: 25,600 completions",
        metrics=("game/exploitability_average", "game/exploitability"),
        lower_is_better=True,
    )


def _words_dpo(iterations: int, max_tokens: int) -> Setup:
    """Return online DPO on words with 512 completions per iteration."""
    limits = (f"run.iterations={iterations}", f"rollout.max_tokens={max_tokens}")
    return _setup("online DPO", "online_dpo_words", *limits)


ARITHMETIC = ("eval/arithmetic/sampled",)
WORDS = ("eval/words/sampled",)
INSTRUCTIONS = ("eval/instructions/sampled",)
SUMS = ("eval/sums/sampled",)

SMALL = "generated tokens: 7,680 completions"
LARGE = "generated tokens: 15,360 completions"
FILTERED = "generated tokens: 24 prompts with a signal out of at most 32, against 32 prompts"
FEW_WORDS = "generated tokens: 5,120 completions"
JUDGED = "generated tokens, those of judgments included"

GRPO = _setup("GRPO", "grpo_arithmetic")
ONLINE_DPO = _setup("online DPO", "online_dpo_arithmetic")
MCTS_DPO = _setup("MCTS-DPO", "mcts_dpo_arithmetic", "run.iterations=28")
OFFLINE_DPO = _setup(
    "offline DPO: one sync, at the end",
    "semi_online_dpo_arithmetic",
    "run.iterations=1",
    "prompts.batch=1920",
)
SFT = _setup("SFT on worked answers", "sft_arithmetic")
ONLINE_DPO_GAME = _setup(
    "online DPO on the same comparisons",
    "sppo_game",
    "algorithm={type: online_dpo, samples: 8}",
    # With SPPO's learning rate it stops playing moves; it converges to a single one.
    "learner.lr=3e-4",
    "learner.epochs=2",
    "guards.no_signal.pause=null",
)
VERIFIED_DPO = (
    "algorithm={type: online_dpo, samples: 8}",
    "evaluations={}",
    "run.eval_every=0",
)
VERIFIED = "online DPO on the rule's scores, which the loop does without"
SELF_REWARDING = _setup("self-rewarding", "self_rewarding_instructions")
SELF_REWARDING_DPO = _setup(
    VERIFIED, "self_rewarding_instructions", *VERIFIED_DPO, "run.iterations=69"
)
REFILLED = ("prompts.batch=24", "algorithm.refill.budget=1.34")
ROUND_ROBIN = (
    "scorer.train=[{type: pairwise_rule, function: 'rayhf.tiny.arithmetic:prefer', "
    "comparisons: round_robin}]"
)

CASES = {
    "dapo": _case(ARITHMETIC, FILTERED, _setup("DAPO", "dapo_arithmetic", *REFILLED), GRPO),
    "dr_grpo": _case(ARITHMETIC, SMALL, _setup("Dr. GRPO", "dr_grpo_arithmetic"), GRPO),
    "gspo": _case(ARITHMETIC, SMALL, _setup("GSPO", "gspo_arithmetic"), GRPO),
    "cispo": _case(ARITHMETIC, FILTERED, _setup("CISPO", "cispo_arithmetic", *REFILLED), GRPO),
    "rloo": _case(ARITHMETIC, SMALL, _setup("RLOO", "rloo_arithmetic"), GRPO),
    "reinforce": _case(ARITHMETIC, SMALL, _setup("REINFORCE++", "reinforce_arithmetic"), GRPO),
    "reinforce_baseline": _case(
        ARITHMETIC,
        SMALL,
        _setup("REINFORCE++ with baseline", "reinforce_baseline_arithmetic"),
        GRPO,
    ),
    "ppo": _case(ARITHMETIC, SMALL, _setup("PPO", "ppo_arithmetic", "run.iterations=30"), GRPO),
    "online_dpo": _case(
        ARITHMETIC, SMALL, _setup("online DPO", "online_dpo_arithmetic", "prompts.batch=32"), GRPO
    ),
    "semi_online_dpo": _case(
        ARITHMETIC,
        f"{LARGE}, and 30 optimizer steps",
        _setup("semi-online DPO", "semi_online_dpo_arithmetic"),
        ONLINE_DPO,
        OFFLINE_DPO,
    ),
    "online_kto": _case(
        ARITHMETIC,
        LARGE,
        _setup("online KTO", "online_kto_arithmetic", "algorithm.samples=8"),
        ONLINE_DPO,
    ),
    "grpo_words": _case(WORDS, FEW_WORDS, _setup("GRPO", "grpo_words"), _words_dpo(10, 64)),
    "ppo_words": _case(
        WORDS, FEW_WORDS, _setup("PPO", "ppo_words", "run.iterations=20"), _words_dpo(10, 64)
    ),
    "iterative_dpo": _case(
        WORDS,
        "generated tokens: 12,288 completions",
        _setup("iterative DPO", "iterative_dpo_words"),
        _words_dpo(24, 32),
    ),
    "hypo": _case(
        WORDS,
        "generated tokens: 7,680 completions; HyPO and offline DPO have given pairs too",
        _setup("HyPO", "hypo_words"),
        _setup("offline DPO", "hypo_words", "algorithm.kl_coef=0"),
        _words_dpo(15, 32),
    ),
    "kto": _case(
        WORDS,
        "given completions; nothing is generated",
        _setup("KTO", "kto_words"),
        _setup("offline DPO", "dpo_words"),
    ),
    "distill": _case(
        ARITHMETIC,
        f"{SMALL}; SFT, the teacher, has 3,840 given answers",
        Setup(label="distillation", preset="distill_arithmetic", reference=SFT),
        GRPO,
        SFT,
    ),
    "xpo": _case(
        ARITHMETIC,
        f"{LARGE}, half of XPO's by the initial policy",
        _setup("XPO", "xpo_arithmetic"),
        ONLINE_DPO,
    ),
    "mcts_dpo": _case(
        ARITHMETIC,
        "generated tokens",
        MCTS_DPO,
        ONLINE_DPO,
    ),
    "tpo": _case(
        ARITHMETIC,
        "generated tokens",
        _setup("TPO", "tpo_arithmetic", "run.iterations=28"),
        MCTS_DPO,
        ONLINE_DPO,
    ),
    "tournament": _case(
        ARITHMETIC,
        "comparisons: about 3.5 different ones for each of 32 prompts, 5.9 for each of 19",
        _setup("GRPO, Swiss tournament", "grpo_tournament_arithmetic"),
        _setup("GRPO, round robin", "grpo_tournament_arithmetic", "prompts.batch=19", ROUND_ROBIN),
    ),
    "sppo": _game("SPPO", "sppo_game"),
    "inpo": _game("INPO", "inpo_game"),
    "nash_md": _game("Nash-MD", "nash_md_game"),
    "dno": _game("DNO", "dno_game"),
    "mnpo": _game("MNPO", "mnpo_game"),
    "self_rewarding": _case(INSTRUCTIONS, JUDGED, SELF_REWARDING, SELF_REWARDING_DPO),
    "train_judge": _case(
        INSTRUCTIONS,
        JUDGED,
        _setup("self-rewarding, judge trained", "self_rewarding_judge_instructions"),
        SELF_REWARDING,
        SELF_REWARDING_DPO,
    ),
    "spar": _case(
        INSTRUCTIONS,
        "generated tokens, and iterations for SPaR without tree search",
        _setup("SPaR", "spar_instructions"),
        _setup("SPaR without tree search", "spar_instructions", "algorithm.search=none"),
        _setup(VERIFIED, "spar_instructions", *VERIFIED_DPO, "run.iterations=59"),
    ),
    "challenger_solver": _case(
        SUMS,
        "generated tokens, those of tasks included",
        _setup("challenger and solver", "challenger_solver_challenges"),
        _setup(
            "with a challenger that does not learn",
            "challenger_solver_challenges",
            "algorithm.challenger.lr=1e-12",
        ),
        _setup(
            "GRPO on given questions, which the loop does without",
            "challenger_solver_challenges",
            "algorithm={type: grpo, samples: 8, kl: {coef: 0.0}}",
            "prompts.train=.tiny/arithmetic/train.jsonl",
            "prompts.batch=58",
        ),
    ),
}
"""By name, those first whose runs are shared most."""
