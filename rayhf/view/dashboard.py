"""The dashboard: the pages of the report, served live for every run below a directory.

Read-only: GET only, and no file is written. A run is named by its path below the directory, and
only names that a search found are answered. On loopback only requests for a loopback name are
answered, so that no page of another site can reach it under a name of its own (DNS rebinding);
elsewhere the config asks for TLS and for a token or a client certificate.
"""

from __future__ import annotations

import base64
import hmac
import json
import os
import ssl
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rayhf.config.service import ServiceConfig, is_loopback
from rayhf.errors import ConfigError, RayhfError
from rayhf.service.credentials import read_private, read_public, read_token
from rayhf.view.groups import read_groups
from rayhf.view.heldout import heldout_answers, heldout_prompts
from rayhf.view.overview import overview, timeline
from rayhf.view.page import SCRIPTS, SERVER_POLICY, STYLE, dashboard_page, plotly, static
from rayhf.view.run import Run, find_runs
from rayhf.view.samples import (
    Page,
    Query,
    list_examples,
    list_prompts,
    list_samples,
)

_SEARCH_EVERY_S = 5.0
_NICE = 10
"""Added to the process's niceness: a campaign on the same machine goes first."""
_HEADERS = {
    "Content-Security-Policy": SERVER_POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
_LISTS = {"samples": list_samples, "prompts": list_prompts, "pairs": list_examples}


class Runs:
    """The runs below a directory; new ones appear within seconds."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._paths: dict[str, Path] = {}
        self._runs: dict[str, Run] = {}
        self._searched = 0.0

    def names(self) -> list[str]:
        """Return the names of all runs."""
        if not self._searched or time.monotonic() - self._searched > _SEARCH_EVERY_S:
            self._paths = find_runs(self.root)
            self._searched = time.monotonic()
        return list(self._paths)

    def get(self, name: str) -> Run:
        """Return a run. Raises ConfigError for a name that is not among `names`."""
        if name not in self.names():
            raise ConfigError(f"there is no run {name!r}")
        if name not in self._runs:
            self._runs[name] = Run(self._paths[name], name)
        return self._runs[name]


def build_app(root: Path, *, token: str | None, hosts: frozenset[str] | None) -> ASGIApp:
    """Return the application.

    Args:
        root: directory of the runs.
        token: what every request must send, as bearer token or as the password of basic
            authentication; None: nothing.
        hosts: names under which requests are answered; None: any.
    """
    runs = Runs(root)
    title = f"rayhf: {root.resolve().name}"

    def api(answer: Callable[[Mapping[str, str], list[str]], Any]) -> Any:
        async def endpoint(request: Request) -> Response:
            asked = request.query_params.getlist("run")
            try:
                value = await run_in_threadpool(answer, request.query_params, asked)
            except KeyError as error:
                return _json({"error": f"missing parameter {error}"}, 400)
            except (RayhfError, OSError, ValueError) as error:
                return _json({"error": str(error)}, 400)
            return _json(value)

        return endpoint

    def page(_request: Request) -> Response:
        return HTMLResponse(dashboard_page(title))

    def file(request: Request) -> Response:
        name = request.path_params["name"]
        if name == STYLE:
            return Response(static(name), media_type="text/css")
        if name in (*SCRIPTS, "plotly.js"):
            text = plotly() if name == "plotly.js" else static(name)
            return Response(text, media_type="text/javascript")
        return PlainTextResponse("not found", status_code=404)

    routes = [
        Route("/", page),
        Route("/static/{name}", file),
        Route("/api/runs", api(lambda _, __: _summaries(runs))),
        Route("/api/overview", api(lambda _, names: overview([runs.get(n) for n in names]))),
        Route("/api/timeline", api(lambda p, _: timeline(runs.get(p["run"])))),
        Route("/api/group", api(lambda p, _: _group(runs.get(p["run"]), p))),
        Route("/api/heldout", api(lambda p, _: _heldout(runs.get(p["run"]), p))),
        *(Route(f"/api/{what}", api(partial(_page, runs, each))) for what, each in _LISTS.items()),
    ]
    return _Guard(Starlette(routes=routes), token=token, hosts=hosts)


def _json(value: object, status: int = 200) -> Response:
    # In ASCII: a message of an event may contain text that is not valid Unicode.
    text = json.dumps(value, allow_nan=False)
    return Response(text, status_code=status, media_type="application/json")


def parse_query(parameters: Mapping[str, str]) -> Query:
    """Return a query from a URL's parameters. Raises ValueError for a value of another type."""
    values: dict[str, Any] = {}
    for field in fields(Query):
        text = parameters.get(field.name, "")
        if not text:
            continue
        if "bool" in str(field.type):
            values[field.name] = text == "true"
        elif "float" in str(field.type):
            values[field.name] = float(text)
        elif "int" in str(field.type):
            values[field.name] = int(text)
        else:
            values[field.name] = text
    return Query(**values)


def _summaries(runs: Runs) -> list[dict[str, Any]]:
    """Return name, state and version of every run; `error` where it is damaged."""
    rows: list[dict[str, Any]] = []
    for name in runs.names():
        try:
            run = runs.get(name)
            status = run.status()
        except RayhfError as error:
            rows.append({"id": name, "error": str(error)})
            continue
        rows.append(
            {
                "id": name,
                "algorithm": status.algorithm,
                "state": status.state,
                "iteration": status.iteration,
                "iterations": status.iterations,
                "version": run.version(),
            }
        )
    return rows


def _page(
    runs: Runs, listing: Callable[[Run, Query], Page], parameters: Mapping[str, str], _: list[str]
) -> dict[str, Any]:
    return listing(runs.get(parameters["run"]), parse_query(parameters)).as_json()


def _group(run: Run, parameters: Mapping[str, str]) -> dict[str, Any]:
    groups = read_groups(run, int(parameters["iteration"]), [parameters["prompt"]])
    if not groups:
        raise ConfigError(
            f"run {run.run_id}: iteration {parameters['iteration']} has no prompt "
            f"{parameters['prompt']}"
        )
    return groups[0]


def _heldout(run: Run, parameters: Mapping[str, str]) -> Any:
    prompt = parameters.get("prompt")
    return heldout_prompts(run) if prompt is None else heldout_answers(run, prompt)


class _Guard:
    """ASGI middleware: refuses other methods, hosts and missing tokens; adds security headers."""

    def __init__(self, app: ASGIApp, *, token: str | None, hosts: frozenset[str] | None) -> None:
        self._app = app
        self._token = token
        self._hosts = hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] += [
                    (name.lower().encode(), value.encode()) for name, value in _HEADERS.items()
                ]
            await send(message)

        refusal = self._refusal(Request(scope))
        await (refusal or self._app)(scope, receive, send_with_headers)

    def _refusal(self, request: Request) -> Response | None:
        if request.method not in ("GET", "HEAD"):
            return PlainTextResponse("read-only", status_code=405)
        if self._hosts is not None and _host(request.headers.get("host", "")) not in self._hosts:
            return PlainTextResponse("unknown host name", status_code=421)
        if self._token is not None and not self._is_authorized(request):
            return PlainTextResponse(
                "the token is missing or wrong",
                status_code=401,
                headers={"WWW-Authenticate": 'Basic realm="rayhf", charset="UTF-8"'},
            )
        return None

    def _is_authorized(self, request: Request) -> bool:
        scheme, _, sent = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() == "basic":
            try:
                sent = base64.b64decode(sent, validate=True).decode().partition(":")[2]
            except ValueError:
                return False
        elif scheme.lower() != "bearer":
            return False
        return hmac.compare_digest(sent.encode(), str(self._token).encode())


def _host(header: str) -> str:
    """Return the name in a Host header, without its port."""
    name = header.rpartition(":")[0] if ":" in header.rpartition("]")[2] else header
    return name.strip("[]").lower()


def serve(
    root: Path, config: ServiceConfig, *, base: Path, announce: Callable[[str], None]
) -> None:
    """Serve the runs below `root` until interrupted; `announce` gets the address.

    Raises ConfigError for files that cannot be used and for a port in use.
    """
    import uvicorn

    if not root.is_dir():
        raise ConfigError(f"{root} is not a directory; expected one with runs below it")
    token = None
    if config.token_file is not None:
        token = read_token(base / config.token_file, key="service.token_file")
    loopback = frozenset({"localhost", "127.0.0.1", "::1", config.host})
    app = build_app(root, token=token, hosts=loopback if is_loopback(config.host) else None)
    settings = uvicorn.Config(
        app,
        host=config.host,
        port=config.port,
        log_level="warning",
        access_log=False,
        server_header=False,
        limit_concurrency=config.max_concurrent,
        timeout_graceful_shutdown=1,
        **_tls(config, base),
    )
    try:
        socket = settings.bind_socket()
    except SystemExit:  # how uvicorn reports a port in use, after logging it
        raise ConfigError(
            f"service: cannot listen on {config.host}:{config.port}; is the port in use?"
        ) from None
    os.nice(_NICE)
    socket.listen()  # whoever reads the address may connect at once
    scheme = "http" if config.tls is None else "https"
    host = f"[{config.host}]" if ":" in config.host else config.host
    announce(f"{scheme}://{host}:{socket.getsockname()[1]}/")
    with suppress(KeyboardInterrupt):
        uvicorn.Server(settings).run(sockets=[socket])


def _tls(config: ServiceConfig, base: Path) -> dict[str, Any]:
    """Return uvicorn's TLS settings. Raises ConfigError for files that cannot be used."""
    if config.tls is None:
        return {}
    read_private(base / config.tls.key, key="service.tls.key")
    read_public(base / config.tls.certificate, key="service.tls.certificate")
    settings: dict[str, Any] = {
        "ssl_keyfile": str(base / config.tls.key),
        "ssl_certfile": str(base / config.tls.certificate),
    }
    if config.tls.client_ca is not None:
        read_public(base / config.tls.client_ca, key="service.tls.client_ca")
        settings["ssl_ca_certs"] = str(base / config.tls.client_ca)
        settings["ssl_cert_reqs"] = ssl.CERT_REQUIRED
    return settings
