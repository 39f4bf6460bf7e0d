"""HTTP requests of the hub in tests/hub.py: one method per route."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from urllib.parse import parse_qs, quote, unquote, urlsplit

from tests.hub_store import (
    DATE,
    LARGE,
    TOKEN,
    Break,
    Hub,
    HubError,
    RepoType,
    file_entry,
    path_entry,
    paths_below,
    tree,
)


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
        hidden = repo in self.hub.private or not (self.hub.root / kind / repo).is_dir()
        if hidden and self.token is None:
            # The public hub names no code here; the client takes one for granted on https only.
            raise HubError(401, "RepoNotFound", "Invalid username or password.")
        if repo in self.hub.private and self.token != TOKEN:
            raise HubError(404, "RepoNotFound", "Repository not found")
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
        entries = tree(commit, path.strip("/"), recursive=recursive)
        for entry in entries:
            if entry["path"] in self.hub.sizes:
                entry["size"] = self.hub.sizes[entry["path"]]
        self._json(entries)

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
                self._break(data, broken, headers | extra, status)
                return
            self.hub.sent[path.name] += len(data)
        self._send(status, data, headers | extra)

    def _break(self, data: bytes, broken: Break, headers: Mapping[str, str], status: int) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[: broken.after])
        self.wfile.flush()
        self.hub.sent[self.path.rpartition("/")[2]] += broken.after
        if broken.stalls is not None:
            broken.stalls.wait()
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
