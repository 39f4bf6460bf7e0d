"""Reward models: sequence classifiers with one output, and their own tokenizer and chat template.

In: ScoreRequests. Each completion becomes messages + one assistant turn -> the model's chat
template -> token ids; rows are sorted by length, packed by padded tokens and right-padded. Out: the
logit as Scored; Invalid for a non-finite logit, for a text that cannot be encoded and for one that
is too long (never truncated); Failed where the template refuses the messages. The batches depend on
the requests alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import jinja2

from rayhf.config.scorers import PointwiseEntryConfig
from rayhf.data.chat import special_token_escaper
from rayhf.errors import ConfigError
from rayhf.models.hub import local_directory
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
from rayhf.types import Completion, Failed, Invalid, Outcome, Prompt, Scored, ScoreRequest

_TITLE = "reward model"
_PADDING_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.25}
"""Relative to max(1, |score|): rounding differs between batch shapes, but a score read at the wrong
token differs by far more."""


class RewardModelConfig(ClassifierEntryConfig, PointwiseEntryConfig):
    """A sequence classifier with one output, with its own tokenizer and chat template."""

    type: str = "reward_model"


class RewardModel(PointwiseScorer[RewardModelConfig]):
    """A sequence classifier with one output, the score.

    Raises ConfigError for a model that has not exactly one output, lacks weights for its head, has
    no chat template, does not embed all of its tokenizer's ids, or whose scores depend on padding.
    """

    Config = RewardModelConfig

    def __init__(self, config: RewardModelConfig, setup: ScorerSetup) -> None:
        super().__init__(config, setup)
        self.check(config, setup.base)
        self._classifier = load_classifier(config, setup, title=_TITLE)
        self._tokenizer = self._classifier.tokenizer
        directory = local_directory(config.model, setup.base)
        if not self._tokenizer.chat_template:
            raise ConfigError(f"{_TITLE} {directory}: its tokenizer has no chat template")
        self._escape = special_token_escaper(self._tokenizer)
        self._text_config = self._classifier.model.config.get_text_config()
        self._text_config.use_cache = False
        self._own_pad_id: int | None = self._text_config.pad_token_id
        self._check_padding(directory, _PADDING_TOLERANCE[config.dtype])

    @classmethod
    def check(cls, config: RewardModelConfig, base: Path) -> None:
        """Check the small files. Raises ConfigError unless it is a one-output classifier."""
        directory = local_directory(config.model, base)
        facts = directory / SCORER_FILE
        # A pairwise model has one output too, but it reads two completions.
        if facts.is_file() and (kind := read_json(facts).get("kind")) != "pointwise":
            raise ConfigError(
                f"{_TITLE} {directory}: it is a {kind} model; use type: preference_model for it"
            )
        outputs = check_classifier(directory, title=_TITLE)
        if outputs != 1:
            raise ConfigError(
                f"{_TITLE} {directory}: it has {outputs} outputs (num_labels), expected 1"
            )

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
            [_outcome(next(values)) if isinstance(row, list) else row for row in encoded]
        )
        return [tuple(next(outcomes) for _ in request.completions) for request in requests]

    def close(self) -> None:
        """Release the memory of the weights."""
        self._classifier.close()

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

    def _score_rows(self, rows: Sequence[list[int]]) -> list[float]:
        values = [math.nan] * len(rows)
        for batch in pack_rows([len(row) for row in rows], self.config.token_budget):
            for index, value in zip(batch, self._forward([rows[i] for i in batch]), strict=True):
                values[index] = value
        return values

    def _forward(self, rows: Sequence[list[int]]) -> list[float]:
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
        scores: list[float] = logits.float().reshape(len(rows)).tolist()
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
        alone = self._forward([short])[0]
        padded = self._forward([long, short])[1]
        scores = f"({alone:g} alone, {padded:g} padded)"
        if not (math.isfinite(alone) and math.isfinite(padded)):
            raise ConfigError(f"{_TITLE} {directory}: a score is not finite {scores}")
        if abs(alone - padded) > tolerance * max(1.0, abs(alone)):
            raise ConfigError(
                f"{_TITLE} {directory}: a score changes with padding {scores}; "
                f"pad_token_id in config.json is {self._own_pad_id}"
            )


def _outcome(value: float) -> Outcome:
    if not math.isfinite(value):
        return Invalid(reason=f"the reward model's logit is {value}")
    return Scored(value=value)
