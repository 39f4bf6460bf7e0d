"""Frozen sequence classifiers of transformers: the models of reward and preference scorers.

In: a Hugging Face model directory with its own tokenizer and chat template. Out: the loaded model.
`check_classifier` reads only the small files, before anything starts.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import PositiveInt

from rayhf.config.models import ModelName
from rayhf.config.scorers import ClassifierModel, Dtype, ScorerEntryConfig
from rayhf.errors import ConfigError, one_line
from rayhf.models.hub import local_directory
from rayhf.models.packing import pack_rows
from rayhf.models.source import AS_DATA, WEIGHTS_AS_DATA, refuse_own_code
from rayhf.scorer.protocol import ScorerSetup
from rayhf.scorer.reward_head import with_head

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

SCORER_FILE = "rayhf_scorer.json"
"""Facts that `rayhf fit-scorer` writes beside a model's config.json."""
PADDING_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.25}
"""Relative to max(1, |score|): rounding differs between batch shapes, but a score read at the wrong
token differs by far more."""
_UNBOUNDED = 10**9
"""Tokenizers without a limit say 10**30."""


class ClassifierEntryConfig(ScorerEntryConfig):
    """Settings of a scorer that is a sequence classifier."""

    model: ModelName
    """Model directory or hub name, with a tokenizer that has a chat template."""
    dtype: Dtype = "float32"
    token_budget: PositiveInt = 16384
    """Padded tokens per forward pass; a single longer text has a pass of its own."""
    max_length: PositiveInt | None = None
    """Limit on a whole text (template, prompt and completions), in tokens. Default: the model's
    own."""

    @property
    def loads(self) -> ClassifierModel:
        """The model in its process, for memory estimates."""
        return ClassifierModel(model=self.model, dtype=self.dtype, token_budget=self.token_budget)


@dataclass(slots=True)
class Classifier:
    """A loaded model, in evaluation mode, on its device."""

    tokenizer: PreTrainedTokenizerBase
    model: PreTrainedModel
    """None once it is closed."""
    device: torch.device
    max_length: int
    """Limit on a whole text, in tokens."""

    own_pad_id: int | None
    """The model's own; None where its config names none."""

    def logits(self, rows: Sequence[Sequence[int]], token_budget: int) -> list[list[float]]:
        """Return each row's logits by the model's head, computed in batches of `token_budget`."""
        values: list[list[float]] = [[] for _ in rows]
        for batch in pack_rows([len(row) for row in rows], token_budget):
            logits = self._forward([list(rows[index]) for index in batch])
            for index, value in zip(batch, logits, strict=True):
                values[index] = value
        return values

    def _forward(self, rows: Sequence[list[int]]) -> list[list[float]]:
        import torch

        width = max(map(len, rows))
        pad_id = self._pad_id(rows)
        self.model.config.get_text_config().pad_token_id = pad_id
        ids_RT = torch.tensor(
            [row + [pad_id] * (width - len(row)) for row in rows], device=self.device
        )
        mask_RT = torch.tensor(
            [[1] * len(row) + [0] * (width - len(row)) for row in rows], device=self.device
        )
        with torch.inference_mode():
            logits = self.model(input_ids=ids_RT, attention_mask=mask_RT).logits
        scores: list[list[float]] = logits.float().reshape(len(rows), -1).tolist()
        return scores

    def _pad_id(self, rows: Sequence[Sequence[int]]) -> int:
        """Return the padding id of a batch.

        transformers reads the score at the last token that is not `config.pad_token_id`. The
        model's own pad id is kept, so that the same token is read as in its training. A model
        without one reads the last token of a lone row; any id that ends no row of the batch reads
        the same token here.
        """
        if self.own_pad_id is not None:
            return self.own_pad_id
        ends = {row[-1] for row in rows}
        return next(candidate for candidate in range(len(ends) + 1) if candidate not in ends)

    def check_padding(self, where: str, tolerance: float) -> None:
        """Raise ConfigError unless a short row scores the same alone and padded.

        With a wrong pad id another token would be read, every time.
        """
        ids = sorted(set(self.tokenizer.get_vocab().values()) - set(self.tokenizer.all_special_ids))
        short = ids[:3]
        long = (ids * 16)[: min(16, self.max_length)]
        pairs = zip(self._forward([short])[0], self._forward([long, short])[1], strict=True)
        for alone, padded in pairs:
            scores = f"({alone:g} alone, {padded:g} padded)"
            if not (math.isfinite(alone) and math.isfinite(padded)):
                raise ConfigError(f"{where}: a score is not finite {scores}")
            if abs(alone - padded) > tolerance * max(1.0, abs(alone)):
                raise ConfigError(
                    f"{where}: a score changes with padding {scores}; "
                    f"pad_token_id in config.json is {self.own_pad_id}"
                )

    def close(self) -> None:
        """Release the memory of the weights."""
        import torch

        self.model = None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def load_classifier(
    config: ClassifierEntryConfig, setup: ScorerSetup, *, title: str, head: str | None = None
) -> Classifier:
    """Load the model, with `head` in place of its own; errors call it `title`.

    Raises ConfigError for weights or a tokenizer that do not fit, and for a max_length beyond the
    model's.
    """
    import torch
    from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

    directory = local_directory(config.model, setup.base)
    if setup.threads is not None:
        torch.set_num_threads(setup.threads)
    auto = AutoModelForSequenceClassification if head is None else AutoModel
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, **AS_DATA)
        model, loading = auto.from_pretrained(
            directory,
            dtype=getattr(torch, config.dtype),
            output_loading_info=True,
            **WEIGHTS_AS_DATA,
        )
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"{title} {directory}: {one_line(error)}") from error
    if missing := sorted(loading["missing_keys"]):
        raise ConfigError(
            f"{title} {directory}: the checkpoint has no weights for {', '.join(missing[:3])}"
        )
    if head is not None:
        model = with_head(model, head, directory)
    largest = max(tokenizer.get_vocab().values())
    embedded = model.get_input_embeddings().num_embeddings
    if largest >= embedded:
        raise ConfigError(
            f"{title} {directory}: its tokenizer has ids up to {largest}, "
            f"the model embeds {embedded}"
        )
    limit = length_limit(model.config.get_text_config(), tokenizer)
    if config.max_length is not None and config.max_length > limit:
        raise ConfigError(
            f"{title} {directory}: max_length is {config.max_length}, "
            f"the model reads at most {limit} tokens"
        )
    device = torch.device(setup.device)
    model = model.eval().requires_grad_(False).to(device)
    text_config = model.config.get_text_config()
    text_config.use_cache = False
    return Classifier(
        tokenizer, model, device, config.max_length or limit, text_config.pad_token_id
    )


def length_limit(model_config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the longest text that the model and its tokenizer take, in tokens."""
    limits = [getattr(model_config, "max_position_embeddings", None), tokenizer.model_max_length]
    # XLNet says -1.
    return min([int(limit) for limit in limits if limit and limit > 0] + [_UNBOUNDED])


def check_classifier(
    directory: Path, *, title: str, own_head: bool = False, needs_template: bool = True
) -> list[str]:
    """Check the small files of a classifier; errors call it `title`. Returns its outputs' labels.

    Raises ConfigError unless it is a sequence classifier (or any model, with `own_head`) with a
    tokenizer and, where it needs one, a chat template.
    """
    config_file = directory / "config.json"
    if not config_file.is_file():
        raise ConfigError(
            f"{title} {directory}: there is no config.json; expected a Hugging Face model directory"
        )
    config = read_json(config_file)
    refuse_own_code(directory, config, key=title)
    names = config.get("architectures") or []
    if not own_head and not any(name.endswith("ForSequenceClassification") for name in names):
        raise ConfigError(
            f"{title} {directory}: architectures is {', '.join(names) or 'none'}; "
            "expected a ...ForSequenceClassification"
        )
    tokenizer_file = directory / "tokenizer_config.json"
    if not tokenizer_file.is_file():
        raise ConfigError(
            f"{title} {directory}: there is no tokenizer_config.json; it needs its own tokenizer"
        )
    if needs_template and not _has_template(directory, tokenizer_file):
        raise ConfigError(
            f"{title} {directory}: its tokenizer has no chat template "
            "(chat_template.jinja or tokenizer_config.json)"
        )
    # transformers leaves id2label out for its default of two labels.
    labels = config.get("id2label") or range(int(config.get("num_labels", 2)))
    if isinstance(labels, dict):
        return [str(labels[key]) for key in sorted(labels, key=int)]
    return [f"LABEL_{number}" for number in labels]


def _has_template(directory: Path, tokenizer_file: Path) -> bool:
    templates = [directory / "chat_template.jinja", directory / "chat_template.json"]
    own = read_json(tokenizer_file).get("chat_template")
    return bool(own) or any(file.is_file() for file in templates)


def read_json(file: Path) -> dict[str, Any]:
    """Return the JSON object of a file. Raises ConfigError where there is none."""
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} cannot be read as JSON: {one_line(error)}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{file} is not a JSON object")
    return content
