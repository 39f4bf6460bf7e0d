"""The state of a campaign (campaign.json) and of a checkpoint (its state.json), validated on read.

campaign.json is the only word on what was committed, and it may be damaged: every value must have
its type, and a name in it must stay inside the run directory.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rayhf.errors import CheckpointError
from rayhf.run_dir.files import Check, checksum, read_bytes, read_error, write_json
from rayhf.types import JsonObject

FILE = "campaign.json"
Count = Annotated[int, Field(ge=0, lt=10**12)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
StateName = Literal["new", "running", "paused", "stopped", "done"]


class Best(BaseModel):
    """The checkpoint with the highest evaluation score."""

    model_config = ConfigDict(frozen=True, strict=True, allow_inf_nan=False)

    iteration: Count
    score: float


class CampaignState(BaseModel):
    """The committed state of a campaign. Every change makes a new object and replaces the file."""

    model_config = ConfigDict(frozen=True, strict=True)

    epoch: Count = 0
    """Number of the newest attempt; only its processes may write."""
    iteration: Count = 0
    """The last committed iteration."""
    checkpoint: Annotated[str, Field(pattern=r"^iteration-[0-9]{6,12}$")] | None = None
    """Directory name of the committed checkpoint."""
    manifest: Sha256 | None = None
    """SHA-256 of that checkpoint's manifest."""
    unhealthy: Annotated[str, Field(pattern=r"^unhealthy-[0-9]{6,12}$")] | None = None
    """Directory name of the checkpoint after which a guard paused the campaign."""
    best: Best | None = None
    state: StateName = "new"
    reason: str | None = None
    """Why the campaign is paused."""
    guards: tuple[str, ...] = ()
    """Guards that paused the campaign and that no operator has accepted yet."""
    accepted: tuple[str, ...] = ()
    """Guards that an operator accepted: they only warn."""
    identity: Sha256 | None = None
    """SHA-256 of the config keys that identify the campaign."""
    config: Sha256 | None = None
    """SHA-256 of config.yaml."""
    takes_labels: bool = False
    """Whether the algorithm trains on human labels of pairs of completions."""
    takes_thumbs: bool = False
    """Whether it also trains on thumbs up and down on single completions."""
    models: dict[str, Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")]] = {}
    """Commit of each hub name in the config: later attempts load the same one."""
    datasets: dict[str, str] = {}
    """Commits of hub data sets by name: a continued campaign reads the same rows."""

    @property
    def unhealthy_iteration(self) -> int | None:
        """Iteration of the unhealthy checkpoint; None without one."""
        return None if self.unhealthy is None else int(self.unhealthy.removeprefix("unhealthy-"))

    def ways_to_continue(self, run: Path) -> str:
        """Describe what an operator can do after a guard's pause, in one sentence."""
        healthy = f"repeats from iteration {self.iteration + 1}, with what you change in the config"
        if self.unhealthy is None:
            return f"`rayhf unpause {run}` accepts the guard and {healthy}"
        return (
            f"`rayhf unpause {run}` accepts the guard and continues after iteration "
            f"{self.unhealthy_iteration}; `rayhf unpause {run} --from healthy` keeps it active and "
            f"{healthy}"
        )


class CheckpointState(BaseModel):
    """The controller's part of a checkpoint; the roles save their own files beside it."""

    model_config = ConfigDict(frozen=True)

    iteration: Count
    versions: dict[str, Count]
    """Weight version of each policy."""
    algorithm: JsonObject
    scorer: JsonObject
    evaluations: dict[str, JsonObject] = {}
    """State of evaluations that accumulate over iterations, by name."""
    prompts: str
    """Fingerprint of the training prompts."""
    pairs: str | None
    """Fingerprint of the offline pairs; None without any."""
    inputs: dict[str, str]
    """Fingerprints of the chat template, the rendered prompts and the files of models, by name."""
    config: JsonObject
    functions: dict[str, str] = {}
    """Fingerprints of the files of the user's functions, by path."""
    packages: dict[str, str]
    """Versions of the installed packages, for reproduction."""


def read_state(run: Path) -> CampaignState | None:
    """Return a run directory's state; None where it has none.

    Raises CheckpointError for a file that is damaged, StorageError for one that cannot be read.
    """
    file = run / FILE
    try:
        data = read_bytes(file)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise read_error(file, error) from None
    try:
        state = CampaignState.model_validate_json(data)
    except ValidationError as error:
        raise CheckpointError(f"{file} is damaged{first_problem(error)}") from None
    content = json.loads(data)
    if content.pop("checksum", None) != checksum(content):
        raise CheckpointError(f"{file} is damaged: it does not match its own checksum")
    return state


def write_state(run: Path, state: CampaignState, check: Check | None = None) -> None:
    """Replace a run directory's campaign.json; `check` as for `atomic_file`."""
    content = state.model_dump(mode="json")
    write_json(run / FILE, {**content, "checksum": checksum(content)}, check)


def first_problem(error: ValidationError) -> str:
    """Return the first problem as ", key: message", or ": message" for the whole."""
    problem = error.errors(include_url=False, include_input=False)[0]
    key = ".".join(map(str, problem["loc"]))
    return f", {key}: {problem['msg']}" if key else f": {problem['msg']}"
