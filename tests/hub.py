"""Small model and data set hub on loopback, for the real huggingface_hub and datasets clients.

    with hub_server(tmp_path / "hub") as hub:
        commit = hub.add("model", "org/tiny", model_dir)
        subprocess.run(command, env=os.environ | hub.env(tmp_path / "home"))

It serves what those clients request: repository info, trees, paths, refs, files (ETag, ranges,
redirects of large files), gated and private repositories, and it takes new repositories and
commits, large files through git-lfs. The Xet protocol is not served: `env` switches it off.

huggingface_hub reads HF_ENDPOINT, HF_HOME and HF_HUB_OFFLINE when it is imported, so a test sets
them for a process that it starts. `python -m tests.hub DIR` serves a directory from a shell.

On disk, for each repository: `models/org/name/<commit>/<files>` and `refs.json`.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal
from urllib.parse import parse_qs, quote, unquote, urlsplit

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
    breaks: dict[str, Break] = field(default_factory=dict)
    """File name -> how its next downloads break off."""

    def env(self, home: Path, token: str | None = None) -> dict[str, str]:
        """Return the environment of a client process with `home` as its cache."""
        env = {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1,localhost",
            "no_proxy": "127.0.0.1,localhost",
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


class Handler(BaseHTTPRequestHandler):
    """One connection; `routes` maps a path to the method that answers."""

    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def _answer(self) -> None:
        url = urlsplit(self.path)
        self.query = {key: values[-1] for key, values in parse_qs(url.query).items()}
        self.hub.requests[f"{self.command} {unquote(url.path)}"] += 1
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            self.body = self._chunked()
        authorization = self.headers.get("Authorization") or ""
        self.token = authorization.removeprefix("Bearer ") or None
        try:
            if self.token is not None and self.token not in self.hub.tokens:
                raise HubError(401, message="Invalid credentials in Authorization header")
            for method, pattern, route in ROUTES:
                match = re.fullmatch(pattern, url.path)
                if match and self.command in method:
                    route(self, **{key: unquote(v or "") for key, v in match.groupdict().items()})
                    return
            raise HubError(404, message=f"no route for {self.command} {url.path}")
        except HubError as error:
            self._send(error.status, json.dumps({"error": str(error)}), error.headers)

    def _chunked(self) -> bytes:
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _send(self, status: int, body: bytes | str, headers: Mapping[str, str]) -> None:
        data = body.encode() if isinstance(body, str) else body
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _json(self, value: object) -> None:
        self._send(200, json.dumps(value), {"Content-Type": "application/json"})

    def _commit_dir(self, kind: str, repo: str, revision: str) -> Path:
        """Return a readable commit's directory. Raises HubError as the public hub answers."""
        if repo in self.hub.private and self.token != TOKEN:
            raise HubError(401, message="Invalid username or password.")
        if not (self.hub.root / kind / repo).is_dir() and self.token is None:
            raise HubError(401, message="Invalid username or password.")
        return self.hub.files(repo_type_of(kind), repo, revision or "main")

    def _must_write(self) -> None:
        if self.token is None:
            raise HubError(401, message="Invalid username or password.")
        if self.token != TOKEN:
            raise HubError(403, message="You don't have the rights to write to this namespace")

    def info(self, kind: str, repo: str, revision: str) -> None:
        """Answer repository info."""
        commit = self._commit_dir(kind, repo, revision)
        siblings = [
            {"rfilename": entry["path"]}
            | ({"size": entry["size"], "blobId": entry["oid"], "lfs": None} if self.query else {})
            for entry in (file_entry(commit, path) for path in paths_below(commit))
        ]
        self._json(
            {
                "_id": "0",
                "id": repo,
                "sha": commit.name,
                "private": repo in self.hub.private,
                "gated": "manual" if repo in self.hub.readers else False,
                "disabled": False,
                "downloads": 0,
                "likes": 0,
                "tags": [],
                "createdAt": DATE,
                "lastModified": DATE,
                "siblings": siblings,
            }
        )

    def tree(self, kind: str, repo: str, revision: str, path: str) -> None:
        """Answer a tree listing."""
        commit = self._commit_dir(kind, repo, revision)
        recursive = self.query.get("recursive", "").lower() in ("1", "true")
        self._json(tree(commit, path.strip("/"), recursive=recursive))

    def paths_info(self, kind: str, repo: str, revision: str) -> None:
        """Answer entries of given paths; unknown ones are left out."""
        commit = self._commit_dir(kind, repo, revision)
        if "json" in (self.headers.get("Content-Type") or ""):
            paths = json.loads(self.body)["paths"]
        else:
            paths = parse_qs(self.body.decode())["paths"]
        self._json([path_entry(commit, path) for path in paths if (commit / path).exists()])

    def refs(self, kind: str, repo: str) -> None:
        """Answer branches."""
        refs = self.hub.refs(self._commit_dir(kind, repo, "main").parent)
        branches = [
            {"name": name, "ref": f"refs/heads/{name}", "targetCommit": commit}
            for name, commit in refs.items()
        ]
        self._json({"branches": branches, "tags": [], "converts": []})

    def commits(self, kind: str, repo: str, revision: str) -> None:
        """Answer a history of one commit."""
        commit = self._commit_dir(kind, repo, revision)
        self._json(
            [{"id": commit.name, "title": "commit", "message": "", "date": DATE, "authors": []}]
        )

    def resolve(self, kind: str, repo: str, revision: str, path: str) -> None:
        """Answer a file; a large one is redirected to its content's address."""
        commit = self._commit_dir(kind or "models", repo, revision)
        readers = self.hub.readers.get(repo)
        if readers is not None and self.token not in readers:
            raise HubError(401 if self.token is None else 403, "GatedRepo", f"{repo} is gated")
        headers = {"X-Repo-Commit": commit.name}
        if not (commit / path).is_file():
            error = HubError(404, "EntryNotFound", "Entry not found")
            error.headers |= headers
            raise error
        entry = file_entry(commit, path)
        if "lfs" not in entry:
            self._file(commit / path, headers | {"ETag": f'"{entry["oid"]}"'})
            return
        content = str((commit / path).relative_to(self.hub.root))
        headers |= {
            "X-Linked-ETag": f'"{entry["lfs"]["oid"]}"',
            "X-Linked-Size": str(entry["size"]),
            "Location": f"{self.hub.content_url}/content/{quote(content)}",
        }
        self._send(302, b"", headers)

    def content(self, path: str) -> None:
        """Answer a large file's content."""
        self._file(self.hub.root / path, {"ETag": f'"{path}"'})

    def _file(self, path: Path, headers: Mapping[str, str]) -> None:
        data = path.read_bytes()
        status = 200
        extra = {"Accept-Ranges": "bytes"}
        requested = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if requested:
            first = int(requested[1])
            last = min(int(requested[2] or len(data)), len(data) - 1)
            status = 206
            extra["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
            data = data[first : last + 1]
        broken = self.hub.breaks.get(path.name)
        if self.command == "GET":
            if broken is not None and broken.times > 0:
                broken.times -= 1
                self._break(data, broken.after, headers | extra, status)
                self.hub.sent[path.name] += broken.after
                return
            self.hub.sent[path.name] += len(data)
        self._send(status, data, headers | extra)

    def _break(self, data: bytes, after: int, headers: Mapping[str, str], status: int) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[:after])
        self.wfile.flush()
        self.close_connection = True

    def whoami(self) -> None:
        """Answer who a token belongs to."""
        if self.token is None:
            raise HubError(401, message="Invalid username or password.")
        self._json({"type": "user", "name": "user", "orgs": [{"name": "org"}], "auth": {}})

    def validate(self) -> None:
        """Answer a check of a card's metadata: only that it is there."""
        content = json.loads(self.body)["content"]
        if not content.startswith("---\n"):
            warning = {"message": "empty or missing yaml metadata in repo card"}
            self._json({"errors": [], "warnings": [warning]})
            return
        self._json({"errors": [], "warnings": []})

    def create(self) -> None:
        """Create a repository."""
        self._must_write()
        request = json.loads(self.body)
        name = f"{request['organization'] or 'user'}/{request['name']}"
        private = request.get("visibility") == "private" or bool(request.get("private"))
        self.hub.create(request.get("type") or "model", name, private=private)
        self._json({"url": f"{self.hub.url}/{name}", "name": name, "id": "0"})

    def preupload(self, kind: str, repo: str, revision: str) -> None:
        """Answer how each file is to be uploaded, and which content the branch has."""
        self._must_write()
        commit = self._commit_dir(kind, repo, revision)
        files = []
        for file in json.loads(self.body)["files"]:
            path = file["path"]
            mode = "lfs" if path.endswith(LARGE) else "regular"
            entry = file_entry(commit, path) if (commit / path).is_file() else {}
            oid = entry.get("lfs", entry).get("oid")
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self._json({"files": files})

    def lfs_batch(self, kind: str, repo: str) -> None:
        """Answer where large files go; those that are there need no upload."""
        self._must_write()
        objects = []
        for item in json.loads(self.body)["objects"]:
            upload = {"href": f"{self.hub.url}/lfs/{item['oid']}"}
            there = (self.hub.root / "lfs" / item["oid"]).exists()
            objects.append(item | ({} if there else {"actions": {"upload": upload}}))
        self._json({"transfer": "basic", "objects": objects})

    def lfs_put(self, oid: str) -> None:
        """Store a large file."""
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise HubError(400, message="checksum differs")
        (self.hub.root / "lfs").mkdir(exist_ok=True)
        (self.hub.root / "lfs" / oid).write_bytes(self.body)
        self._json({})

    def commit(self, kind: str, repo: str, revision: str) -> None:
        """Apply a commit."""
        self._must_write()
        self._commit_dir(kind, repo, revision)
        lines = [json.loads(line) for line in self.body.splitlines()]
        commit = self.hub.apply(repo_type_of(kind), repo, revision, lines)
        url = f"{self.hub.url}/{repo}/commit/{commit}"
        self._json({"success": True, "commitOid": commit, "commitUrl": url})


def repo_type_of(kind: str) -> RepoType:
    """Return the repository type of an address's first part: "models" or "datasets"."""
    return "dataset" if kind == "datasets" else "model"


API = r"/api/(?P<kind>models|datasets)/(?P<repo>[^/]+/[^/]+)"
FILES = r"/(?:(?P<kind>datasets)/)?(?P<repo>[^/]+/[^/]+)"
ROUTES = [
    ("GET", API + r"(?:/revision/(?P<revision>[^/]+))?", Handler.info),
    ("GET", API + r"/tree/(?P<revision>[^/]+)(?P<path>/.*)?", Handler.tree),
    ("POST", API + r"/paths-info/(?P<revision>[^/]+)", Handler.paths_info),
    ("GET", API + r"/refs", Handler.refs),
    ("GET", API + r"/commits/(?P<revision>[^/]+)", Handler.commits),
    ("GET HEAD", FILES + r"/resolve/(?P<revision>[^/]+)/(?P<path>.+)", Handler.resolve),
    ("GET HEAD", r"/content/(?P<path>.+)", Handler.content),
    ("GET", r"/api/whoami-v2", Handler.whoami),
    ("POST", r"/api/validate-yaml", Handler.validate),
    ("POST", r"/api/repos/create", Handler.create),
    ("POST", API + r"/preupload/(?P<revision>[^/]+)", Handler.preupload),
    ("POST", FILES + r"\.git/info/lfs/objects/batch", Handler.lfs_batch),
    ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})", Handler.lfs_put),
    ("POST", API + r"/commit/(?P<revision>[^/]+)", Handler.commit),
]


@contextlib.contextmanager
def hub_server(root: Path, *, port: int = 0) -> Iterator[Hub]:
    """Serve the repositories below `root` in a thread; `port` 0 takes a free one."""
    root.mkdir(parents=True, exist_ok=True)
    hub = Hub(root)
    handler = type("HubHandler", (Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", port), handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    hub.content_url = f"http://localhost:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, name="hub", daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def main() -> None:
    """Serve a directory until interrupted; `TYPE:org/name=DIR` adds repositories first."""
    with hub_server(Path(sys.argv[1])) as hub:
        for argument in sys.argv[2:]:
            kind, _, rest = argument.partition(":")
            name, _, directory = rest.partition("=")
            hub.add("dataset" if kind == "dataset" else "model", name, Path(directory))
        print(f"HF_ENDPOINT={hub.url}", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()


if __name__ == "__main__":
    main()
