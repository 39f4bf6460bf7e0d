"""The source `hub`: a data set of the Hugging Face hub, read through `datasets`.

The name is resolved to a commit once, which the campaign records, so that a continued campaign
reads the same rows although a branch has moved. Cache, token and address are those of the
libraries: HF_HOME, HF_DATASETS_CACHE, HF_TOKEN, HF_HUB_OFFLINE and HF_ENDPOINT.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, MutableMapping
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator

from rayhf.config.sources import SourceConfig
from rayhf.data.columns import PlacedRow, Row
from rayhf.data.files import batch_rows
from rayhf.errors import ConfigError

_BATCH = 1024
_COMMIT = re.compile(r"[0-9a-f]{40}")


def _check_dataset(name: str) -> str:
    repository, _, revision = name.partition("@")
    if not all(repository.split("/", 1)) or repository.count("/") > 1 or "@" in revision:
        raise ValueError(f"{name!r} is not the name of a data set; expected org/name")
    return name


class HubSourceConfig(SourceConfig):
    """Settings of a hub data set."""

    type: str = "hub"
    dataset: Annotated[str, AfterValidator(_check_dataset)]
    """Name on the hub, org/name; org/name@revision names a revision too."""
    config: str | None = None
    """Configuration (subset). Default: the only one, or the one called "default"."""
    split: str = "train"
    """Split, or a part of one in the notation of datasets: "train[:1000]"."""
    revision: str | None = None
    """Branch, tag or commit. Default: the main branch."""

    @property
    def repository(self) -> str:
        """Name without the revision."""
        return self.dataset.partition("@")[0]

    @property
    def full_revision(self) -> str | None:
        """The revision of either notation."""
        return self.revision or self.dataset.partition("@")[2] or None

    @property
    def default_name(self) -> str:
        """Name of the repository without its owner, and the configuration."""
        name = self.repository.rpartition("/")[2]
        return f"{name}_{self.config}" if self.config else name


class HubSource:
    """Data set of the Hugging Face hub, pinned to a commit."""

    Config: ClassVar[type[SourceConfig]] = HubSourceConfig

    def __init__(self, config: HubSourceConfig, *, base: Path) -> None:
        self._config = config
        self._commit: str | None = None

    @property
    def label(self) -> str:
        """Repository, configuration and split."""
        parts = [part for part in (self._config.config, self._config.split) if part]
        return f"{self._config.repository} ({', '.join(parts)})"

    def pin(self, commits: MutableMapping[str, str]) -> None:
        """Read the commit that `commits` has for the data set, or resolve and add it.

        Raises ConfigError where the data set or the revision does not exist or cannot be read.
        """
        revision = self._config.full_revision
        name = self._config.repository + (f"@{revision}" if revision else "")
        if name not in commits:
            commits[name] = self._resolve()
        self._commit = commits[name]

    def rows(self) -> Iterator[Row]:
        """Yield the rows of the split; see `placed_rows`."""
        for _, row in self.placed_rows():
            yield row

    def placed_rows(self) -> Iterator[PlacedRow]:
        """Yield (place, row) for the rows of the split.

        Raises ConfigError for a configuration or split that does not exist, for a data set that is
        gated or cannot be reached, and for one that cannot be read.
        """
        loaded = self._load()
        tables = loaded.with_format("arrow").iter(batch_size=_BATCH)
        yield from batch_rows(tables, self.label)

    def _resolve(self) -> str:
        from httpx2 import HTTPError
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HFValidationError, RevisionResolutionError

        try:
            resolved = HfApi(library_name="rayhf").resolve_revision(
                self._config.repository,
                repo_type="dataset",
                revision=self._config.full_revision,
            )
        except (HTTPError, RevisionResolutionError, HFValidationError, OSError) as error:
            raise ConfigError(self._explain(error)) from None
        return str(resolved.resolved)

    def _load(self) -> Any:
        import datasets
        from datasets.exceptions import DatasetsError

        config = self._config
        try:
            loaded = datasets.load_dataset(
                config.repository, config.config, split=config.split, revision=self._commit
            )
        except (DatasetsError, ValueError, RuntimeError, OSError) as error:
            raise ConfigError(self._explain(error)) from None
        self._check_commit(loaded)
        return loaded

    def _check_commit(self, loaded: Any) -> None:
        """Refuse rows of another commit: without the hub, `datasets` takes the newest it has."""
        parts = {part for file in loaded.cache_files for part in Path(file["filename"]).parts}
        commits = {part for part in parts if _COMMIT.fullmatch(part)}
        if commits and self._commit not in commits:
            raise ConfigError(
                f"{self.label}: the cache does not have commit {(self._commit or '')[:12]}, and "
                "the hub cannot be reached; unset HF_HUB_OFFLINE"
            )

    def _explain(self, error: Exception) -> str:
        """Return one line: what went wrong, and what to do."""
        from huggingface_hub import constants, errors, get_token

        repository = self._config.repository
        revision = self._config.full_revision
        endpoint = constants.ENDPOINT
        token = "" if get_token() else "; no token is set (HF_TOKEN)"
        text = " ".join(str(error).partition("Example of usage")[0].split())
        response = getattr(error, "response", None)
        status = getattr(response, "status_code", None)
        if isinstance(error, errors.GatedRepoError) or self._is_gated(error):
            return (
                f"{repository} is gated; request access at {endpoint}/datasets/{repository} and "
                f"set HF_TOKEN{token}"
            )
        if isinstance(error, errors.RevisionNotFoundError):
            return f"{repository} has no revision {revision} (a branch, tag or commit)"
        if isinstance(error, errors.RepositoryNotFoundError) or status in (401, 404):
            return (
                f"there is neither a file nor a directory {repository}, nor a data set of that "
                f"name on {endpoint}, or it is private{token}"
            )
        if "BuilderConfig" in text or "Config name is missing" in text:
            known = text[text.find("[") :] if "[" in text else text
            given = self._config.config
            found = f"no configuration {given!r}" if given else "several configurations"
            return f"{repository} has {found}; expected `config` to be one of {known}"
        if text.startswith("Unknown split"):
            known = text[text.find("[") :]
            return f"{repository} has no split {self._config.split!r}; expected one of {known}"
        if constants.is_offline_mode():
            return (
                f"HF_HUB_OFFLINE is set, and the cache does not have {self.label}; unset it, or "
                "load the data set once before"
            )
        return f"{self.label} cannot be read from {endpoint} ({text[:300]})"

    def _is_gated(self, error: Exception) -> bool:
        """Whether the hub refuses the files of a repository that it describes.

        `datasets` reports this as a commit that does not exist.
        """
        from datasets.exceptions import DatasetNotFoundError
        from httpx2 import HTTPError
        from huggingface_hub import HfApi

        if not isinstance(error, DatasetNotFoundError):
            return False
        try:
            return bool(HfApi().dataset_info(self._config.repository).gated)
        except (HTTPError, OSError):
            return False
