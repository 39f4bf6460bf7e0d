"""Refuse a bad run before anything starts, and derive everything the config leaves open.

In: a valid config. Out: `Prepared`, what the composition root needs. Reads files, starts no engine
and no cluster.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from rayhf.algorithms.base import (
    Algorithm,
    RendersConversations,
    TakesOfflinePairs,
    TrainsOnRows,
    TrainsSeveralPolicies,
    generates,
    most_prompts,
)
from rayhf.campaign.data import CampaignData
from rayhf.campaign.refill import check_refill
from rayhf.config.environments import environment_of
from rayhf.config.registry import ALGORITHMS, EVALUATIONS
from rayhf.config.schema import CampaignConfig, PolicyConfig
from rayhf.config.scorers import ScorerConfig, names_of
from rayhf.config.sources import SourceConfig
from rayhf.data.chat import Chat
from rayhf.data.examples import load_examples
from rayhf.data.loading import PromptLoader
from rayhf.data.preferences import encode_pairs, load_pairs
from rayhf.data.stop_tokens import stop_token_ids
from rayhf.data.template import check_vocabulary, exported_files, policy_tokenizer
from rayhf.errors import ConfigError
from rayhf.evaluation.base import Evaluation, EvaluationSetup
from rayhf.models.directory import check_model, vocabulary_size
from rayhf.models.hub import local_directory
from rayhf.models.source import model_length, read_model_config, tokenizer_fingerprint
from rayhf.monitoring.tracking import check_trackers
from rayhf.planning.architectures import check_architectures
from rayhf.planning.comparisons import check_comparisons
from rayhf.planning.environments import (
    Tools,
    check_environments,
    check_lengths,
    open_environments,
    rewards_all,
)
from rayhf.planning.in_flight import check_in_flight, updates_table
from rayhf.planning.inputs import (
    function_fingerprints,
    functions_of,
    input_fingerprints,
    user_functions,
)
from rayhf.planning.reference import check_reference, check_teacher
from rayhf.run_dir.state import read_state
from rayhf.types import Prompt, TransportName


@dataclass(frozen=True, slots=True, kw_only=True)
class Derived:
    """Numbers that follow from the config alone; part of the plan that `rayhf check` prints."""

    samples_per_iteration: int
    """Responses of an iteration; with refills the largest number."""
    refills: bool
    """Whether an iteration may explore more than prompts.batch prompts."""
    steps_per_iteration: int
    total_steps: int
    """Optimizer steps of the whole campaign: the length of the learning-rate schedule."""

    def table(self, config: CampaignConfig) -> list[tuple[str, str]]:
        """Return rows (name, value) for a table."""
        steps = [
            ("optimizer steps per iteration", f"{self.steps_per_iteration}"),
            ("iterations", f"{config.run.iterations}"),
            ("optimizer steps", f"{self.total_steps}"),
        ]
        if not self.samples_per_iteration:
            return [("rows per iteration", f"{config.prompts.batch}"), *steps]
        most = "at most " if self.refills else ""
        return [
            ("prompts per iteration", f"{config.prompts.batch}"),
            ("responses per iteration", f"{most}{self.samples_per_iteration}"),
            (
                "tokens per iteration",
                f"at most {self.samples_per_iteration * config.rollout.max_tokens:,}",
            ),
            *steps,
            (
                "staleness",
                f"{config.run.max_staleness} iteration(s)"
                + (" (on-policy)" if config.run.max_staleness == 0 else ""),
            ),
            ("weight transport", transport_of(config)),
            *updates_table(config),
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
    stop_tokens: Mapping[int, str]
    """Tokens that end a completion, by id."""
    notes: tuple[str, ...] = ()
    """Lines for `rayhf check`."""


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
        samples_per_iteration=most_prompts(algorithm, batch) * algorithm.samples,
        refills=most_prompts(algorithm, batch) > batch,
        steps_per_iteration=steps,
        total_steps=steps * config.run.iterations,
    )


def check_settings(config: CampaignConfig) -> tuple[Algorithm, Derived]:
    """Check everything that needs neither files nor hardware. Raises ConfigError."""
    config.algorithm.check_campaign(config)
    algorithm: Algorithm = ALGORITHMS.build(config.algorithm)
    transport_of(config)
    check_environments(config, algorithm)
    _require_scorers(config, algorithm)
    check_comparisons(config, algorithm)
    _check_rounding(config)
    check_in_flight(config)
    derived = derive(config, algorithm)
    check_reference(config, algorithm, derived.total_steps)
    return algorithm, derived


def _require_scorers(config: CampaignConfig, algorithm: Algorithm) -> None:
    """Refuse a campaign that scores completions without a scorer. Raises ConfigError."""
    example = "for example [{type: rule, function: rewards:score}]"
    if rewards_all(config):
        return
    if not config.scorer.train and generates(algorithm) and algorithm.needs_scorer:
        raise ConfigError(
            f"scorer.train: {config.algorithm.type} scores the completions that it trains on, and "
            f"there is no scorer; expected at least one, {example}"
        )
    if config.prompts.heldout and not (config.scorer.train or config.scorer.evaluate):
        raise ConfigError(
            "prompts.heldout: completions of its prompts are scored, and there is no scorer; "
            f"expected scorer.evaluate, {example}"
        )


def _check_rounding(config: CampaignConfig) -> None:
    """Raise ConfigError where learner.sync_rounding has nothing to round."""
    if config.learner.sync_rounding == "nearest":
        return
    nothing = "learner.sync_rounding=stochastic rounds float32 weights to a smaller policy.dtype"
    if config.policy.lora is not None:
        raise ConfigError(
            f"{nothing}, and with policy.lora the engines merge adapters themselves; expected "
            "nearest"
        )
    if config.learner.dtype != "float32" or config.policy.dtype == "float32":
        raise ConfigError(
            f"{nothing}, and learner.dtype is {config.learner.dtype}, policy.dtype "
            f"{config.policy.dtype}; expected nearest, or learner.dtype=float32 with "
            "policy.dtype=bfloat16"
        )


def _check_attention(config: CampaignConfig) -> None:
    """Raise ConfigError where learner.attention needs a package or a device that is missing."""
    if config.learner.attention != "flash_attention_2":
        return
    if config.cluster.device == "cpu":
        raise ConfigError("learner.attention flash_attention_2 needs cluster.device gpu; use sdpa")
    if find_spec("flash_attn") is None:
        raise ConfigError(
            "learner.attention flash_attention_2 needs the package flash-attn, which is not among "
            "rayhf's (docs/cluster.md); expected sdpa, which uses torch's own flash kernels"
        )


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

    Relative paths start at `base`. Hub data sets are read at the commits that the run directory has
    recorded. Raises ConfigError.
    """
    algorithm, derived = check_settings(config)
    _check_attention(config)
    check_trackers(config.trackers)
    models = _models(config, algorithm, base)
    untested = check_architectures(config, algorithm, models)
    max_length = _check_models(config, algorithm, models)
    check_teacher(config, algorithm, models)
    directory = models["policy.model"]
    tokenizer = policy_tokenizer(directory, config.policy, base=base)
    model_config = read_model_config(directory, key="policy.model")
    check_vocabulary(tokenizer, model_config)
    recorded = read_state(config.run.dir)
    chat = Chat(tokenizer, max_length=max_length)
    check_lengths(config, max_length)
    tools, environment_notes = open_environments(config, chat, base)
    loader = PromptLoader(
        tokenizer=tokenizer,
        max_prompt_tokens=max_length - config.rollout.max_tokens - config.reply_tokens,
        tools=partial(_tools_of, config, tools),
        embeddings=vocabulary_size(model_config),
        base=base,
        commits=dict(recorded.datasets) if recorded else {},
    )
    named = names_of([*config.scorer.train, *(config.scorer.evaluate or ())])
    if isinstance(algorithm, TrainsOnRows):
        opened = loader.open(config.prompts.train, "prompts.train")
        prompts, examples = load_examples(opened, algorithm.encode, chat, key="prompts.train")
        algorithm.set_examples(examples)
    else:
        prompts = loader.load(config.prompts.train, key="prompts.train", scorers=named)
    prompts.check_batches(
        batch=config.prompts.batch, iterations=config.run.iterations, key="prompts.train"
    )
    check_refill(config, algorithm, prompts)
    config.algorithm.check_prompts(config, prompts.prompts)
    if isinstance(algorithm, RendersConversations):
        algorithm.check_chat(chat, prompts.prompts[0])
    heldout: tuple[Prompt, ...] = ()
    if config.prompts.heldout is not None:
        loaded = loader.load(config.prompts.heldout, key="prompts.heldout", scorers=named)
        heldout = loaded.first(config.run.eval_prompts)
    judged = prompts.prompts if generates(algorithm) else ()
    notes = [f"prompts.train: {prompts.summary}"]
    notes += [f"data set {name} at commit {commit}" for name, commit in loader.commits.items()]
    notes += environment_notes
    notes += _check_scorers(config.scorer, judged, heldout, base)
    evaluations = _evaluations(config, loader, chat, heldout or judged)
    pairs = None
    if isinstance(algorithm, TakesOfflinePairs) and algorithm.pair_file is not None:
        pair_set = load_pairs(base / algorithm.pair_file, key="algorithm.offline.path")
        algorithm.set_pairs(encode_pairs(pair_set.pairs, chat, key="algorithm.offline.path"))
        pairs = pair_set.fingerprint
    data = CampaignData(
        chat=chat,
        prompts=prompts,
        heldout=heldout,
        evaluations=evaluations,
        pairs=pairs,
        commits=loader.commits,
        inputs=input_fingerprints(models, tokenizer, prompts.prompts),
        functions=function_fingerprints(user_functions(config), base),
        training_functions=function_fingerprints(functions_of(config.scorer.train), base),
        exported_files=exported_files(config.policy, tokenizer),
    )
    stop_ids = stop_token_ids(directory, tokenizer)
    return Prepared(
        config=config,
        algorithm=algorithm,
        derived=derived,
        data=data,
        max_length=max_length,
        stop_tokens={token_id: str(tokenizer.decode([token_id])) for token_id in stop_ids},
        notes=(*untested, *notes),
    )


def _tools_of(config: CampaignConfig, tools: Mapping[str, Tools], source: str) -> Tools | None:
    """Return the functions of the environment that serves a source."""
    environment = environment_of(config.environment, source)
    return None if environment is None else tools.get(environment.resolved_name)


def _check_scorers(
    scorer: ScorerConfig, prompts: Sequence[Prompt], heldout: Sequence[Prompt], base: Path
) -> list[str]:
    """Check the campaign's scorers, with the prompts that they judge; return lines about them."""
    from rayhf.scorer.build import check_entries, check_heldout, check_named_scorers

    train = scorer.train
    evaluate = scorer.evaluate or ()
    judged = heldout if not evaluate else ()
    check_named_scorers(prompts, train, evaluate, where="scorer.train")
    notes = check_entries(train, base, prompts=[*prompts, *judged])
    if evaluate:
        notes += check_entries(evaluate, base, where="scorer.evaluate", prompts=heldout)
    if heldout:
        where = "scorer.evaluate" if evaluate else "scorer.train"
        check_named_scorers(heldout, evaluate or train, train, where=where)
        check_heldout(evaluate or train, where=where)
    return notes


def _evaluations(
    config: CampaignConfig,
    loader: PromptLoader,
    chat: Chat,
    heldout: tuple[Prompt, ...],
) -> dict[str, Evaluation]:
    """Check the scorers of the config's further evaluations, and build these by task."""
    from rayhf.scorer.build import check_entries, check_heldout

    base = loader.base
    evaluations: dict[str, Evaluation] = {}
    for task, evaluation in config.evaluations.items():
        where = f"evaluations.{task}.scorer"
        check_entries(evaluation.scorers, base, where=where)
        if not evaluation.compares:
            check_heldout(evaluation.scorers, where=where)
        names = names_of(evaluation.scorers or config.scorer.train)
        setup = EvaluationSetup(
            task=task,
            base=base,
            chat=chat,
            heldout=heldout,
            open_sources=loader.open,
            load_prompts=partial(_evaluation_prompts, config, loader, names),
        )
        evaluations[task] = EVALUATIONS.build(evaluation, setup)
    return evaluations


def _models(config: CampaignConfig, algorithm: Algorithm, base: Path) -> dict[str, Path]:
    """Return the directories of the models that are trained or start something, by config key."""
    given = {
        "policy.model": config.policy.model,
        "reference.model": config.reference.model,
        "learner.critic_model": config.learner.critic_model,
    }
    if isinstance(algorithm, TrainsSeveralPolicies):
        given |= {
            f"algorithm.{name}.model": algorithm.other_policy(name).model
            for name in algorithm.policies[1:]
        }
    return {key: local_directory(model, base) for key, model in given.items() if model is not None}


def _check_models(config: CampaignConfig, algorithm: Algorithm, models: Mapping[str, Path]) -> int:
    """Check every model directory and return the longest sequence that all take, in tokens."""
    policy = models["policy.model"]
    lora = config.policy.lora
    for key, path in models.items():
        check_model(
            path,
            read_model_config(path, key=key),
            key=key,
            causal=key != "learner.critic_model",
            lora_targets=lora.target_modules if lora and key != "reference.model" else None,
        )
    length = policy_length(config.policy, policy)
    generated = generates(algorithm) or config.evaluates_completions
    if generated and config.rollout.max_tokens >= length:
        raise ConfigError(
            f"rollout.max_tokens is {config.rollout.max_tokens}, but prompt and response together "
            f"may have {length} tokens; expected less than {length}"
        )
    for key, other in models.items():
        mine, theirs = tokenizer_fingerprint(policy), tokenizer_fingerprint(other)
        if mine != theirs:
            raise ConfigError(
                f"{key}: its tokenizer ({theirs}) differs from the one of policy.model ({mine}); "
                "both score the same token ids, so they must be equal"
            )
        limit = model_length(read_model_config(other, key=key))
        if limit is not None and limit < length:
            raise ConfigError(
                f"{key}: the model was made for at most {limit} tokens, and prompt and response "
                f"together may have {length}; expected policy.max_length of at most {limit}"
            )
    return length


def policy_length(policy: PolicyConfig, directory: Path) -> int:
    """Return the longest sequence of a policy, in tokens. Raises ConfigError."""
    limit = model_length(read_model_config(directory, key="policy.model"))
    length = policy.max_length or limit
    if length is None:
        raise ConfigError(
            f"policy.max_length: {directory} does not say how long its sequences may be; set it"
        )
    if limit is not None and length > limit:
        raise ConfigError(
            f"policy.max_length is {length}, but the model was made for at most {limit} tokens"
        )
    return length


def _evaluation_prompts(
    config: CampaignConfig,
    loader: PromptLoader,
    scorers: Collection[str],
    sources: tuple[SourceConfig, ...],
    key: str,
) -> tuple[Prompt, ...]:
    return loader.load(sources, key=key, scorers=scorers).first(config.run.eval_prompts)


def overlap(prepared: Prepared) -> int:
    """Return how many held-out prompts are also training prompts."""
    data = prepared.data
    heldout = {p.token_ids for p in data.heldout}
    return len(heldout & {p.token_ids for p in data.prompts.prompts})
