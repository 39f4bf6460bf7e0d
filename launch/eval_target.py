"""What `rayhf eval` evaluates: a model, or a campaign's policy at one iteration.

RUN is a run directory; RUN@12 its policy after iteration 12, RUN@0 the model that it started from.
The latest policy is RUN/policy. Others are made from a checkpoint: its master weights in the files
of RUN/policy, in RUN/policies/iteration-000012.
"""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from launch.export import checked_files
from rayhf.config.load import load_config
from rayhf.config.models import ModelName
from rayhf.config.schema import CampaignConfig
from rayhf.errors import ConfigError
from rayhf.run_dir.checkpoints import read_checkpoint
from rayhf.run_dir.files import MANIFEST, seal
from rayhf.run_dir.names import iteration_name, numbered
from rayhf.run_dir.state import read_state

if TYPE_CHECKING:
    from torch import Tensor

_AT_ITERATION = re.compile(r"(.+)@(\d+)")
_WEIGHTS = "*.safetensors"
_HEAD = "model."


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A model to evaluate."""

    text: str
    """As it was given."""
    model: ModelName
    campaign: CampaignConfig | None
    """Config of the campaign that trained it; None for a model."""

    @property
    def label(self) -> str:
        """Name for files: letters, digits, '_', '.' and '-'."""
        return re.sub(r"[^A-Za-z0-9_.-]+", "_", self.text).strip("_.-") or "model"


def find_target(text: str) -> Target:
    """Return the model that `text` names.

    Raises ConfigError for a run without that iteration, CheckpointError for damaged files.
    """
    at = _AT_ITERATION.fullmatch(text)
    run = Path(at[1] if at else text)
    if not (run / "campaign.json").is_file():
        return Target(text=text, model=ModelName.parse(text), campaign=None)
    campaign = load_config(run / "config.yaml")
    if at is None:
        model = ModelName(str(_latest(run)))
    elif int(at[2]) == 0:
        model = campaign.policy.model
        state = read_state(run)
        commit = state.models.get(str(model)) if state else None
        model = model.at(commit) if commit else model
    else:
        model = ModelName(str(_policy_at(run, int(at[2]))))
    return Target(text=text, model=model, campaign=campaign)


def _latest(run: Path) -> Path:
    policy = run / "policy"
    if not (policy / "config.json").is_file():
        raise ConfigError(
            f"{run} has no exported policy yet; expected {policy} (written with every checkpoint)"
        )
    checked_files(run)
    return policy


def _policy_at(run: Path, iteration: int) -> Path:
    """Return the model directory of an iteration's checkpoint, made where it does not exist."""
    state = read_state(run)
    kept = numbered(run / "checkpoints", "iteration-")
    if state is not None and iteration == state.iteration and iteration == max(kept, default=-1):
        return _latest(run)
    if iteration not in kept:
        known = ", ".join(map(str, [0, *kept]))
        raise ConfigError(
            f"{run}@{iteration}: there is no checkpoint of iteration {iteration}; expected one of "
            f"{known} (run.keep_every keeps more)"
        )
    made = run / "policies" / iteration_name(iteration)
    if not (made / "config.json").is_file():
        checkpoint = read_checkpoint(kept[iteration])
        made.parent.mkdir(exist_ok=True)
        temporary = made.with_name(f".{made.name}")
        shutil.rmtree(temporary, ignore_errors=True)
        _assemble(_latest(run), checkpoint.directory / "learner", temporary)
        seal(temporary, made, {"what": "policy", "iteration": iteration})
    return made


def _assemble(policy: Path, learner: Path, directory: Path) -> None:
    """Write a model directory: the policy's files with a checkpoint's weights.

    Raises ConfigError where the checkpoint does not hold the weights under the policy's names (an
    adapter, or layers that are stored in another form).
    """
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    masters: dict[str, Tensor] = {}
    for file in sorted(learner.glob("weights-*.safetensors")):
        # The learner's module holds the model under this name (rayhf/models/forward.py).
        masters |= {name.removeprefix(_HEAD): weight for name, weight in load_file(file).items()}
    shutil.copytree(policy, directory, ignore=shutil.ignore_patterns("adapter", MANIFEST, _WEIGHTS))
    unused = set(masters)
    for file in sorted(policy.glob(_WEIGHTS)):
        tensors = {}
        with safe_open(file, framework="pt") as stored:
            for name in stored.keys():  # noqa: SIM118  not a mapping
                old = stored.get_tensor(name)
                new = masters.get(name)
                if new is None or new.shape != old.shape:
                    raise ConfigError(
                        f"{learner.parent}: its weights are stored in another form than the "
                        f"model's ({name}), as with policy.lora; only the latest policy can be "
                        "evaluated"
                    )
                tensors[name] = new.to(old.dtype)
                unused.discard(name)
        save_file(tensors, directory / file.name, {"format": "pt"})
    if unused:
        raise ConfigError(
            f"{learner.parent}: its weights {sorted(unused)[0]} are not in {policy}; only the "
            "latest policy can be evaluated"
        )
