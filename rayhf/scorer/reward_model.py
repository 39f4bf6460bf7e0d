"""A reward model: a sequence classifier with one output, with its own tokenizer and chat template, never the policy's.

In: ScoreRequests. Each completion becomes messages + one assistant turn -> the model's chat template -> token ids;
rows are sorted by length, packed by padded tokens and right-padded. Out: the logit as Scored; Invalid for a non-finite
logit, for a text that cannot be encoded and for one that is too long (never truncated); Failed where the template
refuses the messages. The batches depend on the requests alone. `check_directory` reads only the small files, before
anything starts.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jinja2

from rayhf.errors import ConfigError
from rayhf.experience import Comparison, Completion, Failed, Invalid, Outcome, Prompt, Scored, ScoreRequest
from rayhf.modeldir import AS_DATA, WEIGHTS_AS_DATA, refuse_own_code
from rayhf.prompts import disarming
from rayhf.scorer.pairs import compare_scores

_UNBOUNDED = 10**9
"""Tokenizers without a limit say 10**30."""
_PADDING_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.25}
"""Relative to max(1, |score|): rounding differs between batch shapes, reading the wrong token shows far above this."""


class RewardModel:
    """A sequence classifier of transformers, frozen.

    Args:
        directory: Hugging Face model directory with a tokenizer that has a chat template.
        dtype: "float32" or "bfloat16".
        token_budget: padded tokens per forward pass; a single longer row goes alone.
        max_length: tokens of template, prompt and completion together; default: the model's own limit.
        device: torch device, for example "cpu" or "cuda".
        threads: torch CPU threads of this process; unchanged by default.

    Raises ConfigError for a model that has not exactly one output, lacks weights for its head, has no chat template,
    does not embed all of its tokenizer's ids, or whose scores depend on padding.
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
        import torch
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        if threads is not None:
            torch.set_num_threads(threads)
        self._torch, self._device, self._token_budget = torch, torch.device(device), token_budget
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(directory, **AS_DATA)
            self._disarm = disarming(self._tokenizer)
            self._model, loading = AutoModelForSequenceClassification.from_pretrained(
                directory, dtype=getattr(torch, dtype), output_loading_info=True, **WEIGHTS_AS_DATA
            )
        except (OSError, ValueError, KeyError) as error:
            raise ConfigError(f"reward model {directory}: {_one_line(error)}") from error
        self._check_loaded(directory, sorted(loading["missing_keys"]))
        self._model.eval().requires_grad_(False).to(self._device)
        self._text_config = self._model.config.get_text_config()
        self._text_config.use_cache = False
        self._own_pad_id: int | None = self._text_config.pad_token_id
        self._max_length = self._length_limit(directory, max_length)
        self._check_padding(directory, _PADDING_TOLERANCE[dtype])

    def score(self, requests: Sequence[ScoreRequest]) -> list[tuple[Outcome, ...]]:
        """One outcome per completion of each request, in order."""
        encoded = [self._encode(request.prompt, completion) for request in requests for completion in request.completions]
        rows = [row for row in encoded if isinstance(row, list)]
        values = iter(self._score_rows(rows))
        outcomes = iter([_outcome(next(values)) if isinstance(row, list) else row for row in encoded])
        return [tuple(next(outcomes) for _ in request.completions) for request in requests]

    def compare(self, requests: Sequence[ScoreRequest]) -> list[Comparison]:
        """Sigmoids of score differences: what a Bradley-Terry model means by them."""
        return [compare_scores(outcomes) for outcomes in self.score(requests)]

    def close(self) -> None:
        """Give the weights' memory back."""
        self._model = None
        if self._device.type == "cuda":
            self._torch.cuda.empty_cache()

    def _encode(self, prompt: Prompt, completion: Completion) -> list[int] | Invalid | Failed:
        messages = [*map(dict, prompt.messages), {"role": "assistant", "content": self._disarm(completion.text)}]
        try:
            text = str(self._tokenizer.apply_chat_template(messages, tokenize=False))
            text.encode()
        except UnicodeEncodeError as error:
            return Invalid(reason=f"the text cannot be encoded as UTF-8: {error.reason}")
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            return Failed(reason=f"the chat template refused the messages: {_one_line(error)}")
        row: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        if not row:
            return Invalid(reason="the chat template made an empty text")
        if len(row) > self._max_length:
            return Invalid(reason=f"too long: {len(row)} tokens, the reward model reads {self._max_length}")
        return row

    def _score_rows(self, rows: Sequence[list[int]]) -> list[float]:
        values = [math.nan] * len(rows)
        for batch in pack([len(row) for row in rows], self._token_budget):
            for index, value in zip(batch, self._forward([rows[i] for i in batch]), strict=True):
                values[index] = value
        return values

    def _forward(self, rows: Sequence[list[int]]) -> list[float]:
        torch, width = self._torch, max(map(len, rows))
        self._text_config.pad_token_id = pad_id = self._pad_id(rows)
        ids = torch.tensor([row + [pad_id] * (width - len(row)) for row in rows], device=self._device)
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=self._device)
        with torch.inference_mode():
            logits = self._model(input_ids=ids, attention_mask=mask).logits
        scores: list[float] = logits.float().reshape(len(rows)).tolist()
        return scores

    def _pad_id(self, rows: Sequence[list[int]]) -> int:
        """transformers reads the score at the last token that is not `config.pad_token_id`.

        The model's own pad id is kept, so that the same token is read as in its training. A model without one reads
        the last token of a lone row; any id that ends no row of the batch reads the same token here.
        """
        if self._own_pad_id is not None:
            return self._own_pad_id
        ends = {row[-1] for row in rows}
        return next(candidate for candidate in range(len(ends) + 1) if candidate not in ends)

    def _check_loaded(self, directory: Path, missing: Sequence[str]) -> None:
        if missing:
            raise ConfigError(f"reward model {directory}: the checkpoint has no weights for {', '.join(missing[:3])}")
        if not self._tokenizer.chat_template:
            raise ConfigError(_no_template(directory))
        largest = max(self._tokenizer.get_vocab().values())
        embedded = self._model.get_input_embeddings().num_embeddings
        if largest >= embedded:
            raise ConfigError(f"reward model {directory}: its tokenizer has ids up to {largest}, the model embeds {embedded}")

    def _length_limit(self, directory: Path, wanted: int | None) -> int:
        limits = [getattr(self._text_config, "max_position_embeddings", None), self._tokenizer.model_max_length]
        own = min([int(limit) for limit in limits if limit and limit > 0] + [_UNBOUNDED])  # XLNet says -1
        if wanted is not None and wanted > own:
            raise ConfigError(f"reward model {directory}: max_length is {wanted}, the model reads at most {own} tokens")
        return wanted or own

    def _check_padding(self, directory: Path, tolerance: float) -> None:
        """A short row must score the same alone and padded; a wrong pad id would read another token, every time."""
        ids = sorted(set(self._tokenizer.get_vocab().values()) - set(self._tokenizer.all_special_ids))
        short, long = ids[:3], (ids * 16)[: min(16, self._max_length)]
        alone, padded = self._forward([short])[0], self._forward([long, short])[1]
        if not (math.isfinite(alone) and math.isfinite(padded)):
            raise ConfigError(f"reward model {directory}: a score is not finite ({alone:g} alone, {padded:g} padded)")
        if abs(alone - padded) > tolerance * max(1.0, abs(alone)):
            raise ConfigError(
                f"reward model {directory}: a score changes with padding ({alone:g} alone, {padded:g} padded); "
                f"pad_token_id in config.json is {self._own_pad_id}"
            )


def pack(lengths: Sequence[int], token_budget: int) -> Iterator[list[int]]:
    """Indices in batches of at most token_budget padded tokens, longest first; a longer row goes alone."""
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if batch and (len(batch) + 1) * lengths[batch[0]] > token_budget:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def check_directory(directory: Path) -> None:
    """What the small files can tell. Raises ConfigError unless it is a one-output classifier with a template."""
    config_file = directory / "config.json"
    if not config_file.is_file():
        raise ConfigError(f"reward model {directory}: there is no config.json; a Hugging Face model directory is needed")
    facts = directory / "rayhf_scorer.json"  # a pairwise model has one output too, but it reads two answers
    if facts.is_file() and (kind := _read_json(facts).get("kind")) != "pointwise":
        raise ConfigError(f"reward model {directory}: it is a {kind} model; use type: preference_model for it")
    config = _read_json(config_file)
    refuse_own_code(directory, config, key="reward model")
    names = config.get("architectures") or []
    if not any(name.endswith("ForSequenceClassification") for name in names):
        found = ", ".join(names) or "none"
        raise ConfigError(f"reward model {directory}: architectures is {found}; a ...ForSequenceClassification is needed")
    # transformers leaves id2label out for its default of two labels
    outputs = len(config["id2label"]) if "id2label" in config else config.get("num_labels", 2)
    if outputs != 1:
        raise ConfigError(f"reward model {directory}: it has {outputs} outputs (num_labels), a reward model has 1")
    tokenizer_file = directory / "tokenizer_config.json"
    if not tokenizer_file.is_file():
        raise ConfigError(f"reward model {directory}: there is no tokenizer_config.json; it needs its own tokenizer")
    templates = [directory / "chat_template.jinja", directory / "chat_template.json"]
    if not any(file.is_file() for file in templates) and not _read_json(tokenizer_file).get("chat_template"):
        raise ConfigError(_no_template(directory))


def _no_template(directory: Path) -> str:
    return f"reward model {directory}: its tokenizer has no chat template (chat_template.jinja or tokenizer_config.json)"


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} cannot be read as JSON: {_one_line(error)}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{file} is not a JSON object")
    return content


def _outcome(value: float) -> Outcome:
    return Scored(value=value) if math.isfinite(value) else Invalid(reason=f"the reward model's logit is {value}")


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:400]
