"""`rayhf eval`: a model's answers to suites, with intervals, and against a baseline.

In: a model or a campaign's policy, suites, and scorers. Out: a table, and in `out` for each suite
the results as JSON and the answers as JSON lines. vLLM generates in this process.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from launch.eval_report import Loaded, report
from launch.eval_rewards import evaluate_rewards
from launch.eval_scores import check_judge
from launch.eval_target import Target, find_target
from launch.local_engine import generate_here
from launch.models import pin_models
from rayhf.config.evaluate import EvalConfig
from rayhf.config.registry import SUITES
from rayhf.config.schema import PolicyConfig
from rayhf.data.loading import PromptLoader
from rayhf.data.template import check_vocabulary, policy_tokenizer
from rayhf.errors import ConfigError
from rayhf.evaluation.answers import Answered, answers_to, read_answers
from rayhf.evaluation.duels import given_completion
from rayhf.evaluation.suites.base import Suite
from rayhf.evaluation.suites.preferences import Preferences
from rayhf.models.directory import vocabulary_size
from rayhf.models.hub import local_directory
from rayhf.models.source import read_model_config
from rayhf.planning.preflight import policy_length
from rayhf.scorer.build import check_entries, check_heldout
from rayhf.types import Completion, GenerateRequest, Prompt, Sampling, derive_seed

Answers = Mapping[str, Sequence[tuple[Completion, ...]]]
"""By suite, each prompt's completions."""


def evaluate(config: EvalConfig, target: Target, console: Console) -> dict[str, Any]:
    """Evaluate a model on all suites; print, write and return the results by suite.

    Raises ConfigError for what cannot work, before an engine starts.
    """
    suites = {name: SUITES.build(own) for name, own in config.suites.items()}
    results: dict[str, Any] = {}
    for name, suite in suites.items():
        if isinstance(suite, Preferences):
            results[name] = evaluate_rewards(config, target, name, suite, console)
    generated = {name: s for name, s in suites.items() if isinstance(s, Suite)}
    if not generated:
        return results
    base = Path.cwd()
    config, _ = pin_models(config, base, console)
    check_judge(config.judge, "judge")
    if config.best_of is not None:
        check_judge(config.best_of.proxy, "best_of.proxy")
        check_judge(config.best_of.judge, "best_of.judge")
    loaded, loader_length = _load(config, generated, base)
    baseline = _baseline_answers(config, loaded, console)
    answers = _generate(config.policy, config, loaded, loader_length, base)
    for each in loaded:
        own = answers[each.name]
        other = None if baseline is None else baseline[each.name]
        results[each.name] = report(config, target, each, own, other, console)
    return results


# ------------------------------------------------------------------------------------------- input


def _load(config: EvalConfig, suites: Mapping[str, Suite], base: Path) -> tuple[list[Loaded], int]:
    """Return the suites with their prompts, and the model's length. Raises ConfigError."""
    directory = local_directory(config.policy.model, base)
    settings = read_model_config(directory, key="MODEL")
    tokenizer = policy_tokenizer(directory, config.policy, base=base)
    check_vocabulary(tokenizer, settings)
    length = policy_length(config.policy, directory)
    if config.rollout.max_tokens >= length:
        raise ConfigError(
            f"rollout.max_tokens is {config.rollout.max_tokens}, but prompt and response together "
            f"may have {length} tokens; expected less than {length}"
        )
    loader = PromptLoader(
        tokenizer=tokenizer,
        max_prompt_tokens=length - config.rollout.max_tokens,
        embeddings=vocabulary_size(settings),
        base=base,
        commits={},
    )
    loaded = []
    for name, suite in suites.items():
        key = f"suites.{name}"
        entries = suite.scorers() or config.scorer or ()
        if not (entries or config.judge or config.best_of):
            raise ConfigError(
                f"{key}: nothing scores its completions; expected scorer, for example "
                'scorer=[{type: rule, function: "rewards:correct"}]'
            )
        names = [entry.resolved_name for entry in entries]
        prompts = loader.load(suite.sources(key), key=f"{key}.prompts", scorers=names).prompts
        prompts = prompts[: suite.config.limit]
        suite.check(prompts, key)
        check_heldout(entries, where=f"{key}.scorer")
        check_entries(entries, base, where=f"{key}.scorer", prompts=prompts)
        loaded.append(Loaded(name=name, suite=suite, entries=tuple(entries), prompts=prompts))
    return loaded, length


def _baseline_answers(
    config: EvalConfig, loaded: Sequence[Loaded], console: Console
) -> Answers | None:
    """Return the baseline's answers: from a file, or generated by its model."""
    if config.baseline is None:
        return None
    path = Path(config.baseline)
    if path.is_file():
        found = read_answers(path, key="baseline")
        return {each.name: _given_answers(each.prompts, found) for each in loaded}
    base = Path.cwd()
    policy = config.policy.model_copy(update={"model": find_target(config.baseline).model})
    policy, _ = pin_models(policy, base, console)
    # Its own tokenizer and chat template: prompts are the same conversations.
    own, length = _load(
        config.model_copy(update={"policy": policy}), {e.name: e.suite for e in loaded}, base
    )
    return _generate(policy, config, own, length, base)


def _given_answers(
    prompts: Sequence[Prompt], found: Mapping[str, Answered]
) -> list[tuple[Completion, ...]]:
    """Return the answers of a file, as many of each prompt as there are of every prompt."""
    texts = answers_to(prompts, found, key="baseline")
    count = min(map(len, texts))
    return [
        tuple(given_completion(prompt, text, i) for i, text in enumerate(own[:count]))
        for prompt, own in zip(prompts, texts, strict=True)
    ]


def _generate(
    policy: PolicyConfig,
    config: EvalConfig,
    loaded: Sequence[Loaded],
    max_length: int,
    base: Path,
) -> Answers:
    """Return the model's completions of all suites, from one engine."""
    rollout = config.rollout
    temperature = rollout.temperature if config.temperature is None else config.temperature
    sampling = Sampling(
        max_tokens=rollout.max_tokens,
        temperature=temperature,
        top_p=rollout.top_p,
        top_k=rollout.top_k,
        stop=rollout.stop,
    )
    requests = [
        GenerateRequest(
            prompt_id=prompt.prompt_id,
            number=number,
            token_ids=prompt.token_ids,
            sampling=sampling,
            seeds=tuple(
                derive_seed(seed, "eval", prompt.prompt_id, i)
                for seed in config.seeds
                for i in range(config.samples)
            ),
        )
        for number, each in enumerate(loaded)
        for prompt in each.prompts
    ]
    completions = iter(
        generate_here(
            local_directory(policy.model, base),
            requests,
            rollout=rollout,
            dtype=policy.dtype,
            max_length=max_length,
            device=config.device,
        )
    )
    return {each.name: [next(completions) for _ in each.prompts] for each in loaded}
