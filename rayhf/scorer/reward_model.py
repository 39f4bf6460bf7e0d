"""Reward models: sequence classifiers, with their own tokenizer and chat template.

In: ScoreRequests. Each completion becomes messages + one assistant turn -> the model's chat
template -> token ids; rows are sorted by length, packed by padded tokens and right-padded. Out: the
logit, or the weighted sum of several, as Scored; Invalid for a non-finite logit, for a text that
cannot be encoded and for one that is too long (never truncated); Failed where the template refuses
the messages. The batches depend on the requests alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from rayhf.config.scorers import PointwiseEntryConfig
from rayhf.data.chat import render_text, special_token_escaper
from rayhf.errors import ConfigError, one_line
from rayhf.models.hub import local_directory
from rayhf.scorer.classifier import (
    PADDING_TOLERANCE,
    SCORER_FILE,
    ClassifierEntryConfig,
    check_classifier,
    load_classifier,
    read_json,
)
from rayhf.scorer.comparisons import Problem
from rayhf.scorer.protocol import PointwiseScorer, ScorerSetup
from rayhf.scorer.reward_head import import_head, output_weights
from rayhf.types import Completion, Failed, Invalid, Outcome, Prompt, Scored, ScoreRequest

_TITLE = "reward model"


class RewardModelConfig(ClassifierEntryConfig, PointwiseEntryConfig):
    """A sequence classifier with its own tokenizer and chat template."""

    type: str = "reward_model"
    outputs: Mapping[str, float] | None = None
    """Weights of the outputs of a model that has several, by label (id2label in config.json) or
    index, for example {helpfulness: 0.65, verbosity: -0.2}: the score is their weighted sum, and
    each output is a part of it. Outputs that are not named do not count."""
    head: str | None = None
    """Head in place of the model's own, package.module:Class (rayhf/scorer/reward_head.py)."""


class RewardModel(PointwiseScorer[RewardModelConfig]):
    """A sequence classifier whose output is the score, or the weighted sum of its outputs.

    Raises ConfigError for a model with several outputs and no weights for them, one that lacks
    weights for its head, has no chat template, does not embed all of its tokenizer's ids, or whose
    scores depend on padding.
    """

    Config = RewardModelConfig

    def __init__(self, config: RewardModelConfig, setup: ScorerSetup) -> None:
        super().__init__(config, setup)
        self.check(config, setup.base)
        self._classifier = load_classifier(config, setup, title=_TITLE, head=config.head)
        self._tokenizer = self._classifier.tokenizer
        directory = local_directory(config.model, setup.base)
        self._labels = _labels(config, directory)
        self._weights = _weights(config, directory, self._labels)
        if not self._tokenizer.chat_template:
            raise ConfigError(f"{_TITLE} {directory}: its tokenizer has no chat template")
        self._escape = special_token_escaper(self._tokenizer)
        self._classifier.check_padding(f"{_TITLE} {directory}", PADDING_TOLERANCE[config.dtype])
        outputs = len(self._classifier.logits([[0]], config.token_budget)[0])
        if outputs != len(self._labels):  # only a head of one's own can be wrong about it
            raise ConfigError(
                f"head {config.head}: it returns {outputs} outputs for {len(self._labels)} labels"
            )

    @classmethod
    def check(cls, config: RewardModelConfig, base: Path) -> None:
        """Check the small files and the outputs. Raises ConfigError."""
        directory = local_directory(config.model, base)
        facts = directory / SCORER_FILE
        # A pairwise model has one output too, but it reads two completions.
        if facts.is_file() and (kind := read_json(facts).get("kind")) != "pointwise":
            raise ConfigError(
                f"{_TITLE} {directory}: it is a {kind} model; use type: preference_model for it"
            )
        _weights(config, directory, _labels(config, directory))

    def score(self, requests: Sequence[ScoreRequest]) -> list[tuple[Outcome, ...]]:
        """Return one outcome per completion of each request, in order."""
        encoded = [
            self._encode(request.prompt, completion)
            for request in requests
            for completion in request.completions
        ]
        rows = [row for row in encoded if isinstance(row, list)]
        values = iter(self._classifier.logits(rows, self.config.token_budget))
        outcomes = iter(
            [self._outcome(next(values)) if isinstance(row, list) else row for row in encoded]
        )
        return [tuple(next(outcomes) for _ in request.completions) for request in requests]

    def close(self) -> None:
        """Release the memory of the weights."""
        self._classifier.close()

    def _outcome(self, logits: Sequence[float]) -> Outcome:
        value = sum(w * logit for w, logit in zip(self._weights, logits, strict=True))
        if not math.isfinite(value):
            return Invalid(reason=f"the reward model's logit is {value}")
        parts = dict(zip(self._labels, logits, strict=True)) if len(logits) > 1 else {}
        return Scored(value=value, parts=parts)

    def _encode(self, prompt: Prompt, completion: Completion) -> list[int] | Problem:
        messages = [
            *map(dict, prompt.messages),
            {"role": "assistant", "content": self._escape(completion.text)},
        ]
        try:
            text = render_text(self._tokenizer, messages, generation_prompt=False, where=_TITLE)
            text.encode()
        except UnicodeEncodeError as error:
            return Invalid(reason=f"the text cannot be encoded as UTF-8: {error.reason}")
        except ConfigError as error:
            return Failed(reason=one_line(error))
        row: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        if not row:
            return Invalid(reason="the chat template returned an empty text")
        limit = self._classifier.max_length
        if len(row) > limit:
            return Invalid(reason=f"too long: {len(row)} tokens, the reward model reads {limit}")
        return row


def _labels(config: RewardModelConfig, directory: Path) -> list[str]:
    """Return the labels of the outputs. Raises ConfigError for files or a head that cannot work."""
    own = check_classifier(directory, title=_TITLE, own_head=config.head is not None)
    return own if config.head is None else [str(label) for label in import_head(config.head).labels]


def _weights(
    config: RewardModelConfig, directory: Path, labels: Sequence[str]
) -> tuple[float, ...]:
    try:
        return output_weights(config.outputs, labels)
    except ConfigError as error:
        raise ConfigError(f"{_TITLE} {directory}: {error}") from None
