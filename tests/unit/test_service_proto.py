"""The generated gRPC code is up to date, and every call has a deadline."""

import ast
import re
from pathlib import Path

import pytest
from grpc_tools import protoc

ROOT = Path(__file__).parents[2]
MESSAGES = [Path("rayhf/service/chat.proto")]
SERVICES = [Path("rayhf/scorer/grpc/scorer.proto"), Path("rayhf/control/campaign.proto")]


@pytest.mark.parametrize(
    ("sources", "plugins"),
    [(MESSAGES, ("python", "pyi")), (SERVICES, ("python", "pyi", "grpc_python"))],
)
def test_generated_code_is_up_to_date(tmp_path, monkeypatch, sources, plugins):
    monkeypatch.chdir(ROOT)
    outputs = [f"--{plugin}_out={tmp_path}" for plugin in plugins]
    assert protoc.main(["protoc", "-I", ".", *outputs, *map(str, sources)]) == 0
    files = list(tmp_path.rglob("*_pb2*"))
    generated = {path.name: path.read_text() for path in files}
    committed = {path.name: (ROOT / path.relative_to(tmp_path)).read_text() for path in files}
    assert len(files) == len(sources) * len(plugins)
    assert generated == committed, "run `make proto`"


def test_every_call_has_a_deadline():
    """Calls through rayhf.service.client.Client take one by their signature; none bypasses it."""
    verbs = {"Check"}
    for source in SERVICES:
        verbs.update(re.findall(r"\brpc (\w+)\(", (ROOT / source).read_text()))
    called = rf"\w*stub\w*\.({'|'.join(verbs)})|method"  # `method` is what the client itself calls
    calls = []
    for file in (
        f
        for package in ("rayhf", "actors", "launch")
        for f in (ROOT / package).rglob("*.py")
        if not f.match("*_pb2*")
    ):
        if "rayhf.service" not in (text := file.read_text()):
            continue
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Call) and re.search(
                rf"(?i)(^|\.)({called})$", ast.unparse(node.func)
            ):
                calls.append(
                    (
                        f"{file.relative_to(ROOT)}:{node.lineno}",
                        {keyword.arg for keyword in node.keywords},
                    )
                )
    assert (
        len(calls) >= 2 and [place for place, keywords in calls if "timeout" not in keywords] == []
    )
