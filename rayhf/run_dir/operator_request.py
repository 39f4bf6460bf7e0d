"""The operator's request to a campaign (control.json); the controller reads it between iterations.

Writing it needs neither Ray nor the lock of the run directory.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

from rayhf.run_dir.files import Check, read_bytes, write_json

OperatorRequest = Literal["run", "pause", "stop"]
FILE = "control.json"


def read_request(run: Path) -> OperatorRequest:
    """Return the last request: "run" where there is none, or one that is not known."""
    try:
        request = json.loads(read_bytes(run / FILE))["request"]
    except (OSError, ValueError, KeyError, TypeError):
        return "run"
    return request if request in ("pause", "stop") else "run"


def write_request(run: Path, request: OperatorRequest, check: Check | None = None) -> None:
    """Replace the request; `check` as for `atomic_file`."""
    write_json(run / FILE, {"request": request}, check)
