"""What an operator wants of a running campaign: a file in the run directory that the controller reads between two rounds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

from rayhf.campaign.files import write_json

Wanted = Literal["run", "pause", "stop"]


def read_control(run: Path) -> Wanted:
    """ "run" where nobody asked for anything, or the file says nothing that is known."""
    try:
        wanted = json.loads((run / "control.json").read_text(encoding="utf-8"))["wanted"]
    except (OSError, ValueError, KeyError, TypeError):
        return "run"
    return wanted if wanted in ("pause", "stop") else "run"


def write_control(run: Path, wanted: Wanted) -> None:
    write_json(run / "control.json", {"wanted": wanted})
