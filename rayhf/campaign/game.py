"""Exact play in a preference game over a handful of answers: how far the policy is from an equilibrium.

In: a game file {"answers": [text, ...], "preference": [[P(i beats j), ...], ...]}, prompts, and each round the policy's log-probs
of every answer to every prompt. Out: exploitability (the duality gap of symmetric play): for a mixed strategy p it is
max_y sum_k P(y, k) p(k) - 1/2, what the best answer wins against p beyond a draw; 0 only at a Nash equilibrium. Means over
prompts, of the current policy and of the average of all policies so far: in cyclic games self-play circles and its average
converges (Freund and Schapire 1999; Wu et al. 2024, section 4).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from rayhf.algorithms.base import given_row
from rayhf.errors import ConfigError
from rayhf.experience import FloatArray, Prompt
from rayhf.prompts import Chat

Array = npt.NDArray[np.float64]


def exploitability(play: Array, preference: Array) -> Array:
    """max_y P(y beats play) - 1/2 for each strategy: (..., K) with rows that sum to 1, and (K, K) -> (...)."""
    gap: Array = (play @ preference.T).max(axis=-1) - 0.5
    return gap


class Game:
    """The game on some prompts, and the running average of the policies measured so far."""

    def __init__(self, path: Path, prompts: Sequence[Prompt], chat: Chat, *, key: str) -> None:
        """Raises ConfigError for a file that is no game."""
        self.answers, self.preference = _read(path, key)
        self.rows = [given_row(p.prompt_id, p.token_ids, chat.answer(p.messages, a)) for p in prompts for a in self.answers]
        """Prompt by prompt, in the order of the answers."""
        self._shape = (len(prompts), len(self.answers))
        self._sum = np.zeros(self._shape)
        self._count = 0

    def measure(self, logprobs: Sequence[FloatArray]) -> dict[str, float]:
        """Take in the log-probs of `rows` under the next policy.

        game/exploitability, game/exploitability_average: see above. game/mass: the probability of all answers of the game
        together, before it is made 1. game/share/<answer>.
        """
        mass = np.exp(np.array([np.float64(row).sum() for row in logprobs])).reshape(self._shape)
        total = mass.sum(axis=1, keepdims=True)
        play = mass / np.maximum(total, np.finfo(np.float64).tiny)
        self._sum += play
        self._count += 1
        metrics = {
            "game/exploitability": float(exploitability(play, self.preference).mean()),
            "game/exploitability_average": float(exploitability(self._sum / self._count, self.preference).mean()),
            "game/mass": float(total.mean()),
        }
        return metrics | {f"game/share/{a}": float(s) for a, s in zip(self.answers, play.mean(axis=0), strict=True)}

    def state_dict(self) -> dict[str, Any]:
        return {"sum": self._sum.tolist(), "count": self._count}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._sum, self._count = np.asarray(state["sum"], dtype=np.float64), int(state["count"])


def _read(path: Path, key: str) -> tuple[tuple[str, ...], Array]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        answers, preference = tuple(content["answers"]), np.array(content["preference"], dtype=np.float64)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{key}: {path} is not a game file ({type(error).__name__}: {error})") from None
    if len(set(answers)) != len(answers) or len(answers) < 2 or not all(isinstance(a, str) and a for a in answers):
        raise ConfigError(f"{key}: {path}: answers must be at least two different texts, got {answers!r:.80}")
    if preference.shape != (len(answers), len(answers)):
        raise ConfigError(f"{key}: {path}: preference has shape {preference.shape}, expected {(len(answers), len(answers))}")
    if not np.allclose(preference + preference.T, 1.0) or preference.min() < 0.0:
        raise ConfigError(f"{key}: {path}: preference[i][j] + preference[j][i] must be 1, with every entry between 0 and 1")
    return answers, preference
