"""Input data of a campaign, prepared before any actor starts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field

from rayhf.data.chat import Chat
from rayhf.data.prompts import PromptSet
from rayhf.evaluation.base import Evaluation, KeepsEvaluationState
from rayhf.types import JsonObject, Prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class CampaignData:
    """Rendered prompts, evaluations, and the fingerprint of offline pairs."""

    chat: Chat
    prompts: PromptSet
    heldout: tuple[Prompt, ...] = ()
    evaluations: Mapping[str, Evaluation] = field(default_factory=dict)
    """The config's further evaluations, by task."""
    commits: Mapping[str, str] = field(default_factory=dict)
    """Commits of the hub data sets that were read, by name."""
    pairs: str | None = None
    """Fingerprint of the offline pairs; the algorithm holds the pairs themselves."""
    inputs: Mapping[str, str] = field(default_factory=dict)
    """Fingerprints of the chat template, the rendered prompts and the files of models, by name."""
    functions: Mapping[str, str] = field(default_factory=dict)
    """Fingerprints of the files of the user's functions and environments, by path."""
    training_functions: Mapping[str, str] = field(default_factory=dict)
    """Those of the functions that give the training scores."""
    exported_files: Mapping[str, str] = field(default_factory=dict)
    """Texts of files, by name, that an exported policy has instead of its directory's."""

    @property
    def inputs_hash(self) -> str:
        """One hash of `inputs`."""
        return _hash(self.inputs)

    @property
    def functions_hash(self) -> str:
        """One hash of `training_functions`."""
        return _hash(self.training_functions)

    def evaluation_state(self) -> dict[str, JsonObject]:
        """Return the state that evaluations have accumulated, by task."""
        return {
            task: evaluation.state_dict()
            for task, evaluation in self.evaluations.items()
            if isinstance(evaluation, KeepsEvaluationState)
        }

    def load_evaluation_state(self, state: Mapping[str, JsonObject]) -> None:
        """Restore what `evaluation_state` returned."""
        for task, evaluation in self.evaluations.items():
            if isinstance(evaluation, KeepsEvaluationState):
                evaluation.load_state_dict(state[task])


def _hash(fingerprints: Mapping[str, str]) -> str:
    text = json.dumps(dict(fingerprints), sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
