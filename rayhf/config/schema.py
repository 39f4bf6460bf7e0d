"""The campaign config, section by section. One batch unit: prompts. Imports no torch; a docstring
under a field is its help."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
)

from rayhf.config.algorithms import AlgorithmConfig
from rayhf.config.base import Name, Section
from rayhf.config.evaluations import EvaluationConfig
from rayhf.config.guards import GuardsConfig
from rayhf.config.registry import ALGORITHMS, EVALUATIONS, TRACKERS
from rayhf.config.scorers import ScorerConfig, ScorerEntry
from rayhf.config.service import ServiceConfig
from rayhf.config.sources import PromptSource
from rayhf.config.trackers import TrackerConfig

Fraction = Annotated[float, Field(ge=0, le=1)]
Share = Annotated[float, Field(gt=0, le=1)]
Pool = Literal["rollout", "learner", "reference", "scorer"]
Dtype = Literal["float32", "bfloat16"]


class RunConfig(Section):
    """Where the campaign lives and how long it goes on."""

    dir: Path
    iterations: PositiveInt
    """Rounds: explore, learn, sync."""
    eval_every: NonNegativeInt = 10
    """Rounds between evaluations on held-out prompts; 0 evaluates only before the first and after
    the last round."""
    eval_prompts: PositiveInt | None = None
    """Held-out prompts per evaluation; all by default."""
    checkpoint_every: NonNegativeInt = 20
    """Rounds between checkpoints; 0 writes only the last one."""
    keep_checkpoints: Annotated[int, Field(ge=2)] = 2
    """The newest ones that stay."""
    keep_every: NonNegativeInt = 0
    """Rounds whose checkpoint stays for good: every keep_every-th; 0 is off."""
    keep_best: bool = True
    """The checkpoint with the best held-out evaluation (eval/<task>/sampled) stays too."""
    max_staleness: NonNegativeInt = 0
    """Rounds that generation may run ahead of learning: 0 is strictly on-policy, 1 overlaps the
    two."""
    deterministic: bool | None = None
    """Requests enter the engines in waves, so that equal seeds give equal numbers. Default: when
    max_staleness is 0."""
    max_in_flight: PositiveInt | None = None
    """Prompts of a round that are explored at the same time. Default: 65,536, or what fills the
    engines twice if that is more."""
    timeout_s: PositiveFloat = 600
    """Limit on any single wait between roles, in seconds."""
    stall_s: PositiveFloat = 300
    """An engine that has work and makes no progress for so long is replaced, in seconds."""
    restarts: NonNegativeInt = 5
    """Of any one actor within an hour, and of the learners without a commit in between, before the
    run stops."""
    start_timeout_s: PositiveFloat = 300
    """Limit on placing and starting all actors, in seconds."""

    @property
    def is_deterministic(self) -> bool:
        """`deterministic`, or what it is by default."""
        return self.max_staleness == 0 if self.deterministic is None else self.deterministic


class LoraConfig(Section):
    rank: PositiveInt = 16
    alpha: PositiveFloat = 32
    dropout: Fraction = 0.0
    target_modules: tuple[str, ...] | Literal["all-linear"] = "all-linear"


class PolicyConfig(Section):
    model: Path
    """Hugging Face model directory with a tokenizer that has a chat template."""
    dtype: Dtype = "bfloat16"
    """Of the rollout engines and the reference; the learner's own precision is learner.dtype."""
    lora: LoraConfig | None = None
    max_length: PositiveInt | None = None
    """Prompt plus response, in tokens. Default: the model's own limit."""


class PromptsConfig(Section):
    train: PromptSource
    """Training prompts: the path of a JSONL or Parquet file with `prompt` (string) or `messages`
    (list of role/content) and optional `answer`, or a source with its `type` and settings."""
    heldout: PromptSource | None = None
    """Evaluation prompts, like train. Default: no evaluation."""
    task: Name = "heldout"
    """Name of the held-out task in metrics: eval/<task>/..."""
    batch: PositiveInt = 64
    """Prompts per iteration: the one batch unit."""


class RolloutConfig(Section):
    max_tokens: PositiveInt = 1024
    """Per response."""
    temperature: PositiveFloat = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: NonNegativeInt = 0
    """0 is off."""
    stop: tuple[str, ...] = ()
    """Strings that end a response."""
    engines: PositiveInt = 1
    """vLLM engines (data parallel)."""
    tensor_parallel: PositiveInt = 1
    """GPUs per engine."""
    max_num_seqs: PositiveInt = 256
    """Sequences in one engine's batch."""
    kv_cache_gib: PositiveFloat | None = None
    """KV cache per engine in GiB. Default: 0.25 on CPU; on GPU what memory_fraction leaves."""
    memory_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.85
    """Of each GPU, for weights and KV cache."""
    prefix_caching: bool | None = None
    """Keep keys and values of prompts and steps for later requests. Default: not on CPU in a
    deterministic run, where bits could depend on what a replaced engine has not seen."""
    enforce_eager: bool | None = None
    """No CUDA graphs. Default: true on CPU, false on GPU."""
    mismatch_limit: PositiveFloat = 1.0
    """Stop when the mean absolute gap between a bfloat16 engine's and the learner's log-probs of a
    sync's probe passes this, in nats. A float32 engine must agree to 1e-3."""
    threads: PositiveInt | None = None
    """CPU threads per engine. Default: derived from the machine."""


class ReferenceConfig(Section):
    model: Path | None = None
    """Where the initial reference is not the policy's own model. Same tokenizer."""
    token_budget: PositiveInt = 16384
    """Padded tokens per forward pass."""
    threads: PositiveInt | None = None


class LearnerConfig(Section):
    lr: PositiveFloat = 1e-6
    critic_lr: PositiveFloat = 9e-6
    """Default from OpenRLHF's PPO."""
    critic_model: Path | None = None
    """What the critic starts from, with a fresh value head. Default: the policy. Same tokenizer."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup: Fraction = 0.0
    """Share of all optimizer steps."""
    min_lr: Fraction = 0.1
    """The schedule's end, as a share of lr."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    weight_decay: NonNegativeFloat = 0.0
    grad_clip: NonNegativeFloat = 1.0
    """Global gradient norm; 0 is off."""
    epochs: PositiveInt = 1
    """Passes over a round's examples."""
    prompts_per_step: PositiveInt | None = None
    """Prompts per optimizer step; must divide prompts.batch. Default: the whole round."""
    ranks: PositiveInt = 1
    """Data-parallel learner processes. A campaign can be continued with another number, and another
    zero_stage or dtype."""
    zero_stage: Annotated[int, Field(ge=0, le=3)] = 2
    """bfloat16 with 0 runs as 1: DeepSpeed's stage 0 would add gradients up in bfloat16."""
    offload: bool = False
    """Optimizer states in host memory (ZeRO-Offload)."""
    dtype: Dtype = "bfloat16"
    """bfloat16 keeps float32 master weights."""
    token_budget: PositiveInt = 16384
    """Padded tokens per micro-batch and rank."""
    activation_checkpointing: bool = False
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    bucket_mib: PositiveInt = 256
    """Size of the buckets in which weights travel, in MiB."""
    collective_timeout_s: PositiveFloat = 600
    threads: PositiveInt | None = None


class ClusterConfig(Section):
    """Who lives where. The campaign is the same on a laptop and on a cluster; only this section
    differs.

    Four pools: rollout (the engines), learner (and critic), reference, scorer (and evaluators).
    CPUs per actor are derived.
    """

    address: str = "local"
    """"local" starts Ray on this machine; "auto" joins the running cluster."""
    device: Literal["cpu", "gpu"] = "cpu"
    placement: Literal["separate", "colocate"] = "separate"
    """separate: every actor has its own GPUs. colocate: engine i and learner rank i share GPU i and
    take turns: engines sleep while learners learn, learners' states lie in host memory while
    engines write. On CPU only the turns are taken."""
    transport: Literal["auto", "object_store", "broadcast", "cuda_ipc"] = "auto"
    """How new weights reach the engines. object_store: through host memory, from anywhere to
    anywhere. broadcast: from device to device, through a process group (NCCL between separate GPUs,
    gloo on CPU). cuda_ipc: each engine loads from the memory of the learner rank on its GPU
    (colocate). Default: object_store on CPU, broadcast between separate GPUs, cuda_ipc on shared
    ones. In rounds in which the reference moves, object_store in any case: the reference takes the
    weights from there."""
    gpus_per_reference: Share | None = None
    """Of one GPU, for example 0.5. Default: a GPU of its own; with colocate a place beside the
    others on the first GPU."""
    gpus_per_scorer: Share | None = None
    """The same for each scorer and evaluator with a model. Two actors of 0.5 may sit on one GPU."""
    resources: dict[Pool, dict[str, PositiveFloat]] = Field(default_factory=dict)
    """Custom resources that each actor of a pool needs, as nodes offer them with `ray start
    --resources`: {rollout: {h100: 1}} puts engines on nodes that have h100."""
    placement_timeout_s: PositiveFloat = 50
    """How long to wait until a running cluster has room for everyone, in seconds; for an autoscaler
    that may be minutes."""
    gpu_memory_gib: PositiveFloat | None = None
    """Of one GPU, for the estimates of `rayhf check`. Default: the smallest that the cluster's
    nodes report."""

    @field_validator("resources")
    @classmethod
    def _check_resources(
        cls, resources: dict[Pool, dict[str, float]]
    ) -> dict[Pool, dict[str, float]]:
        for pool, amounts in resources.items():
            for name, amount in amounts.items():
                if name.lower() in ("cpu", "gpu", "memory", "object_store_memory"):
                    raise ValueError(
                        f"{pool}.{name} is derived; expected custom resources of your nodes"
                    )
                if amount > 1 and amount != int(amount):
                    raise ValueError(
                        f"{pool}.{name} is {amount:g}; Ray counts more than 1 in whole numbers"
                    )
        return resources


class CampaignConfig(Section):
    seed: NonNegativeInt = 0
    run: RunConfig
    policy: PolicyConfig
    prompts: PromptsConfig
    evaluations: dict[Name, Annotated[EvaluationConfig, EVALUATIONS]] = Field(default_factory=dict)
    """Further evaluations by task name."""
    algorithm: Annotated[AlgorithmConfig, ALGORITHMS]
    rollout: RolloutConfig = RolloutConfig()
    scorer: ScorerConfig
    reference: ReferenceConfig = ReferenceConfig()
    learner: LearnerConfig = LearnerConfig()
    cluster: ClusterConfig = ClusterConfig()
    trackers: tuple[Annotated[TrackerConfig, TRACKERS], ...] = ()
    """Where metrics are mirrored, for example [wandb]; metrics.jsonl is always written."""
    guards: GuardsConfig = GuardsConfig()
    service: ServiceConfig | None = None
    """Serve the campaign's control over gRPC while it runs: status, watch, pause, stop, prompts and
    human preferences in."""

    @property
    def evaluator_scorers(self) -> dict[str | None, tuple[ScorerEntry, ...]]:
        """Scorers of evaluations, one actor each: by task; None is the held-out evaluation's own."""
        scorers: dict[str | None, tuple[ScorerEntry, ...]] = {}
        if self.scorer.evaluate is not None:
            scorers[None] = self.scorer.evaluate
        for task, evaluation in self.evaluations.items():
            if evaluation.scorers:
                scorers[task] = evaluation.scorers
        return scorers
