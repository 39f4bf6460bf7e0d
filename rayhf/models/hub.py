"""Models on a hub: a name in a config to one commit's files in this machine's cache.

The launcher resolves every hub name once (`resolve`), pins it to the commit and downloads it
(`download`). Actors get the pinned name: `obtain` downloads what their own machine lacks, and
`local_directory` says where it is. The cache, the token and the address are huggingface_hub's:
HF_HOME, HF_TOKEN, HF_HUB_OFFLINE and HF_ENDPOINT mean what they mean there.

Only the files that a model needs are downloaded: safetensors and the small files at the top of the
repository, no second copy of the weights in another format.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from rayhf.config.models import ModelName, map_models
from rayhf.errors import ConfigError, nearest

if TYPE_CHECKING:
    from huggingface_hub import HfApi

OFFLINE = "RAYHF_HUB_OFFLINE"
"""The launcher's HF_HUB_OFFLINE in an actor's environment, whose own is always set: engines and
trainers look nothing up."""
_SMALL = {".json", ".jinja", ".txt", ".model", ".tiktoken"}
"""Suffixes of configs, vocabularies and templates."""
_GIB = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class HubModel:
    """The files of a model at one commit."""

    name: ModelName
    """As it was asked for."""
    commit: str
    sizes: Mapping[str, int]
    """File -> bytes, of the files that rayhf loads."""
    missing: int
    """Bytes that this machine's cache lacks."""

    @property
    def repository(self) -> str:
        """`org/name`."""
        return _repository(self.name)

    @property
    def size(self) -> int:
        """Bytes of all files that rayhf loads."""
        return sum(self.sizes.values())


def resolve(name: ModelName, *, key: str, weights: bool = True) -> HubModel:
    """Find the commit and the files of a hub name.

    Where the hub does not respond, or HF_HUB_OFFLINE is set, the cache answers.

    Args:
        name: a name whose `repository` is not None.
        key: config key, for messages.
        weights: count the weights as missing where the cache lacks them.

    Raises ConfigError for a repository, revision or access that does not exist, one that is not a
    model rayhf reads, and a disk without room.
    """
    from httpx2 import HTTPError
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, RevisionResolutionError

    api = HfApi(library_name="rayhf")
    repository = _repository(name)
    try:
        commit = api.resolve_revision(repository, revision=name.revision).resolved
        sizes = _sizes(api, repository, commit)
    except (HTTPError, RevisionResolutionError, HFValidationError, OSError) as error:
        raise ConfigError(f"{key}: {_explain(error, name)}") from None
    _refuse(sizes, name, key=key)
    wanted = {path: size for path, size in sizes.items() if _is_wanted(path, sizes)}
    lacking = [
        path
        for path in wanted
        if not _cached(repository, path, commit) and (weights or not _is_weights(path))
    ]
    missing = sum(wanted[path] for path in lacking)
    _check_room(missing, name, key=key)
    return HubModel(name=name, commit=commit, sizes=wanted, missing=missing)


def download(
    model: HubModel,
    *,
    key: str,
    weights: bool = True,
    progress: Callable[[int], None] = lambda count: None,
) -> None:
    """Download what the cache lacks of a model; one that was interrupted continues.

    Args:
        model: from `resolve`.
        key: config key, for messages.
        weights: download the weights too.
        progress: called with the number of bytes that were received.

    Raises ConfigError where that fails.
    """
    from httpx2 import HTTPError
    from huggingface_hub import snapshot_download

    try:
        snapshot_download(
            model.repository,
            revision=model.commit,
            allow_patterns=[path for path in model.sizes if weights or not _is_weights(path)],
            tqdm_class=_bar_class(progress),
            library_name="rayhf",
        )
    except (HTTPError, OSError) as error:
        raise ConfigError(f"{key}: {_explain(error, model.name, begun=True)}") from None


def obtain(value: object) -> None:
    """Download the pinned models of a config, or of a part of one, that this machine lacks.

    In a process of its own: this one may have to stay offline. Raises ConfigError.
    """

    def fetch(key: str, name: ModelName) -> ModelName:
        if name.commit and not _is_complete(name):
            environment = os.environ | {"HF_HUB_OFFLINE": os.environ.get(OFFLINE, "0")}
            command = [sys.executable, "-m", "rayhf.models.hub", str(name), key or "model"]
            done = subprocess.run(
                command, env=environment, capture_output=True, text=True, check=False
            )
            if done.returncode:
                lines = done.stderr.strip().splitlines() or ["no message"]
                raise ConfigError(f"{lines[-1]} (on node {os.uname().nodename})")
        return name

    map_models(value, fetch)


def local_directory(name: ModelName, base: Path = Path()) -> Path:
    """Return a model's directory on this machine, which exists only after `download` or `obtain`.

    Args:
        name: a path, or a hub name pinned to a commit.
        base: where relative paths start.
    """
    commit = name.commit
    if commit is None:
        return base / name.text
    from huggingface_hub.constants import HF_HUB_CACHE

    folder = f"models--{_repository(name).replace('/', '--')}"
    return Path(HF_HUB_CACHE).expanduser() / folder / "snapshots" / commit


def has_weights(directory: Path) -> bool:
    """Return False for a commit in the cache whose weights are not all downloaded yet.

    `rayhf check` only needs its config and tokenizer.
    """
    if directory.parent.name != "snapshots":
        return True
    index = directory / "model.safetensors.index.json"
    names = {"model.safetensors"}
    if index.is_file():
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    return all((directory / name).is_file() for name in names)


def _repository(name: ModelName) -> str:
    assert name.repository is not None, f"{name} is no hub name"
    return name.repository


def _sizes(api: HfApi, repository: str, commit: str) -> dict[str, int]:
    """Return {file: bytes} of a commit: as recorded, as the hub lists them, or as found on disk."""
    from httpx2 import TransportError
    from huggingface_hub import get_cached_repo_tree
    from huggingface_hub.errors import CachedRepoTreeNotFoundError
    from huggingface_hub.hf_api import RepoFile

    with suppress(CachedRepoTreeNotFoundError):
        files = get_cached_repo_tree(repository, revision=commit)
        return {file.path: file.size for file in files}
    try:
        tree = api.list_repo_tree(repository, recursive=True, revision=commit)
        return {entry.path: entry.size for entry in tree if isinstance(entry, RepoFile)}
    except (TransportError, ConnectionError):  # ConnectionError: HF_HUB_OFFLINE is set
        snapshot = local_directory(ModelName(f"{repository}@{commit}"))
        found = {file.name: file.stat().st_size for file in snapshot.glob("*")}
        if not found:
            raise
        return found


def _is_wanted(path: str, sizes: Mapping[str, int]) -> bool:
    """Return whether a model needs a file of its repository."""
    if "/" in path:  # other formats, and further models
        return False
    if path.endswith(".safetensors"):
        # Some repositories hold the weights twice: consolidated.safetensors beside model-*.
        named = any(_is_weights(other) and other.startswith("model") for other in sizes)
        return path.startswith("model") or not named
    return PurePosixPath(path).suffix in _SMALL


def _is_weights(path: str) -> bool:
    return path.endswith(".safetensors") and "/" not in path


def _refuse(sizes: Mapping[str, int], name: ModelName, *, key: str) -> None:
    """Raise ConfigError for a repository that is not a model with safetensors."""
    if "config.json" not in sizes:
        what = "a PEFT adapter" if "adapter_config.json" in sizes else "not a transformers model"
        raise ConfigError(
            f"{key}: {name} is {what}: the repository has no config.json; expected one with "
            "config.json, a tokenizer and *.safetensors"
        )
    if not any(_is_weights(path) for path in sizes):
        raise ConfigError(
            f"{key}: {name} has no *.safetensors weights; other formats are not read (many "
            "repositories have a branch with safetensors: expected org/name@refs/pr/N or another "
            "repository)"
        )


def _cached(repository: str, path: str, commit: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(repository, path, revision=commit), str)


def _is_complete(name: ModelName) -> bool:
    """Return whether the cache holds every file that the model needs."""
    from huggingface_hub import get_cached_repo_tree
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    directory = local_directory(name)
    try:
        files = get_cached_repo_tree(_repository(name), revision=name.commit)
    except CachedRepoTreeNotFoundError:
        return (directory / "config.json").is_file() and any(directory.glob("*.safetensors"))
    sizes = {file.path: file.size for file in files}
    return all((directory / path).is_file() for path in sizes if _is_wanted(path, sizes))


def _check_room(missing: int, name: ModelName, *, key: str) -> None:
    """Raise ConfigError where the cache's disk has no room for `missing` bytes."""
    from huggingface_hub.constants import HF_HUB_CACHE

    place = Path(HF_HUB_CACHE).expanduser().absolute()
    existing = next(path for path in (place, *place.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if missing > free:
        raise ConfigError(
            f"{key}: {name} needs {missing / _GIB:,.1f} GiB more in {place}, and "
            f"{free / _GIB:,.1f} GiB are free there; free some, or set HF_HOME to a disk with room"
        )


def _explain(error: Exception, name: ModelName, *, begun: bool = False) -> str:
    """Return one line: what went wrong with a hub name, and what to do.

    `begun`: the hub has answered before, and files may be complete already.
    """
    from huggingface_hub import constants, errors, get_token

    repository = _repository(name)
    endpoint = constants.ENDPOINT
    cause = error
    if not isinstance(error, errors.HfHubHTTPError) and isinstance(error.__cause__, Exception):
        cause = error.__cause__
    if isinstance(error, errors.GatedRepoError):
        lacking = "the token has no access" if get_token() else "no token is set"
        return (
            f"{name} is gated, and {lacking}; request access at {endpoint}/{repository} and set "
            "HF_TOKEN"
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        hidden = "" if get_token() else " (a private one needs HF_TOKEN)"
        return (
            f"there is neither a directory {name} nor a model {repository} on {endpoint}{hidden}; "
            "expected a model directory, or org/name of the hub"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        known = _revisions(repository)
        return (
            f"{repository} has no revision {name.revision}"
            f"{nearest(name.revision or '', known)} (a branch, tag or commit)"
        )
    if constants.is_offline_mode():
        return (
            f"there is no directory {name}, HF_HUB_OFFLINE is set, and {name} is not complete in "
            f"{constants.HF_HUB_CACHE}; unset HF_HUB_OFFLINE, or give a model directory"
        )
    if isinstance(error, errors.HFValidationError):
        return f"{name} is neither a model directory nor a hub name org/name"
    if isinstance(cause, errors.HfHubHTTPError):
        status = cause.response.status_code
        if status in (401, 403):
            return f"{endpoint} refused the token of HF_TOKEN or `hf auth login` ({status})"
        return f"{endpoint} answered {status} for {name}; try again later"
    if isinstance(error, OSError) and error.errno is not None:
        return f"{name} cannot be written to {constants.HF_HUB_CACHE} ({error.strerror})"
    reason = " ".join(str(cause).split())[:200]
    if begun:
        return (
            f"the download of {name} from {endpoint} broke off ({reason}); the same command "
            "continues it"
        )
    return (
        f"there is no directory {name}, it is not complete in {constants.HF_HUB_CACHE}, and "
        f"{endpoint} cannot be reached ({reason}); expected a model directory, or a connection to "
        "the hub (HF_ENDPOINT names another one)"
    )


def _revisions(repository: str) -> list[str]:
    """Return the branches and tags of a repository; none where they cannot be listed."""
    from httpx2 import HTTPError
    from huggingface_hub import HfApi

    with suppress(HTTPError, OSError):
        refs = HfApi().list_repo_refs(repository)
        return [ref.name for ref in (*refs.branches, *refs.tags)]
    return []


def _bar_class(progress: Callable[[int], None]) -> type[Any]:
    """Return a tqdm class that displays nothing and reports received bytes."""
    from huggingface_hub.utils.tqdm import tqdm

    class Bar(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            # One of several bars counts the bytes that are on the disk.
            self._counts_bytes = kwargs.get("desc", "").startswith("Reconstructing")
            super().__init__(*args, **{**kwargs, "disable": True})  # type: ignore[no-untyped-call]

        def update(self, n: float | None = 1) -> None:
            if self._counts_bytes and n:
                progress(int(n))

    return Bar


def main() -> None:
    """Download a pinned name (`obtain`); exit 2 with one line where that fails."""
    text, key = sys.argv[1:]
    try:
        download(resolve(ModelName(text), key=key), key=key)
    except ConfigError as error:
        print(error, file=sys.stderr)  # noqa: T201
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
