"""campaign.json, the committed state of a campaign: what it holds, and what is believed of a file
that may be damaged.

Every value must be of its kind, and a name in it leads nowhere but into the run directory.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rayhf.errors import CheckpointError

FILE = "campaign.json"
Count = Annotated[int, Field(ge=0, lt=10**12)]


class _Best(BaseModel):
    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    iteration: Count
    score: float


class _State(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")

    epoch: Count = 0
    iteration: Count = 0
    checkpoint: Annotated[str, Field(pattern=r"^iteration-[0-9]{6,12}$")] | None = None
    manifest: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None
    best: _Best | None = None
    state: Literal["new", "running", "paused", "stopped", "done"] = "new"
    reason: str | None = None
    guards: list[str] = []
    accepted: list[str] = []


def new_state() -> dict[str, Any]:
    """Of a campaign that has not begun."""
    return _State().model_dump()


def read_state(run: Path) -> dict[str, Any] | None:
    """None where there is none. Raises CheckpointError for one that cannot be believed."""
    file = run / FILE
    try:
        return _State.model_validate_json(file.read_bytes()).model_dump()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror or error})") from None
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise CheckpointError(
            f"{file} is damaged{f', {where}' if where else ''}: {first['msg']}"
        ) from None
