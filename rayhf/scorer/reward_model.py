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

import jinja2

from rayhf.config.scorers import PointwiseEntryConfig
from rayhf.data.chat import special_token_escaper
from rayhf.errors import ConfigError
from rayhf.models.packing import pack_rows
from rayhf.scorer.classifier import (
    SCORER_FILE,
    ClassifierEntryConfig,
    check_classifier,
    load_classifier,
    one_line,
    read_json,
)
from rayhf.scorer.comparisons import Problem
from rayhf.scorer.protocol import PointwiseScorer, ScorerSetup
from rayhf.scorer.reward_head import import_head, output_weights
from rayhf.types import Completion, Failed, Invalid, Outcome, Prompt, Scored, ScoreRequest

_TITLE = "reward model"
_PADDING_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.25}
"""Relative to max(1, |score|): rounding differs between batch shapes, but a score read at the wrong
token differs by far more."""


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
        directory = setup.base / config.model
        self._labels = _labels(config, directory)
        self._weights = _weights(config, directory, self._labels)
        if not self._tokenizer.chat_template:
            raise ConfigError(f"{_TITLE} {directory}: its tokenizer has no chat template")
        self._escape = special_token_escaper(self._tokenizer)
        self._text_config = self._classifier.model.config.get_text_config()
        self._text_config.use_cache = False
        self._own_pad_id: int | None = self._text_config.pad_token_id
        self._check_padding(directory, _PADDING_TOLERANCE[config.dtype])

    @classmethod
    def check(cls, config: RewardModelConfig, base: Path) -> None:
        """Check the small files and the outputs. Raises ConfigError."""
        directory = base / config.model
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
        values = iter(self._score_rows(rows))
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
            text = str(self._tokenizer.apply_chat_template(messages, tokenize=False))
            text.encode()
        except UnicodeEncodeError as error:
            return Invalid(reason=f"the text cannot be encoded as UTF-8: {error.reason}")
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            return Failed(reason=f"the chat template refused the messages: {one_line(error)}")
        row: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        if not row:
            return Invalid(reason="the chat template returned an empty text")
        limit = self._classifier.max_length
        if len(row) > limit:
            return Invalid(reason=f"too long: {len(row)} tokens, the reward model reads {limit}")
        return row

    def _score_rows(self, rows: Sequence[list[int]]) -> list[list[float]]:
        values: list[list[float]] = [[] for _ in rows]
        for batch in pack_rows([len(row) for row in rows], self.config.token_budget):
            for index, value in zip(batch, self._forward([rows[i] for i in batch]), strict=True):
                values[index] = value
        return values

    def _forward(self, rows: Sequence[list[int]]) -> list[list[float]]:
        """Return the logits of each row, one per output."""
        import torch

        width = max(map(len, rows))
        device = self._classifier.device
        pad_id = self._pad_id(rows)
        self._text_config.pad_token_id = pad_id
        ids_RT = torch.tensor([row + [pad_id] * (width - len(row)) for row in rows], device=device)
        mask_RT = torch.tensor(
            [[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device
        )
        with torch.inference_mode():
            logits = self._classifier.model(input_ids=ids_RT, attention_mask=mask_RT).logits
        scores: list[list[float]] = logits.float().reshape(len(rows), len(self._labels)).tolist()
        return scores

    def _pad_id(self, rows: Sequence[list[int]]) -> int:
        """Return the padding id of a batch.

        transformers reads the score at the last token that is not `config.pad_token_id`. The
        model's own pad id is kept, so that the same token is read as in its training. A model
        without one reads the last token of a lone row; any id that ends no row of the batch reads
        the same token here.
        """
        if self._own_pad_id is not None:
            return self._own_pad_id
        ends = {row[-1] for row in rows}
        return next(candidate for candidate in range(len(ends) + 1) if candidate not in ends)

    def _check_padding(self, directory: Path, tolerance: float) -> None:
        """Check that a short row scores the same alone and padded.

        With a wrong pad id another token would be read, every time.
        """
        ids = sorted(
            set(self._tokenizer.get_vocab().values()) - set(self._tokenizer.all_special_ids)
        )
        short = ids[:3]
        long = (ids * 16)[: min(16, self._classifier.max_length)]
        pairs = zip(self._forward([short])[0], self._forward([long, short])[1], strict=True)
        for alone, padded in pairs:
            scores = f"({alone:g} alone, {padded:g} padded)"
            if not (math.isfinite(alone) and math.isfinite(padded)):
                raise ConfigError(f"{_TITLE} {directory}: a score is not finite {scores}")
            if abs(alone - padded) <= tolerance * max(1.0, abs(alone)):
                continue
            raise ConfigError(
                f"{_TITLE} {directory}: a score changes with padding {scores}; "
                f"pad_token_id in config.json is {self._own_pad_id}"
            )


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
