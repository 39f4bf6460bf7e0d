"""Pair encoders: sequence classifiers that read a prompt and two completions as one text.

In: ScoreRequests. Out: the matrix of win probabilities of each request's completions. Every pair is
read in both orders, and win[i, j] is the mean of P(first wins) for (i, j) and 1 - P for (j, i), so
that no position is an advantage: K (K - 1) texts for K completions. The log-odds that the first
wins are the logit of a model with one output (PairRM, Jiang et al. 2023), or the difference of two.
A text that is too long or cannot be encoded, and an output that is not finite, leave NaN: no
verdict, never a made-up one.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations
from pathlib import Path

import numpy as np
from pydantic import field_validator

from rayhf.config.jinja_text import variables_of
from rayhf.config.scorers import PairwiseEntryConfig
from rayhf.data.chat import special_token_escaper
from rayhf.data.jinja_sandbox import SandboxedTemplate, TemplateFailedError
from rayhf.errors import ConfigError, nearest
from rayhf.models.hub import local_directory
from rayhf.scorer.classifier import (
    PADDING_TOLERANCE,
    ClassifierEntryConfig,
    check_classifier,
    load_classifier,
)
from rayhf.scorer.comparisons import Problem, has_verdict
from rayhf.scorer.preference_model import order_averaged
from rayhf.scorer.protocol import PairwiseScorer, ScorerSetup
from rayhf.types import Compared, Comparison, Failed, Invalid, Prompt, ScoreRequest

_TITLE = "pair encoder"
_SHOWN = ("prompt", "first", "second")


class PairEncoderConfig(ClassifierEntryConfig, PairwiseEntryConfig):
    """A sequence classifier that reads two completions at once, and was not fitted by rayhf."""

    type: str = "pair_encoder"
    template: str = "{{ prompt }}\n\nA: {{ first }}\n\nB: {{ second }}"
    """jinja2 template of its text, as in its training. Special tokens of the model may stand here;
    in the prompt and the completions they are broken up."""

    @field_validator("template")
    @classmethod
    def _check_template(cls, template: str) -> str:
        try:
            used = variables_of(template)
        except ValueError as error:
            raise ValueError(f"jinja2 cannot read it: {error}") from None
        for name in sorted(used):
            if name not in _SHOWN:
                raise ValueError(f"there is no {name!r}{nearest(name, _SHOWN)}")
        if missing := [name for name in ("first", "second") if name not in used]:
            raise ValueError(f"it does not show {missing[0]}; add {{{{ {missing[0]} }}}} to it")
        return template


class PairEncoder(PairwiseScorer[PairEncoderConfig]):
    """A sequence classifier that reads two completions at once.

    Raises ConfigError as check does, for weights that do not fit, and for scores that depend on
    padding.
    """

    Config = PairEncoderConfig

    def __init__(self, config: PairEncoderConfig, setup: ScorerSetup) -> None:
        super().__init__(config, setup)
        self.check(config, setup.base)
        directory = local_directory(config.model, setup.base)
        self._classifier = load_classifier(config, setup, title=_TITLE)
        self._classifier.check_padding(f"{_TITLE} {directory}", PADDING_TOLERANCE[config.dtype])
        self._escape = special_token_escaper(self._classifier.tokenizer)
        self._template = SandboxedTemplate(config.template)

    @classmethod
    def check(cls, config: PairEncoderConfig, base: Path) -> None:
        """Check the small files. Raises ConfigError."""
        directory = local_directory(config.model, base)
        labels = check_classifier(directory, title=_TITLE, needs_template=False)
        if len(labels) > 2:
            raise ConfigError(
                f"{_TITLE} {directory}: it has {len(labels)} outputs, expected 1 or 2"
            )

    def compare(self, requests: Sequence[ScoreRequest]) -> list[Comparison]:
        """Return the win probabilities of each request, NaN where there is no verdict."""
        encoded = [self._encode(request) for request in requests]
        rows = [row for texts in encoded for row in texts.values() if isinstance(row, tuple)]
        unique = list(dict.fromkeys(rows))
        logits = self._classifier.logits(unique, self.config.token_budget)
        log_odds = {
            row: values[0] if len(values) == 1 else values[0] - values[1]
            for row, values in zip(unique, logits, strict=True)
        }
        return [
            self._comparison(len(request.completions), texts, log_odds)
            for request, texts in zip(requests, encoded, strict=True)
        ]

    def close(self) -> None:
        """Release the memory of the weights."""
        self._classifier.close()

    def _comparison(
        self,
        size: int,
        texts: dict[tuple[int, int], tuple[int, ...] | Problem],
        log_odds: dict[tuple[int, ...], float],
    ) -> Comparison:
        first_KK = np.full((size, size), np.nan)
        problems: list[Problem] = []
        for place, row in texts.items():
            if isinstance(row, tuple):
                first_KK[place] = log_odds[row]
            else:
                problems.append(row)
        first_KK[~np.isfinite(first_KK)] = np.nan
        win_KK = order_averaged(first_KK)
        if has_verdict(win_KK):
            return Compared(win=win_KK, source="pairwise")
        return (
            problems[0] if problems else Invalid(reason="the pair encoder's logits are not finite")
        )

    def _encode(self, request: ScoreRequest) -> dict[tuple[int, int], tuple[int, ...] | Problem]:
        """Return the texts to read by (i, j), completion i first."""
        texts = [completion.text for completion in request.completions]
        return {
            (i, j): self._row(request.prompt, texts[i], texts[j])
            for i, j in permutations(range(len(texts)), 2)
        }

    def _row(self, prompt: Prompt, first: str, second: str) -> tuple[int, ...] | Problem:
        question = "\n\n".join(message["content"] for message in prompt.messages)
        try:
            variables = {
                "prompt": self._escape(question),
                "first": self._escape(first),
                "second": self._escape(second),
            }
            text = self._template.render(variables)
            text.encode()
        except UnicodeEncodeError as error:
            return Invalid(reason=f"the text cannot be encoded as UTF-8: {error.reason}")
        except TemplateFailedError as error:
            return Failed(reason=f"the template cannot be rendered: {error}")
        row = tuple(self._classifier.tokenizer(text)["input_ids"])
        limit = self._classifier.max_length
        if len(row) > limit:
            return Invalid(reason=f"too long: {len(row)} tokens, the pair encoder reads {limit}")
        return row
