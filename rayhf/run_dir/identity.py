"""config.yaml of a run directory, and what identifies its campaign.

campaign.json has a hash of the keys that identify the campaign, so that a missing or damaged
config.yaml lets no other campaign in, and the SHA-256 of the file.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rayhf.config.load import dump_config
from rayhf.config.schema import CampaignConfig
from rayhf.config.yaml_text import parse_yaml
from rayhf.errors import CheckpointError, ConfigError
from rayhf.run_dir.files import read_bytes, read_error
from rayhf.run_dir.state import CampaignState

FILE = "config.yaml"
IDENTITY = (
    "seed",
    "policy",
    "prompts",
    "algorithm",
    "environment",
    "scorer.train",
    "scorer.combine",
    "rollout.temperature",
    "rollout.top_p",
    "rollout.top_k",
    "reference.model",
)
"""Config keys that identify a campaign: its run directory refuses a config that differs here."""
_MAY_BE_SECRET = re.compile(r"trackers\b|environment\b.*\.args\b")
"""Keys whose values are not shown: passwords in addresses, free arguments of environments."""


def read_config(run: Path, state: CampaignState | None = None) -> dict[str, Any]:
    """Return the config of a run directory, not validated.

    With its `state`, the file must also be the one that was written. Raises CheckpointError for a
    file that is missing or damaged, StorageError for one that cannot be read.
    """
    file = run / FILE
    remedy = "the same `rayhf run` command writes it again"
    try:
        data = read_bytes(file)
        if state is not None and hashlib.sha256(data).hexdigest() != state.config:
            raise ValueError("it does not have the checksum that campaign.json names")
        config = parse_yaml(data.decode())
        if not isinstance(config, dict):
            raise ValueError("it is not a mapping of sections")
    except FileNotFoundError:
        raise CheckpointError(f"{file} is missing; {remedy}") from None
    except OSError as error:
        raise read_error(file, error) from None
    except ValueError as error:
        raise CheckpointError(f"{file} is damaged ({error}); {remedy}") from None
    return config


def check_identity(run: Path, state: CampaignState, config: CampaignConfig) -> str:
    """Return a warning where config.yaml is not the one that was written; empty otherwise.

    Raises ConfigError for the config of another campaign.
    """
    if state.identity is None:
        return ""
    warning = ""
    old: dict[str, Any] | None = None
    try:
        old = read_config(run, state)
    except CheckpointError as error:
        warning = str(error).replace("the same `rayhf run` command writes it", "it is written")
    if state.identity == identity_hash(config):
        return warning
    refused = f"run.dir {run} holds another campaign"
    new = parse_yaml(dump_config(config))
    for key in IDENTITY if old is not None else ():
        for difference in _differences(_pick(old, key), _pick(new, key), key):
            raise ConfigError(f"{refused}: {difference}; choose another run.dir")
    raise ConfigError(
        f"{refused}: one of {', '.join(IDENTITY)} differs (its config.yaml is missing or damaged, "
        "so it cannot be said which); choose another run.dir"
    )


def config_changes(old: Mapping[str, Any], config: CampaignConfig) -> list[str]:
    """Describe what differs from an earlier config of the campaign, which is not validated."""
    changes = _differences(dict(old), parse_yaml(dump_config(config)), "")
    return [each for each in changes if not each.startswith("run.dir ")]


def identity_hash(config: CampaignConfig) -> str:
    """Return the SHA-256 of what identifies a campaign."""
    content = parse_yaml(dump_config(config))
    keys = {key: _pick(content, key) for key in IDENTITY}
    return hashlib.sha256(json.dumps(keys, sort_keys=True).encode()).hexdigest()


def config_hash(config: CampaignConfig) -> str:
    """Hash what decides the weights: all but where the campaign runs, how long, and who watches."""
    content = config.model_dump(
        mode="json",
        exclude={
            **dict.fromkeys(
                ("run", "cluster", "trackers", "guards", "evaluations", "service"), True
            ),
            "reference": {"replicas", "stream"},
            "learner": {"stream_values"},
        },
    )
    if config.learner.schedule != "constant":
        content["iterations"] = config.run.iterations
    content |= {"staleness": config.run.max_staleness, "in_flight": config.run.max_in_flight}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _pick(config: object, key: str) -> object:
    """Return the value at a dotted key; None where there is none."""
    for part in key.split("."):
        config = config.get(part) if isinstance(config, dict) else None
    return config


def _differences(old: object, new: object, key: str) -> Iterator[str]:
    """Describe the differences at or below `key`."""
    if isinstance(old, dict) and isinstance(new, dict):
        for name in sorted(old.keys() | new.keys()):
            inner = f"{key}.{name}" if key else name
            yield from _differences(old.get(name), new.get(name), inner)
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for number, (before, after) in enumerate(zip(old, new, strict=True)):
            yield from _differences(before, after, f"{key}[{number}]")
    elif old != new and _MAY_BE_SECRET.match(key):
        yield f"{key} is another one"
    elif old != new:
        yield f"{key} was {old!r}, now {new!r}"
