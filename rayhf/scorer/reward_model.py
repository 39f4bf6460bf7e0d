"""A reward model: a sequence classifier with one output, with its own tokenizer and chat template,
never the policy's.

In: ScoreRequests. Each completion becomes messages + one assistant turn -> the model's chat
template -> token ids; rows are sorted by length, packed by padded tokens and right-padded. Out: the
logit as Scored; Invalid for a non-finite logit, for a text that cannot be encoded and for one that
is too long (never truncated); Failed where the template refuses the messages. The batches depend on
the requests alone. `check_directory` reads only the small files, before anything starts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import jinja2

from rayhf.data.prompts import disarming
from rayhf.errors import ConfigError
from rayhf.models.packing import pack_rows
from rayhf.models.source import refuse_own_code
from rayhf.scorer.classifier import load_classifier, one_line, read_json
from rayhf.scorer.comparisons import compare_scores
from rayhf.types import (
    Comparison,
    Completion,
    Failed,
    Invalid,
    Outcome,
    Prompt,
    Scored,
    ScoreRequest,
)

_PADDING_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.25}
"""Relative to max(1, |score|): rounding differs between batch shapes, reading the wrong token shows
far above this."""


class RewardModel:
    """A sequence classifier of transformers, frozen.

    Args:
        directory: Hugging Face model directory with a tokenizer that has a chat template.
        dtype: "float32" or "bfloat16".
        token_budget: padded tokens per forward pass; a single longer row goes alone.
        max_length: tokens of template, prompt and completion together; default: the model's own
        limit. device: torch device, for example "cpu" or "cuda". threads: torch CPU threads of this
        process; unchanged by default.

    Raises ConfigError for a model that has not exactly one output, lacks weights for its head, has
    no chat template, does not embed all of its tokenizer's ids, or whose scores depend on padding.
    """

    def __init__(
        self,
        directory: Path,
        *,
        dtype: str = "float32",
        token_budget: int = 16384,
        max_length: int | None = None,
        device: str = "cpu",
        threads: int | None = None,
    ) -> None:
        check_directory(directory)
        self._classifier = load_classifier(
            directory,
            "reward model",
            dtype=dtype,
            max_length=max_length,
            device=device,
            threads=threads,
        )
        self._tokenizer, self._token_budget = self._classifier.tokenizer, token_budget
        if not self._tokenizer.chat_template:
            raise ConfigError(_no_template(directory))
        self._disarm = disarming(self._tokenizer)
        self._text_config = self._classifier.model.config.get_text_config()
        self._text_config.use_cache = False
        self._own_pad_id: int | None = self._text_config.pad_token_id
        self._check_padding(directory, _PADDING_TOLERANCE[dtype])

    def score(self, requests: Sequence[ScoreRequest]) -> list[tuple[Outcome, ...]]:
        """One outcome per completion of each request, in order."""
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

    def compare(self, requests: Sequence[ScoreRequest]) -> list[Comparison]:
        """Sigmoids of score differences: what a Bradley-Terry model means by them."""
        return [compare_scores(outcomes) for outcomes in self.score(requests)]

    def close(self) -> None:
        """Give the weights' memory back."""
        self._classifier.close()

    def _encode(self, prompt: Prompt, completion: Completion) -> list[int] | Invalid | Failed:
        messages = [
            *map(dict, prompt.messages),
            {"role": "assistant", "content": self._disarm(completion.text)},
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
            return Invalid(reason="the chat template made an empty text")
        if len(row) > self._classifier.max_length:
            return Invalid(
                reason=f"too long: {len(row)} tokens, the reward model reads {self._classifier.max_length}"
            )
        return row

    def _score_rows(self, rows: Sequence[list[int]]) -> list[float]:
        values = [math.nan] * len(rows)
        for batch in pack_rows([len(row) for row in rows], self._token_budget):
            for index, value in zip(batch, self._forward([rows[i] for i in batch]), strict=True):
                values[index] = value
        return values

    def _forward(self, rows: Sequence[list[int]]) -> list[float]:
        import torch

        width, device = max(map(len, rows)), self._classifier.device
        self._text_config.pad_token_id = pad_id = self._pad_id(rows)
        ids = torch.tensor([row + [pad_id] * (width - len(row)) for row in rows], device=device)
        mask = torch.tensor(
            [[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device
        )
        with torch.inference_mode():
            logits = self._classifier.model(input_ids=ids, attention_mask=mask).logits
        scores: list[float] = logits.float().reshape(len(rows)).tolist()
        return scores

    def _pad_id(self, rows: Sequence[list[int]]) -> int:
        """transformers reads the score at the last token that is not `config.pad_token_id`.

        The model's own pad id is kept, so that the same token is read as in its training. A model
        without one reads the last token of a lone row; any id that ends no row of the batch reads
        the same token here.
        """
        if self._own_pad_id is not None:
            return self._own_pad_id
        ends = {row[-1] for row in rows}
        return next(candidate for candidate in range(len(ends) + 1) if candidate not in ends)

    def _check_padding(self, directory: Path, tolerance: float) -> None:
        """A short row must score the same alone and padded; a wrong pad id would read another
        token, every time."""
        ids = sorted(
            set(self._tokenizer.get_vocab().values()) - set(self._tokenizer.all_special_ids)
        )
        short, long = ids[:3], (ids * 16)[: min(16, self._classifier.max_length)]
        alone, padded = self._forward([short])[0], self._forward([long, short])[1]
        if not (math.isfinite(alone) and math.isfinite(padded)):
            raise ConfigError(
                f"reward model {directory}: a score is not finite ({alone:g} alone, {padded:g} padded)"
            )
        if abs(alone - padded) > tolerance * max(1.0, abs(alone)):
            raise ConfigError(
                f"reward model {directory}: a score changes with padding ({alone:g} alone, {padded:g} padded); "
                f"pad_token_id in config.json is {self._own_pad_id}"
            )


def check_directory(directory: Path) -> None:
    """What the small files can tell. Raises ConfigError unless it is a one-output classifier with a
    template."""
    config_file = directory / "config.json"
    if not config_file.is_file():
        raise ConfigError(
            f"reward model {directory}: there is no config.json; a Hugging Face model directory is needed"
        )
    facts = (
        directory / "rayhf_scorer.json"
    )  # a pairwise model has one output too, but it reads two answers
    if facts.is_file() and (kind := read_json(facts).get("kind")) != "pointwise":
        raise ConfigError(
            f"reward model {directory}: it is a {kind} model; use type: preference_model for it"
        )
    config = read_json(config_file)
    refuse_own_code(directory, config, key="reward model")
    names = config.get("architectures") or []
    if not any(name.endswith("ForSequenceClassification") for name in names):
        found = ", ".join(names) or "none"
        raise ConfigError(
            f"reward model {directory}: architectures is {found}; a ...ForSequenceClassification is needed"
        )
    # transformers leaves id2label out for its default of two labels
    outputs = len(config["id2label"]) if "id2label" in config else config.get("num_labels", 2)
    if outputs != 1:
        raise ConfigError(
            f"reward model {directory}: it has {outputs} outputs (num_labels), a reward model has 1"
        )
    tokenizer_file = directory / "tokenizer_config.json"
    if not tokenizer_file.is_file():
        raise ConfigError(
            f"reward model {directory}: there is no tokenizer_config.json; it needs its own tokenizer"
        )
    templates = [directory / "chat_template.jinja", directory / "chat_template.json"]
    if not any(file.is_file() for file in templates) and not read_json(tokenizer_file).get(
        "chat_template"
    ):
        raise ConfigError(_no_template(directory))


def _no_template(directory: Path) -> str:
    return f"reward model {directory}: its tokenizer has no chat template (chat_template.jinja or tokenizer_config.json)"


def _outcome(value: float) -> Outcome:
    return (
        Scored(value=value)
        if math.isfinite(value)
        else Invalid(reason=f"the reward model's logit is {value}")
    )
