"""The operator's request to a campaign (control.json); the controller reads it between iterations.

Writing it needs neither Ray nor the lock of the run directory.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

from rayhf.run_dir.files import write_json

OperatorRequest = Literal["run", "pause", "stop"]
FILE = "control.json"


def read_request(run: Path) -> OperatorRequest:
    """Return the last request: "run" where there is none, or one that is not known."""
    try:
        request = json.loads((run / FILE).read_text(encoding="utf-8"))["request"]
    except (OSError, ValueError, KeyError, TypeError):
        return "run"
    return request if request in ("pause", "stop") else "run"


def write_request(run: Path, request: OperatorRequest) -> None:
    """Replace the request."""
    write_json(run / FILE, {"request": request})
