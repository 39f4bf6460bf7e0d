"""What protoc wrote is what it would write now."""

from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).parents[2]
PROTO = Path("rayhf/service/proto")


def test_generated_code_is_fresh(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    sources = [str(path.relative_to(ROOT)) for path in (ROOT / PROTO).glob("*.proto")]
    outputs = [f"--{kind}_out={tmp_path}" for kind in ("python", "pyi", "grpc_python")]
    assert sources and protoc.main(["protoc", "-I", ".", *outputs, *sources]) == 0
    written = {path.name: path.read_text() for path in (tmp_path / PROTO).iterdir()}
    kept = {path.name: path.read_text() for path in (ROOT / PROTO).glob("*_pb2*")}
    assert written == kept, "run `make proto`"
