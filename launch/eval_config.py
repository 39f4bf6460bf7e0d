"""From the command line of `rayhf eval` to its config.

A campaign's config, given with --config or found in a run directory, provides the chat template,
the engine's settings, and its held-out prompts with their scorers as a suite.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from launch.eval_target import Target, find_target
from rayhf.config.evaluate import EvalConfig
from rayhf.config.load import load_config, load_section, read_mapping
from rayhf.config.registry import SUITES
from rayhf.config.schema import CampaignConfig
from rayhf.data.readers import read_rows
from rayhf.errors import ConfigError, nearest

_SHARED = ("model", "dtype", "max_length", "chat_template", "chat_template_kwargs", "chat_date")
"""Keys of `policy` that an evaluation takes from a campaign."""


def build_config(
    model: str,
    *,
    suites: Sequence[str],
    file: Path | None,
    baseline: str | None,
    out: Path | None,
    overrides: Sequence[str],
) -> tuple[EvalConfig, Target]:
    """Return the config and what is evaluated.

    Args:
        model: a model, RUN or RUN@iteration.
        suites: names of suites, or files of prompts or preference pairs.
        file: YAML file with keys of EvalConfig, or a campaign's config.
        baseline: replaces the file's.
        out: replaces the file's.
        overrides: `key=value`.

    Raises ConfigError.
    """
    target = find_target(model)
    data: dict[str, Any] = {}
    if file is not None:
        given = read_mapping(file)
        data = given if "algorithm" not in given else _of_campaign(load_config(file), suites)
    elif target.campaign is not None:
        data = _of_campaign(target.campaign, suites)
    data["policy"] = {**data.get("policy", {}), "model": str(target.model)}
    if suites:
        named = dict(_suite(text) for text in suites)
        data["suites"] = {
            name: data.get("suites", {}).get(name, own) for name, own in named.items()
        }
    if not data.get("suites"):
        raise ConfigError(
            f"--suite is missing; expected one of {', '.join(SUITES.builtin)}, or a file of "
            "prompts or preference pairs"
        )
    data |= {k: str(v) for k, v in (("baseline", baseline), ("out", out)) if v is not None}
    return load_section(data, overrides, EvalConfig), target


def _of_campaign(campaign: CampaignConfig, suites: Sequence[str]) -> dict[str, Any]:
    dumped = campaign.model_dump(mode="json")
    data = {
        "policy": {key: dumped["policy"][key] for key in _SHARED},
        "rollout": dumped["rollout"],
        "device": campaign.cluster.device,
    }
    scorers = dumped["scorer"]["evaluate"] or dumped["scorer"]["train"]
    if campaign.prompts.heldout is not None and not suites:
        heldout: dict[str, Any] = {"type": "scored", "prompts": dumped["prompts"]["heldout"]}
        if campaign.run.eval_prompts is not None:
            heldout["limit"] = campaign.run.eval_prompts
        data["suites"] = {campaign.prompts.task: heldout | {"scorer": scorers}}
    return data


def _suite(text: str) -> tuple[str, Mapping[str, Any]]:
    """Return name and settings of a suite that the command line names."""
    if text in {entry.name for entry in SUITES.entries()} or ":" in text:
        return re.sub(r"\W+", "_", text), {"type": text}
    path = Path(text)
    if not path.exists():
        known = [entry.name for entry in SUITES.entries()]
        raise ConfigError(f"--suite: {text!r} is neither a suite nor a file{nearest(text, known)}")
    name = re.sub(r"[^A-Za-z0-9_.-]+", "_", path.name.split(".")[0]).strip("_.-") or "prompts"
    _, first = next(iter(read_rows(path, key="--suite")), ("", {}))
    is_pair = first.get("chosen") is not None and first.get("rejected") is not None
    return name, {
        "type": "preferences" if is_pair else "scored",
        "prompts": json.loads(json.dumps({"type": "file", "path": text})),
    }
