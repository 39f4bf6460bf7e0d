"""The function of the scorer `reasoning_gym`, whose process imports reasoning-gym once."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from rayhf.data.reasoning_gym import generate, import_package

_TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)

import_package()  # here, so that no call's time limit has to cover it


def score(completion: str, *, reasoning_gym: Mapping[str, Any]) -> float:
    """Return the task's score of the text in the last <answer> tag, or of the whole completion.

    `reasoning_gym` is the column of that name, with which the task generates its entry again.
    """
    tagged = _TAGGED.findall(completion)
    answer = (tagged[-1] if tagged else completion).strip()
    index = reasoning_gym["index"]
    task = generate(**{key: value for key, value in reasoning_gym.items() if key != "index"})
    return float(task.score_answer(answer, task[index]))
