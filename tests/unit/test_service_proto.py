"""What protoc wrote is what it would write now, and no call waits for ever."""

import ast
import re
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).parents[2]
SOURCES = [Path("rayhf/scorer/grpc/scorer.proto"), Path("rayhf/control/campaign.proto")]


def test_generated_code_is_fresh(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    sources = [str(path) for path in SOURCES]
    outputs = [f"--{kind}_out={tmp_path}" for kind in ("python", "pyi", "grpc_python")]
    assert protoc.main(["protoc", "-I", ".", *outputs, *sources]) == 0
    files = list(tmp_path.rglob("*_pb2*"))
    written = {path.name: path.read_text() for path in files}
    kept = {path.name: (ROOT / path.relative_to(tmp_path)).read_text() for path in files}
    assert written == kept, "run `make proto`"


def test_every_call_has_a_deadline():
    """Calls through rayhf.service.client.Client need one by their signature; here nobody goes
    around it."""
    verbs = {"Check"}
    for source in SOURCES:
        verbs.update(re.findall(r"\brpc (\w+)\(", (ROOT / source).read_text()))
    called = rf"\w*stub\w*\.({'|'.join(verbs)})|method"  # `method` is what the client itself calls
    calls = []
    for file in (
        f
        for room in ("rayhf", "actors", "launch")
        for f in (ROOT / room).rglob("*.py")
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
