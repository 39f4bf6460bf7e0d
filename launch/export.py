"""`rayhf export`: a campaign's latest policy, or its adapter, as a directory and on a hub."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from rich.console import Console
from rich.table import Table

from launch.model_card import model_card
from launch.sanitize import print_plain
from rayhf.config.models import ModelName
from rayhf.errors import CheckpointError, ConfigError
from rayhf.run_dir.files import MANIFEST, verify
from rayhf.run_dir.identity import read_config
from rayhf.run_dir.names import check_links
from rayhf.run_dir.state import CampaignState, read_state

if TYPE_CHECKING:
    from huggingface_hub import HfApi

T = TypeVar("T")
ADAPTER = "adapter"
"""Directory of the adapter below an exported policy (rayhf/weights/export.py)."""
_NOT_BESIDE_ADAPTER = ("config.json", "generation_config.json", "model.safetensors.index.json")


def export(
    run: Path,
    directory: Path,
    console: Console,
    *,
    adapter: bool = False,
    push: str | None = None,
    private: bool = False,
) -> None:
    """Copy a campaign's latest policy with a model card, and upload it.

    Args:
        run: run directory.
        directory: to create.
        console: for a table of the files, and the address on the hub.
        adapter: the LoRA adapter in PEFT's format instead of the merged model.
        push: repository on the hub, created where it does not exist.
        private: create it as a private one.

    Raises ConfigError for a run without a policy or an adapter, a directory that exists or cannot
    be written, and a hub that does not take the upload; CheckpointError for damaged files.
    """
    source = _source(run, adapter=adapter)
    if directory.exists():
        raise ConfigError(f"{directory} exists; expected a new directory")
    if private and push is None:
        raise ConfigError("--private is for a repository on the hub; expected --push NAME")
    state = read_state(run)
    if state is None:
        raise CheckpointError(f"{run} has no campaign.json")
    config = read_config(run, state)
    files = checked_files(run)
    api = _open_repository(push, private=private) if push is not None else None
    try:
        directory.mkdir(parents=True)
        for file in files:
            if file.parent == source:
                shutil.copyfile(file, directory / file.name, follow_symlinks=False)
        if adapter:
            beside = [file for file in files if file.parent == source.parent]
            _complete_adapter(beside, directory, config, state)
        card = model_card(run, config, state, title=push or run.name, adapter=adapter)
        card.save(directory / "README.md")
    except OSError as error:
        raise ConfigError(f"{directory}: cannot be written ({error.strerror or error})") from None
    table = Table("file", "bytes")
    for file in sorted(directory.iterdir()):
        table.add_row(file.name, f"{file.stat().st_size:,}")
    console.print(table)
    if api is not None and push is not None:
        _upload(api, push, directory, console)


def _source(run: Path, *, adapter: bool) -> Path:
    """Return the directory to copy. Raises ConfigError where there is none."""
    policy = run / "policy"
    if run.is_dir():
        check_links(run)
    if not (policy / "config.json").is_file() and not (policy / MANIFEST).is_file():
        raise ConfigError(
            f"{run} has no exported policy yet; expected {policy} (written with every checkpoint)"
        )
    if not adapter:
        return policy
    if not (policy / ADAPTER).is_dir():
        raise ConfigError(
            f"--adapter: {run} trained all parameters, there is no adapter; expected a campaign "
            "with policy.lora, or an export without --adapter"
        )
    return policy / ADAPTER


def checked_files(run: Path) -> list[Path]:
    """Return the files of a campaign's latest policy, once every checksum was compared.

    Raises CheckpointError where one is damaged or missing.
    """
    policy = run / "policy"
    try:
        facts = verify(policy)
    except CheckpointError as error:
        raise CheckpointError(
            f"{error}; nothing was exported: delete {policy}, then the same `rayhf run` command "
            "exports it again"
        ) from None
    return [policy / name for name in cast(dict[str, object], facts["files"])]


def _complete_adapter(
    policy: Sequence[Path], directory: Path, config: dict[str, Any], state: CampaignState
) -> None:
    """Add the tokenizer to an adapter, and the base model's name in place of a local directory."""
    for file in policy:
        if file.suffix != ".safetensors" and file.name not in _NOT_BESIDE_ADAPTER:
            shutil.copyfile(file, directory / file.name)
    base = str(config["policy"]["model"])
    file = directory / "adapter_config.json"
    settings = json.loads(file.read_text(encoding="utf-8"))
    settings["base_model_name_or_path"] = base
    if commit := state.models.get(base):
        settings["base_model_name_or_path"] = ModelName(base).repository
        settings["revision"] = commit
    file.write_text(json.dumps(settings, indent=2, sort_keys=True), encoding="utf-8")


def _open_repository(name: str, *, private: bool) -> HfApi:
    """Create the repository where it does not exist. Raises ConfigError."""
    from huggingface_hub import HfApi, constants, get_token

    if ModelName(name).repository != name:
        raise ConfigError(f"--push {name!r}: expected the name of a repository, org/name")
    if constants.is_offline_mode():
        raise ConfigError(f"--push {name}: HF_HUB_OFFLINE is set; unset it")
    if get_token() is None:
        raise ConfigError(
            f"--push {name}: no token for {constants.ENDPOINT}; set HF_TOKEN, or `hf auth login`"
        )
    api = HfApi(library_name="rayhf")
    _checked(
        lambda: api.create_repo(name, private=private or None, exist_ok=True),
        f"--push {name}",
    )
    return api


def _upload(api: HfApi, name: str, directory: Path, console: Console) -> None:
    """Upload a directory and print where it is."""
    print_plain(console, f"uploading {directory} to {name}")
    commit = _checked(
        lambda: api.upload_folder(
            repo_id=name, folder_path=directory, commit_message="Export of a rayhf campaign"
        ),
        f"--push {name}: {directory} is complete, and `hf upload {name} {directory}` uploads it",
    )
    print_plain(console, f"{api.endpoint}/{name} at commit {commit.oid}")


def _checked(call: Callable[[], T], what: str) -> T:
    """Return the result of a call to the hub; its errors become a ConfigError of one line."""
    from httpx2 import HTTPError
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return call()
    except HfHubHTTPError as error:
        status = error.response.status_code
        reasons = {
            401: "refused the token of HF_TOKEN or `hf auth login`",
            403: "does not let this token write there",
        }
        reason = reasons.get(status, f"answered {status}: {' '.join(str(error).split())[:200]}")
        raise ConfigError(f"{what}; {constants.ENDPOINT} {reason}") from None
    except ValueError as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"{what}; {constants.ENDPOINT} refused it: {reason}") from None
    except (HTTPError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"{what}; {constants.ENDPOINT} cannot be reached ({reason})") from None
