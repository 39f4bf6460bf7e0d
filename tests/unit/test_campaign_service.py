"""Control of a campaign over gRPC with TLS and a token: the same commands as over files."""

import json
import threading

import grpc
import pytest
import trustme
import yaml
from campaigns import make_config, metrics_of, run_campaign
from fakes import SilentObserver
from typer.testing import CliRunner
from waiting import wait_until

from launch.cli import app
from launch.serve import control_served
from rayhf.config.service import EndpointSecurity, ServiceConfig
from rayhf.control import commands
from rayhf.control.commands import FileControl
from rayhf.control.grpc_client import GrpcControl
from rayhf.control.grpc_server import serve_campaign
from rayhf.errors import ConfigError, ServiceError, UnreachableError
from rayhf.monitoring.event_log import EventLog
from rayhf.run_dir.inbox import RowFile
from rayhf.run_dir.operator_request import read_request
from rayhf.run_dir.store import RunDir
from rayhf.service import admission

TOKEN = "a token that is long enough".replace(" ", "-")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A CA, the server's certificate, and a token."""
    folder = tmp_path_factory.mktemp("secrets")
    ca = trustme.CA()
    certificate = ca.issue_cert("localhost")
    ca.cert_pem.write_to_path(folder / "ca.pem")
    certificate.private_key_pem.write_to_path(folder / "key.pem")
    certificate.cert_chain_pems[0].write_to_path(folder / "certificate.pem")
    (folder / "token").write_text(TOKEN)
    for name in ("key.pem", "token"):
        (folder / name).chmod(0o600)
    return folder


@pytest.fixture
def finished(tmp_path):
    config = make_config(tmp_path, run={"checkpoint_every": 1, "iterations": 2})
    run_campaign(config)
    return config


@pytest.fixture
def served(finished, files):
    tls = {"certificate": files / "certificate.pem", "key": files / "key.pem"}
    server = serve_campaign(
        finished.run.dir, ServiceConfig(tls=tls, token_file=files / "token"), base=files
    )
    yield f"localhost:{server.address.rpartition(':')[2]}"
    server.stop()


def submitted_rows(run, row_type):
    return RowFile(run, row_type).read()[0]


def remote(address, files, **security):
    shown = EndpointSecurity(**{"ca": files / "ca.pem", "token_file": files / "token", **security})
    return GrpcControl(address, shown, base=files)


def test_replies_equal_those_of_file_control(finished, served, files):
    local = FileControl(finished.run.dir)
    there = remote(served, files)
    near = local.status()
    far = there.status()
    assert (far.state, far.iteration, far.commit[:16]) == ("done", 2, "iteration-000002")
    for name in (
        "run",
        "advice",
        "algorithm",
        "takes_labels",
        "takes_thumbs",
        "versions",
        "health",
        "eta_s",
        "progress_age_s",
        "fault_count",
    ):
        assert getattr(far, name) == getattr(near, name), name
    pairs = there.uncertain_pairs(3)
    assert pairs == local.uncertain_pairs(3) and len(pairs) == 3
    completions = there.uncertain_completions(3)
    assert completions == local.uncertain_completions(3) and len(completions) == 3
    with pytest.raises(ConfigError, match="is done: there is nothing to pause"):
        there.request("pause")
    with pytest.raises(ConfigError, match="is done, not paused"):
        there.unpause()


def test_pause_and_stop_reach_a_running_campaign(tmp_path):
    store = RunDir(make_config(tmp_path))
    store.set_state("running")
    server = serve_campaign(store.path, ServiceConfig(), base=tmp_path)
    there = GrpcControl(server.address, EndpointSecurity(), base=tmp_path)
    assert (
        "pauses once iteration 1 is committed" in there.request("pause")
        and read_request(store.path) == "pause"
    )
    store.set_state("paused")
    assert "resumes" in there.unpause() and read_request(store.path) == "run"
    assert (
        "stops once iteration 1 is committed" in there.request("stop")
        and read_request(store.path) == "stop"
    )
    server.stop()
    store.close()


def test_remote_prompts_and_labels_are_trained_on(finished, served, files, tmp_path):
    there = remote(served, files)
    pair = there.uncertain_pairs(1)[0]
    assert "1 labels submitted for iteration 3" in there.label(
        [{"pair_id": pair.pair_id, "verdict": "second"}], source="ann"
    )
    assert "1 prompts submitted" in there.add_prompts(
        [{"prompt": "mine", "answer": "7"}], source="ann"
    )
    assert submitted_rows(finished.run.dir, "labels")[0]["source"].startswith("ann at ipv")
    assert submitted_rows(finished.run.dir, "prompts")[0]["answer"] == "7"
    run_campaign(make_config(tmp_path, run={"checkpoint_every": 1, "iterations": 3}))
    assert metrics_of(finished)[-1]["pairs/human"] == 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda c: c.label([{"pair_id": "1/../0/1", "verdict": "first"}], source=""), "no pair"),
        (lambda c: c.label([], source=""), "0 labels at once"),
        (lambda c: c.add_prompts([{"messages": []}], source=""), "non-empty list"),
        (lambda c: c.add_prompts([{"prompt": "x" * (1 << 20)}], source=""), "1,048,"),
    ],
)
def test_bad_submission_is_refused_and_not_stored(finished, served, files, call, message):
    with pytest.raises(ConfigError, match=message):
        call(remote(served, files))
    assert not (finished.run.dir / "inbox").exists()


def test_algorithm_without_labels_refuses_them(tmp_path):
    config = make_config(tmp_path, algorithm={"type": "sppo", "samples": 3}, run={"iterations": 1})
    run_campaign(config)
    control = FileControl(config.run.dir)
    with pytest.raises(ConfigError, match="sppo does not train on human labels"):
        control.label(
            [{"pair_id": control.uncertain_pairs(1)[0].pair_id, "verdict": "first"}], source="ann"
        )


def test_client_without_credentials_is_refused(finished, served, files, tmp_path):
    with pytest.raises(ServiceError, match="unauthenticated"):
        remote(served, files, token_file=None).status()
    (tmp_path / "wrong").write_text(TOKEN[:-1] + "x")
    (tmp_path / "wrong").chmod(0o600)
    with pytest.raises(ServiceError, match="unauthenticated"):
        remote(served, files, token_file=tmp_path / "wrong").request("stop")
    trustme.CA().cert_pem.write_to_path(tmp_path / "other.pem")
    with pytest.raises(UnreachableError):
        remote(served, files, ca=tmp_path / "other.pem").status()
    assert read_request(finished.run.dir) == "run"


def test_watch_yields_past_and_new_events(tmp_path):
    store = RunDir(make_config(tmp_path))
    recorder = EventLog(store, SilentObserver())
    for number in range(30):
        recorder.event("warn", f"old {number}")
    server = serve_campaign(store.path, ServiceConfig(), base=tmp_path)
    messages = []

    def listen():
        for event in GrpcControl(server.address, EndpointSecurity(), base=tmp_path).watch(
            lambda: True
        ):
            messages.append(event.message)

    listener = threading.Thread(target=listen)
    listener.start()
    wait_until(lambda: len(messages) == 10)
    recorder.event("fault", "new")
    store.event("end", "done", code=0)
    listener.join(10)
    assert not listener.is_alive() and messages == [f"old {number}" for number in range(20, 30)] + [
        "new",
        "done",
    ]
    server.stop()
    store.close()


def test_command_line_over_grpc(finished, served, files, tmp_path):
    security = tmp_path / "security.yaml"
    security.write_text(
        yaml.safe_dump({"ca": str(files / "ca.pem"), "token_file": str(files / "token")})
    )
    there = ["--address", served, "--security", str(security)]

    def say(*words):
        result = CliRunner().invoke(app, [*words, *there])
        assert result.exception is None, result.exception
        return result.output

    assert "DONE" in say("status")
    pair = json.loads(say("pairs", "--count", "1"))
    verdicts = tmp_path / "verdicts.jsonl"
    verdicts.write_text(json.dumps({"pair_id": pair["pair_id"], "verdict": "tie"}) + "\n")
    assert "1 labels submitted" in say("label", "--file", str(verdicts))
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "one"}\n{"prompt": "two"}\n')
    assert "2 prompts submitted" in say("add-prompts", str(prompts))
    for words in (["status"], ["status", str(finished.run.dir), *there]):
        result = CliRunner().invoke(app, words)
        assert isinstance(result.exception, ConfigError) and "which campaign?" in str(
            result.exception
        )


def test_labeling_in_the_terminal(finished):
    run = str(finished.run.dir)
    result = CliRunner().invoke(app, ["label", run, "--count", "4"], input="1\ns\nt\nq\n")
    assert result.exception is None and "2 labels submitted" in result.output
    assert [row["verdict"] for row in submitted_rows(finished.run.dir, "labels")] == [
        "first",
        "tie",
    ]


def test_control_is_served_only_where_configured(finished, capsys):
    from rich.console import Console

    with control_served(finished.run.dir, None, base=finished.run.dir, console=Console()):
        assert capsys.readouterr().out == ""
    with control_served(
        finished.run.dir, ServiceConfig(), base=finished.run.dir, console=Console()
    ):
        address = capsys.readouterr().out.split("--address ")[1].strip()
        there = GrpcControl(address, EndpointSecurity(), base=finished.run.dir)
        assert there.status().state == "done"
    with pytest.raises(UnreachableError):
        there.status()


def test_watch_reads_a_long_log_in_pieces(tmp_path, monkeypatch):
    store = RunDir(make_config(tmp_path))
    for number in range(3000):
        store.event("warn", f"{number} " + "x" * 100)
    log = next(store.path.glob("logs/attempt-*/events.jsonl"))
    with log.open("a") as file:
        file.write("y" * 600_000 + "\n")
    store.event("end", "done", code=0)
    messages = [event.message for event in FileControl(store.path).watch(lambda: True)]
    assert messages == ["done"]
    sizes = []
    monkeypatch.setattr(commands, "_PIECE", 10_000)
    original = commands._complete_lines

    def counting(file, offset):
        lines, after = original(file, offset)
        sizes.append(after - offset)
        return lines, after

    monkeypatch.setattr(commands, "_complete_lines", counting)
    assert [event.message for event in FileControl(store.path).watch(lambda: True)] == ["done"]
    assert max(sizes) <= 10_000
    store.close()


def test_open_streams_lock_nobody_out(tmp_path):
    store = RunDir(make_config(tmp_path))
    store.set_state("running")
    server = serve_campaign(store.path, ServiceConfig(grace_s=0.1), base=tmp_path)
    channel = grpc.insecure_channel(server.address)
    watch = channel.unary_stream("/rayhf.v1.Campaign/Watch")
    never = threading.Event()
    label = channel.stream_unary("/rayhf.v1.Campaign/Label")
    try:
        streams = [watch(b"") for _ in range(64)]
        wait_until(lambda: sum(stream.code() is not None for stream in _ended(streams)) >= 48)
        codes = {stream.code() for stream in _ended(streams)}
        assert codes == {grpc.StatusCode.RESOURCE_EXHAUSTED}
        half_open = [label.future(_silent(never)) for _ in range(40)]
        there = GrpcControl(server.address, EndpointSecurity(), base=tmp_path)
        there._client.check_health("rayhf.v1.Campaign", timeout_s=5)
        assert "stops once iteration 1" in there.request("stop")
        for call in (*streams, *half_open):
            call.cancel()
        wait_until(lambda: there.status().state == "running")
    finally:
        never.set()
        channel.close()
        server.stop()
        store.close()


def _ended(streams):
    return [stream for stream in streams if not stream.is_active()]


def _silent(never):
    never.wait(30)
    yield b""


def test_call_whose_request_never_arrives_is_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(admission, "REQUEST_S", 0.2)
    store = RunDir(make_config(tmp_path))
    server = serve_campaign(store.path, ServiceConfig(), base=tmp_path)
    channel = grpc.insecure_channel(server.address)
    never = threading.Event()
    call = channel.stream_unary("/rayhf.v1.Campaign/Label").future(_silent(never))
    try:
        wait_until(call.done)
        assert call.code() == grpc.StatusCode.CANCELLED
    finally:
        never.set()
        channel.close()
        server.stop()
        store.close()


def test_flood_is_refused_with_its_status(tmp_path):
    store = RunDir(make_config(tmp_path))
    server = serve_campaign(store.path, ServiceConfig(), base=tmp_path)
    there = GrpcControl(server.address, EndpointSecurity(), base=tmp_path)
    with pytest.raises(UnreachableError, match=r"resource_exhausted: .* 16 MiB per minute"):
        for number in range(40):
            prompt = f"{number}" + "x" * 900_000
            there.add_prompts([{"prompt": prompt}], source="flood")
    assert (store.path / "inbox/prompts.jsonl").stat().st_size < 18 << 20
    server.stop()
    store.close()


def test_retried_calls_write_once(finished, served, files):
    pair = remote(served, files).uncertain_pairs(1)[0]
    label = {"pair_id": pair.pair_id, "verdict": "second"}
    for _ in range(3):  # each is a connection of its own
        remote(served, files).label([label], source="ann")
        remote(served, files).add_prompts([{"prompt": "mine"}], source="ann")
    assert len(submitted_rows(finished.run.dir, "labels")) == 1
    assert len(submitted_rows(finished.run.dir, "prompts")) == 1


@pytest.mark.parametrize("answer", [float("inf"), float("nan"), "\ud800"])
def test_values_that_are_no_json_are_refused_by_both_controls(finished, served, files, answer):
    for control in (FileControl(finished.run.dir), remote(served, files)):
        with pytest.raises(ConfigError, match=r"^prompts: row 1: ") as error:
            control.add_prompts([{"prompt": "x", "answer": answer}], source="")
        assert "\n" not in str(error.value)
