"""Fingerprints of a campaign's inputs besides its data: chat template, rendered prompts, models.

A campaign that is continued loads its models again, the frozen reference among them, and renders
its prompts again: the same names must still hold the same content. The user's functions may change,
since an error in one is corrected there; the campaign says so.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from rayhf.config.schema import CampaignConfig
from rayhf.config.scorers import ScorerEntryConfig
from rayhf.models.hub import has_weights
from rayhf.models.weight_files import fingerprints
from rayhf.scorer.rule_config import FunctionEntryConfig
from rayhf.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def input_fingerprints(
    models: Mapping[str, Path], tokenizer: PreTrainedTokenizerBase, prompts: Iterable[Prompt]
) -> dict[str, str]:
    """Return a hash of each input by a name that a message can show.

    Args:
        models: model directories by config key.
        tokenizer: with the policy's chat template.
        prompts: the training prompts.
    """
    inputs = {
        f"{key}/{name}": value
        for key, path in models.items()
        if has_weights(path)
        for name, value in fingerprints(path, key=key).items()
    }
    inputs["chat template"] = _hash([tokenizer.get_chat_template().encode()])
    inputs["prompts as rendered"] = _hash(
        array("q", [len(prompt.token_ids), *prompt.token_ids]).tobytes() for prompt in prompts
    )
    return inputs


def function_fingerprints(names: Iterable[str], base: Path) -> dict[str, str]:
    """Return a hash of each file below `base` with one of the functions or classes, by path.

    Names are module:function. A file that such a file imports is not read.
    """
    modules = sorted({name.partition(":")[0].replace(".", "/") for name in names})
    files = [path for name in modules for path in (f"{name}.py", f"{name}/__init__.py")]
    return {path: _hash([(base / path).read_bytes()]) for path in files if (base / path).is_file()}


def user_functions(config: CampaignConfig) -> list[str]:
    """Return the functions that score, and the environments, of the form module:name."""
    scoring = functions_of(entry for _, entry in scorer_entries(config))
    return scoring + [each.type for each in config.environment if ":" in each.type]


def functions_of(entries: Iterable[ScorerEntryConfig]) -> list[str]:
    """Return the functions among scorers."""
    return [entry.function for entry in entries if isinstance(entry, FunctionEntryConfig)]


def scorer_entries(config: CampaignConfig) -> Iterator[tuple[str, ScorerEntryConfig]]:
    """Yield every scorer of the config, after its key."""
    groups = {"scorer.train": config.scorer.train, "scorer.evaluate": config.scorer.evaluate or ()}
    for task, evaluation in config.evaluations.items():
        groups[f"evaluations.{task}.scorer"] = evaluation.scorers
    for key, entries in groups.items():
        for index, entry in enumerate(entries):
            yield f"{key}[{index}]", entry


def _hash(parts: Iterable[bytes]) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        digest.update(part)
    return digest.hexdigest()
