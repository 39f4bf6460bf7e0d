"""The campaign config, section by section.

The docstring under a field is its help. The one batch unit is prompts. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Annotated, Literal

from pydantic import (
    BeforeValidator,
    Field,
    JsonValue,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
)

from rayhf.config.algorithms import AlgorithmConfig
from rayhf.config.base import Name, Section
from rayhf.config.deepspeed import check_deepspeed
from rayhf.config.environments import Environments
from rayhf.config.evaluations import EvaluationConfig
from rayhf.config.guards import GuardsConfig
from rayhf.config.models import ModelName
from rayhf.config.registry import ALGORITHMS, EVALUATIONS, TRACKERS
from rayhf.config.scorers import ScorerConfig, ScorerEntryConfig
from rayhf.config.service import ServiceConfig
from rayhf.config.sources import PromptSources
from rayhf.config.trackers import TrackerConfig

Fraction = Annotated[float, Field(ge=0, le=1)]
Share = Annotated[float, Field(gt=0, le=1)]
Pool = Literal["rollout", "learner", "reference", "scorer"]
Dtype = Literal["float32", "bfloat16", "float16"]
TrainDtype = Literal["float32", "bfloat16"]
Packing = Literal["tree", "rows", "off"]


class RunConfig(Section):
    """Run directory, length of the run, evaluation, checkpoints and timeouts."""

    dir: Path
    """Run directory."""
    iterations: PositiveInt
    """Number of iterations (explore, train, sync)."""
    eval_every: NonNegativeInt = 10
    """Iterations between evaluations on held-out prompts; 0 evaluates only before the first and
    after the last iteration."""
    eval_prompts: PositiveInt | None = None
    """Held-out prompts per evaluation; all by default."""
    checkpoint_every: NonNegativeInt = 20
    """Iterations between checkpoints; 0 writes only the last one."""
    keep_checkpoints: Annotated[int, Field(ge=2)] = 2
    """Number of newest checkpoints to keep."""
    keep_every: NonNegativeInt = 0
    """Iterations between checkpoints that are kept permanently; 0 is off."""
    keep_best: bool = True
    """Keep the checkpoint with the best held-out evaluation (eval/<task>/sampled) too."""
    max_staleness: NonNegativeInt = 0
    """Iterations that generation may run ahead of training: 0 is strictly on-policy, 1 overlaps the
    two."""
    deterministic: bool | None = None
    """Send requests to the engines in waves, so that equal seeds give equal numbers. Default: true
    where max_staleness is 0."""
    max_in_flight: PositiveInt | None = None
    """Prompts of an iteration that are explored concurrently. Default: 65,536, or twice the
    engines' capacity if that is more."""
    timeout_s: PositiveFloat = 600
    """Timeout of any single call between roles, in seconds. What takes long is divided: it counts
    for one chunk of log-probs or values (a token_budget), for one of scores, and for as many
    completions as an engine generates at a time."""
    stall_s: PositiveFloat = 300
    """Time without progress after which a busy engine is replaced, in seconds."""
    restarts: NonNegativeInt = 5
    """Maximum number of restarts of any one actor within an hour, and of the learners without a
    commit in between, before the run stops."""
    start_timeout_s: PositiveFloat = 1800
    """Timeout for placing and starting all actors, in seconds: an engine loads and compiles the
    model and captures CUDA graphs, which takes minutes for a large one."""

    @property
    def is_deterministic(self) -> bool:
        """`deterministic`, or its default."""
        return self.max_staleness == 0 if self.deterministic is None else self.deterministic


class LoraConfig(Section):
    """LoRA adapters of the policy (PEFT)."""

    rank: PositiveInt = 16
    """Rank of the adapters."""
    alpha: PositiveFloat = 32
    """Scale of the adapters: their output is multiplied by alpha / rank."""
    dropout: Fraction = 0.0
    """Dropout probability on the adapters' input."""
    target_modules: tuple[str, ...] | Literal["all-linear"] = "all-linear"
    """Names of the modules that get an adapter."""
    quantize: Literal["nf4"] | None = None
    """Precision of the frozen base weights of linear layers: nf4 is 4 bits (QLoRA, needs the extra
    qlora). Default: learner.dtype."""


class PolicyConfig(Section):
    """The model that is trained."""

    model: ModelName
    """Model directory, or a hub name such as Qwen/Qwen3-0.6B or Qwen/Qwen3-0.6B@REVISION. Its
    tokenizer must have a chat template."""
    dtype: Dtype = "bfloat16"
    """Precision of the rollout engines and the reference; learner.dtype is the learner's. float16
    resolves updates that are 8 times smaller than bfloat16's; its largest number is 65,504."""
    lora: LoraConfig | None = None
    """LoRA settings. Default: all parameters are trained."""
    max_length: PositiveInt | None = None
    """Maximum length of prompt plus completion, in tokens. Default: the model's own limit."""
    chat_template: Annotated[str, Field(min_length=1)] | None = None
    """Chat template in place of the tokenizer's: the path of a file, or the Jinja text itself."""
    chat_template_kwargs: dict[str, JsonValue] = Field(default_factory=dict)
    """Variables of the chat template, for example {enable_thinking: false}."""
    chat_date: date | None = None
    """The date that the chat template sees as today (YYYY-MM-DD), for templates that print it: a
    campaign must render the same prompt every day. Default: such templates are refused."""


class PromptsConfig(Section):
    """Training and held-out prompts."""

    train: PromptSources
    """Training prompts: one source or a list of sources. A source is a path (file, directory or
    glob), a hub data set `org/name`, or a mapping with `type` and settings. Rows have `prompt` or
    `messages`, and optionally `answer`."""
    heldout: PromptSources | None = None
    """Evaluation prompts, like train. Several sources are also measured each by itself. Default: no
    evaluation."""
    task: Name = "heldout"
    """Name of the held-out task in metrics: eval/<task>/..."""
    batch: PositiveInt = 64
    """Prompts per iteration: the one batch unit."""


class ThinkingConfig(Section):
    """How a thinking model marks what it writes before its answer."""

    start: Annotated[str, Field(min_length=1)] = "<think>"
    """Text that opens the thinking; written by the model, or by the chat template at the end of the
    prompt."""
    end: Annotated[str, Field(min_length=1)] = "</think>"
    """Text that ends it: what follows is the answer."""


class RolloutConfig(Section):
    """Sampling parameters and the vLLM engines."""

    max_tokens: PositiveInt = 1024
    """Maximum number of tokens per completion."""
    temperature: PositiveFloat = 1.0
    """Sampling temperature. Policy-gradient algorithms (ppo, grpo ...) train the policy at this
    temperature; all others train it at 1, where evaluations sample too."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Probability mass that nucleus sampling keeps; 1 is off. Log-probs are always those of the
    whole vocabulary."""
    top_k: NonNegativeInt = 0
    """Number of most likely tokens to sample from; 0 is off."""
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Strings that end a completion, besides the model's own end of a turn. A special token may be
    named by its text."""
    thinking: ThinkingConfig | None = None
    """Markers of a thinking model: scorers get the answer only. Default: all text is the answer."""
    engines: PositiveInt = 1
    """vLLM engines (data parallel)."""
    tensor_parallel: PositiveInt = 1
    """GPUs (on CPU: processes) per engine."""
    max_num_seqs: PositiveInt = 256
    """Sequences in one engine's batch."""
    kv_cache_gib: PositiveFloat | None = None
    """KV cache per engine, in GiB. Default: 0.25 on CPU; on GPU the rest of memory_fraction."""
    memory_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.85
    """Share of each GPU's memory for weights and KV cache."""
    prefix_caching: bool = True
    """Reuse the KV cache of common prefixes. On CPU a deterministic run reuses it only within one
    call of an engine, so that results do not depend on what the engine did before."""
    enforce_eager: bool | None = None
    """Run without CUDA graphs. Default: true on CPU, false on GPU."""
    in_flight_updates: bool = False
    """Engines take new weights between two steps, while completions are unfinished; needs
    run.max_staleness of 1 or more. Otherwise they take them when nothing is being generated."""
    in_flight_kv: Literal["recompute", "keep"] = "recompute"
    """Keys and values of unfinished completions at an in-flight update: computed again with the new
    weights, or kept, which is faster and makes log-probs deviate from the learner's."""
    in_flight_report_s: PositiveFloat = 5.0
    """Seconds between reports of what unfinished completions have, with in_flight_updates. A lost
    engine's completions continue from the last one."""
    mismatch_limit: PositiveFloat = 1.0
    """Maximum mean absolute gap between the log-probs of a bfloat16 or float16 engine and of the
    learner on a weight sync's probe, in nats; a larger gap stops the run. For float32 engines it is
    1e-3."""
    threads: PositiveInt | None = None
    """CPU threads per engine. Default: on CPU at most half of the cores, with which an engine stays
    fast on a busy machine; with all cores it can be a third faster on an idle one."""


class ReferenceConfig(Section):
    """The frozen reference model."""

    model: ModelName | None = None
    """Initial reference model (directory or hub name), with the policy's tokenizer; for distill,
    the teacher. Default: the policy's model."""
    replicas: PositiveInt = 1
    """Actors with the same weights, which share the rows; a lost one is replaced."""
    ranks: PositiveInt = 1
    """Actors that hold the weights together (ZeRO-3 inference), for a model that is too large for
    one GPU; instead of replicas. When one is lost, all actors restart from the last commit."""
    stream: Literal["auto", "on", "off"] = "auto"
    """Compute the log-probs of prompts as soon as these are explored, while others are still
    generated. auto: where the reference has GPUs, or shares of them, that no engine uses. Never
    where the reference moves while later iterations are explored (run.max_staleness). Log-probs are
    the same with and without."""
    token_budget: PositiveInt = 16384
    """Tokens per forward pass, as in learner.token_budget. Rows are sent in chunks of that size (of
    each rank), each with the deadline run.timeout_s."""
    threads: PositiveInt | None = None
    """CPU threads per replica or rank. Default: derived from the machine."""


class LearnerConfig(Section):
    """Optimizer and DeepSpeed settings of the policy's learner and the critic's."""

    lr: PositiveFloat = 1e-6
    """Learning rate of the policy."""
    critic_lr: PositiveFloat = 9e-6
    """Learning rate of the critic (OpenRLHF's PPO)."""
    critic_model: ModelName | None = None
    """Initial model of the critic (directory or hub name), with the policy's tokenizer; the value
    head is new. Default: the policy's model."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Learning rate schedule after the warm-up."""
    warmup: Fraction = 0.0
    """Linear warm-up, as a share of all optimizer steps."""
    min_lr: Fraction = 0.1
    """Learning rate at the end of the schedule, as a share of lr."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    """Adam's betas."""
    weight_decay: NonNegativeFloat = 0.0
    """AdamW's weight decay."""
    grad_clip: NonNegativeFloat = 1.0
    """Maximum global gradient norm; 0 is off."""
    epochs: PositiveInt = 1
    """Passes over an iteration's examples."""
    prompts_per_step: PositiveInt | None = None
    """Prompts per optimizer step; must divide prompts.batch. Default: prompts.batch."""
    ranks: PositiveInt = 1
    """Data-parallel learner processes. A campaign can be continued with another number, and another
    zero_stage or dtype."""
    zero_stage: Annotated[int, Field(ge=0, le=3)] = 2
    """DeepSpeed's ZeRO stage. bfloat16 with 0 runs as 1, because DeepSpeed's stage 0 would
    accumulate gradients in bfloat16."""
    offload: bool = False
    """Optimizer states in host memory (ZeRO-Offload)."""
    dtype: TrainDtype = "bfloat16"
    """Precision of training; bfloat16 keeps float32 master weights."""
    sync_rounding: Literal["nearest", "stochastic"] = "nearest"
    """Rounding of float32 weights to policy.dtype on their way to the engines. nearest hides an
    update until it reaches half a step of policy.dtype; stochastic is unbiased and seeded: every
    engine gets the same bits, also after a resume."""
    token_budget: PositiveInt = 16384
    """Tokens per micro-batch and rank: with packing those that are fed, and as many response tokens
    at most; else with their padding."""
    packing: Packing | Literal["auto"] = "auto"
    """How learner, critic and reference feed rows. tree: one sequence without padding, in which a
    prefix that rows share is computed once. rows: without padding, but every row whole. off: padded
    rows. Default: tree where the architecture and learner.attention allow it, else off."""
    stream_values: Literal["auto", "on", "off"] = "auto"
    """Compute the critic's values of prompts as soon as these are explored, as reference.stream
    does with log-probs. auto: where the critic has GPUs that no engine uses. Never where the critic
    is trained while later iterations are explored (run.max_staleness). Values are the same with and
    without."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass to save memory."""
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """Attention implementation of transformers."""
    bucket_mib: PositiveInt = 64
    """Size of the buckets in which weights are sent, in MiB. A bucket is sent while the next one is
    packed."""
    collective_timeout_s: PositiveFloat = 600
    """Timeout of a collective operation between ranks, in seconds."""
    threads: PositiveInt | None = None
    """CPU threads per rank. Default: derived from the machine."""
    deepspeed: dict[str, JsonValue] = Field(default_factory=dict)
    """Further DeepSpeed settings, which may not override what other keys set, for example
    {zero_optimization: {stage3_prefetch_bucket_size: 200000000, zero_hpz_partition_size: 8}}."""

    @field_validator("deepspeed")
    @classmethod
    def _check_deepspeed(cls, settings: dict[str, JsonValue]) -> dict[str, JsonValue]:
        check_deepspeed(settings)
        return settings


class ClusterConfig(Section):
    """Placement of the actors; the only section that differs between a laptop and a cluster.

    Four pools: rollout (the engines), learner (and critic), reference, scorer (and evaluators).
    CPUs per actor are derived.
    """

    address: str = "local"
    """"local" starts Ray on this machine; "auto" joins the running cluster."""
    device: Literal["cpu", "gpu"] = "cpu"
    """Device of every model."""
    placement: Literal["separate", "colocate"] = "separate"
    """separate: every actor has its own GPUs. colocate: engine i and learner rank i share GPU i in
    turns: engines are in vLLM's sleep mode during training, learner states in host memory during
    generation. On CPU they take turns, but nothing is moved."""
    transport: Literal["auto", "object_store", "broadcast", "cuda_ipc"] = "auto"
    """How new weights reach the engines. object_store: through host memory, between any devices.
    broadcast: from device to device, through a process group (NCCL between separate GPUs, gloo on
    CPU). cuda_ipc: each engine loads from the memory of the learner rank on its GPU (colocate).
    Default: object_store on CPU, broadcast between separate GPUs, cuda_ipc on shared ones. In
    iterations in which the reference is updated, object_store is always used: the reference reads
    the weights from there."""
    gpus_per_reference: Share | None = None
    """Share of one GPU for each replica of the reference, for example 0.5; 1 for each rank.
    Default: one GPU; with colocate, replica or rank i has a share of GPU i."""
    gpus_per_scorer: Share | None = None
    """Share of one GPU for each scorer and evaluator with a model. Two actors with 0.5 may share a
    GPU."""
    resources: dict[Pool, dict[str, PositiveFloat]] = Field(default_factory=dict)
    """Custom resources that each actor of a pool needs, as nodes offer them with `ray start
    --resources`: {rollout: {h100: 1}} puts engines on nodes that have h100."""
    placement_timeout_s: PositiveFloat = 50
    """Timeout for a running cluster to have resources for all actors, in seconds; an autoscaler may
    need minutes."""
    gpu_memory_gib: PositiveFloat | None = None
    """Memory of one GPU for the estimates of `rayhf check`, in GiB. Default: the smallest that the
    cluster's nodes report."""

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


Tracker = Annotated[TrackerConfig, TRACKERS]


def _list_trackers(value: object) -> object:
    """Return a list for `off` and for one tracker."""
    if value == "off":
        return ()
    return [value] if isinstance(value, str | Mapping) else value


class CampaignConfig(Section):
    """All settings of a campaign."""

    seed: NonNegativeInt = 0
    """Seed of everything random."""
    run: RunConfig
    policy: PolicyConfig
    prompts: PromptsConfig
    evaluations: dict[Name, Annotated[EvaluationConfig, EVALUATIONS]] = Field(default_factory=dict)
    """Further evaluations by task name."""
    algorithm: Annotated[AlgorithmConfig, ALGORITHMS]
    environment: Environments = ()
    """Environments that answer the policy over several turns: one, or a list of them that serve
    different sources. Default: none, a completion is one turn."""
    rollout: RolloutConfig = RolloutConfig()
    scorer: ScorerConfig = ScorerConfig()
    reference: ReferenceConfig = ReferenceConfig()
    learner: LearnerConfig = LearnerConfig()
    cluster: ClusterConfig = ClusterConfig()
    trackers: Annotated[
        tuple[Tracker, ...],
        BeforeValidator(_list_trackers, json_schema_input_type=Tracker | tuple[Tracker, ...]),
    ] = ()
    """Where metrics are also sent, for example [wandb]; off by default. metrics.jsonl is always
    written."""
    guards: GuardsConfig = GuardsConfig()
    service: ServiceConfig | None = None
    """gRPC control service of the running campaign: status, watch, pause, stop, adding prompts and
    human preferences. Default: none."""

    @property
    def reply_tokens(self) -> int:
        """Most tokens that an environment adds to a prompt and a completion."""
        return max((each.reply_tokens for each in self.environment), default=0)

    @property
    def train_temperature(self) -> float:
        """Temperature of all log-probs that losses, KL and importance weights read."""
        at_sampling = self.algorithm.trains_at_sampling_temperature
        return self.rollout.temperature if at_sampling else 1.0

    @property
    def reference_has_gpus(self) -> bool:
        """Whether the reference has GPUs, or shares of them, that engines and learners do not."""
        cluster = self.cluster
        shares = cluster.placement == "colocate" and cluster.gpus_per_reference is None
        return cluster.device == "gpu" and not shares

    @property
    def evaluates_completions(self) -> bool:
        """Whether any evaluation generates completions, and so needs the rollout engines."""
        return self.prompts.heldout is not None or any(
            evaluation.generates for evaluation in self.evaluations.values()
        )

    @property
    def evaluator_scorers(self) -> dict[str | None, tuple[ScorerEntryConfig, ...]]:
        """Scorers of evaluations by task, one actor each; None is the held-out evaluation."""
        scorers: dict[str | None, tuple[ScorerEntryConfig, ...]] = {}
        if self.scorer.evaluate is not None:
            scorers[None] = self.scorer.evaluate
        for task, evaluation in self.evaluations.items():
            if evaluation.scorers:
                scorers[task] = evaluation.scorers
        return scorers
