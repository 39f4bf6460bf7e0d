"""Repositories of the hub in tests/hub.py: files, commits, branches, and what was requested."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import threading
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

RepoType = Literal["model", "dataset"]
LARGE = (".safetensors", ".bin", ".gguf", ".parquet", ".arrow", ".pt", ".onnx")
"""Suffixes of files that are served and taken as git-lfs files."""
TOKEN = "hf_writer"
"""A token that may read gated repositories and write."""
DATE = "2026-01-01T00:00:00.000Z"


class HubError(Exception):
    """An error response."""

    def __init__(self, status: int, code: str = "", message: str = "") -> None:
        super().__init__(message)
        self.status = status
        self.headers = {"X-Error-Code": code} if code else {}
        if message:
            self.headers["X-Error-Message"] = message


@dataclass
class Break:
    """Connections that end in the middle of a file."""

    after: int
    """Bytes that are sent before the end."""
    times: int
    stalls: threading.Event | None = None
    """Instead of ending, the connection waits for this."""


@dataclass
class Hub:
    """A hub's repositories and what was requested of it."""

    root: Path
    url: str = ""
    content_url: str = ""
    """Another host name of the same server: the client drops its token there, as it does for a
    content delivery network."""
    tokens: set[str] = field(default_factory=lambda: {TOKEN, "hf_reader"})
    """Known tokens; any other is refused."""
    readers: dict[str, set[str]] = field(default_factory=dict)
    """Gated repository -> tokens that may read its files."""
    private: set[str] = field(default_factory=set)
    """Repositories that exist only for TOKEN."""
    requests: Counter[str] = field(default_factory=Counter)
    """Number of requests by "METHOD /path"."""
    sent: Counter[str] = field(default_factory=Counter)
    """Bytes of file content sent, by file name."""
    sizes: dict[str, int] = field(default_factory=dict)
    """File name -> size that listings state instead of its own."""
    breaks: dict[str, Break] = field(default_factory=dict)
    """File name -> how its next downloads break off."""

    def env(self, home: Path, token: str | None = None) -> dict[str, str]:
        """Return the environment of a client process with `home` as its cache."""
        direct = ",".join(filter(None, ["127.0.0.1,localhost", os.environ.get("NO_PROXY")]))
        env = {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": direct,
            "no_proxy": direct,
        }
        return env | ({"HF_TOKEN": token} if token else {})

    def add(
        self,
        repo_type: RepoType,
        name: str,
        files: Path | Mapping[str, bytes | str],
        *,
        revision: str = "main",
    ) -> str:
        """Commit a directory or {path: content} as the whole content of a branch; return the
        commit."""
        if isinstance(files, Path):
            paths = [path for path in files.rglob("*") if path.is_file()]
            content = {str(path.relative_to(files)): path.read_bytes() for path in paths}
        else:
            content = {
                path: text.encode() if isinstance(text, str) else text
                for path, text in files.items()
            }
        return self._commit(self._repo(repo_type, name), content, revision)

    def gate(self, name: str, *tokens: str) -> None:
        """Let only `tokens` read the files of a repository."""
        self.readers[name] = set(tokens)

    def break_off(self, filename: str, *, after: int, times: int = 1) -> None:
        """End the next `times` downloads of a file after `after` bytes."""
        self.breaks[filename] = Break(after, times)

    def stall(self, filename: str, *, after: int) -> threading.Event:
        """Let the next download of a file stop after `after` bytes until the event is set."""
        event = threading.Event()
        self.breaks[filename] = Break(after, 1, event)
        return event

    def files(self, repo_type: RepoType, name: str, revision: str = "main") -> Path:
        """Return the directory with the files of a commit, branch or tag. Raises HubError."""
        repo = self._repo(repo_type, name)
        if not repo.is_dir():
            raise HubError(404, "RepoNotFound", "Repository not found")
        commit = repo / self.refs(repo).get(revision, revision)
        if not (re.fullmatch(r"[0-9a-f]{40}", commit.name) and commit.is_dir()):
            raise HubError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit

    def refs(self, repo: Path) -> dict[str, str]:
        """Return {branch or tag: commit} of a repository's directory."""
        path = repo / "refs.json"
        refs: dict[str, str] = json.loads(path.read_text()) if path.exists() else {}
        return refs

    def create(self, repo_type: RepoType, name: str, *, private: bool) -> None:
        """Create an empty repository. Raises HubError for one that exists."""
        repo = self._repo(repo_type, name)
        if repo.exists():
            raise HubError(409, message="You already created this model repo")
        if private:
            self.private.add(name)
        self._commit(repo, {".gitattributes": b"*.safetensors filter=lfs\n"}, "main")

    def apply(self, repo_type: RepoType, name: str, revision: str, lines: list[Any]) -> str:
        """Apply the lines of a commit request to a branch; return the new commit."""
        parent = self.files(repo_type, name, revision)
        content = {path: (parent / path).read_bytes() for path in paths_below(parent)}
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                content[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                content[value["path"]] = (self.root / "lfs" / value["oid"]).read_bytes()
            elif line["key"] == "deletedFile":
                del content[value["path"]]
            elif line["key"] == "deletedFolder":
                folder = value["path"].rstrip("/") + "/"
                content = {p: c for p, c in content.items() if not p.startswith(folder)}
        return self._commit(parent.parent, content, revision)

    def _repo(self, repo_type: RepoType, name: str) -> Path:
        return self.root / f"{repo_type}s" / name

    def _commit(self, repo: Path, content: Mapping[str, bytes], revision: str) -> str:
        digest = hashlib.sha1(str(repo).encode())
        for path, data in sorted(content.items()):
            digest.update(path.encode() + b"\0" + hashlib.sha256(data).digest())
        commit = repo / digest.hexdigest()
        for path, data in content.items():
            (commit / path).parent.mkdir(parents=True, exist_ok=True)
            (commit / path).write_bytes(data)
        refs = self.refs(repo) | {revision: commit.name}
        (repo / "refs.json").write_text(json.dumps(refs))
        return commit.name


def paths_below(commit: Path) -> list[str]:
    """Return the paths of a commit's files, sorted."""
    return sorted(str(p.relative_to(commit)) for p in commit.rglob("*") if p.is_file())


def file_entry(commit: Path, path: str) -> dict[str, Any]:
    """Return a file's entry in a tree."""
    data = (commit / path).read_bytes()
    blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    entry: dict[str, Any] = {"type": "file", "path": path, "size": len(data), "oid": blob}
    if path.endswith(LARGE):
        sha256 = hashlib.sha256(data).hexdigest()
        entry["lfs"] = {"oid": sha256, "size": len(data), "pointerSize": 134}
    return entry


def tree(commit: Path, below: str, *, recursive: bool) -> list[dict[str, Any]]:
    """Return the entries below a folder. Raises HubError for a folder that does not exist."""
    folder = commit / below
    if not folder.is_dir():
        raise HubError(404, "EntryNotFound", f"{below} does not exist")
    paths = folder.rglob("*") if recursive else folder.iterdir()
    return [path_entry(commit, str(path.relative_to(commit))) for path in sorted(paths)]


def path_entry(commit: Path, path: str) -> dict[str, Any]:
    """Return the entry of a file or a folder."""
    if (commit / path).is_dir():
        return {"type": "directory", "path": path, "oid": hashlib.sha1(path.encode()).hexdigest()}
    return file_entry(commit, path)
