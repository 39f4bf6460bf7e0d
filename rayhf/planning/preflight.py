"""Refuse a bad run before anything starts, and derive everything the config leaves open.

In: a valid config. Out: `Prepared`, what the composition root needs. Reads files, starts no engine
and no cluster.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from rayhf.algorithms.base import (
    Algorithm,
    TakesOfflinePairs,
    TrainsCritic,
    TrainsSeveralPolicies,
)
from rayhf.campaign.data import CampaignData
from rayhf.config.base import PluginConfig
from rayhf.config.models import ModelName
from rayhf.config.registry import ALGORITHMS, EVALUATIONS
from rayhf.config.schema import CampaignConfig
from rayhf.data.chat import Chat
from rayhf.data.preferences import encode_pairs, load_pairs
from rayhf.data.prompts import PromptSet, load_prompts
from rayhf.data.readers import open_source
from rayhf.errors import ConfigError
from rayhf.evaluation.base import Evaluation, EvaluationSetup
from rayhf.models.architectures import check_architecture, check_critic
from rayhf.models.hub import local_directory
from rayhf.models.quantized import check_quantize
from rayhf.models.source import (
    load_tokenizer,
    model_length,
    read_model_config,
    tokenizer_fingerprint,
)
from rayhf.types import Prompt, TransportName

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True, kw_only=True)
class Derived:
    """Numbers that follow from the config alone; part of the plan that `rayhf check` prints."""

    samples_per_iteration: int
    steps_per_iteration: int
    total_steps: int
    """Optimizer steps of the whole campaign: the length of the learning-rate schedule."""

    def table(self, config: CampaignConfig) -> list[tuple[str, str]]:
        """Return rows (name, value) for a table."""
        return [
            ("prompts per iteration", f"{config.prompts.batch}"),
            ("responses per iteration", f"{self.samples_per_iteration}"),
            (
                "tokens per iteration",
                f"at most {self.samples_per_iteration * config.rollout.max_tokens:,}",
            ),
            ("optimizer steps per iteration", f"{self.steps_per_iteration}"),
            ("iterations", f"{config.run.iterations}"),
            ("optimizer steps", f"{self.total_steps}"),
            (
                "staleness",
                f"{config.run.max_staleness} iteration(s)"
                + (" (on-policy)" if config.run.max_staleness == 0 else ""),
            ),
            ("weight transport", transport_of(config)),
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A run that may start."""

    config: CampaignConfig
    algorithm: Algorithm
    derived: Derived
    data: CampaignData
    max_length: int
    """Prompt plus response, in tokens."""
    untested: tuple[str, ...] = ()
    """Warnings of models whose architecture is not in the table of tested ones."""


def derive(config: CampaignConfig, algorithm: Algorithm) -> Derived:
    """Compute the batch arithmetic.

    Raises ConfigError for what does not divide, naming the nearest values that would.
    """
    batch = config.prompts.batch
    per_step = config.learner.prompts_per_step or batch
    if batch % per_step:
        divisors = [d for d in range(1, batch + 1) if batch % d == 0]
        near = sorted(sorted(divisors, key=lambda d: abs(d - per_step))[:3])
        raise ConfigError(
            f"learner.prompts_per_step is {per_step}, which does not divide prompts.batch {batch}; "
            f"nearest valid values: {', '.join(map(str, near))}"
        )
    steps = config.learner.epochs * (batch // per_step)
    return Derived(
        samples_per_iteration=batch * algorithm.samples,
        steps_per_iteration=steps,
        total_steps=steps * config.run.iterations,
    )


def check_settings(config: CampaignConfig) -> tuple[Algorithm, Derived]:
    """Check everything that needs neither files nor hardware. Raises ConfigError."""
    config.algorithm.check_campaign(config)
    algorithm: Algorithm = ALGORITHMS.build(config.algorithm)
    transport_of(config)
    return algorithm, derive(config, algorithm)


def transport_of(config: CampaignConfig) -> TransportName:
    """Return how the campaign's weights get to the engines.

    Raises ConfigError for a transport that its placement does not allow.
    """
    cluster = config.cluster
    transport = cluster.transport
    shares = cluster.placement == "colocate"
    gpu = cluster.device == "gpu"
    beside = config.rollout.engines == config.learner.ranks
    if transport == "auto":
        if not gpu:
            return "object_store"
        return ("cuda_ipc" if beside else "object_store") if shares else "broadcast"
    if transport == "broadcast" and shares:
        raise ConfigError(
            "cluster.transport broadcast needs a device for each actor, and with "
            "cluster.placement colocate engines and learners share them; expected cuda_ipc, "
            "object_store or auto"
        )
    if transport == "cuda_ipc" and not (gpu and shares):
        raise ConfigError(
            "cluster.transport cuda_ipc needs GPUs that engines and learners share; "
            f"cluster.device is {cluster.device}, cluster.placement {cluster.placement}; "
            "expected broadcast, object_store or auto"
        )
    if transport == "cuda_ipc" and not beside:
        raise ConfigError(
            "cluster.transport cuda_ipc needs a learner rank beside every engine; "
            f"rollout.engines is {config.rollout.engines}, expected learner.ranks "
            f"{config.learner.ranks} (or transport object_store)"
        )
    return transport


def prepare(config: CampaignConfig, *, base: Path) -> Prepared:
    """Check models, tokenizers, prompts and scorers, and load what the campaign reads.

    Relative paths start at `base`. Raises ConfigError.
    """
    from rayhf.scorer.build import check_entries, check_heldout

    algorithm, derived = check_settings(config)
    max_length = _check_models(config, algorithm, base)
    untested = _check_architectures(config, algorithm, base, max_length)
    tokenizer = load_tokenizer(local_directory(config.policy.model, base), key="policy.model")
    load = partial(_load, config, tokenizer=tokenizer, max_length=max_length, base=base)
    prompts = load(config.prompts.train, key="prompts.train")
    if len(prompts.prompts) < config.prompts.batch:
        raise ConfigError(
            f"prompts.batch is {config.prompts.batch}, but {prompts.label} has only "
            f"{len(prompts.prompts)} different prompts; expected at most {len(prompts.prompts)}"
        )
    config.algorithm.check_prompts(config, len(prompts.prompts))
    chat = Chat(tokenizer, max_length=max_length)
    heldout: tuple[Prompt, ...] = ()
    if config.prompts.heldout is not None:
        loaded = load(config.prompts.heldout, key="prompts.heldout")
        heldout = loaded.prompts[: config.run.eval_prompts]
    check_entries(config.scorer.train, base)
    if heldout:
        judged = config.scorer.evaluate or config.scorer.train
        check_heldout(judged, where="scorer.evaluate" if config.scorer.evaluate else "scorer.train")
    if config.scorer.evaluate is not None:
        check_entries(config.scorer.evaluate, base, where="scorer.evaluate")
    evaluations = _evaluations(config, load, base, chat, heldout or prompts.prompts)
    pairs = None
    if isinstance(algorithm, TakesOfflinePairs) and algorithm.pair_file is not None:
        pair_set = load_pairs(base / algorithm.pair_file, key="algorithm.offline.path")
        algorithm.set_pairs(encode_pairs(pair_set.pairs, chat, key="algorithm.offline.path"))
        pairs = pair_set.fingerprint
    data = CampaignData(
        chat=chat, prompts=prompts, heldout=heldout, evaluations=evaluations, pairs=pairs
    )
    return Prepared(
        config=config,
        algorithm=algorithm,
        derived=derived,
        data=data,
        max_length=max_length,
        untested=untested,
    )


def _evaluations(
    config: CampaignConfig,
    load: Callable[..., PromptSet],
    base: Path,
    chat: Chat,
    heldout: tuple[Prompt, ...],
) -> dict[str, Evaluation]:
    """Check the scorers of the config's further evaluations, and build these by task."""
    from rayhf.scorer.build import check_entries, check_heldout

    def load_prompts_of(source: PluginConfig, key: str) -> tuple[Prompt, ...]:
        return load(source, key=key).prompts[: config.run.eval_prompts]

    evaluations: dict[str, Evaluation] = {}
    for task, evaluation in config.evaluations.items():
        where = f"evaluations.{task}.scorer"
        check_entries(evaluation.scorers, base, where=where)
        check_heldout(evaluation.scorers, where=where)
        setup = EvaluationSetup(
            task=task, base=base, chat=chat, heldout=heldout, load_prompts=load_prompts_of
        )
        evaluations[task] = EVALUATIONS.build(evaluation, setup)
    return evaluations


def _check_models(config: CampaignConfig, algorithm: Algorithm, base: Path) -> int:
    """Check every model directory and return the longest sequence that all take, in tokens."""
    policy = local_directory(config.policy.model, base)
    settings = read_model_config(policy, key="policy.model")
    limit = model_length(settings)
    length = config.policy.max_length or limit
    if length is None:
        raise ConfigError(
            f"policy.max_length: {policy} does not say how long its sequences may be; set it"
        )
    if limit is not None and length > limit:
        raise ConfigError(
            f"policy.max_length is {length}, but the model was made for at most {limit} tokens"
        )
    if config.rollout.max_tokens >= length:
        raise ConfigError(
            f"rollout.max_tokens is {config.rollout.max_tokens}, but prompt and response together "
            f"may have {length} tokens; expected less than {length}"
        )
    for key, other in _other_models(config, algorithm):
        directory = local_directory(other, base)
        read_model_config(directory, key=key)
        mine, theirs = tokenizer_fingerprint(policy), tokenizer_fingerprint(directory)
        if mine != theirs:
            raise ConfigError(
                f"{key}: the tokenizer of {other} ({theirs}) differs from the one of policy.model "
                f"{config.policy.model} ({mine}); "
                "both score the same token ids, so they must be equal"
            )
    return length


def _other_models(config: CampaignConfig, algorithm: Algorithm) -> list[tuple[str, ModelName]]:
    """Return the models besides the policy's, by config key."""
    models = [
        ("reference.model", config.reference.model),
        ("learner.critic_model", config.learner.critic_model),
    ]
    if isinstance(algorithm, TrainsSeveralPolicies):
        models += [
            (f"algorithm.{name}.model", algorithm.other_policy(name).model)
            for name in algorithm.policies[1:]
        ]
    return [(key, model) for key, model in models if model is not None]


def _check_architectures(
    config: CampaignConfig, algorithm: Algorithm, base: Path, max_length: int
) -> tuple[str, ...]:
    """Return warnings of untested architectures. Raises ConfigError for those that do not work."""
    models = [("policy.model", config.policy.model), *_other_models(config, algorithm)]
    warnings = []
    for key, model in models:
        settings = read_model_config(local_directory(model, base), key=key)
        warnings.append(check_architecture(settings, key=key, max_length=max_length))
        if config.policy.lora and config.policy.lora.quantize and key.startswith("algorithm."):
            raise ConfigError(
                f"{key}: with policy.lora.quantize all policies start from policy.model; leave it "
                "out"
            )
    if isinstance(algorithm, TrainsCritic):
        critic = config.learner.critic_model
        key = "policy.model" if critic is None else "learner.critic_model"
        directory = local_directory(critic or config.policy.model, base)
        check_critic(read_model_config(directory, key=key), key=key)
    if config.policy.lora and config.policy.lora.quantize:
        policy = local_directory(config.policy.model, base)
        check_quantize(config, read_model_config(policy, key="policy.model"))
    return tuple(warning for warning in warnings if warning is not None)


def _load(
    config: CampaignConfig,
    source: PluginConfig,
    *,
    key: str,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    base: Path,
) -> PromptSet:
    return load_prompts(
        open_source(source, base=base, key=key),
        tokenizer,
        key=key,
        max_prompt_tokens=max_length - config.rollout.max_tokens,
    )


def overlap(prepared: Prepared) -> int:
    """Return how many held-out prompts are also training prompts."""
    data = prepared.data
    return len({p.prompt_id for p in data.prompts.prompts} & {p.prompt_id for p in data.heldout})
